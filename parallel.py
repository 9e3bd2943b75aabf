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
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import namedtuple
from pathlib import Path

import numpy as np

import kernels  # before paddle: it silences what paddle says while it is imported
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from data import UserError
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
            raise UserError(f"sharding: {unknown[0]!r}; possible are stage1, stage2, stage3, and offload beside one of them")
        order = getattr(args, "hybrid_parallel_topo_order", None) or "pp_first"
        if order not in ORDERS:
            raise UserError(f"hybrid_parallel_topo_order: {order!r}; possible are {', '.join(ORDERS)}")
        if asked["sharding"] < 1 and words and world:  # as upstream: all that is left
            left = world // (ways["pp"] * ways["sep"] * ways["context"] * ways["tp"])
            ways["sharding"] = max(1, left)
        stages = [int(word[-1]) for word in words if word != "offload"] or [1]
        degrees = Degrees(pp=ways["pp"], sharding=ways["sharding"], sep=max(ways["sep"], ways["context"]), tp=ways["tp"], ep=ways["ep"],
                          virtual=max(1, getattr(args, "virtual_pp_degree", 1)), stage=max(stages) if ways["sharding"] > 1 else 0,
                          offload="offload" in words, sequence_parallel=getattr(args, "sequence_parallel", False),
                          context=ways["context"] > 1, order=order)  # fmt: skip
        wrong = []
        if ways["sep"] > 1 and ways["context"] > 1:
            wrong.append("sep_parallel_degree and context_parallel_degree exclude each other")
        if world and world % degrees.world:
            factors = " x ".join(f"{NAMES[axis]}_parallel_degree {ways[axis]}" for axis in ("tp", "pp", "sharding", "sep", "context"))
            mend = "set the degrees to 1" if world == 1 else f"give a product that divides {world}"
            wrong.append(f"{factors} = {degrees.world} processes, but this run has {world}; {mend}")
        elif world:
            degrees = dataclasses.replace(degrees, dp=world // degrees.world)
            if ways["ep"] > world:
                wrong.append(f"expert_parallel_degree: {ways['ep']}, but this run has {world} process(es); set it to 1")
        if max(stages) > 1 and ways["pp"] > 1:
            wrong.append(f"sharding stage{max(stages)} and pipeline_parallel_degree {ways['pp']} exclude each other: use stage1")
        if degrees.virtual > 1 and ways["pp"] == 1:
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
        H, K, L, V, experts = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers, config.vocab_size, config.experts
        sep = f"{'context' if self.context else 'sep'}_parallel_degree {self.sep}"
        tp, wrong = f"tensor_parallel_degree {self.tp}", []
        widths = [("the MLP's width", config.intermediate_size)] if experts is None or experts.dense_layers else []
        if experts is not None and self.ep == 1:
            widths += [("an expert's width", experts.width)]
        for what, size in (("attention heads", H), *widths):
            if size % self.tp:
                wrong.append(f"{tp} does not divide {what} ({size:,})")
        if K % self.tp and self.tp % K:
            wrong.append(f"{tp} neither divides the key/value heads ({K}) nor is a multiple")
        if V < self.tp:
            wrong.append(f"{tp} is more than ids of the vocabulary ({V})")
        if L < self.pp * self.virtual:
            times = f" x virtual_pp_degree {self.virtual}" if self.virtual > 1 else ""
            wrong.append(f"pipeline_parallel_degree {self.pp}{times} is more than layers ({L})")
        if self.sep > 1 and not self.context and H // self.tp % self.sep:
            each = f"{tp} leaves a rank of {H}" if self.tp > 1 else "there are"
            wrong.append(f"{sep} does not divide attention heads ({H // self.tp}, which {each})")
        if T is not None and T < self.sep:
            wrong.append(f"{sep} is more than tokens of a sequence ({T})")
        ranks = self.world // self.pp  # of a stage, and experts are spread over them
        if self.ep > 1 and (experts is None or experts.count % self.ep or ranks % self.ep):
            count = experts.count if experts else 0
            wrong.append(f"expert_parallel_degree {self.ep} is for {count} experts on {ranks} ranks of a stage: it must divide both")
        return wrong

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
        self.company = groups and groups.company
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
        return Launch(int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1)), endpoints)


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
            store = core.TCPStore(host, port, True, 1, 900)
            self.store.set(f"group {key}", str(port).encode())
        else:
            store = core.TCPStore(host, int(self.store.get(f"group {key}")), False, 1, 900)
        number = 1000 + len(self.groups)  # of this process's groups; Paddle wants none twice
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


class Company:
    """All processes of a run: they meet, and no one goes on alone when another has ended.

    Rank 0 keeps the store that all talk through. A thread in each tells the others every second that it is alive and
    which collective it waits in, and ends this process when a failure is told there, when rank 0 is gone, or when the
    launcher is. The first failure is the one that all ranks show.
    """

    SILENCE = 45.0  # seconds without a sign of life, after which a rank is given up

    @staticmethod
    @functools.cache  # a process has one
    def of(launch):
        return Company(launch)

    def __init__(self, launch):
        self.launch, self.place, self.meetings, self.agreements = launch, None, 0, 0
        self.store = self._client(launch.rank == 0)
        self.parent = os.getppid() if "PADDLE_LOG_DIR" in os.environ else None  # the launcher, if that is what started us
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
        self.store.add(name, 1)
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
                raise UserError(f"{what}: {key} is {here:.80} here and {there:.80} on rank 0; all processes must have the same")

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
            code, line = 1, self._who_is_missing(str(error))
        elif line is None:
            traceback.print_exception(error)
            line = f"rank {self.launch.rank}: {type(error).__name__}: {error} (its traceback is in its own log)"
        else:
            line = f"rank {self.launch.rank}: {line}"
        try:
            self.end(code, line)
        except (ValueError, RuntimeError, OSError):  # the store is gone
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
            with contextlib.suppress(ValueError, RuntimeError, OSError):
                told, end = store.add("told", 1), time.monotonic() + 8.0
                while told < self.launch.world and time.monotonic() < end:
                    time.sleep(0.05)
                    told = store.add("told", 0)
        os._exit(code)  # threads may be inside of a collective that will never end

    def _watch(self):
        try:
            store = self._client()
            self._keep_watch(store)
        except (ValueError, RuntimeError, OSError):
            if not self.done.is_set():
                self._exit(1, "rank 0 has vanished: it was killed, or ran out of memory")

    def _keep_watch(self, store):
        rank, world, beat, heard = self.launch.rank, self.launch.world, 0, {}
        while not self.done.wait(0.25):
            if self.parent is not None and os.getppid() != self.parent:
                self._exit(1, "the launcher is gone")
            if store.add("failures", 0):
                self._exit(*json.loads(store.get("failure")), store)
            beat += 1
            if beat % 4 == 1:
                store.set(f"rank {rank}", json.dumps([beat, self.place and self.place.name]).encode())
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
            return {r: json.loads(self.store.get(f"rank {r}")) for r in range(self.launch.world) if self.store.add(f"rank {r} is there", 0)}

        before = signs()
        time.sleep(3.0)  # every rank gives three
        after = signs()
        silent = [r for r in before if before[r][0] == after[r][0]]
        elsewhere = [r for r in ranks if r not in silent and r in after and after[r][1] is None and r != self.launch.rank]
        if silent and closed:
            return f"rank {silent[0]} has vanished: it was killed, or ran out of memory"
        if silent:
            return f"rank {silent[0]} gives no sign of life; others waited 30 s for it in a collective ({place})"
        if elsewhere:
            return f"rank {elsewhere[0]} hangs or is far behind: others waited 30 s for it in a collective ({place})"
        waits = ", ".join(f"rank {r} in {where}" for r, (_, where) in after.items())
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
        if wrong := topology.degrees.misfits(model.config):
            raise UserError("; ".join(wrong))
        if topology.groups is not None:
            topology.groups.company.agree("the model", dataclasses.asdict(model.config))
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
    files = {path.name: hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest() for path in sorted(here.glob("*.py"))}
    return {**files, "paddle": paddle.__version__, "numpy": np.__version__}


SINGLE = Topology(Degrees())  # one process
