"""Post-training quantization of weights alone (to nearest, GPTQ, AWQ, AutoRound; 2 to 8 bits), or activations too.

    python quantize.py configs/llama_gptq.json                       # GPTQ; any key again as --key value
    python quantize.py configs/llama_ptq.json                        # A8W8 with smoothing and its search

Reads a Hugging Face folder, or an adapter's (LoRA is merged first), and calibration records (see data.py: quant.json if
it is there, else train.json; or a corpus prefix). Writes a folder of real integers that every script opens, with a
report: error and seconds of each linear, dev perplexity and accuracy before and after, bytes. Embeddings, norms and the
head stay floats.

One pass over the model, block by block: a block's linears see the outputs of the quantized blocks before it, and an
expert's linears see the tokens routed to it. Memory: the model (each float weight is freed when its integers are
there), the hidden states of the calibration tokens (see quantization/calibration.py), one batch in flight, and for
linears that share an input one Hessian (n_in^2 float64, three times that while it is solved; for experts as many as
HESSIAN_BYTES holds). Calibration tokens: gptq_step or ptq_step * per_device_train_batch_size * max_length.

Shift and smoothing are applied where they leave the function unchanged. Where they would not (a residual that reads the
norm, gelu before down_proj, a router without bias), a printed line says what is left out.

Not here: fp8, key/value caches in 8 bits, quantization-aware training.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import numpy as np
import paddle

import trainer  # before paddle: it silences what paddle says while it is imported
from adapters import base_folders, from_pretrained, load_adapter, merge
from arguments import ScriptArgs
from data import CorpusLoader, SFTDataset, SFTLoader
from formats.files import UserError, atomic_file
from formats.tokenizer import Tokenizer
from formats.weights import named_weights, save_pretrained
from model import CausalLM, block_linears
from quantization.calibration import Calibration, linear_refs, sequential_groups
from quantization.methods import METHODS

BITS = {"weight_only_int8": 8, "wint8": 8, "weight_only_int4": 4, "wint4": 4, "a8w8": 8}  # the known quant_type
BITS |= {"weight_only_int3": 3, "wint3": 3, "weight_only_int2": 2, "wint2": 2}
REFUSED = {  # PaddleNLP's keys that are refused when they ask for something, and why
    "do_qat": "quantization-aware training is not here; quantization is done after training",
    "load_quant_model": "a quantized folder is evaluated by finetune.py with do_eval: true and no do_train",
    "skip_list_names": "every linear of the blocks is quantized, embeddings and head never",
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
    do_gptq: bool = False  # weights by GPTQ
    do_autoround: bool = False  # weights by rounding that gradients choose, from GPTQ's codes on
    do_awq: bool = False  # weights alone: first scale channels by the size of their inputs
    awq_step: int = 8  # do_awq: calibration batches
    auto_clip: bool = False  # weights alone, do_ptq: search each group's range; the other methods search theirs
    quant_type: str | None = None  # weight_only_int8, weight_only_int4 (wint8, wint4), a8w8; None: a8w8, GPTQ int4
    weight_quant_method: str | None = None  # abs_max_channel_wise or groupwise; None: by group_size
    group_size: int | None = None  # input rows that share a scale: 64, …; -1: all; None: -1, groupwise 128
    sym: bool = True  # weights alone: zero point in the middle; false: one per group
    autoclip_step: int = 8  # auto_clip: calibration batches
    gptq_step: int = 8  # calibration batches of weight-only quantization without these two
    desc_act: bool = False  # GPTQ: rows by the size of their inputs; costs a look-up of groups at run time
    percdamp: float = 0.01  # GPTQ: damping, a share of the Hessian's mean diagonal
    static_groups: bool = False  # GPTQ: groups by position, whatever the order; no look-up at run time
    search_range: bool = True  # GPTQ: also try smaller ranges for each scale; false: abs max alone
    autoround_iters: int = 200  # do_autoround: steps a block, each on one calibration batch
    autoround_lr: float | None = None  # how far the first step moves; None: 1 / autoround_iters
    ptq_step: int = 32  # calibration batches of a8w8
    activation: str = "per_tensor"  # a8w8: one scale found by calibration, or per_token: each token's own
    act_quant_method: str = "avg"  # per_tensor: the largest value of all batches (abs_max), or the mean of theirs
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
    search_alpha_step: float = 0.01
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
        if self.quant_type is None:
            self.quant_type = "a8w8" if self.do_ptq and not self.do_awq else "weight_only_int4"
        if self.quant_type not in BITS:
            raise UserError(f"quant_type: {self.quant_type!r} is not here; there are {', '.join(BITS)}")
        for key in ("do_gptq", "do_autoround", "do_awq", "auto_clip"):
            if getattr(self, key) and self.quant_type == "a8w8":
                raise UserError(
                    f"{key} quantizes weights alone: quant_type must be weight_only_int4 or another of them"
                )
        self._check_numbers()
        self._check_weights()
        return super().check() + self._check_activations()

    @property
    def bits(self):
        return BITS[self.quant_type]

    def _check_numbers(self):
        steps = "autoround_iters awq_step autoclip_step gptq_step ptq_step shift_step smooth_step"
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
        for key, choices in (("activation", ("per_tensor", "per_token")), ("act_quant_method", ("abs_max", "avg"))):
            if getattr(self, key) not in choices:
                raise UserError(f"{key}: {getattr(self, key)!r}; possible are {' and '.join(choices)}")

    def _check_weights(self):
        """weight_quant_method and group_size, which say the same, made to agree."""
        method = self.weight_quant_method
        if method not in (None, "abs_max_channel_wise", "groupwise"):
            raise UserError(f"weight_quant_method: {method!r}; possible are abs_max_channel_wise and groupwise")
        if self.group_size is None:
            self.group_size = 128 if method == "groupwise" else -1
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise UserError(f"group_size: {self.group_size}; it must be -1 or a multiple of 8, such as 32, 64, 128")
        if method is not None and (method == "groupwise") != (self.group_size != -1):
            raise UserError(f"group_size {self.group_size} contradicts weight_quant_method {method}")
        if self.quant_type == "a8w8" and self.group_size != -1:
            raise UserError(f"a8w8 has one weight scale per output channel: group_size {self.group_size} must be -1")

    def _check_activations(self):
        """Shift and smoothing belong to a8w8; returns lines to print."""
        asked = [key for key in ("shift", "smooth") if getattr(self, key) and not (key == "smooth" and self.do_awq)]
        if self.quant_type != "a8w8" and asked:
            raise UserError(f"{asked[0]} prepares activations: it needs quant_type: a8w8, found {self.quant_type}")
        if self.quant_type == "a8w8" and not self.dataset_name_or_path:
            raise UserError("dataset_name_or_path: missing; a8w8 is calibrated on records")
        needs = [k for k in ("do_gptq", "do_autoround", "do_awq", "auto_clip", "do_eval") if getattr(self, k)]
        if needs and not self.dataset_name_or_path:
            raise UserError(f"dataset_name_or_path: missing; {needs[0]} needs records")
        notes = []
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
        if self.quant_type == "a8w8":
            return "a8w8"
        names = {"autoround": self.do_autoround, "gptq": self.do_gptq, "awq": self.do_awq or self.auto_clip}
        return next((name for name, chosen in names.items() if chosen), "rtn")

    @property
    def algorithm(self):
        """The name of the algorithm in quantization_config."""
        if self.quant_type != "a8w8":
            parts = [
                "awq" if self.do_awq else "",
                self.method if self.method != "awq" else "",
                "clip" if self.auto_clip else "",
            ]
            return "_".join(filter(None, parts))
        search = "search" if self.smooth and self.smooth_piecewise_search else ""
        parts = ["shift" if self.shift else "", "smooth" if self.smooth else "", search]
        return "_".join(filter(None, parts)) or "rtn"


# ======================================================================== quantizing the model


HESSIAN_BYTES = 1 << 30  # of the Hessians that are summed up in one run over the calibration data


def fit_to_memory(stage: list, refs: dict) -> list:
    """The groups of a stage in lists whose Hessians fit into HESSIAN_BYTES, or of one group."""
    lists, room = [], 0
    for group in stage:
        size = 8 * refs[group.names[0]].layer.n_in ** 2
        if size > room:
            lists.append([])
            room = HESSIAN_BYTES
        lists[-1].append(group)
        room -= size
    return lists


@paddle.no_grad()
def quantize_model(model: CausalLM, calibration: Calibration, args: Args, print_line: Callable = print) -> list[dict]:
    """Quantize the linears of all blocks in place, one pass; returns the report's rows, printing each.

    Within a block the order is that of its computation: q, k, v, then o, then gate and up, then down.
    """
    model.eval()
    method, report, printed = METHODS[args.method], [], set()
    for index, block in enumerate(model.layers):
        refs, stages, start = linear_refs(model, index), sequential_groups(block, model.config), time.perf_counter()
        stats = {}  # by the name of a group's first linear

        def observe(groups):
            firsts = [group.names[0] for group in groups]
            observed = calibration.observe(block, [refs[name] for name in firsts], **method.observes(args))
            stats.update(zip(firsts, observed))

        parts = [part for stage in stages for part in fit_to_memory(stage, refs)]
        lines = method.start_block(block, refs, parts, calibration, args)
        if method.whole_block:
            observe([group for stage in stages for group in stage])
            lines = method.prepare_block(block, refs, stats, model.config, args)
        for line in lines:
            if line not in printed:
                print_line(line)
            printed.add(line)
        for groups in parts:
            if not method.whole_block:
                observe(groups)
            for group in groups:
                group_stats = stats.pop(group.names[0])
                shared = method.prepare(group_stats, args)
                for name in group.names:  # the time of what linears share is in the first one's row
                    shape = [refs[name].layer.n_in, refs[name].layer.n_out]
                    error, damping = method.quantize(refs[name], group_stats, shared, args)
                    now = time.perf_counter()
                    row = {"linear": refs[name].path, "shape": shape, "error": error, "damping": damping}
                    row |= {"note": group_stats.note} if group_stats.note else {}
                    report.append({**row, "seconds": round(now - start, 3)})
                    print_line(report_line(report[-1], args.percdamp))
                    start = now
        calibration.advance(block)
    model.config = dataclasses.replace(model.config, quantization=quantization_config(args))
    return report


def report_line(row: dict, percdamp: float) -> str:
    """What is printed of a linear."""
    shape, note = "{}x{}".format(*row["shape"]), ""
    if row["damping"] is not None:
        note = f"  damping {row['damping']:g}"
        if row["damping"] > percdamp:
            note += f": not positive definite with percdamp {percdamp:g}"
    note += f"  {row['note']}" if "note" in row else ""
    return f"{row['linear']:<42} {shape:>12}  error {100 * row['error']:8.4f} %  {row['seconds']:6.2f} s{note}"


def quantization_config(args: Args) -> dict:
    """What config.json says of the integers."""
    config = {"bits": args.bits, "group_size": args.group_size, "algorithm": args.algorithm, "shift": args.shift}
    return {**METHODS[args.method].config(args), **config}


# ======================================================================== main


def loaders(args: Args, tokenizer: Tokenizer) -> tuple:
    """(calibration loader, how many of its batches, dev loader or None); (None, 0, None) without data."""
    if not args.dataset_name_or_path:
        return None, 0, None
    path = args.dataset_name_or_path
    a8w8_steps = max(args.ptq_step, args.shift_step * args.shift, args.smooth_step * args.smooth)
    awq_steps = max(args.awq_step * args.do_awq, args.autoclip_step * args.auto_clip)
    steps = {"a8w8": a8w8_steps, "awq": awq_steps}.get(args.method, args.gptq_step)
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


def main(args: Args) -> None:
    # ====================================================================== 1. data, model
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
    widths = {layer.n_in for *_, layer in block_linears(model).values()}
    if args.group_size != -1 and (uneven := {n_in for n_in in widths if n_in % args.group_size}):
        print(f"group_size {args.group_size} does not divide {sorted(uneven)} input rows: their last group is shorter")

    # ====================================================================== 2. before
    before = trainer.evaluate(model, dev, args.max_evaluate_steps) if dev else None
    if before:
        print(f"dev before: {trainer.format_metrics(before)}", flush=True)

    # ====================================================================== 3. quantize
    start = time.perf_counter()
    with paddle.no_grad():
        calibration = Calibration(model, calibration_loader, batches)
    tokens = calibration.tokens
    print(f"{args.algorithm}, {args.quant_type}: {tokens:,} calibration tokens in {batches} batches", flush=True)
    rows = quantize_model(model, calibration, args)
    del calibration
    seconds = time.perf_counter() - start

    # ====================================================================== 4. after
    after = trainer.evaluate(model, dev, args.max_evaluate_steps) if dev else None
    trainer.prepare_output_dir(args)  # only here: what fails above must not cost the model it would replace
    tokenizer.save(args.output_dir)
    save_pretrained(model, args.output_dir, rest_dtype(model))
    report |= {
        "algorithm": args.algorithm,
        "quantization_config": model.config.quantization,
        "calibration_tokens": tokens,
        "linears": rows,
        "seconds": round(seconds, 2),
        "dev_before": before,
        "dev_after": after,
        "bytes_after": weight_bytes(args.output_dir),
        "peak_memory_bytes": trainer.peak_memory(),
    }
    with atomic_file(Path(args.output_dir) / "quant_report.json") as file:
        json.dump(report, file, indent=2)
    summary(report, args)


def summary(report: dict, args: Args) -> None:
    """Print the result of the run."""
    worst = max(report["linears"], key=lambda row: row["error"])
    mean = float(np.mean([row["error"] for row in report["linears"]]))
    print(
        f"\n{len(report['linears'])} linears in {report['seconds']:.1f} s; error: mean {100 * mean:.3f} %, "
        f"largest {100 * worst['error']:.3f} % ({worst['linear']})"
    )
    if report["dev_before"]:
        changes = {}
        for key, name in (("eval_ppl", "perplexity"), ("eval_accuracy", "token accuracy")):
            before, after = report["dev_before"][key], report["dev_after"][key]
            changes[key] = 100 * (after / before - 1) if before else 0.0
            print(f"dev {name}: {before:.4f} -> {after:.4f} ({changes[key]:+.2f} %)")
        if (loss := changes["eval_ppl"]) >= 1:
            print(f"NOTE: {report['algorithm']} {args.quant_type} costs {loss:.2f} % of perplexity on dev, 1 % or more")
    was, now, float32 = (report[f"bytes_{key}"] / 1e6 for key in ("before", "after", "float32"))
    print(f"weight files: {was:.2f} MB -> {now:.2f} MB (float32: {float32:.2f} MB)")
    print(f"model: {args.output_dir}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
