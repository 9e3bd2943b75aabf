"""Frozen linears whose weights are held in 4 or 8 bits while LoRA trains on them (QLoRA, arXiv 2305.14314).

    round_base(block_linears(model), LowBit("nf4"))     # before load_weights(): each weight is rounded when it is read
    linear = layer.to_linear()               # the floats that the codes stand for

nf4 and fp4 are bitsandbytes' data types, tables and order: the weight as (out, in), flat, in blocks of `blocksize`
with one float32 scale each, the block's largest value in size; two codes a byte, the first in the high bits. With
double_quant the scales themselves are 8 bits, in blocks of 256 (bitsandbytes' dynamic map). weight_only_int8 and
weight_only_int4 are Paddle's: symmetric, one scale an output channel.

Bits per weight, blocks of 64: nf4 4.5, with double_quant 4.127; weight_only_int8 8, weight_only_int4 4.

A weight is dequantized for a product and let go again, in backward once more: nothing in float outlives an operation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import kernels

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from formats.files import UserError
from modules.layers import Linear, set_parameter

# The 16 values of a normal distribution with equal shares between them, 0 among them (QLoRA, appendix E).
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
_FP4 = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]  # of 12; codes 8 to 15 are negative
TABLES = {
    "nf4": np.array(NF4, np.float32),
    "fp4": np.array([*_FP4, *(-value for value in _FP4)], np.float32) / np.float32(12),
    "weight_only_int4": np.arange(-8, 8).astype(np.float32),
    "weight_only_int8": np.arange(-128, 128).astype(np.float32),
}
ALGORITHMS = tuple(TABLES)


@dataclasses.dataclass(frozen=True)
class LowBit:
    """How the weights of a base are held; the fields are PaddleNLP's keys without "qlora_weight_"."""

    algo: str  # of ALGORITHMS
    blocksize: int = 64  # nf4, fp4
    double_quant: bool = False
    double_quant_block_size: int = 256

    @staticmethod
    def of(args: object) -> "LowBit | None":
        """From a script's arguments; None: the base stays in float."""
        if getattr(args, "weight_quantize_algo", None) is None:
            return None
        names = ("blocksize", "double_quant", "double_quant_block_size")
        return LowBit(args.weight_quantize_algo, *(getattr(args, f"qlora_weight_{name}") for name in names))

    @property
    def is_blockwise(self) -> bool:
        return self.algo in ("nf4", "fp4")

    @property
    def bits(self) -> int:
        return 8 if self.algo == "weight_only_int8" else 4

    @property
    def bytes_per_weight(self) -> float:
        """Codes and scales; those of output channels are too few to count."""
        scales = 4.0 if not self.double_quant else 1.0 + 4.0 / self.double_quant_block_size
        return self.bits / 8 + self.is_blockwise * scales / self.blocksize


# ======================================================================================================= rounding


@functools.cache
def _nearest(algo: str) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints between the sorted values of a table, and their codes in that order. -0 of fp4 is not used."""
    table = TABLES[algo]
    codes = np.argsort(table, kind="stable").astype(np.uint8)
    codes = codes[codes != 8] if algo == "fp4" else codes
    return (table[codes[1:]] + table[codes[:-1]]) / 2, codes


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values in -1 … 1 of bitsandbytes' 8-bit dynamic data type (arXiv 2110.02861): for each of 7 powers of
    ten a linear run of means, twice as many from one to the next, with 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        means = np.float32(10.0 ** (i - 6)) * ((edges[1:] + edges[:-1]) / 2)
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def _blocks(flat: np.ndarray, size: int) -> np.ndarray:
    """(blocks, size), the last filled up with zeros."""
    return np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


def _round_to(values: np.ndarray, midpoints: np.ndarray) -> np.ndarray:
    """Index of the nearest of the sorted values; a midpoint goes to the lower one."""
    return np.searchsorted(midpoints, values, side="left")


def round_weight(
    weight: np.ndarray, low_bit: LowBit, largest: Callable[[np.ndarray], np.ndarray] = lambda found: found
) -> dict[str, np.ndarray]:
    """A weight (out, in) float32 -> its codes (uint8) and scales.

    largest: of an output channel's largest value here, the one of all ranks that hold a part of it.

    codes: two a byte, or one with 8 bits. absmax: float32, one a block (nf4, fp4) or output channel; with double_quant
    its own codes, whose float32 scales and mean are absmax_scales and absmax_mean.
    """
    n_out, n_in = weight.shape
    size = low_bit.blocksize if low_bit.is_blockwise else n_in
    blocks = _blocks(np.ascontiguousarray(weight, np.float32).reshape(-1), size)
    absmax = np.abs(blocks).max(1)
    if low_bit.is_blockwise:
        inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
        midpoints, order = _nearest(low_bit.algo)
        codes = np.empty(blocks.shape, np.uint8)
        for first in range(0, len(blocks), 4096):  # the indices of searchsorted have 8 bytes
            part = blocks[first : first + 4096] * inverse[first : first + 4096, None]
            codes[first : first + 4096] = order[_round_to(part, midpoints)]
    else:
        half = 2 ** (low_bit.bits - 1)
        absmax = np.maximum(largest(absmax), np.float32(1e-8)) / np.float32(half - 1)
        codes = (np.rint(blocks / absmax[:, None]).clip(1 - half, half - 1) + half).astype(np.uint8)
    flat = codes.reshape(-1)
    if low_bit.bits == 4:
        flat = np.pad(flat, (0, len(flat) % 2))
        flat = flat[::2] << np.uint8(4) | flat[1::2]
    if not (low_bit.double_quant and low_bit.is_blockwise):
        return {"codes": flat, "absmax": absmax}
    mean = np.float32(absmax.mean())
    nested, values = _blocks(absmax - mean, low_bit.double_quant_block_size), dynamic_map()
    scales = np.abs(nested).max(1)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    indices = _round_to(nested * inverse[:, None], (values[1:] + values[:-1]) / 2).astype(np.uint8)
    return {
        "codes": flat,
        "absmax": indices.reshape(-1)[: len(absmax)],
        "absmax_scales": scales,
        "absmax_mean": np.array([mean], np.float32),
    }


# ====================================================================================================== the layer


class RoundedWeight(kernels.ComputedWeight):
    """Stands for the weight (in, out) of a LowBitLinear where others read or set a parameter, or multiply by it."""

    dtype, grad = paddle.float32, None

    def __init__(self, layer: "LowBitLinear"):
        self.layer, self.shape, self.shard_spec = layer, layer.shape, layer.shard_spec

    def computed(self, transposed: bool, dtype: str) -> paddle.Tensor:
        return self.layer.dequantized(transposed, dtype)

    def set_value(self, array) -> None:
        """Round and keep (in, out) values."""
        self.layer.set_weight(np.asarray(array, np.float32).T)

    def astype(self, dtype) -> paddle.Tensor:
        return self.layer.dequantized().astype(dtype)

    def numpy(self) -> np.ndarray:
        return self.layer.dequantized().numpy()

    def _is_initialized(self) -> bool:
        return True


class LowBitLinear(nn.Layer):
    """y = x W + b with a frozen W (in, out) that is held as codes; the gradient reaches x alone (and the bias).

    shape: [in, out] here; n_in and n_out are those of the whole linear. on_rounded: called with what rounding takes
    from a weight that is set, (in, out) float32.
    """

    on_rounded, shard_spec = None, None

    def __init__(self, linear: Linear, low_bit: LowBit):
        super().__init__()
        self.n_in, self.n_out, self.low_bit, self.bias = linear.n_in, linear.n_out, low_bit, linear.bias
        self.shape = n_in, n_out = list(linear.weight.shape)
        self.__dict__["replaced"] = linear  # no sublayer: its weight has no values
        if low_bit.algo == "weight_only_int4" and n_in % 2:
            raise UserError(f"weight_only_int4: a linear of {n_in} inputs: two codes a byte need an even number")
        count = n_in * n_out
        size = low_bit.blocksize if low_bit.is_blockwise else n_in
        blocks = -(-count // size)
        shapes = {"codes": (-(-blocks * size * low_bit.bits // 8), "uint8"), "absmax": (blocks, "float32")}
        if low_bit.double_quant and low_bit.is_blockwise:
            nested = -(-blocks // low_bit.double_quant_block_size)
            shapes["absmax"] = blocks, "uint8"
            shapes |= {"absmax_scales": (nested, "float32"), "absmax_mean": (1, "float32")}
        for name, (length, dtype) in shapes.items():
            self.register_buffer(name, paddle.zeros([length], dtype))

    @property
    def weight(self) -> RoundedWeight:
        return RoundedWeight(self)

    def set_weight(self, weight: np.ndarray) -> None:
        """Round and keep a weight (out, in)."""
        for name, array in round_weight(weight, self.low_bit, self.largest).items():
            getattr(self, name).set_value(array)
        if self.on_rounded is not None:
            self.on_rounded(weight.T - self.dequantized().numpy())

    def largest(self, found: np.ndarray) -> np.ndarray:
        """(out,) the largest values of the output channels, of those of the inputs that are here."""
        return found

    def scales(self) -> paddle.Tensor:
        """(blocks,) float32."""
        if self.absmax.dtype != paddle.uint8:
            return self.absmax
        values = F.embedding(self.absmax.astype("int32"), paddle.to_tensor(dynamic_map()[:, None]))[:, 0]
        size, count = self.low_bit.double_quant_block_size, len(values)
        values = F.pad(values, [0, -count % size]).reshape([-1, size]) * self.absmax_scales.unsqueeze(1)
        return values.reshape([-1])[:count] + self.absmax_mean

    def dequantized(self, transposed: bool = False, dtype: str = "float32") -> paddle.Tensor:
        """(in, out), or (out, in): the weight that the codes stand for."""
        with paddle.no_grad():
            values, (n_in, n_out) = paddle.to_tensor(TABLES[self.low_bit.algo]), self.shape
            return kernels.dequantize_table(self.codes, self.scales(), values, n_in, n_out, transposed, dtype)

    def forward(self, x, residual=None):
        y = self.product(x, self.bias)
        return y if residual is None else residual + y

    def product(self, x, bias=None) -> paddle.Tensor:
        """x W, plus a bias if one is given."""
        return kernels.linear(x, self.weight, bias)

    def column_norms(self, weight) -> paddle.Tensor:
        """(out,) lengths of the columns of a matrix of the weight's shape."""
        return weight.norm(axis=0)

    def full_weight(self) -> np.ndarray:
        """(in, out) float32 of the whole linear."""
        return self.dequantized().numpy()

    def to_linear(self) -> Linear:
        """The linear that this one replaced, with the floats that the codes stand for."""
        set_parameter(self.replaced.weight, self.dequantized().numpy())
        return self.replaced

    def nbytes(self) -> int:
        return sum(buffer.size * buffer.element_size() for buffer in self.buffers())


def round_base(linears: dict[str, tuple], low_bit: LowBit) -> None:
    """Replace linears by LowBitLinears: lazy ones before their weights are read, others as they are now.

    linears: model.block_linears(). Embedding, head, norms, routers and biases stay in float.
    """
    for path, (parent, attribute, linear) in linears.items():
        cls = LowBitLinear if type(linear) is Linear else getattr(linear, "rounded_class", None)
        if cls is None:
            raise UserError(f"weight_quantize_algo: {path} is a {type(linear).__name__}: it cannot be rounded again")
        layer = cls(linear, low_bit)
        if linear.weight._is_initialized():
            layer.set_weight(linear.weight.astype("float32").numpy().T)
            linear.weight._clear_data()
        setattr(parent, attribute, layer)


def describe(model: nn.Layer) -> str:
    """A line on the rounded linears of a model and what they take."""
    layers = [layer for layer in model.sublayers() if isinstance(layer, LowBitLinear)]
    count, size = sum(math.prod(x.shape) for x in layers), sum(x.nbytes() for x in layers)
    name = layers[0].low_bit.algo
    return (
        f"base: {len(layers)} linears ({count:,} weights) in {name}, {8 * size / count:.3f} bits a weight: "
        f"{size / 1e6:,.1f} MB instead of {4 * count / 1e6:,.1f} MB in float32"
    )
