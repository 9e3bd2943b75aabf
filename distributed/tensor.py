"""Tensor parallelism: heads, channels and vocabulary sharded over tp; sequence parallelism (arXiv 1909.08053,
2205.05198)."""

import math
from collections import namedtuple

import kernels

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from adapters import LoRALinear
from distributed.collectives import (
    Axis,
    ShardSpec,
    _AllGather,
    _CopyToRegion,
    _ReduceFromRegion,
    _ReduceScatter,
    gather_full_tensor,
    pad_to_multiple,
    recast,
)
from distributed.pipeline import MissingLayer
from families import ModelConfig
from formats.files import UserError
from formats.quantization_config import all_bits
from model import LINEARS, Attention, CausalLM, Embedding, Linear, QuantLinear, set_parameter
from modules.low_bit import LowBit, LowBitLinear

# ================================================================================ into a region of tp, and out of it
#
# A region is what each rank computes with its heads, channels or ids: attention, an MLP, the head. Outside, ranks of tp
# compute the same; or, with sequence parallelism, each the norms and residuals of its T/tp tokens.


def copy_to_tp_region(x: paddle.Tensor, layout: object, tp: Axis) -> paddle.Tensor:
    """(B, T, D), or (B, T/tp, D) with sequence parallelism -> (B, T, D); gradients are added up over tp."""
    if tp.size == 1:
        return x
    if tp.sequence_parallel and layout is not None:
        return gather_from_sequence_region(x, layout, tp, sum_gradients=True)
    return _CopyToRegion.apply(x, tp)


def reduce_from_tp_region(x: paddle.Tensor, tp: Axis) -> paddle.Tensor:
    """(B, T, D) partial over tp -> their sum (B, T, D), or with sequence parallelism this rank's (B, T/tp, D) of it."""
    if tp.size == 1:
        return x
    if tp.sequence_parallel:
        return _ReduceScatter.apply(pad_to_multiple(x, tp.size), tp, 1)
    return _ReduceFromRegion.apply(x, tp)


def scatter_to_sequence_region(x: paddle.Tensor, tp: Axis) -> paddle.Tensor:
    """(B, T, …), the same on every rank -> (B, T/tp, …) with sequence parallelism."""
    return tp.local_chunk(pad_to_multiple(x, tp.size), 1) if tp.size > 1 and tp.sequence_parallel else x


def gather_from_sequence_region(x: paddle.Tensor, layout: object, tp: Axis, sum_gradients: bool) -> paddle.Tensor:
    """(B, T/tp, …) -> (B, T, …). sum_gradients: ranks use different parts of the result."""
    x = _AllGather.apply(x, tp, 1, sum_gradients)
    return x if x.shape[1] == layout.local_seq_len else x[:, : layout.local_seq_len]


# ============================================================================================= which part a rank has

COLUMN_PARALLEL = tuple(name for name, row in LINEARS.items() if row.parallel == "column")  # outputs are sharded
ROW_PARALLEL = tuple(name for name, row in LINEARS.items() if row.parallel == "row")  # inputs are sharded


def local_heads(config: ModelConfig, size: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((first, stop) of the query heads, (first, stop) of the key heads) of a rank of `size`.

    A rank has whole groups of a key head and its queries, spread evenly. With fewer key heads than ranks it has one key
    head, which other ranks have too, and some of its queries.
    """
    H, K = config.num_attention_heads, config.num_key_value_heads
    G = H // K
    if K >= size:
        first, stop = rank * K // size, (rank + 1) * K // size
        return (first * G, stop * G), (first, stop)
    key = rank * K // size
    same_key = [r for r in range(size) if r * K // size == key]
    first, stop = (key * G + (same_key.index(rank) + i) * G // len(same_key) for i in (0, 1))
    return (first, stop), (key, key + 1)


def shard_ranges(name: str, width: int, config: ModelConfig, size: int, rank: int) -> list[tuple[int, int]]:
    """[(start, stop), …] of the sharded dim, `width` wide, of the linear of this name on a rank of `size`."""
    units = LINEARS[name].units
    H, K, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    queries, keys = local_heads(config, size, rank)

    def of_heads(heads, Dh, start=0):
        return start + heads[0] * Dh, start + heads[1] * Dh

    def evenly(first, stop, unit):
        n = (stop - first) // unit
        return first + rank * n // size * unit, first + (rank + 1) * n // size * unit

    if units == "query heads":
        return [of_heads(queries, width // H)]
    if units == "key heads":
        return [of_heads(keys, Dh)]
    if units == "query and key heads" and config.fused_qkv == "blocks":
        return [of_heads(queries, Dh), of_heads(keys, Dh, H * Dh), of_heads(keys, Dh, (H + K) * Dh)]
    if units == "query and key heads":  # each key head's queries, its key, its value
        G, ranges = H // K, []
        for k in range(*keys):
            start = k * (G + 2)
            first, stop = max(queries[0], k * G) - k * G, min(queries[1], (k + 1) * G) - k * G
            ranges += [(start + first, start + stop), (start + G, start + G + 2)]
        return [(a * Dh, b * Dh) for a, b in _join_adjacent(ranges)]
    if units == "gate and up channels":
        unit = packed_channels(config)
        return [evenly(0, width // 2, unit), evenly(width // 2, width, unit)]
    return [evenly(0, width, packed_channels(config) if units == "channels" else 1)]


def packed_channels(config: ModelConfig) -> int:
    """Channels whose weights are packed into one word, and so stay together."""
    quantization = config.quantization
    return 32 // all_bits(quantization)[0] if quantization and quantization["quant_method"] == "gptq" else 1


def _join_adjacent(ranges):
    joined = [list(ranges[0])]
    for first, stop in ranges[1:]:
        if first == joined[-1][1]:
            joined[-1][1] = stop
        else:
            joined.append([first, stop])
    return [tuple(r) for r in joined]


def shard_spec_of(name: str, shape: list, config: ModelConfig, tp: Axis) -> ShardSpec:
    """Which part of the weight (shape of the whole one) of the linear or embedding of this name each rank of tp has."""
    dim = 0 if name in ROW_PARALLEL or name == "embed_tokens" else 1
    ranges = [shard_ranges(name, shape[dim], config, tp.size, rank) for rank in range(tp.size)]
    return ShardSpec(dim, ranges, tp.rank, shape)


def shard_parameter(layer: paddle.nn.Layer, parameter: paddle.Tensor, spec: ShardSpec) -> paddle.Tensor:
    """This rank's part of a whole parameter, as a parameter of the layer; without values if that has none yet."""
    shape = [spec.width if dim == spec.dim else n for dim, n in enumerate(spec.shape)]
    if parameter._is_initialized():
        values = spec.slice(parameter.numpy())
        shard = layer.create_parameter(shape, dtype=parameter.dtype)
        set_parameter(shard, values)
    else:
        with paddle.LazyGuard():
            shard = layer.create_parameter(shape, dtype=parameter.dtype)
    shard.shard_spec, shard.stop_gradient = spec, parameter.stop_gradient
    return shard


# ====================================================================================================== sharded layers


def reduce_output(
    y: paddle.Tensor, tp: Axis, bias: paddle.Tensor | None, residual: paddle.Tensor | None
) -> paddle.Tensor:
    """y partial over tp -> its sum, then the bias and the residual, which are added once."""
    y = reduce_from_tp_region(y, tp)
    y = y if bias is None else y + bias
    return y if residual is None else residual + y


class ColumnParallelLinear(Linear):
    """A linear with this rank's outputs: (…, in) -> (…, out/tp)."""

    @classmethod
    def from_linear(cls, linear: Linear, spec: ShardSpec, tp: Axis) -> "ColumnParallelLinear":
        layer = recast(linear, cls)
        layer.tp, layer.shard_spec = tp, spec
        layer.weight = shard_parameter(layer, linear.weight, spec)
        if spec.dim == 1 and layer.bias is not None:
            layer.bias = shard_parameter(layer, layer.bias, spec.of(0, layer.bias.shape))
        return layer

    def full_weight(self) -> np.ndarray:
        return gather_full_tensor(self.weight.astype("float32"), self.weight.shard_spec, self.tp)


class RowParallelLinear(ColumnParallelLinear):
    """A linear with this rank's inputs: (…, in/tp) -> (…, out); reduce False: partial over tp, a MoE adds up later."""

    reduce = True

    def forward(self, x, residual=None):
        if not self.reduce:
            y = self.product(x, self.bias)
            return y if residual is None else residual + y
        return reduce_output(self.product(x), self.tp, self.bias, residual)

    def column_norms(self, weight) -> paddle.Tensor:
        return paddle.sqrt(self.tp.all_reduce(weight.square().sum(0)))


def cut_blocks(spec: ShardSpec, low_bit: LowBit) -> str | None:
    """Why the ranks' parts of a weight (in, out) would not be rounded as the whole weight is; None: they are."""
    if not low_bit.is_blockwise:
        return None  # a scale for each output channel, see LowBitLinear.largest()
    if low_bit.double_quant:
        return (
            "qlora_weight_double_quant: scales that share a scale would be on several ranks of tensor_parallel_degree; "
            "leave it out, or use pipeline_parallel_degree"
        )
    n_in, n_out = spec.shape
    edges = {edge for ranges in spec.ranges_by_rank for part in ranges for edge in part}
    # The weight is (out, in), flat: a part of the outputs is one run of it, one of the inputs a run in each row.
    places = [n_in, *edges] if spec.dim == 0 else [edge * n_in for edge in edges if edge < n_out]
    size = math.gcd(low_bit.blocksize, *places)
    if size == low_bit.blocksize:
        return None
    return (
        f"weight_quantize_algo {low_bit.algo}: tensor_parallel_degree {len(spec.ranges_by_rank)} cuts blocks of "
        f"{low_bit.blocksize} weights of a linear of {n_in} x {n_out}, and they would be rounded in another way than "
        f"in one process: qlora_weight_blocksize {size} is whole there; weight_only_int8 has no blocks"
    )


class ColumnParallelLowBitLinear(LowBitLinear):
    """A LowBitLinear with this rank's outputs: the codes and scales that the whole one has there."""

    def __init__(self, linear: ColumnParallelLinear, low_bit: LowBit):
        if wrong := cut_blocks(linear.shard_spec, low_bit):
            raise UserError(wrong)
        super().__init__(linear, low_bit)
        self.tp, self.shard_spec = linear.tp, linear.shard_spec

    def full_weight(self) -> np.ndarray:
        return gather_full_tensor(self.dequantized(), self.shard_spec, self.tp)


class RowParallelLowBitLinear(ColumnParallelLowBitLinear):
    """The same with this rank's inputs, see RowParallelLinear."""

    def __init__(self, linear: RowParallelLinear, low_bit: LowBit):
        super().__init__(linear, low_bit)
        self.reduce = linear.reduce

    forward, column_norms = RowParallelLinear.forward, RowParallelLinear.column_norms

    def largest(self, found: np.ndarray) -> np.ndarray:
        return self.tp.all_reduce(paddle.to_tensor(found), "max").numpy()


ColumnParallelLinear.rounded_class = ColumnParallelLowBitLinear
RowParallelLinear.rounded_class = RowParallelLowBitLinear


class ColumnParallelQuantLinear(QuantLinear):
    """A QuantLinear in groups with this rank's outputs; g_index names groups of the whole one.

    Weights are packed along the inputs, the groups' zeros along the outputs.
    """

    @classmethod
    def from_linear(cls, linear: QuantLinear, spec: ShardSpec, tp: Axis) -> "ColumnParallelQuantLinear":
        layer = recast(linear, cls)
        layer.tp, layer.shard_spec, ranges_by_rank = tp, spec, spec.ranges_by_rank
        packed = 32 // int(linear.scheme[1:])

        def in_units(unit, dim, shape):
            ranges = [[(a // unit, -(-b // unit)) for a, b in ranges] for ranges in ranges_by_rank]
            return ShardSpec(dim, ranges, tp.rank, shape)

        def rows_of(unit, *names):
            return {name: in_units(unit, 0, getattr(layer, name).shape) for name in names}

        if spec.dim == 1:
            specs = {name: in_units(1, 1, getattr(layer, name).shape) for name in ("qweight", "scales")}
            specs["qzeros"] = in_units(packed, 1, layer.qzeros.shape)
            if layer.bias is not None:
                layer.bias = shard_parameter(layer, layer.bias, spec.of(0, layer.bias.shape))
        else:
            specs = {**rows_of(packed, "qweight"), **rows_of(1, "g_index")}
            if any(stop % layer.group_size for ranges in ranges_by_rank[:-1] for _, stop in ranges):
                layer.in_order = layer.group_size >= layer.n_in  # a group is on two ranks: g_index must be read
            elif layer.in_order and layer.group_size < layer.n_in:
                specs |= rows_of(layer.group_size, "scales", "qzeros")
        for name, part in specs.items():
            shape = [part.width if dim == part.dim else n for dim, n in enumerate(part.shape)]
            buffer = paddle.zeros(shape, getattr(layer, name).dtype)
            buffer.shard_spec = part
            layer.register_buffer(name, buffer)
        return layer

    def local_rows(self) -> np.ndarray:
        rows = np.arange(self.n_in)
        return rows if self.shard_spec.dim == 1 else self.shard_spec.slice(rows)


class RowParallelQuantLinear(ColumnParallelQuantLinear):
    """The same with this rank's inputs, see RowParallelLinear."""

    reduce = True

    def forward(self, x, residual=None):
        if not self.reduce:
            return super().forward(x, residual)
        return reduce_output(self.product(x), self.tp, self.bias, residual)


class RowParallelLoRALinear(LoRALinear):
    """A LoRALinear around a row-parallel linear: lora_A (in/tp, R) and lora_B (R, out)."""

    @classmethod
    def from_lora(cls, lora: LoRALinear) -> "RowParallelLoRALinear":
        return recast(lora, cls)

    def forward(self, x, residual=None):
        if not self.base.reduce:
            return super().forward(x, residual)
        return reduce_output(self.product(x), self.base.tp, self.base.bias, residual)

    def dropped(self, x) -> paddle.Tensor:
        """x (…, in/tp) after dropout, under this rank's slice of the mask that one process draws."""
        if not self.training:
            return x
        with self.rng.fork(self.key):
            mask = F.dropout(paddle.ones([*x.shape[:-1], self.base.n_in]), self.dropout)
        mask = paddle.concat([mask[..., slice(*r)] for r in self.base.shard_spec.ranges], axis=-1)
        return x * mask.astype(x.dtype)


class VocabParallelEmbedding(Embedding):
    """An embedding with the rows of this rank's ids: (V/tp, D)."""

    @classmethod
    def from_linear(cls, embedding: Embedding, spec: ShardSpec, tp: Axis) -> "VocabParallelEmbedding":
        layer = recast(embedding, cls)
        layer.tp, layer.weight = tp, shard_parameter(layer, embedding.weight, spec)
        return layer

    def forward(self, ids):
        index = ids - self.weight.shard_spec.ranges[0][0]
        is_here = (index >= 0) & (index < self.weight.shape[0])
        x = kernels.embedding(paddle.where(is_here, index, paddle.zeros_like(index)), self.weight)
        return reduce_from_tp_region(x * is_here.unsqueeze(-1).astype(x.dtype), self.tp)


# (name of a layer, the class that replaces it); a QuantLinear is replaced by QUANTIZED[that class].
_BY_KIND = {"column": ColumnParallelLinear, "row": RowParallelLinear, "vocab": ColumnParallelLinear}
TP_PLAN = [(name, _BY_KIND[row.parallel]) for name, row in LINEARS.items() if row.parallel and name != "embed_tokens"]
TP_PLAN.append(("embed_tokens", VocabParallelEmbedding))
QUANTIZED = {ColumnParallelLinear: ColumnParallelQuantLinear, RowParallelLinear: RowParallelQuantLinear}


def apply_tensor_parallel(model: CausalLM, tp: Axis) -> None:
    """Replace the layers of a model, as build() gives it, by those of TP_PLAN, with this rank's weights."""
    if tp.size == 1:
        return
    config, plan = model.config, dict(TP_PLAN)
    (first, stop), (first_key, stop_key) = local_heads(config, tp.size, tp.rank)
    layers = {"": model, **dict(model.named_sublayers())}
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        if isinstance(layer, Attention):
            layer.group = (stop - first) // (stop_key - first_key)
            layer.slopes = None if layer.slopes is None else layer.slopes[first:stop]
        if name not in plan or isinstance(layer, MissingLayer):
            continue
        shape = [layer.n_in, layer.n_out] if isinstance(layer, QuantLinear) else layer.weight.shape
        cls = QUANTIZED[plan[name]] if isinstance(layer, QuantLinear) else plan[name]
        sharded = cls.from_linear(layer, shard_spec_of(name, shape, config, tp), tp)
        if name in ROW_PARALLEL and (".experts." in path or ".shared." in path):
            sharded.reduce = False  # MoE.forward() does it once for all experts
        setattr(layers[parent], name, sharded)


# ========================================================================================================= vocabulary

# What kernels.linear_cross_entropy takes of a sharded head; widest: ids of the largest shard, by which all ranks chunk.
VocabShard = namedtuple("VocabShard", "start all_reduce widest")


def vocab_shard(vocab_size: int, tp: Axis) -> VocabShard:
    return VocabShard(tp.rank * vocab_size // tp.size, tp.all_reduce, -(-vocab_size // tp.size))


def gather_logits(logits: paddle.Tensor, vocab_size: int, tp: Axis) -> paddle.Tensor:
    """(…, V/tp) -> (…, V)"""
    if tp.size == 1:
        return logits
    widest = -(-vocab_size // tp.size)
    padded = F.pad(logits, [0, 0] * (logits.ndim - 1) + [0, widest - logits.shape[-1]])
    gathered = _AllGather.apply(padded, tp, padded.ndim - 1, False)
    if vocab_size % tp.size == 0:
        return gathered
    starts = [rank * vocab_size // tp.size for rank in range(tp.size + 1)]
    columns = [np.arange(stop - start) + rank * widest for rank, (start, stop) in enumerate(zip(starts, starts[1:]))]
    return paddle.index_select(gathered, paddle.to_tensor(np.concatenate(columns)), -1)


class AllReduceMax(PyLayer):
    """The largest over the ranks; the gradient goes to the rank that had it (the lowest of several)."""

    @staticmethod
    def forward(ctx, x, axis):
        largest = axis.all_reduce(x.clone(), "max")
        rank = paddle.where(x == largest, paddle.full_like(x, -axis.rank), paddle.full_like(x, -axis.size))
        ctx.save_for_backward((axis.all_reduce(rank, "max") == -axis.rank).astype(x.dtype))
        return largest

    @staticmethod
    def backward(ctx, dy):
        (is_owner,) = ctx.saved_tensor()
        return dy * is_owner


# ======================================================================================================== what fits


def check_tensor(config: ModelConfig, degrees: object) -> list[str]:
    """Why tensor and expert parallelism cannot shard this model so, a line each."""
    return _check_tp(config, degrees.tp) + _check_ep(config, degrees)


def _check_tp(config, tp):
    moe, word, key = config.experts, packed_channels(config), f"tensor_parallel_degree {tp}"
    if tp == 1:
        return []
    in_words = f", in words of {word} packed weights" if word > 1 else ""
    counts = {"attention heads": config.num_attention_heads, "ids of the vocabulary": config.vocab_size}
    if moe is None or moe.dense_layers:
        counts[f"channels of the MLP{in_words}"] = config.intermediate_size // word
    if moe is not None:
        counts[f"channels of an expert{in_words}"] = moe.expert_intermediate_size // word
        counts[f"channels of the shared expert{in_words}"] = (
            moe.shared_expert_intermediate_size or moe.expert_intermediate_size
        ) // word
    wrong = [f"{key} is more than {what} ({n})" for what, n in counts.items() if n < tp]
    if moe is not None and config.mlp_bias:
        wrong.append(f"{key}: experts with biases cannot be sharded")
    if config.quantization is not None and config.quantization["quant_method"] != "gptq":
        method = config.quantization["quant_method"]
        wrong.append(f"{key}: a model quantized to {method} cannot be sharded; one of integers for weights alone can")
        return wrong
    latent, widths = config.latent, [config.head_dim]
    widths += [] if latent is None else [latent.v_head_dim, latent.qk_nope_head_dim + latent.v_head_dim]
    return wrong + [
        f"{key} splits between heads, whose channels ({n}) are not whole words of {word} packed weights"
        for n in widths
        if n % word
    ]


def _check_ep(config, degrees):
    ep, moe, wrong = degrees.ep, config.experts, []
    ranks, key = degrees.dp * degrees.sharding * degrees.sep, f"expert_parallel_degree {ep}"
    if ep == 1:
        return []
    if moe is None:
        wrong.append(f"{key} needs a model with experts, this one has none (0)")
    elif moe.num_experts % ep:
        wrong.append(f"{key} does not divide experts ({moe.num_experts})")
    if ranks % ep:
        factors = f"dp {degrees.dp} x sharding {degrees.sharding} x sep {degrees.sep} = {ranks}"
        wrong.append(f"{key} does not divide the data-parallel ranks ({factors})")
    return wrong
