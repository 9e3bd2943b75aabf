"""4D parallelism: the grid of processes, the order in which a model is sharded, and the steps of all ranks.

    python -m paddle.distributed.launch --nproc_per_node 8 pretrain.py CONFIG --tensor_parallel_degree 2 …

Each process has coordinates on the grid [dp, pp, sharding, sep, tp], tp fastest (upstream's pp_first). 8 processes with
tensor_parallel_degree 2, pipeline_parallel_degree 2 and, from what is left, dp 2:

                      pp 0 (layers 0 … L/2-1)         pp 1 (layers L/2 … L-1)
                      tp 0            tp 1            tp 0            tp 1
        dp 0          rank 0          rank 1          rank 2          rank 3        one copy of the model: 0, 1, 2, 3
        dp 1          rank 4          rank 5          rank 6          rank 7        another copy, other batches

Ranks that differ only in one coordinate form that axis's process group: tp {0,1} {2,3} {4,5} {6,7}; pp {0,2} {1,3}
{4,6} {5,7}; dp {0,4} {1,5} {2,6} {3,7}. What they send: tp: partial sums of each attention and MLP. pp: hidden states
to the next stage, gradients back. sep: keys and values (context_parallel_degree: around a ring; sep_parallel_degree:
tokens for heads). sharding: gradients to be reduced, weights to be gathered. dp: gradients. Experts are sharded over
expert_parallel_degree consecutive ranks of (dp, sharding, sep); tokens go there and back by all-to-all.

Scripts do not see it: a parallel model takes whole batches and returns the losses of all their tokens, on every rank
that works on the same batch. With one process nothing is sent. When one process fails, all exit with its message
(Watchdog).

    topology = init_parallel(args)                            # coordinates of this process; groups are connected
    model = from_pretrained(path, topology)                   # this rank's part of the model shards =
    ZeroOptimizer(model, weights, topology)          # its part of gradients and optimizer (distributed/sharding.py)
    for loss, batch in forward_backward(model, batches, inputs, loss_of, seed): … norm = shards.reduce_gradients();
    optimizer.step(…); shards.gather_weights()
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import kernels

import numpy as np
import paddle

from adapters import LoRALinear, base_folders, load_adapter, merge, round_as_trained
from distributed.collectives import Axis, Gloo, Nccl, _backend, _ScaleGradient, make_expert_axes
from distributed.context import (
    TokenLayout,
    check_context,
    gather_tokens,
    ring_attention,
    scatter_tokens,
    shard_context,
    token_layout,
    ulysses_attention,
)
from distributed.expert import apply_expert_parallel, is_expert_sharded
from distributed.pipeline import apply_pipeline_parallel, check_pipeline, tied_axis
from distributed.sharding import run_unit
from distributed.tensor import (
    AllReduceMax,
    RowParallelLoRALinear,
    apply_tensor_parallel,
    check_tensor,
    copy_to_tp_region,
    gather_from_sequence_region,
    gather_logits,
    local_heads,
    reduce_from_tp_region,
    scatter_to_sequence_region,
    shard_parameter,
    vocab_shard,
)
from distributed.watchdog import Launch, current_watchdog
from families import ModelConfig
from formats.files import UserError
from formats.weights import load_weights, read_config
from model import CausalLM, LocalComm, block_linears, build, kernel_attention, linear_row
from modules.low_bit import LowBit, describe, round_base

# ============================================================================================ the grid

AXES = ("dp", "pp", "sharding", "sep", "tp")  # slowest first


ORDERS = {"pp_first": AXES, "sharding_first": ("dp", "sharding", "pp", "sep", "tp")}


# axis -> NAME in upstream's NAME_parallel_degree; context uses the sep axis.
NAMES = {"tp": "tensor", "pp": "pipeline", "sharding": "sharding", "sep": "sep", "context": "context", "ep": "expert"}


SHARDINGS = ("stage1", "stage2", "stage3", "offload")


@dataclasses.dataclass(frozen=True)
class Degrees:
    """The number of ranks along each axis of a run, and how they shard."""

    dp: int = 1
    pp: int = 1
    sharding: int = 1
    sep: int = 1
    tp: int = 1
    ep: int = 1  # expert groups reuse the data-parallel ranks, so ep is not a factor of the world size
    virtual: int = 1  # pipeline stages of a rank
    stage: int = 0  # of ZeRO; 0: none, 1: moments and master weights, 2: gradients too, 3: weights too
    offload: bool = False  # moments and master weights are in the host's memory
    sequence_parallel: bool = False  # between attention and MLP a rank of tp keeps only T/tp tokens
    context: bool = False  # the sep axis is a ring (else Ulysses attention)
    order: str = "pp_first"  # of the axes; a key of ORDERS

    @staticmethod
    def of(args, config: ModelConfig | None = None, T: int | None = None, world: int | None = None) -> "Degrees":
        """The degrees that the arguments ask for; UserError with everything that does not fit, in one line.

        config, T: the model and its longest sequence, where they are known. world: the number of processes, of which
        dp is what the other degrees leave; None: a dry run with as many as they ask for.
        """
        requested = {axis: getattr(args, f"{name}_parallel_degree") for axis, name in NAMES.items()}
        degree = {axis: max(1, count) for axis, count in requested.items()}
        stages, offload = _sharding_words(getattr(args, "sharding", None) or "")
        order = getattr(args, "hybrid_parallel_topo_order", None) or "pp_first"
        if order not in ORDERS:
            raise UserError(f"hybrid_parallel_topo_order: {order!r}; possible are {', '.join(ORDERS)}")
        if requested["sharding"] < 1 and (stages or offload) and world:  # as upstream: all ranks that are left
            degree["sharding"] = max(1, world // (degree["pp"] * degree["sep"] * degree["context"] * degree["tp"]))
        stage = max(stages, default=1)
        degrees = Degrees(
            pp=degree["pp"],
            sharding=degree["sharding"],
            sep=max(degree["sep"], degree["context"]),
            tp=degree["tp"],
            ep=degree["ep"],
            virtual=max(1, getattr(args, "virtual_pp_degree", 1)),
            stage=stage if degree["sharding"] > 1 else 0,
            offload=offload,
            sequence_parallel=getattr(args, "sequence_parallel", False),
            context=degree["context"] > 1,
            order=order,
        )
        wrong = _contradictions(degrees, degree, stage, world)
        if not world and requested["sharding"] < 1 and stages and not offload:
            wrong.append(
                f"sharding stage{stage} without sharding_parallel_degree takes all processes that are left; give the "
                "degree, since a dry run has no processes"
            )
        if not world:  # as many data-parallel copies as the experts need
            dp = degree["ep"] // math.gcd(degree["ep"], degree["sharding"] * degrees.sep)
            degrees = dataclasses.replace(degrees, dp=dp)
        elif world % degrees.world == 0:
            degrees = dataclasses.replace(degrees, dp=world // degrees.world)
        if degrees.virtual > 1 and degree["pp"] == 1 and config is None:  # with a config check_pipeline() says it
            wrong.append(f"virtual_pp_degree {degrees.virtual} needs a pipeline_parallel_degree above 1")
        if config is not None:
            wrong += degrees.validate(config, T)
        if wrong:
            raise UserError("; ".join(wrong))
        return degrees

    def validate(self, config: ModelConfig, T: int | None = None) -> list[str]:
        """Why a model, or its sequences of T tokens, cannot be sharded so: the key, what it is, how many there are."""
        return check_tensor(config, self) + check_pipeline(config, self) + check_context(config, self, T)

    def __str__(self):
        names = {"dp": "data", **NAMES, "sep": "context" if self.context else "sep"}
        order = ("tp", "pp", "sharding", "sep", "dp", "ep")
        parts = [f"{names[axis]} {getattr(self, axis)}" for axis in order if getattr(self, axis) > 1]
        if self.virtual > 1:
            parts.insert(1 + (self.tp > 1), f"virtual {self.virtual}")
        if self.stage:
            parts.append(f"stage {self.stage}{' with offload' * self.offload}")
        return ", ".join(parts) or "one process"

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.sharding * self.sep * self.tp

    def tp_shards(self, name: str, config: ModelConfig) -> float:
        """Number of shards of this parameter or linear (our name) under TP and EP: whole / the largest shard."""
        row = linear_row(name)
        units = row.units if row is not None else None
        H, K, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
        if units in ("query heads", "key heads", "query and key heads"):
            queries, keys = _most_heads(H, K, self.tp)  # keys are repeated where there are fewer than ranks
            if units == "query and key heads":
                return (H + 2 * K) / (queries + 2 * keys)
            is_row_bias = row.parallel == "row" and name.endswith(".bias")
            return 1 if is_row_bias else H / queries if units == "query heads" else K / keys
        if units == "ids":
            return V / -(-V // self.tp)
        is_sharded = units is not None and not (row.parallel == "row" and name.endswith(".bias"))
        shards = self.tp if is_sharded else 1
        return min(shards * self.ep, self.world // self.pp) if ".experts." in name else shards

    def sharding_shards(self, name: str, config: ModelConfig) -> float:
        """Number of shards that ZeRO makes of what tp_shards() leaves: of experts, one for each rank with the same."""
        if ".experts." not in name or self.ep == 1 or self.sharding == 1:
            return self.sharding
        return max(1, self.dp * self.sharding * self.sep // self.ep)


@functools.cache
def _most_heads(H, K, tp):
    """(query heads, key heads) of the rank of tp that has most."""
    config = types.SimpleNamespace(num_attention_heads=H, num_key_value_heads=K)
    ranks = [local_heads(config, tp, rank) for rank in range(tp)]
    return tuple(max(heads[i][1] - heads[i][0] for heads in ranks) for i in (0, 1))


def _sharding_words(text):
    """([stages], offload) of the argument `sharding`."""
    words = re.findall(r"[^\s,]+", text)
    if unknown := [word for word in words if word not in SHARDINGS]:
        raise UserError(
            f"sharding: {unknown[0]!r}; possible are stage1, stage2, stage3, and offload beside one of them"
        )
    return [int(word[-1]) for word in words if word != "offload"], "offload" in words


def _contradictions(degrees, degree, stage, world):
    """Lines about arguments that do not fit together, whatever the model."""
    wrong = []
    if degree["sep"] > 1 and degree["context"] > 1:
        wrong.append("sep_parallel_degree and context_parallel_degree exclude each other")
    if world and world % degrees.world:
        axes = ("tp", "pp", "sharding", "sep", "context")
        factors = " x ".join(f"{NAMES[axis]}_parallel_degree {degree[axis]}" for axis in axes)
        advice = "set the degrees to 1" if world == 1 else f"give a product that divides {world}"
        wrong.append(f"{factors} = {degrees.world} processes, but this run has {world}; {advice}")
    elif world and degree["ep"] > world:
        wrong.append(f"expert_parallel_degree: {degree['ep']}, but this run has {world} process(es); set it to 1")
    if stage > 1 and degree["pp"] > 1:
        wrong.append(
            f"sharding stage{stage} and pipeline_parallel_degree {degree['pp']} exclude each other: use stage1"
        )
    if degrees.sequence_parallel and degree["tp"] == 1 and world != 1:
        wrong.append("sequence_parallel needs a tensor_parallel_degree above 1")
    return wrong


class Topology:
    """The coordinates of one process on the grid, and an Axis each for dp, pp, sharding, sep and tp."""

    def __init__(self, degrees: Degrees, rank: int = 0, groups=None):
        """groups: distributed.collectives.Groups, which connect ranks; None: only sizes, nothing can be sent."""
        self.degrees, self.rank, self.groups = degrees, rank, groups
        order = ORDERS[degrees.order]
        sizes = [getattr(degrees, name) for name in order]
        self.grid = np.arange(degrees.world).reshape(sizes)
        self.coords = dict(zip(order, map(int, np.argwhere(self.grid == rank)[0])))
        for dim, name in enumerate(order):
            lines = np.moveaxis(self.grid, dim, -1).reshape([-1, sizes[dim]])
            line = next(line for line in lines if rank in line)
            setattr(self, name, Axis(name, [int(r) for r in line], rank, groups))
        self.alone = Axis("alone", [rank], rank)
        self.tp.sequence_parallel = degrees.sequence_parallel and self.tp.size > 1
        self.ep, self.expert_dp = make_expert_axes(self.grid, order, degrees.ep, rank, groups)

    @property
    def axes(self) -> list[Axis]:
        return [getattr(self, name) for name in AXES] + ([self.ep, self.expert_dp] if self.ep.size > 1 else [])

    @property
    def data_rank(self) -> int:
        """This rank's index among the data_size data-parallel ranks."""
        return self.dp.rank * self.sharding.size + self.sharding.rank

    @property
    def data_size(self) -> int:
        return self.dp.size * self.sharding.size

    @property
    def model_replica(self) -> tuple[int, int]:
        """(index, count) of model replicas that can run independently; (0, 1) under ZeRO-3 or expert parallelism."""
        coupled = self.degrees.stage == 3 or self.ep.size > 1
        return (0, 1) if coupled else (self.data_rank, self.data_size)

    def barrier(self) -> None:
        """Wait for all processes, without a time limit."""
        if self.groups is not None:
            self.groups.barrier()

    def all_gather_object(self, value, kind: str = "all", channel: str = "main"):
        """The JSON values of all processes, by rank; kind, channel: see Watchdog.gather."""
        if self.groups is None:
            return value if kind == "first" else [value]
        return self.groups.all_gather_object(value, kind, channel)

    def moved(self) -> None:
        """Tell the watchdog that this rank makes progress."""
        if self.groups is not None:
            self.groups.watchdog.moved()

    def all_reduce_sum(self, numbers, stages: bool = False):
        """Sum over the data-parallel ranks of a number, a tuple or a dict of numbers; stages: also over pp."""
        axes = [axis for axis in (self.sharding, self.dp, *([self.pp] if stages else [])) if axis.size > 1]
        if not axes or numbers == {}:
            return numbers
        values = list(numbers.values()) if isinstance(numbers, dict) else numbers
        values = list(values) if isinstance(values, (tuple, list)) else [values]
        total = paddle.to_tensor(np.array(values, np.float64).reshape([-1]))
        for axis in axes:
            axis.all_reduce(total)
        sums = [type(old)(new) for old, new in zip(values, total.numpy().tolist())]
        if isinstance(numbers, dict):
            return dict(zip(numbers, sums))
        return tuple(sums) if isinstance(numbers, tuple) else sums[0]


# ==================================================================================================== where ranks talk


class ParallelComm(LocalComm):
    """LocalComm for the ranks of a topology; see there what each method is for."""

    def __init__(self, topology, config):
        self.topology, self.config = topology, config
        self.tp, self.sep, self.ring = topology.tp, topology.sep, topology.degrees.context
        self.pipeline = None  # set by parallelize()
        self.shards = None  # a ZeroOptimizer of stage 3, which sets itself

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline is None or self.pipeline.is_last_rank

    # --------------------------------------------------------------------------- tokens: sep and sequence parallelism

    def token_layout(self, T, is_cached) -> TokenLayout | None:
        """Tokens are not sharded over sep where a cache holds keys: it has all of them, on every rank of sep."""
        if self.sep.size > 1 and not is_cached:
            return token_layout(T, self.sep, self.ring)
        return TokenLayout(T) if self.tp.sequence_parallel else None

    def shard_context(self, context):
        return shard_context(context, self.sep, self.ring)

    def local_tokens(self, x, layout, tp=True, fill=0) -> paddle.Tensor:
        x = scatter_tokens(x, layout, fill)
        return scatter_to_sequence_region(x, self.tp) if tp and layout is not None else x

    def gather_tokens(self, x, layout, tp=False, sum_gradients=False) -> paddle.Tensor:
        if tp and self.tp.sequence_parallel and layout is not None:
            x = gather_from_sequence_region(x, layout, self.tp, sum_gradients=False)
        return gather_tokens(x, layout, self.sep, sum_gradients)

    def attention(self, q, k, v, past_k, past_v, mask_rows, layout, **options) -> paddle.Tensor:
        if layout is None or layout.token_indices is None:
            return kernel_attention(q, k, v, past_k, past_v, mask_rows, **options)
        if self.ring:
            return ring_attention(q, k, v, past_k, past_v, mask_rows, self.sep, **options)
        return ulysses_attention(q, k, v, past_k, past_v, mask_rows, layout, self.sep, **options)

    # -------------------------------------------------------------------- heads, channels and ids: tensor parallelism

    def copy_to_tp_region(self, x, layout) -> paddle.Tensor:
        return copy_to_tp_region(x, layout, self.tp)

    def reduce_from_tp_region(self, x) -> paddle.Tensor:
        return reduce_from_tp_region(x, self.tp)

    def replicated_over_tp(self, x) -> paddle.Tensor:
        return x if self.tp.size == 1 else _ScaleGradient.apply(x, 1 / self.tp.size)

    def cross_entropy(self, x, weight, labels, **options):
        if self.tp.size > 1:
            options["vocabulary"] = vocab_shard(self.config.vocab_size, self.tp)
        return kernels.linear_cross_entropy(x, weight, labels, **options)

    def max_over_vocab(self, x) -> paddle.Tensor:
        return x if self.tp.size == 1 else AllReduceMax.apply(x, self.tp)

    def gather_logits(self, logits) -> paddle.Tensor:
        return gather_logits(logits, self.config.vocab_size, self.tp)

    # ---------------------------------------------------------------------------------------- layers: ZeRO-3 and stages

    def run_unit(self, name, function, *args):
        return function(*args) if self.shards is None else run_unit(self.shards, name, function, args)

    def run_stages(self, model, input_ids, context, cache) -> tuple:
        if self.pipeline is None:
            return model.run_all(input_ids, context, cache)
        return self.pipeline.run_stages(model, input_ids, context, cache)

    def broadcast_from_last_stage(self, outputs):
        return outputs if self.pipeline is None else self.pipeline.broadcast_from_last_stage(outputs)

    def num_parameters(self, model, trained) -> int:
        """Of all ranks of tp, ep and pp, each parameter counted once. Ranks along pp call it together."""
        topology, total = self.topology, 0
        for path, parameter in model.named_parameters():
            replicas = tied_axis(model, path)
            if trained and parameter.stop_gradient or replicas is not None and replicas.rank > 0:
                continue
            spec = getattr(parameter, "shard_spec", None)
            size = math.prod(parameter.shape if spec is None else spec.shape)
            total += size * topology.ep.size if is_expert_sharded(path, topology) else size
        return int(topology.pp.all_reduce(paddle.to_tensor(total, "int64")))


# ==================================================================================== a model, and a step of it


def parallelize(model: CausalLM, topology: Topology) -> CausalLM:
    """Shard a model, as build() gives it, in place; returns it. Order: pipeline, tensor, experts."""
    model.topology, model.shards = topology, None
    if topology.degrees.world > 1:
        if wrong := topology.degrees.validate(model.config):
            raise UserError("; ".join(wrong))
        if topology.groups is not None:
            topology.groups.watchdog.check_equal_on_all_ranks("the model", dataclasses.asdict(model.config))
        model.comm = ParallelComm(topology, model.config)
        model.comm.pipeline = model.pipeline = apply_pipeline_parallel(model, topology)
        apply_tensor_parallel(model, topology.tp)
        apply_expert_parallel(model, topology)
    return model


def shard_adapters(model: CausalLM, topology: Topology) -> None:
    """Shard LoRA and a prefix that were put on a model after parallelize()."""
    tp, sep = topology.tp, topology.sep
    linears = [entry for entry in block_linears(model).values() if isinstance(entry[2], LoRALinear)]
    for parent, attribute, layer in linears if topology.degrees.world > 1 else ():
        if sep.size > 1:
            layer.key += f" sep {sep.rank}"  # each rank draws the dropout mask of its own tokens
        spec = getattr(layer.base, "shard_spec", None)
        if spec is None:
            continue
        if spec.dim == 1:
            layer.lora_B = shard_parameter(layer, layer.lora_B, spec.of(1, layer.lora_B.shape))
        else:
            layer.lora_A = shard_parameter(layer, layer.lora_A, spec.of(0, layer.lora_A.shape))
            setattr(parent, attribute, RowParallelLoRALinear.from_lora(layer))
    if model.prefix is not None and tp.size > 1:
        model.prefix.local_heads = slice(*local_heads(model.config, tp.size, tp.rank)[1])


def from_pretrained(
    path: str | Path, topology: Topology, dtype: str = "float32", low_bit: LowBit | None = None
) -> CausalLM:
    """adapters.from_pretrained() of this rank's part of the model: nothing else is read or takes memory.

    low_bit: round the linears of the blocks when they are read, a frozen base for LoRA.
    """
    *adapters, base = base_folders(path)
    model = parallelize(build(read_config(base), dtype), topology)
    if low_bit is not None and not adapters:
        round_base(block_linears(model), low_bit)
    load_weights(model, base)
    for adapter in reversed(adapters):
        round_as_trained(model, adapter)
        load_adapter(model, adapter)
        shard_adapters(model, topology)
        merge(model)
    if low_bit is not None:
        if adapters:
            round_base(block_linears(model), low_bit)
        model.base_quantization = dataclasses.asdict(low_bit)
        print(describe(model))
    model.eval()
    return model


def forward_backward(
    model: CausalLM, batches: list, inputs: Callable, loss_of: Callable, seed: Callable
) -> Iterator[tuple[float, dict]]:
    """Forward and backward of each of this rank's micro-batches of a step; yields (loss, batch) after each.

    inputs(batch): the arguments of model.forward(). loss_of(outputs, batch): the micro-batch's part of the step's
    loss, a scalar, from what forward() returns; in a pipeline only the last stage calls it, and yields a loss other
    than 0.0. seed(i): seeds the randomness of the step's i-th micro-batch.
    """
    topology, shards = model.topology, model.shards

    def seed_of_rank(index):
        seed(index * topology.data_size + topology.data_rank)

    def counted_loss(outputs, batch):
        return loss_of(outputs, batch) * (0.0 if batch.get("is_dummy") else 1.0)

    if topology.pp.size > 1:
        yield from model.pipeline.train_step(model, batches, inputs, counted_loss, seed_of_rank)
        return
    for index, batch in enumerate(batches):
        seed_of_rank(index)
        loss = counted_loss(model(**inputs(batch)), batch)
        with shards.backward(last=index == len(batches) - 1) if shards else contextlib.nullcontext():
            loss.backward()
        yield float(loss), batch


def pipelined_map(model: CausalLM, batches: Iterable, inputs: Callable, outputs_of: Callable) -> Iterator[tuple]:
    """(batch, outputs_of(outputs, batch)) of each batch, without gradients; a pipeline works on several at once.

    inputs(batch): the arguments of model.forward(); outputs: what it returns. outputs_of() returns one or several
    tensors, and no other call of the model may come between.
    """
    pipeline = getattr(model, "pipeline", None)
    if pipeline is not None:
        yield from pipeline.map(model, batches, inputs, outputs_of)
        return
    for batch in batches:
        yield batch, outputs_of(model(**inputs(batch)), batch)


def init_parallel(args: object) -> Topology:
    """The Topology of this process, from the arguments and Paddle's launcher; groups are connected."""
    launch = Launch.of_environment()
    degrees = Degrees.of(args, world=launch.world)
    if launch.world == 1:
        return Topology(degrees)
    watchdog = current_watchdog()
    watchdog.limit = getattr(args, "ddp_timeout", watchdog.limit)
    watchdog.check_equal_on_all_ranks("the scripts", _versions())
    watchdog.check_equal_on_all_ranks("arguments", vars(args))
    watchdog.barrier()  # before connecting, which has a time limit
    return Topology(degrees, launch.rank, (Gloo if _backend() == "gloo" else Nccl)(launch))


def _versions():
    """{file: digest} of the project's code, and the versions of its libraries."""
    here = Path(__file__).resolve().parent
    rooms = [
        here.glob("*.py"),
        *((here / room).rglob("*.*") for room in ("formats", "distributed", "kernels", "serving")),
    ]
    paths = sorted(path for room in rooms for path in room if path.suffix in (".py", ".cc", ".h", ".cu", ".cuh"))
    files = {
        path.relative_to(here).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
        for path in paths
    }
    return {**files, "paddle": paddle.__version__, "numpy": np.__version__}


SINGLE = Topology(Degrees())  # one process
