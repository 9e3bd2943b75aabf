"""The scores of groups of replies -> rewards, advantages, and weights of replies sampled in other arithmetic.

    combine_scores(groups, weights, args)        # reply.scores -> reply.reward
    correct_sampling(groups, args)               # reply.weights
    estimate_advantages(groups, args)            # reply.advantages, one a token; with gae also reply.returns

The formulas are in rl_math.py.
"""

import functools
import math

import numpy as np

from alignment import rl_math
from alignment.groups import Group


def combine_scores(groups: list[Group], weights: list[float], args: object) -> None:
    """reply.reward: the weighted sum of the scores that apply, clipped to clip_range_score, with the penalty of long
    replies; normalize_reward: whitened over the rollout."""
    replies = [reply for group in groups for reply in group.replies]
    for reply in replies:
        known = [weight * score for weight, score in zip(weights, reply.scores) if score is not None]
        limit = args.clip_range_score
        reply.reward = max(-limit, min(limit, sum(known))) if known else math.nan
    if args.enable_overlong_reward_buffer:
        lengths = np.array([len(reply.logps) for reply in replies])
        options = args.max_dec_len, args.overlong_reward_buffer, args.overlong_penalty_factor
        for reply, penalty in zip(replies, rl_math.overlong_penalty(lengths, *options)):
            reply.reward += float(penalty)
    if args.normalize_reward:
        rewards = np.array([reply.reward for reply in replies])
        known = rl_math.known(rewards)
        for reply in replies:
            std = rl_math.sample_std(known)
            reply.reward = (reply.reward - float(known.mean())) / (std + rl_math.EPSILON)


ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus", "gae")
TOKEN_LEVEL = ("reinforce_plus_plus", "gae")  # a reward for each token; KL is in it, and advantages are whitened


def estimate_advantages(groups: list[Group], args: object) -> None:
    """reply.advantages, and with gae reply.returns, by args.advantage_estimator."""
    replies = [reply for group in groups for reply in group.replies]
    if args.advantage_estimator in TOKEN_LEVEL:
        for reply in replies:
            reward = 0.0 if math.isnan(reply.reward) else reply.reward
            rewards = rl_math.token_rewards(reward, reply.logps, reply.ref_logps, args.kl_coeff)
            if args.advantage_estimator == "gae":
                estimate = rl_math.generalized_advantages(rewards, reply.values, args.gamma, args.gae_lambda)
                reply.advantages, reply.returns = estimate
            else:
                reply.advantages = rl_math.discounted_returns(rewards, args.gamma)
    else:
        rewards = np.array([[_sequence_reward(reply, args) for reply in group.replies] for group in groups])  # (P, G)
        if args.advantage_estimator == "grpo":
            advantages = rl_math.group_advantages(rewards, args.scale_rewards)
        else:
            advantages = rl_math.leave_one_out_advantages(rewards)
        for reply, advantage in zip(replies, advantages.reshape(-1)):
            reply.advantages = np.full(len(reply.logps), advantage)
    if args.normalize_advantage:
        white = rl_math.whiten(np.concatenate([reply.advantages for reply in replies]))
        ends = np.cumsum([len(reply.logps) for reply in replies])
        for reply, part in zip(replies, np.split(white, ends[:-1])):
            reply.advantages = part


def _sequence_reward(reply, args):
    kl = 0.0 if reply.ref_logps is None else float((reply.logps - reply.ref_logps).sum())
    return reply.reward - args.kl_coeff * kl


def correct_sampling(groups: list[Group], args: object) -> dict[str, float]:
    """reply.weights, and reply.logps become the trainer's; returns TRL's metrics of the weights before the limits."""
    ratios = []
    for reply in (reply for group in groups for reply in group.replies):
        limits = args.importance_sampling_clip_min, args.importance_sampling_clip_max
        weights = functools.partial(
            rl_math.sampling_weights, reply.old_logps, reply.logps, args.importance_sampling_mode
        )
        reply.weights = weights(*limits)
        ratios.append(weights(None, math.inf))
        reply.sampled_logps, reply.logps = reply.logps, reply.old_logps
    ratios = np.concatenate(ratios)
    found = {"min": ratios.min(), "mean": ratios.mean(), "max": ratios.max()}
    return {f"sampling/importance_sampling_ratio/{name}": float(value) for name, value in found.items()}
