"""Positions and masks: rotary tables, ALiBi slopes, ChatGLM-6B's two positions, FlashMask rows of windows and
caches."""

import math

import kernels

import numpy as np
import paddle

from families import ModelConfig, yarn_mscale
from formats.files import UserError

NO_ROW = np.iinfo(np.int32).max  # a FlashMask row that no query stands on: the key is hidden from none

# ============================================================================================ rotary positions


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """(r/2,) float32 angular frequencies of the r rotary dims, and the factor on cos and sin (other than 1 for yarn
    only).

    linear: Chen et al., arXiv 2306.15595. yarn: Peng et al., arXiv 2309.00071, Eq. 22-25. llama3: the rule that Meta
    published with Llama 3.1. dynamic is the default up to max_position_embeddings (see rope_tables).
    """
    rope, dim = config.rope, config.rotary_dim or config.head_dim
    if config.position == "rope_2d":
        dim //= 2  # a half for each of the two positions
    exponent = np.arange(0, dim, 2, dtype=np.float32) / dim
    frequency = (1.0 / np.float32(rope["rope_theta"]) ** exponent).astype(np.float32)
    kind, factor = rope["rope_type"], rope.get("factor")
    if config.position == "rope_2d":  # ChatGLM-6B's code rounds its frequencies to half precision
        return frequency.astype(np.float16).astype(np.float32), 1.0
    if kind == "linear":
        return frequency / np.float32(factor), 1.0
    if kind == "llama3":
        original = rope["original_max_position_embeddings"]
        wavelength = 2 * math.pi / frequency
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)  # 0: scaled fully, 1: not at all
        return ((1 - smooth) * frequency / factor + smooth * frequency).astype(np.float32), 1.0
    if kind == "yarn":
        return _yarn_frequencies(config, frequency)
    return frequency, 1.0


def _yarn_frequencies(config, frequency):
    rope, dim, factor = config.rope, 2 * len(frequency), config.rope["factor"]
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings

    def dim_of(rotations):  # the dim that makes this many rotations over the original context
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


def document_lengths(position_ids: paddle.Tensor) -> paddle.Tensor:
    """(B, T) int64 -> (B, T): the last position of each token's own sample, plus one.

    A sample is a run of consecutive positions; packed rows restart at 0, a cached step is a run of one.
    """
    indices = (position_ids * 0 + 1).cumsum(1)  # (B, T)
    starts = position_ids - indices  # constant within a run
    continues = paddle.concat([starts[:, 1:] == starts[:, :-1], starts[:, :1] != starts[:, :1]], axis=1)
    ends = paddle.where(continues, indices + (1 << 40), indices)
    ends = paddle.cummin(ends.flip(1), axis=1, dtype="int64")[0].flip(1)  # index of the last token of each token's run
    return starts + ends + 1


def rope_tables(config: ModelConfig, position_ids: paddle.Tensor, lengths: paddle.Tensor | None = None) -> tuple:
    """cos and sin, each (B, T, 1, r) float32 for the r rotary dims of a head; (None, None) without rotary positions.

    position_ids (B, T), or for rope_2d (B, T, 2), whose two tables are concatenated. dynamic: past
    max_position_embeddings the base grows with the length of the token's own sample, so that neither padding nor
    packing changes the result. qwen_ntk grows in powers of two. lengths (B, T) or (B, 1): the length each token is
    rotated for (None: that of its sample), see rope_lengths().
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


def rope_lengths(config: ModelConfig, prompt_length: int, positions: np.ndarray) -> np.ndarray | None:
    """(n,) int64: the sequence length that dynamic NTK uses for each token; None where rope does not depend on it.

    positions (n,) of tokens of a text that began with a prompt. Cached keys keep the rotation they were written with:
    a prompt that of its own length, a later token that of the length then (dynamic) or of the prompt's (qwen_ntk).
    """
    if config.rope["rope_type"] == "qwen_ntk":
        return np.full(len(positions), prompt_length, np.int64)
    return np.maximum(positions + 1, prompt_length) if config.rope["rope_type"] == "dynamic" else None


def rope_cache_key(config: ModelConfig, prompt_length: int) -> int:
    """Key under which prompts may share cached blocks: equal keys mean equal rotation."""
    if config.rope["rope_type"] == "qwen_ntk":
        doublings = (prompt_length - 1) // config.rope["original_max_position_embeddings"]
        return doublings.bit_length()
    return max(prompt_length, config.max_position_embeddings) if config.rope["rope_type"] == "dynamic" else 0


def glm_positions_and_mask(
    config: ModelConfig, input_ids: paddle.Tensor, position_ids: paddle.Tensor, mask_rows: paddle.Tensor | None
) -> tuple:
    """ChatGLM-6B's positions (B, T, 2) and FlashMask rows (B, 1, T, 2) of complete samples (Du et al., 2103.10360).

    A sample is a context, whose tokens all see each other, and from <sop> (bos) on an answer, which is causal. The
    first position counts the context and stays at the mask token's index in the answer; the second is 0, then counts
    from 1. The mask token is [gMASK] if there is one, else [MASK]. A sample without <sop> is causal and all context.
    position_ids (B, T) restart at 0 with each sample; mask_rows (B, 1, T, 1), or None, are its causal rows.
    """
    B, T = input_ids.shape
    index = paddle.arange(T).unsqueeze(0).expand([B, T])
    first = paddle.cummax(paddle.where(position_ids == 0, index, paddle.zeros_like(index)), axis=1, dtype="int64")[0]
    absent = paddle.full_like(index, 1 << 40)

    def first_in_sample(matches):  # (B, T): index of the first match in each token's sample; 1 << 40 if it has none
        after = paddle.cummin(paddle.where(matches, index, absent).flip(1), axis=1, dtype="int64")[0].flip(1)
        at = paddle.take_along_axis(after, first, axis=1)
        sample = paddle.take_along_axis(first, at.clip(max=T - 1), axis=1)
        return paddle.where((at < T) & (sample == first), at, absent)

    source = config.source
    vocab_size = source["vocab_size"]
    start = first_in_sample(input_ids == source.get("bos_token_id", vocab_size - 4))
    gmask = first_in_sample(input_ids == source.get("gmask_token_id", vocab_size - 4))
    mask = first_in_sample(input_ids == source.get("mask_token_id", vocab_size - 4))
    mask = paddle.where(gmask < T, gmask, mask)
    mask = paddle.where(mask < T, mask, start)
    in_answer = index >= start
    answered = position_ids - (start - first)  # not index - start: two answers may share a context (dpo.py)
    zero = paddle.zeros_like(index)
    context_position = paddle.where(in_answer, mask - first, position_ids)
    positions = paddle.stack([context_position, paddle.where(in_answer, answered + 1, zero)], axis=-1)
    causal = in_answer | (start >= T)
    upper = paddle.where(causal, index, first)  # rows before it do not see the key
    upper = upper.astype("int32").reshape([B, 1, T, 1])
    lower = paddle.full([B, 1, T, 1], NO_ROW, "int32") if mask_rows is None else mask_rows
    return positions, paddle.concat([lower, upper], axis=-1)


def glm_positions_of_prompt(config: ModelConfig, tokens: list, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (n, 2) int64 and FlashMask rows (1, 1, n, 2) int32 of one text: a prompt, then a causal reply, whose
    second position counts on."""
    prompt, steps = paddle.to_tensor([tokens[:prompt_length]]), np.arange(len(tokens) - prompt_length)
    tensors = glm_positions_and_mask(config, prompt, paddle.arange(prompt_length).unsqueeze(0), None)
    positions, mask_rows = (tensor[0].numpy() for tensor in tensors)
    reply_positions = positions[-1] + np.stack([np.zeros_like(steps), steps + 1], axis=-1)
    reply_rows = np.stack([np.full_like(steps, NO_ROW), prompt_length + steps], axis=-1).astype(np.int32)
    mask_rows = np.concatenate([mask_rows, reply_rows[None]], axis=1)[None]
    return np.concatenate([positions, reply_positions]), mask_rows


# ================================================================================================== mask rows


def sliding_window_rows(mask_rows: paddle.Tensor | None, B: int, num_keys: int, window: int) -> paddle.Tensor:
    """FlashMask rows (B, 1, keys, 1) under which a query also does not see keys `window` or more tokens before it."""
    if mask_rows is not None:
        num_keys = shape_of(mask_rows)[2]
    end = (paddle.arange(num_keys, dtype="int32") + window).reshape([1, 1, -1, 1])
    return end.expand([B, 1, num_keys, 1]) if mask_rows is None else paddle.minimum(mask_rows, end)


def append_mask_rows(
    past_rows: paddle.Tensor | None, mask_rows: paddle.Tensor | None, B: int, past: int, T: int
) -> paddle.Tensor | None:
    """Rows (B, 1, past + T, n) of all keys, from those of `past` keys and of T new ones (None: visible to all)."""
    if past_rows is None and mask_rows is None:
        return None

    def visible(keys, columns):  # with two columns, to every row
        rows = paddle.full([B, 1, keys, 1], NO_ROW, "int32")
        return rows if columns == 1 else paddle.concat([rows, paddle.zeros_like(rows)], axis=-1)

    columns = (mask_rows if mask_rows is not None else past_rows).shape[-1]
    past_rows = visible(past, columns) if past_rows is None else past_rows
    new = visible(T, columns) if mask_rows is None else mask_rows.clip(max=NO_ROW - past) + past
    return paddle.concat([past_rows, new], axis=2)


def shape_of(x: paddle.Tensor) -> list:
    """x.shape, also while a graph is traced, where it is -1 in part."""
    return x.shape if paddle.in_dynamic_mode() else paddle.shape(x)


def alibi_slopes(heads: int) -> np.ndarray:
    """(H,) float32: the rate at which each head's attention falls with distance (Press et al., arXiv 2108.12409, 3)."""
    # If H is not a power of two: the slopes of the power below it, then every other one of the power above it.
    below = 1 << int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / below) for i in range(heads - below)]
    return np.array(slopes, np.float32)


def check_one_sample_a_row(position_ids: paddle.Tensor, labels: paddle.Tensor) -> None:
    """UserError if a row has labels in a second sample, which would be too far from the row's prefix."""
    samples = (position_ids == 0).astype("int64").cumsum(1)
    if bool(((samples > 1) & (labels != -100)).any()):
        raise UserError(
            "prefix tuning of a model with ALiBi or windows: a row holds several samples; put one in each row"
        )
