"""rl.py, killed: SIGKILL within a rollout, an update or a save; what goes on from it equals the uninterrupted run.

python -m pytest tests/test_rl_kills.py            # one kill, 5 s
python -m pytest tests/test_rl_kills.py --slow -s  # 20 kills each of GRPO and PPO, 75 s; how many of what
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_scripts import rows, tensors, write_model, write_records

import rl
import trainer
from checkpoint import incomplete, list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "update", "save")

# rl.py that says in which phase it is, one line when the phase begins, and "saved STEP" when a save has returned
REPORTING = """
import sys
import parallel, rl, trainer
from alignment.rollouts import RolloutMaker
from checkpoint import CheckpointManager

def report(owner, name, phase):
    whole = getattr(owner, name)
    def call(*args, **options):
        print(f"phase {phase}", flush=True)
        result = whole(*args, **options)
        if phase == "save":
            print(f"saved {args[1].step}", flush=True)
        return result
    setattr(owner, name, call)

report(RolloutMaker, "make", "rollout")
report(parallel, "forward_backward", "update")
report(CheckpointManager, "save", "save")
trainer.run_script(rl.main, rl.Args, sys.argv[1:])
"""

SHORT = "def short(completions, **_): return [-len(text) / 10 for text in completions]\n"
ALGORITHMS = {
    "grpo": {"kl_loss_coeff": 0.05, "rollout_n": 4},
    "grpo, nf4": {"kl_loss_coeff": 0.05, "rollout_n": 4, "weight_quantize_algo": "nf4"},
    "ppo": {"rl_algorithm": "ppo", "rollout_n": 2, "critic_learning_rate": 0.02},
}


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Arguments of a run of two updates a rollout that saves after each rollout and keeps one checkpoint."""
    monkeypatch.setattr("logger.draw_curves", lambda folder: None)
    write_model(tmp_path / "base", initializer_range=0.2)
    (tmp_path / "rewards.py").write_text(SHORT)
    write_records(tmp_path / "train.jsonl", [{"src": word} for word in "red lamp blue shirt green chair".split()])
    return {
        "model_name_or_path": str(tmp_path / "base"),
        "train_datasets": str(tmp_path / "train.jsonl"),
        "reward_funcs": f"{tmp_path}/rewards.py:short",
        "do_train": True,
        "max_dec_len": 8,
        "max_src_len": 16,
        "global_batch_size": 2,
        "update_iters": 2,
        "learning_rate": 0.01,
        "lora": True,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "resume_from_checkpoint": True,
        "disable_tqdm": True,
    }


def run(keys, folder):
    trainer.run_script(rl.main, rl.Args, [write_keys(keys, folder)])


def write_keys(keys, folder):
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({**keys, "output_dir": str(folder)}))
    return str(path)


def kill_within(phase, delay, keys, folder):
    """Start the run, kill it so many seconds after its second phase of this kind began. The last step that it had told
    to be saved, or None if it came to its end before."""
    command = [sys.executable, "-c", REPORTING, write_keys(keys, folder)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    begun, saved, lines = 0, 0, []
    for line in child.stdout:
        lines.append(line)
        begun += line == f"phase {phase}\n"
        if line.startswith("saved "):
            saved = int(line.split()[1])
        if begun == 2:
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
            break
    rest = child.stdout.read().splitlines()  # what it said before the signal came
    saved = max([saved, *(int(line.split()[1]) for line in rest if line.startswith("saved "))])
    assert child.wait() in (0, -signal.SIGKILL), "".join(lines[-20:])
    return None if child.returncode == 0 else saved


@pytest.mark.parametrize(
    "algorithm, kills",
    [
        ("grpo", 1),
        ("grpo, nf4", 1),
        pytest.param("grpo", 20, marks=pytest.mark.slow),
        pytest.param("ppo", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_equal_the_uninterrupted_one(algorithm, kills, keys, tmp_path):
    """No checkpoint that was told is lost; weights and log at the end are those of the whole run, bit for bit."""
    keys |= ALGORITHMS[algorithm] | {"max_steps": 6 if kills == 1 else 100}
    run(keys, tmp_path / "whole")
    generator, within, told = random.Random(kills), dict.fromkeys(PHASES, 0), 0
    for kill in range(kills):
        phase = PHASES[(kill + kills) % len(PHASES)]
        saved = kill_within(phase, generator.uniform(0, 0.05), keys, tmp_path / "parts")
        assert saved is not None, "the run ended before all kills"
        complete = [int(path.name[11:]) for path in list_checkpoints(tmp_path / "parts") if incomplete(path) is None]
        told, within[phase] = max(told, saved), within[phase] + 1
        assert max(complete, default=0) >= told, (complete, told)
    run(keys, tmp_path / "parts")
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    ours, theirs = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and ours
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    print(f"{algorithm}: {kills} kills {within}, 0 lost")


def untimed(folder):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows(folder)]
