"""JSON files and the command line -> one dataclass, strictly."""

import collections
import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from pathlib import Path

import kernels

from distributed.watchdog import Launch
from formats.files import UserError
from formats.paddlenlp import HARMLESS, IGNORED, OPTIONS, REFUSED
from parallel import Degrees
from plan import missing_model_message

# ================================================================================================ arguments

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")


METRICS = (
    "loss",
    "accuracy",
    "ppl",
    "bleu4",
    "rouge-1",
    "rouge-2",
    "rouge-l",
    "keyword_recall",
)  # what metric_for_best_model may name


@dataclasses.dataclass
class ScriptArgs:
    """The keys that every script has. A script that does not train subclasses it once and adds its own."""

    output_dir: str = ""  # where the script writes to
    overwrite_output_dir: bool = False  # remove the run that output_dir holds
    seed: int = 42  # of data order, initialization, dropout, sampling
    device: str = "auto"  # auto, cpu, gpu, gpu:1, dcu (ROCm), xpu, npu, gcu, or another device of a plug-in of Paddle
    kernels: str = "auto"  # back end of the fused ops, see kernels/__init__.py
    bf16: bool = False  # training: products in bfloat16, trained weights and all else in float32
    fp16: bool = False  # compute in float16
    disable_tqdm: bool | None = None  # true: plain lines, no bar; None: a bar if stderr is a terminal
    tensor_parallel_degree: int = (
        1  # data parallelism is what the product of the degrees leaves of the processes; -1 means 1
    )
    pipeline_parallel_degree: int = 1
    sharding_parallel_degree: int = -1  # -1: all that the others leave if `sharding` is set, else 1
    sep_parallel_degree: int = 1  # a sequence is spread, by exchanging tokens for heads around attention
    context_parallel_degree: int = 1  # a sequence is spread, keys and values going around; not beside sep
    expert_parallel_degree: int = 1  # spread over the ranks of the others, so not a factor

    def check(self):
        """Resolve values that depend on others and refuse those that contradict: UserError. Returns lines to print.

        A script's own Args extends it: `return super().check() + [...]`.
        """
        if self.seed < 0:
            raise UserError(f"seed: {self.seed}; it must not be negative")
        return _check_hardware(self)

    def check_model(self):
        """UserError, before a run begins, for a model or tokenizer that is not here: what to download, and to where."""
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
    do_eval: bool = False  # evaluate on the dev data (during training: see evaluation_strategy) and at the end
    do_predict: bool = False  # evaluate on the test data at the end
    per_device_train_batch_size: int = 8  # rows of one micro-batch
    per_device_eval_batch_size: int = 8  # rows of one evaluation batch
    gradient_accumulation_steps: int = 1  # micro-batches of one step
    num_train_epochs: float = 1.0  # passes over the data, unless max_steps is given
    max_steps: int = -1  # > 0: this many steps, whatever num_train_epochs says
    learning_rate: float = 5e-5  # the peak
    lr_scheduler_type: str = "linear"  # one of SCHEDULES
    warmup_steps: int = 0  # steps from 0 to the peak; > 0 wins over warmup_ratio
    warmup_ratio: float = 0.0  # the same as a fraction of all steps
    min_learning_rate: float | None = None  # where linear and cosine end; None: min_lr
    min_lr: float = 0.0  # upstream's other name for it
    decay_steps: int | None = None  # linear and cosine are at their end from this step on; None or 0: at the last step
    num_cycles: float = 0.5  # waves of cosine: 0.5 falls once
    lr_end: float = 1e-7  # where polynomial ends
    power: float = 1.0  # exponent of polynomial
    weight_decay: float = 0.0  # decoupled, on parameters of two or more dimensions only
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # global norm to clip the gradient to; 0: no clipping
    logging_steps: int = 500  # a log line every so many steps
    logging_first_step: bool = False  # and one for the first step
    logging_dir: str | None = None  # where visualdl writes; None: output_dir/vdl_log
    report_to: str | list[str] | None = None  # "visualdl" or "none"
    evaluation_strategy: str | None = None  # no, steps, epoch; None: steps if do_eval and eval_steps, else no
    eval_steps: int | None = None  # evaluate every so many steps; None: logging_steps
    max_evaluate_steps: int = -1  # > 0: at most this many batches an evaluation
    save_strategy: str = "steps"  # no, steps or epoch
    save_steps: int = 500  # a checkpoint every so many steps
    save_total_limit: int | None = None  # keep the newest so many checkpoints, and the best; None or 0: all
    load_best_model_at_end: bool = False  # end with the weights that evaluated best
    metric_for_best_model: str | None = None  # one of METRICS; None: loss
    greater_is_better: bool | None = None  # None: true unless the metric is loss or ppl
    resume_from_checkpoint: bool | str | None = None  # a path, or true: the newest complete one in output_dir
    ignore_load_lr_and_optim: bool = False  # resume with the weights and the step, but fresh moments
    ignore_save_lr_and_optim: bool = False  # checkpoints without the moments: smaller, no exact resume
    unified_checkpoint: bool = True  # upstream's switch; checkpoints always are
    unified_checkpoint_config: str | list[str] | None = None  # some of UNIFIED, separated by blanks or commas
    ckpt_quant_stage: str = "O0"  # moments in checkpoints: O0 float32, O1 8-bit, O2 4-bit integers
    dataloader_drop_last: bool = False  # drop the last incomplete batch of an epoch
    recompute: bool = False  # recompute activations in backward instead of keeping them, of each block …
    recompute_granularity: str = "full"  # … all; full_attn: attention's; core_attn: those behind its first linears; …
    no_recompute_layers: list[int] | None = None  # … but not of these blocks, counted from 0
    sharding: str | None = (
        None  # stage1 (moments), stage2 (gradients too), stage3 (weights too), and offload; None: stage1
    )
    virtual_pp_degree: int = 1  # stages of the pipeline on each of its ranks
    sequence_parallel: bool = False  # with tensor parallelism: tokens are spread between attention and MLP too
    hybrid_parallel_topo_order: str | None = None  # which axis is outside: pp_first (also None) or sharding_first
    dry_run: bool = False  # print shapes, parameters, FLOPs and memory a rank of the model, and end: no data is needed

    def check(self):
        _check_numbers(self)
        notes = super().check()
        if not self.output_dir:
            raise UserError("output_dir: missing; give the folder to write to")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise UserError("nothing to do: none of do_train, do_eval, do_predict is true")
        if getattr(self, "flash_mask", False) and not getattr(self, "zero_padding", True):
            raise UserError("flash_mask: true needs zero_padding: true (the mask keeps packed samples apart)")
        if self.min_learning_rate is None:
            self.min_learning_rate = self.min_lr
        elif self.min_lr not in (0.0, self.min_learning_rate):
            raise UserError(f"min_lr {self.min_lr:g} is not min_learning_rate {self.min_learning_rate:g}; give one")
        end = self.lr_end if self.lr_scheduler_type == "polynomial" else self.min_learning_rate
        if self.lr_scheduler_type in ("linear", "cosine", "polynomial") and end > self.learning_rate:
            raise UserError(f"learning_rate {self.learning_rate:g} is below {end:g}, {self.lr_scheduler_type}'s end")
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise UserError(f"decay_steps {self.decay_steps} must be more than warmup_steps {self.warmup_steps}")
        return notes + _check_strategies(self) + _check_unified(self)

    def check_dry_run(self):
        """check() of a run that only counts: what names data, output or steps may be missing, and processes too."""
        _check_numbers(self)
        if not self.model_name_or_path:
            raise UserError("model_name_or_path: missing")
        if getattr(self, "lora", False) and getattr(self, "prefix_tuning", False):
            raise UserError("lora and prefix_tuning are both true; choose one")
        return []


def _check_numbers(args):
    """Ranges and choices, one key at a time."""
    batches = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps"
    for key in f"{batches} logging_steps save_steps eval_steps".split():
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"{key}: {getattr(args, key)}; it must be at least 1")
    not_negative = "learning_rate min_learning_rate min_lr lr_end weight_decay max_grad_norm warmup_steps decay_steps"
    for key in f"{not_negative} num_cycles power".split():
        if getattr(args, key) is not None and getattr(args, key) < 0:
            raise UserError(f"{key}: {getattr(args, key)}; it must not be negative")
    for key, low in (("warmup_ratio", 0), ("adam_beta1", 0), ("adam_beta2", 0), ("adam_epsilon", 1e-30)):
        if not low <= getattr(args, key) < 1:
            raise UserError(f"{key}: {getattr(args, key)}; it must be at least {low} and below 1")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs: {args.num_train_epochs}; it must be positive, or max_steps be given")
    strategies, granularities = ("no", "steps", "epoch"), ("full", "full_attn", "core_attn")
    for key, choices in (
        ("lr_scheduler_type", SCHEDULES),
        ("evaluation_strategy", (*strategies, None)),
        ("save_strategy", strategies),
        ("recompute_granularity", granularities),
        ("metric_for_best_model", (*METRICS, *(f"eval_{name}" for name in METRICS), "no", None)),
    ):
        if getattr(args, key) not in choices:
            raise UserError(f"{key}: {getattr(args, key)!r}; possible are {', '.join(filter(None, choices))}")
    for layer in args.no_recompute_layers or ():
        if layer < 0:
            raise UserError(f"no_recompute_layers: {layer}; layers are counted from 0")
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or []:
        if name not in ("visualdl", "none"):
            raise UserError(f"report_to: {name!r}; possible are visualdl and none (metrics.jsonl is always written)")


def _check_hardware(args):
    """Devices, precision and the number of processes."""
    world = Launch.of_environment().world
    if world > 1 and not isinstance(args, TrainingArgs):
        raise UserError(f"this run has {world} processes, but this script works in one: start it without the launcher")
    Degrees.of(args, world=world)
    if args.fp16 and args.bf16:
        raise UserError("fp16 and bf16 are both true; choose one")
    if args.device != "auto":
        kernels.check_device(args.device)
    notes = []
    if args.fp16:
        notes.append("fp16: float16 is not here, so float32 is used")
    if args.bf16 and not isinstance(args, TrainingArgs):
        notes.append("bf16: only training computes in bfloat16, so float32 is used")
    for key in ("sharding", "sequence_parallel"):
        if getattr(args, key, None) and world == 1:
            notes.append(f"ignored: {key}: this run has one process")
    return notes


def _check_strategies(args):
    """When to evaluate and to save, and whether the best model can be known."""
    if args.evaluation_strategy is None:
        args.evaluation_strategy = "steps" if args.do_eval and args.eval_steps else "no"
    args.do_eval = args.do_eval or args.evaluation_strategy != "no"
    args.eval_steps = args.eval_steps or args.logging_steps
    metric = (args.metric_for_best_model or "no").removeprefix("eval_")
    args.metric_for_best_model = metric = "loss" if metric == "no" else metric
    if args.greater_is_better is None:
        args.greater_is_better = metric not in ("loss", "ppl")
    if not (args.load_best_model_at_end and args.do_train):
        return []
    if args.evaluation_strategy == "no":
        args.load_best_model_at_end = False
        return ["load_best_model_at_end: nothing is evaluated (evaluation_strategy: no), so the last model is kept"]
    if args.save_strategy != args.evaluation_strategy:
        both = f"save_strategy ({args.save_strategy}) to be evaluation_strategy ({args.evaluation_strategy})"
        raise UserError(f"load_best_model_at_end needs {both}: only a saved model can be loaded again")
    if args.save_strategy == "steps" and args.save_steps % args.eval_steps and args.eval_steps % args.save_steps:
        both = f"save_steps ({args.save_steps}) to be a multiple of eval_steps ({args.eval_steps}), or the reverse"
        raise UserError(f"load_best_model_at_end needs {both}")
    return []


UNIFIED = {  # the words of unified_checkpoint_config
    "async_save": "training goes on while a copy of the state is written",
    "skip_save_model_weight": "bf16: no model*.safetensors; the float32 master weights say it all, from_pretrained reads them",
    "remove_master_weight": "bf16: no float32 master weights; resuming from the rounded ones is no exact continuation",
    "master_weight_compatible": "resume from a checkpoint without master weights too, from its rounded weights",
    "enable_all_options": "skip_save_model_weight and master_weight_compatible",
    "ignore_merge_optimizer": "ignored: moments are always whole in the files, so that any topology can go on",
}


def _check_unified(args):
    """The words of unified_checkpoint_config as a list of those that change something; lines to print."""
    given = args.unified_checkpoint_config or ()
    words = re.split(r"[\s,]+", given.strip()) if isinstance(given, str) else list(given)
    for word in filter(None, words):
        if word not in UNIFIED:
            raise UserError(f"unified_checkpoint_config: {word!r} is not here; there are {', '.join(UNIFIED)}")
    if args.ckpt_quant_stage not in ("O0", "O1", "O2"):
        raise UserError(f"ckpt_quant_stage: {args.ckpt_quant_stage!r}; possible are O0, O1, O2")
    if "enable_all_options" in words:
        words += ["skip_save_model_weight", "master_weight_compatible"]
    notes = [] if args.unified_checkpoint else ["unified_checkpoint: false is ignored: it is the only layout here"]
    if "ignore_merge_optimizer" in words:
        notes.append(f"unified_checkpoint_config: ignore_merge_optimizer is {UNIFIED['ignore_merge_optimizer']}")
    aside = ("", "enable_all_options", "ignore_merge_optimizer")
    args.unified_checkpoint_config = sorted({word for word in words if word not in aside})
    return notes


def _options_of(key, value, where):
    """Lines for the options in a key of OPTIONS; UserError for one that upstream does not have."""
    words = re.findall(r"[^\s,]+", value) if isinstance(value, str) else value or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: {key}: {value!r}; options separated by spaces or commas are needed")
    for word in words:
        if word not in OPTIONS[key]:
            near = difflib.get_close_matches(word, OPTIONS[key], 1) or list(OPTIONS[key])[:1]
            raise UserError(f"{where}: {key}: unknown option {word!r}; did you mean {near[0]!r}?")
    return [f"ignored: {key}: {word}: no effect here: {OPTIONS[key][word]}" for word in words]


def parse_args(Args, argv=None):
    """`argv` (default: the command line): JSON files, then --key value (or --key=value), later wins -> a checked Args.

    Prints one line for every key that is ignored and every note of Args.check(). Raises UserError.
    """
    given = {}  # key -> (value, where it stands, whether it is text from the command line)
    tokens = collections.deque(sys.argv[1:] if argv is None else argv)
    kinds = typing.get_type_hints(Args)
    while tokens:
        token = tokens.popleft()
        if not token.startswith("--"):
            given.update({key: (value, token, False) for key, value in read_json_config(token).items()})
            continue
        key, equals, value = token[2:].partition("=")
        if not equals:
            values = []
            while tokens and not tokens[0].startswith("--") and (not values or _takes_list(kinds.get(key))):
                values.append(tokens.popleft())
            if not values and key in kinds and bool not in _options(kinds[key]):
                raise UserError(f"command line: --{key}: a value is missing")
            value = ",".join(values) if values else "true"  # `--do_train` alone is true
        given[key] = (value, "command line", True)

    fields, lines = {}, []
    of_training = {field.name for field in dataclasses.fields(TrainingArgs)}
    for key, (value, where, text) in given.items():
        if key in kinds:
            fields[key] = _convert(value, kinds[key], f"{where}: {key}", text)
        elif key == "dry_run" and not _harmless(key, value):
            raise UserError(
                f"{where}: dry_run: pretrain.py, finetune.py and dpo.py count alone; this script does not train"
            )
        elif key in of_training:
            lines.append(f"ignored: {key}: nothing is trained here")
        elif key in REFUSED and not _harmless(key, value):
            raise UserError(f"{where}: {key}: {value!r}: {REFUSED[key]}")
        elif key in OPTIONS:
            lines += _options_of(key, value, where)
        elif key in IGNORED or key in REFUSED:
            lines.append(f"ignored: {key}: {IGNORED.get(key) or REFUSED[key]}")
        elif key != "_doc":
            near = difflib.get_close_matches(key, kinds, 1) or difflib.get_close_matches(
                key, [*IGNORED, *REFUSED, *OPTIONS, *of_training], 1
            )
            raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    args = Args(**fields)
    lines += args.check_dry_run() if getattr(args, "dry_run", False) else args.check()
    if lines:
        print("\n".join(lines), flush=True)
    return args


def read_json_config(path):
    """{key: value} of one JSON file of flat keys. UserError with file and line for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the arguments are JSON files, then --key value") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from None

    def unique(pairs):
        for key, count in collections.Counter(key for key, _ in pairs).items():
            if count > 1:
                line = 1 + text.count("\n", 0, [m.start() for m in re.finditer(rf'"{re.escape(key)}"\s*:', text)][-1])
                raise UserError(f"{path}:{line}: key {key!r} is given {count} times; keep one")
        return dict(pairs)

    def finite(name):
        raise UserError(f"{path}: {name} is not a number of JSON")

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=finite)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(found, dict):
        raise UserError(f'{path}: holds a {type(found).__name__}; an object is needed: {{"learning_rate": 1e-4, …}}')
    return found


def _options(kind):
    """The alternatives of `X | Y | None`, or the one type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _takes_list(kind):
    return any(typing.get_origin(option) is list for option in _options(kind))


def _harmless(key, value):
    if key in HARMLESS:
        return (value.lower() if isinstance(value, str) else value) in HARMLESS[key]
    return not value or (isinstance(value, str) and value.lower() in ("false", "0", "none", "null", "no"))


def _convert(value, kind, where, text):
    """A JSON value, or text of the command line, as one of the alternatives of `kind`; UserError if it is none."""
    options = _options(kind)
    if text and type(None) in options and value.lower() in ("none", "null"):
        return None
    for option in options:
        converted = _as(value, option, text)
        if converted is not ...:
            return converted
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    wanted = " or ".join(names.get(option, _list_of(option)) for option in options)
    raise UserError(f"{where}: {json.dumps(value, ensure_ascii=False):.60} is the wrong type; {wanted} is needed")


def _list_of(kind):
    return "a list of whole numbers" if int in typing.get_args(kind) else "a list of text"


def _as(value, kind, text):
    """`value` as exactly this type, or ... if it is not one."""
    if kind is type(None):
        return None if value is None else ...
    if kind is bool:
        if text:
            return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), ...)
        return bool(value) if value in (True, False) and isinstance(value, (bool, int)) else ...
    if kind in (int, float):
        try:
            number = kind(value) if text else value
        except ValueError:
            return ...
        fits = isinstance(number, (int, float) if kind is float else int) and not isinstance(number, bool)
        return kind(number) if fits and math.isfinite(number) else ...
    if kind is str:
        return value if isinstance(value, str) else ...
    if isinstance(value, str) and text:
        value = [part for part in re.split(r"[,\s]+", value) if part]
    if not isinstance(value, list):
        return ...
    found = [_as(part, *typing.get_args(kind), text) for part in value]
    return ... if ... in found else found
