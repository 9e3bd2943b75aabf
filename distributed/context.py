"""Context parallelism: the tokens of a row sharded over sep, with attention by all-to-all (Ulysses) or around a ring.

All but attention works on a token by itself. For attention each rank either gets all tokens of some heads
(sep_parallel_degree; DeepSpeed-Ulysses, arXiv 2309.14509), or keys and values go around (context_parallel_degree;
ring attention, arXiv 2310.01889). What depends on a whole row (positions, masks, noise) is made of the whole row on
every rank, then sliced.
"""

import dataclasses
import functools
import math
import types

import kernels

import numpy as np
import paddle
from paddle.autograd import PyLayer

from distributed.collectives import Axis, _AllGather, pad_to_multiple
from distributed.tensor import local_heads
from families import ModelConfig
from model import ForwardContext, kernel_attention

# ============================================================================================= which tokens a rank has


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Which tokens of rows of global_seq_len tokens a rank has."""

    global_seq_len: int  # T
    token_indices: np.ndarray | None = None  # (T/sep,) int64, from T on padding; None: all tokens
    restore_order: paddle.Tensor | None = None  # (T,) where each token of the row is among those of all ranks

    @property
    def local_seq_len(self) -> int:
        return self.global_seq_len if self.token_indices is None else len(self.token_indices)

    @property
    def is_real(self) -> np.ndarray:
        """(T/sep,) bool: no padding; (1,) where all tokens are here."""
        return np.ones(1, bool) if self.token_indices is None else self.token_indices < self.global_seq_len


def token_layout(T: int, sep: Axis, ring: bool) -> TokenLayout:
    """The layout of rows of T tokens.

    An even run; in a ring the chunks r and 2·sep - 1 - r of 2·sep, an early one, which sees few keys, and a late one,
    which sees many: with causal attention all ranks have as much to do.
    """
    if sep.size == 1:
        return TokenLayout(T)
    all_ranks = np.concatenate([zigzag_indices(T, sep.size, rank, ring) for rank in range(sep.size)])
    restore_order = paddle.to_tensor(np.argsort(all_ranks)[:T])
    return TokenLayout(T, zigzag_indices(T, sep.size, sep.rank, ring), restore_order)


@functools.lru_cache(maxsize=1024)
def zigzag_indices(T: int, size: int, rank: int, ring: bool) -> np.ndarray:
    """(n,) int64 indices of a rank's tokens, n the same on every rank; indices from T on are padding."""
    if not ring:
        n = -(-T // size)
        return np.arange(rank * n, (rank + 1) * n)
    n = -(-T // (2 * size))
    return np.concatenate([np.arange(chunk * n, (chunk + 1) * n) for chunk in (rank, 2 * size - 1 - rank)])


def scatter_tokens(x: paddle.Tensor, layout: TokenLayout | None, fill: int = 0) -> paddle.Tensor:
    """(B, T, …) -> (B, T/sep, …), this rank's tokens; `fill` for padding."""
    if layout is None or layout.token_indices is None:
        return x
    T = layout.global_seq_len
    indices = paddle.to_tensor(np.where(layout.token_indices < T, layout.token_indices, T))
    return paddle.index_select(paddle.concat([x, paddle.full_like(x[:, :1], fill)], axis=1), indices, axis=1)


def gather_tokens(
    x: paddle.Tensor, layout: TokenLayout | None, sep: Axis, sum_gradients: bool = False
) -> paddle.Tensor:
    """(B, T/sep, …) -> (B, T, …) in order. sum_gradients: ranks use different parts of it."""
    if layout is None or layout.token_indices is None:
        return x
    x = sep.all_gather(x, 1) if x.stop_gradient else _AllGather.apply(x, sep, 1, sum_gradients)
    return paddle.index_select(x, layout.restore_order, axis=1)


def shard_context(context: ForwardContext, sep: Axis, ring: bool) -> ForwardContext:
    """Rotary tables of this rank's tokens; in a ring its masks too. Ulysses needs the complete mask rows."""
    layout = context.layout
    if layout is None or layout.token_indices is None:
        return context
    names = ("cos", "sin", "q_scale")
    tables = {name: scatter_tokens(x, layout) for name in names if (x := getattr(context, name)) is not None}
    if not ring:
        return dataclasses.replace(context, **tables)
    all_rows = {id(rows): rows for rows in (context.mask_rows, *context.window_mask_rows.values())}
    masks = {key: RingMask(rows, context.prefix_tokens, layout, sep) for key, rows in all_rows.items()}
    windows = {window: masks[id(rows)] for window, rows in context.window_mask_rows.items()}
    return dataclasses.replace(context, mask_rows=masks[id(context.mask_rows)], window_mask_rows=windows, **tables)


# ===================================================================================================== Ulysses


def ulysses_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    past_k: paddle.Tensor | None,
    past_v: paddle.Tensor | None,
    mask_rows: paddle.Tensor | None,
    layout: TokenLayout,
    sep: Axis,
    *,
    alibi_slopes: paddle.Tensor | None,
    **options,
) -> paddle.Tensor:
    """kernel_attention() of whole rows for some heads: all-to-all from (B, T/sep, H/tp, Dh) to (B, T, H/(tp·sep),
    Dh), and back."""
    # If sep does not divide the key heads, each is repeated; gradients of the copies are added up.
    copies = sep.size // math.gcd(k.shape[2], sep.size)
    k, v, past_k, past_v = (x if x is None or copies == 1 else _repeat_heads(x, copies) for x in (k, v, past_k, past_v))
    sent = paddle.concat([_by_rank(x, sep) for x in (q, k, v)], axis=3)  # (sep, B, T/sep, (H + 2 K)/(tp·sep), Dh)
    received = _AllToAll.apply(sent, sep).transpose([1, 0, 2, 3, 4]).flatten(1, 2)[:, : layout.global_seq_len]
    q, k, v = received.split([q.shape[2] // sep.size, *[k.shape[2] // sep.size] * 2], axis=2)
    past_k, past_v = (None if x is None else sep.local_chunk(x, 2) for x in (past_k, past_v))
    alibi_slopes = None if alibi_slopes is None else sep.local_chunk(alibi_slopes)
    out = kernel_attention(q, k, v, past_k, past_v, mask_rows, alibi_slopes=alibi_slopes, **options)
    out = pad_to_multiple(out, sep.size)
    B, T, H, Dh = out.shape
    out = _AllToAll.apply(out.reshape([B, sep.size, T // sep.size, H, Dh]).transpose([1, 0, 2, 3, 4]), sep)
    return out.transpose([1, 2, 0, 3, 4]).flatten(2, 3)  # (B, T/sep, H/tp, Dh)


def _by_rank(x, sep):
    """(B, T/sep, heads, Dh) -> (sep, B, T/sep, heads/sep, Dh)"""
    B, T, _, Dh = x.shape
    return x.reshape([B, T, sep.size, -1, Dh]).transpose([2, 0, 1, 3, 4])


def _repeat_heads(x, copies):
    """(B, T, K, Dh) -> (B, T, K · copies, Dh), copies of a head beside each other."""
    B, T, K, Dh = x.shape
    return x.unsqueeze(3).expand([B, T, K, copies, Dh]).reshape([B, T, -1, Dh])


class _AllToAll(PyLayer):
    """Axis.all_to_all; gradients go back the same way."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return axis.all_to_all(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.axis.all_to_all(dy)


# ======================================================================================================== ring


class RingMask:
    """FlashMask rows for a ring: what this rank's two chunks of queries see of any chunk of keys or of the prefix."""

    def __init__(self, mask_rows, prefix_tokens: int, layout: TokenLayout, sep: Axis):
        """mask_rows (B, 1, P + T, n) or None, of the keys of a prefix of P tokens and of T."""
        self.P, self.C = prefix_tokens, layout.local_seq_len // 2
        self.causal = mask_rows is None or mask_rows.shape[-1] == 1
        self.local_chunks = sep.rank, 2 * sep.size - 1 - sep.rank
        self.rows, self.pairs = None, {}
        if mask_rows is not None:  # padding at the end of the last chunks is hidden from all
            padding = 2 * sep.size * self.C - layout.global_seq_len
            self.rows = np.pad(mask_rows.numpy().astype(np.int64), [(0, 0), (0, 0), (0, padding), (0, 0)])

    def pair(self, queries: int, keys: int | None) -> tuple | None:
        """(rows, offset) for kernels.attention_with_lse of two chunks (keys None: the prefix); None: nothing seen."""
        if (queries, keys) not in self.pairs:
            self.pairs[queries, keys] = self._pair(queries, keys)
        return self.pairs[queries, keys]

    def _pair(self, queries, keys):
        first = 0 if keys is None else self.P + keys * self.C  # rows are counted from the first of these keys
        n, offset = self.P if keys is None else self.C, self.P + queries * self.C - first
        if self.causal and offset + self.C <= 0:
            return None
        if self.rows is None:
            return None, offset
        rows = self.rows[:, :, first : first + n] - first
        stop = np.minimum(rows[..., 0], offset + self.C)
        start = np.full_like(stop, offset) if self.causal else np.maximum(rows[..., 1], offset)
        if not (start < stop).any():
            return None
        limits = np.iinfo(np.int32)
        return paddle.to_tensor(rows.clip(limits.min, limits.max).astype(np.int32)), offset


def ring_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    past_k: paddle.Tensor | None,
    past_v: paddle.Tensor | None,
    mask: RingMask,
    sep: Axis,
    **options,
) -> paddle.Tensor:
    """Attention of this rank's two chunks of tokens (B, T/sep, H/tp, Dh), while keys and values go around the ring."""
    ring = types.SimpleNamespace(mask=mask, sep=sep, options={"causal": mask.causal, **options})
    return _RingAttention.apply(q, k, v, past_k, past_v, ring)


class _RingAttention(PyLayer):
    """Attention of this rank's queries with each rank's keys in turn; results are merged by their log-sum-exp.

    Saved: q, k, v, the result and its lse, all of this rank's tokens. Backward circulates k, v and their accumulating
    dk, dv; after a full round the gradients are back at their owner.
    """

    @staticmethod
    def forward(ctx, q, k, v, past_k, past_v, ring):
        mask, sums = ring.mask, [OnlineSoftmax(q[:, i]) for i in zigzag_halves(q)]
        for part, queries in zip(sums, mask.local_chunks):
            if past_k is not None and (seen := mask.pair(queries, None)) is not None:
                part.add(*kernels.attention_with_lse(part.q, past_k, past_v, *seen, **ring.options))
        states = paddle.stack([k, v])  # (2, B, T/sep, K, Dh)
        for is_last, owner in ring_steps(ring.sep):
            for keys, part, seen in _visible_pairs(ring, owner, sums):
                k_part, v_part = states[:, :, keys]
                part.add(*kernels.attention_with_lse(part.q, k_part, v_part, *seen, **ring.options))
            if not is_last:
                states = ring.sep.ring_shift(states)
        out, lse = (
            paddle.concat([getattr(part, name) for part in sums], axis=dim) for name, dim in (("out", 1), ("lse", 2))
        )
        ctx.ring, ctx.given = ring, [t is not None for t in (q, k, v, past_k, past_v)]
        ctx.frozen = [t is None or t.stop_gradient for t in (q, k, v, past_k, past_v)]
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        ring, (q, k, v, past_k, past_v, out, lse) = ctx.ring, ctx.saved_tensor()
        parts = [
            types.SimpleNamespace(
                q=q[:, i], saved=(out[:, i], lse[:, :, i], d_out[:, i]), d_q=paddle.zeros_like(q[:, i])
            )
            for i in zigzag_halves(q)
        ]
        d_past = [None, None]

        def d_states_of(part, k, v, seen):
            d_q, *d_states = kernels.attention_with_lse_backward(part.q, k, v, *part.saved, *seen, **ring.options)
            part.d_q = part.d_q + d_q
            return d_states

        if past_k is not None:
            d_past = [paddle.zeros_like(past_k), paddle.zeros_like(past_v)]
            for part, queries in zip(parts, ring.mask.local_chunks):
                if (seen := ring.mask.pair(queries, None)) is not None:
                    d_past = [old + new for old, new in zip(d_past, d_states_of(part, past_k, past_v, seen))]
        states = paddle.stack([k, v])
        d_states = paddle.zeros_like(states)
        for is_last, owner in ring_steps(ring.sep):
            for keys, part, seen in _visible_pairs(ring, owner, parts):
                k_part, v_part = states[:, :, keys]
                d_states[:, :, keys] = d_states[:, :, keys] + paddle.stack(d_states_of(part, k_part, v_part, seen))
            if is_last:
                d_states = ring.sep.ring_shift(d_states)
            else:
                states, d_states = ring.sep.ring_shift(paddle.stack([states, d_states]))
        gradients = paddle.concat([part.d_q for part in parts], axis=1), *d_states, *d_past
        return tuple(None if frozen else d for d, frozen, given in zip(gradients, ctx.frozen, ctx.given) if given)


def zigzag_halves(x: paddle.Tensor) -> tuple[slice, slice]:
    """The slices of tokens that are a rank's two chunks."""
    C = x.shape[1] // 2
    return slice(0, C), slice(C, 2 * C)


def ring_steps(sep: Axis) -> list[tuple[bool, int]]:
    """[(whether it is the last step, the rank whose keys are here)]"""
    return [(step == sep.size - 1, (sep.rank - step) % sep.size) for step in range(sep.size)]


def _visible_pairs(ring, owner, parts):
    """(slice of the keys, part of the queries, their mask) of the pairs of chunks of which anything is seen."""
    size, C = ring.sep.size, ring.mask.C
    for i, keys in enumerate((owner, 2 * size - 1 - owner)):
        for part, queries in zip(parts, ring.mask.local_chunks):
            if (seen := ring.mask.pair(queries, keys)) is not None:
                yield slice(i * C, (i + 1) * C), part, seen


class OnlineSoftmax:
    """Attention of queries q (B, C, H, Dh) over one set of keys after another: out (B, C, H, Dh), lse (B, H, C)."""

    def __init__(self, q: paddle.Tensor):
        B, C, H, _ = q.shape
        self.q, self.out, self.lse = q, paddle.zeros_like(q), paddle.full([B, H, C], -math.inf, "float32")

    def add(self, out: paddle.Tensor, lse: paddle.Tensor) -> None:
        largest = paddle.maximum(self.lse, lse)
        largest = paddle.where(paddle.isinf(largest), paddle.zeros_like(largest), largest)  # nothing seen yet: no nan
        old, new = paddle.exp(self.lse - largest), paddle.exp(lse - largest)
        total = old + new
        self.lse = largest + paddle.log(total)
        total = total.clip(min=1e-30)
        old, new = ((x / total).transpose([0, 2, 1]).unsqueeze(-1).astype(out.dtype) for x in (old, new))
        self.out = self.out * old + out * new


# ======================================================================================================== what fits


def check_context(config: ModelConfig, degrees: object, T: int | None = None) -> list[str]:
    """Why the tokens of this model cannot be sharded so, a line each; T: the longest row, where it is known."""
    sep, tp, wrong = degrees.sep, degrees.tp, []
    if sep == 1:
        return []
    key = f"{'context' if degrees.context else 'sep'}_parallel_degree {sep}"
    if not degrees.context:
        heads = sorted({stop - first for (first, stop), _ in (local_heads(config, tp, rank) for rank in range(tp))})
        if any(n % sep for n in heads):
            of = f", which tensor_parallel_degree {tp} leaves a rank of {config.num_attention_heads}" if tp > 1 else ""
            counts, advice = " or ".join(map(str, heads)), "context_parallel_degree takes any number"
            wrong.append(f"{key} does not divide attention heads ({counts}{of}): {advice}")
    parts, factors = (2 * sep, f" x 2 = {2 * sep}") if degrees.context else (sep, "")  # see token_layout()
    if T is not None and T < parts:
        wrong.append(f"{key}{factors} is more than tokens of a sequence ({T})")
    return wrong
