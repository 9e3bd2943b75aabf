"""GPTQ (Frantar et al., arXiv 2210.17323): codes whose errors later rows make up for. numpy alone, no model.

plan = gptq_plan(hessian, desc_act=True)                    # once for all linears that read one input
quantized = gptq(weight, plan, bits=4, group_size=128)      # QuantizedWeight: codes, scales, zeros, groups
"""

import math
from typing import NamedTuple

from kernels.rounding import QuantizedWeight, group_numbers, qparams, quantize_to_codes

import numpy as np


def search_qparams(rows: np.ndarray, bits: int, sym: bool, importance: np.ndarray, least: float = 0.62) -> tuple:
    """qparams() with the best shrink of 1, 0.98, … least for each output, by the error of the group's share of X W.

    importance (n, n): a Hessian of the inputs of these rows, e^T H e is the error of e = row - rounded row; (n,): its
    diagonal alone."""
    best, shrinks = None, 1.0 - 0.02 * np.arange(int((1 - least) / 0.02 + 1.5))
    for shrink in shrinks:
        scale, zero = qparams(rows, bits, sym, np.float32(shrink))
        residual = rows - scale * (quantize_to_codes(rows, scale, zero, bits).astype(np.float32) - zero)
        if importance.ndim == 1:
            error = importance @ (residual * residual)  # (out,)
        else:
            error = np.einsum("io,io->o", importance @ residual, residual)
        if best is None:
            best = [error, scale, zero]
            continue
        better = error < best[0]
        best = [np.where(better, new, old) for new, old in zip((error, scale, zero), best)]
    return best[1], best[2]


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
    weight: np.ndarray,
    plan: GPTQPlan,
    bits: int,
    group_size: int = -1,
    sym: bool = True,
    search_range: bool = True,
    static_groups: bool = False,
) -> QuantizedWeight:
    """QuantizedWeight of a weight (in, out), row by row; later rows compensate for each row's error (arXiv 2210.17323).

    Groups are runs of rows in the plan's
    order; with desc_act `groups` is therefore not sorted: rows of similar importance share a scale, which is fitted to
    corrected weights. static_groups: groups are runs by position, whose scales are fitted to the weight as it was. They
    need no look-up at run time; their errors were 1 to 5 % larger in four cases of five.

    search_range: solve with abs-max ranges and with searched ones and take the better per output column (columns are
    independent), so the loss is never larger than without it.
    """
    factor, groups = plan.factor.astype(weight.dtype), group_numbers(len(weight), group_size)
    in_order, best = groups[plan.order] if static_groups else groups, None
    for search in (False, True) if search_range else (False,):
        grids = static_grids(weight, plan, groups, bits, sym, search) if static_groups else None
        *found, loss = gptq_solve(weight[plan.order], factor, in_order, bits, sym, search, grids)
        if best is None:
            best, least = found, loss
        else:
            best = [np.where(loss < least, new, old) for new, old in zip(found, best)]  # loss (out,)
    codes, scales, zeros = best
    back = np.argsort(plan.order, kind="stable")
    return QuantizedWeight(codes[back], scales, zeros, in_order[back])


def static_grids(
    weight: np.ndarray, plan: GPTQPlan, groups: np.ndarray, bits: int, sym: bool, search_range: bool
) -> tuple:
    """(scales, zeros), each (groups, out), of runs of rows by position, of the weight before any correction."""
    size, grids, importance = (groups == 0).sum(), [], np.empty(len(weight), weight.dtype)
    importance[plan.order] = (plan.factor.diagonal().min() / plan.factor.diagonal()) ** 2
    for first in range(0, len(weight), size):
        rows, some = weight[first : first + size], importance[first : first + size]
        grids.append(search_qparams(rows, bits, sym, some) if search_range else qparams(rows, bits, sym))
    return tuple(np.stack(values) for values in zip(*grids))


def gptq_solve(
    work: np.ndarray,
    factor: np.ndarray,
    groups: np.ndarray,
    bits: int,
    sym: bool,
    search_range: bool,
    grids: tuple | None,
    block: int = 128,
) -> tuple:
    """(codes, scales, zeros, loss (out,)) of weight rows `work` (in, out), quantized from the first to the last.

    Row q is rounded, and R[q, j]/R[q, q] times its error is subtracted from every later row j, R being `factor`; this
    is done in blocks of `block` rows, so that most of the work is matrix products. The loss is the sum of (error /
    R[q, q])^2. grids: (scales, zeros) of every group; None: a group's are chosen when its first row is reached, from
    its rows as corrected so far."""
    n_in, work = len(work), work.copy()
    importance = (factor.diagonal().min() / factor.diagonal()) ** 2
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    scales, zeros = ([], []) if grids is None else map(list, grids)
    codes, loss = np.empty(work.shape, np.uint8), np.zeros(work.shape[1], work.dtype)
    for start in range(0, n_in, block):
        end = min(start + block, n_in)
        errors = np.zeros((end - start, work.shape[1]), work.dtype)
        for q in range(start, end):
            if grids is None and len(scales) < len(starts) and q == starts[len(scales)]:
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
            scale, zero = scales[groups[q]], zeros[groups[q]]
            codes[q] = quantize_to_codes(work[q], scale, zero, bits)
            rounded = scale * (codes[q].astype(work.dtype) - zero)
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
