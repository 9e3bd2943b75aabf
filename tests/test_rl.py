"""rl.py: advantages and losses beside TRL's, packed groups, rewards, and whole runs.

python -m pytest tests/test_rl.py                                   # CPU, no torch, about 40 s
python -m pytest tests/test_rl.py --hf-python PYTHON_WITH_TRL       # and TRL 1.16 computes the numbers again
export PYTHONPATH=.:tests/golden:tests/ranks:tests/bench
python tests/test_rl.py PYTHON_WITH_TRL      # write tests/golden/rl_trl.json anew
"""

import http.server
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from kernels.rounding import round_to_nearest

import bench_rl
import numpy as np
import paddle
import pytest
import tiny_models
from conftest import ROOT
from test_scripts import crash_after_saving, fails, options, tensors, write_model, write_records
from test_scripts import rows as logged

import adapters
import parallel
import rl
import trainer
from alignment import heads, rl_math, rollouts
from alignment.critic import Critic
from alignment.groups import group_sample
from alignment.rewards import load_reward_functions
from arguments import parse_args
from formats.tensor_files import read_safetensors
from formats.tokenizer import load_tokenizer
from modules.layers import Linear, set_parameter
from parallel import Degrees
from planning import memory_model
from serving.engine import Engine, Request
from serving.fused import FusedRunner
from serving.sampling import SamplingParams

GOLDEN = Path(__file__).with_name("golden") / "rl_trl.json"
CASES = [  # loss_type, level, low, high, delta, beta
    ("dapo", "token", 0.2, 0.2, None, 0.0),
    ("dapo", "token", 0.2, 0.28, None, 0.05),
    ("dapo", "sequence", 0.003, 0.004, None, 0.0),
    ("grpo", "token", 0.2, 0.2, None, 0.1),
    ("grpo", "sequence", 0.02, 0.03, None, 0.1),
    ("dr_grpo", "token", 0.1, 0.3, 1.5, 0.0),
    ("bnpo", "token", 0.2, 0.2, 1.4, 0.04),
    ("cispo", "token", 0.2, 0.3, None, 0.0),
]

RECIPE = """
import collections, inspect, json, sys, textwrap, types
import torch
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.reward_trainer import RewardTrainer
given = json.loads(sys.argv[2])
numbers = {key: torch.tensor(given[key], dtype=torch.float64) for key in ("logps", "old", "ref", "mask", "advantages")}
same = lambda value, **_: value
accelerator = types.SimpleNamespace(num_processes=1, gather=same, reduce=same, gather_for_metrics=same)
arrays = {}
for number, (kind, level, low, high, delta, beta) in enumerate(given["cases"]):
    logps = numbers["logps"].clone().requires_grad_()
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    fake = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        args=types.SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        loss_type=kind, importance_sampling_level=level, epsilon_low=low, beta=beta, aux_loss_enabled=False,
        epsilon_high=1 + high if kind == "cispo" else high, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, current_gradient_accumulation_steps=1, accelerator=accelerator, _entropy_bonus_enabled=False,
        max_completion_length=given["max_dec_len"], model=types.SimpleNamespace(training=True), _metrics=metrics)
    mask = numbers["mask"]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = dict(prompt_ids=ids[:, :1], prompt_mask=mask[:, :1], completion_ids=ids, completion_mask=mask,
                  advantages=numbers["advantages"], old_per_token_logps=numbers["old"],
                  ref_per_token_logps=numbers["ref"], num_items_in_batch=mask.sum())
    loss = grpo_trainer.GRPOTrainer._compute_loss(fake, None, inputs)
    loss.backward()
    arrays[f"loss {number}"], arrays[f"gradient {number}"] = loss.item(), logps.grad.numpy()
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "kl"):
        if metrics["train"][name]:
            arrays[f"{name} {number}"] = metrics["train"][name][0]


def run(module, begin, end, **names):  # TRL's own lines, from the one that contains `begin` to the one with `end`
    lines = inspect.getsource(module).splitlines()
    first = next(i for i, line in enumerate(lines) if begin in line)
    last = next(i for i, line in enumerate(lines) if i > first and end in line)
    space = {**vars(module), **names}
    exec(textwrap.dedent("\\n".join(lines[first:last + 1])), space)
    return space["advantages"].numpy()


rewards = torch.tensor(given["rewards"], dtype=torch.float64)
G = rewards.shape[1]
unscorable = torch.isnan(rewards.reshape(-1))
for scale in ("group", "batch", "none"):
    fake = types.SimpleNamespace(multi_objective_aggregation="sum_then_normalize", scale_rewards=scale,
                                 reward_weights=torch.ones(1, dtype=torch.float64))
    arrays["grpo " + scale] = run(
        grpo_trainer, 'if self.multi_objective_aggregation == "sum_then_normalize"', "advantages = torch.nan_to_num",
        self=fake, rewards_per_func=rewards.reshape(-1, 1), device="cpu", num_generations=G, unscorable_mask=unscorable)
lines = inspect.getsource(grpo_trainer).splitlines()
first = next(i for i, line in enumerate(lines) if "per_token_logps_diff = (old_per_token_logps" in line)
last = next(i for i, line in enumerate(lines) if i > first and 'f"Unknown vLLM importance sampling' in line) + 1
code = textwrap.dedent("\\n".join(lines[first:last + 1]))
for mode, low, high in given["corrections"]:
    fake = types.SimpleNamespace(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
                                 vllm_importance_sampling_clip_max=high)
    space = {**vars(grpo_trainer), "self": fake, "mask": numbers["mask"], "old_per_token_logps": numbers["logps"],
             "sampling_per_token_logps": numbers["old"]}
    exec(code, space)
    weights = space["vllm_importance_sampling_ratio"].expand(numbers["mask"].shape) * numbers["mask"]
    arrays["weights " + mode] = weights.numpy()
arrays["rloo"] = run(
    rloo_trainer, "grouped_rewards = rewards.view(-1, num_generations)", "advantages = torch.nan_to_num",
    self=types.SimpleNamespace(normalize_advantages=False), rewards=rewards.reshape(-1), num_generations=G)
scores = torch.tensor(given["scores"], dtype=torch.float64)
for number, (margin, center) in enumerate(given["reward_cases"]):
    logits = scores.T.reshape(-1, 1).clone().requires_grad_()
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    fake = types.SimpleNamespace(args=types.SimpleNamespace(center_rewards_coefficient=center), _total_train_tokens=0,
                                 model=types.SimpleNamespace(training=False), accelerator=accelerator, _metrics=metrics)
    inputs = {"margin": torch.tensor(margin, dtype=torch.float64)} if margin else {}
    loss = RewardTrainer.compute_loss(fake, lambda **_: types.SimpleNamespace(logits=logits), inputs)
    loss.backward()
    arrays[f"reward loss {number}"] = loss.item()
    arrays[f"reward gradient {number}"] = logits.grad.reshape(2, -1).T.numpy()
"""


def given_numbers():
    """The inputs of both sides: 8 replies of up to 7 tokens, some clipped, rewards with a reply that has none."""
    draw = np.random.default_rng(3)
    mask = (np.arange(7) < np.array([7, 3, 5, 1, 6, 2, 7, 4])[:, None]).astype(float)
    logps = -draw.exponential(1.0, mask.shape)
    rewards = draw.normal(size=(3, 4))
    rewards[1] = 0.5  # no difference in the group
    rewards[2, 3] = np.nan
    return {
        "logps": logps.tolist(),
        "old": (logps + draw.normal(0, 0.2, mask.shape)).tolist(),
        "ref": (logps + draw.normal(0, 0.3, mask.shape)).tolist(),
        "mask": mask.tolist(),
        "advantages": draw.normal(size=8).tolist(),
        "max_dec_len": 9,
        "cases": CASES,
        "rewards": rewards.tolist(),
        "corrections": [
            ("token_truncate", None, 1.1),
            ("token_mask", 0.85, 1.15),
            ("sequence_truncate", 0.7, 1.2),
            ("sequence_mask", None, 1.1),
        ],
        "scores": draw.normal(0, 2, (5, 2)).tolist(),
        "reward_cases": [(None, None), ([0.5, 0, 1, 0.1, 2], None), (None, 0.02), ([0.5, 0, 1, 0.1, 2], 0.1)],
    }


def our_numbers():
    """{name: number or array} under the names that RECIPE gives TRL's."""
    given, out = given_numbers(), {}
    mask = np.array(given["mask"]) > 0
    segments, lengths = np.nonzero(mask)[0], mask.sum(1)
    old, ref = (paddle.to_tensor(np.array(given[key])[mask]) for key in ("old", "ref"))
    advantages = paddle.to_tensor(np.array(given["advantages"])[segments])
    counts = rl_math.Counts(8, int(mask.sum()), 1)
    for number, (kind, level, low, high, dual, beta) in enumerate(CASES):
        logps = paddle.to_tensor(np.array(given["logps"])[mask], stop_gradient=False)
        options = rl_math.LossOptions(kind, level, low, high, dual)
        losses, clipped = rl_math.policy_losses(logps, old, advantages, segments, options)
        if beta:
            kl = rl_math.kl_estimates(logps, ref)
            losses = losses + beta * kl
            out[f"kl {number}"] = float(kl.mean())
        if kind != "cispo":
            for name, where in clipped.items():
                per_reply = level == "sequence"  # TRL counts replies there; all tokens of a reply are alike
                where = where.numpy()
                out[f"{name} {number}"] = float(
                    np.mean([where[segments == i][0] for i in range(8)]) if per_reply else where.mean()
                )
        loss = rl_math.mean_loss(losses, segments, lengths, kind, counts, given["max_dec_len"])
        loss.backward()
        gradient = np.zeros(mask.shape)
        gradient[mask] = logps.grad.numpy()
        out[f"loss {number}"], out[f"gradient {number}"] = float(loss), gradient
    for mode, *limits in given["corrections"]:
        out["weights " + mode] = weights = np.zeros(mask.shape)
        for row, n in enumerate(lengths):
            new, sampled = (np.array(given[key])[row, :n] for key in ("logps", "old"))
            weights[row, :n] = rl_math.sampling_weights(new, sampled, mode, *limits)
    given_rewards = np.array(given["rewards"])
    for scale in ("group", "batch", "none"):
        out["grpo " + scale] = rl_math.group_advantages(given_rewards, scale).reshape(-1)
    out["rloo"] = rl_math.leave_one_out_advantages(given_rewards).reshape(-1)
    for number, (margin, center) in enumerate(given["reward_cases"]):
        scores = paddle.to_tensor(np.array(given["scores"]), stop_gradient=False)
        margin = paddle.to_tensor(np.array(margin or [0.0] * 5))
        loss = rl_math.preference_losses(scores[:, 0], scores[:, 1], margin, center or 0.0).mean()
        loss.backward()
        out[f"reward loss {number}"], out[f"reward gradient {number}"] = float(loss), scores.grad.numpy()
    return out


def assert_equal_numbers(ours, theirs):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_losses_advantages_and_gradients_are_those_of_trl():
    assert_equal_numbers(our_numbers(), json.loads(GOLDEN.read_text()))


@pytest.mark.torch
def test_trl_computes_the_golden_numbers(hf_python):
    theirs = hf_python(RECIPE, json.dumps(given_numbers()))
    assert_equal_numbers(our_numbers(), theirs)


# --------------------------------------------------------------------------------------- formulas by their slow forms


def test_generalized_advantages_are_sums_of_temporal_differences():
    draw = np.random.default_rng(0)
    rewards_, values = draw.normal(size=6), draw.normal(size=6)
    gamma, lambda_ = 0.9, 0.7
    deltas = rewards_ + gamma * np.append(values[1:], 0.0) - values
    advantages, returns = rl_math.generalized_advantages(rewards_, values, gamma, lambda_)
    for t in range(6):
        slow = sum((gamma * lambda_) ** (k - t) * deltas[k] for k in range(t, 6))
        assert abs(advantages[t] - slow) < 1e-12
    np.testing.assert_allclose(returns, advantages + values)
    # lambda 1: returns are the discounted rewards, whatever the values
    _, returns = rl_math.generalized_advantages(rewards_, values, gamma, 1.0)
    np.testing.assert_allclose(returns, rl_math.discounted_returns(rewards_, gamma))


def test_rewards_of_tokens_and_long_replies():
    logps, ref = np.array([-1.0, -2.0, -0.5]), np.array([-1.5, -1.0, -0.5])
    np.testing.assert_allclose(rl_math.token_rewards(2.0, logps, ref, 0.1), [-0.05, 0.1, 2.0])
    penalties = rl_math.overlong_penalty(np.array([5, 6, 8, 10]), max_dec_len=10, buffer=4, factor=0.5)
    np.testing.assert_allclose(penalties, [0, 0, -0.25, -0.5])
    white = rl_math.whiten(np.array([1.0, 2.0, 4.0]))
    assert abs(white.mean()) < 1e-12 and abs(white.std(ddof=1) - 1) < 1e-6


def test_value_loss_is_clipped():
    values, old, returns = (paddle.to_tensor(np.array(x)) for x in ([2.0, 0.1], [0.0, 0.0], [3.0, 0.0]))
    values.stop_gradient = False
    losses_, clipped = rl_math.value_losses(values, old, returns, 0.5)
    np.testing.assert_allclose(losses_.numpy(), [0.5 * 2.5**2, 0.5 * 0.1**2])
    losses_.sum().backward()
    np.testing.assert_allclose(values.grad.numpy(), [0.0, 0.1])  # beyond the range there is nothing to gain
    assert clipped.tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------------ packed groups


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a random model with the demo's tokenizer."""
    return write_model(tmp_path_factory.mktemp("rl") / "base", initializer_range=0.2)


def random_groups(sizes, seed=1):
    """sizes: [(prompt tokens, [reply tokens, …]), …] -> Groups with random numbers for every token."""
    draw = np.random.default_rng(seed)
    groups = []
    for number, (prompt, lengths) in enumerate(sizes):
        replies = []
        for length in lengths:
            reply = rollouts.Reply(draw.integers(3, 3000, length).tolist(), -draw.exponential(4, length), "")
            reply.advantages, reply.ref_logps = draw.normal(size=length), -draw.exponential(4, length)
            reply.values, reply.returns = draw.normal(size=length), draw.normal(size=length)
            replies.append(reply)
        groups.append(rollouts.Group(number, draw.integers(3, 3000, prompt).astype(np.int32), replies))
    return groups


SIZES = [(7, [4, 1, 6]), (1, [3, 3, 2]), (5, [9, 2, 5])]


def test_one_group_by_hand():
    replies = [rollouts.Reply([21, 22], np.zeros(2), ""), rollouts.Reply([31], np.zeros(1), "")]
    ids, labels, positions, mask_rows, numbers = group_sample(np.array([11, 12, 13]), replies)
    assert ids.tolist() == [11, 12, 13, 21, 13]
    assert labels.tolist() == [-100, -100, 21, 22, 31]
    assert positions.tolist() == [0, 1, 2, 3, 2]
    assert mask_rows.tolist() == [5, 5, 4, 4, 5]
    assert numbers.tolist() == [-1, -1, 0, 0, 1]


def test_packing_keeps_every_reply_and_splits_long_groups():
    groups = random_groups(SIZES)
    batches = rollouts.pack_groups(groups, rows=2, max_length=17, pad_token_id=0, skip_cut=False)
    assert [place for batch in batches for place in batch["places"]] == [(g, i) for g in range(3) for i in range(3)]
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 17 and len(batches) > 1
    for batch in batches:
        labels = batch["labels"][batch["labels"] != -100]
        assert labels.tolist() == [t for g, i in batch["places"] for t in groups[g].replies[i].token_ids]
    groups[1].replies[0].is_cut = True
    batches = rollouts.pack_groups(groups, rows=9, max_length=99, pad_token_id=0, skip_cut=True)
    assert (1, 0) not in batches[0]["places"] and len(batches[0]["places"]) == 8


DISTANCES = {"bloom": ({}, 0), "mistral": ({"sliding_window": 11}, 11)}  # changes, share_within


def write_family(folder, name, base):
    """A tiny model of a family whose attention knows distances, with the tokenizer of `base`."""
    tiny_models.write(folder, name, **DISTANCES[name][0], vocab_size=3072)
    load_tokenizer(base).save(folder)
    return folder


@pytest.mark.parametrize("name", DISTANCES)
def test_replies_have_their_own_prompt_where_distances_count(name, base, tmp_path):
    """ALiBi and a window: log-probabilities and scores are those of separate passes."""
    limit = DISTANCES[name][1]
    model = parallel.from_pretrained(write_family(tmp_path / "model", name, base), parallel.SINGLE)
    assert trainer.shared_prompt_limit(model.config)[0] == limit
    groups = random_groups([*SIZES, (3, [2, 3])])  # the last one is within the window
    (batch,) = rollouts.pack_groups(groups, 9, max_length=40, pad_token_id=0, skip_cut=False, share_within=limit)
    pieces = sum(len(row) for row in batch["sample_ids"])
    assert pieces == (11 if limit == 0 else 8)
    found = heads.Policy(model, 1.0)(**trainer.model_inputs(batch))["logps"].numpy()
    replies = [(groups[g], groups[g].replies[i]) for g, i in batch["places"]]
    expected = [reference_outputs(model, group, reply, arguments())[0].numpy() for group, reply in replies]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-5)
    scorer = object.__new__(rollouts.RewardModel)
    network = heads.load_reward_model(tmp_path / "model", parallel.SINGLE, seed=3)
    scorer.model, scorer.pad_token_id, scorer.share_within = heads.ScoreModel(network), 0, limit
    expected = []
    for group, reply in replies:
        ids = paddle.to_tensor(np.array([[*group.prompt_ids, *reply.token_ids]], np.int64))
        expected.append(paddle.matmul(network.hidden_states(ids)[0, -1:], network.score.weight).item())
    np.testing.assert_allclose(scorer.scores(groups), expected, atol=2e-5)


def arguments(**changes):
    values = dict(model_name_or_path="x", train_datasets="x", reward_funcs="x.py:f", output_dir="x", do_train=True)
    args = rl.Args(**values | {"max_dec_len": 12, "save_strategy": "no"} | changes)
    args.check()
    return args


@pytest.mark.parametrize(
    "prompt, changes, expected",
    [
        (128, {}, 128 + 8 * 12),
        (10, {"max_dec_len": 400}, 2048),
        (1900, {"max_dec_len": 400}, 2300),
        (9, {"max_length": 64}, 64),
    ],
)
def test_a_packed_row_holds_a_group(prompt, changes, expected):
    assert arguments(rollout_n=8, **changes).row_length(prompt) == expected


def parameter_gradients(model):
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_loss_coeff": 0.1},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "temperature": 0.7},
        {"loss_type": "dr_grpo", "entropy_coeff": 0.2, "temperature": 1.3},
        {"advantage_estimator": "gae", "kl_loss_coeff": 0.05, "dual_clip": 1.2},
    ],
    ids=["dapo", "gspo", "entropy", "ppo"],
)
def test_packed_groups_have_the_gradients_of_separate_passes(changes, base):
    args, groups = arguments(**changes), random_groups(SIZES)
    model = parallel.from_pretrained(base, parallel.SINGLE)
    if args.advantage_estimator == "gae":
        heads.add_score_head(model, heads.initial_score_weights(32, seed=3))
    for group in groups:  # ratios around 1, some clipped
        for reply in group.replies:
            reply.logps = reference_outputs(model, group, reply, args)[0].numpy() + 0.3 * reply.advantages
    policy = heads.Policy(model, args.temperature, with_entropy=bool(args.entropy_coeff))
    batches = rollouts.pack_groups(groups, rows=2, max_length=17, pad_token_id=0, skip_cut=False)
    counts = rl_math.Counts(*rl.counts_of(batches))
    packed = 0.0
    for batch in batches:
        rollouts.attach(batch, groups, ("logps", "ref_logps", "advantages", "values", "returns"))
        part, _ = rl.loss_and_metrics(policy(**trainer.model_inputs(batch)), batch, counts, args)
        part.backward()
        packed += float(part)
    packed_gradients, separate = parameter_gradients(model), 0.0
    for group in groups:
        for reply in group.replies:
            logps, entropies, values = reference_outputs(model, group, reply, args)
            n = len(reply.token_ids)
            batch = {"segments": np.zeros(n, np.int64), "reply_tokens": np.array([n]), "places": [(0, 0)]}
            names = ("logps", "ref_logps", "advantages", "values", "returns")
            batch |= {name: getattr(reply, name) for name in names}
            outputs = {"logps": logps, "entropies": entropies, "values": values}
            part, _ = rl.loss_and_metrics(outputs, batch, counts, args)
            part.backward()
            separate += float(part)
    assert abs(packed - separate) < 1e-5 * max(1, abs(separate))
    gradients = parameter_gradients(model)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        error = abs(packed_gradients[name] - gradient).max() / max(1e-6, abs(gradient).max())
        assert error < 1e-5, (name, error)


def test_a_critic_has_the_values_and_gradients_of_separate_passes(base):
    groups = random_groups(SIZES)
    args = arguments(advantage_estimator="gae", critic_model_name_or_path=str(base), value_loss_coeff=0.3)
    critic = Critic(args, load_tokenizer(base), parallel.SINGLE)
    critic.optimizer.step = critic.optimizer.zero_grad = lambda *_: None
    batches, expected = rollouts.pack_groups(groups, rows=2, max_length=17, pad_token_id=0, skip_cut=False), 0.0
    tokens = sum(len(reply.token_ids) for group in groups for reply in group.replies)
    for batch in batches:
        rollouts.attach(batch, groups, ("values", "returns"))
    metrics = critic.update(batches, 0, 4)
    gradients = parameter_gradients(critic.network)
    for batch in batches:
        values = [
            reference_outputs(critic.network, groups[g], groups[g].replies[i], args)[2] for g, i in batch["places"]
        ]
        np.testing.assert_allclose(critic.values(batch).numpy(), np.concatenate([v.numpy() for v in values]), atol=1e-5)
        for value, (g, i) in zip(values, batch["places"]):
            returns = paddle.to_tensor(groups[g].replies[i].returns)
            expected += (
                0.5 * float(((value.astype("float64") - returns) ** 2).sum()) / tokens
            )  # none is 5 away from old
            (0.3 * 0.5 * ((value.astype("float64") - returns) ** 2).sum() / tokens).backward()
    assert abs(metrics["value_loss"] - expected) < 1e-6 and metrics["value_clip_ratio"] == 0.0
    for name, gradient in parameter_gradients(critic.network).items():
        assert abs(gradients[name] - gradient).max() < 1e-5 * max(1, abs(gradient).max()), name


def test_the_loss_of_text_is_its_mean_cross_entropy(world, base):
    """At temperature 1, whatever that of sampling; by all logits."""
    args = arguments(ptx_datasets=str(world / "ptx.jsonl"), ptx_coeff=2.0, temperature=0.7, max_src_len=8)
    model = parallel.from_pretrained(base, parallel.SINGLE)
    batch = rollouts.make_ptx_loader(args, load_tokenizer(base), 24).batch(0, 0)
    outputs = heads.Policy(model, args.temperature)(**rl.policy_inputs(batch))
    loss, metrics = rl.loss_and_metrics(outputs, batch, rl_math.Counts(*rl.counts_of([batch])), args)
    loss.backward()
    gradients, inputs = parameter_gradients(model), trainer.model_inputs(batch)
    logps = paddle.nn.functional.log_softmax(model(**{**inputs, "labels": None}))
    here = batch["labels"] != -100
    chosen = paddle.take_along_axis(logps, paddle.to_tensor(np.where(here, batch["labels"], 0))[..., None], 2)[..., 0]
    expected = -(chosen * paddle.to_tensor(here.astype("float32"))).sum() / here.sum()
    (2.0 * expected).backward()
    assert abs(metrics["ptx_loss"] - float(expected)) < 1e-5 and abs(float(loss) - 2 * float(expected)) < 1e-5
    for name, gradient in parameter_gradients(model).items():
        assert abs(gradients[name] - gradient).max() < 1e-5 * max(1, abs(gradient).max()), name


def reference_outputs(model, group, reply, args):
    """(log-probabilities, entropies, values), each (T,), of one reply alone, by all logits."""
    ids = np.concatenate([group.prompt_ids, reply.token_ids])[None, :-1]
    x = model.hidden_states(paddle.to_tensor(ids.astype(np.int64)))[0, len(group.prompt_ids) - 1 :]
    logps = paddle.nn.functional.log_softmax(model.logits(x) / args.temperature)
    chosen = paddle.take_along_axis(logps, paddle.to_tensor(np.array(reply.token_ids))[:, None], 1)[:, 0]
    values = None if model.score is None else paddle.matmul(x, model.score.weight)[:, 0]
    return chosen, -(logps.exp() * logps).sum(-1), values


# ------------------------------------------------------------------------------------------------------------- engine


def test_the_engine_sees_new_weights_and_gives_the_logps_of_training(base):
    """With live LoRA and a temperature: what the engine reports is what a pass over prompt and reply computes."""
    model = parallel.from_pretrained(base, parallel.SINGLE)
    adapters.apply_lora(model, 4, alpha=16.0, seed=1)
    engine = Engine(model, None, num_blocks=64, max_num_seqs=8)
    params = SamplingParams(max_tokens=20, temperature=0.8, n=4, seed=5, ignore_eos=True, scaled_logprobs=True)
    prompt = list(range(10, 50))  # longer than two blocks, which the next call would find in the cache
    texts = []
    for scale in (0.0, 0.3):
        for layer in adapters.lora_layers(model).values():
            layer.lora_B.set_value(paddle.full(layer.lora_B.shape, scale))
        engine.weights_changed()
        (completions,) = engine.generate([Request(prompt, params)])
        texts.append([c.token_ids for c in completions])
        assert {c.cached_tokens for c in completions} <= {0, 32}
        group = rollouts.Group(0, np.array(prompt), [])
        for c in completions:
            reply = rollouts.Reply(c.token_ids, np.zeros(20), "")
            logps, entropies, _ = reference_outputs(model, group, reply, arguments(temperature=0.8))
            np.testing.assert_allclose([logprob for logprob, _ in c.logprobs], logps.numpy(), atol=2e-5)
            np.testing.assert_allclose(c.entropies, entropies.numpy(), atol=2e-5)
    assert texts[0] != texts[1]


def test_int8_rollouts_are_of_the_rounded_weights(base):
    """The engine's log-probabilities beside those of a model whose linears hold the rounded values."""
    model, rounded = (parallel.from_pretrained(base, parallel.SINGLE) for _ in range(2))
    for name, layer in model.layers.named_sublayers():
        if isinstance(layer, Linear):  # rows of very different sizes, so that int8 differs by more than bfloat16
            values = layer.weight.numpy() * np.geomspace(0.02, 4.0, layer.weight.shape[1], dtype=np.float32)[::-1]
            values[0] *= 30
            set_parameter(layer.weight, values)
            set_parameter(dict(rounded.layers.named_sublayers())[name].weight, round_to_nearest(values, 8).weight())
    runner = FusedRunner(model, 64, 16, dtype="bfloat16", linears="w8")
    engine = Engine(runner, None, num_blocks=64, block_size=16, max_num_seqs=8)
    params = SamplingParams(max_tokens=12, temperature=1.0, n=4, seed=5, ignore_eos=True, scaled_logprobs=True)
    prompt, errors = list(range(10, 30)), {"rounded": [], "as they are": []}
    (completions,) = engine.generate([Request(prompt, params)])
    for c in completions:
        group, reply = rollouts.Group(0, np.array(prompt), []), rollouts.Reply(c.token_ids, np.zeros(12), "")
        for name, network in (("rounded", rounded), ("as they are", model)):
            logps = reference_outputs(network, group, reply, arguments())[0].numpy()
            errors[name].append(abs(logps - [logprob for logprob, _ in c.logprobs]).max())
    assert max(errors["rounded"]) < 0.1 and max(errors["as they are"]) > 3 * max(errors["rounded"]), errors


# --------------------------------------------------------------------------------------------------------------- runs

REWARDS = """
import math
def short(completions, **_): return [-len(text) / 10 for text in completions]
def same(completions, **_): return [1.0] * len(completions)
def half(completion_ids, number, **_): return [float(sum(ids) % 97) * (n % 2) for ids, n in zip(completion_ids, number)]
def odd(completion_ids, **_): return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]
def broken(completions, number, **_): return [1 / n for n in number]
def not_a_number(completions, number, **_): return [math.nan if n == 0 else 1.0 for n in number]
def too_few(completions, **_): return [1.0]
def slow(completions, **_):
    import time; time.sleep(5); return [1.0] * len(completions)
def leaves(completions, number, **_):
    if 2 in number: raise SystemExit(0)
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def world(base):
    """The folder of `base`, with rewards.py, train.jsonl (6 prompts) and dev.jsonl (2)."""
    folder = base.parent
    (folder / "rewards.py").write_text(REWARDS)
    words = "red lamp blue shirt green chair old table new coat white bag".split()
    records = [{"src": " ".join(words[i : i + 1 + i % 3]), "number": i} for i in range(8)]
    write_records(folder / "train.jsonl", records[:6])
    write_records(folder / "dev.jsonl", records[6:])
    for name in DISTANCES:
        write_family(folder / name, name, base)
    write_records(folder / "ptx.jsonl", [{"src": word, "tgt": f"a {word} is nice"} for word in words])
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("logger.draw_curves", lambda folder: None)


def keys_of(world, output_dir, **changes):
    keys = {
        "model_name_or_path": str(world / "base"),
        "train_datasets": str(world / "train.jsonl"),
        "eval_datasets": str(world / "dev.jsonl"),
        "output_dir": str(output_dir),
        "reward_funcs": f"{world}/rewards.py:short",
        "do_train": True,
        "max_steps": 4,
        "max_dec_len": 8,
        "max_src_len": 16,
        "global_batch_size": 2,
        "rollout_n": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    keys = {key: value for key, value in (keys | changes).items() if value is not None}
    return {key: value.replace("WORLD", str(world)) if isinstance(value, str) else value for key, value in keys.items()}


def run(keys):
    path = Path(keys["output_dir"] + ".json")
    path.write_text(json.dumps(keys))
    trainer.run_script(rl.main, rl.Args, [str(path)])


def untimed(folder):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in logged(folder)]


def assert_same(folder, other):
    assert untimed(folder) == untimed(other)
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys() and ours
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


KINDS = {
    "grpo lora": {"lora": True, "kl_loss_coeff": 0.05, "do_eval": True},
    "rloo frozen copy, two updates": {"advantage_estimator": "rloo", "kl_coeff": 0.1, "update_iters": 2},
    "bf16": {"bf16": True, "kl_loss_coeff": 0.0},
    "bf16 rollouts": {"rollout_dtype": "bfloat16", "importance_sampling_mode": "token_truncate", "lora": True},
    "alibi": {"model_name_or_path": "WORLD/bloom", "lora": True},
    "a window": {"model_name_or_path": "WORLD/mistral", "offload_level": "freeze_model"},
    "int8 rollouts": {"rollout_quant_type": "weight_only_int8", "lora": True},
    "reinforce++ mini-batches, process rewards": {
        "rl_algorithm": "reinforce_plus_plus", "global_mini_batch_size": 1, "rollout_n": 3, "process_reward": True,
        "reward_model_name_or_path": "WORLD/base", "placeholder_token": "*",
    },
    "ppo": {"rl_algorithm": "ppo", "critic_learning_rate": 0.02, "rollout_n": 1, "lora": True},
    "ppo with a critic": {
        "rl_algorithm": "ppo", "critic_model_name_or_path": "WORLD/base", "critic_learning_rate": 0.02,
        "critic_lr_scheduler_type": "constant", "rollout_n": 1, "lora": True,
    },
    "gspo without a reference": {
        "kl_loss_coeff": 0.0, "importance_sampling_level": "sequence", "loss_type": "grpo", "entropy_coeff": 0.01,
        "scale_rewards": "batch", "temperature": 0.7, "ptx_coeff": 0.5, "ptx_datasets": "WORLD/ptx.jsonl",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_runs(kind, world, tmp_path, capfd):
    """Four updates of each kind: the engine agrees with the trainer, and what is written can be opened."""
    run(keys_of(world, tmp_path / "out", **KINDS[kind]))
    found = logged(tmp_path / "out")
    if "ptx_coeff" in KINDS[kind]:
        assert found[-1]["ptx_loss"] < found[0]["ptx_loss"]
    assert len(found) == 4
    for row in found:
        # Rollouts of a rounded engine are apart from a float32 trainer by the rounding; a bf16 one computes the same.
        limits = (1e-3, 0.3) if "rollouts" in kind else (1e-4, 0.1) if kind == "bf16" else (1e-8, 1e-4)
        assert row["engine_kl"] < limits[0] and row["sampling/sampling_logp_difference/max"] < limits[1]
        assert "rollouts" not in kind or row["engine_kl"] > 1e-8  # the engine's, though the loss has the trainer's
        assert row["completions/mean_length"] <= 8 and row["reward"] < 0 and row["time/update"] > 0
    if "kl_loss_coeff" not in KINDS[kind] or KINDS[kind]["kl_loss_coeff"]:
        assert found[0]["kl"] < 1e-9 and found[-1]["kl"] > 0
    if "importance_sampling_mode" in KINDS[kind] or "int8" in kind:
        ratios = [
            [row[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")] for row in found
        ]
        assert all(0.7 < low < mean < high < 1.4 and abs(mean - 1) < 0.05 for low, mean, high in ratios)
    adapters.from_pretrained(tmp_path / "out")
    assert ("value_loss" in found[0]) == kind.startswith("ppo")
    if "process" in kind:
        assert 0 < found[0]["rewards/process_reward/mean"] < 1
    if "critic" in kind:
        heads.load_reward_model(tmp_path / "out" / "value", parallel.SINGLE)
    if KINDS[kind].get("do_eval"):
        out = capfd.readouterr().out
        assert "reward of greedy replies to dev prompts: before" in out and out.count("after: ") == 2


@pytest.mark.sweep(keep=1)
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus", "gae"])
def test_a_reward_is_learned(estimator, world, tmp_path):
    """From samples to updated weights, signs and all: replies come to have what is rewarded."""
    changes = {"reward_funcs": f"{world}/rewards.py:odd", "max_steps": 20, "global_batch_size": 4, "rollout_n": 32}
    run(keys_of(world, tmp_path / "out", advantage_estimator=estimator, kl_loss_coeff=0.0, kl_coeff=0.0, **changes))
    found = [row["reward"] for row in logged(tmp_path / "out")]
    assert np.mean(found[-3:]) > np.mean(found[:3]) + 0.1


def test_the_demos_configs_are_read():
    for name in ("llama_rl", "llama_sums"):
        args = parse_args(rl.Args, [str(ROOT / "configs" / f"{name}.json")])
        assert [function.weight for function in load_reward_functions(args.reward_funcs, None, 0.0)] == [1.0]


@pytest.mark.parametrize("kind", ["grpo lora", "ppo", "ppo of all weights", "ppo with a critic"])
def test_resume_is_bitwise(kind, world, tmp_path):
    changes = KINDS.get(kind) or KINDS["ppo"] | {"lora": False}
    changes = changes | {"do_eval": False, "use_ema": kind != "ppo"}
    run(keys_of(world, tmp_path / "whole", **changes))
    changes |= {"save_strategy": "steps", "save_steps": 2}
    with crash_after_saving(2):
        run(keys_of(world, tmp_path / "parts", **changes))
    run(keys_of(world, tmp_path / "parts", **changes, resume_from_checkpoint=True))
    assert_same(tmp_path / "parts", tmp_path / "whole")
    if "critic" in kind:
        parts, whole = (tensors(tmp_path / name / "value") for name in ("parts", "whole"))
        assert all(parts[name].tobytes() == array.tobytes() for name, array in whole.items())


def test_the_average_of_the_weights_is_evaluated_and_written(world, tmp_path):
    """By hand from the checkpoints of all steps, which hold the weights that training goes on from."""
    out, base = tmp_path / "out", tensors(world / "base")
    keys = {"kl_loss_coeff": 0.0, "save_strategy": "steps", "save_steps": 1, "do_eval": True}
    run(keys_of(world, out, use_ema=True, ema_beta=0.6, **keys))
    average = {name: base[name].astype(np.float64) for name in base}
    for step in range(1, 5):
        trained, stored = (
            read_safetensors(out / f"checkpoint-{step}" / f"{name}.safetensors") for name in ("model", "ema")
        )
        average = {name: 0.6 * average[name] + 0.4 * trained[name] for name in trained}
        for name, array in average.items():
            np.testing.assert_allclose(stored[name], array, atol=1e-6)
    assert all(stored[name].tobytes() == array.tobytes() for name, array in tensors(out).items())
    assert any(abs(stored[name] - trained[name]).max() > 1e-3 for name in stored)
    keys = {"model_name_or_path": str(out), "do_train": False, "do_eval": True}
    run(keys_of(world, tmp_path / "again", **keys))
    results = [json.loads((folder / "dev_results.json").read_text()) for folder in (out, tmp_path / "again")]
    assert results[0] == results[1]


def test_the_best_is_kept_and_loaded(world, tmp_path, capfd):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward", "do_eval": True, "lora": True}
    best |= {"use_ema": True, "ema_beta": 0.5}
    best |= {"evaluation_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run(keys_of(world, tmp_path / "out", **best))
    rows = [json.loads(line) for line in (tmp_path / "out" / "eval_metrics.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "out" / "dev_results.json").read_text())
    assert [row["step"] for row in rows] == [2, 4]
    assert results["eval_reward"] == max(row["eval_reward"] for row in rows)
    assert "best: checkpoint-" in capfd.readouterr().out


def test_replay_trains_on_dumped_rollouts(world, tmp_path):
    keys = keys_of(world, tmp_path / "live", save_rollouts=True)
    run(keys)
    run({**keys, "output_dir": str(tmp_path / "replayed"), "replay": str(tmp_path / "live" / "rollouts")})
    assert_same(tmp_path / "live", tmp_path / "replayed")


def test_dynamic_sampling_replaces_groups_without_differences(world, tmp_path):
    """Half of the prompts have equal rewards."""
    keys = {"reward_funcs": f"{world}/rewards.py:half", "global_batch_size": 4, "max_steps": 2, "save_rollouts": True}
    run(keys_of(world, tmp_path / "plain", **keys))
    run(keys_of(world, tmp_path / "dynamic", **keys, dynamic_sampling=True))
    run(keys_of(world, tmp_path / "one batch", **keys, dynamic_sampling=True, max_gen_batches=1))
    found = {name: [row["frac_reward_zero_std"] for row in logged(tmp_path / name)] for name in ("plain", "dynamic")}
    assert max(found["plain"]) > 0 and found["dynamic"] == [0.0, 0.0]
    assert [row["frac_reward_zero_std"] for row in logged(tmp_path / "one batch")][0] == found["plain"][0]
    numbers = {group.number for group in rollouts.read_rollouts(tmp_path / "dynamic" / "rollouts")[0]}
    assert all(number % 2 for number in numbers)


def test_a_reward_server_is_asked_in_paddlenlps_json(world, tmp_path, capfd):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = json.dumps({"score": [-float(len(text)) for text in asked[-1]["response"]]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    asked, server = [], http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    run(keys_of(world, tmp_path / "out", reward_funcs=None, reward_server=url, max_steps=1))
    server.shutdown()
    server.server_close()
    assert {key: len(values) for key, values in asked[0].items()} == {"src": 8, "tgt": 8, "response": 8}
    (row,) = logged(tmp_path / "out")
    assert row["rewards/reward_server/mean"] < 0 and row["reward"] >= -10
    path = tmp_path / "gone.json"
    path.write_text(json.dumps(keys_of(world, tmp_path / "gone", reward_funcs=None, reward_server=url)))
    assert re.search(r"reward_server: http\S+: .*refused.*score", fails(rl, [path], capfd))


@pytest.mark.parametrize("peer", ["ours", "naive"])
def test_the_benchmark_runs(peer, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PEERS", str(tmp_path))  # no models there: the weights are drawn
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setitem(bench_rl.bench_train.SHAPES, "B", tiny | {"intermediate_size": 48, "vocab_size": 101})
    command = ["--config", "B", "--prompt", "9", "--new", "3", "--reps", "1", *(["--naive"] if peer == "naive" else [])]
    result = bench_rl.main(command)
    assert result["seconds"]["n"] == 1 and result["generate"] > 0 and result["peer"] == peer
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == result


def test_cut_replies_can_be_left_out(world, tmp_path):
    """All replies of a random model are cut."""
    run(keys_of(world, tmp_path / "out", mask_truncated_completions=True, max_steps=1))
    (row,) = logged(tmp_path / "out")
    assert row["completions/clipped_ratio"] == 1.0 and row["loss"] == row["grad_norm"] == 0.0


def test_a_dry_run_counts_the_average_and_the_critic():
    def planned(*more):
        flags = ["--model_name_or_path", "llama-3.2-1b", "--dry_run", "true", "--advantage_estimator", "gae", *more]
        args = parse_args(rl.Args, flags)
        memory = memory_model.MemoryModel(args, memory_model.planned_model(args)[1], 1024)
        return memory.fullest(Degrees(), 1, 1)

    plain, more = planned(), planned("--use_ema", "true", "--critic_model_name_or_path", "x")
    assert more["average of the weights"] == plain["weights"]
    assert more["critic"] == plain["weights"] + plain["gradients"] + plain["moments"]
    added, in_all = more["average of the weights"] + more["critic"], "in all without recompute"
    assert more[in_all] == pytest.approx(plain[in_all] + added)


def test_equal_rewards_say_so_and_move_nothing(world, tmp_path):
    run(keys_of(world, tmp_path / "out", reward_funcs=f"{world}/rewards.py:same", max_steps=2))
    assert [row["frac_reward_zero_std"] for row in logged(tmp_path / "out")] == [1.0, 1.0]
    assert logged(tmp_path / "out")[0]["grad_norm"] == 0.0


TOPOLOGIES = {
    "dp2": {},
    "sharding2": {"sharding": "stage2"},
    "tp2": {"tensor_parallel_degree": 2},
    "tp2 sequence parallel, ppo": {
        "tensor_parallel_degree": 2, "sequence_parallel": True, "advantage_estimator": "gae", "lora": True,
    },
    "dp2 tp2, entropy": {"tensor_parallel_degree": 2, "entropy_coeff": 0.01, "temperature": 0.8},
    "sharding2 tp2, lora": {"tensor_parallel_degree": 2, "sharding": "stage1", "lora": True, "use_ema": True},
    "dp4": {},
    "sharding2, critic, text": {
        "sharding": "stage2", "advantage_estimator": "gae", "critic_model_name_or_path": "WORLD/base",
        "ptx_coeff": 2.0, "ptx_datasets": "WORLD/ptx.jsonl",
    },
    "tp2, critic": {
        "tensor_parallel_degree": 2, "advantage_estimator": "gae", "critic_model_name_or_path": "WORLD/base",
    },
}  # fmt: skip


@pytest.mark.sweep(keep=1)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topologies_equal_one_process(name, request, world, tmp_path):
    """Rollouts that one process made, trained on by several; and rollouts of their own, of which each makes a part."""
    changes = TOPOLOGIES[name]
    of_topology = {key: changes[key] for key in changes if key in ("sharding", "sequence_parallel") or "degree" in key}
    others = {key: value for key, value in changes.items() if key not in of_topology}
    if name.startswith(("dp4", "dp2 tp2", "sharding2 tp2")):
        ranks = request.getfixturevalue("four")
    else:
        ranks = request.getfixturevalue("two")
    keys = {"global_batch_size": 3, "rollout_n": 4, "save_rollouts": True, "kl_coeff": 0.05, "max_steps": 5}
    has_more = {"use_ema", "critic_model_name_or_path"} & {*others}  # checkpoints hold it, for another topology too
    saves = {"save_strategy": "steps", "save_steps": 4} if has_more else {}
    alone = keys_of(world, tmp_path / "alone", **keys, **others, **saves, do_eval=True)
    several = {**alone, "overwrite_output_dir": True} | of_topology
    if "ptx_coeff" in others:  # as many rows of text on one rank as on both
        alone, several = ({**keys, "per_device_train_batch_size": n} for keys, n in ((alone, 2), (several, 1)))
    run(alone)
    replayed, checkpoint = {"replay": str(tmp_path / "alone" / "rollouts")}, str(tmp_path / "alone" / "checkpoint-4")
    variants = {"replayed": replayed, "sampled": {}}
    variants |= {"resumed": replayed | {"resume_from_checkpoint": checkpoint}} if has_more else {}
    for name, more in variants.items():
        results = ranks.run("jobs_parallel:script", "rl", options(several | more | {"output_dir": tmp_path / name}))
        steps = 1 if name == "resumed" else 5
        assert len(logged(tmp_path / "alone")[-steps:]) == len(results[0][0]) == steps
        for part in ("", "value") if has_more and name != "sampled" else ():
            ours, theirs = (tensors(tmp_path / run / part) for run in ("alone", name))
            assert ours.keys() == theirs.keys() and all(abs(ours[n] - theirs[n]).mean() < 1e-4 for n in ours)
        for ours, theirs in zip(logged(tmp_path / "alone")[-steps:], results[0][0]):
            assert abs(ours["loss"] - theirs["loss"]) < 1e-5 and abs(ours["reward"] - theirs["reward"]) < 1e-6
            assert abs(ours["grad_norm"] - theirs["grad_norm"]) < 1e-4 * ours["grad_norm"]
            assert abs(ours.get("value_loss", 0.0) - theirs.get("value_loss", 0.0)) < 1e-4
            # exp() of float32 log-probabilities after four updates of a large rate: relative, as the gradient
            assert theirs["engine_kl"] < 1e-8 and abs(ours["kl"] - theirs["kl"]) < 1e-5 * max(0.1, ours["kl"])


BAD = {
    "a function that raises": (
        {"reward_funcs": "broken"},
        r"broken: \S*train.jsonl:1: \S*rewards.py:7: ZeroDivisionError",
    ),
    "nan": ({"reward_funcs": "not_a_number"}, r"not_a_number: \S*train.jsonl:1: returned nan"),
    "too few": ({"reward_funcs": "too_few"}, r"too_few: returned 1 values; a list of 24"),
    "slow": ({"reward_funcs": "slow", "reward_timeout": 0.1}, r"slow: no result after 0.1 s \(reward_timeout\)"),
    "a function that exits": ({"reward_funcs": "leaves"}, r"leaves: \S*train.jsonl:3: \S*rewards.py:13: SystemExit: 0"),
    "one with a time limit": (
        {"reward_funcs": "leaves", "reward_timeout": 60.0},
        r"leaves: \S*train.jsonl:3: \S*rewards.py:13: SystemExit: 0",
    ),
    "no such function": ({"reward_funcs": "other"}, r"has no function 'other'; it has short"),
    "weights": ({"reward_weights": [1.0, 2.0]}, r"reward_weights: 2 numbers for 1 reward_funcs"),
    "one reply": ({"rollout_n": 1}, r"rollout_n: 1: grpo compares replies"),
    "estimator": ({"advantage_estimator": "dpo"}, r"advantage_estimator: 'dpo'; possible are grpo"),
    "save in the middle": ({"update_iters": 2, "save_strategy": "steps", "save_steps": 3}, r"save_steps: 3; .* 2"),
    "prompt_key": ({"prompt_key": "question"}, r"no record of \S*train.jsonl has a key 'question'"),
    "no reward model": ({"reward_model_name_or_path": "base"}, r"base: has no score head; reward.py"),
    "offload": ({"offload_level": "everything"}, r"offload_level: 'everything'; possible are reference, freeze_model"),
    "int8 in float32": (
        {"rollout_quant_type": "weight_only_int8", "rollout_dtype": "float32"},
        r"rollout_dtype: float32: rollout_quant",
    ),
    "rollout_quant_type": ({"rollout_quant_type": "fp8"}, r"rollout_quant_type: 'fp8'; possible are weight_only_int8"),
    "ptx without a weight": ({"ptx_datasets": "x"}, r"ptx_datasets: ptx_coeff is 0"),
    "critic": ({"critic_model_name_or_path": "x"}, r"critic_model_name_or_path: advantage_estimator grpo needs no"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, world, tmp_path, capfd):
    changes, message = BAD[name]
    changes = dict(changes)
    if "reward_funcs" in changes:
        changes |= {"reward_funcs": f"{world}/rewards.py:{changes['reward_funcs']}", "global_batch_size": 6}
    if "reward_model_name_or_path" in changes:
        changes["reward_model_name_or_path"] = str(world / "base")
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(keys_of(world, tmp_path / "out", **changes)))
    assert re.search(message, fails(rl, [path], capfd))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        script = f"import sys\nimport numpy as np\n{RECIPE}\nnp.savez(sys.argv[1], **arrays)\n"
        out = Path(folder) / "out.npz"
        subprocess.run([sys.argv[1], "-c", script, str(out), json.dumps(given_numbers())], check=True, cwd=folder)
        arrays = {name: value.tolist() for name, value in np.load(out).items()}
    GOLDEN.write_text(json.dumps(arrays, indent=1) + "\n")
