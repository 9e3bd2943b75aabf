"""The losses of preference alignment: log-ratios of replies -> one number a pair, or a reply.

    chosen, rejected = log_ratios[:, 0], log_ratios[:, 1]                         # (N,) float64
    losses = LOSSES["sigmoid"].fn(chosen, rejected, beta, label_smoothing=0.1)    # (N,)

In the formulas c and r are the log-ratios log π(y|x) - log π_ref(y|x) of the chosen and the rejected reply (minus 0
without a reference), summed over the reply's tokens, or their mean where length_normalized. m = c - r, σ is the
logistic function, ε is label_smoothing. A new loss of pairs is a function and a row of LOSSES.

A loss that looks at all pairs of a step (of_step) gets what it needs of the others as numbers without gradient. So it
is the same however a step's pairs are divided into micro-batches and ranks.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor


def _smoothed(x, label_smoothing):
    """-(1 - ε) log σ(x) - ε log σ(-x)"""
    return -(1 - label_smoothing) * F.log_sigmoid(x) - label_smoothing * F.log_sigmoid(-x)


# ========================================================================================= losses of the margin c - r


def sigmoid_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO: -(1 - ε) log σ(β m) - ε log σ(-β m). Rafailov et al., arXiv 2305.18290, Eq. 7; ε of Mitchell's note on cDPO:
    the probability that a label is the wrong way round."""
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def robust_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: (-(1 - ε) log σ(β m) + ε log σ(-β m)) / (1 - 2ε), unbiased if a share ε of the labels is the wrong
    way round. Chowdhury et al., arXiv 2403.00409."""
    return _smoothed(beta * (chosen - rejected), -label_smoothing / (1 - 2 * label_smoothing))


def hinge_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SLiC: max(0, 1 - β m). Zhao et al., arXiv 2305.10425, in the form of Liu et al., arXiv 2309.06657."""
    return F.relu(1 - beta * (chosen - rejected))


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO: (m - 1/(2β))², m per token. Azar et al., arXiv 2310.12036, Eq. 17."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, simpo_gamma: float, label_smoothing: float) -> Tensor:
    """SimPO: -log σ(β m - γ), m per token and without a reference. Meng et al., arXiv 2405.14734, Eq. 6."""
    return _smoothed(beta * (chosen - rejected - simpo_gamma / beta), label_smoothing)


def exo_pair_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO: KL((σ(β m), σ(-β m)) || (1 - ε, ε)), ε > 0. Ji et al., arXiv 2402.00856, Eq. 16."""
    x = beta * (chosen - rejected)
    towards_chosen = F.sigmoid(x) * (F.log_sigmoid(x) - np.log1p(-label_smoothing))
    return towards_chosen + F.sigmoid(-x) * (F.log_sigmoid(-x) - np.log(label_smoothing))


def discopop_loss(chosen: Tensor, rejected: Tensor, beta: float, discopop_tau: float) -> Tensor:
    """DiscoPOP: (1 - s) (-log σ(β m)) + s exp(-β m), s = σ(β m / τ). Lu et al., arXiv 2406.08414, Eq. 5."""
    x = beta * (chosen - rejected)
    share = F.sigmoid(x / discopop_tau)
    return -(1 - share) * F.log_sigmoid(x) + share * paddle.exp(-x)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 1.0) -> Tensor:
    """ORPO's odds ratio: -log σ(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p), p = exp(log-probability
    per token). Hong et al., arXiv 2403.07691, Eq. 7; the whole loss is λ times that plus the chosen SFT loss. No β."""

    def log_one_minus(logp):  # log(1 - p); a reply that is certain in float32 would have infinite odds
        return paddle.log(-paddle.expm1(paddle.clip(logp, max=-1e-7)))

    return -F.log_sigmoid(chosen - rejected - log_one_minus(chosen) + log_one_minus(rejected))


# ======================================================================================= losses of c and r, one by one


def dpop_loss(chosen: Tensor, rejected: Tensor, beta: float, dpop_lambda: float) -> Tensor:
    """DPO-Positive: -log σ(β (m - λ max(0, -c))): a chosen reply may not become less likely than under the reference.
    Pal et al., arXiv 2402.13228."""
    return -F.log_sigmoid(beta * (chosen - rejected - dpop_lambda * F.relu(-chosen)))


def sppo_hard_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SPPO: (c - 1/(2β))² + (r + 1/(2β))². Wu et al., arXiv 2405.00675, Eq. 4.7, the chosen reply winning surely."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def nca_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """NCA: -log σ(β c) - ½ log σ(-β c) - ½ log σ(-β r). Chen et al., arXiv 2402.05369."""
    pushed_down = F.log_sigmoid(-beta * chosen) + F.log_sigmoid(-beta * rejected)
    return -F.log_sigmoid(beta * chosen) - 0.5 * pushed_down


def bco_pair_loss(chosen: Tensor, rejected: Tensor, beta: float, shift: float = 0.0) -> Tensor:
    """BCO: -log σ(β c - δ) - log σ(-(β r - δ)). Jung et al., arXiv 2404.04656; the shift δ is the mean reward of all
    pairs so far, as in TRL 0.24; 0, as in TRL 1.16, without bco_shift."""
    return -F.log_sigmoid(beta * chosen - shift) - F.log_sigmoid(shift - beta * rejected)


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-zero: (1 - σ(β c)) + σ(β r), for chosen replies better than the model's. D'Oosterlinck et al., arXiv
    2408.06266, Eq. 7."""
    return F.sigmoid(-beta * chosen) + F.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-down: σ(β c) + (1 - σ(β m)), for chosen replies worse than the model's. As APO-zero, Eq. 8."""
    return F.sigmoid(beta * chosen) + F.sigmoid(-beta * (chosen - rejected))


# ================================================================================= losses that look at a step's pairs
# of_step: policy, reference (P, 2) float64, the log-probabilities of all pairs of the step -> {name: (P,)}, which `fn`
# gets for its pairs by these names.


def aot_shift(policy: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    """{"shift"}: what makes a pair's reference margin that of the same rank: the k-th smallest margin of the policy is
    compared with the k-th smallest of the reference."""
    margins, given = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    return {"shift": given - np.sort(given)[ranks_of(margins)]}


def aot_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float, shift: Tensor) -> Tensor:
    """AOT: DPO of sorted margins: -(1 - ε) log σ(β d) - ε log σ(-β d), d = k-th smallest log π(c)/π(r) of the step
    minus the k-th smallest log π_ref(c)/π_ref(r). Melnyk et al., arXiv 2406.05882."""
    return _smoothed(beta * (chosen - rejected + shift), label_smoothing)


def aot_partners(policy: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    """{"of_chosen", "of_rejected"}: the rejected log-ratio of the same rank as a chosen one, and the reverse."""
    chosen, rejected = (policy - reference).T
    return {
        "of_chosen": np.sort(rejected)[ranks_of(chosen)],
        "of_rejected": np.sort(chosen)[ranks_of(rejected)],
    }


def aot_unpaired_loss(
    chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float, of_chosen: Tensor, of_rejected: Tensor
) -> Tensor:
    """Unpaired AOT: as AOT with d = k-th smallest c minus k-th smallest r of the step. Melnyk et al., arXiv 2406.05882.

    Each d is counted by its c and by its r, each with its own gradient; so half of the value is taken off again."""
    by_chosen = _smoothed(beta * (chosen - of_chosen), label_smoothing)
    by_rejected = _smoothed(beta * (of_rejected - rejected), label_smoothing)
    return by_chosen + by_rejected - 0.5 * (by_chosen + by_rejected).detach()


def mean_ratios(policy: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    """{"kl_chosen", "kl_rejected"}: max(0, mean log-ratio) of the step's chosen and of its rejected replies."""
    kls = np.maximum(0.0, (policy - reference).mean(0))
    return dict(zip(("kl_chosen", "kl_rejected"), np.broadcast_to(kls[:, None], (2, len(policy)))))


def kto_pair_loss(chosen: Tensor, rejected: Tensor, beta: float, kl_chosen: Tensor, kl_rejected: Tensor) -> Tensor:
    """KTO on pairs: ½ (1 - σ(β (c - KL_r))) + ½ (1 - σ(β (KL_c - r))): the KL of one side, max(0, mean log-ratio), is
    the other's reference point, without gradient. Ethayarajh et al., arXiv 2402.01306, in its authors' first form."""
    return 0.5 * (F.sigmoid(-beta * (chosen - kl_rejected)) + F.sigmoid(-beta * (kl_chosen - rejected)))


def ranks_of(values: np.ndarray) -> np.ndarray:
    """(P,) -> the place of each value when they are sorted."""
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


# ============================================================================================ one reply, good or bad


def kto_loss(log_ratios: Tensor, desirable: Tensor, kl: float, beta: float) -> Tensor:
    """KTO: 1 - σ(β (q - KL)) of a desirable reply, 1 - σ(β (KL - q)) of an undesirable one, q its log-ratio.
    Ethayarajh et al., arXiv 2402.01306, Eq. 7; KL: max(0, mean log-ratio of mismatched
    replies), without gradient. desirable (N,): 1 or 0."""
    return F.sigmoid(-beta * (2 * desirable - 1) * (log_ratios - kl))


def apo_zero_unpaired_loss(log_ratios: Tensor, desirable: Tensor, kl: float, beta: float) -> Tensor:
    """APO-zero on single replies: 1 - σ(β q) or σ(β q). D'Oosterlinck et al., arXiv 2408.06266, Eq. 7. No KL."""
    return F.sigmoid(-beta * (2 * desirable - 1) * log_ratios)


# ========================================================================================================== the table


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of LOSSES."""

    fn: Callable  # (chosen, rejected, beta, extra_keys and of_step's values by name) -> (N,) losses
    needs_reference: bool = True
    length_normalized: bool = False  # compares log-probabilities per token, not those of whole replies, as Eq. 7 of DPO
    extra_keys: tuple[str, ...] = ()  # keys of Args that fn takes besides beta
    of_step: Callable | None = None  # what fn needs of all pairs of a step
    only_margin: bool = False  # depends on c - r only, so that a reference to which all replies are equal makes sense
    has_shift: bool = False  # fn takes the mean reward of all pairs so far


_SMOOTHED = {"extra_keys": ("label_smoothing",)}
LOSSES = {
    "sigmoid": Loss(sigmoid_loss, only_margin=True, **_SMOOTHED),
    "hinge": Loss(hinge_loss, only_margin=True),
    "ipo": Loss(ipo_loss, length_normalized=True, only_margin=True),
    "simpo": Loss(simpo_loss, False, length_normalized=True, extra_keys=("simpo_gamma", "label_smoothing")),
    "or": Loss(orpo_loss, False, length_normalized=True),
    "robust": Loss(robust_loss, only_margin=True, **_SMOOTHED),
    "sigmoid_norm": Loss(sigmoid_loss, length_normalized=True, only_margin=True, **_SMOOTHED),
    "exo_pair": Loss(exo_pair_loss, only_margin=True, **_SMOOTHED),
    "discopop": Loss(discopop_loss, only_margin=True, extra_keys=("discopop_tau",)),
    "dpop": Loss(dpop_loss, extra_keys=("dpop_lambda",)),
    "sppo_hard": Loss(sppo_hard_loss),
    "nca_pair": Loss(nca_pair_loss),
    "bco_pair": Loss(bco_pair_loss, has_shift=True),
    "apo_zero": Loss(apo_zero_loss),
    "apo_down": Loss(apo_down_loss),
    "aot": Loss(aot_loss, of_step=aot_shift, **_SMOOTHED),
    "aot_unpaired": Loss(aot_unpaired_loss, of_step=aot_partners, **_SMOOTHED),
    "kto_pair": Loss(kto_pair_loss, of_step=mean_ratios),
}
UNPAIRED_LOSSES = {"kto": kto_loss, "apo_zero_unpaired": apo_zero_unpaired_loss}  # of single replies
