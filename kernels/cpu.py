"""Ops for which Paddle's CPU operators are slow: our own C++ (kernels/cpu/*.cc), or another of Paddle's operators.

The C++ is built once, on first use, by paddle.utils.cpp_extension, into a cache outside the tree that is named after its
sources, its flags and Paddle's version. It holds code for AVX-512, AVX2 and SSE2 and chooses at run time. Without a compiler
the ops that need it are not there (see missing()), and the reference runs instead.

rms_norm, rope, swiglu: one pass forward, one backward. adamw: Paddle's own, one pass over parameter, gradient and both
moments instead of a dozen; on 1.6 M values 3.3 ms instead of 6.4 (two cores of an EPYC with AVX-512, busy with other work).

linear, linear_cross_entropy: with kernels.bf16, products in bfloat16 (vdpbf16ps) of float32 tensors that are converted and
packed inside; else Paddle's own.

quant_linear: 4- and 8-bit weights are unpacked in registers for up to 32 rows, in one pass for more; act order and a8w8
are the reference's.

attention: tiles of 72 queries by 64 keys, online softmax (Dao, arXiv 2307.08691), masked tiles skipped; q, k, v, the output
and one float a query are kept for backward. Sums are in an order that depends on shapes alone.

paged_attention, write_cache: blocks of the pool are read and written where they lie, int8 ones rounded and widened in
registers. A decode is split over sequences, key/value heads and runs of 256 keys, a prompt over tiles of 64 rows.

sample: float64 as the oracle, sorting only what can be among the likeliest that make up top_p.
"""

import hashlib
import math
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import paddle
from paddle import _C_ops
from paddle.autograd import PyLayer

import kernels
from kernels import reference

SOURCES = Path(__file__).with_suffix("")  # the folder kernels/cpu
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
OF_EXTENSION = "attention paged_attention write_cache sample rms_norm rope swiglu quant_linear bf16".split()  # what needs it: ops, products in bfloat16

_state = None  # True once the built ops are loaded, or the reason why they cannot be


def missing(op):
    """Why this op, or "bf16", cannot run here, or None. Builds the C++ the first time that it is asked for."""
    global _state
    if op not in OF_EXTENSION:
        return None
    if _state is None:
        try:
            _load()
            _state = True
        except (OSError, RuntimeError, ImportError) as error:
            _state = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if _state is not True:
        return _state
    if op == "bf16" and not _has_bfloat16():
        return "this processor has no bfloat16 instructions (AVX512-BF16)"
    return None


def _has_bfloat16():
    with open("/proc/cpuinfo") as file:
        return " avx512_bf16" in file.read(10000)


def _load():
    """Load the built ops from the cache, or build them into it; several processes that start at once build them once."""
    import fcntl  # not on every system

    name, compiler = "kernels_cpu", os.environ.get("CXX", "g++")
    sources = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(" ".join([paddle.__version__, sys.version, compiler, *FLAGS]).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddle-llm-kernels"
    folder = cache / digest.hexdigest()[:16]
    library = folder / name / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").is_file():
            if shutil.which(compiler) is None:
                raise OSError(f"no C++ compiler: there is no {compiler}")
            print("kernels: building the C++ ops for this processor, about half a minute, once …", flush=True)
            _build(name, [str(s) for s in sources if s.suffix == ".cc"], folder)
            (folder / "complete").touch()
            return  # building has loaded it
    paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(library))


def _build(name, sources, folder):
    """Compile into folder/name/name.so; what the compiler and Paddle say goes to folder/build.log."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(folder / "build.log", "w") as log:
        kept = [os.dup(1), os.dup(2)]
        for stream in (1, 2):  # not only Python's: a process of its own compiles
            os.dup2(log.fileno(), stream)
        try:
            paddle.utils.cpp_extension.load(name=name, sources=sources, extra_cxx_cflags=FLAGS, extra_ldflags=["-pthread"],
                                            build_directory=str(folder))  # fmt: skip
        except (RuntimeError, OSError) as error:
            raise OSError(f"building the C++ ops failed, see {folder / 'build.log'}") from error
        finally:
            for stream, before in zip((1, 2), kept):
                os.dup2(before, stream)
                os.close(before)


# ---------------------------------------------------------------------------------------------- products


def _plain(*tensors):
    """Whether the C++ takes these: float32 on a dynamic graph."""
    return paddle.in_dynamic_mode() and all(t.dtype == paddle.float32 for t in tensors)


def bf16_matmul(x, y, transpose_x=False, transpose_y=False):
    """x (M, K) or transposed, y (K, N) or transposed, float32 -> (M, N) float32; products of bfloat16, sums in float32."""
    return _C_ops._run_custom_op("cpu_bf16_matmul", x.contiguous(), y.contiguous(), transpose_x, transpose_y)[0]


def linear(x, weight, bias=None):
    if (few := _few_rows(x, weight, bias)) is not None:
        return few
    n_in, n_out = weight.shape
    wide = min(x.size // n_in, n_in, n_out) >= 32  # below, packing costs more than the faster product saves
    if not (kernels.bf16 and wide and x.dtype == weight.dtype == paddle.float32 and paddle.in_dynamic_mode()):
        return reference.linear(x, weight, bias)
    y = _Bf16Linear.apply(x, weight)
    return y if bias is None else y + bias


def _few_rows(x, weight, bias):
    """x @ weight + bias of at most 32 rows, where no gradient is wanted and the C++ takes them; else None.

    Bound by reading the weight, which may be stored in bfloat16: then half the bytes.
    """
    if _state is not True or weight.dtype not in (paddle.float32, paddle.bfloat16) or not _plain(x):
        return None
    wanted = paddle.is_grad_enabled() and not (x.stop_gradient and weight.stop_gradient)
    if wanted or math.prod(x.shape[:-1]) > 32 or (bias is not None and bias.dtype != paddle.float32):
        return None
    return _C_ops._run_custom_op("cpu_few_rows_linear", x.contiguous(), weight, bias, -1)[0]


class _Bf16Linear(PyLayer):
    """y = x W; dx = dy W^T, dW = x^T dy."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.frozen = [x.stop_gradient, weight.stop_gradient]
        return bf16_matmul(x.reshape([-1, weight.shape[0]]), weight).reshape([*x.shape[:-1], weight.shape[1]])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensor()
        dy = dy.reshape([-1, weight.shape[1]])
        dx = None if ctx.frozen[0] else bf16_matmul(dy, weight, transpose_y=True).reshape(x.shape)
        return dx, None if ctx.frozen[1] else bf16_matmul(x.reshape([-1, weight.shape[0]]), dy, transpose_x=True)


def linear_cross_entropy(hidden, weight, labels, transpose_weight=False, ignore_index=-100, return_predictions=False):
    whole = hidden.dtype == weight.dtype == paddle.float32
    return reference.linear_cross_entropy(hidden, weight, labels, transpose_weight, ignore_index, return_predictions,
                                          bf16_matmul if kernels.bf16 and whole else paddle.matmul)  # fmt: skip


def quant_linear(x, qweight, scales, bias=None, scheme="w8", qzeros=None, g_index=None, input_scale=None):
    n_in, (groups, n_out) = x.shape[-1], scales.shape if scales.ndim == 2 else (0, 0)
    layout = scheme != "a8w8" and g_index is None and qzeros is not None and n_in % groups == 0 and n_out % 16 == 0
    if not (layout and n_in // groups % (32 // int(scheme[1:])) == 0 and _plain(x, scales)):
        return reference.quant_linear(x, qweight, scales, bias, scheme, qzeros, g_index, input_scale)
    how = scales, qzeros, int(scheme[1:]), n_in // groups
    if x.size // n_in > 32 or paddle.is_grad_enabled() and not x.stop_gradient:  # faster as one product with floats
        return linear(x, _C_ops._run_custom_op("cpu_dequantize", qweight, *how)[0], bias)
    y = _C_ops._run_custom_op("cpu_quant_linear", x.reshape([-1, n_in]).contiguous(), qweight, *how)[0]
    y = y.reshape([*x.shape[:-1], n_out])
    return y if bias is None else y + bias


# ---------------------------------------------------------------------------------------------- attention


def attention(q, k, v, startend_row_indices=None, causal=True, scale=None, alibi_slopes=None):
    if q.dtype != paddle.float32 or not paddle.in_dynamic_mode():
        return reference.attention(q, k, v, startend_row_indices, causal, scale, alibi_slopes)
    rows = startend_row_indices
    B, Tq, H, Dh = q.shape
    Tk, K = k.shape[1], k.shape[2]
    assert H % K == 0, f"{H} query heads are not a multiple of {K} key/value heads"
    assert not causal or Tk >= Tq, f"causal attention of {Tq} queries over {Tk} keys"
    if rows is not None:
        n = rows.shape[-1]
        assert list(rows.shape[:3:2]) == [B, Tk] and rows.shape[1] in (1, K, H), f"rows {rows.shape}, keys {k.shape}"
        assert n in ((1, 2) if causal else (2, 4)), f"{n} columns of rows with causal={causal}"
    how = types.SimpleNamespace(  # a plain object, as a PyLayer would take tensors among its arguments for inputs
        rows=None if rows is None else rows.astype("int32").contiguous(),
        slopes=None if alibi_slopes is None else alibi_slopes.astype("float32").contiguous(),
        rest=(bool(causal), Dh**-0.5 if scale is None else float(scale), -1),
    )
    return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), how)


class _Attention(PyLayer):
    @staticmethod
    def forward(ctx, q, k, v, how):
        out, lse = _C_ops._run_custom_op("cpu_attention", q, k, v, how.rows, how.slopes, *how.rest)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how, ctx.frozen = how, [t.stop_gradient for t in (q, k, v)]
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensor()
        how = ctx.how
        found = _C_ops._run_custom_op(
            "cpu_attention_backward", q, k, v, how.rows, how.slopes, out, lse, d_out.contiguous(), *how.rest
        )
        return tuple(None if frozen else d for d, frozen in zip(found, ctx.frozen))


# ---------------------------------------------------------------------------------------- paged attention

_paged = None  # (arrays of the last call, tensors made of them)


def paged_attention(q, k_cache, v_cache, block_tables, query_lengths, context_lengths, scale=None, k_scales=None, v_scales=None):
    cache = paddle.float32 if k_scales is None else paddle.int8
    if not (_plain(q) and k_cache.dtype == v_cache.dtype == cache):
        return reference.paged_attention(
            q, k_cache, v_cache, block_tables, query_lengths, context_lengths, scale, k_scales, v_scales
        )
    tables, lengths = _paged_tensors(q, k_cache, (block_tables, query_lengths, context_lengths))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _C_ops._run_custom_op(
        "cpu_paged_attention", q.contiguous(), k_cache, v_cache, tables, lengths, k_scales, v_scales, scale, -1
    )[0]


def _paged_tensors(q, k_cache, arrays):
    """Block tables (S, blocks) and lengths (2, S) as int32 tensors: the last ones, if the arrays cannot have changed since."""
    global _paged
    if _paged is None or any(a is not b for a, b in zip(_paged[0], arrays)):
        tables, queries, contexts = (np.ascontiguousarray(a, np.int32) for a in arrays)
        reference.check_paged(q.shape, k_cache.shape, tables, queries, contexts)
        found = kernels.to_tensor(tables), kernels.to_tensor(np.stack([queries, contexts]))
        if any(getattr(a, "flags", None) is None or a.flags.writeable for a in arrays):
            return found
        _paged = arrays, found
    return _paged[1]


def write_cache(k, v, k_cache, v_cache, slots, k_scales=None, v_scales=None):
    if not _plain(k, v) or k_cache.dtype != (paddle.float32 if k_scales is None else paddle.int8):
        return reference.write_cache(k, v, k_cache, v_cache, slots, k_scales, v_scales)
    _C_ops._run_custom_op(
        "cpu_write_cache", k.contiguous(), v.contiguous(), k_cache, v_cache, slots, k_scales, v_scales, -1
    )


def sample(logits, temperature, top_k, top_p, uniform):
    if not _plain(logits):
        return reference.sample(logits, temperature, top_k, top_p, uniform)
    how = kernels.to_tensor(np.array([temperature, top_p, uniform], np.float64))
    return _C_ops._run_custom_op("cpu_sample", logits.contiguous(), kernels.to_tensor(np.asarray(top_k, np.int64)), how, -1)[0]


# ------------------------------------------------------------------------------------- norm, rotation, gate


def rms_norm(x, weight, epsilon):
    if not _plain(x, weight):
        return reference.rms_norm(x, weight, epsilon)
    return _RMSNorm.apply(x.contiguous(), weight, epsilon)


class _RMSNorm(PyLayer):
    """y = x r w with r = rsqrt(mean(x^2) + eps): dx = r (dy w - x r^2 mean(dy w x)), dw = sum(dy x r)."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        y, r = _C_ops._run_custom_op("cpu_rms_norm", x, weight, epsilon)
        ctx.save_for_backward(x, weight, r)
        ctx.frozen = [x.stop_gradient, weight.stop_gradient]
        return y

    @staticmethod
    def backward(ctx, dy):
        found = _C_ops._run_custom_op("cpu_rms_norm_backward", *ctx.saved_tensor(), dy.contiguous())
        return tuple(None if frozen else d for d, frozen in zip(found, ctx.frozen))


def rope(x, cos, sin):
    if not _plain(x, cos, sin):
        return reference.rope(x, cos, sin)
    if cos.shape[:2] != x.shape[:2]:
        cos, sin = cos.expand([*x.shape[:2], 1, -1]), sin.expand([*x.shape[:2], 1, -1])
    if x.stop_gradient or not paddle.is_grad_enabled():  # decoding: a PyLayer costs as much as the rotation
        return _C_ops._run_custom_op("cpu_rope", x.contiguous(), cos.contiguous(), sin.contiguous(), 1.0)[0]
    return _Rope.apply(x.contiguous(), cos, sin)


class _Rope(PyLayer):
    """A rotation: its gradient is the rotation back. Nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.tables = cos.contiguous(), sin.contiguous()
        return _C_ops._run_custom_op("cpu_rope", x, *ctx.tables, 1.0)[0]

    @staticmethod
    def backward(ctx, dy):
        return _C_ops._run_custom_op("cpu_rope", dy.contiguous(), *ctx.tables, -1.0)[0], None, None


def swiglu(gate, up):
    if not _plain(gate, up):
        return reference.swiglu(gate, up)
    return _SwiGLU.apply(gate.contiguous(), up.contiguous())


class _SwiGLU(PyLayer):
    """y = g s u with s = sigmoid(g): dg = dy u s (1 + g (1 - s)), du = dy g s."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.frozen = [gate.stop_gradient, up.stop_gradient]
        return _C_ops._run_custom_op("cpu_swiglu", gate, up)[0]

    @staticmethod
    def backward(ctx, dy):
        found = _C_ops._run_custom_op("cpu_swiglu_backward", *ctx.saved_tensor(), dy.contiguous())
        return tuple(None if frozen else d for d, frozen in zip(found, ctx.frozen))


# ---------------------------------------------------------------------------------------------- optimizer


@paddle.no_grad()
def adamw(parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale=1.0):
    if grad_scale != 1.0:
        gradient = gradient * grad_scale
    _C_ops.adamw_(
        parameter, gradient, paddle.to_tensor(lr, "float32"), moment1, moment2, None,
        paddle.to_tensor([beta1 ** (step - 1) * beta1]), paddle.to_tensor([beta2 ** (step - 1) * beta2]),
        None, None, beta1, beta2, epsilon, 1.0, weight_decay, weight_decay != 0.0, False, 1000, False, False, False,
    )  # fmt: skip
