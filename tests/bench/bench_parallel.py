"""Step time of pretraining over several processes of this machine, beside one process at the same global batch.

    python tests/bench/bench_parallel.py                                     # the table of README python
    tests/bench/bench_parallel.py --topologies tp2 pp2 --rounds 5     # some of it python tests/bench/bench_parallel.py
    --config A                          # a model of 134 M parameters in place of 28 M

A step is 8 rows of 512 ids, forward, backward, AdamW. One process has two threads, two have one each, so both use two
cores. Topologies take turns, `--rounds` times; shown is the median over rounds of the median step after two that warm
up. "talking" is the share of the step in which the first rank is inside a collective, which includes waiting for the
slowest rank, axis by axis; for a pipeline what it waits for is the bubble.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import paths  # noqa: F401

import numpy as np
from pool import Ranks

COMMON = dict(model_type="llama", max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0,
    hidden_act="silu",
              tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, initializer_range=0.02)  # fmt: skip
SHAPES = {
    "S": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=1376,
              vocab_size=4096),
    "A": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
              intermediate_size=2048, vocab_size=32000),
}  # fmt: skip
ROWS, LENGTH = 8, 512
TOPOLOGIES = {  # name: (processes, ranks with batches of their own, arguments)
    "one process": (1, 1, []),
    "dp2": (2, 2, []),
    "sharding2 stage1": (2, 2, ["--sharding", "stage1", "--sharding_parallel_degree", "2"]),
    "sharding2 stage2": (2, 2, ["--sharding", "stage2", "--sharding_parallel_degree", "2"]),
    "sharding2 stage3": (2, 2, ["--sharding", "stage3", "--sharding_parallel_degree", "2"]),
    "tp2": (2, 1, ["--tensor_parallel_degree", "2"]),
    "tp2 sequence parallel": (2, 1, ["--tensor_parallel_degree", "2", "--sequence_parallel", "true"]),
    "pp2": (2, 1, ["--pipeline_parallel_degree", "2"]),
    "pp2 virtual 2": (2, 1, ["--pipeline_parallel_degree", "2", "--virtual_pp_degree", "2"]),
    "sep2": (2, 1, ["--sep_parallel_degree", "2"]),
    "context2": (2, 1, ["--context_parallel_degree", "2"]),
}


def corpus(folder, vocabulary):
    """Documents of random ids as token files."""
    documents, length = 400, 600
    ids = np.random.default_rng(0).integers(10, vocabulary, documents * length)
    np.save(folder / "ids_ids.npy", ids.astype(np.int32))
    np.savez(folder / "ids_idx.npz", lens=np.full(documents, length, np.int32), docs=np.arange(documents + 1))


def measure(pool, name, folder, steps):
    """(median seconds of a step, {axis: share of it}, bubble or None) of one run."""
    processes, data_ranks, more = TOPOLOGIES[name]
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    argv = [
        "--model_name_or_path",
        str(folder / "model"),
        "--input_dir",
        str(folder / "ids"),
        "--output_dir",
        str(out),
        "--do_train",
        "true",
        "--max_steps",
        str(steps),
        "--max_seq_length",
        str(LENGTH),
        "--logging_steps",
        "1",
        "--save_strategy",
        "no",
        "--per_device_train_batch_size",
        "1",
        "--disable_tqdm",
        "true",
        "--split",
        "1,0,0",
        "--gradient_accumulation_steps",
        str(ROWS // data_ranks),
        *more,
    ]
    rows = pool.run("jobs_parallel:script", "pretrain", argv)[0][0][2:]
    seconds = statistics.median(ROWS * LENGTH / row["tokens_per_second"] for row in rows)
    axes = {axis for row in rows for axis in row.get("communication", {})}
    shares = {axis: statistics.median(row["communication"].get(axis, 0.0) for row in rows) for axis in sorted(axes)}
    bubbles = [row["bubble"] for row in rows if "bubble" in row]
    return seconds, shares, statistics.median(bubbles) if bubbles else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=SHAPES, default="S")
    parser.add_argument("--topologies", nargs="*", default=list(TOPOLOGIES), choices=list(TOPOLOGIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    names = ["one process", *(name for name in args.topologies if name != "one process")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model").mkdir()
        for file in Path("demo/llama").glob("*token*"):
            shutil.copy(file, folder / "model")
        (folder / "model" / "config.json").write_text(json.dumps({**COMMON, **SHAPES[args.config]}))
        corpus(folder, SHAPES[args.config]["vocab_size"])
        found = {name: [] for name in names}
        with Ranks(1, threads=2) as one, Ranks(2) as two:
            for _ in range(args.rounds):
                for name in names:
                    found[name].append(measure(one if TOPOLOGIES[name][0] == 1 else two, name, folder, args.steps))
    base = statistics.median(seconds for seconds, *_ in found["one process"])
    print("| topology | seconds a step | times one process | talking | bubble |\n|---|---|---|---|---|")
    for name in names:
        seconds = statistics.median(run[0] for run in found[name])
        axes = sorted({axis for run in found[name] for axis in run[1]})
        talking = ", ".join(
            f"{a} {100 * statistics.median(run[1].get(a, 0.0) for run in found[name]):.0f} %" for a in axes
        )
        bubbles = [run[2] for run in found[name] if run[2] is not None]
        bubble = f"{100 * statistics.median(bubbles):.0f} %" if bubbles else ""
        print(f"| {name} | {seconds:.2f} | {seconds / base:.2f} | {talking} | {bubble} |")


if __name__ == "__main__":
    main()
