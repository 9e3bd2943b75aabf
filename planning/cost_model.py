"""What a step costs in time: products, memory traffic, collectives, and the pipeline's own timetable.

    machine = Machine.of_gpus(990e12, "nvlink8+400Gb")                  # or Machine.load("probe.json"), measured
    cost = CostModel(memory, machine).step(degrees, batch_size=1, accumulation=16, granularity=None)

Formulas and where they come from:

    product (M, K) x (K, N)    max(2 M K N / (peak · efficiency), bytes / bandwidth) + launch  (roofline: Williams 2009)
    attention, causal          4 · T/2 · H · Dh FLOPs a token forward, 2.5 times that backward  (arXiv 2307.08691)
    backward of a linear       2 products; 1 if its weight is frozen                            (arXiv 2204.02311, B)
    other ops                  kept activations written and read: 2 passes forward, 4 backward, over the bandwidth
    recompute                  full: a block's forward again; core_attn: attention; full_attn: with its linears
    all-reduce of S bytes      2 ⌈log2 n⌉ α + 2 (n-1)/n S/β            (alpha-beta: Thakur et al., IJHPCA 2005)
    all-gather, reduce-scatter   Σ α of a ring + (n-1)/n S/β           (NCCL has trees for all-reduce only)
    all-to-all                   (n-1) α +      (n-1)/n S/β
    message to a neighbor        α + S/β
    tensor parallelism         2 all-reduces a block forward, 2 backward (arXiv 1909.08053); with sequence parallelism
                               as many pairs of all-gather and reduce-scatter (arXiv 2205.05198)
    sep                        Ulysses: all-to-all of q, k, v and of the output (arXiv 2309.14509); a ring: sep - 1
                               shifts of k and v, twice as much backward (arXiv 2310.01889)
    experts                    2 all-to-alls a sparse block forward, 2 backward, of top_k copies of each token
    sharding                   stage 1: a reduce-scatter and an all-gather a step; stage 2: a reduce-scatter each
                               micro-batch; stage 3: 2 all-gathers and a reduce-scatter each (arXiv 1910.02054)
    pipeline                   simulate.play() of distributed.pipeline.pipeline_schedule(); to rank many topologies
                               (m v + p - 1) / (m v) of the slowest rank's work (arXiv 2104.04473, 2.2)
    AdamW                      28 bytes an element on the rank over the bandwidth

α, β of a group are those of the links its ranks cross, by the product's own grid of ranks: inside a node, or the
network times the ranks that the group has in a node. What hides behind computing is what the product overlaps: with
NCCL the reductions of gradients during backward, without pipeline, sep or expert parallelism (distributed/sharding.py).
"""

import collections
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

from alignment.preference_losses import LOSSES
from distributed.collectives import Axis
from distributed.pipeline import partition_layers
from formats.files import UserError, atomic_file
from modules.layers import linear_row
from parallel import Degrees, Topology
from planning.memory_model import FLOAT32, MemoryModel

# Published figures of a GPU by its dense bfloat16 TFLOP/s: bytes/s of its memory, of NVLink in one direction.
GPUS = {125: (0.9e12, 150e9), 312: (2.0e12, 300e9), 990: (3.35e12, 450e9), 2250: (8.0e12, 900e9)}
ADAMW_BYTES = 28  # of an element: weight, gradient and two moments are read, all but the gradient written
FLOAT32_SHARE = 16  # a GPU's bfloat16 FLOP/s over its float32 ones
SCORE_PASSES = 6  # over scores in memory by attention that is not fused: written, mask, softmax (2), product, kept
LINKS = 0.8  # of a link's published rate that collectives reach
HIDDEN = 0.9  # of the time of a backward, at most so much can hide a reduction


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run's ranks compute and communicate with. Rates are of one rank, in one direction."""

    peak_flops: float  # FLOP/s, what MFU is relative to
    memory_bandwidth: float  # bytes/s
    ranks_per_node: int
    node_bandwidth: float  # bytes/s between two ranks of a node
    network_bandwidth: float  # bytes/s between nodes
    efficiency: float = 0.75  # of products; assumed, where it is not measured
    attention_efficiency: float = 0.5
    node_latency: float = 6e-6  # seconds of one hop: assumed, where they are not measured
    network_latency: float = 15e-6
    launch: float = 5e-6  # seconds of an op that does nothing
    overlaps: bool = True  # collectives run beside computing (NCCL); gloo's block
    shares_cores: bool = False  # ranks of a node share its rates: processes on CPUs
    product_bytes: int = 2  # of an element of a product's operands
    fused_attention: bool = True  # else scores are in memory
    measured: dict[str, tuple[float, float]] | None = None  # {collective of Axis: (α, β)} where a probe has them
    stored_bytes: int = 4  # of an element of activations, and of weights that stage 3 gathers: float32 here
    cards: int | None = None  # of a node's network that one collective uses; None: those of its ranks there

    @staticmethod
    def of_gpus(peak_flops: float, interconnect: str) -> "Machine":
        """From published figures. interconnect: nvlink8+400Gb: 8 GPUs a node, 400 Gbit/s of network each."""
        found = re.fullmatch(r"(nvlink|pcie)(\d+)(?::([\d.]+))?(?:\+([\d.]+)Gb)?", interconnect)
        if not found:
            raise UserError(
                f"interconnect: {interconnect!r}; give nvlink8+400Gb (GPUs of a node, network of each), or with the "
                "GB/s of a link nvlink8:450+400Gb, or pcie4:25+100Gb; without a network there is one node"
            )
        kind, ranks, rate, network = found.groups()
        memory, nvlink = GPUS[min(GPUS, key=lambda peak: abs(math.log(peak_flops / 1e12 / peak)))]
        node = float(rate) * 1e9 if rate else nvlink if kind == "nvlink" else 25e9
        return Machine(peak_flops, memory, int(ranks), LINKS * node, LINKS * float(network or 0) / 8 * 1e9)

    @staticmethod
    def load(path: str | Path) -> "Machine":
        """A file that save() wrote; UserError if it is none."""
        try:
            return Machine(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not a probe file of plan.py --probe: {error}") from None

    def save(self, path: str | Path) -> None:
        with atomic_file(Path(path)) as file:
            json.dump(dataclasses.asdict(self), file, indent=2)

    def of_world(self, world: int) -> "Machine":
        """The rates of one of `world` ranks: processes on one machine's CPUs share them."""
        if not self.shares_cores:
            return self
        n = min(world, self.ranks_per_node)
        return dataclasses.replace(
            self, peak_flops=self.peak_flops / n, memory_bandwidth=self.memory_bandwidth / n, shares_cores=False
        )

    # ------------------------------------------------------------------------------------------------- seconds

    def product(self, M: float, K: float, N: float) -> float:
        """Of a product (M, K) x (K, N)."""
        moved = (M * K + K * N + M * N) * self.product_bytes
        return max(2 * M * K * N / (self.peak_flops * self.efficiency), moved / self.memory_bandwidth) + self.launch

    def passes(self, size: float) -> float:
        """Of moving so many bytes through memory."""
        return size / self.memory_bandwidth

    def link(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        """(α seconds, β bytes/s) of the slowest link between these global ranks, which all use it at once."""
        node = ranks[0] // self.ranks_per_node
        here = sum(rank // self.ranks_per_node == node for rank in ranks)
        if here == len(ranks):
            return self.node_latency, self.node_bandwidth
        return self.network_latency, min(self.node_bandwidth, min(here, self.cards or here) * self.network_bandwidth)

    def of(self, name: str, ranks: tuple[int, ...]) -> tuple[float, float]:
        """(α, β) of a collective between these ranks: measured, or those of the link."""
        return tuple(self.measured[name]) if self.measured else self.link(ranks)

    def all_reduce(self, ranks: tuple, size: float) -> float:
        n = len(ranks)
        if n == 1:
            return 0.0
        alpha, beta = self.of("all_reduce", ranks)
        return 2 * math.ceil(math.log2(n)) * alpha + 2 * (n - 1) / n * size / beta

    def all_gather(self, ranks: tuple, size: float) -> float:
        """size: of what all ranks have together."""
        n = len(ranks)
        if n == 1:
            return 0.0
        nodes = len({rank // self.ranks_per_node for rank in ranks})
        hops = (n - nodes) * self.node_latency + (nodes if nodes > 1 else 0) * self.network_latency
        alpha, beta = self.of("all_gather", ranks)
        return ((n - 1) * alpha if self.measured else hops) + (n - 1) / n * size / beta

    def reduce_scatter(self, ranks: tuple, size: float) -> float:
        """gloo has none: all-reduce (Axis.reduce_scatter)."""
        return self.all_gather(ranks, size) if self.overlaps else self.all_reduce(ranks, size)

    def all_to_all(self, ranks: tuple, size: float) -> float:
        """size: of what a rank sends."""
        (alpha, beta), n = self.of("all_to_all", ranks), len(ranks)
        return 0.0 if n == 1 else (n - 1) * alpha + (n - 1) / n * size / beta

    def all_to_all_v(self, ranks: tuple, size: float) -> float:
        """gloo has none: all ranks' rows are gathered (Axis.all_to_all_v)."""
        return self.all_to_all(ranks, size) if self.overlaps else self.all_gather(ranks, len(ranks) * size)

    def message(self, ranks: tuple, size: float) -> float:
        """To a neighbor on a ring or in a pipeline."""
        alpha, beta = self.of("ring_shift", ranks)
        return 0.0 if len(ranks) == 1 else alpha + size / beta


@dataclasses.dataclass
class Communication:
    """Of one axis in a step of one rank."""

    size: float = 0.0  # bytes that the rank gives to collectives
    seconds: float = 0.0
    hidden: float = 0.0  # of these, behind computing

    def add(self, size: float, seconds: float, hidden: float = 0.0) -> None:
        self.size, self.seconds, self.hidden = self.size + size, self.seconds + seconds, self.hidden + hidden


@dataclasses.dataclass
class StageCost:
    """Seconds of one micro-batch on one stage of the pipeline."""

    forward: float = 0.0
    backward: float = 0.0  # recomputation included
    forward_talk: float = 0.0  # of tp, sep, ep and stage 3, beside these
    backward_talk: float = 0.0
    layers: int = 0


@dataclasses.dataclass
class StepCost:
    """Of one step of one topology; axes of size 1 are not in `talk`."""

    stages: list[StageCost]  # by stage
    transfer: float  # seconds of a message to the next stage
    transfer_bytes: float
    talk: dict[str, Communication]
    reduction: float  # seconds behind the last backward that are not hidden: gradients
    update: float  # AdamW
    gather: float  # updated weights
    seconds: float = 0.0  # of the step, see CostModel.step()
    bubble: float = 0.0  # share of it


@functools.lru_cache(maxsize=100_000)
def ranks_of(dp: int, pp: int, sharding: int, sep: int, tp: int, ep: int, order: str) -> dict[str, tuple[int, ...]]:
    """{axis: global ranks of rank 0's group} on the product's own grid."""
    topology = Topology(Degrees(dp, pp, sharding, sep, tp, ep, order=order))
    axes: list[Axis] = [topology.dp, topology.pp, topology.sharding, topology.sep, topology.tp, topology.ep]
    return {axis.name: tuple(axis.ranks) for axis in axes}


def has_moving_reference(args: object) -> bool:
    return getattr(args, "ref_model_update_steps", -1) > 0


def reference_forwards(args: object, pp: int, is_adapter: bool) -> int:
    """Forwards of a micro-batch beside its own: of dpo.py's reference, if it moves or is the model without adapter."""
    if getattr(args, "reference_free", True):
        return 0
    if has_moving_reference(args):
        return 1
    if pp > 1 or not is_adapter:  # computed before the run
        return 0
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    rows = [LOSSES.get(name) for name in names]  # None: orpo, sft, single replies and lists, which the run resolves
    return int(any(row is None or row.needs_reference for row in rows))


class CostModel:
    """Seconds of a step for any topology; memory: the MemoryModel of the run, whose shapes it reads."""

    def __init__(self, memory: MemoryModel, machine: Machine):
        self.memory, self.machine, self.config, self.T = memory, machine, memory.config, memory.T
        self.cache, self.args = {}, memory.args

    def step(self, degrees: Degrees, batch_size: int, accumulation: int, granularity: str | None) -> StepCost:
        """granularity: of recompute; None: without. seconds and bubble are the formula's; simulate.play() is exact."""
        machine = self.machine.of_world(degrees.world)
        ranks = ranks_of(degrees.dp, degrees.pp, degrees.sharding, degrees.sep, degrees.tp, degrees.ep, degrees.order)
        talk = {name: Communication() for name, group in ranks.items() if len(group) > 1}
        stages = self._stages(degrees, batch_size, accumulation, granularity, machine, ranks, talk)
        width = self.config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
        size = batch_size * self.T / degrees.sep * width * machine.stored_bytes
        neighbors = ranks["pp"][:2]
        cost = StepCost(stages, machine.message(neighbors, size), size, talk, 0.0, 0.0, 0.0)
        if degrees.pp > 1:
            count = 2 * accumulation * degrees.virtual
            talk["pp"].add(count * size, count * cost.transfer)
        self._update(cost, degrees, accumulation, machine, ranks)
        return self._with_formula(cost, degrees, accumulation)

    def _with_formula(self, cost, degrees, accumulation):
        """Sets seconds and bubble by the formula of the pipeline."""
        pp, busy = degrees.pp, []
        for rank in range(pp):
            mine = cost.stages[rank::pp]
            busy.append(sum(s.forward + s.backward + s.forward_talk + s.backward_talk for s in mine))
        mean = sum(busy) / pp / degrees.virtual + 2 * (cost.transfer if pp > 1 else 0.0)
        idle = (pp - 1) * mean
        cost.seconds = max(busy) * accumulation + idle + cost.reduction + cost.update + cost.gather
        cost.bubble = 1 - sum(busy) / pp * accumulation / (max(busy) * accumulation + idle)
        return cost

    # ------------------------------------------------------------------------------------------------- computing

    def _stages(self, degrees, batch_size, accumulation, granularity, machine, ranks, talk):
        """[StageCost] in the order of the stages; adds what their axes say to `talk` of the busiest rank."""
        layers, count = self.memory.config.num_hidden_layers, degrees.pp * degrees.virtual
        blocks = [
            self._block(kind, degrees, batch_size, granularity, machine, ranks)
            for kind in range(len(self.memory.blocks))
        ]
        stages, kinds = [], self.memory.kinds
        for chunk in partition_layers(layers, count):
            cost = StageCost(layers=len(chunk))
            for kind, n in collections.Counter(kinds[layer] for layer in chunk).items():
                block, _ = blocks[kind]
                cost.forward += n * block.forward
                cost.backward += n * block.backward
                cost.forward_talk += n * block.forward_talk
                cost.backward_talk += n * block.backward_talk
            stages.append(cost)
        self._add_head(stages[-1], degrees, batch_size, machine)
        times = 1 + reference_forwards(self.args, degrees.pp, self.memory.is_adapter)
        for stage in stages:
            stage.forward, stage.forward_talk = times * stage.forward, times * stage.forward_talk
        share = accumulation / degrees.pp
        for kind, n in collections.Counter(kinds).items():
            for name, part in blocks[kind][1].items():
                talk[name].add(n * part.size * share, n * part.seconds * share)
        return stages

    def _add_head(self, stage, degrees, batch_size, machine):
        """The head's products: forward 1, backward 3 (logits again, and two), or with a frozen head 2 in all."""
        c, tokens = self.config, batch_size * self.T / degrees.sep
        if type(self.args).__module__ == "reward":
            return
        product = machine.product(tokens, c.embedding_size or c.hidden_size, c.vocab_size / degrees.tp)
        stage.forward += product
        stage.backward += product if self.memory.is_adapter else 3 * product

    def _block(self, kind, degrees, batch_size, granularity, machine, ranks):
        """(StageCost of a block, {axis: Communication} of a micro-batch through it)."""
        key = (
            kind,
            degrees.tp,
            degrees.sequence_parallel,
            degrees.sep,
            degrees.context,
            degrees.ep,
            batch_size,
            granularity,
            degrees.stage == 3,
            ranks["tp"],
            ranks["sep"],
            ranks["ep"],
            ranks["sharding"],
            machine.peak_flops,
        )
        if key not in self.cache:
            self.cache[key] = self._make_block(kind, degrees, batch_size, granularity, machine, ranks)
        return self.cache[key]

    def _make_block(self, kind, degrees, batch_size, granularity, machine, ranks):
        block, tokens = self.memory.blocks[kind], batch_size * self.T / degrees.sep
        products = self._products(kind, degrees, tokens, machine)
        attention, mlp = products["attention"], products["mlp"] + products["expert"]
        core = self._attention(degrees, tokens, machine)
        passes = machine.passes(self.memory.block_activations(kind, True, degrees)[0] * tokens * machine.stored_bytes)
        casts = 0.0
        if self.args.bf16 and not self.memory.is_adapter:  # each product rounds its float32 weight, see kernels/gpu.py
            elements = self.memory._elements(degrees)[0][kind][2]
            casts = machine.passes(6 * elements)
        if self.memory.low_bit is not None:  # dequantized for a product, in backward again
            elements = self.memory._elements(degrees)[0][kind][2]
            casts = machine.passes((FLOAT32 + self.memory.low_bit.bytes_per_weight) * elements)
        forward = attention + mlp + core + 2 * passes + casts
        linears = (attention + mlp) * (1 if self.memory.is_adapter else 2)
        again = {None: 0.0, "full": forward, "core_attn": core, "full_attn": attention + core}
        granularity = "full" if degrees.stage == 3 else granularity
        dequantize = casts * (self.memory.low_bit is not None)
        cost = StageCost(forward, linears + dequantize + 2.5 * core + 4 * passes + again[granularity])
        parts = {}
        self._tensor_talk(cost, parts, degrees, tokens, granularity, machine, ranks["tp"])
        self._context_talk(cost, parts, degrees, tokens, granularity, machine, ranks["sep"])
        if hasattr(block.mlp, "experts") and degrees.ep > 1:
            size = tokens * self.config.experts.top_k * self.config.hidden_size * machine.stored_bytes
            times = 3 if granularity == "full" else 2
            seconds = machine.all_to_all_v(ranks["ep"], size)
            self._talk(cost, parts, "ep", 2 * size, 2 * seconds, 2 * (times - 1) * size, 2 * (times - 1) * seconds)
        if degrees.stage == 3:
            size = self.memory._elements(degrees)[0][kind][0] * machine.stored_bytes
            gather, group = machine.all_gather(ranks["sharding"], size), ranks["sharding"]
            reduce = 0.0 if self.memory.is_adapter else machine.reduce_scatter(group, size)
            self._talk(cost, parts, "sharding", size, gather, size * (1 + (reduce > 0)), gather + reduce)
        return cost, parts

    def _talk(self, cost, parts, name, forward_bytes, forward, backward_bytes, backward):
        cost.forward_talk += forward
        cost.backward_talk += backward
        parts.setdefault(name, Communication()).add(forward_bytes + backward_bytes, forward + backward)

    def _linears(self, kind):
        """{(name's last part, inputs, outputs, "attention", "mlp" or "expert"): how many} of a block."""
        if ("linears", kind) not in self.cache:
            found = collections.Counter()
            for name, layer in self.memory.blocks[kind].named_sublayers():
                if hasattr(layer, "n_out"):
                    where = "expert" if ".experts." in name else name.partition(".")[0]
                    found[name.rpartition(".")[2], layer.n_in, layer.n_out, where] += 1
            self.cache["linears", kind] = found
        return self.cache["linears", kind]

    def _products(self, kind, degrees, tokens, machine):
        """Seconds of the forward products of a block's linears: {"attention", "mlp", "expert"}."""
        seconds, moe = dict.fromkeys(("attention", "mlp", "expert"), 0.0), self.config.experts
        for (part, n_in, n_out, where), count in self._linears(kind).items():
            row, shards = linear_row(part), degrees.tp_shards(f".{part}", self.config)
            n_in, n_out = (n_in / shards, n_out) if row and row.parallel == "row" else (n_in, n_out / shards)
            if where == "expert":  # E/ep of them here, each with its share of the tokens of ep ranks
                tokens_each = tokens * degrees.ep * moe.top_k / moe.num_experts
                seconds[where] += count / degrees.ep * machine.product(tokens_each, n_in, n_out)
            else:
                seconds[where] += count * machine.product(tokens, n_in, n_out)
        return seconds

    def _attention(self, degrees, tokens, machine):
        """Seconds of the forward of attention itself."""
        c = self.config
        windows = [min(w or self.T, self.T) for w in c.windows] or [self.T]
        keys = sum(windows) / len(windows)
        width = c.head_dim if c.latent is None else (c.head_dim + c.latent.v_head_dim) / 2
        heads = c.num_attention_heads / degrees.tp
        flops, scores = 4 * tokens * keys / 2 * heads * width, tokens * self.T * heads
        if machine.overlaps and (c.position == "alibi" or c.attention_softcap):  # the reference: see kernels/gpu.py
            return 2 * flops / (machine.peak_flops / FLOAT32_SHARE) + machine.passes(SCORE_PASSES * FLOAT32 * scores)
        if not machine.fused_attention:
            products = 2 * flops / (machine.peak_flops * machine.efficiency)
            return products + machine.passes(SCORE_PASSES * machine.stored_bytes * scores)
        return flops / (machine.peak_flops * machine.attention_efficiency) + machine.launch

    # ------------------------------------------------------------------------------------------------- talking

    def _tensor_talk(self, cost, parts, degrees, tokens, granularity, machine, group):
        if degrees.tp == 1:
            return
        size = tokens * self.config.hidden_size * machine.stored_bytes
        each = machine.all_reduce(group, size)
        if degrees.sequence_parallel:
            each = machine.all_gather(group, size) + machine.reduce_scatter(group, size)
        again = {None: 0, "full": 2, "core_attn": 0, "full_attn": 1}[granularity]
        self._talk(cost, parts, "tp", 2 * size, 2 * each, (2 + again) * size, (2 + again) * each)

    def _context_talk(self, cost, parts, degrees, tokens, granularity, machine, group):
        if degrees.sep == 1:
            return
        c, again = self.config, granularity is not None
        keys = (
            2
            * c.num_key_value_heads
            * c.head_dim
            / min(degrees.tp, c.num_key_value_heads)
            * tokens
            * machine.stored_bytes
        )
        queries = c.num_attention_heads * c.head_dim / degrees.tp * tokens * machine.stored_bytes
        if degrees.context:
            shift, n = machine.message(group, keys), degrees.sep - 1
            forward, size = n * shift, n * keys
            self._talk(cost, parts, "sep", size, forward, (2 + again) * size, (2 + again) * forward)
            return
        size = 2 * queries + keys
        seconds = 2 * machine.all_to_all(group, queries) + machine.all_to_all(group, keys)
        self._talk(cost, parts, "sep", size, seconds, (1 + again) * size, (1 + again) * seconds)

    def _update(self, cost, degrees, accumulation, machine, ranks):
        """Reductions of gradients, AdamW, and the gathering of weights; of the rank that trains most."""
        whole, sharded = self._trained(degrees)
        size, talk = whole * FLOAT32, cost.talk
        own = degrees.sharding > 1
        if own and degrees.stage < 3:
            times = accumulation if degrees.stage == 2 else 1
            each = machine.reduce_scatter(ranks["sharding"], size)
            hidden = self._hidden(cost, degrees, machine, each) * times
            talk["sharding"].add(times * size, times * each, hidden)
            cost.reduction += times * each - hidden
            times = 3 if has_moving_reference(self.args) else 1  # it takes the policy's place and gives it back
            cost.gather = times * machine.all_gather(ranks["sharding"], size)
            talk["sharding"].add(times * size, cost.gather)
        left, first = (sharded * FLOAT32 if own else size), not own
        for name in ("sep", "dp"):
            if len(ranks[name]) > 1:
                each = machine.all_reduce(ranks[name], left)
                hidden = self._hidden(cost, degrees, machine, each) if first else 0.0
                talk[name].add(left, each, hidden)
                cost.reduction, first = cost.reduction + each - hidden, False
        cost.update = machine.passes(sharded * ADAMW_BYTES)

    def _hidden(self, cost, degrees, machine, seconds):
        """Seconds of a reduction that one backward hides."""
        if not machine.overlaps or degrees.pp > 1 or degrees.sep > 1 or degrees.ep > 1:
            return 0.0
        return min(seconds, HIDDEN * sum(stage.backward for stage in cost.stages))

    def _trained(self, degrees):
        """Trained elements of the rank that has most: (unsharded, with ZeRO sharding)."""
        memory = self.memory
        kinds, first, last, _ = memory._elements(degrees)
        most = (0.0, 0.0)
        adapter = memory._adapter_elements(degrees) if memory.is_adapter else None
        for stage in memory.stages(degrees):
            if adapter is not None:
                found = adapter[stage.layers].sum(0) + adapter[-1]
            else:
                found = sum(n * kinds[kind] for kind, n in stage.kinds.items())
                found = found + (stage.rank == 0) * first + (stage.rank == degrees.pp - 1) * last
            most = max(most, (float(found[0]), float(found[1])))
        return most if degrees.stage else (most[0], most[0])
