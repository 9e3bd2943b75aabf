"""The GPU back end without a GPU: kernels/gpu.py, its CUDA kernels and their Paddle operators.

    python -m pytest tests/gpu/test_gpu.py           # about 50 s; needs g++, and nvcc for one test (else skipped)
    python -m pytest tests/gpu/test_gpu.py --slow    # also: kernels under g++'s sanitizers, every nvcc build

The CUDA kernels run on the CPU (cuda_on_cpu.h) behind Paddle operators for CPU tensors, and Paddle's GPU operators are
replaced by CPU ones with their documented meaning (phi_on_cpu.cc). So gpu.py itself runs, and Paddle infers the shapes
of its calls. Not tested: speed, Paddle's own GPU kernels, and GPU behavior that is not emulated (see cuda_on_cpu.h).
"""

import ctypes
import inspect
import itertools
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import kernels
from kernels import gpu, reference

import cuda_on_cpu
import numpy as np
import paddle
import pytest
import test_ops as cases
from cuda_on_cpu import CASES, Cores

from formats.files import UserError

pytestmark = pytest.mark.sweep(keep=0)  # compilers run for two minutes

HERE = Path(__file__).resolve().parent
INCLUDE = Path(paddle.sysconfig.get_include())
PADDLE = [f"-I{INCLUDE}", f"-I{INCLUDE / 'third_party'}"]
LINK = [f"-L{INCLUDE.parent / 'base'}", "-l:libpaddle.so"]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler: there is no nvcc")
normal, tensor, close = cases.normal, cases.tensor, cases.close


class Build(threading.Thread):
    """A compiler that runs in parallel with the tests."""

    def __init__(self, *command, after=()):
        super().__init__(daemon=True)
        self.command, self.after = [str(c) for c in command], after
        self.start()

    def run(self):
        for build in self.after:
            build.join()
        self.done = subprocess.run(self.command, capture_output=True, text=True)

    def wait(self):
        self.join()
        assert self.done.returncode == 0, f"{' '.join(self.command)}\n{self.done.stderr[-3000:]}"
        return self.done


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """name -> (path, Build): the bindings with the cores for CPU tensors, Paddle's GPU operators, and the bindings by
    nvcc."""
    folder = tmp_path_factory.mktemp("built")
    ops, phi, cuda = (folder / name for name in ("ops.so", "phi.so", "ops.o"))
    actual = {
        "ops": (
            ops,
            Build("g++", *cuda_on_cpu.FLAGS, "-x", "c++", *PADDLE, cuda_on_cpu.CORES / "ops.cu", "-o", ops, *LINK),
        ),
        "phi": (
            phi,
            Build(
                "g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", *PADDLE, HERE / "phi_on_cpu.cc", "-o", phi, *LINK
            ),
        ),
    }
    if shutil.which("nvcc"):
        needed_first = [build for _, build in actual.values()]
        actual["cuda"] = (cuda, nvcc(cuda_on_cpu.CORES / "ops.cu", cuda, "sm_90", after=needed_first))
    return actual


def nvcc(source, target, arch, after=()):
    """nvcc with the arguments of paddle.utils.cpp_extension for a .cu file."""
    like_paddle = [
        "-DPADDLE_WITH_CUDA",
        "-DEIGEN_USE_GPU",
        "-Xcompiler",
        "-fPIC",
        "--expt-relaxed-constexpr",
        "-DNVCC",
        "-w",
    ]
    return Build(
        "nvcc",
        "-O3",
        "-std=c++17",
        f"-arch={arch}",
        "-Xptxas",
        "-v",
        *like_paddle,
        *PADDLE,
        f"-I{cuda_on_cpu.CORES}",
        "-c",
        source,
        "-o",
        target,
        after=after,
    )


@pytest.fixture(scope="module")
def cores(builds):
    path, build = builds["ops"]
    build.wait()
    return Cores(path)


@pytest.fixture(scope="module")
def operators(builds):
    """Loads our operators, and Paddle's GPU ones for CPU tensors, into this process, permanently."""
    for _, build in (builds["ops"], builds["phi"]):
        build.wait()
    ctypes.CDLL(str(builds["phi"][0]), ctypes.RTLD_GLOBAL)
    paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(builds["ops"][0]))


@pytest.fixture
def pretend(operators, monkeypatch):
    """gpu.py as if on a GPU of compute capability 9.0, with CPU tensors."""
    monkeypatch.setattr(gpu, "_state", True)
    monkeypatch.setattr(gpu, "_registered", lambda op: True)
    monkeypatch.setattr(gpu, "_capability", lambda: 90)
    flags, real = (
        {"FLAGS_cudnn_deterministic": False, "FLAGS_flash_attn_version": 2},
        paddle.get_flags,
    )  # only GPU builds have these
    for module in (paddle, paddle.base.framework):
        monkeypatch.setattr(module, "get_flags", lambda names: flags if set(names) <= set(flags) else real(names))
    kernels.configure("cpu")
    yield flags
    kernels.configure("cpu")


# ================================================================================================== cores


@pytest.mark.parametrize("order", [1, 2], ids=["down", "random"])
@pytest.mark.parametrize("case", CASES)
def test_kernel(cores, case, order):
    """Every kernel against float64, with the threads of a block run in two orders between barriers."""
    cores.order(order)
    CASES[case](cores)


@pytest.mark.slow
def test_kernels_under_the_sanitizers():
    done = subprocess.run([sys.executable, HERE / "cuda_on_cpu.py", "--sanitize"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(CASES)} cases" in done.stdout, done.stderr[-3000:]


def test_the_gpu_harness_detects_a_wrong_kernel(tmp_path):
    """Its own references and error limits, on small shapes on the CPU (its times mean nothing here); a wrong one is
    seen."""
    text = (HERE / "cuda_harness.cu").read_text()
    (tmp_path / "right.cu").write_text(text)
    (tmp_path / "wrong.cu").write_text(text.replace("value * scale * weight)", "value * scale)"))
    flags = [f for f in cuda_on_cpu.FLAGS if f not in ("-shared", "-fPIC", "-O1")]
    programs = [tmp_path / name for name in ("right", "wrong")]
    for build in [Build("g++", *flags, "-x", "c++", p.with_suffix(".cu"), "-o", p) for p in programs]:
        build.wait()
    right, wrong = (subprocess.run([p, "small"], capture_output=True, text=True) for p in programs)
    assert right.returncode == 0 and right.stdout.endswith("all right\n") and right.stdout.count(" error ") == 18, (
        right.stdout
    )
    assert wrong.returncode == 1 and wrong.stdout.count("WRONG") == 3, (
        wrong.stdout
    )  # two lines of rms_norm, and the last


def test_kernels_give_the_same_bits_in_every_order(cores):
    actual = []
    for order in (0, 1, 2):
        cores.order(order)
        x, w, h, y, r = (
            normal((9, 300)).astype(np.float32),
            normal((300,), 1).astype(np.float32),
            *(np.empty(s, np.float32) for s in ((9, 300), (9, 300), (9,))),
        )
        cores.call("launch_rms_norm", x, x, w, 9, 300, 1e-5, h, y, r, 0, None)
        dx, dw, parts = np.empty((9, 300), np.float32), np.empty(300, np.float32), np.empty((9, 300), np.float32)
        cores.call("launch_rms_norm_backward", h, w, r, y, x, 9, 300, dx, dw, parts, 0, None)
        actual.append(b"".join(a.tobytes() for a in (y, dx, dw)))
    assert len(set(actual)) == 1


@pytest.mark.parametrize(
    "call",
    [
        ("launch_rms_norm", None, None, None, 1, 9000, 1e-5, None, None, None, 0, None),
        ("launch_rms_norm", None, None, None, 1, 8, 1e-5, None, None, None, 3, None),
        ("launch_paged_attention", *[None] * 7, 1, 1, 1, 20, 16, 1, 16, 1, 0.1, None, 16, 0.0, None, None, 0, None),
        ("launch_paged_attention", *[None] * 7, 1, 1, 1, 16, 16, 1, 16, 1, 0.1, None, 0, 0.0, None, None, 0, None),
        ("launch_quant_linear", *[None] * 5, 1, 16, 12, 4, 16, None, None, 0, None),
        ("launch_quant_linear", *[None] * 5, 1, 16, 16, 2, 16, None, None, 0, None),
    ],
)
def test_unsupported_arguments_are_errors(cores, call):
    with pytest.raises(RuntimeError, match="error 1 "):
        cores.call(*call)


# ----------------------------------------------------------------- the emulation finds what it is there to find

WRONG = r"""
#include "common.cuh"
__global__ void sum(const float* x, float* y, int mode) {
  SHARED(float, shared);
  const int t = threadIdx.x;
  if (mode == 1 && t >= 32) return;                    // the second warp never comes to the barrier
  shared[t] = x[t];
  if (mode == 2) { if (t < 32) __syncthreads(); else {
      __syncthreads(); } }                             // two barriers
  else if (mode != 3) __syncthreads();                 // mode 3: none
  if (mode == 4) shared[64] = 1.0f;                    // past the end
  if (mode == 5 && t == 7) return;                     // a lane of the mask is gone
  float v = shared[63 - t];
  if (mode == 6) { if (t % 32 < 16) v = __shfl_xor_sync(0xffffu, v, 16); }  // from outside of the mask
  else v += __shfl_xor_sync(WARP, v, 1);
  y[t] = v;
}
extern "C" int launch_sum(const float* x, float* y, int mode, int threads, cudaStream_t stream) {
  LAUNCH(sum, dim3(1), dim3(threads), 64 * sizeof(float), stream, x, y, mode);
  return (int)cudaGetLastError();
}
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    return Cores(cuda_on_cpu.build(tmp_path_factory.mktemp("wrong"), WRONG), WRONG)


@pytest.mark.parametrize(
    "mode, says",
    [
        (1, "32 of 64 have ended"),
        (2, "wait for ever at __syncthreads"),
        (4, "past its 256 bytes"),
        (5, "a shuffle of line"),
        (6, "outside the mask"),
    ],
)
def test_the_emulation_refuses(wrong, mode, says):
    x, y = normal((64,)).astype(np.float32), np.zeros(64, np.float32)
    with pytest.raises(RuntimeError, match=says):
        wrong.call("launch_sum", x, y, mode, 64, None)
    wrong.call("launch_sum", x, y, 0, 64, None)  # and goes on afterwards
    assert np.allclose(y, x[::-1] + x[::-1].reshape(-1, 2)[:, ::-1].reshape(-1))


@pytest.mark.parametrize("threads", [0, 1025])
def test_the_emulation_refuses_a_block_that_no_gpu_takes(wrong, threads):
    with pytest.raises(RuntimeError, match=f"a block of {threads} threads"):
        wrong.call("launch_sum", None, None, 0, threads, None)


def test_a_missing_barrier_changes_the_result(wrong):
    x, y = normal((64,)).astype(np.float32), np.zeros(64, np.float32)
    for order in (0, 1, 2):
        wrong.order(order)
        wrong.call("launch_sum", x, y, 3, 64, None)
        assert np.isnan(y).any()


def test_the_emulated_types_round_as_numpy(cores):
    """dequantize with scale 1 / 3 and code 1: one rounding to each dtype."""
    codes, scales = cuda_on_cpu.pack(np.ones((8, 8), int), 4, 0), np.linspace(1e-6, 3.3, 8).astype(np.float32)
    zeros = cuda_on_cpu.pack(np.full((1, 8), 15), 4, 1)  # zero points of 0, stored less one
    for kind, dtype in enumerate(cuda_on_cpu.TYPES):
        out = cuda_on_cpu.blank((8, 8), dtype)
        cores.call("launch_dequantize", codes, scales, zeros, 8, 8, 4, 8, out, kind, None)
        assert np.array_equal(out, np.tile(cuda_on_cpu.stored(scales, dtype), (8, 1)))
    assert np.array_equal(cuda_on_cpu.wide(cuda_on_cpu.stored(scales, "bfloat16")), cases.rounded(scales))


# ================================================================================================== nvcc


@needs_nvcc
def test_nvcc_builds_operators_and_kernels_for_sm_90(builds):
    """Against the headers of this CPU wheel, which are the GPU wheel's."""
    path, build = builds["cuda"]
    spilled(build.wait().stderr)
    assert path.stat().st_size > 10_000


def spilled(report):
    """No kernel spills registers, and each fits: both are in ptxas's report."""
    kernels_seen = report.count("Compiling entry function")
    assert kernels_seen > 50 and report.count("0 bytes spill stores, 0 bytes spill loads") == kernels_seen, report[
        -3000:
    ]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", [cuda_on_cpu.CORES / "ops.cu", HERE / "cuda_harness.cu"], ids=lambda path: path.name)
def test_nvcc_builds_everything(source, arch, tmp_path):
    spilled(nvcc(source, tmp_path / "built.o", arch).wait().stderr)


# ================================================================================ gpu.py, on CPU tensors


@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 64), (1, 2, 8200)])
def test_rms_norm_with_residual(pretend, shape):
    x, residual, weight, upstream, up_h = (
        normal(shape),
        normal(shape, 1),
        normal(shape[-1:], 2) + 1,
        normal(shape, 3),
        normal(shape, 4),
    )
    eps, inputs = 1e-5, [tensor(a) for a in (x, residual, weight)]
    if shape[-1] > 8192:  # past what the kernel takes: an addition and Paddle's, whose backward has no CPU kernel
        inputs = [t.detach() for t in inputs]
    y, h = gpu.rms_norm(inputs[0], inputs[2], eps, inputs[1])
    total = x + residual
    r = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + eps)
    close(h.numpy(), total, 3e-6)
    close(y.numpy(), total * r * weight, 3e-6)
    if shape[-1] > 8192:
        return
    (y * tensor(upstream, frozen=True) + h * tensor(up_h, frozen=True)).sum().backward()
    g = upstream * weight
    dx = r * (g - total * r**2 * (g * total).mean(-1, keepdims=True)) + up_h
    close(inputs[0].grad.numpy(), dx, 3e-6)
    close(inputs[1].grad.numpy(), dx, 3e-6)
    close(inputs[2].grad.numpy(), (upstream * total * r).reshape(-1, shape[-1]).sum(0), 1e-5)


def test_rms_norm_with_residual_when_one_output_is_not_used(pretend):
    for used in (0, 1):
        x, residual, weight = tensor(normal((4, 24))), tensor(normal((4, 24), 1)), tensor(normal((24,), 2), frozen=True)
        gpu.rms_norm(x, weight, 1e-6, residual)[used].sum().backward()
        other = tensor(x.numpy() + residual.numpy())
        (reference.rms_norm(other, weight, 1e-6) if used == 0 else other).sum().backward()
        close(x.grad.numpy(), other.grad.numpy(), 3e-6)
        assert weight.grad is None


def test_rms_norm_is_paddles_where_there_is_no_residual(pretend):
    x, weight = tensor(normal((2, 3, 40)), frozen=True), tensor(normal((40,), 1), frozen=True)
    close(gpu.rms_norm(x, weight, 1e-5).numpy(), reference.rms_norm(x, weight, 1e-5).numpy(), 3e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape, rotary_dims",
    [((1, 1, 1, 2), 2), ((2, 5, 3, 8), 8), ((3, 7, 2, 6), 6), ((2, 5, 3, 12), 4), ((2, 5, 3, 4), 0)],
)
def test_rope(pretend, shape, rotary_dims, interleaved):
    cases.test_rope("gpu", shape, rotary_dims, interleaved)


def test_rope_with_one_table_for_all_sequences(pretend):
    x, cos, sin = (
        tensor(normal((3, 5, 2, 8)), frozen=True),
        *(tensor(np.tile(normal((1, 5, 1, 4), i), 2), frozen=True) for i in (1, 2)),
    )
    close(gpu.rope(x, cos, sin).numpy(), reference.rope(x, *(t.expand([3, 5, 1, 8]) for t in (cos, sin))).numpy())


@pytest.mark.parametrize("shape", [(1, 1), (5, 123)])
def test_swiglu(pretend, shape):
    cases.test_swiglu("gpu", shape)


@pytest.mark.parametrize("decay, grad_scale", [(0.0, 1.0), (0.1, 0.3)])
def test_adamw(pretend, decay, grad_scale):
    cases.test_adamw_over_several_steps("gpu", (5, 123), decay, grad_scale)
    cases.test_adamw_at_a_late_step("gpu")
    cases.test_adamw_does_not_change_the_gradient("gpu")


@pytest.mark.parametrize("size", ["whole", "chunks"])
@pytest.mark.parametrize("N, D, V", [(1, 1, 2), (5, 123, 17), (123, 5, 123)])
@pytest.mark.parametrize("transpose, ignored", [(False, 0.0), (True, 0.4)])
def test_linear_cross_entropy(pretend, monkeypatch, size, N, D, V, transpose, ignored):
    monkeypatch.setattr(gpu, "LOGITS", 8 if size == "chunks" else 1 << 20)
    cases.test_linear_cross_entropy("gpu", N, D, V, transpose, ignored, None)
    for frozen, softcap in itertools.product((False, True), (0.5, 30.0)):
        cases.test_linear_cross_entropy_with_a_softcap("gpu", N, D, V, transpose, frozen, softcap, None)


def test_linear_cross_entropy_edge_cases(pretend):
    cases.test_linear_cross_entropy_with_every_label_ignored("gpu")
    for softcap in (None, 0.6):
        cases.test_linear_cross_entropy_gradients_against_differences("gpu", softcap)
    for transpose in (False, True):
        cases.test_linear_cross_entropy_with_a_weight_stored_in_bfloat16("gpu", transpose, None)
        for scale in (1.0, 30.0):
            cases.test_linear_cross_entropy_with_a_frozen_weight("gpu", transpose, scale, None)


@pytest.mark.parametrize("shape", [(2, 7, 7, 4, 2, 8), (1, 13, 13, 3, 3, 24), (1, 3, 9, 4, 1, 16)])
@pytest.mark.parametrize("n, causal", [(0, True), (0, False), (1, True), (2, True), (2, False), (4, False)])
@pytest.mark.parametrize("version", [2, 3])
def test_attention(pretend, shape, n, causal, version):
    """Mask rows, heads and scale in bfloat16; the reference runs for mask rows with Tq != Tk."""
    pretend["FLAGS_flash_attn_version"] = version
    B, Tq, Tk, H, K, Dh = shape
    q, k, v = (
        tensor(normal(s, i), frozen=True).astype("bfloat16")
        for i, s in enumerate([(B, Tq, H, Dh), (B, Tk, K, Dh), (B, Tk, K, Dh)])
    )
    for heads, scale in itertools.product({1, K, H} if n else {1}, (None, 0.3)):
        rows = cases.random_rows(n, heads, B, Tk, causal) if n else None
        seen = cases.visible(rows, causal, B, H, Tq, Tk)
        out = gpu.attention(q, k, v, None if rows is None else paddle.to_tensor(rows.astype("int32")), causal, scale)
        arrays = [t.astype("float32").numpy().astype(float) for t in (q, k, v)]
        expected, _ = cases.naive_attention(
            *arrays, np.zeros_like(arrays[0]), seen, Dh**-0.5 if scale is None else scale
        )
        close(out.astype("float32").numpy(), expected, 2e-2)


def test_attention_uses_the_reference_for_what_flash_attention_lacks(pretend, monkeypatch):
    asked = []
    monkeypatch.setattr(reference, "attention", lambda q, *rest: asked.append(rest[-1]) or q)
    make = lambda Dh, dtype="bfloat16", T=4: tensor(normal((1, T, 2, Dh)), frozen=True).astype(dtype)
    rows = paddle.full([1, 1, 6, 1], 9, "int32")
    gpu.attention(*[make(8, "float32")] * 3)
    gpu.attention(*[make(8)] * 3, alibi_slopes=paddle.ones([2]))
    gpu.attention(*[make(8)] * 3, softcap=30.0)
    gpu.attention(*[make(20)] * 3)
    gpu.attention(*[make(264)] * 3)
    gpu.attention(make(8), make(8, T=6), make(8, T=6), rows)
    assert len(asked) == 6
    gpu.attention(make(8), make(8, T=6), make(8, T=6))
    kernels.bf16 = True
    assert gpu.attention(*[make(8, "float32")] * 3).dtype == paddle.float32
    assert len(asked) == 6, "with kernels.bf16 float32 goes in as bfloat16 and comes out again"


def pool(S, contexts, K, Dh, block_size=4):
    needed = -(-np.asarray(contexts) // block_size)
    tables = np.zeros((S, needed.max()), np.int32)
    order = np.random.default_rng(0).permutation(int(needed.sum()))
    for s, n in enumerate(needed):
        tables[s, :n], order = order[:n], order[n:]
    return tables, (int(needed.sum()), block_size, K, Dh)


@pytest.mark.parametrize("queries, contexts", [([1, 1, 1], [5, 9, 1]), ([3, 1, 2, 1], [7, 6, 2, 30]), ([4], [4])])
@pytest.mark.parametrize("int8", [False, True])
def test_paged_attention(pretend, queries, contexts, int8):
    H, K, Dh = 4, 2, 16
    tables, shape = pool(len(queries), contexts, K, Dh)
    q, generator = tensor(normal((sum(queries), H, Dh)), frozen=True), np.random.default_rng(1)
    if int8:
        caches = [paddle.to_tensor(generator.integers(-128, 128, shape).astype(np.int8)) for _ in "kv"]
        scales = [tensor(generator.uniform(0.002, 0.02, shape[:3]), frozen=True) for _ in "kv"]
        floats = [c.astype("float32") * s.unsqueeze(-1) for c, s in zip(caches, scales)]
    else:
        scales, floats = [None, None], [tensor(normal(shape, i), frozen=True) for i in (2, 3)]
        caches = floats
    slopes = tensor([0.5, 0.25, 0.1, 0.0], frozen=True)
    for score_options in (
        {},
        {"scale": 0.7},
        {"alibi_slopes": slopes},
        {"window": 3},
        {"softcap": 0.5},
        {"alibi_slopes": slopes, "window": 7, "softcap": 2.0},
    ):
        expected = reference.paged_attention(q, *floats, tables, queries, contexts, **score_options)
        actual = gpu.paged_attention(
            q, *caches, tables, queries, contexts, k_scales=scales[0], v_scales=scales[1], **score_options
        )
        close(actual.numpy(), expected.numpy(), 5e-6)
        if not int8:  # in two bytes: by the kernel, and, with no multiple of 8, by the reference
            for cut in (Dh, 12):
                given = [t[..., :cut].contiguous() for t in (q, *caches)]
                halves = [t.astype("bfloat16") for t in given]
                expected = reference.paged_attention(
                    *(t.astype("float32") for t in halves), tables, queries, contexts, **score_options
                )
                actual = gpu.paged_attention(*halves, tables, queries, contexts, **score_options)
                assert actual.dtype == paddle.bfloat16
                close(actual.astype("float32").numpy(), expected.numpy(), 2e-2)


@pytest.mark.parametrize("scheme", ["w4", "w8"])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quant_linear(pretend, scheme, rows, symmetric):
    bits, n_in, n_out, groups = int(scheme[1:]), 96, 40, 3
    generator = np.random.default_rng(rows)
    words = lambda *s: paddle.to_tensor(generator.integers(-(2**31), 2**31, s).astype(np.int32))
    qweight, qzeros = words(n_in * bits // 32, n_out), None if symmetric else words(groups, n_out * bits // 32)
    scales, bias, x = (
        tensor(generator.uniform(0.01, 0.1, (groups, n_out)), frozen=True),
        tensor(normal((n_out,)), frozen=True),
        normal((1, rows, n_in)),
    )
    expected = reference.quant_linear(tensor(x), qweight, scales, bias, scheme, qzeros)
    close(
        gpu.quant_linear(tensor(x, frozen=True), qweight, scales, bias, scheme, qzeros).numpy(), expected.numpy(), 5e-6
    )
    trained, upstream = [tensor(x), tensor(x)], tensor(normal((1, rows, n_out), 5), frozen=True)
    for backend, t in zip((gpu, reference), trained):
        (backend.quant_linear(t, qweight, scales, bias, scheme, qzeros) * upstream).sum().backward()
    close(trained[0].grad.numpy(), trained[1].grad.numpy(), 5e-6)


def test_quant_linear_leaves_act_order_and_a8w8_to_the_reference(pretend, monkeypatch):
    asked = []
    monkeypatch.setattr(reference, "quant_linear", lambda x, qweight, scales, bias, scheme, *rest: asked.append(scheme))
    x, words, scales = tensor(normal((2, 32)), frozen=True), paddle.zeros([4, 8], "int32"), paddle.ones([2, 8])
    gpu.quant_linear(x, words, scales, None, "w4", None, paddle.zeros([32], "int32"))
    gpu.quant_linear(x, paddle.zeros([32, 8], "int8"), paddle.ones([8]), None, "a8w8")
    assert asked == ["w4", "a8w8"]


# ================================================================= Paddle's signatures and shape inference

SHAPES = r"""
import ctypes, json, sys
import paddle
from paddle import _C_ops
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
paddle.utils.cpp_extension.load_op_meta_info_and_register_op(sys.argv[2])
from kernels import gpu
import paddle.nn.quant as quant
flags = {"FLAGS_cudnn_deterministic": False, "FLAGS_flash_attn_version": 2}
paddle.get_flags = paddle.base.framework.get_flags = lambda names: {n: flags[n] for n in names}
paddle.enable_static()
results, count = {}, 0

def a(shape, dtype="bfloat16"):
    global count
    count += 1
    return paddle.static.data(f"x{count}", list(shape), dtype)

def infer(name, call):
    try:
        out = call()
    except Exception as error:
        results[name] = "error: " + (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        return
    out = out if isinstance(out, (list, tuple)) else [out]
    results[name] = [[list(o.shape), str(o.dtype)[7:]] for o in out if hasattr(o, "shape") and o.is_dense_tensor_type()]

with paddle.static.program_guard(paddle.static.Program()):
    q, k, rows = a([-1, -1, 8, 64]), a([-1, -1, 2, 64]), a([-1, 1, -1, 1], "int32")
    for version in (2, 3):
        flags["FLAGS_flash_attn_version"] = version
        infer(f"flash {version}", lambda: gpu._flash_attention(q, k, k, rows, True))
        infer(f"flash {version} four", lambda: gpu._flash_attention(q, k, k, a([-1, 2, -1, 4], "int32"), False))
    infer("flash without rows", lambda: gpu._flash_attention(q, k, k, None, True))
    infer("flash with rows of three", lambda: gpu._flash_attention(q, k, k, a([-1, 1, -1, 3], "int32"), True))
    infer("flash in float32", lambda: gpu._flash_attention(*[a([-1, -1, 8, 64], "float32")] * 3, rows, True))
    x, w = a([-1, -1, 128], "float32"), a([128], "float32")
    infer("rms_norm", lambda: gpu._fused_rms_norm(x, w, 1e-5))
    infer("rms_norm wrong", lambda: gpu._fused_rms_norm(x, a([64], "float32"), 1e-5))
    table = a([1, -1, 1, 64])
    infer("rope", lambda: gpu._fused_rope(q, table, table, a([-1, -1], "int64")))
    infer("rope without positions", lambda: gpu._fused_rope(q, table, table, None))
    infer("rope wrong", lambda: gpu._fused_rope(a([-1, 8, 64]), table, table, None))
    infer("swiglu", lambda: paddle.nn.functional.swiglu(x, x))
    infer("swiglu wrong", lambda: paddle.nn.functional.swiglu(x, a([-1, -1, 64], "float32")))
    p, one = a([12, 3], "float32"), a([1], "float32")
    infer("adamw", lambda: gpu._adamw(p, p, one, p, p, one, one, 0.9, 0.99, 1e-8, 0.1))
    infer("adamw wrong", lambda: gpu._adamw(p, p, one, one, p, one, one, 0.9, 0.99, 1e-8, 0.1))
    for algo, group in (("int8", -1), ("int4", 64)):
        def both():
            codes, scale = quant.weight_quantize(a([128, 256]), "weight_only_" + algo, 80, group)
            return codes, scale, quant.weight_only_linear(a([-1, 128]), codes, None, scale, algo, 80, group)
        infer(f"weight_only {algo}", both)
    run = _C_ops._run_custom_op
    infer("our cross_entropy", lambda: run("gpu_cross_entropy", a([-1, 1000]), a([-1], "int64"), 0.0))
    infer("our softmax", lambda: run("gpu_softmax_backward", a([-1, 1000]), a([-1], "int64"), a([-1], "float32"),
        a([-1], "float32"), 30.0))
    infer("our rms_norm", lambda: run("gpu_rms_norm_residual", a([2, 5, 64]), a([2, 5, 64]), a([64]), 1e-5))
    infer("our rms_norm backward", lambda: run("gpu_rms_norm_residual_backward", a([2, 5, 64]), a([64]), a([10],
        "float32"), a([2, 5, 64]), a([2, 5, 64])))
    cache, scales = a([-1, 16, 2, 64], "int8"), a([-1, 16, 2], "float32")
    infer("our paged_decode", lambda: run("gpu_paged_decode", a([-1, 8, 64]), cache, cache, a([-1, -1], "int32"),
        a([-1], "int32"), scales, scales, a([8], "float32"), 0.125, 99, 99, 0.0))
    infer("our quant_linear", lambda: run("gpu_quant_linear", a([-1, 128]), a([16, 256], "int32"), a([1, 256],
        "float32"), None, None, 4, 128))
    infer("our dequantize", lambda: run("gpu_dequantize", a([1]), a([16, 256], "int32"), a([1, 256], "float32"),
        a([1, 32], "int32"), 4, 128))
print(json.dumps(results))
"""
INFERRED = {
    **{
        f"flash {version}": [[[-1, -1, 8, 64], "bfloat16"]]
        for version in ("2", "3", "2 four", "3 four", "without rows")
    },
    "rms_norm": [[[-1, -1, 128], "float32"]],
    "rope": [[[-1, -1, 8, 64], "bfloat16"]],
    "rope without positions": [[[-1, -1, 8, 64], "bfloat16"]],
    "swiglu": [[[-1, -1, 128], "float32"]],
    "adamw": [[[12, 3], "float32"]] * 3 + [[[1], "float32"]] * 2,
    "weight_only int8": [[[256, 128], "int8"], [[256], "bfloat16"], [[-1, 256], "bfloat16"]],
    "weight_only int4": [[[128, 128], "int8"], [[2, 256], "bfloat16"], [[-1, 256], "bfloat16"]],
    "our cross_entropy": [[[-1], "float32"], [[-1], "float32"], [[-1], "int64"]],
    "our softmax": [[[-1, 1000], "bfloat16"]],
    "our rms_norm": [[[2, 5, 64], "bfloat16"], [[2, 5, 64], "bfloat16"], [[10], "float32"]],
    "our rms_norm backward": [[[2, 5, 64], "bfloat16"], [[64], "bfloat16"]],
    "our paged_decode": [[[-1, 8, 64], "bfloat16"]],
    "our quant_linear": [[[-1, 256], "bfloat16"]],
    "our dequantize": [[[128, 256], "bfloat16"]],
}
REFUSED = {
    "flash with rows of three": "1 or 2",
    "flash in float32": "float32",
    "rms_norm wrong": "64",
    "rope wrong": "3",
    "swiglu wrong": "64",
    "adamw wrong": "1",
}


@pytest.fixture(scope="module")
def inferred(builds):
    for name in ("phi", "ops"):
        builds[name][1].wait()
    script = f"import sys\nsys.path.insert(0, {str(HERE.parents[1])!r})\n{SHAPES}"
    done = subprocess.run(
        [sys.executable, "-c", script, builds["phi"][0], builds["ops"][0]],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", INFERRED)
def test_paddle_infers_the_shapes_of_a_call(inferred, name):
    """Symbolic shapes through the calls of gpu.py: Paddle's shape inference; no kernel runs."""
    assert inferred[name] == INFERRED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_paddle_refuses_a_wrong_call(inferred, name):
    assert str(inferred[name]).startswith("error") and REFUSED[name] in inferred[name]


def test_every_shape_inference_is_tested(inferred):
    assert set(inferred) == {*INFERRED, *REFUSED}


@pytest.mark.parametrize(
    "function, positional, named",
    [
        (
            paddle.nn.functional.flashmask_attention,
            ["query", "key", "value", "startend_row_indices"],
            {"causal": False, "dropout": 0.0, "training": True},
        ),
        (
            paddle.incubate.nn.functional.fused_rms_norm,
            ["x", "norm_weight", "norm_bias", "epsilon"],
            {"begin_norm_axis": 1, "residual": None, "quant_scale": -1},
        ),
        (
            paddle.incubate.nn.functional.fused_rotary_position_embedding,
            ["q"],
            {"sin": None, "cos": None, "position_ids": None, "use_neox_rotary_style": True, "time_major": False},
        ),
        (paddle.nn.functional.swiglu, ["x", "y"], {}),
        (
            paddle.nn.quant.weight_only_linear,
            ["x", "weight", "bias", "weight_scale", "weight_dtype", "arch", "group_size"],
            {"group_size": -1},
        ),
    ],
)
def test_paddle_has_the_signature_that_is_called(function, positional, named):
    parameters = inspect.signature(function).parameters
    assert list(parameters)[: len(positional)] == positional
    assert {name: parameters[name].default for name in named} == named


def test_weight_only_linear_does_not_support_our_layouts():
    """Why gpu.py does not use it: no zero points, only groups of 64 or 128."""
    from paddle.nn.quant import weight_only_linear

    assert not any("zero" in name for name in inspect.signature(weight_only_linear).parameters)
    with pytest.raises(AssertionError, match="64 or 128"):
        weight_only_linear(
            paddle.ones([1, 32]), paddle.ones([8, 32]), weight_scale=paddle.ones([8]), arch=80, group_size=32
        )


@pytest.mark.parametrize("op", [op for op in kernels.OPS if hasattr(gpu, op)])
def test_gpu_has_the_signature_of_the_shim(op):
    shim, own = (inspect.signature(getattr(module, op)).parameters for module in (kernels, gpu))
    assert [(p.name, p.default) for p in own.values()][: len(shim)] == [(p.name, p.default) for p in shim.values()]
    assert all(p.default is None for p in list(own.values())[len(shim) :]), (
        "what the shim does not pass must not be needed"
    )


# ============================================================================================ without a GPU


def test_nothing_imports_the_gpu_back_end(run_python):
    script = "import json, sys, kernels\nkernels.configure('cpu')\nkernels.describe()\n"
    script += "print(json.dumps('kernels.gpu' in sys.modules))"
    assert run_python(script) is False


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle has CUDA")
def test_configure_says_in_one_line_that_there_is_no_gpu():
    with pytest.raises(UserError, match="device: 'gpu' ") as error:
        kernels.configure("gpu")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle has CUDA")
def test_what_this_paddle_lacks_has_a_reason(monkeypatch):
    for op, names in gpu.OF_PADDLE.items():
        assert gpu.missing(op) == f"this Paddle has no {names[0]} for GPUs"
    here = paddle.base.core._get_all_register_op_kernels("phi")
    for name in ("swiglu", "swiglu_grad", "fused_rms_norm_quant", "adamw"):  # the names are Paddle's: the CPU has these
        assert name in here
    there = {name: ["{data_type[float]; place[Place(gpu:0)]}"] for names in gpu.OF_PADDLE.values() for name in names}
    monkeypatch.setattr(gpu, "_all_kernels", lambda: there)
    monkeypatch.setattr(gpu, "_capability", lambda: 75)
    assert gpu.missing("rms_norm") is None
    assert gpu.missing("attention") == gpu.missing("bf16") == "compute capability 8.0 is needed, this GPU has 7.5"
    del there["fused_rms_norm_quant_grad"]
    assert gpu.missing("rms_norm") == "this Paddle has no fused_rms_norm_quant_grad for GPUs"


def test_the_names_of_paddles_kernels_are_right():
    """Operators that Paddle's Python calls exist, even if this build has no kernel for them."""
    for name in {name for names in gpu.OF_PADDLE.values() for name in names}:
        assert hasattr(paddle._C_ops, name) or hasattr(paddle._C_ops, f"{name}_"), name


def test_without_nvcc_the_reference_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "_capability", lambda: 90)
    monkeypatch.setattr(gpu, "_registered", lambda op: True)
    monkeypatch.setattr(gpu, "_state", None)
    assert gpu.missing("quant_linear") == "no CUDA compiler: there is no nvcc"
    assert gpu.missing("rms_norm") is None
    with pytest.raises(UserError, match="no nvcc.*paged_attention=reference"):
        kernels.configure("cpu", "paged_attention=gpu")
    x, weight = tensor(normal((3, 8)), frozen=True), tensor(normal((8,), 1), frozen=True)
    y, h = gpu.rms_norm(x, weight, 1e-5, x)
    close(y.numpy(), reference.rms_norm(x * 2, weight, 1e-5).numpy())
    monkeypatch.undo()
    kernels.configure("cpu")


def test_a_build_that_fails_names_its_log(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels._build.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu, "_capability", lambda: 90)
    monkeypatch.setattr(gpu, "_state", None)
    seen = {}

    def fails(**options):
        seen.update(options)
        raise RuntimeError("ninja: error")

    monkeypatch.setattr(paddle.utils.cpp_extension, "load", fails)
    assert "building the CUDA ops failed, see" in gpu.missing("quant_linear")
    assert "-arch=sm_90" in seen["extra_cuda_cflags"] and [Path(s).name for s in seen["sources"]] == ["ops.cu"]
