"""Every op in plain Paddle, for any device that Paddle supports: the oracle that faster back ends are tested with.

Nothing is tuned for one chip, but the memory of attention and linear_cross_entropy is bounded: both are PyLayers that
compute in blocks, save only their inputs, and recompute each block's probabilities in backward.
"""

import functools
import types

import kernels
from kernels import to_tensor

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

MASKED = -1e30  # finite, so that a fully masked row does not give NaN; its output is then set to 0
BLOCK_ELEMENTS = 1 << 23  # scores of one block of attention (32 MB)
LOGITS = 1 << 25  # of one chunk of linear_cross_entropy (128 MB); products of fewer than 1,000 rows are slow


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
    """Assert the widths of kernels.rope's arguments; for all back ends."""
    assert cos.shape[-1] % 2 == 0 and cos.shape[-1] <= x.shape[-1], (
        f"tables of {cos.shape[-1]} columns for heads of {x.shape[-1]}"
    )


class _Rope(PyLayer):
    """The gradient of a rotation is the rotation by the negative angle. Saves only the tables."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.tables, ctx.interleaved = (cos, sin), interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.tables
        return _rotate(dy, cos, -sin, ctx.interleaved), None, None


def _rotate(x, cos, sin, interleaved):
    r, heads, Dh = cos.shape[-1], x.shape[2], x.shape[3]
    half = r // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if heads > 0:  # -1 (unknown) in a static graph
        cos, sin = (paddle.tile(t, [1, 1, heads, 1]) for t in (cos, sin))  # faster than broadcasting on the CPU
    a, b = (x[..., 0:r:2], x[..., 1:r:2]) if interleaved else (x[..., :half], x[..., half:r])  # (B, T, heads, r/2)
    pair = a * cos - b * sin, b * cos + a * sin
    y = paddle.stack(pair, axis=-1).flatten(-2) if interleaved else paddle.concat(pair, axis=-1)
    y = y.astype(x.dtype)
    return y if r == Dh else paddle.concat([y, x[..., r:]], axis=-1)


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up, approximate=True):
    return F.gelu(gate, approximate=approximate) * up


def gelu(x, approximate=True):
    return F.gelu(x, approximate=approximate)


def embedding(ids, weight):
    return F.embedding(ids, weight)


def linear(x, weight, bias=None, residual=None):
    if isinstance(weight, kernels.ComputedWeight):
        y = ComputedProduct.apply(x, weight, x.dtype)
        y = y if bias is None else y + bias
        return y if residual is None else y + residual
    weight = weight if weight.dtype == x.dtype else weight.astype(x.dtype)
    y = paddle.matmul(x, weight) if bias is None else F.linear(x, weight, bias)  # F.linear costs 10 us more per call
    return y if residual is None else y + residual


class ComputedProduct(PyLayer):
    """x W for a ComputedWeight, with products in `dtype`; W is computed again for dx = dy W^T, not kept."""

    @staticmethod
    def forward(ctx, x, weight, dtype):
        ctx.weight, ctx.dtype = weight, dtype
        return paddle.matmul(x.astype(dtype), weight.computed(True, dtype), transpose_y=True).astype(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return paddle.matmul(dy.astype(ctx.dtype), ctx.weight.computed(True, ctx.dtype)).astype(dy.dtype)


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
    # Integers in float32: sums are exact up to 2^24 and rounded like other float32 sums above.
    y = paddle.matmul(codes, qweight.astype("float32")) * scale * scales
    return (y if bias is None else y + bias).astype(x.dtype)


def dequantize(qweight, scales, bits, qzeros=None, g_index=None):
    """Packed codes -> weights (in, out) float32; arguments as in kernels.quant_linear."""
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


def round_to_float8(x, scale=None):
    h = x.astype("float32")
    if scale is None:
        scale = h.abs().max(-1, keepdim=True).clip(min=1e-12) / 448.0  # (..., 1)
    codes = paddle.clip(h / scale, -448.0, 448.0).astype("float8_e4m3fn").astype("float32")
    return (codes * scale).astype(x.dtype)


def dequantize_table(codes, scales, values, n_in, n_out, transposed=False, dtype="float32"):
    byte = paddle.arange(256)
    table = values.unsqueeze(1) if values.shape[0] == 256 else paddle.stack([values[byte // 16], values[byte % 16]], 1)
    blocks = F.embedding(codes.astype("int32"), table).reshape([scales.shape[0], -1]) * scales.unsqueeze(1)
    weight = blocks.reshape([-1])[: n_in * n_out].reshape([n_out, n_in]).astype(dtype)
    return weight if transposed else weight.t().contiguous()


def _unpack(packed, bits, axis):
    """int32 words, a stream of bits along rows (axis 1) or columns (axis 2) -> int32 codes."""
    if bits == 3:  # a code may lie in two words: its low bits in one, `over` high ones in the next
        words = packed if axis == 1 else packed.t()
        at = np.arange(words.shape[0] * 32 // bits) * bits
        over = np.maximum(at % 32 + bits - 32, 0)
        word, following = (
            words.index_select(paddle.to_tensor(i)) for i in (at // 32, np.minimum(at // 32 + 1, len(words) - 1))
        )
        place, kept, low_mask, high_mask = (
            paddle.to_tensor(a.astype(np.int32)).unsqueeze(-1)
            for a in (at % 32, bits - over, (1 << bits - over) - 1, (1 << over) - 1)
        )
        low = paddle.bitwise_right_shift(word, place) & low_mask
        codes = low | paddle.bitwise_left_shift(following & high_mask, kept)
        return codes if axis == 1 else codes.t()
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
    """Assert the shapes of kernels.attention's arguments and its softcap; for all back ends."""
    Tq, Tk = q.shape[1], k.shape[1]
    assert not causal or Tk >= Tq, f"causal attention of {Tq} queries over {Tk} keys"
    check_attention_with_lse(q, k, rows, causal, softcap)


def check_attention_with_lse(
    q: paddle.Tensor, k: paddle.Tensor, rows: paddle.Tensor | None, causal: bool, softcap: float | None
) -> None:
    """The same for kernels.attention_with_lse, which may have fewer keys than queries."""
    (B, _, H, _), (_, Tk, K, _) = q.shape, k.shape
    assert H % K == 0, f"{H} query heads are not a multiple of {K} key/value heads"
    check_scores(softcap)
    if rows is not None:
        n = rows.shape[-1]
        assert list(rows.shape[:3:2]) == [B, Tk] and rows.shape[1] in (1, K, H), f"rows {rows.shape}, keys {k.shape}"
        assert n in ((1, 2) if causal else (2, 4)), f"{n} columns of rows with causal={causal}"


def check_scores(softcap: float | None, window: int | None = None) -> None:
    """Assert softcap and window: positive or None; 0 does not mean None."""
    assert softcap is None or softcap > 0, f"a softcap of {softcap}"
    assert window is None or window >= 1, f"a window of {window} keys"


class _Mask:
    """Mask and ALiBi bias as an additive float block for queries [i0, i1) and keys [j0, j1)."""

    def __init__(self, rows, causal, alibi_slopes, B, Tq, Tk, H, K, offset=None):
        self.causal, self.offset, self.Tk, self.H, self.K = causal, Tk - Tq if offset is None else offset, Tk, H, K
        self.rows = rows
        self.slopes = alibi_slopes
        per_block = max(1, BLOCK_ELEMENTS // (B * H * Tk))
        size = min(
            Tq, max(64, min(per_block, 512 if rows is None else 128))
        )  # with mask rows, a small block sees few keys
        self.blocks = [(i, min(i + size, Tq)) for i in range(0, Tq, size)]
        # Per key, the first row that no longer sees it: a block of queries starts at its first visible key.
        self.last_row = (
            rows[..., 0].max(axis=[0, 1]).numpy() if causal and rows is not None and rows.shape[-1] == 1 else None
        )

    def keys(self, i0, i1):
        """The range of keys that at least one query of the block sees."""
        # At least one key, for queries before all keys; it is masked.
        j1 = max(1, min(self.Tk, i1 + self.offset)) if self.causal else self.Tk
        if self.last_row is None:
            return 0, j1
        visible = self.last_row[:j1] > i0 + self.offset
        return (int(visible.argmax()), j1) if visible.any() else (0, j1)

    def bias(self, i0, i1, j0, j1):
        """(1 | B, 1 | K, 1 | H/K, i1-i0, j1-j0) float32, added to the scores; None if nothing is masked."""
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
    """row (q, 1), mask rows at (…, 1, keys, n) -> bool (…, q, keys): whether the row must not see the key."""
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
    """Softmax over all keys, one block of queries at a time; saves q, k, v and the output, all linear in T.

    With P = softmax(S) and dP = dO V^T: dS = P * (dP - rowsum(dO * O)), dQ = dS K, dK = dS^T Q, dV = P^T dO. With a
    softcap, dS is multiplied by the slope 1 - tanh^2.
    """

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
        gradients = _gradients(*ctx.saved_tensor(), d_out, ctx.mask, ctx.scale, ctx.softcap)
        return tuple(None if frozen else d for d, frozen in zip(gradients, ctx.frozen))


def _gradients(q, k, v, out, d_out, mask, scale, softcap, lse=None):
    """Gradients of q, k and v. If these are only a part of the keys: out and lse (B, H, Tq) are those of all keys."""
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
        # dO V^T - delta as one product: broadcasting delta over the scores costs more than the product.
        d_s = p * paddle.matmul(paddle.concat([d_block, -delta], axis=-1), v_and_one[..., j0:j1])  # (B, K, G*bq, bk)
        d_s = d_s if slope is None else d_s * slope
        d_q.append(_ungroup(paddle.matmul(d_s, k_block, transpose_y=True), i1 - i0) * scale)
        d_k[..., j0:j1] = d_k[..., j0:j1] + paddle.matmul(q_block, d_s, transpose_x=True) * scale
        d_v[..., j0:j1] = d_v[..., j0:j1] + paddle.matmul(d_block, p, transpose_x=True)
    d_q = d_q[0] if len(d_q) == 1 else paddle.concat(d_q, axis=1)
    return d_q, d_k.transpose([0, 3, 1, 2]), d_v.transpose([0, 3, 1, 2])


def attention_with_lse(q, k, v, startend_row_indices, offset, causal=True, scale=None, alibi_slopes=None, softcap=None):
    mask, scale = _mask_and_scale(q, k, startend_row_indices, offset, causal, scale, alibi_slopes, softcap)
    out, lse, (B, _, H, _) = [], [], q.shape
    k_all, v_all = k.transpose([0, 2, 3, 1]), v.transpose([0, 2, 1, 3])  # (B, K, Dh, Tk), (B, K, Tk, Dh)
    for i0, i1 in mask.blocks:
        j0, j1 = mask.keys(i0, i1)
        s, _, _ = _scores(_group(q[:, i0:i1], mask.K), k_all[..., j0:j1], mask, (i0, i1, j0, j1), scale, softcap)
        largest = s.max(-1, keepdim=True)
        p, seen = paddle.exp(s - largest), (largest > MASKED / 2).astype(s.dtype)  # (B, K, G*bq, bk), (B, K, G*bq, 1)
        total = p.sum(-1, keepdim=True)
        out.append(_ungroup(paddle.matmul(p, v_all[:, :, j0:j1]) / total * seen, i1 - i0))
        lse_block = paddle.where(seen > 0, largest + paddle.log(total), paddle.full_like(largest, -np.inf))
        lse.append(lse_block.reshape([B, H, -1]))
    return paddle.concat(out, axis=1), paddle.concat(lse, axis=-1).astype("float32")


def attention_with_lse_backward(
    q, k, v, out, lse, d_out, startend_row_indices, offset, causal=True, scale=None, alibi_slopes=None, softcap=None
):
    mask, scale = _mask_and_scale(q, k, startend_row_indices, offset, causal, scale, alibi_slopes, softcap)
    lse = paddle.where(paddle.isinf(lse), paddle.zeros_like(lse), lse)  # a query that sees no key: p is 0 by its scores
    return _gradients(q, k, v, out, d_out, mask, scale, softcap, lse)


def _mask_and_scale(q, k, rows, offset, causal, scale, slopes, softcap):
    check_attention_with_lse(q, k, rows, causal, softcap)
    (B, Tq, H, Dh), (_, Tk, K, _) = q.shape, k.shape
    return _Mask(rows, causal, slopes, B, Tq, Tk, H, K, offset), Dh**-0.5 if scale is None else scale


def _group(x, K):
    """(B, bq, H, Dh) -> (B, K, G*bq, Dh): the G = H/K query heads of a key/value head are rows of one product."""
    B, T, _, Dh = x.shape
    return x.reshape([B, T, K, -1, Dh]).transpose([0, 2, 3, 1, 4]).reshape([B, K, -1, Dh])


def _ungroup(x, T):
    """(B, K, G*bq, Dh) -> (B, bq, H, Dh)"""
    B, K, _, Dh = x.shape
    return x.reshape([B, K, -1, T, Dh]).transpose([0, 3, 1, 2, 4]).reshape([B, T, -1, Dh])


def _scores(q, k, mask, block, scale, softcap):
    """q (B, K, G*bq, Dh), k (B, K, Dh, bk) -> scores (B, K, G*bq, bk), mask bias or None, slope of the cap or None."""
    i0, i1, j0, j1 = block
    B, K, rows, _ = q.shape
    s, slope = paddle.matmul(q * scale, k), None
    if softcap is not None:
        t = paddle.tanh(s / softcap)
        s, slope = t * softcap, 1.0 - t * t
    bias = mask.bias(i0, i1, j0, j1)
    if bias is not None:  # tile: Paddle's broadcasting on the CPU is many times slower
        repeats = [B // bias.shape[0], K // bias.shape[1], rows // (i1 - i0) // bias.shape[2], 1, 1]
        s = s + paddle.tile(bias, repeats).reshape(s.shape)
    return s, bias, slope


def _probabilities(q, k, mask, block, scale, softcap):
    """As _scores -> softmax (B, K, G*bq, bk), whether a row sees a key (None: all do), slope of the cap or None."""
    i0, i1 = block[:2]
    B, K, rows, _ = q.shape
    s, bias, slope = _scores(q, k, mask, block, scale, softcap)
    p = F.softmax(s, axis=-1)
    if bias is None or mask.rows is None:
        return p, None, slope
    seen = (bias.max(-1, keepdim=True) > MASKED / 2).astype(q.dtype)  # (1 | B, 1 | K, 1 | G, bq, 1)
    return p, seen.expand([B, K, rows // (i1 - i0), i1 - i0, 1]).reshape([B, K, rows, 1]), slope


def _traced_attention(q, k, v, rows, causal, scale, alibi_slopes, softcap):
    """attention in a static graph: no backward, unknown lengths, all scores [Tq, Tk] at once."""
    assert rows is None or rows.shape[1] == 1, "mask rows per head cannot be traced"
    (Tk, K), Tq, Dh = paddle.shape(k)[1:3], paddle.shape(q)[1], q.shape[3]
    q_rows = (q * (Dh**-0.5 if scale is None else scale)).reshape([0, 0, K, -1, Dh]).transpose([0, 2, 3, 1, 4])
    k_all, v_all = k.transpose([0, 2, 3, 1]).unsqueeze(2), v.transpose([0, 2, 1, 3]).unsqueeze(2)  # (B, K, 1, …)
    row = paddle.arange(Tk - Tq, Tk, dtype="int32").unsqueeze(-1)  # (Tq, 1)
    key = paddle.arange(0, Tk, dtype="int32")  # (Tk,)
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
    out = paddle.matmul(F.softmax(s + bias, axis=-1), v_all) * seen  # (B, K, H/K, Tq, Dh)
    return out.transpose([0, 3, 1, 2, 4]).reshape([0, 0, -1, Dh])


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
    """kernels.linear_cross_entropy by a PyLayer that gets only the labelled rows.

    layer.apply(hidden (M, D), weight, labels (M,), options) -> losses (M,)
    """
    check_scores(softcap)
    labelled = paddle.nonzero(labels != ignore_index).flatten()  # (M,)
    losses = paddle.zeros([labels.shape[0]], "float32")
    predictions = paddle.full([labels.shape[0]], -1, "int64")
    options = types.SimpleNamespace(
        transpose_weight=transpose_weight,
        vocabulary=vocabulary,
        softcap=softcap,
        start=0 if vocabulary is None else vocabulary.start,
        predictions=[] if return_predictions else None,  # the layer appends those of each chunk
        grad=paddle.is_grad_enabled(),  # always off inside a PyLayer
    )
    if labelled.shape[0] > 0:
        row_losses = layer.apply(paddle.gather(hidden, labelled), weight, paddle.gather(labels, labelled), options)
        losses = paddle.scatter(losses, labelled, row_losses)
        if return_predictions:
            predictions = paddle.scatter(predictions, labelled, paddle.concat(options.predictions))
    else:
        # Keep the graph, with zero gradients of both inputs: other ranks wait for this rank's gradients.
        losses = losses + hidden.astype("float32").sum(-1) * 0.0
        if not weight.stop_gradient:
            losses = losses + weight.astype("float32").sum() * 0.0
    return (losses, predictions) if return_predictions else losses


class _LinearCrossEntropy(PyLayer):
    """loss = lse - (h W)[label], lse = logsumexp(h W); d(h W) = (exp(h W - lse) - onehot(label)) * d loss.

    Logits are computed in chunks of tokens. Trained W: four products, because backward recomputes the logits. Frozen W:
    two, because forward also computes the rows (p - onehot) W^T, which backward multiplies by d loss. With a softcap,
    logits l are softcap * tanh(h W / softcap), and d(h W) has the factor 1 - (l / softcap)^2.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, options):
        transposed = options.transpose_weight
        options.frozen = [hidden.stop_gradient, weight.stop_gradient]
        d_hidden_in_forward = options.grad and options.frozen == [False, True]
        losses, all_lse, rows = [], [], []
        for chunk in _chunks(labels.shape[0], weight.shape[0 if transposed else 1], options):
            logits = _logits(hidden[chunk], weight, options)
            loss, lse, best = _losses(logits, labels[chunk], options)
            losses.append(loss)
            all_lse.append(lse)
            if options.predictions is not None:
                options.predictions.append(best)
            if d_hidden_in_forward:
                p = _softmax_less_onehot(logits, labels[chunk], lse, options).astype(hidden.dtype)
                rows.append(paddle.matmul(p, weight.astype(hidden.dtype), transpose_y=not transposed))
        ctx.options, ctx.d_hidden_in_forward = options, d_hidden_in_forward
        if d_hidden_in_forward:
            ctx.save_for_backward(paddle.concat(rows))
        else:
            ctx.save_for_backward(hidden, weight, labels, paddle.concat(all_lse))
        return paddle.concat(losses)

    @staticmethod
    def backward(ctx, d_losses):
        options, transposed = ctx.options, ctx.options.transpose_weight
        if ctx.d_hidden_in_forward:
            (rows,) = ctx.saved_tensor()
            return rows * d_losses.unsqueeze(-1).astype(rows.dtype), None, None
        hidden, weight, labels, lse = ctx.saved_tensor()
        frozen = options.frozen[1]
        d_hidden, d_weight = [], None if frozen else paddle.zeros(weight.shape, "float32")
        for chunk in _chunks(labels.shape[0], weight.shape[0 if transposed else 1], options):
            d_loss = d_losses[chunk].unsqueeze(-1).astype(hidden.dtype)  # (c, 1), multiplied into (c, D), not (c, V)
            p = _softmax_less_onehot(_logits(hidden[chunk], weight, options), labels[chunk], lse[chunk], options)
            p = p.astype(hidden.dtype)
            d_hidden.append(paddle.matmul(p, weight.astype(hidden.dtype), transpose_y=not transposed) * d_loss)
            if not frozen:
                scaled = hidden[chunk] * d_loss
                pair = (p, scaled) if transposed else (scaled, p)
                d_weight.add_(paddle.matmul(*pair, transpose_x=True).astype("float32"))
        d_hidden = None if options.frozen[0] else paddle.concat(d_hidden)
        return d_hidden, None if frozen else d_weight.astype(weight.dtype), None


def _losses(logits, labels, options):
    """losses, logsumexp and, if options.predictions, argmax ids, each (c,).

    Not F.cross_entropy: on the CPU (Paddle 3.3.1) it caps losses at 64, and turns a NaN logit into a finite loss.
    """
    at, is_local = _local_columns(labels, logits, options)
    target = paddle.take_along_axis(logits, at, 1).flatten() * is_local
    best = None if options.predictions is None else logits.argmax(-1) + options.start
    if options.vocabulary is None:
        lse = paddle.logsumexp(logits, -1)
    else:
        largest = logits.max(-1)
        lse, target, best = reduce_lse(
            largest, paddle.exp(logits - largest.unsqueeze(-1)).sum(-1), target, best, options
        )
    return lse - target, lse, best


def _local_columns(labels, logits, options):
    """Columns of the labels in these logits (c, 1), 0 if another rank has the label; 1.0 or 0.0 (c,): is it here."""
    at = labels - options.start
    is_local = (at >= 0) & (at < logits.shape[1])
    return paddle.where(is_local, at, paddle.zeros_like(at)).unsqueeze(-1), is_local.astype("float32")


def _softmax_less_onehot(logits, labels, lse, options):
    p = paddle.exp(logits - lse.unsqueeze(-1))
    at, is_local = _local_columns(labels, logits, options)
    p.put_along_axis_(at, -is_local.unsqueeze(-1), 1, reduce="add")
    return p if options.softcap is None else p * (1.0 - paddle.square(logits / options.softcap))


def reduce_lse(
    largest: paddle.Tensor, total: paddle.Tensor, target: paddle.Tensor, best: paddle.Tensor, options: object
) -> tuple:
    """Reduce over the ranks of options.vocabulary -> (logsumexp, label's logit, argmax id, the lowest of equals), (c,).

    Per rank, each (c,): largest logit, total = sum of exp(logit - largest), target = the label's logit or 0 if another
    rank has it, best = argmax id.
    """
    all_reduce = options.vocabulary.all_reduce
    global_max = all_reduce(largest.clone(), "max")
    sums = all_reduce(paddle.stack([total * paddle.exp(largest - global_max), target]), "sum")
    if options.predictions is None:
        best = None
    else:
        best = -all_reduce(paddle.where(largest == global_max, -best, paddle.full_like(best, -(1 << 62))), "max")
    return global_max + paddle.log(sums[0]), sums[1], best


def _chunks(tokens, width, options):
    """Slices of tokens, of at most LOGITS logits. Ranks that shard the vocabulary unevenly all make the same ones."""
    size = max(16, LOGITS // (width if options.vocabulary is None else options.vocabulary.widest))
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
    if q.dtype != paddle.float32:  # the dtype of masks and scores
        return paged_attention(
            _to_float32(q),
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
    parts, order = [], []  # outputs, and their rows of q
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
    """FlashMask rows (1, 1, context, 1) for causal attention in which a query at p sees keys > p - window, or None."""
    return None if window is None else (paddle.arange(context, dtype="int32") + window).reshape([1, 1, -1, 1])


def check_paged(
    q_shape: list, cache_shape: list, tables: np.ndarray, queries: np.ndarray, contexts: np.ndarray
) -> None:
    """Assert that the arguments of paged_attention fit together."""
    (N, H, _), (_, block_size, K, _) = q_shape, cache_shape
    assert H % K == 0, f"{H} query heads are not a multiple of {K} key/value heads"
    assert queries.sum() == N and (queries >= 1).all(), f"{N} queries, query_lengths {queries}"
    assert (contexts >= queries).all(), f"context_lengths {contexts} must count the queries {queries} too"
    assert tables.shape[1] * block_size >= contexts.max(), f"{tables.shape[1]} blocks of {block_size} for {contexts}"


def _gathered(cache, scales, rows):
    """Rows of a cache (…, Dh) in float32."""
    values = _to_float32(paddle.gather(cache, rows))
    return values if scales is None else values * paddle.gather(scales, rows).unsqueeze(-1)


def _to_float32(x):
    return x if x.dtype == paddle.float32 else x.astype("float32")


def _paged_decode(q, caches, tables, contexts, scale, alibi_slopes, window, softcap):
    """One query per sequence, as one product padded to the longest context: q (S, H, Dh) -> (S, H, Dh)."""
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


@functools.lru_cache(maxsize=2)  # a model may alternate layers with and without a window
def _decode_plan(tables, contexts, block_size, K, G, window):
    """(rows of the pool (slots * K, Dh), ordered (S, K, keys); score bias (S, K, G, keys) or None; key distances).

    Distances from key to query are (S, 1, 1, keys). Rows are of one head each, because a transposed copy of the keys
    costs far more. All layers of a step share the plan: tables (S, blocks) int32 and contexts (S,) int64 are bytes, so
    that lru_cache can compare them.
    """
    contexts = np.frombuffer(contexts, np.int64)
    tables = np.frombuffer(tables, np.int32).reshape(len(contexts), -1)
    keys = np.arange(contexts.max())
    hidden = keys >= contexts[:, None]  # (S, keys)
    blocks = np.where(hidden, tables[:, :1], tables[:, keys // block_size])  # after the end: any block of the sequence
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
            largest = x.abs().max(-1)  # (N, K)
            _put(scales, slots, largest / 127.0)
            x = paddle.round(x * (127.0 / paddle.clip(largest, min=1e-30)).unsqueeze(-1)).astype("int8")
        _put(cache, slots, x.astype(cache.dtype))


def _put(cache, slots, x):
    """cache (blocks, block_size, …), x (N, …): row slots[i] of the cache = x[i], in place, without copying the pool."""
    rows = cache.reshape([-1, *cache.shape[2:]])
    assert rows.data_ptr() == cache.data_ptr(), "reshape made a copy"
    if x.dtype in (paddle.int8, paddle.bfloat16):
        paddle.index_put_(rows, (slots,), x)  # scatter_ has neither on the CPU
    else:
        paddle.scatter_(rows, slots, x)


# ------------------------------------------------------------------------------------------------- sample


def sample(logits, temperature, top_k, top_p, uniform, said=None, penalties=None):
    rows = logits.astype("float32").numpy().copy()
    for row, of_row, amounts in zip(rows, said or (), penalties or ()):
        penalize_said(row, of_row, *amounts)
    sampled, finite = rows.argmax(-1), np.isfinite(rows.max(-1, initial=-np.inf))
    sampled[~finite] = -1
    for s in np.flatnonzero(finite & (np.asarray(temperature) > 0)):
        row, ids = rows[s : s + 1], None
        if 0 < top_k[s] < row.shape[1]:  # only the top_k candidates, in the order of their ids
            ids = np.flatnonzero(row[0] >= np.partition(row[0], -top_k[s])[-top_k[s]])
            row = row[:, ids]
        (at,) = sample_logits(row, temperature[s], 0, top_p[s], _DrawnUniform(uniform[s]))
        sampled[s] = at if ids is None else ids[at]
    return to_tensor(sampled.astype(np.int64))


def penalize_said(row: np.ndarray, said: np.ndarray, repetition: float, presence: float, frequency: float) -> None:
    """Penalties on one row of logits (V,), in place, see kernels.sample."""
    ids, counts = said.T
    x, repetition = row[ids], np.float32(repetition)
    lowered = (presence * (counts > 0) + frequency * counts).astype(np.float32)
    row[ids] = np.where(x > 0, x / repetition, x * repetition) - lowered


class _DrawnUniform:
    """numpy's Generator.choice with a uniform number that is already drawn."""

    def __init__(self, uniform):
        self.uniform = uniform

    def choice(self, n, p):
        cumulated = p.cumsum()
        return (cumulated / cumulated[-1]).searchsorted(self.uniform, side="right")


def log_probabilities(logits, ids, temperature, count):
    found = []
    for row, token, T in zip(logits.astype("float32").numpy(), ids, temperature):  # a row stays in the cache
        x = (row.astype(np.float64) - row.max()) / T
        p = np.exp(x)
        x -= np.log(p.sum())
        best = np.argsort(-row, kind="stable")[:count] if count else np.zeros(0, np.int64)
        likely = p > 0
        found.append((x[token], -(p[likely] * x[likely]).sum() / p.sum(), best, x[best]))
    return tuple(np.array(column) for column in zip(*found))


def penalize(logits: np.ndarray, ids: np.ndarray, mask: np.ndarray, penalty: float) -> np.ndarray:
    """Repetition penalty (Keskar et al., arXiv 1909.05858) for ids (B, T) where mask (B, T) is 1.

    logits (B, V): positive logits of these ids are divided by the penalty, negative ones multiplied.
    """
    logits = logits.copy()
    for row, (seen, keep) in enumerate(zip(ids, mask)):
        seen = np.unique(seen[keep == 1])
        logits[row, seen] = np.where(logits[row, seen] > 0, logits[row, seen] / penalty, logits[row, seen] * penalty)
    return logits


def sample_logits(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, generator: np.random.Generator
) -> np.ndarray:
    """logits (B, V) -> ids (B,): temperature, then the top_k largest, then the smallest set with probability top_p."""
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
        sorted_p[sorted_p.cumsum(-1) - sorted_p >= top_p] = 0.0  # keeps the token that crosses top_p
        np.put_along_axis(p, order, sorted_p, -1)
        p /= p.sum(-1, keepdims=True)
    return np.array([generator.choice(p.shape[-1], p=row) for row in p], np.int64)
