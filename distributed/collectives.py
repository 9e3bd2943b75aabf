"""Process groups, one Axis per mesh axis, collectives with and without gradients, ShardSpec."""

import contextlib
import functools
import hashlib
import json
import math
import socket
import time
from collections import Counter

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from distributed.watchdog import Watchdog

# =============================================================================== talking along an axis


class Axis:
    """The ranks that differ in one coordinate alone, and what they do together. With one rank nothing is sent.

    seconds and bytes: spent in, and handed to, its collectives so far.
    """

    def __init__(self, name, ranks, rank, groups=None):
        self.name, self.ranks, self.size, self.rank = name, ranks, len(ranks), ranks.index(rank)
        self.groups, self.watchdog = groups, groups and groups.watchdog
        self.group = groups.connect(ranks) if groups is not None and self.size > 1 else None
        self.sequence_parallel = False  # of tp: between attention and MLP a rank keeps its share of the tokens
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
            return self.local_chunk(self.all_reduce(x.clone()), dim)
        with self._timed(x):
            parts = [part.contiguous() for part in x.split(self.size, axis=dim)]
            found = paddle.empty_like(parts[0])
            dist.reduce_scatter(found, parts, dist.ReduceOp.SUM, self.group)
        return found

    def all_to_all_v(self, x, counts):
        """All-to-all: of rows x (n, …) this rank sends counts[rank, r] to each rank r, one behind the other -> those sent here.

        counts: (ranks, ranks) numpy, the same on every rank.
        """
        sent, received = counts[self.rank], counts[:, self.rank]
        if self.size == 1 or not counts.any():
            return x.clone()
        if _backend() == "gloo":  # has none: all get all
            most = int(counts.sum(1).max())
            rows = (
                F.pad(x, [0, most - x.shape[0]] + [0, 0] * (x.ndim - 1), pad_from_left_axis=True)
                if x.shape[0] < most
                else x
            )
            rows, starts = self.all_gather(rows), counts[:, : self.rank].sum(1) + most * np.arange(self.size)
            index = np.concatenate([np.arange(first, first + n) for first, n in zip(starts, received)])
            return paddle.index_select(rows, paddle.to_tensor(index)) if len(index) else rows[:0]
        with self._timed(x):
            found = paddle.empty([int(received.sum()), *x.shape[1:]], x.dtype)
            dist.alltoall_single(found, x.contiguous(), sent.tolist(), received.tolist(), self.group)
        return found

    def all_gather_into_tensor(self, x):
        """The x (n,) of all ranks one behind the other, without a second copy of them."""
        if self.size == 1:
            return x
        found = paddle.empty([self.size * x.shape[0]], x.dtype)
        with self._timed(x):
            dist.stream.all_gather(found, x.contiguous(), self.group)
        return found

    def reduce_async(self, x, scatter):
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
                return self.local_chunk(x).clone() if share is None else share
            return x

        return finish

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

    def ring_shift(self, x):
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

    def local_chunk(self, x, dim=0):
        """This rank's part of x along dim, cut into as many as there are ranks."""
        if self.size == 1:
            return x
        width = x.shape[dim] // self.size
        return x.slice([dim], [self.rank * width], [(self.rank + 1) * width]).contiguous()

    @contextlib.contextmanager
    def _timed(self, x):
        begin, self.watchdog.waiting_in = time.perf_counter(), self
        yield
        self.watchdog.waiting_in = None  # an exception leaves it: there this rank was lost
        self.seconds += time.perf_counter() - begin
        self.bytes += x.size * x.element_size()


def _backend():
    """What groups talk by: gloo between CPUs, nccl or the device's own between accelerators."""
    return "gloo" if paddle.device.get_device().startswith("cpu") else "nccl"


class Groups:
    """What connects processes: connect(ranks) gives the group of these ranks, made when it is first asked for."""

    def __init__(self, launch):
        self.launch, self.watchdog, self.groups = launch, Watchdog.of(launch), {}
        self.store = self.watchdog.store

    def connect(self, ranks, name=""):
        """name: tells groups of the same ranks apart, such as the two directions between two of them."""
        key = f"{name}{'-'.join(map(str, ranks))}"
        if key not in self.groups:
            self.groups[key] = self._connect(list(ranks), key)
        return self.groups[key]

    def barrier(self):
        """Wait for all processes, however long they take: a collective of gloo would give up after 30 seconds."""
        self.watchdog.barrier()

    def all_gather_object(self, value, met=False):
        """[what each process calls this with], small JSON values. Not by the store, whose every answer takes 40 milliseconds."""
        if not met:
            self.barrier()
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


@functools.cache  # a process has one
class Gloo(Groups):
    """Groups of processes on CPUs.

    Every group has a store of its own: Paddle's gloo groups write their addresses under keys that do not name the group,
    and would read each other's in a common one. The first of a group's ranks opens it and tells the port in the store of
    all processes; only then do the others connect, as one that knocks too early waits three seconds.
    """

    def _connect(self, ranks, key):
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
        return dist.collective.Group(mine, number, ranks, group, key)


@functools.cache
class Nccl(Groups):
    """The same between accelerators, by Paddle's own groups: nccl, or what the device has in its place (bkcl, xccl).

    Paddle numbers groups by the order in which a process makes them, and exchanges their addresses under that number; as
    only members make one here, its first rank draws a number that no group has.
    """

    def __init__(self, launch):
        Groups.__init__(self, launch)
        dist.init_parallel_env()  # takes the device that the launcher chose

    def _connect(self, ranks, key):
        if ranks.index(self.launch.rank) == 0:
            self.store.set(f"group {key}", str(1000 + self.store.add("groups", 1)).encode())
        dist.collective._set_custom_gid(int(self.store.get(f"group {key}")))
        try:
            return dist.new_group(ranks)
        finally:
            dist.collective._set_custom_gid(None)


# =========================================================== collectives with gradients (arXiv 1909.08053, 2205.05198)


class _CopyToRegion(PyLayer):
    """x, whose gradient is the sum over the ranks (Megatron's f): each has used it for a part of the result."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.axis.all_reduce(dy.clone())


class _ReduceFromRegion(PyLayer):
    """The sum of x over the ranks, its gradient as it is (Megatron's g): what follows is the same on every rank."""

    @staticmethod
    def forward(ctx, x, axis):
        return axis.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, dy):
        return dy.clone()


class _AllGather(PyLayer):
    """The ranks' x behind each other along dim. summed: its gradient is the sum over the ranks, else the same on each."""

    @staticmethod
    def forward(ctx, x, axis, dim, summed):
        ctx.how = axis, dim, summed
        return axis.all_gather(x, dim)

    @staticmethod
    def backward(ctx, dy):
        axis, dim, summed = ctx.how
        return axis.reduce_scatter(dy, dim) if summed else axis.local_chunk(dy, dim)


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


class _AllToAllV(PyLayer):
    """Rows that the ranks have sent here (see Axis.all_to_all_v); their gradients go back the same way."""

    @staticmethod
    def forward(ctx, x, axis, counts):
        ctx.how = axis, counts
        return axis.all_to_all_v(x, counts)

    @staticmethod
    def backward(ctx, dy):
        axis, counts = ctx.how
        return axis.all_to_all_v(dy, counts.T)


class _ScaleGradient(PyLayer):
    """x, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor


def pad_to_multiple(x: paddle.Tensor, multiple: int) -> paddle.Tensor:
    """(B, T, …) with zeros behind it, so that T is a multiple."""
    missing = -x.shape[1] % multiple
    return paddle.concat([x, paddle.zeros([x.shape[0], missing, *x.shape[2:]], x.dtype)], axis=1) if missing else x


# ====================================================================================== tensor parallelism


class ShardSpec:
    """Which part of a whole tensor a parameter is: ranges [(start, stop), …] along one dim of our layout, joined.

    of_ranks: those of every rank of tp; shape: of the whole. overlaps: some of it is with several ranks (key heads, where
    there are fewer of them than ranks).
    """

    def __init__(self, dim, of_ranks, rank, shape):
        self.dim, self.ranges_by_rank, self.rank, self.shape = dim, of_ranks, rank, list(shape)
        self.ranges = of_ranks[rank]
        self.replicated = sum(last - first for ranges in of_ranks for first, last in ranges) > self.shape[dim]

    def of(self, dim, shape):
        """The same ranges of another tensor."""
        return ShardSpec(dim, self.ranges_by_rank, self.rank, shape)

    def slice(self, array):
        """numpy, the whole -> the part."""
        index = (slice(None),) * self.dim
        parts = [array[(*index, slice(*r))] for r in self.ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.dim)

    def scatter_into(self, whole, part, rank=None):
        """Write the part (another rank's) to its places in the whole, in place; numpy."""
        index, start = (slice(None),) * self.dim, 0
        for first, last in self.ranges if rank is None else self.ranges_by_rank[rank]:
            whole[(*index, slice(first, last))] = part[(*index, slice(start, start + last - first))]
            start += last - first

    def first_owner_mask(self, shape):
        """A tensor of the part's shape: 1 for what no lower rank has too, else 0."""
        lower = np.zeros(self.shape[self.dim], bool)
        for first, last in (r for ranges in self.ranges_by_rank[: self.rank] for r in ranges):
            lower[first:last] = True
        mine = np.concatenate([~lower[slice(*r)] for r in self.ranges]).astype(np.float32)
        mine = mine.reshape([-1 if dim == self.dim else 1 for dim in range(len(shape))])
        return paddle.to_tensor(np.broadcast_to(mine, shape))

    @property
    def width(self):
        return sum(last - first for first, last in self.ranges)


def recast(layer: paddle.nn.Layer, cls: type) -> paddle.nn.Layer:
    """The layer as an instance of cls, a subclass of its class: the same parameters, sublayers and attributes."""
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    return new


# ======================================================================================= expert parallelism


def make_expert_axes(grid, order, degree, rank, groups):
    """(the ranks that share out the experts, those with the same experts) around a rank; ranks are connected in this order.

    Consecutive ranks of the data axes, (dp, sharding, sep) as one line at the same pp and tp, have the experts among them:
    each has E/ep, and sends other ranks' tokens to them and back. The next so many do the same with copies of them.
    """
    line = np.transpose(grid, [order.index(name) for name in ("pp", "tp", "dp", "sharding", "sep")])
    line = next(line for line in line.reshape([-1, math.prod(line.shape[2:])]) if rank in line).reshape([-1, degree])
    (group, place), *_ = np.argwhere(line == rank)
    if degree == 1:
        return Axis("ep", [rank], rank), Axis("expert_dp", [rank], rank)
    return tuple(
        Axis(name, [int(r) for r in ranks], rank, groups)
        for name, ranks in (("ep", line[group]), ("expert_dp", line[:, place]))
    )


@paddle.no_grad()
def gather_full_tensor(tensor, cut, tp):
    """The whole of which each rank of tp has such a part, as numpy in our layout."""
    widths = [sum(last - first for first, last in ranges) for ranges in cut.ranges_by_rank]
    tensor = tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor
    turned = paddle.moveaxis(tensor, cut.dim, 0)
    if max(widths) > cut.width:
        more = paddle.zeros([max(widths) - cut.width, *turned.shape[1:]], turned.dtype)
        turned = paddle.concat([turned, more])
    parts = tp.all_gather(turned.unsqueeze(0)).numpy()
    found = np.empty(cut.shape, parts.dtype)
    for rank, width in enumerate(widths):
        cut.scatter_into(found, np.moveaxis(parts[rank, :width], 0, cut.dim), rank)
    return found


def assign_writers(sizes, holders):
    """{name: rank}: who writes which of these tensors, even by bytes: the largest first, to whom has least of its holders.

    sizes: {name: bytes}; holders: {name: [rank]}. Where all hold all, the largest share is at most the mean plus the
    largest tensor.
    """
    found, load = {}, Counter()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = min(holders[name], key=lambda rank: (load[rank], rank))
        load[found[name]] += sizes[name]
    return found


def gather_tensor_index(sizes, topology):
    """({name: bytes}, {name: [rank]}) over all ranks, from each one's own {name: bytes}.

    Asked, not derived from the grid: stages of a pipeline have other names, ranks of expert parallelism other experts.
    Ranks with the same names send a digest of them alone. They have met.
    """
    text = json.dumps(sizes, sort_keys=True)
    digests = topology.all_gather_object(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), met=True)
    lists = [sizes] * len(digests)
    if len(set(digests)) > 1:
        first = digests.index(digests[topology.rank]) == topology.rank
        sent = topology.all_gather_object(sizes if first else None, met=True)
        lists = [sent[digests.index(digest)] for digest in digests]
    everything, holders = {}, {}
    for rank, names in enumerate(lists):
        for name, size in names.items():
            everything[name] = size
            holders.setdefault(name, []).append(rank)
    return everything, holders


def _to_host(tensor):
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
