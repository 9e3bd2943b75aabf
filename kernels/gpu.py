"""NVIDIA GPUs: Paddle's fused operators first, and our CUDA (kernels/cuda, built on first use) for what they lack.

Paddle's: attention (flashmask_attention), rms_norm (fused_rms_norm), rope (fused_rotary_position_embedding), swiglu,
adamw (adamw_; the trainer handles master weights).

Ours: rms_norm with a residual, because Paddle's gradient has no input for the gradient of the sum;
linear_cross_entropy, whose softmax, loss and gradient take two passes over a chunk of logits, the second in place;
paged_attention for one query per sequence, from float or int8 caches, with keys split over blocks; quant_linear for up
to ROWS rows of 4- or 8-bit weights. More rows: a product with weights that one pass has dequantized.

Not used: paddle.nn.quant.weight_only_linear. It has no zero points, only groups of 64 or 128, scales in x's dtype, and
codes in its own order that only weight_quantize produces, from floats with new rounding. Our layouts cannot be
converted exactly.

The reference runs where neither has an operator: attention in float32 (unless kernels.bf16), with ALiBi or a softcap,
with Dh over 256 or not a multiple of 8, or with mask rows if Tq != Tk (Paddle counts rows from the first query, we from
the first key), which includes a prompt behind a cache with a window; rope of neighboring dims; gelu; act order and
a8w8; a sharded vocabulary; operands of different dtypes. With kernels.bf16, linear, lora_linear, attention and
linear_cross_entropy of float32 tensors run in bfloat16. The CUDA code is tested on the CPU (tests/gpu/cuda_on_cpu.h)
and timed by tests/gpu/cuda_harness.cu; it has not been timed yet.
"""

import functools
import types
from pathlib import Path

import kernels
from kernels import _build, reference, to_tensor

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import _C_ops
from paddle.autograd import PyLayer
from paddle.incubate.nn import functional as fused

SOURCES = Path(__file__).with_name("cuda")
OF_PADDLE = {  # op: the GPU kernels of Paddle that it needs, forward and backward
    "attention": ("flash_attn", "flash_attn_grad", "flashmask_attention", "flashmask_attention_grad"),
    "rms_norm": ("fused_rms_norm_quant", "fused_rms_norm_quant_grad"),
    "rope": ("fused_rotary_position_embedding", "fused_rotary_position_embedding_grad"),
    "swiglu": ("swiglu", "swiglu_grad"),
    "adamw": ("adamw",),
}
OF_EXTENSION = "linear_cross_entropy paged_attention quant_linear".split()
ROWS = 16  # most rows of x for which quant_linear reads packed weights
EVERY_KEY = 2**31 - 1  # window of our CUDA that means none
LOGITS = 1 << 28  # of one chunk of linear_cross_entropy: 512 MB in bfloat16, about 2,000 rows of 128,000 words

_state = None  # True when our own ops are loaded, or the reason why they cannot be


def missing(op: str) -> str | None:
    """The reason why this op, or "bf16", cannot run here, or None. Builds the CUDA ops on first use."""
    for kernel in OF_PADDLE.get(op, ()):
        if not _registered(kernel):
            return f"this Paddle has no {kernel} for GPUs"
    if op in ("attention", "bf16") and _capability() < 80:
        return f"compute capability 8.0 is needed, this GPU has {_capability() / 10}"
    return _own_missing() if op in OF_EXTENSION else None


def _registered(kernel):
    """Whether this Paddle has this kernel for GPUs."""
    return any("gpu" in str(key).lower() for key in _all_kernels().get(kernel, ()))


@functools.lru_cache(maxsize=1)
def _all_kernels():
    return paddle.base.core._get_all_register_op_kernels("phi")


@functools.lru_cache(maxsize=1)
def _capability():
    major, minor = paddle.device.cuda.get_device_capability()
    return major * 10 + minor


def _own_missing():
    global _state
    if _state is None:
        _state = _build.attempt(_load)
    return None if _state is True else _state


def _load():
    _build.load(
        "kernels_gpu",
        SOURCES,
        ".cu",
        "nvcc",
        "CUDA",
        "building the CUDA ops for this GPU, about a minute",
        extra_cuda_cflags=["-O3", "-std=c++17", f"-arch=sm_{_capability()}"],
    )


def _same(*tensors):
    """Whether our CUDA takes these tensors: one supported dtype, dynamic graph."""
    kind = tensors[0].dtype
    known = kind in (paddle.float32, paddle.bfloat16, paddle.float16)
    return known and paddle.in_dynamic_mode() and all(t.dtype == kind for t in tensors)


def _to_bf16(*tensors):
    """With kernels.bf16: float32 tensors as bfloat16 (differentiable)."""
    return [t.astype("bfloat16") if kernels.bf16 and t.dtype == paddle.float32 else t for t in tensors]


def linear(x, weight, bias=None, residual=None):
    if not kernels.bf16 or x.dtype != paddle.float32:
        return reference.linear(x, weight, bias, residual)
    if isinstance(weight, kernels.ComputedWeight):
        y = reference.ComputedProduct.apply(x, weight, "bfloat16")
    else:
        y = paddle.matmul(*_to_bf16(x, weight)).astype("float32")
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def lora_linear(x, weight, lora_A, lora_B, scaling, bias=None, dropped=None):
    return linear(x, weight, bias) + linear(linear(x if dropped is None else dropped, lora_A) * scaling, lora_B)


# ---------------------------------------------------------------------------------------------- attention


def attention(q, k, v, startend_row_indices=None, causal=True, scale=None, alibi_slopes=None, softcap=None):
    rows, Tq, Dh, Tk = startend_row_indices, q.shape[1], q.shape[3], k.shape[1]
    half = _to_bf16(q, k, v)
    takes = alibi_slopes is None and softcap is None and Dh % 8 == 0 and Dh <= 256 and (rows is None or Tq == Tk)
    if not takes or not _same(*half) or half[0].dtype == paddle.float32:
        # In float32, the dtype of the reference's masks.
        q32, k32, v32 = (t if t.dtype == paddle.float32 else t.astype("float32") for t in (q, k, v))
        return reference.attention(q32, k32, v32, rows, causal, scale, alibi_slopes, softcap).astype(q.dtype)
    reference.check_attention(q, k, rows, causal, softcap)
    rows = None if rows is None else rows.astype("int32")
    if scale is not None and scale != Dh**-0.5:
        # Paddle's scale is Dh ** -0.5. Exact for a power of two; else q is rounded once more.
        half[0] = half[0] * (scale * Dh**0.5)
    return _flash_attention(*half, rows, causal).astype(q.dtype)


def _flash_attention(q, k, v, rows, causal):
    """q, k, v in a 2-byte dtype, rows int32 or None -> (B, T, H, Dh) in q's dtype."""
    return F.flashmask_attention(q, k, v, rows, causal=bool(causal))


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
    N, H, Dh = q.shape
    _, block_size, K, _ = k_cache.shape
    queries, contexts = np.asarray(query_lengths, np.int64), np.asarray(context_lengths, np.int64)
    tables = np.asarray(block_tables, np.int32)
    scale = Dh**-0.5 if scale is None else float(scale)
    scores = alibi_slopes, window, softcap  # how scores differ from q k
    cache = _same(q, k_cache, v_cache) if k_scales is None else k_cache.dtype == paddle.int8
    if not (_same(q) and cache and Dh % 8 == 0 and Dh <= 256):
        return reference.paged_attention(
            q, k_cache, v_cache, tables, queries, contexts, scale, k_scales, v_scales, *scores
        )
    reference.check_paged(q.shape, k_cache.shape, tables, queries, contexts)
    reference.check_scores(softcap, window)
    first, decodes = np.cumsum(queries) - queries, np.flatnonzero(queries == 1)
    parts, order = [], []  # outputs, and their rows of q
    if len(decodes):
        rows = q if len(decodes) == N else paddle.gather(q, to_tensor(first[decodes]))
        pool = k_cache, v_cache, tables[decodes], contexts[decodes]
        parts.append(_paged_decode(rows, *pool, scale, k_scales, v_scales, *scores))
        order.append(first[decodes])
    for s in np.flatnonzero(queries > 1):
        blocks = to_tensor(tables[s, : -(-contexts[s] // block_size)])
        k, v = (
            _gathered(cache, blocks, of, q.dtype)[:, : contexts[s]]
            for cache, of in ((k_cache, k_scales), (v_cache, v_scales))
        )
        rows, hidden = (
            q[first[s] : first[s] + queries[s]].unsqueeze(0),
            reference.sliding_window_rows(contexts[s], window),
        )
        parts.append(attention(rows, k, v, hidden, True, scale, alibi_slopes, softcap)[0])
        order.append(np.arange(first[s], first[s] + queries[s]))
    if len(parts) == 1:
        return parts[0]
    return paddle.gather(paddle.concat(parts), to_tensor(np.argsort(np.concatenate(order))))


def _gathered(cache, blocks, scales, dtype):
    """Blocks of a pool as (1, keys, K, Dh) in dtype."""
    values = paddle.gather(cache, blocks)
    if scales is not None:
        values = (values.astype("float32") * paddle.gather(scales, blocks).unsqueeze(-1)).astype(dtype)
    return values.reshape([1, -1, *cache.shape[2:]])


def _paged_decode(q, k_cache, v_cache, tables, contexts, scale, k_scales, v_scales, alibi_slopes, window, softcap):
    """One query per sequence: q (S, H, Dh) -> (S, H, Dh)."""
    plan = _on_device(tables.tobytes(), contexts.astype(np.int32).tobytes(), len(contexts), paddle.get_device())
    slopes = None if alibi_slopes is None else alibi_slopes.astype("float32").contiguous()
    longest = int(contexts.max())
    window = EVERY_KEY if window is None or window >= longest else window
    rest = slopes, scale, min(longest, window), window, float(softcap or 0)
    return _C_ops._run_custom_op(
        "gpu_paged_decode", q.contiguous(), k_cache, v_cache, *plan, k_scales, v_scales, *rest
    )[0]


@functools.lru_cache(maxsize=1)
def _on_device(tables, contexts, S, device):
    """Block tables and context lengths as tensors; copied once per step, for all layers."""
    tables, contexts = (np.frombuffer(x, np.int32) for x in (tables, contexts))
    return to_tensor(tables.reshape(S, -1).copy()), to_tensor(contexts.copy())


# ------------------------------------------------------------------------------------- norm, rotation, gate


def rms_norm(x, weight, epsilon, residual=None):
    operands = (x, weight) if residual is None else (x, weight, residual)
    if not _same(*operands):
        return reference.rms_norm(x, weight, epsilon, *operands[2:])
    if residual is None:
        return _fused_rms_norm(x, weight, epsilon)
    D, vector = weight.shape[0], 4 if x.dtype == paddle.float32 else 8
    if _own_missing() or D > (
        2048 * vector if D % vector == 0 else 8192
    ):  # longer rows do not fit into a block's registers
        h = x + residual
        return _fused_rms_norm(h, weight, epsilon), h
    return _RMSNormResidual.apply(x.contiguous(), residual.contiguous(), weight, epsilon)


def _fused_rms_norm(x, weight, epsilon):
    return fused.fused_rms_norm(x, weight, None, epsilon, begin_norm_axis=x.ndim - 1)[0]


class _RMSNormResidual(PyLayer):
    """h = x + residual, y = h r w; d residual = dx = r (dy w - h r^2 mean(dy w h)) + dh, dw = sum(dy h r). Keeps h and
    r."""

    @staticmethod
    def forward(ctx, x, residual, weight, epsilon):
        y, h, r = _C_ops._run_custom_op("gpu_rms_norm_residual", x, residual, weight, epsilon)
        ctx.save_for_backward(h, weight, r)
        ctx.frozen = [t.stop_gradient for t in (x, residual, weight)]
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        dx, dw = _C_ops._run_custom_op(
            "gpu_rms_norm_residual_backward", *ctx.saved_tensor(), dy.contiguous(), dh.contiguous()
        )
        return tuple(None if frozen else d for d, frozen in zip((dx, dx, dw), ctx.frozen))


def rope(x, cos, sin, interleaved=False):
    (B, T, _, Dh), r = x.shape, cos.shape[-1]
    if not _same(x) or interleaved or r == 0:
        return reference.rope(x, cos, sin, interleaved)
    reference.check_rope(x, cos)
    if r < Dh:
        return paddle.concat([rope(x[..., :r], cos, sin), x[..., r:]], axis=-1)
    cos, sin = (
        t.detach().astype(x.dtype) for t in (cos, sin)
    )  # Paddle's operator needs one dtype; it computes in float32
    if cos.shape[0] == 1:
        return _fused_rope(x, cos, sin, None)
    # One table for the batch, and per token its row.
    cos, sin = (t.reshape([1, B * T, 1, Dh]) for t in (cos, sin))
    return _fused_rope(x, cos, sin, _positions(B, T, paddle.get_device()))


def _fused_rope(x, cos, sin, positions):
    """x (B, T, heads, Dh); cos, sin (1, rows, 1, Dh) of x's dtype; positions (B, T) int64, or None where rows == T."""
    return fused.fused_rotary_position_embedding(
        x, sin=sin, cos=cos, position_ids=positions, use_neox_rotary_style=False
    )[0]  # in Paddle, "not neox" rotates (i, i + r/2), "neox" rotates neighbors


@functools.lru_cache(maxsize=4)
def _positions(B, T, device):
    return paddle.arange(B * T, dtype="int64").reshape([B, T])


def swiglu(gate, up):
    return F.swiglu(gate, up) if gate.dtype == up.dtype else reference.swiglu(gate, up)


# ------------------------------------------------------------------------------------------ quantized linears


def quant_linear(x, qweight, scales, bias=None, scheme="w8", qzeros=None, g_index=None, input_scale=None):
    n_in, (groups, n_out) = x.shape[-1], scales.shape if scales.ndim == 2 else (0, 0)
    layout = scheme != "a8w8" and g_index is None and n_in % groups == 0 and _same(x)
    if not (layout and n_out % (32 // int(scheme[1:])) == 0 and n_in // groups % (32 // int(scheme[1:])) == 0):
        return reference.quant_linear(x, qweight, scales, bias, scheme, qzeros, g_index, input_scale)
    packed = qweight, scales if scales.dtype == paddle.float32 else scales.astype("float32"), qzeros
    rows, bits, group = x.size // n_in, int(scheme[1:]), n_in // groups
    if rows > ROWS or paddle.is_grad_enabled() and not x.stop_gradient:
        return linear(x, _C_ops._run_custom_op("gpu_dequantize", x, *packed, bits, group)[0], bias)
    bias = None if bias is None else bias.astype(x.dtype)
    y = _C_ops._run_custom_op("gpu_quant_linear", x.reshape([rows, n_in]).contiguous(), *packed, bias, bits, group)[0]
    return y.reshape([*x.shape[:-1], n_out])


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
    arguments = hidden, weight, labels, transpose_weight, ignore_index, return_predictions
    if vocabulary is not None:
        return reference.linear_cross_entropy(*arguments, vocabulary, softcap)
    reference.check_scores(softcap)
    hidden, weight = _to_bf16(hidden, weight if weight.dtype == hidden.dtype else weight.astype(hidden.dtype))
    labelled = paddle.nonzero(labels != ignore_index).flatten()  # (M,)
    if labelled.shape[0] == 0 or not _same(hidden):
        return reference.linear_cross_entropy(*arguments, softcap=softcap)
    options = types.SimpleNamespace(labels=paddle.gather(labels, labelled), transpose=transpose_weight, predictions=[])
    options.softcap = float(softcap or 0)
    options.d_hidden_in_forward = paddle.is_grad_enabled() and weight.stop_gradient and not hidden.stop_gradient
    row_losses = _LinearCrossEntropy.apply(paddle.gather(hidden, labelled), weight, options)
    losses = paddle.scatter(paddle.zeros([labels.shape[0]], "float32"), labelled, row_losses)
    if not return_predictions:
        return losses
    return losses, paddle.scatter(
        paddle.full([labels.shape[0]], -1, "int64"), labelled, paddle.concat(options.predictions)
    )


class _LinearCrossEntropy(PyLayer):
    """loss = lse(h W) - (h W)[label]; d(h W) = (exp(h W - lse) - onehot(label)) * d loss; softcap: cross_entropy.cuh.

    Logits are computed in chunks, in forward and in backward; with a frozen weight only in forward, which then also
    computes the gradient of hidden for d loss = 1.
    """

    @staticmethod
    def forward(ctx, hidden, weight, options):
        losses, sums, d_hidden = [], [], []
        for chunk in _chunks(hidden, weight, options.transpose):
            logits, labels = paddle.matmul(hidden[chunk], weight, transpose_y=options.transpose), options.labels[chunk]
            lse, target, best = _C_ops._run_custom_op("gpu_cross_entropy", logits, labels, options.softcap)
            sums.append(lse)
            losses.append(lse - target)
            options.predictions.append(best)
            if options.d_hidden_in_forward:
                d_hidden.append(_d_hidden(logits, labels, lse, paddle.ones_like(lse), weight, options)[1])
        ctx.options, ctx.frozen = options, [hidden.stop_gradient, weight.stop_gradient]
        ctx.save_for_backward(
            *([paddle.concat(d_hidden)] if options.d_hidden_in_forward else [hidden, weight, paddle.concat(sums)])
        )
        return paddle.concat(losses)

    @staticmethod
    def backward(ctx, d_losses):
        options, labels, transpose, (fixed, frozen) = ctx.options, ctx.options.labels, ctx.options.transpose, ctx.frozen
        if options.d_hidden_in_forward:
            (d_hidden,) = ctx.saved_tensor()
            return d_hidden * d_losses.unsqueeze(-1).astype(d_hidden.dtype), None
        hidden, weight, sums = ctx.saved_tensor()
        parts, d_weight = [], None if frozen else paddle.zeros(weight.shape, "float32")
        for chunk in _chunks(hidden, weight, transpose):
            logits = paddle.matmul(hidden[chunk], weight, transpose_y=transpose)
            d, d_hidden = _d_hidden(logits, labels[chunk], sums[chunk], d_losses[chunk], weight, options)
            parts.append(d_hidden)
            if not frozen:
                pair = (d, hidden[chunk]) if transpose else (hidden[chunk], d)
                d_weight.add_(paddle.matmul(*pair, transpose_x=True).astype("float32"))
        return None if fixed else paddle.concat(parts), None if frozen else d_weight.astype(weight.dtype)


def _d_hidden(logits, labels, lse, d_losses, weight, options):
    """(gradient of the logits, in place of the logits, gradient of hidden)."""
    (d,) = _C_ops._run_custom_op("gpu_softmax_backward", logits, labels, lse, d_losses, options.softcap)
    return d, paddle.matmul(d, weight, transpose_y=not options.transpose)


def _chunks(hidden, weight, transpose):
    tokens, size = hidden.shape[0], max(16, LOGITS // weight.shape[0 if transpose else 1])
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


# ---------------------------------------------------------------------------------------------- optimizer


@paddle.no_grad()
def adamw(parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale=1.0):
    if grad_scale != 1.0:
        gradient = gradient * grad_scale
    powers = (_on_gpu(beta**step, paddle.get_device()) for beta in (beta1, beta2))
    _adamw(
        parameter,
        gradient,
        _on_gpu(lr, paddle.get_device()),
        moment1,
        moment2,
        *powers,
        beta1,
        beta2,
        epsilon,
        weight_decay,
    )


def _adamw(parameter, gradient, lr, moment1, moment2, power1, power2, beta1, beta2, epsilon, weight_decay):
    """lr, power1 and power2 (beta ** step) are tensors (1,); use_global_beta_pow keeps Paddle from changing them."""
    return _C_ops.adamw_(
        parameter,
        gradient,
        lr,
        moment1,
        moment2,
        None,
        power1,
        power2,
        None,
        None,
        beta1,
        beta2,
        epsilon,
        1.0,
        weight_decay,
        weight_decay != 0.0,
        False,
        1000,
        False,
        True,
        False,
    )


@functools.lru_cache(maxsize=16)
def _on_gpu(value, device):
    """(1,) float32 on the device; cached for all parameters of a step."""
    return paddle.full([1], value, "float32")
