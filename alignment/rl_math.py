"""The formulas of reinforcement learning: rewards -> advantages (numpy, float64), advantages -> losses (Paddle).

    advantages = group_advantages(rewards, "group")                               # (P, G): GRPO
    losses, clipped = policy_losses(logps, old_logps, advantages, segments, options)   # (M,) one a token
    loss = mean_loss(losses, segments, replies, "dapo", counts)

Letters: P prompts, G replies to each, N = P * G replies, M tokens of replies, one reply after another. `segments` (M,)
int64 is the reply of each token, ascending. A log-probability is that of the distribution that was sampled from.

A new estimator is a function and a row of ESTIMATORS in advantages.py; a new loss is a row of policy_losses or
mean_loss.
"""

import dataclasses

import numpy as np
import paddle
from paddle import Tensor

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo")
EPSILON = 1e-4  # added to a standard deviation, as in TRL

# ================================================================================ rewards of replies -> advantages


def group_advantages(rewards: np.ndarray, scale_rewards: str) -> np.ndarray:
    """GRPO: A = (r - mean of the group) / (std + 1e-4); Shao et al., arXiv 2402.03300, 4.1.2.

    rewards (P, G) -> (P, G). scale_rewards: "group", the std of each group; "batch", of all rewards (Liu et al., arXiv
    2508.08221); "none", no division (Dr. GRPO, arXiv 2503.20783). A std has G - 1 degrees of freedom. A group of one
    reply has the advantage 0, and so has a reply without a reward (nan), which counts in no mean.
    """
    centered = rewards - np.array([[known(group).mean() if len(known(group)) else 0.0] for group in rewards])
    if scale_rewards == "batch":
        centered = centered / (sample_std(known(rewards)) + EPSILON)
    elif scale_rewards == "group":
        centered = centered / (np.array([[sample_std(known(group))] for group in rewards]) + EPSILON)
    return np.nan_to_num(centered, nan=0.0)


def leave_one_out_advantages(rewards: np.ndarray) -> np.ndarray:
    """RLOO: A_i = r_i - mean of the other rewards of the group; Ahmadian et al., arXiv 2402.14740, Eq. 8. (P, G)"""
    counts = np.isfinite(rewards).sum(1, keepdims=True)  # a reply without a reward (nan) counts in no mean
    others = (np.nansum(rewards, 1, keepdims=True) - rewards) / np.maximum(1, counts - 1)
    return np.nan_to_num(np.where(counts > 1, rewards - others, 0.0), nan=0.0)


def known(rewards: np.ndarray) -> np.ndarray:
    """The rewards that are not nan, flat."""
    return rewards[np.isfinite(rewards)]


def sample_std(x: np.ndarray) -> float:
    """Standard deviation with n - 1 degrees of freedom; 0 for one number."""
    return float(x.std(ddof=1)) if x.size > 1 else 0.0


def overlong_penalty(lengths: np.ndarray, max_dec_len: int, buffer: int, factor: float) -> np.ndarray:
    """DAPO's soft punishment of long replies: 0 up to max_dec_len - buffer tokens, then linear down to -factor.

    Yu et al., arXiv 2503.14476, Eq. 13. lengths (N,) -> (N,) to be added to the rewards.
    """
    return -np.clip((lengths - (max_dec_len - buffer)) / buffer, 0.0, 1.0) * factor


# ================================================================================ rewards of tokens -> advantages


def token_rewards(score: float, logps: np.ndarray, ref_logps: np.ndarray | None, kl_coeff: float) -> np.ndarray:
    """-kl_coeff (log p - log p_ref) at each token of a reply, and the score at its last; Ouyang et al., arXiv
    2203.02155, Eq. 2. logps, ref_logps (T,) -> (T,)"""
    rewards = np.zeros(len(logps))
    if ref_logps is not None and kl_coeff:
        rewards -= kl_coeff * (logps - ref_logps)
    rewards[-1] += score
    return rewards


def discounted_returns(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """R_t = r_t + gamma R_{t+1}, (T,) -> (T,): REINFORCE++ before whitening; Hu, arXiv 2501.03262, Eq. 6."""
    returns, later = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = later = rewards[t] + gamma * later
    return returns


def generalized_advantages(
    rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float
) -> tuple[np.ndarray, np.ndarray]:
    """GAE: d_t = r_t + gamma V_{t+1} - V_t, A_t = d_t + gamma lambda A_{t+1}; Schulman et al., arXiv 1506.02438,
    Eq. 16. rewards, values (T,) of one reply -> (advantages, returns = A + V), each (T,)."""
    advantages, later = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(values) else 0.0
        advantages[t] = later = rewards[t] + gamma * next_value - values[t] + gamma * gae_lambda * later
    return advantages, advantages + values


def whiten(x: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(variance + 1e-8) with n - 1 degrees of freedom, over all tokens of all replies. (M,)"""
    variance = x.var(ddof=1) if x.size > 1 else 0.0
    return (x - x.mean()) / np.sqrt(variance + 1e-8)


# ============================================================================================== losses of tokens


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What policy_losses() depends on besides the numbers."""

    loss_type: str = "dapo"  # one of LOSS_TYPES
    importance_sampling_level: str = "token"  # "sequence": GSPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # largest ratio of a token with a negative advantage


def policy_losses(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, segments: np.ndarray, options: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (M,) of tokens with log-probabilities logps, under the policy that is trained, and old_logps, under the
    one that sampled; and {name: (M,) 0 or 1}, where a ratio was clipped.

    PPO: -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(logp - old); Schulman et al., arXiv 1707.06347, Eq. 7; high
    above low: DAPO's clip-higher, arXiv 2503.14476, Eq. 10. "sequence": r is the same for all tokens of a reply, the
    exponential of their mean log-ratio; GSPO, Zheng et al., arXiv 2507.18071, Eq. 7. dual_clip c: r is at most c where
    A < 0; Ye et al., arXiv 1912.09729, Eq. 5. cispo: -min(r, 1 + high) A logp with a constant weight; MiniMax-M1,
    arXiv 2506.13585, Eq. 4.
    """
    log_ratio = logps - old_logps
    if options.importance_sampling_level == "sequence":
        log_ratio = paddle.gather(segment_means(log_ratio, segments), paddle.to_tensor(segments))
    ratio = paddle.exp(log_ratio)
    low, high = 1 - options.clip_low, 1 + options.clip_high
    clipped = {
        "clip_ratio/low_mean": ((ratio < low) & (advantages < 0)).astype("float32"),
        "clip_ratio/high_mean": ((ratio > high) & (advantages > 0)).astype("float32"),
    }
    if options.loss_type == "cispo":
        return -paddle.clip(ratio, max=high).detach() * advantages * logps, clipped
    bounded = paddle.clip(ratio, low, high)
    if options.dual_clip is not None:
        ratio = paddle.clip(ratio, max=options.dual_clip)
    return -paddle.minimum(ratio * advantages, bounded * advantages), clipped


SAMPLING_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def sampling_weights(
    logps: np.ndarray, sampled_logps: np.ndarray, correction: str, low: float | None, high: float
) -> np.ndarray:
    """Weights (M,) of a reply's tokens that were sampled with other arithmetic than they are trained with, such as
    rounded weights: w = p_trainer / p_engine of each token, or of the whole reply ("sequence").

    "truncate": within [low, high]; Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training", 2025. "mask": 0 outside. logps, sampled_logps: (M,) by the trainer, before the updates, and the engine.
    """
    difference = logps - sampled_logps
    if correction.startswith("sequence"):
        difference = np.full(len(logps), difference.sum())
    weights, low = np.exp(difference), 0.0 if low is None else low
    if correction.endswith("truncate"):
        return np.clip(weights, low, high)
    return np.where((weights < low) | (weights > high), 0.0, weights)


def kl_estimates(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """k3 = exp(ref - logp) - (ref - logp) - 1 >= 0, unbiased for KL(p || p_ref); Schulman, "Approximating KL
    divergence", 2020; GRPO's Eq. 4. (M,)"""
    difference = ref_logps - logps
    return paddle.exp(difference) - difference - 1


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), and where the clipped one is larger; (M,) each.

    As in OpenAI's PPO; Engstrom et al., arXiv 2005.12729, Section 3, Eq. 1.
    """
    bounded = old_values + paddle.clip(values - old_values, -clip_range, clip_range)
    plain, clipped = (values - returns) ** 2, (bounded - returns) ** 2
    return 0.5 * paddle.maximum(plain, clipped), (clipped > plain).astype("float32")


# ===================================================================================== losses of tokens -> one number


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the means of an update are over, summed over micro-batches and ranks."""

    replies: int
    tokens: int
    micro_batches: int
    ptx_tokens: int = 0  # learned ones of ptx_datasets


def mean_loss(
    losses: Tensor, segments: np.ndarray, reply_tokens: np.ndarray, loss_type: str, counts: Counts, max_dec_len: int
) -> Tensor:
    """A micro-batch's part of an update's loss from its losses (M,); reply_tokens (n,): tokens of its replies.

    dapo, cispo   sum over tokens / tokens of the update (arXiv 2503.14476, Eq. 12)
    grpo          mean over replies of the mean over their tokens (arXiv 2402.03300, Eq. 3)
    dr_grpo       sum over tokens / (replies * max_dec_len): no bias by length (arXiv 2503.20783)
    bnpo          mean over micro-batches of their means over tokens, as TRL has it
    """
    if loss_type in ("dapo", "cispo"):
        return losses.sum() / max(1, counts.tokens)
    if loss_type == "dr_grpo":
        return losses.sum() / (max(1, counts.replies) * max_dec_len)
    if loss_type == "bnpo":
        return losses.sum() / max(1, int(reply_tokens.sum())) / max(1, counts.micro_batches)
    assert loss_type == "grpo", loss_type
    return segment_means(losses, segments).sum() / max(1, counts.replies)


def segment_means(x: Tensor, segments: np.ndarray) -> Tensor:
    """Means of x (M,) over the tokens of each reply, (n,)."""
    lengths = paddle.to_tensor(np.maximum(1, np.bincount(segments)).astype("float32")).astype(x.dtype)
    return paddle.geometric.segment_sum(x, paddle.to_tensor(segments)) / lengths


# ======================================================================================== preference -> reward model


def preference_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | float, center_coefficient: float) -> Tensor:
    """-log sigmoid(r_c - r_r - margin) + c (r_c + r_r)^2, (N,) each; Bradley and Terry, 1952; margin: Touvron et al.,
    arXiv 2307.09288, Eq. 2; c keeps rewards around 0: Eisenstein et al., arXiv 2312.09244, Eq. 2."""
    losses = -paddle.nn.functional.log_sigmoid(chosen - rejected - margin)
    return losses + center_coefficient * (chosen + rejected) ** 2 if center_coefficient else losses
