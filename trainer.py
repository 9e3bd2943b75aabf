"""What the training scripts share: start and exit, set-up, output folder, schedule, AdamW, evaluation.

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
import functools
import hashlib
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import kernels

import numpy as np
import paddle

from adapters import base_folders, cast_frozen_to_bf16, restore_adapter, tokenizer_folder, trainable_weights
from adapters import setup_adapter as setup_adapter  # for the scripts
from arguments import ScriptArgs, TrainingArgs, parse_args
from checkpoint import (
    CheckpointManager,
    TrainState,
    load_checkpoint,
    load_trained,
    lock_output_dir,
    read_moments,
    remove_path,
    saved_arguments,
    update_best,
)
from data import CorpusLoader, SFTLoader
from distributed.collectives import gather_tensor_index
from distributed.sharding import ZeroOptimizer
from distributed.watchdog import Launch, current_watchdog
from families import ModelConfig
from formats.added_tokens import split_tokens
from formats.chat import load_chat_template
from formats.files import UserError, _disk_full, atomic_file, readers_may_leave, write_error
from formats.quantized_moments import quantized_moments
from formats.tokenizer import Tokenizer, load_tokenizer
from formats.weights import SaveEntry, SaveSource
from logger import Log, find_writers, format_metrics, measure_matmul_peak, peak_memory  # noqa: F401, for scripts
from model import CausalLM, generate
from modules.vocabulary import check_vocabulary as check_vocabulary  # for the scripts
from parallel import SINGLE, Topology, pipelined_map, shard_adapters
from planning.auto_parallel import take_first_plan
from planning.memory_model import dry_run

Loader = SFTLoader | CorpusLoader  # .batches_per_epoch, .batch(epoch, index) -> the dict described in data.py

# ====================================================================================================== start and exit


def run_script(main: Callable, Args: type, argv: list[str] | None = None) -> None:
    """A script's last line: parse the arguments and run main(args).

    What the user can put right ends with one line and exit code 2; a bug ends with its traceback.
    """
    tokens = sys.argv[1:] if argv is None else argv
    if not tokens or {"-h", "--help"} & set(tokens):
        with readers_may_leave():
            print((sys.modules[main.__module__].__doc__ or "").strip())
            print("\nKeys, in JSON or YAML or as --key value, and their defaults:")
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
            if getattr(args, "auto_parallel", False):
                print(take_first_plan(args, together), flush=True)
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
    print(f"device: {paddle.device.get_device()}; kernels: {kernels.summary()}", flush=True)
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
    log: Log
    checkpoints: CheckpointManager


def setup_tokenizer(args: ScriptArgs) -> Tokenizer:
    """The tokenizer of tokenizer_name_or_path, else of lora_path or model_name_or_path (or of the base model of these),
    with add_tokens, and with chat_template if that is given."""
    folder = args.tokenizer_name_or_path or tokenizer_folder(args.model_name_or_path, getattr(args, "lora_path", None))
    tokenizer = load_tokenizer(folder, base_folders(args.model_name_or_path))
    for key, special in (("add_tokens", False), ("add_special_tokens", True)):
        tokenizer.add_tokens(split_tokens(getattr(args, key, None), key), special)
    if getattr(args, "chat_template", None) is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)
    return tokenizer


def trains_adapter(args: TrainingArgs) -> bool:
    """Whether LoRA or a prefix is trained, not the model's own weights."""
    return getattr(args, "lora", False) or getattr(args, "prefix_tuning", False)


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
    find_writers(args)
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
        check_resumed_arguments(args, checkpoint, state, topology)
    prepare_output_dir(args, topology)

    if state.step >= steps:
        print(f"nothing left to train: step {state.step} of {steps} is reached; raise max_steps or num_train_epochs")
    peak_flops = None
    if flops_per_token is not None:
        peak_flops = measure_matmul_peak()
        dtype = "bfloat16" if kernels.bf16 else "float32"
        print(f"matmul peak: {peak_flops / 1e9:,.0f} GFLOP/s {dtype}, measured; mfu is relative to it")
    log = Log(
        args, steps, state, flops_per_token=flops_per_token, peak_flops=peak_flops, topology=topology, metrics=metrics
    )
    checkpoints = CheckpointManager(args, model, tokenizer, optimizer=optimizer, shards=shards, topology=topology)
    return Run(optimizer, shards, state, steps, steps_per_epoch, log, checkpoints)


def check_resumed_arguments(args: TrainingArgs, checkpoint: Path, state: TrainState, topology: Topology) -> None:
    """Say which arguments a resumed run does not use because the checkpoint decides, and forget another metric's best.

    UserError for a prefix of another shape than the checkpoint's. setup_adapter() checks what concerns LoRA.
    """
    saved, lines = saved_arguments(checkpoint), []
    changed = {key for key, value in dataclasses.asdict(args).items() if key in saved and saved[key] != value}
    if getattr(args, "prefix_tuning", False):
        for key in {"prefix_projection", "prefix_projection_hidden_size"} & changed:
            raise UserError(f"{key}: {getattr(args, key)!r}; the prefix in {checkpoint} has {saved[key]!r}; keep it")
    read_from = ("lora_path", "prefix_path") if trains_adapter(args) else ("model_name_or_path", "continue_training")
    for key in read_from:
        if key in changed and getattr(args, key):
            lines.append(f"resume: {key}: {getattr(args, key)!r} is not used: what is trained comes from {checkpoint}")
    if {"metric_for_best_model", "greater_is_better"} & changed:
        state.best_metric = state.best_checkpoint = state.early_stopping_best = None
        state.early_stopping_counter = 0
        lines.append("resume: metric_for_best_model has changed, so the best checkpoint so far is forgotten")
    for line in lines if topology.rank == 0 else ():
        print(line, flush=True)


def finish_training(
    run: Run, model: CausalLM, args: TrainingArgs, before_writing: Callable = lambda best: None
) -> None:
    """Load the best checkpoint if load_best_model_at_end, then write the model or adapter to output_dir.

    before_writing(best) changes what is written; best: the checkpoint that was loaded, or None.
    """
    state, best = run.state, None
    if args.load_best_model_at_end and state.best_checkpoint:
        run.log.print(f"best: {state.best_checkpoint}, {args.metric_for_best_model} {state.best_metric:.4f}")
        best = Path(args.output_dir) / state.best_checkpoint
        restore_adapter(model, best) if trains_adapter(args) else load_trained(model, best, args)
    run.log.close()
    before_writing(best)
    run.checkpoints.write_model(args.output_dir, args.save_dtype)
    print(f"{'adapter' if trains_adapter(args) else 'model'}: {args.output_dir}")


def set_recompute(model: CausalLM, args: TrainingArgs) -> None:
    """Tell the model which activations to recompute in backward."""
    layers, L = args.no_recompute_layers or [], model.config.num_hidden_layers
    if max(layers, default=0) >= L:
        raise UserError(f"no_recompute_layers: {max(layers)}; the model has {L} layers, counted from 0")
    model.recompute, model.recompute_granularity = args.recompute, args.recompute_granularity
    model.no_recompute_layers = frozenset(layers)


def shared_prompt_limit(config: ModelConfig) -> tuple[float, str]:
    """(most positions within which replies can share a prompt in one row, what in the model ends it)."""
    dynamic_rope = {  # rotates a prompt by the length of its reply
        "dynamic": config.max_position_embeddings,
        "qwen_ntk": config.logn_length or config.rope.get("original_max_position_embeddings"),
    }.get(config.rope["rope_type"])
    window = min((w for w in config.windows if w), default=None)  # the second reply would see less of the prompt
    limits = [(dynamic_rope or math.inf, "dynamic rope"), (window or math.inf, "a sliding window")]
    return (0, "ALiBi") if config.position == "alibi" else min(limits)


def share_within(path: str, key: str, longest: int) -> float:
    """shared_prompt_limit() of a model's folder; a line says so if pairs can be longer. longest: most positions of a
    prompt and its replies; key: what sets it."""
    config = ModelConfig.from_json(base_folders(path)[-1])
    limit, reason = shared_prompt_limit(config)
    if longest > limit and config.rope["rope_type"] == "qwen_ntk":
        raise UserError(
            f"{key}: {longest}: {config.family} stretches its positions behind {limit} only outside of training, so "
            f"that policy and reference would differ; at most {limit}"
        )
    if longest > limit:
        which = f"pairs of more than {limit} positions" if limit else "pairs"
        print(
            f"{key}: {longest}: {config.family} has {reason}, so {which} have their prompt twice, once for each reply"
        )
    return limit


def check_shared_prompts(
    model: CausalLM, path: str, key: str, longest: int, refused_positions: tuple[str, ...] = ("alibi",)
) -> None:
    """UserError for a model with which replies cannot share a prompt in one row, or would see it wrongly.

    longest: most positions of a prompt and its replies, 0 where longer ones do not share it; key: what sets it.
    """
    config = model.config
    check_trainable(model, path)
    if config.position in refused_positions:
        kind = {"alibi": "ALiBi", "rope_2d": "positions in two dimensions"}[config.position]
        raise UserError(f"{path}: {config.family} has {kind}, with which replies cannot share a prompt in one row")
    limit, reason = shared_prompt_limit(config)
    if longest > limit:
        raise UserError(
            f"{key}: {longest}: {config.family} has {reason}, with which replies share a prompt within {limit} "
            f"positions only; at most {limit}"
        )


def check_trainable(model: CausalLM, path: str) -> None:
    """UserError for a model whose own weights cannot be the start of a policy."""
    if model.config.quantization is not None:
        raise UserError(f"{path}: is quantized; train the model before quantize.py")
    if model.prefix is not None:
        raise UserError(f"{path}: has a trained prefix, which training would lose")


def check_positions(model: CausalLM, path: str, needed: dict[str, int]) -> None:
    """UserError if a model with learned positions has too few. needed: {name of the key: positions it asks for}."""
    limit = model.config.max_position_embeddings
    key, tokens = max(needed.items(), key=lambda item: item[1])
    if model.config.position == "learned" and tokens > limit:
        raise UserError(f"{path}: has {limit} learned positions, but {key} asks for {tokens}; lower it")
    if model.config.position != "alibi" and tokens > model.config.max_model_len:
        print(f"{key}: {tokens:,} positions are asked for, but {path} was trained on {model.config.max_model_len:,}")


# ======================================================================================================= output folder

# What a run writes into output_dir. A folder with any of it holds a run or a model; nothing else is ever removed.
ARTIFACTS = """tmp-checkpoint-* tmp-model checkpoint-* config.json generation_config.json model*.safetensors
    *.safetensors.index.json adapter_config.json adapter_model.safetensors pytorch_model*.bin tokenizer.model
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.json metrics.jsonl
    eval_metrics.jsonl curves.png vdl_log tensorboard_log wandb *_results.json generated_output.json
    nonfinite-step-*.json predictions.jsonl prefix_projection.safetensors quant_report.json static_config.json
    prefill.json prefill.pdiparams decode.json decode.pdiparams static.pdiparams prefix.safetensors vocab.json
    merges.txt *.tiktoken ice_text.model sentencepiece.bpe.model chat_template.jinja""".split()
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


def note_evaluation(
    args: TrainingArgs, state: TrainState, metrics: dict[str, float], checkpoints: CheckpointManager, log: Log
) -> bool:
    """Keep in `state` which checkpoint is the best, if the best is loaded at the end; returns stops_early()."""
    if args.load_best_model_at_end:
        update_best(args, state, metrics, checkpoints)
    return stops_early(args, state, metrics, log)


def stops_early(args: TrainingArgs, state: TrainState, metrics: dict[str, float], log: Log) -> bool:
    """Whether early_stopping_patience evaluations in a row were not better than the best before them; counts this one.

    Better is more than early_stopping_threshold away from the best of all evaluations, as in transformers'
    EarlyStoppingCallback. Best and counter are in trainer_state.json.
    """
    if not args.early_stopping_patience:
        return False
    name = f"eval_{args.metric_for_best_model}"
    if name not in metrics:
        raise UserError(f"metric_for_best_model: {name} is not computed here; there are {', '.join(metrics)}")
    value, best = metrics[name], state.early_stopping_best
    gain = math.inf if best is None else value - best if args.greater_is_better else best - value
    if gain > 0 and math.isfinite(value):
        state.early_stopping_best = value
    is_better = gain > args.early_stopping_threshold and math.isfinite(value)
    state.early_stopping_counter = 0 if is_better else state.early_stopping_counter + 1
    if state.early_stopping_counter < args.early_stopping_patience:
        return False
    log.print(
        f"early stopping at step {state.step}: {state.early_stopping_counter} evaluations in a row without a better "
        f"{args.metric_for_best_model} (best: {state.early_stopping_best})"
    )
    return True


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
    if dataset.not_learned:
        print(f"{split}: {dataset.not_learned:,} replies are shown but not learned, see docs/chat.md")


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
    ppl = math.exp(loss / tokens) if loss / tokens < 700 else math.inf
    return {"eval_loss": loss / tokens, "eval_accuracy": correct / tokens, "eval_ppl": ppl, "eval_tokens": tokens}


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


def print_replies(prompts: list[str], before: list[str], after: list[str]) -> None:
    """Show the replies to these prompts before and after training."""
    for prompt, old, new in zip(prompts, before, after):
        print(f"\nprompt: {prompt}\nbefore: {old}\nafter:  {new}")


def keyword_recall(replies: list[str], records: list[dict]) -> float | None:
    """Share of the records' keywords that their replies mention; None if no record has keywords.

    Latin keywords must be whole words.
    """
    mentioned = total = 0
    for text, record in zip(replies, records):
        for word in map(str, keywords if isinstance(keywords := record.get("keywords"), list) else ()):
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
    row = all_ones = (1 << len(a)) - 1
    for token in b:
        hits = row & positions[token]
        row = ((row + hits) | (row - hits)) & all_ones
    return len(a) - row.bit_count()
