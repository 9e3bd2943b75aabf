"""Scripts as a user runs them, mostly finetune.py and pretrain.py: every mode, resuming, kills, wrong input, configs.

    python -m pytest tests/test_scripts.py            # CPU, under a minute; -rP: the tables
    python -m pytest tests/test_scripts.py --slow     # and thirty kills instead of five

Runs are tiny: two layers, random weights, a few of the demo's records. They happen in this process, except where a
process has to die. A later run starts with the state that earlier ones left in Paddle and must give equal results.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bench_train import global_grad_norm
from conftest import ROOT, SHARED

import data
import dpo
import export
import finetune
import model
import pretrain
import quantize
import reward
import rl
import serve
import trainer
from adapters import from_pretrained, load_adapter, trainable_weights
from arguments import parse_args
from checkpoint import CheckpointManager, incomplete, list_checkpoints
from families import ModelConfig
from formats.tensor_files import read_safetensors, write_safetensors
from formats.tokenizer import load_tokenizer
from formats.weights import init_weights, save_pretrained

pytestmark = pytest.mark.sweep(keep=6)

DEMO = ROOT / "demo"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 3072,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "full": {},
    "lora": {"lora": True},
    "rslora_lora_plus": {"lora": True, "rslora": True, "lora_plus_scale": 4},
    "dora": {"lora": True, "dora": True},
    "pissa": {"lora": True, "pissa": True},
    "prefix": {"prefix_tuning": True, "num_prefix_tokens": 4},
    "prefix_projection": {"prefix_tuning": True, "num_prefix_tokens": 4, "prefix_projection": True},
}


# ---------------------------------------------------------------------------------------------- a tiny world


def write_model(folder, **changes):
    """A random model with the demo's tokenizer in a Hugging Face folder."""
    folder.mkdir()
    tiny = model.build(ModelConfig.from_dict({**CONFIG, **changes}))
    init_weights(tiny, seed=1)
    save_pretrained(tiny, folder)
    load_tokenizer(DEMO / "llama").save(folder)
    return folder


def options(keys):
    """Keys as the command line has them."""
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in keys.items()}
    return [part for key, value in values.items() for part in (f"--{key}", value)]


def write_records(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with base/ (model), sft/ (20 train, 6 dev, 4 test records), corpus.bin and corpus.idx. Read only."""
    world = tmp_path_factory.mktemp("world")
    write_model(world / "base")
    lines = (DEMO / "sft" / "train.json").read_text().splitlines()
    records = [
        record for record in map(json.loads, lines) if isinstance(record["src"], str) and len(record["tgt"]) < 160
    ][:30]
    for split, part in (("train", records[:20]), ("dev", records[20:26]), ("test", records[26:])):
        write_records(world / "sft" / f"{split}.json", part)
    write_records(
        world / "corpus.jsonl",
        [{"text": record["tgt"]} for record in map(json.loads, lines[:200]) if isinstance(record["tgt"], str)],
    )
    data.main(
        ["corpus", str(world / "corpus.jsonl"), "--tokenizer", str(DEMO / "llama"), "--output", str(world / "corpus")]
    )
    return world


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing and measuring take longer than the tiny runs themselves."""
    monkeypatch.setattr("logger.draw_curves", lambda folder: None)
    monkeypatch.setattr(trainer, "measure_matmul_peak", lambda: 1e11)


def keys_of(script, world, output_dir, **changes):
    keys = {
        "model_name_or_path": str(world / "base"),
        "output_dir": str(output_dir),
        "do_train": True,
        "max_steps": 5,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if script is finetune:
        keys |= {"dataset_name_or_path": str(world / "sft"), "src_length": 96, "max_length": 224, "max_new_tokens": 6}
    else:
        keys |= {"input_dir": str(world / "corpus"), "split": "80,10,10", "max_seq_length": 48}
    return keys | changes


def run(script, keys):
    """The script's run with these keys from a JSON file beside output_dir; SystemExit(2) for what a user can mend."""
    path = Path(str(keys.get("output_dir") or "run") + ".json")
    path.write_text(json.dumps(keys))
    trainer.run_script(script.main, script.Args, [str(path)])


def fails(script, argv, capfd):
    """The one line that this run ends with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        trainer.run_script(script.main, script.Args, list(map(str, argv)))
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and "Traceback" not in out + err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def rows(folder):
    """What a resumed run must repeat exactly: metrics.jsonl without its times."""
    timed = ("tokens_per_second", "eta_seconds", "peak_memory_gb", "mfu", "communication")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in found]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


def tensors(folder):
    """{name: array} of all weight files of a finished run."""
    return {
        name: array for path in sorted(folder.glob("*.safetensors")) for name, array in read_safetensors(path).items()
    }


def assert_same(folder, other):
    assert rows(folder) == rows(other)
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys() and ours
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def tree(folder):
    """{path: digest} of everything below a folder."""
    return {
        str(path): hashlib.sha1(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".run_lock"  # removed when this process ends
    }


def dev_loss(opened, world):
    """What an evaluation of finetune.py must report."""
    records = data.SFTDataset(world / "sft", load_tokenizer(world / "base"), 96, 224, "dev")
    return trainer.evaluate(opened, data.SFTLoader(records, 3, 224, shuffle=False))["eval_loss"]


# ---------------------------------------------------------------------------------------------- every mode


@pytest.mark.parametrize("kind", KINDS)
def test_finetune(kind, world, tmp_path, capfd):
    out = tmp_path / "out"
    extra = (
        {"eval_with_do_generation": True, "save_generation_output": True, "save_steps": 4, "save_strategy": "steps"}
        if kind == "lora"
        else {}
    )
    run(
        finetune,
        keys_of(
            finetune,
            world,
            out,
            do_eval=True,
            do_predict=True,
            per_device_train_batch_size=20,
            evaluation_strategy="steps",
            eval_steps=3,
            lr_scheduler_type="constant",
            **KINDS[kind],
            **extra,
        ),
    )
    found, printed = losses(out), capfd.readouterr().out
    assert len(found) == 5 and found[-1] < found[0] and abs(found[0] - math.log(3072)) < 0.3, (
        found
    )  # 20 records: one step is all of them

    opened = from_pretrained(out if kind == "full" else world / "base")
    if kind == "full":
        assert load_tokenizer(out).encode("dress") == load_tokenizer(world / "base").encode("dress")
    else:
        load_adapter(opened, out)
    reported = json.loads((out / "dev_results.json").read_text())
    assert dev_loss(opened, world) == pytest.approx(reported["eval_loss"], rel=1e-5)
    assert reported["eval_loss"] != pytest.approx(dev_loss(from_pretrained(world / "base"), world), rel=1e-5)

    evaluations = [json.loads(line)["step"] for line in (out / "eval_metrics.jsonl").read_text().splitlines()]
    assert evaluations == [3] and json.loads((out / "run_args.json").read_text())["max_steps"] == 5
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    asked = [json.loads(line)["src"] for line in (world / "sft" / "test.json").read_text().splitlines()]
    assert [row["src"] for row in predictions] == asked and all(isinstance(row["output"], str) for row in predictions)
    assert {"eval_loss", "eval_bleu4", "eval_rouge-l"} <= json.loads((out / "test_results.json").read_text()).keys()
    assert [len(re.findall(rf"^{word}: ", printed, re.M)) for word in ("prompt", "before", "after")] == [3, 3, 3]
    if kind == "lora":
        assert "eval_bleu4" in reported and len((out / "generated_output.json").read_text().splitlines()) == 6
        assert incomplete(out / "checkpoint-4") is None


def test_pretrain_from_scratch_and_continued(world, tmp_path, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    keys = {"do_eval": True, "do_predict": True, "per_device_train_batch_size": 16}
    run(pretrain, keys_of(pretrain, world, first, num_hidden_layers=3, mask_across_documents=True, max_steps=6, **keys))
    found = losses(first)
    assert len(found) == 6 and found[-1] < found[0] - 0.1
    assert "perplexity" in capfd.readouterr().out
    run(
        pretrain,
        keys_of(
            pretrain,
            world,
            second,
            model_name_or_path=str(first),
            continue_training=True,
            save_dtype="bfloat16",
            **keys,
        ),
    )
    assert losses(second)[0] < found[0] - 0.1 and losses(second)[-1] < found[-1]
    for out in (first, second):
        opened, tokenizer = from_pretrained(out), load_tokenizer(out)
        assert opened.config.num_hidden_layers == 3
        loader = data.CorpusLoader(
            world / "corpus", "80,10,10", "valid", None, 48, 8, 42, tokenizer.eos_token_id, out is first, shuffle=False
        )
        rel = 1e-5 if out is first else 5e-3  # rounded to bfloat16 after it was evaluated
        assert trainer.evaluate(opened, loader)["eval_loss"] == pytest.approx(
            json.loads((out / "dev_results.json").read_text())["eval_loss"], rel=rel
        )
        assert (out / "test_results.json").is_file()
    row = json.loads((first / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < row["mfu"] and row["tokens_per_second"] > 0


def test_curves_and_peak_for_real(world, tmp_path, monkeypatch, capfd):
    monkeypatch.undo()  # what `quick` leaves out
    run(pretrain, keys_of(pretrain, world, tmp_path / "out", max_steps=2))
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG" and "GFLOP/s" in capfd.readouterr().out


def test_evaluation_alone_of_a_saved_adapter(world, tmp_path):
    run(finetune, keys_of(finetune, world, tmp_path / "lora", do_eval=True, **KINDS["lora"]))
    before = tree(tmp_path / "lora")
    run(
        finetune,
        keys_of(
            finetune,
            world,
            tmp_path / "eval",
            do_train=False,
            do_eval=True,
            lora_path=str(tmp_path / "lora"),
            **KINDS["lora"],
        ),
    )
    found = [json.loads((tmp_path / name / "dev_results.json").read_text())["eval_loss"] for name in ("lora", "eval")]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and tree(tmp_path / "lora") == before


# ---------------------------------------------------------------------------------------------- what a newcomer sees


def next_command(printed):
    """(script, arguments) of the last line, which must be a command that runs as it stands."""
    words = shlex.split(printed.splitlines()[-1])
    assert words[:2] == ["next:", "python"] and (ROOT / words[2]).is_file(), words
    return words[2], words[3:]


@pytest.mark.parametrize("script", [pretrain, finetune], ids=lambda script: script.__name__)
def test_a_run_ends_with_the_next_command(script, world, tmp_path, monkeypatch, capfd):
    out = tmp_path / "an out"
    run(script, keys_of(script, world, out, max_steps=1))
    name, argv = next_command(capfd.readouterr().out)
    monkeypatch.chdir(ROOT)
    if script is finetune:
        assert name == "serve.py" and parse_args(serve.Args, argv).model_name_or_path == str(out)
    else:
        assert name == "finetune.py" and parse_args(finetune.Args, argv).model_name_or_path == str(out)
    run(script, keys_of(script, world, out, do_train=False, do_eval=True))
    assert "next:" not in capfd.readouterr().out  # nothing was made


@pytest.mark.parametrize("script", [pretrain, finetune], ids=lambda script: script.__name__)
def test_a_run_with_nothing_left_says_so(script, world, tmp_path, capfd):
    keys = keys_of(script, world, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2)
    run(script, keys)
    assert "nothing left" not in capfd.readouterr().out
    run(script, keys | {"resume_from_checkpoint": True})
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("nothing left to train")]
    assert lines == ["nothing left to train: step 2 of 2 is reached; raise max_steps or num_train_epochs"]


def test_conversations_are_shown_before_and_after_too(world, tmp_path, capfd):
    """Dev records whose src is a list of turns: their last turn is what the model answers."""
    own = tmp_path / "own"
    shutil.copytree(world, own)
    records = [{"src": ["red lamp"], "tgt": ["ten"]}, {"src": ["blue hat", "and why"], "tgt": ["coins", "so"]}]
    write_records(own / "sft" / "dev.json", records)
    run(finetune, keys_of(finetune, own, tmp_path / "out", max_steps=1, do_eval=True))
    printed = capfd.readouterr().out
    assert re.findall(r"^prompt: (.*)", printed, re.M) == ["red lamp", "(turn 2 of 2) and why"]
    assert [len(re.findall(rf"^{word}: ", printed, re.M)) for word in ("before", "after")] == [2, 2]


def test_the_console_shows_only_arguments_that_differ_from_their_defaults(world, tmp_path, capfd):
    out = tmp_path / "out"
    run(finetune, keys_of(finetune, world, out, max_steps=1))
    printed = capfd.readouterr().out
    shown = re.search(r"^arguments: (.*?)^step 1/1", printed, re.M | re.S)[1].split()
    keys = {word.partition("=")[0] for word in shown if "=" in word}
    assert {"output_dir", "learning_rate", "src_length"} <= keys and len(keys) < 20
    saved = json.loads((out / "run_args.json").read_text())
    defaults = {field.name: field.default for field in dataclasses.fields(finetune.Args)}
    assert keys < saved.keys() and not {key for key in keys if saved[key] == defaults[key]}


# ---------------------------------------------------------------------------------------------- resuming


class Stopped(Exception):
    """Stands for a crash."""


@contextlib.contextmanager
def crash_after_saving(step):
    real = CheckpointManager.save

    def save(self, state):
        real(self, state)
        if state.step == step:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(CheckpointManager, "save", save)
        yield


RESUMED = {
    "full": (finetune, {"gradient_accumulation_steps": 2}),
    "full_packed": (
        finetune,
        {
            "zero_padding": True,
            "greedy_zero_padding": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
        },
    ),
    "lora_dropout_neftune": (
        finetune,
        KINDS["lora"] | {"lora_dropout": 0.1, "neftune_noise_alpha": 5, "gradient_accumulation_steps": 2},
    ),
    "lora_dropout_recompute": (finetune, KINDS["lora"] | {"lora_dropout": 0.1, "recompute": True}),
    "dora": (finetune, KINDS["dora"]),
    "pissa": (finetune, KINDS["pissa"] | {"lora_plus_scale": 4}),
    "pissa_rslora": (finetune, KINDS["pissa"] | {"rslora": True, "lora_rank": 5}),
    "prefix": (finetune, KINDS["prefix"]),
    "prefix_projection": (finetune, KINDS["prefix_projection"] | {"gradient_accumulation_steps": 2}),
    "pretrain": (pretrain, {"gradient_accumulation_steps": 2, "mask_across_documents": True}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise(name, world, tmp_path, capfd):
    """Stopped in the middle of the first epoch and of the second, against one run without a stop."""
    script, extra = RESUMED[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"max_steps": 9, "per_device_train_batch_size": 3, "warmup_steps": 2, "weight_decay": 0.1} | extra
    run(script, keys_of(script, world, whole, **common))
    common |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    with crash_after_saving(2):
        run(script, keys_of(script, world, parts, **common))
    assert losses(parts) == losses(whole)[:2]
    for step in (6, None):
        with crash_after_saving(step) if step else contextlib.nullcontext():
            run(script, keys_of(script, world, parts, **common, resume_from_checkpoint=True))
    printed = capfd.readouterr().out
    assert f"resume: from {parts / 'checkpoint-2'}" in printed and f"resume: from {parts / 'checkpoint-6'}" in printed
    assert sorted(path.name for path in parts.glob("*checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert_same(parts, whole)


def test_early_stopping_ends_the_run_and_survives_resuming(world, tmp_path, capfd, monkeypatch):
    """The second of nine evaluations is the best; with patience 3 five are made, also in two parts."""
    curve = iter([])
    monkeypatch.setattr(trainer, "evaluate", lambda *args: {"eval_loss": next(curve)})
    found = [1.0, 0.9, 0.95, 0.91, 0.9, 0.8, 0.7, 0.6, 0.5]
    keys = {"do_eval": True, "evaluation_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    keys |= {"max_steps": 9, "load_best_model_at_end": True, "early_stopping_patience": 3, **KINDS["lora"]}
    curve = iter([*found, 0.3])
    run(finetune, keys_of(finetune, world, tmp_path / "whole", **keys))
    printed = capfd.readouterr().out
    assert "early stopping at step 5: 3 evaluations in a row without a better loss (best: 0.9)" in printed
    assert len(losses(tmp_path / "whole")) == 5 and "best: checkpoint-2" in printed
    curve = iter(found)
    with crash_after_saving(4):
        run(finetune, keys_of(finetune, world, tmp_path / "parts", **keys))
    curve = iter([*found[3:5], 0.3])  # the evaluation at step 4 is made again
    run(finetune, keys_of(finetune, world, tmp_path / "parts", resume_from_checkpoint=True, **keys))
    assert_same(tmp_path / "parts", tmp_path / "whole")
    state = json.loads((tmp_path / "parts" / "checkpoint-5" / "trainer_state.json").read_text())
    assert (state["early_stopping_counter"], state["early_stopping_best"]) == (
        2,
        0.9,
    )  # saved before step 5's evaluation


def test_arguments_that_a_checkpoint_overrides_are_said(world, tmp_path, capfd):
    out = tmp_path / "out"
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "do_eval": True, "evaluation_strategy": "steps"}
    keys |= {"eval_steps": 1, "load_best_model_at_end": True}
    run(finetune, keys_of(finetune, world, out, **keys))
    other = write_model(tmp_path / "other")
    again = keys_of(finetune, world, out, **keys | {"max_steps": 2}, resume_from_checkpoint=True)
    run(finetune, again | {"model_name_or_path": str(other), "metric_for_best_model": "accuracy"})
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("resume: ")]
    assert (
        f"resume: model_name_or_path: {str(other)!r} is not used: what is trained comes from {out}/checkpoint-1"
        in lines
    )
    assert "resume: metric_for_best_model has changed, so the best checkpoint so far is forgotten" in lines
    assert json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["best_metric"] <= 1  # an accuracy
    prefix = tmp_path / "prefix"
    run(finetune, keys_of(finetune, world, prefix, **keys, **KINDS["prefix"]))
    again = keys_of(finetune, world, prefix, **keys, **KINDS["prefix"], resume_from_checkpoint=True)
    with pytest.raises(SystemExit):
        run(finetune, again | {"prefix_projection": True})
    assert "prefix_projection: True; the prefix in" in capfd.readouterr().err


def test_the_first_line_is_short_and_a_wrong_target_names_the_linears(world, tmp_path, capfd):
    keys = keys_of(finetune, world, tmp_path / "out", max_steps=1, **KINDS["lora"])
    with pytest.raises(SystemExit):
        run(finetune, keys | {"lora_target_modules": "q_prj,v_proj"})
    out, err = capfd.readouterr()
    names = re.search(r"'q_prj' matches no linear layer; there are (.*)", err)[1].split(", ")
    assert {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"} <= {*names}
    assert len(out.splitlines()[0]) < 160 and out.startswith("device: ")
    run(finetune, keys | {"lora_target_modules": "q_proj v_proj"})
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["q_proj", "v_proj"]


def test_evaluations_between_do_not_change_a_resumed_run(world, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = KINDS["lora"] | {
        "lora_dropout": 0.1,
        "max_steps": 6,
        "do_eval": True,
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    run(finetune, keys_of(finetune, world, whole, **common))
    with crash_after_saving(4):  # saved, but not evaluated yet
        run(finetune, keys_of(finetune, world, parts, **common))
    run(finetune, keys_of(finetune, world, parts, **common, resume_from_checkpoint=True))
    assert_same(parts, whole)
    assert (parts / "eval_metrics.jsonl").read_text() == (whole / "eval_metrics.jsonl").read_text()
    assert (parts / "dev_results.json").read_text() == (whole / "dev_results.json").read_text()


# ---------------------------------------------------------------------------------------------- one step, other shapes


@pytest.fixture
def uneven(world, tmp_path):
    """A world whose four records have replies of very different lengths."""
    new = tmp_path / "uneven"
    new.mkdir()
    (new / "base").symlink_to(world / "base")
    words = (world / "corpus.jsonl").read_text().split()
    write_records(
        new / "sft" / "train.json", [{"src": f"say {n}", "tgt": " ".join(words[n : n + n])} for n in (1, 2, 9, 45)]
    )
    return new


def test_accumulating_4_x_1_equals_1_x_4(uneven, tmp_path):
    at_once, one_by_one = tmp_path / "1x4", tmp_path / "4x1"
    # Adam divides each gradient by its size, rounding errors of the smallest too: what differs grows with the rate.
    keys = {"max_steps": 2, "lr_scheduler_type": "constant", "learning_rate": 3e-4}
    run(finetune, keys_of(finetune, uneven, at_once, **keys))
    run(
        finetune,
        keys_of(finetune, uneven, one_by_one, per_device_train_batch_size=1, gradient_accumulation_steps=4, **keys),
    )
    ours, theirs = tensors(one_by_one), tensors(at_once)
    start = tensors(uneven / "base")
    assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) < 1e-6
    assert max(float(np.abs(ours[name] - start[name]).max()) for name in ours) > 3e-4
    assert losses(one_by_one) == pytest.approx(losses(at_once), abs=1e-6)

    # The run must follow the mean over tokens; the mean of the four samples' means is another gradient.
    tiny, tokenizer = from_pretrained(uneven / "base"), load_tokenizer(uneven / "base")
    loader = data.SFTLoader(data.SFTDataset(uneven / "sft", tokenizer, 96, 224), 1, 224, shuffle=False)
    batches = [loader.batch(0, i) for i in range(4)]
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert max(counts) > 10 * min(counts)
    found = {}
    for name, divisors in (("tokens", [sum(counts)] * 4), ("means", [4 * count for count in counts])):
        parts = [tiny(**trainer.model_inputs(batch)).sum() / divisor for batch, divisor in zip(batches, divisors)]
        sum(parts).backward()
        weights = trainable_weights(tiny)
        found[name] = float(sum(parts)), global_grad_norm(weights)
        for weight in weights:
            weight.parameter.clear_gradient(False)
    logged = rows(one_by_one)[0]
    assert found["tokens"] == pytest.approx((logged["loss"], logged["grad_norm"]), rel=1e-5)
    assert abs(found["means"][1] / logged["grad_norm"] - 1) > 0.05 and abs(found["means"][0] - logged["loss"]) > 1e-3


@pytest.mark.parametrize("kind", ["full", "lora", "prefix_projection"])
def test_packed_equals_padded(kind, world, tmp_path):
    """One step is the whole data, so that the same samples make it up."""
    keys = KINDS[kind] | {"max_steps": 3, "per_device_train_batch_size": 20, "lr_scheduler_type": "constant"}
    run(finetune, keys_of(finetune, world, tmp_path / "padded", **keys))
    run(finetune, keys_of(finetune, world, tmp_path / "packed", zero_padding=True, greedy_zero_padding=True, **keys))
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), abs=1e-5)
    ours, theirs = tensors(tmp_path / "packed"), tensors(tmp_path / "padded")
    assert rows(tmp_path / "packed")[0]["grad_norm"] == pytest.approx(
        rows(tmp_path / "padded")[0]["grad_norm"], rel=1e-5
    )
    assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) < 1e-3


@pytest.mark.parametrize("kind", ["full", "lora", "prefix"])
def test_recompute_changes_nothing(kind, world, tmp_path):
    keys = KINDS[kind] | {"neftune_noise_alpha": 5, "max_steps": 3} | ({"lora_dropout": 0.2} if kind == "lora" else {})
    for name in ("off", "on"):
        run(finetune, keys_of(finetune, world, tmp_path / name, recompute=name == "on", **keys))
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), abs=1e-6)
    assert rows(tmp_path / "on")[0]["grad_norm"] == pytest.approx(rows(tmp_path / "off")[0]["grad_norm"], rel=1e-5)


# ---------------------------------------------------------------------------------------------- the best checkpoint


@pytest.mark.parametrize("kind", ["full", "pissa", "prefix_projection"])
def test_the_best_is_kept_and_loaded(kind, world, tmp_path, monkeypatch, capfd):
    """Evaluations find 3, 1, 2, 4, 5: checkpoint-2 is the best, and one that evaluates as itself is what remains."""
    out, found, real = tmp_path / "out", iter([3.0, 1.0, 2.0, 4.0, 5.0]), trainer.evaluate
    monkeypatch.setattr(
        trainer, "evaluate", lambda *args: real(*args) | {"eval_loss": next(found, None) or real(*args)["eval_loss"]}
    )
    run(
        finetune,
        keys_of(
            finetune,
            world,
            out,
            do_eval=True,
            evaluation_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            **KINDS[kind],
        ),
    )
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    assert "best: checkpoint-2, loss 1.0000" in capfd.readouterr().out
    names = ["model.safetensors"] if kind == "full" else [path.name for path in out.glob("*.safetensors")]
    for name in names:
        assert (
            (out / name).read_bytes()
            == (out / "checkpoint-2" / name).read_bytes()
            != (out / "checkpoint-5" / name).read_bytes()
        )
    opened = from_pretrained(out if kind == "full" else world / "base")
    if kind != "full":
        load_adapter(opened, out)
    assert dev_loss(opened, world) == pytest.approx(
        json.loads((out / "dev_results.json").read_text())["eval_loss"], rel=1e-5
    )


def test_a_best_checkpoint_left_in_another_folder_is_forgotten(world, tmp_path, monkeypatch):
    first, second, real = tmp_path / "first", tmp_path / "second", trainer.evaluate
    found = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *args: real(*args) | {"eval_loss": next(found, 5.0)})
    keys = {
        "do_eval": True,
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "load_best_model_at_end": True,
    }
    with crash_after_saving(2):
        run(finetune, keys_of(finetune, world, first, **keys))
    run(finetune, keys_of(finetune, world, second, resume_from_checkpoint=str(first / "checkpoint-2"), **keys))
    assert (second / "model.safetensors").read_bytes() == (second / "checkpoint-3" / "model.safetensors").read_bytes()


def test_another_kind_of_run_leaves_nothing_of_the_old_one(world, tmp_path):
    run(
        finetune, keys_of(finetune, world, tmp_path / "out", max_steps=1, do_predict=True, **KINDS["prefix_projection"])
    )
    run(finetune, keys_of(finetune, world, tmp_path / "out", max_steps=1, overwrite_output_dir=True, **KINDS["prefix"]))
    run(finetune, keys_of(finetune, world, tmp_path / "fresh", max_steps=1, **KINDS["prefix"]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "fresh").iterdir()
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "adapter_model.safetensors"
    ).read_bytes()


# ---------------------------------------------------------------------------------------------- kill -9


def kill_while_saving(keys, kills, generator):
    """finetune.py in processes of its own, each killed at a random moment around a save; figures of what happened."""
    path, out = Path(keys["output_dir"] + ".json"), Path(keys["output_dir"])
    path.write_text(json.dumps(keys))
    in_save, steps = 0, []
    for _ in range(kills + 1):
        complete = [found for found in list_checkpoints(out) if incomplete(found) is None]
        last, stale = len(steps) == kills, {path.name for path in out.glob("tmp-checkpoint-*")}
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "finetune.py"), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not last:
            patience, skip = time.monotonic() + 100, generator.randrange(2)  # its first save or its second
            while process.poll() is None and time.monotonic() < patience:
                found = {path.name for path in out.glob("tmp-checkpoint-*")}
                stale &= found  # left by the process before, until this one takes them away
                fresh = [int(name[15:]) for name in found - stale if name[15:].isdecimal()]
                if any(step > (int(complete[0].name[11:]) if complete else 0) + skip for step in fresh):
                    break
                time.sleep(0.0005)
            time.sleep(generator.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        printed, errors = process.communicate(timeout=200)
        assert process.returncode == (0 if last else -signal.SIGKILL), errors
        if complete:
            named = re.search(r"resume: (\S+) was complete, but its run was killed before it got its name", printed)
            assert f"resume: from {named[1] if named else complete[0]}" in printed, printed
        in_save += any(out.glob("tmp-checkpoint-*"))
        steps.append(int(complete[0].name[11:]) if complete else 0)
    return {"kills": kills, "killed_with_a_half_folder": in_save, "resumed_from": steps[1:]}


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.sweep(keep=1)
def test_killed_runs_go_on_bitwise(kills, world, tmp_path):
    keys = KINDS["lora"] | {
        "lora_dropout": 0.1,
        "max_steps": 5 * kills + 10,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
    }
    keys = keys_of(finetune, world, tmp_path / "killed", **keys)
    figures = kill_while_saving(keys | {"resume_from_checkpoint": True}, kills, random.Random(kills))
    print(figures)
    assert kills < 30 or figures["killed_with_a_half_folder"] >= 10, figures
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(keys | {"output_dir": str(tmp_path / "whole"), "save_strategy": "no"}))
    subprocess.run([sys.executable, str(ROOT / "finetune.py"), str(path)], check=True, capture_output=True)
    assert_same(tmp_path / "killed", tmp_path / "whole")
    assert len(list_checkpoints(tmp_path / "killed")) == 2


# ---------------------------------------------------------------------------------------------- bad input


def instead(text):
    return lambda world, keys: text


def put(**changes):
    return lambda world, keys: keys.update(changes)


def data_text(text):
    """This train.json."""

    def change(world, keys):
        (world / "sft" / "train.json").write_text(text)

    return change


def model_tensors(edit):
    """The model's tensors after edit(tensors)."""

    def change(world, keys):
        found = read_safetensors(world / "base" / "model.safetensors")
        edit(found)
        write_safetensors(world / "base" / "model.safetensors", found)

    return change


def base_file(name, edit):
    """A file of the model's folder after edit(path)."""
    return lambda world, keys: edit(world / "base" / name)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def smaller_vocabulary(world, keys):
    shutil.rmtree(world / "base")
    write_model(world / "base", vocab_size=1000)


def malicious_pickle(world, keys):
    """pytorch_model.bin that makes a file when unpickled as Python does it."""
    import pickle
    import zipfile

    class Runs:
        def __reduce__(self):
            return exec, (f"open({str(world / 'ran')!r}, 'w')",)

    (world / "base" / "model.safetensors").unlink()
    with zipfile.ZipFile(world / "base" / "pytorch_model.bin", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"model.norm.weight": Runs()}, 2))
        archive.writestr("model/version", "3")


def too_long(world, keys):
    write_records(
        world / "sft" / "train.json", [{"src": "a", "tgt": "b", "context": {"system": "be brief " * 400}}] * 3
    )
    keys["chat_template"] = "llama2"


def cut_corpus(world, keys):
    for end in (".idx", ".bin"):
        shutil.copyfile(keys["input_dir"] + end, world / f"cut{end}")
    truncate(world / "cut.bin")
    keys["input_dir"] = str(world / "cut")


GOOD = '{"src": "a", "tgt": "b"}\n'
# name: (change(world, keys) -> None or the config file's text, what the line says); pretrain.py's say so
BAD = {
    "config_not_json": (instead('{"max_steps": 3,\n "do_train": }'), r"out\.json:2: not JSON: "),
    "config_duplicate_key": (
        instead('{"max_steps": 3,\n "max_steps": 4}'),
        r"out\.json:2: key 'max_steps' is given 2 times",
    ),
    "config_not_an_object": (instead("[1]"), "holds a list; an object is needed"),
    "config_unknown_key": (put(learning_rat=1e-4), "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    "config_wrong_type": (put(max_steps="many"), 'max_steps: "many" is the wrong type; a whole number is needed'),
    "config_no_data": (put(dataset_name_or_path=""), "dataset_name_or_path: missing"),
    "config_nothing_to_do": (put(do_train=False), "nothing to do"),
    "config_lora_and_prefix": (put(lora=True, prefix_tuning=True), "lora and prefix_tuning are both true"),
    "config_pissa_and_dora": (put(lora=True, pissa=True, dora=True), "pissa and dora are both true"),
    "config_pissa_without_lora": (put(pissa=True), "pissa needs lora: true"),
    "config_fp16_and_bf16": (put(fp16=True, bf16=True), "fp16 and bf16 are both true"),
    "config_no_room_for_a_reply": (put(src_length=224), "src_length 224 leaves no room"),
    "config_best_without_saves": (
        put(do_eval=True, evaluation_strategy="steps", load_best_model_at_end=True),
        "load_best_model_at_end needs save_strategy",
    ),
    "config_best_by_unknown_figure": (
        put(
            do_eval=True,
            evaluation_strategy="steps",
            save_strategy="steps",
            load_best_model_at_end=True,
            metric_for_best_model="bleu4",
        ),
        "metric_for_best_model: bleu4 needs eval_with_do_generation",
    ),
    "config_degrees": (
        put(tensor_parallel_degree=4, sharding_parallel_degree=2),
        r"tensor.* 4 .*= 8 processes, but this run has 1",
    ),
    "config_pretrain_degrees": (put(tensor_parallel_degree=2), "= 2 processes, but this run has 1"),
    "config_pretrain_no_steps": (put(max_steps=-1), "max_steps: missing"),
    "config_unmatched_target": (
        put(lora=True, lora_target_modules=["q_prj"]),
        "'q_prj' matches no linear layer; there are",
    ),
    "config_lora_rank": (put(lora=True, lora_rank=0), "lora_rank must be at least 1"),
    "config_no_prefix_tokens": (put(prefix_tuning=True, num_prefix_tokens=0), "num_prefix_tokens must be at least 1"),
    "config_adapter_not_there": (put(lora=True, lora_path="nowhere"), "nowhere/adapter_config.json: no such file"),
    "config_device": (put(device="warp"), "device: 'warp' is not in this Paddle"),
    "config_batch_too_large": (
        put(per_device_train_batch_size=64, dataloader_drop_last=True),
        "fewer than one batch of 64",
    ),
    "data_missing_folder": (put(dataset_name_or_path="nowhere"), "nowhere: no such file or folder"),
    "data_missing_file": (lambda world, keys: (world / "sft" / "train.json").unlink(), "none of train.json"),
    "data_dev_missing": (
        lambda world, keys: ((world / "sft" / "dev.json").unlink(), keys.update(do_eval=True)),
        "none of dev.json",
    ),
    "data_not_json": (data_text(GOOD + "{src: 1}\n"), r"train\.json:2: "),
    "data_missing_src": (data_text(GOOD + '{"tgt": "b"}\n'), r"train\.json:2: key 'src' is missing"),
    "data_missing_tgt": (data_text('{"src": "b"}\n'), r"train\.json:1: key 'tgt' is missing"),
    "data_wrong_type": (data_text('{"src": 3, "tgt": "b"}\n'), r"train\.json:1: 'src' must be a string or a list"),
    "data_lengths_differ": (
        data_text(GOOD * 2 + '{"src": ["a", "b"], "tgt": ["c"]}\n'),
        r"train\.json:3: 'src' has 2 turns and 'tgt' has 1",
    ),
    "data_empty": (data_text(""), "the file is empty"),
    "data_all_too_long": (too_long, "nothing to learn is left in any of the 3 records with max_length 224"),
    "data_pretrain_missing_corpus": (put(input_dir="nowhere"), "nowhere: neither its .bin"),
    "data_pretrain_cut_corpus": (cut_corpus, r"cut\.bin: \d+ bytes, cut\.idx promises \d+"),
    "data_pretrain_split": (put(split="1,0,0", do_eval=True), "leaves no text for 'valid'"),
    "model_no_folder": (put(model_name_or_path="nowhere"), "nowhere"),
    "model_no_config": (base_file("config.json", Path.unlink), r"base.*config\.json"),
    "model_no_tokenizer": (base_file("tokenizer.model", Path.unlink), r"base.*tokenizer\.model"),
    "model_no_weights": (base_file("model.safetensors", Path.unlink), "no model.safetensors, pytorch_model.bin"),
    "model_truncated": (base_file("model.safetensors", truncate), r"model\.safetensors"),
    "model_missing_tensor": (
        model_tensors(lambda t: t.pop("model.norm.weight")),
        "1 tensors do not fit: missing model.norm.weight",
    ),
    "model_wrong_shape": (
        model_tensors(lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)})),
        r"model\.norm\.weight has shape \[31\], .* \[32\]",
    ),
    "model_small_vocabulary": (smaller_vocabulary, "vocab_size 1000 in config.json, but the tokenizer has 3072 ids"),
    "model_pretrain_small_vocabulary": (
        smaller_vocabulary,
        "vocab_size 1000 in config.json, but the tokenizer has 3072 ids",
    ),
    "model_malicious_pickle": (malicious_pickle, "pytorch_model.bin"),
    "output_holds_another_run": (put(overwrite_output_dir=False), "holds another run .*set overwrite_output_dir"),
    "output_pretrain_holds_another_run": (
        put(overwrite_output_dir=False),
        "holds another run .*set overwrite_output_dir",
    ),
    "output_is_missing": (put(output_dir=""), "output_dir: missing"),
    "output_is_the_model": (
        lambda world, keys: keys.update(output_dir=keys["model_name_or_path"]),
        "no run of these scripts",
    ),
    "output_is_a_file": (
        lambda world, keys: keys.update(output_dir=keys["model_name_or_path"] + "/config.json"),
        r"config\.json is a file",
    ),
    "resume_not_there": (put(resume_from_checkpoint="nowhere"), "nowhere: there is no such folder"),
    "resume_pretrain_not_there": (put(resume_from_checkpoint="nowhere"), "nowhere: there is no such folder"),
    "log_visualdl": (put(report_to="visualdl"), "visualdl is not installed: pip install visualdl"),
    "log_pretrain_visualdl": (put(report_to="visualdl"), "visualdl is not installed: pip install visualdl"),
    "resume_incomplete": (
        lambda world, keys: keys.update(resume_from_checkpoint=keys["output_dir"] + "/checkpoint-3"),
        "no completion marker",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, world, tmp_path, capfd, monkeypatch):
    """One line, exit code 2; the run that output_dir holds is still complete, although overwrite_output_dir is set."""
    monkeypatch.setitem(sys.modules, "visualdl", None)
    (change, expected), script = BAD[name], pretrain if "pretrain" in name else finetune
    own, out = tmp_path / "world", tmp_path / "out"
    own.mkdir()
    for part in ("base", "sft"):
        shutil.copytree(world / part, own / part)
    (out / "checkpoint-3").mkdir(parents=True)
    for old in ("run_args.json", "config.json", "model.safetensors", "metrics.jsonl", "checkpoint-3/model.safetensors"):
        (out / old).write_text("{}")
    keys = keys_of(script, own, out, overwrite_output_dir=True)
    if script is pretrain:
        keys["input_dir"] = str(world / "corpus")
    text = change(own, keys)
    path = tmp_path / "out.json"
    path.write_text(text if isinstance(text, str) else json.dumps(keys))
    before = tree(tmp_path)
    line = fails(script, [path], capfd)
    assert re.search(expected, line), line
    assert tree(tmp_path) == before
    print(f"{name}\t{line.replace(str(tmp_path), '…')}")


def test_config_file_that_is_not_there(capfd):
    line = fails(finetune, ["nowhere.json"], capfd)
    assert re.search(r"nowhere\.json: no such file", line)
    print(f"config_missing\t{line}")


def test_bad_input_of_a_real_process(world, tmp_path):
    """With disable_tqdm left open too: where no terminal is, no bar stands before the line."""
    keys = keys_of(finetune, world, tmp_path / "out", dataset_name_or_path=str(tmp_path / "train.json"))
    del keys["disable_tqdm"]
    (tmp_path / "train.json").write_text(GOOD * 3 + "{}\n")
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    command = [sys.executable, str(ROOT / "finetune.py"), str(tmp_path / "keys.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    paddles = ("UserWarning", "warnings.warn")  # what Paddle itself says when it is imported
    lines = [line for line in done.stderr.splitlines() if not any(word in line for word in paddles)]
    assert len(lines) == 1 and re.search(
        r"^error: .*train\.json:4: no key of a known format; found no keys", lines[0]
    ), done.stderr
    assert done.returncode == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("cause", ["weight", "learning_rate"])
def test_a_loss_that_is_not_finite_stops_the_run(cause, world, tmp_path, capfd):
    own, out, keys = tmp_path / "world", tmp_path / "out", {}
    shutil.copytree(world, own)
    if cause == "weight":
        model_tensors(lambda t: t.update({"model.norm.weight": np.full(32, np.inf, np.float32)}))(own, keys)
    else:
        keys = {"learning_rate": 1e38, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(keys_of(finetune, own, out, **keys)))
    line = fails(finetune, [path], capfd)
    step = 0 if cause == "weight" else 1
    assert re.search(rf"step {step}: the loss or its gradient is (nan|-?inf); its batch is in ", line), line
    report = json.loads((out / f"nonfinite-step-{step}.json").read_text())
    loader = data.SFTLoader(data.SFTDataset(own / "sft", load_tokenizer(own / "base"), 96, 224), 4, 224, seed=42)
    assert (
        report["sample_ids"] == loader.batch(0, step)["sample_ids"]
        and report["input_ids"] == loader.batch(0, step)["input_ids"].tolist()
    )
    print(f"loss_{cause}\t{line.replace(str(tmp_path), '…')}")


@pytest.fixture
def small_disk(tmp_path):
    """mount(size) makes or resizes a disk of this size and returns its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size):
        how = ["-o", f"remount,size={size}"] if disk.is_mount() else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        if subprocess.run(["mount", *how, str(disk)], capture_output=True).returncode:
            pytest.skip("a small tmpfs needs root")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("where", ["checkpoint", "final_model", "at_once"])
def test_disk_full(where, world, tmp_path, small_disk, capfd):
    """The full model is about 0.45 MB, a checkpoint three times that."""
    disk = small_disk({"checkpoint": "3300k", "final_model": "1850k", "at_once": "4k"}[where])
    out, keys = (
        disk / "out",
        {"save_strategy": "steps", "save_steps": 2 if where == "checkpoint" else 6, "max_steps": 6},
    )
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(keys_of(finetune, world, out, **keys)))
    line = fails(finetune, [path], capfd)
    assert "the disk is full" in line
    print(f"disk_full_{where}\t{line.replace(str(tmp_path), '…')}")
    left = {"checkpoint": ["checkpoint-2", "checkpoint-4"], "final_model": ["checkpoint-6"], "at_once": []}[where]
    assert sorted(found.name for found in out.glob("*checkpoint-*") if incomplete(found) is None) == left
    assert not list(disk.rglob("*tmp*"))
    small_disk("20m")
    run(finetune, json.loads(path.read_text()) | {"resume_from_checkpoint": True})
    run(finetune, keys_of(finetune, world, tmp_path / "whole", max_steps=6))
    assert_same(out, tmp_path / "whole")


# ---------------------------------------------------------------------------------------------- upstream's configs

UPSTREAM = SHARED / "upstream" / "configs" / "llama"
UPSTREAM_RUNS = [
    "longlora.json",
    "lora_argument.json",
    "pt_argument.json",
    "qlora_argument.json",
    "sft_argument.json",
    "wint8_lora_argument.json",
]  # as they are; this longlora asks for plain LoRA
UPSTREAM_DEGREES = [
    "flashmask/lora.json",
    "flashmask/sft.json",
    "pretrain_argument.json",
]  # ask for more than one process


def upstream_files():
    return sorted(str(path.relative_to(UPSTREAM)) for path in UPSTREAM.rglob("*.json")) or ["missing"]


@pytest.mark.parametrize("name", upstream_files())
def test_upstream_config(name, world, tmp_path, capfd):
    """Only paths, lengths and step counts are overridden: it trains two steps, or one line says why not."""
    if not UPSTREAM.is_dir():
        pytest.skip("needs ../shared/upstream, on the machine where the project is developed")
    script = pretrain if "pretrain" in name else finetune
    ours = keys_of(script, world, tmp_path / "out", max_steps=2)
    given = [
        "model_name_or_path",
        "output_dir",
        "max_steps",
        *(
            ["input_dir", "max_seq_length"]
            if script is pretrain
            else ["dataset_name_or_path", "src_length", "max_length", "max_new_tokens"]
        ),
    ]
    argv = [str(UPSTREAM / name), *(part for key in given for part in (f"--{key}", str(ours[key])))]
    if script is pretrain:
        argv += ["--tokenizer_name_or_path", str(world / "base"), "--max_evaluate_steps", "2", "--split", "80,10,10"]
    degrees = [
        part
        for key in json.loads((UPSTREAM / name).read_text())
        if key.endswith("parallel_degree")
        for part in (f"--{key}", "1")
    ]
    if name in UPSTREAM_RUNS:
        trainer.run_script(script.main, script.Args, argv)
        verdict = "runs"
    else:
        verdict = fails(script, argv, capfd).replace(str(UPSTREAM) + "/", "")
        assert not (tmp_path / "out").exists()
        if name in UPSTREAM_DEGREES:
            assert "processes, but this run has 1" in verdict
            trainer.run_script(script.main, script.Args, argv + degrees)
            verdict += " | with the degrees set to 1 it runs"
    if "runs" in verdict:
        assert len(losses(tmp_path / "out")) == 2
    ignored = capfd.readouterr().out.count("ignored: ")
    print(f"{name}\t{verdict}" + (f" ({ignored} keys ignored)" if "runs" in verdict else ""))


# ---------------------------------------------------------------------------------------------- our configs

SCRIPT_OF = {"pretrain": pretrain, "continue": pretrain, "sft": finetune, "lora": finetune, "pt": finetune, "dpo": dpo,
             "gptq": quantize, "ptq": quantize, "wint8": quantize, "hf": export, "static": export,
             "serve": serve, "reward": reward, "rl": rl, "ppo": rl, "sums": rl, "kto": dpo}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_*.json")), ids=lambda path: path.name)
def test_configs_parse(path):
    args = parse_args(SCRIPT_OF[path.stem.rpartition("_")[2]].Args, [str(path)])
    model_folder = Path(args.model_name_or_path)
    assert model_folder.parts[0] == "checkpoints" or (ROOT / model_folder / "config.json").is_file()
    script = SCRIPT_OF[path.stem.rpartition("_")[2]].__name__
    assert f"python {script}.py configs/{path.name}" in json.loads(path.read_text())["_doc"]
    assert args.output_dir == "" or Path(args.output_dir).parts[0] == "checkpoints"


@pytest.mark.parametrize("script", ["pretrain", "finetune", "dpo", "quantize", "export", "serve"])
@pytest.mark.sweep(keep=2)
def test_help_says_nothing_else(script):
    """Paddle prints warnings while it is imported, unless kernels is imported before."""
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "output_dir" in done.stdout and done.stderr == ""
