"""Preference alignment: from pairs of replies to one prompt, make the better one likelier than the worse one.

    python dpo.py configs/llama_dpo.json                                 # any key again as --key value
    python dpo.py configs/llama_dpo.json --loss_type simpo --beta 2.0 --simpo_gamma 1.0

Reads pairs in many formats (docs/data.md). Prompt, chosen and rejected reply are one sequence, several pairs are a row.
Trains all weights or LoRA. The reference is the model before training: with LoRA the same model with the adapter off;
otherwise its log-probabilities of all pairs, computed before the first step (16 bytes a pair, no second model). Ends
with reward accuracy on the dev pairs (50 % before: policy and reference are equal) and replies to three prompts.
"""

import dataclasses
import functools
import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from tqdm import tqdm

import parallel
import trainer
from adapters import adapter_disabled, changes_base, lora_layers
from arguments import LoraArgs
from checkpoint import find_checkpoint
from data import PreferenceDataset, PreferenceLoader
from formats.files import UserError
from formats.record_files import RecordOptions
from formats.tokenizer import Tokenizer
from model import CausalLM
from parallel import SINGLE, Topology

METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/accuracies",
           "logps/chosen", "logps/rejected", "dpo_loss", "sft_loss")  # fmt: skip


@dataclasses.dataclass
class Args(LoraArgs):
    model_name_or_path: str = ""  # folder of the model to align, which is also the reference; an adapter's is merged
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    train_dataset_path: str = ""  # pairs to learn: a file, a folder with train.json(l), or a blend: docs/data.md
    dev_dataset_path: str = ""  # pairs to evaluate on: a file, or a folder with dev.json(l)
    max_samples: int | None = None  # take only the first so many pairs of each source
    val_size: float | None = None  # without dev_dataset_path: hold out this share (< 1) or number of the training pairs
    columns: str | dict | None = None  # other names of a record's keys: {"chosen": "good", …}
    max_seq_len: int = 4096  # most positions of a packed row, so of a prompt and both replies
    max_prompt_len: int = 2048  # most tokens of a prompt whose pair is longer than max_seq_len
    greedy_zero_padding: bool = False  # pack by best fit over all data, instead of in order
    chat_template: str | None = None  # name in chat.FORMATS, plain, none, or a template file; None: the tokenizer's own
    loss_type: str = "sigmoid"  # a name in LOSSES, or orpo
    beta: float = 0.1  # weight of a difference in log-probability; large: stay near the reference
    label_smoothing: float = 0.0  # sigmoid, simpo: expected share of pairs whose labels are wrong
    simpo_gamma: float = 0.5  # simpo: margin that the rewards of a pair should have
    pref_loss_ratio: float = 1.0  # weight of the preference loss; orpo's lambda
    sft_loss_ratio: float = 0.0  # weight of the chosen replies' mean cross-entropy beside it; orpo: 0 means 1
    reference_free: bool = False  # sigmoid, hinge, ipo: a reference to which all replies are equally likely
    max_new_tokens: int = 128  # most tokens of the replies before and after

    def check(self) -> list[str]:
        notes = super().check()
        self.dev_dataset_path = RecordOptions.of(self).dev_path(self.train_dataset_path, self.dev_dataset_path)
        needed = {"model_name_or_path": True, "train_dataset_path": self.do_train, "dev_dataset_path": self.do_eval}
        for key, is_needed in needed.items():
            if is_needed and not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.do_predict:
            raise UserError("do_predict: there are no test pairs; evaluate other pairs by do_eval and dev_dataset_path")
        for key, low in (("max_prompt_len", 1), ("max_seq_len", 3), ("max_new_tokens", 1)):
            if getattr(self, key) < low:
                raise UserError(f"{key}: {getattr(self, key)}; it must be at least {low}")
        if self.load_best_model_at_end and self.metric_for_best_model not in ("loss", "accuracy"):
            raise UserError(f"metric_for_best_model: {self.metric_for_best_model}; possible here are loss and accuracy")
        return notes + self._check_loss()

    def _check_loss(self):
        notes = []
        if self.loss_type == "orpo":
            self.loss_type, self.sft_loss_ratio = "or", self.sft_loss_ratio or 1.0
            notes.append(f"loss_type: orpo is loss_type or with sft_loss_ratio {self.sft_loss_ratio:g}")
        if self.loss_type not in LOSSES:
            raise UserError(f"loss_type: {self.loss_type!r}; possible are {', '.join([*LOSSES, 'orpo'])}")
        for key, low in (("beta", 1e-30), ("simpo_gamma", 0), ("pref_loss_ratio", 0), ("sft_loss_ratio", 0)):
            if getattr(self, key) < low:
                raise UserError(f"{key}: {getattr(self, key)}; it must {'be positive' if low else 'not be negative'}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing: {self.label_smoothing}; it must be at least 0 and below 0.5")
        if self.label_smoothing and "label_smoothing" not in LOSSES[self.loss_type].extra_keys:
            raise UserError(f"label_smoothing: loss_type {self.loss_type} has none; sigmoid and simpo have it")
        self.reference_free = self.reference_free or not LOSSES[self.loss_type].needs_reference
        if not self.pref_loss_ratio and not self.sft_loss_ratio:
            raise UserError("pref_loss_ratio and sft_loss_ratio are both 0: there is nothing to learn")
        return notes


# ======================================================================================================= losses
# chosen, rejected (N,): log-probabilities of the replies of N pairs under the policy, minus those under the reference
# (minus 0 without one); float64, see reply_logps(). m = chosen - rejected.


def _smoothed(x, label_smoothing):
    """-(1 - ε) log σ(x) - ε log σ(-x)"""
    return -(1 - label_smoothing) * F.log_sigmoid(x) - label_smoothing * F.log_sigmoid(-x)


def sigmoid_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO: -(1 - ε) log σ(β m) - ε log σ(-β m). Rafailov et al., arXiv 2305.18290, Eq. 7; ε of Mitchell's note on cDPO:
    the probability that a label is the wrong way round."""
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def hinge_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SLiC: max(0, 1 - β m). Zhao et al., arXiv 2305.10425, in the form of Liu et al., arXiv 2309.06657."""
    return F.relu(1 - beta * (chosen - rejected))


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO: (m - 1/(2β))², m per token. Azar et al., arXiv 2310.12036, Eq. 17."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, simpo_gamma: float, label_smoothing: float) -> Tensor:
    """SimPO: -log σ(β m - γ), m per token and without a reference. Meng et al., arXiv 2405.14734, Eq. 6."""
    return _smoothed(beta * (chosen - rejected - simpo_gamma / beta), label_smoothing)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 1.0) -> Tensor:
    """ORPO's odds ratio: -log σ(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p), p = exp(log-probability
    per token). Hong et al., arXiv 2403.07691, Eq. 7; the whole loss is λ times that plus the chosen SFT loss. No β."""

    def log_one_minus(logp):  # log(1 - p); a reply that is certain in float32 would have infinite odds
        return paddle.log(-paddle.expm1(paddle.clip(logp, max=-1e-7)))

    return -F.log_sigmoid(chosen - rejected - log_one_minus(chosen) + log_one_minus(rejected))


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of LOSSES. A new pairwise loss is a function above and a row below."""

    fn: Callable  # (chosen, rejected, beta, and extra_keys by name) -> (N,) losses
    needs_reference: bool = True
    length_normalized: bool = False  # compares log-probabilities per token, not those of whole replies, as Eq. 7 of DPO
    extra_keys: tuple[str, ...] = ()  # keys of Args that fn takes besides beta


LOSSES = {
    "sigmoid": Loss(sigmoid_loss, extra_keys=("label_smoothing",)),
    "hinge": Loss(hinge_loss),
    "ipo": Loss(ipo_loss, length_normalized=True),
    "simpo": Loss(simpo_loss, False, length_normalized=True, extra_keys=("simpo_gamma", "label_smoothing")),
    "or": Loss(orpo_loss, False, length_normalized=True),
}


def pair_counts(batches: Iterable[dict]) -> tuple[int, int]:
    """(pairs, tokens of their chosen replies) of some batches: what the means of a step or an evaluation are over."""
    tokens = [batch["reply_tokens"][:, 0] for batch in batches if not batch.get("is_dummy")]
    return sum(map(len, tokens)), int(sum(part.sum() for part in tokens))


def loss_and_metrics(policy: Tensor, reference: Tensor, reply_tokens: np.ndarray, counts: tuple, args: Args) -> tuple:
    """A batch's part of the loss of all pairs that `counts` counts, and of METRICS.

    policy, reference (N, 2): summed log-probabilities of the batch's replies; reply_tokens (N, 2): their tokens.
    loss = pref_loss_ratio · mean over pairs + sft_loss_ratio · mean over tokens of chosen replies of -log p.
    Rewards are β (policy - reference); equal ones count one half. Log-probabilities are those that the loss compares.
    """
    assert policy.shape == reference.shape and policy.shape[1] == 2, (policy.shape, reference.shape)
    (pairs, chosen_tokens), loss = counts, LOSSES[args.loss_type]
    sft = -policy[:, 0].sum() / chosen_tokens
    if loss.length_normalized:
        tokens = paddle.to_tensor(reply_tokens.astype("float64"))
        policy, reference = policy / tokens, reference / tokens
    ratios, extra = policy - reference, {key: getattr(args, key) for key in loss.extra_keys}
    preference = loss.fn(ratios[:, 0], ratios[:, 1], args.beta, **extra).sum() / pairs
    logps, rewards = policy.numpy(), args.beta * ratios.numpy()
    of_rewards = [count_wins(rewards), (rewards[:, 0] - rewards[:, 1]).sum(), rewards[:, 0].sum(), rewards[:, 1].sum()]
    sums = [*of_rewards, count_wins(logps), logps[:, 0].sum(), logps[:, 1].sum()]
    metrics = dict(zip(METRICS, [*(float(value) / pairs for value in sums), float(preference), float(sft)]))
    return args.pref_loss_ratio * preference + args.sft_loss_ratio * sft, metrics


def count_wins(values: np.ndarray) -> float:
    """(N, 2) -> how often the first is larger; equal ones count one half."""
    return float((values[:, 0] > values[:, 1]).sum() + 0.5 * (values[:, 0] == values[:, 1]).sum())


# ==================================================================================================== both models


def model_inputs(batch: dict) -> dict:
    """What the model is called with to give -log p of the labels, without auxiliary losses."""
    return {**trainer.model_inputs(batch), "auxiliary_losses": False}


def reply_logps(model: CausalLM, batch: dict) -> Tensor:
    """sum_of_replies() by this model."""
    return sum_of_replies(model(**model_inputs(batch)), batch)


def sum_of_replies(losses: Tensor, batch: dict) -> Tensor:
    """-log p (B, T) -> (N, 2) float64: summed log-probabilities of the chosen and the rejected reply of the N pairs.

    The loss compares a small difference of such sums: at 300 nats the next float32 is 3e-5 away.
    """
    losses = losses.flatten()  # (B * T,): a sequence's logits are never kept
    reply_ids = batch["reply_ids"].flatten()
    in_reply = np.flatnonzero(reply_ids >= 0)
    losses = paddle.gather(losses, paddle.to_tensor(in_reply)).astype("float64")
    return -paddle.geometric.segment_sum(losses, paddle.to_tensor(reply_ids[in_reply])).reshape([-1, 2])


def precompute_reference_logps(
    model: CausalLM, loader: PreferenceLoader, batches: list[tuple[int, int]], progress: bool = False
) -> np.ndarray:
    """(pairs of the loader's data, 2) float64: reply_logps() of every pair in these (epoch, index) batches, others nan.

    A pair is computed in the first batch that has it: bit for bit as the policy does before the first step.
    """
    logps = np.full((len(loader.dataset), 2), np.nan)

    def batches_with_new_pairs():
        seen = np.zeros(len(logps), bool)
        for epoch, index in tqdm(batches, desc="reference", disable=not progress or None):
            batch = loader.batch(epoch, index)
            pairs = np.concatenate(batch["sample_ids"])
            if not seen[pairs].all():
                seen[pairs] = True
                yield batch
            if seen.all():
                break

    with trainer.eval_mode(model):
        for batch, batch_logps in parallel.pipelined_map(model, batches_with_new_pairs(), model_inputs, sum_of_replies):
            logps[np.concatenate(batch["sample_ids"])] = batch_logps.numpy()
    return logps


@paddle.no_grad()
def reference_logps(model: CausalLM, batch: dict, precomputed: np.ndarray | None, args: Args) -> Tensor:
    """(N, 2) of the reference: zeros if the run has none, precomputed ones, or by the model with its adapter off."""
    if args.reference_free:
        return paddle.zeros(batch["reply_tokens"].shape, "float64")
    if precomputed is not None:
        logps = precomputed[np.concatenate(batch["sample_ids"])]
        assert not np.isnan(logps).any(), batch["sample_ids"]
        return paddle.to_tensor(logps)
    with adapter_disabled(model):
        return reply_logps(model, batch)


def evaluate_pairs(
    model: CausalLM, loader: PreferenceLoader, precomputed: np.ndarray | None, args: Args, topology: Topology = SINGLE
) -> dict:
    """{"eval_loss", "eval_rewards/accuracies" (also as eval_accuracy), …, "eval_pairs"}: means over pairs."""
    indices = trainer.eval_batches(loader, args.max_evaluate_steps)
    loss, sums = 0.0, dict.fromkeys(METRICS, 0.0)
    counts = pair_counts(loader.batch(*index) for index in indices)
    items = ((loader.batch(*index), is_real) for index, is_real in trainer.local_micro_batches(indices, topology))
    with trainer.eval_mode(model):
        inputs, outputs = (lambda item: model_inputs(item[0])), (lambda losses, item: sum_of_replies(losses, item[0]))
        for (batch, is_real), policy in parallel.pipelined_map(model, items, inputs, outputs):
            reference = reference_logps(model, batch, precomputed, args)
            part, metrics = loss_and_metrics(policy, reference, batch["reply_tokens"], counts, args)
            if is_real:
                loss += float(part)
                sums = {name: sums[name] + value for name, value in metrics.items()}
    loss, sums = topology.all_reduce_sum(loss), topology.all_reduce_sum(sums)
    sums = {f"eval_{name}": value for name, value in sums.items()}
    return {"eval_loss": loss, "eval_accuracy": sums["eval_rewards/accuracies"], **sums, "eval_pairs": counts[0]}


# ======================================================================================================== set-up


def setup_adapter(model: CausalLM, args: Args, checkpoint: Path | None = None) -> None:
    """trainer.setup_adapter() for a policy that starts equal to its reference: neither PiSSA nor dropout."""
    trainer.setup_adapter(model, args, checkpoint)
    if changes_base(model):
        pissa = any(layer.pissa_init is not None for layer in lora_layers(model).values())
        kind = "a PiSSA adapter" if pissa else "an adapter with trained biases or modules_to_save"
        raise UserError(f"{checkpoint or args.lora_path}: {kind} changes the base weights, the reference")
    for layer in lora_layers(model).values():
        layer.dropout = 0.0


def make_loader(args: Args, tokenizer: Tokenizer, split: str) -> PreferenceLoader:
    """The loader of the pairs for "train" or "dev"."""
    is_train, limits = split == "train", (args.max_seq_len, args.max_prompt_len)
    path, options = getattr(args, f"{split}_dataset_path"), RecordOptions.of(args)
    dataset = PreferenceDataset(path, tokenizer, *limits, split, not args.disable_tqdm, options)
    loader = PreferenceLoader(
        dataset,
        args.per_device_train_batch_size if is_train else args.per_device_eval_batch_size,
        max_seq_len=args.max_seq_len,
        greedy_zero_padding=args.greedy_zero_padding,
        seed=args.seed,
        shuffle=is_train,
        drop_last=is_train and args.dataloader_drop_last,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer.print_data(split, "pairs", loader)
    return loader


def main(args: Args) -> None:
    # ====================================================================== 1. topology, output folder, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    checkpoint = find_checkpoint(args, topology) if args.do_train else None
    tokenizer = trainer.setup_tokenizer(args)
    train = make_loader(args, tokenizer, "train") if args.do_train else None
    dev = make_loader(args, tokenizer, "dev") if args.do_eval else None

    # ====================================================================== 2. model, and what it does before training
    model = parallel.from_pretrained(args.model_name_or_path, topology, low_bit=parallel.LowBit.of(args))
    trainer.set_recompute(model, args)
    trainer.check_shared_prompts(model, args.model_name_or_path, "max_seq_len", args.max_seq_len)
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path, args)
    reply_end = args.max_prompt_len + args.max_new_tokens
    needed = {"max_seq_len": args.max_seq_len, "max_prompt_len + max_new_tokens": reply_end}
    trainer.check_positions(model, args.model_name_or_path, needed)
    dev_reference = before = None
    if dev and not args.reference_free:
        indices = trainer.eval_batches(dev, args.max_evaluate_steps)
        dev_reference = precompute_reference_logps(model, dev, indices, not args.disable_tqdm)
    shown = range(min(3, len(dev.dataset)) if dev and args.do_train else 0)
    prompts = [dev.dataset.pair(i)[0] for i in shown]
    limits = {"max_new_tokens": args.max_new_tokens, "max_length": model.config.max_model_len, "batch_size": 1}
    replies_before = trainer.generate_replies(model, tokenizer, prompts, **limits)

    def evaluate():
        return evaluate_pairs(model, dev, dev_reference, args, topology)

    if args.do_train:
        # ================================================================== 3. reference, adapter, optimizer, log
        before, reference = evaluate() if dev else None, None
        if not args.reference_free and (not args.lora or topology.pp.size > 1):  # else LoRA can be switched off
            start, per_epoch, ranks = time.perf_counter(), train.batches_per_epoch, topology.data_size
            steps = range(trainer.total_steps(args, per_epoch, ranks)[0])
            batches = [index for step in steps for index in trainer.micro_batches(step, args, per_epoch, ranks)]
            reference = precompute_reference_logps(model, train, batches, not args.disable_tqdm)
            pairs = int((~np.isnan(reference[:, 0])).sum())
            print(f"reference: log-probabilities of {pairs:,} pairs computed in {time.perf_counter() - start:.1f} s")
        setup_adapter(model, args, checkpoint)
        run = trainer.setup_training(args, model, tokenizer, train, topology, checkpoint=checkpoint, metrics=METRICS)
        optimizer, shards, log, checkpoints = run.optimizer, run.shards, run.log, run.checkpoints
        state, total, steps_per_epoch = run.state, run.total_steps, run.steps_per_epoch
        step_size = pair_counts  # what the means are over: pairs, and tokens of chosen replies
        inputs = model_inputs  # what the model is called with

        def loss_of(losses, batch, size):
            """This micro-batch's part of the step's loss, from the model's losses (B, T)."""
            base, policy = reference_logps(model, batch, reference, args), sum_of_replies(losses, batch)
            part, metrics = loss_and_metrics(policy, base, batch["reply_tokens"], size, args)
            if not batch.get("is_dummy"):
                log.add_metrics(metrics)
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
            batches = trainer.step_micro_batches(train, state.step, args, topology)
            # The mean is over what the whole step holds: a mean of micro-batch means would weigh short ones more.
            size, loss = topology.all_reduce_sum(step_size(batches)), 0.0
            seed = functools.partial(trainer.seed_step, args.seed, state.step)
            part_loss = functools.partial(loss_of, size=size)
            for part, batch in parallel.forward_backward(model, batches, inputs, part_loss, seed):
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
            state.step, state.consumed_tokens = state.step + 1, state.consumed_tokens + tokens
            state.epoch = state.step / steps_per_epoch
            log.step(state, loss, lr, grad_norm, tokens, time.perf_counter() - start)
        checkpoints.wait()
        # ================================================================== end of the training loop

        trainer.finish_training(run, model, args)
    else:
        if args.lora_path:
            setup_adapter(model, args)
            parallel.shard_adapters(model, topology)
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. evaluation, before and after
    if args.do_eval:
        metrics = evaluate()
        trainer.write_results(args.output_dir, "dev", metrics, topology)
        print(f"dev: {trainer.format_metrics(metrics)}")
        if before:
            print("share of dev pairs where the chosen reply has the larger ...")
            for name, quantity in (("rewards", "reward"), ("logps", "log-probability")):
                old, new = (100 * values[f"eval_{name}/accuracies"] for values in (before, metrics))
                print(f"  {quantity}: before {old:.1f} %, after {new:.1f} %")
    replies = trainer.generate_replies(model, tokenizer, prompts, **limits)
    trainer.print_replies([dev.dataset.prompt_text(i) for i in shown], replies_before, replies)
    if args.do_train:
        print(f"\nnext: python serve.py --model_name_or_path {shlex.quote(args.output_dir)}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
