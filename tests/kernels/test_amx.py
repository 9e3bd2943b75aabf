"""kernels/cpu/amx.h on emulated tiles (tests/gpu/emulated_tiles.h), and on real ones if the processor has AMX.

The emulator also rejects what the processor would reject, and accesses to memory that no test declared.

    python -m pytest tests/kernels/test_amx.py            # CPU with g++, a few seconds
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"), pytest.mark.sweep(keep=8)]

DOORS = """
#include "amx.h"
extern "C" {
int ready(int integers) { return integers ? amx_int8_ready() : amx_bf16_ready(); }
void products(int integers, long M, long words, const uint32_t* A, long a_stride, const uint32_t* B, void* C,
    long ldc, long N, int add) {
  if (integers) amx_int8_tiles(M, words, A, a_stride, B, (int32_t*)C, ldc, N, add);
  else amx_bf16_tiles(M, words, A, a_stride, B, (float*)C, ldc, N, add);
}
}
"""
MISUSES = """
extern "C" {
const char* fault() { return emulated_fault(); }
void forget() { *emulated_fault() = 0; emulated_regions().clear(); std::memset(emulated_counts(), 0,
    4 * sizeof(long)); emulated_release(); }
void allow(const uint8_t* from, long bytes, int writable) { emulated_regions().push_back({from, from + bytes,
    writable != 0}); }
long count(int of) { return emulated_counts()[of]; }
void configure(long r0, long r1, long c0, long c1) { amx_configure({{r0, r1}, {c0, c1}}); }
void raw(const void* configuration) { _tile_loadconfig(configuration); }
void load(int tile, const void* from, long stride) { _tile_loadd(tile, from, stride); }
void store(int tile, void* to, long stride) { _tile_stored(tile, to, stride); }
void dot(int integers, int c, int a, int b) { if (integers) _tile_dpbssd(c, a, b); else _tile_dpbf16ps(c, a, b); }
}
"""


def library(folder, name, text, *flags):
    (folder / f"{name}.cc").write_text(text)
    command = [
        COMPILER,
        "-std=c++17",
        "-O3",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{ROOT}/kernels/cpu",
        f"-I{ROOT}/tests/gpu",
        *flags,
    ]
    subprocess.run([*command, f"{name}.cc", "-o", f"{name}.so"], cwd=folder, check=True)
    actual = ctypes.CDLL(str(folder / f"{name}.so"))
    L, P, I = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    actual.products.argtypes = [I, L, L, P, L, P, P, L, L, I]
    if "fault" in text:
        actual.fault.restype, actual.count.restype, actual.raw.argtypes = ctypes.c_char_p, L, [P]
        actual.allow.argtypes, actual.configure.argtypes = [P, L, I], [L] * 4
        actual.load.argtypes, actual.store.argtypes = [I, P, L], [I, P, L]
    return actual


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return library(tmp_path_factory.mktemp("amx"), "emulated", '#include "emulated_tiles.h"\n' + DOORS + MISUSES)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return library(tmp_path_factory.mktemp("amx"), "real", DOORS)


def bfloat16(x):
    """float32 -> the nearest bfloat16 as uint16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def operands(integers, M, K, N, seed=0):
    """A (M, K), B (K, N), C (M, N) as numbers, and A and B as words in the layout of amx.h."""
    rng, per_word = np.random.default_rng([seed, M, K, N]), 4 if integers else 2
    words = -(-K // per_word)
    a, b = np.zeros((M, -(-words // 16) * 16 * per_word)), np.zeros((words * per_word, 64))
    a[:, :K], b[:K, :N] = (
        (rng.integers(-128, 128, s) if integers else rng.standard_normal(s)) for s in ((M, K), (K, N))
    )
    code = (lambda x: x.astype(np.int8).view(np.uint8)) if integers else bfloat16
    a_words = np.ascontiguousarray(code(a)).view(np.uint32)  # (M, multiple of 16)
    b_words = np.ascontiguousarray(code(b).reshape(words, per_word, 64).transpose(0, 2, 1)).view(np.uint32)[
        ..., 0
    ]  # (words, 64)
    if not integers:
        a, b = ((code(x).astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in (a, b))
    c = rng.integers(-99, 99, (M, N)).astype(np.int32) if integers else rng.standard_normal((M, N)).astype(np.float32)
    return a[:, :K], b[:K, :N], c, a_words, np.ascontiguousarray(b_words)


def multiply(lib, integers, K, c, a_words, b_words, add, ldc):
    """C from the library; a margin around C must not change."""
    (M, N), framed = c.shape, np.full((c.shape[0] + 2, ldc), 77, c.dtype)
    framed[1 : M + 1, 3 : N + 3] = c
    corner = framed[1:, 3:].ctypes.data
    if hasattr(lib, "allow"):
        lib.forget()
        for array in (a_words, b_words):
            lib.allow(array.ctypes.data, array.nbytes, 0)
        for m in range(M):
            lib.allow(corner + m * ldc * 4, N * 4, 1)
    lib.products(
        integers, M, b_words.shape[0], a_words.ctypes.data, a_words.shape[1], b_words.ctypes.data, corner, ldc, N, add
    )
    actual = framed[1 : M + 1, 3 : N + 3].copy()
    framed[1 : M + 1, 3 : N + 3] = 77
    assert (framed == 77).all(), "written outside of C"
    return actual


def check(lib, integers, M, K, N, add, ldc=None):
    a, b, c, a_words, b_words = operands(integers, M, K, N)
    actual = multiply(lib, integers, K, c, a_words, b_words, add, ldc or N + 5)
    expected = a @ b + (c if add else 0)
    if integers:
        assert np.array_equal(actual, expected)
    else:
        assert np.abs(actual - expected).max() < 1e-6 * np.sqrt(K) * max(1.0, np.abs(expected).max())


SHAPES = [  # M, K, N
    (1, 1, 1), (5, 123, 7), (16, 64, 16), (17, 65, 17), (32, 128, 32), (33, 63, 33), (48, 31, 48), (96, 200, 64), (95,
        97, 63), (31, 1030, 40), (2, 2, 64), (64, 3, 5),
]  # fmt: skip
both = pytest.mark.parametrize("integers", [False, True], ids=["bf16", "int8"])


@both
@pytest.mark.parametrize("M, K, N", SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_tiles_emulated(emulated, integers, M, K, N, add):
    check(emulated, integers, M, K, N, add)
    assert emulated.fault() == b""


@both
def test_tiles_of_this_processor(real, integers):
    if not real.ready(integers):
        pytest.skip("this processor has no AMX, or this process may not use it")
    for shape, add in itertools.product(SHAPES, (False, True)):
        check(real, integers, *shape, add)


@both
def test_empty_products(emulated, integers):
    for M, N in ((0, 5), (5, 0)):
        emulated.forget()
        emulated.products(integers, M, 1, None, 16, np.zeros(64, np.uint32).ctypes.data, None, 5, N, 0)
        assert emulated.fault() == b"" and emulated.count(0) == 0


def test_four_loads_feed_four_products(emulated):
    """96 x 64, 256 deep: 8 steps of 6 blocks; one configuration serves all; what is not loaded once more is stored
    once."""
    check(emulated, False, 96, 256, 64, False)
    assert [emulated.count(i) for i in range(4)] == [1, 4 * 8 * 6, 4 * 8 * 6, 4 * 6]
    check(emulated, False, 40, 256, 64, True)  # 8 rows are left: another configuration, and C is loaded
    assert emulated.count(0) == 4 and emulated.count(2) == 8 * (4 + 2) * 2


def test_the_largest_integers_do_not_saturate(emulated):
    a, b = np.full((3, 4096), -128), np.full((4096, 64), -128)
    b[:, 1::2] = 127
    words = b.astype(np.int8).view(np.uint8).reshape(1024, 4, 64).transpose(0, 2, 1)
    actual = multiply(
        emulated,
        True,
        4096,
        np.zeros((3, 64), np.int32),
        a.astype(np.int8).view(np.uint32),
        np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint32)[..., 0]),
        0,
        70,
    )
    assert np.array_equal(actual, a @ b)


def test_bfloat16_rounds_like_the_instruction(emulated):
    """Denormal numbers count as zero, in and out; halves of a pair are summed apart: 2^30 + 1 - 2^30 - 1 is not the
    sum in order."""

    def one(a, b, c=0.0):
        words = lambda x: np.ascontiguousarray(np.pad(bfloat16(x), (0, 32 - len(x)))).view(np.uint32)
        b_words = np.zeros((-(-len(b) // 2), 64), np.uint32)
        b_words[:, 0] = words(b)[: len(b_words)]
        return multiply(emulated, False, len(a), np.array([[c]], np.float32), words(a)[None], b_words, 1, 8)[0, 0]

    assert one([1e-39, 1.0], [1.0, 3.0]) == 3.0 and one([0.0], [1.0], 1e-39) == 0.0
    assert one([1e-20], [1e-20]) == 0.0, "a denormal product"
    assert one([2.0**30, 1.0, -(2.0**30), 1.0], [1.0] * 4) == 2.0
    assert np.isnan(one([np.nan], [1.0])) and one([np.inf], [1.0]) == np.inf


@pytest.mark.parametrize(
    "configuration, named",
    [
        ({0: 2}, "palette"),
        ({1: 1}, "start row"),
        ({5: 1}, "reserved"),
        ({48: 17, 16: 64}, "rows or bytes"),
        ({48: 16, 16: 65}, "rows or bytes"),
        ({48: 16}, "rows or bytes"),
        ({56: 16, 32: 64}, "reserved"),
    ],
)
def test_the_emulator_refuses_a_wrong_configuration(emulated, configuration, named):
    emulated.forget()
    text = bytearray(64)
    for at, value in {0: 1, **configuration}.items():
        text[at] = value
    emulated.raw(bytes(text))
    assert named.encode() in emulated.fault()
    emulated.forget()


def test_the_emulator_detects_misuse(emulated):
    data = np.zeros((16, 16), np.uint32)
    at = data.ctypes.data
    shape = (16, 16, 16, 16)

    def fault(*steps):
        emulated.forget()
        for name, *args in steps:
            getattr(emulated, name)(*args)
        said = emulated.fault().decode()
        emulated.forget()
        return said

    assert fault(("load", 0, at, 64)) == "TILELOADD: tile not configured"
    assert fault(("configure", 16, 0, 16, 0), ("load", 5, at, 64)) == "TILELOADD: tile not configured"
    assert fault(("configure", *shape), ("load", 0, at, 64), ("store", 3, at, 64)) == ""
    assert (
        fault(("allow", at, 1020, 1), ("configure", *shape), ("load", 0, at, 64)) == "TILELOADD: outside of the buffers"
    )
    assert (
        fault(("allow", at, 1024, 0), ("configure", *shape), ("store", 0, at, 64))
        == "TILESTORED: outside of the buffers"
    )
    assert "same tile" in fault(("configure", *shape), ("dot", 0, 0, 4, 4))
    for integers, (c, a, b) in itertools.product((0, 1), ((2, 4, 6), (1, 4, 6), (0, 4, 5))):
        assert "shapes" in fault(("configure", 16, 5, 16, 7), ("dot", integers, c, a, b))


@both
def test_a_wrong_answer_is_detected(emulated, integers):
    a, b, c, a_words, b_words = operands(integers, 5, 70, 9)
    b_words[-1, 3] ^= 0x40404040
    with pytest.raises(AssertionError):
        assert np.abs(multiply(emulated, integers, 70, c, a_words, b_words, 0, 9 + 5) - a @ b).max() < 1e-3


def test_a_short_buffer_is_detected(emulated):
    a, b, c, a_words, b_words = operands(False, 20, 70, 9)
    emulated.forget()
    emulated.allow(a_words.ctypes.data, a_words.nbytes - 4, 0)
    emulated.allow(b_words.ctypes.data, b_words.nbytes, 0)
    out = np.zeros((20, 9), np.float32)
    emulated.allow(out.ctypes.data, out.nbytes, 1)
    emulated.products(0, 20, 35, a_words.ctypes.data, a_words.shape[1], b_words.ctypes.data, out.ctypes.data, 9, 9, 0)
    assert b"outside" in emulated.fault()


@pytest.fixture(scope="module")
def packed_products(tmp_path_factory):
    """y = x W of kernels/cpu/panels.h on emulated tiles, and the first fault: (y, text)."""
    with open("/proc/cpuinfo") as file:
        if "avx512_vnni" not in file.read(10000) or COMPILER is None:
            pytest.skip("needs g++ and AVX512-VNNI")
    folder = tmp_path_factory.mktemp("panels")
    (folder / "door.cc").write_text("""
#include "panels.h"
extern "C" void run(int storage, long rows, long in, long out, long group, int whole_rows, const float* x,
    const void* codes, const float* scales, const float* zeros, float* y) {
  const Panels w = pack({(Storage)storage, in, out, group, false, whole_rows != 0, codes, scales, zeros, nullptr,
      nullptr, 0.0f});
  InputRoom room;
  multiply_panels(w, prepare(w, x, rows, room, 2), {STORE, y, out}, 2);
}
extern "C" const char* fault() { return emulated_fault(); }
""")
    sources = ["door.cc", *(str(ROOT / "kernels/cpu" / f"panels{part}.cc") for part in ("", "_bf16", "_int"))]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-include", str(ROOT / "tests/gpu/emulated_tiles.h")]
    command = [COMPILER, *flags, f"-I{ROOT}/kernels/cpu", *sources, "-o", "panels.so"]
    subprocess.run(command, cwd=folder, check=True)
    actual = ctypes.CDLL(str(folder / "panels.so"))
    L, P, I = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    actual.run.argtypes, actual.fault.restype = [I, L, L, L, L, I, P, P, P, P, P], ctypes.c_char_p

    def run(storage, x, w, group=0, scales=None, zeros=None, whole_rows=0):
        y = np.full((x.shape[0], w.shape[1]), np.nan, np.float32)
        given = (None if a is None else a.ctypes.data for a in (x, w, scales, zeros, y))
        actual.run(storage, *x.shape, w.shape[1], group, whole_rows, *given)
        assert actual.fault() == b""
        return y

    return run


@pytest.mark.sweep(keep=0)  # building takes seconds
@pytest.mark.parametrize("n_in, n_out", [(128, 64), (300, 130), (48, 70), (20, 3)])
@pytest.mark.parametrize("kind", ["w8", "w8 groups", "w8 odd groups", "w4", "w4 zeros", "a8w8"])
def test_packed_products_have_the_bits_of_single_rows(packed_products, kind, n_in, n_out):
    """A single row runs without tiles. 97 rows: more than a task, and an odd rest."""
    rng = np.random.default_rng([n_in, n_out])
    x = rng.standard_normal((97, n_in)).astype(np.float32) * np.exp(rng.standard_normal((97, 1))).astype(np.float32)
    four, group = "w4" in kind, {"w8 groups": 128, "w8 odd groups": 12}.get(kind, 32 if "w4" in kind else n_in)
    codes = rng.integers(0, 16 if four else 256, (n_in, n_out)).astype(np.uint8)
    scales, zeros = rng.random((2, -(-n_in // group), n_out)).astype(np.float32)
    zeros = np.round(15 * zeros) if "zeros" in kind else None
    given = 3 if four else 2, x, codes, group, scales, zeros, kind == "a8w8"
    actual = packed_products(*given)
    for m in range(97):
        single = packed_products(given[0], x[m : m + 1], *given[2:])
        assert np.array_equal(actual[m : m + 1], single), m
    weights = (codes - (0.0 if zeros is None else np.repeat(zeros, group, 0)[:n_in])) * np.repeat(scales, group, 0)[
        :n_in
    ]
    if zeros is None:
        weights = (codes.astype(float) - (8 if four else 128)) * np.repeat(scales, group, 0)[:n_in]
    expected = x @ weights
    assert np.abs(actual - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.sweep(keep=0)
def test_packed_bfloat16_has_the_bits_of_single_rows(packed_products):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((35, 1100), (1100, 70)))
    actual = packed_products(1, x, w)
    assert np.abs(actual - x @ w).max() < 0.02 * np.abs(x @ w).max()
    for m in range(0, 35, 4):
        assert np.array_equal(packed_products(1, x[m : m + 1], w), actual[m : m + 1])
