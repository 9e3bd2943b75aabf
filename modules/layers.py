"""Linears (float and integer), embedding, norm, RNG; and LINEARS, the table that says how every linear is wired."""

import contextlib
import math
import zlib
from collections import namedtuple

import kernels

import numpy as np
import paddle
from paddle import nn

from formats.files import UserError
from formats.tensor_files import float8_values

# What each linear reads, and how it is sharded: the one table that tensor parallelism, quantization, LoRA and the
# memory model look a linear up in, by the last part of our names. input: the norm of the block whose output it reads
# alone; None: no norm. group: linears that read the same input together. parallel: "column" shards its outputs over
# tp, "row" its inputs, "vocab" the ids. units: what a rank has whole ones of. adaptable: LoRA and quantization apply
# to it.
LinearRow = namedtuple("LinearRow", "input group parallel units adaptable", defaults=(None, None, None, None, True))

LINEARS = {
    "q_proj": LinearRow("attention_norm", "qkv", "column", "query heads"),
    "k_proj": LinearRow("attention_norm", "qkv", "column", "key heads"),
    "v_proj": LinearRow("attention_norm", "qkv", "column", "key heads"),
    "qkv_proj": LinearRow("attention_norm", "qkv", "column", "query and key heads"),
    "q_a_proj": LinearRow("attention_norm", "qkv"),
    "kv_a_proj": LinearRow("attention_norm", "qkv"),
    "q_b_proj": LinearRow("attention.q_a_norm", "q_b", "column", "query heads"),
    "kv_b_proj": LinearRow("attention.kv_a_norm", "kv_b", "column", "query heads"),
    "o_proj": LinearRow(None, "o", "row", "query heads"),
    "gate_proj": LinearRow("mlp_norm", "gate_up", "column", "channels"),
    "up_proj": LinearRow("mlp_norm", "gate_up", "column", "channels"),
    "gate_up_proj": LinearRow("mlp_norm", "gate_up", "column", "gate and up channels"),
    "down_proj": LinearRow(None, "down", "row", "channels"),
    "router": LinearRow("mlp_norm", adaptable=False),
    "shared_gate": LinearRow("mlp_norm", adaptable=False),
    "embed_tokens": LinearRow(parallel="vocab", units="ids", adaptable=False),
    "lm_head": LinearRow(parallel="vocab", units="ids", adaptable=False),
}  # fmt: skip


class Linear(nn.Layer):
    """y = x W + b (+ residual) with W (in, out), on kernels.linear. n_in and n_out are those of the whole linear."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        self.weight = self.create_parameter([n_in, n_out])
        self.bias = self.create_parameter([n_out], is_bias=True) if bias else None

    def forward(self, x, residual=None):
        return kernels.linear(x, self.weight, self.bias, residual)

    def product(self, x, bias=None) -> paddle.Tensor:
        """x W, plus a bias if one is given."""
        return kernels.linear(x, self.weight, bias)

    def column_norms(self, weight) -> paddle.Tensor:
        """(out,) lengths of the columns of a matrix of the weight's shape."""
        return weight.norm(axis=0)

    def full_weight(self) -> np.ndarray:
        """(in, out) float32 of the whole linear."""
        return self.weight.astype("float32").numpy()


FLOAT8 = ("fp8", "a8w8_fp8")  # the schemes of a QuantLinear in e4m3
_E4M3 = np.nan_to_num(float8_values(4))  # (256,); no code is NaN


class Float8Weight(kernels.ComputedWeight):
    """The weight of a QuantLinear in e4m3; codes and scales are by output channel."""

    def __init__(self, layer: "QuantLinear"):
        self.layer, self.shape = layer, [layer.n_in, layer.n_out]

    def computed(self, transposed: bool, dtype: str) -> paddle.Tensor:
        codes, scales, values = self.layer.qweight, self.layer.scales, paddle.to_tensor(_E4M3)
        return kernels.dequantize_table(codes, scales, values, *self.shape, transposed, dtype)


class QuantLinear(nn.Layer):
    """y = x W + b with W (in, out) held as integers, on kernels.quant_linear, whose docstring has the layouts.

    scheme "w4" or "w8": only weights, in groups of group_size input rows (-1: one group). "w2" and "w3", which no
    kernel multiplies: so too, and floats are kept from the first product on. scheme "a8w8": weights by output channel,
    activations rounded as well, by input_scale if static_input, else token by token. "fp8" and "a8w8_fp8": the same in
    e4m3, (out, in), for which no processor here has products: weights become floats for each product and are let go.
    """

    def __init__(self, n_in, n_out, scheme, group_size=-1, bias=False, desc_act=False, static_input=False):
        super().__init__()
        self.n_in, self.n_out, self.scheme = n_in, n_out, scheme
        self.group_size = n_in if group_size == -1 else group_size
        tensors = {"qweight": ([n_in, n_out], "int8"), "scales": ([n_out], "float32")}
        if scheme in FLOAT8:
            tensors["qweight"] = ([n_out, n_in], "uint8")
        if static_input and scheme.startswith("a8w8"):
            tensors["input_scale"] = ([1], "float32")
        if scheme[0] == "w":
            bits, groups = int(scheme[1:]), -(-n_in // self.group_size)
            whole = 32 // math.gcd(32, bits)  # so many codes fill whole words
            if n_in % whole or n_out % whole:
                raise UserError(
                    f"a linear of {n_in} x {n_out} cannot be packed to {bits} bits: not multiples of {whole}"
                )
            tensors = {
                "qweight": ([n_in * bits // 32, n_out], "int32"),
                "scales": ([groups, n_out], "float32"),
                "qzeros": ([groups, n_out * bits // 32], "int32"),
                "g_index": ([n_in], "int32"),
            }
        for name, (shape, dtype) in tensors.items():
            self.register_buffer(name, paddle.zeros(shape, dtype))
        for name in {"qzeros", "g_index", "input_scale"} - tensors.keys():
            setattr(self, name, None)
        if self.g_index is not None:
            self.g_index.set_value(paddle.arange(n_in, dtype="int32") // self.group_size)
        # Groups are runs of input rows, or all rows are one group: g_index need not be read.
        self.in_order = self.group_size >= n_in or not desc_act and n_in % self.group_size == 0
        self.bias = self.create_parameter([n_out], is_bias=True) if bias else None
        self.floats = None  # (in, out), with 2 and 3 bits

    def _row_groups(self):
        return None if self.in_order else self.g_index

    def forward(self, x, residual=None):
        y = self.product(x, self.bias)
        return y if residual is None else residual + y

    def product(self, x, bias=None) -> paddle.Tensor:
        """x W, plus a bias if one is given."""
        if self.scheme in ("w2", "w3"):
            self.floats = self.dequantized() if self.floats is None else self.floats
            return kernels.linear(x, self.floats, bias)
        if self.scheme in FLOAT8:
            x = x if self.scheme == "fp8" else kernels.round_to_float8(x, self.input_scale)
            has_gradient = paddle.in_dynamic_mode() and paddle.is_grad_enabled() and not x.stop_gradient
            return kernels.linear(x, Float8Weight(self) if has_gradient else self.dequantized(), bias)
        groups = self._row_groups()
        return kernels.quant_linear(
            x, self.qweight, self.scales, bias, self.scheme, self.qzeros, groups, self.input_scale
        )

    def dequantized(self) -> paddle.Tensor:
        """(in, out) float32: the weight that the codes stand for."""
        if self.scheme in FLOAT8:
            return Float8Weight(self).computed(False, "float32")
        if self.scheme == "a8w8":
            return self.qweight.astype("float32") * self.scales
        bits = int(self.scheme[1:])
        return kernels.dequantize(self.qweight, self.scales, bits, self.qzeros, self._row_groups())

    def full_weight(self) -> np.ndarray:
        """The same as an array."""
        return self.dequantized().numpy()

    def check(self, path, name: str) -> None:
        """UserError if the groups that were read from `path` are not those that forward() assumes."""
        if self.g_index is None:
            return
        rows, last = self.local_rows(), -(-self.n_in // self.group_size) - 1
        groups = self.g_index.numpy()
        if groups.min() < 0 or groups.max() > last:
            raise UserError(f"{path}: {name}.g_idx names group {groups.max()}, {name}.scales has 0 to {last}")
        if self.in_order and not np.array_equal(groups, rows // self.group_size):
            raise UserError(f"{path}: {name}.g_idx is not in order, but desc_act is false")

    def local_rows(self) -> np.ndarray:
        """Indices of the input rows that are here."""
        return np.arange(self.n_in)


class Embedding(nn.Layer):
    """Rows of a table (ids, D)."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = self.create_parameter([count, width])

    def forward(self, ids):
        return kernels.embedding(ids, self.weight)


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
        y = kernels.rms_norm(x, weight, self.epsilon, residual)
        if self.bias is None:
            return y
        return y + self.bias if residual is None else (y[0] + self.bias, y[1])

    def add_bias(self) -> None:
        self.bias = self.create_parameter(self.weight.shape, is_bias=True)


class RNGTracker:
    """Counter-based RNG: a draw depends on (seed, pass, key, shape), so shards reproduce what one process draws."""

    number = 0

    def renew(self) -> None:
        """A new pass begins."""
        self.number = int(paddle.randint(0, (1 << 31) - 1, [1])[0])

    @contextlib.contextmanager
    def fork(self, key: str):
        """Inside, Paddle draws under this key; the generators' states outside are unchanged."""
        states = paddle.get_rng_state("cpu"), paddle.get_rng_state()
        paddle.seed(zlib.crc32(f"{self.number} {key}".encode()))
        try:
            yield
        finally:
            paddle.set_rng_state(states[0], "cpu")
            paddle.set_rng_state(states[1])


def linear_row(path: str) -> LinearRow | None:
    """The row of LINEARS of a layer or parameter, by its path in our names."""
    return LINEARS.get(path.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2])


def set_parameter(parameter: paddle.Tensor, array: np.ndarray) -> None:
    """Materialize a lazy parameter, or overwrite one, with values in our layout; one copy of them at a time."""
    if str(parameter.dtype).endswith(f".{array.dtype}"):
        parameter.set_value(np.ascontiguousarray(array))
    else:
        parameter.set_value(paddle.to_tensor(array).astype(parameter.dtype))
