"""Reinforcement learning from rewards: GRPO and its relatives, REINFORCE++, PPO.

    python rl.py configs/llama_rl.json                                   # any key again as --key value
    python rl.py configs/llama_rl.json --advantage_estimator rloo --importance_sampling_level sequence

Each step of a rollout: prompts -> rollout_n replies each, by the engine on the weights of that moment ->
rewards, by Python functions or a reward model -> advantages -> updates on packed groups. The old log-probabilities are
the engine's own; engine_kl in the log says how well the trainer agrees with them. The reference is the model before
training: with LoRA the same model with the adapter off, otherwise a frozen copy, and none if no KL is asked for.
Writes what finetune.py writes. Formulas are in alignment/rl_math.py; keys, estimators and losses in docs/rl.md.
"""

import dataclasses
import functools
import math
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
from alignment.environments import load_toolbox
from alignment.heads import Policy, add_score_head, remove_score_head, train_score_head
from alignment.rewards import load_reward_functions, server_reward
from arguments import LoraArgs
from checkpoint import find_checkpoint
from formats.files import UserError
from model import CausalLM

LOWS = {
    0: "top_k overlong_penalty_factor reward_timeout clip_range_value value_loss_coeff clip_range_ratio kl_loss_coeff "
    "kl_coeff gamma",
    1: "max_src_len max_dec_len min_dec_len global_batch_size rollout_n update_iters overlong_reward_buffer "
    "max_gen_batches max_turns",
}
ALGORITHMS = {"grpo": "grpo", "rloo": "rloo", "reinforce_plus_plus": "reinforce_plus_plus", "ppo": "gae"}


@dataclasses.dataclass
class Args(LoraArgs):
    model_name_or_path: str = ""  # folder of the policy before training, which is also the reference
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    train_datasets: str = ""  # prompts to learn from: a file, a folder with train.json, or a blend: docs/data.md
    eval_datasets: str = ""  # prompts to evaluate on: a file, or a folder with dev.json
    prompt_key: str | None = None  # other name of the key that holds the prompt; None: as in docs/data.md
    max_samples: int | None = None  # take only the first so many records of each source
    columns: str | dict | None = None  # other names of a record's keys: {"src": "question", …}
    chat_template: str | None = None  # name in chat.FORMATS, plain, none, or a template file; None: the tokenizer's own
    max_src_len: int = 3072  # most tokens of a prompt, which loses its beginning
    max_dec_len: int = 512  # most tokens of a reply
    min_dec_len: int = 1  # fewest tokens of a reply
    max_length: int | None = None  # most positions of a packed row; None: those of the longest prompt and a reply
    reward_funcs: str | list[str] | None = None  # FILE.py:FUNCTION, …; see docs/rl.md for the signature
    reward_weights: list[float] | None = None  # weight of each; None: 1
    reward_model_name_or_path: str | None = None  # folder of a reward model, whose score is one more reward
    reward_server: str | None = None  # URL of a reward server that speaks PaddleNLP's JSON, for one more reward
    reward_timeout: float = 0.0  # most seconds of one call of a reward function or a tool; 0: no limit
    tools: str | list[str] | None = None  # FILE.py:FUNCTION, …: what a reply may call; see docs/rl.md
    environment_factory: str | None = None  # FILE.py:CLASS: an object for each reply, whose methods it may call
    max_turns: int = 8  # most turns of a reply that calls tools
    clip_range_score: float = 10.0  # rewards are clipped to [-this, this]
    normalize_reward: bool = False  # whiten the rewards of a rollout
    enable_overlong_reward_buffer: bool = False  # subtract up to overlong_penalty_factor from long replies
    overlong_reward_buffer: int = 256  # tokens before max_dec_len over which the penalty grows
    overlong_penalty_factor: float = 1.0
    mask_truncated_completions: bool = False  # learn nothing from replies that reached max_dec_len
    rl_algorithm: str | None = None  # a name in ALGORITHMS: sets advantage_estimator
    advantage_estimator: str | None = None  # one of rollouts.ESTIMATORS; None: grpo
    loss_type: str = "dapo"  # one of rl_math.LOSS_TYPES
    importance_sampling_level: str = "token"  # or sequence (GSPO)
    scale_rewards: str = "group"  # grpo: divide by the std of the group, of the batch, or none
    normalize_advantage: bool | None = None  # whiten advantages over tokens; None: with reinforce_plus_plus and gae
    gamma: float = 1.0  # discount of reinforce_plus_plus and gae
    gae_lambda: float = 0.95  # gae: 1 has no bias by the values, 0 the least variance
    clip_range_ratio: float = 0.2  # how far a token's probability may move in an update, relative to the engine's
    clip_range_ratio_low: float | None = None  # downwards; None: clip_range_ratio
    clip_range_ratio_high: float | None = None  # upwards; None: clip_range_ratio
    importance_sampling_mode: str | None = None  # one of rl_math.SAMPLING_CORRECTIONS, for rollouts in other arithmetic
    importance_sampling_clip_min: float | None = None  # least weight by it
    importance_sampling_clip_max: float = 3.0  # largest weight by it
    dual_clip: float | None = None  # largest ratio of tokens with a negative advantage, above 1
    clip_range_value: float = 5.0  # gae: how far a value may move from the one before the updates
    value_loss_coeff: float = 0.1  # gae: weight of the value loss
    critic_learning_rate: float | None = None  # gae: of the value head; None: learning_rate
    pg_loss_coeff: float = 1.0  # weight of the policy loss
    kl_loss_coeff: float | None = None  # weight of KL (k3) in the loss; None: 0.001, or 0 where KL is in the reward
    kl_coeff: float | None = None  # weight of KL in the reward; None: 0.02 with reinforce_plus_plus and gae, else 0
    entropy_coeff: float = 0.0  # weight of the entropy, which is to stay high
    global_batch_size: int = 8  # prompts of a rollout
    rollout_n: int = 8  # replies to each prompt
    global_mini_batch_size: int = -1  # prompts of one update; -1: all of the rollout
    update_iters: int = 1  # passes over a rollout
    dynamic_sampling: bool = False  # replace groups whose rewards are all equal by groups of further prompts
    max_gen_batches: int = 32  # most batches of prompts for that, the first one included
    rollout_dtype: str | None = None  # float32 or bfloat16 of the engine's weights; None: float32, with bf16 the layers
    rollout_max_num_seqs: int = -1  # most replies the engine writes at once; -1: all, at most 128
    temperature: float = 1.0  # of the sampling; log-probabilities are those of the scaled distribution
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # < 1: sample among the likeliest tokens whose probabilities sum to it
    repetition_penalty: float = 1.0  # only 1: with a penalty, training would compute other log-probabilities
    save_rollouts: bool = False  # write every rollout to output_dir/rollouts
    replay: str | None = None  # train on a file or folder that save_rollouts wrote, and sample nothing

    # Of PaddleNLP and dpo.py, of TRL, of verl; docs/rl.md has them as a table.
    aliases = dict(
        pair.split("=")
        for pair in """
        actor_model_name_or_path=model_name_or_path train_dataset_path=train_datasets dev_dataset_path=eval_datasets
        num_generations=rollout_n max_prompt_length=max_src_len max_completion_length=max_dec_len
        max_prompt_len=max_src_len
        epsilon=clip_range_ratio epsilon_high=clip_range_ratio_high delta=dual_clip beta=kl_loss_coeff
        num_iterations=update_iters cliprange_value=clip_range_value vf_coef=value_loss_coeff kl_coef=kl_coeff
        lam=gae_lambda whiten_rewards=normalize_reward entropy_coef=entropy_coeff adv_estimator=advantage_estimator
        train_batch_size=global_batch_size ppo_mini_batch_size=global_mini_batch_size ppo_epochs=update_iters
        clip_ratio=clip_range_ratio clip_ratio_low=clip_range_ratio_low clip_ratio_high=clip_range_ratio_high
        clip_ratio_c=dual_clip kl_loss_coef=kl_loss_coeff max_response_length=max_dec_len
        max_assistant_turns=max_turns vllm_importance_sampling_mode=importance_sampling_mode
        vllm_importance_sampling_clip_max=importance_sampling_clip_max
        vllm_importance_sampling_clip_min=importance_sampling_clip_min
    """.split()
    )
    refused = {
        "critic_model_name_or_path": "PPO's values come from a value head on the policy, which starts at 0",
        "reward_critic_model_name_or_path": "PPO's values come from a value head on the policy, which starts at 0",
        "use_ema": "an average of the policy is not supported yet",
        "ptx_datasets": "a language-model loss beside the policy's is not supported yet",
        "rollout_quant_type": "rollouts run on the weights that are trained",
        "offload_level": "a frozen reference stays on the device; with lora: true there is none",
    }

    def check(self) -> list[str]:
        notes = super().check()
        needed = {"model_name_or_path": True, "train_datasets": self.do_train, "eval_datasets": self.do_eval}
        needed["reward_funcs"] = not (self.reward_model_name_or_path or self.reward_server)
        for key, is_needed in needed.items():
            if is_needed and not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.do_predict:
            raise UserError(
                "do_predict: there are no test prompts; evaluate other prompts by do_eval and eval_datasets"
            )
        self._check_numbers()
        self._resolve_algorithm()
        self._check_steps()
        return notes

    def check_topology(self) -> None:
        super().check_topology()
        for key in ("pipeline", "context", "sep", "expert"):
            if getattr(self, f"{key}_parallel_degree") > 1:
                raise UserError(f"{key}_parallel_degree: rl.py runs with data and tensor parallelism and sharding only")
        if (self.tools or self.environment_factory) and self.tensor_parallel_degree > 1:
            raise UserError("tools: each rank of tensor parallelism would call them; leave tensor_parallel_degree out")
        if "stage3" in (self.sharding or ""):
            raise UserError("sharding: stage3 is not supported here: the engine needs all weights; use stage2")

    def check_dry_run(self) -> list[str]:
        self.max_length = self.max_length or self.max_src_len + self.max_dec_len
        return super().check_dry_run()

    def _check_numbers(self):
        for low, keys in LOWS.items():
            for key in keys.split():
                if getattr(self, key) is not None and getattr(self, key) < low:
                    raise UserError(f"{key}: {getattr(self, key)}; it must be at least {low}")
        if self.rollout_n > 128:
            raise UserError(f"rollout_n: {self.rollout_n}; at most 128 replies to a prompt")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.clip_range_score <= 0:
            raise UserError("temperature and clip_range_score must be positive, top_p in (0, 1]")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip: {self.dual_clip}; it must be above 1")
        choices = {"loss_type": rl_math.LOSS_TYPES, "importance_sampling_level": ("token", "sequence")}
        choices |= {"importance_sampling_mode": (*rl_math.SAMPLING_CORRECTIONS, None)}
        choices |= {"rollout_dtype": ("float32", "bfloat16", None)}
        choices |= {"scale_rewards": ("group", "batch", "none"), "advantage_estimator": (*rollouts.ESTIMATORS, None)}
        for key, possible in (choices | {"rl_algorithm": (*ALGORITHMS, None), "repetition_penalty": (1.0,)}).items():
            if getattr(self, key) not in possible:
                names = ", ".join(str(value) for value in possible if value is not None)
                raise UserError(f"{key}: {getattr(self, key)!r}; possible are {names}")
        if self.load_best_model_at_end and self.metric_for_best_model != "reward":
            raise UserError(f"metric_for_best_model: {self.metric_for_best_model}; possible here is reward")

    def _resolve_algorithm(self):
        of_algorithm = ALGORITHMS.get(self.rl_algorithm)
        if of_algorithm and self.advantage_estimator not in (None, of_algorithm):
            raise UserError(
                f"rl_algorithm {self.rl_algorithm} and advantage_estimator {self.advantage_estimator} differ; give one"
            )
        self.advantage_estimator = self.advantage_estimator or of_algorithm or "grpo"
        per_token = self.advantage_estimator in rollouts.TOKEN_LEVEL
        if self.kl_coeff is None:
            self.kl_coeff = 0.02 if per_token else 0.0
        if self.kl_loss_coeff is None:
            self.kl_loss_coeff = 0.0 if self.kl_coeff else 0.001
        if self.normalize_advantage is None:
            self.normalize_advantage = per_token
        if self.advantage_estimator in ("grpo", "rloo") and self.rollout_n < 2:
            raise UserError(f"rollout_n: 1: {self.advantage_estimator} compares replies to one prompt; give 2 or more")
        if self.clip_range_ratio_low is None:
            self.clip_range_ratio_low = self.clip_range_ratio
        if self.clip_range_ratio_high is None:
            self.clip_range_ratio_high = self.clip_range_ratio

    def _check_steps(self):
        if self.gradient_accumulation_steps > 1:
            raise UserError(
                "gradient_accumulation_steps: global_mini_batch_size says what an update holds, and "
                "per_device_train_batch_size how many packed rows are computed at once; leave it out"
            )
        if self.global_mini_batch_size > self.global_batch_size or self.global_mini_batch_size == 0:
            raise UserError(f"global_mini_batch_size: {self.global_mini_batch_size}: at most global_batch_size, or -1")
        updates = self.updates_per_rollout
        if self.save_strategy == "steps" and self.do_train and self.save_steps % updates:
            raise UserError(
                f"save_steps: {self.save_steps}; it must be a multiple of {updates}, the updates of a rollout"
            )

    @property
    def mini_batches(self) -> int:
        """Updates of one pass over a rollout."""
        size = self.global_mini_batch_size
        return 1 if size < 0 else math.ceil(self.global_batch_size / size)

    @property
    def updates_per_rollout(self) -> int:
        return self.update_iters * self.mini_batches

    @property
    def needs_reference(self) -> bool:
        return bool(self.kl_coeff or self.kl_loss_coeff)


# ========================================================================================================= the loss


def counts_of(batches: list[dict]) -> tuple[int, int, int]:
    """(replies, tokens, micro-batches) of some batches: what the means of an update are over, see rl_math.Counts."""
    real = [batch for batch in batches if not batch.get("is_dummy")]
    replies = sum(len(batch["places"]) + batch.get("skipped_replies", 0) for batch in real)
    return replies, int(sum(batch["reply_tokens"].sum() for batch in real)), len(real)


def loss_and_metrics(
    outputs: dict[str, Tensor], batch: dict, counts: rl_math.Counts, args: Args
) -> tuple[Tensor, dict]:
    """A micro-batch's part of an update's loss, and of kl, clip ratios and the log-probabilities' difference.

    outputs: of heads.Policy. loss = pg_loss_coeff · policy loss + kl_loss_coeff · KL + value_loss_coeff · value loss
    - entropy_coeff · entropy, each a mean as loss_type says.
    """
    names = ("logps", "advantages", "ref_logps", "values", "returns", "weights")
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
    if args.advantage_estimator == "gae":
        values = outputs["values"].astype("float64")
        of_values, clipped = rl_math.value_losses(values, arrays["values"], arrays["returns"], args.clip_range_value)
        metrics["value_loss"] = float(of_values.sum()) / max(1, counts.tokens)
        metrics["value_clip_ratio"] = float(clipped.sum()) / max(1, counts.tokens)
        losses = losses + args.value_loss_coeff * of_values
    if args.entropy_coeff:
        losses = losses - args.entropy_coeff * outputs["entropies"].astype("float64")
    return rl_math.mean_loss(losses, segments, batch["reply_tokens"], args.loss_type, counts, args.max_dec_len), metrics


# ======================================================================================================== set-up


def setup_adapter(model: CausalLM, args: Args, checkpoint: Path | None = None) -> None:
    """trainer.setup_adapter() without dropout, and without PiSSA, which changes the reference; and a value head."""
    if args.advantage_estimator == "gae":
        add_score_head(model, np.zeros(model.config.hidden_size))
    trainer.setup_adapter(model, args, checkpoint)
    if model.score is not None:
        train_score_head(model)
    if changes_base(model):
        raise UserError(f"{checkpoint or args.lora_path}: the adapter changes the base weights, the reference")
    for layer in lora_layers(model).values():
        layer.dropout = 0.0


@dataclasses.dataclass
class Steps:
    """What trainer.setup_training() must know of the data: how many updates are an epoch."""

    batches_per_epoch: int


def main(args: Args) -> None:
    # ====================================================================== 1. topology, output folder, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    checkpoint = find_checkpoint(args, topology) if args.do_train else None
    functions = load_reward_functions(args.reward_funcs, args.reward_weights, args.reward_timeout)
    functions += [server_reward(args.reward_server, args.reward_timeout)] if args.reward_server else []
    tokenizer = trainer.setup_tokenizer(args)
    if args.reward_model_name_or_path:
        functions.append(rollouts.RewardModel(args.reward_model_name_or_path, tokenizer, topology))
    toolbox = load_toolbox(args.tools, args.environment_factory, tokenizer, args.reward_timeout, args.max_turns)
    train = rollouts.make_prompts(args, tokenizer, "train", toolbox) if args.do_train else None
    dev = rollouts.make_prompts(args, tokenizer, "dev", toolbox) if args.do_eval else None

    # ====================================================================== 2. model, and what it does before training
    model = parallel.from_pretrained(args.model_name_or_path, topology, low_bit=parallel.LowBit.of(args))
    trainer.set_recompute(model, args)
    key, longest = "max_src_len + max_dec_len", max(d.longest for d in (train, dev) if d) + args.max_dec_len
    trainer.check_shared_prompts(model, args.model_name_or_path, key, longest, ("alibi", "rope_2d"))
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path, args)
    trainer.check_positions(model, args.model_name_or_path, {key: longest})
    if args.do_train:
        setup_adapter(model, args, checkpoint)
    elif args.lora_path:
        setup_adapter(model, args)
        parallel.shard_adapters(model, topology)
    before, engine = None, rollouts.make_engine(args, model, tokenizer, train, dev, topology)

    def evaluate():
        return rollouts.evaluate_prompts(engine, dev, functions, args, topology)[0]

    if args.do_train:
        # ================================================================== 3. reference, optimizer, rollouts, log
        maker = rollouts.RolloutMaker(args, model, tokenizer, train, functions, topology, engine)
        steps = Steps(math.ceil(len(train) / args.global_batch_size) * args.updates_per_rollout * topology.data_size)
        names = rollouts.metric_names(args, maker.names)
        run = trainer.setup_training(args, model, tokenizer, steps, topology, checkpoint=checkpoint, metrics=names)
        optimizer, shards, log, checkpoints = run.optimizer, run.shards, run.log, run.checkpoints
        before = rollouts.evaluate_prompts(engine, dev, functions, args, topology) if dev else None
        if args.critic_learning_rate is not None:
            scale = args.critic_learning_rate / args.learning_rate
            optimizer.lr_scale |= {
                weight.name: scale for weight in shards.weights if weight.name.endswith("score.weight")
            }
        state, total, steps_per_epoch = run.state, run.total_steps, run.steps_per_epoch
        policy, rollout = Policy(model, args.temperature, with_entropy=bool(args.entropy_coeff)), None

        def step_batches(step):
            """This rank's micro-batches of an update, of a new rollout if it is the first one of a rollout."""
            nonlocal rollout
            number, update = divmod(step, args.updates_per_rollout)
            if update == 0:
                rollout = maker.make(number)
            return rollout.mini_batches[update % args.mini_batches]

        step_size = counts_of  # what the means are over: replies, tokens, micro-batches
        inputs = trainer.model_inputs  # what the policy is called with

        def loss_of(outputs, batch, size):
            """This micro-batch's part of the step's loss, from the policy's outputs."""
            part, metrics = loss_and_metrics(outputs, batch, rl_math.Counts(*size), args)
            if not batch.get("is_dummy"):
                log.add_metrics(metrics)
                if state.step % args.updates_per_rollout == 0:
                    rollout.differences.append(outputs["logps"].numpy().astype("float64") - batch["logps"])
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
            log.add_metrics(rollout.update_metrics(time.perf_counter() - start, topology))
            state.step, state.consumed_tokens = state.step + 1, state.consumed_tokens + tokens
            state.epoch = state.step / steps_per_epoch
            log.step(state, loss, lr, grad_norm, tokens, time.perf_counter() - start)
        checkpoints.wait()
        # ================================================================== end of the training loop

        trainer.finish_training(run, model, args)
        if model.score is not None:
            remove_score_head(model)  # what output_dir holds can be served; checkpoints keep the values
            checkpoints.write_model(args.output_dir, args.save_dtype)
    else:
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. evaluation, before and after
    if args.do_eval:
        metrics, replies = rollouts.evaluate_prompts(engine, dev, functions, args, topology)
        trainer.write_results(args.output_dir, "dev", metrics, topology)
        print(f"dev: {trainer.format_metrics(metrics)}")
        if before:
            print(
                f"reward of greedy replies to dev prompts: before {before[0]['eval_reward']:.4f}, "
                f"after {metrics['eval_reward']:.4f}"
            )
            trainer.print_replies([dev.text(i) for i in range(min(3, len(dev)))], before[1], replies)
    if args.do_train:
        print(f"\nnext: python serve.py --model_name_or_path {shlex.quote(args.output_dir)}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
