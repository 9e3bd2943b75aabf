"""Post-training quantization: weights alone (round to nearest, GPTQ; 4 and 8 bits) or weights and activations (A8W8).

    python quantize.py configs/llama_gptq.json                       # GPTQ; any key again as --key value
    python quantize.py configs/llama_ptq.json                        # A8W8 with smoothing and its search

Reads a Hugging Face folder, or an adapter's (LoRA is merged first), and calibration records (see data.py: quant.json if
it is there, else train.json; or a corpus prefix). Writes a folder of real integers that every script opens, with a
report: error and seconds of each linear, dev perplexity and accuracy before and after, bytes. Embeddings, norms and the
head stay floats.

One pass over the model, block by block: a block's linears see the outputs of the quantized blocks before it, and an
expert's linears see the tokens routed to it. Memory: the model (each float weight is freed when its integers are
there), the hidden states of the calibration tokens (see calibration.py), one batch in flight, and for linears that
share an input one Hessian (n_in^2 float64, three times that while it is solved; for experts as many as HESSIAN_BYTES
holds). Calibration tokens: gptq_step or ptq_step * per_device_train_batch_size * max_length.

Shift and smoothing are applied where they leave the function unchanged. Where they would not (a residual that reads the
norm, gelu before down_proj, a router without bias), a printed line says what is left out.

Not here: AWQ, AutoClip, fp8, key/value caches in 8 bits, quantization-aware training.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import
from kernels.rounding import (
    QuantizedWeight,
    group_numbers,
    int8_weight,
    pack_rows,
    pack_zeros,
    qparams,
    quantize_to_codes,
    round_to_nearest,
)

import numpy as np
import paddle
from paddle import nn

import trainer  # before paddle: it silences what paddle says while it is imported
from adapters import base_folders, from_pretrained, load_adapter, merge
from arguments import ScriptArgs
from calibration import ActivationStats, Calibration, linear_refs, sequential_groups
from data import CorpusLoader, SFTDataset, SFTLoader
from families import ModelConfig
from formats.files import UserError, atomic_file
from formats.tokenizer import Tokenizer
from formats.weights import named_weights, save_pretrained
from model import CausalLM, QuantLinear, block_linears, norm_consumers, set_parameter, shiftable_norms

BITS = {"weight_only_int8": 8, "wint8": 8, "weight_only_int4": 4, "wint4": 4, "a8w8": 8}  # the known quant_type
REFUSED = {  # PaddleNLP's keys that are refused when they ask for something, and why
    "do_awq": "AWQ is not here; do_gptq: true compresses to 4 bits with calibration",
    "auto_clip": "clipping search is not here; do_gptq: true chooses ranges by their error",
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
    quant_type: str | None = None  # weight_only_int8, weight_only_int4 (wint8, wint4), a8w8; None: a8w8, GPTQ int4
    weight_quant_method: str | None = None  # abs_max_channel_wise or groupwise; None: by group_size
    group_size: int | None = None  # input rows that share a scale: 64, …; -1: all; None: -1, groupwise 128
    sym: bool = True  # weights alone: zero point in the middle; false: one per group
    gptq_step: int = 8  # calibration batches of weight-only quantization
    desc_act: bool = False  # GPTQ: rows by the size of their inputs; costs a look-up of groups at run time
    percdamp: float = 0.01  # GPTQ: damping, a share of the Hessian's mean diagonal
    search_range: bool = True  # GPTQ: also try smaller ranges for each scale; false: abs max alone
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
        if self.do_ptq == self.do_gptq:
            count = "both" if self.do_ptq else "neither"
            raise UserError(f"{count} of do_ptq and do_gptq: true; choose one")
        if self.quant_type is None:
            self.quant_type = "weight_only_int4" if self.do_gptq else "a8w8"
        if self.quant_type not in BITS:
            raise UserError(f"quant_type: {self.quant_type!r} is not here; there are {', '.join(BITS)}")
        if self.do_gptq and self.quant_type == "a8w8":
            raise UserError("do_gptq quantizes weights alone: quant_type must be weight_only_int4 or weight_only_int8")
        self._check_numbers()
        self._check_weights()
        return super().check() + self._check_activations()

    @property
    def bits(self):
        return BITS[self.quant_type]

    def _check_numbers(self):
        steps = "gptq_step ptq_step shift_step smooth_step smooth_k_piece search_tokens"
        for key in f"per_device_train_batch_size per_device_eval_batch_size {steps}".split():
            if getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key)}; it must be at least 1")
        if self.src_length >= self.max_length or self.src_length < 1:
            raise UserError(f"src_length {self.src_length} must be positive and below max_length {self.max_length}")
        most_alpha = self.search_alpha_max
        for key, low, high in (
            ("percdamp", 0, 10),
            ("smooth_alpha", 0, 1),
            ("search_alpha_min", 0, most_alpha),
            ("search_alpha_max", 0, 1),
            ("search_alpha_step", 1e-3, 1),
            ("search_scale_min", 1e-3, self.search_scale_max),
        ):
            if not low <= getattr(self, key) <= high:
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
        asked = [key for key in ("shift", "smooth") if getattr(self, key)]
        if self.quant_type != "a8w8" and asked:
            raise UserError(f"{asked[0]} prepares activations: it needs quant_type: a8w8, found {self.quant_type}")
        if self.quant_type == "a8w8" and not self.dataset_name_or_path:
            raise UserError("dataset_name_or_path: missing; a8w8 is calibrated on records")
        if (self.do_gptq or self.do_eval) and not self.dataset_name_or_path:
            raise UserError(f"dataset_name_or_path: missing; {'do_gptq' if self.do_gptq else 'do_eval'} needs records")
        notes = []
        for key in ("smooth_all_linears", "smooth_piecewise_search"):
            if getattr(self, key) and not self.smooth:
                notes.append(f"{key}: without smooth: true it does nothing")
        if self.smooth_search_piece and not (self.smooth and self.smooth_piecewise_search):
            notes.append("smooth_search_piece: without smooth and smooth_piecewise_search it does nothing")
        return notes

    @property
    def method(self):
        """The row of METHODS."""
        return "a8w8" if self.quant_type == "a8w8" else "gptq" if self.do_gptq else "rtn"

    @property
    def algorithm(self):
        """The name of the algorithm in quantization_config."""
        search = "search" if self.smooth and self.smooth_piecewise_search else ""
        parts = ["shift" if self.shift else "", "smooth" if self.smooth else "", search]
        return "gptq" if self.do_gptq else "_".join(filter(None, parts)) or "rtn"


# ======================================================================== grids by their error (numpy, no model)


def search_qparams(rows: np.ndarray, bits: int, sym: bool, importance: np.ndarray) -> tuple:
    """qparams() with the best of 20 shrinks from 1 to 0.62; squared errors of rows are weighted by importance (n,)."""
    best = None
    for shrink in 1.0 - 0.02 * np.arange(20):
        scale, zero = qparams(rows, bits, sym, np.float32(shrink))
        residual = rows - scale * (quantize_to_codes(rows, scale, zero, bits).astype(np.float32) - zero)
        error = importance @ (residual * residual)  # (out,)
        if best is None:
            best = [error, scale, zero]
            continue
        better = error < best[0]
        best = [np.where(better, new, old) for new, old in zip((error, scale, zero), best)]
    return best[1], best[2]


# ======================================================================== GPTQ (numpy, no model)


def inverse_factor(hessian: np.ndarray, percdamp: float) -> tuple:
    """Upper triangular R, float64, with (H + damping)^-1 = R^T R, and the damping as a share of H's mean diagonal.

    Computed from a Cholesky factor of H in reverse order and a triangular inverse; H itself is never inverted. While H
    is not positive definite, the damping is multiplied by ten.
    """
    mean = max(float(np.mean(np.diag(hessian))), np.finfo(np.float64).tiny)
    damping = percdamp
    while True:
        damped = hessian + damping * mean * np.eye(len(hessian))
        try:
            factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # upper U with U U^T = damped
            inverse = np.triu(np.linalg.inv(factor))
            if np.isfinite(inverse).all():
                return inverse, damping
        except np.linalg.LinAlgError:
            pass
        damping = max(10 * damping, 1e-8)


class GPTQPlan(NamedTuple):
    """What GPTQ computes from the inputs only, shared by all linears that read them."""

    order: np.ndarray  # (in,) the input row quantized at each step
    factor: np.ndarray  # (in, in) float64: R of inverse_factor, rows and columns in that order
    damping: float  # the damping used, as a share of the Hessian's mean diagonal


def gptq_plan(hessian: np.ndarray, desc_act: bool = False, percdamp: float = 0.01) -> GPTQPlan:
    """GPTQPlan for a Hessian X^T X / tokens (in, in) float64.

    desc_act quantizes the rows with the largest inputs first, while many rows are left to compensate for them.

    Rows whose input was always 0 (dead) are rounded to nearest: calibration says nothing about them, and other text may
    use them.
    """
    hessian = np.array(hessian, np.float64)
    dead = np.diag(hessian) <= 0
    hessian[dead, dead] = float(np.mean(np.diag(hessian))) or 1.0
    order = np.argsort(-np.diag(hessian), kind="stable") if desc_act else np.arange(len(hessian))
    return GPTQPlan(order, *inverse_factor(hessian[order][:, order], percdamp))


def gptq(
    weight: np.ndarray, plan: GPTQPlan, bits: int, group_size: int = -1, sym: bool = True, search_range: bool = True
) -> QuantizedWeight:
    """QuantizedWeight of a weight (in, out), row by row; later rows compensate for each row's error (arXiv 2210.17323).

    Groups are runs of rows in the plan's order; with desc_act `groups` is therefore not sorted. Groups by position
    would save the look-up at run time, but their error was 1 to 5 % larger in four cases of five: in the plan's order,
    rows of similar importance share a scale, and that scale is fitted to corrected weights.

    search_range: solve with abs-max ranges and with searched ones and take the better per output column (columns are
    independent), so the loss is never larger than without it.
    """
    factor, groups = plan.factor.astype(weight.dtype), group_numbers(len(weight), group_size)
    codes, scales, zeros, loss = gptq_solve(weight[plan.order], factor, groups, bits, sym, False)
    if search_range:
        *searched, searched_loss = gptq_solve(weight[plan.order], factor, groups, bits, sym, True)
        better = searched_loss < loss  # (out,)
        codes, scales, zeros = (np.where(better, new, old) for new, old in zip(searched, (codes, scales, zeros)))
    back = np.argsort(plan.order, kind="stable")
    return QuantizedWeight(codes[back], scales, zeros, groups[back])


def gptq_solve(
    work: np.ndarray, factor: np.ndarray, groups: np.ndarray, bits: int, sym: bool, search_range: bool, block: int = 128
) -> tuple:
    """(codes, scales, zeros, loss (out,)) of weight rows `work` (in, out), quantized from the first to the last.

    Row q is rounded, and R[q, j]/R[q, q] times its error is subtracted from every later row j, R being `factor`; this
    is done in blocks of `block` rows, so that most of the work is matrix products. The loss is the sum of (error /
    R[q, q])^2. A group's scale is chosen when its first row is reached, from its rows as corrected so far."""
    n_in, work = len(work), work.copy()
    importance = (factor.diagonal().min() / factor.diagonal()) ** 2
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    codes, scales, zeros, loss = np.empty(work.shape, np.uint8), [], [], np.zeros(work.shape[1], work.dtype)
    for start in range(0, n_in, block):
        end = min(start + block, n_in)
        errors = np.zeros((end - start, work.shape[1]), work.dtype)
        for q in range(start, end):
            if len(scales) < len(starts) and q == starts[len(scales)]:
                last = q + int((groups == groups[q]).sum())
                rows = work[q:last].copy()
                if last > end:  # rows past this block lack the corrections of its rows so far
                    rows[end - q :] -= factor[start:q, end:last].T @ errors[: q - start]
                if search_range:
                    scale, zero = search_qparams(rows, bits, sym, importance[q:last])
                else:
                    scale, zero = qparams(rows, bits, sym)
                scales.append(scale)
                zeros.append(zero)
            codes[q] = quantize_to_codes(work[q], scales[-1], zeros[-1], bits)
            rounded = scales[-1] * (codes[q].astype(work.dtype) - zeros[-1])
            errors[q - start] = (work[q] - rounded) / factor[q, q]
            work[q + 1 : end] -= factor[q, q + 1 : end, None] * errors[q - start]
        work[end:] -= factor[start:end, end:].T @ errors
        loss += np.square(errors).sum(0)
    return codes, np.stack(scales), np.stack(zeros), loss


def output_error(weight: np.ndarray, rounded: np.ndarray, hessian: np.ndarray) -> float:
    """||X (W - Q)|| / ||X W|| from X^T X, up to any factor of it."""

    def size(w):
        return math.sqrt(max(0.0, float(np.sum((hessian @ w) * w))))

    weight = weight.astype(np.float64)
    return size(weight - rounded) / max(size(weight), 1e-300)


# ======================================================================== shift and smoothing


def shift(norm: nn.Layer, layers: list, z: np.ndarray) -> None:
    """Move the norm's output by -z (D,): norm.bias -= z, linears that read it gain z W (Wei et al., 2304.09145)."""
    assert norm.weight.shape == [len(z)] and all(layer.n_in == len(z) for layer in layers)
    if norm.bias is None:
        norm.add_bias()
        set_parameter(norm.bias, np.zeros_like(z))
    set_parameter(norm.bias, norm.bias.numpy() - z)
    for layer in layers:
        moved = (z.astype(np.float64) @ layer.weight.numpy()).astype(np.float32)
        if layer.bias is None:
            layer.bias = layer.create_parameter([layer.n_out], is_bias=True)
            set_parameter(layer.bias, moved)
        else:
            set_parameter(layer.bias, layer.bias.numpy() + moved)


def smooth(
    source: nn.Layer,
    layers: list,
    scale: np.ndarray,
    source_scale: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> None:
    """Divide the outputs of `source` by scale (n,), multiply the rows of the linears that read it (arXiv 2211.10438).

    source: a norm (its weight and bias), or a linear whose outputs (those in `columns`, or all) become these inputs
    channel by channel: up_proj before down_proj, whose inputs are act(gate) * up, and v_proj before o_proj, whose
    inputs are averages of v's rows. A key/value head feeds several query heads: source_scale (K * Dh,) is repeated in
    scale."""
    source_scale = scale if source_scale is None else source_scale
    divisor = np.ones(source.weight.shape[-1], np.float32)
    assert len(divisor) == len(source_scale) or columns is not None and len(columns) == len(source_scale)
    assert all(layer.n_in == len(scale) for layer in layers)
    divisor[slice(None) if columns is None else columns] = source_scale
    offset = np.float32(getattr(source, "offset", 0.0))  # the constant that the norm adds to its weight
    set_parameter(source.weight, (source.weight.numpy() + offset) / divisor - offset)
    if source.bias is not None:
        set_parameter(source.bias, source.bias.numpy() / divisor)
    for layer in layers:
        set_parameter(layer.weight, layer.weight.numpy() * scale[:, None])


def smooth_scale(x_max: np.ndarray, w_max: np.ndarray, alpha: float) -> np.ndarray:
    """s = max|X|^alpha / max|W|^(1-alpha), (n,), at least 1e-5; 1 where a channel has no input or no weight."""
    scale = np.maximum(x_max**alpha / np.maximum(w_max, 1e-30) ** (1 - alpha), 1e-5)
    return np.where((x_max > 0) & (w_max > 0), scale, 1.0).astype(np.float32)


def int8_rows(x: np.ndarray, input_scale: float | None) -> np.ndarray:
    """x (n, in) rounded to int8 steps of input_scale; None: of each row's own scale."""
    scale = np.maximum(np.abs(x).max(1, keepdims=True), 1e-8) / 127 if input_scale is None else input_scale
    return np.clip(np.rint(x / scale), -128, 127) * scale


def input_scale(inputs: ActivationStats, method: str, smoothing: np.ndarray | float = 1.0) -> np.float32:
    """One scale for X / smoothing: the largest of all batches (abs_max) or the mean of theirs (avg), over 127."""
    largest = [(np.maximum(np.abs(low), np.abs(high)) / smoothing).max() for low, high in zip(inputs.low, inputs.high)]
    value = max(largest) if method == "abs_max" else np.mean(largest)
    return np.float32(max(value, 1e-8) / 127)


def split_channels(values: np.ndarray, k: int) -> np.ndarray:
    """(n,) values -> (n,) piece of each, 0 the smallest: 1-D k-means from quantiles; fewer if values coincide."""
    centers = np.unique(np.quantile(values, (np.arange(k) + 0.5) / k))
    while True:
        nearest = np.abs(values[:, None] - centers).argmin(1)
        used = np.unique(nearest)
        means = np.array([values[nearest == c].mean() for c in used])
        if len(means) == len(centers) and np.allclose(means, centers, rtol=1e-6, atol=0):
            return nearest
        centers = means


def piecewise_search(parts: list, x_max: np.ndarray, w_max: np.ndarray, args: Args) -> tuple:
    """Smoothing factors (n,) of least error on the sampled rows, and that error ||Q(X/s) Q(sW) - XW||^2 / ||XW||^2.

    parts: [(ActivationStats, weight (n, out))], errors are summed; several where experts read one norm. Channels are
    split into pieces by x_max. Piece by piece, the factors s(alpha) and constants are tried for its channels while the
    others stay as chosen so far (at first as plain smoothing has them), and the best is taken. The result is therefore
    never worse on these rows than plain smoothing. With smooth_search_piece, 1 … smooth_k_piece pieces are tried."""
    parts = [(inputs, np.concatenate(inputs.rows), weight) for inputs, weight in parts]
    exact = [rows @ weight for _, rows, weight in parts]
    total = max(sum(float(np.square(w, dtype=np.float64).sum()) for w in exact), 1e-30)

    def error(scale):
        squared = 0.0
        for (inputs, rows, weight), right in zip(parts, exact):
            static = input_scale(inputs, args.act_quant_method, scale) if args.activation == "per_tensor" else None
            codes, scales = int8_weight(weight * scale[:, None])
            rounded = (int8_rows(rows / scale, static) @ codes.astype(np.float32)) * scales
            squared += float(np.square(rounded - right, dtype=np.float64).sum())
        return squared / total

    steps = np.arange(args.search_alpha_min, args.search_alpha_max + args.search_alpha_step / 2, args.search_alpha_step)
    candidates = [smooth_scale(x_max, w_max, alpha) for alpha in steps]
    constants = np.arange(args.search_scale_min, args.search_scale_max + 1e-6, 0.5)
    candidates += [np.full_like(x_max, c) for c in constants]
    plain = smooth_scale(x_max, w_max, args.smooth_alpha)
    best_scale, least = plain, error(plain)
    for k in range(1, args.smooth_k_piece + 1) if args.smooth_search_piece else (args.smooth_k_piece,):
        piece_of = split_channels(x_max, k)
        scale, scale_error = plain, error(plain)
        for piece in range(piece_of.max() + 1):
            for candidate in candidates:
                tried = np.where(piece_of == piece, candidate, scale)
                if (e := error(tried)) < scale_error:
                    scale, scale_error = tried, e
        if scale_error < least:
            best_scale, least = scale, scale_error
    return best_scale, least


SEARCHED = 8  # experts that read one norm and are used by the search: those with the most tokens


def prepare_block(block: nn.Layer, refs: dict, inputs: dict, config: ModelConfig, args: Args) -> list[str]:
    """Shift and smooth the linears of a block and, accordingly, `inputs` {first linear of a group: ActivationStats}.

    Returns lines that say what was left out, and why.
    """
    layers, readers, shiftable = dict(block.named_sublayers()), norm_consumers(block), shiftable_norms(block)
    by_source, left_out = {}, []
    for group in (group for stage in sequential_groups(block, config) for group in stage):
        by_source.setdefault(group.source if group.of_norm else group.names, []).append(group)
    for groups in by_source.values():
        group, seen = groups[0], [inputs[g.names[0]] for g in groups]
        source, kind = layers[group.source], group.names[0].rpartition(".")[2]
        linears_of = [[refs[name].layer for name in g.names] for g in groups]
        if args.shift and group.of_norm and group.source in shiftable:
            low, high = extremes(seen, args.shift_step)
            shift(source, [layer for part in linears_of for layer in part], (low + high) / 2)
            for part in seen:
                part.transform((low + high) / 2, np.ones_like(low))
        elif args.shift and group.of_norm:
            why = group.fixed or "a router reads the norm, and has no bias to take the constant"
            left_out.append(f"shift: not before {kind}: {why}")
        if not args.smooth or not (group.of_norm or args.smooth_all_linears):
            continue
        if group.fixed:
            left_out.append(f"smooth: not before {kind}: {group.fixed}")
            continue
        low, high = extremes(seen, args.smooth_step)
        x_max = np.maximum(np.abs(low), np.abs(high))
        w_max = np.max([np.abs(layer.weight.numpy()).max(1) for part in linears_of for layer in part], axis=0)
        heads, times = group.heads  # the heads of a group read the same channels of v: one factor for them
        if times > 1:
            x_max, w_max = (v.reshape(heads, times, -1).max(1, keepdims=True) for v in (x_max, w_max))
            x_max, w_max = (np.repeat(v, times, axis=1).reshape(-1) for v in (x_max, w_max))
        if args.smooth_piecewise_search:
            most = sorted(range(len(seen)), key=lambda i: -seen[i].tokens)[:SEARCHED]
            weights = [np.concatenate([layer.weight.numpy() for layer in linears_of[i]], axis=1) for i in most]
            scale, _ = piecewise_search([(seen[i], weight) for i, weight in zip(most, weights)], x_max, w_max, args)
        else:
            scale = smooth_scale(x_max, w_max, args.smooth_alpha)
        own = scale.reshape(heads, times, -1)[:, 0].reshape(-1)
        readers_of = [layer for part in linears_of for layer in part]
        if group.of_norm:  # a router too, which stays as it is
            readers_of += [layers[name] for name in readers[group.source] if name not in refs]
        smooth(source, readers_of, scale, own, group.columns)
        for part in seen:
            part.transform(np.zeros_like(scale), scale)
    return left_out


def extremes(seen: list, batches: int) -> tuple:
    """(n,) least and largest of the first `batches` batches of several ActivationStats."""
    lows, highs = zip(*(inputs.extremes(batches) for inputs in seen))
    return np.min(lows, 0), np.max(highs, 0)


# ======================================================================== quantizing the model


class WeightOnly:
    """Weights alone, each rounded to the nearest of its group's grid; also the base of methods that choose the codes.

    A method says what it keeps of a linear's inputs (`observes`), what linears that read one input share (`prepare`),
    how one linear is replaced (`quantize`), and what config.json tells other tools (`config`). A new method is such a
    class and a row in METHODS."""

    whole_block = False  # False: a group's inputs come through the quantized linears before it

    def observes(self, args) -> dict:
        """Keyword arguments of Calibration.observe()."""
        return {"keep_hessian": True}

    def prepare_block(self, block, refs, stats, config, args) -> list:
        """Change a block's float weights before they are quantized; lines that say what was left out, and why."""
        return []

    def prepare(self, stats, args):
        """What all linears that read one input share: (Hessian, None)."""
        return stats.mean_hessian(), None

    def codes(self, weight, plan, args) -> QuantizedWeight:
        return round_to_nearest(weight, args.bits, args.group_size, args.sym)

    def quantize(self, ref, stats, shared, args) -> tuple:
        """Replace a linear by its codes; (relative error of its outputs, damping of the Hessian or None)."""
        weight, (hessian, plan) = ref.layer.weight.numpy(), shared
        try:
            quantized = self.codes(weight, plan, args)
            layer = QuantLinear(
                *weight.shape, f"w{args.bits}", args.group_size, ref.layer.bias is not None, args.desc_act
            )
        except UserError as error:
            raise UserError(f"{ref.path}: {error}") from None
        ref.replace(
            layer,
            qweight=pack_rows(quantized.codes, args.bits),
            scales=quantized.scales,
            qzeros=pack_zeros(quantized.zeros, args.bits),
            g_index=quantized.groups,
        )
        return output_error(weight, quantized.weight(), hessian), plan and plan.damping

    def config(self, args) -> dict:
        """quantization_config in the words of GPTQ tools."""
        order = {"sym": args.sym, "desc_act": args.do_gptq and args.desc_act}
        return {"quant_method": "gptq", "checkpoint_format": "gptq", "lm_head": False, **order}


class GPTQ(WeightOnly):
    """Weights alone, the error of each row made up for by the rows to come (arXiv 2210.17323)."""

    def prepare(self, stats, args):
        hessian = stats.mean_hessian()
        return hessian, gptq_plan(hessian, args.desc_act, args.percdamp)

    def codes(self, weight, plan, args) -> QuantizedWeight:
        return gptq(weight, plan, args.bits, args.group_size, args.sym, args.search_range)


class A8W8:
    """Weights and activations in int8; the whole block is observed first, as smoothing moves factors between
    linears."""

    whole_block = True

    def observes(self, args) -> dict:
        return {"keep_rows": args.search_tokens}

    prepare_block = staticmethod(prepare_block)

    def prepare(self, stats, args):
        return None

    def quantize(self, ref, stats, shared, args) -> tuple:
        """Replace a linear by its int8 codes; (relative error of rounded inputs and weights, None)."""
        weight, rows = ref.layer.weight.numpy(), np.concatenate(stats.rows)
        codes, scales = int8_weight(weight)
        static = input_scale(stats, args.act_quant_method) if args.activation == "per_tensor" else None
        layer = QuantLinear(*weight.shape, "a8w8", bias=ref.layer.bias is not None, static_input=static is not None)
        tensors = {} if static is None else {"input_scale": np.array([static], np.float32)}
        ref.replace(layer, qweight=codes, scales=scales, **tensors)
        exact = rows @ weight
        rounded = (int8_rows(rows, static) @ codes.astype(np.float32)) * scales
        return float(np.linalg.norm(rounded - exact) / max(np.linalg.norm(exact), 1e-30)), None

    def config(self, args) -> dict:
        return {"quant_method": "a8w8", "activation": args.activation, "sym": True, "desc_act": False}


METHODS = {"rtn": WeightOnly(), "gptq": GPTQ(), "a8w8": A8W8()}

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

        if method.whole_block:
            observe([group for stage in stages for group in stage])
            for line in method.prepare_block(block, refs, stats, model.config, args):
                if line not in printed:
                    print_line(line)
                printed.add(line)
        for groups in (part for stage in stages for part in fit_to_memory(stage, refs)):
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
    steps = a8w8_steps if args.quant_type == "a8w8" else args.gptq_step
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
