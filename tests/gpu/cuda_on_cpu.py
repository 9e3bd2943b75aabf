"""The kernels of kernels/cuda, run on the CPU by cuda_on_cpu.h, against float64 in numpy. Needs only numpy and g++.

    python tests/gpu/cuda_on_cpu.py               # every case
    python tests/gpu/cuda_on_cpu.py --sanitize    # with g++'s address, alignment and bounds checks, in another process

test_gpu.py runs these cases one by one. Letters as in kernels/__init__.py, S sequences.
"""

import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CORES = HERE.parents[1] / "kernels" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-include", str(HERE / "cuda_on_cpu.h"), f"-I{CORES}"]
SANITIZE = [
    "-g",
    "-fsanitize=address,alignment,bounds,shift,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
    "--param",
    "asan-stack=0",
]
TYPES = ("float32", "bfloat16", "float16")
HALF_STEP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of a rounding to nearest, relative


# ---------------------------------------------------------------------------------------- building and calling


def build(folder, text=None, sanitize=False):
    """Compile all kernels, or those of a test, into a library; returns its path."""
    source, library = Path(folder) / "cores.cc", Path(folder) / "cores.so"
    source.write_text(text or "".join(f'#include "{p.name}"\n' for p in sorted(CORES.glob("*.cuh"))))
    done = subprocess.run(
        ["g++", *FLAGS, *(SANITIZE if sanitize else []), str(source), "-o", str(library)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return library


KINDS = {"long": ctypes.c_long, "int": ctypes.c_int, "float": ctypes.c_float, "cudaStream_t": ctypes.c_void_p}


class Cores:
    """The library's `extern "C"` functions by name; argument types come from the sources, arrays are passed as
    pointers."""

    def __init__(self, library, text=None):
        self.library = ctypes.CDLL(str(library))
        self.library.cuda_on_cpu_message.restype = ctypes.c_char_p
        text = text or "".join(p.read_text() for p in sorted(CORES.glob("*.cuh")))
        for returned, name, arguments in re.findall(r'extern "C" (\w+) (\w+)\(([^)]*)\)', text):
            function = getattr(self.library, name)
            function.restype = KINDS[returned]
            function.argtypes = [ctypes.c_void_p if "*" in a else KINDS[a.split()[-2]] for a in arguments.split(",")]

    def order(self, number):
        ctypes.c_int.in_dll(self.library, "cuda_on_cpu_order").value = number

    def call(self, name, *arguments):
        """A launcher's error is raised as RuntimeError with what the host's run said."""
        for a in arguments:
            assert not isinstance(a, np.ndarray) or a.flags.c_contiguous
        result = getattr(self.library, name)(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))
        if name.startswith("launch_") and result:
            raise RuntimeError(f"{name}: error {result} {self.library.cuda_on_cpu_message().decode()}")
        return result


# ------------------------------------------------------------------------------------------------ element types


def stored(values, dtype):
    """float values as the kernels store them: float32, float16, or bfloat16 as uint16."""
    values = np.asarray(values, np.float32)
    if dtype != "bfloat16":
        return np.ascontiguousarray(values.astype(dtype))
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def wide(array):
    """The values of a `stored` array in float64."""
    return (
        (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if array.dtype == np.uint16
        else array.astype(np.float64)
    )


def blank(shape, dtype):
    """An array of NaN (integers: -1), which shows what a kernel did not write."""
    kind = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "int64": np.int64}[dtype]
    return np.frombuffer(bytearray(b"\xff" * (int(np.prod(shape)) * np.dtype(kind).itemsize)), kind).reshape(shape)


def normal(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def close(actual, expected, dtype="float32", noise=2e-6, what=""):
    """Allows one rounding to dtype, and float32 noise relative to the largest value."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    allowed = HALF_STEP[dtype] * 1.01 * np.abs(expected) + noise * max(1.0, np.abs(expected).max())
    wrong = ~(np.abs(wide(actual) - expected) <= allowed)
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} wrong, first {wide(actual)[wrong][0]} for {expected[wrong][0]}"
    )


# -------------------------------------------------------------------------------------------------------- cases


def cross_entropy(cores, rows, V, dtype, spread=1.0, cap=0.0):
    logits, d_losses = stored(normal((rows, V)) * spread, dtype), normal((rows,), 1).astype(np.float32)
    labels = np.random.default_rng(rows).integers(0, V, rows)
    if rows > 2:
        labels[1] = -1  # another rank's
    if V > 3:
        logits[0, 3] = logits[0, V - 1] = stored([9 * spread], dtype)[0]  # equal largest: the first counts
    l, slope = wide(logits), 1.0
    if cap:
        l = cap * np.tanh(l / cap)
        slope = 1 - (l / cap) ** 2
    lse, target, best = blank((rows,), "float32"), blank((rows,), "float32"), blank((rows,), "int64")
    cores.call("launch_cross_entropy", logits, labels, rows, V, cap, lse, target, best, TYPES.index(dtype), None)
    top = l.max(-1, keepdims=True)
    expected = np.log(np.exp(l - top).sum(-1)) + top[:, 0]
    close(lse, expected, what="lse")
    close(target, np.where(labels >= 0, l[np.arange(rows), np.maximum(labels, 0)], 0.0), what="target")
    assert np.array_equal(best, wide(logits).argmax(-1)), "argmax"
    cores.call("launch_softmax_gradient", logits, labels, lse, d_losses, rows, V, cap, TYPES.index(dtype), None)
    onehot = (np.arange(V) == labels[:, None]).astype(float)
    close(logits, (np.exp(l - expected[:, None]) - onehot) * d_losses[:, None] * slope, dtype, what="gradient")


def rms_norm(cores, rows, D, dtype, residual, epsilon=1e-5):
    x, w, dy, dh = (stored(normal((rows, D) if i != 1 else (D,), i) + (i == 1), dtype) for i in range(4))
    added, kind = stored(normal((rows, D), 4), dtype) if residual else None, TYPES.index(dtype)
    h, y, r = blank((rows, D), dtype), blank((rows, D), dtype), blank((rows,), "float32")
    cores.call("launch_rms_norm", x, added, w, rows, D, epsilon, h if residual else None, y, r, kind, None)
    if residual:
        assert np.array_equal(
            wide(h), wide(stored(wide(x).astype(np.float32) + wide(added).astype(np.float32), dtype))
        ), "h"
    else:
        h = x
    scale = 1 / np.sqrt((wide(h) ** 2).mean(-1, keepdims=True) + epsilon)
    close(r, scale[:, 0], what="r")
    close(y, wide(h) * scale * wide(w), dtype, what="y")

    dx, dw = blank((rows, D), dtype), blank((D,), dtype)
    parts = blank((cores.call("rms_norm_parts", rows), D), "float32")
    cores.call("launch_rms_norm_backward", h, w, r, dy, dh if residual else None, rows, D, dx, dw, parts, kind, None)
    g = wide(dy) * wide(w)
    expected = scale * (g - wide(h) * scale**2 * (g * wide(h)).mean(-1, keepdims=True))
    close(dx, expected + (wide(dh) if residual else 0.0), dtype, what="dx")
    close(dw, (wide(dy) * wide(h) * scale).sum(0), dtype, noise=5e-6, what="dw")


def paged_attention(
    cores, contexts, H, K, Dh, block_size, dtype, int8=False, splits=None, alibi=False, window=2**31 - 1, cap=0.0
):
    S, generator = len(contexts), np.random.default_rng(Dh)
    contexts = np.asarray(contexts, np.int32)
    needed = -(-contexts // block_size)
    most, blocks = max(1, int(needed.max())) + 1, int(needed.sum()) + 2
    tables, free = (
        np.full((S, most), 2**30, np.int32),
        generator.permutation(blocks),
    )  # an entry that is not used leads astray
    for s, n in enumerate(needed):
        tables[s, :n], free = free[:n], free[n:]
    slopes = (0.9 ** np.arange(1, H + 1)).astype(np.float32) if alibi else None
    q, pool, scales = stored(normal((S, H, Dh)), dtype), (blocks, block_size, K, Dh), [None, None]
    if int8:
        caches = [generator.integers(-128, 128, pool).astype(np.int8) for _ in "kv"]
        scales = [generator.uniform(0.001, 0.02, pool[:3]).astype(np.float32) for _ in "kv"]
        k_all, v_all = (c * s[..., None].astype(float) for c, s in zip(caches, scales))
    else:
        caches = [stored(normal(pool, i), dtype) for i in (1, 2)]
        k_all, v_all = map(wide, caches)
    expected = np.zeros((S, H, Dh))
    for s, n in enumerate(contexts):
        if n == 0:
            continue
        k, v = (
            c[tables[s, : needed[s]]].reshape(-1, K, Dh)[:n].repeat(H // K, 1) for c in (k_all, v_all)
        )  # (n, H, Dh)
        score = np.einsum("hd,nhd->hn", wide(q)[s], k) * Dh**-0.5
        score = cap * np.tanh(score / cap) if cap else score
        score = score - slopes[:, None] * (n - 1 - np.arange(n)) if alibi else score
        score[:, : max(0, n - window)] = -np.inf
        p = np.exp(score - score.max(-1, keepdims=True))
        expected[s] = np.einsum("hn,nhd->hd", p / p.sum(-1, keepdims=True), v)
    for s, n in enumerate(contexts):
        tables[s, : max(0, n - window) // block_size] = 2**30  # no more needed
    longest = max(1, min(int(contexts.max()), window))
    splits = splits or cores.call("paged_attention_splits", S, H, K, longest)
    out, partial = blank((S, H, Dh), dtype), blank((S, H, splits, Dh + 2), "float32")
    cores.call(
        "launch_paged_attention",
        q,
        *caches,
        *scales,
        tables,
        contexts,
        S,
        H,
        K,
        Dh,
        block_size,
        most,
        longest,
        splits,
        Dh**-0.5,
        slopes,
        window,
        cap,
        out,
        partial,
        TYPES.index(dtype),
        None,
    )
    close(out, expected, dtype, noise=5e-6, what="out")


def pack(codes, bits, axis):
    """Packs codes along an axis into int32 words, the first one lowest."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    codes = codes.reshape(*codes.shape[:-1], -1, 32 // bits)
    words = (codes << (np.arange(32 // bits, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis).view(np.int32))


def quant_linear(cores, rows, n_in, n_out, bits, group, dtype, symmetric=False, bias=True):
    generator = np.random.default_rng([rows, n_in, bits])
    groups, kind = -(-n_in // group), TYPES.index(dtype)
    codes = generator.integers(0, 2**bits, (n_in, n_out))
    zeros = np.full((groups, n_out), 2 ** (bits - 1)) if symmetric else generator.integers(0, 2**bits, (groups, n_out))
    scales = generator.uniform(0.001, 0.1, (groups, n_out)).astype(np.float32)
    of = np.arange(n_in) // group
    weights = (codes - zeros[of]) * scales[of].astype(float)
    x, b = stored(normal((rows, n_in)), dtype), stored(normal((n_out,), 1), dtype) if bias else None
    qweight, qzeros = pack(codes, bits, 0), None if symmetric else pack((zeros - 1) % 2**bits, bits, 1)
    y, partial = (
        blank((rows, n_out), dtype),
        blank((cores.call("quant_linear_parts", n_in, bits), rows, n_out), "float32"),
    )
    cores.call(
        "launch_quant_linear", x, qweight, scales, qzeros, b, rows, n_in, n_out, bits, group, y, partial, kind, None
    )
    close(y, wide(x) @ weights + (wide(b) if bias else 0.0), dtype, noise=5e-6, what="y")
    unpacked = blank((n_in, n_out), dtype)
    cores.call("launch_dequantize", qweight, scales, qzeros, n_in, n_out, bits, group, unpacked, kind, None)
    close(unpacked, weights, dtype, what="weights")


def case(function, *arguments, **keywords):
    name = "-".join([function.__name__, *map(str, arguments), *(f"{k}={v}" for k, v in keywords.items())]).replace(
        " ", ""
    )
    return name, functools.partial(lambda cores: function(cores, *arguments, **keywords))


CASES = dict(
    [case(cross_entropy, rows, V, dtype) for rows, V in [(1, 1), (5, 123), (3, 8), (4, 2048), (3, 10240), (2,
        4099)] for dtype in TYPES]
    + [case(cross_entropy, 3, 200, "float32", spread=60.0), case(cross_entropy, 3, 264, "bfloat16", spread=60.0)]
    + [case(cross_entropy, rows, V, dtype, cap=30.0) for rows, V in [(5, 123), (4, 2048)] for dtype in TYPES]
    + [case(cross_entropy, 3, 264, "float32", spread=60.0, cap=30.0)]
    + [case(rms_norm, rows, D, dtype, residual) for rows, D in [(1, 1), (5, 123), (3, 64), (270,
        40)] for dtype in TYPES for residual in (False, True)]
    + [case(rms_norm, 2, D, dtype, True) for D, dtype in [(1500, "float32"), (3072, "bfloat16"), (4096, "float32"),
        (8192, "bfloat16"), (2050, "float16")]]
    + [case(paged_attention, [1, 37, 200], H, K, Dh, 16, dtype)
       for H, K, Dh, dtype in [(1, 1, 8, "float32"), (4, 2, 64, "bfloat16"), (6, 2, 80, "float32"), (8, 1, 96,
           "float16"), (9, 1, 128, "bfloat16"), (2, 2, 256, "float32")]]
    + [case(paged_attention, [5, 150, 0, 33], 4, 2, 64, 7, dtype, int8=True,
        splits=splits) for dtype in TYPES for splits in (1, 3)]
    + [case(paged_attention, [300, 129], 4, 1, 40, 32, "float32", splits=splits) for splits in (None, 5)]
    + [case(paged_attention, [300, 20, 0, 90], H, K, 64, 16, dtype, int8=dtype == "float16", splits=splits, alibi=alibi,
        window=window, cap=cap)
       for H, K, dtype in [(4, 4, "float32"), (14, 2, "bfloat16"), (5, 1, "float16")] for splits in (None, 3)
       for alibi, window, cap in [(True, 2**31 - 1, 0.0), (False, 33, 0.0), (False, 200, 1.5), (True, 1, 5.0)]]
    + [case(quant_linear, rows, n_in, n_out, bits, group, dtype)
       for rows, n_in, n_out, bits, group in [(1, 8, 8, 4, 8), (1, 1152, 136, 4, 128), (3, 640, 24, 4, 32), (9, 200,
           264, 4, 40), (1, 520, 132, 8, 104), (6, 36, 4, 8, 12)]
       for dtype in TYPES]
    + [case(quant_linear, 2, 520, 160, bits, 520, "float32", symmetric=True, bias=False) for bits in (4, 8)]
)  # fmt: skip


def main():
    with tempfile.TemporaryDirectory() as folder:
        cores = Cores(build(folder, sanitize="--sanitized" in sys.argv))
        for check in CASES.values():
            check(cores)
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    if "--sanitize" in sys.argv:
        libasan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
        os.environ.update(LD_PRELOAD=libasan, ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")
        os.execv(sys.executable, [sys.executable, __file__, "--sanitized"])
    main()
