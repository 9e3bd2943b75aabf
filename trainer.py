"""What scripts share besides model, data, kernels: arguments, presets, schedule, optimizer, checkpoints, log, metrics.

    args = parse_args(Args, ["configs/llama_lora.json", "--learning_rate", "1e-4"])    # JSON files, then --key value
    while state.step < total:                                   # the loop itself is written out in each script
        checkpoints.save(state)
        ...; optimizer.step(learning_rate(state.step, args, total), grad_scale)
        state.step += 1; log.step(state, loss=..., ...)

Argument names, defaults and meanings are PaddleNLP's, so that its JSON files run here with only their paths changed.
The tables IGNORED, OPTIONS and REFUSED name every upstream key that is not a field of ours, with the reason.

A checkpoint is a folder: weights in Hugging Face's layout, the optimizer in Unified Checkpoint's names, one
trainer_state.json with all sizes and checksums, and a marker written last. All tensors are whole, whatever the topology:
ranks write their shares of them and read what they hold, so that any topology goes on with any other's. No generator state is in it: all randomness is a pure function of
(seed, step, micro-step), see seed_step; so a resumed run equals the uninterrupted one bit for bit.
"""

import collections
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import re
import resource
import sys
import textwrap
import time
from pathlib import Path

import kernels

import numpy as np
import paddle
from tqdm import tqdm

from arguments import TrainingArgs, parse_args
from checkpoint import _moments_of, _quantized, _remove, _some
from distributed.collectives import gather_tensor_index
from distributed.watchdog import Launch, current_watchdog
from formats.files import UserError, _disk_full, atomic_file
from formats.weights import SaveEntry
from parallel import SINGLE, pipelined_map
from plan import dry_run


def run_script(main, Args, argv=None):
    """A script's last line: parse, run; what the user can mend becomes one line and exit code 2, a bug a traceback."""
    tokens = sys.argv[1:] if argv is None else argv
    if not tokens or {"-h", "--help"} & set(tokens):
        print((sys.modules[main.__module__].__doc__ or "").strip())
        print("\nKeys, in JSON or as --key value, and their defaults:")
        for field in dataclasses.fields(Args):
            print(f"  {field.name} = {field.default!r}")
        return
    together, args = current_watchdog(), None  # first of all, so that what goes wrong here ends all processes
    try:
        args = parse_args(Args, tokens)
        if getattr(args, "dry_run", False):
            print(dry_run(args), flush=True)
        else:
            args.check_model()
            _choose_device(args)
            main(args)
        if together is not None:
            together.shutdown()
    except SystemExit:
        raise
    except BaseException as error:
        code, line = _exit_status(error, getattr(args, "output_dir", ""))
        if together is not None:
            together.abort_on_error(error, code, line)
        if line is None:
            raise
        print(f"error: {line}" if code == 2 else line, file=sys.stderr)
        sys.exit(code)


def _exit_status(error, folder):
    """(exit code, line to show instead of a traceback, or None) of what has ended a script."""
    if isinstance(error, UserError):
        return 2, str(error)
    if _disk_full(error):
        return 2, f"{error.filename or folder}: the disk is full; free some space, then resume"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 1, None


def _choose_device(args):
    train_in_bf16 = args.bf16 and isinstance(args, TrainingArgs)
    if ":" in args.device and (world := Launch.of_environment().world) > 1:
        kind = args.device.partition(":")[0]
        raise UserError(
            f"device: {args.device!r} is one device, but this run has {world} processes; say {kind!r}, the launcher chooses"
        )
    kernels.configure(args.device, args.kernels, train_in_bf16)
    print(f"device: {paddle.device.get_device()}; kernels: {kernels.describe()}", flush=True)
    if kernels.bf16:
        print(
            "bf16: products of linears, attention and head in bfloat16, and frozen linears stored so; all else in float32"
        )
    elif train_in_bf16:
        print(f"bf16: {kernels.bf16_missing()}, so float32 is used")


# ========================================================================================= output directory

# What a run writes into output_dir; a folder with any of it holds a run (or a model), and only this is ever removed.
ARTIFACTS = """tmp-checkpoint-* tmp-model checkpoint-* config.json generation_config.json model*.safetensors
    *.safetensors.index.json adapter_config.json adapter_model.safetensors pytorch_model*.bin tokenizer.model
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.json metrics.jsonl
    eval_metrics.jsonl curves.png vdl_log *_results.json generated_output.json nonfinite-step-*.json predictions.jsonl
    prefix_projection.safetensors quant_report.json static_config.json prefill.json prefill.pdiparams decode.json
    decode.pdiparams static.pdiparams prefix.safetensors vocab.json merges.txt *.tiktoken ice_text.model
    sentencepiece.bpe.model chat_template.jinja""".split()


def check_output_dir(args):
    """Refuse (UserError) a folder that a new run must not write into; returns what overwrite_output_dir will remove.

    Writes nothing, so a script calls it first: a bad folder shows before data and model take their time.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; a folder is needed")
    if not getattr(args, "do_train", True) or getattr(args, "resume_from_checkpoint", None):
        return []
    found = sorted({path for pattern in ARTIFACTS for path in folder.glob(pattern)})
    if not found:
        return []
    names = ", ".join(path.name for path in found[:4]) + (", …" if len(found) > 4 else "")
    if not args.overwrite_output_dir:
        go_on = "resume_from_checkpoint: true to go on with it, " if hasattr(args, "resume_from_checkpoint") else ""
        raise UserError(
            f"output_dir: {folder} holds another run ({names}); set overwrite_output_dir: true to remove it, "
            f"{go_on}or choose another folder"
        )
    if not (folder / "run_args.json").is_file():
        raise UserError(f"output_dir: {folder} holds {names}, but no run of these scripts; choose another folder")
    for key, value in dataclasses.asdict(args).items():
        if not key.endswith(("_path", "_dir")) or key in ("output_dir", "logging_dir") or not isinstance(value, str):
            continue
        if Path(value).exists() and Path(value).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{key}: {value} lies in output_dir, which would be emptied; choose another output_dir")
    return found


def prepare_output_dir(args, topology=SINGLE):
    """Make output_dir ready to be written to, print the resolved arguments and keep them in run_args.json.

    The first rank does it, between two meetings of all. Call it after data and model have been read: a mistyped path must not cost the run that is to be overwritten.
    """
    folder, old = Path(args.output_dir), check_output_dir(args)
    topology.barrier()
    if topology.rank == 0:
        _prepare(folder, old, args)
    topology.barrier()


def _prepare(folder, old, args):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(args)
        shown = "arguments: " + " ".join(f"{key}={value!r}" for key, value in values.items())
        print(textwrap.fill(shown, 120, break_long_words=False), flush=True)
        if getattr(args, "do_train", True):
            for path in {
                *old,
                *folder.glob("tmp-checkpoint-*"),
                *folder.glob("tmp-model"),
                *folder.glob(".*.tmp"),
            }:  # tmp: left by a killed run
                _remove(path)
            with atomic_file(folder / "run_args.json") as file:
                json.dump(values, file, indent=2, ensure_ascii=False)
    except OSError as error:
        if _disk_full(error):
            raise
        raise UserError(f"output_dir: {folder} cannot be written to: {error.strerror}") from None


# ================================================================================ schedule, optimizer, randomness


def total_steps(args, batches_per_epoch, ranks=1):
    """(steps of the run, steps of an epoch). An epoch's last step takes the micro-batches left; none is dropped.

    ranks: how many have batches of their own.
    """
    if batches_per_epoch < 1:
        raise UserError("the training data is less than one batch: lower per_device_train_batch_size or add data")
    per_epoch = math.ceil(batches_per_epoch / (args.gradient_accumulation_steps * ranks))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch


def micro_batches(step, args, batches_per_epoch, ranks=1):
    """[(epoch, batch index)] of the micro-batches of step `step`, from 0: pure, so resuming needs no state.

    Those of all the ranks that have batches of their own.
    """
    each = args.gradient_accumulation_steps * ranks
    per_epoch = math.ceil(batches_per_epoch / each)
    epoch, first = step // per_epoch, step % per_epoch * each
    return [(epoch, i) for i in range(first, min(first + each, batches_per_epoch))]


def local_micro_batches(batches, topology):
    """[(batch, whether it counts)]: this rank's of those of all ranks; every rank has as many, some for company alone."""
    mine = [(batch, True) for batch in batches[topology.data_rank :: topology.data_size]]
    return mine + [(batches[0], False)] * (-(-len(batches) // topology.data_size) - len(mine))


def step_micro_batches(loader, step, args, topology):
    """This rank's micro-batches of a step. One that is for company alone has no labels, and "is_dummy": True."""
    places = micro_batches(step, args, loader.batches_per_epoch, topology.data_size)
    batches = []
    for place, counts in local_micro_batches(places, topology):
        batch = loader.batch(*place)
        if not counts:
            batch = {**batch, "labels": np.full_like(batch["labels"], -100), "tokens": 0, "is_dummy": True}
        batches.append(batch)
    return batches


def is_due(strategy, every, step, steps_per_epoch):
    """Whether something with this strategy ("no", "steps", "epoch") happens when `step` steps have been made."""
    return step > 0 and {"no": False, "steps": step % every == 0, "epoch": step % steps_per_epoch == 0}[strategy]


def learning_rate(step, args, total):
    """The learning rate of the step after `step` steps have been made (so of the first step: step = 0), of `total`.

    1) Warm-up: from 0, linear, to the peak at step == warm-up; as upstream, the very first step has rate 0.
    2) Then by lr_scheduler_type, x in [0, 1] being the progress from warm-up to decay_steps (polynomial: to total).
    3) After that, the end value. "constant" has no warm-up, the other names do.
    """
    peak, kind = args.learning_rate, args.lr_scheduler_type
    warmup = args.warmup_steps if args.warmup_steps > 0 else math.ceil(args.warmup_ratio * total)
    if kind == "constant":
        return peak
    if step < warmup:
        return peak * step / warmup
    if kind == "constant_with_warmup":
        return peak
    last = args.decay_steps if args.decay_steps and kind != "polynomial" else total
    low = args.min_lr if args.min_learning_rate is None else args.min_learning_rate
    if kind == "polynomial":
        low = args.lr_end
    x = (step - warmup) / max(1, last - warmup)
    if x >= 1:
        return low
    if kind == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(2 * math.pi * args.num_cycles * x))
    return low + (peak - low) * (1 - x) ** (args.power if kind == "polynomial" else 1)


class AdamW:
    """AdamW over named weights with float32 moments; only parameters of two or more dimensions decay.

    weights: Weight objects, or Piece ones: parts of weights, laid flat. lr_scale: {name: factor on the
    learning rate}, 1 where absent (LoRA+ gives B more). With `sharding: … offload` moments lie in the host's memory, pinned,
    and each weight's come to the device while it is updated.
    """

    def __init__(self, weights, args, lr_scale=None):
        names = [weight.name for weight in weights]
        assert len(set(names)) == len(names), f"names must be unique: {sorted(names)}"
        self.weights, self.args, self.lr_scale = weights, args, lr_scale or {}
        self.steps = 0  # made so far; bias correction counts from 1
        self.rounded = 0  # how often the moments came from a checkpoint that has them in few bits
        self.on_host = "offload" in (getattr(args, "sharding", None) or "")
        if self.on_host and paddle.device.get_device().startswith("cpu"):
            print(
                "sharding: offload changes nothing here: the device is the CPU, moments are in the host's memory anyway"
            )
            self.on_host = False
        self.moments = {w.name: [self._zeros(w.tensor.shape) for _ in range(2)] for w in weights}

    def _zeros(self, shape):
        moment = paddle.zeros(shape, "float32")
        return moment.pin_memory() if self.on_host else moment

    def step(self, lr, grad_scale=1.0):
        """Update every weight that has a gradient, which is multiplied by grad_scale (clipping, 1 / tokens) first."""
        self.steps += 1
        args = self.args
        for weight in self.weights:
            gradient = weight.grad
            if gradient is None:
                continue
            decay = args.weight_decay if len(weight.shape) >= 2 else 0.0
            rate = lr * self.lr_scale.get(weight.name, 1.0)
            kept = self.moments[weight.name]
            moments = [moment._copy_to(gradient.place, True) for moment in kept] if self.on_host else kept
            constants = args.adam_beta1, args.adam_beta2, args.adam_epsilon, decay
            kernels.adamw(weight.tensor, gradient, *moments, self.steps, rate, *constants, grad_scale)
            if self.on_host:
                for there, moment in zip(kept, moments):
                    there.copy_(moment, True)

    def zero_grad(self):
        for weight in self.weights:
            weight.clear_gradient()

    def entries(self, shards, stage="O0"):
        """[SaveEntry] of moments and beta powers in Unified Checkpoint's names and the weights' file layout.

        stage: of ckpt_quant_stage. Every weight is named on every rank that holds it, whoever has its moments.
        """
        powers = {f"beta{i}_pow_acc_0": getattr(self.args, f"adam_beta{i}") ** (self.steps + 1) for i in (1, 2)}
        found = []
        for weight in shards.weights:
            place, moments = shards.place_of(weight), self.moments.get(weight.name, (None, None))
            sources = [(weight, shards.laid(weight, moment), *place) for moment in moments]
            names = [f"{weight.name}/moment{i}_0" for i in (1, 2)]
            if stage == "O0" or len(weight.shape) < 2:
                found += [
                    SaveEntry({name: (weight.shape, "float32")}, [source]) for name, source in zip(names, sources)
                ]
            else:
                found.append(_quantized(names, weight.shape, sources, stage))
            for key, power in powers.items():
                power = np.array([power], np.float32)
                found.append(
                    SaveEntry({f"{weight.name}/{key}": ([1], "float32")}, [], functools.partial(list, [power]))
                )
        return found

    def load(self, found, shards):
        """The moments back, exactly; found: of stored_tensors. Each rank reads what it has.

        `steps`, which a power in float32 cannot give back, is set by load_checkpoint.
        """
        read = {key: value for key, value in found.items() if "@" not in key and not key.endswith("_pow_acc_0")}
        names = {key.rpartition("/")[0] for key in read}
        mine = {weight.name for weight in shards.weights}
        shards.topology.barrier()  # reading weights may have taken one of them longer
        trained = gather_tensor_index(dict.fromkeys(sorted(mine), 0), shards.topology)[0].keys()  # on any rank
        if names != trained:
            missing, extra = _some(trained - names), _some(names - trained)
            raise UserError(f"optimizer state is not of what is trained now: missing {missing}; unexpected {extra}")
        for weight in shards.weights:
            if weight.name not in self.moments:  # another rank's
                continue
            for i, array in enumerate(_moments_of(weight, found, shards.extent(weight))):
                self.moments[weight.name][i].set_value(array)


@paddle.no_grad()
def global_grad_norm(weights):
    """Euclidean norm over all gradients; squares are summed in float64."""
    gradients = [weight.parameter.grad for weight in weights]
    squares = [kernels.squared_norm(gradient) for gradient in gradients if gradient is not None]
    return math.sqrt(float(paddle.stack(squares).sum())) if squares else 0.0


def clip_scale(norm, max_norm):
    """The factor that brings a gradient of this norm down to max_norm; 1.0 if it is below, or max_norm is 0."""
    return max_norm / norm if 0 < max_norm < norm else 1.0


def seed_step(seed, step, micro_step=0):
    """Seed dropout and noise of one micro-step from (seed, step, micro-step) alone: nothing to save, resuming exact."""
    digest = hashlib.blake2b(f"{seed} {step} {micro_step}".encode(), digest_size=4).digest()
    paddle.seed(int.from_bytes(digest, "little") & 0x7FFFFFFF)


# ====================================================================================================== log


class Log:
    """The log of a run: a tqdm bar or plain lines, metrics.jsonl, eval_metrics.jsonl, curves.png, visualdl if asked.

        log = Log(args, total, state)            # drops lines of an earlier attempt that lie after state.step
        log.add({"sft_loss": 0.3})               # a micro-batch's part of further figures of the step that is being made
        start = log.begin()                      # before every step: the time
        log.step(state, loss=, lr=, grad_norm=, tokens=, seconds=)    # after it; state.step counts it already
        log.evaluation(state.step, metrics); log.say("text"); log.close()

    tokens: real input tokens of the step; seconds: its duration, without evaluation and saving. flops_per_token and
    peak_flops (of measure_matmul_peak) add model FLOPs utilisation, "mfu". With several processes, "communication" is the
    share of the steps' time since the last line that this rank was in each axis's collectives, waiting for slower ranks
    too; what a pipeline waits for messages is not in it, but is "bubble".
    """

    def __init__(self, args, total, state, flops_per_token=None, peak_flops=None, topology=SINGLE, figures=()):
        self.args, self.total, self.folder, self.utilisation = args, total, Path(args.output_dir), None
        self.topology, self.writes = topology, topology.rank == 0
        if flops_per_token and peak_flops:
            self.utilisation = flops_per_token / peak_flops
        self.window = collections.deque(maxlen=50)  # (tokens, seconds) of the last steps
        self.since, self.spent = 0, 0.0  # steps since the last line, and their seconds
        self.talked = {axis.name: 0.0 for axis in topology.axes if axis.size > 1}  # seconds of theirs
        self.begin()
        self.names = figures
        self.figures = {}  # of the step that is being made, see add()
        for name in ("metrics.jsonl", "eval_metrics.jsonl") if self.writes else ():
            _keep_lines(self.folder / name, lambda row: row["step"] <= state.step)
        self.writer = self._visualdl() if "visualdl" in (args.report_to or ()) and self.writes else None
        hidden = args.disable_tqdm if args.disable_tqdm is not None else not (self.writes and sys.stderr.isatty())
        self.bar = None if hidden else tqdm(total=total, initial=state.step, desc="train", dynamic_ncols=True)

    def _visualdl(self):
        try:
            from visualdl import LogWriter
        except ImportError:
            raise UserError("report_to: visualdl is not installed: pip install visualdl") from None
        return LogWriter(logdir=self.args.logging_dir or str(self.folder / "vdl_log"))

    def begin(self):
        """The time. What is talked from here on is the step's, and not evaluation's or a checkpoint's."""
        self.before = {axis.name: axis.seconds for axis in self.topology.axes}
        return time.perf_counter()

    def add(self, figures):
        """Further figures for the line of the step that is being made; those of its micro-batches are summed."""
        for name, value in figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + value

    def step(self, state, loss, lr, grad_norm, tokens, seconds):
        """Count a step; at logging steps (and the last) write its line: its own loss, lr, grad_norm, not means."""
        self.window.append((tokens, seconds))
        self.since, self.spent = self.since + 1, self.spent + seconds
        for axis in self.topology.axes:
            if axis.size > 1:
                self.talked[axis.name] += axis.seconds - self.before[axis.name]
        added, self.figures = self.topology.all_reduce_sum({n: self.figures.get(n, 0.0) for n in self.names}, True), {}
        recent = list(self.window)[-self.since :]
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
        if self.utilisation:
            row["mfu"] = round(speed * self.utilisation, 4)
        if (pp := self.topology.pp).size > 1:  # idle share of the step's forwards and backwards, beside the formula
            row["bubble"] = round(
                self.topology.all_reduce_sum(pp.idle, stages=True) / (pp.size * self.topology.data_size), 4
            )
            row["bubble_formula"] = round(pp.bubble, 4)
        if self.talked:
            row["communication"] = {
                name: round(talked / max(1e-9, self.spent), 4) for name, talked in self.talked.items()
            }
        self.since, self.spent, self.talked = 0, 0.0, dict.fromkeys(self.talked, 0.0)
        row.update(added)
        state.log_history = (state.log_history + [row])[-20:]
        if self.writes:
            _append_line(self.folder / "metrics.jsonl", row)
        self._report("train", row)
        if self.bar is None:
            mfu = f" | mfu {100 * row['mfu']:.1f} %" if self.utilisation else ""
            done, left = 100 * state.step / self.total, datetime.timedelta(seconds=round(eta))
            figures = f"loss {loss:.4f} | lr {lr:.3e} | grad_norm {grad_norm:.3f} | {speed:,.0f} tokens/s{mfu}"
            if "bubble" in row:
                figures += f" | bubble {100 * row['bubble']:.1f} % (formula {100 * row['bubble_formula']:.1f} %)"
            rest = " | ".join(
                filter(None, [f"eta {left} | peak {row['peak_memory_gb']:.2f} GB", format_metrics(added)])
            )
            print(f"step {state.step}/{self.total} ({done:.1f} %) | {figures} | {rest}", flush=True)

    def evaluation(self, step, metrics):
        """Print what evaluate() found and keep it, one line a step however often a resumed run evaluates there."""
        path = self.folder / "eval_metrics.jsonl"
        if self.writes:
            _keep_lines(path, lambda row: row["step"] != step)
            _append_line(path, {"step": step, **metrics})
        self._report("eval", {"step": step, **metrics})
        self.say(f"evaluation at step {step}: {format_metrics(metrics)}")

    def say(self, text):
        """A line that does not tear the bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text)

    def _report(self, group, row):
        if self.writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{group}/{name}", value, row["step"])

    def close(self):
        """End the bar and draw curves.png."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.writer is not None:
            self.writer.close()
        if self.writes and (line := draw_curves(self.folder)):
            print(line, flush=True)


def draw_curves(folder):
    """Draw curves.png, loss and learning rate over steps, from the two .jsonl files; returns a line to print."""
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
    """The objects of a .jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _keep_lines(path, wanted):
    """Rewrite a .jsonl with the rows for which wanted(row)."""
    if path.is_file():
        rows = [row for row in _read_lines(path) if wanted(row)]
        with atomic_file(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _append_line(path, row):
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON has no nan
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def peak_memory():
    """Bytes: the device's peak on an accelerator, else this process's peak resident set."""
    if paddle.device.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_matmul_peak(seconds=0.8):
    """FLOP/s of the best of a few float32 matmuls of 1024 x 1024: what utilisation is measured against."""
    n, best, end = 1024, math.inf, time.perf_counter() + seconds
    a = paddle.ones([n, n], "float32")
    float(paddle.matmul(a, a)[0, 0])  # the first one starts the threads
    while time.perf_counter() < end:
        begin = time.perf_counter()
        float(paddle.matmul(a, a)[0, 0])  # float() waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best if best < math.inf else 2 * n**3 / seconds


def save_nonfinite_report(output_dir, step, batch):
    """Write a batch whose loss is not finite (ids, labels, record indices) to nonfinite-step-N.json; returns that."""
    path = Path(output_dir) / f"nonfinite-step-{step}.json"
    with atomic_file(path) as file:
        json.dump({"step": step, **batch}, file, default=lambda value: np.asarray(value).tolist())
    return path


def check_finite(value, output_dir, step, batch):
    """Stop the run when a loss or gradient norm is not finite, keeping the batch that gave it: UserError."""
    if not math.isfinite(value):
        report = save_nonfinite_report(output_dir, step, batch)
        advice = "resume from the last checkpoint with a lower learning_rate, or look at these records"
        raise UserError(f"step {step}: the loss or its gradient is {value}; its batch is in {report}; {advice}")


def set_recompute(model, args):
    """What the model keeps of a forward pass for its backward."""
    layers, L = args.no_recompute_layers or [], model.config.num_hidden_layers
    if max(layers, default=0) >= L:
        raise UserError(f"no_recompute_layers: {max(layers)}; the model's {L} layers are counted from 0")
    model.recompute, model.recompute_granularity = args.recompute, args.recompute_granularity
    model.no_recompute_layers = frozenset(layers)


def check_vocabulary(model, tokenizer, path):
    """UserError if the tokenizer has ids that the model's embedding has no row for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        found = f"vocab_size {model.config.vocab_size} in config.json, but the tokenizer has {tokenizer.vocab_size} ids"
        raise UserError(f"{path}: {found}; they belong to different models")


def check_positions(model, path, needed):
    """UserError if what keys ask for, {their names: tokens}, goes past the end of the model's table of learned positions."""
    limit = model.config.max_position_embeddings
    key, tokens = max(needed.items(), key=lambda item: item[1])
    if model.config.position == "learned" and tokens > limit:
        raise UserError(f"{path}: has learned {limit} positions; {key} asks for {tokens}; lower it")


def format_metrics(metrics):
    """`loss 1.2345 | accuracy 0.6000 | …` for a line of output."""
    names = ((key.removeprefix("eval_"), value) for key, value in metrics.items())
    return " | ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in names)


def write_results(output_dir, name, metrics, topology=SINGLE):
    """Keep what an evaluation found in output_dir/NAME_results.json."""
    if topology.rank == 0:
        with atomic_file(Path(output_dir) / f"{name}_results.json") as file:
            json.dump(metrics, file, indent=2, ensure_ascii=False)


# ============================================================================================== evaluation


def model_inputs(batch):
    """{name: tensor} of what the model takes from a batch: input_ids, position_ids, startend_row_indices, labels."""
    names = ("input_ids", "position_ids", "startend_row_indices", "labels")
    return {name: paddle.to_tensor(batch[name]) for name in names if batch.get(name) is not None}


@paddle.no_grad()
def evaluate(model, loader, max_batches=None, topology=SINGLE):
    """Mean loss, accuracy and perplexity per target token over a loader's epoch 0 (its first max_batches, if > 0).

    Sums, not means of means: the figures do not depend on how samples fall into batches, nor on which rank has which.
    """
    was_training, loss, correct, tokens = model.training, 0.0, 0, 0
    model.eval()
    batches = loader.batches_per_epoch
    indices = list(range(min(max_batches, batches) if max_batches and max_batches > 0 else batches))

    def inputs(item):
        return {**model_inputs(item[0]), "return_predictions": True}

    places = ((loader.batch(0, index), counts) for index, counts in local_micro_batches(indices, topology))
    for (batch, counts), (losses, predictions) in pipelined_map(model, places, inputs, lambda outputs, batch: outputs):
        if not counts:
            continue
        target = batch["labels"] != -100  # (B, T)
        loss += float(losses.astype("float64").sum())
        correct += int((predictions.numpy() == batch["labels"])[target].sum())
        tokens += int(target.sum())
    if was_training:
        model.train()
    loss, correct, tokens = topology.all_reduce_sum((loss, correct, tokens))
    if not tokens:
        raise UserError("evaluation: the data has no target token")
    mean = loss / tokens
    ppl = math.exp(mean) if mean < 700 else math.inf
    return {"eval_loss": mean, "eval_accuracy": correct / tokens, "eval_ppl": ppl, "eval_tokens": tokens}


# Chinese, Japanese and Korean characters count one by one; other scripts by words; a punctuation mark is a token.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002ffff"


_TOKEN = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


def bleu4(hypotheses, references):
    """Corpus BLEU of n-grams up to 4, one reference each, in [0, 1] (Papineni et al., 2002); 0 if an order has none.

    exp(min(0, 1 - r/c)) · (p1 p2 p3 p4)^(1/4): p clipped precisions over the corpus, r and c the lengths of references
    and hypotheses.
    """
    assert len(hypotheses) == len(references), (len(hypotheses), len(references))
    matches, totals, c, r = [0] * 4, [0] * 4, 0, 0
    for hypothesis, reference in zip(hypotheses, references):
        h, g = _TOKEN.findall(hypothesis), _TOKEN.findall(reference)
        c, r = c + len(h), r + len(g)
        for n in range(1, 5):
            counts = _ngrams(h, n)
            matches[n - 1] += (counts & _ngrams(g, n)).total()
            totals[n - 1] += counts.total()
    if not all(matches):
        return 0.0
    return math.exp(min(0.0, 1 - r / c) + sum(math.log(m / t) for m, t in zip(matches, totals)) / 4)


def rouge(hypotheses, references):
    """ROUGE-1, -2, -L (Lin, 2004): F1 of common n-grams or longest common subsequence; mean over pairs, in [0, 1]."""
    assert len(hypotheses) == len(references), (len(hypotheses), len(references))
    sums = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    for hypothesis, reference in zip(hypotheses, references):
        h, g = _TOKEN.findall(hypothesis), _TOKEN.findall(reference)
        for n in (1, 2):
            common = (_ngrams(h, n) & _ngrams(g, n)).total()
            sums[f"rouge-{n}"] += _f1(common, max(0, len(h) - n + 1), max(0, len(g) - n + 1))
        sums["rouge-l"] += _f1(_lcs_length(h, g), len(h), len(g))
    return {name: value / max(1, len(references)) for name, value in sums.items()}


def _ngrams(tokens, n):
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


def _f1(common, found, wanted):
    return 2 * common / (found + wanted) if common else 0.0


def _lcs_length(a, b):
    """Length of the longest common subsequence, a bit per token of `a` (Hyyrö, 2004): a 0 bit of `row` is a match."""
    places = collections.defaultdict(int)
    for i, token in enumerate(a):
        places[token] |= 1 << i
    every = (1 << len(a)) - 1
    row = every
    for token in b:
        hits = row & places[token]
        row = ((row + hits) | (row - hits)) & every
    return len(a) - row.bit_count()
