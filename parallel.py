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
import math
import os
import re
import socket
import time
from collections import namedtuple

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

    def gather_flat(self, x):
        """The x (n,) of all ranks one behind the other, without a second copy of them."""
        if self.size == 1:
            return x
        found = paddle.empty([self.size * x.shape[0]], x.dtype)
        with self._timed(x):
            dist.stream.all_gather(found, x.contiguous(), self.group)
        return found

    def begin_sum(self, x, scatter):
        """The sum of x (n,), which is lost, over the ranks; scatter: this rank's share of it. A function that waits for it.

        NCCL adds up meanwhile; gloo is done before this returns (64 MB between two ranks: 90 ms in the call, 0.04 ms in the
        waiting), and has all_reduce alone.
        """
        if self.size == 1:
            return lambda: x
        share = None
        with self._timed(x):
            if scatter and _backend() != "gloo":
                share = paddle.empty([x.shape[0] // self.size], x.dtype)
                task = dist.stream.reduce_scatter(share, x, dist.ReduceOp.SUM, self.group, sync_op=False)
            else:
                task = dist.all_reduce(x, dist.ReduceOp.SUM, self.group, sync_op=False)

        def finish():
            begin = time.perf_counter()
            task.wait()
            self.seconds += time.perf_counter() - begin
            if scatter:  # a copy, so that x is not kept alive by its share
                return self.share(x).clone() if share is None else share
            return x

        return finish

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

    def counted(self, shape):
        """A tensor of the part's shape: 1 for what no lower rank has too, else 0."""
        lower = np.zeros(self.shape[self.dim], bool)
        for first, last in (r for ranges in self.of_ranks[: self.rank] for r in ranges):
            lower[first:last] = True
        mine = np.concatenate([~lower[slice(*r)] for r in self.ranges]).astype(np.float32)
        mine = mine.reshape([-1 if dim == self.dim else 1 for dim in range(len(shape))])
        return paddle.to_tensor(np.broadcast_to(mine, shape))

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


class Rule(namedtuple("Rule", "parts sharded apart counts")):
    """What becomes of the gradient of a parameter.

    parts: axes along which each rank has a part of it, and all get the sum. sharded: the axis along which it is added up
    too, and the update divided (one of size 1: not at all). counts: whether this rank adds its squares to the norm, so that
    each element of the model is in it once; ranks of tp, pp and of `sharded` are added up, and those of the axes `apart`.
    """


def rule_of(path, parameter, topology):
    """The Rule of a parameter by its path in the model: the one place that says who has which part of which gradient."""
    tp, cut = topology.tp, getattr(parameter, "cut", None)
    parts = [topology.sep, topology.dp] + [tp] * partial_over_tp(path, parameter, tp)
    parts = tuple(axis for axis in parts if axis.size > 1)
    return Rule(parts, topology.sharding, (), cut is not None or tp.rank == 0)


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


def unit_of(path, tied):
    """The unit of a parameter, by its path: what is reduced, and in stage 3 gathered, together."""
    if match := re.match(r"layers\.\d+", path):
        return match[0]
    if tied and path.startswith("embed_tokens."):
        return "embed_tokens"  # the head reads it alone
    if path.startswith(("embed_", "project_in.")):
        return "embed"
    return next((name for name in ("norm", "prefix") if path.startswith(f"{name}.")), "head")


IN_FLIGHT = 2  # reductions of buckets that go on while backward does: each holds the bucket's whole gradients
ALIGNED = 16  # elements: a parameter within a flat range starts at a multiple, for kernels that read vectors


class Bucket:
    """Parameters of a unit, of one dtype and one Rule, as one flat range: one behind the other, padded to a multiple of
    the ranks. Rank i of the rule's sharded axis owns the i-th of equal ranges, whatever the shapes: even by bytes.

    gradient: of the owned range, added up over the sharded axis; None: none yet. owned: stage 3's weights.
    """

    def __init__(self, parameters, names, rule, stage):
        self.parameters, self.names, self.rule, self.axis = parameters, names, rule, rule.sharded
        self.dtype, self.sizes = parameters[0].dtype, [math.prod(p.shape) for p in parameters]
        self.starts, end = [], 0
        for size in self.sizes:
            self.starts.append(end)
            end += -(-size // ALIGNED) * ALIGNED
        self.width = -(-end // ALIGNED // self.axis.size) * ALIGNED  # of the owned range
        # Along the first of these while backward goes on, along the others once a step.
        self.summed = [axis for axis in (self.axis, *rule.parts) if axis.size > 1] or [self.axis]
        self.gradient, self.pending, self.owned = None, [], None
        if stage == 3:
            self.owned = self.axis.share(self.lay(parameters)).clone()
            self.owned.stop_gradient = names[0] is None
            self.release()

    def extent(self, index, rank=None):
        """(first, last) element of a parameter that a rank owns, and where the first lies in its range; or None."""
        start, size, rank = self.starts[index], self.sizes[index], self.axis.rank if rank is None else rank
        first, last = max(start, rank * self.width), min(start + size, (rank + 1) * self.width)
        return (first - start, last - start, first - rank * self.width) if first < last else None

    def lay(self, tensors):
        """Tensors of the parameters' shapes (None: zeros) -> the flat range (width * ranks,)."""
        parts, end = [], 0
        for start, size, tensor in zip([*self.starts, self.width * self.axis.size], [*self.sizes, 0], [*tensors, None]):
            if start > end:
                parts.append(paddle.zeros([start - end], self.dtype))
            if size:
                part = paddle.zeros([size], self.dtype) if tensor is None else tensor.detach().reshape([-1])
                parts.append(part)
            end = start + size
        return paddle.concat(parts)

    def parts_of(self, flat):
        """The flat range -> views of it in the parameters' shapes."""
        found = []
        for start, size, parameter in zip(self.starts, self.sizes, self.parameters):
            part = flat._slice(start, start + size)
            part.get_tensor()._set_dims(parameter.shape)
            found.append(part)
        return found

    @paddle.no_grad()
    def gather(self):
        """Stage 3: the parameters get their values, until release()."""
        self.take_over()
        for parameter, part in zip(self.parameters, self.parts_of(self.axis.gather_flat(self.owned.detach()))):
            part._share_buffer_to(parameter)

    def release(self):
        for parameter in self.parameters:
            parameter._clear_data()

    @paddle.no_grad()
    def take_over(self):
        """Stage 3: what was set to whole values meanwhile (loaded) becomes this rank's part of them."""
        for index, parameter in enumerate(self.parameters):
            if not parameter._is_initialized():
                continue
            if extent := self.extent(index):
                first, last, place = extent
                values = parameter.detach().view([-1])._slice(first, last)
                self.owned.detach()._slice(place, place + last - first).copy_(values, True)
            parameter._clear_data()

    def begin(self):
        """Take the parameters' gradients and begin to add them up over the sharded axis; the names that have one."""
        gradients = [p.grad for p in self.parameters]
        arrived = [name for name, gradient in zip(self.names, gradients) if gradient is not None]
        flat = self.lay(gradients)
        del gradients
        for parameter in self.parameters:
            parameter.clear_gradient(False)
        self.pending.append(self.summed[0].begin_sum(flat, scatter=self.summed[0] is self.axis))
        return arrived

    def finish(self):
        while self.pending:
            found = self.pending.pop(0)()
            self.gradient = found if self.gradient is None else self.gradient.add_(found)


class Piece:
    """What this rank updates of a weight: some of its elements, laid flat."""

    def __init__(self, weight, bucket, index):
        self.weight, self.name, self.bucket, self.index = weight, weight.name, bucket, index
        self.first, self.last, self.place = bucket.extent(index)
        self.arrived = True  # a gradient has, on some rank

    @property
    def shape(self):
        """Of the whole weight: decay depends on its number of dimensions."""
        return self.weight.shape

    @property
    def tensor(self):
        """(n,) the elements, a view."""
        if self.bucket.owned is not None:
            return self.bucket.owned.detach()._slice(self.place, self.place + self.last - self.first)
        return self.weight.parameter.detach().view([-1])._slice(self.first, self.last)

    @property
    def grad(self):
        """(n,) their gradient, or None."""
        if self.bucket.gradient is None or not self.arrived:
            return None
        return self.bucket.gradient._slice(self.place, self.place + self.last - self.first)

    def clear_gradient(self):
        self.bucket.gradient = None


class Shards:
    """What this rank does of a step's update: gradients added up over the ranks that hold other data, and its weights.

    weights: model.Weight objects of all that is trained here. `pieces` is what the optimizer updates, with name, tensor,
    grad and shape (of the whole): the weights themselves, or with sharding the ranges of them that this rank owns. Trained
    weights are float32 in bf16 runs too, where only products are in bfloat16: they are the master weights.

    What a rank of n along the sharding axis holds (Rajbhandari et al., arXiv 1910.02054):
    stage 1: moments of its n-th. Gradients whole, until the last micro-batch's are there; then n-th too.
    stage 2: gradients of its n-th, but for the unit (embedding, block, norm, head) whose backward is under way.
    stage 3: weights of its n-th, frozen ones too, but for the unit that is at work. So forward keeps no more than each
    unit's inputs, and backward computes the unit's activations again: `recompute` is always on, in effect.

    Gradients of a unit are on their way while backward goes on, where the backend allows (NCCL; gloo blocks). All ranks
    begin with the units in the same order, backward's, whatever their batches are.
    """

    def __init__(self, model, weights, topology):
        self.model, self.weights, self.topology = model, weights, topology
        degrees, model.shards = topology.degrees, self
        self.stage = max(1, degrees.stage) if topology.sharding.size > 1 else 0
        self.paths = {id(parameter): path for path, parameter in weight_tensors(model)}
        self.rules = {id(w.parameter): rule_of(self.paths[id(w.parameter)], w.parameter, topology) for w in weights}
        self.units, self.held = {}, {}  # by name; {id of a parameter: the Piece that is here}
        self.arrived, self.early, self.flying = set(), False, []
        if degrees.world > 1:
            self._make_units()
        mine = [self.held[id(w.parameter)] for w in weights if id(w.parameter) in self.held]
        self.pieces = mine if self.stage else weights
        if self.stage == 3:
            gather_while_used(model, self)

    def _make_units(self):
        grouped, trained = {}, {id(w.parameter): w for w in self.weights}
        for path, parameter in weight_tensors(self.model):
            weight = trained.get(id(parameter))
            if weight is None and self.stage < 3:
                continue
            if (rule := self.rules.get(id(parameter))) is None:
                rule = Rule((), rule_of(path, parameter, self.topology).sharded, (), False)
            unit = unit_of(path, self.model.lm_head is None)
            key = weight is not None, str(parameter.dtype), rule
            grouped.setdefault(unit, {}).setdefault(key, []).append((path, weight, parameter))
        for name, groups in grouped.items():
            self.units[name] = Unit(name, self)
            for (is_trained, _, rule), entries in groups.items():
                names = [weight.name if is_trained else None for _, weight, _ in entries]
                bucket = Bucket([parameter for *_, parameter in entries], names, rule, self.stage)
                self.units[name].buckets.append(bucket)
                for index, (path, weight, parameter) in enumerate(entries):
                    if self.stage and bucket.extent(index):
                        self.held[id(parameter)] = Piece(weight or Frozen(path, parameter), bucket, index)
                    if is_trained and self.stage < 3:
                        self.units[name].watch(path, parameter)

    @property
    def buckets(self):
        """Of what is trained, in the order in which all ranks reduce them: backward's."""
        return [bucket for unit in reversed(self.units.values()) for bucket in unit.trained]

    @contextlib.contextmanager
    def backward(self, last):
        """Around the backward of a micro-batch; last: of the step's. Units are reduced as they get ready."""
        self.early = self.stage == 2 or self.stage < 2 and last
        for unit in self.units.values():
            unit.start()
        yield
        if self.early:
            self._reduce_rest()
        self.early = False

    @paddle.no_grad()
    def reduce_ready(self):
        """Begin with the units that are ready, up to the first that is not: a batch for company may pass some by."""
        for unit in reversed(self.units.values()):
            if not unit.reduced:
                if not unit.is_ready:
                    return
                unit.reduce()

    @paddle.no_grad()
    def _reduce_rest(self):
        for unit in reversed(self.units.values()):
            unit.reduce_rest()

    @paddle.no_grad()
    def reduce_gradients(self):
        """Add gradients up over the ranks; returns their Euclidean norm over the whole model."""
        if self.units and self.stage < 2:
            self._reduce_rest()
        for bucket in self.buckets:
            if self.stage == 3:
                bucket.gradient = bucket.owned.grad
            bucket.finish()
        self.flying.clear()
        for unit in self.units.values():
            unit.start()
        if self.units:
            self._agree_on_arrivals()
        for bucket in self.buckets:
            if bucket.gradient is None:
                continue
            for axis in bucket.summed[1:]:
                axis.all_reduce(bucket.gradient)
            if not self.stage:
                self._hand_back(bucket)
        for piece in self.held.values():
            piece.arrived = piece.name in self.arrived
        return self._norm()

    def _hand_back(self, bucket):
        """Stage 0: the sums are the parameters' gradients."""
        for name, parameter, part in zip(bucket.names, bucket.parameters, bucket.parts_of(bucket.gradient)):
            if name in self.arrived:
                parameter.grad = part
        bucket.gradient = None

    def _agree_on_arrivals(self):
        """Experts that no token chose here have a gradient if one did elsewhere; who has none anywhere is not updated."""
        if self.model.config.experts is None:
            return
        for name in ("sharding", "sep", "dp", "tp"):
            axis = getattr(self.topology, name)
            rules = [(w.name, self.rules[id(w.parameter)]) for w in self.weights]
            names = [name for name, rule in rules if axis.size > 1 and (axis in rule.parts or axis is rule.sharded)]
            if names:
                seen = paddle.to_tensor([float(name in self.arrived) for name in names])
                self.arrived |= {name for name, there in zip(names, axis.all_reduce(seen, "max").numpy()) if there}

    def _norm(self):
        sums = {(): paddle.zeros([], "float64")}
        for piece in self.pieces:
            parameter = piece.weight.parameter if self.stage else piece.parameter
            rule, gradient = self.rules[id(parameter)], piece.grad
            if gradient is None or not rule.counts:
                continue
            if (cut := getattr(parameter, "cut", None)) is not None and cut.overlaps:
                counted = cut.counted(parameter.shape)
                gradient = gradient * (counted.reshape([-1])[piece.first : piece.last] if self.stage else counted)
            sums[rule.apart] = sums.get(rule.apart, 0.0) + kernels.squared_norm(gradient)
        total = 0.0
        for axes, squares in sums.items():
            for axis in axes:
                axis.all_reduce(squares)
            total = total + squares
        for axis in (self.topology.tp, self.topology.pp, *([self.topology.sharding] if self.stage else [])):
            axis.all_reduce(total)
        return math.sqrt(float(total))

    @paddle.no_grad()
    def gather_weights(self):
        """After the optimizer's step: the weights that other ranks have updated. Gradients are gone."""
        if not self.stage:
            return
        for bucket in self.buckets:
            if self.stage < 3:
                flat = bucket.axis.gather_flat(bucket.axis.share(bucket.lay(bucket.parameters)))
                for parameter, part in zip(bucket.parameters, bucket.parts_of(flat)):
                    parameter.set_value(part)
            else:
                bucket.owned.clear_gradient(False)
            bucket.gradient = None
        self.arrived.clear()

    # ------------------------------------------------------------------------------- for checkpoints
    # Moments are optimizer.moments[name], each (n,) of the piece of this name. A file is written from whole(), weight by
    # weight; or, of weights, in each_unit(), while they are whole. It is read by piece_of(), and of stage 3's weights, with
    # no more than one of them whole, into held[id(parameter)].tensor.

    def piece_of(self, weight, array):
        """numpy (n,): what this rank owns of an array of the parameter's shape (our layout), or None. No one talks."""
        if not self.stage:
            return array
        piece = self.held.get(id(weight.parameter))
        return None if piece is None else np.ascontiguousarray(array).reshape(-1)[piece.first : piece.last]

    @paddle.no_grad()
    def whole(self, weight, tensor):
        """numpy of the parameter's shape (our layout), from each rank's tensor (n,) of its piece: a moment, a gradient, or
        the piece's own. Ranks along sharding call it together; tensor is None where a rank owns nothing of it."""
        if not self.stage:
            return tensor.numpy()
        parameter = weight.parameter
        unit = self.units[unit_of(self.paths[id(parameter)], self.model.lm_head is None)]
        bucket, index = next((b, i) for b in unit.buckets for i, p in enumerate(b.parameters) if p is parameter)
        extents = [bucket.extent(index, rank) for rank in range(bucket.axis.size)]
        most = max(extent[1] - extent[0] for extent in extents if extent)
        dtype = bucket.dtype if tensor is None else tensor.dtype
        mine = paddle.zeros([most], dtype)
        if tensor is not None:
            mine[: tensor.shape[0]] = tensor
        parts = bucket.axis.gather_flat(mine).reshape([-1, most])
        parts = (parts.astype("float32") if dtype == paddle.bfloat16 else parts).numpy()
        parts = [part[: extent[1] - extent[0]] for part, extent in zip(parts, extents) if extent]
        return np.concatenate(parts).reshape(parameter.shape)

    def each_unit(self):
        """Yields the ids of each unit's parameters while they are whole. Ranks of sharding go through it together."""
        for unit in self.units.values():
            with unit.whole() if self.stage == 3 else contextlib.nullcontext():
                yield {id(parameter) for bucket in unit.buckets for parameter in bucket.parameters}

    def take_over(self):
        """Stage 3: parameters set to whole values (by loading) are given back now, not when they are used next."""
        for unit in self.units.values():
            for bucket in unit.buckets if self.stage == 3 else ():
                bucket.take_over()


Frozen = namedtuple("Frozen", "name parameter")  # in a Weight's place; name: our path


def weight_tensors(model):
    """(path, tensor) of parameters, and of the buffers that hold a quantized model's weights."""
    names = (".qweight", ".qzeros", ".scales", ".g_index")
    return [*model.named_parameters(), *(found for found in model.named_buffers() if found[0].endswith(names))]


class Unit:
    """Buckets that get ready together.

    A unit is ready in backward when all the parameters have a gradient that always get one. Those of a sparse block's
    experts do not, as nobody may choose an expert; but they are computed before the attention's, which come after them.
    """

    def __init__(self, name, shards):
        self.name, self.shards, self.buckets = name, shards, []
        self.always, self.missing, self.reduced, self.users = set(), set(), False, 0

    @property
    def trained(self):
        return [bucket for bucket in self.buckets if bucket.names[0] is not None]

    def watch(self, path, parameter):
        sparse = self.shards.model.config.experts is not None
        if not (sparse and ".mlp." in path):
            self.always.add(path)
            parameter._register_backward_hook(functools.partial(self.arrived, path))

    def start(self):
        self.missing, self.reduced = set(self.always), False

    def arrived(self, path, *_):
        self.missing.discard(path)
        if self.shards.early and not self.missing:
            self.shards.reduce_ready()

    @property
    def is_ready(self):
        return bool(self.always) and not self.missing

    def stays(self, bucket):
        """Whether its gradients are complete on this rank as they are."""
        return not self.shards.stage and not bucket.rule.parts

    def reduce(self):
        shards = self.shards
        for bucket in self.trained:
            _add_overlaps(bucket.parameters, shards.topology.tp)
            if self.stays(bucket):
                continue
            shards.arrived.update(bucket.begin())
            shards.flying.append(bucket)
            while len(shards.flying) > IN_FLIGHT:
                shards.flying.pop(0).finish()
        self.reduced = True

    def reduce_rest(self):
        if not self.reduced:
            self.reduce()
            return
        sent = [bucket for bucket in self.trained if not self.stays(bucket)]
        late = [name for b in sent for name, p in zip(b.names, b.parameters) if p.grad is not None]
        assert not late, f"gradients that came after their unit's reduction: {late}"

    # ------------------------------------------------------------------------------- stage 3

    @contextlib.contextmanager
    def whole(self):
        """The unit's parameters have their values."""
        if not self.users:
            for bucket in self.buckets:
                bucket.gather()
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                for bucket in self.buckets:
                    bucket.release()


def _add_overlaps(parameters, tp):
    """Gradients whose rows several ranks of tp have are added up over these ranks, in place."""
    for parameter in parameters:
        cut = getattr(parameter, "cut", None)
        if cut is None or not cut.overlaps:
            continue
        whole = np.zeros(cut.shape, np.float32)
        if parameter.grad is not None:
            cut.put(whole, parameter.grad.numpy())
        whole = tp.all_reduce(paddle.to_tensor(whole))
        parameter.grad = paddle.to_tensor(cut.take(whole.numpy()))


# ----------------------------------------------------------------------------------- stage 3: whole while they are used


class _Together(PyLayer):
    """A computation with units whose weights are whole only while it runs; in backward it runs again, with gradients."""

    @staticmethod
    def forward(ctx, call, *tensors):
        ctx.call, ctx.random = call, paddle.get_rng_state()
        ctx.set_materialize_grads(False)
        tensors = tensors[len(call.trained) :]
        ctx.frozen = [t.stop_gradient for t in tensors]
        ctx.save_for_backward(*tensors)
        return call.run(tensors)

    @staticmethod
    def backward(ctx, *gradients):
        call, now, inputs = ctx.call, paddle.get_rng_state(), []
        for tensor, frozen in zip(ctx.saved_tensor(), ctx.frozen):
            inputs.append(tensor.detach())
            inputs[-1].stop_gradient = frozen
        with contextlib.ExitStack() as stack:
            for unit in call.units:
                stack.enter_context(unit.whole())
            paddle.set_rng_state(ctx.random)
            with paddle.set_grad_enabled(True):
                outputs = call.run(inputs)
            paddle.set_rng_state(now)
            pairs = [(y, dy) for y, dy in zip(outputs, gradients) if dy is not None and not y.stop_gradient]
            if pairs:
                paddle.autograd.backward(*map(list, zip(*pairs)))
            of_weights = []
            for unit in call.units:
                _add_overlaps([p for bucket in unit.trained for p in bucket.parameters], unit.shards.topology.tp)
                for bucket in unit.trained:
                    unit.shards.arrived.update(bucket.begin())
                    of_weights.append(bucket.pending.pop()())
        return (*of_weights, *(None if frozen else x.grad for x, frozen in zip(inputs, ctx.frozen)))


class _Call:
    """A function, its units, and its arguments: tensors in any nesting of tuples, lists and dicts, and others."""

    def __init__(self, units, function, args, options):
        self.units, self.function, self.tensors = units, function, []
        self.arguments = _taken_apart((args, options), self.tensors)
        self.trained = [bucket.owned for unit in units for bucket in unit.trained]

    def __call__(self):
        wanted = self.trained or any(not t.stop_gradient for t in self.tensors)
        with contextlib.ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(unit.whole())
            if paddle.is_grad_enabled() and wanted:
                found = _Together.apply(self, *self.trained, *self.tensors)
            else:
                with paddle.no_grad():
                    found = self.run(self.tensors)
        return _put_together(self.result, found)

    def run(self, tensors):
        """A tuple of the tensors that the function gives; `result` is how they belong together."""
        args, options = _put_together(self.arguments, tensors)
        found = []
        self.result = _taken_apart(self.function(*args, **options), found)
        return tuple(found)


_Place = namedtuple("_Place", "of")


def _taken_apart(value, tensors):
    """The value with a _Place for each tensor in it, which is appended to `tensors`."""
    if isinstance(value, paddle.Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _taken_apart(part, tensors) for key, part in value.items()}
    return type(value)([_taken_apart(part, tensors) for part in value]) if type(value) in (tuple, list) else value


def _put_together(value, tensors):
    if isinstance(value, _Place):
        return tensors[value.of]
    if isinstance(value, dict):
        return {key: _put_together(part, tensors) for key, part in value.items()}
    return type(value)([_put_together(part, tensors) for part in value]) if type(value) in (tuple, list) else value


class GatheredLayer:
    """A layer whose unit is gathered while it computes."""

    def forward(self, *args, **options):
        return _Call([self.unit], super().forward, args, options)()


class GatheredTable:
    """A Prefix of which the same holds."""

    def table(self):
        return _Call([self.unit], lambda: super(GatheredTable, self).table().clone(), (), {})()


class GatheredCausalLM:
    """What a CausalLM does with its own parameters."""

    def _units(self, *names):
        return [self.shards.units[name] for name in names if name in self.shards.units]

    def embed(self, *args, **options):
        return _Call(self._units("embed_tokens", "embed"), super().embed, args, options)()

    def losses(self, *args, **options):
        return _Call(self._units(*self._head), super().losses, args, options)()

    def logits(self, *args, **options):
        return _Call(self._units(*self._head), super().logits, args, options)()

    @property
    def _head(self):
        return ("head", "embed_tokens") if self.lm_head is None else ("head",)


def gather_while_used(model, shards):
    """Stage 3 of a model: who computes with a unit's weights has them gathered first, and released after."""
    model.recompute = False  # each unit is computed again anyway
    mix_in(model, GatheredCausalLM)
    for name, layer in [*((f"layers.{i}", block) for i, block in enumerate(model.layers)), ("norm", model.norm)]:
        if layer is not None:
            mix_in(layer, GatheredLayer, unit=shards.units[name])
    if model.prefix is not None:
        mix_in(model.prefix, GatheredTable, unit=shards.units["prefix"])


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
    model.topology, model.shards = topology, None
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
    topology, shards = model.topology, model.shards
    for index, batch in enumerate(batches):
        seed(index * topology.data_size + topology.data_rank)
        loss = batch_loss(batch) * (0.0 if batch.get("company") else 1.0)
        with shards.backward(last=index == len(batches) - 1) if shards else contextlib.nullcontext():
            loss.backward()
        yield float(loss), batch


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
    words = re.findall(r"[^\s,]+", args.sharding or "")
    stage = max([int(word[-1]) for word in words if word != "offload"], default=1) if ways["sharding"] > 1 else 0
    degrees = Degrees(**ways, stage=stage, offload="offload" in words, sequence_parallel=getattr(args, "sequence_parallel", False), context=args.context_parallel_degree > 1)
    if launch.world == 1:
        return Topology(degrees)
    return Topology(degrees, launch.rank, Gloo(launch))


SINGLE = Topology(Degrees())  # one process
