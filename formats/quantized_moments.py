"""Optimizer moments in 8 or 4 bits (ckpt_quant_stage), PaddleNLP's scheme.

    entry = quantized_moments(names, shape, sources, moment_bits=8)    # a SaveEntry of both moments of a weight
    m, v = dequantize_8(*quantize_8(m, v))                             # quantize_4, dequantize_4

The first moment m is stored in equal steps up to its largest absolute value; of the second moment v, the ratio
1 / (sqrt(v) + 1e-8) that Adam multiplies by is stored in equal steps between its extremes. O1: 8 bits, scales per row
of the stored layout (outputs). O2: 4 bits, scales per 32 elements of a row, both numbers in one byte under the first
moment's name. Scales are float32: NAME@scales of m, NAME@min_scales and NAME@max_scales of v.
"""

import numpy as np

from formats.weights import SaveEntry, SaveSource

GROUP = 32

MOMENT_BITS = {"O0": 32, "O1": 8, "O2": 4}  # ckpt_quant_stage: bits of a stored moment

MAX_QUANTIZATION_TIMES = 1  # moments that come from a quantized checkpoint are not quantized again


def quantized_moments(names: list[str], shape: list[int], sources: list[SaveSource], moment_bits: int) -> SaveEntry:
    """The SaveEntry of both moments (names, sources) of a weight of this stored shape, in 8 or 4 bits."""
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    scale_shape = [rows] if moment_bits == 8 else [rows, -(-columns // GROUP)]
    tensors = {names[0]: (shape, "int8")}
    if moment_bits == 8:
        tensors[names[1]] = (shape, "uint8")
    for name in (f"{names[0]}@scales", f"{names[1]}@min_scales", f"{names[1]}@max_scales"):
        tensors[name] = (scale_shape, "float32")
    return SaveEntry(tensors, sources, quantize_8 if moment_bits == 8 else quantize_4)


def quantize_8(m: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Moments (…, n) -> [int8 m, uint8 ratio, scales of m, min and max of ratio (rows,)]."""
    shape, n = m.shape, m.shape[-1]
    m, ratio = m.reshape([-1, n]), _ratio(v.reshape([-1, n]))
    scales, low, high = _scales(m, ratio)
    m = np.round(m / scales * 127).astype(np.int8)
    ratio = np.round((ratio - low) / np.maximum(high - low, 1e-30) * 255).astype(np.uint8)
    return [m.reshape(shape), ratio.reshape(shape), scales[:, 0], low[:, 0], high[:, 0]]


def dequantize_8(
    m: np.ndarray, ratio: np.ndarray, scales: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What quantize_8 returns -> float32 moments (…, n)."""
    shape, scales, low, high = m.shape, scales[:, None], low[:, None], high[:, None]
    m, ratio = m.reshape([-1, shape[-1]]).astype(np.float32), ratio.reshape([-1, shape[-1]]).astype(np.float32)
    return (m / 127 * scales).reshape(shape), _second_moment(ratio / 255 * (high - low) + low).reshape(shape)


def quantize_4(m: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Moments (…, n) -> [int8: m in the upper 4 bits, ratio in the lower; scales, min, max of ratio (rows, n / 32)]."""
    shape, n = m.shape, m.shape[-1]
    m, ratio = _grouped(m), _grouped(_ratio(v))
    scales, low, high = _scales(m, ratio)
    m = np.round(m / scales * 7).astype(np.int8)
    ratio = np.round((ratio - low) / np.maximum(high - low, 1e-30) * 15).astype(np.int8)
    packed = ((m << 4) | ratio).reshape([-1, scales.shape[1] * GROUP])[:, :n].reshape(shape)
    return [packed, scales[..., 0], low[..., 0], high[..., 0]]


def dequantize_4(
    packed: np.ndarray, scales: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What quantize_4 returns -> float32 moments (…, n)."""
    shape, n = packed.shape, packed.shape[-1]
    packed, scales, low, high = _grouped(packed), scales[..., None], low[..., None], high[..., None]
    m = (packed >> 4).astype(np.float32) / 7 * scales
    ratio = (packed & 15).astype(np.float32) / 15 * (high - low) + low
    return tuple(x.reshape([len(x), -1])[:, :n].reshape(shape) for x in (m, _second_moment(ratio)))


def _grouped(x: np.ndarray) -> np.ndarray:
    """(…, n) -> (rows, groups, 32), the last group padded by its row's last element."""
    x = x.reshape([-1, x.shape[-1]])
    return np.pad(x, [(0, 0), (0, -x.shape[1] % GROUP)], "edge").reshape([len(x), -1, GROUP])


def _scales(m: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest |m|, smallest and largest ratio along the last dim, which stays with size 1."""
    largest = np.abs(m).max(-1, keepdims=True)
    return np.where(largest > 0, largest, np.float32(1e-8)), ratio.min(-1, keepdims=True), ratio.max(-1, keepdims=True)


def _ratio(v: np.ndarray) -> np.ndarray:
    return 1 / (np.sqrt(v) + np.float32(1e-8))


def _second_moment(ratio: np.ndarray) -> np.ndarray:
    """The inverse of _ratio."""
    return np.maximum(1 / ratio - np.float32(1e-8), 0) ** 2
