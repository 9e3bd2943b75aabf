"""How fast this repository trains, by the contract by which the project times what a user would use instead.

    python tests/bench/bench_train.py --task train_full --config A --dtype fp32            # one AdamW step, 4 x 512 ids
    python tests/bench/bench_train.py --task train_lora --config B --dtype fp32            # the same, LoRA of rank 8
    python tests/bench/bench_train.py --task train_lora --model FOLDER --weight_quantize_algo nf4 --batch 2 --seq 256
    python tests/bench/bench_train.py --task sft --config B --mode zero_padding --profile  # an epoch of ragged samples
    python tests/bench/bench_train.py --task dpo --config B                                # an epoch of pairs

Models: Llamas of random weights, A (134 M), B (5 M) and C (494 M), read from $PEERS/models/NAME (PEERS: by default
~/.cache/llm-peers) if they exist, else drawn here in the same shape: the speed does not depend on the weights, and
`weights` in the result says which it was. --model: any other, a folder. The last line of the output is one JSON object;
tok_s counts the batch's ids, eff_tok_s only those that are not padding. --dtype bf16 multiplies in bfloat16; where the
processor cannot, `compute` says fp32.

Modes of sft, each over the same samples: `padding` (8 samples a batch in the order of the file, padded to the longest),
`grouped` (the same, 8 of similar length, as finetune.py does without zero_padding), `zero_padding` (best-fit rows of
1,024, two a batch).

dpo: all weights, with a frozen second model that runs at every step; four pairs a step, packed into one row by dpo.py's
rules. eff_tok_s counts a prompt twice, as a trainer does that has one sequence per reply.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import paths  # noqa: F401

THREADS = min(2, len(os.sched_getaffinity(0)))
if __name__ == "__main__":  # read once, when Paddle is first imported; its own default is one thread
    os.environ["OMP_NUM_THREADS"] = str(THREADS)

import kernels

import numpy as np
import paddle
from paddle.autograd import PyLayer

import dpo
import parallel
import trainer
from adapters import apply_lora, cast_frozen_to_bf16, trainable_weights
from alignment.preference import loss_and_metrics, pair_counts, reply_logps
from arguments import TrainingArgs
from data import IGNORED, SFTLoader, collate_pairs, pair_sample
from families import ModelConfig
from formats.weights import init_weights
from model import block_linears, build
from modules.low_bit import ALGORITHMS, LowBit, round_base

SHAPES = {
    "A": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
              intermediate_size=2048, vocab_size=32000),
    "B": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
              intermediate_size=688, vocab_size=4096),
    "C": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
              intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True),
}  # fmt: skip
COMMON = dict(model_type="llama", max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0)
MAX_LENGTH = 1024  # of a sample, and of a packed row


# ================================================================================== samples, model, optimizer


def random_ids(config, size, generator):
    """Ids as the peers draw them: any but the first ten."""
    return generator.integers(10, SHAPES[config]["vocab_size"], size)


class Samples:
    """What SFTLoader needs of an SFTDataset, over samples that are ids already: the second half of each is the reply.

    Lengths are lognormal with mean 180 and sigma 0.8, from 16 to 1,024; 32 of them for A, 64 for B.
    """

    def __init__(self, config):
        n = 32 if config == "A" else 64
        mu = np.log(180.0) - 0.8**2 / 2
        self.lengths = np.clip(np.random.default_rng(0).lognormal(mu, 0.8, n), 16, MAX_LENGTH).astype(int)
        generator = np.random.default_rng(1)
        self.ids = [random_ids(config, length, generator) for length in self.lengths]

    def __len__(self):
        return len(self.ids)

    def sample(self, i):
        """(input_ids, labels), both (length,); the last position has no target but is computed, as the peers do."""
        return self.ids[i], next_ids(self.ids[i], len(self.ids[i]) // 2)


class Pairs:
    """Preference pairs that are ids already: 16 for A, 32 for B; lengths are lognormal with mean 90, from 8 to 512."""

    def __init__(self, config):
        n = 16 if config == "A" else 32
        mu = np.log(90.0) - 0.8**2 / 2
        drawn = [np.random.default_rng(seed).lognormal(mu, 0.8, n) for seed in (10, 11, 12)]
        lengths = np.clip(drawn, 8, 512).astype(int)  # (prompt, chosen, rejected) x pairs
        generator = np.random.default_rng(2)
        self.pairs = [tuple(random_ids(config, length, generator) for length in each) for each in zip(*lengths)]
        self.tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in self.pairs)

    def batch(self, first, count):
        """`count` pairs as one row without padding."""
        chosen = range(first, min(first + count, len(self.pairs)))
        width = sum(len(part) for i in chosen for part in self.pairs[i]) - len(chosen)
        return collate_pairs([chosen], lambda i: pair_sample(*self.pairs[i]), width, 0)


def next_ids(ids, first=0):
    """(..., T) ids -> labels (..., T): the next id wherever that is at position `first` or later."""
    labels = np.full(ids.shape, IGNORED, np.int64)
    start = max(first - 1, 0)
    labels[..., start:-1] = ids[..., start + 1 :]
    return labels


def load_model(config, folder=None, low_bit=None):
    """(model, where its weights are from)"""
    if folder is None:
        folder = Path(os.environ.get("PEERS", "~/.cache/llm-peers")).expanduser() / "models" / config
    if (Path(folder) / "config.json").is_file():
        return parallel.from_pretrained(folder, parallel.SINGLE, low_bit=low_bit), str(folder)
    model = build(ModelConfig.from_dict({**COMMON, **SHAPES[config]}))
    init_weights(model, seed=0)
    if low_bit is not None:
        round_base(block_linears(model), low_bit)
    return model, "drawn"


def token_loss(model, batch):
    """The mean loss of a batch's targets."""
    return model(**trainer.model_inputs(batch)).sum() / int((batch["labels"] != IGNORED).sum())


def pair_loss(reference):
    """function(model, batch): the mean loss of a batch's pairs against this frozen model."""
    args = dpo.Args(beta=0.1)

    def loss(model, batch):
        with paddle.no_grad():
            base = reply_logps(reference, batch)
        counts = pair_counts([batch])
        return loss_and_metrics(reply_logps(model, batch), base, batch["reply_tokens"], counts, args)[0]

    return loss


@paddle.no_grad()
def global_grad_norm(weights):
    """Euclidean norm over all gradients of these weights; squares are summed in float64."""
    gradients = [weight.parameter.grad for weight in weights]
    squares = [kernels.squared_norm(gradient) for gradient in gradients if gradient is not None]
    return math.sqrt(float(paddle.stack(squares).sum())) if squares else 0.0


def training_step(model, weights, optimizer, batch, args, loss_of):
    """One optimizer step on a batch, as in the scripts; returns its loss."""
    loss = loss_of(model, batch)
    loss.backward()
    clip = args.max_grad_norm
    scale = trainer.clip_scale(global_grad_norm(weights), clip) if clip else 1.0
    optimizer.step(args.learning_rate, scale)
    optimizer.zero_grad()
    return float(loss)


# =================================================================================================== profile


class Profile:
    """Wall time of every op of the kernels shim, forward, and backward where its gradient is a PyLayer of ours.

    Paddle on the CPU finishes each op before it starts the next, so clocks around the calls are exact. What is left of
    backward is Paddle's own gradients: those of linear (matmul), swiglu, the residual additions and the embedding.
    """

    def __init__(self):
        self.seconds, self.calls, self.inside = {}, {}, []  # inside: seconds of what each running op has called

    def timed(self, name, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            self.inside.append(0.0)
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds - self.inside.pop()
            if self.inside:
                self.inside[-1] += seconds
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return run

    @contextlib.contextmanager
    def clocks(self, model):
        """While inside, all of it is timed."""
        with contextlib.ExitStack() as stack:
            table = {}
            for op, (function, *rest) in kernels._table.items():
                table[op] = (self.timed("adamw" if op == "adamw" else f"forward  {op}", function), *rest)
            stack.enter_context(mock.patch.dict(kernels._table, table))
            for module in {sys.modules[f"kernels.{backend}"] for _, backend, _ in kernels._table.values()}:
                for name, layer in vars(module).items():
                    if isinstance(layer, type) and issubclass(layer, PyLayer) and layer is not PyLayer:
                        clock = staticmethod(self.timed(f"backward {name}", layer.backward))
                        stack.enter_context(mock.patch.object(layer, "backward", clock))
            for owner, name, label in (
                (model, "forward", "forward the rest"),
                (paddle.Tensor, "backward", "backward the rest"),
                (sys.modules[__name__], "global_grad_norm", "gradient norm"),
            ):
                clock = self.timed(label, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, clock))
            yield

    def print(self, total):
        self.seconds["outside these"] = total - sum(self.seconds.values())
        for name, seconds in sorted(self.seconds.items(), key=lambda row: -row[1]):
            calls = self.calls.get(name, "-")
            print(f"{100 * seconds / total:5.1f} %  {seconds:8.3f} s  {calls:>6}  {name}", file=sys.stderr)
        print(f"100.0 %  {total:8.3f} s          all of the timed repetitions", file=sys.stderr)


# ================================================================================================== the tasks


def workload(options, vocab_size):
    """(function of a repetition's number that yields its batches, 0 the warm-up; real tokens of a repetition)"""
    if options.task == "sft":
        samples = Samples(options.config)
        packed = options.mode == "zero_padding"
        rows = options.batch or (2 if packed else 8)
        loader = SFTLoader(samples, rows, MAX_LENGTH, packed, packed, seed=0, shuffle=options.mode != "padding")
        steps = range(loader.batches_per_epoch)
        return lambda i: (loader.batch(i, index) for index in steps), int(samples.lengths.sum())
    if options.task == "dpo":
        pairs, count = Pairs(options.config), options.batch or 4
        return lambda i: (pairs.batch(first, count) for first in range(0, len(pairs.pairs), count)), pairs.tokens
    ids = np.random.default_rng(3).integers(10, vocab_size, (options.batch or 4, options.seq))
    batch = {"input_ids": ids, "labels": next_ids(ids)}
    return lambda i: [batch] if i else [batch, batch], ids.size  # two steps of warm-up, as the peers


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=["train_full", "train_lora", "sft", "dpo"])
    parser.add_argument("--config", default="A", choices=list(SHAPES))
    parser.add_argument("--model", metavar="FOLDER", help="of train_*: a model in place of --config")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--weight_quantize_algo", choices=list(ALGORITHMS), help="of train_lora: QLoRA's base")
    modes = ["", "padding", "grouped", "zero_padding"]
    parser.add_argument("--mode", default="", choices=modes, help="of sft; default padding")
    parser.add_argument("--reps", type=int, default=3, help="timed steps, or epochs of sft and dpo, after a warm-up")
    parser.add_argument("--batch", type=int, default=0, help="rows or pairs a batch; 0: 4, for sft 8 or 2 packed rows")
    parser.add_argument("--seq", type=int, default=512, help="ids of a row of train_*")
    parser.add_argument("--kernels", default="auto", help="back ends, see kernels/__init__.py")
    parser.add_argument("--profile", action="store_true", help="where the time goes, on stderr")
    parser.add_argument("--in_turns", action="store_true", help="each repetition waits for a line on stdin")
    options = parser.parse_args(argv)
    if options.task != "sft" and options.mode:
        parser.error("--mode is for sft")
    if options.model and not options.task.startswith("train_"):
        parser.error("--model is for train_full and train_lora")
    if options.weight_quantize_algo and options.task != "train_lora":
        parser.error("--weight_quantize_algo is for train_lora")
    options.mode = options.mode or ("padding" if options.task == "sft" else "")
    return options


def summary(rates):
    """{"median", "min", "max", "n"}"""
    found = {name: round(f(rates), 2) for name, f in (("median", statistics.median), ("min", min), ("max", max))}
    return {**found, "n": len(rates)}


def main(argv=None):
    """Run one task; prints and returns its result."""
    options = parse(argv)
    kernels.configure("cpu", options.kernels, options.dtype == "bf16")
    paddle.base.core.set_num_threads(THREADS)
    print(f"kernels: {kernels.describe()}")
    low_bit = LowBit(options.weight_quantize_algo) if options.weight_quantize_algo else None
    model, source = load_model(options.config, options.model, low_bit)
    if options.task == "train_lora":
        apply_lora(model, rank=8, alpha=16)
        if kernels.bf16:
            cast_frozen_to_bf16(model)
    model.train()
    weights = trainable_weights(model)
    epochs = options.task in ("sft", "dpo")
    loss_of = pair_loss(load_model(options.config)[0]) if options.task == "dpo" else token_loss
    decay, clip = (0.0, 1.0) if epochs else (0.01, 0.0)  # as the peers' trainers and bare steps have them
    args = TrainingArgs(learning_rate=1e-4, weight_decay=decay, max_grad_norm=clip)
    optimizer = trainer.AdamW(weights, args)
    batches, tokens = workload(options, model.config.vocab_size)
    profile, seconds, losses = Profile(), [], []
    for i in range(options.reps + 1):
        if options.in_turns and i:
            sys.stdin.readline()
        with profile.clocks(model) if options.profile and i else contextlib.nullcontext():
            start = time.perf_counter()  # making and collating the batches counts
            found = [training_step(model, weights, optimizer, batch, args, loss_of) for batch in batches(i)]
            took = time.perf_counter() - start
        losses.append(statistics.mean(found) if epochs else found[0])
        name = f"rep {i}" if i else "warm-up"
        print(f"{name}: {len(found)} steps, {took:.3f} s, loss {losses[-1]:.5f}", flush=True)
        seconds += [took] if i else []
    assert np.isfinite(losses).all() and losses[-1] < losses[0], f"the loss must fall: {losses}"
    if options.profile:
        profile.print(sum(seconds))
    result = {
        "peer": "ours",
        "task": options.task,
        "config": options.config,
        "dtype": options.dtype,
        "mode": options.mode,
        "base": options.weight_quantize_algo,
        "threads": THREADS,
        "eff_tok_s" if epochs else "tok_s": summary([tokens / took for took in seconds]),
        "seconds": seconds,
        "compute": "bf16" if kernels.bf16 else "fp32",
        "weights": source,
        "tokens": tokens,
        "positions": sum(batch["input_ids"].size for batch in batches(options.reps)),
        "steps": len(found),
        "trainable": sum(int(np.prod(w.shape)) for w in weights),
        "loss": [round(losses[0], 5), round(losses[-1], 5)],
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
