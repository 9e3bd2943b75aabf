"""Methods of weight-only quantization on a real model: perplexity, seconds, peak memory.

    python tests/bench/bench_weight_only.py --model SMOLLM2 do_gptq:4 do_awq,auto_clip:3:64:asym do_autoround:4:64

A case is keys that are set to true, bits, group size (64) and sym or asym (sym). Text: pydoc_data.topics of Python's
standard library, the first 20 topics for calibration, the others for perplexity. Each case has a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pydoc_data.topics import topics

import paths  # noqa: F401

import kernels

import numpy as np
import paddle
from paddle.nn.functional import cross_entropy

import quantize
from adapters import from_pretrained
from formats.tokenizer import load_tokenizer
from quantization.calibration import Calibration

T = 512  # tokens of a row


class Rows:
    """What Calibration takes of a loader: rows of a text, `size` a batch."""

    def __init__(self, ids, size):
        self.rows, self.size = ids[: len(ids) // T * T].reshape(-1, T), size

    def batch(self, epoch, index):
        rows = self.rows[index * self.size :][: self.size]
        positions = np.tile(np.arange(T), (len(rows), 1))
        return {"input_ids": rows, "position_ids": positions, "startend_row_indices": None, "tokens": rows.size}


@paddle.no_grad()
def perplexity(net, rows):
    """(perplexity, share of tokens that are the argmax) of rows (n, T) of ids."""
    losses, hits = [], []
    for row in rows:
        logits, labels = net(paddle.to_tensor(row[None, :-1]))[0].astype("float32"), paddle.to_tensor(row[1:])
        losses.append(float(cross_entropy(logits, labels)))
        hits.append(float((logits.argmax(-1) == labels).astype("float32").mean()))
    return float(np.exp(np.mean(losses))), float(np.mean(hits))


def measure(case, options):
    keys, bits, group, grid = (case.split(":") + ["64", "sym"][len(case.split(":")) - 2 :])[:4]
    names = dict.fromkeys(keys.split(","), True)
    args = quantize.Args(
        model_name_or_path=options.model,
        output_dir="-",
        dataset_name_or_path="-",
        autoround_iters=options.iters,
        quant_type=f"weight_only_int{bits}",
        group_size=int(group),
        sym=grid == "sym",
        **names,
    )
    args.check()
    tokenizer, texts = load_tokenizer(options.model), list(topics.values())
    known, unseen = (np.array(tokenizer.encode("\n\n".join(part)), np.int64) for part in (texts[:20], texts[20:]))
    net, rows, start = from_pretrained(options.model).eval(), Rows(known, options.rows), time.perf_counter()
    with paddle.no_grad():
        calibration = Calibration(net, rows, min(options.batches, len(rows.rows) // options.rows))
    report = quantize.quantize_model(net, calibration, args, print_line=lambda line: None)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    ppl, accuracy = perplexity(net, Rows(unseen, 1).rows[: options.eval_rows])
    error = float(np.mean([row["error"] for row in report]))
    return {
        "case": case,
        "tokens": calibration.tokens,
        "perplexity": round(ppl, 3),
        "top1": round(accuracy, 4),
        "error": round(error, 4),
        "seconds": round(seconds, 1),
        "peak_gb": round(peak, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=2, help="rows of a calibration batch")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--eval_rows", type=int, default=24)
    options = parser.parse_args()
    if len(options.cases) == 1:
        kernels.configure()
        print(json.dumps(measure(options.cases[0], options)), flush=True)
    for case in options.cases if len(options.cases) > 1 else ():
        rest = [item for item in sys.argv[1:] if item not in options.cases]
        subprocess.run([sys.executable, __file__, *rest, case], check=True)
