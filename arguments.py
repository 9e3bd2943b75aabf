"""JSON or YAML files and the command line -> one dataclass, strictly.

    args = parse_args(Args, ["configs/llama_lora.json", "--learning_rate", "1e-4"])    # files, then --key value

Names, defaults and meanings are PaddleNLP's, so that its JSON files run here with only their paths changed. A key that
is not a field of Args is looked up in formats/paddlenlp.py: used under another name, ignored or refused, each with a
reason. Anything else is an error that names the nearest key of the script. A later value wins.
"""

import collections
import dataclasses
import difflib
import inspect
import json
import math
import re
import sys
import types
import typing
from pathlib import Path

import kernels

from distributed.watchdog import Launch
from formats.config_files import read_config
from formats.files import UserError
from formats.paddlenlp import (
    ALIASES,
    CHOICES,
    HARMLESS,
    IGNORED,
    NESTED,
    OPTIONS,
    REFUSED,
    REFUSED_IN,
    SHORTHANDS,
    STAGES,
)
from formats.record_files import parse_sources, record_files
from modules.low_bit import ALGORITHMS
from parallel import Degrees
from planning.presets import missing_model_message

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
METRICS = ("loss", "accuracy", "ppl", "bleu4", "rouge-1", "rouge-2", "rouge-l", "keyword_recall", "reward")
DTYPES = ("float32", "bfloat16", "float16")
REPORTS = ("visualdl", "tensorboard", "wandb")  # what report_to can name; logger.WRITERS has their classes
UNIFIED = {  # the options of unified_checkpoint_config
    "async_save": "training continues while a copy of the state is written",
    "skip_save_model_weight": "bf16: no model*.safetensors; from_pretrained reads the float32 master weights instead",
    "remove_master_weight": "bf16: no float32 master weights; resuming from bfloat16 ones is not an exact continuation",
    "master_weight_compatible": "a checkpoint without master weights may be resumed, from its bfloat16 weights",
    "enable_all_options": "skip_save_model_weight and master_weight_compatible",
    "ignore_merge_optimizer": "ignored: the files always hold full moments, so that any topology can resume",
}


# ================================================================================================ the shared keys


@dataclasses.dataclass
class ScriptArgs:
    """The keys that every script has. A script that does not train subclasses it once and adds its own."""

    output_dir: str = ""  # where the script writes to
    overwrite_output_dir: bool = False  # remove the run that output_dir holds
    seed: int = 42  # of data order, initialization, dropout and sampling
    device: str = "auto"  # auto, cpu, gpu, gpu:1, dcu (ROCm), xpu, npu, gcu, or a plug-in device of Paddle
    kernels: str = "auto"  # back end of the fused ops, see kernels/__init__.py
    bf16: bool = False  # training: matrix products in bfloat16, trained weights and everything else in float32
    fp16: bool = False  # compute in float16
    disable_tqdm: bool | None = None  # true: plain lines, no bar; None: a bar if stderr is a terminal
    # The data-parallel degree is the number of processes divided by the product of these degrees; -1 means 1.
    tensor_parallel_degree: int = 1
    pipeline_parallel_degree: int = 1
    sharding_parallel_degree: int = -1  # -1: all processes that the other degrees leave if `sharding` is set, else 1
    sep_parallel_degree: int = 1  # split sequences; all-to-all swaps tokens for heads around attention (Ulysses)
    context_parallel_degree: int = 1  # split sequences; keys and values go around a ring; not together with sep
    expert_parallel_degree: int = 1  # shard experts over the data-parallel ranks, so not a factor
    ddp_timeout: float = 600.0  # seconds without a sign of life, or of progress while others wait, that end a run

    def check(self) -> list[str]:
        """Resolve values that depend on others, refuse contradictions (UserError). Returns lines to print.

        A script's own Args extends it: `return super().check() + [...]`.
        """
        if self.seed < 0:
            raise UserError(f"seed: {self.seed}; it must not be negative")
        notes = _check_hardware(self)
        if not getattr(self, "auto_parallel", False):
            self.check_topology()
        return notes

    def check_topology(self) -> None:
        """UserError for degrees that this script does not run with, whatever the model; a script's own Args has it."""

    def check_model(self) -> None:
        """UserError if the model or tokenizer is not on this disk: what to download, and to where."""
        for key in ("model_name_or_path", "tokenizer_name_or_path"):
            path = getattr(self, key, None)
            if path and not Path(path).exists():
                raise UserError(missing_model_message(key, path))


@dataclasses.dataclass
class TrainingArgs(ScriptArgs):
    """The keys that every training script has. A script subclasses it once and adds its own.

    output_dir receives checkpoints, the final model and the log.
    """

    do_train: bool = False  # train
    do_eval: bool = False  # evaluate on the dev data at the end (and during training: see evaluation_strategy)
    do_predict: bool = False  # evaluate on the test data at the end
    per_device_train_batch_size: int = 8  # rows of one micro-batch
    per_device_eval_batch_size: int = 8  # rows of one evaluation batch
    gradient_accumulation_steps: int = 1  # micro-batches of one step
    num_train_epochs: float = 1.0  # passes over the data, unless max_steps is given
    max_steps: int = -1  # > 0: number of steps, instead of num_train_epochs
    learning_rate: float = 5e-5  # the peak
    lr_scheduler_type: str = "linear"  # one of SCHEDULES
    warmup_steps: int | float = 0  # steps from 0 to the peak; > 0 wins over warmup_ratio; below 1: the same as it
    warmup_ratio: float = 0.0  # the same as a fraction of all steps
    min_learning_rate: float = 0.0  # where linear and cosine end
    decay_steps: int | None = None  # step at which linear and cosine reach their end; None or 0: the last step
    num_cycles: float = 0.5  # waves of cosine: 0.5 falls once
    lr_end: float = 1e-7  # where polynomial ends
    power: float = 1.0  # exponent of polynomial
    weight_decay: float = 0.0  # decoupled, on parameters of two or more dimensions only
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # global norm to clip the gradient to; 0: no clipping
    logging_steps: int = 500  # steps between log lines
    logging_first_step: bool = False  # log the first step too
    logging_dir: str | None = None  # where report_to's writers write; None: their own folders in output_dir
    report_to: str | list[str] | None = None  # some of REPORTS, all (that are installed), or none (also None)
    run_name: str | None = None  # of the run in wandb
    evaluation_strategy: str | None = None  # no, steps, epoch; None: steps if do_eval and eval_steps, else no
    eval_steps: int | None = None  # steps between evaluations; None: logging_steps
    max_evaluate_steps: int = -1  # > 0: at most this many batches per evaluation
    save_strategy: str = "steps"  # no, steps or epoch
    save_steps: int = 500  # steps between checkpoints
    save_total_limit: int | None = None  # number of newest checkpoints to keep, besides the best; None or 0: all
    save_dtype: str = "float32"  # of the final model, unless it is an adapter; one of DTYPES
    load_best_model_at_end: bool = False  # end with the weights that evaluated best
    metric_for_best_model: str | None = None  # one of METRICS; None: loss
    greater_is_better: bool | None = None  # None: true unless the metric is loss or ppl
    early_stopping_patience: int | None = None  # evaluations in a row without a better metric that end training
    early_stopping_threshold: float = 0.0  # by more than this a metric must be better to count for that
    resume_from_checkpoint: bool | str | None = None  # a path, or true: the newest complete one in output_dir
    ignore_load_lr_and_optim: bool = False  # resume weights and step, but not the optimizer's moments
    ignore_save_lr_and_optim: bool = False  # checkpoints without moments: smaller, no exact resume
    unified_checkpoint_config: str | list[str] | None = None  # keys of UNIFIED, separated by blanks or commas
    ckpt_quant_stage: str = "O0"  # moments in checkpoints: O0 float32, O1 8-bit, O2 4-bit integers
    dataloader_drop_last: bool = False  # drop the last incomplete batch of an epoch
    recompute: bool = False  # recompute activations in backward instead of keeping them
    recompute_granularity: str = "full"  # full: whole blocks; full_attn: attention; core_attn: attention after qkv
    no_recompute_layers: list[int] | None = None  # blocks that keep their activations, counted from 0
    sharding: str | None = None  # stage1 (moments; None too), stage2 (and gradients), stage3 (and weights); and offload
    virtual_pp_degree: int = 1  # pipeline stages per pipeline rank
    sequence_parallel: bool = False  # with tensor parallelism: also split tokens between attention and MLP
    hybrid_parallel_topo_order: str | None = None  # outermost axis: pp_first (also None) or sharding_first
    auto_parallel: bool = False  # take the degrees, micro-batch and recompute that plan.py ranks first
    dry_run: bool = False  # print shapes, parameters, FLOPs and memory per rank, and end; no data is needed

    def check(self) -> list[str]:
        _check_numbers(self)
        notes = super().check()
        if not self.output_dir:
            raise UserError("output_dir: missing; give the folder to write to")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise UserError("nothing to do: none of do_train, do_eval, do_predict is true")
        end = self.lr_end if self.lr_scheduler_type == "polynomial" else self.min_learning_rate
        if self.lr_scheduler_type in ("linear", "cosine", "polynomial") and end > self.learning_rate:
            raise UserError(
                f"learning_rate {self.learning_rate:g} is below {end:g}, where lr_scheduler_type: "
                f"{self.lr_scheduler_type} ends"
            )
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise UserError(f"decay_steps {self.decay_steps} must be more than warmup_steps {self.warmup_steps}")
        notes += _check_strategies(self) + _check_unified(self)
        _check_dev_data(self)
        if not self.do_eval and getattr(self, "dev_dataset_path", None):
            notes.append("dev_dataset_path is not read: do_eval is false and evaluation_strategy is no")
        if not self.do_eval and getattr(self, "val_size", None):
            notes.append("val_size: records are held out and not read: do_eval is false and evaluation_strategy is no")
        return notes

    def check_dry_run(self) -> list[str]:
        """check() for --dry_run: data, output and steps may be missing, and so may the processes."""
        _check_numbers(self)
        if not self.model_name_or_path:
            raise UserError("model_name_or_path: missing")
        if getattr(self, "lora", False) and getattr(self, "prefix_tuning", False):
            raise UserError("lora and prefix_tuning are both true; choose one")
        if not self.auto_parallel:
            self.check_topology()
        return []


@dataclasses.dataclass
class LoraArgs(TrainingArgs):
    """The keys of LoRA (arXiv 2106.09685) for the training scripts that have it."""

    lora: bool = False  # train LoRA instead of all weights
    lora_path: str | None = None  # continue from this adapter
    lora_rank: int = 8
    lora_alpha: float = -1  # -1: twice the rank, or 4 with rslora, as in PaddleNLP
    lora_target_modules: str | list[str] | None = None  # names, a regular expression, all-linear (None too)
    rslora: bool = False  # scale by alpha/sqrt(rank) (arXiv 2312.03732)
    lora_plus_scale: float = 1.0  # LoRA+: learning rate of B over that of A (arXiv 2402.12354)
    dora: bool = False  # train magnitudes beside directions (arXiv 2402.09353)
    weight_quantize_algo: str | None = None  # hold the frozen linears as nf4, fp4, weight_only_int8, weight_only_int4
    qlora_weight_blocksize: int = 64  # nf4, fp4: weights that share a scale
    qlora_weight_double_quant: bool = False  # nf4, fp4: hold the scales in 8 bits
    qlora_weight_double_quant_block_size: int = 256  # scales that share a scale of theirs
    add_tokens: str | list[str] | None = None  # new tokens, with rows of embedding and head that are trained
    add_special_tokens: str | list[str] | None = None  # the same, left out of decoded text
    resize_vocab: bool = False  # rows for all ids of a tokenizer that has more than the model

    def __post_init__(self):
        self.lora_target_modules = lora_targets(self.lora_target_modules)
        if getattr(self, "val_size", None) == 0:  # LLaMA-Factory's default: nothing is held out
            self.val_size = None

    def check(self) -> list[str]:
        for key in ("lora_path", "rslora", "dora", "pissa", "weight_quantize_algo"):
            if getattr(self, key, None) and not self.lora:
                raise UserError(f"{key} needs lora: true")
        self._check_low_bit()
        keys = "lora_rank lora_alpha lora_target_modules lora_plus_scale lora_dropout".split()
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in keys}
        unread = [key for key in defaults if not self.lora and getattr(self, key) != defaults[key]]
        if self.lora_alpha == -1:
            self.lora_alpha = 4.0 if self.rslora else 2.0 * self.lora_rank
        return super().check() + [f"{key} is not read: lora is false" for key in unread]

    def _check_low_bit(self) -> None:
        algo = self.weight_quantize_algo
        if algo not in (None, *ALGORITHMS):
            raise UserError(f"weight_quantize_algo: {algo!r}; possible are {', '.join(ALGORITHMS)}")
        for key in ("qlora_weight_blocksize", "qlora_weight_double_quant_block_size"):
            size = getattr(self, key)
            if size < 2 or size % 2:
                raise UserError(f"{key}: {size}; an even number of at least 2 is needed")
        if algo and getattr(self, "pissa", False):
            raise UserError("pissa takes its start out of float weights; it is not possible with weight_quantize_algo")


def lora_targets(value: str | list[str] | None) -> str | list[str] | None:
    """lora_target_modules in one of the forms that peft knows: a list of names, or one regular expression.

    Names are ends of module paths: q_proj, "q_proj,v_proj", "q_proj v_proj", a list or its JSON text. all and
    all-linear are every linear. What has other characters is a regular expression over whole paths; in a list, as in
    PaddleNLP's files, each may be one.
    """
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                pass  # a character class
        elif re.fullmatch(r"[\w.\s,-]*", value):
            value = re.findall(r"[^\s,]+", value)
    if isinstance(value, list) and {"all", "all-linear"} & set(value):
        return "all-linear"
    if isinstance(value, list) and not all(re.fullmatch(r"[\w.-]+", name) for name in value):
        names = [rf"(.*\.)?{re.escape(name)}" if re.fullmatch(r"[\w.-]+", name) else name for name in value]
        value = "|".join(f"(?:{name})" for name in names)
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise UserError(f"lora_target_modules: {value!r} is no regular expression: {error}") from None
    return value


def _check_dev_data(args: TrainingArgs) -> None:
    """Evaluation and prediction never read the records that are trained on."""
    train_key = next((key for key in ("dataset_name_or_path", "train_datasets") if hasattr(args, key)), "")
    train_key = train_key or "train_dataset_path"
    train, held_out = getattr(args, train_key, None), getattr(args, "val_size", None)
    dev_key = "eval_datasets" if hasattr(args, "eval_datasets") else "dev_dataset_path"
    dev = getattr(args, dev_key, None) or (train if train_key == "dataset_name_or_path" else None)
    if held_out and dev and dev != train:
        raise UserError(f"val_size and {dev_key} are both given; choose one")
    if not train or not args.do_train:
        return
    if args.do_eval and dev and not held_out and (same := _files_in_common(train, dev, "dev")):
        held = ", val_size: 0.05 to hold records out" if hasattr(args, "val_size") else ""
        raise UserError(
            f"{train_key if dev == train else dev_key}: {same} is trained on and cannot be the dev data too; give "
            f"{dev_key}, a folder with train.json and dev.json{held}, or do_eval: false"
        )
    if args.do_predict and train_key == "dataset_name_or_path" and (same := _files_in_common(train, train, "test")):
        raise UserError(
            f"do_predict: {same} is trained on and cannot be the test data too; give a folder with train.json and "
            "test.json, or predict in a run of its own, without do_train"
        )


def _files_in_common(train: str | list, other: str | list, split: str) -> Path | None:
    """A file that is read both for training and for this split; None too where files are missing, which is said when
    they are read."""
    try:
        trained = {file.resolve() for _, path in parse_sources(train) for file in record_files(path)}
        others = [file for _, path in parse_sources(other) for file in record_files(path, split)]
    except (UserError, OSError):
        return None
    return next((file for file in others if file.resolve() in trained), None)


def _check_numbers(args: TrainingArgs) -> None:
    """Ranges and choices, one key at a time."""
    if 0 < args.warmup_steps < 1:
        args.warmup_ratio, args.warmup_steps = args.warmup_steps, 0
    if args.warmup_steps != int(args.warmup_steps):
        raise UserError(f"warmup_steps: {args.warmup_steps}; a whole number is needed, or a share of all steps below 1")
    args.warmup_steps = int(args.warmup_steps)
    if args.lr_scheduler_type == "cosine_with_min_lr":  # transformers' name
        args.lr_scheduler_type = "cosine"
    batches = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps"
    for key in f"{batches} logging_steps save_steps eval_steps early_stopping_patience".split():
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"{key}: {getattr(args, key)}; it must be at least 1")
    not_negative = "learning_rate min_learning_rate lr_end weight_decay max_grad_norm warmup_steps decay_steps"
    for key in f"{not_negative} num_cycles power early_stopping_threshold".split():
        if getattr(args, key) is not None and getattr(args, key) < 0:
            raise UserError(f"{key}: {getattr(args, key)}; it must not be negative")
    for key, low in (("warmup_ratio", 0), ("adam_beta1", 0), ("adam_beta2", 0), ("adam_epsilon", 1e-30)):
        if not low <= getattr(args, key) < 1:
            raise UserError(f"{key}: {getattr(args, key)}; it must be at least {low} and below 1")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs: {args.num_train_epochs}; it must be positive, or give max_steps")
    strategies, granularities = ("no", "steps", "epoch"), ("full", "full_attn", "core_attn")
    for key, choices in (
        ("lr_scheduler_type", SCHEDULES),
        ("evaluation_strategy", (*strategies, None)),
        ("save_strategy", strategies),
        ("save_dtype", DTYPES),
        ("ckpt_quant_stage", ("O0", "O1", "O2")),
        ("recompute_granularity", granularities),
        ("metric_for_best_model", (*METRICS, *(f"eval_{name}" for name in METRICS), "no", None)),
    ):
        if getattr(args, key) not in choices:
            raise UserError(f"{key}: {getattr(args, key)!r}; possible are {', '.join(filter(None, choices))}")
    for layer in args.no_recompute_layers or ():
        if layer < 0:
            raise UserError(f"no_recompute_layers: {layer}; layers are counted from 0")
    names = args.report_to or []
    args.report_to = re.findall(r"[^\s,]+", names) if isinstance(names, str) else names
    for name in args.report_to:
        if name not in (*REPORTS, "all", "none"):
            raise UserError(f"report_to: {name!r}; possible are {', '.join(REPORTS)}, all and none")


def _check_hardware(args: ScriptArgs) -> list[str]:
    """Devices, precision and the number of processes."""
    world = Launch.of_environment().world
    if world > 1 and not isinstance(args, TrainingArgs):
        raise UserError(f"this script runs in one process, but {world} were started: start it without the launcher")
    if not getattr(args, "auto_parallel", False):  # which sets them later
        Degrees.of(args, world=world)
    if args.fp16 and args.bf16:
        raise UserError("fp16 and bf16 are both true; choose one")
    if args.device != "auto":
        kernels.check_device(args.device)
    notes = []
    if args.fp16:
        notes.append("fp16: float16 is not supported, so float32 is used")
    if args.bf16 and not isinstance(args, TrainingArgs):
        notes.append("bf16: only training computes in bfloat16, so float32 is used")
    for key in ("sharding", "sequence_parallel"):
        if getattr(args, key, None) and world == 1:
            notes.append(f"ignored: {key}: this run has one process")
    return notes


def _check_strategies(args: TrainingArgs) -> list[str]:
    """When to evaluate and to save, and whether the best model can be known."""
    if args.evaluation_strategy is None:
        args.evaluation_strategy = "steps" if args.do_eval and args.eval_steps else "no"
    args.do_eval = args.do_eval or args.evaluation_strategy != "no"
    args.eval_steps = args.eval_steps or args.logging_steps
    metric = (args.metric_for_best_model or "no").removeprefix("eval_")
    args.metric_for_best_model = metric = "loss" if metric == "no" else metric
    if args.greater_is_better is None:
        args.greater_is_better = metric not in ("loss", "ppl")
    notes = []
    if args.early_stopping_threshold and not args.early_stopping_patience:
        raise UserError("early_stopping_threshold needs early_stopping_patience, a number of evaluations")
    if args.early_stopping_patience and args.do_train:
        if args.evaluation_strategy == "no":
            raise UserError("early_stopping_patience needs evaluation_strategy: steps or epoch")
        if not args.load_best_model_at_end:
            notes.append("early_stopping_patience without load_best_model_at_end: the last model is kept, not the best")
    if not (args.load_best_model_at_end and args.do_train):
        return notes
    if args.evaluation_strategy == "no":
        args.load_best_model_at_end = False
        return ["load_best_model_at_end: nothing is evaluated (evaluation_strategy: no), so the last model is kept"]
    if args.save_strategy != args.evaluation_strategy:
        raise UserError(
            f"load_best_model_at_end needs save_strategy ({args.save_strategy}) to equal evaluation_strategy "
            f"({args.evaluation_strategy}): only a saved model can be loaded again"
        )
    if args.save_strategy == "steps" and args.save_steps % args.eval_steps and args.eval_steps % args.save_steps:
        raise UserError(
            f"load_best_model_at_end needs save_steps ({args.save_steps}) to be a multiple of eval_steps "
            f"({args.eval_steps}), or the reverse"
        )
    return notes


def _check_unified(args: TrainingArgs) -> list[str]:
    """Make unified_checkpoint_config the list of its options that change something; returns lines to print."""
    given = args.unified_checkpoint_config or ()
    words = re.split(r"[\s,]+", given.strip()) if isinstance(given, str) else list(given)
    for word in filter(None, words):
        if word not in UNIFIED:
            raise UserError(f"unified_checkpoint_config: unknown option {word!r}; possible are {', '.join(UNIFIED)}")
    if "enable_all_options" in words:
        words += ["skip_save_model_weight", "master_weight_compatible"]
    notes = []
    if "ignore_merge_optimizer" in words:
        notes.append(f"unified_checkpoint_config: ignore_merge_optimizer is {UNIFIED['ignore_merge_optimizer']}")
    without_effect = ("", "enable_all_options", "ignore_merge_optimizer")
    args.unified_checkpoint_config = sorted({word for word in words if word not in without_effect})
    return notes


# ================================================================================================ parsing


class _Given(typing.NamedTuple):
    """One value that the user wrote."""

    name: str  # the key as it was written; an alias perhaps
    value: object
    source: str  # a file, or "command line"
    line: int | None  # in the file
    is_text: bool  # from the command line, so still to be converted
    is_weak: bool = False  # gives way to another value of the same source: the second key of "a+b"

    @property
    def where(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    @property
    def text(self) -> str:
        """The value in lower case, as a table of values has it."""
        return str(self.value).lower()


class _Script:
    """The keys that one script takes, and what other names mean in it."""

    def __init__(self, Args: type):
        self.name = getattr(Args, "script", Path(inspect.getfile(Args)).stem)
        self.kinds = typing.get_type_hints(Args)
        self.own_aliases = getattr(Args, "aliases", {})
        self.refused = {**REFUSED, **REFUSED_IN.get(self.name, {}), **getattr(Args, "refused", {})}

    def targets(self, name: str) -> list[str]:
        """The keys that an alias sets here; those that it would set elsewhere if this script has none of them."""
        choices = [choice.split("+") for choice in {**ALIASES, **self.own_aliases}.get(name, name).split()]
        return next((keys for keys in choices if set(keys) <= set(self.kinds)), choices[0])

    def takes(self, name: str) -> bool:
        """Whether this name sets a key here."""
        if name in CHOICES:
            results = [keys for keys in CHOICES[name].values() if isinstance(keys, dict)]
            return all(set(keys) <= set(self.kinds) for keys in results)
        keys = SHORTHANDS.get(name) or self.targets(name)
        return set(keys) <= set(self.kinds)

    def resolve(self, given: _Given):
        """Yields (key, _Given): under its own name, or the keys that an alias, a choice or a shorthand sets."""
        name = given.name
        if name in self.kinds:
            yield name, given
        elif name in self.own_aliases:
            yield self.own_aliases[name], given
        elif name in NESTED:
            yield from self._nested(given)
        elif name in CHOICES:
            yield from self._choice(given)
        elif name in SHORTHANDS and self.takes(name):
            if _convert(given.value, bool, f"{given.where}: {name}", given.is_text):
                for key, value in SHORTHANDS[name].items():
                    yield key, given._replace(value=value, is_text=False)
        else:
            keys = self.targets(name)
            kind = self.kinds.get(keys[0], str)
            if name in ALIASES and given.value is None and type(None) not in _options(kind):
                return  # null in another tool's file: not given
            for i, key in enumerate(keys):
                yield key, given._replace(is_weak=i > 0)

    def _choice(self, given):
        choices, where = CHOICES[given.name], f"{given.where}: {given.name}"
        if given.value is None:
            return
        if given.text not in choices and "*" in choices:
            yield choices["*"], given
            return
        keys = choices.get(given.text, f"possible are {', '.join(choices)}")
        if isinstance(keys, str):
            raise UserError(f"{where}: {given.value!r}: {keys}")
        for key, value in keys.items():
            yield key, given._replace(value=value, is_text=False)

    def _nested(self, given):
        value, where = given.value, f"{given.where}: {given.name}"
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                pass
        if value is not None and not isinstance(value, dict):
            raise UserError(f'{where}: {given.value!r}; an object of keys is needed: {{"key": 1}}')
        for name, inner in (value or {}).items():
            name = NESTED[given.name].get(name, name)
            yield from self.resolve(given._replace(name=name, value=inner, is_text=False))

    def nearest(self, name: str) -> str | None:
        """The key of this script whose name is most like it."""
        names = {*self.kinds, *self.own_aliases, *filter(self.takes, {**ALIASES, **CHOICES, **SHORTHANDS})}
        near = difflib.get_close_matches(name, sorted(names - {"dry_run"}), 1, cutoff=0.7)
        return near[0] if near else None


def parse_args(Args: type, argv: list[str] | None = None) -> ScriptArgs:
    """`argv` (default: the command line): files, then --key value or --key=value, later wins -> a checked Args.

    A folder stands for --model_name_or_path.
    Prints one line for every key that is ignored and every note of Args.check(). Raises UserError.
    """
    script, given = _Script(Args), {}
    for written in _read_argv(sys.argv[1:] if argv is None else argv, script):
        for key, value in script.resolve(written):
            before = given.get(key, value)
            if before.source == value.source and before is not value:
                if value.is_weak and not before.is_weak:
                    continue
                if before.name != value.name and before.value != value.value and before.is_weak == value.is_weak:
                    raise UserError(
                        f"{value.where}: {key}: {before.name} sets it to {before.value!r}, {value.name} to "
                        f"{value.value!r}; give one"
                    )
            given[key] = value
    fields, lines = {}, []
    for key, value in given.items():
        if key in script.kinds:
            kind = script.kinds[key]
            fields[key] = _convert(value.value, kind, f"{value.where}: {value.name}", value.is_text)
        else:
            lines += _check_foreign_key(key, value, script)
    args = Args(**fields)
    lines += args.check_dry_run() if getattr(args, "dry_run", False) else args.check()
    if lines:
        print("\n".join(dict.fromkeys(lines)), flush=True)
    return args


def _read_argv(argv: list[str], script: _Script):
    """Yields the _Given of files and --key value pairs in their order."""
    tokens = collections.deque(argv)
    while tokens:
        token = tokens.popleft()
        if not token.startswith("--") and Path(token).is_dir() and "model_name_or_path" in script.kinds:
            yield _Given("model_name_or_path", token, "command line", None, True)
            continue
        if not token.startswith("--"):
            for name, (value, line) in read_config(token).items():
                yield _Given(name, value, token, line, False)
            continue
        name, equals, value = token[2:].partition("=")
        kind = script.kinds.get(script.targets(name)[0])
        if not equals:
            values = []
            while tokens and not tokens[0].startswith("--") and (not values or _takes_list(kind)):
                values.append(tokens.popleft())
            if not values and kind is not None and bool not in _options(kind):
                raise UserError(f"command line: --{name}: a value is missing")
            value = values[0] if len(values) == 1 else "true"  # `--do_train` without a value is true
            if len(values) > 1:
                value = [part for value in values for part in value.split(",") if part]
        yield _Given(name, value, "command line", None, True)


def _check_foreign_key(key: str, given: _Given, script: _Script) -> list[str]:
    """Lines to print for a key that is not a field of this script; UserError if it is refused or unknown."""
    name, value, where, refused = given.name, given.value, given.where, script.refused
    training_keys = {field.name for field in dataclasses.fields(TrainingArgs)}
    if name == "stage":
        wanted = STAGES.get(given.text)
        if wanted != script.name:
            done_by = f"run {wanted}.py" if wanted else f"possible are {', '.join(STAGES)}"
            raise UserError(f"{where}: stage: {value!r}: this is {script.name}.py; {done_by}")
        return []
    if key == "dry_run" and not _harmless(key, value):
        raise UserError(f"{where}: dry_run: only the training scripts have one; this script does not train")
    if key == "resume_from_checkpoint" and given.text not in ("true", "1") and not _harmless(key, value):
        raise UserError(f"{where}: {name}: {value!r}: this script does not train; give it as model_name_or_path")
    if key in training_keys:
        return [f"ignored: {name}: this script does not train"]
    if key == "_doc":
        return []
    reason = refused.get(name, refused.get(key))
    if reason and not _harmless(name if name in refused else key, value):
        raise UserError(f"{where}: {name}: {value!r}: {reason}")
    if key in OPTIONS:
        return _check_options(key, value, where)
    if reason or name in IGNORED or key in IGNORED:
        return [f"ignored: {name}: {IGNORED.get(name) or IGNORED.get(key) or reason}"]
    if name != key:
        raise UserError(f"{where}: {name}: {value!r}: it stands for {key}, which {script.name}.py does not have")
    near = script.nearest(key)
    raise UserError(f"{where}: unknown key {name!r}" + (f"; did you mean {near!r}?" if near else ""))


def _check_options(key: str, value: object, where: str) -> list[str]:
    """Lines for the options in a key of OPTIONS; UserError for one that PaddleNLP does not have."""
    words = re.findall(r"[^\s,]+", value) if isinstance(value, str) else value or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: {key}: {value!r}; options separated by spaces or commas are needed")
    for word in words:
        if word not in OPTIONS[key]:
            near = difflib.get_close_matches(word, OPTIONS[key], 1) or list(OPTIONS[key])[:1]
            raise UserError(f"{where}: {key}: unknown option {word!r}; did you mean {near[0]!r}?")
    return [f"ignored: {key}: {word}: no effect here: {OPTIONS[key][word]}" for word in words]


def _options(kind) -> tuple:
    """The alternatives of `X | Y | None`, or the one type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _takes_list(kind) -> bool:
    return any(typing.get_origin(option) is list for option in _options(kind))


def _harmless(key: str, value: object) -> bool:
    """Whether this value of a refused key asks for nothing that would have to be refused."""
    if key in HARMLESS:
        return str(value).lower() in HARMLESS[key]
    return not value or (isinstance(value, str) and value.lower() in ("false", "0", "0.0", "none", "null", "no", "{}"))


def _convert(value: object, kind, where: str, is_text: bool):
    """A JSON value, or text of the command line, as one of the alternatives of `kind`; UserError if it is none."""
    options = _options(kind)
    if is_text and type(None) in options and str(value).lower() in ("none", "null"):
        return None
    for option in options:
        converted = _as(value, option, is_text)
        if converted is not ...:
            return converted
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    names[dict] = "an object"
    wanted = " or ".join(names.get(option, _list_of(option)) for option in options)
    raise UserError(f"{where}: {json.dumps(value, ensure_ascii=False):.60} is the wrong type; {wanted} is needed")


def _list_of(kind) -> str:
    return "a list of whole numbers" if int in typing.get_args(kind) else "a list of text"


def _as(value: object, kind, is_text: bool):
    """`value` as exactly this type, or ... if it is not one."""
    if isinstance(value, list) and typing.get_origin(kind) is not list:
        return ...  # several words after one --key
    if kind is type(None):
        return None if value is None else ...
    if kind is bool:
        if is_text:
            return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), ...)
        return bool(value) if value in (True, False) and isinstance(value, (bool, int)) else ...
    if kind in (int, float):
        try:
            number = kind(value) if is_text else value
        except ValueError:
            return ...
        fits = isinstance(number, (int, float) if kind is float else int) and not isinstance(number, bool)
        return kind(number) if fits and math.isfinite(number) else ...
    if kind in (str, dict):
        return value if isinstance(value, kind) else ...
    if isinstance(value, str) and is_text:
        value = [part for part in re.split(r"[,\s]+", value) if part]
    if not isinstance(value, list):
        return ...
    items = [_as(part, *typing.get_args(kind), is_text) for part in value]
    return ... if ... in items else items
