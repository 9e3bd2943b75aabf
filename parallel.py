"""4D parallelism: the grid of processes, and what each of them keeps of a model, a batch and an optimizer.

    python -m paddle.distributed.launch --nproc_per_node 8 pretrain.py CONFIG --tensor_parallel_degree 2 …

Every process has one place on the grid [dp, pp, sharding, sep, tp], tp fastest (upstream's pp_first). 8 processes with
tensor_parallel_degree 2, pipeline_parallel_degree 2 and, as what is left, dp 2:

                      pp 0 (layers 0 … L/2-1)         pp 1 (layers L/2 … L-1)
                      tp 0            tp 1            tp 0            tp 1
        dp 0          rank 0          rank 1          rank 2          rank 3        one copy of the model: 0, 1, 2, 3
        dp 1          rank 4          rank 5          rank 6          rank 7        another one, other batches

Along an axis talk those that differ in its coordinate alone: tp {0,1} {2,3} {4,5} {6,7}; pp {0,2} {1,3} {4,6} {5,7};
dp {0,4} {1,5} {2,6} {3,7}. What goes along it: tp: partial sums of each attention and MLP. pp: what a block gives to the
next one. sep: keys and values (context_parallel_degree: around a ring; sep_parallel_degree: heads for tokens). sharding:
gradients there, weights back. dp: gradients.

The scripts do not see it: a parallel model takes whole batches and gives the losses of all their tokens, on every rank
that shares a batch. With one process nothing here does anything.

    topology = parallel.start(args)                           # which place this process has; groups are connected
    model = parallel.from_pretrained(path, topology)          # its part of the model
    shards = parallel.Shards(model, weights, topology)        # its part of gradients and of the optimizer
    for loss, batch in parallel.micro_steps(model, batches, batch_loss, seeds): …
    norm = shards.reduce_gradients(); optimizer.step(…); shards.gather_weights()
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import socket
import time
import zlib
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np

import kernels  # before paddle: it silences what paddle says while it is imported
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from model import (
    MLP,
    Attention,
    LoRALinear,
    ModelConfig,
    base_folders,
    SparseMLP,
    build,
    load_weights,
    load_adapter,
    lora_layers,
    merge,
    read_tensor,
    safetensors_header,
    set_parameter,
    write_safetensors,
)
from paddle.autograd import PyLayer

# ============================================================================================ the grid

AXES = ("dp", "pp", "sharding", "sep", "tp")  # slowest first
ORDERS = {"pp_first": AXES, "sharding_first": ("dp", "sharding", "pp", "sep", "tp")}


@dataclasses.dataclass(frozen=True)
class Degrees:
    """How many ways a run is cut, and along what. context: the sep axis is a ring (else heads are exchanged)."""

    dp: int = 1
    pp: int = 1
    sharding: int = 1
    sep: int = 1
    tp: int = 1
    ep: int = 1  # experts are spread over ranks that have other tokens, so it is no factor of the world
    virtual: int = 1  # stages of the pipeline that a rank has
    stage: int = 0  # of sharding; 0: none, 1: moments and master weights, 2: gradients too, 3: weights too
    offload: bool = False  # moments and master weights lie in the host's memory
    sequence_parallel: bool = False  # between attention and MLP a rank of tp keeps its share of the tokens
    context: bool = False
    order: str = "pp_first"  # a key of ORDERS

    @property
    def world(self):
        return self.dp * self.pp * self.sharding * self.sep * self.tp


class Topology:
    """The place of one process on the grid: an Axis each for dp, pp, sharding, sep and tp."""

    def __init__(self, degrees, rank=0, groups=None):
        """groups: what connects ranks and lets all meet (Gloo); None: sizes alone."""
        self.degrees, self.rank, self.groups = degrees, rank, groups
        order = ORDERS[degrees.order]
        sizes = [getattr(degrees, name) for name in order]
        self.grid = np.arange(degrees.world).reshape(sizes)
        self.place = dict(zip(order, map(int, np.argwhere(self.grid == rank)[0])))
        for dim, name in enumerate(order):
            lines = np.moveaxis(self.grid, dim, -1).reshape([-1, sizes[dim]])
            mine = next(line for line in lines if rank in line)
            setattr(self, name, Axis(name, [int(r) for r in mine], rank, groups))

    @property
    def axes(self):
        return [getattr(self, name) for name in AXES]

    @property
    def data_rank(self):
        """Which share of a step's batches this rank works on, of data_size."""
        return self.dp.rank * self.sharding.size + self.sharding.rank

    @property
    def data_size(self):
        return self.dp.size * self.sharding.size

    def meet(self):
        """Wait for all processes, however long they take."""
        if self.groups is not None:
            self.groups.meet()

    def exchange(self, value):
        """[what each process calls this with]: JSON values. They must come within 30 seconds of each other, see meet()."""
        return [value] if self.groups is None else self.groups.exchange(value)

    def total(self, numbers, stages=False):
        """Numbers (one, a tuple of them, or a dict) added up over the ranks with other batches; stages: over pp's too."""
        axes = [axis for axis in (self.sharding, self.dp, *([self.pp] if stages else [])) if axis.size > 1]
        if not axes or numbers == {}:
            return numbers
        flat = np.array(list(numbers.values()) if isinstance(numbers, dict) else numbers, np.float64).reshape([-1])
        found = paddle.to_tensor(flat)
        for axis in axes:
            axis.all_reduce(found)
        found = [type(old)(new) for old, new in zip(_flat(numbers), found.numpy().tolist())]
        if isinstance(numbers, dict):
            return dict(zip(numbers, found))
        return tuple(found) if isinstance(numbers, tuple) else found[0]


def _flat(numbers):
    return list(numbers.values()) if isinstance(numbers, dict) else list(numbers) if isinstance(numbers, tuple) else [numbers]


# =============================================================================== talking along an axis


class Axis:
    """The ranks that differ in one coordinate alone, and what they do together. With one rank nothing is sent.

    seconds and bytes: spent in, and handed to, its collectives so far.
    """

    def __init__(self, name, ranks, rank, groups=None):
        self.name, self.ranks, self.size, self.rank = name, ranks, len(ranks), ranks.index(rank)
        self.group = groups.connect(ranks) if groups is not None and self.size > 1 else None
        self.sequence = False  # tp: between attention and MLP a rank keeps its share of the tokens
        self.seconds, self.bytes = 0.0, 0

    def all_reduce(self, x, op="sum"):
        """x, in place: the sum (or "max") over the ranks. Returns x."""
        if self.size > 1:
            with self._timed(x):
                dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, self.group)
        return x

    def all_gather(self, x, dim=0):
        """The x of all ranks, of one shape, one behind the other along dim."""
        if self.size == 1:
            return x
        with self._timed(x):
            parts = []
            dist.all_gather(parts, x.contiguous(), self.group)
        return paddle.concat(parts, axis=dim)

    def reduce_scatter(self, x, dim=0):
        """This rank's share along dim (its size a multiple of the ranks) of the sum of x over the ranks."""
        if self.size == 1:
            return x
        if _backend() == "gloo":  # has none
            return self.share(self.all_reduce(x.clone()), dim)
        with self._timed(x):
            parts = [part.contiguous() for part in x.split(self.size, axis=dim)]
            found = paddle.empty_like(parts[0])
            dist.reduce_scatter(found, parts, dist.ReduceOp.SUM, self.group)
        return found

    def broadcast(self, x, source):
        """x, in place, of the rank `source` of this axis. Returns x."""
        if self.size > 1:
            with self._timed(x):
                dist.broadcast(x, self.ranks[source], self.group)
        return x

    def share(self, x, dim=0):
        """This rank's part of x along dim, cut into as many as there are ranks."""
        if self.size == 1:
            return x
        width = x.shape[dim] // self.size
        return x.slice([dim], [self.rank * width], [(self.rank + 1) * width]).contiguous()

    @contextlib.contextmanager
    def _timed(self, x):
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
        self.bytes += x.size * x.element_size()


def _backend():
    """What groups talk by: gloo between CPUs, nccl or the device's own between accelerators."""
    return "gloo" if paddle.device.get_device().startswith("cpu") else "nccl"


class Launch(namedtuple("Launch", "rank world endpoints")):
    """What Paddle's launcher says of this process."""

    @staticmethod
    def of_environment():
        endpoints = tuple(os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(","))
        return Launch(int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1)), endpoints)


@functools.cache  # a process has one
class Gloo:
    """Groups of processes on CPUs. connect(ranks) gives the group of these ranks, made when it is first asked for.

    Every group has a store of its own: Paddle's gloo groups write their addresses under keys that do not name the group,
    and would read each other's in a common one. The first of a group's ranks opens it and tells the port in the store of
    all processes; only then do the others connect, as one that knocks too early waits three seconds.
    """

    def __init__(self, launch):
        self.launch, self.groups = launch, {}
        host, port = launch.endpoints[0].split(":")
        self.store = paddle.base.core.TCPStore(host, int(port), launch.rank == 0, launch.world, 900)
        self.meetings = 0

    def connect(self, ranks, name=""):
        """name: tells groups of the same ranks apart, such as the two directions between two of them."""
        key = f"{name}{'-'.join(map(str, ranks))}"
        if key in self.groups:
            return self.groups[key]
        core, mine = paddle.base.core, ranks.index(self.launch.rank)
        host = self.launch.endpoints[ranks[0]].split(":")[0]
        if mine == 0:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = probe.getsockname()[1]
            store = core.TCPStore(host, port, True, 1, 900)
            self.store.set(f"group {key}", str(port).encode())
        else:
            store = core.TCPStore(host, int(self.store.get(f"group {key}")), False, 1, 900)
        number = 1000 + len(self.groups)  # of this process's groups; Paddle wants none twice
        group = core.ProcessGroupGloo.create(store, mine, len(ranks), number)
        group = dist.collective.Group(mine, number, list(ranks), group, f"{key}")
        self.groups[key] = group
        return group


    def exchange(self, value):
        """Not by the store, where every get takes 90 milliseconds."""
        group, text, room = self.connect(list(range(self.launch.world))), json.dumps(value).encode(), 1024

        def gather(content, size):
            parts = []
            content = np.frombuffer(content.ljust(size, b" "), np.uint8)
            dist.all_gather(parts, paddle.to_tensor(content), group)
            return [part.numpy().tobytes() for part in parts]

        found = gather(b"%016d" % len(text) + text[: room - 16], room)
        if (longest := max(int(part[:16]) for part in found)) > room - 16:
            return [json.loads(part) for part in gather(text, longest)]
        return [json.loads(part[16:]) for part in found]

    def meet(self):
        """Wait for all processes, up to 15 minutes: a collective of gloo would give up after 30 seconds."""
        self.meetings += 1
        name = f"meeting {self.meetings}"
        if self.store.add(name, 1) == self.launch.world:
            self.store.set(f"{name} is full", b"1")
        self.store.wait(f"{name} is full")


# =========================================================== collectives with gradients (arXiv 1909.08053, 2205.05198)


class _SumBack(PyLayer):
    """x, whose gradient is the sum over the ranks (Megatron's f): each has used it for a part of the result."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.axis.all_reduce(dy.clone())


class _Sum(PyLayer):
    """The sum of x over the ranks, its gradient as it is (Megatron's g): what follows is the same on every rank."""

    @staticmethod
    def forward(ctx, x, axis):
        return axis.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, dy):
        return dy.clone()


class _Gather(PyLayer):
    """The ranks' x behind each other along dim. summed: its gradient is the sum over the ranks, else the same on each."""

    @staticmethod
    def forward(ctx, x, axis, dim, summed):
        ctx.how = axis, dim, summed
        return axis.all_gather(x, dim)

    @staticmethod
    def backward(ctx, dy):
        axis, dim, summed = ctx.how
        return axis.reduce_scatter(dy, dim) if summed else axis.share(dy, dim)


class _ReduceScatter(PyLayer):
    """This rank's share along dim of the sum over the ranks."""

    @staticmethod
    def forward(ctx, x, axis, dim):
        ctx.how = axis, dim
        return axis.reduce_scatter(x, dim)

    @staticmethod
    def backward(ctx, dy):
        axis, dim = ctx.how
        return axis.all_gather(dy, dim)


class _ScaleBack(PyLayer):
    """x, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor


def enter(x, tp):
    """What all ranks of tp compute a part from: x (B, T, D), or (B, T/tp, D) with sequence parallelism -> (B, T, D)."""
    if tp.size == 1:
        return x
    return _Gather.apply(x, tp, 1, True) if tp.sequence else _SumBack.apply(x, tp)


def leave(x, tp):
    """(B, T, D) partial over tp -> their sum (B, T, D), or this rank's (B, T/tp, D) with sequence parallelism."""
    if tp.size == 1:
        return x
    return _ReduceScatter.apply(x, tp, 1) if tp.sequence else _Sum.apply(x, tp)


# ====================================================================================== tensor parallelism


class Cut:
    """Which part of a whole tensor a parameter is: ranges [(start, stop), …] along one dim of our layout, joined.

    of_ranks: those of every rank of tp; shape: of the whole. overlaps: some of it is with several ranks (key heads, where
    there are fewer of them than ranks).
    """

    def __init__(self, dim, of_ranks, rank, shape):
        self.dim, self.of_ranks, self.rank, self.shape = dim, of_ranks, rank, list(shape)
        self.ranges = of_ranks[rank]
        self.overlaps = sum(last - first for ranges in of_ranks for first, last in ranges) > self.shape[dim]

    def of(self, dim, shape):
        """The same ranges of another tensor."""
        return Cut(dim, self.of_ranks, self.rank, shape)

    def take(self, array):
        """numpy, the whole -> the part."""
        index = (slice(None),) * self.dim
        parts = [array[(*index, slice(*r))] for r in self.ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.dim)

    def put(self, whole, part, rank=None):
        """Write the part (another rank's) to its places in the whole, in place; numpy."""
        index, start = (slice(None),) * self.dim, 0
        for first, last in self.ranges if rank is None else self.of_ranks[rank]:
            whole[(*index, slice(first, last))] = part[(*index, slice(start, start + last - first))]
            start += last - first

    @property
    def width(self):
        return sum(last - first for first, last in self.ranges)


# How tensor parallelism cuts a linear, by the last part of our names: its outputs, its inputs, or the vocabulary.
BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "gate_up_proj")
BY_INPUTS = ("o_proj", "down_proj")
BY_VOCABULARY = ("embed_tokens", "lm_head")


def cut_ranges(name, width, config, size, rank):
    """The [(start, stop), …] of the cut dim, `width` wide, of the linear of this name (its last part) on a rank of `size`."""
    H, K, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    of_keys = (rank * K // size, -(-(rank + 1) * K // size))  # key heads; with fewer than ranks one that others have too

    def evenly(first, last):
        n = last - first
        return first + rank * n // size, first + (rank + 1) * n // size

    if name in ("k_proj", "v_proj"):
        return [(of_keys[0] * Dh, of_keys[1] * Dh)]
    if name == "gate_up_proj":
        return [evenly(0, width // 2), evenly(width // 2, width)]
    if name == "qkv_proj" and config.fused_qkv == "blocks":
        blocks = [(start + of_keys[0] * Dh, start + of_keys[1] * Dh) for start in (H * Dh, (H + K) * Dh)]
        return [evenly(0, H * Dh), *blocks]
    if name == "qkv_proj":  # each key head's queries, its key, its value
        G, ranges = H // K, []
        for k in range(*of_keys):
            start = k * (G + 2)
            first, last = max(rank * H // size, k * G) - k * G, min((rank + 1) * H // size, (k + 1) * G) - k * G
            ranges += [(start + first, start + last), (start + G, start + G + 2)]
        return [(a * Dh, b * Dh) for a, b in _joined(ranges)]
    return [evenly(0, width)]  # heads, or channels of the MLP, or ids


def _joined(ranges):
    found = [list(ranges[0])]
    for first, last in ranges[1:]:
        if first == found[-1][1]:
            found[-1][1] = last
        else:
            found.append([first, last])
    return [tuple(r) for r in found]


def mix_in(layer, mixin, **attributes):
    """Give a layer a mixin's methods in front of its class's, in place: names and parameters stay as they are."""
    layer.__class__ = type(f"{mixin.__name__}{type(layer).__name__}", (mixin, type(layer)), {})
    for name, value in attributes.items():
        setattr(layer, name, value)


class Region:
    """Attention or MLP of which each rank of tp has its heads or channels: it reads whole tokens."""

    def forward(self, x, *rest, **options):
        return super().forward(enter(x, self.tp), *rest, **options)


class SparseRegion:
    """A SparseMLP whose experts are cut: routed alike on every rank, parts of the sum added up at the end."""

    def forward(self, x, residual=None):
        mixed, probabilities = self.mixture(enter(x, self.tp))
        mixed = leave(mixed, self.tp)
        # Each rank will have the whole gradient of the probabilities' loss, and its part of the gradient of the rest.
        probabilities = _ScaleBack.apply(probabilities, 1 / self.tp.size)
        return mixed if residual is None else residual + mixed, probabilities


class RowLinear:
    """A linear of which each rank has some inputs: parts of the product are added up, then the bias."""

    def norms(self, weight):
        return paddle.sqrt(self.tp.all_reduce(weight.square().sum(0)))

    def forward(self, x, residual=None):
        y = leave(self.product(x), self.tp)
        bias = self.base.bias if isinstance(self, LoRALinear) else self.bias
        y = y if bias is None else y + bias
        return y if residual is None else residual + y


class PartedVocabulary:
    """The embedding and the head of a CausalLM of which each rank has the rows of some ids."""

    def look_up(self, input_ids):
        weight, tp = self.embed_tokens.weight, self.topology.tp
        place = input_ids - weight.cut.ranges[0][0]
        mine = (place >= 0) & (place < weight.shape[0])
        x = kernels.embedding(paddle.where(mine, place, paddle.zeros_like(place)), weight)
        return leave(x * mine.unsqueeze(-1).astype(x.dtype), tp)

    def cross_entropy(self, x, weight, labels, tied, return_predictions):
        tp = self.topology.tp
        part = Vocabulary(self._ids()[0], tp.all_reduce)
        return kernels.linear_cross_entropy(x, weight, labels, transpose_weight=tied, return_predictions=return_predictions,
                                            vocabulary=part, softcap=self.config.final_softcap)  # fmt: skip

    def logits(self, x):
        found, tp = super().logits(x), self.topology.tp
        parts, V = -(-self.config.vocab_size // tp.size), self.config.vocab_size  # of ids: the widest
        found = F.pad(found, [0, 0] * (found.ndim - 1) + [0, parts - found.shape[-1]])
        found = tp.all_gather(found, -1)
        if V % tp.size:
            ids = [np.arange(r * V // tp.size, (r + 1) * V // tp.size) - r * V // tp.size + r * parts for r in range(tp.size)]
            found = paddle.index_select(found, paddle.to_tensor(np.concatenate(ids)), -1)
        return found

    def largest_logits(self, x, weight, tied):
        return _MaxOver.apply(super().largest_logits(x, weight, tied), self.topology.tp)

    def _ids(self):
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight.cut.ranges[0]


Vocabulary = namedtuple("Vocabulary", "start all_reduce")


class _MaxOver(PyLayer):
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


class PartedPrefix:
    """A Prefix in a model whose heads are spread: all of the table on every rank, its own heads' keys and values used."""

    def fill(self, cache, B):
        super().fill(cache, B)
        for states in (cache.keys, cache.values):
            states[:] = [None if x is None else x[:, :, slice(*self.key_heads)] for x in states]


def cut_tensors(model, tp):
    """Tensor parallelism of a model as it was built: parameters become parts, layers get the mixins above."""
    config = model.config
    if tp.size == 1:
        return
    for path, layer in list(model.named_sublayers()):
        name = path.rpartition(".")[2]
        if name in BY_OUTPUTS + BY_INPUTS + BY_VOCABULARY:
            _cut_linear(layer, name, config, tp)
        if isinstance(layer, Attention):
            K, H = config.num_key_value_heads, config.num_attention_heads
            heads = slice(tp.rank * H // tp.size, (tp.rank + 1) * H // tp.size)
            layer.group = (H // tp.size) // max(1, K // tp.size)
            layer.slopes = None if layer.slopes is None else layer.slopes[heads]
        if isinstance(layer, (Attention, MLP)) and ".experts." not in path and name != "shared":
            mix_in(layer, Region, tp=tp)
        elif isinstance(layer, SparseMLP):
            mix_in(layer, SparseRegion, tp=tp)
        elif name in BY_INPUTS and ".experts." not in path and ".shared." not in path:
            mix_in(layer, RowLinear, tp=tp)
    mix_in(model, PartedVocabulary)


def _cut_linear(layer, name, config, tp):
    dim = 0 if name in BY_INPUTS or name == "embed_tokens" else 1
    whole = layer.weight.shape
    of_ranks = [cut_ranges(name, whole[dim], config, tp.size, rank) for rank in range(tp.size)]
    cut = Cut(dim, of_ranks, tp.rank, whole)
    layer.weight = _part_of(layer, layer.weight, cut)
    if dim == 1 and getattr(layer, "bias", None) is not None:
        layer.bias = _part_of(layer, layer.bias, cut.of(0, layer.bias.shape))


def _part_of(layer, parameter, cut):
    """A parameter in place of a whole one: its part. What has no values yet gets none."""
    shape = [cut.width if dim == cut.dim else n for dim, n in enumerate(cut.shape)]
    if parameter._is_initialized():
        values = cut.take(parameter.numpy())
        found = layer.create_parameter(shape, dtype=parameter.dtype)
        set_parameter(found, values)
    else:
        with paddle.LazyGuard():
            found = layer.create_parameter(shape, dtype=parameter.dtype)
    found.cut, found.stop_gradient = cut, parameter.stop_gradient
    return found


def cut_adapters(model, topology):
    """The same for LoRA and prefix, put on whole after cut_tensors()."""
    tp = topology.tp
    if tp.size == 1:
        return
    for layer in lora_layers(model).values():
        cut = getattr(layer.base.weight, "cut", None)
        if cut is None:
            continue
        if cut.dim == 1:
            layer.lora_B = _part_of(layer, layer.lora_B, cut.of(1, layer.lora_B.shape))
            if layer.lora_magnitude_vector is not None:  # was made of the part
                layer.lora_magnitude_vector.cut = cut.of(0, cut.shape[1:])
        else:
            layer.lora_A = _part_of(layer, layer.lora_A, cut.of(0, layer.lora_A.shape))
            if isinstance(layer.base, RowLinear):
                mix_in(layer, RowLinear, tp=tp)
    if model.prefix is not None:
        K = model.config.num_key_value_heads
        mix_in(model.prefix, PartedPrefix, key_heads=(tp.rank * K // tp.size, -(-(tp.rank + 1) * K // tp.size)))


# =============================================================================== gradients, and who updates what


class Shards:
    """What this rank does of a step's update: gradients added up over the ranks that hold other data, and its weights.

    weights: model.Weight objects of all that is trained here. `pieces` is what the optimizer updates, with name, tensor,
    grad and ndim (of the whole).
    """

    def __init__(self, model, weights, topology):
        self.model, self.weights, self.topology = model, weights, topology
        paths = {id(parameter): path for path, parameter in model.named_parameters()}
        self.partial = [w for w in weights if partial_over_tp(paths[id(w.parameter)], w.parameter, topology.tp)]
        self.pieces = weights

    @paddle.no_grad()
    def reduce_gradients(self):
        """Add gradients up over the ranks; returns their Euclidean norm over the whole model."""
        topology = self.topology
        for weight in self.weights:
            if weight.parameter.grad is None and topology.degrees.world > 1:
                weight.parameter.grad = paddle.zeros_like(weight.parameter)
        for axis in (topology.sep, topology.sharding, topology.dp):
            _all_reduce_together([w.parameter.grad for w in self.weights], axis)
        _all_reduce_together([w.parameter.grad for w in self.partial], topology.tp)
        return self._norm()

    def _norm(self):
        tp, squares = self.topology.tp, paddle.zeros([], "float64")
        for weight in self.weights:
            gradient, cut = weight.parameter.grad, weight.cut
            if gradient is None:
                continue
            if cut is not None and cut.overlaps:
                squares = squares + self._once(gradient, cut)
            elif cut is not None or tp.rank == 0:
                squares = squares + kernels.squared_norm(gradient)
        for axis in (tp, self.topology.pp):
            axis.all_reduce(squares)
        return math.sqrt(float(squares))

    def _once(self, gradient, cut):
        """A gradient whose rows several ranks have: added up over them, in place; its squares, each on one rank."""
        whole = np.zeros(cut.shape, np.float32)
        cut.put(whole, gradient.numpy())
        whole = self.topology.tp.all_reduce(paddle.to_tensor(whole))
        gradient.set_value(cut.take(whole.numpy()))
        return kernels.squared_norm(whole) if self.topology.tp.rank == 0 else 0.0

    def gather_weights(self):
        """After the optimizer's step: the weights that other ranks have updated."""


def partial_over_tp(path, parameter, tp):
    """Whether each rank of tp has a part of the gradient of this parameter, which all of them hold.

    So it is inside of attention and MLP, where each rank computes its heads and channels; and with sequence parallelism
    outside too, where each has its tokens. The bias of a RowLinear is added outside.
    """
    if tp.size == 1 or getattr(parameter, "cut", None) is not None:
        return False
    inside = re.match(r"layers\.\d+\.(attention|mlp)\.|prefix\.", path)
    row_bias = re.search(rf"\.({'|'.join(BY_INPUTS)})\.(base\.)?bias$", path)
    return tp.sequence or bool(inside and not row_bias)


def _all_reduce_together(tensors, axis):
    """Each tensor, in place, added up over the ranks; sent as one."""
    if axis.size == 1 or not tensors:
        return
    flat = axis.all_reduce(paddle.concat([t.flatten() for t in tensors]))
    start = 0
    for tensor in tensors:
        size = tensor.size
        tensor.set_value(flat[start : start + size].reshape(tensor.shape))
        start += size


# ==================================================================================== a model, and a step of it


class ParallelCausalLM:
    """A CausalLM of which this process has a part. It takes and gives what a whole one does."""

    def forward(self, input_ids, position_ids=None, startend_row_indices=None, caches=None, labels=None,
                return_predictions=False, additions=True):  # fmt: skip
        tp = self.topology.tp
        B, T = input_ids.shape
        # One token at a time cannot be spread; generating works on whole rows.
        tp.sequence = self.topology.degrees.sequence_parallel and caches is None
        if position_ids is None and caches is None:
            position_ids = paddle.arange(T).unsqueeze(0).expand([B, T])
        inputs = (input_ids, position_ids, startend_row_indices, labels)
        if caches is None:
            inputs = _padded_to(inputs, tp.size if tp.sequence else 1)
        input_ids, position_ids, rows, labels = inputs
        x, probabilities = self.trunk(input_ids, position_ids, rows, caches)
        x = enter(x, tp)
        if labels is None:
            return self.logits(x)[:, :T]
        found = self.losses(x, probabilities, labels, return_predictions, additions)
        return tuple(f[:, :T] for f in found) if return_predictions else found[:, :T]

    def kept(self, x):
        tp = self.topology.tp
        return tp.share(x, 1) if tp.sequence else x


def _padded_to(inputs, multiple):
    """ids, positions, rows and labels of T tokens -> of the next multiple: tokens behind, which nobody sees."""
    input_ids, position_ids, rows, labels = inputs
    more = -input_ids.shape[1] % multiple
    if not more:
        return inputs
    T = input_ids.shape[1]
    labels = None if labels is None else F.pad(labels, [0, 0, 0, more], value=-100)
    if rows is not None:
        rows = paddle.concat([rows, paddle.zeros([rows.shape[0], 1, more, rows.shape[-1]], rows.dtype) + T], axis=2)
    return F.pad(input_ids, [0, 0, 0, more]), F.pad(position_ids, [0, 0, 0, more]), rows, labels


def parallelize(model, topology):
    """Make of a model, as build() gives it, this process's part of it, in place; returns it. Order: tp, then the loop of forward()."""
    model.topology = topology
    if topology.degrees.world > 1:
        topology.tp.sequence = topology.degrees.sequence_parallel
        cut_tensors(model, topology.tp)
        mix_in(model, ParallelCausalLM)
    return model


def from_pretrained(path, topology, dtype="float32"):
    """model.from_pretrained() of this process's part of the model: nothing else of it is read, or takes memory."""
    *adapters, base = base_folders(path)
    model = parallelize(build(ModelConfig.from_json(base), dtype), topology)
    load_weights(model, base)
    for adapter in reversed(adapters):
        load_adapter(model, adapter)
        cut_adapters(model, topology)
        merge(model)
    model.eval()
    return model


def micro_steps(model, batches, batch_loss, seed):
    """Forward and backward of each of this rank's batches of a step; yields (loss, batch) after each.

    batch_loss(batch): its part of the step's loss. seed(i): seeds the randomness of the i-th.
    """
    topology = model.topology
    for index, batch in enumerate(batches):
        seed(index * topology.data_size + topology.data_rank)
        loss = batch_loss(batch) * (0.0 if batch.get("company") else 1.0)
        loss.backward()
        yield float(loss), batch


def start(args):
    """The Topology of this process, from the arguments and what Paddle's launcher says; groups are connected."""
    launch = Launch.of_environment()
    names = {"pp": "pipeline", "sharding": "sharding", "tp": "tensor"}
    ways = {axis: max(1, getattr(args, f"{name}_parallel_degree")) for axis, name in names.items()}
    ways["sep"] = max(1, args.sep_parallel_degree, args.context_parallel_degree)
    ways["dp"] = launch.world // math.prod(ways.values())
    degrees = Degrees(**ways, sequence_parallel=getattr(args, "sequence_parallel", False), context=args.context_parallel_degree > 1)
    if launch.world == 1:
        return Topology(degrees)
    return Topology(degrees, launch.rank, Gloo(launch))


SINGLE = Topology(Degrees())  # one process


# ============================================================ slicing and gathering: from what ranks hold to whole files

# Every tensor of a file is whole, and one rank, its owner, writes it. The others that have parts of it give them to the
# owner by way of the folder that is being written, in a file for each pair of ranks: so a part is sent once, no rank waits
# for another before it has given all, nothing of this is a collective, and so all of it can go on behind training.
# Reading needs none of it: a rank reads the ranges that it holds, see model.StoredTensor and Weight.read.

FILE_BYTES = 5 << 30  # a rank begins another file before one grows larger


def place_of(shards, weight):
    """() where a rank's moments are of all of the parameter; else (first,) of its elements, laid flat, that they are of."""
    if not getattr(shards, "stage", 0):
        return ()
    piece = shards.held.get(id(weight.parameter))
    return (0 if piece is None else piece.first,)


def own_part(shards, weight):
    """(tensor, *place) of what this rank keeps of a weight itself: (the parameter,), or with stage 3 its elements, or None
    of them, and the first."""
    if getattr(shards, "stage", 0) < 3 or id(weight.parameter) not in shards.paths:
        return (weight.parameter,)
    piece = shards.held.get(id(weight.parameter))
    return (None if piece is None else piece.tensor, *place_of(shards, weight))


def piece_of(shards, weight, array):
    """numpy of the parameter's shape -> of those elements that this rank's moments are of."""
    return shards.piece_of(weight, array) if getattr(shards, "stage", 0) else array


def owners(sizes, holders):
    """{name: rank}: who writes which of these tensors, even by bytes: the largest first, to whom has least of its holders.

    sizes: {name: bytes}; holders: {name: [rank]}. Where all hold all, the largest share is at most the mean plus the
    largest tensor.
    """
    found, load = {}, Counter()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = min(holders[name], key=lambda rank: (load[rank], rank))
        load[found[name]] += sizes[name]
    return found


def held_by(sizes, topology):
    """({name: bytes}, {name: [rank]}) over all ranks, from each one's own {name: bytes}.

    Asked, not derived from the grid: stages of a pipeline have other names, ranks of expert parallelism other experts.
    Ranks with the same names send a digest of them alone.
    """
    text = json.dumps(sizes, sort_keys=True)
    digests = topology.exchange(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
    lists = [sizes] * len(digests)
    if len(set(digests)) > 1:
        first = digests.index(digests[topology.rank]) == topology.rank
        sent = topology.exchange(sizes if first else None)
        lists = [sent[digests.index(digest)] for digest in digests]
    everything, holders = {}, {}
    for rank, names in enumerate(lists):
        for name, size in names.items():
            everything[name] = size
            holders.setdefault(name, []).append(rank)
    return everything, holders


class Share:
    """What this rank does of writing tensors of the whole model: which parts it gives to others, which files it writes.

    groups: {group: [Entry]}, all of what this rank holds. A source (weight, tensor, first) is cut over sharding too: tensor
    has, laid flat, this rank's elements of the parameter from `first` on; None: none of them. The parts are taken here: as they are; or with buffers, a dict, copied into it, and what is written later is the
    state of now. The dict may be used again by the next.
    """

    def __init__(self, groups, topology, buffers=None, together=(), metadata=None):
        """together: groups of which one rank writes all that it holds, for one small file; metadata: {group: of its files}."""
        self.topology, self.rank, self.metadata = topology, topology.rank, metadata or {}
        self.entries = {(group, *entry.tensors): entry for group, entries in groups.items() for entry in entries}
        names = {key: " ".join(key) for key in self.entries}
        mine = {names[key]: _bytes_of(entry) for key, entry in self.entries.items()}
        sizes, holders = held_by(mine, topology)
        for name in sizes:
            if name.partition(" ")[0] in together:
                holders[name] = holders[name][:1]
        self.owners = owners(sizes, holders)
        self.owner = {key: self.owners[name] for key, name in names.items()}
        self.parts = {}  # (key, index of the source): numpy of the part, or None: this rank has nothing of it
        for key, entry in self.entries.items():
            for index, source in enumerate(entry.sources):
                if self.rank in self._givers(self.owner[key], source):
                    self.parts[key, index] = self._take(source[1], buffers, (key, index))

    def _givers(self, owner, source):
        """The ranks that together have all of a source: those of the owner's line along tp, if it is cut, and sharding."""
        grid, weight = self.topology.grid, source[0]
        axes = {"tp"} if weight.cut is not None else set()
        axes |= {"sharding"} if len(source) > 2 else set()
        place = np.argwhere(grid == owner)[0]
        names = ORDERS[self.topology.degrees.order]
        return [int(r) for r in grid[tuple(slice(None) if n in axes else i for n, i in zip(names, place))].reshape([-1])]

    def _take(self, tensor, buffers, key):
        found = _on_host(tensor)
        if buffers is None or found is None:
            return found
        if key not in buffers or buffers[key].shape != found.shape:
            buffers[key] = np.empty_like(found)
        np.copyto(buffers[key], found)
        return buffers[key]

    def write(self, folder, wait):
        """Give and write this rank's share; {group: {file: {"size", "crc32", "tensors": {name: bytes}}}} of its files.

        wait(path): returns when another rank has put that file there. Files are called GROUP.RANK.NUMBER.
        """
        folder, given = Path(folder), {}
        for (key, index), part in self.parts.items():
            if self.owner[key] != self.rank and part is not None:
                name, first = f"{' '.join(key)} {index}", self.entries[key].sources[index][2:]
                given.setdefault(self.owner[key], {}).update({name: part, f"{name} first": np.array(first, np.int64)})
        receivers = {self.owner[key] for key, _ in self.parts} - {self.rank}
        for receiver in sorted(receivers):
            write_safetensors(folder / f".parts-{self.rank}-{receiver}", given.get(receiver, {}), sync=False)
        report, files = {}, {}
        for key, entry in self.entries.items():
            if self.owner[key] == self.rank:
                size, mine = _bytes_of(entry), files.setdefault(key[0], [[0, []]])
                if mine[-1][0] and mine[-1][0] + size > FILE_BYTES:
                    mine.append([0, []])
                mine[-1][0] += size
                mine[-1][1].append(key)
        inbox = Inbox(folder, self.rank, wait)
        for group, parts in files.items():
            for number, (_, keys) in enumerate(parts):
                tensors = {}
                for key in keys:
                    tensors |= self._readers(key, inbox)
                name = f"{group}.{self.rank}.{number}"
                written = write_safetensors(folder / name, tensors, self.metadata.get(group))
                sizes = {name: _size_of(*value[1:]) for name, value in tensors.items()}
                report.setdefault(group, {})[name] = {**written, "tensors": sizes}
        inbox.close()
        return report

    def _readers(self, key, inbox):
        """{name: (function, shape, dtype)} of an entry's tensors for write_safetensors; its sources are gathered once."""
        entry, made = self.entries[key], []

        def array(index):
            if index == 0:
                made[:] = entry.arrays(*(self._whole(key, i, inbox) for i in range(len(entry.sources))))
            found, made[index] = made[index], None
            return found

        return {name: (functools.partial(array, i), *how) for i, (name, how) in enumerate(entry.tensors.items())}

    def _whole(self, key, index, inbox):
        """A source of an entry, of all its ranks, in the file's layout."""
        source = self.entries[key].sources[index]
        weight, first = source[0], source[2:]
        cut, name, parts = weight.cut, f"{' '.join(key)} {index}", {}  # parts: by rank of tp
        for rank in self._givers(self.rank, source):
            if rank == self.rank:
                part, start = self.parts[key, index], first
            else:
                part, start = inbox.read(rank, name), inbox.read(rank, f"{name} first")
            tp = int(np.argwhere(self.topology.grid == rank)[0][-1])
            if not first:
                parts[tp] = part
            elif part is not None:
                shape = weight.shape[::-1] if weight.transposed else list(weight.shape)
                if cut is not None:
                    shape[cut.dim] = sum(b - a for a, b in cut.of_ranks[tp])
                if tp not in parts:
                    parts[tp] = np.empty(shape, part.dtype)
                parts[tp].reshape([-1])[start[0] : start[0] + part.size] = part.reshape([-1])
        if cut is None:
            (found,) = parts.values()
        else:
            found = np.empty(cut.shape, next(iter(parts.values())).dtype)
            for tp, part in parts.items():
                cut.put(found, part, tp)
        return found.T if weight.transposed else found


class Inbox:
    """What other ranks give to this one, in the files .parts-GIVER-THIS of a folder; removed when it has been read."""

    def __init__(self, folder, rank, wait):
        self.folder, self.rank, self.wait, self.tensors = folder, rank, wait, {}

    def read(self, giver, name):
        """An array; None: the giver has nothing of it."""
        if giver not in self.tensors:
            path = self.folder / f".parts-{giver}-{self.rank}"
            self.wait(path)
            self.tensors[giver] = path, safetensors_header(path)
        path, header = self.tensors[giver]
        return read_tensor(path, header[name]) if name in header else None

    def close(self):
        for path, _ in self.tensors.values():
            path.unlink()


def _on_host(tensor):
    """numpy of a tensor, of its own memory where that is the host's; bfloat16 as float32; None of None."""
    if tensor is None or isinstance(tensor, np.ndarray):
        return tensor
    if tensor.dtype == paddle.bfloat16:
        return tensor.astype("float32").numpy()
    return np.from_dlpack(tensor.detach()) if tensor.place.is_cpu_place() and tensor.size else tensor.numpy()


def _bytes_of(entry):
    return sum(_size_of(*how) for how in entry.tensors.values())


def _size_of(shape, dtype):
    return int(math.prod(shape)) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)


def checksums(folder, sizes, topology):
    """{name: crc32 as it is now} of files of a folder, {name: bytes}: each rank reads its share of them, by bytes, then all
    know all."""
    share = owners(sizes, dict.fromkeys(sizes, range(topology.degrees.world)))
    mine = {name: crc32_of(Path(folder) / name) for name, rank in share.items() if rank == topology.rank}
    topology.meet()  # reading may take one of them longer
    return {name: found for part in topology.exchange(mine) for name, found in part.items()}


def crc32_of(path):
    """Of a file's bytes; None if it cannot be read."""
    found, block = 0, bytearray(4 << 20)
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                found = zlib.crc32(memoryview(block)[:size], found)
    except OSError:
        return None
    return found
