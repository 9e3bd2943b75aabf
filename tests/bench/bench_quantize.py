"""Perplexity of a real model before and after quantization, in process: what tests/RESULTS.md's table of A8W8 is from.

    python tests/bench/bench_quantize.py --model SMOLLM2 null '{"activation": "per_token", "smooth": true}'

Each argument is a JSON object of quantize.py's keys beside do_ptq (null: the float model); a line of JSON is printed
for each. Text: the topics of Python's own help, in English; the first 20 calibrate (8 batches of 2 x 512 tokens), and
the perplexity is that of 12,288 tokens of the others.
"""

import argparse
import collections
import json
import pydoc_data.topics
import tempfile
import time
from pathlib import Path

import paths  # noqa: F401, before the project's modules

import numpy as np
import paddle

import quantize
import trainer
from adapters import from_pretrained
from data import CorpusLoader
from formats.megatron import build_corpus
from quantization.calibration import Calibration

BATCHES, EVAL_BATCHES = 8, 3


def measure(folder: str, prefix: str, keys: dict | None) -> dict:
    """Perplexity, accuracy, seconds of quantizing, and by kind of linear the mean and the largest error in %."""
    split = f"20,{len(pydoc_data.topics.topics) - 20},0"
    train = CorpusLoader(prefix, split, "train", 2 * BATCHES, 512, 2, seed=42)
    dev = CorpusLoader(prefix, split, "valid", None, 512, 8, shuffle=False)
    model, start, errors = from_pretrained(folder).eval(), time.perf_counter(), collections.defaultdict(list)
    if keys is not None:
        steps = dict.fromkeys(("ptq_step", "gptq_step", "shift_step", "smooth_step"), BATCHES)
        named = {"model_name_or_path": folder, "output_dir": "none", "dataset_name_or_path": prefix}
        args = quantize.Args(**{"do_ptq": True, **named, **steps, **keys})
        args.check()
        with paddle.no_grad():
            calibration = Calibration(model, train, BATCHES)
        for row in quantize.quantize_model(model, calibration, args, print_line=lambda line: None):
            errors[row["linear"].rpartition(".")[2]].append(100 * row["error"])
    seconds = time.perf_counter() - start
    found = trainer.evaluate(model, dev, EVAL_BATCHES)
    kinds = {kind: [round(float(np.mean(values)), 3), round(max(values), 3)] for kind, values in errors.items()}
    figures = {"ppl": round(found["eval_ppl"], 4), "accuracy": round(found["eval_accuracy"], 4)}
    return {"keys": keys, **figures, "seconds": round(seconds, 1), "errors": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a float model")
    parser.add_argument("keys", nargs="+", help="JSON objects of keys of quantize.py; null: the float model")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"text": text}) for text in pydoc_data.topics.topics.values()]
        (Path(folder) / "topics.jsonl").write_text("\n".join(lines) + "\n")
        build_corpus(Path(folder) / "topics.jsonl", given.model, str(Path(folder) / "corpus"))
        for keys in given.keys:
            print(json.dumps(measure(given.model, str(Path(folder) / "corpus"), json.loads(keys))), flush=True)


if __name__ == "__main__":
    main()
