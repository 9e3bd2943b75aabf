"""Context parallelism: tokens sharded over sep, by Ulysses or by a ring."""

import functools
import math
import types

import kernels

import numpy as np
import paddle
from paddle.autograd import PyLayer

from distributed.collectives import _AllGather, _filled, mix_in
from distributed.tensor import local_heads
from formats.files import UserError
from model import Attention

# ====================================================================================== context parallelism
#
# Ranks of sep share the tokens of a batch. All but attention works on a token alone; for attention, either each rank gets all
# tokens of some heads (sep_parallel_degree; Ulysses, arXiv 2309.14509), or keys and values go round (context_parallel_degree;
# ring attention, arXiv 2310.01889). What looks at a row as a whole (positions, masks, noise) is made of the whole row on every
# rank, then cut.


def spread(sep, T, ring):
    """Say which of T tokens this rank has; T None: all of them, on every rank.

    An even run; in a ring its chunks r and 2·sep - 1 - r of 2·sep, an early one, which sees few keys, and a late one, which
    sees many: with causal attention all ranks have as much to do.
    """
    sep.whole = T
    sep.places = None if T is None or sep.size == 1 else zigzag_indices(T, sep.size, sep.rank, ring)
    if sep.places is not None:
        ends = np.argsort(np.concatenate([zigzag_indices(T, sep.size, rank, ring) for rank in range(sep.size)]))
        sep.back = paddle.to_tensor(ends[:T])  # where each token of the row stands among those of all ranks


@functools.lru_cache(maxsize=1024)
def zigzag_indices(T, size, rank, ring):
    """(n,) int64, n the same on every rank: places from T on are no tokens."""
    if not ring:
        n = -(-T // size)
        return np.arange(rank * n, (rank + 1) * n)
    n = -(-T // (2 * size))
    return np.concatenate([np.arange(chunk * n, (chunk + 1) * n) for chunk in (rank, 2 * size - 1 - rank)])


def scatter_tokens(x, sep):
    """(B, whole T, …) -> (B, T/sep, …), the tokens that this rank of sep has; 0 for those that fill rows up."""
    if sep.places is None:
        return x
    places = paddle.to_tensor(np.where(sep.places < sep.whole, sep.places, sep.whole))
    return paddle.index_select(paddle.concat([x, paddle.zeros_like(x[:, :1])], axis=1), places, axis=1)


def gather_tokens(x, sep, summed=False):
    """(B, T/sep, …) -> (B, whole T, …) in order. summed: its gradient is the sum over the ranks, else the same on each."""
    if sep.places is None:
        return x
    x = sep.all_gather(x, 1) if x.stop_gradient else _AllGather.apply(x, sep, 1, summed)
    return paddle.index_select(x, sep.back, axis=1)


class ContextParallelCausalLM:
    """A CausalLM whose tokens are shared by the ranks of sep: trunk() gives (B, T/sep, D), losses() those of all tokens."""

    def prepare(self, input_ids, position_ids=None, rows=None, caches=None):
        x, shared = super().prepare(input_ids, position_ids, rows, caches)
        sep, degrees = self.topology.sep, self.topology.degrees
        if sep.places is None or not degrees.context:
            return x, shared
        if shared.spread is not None:
            raise UserError(_RING_WITH_PREFIX)
        before = 0 if caches is None else caches.prefix_tokens
        chunks = {id(rows): RingMask(rows, before, sep) for rows in (shared.rows, *shared.narrowed.values())}
        narrowed = {window: chunks[id(rows)] for window, rows in shared.narrowed.items()}
        return x, shared._replace(rows=chunks[id(shared.rows)], narrowed=narrowed)

    def look_up(self, input_ids):
        return super().look_up(scatter_tokens(input_ids, self.topology.sep))

    def _turns(self, position_ids, before, cache):
        found = super()._turns(position_ids, before, cache)
        return tuple(None if x is None else scatter_tokens(x, self.topology.sep) for x in found)

    def losses(self, x, probabilities, labels, return_predictions=False, additions=True):
        sep = self.topology.sep
        labels = scatter_tokens(labels + 100, sep) - 100  # what fills rows up is -100 too
        found = super().losses(x, probabilities, labels, return_predictions, additions)
        return tuple(gather_tokens(f, sep) for f in found) if return_predictions else gather_tokens(found, sep)

    def logits(self, x):
        return gather_tokens(super().logits(x), self.topology.sep)

    def of_all(self, x, shape):
        # Every rank computes the same of it, but only its own tokens' losses have a gradient there.
        return gather_tokens(x.reshape([*shape, *x.shape[1:]]), self.topology.sep, summed=True).flatten(0, 1)


_RING_WITH_PREFIX = (
    "context_parallel_degree with prefix_tuning: attention of this model depends on distances (ALiBi or a window), "
    "so that each sample of a row needs the prefix for itself; use sep_parallel_degree"
)


class UlyssesAttention:
    """Attention where each rank of sep has some tokens: it trades them for all tokens of some heads, and back."""

    def mixed(self, q, k, v, slopes, rows, past_k, past_v, spread):
        sep = self.sep
        if sep.places is None:
            return super().mixed(q, k, v, slopes, rows, past_k, past_v, spread)
        # With fewer key heads than ranks, or not a multiple, each is there several times; gradients of copies are added up.
        copies = sep.size // math.gcd(k.shape[2], sep.size)
        k, v, past_k, past_v = (
            x if x is None or copies == 1 else _repeat_heads(x, copies) for x in (k, v, past_k, past_v)
        )
        sent = paddle.concat([self._by_rank(x) for x in (q, k, v)], axis=3)  # (sep, B, T/sep, (H + 2 K)/(tp·sep), Dh)
        came = _AllToAll.apply(sent, sep).transpose([1, 0, 2, 3, 4]).flatten(1, 2)[:, : sep.whole]  # (B, T, …)
        q, k, v = came.split([q.shape[2] // sep.size, *[k.shape[2] // sep.size] * 2], axis=2)
        past_k, past_v = (None if x is None else sep.local_chunk(x, 2) for x in (past_k, past_v))
        slopes = None if slopes is None else sep.local_chunk(slopes)
        found, _, _ = super().mixed(q, k, v, slopes, rows, past_k, past_v, spread)
        found = _filled(found, sep.size)
        B, T, H, Dh = found.shape
        back = _AllToAll.apply(found.reshape([B, sep.size, T // sep.size, H, Dh]).transpose([1, 0, 2, 3, 4]), sep)
        return back.transpose([1, 2, 0, 3, 4]).flatten(2, 3), None, None  # (B, T/sep, H/tp, Dh)

    def _by_rank(self, x):
        """(B, T/sep, heads, Dh) -> (sep, B, T/sep, heads/sep, Dh)"""
        B, T, _, Dh = x.shape
        return x.reshape([B, T, self.sep.size, -1, Dh]).transpose([2, 0, 1, 3, 4])


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


class RingMask:
    """FlashMask rows of a ring: what each of this rank's two chunks of queries sees of any chunk of keys, or of the prefix."""

    def __init__(self, rows, before, sep):
        """rows (B, 1, before + T, n) or None, of keys behind a prefix of `before`."""
        self.sep, self.before, self.C = sep, before, len(sep.places) // 2
        self.causal = rows is None or rows.shape[-1] == 1
        self.mine = sep.rank, 2 * sep.size - 1 - sep.rank
        self.rows, self.found = None, {}
        if rows is not None:  # keys that only fill the last chunks up are hidden from all
            more = 2 * sep.size * self.C - sep.whole
            self.rows = np.pad(rows.numpy().astype(np.int64), [(0, 0), (0, 0), (0, more), (0, 0)])

    def pair(self, queries, keys):
        """(rows, offset) for kernels.attention_with_lse, of chunks by number, keys None: the prefix; None if nothing is seen."""
        if (queries, keys) not in self.found:
            self.found[queries, keys] = self._pair(queries, keys)
        return self.found[queries, keys]

    def _pair(self, queries, keys):
        first = 0 if keys is None else self.before + keys * self.C  # rows are counted from the first of these keys
        n, offset = self.before if keys is None else self.C, self.before + queries * self.C - first
        if self.causal and offset + self.C <= 0:
            return None
        if self.rows is None:
            return None, offset
        rows = self.rows[:, :, first : first + n] - first
        last = np.minimum(rows[..., 0], offset + self.C)
        start = np.full_like(last, offset) if self.causal else np.maximum(rows[..., 1], offset)
        if not (start < last).any():
            return None
        limits = np.iinfo(np.int32)
        return paddle.to_tensor(rows.clip(limits.min, limits.max).astype(np.int32)), offset


class RingAttention:
    """Attention where each rank of sep has two chunks of tokens: keys and values go round."""

    def mixed(self, q, k, v, slopes, rows, past_k, past_v, spread):
        if self.sep.places is None:
            return super().mixed(q, k, v, slopes, rows, past_k, past_v, spread)
        options = {"causal": rows.causal, "alibi_slopes": slopes, **self.options}
        how = types.SimpleNamespace(chunks=rows, sep=self.sep, options=options)
        return _RingAttention.apply(q, k, v, past_k, past_v, how), None, None


class _RingAttention(PyLayer):
    """Attention of this rank's queries with each rank's keys in turn; results are merged by their log-sum-exp.

    Kept: q, k, v, the result and its lse, all of this rank's tokens. Backward sends keys and values round again, and with
    them the gradients that they have collected, which so come home.
    """

    @staticmethod
    def forward(ctx, q, k, v, past_k, past_v, how):
        chunks, sums = how.chunks, [OnlineSoftmax(q[:, i]) for i in zigzag_halves(q)]
        for part, queries in zip(sums, chunks.mine):
            if past_k is not None and (seen := chunks.pair(queries, None)) is not None:
                part.add(*kernels.attention_with_lse(part.q, past_k, past_v, *seen, **how.options))
        states = paddle.stack([k, v])  # (2, B, T/sep, K, Dh)
        for last, owner in _ring_steps(how.sep):
            for keys, part, seen in _pairs(how, owner, sums):
                k_part, v_part = states[:, :, keys]
                part.add(*kernels.attention_with_lse(part.q, k_part, v_part, *seen, **how.options))
            if not last:
                states = how.sep.ring_shift(states)
        out, lse = (
            paddle.concat([getattr(part, name) for part in sums], axis=dim) for name, dim in (("out", 1), ("lse", 2))
        )
        ctx.how, ctx.given = how, [t is not None for t in (q, k, v, past_k, past_v)]
        ctx.frozen = [t is None or t.stop_gradient for t in (q, k, v, past_k, past_v)]
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        how, (q, k, v, past_k, past_v, out, lse) = ctx.how, ctx.saved_tensor()
        parts = [
            types.SimpleNamespace(
                q=q[:, i], kept=(out[:, i], lse[:, :, i], d_out[:, i]), d_q=paddle.zeros_like(q[:, i])
            )
            for i in zigzag_halves(q)
        ]
        d_past = [None, None]

        def of_keys(part, k, v, seen):
            d_q, *d_states = kernels.attention_with_lse_backward(part.q, k, v, *part.kept, *seen, **how.options)
            part.d_q = part.d_q + d_q
            return d_states

        if past_k is not None:
            d_past = [paddle.zeros_like(past_k), paddle.zeros_like(past_v)]
            for part, queries in zip(parts, how.chunks.mine):
                if (seen := how.chunks.pair(queries, None)) is not None:
                    d_past = [old + new for old, new in zip(d_past, of_keys(part, past_k, past_v, seen))]
        states = paddle.stack([k, v])
        d_states = paddle.zeros_like(states)
        for last, owner in _ring_steps(how.sep):
            for keys, part, seen in _pairs(how, owner, parts):
                k_part, v_part = states[:, :, keys]
                d_states[:, :, keys] = d_states[:, :, keys] + paddle.stack(of_keys(part, k_part, v_part, seen))
            if last:
                d_states = how.sep.ring_shift(d_states)
            else:
                states, d_states = how.sep.ring_shift(paddle.stack([states, d_states]))
        found = paddle.concat([part.d_q for part in parts], axis=1), *d_states, *d_past
        return tuple(None if frozen else d for d, frozen, given in zip(found, ctx.frozen, ctx.given) if given)


def zigzag_halves(x):
    """The slices of tokens that are a rank's two chunks."""
    C = x.shape[1] // 2
    return slice(0, C), slice(C, 2 * C)


def _ring_steps(sep):
    """(whether it is the last, whose keys are here) of each turn of a ring."""
    return [(turn == sep.size - 1, (sep.rank - turn) % sep.size) for turn in range(sep.size)]


def _pairs(how, owner, parts):
    """(slice of the keys, part of the queries, what they see of each other) of chunks of which anything is seen."""
    size = how.sep.size
    for i, keys in enumerate((owner, 2 * size - 1 - owner)):
        for part, queries in zip(parts, how.chunks.mine):
            if (seen := how.chunks.pair(queries, keys)) is not None:
                yield slice(i * how.chunks.C, (i + 1) * how.chunks.C), part, seen


class OnlineSoftmax:
    """Attention of queries q (B, C, H, Dh) with one set of keys after another."""

    def __init__(self, q):
        B, C, H, _ = q.shape
        self.q, self.out, self.lse = q, paddle.zeros_like(q), paddle.full([B, H, C], -math.inf, "float32")

    def add(self, out, lse):
        most = paddle.maximum(self.lse, lse)
        most = paddle.where(paddle.isinf(most), paddle.zeros_like(most), most)  # who sees nothing yet: no nan
        old, new = paddle.exp(self.lse - most), paddle.exp(lse - most)
        total = old + new
        self.lse = most + paddle.log(total)
        total = total.clip(min=1e-30)
        old, new = (
            (x / total).transpose([0, 2, 1]).unsqueeze(-1).astype(out.dtype) for x in (old, new)
        )  # (B, C, H, 1)
        self.out = self.out * old + out * new


def apply_context_parallel(model, topology):
    """Context parallelism of a model as it was built."""
    if topology.sep.size == 1:
        return
    for layer in model.sublayers():
        if isinstance(layer, Attention):
            mix_in(layer, RingAttention if topology.degrees.context else UlyssesAttention, sep=topology.sep)
    mix_in(model, ContextParallelCausalLM)


def check_context(config, degrees, T=None):
    """[what stands against sharing the tokens of this model so, a line each]; T: the longest row, where it is known."""
    sep, tp, found = degrees.sep, degrees.tp, []
    if sep == 1:
        return found
    key = f"{'context' if degrees.context else 'sep'}_parallel_degree {sep}"
    if not degrees.context:
        heads = sorted({last - first for (first, last), _ in (local_heads(config, tp, rank) for rank in range(tp))})
        if any(n % sep for n in heads):
            of = f", which tensor_parallel_degree {tp} leaves a rank of {config.num_attention_heads}" if tp > 1 else ""
            found.append(
                f"{key} does not divide attention heads ({' or '.join(map(str, heads))}{of}): context_parallel_degree takes any number"
            )
    parts, of_ring = (2 * sep, f" x 2 = {2 * sep}") if degrees.context else (sep, "")  # see spread()
    if T is not None and T < parts:
        found.append(f"{key}{of_ring} is more than tokens of a sequence ({T})")
    return found
