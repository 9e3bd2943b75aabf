"""Which back end runs each op here, why, and how fast it was just seen to be.

    python -m kernels                                    # about 20 seconds
    python -m kernels --device gpu:1 --kernels reference

A row's rate is in operations a second (a multiply-add is two) or in bytes a second, of those that the op cannot do without: a
matrix that it reads twice counts once. The share is of the peak that was measured before, on registers alone or by a pass
over memory that no cache holds, with all the threads that this process may use.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Callable, NamedTuple

import numpy as np
import paddle

import kernels
from data import UserError


class Case(NamedTuple):
    """Something to time."""

    shape: str  # in words
    part: str  # forward, backward, dx, dw, …
    kind: str  # which peak it is held against: memory, float32, bfloat16, int8
    work: float  # bytes (memory) or operations of a call
    run: Callable  # without arguments


# ------------------------------------------------------------------------------------------------- what is timed


def values(*shape):
    return paddle.randn(list(shape))


def in_products_of(kind, function, inputs):
    """function(*inputs) with products in bfloat16, or not; the backward of what it returns does as it did."""
    before, kernels.bf16 = kernels.bf16, kind == "bfloat16"
    try:
        return function(*inputs)
    finally:
        kernels.bf16 = before


def pair(shape, kind, work, function, inputs, wanted=None, names=("backward",), backward_work=None):
    """The case of function(*inputs), and one for the gradients of each of `wanted`, lists of inputs named by `names`."""
    yield Case(shape, "forward", kind, work, lambda: in_products_of(kind, function, inputs))
    for name, chosen in zip(names, wanted or [inputs]):
        for tensor in inputs:
            tensor.stop_gradient = not any(tensor is other for other in chosen)
        out = in_products_of(kind, function, inputs)
        upstream = values(*out.shape)

        def run(out=out, upstream=upstream, chosen=chosen):
            return paddle.grad(out, chosen, upstream, retain_graph=True)

        yield Case(shape, name, kind, backward_work or work, run)
    for tensor in inputs:
        tensor.stop_gradient = True


def rms_norm(rows=4096, D=1024):
    yield from pair(f"{rows} x {D}", "memory", 8 * rows * D, lambda x, weight: kernels.rms_norm(x, weight, 1e-5),
                    [values(rows, D), values(D)], backward_work=12 * rows * D)  # fmt: skip


def rope(T=4096, heads=12, Dh=64):
    x, tables = values(1, T, heads, Dh), [values(1, T, 1, Dh) for _ in range(2)]
    yield from pair(f"{T} x {heads} x {Dh}", "memory", 8 * x.size, lambda x: kernels.rope(x, *tables), [x])


def swiglu(rows=2048, F=2048):
    yield from pair(f"{rows} x {F}", "memory", 12 * rows * F, kernels.swiglu, [values(rows, F) for _ in range(2)],
                    backward_work=20 * rows * F)  # fmt: skip


def linear(M=2048, K=768, N=2048, kind="float32", frozen=False):
    """x (M, K) times weight (K, N); frozen: the weight never has a gradient, so that it may be kept packed."""
    x, weight = values(M, K), values(K, N) * K**-0.5
    weight.stop_gradient = frozen
    wanted, names = ([[x]], ["dx"]) if frozen else ([[x], [weight]], ["dx", "dw"])
    shape = f"{M} x {K} x {N}" + (", weight frozen" if frozen else "")
    yield from pair(shape, kind, 2.0 * M * K * N, kernels.linear, [x, weight], wanted, names)


def quant_linear(rows=1, n_in=4096, n_out=4096, group=128):
    for bits in (4, 8):
        codes = paddle.randint(-(2**31), 2**31 - 1, [n_in * bits // 32, n_out], "int64").astype("int32")
        scales, zeros = values(n_in // group, n_out).abs() * 1e-3, codes[: n_in // group, : n_out * bits // 32]
        x = values(rows, n_in)
        run = lambda x=x, how=(codes, scales, None, f"w{bits}", zeros.contiguous()): kernels.quant_linear(x, *how)  # noqa: E731
        yield Case(f"{rows} x {n_in} x {n_out}", f"w{bits}", "memory", n_in * n_out * bits / 8 + 4 * scales.size, run)
    M, K, N = 512, 2048, 2048
    x, codes, scales = values(M, K), paddle.randint(-127, 128, [K, N]).astype("int8"), values(N).abs() * 1e-3
    run = lambda: kernels.quant_linear(x, codes, scales, None, "a8w8")  # noqa: E731
    yield Case(f"{M} x {K} x {N}", "a8w8", "int8", 2.0 * M * K * N, run)


def attention(T=2048, H=12, Dh=64, document=None, kind="float32"):
    """Causal; with document, the row holds documents of so many tokens that do not see each other."""
    length = document or T
    ends = np.minimum(np.arange(T) // length * length + length, T).astype("int32").reshape(1, 1, T, 1)
    rows = paddle.to_tensor(ends) if document else None
    pairs = sum(n * (n + 1) // 2 for n in np.bincount(np.arange(T) // length))
    shape = f"{T} x {H} x {Dh}, causal" + (f", documents of {document}" if document else "")
    yield from pair(shape, kind, 4.0 * Dh * H * pairs, lambda q, k, v: kernels.attention(q, k, v, rows),
                    [values(1, T, H, Dh) for _ in range(3)], backward_work=10.0 * Dh * H * pairs)  # fmt: skip


def paged_attention(sequences=8, context=1024, H=12, K=4, Dh=64, block=16):
    per_sequence = context // block
    q = values(sequences, H, Dh)
    pools = [values(sequences * per_sequence, block, K, Dh) for _ in range(2)]
    tables = np.arange(sequences * per_sequence, dtype=np.int32).reshape(sequences, -1)
    lengths = np.ones(sequences, np.int64), np.full(sequences, context)
    run = lambda: kernels.paged_attention(q, *pools, tables, *lengths)  # noqa: E731
    yield Case(f"{sequences} x {context}, {K} heads x {Dh}", "decode", "memory", 8.0 * pools[0].size, run)


def linear_cross_entropy(N=512, D=768, V=32000, kind="float32"):
    hidden, weight, labels = values(N, D), values(D, V) * D**-0.5, paddle.randint(0, V, [N])
    work = 2.0 * N * D * V
    yield from pair(f"{N} x {D} x {V}", kind, work, lambda h, w: kernels.linear_cross_entropy(h, w, labels),
                    [hidden, weight], backward_work=3 * work)  # fmt: skip # the logits, which are not kept, once more


def adamw(size=1 << 22):
    parameter, gradient, moment1, moment2 = (values(size) for _ in range(4))
    moment2 = moment2.abs()
    run = lambda: kernels.adamw(parameter, gradient, moment1, moment2, 9, 1e-4, 0.9, 0.95, 1e-8, 0.01, 0.5)  # noqa: E731
    yield Case(f"{size / 1e6:.1f} M", "step", "memory", 28.0 * size, run)


CASES = {  # op -> its cases; every op of kernels.OPS
    "rms_norm": rms_norm,
    "rope": rope,
    "swiglu": swiglu,
    "linear": linear,
    "quant_linear": quant_linear,
    "attention": attention,
    "paged_attention": paged_attention,
    "linear_cross_entropy": linear_cross_entropy,
    "adamw": adamw,
}
IN_BFLOAT16 = {  # again, with products in bfloat16
    "linear": [linear, lambda kind: linear(kind=kind, frozen=True)],
    "linear_cross_entropy": [linear_cross_entropy],
}


# ---------------------------------------------------------------------------------------------------- measuring


def wait():
    """Until the device has done what it was given; a CPU has."""
    if kernels._kind() != "cpu":
        paddle.device.synchronize()


def turn(run, at_least=0.03):
    """Seconds of one call, the mean of as many as take `at_least` seconds."""
    calls, start = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        wait()
        passed = time.perf_counter() - start
        if passed >= at_least:
            return passed / calls


def measure(run, turns=5, at_most=1.0):
    """The median of the seconds that a call takes in several turns, after one that does not count; `at_most` bounds the sum."""
    turn(run, 0.0)
    found, start = [], time.perf_counter()
    while len(found) < turns and (not found or time.perf_counter() - start < at_most):
        found.append(turn(run))
    return statistics.median(found)


def peaks(turns=7):
    """({kind of a Case: the most that was seen, in operations or bytes a second}, how it was measured).

    On a CPU by loops of our own (kernels/cpu/peak.cc); elsewhere, or without a compiler, by Paddle's largest product and copy.
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
    """One line: Paddle, device, processor, threads, the instruction sets that matter here."""
    parts = [f"Paddle {paddle.__version__}", paddle.get_device()]
    if kernels._kind() == "cpu" and sys.platform.startswith("linux"):
        with open("/proc/cpuinfo") as file:
            info = dict(line.split(":", 1) for line in file.read(10000).split("\n\n")[0].splitlines() if ":" in line)
        info = {key.strip(): value.strip() for key, value in info.items()}
        known = "avx2 fma avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8"
        flags = info.get("flags", "").split()
        parts += [info.get("model name", "an unnamed processor"), f"{len(os.sched_getaffinity(0))} threads"]
        parts.append(" ".join(flag for flag in known.split() if flag in flags) or "no instruction set above SSE2")
    return " · ".join(parts)


def amount(kind, rate):
    """A rate in words."""
    unit = "GB/s" if kind == "memory" else "GOP/s" if kind == "int8" else "GFLOP/s"
    return f"{rate / 1e9:,.{0 if rate >= 1e11 else 1}f} {unit}"


def report(cases, most):
    """Measure each case and print its line."""
    for case in cases:
        seconds = measure(case.run)
        rate = case.work / seconds
        share = f"{rate / most[case.kind]:.0%} of {case.kind}" if case.kind in most else f"({case.kind})"
        print(
            f"  {case.part:10}{case.shape:46}{seconds * 1e3:9.2f} ms{amount(case.kind, rate):>14}   {share}", flush=True
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="cpu, gpu, gpu:1, dcu, xpu, npu, …")
    parser.add_argument("--kernels", default="auto", help="reference, or op=back end, …: see kernels/__init__.py")
    options = parser.parse_args(argv)
    table = kernels.configure(options.device, options.kernels)
    no_bf16 = kernels.bf16_missing()
    print(hardware(), flush=True)
    most, how = peaks()
    print("peak: " + " · ".join(f"{kind} {amount(kind, rate)}" for kind, rate in most.items()) + f" ({how})\n")
    for op in kernels.OPS:
        backend, reason = table[op]
        print(f"{op}: {backend} ({reason})")
        report(CASES[op](), most)
        for make in () if no_bf16 else IN_BFLOAT16.get(op, ()):
            report(make(kind="bfloat16"), most)
    if no_bf16:
        print(f"no products in bfloat16: {no_bf16}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
