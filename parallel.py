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
that shares a batch. With one process nothing here does anything. When one process fails, all end with its message (Watchdog).

    topology = parallel.init_parallel(args)                           # which place this process has; groups are connected
    model = parallel.from_pretrained(path, topology)          # its part of the model
    shards = parallel.ZeroOptimizer(model, weights, topology)        # its part of gradients and of the optimizer
    for loss, batch in parallel.forward_backward(model, batches, batch_loss, seeds): …
    norm = shards.reduce_gradients(); optimizer.step(…); shards.gather_weights()
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import re
from collections import deque
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F

from adapters import base_folders, load_adapter, lora_layers, merge
from distributed.collectives import Axis, Gloo, Nccl, _backend, _together, enter, kept, make_expert_axes, mix_in
from distributed.context import (
    _RING_WITH_PREFIX,
    apply_context_parallel,
    check_context,
    gather_tokens,
    scatter_tokens,
    spread,
)
from distributed.expert import ExpertParallelMoE, apply_expert_parallel, is_expert_sharded
from distributed.pipeline import PipelineCausalLM, apply_pipeline_parallel, check_pipeline, tied_axis
from distributed.tensor import (
    COLUMN_PARALLEL,
    ROW_PARALLEL,
    VOCAB_PARALLEL,
    RowParallelLinear,
    TensorParallelPrefix,
    _part_of,
    apply_tensor_parallel,
    check_tensor,
    local_heads,
)
from distributed.watchdog import Launch, current_watchdog
from families import ModelConfig
from formats.files import UserError
from formats.weights import load_weights
from model import Linear, QuantLinear, build

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
            wrong += degrees.validate(config, T)
        if wrong:
            raise UserError("; ".join(wrong))
        return degrees

    def validate(self, config, T=None):
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
        if layer in VOCAB_PARALLEL:
            return V / -(-V // self.tp)
        cut = layer in COLUMN_PARALLEL or layer in ROW_PARALLEL and not name.endswith(".bias")
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
        self.ep, self.copies = make_expert_axes(self.grid, order, degrees.ep, rank, groups)

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
    def model_replica(self):
        """(which copy of the model this rank is of, how many there are) that can work without the others: none in stage 3,
        whose weights come from all of them, nor where experts are elsewhere."""
        together = self.degrees.stage == 3 or self.ep.size > 1
        return (0, 1) if together else (self.data_rank, self.data_size)

    def barrier(self):
        """Wait for all processes, however long they take."""
        if self.groups is not None:
            self.groups.barrier()

    def all_gather_object(self, value, met=False):
        """[what each process calls this with]: JSON values. met: they come within 30 seconds of each other, after barrier(),
        which then is not waited for."""
        return [value] if self.groups is None else self.groups.all_gather_object(value, met)

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


def shard_adapters(model, topology):
    """The same for LoRA and prefix, put on whole after apply_tensor_parallel()."""
    tp = topology.tp
    paths = {id(layer): path for path, layer in model.named_sublayers()}
    for layer in model.sublayers():
        if isinstance(layer, ExpertParallelMoE):
            layer.dropout = bool(getattr(model, "lora_config", {}).get("lora_dropout"))
    for layer in lora_layers(model).values() if topology.degrees.world > 1 else ():
        cut = getattr(layer.base, "shard_spec", None)
        if layer.dropout:
            mix_in(layer, ShardedDropout, topology=topology, expert=".experts." in paths[id(layer)])
        if cut is None:
            continue
        if cut.dim == 1:
            layer.lora_B = _part_of(layer, layer.lora_B, cut.of(1, layer.lora_B.shape))
        else:
            layer.lora_A = _part_of(layer, layer.lora_A, cut.of(0, layer.lora_A.shape))
            if isinstance(layer.base, RowParallelLinear):
                mix_in(layer, RowParallelLinear, tp=tp)
    if model.prefix is not None and model.distances_count and topology.sep.size > 1 and topology.degrees.context:
        raise UserError(_RING_WITH_PREFIX)
    if model.prefix is not None and tp.size > 1:
        mix_in(model.prefix, TensorParallelPrefix, key_heads=local_heads(model.config, tp.size, tp.rank)[1])


class ShardedDropout:
    """A LoRALinear of which this process has some inputs, or tokens: its part of the mask that one process would draw."""

    def dropped(self, x):
        if not self.training:
            return x
        mask, cut = self._mask(x.shape[:-1]), getattr(self.base, "shard_spec", None)
        if cut is not None and cut.dim == 0:
            mask = paddle.concat([mask[..., slice(*r)] for r in cut.ranges], axis=-1)
        return x * mask.astype(x.dtype)

    def _mask(self, tokens):
        sep = self.topology.sep
        if self.expert and self.topology.ep.pieces is not None:
            return paddle.concat([self._of_piece(piece) for piece in self.topology.ep.pieces if piece.count])
        if not self.expert and sep.places is not None:
            return scatter_tokens(self._drawn([tokens[0], sep.whole]), sep)
        return self._drawn(tokens)

    def _of_piece(self, piece):
        if piece.places is None:
            return self._drawn([piece.count], piece.number)
        mask = self._drawn([piece.whole], piece.number)
        return paddle.index_select(mask, paddle.to_tensor(piece.places.clip(0)))  # tokens that fill rows up: anything

    def _drawn(self, tokens, number=None):
        with self.draws.under(self.key, number):
            return F.dropout(paddle.ones([*tokens, self.base.n_in]), self.dropout)


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
        x = gather_tokens(x, sep)
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
        return kept(scatter_tokens(x, self.topology.sep), self.topology.tp)

    def num_parameters(self, trained=False):
        """Of all ranks of tp, ep and pp, each counted once. Ranks along pp call it together."""
        topology, total = self.topology, 0
        for path, parameter in self.named_parameters():
            cut, copied = getattr(parameter, "shard_spec", None), tied_axis(self, path)
            if trained and parameter.stop_gradient or copied is not None and copied.rank > 0:
                continue
            size = math.prod(parameter.shape if cut is None else cut.shape)
            total += size * topology.ep.size if is_expert_sharded(path, topology) else size
        return int(topology.pp.all_reduce(paddle.to_tensor(total, "int64")))

    def flops_per_token(self, T):
        experts, ep = self.config.experts, self.topology.ep
        here = sum(
            layer.n_in * layer.n_out
            for path, layer in self.named_sublayers()
            if isinstance(layer, (Linear, QuantLinear)) and is_expert_sharded(path, self.topology)
        )
        return super().flops_per_token(T) + (
            6.0 * here * (ep.size - 1) * experts.top_k / experts.count if here else 0.0
        )


def parallelize(model, topology):
    """Make of a model, as build() gives it, this process's part of it, in place; returns it. Order: tp, then the loop of forward()."""
    model.topology, model.shards = topology, None
    if topology.degrees.world > 1:
        if wrong := topology.degrees.validate(model.config):
            raise UserError("; ".join(wrong))
        if topology.groups is not None:
            topology.groups.watchdog.check_equal_on_all_ranks("the model", dataclasses.asdict(model.config))
        topology.tp.sequence = topology.degrees.sequence_parallel
        apply_pipeline_parallel(model, topology)
        apply_tensor_parallel(model, topology.tp)
        apply_context_parallel(model, topology)
        apply_expert_parallel(model, topology)
        mix_in(model, ParallelCausalLM)
        if topology.pp.size > 1:
            mix_in(model, PipelineCausalLM)
    return model


def from_pretrained(path, topology, dtype="float32"):
    """model.from_pretrained() of this process's part of the model: nothing else of it is read, or takes memory."""
    *adapters, base = base_folders(path)
    model = parallelize(build(ModelConfig.from_json(base), dtype), topology)
    load_weights(model, base)
    for adapter in reversed(adapters):
        load_adapter(model, adapter)
        shard_adapters(model, topology)
        merge(model)
    model.eval()
    return model


def forward_backward(model, batches, batch_loss, seed):
    """Forward and backward of each of this rank's batches of a step; yields (loss, batch) after each.

    batch_loss(batch): its part of the step's loss; in a pipeline it ends where it calls the model, but for the last stage,
    and the loss is 0.0 where it is not known. seed(i): seeds the randomness of the i-th.
    """
    topology, shards = model.topology, model.shards

    def forward(index):
        seed(index * topology.data_size + topology.data_rank)
        return batch_loss(batches[index]) * (0.0 if batches[index].get("is_dummy") else 1.0)

    if topology.pp.size > 1:
        yield from model.pipeline.steps(batches, forward)
        return
    for index, batch in enumerate(batches):
        loss = forward(index)
        with shards.backward(last=index == len(batches) - 1) if shards else contextlib.nullcontext():
            loss.backward()
        yield float(loss), batch


def pipelined_map(model, batches, run):
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


def init_parallel(args):
    """The Topology of this process, from the arguments and what Paddle's launcher says; groups are connected."""
    launch = Launch.of_environment()
    degrees = Degrees.of(args, world=launch.world)
    if launch.world == 1:
        return Topology(degrees)
    together = current_watchdog()
    together.check_equal_on_all_ranks("the scripts", _versions())
    together.check_equal_on_all_ranks("arguments", vars(args))
    together.barrier()  # only now: connecting gives up on one that comes late
    return Topology(degrees, launch.rank, (Gloo if _backend() == "gloo" else Nccl)(launch))


def _versions():
    """{file: digest} of the project's code, and the versions of what it runs on."""
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
