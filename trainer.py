"""What the training scripts share: start and exit, set-up, output folder, schedule, AdamW, log, evaluation.

    run = setup_training(args, model, tokenizer, train, topology)   # optimizer, resume, output_dir, log
    while state.step < total:                                       # the loop itself is written out in each script
        ...; optimizer.step(learning_rate(state.step, args, total), clip_scale(grad_norm, args.max_grad_norm))
        state.step += 1; log.step(state, loss, lr, grad_norm, tokens, seconds)
    finish_training(run, model, args)                               # best checkpoint, final model

No generator state is saved: all randomness is a pure function of (seed, step, micro-step), see seed_step, so that a
resumed run equals the uninterrupted one bit for bit.
"""

import collections
import contextlib
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import kernels

import numpy as np
import paddle
from tqdm import tqdm

from adapters import (
    apply_lora,
    apply_prefix,
    cast_frozen_to_bf16,
    load_adapter,
    lora_layers,
    restore_adapter,
    trainable_weights,
)
from arguments import ScriptArgs, TrainingArgs, parse_args
from checkpoint import (
    CheckpointManager,
    TrainState,
    load_checkpoint,
    load_trained,
    lock_output_dir,
    read_moments,
    remove_path,
)
from data import CorpusLoader, SFTLoader
from distributed.collectives import gather_tensor_index
from distributed.sharding import ZeroOptimizer
from distributed.watchdog import Launch, current_watchdog
from formats.chat import load_chat_template
from formats.files import UserError, _disk_full, atomic_file, write_error
from formats.quantized_moments import quantized_moments
from formats.tokenizer import Tokenizer, load_tokenizer
from formats.weights import SaveEntry, SaveSource
from model import CausalLM, generate
from parallel import SINGLE, Topology, pipelined_map, shard_adapters
from plan import dry_run

Loader = SFTLoader | CorpusLoader  # .batches_per_epoch, .batch(epoch, index) -> the dict described in data.py

# ====================================================================================================== start and exit


def run_script(main: Callable, Args: type, argv: list[str] | None = None) -> None:
    """A script's last line: parse the arguments and run main(args).

    What the user can put right ends with one line and exit code 2; a bug ends with its traceback.
    """
    tokens = sys.argv[1:] if argv is None else argv
    if not tokens or {"-h", "--help"} & set(tokens):
        print((sys.modules[main.__module__].__doc__ or "").strip())
        print("\nKeys, in JSON or as --key value, and their defaults:")
        for field in dataclasses.fields(Args):
            print(f"  {field.name} = {field.default!r}")
        return
    together, args = current_watchdog(), None  # first of all, so that an error from here on ends all processes
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
        code, line = exit_status(error, getattr(args, "output_dir", ""))
        if together is not None:
            together.abort_on_error(error, exit_code=code, message=line)
        if line is None:
            raise
        print(f"error: {line}" if code == 2 else line, file=sys.stderr)
        sys.exit(code)


def exit_status(error: BaseException, folder: str) -> tuple[int, str | None]:
    """(exit code, line to print; None for a bug, which keeps its traceback) of the error that ended a script."""
    if isinstance(error, UserError):
        return 2, str(error)
    if line := write_error(error, folder):
        return 2, line
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 1, None


def _choose_device(args):
    """Choose device, kernels and precision for this process, and print them."""
    train_in_bf16 = args.bf16 and isinstance(args, TrainingArgs)
    if ":" in args.device and (world := Launch.of_environment().world) > 1:
        kind = args.device.partition(":")[0]
        raise UserError(
            f"device: {args.device!r} is one device, but this run has {world} processes; use {kind!r}: the launcher "
            "gives each process its device"
        )
    kernels.configure(args.device, args.kernels, train_in_bf16)
    print(f"device: {paddle.device.get_device()}; kernels: {kernels.describe()}", flush=True)
    if kernels.bf16:
        print(
            "bf16: linears, attention and head multiply in bfloat16, frozen linears are stored in it; "
            "everything else is float32"
        )
    elif train_in_bf16:
        print(f"bf16: {kernels.bf16_missing()}, so float32 is used")


# ============================================================================================================== set-up


@dataclasses.dataclass
class Run:
    """What setup_training() makes for the training loop."""

    optimizer: "AdamW"
    shards: ZeroOptimizer  # reduces gradients over the ranks and gathers the updated weights
    state: TrainState  # step, epoch, tokens, best checkpoint
    total_steps: int  # step at which the run ends
    steps_per_epoch: int
    log: "Log"
    checkpoints: CheckpointManager


def setup_tokenizer(args: ScriptArgs) -> Tokenizer:
    """The tokenizer of tokenizer_name_or_path, else of model_name_or_path, with chat_template if that is given."""
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.model_name_or_path)
    if getattr(args, "chat_template", None) is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)
    return tokenizer


def trains_adapter(args: TrainingArgs) -> bool:
    """Whether LoRA or a prefix is trained, not the model's own weights."""
    return getattr(args, "lora", False) or getattr(args, "prefix_tuning", False)


def setup_adapter(model: CausalLM, args: TrainingArgs, checkpoint: Path | None = None) -> None:
    """Attach the LoRA or prefix that is trained: from a checkpoint, from lora_path or prefix_path, or a new one."""
    if not trains_adapter(args):
        return
    path = checkpoint or args.lora_path or getattr(args, "prefix_path", None)
    if path:
        load_adapter(model, path, trainable=True)
        wanted = f"LoRA of rank {args.lora_rank}" if args.lora else f"a prefix of {args.num_prefix_tokens} tokens"
        if lora_layers(model):
            loaded = f"LoRA of rank {model.lora_config['r']}"
        else:
            loaded = f"a prefix of {model.prefix.tokens} tokens"
        if loaded != wanted:
            raise UserError(f"{path}: holds {loaded}, but the arguments ask for {wanted}")
    elif args.lora:
        apply_lora(
            model,
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=getattr(args, "lora_dropout", 0.0),
            rslora=args.rslora,
            dora=args.dora,
            pissa=getattr(args, "pissa", False),
            targets=args.lora_target_modules,
            seed=args.seed,
        )
    else:
        apply_prefix(
            model,
            tokens=args.num_prefix_tokens,
            projection=args.prefix_projection,
            projection_hidden_size=args.prefix_projection_hidden_size,
            seed=args.seed,
        )


def setup_training(
    args: TrainingArgs,
    model: CausalLM,
    tokenizer: Tokenizer,
    train: Loader,
    topology: Topology,
    *,
    checkpoint: Path | None = None,
    metrics: Iterable[str] = (),
    flops_per_token: float | None = None,
) -> Run:
    """Optimizer, resume, output folder and log of a training run.

    Everything that can be refused is refused before output_dir is emptied: a wrong argument must not cost the run that
    it would replace. train: the loader. checkpoint: of find_checkpoint(); setup_adapter() has loaded an adapter from it
    already. metrics: names of further numbers in each log line, see Log. flops_per_token: adds model FLOPs utilization
    to the log.
    """
    _visualdl(args)
    shard_adapters(model, topology)
    if kernels.bf16:
        cast_frozen_to_bf16(model)
    weights = trainable_weights(model)
    shards = ZeroOptimizer(model, weights, topology)
    parameters, trained = model.num_parameters(), model.num_parameters(trained=True)
    print(f"model: {parameters:,} parameters, {trained:,} of them trained ({100 * trained / parameters:.2f} %)")
    lora_plus_scale = getattr(args, "lora_plus_scale", 1.0)
    lr_scale = {weight.name: lora_plus_scale for weight in weights if ".lora_B." in weight.name}
    optimizer = AdamW(shards.pieces, args, lr_scale=lr_scale if lora_plus_scale != 1.0 else None)
    steps, steps_per_epoch = total_steps(args, train.batches_per_epoch, topology.data_size)
    state = TrainState()
    if checkpoint:
        if not trains_adapter(args):
            load_trained(model, checkpoint, args)
        moments = None if args.ignore_load_lr_and_optim else optimizer
        state = load_checkpoint(checkpoint, moments, shards, args.output_dir)
    prepare_output_dir(args, topology)

    if state.step >= steps:
        print(f"nothing left to train: step {state.step} of {steps} is reached; raise max_steps or num_train_epochs")
    peak_flops = None
    if flops_per_token is not None:
        peak_flops = measure_matmul_peak()
        print(f"matmul peak: {peak_flops / 1e9:,.0f} GFLOP/s float32, measured; mfu is relative to it")
    log = Log(
        args, steps, state, flops_per_token=flops_per_token, peak_flops=peak_flops, topology=topology, metrics=metrics
    )
    checkpoints = CheckpointManager(args, model, tokenizer, optimizer=optimizer, shards=shards, topology=topology)
    return Run(optimizer, shards, state, steps, steps_per_epoch, log, checkpoints)


def finish_training(run: Run, model: CausalLM, args: TrainingArgs) -> None:
    """Load the best checkpoint if load_best_model_at_end, then write the model or adapter to output_dir."""
    state = run.state
    if args.load_best_model_at_end and state.best_checkpoint:
        run.log.print(f"best: {state.best_checkpoint}, {args.metric_for_best_model} {state.best_metric:.4f}")
        best = Path(args.output_dir) / state.best_checkpoint
        restore_adapter(model, best) if trains_adapter(args) else load_trained(model, best, args)
    run.log.close()
    run.checkpoints.write_model(args.output_dir, args.save_dtype)
    print(f"{'adapter' if trains_adapter(args) else 'model'}: {args.output_dir}")


def set_recompute(model: CausalLM, args: TrainingArgs) -> None:
    """Tell the model which activations to recompute in backward."""
    layers, L = args.no_recompute_layers or [], model.config.num_hidden_layers
    if max(layers, default=0) >= L:
        raise UserError(f"no_recompute_layers: {max(layers)}; the model has {L} layers, counted from 0")
    model.recompute, model.recompute_granularity = args.recompute, args.recompute_granularity
    model.no_recompute_layers = frozenset(layers)


def check_vocabulary(model: CausalLM, tokenizer: Tokenizer, path: str) -> None:
    """UserError if the tokenizer has ids that the model's embedding has no row for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path}: vocab_size {model.config.vocab_size} in config.json, but the tokenizer has "
            f"{tokenizer.vocab_size} ids; they belong to different models"
        )


def check_positions(model: CausalLM, path: str, needed: dict[str, int]) -> None:
    """UserError if a model with learned positions has too few. needed: {name of the key: positions it asks for}."""
    limit = model.config.max_position_embeddings
    key, tokens = max(needed.items(), key=lambda item: item[1])
    if model.config.position == "learned" and tokens > limit:
        raise UserError(f"{path}: has {limit} learned positions, but {key} asks for {tokens}; lower it")


# ======================================================================================================= output folder

# What a run writes into output_dir. A folder with any of it holds a run or a model; nothing else is ever removed.
ARTIFACTS = """tmp-checkpoint-* tmp-model checkpoint-* config.json generation_config.json model*.safetensors
    *.safetensors.index.json adapter_config.json adapter_model.safetensors pytorch_model*.bin tokenizer.model
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.json metrics.jsonl
    eval_metrics.jsonl curves.png vdl_log *_results.json generated_output.json nonfinite-step-*.json predictions.jsonl
    prefix_projection.safetensors quant_report.json static_config.json prefill.json prefill.pdiparams decode.json
    decode.pdiparams static.pdiparams prefix.safetensors vocab.json merges.txt *.tiktoken ice_text.model
    sentencepiece.bpe.model chat_template.jinja""".split()
TEMPORARY = ("tmp-checkpoint-*", "tmp-model", ".*.tmp")


def check_output_dir(args: ScriptArgs) -> list[Path]:
    """UserError for a folder that a new run must not write to; returns what overwrite_output_dir will remove.

    It writes nothing. Scripts call it first, so that a wrong folder is refused before data and model are read.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; a folder is needed")
    if not getattr(args, "do_train", True) or getattr(args, "resume_from_checkpoint", None):
        return []
    artifacts = sorted({path for pattern in ARTIFACTS for path in folder.glob(pattern)})
    if not artifacts:
        return []
    names = ", ".join(path.name for path in artifacts[:4]) + (", …" if len(artifacts) > 4 else "")
    if not args.overwrite_output_dir:
        resume = "resume_from_checkpoint: true to continue it, " if hasattr(args, "resume_from_checkpoint") else ""
        raise UserError(
            f"output_dir: {folder} holds another run ({names}); set overwrite_output_dir: true to remove it, "
            f"{resume}or choose another folder"
        )
    if not (folder / "run_args.json").is_file():
        raise UserError(f"output_dir: {folder} holds {names}, but no run of these scripts; choose another folder")
    for key, value in dataclasses.asdict(args).items():
        if not key.endswith(("_path", "_dir")) or key in ("output_dir", "logging_dir") or not isinstance(value, str):
            continue
        if Path(value).exists() and Path(value).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{key}: {value} is inside output_dir, which would be emptied; choose another output_dir")
    return artifacts


def prepare_output_dir(args: ScriptArgs, topology: Topology = SINGLE) -> None:
    """Rank 0 locks and empties output_dir and writes run_args.json; call it once nothing can be refused any more."""
    folder, old = Path(args.output_dir), check_output_dir(args)
    lock_output_dir(args, topology)
    topology.barrier()
    if topology.rank == 0:
        _prepare(folder, old, args)
    topology.barrier()


def _prepare(folder, old, args):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        changed = " ".join(f"{key}={value!r}" for key, value in changed_arguments(args).items())
        print(textwrap.fill(f"arguments: {changed}", 120, break_long_words=False, break_on_hyphens=False), flush=True)
        if getattr(args, "do_train", True):
            left_by_killed_run = (path for pattern in TEMPORARY for path in folder.glob(pattern))
            for path in {*old, *left_by_killed_run}:
                remove_path(path)
            with atomic_file(folder / "run_args.json") as file:
                json.dump(dataclasses.asdict(args), file, indent=2, ensure_ascii=False)
    except OSError as error:
        if _disk_full(error):
            raise
        raise UserError(f"output_dir: {folder} cannot be written to: {error.strerror}") from None


def changed_arguments(args: ScriptArgs) -> dict:
    """{key: value} of the arguments that differ from their defaults; all of them are in run_args.json."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    values = dataclasses.asdict(args).items()
    return {key: value for key, value in values if value != defaults[key] and (value or defaults[key])}


# ===================================================================================== schedule, optimizer, randomness


def total_steps(args: TrainingArgs, batches_per_epoch: int, ranks: int = 1) -> tuple[int, int]:
    """(steps of the run, steps of an epoch). An epoch's last step takes the micro-batches left; none is dropped.

    ranks: the data-parallel ranks.
    """
    if batches_per_epoch < 1:
        raise UserError("the training data is less than one batch; lower per_device_train_batch_size or add data")
    per_epoch = math.ceil(batches_per_epoch / (args.gradient_accumulation_steps * ranks))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch


def micro_batches(step: int, args: TrainingArgs, batches_per_epoch: int, ranks: int = 1) -> list[tuple[int, int]]:
    """[(epoch, batch index)] of all micro-batches of step `step`, counted from 0, over all data-parallel ranks.

    A pure function, so that resuming needs no state.
    """
    each = args.gradient_accumulation_steps * ranks
    per_epoch = math.ceil(batches_per_epoch / each)
    epoch, first = step // per_epoch, step % per_epoch * each
    return [(epoch, i) for i in range(first, min(first + each, batches_per_epoch))]


def local_micro_batches(batches: list, topology: Topology) -> list[tuple]:
    """[(batch, is_real)]: this rank's micro-batches of those of all ranks, padded with dummies to an equal number."""
    local = [(batch, True) for batch in batches[topology.data_rank :: topology.data_size]]
    return local + [(batches[0], False)] * (-(-len(batches) // topology.data_size) - len(local))


def step_micro_batches(loader: Loader, step: int, args: TrainingArgs, topology: Topology) -> list[dict]:
    """This rank's micro-batches of a step. A dummy one has no labels, and "is_dummy": True."""
    indices = micro_batches(step, args, loader.batches_per_epoch, topology.data_size)
    batches = []
    for index, is_real in local_micro_batches(indices, topology):
        batch = loader.batch(*index)
        if not is_real:
            batch = {**batch, "labels": np.full_like(batch["labels"], -100), "tokens": 0, "is_dummy": True}
        batches.append(batch)
    return batches


def is_due(strategy: str, every: int, step: int, steps_per_epoch: int) -> bool:
    """Whether evaluating or saving with this strategy ("no", "steps", "epoch") is due after `step` steps."""
    return step > 0 and {"no": False, "steps": step % every == 0, "epoch": step % steps_per_epoch == 0}[strategy]


def learning_rate(step: int, args: TrainingArgs, total: int) -> float:
    """The learning rate of step `step` of `total`, counted from 0.

    1) Warm-up: linear from 0 to the peak at step == warm-up; as in PaddleNLP, the very first step has rate 0.
    2) Then by lr_scheduler_type; x in [0, 1] is the progress from warm-up to decay_steps (polynomial: to total).
    3) After that, the end value. "constant" has no warm-up, the other schedules do.
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
    low = args.lr_end if kind == "polynomial" else args.min_learning_rate
    x = (step - warmup) / max(1, last - warmup)
    if x >= 1:
        return low
    if kind == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(2 * math.pi * args.num_cycles * x))
    return low + (peak - low) * (1 - x) ** (args.power if kind == "polynomial" else 1)


def _some(names):
    """A few of a set of names, for a message."""
    names = sorted(names)
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"


class AdamW:
    """AdamW over named weights with float32 moments; only parameters of two or more dimensions decay.

    Loshchilov and Hutter, arXiv 1711.05101. weights: Weight objects, or ParamShard ones (flattened parts of weights).
    lr_scale: {name: factor on the learning rate}, 1 where absent (LoRA+ gives B more). With `sharding: … offload` the
    moments are in pinned host memory; those of one weight at a time are copied to the device for its update.
    """

    def __init__(self, weights: list, args: TrainingArgs, lr_scale: dict[str, float] | None = None):
        names = [weight.name for weight in weights]
        assert len(set(names)) == len(names), f"names must be unique: {sorted(names)}"
        self.weights, self.args, self.lr_scale = weights, args, lr_scale or {}
        self.steps = 0  # updates so far; bias correction counts from 1
        self.requantized = 0  # how often the moments were resumed from a checkpoint that quantizes them
        self.on_host = "offload" in (getattr(args, "sharding", None) or "")
        if self.on_host and paddle.device.get_device().startswith("cpu"):
            print("sharding: offload has no effect: the device is the CPU, so moments are in host memory anyway")
            self.on_host = False
        self.moments = {w.name: [self._zeros(w.tensor.shape) for _ in range(2)] for w in weights}

    def _zeros(self, shape):
        moment = paddle.zeros(shape, "float32")
        return moment.pin_memory() if self.on_host else moment

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update every weight that has a gradient; gradients are multiplied by grad_scale (clipping) first."""
        self.steps += 1
        args = self.args
        for weight in self.weights:
            gradient = weight.grad
            if gradient is None:
                continue
            decay = args.weight_decay if len(weight.shape) >= 2 else 0.0
            rate = lr * self.lr_scale.get(weight.name, 1.0)
            stored = self.moments[weight.name]
            moments = [moment._copy_to(gradient.place, True) for moment in stored] if self.on_host else stored
            constants = args.adam_beta1, args.adam_beta2, args.adam_epsilon, decay
            kernels.adamw(weight.tensor, gradient, *moments, self.steps, rate, *constants, grad_scale)
            if self.on_host:
                for host, moment in zip(stored, moments):
                    host.copy_(moment, True)

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.clear_gradient()

    def entries(self, shards, moment_bits: int = 32) -> list[SaveEntry]:
        """[SaveEntry] of moments and beta powers, with Unified Checkpoint's names and in the weights' file layout.

        moment_bits: 32, 8 or 4, from ckpt_quant_stage. Every rank that holds a weight names it, also where another
        rank has its moments."""
        powers = {f"beta{i}_pow_acc_0": getattr(self.args, f"adam_beta{i}") ** (self.steps + 1) for i in (1, 2)}
        found = []
        for weight in shards.weights:
            place, moments = shards.place_of(weight), self.moments.get(weight.name, (None, None))
            sources = [SaveSource(weight, shards.laid(weight, moment), *place) for moment in moments]
            names = [f"{weight.name}/moment{i}_0" for i in (1, 2)]
            if moment_bits == 32 or len(weight.shape) < 2:
                found += [
                    SaveEntry({name: (weight.shape, "float32")}, [source]) for name, source in zip(names, sources)
                ]
            else:
                found.append(quantized_moments(names, weight.shape, sources, moment_bits))
            for key, power in powers.items():
                power = np.array([power], np.float32)
                found.append(
                    SaveEntry({f"{weight.name}/{key}": ([1], "float32")}, [], functools.partial(list, [power]))
                )
        return found

    def load(self, found, shards):
        """Load the moments exactly; found: of stored_tensors. Each rank reads its own shards.

        load_checkpoint sets `steps`, because it cannot be computed back from a power in float32.
        """
        read = {key: value for key, value in found.items() if "@" not in key and not key.endswith("_pow_acc_0")}
        names = {key.rpartition("/")[0] for key in read}
        own_names = {weight.name for weight in shards.weights}
        shards.topology.barrier()  # reading weights may have taken one of them longer
        trained = gather_tensor_index(dict.fromkeys(sorted(own_names), 0), shards.topology)[0].keys()  # on any rank
        if names != trained:
            missing, extra = _some(trained - names), _some(names - trained)
            raise UserError(f"the optimizer state is of other weights: missing {missing}; unexpected {extra}")
        for weight in shards.weights:
            if weight.name not in self.moments:  # another rank's
                continue
            for i, array in enumerate(read_moments(weight, found, shards.extent(weight))):
                self.moments[weight.name][i].set_value(array)


def clip_scale(norm: float, max_norm: float) -> float:
    """The factor that scales a gradient of this norm down to max_norm; 1.0 if it is smaller, or max_norm is 0."""
    return max_norm / norm if 0 < max_norm < norm else 1.0


def seed_step(seed: int, step: int, micro_step: int = 0) -> None:
    """Seed dropout and noise of one micro-step from (seed, step, micro-step): there is no generator state to save."""
    digest = hashlib.blake2b(f"{seed} {step} {micro_step}".encode(), digest_size=4).digest()
    paddle.seed(int.from_bytes(digest, "little") & 0x7FFFFFFF)


# ================================================================================================================= log


class Log:
    """The log of a run: a tqdm bar or plain lines, metrics.jsonl, eval_metrics.jsonl, curves.png, visualdl if asked.

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
        LogWriter = _visualdl(args) if self.writes else None
        self.writer = LogWriter and LogWriter(logdir=args.logging_dir or str(self.folder / "vdl_log"))
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
        if self.writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{group}/{name}", value, row["step"])

    def close(self) -> None:
        """End the bar and draw curves.png."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.writer is not None:
            self.writer.close()
        if self.writes and (line := draw_curves(self.folder)):
            print(line, flush=True)


def _visualdl(args):
    """visualdl's LogWriter class if report_to asks for it, else None; UserError if it is not installed."""
    if "visualdl" not in (args.report_to or ()):
        return None
    try:
        from visualdl import LogWriter
    except ImportError:
        raise UserError("report_to: visualdl is not installed: pip install visualdl") from None
    return LogWriter


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
    """FLOP/s of the fastest of a few float32 matmuls of 1024 x 1024: the reference for model FLOPs utilization."""
    n, best, end = 1024, math.inf, time.perf_counter() + seconds
    a = paddle.ones([n, n], "float32")
    float(paddle.matmul(a, a)[0, 0])  # the first one starts the threads
    while time.perf_counter() < end:
        begin = time.perf_counter()
        float(paddle.matmul(a, a)[0, 0])  # float() waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best if best < math.inf else 2 * n**3 / seconds


def save_nonfinite_report(output_dir: str | Path, step: int, batch: dict) -> Path:
    """Write a batch whose loss is not finite (ids, labels, record indices) to nonfinite-step-N.json -> its path."""
    path = Path(output_dir) / f"nonfinite-step-{step}.json"
    with atomic_file(path) as file:
        json.dump({"step": step, **batch}, file, default=lambda value: np.asarray(value).tolist())
    return path


def check_finite(value: float, output_dir: str | Path, step: int, batch: dict) -> None:
    """UserError if a loss or gradient norm is not finite; the batch that caused it is saved."""
    if not math.isfinite(value):
        report = save_nonfinite_report(output_dir, step, batch)
        raise UserError(
            f"step {step}: the loss or its gradient is {value}; its batch is in {report}; resume from the last "
            "checkpoint with a lower learning_rate, or look at these records"
        )


# ========================================================================================================== evaluation


def format_metrics(metrics: dict) -> str:
    """`loss 1.2345 | accuracy 0.6000 | …` for a line of output."""
    names = ((key.removeprefix("eval_"), value) for key, value in metrics.items())
    return " | ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in names)


def write_results(output_dir: str, name: str, metrics: dict, topology: Topology = SINGLE) -> None:
    """Write an evaluation's metrics to output_dir/NAME_results.json."""
    if topology.rank == 0:
        with atomic_file(Path(output_dir) / f"{name}_results.json") as file:
            json.dump(metrics, file, indent=2, ensure_ascii=False)


def model_inputs(batch: dict) -> dict[str, paddle.Tensor]:
    """{name: tensor} that the model takes of a batch: input_ids, position_ids, startend_row_indices, labels."""
    names = ("input_ids", "position_ids", "startend_row_indices", "labels")
    return {name: paddle.to_tensor(batch[name]) for name in names if batch.get(name) is not None}


@contextlib.contextmanager
def eval_mode(model: CausalLM) -> Iterator[None]:
    """Evaluation mode without gradients inside the block, the mode that it had after it."""
    was_training = model.training
    model.eval()
    with paddle.no_grad():
        yield
    if was_training:
        model.train()


def print_data(split: str, unit: str, loader: Loader) -> None:
    """One line on what a loader holds."""
    dataset = loader.dataset
    print(
        f"{split}: {len(dataset):,} {unit} ({dataset.dropped} dropped), {loader.batches_per_epoch:,} batches an epoch, "
        f"{100 * loader.fill:.1f} % of positions real"
    )


def eval_batches(loader: Loader, max_batches: int | None = None) -> list[tuple[int, int]]:
    """[(epoch, index)] of the batches of an evaluation: epoch 0, or its first max_batches if > 0."""
    batches = loader.batches_per_epoch
    return [(0, i) for i in range(min(max_batches, batches) if max_batches and max_batches > 0 else batches)]


def evaluate(model: CausalLM, loader: Loader, max_batches: int | None = None, topology: Topology = SINGLE) -> dict:
    """Mean loss, accuracy and perplexity per target token over a loader's epoch 0 (its first max_batches, if > 0).

    Sums are divided once at the end, so that the metrics do not depend on how samples are split into batches or ranks.
    """
    loss, correct, tokens = 0.0, 0, 0
    indices = eval_batches(loader, max_batches)

    def inputs(item):
        return {**model_inputs(item[0]), "return_predictions": True}

    items = ((loader.batch(*index), is_real) for index, is_real in local_micro_batches(indices, topology))
    with eval_mode(model):
        for (batch, is_real), (losses, predictions) in pipelined_map(
            model, items, inputs, lambda outputs, item: outputs
        ):
            if not is_real:
                continue
            target = batch["labels"] != -100  # (B, T)
            loss += float(losses.astype("float64").sum())
            correct += int((predictions.numpy() == batch["labels"])[target].sum())
            tokens += int(target.sum())
    loss, correct, tokens = topology.all_reduce_sum((loss, correct, tokens))
    if not tokens:
        raise UserError("evaluation: the data has no target token")
    mean = loss / tokens
    ppl = math.exp(mean) if mean < 700 else math.inf
    return {"eval_loss": mean, "eval_accuracy": correct / tokens, "eval_ppl": ppl, "eval_tokens": tokens}


def generate_replies(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: list,
    *,
    max_new_tokens: int,
    max_length: int | None = None,
    batch_size: int = 32,
    **sampling,
) -> list[str]:
    """The model's replies to prompts of token ids, in their order. Prompts of similar length share a batch.

    max_length: most tokens of prompt and reply. sampling: of model.generate(); greedy without. Model replicas that can
    run independently share the batches.
    """
    replies, topology = {}, getattr(model, "topology", SINGLE)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replica, replicas = topology.model_replica
    for start in range(batch_size * replica, len(by_length), batch_size * replicas):
        batch = by_length[start : start + batch_size]
        T = max(len(prompts[i]) for i in batch)
        ids, mask = np.zeros((len(batch), T), np.int64), np.zeros((len(batch), T), np.int64)
        for row, i in enumerate(batch):  # padded on the left
            ids[row, T - len(prompts[i]) :] = prompts[i]
            mask[row, T - len(prompts[i]) :] = 1
        new_tokens = max_new_tokens if max_length is None else max(0, min(max_new_tokens, max_length - T))
        out = generate(model, ids, new_tokens, tokenizer.stop_ids, mask, **sampling)[:, T:]
        for row, i in enumerate(batch):
            replies[i] = tokenizer.decode_reply(out[row])
    if replicas > 1:
        replies = dict(pair for part in topology.all_gather_object(list(replies.items())) for pair in part)
    return [replies[i] for i in range(len(prompts))]


def print_replies(records: list[dict], before: list[str], after: list[str]) -> None:
    """Show the replies to the last user turn of these records before and after training."""
    for record, old, new in zip(records, before, after):
        turns = [record["src"]] if isinstance(record["src"], str) else record["src"]
        earlier = f"(turn {len(turns)} of {len(turns)}) " if len(turns) > 1 else ""
        print(f"\nprompt: {earlier}{turns[-1]}\nbefore: {old}\nafter:  {new}")


def keyword_recall(replies: list[str], records: list[dict]) -> float | None:
    """Share of the records' keywords that their replies mention; None if no record has keywords.

    Latin keywords must be whole words.
    """
    mentioned = total = 0
    for text, record in zip(replies, records):
        for word in record.get("keywords", ()):
            pattern = rf"(?<!\w){re.escape(word)}(?!\w)" if word.isascii() else re.escape(word)
            mentioned += bool(re.search(pattern, text, re.IGNORECASE))
            total += 1
    return mentioned / total if total else None


# Tokens of BLEU and ROUGE: one Chinese, Japanese or Korean character, one word of other scripts, one punctuation mark.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002ffff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


def bleu4(hypotheses: list[str], references: list[str]) -> float:
    """Corpus BLEU of n-grams up to 4, one reference each, in [0, 1] (Papineni et al., 2002); 0 if an order has none.

    exp(min(0, 1 - r/c)) · (p1 p2 p3 p4)^(1/4); p: clipped precisions over the corpus; r, c: lengths of all references
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


def rouge(hypotheses: list[str], references: list[str]) -> dict[str, float]:
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


def _f1(common, in_hypothesis, in_reference):
    return 2 * common / (in_hypothesis + in_reference) if common else 0.0


def _lcs_length(a, b):
    """Length of the longest common subsequence, one bit per token of `a` (Hyyrö, 2004): a 0 bit of `row` is a match."""
    positions = collections.defaultdict(int)  # token -> bits of its positions in a
    for i, token in enumerate(a):
        positions[token] |= 1 << i
    all_ones = (1 << len(a)) - 1
    row = all_ones
    for token in b:
        hits = row & positions[token]
        row = ((row + hits) | (row - hits)) & all_ones
    return len(a) - row.bit_count()
