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
import atexit
import contextlib
import dataclasses
import functools
import json
import math
import os
import queue
import re
import socket
import threading
import time
from collections import defaultdict, deque, namedtuple
from multiprocessing.connection import Client, Listener

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
    _paddlenlp_names,
    base_weights,
    build,
    load_weights,
    load_adapter,
    lora_layers,
    merge,
    set_parameter,
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
            # Paddle wants a number that no other group of a process has, and the same one on all ranks of a group.
            number = 1000 + self.store.add("groups", 1)
            store = core.TCPStore(host, port, True, 1, 900)
            self.store.set(f"group {key}", f"{port} {number}")
        else:
            port, number = map(int, self.store.get(f"group {key}").split())
            store = core.TCPStore(host, port, False, 1, 900)
        group = core.ProcessGroupGloo.create(store, mine, len(ranks), number)
        group = dist.collective.Group(mine, number, list(ranks), group, f"{key}")
        self.groups[key] = group
        return group


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


# ========================================================================================================= pipeline


def stage_layers(layers, stages):
    """[range of layers] of each stage: as even as can be; stages in the middle, which have no embedding or head, take more."""
    order = sorted(range(stages), key=lambda stage: (stage in (0, stages - 1), stage == stages - 1, stage))
    sizes = [layers // stages + (order.index(stage) < layers % stages) for stage in range(stages)]
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for size, end in zip(sizes, ends)]


def check_pipeline(config, degrees):
    """[complaint] about these degrees for a model of this config."""
    stages = degrees.pp * degrees.virtual
    if degrees.virtual > 1 and degrees.pp == 1:
        return [f"virtual_pp_degree {degrees.virtual} needs pipeline_parallel_degree above 1"]
    if stages > config.num_hidden_layers:
        factors = f"pipeline_parallel_degree {degrees.pp}"
        if degrees.virtual > 1:
            factors += f" x virtual_pp_degree {degrees.virtual} = {stages}"
        return [f"{factors} is more than layers ({config.num_hidden_layers})"]
    return []


@functools.cache
def timetable(ranks, virtual, batches):
    """For each rank of a pipeline its [("forward" or "backward", chunk, micro-batch)] of a step, in order.

    Chunk c of rank r is stage c · ranks + r. One forward, one backward (arXiv 2006.09503) with one chunk a rank, else
    interleaved (arXiv 2104.04473, 2.2): micro-batches go in groups of as many as there are ranks, all of a group through
    one chunk before the next; the last group may be smaller. A rank begins with as many forwards as lie between it and
    the first backward; where that order would wait for itself, as it can with a smaller group, with more.
    """
    groups = [range(first, min(first + ranks, batches)) for first in range(0, batches, ranks)]
    forwards = [("forward", chunk, i) for group in groups for chunk in range(virtual) for i in group]
    backwards = [("backward", chunk, i) for group in groups for chunk in reversed(range(virtual)) for i in group]
    for more in range(len(forwards) + 1):
        plan = []
        for rank in range(ranks):
            ahead = ranks - rank - 1 if virtual == 1 else 2 * (ranks - rank - 1) + (virtual - 1) * ranks
            ahead = min(ahead + more, len(forwards))
            steady = [step for pair in zip(forwards[ahead:], backwards) for step in pair]
            plan.append([*forwards[:ahead], *steady, *backwards[len(forwards) - ahead :]])
        if simulate(plan) is not None:
            return plan


def simulate(plan, costs={"forward": 1.0, "backward": 2.0}):
    """How long a timetable takes, and the share of that time in which a rank is idle; None if it waits for itself."""
    ranks, virtual = len(plan), 1 + max(chunk for _, chunk, _ in plan[0])
    last, finished, places, clocks = ranks * virtual - 1, {}, [0] * ranks, [0.0] * ranks
    while any(place < len(steps) for place, steps in zip(places, plan)):
        moved = False
        for rank, steps in enumerate(plan):
            while places[rank] < len(steps):
                kind, chunk, batch = steps[places[rank]]
                stage = chunk * ranks + rank
                needed = [("forward", stage - 1, batch)] if kind == "forward" and stage else []
                if kind == "backward":
                    needed = [("forward", stage, batch)] + ([("backward", stage + 1, batch)] if stage < last else [])
                if not all(what in finished for what in needed):
                    break
                clocks[rank] = max([clocks[rank], *(finished[what] for what in needed)]) + costs[kind]
                finished[kind, stage, batch] = clocks[rank]
                places[rank], moved = places[rank] + 1, True
        if not moved:
            return None
    busy = sum(costs[kind] for steps in plan for kind, _, _ in steps)
    return max(clocks), 1 - busy / (ranks * max(clocks))


def bubble(ranks, virtual, batches):
    """The share of a step in which a rank of a pipeline is idle, if all stages take equally long: (p-1) / (v·m + p-1).

    With virtual stages, and micro-batches that are no multiple of the ranks, there is no formula: the timetable's own.
    """
    if virtual == 1 or batches % ranks == 0:
        return (ranks - 1) / (virtual * batches + ranks - 1)
    return simulate(timetable(ranks, virtual, batches))[1]


class Channel:
    """Messages, a header and tensors of any shapes, from one process to another, in the order of sending.

    A bell beside the group (a connection of Python's own) carries the headers: a receiver waits at it, since gloo gives
    up a wait after 30 seconds, and a neighbour may need longer; and it hears at once that its neighbour is gone.
    """

    def __init__(self, source, target, groups):
        self.source, self.target, self.error = source, target, None
        self.group, mine = groups.connect([source, target], "channel "), groups.launch.rank
        key = f"bell {source} {target}"
        if mine == target:
            host = groups.launch.endpoints[source].split(":")[0]
            self.bell = Client((host, int(groups.store.get(key))))
        else:
            with Listener(("", 0)) as listener:
                groups.store.set(key, str(listener.address[1]))
                self.bell = listener.accept()
        self.waiting, self.sent = queue.SimpleQueue(), []
        if _backend() != "gloo":  # the first call connects, and waits for that of the other
            (dist.recv if mine == target else dist.send)(paddle.zeros([1]), source if mine == target else target, self.group)
        elif mine == source:  # gloo's sends end when they are received
            self.thread = threading.Thread(target=self._send_all, daemon=True)
            self.thread.start()
            atexit.register(self.close)

    def send(self, header, tensors):
        """header: what JSON can hold. Returns at once; the tensors must not change afterwards."""
        if self.error is not None:
            raise RuntimeError(f"rank {self.target} takes no more from rank {self.source}") from self.error
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        header = [header, [[tensor.shape, str(tensor.dtype).rpartition(".")[2]] for tensor in tensors]]
        if _backend() == "gloo":
            self.waiting.put((header, tensors))
        else:
            self.bell.send_bytes(json.dumps(header).encode())
            self.sent = [(task, tensor) for task, tensor in self.sent if not task.is_completed()]
            self.sent += [(dist.isend(tensor, self.target, self.group), tensor) for tensor in tensors]

    def _send_all(self):
        while (message := self.waiting.get()) is not None:
            header, tensors = message
            try:
                self.bell.send_bytes(json.dumps(header).encode())
                for tensor in tensors:
                    dist.send(tensor, self.target, self.group)
            except Exception as error:  # send() raises it
                self.error = error
                return
            message = tensors = tensor = None  # else kept until the next comes

    def receive(self):
        """(header, tensors) of the next message, however long it takes to come."""
        try:
            header, kinds = json.loads(self.bell.recv_bytes())
        except (EOFError, ConnectionError):
            raise RuntimeError(f"rank {self.source} of the pipeline is gone") from None
        tensors = [paddle.empty(shape, dtype) for shape, dtype in kinds]
        for tensor in tensors:
            dist.recv(tensor, self.source, self.group)
        return header, tensors

    def close(self):
        """What is not sent yet gets a little time."""
        self.waiting.put(None)
        self.thread.join(20)


@functools.cache  # a process has one
def channel(source, target, groups):
    return Channel(source, target, groups)


class HandedOn(Exception):
    """Raised inside a model's forward() where this rank's part of it ends, and the next rank's begins."""


Flight = namedtuple("Flight", "inputs asked outputs")  # of a chunk's forward, for its backward; see Pipeline.take()


class Pipeline:
    """This rank's place in a pipeline, and its talk with its neighbours.

    Chunk c of it is stage c · size + rank; layers[c] are its layers. From stage to stage go x (B, T, D) and the
    probabilities of the routers before it, of which the last stage makes their loss; back go the gradients of those that
    have one. now: (chunk, micro-batch) of the forward that is being made while training, else None.
    """

    def __init__(self, topology, layers):
        pp = topology.pp
        self.axis, self.rank, self.size, self.virtual = pp, pp.rank, pp.size, topology.degrees.virtual
        stages = stage_layers(layers, self.size * self.virtual)
        self.layers, self.last = stages[self.rank :: self.size], len(stages) - 1
        self.now, self.starts, self.whole = None, False, False
        self.flights, self.arrived = {}, defaultdict(deque)  # messages, by (kind, chunk, micro-batch)
        self.waited = 0.0  # seconds, for messages
        pp.idle = pp.bubble = 0.0  # share of the last step in which this rank waited, and of bubble()
        # In an order of all, or ranks would wait for each other in a circle: every other edge first, at the same time.
        edges = sorted(range(self.size if self.virtual > 1 else self.size - 1), key=lambda rank: (rank % 2, rank))
        edges = [(pp.ranks[rank], pp.ranks[(rank + 1) % self.size]) for rank in edges]
        pairs = dict.fromkeys(pair for a, b in edges for pair in ((a, b), (b, a)) if topology.rank in pair)
        self.channels = {pair: channel(*pair, topology.groups) for pair in pairs if topology.groups is not None}

    def stage(self, chunk):
        return chunk * self.size + self.rank

    def send(self, step, header, tensors):
        """To the next rank (step 1) or the one before (-1); header: [kind, chunk there, micro-batch, …]."""
        target = (self.rank + step) % self.size
        self.channels[self.axis.ranks[self.rank], self.axis.ranks[target]].send(header, tensors)

    def receive(self, step, kind, chunk, batch):
        """What the rank one step away sent of this kind for a chunk and a micro-batch: (rest of the header, tensors)."""
        begin, key = time.perf_counter(), (kind, chunk, batch)
        source = self.axis.ranks[(self.rank + step) % self.size]
        while not self.arrived[key]:
            (*found, rest), tensors = self.channels[source, self.axis.ranks[self.rank]].receive()
            self.arrived[tuple(found)].append((rest, tensors))
        self.waited += time.perf_counter() - begin
        return self.arrived[key].popleft()

    def take(self, chunk, recompute):
        """[x, *probabilities] that the stage before gave for a chunk. asked: which of them shall have a gradient."""
        batch = None if self.now is None else self.now[1]
        asked, tensors = self.receive(-1, "forward", chunk, batch)
        for tensor, wanted in zip(tensors, asked):
            tensor.stop_gradient = not wanted
        if recompute:  # see CausalLM.embed()
            tensors[0].stop_gradient = False
        return tensors, asked

    def give(self, chunk, tensors):
        """[x, *probabilities] of a chunk to the next stage."""
        batch = None if self.now is None else self.now[1]
        there = chunk + (self.rank == self.size - 1)
        self.send(1, ["forward", there, batch, [not tensor.stop_gradient for tensor in tensors]], tensors)

    def backward(self, chunk, batch):
        """The backward of a chunk's forward: gradients come from the next stage and go to the one before."""
        inputs, asked, outputs = self.flights.pop((chunk, batch))
        passed = []  # gradients of probabilities that only passed through
        if self.stage(chunk) == self.last:
            outputs[0].backward()
        else:
            there = chunk + (self.rank == self.size - 1)
            gradients = iter(self.receive(1, "backward", there, batch)[1])
            own = [(tensor, next(gradients)) for tensor in outputs if not tensor.stop_gradient]
            passed = list(gradients)
            if own:
                paddle.autograd.backward(*map(list, zip(*own)))
        if self.stage(chunk) > 0:
            wanted = [tensor for tensor, wanted in zip(inputs, asked) if wanted]
            if passed:
                wanted = wanted[: len(wanted) - len(passed)]
            found = [paddle.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in wanted]
            self.send(-1, ["backward", chunk, batch, None], [*found, *passed])

    def steps(self, batches, forward):
        """micro_steps() of a pipeline. forward(i): the loss of the i-th batch, or HandedOn."""
        begin, waited, losses = time.perf_counter(), self.waited, {}
        for kind, chunk, i in timetable(self.size, self.virtual, len(batches))[self.rank]:
            if kind == "forward":
                self.now = chunk, i
                try:
                    loss = forward(i)
                    self.flights[self.now] = self.flights[self.now]._replace(outputs=[loss])
                    losses[i] = float(loss)
                except HandedOn:
                    pass
                finally:
                    self.now = None
                continue
            self.backward(chunk, i)
            if chunk == 0:
                yield losses.pop(i, 0.0), batches[i]
        # The first rank is the last to end; who went on to a collective would wait too long for gloo.
        if self.rank > 0:
            self.receive(-1, "end", 0, 0)
        if self.rank < self.size - 1:
            self.send(1, ["end", 0, 0, None], [])
        seconds = time.perf_counter() - begin
        self.axis.idle = (self.waited - waited) / seconds
        self.axis.bubble = bubble(self.size, self.virtual, len(batches))

    def everywhere(self, run):
        """What run() returns on the last stage, a tensor or several, on all ranks; elsewhere it raises HandedOn."""
        if self.now is not None or self.whole:
            return run()
        if paddle.is_grad_enabled():
            raise RuntimeError("a pipeline is trained by parallel.micro_steps(), and runs by itself in paddle.no_grad() alone")
        return self.end(self.begin(run))

    def begin(self, run):
        """This rank's part of run(), without gradients: its result on the last stage, which goes back at once, else None."""
        self.whole = True
        try:
            found = run()
        except HandedOn:
            return None
        finally:
            self.whole = False
        self._back(found)
        return found

    def end(self, found):
        """The result of the oldest begin() that has none yet."""
        if found is None:
            several, found = self.receive(1, "result", 0, 0)
            found = tuple(found) if several else found[0]
            self._back(found)
        return found

    def _back(self, found):
        if self.rank > 0:
            several = isinstance(found, tuple)
            self.send(-1, ["result", 0, 0, several], found if several else [found])


class StagedCausalLM:
    """A ParallelCausalLM of which this process has some layers. Without gradients a call runs through all of them."""

    def forward(self, *inputs, **options):
        forward = super().forward
        return self.pipeline.everywhere(lambda: forward(*inputs, **options))

    def hidden_states(self, *inputs, **options):
        hidden_states = super().hidden_states
        return self.pipeline.everywhere(lambda: hidden_states(*inputs, **options))

    def logits(self, x):
        logits = super().logits

        def run():
            if self.pipeline.rank < self.pipeline.size - 1:
                raise HandedOn
            return logits(x)

        return self.pipeline.everywhere(run)

    def trunk(self, input_ids, position_ids=None, rows=None, caches=None):
        pipeline = self.pipeline
        if caches is None and self.prefix is not None:
            caches = self.new_cache(input_ids.shape[0])
        chunks = range(pipeline.virtual) if pipeline.now is None else pipeline.now[:1]
        pipeline.starts = pipeline.stage(chunks[0]) == 0
        x, shared = self.prepare(input_ids, position_ids, rows, caches)
        for chunk in chunks:
            inputs, asked = [x], []
            if pipeline.stage(chunk) > 0:
                inputs, asked = pipeline.take(chunk, self.recompute and self.training)
            x, probabilities = self.through(pipeline.layers[chunk], inputs[0], shared, caches)
            if pipeline.now is not None:
                assert pipeline.now not in pipeline.flights, "a model is called once for a micro-batch"
                pipeline.flights[pipeline.now] = Flight(inputs if asked else [], asked, [x, *probabilities])
            probabilities = [*probabilities, *inputs[1:]]  # in this order: those that pass through come last
            if pipeline.stage(chunk) == pipeline.last:
                return self.last_norm(x), probabilities
            pipeline.give(chunk, [x, *probabilities] if self.training else [x])
        raise HandedOn

    def embed(self, input_ids, position_ids, before=0):
        return super().embed(input_ids, position_ids, before) if self.pipeline.starts else None

    def flops_per_token(self, T):
        fixed, each = self.whole_flops
        return fixed + each * T


class Elsewhere(paddle.nn.Layer):
    """Stands in a model for a layer that another stage of the pipeline holds."""


def cut_stages(model, topology):
    """Pipeline parallelism of a model as it was built: what other stages hold is taken out.

    A tied head is a copy of the embedding on the last stage; model.tied is the axis of the two ranks that have it.
    """
    if topology.pp.size == 1:
        return
    rows = [None, *filter(None, [_paddlenlp_names(model.config)])]  # of the names that files may have
    names = {weight.name for names in rows for weight in base_weights(model, names)}
    fixed = model.flops_per_token(0)
    model.whole_flops = fixed, model.flops_per_token(1) - fixed
    pipeline = model.pipeline = Pipeline(topology, model.config.num_hidden_layers)
    first, last = pipeline.rank == 0, pipeline.rank == pipeline.size - 1
    for i in set(range(len(model.layers))) - {i for layers in pipeline.layers for i in layers}:
        model.layers[i] = Elsewhere()
    tied = model.lm_head is None
    for name, kept in (("embed_tokens", first or tied and last), ("embed_positions", first), ("embed_norm", first),
                       ("project_in", first), ("norm", last), ("project_out", last), ("lm_head", last)):  # fmt: skip
        if getattr(model, name) is not None and not kept:
            setattr(model, name, Elsewhere())
    ends = [topology.pp.ranks[0], topology.pp.ranks[-1]]
    model.tied = Axis("tied", ends, topology.rank, topology.groups) if tied and (first or last) else None
    model.elsewhere |= names - {weight.name for names in rows for weight in base_weights(model, names)}


def copies(model, path):
    """The axis over whose ranks, stages of a pipeline, there are copies of the parameter of this path; None: it is alone."""
    if model.topology.pp.size > 1:
        if path.startswith("prefix."):
            return model.topology.pp
        if path == "embed_tokens.weight" and model.tied is not None:
            return model.tied
    return None


# =============================================================================== gradients, and who updates what


class Shards:
    """What this rank does of a step's update: gradients added up over the ranks that hold other data, and its weights.

    weights: model.Weight objects of all that is trained here. `pieces` is what the optimizer updates, with name, tensor,
    grad and ndim (of the whole).
    """

    def __init__(self, model, weights, topology):
        self.model, self.weights, self.topology = model, weights, topology
        paths = {id(parameter): path for path, parameter in model.named_parameters()}
        self.copies = {w.name: copies(model, paths[id(w.parameter)]) for w in weights}  # on other stages of a pipeline
        self.partial = [w for w in weights if partial_over_tp(paths[id(w.parameter)], w.parameter, topology.tp)]
        self.pieces = weights

    @paddle.no_grad()
    def reduce_gradients(self):
        """Add gradients up over the ranks; returns their Euclidean norm over the whole model."""
        topology = self.topology
        for weight in self.weights:
            if weight.parameter.grad is None:  # an expert to which no token went
                weight.parameter.grad = paddle.zeros_like(weight.parameter)
        for axis in (topology.sep, topology.sharding, topology.dp):
            _all_reduce_together([w.parameter.grad for w in self.weights], axis)
        _all_reduce_together([w.parameter.grad for w in self.partial], topology.tp)
        for axis in (topology.pp, getattr(self.model, "tied", None)):
            if axis is not None and axis.size > 1:
                _all_reduce_together([w.parameter.grad for w in self.weights if self.copies[w.name] is axis], axis)
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
                copied = self.copies[weight.name]
                squares = squares + (kernels.squared_norm(gradient) if copied is None or copied.rank == 0 else 0.0)
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

    def hidden_states(self, input_ids, position_ids=None, rows=None, caches=None):
        self.topology.tp.sequence = self.topology.degrees.sequence_parallel and caches is None
        return super().hidden_states(input_ids, position_ids, rows, caches)

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
    """Make of a model, as build() gives it, this process's part of it, in place; returns it."""
    model.topology = topology
    if topology.degrees.world > 1:
        topology.tp.sequence = topology.degrees.sequence_parallel
        mix_in(model, ParallelCausalLM)
        cut_stages(model, topology)
        cut_tensors(model, topology.tp)
        if topology.pp.size > 1:
            mix_in(model, StagedCausalLM)
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

    batch_loss(batch): its part of the step's loss; in a pipeline it ends where it calls the model, but for the last stage,
    and the loss is 0.0 where it is not known. seed(i): seeds the randomness of the i-th, seed(i, layer) of a block in it.
    """
    topology = model.topology

    def forward(index):
        number = index * topology.data_size + topology.data_rank
        seed(number)
        model.draws = functools.partial(seed, number)
        return batch_loss(batches[index]) * (0.0 if batches[index].get("company") else 1.0)

    if topology.pp.size > 1:
        yield from model.pipeline.steps(batches, forward)
        return
    for index, batch in enumerate(batches):
        loss = forward(index)
        loss.backward()
        yield float(loss), batch


def in_turn(model, batches, run):
    """(batch, run(batch)) of each, without gradients; in a pipeline several are on their way at once.

    run calls the model once, and returns one or several tensors.
    """
    pipeline = getattr(model, "pipeline", None)
    if pipeline is None:
        yield from ((batch, run(batch)) for batch in batches)
        return
    begun = deque()
    for batch in batches:
        with paddle.no_grad():
            begun.append((batch, pipeline.begin(functools.partial(run, batch))))
        if len(begun) == pipeline.size - pipeline.rank:
            batch, found = begun.popleft()
            yield batch, pipeline.end(found)
    for batch, found in begun:
        yield batch, pipeline.end(found)


@paddle.no_grad()
def whole(weight, tensor, topology):
    """A weight, or a tensor of its shape (a moment), of all ranks of tp, as numpy in the file's layout."""
    cut, tp = weight.cut, topology.tp
    if cut is None:
        return weight.to_numpy(tensor)
    widths = [sum(last - first for first, last in ranges) for ranges in cut.of_ranks]
    turned = paddle.moveaxis(tensor, cut.dim, 0)
    turned = F.pad(turned, [0, 0] * (turned.ndim - 1) + [0, max(widths) - cut.width], pad_from_left_axis=False) if max(widths) > cut.width else turned
    parts = tp.all_gather(turned.unsqueeze(0)).numpy()
    found = np.empty(cut.shape, parts.dtype)
    for rank, width in enumerate(widths):
        cut.put(found, np.moveaxis(parts[rank, :width], 0, cut.dim), rank)
    return found.T if weight.transposed else found


def start(args):
    """The Topology of this process, from the arguments and what Paddle's launcher says; groups are connected."""
    launch = Launch.of_environment()
    names = {"pp": "pipeline", "sharding": "sharding", "tp": "tensor"}
    ways = {axis: max(1, getattr(args, f"{name}_parallel_degree")) for axis, name in names.items()}
    ways["sep"] = max(1, args.sep_parallel_degree, args.context_parallel_degree)
    ways["dp"] = launch.world // math.prod(ways.values())
    degrees = Degrees(**ways, virtual=max(1, getattr(args, "virtual_pp_degree", 1)), sequence_parallel=getattr(args, "sequence_parallel", False), context=args.context_parallel_degree > 1)
    if launch.world == 1:
        return Topology(degrees)
    return Topology(degrees, launch.rank, Gloo(launch))


SINGLE = Topology(Degrees())  # one process
