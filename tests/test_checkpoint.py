"""Unified Checkpoint: what ranks write together, what each rank reads, async saves, kills, damage.

python -m pytest tests/test_checkpoint.py                   # about a minute
python -m pytest tests/test_checkpoint.py --slow            # also on 4 and 8 ranks, and 30 kills
export PYTHONPATH=.:tests/golden:tests/ranks:tests/bench
python tests/test_checkpoint.py --readme      # all pairs of topologies, as README's table
"""

import argparse
import errno
import itertools
import json
import math
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
import types
from collections import Counter
from pathlib import Path

import kernels

import jobs_checkpoint
import numpy as np
import pytest
from conftest import ROOT
from pool import Ranks
from tiny_models import write as write_family

import adapters
import checkpoint
import data
import distributed.shard_files
import families
import formats.tensor_files
import formats.weights
import model as M
from arguments import TrainingArgs
from checkpoint import (
    DONE,
    find_checkpoint,
    incomplete,
    list_checkpoints,
    load_checkpoint,
    load_trained,
)
from distributed.collectives import ShardSpec
from distributed.shard_files import CheckpointShardWriter, SaveLayout, assign_writers, entries_of
from distributed.tensor import COLUMN_PARALLEL, ROW_PARALLEL, shard_ranges
from formats.files import UserError, crc32_of
from formats.quantized_moments import dequantize_4, dequantize_8, quantize_4, quantize_8
from formats.tokenizer import load_tokenizer
from formats.weights import SaveSource
from parallel import Degrees, Topology

pytestmark = pytest.mark.sweep(keep=3)

DEMO = ROOT / "demo"
TINY = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": False}  # fmt: skip
SLOW = pytest.mark.slow


class Pool(dict):
    """{world: Ranks}, each started when it is first asked for."""

    def __missing__(self, world):
        self[world] = Ranks(world)
        return self[world]


@pytest.fixture(scope="module")
def pool():
    pool = Pool()
    yield pool
    for ranks in pool.values():
        ranks.stop()


# ---------------------------------------------------------------------------------------------- who writes what


def test_writers_are_balanced_by_bytes():
    generator = random.Random(0)
    for ranks in (1, 2, 3, 8):
        for _ in range(50):
            sizes = {
                f"w{i}": generator.choice([1, 3, 7, 64, 1000, 4096]) * generator.randrange(1, 99)
                for i in range(generator.randrange(1, 60))
            }
            writers = assign_writers(sizes, dict.fromkeys(sizes, list(range(ranks))))
            load = [sum(size for name, size in sizes.items() if writers[name] == rank) for rank in range(ranks)]
            assert max(load) <= sum(load) / ranks + max(sizes.values())
            assert writers == assign_writers(dict(reversed(sizes.items())), dict.fromkeys(sizes, list(range(ranks))))
    assert assign_writers({"a": 9, "b": 1, "c": 1}, {"a": [0, 1], "b": [0, 1], "c": [0]}) == {"a": 0, "b": 1, "c": 0}


def test_reading_slices(tmp_path):
    """Against slices of the full array, in every dtype; only the bytes of the ranges are read."""
    generator = np.random.default_rng(0)
    arrays = {
        "f": generator.standard_normal((7, 5, 3)).astype(np.float32),
        "i": generator.integers(0, 99, (6, 4)).astype(np.int8),
    }
    tensors = {**arrays, "h": (lambda: arrays["f"], (7, 5, 3), "bfloat16")}
    written = formats.tensor_files.write_safetensors(tmp_path / "model.safetensors", tensors)
    assert written == {
        "size": (tmp_path / "model.safetensors").stat().st_size,
        "crc32": crc32_of(tmp_path / "model.safetensors"),
    }
    found = formats.weights.stored_tensors(tmp_path)
    for name, (read, shape) in found.items():
        whole = read()
        assert whole.dtype == (np.int8 if name == "i" else np.float32) and list(whole.shape) == list(shape)
        for dim, more in itertools.product(range(whole.ndim), (None, *range(whole.ndim))):
            for ranges in ([(1, 3)], [(0, 1), (2, 3)], [(0, whole.shape[dim])], [(2, 2)]):
                before, cuts, expected = formats.tensor_files.LazyTensor.bytes_read, {dim: ranges}, whole
                if more is not None and more != dim:
                    cuts[more] = [(0, 1), (2, 3)]
                part = read.read_slices(cuts)
                for at, these in cuts.items():
                    expected = np.concatenate([expected.take(range(*r), at) for r in these], at)
                assert np.array_equal(part, expected)
                width = {"f": 4, "i": 1, "h": 2}[name]
                assert formats.tensor_files.LazyTensor.bytes_read - before == part.size * width


def test_reading_flat_elements_of_a_shard(tmp_path):
    """A range of a flattened tp shard, against the full array; only rows and columns with such elements are read."""
    generator = np.random.default_rng(0)
    for transposed, cut_dim in itertools.product((False, True), (None, 0, 1)):
        stored = generator.standard_normal((6, 9)).astype(np.float32)
        ours = stored.T if transposed else stored
        formats.tensor_files.write_safetensors(tmp_path / "model.safetensors", {"w": stored})
        read, _ = formats.weights.stored_tensors(tmp_path)["w"]
        parameter, part = types.SimpleNamespace(shape=list(ours.shape)), ours
        if cut_dim is not None:
            parameter.shard_spec = ShardSpec(cut_dim, [[(0, 1)], [(1, 3), (4, 6)]], 1, ours.shape)
            part = parameter.shard_spec.slice(ours)
            parameter.shape = list(part.shape)
        weight = formats.weights.Weight("w", parameter, transposed)
        assert np.array_equal(weight.read(read), part)
        for first in range(part.size):
            for last in range(first + 1, part.size + 1):
                before = formats.tensor_files.LazyTensor.bytes_read
                found = weight.read(read, (first, last))
                assert np.array_equal(found, part.reshape([-1])[first:last]), (transposed, cut_dim, first, last)
                rows = -(-last // part.shape[1]) - first // part.shape[1]
                assert formats.tensor_files.LazyTensor.bytes_read - before == 4 * rows * part.shape[1]
                assert np.array_equal(weight.read(lambda: stored, (first, last)), found)


class ThreadGroups:
    """In place of Gloo: ranks that are threads."""

    def __init__(self, world):
        self.values, self.barrier = [None] * world, threading.Barrier(world)

    def of(self, rank):
        def all_gather_object(value, kind="all", channel="main"):
            self.values[rank] = json.loads(json.dumps(value))
            self.barrier.wait(20)
            gathered = list(self.values)
            self.barrier.wait(20)
            return next((v for v in gathered if v is not None), None) if kind == "first" else gathered

        watchdog = types.SimpleNamespace(moved=lambda: None)
        return types.SimpleNamespace(
            all_gather_object=all_gather_object, connect=lambda ranks: None, watchdog=watchdog, gate=lambda ranks: None
        )


# (degrees, whether ranks hold flat ranges over sharding, as ZeRO does)
GRIDS = [
    (dict(tp=2), False),
    (dict(dp=2, tp=2), False),
    (dict(dp=2, sep=2), False),
    (dict(sharding=3), True),
    (dict(sharding=2, tp=3), True),
    (dict(pp=2, tp=2, dp=2), False),
    (dict(pp=2, sharding=2, tp=2), True),
    (dict(pp=2, sharding=2, tp=2, order="sharding_first"), True),
]


LINEARS = {  # (full shape in our layout, whether it is stored transposed)
    "q_proj": ((5, 12), True),
    "k_proj": ((5, 4), True),
    "o_proj": ((12, 5), True),
    "down_proj": ((7, 4), False),
    "norm": ((5,), False),
}
HEADS = types.SimpleNamespace(
    num_attention_heads=6, num_key_value_heads=2, head_dim=2, fused_qkv=None, quantization=None
)


def full_tensors(degrees):
    """{name: array in our layout}: LINEARS of each stage, a tensor of both stages, and an expert per data rank."""
    generator, shapes = np.random.default_rng(1), {}
    for stage in range(degrees.pp):
        shapes |= {f"{stage}.{name}": shape for name, (shape, _) in LINEARS.items()}
    shapes["tied"] = (9, 4)
    shapes |= {f"expert{i}": (3, 4) for i in range(degrees.dp)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def entry_of_rank(name, full, topology, flat):
    """The SaveEntry of what a rank holds of a tensor; flat: a range of its shard, of uneven size, over sharding."""
    linear, tp, sharding = name.partition(".")[2], topology.tp, topology.sharding
    parameter, shard = types.SimpleNamespace(), full
    if tp.size > 1 and linear in COLUMN_PARALLEL + ROW_PARALLEL:
        dim = 0 if linear in ROW_PARALLEL else 1
        ranges = [shard_ranges(linear, full.shape[dim], HEADS, tp.size, rank) for rank in range(tp.size)]
        parameter.shard_spec = ShardSpec(dim, ranges, tp.rank, full.shape)
        shard = parameter.shard_spec.slice(full)
    parameter.shape = list(shard.shape)
    weight = formats.weights.Weight(name, parameter, LINEARS.get(linear, (None, False))[1])
    source = SaveSource(weight, np.array(shard, order="C"))
    if flat:
        width = -(-shard.size // sharding.size) + 1  # the last rank has less, or nothing
        offset = min(sharding.rank * width, shard.size)
        elements = shard.reshape([-1])[offset : offset + width]
        source = SaveSource(weight, elements.copy() if elements.size else None, offset)
    return formats.weights.SaveEntry({name: (weight.shape, "float32")}, [source])


@pytest.mark.parametrize(
    "degrees, flat",
    GRIDS,
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("copied", [False, True], ids=["as_it_is", "copied"])
def test_parts_of_every_grid_make_full_tensors(degrees, flat, copied, tmp_path):
    """Threads as ranks. Each has its parts of: a stage's matrices, sharded by outputs, by inputs, and by replicated key
    heads; a tensor that all have; one of both stages; one expert per data rank."""
    degrees = Degrees(**degrees)
    groups, full, reports, parts = ThreadGroups(degrees.world), full_tensors(degrees), {}, tmp_path / "parts"
    parts.mkdir()

    def work(rank):
        topology = Topology(degrees, rank, groups.of(rank))
        names = [f"{topology.pp.rank}.{name}" for name in LINEARS] + ["tied", f"expert{topology.dp.rank}"]
        entries = [entry_of_rank(name, full[name], topology, flat) for name in names]
        layout = SaveLayout(entries_of({"model": entries}), topology)
        writer = CheckpointShardWriter({"model": entries}, {}, topology, layout, buffers={} if copied else None)
        if copied:
            for entry in entries:
                if entry.sources[0].tensor is not None:
                    entry.sources[0].tensor[:] = np.nan  # training goes on
        writer.send_parts(parts)
        topology.all_gather_object(None)
        reports[rank] = writer.write(tmp_path, parts)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(degrees.world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reports) == list(range(degrees.world))
    written, sizes = {}, Counter()
    assert len(list(parts.iterdir())) <= degrees.world
    for rank, path in [(r, tmp_path / n) for r, report in reports.items() for g in report.values() for n in g]:
        for name, array in formats.tensor_files.read_safetensors(path).items():
            assert name not in written, "written twice"
            written[name] = array
            sizes[rank] += array.nbytes
    assert written.keys() == full.keys()
    for name, array in full.items():
        transposed = LINEARS.get(name.partition(".")[2], (None, False))[1]
        assert np.array_equal(written[name], array.T if transposed else array), name
    largest = max(array.nbytes for array in written.values())
    # A stage's tensors can only be written by that stage's ranks.
    assert max(sizes.values()) <= sum(sizes.values()) / degrees.world + 2 * largest


@pytest.mark.parametrize("options", ["", "async_save"], ids=["blocking", "async"])
def test_files_of_two_ranks(options, pool, tmp_path):
    """The layout of the folder; async_save writes the state at the time of the call."""
    found = pool[2].run("jobs_checkpoint:save_one", str(tmp_path), TINY, {"tp": 2}, options)
    assert found == [None, None]
    folder = tmp_path / "checkpoint-1"
    assert incomplete(folder) is None and checkpoint.damaged(folder) is None
    names = {path.name for path in folder.iterdir()}
    for group in ("model", "optimizer"):
        assert {
            f"{group}-00001-of-00002.safetensors",
            f"{group}-00002-of-00002.safetensors",
            f"{group}.safetensors.index.json",
        } <= names
    assert not [name for name in names if name.startswith(".") and name != DONE] and not list(tmp_path.glob("tmp-*"))
    from safetensors.numpy import load_file  # not our reader

    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    weights = formats.weights.named_weights(M.build(families.ModelConfig.from_dict(TINY)))
    for w in weights:
        whole = jobs_checkpoint.content(w.name, w.shape, 1)
        assert np.array_equal(tensors[w.name], whole), w.name
        assert np.array_equal(tensors[f"{w.name}/moment1_0"], whole) and np.array_equal(
            tensors[f"{w.name}/moment2_0"], whole * 2
        )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {w.name for w in weights}
    assert index["metadata"]["total_size"] == sum(tensors[w.name].nbytes for w in weights)
    sizes = [path.stat().st_size for path in folder.glob("optimizer-*.safetensors")]
    assert max(sizes) < 1.2 * min(sizes)
    for opened in (adapters.from_pretrained(folder), adapters.from_pretrained(tmp_path / "model")):
        for w in formats.weights.named_weights(opened):
            assert np.array_equal(w.to_numpy(), jobs_checkpoint.content(w.name, w.shape, 1)), w.name


# ---------------------------------------------------------------------------------- save under A, resume under B


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(world):
    """Fill the folder with tiny models (the demo's tokenizer), records, pairs and a corpus; returns it."""
    tokenizer = load_tokenizer(DEMO / "llama")
    for name in ("llama", "llama_bias_tied", "qwen", "qwen2_moe", "gemma2"):
        write_family(
            world / name,
            name,
            vocab_size=tokenizer.vocab_size + 1,
            **{"num_experts": 6} if name.endswith("moe") else {},
        )
        tokenizer.save(world / name)
    records = [
        r
        for r in map(json.loads, (DEMO / "sft" / "train.json").read_text().splitlines())
        if isinstance(r["src"], str) and len(r["tgt"]) < 60
    ]
    (world / "sft").mkdir()
    (world / "pairs").mkdir()
    pairs = [
        {"src": [r["src"]], "tgt": [], "response": [r["tgt"], o["tgt"]], "sort": [1, 0]}
        for r, o in zip(records[:20], records[1:21])
    ]
    for folder, rows in (("sft", records[:40]), ("pairs", pairs)):
        for split in ("train", "dev"):
            (world / folder / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = world / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": r["tgt"]}) + "\n" for r in records[:100]))
    data.main(["corpus", str(corpus), "--tokenizer", str(DEMO / "llama"), "--output", str(world / "corpus")])
    return world


LORA = {"lora": True, "lora_rank": 4, "learning_rate": 1e-2}
TASKS = {  # name: (script, model, keys)
    "sft": ("finetune", "llama", {"zero_padding": True}),
    "tied": ("finetune", "llama_bias_tied", {"zero_padding": True}),
    "fused": ("finetune", "qwen", {"zero_padding": True}),
    "moe": ("finetune", "qwen2_moe", {"zero_padding": True}),
    "gemma2": ("finetune", "gemma2", {}),
    "lora": ("finetune", "llama", LORA | {"zero_padding": True}),
    "dora": ("finetune", "llama", LORA | {"dora": True}),
    "prefix": ("finetune", "llama", {"prefix_tuning": True, "num_prefix_tokens": 4, "learning_rate": 1e-2}),
    "projection": ("finetune", "llama", {"prefix_tuning": True, "num_prefix_tokens": 4, "prefix_projection": True}),
    "pretrain": ("pretrain", "llama", {}),
    "dpo": ("dpo", "llama", {}),
    "dpo_lora": ("dpo", "llama", LORA),
}
DEGREES = {"tp": "tensor", "pp": "pipeline", "sharding": "sharding", "sep": "sep", "context": "context", "ep": "expert"}


def ways_of(topology):
    """ "tp2-dp2" -> {"tp": 2, "dp": 2}; "1" is one process."""
    return {axis: int(n) for axis, n in re.findall(r"([a-z]+)([0-9]+)", topology)}


def keys_of(world, task, out, topology, **more):
    """(script, its keys, processes) of a run, with the same batches per step on every topology ("sharding2-stage3")."""
    script, name, keys = TASKS[task]
    degrees = ways_of(topology)
    places = {
        "finetune": {"dataset_name_or_path": str(world / "sft"), "src_length": 40, "max_length": 100},
        "pretrain": {
            "input_dir": str(world / "corpus"),
            "split": "90,10,0",
            "max_seq_length": 24,
            "continue_training": True,
        },
        "dpo": {
            "train_dataset_path": str(world / "pairs"),
            "dev_dataset_path": str(world / "pairs"),
            "max_seq_len": 128,
            "max_prompt_len": 40,
        },
    }
    keys = {
        "model_name_or_path": str(world / name),
        "output_dir": str(out),
        "do_train": True,
        "learning_rate": 1e-3,
        "max_steps": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "disable_tqdm": True,
        "gradient_accumulation_steps": 4 // (degrees.get("dp", 1) * degrees.get("sharding", 1)),
        **places[script],
        **keys,
    }
    keys |= {f"{DEGREES[axis]}_parallel_degree": n for axis, n in degrees.items() if axis in DEGREES}
    if "stage" in degrees:
        keys["sharding"] = f"stage{degrees['stage']}"
    ranks = [
        n for axis, n in degrees.items() if axis not in ("ep", "stage")
    ]  # experts are spread over ranks of other axes
    return script, keys | more, math.prod(ranks)


def run(pool, world, task, out, topology, **more):
    """[what jobs_checkpoint.train returns on each rank]; a run of one process happens in this one."""
    script, keys, ranks = keys_of(world, task, out, topology, **more)
    if ranks == 1:
        return [jobs_checkpoint.train(script, keys)]
    return pool[ranks].run("jobs_checkpoint:train", script, keys)


def final_tensors(folder):
    return {
        name: array
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in formats.tensor_files.read_safetensors(path).items()
    }


# Saved under A after 3 steps of 8, resumed under B: (task, A, B). The same topology twice: bitwise.
PAIRS = [
    ("sft", "1", "tp2"),
    ("sft", "tp2", "1"),
    ("sft", "tp2", "tp2"),
    ("sft", "tp2", "pp2"),
    ("sft", "sharding2-stage3", "tp2"),
    ("sft", "sharding2-stage3", "sharding2-stage3"),
    ("sft", "sep2", "sharding2-stage2"),  # some ranks have prompts alone, without a label
    ("tied", "pp2", "tp2"),
    ("tied", "pp2", "pp2"),
    ("moe", "dp2-ep2", "1"),
    ("lora", "dp2", "tp2"),
    ("prefix", "sharding2-stage3", "tp2"),
]  # fmt: skip
MORE_PAIRS = [
    ("sft", "1", "pp2"),
    ("sft", "1", "tp2-dp2"),
    ("sft", "pp2", "1"),
    ("sft", "pp2", "pp2"),
    ("sft", "dp2", "dp2"),
    ("sft", "sharding2-stage1", "tp2"),
    ("sft", "context2", "pp2"),
    ("sft", "tp2-dp2", "1"),
    ("sft", "tp2-dp2", "tp2"),
    ("sft", "tp2-dp2", "tp2-dp2"),
    ("sft", "tp2-pp2", "sharding2-stage3"),
    ("sft", "sharding2-tp2", "1"),
    ("sft", "sharding4-stage3", "tp2-pp2"),
    ("sft", "tp4", "dp4"),
    ("sft", "tp2-pp2-dp2", "1"),
    ("tied", "tp2", "dp2"),
    ("tied", "tp2-dp2", "1"),
    ("fused", "tp2", "dp2"),
    ("fused", "dp2", "tp4"),
    ("moe", "1", "tp2"),
    ("moe", "tp2", "dp2"),
    ("moe", "sharding2-stage1", "tp2"),
    ("moe", "sharding2-stage3", "dp2-ep2"),
    ("moe", "tp2-dp2", "tp2"),
    ("moe", "dp2-sharding2-ep2-stage1", "1"),  # experts over the two copies of each, one of dp and one of sharding
    ("moe", "sharding4-ep2-stage3", "sharding4-ep2-stage3"),
    ("moe", "sharding4-ep2-stage2", "dp2-sharding2-ep2-stage3"),
    ("gemma2", "1", "tp2"),
    ("gemma2", "tp2", "dp2"),
    ("lora", "tp2", "1"),
    ("lora", "tp2", "tp2"),
    ("lora", "tp2-dp2", "dp2"),
    ("lora", "tp2-pp2", "sharding2-stage3"),
    ("dora", "1", "tp2"),
    ("dora", "tp2", "1"),
    ("prefix", "tp2", "1"),
    ("prefix", "pp2", "sharding2-stage3"),
    ("projection", "1", "tp2"),
    ("projection", "tp2", "1"),
    ("projection", "sharding2-stage3", "pp2"),
    ("pretrain", "tp2", "dp2"),
    ("pretrain", "tp2-dp2", "1"),
    ("pretrain", "sharding2-stage3", "pp2"),
    ("dpo", "1", "dp2"),
    ("dpo", "tp2", "1"),
    ("dpo", "tp2", "tp2"),
    ("dpo", "sharding2-stage3", "tp2"),
    ("dpo_lora", "tp2", "dp2"),
    ("dpo_lora", "pp2", "sharding2-stage1"),
]  # fmt: skip


def remember(pool, world, new_folder):
    """make(task, topology, …): (folder of an uninterrupted run with checkpoint-3, its results); each is made once."""
    runs = {}

    def make(task, topology, **more):
        key = task, topology, *sorted(more.items())
        if key not in runs:
            out = new_folder() / "out"
            runs[key] = out, run(pool, world, task, out, topology, **more)
        return runs[key]

    return make


@pytest.fixture(scope="module")
def saved(pool, world, tmp_path_factory):
    return remember(pool, world, lambda: tmp_path_factory.mktemp("run"))


def resumed(pool, world, saved, task, before, after, out):
    """Resume from checkpoint-3 of the run under `before`: largest relative difference of the next five losses."""
    folder, whole = saved(task, before)
    assert not (wrong := [found["error"] for found in whole if found["error"]]), wrong
    options = "async_save" if task == "tied" else ""  # somewhere
    rest = run(
        pool,
        world,
        task,
        out,
        after,
        resume_from_checkpoint=str(folder / "checkpoint-3"),
        unified_checkpoint_config=options,
    )
    assert not (wrong := [found["error"] for found in rest if found["error"]]), wrong
    line = next(
        line for line in rest[0]["printed"].splitlines() if line.startswith(f"resume: from {folder / 'checkpoint-3'}")
    )
    assert "not an exact continuation" not in line and (" -> " in line) == (before != after), line
    ours, theirs = ([found[0]["losses"][step] for step in (4, 5, 6, 7, 8)] for found in (rest, whole))
    assert theirs[-1] != theirs[0]
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))


def limit(before, after):
    """Largest difference that resumed() may return."""
    return 0 if before == after else 1e-6


@pytest.mark.parametrize("task, before, after", PAIRS + [pytest.param(*row, marks=SLOW) for row in MORE_PAIRS])
def test_resume_on_another_topology(task, before, after, pool, world, saved, tmp_path):
    off = resumed(pool, world, saved, task, before, after, tmp_path / "out")
    print(f"| {task} | {before} | {after} | {off:.1e} |")
    assert off <= limit(before, after)
    a, b = final_tensors(tmp_path / "out"), final_tensors(saved(task, before)[0])
    assert a.keys() == b.keys()
    if before == after:
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_changed_batch_size_is_reported(pool, world, saved, tmp_path):
    """One process in place of two, with as many micro-batches as each of them had."""
    found = run(
        pool,
        world,
        "sft",
        tmp_path / "out",
        "1",
        gradient_accumulation_steps=2,
        max_steps=4,
        max_evaluate_steps=1,
        resume_from_checkpoint=str(saved("sft", "dp2")[0] / "checkpoint-3"),
    )
    wanted = (
        "checkpoint-3; data 2 -> one process; not an exact continuation, changed: max_steps 8 -> 4, "
        "micro-batches of a step 4 -> 2\n"
    )
    assert wanted in found[0]["printed"]


def test_a_rank_reads_what_it_holds(pool, world, saved, tmp_path):
    """Half of every sharded tensor, all of the others; the same for both moments."""
    out, _ = saved("sft", "1")
    found = run(
        pool, world, "sft", tmp_path / "out", "tp2", resume_from_checkpoint=str(out / "checkpoint-3"), max_steps=4
    )
    cut = whole = 0
    for name, array in formats.tensor_files.read_safetensors(out / "model.safetensors").items():
        if any(f"{part}." in name for part in (*COLUMN_PARALLEL, *ROW_PARALLEL, "embed_tokens", "lm_head")):
            cut += array.nbytes
        else:
            whole += array.nbytes
    least = 4 * (cut / 2 + whole)  # the base, then weights and two moments of the checkpoint
    for rank in found:
        assert rank["error"] is None
        assert least * 0.999 - 4096 <= rank["read"] <= least * 1.001 + 4096, (
            rank["read"],
            least,
            cut,
            whole,
        )  # odd vocabulary


@pytest.mark.parametrize("stage, shared", [(1, 2), (3, 3)])
def test_a_zero_rank_reads_its_shards(stage, shared, pool, world, saved, tmp_path):
    """All of the base model; half of those of the checkpoint's three groups (weights, moments) that ZeRO shards, and at
    most a row more."""
    out, _ = saved("sft", "1")
    found = run(
        pool,
        world,
        "sft",
        tmp_path / "out",
        f"sharding2-stage{stage}",
        resume_from_checkpoint=str(out / "checkpoint-3"),
        max_steps=4,
    )
    arrays = formats.tensor_files.read_safetensors(out / "model.safetensors").values()
    whole, rows = sum(array.nbytes for array in arrays), sum(4 * max(array.shape) for array in arrays)
    assert not any(rank["error"] for rank in found)
    read = sum(rank["read"] for rank in found)
    least = 2 * whole + (2 * (3 - shared) + shared) * whole
    assert least <= read <= least + 2 * shared * rows, (read, least, rows)


@pytest.mark.parametrize(
    "task, topology",
    [
        ("sft", "sharding2-stage3"),
        ("tied", "pp2"),
        ("lora", "sharding2-stage3"),
        *(
            pytest.param(*row, marks=SLOW)
            for row in [
                ("tied", "sharding2-stage3"),
                ("sft", "tp2"),
                ("sft", "pp2"),
                ("lora", "pp2"),
                ("prefix", "sharding2-stage3"),
                ("prefix", "pp2"),
                ("projection", "sharding2-stage3"),
                ("projection", "pp2"),
                ("moe", "dp2-ep2"),
                ("moe", "pp2"),
                ("lora", "tp2-pp2"),
                ("sft", "sharding2-tp2-stage3"),
                ("lora", "sharding2-tp2-stage3"),
                ("dpo", "sharding2-stage3"),
                ("dpo_lora", "pp2"),
            ]
        ),
    ],
)
@pytest.mark.sweep(keep=2)
def test_the_best_model_at_the_end(task, topology, pool, world, tmp_path):
    """The largest loss counts as best here, so the first checkpoint wins and six more steps are undone."""
    metric = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    evaluation = {
        "do_eval": True,
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_evaluate_steps": 2,
    }
    out = tmp_path / "out"
    found = run(pool, world, task, out, topology, **metric, **evaluation)
    assert not (wrong := [rank["error"] for rank in found if rank["error"]]), wrong
    assert "best: checkpoint-2, loss" in found[0]["printed"]
    final, best, last = (final_tensors(out / folder) for folder in ("", "checkpoint-2", "checkpoint-8"))
    best, last = (
        {name: array for name, array in tensors.items() if "/" not in name} for tensors in (best, last)
    )  # no moments
    assert final.keys() == best.keys()
    assert all(np.array_equal(final[name], best[name]) for name in final)
    assert not all(np.array_equal(final[name], last[name]) for name in final)
    # What is evaluated after that is the same model.
    rows = map(json.loads, (out / "eval_metrics.jsonl").read_text().splitlines())
    then = next(row for row in rows if row["step"] == 2)
    assert json.loads((out / "dev_results.json").read_text())["eval_loss"] == then["eval_loss"]


# ---------------------------------------------------------------------------------------------- damage


def flip(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoints_are_passed_over(pool, tmp_path):
    """One flipped bit, in files that different ranks check; all ranks agree on the checkpoint before."""
    for step in range(1, 6):
        pool[2].run("jobs_checkpoint:save_one", str(tmp_path), TINY, {"tp": 2}, step=step)
    flip(tmp_path / "checkpoint-5" / "optimizer-00001-of-00002.safetensors")
    flip(tmp_path / "checkpoint-4" / "model-00002-of-00002.safetensors")
    flip(tmp_path / "checkpoint-3" / "trainer_state.json", 3)
    flip(tmp_path / "checkpoint-2" / "config.json")
    found = pool[2].run("jobs_checkpoint:find", str(tmp_path), {"tp": 2})
    assert [path for path, _ in found] == [str(tmp_path / "checkpoint-1")] * 2
    lines = found[0][1].splitlines()
    damaged = "is damaged: its checksum differs from what was written"
    assert f"checkpoint-5 is passed over: optimizer-00001-of-00002.safetensors {damaged}" in lines[0]
    assert f"checkpoint-4 is passed over: model-00002-of-00002.safetensors {damaged}" in lines[1]
    assert "checkpoint-3 is passed over: trainer_state.json is damaged" in lines[2] or "missing or damaged" in lines[2]
    assert f"checkpoint-2 is passed over: config.json {damaged}" in lines[3] and found[1][1] == ""
    found = pool[2].run("jobs_checkpoint:find", str(tmp_path), {"tp": 2}, str(tmp_path / "checkpoint-5"))
    assert [path for path, _ in found] == [None, None]
    assert all("checkpoint-5: optimizer-00001" in text and "give a complete one" in text for _, text in found)


def test_what_does_not_fit_is_named(pool, world, saved, tmp_path):
    """A missing part of the model, a missing tensor, a checkpoint of another model or of another kind of training."""
    out, _ = saved("sft", "tp2")
    other, _ = saved("lora", "tp2")

    def fails(path, task="sft", **more):
        found = run(pool, world, task, tmp_path / "out", "1", resume_from_checkpoint=str(path), **more)
        assert "\n" not in found[0]["error"]
        return found[0]["error"]

    copy = tmp_path / "checkpoint-3"
    shutil.copytree(out / "checkpoint-3", copy)
    (copy / "model-00001-of-00002.safetensors").unlink()
    assert "checkpoint-3: model-00001-of-00002.safetensors is missing" in fails(copy)
    state = json.loads((copy / "trainer_state.json").read_text())
    name, left = "optimizer-00002-of-00002.safetensors", {}

    def mark():  # as if it had been written so
        state["files"] = {file.name: file.stat().st_size for file in copy.glob("*.json")}
        del state["files"]["trainer_state.json"]
        (copy / "trainer_state.json").write_text(json.dumps(state))
        (copy / DONE).write_text(str(crc32_of(copy / "trainer_state.json")))

    shutil.copy(out / "checkpoint-3" / "model-00001-of-00002.safetensors", copy)
    left = formats.tensor_files.read_safetensors(copy / name)
    gone = next(key for key in left if key.endswith("moment2_0"))
    formats.tensor_files.write_safetensors(copy / name, {key: array for key, array in left.items() if key != gone})
    mark()
    assert f"{name}: has no tensor {gone}, which the index says it has" in fails(copy)
    index = copy / "optimizer.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][gone]
    index.write_text(json.dumps(content))
    mark()
    assert f"the optimizer state is of other weights: missing {gone}" in fails(copy)
    tied = fails(saved("tied", "tp2")[0] / "checkpoint-3")
    assert "tensors do not fit" in tied and "missing lm_head.weight" in tied
    assert "adapter_config.json: no such file" in fails(out / "checkpoint-3", "lora")
    assert "no model.safetensors" in fails(other / "checkpoint-3")


# ---------------------------------------------------------------------------------------------- kills


def check_saves(folder, last):
    """Every complete checkpoint holds what its step says, and the newest is at least the last that was reported."""
    found = find_checkpoint(TrainingArgs(output_dir=str(folder), resume_from_checkpoint=True))  # recovers, too
    newest = 0
    for path in list_checkpoints(folder):
        if incomplete(path) is None:
            step = int(path.name[11:])
            assert checkpoint.damaged(path) is None
            tensors = final_tensors(path)
            for w in formats.weights.named_weights(M.build(families.ModelConfig.from_dict(TINY))):
                whole = jobs_checkpoint.content(w.name, w.shape, step)
                assert np.array_equal(tensors[w.name], whole) and np.array_equal(
                    tensors[f"{w.name}/moment2_0"], whole * 2
                )
            newest = max(newest, step)
    assert newest >= last and (found is None or load_checkpoint(found).step == newest), (newest, last)
    return newest


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=SLOW)])
def test_killed_while_saving(kills, tmp_path):
    """SIGKILL of both ranks at a random moment, every other time with async_save; nothing that was reported is lost."""
    generator, last, within, moved = random.Random(kills), 0, 0, 0
    for kill in range(kills):
        ranks = Ranks(2)
        ranks.start()
        options = "async_save" if kill % 2 else ""
        for pipe in ranks.pipes:
            pipe.send(
                (
                    "jobs_checkpoint:save_until_killed",
                    (str(tmp_path), TINY, {"tp": 2} if kill % 3 else {"dp": 2}, options, last + 1),
                    {},
                )
            )
        patience = time.monotonic() + 60
        while not list(tmp_path.glob(f"checkpoint-{last + 1}")):
            assert time.monotonic() < patience and all(process.poll() is None for process in ranks.processes)
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.2))
        while kill % 2 == 0 and not any(tmp_path.glob("tmp-checkpoint-*")):  # in the middle of a save, every other time
            assert time.monotonic() < patience
        generator.shuffle(ranks.processes)  # who dies first
        for process in ranks.processes:
            process.kill()
        ranks.stop()
        within += any(tmp_path.glob("tmp-checkpoint-*"))
        told = [int(path.read_text()) for path in tmp_path.glob("saved-?")]
        now = check_saves(tmp_path, max(told, default=0))
        moved, last = moved + (now > last), now
    print({"kills": kills, "killed_with_a_half_folder": within, "last": last})
    assert moved == kills and within >= kills // 3


# ---------------------------------------------------------------------------------------------- async_save


def single(tmp_path, options, **keys):
    return jobs_checkpoint.Run(tmp_path, TINY, {}, options, **keys)


def test_a_failed_write_is_raised_at_the_next_save_or_at_the_end(tmp_path, monkeypatch):
    saver = single(tmp_path, "async_save")
    saver.set(1)
    saver.save(1)
    saver.checkpoints.wait()
    real = formats.tensor_files.write_safetensors

    def full(path, *args, **more):
        if path.name.startswith("optimizer"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **more)

    monkeypatch.setattr(distributed.shard_files, "write_safetensors", full)
    saver.save(2)
    with pytest.raises(UserError, match="checkpoint-2: the disk is full .*earlier ones are intact"):
        saver.save(3)
    saver.save(3)
    with pytest.raises(UserError, match="checkpoint-3: the disk is full"):
        saver.checkpoints.wait()
    saver.checkpoints.wait()  # raised once
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and checkpoint.damaged(
        tmp_path / "checkpoint-1"
    ) is None


def test_a_full_disk_on_one_of_two_ranks(pool, tmp_path):
    """The message of the other rank has the first one's reason; nothing half-written is left."""
    for options in ("", "async_save"):
        found = pool[2].run("jobs_checkpoint:save_to_full_disk", str(tmp_path), TINY, {"tp": 2}, options, 1)
        assert all("checkpoint-2: the disk is full" in text for text in found), found
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    """save() returns before anything is written; the next waits for it."""
    saver, gate, order = single(tmp_path, "async_save"), threading.Event(), []
    real = formats.tensor_files.write_safetensors

    def slow(path, *args, **more):
        gate.wait(20)
        order.append(path.name)
        return real(path, *args, **more)

    monkeypatch.setattr(distributed.shard_files, "write_safetensors", slow)
    saver.set(1)
    saver.save(1)
    assert order == [] and not (tmp_path / "checkpoint-1").exists() and saver.checkpoints.has(1)
    saver.set(2)
    threading.Timer(0.2, gate.set).start()
    saver.save(2)
    assert (tmp_path / "checkpoint-1").is_dir()
    saver.checkpoints.wait()
    for step in (1, 2):
        tensors = final_tensors(tmp_path / f"checkpoint-{step}")
        for w in saver.weights:
            assert np.array_equal(tensors[w.name], jobs_checkpoint.content(w.name, w.shape, step))


# ---------------------------------------------------------------------------------------------- options


def test_a_limit_of_one_keeps_two_and_says_so_once(tmp_path, capsys):
    """The last checkpoint and the best one, as soon as they differ."""
    run = single(tmp_path, "", save_total_limit=1)
    for step in (1, 2, 3, 4):
        run.set(step)
        run.checkpoints.save(checkpoint.TrainState(step=step, best_checkpoint="checkpoint-1" if step > 1 else None))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-1"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["save_total_limit: 1 keeps two checkpoints: the last one and the best one, checkpoint-1"]


def test_options_of_unified_checkpoint_config(tmp_path):
    def check(words, **more):
        args = TrainingArgs(output_dir=str(tmp_path), do_train=True, unified_checkpoint_config=words, **more)
        args.device = "cpu"
        return args, args.check()

    args, notes = check("async_save, skip_save_model_weight  remove_master_weight")
    assert (
        args.unified_checkpoint_config == ["async_save", "remove_master_weight", "skip_save_model_weight"] and not notes
    )
    args, _ = check("enable_all_options")
    assert args.unified_checkpoint_config == ["master_weight_compatible", "skip_save_model_weight"]
    args, notes = check(["ignore_merge_optimizer"])
    assert args.unified_checkpoint_config == [] and len(notes) == 1 and "any topology can resume" in notes[0]
    with pytest.raises(UserError, match="unified_checkpoint_config: unknown option 'async'; possible are async_save, "):
        check("async")
    with pytest.raises(UserError, match="ckpt_quant_stage: 'O3'; possible are O0, O1, O2"):
        check("", ckpt_quant_stage="O3")


@pytest.fixture
def half():
    """A bf16 run: checkpoints have bfloat16 weights beside float32 master weights."""
    kernels.bf16 = True
    yield
    kernels.bf16 = False


def files_of(folder):
    return {path.name.partition(".")[0].partition("-")[0] for path in folder.glob("*.safetensors")}


def test_master_weights(half, tmp_path, capsys):
    def save(name, options):
        saver = single(tmp_path / name, options)
        saver.set(3)
        saver.save(3)
        saver.checkpoints.wait()
        return saver, tmp_path / name / "checkpoint-3"

    def load(saver, path, options=""):
        saver.set(9)
        args = types.SimpleNamespace(unified_checkpoint_config=options.split())
        load_trained(saver.model, path, args)
        return all(np.array_equal(w.to_numpy(), jobs_checkpoint.content(w.name, w.shape, 3)) for w in saver.weights)

    saver, both = save("both", "")
    index = json.loads((both / "optimizer.safetensors.index.json").read_text())
    assert files_of(both) == {"model", "optimizer", "master_weights"} and index["master_weights"] is True
    assert {entry[0] for entry in formats.tensor_files.safetensors_header(both / "model.safetensors").values()} == {
        "BF16"
    }
    assert load(saver, both)
    _, skipped = save("skipped", "skip_save_model_weight")
    assert files_of(skipped) == {"optimizer", "master_weights"} and load(saver, skipped)
    opened = adapters.from_pretrained(skipped)
    assert all(
        np.array_equal(w.to_numpy(), jobs_checkpoint.content(w.name, w.shape, 3))
        for w in formats.weights.named_weights(opened)
    )
    assert capsys.readouterr().out == ""
    _, removed = save("removed", "remove_master_weight skip_save_model_weight")
    assert "skip_save_model_weight is ignored" in capsys.readouterr().out
    assert files_of(removed) == {"model", "optimizer"}
    with pytest.raises(UserError, match="has bfloat16 weights and no master weights; .*master_weight_compatible"):
        load(saver, removed)
    for word in ("master_weight_compatible", "remove_master_weight"):
        assert not load(saver, removed, word)
        assert "from bfloat16 weights it is not an exact continuation" in capsys.readouterr().out
        for w in saver.weights:
            rounded = formats.tensor_files.from_bfloat16(
                formats.tensor_files.to_bfloat16(jobs_checkpoint.content(w.name, w.shape, 3))
            )
            assert np.array_equal(w.to_numpy(), rounded)


def test_a_bf16_run_resumes_bitwise(pool, world, saved, tmp_path):
    keys = {"bf16": True, "device": "cpu", "unified_checkpoint_config": "skip_save_model_weight"}
    out, whole = saved("sft", "1", **keys)
    if "so float32 is used" in whole[0]["printed"]:
        pytest.skip("no bfloat16 products on this machine")
    rest = run(pool, world, "sft", tmp_path / "out", "1", resume_from_checkpoint=str(out / "checkpoint-3"), **keys)
    assert [rest[0]["losses"][step] for step in range(4, 9)] == [whole[0]["losses"][step] for step in range(4, 9)]
    assert files_of(out / "checkpoint-3") == {"optimizer", "master_weights"}


@pytest.mark.parametrize("shape", [(5, 64), (3, 37), (1, 1), (2, 3, 40)])
@pytest.mark.parametrize("stage", ["O1", "O2"])
def test_quantized_moments(stage, shape):
    """Dequantized m and ratio are within half a quantization step; a row of zeros stays zero."""
    generator = np.random.default_rng(0)
    m = generator.standard_normal(shape).astype(np.float32) * np.float32(1e-3)
    v = (generator.standard_normal(shape).astype(np.float32) * np.float32(1e-3)) ** 2 + np.float32(1e-9)
    m[0], v[0] = 0, 0
    quantize, dequantize, steps = (
        (quantize_8, dequantize_8, (127, 255)) if stage == "O1" else (quantize_4, dequantize_4, (7, 15))
    )
    stored = quantize(m, v)
    back_m, back_v = dequantize(*stored)
    assert back_m.shape == back_v.shape == shape and back_m.dtype == back_v.dtype == np.float32
    assert sum(array.nbytes for array in stored[: 2 if stage == "O1" else 1]) == m.size * (2 if stage == "O1" else 1)
    ratio, back_ratio = (1 / (np.sqrt(x) + 1e-8) for x in (v, back_v))
    for x, back, n, signed in ((m, back_m, steps[0], True), (ratio, back_ratio, steps[1], False)):
        rows = x.reshape([-1, shape[-1]])
        groups = [rows] if stage == "O1" else [rows[:, i : i + 32] for i in range(0, shape[-1], 32)]
        backs = (
            [back.reshape(rows.shape)]
            if stage == "O1"
            else [back.reshape(rows.shape)[:, i : i + 32] for i in range(0, shape[-1], 32)]
        )
        for a, b in zip(groups, backs):
            step = (
                np.abs(a).max(1, keepdims=True) / n
                if signed
                else (a.max(1, keepdims=True) - a.min(1, keepdims=True)) / n
            )
            assert (np.abs(a - b) <= 0.5 * step + 1e-4 * np.abs(a)).all()
    assert (back_m[0] == 0).all() and (back_v[0] < 1e-12).all()


@pytest.mark.parametrize("stage", ["O1", "O2"])
def test_moments_are_quantized_once(stage, pool, world, saved, tmp_path):
    exact, _ = saved("sft", "1")
    out, whole = saved("sft", "tp2", ckpt_quant_stage=stage)
    sizes = [
        sum(path.stat().st_size for path in (folder / "checkpoint-3").glob("optimizer-*")) for folder in (exact, out)
    ]
    print(f"{stage}: moments {sizes[0]:,} -> {sizes[1]:,} bytes")
    index = json.loads((out / "checkpoint-3" / "optimizer.safetensors.index.json").read_text())
    assert index["ckpt_quant_stage"] == stage and index["quant_ckpt_resume_times"] == 0
    resume = {"resume_from_checkpoint": str(out / "checkpoint-3"), "ckpt_quant_stage": stage}
    for topology in ("1", "tp2"):
        rest = run(pool, world, "sft", tmp_path / topology, topology, **resume)
        assert rest[0]["error"] is None
        off = max(abs(rest[0]["losses"][step] / whole[0]["losses"][step] - 1) for step in range(4, 9))
        print(f"{stage} under {topology}: {off:.1e}")
        assert 0 < off < 0.02
        index = json.loads((tmp_path / topology / "checkpoint-6" / "optimizer.safetensors.index.json").read_text())
        assert index["ckpt_quant_stage"] == "O0" and index["quant_ckpt_resume_times"] == 1
        assert f"ckpt_quant_stage: {stage} is ignored" in rest[0]["printed"]


# ---------------------------------------------------------------------------------------------- README's table


def main():
    """Every pair, slow ones too, as a markdown table; exit code 1 if one is above its limit or failed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--readme",
        action="store_true",
        help="write the table into README.md, between its marks <!-- resume --> and <!-- resume end -->",
    )
    parser.add_argument("--only", default="", help="pairs whose row, such as `sft | tp2 | 1`, holds this")
    options, lines, bad = (
        parser.parse_args(),
        [
            "| task | saved under | resumed under | worst relative difference of the next 5 losses |",
            "|---|---|---|---|",
        ],
        0,
    )
    pool = Pool()
    with tempfile.TemporaryDirectory() as folder:

        def new_folder():
            return Path(tempfile.mkdtemp(dir=folder))

        try:
            world = make_world(new_folder())
            saved = remember(pool, world, new_folder)
            for row in PAIRS + MORE_PAIRS:
                if options.only not in " | ".join(row):
                    continue
                try:
                    off = resumed(pool, world, saved, *row, new_folder() / "out")
                    cell = f"{off:.1e}" if off else "0"
                    bad += off > limit(*row[1:])
                except (AssertionError, RuntimeError) as error:
                    text = str(error).strip() or traceback.format_exc().strip()
                    cell, bad = f"fails: {text.splitlines()[-1][:200]}", bad + 1
                lines.append("| " + " | ".join((*(place.replace("-", " ") for place in row), cell)) + " |")
                print(lines[-1], file=sys.stderr, flush=True)
        finally:
            for ranks in pool.values():
                ranks.stop()
    print("\n".join(lines))
    if options.readme:
        path = ROOT / "README.md"
        before, mark, rest = path.read_text(encoding="utf-8").partition("<!-- resume -->")
        _, end, after = rest.partition("<!-- resume end -->")
        assert mark and end, "README.md has no marks"
        path.write_text("\n".join([before + mark, *lines, end + after]), encoding="utf-8")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
