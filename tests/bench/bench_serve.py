"""How fast this repository answers, by the contract by which the project times what a user would use instead.

    python tests/bench/bench_serve.py --task generate --config B --dtype fp32 --batch 16    # 128 in, 128 out, greedy
    python tests/bench/bench_serve.py --task generate --config A --dtype bf16 --mode wint8
    python tests/bench/bench_serve.py --task generate --config B --dtype fp32 --profile         # where the time goes
    python tests/bench/bench_serve.py --config A --dtype bf16 --batch 64 --sampling             # with every penalty

Models: as in bench_train.py, read from $PEERS/models/NAME (default ~/.cache/llm-peers) if they are there, else drawn
here in the same shape. A mode rounds the linears of the blocks to integers in memory, to nearest, by output channel
(wint4: in groups of 64): wint8 and wint4 the weights alone, a8w8 the activations of each token as well. The head is
rounded to 8 bits with them. With --dtype bf16, floats that remain are bfloat16, and the inputs of wint8 and wint4 are
rounded to int8 too (see serving/fused.py); with fp32 they run the model's layers. The prompts go
through the engine of serve.py, all at once. around_percent is the share of the time that is not the runner's: scheduler
and sampler, and with a tokenizer (--tokenizer FOLDER) the text. The last line of the output is one JSON object; the
first repetition does not count."""

import argparse
import cProfile
import json
import os
import pstats
import resource
import sys
import time

import paths  # noqa: F401

THREADS = 2
if __name__ == "__main__":  # read once, when Paddle is first imported; its own default is one thread
    os.environ["OMP_NUM_THREADS"] = str(THREADS)

import kernels

import numpy as np
import paddle
from bench_train import SHAPES, load_model, summary

from formats.tokenizer import load_tokenizer
from serving.engine import Engine
from serving.offline import measure
from serving.runners import round_linears

SAMPLING = {"greedy": {}, "temperature": {"temperature": 0.8}}  # each with what the one before has
SAMPLING["top_p"] = SAMPLING["temperature"] | {"top_p": 0.95}
SAMPLING["penalties"] = SAMPLING["top_p"] | {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
}
SAMPLING["reports"] = SAMPLING["penalties"] | {"logprobs": 2, "stop": ("\n\nUser:", "<|user|>")}
SCHEMES = {"": None, "wint8": "w8", "wint4": "w4", "a8w8": "a8w8"}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="generate", choices=["generate"])
    parser.add_argument("--config", default="A", choices=list(SHAPES))
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--mode", default="", choices=list(SCHEMES), help="integers in the blocks' linears")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--prompt", type=int, default=128, help="ids of a prompt")
    parser.add_argument("--new", type=int, default=128, help="ids of a reply")
    parser.add_argument("--reps", type=int, default=3, help="timed repetitions, after a warm-up")
    parser.add_argument("--kernels", default="auto", help="back ends, see kernels/__init__.py")
    kinds = {"nargs": "?", "const": "penalties", "default": "greedy", "choices": list(SAMPLING)}
    parser.add_argument("--sampling", **kinds, help="without a value: temperature, top_p and three penalties")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, which then makes the replies' text")
    parser.add_argument("--profile", action="store_true", help="Python's profile of one more repetition, on stderr")
    options = parser.parse_args(argv)
    if min(options.batch, options.prompt, options.reps) < 1 or options.new < 2:
        parser.error("--batch, --prompt and --reps must be at least 1, --new at least 2")
    return options


def timed(runner):
    """A list that grows by the seconds of each step of the runner."""
    inside, run = [], runner.run

    def timed_run(scheduled):
        start = time.perf_counter()
        logits = run(scheduled)
        inside.append(time.perf_counter() - start)
        return logits

    runner.run = timed_run
    return inside


def main(argv=None):
    """Run the task; prints and returns its result."""
    options = parse(argv)
    kernels.configure("cpu", options.kernels)
    paddle.base.core.set_num_threads(THREADS)
    print(f"kernels: {kernels.describe()}")
    model, source = load_model(options.config)
    if SCHEMES[options.mode]:
        round_linears(model, SCHEMES[options.mode], 64 if options.mode == "wint4" else -1)
    batch, prompt, new = options.batch, options.prompt, options.new
    blocks = batch * -(-(prompt + new) // 16) + 1
    limits = {"max_num_seqs": batch, "max_num_batched_tokens": batch * prompt, "max_queue": batch}
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.dtype]
    engine = Engine(
        model,
        load_tokenizer(options.tokenizer) if options.tokenizer else None,
        num_blocks=blocks,
        block_size=16,
        dtype=dtype,
        int8_head=options.mode != "" and dtype == "bfloat16",
        **limits,
    )
    generator = np.random.default_rng(3)
    prompts = generator.integers(10, SHAPES[options.config]["vocab_size"], (batch, prompt)).tolist()
    prefill, decode, whole, around = [], [], [], []
    sampling = SAMPLING[options.sampling]
    inside = timed(engine.runner)
    for i in range(options.reps + 1):
        inside.clear()
        first, last = measure(engine, prompts, new, **sampling)
        print(f"{f'rep {i}' if i else 'warm-up'}: first tokens after {first:.3f} s, all after {last:.3f} s", flush=True)
        if i:
            prefill.append(batch * prompt / first)
            decode.append(batch * (new - 1) / (last - first))
            whole.append(batch * new / last)
            around.append(100 * (1 - sum(inside) / last))
    assert engine.totals["generation_tokens"] == (options.reps + 1) * batch * new and not engine.totals["preemptions"]
    if options.profile:
        with cProfile.Profile() as profile:
            measure(engine, prompts, new, **sampling)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    result = {
        "peer": "ours",
        "task": options.task,
        "config": options.config,
        "dtype": options.dtype,
        "mode": options.mode,
        "threads": THREADS,
        "batch": batch,
        "prefill_tok_s": summary(prefill),
        "decode_tok_s": summary(decode),
        "e2e_new_tok_s": summary(whole),
        "sampling": sampling,
        "around_percent": summary(around),
        "weights": source,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "load": [round(x, 2) for x in os.getloadavg()],
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
