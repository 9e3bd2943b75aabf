"""int8 products of kernels.quant_linear (scheme a8w8) by every instruction set, exact against int64 in numpy.

python -m pytest tests/kernels/test_int8.py           # CPU, a few seconds, and the time to build the C++ ops once
"""

import ctypes
import re
import subprocess
from pathlib import Path

import kernels

import numpy as np
import paddle
import pytest
from test_amx import COMPILER, ROOT

cpu = kernels._module("cpu")
pytestmark = pytest.mark.skipif(
    cpu.missing("quant_linear") is not None, reason=f"no C++ ops: {cpu.missing('quant_linear')}"
)
WAYS = {"sse2": 0, "avx2": 1, "avx512": 2, "vnni": 3, "amx": 4}
SHAPES = [  # rows, in, out
    (1, 1, 1), (5, 123, 7), (1, 768, 200), (3, 66, 64), (7, 131, 65), (37, 520, 130), (200, 70, 300), (2, 4, 2100),
        (193, 257, 33),
]  # fmt: skip


def draw(rows, n_in, n_out):
    rng = np.random.default_rng([rows, n_in, n_out])
    x, w = (
        rng.standard_normal((rows, n_in)).astype(np.float32) * 3,
        rng.integers(-128, 128, (n_in, n_out)).astype(np.int8),
    )
    x[0] *= 1e-3
    return x, w, rng.uniform(0.5, 1.5, n_out).astype(np.float32), rng.standard_normal(n_out).astype(np.float32)


def codes_of(x, given=None):
    """int64 codes and the float32 scale of each row, as kernels.quant_linear describes them."""
    scale = (
        np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-8)) / np.float32(127)
        if given is None
        else np.float32(given)
    )
    return np.clip(np.round(x / scale), -128, 127).astype(np.int64), scale


def tensor(array):
    return None if array is None else paddle.to_tensor(array)


def method_of_this_processor(rows):
    """The method that the op chooses, as the loaded library reports it."""
    library = re.search(r"\S*kernels_cpu\S*\.so", Path("/proc/self/maps").read_text())
    return ctypes.CDLL(library.group()).cpu_int8_way(ctypes.c_long(rows))


def op(x, w, scales, bias=None, given=None, instructions=-1):
    inputs = [tensor(a) for a in (x, w, scales, bias, None if given is None else np.array([given], np.float32))]
    return cpu._C_ops._run_custom_op("cpu_int8_linear", *inputs, instructions)[0].numpy()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The same with emulated AMX tiles; W is interleaved by AVX-512, which every processor with AMX has."""
    if COMPILER is None or method_of_this_processor(1) < 2:
        pytest.skip("needs g++ and AVX-512")
    folder = tmp_path_factory.mktemp("int8")
    (folder / "int8.cc").write_text("""
#include "emulated_tiles.h"
#include "int8.h"
extern "C" void run(long rows, long in, long out, const float* x, const signed char* w, const float* scales,
    const float* bias, const float* given, float* y) {
  int8::linear({rows, in, out, x, w, scales, bias, given, y}, 4);
}
extern "C" const char* fault() { return emulated_fault(); }
extern "C" long products() { return emulated_counts()[2]; }
""")
    command = [
        COMPILER,
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-pthread",
        f"-I{ROOT}/kernels/cpu",
        f"-I{ROOT}/tests/gpu",
        "int8.cc",
        "-o",
        "int8.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "int8.so"))
    library.fault.restype, library.products.restype = ctypes.c_char_p, ctypes.c_long
    pointer = lambda a: ctypes.c_void_p(None if a is None else a.ctypes.data)

    def run(x, w, scales, bias=None, given=None):
        y = np.full((x.shape[0], w.shape[1]), np.nan, np.float32)
        given, before = None if given is None else np.array([given], np.float32), library.products()
        library.run(*(ctypes.c_long(n) for n in (*x.shape, w.shape[1])), *map(pointer, (x, w, scales, bias, given, y)))
        assert library.fault() == b"" and library.products() > before
        return y

    return run


BEST = -1 if cpu.missing("quant_linear") else method_of_this_processor(1 << 20)


@pytest.fixture(params=[way for way, level in WAYS.items() if level <= BEST] + ["amx emulated"])
def multiply(request):
    if request.param == "amx emulated":
        return request.getfixturevalue("emulated")
    return lambda *args: op(*args, instructions=WAYS[request.param])


@pytest.mark.parametrize("rows, n_in, n_out", SHAPES)
@pytest.mark.parametrize("given", [None, 0.03])
def test_sums_are_exact_and_scaled_once(multiply, rows, n_in, n_out, given):
    x, w, scales, bias = draw(rows, n_in, n_out)
    codes, scale = codes_of(x, given)
    sums = (codes @ w.astype(np.int64)).astype(np.float32)  # below 2^24: exact in float32
    assert np.abs(sums).max() < 1 << 24
    assert np.array_equal(multiply(x, w, np.ones_like(scales), None, given), sums * scale)
    actual, want = multiply(x, w, scales, bias, given), sums.astype(np.float64) * scale * scales + bias
    assert np.abs(actual - want).max() < 3e-7 * max(1.0, np.abs(want).max())


def test_the_largest_codes_do_not_saturate(multiply):
    """4,096 products of (-128)(-128) and (-128) 127: past the 2^24 of float32 sums, past the 2^15 of pmaddubsw's
    pairs."""
    x, w = np.full((3, 4096), -200.0, np.float32), np.full((4096, 70), -128, np.int8)
    x[1] = 200.0
    w[:, 1::2] = 127
    want = np.clip(x, -128, 127).astype(np.int64) @ w.astype(np.int64)
    assert np.abs(want).max() == 4096 << 14 and np.array_equal(
        multiply(x, w, np.ones(70, np.float32), None, 1.0), want.astype(np.float32)
    )


def test_halves_round_to_even(multiply):
    x = np.array(
        [
            [
                -2.5,
                -1.5,
                -0.5,
                0.5,
                1.5,
                2.5,
                3.4999998,
                126.5,
                127.5,
                300.0,
                -128.5,
                -300.0,
                0.0,
                8.0,
                9.5,
                10.5,
                11.0,
                0.49999997,
            ]
        ],
        np.float32,
    )
    actual = multiply(x, np.eye(18, dtype=np.int8), np.ones(18, np.float32), None, 1.0)
    assert actual[0].tolist() == [-2, -2, 0, 0, 2, 2, 3, 126, 127, 127, -128, -128, 0, 8, 10, 10, 11, 0]


def test_nan_stays_nan(multiply):
    x = np.ones((6, 40), np.float32)
    x[1, 3], x[2, 39], x[3, 7], x[4] = np.nan, np.nan, np.inf, 0.0
    w, ones = np.ones((40, 5), np.int8), np.ones(5, np.float32)
    actual = multiply(x, w, ones, ones)
    assert np.isnan(actual[1:4]).all() and (actual[4] == 1).all() and np.allclose(actual[[0, 5]], 41)
    actual = multiply(x, w, ones, None, 0.5)
    assert np.isnan(actual[1:3]).all() and np.array_equal(actual[3], np.full(5, (39 * 2 + 127) * 0.5, np.float32))


def both(x, *args, **kwargs):
    actual = []
    for backend in ("cpu", "reference"):
        with kernels.use(f"quant_linear={backend}"), paddle.no_grad():
            actual.append(kernels.quant_linear(x, *args, scheme="a8w8", **kwargs))
    assert actual[0].shape == actual[1].shape and actual[0].dtype == actual[1].dtype
    return [f.astype("float32").numpy() for f in actual]


@pytest.mark.parametrize("shape", [(1, 1, 96), (2, 3, 5, 96), (96,), (0, 96), (700, 96)])
@pytest.mark.parametrize("given", [None, 0.03])
@pytest.mark.parametrize("bias", [False, True])
def test_the_op_equals_the_reference(shape, given, bias):
    x, w, scales, b = draw(int(np.prod(shape[:-1])) or 1, 96, 50)
    x = tensor(x[: int(np.prod(shape[:-1]))].reshape(shape))
    a, r = both(
        x,
        tensor(w),
        tensor(scales),
        tensor(b) if bias else None,
        input_scale=None if given is None else paddle.to_tensor([given]),
    )
    assert a.size == 0 or np.abs(a - r).max() < 3e-7 * max(1.0, np.abs(r).max())


def test_a_view_and_half_precision():
    x, w, scales, _ = draw(6, 96, 50)
    strided = tensor(np.ascontiguousarray(x.T)).T
    a, r = both(strided, tensor(w), tensor(scales))
    assert np.abs(a - r).max() < 3e-7 * np.abs(r).max()
    a, r = both(tensor(x).astype("bfloat16"), tensor(w), tensor(scales))
    assert np.array_equal(a, r), "the reference's"


def test_the_best_method_of_this_processor_is_used():
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = (
        4
        if "amx_int8" in flags
        else 3
        if "avx512_vnni" in flags
        else 2
        if "avx512bw" in flags
        else 1
        if "avx2" in flags
        else 0
    )
    assert method_of_this_processor(2048) == expected and method_of_this_processor(1) == min(expected, 3), (
        "a few rows need no tiles"
    )


def test_a_wrong_sum_is_detected():
    x, w, scales, _ = draw(3, 123, 7)
    codes, scale = codes_of(x)
    right = (codes @ w.astype(np.int64)).astype(np.float32) * scale
    w[100, 2] ^= 1
    assert np.flatnonzero((op(x, w, np.ones_like(scales)) != right).any(0)).tolist() == [2]
