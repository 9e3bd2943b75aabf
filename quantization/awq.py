"""AWQ (Lin et al., arXiv 2306.00978): channels with large inputs get finer weights, then ranges are clipped.

A factor a channel moves from what makes an input (a norm, or a linear) into the rows of the linears that read it: the
function stays, and a row that is multiplied by s is rounded 1/s as coarsely. scale_block() searches these factors for a
block of float weights; clip() searches the range of each group of weights.
"""

from kernels.rounding import QuantizedWeight, group_numbers, quantize_to_codes, round_to_nearest

import numpy as np
from paddle import nn

from arguments import ScriptArgs
from model import norm_consumers
from quantization.calibration import Calibration
from quantization.gptq import search_qparams
from quantization.smoothing import SEARCHED, smooth

ROWS = 128  # calibration tokens that a factor's error is measured on
RATIOS = np.arange(20) / 20  # powers of the mean input that are tried; 0 leaves the channels as they are


def search_scale(parts: list, x_mean: np.ndarray, args: ScriptArgs) -> tuple[np.ndarray, float, float]:
    """Factors s (n,) of least error ||X W - (X / s) Q(s W)||^2 / ||X W||^2, that error, and the error of s = 1.

    parts: [(rows X (tokens, n), weight W (n, out))], errors are summed; several where experts read one norm. x_mean
    (n,): mean of |X|. s = x_mean^ratio, divided by the geometric mean of its extremes; 1 for a channel without inputs.
    """
    seen = x_mean > 0
    exact = max(sum(float(np.square(rows @ weight).sum()) for rows, weight in parts), 1e-30)
    found = []
    for ratio in RATIOS:
        scale = np.where(seen, np.maximum(x_mean, 1e-4), 1.0) ** ratio
        if seen.any():
            scale /= np.sqrt(scale[seen].max() * scale[seen].min())
        scale = np.where(seen, scale, 1.0).astype(np.float32)
        error = 0.0
        for rows, weight in parts:
            rounded = round_to_nearest(weight * scale[:, None], args.bits, args.group_size, args.sym).weight()
            error += float(np.square(rows @ (weight - rounded / scale[:, None])).sum())
        found.append((error / exact, scale))
    least, best = min(found, key=lambda pair: pair[0])
    return best, least, found[0][0]


def scale_block(block: nn.Layer, refs: dict, parts: list, calibration: Calibration, args: ScriptArgs) -> list[str]:
    """Scale the float weights of a block for rounding, its function unchanged; lines that say what was left out.

    parts: [[LinearGroup, …], …] of the block.
    """
    layers, readers = dict(block.named_sublayers()), norm_consumers(block)
    groups = [group for part in parts for group in part]
    observed = calibration.observe(block, [refs[g.names[0]] for g in groups], keep_rows=ROWS)
    by_source, left_out = {}, []
    for group, inputs in zip(groups, observed):
        by_source.setdefault(group.source if group.of_norm else group.names, []).append((group, inputs))
    for members in by_source.values():
        group = members[0][0]
        if group.fixed:
            left_out.append(f"awq: not before {group.names[0].rpartition('.')[2]}: {group.fixed}")
            continue
        most = sorted(members, key=lambda member: -member[1].tokens)[:SEARCHED]
        parts = [
            (np.concatenate(s.rows), np.concatenate([refs[n].layer.weight.numpy() for n in g.names], axis=1))
            for g, s in most
        ]
        x_mean = np.abs(np.concatenate([rows for rows, _ in parts])).mean(0)
        heads, times = group.heads  # the heads of a group read the same channels of v: one factor for them
        shared = x_mean.reshape(heads, times, -1).mean(1, keepdims=True)
        scale, least, plain = search_scale(parts, np.repeat(shared, times, axis=1).reshape(-1), args)
        if least < plain:
            linears = [refs[name].layer for g, _ in members for name in g.names]
            if group.of_norm:  # a router too, which stays as it is
                linears += [layers[name] for name in readers[group.source] if name not in refs]
            own = scale.reshape(heads, times, -1)[:, 0].reshape(-1)
            smooth(layers[group.source], linears, scale, own, group.columns)
    return left_out


def clip(weight: np.ndarray, hessian: np.ndarray, bits: int, group_size: int, sym: bool) -> QuantizedWeight:
    """A weight (in, out) rounded to nearest, the range of each group and output shrunk to 1 … 0.5 of itself for the
    least error of this group's share of X W; hessian: X^T X (in, in), up to a factor."""
    groups, grids, codes = group_numbers(len(weight), group_size), [], np.empty(weight.shape, np.uint8)
    for group in range(groups[-1] + 1):
        (own,) = np.nonzero(groups == group)
        rows = weight[own]
        scale, zero = search_qparams(rows, bits, sym, hessian[np.ix_(own, own)].astype(np.float32), least=0.5)
        codes[own] = quantize_to_codes(rows, scale, zero, bits)
        grids.append((scale, zero))
    scales, zeros = map(np.stack, zip(*grids))
    return QuantizedWeight(codes, scales, zeros, groups)
