"""Ops that our C++ (kernels/cpu/*.cc), or another Paddle operator, computes faster than Paddle's usual CPU operator.

The C++ is built on first use (_build.py). It contains code for AVX-512, AVX2 and SSE2 and chooses at run time. Without
a compiler the ops that need it are missing (see missing()), and the reference runs instead.

rms_norm and layer_norm with their residual, rope, swiglu, geglu, gelu: one pass forward, one backward, at the speed of
memory. Forward and backward of rms_norm of (2048, 2048): 4 ms, Paddle's operators 137; gelu of (2048, 3072): 5 ms,
Paddle's 12.8 by tanh and 20 without (its relu, at 5, is fast enough). embedding: see _Embedding. adamw: one pass over
parameter, gradient and both moments, 25 M values in 16 ms (Paddle's with clipping 144). squared_norm: one pass over the
gradient, 3.5 ms (67). Best of 6 to 30 alternating runs on two cores of an EPYC with AVX-512 under other load.

linear, lora_linear: with kernels.bf16, products in bfloat16 (vdpbf16ps); tensors are converted and packed inside, and
LoRA's products are fused with the base's. Without it, Paddle's products.

linear_cross_entropy: blocks of columns of the head whose logits stay in the cache, with Paddle's products or, with
kernels.bf16, ours. For 2,048 tokens, D 768, V 32,000, forward and backward add at most 164 MB with a trained head (98
of them its gradient) and 71 MB with a frozen one, in any storage dtype.

quant_linear: 4- and 8-bit weights are unpacked in registers for up to 32 rows, in one pass for more. a8w8: int8
products by AMX, AVX512-VNNI or pmaddwd, with exact sums. Weights are read as stored; there is no packed copy.

attention: tiles of 72 (bfloat16: 96) queries by 64 keys, online softmax (Dao, arXiv 2307.08691); masked tiles are
skipped. Saves q, k, v, the output and one float per query for backward, which recomputes scores and the tanh of a
softcap. The order of sums depends only on shapes.

paged_attention, write_cache: blocks of the pool are read and written in place; int8 is converted in registers. A decode
step is split over sequences, key/value heads and runs of 256 keys, a prompt over tiles of 64 rows; keys outside the
window are not read.

sample: float64 like the oracle, but sorts only candidates for the top_p set.
"""

import ctypes
import functools
import math
import os
import types
from pathlib import Path

import kernels
from kernels import _build, reference

import numpy as np
import paddle
from paddle import _C_ops
from paddle.autograd import PyLayer

SOURCES = Path(__file__).with_suffix("")  # the folder kernels/cpu
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
OF_EXTENSION = """attention attention_with_lse attention_with_lse_backward paged_attention write_cache sample
    log_probabilities rms_norm layer_norm rope swiglu geglu gelu embedding lora_linear quant_linear dequantize_table
    linear_cross_entropy adamw squared_norm bf16 peak fused_multi_transformer""".split()  # and products in bfloat16
LOGITS = 1 << 22  # of one block of linear_cross_entropy (16 MB, which stays in the cache)
LOGITS_ROWS = 8192  # most tokens of a block
SMALL = (
    1 << 18
)  # values of a weight below which one row is faster by Paddle's product: 12 us instead of 29 of (256, 688)
INSTRUCTIONS = -1  # of our C++: 2 AVX-512, 1 AVX2, 0 SSE2, -1 the best available (tests set it)

IN_BFLOAT16 = 3  # the value of INSTRUCTIONS for attention with products in bfloat16

_state = None  # True when the built ops are loaded, or the reason why they cannot be


def missing(op: str) -> str | None:
    """The reason why this op, or "bf16", cannot run here, or None. Builds the C++ ops on first use."""
    global _state
    if op not in OF_EXTENSION:
        return None
    if _state is None:
        _state = _build.attempt(_load)
    if _state is not True:
        return _state
    if op == "bf16" and not _has_bfloat16():
        return "this processor has no bfloat16 instructions (AVX512-BF16)"
    return None


def _has_bfloat16():
    return has_instructions("avx512_bf16")


@functools.cache
def has_instructions(flag: str) -> bool:
    """Whether /proc/cpuinfo lists this flag."""
    with open("/proc/cpuinfo") as file:
        return flag in file.read(10000).split()


def library() -> ctypes.CDLL:
    """The built C++, for functions that are no operators (fused.py)."""
    assert missing("fused_multi_transformer") is None
    with open("/proc/self/maps") as file:
        path = next(line.split()[-1] for line in file if line.rstrip().endswith("kernels_cpu.so"))
    return ctypes.CDLL(path)


def _load():
    _build.load(
        "kernels_cpu",
        SOURCES,
        ".cc",
        os.environ.get("CXX", "g++"),
        "C++",
        "building the C++ ops for this processor, about half a minute",
        extra_cxx_cflags=FLAGS,
        extra_ldflags=["-pthread"],
    )


def peak(memory: bool, what: str) -> float:
    """Peak rate with all threads, per second; what: see cpu/peak.cc. memory (n,) float32 is overwritten."""
    tasks = 16 * len(os.sched_getaffinity(0))
    return _C_ops._run_custom_op("cpu_peak", memory, what, tasks)[0].item()


# ---------------------------------------------------------------------------------------------- products


def _plain(*tensors):
    """Whether the C++ takes these tensors: float32, dynamic graph."""
    return paddle.in_dynamic_mode() and all(t.dtype == paddle.float32 for t in tensors)


def _op(name, *args):
    """Run a C++ op with INSTRUCTIONS as its last argument."""
    return _C_ops._run_custom_op(name, *args, INSTRUCTIONS)


def bf16_matmul(
    x: paddle.Tensor,
    y: paddle.Tensor,
    transpose_x: bool = False,
    transpose_y: bool = False,
    bias: paddle.Tensor | None = None,
    residual: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """x (M, K) or transposed, y (K, N) or transposed, float32 or bfloat16 -> x y + bias + residual (M, N) float32.

    Products in bfloat16, sums in float32.
    """
    operands = x.contiguous(), y.contiguous(), bias, residual
    return _C_ops._run_custom_op("cpu_bf16_matmul", *operands, transpose_x, transpose_y)[0]


def _takes_bf16(x, *weights):
    """Whether the C++ computes this product in bfloat16: requested, dynamic graph, x float32."""
    stored = (paddle.float32, paddle.bfloat16)
    return (
        kernels.bf16
        and paddle.in_dynamic_mode()
        and x.dtype == paddle.float32
        and all(w.dtype in stored for w in weights)
    )


def linear(x, weight, bias=None, residual=None):
    if isinstance(weight, kernels.ComputedWeight):
        return _computed_linear(x, weight, bias, residual)
    if (product := _few_rows(x, weight, bias)) is not None:
        return product if residual is None else product + residual
    n_in, n_out = weight.shape
    wide = min(x.size // n_in, n_in, n_out) >= 32  # below, packing costs more than the product saves
    if kernels.bf16 and wide and _takes_bf16(x, weight):
        return _Bf16Linear.apply(x, weight, bias, residual)
    if bias is None or bias.stop_gradient or not paddle.is_grad_enabled() or not paddle.in_dynamic_mode():
        return reference.linear(x, weight, bias, residual)
    y = _AddBias.apply(reference.linear(x, weight), bias)
    return y if residual is None else residual + y


def _computed_linear(x, weight, bias, residual):
    n_in, n_out = weight.shape
    if x.size // n_in <= 32 and (x.stop_gradient or not paddle.is_grad_enabled()):
        return linear(x, weight.computed(False, "float32"), bias, residual)
    wide = min(x.size // n_in, n_in, n_out) >= 32
    in_bf16 = wide and kernels.bf16 and _plain(x)
    y = _Bf16Computed.apply(x, weight) if in_bf16 else reference.ComputedProduct.apply(x, weight, x.dtype)
    if bias is not None:
        y = y + bias if bias.stop_gradient or not paddle.is_grad_enabled() else _AddBias.apply(y, bias)
    return y if residual is None else residual + y


class _Bf16Computed(PyLayer):
    """reference.ComputedProduct with _Bf16Linear's products."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight, (n_in, n_out) = weight, weight.shape
        y = bf16_matmul(x.reshape([-1, n_in]), weight.computed(True, "bfloat16"), transpose_y=True)
        return y.reshape([*x.shape[:-1], n_out])

    @staticmethod
    def backward(ctx, dy):
        n_in, n_out = ctx.weight.shape
        dx = bf16_matmul(dy.reshape([-1, n_out]), ctx.weight.computed(True, "bfloat16"))
        return dx.reshape([*dy.shape[:-1], n_in])


def _sum_of_rows(x):
    """(N, n) -> (n,), as a product: (2048, 1024) in 0.1 ms; Paddle's sum takes 27 ms, the gradient of its add 35."""
    return paddle.matmul(paddle.ones([1, x.shape[0]], x.dtype), x).reshape([-1])


class _AddBias(PyLayer):
    """y = x + b; db = sum of dy over its rows."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.frozen, ctx.dtype = x.stop_gradient, bias.dtype
        return x + bias.astype(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        db = _sum_of_rows(dy.reshape([-1, dy.shape[-1]])).astype(ctx.dtype)
        return None if ctx.frozen else dy.clone(), db  # a copy: Paddle adds to gradients in place


def _few_rows(x, weight, bias):
    """x @ weight + bias for at most 32 rows without gradients, if the C++ takes them; else None.

    Bound by reading the weight, which may be stored in bfloat16 (half the bytes).
    """
    if _state is not True or weight.dtype not in (paddle.float32, paddle.bfloat16) or not _plain(x):
        return None
    needs_gradient = paddle.is_grad_enabled() and not all(t is None or t.stop_gradient for t in (x, weight, bias))
    rows = math.prod(x.shape[:-1])
    is_small = weight.dtype == paddle.float32 and math.prod(weight.shape) < SMALL
    if rows == 1 and is_small and not kernels.few_alike:
        return None
    if needs_gradient or rows > 32 or (bias is not None and bias.dtype != paddle.float32):
        return None
    return _op("cpu_few_rows_linear", x.contiguous(), weight, bias)[0]


class _Bf16Linear(PyLayer):
    """y = x W + b + residual; dx = dy W^T, dW = x^T dy, db = sum of dy over its rows."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual):
        ctx.save_for_backward(x, weight)
        ctx.frozen = [t is None or t.stop_gradient for t in (x, weight, bias, residual)]
        ctx.given = [t is not None for t in (x, weight, bias, residual)]
        n_in, n_out = weight.shape
        addends = bias, None if residual is None else residual.reshape([-1, n_out]).contiguous()
        return bf16_matmul(x.reshape([-1, n_in]), weight, False, False, *addends).reshape([*x.shape[:-1], n_out])

    @staticmethod
    def backward(ctx, dy):
        (x, weight), frozen = ctx.saved_tensor(), ctx.frozen
        n_in, n_out = weight.shape
        rows = dy.reshape([-1, n_out])
        gradients = [
            None if frozen[0] else bf16_matmul(rows, weight, transpose_y=True).reshape(x.shape),
            None if frozen[1] else bf16_matmul(x.reshape([-1, n_in]), rows, transpose_x=True),
            None if frozen[2] else _sum_of_rows(rows),
            None if frozen[3] else dy.clone(),  # a copy: Paddle adds to gradients in place
        ]
        return tuple(d for d, given in zip(gradients, ctx.given) if given)


def lora_linear(x, weight, lora_A, lora_B, scaling, bias=None, dropped=None):
    n_in, n_out = weight.shape
    wide, is_computed = min(x.size // n_in, n_in, n_out) >= 32, isinstance(weight, kernels.ComputedWeight)
    if not (
        wide
        and weight.stop_gradient
        and (bias is None or bias.stop_gradient)
        and _takes_bf16(x, lora_A, lora_B, *(() if is_computed else (weight,)))
    ):
        if is_computed:  # which linear() may have a faster way for
            update = reference.linear(reference.linear(x if dropped is None else dropped, lora_A) * scaling, lora_B)
            return linear(x, weight, bias) + update
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropped)
    held = types.SimpleNamespace(
        weight=weight, bias=bias, scaling=float(scaling)
    )  # frozen, so not inputs of the PyLayer
    return _Bf16LoRA.apply(x, dropped, lora_A, lora_B, held)


class _Bf16LoRA(PyLayer):
    """t = s x A, y = [x t] [W; B]; dt = s dy B^T, dx = [dy dt] [W^T; A^T], dA = x^T dt, dB = t^T dy."""

    @staticmethod
    def forward(ctx, x, dropped, a, b, held):
        weight, is_rows = _weight_or_rows(held.weight)
        args = x.contiguous(), None if dropped is None else dropped.contiguous(), weight, a, b, held.bias
        y, t = _C_ops._run_custom_op("cpu_bf16_lora", *args, held.scaling, is_rows)
        ctx.save_for_backward(x if dropped is None else dropped, t, a, b)
        ctx.held, ctx.dropped, ctx.frozen = (
            held,
            dropped is not None,
            [x.stop_gradient, a.stop_gradient, b.stop_gradient],
        )
        return y.reshape([*x.shape[:-1], b.shape[1]])

    @staticmethod
    def backward(ctx, dy):
        x, t, a, b = ctx.saved_tensor()
        weight, is_rows = _weight_or_rows(ctx.held.weight)
        args = dy.contiguous(), x, t, weight, a, b, ctx.held.scaling, not ctx.frozen[0], ctx.dropped
        dx, d_dropped, da, db = _C_ops._run_custom_op("cpu_bf16_lora_backward", *args, is_rows)
        d_inputs = [None if ctx.frozen[0] else dx.reshape(x.shape)]
        if ctx.dropped:
            d_inputs.append(None if ctx.frozen[0] else d_dropped.reshape(x.shape))
        return *d_inputs, None if ctx.frozen[1] else da, None if ctx.frozen[2] else db


def _weight_or_rows(weight):
    """(a tensor, whether it is (out, in)) of a weight (in, out)."""
    if isinstance(weight, kernels.ComputedWeight):
        return weight.computed(True, "bfloat16"), True
    return weight, False


def quant_linear(x, qweight, scales, bias=None, scheme="w8", qzeros=None, g_index=None, input_scale=None):
    if scheme == "a8w8":
        return _int8_linear(x, qweight, scales, bias, input_scale)
    floats = [t for t in (x, scales, bias) if t is not None]
    n_in, bits = x.shape[-1], int(scheme[1:])
    if not _plain(*floats) or qweight.shape[1] < 4:
        return reference.quant_linear(x, qweight, scales, bias, scheme, qzeros, g_index, input_scale)
    packed = qweight, scales, qzeros, g_index
    if x.size // n_in > 32 or paddle.is_grad_enabled() and not x.stop_gradient:  # dequantize once: faster
        return linear(x, _op("cpu_dequantize", *packed, bits)[0], bias)
    return _op("cpu_quant_linear", x.contiguous(), *packed, bias, bits)[0]


def dequantize_table(codes, scales, values, n_in, n_out, transposed=False, dtype="float32"):
    half = dtype in ("bfloat16", paddle.bfloat16)
    if not _plain(scales, values) or not half and dtype not in ("float32", paddle.float32):
        return reference.dequantize_table(codes, scales, values, n_in, n_out, transposed, dtype)
    return _op("cpu_dequantize_table", codes, scales, values, n_in, n_out, transposed, half)[0]


def _int8_linear(x, weight, scales, bias, input_scale):
    floats = [t for t in (x, scales, bias, input_scale) if t is not None]
    if not _plain(*floats) or weight.shape[0] >= 1 << 17:  # sums of more products may overflow 32 bits
        return reference.quant_linear(x, weight, scales, bias, "a8w8", input_scale=input_scale)
    return _op("cpu_int8_linear", x.contiguous(), weight, scales, bias, input_scale)[0]


# ---------------------------------------------------------------------------------------------- attention


def attention(q, k, v, startend_row_indices=None, causal=True, scale=None, alibi_slopes=None, softcap=None):
    if q.dtype != paddle.float32 or not paddle.in_dynamic_mode():
        return reference.attention(q, k, v, startend_row_indices, causal, scale, alibi_slopes, softcap)
    rows = startend_row_indices
    reference.check_attention(q, k, rows, causal, softcap)
    options = _options(q, rows, k.shape[1] - q.shape[1], causal, scale, alibi_slopes, softcap)
    return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), options)


def _options(q, rows, offset, causal, scale, slopes, softcap):
    """The other arguments of the C++; a plain object, because a PyLayer treats tensor arguments as inputs."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return types.SimpleNamespace(
        rows=None if rows is None else rows.astype("int32").contiguous(),
        slopes=None if slopes is None else slopes.astype("float32").contiguous(),
        rest=(bool(causal), scale, float(softcap or 0), int(offset), IN_BFLOAT16 if kernels.bf16 else INSTRUCTIONS),
    )


def attention_with_lse(q, k, v, startend_row_indices, offset, causal=True, scale=None, alibi_slopes=None, softcap=None):
    if q.dtype != paddle.float32:
        return reference.attention_with_lse(q, k, v, startend_row_indices, offset, causal, scale, alibi_slopes, softcap)
    reference.check_attention_with_lse(q, k, startend_row_indices, causal, softcap)
    options = _options(q, startend_row_indices, offset, causal, scale, alibi_slopes, softcap)
    inputs = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = _C_ops._run_custom_op("cpu_attention", *inputs, options.rows, options.slopes, *options.rest)
    return out, paddle.where(paddle.isinf(lse), paddle.full_like(lse, -math.inf), lse)  # the C++ writes +inf


def attention_with_lse_backward(
    q, k, v, out, lse, d_out, startend_row_indices, offset, causal=True, scale=None, alibi_slopes=None, softcap=None
):
    rest = startend_row_indices, offset, causal, scale, alibi_slopes, softcap
    if q.dtype != paddle.float32:
        return reference.attention_with_lse_backward(q, k, v, out, lse, d_out, *rest)
    options = _options(q, *rest)
    lse = paddle.where(paddle.isinf(lse), paddle.full_like(lse, math.inf), lse)
    q, k, v, out, d_out = (t.contiguous() for t in (q, k, v, out, d_out))
    inputs = q, k, v, options.rows, options.slopes, out, lse, d_out
    return tuple(_C_ops._run_custom_op("cpu_attention_backward", *inputs, *options.rest))


class _Attention(PyLayer):
    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = _C_ops._run_custom_op("cpu_attention", q, k, v, options.rows, options.slopes, *options.rest)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options, ctx.frozen = options, [t.stop_gradient for t in (q, k, v)]
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensor()
        options = ctx.options
        gradients = _C_ops._run_custom_op(
            "cpu_attention_backward", q, k, v, options.rows, options.slopes, out, lse, d_out.contiguous(), *options.rest
        )
        return tuple(None if frozen else d for d, frozen in zip(gradients, ctx.frozen))


# ---------------------------------------------------------------------------------------- paged attention

_paged = None  # (arrays of the last call, their tensors)


def paged_attention(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_lengths,
    context_lengths,
    scale=None,
    k_scales=None,
    v_scales=None,
    alibi_slopes=None,
    window=None,
    softcap=None,
):
    if not (_plain(q) and k_cache.dtype == v_cache.dtype and _takes_cache(k_cache, k_scales)):
        return reference.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            query_lengths,
            context_lengths,
            scale,
            k_scales,
            v_scales,
            alibi_slopes,
            window,
            softcap,
        )
    tables, lengths = _paged_tensors(q, k_cache, (block_tables, query_lengths, context_lengths))
    reference.check_scores(softcap, window)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    slopes = None if alibi_slopes is None else alibi_slopes.astype("float32").contiguous()
    rest = k_scales, v_scales, slopes, scale, window or 0, float(softcap or 0)
    return _op("cpu_paged_attention", q.contiguous(), k_cache, v_cache, tables, lengths, *rest)[0]


def _paged_tensors(q, k_cache, arrays):
    """Block tables (S, blocks) and lengths (2, S) as int32 tensors; cached if the arrays cannot have changed."""
    global _paged
    if _paged is None or any(a is not b for a, b in zip(_paged[0], arrays)):
        tables, queries, contexts = (np.ascontiguousarray(a, np.int32) for a in arrays)
        reference.check_paged(q.shape, k_cache.shape, tables, queries, contexts)
        tensors = kernels.to_tensor(tables), kernels.to_tensor(np.stack([queries, contexts]))
        if any(getattr(a, "flags", None) is None or a.flags.writeable for a in arrays):
            return tensors
        _paged = arrays, tensors
    return _paged[1]


def _takes_cache(cache, scales):
    return cache.dtype in ((paddle.float32, paddle.bfloat16) if scales is None else (paddle.int8,))


def write_cache(k, v, k_cache, v_cache, slots, k_scales=None, v_scales=None):
    if not _plain(k, v) or not _takes_cache(k_cache, k_scales):
        return reference.write_cache(k, v, k_cache, v_cache, slots, k_scales, v_scales)
    _op("cpu_write_cache", k.contiguous(), v.contiguous(), k_cache, v_cache, slots, k_scales, v_scales)


def sample(logits, temperature, top_k, top_p, uniform, said=None, penalties=None):
    if not _plain(logits):
        return reference.sample(logits, temperature, top_k, top_p, uniform, said, penalties)
    if said is None:
        said, penalties = [np.zeros((0, 2), np.int64)] * len(uniform), [(1.0, 0.0, 0.0)] * len(uniform)
    arrays = (
        np.asarray(top_k, np.int64),
        np.array([temperature, top_p, uniform, *zip(*penalties)], np.float64),
        np.concatenate([*said, [[0, 0]]]),  # not empty
        np.cumsum([len(of_row) for of_row in said]),
    )
    return _op("cpu_sample", logits.contiguous(), *map(kernels.to_tensor, arrays))[0]


def log_probabilities(logits, ids, temperature, count):
    if not _plain(logits):
        return reference.log_probabilities(logits, ids, temperature, count)
    ids, temperature = (
        kernels.to_tensor(np.asarray(ids, np.int64)),
        kernels.to_tensor(np.asarray(temperature, np.float64)),
    )
    numbers, best = _op("cpu_log_probabilities", logits.contiguous(), ids, temperature, count)
    numbers = numbers.numpy()
    return numbers[:, 0], numbers[:, 1], best.numpy(), numbers[:, 2:]


# ------------------------------------------------------------------------------------- norm, rotation, gate


def rms_norm(x, weight, epsilon, residual=None):
    if not _plain(x, weight) or residual is not None and not _plain(residual):
        return reference.rms_norm(x, weight, epsilon, residual)
    return _norm(x, residual, weight, None, epsilon, "cpu_rms_norm")


def layer_norm(x, weight, bias, epsilon, residual=None):
    if not all(_plain(t) for t in (x, weight, bias, residual) if t is not None):
        return reference.layer_norm(x, weight, bias, epsilon, residual)
    return _norm(x, residual, weight, bias, epsilon, "cpu_layer_norm")


def _norm(x, residual, weight, bias, epsilon, op):
    assert residual is None or x.shape == residual.shape, f"x {x.shape}, residual {residual.shape}"
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    if paddle.is_grad_enabled():
        return _Norm.apply(x, residual, weight, bias, epsilon, op)
    inputs = (x, residual, weight) if op == "cpu_rms_norm" else (x, residual, weight, bias)
    y, h, *_ = _op(op, *inputs, epsilon)  # in decoding a PyLayer costs more time than the norm
    return y if residual is None else (y, h)


class _Norm(PyLayer):
    """y = z w (+ b) with z = (h - mean) r, h = x + residual; RMSNorm: mean 0, r = rsqrt(mean(h^2) + eps).

    With g = dy w: dh += r (g - mean(g) - z mean(g z)), RMSNorm without mean(g); dw = sum(dy z), db = sum(dy). Saves h,
    mean, r.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, epsilon, op):
        inputs = (x, residual, weight) if op == "cpu_rms_norm" else (x, residual, weight, bias)
        y, h, mean, r = _op(op, *inputs, epsilon)
        h = x if residual is None else h
        ctx.save_for_backward(*((h, weight, r) if op == "cpu_rms_norm" else (h, weight, mean, r)))
        ctx.op, ctx.given = op, [t is not None for t in (x, residual, weight, bias)]
        ctx.needs_gradient = [t is not None and not t.stop_gradient for t in (x, residual, weight, bias)]
        ctx.set_materialize_grads(False)  # None for an output without a gradient
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx, dy, dh=None):
        saved = ctx.saved_tensor()
        dy = paddle.zeros_like(saved[0]) if dy is None else dy.contiguous()
        dh = None if dh is None else dh.contiguous()
        dx, dx_copy, dw, db = _op(ctx.op + "_backward", *saved, dy, dh, ctx.needs_gradient[0] and ctx.needs_gradient[1])
        gradients = dx, dx_copy if ctx.needs_gradient[0] else dx, dw, db
        return tuple(d if w else None for d, w, is_tensor in zip(gradients, ctx.needs_gradient, ctx.given) if is_tensor)


def rope(x, cos, sin, interleaved=False):
    if not _plain(x, cos, sin):
        return reference.rope(x, cos, sin, interleaved)
    reference.check_rope(x, cos)
    if cos.shape[:2] != x.shape[:2]:
        cos, sin = cos.expand([*x.shape[:2], 1, -1]), sin.expand([*x.shape[:2], 1, -1])
    if x.stop_gradient or not paddle.is_grad_enabled():  # decoding: a PyLayer costs as much time as the rotation
        return _op("cpu_rope", x.contiguous(), cos.contiguous(), sin.contiguous(), 1.0, interleaved)[0]
    return _Rope.apply(x.contiguous(), cos, sin, interleaved)


class _Rope(PyLayer):
    """The gradient of a rotation is the rotation by the negative angle. Saves only the tables."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.tables, ctx.interleaved = (cos.contiguous(), sin.contiguous()), interleaved
        return _op("cpu_rope", x, *ctx.tables, 1.0, interleaved)[0]

    @staticmethod
    def backward(ctx, dy):
        return _op("cpu_rope", dy.contiguous(), *ctx.tables, -1.0, ctx.interleaved)[0], None, None


def swiglu(gate, up):
    if not _plain(gate, up):
        return reference.swiglu(gate, up)
    return _gate(gate, up, 0)


def geglu(gate, up, approximate=True):
    if not _plain(gate, up):
        return reference.geglu(gate, up, approximate)
    return _gate(gate, up, 1 if approximate else 2)


def gelu(x, approximate=True):
    if not _plain(x):
        return reference.gelu(x, approximate)
    return _gate(x, None, 1 if approximate else 2)


def _gate(gate, up, kind):
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    return _Gate.apply(gate, up, kind) if paddle.is_grad_enabled() else _op("cpu_gate", gate, up, kind)[0]


class _Gate(PyLayer):
    """y = a(g) u, u = 1 if None: dg = dy u a'(g), du = dy a(g).

    kind 0: silu, a = g s with s = sigmoid(g), a' = s (1 + g (1 - s)). kind 1, 2: gelu, a = g Phi(g), 1 by tanh.
    """

    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.frozen = kind, [t.stop_gradient for t in (gate, up) if t is not None]
        return _op("cpu_gate", gate, up, kind)[0]

    @staticmethod
    def backward(ctx, dy):
        gradients = _op("cpu_gate_backward", *ctx.saved_tensor(), dy.contiguous(), ctx.kind)
        return tuple(None if frozen else d for d, frozen in zip(gradients, ctx.frozen))


def embedding(ids, weight):
    if not (_plain(weight) and ids.dtype == paddle.int64):
        return reference.embedding(ids, weight)
    return _Embedding.apply(weight, types.SimpleNamespace(ids=ids.contiguous()))


class _Embedding(PyLayer):
    """y = w[ids]; dw: the rows of dy summed in the order of ids.

    dw is always a new tensor. Adding rows into an existing weight.grad would be wrong under paddle.grad(), wrong where
    a hook changes gradients, and for a tied head grad is not there yet: Paddle sums all uses of a leaf before it fills
    grad. But a dw of 32 MB or more consists of fresh pages of the system: zeros that nobody wrote and that take memory
    only where rows are written. For (32000, 768) and 2,048 tokens, forward and backward take 6 ms, Paddle's 68; with an
    existing gradient 31 and 76, because Paddle adds all of dw to it.
    """

    @staticmethod
    def forward(ctx, weight, options):
        ctx.save_for_backward(weight)
        ctx.options = options
        return _C_ops._run_custom_op("cpu_embedding", options.ids, weight.contiguous())[0]

    @staticmethod
    def backward(ctx, dy):
        return _C_ops._run_custom_op("cpu_embedding_backward", ctx.options.ids, *ctx.saved_tensor(), dy.contiguous())[0]


# ----------------------------------------------------------------------------------- linear cross-entropy


def linear_cross_entropy(
    hidden,
    weight,
    labels,
    transpose_weight=False,
    ignore_index=-100,
    return_predictions=False,
    vocabulary=None,
    softcap=None,
):
    ours = _plain(hidden) and weight.dtype in (paddle.float32, paddle.bfloat16)
    layer = (_Bf16CrossEntropy if kernels.bf16 else _LinearCrossEntropy) if ours else reference._LinearCrossEntropy
    return reference.over_labelled_rows(
        layer, hidden, weight, labels, transpose_weight, ignore_index, return_predictions, vocabulary, softcap
    )


class _LinearCrossEntropy(PyLayer):
    """loss = lse - (h W)[label], lse = logsumexp(h W); d(h W) = (exp(h W - lse) - onehot(label)) * d loss.

    Logits are computed in blocks of columns of W, small enough to stay in the cache between products; maximum and sum
    are carried from block to block. Trained W: four products, because backward recomputes the logits. Frozen W: two,
    because forward also computes the rows (p - onehot) W^T, which backward multiplies by d loss: sums of
    exp(logit - max so far) W^T, rescaled when the maximum grows (Milakov & Gimelshein, arXiv 1805.02867). With a
    softcap, logits l are softcap * tanh(h W / softcap), and each p - onehot has the factor 1 - (l / softcap)^2.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, options):
        options.frozen = [hidden.stop_gradient, weight.stop_gradient]
        d_hidden_in_forward = options.grad and options.frozen == [False, True]
        chunks = [
            _chunk_of_losses(hidden[c], weight, labels[c], options, d_hidden_in_forward) for c in _token_chunks(labels)
        ]
        losses, lse, rows, best = ([chunk[i] for chunk in chunks] for i in range(4))
        if options.predictions is not None:
            options.predictions.extend(best)
        ctx.options, ctx.d_hidden_in_forward = options, d_hidden_in_forward
        if d_hidden_in_forward:
            ctx.save_for_backward(paddle.concat(rows))
        else:
            ctx.save_for_backward(hidden, weight, labels, paddle.concat(lse))
        return paddle.concat(losses)

    @staticmethod
    def backward(ctx, d_losses):
        if ctx.d_hidden_in_forward:
            return ctx.saved_tensor()[0] * d_losses.unsqueeze(-1), None, None
        hidden, weight, labels, lse = ctx.saved_tensor()
        options, transposed = ctx.options, ctx.options.transpose_weight
        d_hidden, d_weight = [], None if options.frozen[1] else paddle.empty(weight.shape, "float32")
        for number, c in enumerate(_token_chunks(labels)):
            h, d_chunk = hidden[c], None
            for first, block in _blocks_of(weight, transposed, h.shape[0]):
                p = paddle.matmul(h, block, transpose_y=transposed)
                _op(
                    "cpu_softmax_less_onehot",
                    p,
                    labels[c],
                    lse[c],
                    d_losses[c].contiguous(),
                    options.start + first,
                    float(options.softcap or 0),
                )
                if not options.frozen[0]:
                    d = paddle.matmul(p, block, transpose_y=not transposed)
                    d_chunk = d if d_chunk is None else d_chunk.add_(d)
                if not options.frozen[1]:
                    d = paddle.matmul(*((p, h) if transposed else (h, p)), transpose_x=True)
                    _op("cpu_put_block", d_weight, d, *((first, 0) if transposed else (0, first)), number > 0)
                del p, d  # before the next block's
            d_hidden.append(d_chunk)
        d_hidden = None if options.frozen[0] else paddle.concat(d_hidden)
        return d_hidden, None if options.frozen[1] else d_weight.astype(weight.dtype), None


def _chunk_of_losses(hidden, weight, labels, options, d_hidden_in_forward):
    """(losses (c,), logsumexp (c,), rows (p - onehot) W^T (c, D) or None, predictions (c,) or None)."""
    c, transposed, vocabulary = labels.shape[0], options.transpose_weight, options.vocabulary
    state, best = paddle.empty([c, 4]), paddle.empty([c], "int64")  # see loss.cc
    rows, of_labels = None, paddle.zeros_like(hidden) if d_hidden_in_forward else None
    for first, block in _blocks_of(weight, transposed, c):
        logits, first = paddle.matmul(hidden, block, transpose_y=transposed), options.start + first
        _op(
            "cpu_logits_seen",
            logits,
            labels,
            state,
            best,
            first,
            first == options.start,
            d_hidden_in_forward,
            float(options.softcap or 0),
        )
        if d_hidden_in_forward:
            block_rows = paddle.matmul(logits, block, transpose_y=not transposed)
            rows = block_rows if rows is None else _op("cpu_scaled_add", rows, block_rows, state)[0]
            _C_ops._run_custom_op("cpu_label_rows", of_labels, block, labels, first, transposed)
            del block_rows
        del logits  # before the next block's
    largest, total, target, _ = (t.contiguous() for t in state.unbind(-1))
    if vocabulary is None:
        lse = largest + paddle.log(total)
        share, predictions = 1.0 / total, best if options.predictions is not None else None
    else:
        lse, target, predictions = reference.reduce_lse(largest, total, target, best, options)
        share = paddle.exp(largest - lse)
    if d_hidden_in_forward:
        if options.softcap is not None:
            of_labels = of_labels * (1.0 - paddle.square(target / options.softcap)).unsqueeze(-1)
        rows = rows * share.unsqueeze(-1) - of_labels
    return lse - target, lse, rows, predictions


def _token_chunks(labels):
    return [slice(i, min(i + LOGITS_ROWS, labels.shape[0])) for i in range(0, labels.shape[0], LOGITS_ROWS)]


def _blocks_of(weight, transposed, tokens):
    """Yields (first column, block of W in float32): (D, n) or, transposed, (n, D), contiguous."""
    V, D = weight.shape if transposed else weight.shape[::-1]
    width = max(64, LOGITS // max(tokens, D) // 64 * 64)
    if V <= width and weight.dtype == paddle.float32:
        yield 0, weight
        return
    for first in range(0, V, width):
        n = min(width, V - first)
        yield first, _op("cpu_block", weight, *((first, n, 0, D) if transposed else (0, D, first, n)))[0]


class _Bf16CrossEntropy(PyLayer):
    """loss = logsumexp(l) - l[label], l = h W or softcap * tanh(h W / softcap), in blocks of the vocabulary; gemm.cc.

    With a frozen W, forward also computes the gradient of h up to the factor d loss per row (online softmax). Otherwise
    backward recomputes the logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, options):
        options.frozen = [hidden.stop_gradient, weight.stop_gradient]
        ctx.options, ctx.online = options, options.grad and options.frozen == [False, True]
        labels = labels - options.start if options.start else labels
        options.rest = options.transpose_weight, float(options.softcap or 0)
        outputs = _C_ops._run_custom_op("cpu_bf16_cross_entropy", hidden, weight, labels, *options.rest, ctx.online)
        largest, total, target, best, acc = outputs
        if options.vocabulary is None:
            lse = largest + paddle.log(total)
        else:
            lse, target, best = reference.reduce_lse(largest, total, target, best + options.start, options)
        if options.predictions is not None:
            options.predictions.append(best)
        saved = (target, acc, paddle.exp(largest - lse)) if ctx.online else (hidden, lse)
        ctx.save_for_backward(weight, labels, *saved)
        return lse - target

    @staticmethod
    def backward(ctx, d_losses):
        weight, labels, *saved = ctx.saved_tensor()
        d_losses, options = d_losses.contiguous(), ctx.options
        if ctx.online:
            target, acc, factor = saved
            return (
                _C_ops._run_custom_op("cpu_softmax_part", acc, factor, weight, labels, target, d_losses, *options.rest)[
                    0
                ],
                None,
                None,
            )
        hidden, lse = saved
        args = hidden, weight, labels, lse, d_losses, *options.rest, options.frozen[1]
        gradients = _C_ops._run_custom_op("cpu_bf16_cross_entropy_backward", *args)
        return *(None if frozen else d for frozen, d in zip(options.frozen, gradients)), None


# ---------------------------------------------------------------------------------------------- optimizer


@paddle.no_grad()
def adamw(parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale=1.0):
    floats = all(t.dtype in (paddle.float32, paddle.bfloat16) for t in (parameter, gradient))
    in_place = all(t.is_contiguous() for t in (parameter, moment1, moment2))
    if not (floats and in_place and moment1.dtype == moment2.dtype == paddle.float32):
        return reference.adamw(
            parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale
        )
    constants = [
        grad_scale,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        (1 - beta2**step) ** -0.5,
        epsilon,
    ]
    # Paddle forbids in-place writes to a trained leaf; detach() is the same memory without that check.
    _op("cpu_adamw", parameter.detach(), gradient.contiguous(), moment1.detach(), moment2.detach(), constants)


def squared_norm(x):
    if x.dtype not in (paddle.float32, paddle.bfloat16) or not paddle.in_dynamic_mode():
        return reference.squared_norm(x)
    return _op("cpu_squared_norm", x.contiguous())[0]
