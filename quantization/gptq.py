"""GPTQ (Frantar et al., arXiv 2210.17323): codes whose errors later rows make up for. numpy alone, no model.

plan = gptq_plan(hessian, group_size=128, desc_act=True)    # once for all linears that read one input
quantized = gptq(weight, plan, bits=4)                      # QuantizedWeight: codes, scales, zeros, groups
"""

import itertools
import math
from typing import NamedTuple

from kernels.rounding import QuantizedWeight, group_numbers, qparams, steps_of

import numpy as np

COLUMNS = 2048  # outputs that are solved at once


def search_qparams(rows: np.ndarray, bits: int, sym: bool, importance: np.ndarray, least: float = 0.62) -> tuple:
    """qparams() with the best shrink of 1, 0.98, … least for each output, by the error of the group's share of X W.

    importance (n, n): a Hessian of the inputs of these rows, e^T H e is the error of e = row - rounded row; (n,): its
    diagonal alone."""
    best, ends = None, np.stack([rows.min(0), rows.max(0)])  # all that qparams() takes of the rows
    for shrink in 1.0 - 0.02 * np.arange(int((1 - least) / 0.02 + 1.5)):
        scale, zero = qparams(ends, bits, sym, np.float32(shrink))
        residual = steps_of(rows, scale, zero, bits)
        residual *= scale
        np.subtract(rows, residual, out=residual)
        if importance.ndim == 1:
            error = importance @ np.square(residual, out=residual)  # (out,)
        else:
            error = np.einsum("io,io->o", importance @ residual, residual)
        if best is None:
            best = [error, scale, zero]
            continue
        better = error < best[0]
        best = [np.where(better, new, old) for new, old in zip((error, scale, zero), best)]
    return best[1], best[2]


class GPTQPlan(NamedTuple):
    """What GPTQ computes from the inputs only, shared by all linears that read them."""

    order: np.ndarray  # (in,) the input row quantized at each step
    groups: np.ndarray  # (in,) int32, its group
    feedback: np.ndarray  # (in, in): how much of row i's error row k > i takes over, both in that order
    importance: np.ndarray  # (in,): what the square of a corrected row's error counts for, the largest 1
    damping: float  # the damping used, as a share of the Hessian's mean diagonal
    static_groups: bool  # whether scales are fitted to the weight as it was


def cholesky_(a: np.ndarray, block: int = 256) -> None:
    """Turn a symmetric a (n, n) into L, lower triangular, a = L L^T, in place; NumPy's takes two copies of it.

    Raises LinAlgError if a is not positive definite."""
    for start in range(0, len(a), block):
        own, below = np.s_[start : start + block], np.s_[start + block :]
        a[start:, own] -= a[start:, :start] @ a[own, :start].T
        a[own, own] = np.linalg.cholesky(a[own, own])
        a[below, own] = np.linalg.solve(a[own, own], a[below, own].T).T
        a[:start, own] = 0


def scaled_factor(hessian: np.ndarray, order: np.ndarray, diagonal: np.ndarray) -> tuple | None:
    """(feedback (in, in), importance (in,)) of a GPTQPlan for the Hessian with this diagonal, both in the given order;
    None if it is not positive definite."""
    last_first, triangle = order[::-1], np.empty(hessian.shape)
    for start in range(0, len(triangle), 256):  # no second copy
        triangle[start : start + 256] = hessian[np.ix_(last_first[start : start + 256], last_first)]
    np.fill_diagonal(triangle, diagonal[last_first])
    try:
        cholesky_(triangle)
    except np.linalg.LinAlgError:
        return None
    factor = triangle[::-1, ::-1]
    own = factor.diagonal().copy()
    factor /= own
    feedback = np.ascontiguousarray(factor, hessian.dtype)
    return (feedback, np.square(own / own.max()).astype(hessian.dtype)) if np.isfinite(feedback).all() else None


def order_and_groups(sizes: np.ndarray, group_size: int, desc_act: bool, static_groups: bool) -> tuple:
    """(in,) the order of the rows and the group of each in it; sizes (in,): sums of squares of their inputs.

    With desc_act the largest comes first, whatever its group; groups are runs of this order unless they are static.
    Without it groups are runs by position, which need no look-up when the weight is used: the group with the largest
    size comes first, and inside a group the largest row (as GPTQModel's act_group_aware)."""
    groups = group_numbers(len(sizes), group_size)
    if desc_act:
        order = np.argsort(-sizes, kind="stable")
        return order, groups[order] if static_groups else groups
    largest = np.full(groups[-1] + 1, -np.inf)
    np.maximum.at(largest, groups, sizes)
    order = np.lexsort((-sizes, groups, -largest[groups]))
    return order, groups[order]


def gptq_plan(
    hessian: np.ndarray,
    group_size: int = -1,
    desc_act: bool = False,
    percdamp: float = 0.01,
    static_groups: bool = False,
) -> GPTQPlan:
    """GPTQPlan for a Hessian X^T X (in, in), up to a factor, in its dtype; the triangle in between is float64.

    With H = U U^T, U upper triangular, the loss of errors e = w - q is a sum over rows, e^T H e =
    sum_k U_kk^2 (w_k + sum_{i<k} U_ik / U_kk e_i - q_k)^2: row k is best rounded once it has taken over these shares of
    the errors before it. This is GPTQ's rule without its inverse of H (Chee et al., arXiv 2307.13304).

    Rows with large inputs are quantized early, while many rows are left to compensate for them, see order_and_groups().
    While H is not positive definite, the damping is multiplied by ten. Rows whose input was always 0 (dead) are rounded
    to nearest: calibration says nothing about them, and other text may use them.
    """
    diagonal = hessian.diagonal().astype(np.float64)
    diagonal[diagonal <= 0] = float(np.mean(diagonal)) or 1.0
    order, groups = order_and_groups(diagonal, group_size, desc_act, static_groups)
    mean, damping = max(float(np.mean(diagonal)), np.finfo(np.float64).tiny), percdamp
    while (found := scaled_factor(hessian, order, diagonal + damping * mean)) is None:
        damping = max(10 * damping, 1e-8)
    return GPTQPlan(order, groups, *found, damping, static_groups)


def gptq(weight: np.ndarray, plan: GPTQPlan, bits: int, sym: bool = True, search_range: bool = True) -> QuantizedWeight:
    """QuantizedWeight of a weight (in, out), row by row; later rows compensate for each row's error (arXiv 2210.17323).

    Scales are fitted to a group's corrected weights when it is reached; static_groups: to the weight as it was, which
    goes with any order of the rows.

    search_range: solve with abs-max ranges and with searched ones and take the better per output column (columns are
    independent), so the loss is never larger than without it.
    """
    searches, back = (False, True) if search_range else (False,), np.argsort(plan.order, kind="stable")
    parts = []
    for first in range(0, weight.shape[1], COLUMNS):
        *found, loss = gptq_solve(weight[plan.order, first : first + COLUMNS], plan, bits, sym, searches)
        parts.append([np.where(loss[-1] < loss[0], values[:, -1], values[:, 0]) for values in found])
    codes, scales, zeros = (np.concatenate(values, 1) for values in zip(*parts))
    return QuantizedWeight(codes[back], scales, zeros, plan.groups[back])


def grids_of(rows: np.ndarray, importance: np.ndarray, bits: int, sym: bool, searches: tuple) -> tuple:
    """(scales, zeros), each (searches, out), of a group's rows (n, 1 or searches, out), searched or by abs max."""
    some = np.broadcast_to(rows, (len(rows), len(searches), rows.shape[-1]))
    found = [
        search_qparams(some[:, i], bits, sym, importance) if search else qparams(some[:, i], bits, sym)
        for i, search in enumerate(searches)
    ]
    return tuple(np.stack(values) for values in zip(*found))


def gptq_solve(weight: np.ndarray, plan: GPTQPlan, bits: int, sym: bool, searches: tuple, block: int = 32) -> tuple:
    """Codes (in, searches, out), scales and zeros (groups, searches, out), loss (searches, out) of a weight (in, out).

    Its rows are in the plan's order; it is solved once for each of `searches` at the same time. Row k is rounded after
    it took over feedback[i, k] times the error of every row i before it: those before its group and before its block in
    a product of matrices each, those of its block one by one. A group's grid is chosen when it is reached, from its
    rows as they would be if they were left exact from there on."""
    n_in, shape, groups = len(weight), (len(searches), weight.shape[1]), plan.groups
    grids, bounds = {}, [0, n_in]  # by group, (scales, zeros) of grids_of()
    if plan.static_groups:
        for group in range(groups.max() + 1):
            own = groups == group
            grids[group] = grids_of(weight[own, None], plan.importance[own], bits, sym, searches)
    else:
        bounds = [*np.flatnonzero(np.diff(groups, prepend=-1)), n_in]
    feedback, codes = plan.feedback, np.empty((n_in, *shape), np.uint8)
    errors = np.empty((n_in, math.prod(shape)), weight.dtype)  # weight - rounded weight
    loss = np.zeros(shape, weight.dtype)
    for first, end in itertools.pairwise(bounds):
        moved = feedback[:first, first:end].T @ errors[:first]
        if not plan.static_groups:
            exact = np.linalg.inv(feedback[first:end, first:end]).T @ moved if first else moved
            rows = weight[first:end, None] + exact.reshape(-1, *shape)
            grids[groups[first]] = grids_of(rows, plan.importance[first:end], bits, sym, searches)
        for start in range(first, end, block):
            own = np.s_[start : min(start + block, end)]
            rows = moved[own.start - first : own.stop - first] + feedback[first:start, own].T @ errors[first:start]
            rows = weight[own, None] + rows.reshape(-1, *shape)
            for k, row in enumerate(rows, start):
                row += (feedback[start:k, k] @ errors[start:k]).reshape(shape)
                scale, zero = grids[groups[k]]
                steps = steps_of(row, scale, zero, bits)
                np.add(steps, zero, out=codes[k], casting="unsafe")
                steps *= scale
                np.subtract(weight[k], steps, out=errors[k].reshape(shape))
                row -= steps
            loss += np.einsum("k,kso,kso->so", plan.importance[own], rows, rows)
    scales, zeros = (np.stack(values) for values in zip(*(grids[group] for group in sorted(grids))))
    return codes, scales, zeros, loss
