"""Post-training quantization of weights alone (to nearest, GPTQ, AWQ, AutoRound; 2 to 8 bits, fp8), or activations too.

    python quantize.py configs/llama_gptq.json                       # GPTQ; any key again as --key value
    python quantize.py configs/llama_ptq.json                        # A8W8 with smoothing and its search

Reads a Hugging Face folder, or an adapter's (LoRA is merged first), and calibration records (see data.py: quant.json if
it is there, else train.json; or a corpus prefix). Writes a folder of real integers (or e4m3) that every script opens,
with a report: error, bits and seconds of each linear; on dev, perplexity, accuracy, KL divergence to the float model.
Embeddings, norms and the head stay floats. The same command goes on after a kill (see quantization/progress.py).

One pass over the model, block by block: a block's linears see the outputs of the quantized blocks before it, and an
expert's linears see the tokens routed to it. Memory: the model (each float weight is freed when its integers are
there), the hidden states of the calibration tokens (see quantization/calibration.py), one batch in flight, and for
linears that share an input one Hessian (n_in^2 float32, three times that besides while it is factored; for experts as
many as HESSIAN_BYTES holds). Calibration tokens: gptq_step or ptq_step * per_device_train_batch_size * max_length.

Shift and smoothing are applied where they leave the function unchanged. Where they would not (a residual that reads the
norm, gelu before down_proj, a router without bias), a printed line says what is left out.

Not here: quantization-aware training.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kernels  # before paddle: it silences what paddle prints at import

import numpy as np
import paddle

import trainer  # before paddle: it silences what paddle says while it is imported
from adapters import base_folders, from_pretrained, load_adapter, merge
from arguments import ScriptArgs
from data import CorpusLoader, SFTDataset, SFTLoader
from formats.files import UserError, atomic_file
from formats.quantization_config import bits_of, leave_out
from formats.tokenizer import Tokenizer
from formats.weights import named_weights, save_pretrained
from model import CausalLM, block_linears
from quantization.calibration import CacheRecorder, Calibration, linear_refs, sequential_groups
from quantization.methods import METHODS
from quantization.mixed_bits import FORMATS, check_size, choose_bits, mixed_config, sensitivities
from quantization.progress import Progress
from quantization.report import comparison_table, evaluate, formats_table, mean_bits, read_states, stored_bits

BITS = {"weight_only_int8": 8, "wint8": 8, "weight_only_int4": 4, "wint4": 4, "a8w8": 8}  # the known quant_type
BITS |= {"fp8": 8, "a8w8_fp8": 8}  # e4m3: of weights, and of activations too
BITS |= {"weight_only_int3": 3, "wint3": 3, "weight_only_int2": 2, "wint2": 2}
MIXED = "weight_only_mixed"  # the quant_type of bits: 4.5
REFUSED = {  # PaddleNLP's keys that are refused when they ask for something, and why
    "do_qat": "quantization-aware training is not here; quantization is done after training",
    "load_quant_model": "a quantized folder is evaluated by finetune.py with do_eval: true and no do_train",
    "shift_all_linears": "down_proj's inputs cannot be shifted by changing weights; shift: true moves what norms feed",
}


@dataclasses.dataclass
class Args(ScriptArgs):
    model_name_or_path: str = ""  # Hugging Face folder, or an adapter's, which is merged into the base it names
    lora_path: str | None = None  # merge this adapter into model_name_or_path first
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; None: model_name_or_path
    dataset_name_or_path: str = ""  # folder with quant.json or train.json, and dev.json; or the prefix of a corpus
    split: str = "949,50,1"  # of a corpus: shares for calibration, dev, nothing
    src_length: int = 1024  # most tokens of a prompt
    max_length: int = 2048  # most tokens of a row
    chat_template: str | None = None  # as in finetune.py; None: the tokenizer's own
    zero_padding: bool = False  # several records a row, kept apart by FlashMask rows
    greedy_zero_padding: bool = False  # best fit over the whole data instead of in order
    per_device_train_batch_size: int = 8  # rows of a calibration batch
    per_device_eval_batch_size: int = 8  # rows of an evaluation batch
    do_eval: bool = False  # perplexity and accuracy on dev, before and after
    max_evaluate_steps: int = -1  # > 0: at most this many batches an evaluation
    do_ptq: bool = False  # round to nearest: weights, and with a8w8 activations
    do_gptq: bool = False  # weights by GPTQ; with quant_type a8w8 after shift and smooth
    do_autoround: bool = False  # weights by rounding that gradients choose
    do_awq: bool = False  # weights alone: first scale channels by the size of their inputs
    awq_step: int = 8  # do_awq: calibration batches
    auto_clip: bool = False  # weights alone, do_ptq: search each group's range; the other methods search theirs
    quant_type: str | None = None  # weight_only_int8 to _int2 (wint8), a8w8, fp8, a8w8_fp8; None: a8w8, GPTQ int4;
    # with c8 at the end, as a8w8c8: also scales for keys and values in int8 (serve.py's cachekv_int8_type: static)
    cachekv_quant_method: str = "abs_max_headwise"  # c8: largest value of all batches, or avg_headwise: mean of theirs
    bits: float | None = None  # weights alone, in place of quant_type: 4, 8; 4.5 mixes formats of that mean size
    sensitivity: bool = False  # list what each part loses in each format; bits: 4.5 measures it anyway
    sensitivity_step: int = 1  # calibration batches that the list is measured on
    weight_quant_method: str | None = None  # abs_max_channel_wise, groupwise, fp8: abs_max; None: by group_size
    skip_list_names: str | list[str] | None = None  # linears that stay floats: parts of their names, such as down_proj
    outlier_ratio: float = 20.0  # report inputs whose largest channel or token is so many times the median one
    group_size: int | None = None  # input rows that share a scale: 64, …; -1: all; None: -1, groupwise 128
    sym: bool = True  # weights alone: zero point in the middle; false: one per group
    autoclip_step: int = 8  # auto_clip: calibration batches
    gptq_step: int = 8  # calibration batches of weight-only quantization without these two
    desc_act: bool = False  # GPTQ: groups by the size of inputs, not by position; costs a look-up at run time
    percdamp: float = 0.01  # GPTQ: damping, a share of the Hessian's mean diagonal
    static_groups: bool = False  # GPTQ: beside desc_act, groups stay runs by position; no look-up at run time
    search_range: bool = True  # GPTQ: also try smaller ranges for each scale; false: abs max alone
    autoround_iters: int = 200  # do_autoround: steps a block, each on one calibration batch
    autoround_lr: float | None = None  # how far the first step moves; None: 1 / autoround_iters
    ptq_step: int = 32  # calibration batches of a8w8 and a8w8_fp8
    activation: str = "per_tensor"  # a8w8: one scale, by calibration; per_token: each token's own; a8w8 alone: mixed
    per_token_ratio: float = 1.5  # mixed: each token's own where one scale makes the error that many times larger
    act_quant_method: str = "avg"  # one scale: from the largest value of all batches (abs_max), or the mean of theirs
    shift: bool = False  # move each channel's range to be symmetric
    shift_step: int = 32  # calibration batches that count for it
    smooth: bool = False  # divide large channels, multiply their weights
    smooth_all_linears: bool = False  # also the inputs of o_proj and down_proj
    smooth_step: int = 32  # calibration batches that count for it
    smooth_alpha: float = 0.5  # how much of the difficulty moves to the weights, without search
    smooth_piecewise_search: bool = False  # search the factors, piece by piece, for the least error
    smooth_k_piece: int = 3  # pieces that the channels are split into by size
    smooth_search_piece: bool = False  # also search the number of pieces, 1 to smooth_k_piece
    search_alpha_min: float = 0.2
    search_alpha_max: float = 0.8
    search_alpha_step: float = 0.02
    search_scale_min: float = 1.0  # constant factors that are tried as well, in steps of 0.5
    search_scale_max: float = 5.0
    search_tokens: int = 512  # calibration tokens that an error is measured on

    refused = REFUSED

    def check(self):
        for key in ("model_name_or_path", "output_dir"):
            if not getattr(self, key):
                raise UserError(f"{key}: missing")
        chosen = [key for key in ("do_ptq", "do_gptq", "do_autoround") if getattr(self, key)]
        if not chosen and self.do_awq:
            self.do_ptq, chosen = True, ["do_ptq"]
        if len(chosen) != 1:
            found = " and ".join(chosen) if chosen else "none"
            raise UserError(f"{found}: true; choose one of do_ptq, do_gptq and do_autoround")
        self._check_bits()
        if isinstance(self.skip_list_names, str):
            self.skip_list_names = [name.strip() for name in self.skip_list_names.split(",") if name.strip()]
        self._check_numbers()
        self._check_weights()
        return super().check() + self._check_activations()

    def _check_bits(self):
        """quant_type and bits, which say the same, made to agree."""
        by_bits = {bits: name for name, bits in BITS.items() if name.startswith("weight_only")}
        if self.quant_type is None:
            self.quant_type = "a8w8" if self.do_ptq and not self.do_awq else "weight_only_int4"
            if self.bits is not None:
                self.quant_type = by_bits.get(self.bits, MIXED)
        self.quant_type = {"weight_only_fp8": "fp8", "a8w8c8_fp8": "a8w8_fp8c8"}.get(self.quant_type, self.quant_type)
        if self.weights_type not in BITS and (self.quant_type != MIXED or self.bits is None):
            names = f"{', '.join(BITS)}, and c8 after each"
            raise UserError(f"quant_type: {self.quant_type!r} is not here; there are {names}")
        if self.bits is not None and self.bits != BITS.get(self.weights_type, self.bits):
            raise UserError(f"bits {self.bits:g} contradicts quant_type {self.quant_type}; leave one of them out")
        alone = ["do_autoround", "do_awq", "auto_clip"] + ["do_gptq"] * (self.weights_type != "a8w8")
        for key in alone:
            if getattr(self, key) and (self.rounds_inputs or self.is_float8):
                raise UserError(
                    f"{key} quantizes weights alone, to integers: quant_type must be weight_only_int4 or another"
                )
        for key in ("skip_list_names", "do_autoround", "do_awq"):
            if self.is_mixed and getattr(self, key):
                raise UserError(
                    f"{key}: it is not here beside bits with a fraction ({self.bits:g}); leave one of them out"
                )
        if self.is_mixed and not min(FORMATS) < self.bits < 16:
            raise UserError(f"bits: {self.bits:g}; it must be more than {min(FORMATS)}, scales and zeros counted")
        self.bits = self.bits if self.is_mixed else BITS[self.weights_type]

    @property
    def is_mixed(self):
        """Whether linears have several formats, whose mean size `bits` says."""
        return self.quant_type == MIXED

    @property
    def weights_type(self):
        """quant_type without what it says of the cache."""
        return self.quant_type.removesuffix("c8")

    @property
    def is_c8(self):
        """Whether scales of keys and values are found."""
        return self.quant_type.endswith("c8")

    @property
    def rounds_inputs(self):
        """Whether activations are rounded too."""
        return self.weights_type.startswith("a8w8")

    @property
    def is_float8(self):
        """Whether it is e4m3 in place of integers."""
        return self.weights_type.endswith("fp8")

    def _check_numbers(self):
        steps = "sensitivity_step autoround_iters awq_step autoclip_step gptq_step ptq_step shift_step smooth_step"
        sizes = "per_device_train_batch_size per_device_eval_batch_size smooth_k_piece search_tokens"
        for key in f"{sizes} {steps}".split():
            if getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key)}; it must be at least 1")
        if self.src_length >= self.max_length or self.src_length < 1:
            raise UserError(f"src_length {self.src_length} must be positive and below max_length {self.max_length}")
        most_alpha = self.search_alpha_max
        for key, low, high in (
            ("percdamp", 0, 10),
            ("autoround_lr", 0, 1),
            ("smooth_alpha", 0, 1),
            ("search_alpha_min", 0, most_alpha),
            ("search_alpha_max", 0, 1),
            ("search_alpha_step", 1e-3, 1),
            ("search_scale_min", 1e-3, self.search_scale_max),
        ):
            if getattr(self, key) is not None and not low <= getattr(self, key) <= high:
                raise UserError(f"{key}: {getattr(self, key):g}; it must be between {low:g} and {high:g}")
        for key, choices in (
            ("activation", ("per_tensor", "per_token", "mixed")),
            ("act_quant_method", ("abs_max", "avg")),
            ("cachekv_quant_method", ("abs_max_headwise", "avg_headwise", *([] if self.is_c8 else ["abs_max"]))),
        ):
            if getattr(self, key) not in choices:
                raise UserError(f"{key}: {getattr(self, key)!r}; possible are {', '.join(choices)}")
        for key in ("outlier_ratio", "per_token_ratio"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key):g}; it must be at least 1")

    def _check_weights(self):
        """weight_quant_method and group_size, which say the same, made to agree."""
        method = self.weight_quant_method
        choices = ("abs_max_channel_wise", "abs_max" if self.is_float8 else "groupwise")
        if method not in (None, *choices):
            raise UserError(f"weight_quant_method: {method!r}; possible are {' and '.join(choices)}")
        if self.group_size is None:
            self.group_size = 128 if method == "groupwise" else -1
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise UserError(f"group_size: {self.group_size}; it must be -1 or a multiple of 8, such as 32, 64, 128")
        if method is not None and (method == "groupwise") != (self.group_size != -1):
            raise UserError(f"group_size {self.group_size} contradicts weight_quant_method {method}")
        if (self.rounds_inputs or self.is_float8) and self.group_size != -1:
            reason = f"has one weight scale per output channel: group_size {self.group_size} must be -1"
            raise UserError(f"{self.weights_type} {reason}")

    def _check_activations(self):
        """Shift and smoothing belong to a8w8; returns lines to print."""
        asked = [key for key in ("shift", "smooth") if getattr(self, key) and not (key == "smooth" and self.do_awq)]
        if self.weights_type != "a8w8" and asked:
            raise UserError(f"{asked[0]} prepares activations: it needs quant_type: a8w8, found {self.quant_type}")
        if self.is_float8 and self.activation == "mixed":
            raise UserError("activation: mixed compares errors of int8; with fp8 give per_tensor or per_token")
        if self.rounds_inputs and not self.dataset_name_or_path:
            raise UserError(f"dataset_name_or_path: missing; {self.weights_type} is calibrated on records")
        needs = {key: getattr(self, key) for key in ("do_gptq", "do_autoround", "do_awq", "auto_clip", "do_eval")}
        needs |= {"c8": self.is_c8, "sensitivity": self.sensitivity}
        needs["bits with a fraction"] = self.is_mixed
        for key in (key for key, asked in needs.items() if asked and not self.dataset_name_or_path):
            raise UserError(f"dataset_name_or_path: missing; {key} needs records")
        notes = []
        if self.cachekv_quant_method == "abs_max":
            notes.append("cachekv_quant_method: abs_max does nothing: quant_type does not end in c8")
        if self.do_awq and self.smooth:
            notes.append("smooth: with do_awq the factors are AWQ's")
        if self.auto_clip and not self.do_ptq:
            notes.append(f"auto_clip: {self.method} searches ranges already")
        for key in ("smooth_all_linears", "smooth_piecewise_search"):
            if getattr(self, key) and not self.smooth:
                notes.append(f"{key}: without smooth: true it does nothing")
        if self.smooth_search_piece and not (self.smooth and self.smooth_piecewise_search):
            notes.append("smooth_search_piece: without smooth and smooth_piecewise_search it does nothing")
        return notes

    @property
    def method(self):
        """The row of METHODS."""
        if self.rounds_inputs or self.is_float8:
            return self.weights_type + "_gptq" * self.do_gptq  # of a8w8
        names = {"autoround": self.do_autoround, "gptq": self.do_gptq, "awq": self.do_awq or self.auto_clip}
        return next((name for name, chosen in names.items() if chosen), "rtn")

    @property
    def algorithm(self):
        """The name of the algorithm in quantization_config."""
        if self.is_float8:
            return "rtn"
        if self.weights_type != "a8w8":
            parts = [
                "awq" if self.do_awq else "",
                self.method if self.method != "awq" else "",
                "clip" if self.auto_clip else "",
            ]
            return "_".join(filter(None, parts))
        search = "search" if self.smooth and self.smooth_piecewise_search else ""
        parts = ["shift" if self.shift else "", "smooth" if self.smooth else "", search, "gptq" if self.do_gptq else ""]
        return "_".join(filter(None, parts)) or "rtn"


# ======================================================================== quantizing the model


FLOAT_STATES = "float_states.bin"  # of Progress: what the float model said of the dev data
HESSIAN_BYTES = 1 << 30  # of the Hessians that are summed up in one run over the calibration data


def fit_to_memory(stage: list, refs: dict) -> list:
    """The groups of a stage in lists whose Hessians fit into HESSIAN_BYTES, or of one group."""
    lists, room = [], 0
    for group in stage:
        size = 4 * refs[group.names[0]].layer.n_in ** 2
        if size > room:
            lists.append([])
            room = HESSIAN_BYTES
        lists[-1].append(group)
        room -= size
    return lists


def skipped_linears(model: CausalLM, names: list[str] | None) -> list[str]:
    """Paths of the linears that stay floats: those that have one of `names` in them."""
    paths = list(block_linears(model))
    for name in names or ():
        if not any(name in path for path in paths):
            raise UserError(f"skip_list_names: {name!r} is in no name of a linear; names are {paths[0]} to {paths[-1]}")
    skipped = [path for path in paths if any(name in path for name in names or ())]
    if len(skipped) == len(paths):
        raise UserError(f"skip_list_names: {', '.join(names)}: nothing is left to quantize")
    return skipped


def without_skipped(stages: list, skipped: set[str]) -> list:
    """The groups of sequential_groups() without these linears, and without groups of which none is left."""
    kept = [[(group, tuple(n for n in group.names if n not in skipped)) for group in stage] for stage in stages]
    return [[group._replace(names=names) for group, names in stage if names] for stage in kept]


@paddle.no_grad()
def quantize_model(
    model: CausalLM,
    calibration: Calibration,
    args: Args,
    print_line: Callable = print,
    progress: Progress | None = None,
    mixed: dict | None = None,
) -> list[dict]:
    """Quantize the linears of all blocks in place, one pass; returns the report's rows, printing each.

    progress: keeps finished blocks, and has those of a killed run. mixed: `bits` and `dynamic` of quantization_config
    where linears have several formats.
    """
    model.eval()
    skipped, printed = skipped_linears(model, args.skip_list_names), set()
    cache = CacheRecorder(len(model.layers)) if args.is_c8 else None

    def print_once(line):
        if line not in printed:
            print_line(line)
        printed.add(line)

    report = progress.rows() if progress else []
    finished = progress.finished_blocks() if report else 0
    if finished:
        for block in model.layers[:finished] if METHODS[args.method].float_targets else ():
            calibration.float_outputs(block)
        progress.restore(model, quantization_config(args, skipped, report) | (mixed or {}))
    for index, block in enumerate(model.layers):
        if index >= finished:
            rows = []
            for row in quantize_block(model, index, calibration, args, skipped, mixed or {}, print_once):
                print_line(report_line(row, args.percdamp))
                rows.append(row)
            report += rows
            if progress:
                progress.save(index, block, rows)
        calibration.advance(block, cache)
    quantization = quantization_config(args, skipped, report) | (mixed or {})
    scales = {} if cache is None else cache.scales(args.cachekv_quant_method)
    model.config = dataclasses.replace(model.config, quantization=quantization | scales)
    return report


def quantize_block(
    model: CausalLM,
    index: int,
    calibration: Calibration,
    args: Args,
    skipped: list[str],
    mixed: dict,
    print_once: Callable,
) -> Iterator[dict]:
    """Quantize a block's linears in the order of its computation: q, k, v, then o, then gate and up, then down.

    All but those of the paths `skipped`. Yields the report's row of each.
    """
    method, block, start = METHODS[args.method], model.layers[index], time.perf_counter()
    refs, stages = linear_refs(model, index), sequential_groups(block, model.config)
    stages = without_skipped(stages, {name for name, ref in refs.items() if ref.path in skipped})
    stats = {}  # by the name of a group's first linear

    def observe(groups, **keep):
        firsts = [group.names[0] for group in groups]
        found = dict(zip(firsts, calibration.observe(block, [refs[name] for name in firsts], **keep)))
        kernels.trim_memory()  # of the activations, and of the float weights that were replaced
        return found

    parts = [part for stage in stages for part in fit_to_memory(stage, refs)]
    lines = method.start_block(block, refs, parts, calibration, args)
    if method.whole_block:
        stats = observe([group for stage in stages for group in stage], **method.observes(args))
        lines += method.prepare_block(block, refs, stats, model.config, args)
    for line in lines:
        print_once(line)
    for groups in parts:
        if not method.whole_block:
            stats = observe(groups, **method.observes(args))
        elif method.needs_hessian:
            for name, found in observe(groups, keep_hessian=True).items():
                stats[name].hessian, stats[name].tokens = found.hessian, found.tokens
        for group in groups:
            group_stats = stats.pop(group.names[0])
            shared = method.prepare(group_stats, args)
            for name in group.names:  # the time of what linears share is in the first one's row
                path, shape = refs[name].path, [refs[name].layer.n_in, refs[name].layer.n_out]
                own = dataclasses.replace(args, bits=bits_of({"bits": args.bits, **mixed}, path))
                error, damping = method.quantize(refs[name], group_stats, shared, own)
                row = {"linear": path, "shape": shape, "error": error, "damping": damping, **group_stats.outliers}
                row |= {"scheme": refs[name].layer.scheme, "static": refs[name].layer.input_scale is not None}
                row |= {"note": group_stats.note} if group_stats.note else {}
                yield {**row, "seconds": round(time.perf_counter() - start, 3)}
                start = time.perf_counter()


def report_line(row: dict, percdamp: float) -> str:
    """What is printed of a linear."""
    shape, note = "{}x{}".format(*row["shape"]), ""
    if row["damping"] is not None:
        note = f"  damping {row['damping']:g}"
        if row["damping"] > percdamp:
            note += f": not positive definite with percdamp {percdamp:g}"
    note += f"  {row['note']}" if "note" in row else ""
    numbers = f"error {100 * row['error']:8.4f} %  {row['seconds']:6.2f} s"
    return f"{row['linear']:<42} {shape:>12}  {row['scheme']:<8}  {numbers}{note}"


def quantization_config(args: Args, skipped: list[str], rows: list[dict]) -> dict:
    """What config.json says of the integers; skipped: linears that stay floats; rows: of the report."""
    method = METHODS[args.method].config(args)
    config = {"bits": args.bits, "group_size": args.group_size, "algorithm": args.algorithm, "shift": args.shift}
    if skipped:
        config["modules_to_not_convert"] = skipped
        if method["quant_method"] == "gptq":
            config |= leave_out(skipped, [row["linear"] for row in rows])
    if args.weights_type == "a8w8" and args.activation == "mixed":
        config["per_token_modules"] = [row["linear"] for row in rows if not row["static"]]
    return {**method, **config}


# ======================================================================== main


def loaders(args: Args, tokenizer: Tokenizer) -> tuple:
    """(calibration loader, how many of its batches, dev loader or None); (None, 0, None) without data."""
    if not args.dataset_name_or_path:
        return None, 0, None
    path = args.dataset_name_or_path
    a8w8_steps = max(args.ptq_step, args.shift_step * args.shift, args.smooth_step * args.smooth)
    awq_steps = max(args.awq_step * args.do_awq, args.autoclip_step * args.auto_clip)
    steps = a8w8_steps if args.rounds_inputs else awq_steps if args.method == "awq" else args.gptq_step
    if Path(f"{path}.idx").is_file() or Path(f"{path}_idx.npz").is_file():
        size, T = args.per_device_train_batch_size, args.max_length
        calibration = CorpusLoader(path, args.split, "train", steps * size, T, size, seed=args.seed)
        dev = CorpusLoader(path, args.split, "valid", None, T, args.per_device_eval_batch_size, shuffle=False)
        return calibration, steps, dev if args.do_eval else None

    def loader(split, batch_size, shuffle):
        lengths = args.src_length, args.max_length
        records = SFTDataset(path, tokenizer, *lengths, split=split, progress=not args.disable_tqdm)
        return SFTLoader(
            records,
            batch_size,
            args.max_length,
            zero_padding=args.zero_padding,
            greedy_zero_padding=args.greedy_zero_padding,
            seed=args.seed,
            shuffle=shuffle,
            pad_token_id=tokenizer.pad_token_id,
        )

    own = any((Path(path) / name).exists() for name in ("quant.json", "quant.jsonl", "quant"))
    calibration = loader("quant" if own else "train", args.per_device_train_batch_size, True)
    if calibration.batches_per_epoch < steps:
        print(f"calibration: the data has {calibration.batches_per_epoch} batches, {steps} were asked for")
    dev = loader("dev", args.per_device_eval_batch_size, False) if args.do_eval else None
    if dev and steps and set(dev.dataset.files) & set(calibration.dataset.files):
        print(f"do_eval: {dev.dataset.files[0]} is the calibration data too; a folder with dev.json has its own")
    return calibration, min(steps, calibration.batches_per_epoch), dev


def open_model(args: Args) -> CausalLM:
    """The float model to quantize, adapters merged into it."""
    model = from_pretrained(args.model_name_or_path)
    if args.lora_path:
        model = merge(load_adapter(model, args.lora_path))
    if model.config.quantization is not None:
        method = model.config.quantization["quant_method"]
        raise UserError(f"{args.model_name_or_path}: is quantized already ({method}); give the float model")
    if args.is_c8 and model.config.position == "rope_2d":
        raise UserError(f"quant_type: {args.quant_type}: ChatGLM-6B keeps keys and values in float32; leave c8 out")
    if model.prefix is not None:
        path = args.lora_path or args.model_name_or_path
        raise UserError(f"{path}: a prefix cannot be quantized; quantize its base model")
    return model


def rest_dtype(model: CausalLM) -> str:
    """The dtype to store the float tensors in (scales keep their own): bfloat16 if that loses nothing."""
    floats = [w.parameter for w in named_weights(model) if w.stored is None]
    rows = (p[at : at + 4096].numpy() for p in floats for at in range(0, p.shape[0], 4096))  # never a whole embedding
    exact = not any((array.view(np.uint32) & 0xFFFF).any() for array in rows)  # the bits that bfloat16 drops
    return "bfloat16" if exact else "float32"


def weight_bytes(*folders) -> int:
    """Bytes of the weight files of these folders."""
    return sum(
        file.stat().st_size
        for end in ("*.safetensors", "*.bin")
        for folder in folders
        for file in Path(folder).glob(end)
    )


def read_files(args: Args) -> Iterator[Path]:
    """The files that the result depends on: of the model, of an adapter to merge, of the tokenizer and the data."""
    folders = base_folders(args.model_name_or_path)
    folders += [Path(path) for path in (args.lora_path, args.tokenizer_name_or_path) if path]
    for folder in folders:
        yield from Path(folder).glob("*")
    if data := args.dataset_name_or_path:
        yield from Path(data).rglob("*") if Path(data).is_dir() else Path(data).parent.glob(f"{Path(data).name}*")


def float_metrics(model: CausalLM, dev: trainer.Loader, args: Args, progress: Progress) -> dict:
    """Metrics of the float model on dev; its hidden states before the head are kept for the comparison."""
    progress.start()
    with atomic_file(progress.folder / FLOAT_STATES, "wb") as file:
        return evaluate(model, dev, args.max_evaluate_steps, save_states=file)


def measure_sensitivity(model: CausalLM, loader: trainer.Loader, batches: int, args: Args) -> list[dict]:
    """What each part of the float model loses in each format, on the first calibration batches."""
    with paddle.no_grad():
        calibration = Calibration(model, loader, min(batches, args.sensitivity_step))
    return sensitivities(model, calibration, args)


def main(args: Args) -> None:
    # ====================================================================== 1. data, model
    progress = Progress(args, read_files(args))
    if progress.saving:  # killed while it wrote the model: what output_dir holds is its own
        args.overwrite_output_dir = True
    trainer.check_output_dir(args)
    folder = Path(args.output_dir).absolute()
    if not os.access(next(p for p in (folder, *folder.parents) if p.exists()), os.W_OK):
        raise UserError(f"output_dir: {args.output_dir} cannot be written to")
    tokenizer = trainer.setup_tokenizer(args)
    calibration_loader, batches, dev = loaders(args, tokenizer)
    model = open_model(args)
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path)
    report = {
        "bytes_float32": 4 * model.num_parameters(),
        "bytes_before": weight_bytes(*base_folders(args.model_name_or_path)),
    }
    if args.lora_path:
        report["bytes_before"] += weight_bytes(args.lora_path)
    shapes = [(layer.n_in, layer.n_out) for *_, layer in block_linears(model).values()]
    widths = {n_in for n_in, _ in shapes}
    if args.is_mixed:
        check_size(shapes, args.bits, args.group_size)
    if args.group_size != -1 and (uneven := {n_in for n_in in widths if n_in % args.group_size}):
        print(f"group_size {args.group_size} does not divide {sorted(uneven)} input rows: their last group is shorter")

    # ====================================================================== 2. before
    before = progress.once("before", lambda: float_metrics(model, dev, args, progress)) if dev else None
    if before:
        print(f"dev before: {trainer.format_metrics(before)}", flush=True)
    units, mixed = None, None
    if args.sensitivity or args.is_mixed:
        units = progress.once("sensitivity", lambda: measure_sensitivity(model, calibration_loader, batches, args))
    if args.is_mixed:
        mixed = mixed_config(units, choose_bits(units, args.bits))

    # ====================================================================== 3. quantize
    start = time.perf_counter()
    with paddle.no_grad():
        calibration = Calibration(model, calibration_loader, batches)
    tokens = calibration.tokens
    print(f"{args.algorithm}, {args.quant_type}: {tokens:,} calibration tokens in {batches} batches", flush=True)
    try:
        rows = quantize_model(model, calibration, args, progress=progress, mixed=mixed)
    except UserError:
        progress.abandon()
        raise
    del calibration
    seconds = time.perf_counter() - start
    bits = stored_bits(model)
    for row in rows:
        row["bits_per_weight"] = round(bits[row["linear"]], 4)

    # ====================================================================== 4. after
    after = None
    if dev:
        states = read_states(progress.folder / FLOAT_STATES, model)
        after = evaluate(model, dev, args.max_evaluate_steps, float_states=states)
    progress.once("saving", lambda: True)
    trainer.prepare_output_dir(args)  # only here: what fails above must not cost the model it would replace
    tokenizer.save(args.output_dir)
    save_pretrained(model, args.output_dir, rest_dtype(model))
    report |= {
        "algorithm": args.algorithm,
        "quantization_config": model.config.quantization,
        "calibration_tokens": tokens,
        "bits_per_weight": round(mean_bits(rows), 4),
        "linears": rows,
        "sensitivity": units,
        "seconds": round(seconds, 2),
        "dev_before": before,
        "dev_after": after,
        "bytes_after": weight_bytes(args.output_dir),
        "peak_memory_bytes": trainer.peak_memory(),
    }
    with atomic_file(Path(args.output_dir) / "quant_report.json") as file:
        json.dump(report, file, indent=2)
    progress.remove()
    summary(report, args)


def outlier_lines(rows: list[dict], ratio: float) -> list[str]:
    """Lines about inputs whose largest channel, or token, is over `ratio` times the median one, the worst by name."""
    lines = []
    for kind in ("channel", "token"):
        found = {row["linear"]: row[f"{kind}_outlier"] for row in rows if row.get(f"{kind}_outlier", 0) > ratio}
        worst = ", ".join(f"{path} {found[path]:.0f}" for path in sorted(found, key=lambda path: -found[path])[:4])
        if found:
            lines.append(f"outlier {kind}s, over {ratio:g} x the median, before {len(found)} linears: {worst}")
    return lines


def summary(report: dict, args: Args) -> None:
    """Print the result of the run."""
    print(f"\n{len(report['linears'])} linears in {report['seconds']:.1f} s")
    print("\n".join(formats_table(report["linears"])))
    for line in outlier_lines(report["linears"], args.outlier_ratio):
        print(line)
    if before := report["dev_before"]:
        print("\n".join(comparison_table(before, report["dev_after"])))
        if (loss := 100 * (report["dev_after"]["eval_ppl"] / before["eval_ppl"] - 1)) >= 1:
            print(f"NOTE: {report['algorithm']} {args.quant_type} costs {loss:.2f} % of perplexity on dev, 1 % or more")
    was, now, float32 = (report[f"bytes_{key}"] / 1e6 for key in ("before", "after", "float32"))
    print(f"weight files: {was:.2f} MB -> {now:.2f} MB (float32: {float32:.2f} MB)")
    print(f"model: {args.output_dir}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
