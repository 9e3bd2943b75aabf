"""Float weights to the integers of kernels.quant_linear, to nearest: grids, codes, packing. Numpy, no model.

A weight is (in, out). Its groups are sets of input rows; each has one scale and one zero point per output:
w[i, o] ~ scales[g[i], o] * (codes[i, o] - zeros[g[i], o]), codes in 0 … 2^bits - 1.
"""

from typing import NamedTuple

import numpy as np

from formats.files import UserError


class QuantizedWeight(NamedTuple):
    codes: np.ndarray  # (in, out) uint8
    scales: np.ndarray  # (groups, out) float32 that are exact in float16, in which they are stored
    zeros: np.ndarray  # (groups, out) int32, 1 … 2^bits - 1
    groups: np.ndarray  # (in,) int32: the group of each input row

    def weight(self):
        """(in, out) float32: what the codes stand for."""
        return self.scales[self.groups] * (self.codes.astype(np.float32) - self.zeros.astype(np.float32)[self.groups])


def qparams(rows: np.ndarray, bits: int, sym: bool, shrink: float = 1.0) -> tuple:
    """(scale, zero), each (out,) of a group's rows (n, out), so that shrink · its range fits the codes.

    Symmetric: zero = 2^(bits-1), and the range is 2^bits - 1 steps with half a step clipped at the upper end, as in
    GPTQ's own code. The zero point is never 0: files store it minus one, unsigned, and readers disagree on -1.
    """
    top = 2**bits - 1
    low, high = np.minimum(rows.min(0), 0.0) * shrink, np.maximum(rows.max(0), 0.0) * shrink
    if sym:
        scale, zero = 2 * np.maximum(-low, high) / top, np.full(low.shape, 2 ** (bits - 1), np.int32)
    else:
        scale = (high - low) / top
        with np.errstate(invalid="ignore", divide="ignore"):
            zero = np.clip(np.nan_to_num(np.rint(-low / scale), nan=1.0), 0, top)
        scale, zero = np.where(zero == 0, high / (top - 1), scale), np.maximum(zero, 1).astype(np.int32)
    return stored_scale(scale), zero


def stored_scale(scale: np.ndarray) -> np.ndarray:
    """float32 scales rounded to float16; 1 for a group of zeros, whose codes all equal its zero point."""
    with np.errstate(over="ignore"):  # overflow becomes infinity, which is refused below
        rounded = scale.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise UserError(f"a weight is too large for float16 scales: its scale would be {scale.max():g}")
    return np.where(rounded > 0, rounded, np.float32(1.0))


def steps_of(rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes less zero, in the dtype of rows (…, out), for scale and zero (out,)."""
    zero, steps = zero.astype(rows.dtype), rows / scale
    np.rint(steps, out=steps)
    np.maximum(steps, -zero, out=steps)
    return np.minimum(steps, 2**bits - 1 - zero, out=steps)


def quantize_to_codes(rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes, uint8, of rows (…, out) for scale and zero (out,)."""
    return (steps_of(rows, scale, zero, bits) + zero).astype(np.uint8)


def group_numbers(n: int, group_size: int) -> np.ndarray:
    """(n,) int32: the group of each row if groups are runs of group_size rows (-1: one group); the last may be
    shorter."""
    return (np.arange(n) // (n if group_size == -1 else group_size)).astype(np.int32)


def round_to_nearest(weight: np.ndarray, bits: int, group_size: int = -1, sym: bool = True) -> QuantizedWeight:
    """QuantizedWeight of a weight (in, out) float32: every value to its nearest code."""
    groups = group_numbers(len(weight), group_size)
    codes, scales, zeros = np.empty(weight.shape, np.uint8), [], []
    size = len(weight) if group_size == -1 else group_size
    for first in range(0, len(weight), size):
        rows, into = weight[first : first + size], codes[first : first + size]
        scale, zero = qparams(rows, bits, sym)
        for n in range(0, weight.shape[1], 1024):  # not all columns at once: what is between is in float64
            some = np.s_[n : n + 1024]
            into[:, some] = quantize_to_codes(rows[:, some], scale[some], zero[some], bits)
        scales.append(scale)
        zeros.append(zero)
    return QuantizedWeight(codes, np.stack(scales), np.stack(zeros), groups)


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes (n, out) uint8 -> int32 (n · bits/32, out): a stream of bits along the rows, the first in the lowest."""
    if bits == 3:  # a code may lie in two words
        of_codes = np.unpackbits(
            codes.astype(np.uint8).T[..., None], axis=-1, count=bits, bitorder="little"
        )  # (out, n, bits)
        stream = np.packbits(of_codes.reshape(codes.shape[1], -1), axis=1, bitorder="little")
        return np.ascontiguousarray(stream.view(np.int32).T)
    per_word = 32 // bits
    words = codes.astype(np.uint32).reshape(-1, per_word, codes.shape[1])
    shifts = (bits * np.arange(per_word, dtype=np.uint32))[:, None]
    return np.bitwise_or.reduce(words << shifts, axis=1).view(np.int32)


def pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """zeros (groups, out) -> int32 (groups, out · bits/32): each less one, packed along the outputs."""
    return np.ascontiguousarray(pack_rows(np.ascontiguousarray((zeros - 1).T), bits).T)


def int8_weight(weight: np.ndarray) -> tuple:
    """Codes (in, out) int8 in -127 … 127 and scales (out,) float32."""
    scales = (np.abs(weight).max(0) / 127).astype(np.float32)
    scales = np.where(scales > 0, scales, np.float32(1.0))
    return np.clip(np.rint(weight / scales), -127, 127).astype(np.int8), scales


def rounded_tensors(weight: np.ndarray, scheme: str, group_size: int = -1) -> dict[str, np.ndarray]:
    """The tensors of a QuantLinear for a weight (in, out) float32 rounded to nearest; scheme "w8", "w4" or "a8w8"."""
    if scheme == "a8w8":
        codes, scales = int8_weight(weight)
        return {"qweight": codes, "scales": scales}
    bits = int(scheme[1:])
    found = round_to_nearest(weight, bits, group_size)
    return {
        "qweight": pack_rows(found.codes, bits),
        "scales": found.scales,
        "qzeros": pack_zeros(found.zeros, bits),
        "g_index": found.groups,
    }
