"""Post-training quantization: weights alone (round to nearest, GPTQ; 4 and 8 bits) or weights and activations (A8W8).

    python quantize.py configs/llama_gptq.json                       # GPTQ; any key again as --key value
    python quantize.py configs/llama_ptq.json                        # A8W8 with smoothing and its search

Reads a Hugging Face folder, or an adapter's (LoRA is merged first), and calibration records (see data.py: quant.json if
it is there, else train.json; or a corpus prefix). Writes a folder of real integers that every script opens, with a
report: error and seconds of each linear, dev perplexity and accuracy before and after, bytes. Embeddings, norms and the
head stay floats.

One pass over the model, block by block: a block's linears see what the quantized blocks before it put out; an expert's,
the tokens that were sent to it. Memory: the model, whose float weights go as their integers come, and beside it the hidden
states of the calibration tokens (tokens · D floats, one array for all blocks) with their rotary tables, for one group of
linears that share an input the Hessian (n_in^2 float64, thrice while it is solved; of experts, as many as HESSIAN_BYTES
hold), and one batch in flight. Tokens: gptq_step or ptq_step · per_device_train_batch_size · max_length.

Shift and smoothing go where a factor or a constant can pass without changing the function; where it cannot in a family (a
residual that reads the norm, gelu before down_proj, a router without bias), a line says what is left out.

Not here: AWQ, AutoClip, fp8, key/value caches in 8 bits, quantization-aware training.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn

import trainer  # before paddle: it silences what paddle says while it is imported
from adapters import base_folders, from_pretrained, load_adapter, merge
from arguments import ScriptArgs
from data import CorpusLoader, SFTDataset, SFTLoader
from formats.chat import load_chat_template
from formats.files import UserError, atomic_file
from formats.tokenizer import load_tokenizer
from formats.weights import named_weights, save_pretrained
from model import Linear, MoE, QuantLinear, block_linears, norm_consumers, set_parameter, shiftable_norms

BITS = {"weight_only_int8": 8, "wint8": 8, "weight_only_int4": 4, "wint4": 4, "a8w8": 8}  # the known quant_type
NOT_HERE = {  # keys that are refused when they ask for something, and why
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
    do_awq: bool = False  # this and the next four: see NOT_HERE
    auto_clip: bool = False
    do_qat: bool = False
    load_quant_model: bool = False
    shift_all_linears: bool = False
    skip_list_names: list[str] | None = None

    def check(self):
        for key in ("model_name_or_path", "output_dir"):
            if not getattr(self, key):
                raise UserError(f"{key}: missing")
        for key, why in NOT_HERE.items():
            if getattr(self, key):
                raise UserError(f"{key}: {why}")
        if self.do_ptq == self.do_gptq:
            found = "both" if self.do_ptq else "neither"
            raise UserError(f"{found} of do_ptq and do_gptq: true; choose one")
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
        wanted = [key for key in ("shift", "smooth") if getattr(self, key)]
        if self.quant_type != "a8w8" and wanted:
            raise UserError(f"{wanted[0]} prepares activations: it needs quant_type: a8w8, found {self.quant_type}")
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
    def algorithm(self):
        """What quantization_config calls the way that the integers were found."""
        search = "search" if self.smooth and self.smooth_piecewise_search else ""
        parts = ["shift" if self.shift else "", "smooth" if self.smooth else "", search]
        return "gptq" if self.do_gptq else "_".join(filter(None, parts)) or "rtn"


# ======================================================================== grids and codes (numpy, no model)
# A weight is (in, out). Its groups are sets of input rows; each has one scale and one zero point per output:
# w[i, o] ~ scales[g[i], o] * (codes[i, o] - zeros[g[i], o]), codes in 0 … 2^bits - 1.


class QuantizedWeight(NamedTuple):
    codes: np.ndarray  # (in, out) uint8
    scales: np.ndarray  # (groups, out) float32 that are exact in float16, in which they are stored
    zeros: np.ndarray  # (groups, out) int32, 1 … 2^bits - 1
    groups: np.ndarray  # (in,) int32: the group of each input row

    def weight(self):
        """(in, out) float32: what the codes stand for."""
        return self.scales[self.groups] * (self.codes.astype(np.float32) - self.zeros[self.groups])


def qparams(rows, bits, sym, shrink=1.0):
    """(scale, zero), each (out,) of a group's rows (n, out), so that shrink · its range fits the codes.

    Symmetric: zero = 2^(bits-1), and the range is 2^bits - 1 steps, half a step of it clipped at the upper end, as
    GPTQ's authors have it. Zero is never 0: the format stores it less one, unsigned, and readers differ on what -1
    means.
    """
    top = 2**bits - 1
    low, high = np.minimum(rows.min(0), 0.0) * shrink, np.maximum(rows.max(0), 0.0) * shrink
    if sym:
        scale, zero = 2 * np.maximum(-low, high) / top, np.full(low.shape, 2 ** (bits - 1), np.int32)
    else:
        scale = (high - low) / top
        with np.errstate(invalid="ignore", divide="ignore"):
            zero = np.clip(np.nan_to_num(np.rint(-low / scale), nan=1.0), 0, top)
        scale, zero = np.where(zero == 0, high / (top - 1), scale), np.maximum(zero, 1).astype(np.int32)
    return stored_scale(scale), zero


def stored_scale(scale):
    """float32 values as float16 keeps them; 1 for a group of zeros, whose codes are all its zero point."""
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused below
        kept = scale.astype(np.float16).astype(np.float32)
    if not np.isfinite(kept).all():
        raise UserError(f"a weight is too large for scales in float16: its scale would be {scale.max():g}")
    return np.where(kept > 0, kept, np.float32(1.0))


def search_qparams(rows, bits, sym, importance):
    """grid() with the shrink, of 20 from 1 to 0.62, of least error; rows' squared errors weigh importance (n,)."""
    best = None
    for shrink in 1.0 - 0.02 * np.arange(20):
        scale, zero = qparams(rows, bits, sym, np.float32(shrink))
        left = rows - scale * (quantize_to_codes(rows, scale, zero, bits).astype(np.float32) - zero)
        error = importance @ (left * left)  # (out,)
        if best is None:
            best = [error, scale, zero]
            continue
        better = error < best[0]
        best = [np.where(better, new, old) for new, old in zip((error, scale, zero), best)]
    return best[1], best[2]


def quantize_to_codes(rows, scale, zero, bits):
    """Nearest codes, uint8, of rows (…, out) on the grid scale, zero (out,)."""
    return np.clip(np.rint(rows / scale) + zero, 0, 2**bits - 1).astype(np.uint8)


def group_numbers(n, group_size):
    """(n,) int32: the group of each row when groups are runs of group_size rows (-1: all), the last perhaps shorter."""
    return (np.arange(n) // (n if group_size == -1 else group_size)).astype(np.int32)


def round_to_nearest(weight, bits, group_size=-1, sym=True):
    """QuantizedWeight of a weight (in, out) float32, each value by itself."""
    groups = group_numbers(len(weight), group_size)
    codes, scales, zeros = np.empty(weight.shape, np.uint8), [], []
    for g in range(groups[-1] + 1):
        rows = np.flatnonzero(groups == g)
        scale, zero = qparams(weight[rows], bits, sym)
        codes[rows] = quantize_to_codes(weight[rows], scale, zero, bits)
        scales.append(scale)
        zeros.append(zero)
    return QuantizedWeight(codes, np.stack(scales), np.stack(zeros), groups)


def pack_rows(codes, bits):
    """codes (n, out) uint8 -> int32 (n · bits/32, out): 32/bits rows a word, the first in the lowest bits."""
    per_word = 32 // bits
    words = codes.astype(np.uint32).reshape(-1, per_word, codes.shape[1])
    shifts = (bits * np.arange(per_word, dtype=np.uint32))[:, None]
    return np.bitwise_or.reduce(words << shifts, axis=1).view(np.int32)


def unpack_rows(packed, bits):
    """The inverse of pack_rows."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    codes = (packed.view(np.uint32)[:, None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(-1, packed.shape[1]).astype(np.uint8)


def pack_zeros(zeros, bits):
    """zeros (groups, out) -> int32 (groups, out · bits/32): each less one, packed along the outputs."""
    return np.ascontiguousarray(pack_rows(np.ascontiguousarray((zeros - 1).T), bits).T)


# ======================================================================== GPTQ (numpy, no model)


def inverse_factor(hessian, percdamp):
    """Upper triangular R, float64, with (H + damping)^-1 = R^T R, and the damping as a share of H's mean diagonal.

    From one Cholesky factor of H in reverse order and a triangular inverse, without ever inverting H itself. A Hessian
    that is not positive definite gets ten times the damping, until it is.
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
    """What GPTQ derives from the inputs alone, shared by all linears that read them."""

    order: np.ndarray  # (in,) the row that each step quantizes
    factor: np.ndarray  # (in, in) float64: R of inverse_factor, rows and columns in that order
    damping: float  # what was needed, a share of the Hessian's mean diagonal


def gptq_plan(hessian, desc_act=False, percdamp=0.01):
    """GPTQPlan for a Hessian X^T X / tokens (in, in) float64.

    desc_act takes the rows with the largest inputs first, while many can still make up for them.

    Rows whose input was never other than 0 (dead) end up rounded to nearest: nothing says what they are worth, and text
    that was not calibrated on may use them.
    """
    hessian = np.array(hessian, np.float64)
    dead = np.diag(hessian) <= 0
    hessian[dead, dead] = float(np.mean(np.diag(hessian))) or 1.0
    order = np.argsort(-np.diag(hessian), kind="stable") if desc_act else np.arange(len(hessian))
    return GPTQPlan(order, *inverse_factor(hessian[order][:, order], percdamp))


def gptq(weight, plan, bits, group_size=-1, sym=True, search_range=True):
    """QuantizedWeight of a weight (in, out), row by row, each row's error made up for by the rows to come (Frantar et al.,
    2210.17323).

    Groups are of rows that follow one another in the plan's order; with desc_act `groups` is then not sorted. Groups by
    position, their grids found ahead, would spare the look-up at run time; their error was 1 to 5 % larger in four
    cases of five, as in that order rows of like importance share a scale, one that is fitted to corrected weights.

    search_range: solved with grids from abs max and with searched ones, and the better taken for each output (outputs
    do not touch one another), so the loss is never larger than without.
    """
    factor, groups = plan.factor.astype(weight.dtype), group_numbers(len(weight), group_size)
    codes, scales, zeros, loss = gptq_solve(weight[plan.order], factor, groups, bits, sym, False)
    if search_range:
        *searched, searched_loss = gptq_solve(weight[plan.order], factor, groups, bits, sym, True)
        better = searched_loss < loss  # (out,)
        codes, scales, zeros = (np.where(better, new, old) for new, old in zip(searched, (codes, scales, zeros)))
    back = np.argsort(plan.order, kind="stable")
    return QuantizedWeight(codes[back], scales, zeros, groups[back])


def gptq_solve(work, factor, groups, bits, sym, search_range, block=128):
    """(codes, scales, zeros, loss (out,)) of weight rows `work` (in, out), quantized from the first to the last.

    Row q is rounded, and the rows after it lose R[q, j]/R[q, q] times its error, R being `factor`; in blocks of `block`
    rows, so that most of the work is matrix products. What that costs is the sum of (error / R[q, q])^2, the loss. A
    group's grid is found when its first row is reached, from its rows as corrected so far; with search_range the least
    loss decides, as far as it can be foreseen.
    """
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
                found = (
                    search_qparams(rows, bits, sym, importance[q:last]) if search_range else qparams(rows, bits, sym)
                )
                scales.append(found[0])
                zeros.append(found[1])
            codes[q] = quantize_to_codes(work[q], scales[-1], zeros[-1], bits)
            rounded = scales[-1] * (codes[q].astype(work.dtype) - zeros[-1])
            errors[q - start] = (work[q] - rounded) / factor[q, q]
            work[q + 1 : end] -= factor[q, q + 1 : end, None] * errors[q - start]
        work[end:] -= factor[start:end, end:].T @ errors
        loss += np.square(errors).sum(0)
    return codes, np.stack(scales), np.stack(zeros), loss


def output_error(weight, rounded, hessian):
    """||X (W - Q)|| / ||X W|| from X^T X, whatever its factor."""

    def size(w):
        return math.sqrt(max(0.0, float(np.sum((hessian @ w) * w))))

    weight = weight.astype(np.float64)
    return size(weight - rounded) / max(size(weight), 1e-300)


# ======================================================================== calibration: block by block


class ActivationStats:
    """What is kept of the inputs X (tokens, n) of the linears that share one: sums, extremes, a few rows."""

    def __init__(self, n, keep_hessian, keep_rows):
        self.tokens, self.rows_per_batch = 0, keep_rows
        self.hessian = np.zeros((n, n)) if keep_hessian else None  # float64, X^T X
        self.low, self.high, self.rows = [], [], []  # a batch: (n,) least, (n,) largest, (rows_per_batch, n)

    def add(self, x):
        """x (tokens, n) of one batch, padding taken out."""
        self.tokens += x.shape[0]
        if self.hessian is not None:
            self.hessian += paddle.matmul(x, x, transpose_x=True).numpy()
        self.low.append(x.min(0).numpy())
        self.high.append(x.max(0).numpy())
        if self.rows_per_batch:
            chosen = np.unique(np.linspace(0, x.shape[0] - 1, self.rows_per_batch).astype(np.int64))
            self.rows.append(x.index_select(paddle.to_tensor(chosen)).numpy())

    def mean_hessian(self):
        """(n, n) float64; without calibration data the identity, for which errors are those of the weights."""
        return self.hessian / self.tokens if self.tokens else np.eye(len(self.hessian))

    def extremes(self, batches):
        """(n,) least and largest of the first `batches` batches."""
        return np.min(self.low[:batches], 0), np.max(self.high[:batches], 0)

    def transform(self, shift, scale):
        """The same of (X - shift) / scale, both (n,)."""
        for values in (self.low, self.high, self.rows):
            values[:] = [(v - shift) / scale for v in values]


class ActivationRecorder(nn.Layer):
    """A linear whose inputs are looked at on their way."""

    def __init__(self, slot, inputs):
        super().__init__()
        self.slot, self.layer, self.inputs = slot, slot.layer, inputs
        self.real, self.active = None, True

    def forward(self, x, residual=None):
        if self.active:
            flat = x.reshape([-1, x.shape[-1]])
            # A routed expert gets real tokens alone, see real_experts().
            whole = self.real is None or self.slot.routed
            self.inputs.add(flat if whole else flat.index_select(self.real))
        return self.layer(x, residual)


class Calibration:
    """The hidden states of the calibration tokens before the block in hand."""

    def __init__(self, model, loader, batches):
        self.items = []  # a batch: [x (B, T, D), model.ForwardContext, places of real tokens or None]
        model.eval()
        for index in range(batches):
            batch = loader.batch(0, index)
            real = None if batch["tokens"] == batch["input_ids"].size else np.flatnonzero(real_positions(batch, loader))
            keys = ("input_ids", "position_ids", "startend_row_indices")
            arrays = (None if a is None else paddle.to_tensor(a) for a in (*(batch[key] for key in keys), real))
            *arrays, real = arrays
            ids, positions, rows = arrays
            context = model.start_forward(ids, positions, rows)
            self.items.append([model.embed(ids, context), context, real])

    @property
    def tokens(self):
        return sum(int(x.shape[0] * x.shape[1] if real is None else real.shape[0]) for x, _, real in self.items)

    def run(self, block, every=()):
        """Yields (batch number, places of real tokens, block's output) of each batch, which runs when called.

        every: experts that are given all tokens besides, for Recorders in them.
        """
        for number, (x, context, real) in enumerate(self.items):
            output = functools.partial(block, x, context)
            with real_experts(block.mlp, real, every):
                yield number, real, lambda: output()[0]

    def observe(self, block, slots, keep_hessian=False, keep_rows=0):
        """[ActivationStats] of the linears in `slots`, by running the block once over all batches.

        An expert to which no token was sent is shown all of them in a second run: it may well get some of other texts.
        """
        per_batch = -(-keep_rows // max(1, len(self.items)))
        recorders = [ActivationRecorder(s, ActivationStats(s.layer.n_in, keep_hessian, per_batch)) for s in slots]
        for slot, recorder in zip(slots, recorders):
            setattr(slot.parent, slot.attribute, recorder)
        self._record(block, recorders)
        if idle := [r for r in recorders if r.slot.routed and not r.inputs.tokens and self.items]:
            for recorder in recorders:
                recorder.active = recorder in idle
            self._record(block, idle, {id(r.slot.parent): r.slot.parent for r in idle}.values())
        for slot, recorder in zip(slots, recorders):
            setattr(slot.parent, slot.attribute, recorder.layer)
        for slot, recorder in zip(slots, recorders):
            if self.items and not np.isfinite([recorder.inputs.low, recorder.inputs.high]).all():
                raise UserError(f"{slot.path}: its inputs are not finite on the calibration data; is the model sound?")
        return [recorder.inputs for recorder in recorders]

    def _record(self, block, recorders, every=()):
        for _, real, output in self.run(block, every):
            for recorder in recorders:
                recorder.real = real
            output()

    def advance(self, block):
        """Replace the hidden states by the block's outputs."""
        for number, _, output in self.run(block):
            self.items[number][0] = output()


@contextlib.contextmanager
def real_experts(mlp, real, every=()):
    """Inside, the experts of a MoE get the tokens at `real` (n,) alone (None: all), and those in `every` all of these."""
    if not isinstance(mlp, MoE) or real is None and not every:
        yield
        return

    def mix(flat, weights, chosen, layout=None):
        routed = flat, weights, chosen
        if real is not None:
            routed = [x.index_select(real) for x in routed]
        for expert in every:
            expert(routed[0])
        mixed = MoE.dispatch_and_combine(mlp, *routed)
        return mixed if real is None else paddle.scatter(paddle.zeros_like(flat), real, mixed)

    mlp.dispatch_and_combine = mix
    try:
        yield
    finally:
        del mlp.dispatch_and_combine


def real_positions(batch, loader):
    """(B, T) bool: where there is a token of a record, not padding."""
    lengths = [sum(int(loader.dataset.lengths[i]) for i in row) for row in batch["sample_ids"]]
    return np.arange(batch["input_ids"].shape[1]) < np.array(lengths)[:, None]


class LinearRef(NamedTuple):
    """A linear of a block, wherever it stands."""

    path: str  # Hugging Face's
    parent: nn.Layer
    attribute: str
    routed: bool = False  # of an expert that only some tokens are sent to

    @property
    def layer(self):
        return getattr(self.parent, self.attribute)


def linear_refs(model, index):
    """{name inside the block: LinearRef} of block `index`."""
    names = {id(layer): name for name, layer in model.layers[index].named_sublayers()}
    return {
        names[id(layer)]: LinearRef(path, parent, attribute, ".experts." in names[id(layer)])
        for path, (parent, attribute, layer) in block_linears(model).items()
        if id(layer) in names
    }


class LinearGroup(NamedTuple):
    """Linears of a block that share an input."""

    names: tuple  # inside the block, in the order in which they run
    source: str  # the norm or linear that makes the input, channel by channel; a norm may feed several groups
    columns: np.ndarray | None = None  # of a linear source: which of its outputs become the inputs; None: all, in order
    heads: tuple = (1, 1)  # each of so many runs of these outputs is read so many times over
    fixed: str = ""  # why the source cannot be scaled

    @property
    def of_norm(self):
        return self.source.endswith("norm")


def sequential_groups(block, config):
    """[[LinearGroup, …], …] in the order in which they run; the groups of a stage do not wait for one another."""
    layers, readers = dict(block.named_sublayers()), norm_consumers(block)
    present = [n for n, layer in layers.items() if isinstance(layer, (Linear, QuantLinear)) and n.endswith("_proj")]

    def reading(norm, prefix, *attributes):
        names = tuple(name for name in (prefix + attribute for attribute in attributes) if name in present)
        return LinearGroup(names, norm, fixed="" if norm in readers else "the residual reads the norm, too")

    names = ("q_proj", "q_a_proj", "k_proj", "v_proj", "kv_a_proj", "qkv_proj")
    attention = [reading("attention_norm", "attention.", *names)]
    inner = [reading(f"attention.{a}_a_norm", "attention.", f"{a}_b_proj") for a in ("q", "kv")]
    inner = [group for group in inner if group.names]  # of latent attention
    first, second = [], []
    for up in (name for name in present if name.endswith("up_proj")):
        prefix = up[: up.rindex(".") + 1]
        first.append(reading("mlp_norm", prefix, "gate_proj", "up_proj", "gate_up_proj"))
        mlp, width = layers[prefix[:-1]], layers[prefix + "down_proj"].n_in
        passes = mlp.gated or mlp.activation == "relu"  # relu(x / s) = relu(x) / s
        second.append(
            LinearGroup(
                (prefix + "down_proj",),
                up,
                np.arange(width) + width * up.endswith("gate_up_proj"),
                fixed="" if passes else f"{mlp.activation} lies between, which no factor passes",
            )
        )
    return [stage for stage in (attention, inner, [values_group(present, config)], first, second) if stage]


def values_group(present, config):
    """The group of o_proj, whose inputs are means of the values that one linear puts out beside other things."""
    H, K, Dh, latent = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.latent
    if latent is not None:  # each head's keys, then its values
        wide = np.arange(H * (latent.nope_dim + latent.value_dim)).reshape(H, -1)
        return LinearGroup(("attention.o_proj",), "attention.kv_b_proj", wide[:, latent.nope_dim :].reshape(-1), (H, 1))
    if "attention.v_proj" in present:
        return LinearGroup(("attention.o_proj",), "attention.v_proj", None, (K, H // K))
    wide = np.arange((H + 2 * K) * Dh)
    columns = wide[(H + K) * Dh :] if config.fused_qkv == "blocks" else wide.reshape(K, -1, Dh)[:, -1].reshape(-1)
    return LinearGroup(("attention.o_proj",), "attention.qkv_proj", columns, (K, H // K))


# ======================================================================== shift and smoothing: the function stays


def shift(norm, layers, z):
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


def smooth(source, layers, scale, source_scale=None, columns=None):
    """Divide what `source` puts out by scale (n,) and multiply the rows of the linears that read it (Xiao et al.,
    2211.10438).

    source: a norm (its weight and bias) or the linear whose outputs (those in `columns`, or all) become these inputs
    channel by channel: up_proj before down_proj, whose inputs are act(gate) · up, and v_proj before o_proj, whose inputs
    are means of v's rows. There a key/value head feeds several heads: source_scale has its own (K · Dh,), repeated in
    scale.
    """
    source_scale = scale if source_scale is None else source_scale
    divisor = np.ones(source.weight.shape[-1], np.float32)
    assert len(divisor) == len(source_scale) or columns is not None and len(columns) == len(source_scale)
    assert all(layer.n_in == len(scale) for layer in layers)
    divisor[slice(None) if columns is None else columns] = source_scale
    offset = np.float32(getattr(source, "offset", 0.0))  # what a norm adds to its weight
    set_parameter(source.weight, (source.weight.numpy() + offset) / divisor - offset)
    if source.bias is not None:
        set_parameter(source.bias, source.bias.numpy() / divisor)
    for layer in layers:
        set_parameter(layer.weight, layer.weight.numpy() * scale[:, None])


def smooth_scale(x_max, w_max, alpha):
    """s = max|X|^alpha / max|W|^(1-alpha), (n,), at least 1e-5; 1 where a channel has no input or no weight."""
    scale = np.maximum(x_max**alpha / np.maximum(w_max, 1e-30) ** (1 - alpha), 1e-5)
    return np.where((x_max > 0) & (w_max > 0), scale, 1.0).astype(np.float32)


def int8_weight(weight):
    """QuantizedWeight (in, out) int8 in -127 … 127 and scales (out,) float32."""
    scales = (np.abs(weight).max(0) / 127).astype(np.float32)
    scales = np.where(scales > 0, scales, np.float32(1.0))
    return np.clip(np.rint(weight / scales), -127, 127).astype(np.int8), scales


def int8_rows(x, input_scale):
    """x (n, in) rounded to the int8 grid: of input_scale, or with None of each row's own."""
    scale = np.maximum(np.abs(x).max(1, keepdims=True), 1e-8) / 127 if input_scale is None else input_scale
    return np.clip(np.rint(x / scale), -128, 127) * scale


def input_scale(inputs, method, smoothing=1.0):
    """The scale of X / smoothing as a whole: all batches' largest (abs_max) or the mean of theirs (avg), over 127."""
    largest = [(np.maximum(np.abs(low), np.abs(high)) / smoothing).max() for low, high in zip(inputs.low, inputs.high)]
    value = max(largest) if method == "abs_max" else np.mean(largest)
    return np.float32(max(value, 1e-8) / 127)


def split_channels(values, k):
    """(n,) values -> (n,) piece of each, 0 the smallest: 1-D k-means from quantiles; fewer if values coincide."""
    centers = np.unique(np.quantile(values, (np.arange(k) + 0.5) / k))
    while True:
        nearest = np.abs(values[:, None] - centers).argmin(1)
        used = np.unique(nearest)
        means = np.array([values[nearest == c].mean() for c in used])
        if len(means) == len(centers) and np.allclose(means, centers, rtol=1e-6, atol=0):
            return nearest
        centers = means


def piecewise_search(parts, x_max, w_max, args):
    """Smoothing factors (n,) whose error on the kept rows is least, and that error: ||Q(X/s) Q(s W) - X W||^2 / ||X
    W||^2.

    parts: [(ActivationStats, weight (n, out))], summed over; several where experts read one norm. Channels are split into pieces
    by x_max. Piece by piece, factors s(alpha) and constants are tried for its channels, the others staying as chosen so
    far, at first as plain smoothing has them, and the best is kept. So the result is never worse, on these rows, than
    plain smoothing; starting from 1 would judge the small pieces while the large ones still spoil every scale. With
    smooth_search_piece for 1 … smooth_k_piece pieces, keeping the best.
    """
    parts = [(inputs, np.concatenate(inputs.rows), weight) for inputs, weight in parts]
    wanted = [rows @ weight for _, rows, weight in parts]
    total = max(sum(float(np.square(w, dtype=np.float64).sum()) for w in wanted), 1e-30)

    def error(scale):
        left = 0.0
        for (inputs, rows, weight), right in zip(parts, wanted):
            static = input_scale(inputs, args.act_quant_method, scale) if args.activation == "per_tensor" else None
            codes, scales = int8_weight(weight * scale[:, None])
            found = (int8_rows(rows / scale, static) @ codes.astype(np.float32)) * scales
            left += float(np.square(found - right, dtype=np.float64).sum())
        return left / total

    steps = np.arange(args.search_alpha_min, args.search_alpha_max + args.search_alpha_step / 2, args.search_alpha_step)
    candidates = [smooth_scale(x_max, w_max, alpha) for alpha in steps]
    constants = np.arange(args.search_scale_min, args.search_scale_max + 1e-6, 0.5)
    candidates += [np.full_like(x_max, c) for c in constants]
    plain = smooth_scale(x_max, w_max, args.smooth_alpha)
    best_scale, least = plain, error(plain)
    for k in range(1, args.smooth_k_piece + 1) if args.smooth_search_piece else (args.smooth_k_piece,):
        piece_of = split_channels(x_max, k)
        scale, found = plain, error(plain)
        for piece in range(piece_of.max() + 1):
            for candidate in candidates:
                tried = np.where(piece_of == piece, candidate, scale)
                if (e := error(tried)) < found:
                    scale, found = tried, e
        if found < least:
            best_scale, least = scale, found
    return best_scale, least


SEARCHED = 8  # of many experts that read one norm, how many the search judges by: those with the most tokens


def prepare_block(block, slots, inputs, config, args):
    """Shift and smooth the linears of a block, and `inputs` {first linear of a group: ActivationStats} with them.

    Returns lines that say what was left out, and why.
    """
    layers, readers, shiftable = dict(block.named_sublayers()), norm_consumers(block), shiftable_norms(block)
    by_source, left_out = {}, []
    for group in (group for stage in sequential_groups(block, config) for group in stage):
        by_source.setdefault(group.source if group.of_norm else group.names, []).append(group)
    for groups in by_source.values():
        group, seen = groups[0], [inputs[g.names[0]] for g in groups]
        source, kind = layers[group.source], group.names[0].rpartition(".")[2]
        linears_of = [[slots[name].layer for name in g.names] for g in groups]
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
            readers_of += [layers[name] for name in readers[group.source] if name not in slots]
        smooth(source, readers_of, scale, own, group.columns)
        for part in seen:
            part.transform(np.zeros_like(scale), scale)
    return left_out


def extremes(seen, batches):
    """(n,) least and largest of the first `batches` batches of several ActivationStats."""
    lows, highs = zip(*(inputs.extremes(batches) for inputs in seen))
    return np.min(lows, 0), np.max(highs, 0)


# ======================================================================== quantizing the model


def weight_only(slot, hessian, plan, args):
    """Replace a linear by its codes, GPTQ's where there is a plan; returns the error."""
    weight = slot.layer.weight.numpy()
    try:
        if plan is not None:
            found = gptq(weight, plan, args.bits, args.group_size, args.sym, args.search_range)
        else:
            found = round_to_nearest(weight, args.bits, args.group_size, args.sym)
        new = QuantLinear(*weight.shape, f"w{args.bits}", args.group_size, slot.layer.bias is not None, args.desc_act)
    except UserError as error:
        raise UserError(f"{slot.path}: {error}") from None
    tensors = {
        "qweight": pack_rows(found.codes, args.bits),
        "scales": found.scales,
        "qzeros": pack_zeros(found.zeros, args.bits),
        "g_index": found.groups,
    }
    replace(slot, new, tensors)
    return output_error(weight, found.weight(), hessian)


def weights_and_activations(slot, inputs, args):
    """Replace a linear by its int8 codes; returns the error, of rounded inputs and weights."""
    weight, rows = slot.layer.weight.numpy(), np.concatenate(inputs.rows)
    codes, scales = int8_weight(weight)
    static = input_scale(inputs, args.act_quant_method) if args.activation == "per_tensor" else None
    new = QuantLinear(*weight.shape, "a8w8", bias=slot.layer.bias is not None, static_input=static is not None)
    tensors = {"qweight": codes, "scales": scales}
    replace(slot, new, tensors if static is None else {**tensors, "input_scale": np.array([static], np.float32)})
    wanted = rows @ weight
    found = (int8_rows(rows, static) @ codes.astype(np.float32)) * scales
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def replace(slot, new, tensors):
    """Put a QuantLinear with these tensors, and the old bias, in a linear's place; the float weight goes."""
    for name, array in tensors.items():
        set_parameter(getattr(new, name), array)
    if new.bias is not None:
        set_parameter(new.bias, slot.layer.bias.numpy())
    setattr(slot.parent, slot.attribute, new)


HESSIAN_BYTES = 1 << 30  # of the Hessians that are summed up in one run over the calibration data


def fit_to_memory(stage, slots):
    """The groups of a stage in lists whose Hessians fit HESSIAN_BYTES, or of one group."""
    found, room = [], 0
    for group in stage:
        size = 8 * slots[group.names[0]].layer.n_in ** 2
        if size > room:
            found.append([])
            room = HESSIAN_BYTES
        found[-1].append(group)
        room -= size
    return found


@paddle.no_grad()
def quantize_model(model, calibration, args, say=print):
    """Quantize the linears of all blocks in place, one pass; returns the report's rows, printing each.

    Weight-only goes in the order in which a block runs: q, k, v, then o, then gate and up, then down, the inputs of
    each coming through the quantized linears before it. a8w8 needs the whole block's inputs first, as smoothing moves
    factors from one linear to another.
    """
    model.eval()
    report, told = [], set()

    def row(slot, error, damping, seconds):
        report.append(
            {
                "linear": slot.path,
                "shape": [slot.layer.n_in, slot.layer.n_out],
                "error": error,
                "damping": damping,
                "seconds": round(seconds, 3),
            }
        )
        shape, more = f"{slot.layer.n_in}x{slot.layer.n_out}", ""
        if damping is not None:
            more = f"  damping {damping:g}"
            if damping > args.percdamp:
                more += f": not positive definite with percdamp {args.percdamp:g}"
        say(f"{slot.path:<42} {shape:>12}  error {100 * error:8.4f} %  {seconds:6.2f} s{more}")

    for index, block in enumerate(model.layers):
        slots, stages, start = linear_refs(model, index), sequential_groups(block, model.config), time.perf_counter()
        if args.quant_type == "a8w8":
            firsts = [group.names[0] for stage in stages for group in stage]
            observed = calibration.observe(block, [slots[name] for name in firsts], keep_rows=args.search_tokens)
            inputs = dict(zip(firsts, observed))
            for line in prepare_block(block, slots, inputs, model.config, args):
                if line not in told:
                    say(line)
                told.add(line)
        for groups in (part for stage in stages for part in fit_to_memory(stage, slots)):
            if args.quant_type != "a8w8":
                firsts = [slots[group.names[0]] for group in groups]
                hessians = [seen.mean_hessian() for seen in calibration.observe(block, firsts, keep_hessian=True)]
            for place, group in enumerate(groups):
                if args.quant_type != "a8w8":
                    hessian = hessians[place]
                    plan = gptq_plan(hessian, args.desc_act, args.percdamp) if args.do_gptq else None
                for name in group.names:  # the time of what linears share is in the first one's row
                    if args.quant_type == "a8w8":
                        error, damping = weights_and_activations(slots[name], inputs[group.names[0]], args), None
                    else:
                        error, damping = weight_only(slots[name], hessian, plan, args), plan and plan.damping
                    now = time.perf_counter()
                    row(slots[name], error, damping, now - start)
                    start = now
        calibration.advance(block)
    model.config = dataclasses.replace(model.config, quantization=quantization_config(args))
    return report


def quantization_config(args):
    """What config.json says of the integers; weight-only in the words of GPTQ tools."""
    shared = {"bits": args.bits, "group_size": args.group_size, "algorithm": args.algorithm, "shift": args.shift}
    if args.quant_type == "a8w8":
        return {"quant_method": "a8w8", "activation": args.activation, "sym": True, "desc_act": False, **shared}
    order = {"sym": args.sym, "desc_act": args.do_gptq and args.desc_act}
    return {"quant_method": "gptq", "checkpoint_format": "gptq", "lm_head": False, **order, **shared}


# ======================================================================== main


def loaders(args, tokenizer):
    """(calibration loader, how many of its batches, dev loader or None); (None, 0, None) without data."""
    if not args.dataset_name_or_path:
        return None, 0, None
    path = Path(args.dataset_name_or_path)
    steps = (
        args.gptq_step
        if args.quant_type != "a8w8"
        else max(args.ptq_step, args.shift_step * args.shift, args.smooth_step * args.smooth)
    )
    if Path(f"{path}.idx").is_file() or Path(f"{path}_idx.npz").is_file():
        size = args.per_device_train_batch_size
        corpus = (path, args.split)
        calibration = CorpusLoader(*corpus, "train", steps * size, args.max_length, size, args.seed)
        dev = CorpusLoader(*corpus, "valid", None, args.max_length, args.per_device_eval_batch_size, shuffle=False)
        return calibration, steps, dev if args.do_eval else None

    def loader(split, batch_size, shuffle):
        lengths, progress = (args.src_length, args.max_length), not args.disable_tqdm
        records = SFTDataset(path, tokenizer, *lengths, split, progress=progress)
        packing = args.zero_padding, args.greedy_zero_padding
        return SFTLoader(
            records, batch_size, args.max_length, *packing, args.seed, shuffle, pad_token_id=tokenizer.pad_token_id
        )

    own = any((path / name).exists() for name in ("quant.json", "quant.jsonl", "quant"))
    calibration = loader("quant" if own else "train", args.per_device_train_batch_size, True)
    if calibration.batches_per_epoch < steps:
        print(f"calibration: the data has {calibration.batches_per_epoch} batches, {steps} were asked for")
    dev = loader("dev", args.per_device_eval_batch_size, False) if args.do_eval else None
    return calibration, min(steps, calibration.batches_per_epoch), dev


def open_model(args):
    """The float model to quantize, adapters merged into it."""
    model = from_pretrained(args.model_name_or_path)
    if args.lora_path:
        model = merge(load_adapter(model, args.lora_path))
    if model.config.quantization is not None:
        method = model.config.quantization["quant_method"]
        raise UserError(f"{args.model_name_or_path}: is quantized already ({method}); give the float model")
    if model.prefix is not None:
        raise UserError(
            f"{args.lora_path or args.model_name_or_path}: a prefix cannot be quantized; quantize its base model"
        )
    return model


def rest_dtype(model):
    """How to store what stays float (scales aside, which keep their own): bfloat16 if that loses nothing."""
    kept = [w.parameter for w in named_weights(model) if w.stored is None]
    rows = (p[at : at + 4096].numpy() for p in kept for at in range(0, p.shape[0], 4096))  # never a whole embedding
    exact = not any((array.view(np.uint32) & 0xFFFF).any() for array in rows)  # the bits that bfloat16 has not
    return "bfloat16" if exact else "float32"


def weight_bytes(*folders):
    """Bytes of the weight files of these folders."""
    return sum(
        file.stat().st_size
        for end in ("*.safetensors", "*.bin")
        for folder in folders
        for file in Path(folder).glob(end)
    )


def main(args):
    # ====================================================================== 1. data, model
    trainer.check_output_dir(args)
    folder = Path(args.output_dir).absolute()
    if not os.access(next(p for p in (folder, *folder.parents) if p.exists()), os.W_OK):
        raise UserError(f"output_dir: {args.output_dir} cannot be written to")
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.model_name_or_path)
    if args.chat_template is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)
    calibration_loader, batches, dev = loaders(args, tokenizer)
    model = open_model(args)
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path)
    report = {
        "bytes_float32": 4 * model.num_parameters(),
        "bytes_before": weight_bytes(*base_folders(args.model_name_or_path)),
    }
    if args.lora_path:
        report["bytes_before"] += weight_bytes(args.lora_path)
    if args.group_size != -1 and (
        uneven := {l.n_in for *_, l in block_linears(model).values() if l.n_in % args.group_size}
    ):
        print(f"group_size {args.group_size} does not divide {sorted(uneven)} input rows: their last group is shorter")

    # ====================================================================== 2. before
    before = trainer.evaluate(model, dev, args.max_evaluate_steps) if dev else None
    if before:
        print(f"dev before: {trainer.shown(before)}", flush=True)

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


def summary(report, args):
    """What the run ends with."""
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
