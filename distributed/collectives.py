"""Process groups, one Axis per mesh axis, collectives with and without gradients, ShardSpec.

    groups = Gloo(launch)                                   # or Nccl(launch): process groups, one per set of ranks
    tp = Axis("tp", ranks=[0, 1], rank=0, groups=groups)    # Topology makes one per mesh axis
    tp.all_reduce(x); tp.all_gather(x, dim=1); tp.reduce_scatter(x, dim=1); tp.ring_shift(x); …

On an axis of one rank every collective returns its input and nothing is sent, so callers have no special case for it.
gloo (CPU) lacks some collectives; they are then built from those that it has, with the same result.
"""

import contextlib
import functools
import hashlib
import json
import math
import socket
import time
from collections.abc import Callable, Iterator

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from distributed.watchdog import Launch, Watchdog

# ============================================================================== the collectives of one mesh axis


class Axis:
    """The ranks that differ only in their coordinate along one mesh axis, and the collectives between them.

    name: "tp", "dp", …; ranks: their global ranks, ascending; rank: this process's index among them; size: how many.
    seconds, bytes: time spent in these collectives so far, and bytes given to them.
    """

    def __init__(self, name: str, ranks: list[int], rank: int, groups: "Groups | None" = None):
        self.name, self.ranks, self.size, self.rank = name, ranks, len(ranks), ranks.index(rank)
        self.groups, self.watchdog = groups, groups and groups.watchdog
        self.group = groups.connect(ranks) if groups is not None and self.size > 1 else None
        self.gate = groups.gate(ranks) if self.group is not None else None
        self.sequence_parallel = False  # of tp: between attention and MLP a rank keeps its share of the tokens
        self.seconds, self.bytes = 0.0, 0

    def all_reduce(self, x: paddle.Tensor, op: str = "sum") -> paddle.Tensor:
        """Sum (or "max") over the ranks, in place. Returns x."""
        if self.size > 1:
            with self._timed(x):
                dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, self.group)
        return x

    def all_gather(self, x: paddle.Tensor, dim: int = 0) -> paddle.Tensor:
        """The x of all ranks, which have one shape, concatenated along dim."""
        if self.size == 1:
            return x
        with self._timed(x):
            chunks = []
            dist.all_gather(chunks, x.contiguous(), self.group)
        return paddle.concat(chunks, axis=dim)

    def reduce_scatter(self, x: paddle.Tensor, dim: int = 0) -> paddle.Tensor:
        """This rank's chunk of the sum of x over the ranks; the size of dim is a multiple of the number of ranks."""
        if self.size == 1:
            return x
        if _backend() == "gloo":  # has no reduce-scatter
            return self.local_chunk(self.all_reduce(x.clone()), dim)
        with self._timed(x):
            chunks = [chunk.contiguous() for chunk in x.split(self.size, axis=dim)]
            result = paddle.empty_like(chunks[0])
            dist.reduce_scatter(result, chunks, dist.ReduceOp.SUM, self.group)
        return result

    def all_to_all_v(self, x: paddle.Tensor, counts: np.ndarray) -> paddle.Tensor:
        """All-to-all with uneven counts: rows x (n, …), sorted by destination -> the rows sent here, sorted by source.

        counts: (ranks, ranks) int, the same on every rank; counts[s, d] rows go from rank s to rank d.
        """
        send_counts, receive_counts = counts[self.rank], counts[:, self.rank]
        if self.size == 1 or not counts.any():
            return x.clone()
        if _backend() == "gloo":  # has no all-to-all: gather everybody's rows, padded to one length, and select
            max_rows = int(counts.sum(1).max())
            if x.shape[0] < max_rows:
                x = F.pad(x, [0, max_rows - x.shape[0]] + [0, 0] * (x.ndim - 1), pad_from_left_axis=True)
            rows, starts = self.all_gather(x), counts[:, : self.rank].sum(1) + max_rows * np.arange(self.size)
            index = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, receive_counts)])
            return paddle.index_select(rows, paddle.to_tensor(index)) if len(index) else rows[:0]
        with self._timed(x):
            result = paddle.empty([int(receive_counts.sum()), *x.shape[1:]], x.dtype)
            dist.alltoall_single(result, x.contiguous(), send_counts.tolist(), receive_counts.tolist(), self.group)
        return result

    def all_gather_into_tensor(self, x: paddle.Tensor) -> paddle.Tensor:
        """The x (n,) of all ranks concatenated -> (ranks · n,), without a second copy of them."""
        if self.size == 1:
            return x
        result = paddle.empty([self.size * x.shape[0]], x.dtype)
        with self._timed(x):
            dist.stream.all_gather(result, x.contiguous(), self.group)
        return result

    def reduce_async(self, x: paddle.Tensor, scatter: bool) -> Callable[[], paddle.Tensor]:
        """Start to sum x (n,) over the ranks; x is overwritten. Returns a function that waits and returns the sum, or
        with `scatter` this rank's chunk of it.

        NCCL reduces in the background. gloo is done before this returns (64 MB between two ranks: 90 ms in this call,
        0.04 ms in the wait), and has all-reduce only.
        """
        if self.size == 1:
            return lambda: x
        chunk = None
        with self._timed(x):
            if scatter and _backend() != "gloo":
                chunk = paddle.empty([x.shape[0] // self.size], x.dtype)
                task = dist.stream.reduce_scatter(chunk, x, dist.ReduceOp.SUM, self.group, sync_op=False)
            else:
                task = dist.all_reduce(x, dist.ReduceOp.SUM, self.group, sync_op=False)

        def wait() -> paddle.Tensor:
            start = time.perf_counter()
            task.wait()
            self.seconds += time.perf_counter() - start
            if scatter:  # cloned, so that the chunk does not keep all of x alive
                return self.local_chunk(x).clone() if chunk is None else chunk
            return x

        return wait

    def all_to_all(self, x: paddle.Tensor) -> paddle.Tensor:
        """x (ranks, …), x[r] for rank r -> (ranks, …), what each rank has for this one.

        gloo has none. Seconds for 16 MB on 4 ranks of two cores: by a scatter from each rank 0.11, by all_gather 0.36,
        by sends between pairs, which need a group each, 0.05; for 1 MB 6.5, 16 and 9.8 ms.
        """
        if self.size == 1:
            return x
        with self._timed(x):
            send = [chunk.contiguous() for chunk in x.unbind(0)]
            received = [paddle.empty_like(chunk) for chunk in send]
            if _backend() == "gloo":
                for source, chunk in enumerate(received):
                    dist.scatter(chunk, send if source == self.rank else None, self.ranks[source], self.group)
            else:
                dist.alltoall(received, send, self.group)
        return paddle.stack(received)

    def ring_shift(self, x: paddle.Tensor) -> paddle.Tensor:
        """Ring shift: send x to rank + 1, return what rank - 1 sent."""
        if self.size == 1:
            return x
        local, following, preceding = (self.ranks[(self.rank + step) % self.size] for step in (0, 1, -1))
        x, received = x.contiguous(), paddle.empty_like(x)
        with self._timed(x):
            if _backend() == "gloo":

                def send():
                    dist.send(x, following, self.groups.connect([local, following], "ring "))

                def receive():
                    dist.recv(received, preceding, self.groups.connect([preceding, local], "ring "))

                # Each step waits until the other rank does the opposite one; so does connecting a group.
                for step in (send, receive) if self.rank % 2 == 0 else (receive, send):
                    step()
            else:
                operations = [
                    dist.P2POp(dist.isend, x, following, self.group),
                    dist.P2POp(dist.irecv, received, preceding, self.group),
                ]
                for task in dist.batch_isend_irecv(operations):
                    task.wait()
        return received

    def broadcast(self, x: paddle.Tensor, source: int) -> paddle.Tensor:
        """The x of rank `source` of this axis, in place. Returns x."""
        if self.size > 1:
            with self._timed(x):
                dist.broadcast(x, self.ranks[source], self.group)
        return x

    def local_chunk(self, x: paddle.Tensor, dim: int = 0) -> paddle.Tensor:
        """This rank's chunk of x along dim, split evenly between the ranks."""
        if self.size == 1:
            return x
        width = x.shape[dim] // self.size
        return x.slice([dim], [self.rank * width], [(self.rank + 1) * width]).contiguous()

    @contextlib.contextmanager
    def _timed(self, x: paddle.Tensor) -> Iterator[None]:
        start = time.perf_counter()
        self.watchdog.enter(self)
        if self.gate is not None:
            self.gate.wait()
        yield
        self.watchdog.leave()  # not on an exception: waiting_in says where this rank was waiting
        self.seconds += time.perf_counter() - start
        self.bytes += x.size * x.element_size()


# ===================================================================================== process groups


def _backend() -> str:
    """The communication library: "gloo" between CPUs, "nccl" (or the device's own) between accelerators."""
    return "gloo" if paddle.device.get_device().startswith("cpu") else "nccl"


class Groups:
    """The process groups of a run, made on first use."""

    def __init__(self, launch: Launch):
        self.launch, self.watchdog, self.groups = launch, Watchdog.of(launch), {}

    def connect(self, ranks: list[int], prefix: str = "") -> dist.collective.Group:
        """The group of these global ranks, which all call it. prefix: tells several groups of the same ranks apart."""
        key = f"{prefix}{'-'.join(map(str, ranks))}"
        if key not in self.groups:
            self.groups[key] = self._connect(list(ranks), key)
        return self.groups[key]

    def barrier(self) -> None:
        """Wait for all processes; a collective of gloo would give up after 30 seconds."""
        self.watchdog.barrier()

    def all_gather_object(self, value, kind: str = "all", channel: str = "main") -> list:
        """[value of each rank]: small JSON values, see Watchdog.gather."""
        return self.watchdog.gather(value, kind, channel)

    def gate(self, ranks: list[int]) -> "Gate | None":
        """What ranks pass before a collective, where the library would not wait long enough for a slow rank."""


class Gate:
    """Where the ranks of a group wait for each other before a collective of gloo, which would fail after 30 seconds.

    A dissemination barrier (Hensgen et al., 1988): in round k each rank sends a byte to the rank 2^k further on, and
    waits for one from the rank 2^k before it: log2(ranks) rounds. Two ranks: 0.03 ms.
    """

    def __init__(self, launch: Launch, ranks: list[int], watchdog: Watchdog):
        rank, size, name = ranks.index(launch.rank), len(ranks), "-".join(map(str, ranks))
        hosts = [launch.endpoints[r].rpartition(":")[0] for r in ranks]
        steps = [1 << k for k in range((size - 1).bit_length())]
        with socket.create_server(("", 0), backlog=len(steps)) as listener:
            watchdog.ask("set", f"gate {name} {rank}", listener.getsockname()[1])
            self.targets, arrived = [], {}
            for step in steps:
                target = (rank + step) % size
                port = watchdog.ask("get", f"gate {name} {target}")
                self.targets.append(socket.create_connection((hosts[target], port)))
                self.targets[-1].sendall(step.to_bytes(4, "little"))
            while len(arrived) < len(steps):
                connection, _ = listener.accept()
                arrived[int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")] = connection
        self.sources = [arrived[step] for step in steps]
        for connection in (*self.targets, *self.sources):
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def wait(self) -> None:
        for target, source in zip(self.targets, self.sources):
            target.sendall(b"x")
            if not source.recv(1):
                raise ConnectionError("gate: connection closed by a peer")


@functools.cache  # one per process
class Gloo(Groups):
    """Process groups between CPUs.

    Every group has a TCP store of its own: Paddle's gloo groups write their addresses under keys that do not name the
    group, so two groups in one store would read each other's. The first rank of a group opens its store and publishes
    the port among the values of all processes; the others connect only then, as a connection that comes too early waits
    three seconds.
    """

    @functools.cached_property
    def gates(self) -> dict[str, Gate]:
        return {}

    def gate(self, ranks: list[int]) -> Gate:
        key = str(ranks)
        if key not in self.gates:
            self.gates[key] = Gate(self.launch, ranks, self.watchdog)
        return self.gates[key]

    def _connect(self, ranks: list[int], key: str) -> dist.collective.Group:
        core, local_rank = paddle.base.core, ranks.index(self.launch.rank)
        host = self.launch.endpoints[ranks[0]].split(":")[0]
        if local_rank == 0:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = probe.getsockname()[1]
            # Paddle wants an id that no other group of a process has, and the same one on all ranks of a group.
            group_id = 1000 + self.watchdog.ask("add", "groups", 1)
            store = core.TCPStore(host, port, True, 1, 900)
            self.watchdog.ask("set", f"group {key}", [port, group_id])
        else:
            port, group_id = self.watchdog.ask("get", f"group {key}")
            store = core.TCPStore(host, port, False, 1, 900)
        group = core.ProcessGroupGloo.create(store, local_rank, len(ranks), group_id)
        return dist.collective.Group(local_rank, group_id, ranks, group, key)


@functools.cache  # one per process
class Nccl(Groups):
    """Process groups between accelerators, Paddle's own: nccl, or the device's equivalent (bkcl, xccl).

    Paddle numbers groups in the order in which a process makes them and exchanges addresses under that number. Here
    only members make a group, so its first rank draws a number that no other group has.
    """

    def __init__(self, launch: Launch):
        Groups.__init__(self, launch)
        self.watchdog.choose_master()
        dist.init_parallel_env()  # takes the device that the launcher chose

    def _connect(self, ranks: list[int], key: str) -> dist.collective.Group:
        if ranks.index(self.launch.rank) == 0:
            self.watchdog.ask("set", f"group {key}", 1000 + self.watchdog.ask("add", "groups", 1))
        dist.collective._set_custom_gid(self.watchdog.ask("get", f"group {key}"))
        try:
            return dist.new_group(ranks)
        finally:
            dist.collective._set_custom_gid(None)


# =========================================================== collectives with gradients (arXiv 1909.08053, 2205.05198)


class _CopyToRegion(PyLayer):
    """Megatron's f: identity in forward, all-reduce in backward. Every rank uses x for its part of the result."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.axis.all_reduce(dy.clone())


class _ReduceFromRegion(PyLayer):
    """Megatron's g: all-reduce in forward, identity in backward. What follows is the same on every rank."""

    @staticmethod
    def forward(ctx, x, axis):
        return axis.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, dy):
        return dy.clone()


class _AllGather(PyLayer):
    """All-gather along dim. Backward: reduce-scatter if gradients are partial sums (`partial`), else the own chunk."""

    @staticmethod
    def forward(ctx, x, axis, dim, partial):
        ctx.axis, ctx.dim, ctx.partial = axis, dim, partial
        return axis.all_gather(x, dim)

    @staticmethod
    def backward(ctx, dy):
        return ctx.axis.reduce_scatter(dy, ctx.dim) if ctx.partial else ctx.axis.local_chunk(dy, ctx.dim)


class _ReduceScatter(PyLayer):
    """Reduce-scatter along dim in forward, all-gather in backward."""

    @staticmethod
    def forward(ctx, x, axis, dim):
        ctx.axis, ctx.dim = axis, dim
        return axis.reduce_scatter(x, dim)

    @staticmethod
    def backward(ctx, dy):
        return ctx.axis.all_gather(dy, ctx.dim)


class _AllToAllV(PyLayer):
    """Axis.all_to_all_v; in backward the gradients take the reverse way."""

    @staticmethod
    def forward(ctx, x, axis, counts):
        ctx.axis, ctx.counts = axis, counts
        return axis.all_to_all_v(x, counts)

    @staticmethod
    def backward(ctx, dy):
        return ctx.axis.all_to_all_v(dy, ctx.counts.T)


class _ScaleGradient(PyLayer):
    """Identity in forward; the gradient is multiplied by a factor."""

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


# ============================================================================= which part of a tensor a rank holds


class ShardSpec:
    """Which part of a full tensor this rank's parameter is: ranges [(start, stop), …] along one dim, concatenated.

    dim: of our layout (linears are [in, out]); ranges_by_rank: [ranges of tp rank 0, of rank 1, …]; ranges: this
    rank's; rank: in tp; shape: of the full tensor. replicated: several ranks hold some of it (key heads, where there
    are fewer heads than ranks).
    """

    def __init__(self, dim: int, ranges_by_rank: list[list[tuple[int, int]]], rank: int, shape: list[int]):
        self.dim, self.ranges_by_rank, self.rank, self.shape = dim, ranges_by_rank, rank, list(shape)
        self.ranges = ranges_by_rank[rank]
        self.replicated = sum(map(_total, ranges_by_rank)) > self.shape[dim]

    def of(self, dim: int, shape: list[int]) -> "ShardSpec":
        """The same ranges, of another tensor."""
        return ShardSpec(dim, self.ranges_by_rank, self.rank, shape)

    def slice(self, full: np.ndarray) -> np.ndarray:
        """The full tensor -> this rank's part."""
        index = (slice(None),) * self.dim
        parts = [full[(*index, slice(*r))] for r in self.ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.dim)

    def scatter_into(self, full: np.ndarray, part: np.ndarray, rank: int | None = None) -> None:
        """Write this rank's part, or that of `rank`, into its ranges of the full tensor, in place."""
        index, offset = (slice(None),) * self.dim, 0
        for start, stop in self.ranges if rank is None else self.ranges_by_rank[rank]:
            full[(*index, slice(start, stop))] = part[(*index, slice(offset, offset + stop - start))]
            offset += stop - start

    def first_owner_mask(self, shape: list[int]) -> paddle.Tensor:
        """float32 of the part's shape: 1 where no lower rank holds the element too, else 0."""
        on_lower_rank = np.zeros(self.shape[self.dim], bool)
        for ranges in self.ranges_by_rank[: self.rank]:
            for start, stop in ranges:
                on_lower_rank[start:stop] = True
        mask = np.concatenate([~on_lower_rank[slice(*r)] for r in self.ranges]).astype(np.float32)
        mask = mask.reshape([-1 if dim == self.dim else 1 for dim in range(len(shape))])
        return paddle.to_tensor(np.broadcast_to(mask, shape))

    @property
    def width(self) -> int:
        """Size of the part along dim."""
        return _total(self.ranges)


def _total(ranges: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


@paddle.no_grad()
def gather_full_tensor(tensor: paddle.Tensor, shard_spec: ShardSpec, tp: Axis) -> np.ndarray:
    """The full tensor from each tp rank's part of it, on every rank, in our layout; bfloat16 as float32."""
    widths = [_total(ranges) for ranges in shard_spec.ranges_by_rank]
    tensor = tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor
    rows = paddle.moveaxis(tensor, shard_spec.dim, 0)
    if max(widths) > shard_spec.width:  # pad to the widest part, as all_gather wants one shape
        padding = paddle.zeros([max(widths) - shard_spec.width, *rows.shape[1:]], rows.dtype)
        rows = paddle.concat([rows, padding])
    parts = tp.all_gather(rows.unsqueeze(0)).numpy()  # (tp, widest, …)
    full = np.empty(shard_spec.shape, parts.dtype)
    for rank, width in enumerate(widths):
        shard_spec.scatter_into(full, np.moveaxis(parts[rank, :width], 0, shard_spec.dim), rank)
    return full


def recast(layer: paddle.nn.Layer, cls: type) -> paddle.nn.Layer:
    """The layer as an instance of cls, a subclass of its class: the same parameters, sublayers and attributes."""
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    return new


# ======================================================================================= expert parallelism


def make_expert_axes(grid: np.ndarray, order: tuple, degree: int, rank: int, groups: object) -> tuple[Axis, Axis]:
    """(the ranks that share out the experts, those with the same experts) around a rank; ranks are connected in this
    order.

    Consecutive ranks of the data axes, (dp, sharding, sep) as one line at the same pp and tp, have the experts among
    them: each has E/ep, and sends other ranks' tokens to them and back. The next so many do the same with copies of
    them.
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


def gather_tensor_index(sizes: dict[str, int], topology: object) -> tuple[dict[str, int], dict[str, list[int]]]:
    """This rank's {name: bytes} -> ({name: bytes}, {name: [ranks that hold it]}) over all ranks.

    It is gathered, not derived from the grid: pipeline stages hold other layers, ranks of expert parallelism other
    experts. Ranks exchange digests first, and only one rank of those with equal names sends them.
    """
    text = json.dumps(sizes, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    digests = topology.all_gather_object(digest)
    size_tables = [sizes] * len(digests)
    if len(set(digests)) > 1:
        sends = digests.index(digest) == topology.rank
        sent = topology.all_gather_object(sizes if sends else None)
        size_tables = [sent[digests.index(digest)] for digest in digests]
    all_sizes, holders = {}, {}
    for rank, table in enumerate(size_tables):
        for name, size in table.items():
            all_sizes[name] = size
            holders.setdefault(name, []).append(rank)
    return all_sizes, holders
