"""Measures every op of kernels/ on this machine, beside the machine's peak.

    python tests/bench/ops.py                            # about 20 seconds
    python tests/bench/ops.py --device gpu:1 --kernels reference

A rate is in operations per second (a multiply-add is two) or in bytes per second, counting only necessary work: a
matrix that is read twice counts once. The share is of the peak that was measured first, in registers or by a pass over
memory larger than the caches, with all threads of this process.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import paths  # noqa: F401

import kernels

import numpy as np
import paddle

from formats.files import UserError


class Case(NamedTuple):
    """One measurement."""

    shape: str  # in words
    part: str  # forward, backward, dx, dw, …
    kind: str  # the peak that it is compared with: memory, float32, bfloat16, int8
    work: float  # bytes (memory) or operations per call
    run: Callable  # without arguments; returns its results


# ------------------------------------------------------------------------------------------------- what is timed


def values(*shape):
    return paddle.randn(list(shape))


def in_products_of(kind, function, inputs):
    """function(*inputs) with products of this kind, in forward and in backward of the result."""
    before, kernels.bf16 = kernels.bf16, kind == "bfloat16"
    try:
        return function(*inputs)
    finally:
        kernels.bf16 = before


def without_gradients(kind, function, inputs):
    with paddle.no_grad():
        return in_products_of(kind, function, inputs)


def timed(shape, kind, function, inputs, parts):
    """Cases of function(*inputs). parts: {name: (work, the indices of the inputs whose gradients are made; None:
    forward)}.

    Forward is that of a run without gradients: a graph that no backward follows would only fill the memory.
    """
    for part, (work, chosen) in parts.items():
        leaves = [tensor.detach() for tensor in inputs]
        if chosen is None:
            yield Case(shape, part, kind, work, lambda leaves=leaves: without_gradients(kind, function, leaves))
            continue
        for i in chosen:
            leaves[i].stop_gradient = False
        out = in_products_of(kind, function, leaves)
        upstream, leaves_with_grad = values(*out.shape), [leaves[i] for i in chosen]
        run = lambda args=(out, leaves_with_grad, upstream): paddle.grad(*args, retain_graph=True)
        yield Case(shape, part, kind, work, run)


def pointwise(shape, function, inputs, moved):
    """Cases of an op that memory limits, with the gradients of all inputs; moved: bytes forward and backward."""
    every = range(len(inputs))
    return timed(shape, "memory", function, inputs, {"forward": (moved[0], None), "backward": (moved[1], every)})


def rms_norm(rows=4096, D=1024):
    n = 4 * rows * D
    function = lambda x, weight: kernels.rms_norm(x, weight, 1e-5)
    yield from pointwise(f"{rows} x {D}", function, [values(rows, D), values(D)], (2 * n, 3 * n))


def layer_norm(rows=4096, D=1024):
    n = 4 * rows * D
    function = lambda x, weight, bias: kernels.layer_norm(x, weight, bias, 1e-5)
    yield from pointwise(f"{rows} x {D}", function, [values(rows, D), values(D), values(D)], (2 * n, 3 * n))


def rope(T=4096, heads=12, Dh=64):
    x, tables = values(1, T, heads, Dh), [values(1, T, 1, Dh) for _ in range(2)]
    yield from pointwise(f"{T} x {heads} x {Dh}", lambda x: kernels.rope(x, *tables), [x], (8 * x.size, 8 * x.size))


def swiglu(rows=2048, F=2048):
    n = 4 * rows * F
    yield from pointwise(f"{rows} x {F}", kernels.swiglu, [values(rows, F) for _ in range(2)], (3 * n, 5 * n))


def geglu(rows=2048, F=2048):
    n = 4 * rows * F
    yield from pointwise(f"{rows} x {F}", kernels.geglu, [values(rows, F) for _ in range(2)], (3 * n, 5 * n))


def gelu(rows=2048, F=2048):
    n = 4 * rows * F
    yield from pointwise(f"{rows} x {F}", kernels.gelu, [values(rows, F)], (2 * n, 3 * n))


def embedding(tokens=4096, V=8000, D=768):
    ids = paddle.randint(0, V, [tokens])
    moved = 8 * tokens * D, 4 * (tokens + V) * D
    yield from pointwise(f"{tokens} of {V} x {D}", lambda weight: kernels.embedding(ids, weight), [values(V, D)], moved)


def linear(M=2048, K=768, N=2048, kind="float32", frozen=False):
    """x (M, K) times weight (K, N); frozen: a weight without gradient, stored in bfloat16 where the products are, as
    training does."""
    work = 2.0 * M * K * N
    if frozen:
        parts = {"forward": (work, None), "dx": (work, [0])}
    else:
        parts = {"forward": (work, None), "dw": (work, [1]), "dx, dw": (2 * work, [0, 1])}
    shape = f"{M} x {K} x {N}" + (", weight frozen" if frozen else "")
    weight = values(K, N) * K**-0.5
    inputs = [values(M, K), weight.astype("bfloat16") if frozen and kind == "bfloat16" else weight]
    yield from timed(shape, kind, kernels.linear, inputs, parts)


def lora_linear(M=2048, K=768, N=2048, R=8, kind="float32"):
    base, adapter = 2.0 * M * K * N, 2.0 * M * R * (K + N)
    weight = values(K, N) * K**-0.5
    function = lambda x, a, b: kernels.lora_linear(x, weight, a, b, 2.0)
    parts = {"forward": (base + adapter, None), "backward": (base + 2 * adapter, [0, 1, 2])}
    inputs = [values(M, K), values(K, R), values(R, N)]
    yield from timed(f"{M} x {K} x {N}, rank {R}", kind, function, inputs, parts)


def quant_linear(rows=1, n_in=4096, n_out=4096, group=128):
    for bits in (4, 8):
        codes = paddle.randint(-(2**31), 2**31 - 1, [n_in * bits // 32, n_out], "int64").astype("int32")
        scales, zeros = values(n_in // group, n_out).abs() * 1e-3, codes[: n_in // group, : n_out * bits // 32]
        x = values(rows, n_in)
        run = lambda x=x, args=(codes, scales, None, f"w{bits}", zeros.contiguous()): kernels.quant_linear(x, *args)
        yield Case(f"{rows} x {n_in} x {n_out}", f"w{bits}", "memory", n_in * n_out * bits / 8 + 4 * scales.size, run)
    M, K, N = 512, 2048, 2048
    x, codes, scales = values(M, K), paddle.randint(-127, 128, [K, N]).astype("int8"), values(N).abs() * 1e-3
    run = lambda: kernels.quant_linear(x, codes, scales, None, "a8w8")
    yield Case(f"{M} x {K} x {N}", "a8w8", "int8", 2.0 * M * K * N, run)


def dequantize_table(n_in=4096, n_out=4096, group=64):
    values = paddle.rand([16])
    codes = paddle.randint(0, 256, [n_in * n_out // 2], dtype="int32").astype("uint8")
    scales = paddle.rand([n_in * n_out // group])
    for part, transposed, kind in (
        ("forward", False, "float32"),
        ("transposed", True, "float32"),
        ("transposed, bf16", True, "bfloat16"),
    ):
        run = lambda how=(transposed, kind): kernels.dequantize_table(codes, scales, values, n_in, n_out, *how)
        size = n_in * n_out * (0.5 + (2 if kind == "bfloat16" else 4) + 4 / group)
        yield Case(f"{n_in} x {n_out}, nf4", part, "memory", size, run)


def attention(T=2048, H=12, Dh=64, document=None, kind="float32"):
    """Causal; with document, the row holds documents of so many tokens that do not see each other."""
    length = document or T
    ends = np.minimum(np.arange(T) // length * length + length, T).astype("int32").reshape(1, 1, T, 1)
    rows = paddle.to_tensor(ends) if document else None
    pairs = sum(n * (n + 1) // 2 for n in np.bincount(np.arange(T) // length))
    shape = f"{T} x {H} x {Dh}, causal" + (f", documents of {document}" if document else "")
    work = 4.0 * Dh * H * pairs
    function = lambda q, k, v: kernels.attention(q, k, v, rows)
    parts = {"forward": (work, None), "backward": (2.5 * work, range(3))}
    yield from timed(shape, kind, function, [values(1, T, H, Dh) for _ in range(3)], parts)


def attention_with_lse(T=2048, H=12, Dh=64):
    """Two chunks of a ring: queries behind all of these keys."""
    q, k, v = (values(1, T, H, Dh) for _ in range(3))
    run = lambda: kernels.attention_with_lse(q, k, v, None, T)
    yield Case(f"{T} x {H} x {Dh}", "forward", "float32", 4.0 * T * T * H * Dh, run)


def attention_with_lse_backward(T=2048, H=12, Dh=64):
    q, k, v, d_out = (values(1, T, H, Dh) for _ in range(4))
    out, lse = kernels.attention_with_lse(q, k, v, None, T)
    run = lambda: kernels.attention_with_lse_backward(q, k, v, out, lse, d_out, None, T)
    yield Case(f"{T} x {H} x {Dh}", "backward", "float32", 10.0 * T * T * H * Dh, run)


def paged_attention(sequences=8, context=1024, H=12, K=4, Dh=64, block=16):
    per_sequence = context // block
    q = values(sequences, H, Dh)
    pools = [values(sequences * per_sequence, block, K, Dh) for _ in range(2)]
    tables = np.arange(sequences * per_sequence, dtype=np.int32).reshape(sequences, -1)
    lengths = np.ones(sequences, np.int64), np.full(sequences, context)
    run = lambda: kernels.paged_attention(q, *pools, tables, *lengths)
    yield Case(f"{sequences} x {context}, {K} heads x {Dh}", "decode", "memory", 8.0 * pools[0].size, run)


def write_cache(tokens=2048, K=4, Dh=64, block=16):
    k, v = values(tokens, K, Dh), values(tokens, K, Dh)
    pools = [paddle.zeros([tokens // block, block, K, Dh]) for _ in range(2)]
    slots = paddle.arange(tokens, dtype="int64")

    def run():
        kernels.write_cache(k, v, *pools, slots)
        return pools

    yield Case(f"{tokens} tokens, {K} heads x {Dh}", "write", "memory", 16.0 * k.size, run)


def sample(rows=8, V=32000):
    logits, uniform = values(rows, V), np.random.default_rng(0).random(rows)
    parameters = np.full(rows, 0.8), np.full(rows, 50), np.full(rows, 0.9), uniform  # temperature, top_k, top_p
    yield Case(f"{rows} x {V}", "draw", "memory", 4.0 * rows * V, lambda: kernels.sample(logits, *parameters))


def log_probabilities(rows=8, V=32000, count=5):
    logits, ids, temperature = values(rows, V), np.arange(rows), np.ones(rows)
    run = lambda: kernels.log_probabilities(logits, ids, temperature, count)
    yield Case(f"{rows} x {V}", "report", "memory", 4.0 * rows * V, run)


def linear_cross_entropy(N=512, D=768, V=32000, kind="float32"):
    hidden, weight, labels = values(N, D), values(D, V) * D**-0.5, paddle.randint(0, V, [N])
    work = 2.0 * N * D * V
    function = lambda hidden, weight: kernels.linear_cross_entropy(hidden, weight, labels)
    parts = {"forward": (work, None), "backward": (3 * work, range(2))}  # backward makes the logits once more
    yield from timed(f"{N} x {D} x {V}", kind, function, [hidden, weight], parts)


def adamw(size=1 << 22):
    parameter, gradient, moment1, moment2 = (values(size) for _ in range(4))
    moment2 = moment2.abs()

    def run():
        kernels.adamw(parameter, gradient, moment1, moment2, 9, 1e-4, 0.9, 0.95, 1e-8, 0.01, 0.5)
        return parameter, moment1, moment2

    yield Case(f"{size / 1e6:.1f} M", "step", "memory", 28.0 * size, run)


def squared_norm(size=1 << 22):
    x = values(size)
    yield Case(f"{size / 1e6:.1f} M", "forward", "memory", 4.0 * size, lambda: kernels.squared_norm(x))


CASES = {  # op -> its cases; every op of kernels.OPS
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rope": rope,
    "swiglu": swiglu,
    "geglu": geglu,
    "gelu": gelu,
    "embedding": embedding,
    "linear": linear,
    "lora_linear": lora_linear,
    "quant_linear": quant_linear,
    "dequantize_table": dequantize_table,
    "attention": attention,
    "attention_with_lse": attention_with_lse,
    "attention_with_lse_backward": attention_with_lse_backward,
    "paged_attention": paged_attention,
    "write_cache": write_cache,
    "sample": sample,
    "log_probabilities": log_probabilities,
    "linear_cross_entropy": linear_cross_entropy,
    "adamw": adamw,
    "squared_norm": squared_norm,
}
IN_BFLOAT16 = {  # again, with products in bfloat16
    "linear": [linear, functools.partial(linear, frozen=True)],
    "lora_linear": [lora_linear],
    "attention": [attention],
    "linear_cross_entropy": [linear_cross_entropy],
}


# ---------------------------------------------------------------------------------------------------- measuring


def wait():
    """Wait for the device; not needed on a CPU."""
    if kernels._kind() != "cpu":
        paddle.device.synchronize()


def turn(run, at_least=0.03):
    """Seconds per call, the mean over calls of at least `at_least` seconds in total."""
    calls, start = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        wait()
        passed = time.perf_counter() - start
        if passed >= at_least:
            return passed / calls


def measure(run, turns=5, at_most=1.0):
    """Median seconds per call over several turns after a warm-up; stops after `at_most` seconds."""
    turn(run, 0.0)
    found, start = [], time.perf_counter()
    while len(found) < turns and (not found or time.perf_counter() - start < at_most):
        found.append(turn(run))
    return statistics.median(found)


def peaks(turns=7):
    """({kind of a Case: highest rate, in operations or bytes per second}, the method).

    On a CPU by our loops (kernels/cpu/peak.cc); elsewhere, or without a compiler, by a large product and a copy.
    """
    found = {}
    if kernels._kind() == "cpu" and kernels._missing("cpu", "peak") is None:
        memory = paddle.ones([64 << 20])  # 256 MB
        kinds = ("float32", "bfloat16", "int8", "bfloat16", "int8", "memory", "memory")
        for what, kind in enumerate(kinds):
            rates = [kernels._module("cpu").peak(memory, what) for _ in range(turns)]
            found[kind] = max([found.get(kind, 0.0), *rates])
        return {kind: rate for kind, rate in found.items() if rate}, "register loops and passes over 256 MB"
    for kind in ("float32",) if kernels._kind() == "cpu" else ("float32", "bfloat16"):
        n = 2048
        a = values(n, n).astype(kind)
        found[kind] = 2.0 * n**3 / measure(lambda a=a: paddle.matmul(a, a), turns)
    memory = values(32 << 20)
    found["memory"] = 8.0 * memory.size / measure(memory.clone, turns)
    return found, "Paddle's product of 2048^3 and its copy of 128 MB"


# ----------------------------------------------------------------------------------------------------- printing


def hardware():
    """One line: Paddle, device, processor, threads, instruction sets."""
    parts = [f"Paddle {paddle.__version__}", paddle.get_device()]
    if kernels._kind() == "cpu" and sys.platform.startswith("linux"):
        with open("/proc/cpuinfo") as file:
            info = dict(line.split(":", 1) for line in file.read(10000).split("\n\n")[0].splitlines() if ":" in line)
        info = {key.strip(): value.strip() for key, value in info.items()}
        known = "avx2 fma avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16"
        known += " amx_tile amx_bf16 amx_int8"
        flags = info.get("flags", "").split()
        parts += [info.get("model name", "an unnamed processor"), f"{len(os.sched_getaffinity(0))} threads"]
        parts.append(" ".join(flag for flag in known.split() if flag in flags) or "no instruction set above SSE2")
    return " · ".join(parts)


def amount(kind, rate):
    """A rate with its unit."""
    unit = "GB/s" if kind == "memory" else "GOP/s" if kind == "int8" else "GFLOP/s"
    return f"{rate / 1e9:,.{0 if rate >= 1e11 else 1}f} {unit}"


def report(cases, peak_rates):
    """Measure each case and print its line."""
    for case in cases:
        seconds = measure(case.run)
        rate = case.work / seconds
        share = f"{rate / peak_rates[case.kind]:.0%} of {case.kind}" if case.kind in peak_rates else f"({case.kind})"
        print(
            f"  {case.part:10}{case.shape:46}{seconds * 1e3:9.2f} ms{amount(case.kind, rate):>14}   {share}", flush=True
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python tests/bench/ops.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="cpu, gpu, gpu:1, dcu, xpu, npu, …")
    parser.add_argument("--kernels", default="auto", help="reference, or op=back end, …: see kernels/__init__.py")
    options = parser.parse_args(argv)
    table = kernels.configure(options.device, options.kernels)
    no_bf16 = kernels.bf16_missing()
    print(hardware(), flush=True)
    peak_rates, method = peaks()
    print("peak: " + " · ".join(f"{kind} {amount(kind, rate)}" for kind, rate in peak_rates.items()) + f" ({method})\n")
    for op in kernels.OPS:
        backend, reason = table[op]
        print(f"{op}: {backend} ({reason})")
        report(CASES[op](), peak_rates)
        for make in () if no_bf16 else IN_BFLOAT16.get(op, ()):
            report(make(kind="bfloat16"), peak_rates)
    if no_bf16:
        print(f"no products in bfloat16: {no_bf16}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
