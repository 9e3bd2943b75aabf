"""What a policy and its reference say of replies, and the loss of that: pairs, or single replies that are good or bad.

    policy = reply_logps(model, batch)                                   # (N, 2) float64: chosen, rejected
    reference = reference_logps(model, batch, precomputed, args)         # the same of the reference
    loss, metrics = loss_and_metrics(policy, reference, batch["reply_tokens"], pair_counts(batches), args)

The formulas are in preference_losses.py; here is what they are computed from. A reference is none, the model with its
adapter off, log-probabilities computed before training, or a second set of weights that follows the policy's
(moving_weights.py). prepare_step() computes what a loss needs of all pairs of a step.
"""

from collections.abc import Iterable

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import numpy as np
import paddle
from paddle import Tensor
from tqdm import tqdm

import parallel
import trainer
from adapters import adapter_disabled
from alignment.moving_weights import MovingReference
from alignment.preference_losses import UNPAIRED_LOSSES
from checkpoint import TrainState
from data import PreferenceLoader
from formats.files import UserError
from model import CausalLM
from parallel import SINGLE, Topology

METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/accuracies",
           "logps/chosen", "logps/rejected", "dpo_loss", "sft_loss")  # fmt: skip
UNPAIRED_METRICS = tuple("kl" if name == "logps/accuracies" else name for name in METRICS)

# ========================================================================================================== the loss


def pair_counts(batches: Iterable[dict]) -> tuple[int, ...]:
    """(pairs, tokens of their chosen replies) of some batches: what the means of a step or an evaluation are over. Of
    single replies: (replies, tokens of good ones, good ones)."""
    counts, sides = [0, 0, 0], 2
    for batch in batches:
        if not batch.get("is_dummy"):
            good = batch.get("desirable", np.ones(len(batch["reply_tokens"])))
            of_batch = len(good), good @ batch["reply_tokens"][:, 0], good.sum()
            counts = [old + int(new) for old, new in zip(counts, of_batch)]
        sides = batch["reply_tokens"].shape[1]
    return tuple(counts[: 2 if sides == 2 else 3])


def loss_and_metrics(
    policy: Tensor,
    reference: Tensor,
    reply_tokens: np.ndarray,
    counts: tuple,
    args: object,
    of_step: dict[str, np.ndarray] | None = None,
    sft_logps: Tensor | None = None,
    shift: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """A batch's part of the loss of all pairs that `counts` counts, and of METRICS.

    policy, reference (N, 2): summed log-probabilities of the batch's replies; reply_tokens (N, 2): their tokens.
    loss = pref_loss_ratio · mean over pairs + sft_loss_ratio · mean over tokens of chosen replies of -log p.
    of_step: step_values() of the batch's pairs; None: the batch has all pairs. sft_logps (N,): of the chosen replies,
    where they are not policy's. shift: the mean reward that bco_shift subtracts. Rewards are β (policy - reference);
    equal ones count one half. Log-probabilities are those that the (first) loss compares.
    """
    assert policy.shape == reference.shape and policy.shape[1] == 2, (policy.shape, reference.shape)
    pairs, chosen_tokens = counts
    sft = -(policy[:, 0] if sft_logps is None else sft_logps).sum() / chosen_tokens
    if of_step is None:
        of_step = step_values(policy.numpy(), reference.numpy(), args)
    tokens, preference, shown = paddle.to_tensor(reply_tokens.astype("float64")), 0.0, None
    for weight, loss in args.losses:
        per = tokens if loss.length_normalized else paddle.ones_like(tokens)
        logps, given = policy / per, reference / per * (1.0 if loss.needs_reference else 0.0)
        ratios, extra = logps - given, {key: getattr(args, key) for key in loss.extra_keys}
        if loss.of_step is not None:
            extra |= {key: paddle.to_tensor(value) for key, value in of_step[loss.of_step.__name__].items()}
        if loss.has_shift:
            extra["shift"] = shift
        preference += weight * loss.fn(ratios[:, 0], ratios[:, 1], args.beta, **extra).sum() / pairs
        shown = shown or (logps.numpy(), args.beta * ratios.numpy())
    logps, rewards = shown
    of_rewards = [count_wins(rewards), (rewards[:, 0] - rewards[:, 1]).sum(), rewards[:, 0].sum(), rewards[:, 1].sum()]
    sums = [*of_rewards, count_wins(logps), logps[:, 0].sum(), logps[:, 1].sum()]
    metrics = dict(zip(METRICS, [*(float(value) / pairs for value in sums), float(preference), float(sft)]))
    return args.pref_loss_ratio * preference + args.sft_loss_ratio * sft, metrics


def unpaired_loss_and_metrics(
    policy: Tensor, reference: Tensor, batch: dict, counts: tuple, args: object
) -> tuple[Tensor, dict[str, float]]:
    """A batch's part of the loss of all single replies that `counts` counts, and of UNPAIRED_METRICS.

    policy, reference (N, 1). loss = pref_loss_ratio · mean over replies of desirable_weight or undesirable_weight times
    the loss + sft_loss_ratio · mean over tokens of good replies of -log p. batch["kl"]: prepare_step(). chosen and
    rejected are the good and the bad replies; a step without any has 0 there. An accuracy is the share of replies whose
    reward is on the right side of β kl.
    """
    (replies, good_tokens, good), kl = counts, batch.get("kl", 0.0)
    desirable = batch["desirable"]
    ratios, weights = (
        (policy - reference).flatten(),
        np.where(desirable, args.desirable_weight, args.undesirable_weight),
    )
    fn, is_good = UNPAIRED_LOSSES[args.loss_type], paddle.to_tensor(desirable)
    preference = (paddle.to_tensor(weights) * fn(ratios, is_good, kl, args.beta)).sum() / replies
    sft = -(policy.flatten() * is_good).sum() / max(1, good_tokens)
    logps, rewards, shares = policy.numpy().ravel(), args.beta * ratios.numpy(), []
    for which, count in ((desirable, good), (1.0 - desirable, replies - good)):
        shares.append([float(values @ which) / max(1, count) for values in (rewards, logps)])
    (chosen, chosen_logp), (rejected, rejected_logp) = shares
    right = count_wins(np.stack([rewards, np.full_like(rewards, args.beta * kl)], 1)[desirable > 0])
    right += count_wins(np.stack([np.full_like(rewards, args.beta * kl), rewards], 1)[desirable == 0])
    numbers = right / replies, chosen - rejected, chosen, rejected, kl * len(rewards) / replies
    metrics = dict(zip(UNPAIRED_METRICS, (*numbers, chosen_logp, rejected_logp, float(preference), float(sft))))
    return args.pref_loss_ratio * preference + args.sft_loss_ratio * sft, metrics


def batch_loss(
    losses: Tensor, batch: dict, reference: Tensor, counts: tuple, args: object, auxiliary: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """A batch's part of the loss and of the metrics, from the model's losses (B, T) and the reference's sums.

    auxiliary: losses are those of training_inputs() of a model with auxiliary losses, which are added; "aux_loss".
    """
    policy = sum_of_replies(losses, batch, args.ld_alpha)
    if args.is_unpaired:
        loss, metrics = unpaired_loss_and_metrics(policy, reference, batch, counts, args)
    else:
        sft = None if args.ld_alpha is None else sum_of_replies(losses, batch)[:, 0]
        given = batch["reply_tokens"], counts, args, batch.get("of_step"), sft, batch.get("shift", 0.0)
        loss, metrics = loss_and_metrics(policy, reference, *given)
    if auxiliary:
        apart = np.flatnonzero(batch["labels"] == -100)
        if not len(apart):
            raise UserError(
                "a row has prompts of one token only, which leave no place for the model's auxiliary losses"
            )
        part = losses.flatten()[int(apart[0])] * (len(policy) / counts[0])
        loss, metrics = loss + part.astype(loss.dtype), {**metrics, "aux_loss": float(part)}
    return loss, metrics


def step_values(policy: np.ndarray, reference: np.ndarray, args: object) -> dict[str, dict[str, np.ndarray]]:
    """What losses that look at all pairs of a step need, from all log-probabilities (P, 2): {of_step's name: {name of
    fn's argument: (P,)}}"""
    functions = {loss.of_step for _, loss in args.losses} - {None}
    return {function.__name__: function(policy, reference) for function in functions}


def values_of(values: dict, rows: slice) -> dict:
    """step_values() of some of the pairs."""
    return {name: {key: array[rows] for key, array in each.items()} for name, each in values.items()}


def gather_pairs(logps: np.ndarray, topology: Topology) -> tuple[np.ndarray, int]:
    """Rows (n, k) of each data-parallel rank -> (P, k) of all ranks, and where this rank's begin."""
    ranks, rank, width = topology.data_size, topology.data_rank, logps.shape[1]
    sizes = topology.all_reduce_sum(tuple(len(logps) if other == rank else 0 for other in range(ranks)))
    first, all_rows = sum(sizes[:rank]), np.zeros((sum(sizes), width))
    all_rows[first : first + len(logps)] = logps
    if ranks > 1:
        all_rows = np.array(topology.all_reduce_sum(tuple(all_rows.ravel().tolist()))).reshape(-1, width)
    return all_rows, first


def count_wins(values: np.ndarray) -> float:
    """(N, 2) -> how often the first is larger; equal ones count one half."""
    return float((values[:, 0] > values[:, 1]).sum() + 0.5 * (values[:, 0] == values[:, 1]).sum())


# ========================================================================================= log-probabilities of replies


def model_inputs(batch: dict) -> dict:
    """What the model is called with to give -log p of the labels, without auxiliary losses."""
    return {**trainer.model_inputs(batch), "auxiliary_losses": False}


def has_auxiliary_losses(model: CausalLM) -> bool:
    """Whether training adds a balance of experts or a z-loss, see CausalLM.auxiliary_loss()."""
    config = model.config
    return bool(config.z_loss_weight or config.experts is not None and config.experts.aux_loss_coef)


def training_inputs(batch: dict) -> dict:
    """model_inputs() with auxiliary losses, which stand where no loss counts; see batch_loss()."""
    return {**trainer.model_inputs(batch), "auxiliary_losses": "apart"}


def reply_logps(model: CausalLM, batch: dict, ld_alpha: float | None = None) -> Tensor:
    """sum_of_replies() by this model."""
    return sum_of_replies(model(**model_inputs(batch)), batch, ld_alpha)


def sum_of_replies(losses: Tensor, batch: dict, ld_alpha: float | None = None) -> Tensor:
    """-log p (B, T) -> (N, 2) float64: summed log-probabilities of the chosen and the rejected reply of the N pairs.

    The loss compares a small difference of such sums: at 300 nats the next float32 is 3e-5 away. ld_alpha: weight of
    the tokens of a reply beyond the length of the pair's shorter one; LD-DPO, Liu et al., arXiv 2409.06411.
    """
    losses = losses.flatten()  # (B * T,): a sequence's logits are never kept
    reply_ids = batch["reply_ids"].flatten()
    in_reply = np.flatnonzero(reply_ids >= 0)
    losses, replies = paddle.gather(losses, paddle.to_tensor(in_reply)).astype("float64"), reply_ids[in_reply]
    if ld_alpha is not None:
        tokens = batch["reply_tokens"]  # (N, 2)
        begins = np.concatenate([[0], np.cumsum(tokens.ravel())[:-1]])  # replies lie one after another, in order
        is_tail = np.arange(len(replies)) - begins[replies] >= np.repeat(tokens.min(1), 2)[replies]
        losses = losses * paddle.to_tensor(np.where(is_tail, ld_alpha, 1.0))
    return -paddle.geometric.segment_sum(losses, paddle.to_tensor(replies)).reshape([-1, 1 if "column" in batch else 2])


# =========================================================================================================== reference


def precompute_reference_logps(
    model: CausalLM,
    loader: PreferenceLoader,
    batches: list[tuple[int, int]],
    progress: bool = False,
    ld_alpha: float | None = None,
    topology: Topology = SINGLE,
) -> np.ndarray:
    """(pairs of the loader's data, 2) float64: reply_logps() of every pair in these (epoch, index) batches, others nan.
    Of single replies: their own, and those of the mismatched ones.

    A pair is computed in the first batch that has it: bit for bit as the policy does before the first step. The
    data-parallel ranks divide the batches.
    """
    logps, seen, new = np.full((len(loader.dataset), 2), np.nan), np.zeros(len(loader.dataset), bool), []
    for index in batches:
        pairs = np.concatenate(loader.sample_ids(*index))
        if not seen[pairs].all():
            seen[pairs] = True
            new.append(index)
        if seen.all():
            break

    def items():
        for index, is_real in tqdm(
            trainer.local_micro_batches(new, topology), desc="reference", disable=not progress or None
        ):
            batch = loader.batch(*index)
            for each in (batch, batch["mismatched"]) if "mismatched" in batch else (batch,):
                yield each, is_real

    def inputs(item):
        return model_inputs(item[0])

    def outputs(losses, item):
        return sum_of_replies(losses, item[0], ld_alpha)

    with trainer.eval_mode(model):
        for (batch, is_real), found in parallel.pipelined_map(model, items(), inputs, outputs):
            if is_real:
                logps[np.concatenate(batch["sample_ids"]), columns_of(batch)] = found.numpy()
    if topology.data_size == 1:
        return logps
    of_rank = np.concatenate([np.nan_to_num(logps), ~np.isnan(logps)], 1)  # sums, and how many ranks know each
    total = np.array(topology.all_reduce_sum(tuple(of_rank.ravel().tolist()))).reshape(-1, 4)
    return np.where(total[:, 2:] > 0, total[:, :2] / np.maximum(total[:, 2:], 1), np.nan)


def columns_of(batch: dict) -> slice:
    """Columns of precompute_reference_logps() with the log-probabilities of a batch's replies."""
    return slice(batch["column"], batch["column"] + 1) if "column" in batch else slice(0, 2)


@paddle.no_grad()
def reference_logps(model: CausalLM, batch: dict, precomputed: np.ndarray | None, args: object) -> Tensor:
    """(N, 2) of the reference: zeros if the run has none, what prepare_step() put into the batch, precomputed ones, or
    by the model with its adapter off."""
    if args.reference_free:
        return paddle.zeros(batch["reply_tokens"].shape, "float64")
    if "reference_logps" in batch:
        return paddle.to_tensor(batch["reference_logps"])
    if precomputed is not None:
        logps = precomputed[np.concatenate(batch["sample_ids"]), columns_of(batch)]
        assert not np.isnan(logps).any(), batch["sample_ids"]
        return paddle.to_tensor(logps)
    with adapter_disabled(model):
        return reply_logps(model, batch, args.ld_alpha)


# =================================================================================================== a step, evaluation


def prepare_step(
    model: CausalLM,
    batches: list[dict],
    precomputed: np.ndarray | None,
    args: object,
    topology: Topology = SINGLE,
    moving: MovingReference | None = None,
    state: TrainState | None = None,
) -> None:
    """Puts into this rank's micro-batches of a step what their losses cannot compute alone.

    "reference_logps": of a reference that moves. "of_step": step_values() of all pairs of the step, over micro-batches
    and ranks, which takes one more pass of the policy, without gradients; a step of one micro-batch needs none. "kl":
    mismatched_kl() of the step. "shift", with bco_shift: state.reward_mean, to which this step is added.
    """

    def outputs(losses, batch):
        return sum_of_replies(losses, batch, args.ld_alpha)

    if moving is not None:
        both = [*batches, *(batch["mismatched"] for batch in batches if "mismatched" in batch)]
        with moving.in_place(), trainer.eval_mode(model):
            for batch, logps in parallel.pipelined_map(model, both, model_inputs, outputs):
                batch["reference_logps"] = logps.numpy()
    if args.is_unpaired:
        items = [(batch, not batch.get("is_dummy")) for batch in batches]
        kl = mismatched_kl(model, items, precomputed, args, topology)
        for batch in batches:
            batch["kl"] = kl
        return
    needs_all_pairs = any(loss.of_step is not None for _, loss in args.losses)
    if not args.bco_shift and (not needs_all_pairs or len(batches) * topology.data_size == 1):
        return
    found = []
    with trainer.eval_mode(model):
        for batch, policy in parallel.pipelined_map(model, batches, model_inputs, outputs):
            reference = reference_logps(model, batch, precomputed, args)
            found.append(np.concatenate([policy.numpy(), reference.numpy()], 1))
    pairs = [0 if batch.get("is_dummy") else len(logps) for batch, logps in zip(batches, found)]
    local = np.concatenate([logps[:count] for logps, count in zip(found, pairs)])
    everywhere, start = gather_pairs(local, topology)
    values = step_values(everywhere[:, :2], everywhere[:, 2:], args)
    if args.bco_shift:
        mean = args.beta * float((everywhere[:, :2] - everywhere[:, 2:]).mean())
        state.reward_mean += (mean - state.reward_mean) / (state.step + 1)
        for batch in batches:
            batch["shift"] = state.reward_mean
    for batch, count, logps in zip(batches, pairs, found):
        rows = slice(start, start + count) if count else slice(0, 1)
        batch["of_step"] = values_of(values, rows)
        if not count:  # a dummy: any numbers, as its loss is multiplied by 0
            batch["of_step"] = {
                name: {key: np.repeat(array, len(logps)) for key, array in each.items()}
                for name, each in batch["of_step"].items()
            }
        start += count


def mismatched_kl(
    model: CausalLM, items: Iterable[tuple], precomputed: np.ndarray | None, args: object, topology: Topology = SINGLE
) -> float:
    """KTO's reference point: max(0, mean log-ratio of the mismatched replies of all ranks' batches), an estimate of the
    KL divergence of policy and reference. items: (batch, whether it counts). 0 for a loss without one."""
    if args.loss_type != "kto":
        return 0.0
    mismatched, total, count = ((batch["mismatched"], is_real) for batch, is_real in items), 0.0, 0
    inputs, outputs = (lambda item: model_inputs(item[0])), (lambda losses, item: sum_of_replies(losses, item[0]))
    with trainer.eval_mode(model):
        for (batch, is_real), policy in parallel.pipelined_map(model, mismatched, inputs, outputs):
            ratios = (policy - reference_logps(model, batch, precomputed, args)).numpy()
            if is_real:
                total, count = total + float(ratios.sum()), count + len(ratios)
    total, count = topology.all_reduce_sum((total, count))
    return max(0.0, total / count)


def evaluate_pairs(
    model: CausalLM,
    loader: PreferenceLoader,
    precomputed: np.ndarray | None,
    args: object,
    topology: Topology = SINGLE,
    shift: float = 0.0,
) -> dict:
    """{"eval_loss", "eval_rewards/accuracies" (also as eval_accuracy), …, "eval_pairs"}: means of pairs or replies.
    shift: of loss_and_metrics()."""
    indices = trainer.eval_batches(loader, args.max_evaluate_steps)
    counts = pair_counts(loader.batch(*index) for index in indices)

    def items():
        for index, is_real in trainer.local_micro_batches(indices, topology):
            yield loader.batch(*index), is_real

    def inputs(item):
        return model_inputs(item[0])

    def outputs(losses, item):
        return losses, sum_of_replies(losses, item[0], args.ld_alpha)

    kl = mismatched_kl(model, items(), precomputed, args, topology) if args.is_unpaired else 0.0
    names = ("reply_ids", "reply_tokens", "desirable", "column")
    parts, logps = [], [np.zeros((0, 4))]  # (losses, batch, reference) of each batch
    with trainer.eval_mode(model):
        for (batch, is_real), (losses, policy) in parallel.pipelined_map(model, items(), inputs, outputs):
            reference = reference_logps(model, batch, precomputed, args)
            if is_real:
                kept = {name: batch[name] for name in names if name in batch}
                parts.append((losses, {**kept, "kl": kl, "shift": shift}, reference))
                logps.append(np.concatenate([policy.numpy(), reference.numpy()], 1))
        loss, sums = 0.0, dict.fromkeys(UNPAIRED_METRICS if args.is_unpaired else METRICS, 0.0)
        if not args.is_unpaired:
            everywhere, start = gather_pairs(np.concatenate(logps), topology)
            values = step_values(everywhere[:, :2], everywhere[:, 2:], args)
        for losses, batch, reference in parts:
            if not args.is_unpaired:
                batch["of_step"] = values_of(values, slice(start, start + len(reference)))
                start += len(reference)
            part, metrics = batch_loss(losses, batch, reference, counts, args)
            loss, sums = loss + float(part), {name: sums[name] + value for name, value in metrics.items()}
    loss, sums = topology.all_reduce_sum(loss), topology.all_reduce_sum(sums)
    sums = {f"eval_{name}": value for name, value in sums.items()}
    return {"eval_loss": loss, "eval_accuracy": sums["eval_rewards/accuracies"], **sums, "eval_pairs": counts[0]}
