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
import types
from collections import namedtuple

import numpy as np

import kernels  # before paddle: it silences what paddle says while it is imported
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from data import UserError
from model import (
    FAMILIES,
    MLP,
    Attention,
    Linear,
    LoRALinear,
    ModelConfig,
    QuantLinear,
    adapter_arrays,
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
        self.ep, self.copies = expert_axes(self.grid, order, degrees.ep, rank, groups)

    @property
    def axes(self):
        return [getattr(self, name) for name in AXES] + ([self.ep] if self.ep.size > 1 else [])

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
        self.groups = groups
        self.group = groups.connect(ranks) if groups is not None and self.size > 1 else None
        self.sequence = False  # tp: between attention and MLP a rank keeps its share of the tokens, …
        self.tokens = None  # … of so many, T/sep, of the pass that is being made; None: not in this one
        self.places = None  # sep: (T,) int64 numpy, where in whole rows of `whole` tokens this rank's tokens stand; see spread()
        self.whole = None
        self.pieces = None  # ep: [Piece], whose tokens an expert is at work on; None: this rank's
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

    def exchange(self, x, counts):
        """All-to-all: of rows x (n, …) this rank sends counts[rank, r] to each rank r, one behind the other -> those sent here.

        counts: (ranks, ranks) numpy, the same on every rank.
        """
        sent, received = counts[self.rank], counts[:, self.rank]
        if self.size == 1 or not counts.any():
            return x.clone()
        if _backend() == "gloo":  # has none: all get all
            most = int(counts.sum(1).max())
            rows = F.pad(x, [0, most - x.shape[0]] + [0, 0] * (x.ndim - 1), pad_from_left_axis=True) if x.shape[0] < most else x
            rows, starts = self.all_gather(rows), counts[:, : self.rank].sum(1) + most * np.arange(self.size)
            index = np.concatenate([np.arange(first, first + n) for first, n in zip(starts, received)])
            return paddle.index_select(rows, paddle.to_tensor(index)) if len(index) else rows[:0]
        with self._timed(x):
            found = paddle.empty([int(received.sum()), *x.shape[1:]], x.dtype)
            dist.alltoall_single(found, x.contiguous(), sent.tolist(), received.tolist(), self.group)
        return found

    def all_to_all(self, x):
        """x (ranks, …), a part for each -> (ranks, …), the parts that each has for this one.

        gloo has none. Of 16 MB, on 4 ranks of two cores: by a scatter from each rank 0.11 s, by all_gather 0.36, by sends
        between pairs, which need a group each, 0.05; of 1 MB 6.5, 16 and 9.8 ms.
        """
        if self.size == 1:
            return x
        with self._timed(x):
            parts = [part.contiguous() for part in x.unbind(0)]
            found = [paddle.empty_like(part) for part in parts]
            if _backend() == "gloo":
                for source, part in enumerate(found):
                    dist.scatter(part, parts if source == self.rank else None, self.ranks[source], self.group)
            else:
                dist.alltoall(found, parts, self.group)
        return paddle.stack(found)

    def pass_on(self, x):
        """x goes to the next rank, the last one's to the first -> that of the rank before."""
        if self.size == 1:
            return x
        mine, after, before = (self.ranks[(self.rank + step) % self.size] for step in (0, 1, -1))
        x, found = x.contiguous(), paddle.empty_like(x)
        with self._timed(x):
            if _backend() == "gloo":

                def send():
                    dist.send(x, after, self.groups.connect([mine, after], "pass on "))

                def receive():
                    dist.recv(found, before, self.groups.connect([before, mine], "pass on "))

                # Each waits for the other rank to do the reverse; so does making a group.
                for step in (send, receive) if self.rank % 2 == 0 else (receive, send):
                    step()
            else:
                ways = [dist.P2POp(dist.isend, x, after, self.group), dist.P2POp(dist.irecv, found, before, self.group)]
                for task in dist.batch_isend_irecv(ways):
                    task.wait()
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
            number = 1000 + self.store.add("groups", 1)  # all its ranks must give the same, and none twice
            self.store.set(f"group {key}", f"{port} {number}".encode())
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


class _Exchange(PyLayer):
    """Rows that the ranks have sent here (see Axis.exchange); their gradients go back the same way."""

    @staticmethod
    def forward(ctx, x, axis, counts):
        ctx.how = axis, counts
        return axis.exchange(x, counts)

    @staticmethod
    def backward(ctx, dy):
        axis, counts = ctx.how
        return axis.exchange(dy, counts.T)


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
    return _SumBack.apply(x, tp) if tp.tokens is None else _together(x, tp, True)


def _together(x, tp, summed):
    x = _Gather.apply(x, tp, 1, summed)
    return x if x.shape[1] == tp.tokens else x[:, : tp.tokens]


def leave(x, tp):
    """(B, T, D) partial over tp -> their sum (B, T, D), or this rank's (B, T/tp, D) with sequence parallelism."""
    if tp.size == 1:
        return x
    return _Sum.apply(x, tp) if tp.tokens is None else _ReduceScatter.apply(_filled(x, tp.size), tp, 1)


def kept(x, tp):
    """(B, T, …), the same on every rank of tp -> the tokens that this rank keeps between attention and MLP."""
    return x if tp.size == 1 or tp.tokens is None else tp.share(_filled(x, tp.size), 1)


def _filled(x, multiple):
    """(B, T, …) -> zeros behind, so that T is a multiple. They are cut off wherever tokens come together again."""
    more = -x.shape[1] % multiple
    return paddle.concat([x, paddle.zeros([x.shape[0], more, *x.shape[2:]], x.dtype)], axis=1) if more else x


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


def heads_of(config, size, rank):
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


def cut_ranges(name, width, config, size, rank):
    """The [(start, stop), …] of the cut dim, `width` wide, of the linear of this name (its last part) on a rank of `size`."""
    H, K, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    queries, keys = heads_of(config, size, rank)

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
    unit = 1 if name in BY_VOCABULARY else _unit(config)
    if name == "gate_up_proj":
        return [evenly(0, width // 2), evenly(width // 2, width)]
    return [evenly(0, width)]  # channels of the MLP, or ids


def _unit(config):
    """Channels that cannot be parted: those whose weights are packed into one word."""
    return 32 // config.quantization["bits"] if config.quantization and config.quantization["quant_method"] == "gptq" else 1


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


class PartedLinear:
    """A linear of which each rank has a part."""

    def whole_weight(self):
        return gathered(self.weight.astype("float32"), self.weight.cut, self.tp)


class PartedInputs(PartedLinear):
    """One of which each rank has some inputs: its output is partial over tp."""

    def norms(self, weight):
        return paddle.sqrt(self.tp.all_reduce(weight.square().sum(0)))


class RowLinear(PartedInputs):
    """The same, where the parts of the product are added up here, then the bias."""

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
        found, tp, V = super().logits(x), self.topology.tp, self.config.vocab_size
        widest = -(-V // tp.size)  # of the parts
        found = F.pad(found, [0, 0] * (found.ndim - 1) + [0, widest - found.shape[-1]])
        found = _Gather.apply(found, tp, found.ndim - 1, False)
        if V % tp.size:
            ids = [np.arange(r * V // tp.size, (r + 1) * V // tp.size) - r * V // tp.size + r * widest for r in range(tp.size)]
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


def check_tensor(config, degrees):
    """[what stands against cutting this model so, a line each]: tensor and expert parallelism."""
    tp, ep, found = degrees.tp, degrees.ep, []
    H, K, experts, bits = config.num_attention_heads, config.num_key_value_heads, config.experts, _unit(config)
    widths = {"intermediate_size": config.intermediate_size}
    if experts is not None:
        widths["width of an expert"] = experts.width
        widths["width of the shared expert"] = experts.shared_width or experts.width
        if not experts.dense_layers:
            del widths["intermediate_size"]
    if tp > 1:
        if H < tp:
            found.append(f"tensor_parallel_degree {tp}: {H} attention heads are fewer")
        elif K < tp and H // K < -(-tp // K):
            found.append(f"tensor_parallel_degree {tp}: {H} heads over {K} key/value heads do not go round")
        found += [f"tensor_parallel_degree {tp}: {name} {n} is too narrow" for name, n in widths.items() if n // bits < tp]
        if config.vocab_size < tp:
            found.append(f"tensor_parallel_degree {tp}: {config.vocab_size} ids are fewer")
        if experts is not None and config.mlp_bias:
            found.append(f"tensor_parallel_degree {tp}: experts with biases are not cut")
        if config.quantization is not None and config.quantization["quant_method"] != "gptq":
            found.append(f"tensor_parallel_degree {tp}: a model quantized to a8w8 is not cut: its activations are rounded whole")
        else:
            latent, heads = config.latent, [config.head_dim]
            heads += [] if latent is None else [latent.value_dim, latent.nope_dim + latent.value_dim]
            found += [f"tensor_parallel_degree {tp}: heads of {n} are not whole words of {bits} packed weights" for n in heads if n % bits]
    if ep > 1:
        ranks = degrees.dp * degrees.sharding * degrees.sep
        factors = f"dp {degrees.dp} x sharding {degrees.sharding} x sep {degrees.sep}"
        if experts is None:
            found.append(f"expert_parallel_degree {ep}: {config.family} of this size has no experts")
        elif experts.count % ep:
            found.append(f"expert_parallel_degree {ep}: does not divide {experts.count} experts")
        if ranks % ep:
            found.append(f"expert_parallel_degree {ep}: does not divide {factors} = {ranks} ranks with other tokens")
    return found


def cut_tensors(model, tp):
    """Tensor parallelism of a model as it was built: parameters become parts, layers get the mixins above."""
    config = model.config
    if tp.size == 1:
        return
    for path, layer in list(model.named_sublayers()):
        name = path.rpartition(".")[2]
        inside = ".experts." in path or ".shared." in path  # of a SparseMLP, which adds up
        if name in BY_OUTPUTS + BY_INPUTS + BY_VOCABULARY:
            (_cut_integers if isinstance(layer, QuantLinear) else _cut_linear)(layer, name, config, tp)
        if name in BY_INPUTS:
            mix_in(layer, PartedInputs if inside else RowLinear, tp=tp)
        elif name in BY_OUTPUTS:
            mix_in(layer, PartedLinear, tp=tp)
        elif isinstance(layer, Attention):
            (first, last), (first_key, last_key) = heads_of(config, tp.size, tp.rank)
            layer.group = (last - first) // (last_key - first_key)
            layer.slopes = None if layer.slopes is None else layer.slopes[first:last]
            mix_in(layer, Region, tp=tp)
        elif isinstance(layer, MLP) and not inside and name != "shared":
            mix_in(layer, Region, tp=tp)
        elif isinstance(layer, SparseMLP):
            mix_in(layer, SparseRegion, tp=tp)
    mix_in(model, PartedVocabulary)


def _cut_linear(layer, name, config, tp):
    dim = 0 if name in BY_INPUTS or name == "embed_tokens" else 1
    whole = layer.weight.shape
    of_ranks = [cut_ranges(name, whole[dim], config, tp.size, rank) for rank in range(tp.size)]
    layer.cut = cut = Cut(dim, of_ranks, tp.rank, whole)
    layer.weight = _part_of(layer, layer.weight, cut)
    if dim == 1 and getattr(layer, "bias", None) is not None:
        layer.bias = _part_of(layer, layer.bias, cut.of(0, layer.bias.shape))


def _cut_integers(layer, name, config, tp):
    """A QuantLinear of weights in groups, packed along the inputs; the groups' zeros are packed along the outputs."""
    dim, whole, packed = 0 if name in BY_INPUTS else 1, [layer.n_in, layer.n_out], _unit(config)
    of_ranks = [cut_ranges(name, whole[dim], config, tp.size, rank) for rank in range(tp.size)]
    layer.cut = cut = Cut(dim, of_ranks, tp.rank, whole)

    def of(unit, dim, shape):
        return Cut(dim, [[(a // unit, -(-b // unit)) for a, b in ranges] for ranges in of_ranks], tp.rank, shape)

    if dim == 1:
        cuts = {"qweight": of(1, 1, layer.qweight.shape), "scales": of(1, 1, layer.scales.shape), "qzeros": of(packed, 1, layer.qzeros.shape)}
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
        part.cut = cut
        layer.register_buffer(name, part)
    mix_in(layer, PartedIntegers)


class PartedIntegers:
    """A QuantLinear of which each rank has some columns, or rows: what g_index names is a group of the whole."""

    def check(self, path, name):
        rows, groups = np.arange(self.n_in), self.g_index.numpy()
        rows = rows if self.cut.dim == 1 else self.cut.take(rows)
        last = -(-self.n_in // self.group_size) - 1
        if groups.min() < 0 or groups.max() > last:
            raise UserError(f"{path}: {name}.g_idx names group {groups.max()}, {name}.scales has 0 to {last}")
        if self.in_order and not np.array_equal(groups, rows // self.group_size):
            raise UserError(f"{path}: {name}.g_idx is not in order, but desc_act is false")


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
    paths = {id(layer): path for path, layer in model.named_sublayers()}
    for layer in model.sublayers():
        if isinstance(layer, SpreadExperts):
            layer.dropout = bool(getattr(model, "lora_config", {}).get("lora_dropout"))
    for layer in lora_layers(model).values() if topology.degrees.world > 1 else ():
        cut = getattr(layer.base, "cut", None)
        if layer.dropout:
            mix_in(layer, SpreadDropout, topology=topology, expert=".experts." in paths[id(layer)])
        if cut is None:
            continue
        if cut.dim == 1:
            layer.lora_B = _part_of(layer, layer.lora_B, cut.of(1, layer.lora_B.shape))
        else:
            layer.lora_A = _part_of(layer, layer.lora_A, cut.of(0, layer.lora_A.shape))
            if isinstance(layer.base, RowLinear):
                mix_in(layer, RowLinear, tp=tp)
    if model.prefix is not None and model.distances_count and topology.sep.size > 1 and topology.degrees.context:
        raise UserError(_RING_WITH_PREFIX)
    if model.prefix is not None and tp.size > 1:
        mix_in(model.prefix, PartedPrefix, key_heads=heads_of(model.config, tp.size, tp.rank)[1])


class SpreadDropout:
    """A LoRALinear of which this process has some inputs, or tokens: its part of the mask that one process would draw."""

    def dropped(self, x):
        if not self.training:
            return x
        mask, cut = self._mask(x.shape[:-1]), getattr(self.base, "cut", None)
        if cut is not None and cut.dim == 0:
            mask = paddle.concat([mask[..., slice(*r)] for r in cut.ranges], axis=-1)
        return x * mask.astype(x.dtype)

    def _mask(self, tokens):
        sep = self.topology.sep
        if self.expert and self.topology.ep.pieces is not None:
            return paddle.concat([self._of_piece(piece) for piece in self.topology.ep.pieces if piece.count])
        if not self.expert and sep.places is not None:
            return spread_tokens(self._drawn([tokens[0], sep.whole]), sep)
        return self._drawn(tokens)

    def _of_piece(self, piece):
        if piece.places is None:
            return self._drawn([piece.count], piece.number)
        mask = self._drawn([piece.whole], piece.number)
        return paddle.index_select(mask, paddle.to_tensor(piece.places.clip(0)))  # tokens that fill rows up: anything

    def _drawn(self, tokens, number=None):
        with self.draws.under(self.key, number):
            return F.dropout(paddle.ones([*tokens, self.base.n_in]), self.dropout)


# ======================================================================================= expert parallelism


def expert_axes(grid, order, degree, rank, groups):
    """(the ranks that share out the experts, those with the same experts) around a rank; ranks are connected in this order.

    Consecutive ranks of the data axes, (dp, sharding, sep) as one line at the same pp and tp, have the experts among them:
    each has E/ep, and sends other ranks' tokens to them and back. The next so many do the same with copies of them.
    """
    line = np.transpose(grid, [order.index(name) for name in ("pp", "tp", "dp", "sharding", "sep")])
    line = next(line for line in line.reshape([-1, math.prod(line.shape[2:])]) if rank in line).reshape([-1, degree])
    (group, place), *_ = np.argwhere(line == rank)
    if degree == 1:
        return Axis("ep", [rank], rank), Axis("copies", [rank], rank)
    return tuple(Axis(name, [int(r) for r in ranks], rank, groups) for name, ranks in (("ep", line[group]), ("copies", line[:, place])))


def gradient_axes(path, topology):
    """[Axis] over which the gradient of the parameter of this path is added up: ranks that hold it and have other tokens."""
    if is_spread(path, topology):
        return [topology.copies]
    return [topology.sep, topology.sharding, topology.dp]


def is_spread(path, topology):
    """Whether the parameter of this path is one of an expert that other ranks of topology.ep do not have."""
    return topology.ep.size > 1 and ".mlp.experts." in path


def experts_of(config, ep, rank=None):
    """range of the experts that a rank (this one) of ep has."""
    each, rank = config.experts.count // ep.size, ep.rank if rank is None else rank
    return range(rank * each, (rank + 1) * each)


class Piece(namedtuple("Piece", "number count places whole")):
    """Tokens of one rank at an expert: the number of that rank's Draws, how many, and, where that rank has some tokens of
    its rows alone (sep), their places among the `whole` tokens of all of these rows at this expert."""


class SpreadExperts:
    """A SparseMLP that has the experts of its rank of ep alone: tokens are sent to where their experts are, and back."""

    dropout = False  # whether the experts' adapters have any, on any rank

    def mix(self, flat, weights, chosen):
        """Where ranks of sep have some tokens of each row, those of one row are known to be so at each expert, for dropout."""
        self.places = self.wholes = None
        if self.training and self.dropout and self.topology.sep.places is not None:
            self.places, self.wholes = self._places(chosen)
        return super().mix(flat, weights, chosen)

    def _places(self, chosen):
        """(N, k) -> for each choice, expert by expert, its place among all choices of this expert (-1: it is of no token),
        as one process would have them; and how many there are of each expert."""
        sep, E, k = self.topology.sep, self.how.count, chosen.shape[-1]
        mine = chosen.reshape([-1, len(sep.places), k])  # (B, T/sep, k)
        everyone = sep.all_gather(mine.unsqueeze(0)).numpy()
        places = sep.all_gather(paddle.to_tensor(sep.places).unsqueeze(0)).numpy()
        whole = np.full([mine.shape[0], sep.whole + 1, k], E)
        for ids, of_rank in zip(everyone, places):
            whole[:, np.minimum(of_rank, sep.whole)] = ids
        whole[:, sep.whole] = E  # tokens that fill rows up
        ids, found = whole.flatten(), np.empty(whole.size, np.int64)
        order, counts = np.argsort(ids, kind="stable"), np.bincount(ids, minlength=E + 1)
        found[order] = np.arange(ids.size) - np.repeat(counts.cumsum() - counts, counts)
        found[ids == E] = -1
        found = found.reshape(whole.shape)[:, np.minimum(sep.places, sep.whole)].flatten()
        return found[np.argsort(chosen.numpy().flatten(), kind="stable")], counts[:E]

    def outputs(self, tokens, counts):
        ep = self.topology.ep
        if paddle.is_grad_enabled() and tokens.stop_gradient:
            tokens = tokens.clone()
            tokens.stop_gradient = False  # every rank goes back through the exchange, whatever of its own is trained
        wholes = np.zeros_like(counts) if self.wholes is None else self.wholes
        told = paddle.to_tensor(np.concatenate([counts, wholes, [self.draws.number]]).astype(np.int64)).unsqueeze(0)
        told = ep.all_gather(told).numpy()  # (ep, 2 E + 1)
        numbers, told = told[:, -1], told[:, :-1].reshape([ep.size, 2, ep.size, -1])
        counts, wholes = told[:, 0], told[:, 1, ep.rank]  # (from, to, expert), (from, expert)
        sent, here = counts.sum(-1), counts[:, ep.rank]  # (from, to), (from, expert)
        tokens, places = _Exchange.apply(tokens, ep, sent), None
        if self.places is not None:
            places = ep.exchange(paddle.to_tensor(self.places).unsqueeze(-1), sent).numpy().flatten()
        if here.any():
            runs = _runs(here)
            order = np.concatenate([np.arange(first, last) for first, last in runs])  # rank by rank -> expert by expert
            pieces = [Piece(int(numbers[i % ep.size]), last - first, None if places is None else places[first:last], int(wholes.T.flat[i]))
                      for i, (first, last) in enumerate(runs)]  # fmt: skip
            mixed = self._by_expert(paddle.index_select(tokens, paddle.to_tensor(order)), here.sum(0), pieces)
            tokens = paddle.index_select(mixed, paddle.to_tensor(np.argsort(order)))
        return _Exchange.apply(tokens, ep, sent.T)

    def _by_expert(self, tokens, counts, pieces):
        """(n, D), one expert's tokens behind another's -> what this rank's experts make of them."""
        ep, parts, found = self.topology.ep, paddle.split(tokens, [int(n) for n in counts if n]), []
        experts = list(self.experts)
        for e in np.flatnonzero(counts):
            ep.pieces = pieces[e * ep.size : (e + 1) * ep.size]
            found.append(experts[e](parts[len(found)]))
        return paddle.concat(found)


def _runs(here):
    """(from, expert) counts of rows that stand rank by rank -> (start, stop) of each run, expert by expert."""
    ends = here.flatten().cumsum().reshape(here.shape)
    return [(int(end - n), int(end)) for end, n in zip(ends.T.flat, here.T.flat)]


def spread_experts(model, topology):
    """Leave this rank its experts. What is elsewhere takes no memory and is not read."""
    ep, config = topology.ep, model.config
    if config.experts is None or ep.size == topology.sep.size == 1:
        return
    mine = experts_of(config, ep)
    for layer in model.sublayers():
        if isinstance(layer, SparseMLP):
            for e in set(range(config.experts.count)) - set(mine):
                del layer.experts._sub_layers[str(e)]
            mix_in(layer, SpreadExperts, topology=topology, draws=model.draws)
    rows = [row for row in FAMILIES[config.family].names if "{e}" in row[0]]
    elsewhere = {theirs.format(i=i, e=e) for _, theirs, _ in rows for i in range(config.num_hidden_layers)
                 for e in range(config.experts.count) if e not in mine}  # fmt: skip
    model.elsewhere = model.elsewhere | elsewhere


# ====================================================================================== context parallelism
#
# Ranks of sep share the tokens of a batch. All but attention works on a token alone; for attention, either each rank gets all
# tokens of some heads (sep_parallel_degree; Ulysses, arXiv 2309.14509), or keys and values go round (context_parallel_degree;
# ring attention, arXiv 2310.01889). What looks at a row as a whole (positions, masks, noise) is made of the whole row on every
# rank, then cut.


def spread(sep, T, ring):
    """Say which of T tokens this rank has; T None: all of them, on every rank.

    An even run; in a ring its chunks r and 2·sep - 1 - r of 2·sep, an early one, which sees few keys, and a late one, which
    sees many: with causal attention all ranks have as much to do.
    """
    sep.whole = T
    sep.places = None if T is None or sep.size == 1 else token_places(T, sep.size, sep.rank, ring)
    if sep.places is not None:
        ends = np.argsort(np.concatenate([token_places(T, sep.size, rank, ring) for rank in range(sep.size)]))
        sep.back = paddle.to_tensor(ends[:T])  # where each token of the row stands among those of all ranks


@functools.lru_cache(maxsize=1024)
def token_places(T, size, rank, ring):
    """(n,) int64, n the same on every rank: places from T on are no tokens."""
    if not ring:
        n = -(-T // size)
        return np.arange(rank * n, (rank + 1) * n)
    n = -(-T // (2 * size))
    return np.concatenate([np.arange(chunk * n, (chunk + 1) * n) for chunk in (rank, 2 * size - 1 - rank)])


def spread_tokens(x, sep):
    """(B, whole T, …) -> (B, T/sep, …), the tokens that this rank of sep has; 0 for those that fill rows up."""
    if sep.places is None:
        return x
    places = paddle.to_tensor(np.where(sep.places < sep.whole, sep.places, sep.whole))
    return paddle.index_select(paddle.concat([x, paddle.zeros_like(x[:, :1])], axis=1), places, axis=1)


def all_tokens(x, sep, summed=False):
    """(B, T/sep, …) -> (B, whole T, …) in order. summed: its gradient is the sum over the ranks, else the same on each."""
    if sep.places is None:
        return x
    x = sep.all_gather(x, 1) if x.stop_gradient else _Gather.apply(x, sep, 1, summed)
    return paddle.index_select(x, sep.back, axis=1)


class SpreadCausalLM:
    """A CausalLM whose tokens are shared by the ranks of sep: trunk() gives (B, T/sep, D), losses() those of all tokens."""

    def prepare(self, input_ids, position_ids=None, rows=None, caches=None):
        x, shared = super().prepare(input_ids, position_ids, rows, caches)
        sep, degrees = self.topology.sep, self.topology.degrees
        if sep.places is None or not degrees.context:
            return x, shared
        if shared.spread is not None:
            raise UserError(_RING_WITH_PREFIX)
        before = 0 if caches is None else caches.prefix_tokens
        chunks = {id(rows): Chunks(rows, before, sep) for rows in (shared.rows, *shared.narrowed.values())}
        narrowed = {window: chunks[id(rows)] for window, rows in shared.narrowed.items()}
        return x, shared._replace(rows=chunks[id(shared.rows)], narrowed=narrowed)

    def look_up(self, input_ids):
        return super().look_up(spread_tokens(input_ids, self.topology.sep))

    def _turns(self, position_ids, before, cache):
        found = super()._turns(position_ids, before, cache)
        return tuple(None if x is None else spread_tokens(x, self.topology.sep) for x in found)

    def losses(self, x, probabilities, labels, return_predictions=False, additions=True):
        sep = self.topology.sep
        labels = spread_tokens(labels + 100, sep) - 100  # what fills rows up is -100 too
        found = super().losses(x, probabilities, labels, return_predictions, additions)
        return tuple(all_tokens(f, sep) for f in found) if return_predictions else all_tokens(found, sep)

    def logits(self, x):
        return all_tokens(super().logits(x), self.topology.sep)

    def of_all(self, x, shape):
        # Every rank computes the same of it, but only its own tokens' losses have a gradient there.
        return all_tokens(x.reshape([*shape, *x.shape[1:]]), self.topology.sep, summed=True).flatten(0, 1)


_RING_WITH_PREFIX = (
    "context_parallel_degree with prefix_tuning: attention of this model depends on distances (ALiBi or a window), "
    "so that each sample of a row needs the prefix for itself; use sep_parallel_degree"
)


class HeadsForTokens:
    """Attention where each rank of sep has some tokens: it trades them for all tokens of some heads, and back."""

    def mixed(self, q, k, v, slopes, rows, past_k, past_v, spread):
        sep = self.sep
        if sep.places is None:
            return super().mixed(q, k, v, slopes, rows, past_k, past_v, spread)
        # With fewer key heads than ranks, or not a multiple, each is there several times; gradients of copies are added up.
        copies = sep.size // math.gcd(k.shape[2], sep.size)
        k, v, past_k, past_v = (x if x is None or copies == 1 else _repeat_heads(x, copies) for x in (k, v, past_k, past_v))
        sent = paddle.concat([self._by_rank(x) for x in (q, k, v)], axis=3)  # (sep, B, T/sep, (H + 2 K)/(tp·sep), Dh)
        came = _AllToAll.apply(sent, sep).transpose([1, 0, 2, 3, 4]).flatten(1, 2)[:, : sep.whole]  # (B, T, …)
        q, k, v = came.split([q.shape[2] // sep.size, *[k.shape[2] // sep.size] * 2], axis=2)
        past_k, past_v = (None if x is None else sep.share(x, 2) for x in (past_k, past_v))
        slopes = None if slopes is None else sep.share(slopes)
        found, _, _ = super().mixed(q, k, v, slopes, rows, past_k, past_v, spread)
        found = _filled(found, sep.size)
        B, T, H, Dh = found.shape
        back = _AllToAll.apply(found.reshape([B, sep.size, T // sep.size, H, Dh]).transpose([1, 0, 2, 3, 4]), sep)
        return back.transpose([1, 2, 0, 3, 4]).flatten(2, 3), None, None  # (B, T/sep, H/tp, Dh)

    def _by_rank(self, x):
        """(B, T/sep, heads, Dh) -> (sep, B, T/sep, heads/sep, Dh)"""
        B, T, _, Dh = x.shape
        return x.reshape([B, T, self.sep.size, -1, Dh]).transpose([2, 0, 1, 3, 4])


def _repeat_heads(x, copies):
    """(B, T, K, Dh) -> (B, T, K · copies, Dh), copies of a head beside each other."""
    B, T, K, Dh = x.shape
    return x.unsqueeze(3).expand([B, T, K, copies, Dh]).reshape([B, T, -1, Dh])


class _AllToAll(PyLayer):
    """Axis.all_to_all; gradients go back the same way."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return axis.all_to_all(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.axis.all_to_all(dy)


class Chunks:
    """FlashMask rows of a ring: what each of this rank's two chunks of queries sees of any chunk of keys, or of the prefix."""

    def __init__(self, rows, before, sep):
        """rows (B, 1, before + T, n) or None, of keys behind a prefix of `before`."""
        self.sep, self.before, self.C = sep, before, len(sep.places) // 2
        self.causal = rows is None or rows.shape[-1] == 1
        self.mine = sep.rank, 2 * sep.size - 1 - sep.rank
        self.rows, self.found = None, {}
        if rows is not None:  # keys that only fill the last chunks up are hidden from all
            more = 2 * sep.size * self.C - sep.whole
            self.rows = np.pad(rows.numpy().astype(np.int64), [(0, 0), (0, 0), (0, more), (0, 0)])

    def pair(self, queries, keys):
        """(rows, offset) for kernels.attention_part, of chunks by number, keys None: the prefix; None if nothing is seen."""
        if (queries, keys) not in self.found:
            self.found[queries, keys] = self._pair(queries, keys)
        return self.found[queries, keys]

    def _pair(self, queries, keys):
        first = 0 if keys is None else self.before + keys * self.C  # rows are counted from the first of these keys
        n, offset = self.before if keys is None else self.C, self.before + queries * self.C - first
        if self.causal and offset + self.C <= 0:
            return None
        if self.rows is None:
            return None, offset
        rows = self.rows[:, :, first : first + n] - first
        last = np.minimum(rows[..., 0], offset + self.C)
        start = np.full_like(last, offset) if self.causal else np.maximum(rows[..., 1], offset)
        if not (start < last).any():
            return None
        limits = np.iinfo(np.int32)
        return paddle.to_tensor(rows.clip(limits.min, limits.max).astype(np.int32)), offset


class Ring:
    """Attention where each rank of sep has two chunks of tokens: keys and values go round."""

    def mixed(self, q, k, v, slopes, rows, past_k, past_v, spread):
        if self.sep.places is None:
            return super().mixed(q, k, v, slopes, rows, past_k, past_v, spread)
        options = {"causal": rows.causal, "alibi_slopes": slopes, **self.options}
        how = types.SimpleNamespace(chunks=rows, sep=self.sep, options=options)
        return _Ring.apply(q, k, v, past_k, past_v, how), None, None


class _Ring(PyLayer):
    """Attention of this rank's queries with each rank's keys in turn; results are merged by their log-sum-exp.

    Kept: q, k, v, the result and its lse, all of this rank's tokens. Backward sends keys and values round again, and with
    them the gradients that they have collected, which so come home.
    """

    @staticmethod
    def forward(ctx, q, k, v, past_k, past_v, how):
        chunks, sums = how.chunks, [Merged(q[:, i]) for i in halves(q)]
        for part, queries in zip(sums, chunks.mine):
            if past_k is not None and (seen := chunks.pair(queries, None)) is not None:
                part.add(*kernels.attention_part(part.q, past_k, past_v, *seen, **how.options))
        states = paddle.stack([k, v])  # (2, B, T/sep, K, Dh)
        for last, owner in _turns_of(how.sep):
            for keys, part, seen in _pairs(how, owner, sums):
                k_part, v_part = states[:, :, keys]
                part.add(*kernels.attention_part(part.q, k_part, v_part, *seen, **how.options))
            if not last:
                states = how.sep.pass_on(states)
        out, lse = (paddle.concat([getattr(part, name) for part in sums], axis=dim) for name, dim in (("out", 1), ("lse", 2)))
        ctx.how, ctx.given = how, [t is not None for t in (q, k, v, past_k, past_v)]
        ctx.frozen = [t is None or t.stop_gradient for t in (q, k, v, past_k, past_v)]
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        how, (q, k, v, past_k, past_v, out, lse) = ctx.how, ctx.saved_tensor()
        parts = [types.SimpleNamespace(q=q[:, i], kept=(out[:, i], lse[:, :, i], d_out[:, i]), d_q=paddle.zeros_like(q[:, i]))
                 for i in halves(q)]  # fmt: skip
        d_past = [None, None]

        def of_keys(part, k, v, seen):
            d_q, *d_states = kernels.attention_part_backward(part.q, k, v, *part.kept, *seen, **how.options)
            part.d_q = part.d_q + d_q
            return d_states

        if past_k is not None:
            d_past = [paddle.zeros_like(past_k), paddle.zeros_like(past_v)]
            for part, queries in zip(parts, how.chunks.mine):
                if (seen := how.chunks.pair(queries, None)) is not None:
                    d_past = [old + new for old, new in zip(d_past, of_keys(part, past_k, past_v, seen))]
        states = paddle.stack([k, v])
        d_states = paddle.zeros_like(states)
        for last, owner in _turns_of(how.sep):
            for keys, part, seen in _pairs(how, owner, parts):
                k_part, v_part = states[:, :, keys]
                d_states[:, :, keys] = d_states[:, :, keys] + paddle.stack(of_keys(part, k_part, v_part, seen))
            if last:
                d_states = how.sep.pass_on(d_states)
            else:
                states, d_states = how.sep.pass_on(paddle.stack([states, d_states]))
        found = paddle.concat([part.d_q for part in parts], axis=1), *d_states, *d_past
        return tuple(None if frozen else d for d, frozen, given in zip(found, ctx.frozen, ctx.given) if given)


def halves(x):
    """The slices of tokens that are a rank's two chunks."""
    C = x.shape[1] // 2
    return slice(0, C), slice(C, 2 * C)


def _turns_of(sep):
    """(whether it is the last, whose keys are here) of each turn of a ring."""
    return [(turn == sep.size - 1, (sep.rank - turn) % sep.size) for turn in range(sep.size)]


def _pairs(how, owner, parts):
    """(slice of the keys, part of the queries, what they see of each other) of chunks of which anything is seen."""
    size = how.sep.size
    for i, keys in enumerate((owner, 2 * size - 1 - owner)):
        for part, queries in zip(parts, how.chunks.mine):
            if (seen := how.chunks.pair(queries, keys)) is not None:
                yield slice(i * how.chunks.C, (i + 1) * how.chunks.C), part, seen


class Merged:
    """Attention of queries q (B, C, H, Dh) with one set of keys after another."""

    def __init__(self, q):
        B, C, H, _ = q.shape
        self.q, self.out, self.lse = q, paddle.zeros_like(q), paddle.full([B, H, C], -math.inf, "float32")

    def add(self, out, lse):
        most = paddle.maximum(self.lse, lse)
        most = paddle.where(paddle.isinf(most), paddle.zeros_like(most), most)  # who sees nothing yet: no nan
        old, new = paddle.exp(self.lse - most), paddle.exp(lse - most)
        total = old + new
        self.lse = most + paddle.log(total)
        total = total.clip(min=1e-30)
        old, new = ((x / total).transpose([0, 2, 1]).unsqueeze(-1).astype(out.dtype) for x in (old, new))  # (B, C, H, 1)
        self.out = self.out * old + out * new


def spread_attention(model, topology):
    """Context parallelism of a model as it was built."""
    if topology.sep.size == 1:
        return
    for layer in model.sublayers():
        if isinstance(layer, Attention):
            mix_in(layer, Ring if topology.degrees.context else HeadsForTokens, sep=topology.sep)
    mix_in(model, SpreadCausalLM)


def check_context(config, degrees, T=None):
    """[what stands against sharing the tokens of this model so, a line each]; T: the longest row, where it is known."""
    sep, tp, found = degrees.sep, degrees.tp, []
    if sep == 1:
        return found
    name = "context_parallel_degree" if degrees.context else "sep_parallel_degree"
    if not degrees.context:
        for heads in sorted({last - first for (first, last), _ in (heads_of(config, tp, rank) for rank in range(tp))}):
            if heads % sep:
                of_tp = f" / tensor_parallel_degree {tp} = {heads} on a rank" if tp > 1 else ""
                wrong = f"{name} {sep}: does not divide attention heads {config.num_attention_heads}{of_tp}"
                found.append(f"{wrong}; context_parallel_degree takes any number of heads")
    if T is not None and T < (2 * sep if degrees.context else sep):
        found.append(f"{name} {sep}: rows of {T} tokens are too short to share")
    return found


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
        self.spread = {id(w.parameter) for w in weights if is_spread(paths[id(w.parameter)], topology)}
        self.axes = [gradient_axes(paths[id(w.parameter)], topology) for w in weights]
        self.pieces = weights

    @paddle.no_grad()
    def reduce_gradients(self):
        """Add gradients up over the ranks; returns their Euclidean norm over the whole model."""
        topology = self.topology
        for weight in self.weights:
            if weight.parameter.grad is None:  # an expert to which no token went
                weight.parameter.grad = paddle.zeros_like(weight.parameter)
        for axis in (topology.sep, topology.sharding, topology.dp, topology.copies):
            _all_reduce_together([w.parameter.grad for w, axes in zip(self.weights, self.axes) if axis in axes], axis)
        _all_reduce_together([w.parameter.grad for w in self.partial], topology.tp)
        return self._norm()

    def _norm(self):
        tp, squares = self.topology.tp, paddle.zeros([2], "float64")  # of what all ranks of ep have, of their experts
        for weight in self.weights:
            gradient, cut = weight.parameter.grad, weight.cut
            if gradient is None:
                continue
            if cut is not None and cut.overlaps:
                square = self._once(gradient, cut)
            elif cut is not None or tp.rank == 0:
                square = kernels.squared_norm(gradient)
            else:
                continue
            squares[int(id(weight.parameter) in self.spread)] += square
        for axis in (tp, self.topology.pp):
            axis.all_reduce(squares)
        return math.sqrt(float(squares[0] + self.topology.ep.all_reduce(squares[1].clone())))

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

    def trunk(self, input_ids, position_ids=None, rows=None, caches=None):
        """As it was, of the tokens that this rank keeps: (B, T/tp, D) with sequence parallelism."""
        self.share_tokens(input_ids.shape[1] if caches is None else None)
        return super().trunk(input_ids, position_ids, rows, caches)

    def share_tokens(self, T):
        """Say which tokens of rows of T this rank works on; None: all. One token at a time cannot be spread."""
        tp, sep = self.topology.tp, self.topology.sep
        spread(sep, T, self.topology.degrees.context)
        tp.tokens = (T if sep.places is None else len(sep.places)) if tp.sequence and T is not None else None

    def hidden_states(self, *arguments, **options):
        x, tp, sep = super().hidden_states(*arguments, **options), self.topology.tp, self.topology.sep
        if tp.tokens is not None:
            x = _together(x, tp, False)
        x = all_tokens(x, sep)
        self.share_tokens(None)
        return x

    def read_by_head(self, x):
        return enter(super().read_by_head(x), self.topology.tp)

    def recomputed(self, function, *arguments):
        T = self.topology.sep.whole

        def same(*arguments):
            self.share_tokens(T)
            return function(*arguments)

        return super().recomputed(same, *arguments)

    def kept(self, x):
        return kept(spread_tokens(x, self.topology.sep), self.topology.tp)

    def num_parameters(self):
        """Of all ranks of tp and ep, each counted once."""
        ep, total = self.topology.ep, 0
        for path, parameter in self.named_parameters():
            cut = getattr(parameter, "cut", None)
            size = math.prod(parameter.shape if cut is None else cut.shape)
            total += size * ep.size if is_spread(path, self.topology) else size
        return total

    def flops_per_token(self, T):
        experts, ep = self.config.experts, self.topology.ep
        here = sum(layer.n_in * layer.n_out for path, layer in self.named_sublayers()
                   if isinstance(layer, (Linear, QuantLinear)) and is_spread(path, self.topology))  # fmt: skip
        return super().flops_per_token(T) + (6.0 * here * (ep.size - 1) * experts.top_k / experts.count if here else 0.0)


def parallelize(model, topology):
    """Make of a model, as build() gives it, this process's part of it, in place; returns it. Order: tp, then the loop of forward()."""
    if complaints := check_tensor(model.config, topology.degrees) + check_context(model.config, topology.degrees):
        raise UserError("; ".join(complaints))
    model.topology = topology
    if topology.degrees.world > 1:
        topology.tp.sequence = topology.degrees.sequence_parallel
        cut_tensors(model, topology.tp)
        spread_attention(model, topology)
        spread_experts(model, topology)
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


@paddle.no_grad()
def whole(weight, tensor, topology):
    """A weight, or a tensor of its shape (a moment), of all ranks of tp, as numpy in the file's layout."""
    cut = weight.cut
    if cut is None:
        return weight.to_numpy(tensor)
    found = gathered(tensor, cut, topology.tp)
    return found.T if weight.transposed else found


@paddle.no_grad()
def whole_adapter(model):
    """model.adapter_arrays() of the whole model, on every rank: what save_adapter() writes as `tensors`."""
    topology = model.topology
    arrays = adapter_arrays(model, lambda weight: whole(weight, weight.parameter, topology))
    for axis in (topology.ep, topology.pp):
        if axis.size > 1:
            found = []
            dist.all_gather_object(found, arrays, axis.group)
            arrays = {name: array for part in found for name, array in part.items()}
    return arrays


@paddle.no_grad()
def gathered(tensor, cut, tp):
    """The whole of which each rank of tp has such a part, as numpy in our layout."""
    widths = [sum(last - first for first, last in ranges) for ranges in cut.of_ranks]
    tensor = tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor
    turned = paddle.moveaxis(tensor, cut.dim, 0)
    if max(widths) > cut.width:
        more = paddle.zeros([max(widths) - cut.width, *turned.shape[1:]], turned.dtype)
        turned = paddle.concat([turned, more])
    parts = tp.all_gather(turned.unsqueeze(0)).numpy()
    found = np.empty(cut.shape, parts.dtype)
    for rank, width in enumerate(widths):
        cut.put(found, np.moveaxis(parts[rank, :width], 0, cut.dim), rank)
    return found


def start(args):
    """The Topology of this process, from the arguments and what Paddle's launcher says; groups are connected."""
    launch = Launch.of_environment()
    names = {"pp": "pipeline", "sharding": "sharding", "tp": "tensor"}
    ways = {axis: max(1, getattr(args, f"{name}_parallel_degree")) for axis, name in names.items()}
    ways["sep"] = max(1, args.sep_parallel_degree, args.context_parallel_degree)
    ways["dp"] = launch.world // math.prod(ways.values())
    degrees = Degrees(**ways, ep=max(1, args.expert_parallel_degree), sequence_parallel=getattr(args, "sequence_parallel", False), context=args.context_parallel_degree > 1)
    if launch.world == 1:
        return Topology(degrees)
    return Topology(degrees, launch.rank, Gloo(launch))


SINGLE = Topology(Degrees())  # one process
