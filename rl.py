"""Reinforcement learning from rewards: GRPO and its relatives, REINFORCE++, PPO.

    python rl.py configs/llama_rl.json                                   # any key again as --key value
    python rl.py configs/llama_rl.json --advantage_estimator rloo --importance_sampling_level sequence

Each step of a rollout: prompts -> rollout_n replies each, by the engine on the weights of that moment ->
rewards, by Python functions or a reward model -> advantages -> updates on packed groups. The old log-probabilities are
the engine's own; engine_kl in the log says how well the trainer agrees with them. The reference is the model before
training: with LoRA the same model with the adapter off, otherwise a frozen copy, and none if no KL is asked for.
Writes what finetune.py writes. Formulas are in alignment/rl_math.py, keys in alignment/rl_arguments.py, a table of
estimators and losses in docs/rl.md.
"""

import functools
import shlex
import time
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import numpy as np
import paddle
from paddle import Tensor

import parallel
import trainer
from adapters import changes_base, lora_layers
from alignment import rl_math, rollouts
from alignment.critic import Critic, value_losses_and_metrics
from alignment.environments import load_toolbox
from alignment.groups import counts_of
from alignment.heads import Policy, add_score_head, remove_score_head, train_score_head
from alignment.moving_weights import MovingAverage
from alignment.process_rewards import process_reward
from alignment.rewards import load_reward_functions, server_reward
from alignment.rl_arguments import Args
from checkpoint import find_checkpoint
from formats.files import UserError
from formats.tokenizer import Tokenizer
from model import CausalLM

# ========================================================================================================= the loss


def policy_inputs(batch: dict) -> dict[str, Tensor]:
    """What the policy is called with. Nobody sampled the text of ptx_datasets, so it has no temperature."""
    return trainer.model_inputs(batch) | ({} if "places" in batch else {"temperature": 1.0})


def loss_and_metrics(
    outputs: dict[str, Tensor], batch: dict, counts: rl_math.Counts, args: Args
) -> tuple[Tensor, dict]:
    """A micro-batch's part of an update's loss, and of kl, clip ratios and the log-probabilities' difference.

    outputs: of heads.Policy. loss = pg_loss_coeff · policy loss + kl_loss_coeff · KL + value_loss_coeff · value loss
    - entropy_coeff · entropy, each a mean as loss_type says. Of text of ptx_datasets: ptx_coeff · its mean
    cross-entropy; Ouyang et al., arXiv 2203.02155, Eq. 2.
    """
    if "places" not in batch:
        loss = -outputs["logps"].sum() / max(1, counts.ptx_tokens)
        return args.ptx_coeff * loss, {"ptx_loss": float(loss)}
    names = ("logps", "advantages", "ref_logps", "weights")
    arrays = {name: paddle.to_tensor(batch[name]) for name in names if name in batch}
    logps, segments = outputs["logps"].astype("float64"), batch["segments"]
    options = rl_math.LossOptions(
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        clip_low=args.clip_range_ratio_low,
        clip_high=args.clip_range_ratio_high,
        dual_clip=args.dual_clip,
    )
    losses, clipped = rl_math.policy_losses(logps, arrays["logps"], arrays["advantages"], segments, options)
    losses = args.pg_loss_coeff * losses * arrays.get("weights", 1.0)
    metrics = {name: float(where.sum()) / max(1, counts.tokens) for name, where in clipped.items()}
    if "ref_logps" in arrays:
        kl = rl_math.kl_estimates(logps, arrays["ref_logps"])
        metrics["kl"] = float(kl.sum()) / max(1, counts.tokens)
        if args.kl_loss_coeff:
            losses = losses + args.kl_loss_coeff * kl
    if args.has_value_head:
        of_values, of_tokens = value_losses_and_metrics(outputs["values"], batch, counts, args)
        losses, metrics = losses + of_values, metrics | of_tokens
    if args.entropy_coeff:
        losses = losses - args.entropy_coeff * outputs["entropies"].astype("float64")
    return rl_math.mean_loss(losses, segments, batch["reply_tokens"], args.loss_type, counts, args.max_dec_len), metrics


# ======================================================================================================== set-up


def make_rewards(args: Args, tokenizer: Tokenizer, topology: parallel.Topology) -> list:
    """Whatever scores replies: Python functions, a reward server, a reward model."""
    functions = load_reward_functions(args.reward_funcs, args.reward_weights, args.reward_timeout)
    if args.reward_server:
        functions.append(server_reward(args.reward_server, args.reward_timeout))
    if args.process_reward:
        functions.append(process_reward(args.reward_model_name_or_path, args.placeholder_token, args.reward_tokens))
    elif args.reward_model_name_or_path:
        functions.append(rollouts.RewardModel(args.reward_model_name_or_path, tokenizer, topology))
    return functions


def check_model(model: CausalLM, tokenizer: Tokenizer, args: Args, longest: int) -> None:
    """UserError for a model that cannot be the policy. longest: most positions of a prompt and a reply."""
    path, key = args.model_name_or_path, "max_src_len + max_dec_len"
    limit, reason = trainer.shared_prompt_limit(model.config)
    rotates = reason == "dynamic rope"  # behind the limit the engine and training would rotate a prompt differently
    trainer.check_shared_prompts(model, path, key, longest if rotates else 0, ("rope_2d",))
    if longest > limit:
        print(
            f"{key}: {longest}: {reason}: groups of more than {limit} positions have their prompt once for each reply"
        )
    trainer.check_vocabulary(model, tokenizer, path, args)
    trainer.check_positions(model, path, {key: longest})


def setup_adapter(model: CausalLM, args: Args, checkpoint: Path | None = None) -> None:
    """trainer.setup_adapter() without dropout, and without PiSSA, which changes the reference; and a value head."""
    if args.has_value_head:
        add_score_head(model, np.zeros(model.config.hidden_size))
    trainer.setup_adapter(model, args, checkpoint)
    if model.score is not None:
        train_score_head(model)
    if changes_base(model):
        raise UserError(f"{checkpoint or args.lora_path}: the adapter changes the base weights, the reference")
    for layer in lora_layers(model).values():
        layer.dropout = 0.0


def set_critic_learning_rate(optimizer: trainer.AdamW, args: Args) -> None:
    """A value head on the policy has a learning rate of its own."""
    if args.critic_learning_rate is not None:
        heads = [weight.name for weight in optimizer.weights if weight.name.endswith("score.weight")]
        optimizer.lr_scale |= dict.fromkeys(heads, args.critic_learning_rate / args.learning_rate)


def main(args: Args) -> None:
    # ====================================================================== 1. topology, output folder, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    checkpoint = find_checkpoint(args, topology) if args.do_train else None
    tokenizer = trainer.setup_tokenizer(args)
    functions = make_rewards(args, tokenizer, topology)
    toolbox = load_toolbox(args.tools, args.environment_factory, tokenizer, args.reward_timeout, args.max_turns)
    train = rollouts.make_prompts(args, tokenizer, "train", toolbox) if args.do_train else None
    dev = rollouts.make_prompts(args, tokenizer, "dev", toolbox) if args.do_eval else None

    # ====================================================================== 2. model, and what it does before training
    model = parallel.from_pretrained(args.model_name_or_path, topology, low_bit=parallel.LowBit.of(args))
    trainer.set_recompute(model, args)
    longest = max(dataset.longest for dataset in (train, dev) if dataset) + args.max_dec_len
    check_model(model, tokenizer, args, longest)
    if args.do_train:
        setup_adapter(model, args, checkpoint)
    elif args.lora_path:
        setup_adapter(model, args)
        parallel.shard_adapters(model, topology)
    engine, before = rollouts.make_engine(args, model, tokenizer, train, dev, topology), None
    if args.do_train:
        # ================================================================== 3. reference, optimizer, rollouts, log
        critic = Critic(args, tokenizer, topology) if args.critic_model_name_or_path else None
        maker = rollouts.RolloutMaker(args, model, tokenizer, train, functions, topology, engine, critic)
        names = rollouts.metric_names(args, maker.names)
        run = trainer.setup_training(args, model, tokenizer, maker, topology, checkpoint=checkpoint, metrics=names)
        optimizer, shards, log, checkpoints = run.optimizer, run.shards, run.log, run.checkpoints
        before = rollouts.evaluate_prompts(engine, dev, functions, args, topology) if dev else None
        set_critic_learning_rate(optimizer, args)
        average = MovingAverage(run, args, checkpoint)
        if critic:
            critic.join(run, checkpoint)
        state, total, steps_per_epoch = run.state, run.total_steps, run.steps_per_epoch
        policy, rollout = Policy(model, args.temperature, with_entropy=bool(args.entropy_coeff)), None

        def step_batches(step):
            """This rank's micro-batches of an update, of a new rollout if it is the first one of a rollout."""
            nonlocal rollout
            number, update = divmod(step, args.updates_per_rollout)
            if update == 0:
                rollout = maker.make(number)
            batches = rollout.mini_batches[update % args.mini_batches]
            if critic:
                log.add_metrics(critic.update(batches, step, total))
            return [*maker.texts(step), *batches]

        def after_update(seconds):
            average.follow()
            log.add_metrics(rollout.update_metrics(seconds, topology))

        def evaluate():
            with average.in_place():
                return rollouts.evaluate_prompts(engine, dev, functions, args, topology)[0]

        step_size = counts_of  # what the means are over
        inputs = policy_inputs  # what the policy is called with

        def loss_of(outputs, batch, size):
            """This micro-batch's part of the step's loss, from the policy's outputs."""
            part, metrics = loss_and_metrics(outputs, batch, rl_math.Counts(*size), args)
            if not batch.get("is_dummy"):
                log.add_metrics(metrics)
                if "logps" in batch and state.step % args.updates_per_rollout == 0:
                    sampled = batch.get("sampled_logps", batch["logps"])
                    rollout.differences.append(outputs["logps"].numpy().astype("float64") - sampled)
            return part

        # ================================================================== 4. training loop (the same in every script)
        model.train()
        resumed_step = state.step
        while True:
            if state.step > resumed_step and trainer.is_due(
                args.save_strategy, args.save_steps, state.step, steps_per_epoch
            ):
                checkpoints.save(state)
            if trainer.is_due(args.evaluation_strategy, args.eval_steps, state.step, steps_per_epoch):
                metrics = evaluate()
                log.evaluation(state.step, metrics)
                if trainer.note_evaluation(args, state, metrics, checkpoints, log):  # no longer better: early stopping
                    break
            if state.step >= total:
                break
            start = log.begin()
            batches = step_batches(state.step)
            # The mean is over what the whole step holds: a mean of micro-batch means would weigh short ones more.
            size, loss = topology.all_reduce_sum(step_size(batches)), 0.0
            seed = functools.partial(trainer.seed_step, args.seed, state.step)
            part_loss = functools.partial(loss_of, size=size)
            for part, batch in parallel.forward_backward(policy, batches, inputs, part_loss, seed):
                loss += part
                trainer.check_finite(loss, args.output_dir, state.step, batch)
            loss = topology.all_reduce_sum(loss, stages=True)
            grad_norm = shards.reduce_gradients()
            trainer.check_finite(grad_norm, args.output_dir, state.step, batches[-1])
            lr = trainer.learning_rate(state.step, args, total)
            optimizer.step(lr, trainer.clip_scale(grad_norm, args.max_grad_norm))
            shards.gather_weights()
            optimizer.zero_grad()
            tokens = topology.all_reduce_sum(sum(batch["tokens"] for batch in batches))
            after_update(time.perf_counter() - start)
            state.step, state.consumed_tokens = state.step + 1, state.consumed_tokens + tokens
            state.epoch = state.step / steps_per_epoch
            log.step(state, loss, lr, grad_norm, tokens, time.perf_counter() - start)
        checkpoints.wait()
        # ================================================================== end of the training loop

        def before_writing(best):
            average.stay(best)
            if critic:
                critic.finish(best)
            if model.score is not None:
                remove_score_head(model)  # what output_dir holds can be served; checkpoints keep the values

        trainer.finish_training(run, model, args, before_writing)
    else:
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. evaluation, before and after
    if args.do_eval:
        metrics, replies = rollouts.evaluate_prompts(engine, dev, functions, args, topology)
        trainer.write_results(args.output_dir, "dev", metrics, topology)
        print(f"dev: {trainer.format_metrics(metrics)}")
        if before:
            old, new = before[0]["eval_reward"], metrics["eval_reward"]
            print(f"reward of greedy replies to dev prompts: before {old:.4f}, after {new:.4f}")
            trainer.print_replies([dev.text(i) for i in range(min(3, len(dev)))], before[1], replies)
    if args.do_train:
        print(f"\nnext: python serve.py --model_name_or_path {shlex.quote(args.output_dir)}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
