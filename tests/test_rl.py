"""rl.py: advantages and losses beside TRL's, packed groups, rewards, and whole runs.

    python -m pytest tests/test_rl.py                                   # CPU, no torch, about 40 s
    python -m pytest tests/test_rl.py --hf-python PYTHON_WITH_TRL       # and TRL 1.16 computes the numbers again
    python tests/test_rl.py PYTHON_WITH_TRL                             # write tests/golden/rl_trl.json anew
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import paddle
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import kernels  # noqa: F401
import rl_math

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
                  advantages=numbers["advantages"], old_per_token_logps=numbers["old"], ref_per_token_logps=numbers["ref"],
                  num_items_in_batch=mask.sum())
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
arrays["rloo"] = run(
    rloo_trainer, "grouped_rewards = rewards.view(-1, num_generations)", "advantages = torch.nan_to_num",
    self=types.SimpleNamespace(normalize_advantages=False), rewards=rewards.reshape(-1), num_generations=G)
scores = torch.tensor(given["scores"], dtype=torch.float64)
for number, (margin, center) in enumerate(given["reward_cases"]):
    logits = scores.T.reshape(-1, 1).clone().requires_grad_()
    fake = types.SimpleNamespace(args=types.SimpleNamespace(center_rewards_coefficient=center), accelerator=accelerator,
                                 model=types.SimpleNamespace(training=False),
                                 _metrics=collections.defaultdict(lambda: collections.defaultdict(list)), _total_train_tokens=0)
    inputs = {"margin": torch.tensor(margin, dtype=torch.float64)} if margin else {}
    loss = RewardTrainer.compute_loss(fake, lambda **_: types.SimpleNamespace(logits=logits), inputs)
    loss.backward()
    arrays[f"reward loss {number}"], arrays[f"reward gradient {number}"] = loss.item(), logits.grad.reshape(2, -1).T.numpy()
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
    rewards = np.array(given["rewards"])
    for scale in ("group", "batch", "none"):
        out["grpo " + scale] = rl_math.group_advantages(rewards, scale).reshape(-1)
    out["rloo"] = rl_math.leave_one_out_advantages(rewards).reshape(-1)
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        script = f"import sys\nimport numpy as np\n{RECIPE}\nnp.savez(sys.argv[1], **arrays)\n"
        out = Path(folder) / "out.npz"
        subprocess.run([sys.argv[1], "-c", script, str(out), json.dumps(given_numbers())], check=True, cwd=folder)
        arrays = {name: value.tolist() for name, value in np.load(out).items()}
    GOLDEN.write_text(json.dumps(arrays, indent=1) + "\n")
