"""Tensor parallelism: heads, channels and vocabulary sharded over tp; sequence parallelism."""

from collections import namedtuple

import kernels

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from adapters import LoRALinear
from distributed.collectives import ShardSpec, _AllGather, _ScaleGradient, enter, gather_full_tensor, leave, mix_in
from distributed.pipeline import MissingLayer
from formats.files import UserError
from model import MLP, Attention, MoE, QuantLinear, set_parameter

# How tensor parallelism cuts a linear, by the last part of our names: its outputs, its inputs, or the vocabulary.
COLUMN_PARALLEL = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "q_b_proj",
    "kv_b_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
)


ROW_PARALLEL = ("o_proj", "down_proj")


VOCAB_PARALLEL = ("embed_tokens", "lm_head")


def local_heads(config, size, rank):
    """((first, stop) of the query heads, (first, stop) of the key heads) of a rank of `size`.

    Ranks have whole groups of a key head and its queries, as even as they come; where there are fewer key heads than
    ranks, one each, which other ranks have too, and some of its queries.
    """
    H, K = config.num_attention_heads, config.num_key_value_heads
    G = H // K
    if K >= size:
        first, last = rank * K // size, (rank + 1) * K // size
        return (first * G, last * G), (first, last)
    key = rank * K // size
    same = [r for r in range(size) if r * K // size == key]
    first, last = (key * G + (same.index(rank) + i) * G // len(same) for i in (0, 1))
    return (first, last), (key, key + 1)


def shard_ranges(name, width, config, size, rank):
    """The [(start, stop), …] of the cut dim, `width` wide, of the linear of this name (its last part) on a rank of `size`."""
    H, K, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    queries, keys = local_heads(config, size, rank)

    def of_heads(heads, Dh, start=0):
        return start + heads[0] * Dh, start + heads[1] * Dh

    def evenly(first, last):
        n = (last - first) // unit
        return first + rank * n // size * unit, first + (rank + 1) * n // size * unit

    if name in ("q_proj", "q_b_proj", "kv_b_proj", "o_proj"):
        return [of_heads(queries, width // H)]
    if name in ("k_proj", "v_proj"):
        return [of_heads(keys, Dh)]
    if name == "qkv_proj" and config.fused_qkv == "blocks":
        return [of_heads(queries, Dh), of_heads(keys, Dh, H * Dh), of_heads(keys, Dh, (H + K) * Dh)]
    if name == "qkv_proj":  # each key head's queries, its key, its value
        G, ranges = H // K, []
        for k in range(*keys):
            start = k * (G + 2)
            first, last = max(queries[0], k * G) - k * G, min(queries[1], (k + 1) * G) - k * G
            ranges += [(start + first, start + last), (start + G, start + G + 2)]
        return [(a * Dh, b * Dh) for a, b in _joined(ranges)]
    unit = 1 if name in VOCAB_PARALLEL else _unit(config)
    if name == "gate_up_proj":
        return [evenly(0, width // 2), evenly(width // 2, width)]
    return [evenly(0, width)]  # channels of the MLP, or ids


def _unit(config):
    """Channels that cannot be parted: those whose weights are packed into one word."""
    return (
        32 // config.quantization["bits"]
        if config.quantization and config.quantization["quant_method"] == "gptq"
        else 1
    )


def _joined(ranges):
    found = [list(ranges[0])]
    for first, last in ranges[1:]:
        if first == found[-1][1]:
            found[-1][1] = last
        else:
            found.append([first, last])
    return [tuple(r) for r in found]


class Region:
    """Attention or MLP of which each rank of tp has its heads or channels: it reads whole tokens."""

    def forward(self, x, *rest, **options):
        return super().forward(enter(x, self.tp), *rest, **options)


class TensorParallelMoE:
    """A MoE whose experts are cut: routed alike on every rank, parts of the sum added up at the end."""

    def forward(self, x, residual=None):
        mixed, probabilities = self.mixture(enter(x, self.tp))
        mixed = leave(mixed, self.tp)
        # Each rank will have the whole gradient of the probabilities' loss, and its part of the gradient of the rest.
        probabilities = _ScaleGradient.apply(probabilities, 1 / self.tp.size)
        return mixed if residual is None else residual + mixed, probabilities


class ColumnParallelLinear:
    """A linear of which each rank has a part."""

    def whole_weight(self):
        return gather_full_tensor(self.weight.astype("float32"), self.weight.shard_spec, self.tp)


class RowParallelPartial(ColumnParallelLinear):
    """One of which each rank has some inputs: its output is partial over tp."""

    def norms(self, weight):
        return paddle.sqrt(self.tp.all_reduce(weight.square().sum(0)))


class RowParallelLinear(RowParallelPartial):
    """The same, where the parts of the product are added up here, then the bias."""

    def forward(self, x, residual=None):
        y = leave(self.product(x), self.tp)
        bias = self.base.bias if isinstance(self, LoRALinear) else self.bias
        y = y if bias is None else y + bias
        return y if residual is None else residual + y


class VocabParallel:
    """The embedding and the head of a CausalLM of which each rank has the rows of some ids."""

    def look_up(self, input_ids):
        weight, tp = self.embed_tokens.weight, self.topology.tp
        place = input_ids - weight.shard_spec.ranges[0][0]
        mine = (place >= 0) & (place < weight.shape[0])
        x = kernels.embedding(paddle.where(mine, place, paddle.zeros_like(place)), weight)
        return leave(x * mine.unsqueeze(-1).astype(x.dtype), tp)

    def cross_entropy(self, x, weight, labels, tied, return_predictions):
        tp = self.topology.tp
        part = VocabShard(self._ids()[0], tp.all_reduce)
        return kernels.linear_cross_entropy(
            x,
            weight,
            labels,
            transpose_weight=tied,
            return_predictions=return_predictions,
            vocabulary=part,
            softcap=self.config.final_softcap,
        )

    def logits(self, x):
        found, tp, V = super().logits(x), self.topology.tp, self.config.vocab_size
        widest = -(-V // tp.size)  # of the parts
        found = F.pad(found, [0, 0] * (found.ndim - 1) + [0, widest - found.shape[-1]])
        found = _AllGather.apply(found, tp, found.ndim - 1, False)
        if V % tp.size:
            ids = [
                np.arange(r * V // tp.size, (r + 1) * V // tp.size) - r * V // tp.size + r * widest
                for r in range(tp.size)
            ]
            found = paddle.index_select(found, paddle.to_tensor(np.concatenate(ids)), -1)
        return found

    def largest_logits(self, x, weight, tied):
        return _AllReduceMax.apply(super().largest_logits(x, weight, tied), self.topology.tp)

    def _ids(self):
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight.shard_spec.ranges[0]


VocabShard = namedtuple("VocabShard", "start all_reduce")


class _AllReduceMax(PyLayer):
    """The largest over the ranks; the gradient goes to who had it (the lowest rank, of several)."""

    @staticmethod
    def forward(ctx, x, axis):
        most = axis.all_reduce(x.clone(), "max")
        first = paddle.where(x == most, paddle.full_like(x, -axis.rank), paddle.full_like(x, -axis.size))
        ctx.save_for_backward((axis.all_reduce(first, "max") == -axis.rank).astype(x.dtype))
        return most

    @staticmethod
    def backward(ctx, dy):
        (mine,) = ctx.saved_tensor()
        return dy * mine


class TensorParallelPrefix:
    """A Prefix in a model whose heads are spread: all of the table on every rank, its own heads' keys and values used."""

    def fill(self, cache, B):
        super().fill(cache, B)
        for states in (cache.keys, cache.values):
            states[:] = [None if x is None else x[:, :, slice(*self.key_heads)] for x in states]


def check_tensor(config, degrees):
    """[what stands against cutting this model so, a line each]: tensor and expert parallelism."""
    tp, ep, found = degrees.tp, degrees.ep, []
    key, experts, word = f"tensor_parallel_degree {tp}", config.experts, _unit(config)
    words = f", in words of {word} packed weights" if word > 1 else ""
    counts = {"attention heads": config.num_attention_heads, "ids of the vocabulary": config.vocab_size}
    if experts is None or experts.dense_layers:
        counts[f"channels of the MLP{words}"] = config.intermediate_size // word
    if experts is not None:
        counts[f"channels of an expert{words}"] = experts.width // word
        counts[f"channels of the shared expert{words}"] = (experts.shared_width or experts.width) // word
    if tp > 1:
        found += [f"{key} is more than {what} ({n})" for what, n in counts.items() if n < tp]
        if experts is not None and config.mlp_bias:
            found.append(f"{key}: experts with biases are not cut")
        if config.quantization is not None and config.quantization["quant_method"] != "gptq":
            found.append(f"{key}: a model quantized to a8w8 is not cut: its activations are rounded whole")
        else:
            latent, heads = config.latent, [config.head_dim]
            heads += [] if latent is None else [latent.value_dim, latent.nope_dim + latent.value_dim]
            found += [
                f"{key} cuts between heads, whose channels ({n}) are not whole words of {word} packed weights"
                for n in heads
                if n % word
            ]
    if ep > 1:
        ranks, key = degrees.dp * degrees.sharding * degrees.sep, f"expert_parallel_degree {ep}"
        factors = f"dp {degrees.dp} x sharding {degrees.sharding} x sep {degrees.sep} = {ranks}"
        if experts is None:
            found.append(f"{key} is for experts, of which there are none (0)")
        elif experts.count % ep:
            found.append(f"{key} does not divide experts ({experts.count})")
        if ranks % ep:
            found.append(f"{key} does not divide ranks with other tokens ({factors})")
    return found


def apply_tensor_parallel(model, tp):
    """Tensor parallelism of a model as it was built: parameters become parts, layers get the mixins above."""
    config = model.config
    if tp.size == 1:
        return
    for path, layer in list(model.named_sublayers()):
        if isinstance(layer, MissingLayer):
            continue
        name = path.rpartition(".")[2]
        inside = ".experts." in path or ".shared." in path  # of a MoE, which adds up
        if name in COLUMN_PARALLEL + ROW_PARALLEL + VOCAB_PARALLEL:
            (_cut_integers if isinstance(layer, QuantLinear) else _cut_linear)(layer, name, config, tp)
        if name in ROW_PARALLEL:
            mix_in(layer, RowParallelPartial if inside else RowParallelLinear, tp=tp)
        elif name in COLUMN_PARALLEL:
            mix_in(layer, ColumnParallelLinear, tp=tp)
        elif isinstance(layer, Attention):
            (first, last), (first_key, last_key) = local_heads(config, tp.size, tp.rank)
            layer.group = (last - first) // (last_key - first_key)
            layer.slopes = None if layer.slopes is None else layer.slopes[first:last]
            mix_in(layer, Region, tp=tp)
        elif isinstance(layer, MLP) and not inside and name != "shared":
            mix_in(layer, Region, tp=tp)
        elif isinstance(layer, MoE):
            mix_in(layer, TensorParallelMoE, tp=tp)
    mix_in(model, VocabParallel)


def _cut_linear(layer, name, config, tp):
    dim = 0 if name in ROW_PARALLEL or name == "embed_tokens" else 1
    whole = layer.weight.shape
    of_ranks = [shard_ranges(name, whole[dim], config, tp.size, rank) for rank in range(tp.size)]
    layer.shard_spec = cut = ShardSpec(dim, of_ranks, tp.rank, whole)
    layer.weight = _part_of(layer, layer.weight, cut)
    if dim == 1 and getattr(layer, "bias", None) is not None:
        layer.bias = _part_of(layer, layer.bias, cut.of(0, layer.bias.shape))


def _cut_integers(layer, name, config, tp):
    """A QuantLinear of weights in groups, packed along the inputs; the groups' zeros are packed along the outputs."""
    dim, whole, packed = 0 if name in ROW_PARALLEL else 1, [layer.n_in, layer.n_out], _unit(config)
    of_ranks = [shard_ranges(name, whole[dim], config, tp.size, rank) for rank in range(tp.size)]
    layer.shard_spec = cut = ShardSpec(dim, of_ranks, tp.rank, whole)

    def of(unit, dim, shape):
        return ShardSpec(dim, [[(a // unit, -(-b // unit)) for a, b in ranges] for ranges in of_ranks], tp.rank, shape)

    if dim == 1:
        cuts = {
            "qweight": of(1, 1, layer.qweight.shape),
            "scales": of(1, 1, layer.scales.shape),
            "qzeros": of(packed, 1, layer.qzeros.shape),
        }
        if layer.bias is not None:
            layer.bias = _part_of(layer, layer.bias, cut.of(0, layer.bias.shape))
    else:
        cuts = {"qweight": of(packed, 0, layer.qweight.shape), "g_index": of(1, 0, layer.g_index.shape)}
        if any(end % layer.group_size for ranges in of_ranks[:-1] for _, end in ranges):
            layer.in_order = layer.group_size >= layer.n_in  # groups are parted: rows say of which they are
        elif layer.in_order and layer.group_size < layer.n_in:
            cuts |= {name: of(layer.group_size, 0, getattr(layer, name).shape) for name in ("scales", "qzeros")}
    for name, cut in cuts.items():
        shape = [cut.width if dim == cut.dim else n for dim, n in enumerate(cut.shape)]
        part = paddle.zeros(shape, getattr(layer, name).dtype)
        part.shard_spec = cut
        layer.register_buffer(name, part)
    mix_in(layer, TensorParallelQuantLinear)


class TensorParallelQuantLinear:
    """A QuantLinear of which each rank has some columns, or rows: what g_index names is a group of the whole."""

    def check(self, path, name):
        rows, groups = np.arange(self.n_in), self.g_index.numpy()
        rows = rows if self.shard_spec.dim == 1 else self.shard_spec.slice(rows)
        last = -(-self.n_in // self.group_size) - 1
        if groups.min() < 0 or groups.max() > last:
            raise UserError(f"{path}: {name}.g_idx names group {groups.max()}, {name}.scales has 0 to {last}")
        if self.in_order and not np.array_equal(groups, rows // self.group_size):
            raise UserError(f"{path}: {name}.g_idx is not in order, but desc_act is false")


def _part_of(layer, parameter, cut):
    """A parameter in place of a whole one: its part. What has no values yet gets none."""
    shape = [cut.width if dim == cut.dim else n for dim, n in enumerate(cut.shape)]
    if parameter._is_initialized():
        values = cut.slice(parameter.numpy())
        found = layer.create_parameter(shape, dtype=parameter.dtype)
        set_parameter(found, values)
    else:
        with paddle.LazyGuard():
            found = layer.create_parameter(shape, dtype=parameter.dtype)
    found.shard_spec, found.stop_gradient = cut, parameter.stop_gradient
    return found
