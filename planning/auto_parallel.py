"""Which topology a run should have: every legal one that fits, fastest first, for plan.py and --auto_parallel.

    plans = find_plans(args, world=1024, memory_bytes=80 * 2**30, machine=Machine.of_gpus(990e12, "nvlink8+400Gb"))
    plans.ranked[0].keys(args)                              # {key: value} that a training script needs
    plans.fallen                                            # {why: (how many, one of them)}

A topology is legal if the product's own checks say so: parallel.Degrees.of() and the script's check_topology(). It fits
if memory_model.py says so, with an allowance for gaps of the allocator. Its time is cost_model.py's; the fastest ones
are played on the pipeline's own timetable. All have the same rows in a step, so that all train alike.
"""

import collections
import copy
import dataclasses
import math
import re
import types
from typing import Any

from distributed.tensor import cut_blocks, shard_spec_of
from distributed.watchdog import Watchdog
from formats.files import UserError
from model import LINEARS, block_linears
from parallel import NAMES, Degrees
from planning.cost_model import CostModel, Machine, StepCost
from planning.memory_model import MODES, MemoryModel, planned_model, sequence_length
from planning.probe import memory_here, probe
from planning.simulate import play_step

GRANULARITIES = (None, "core_attn", "full_attn", "full")  # of recompute, fastest first; None: without
BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # rows of a micro-batch
VIRTUAL = (1, 2, 3, 4, 6, 8)  # pipeline stages of a rank
GAPS = 0.05  # of what a rank holds: the allocator's gaps
RESERVED = 1.5e9  # bytes: context of the device, buffers of NCCL
PLAYED = 24  # of the fastest by formula, so many are played


@dataclasses.dataclass
class Plan:
    """One topology, with the rows of a micro-batch and what is recomputed."""

    degrees: Degrees
    batch_size: int
    accumulation: int
    granularity: str | None  # of recompute; None: without
    rows: dict[str, float]  # {purpose: bytes} of the fullest rank
    cost: StepCost
    tokens_per_second: float = 0.0  # of all ranks
    mfu: float = 0.0  # model FLOPs utilization

    @property
    def bytes(self) -> float:
        """On the fullest rank, with allowances."""
        return with_allowance(self.rows[f"in all {MODES[self.granularity is not None]}"])

    def keys(self, args: Any) -> dict[str, object]:
        """{key: value} of a training script, without those that have their default."""
        d = self.degrees
        axes = {"tp": d.tp, "pp": d.pp, "sharding": d.sharding, "ep": d.ep}
        axes |= {"context" if d.context else "sep": d.sep}
        keys: dict[str, object] = {f"{NAMES[axis]}_parallel_degree": n for axis, n in axes.items()}
        keys["sharding"] = f"stage{d.stage}{' offload' * d.offload}" if d.stage else None
        keys |= {"virtual_pp_degree": d.virtual, "sequence_parallel": d.sequence_parallel}
        keys |= {"recompute": self.granularity is not None, "recompute_granularity": self.granularity or "full"}
        if not hasattr(args, "global_batch_size"):  # rl.py counts prompts instead
            keys |= {"per_device_train_batch_size": self.batch_size}
            keys |= {"gradient_accumulation_steps": self.accumulation}
        return keys

    def __str__(self):
        recompute = f", recompute {self.granularity}" if self.granularity else ""
        parts = [str(self.degrees)] + ["sequence parallel"] * self.degrees.sequence_parallel
        if self.degrees.dp > 1:
            parts[0] = re.sub(r"(, )?data \d+", "", parts[0]).removeprefix(", ")
            parts.append(f"data {self.degrees.dp}")
        text = ", ".join(filter(None, parts))
        return f"{text}; micro-batches {self.accumulation} x {self.batch_size}{recompute}"


@dataclasses.dataclass
class Plans:
    """What find_plans() found."""

    ranked: list[Plan]  # fastest first
    fallen: dict[str, tuple[int, str]]  # {why: (how many, one of them)}
    memory: MemoryModel
    name: str  # of the model
    rows: int  # of a step
    least: tuple[float, str] | None = None  # fewest bytes of one that does not fit, and which

    def why_nothing(self, memory_bytes: float) -> str:
        """The line for a search that found no plan."""
        least = f"; the least is {self.least[0] / 2**30:.1f} GiB: {self.least[1]}" if self.least else ""
        return f"{self.name}: no topology fits into {memory_bytes / 2**30:.1f} GiB a rank{least}"


def with_allowance(size: float) -> float:
    """Bytes that a device must have for a rank that holds so many."""
    return size * (1 + GAPS) + RESERVED


def divisors(n: int) -> list[int]:
    """Ascending."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def rows_of_step(args: Any, world: int) -> int:
    """Rows of a step as the arguments say: micro-batches of all data-parallel ranks of their own degrees."""
    if hasattr(args, "global_batch_size"):  # rl.py: prompts of an update
        return args.global_mini_batch_size if args.global_mini_batch_size > 0 else args.global_batch_size
    try:
        degrees = Degrees.of(args, world=world)
        replicas = degrees.dp * degrees.sharding
    except UserError:  # degrees of another number of ranks
        replicas = world
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * replicas


def flops_per_token(memory: MemoryModel) -> float:
    """Of forward and backward; frozen weights of a LoRA or prefix run have no product for their gradient."""
    flops = memory.model.flops_per_token(memory.T)
    return flops - 2.0 * memory.model.active_weights * memory.is_adapter


class _Search:
    def __init__(self, args, world, memory_bytes, machine, rows):
        self.name, config = planned_model(args)
        self.args, self.world, self.bytes, self.config = args, world, memory_bytes, config
        self.T = sequence_length(args)
        self.memory = MemoryModel(args, config, self.T)
        self.cost = CostModel(self.memory, machine)
        self.rows = rows or rows_of_step(args, world)
        self.alone, self.cut = {}, {}
        self.fallen, self.found, self.least = collections.defaultdict(lambda: [0, ""]), [], None

    def legal(self, keys: dict, world: int | None) -> Degrees | None:
        """The Degrees that a run with these keys would have, or None: then `fallen` has the reason."""
        args = copy.copy(self.args)
        for key, value in keys.items():
            setattr(args, key, value)
        try:
            args.check_topology()
            degrees = Degrees.of(args, self.config, self.T, world)
            self.check_blocks(degrees.tp)
            return degrees
        except UserError as error:
            why = str(error).partition("; ")[0]
            self.fall(why, ", ".join(f"{key} {value}" for key, value in keys.items() if value not in _OFF))
        return None

    def check_blocks(self, tp: int) -> None:
        """UserError for blocks of a QLoRA's base that this degree of tensor parallelism cuts."""
        if self.memory.low_bit is None or tp == 1:
            return
        if tp not in self.cut:
            axis, linears = types.SimpleNamespace(size=tp, rank=0), block_linears(self.memory.model).values()
            shapes = {(name, layer.n_in, layer.n_out) for _, name, layer in linears if LINEARS[name].parallel}
            specs = [shard_spec_of(name, list(shape), self.config, axis) for name, *shape in sorted(shapes)]
            self.cut[tp] = next(filter(None, (cut_blocks(spec, self.memory.low_bit) for spec in specs)), None)
        if self.cut[tp]:
            raise UserError(self.cut[tp])

    def fall(self, why: str, which: str, count: int = 1) -> None:
        entry = self.fallen[re.sub(r"\d[\d,]*", "N", why)]
        entry[0] += count
        entry[1] = entry[1] or f"{which}: {why}" if which else why

    def axis_values(self, axis: str, candidates: list[int]) -> list[int]:
        """Those that are legal alone: what falls here falls in every combination, and is counted once."""
        key = f"{NAMES[axis]}_parallel_degree"
        return [n for n in candidates if n == 1 or self.legal_alone(((key, n),))]

    def legal_alone(self, keys: tuple) -> bool:
        """Whether these ((key, value), …) are legal with nothing else."""
        if keys not in self.alone:
            self.alone[keys] = self.legal({**_PLAIN, **dict(keys)}, None) is not None
        return self.alone[keys]

    def topologies(self):
        """Yields the Degrees of every legal combination."""
        world, moe = divisors(self.world), self.config.experts
        tps, pps = self.axis_values("tp", world), self.axis_values("pp", world)
        seps = [("sep", n) for n in self.axis_values("sep", world)]
        seps += [("context", n) for n in self.axis_values("context", world) if n > 1]
        experts = self.axis_values("ep", divisors(moe.num_experts) if moe else [1, 2])
        for tp in tps:
            for pp in (n for n in pps if self.world % (tp * n) == 0):
                for axis, sep in seps:
                    if self.world % (tp * pp * sep) == 0:
                        yield from self._of_rest(tp, pp, axis, sep, self.world // (tp * pp * sep), experts)

    def _of_rest(self, tp, pp, axis, sep, left, experts):
        """The ways to use the ranks that tp, pp and sep leave."""
        of_pp = ("pipeline_parallel_degree", pp)
        virtuals = [v for v in VIRTUAL if v == 1 or pp > 1 and self.legal_alone((of_pp, ("virtual_pp_degree", v)))]
        zero = ("sharding_parallel_degree", 2)
        stages = [s for s in (1, 2, 3) if self.legal_alone((of_pp, zero, ("sharding", f"stage{s}")))]
        for sharding in divisors(left):
            for stage in stages if sharding > 1 else (0,):
                for virtual in virtuals:
                    for ep in experts:
                        for sequence_parallel in (False, True) if tp > 1 else (False,):
                            keys = {
                                **_PLAIN,
                                "tensor_parallel_degree": tp,
                                "pipeline_parallel_degree": pp,
                                f"{axis}_parallel_degree": sep,
                                "sharding_parallel_degree": sharding,
                                "sharding": f"stage{stage}" if stage else None,
                                "virtual_pp_degree": virtual,
                                "expert_parallel_degree": ep,
                                "sequence_parallel": sequence_parallel,
                            }
                            if degrees := self.legal(keys, self.world):
                                yield degrees

    def consider(self, degrees: Degrees) -> None:
        """Append the Plans of a topology: for each micro-batch size the least recompute that fits."""
        replicas = degrees.dp * degrees.sharding
        if self.rows % replicas:
            self.fall(
                f"a step has {self.rows:,} rows, which {replicas:,} data-parallel ranks cannot share", str(degrees)
            )
            return
        of_rank = self.rows // replicas
        sizes = [b for b in BATCH_SIZES if of_rank % b == 0]
        if hasattr(self.args, "global_batch_size"):
            sizes = [min(self.args.per_device_train_batch_size, of_rank)]
        for batch_size in sizes:
            accumulation = -(-of_rank // batch_size)
            if not self._consider(degrees, batch_size, accumulation):
                break  # a larger micro-batch needs more

    def _consider(self, degrees, batch_size, accumulation):
        order = ("full",) if degrees.stage == 3 else GRANULARITIES
        if len(order) > 1 and not self._fits(degrees, batch_size, accumulation, "full")[0]:
            order = ("full",)  # nothing keeps less
        for granularity in order:
            fits, rows, needed = self._fits(degrees, batch_size, accumulation, granularity)
            if fits:
                cost = self.cost.step(degrees, batch_size, accumulation, granularity)
                shown = None if degrees.stage == 3 and not self.args.recompute else granularity
                self.found.append(Plan(degrees, batch_size, accumulation, shown, rows, cost))
                return True
        mode = MODES[granularity is not None]
        if self.least is None or needed < self.least[0]:
            self.least = needed, f"{degrees}, {batch_size} row{'s' * (batch_size > 1)}, recompute {granularity}"
        states = {part: rows[part] for part in ("weights", "gradients", "moments")}
        states["activations"] = rows[f"activations {mode}"]
        most = max(states, key=states.get)
        self.fall(f"needs more memory than {self.bytes / 2**30:.0f} GiB, most of it for {most}", str(degrees))
        return False

    def _fits(self, degrees, batch_size, accumulation, granularity):
        """(whether it fits, {purpose: bytes} of the fullest rank, bytes with allowance)."""
        mode = MODES[granularity is not None]
        ranks = self.memory.ranks(degrees, batch_size, accumulation, granularity or "full")
        rows = max(ranks, key=lambda rows: rows[f"in all {mode}"])
        needed = with_allowance(rows[f"in all {mode}"])
        return needed <= self.bytes, rows, needed


_OFF = (1, None, False)
_PLAIN = {  # a run without any parallelism
    **{f"{name}_parallel_degree": 1 for name in NAMES.values()}, "sharding": None, "virtual_pp_degree": 1,
    "sequence_parallel": False,
}  # fmt: skip


def find_plans(args: Any, world: int, memory_bytes: float, machine: Machine, rows: int | None = None) -> Plans:
    """Every legal topology of `world` ranks that fits into memory_bytes a rank, ranked by the time of a step.

    args: of a training script; its own degrees are not kept. rows: of a step; None: as its arguments say.
    """
    search = _Search(args, world, memory_bytes, machine, rows)
    for degrees in search.topologies():
        search.consider(degrees)
    tokens, flops = search.rows * search.T, flops_per_token(search.memory)
    found = sorted(search.found, key=lambda plan: (plan.cost.seconds, plan.bytes))
    for plan in found[:PLAYED]:
        if plan.degrees.pp > 1:
            play_step(plan.cost, plan.degrees, plan.accumulation)
    found[:PLAYED] = sorted(found[:PLAYED], key=lambda plan: (plan.cost.seconds, plan.bytes))
    peak = machine.of_world(world).peak_flops * world
    for plan in found:
        plan.tokens_per_second = tokens / plan.cost.seconds
        plan.mfu = plan.tokens_per_second * flops / peak
    fallen = {why: tuple(entry) for why, entry in sorted(search.fallen.items(), key=lambda item: -item[1][0])}
    return Plans(found, fallen, search.memory, search.name, search.rows, search.least)


def take_first_plan(args: Any, together: Watchdog | None) -> str:
    """--auto_parallel: set the keys of the fastest plan for the processes of this run; returns a line that says which.

    The first rank measures its machine and searches; the others wait for what it found. together: None: one process.
    """
    line, keys, world = "", {}, 1
    if together is not None:
        world = together.launch.world
        together.check_equal_on_all_ranks("arguments", vars(args))
    if together is None or together.launch.rank == 0:
        memory_bytes = memory_here(world)
        machine = dataclasses.replace(probe(), shares_cores=False)  # it measures its own share of the cores
        plans = find_plans(args, world, memory_bytes, machine)
        if not plans.ranked:
            raise UserError(f"auto_parallel: {plans.why_nothing(memory_bytes)}")
        plan = plans.ranked[0]
        keys = plan.keys(args)
        line = f"auto_parallel: {plan}; about {plan.cost.seconds:.3g} s a step; first of {len(plans.ranked):,} that fit"
    if together is not None:
        line, keys = together.gather([line, keys], "first")
    for key, value in keys.items():
        setattr(args, key, value)
    return line
