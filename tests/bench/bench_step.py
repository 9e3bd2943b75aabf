"""One step of serving in every format: rates, their share of what the machine can do, memory, effect on the logits.

    python tests/bench/bench_step.py --config A                 # decode and prefill at batch 1, 4, 16, 64, as a table
    python tests/bench/bench_step.py --rounding                 # the demo model: logits beside those in float32

Formats: layers (the model's layers, float32), float32, bfloat16, w8, w4 (groups of 64), a8w8; the head of the last
three is in 8 bits. Each runs in a process of its own, which gives its memory. Figures are medians of all repetitions,
with 128 tokens of prompt. GB/s: packed weights, keys and values of a decode over its time, with its share of a plain
reading of memory; GFLOP/s: two for each weight and token, with the share of what the instructions reach in registers.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import paths  # noqa: F401

import kernels

import numpy as np
import paddle
from bench_train import SHAPES, load_model

from adapters import from_pretrained
from formats.tokenizer import load_tokenizer
from serving.fused import FusedRunner
from serving.runners import PagedRunner, ScheduledTokens, TokenSequence, round_linears

FORMATS = ("layers", "float32", "bfloat16", "w8", "w4", "a8w8")
PROMPT, BLOCKS = 128, 12  # tokens; blocks of 16 tokens a sequence
AT_ONCE = 16  # most prompts of a prefill, as a server takes them in pieces


def runner_of(model, name, sequences, free_weights=False):
    """The runner of a format; integers are rounded in place."""
    blocks = BLOCKS * sequences
    if name == "layers":
        return PagedRunner(model, blocks, 16)
    if name in ("float32", "bfloat16"):
        return FusedRunner(model, blocks, 16, dtype=name, free_weights=free_weights)
    round_linears(model, name, 64 if name == "w4" else -1)
    return FusedRunner(model, blocks, 16, dtype="bfloat16", int8_head=True, free_weights=free_weights)


def measure(config, name, batches, reps, steps):
    """Print one JSON line: for each batch the seconds of a decode and of a prefill, and what they read and compute."""
    model, _ = load_model(config)
    c, weights = model.config, model.active_weights
    head = c.vocab_size * c.hidden_size
    runner = runner_of(model, name, max(batches), free_weights=name != "layers")
    size = 4 * weights if name == "layers" else runner.packed.packed_bytes
    width = 2 if name in ("bfloat16", "w8", "w4", "a8w8") else 4
    generator, rows = np.random.default_rng(0), []
    for batch in batches:
        texts = [
            TokenSequence(
                generator.integers(3, 4000, PROMPT + steps).tolist(), PROMPT, blocks=list(range(at, at + BLOCKS))
            )
            for at in range(0, BLOCKS * batch, BLOCKS)
        ]

        def timed(part, start, count):
            began = time.perf_counter()
            runner.run([ScheduledTokens(text, start, count) for text in part])
            return time.perf_counter() - began

        part, decode, prefill = texts[:AT_ONCE], [], []
        for _ in range(reps):
            prefill.append(timed(part, 0, PROMPT))
            decode += [timed(texts, PROMPT + i, 1) for i in range(steps)]
        cache = batch * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width * (PROMPT + steps // 2)
        tokens = len(part) * PROMPT
        rows.append(
            {
                "batch": batch,
                "decode_s": float(np.median(decode)),
                "prefill_s": float(np.median(prefill)),
                "prefill_tokens": tokens,
                "bytes": size + cache,
                "decode_flop": 2 * weights * batch,
                "prefill_flop": 2 * (weights - head) * tokens + 2 * head * len(part),
            }
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with open("/proc/self/status", encoding="utf-8") as file:
        after = next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))
    print(json.dumps({"rows": rows, "packed_mb": size / 1e6, "peak_mb": peak, "after_mb": after}))


def limits():
    """Bytes per second of reading, and {format: operations per second in registers}."""
    cpu, memory = kernels._module("cpu"), paddle.zeros([64 << 20])
    found = [max(cpu.peak(memory, what) for _ in range(5)) for what in range(6)]
    float32, bfloat16, int8, amx_bfloat16, amx_int8, read = found
    rates = dict.fromkeys(("layers", "float32"), float32) | {"bfloat16": max(bfloat16, amx_bfloat16)}
    return read, rates | dict.fromkeys(("w8", "w4", "a8w8"), max(int8, amx_int8))


def show_table(options):
    """A row of Markdown for each format and batch."""
    read, rates = limits()
    print(f"reading memory: {read / 1e9:.1f} GB/s\n")
    print(
        "| format | batch | decode tokens/s | GB/s | GFLOP/s | prefill tokens/s | GFLOP/s | packed, resident, peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.formats:
        command = [sys.executable, __file__, "--config", options.config, "--child", name]
        command += ["--batch", *map(str, options.batch), "--reps", str(options.reps), "--steps", str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        memory = f"{found['packed_mb']:.0f}, {found['after_mb']:.0f}, {found['peak_mb']:.0f}"
        for row in found["rows"]:
            decode, prefill = row["decode_s"], row["prefill_s"]
            gigabytes = f"{row['bytes'] / decode / 1e9:.1f} ({row['bytes'] / decode / read:.0%})"
            flops = row["decode_flop"] / decode, row["prefill_flop"] / prefill
            work = [f"{flop / 1e9:,.0f} ({flop / rates[name]:.0%})" for flop in flops]
            decoded, prefilled = row["batch"] / decode, row["prefill_tokens"] / prefill
            cells = f"{decoded:,.0f} | {gigabytes} | {work[0]} | {prefilled:,.0f} | {work[1]} | {memory}"
            print(f"| {name} | {row['batch']} | {cells} |", flush=True)


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
    parser.add_argument("--config", default="A", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="decodes after each prefill")
    parser.add_argument("--rounding", action="store_true", help="compare logits instead")
    parser.add_argument("--child", choices=FORMATS, help="measure this format and print JSON")
    options = parser.parse_args(argv)
    kernels.configure("cpu")
    if options.child:
        measure(options.config, options.child, options.batch, options.reps, options.steps)
    elif options.rounding:
        show_rounding(FORMATS)
    else:
        show_table(options)


if __name__ == "__main__":
    main()
