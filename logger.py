"""The log of a training run: a bar or lines, metrics.jsonl, eval_metrics.jsonl, curves.png, and report_to's writers.

    log = Log(args, total, state)               # of trainer.setup_training
    log.step(state, loss, lr, grad_norm, tokens, seconds); log.evaluation(state.step, metrics); log.close()

report_to names any of visualdl, tensorboard and wandb. They are optional packages: one that is asked for and not
installed is missed with its pip command before training starts. wandb reads its own settings (WANDB_MODE=offline).
"""

import collections
import dataclasses
import datetime
import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import kernels

import paddle
from tqdm import tqdm

from arguments import TrainingArgs
from checkpoint import TrainState
from formats.files import UserError, atomic_file
from parallel import SINGLE, Topology

# ============================================================================================================ report_to


class VisualDL:
    """Files of VisualDL in logging_dir, by default output_dir/vdl_log."""

    modules, install = ("visualdl",), "visualdl"

    def __init__(self, module, args: TrainingArgs):
        self.writer = module.LogWriter(logdir=args.logging_dir or str(Path(args.output_dir) / "vdl_log"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class TensorBoard(VisualDL):
    """Event files in logging_dir, by default output_dir/tensorboard_log. The writer is tensorboardX's, or PyTorch's."""

    modules, install = ("tensorboardX", "torch.utils.tensorboard"), "tensorboard tensorboardX"

    def __init__(self, module, args: TrainingArgs):
        self.writer = module.SummaryWriter(args.logging_dir or str(Path(args.output_dir) / "tensorboard_log"))


class Wandb:
    """A run of Weights & Biases named run_name; its local files are in logging_dir, by default output_dir."""

    modules, install = ("wandb",), "wandb"

    def __init__(self, module, args: TrainingArgs):
        folder = args.logging_dir or args.output_dir
        Path(folder).mkdir(parents=True, exist_ok=True)  # else wandb would write somewhere else
        self.run = module.init(name=args.run_name, dir=folder, config=dataclasses.asdict(args))

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


WRITERS = {"visualdl": VisualDL, "tensorboard": TensorBoard, "wandb": Wandb}  # the names of arguments.REPORTS


def find_writers(args: TrainingArgs) -> list[tuple[type, object]]:
    """[(writer class, its package)] that report_to asks for; "all": those that are installed. UserError: missing."""
    found = []
    names = args.report_to or []
    for name in WRITERS if "all" in names else [name for name in names if name != "none"]:
        for module in WRITERS[name].modules:
            try:
                found.append((WRITERS[name], importlib.import_module(module)))
                break
            except ImportError:
                continue
        else:
            if "all" not in names:
                raise UserError(f"report_to: {name} is not installed: pip install {WRITERS[name].install}")
    return found


# ============================================================================================================== the log


class Log:
    """The log of a run: a tqdm bar or plain lines, metrics.jsonl, eval_metrics.jsonl, curves.png, report_to.

        log = Log(args, total, state)              # removes lines of an earlier attempt that come after state.step
        log.add_metrics({"sft_loss": 0.3})         # a micro-batch's part of further numbers of the current step
        start = log.begin()                        # before every step: the time
        log.step(state, loss=, lr=, grad_norm=, tokens=, seconds=)    # after it; state.step counts it already
        log.evaluation(state.step, metrics); log.print("text"); log.close()

    tokens: real input tokens of the step; seconds: its duration, without evaluation and saving. flops_per_token and
    peak_flops (of measure_matmul_peak) add model FLOPs utilization, "mfu". metrics: the names that add_metrics() sums.
    With several processes, "communication" is, for each axis, the share of the time since the last line that this rank
    spent in the axis's collectives, including waiting for slower ranks. Waiting for pipeline messages is "bubble".
    """

    def __init__(
        self,
        args: TrainingArgs,
        total: int,
        state: TrainState,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        topology: Topology = SINGLE,
        metrics: Iterable[str] = (),
    ):
        self.args, self.total, self.folder = args, total, Path(args.output_dir)
        self.topology, self.writes = topology, topology.rank == 0
        flops_per_process = (flops_per_token or 0) / topology.degrees.world
        self.mfu_per_speed = flops_per_process / peak_flops if flops_per_process and peak_flops else None
        self.window = collections.deque(maxlen=50)  # (tokens, seconds) of the last steps
        self.steps_since_line, self.seconds_since_line = 0, 0.0
        self.comm_seconds = {axis.name: 0.0 for axis in topology.axes if axis.size > 1}  # since the last line
        self.begin()
        self.metric_names = tuple(metrics)
        self.metrics = {}  # sums of the current step, see add_metrics()
        for name in ("metrics.jsonl", "eval_metrics.jsonl") if self.writes else ():
            _keep_lines(self.folder / name, lambda row: row["step"] <= state.step)
        self.writers = [writer(module, args) for writer, module in find_writers(args)] if self.writes else []
        hidden = args.disable_tqdm if args.disable_tqdm is not None else not (self.writes and sys.stderr.isatty())
        self.bar = None if hidden else tqdm(total=total, initial=state.step, desc="train", dynamic_ncols=True)

    def begin(self) -> float:
        """The time. Communication from here on belongs to the step, not to an evaluation or a checkpoint."""
        self.comm_before = {axis.name: axis.seconds for axis in self.topology.axes}
        return time.perf_counter()

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Add a micro-batch's part of further numbers to the line of the current step."""
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value

    def step(self, state: TrainState, loss: float, lr: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """Count a step; at logging steps and the last one, write its own loss, lr and grad_norm (not means)."""
        self.window.append((tokens, seconds))
        self.steps_since_line, self.seconds_since_line = self.steps_since_line + 1, self.seconds_since_line + seconds
        for axis in self.topology.axes:
            if axis.size > 1:
                self.comm_seconds[axis.name] += axis.seconds - self.comm_before[axis.name]
        added = self.topology.all_reduce_sum({name: self.metrics.get(name, 0.0) for name in self.metric_names}, True)
        self.metrics = {}
        recent = list(self.window)[-self.steps_since_line :]
        speed = sum(t for t, _ in recent) / max(1e-9, sum(s for _, s in recent))
        eta = (self.total - state.step) * sum(s for _, s in self.window) / len(self.window)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update(1)
        first = state.step == 1 and self.args.logging_first_step
        if state.step % self.args.logging_steps and state.step != self.total and not first:
            return
        row = {
            "step": state.step,
            "epoch": round(state.epoch, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": round(speed, 1),
            "consumed_tokens": state.consumed_tokens,
            "eta_seconds": round(eta, 1),
            "peak_memory_gb": round(peak_memory() / 1e9, 3),
        }
        row |= self._utilization(speed) | added
        self.steps_since_line, self.seconds_since_line = 0, 0.0
        self.comm_seconds = dict.fromkeys(self.comm_seconds, 0.0)
        state.log_history = (state.log_history + [row])[-20:]
        if self.writes:
            _append_line(self.folder / "metrics.jsonl", row)
        self._report("train", row)
        if self.bar is None:
            print(self._line(row, added, speed, eta), flush=True)

    def _utilization(self, speed):
        """{name: number} of a row: mfu, pipeline bubble, communication. speed: tokens per second."""
        row = {}
        if self.mfu_per_speed:
            row["mfu"] = round(speed * self.mfu_per_speed, 4)
        if (pp := self.topology.pp).size > 1:  # idle share of the step's forwards and backwards, and its formula
            row["bubble"] = round(
                self.topology.all_reduce_sum(pp.idle, stages=True) / (pp.size * self.topology.data_size), 4
            )
            row["bubble_formula"] = round(pp.bubble, 4)
        if self.comm_seconds:
            seconds = max(1e-9, self.seconds_since_line)
            row["communication"] = {name: round(comm / seconds, 4) for name, comm in self.comm_seconds.items()}
        return row

    def _line(self, row, added, speed, eta):
        """A row as one line for the console; speed and eta before they were rounded for the row."""
        parts = [
            f"step {row['step']}/{self.total} ({100 * row['step'] / self.total:.1f} %)",
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.3e}",
            f"grad_norm {row['grad_norm']:.3f}",
            f"{speed:,.0f} tokens/s",
        ]
        if "mfu" in row:
            parts.append(f"mfu {100 * row['mfu']:.1f} %")
        if "bubble" in row:
            parts.append(f"bubble {100 * row['bubble']:.1f} % (formula {100 * row['bubble_formula']:.1f} %)")
        parts.append(f"eta {datetime.timedelta(seconds=round(eta))}")
        parts.append(f"peak {row['peak_memory_gb']:.2f} GB")
        if added:
            parts.append(format_metrics(added))
        return " | ".join(parts)

    def evaluation(self, step: int, metrics: dict) -> None:
        """Print an evaluation's metrics and keep them: one line a step, also where a resumed run evaluates again."""
        path = self.folder / "eval_metrics.jsonl"
        if self.writes:
            _keep_lines(path, lambda row: row["step"] != step)
            _append_line(path, {"step": step, **metrics})
        self._report("eval", {"step": step, **metrics})
        self.print(f"evaluation at step {step}: {format_metrics(metrics)}")

    def print(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text)

    def _report(self, group, row):
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
        values = {f"{group}/{name.removeprefix('eval_')}": value for name, value in numbers.items()}
        for writer in self.writers:
            writer.write(row["step"], values)

    def close(self) -> None:
        """End the bar and draw curves.png."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for writer in self.writers:
            writer.close()
        self.writers = []
        if self.writes and (line := draw_curves(self.folder)):
            print(line, flush=True)


# ============================================================================================================ the files


def format_metrics(metrics: dict) -> str:
    """`loss 1.2345 | accuracy 0.6000 | …` for a line of output."""
    names = ((key.removeprefix("eval_"), value) for key, value in metrics.items())
    return " | ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in names)


def draw_curves(folder: Path) -> str:
    """Draw loss and learning rate over steps from the two .jsonl files as curves.png; returns a line to print."""
    rows, evaluations = (_read_lines(Path(folder) / name) for name in ("metrics.jsonl", "eval_metrics.jsonl"))
    if not rows:
        return "curves.png: no step was logged, nothing to draw"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "curves.png is not drawn: it needs matplotlib: pip install matplotlib"
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="train")
    points = [(row["step"], row["eval_loss"]) for row in evaluations if row.get("eval_loss") is not None]
    if points:
        above.plot(*zip(*points), "o-", label="eval")
    above.set_ylabel("loss")
    above.legend()
    below.plot([row["step"] for row in rows], [row["lr"] for row in rows], color="tab:green")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    with atomic_file(Path(folder) / "curves.png", "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    return f"curves: {Path(folder) / 'curves.png'}"


def _read_lines(path):
    """The objects of a .jsonl file, without a last line that was cut off when the run was killed."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _keep_lines(path, wanted):
    """Rewrite a .jsonl file with the rows for which wanted(row) is true."""
    if path.is_file():
        rows = [row for row in _read_lines(path) if wanted(row)]
        with atomic_file(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _append_line(path, row):
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON has no nan
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def peak_memory() -> int:
    """Peak memory in bytes: of the device on a GPU, else the process's resident set."""
    if paddle.device.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_matmul_peak(seconds: float = 0.8) -> float:
    """FLOP/s of the fastest of a few square products in the dtype that training computes in (kernels.bf16: bfloat16):
    the reference for model FLOPs utilization."""
    is_cpu = paddle.device.get_device().startswith("cpu")
    n, best, end = 1024 if is_cpu else 8192, math.inf, time.perf_counter() + seconds
    a = paddle.ones([n, n], "float32")
    product = kernels.linear if is_cpu else paddle.matmul  # a CPU's bfloat16 product is ours
    if kernels.bf16 and not is_cpu:
        a = a.astype("bfloat16")
    with paddle.no_grad():
        float(product(a, a)[0, 0])  # the first one starts the threads
        while time.perf_counter() < end:
            begin = time.perf_counter()
            float(product(a, a)[0, 0])  # float() waits for the device
            best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best if best < math.inf else 2 * n**3 / seconds
