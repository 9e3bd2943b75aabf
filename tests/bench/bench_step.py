"""One step of serving in every format, formats in turn: milliseconds, bytes, and what rounding does to the logits.

    python tests/bench/bench_step.py --config A --batch 1 16      # decode and a prefill of 128 tokens a sequence
    python tests/bench/bench_step.py --rounding                    # the demo model: logits beside those in float32

Formats: layers (the model's layers, float32), float32, bfloat16, w8, w4 (groups of 64), a8w8; the head of the last
three is in 8 bits. Times are the least and the median of all repetitions, because other programs disturb both; GB/s is
what a step reads of the weights over the least time, beside a plain reading of memory."""

import argparse
import json
import time

import paths  # noqa: F401

import kernels

import numpy as np
import paddle
from bench_train import load_model

from adapters import from_pretrained
from formats.tokenizer import load_tokenizer
from serving.fused import FusedRunner
from serving.runners import PagedRunner, ScheduledTokens, TokenSequence, round_linears

FORMATS = ("layers", "float32", "bfloat16", "w8", "w4", "a8w8")
PROMPT, BLOCKS = 128, 16  # tokens; blocks of 16 tokens a sequence


def runner_of(model, name, sequences):
    """The runner of a format; integers are rounded in place."""
    blocks = BLOCKS * sequences
    if name == "layers":
        return PagedRunner(model, blocks, 16)
    if name in ("float32", "bfloat16"):
        return FusedRunner(model, blocks, 16, dtype=name)
    round_linears(model, name, 64 if name == "w4" else -1)
    return FusedRunner(model, blocks, 16, dtype="bfloat16", int8_head=True)


def time_steps(config, batches, formats, reps, steps):
    """Print a row for each batch and format."""
    runners = {name: runner_of(load_model(config)[0], name, max(batches)) for name in formats}
    generator, memory = np.random.default_rng(0), paddle.zeros([64 << 20])
    print(print("batch format       MB  decode ms  median  tokens/s  GB/s  prefill tokens/s"))
    for batch in batches:
        texts = [
            TokenSequence(
                generator.integers(3, 4000, PROMPT + steps).tolist(), PROMPT, blocks=list(range(at, at + BLOCKS))
            )
            for at in range(0, BLOCKS * batch, BLOCKS)
        ]
        decode, prefill = ({name: [] for name in formats} for _ in range(2))

        def timed(runner, start, count, into):
            began = time.perf_counter()
            runner.run([ScheduledTokens(text, start, count) for text in texts])
            into.append(time.perf_counter() - began)

        for _ in range(reps):
            for name, runner in runners.items():
                timed(runner, 0, PROMPT, prefill[name])
                for i in range(steps):
                    timed(runner, PROMPT + i, 1, decode[name])
        for name, runner in runners.items():
            size = 4 * runner.model.active_weights if name == "layers" else runner.packed.packed_bytes
            least, median = min(decode[name]), float(np.median(decode[name]))
            first = batch * PROMPT / min(prefill[name])
            rates = f"{batch / least:>9,.0f} {size / least / 1e9:>5.1f} {first:>17,.0f}"
            print(
                f"{batch:>5} {name:9} {size / 1e6:>5.0f} {1e3 * least:>10.2f} {1e3 * median:>7.2f} {rates}", flush=True
            )
    print(f"reading memory: {max(kernels._module('cpu').peak(memory, 5) for _ in range(5)) / 1e9:.1f} GB/s")


def show_rounding(formats, records=40):
    """Print how far the demo's logits of each format are from those of the layers in float32, at every position."""
    tokenizer = load_tokenizer("demo/llama")
    with open("demo/sft/dev.json", encoding="utf-8") as file:
        lines = [json.loads(line) for line in list(file)[:records]]
    texts = [tokenizer.encode(f"{line['src']}{line['tgt']}")[: 16 * BLOCKS] for line in lines]

    def logits(name):
        runner, rows = runner_of(from_pretrained("demo/llama"), name, 1), []
        for ids in texts:
            text = TokenSequence(ids, len(ids), blocks=list(range(BLOCKS)))
            rows += [runner.run([ScheduledTokens(text, i, 1)])[0] for i in range(len(ids))]
        return np.array(rows, np.float64)

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    exact = logits("layers")
    for name in formats[1:]:
        found = logits(name)
        p, q = log_softmax(exact), log_softmax(found)
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        same = (found.argmax(-1) == exact.argmax(-1)).mean()
        divergence = (np.exp(p) * (p - q)).sum(-1).mean()
        print(
            f"{name:9} {len(exact)} positions: logits {error:.2%}, KL {divergence:.1e}, same argmax {same:.2%}",
            flush=True,
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="A", choices=["A", "B"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--reps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="decodes after each prefill")
    parser.add_argument("--rounding", action="store_true", help="compare logits instead")
    options = parser.parse_args(argv)
    kernels.configure("cpu")
    if options.rounding:
        show_rounding(FORMATS)
    else:
        time_steps(options.config, options.batch, options.formats, options.reps, options.steps)


if __name__ == "__main__":
    main()
