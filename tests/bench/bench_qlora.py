"""Speed and memory of a LoRA step by the base: float32, bfloat16, nf4; ours, and peft's where a Python has it.

    python tests/bench/bench_qlora.py --model SMOLLM2 --peft PYTHON_OF_PEFT --batch 2 --seq 256

Rank 8 on every linear of the blocks, AdamW. Each case is a process of its own (bench_train.py, train_peers.py); all are
loaded first, then their steps alternate: a figure is the median of --reps steps, a ratio that of the steps side by
side. With --cases only these; peft's nf4 needs bitsandbytes. The last line is a JSON object with all rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BENCH = Path(__file__).parent
OURS = [str(BENCH / "bench_train.py"), "--task", "train_lora", "--in_turns"]
PEFT = [str(BENCH / "train_peers.py")]
CASES = {
    "ours fp32": [*OURS, "--dtype", "fp32"],
    "ours nf4": [*OURS, "--dtype", "fp32", "--weight_quantize_algo", "nf4"],
    "ours bf16": [*OURS, "--dtype", "bf16"],
    "ours nf4, bf16": [*OURS, "--dtype", "bf16", "--weight_quantize_algo", "nf4"],
    "peft fp32": [*PEFT, "--base", "fp32"],
    "peft nf4": [*PEFT, "--base", "nf4"],
    "peft bf16": [*PEFT, "--base", "bf16"],
    "peft nf4, bf16": [*PEFT, "--base", "nf4_bf16"],
}
BESIDE = "ours fp32"  # what ratios are to
REST = 0.3  # seconds before a step: idle threads of the other's last one spin for as long


class Case:
    """A process that takes a step whenever it is asked to."""

    def __init__(self, python, arguments):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([python, *arguments], **pipes)
        self.wait_for("warm-up")

    def wait_for(self, start):
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        raise SystemExit(f"{' '.join(self.process.args)} ended before {start!r}")

    def step(self, number):
        """One step; its seconds, by the process's own clock, are in the result."""
        time.sleep(REST)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.wait_for(f"rep {number}:")

    def result(self):
        return json.loads(self.wait_for("{"))


def measure(options):
    """{case: {"seconds": of each step, "peak_rss_mb", "loss", "trainable"}}; the cases alternate."""
    shape = ["--batch", str(options.batch), "--seq", str(options.seq), "--reps", str(options.reps)]
    cases = {}
    for name in options.cases:
        if name.startswith("peft") and options.peft is None:
            continue
        python = options.peft if name.startswith("peft") else sys.executable
        cases[name] = Case(python, [*CASES[name], "--model", options.model, *shape])
    for number in range(1, options.reps + 1):
        for case in cases.values():
            case.step(number)
    found = {}
    for name, case in cases.items():
        result = case.result()
        found[name] = {key: result[key] for key in ("seconds", "peak_rss_mb", "loss", "trainable")}
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of a model that both can open")
    parser.add_argument("--peft", metavar="PYTHON", help="a Python that has torch, transformers and peft")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--reps", type=int, default=5)
    options = parser.parse_args(argv)
    found, tokens = measure(options), options.batch * options.seq
    first = found.get(BESIDE, next(iter(found.values())))["seconds"]
    print(f"{options.batch} x {options.seq} tokens\n{'':16}{'tok/s':>10}{'ratio':>8}{'peak GB':>9}")
    for name, row in found.items():
        row["tok_s"] = round(tokens / statistics.median(row["seconds"]), 1)
        row["ratio"] = round(statistics.median(a / b for a, b in zip(first, row["seconds"])), 3)
        print(f"{name:16}{row['tok_s']:10.1f}{row['ratio']:8.2f}{row['peak_rss_mb'] / 1000:9.2f}")
    result = {
        "threads": min(2, len(os.sched_getaffinity(0))),
        "batch": options.batch,
        "seq": options.seq,
        "reps": options.reps,
        "rows": found,
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
