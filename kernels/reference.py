"""Plain Paddle: every op, on any device that Paddle knows. The oracle that faster back ends are tested against.

Nothing here is tuned for one chip, yet attention and linear_cross_entropy keep their memory bound: both are PyLayers
that compute in blocks, save their inputs only, and compute each block's probabilities again in backward."""

import functools
import types

from kernels import to_tensor

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

MASKED = -1e30  # finite, so that a fully masked row gives no NaN; its output is set to zero afterwards
BLOCK_ELEMENTS = 1 << 23  # scores held at a time by attention (32 MB)
LOGITS = 1 << 25  # logits held at a time by linear_cross_entropy (128 MB): fewer than 1,000 rows are a slow product


def rms_norm(x, weight, epsilon, residual=None):
    if residual is not None:
        x = x + residual
    h = x.astype("float32")
    y = (h * paddle.rsqrt((h * h).mean(-1, keepdim=True) + epsilon)).astype(x.dtype) * weight
    return y if residual is None else (y, x)


def layer_norm(x, weight, bias, epsilon, residual=None):
    if residual is not None:
        x = x + residual
    h = x.astype("float32")
    h = h - h.mean(-1, keepdim=True)
    y = (h * paddle.rsqrt((h * h).mean(-1, keepdim=True) + epsilon)).astype(x.dtype) * weight
    y = y if bias is None else y + bias
    return y if residual is None else (y, x)


def rope(x, cos, sin, interleaved=False):
    check_rope(x, cos)
    return _Rope.apply(x, cos, sin, interleaved) if paddle.in_dynamic_mode() else _rotate(x, cos, sin, interleaved)


def check_rope(x: paddle.Tensor, cos: paddle.Tensor) -> None:
    """The widths of kernels.rope's arguments, for every back end."""
    assert cos.shape[-1] % 2 == 0 and cos.shape[-1] <= x.shape[-1], (
        f"tables of {cos.shape[-1]} columns for heads of {x.shape[-1]}"
    )


class _Rope(PyLayer):
    """A rotation: its gradient is the rotation back. Nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.tables, ctx.interleaved = (cos, sin), interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.tables
        return _rotate(dy, cos, -sin, ctx.interleaved), None, None


def _rotate(x, cos, sin, interleaved):
    turned, heads, Dh = cos.shape[-1], x.shape[2], x.shape[3]
    half = turned // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if heads > 0:  # not known (-1) in a graph that export.py traces
        cos, sin = (paddle.tile(t, [1, 1, heads, 1]) for t in (cos, sin))  # faster than broadcasting on the CPU
    a, b = (
        (x[..., 0:turned:2], x[..., 1:turned:2]) if interleaved else (x[..., :half], x[..., half:turned])
    )  # (B, T, heads, r/2)
    pair = a * cos - b * sin, b * cos + a * sin
    y = paddle.stack(pair, axis=-1).flatten(-2) if interleaved else paddle.concat(pair, axis=-1)
    y = y.astype(x.dtype)
    return y if turned == Dh else paddle.concat([y, x[..., turned:]], axis=-1)


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up, approximate=True):
    return F.gelu(gate, approximate=approximate) * up


def gelu(x, approximate=True):
    return F.gelu(x, approximate=approximate)


def embedding(ids, weight):
    return F.embedding(ids, weight)


def linear(x, weight, bias=None, residual=None):
    weight = weight if weight.dtype == x.dtype else weight.astype(x.dtype)
    y = (
        paddle.matmul(x, weight) if bias is None else F.linear(x, weight, bias)
    )  # F.linear's own Python costs 10 us a call
    return y if residual is None else y + residual


def lora_linear(x, weight, lora_A, lora_B, scaling, bias=None, dropped=None):
    return linear(x, weight, bias) + linear(linear(x if dropped is None else dropped, lora_A) * scaling, lora_B)


# -------------------------------------------------------------------------------------- quantized linears


def quant_linear(x, qweight, scales, bias=None, scheme="w8", qzeros=None, g_index=None, input_scale=None):
    if scheme != "a8w8":
        return linear(x, dequantize(qweight, scales, int(scheme[1:]), qzeros, g_index).astype(x.dtype), bias)
    h = x.astype("float32")
    scale = input_scale
    if scale is None:
        scale = h.abs().max(-1, keepdim=True).clip(min=1e-8) / 127.0  # (..., 1)
    codes = paddle.clip(paddle.round(h / scale), -128.0, 127.0)
    # Integers in float32: sums are exact up to 2^24, past that they are rounded like any float32 product.
    y = paddle.matmul(codes, qweight.astype("float32")) * scale * scales
    return (y if bias is None else y + bias).astype(x.dtype)


def dequantize(qweight, scales, bits, qzeros=None, g_index=None):
    """(in, out) float32 weights of the packed codes; arguments as in kernels.quant_linear."""
    codes = _unpack(qweight, bits, axis=1)  # (in, out)
    if qzeros is None:
        zeros = paddle.full_like(scales, 2.0 ** (bits - 1))
    else:
        zeros = paddle.bitwise_and(_unpack(qzeros, bits, axis=2) + 1, paddle.full([1], 2**bits - 1, "int32"))
        zeros = zeros.astype("float32")
    groups, n_out = scales.shape
    if g_index is not None:
        scales, zeros = scales.index_select(g_index), zeros.index_select(g_index)  # (in, out)
        return (codes.astype("float32") - zeros) * scales
    codes = codes.astype("float32").reshape([groups, -1, n_out])
    return ((codes - zeros.unsqueeze(1)) * scales.unsqueeze(1)).reshape([-1, n_out])


def _unpack(packed, bits, axis):
    """int32 words, each of 32/bits codes along rows (axis 1) or columns (axis 2) -> int32 codes."""
    shifts = paddle.arange(0, 32, bits, dtype="int32")
    shifts = shifts.unsqueeze(-1) if axis == 1 else shifts
    codes = paddle.bitwise_right_shift(packed.unsqueeze(axis), shifts)  # (rows, 32/bits, cols) or (rows, cols, 32/bits)
    codes = paddle.bitwise_and(codes, paddle.full([1], 2**bits - 1, "int32"))
    return codes.reshape([-1, packed.shape[1]] if axis == 1 else [packed.shape[0], -1])


# ---------------------------------------------------------------------------------------------- attention


def attention(q, k, v, startend_row_indices=None, causal=True, scale=None, alibi_slopes=None, softcap=None):
    if not paddle.in_dynamic_mode():
        return _traced_attention(q, k, v, startend_row_indices, causal, scale, alibi_slopes, softcap)
    check_attention(q, k, startend_row_indices, causal, softcap)
    (B, Tq, H, Dh), (_, Tk, K, _) = q.shape, k.shape
    mask = _Mask(startend_row_indices, causal, alibi_slopes, B, Tq, Tk, H, K)
    return _Attention.apply(q, k, v, mask, Dh**-0.5 if scale is None else scale, softcap)


def check_attention(
    q: paddle.Tensor, k: paddle.Tensor, rows: paddle.Tensor | None, causal: bool, softcap: float | None
) -> None:
    """The shapes of kernels.attention's arguments and its softcap, for every back end."""
    Tq, Tk = q.shape[1], k.shape[1]
    assert not causal or Tk >= Tq, f"causal attention of {Tq} queries over {Tk} keys"
    check_part(q, k, rows, causal, softcap)


def check_part(
    q: paddle.Tensor, k: paddle.Tensor, rows: paddle.Tensor | None, causal: bool, softcap: float | None
) -> None:
    """The same of kernels.attention_with_lse, whose keys may be fewer."""
    (B, _, H, _), (_, Tk, K, _) = q.shape, k.shape
    assert H % K == 0, f"{H} query heads are not a multiple of {K} key/value heads"
    check_scores(softcap)
    if rows is not None:
        n = rows.shape[-1]
        assert list(rows.shape[:3:2]) == [B, Tk] and rows.shape[1] in (1, K, H), f"rows {rows.shape}, keys {k.shape}"
        assert n in ((1, 2) if causal else (2, 4)), f"{n} columns of rows with causal={causal}"


def check_scores(softcap: float | None, window: int | None = None) -> None:
    """What a score may be made to: 0 is not the same as None."""
    assert softcap is None or softcap > 0, f"a softcap of {softcap}"
    assert window is None or window >= 1, f"a window of {window} keys"


class _Mask:
    """What may be seen, and the ALiBi bias, as an additive float block for queries [i0, i1) and keys [j0, j1)."""

    def __init__(self, rows, causal, alibi_slopes, B, Tq, Tk, H, K, offset=None):
        self.causal, self.offset, self.Tk, self.H, self.K = causal, Tk - Tq if offset is None else offset, Tk, H, K
        self.rows = rows
        self.slopes = alibi_slopes
        per_block = max(1, BLOCK_ELEMENTS // (B * H * Tk))
        size = min(Tq, max(64, min(per_block, 512 if rows is None else 128)))  # with rows, small blocks see few keys
        self.blocks = [(i, min(i + size, Tq)) for i in range(0, Tq, size)]
        # The last row that sees a key, over the whole batch: lets a block of queries start at its first visible key.
        self.last_row = (
            rows[..., 0].max(axis=[0, 1]).numpy() if causal and rows is not None and rows.shape[-1] == 1 else None
        )

    def keys(self, i0, i1):
        """The range of keys that any query of the block can see."""
        j1 = (
            max(1, min(self.Tk, i1 + self.offset)) if self.causal else self.Tk
        )  # of queries before all keys: one, hidden
        if self.last_row is None:
            return 0, j1
        visible = self.last_row[:j1] > i0 + self.offset
        return (int(visible.argmax()), j1) if visible.any() else (0, j1)

    def bias(self, i0, i1, j0, j1):
        """(1 | B, 1 | K, 1 | H/K, i1-i0, j1-j0) float32 to add to the scores, or None if nothing is masked."""
        row = paddle.arange(i0 + self.offset, i1 + self.offset, dtype="int32").unsqueeze(-1)  # (bq, 1)
        key = paddle.arange(j0, j1, dtype="int32")
        masked = None
        if self.causal and j1 - 1 > i0 + self.offset:
            masked = (key > row).unsqueeze([0, 1, 2])  # (1, 1, 1, bq, bk)
        if self.rows is not None:
            at = self.rows[:, :, j0:j1]
            at = at.reshape(
                [at.shape[0], *((at.shape[1], 1) if at.shape[1] <= self.K else (self.K, -1)), 1, j1 - j0, at.shape[-1]]
            )
            hidden = _hidden(row, at, self.causal)
            masked = hidden if masked is None else masked | hidden
        bias = None if masked is None else masked.astype("float32") * MASKED
        if self.slopes is not None:
            alibi = -self.slopes.reshape([1, self.K, -1, 1, 1]) * (row - key).astype("float32")  # (1, K, H/K, bq, bk)
            bias = alibi if bias is None else bias + alibi
        return bias


def _hidden(row, at, causal):
    """Which rows (q, 1) must not see a key, by the columns at (…, 1, keys, n) of its rows: (…, q, keys) bool."""
    n = at.shape[-1]
    hidden = row >= at[..., 0]
    if n == 2 and causal or n == 4:
        hidden = hidden & (row < at[..., 1])
    if n == 2 and not causal:
        hidden = hidden | (row < at[..., 1])
    if n == 4:
        hidden = hidden | ((row >= at[..., 2]) & (row < at[..., 3]))
    return hidden


class _Attention(PyLayer):
    """Softmax over whole rows of one block of queries after another; saves q, k, v and the output, all linear in T.

    With P = softmax(S) and dP = dO V^T: dS = P * (dP - rowsum(dO * O)), dQ = dS K, dK = dS^T Q, dV = P^T dO. With a
    softcap dS is multiplied by the slope of what was made of the products, 1 - tanh^2."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, softcap):
        out = []
        k_all, v_all = k.transpose([0, 2, 3, 1]), v.transpose([0, 2, 1, 3])  # (B, K, Dh, Tk), (B, K, Tk, Dh)
        for i0, i1 in mask.blocks:
            j0, j1 = mask.keys(i0, i1)
            block = i0, i1, j0, j1
            p, seen, _ = _probabilities(_group(q[:, i0:i1], mask.K), k_all[..., j0:j1], mask, block, scale, softcap)
            o = paddle.matmul(p, v_all[:, :, j0:j1])  # (B, K, G*bq, Dh)
            out.append(_ungroup(o if seen is None else o * seen, i1 - i0))
        out = out[0] if len(out) == 1 else paddle.concat(out, axis=1)
        ctx.save_for_backward(q, k, v, out)
        ctx.mask, ctx.scale, ctx.softcap, ctx.frozen = mask, scale, softcap, [t.stop_gradient for t in (q, k, v)]
        return out

    @staticmethod
    def backward(ctx, d_out):
        grads = _gradients(*ctx.saved_tensor(), d_out, ctx.mask, ctx.scale, ctx.softcap)
        return tuple(None if frozen else d for d, frozen in zip(grads, ctx.frozen))


def _gradients(q, k, v, out, d_out, mask, scale, softcap, lse=None):
    """Those of q, k and v. lse (B, H, Tq): of scores over more keys than these, out likewise; None: these are all."""
    K = mask.K
    k_all, v_all = k.transpose([0, 2, 3, 1]), v.transpose([0, 2, 3, 1])  # both (B, K, Dh, Tk)
    d_q, d_k, d_v = [], paddle.zeros_like(k_all), paddle.zeros_like(v_all)
    v_and_one = paddle.concat([v_all, paddle.ones_like(v_all[:, :, :1])], axis=2)  # (B, K, Dh + 1, Tk)
    for i0, i1 in mask.blocks:
        j0, j1 = mask.keys(i0, i1)
        q_block, d_block = _group(q[:, i0:i1], K), _group(d_out[:, i0:i1], K)
        k_block = k_all[..., j0:j1]
        if lse is None:
            p, seen, slope = _probabilities(q_block, k_block, mask, (i0, i1, j0, j1), scale, softcap)
        else:
            s, _, slope = _scores(q_block, k_block, mask, (i0, i1, j0, j1), scale, softcap)
            p, seen = paddle.exp(s - lse[..., i0:i1].reshape([*s.shape[:3], 1])), None
        if seen is not None:
            d_block = d_block * seen
        delta = (d_block * _group(out[:, i0:i1], K)).sum(-1, keepdim=True)
        # dO V^T - delta as one product, since broadcasting delta over the scores costs more than the product.
        d_s = p * paddle.matmul(paddle.concat([d_block, -delta], axis=-1), v_and_one[..., j0:j1])  # (B, K, G*bq, bk)
        d_s = d_s if slope is None else d_s * slope
        d_q.append(_ungroup(paddle.matmul(d_s, k_block, transpose_y=True), i1 - i0) * scale)
        d_k[..., j0:j1] = d_k[..., j0:j1] + paddle.matmul(q_block, d_s, transpose_x=True) * scale
        d_v[..., j0:j1] = d_v[..., j0:j1] + paddle.matmul(d_block, p, transpose_x=True)
    d_q = d_q[0] if len(d_q) == 1 else paddle.concat(d_q, axis=1)
    return d_q, d_k.transpose([0, 3, 1, 2]), d_v.transpose([0, 3, 1, 2])


def attention_with_lse(q, k, v, startend_row_indices, offset, causal=True, scale=None, alibi_slopes=None, softcap=None):
    mask, scale = _part(q, k, startend_row_indices, offset, causal, scale, alibi_slopes, softcap)
    out, lse, (B, _, H, _) = [], [], q.shape
    k_all, v_all = k.transpose([0, 2, 3, 1]), v.transpose([0, 2, 1, 3])  # (B, K, Dh, Tk), (B, K, Tk, Dh)
    for i0, i1 in mask.blocks:
        j0, j1 = mask.keys(i0, i1)
        s, _, _ = _scores(_group(q[:, i0:i1], mask.K), k_all[..., j0:j1], mask, (i0, i1, j0, j1), scale, softcap)
        most = s.max(-1, keepdim=True)
        p, seen = paddle.exp(s - most), (most > MASKED / 2).astype(s.dtype)  # (B, K, G*bq, bk), (B, K, G*bq, 1)
        total = p.sum(-1, keepdim=True)
        out.append(_ungroup(paddle.matmul(p, v_all[:, :, j0:j1]) / total * seen, i1 - i0))
        chunk_lse = paddle.where(seen > 0, most + paddle.log(total), paddle.full_like(most, -np.inf))
        lse.append(chunk_lse.reshape([B, H, -1]))
    return paddle.concat(out, axis=1), paddle.concat(lse, axis=-1).astype("float32")


def attention_with_lse_backward(
    q, k, v, out, lse, d_out, startend_row_indices, offset, causal=True, scale=None, alibi_slopes=None, softcap=None
):
    mask, scale = _part(q, k, startend_row_indices, offset, causal, scale, alibi_slopes, softcap)
    lse = paddle.where(paddle.isinf(lse), paddle.zeros_like(lse), lse)  # of who sees nothing: its scores make p zero
    return _gradients(q, k, v, out, d_out, mask, scale, softcap, lse)


def _part(q, k, rows, offset, causal, scale, slopes, softcap):
    check_part(q, k, rows, causal, softcap)
    (B, Tq, H, Dh), (_, Tk, K, _) = q.shape, k.shape
    return _Mask(rows, causal, slopes, B, Tq, Tk, H, K, offset), Dh**-0.5 if scale is None else scale


def _group(x, K):
    """(B, bq, H, Dh) -> (B, K, G*bq, Dh): the G = H/K query heads of a key/value head become rows of one product."""
    B, T, _, Dh = x.shape
    return x.reshape([B, T, K, -1, Dh]).transpose([0, 2, 3, 1, 4]).reshape([B, K, -1, Dh])


def _ungroup(x, T):
    """(B, K, G*bq, Dh) -> (B, bq, H, Dh)"""
    B, K, _, Dh = x.shape
    return x.reshape([B, K, -1, T, Dh]).transpose([0, 3, 1, 2, 4]).reshape([B, T, -1, Dh])


def _scores(q, k, mask, block, scale, softcap):
    """q (B, K, G*bq, Dh), k (B, K, Dh, bk) -> scores (B, K, G*bq, bk), the mask's bias or None, the cap's slope or
    None."""
    i0, i1, j0, j1 = block
    B, K, rows, _ = q.shape
    s, slope = paddle.matmul(q * scale, k), None
    if softcap is not None:
        t = paddle.tanh(s / softcap)
        s, slope = t * softcap, 1.0 - t * t
    bias = mask.bias(i0, i1, j0, j1)
    if bias is not None:  # tile, as Paddle's CPU broadcasting is many times slower
        bias_of_all = paddle.tile(
            bias, [B // bias.shape[0], K // bias.shape[1], rows // (i1 - i0) // bias.shape[2], 1, 1]
        )
        s = s + bias_of_all.reshape(s.shape)
    return s, bias, slope


def _probabilities(q, k, mask, block, scale, softcap):
    """As _scores -> softmax (B, K, G*bq, bk), which rows see a key (None: all do), the cap's slope or None."""
    i0, i1 = block[:2]
    B, K, rows, _ = q.shape
    s, bias, slope = _scores(q, k, mask, block, scale, softcap)
    p = F.softmax(s, axis=-1)
    if bias is None or mask.rows is None:
        return p, None, slope
    seen = (bias.max(-1, keepdim=True) > MASKED / 2).astype(q.dtype)  # (1 | B, 1 | K, 1 | G, bq, 1)
    return p, seen.expand([B, K, rows // (i1 - i0), i1 - i0, 1]).reshape([B, K, rows, 1]), slope


def _traced_attention(q, k, v, rows, causal, scale, alibi_slopes, softcap):
    """The same for a graph that export.py traces: no backward, lengths unknown, so all scores [Tq, Tk] at once."""
    assert rows is None or rows.shape[1] == 1, "rows of a head each are not traceable"
    (Tk, K), Tq, Dh = paddle.shape(k)[1:3], paddle.shape(q)[1], q.shape[3]
    q_rows = (q * (Dh**-0.5 if scale is None else scale)).reshape([0, 0, K, -1, Dh]).transpose([0, 2, 3, 1, 4])
    k_all, v_all = k.transpose([0, 2, 3, 1]).unsqueeze(2), v.transpose([0, 2, 1, 3]).unsqueeze(2)  # (B, K, 1, …)
    row, key = (
        paddle.arange(Tk - Tq, Tk, dtype="int32").unsqueeze(-1),
        paddle.arange(0, Tk, dtype="int32"),
    )  # (Tq, 1), (Tk,)
    masked = (key > row if causal else row < 0).unsqueeze([0, 1, 2])  # (1, 1, 1, Tq, Tk | 1)
    if rows is not None:
        masked = masked | _hidden(row, rows.unsqueeze([2, 3]), causal)  # (B, 1, 1, Tq, Tk)
    bias = masked.astype("float32") * MASKED
    s = paddle.matmul(q_rows, k_all)  # (B, K, H/K, Tq, Tk)
    if softcap is not None:
        s = paddle.tanh(s / softcap) * softcap
    if alibi_slopes is not None:
        s = s - alibi_slopes.reshape([1, K, -1, 1, 1]) * (row - key).astype("float32")
    seen = (bias.max(-1, keepdim=True) > MASKED / 2).astype(q.dtype)
    return (
        (paddle.matmul(F.softmax(s + bias, axis=-1), v_all) * seen).transpose([0, 3, 1, 2, 4]).reshape([0, 0, -1, Dh])
    )


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
    return over_labelled_rows(
        _LinearCrossEntropy,
        hidden,
        weight,
        labels,
        transpose_weight,
        ignore_index,
        return_predictions,
        vocabulary,
        softcap,
    )


def over_labelled_rows(
    layer: type,
    hidden: paddle.Tensor,
    weight: paddle.Tensor,
    labels: paddle.Tensor,
    transpose_weight: bool,
    ignore_index: int,
    return_predictions: bool,
    vocabulary: object,
    softcap: float | None,
) -> paddle.Tensor | tuple:
    """kernels.linear_cross_entropy by a PyLayer that sees the rows that count alone: layer.apply(hidden, weight,
    labels, options)."""
    check_scores(softcap)
    counted = paddle.nonzero(labels != ignore_index).flatten()  # (M,) tokens that count
    losses = paddle.zeros([labels.shape[0]], "float32")
    predictions = paddle.full([labels.shape[0]], -1, "int64")
    options = types.SimpleNamespace(
        transpose_weight=transpose_weight,
        vocabulary=vocabulary,
        softcap=softcap,
        start=0 if vocabulary is None else vocabulary.start,
        predictions=[] if return_predictions else None,  # the layer adds those of one chunk after another
        grad=paddle.is_grad_enabled(),  # which is always off within a PyLayer
    )
    if counted.shape[0] > 0:
        counted_losses = layer.apply(paddle.gather(hidden, counted), weight, paddle.gather(labels, counted), options)
        losses = paddle.scatter(losses, counted, counted_losses)
        if return_predictions:
            predictions = paddle.scatter(predictions, counted, paddle.concat(options.predictions))
    else:
        # Keeps the graph: rows without targets have zero gradients, the weight's too, as ranks wait for each other's.
        losses = losses + hidden.astype("float32").sum(-1) * 0.0
        if not weight.stop_gradient:
            losses = losses + weight.astype("float32").sum() * 0.0
    return (losses, predictions) if return_predictions else losses


class _LinearCrossEntropy(PyLayer):
    """loss = lse - (h W)[label], lse = logsumexp(h W); d(h W) = (exp(h W - lse) - onehot(label)) * d loss.

    Logits come in chunks of tokens. Trained W: four products, as backward makes the logits again. Frozen W: two, as
    forward also makes the rows (p - onehot) W^T, of which backward needs the multiple d loss. With a softcap the
    logits l are softcap * tanh(h W / softcap), and d(h W) has a factor 1 - (l / softcap)^2."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, options):
        turned = options.transpose_weight
        options.frozen = [hidden.stop_gradient, weight.stop_gradient]
        rows_too = options.grad and options.frozen == [False, True]
        losses, every_lse, rows = [], [], []
        for chunk in _chunks(labels.shape[0], weight.shape[0 if turned else 1]):
            logits = _logits(hidden[chunk], weight, options)
            loss, lse, best = _losses(logits, labels[chunk], options)
            losses.append(loss)
            every_lse.append(lse)
            if options.predictions is not None:
                options.predictions.append(best)
            if rows_too:
                p = _softmax_less_onehot(logits, labels[chunk], lse, options).astype(hidden.dtype)
                rows.append(paddle.matmul(p, weight.astype(hidden.dtype), transpose_y=not turned))
        ctx.options, ctx.rows_too = options, rows_too
        if rows_too:
            ctx.save_for_backward(paddle.concat(rows))
        else:
            ctx.save_for_backward(hidden, weight, labels, paddle.concat(every_lse))
        return paddle.concat(losses)

    @staticmethod
    def backward(ctx, d_losses):
        options, turned = ctx.options, ctx.options.transpose_weight
        if ctx.rows_too:
            (rows,) = ctx.saved_tensor()
            return rows * d_losses.unsqueeze(-1).astype(rows.dtype), None, None
        hidden, weight, labels, lse = ctx.saved_tensor()
        frozen = options.frozen[1]
        d_hidden, d_weight = [], None if frozen else paddle.zeros(weight.shape, "float32")
        for chunk in _chunks(labels.shape[0], weight.shape[0 if turned else 1]):
            d_loss = d_losses[chunk].unsqueeze(-1).astype(hidden.dtype)  # (c, 1), multiplied where the rows are short
            p = _softmax_less_onehot(_logits(hidden[chunk], weight, options), labels[chunk], lse[chunk], options)
            p = p.astype(hidden.dtype)
            d_hidden.append(paddle.matmul(p, weight.astype(hidden.dtype), transpose_y=not turned) * d_loss)
            if not frozen:
                scaled = hidden[chunk] * d_loss
                pair = (p, scaled) if turned else (scaled, p)
                d_weight.add_(paddle.matmul(*pair, transpose_x=True).astype("float32"))
        d_hidden = None if options.frozen[0] else paddle.concat(d_hidden)
        return d_hidden, None if frozen else d_weight.astype(weight.dtype), None


def _losses(logits, labels, options):
    """losses, logsumexp and largest logits' ids (where asked for), each (c,).

    Not F.cross_entropy: on the CPU (Paddle 3.3.1) it caps losses at 64, and makes a finite one of a logit that is NaN.
    """
    at, in_range = _place(labels, logits, options)
    target = paddle.take_along_axis(logits, at, 1).flatten() * in_range
    best = None if options.predictions is None else logits.argmax(-1) + options.start
    if options.vocabulary is None:
        lse = paddle.logsumexp(logits, -1)
    else:
        most = logits.max(-1)
        lse, target, best = reduce_lse(most, paddle.exp(logits - most.unsqueeze(-1)).sum(-1), target, best, options)
    return lse - target, lse, best


def _place(labels, logits, options):
    """Columns of the labels among these logits (c, 1), 0 where they are another rank's; and 1.0 or 0.0 for whether
    not."""
    at = labels - options.start
    in_range = (at >= 0) & (at < logits.shape[1])
    return paddle.where(in_range, at, paddle.zeros_like(at)).unsqueeze(-1), in_range.astype("float32")


def _softmax_less_onehot(logits, labels, lse, options):
    p = paddle.exp(logits - lse.unsqueeze(-1))
    at, in_range = _place(labels, logits, options)
    p.put_along_axis_(at, -in_range.unsqueeze(-1), 1, reduce="add")
    return p if options.softcap is None else p * (1.0 - paddle.square(logits / options.softcap))


def reduce_lse(
    most: paddle.Tensor, total: paddle.Tensor, target: paddle.Tensor, best: paddle.Tensor, options: object
) -> tuple:
    """Of the logits of all ranks, each (c,): logsumexp, the label's logit, the largest's id (the lowest, if there are
    several).

    Here: the largest logit, the sum of exp(logit - largest), the label's logit or 0, the largest's id.
    """
    all_reduce = options.vocabulary.all_reduce
    most_of_all = all_reduce(most.clone(), "max")
    sums = all_reduce(paddle.stack([total * paddle.exp(most - most_of_all), target]), "sum")
    if options.predictions is None:
        best = None
    else:
        best = -all_reduce(paddle.where(most == most_of_all, -best, paddle.full_like(best, -(1 << 62))), "max")
    return most_of_all + paddle.log(sums[0]), sums[1], best


def _chunks(tokens, vocabulary):
    size = max(16, LOGITS // vocabulary)
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def _logits(hidden, weight, options):
    """(c, V) float32"""
    logits = paddle.matmul(hidden, weight.astype(hidden.dtype), transpose_y=options.transpose_weight).astype("float32")
    return logits if options.softcap is None else paddle.tanh(logits / options.softcap) * options.softcap


# -------------------------------------------------------------------------------------------------- adamw


@paddle.no_grad()
def adamw(parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale=1.0):
    gradient = gradient.astype("float32") * grad_scale
    moment1.set_value(moment1 * beta1 + gradient * (1 - beta1))
    moment2.set_value(moment2 * beta2 + gradient * gradient * (1 - beta2))
    update = (moment1 / (1 - beta1**step)) / (paddle.sqrt(moment2 / (1 - beta2**step)) + epsilon)
    value = parameter.astype("float32")
    parameter.set_value((value * (1 - lr * weight_decay) - update * lr).astype(parameter.dtype))


def squared_norm(x):
    x = x.astype("float32")
    return paddle.sum(x * x, dtype="float64")


# ---------------------------------------------------------------------------------------- paged attention


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
    tables = np.asarray(block_tables)
    check_paged(q.shape, k_cache.shape, tables, queries, contexts)
    check_scores(softcap, window)
    scale, caches = Dh**-0.5 if scale is None else scale, ((k_cache, k_scales), (v_cache, v_scales))
    if q.dtype != paddle.float32:  # which masks and scores are made in
        return paged_attention(
            _single(q),
            k_cache,
            v_cache,
            tables,
            queries,
            contexts,
            scale,
            k_scales,
            v_scales,
            alibi_slopes,
            window,
            softcap,
        ).astype(q.dtype)
    if N == len(queries):
        return _paged_decode(q, caches, tables, contexts, scale, alibi_slopes, window, softcap)
    first, decodes = np.cumsum(queries) - queries, np.flatnonzero(queries == 1)
    parts, order = [], []  # outputs, and the rows of q that they belong to
    if len(decodes):
        rows = paddle.gather(q, to_tensor(first[decodes]))
        parts.append(
            _paged_decode(rows, caches, tables[decodes], contexts[decodes], scale, alibi_slopes, window, softcap)
        )
        order.append(first[decodes])
    for s in np.flatnonzero(queries > 1):
        blocks = to_tensor(tables[s, : -(-contexts[s] // block_size)])
        k, v = (_gathered(c, scales, blocks).reshape([1, -1, K, Dh])[:, : contexts[s]] for c, scales in caches)
        rows = q[first[s] : first[s] + queries[s]].unsqueeze(0)
        parts.append(
            attention(rows, k, v, sliding_window_rows(contexts[s], window), True, scale, alibi_slopes, softcap)[0]
        )
        order.append(np.arange(first[s], first[s] + queries[s]))
    if len(parts) == 1:
        return parts[0]
    order = np.concatenate(order)
    return paddle.gather(paddle.concat(parts), to_tensor(np.argsort(order)))


def sliding_window_rows(context: int, window: int) -> paddle.Tensor:
    """FlashMask rows (1, 1, context, 1) of a causal attention of which a query at p sees keys above p - window; None
    without."""
    return None if window is None else (paddle.arange(context, dtype="int32") + window).reshape([1, 1, -1, 1])


def check_paged(
    q_shape: list, cache_shape: list, tables: np.ndarray, queries: np.ndarray, contexts: np.ndarray
) -> None:
    """Whether what paged_attention was given fits together."""
    (N, H, _), (_, block_size, K, _) = q_shape, cache_shape
    assert H % K == 0, f"{H} query heads are not a multiple of {K} key/value heads"
    assert queries.sum() == N and (queries >= 1).all(), f"{N} queries, query_lengths {queries}"
    assert (contexts >= queries).all(), f"context_lengths {contexts} must count the queries {queries} too"
    assert tables.shape[1] * block_size >= contexts.max(), f"{tables.shape[1]} blocks of {block_size} for {contexts}"


def _gathered(cache, scales, rows):
    """Rows of a cache (…, Dh) in float32."""
    values = _single(paddle.gather(cache, rows))
    return values if scales is None else values * paddle.gather(scales, rows).unsqueeze(-1)


def _single(x):
    return x if x.dtype == paddle.float32 else x.astype("float32")


def _paged_decode(q, caches, tables, contexts, scale, alibi_slopes, window, softcap):
    """One query of each of S sequences, as one product padded to the longest: q (S, H, Dh) -> (S, H, Dh)."""
    S, H, Dh = q.shape
    _, block_size, K, _ = caches[0][0].shape
    rows, bias, distance = _decode_plan(
        tables.astype(np.int32).tobytes(), contexts.tobytes(), block_size, K, H // K, window
    )
    flat = ((c.reshape([-1, Dh]), None if scales is None else scales.reshape([-1])) for c, scales in caches)
    k, v = (_gathered(c, scales, rows).reshape([S, K, -1, Dh]) for c, scales in flat)
    scores = paddle.matmul(q.reshape([S, K, H // K, Dh]) * scale, k, transpose_y=True)  # (S, K, H/K, keys)
    if softcap is not None:
        scores = paddle.tanh(scores / softcap) * softcap
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.astype("float32").reshape([1, K, -1, 1]) * distance
    p = F.softmax(scores if bias is None else scores + bias, axis=-1)
    return paddle.matmul(p, v).reshape([S, H, Dh])


@functools.lru_cache(maxsize=2)  # layers with a window and without may take turns
def _decode_plan(tables, contexts, block_size, K, G, window):
    """Rows of the pool, as (slots * K, Dh), in the order (S, K, keys); what to add to scores (S, K, G, keys), or None;
    and how far before the query each key stands (S, 1, 1, keys).

    Row by row of one head each, since a transposed copy of the keys costs far more. The same for all layers of a step:
    tables (S, blocks) int32 and contexts (S,) int64 come as bytes, which can be compared with the last call's.
    """
    contexts = np.frombuffer(contexts, np.int64)
    tables = np.frombuffer(tables, np.int32).reshape(len(contexts), -1)
    keys = np.arange(contexts.max())
    hidden = keys >= contexts[:, None]  # (S, keys)
    blocks = np.where(hidden, tables[:, :1], tables[:, keys // block_size])  # behind the end any block of its own
    rows = (blocks * block_size + keys % block_size)[:, None].astype(np.int64) * K + np.arange(K)[:, None]
    distance = contexts[:, None] - 1 - keys
    if window is not None:
        hidden = hidden | (distance >= window)
    rows, distance = to_tensor(rows.reshape(-1)), to_tensor(distance.astype(np.float32)[:, None, None])
    if not hidden.any():
        return rows, None, distance
    bias = np.broadcast_to(
        np.where(hidden, np.float32(MASKED), np.float32(0.0))[:, None, None], (len(contexts), K, G, len(keys))
    )
    return rows, to_tensor(np.ascontiguousarray(bias)), distance


@paddle.no_grad()
def write_cache(k, v, k_cache, v_cache, slots, k_scales=None, v_scales=None):
    for x, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        if scales is not None:
            most = x.abs().max(-1)  # (N, K)
            _put(scales, slots, most / 127.0)
            x = paddle.round(x * (127.0 / paddle.clip(most, min=1e-30)).unsqueeze(-1)).astype("int8")
        _put(cache, slots, x)


def _put(cache, slots, x):
    """cache (blocks, block_size, …), x (N, …): row slots[i] becomes x[i], in place, whatever the pool's size."""
    rows = cache.reshape([-1, *cache.shape[2:]])
    assert rows.data_ptr() == cache.data_ptr(), "a reshape has copied"
    if x.dtype == paddle.int8:
        paddle.index_put_(rows, (slots,), x)  # scatter_ has no int8 on the CPU
    else:
        paddle.scatter_(rows, slots, x)


# ------------------------------------------------------------------------------------------------- sample


def sample(logits, temperature, top_k, top_p, uniform):
    rows = logits.astype("float32").numpy()
    ids_of_rows, finite = rows.argmax(-1), np.isfinite(rows.max(-1, initial=-np.inf))
    ids_of_rows[~finite] = -1
    for s in np.flatnonzero(finite & (np.asarray(temperature) > 0)):
        row, ids = rows[s : s + 1], None
        if 0 < top_k[s] < row.shape[1]:  # only the candidates need be looked at, in the order of their ids
            ids = np.flatnonzero(row[0] >= np.partition(row[0], -top_k[s])[-top_k[s]])
            row = row[:, ids]
        (at,) = sample_logits(row, temperature[s], 0, top_p[s], _Drawn(uniform[s]))
        ids_of_rows[s] = at if ids is None else ids[at]
    return to_tensor(ids_of_rows.astype(np.int64))


class _Drawn:
    """numpy's Generator.choice for a uniform number that has been drawn already."""

    def __init__(self, uniform):
        self.uniform = uniform

    def choice(self, n, p):
        cumulated = p.cumsum()
        return (cumulated / cumulated[-1]).searchsorted(self.uniform, side="right")


def penalize(logits: np.ndarray, ids: np.ndarray, mask: np.ndarray, penalty: float) -> np.ndarray:
    """Divide (or, if negative, multiply) the logits of tokens already there by penalty (Keskar et al., arXiv
    1909.05858)."""
    logits = logits.copy()
    for row, (seen, keep) in enumerate(zip(ids, mask)):
        seen = np.unique(seen[keep == 1])
        logits[row, seen] = np.where(logits[row, seen] > 0, logits[row, seen] / penalty, logits[row, seen] * penalty)
    return logits


def sample_logits(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, generator: np.random.Generator
) -> np.ndarray:
    """logits (B, V) -> ids (B,): temperature, then the top_k highest, then the least set whose mass reaches top_p."""
    assert temperature > 0, "temperature must be positive; greedy is do_sample=False"
    logits = logits.astype(np.float64) / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < kth, -np.inf, logits)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if top_p < 1.0:
        order = np.argsort(-p, axis=-1, kind="stable")
        sorted_p = np.take_along_axis(p, order, -1)
        sorted_p[sorted_p.cumsum(-1) - sorted_p >= top_p] = 0.0  # the token that crosses top_p is kept
        np.put_along_axis(p, order, sorted_p, -1)
        p /= p.sum(-1, keepdims=True)
    return np.array([generator.choice(p.shape[-1], p=row) for row in p], np.int64)
