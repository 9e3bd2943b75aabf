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
gradients there, weights back. dp: gradients. Of dp, sharding and sep together, expert_parallel_degree consecutive ranks
share out the experts: tokens there, and back.

The scripts do not see it: a parallel model takes whole batches and gives the losses of all their tokens, on every rank
that shares a batch. With one process nothing here does anything. When one process fails, all end with its message (Company).

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
import hashlib
import json
import math
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import traceback
import types
import zlib
from collections import Counter, defaultdict, deque, namedtuple
from multiprocessing.connection import Client, Listener
from pathlib import Path

import kernels  # before paddle: it silences what paddle says while it is imported

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from data import UserError
from model import (
    FAMILIES,
    MLP,
    Attention,
    Linear,
    LoRALinear,
    ModelConfig,
    QuantLinear,
    SparseMLP,
    base_folders,
    base_weights,
    build,
    load_adapter,
    load_weights,
    lora_layers,
    merge,
    read_tensor,
    safetensors_header,
    set_parameter,
    write_safetensors,
)

# ============================================================================================ the grid

AXES = ("dp", "pp", "sharding", "sep", "tp")  # slowest first
ORDERS = {"pp_first": AXES, "sharding_first": ("dp", "sharding", "pp", "sep", "tp")}
# What upstream's NAME_parallel_degree calls them; context is the sep axis too.
NAMES = {"tp": "tensor", "pp": "pipeline", "sharding": "sharding", "sep": "sep", "context": "context", "ep": "expert"}
SHARDINGS = ("stage1", "stage2", "stage3", "offload")


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

    @staticmethod
    def of(args, config=None, T=None, world=None):
        """From the arguments; UserError with all that does not fit, in one line.

        config: the model's, T: the longest sequence, where they are known. world: of the processes that were launched, dp is
        what the other degrees leave; None: a run that only counts, of as many as they ask for.
        """
        asked = {axis: getattr(args, f"{name}_parallel_degree") for axis, name in NAMES.items()}
        ways = {axis: max(1, degree) for axis, degree in asked.items()}
        words = re.findall(r"[^\s,]+", getattr(args, "sharding", None) or "")
        if unknown := [word for word in words if word not in SHARDINGS]:
            raise UserError(
                f"sharding: {unknown[0]!r}; possible are stage1, stage2, stage3, and offload beside one of them"
            )
        order = getattr(args, "hybrid_parallel_topo_order", None) or "pp_first"
        if order not in ORDERS:
            raise UserError(f"hybrid_parallel_topo_order: {order!r}; possible are {', '.join(ORDERS)}")
        if asked["sharding"] < 1 and words and world:  # as upstream: all that is left
            left = world // (ways["pp"] * ways["sep"] * ways["context"] * ways["tp"])
            ways["sharding"] = max(1, left)
        stages = [int(word[-1]) for word in words if word != "offload"] or [1]
        degrees = Degrees(
            pp=ways["pp"],
            sharding=ways["sharding"],
            sep=max(ways["sep"], ways["context"]),
            tp=ways["tp"],
            ep=ways["ep"],
            virtual=max(1, getattr(args, "virtual_pp_degree", 1)),
            stage=max(stages) if ways["sharding"] > 1 else 0,
            offload="offload" in words,
            sequence_parallel=getattr(args, "sequence_parallel", False),
            context=ways["context"] > 1,
            order=order,
        )
        wrong = []
        if ways["sep"] > 1 and ways["context"] > 1:
            wrong.append("sep_parallel_degree and context_parallel_degree exclude each other")
        if world and world % degrees.world:
            factors = " x ".join(
                f"{NAMES[axis]}_parallel_degree {ways[axis]}" for axis in ("tp", "pp", "sharding", "sep", "context")
            )
            mend = "set the degrees to 1" if world == 1 else f"give a product that divides {world}"
            wrong.append(f"{factors} = {degrees.world} processes, but this run has {world}; {mend}")
        elif world:
            degrees = dataclasses.replace(degrees, dp=world // degrees.world)
            if ways["ep"] > world:
                wrong.append(f"expert_parallel_degree: {ways['ep']}, but this run has {world} process(es); set it to 1")
        elif not world:  # as many copies of all else as its experts need
            degrees = dataclasses.replace(
                degrees, dp=ways["ep"] // math.gcd(ways["ep"], ways["sharding"] * degrees.sep)
            )
        if max(stages) > 1 and ways["pp"] > 1:
            wrong.append(
                f"sharding stage{max(stages)} and pipeline_parallel_degree {ways['pp']} exclude each other: use stage1"
            )
        if degrees.virtual > 1 and ways["pp"] == 1 and config is None:  # else check_pipeline says it
            wrong.append(f"virtual_pp_degree {degrees.virtual} needs a pipeline_parallel_degree above 1")
        if degrees.sequence_parallel and ways["tp"] == 1 and world != 1:
            wrong.append("sequence_parallel needs a tensor_parallel_degree above 1")
        if config is not None:
            wrong += degrees.misfits(config, T)
        if wrong:
            raise UserError("; ".join(wrong))
        return degrees

    def misfits(self, config, T=None):
        """[what of a model, and of sequences of T tokens, cannot be cut so many ways]: key, what it is, and how many there are."""
        return check_tensor(config, self) + check_pipeline(config, self) + check_context(config, self, T)

    def __str__(self):
        names = {"dp": "data", **NAMES, "sep": "context" if self.context else "sep"}
        order = ("tp", "pp", "sharding", "sep", "dp", "ep")
        ways = [f"{names[axis]} {getattr(self, axis)}" for axis in order if getattr(self, axis) > 1]
        if self.virtual > 1:
            ways.insert(1 + (self.tp > 1), f"virtual {self.virtual}")
        if self.stage:
            ways.append(f"stage {self.stage}{' with offload' * self.offload}")
        return ", ".join(ways) or "one process"

    @property
    def world(self):
        return self.dp * self.pp * self.sharding * self.sep * self.tp

    def cut(self, name, config):
        """Over how many ranks tensor and expert parallelism spread a parameter or linear of this name (ours): on the fullest."""
        layer = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        H, K, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
        if layer in ("k_proj", "v_proj"):  # repeated where there are fewer heads than ranks
            return min(self.tp, K)
        if layer == "qkv_proj":
            return (H + 2 * K) / (H / self.tp + 2 * K / min(self.tp, K))
        if layer in BY_VOCABULARY:
            return V / -(-V // self.tp)
        cut = layer in BY_OUTPUTS or layer in BY_INPUTS and not name.endswith(".bias")
        ways = self.tp if cut else 1
        return min(ways * self.ep, self.world // self.pp) if ".experts." in name else ways

    def shared(self, name, config):
        """Over how many ranks sharding spreads what cut() leaves of it: experts may have gone to these ranks already."""
        if ".experts." not in name:
            return self.sharding
        return min(self.sharding, self.world // self.pp // self.cut(name, config))


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
        self.alone = Axis("alone", [rank], rank)
        self.ep, self.copies = expert_axes(self.grid, order, degrees.ep, rank, groups)

    @property
    def axes(self):
        return [getattr(self, name) for name in AXES] + ([self.ep, self.copies] if self.ep.size > 1 else [])

    @property
    def data_rank(self):
        """Which share of a step's batches this rank works on, of data_size."""
        return self.dp.rank * self.sharding.size + self.sharding.rank

    @property
    def data_size(self):
        return self.dp.size * self.sharding.size

    @property
    def copy_of_model(self):
        """(which copy of the model this rank is of, how many there are) that can work without the others: none in stage 3,
        whose weights come from all of them, nor where experts are elsewhere."""
        together = self.degrees.stage == 3 or self.ep.size > 1
        return (0, 1) if together else (self.data_rank, self.data_size)

    def meet(self):
        """Wait for all processes, however long they take."""
        if self.groups is not None:
            self.groups.meet()

    def exchange(self, value, met=False):
        """[what each process calls this with]: JSON values. met: they come within 30 seconds of each other, after meet(),
        which then is not waited for."""
        return [value] if self.groups is None else self.groups.exchange(value, met)

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
    return (
        list(numbers.values())
        if isinstance(numbers, dict)
        else list(numbers)
        if isinstance(numbers, tuple)
        else [numbers]
    )


# =============================================================================== talking along an axis


class Axis:
    """The ranks that differ in one coordinate alone, and what they do together. With one rank nothing is sent.

    seconds and bytes: spent in, and handed to, its collectives so far.
    """

    def __init__(self, name, ranks, rank, groups=None):
        self.name, self.ranks, self.size, self.rank = name, ranks, len(ranks), ranks.index(rank)
        self.groups, self.company = groups, groups and groups.company
        self.group = groups.connect(ranks) if groups is not None and self.size > 1 else None
        self.sequence = False  # tp: between attention and MLP a rank keeps its share of the tokens, …
        self.tokens = None  # … of so many, T/sep, of the pass that is being made; None: not in this one
        self.places = (
            None  # sep: (T,) int64 numpy, where in whole rows of `whole` tokens this rank's tokens stand; see spread()
        )
        self.whole = None
        self.pieces = None  # ep: [Visit], whose tokens an expert is at work on; None: this rank's
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
        begin, self.company.place = time.perf_counter(), self
        yield
        self.company.place = None  # an exception leaves it: there this rank was lost
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
        return Launch(
            int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1)), endpoints
        )


class Groups:
    """What connects processes: connect(ranks) gives the group of these ranks, made when it is first asked for."""

    def __init__(self, launch):
        self.launch, self.company, self.groups = launch, Company.of(launch), {}
        self.store = self.company.store

    def connect(self, ranks, name=""):
        """name: tells groups of the same ranks apart, such as the two directions between two of them."""
        key = f"{name}{'-'.join(map(str, ranks))}"
        if key not in self.groups:
            self.groups[key] = self._connect(list(ranks), key)
        return self.groups[key]

    def meet(self):
        """Wait for all processes, however long they take: a collective of gloo would give up after 30 seconds."""
        self.company.meet()

    def exchange(self, value, met=False):
        """[what each process calls this with], small JSON values. Not by the store, whose every answer takes 40 milliseconds."""
        if not met:
            self.meet()
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


STORE_GONE = ValueError, RuntimeError, OSError  # what Paddle raises where there is no store any more


class Company:
    """All processes of a run: they meet, and no one goes on alone when another has ended.

    Rank 0 keeps the store that all talk through. A thread in each tells the others every second that it is alive and
    which collective it waits in, and ends this process when a failure is told there, when rank 0 is gone, or when the
    launcher is. The first failure is the one that all ranks show.
    """

    SILENCE = 45.0  # seconds without a sign of life, after which a rank is given up
    RANK_0_GONE = "rank 0 has vanished: it was killed, or ran out of memory"

    @staticmethod
    @functools.cache  # a process has one
    def of(launch):
        return Company(launch)

    def __init__(self, launch):
        self.launch, self.place, self.meetings, self.agreements = launch, None, 0, 0
        self.store = self._client(launch.rank == 0)
        self.parent = (
            os.getppid() if "PADDLE_LOG_DIR" in os.environ else None
        )  # the launcher, if that is what started us
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's; Paddle would show where its C++ stands
        self.ending, self.done = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def _client(self, opens=False):
        """A connection of its own for each thread; the one that opens is the server too."""
        host, port = self.launch.endpoints[0].split(":")
        return paddle.base.core.TCPStore(host, int(port), opens, 1, 120)

    def meet(self):
        """Wait for all processes, however long they take."""
        self.meetings += 1
        name = f"meeting {self.meetings}"
        if self.store.add(name, 1) < self.launch.world:
            self._wait(lambda: self.store.add(name, 0) >= self.launch.world)

    @staticmethod
    def _wait(condition):
        """However long; the store's own way gives up after a time, and cannot be interrupted."""
        pause = 0.001
        while not condition():
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)

    def agree(self, what, values):
        """UserError unless every process has the same {key: value}; it names the rank that differs from rank 0, and a key."""
        mine, self.agreements = {key: repr(value) for key, value in values.items()}, self.agreements + 1
        name = f"agreement {self.agreements}"
        if self.launch.rank == 0:
            self.store.set(name, json.dumps(mine).encode())
            self.store.add(f"{name} is there", 1)
            return
        self._wait(lambda: self.store.add(f"{name} is there", 0))
        theirs = json.loads(self.store.get(name))
        for key in {**theirs, **mine}:
            if mine.get(key) != theirs.get(key):
                here, there = (found.get(key, "not there") for found in (mine, theirs))
                raise UserError(
                    f"{what}: {key} is {here:.80} here and {there:.80} on rank 0; all processes must have the same"
                )

    def leave(self):
        """At the end of a run: rank 0 stays until the others have gone, as the store is with it."""
        if self.launch.rank:
            self.stop()  # before rank 0 knows, as it may be gone at once
        self.store.add("left", 1)
        self._wait(lambda: self.launch.rank or self.store.add("left", 0) >= self.launch.world)
        self.stop()

    def stop(self):
        self.done.set()
        if self.thread is not threading.current_thread():
            self.thread.join()

    def fail(self, error, code, line):
        """End this process, as `error` has ended its work: code 2 and a line for what the user can mend, else a traceback.

        One that only lost its company shows why: another's failure, or who is missing.
        """
        lost = code == 1 and (self.place is not None or re.search(r"gloo|TCP (send|receive)|TCPStore", str(error)))
        if lost:
            print(f"lost in {self.place.name if self.place else 'a message'}: {error}", file=sys.stderr, flush=True)
            time.sleep(0.5)  # a failure that is told in the store ends us here, by the other thread
            try:
                code, line = 1, self._who_is_missing(str(error))
            except STORE_GONE:
                code, line = 1, self.RANK_0_GONE
        elif line is None:
            traceback.print_exception(error)
            line = f"rank {self.launch.rank}: {type(error).__name__}: {error} (its traceback is in its own log)"
        else:
            line = f"rank {self.launch.rank}: {line}"
        try:
            self.end(code, line)
        except STORE_GONE:
            self._exit(code, line)

    def end(self, code, line, store=None):
        """Tell all, wait until they know, and exit; who is told first is who all show."""
        store = store or self.store
        if store.add("failures", 1) == 1:
            store.set("failure", json.dumps([code, line]).encode())
        self._exit(*json.loads(store.get("failure")), store)

    def _exit(self, code, line, store=None):
        if not self.ending.acquire(blocking=False):
            time.sleep(60)  # the other thread is about to
        sys.stdout.flush()
        print(f"error: {line}", file=sys.stderr, flush=True)
        if store is not None:
            with contextlib.suppress(*STORE_GONE):
                told, end = store.add("told", 1), time.monotonic() + 8.0
                while told < self.launch.world and time.monotonic() < end:
                    time.sleep(0.05)
                    told = store.add("told", 0)
        os._exit(code)  # threads may be inside of a collective that will never end

    def _watch(self):
        try:
            store = self._client()
            self._keep_watch(store)
        except STORE_GONE:
            if not self.done.is_set():
                self._exit(1, self.RANK_0_GONE)

    def _keep_watch(self, store):
        rank, world, beat, heard = self.launch.rank, self.launch.world, 0, {}
        while not self.done.wait(0.25):
            if self.parent is not None and os.getppid() != self.parent:
                self._exit(1, "the launcher is gone")
            if store.add("failures", 0):
                self._exit(*json.loads(store.get("failure")), store)
            beat += 1
            if beat % 4 == 1:
                store.set(f"rank {rank}", json.dumps([beat, self.place and self.place.name, time.time()]).encode())
                store.add(f"rank {rank} is there", int(beat == 1))
            if rank == 0 and beat % 20 == 0:
                now = time.monotonic()
                for other in range(1, world):
                    if store.add(f"rank {other} is there", 0):
                        sign = store.get(f"rank {other}")
                        if heard.get(other, (None,))[0] != sign:
                            heard[other] = sign, now
                        elif now - heard[other][1] > self.SILENCE and not store.add("left", 0):
                            self.end(1, f"rank {other} has given no sign of life for {self.SILENCE:.0f} s", store)

    def _who_is_missing(self, message):
        """The line about who did not come to the collective that this rank waited in."""
        place = self.place.name if self.place else "a message"
        ranks = self.place.ranks if self.place else range(self.launch.world)
        closed = re.search(r"pair\.cc|onnection (closed|reset)|roken pipe", message)

        def signs():
            return {
                r: json.loads(self.store.get(f"rank {r}"))
                for r in range(self.launch.world)
                if self.store.add(f"rank {r} is there", 0)
            }

        before = signs()
        time.sleep(3.0)  # every rank gives three
        after = signs()
        silent = [r for r in before if before[r][0] == after[r][0]]
        silent.sort(key=lambda r: after[r][2])  # the first to go: a launcher ends the others of its node for that
        elsewhere = [
            r for r in ranks if r not in silent and r in after and after[r][1] is None and r != self.launch.rank
        ]
        if silent and closed:
            return f"rank {silent[0]} has vanished: it was killed, or ran out of memory"
        if silent:
            return f"rank {silent[0]} gives no sign of life; others waited 30 s for it in a collective ({place})"
        if elsewhere:
            return f"rank {elsewhere[0]} hangs or is far behind: others waited 30 s for it in a collective ({place})"
        waits = ", ".join(f"rank {r} in {where}" for r, (_, where, _) in after.items())
        return f"ranks wait for each other: {waits}: {message.strip().splitlines()[-1]:.200}"


def company():
    """The Company that this process belongs to; None if it is alone."""
    launch = Launch.of_environment()
    return Company.of(launch) if launch.world > 1 else None


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
        found = _Gather.apply(found, tp, found.ndim - 1, False)
        if V % tp.size:
            ids = [
                np.arange(r * V // tp.size, (r + 1) * V // tp.size) - r * V // tp.size + r * widest
                for r in range(tp.size)
            ]
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


def cut_tensors(model, tp):
    """Tensor parallelism of a model as it was built: parameters become parts, layers get the mixins above."""
    config = model.config
    if tp.size == 1:
        return
    for path, layer in list(model.named_sublayers()):
        if isinstance(layer, Elsewhere):
            continue
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
    return tuple(
        Axis(name, [int(r) for r in ranks], rank, groups)
        for name, ranks in (("ep", line[group]), ("copies", line[:, place]))
    )


def is_spread(path, topology):
    """Whether the parameter of this path is one of an expert that other ranks of topology.ep do not have."""
    return topology.ep.size > 1 and ".mlp.experts." in path


def experts_of(config, ep, rank=None):
    """range of the experts that a rank (this one) of ep has."""
    each, rank = config.experts.count // ep.size, ep.rank if rank is None else rank
    return range(rank * each, (rank + 1) * each)


class Visit(namedtuple("Visit", "number count places whole")):
    """Tokens of one rank at an expert: the number of that rank's Draws, how many, and, where that rank has some tokens of
    its rows alone (sep), their places among the `whole` tokens of all of these rows at this expert."""


class SpreadExperts:
    """A SparseMLP that has the experts of its rank of ep alone: tokens are sent to where their experts are, and back."""

    dropout = False  # whether the experts' adapters have any, on any rank

    def mix(self, flat, weights, chosen):
        """Where ranks of sep have some tokens of each row, those of one row are known to be so at each expert, for dropout;
        and what fills rows up goes to no expert: one that no token chose has no gradient."""
        self.places, self.wholes, sep = None, None, self.topology.sep
        if self.training and self.dropout and sep.places is not None:
            self.places, self.wholes = self._places(chosen)
        real = np.ones(1, bool) if sep.places is None else sep.places < sep.whole
        if real.all() or not real.any():  # (an operation on no rows at all is not worth its trouble)
            return super().mix(flat, weights, chosen)
        N, D = flat.shape
        rows = np.flatnonzero(np.tile(real, N // len(real)))
        if self.places is not None:
            self.places = self.places[self.places >= 0]
        index = paddle.to_tensor(rows)
        mixed = super().mix(*(paddle.index_select(x, index) for x in (flat, weights, chosen)))
        back = np.full(N, len(rows))
        back[rows] = np.arange(len(rows))
        return paddle.index_select(paddle.concat([mixed, paddle.zeros([1, D], mixed.dtype)]), paddle.to_tensor(back))

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
            pieces = [
                Visit(
                    int(numbers[i % ep.size]),
                    last - first,
                    None if places is None else places[first:last],
                    int(wholes.T.flat[i]),
                )
                for i, (first, last) in enumerate(runs)
            ]
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
    elsewhere = {
        theirs.format(i=i, e=e)
        for _, theirs, _ in rows
        for i in range(config.num_hidden_layers)
        for e in range(config.experts.count)
        if e not in mine
    }
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
        k, v, past_k, past_v = (
            x if x is None or copies == 1 else _repeat_heads(x, copies) for x in (k, v, past_k, past_v)
        )
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
        out, lse = (
            paddle.concat([getattr(part, name) for part in sums], axis=dim) for name, dim in (("out", 1), ("lse", 2))
        )
        ctx.how, ctx.given = how, [t is not None for t in (q, k, v, past_k, past_v)]
        ctx.frozen = [t is None or t.stop_gradient for t in (q, k, v, past_k, past_v)]
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        how, (q, k, v, past_k, past_v, out, lse) = ctx.how, ctx.saved_tensor()
        parts = [
            types.SimpleNamespace(
                q=q[:, i], kept=(out[:, i], lse[:, :, i], d_out[:, i]), d_q=paddle.zeros_like(q[:, i])
            )
            for i in halves(q)
        ]
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
        old, new = (
            (x / total).transpose([0, 2, 1]).unsqueeze(-1).astype(out.dtype) for x in (old, new)
        )  # (B, C, H, 1)
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
    key = f"{'context' if degrees.context else 'sep'}_parallel_degree {sep}"
    if not degrees.context:
        heads = sorted({last - first for (first, last), _ in (heads_of(config, tp, rank) for rank in range(tp))})
        if any(n % sep for n in heads):
            of = f", which tensor_parallel_degree {tp} leaves a rank of {config.num_attention_heads}" if tp > 1 else ""
            found.append(
                f"{key} does not divide attention heads ({' or '.join(map(str, heads))}{of}): context_parallel_degree takes any number"
            )
    parts, of_ring = (2 * sep, f" x 2 = {2 * sep}") if degrees.context else (sep, "")  # see spread()
    if T is not None and T < parts:
        found.append(f"{key}{of_ring} is more than tokens of a sequence ({T})")
    return found


# ========================================================================================================= pipeline


def stage_layers(layers, stages):
    """[range of layers] of each stage: as even as can be; stages in the middle, which have no embedding or head, take more."""
    order = sorted(range(stages), key=lambda stage: (stage in (0, stages - 1), stage == stages - 1, stage))
    sizes = [layers // stages + (order.index(stage) < layers % stages) for stage in range(stages)]
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for size, end in zip(sizes, ends)]


def check_pipeline(config, degrees):
    """[what stands against a pipeline of this model so, a line each]."""
    stages = degrees.pp * degrees.virtual
    if degrees.virtual > 1 and degrees.pp == 1:
        return [f"virtual_pp_degree {degrees.virtual} needs a pipeline_parallel_degree above 1"]
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

    A bell beside the group (a connection of Python's own) carries the headers, and says when both are ready: gloo gives up
    after 30 seconds, and a neighbour may need longer. It also tells at once that the neighbour is gone.
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
            (dist.recv if mine == target else dist.send)(
                paddle.zeros([1]), source if mine == target else target, self.group
            )
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
                if tensors:
                    self.bell.recv_bytes()  # now the other receives
                for tensor in tensors:
                    dist.send(tensor, self.target, self.group)
            except Exception as error:  # send() raises it
                self.error = error
                self.bell.close()
                return
            message = tensors = tensor = None  # else kept until the next comes

    def receive(self):
        """(header, tensors) of the next message, however long it takes to come."""
        try:
            header, kinds = json.loads(self.bell.recv_bytes())
            if kinds and _backend() == "gloo":
                self.bell.send_bytes(b"now")
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
        self.now, self.starts, self.whole, self.begun = None, False, False, 0
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
        self.axis.bytes += sum(tensor.size * tensor.element_size() for tensor in tensors)
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
            raise RuntimeError(
                "a pipeline is trained by parallel.micro_steps(), and runs by itself in paddle.no_grad() alone"
            )
        if self.begun:
            raise RuntimeError("a pipeline that works on batches in_turn() takes no other call")
        return self.end(self.begin(run))

    def begin(self, run):
        """This rank's part of run(), without gradients: its result on the last stage, which goes back at once, else None."""
        self.whole = True
        self.begun += 1
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
        self.begun -= 1
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
        self.begin(input_ids, caches)
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
    names = {weight.name for weight in base_weights(model)}
    fixed = model.flops_per_token(0)
    model.whole_flops = fixed, model.flops_per_token(1) - fixed
    pipeline = model.pipeline = Pipeline(topology, model.config.num_hidden_layers)
    first, last = pipeline.rank == 0, pipeline.rank == pipeline.size - 1
    for i in set(range(len(model.layers))) - {i for layers in pipeline.layers for i in layers}:
        model.layers[i] = Elsewhere()
    tied = model.lm_head is None
    for name, kept in (
        ("embed_tokens", first or tied and last),
        ("embed_positions", first),
        ("embed_norm", first),
        ("project_in", first),
        ("norm", last),
        ("project_out", last),
        ("lm_head", last),
    ):
        if getattr(model, name) is not None and not kept:
            setattr(model, name, Elsewhere())
    ends = [topology.pp.ranks[0], topology.pp.ranks[-1]]
    model.tied = Axis("tied", ends, topology.rank, topology.groups) if tied and (first or last) else None
    model.elsewhere |= names - {weight.name for weight in base_weights(model)}


def stage_copies(model, path):
    """The axis over whose ranks, stages of a pipeline, there are copies of the parameter of this path; None: it is alone."""
    if model.topology.pp.size > 1:
        if path.startswith("prefix."):
            return model.topology.pp
        if path == "embed_tokens.weight" and model.tied is not None:
            return model.tied
    return None


# =============================================================================== gradients, and who updates what


class Rule(namedtuple("Rule", "parts sharded apart counts")):
    """What becomes of the gradient of a parameter.

    parts: axes along which each rank has a part of it, and all get the sum. sharded: the axis along which it is added up
    too, and the update divided (one of size 1: not at all). counts: whether this rank adds its squares to the norm, so that
    each element of the model is in it once; ranks of tp, pp and of `sharded` are added up, and those of the axes `apart`.
    """


def rule_of(path, parameter, model):
    """The Rule of a parameter by its path in the model: the one place that says who has which part of which gradient."""
    topology, copied = model.topology, stage_copies(model, path)
    tp, cut = topology.tp, getattr(parameter, "cut", None)
    spread = is_spread(path, topology)  # sharded already: by whole experts
    parts = [topology.copies] if spread else [topology.sep, topology.dp]
    parts += [tp] * partial_over_tp(path, parameter, tp) + ([] if copied is None else [copied])
    parts = tuple(axis for axis in parts if axis.size > 1)
    sharded, apart = (topology.alone, (topology.ep,)) if spread else (topology.sharding, ())
    return Rule(parts, sharded, apart, (cut is not None or tp.rank == 0) and (copied is None or copied.rank == 0))


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
    def extent(self):
        """(first, last) of its elements within the parameter laid flat."""
        return self.first, self.last

    def set(self, array):
        """What Weight.read(…, extent) gives, (n,) numpy, into it."""
        self.tensor.copy_(paddle.to_tensor(array).astype(self.bucket.dtype), True)

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
        degrees, model.topology, model.shards = topology.degrees, topology, self
        self.stage = max(1, degrees.stage) if topology.sharding.size > 1 else 0
        self.paths = {id(parameter): path for path, parameter in weight_tensors(model)}
        self.rules = {id(w.parameter): rule_of(self.paths[id(w.parameter)], w.parameter, model) for w in weights}
        self.units, self.mine = {}, {}  # by name; {id of a parameter: the Piece that is here}
        self.arrived, self.early, self.flying = set(), False, []
        if degrees.world > 1:
            self._make_units()
        mine = [self.mine[id(w.parameter)] for w in weights if id(w.parameter) in self.mine]
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
                rule = Rule((), rule_of(path, parameter, self.model).sharded, (), False)
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
                        self.mine[id(parameter)] = Piece(weight or Frozen(path, parameter), bucket, index)
                    if self.stage == 3:
                        parameter.piece = self.mine.get(
                            id(parameter)
                        )  # a folder's weights are read into it, see model.load_weights
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
        for piece in self.mine.values():
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
            self.arrived.update(weight.name for weight in self.weights)
            return
        for name in ("sharding", "sep", "dp", "copies", "tp"):
            axis = getattr(self.topology, name)
            rules = [(w.name, self.rules[id(w.parameter)]) for w in self.weights]
            names = [name for name, rule in rules if axis.size > 1 and (axis in rule.parts or axis is rule.sharded)]
            if names:
                seen = paddle.to_tensor([float(name in self.arrived) for name in names])
                self.arrived |= {name for name, there in zip(names, axis.all_reduce(seen, "max").numpy()) if there}

    def _norm(self):
        topology = self.topology
        sums = {((), topology.sharding): paddle.zeros([], "float64")}
        if topology.ep.size > 1:  # also on a rank that trains none of its experts: the others wait for it
            sums[(topology.ep,), topology.alone] = paddle.zeros([], "float64")
        for piece in self.pieces:
            parameter = piece.weight.parameter if self.stage else piece.parameter
            rule, gradient = self.rules[id(parameter)], piece.grad
            if gradient is None or not rule.counts:
                continue
            if (cut := getattr(parameter, "cut", None)) is not None and cut.overlaps:
                counted = cut.counted(parameter.shape)
                gradient = gradient * (counted.reshape([-1])[piece.first : piece.last] if self.stage else counted)
            sums[rule.apart, rule.sharded] += kernels.squared_norm(gradient)
        total = paddle.zeros([], "float64")
        for (axes, sharded), squares in sums.items():
            for axis in (*axes, *([sharded] if self.stage else [])):
                axis.all_reduce(squares)
            total = total + squares
        for axis in (self.topology.tp, self.topology.pp):
            axis.all_reduce(total)
        return math.sqrt(float(total))

    @paddle.no_grad()
    def gather_weights(self):
        """After the optimizer's step: the weights that other ranks have updated. Gradients are gone."""
        self.arrived.clear()
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

    # ------------------------------------------------------------------------------- for checkpoints
    # Moments are optimizer.moments[name], each (n,) of the piece of this name. A file is written from whole(), weight by
    # weight; or, of weights, in each_unit(), while they are whole. Of a file no more is read than extent() says of moments,
    # and parameter.piece of stage 3's weights.

    def place_of(self, weight):
        """() where this rank's moments are of all of the parameter; else (first,) of its elements, laid flat, that they are of."""
        if not self.stage or self._bucket(weight)[0].axis.size == 1:
            return ()
        piece = self.mine.get(id(weight.parameter))
        return (0 if piece is None else piece.first,)

    def laid(self, weight, moment):
        """A moment as place_of() says: of the parameter's shape, or flat, or None."""
        return moment if moment is None or self.place_of(weight) else moment.reshape(weight.parameter.shape)

    def held(self, weight):
        """(tensor, *place) of what this rank has of a weight: (the parameter,); or in stage 3 (its elements or None, first)."""
        if self.stage < 3 or id(weight.parameter) not in self.paths:  # a table that is computed
            return (weight.parameter,)
        self._bucket(weight)[0].take_over()
        piece = self.mine.get(id(weight.parameter))
        return (self.laid(weight, piece and piece.tensor), *self.place_of(weight))

    def present(self, name):
        """While it is entered a unit's parameters have their values. Ranks along sharding enter it together."""
        return self.units[name].whole() if self.stage == 3 and name in self.units else contextlib.nullcontext()

    def _bucket(self, weight):
        """(its bucket, its number in there) of a parameter."""
        unit = self.units[unit_of(self.paths[id(weight.parameter)], self.model.lm_head is None)]
        return next((b, i) for b in unit.buckets for i, p in enumerate(b.parameters) if p is weight.parameter)

    def extent(self, weight):
        """None if this rank updates all of the parameter; else (first, last) of its elements, laid flat in our layout."""
        return self.mine[id(weight.parameter)].extent if self.stage else None

    @paddle.no_grad()
    def whole(self, weight, tensor):
        """numpy of the parameter's shape (our layout), from each rank's tensor (n,) of its piece: a moment, a gradient, or
        the piece's own. Ranks along sharding call it together; tensor is None where a rank owns nothing of it."""
        if not self.stage:
            return tensor.numpy()
        parameter, (bucket, index) = weight.parameter, self._bucket(weight)
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
        sparse, topology = self.shards.model.config.experts is not None, self.shards.topology
        if topology.sep.size > 1 or sparse and topology.ep.size > 1:
            # Ranks with other tokens have other experts at work, or none of their tokens has a label: their backwards may go in
            # other orders and come to this unit before or after a collective of backward itself. All are reduced behind it.
            return
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

    def begin(self, input_ids, caches):
        """This rank's share of the tokens; one at a time, as it is generated, is not spread."""
        self.share_tokens(input_ids.shape[1] if caches is None else None)
        super().begin(input_ids, caches)

    def share_tokens(self, T):
        """Say which tokens of rows of T this rank works on; None: all. One token at a time cannot be spread."""
        tp, sep = self.topology.tp, self.topology.sep
        spread(sep, T, self.topology.degrees.context)
        tp.tokens = (T if sep.places is None else len(sep.places)) if tp.sequence and T is not None else None

    def hidden_states(self, *arguments, **options):
        x, tp, sep = super().hidden_states(*arguments, **options), self.topology.tp, self.topology.sep
        if tp.tokens is not None:
            x, tp.tokens = _together(x, tp, False), None
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

    def num_parameters(self, trained=False):
        """Of all ranks of tp, ep and pp, each counted once. Ranks along pp call it together."""
        topology, total = self.topology, 0
        for path, parameter in self.named_parameters():
            cut, copied = getattr(parameter, "cut", None), stage_copies(self, path)
            if trained and parameter.stop_gradient or copied is not None and copied.rank > 0:
                continue
            size = math.prod(parameter.shape if cut is None else cut.shape)
            total += size * topology.ep.size if is_spread(path, topology) else size
        return int(topology.pp.all_reduce(paddle.to_tensor(total, "int64")))

    def flops_per_token(self, T):
        experts, ep = self.config.experts, self.topology.ep
        here = sum(
            layer.n_in * layer.n_out
            for path, layer in self.named_sublayers()
            if isinstance(layer, (Linear, QuantLinear)) and is_spread(path, self.topology)
        )
        return super().flops_per_token(T) + (
            6.0 * here * (ep.size - 1) * experts.top_k / experts.count if here else 0.0
        )


def parallelize(model, topology):
    """Make of a model, as build() gives it, this process's part of it, in place; returns it. Order: tp, then the loop of forward()."""
    model.topology, model.shards = topology, None
    if topology.degrees.world > 1:
        if wrong := topology.degrees.misfits(model.config):
            raise UserError("; ".join(wrong))
        if topology.groups is not None:
            topology.groups.company.agree("the model", dataclasses.asdict(model.config))
        topology.tp.sequence = topology.degrees.sequence_parallel
        cut_stages(model, topology)
        cut_tensors(model, topology.tp)
        spread_attention(model, topology)
        spread_experts(model, topology)
        mix_in(model, ParallelCausalLM)
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
    and the loss is 0.0 where it is not known. seed(i): seeds the randomness of the i-th.
    """
    topology, shards = model.topology, model.shards

    def forward(index):
        seed(index * topology.data_size + topology.data_rank)
        return batch_loss(batches[index]) * (0.0 if batches[index].get("company") else 1.0)

    if topology.pp.size > 1:
        yield from model.pipeline.steps(batches, forward)
        return
    for index, batch in enumerate(batches):
        loss = forward(index)
        with shards.backward(last=index == len(batches) - 1) if shards else contextlib.nullcontext():
            loss.backward()
        yield float(loss), batch


def in_turn(model, batches, run):
    """(batch, run(batch)) of each, without gradients; in a pipeline several are on their way at once.

    run calls the model once, and returns one or several tensors; nobody else calls it meanwhile.
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
    degrees = Degrees.of(args, world=launch.world)
    if launch.world == 1:
        return Topology(degrees)
    together = company()
    together.agree("the scripts", _versions())
    together.agree("arguments", vars(args))
    together.meet()  # only now: connecting gives up on one that comes late
    return Topology(degrees, launch.rank, (Gloo if _backend() == "gloo" else Nccl)(launch))


def _versions():
    """{file: digest} of the scripts, and the versions of what they run on."""
    here = Path(__file__).resolve().parent
    files = {
        path.name: hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest() for path in sorted(here.glob("*.py"))
    }
    return {**files, "paddle": paddle.__version__, "numpy": np.__version__}


SINGLE = Topology(Degrees())  # one process


# ============================================================ slicing and gathering: from what ranks hold to whole files

# Every tensor of a file is whole, and one rank, its owner, writes it. The others that have parts of it give them to the
# owner by way of the folder that is being written, in a file for each pair of ranks: so a part is sent once, no rank waits
# for another before it has given all, nothing of this is a collective, and so all of it can go on behind training.
# Reading needs none of it: a rank reads the ranges that it holds, see model.StoredTensor and Weight.read.

FILE_BYTES = 5 << 30  # a rank begins another file before one grows larger


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
    Ranks with the same names send a digest of them alone. They have met.
    """
    text = json.dumps(sizes, sort_keys=True)
    digests = topology.exchange(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), met=True)
    lists = [sizes] * len(digests)
    if len(set(digests)) > 1:
        first = digests.index(digests[topology.rank]) == topology.rank
        sent = topology.exchange(sizes if first else None, met=True)
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
    has, laid flat, this rank's elements of the parameter from `first` on; None: none of them. The parts are taken here: as
    they are; or with buffers, a dict that the next may use again, copied into it, and what is written later is the state of now.
    """

    def __init__(self, groups, topology, buffers=None, together=(), metadata=None):
        """The ranks have met. together: groups of which one rank writes all that it holds, for one small file; metadata:
        {group: of its files}."""
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
        return [
            int(r) for r in grid[tuple(slice(None) if n in axes else i for n, i in zip(names, place))].reshape([-1])
        ]

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
