"""Shift and SmoothQuant: the outliers of inputs move into the weights before both are rounded to int8.

prepare_block() changes the float weights of one block so that its function stays the same. The channels' factors come
from maxima (smooth_scale) or from a search over pieces of channels (piecewise_search).
"""

from kernels.rounding import int8_weight

import numpy as np
from paddle import nn

from arguments import ScriptArgs
from families import ModelConfig
from model import norm_consumers, set_parameter, shiftable_norms
from quantization.calibration import ActivationStats, sequential_groups


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


def piecewise_search(parts: list, x_max: np.ndarray, w_max: np.ndarray, args: ScriptArgs) -> tuple:
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


def prepare_block(block: nn.Layer, refs: dict, inputs: dict, config: ModelConfig, args: ScriptArgs) -> list[str]:
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
