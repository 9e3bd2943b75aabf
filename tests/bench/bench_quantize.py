"""What quantize.py's methods cost on a real model: perplexity, KL divergence to the float model, seconds, peak memory.

    python tests/bench/bench_quantize.py --model SMOLLM2 '{}' '{"do_gptq": true, "group_size": 64}'
    python tests/bench/bench_quantize.py --model SMOLLM2 '{"steps": "int8"}'      # token by token, cache in int8

A case is a JSON object of quantize.py's keys; {} is the float model. "steps" scores token by token through the serving
engine's runner instead: "float32", "bfloat16", "int8" (a cache with a scale a token and head) or "static" (with the
scales of a quant_type that ends in c8). Each case has a process of its own, and prints a line of JSON.
quantize_peers.py does the same with other tools.
"""

import argparse
import json
import subprocess
import sys
import time

import paths  # noqa: F401

import kernels

import numpy as np
import paddle
from language_scores import Scores, T, peak_gb, text_rows

import quantize
from adapters import from_pretrained
from formats.tokenizer import load_tokenizer
from quantization.calibration import Calibration
from quantization.report import mean_bits, stored_bits
from serving.fused import fastest_runner
from serving.runners import ScheduledTokens, TokenSequence


class Rows:
    """What Calibration takes of a loader: rows of a text, `size` a batch."""

    def __init__(self, rows, size):
        self.rows, self.size = rows, size

    def batch(self, epoch, index):
        rows = self.rows[index * self.size :][: self.size]
        positions = np.tile(np.arange(T), (len(rows), 1))
        return {"input_ids": rows, "position_ids": positions, "startend_row_indices": None, "tokens": rows.size}


@paddle.no_grad()
def logits_of(net, rows) -> np.ndarray:
    """(rows, T - 1, V) float32."""
    return np.stack([net(paddle.to_tensor(row[None, :-1]))[0].astype("float32").numpy() for row in rows])


def logits_of_steps(net, rows, steps) -> np.ndarray:
    """The same, all rows one token at a time, with the runner of serve.py."""
    blocks = T // 16
    dtype, cache = ("float32", {"int8": True}.get(steps, steps)) if steps in ("int8", "static") else (steps, False)
    runner = fastest_runner(net, len(rows) * blocks, 16, int8=cache, dtype=dtype)
    texts = [
        TokenSequence(row.tolist(), T, blocks=list(range(i * blocks, (i + 1) * blocks))) for i, row in enumerate(rows)
    ]
    return np.stack([runner.run([ScheduledTokens(text, t, 1) for text in texts]) for t in range(T - 1)], axis=1)


def measure(options, keys: dict) -> dict:
    steps, found = keys.pop("steps", None), {}
    known, unseen = text_rows(load_tokenizer(options.model).encode, scored=options.rows)
    net = from_pretrained(options.model).eval()
    if keys:
        batches = dict.fromkeys(("ptq_step", "gptq_step", "shift_step", "smooth_step"), 8)
        names = {"model_name_or_path": options.model, "output_dir": "-", "dataset_name_or_path": "-"}
        args = quantize.Args(**names | batches | keys)
        args.check()
        start = time.perf_counter()
        with paddle.no_grad():
            calibration = Calibration(net, Rows(known, 2), 8)
        report = quantize.quantize_model(net, calibration, args, print_line=lambda line: None)
        found = {"seconds": round(time.perf_counter() - start, 1), "peak_gb": peak_gb()}
        bits = stored_bits(net)
        for row in report:
            row["bits_per_weight"] = bits[row["linear"]]
        found |= {
            "bits": round(mean_bits(report), 3),
            "error": round(100 * np.mean([row["error"] for row in report]), 3),
        }
    right = logits_of(from_pretrained(options.model).eval(), unseen)
    logits, scores = logits_of_steps(net, unseen, steps) if steps else logits_of(net, unseen), Scores()
    for row, reference, ids in zip(logits, right, unseen):
        scores.add(row, reference, ids[1:])
    return scores.figures() | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", help="JSON objects")
    parser.add_argument("--model", required=True, help="folder of a float model")
    parser.add_argument("--rows", type=int, default=24, help="rows of 512 tokens that are scored")
    options = parser.parse_args()
    if len(options.cases) == 1:
        kernels.configure()
        keys = json.loads(options.cases[0])
        print(json.dumps({"tool": "ours", "case": dict(keys)} | measure(options, keys)), flush=True)
    for case in options.cases if len(options.cases) > 1 else ():
        shared = ["--model", options.model, "--rows", str(options.rows)]
        subprocess.run([sys.executable, __file__, *shared, case], check=True)


if __name__ == "__main__":
    main()
