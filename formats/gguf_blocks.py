"""GGUF's block types: rows of floats <-> blocks of a few bits with their scales, as llama.cpp defines them.

    array = decode(data, "Q4_K")             # bytes of whole blocks -> float32
    data = encode(rows, "Q8_0")              # float32 (…, n), n a multiple of the block -> bytes

A block of the older types is 32 weights with one scale; a block of a k-quant is 256 weights: sub-blocks of 16 or 32,
whose own scales are small integers times the scale of the block. All types of TYPES are read; those of ENCODERS are
written. Q4_0 to Q8_0 are rounded as gguf-py does, to the bit; Q4_K and Q6_K search each sub-block's scale by weighted
least squares, as llama.cpp's reference does.
"""

from collections.abc import Callable

import numpy as np

BLOCK, SUPER = 32, 256  # weights of a block, of a block of a k-quant


def _fields(*fields) -> np.dtype:
    """A packed record; a field is (name, dtype) or (name, dtype, count)."""
    return np.dtype([field if len(field) == 2 else (*field[:2], (field[2],)) for field in fields])


D, M, DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")
TYPES = {  # name: (number in the file, weights of a block, record of a block)
    "F32": (0, 1, np.dtype("<f4")),
    "F16": (1, 1, np.dtype("<f2")),
    "BF16": (30, 1, np.dtype("<u2")),
    "F64": (28, 1, np.dtype("<f8")),
    "Q4_0": (2, BLOCK, _fields(D, ("qs", "u1", 16))),
    "Q4_1": (3, BLOCK, _fields(D, M, ("qs", "u1", 16))),
    "Q5_0": (6, BLOCK, _fields(D, ("qh", "u1", 4), ("qs", "u1", 16))),
    "Q5_1": (7, BLOCK, _fields(D, M, ("qh", "u1", 4), ("qs", "u1", 16))),
    "Q8_0": (8, BLOCK, _fields(D, ("qs", "i1", 32))),
    "Q2_K": (10, SUPER, _fields(("scales", "u1", 16), ("qs", "u1", 64), D, DMIN)),
    "Q3_K": (11, SUPER, _fields(("qh", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), D)),
    "Q4_K": (12, SUPER, _fields(D, DMIN, ("scales", "u1", 12), ("qs", "u1", 128))),
    "Q5_K": (13, SUPER, _fields(D, DMIN, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128))),
    "Q6_K": (14, SUPER, _fields(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), D)),
    "IQ4_NL": (20, BLOCK, _fields(D, ("qs", "u1", 16))),
    "IQ4_XS": (23, SUPER, _fields(D, ("high", "<u2"), ("low", "u1", 4), ("qs", "u1", 128))),
}  # fmt: skip
OTHER_TYPES = {  # of llama.cpp, not read: their numbers
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
NAMES = {number: name for name, (number, _, _) in TYPES.items()}
CHUNK = 1 << 20  # weights worked on at a time: their temporaries stay in the cache and in bounds


def block_size(name: str) -> int:
    """Weights of a block; a row must be a multiple of it."""
    return TYPES[name][1]


def data_bytes(count: int, name: str) -> int:
    """Bytes of `count` weights in whole blocks."""
    _, size, record = TYPES[name]
    return count // size * record.itemsize


# ==================================================================================================== decoding


def _float(field: np.ndarray) -> np.ndarray:
    return field.astype(np.float32)


def _split(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Bytes (n, k) -> integers of `bits` bits (n, k * 8 / bits): of each `run` bytes first all lowest bits, and so
    on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = packed.reshape(len(packed), -1, 1, run) >> shifts
    return (parts & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _fifth_bits(blocks: np.ndarray) -> np.ndarray:
    return np.unpackbits(blocks["qh"], axis=1, bitorder="little") << np.uint8(4)


def _decode_4(blocks, offset, high=None):
    codes = _split(blocks["qs"], 4, 16)
    codes = codes if high is None else codes | high
    if offset is None:  # asymmetric: scale and least value
        return _float(blocks["d"])[:, None] * codes + _float(blocks["m"])[:, None]
    return _float(blocks["d"])[:, None] * (codes.astype(np.int8) - np.int8(offset))


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes of a Q4_K or Q5_K block -> scales and mins of its 8 sub-blocks, 6 bits each, (n, 8)."""
    scales, mins, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    last_scales = (rest & 0x0F) | ((scales >> 2) & 0x30)
    last_mins = (rest >> 4) | ((mins >> 2) & 0x30)
    return np.concatenate([scales & 63, last_scales], 1), np.concatenate([mins & 63, last_mins], 1)


def _affine(blocks, codes, scales, mins):
    """d · scale · code - dmin · min of every sub-block."""
    n, groups = scales.shape
    scale = (_float(blocks["d"])[:, None] * scales)[:, :, None]
    least = (_float(blocks["dmin"])[:, None] * mins)[:, :, None]
    return (scale * codes.reshape(n, groups, -1) - least).reshape(n, -1)


def _decode_q2_k(blocks):
    codes = _split(blocks["qs"], 2, 32)
    return _affine(blocks, codes, blocks["scales"] & 15, blocks["scales"] >> 4)


def _decode_q3_k(blocks):
    packed = blocks["scales"]
    low, high = _split(packed[:, :8], 4, 8), _split(packed[:, 8:], 2, 4)
    scales = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)  # (n, 16)
    has_high = _split(blocks["qh"], 1, 32)  # a bit that is set stands for no offset
    codes = _split(blocks["qs"], 2, 32).astype(np.int8) - ((1 - has_high.astype(np.int8)) << 2)
    scale = (_float(blocks["d"])[:, None] * scales)[:, :, None]
    return (scale * codes.reshape(len(blocks), 16, 16)).reshape(len(blocks), -1)


def _decode_q4_k(blocks):
    return _affine(blocks, _split(blocks["qs"], 4, 32), *_scales_and_mins(blocks["scales"]))


def _decode_q5_k(blocks):
    codes = _split(blocks["qs"], 4, 32) | _split(blocks["qh"], 1, 32) << np.uint8(4)
    return _affine(blocks, codes, *_scales_and_mins(blocks["scales"]))


def _decode_q6_k(blocks):
    codes = _split(blocks["ql"], 4, 64) | _split(blocks["qh"], 2, 32) << np.uint8(4)
    scale = (_float(blocks["d"])[:, None] * blocks["scales"])[:, :, None]
    return (scale * (codes.astype(np.int8) - np.int8(32)).reshape(len(blocks), 16, 16)).reshape(len(blocks), -1)


_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _decode_iq4_nl(blocks):
    return _float(blocks["d"])[:, None] * _IQ4_VALUES[_split(blocks["qs"], 4, 16)]


def _decode_iq4_xs(blocks):
    low = (blocks["low"][:, :, None] >> np.array([0, 4], np.uint8) & 15).reshape(-1, 8)
    high = (blocks["high"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    scales = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    scale = (_float(blocks["d"])[:, None] * scales)[:, :, None]
    return (scale * _IQ4_VALUES[_split(blocks["qs"], 4, 16)].reshape(len(blocks), 8, 32)).reshape(len(blocks), -1)


_DECODERS: dict[str, Callable] = {
    "F32": lambda values: values,
    "F16": _float,
    "F64": _float,
    "BF16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
    "Q4_0": lambda blocks: _decode_4(blocks, 8),
    "Q4_1": lambda blocks: _decode_4(blocks, None),
    "Q5_0": lambda blocks: _decode_4(blocks, 16, _fifth_bits(blocks)),
    "Q5_1": lambda blocks: _decode_4(blocks, None, _fifth_bits(blocks)),
    "Q8_0": lambda blocks: _float(blocks["d"])[:, None] * blocks["qs"],
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
    "IQ4_NL": _decode_iq4_nl,
    "IQ4_XS": _decode_iq4_xs,
}


def decode(data: bytes | np.ndarray, name: str) -> np.ndarray:
    """Bytes of whole blocks -> float32, flat."""
    _, size, record = TYPES[name]
    blocks, step = np.frombuffer(data, record), max(CHUNK // size, 1)
    result = np.empty(len(blocks) * size, np.float32)
    for first in range(0, len(blocks), step):
        part = _DECODERS[name](blocks[first : first + step])
        result[first * size : first * size + part.size] = part.reshape([-1])
    return result


def integers(data: bytes | np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of whole blocks of Q8_0 or Q4_0 -> codes (blocks, 32) uint8, with zero points 128 or 8, and scales
    (blocks,)."""
    blocks = np.frombuffer(data, TYPES[name][2])
    if name == "Q8_0":
        return blocks["qs"].view(np.uint8) ^ np.uint8(128), _float(blocks["d"])
    return _split(blocks["qs"], 4, 16), _float(blocks["d"])


# ==================================================================================================== encoding


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _join(codes: np.ndarray, bits: int, run: int) -> np.ndarray:
    """The inverse of _split()."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = codes.reshape(len(codes), -1, len(shifts), run).astype(np.uint8) << shifts
    return np.bitwise_or.reduce(parts, axis=2).reshape(len(codes), -1)


def _encode_4(rows, blocks, bits, symmetric):
    """Q4_0, Q4_1, Q5_0, Q5_1. Symmetric: the largest weight in size becomes the lowest code."""
    levels = 1 << bits
    if symmetric:
        largest = np.take_along_axis(rows, np.abs(rows).argmax(1, keepdims=True), 1)
        scale = largest / np.float32(-(levels // 2))
        codes = np.trunc(rows * _inverse(scale) + np.float32(levels // 2 + 0.5))
    else:
        least = rows.min(1, keepdims=True)
        scale = (rows.max(1, keepdims=True) - least) / np.float32(levels - 1)
        codes = np.trunc((rows - least) * _inverse(scale) + np.float32(0.5))
        blocks["m"] = least[:, 0]
    codes = codes.clip(0, levels - 1).astype(np.uint8)
    blocks["d"], blocks["qs"] = scale[:, 0], _join(codes & np.uint8(15), 4, 16)
    if bits == 5:
        blocks["qh"] = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


def _encode_q8_0(rows, blocks):
    scale = np.abs(rows).max(1, keepdims=True) / np.float32(127)
    scaled = rows * _inverse(scale)
    size = np.floor(np.abs(scaled))
    blocks["d"] = scale[:, 0]
    blocks["qs"] = np.sign(scaled) * (size + np.floor(2 * (np.abs(scaled) - size)))  # halves away from zero


def _fit_affine(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Sub-blocks (n, k) -> scale and -least value (n,) with x ≈ scale · code - min, codes of 0 to levels, min >= 0.

    21 scales around (max - least) / levels give codes, by the best least value so far; for each, the best scale and
    min by least squares, weighted by |x| + rms(x). The one with the least error is taken.
    """
    weights = np.abs(x) + np.sqrt(np.square(x).mean(1, keepdims=True))
    sum_w, sum_x = weights.sum(1), (weights * x).sum(1)
    most, best_least = x.max(1), np.minimum(x.min(1), 0)
    best_scale = (most - best_least) / levels
    best_error = None
    for step in range(-1, 21):  # -1: the plain scale with its least value as they are
        factor = levels if step < 0 else levels - 1 + 0.1 * step
        codes = np.rint((x - best_least[:, None]) * (factor * _inverse(most - best_least))[:, None]).clip(0, levels)
        scale, low = best_scale, best_least
        if step >= 0:
            weighted = weights * codes
            sum_l, sum_l2, sum_xl = weighted.sum(1), (weighted * codes).sum(1), (weighted * x).sum(1)
            determinant = sum_w * sum_l2 - sum_l * sum_l
            inverse = _inverse(np.maximum(determinant, 0))
            scale = (sum_w * sum_xl - sum_x * sum_l) * inverse
            low = (sum_l2 * sum_x - sum_l * sum_xl) * inverse
            positive = low > 0  # min cannot be negative: fit the scale alone
            scale, low = np.where(positive, sum_xl * _inverse(sum_l2), scale), np.minimum(low, 0)
        error = (weights * np.square(scale[:, None] * codes + low[:, None] - x)).sum(1)
        if best_error is None:
            best_error = error
            continue
        better = (determinant > 0) & (error < best_error)
        best_error = np.where(better, error, best_error)
        best_scale, best_least = np.where(better, scale, best_scale), np.where(better, low, best_least)
    return best_scale, -best_least


def _encode_q4_k(rows, blocks):
    n = len(rows)
    x = rows.reshape(n * 8, 32)
    scales, mins = (fitted.reshape(n, 8) for fitted in _fit_affine(x, 15))
    d, dmin = (np.maximum(values.max(1), 0) / np.float32(63) for values in (scales, mins))
    blocks["d"], blocks["dmin"] = d, dmin
    scales = np.rint(scales * _inverse(d)[:, None]).clip(0, 63).astype(np.uint8)
    mins = np.rint(mins * _inverse(dmin)[:, None]).clip(0, 63).astype(np.uint8)
    scale = (_float(blocks["d"])[:, None] * scales).reshape(n * 8, 1)
    least = (_float(blocks["dmin"])[:, None] * mins).reshape(n * 8, 1)
    codes = np.rint((x + least) * _inverse(scale)).clip(0, 15).reshape(n, SUPER)
    packed = blocks["scales"]
    packed[:, :4] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    packed[:, 4:8] = mins[:, :4] | (mins[:, 4:] >> 4) << 6
    packed[:, 8:] = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    blocks["qs"] = _join(codes, 4, 32)


def _fit_symmetric(x: np.ndarray, half: int) -> np.ndarray:
    """Sub-blocks (n, k) -> scale (n,) with x ≈ scale · code, codes of -half to half - 1; may be negative.

    19 scales around -largest / half; the best by least squares weighted by x².
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
    best_scale = best = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        codes = np.rint(x * (-(half + 0.1 * step) * _inverse(largest))).clip(-half, half - 1)
        weighted = np.square(x) * codes
        sum_xl, sum_l2 = (weighted * x).sum(1), (weighted * codes).sum(1)
        scale = sum_xl * _inverse(sum_l2)
        if best is None:
            best_scale, best = scale, scale * sum_xl
            continue
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        best_scale, best = np.where(better, scale, best_scale), np.where(better, scale * sum_xl, best)
    return best_scale


def _encode_q6_k(rows, blocks):
    n = len(rows)
    x = rows.reshape(n * 16, 16)
    scales = _fit_symmetric(x, 32).reshape(n, 16)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(1, keepdims=True), 1)
    blocks["d"] = largest[:, 0] / np.float32(-128)
    scales = np.rint(scales * (np.float32(-128) * _inverse(largest))).clip(-128, 127)
    blocks["scales"] = scales
    scale = (_float(blocks["d"])[:, None] * scales.astype(np.float32)).reshape(n * 16, 1)
    codes = (np.rint(x * _inverse(scale)).clip(-32, 31) + 32).astype(np.uint8).reshape(n, SUPER)
    blocks["ql"], blocks["qh"] = _join(codes & np.uint8(15), 4, 64), _join(codes >> np.uint8(4), 2, 32)


def _encode_bf16(rows, bits):
    words = rows.view(np.uint32)[:, 0]
    bits[:] = (words + 0x7FFF + ((words >> 16) & 1)) >> 16


def _encode_float(rows, values):
    values[:] = rows[:, 0]


ENCODERS: dict[str, Callable] = {
    "F32": _encode_float,
    "F16": _encode_float,
    "BF16": _encode_bf16,
    "Q4_0": lambda rows, blocks: _encode_4(rows, blocks, 4, True),
    "Q4_1": lambda rows, blocks: _encode_4(rows, blocks, 4, False),
    "Q5_0": lambda rows, blocks: _encode_4(rows, blocks, 5, True),
    "Q5_1": lambda rows, blocks: _encode_4(rows, blocks, 5, False),
    "Q8_0": _encode_q8_0,
    "Q4_K": _encode_q4_k,
    "Q6_K": _encode_q6_k,
}


def encode(array: np.ndarray, name: str) -> np.ndarray:
    """float32 (…, n), n a multiple of block_size(name) -> bytes, flat uint8."""
    _, size, record = TYPES[name]
    assert array.shape[-1] % size == 0, (array.shape, name)
    rows = np.ascontiguousarray(array, np.float32).reshape(-1, size)
    blocks, step = np.zeros(len(rows), record), max(CHUNK // size, 1)
    for first in range(0, len(rows), step):
        ENCODERS[name](rows[first : first + step], blocks[first : first + step])
    return blocks.view(np.uint8)
