"""Which topology a run should have on so many GPUs: every legal one that fits, by the time of a step.

    python plan.py configs/llama_pretrain.json --gpus 1024 --gpu_memory_gib 80 --peak_tflops 990 \\
        --interconnect nvlink8+400Gb
    python plan.py --script finetune --model_name_or_path llama-3.1-405b --gpus 256 …    # any key of the script
    python plan.py --probe probe.json             # measures this machine (under the launcher also its collectives)
    python plan.py configs/llama_pretrain.json    # here: a probe of two seconds, and how long the run takes
    python plan.py configs/recipes/pretrain_70b.json --gpus 128 --simulate step        # step.svg and step.json

Takes the file of any training script (pretrain, finetune, dpo, reward, rl) and its keys. The files' own degrees,
micro-batch and recompute are replaced; the rows of a step stay. --simulate plays one step of the file's own degrees.
Formulas: planning/cost_model.py and planning/memory_model.py; docs/plan.md has what they are worth.
"""

import contextlib
import dataclasses
import io
import shlex
import sys
from pathlib import Path

import kernels

import dpo
import finetune
import parallel
import pretrain
import reward
import rl
from arguments import TrainingArgs, parse_args
from distributed.watchdog import Launch
from formats.config_files import read_config
from formats.files import UserError
from parallel import Degrees
from planning.auto_parallel import Plan, Plans, find_plans, rows_of_step, with_allowance
from planning.cost_model import CostModel, Machine
from planning.memory_model import MODES, MemoryModel, planned_model, sequence_length
from planning.probe import memory_here, probe
from planning.simulate import play_step, write_svg, write_trace
from trainer import exit_status

SCRIPTS = {"pretrain": pretrain, "finetune": finetune, "dpo": dpo, "reward": reward, "rl": rl}


@dataclasses.dataclass
class Args:
    script: str | None = None  # one of SCRIPTS; None: the one whose keys the file has
    gpus: int | None = None  # ranks of the run; None: one here, or those of the launcher
    gpu_memory_gib: float | None = None  # of each; None: 80, or this machine's
    interconnect: str = "nvlink8+400Gb"  # GPUs of a node and their links, and the network of each
    peak_tflops: float | None = None  # of a GPU, dense bfloat16 (A100 312, H100 990); None: this machine, by a probe
    probe: bool | str | None = None  # without a config: measure into this file; with one: read the machine from it
    simulate: str | None = None  # play a step of the config's own degrees into NAME.svg and NAME.json
    rows: int | None = None  # of a step; None: what the file has with its own degrees on so many ranks
    show: int = 10  # rows of the table

    def check(self) -> list[str]:
        if self.script not in (None, *SCRIPTS):
            raise UserError(f"script: {self.script!r}; possible are {', '.join(SCRIPTS)}")
        for key in ("gpus", "gpu_memory_gib", "peak_tflops", "rows", "show"):
            if (value := getattr(self, key)) is not None and value <= 0:
                raise UserError(f"{key}: {value}; it must be above 0")
        return []


# ======================================================================================================== arguments


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """(plan.py's own --key value tokens, the training script's)."""
    own, theirs, names = [], [], {field.name for field in dataclasses.fields(Args)}
    into = theirs
    for token in argv:
        if token.startswith("--"):
            into = own if token[2:].partition("=")[0] in names else theirs
        elif token.endswith((".json", ".yaml", ".yml")) and into is own and len(own) > 1 and own[-2].startswith("--"):
            into = theirs  # a config behind a complete --key value
        into.append(token)
    return own, theirs


def training_args(argv: list[str], script: str | None) -> tuple[str, TrainingArgs]:
    """(name of the script, its checked Args); script None: the one that has most of the files' keys as its own."""
    argv = [*argv, "--dry_run", "true"]
    if script is not None:
        return script, parse_args(SCRIPTS[script].Args, argv)
    keys = {key for token in argv if token.endswith((".json", ".yaml", ".yml")) for key in read_config(token)}
    keys |= {token[2:].partition("=")[0] for token in argv if token.startswith("--")}
    found, errors = {}, {}
    for name, module in SCRIPTS.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found[name] = parse_args(module.Args, argv)
        except UserError as error:
            errors[name] = error
    own = {name: len(keys & {field.name for field in dataclasses.fields(SCRIPTS[name].Args)}) for name in SCRIPTS}
    if not found:
        raise errors[max(own, key=own.get)]
    name = max(found, key=own.get)
    return name, parse_args(SCRIPTS[name].Args, argv)


def machine_of(args: Args, world: int) -> tuple[Machine, float, str]:
    """(Machine, bytes of a rank's memory, what it is in words)."""
    if args.peak_tflops is not None:
        machine = Machine.of_gpus(args.peak_tflops * 1e12, args.interconnect)
        if world > machine.ranks_per_node and not machine.network_bandwidth:
            raise UserError(
                f"interconnect: {args.interconnect!r} has no network, but {world} GPUs are more than a node"
            )
        size = (args.gpu_memory_gib or 80) * 2**30
        return machine, size, f"{args.peak_tflops:g} TFLOP/s, {size / 2**30:.0f} GiB, {args.interconnect}"
    machine = Machine.load(args.probe) if isinstance(args.probe, str) else probe(topology_here())
    size = memory_here(world) if args.gpu_memory_gib is None else args.gpu_memory_gib * 2**30
    return machine, size, f"here, {machine.peak_flops / 1e9:,.0f} GFLOP/s measured, {size / 2**30:.1f} GiB a rank"


def topology_here() -> parallel.Topology:
    """All ranks of the launcher as data-parallel ones."""
    return parallel.init_parallel(TrainingArgs())


# =========================================================================================================== output


def describe(plans: Plans, args: Args, script: str, targs: TrainingArgs, config: list[str], machine: str) -> str:
    """The text of a ranking."""
    world, shown = args.gpus, plans.ranked[: args.show]
    tokens = plans.rows * plans.memory.T
    lines = [
        f"{plans.name}: {script}.py on {world:,} rank{'s' * (world > 1)} ({machine})",
        f"a step: {plans.rows:,} rows x {plans.memory.T:,} = {tokens:,} tokens",
        f"{len(plans.ranked):,} plans fit (topology and micro-batch, each with the least recompute that fits)",
        "",
        f"{'':>3} {'seconds':>9} {'tokens/s':>12} {'MFU':>6} {'bubble':>7} {'GiB':>7}  topology",
    ]
    for number, plan in enumerate(shown, 1):
        lines.append(
            f"{number:>3} {plan.cost.seconds:>9.3f} {plan.tokens_per_second:>12,.0f} {100 * plan.mfu:>5.1f}% "
            f"{100 * plan.cost.bubble:>6.1f}% {plan.bytes / 2**30:>7.1f}  {plan}"
        )
    for number, plan in enumerate(shown[:3], 1):
        lines += ["", f"{number}. {plan}", *details(plan), "    " + command(plan, script, targs, config, world, args)]
    if plans.fallen:
        lines += ["", "what fell, and why (how many, one of them):"]
        lines += [f"{count:>8,}  {example}" for count, example in plans.fallen.values()]
    return "\n".join(lines)


def details(plan: Plan) -> list[str]:
    """Lines of a plan: memory by purpose, bytes and time by axis."""
    mode = MODES[plan.granularity is not None]
    parts = {
        name.removesuffix(f" {mode}"): size
        for name, size in plan.rows.items()
        if size and not name.startswith("in all") and not name.endswith(tuple(set(MODES) - {mode}))
    }
    lines = ["    GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())]
    total = plan.rows[f"in all {mode}"]
    lines[0] += f"; peak {total / 2**30:.2f}, with gaps and the device's own {with_allowance(total) / 2**30:.2f}"
    for axis, talk in plan.cost.talk.items():
        hides = f", {talk.hidden:.3f} s of it behind computing" if talk.hidden else ", not hidden"
        lines.append(f"    {axis}: {talk.size / 1e9:,.2f} GB a rank and step in {talk.seconds:.3f} s{hides}")
    return lines


def command(plan: Plan, script: str, targs: TrainingArgs, config: list[str], world: int, args: Args) -> str:
    """The command line that runs a plan."""
    defaults = {field.name: field.default for field in dataclasses.fields(targs)}
    words = []
    for key, value in plan.keys(targs).items():
        if value != getattr(targs, key) or value != defaults[key]:
            words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    per_node = min(world, Machine.of_gpus(1e12, args.interconnect).ranks_per_node if args.peak_tflops else world)
    launcher = ["python"]
    if world > 1:
        launcher += ["-m", "paddle.distributed.launch"]
        launcher += ["--nnodes", str(world // per_node), "--master", "HOST:PORT"] if world > per_node else []
        launcher += ["--nproc_per_node", str(per_node)]
    return shlex.join([*launcher, f"{script}.py", *config, *words])


def hours_of(plan: Plan, targs: TrainingArgs) -> str:
    """How long a run takes."""
    if targs.max_steps > 0:
        return f"{targs.max_steps:,} steps: about {targs.max_steps * plan.cost.seconds / 3600:.2g} hours"
    return f"1,000 steps: about {1000 * plan.cost.seconds / 3600:.2g} hours"


def simulate(args: Args, targs: TrainingArgs, machine: Machine) -> str:
    """Play one step of the arguments' own degrees, and draw it; returns a line."""
    name, config = planned_model(targs)
    T = sequence_length(targs)
    degrees = Degrees.of(targs, config, T, args.gpus)
    memory, accumulation = MemoryModel(targs, config, T), targs.gradient_accumulation_steps
    granularity = targs.recompute_granularity if targs.recompute else None
    cost = CostModel(memory, machine).step(degrees, targs.per_device_train_batch_size, accumulation, granularity)
    timeline = play_step(cost, degrees, accumulation)
    base = Path(args.simulate.removesuffix(".svg").removesuffix(".json"))
    title = f"{name}: {degrees}, {accumulation} micro-batches; {cost.seconds:.3f} s, bubble {100 * cost.bubble:.1f} %"
    write_svg(base.with_suffix(".svg"), timeline, cost, degrees, title)
    write_trace(base.with_suffix(".json"), timeline, cost, degrees)
    return f"{title}\n{base.with_suffix('.svg')}, {base.with_suffix('.json')}"


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        print("\nKeys beside those of the training script, and their defaults:")
        for field in dataclasses.fields(Args):
            print(f"  {field.name} = {field.default!r}")
        return
    own, theirs = split_arguments(argv)
    args = parse_args(Args, own)
    kernels.configure("auto" if args.peak_tflops is None else "cpu", "auto")
    if not theirs:
        if args.probe is None:
            raise UserError("a config of a training script is missing, or --probe FILE")
        path = args.probe if isinstance(args.probe, str) else "probe.json"
        topology = topology_here()
        machine = probe(topology)
        if topology.rank == 0:
            machine.save(path)
            print(f"{path}: {dataclasses.asdict(machine)}")
        return
    script, targs = training_args(theirs, args.script)
    args.gpus = args.gpus or Launch.of_environment().world
    machine, memory_bytes, words = machine_of(args, args.gpus)
    if args.simulate is not None:
        print(simulate(args, targs, machine))
        return
    plans = find_plans(targs, args.gpus, memory_bytes, machine, args.rows or rows_of_step(targs, args.gpus))
    if not plans.ranked:
        print("\n".join(f"{count:>8,}  {example}" for count, example in plans.fallen.values()))
        raise UserError(plans.why_nothing(memory_bytes))
    print(describe(plans, args, script, targs, theirs, words))
    print(f"\n{hours_of(plans.ranked[0], targs)}{' here' if args.peak_tflops is None else ''}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException as error:  # exit_status() knows which ends in a line; any other is raised again
        code, line = exit_status(error, "")
        if line is None:
            raise
        print(f"error: {line}" if code == 2 else line, file=sys.stderr)
        sys.exit(code)
