"""One decoder that is every family, their weight names, LoRA and prefix tuning, and a naive generate().

    model = from_pretrained("path/to/a/model")           # a Hugging Face or PaddleNLP folder of a family in FAMILIES
    logits = model(input_ids)                            # (B, T) int64 -> (B, T, V)
    losses = model(input_ids, labels=labels)             # (B, T) float32 per token, without ever holding the logits
    save_pretrained(model, "out")                        # Hugging Face layout again, of the same family

A family is a row of FAMILIES: how its config.json is read into the traits of a ModelConfig, and a table of weight names.
The decoder asks for traits, never for a family:
RMSNorm or LayerNorm before, after or around each half of a block, the residual around either · positions by rotation
(of all or some dims, halves or neighbors, in two dimensions; linear, dynamic, yarn, llama3 scaling), by ALiBi or learned ·
grouped-query attention that takes FlashMask rows, with windows, soft caps and norms of heads, or through latents (MLA) · q, k, v
in one linear or three, as the family's files have them, so that names, adapters and moments are one to one · MLPs with or
without gate, dense or of routed and shared experts · tied, own or normalized head.

Sections, each readable by itself: config, families, rotary positions, decoder | tensor files on disk, weights by their
names, PaddleNLP's names | LoRA adapters, prefix tuning, adapters on disk | generate.

This file knows nothing of topology or hardware: it reshapes with -1 and calls kernels.*. Labels come already shifted.
There is no dropout in the decoder, whatever config.json says: only LoRA has its own.

Letters: B batch, T sequence, D model width, H query heads, K key/value heads, Dh head dim, F feed-forward width,
V vocabulary, E experts, L layers, N tokens of a batch, P prefix tokens, R LoRA rank, r dims of a head that turn.
"""

import contextlib
import dataclasses
import functools
import math
import re
import zlib
from collections import namedtuple

import kernels
from kernels.reference import penalize, sample_logits

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from families import weight_names, yarn_mscale
from formats.files import UserError


def rope_frequencies(config):
    """(r/2,) float32 angular frequencies of the r dims that turn, and the factor on cos and sin (only yarn's differs from 1).

    linear: Chen et al., arXiv 2306.15595. yarn: Peng et al., arXiv 2309.00071, Eq. 22-25. llama3: the rule that Meta
    published with Llama 3.1. dynamic is the default up to max_position_embeddings (see rope_tables).
    """
    rope, dim = config.rope, config.rotary_dim or config.head_dim
    if config.position == "rope_2d":
        dim //= 2  # a half for each of the two positions
    exponent = np.arange(0, dim, 2, dtype=np.float32) / dim
    frequency = (1.0 / np.float32(rope["rope_theta"]) ** exponent).astype(np.float32)
    kind, factor = rope["rope_type"], rope.get("factor")
    if config.position == "rope_2d":  # ChatGLM-6B's code rounds its frequencies to half precision when it is built
        return frequency.astype(np.float16).astype(np.float32), 1.0
    if kind == "linear":
        return frequency / np.float32(factor), 1.0
    if kind == "llama3":
        original = rope["original_max_position_embeddings"]
        wavelength = 2 * math.pi / frequency
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)  # 0: scaled wholly, 1: left alone
        return ((1 - smooth) * frequency / factor + smooth * frequency).astype(np.float32), 1.0
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings

        def dim_of(rotations):  # the dim whose frequency turns that often over the original context
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

        low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
        scaled = ramp * frequency / factor + (1 - ramp) * frequency
        if rope.get("attention_factor") is not None:
            scale = rope["attention_factor"]
        elif rope.get("mscale") and rope.get("mscale_all_dim"):
            scale = yarn_mscale(factor, rope["mscale"]) / yarn_mscale(factor, rope["mscale_all_dim"])
        else:
            scale = yarn_mscale(factor, 1.0)
        return scaled.astype(np.float32), float(scale)
    return frequency, 1.0


def document_lengths(position_ids):
    """(B, T) int64 -> (B, T): for each token the last position of its own sample, plus one.

    A sample is a run of consecutive positions; packed rows restart at 0, a cached step is a run of one.
    """
    places = (position_ids * 0 + 1).cumsum(1)  # (B, T)
    starts = position_ids - places  # the same all along a run
    goes_on = paddle.concat([starts[:, 1:] == starts[:, :-1], starts[:, :1] != starts[:, :1]], axis=1)
    ends = paddle.where(goes_on, places + (1 << 40), places)
    ends = paddle.cummin(ends.flip(1), axis=1, dtype="int64")[0].flip(1)  # for each token the place of its run's last
    return starts + ends + 1


def rope_tables(config, position_ids, lengths=None):
    """cos and sin, each (B, T, 1, r) float32 for the r dims of a head that turn; None, None where no position rotates.

    position_ids (B, T), or for rope_2d (B, T, 2), whose tables stand one after the other. dynamic: past
    max_position_embeddings the base grows with the length of the token's own sample, so that neither padding nor packing
    changes the result. qwen_ntk grows in powers of two. lengths (B, T) or (B, 1) are those that each token is rotated for
    (None: the samples' own), see rope_lengths().
    """
    if not config.position.startswith("rope"):
        return None, None
    frequency, scale = rope_frequencies(config)
    dim, kind = 2 * len(frequency), config.rope["rope_type"]
    frequency = kernels.to_tensor(frequency)  # (r/2,)
    if kind in ("dynamic", "qwen_ntk"):
        length = (document_lengths(position_ids) if lengths is None else lengths).astype("float32")
        if kind == "dynamic":
            limit, factor = config.max_position_embeddings, config.rope["factor"]
            growth = factor * paddle.clip(length, min=limit) / limit - (factor - 1)  # (B, T), 1 within the limit
        else:
            limit = config.rope["original_max_position_embeddings"]
            doublings = paddle.ceil(paddle.log2(length / limit) + 1)
            growth = paddle.clip(2.0**doublings - 1, min=1.0)  # (B, T) or (B, 1)
        exponent = paddle.arange(0, dim, 2, dtype="float32") / dim
        frequency = frequency * (growth ** (dim / (dim - 2))).unsqueeze(-1) ** -exponent  # (B, T, r/2)
    angle = position_ids.unsqueeze(-1).astype("float32") * frequency  # (B, T[, 2], r/2)
    angle = paddle.concat([angle, angle], axis=-1)
    angle = (angle if angle.ndim == 3 else angle.flatten(2)).unsqueeze(2)  # (B, T, 1, r)
    return paddle.cos(angle) * scale, paddle.sin(angle) * scale


def rope_lengths(config, prompt, positions):
    """(n,) int64 lengths for rope_tables() of tokens at `positions` (n,) of a text that began with `prompt` tokens.

    None where rope does not depend on them. What is cached stays as it was rotated: a prompt for its own length, a token
    after it for the length then (dynamic), or still for the prompt's (qwen_ntk).
    """
    if config.rope["rope_type"] == "qwen_ntk":
        return np.full(len(positions), prompt, np.int64)
    return np.maximum(positions + 1, prompt) if config.rope["rope_type"] == "dynamic" else None


def rope_cache_key(config, prompt):
    """What rope_lengths() of a prompt of so many tokens make of it: prompts of equal numbers are turned alike."""
    if config.rope["rope_type"] == "qwen_ntk":
        return ((prompt - 1) // config.rope["original_max_position_embeddings"]).bit_length()  # doublings
    return max(prompt, config.max_position_embeddings) if config.rope["rope_type"] == "dynamic" else 0


def glm_positions_and_mask(config, input_ids, position_ids, rows):
    """ChatGLM-6B's positions (B, T, 2) and FlashMask rows (B, 1, T, 2), for whole samples (upstream of Du et al., 2103.10360).

    A sample is a context, whose tokens all see each other, and from <sop> (bos) on an answer, which is causal. The first
    position counts the context and stays at the mask token's place in the answer; the second is 0, then counts from 1.
    The mask token is [gMASK] if there is one, else [MASK]. A sample without <sop> is causal and all context. position_ids
    (B, T) restart at 0 with each sample; rows (B, 1, T, 1) or None are its causal rows.
    """
    B, T = input_ids.shape
    place = paddle.arange(T).unsqueeze(0).expand([B, T])
    first = paddle.cummax(paddle.where(position_ids == 0, place, paddle.zeros_like(place)), axis=1, dtype="int64")[0]
    never = paddle.full_like(place, 1 << 40)

    def next_one(found):  # (B, T): the place of the first such token of each token's sample; 1 << 40 if there is none
        after = paddle.cummin(paddle.where(found, place, never).flip(1), axis=1, dtype="int64")[0].flip(1)
        at = paddle.take_along_axis(after, first, axis=1)
        sample = paddle.take_along_axis(first, at.clip(max=T - 1), axis=1)
        return paddle.where((at < T) & (sample == first), at, never)

    source = config.source
    vocabulary = source["vocab_size"]
    start = next_one(input_ids == source.get("bos_token_id", vocabulary - 4))
    general = next_one(input_ids == source.get("gmask_token_id", vocabulary - 4))
    mask = paddle.where(general < T, general, next_one(input_ids == source.get("mask_token_id", vocabulary - 4)))
    mask = paddle.where(mask < T, mask, start)
    in_answer = place >= start
    answered = position_ids - (start - first)  # not place - start: two answers may share a context (dpo.py)
    positions = paddle.stack(
        [
            paddle.where(in_answer, mask - first, position_ids),
            paddle.where(in_answer, answered + 1, paddle.zeros_like(place)),
        ],
        axis=-1,
    )
    causal = in_answer | (start >= T)
    upper = paddle.where(causal, place, first)  # rows before it do not see the key
    upper = upper.astype("int32").reshape([B, 1, T, 1])
    if rows is None:
        rows = paddle.full([B, 1, T, 1], np.iinfo(np.int32).max, "int32")
    return positions, paddle.concat([rows, upper], axis=-1)


def glm_positions_of_prompt(config, tokens, prompt):
    """Positions (n, 2) int64 and FlashMask rows (1, 1, n, 2) int32, numpy, of one text: a prompt of so many tokens, and its
    reply, which is causal and whose second position counts on."""
    ids, more = paddle.to_tensor([tokens[:prompt]]), np.arange(len(tokens) - prompt)
    found = glm_positions_and_mask(config, ids, paddle.arange(prompt).unsqueeze(0), None)
    positions, rows = (x[0].numpy() for x in found)
    steps = positions[-1] + np.stack([np.zeros_like(more), more + 1], axis=-1)
    causal = np.stack([np.full_like(more, np.iinfo(np.int32).max), prompt + more], axis=-1).astype(np.int32)
    return np.concatenate([positions, steps]), np.concatenate([rows, causal[None]], axis=1)[None]


def sliding_window_rows(rows, B, T, window):
    """FlashMask rows (B, 1, T, 1) under which a query also sees no key that is `window` or more before it; rows, if given,
    are of all T keys."""
    if rows is not None:
        T = _shape(rows)[2]
    end = (paddle.arange(T, dtype="int32") + window).reshape([1, 1, -1, 1])
    return end.expand([B, 1, T, 1]) if rows is None else paddle.minimum(rows, end)


# =============================================================================================== decoder


class Linear(nn.Layer):
    """y = x W + b (+ residual) with W (in, out), on kernels.linear."""

    def __init__(self, n_in, n_out, bias):
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        self.weight = self.create_parameter([n_in, n_out])
        self.bias = self.create_parameter([n_out], is_bias=True) if bias else None

    def forward(self, x, residual=None):
        return kernels.linear(x, self.weight, self.bias, residual)

    def product(self, x, bias=None):
        """x W, and a bias if one is given."""
        return kernels.linear(x, self.weight, bias)

    def norms(self, weight):
        """(out,) the lengths of the columns of a weight (in, out) in this one's place."""
        return weight.norm(axis=0)

    def whole_weight(self):
        """(in, out) float32, numpy; of a linear that is spread over processes, all of it."""
        return self.weight.astype("float32").numpy()


class QuantLinear(nn.Layer):
    """y = x W + b with W (in, out) held as integers, on kernels.quant_linear, whose docstring has the layouts.

    scheme "w4" or "w8": weights alone, in groups of group_size input rows (-1: one group). scheme "a8w8": weights by
    output channel, activations rounded as well, by input_scale if static_input, else token by token.
    """

    def __init__(self, n_in, n_out, scheme, group_size=-1, bias=False, desc_act=False, static_input=False):
        super().__init__()
        self.n_in, self.n_out, self.scheme = n_in, n_out, scheme
        self.group_size = n_in if group_size == -1 else group_size
        tensors = {"qweight": ([n_in, n_out], "int8"), "scales": ([n_out], "float32")}
        if scheme == "a8w8":
            if static_input:
                tensors["input_scale"] = ([1], "float32")
        else:
            per_word, groups = 32 // int(scheme[1:]), -(-n_in // self.group_size)
            if n_in % per_word or n_out % per_word:
                raise UserError(
                    f"a linear of {n_in} x {n_out} cannot be packed to {scheme[1:]} bits: not multiples of {per_word}"
                )
            tensors = {
                "qweight": ([n_in // per_word, n_out], "int32"),
                "scales": ([groups, n_out], "float32"),
                "qzeros": ([groups, n_out // per_word], "int32"),
                "g_index": ([n_in], "int32"),
            }
        for name, (shape, dtype) in tensors.items():
            self.register_buffer(name, paddle.zeros(shape, dtype))
        for name in {"qzeros", "g_index", "input_scale"} - tensors.keys():
            setattr(self, name, None)
        if self.g_index is not None:
            self.g_index.set_value(paddle.arange(n_in, dtype="int32") // self.group_size)
        # Groups are runs of input rows, or all rows are one group: no look-up is needed.
        self.in_order = self.group_size >= n_in or not desc_act and n_in % self.group_size == 0
        self.bias = self.create_parameter([n_out], is_bias=True) if bias else None

    def _group_of_rows(self):
        return None if self.in_order else self.g_index

    def forward(self, x, residual=None):
        y = self.product(x, self.bias)
        return y if residual is None else residual + y

    def product(self, x, bias=None):
        """x W, and a bias if one is given."""
        return kernels.quant_linear(
            x, self.qweight, self.scales, bias, self.scheme, self.qzeros, self._group_of_rows(), self.input_scale
        )

    def dequantized(self):
        """(in, out) float32: the weight that the integers stand for."""
        if self.scheme == "a8w8":
            return self.qweight.astype("float32") * self.scales
        bits = int(self.scheme[1:])
        return kernels.dequantize(self.qweight, self.scales, bits, self.qzeros, self._group_of_rows())

    def check(self, path, name):
        """What was read must be what forward() takes it for."""
        if self.g_index is None:
            return
        groups, last = self.g_index.numpy(), self.scales.shape[0] - 1
        if groups.min() < 0 or groups.max() > last:
            raise UserError(f"{path}: {name}.g_idx names group {groups.max()}, {name}.scales has 0 to {last}")
        if self.in_order and not np.array_equal(groups, np.arange(self.n_in) // self.group_size):
            raise UserError(f"{path}: {name}.g_idx is not in order, but desc_act is false")


class Norm(nn.Layer):
    """RMSNorm (arXiv 1910.07467) or, with kind "layer", LayerNorm; `offset` is added to the weight."""

    def __init__(self, width, epsilon, kind="rms", offset=0.0):
        super().__init__()
        self.kind, self.epsilon, self.offset = kind, epsilon, offset
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0 - offset))
        # A bias of an RMSNorm: quantize.py's shift moves a constant out of the linears into it.
        self.bias = self.create_parameter([width], is_bias=True) if kind == "layer" else None

    def forward(self, x, residual=None):
        """The norm of x, or with a residual (the norm of h, h), h = x + residual."""
        if self.kind == "layer":
            return kernels.layer_norm(x, self.weight, self.bias, self.epsilon, residual)
        weight = self.weight + self.offset if self.offset else self.weight
        found = kernels.rms_norm(x, weight, self.epsilon, residual)
        if self.bias is None:
            return found
        return found + self.bias if residual is None else (found[0] + self.bias, found[1])

    def add_bias(self):
        self.bias = self.create_parameter(self.weight.shape, is_bias=True)


def _norm(config, width=None):
    return Norm(width or config.hidden_size, config.norm_eps, config.norm, config.norm_offset)


class Cache:
    """Keys and values of the tokens so far, a pair (B, T, K, Dh) a layer, and the mask rows that they came with."""

    def __init__(self, layers):
        self.keys, self.values = [None] * layers, [None] * layers
        self.rows = None  # (B, 1, tokens, 1 or 2) int32, once any token had rows
        self.last = None  # (B, 2) the last token's two positions, for rope_2d
        self.lengths = None  # (B, 1) of the samples when they were first seen, for qwen_ntk; see rope_lengths()
        self.tokens = 0
        self.prefix_tokens = 0  # trained prefixes stand before position 0 of the text

    def extend_rows(self, rows, B, T):
        """Append the rows of T new tokens (None: visible to all); returns those of all keys, in rows of the whole."""
        past, self.tokens = self.tokens, self.tokens + T
        if rows is None and self.rows is None:
            return None
        never = np.iinfo(np.int32).max
        columns = (rows if rows is not None else self.rows).shape[-1]
        before = self.rows if self.rows is not None else self._visible(B, past, columns)
        new = rows.clip(max=never - past) + past if rows is not None else self._visible(B, T, columns)
        self.rows = paddle.concat([before, new], axis=2)
        return self.rows

    @staticmethod
    def _visible(B, T, columns):
        """Rows of keys that every row sees, or with two columns every row."""
        rows = paddle.full([B, 1, T, 1], np.iinfo(np.int32).max, "int32")
        return rows if columns == 1 else paddle.concat([rows, paddle.zeros_like(rows)], axis=-1)


class PrefixLayout:
    """A prefix before each sample of a row, for attention where distances count (ALiBi, windows).

    A cache has its prefix once, before everything: right for one sample a row, and, where nothing depends on the
    distance, for packed and left-padded rows too. Here keys and values stand as (prefix, sample), (prefix, sample), …
    during attention, each pair as it would be alone; rows with fewer samples than others begin with places nobody sees.
    """

    def __init__(self, position_ids, rows, P):
        """position_ids (B, T); rows (B, 1, T, 1); a prefix of P tokens."""
        (B, T), positions, ends = position_ids.shape, position_ids.numpy(), rows.numpy()[:, 0, :, 0].astype(np.int64)
        seen = ends > np.arange(T)  # padding on the left is not: it begins no sample
        first = seen & ((positions == 0) | (seen.cumsum(1) == 1))
        most = int(first.sum(1).max())
        width = T + P * most
        prefixes = most - first.sum(1, keepdims=True) + first.cumsum(1)  # that stand before each token of the text
        places = np.arange(T) + P * prefixes  # (B, T)
        never = np.iinfo(np.int32).max
        ends = np.where(
            ends < T, np.take_along_axis(places, ends.clip(0, T - 1), 1), np.minimum(ends + width - T, never)
        )
        self.rows = np.zeros((B, 1, width, 1), np.int32)
        source = np.zeros((B, width), np.int64)  # of each key, among the prefix's P and the text's T
        for b in range(B):
            source[b, places[b]], self.rows[b, 0, places[b], 0] = P + np.arange(T), np.where(seen[b], ends[b], 0)
            for t in np.flatnonzero(first[b]):
                before = np.s_[places[b, t] - P : places[b, t]]
                source[b, before], self.rows[b, 0, before, 0] = np.arange(P), ends[b, t]
        self.B, self.width, self.rows = B, width, paddle.to_tensor(self.rows)
        self.keys_from = paddle.to_tensor((source + np.arange(B)[:, None] * (P + T)).flatten())
        self.queries_from = paddle.to_tensor(((source - P).clip(0) + np.arange(B)[:, None] * T).flatten())
        self.back = paddle.to_tensor((places + np.arange(B)[:, None] * width).flatten())

    def keys(self, prefix, text):
        """(B, P, K, Dh) and (B, T, K, Dh) -> (B, width, K, Dh)"""
        return self._take(paddle.concat([prefix, text], axis=1), self.keys_from)

    def queries(self, q):
        """(B, T, H, Dh) -> (B, width, H, Dh), anything where there is no text."""
        return self._take(q, self.queries_from)

    def text(self, mixed):
        """(B, width, H, Dh) -> (B, T, H, Dh)"""
        return self._take(mixed, self.back)

    def _take(self, x, index):
        return paddle.index_select(x.flatten(0, 1), index).reshape([self.B, -1, *x.shape[2:]])


def alibi_slopes(heads):
    """(H,) float32: the rate at which each head's attention falls with distance (Press et al., arXiv 2108.12409, 3)."""
    # Where H is no power of two: the slopes of the one below it, then every other of the next one's.
    below = 1 << int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / below) for i in range(heads - below)]
    return np.array(slopes, np.float32)


class Attention(nn.Layer):
    order_back = (2, 0, 1)  # in which backward reaches what project() gives: v is not rotated

    def __init__(self, config, layer):
        super().__init__()
        D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.head_dim, self.group = config, Dh, H // K
        self.window = config.windows[layer] if config.windows else None
        self.options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        self.slopes = alibi_slopes(H) if config.position == "alibi" else None
        self.make_projections(config)
        self.o_proj = Linear(H * self.value_dim, D, config.output_bias)

    def make_projections(self, config):
        D, H, K, Dh, bias = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
        )
        self.value_dim = Dh
        if config.fused_qkv:
            self.qkv_proj = Linear(D, (H + 2 * K) * Dh, bias)
        else:
            self.q_proj = Linear(D, H * Dh, bias)
            self.k_proj = Linear(D, K * Dh, bias)
            self.v_proj = Linear(D, K * Dh, bias)
        self.q_norm = Norm(Dh, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(Dh, config.norm_eps) if config.qk_norm else None

    def forward(self, x, cos, sin, rows, past_k, past_v, attend=None, q_scale=None, spread=None, again=None):
        """x (B, T, D) -> (B, T, D), and all keys and values (B, past + T, K, Dh).

        rows: FlashMask rows of all keys, the window among them; one column is causal, two are not. attend: a function
        (q, k, v, **options) -> (B, T, H, Dh) in place of kernels.attention, for a cache that keeps k and v itself.
        q_scale (B, T, 1, 1): a factor on every query. spread: PrefixLayout, whose prefix is past_k and past_v. again: as in
        Block.forward; "core_attn" is all behind the first linears.
        """
        states, more = self.project(x), (cos, sin, rows, past_k, past_v, q_scale, spread)
        if again is None:
            return self.core(*states, *more, attend)
        order = (0, 1, 2) if cos is None else self.order_back  # so that sums of gradients have the same bits as without

        def core(*inputs):
            return self.core(*(inputs[order.index(i)] for i in range(3)), *inputs[3:])[0]

        return again[1](core, *(states[i] for i in order), *more), None, None

    def output(self, x, cos, sin, rows, past_k, past_v, q_scale, spread):
        """forward() without keys and values."""
        return self(x, cos, sin, rows, past_k, past_v, q_scale=q_scale, spread=spread)[0]

    def core(self, q, k, v, cos, sin, rows, past_k, past_v, q_scale, spread, attend=None):
        """What forward() gives, from what project() gives."""
        q, k, v = self.rotated(q, k, v, cos, sin)
        q = q if q_scale is None else q * q_scale
        slopes = None if self.slopes is None else kernels.to_tensor(self.slopes)
        if attend is not None:
            mixed, k, v = attend(q, k, v, alibi_slopes=slopes, window=self.window, **self.options), None, None
        else:
            mixed, k, v = self.mixed(q, k, v, slopes, rows, past_k, past_v, spread)
        if self.value_dim != self.head_dim:
            mixed = mixed[..., : self.value_dim]  # values were padded to the width of keys
        return self.o_proj(mixed.reshape([0, 0, -1])), k, v

    def mixed(self, q, k, v, slopes, rows, past_k, past_v, spread):
        """q (B, T, H, Dh) over past and new keys -> (B, T, H, Dh), and all of these keys and values."""
        if spread is not None:
            q, k, v = spread.queries(q), spread.keys(past_k, k), spread.keys(past_v, v)
        elif past_k is not None:
            k, v = paddle.concat([past_k, k], axis=1), paddle.concat([past_v, v], axis=1)
        causal = rows is None or rows.shape[-1] == 1
        mixed = kernels.attention(q, k, v, rows, causal, alibi_slopes=slopes, **self.options)
        return mixed if spread is None else spread.text(mixed), k, v

    def rotated(self, q, k, v, cos, sin):
        """What project() gives -> q (B, T, H/tp, Dh), k and v (B, T, K/tp, Dh), with their positions."""
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is None:
            return q, k, v
        if self.config.position == "rope_2d":  # each half of a head turns with one of the two positions
            half = self.head_dim // 2
            q, k = (
                paddle.concat(
                    [
                        kernels.rope(part[..., :half], cos[..., :half], sin[..., :half]),
                        kernels.rope(part[..., half:], cos[..., half:], sin[..., half:]),
                    ],
                    axis=-1,
                )
                for part in (q, k)
            )
            return q, k, v
        interleaved = self.config.rope_interleaved
        return kernels.rope(q, cos, sin, interleaved), kernels.rope(k, cos, sin, interleaved), v

    def project(self, x):
        """What the first linears make of x (B, T, D), all that rotated() reads: q (B, T, H/tp, Dh), k, v (B, T, K/tp, Dh)."""
        Dh, G = self.head_dim, self.group
        if self.config.fused_qkv is None:
            return tuple(p(x).reshape([0, 0, -1, Dh]) for p in (self.q_proj, self.k_proj, self.v_proj))  # 0 keeps a dim
        qkv = self.qkv_proj(x)  # (B, T, (H + 2K)/tp · Dh)
        if self.config.fused_qkv == "blocks":
            K = qkv.shape[-1] // ((G + 2) * Dh)
            return tuple(t.reshape([0, 0, -1, Dh]) for t in qkv.split([G * K * Dh, K * Dh, K * Dh], axis=-1))
        q, k, v = qkv.reshape([0, 0, -1, G + 2, Dh]).split([G, 1, 1], axis=3)  # (B, T, K/tp, G | 1 | 1, Dh)
        return q.reshape([0, 0, -1, Dh]), k.squeeze(3), v.squeeze(3)


class MultiheadLatentAttention(Attention):
    """Attention whose queries and keys come through narrow layers (see MLAConfig); keys and values are kept in full."""

    order_back = (0, 1, 2)

    def make_projections(self, config):
        D, H, latent = config.hidden_size, config.num_attention_heads, config.latent
        self.value_dim = latent.value_dim
        width = H * (latent.nope_dim + latent.rope_dim)
        if latent.q_rank:
            self.q_a_proj = Linear(D, latent.q_rank, config.attention_bias)
            self.q_a_norm = Norm(latent.q_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(latent.q_rank, width, False)
        else:
            self.q_proj = Linear(D, width, False)
        self.kv_a_proj = Linear(D, latent.kv_rank + latent.rope_dim, config.attention_bias)
        self.kv_a_norm = Norm(latent.kv_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(latent.kv_rank, H * (latent.nope_dim + latent.value_dim), False)

    def project(self, x):
        """q (B, T, H/tp, nope + rope), keys and values (B, T, H/tp, nope + value), the heads' common key (B, T, rope)."""
        latent = self.config.latent
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if latent.q_rank else self.q_proj(x)
        narrow, k_rope = self.kv_a_proj(x).split([latent.kv_rank, latent.rope_dim], axis=-1)
        kv = self.kv_b_proj(self.kv_a_norm(narrow)).reshape([0, 0, -1, latent.nope_dim + latent.value_dim])
        return q.reshape([0, 0, -1, self.head_dim]), kv, k_rope

    def rotated(self, q, kv, k_rope, cos, sin):
        latent, interleaved = self.config.latent, self.config.rope_interleaved
        q_nope, q_rope = q.split([latent.nope_dim, latent.rope_dim], axis=-1)
        k_nope, v = kv.split([latent.nope_dim, latent.value_dim], axis=-1)
        q_rope = kernels.rope(q_rope, cos, sin, interleaved)
        k_rope = kernels.rope(k_rope.unsqueeze(2), cos, sin, interleaved)  # (B, T, 1, rope)
        k_rope = k_rope.expand([-1, -1, _shape(k_nope)[2], -1])
        q, k = paddle.concat([q_nope, q_rope], axis=-1), paddle.concat([k_nope, k_rope], axis=-1)
        return q, k, _padded(v, self.head_dim)


LATENT_NORM_EPS = 1e-6  # whatever config.json says of the other norms


def _padded(x, width):
    """x (…, n) -> (…, width), zeros behind."""
    more = width - x.shape[-1]
    return x if more <= 0 else F.pad(x, [0, 0] * (x.ndim - 1) + [0, more])


def _shape(x):
    """x.shape, also while a graph is traced, where it is -1 in part."""
    return x.shape if paddle.in_dynamic_mode() else paddle.shape(x)


def _activate(x, kind):
    if kind == "relu":
        return F.relu(x)
    return F.silu(x) if kind == "silu" else kernels.gelu(x, kind == "gelu_tanh")


class MLP(nn.Layer):
    """down(act(gate) · up) or, not gated, down(act(up)); of `width` in place of the config's."""

    def __init__(self, config, width=None):
        super().__init__()
        D, width = config.hidden_size, width or config.intermediate_size
        self.activation, self.gated = config.activation, config.gated
        self.gate_proj = self.up_proj = self.gate_up_proj = None
        if config.fused_gate_up:
            self.gate_up_proj = Linear(D, 2 * width, config.mlp_bias)
        else:
            self.gate_proj = Linear(D, width, config.mlp_bias) if config.gated else None
            self.up_proj = Linear(D, width, config.mlp_bias)
        self.down_proj = Linear(width, D, config.mlp_bias)

    def forward(self, x, residual=None):
        """x (B, T, D) -> (B, T, D), residual added if given."""
        if not self.gated:
            return self.down_proj(_activate(self.up_proj(x), self.activation), residual)
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)  # (B, T, F/tp)
        if self.activation == "silu":
            return self.down_proj(kernels.swiglu(gate, up), residual)
        return self.down_proj(kernels.geglu(gate, up, self.activation == "gelu_tanh"), residual)


def select_experts(choice, how):
    """(N, E) -> (N, k): the ids of the highest, from the best groups where there are groups."""
    if how.groups > 1:
        grouped = choice.reshape([-1, how.groups, how.count // how.groups])
        best = paddle.topk(grouped, how.group_score_of, axis=-1)[0].sum(-1)  # (N, groups)
        kept = F.one_hot(paddle.topk(best, how.chosen_groups, axis=-1)[1], how.groups).sum(1)  # (N, groups)
        lost = paddle.full_like(grouped, -math.inf)
        choice = paddle.where(kept.unsqueeze(-1).expand(grouped.shape) > 0, grouped, lost).reshape([-1, how.count])
    return paddle.topk(choice, how.top_k, axis=-1)[1]


class MoE(nn.Layer):
    """A sum over the top_k experts of each token, weighted by the router, and the shared expert (see MoEConfig)."""

    def __init__(self, config):
        super().__init__()
        self.how = how = config.experts
        self.router = Linear(config.hidden_size, how.count, False)
        self.experts = nn.LayerList([MLP(config, how.width) for _ in range(how.count)])
        self.shared = MLP(config, how.shared_width) if how.shared_width else None
        self.shared_gate = Linear(config.hidden_size, 1, False) if how.shared_gate else None
        if how.choice_bias:
            self.register_buffer("choice_bias", paddle.zeros([how.count]))

    def forward(self, x, residual=None):
        """x (B, T, D) -> ((B, T, D), the router's probabilities (B · T, E) float32)"""
        mixed, probabilities = self.mixture(x)
        return mixed if residual is None else residual + mixed, probabilities

    def mixture(self, x):
        """What forward() gives, without a residual."""
        flat = x.reshape([-1, x.shape[-1]])  # (N, D)
        weights, chosen, probabilities = self.route(flat)
        mixed = self.mix(flat, weights, chosen).reshape(_shape(x))
        if self.shared is not None:
            shared = self.shared(x)
            mixed = mixed + (shared if self.shared_gate is None else F.sigmoid(self.shared_gate(x)) * shared)
        return mixed, probabilities

    def route(self, flat):
        """(N, D) -> weights (N, k) float32 and ids (N, k) of the chosen experts, probabilities (N, E)."""
        how = self.how
        logits = paddle.matmul(flat.astype("float32"), self.router.weight.astype("float32"))
        scores = F.sigmoid(logits) if how.scoring == "sigmoid" else F.softmax(logits, axis=-1)
        choice = scores.detach() + self.choice_bias if how.choice_bias else scores.detach()
        chosen = select_experts(choice, how)
        weights = paddle.take_along_axis(scores, chosen, axis=-1)
        if how.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * how.scale, chosen, scores

    def mix(self, flat, weights, chosen):
        """Every expert on the tokens that chose it, which stand together after a sort; the sum in the order of choice."""
        k = chosen.shape[-1]
        if (
            not paddle.in_dynamic_mode()
        ):  # a static graph has no shapes that depend on values: all experts on all tokens
            share = (F.one_hot(chosen, self.how.count) * weights.unsqueeze(-1)).sum(1)  # (N, E)
            return sum(expert(flat) * share[:, e : e + 1] for e, expert in enumerate(self.experts))
        ids = chosen.flatten()  # (N · k,)
        order = paddle.argsort(ids, stable=True)
        counts = np.bincount(ids.numpy(), minlength=self.how.count)
        mixed = self.outputs(paddle.index_select(flat, order // k), counts)
        back = paddle.argsort(order)  # where each of a token's choices stands
        mixed = paddle.index_select(mixed, back).reshape([-1, k, flat.shape[-1]])
        return (mixed * weights.unsqueeze(-1).astype(mixed.dtype)).sum(1)

    def outputs(self, tokens, counts):
        """(n, D), the tokens of one expert behind those of another, so many of each -> (n, D), what the experts make of them."""
        parts = paddle.split(tokens, [int(n) for n in counts if n])
        used = [expert for expert, n in zip(self.experts, counts) if n]
        return paddle.concat([expert(part) for expert, part in zip(used, parts)])


def load_balancing_loss(probabilities, how, real):
    """E · sum over experts of (share of the tokens that chose it) · (its mean probability), arXiv 2101.03961, Eq. 4-6.

    probabilities: (B · T, E) of each sparse layer; shares and means are over the tokens of all layers together for which
    real (B, T) is 1. With how.aux_by_layer over those of one layer, and with aux_by_sequence of one row of it; their losses
    are averaged over rows and added up over layers, and shares are of all choices.
    """
    E, rows = how.count, len(real) if how.aux_by_layer and how.aux_by_sequence else 1
    layers = probabilities if how.aux_by_layer else [paddle.concat(probabilities)]
    real, total = real.flatten().tile([len(probabilities) // len(layers)]).reshape([rows, -1, 1]), 0.0
    share = real / real.sum(1, keepdim=True).clip(min=1.0)  # adds up to 1
    for p in layers:
        chosen = F.one_hot(select_experts(p.detach(), how), E).sum(1).reshape([rows, -1, E])
        p = p.reshape([rows, -1, E])
        total = total + ((chosen * share).sum(1) * (p * share).sum(1)).sum(-1).mean() * E
    return total / how.top_k if how.aux_by_layer else total


class Block(nn.Layer):
    def __init__(self, config, layer):
        super().__init__()
        sparse = config.experts is not None and layer not in config.experts.dense_layers
        self.place, self.residual_scale = config.norm_place, config.residual_scale
        self.attention_norm = _norm(config)
        self.attention = (MultiheadLatentAttention if config.latent else Attention)(config, layer)
        self.mlp_norm = _norm(config)
        self.mlp = MoE(config) if sparse else MLP(config)
        self.attention_post_norm = _norm(config) if self.place == "both" else None
        self.mlp_post_norm = _norm(config) if self.place == "both" else None

    def forward(
        self, x, cos, sin, rows=None, past_k=None, past_v=None, attend=None, q_scale=None, spread=None, again=None
    ):
        """(B, T, D), all keys, all values, and the router's probabilities (N, E) of a sparse block, else None.

        again: what is computed again in backward, "full_attn" (all of attention) or "core_attn", and CausalLM.recomputed; then
        keys and values are None.
        """

        def attention(x, added=False):
            """What attention makes of x, with x added or not, and keys and values."""
            if again is not None and again[0] == "full_attn":
                output = self.attention.output
                function = (
                    (lambda x, *more: x + output(x, *more)) if added else output
                )  # inside: sums have the same bits as without
                return again[1](function, x, cos, sin, rows, past_k, past_v, q_scale, spread), None, None
            mixed, k, v = self.attention(x, cos, sin, rows, past_k, past_v, attend, q_scale, spread, again)
            return (x + mixed if added else mixed), k, v

        if self.place == "after":
            x, k, v = attention(x, added=True)
            x = self.attention_norm(x)
            return self.mlp_norm(self.mlp(x, residual=x)), k, v, None
        y = self.attention_norm(x)
        mixed, k, v = attention(y)
        if self.residual_scale is not None:
            y = self.mlp_norm(y * self.residual_scale + mixed)
            return self.mlp(y, residual=y * self.residual_scale), k, v, None
        if self.place == "both":
            y, x = self.mlp_norm(self.attention_post_norm(mixed), x)
            return x + self.mlp_post_norm(self.mlp(y)), k, v, None
        y, x = self.mlp_norm(mixed, x)
        y, probabilities = self.mlp(y, residual=x) if isinstance(self.mlp, MoE) else (self.mlp(y, residual=x), None)
        return y, k, v, probabilities

    def output(self, x, cos, sin, rows, past_k, past_v, q_scale, spread):
        """What is kept of a block whose activations are computed again in backward (arXiv 1604.06174): no keys and values."""
        y, _, _, probabilities = self.forward(x, cos, sin, rows, past_k, past_v, None, q_scale, spread)
        return y if probabilities is None else (y, probabilities)


class ForwardContext(namedtuple("ForwardContext", "cos sin q_scale rows narrowed spread")):
    """What all blocks of a pass read: rotary tables, a factor on queries, FlashMask rows, {window: rows}, PrefixLayout or
    None."""

    def rows_of(self, block):
        return self.narrowed.get(block.attention.window, self.rows)


class RNGTracker:
    """Randomness of one pass of a model: what is drawn under a key depends on it, on paddle.seed() and on the shape alone.

    So whoever has a part of the model or of its tokens draws what one process would, however much others have drawn.
    """

    number = 0

    def renew(self):
        self.number = int(paddle.randint(0, (1 << 31) - 1, [1])[0])

    @contextlib.contextmanager
    def under(self, key, number=None):
        """What is drawn inside is drawn under this key, and leaves no trace outside. number: of another pass."""
        states = paddle.get_rng_state("cpu"), paddle.get_rng_state()
        paddle.seed(zlib.crc32(f"{self.number if number is None else number} {key}".encode()))
        try:
            yield
        finally:
            paddle.set_rng_state(states[0], "cpu")
            paddle.set_rng_state(states[1])


class CausalLM(nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.draws = RNGTracker()
        self.config, width = config, config.embedding_size or config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions = None
        if config.position == "learned":
            self.embed_positions = nn.Embedding(
                config.max_position_embeddings + config.position_offset, config.hidden_size
            )
        projected = width != config.hidden_size
        self.project_in = Linear(width, config.hidden_size, bias=False) if projected else None
        self.project_out = Linear(config.hidden_size, width, bias=False) if projected else None
        self.embed_norm = _norm(config) if config.embedding_norm else None
        self.layers = nn.LayerList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = _norm(config) if config.final_norm else None
        self.lm_head = None if config.tie_word_embeddings else Linear(width, config.vocab_size, bias=False)
        self.prefix = None  # set by apply_prefix()
        self.distances_count = config.position == "alibi" or any(config.windows)  # between query and key
        self.names_on_other_ranks = frozenset()  # names of weights that other processes hold
        self.recompute = False  # compute activations again in backward instead of keeping them, of each block …
        self.recompute_granularity = (
            "full"  # … all, "full_attn": attention's, "core_attn": those behind its first linears, …
        )
        self.no_recompute_layers = frozenset()  # … but not of these
        self.neftune_noise_alpha = 0.0  # training noise on the embeddings (Jain et al., arXiv 2310.05914)

    def new_cache(self, B):
        """An empty Cache for B sequences, or one that begins with the trained prefix."""
        cache = Cache(self.config.num_hidden_layers)
        if self.prefix is not None:
            self.prefix.fill(cache, B)
        return cache

    def forward(
        self,
        input_ids,
        position_ids=None,
        startend_row_indices=None,
        caches=None,
        labels=None,
        return_predictions=False,
        additions=True,
    ):
        """input_ids (B, T) int64 -> logits (B, T, V), or with labels (B, T) -> losses (B, T) float32, 0 where -100.

        position_ids (B, T) default to 0…T-1 after what `caches` (a Cache, extended in place) holds; startend_row_indices
        (B, 1, T, 1) int32 are FlashMask rows. labels are already shifted: labels[t] is the target of position t.
        return_predictions: (losses, argmax ids (B, T) int64). While training, a family's own additions to the loss (of the
        router's balance, of large logits), which belong to the batch, are added to every loss that counts; additions=False
        leaves them out, for whoever wants log-probabilities.
        """
        x, probabilities = self.trunk(input_ids, position_ids, startend_row_indices, caches)
        if labels is None:
            return self.logits(x)
        return self.losses(x, probabilities, labels, return_predictions, additions)

    def losses(self, x, probabilities, labels, return_predictions=False, additions=True):
        """What forward() gives for labels, from trunk()'s hidden states (B, T, D) and probabilities."""
        x = self.read_by_head(x)
        weight, tied = self.head_weight()
        flat = x.reshape([-1, x.shape[-1]])
        found = self.cross_entropy(flat, weight, labels.flatten(), tied, return_predictions)
        losses = (found[0] if return_predictions else found).reshape(labels.shape)
        if (
            self.training
            and additions
            and (more := self.additions(flat, labels, weight, tied, probabilities)) is not None
        ):
            losses = losses + more * (labels != -100).astype(losses.dtype)
        return (losses, found[1].reshape(labels.shape)) if return_predictions else losses

    def read_by_head(self, x):
        """Hidden states (…, D) -> what the head multiplies."""
        return x if self.project_out is None else self.project_out(x)

    def cross_entropy(self, x, weight, labels, tied, return_predictions):
        """x (N, D) and labels (N,) -> losses (N,), and argmax ids (N,) if asked for."""
        return kernels.linear_cross_entropy(
            x,
            weight,
            labels,
            transpose_weight=tied,
            return_predictions=return_predictions,
            softcap=self.config.final_softcap,
        )

    def additions(self, x, labels, weight, tied, probabilities):
        """What a family adds to the mean loss of a batch, a scalar; None: nothing.

        Over the tokens up to the last label of each row: what stands behind it is padding, which would be balanced too.
        """
        config, more = self.config, None
        if not config.z_loss_weight and not (probabilities and config.experts.aux_loss_coef):
            return None
        real = (self.of_all(labels.flatten(), labels.shape).reshape([labels.shape[0], -1]) != -100).astype("float32")
        real = (real.flip(1).cumsum(1).flip(1) > 0).astype("float32")  # (B, T)
        if probabilities and config.experts.aux_loss_coef:
            probabilities = [self.of_all(p, labels.shape) for p in probabilities]
            more = load_balancing_loss(probabilities, config.experts, real) * config.experts.aux_loss_coef
        if config.z_loss_weight:
            largest = self.of_all(self.largest_logits(x, weight, tied), labels.shape)
            mean = (largest.square() * real.flatten()).sum() / real.sum().clip(min=1.0)
            more = (0.0 if more is None else more) + config.z_loss_weight * mean
        return more

    def largest_logits(self, x, weight, tied):
        """x (N, D) -> each row's largest logit (N,): found without gradient, then computed again alone."""
        with paddle.no_grad():
            best = paddle.concat(
                [
                    kernels.linear(part, weight.T if tied else weight).argmax(-1)
                    for part in x.split(-(-x.shape[0] // Z_LOSS_ROWS))
                ]
            )
        return (x * kernels.embedding(best, weight if tied else weight.T)).sum(-1)

    def head_weight(self):
        """The head's weight and whether it lies as (V, D), as a tied one does, in place of (D, V)."""
        if self.lm_head is None:
            return self.embed_tokens.weight, True
        if self.config.norm_head:
            weight = self.lm_head.weight.astype("float32")
            return weight / weight.norm(axis=0, keepdim=True).clip(min=1e-12), False
        return self.lm_head.weight, False

    def logits(self, x):
        """hidden states (…, D), after the final norm -> (…, V)"""
        x = self.read_by_head(x)
        weight, tied = self.head_weight()
        logits = (
            paddle.matmul(x, weight, transpose_y=True) if tied else kernels.linear(x, weight)
        )  # weight.T would be a copy
        cap = self.config.final_softcap
        return logits if cap is None else paddle.tanh(logits / cap) * cap

    def hidden_states(self, input_ids, position_ids=None, rows=None, caches=None):
        """(B, T, D) after the final norm; arguments as in forward.

        caches may also be any object with attend(layer, q, k, v, **options) -> (B, T, H, Dh), prefix_tokens and lengths
        (see rope_lengths()), which then keeps keys and values itself (serve.py's pool of blocks); position_ids, for
        rope_2d (B, T, 2), must be given with it.
        """
        return self.trunk(input_ids, position_ids, rows, caches)[0]

    def trunk(self, input_ids, position_ids=None, rows=None, caches=None):
        """hidden_states(), and a list of the probabilities (N, E) of each sparse block's router."""
        paged = caches is not None and not isinstance(caches, Cache)
        assert not paged or position_ids is not None, "a paged cache does not know the positions"
        self.begin(input_ids, caches)
        if caches is None and self.prefix is not None:
            caches = self.new_cache(input_ids.shape[0])
        x, shared = self.prepare(input_ids, position_ids, rows, caches)
        x, probabilities = self.through(range(len(self.layers)), x, shared, caches)
        return self.last_norm(x), probabilities

    def begin(self, input_ids, caches):
        """A pass begins."""
        if self.training:
            self.draws.renew()

    def through(self, places, x, shared, caches=None):
        """x (B, T, D) after the blocks at these places, one after another, and the probabilities of the sparse ones' routers."""
        paged = caches is not None and not isinstance(caches, Cache)
        turns, probabilities = (shared.cos, shared.sin), []
        for i in places:
            block = self.layers[i]
            if paged:
                x, *_, routed = block(x, *turns, attend=functools.partial(caches.attend, i), q_scale=shared.q_scale)
                continue
            seen = shared.rows_of(block)
            past = (None, None) if caches is None else (caches.keys[i], caches.values[i])
            again = self.recomputes(i)
            if again == "full":
                found = self.recomputed(block.output, x, *turns, seen, *past, shared.q_scale, shared.spread)
                x, routed = found if isinstance(found, (tuple, list)) else (found, None)
            else:
                x, k, v, routed = block(
                    x,
                    *turns,
                    seen,
                    *past,
                    q_scale=shared.q_scale,
                    spread=shared.spread,
                    again=again and (again, self.recomputed),
                )
                if caches is not None and k is not None:
                    caches.keys[i], caches.values[i] = k, v
            if routed is not None:
                probabilities.append(routed)
        return x, probabilities

    def last_norm(self, x):
        return x if self.norm is None else self.norm(x)

    def recomputes(self, layer):
        """What of this layer is not kept but computed again in backward: a granularity or None."""
        return (
            self.recompute_granularity
            if self.recompute and self.training and layer not in self.no_recompute_layers
            else None
        )

    def recomputed(self, function, *arguments):
        """function(*arguments), whose activations are not kept but made again in backward, with the same randomness."""
        number = self.draws.number

        def same(*arguments):
            self.draws.number = number
            return function(*arguments)

        return paddle.distributed.fleet.utils.recompute(same, *arguments)

    def prepare(self, input_ids, position_ids=None, rows=None, caches=None):
        """What the first block reads (B, T, D), and ForwardContext; arguments as in hidden_states()."""
        B, T = input_ids.shape
        kept = isinstance(caches, Cache)
        before = 0 if caches is None else caches.prefix_tokens
        if position_ids is None:
            position_ids = (paddle.arange(T) + (caches.tokens if kept else 0) - before).unsqueeze(0).expand([B, T])
        x = self.embed(input_ids, position_ids, before)
        if self.config.position == "rope_2d" and position_ids.ndim == 2:
            position_ids, rows = self._two_positions(input_ids, position_ids, rows, caches)
        spread = None
        if rows is not None and self.distances_count and kept and before and caches.tokens == before:
            spread = PrefixLayout(position_ids, rows, before)
            caches.rows, caches.tokens, rows = spread.rows, spread.width, spread.rows
        elif kept:
            rows = caches.extend_rows(rows, B, T)
        cos, sin, q_scale = self._turns(position_ids, before, caches)
        narrowed = {
            w: sliding_window_rows(rows, B, caches.tokens if kept else T, w)
            for w in set(self.config.windows) - {None}
            if kept or caches is None
        }
        return x, ForwardContext(cos, sin, q_scale, rows, narrowed, spread)

    def embed(self, input_ids, position_ids, before=0):
        """Ids and positions (B, T) -> (B, T, D), what the first block reads; `before` tokens of a prefix stand in front."""
        config = self.config
        x = self.look_up(input_ids)
        if self.training and self.neftune_noise_alpha:
            size = paddle.sqrt(document_lengths(position_ids).astype("float32") * x.shape[-1]).unsqueeze(
                -1
            )  # (B, T, 1)
            noise = self.noise([*input_ids.shape, x.shape[-1]]).astype(x.dtype)
            x = x + self.kept(noise * (self.neftune_noise_alpha / size).astype(x.dtype))
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            places = self.kept(position_ids) + before + config.position_offset
            x = x + kernels.embedding(places, self.embed_positions.weight)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.recompute and self.training and x.stop_gradient:
            x.stop_gradient = False  # Paddle's recompute passes gradients to adapters only where an input has one
        return x

    def noise(self, shape):
        """NEFTune's, uniform in [-1, 1), for the embeddings of these tokens: shape (B, T, D)."""
        with self.draws.under("noise"):
            return paddle.uniform(shape, "float32", -1.0, 1.0)

    def look_up(self, input_ids):
        """Ids (B, T) -> their rows of the embedding (B, T, D)."""
        return kernels.embedding(input_ids, self.embed_tokens.weight)

    def kept(self, x):
        """The tokens of x (B, T, …) whose activations this model keeps: all of them."""
        return x

    def of_all(self, x, shape):
        """x (N, …) of the tokens whose losses this model computes, rows of this shape -> of all tokens of the batch: they are."""
        return x

    def _two_positions(self, input_ids, position_ids, rows, cache):
        """two_positions(), and for tokens after those that a cache holds: the answer goes on."""
        if cache is None or cache.last is None:
            position_ids, rows = glm_positions_and_mask(self.config, input_ids, position_ids, rows)
        else:
            B, T = input_ids.shape
            steps = paddle.stack([paddle.zeros([T], "int64"), paddle.arange(1, T + 1)], axis=-1)
            position_ids = cache.last.unsqueeze(1) + steps  # (B, T, 2)
            upper = paddle.arange(T, dtype="int32").reshape([1, 1, T, 1]).expand([B, 1, T, 1])
            rows = paddle.full([B, 1, T, 1], np.iinfo(np.int32).max, "int32") if rows is None else rows
            rows = paddle.concat([rows, upper], axis=-1)
        if cache is not None:
            cache.last = position_ids[:, -1]
        return position_ids, rows

    def _turns(self, position_ids, before, cache):
        """cos, sin, and what queries are multiplied by (B, T, 1, 1), or None."""
        config, lengths, q_scale = self.config, None if cache is None else cache.lengths, None
        if config.rope["rope_type"] == "qwen_ntk":
            if self.training:  # trained at its own length, without stretching
                config = dataclasses.replace(config, rope={**config.rope, "rope_type": "default"})
            elif isinstance(cache, Cache):  # keys are kept as they were rotated at first
                lengths = document_lengths(position_ids) + before if lengths is None else lengths
                cache.lengths = lengths[:, -1:]
        if (
            config.logn_length is not None and not self.training
        ):  # Su, "attention from the view of entropy invariance", 2021
            place = (position_ids + before + 1).astype("float32")
            q_scale = paddle.clip(paddle.log(place) / math.log(config.logn_length), min=1.0).unsqueeze(-1).unsqueeze(-1)
        if config.position == "rope_2d":
            before = 0  # a prefix has no place in the context
        return *rope_tables(config, position_ids + before, lengths), q_scale

    def num_parameters(self, trained=False):
        """Of the whole model, also where this process has a part of it. trained: those alone that have a gradient."""
        return sum(math.prod(p.shape) for p in self.parameters() if not (trained and p.stop_gradient))

    def flops_per_token(self, T):
        """Floating-point operations of one token's forward and backward in a causal sequence of T (arXiv 2204.02311, B).

        6 per weight of every linear that a token passes (the head too; embedding look-ups are free), and 12 · H · Dh · T/2
        a layer for attention.
        """
        c = self.config
        share = c.experts.top_k / c.experts.count if c.experts else 1.0
        weights = 0.0
        for name, layer in self.named_sublayers():
            if isinstance(layer, (Linear, QuantLinear)) and "prefix." not in name:
                weights += layer.n_in * layer.n_out * (share if ".experts." in name else 1.0)
        if self.lm_head is None:
            weights += c.vocab_size * self.embed_tokens.weight.shape[1]
        width = c.head_dim if c.latent is None else (c.head_dim + c.latent.value_dim) / 2
        return 6.0 * weights + 6.0 * c.num_hidden_layers * c.num_attention_heads * width * T


Z_LOSS_ROWS = 1024  # tokens whose logits are held at once while the largest is looked for


# The tensors of a QuantLinear: our name, theirs, dtype on disk. (int8 weights lie as [out, in] there, packed ones as here.)
_QUANTIZED = (("qweight", "qweight", None), ("scales", "scales", None), ("qzeros", "qzeros", "int32"),
              ("g_index", "g_idx", "int32"), ("input_scale", "input_scale", "float32"))  # fmt: skip


def build(config, dtype="float32"):
    """A CausalLM whose parameters take no memory until each is set."""
    before = paddle.get_default_dtype()
    try:
        paddle.set_default_dtype(dtype)
        with paddle.LazyGuard():
            model = CausalLM(config)
            if config.quantization is not None:
                _make_room_for_integers(model, config.quantization)
            return model
    finally:
        paddle.set_default_dtype(before)


def _make_room_for_integers(model, quantization):
    """Linears of the blocks become QuantLinear; after a shift, norms have biases and so have the linears they feed."""
    weights_alone, shifted = quantization["quant_method"] == "gptq", set()  # ids of linears
    for block in model.layers if quantization.get("shift") else ():
        layers = dict(block.named_sublayers())
        for norm, names in shiftable_norms(block).items():
            shifted |= {id(layers[name]) for name in names}
            if layers[norm].bias is None:
                layers[norm].add_bias()
    for parent, attribute, layer in block_linears(model).values():
        quantized = QuantLinear(
            layer.n_in,
            layer.n_out,
            f"w{quantization['bits']}" if weights_alone else "a8w8",
            quantization.get("group_size", -1),
            layer.bias is not None or id(layer) in shifted,
            quantization.get("desc_act", False),
            quantization.get("activation") == "per_tensor",
        )
        setattr(parent, attribute, quantized)


_READERS = {  # a norm of a block: the names of all layers that read it
    "attention_norm": r"attention\.(q|k|v|qkv|q_a|kv_a)_proj",
    "attention.q_a_norm": r"attention\.q_b_proj",
    "attention.kv_a_norm": r"attention\.kv_b_proj",
    "mlp_norm": r"mlp\.(.*\.)?(gate_proj|up_proj|gate_up_proj|router|shared_gate)",
}


def norm_consumers(block):
    """{norm: [layer, …]} by their names in a block of floats: norms that feed these layers alone, and no residual."""
    layers = [name for name, layer in block.named_sublayers() if isinstance(layer, Linear)]
    found = {norm: [name for name in layers if re.fullmatch(pattern, name)] for norm, pattern in _READERS.items()}
    if block.place == "after" or block.residual_scale is not None:
        del found["attention_norm"], found["mlp_norm"]
    return {norm: names for norm, names in found.items() if names}


def shiftable_norms(block):
    """Those of norm_consumers() whose output can be moved by a constant: a router has no bias to take it."""
    return {norm: names for norm, names in norm_consumers(block).items() if all(n.endswith("_proj") for n in names)}


def set_parameter(parameter, array):
    """Materialize a lazy parameter, or overwrite one, with numpy values in our layout; one copy of them at a time."""
    if str(parameter.dtype).endswith(f".{array.dtype}"):
        parameter.set_value(np.ascontiguousarray(array))
    else:
        parameter.set_value(paddle.to_tensor(array).astype(parameter.dtype))


def block_linears(model):
    """{Hugging Face module path: (parent layer, attribute, layer)} of every linear of the blocks."""
    layers = dict(model.named_sublayers())
    found = {}
    for ours, theirs, _ in weight_names(model.config):
        path = ours.removesuffix(".weight")
        if ours.startswith("layers.") and ours.endswith("_proj.weight") and path in layers:
            parent, _, attribute = path.rpartition(".")
            found[theirs.removesuffix(".weight")] = (layers[parent], attribute, layers[path])
    return found


# ============================================================================================== generate


@paddle.no_grad()
def generate(
    model,
    input_ids,
    max_new_tokens=64,
    eos_token_id=None,
    attention_mask=None,
    do_sample=False,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    repetition_penalty=1.0,
    seed=0,
):
    """The oracle: one batch, one step after another, nothing clever. Returns (B, T + new) int64 numpy.

    input_ids (B, T) numpy; rows may be padded on the left where attention_mask (B, T) is 0. A row that gave an
    eos_token_id (int or list) is continued with it until all rows are done.
    """
    was_training, ids = model.training, np.asarray(input_ids, np.int64)
    model.eval()
    B, T = ids.shape
    mask = np.ones((B, T), np.int64) if attention_mask is None else np.asarray(attention_mask, np.int64)
    eos = np.array([] if eos_token_id is None else eos_token_id, np.int64).reshape(-1)
    generator = np.random.default_rng(seed)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    rows = np.where(mask[:, None, :, None] == 1, np.iinfo(np.int32).max, 0).astype(np.int32)  # no row sees a padded key
    cache, step_ids, step_positions = model.new_cache(B), ids, positions
    rows, done = None if mask.all() else paddle.to_tensor(rows), np.zeros(B, bool)
    for _ in range(max_new_tokens):
        x = model.hidden_states(paddle.to_tensor(step_ids), paddle.to_tensor(step_positions), rows, cache)[:, -1]
        logits = model.logits(x).astype("float32").numpy()  # (B, V)
        if repetition_penalty != 1.0:
            logits = penalize(
                logits, ids, np.concatenate([mask, np.ones((B, ids.shape[1] - T), int)], 1), repetition_penalty
            )
        next_ids = sample_logits(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
        next_ids = np.where(done, eos[0] if eos.size else 0, next_ids)
        ids, rows = np.concatenate([ids, next_ids[:, None]], 1), None
        done |= np.isin(next_ids, eos)
        step_ids, step_positions = next_ids[:, None], (step_positions[:, -1:] + 1)
        if done.all():
            break
    if was_training:
        model.train()
    return ids
