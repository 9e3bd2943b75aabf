"""Shift and SmoothQuant: the outliers of inputs move into the weights before both are rounded to int8.

prepare_block() changes the float weights of one block so that its function stays the same. The channels' factors come
from maxima (smooth_scale) or from a search over pieces of channels (piecewise_search), which measures the error of
rounding on sampled inputs (RoundingError). choose_input_scale() then sets the scale of each input.
"""

import kernels
from kernels.rounding import int8_weight

import numpy as np
import paddle
from paddle import nn

from arguments import ScriptArgs
from families import ModelConfig
from model import norm_consumers, set_parameter, shiftable_norms
from quantization.calibration import ActivationStats, LinearGroup, sequential_groups


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


def input_scale(inputs: ActivationStats, method: str, smoothing: np.ndarray | float = 1.0) -> np.float32:
    """One scale for X / smoothing: the mean of the batches' largest values (avg), or the largest of all, over 127."""
    largest = [(np.maximum(np.abs(low), np.abs(high)) / smoothing).max() for low, high in zip(inputs.low, inputs.high)]
    value = np.mean(largest) if method == "avg" else max(largest)
    return np.float32(max(value, 1e-8) / 127)


def some_rows(inputs: ActivationStats, tokens: int) -> np.ndarray:
    """(at most `tokens`, n) of the sampled rows, evenly."""
    rows = np.concatenate(inputs.rows)
    return rows[:: -(-len(rows) // tokens)] if len(rows) > tokens else rows


class RoundingError:
    """The error of one input X (tokens, n) and weight W (n, out) in int8, on some rows and outputs, for any factors s.

    It is the mean over tokens of ||Q(X/s) Q(sW) - XW||^2 / ||XW||^2, so that a few tokens with huge outputs do not
    decide alone; a token of small outputs counts by the median token's. The products are those of kernels.quant_linear.
    """

    OUTPUTS = 512  # at most so many, evenly: the error is much the same in all

    def __init__(self, inputs: ActivationStats, weight: np.ndarray, tokens: int):
        self.rows = some_rows(inputs, tokens)
        self.weight = np.ascontiguousarray(weight[:, :: -(-weight.shape[1] // self.OUTPUTS)])
        self.exact = self.rows @ self.weight
        size = np.square(self.exact).sum(1)
        size = np.maximum(size, max(float(np.median(size)), 1e-30))
        self.token_weights = 1 / (len(size) * size)  # (tokens,)

    def measure(self, scale: np.ndarray | float, static: float | None) -> float:
        """The error with one scale for X/s or, if static is None, one for each token."""
        x = kernels.to_tensor((self.rows / scale).astype(np.float32))
        static = None if static is None else kernels.to_tensor(np.array([static], np.float32))
        codes, scales = map(kernels.to_tensor, int8_weight(self.weight * np.reshape(scale, (-1, 1))))
        difference = kernels.quant_linear(x, codes, scales, None, "a8w8", input_scale=static).numpy() - self.exact
        return float(np.einsum("to,to->t", difference, difference) @ self.token_weights)


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


def candidate_scales(statistics: list, args: ScriptArgs) -> tuple[list, list]:
    """The factors (n,) that a search tries: for each pair of `statistics` smooth_scale() with each alpha; constants."""
    stop = args.search_alpha_max + args.search_alpha_step / 2
    alphas = np.arange(args.search_alpha_min, stop, args.search_alpha_step)
    constants = np.arange(args.search_scale_min, args.search_scale_max + 1e-6, 0.5)
    found = [[smooth_scale(x, w, alpha) for alpha in alphas] for x, w in statistics]
    # Their mean is 1, so that pieces of several fit together.
    found = [[scale / np.exp(np.log(scale).mean()) for scale in scales] for scales in found]
    return found, [np.full_like(statistics[0][0], c) for c in constants]


@paddle.no_grad()
def piecewise_search(parts: list, statistics: list, args: ScriptArgs) -> tuple:
    """Smoothing factors (n,) of least error on the sampled rows, and that error, see RoundingError.

    parts: [(ActivationStats, weight (n, out))] of each linear; their errors are summed. statistics: [(of the inputs, of
    the weights), …], each (n,); the first are the maxima. The search begins with the best factors for all channels
    together, none and plain smoothing among them. Channels are split into pieces by the inputs' maxima. Piece by piece,
    the candidates of the same statistics are then tried for its channels while the others stay as chosen so far, and
    the best is taken. The result is therefore never worse on these rows than plain smoothing. With smooth_search_piece,
    1 … smooth_k_piece pieces are tried."""
    parts = [(inputs, RoundingError(inputs, weight, args.search_tokens)) for inputs, weight in parts]

    def error(scale, limit=np.inf):
        total = 0.0
        for inputs, rounding in parts:
            static = None if args.activation == "per_token" else input_scale(inputs, args.act_quant_method, scale)
            total += rounding.measure(scale, static)
            if total >= limit:
                break
        return total

    (x_max, w_max), (found, constants) = statistics[0], candidate_scales(statistics, args)
    found[0] += [smooth_scale(x_max, w_max, args.smooth_alpha), np.ones_like(x_max)]
    start, start_error, candidates = None, np.inf, []
    for scales in found:
        for tried in scales:
            if (e := error(tried, start_error)) < start_error:
                start, start_error, candidates = tried, e, scales
    best_scale, least = start, start_error
    for k in range(1, args.smooth_k_piece + 1) if args.smooth_search_piece else (args.smooth_k_piece,):
        piece_of = split_channels(x_max, k)
        scale, scale_error = start, start_error
        for piece in range(piece_of.max() + 1):
            for candidate in candidates + constants:
                tried = np.where(piece_of == piece, candidate, scale)
                if (e := error(tried, scale_error)) < scale_error:
                    scale, scale_error = tried, e
        if scale_error < least:
            best_scale, least = scale, scale_error
    return best_scale, least


def channel_statistics(seen: list, sampled: list, weights: list, args: ScriptArgs) -> list[tuple]:
    """[(largest |X|, largest |W|), (root mean square of X, of W), (fourth root of mean X^4, the same of W)] by channel,
    each (n,), of all inputs and weights. Means are of the rows `sampled` [(tokens, n), …], each divided by its size if
    it is over the median's.

    All are of use. With a scale a token its largest channel decides the error of all others; if that is mostly another
    one, the mean of x^p / s^p weighs it, p about 4, against s^2 |w|^2, by which the errors grow."""
    low, high = extremes(seen, args.smooth_step)
    rows = np.concatenate(sampled)
    squares, weight = np.square(rows), np.concatenate(weights, axis=1)
    size = squares.mean(1, keepdims=True)
    squares /= np.maximum(size, max(float(np.median(size)), 1e-30))
    w_mean = np.sqrt(np.square(weight).mean(1))
    return [
        (np.maximum(np.abs(low), np.abs(high)), np.abs(weight).max(1)),
        (np.sqrt(squares.mean(0)), w_mean),
        (np.square(squares).mean(0) ** 0.25, w_mean),
    ]


def choose_input_scale(inputs: ActivationStats, weights: list, args: ScriptArgs) -> np.float32 | None:
    """The static scale of an input X that linears with these weights (n, out) read; None: one for each token.

    With activation mixed a scale a token is taken where the root of the error with one scale is per_token_ratio times
    that with a scale a token: where few tokens are much larger than the others."""
    if args.activation == "per_token":
        return None
    static = input_scale(inputs, args.act_quant_method)
    if args.activation == "mixed":
        roundings = [RoundingError(inputs, weight, args.search_tokens) for weight in weights]
        one, many = (sum(rounding.measure(1.0, scale) for rounding in roundings) for scale in (static, None))
        if one > args.per_token_ratio**2 * many:
            return None
    return static


SEARCHED = 8  # experts that read one norm and are used by the search: those with the most tokens


def prepare_block(block: nn.Layer, refs: dict, inputs: dict, config: ModelConfig, args: ScriptArgs) -> list[str]:
    """Shift and smooth the linears of a block and, accordingly, `inputs` {first linear of a group: ActivationStats},
    and choose the scale of each input.

    Groups of which no linear is in `inputs` stay as they are. Returns lines that say what was left out, and why.
    """
    by_source, left_out = {}, []
    for group in (group for stage in sequential_groups(block, config) for group in stage):
        if not inputs.keys().isdisjoint(group.names):
            by_source.setdefault(group.source if group.of_norm else group.names, []).append(group)
        elif args.shift and group.source in shiftable_norms(block):  # config.json's "shift" is of all norms
            shift_norm(block, group.source, np.zeros(refs[group.names[0]].layer.n_in, np.float32))
    for groups in by_source.values():
        seen = [next(inputs[name] for name in group.names if name in inputs) for group in groups]
        linears_of = [[refs[name].layer for name in group.names] for group in groups]
        if args.shift and groups[0].of_norm:
            left_out += shift_group(block, groups[0], seen, args)
        if args.smooth and (groups[0].of_norm or args.smooth_all_linears):
            left_out += smooth_group(block, groups[0], seen, linears_of, args)
        for part, linears in zip(seen, linears_of):
            part.scale = choose_input_scale(part, [layer.weight.numpy() for layer in linears], args)
    return left_out


def shift_norm(block: nn.Layer, norm: str, z: np.ndarray) -> None:
    """shift() of the norm with that name and of all linears that read it."""
    layers = dict(block.named_sublayers())
    shift(layers[norm], [layers[name] for name in shiftable_norms(block)[norm]], z)


def shift_group(block: nn.Layer, group: LinearGroup, seen: list, args: ScriptArgs) -> list[str]:
    """Center the inputs of the linears that read one norm; seen: [ActivationStats]. Lines about what is left out."""
    if group.source not in shiftable_norms(block):
        why = group.fixed or "a router reads the norm, and has no bias to take the constant"
        return [f"shift: not before {group.kind}: {why}"]
    low, high = extremes(seen, args.shift_step)
    shift_norm(block, group.source, (low + high) / 2)
    for part in seen:
        part.transform((low + high) / 2, np.ones_like(low))
    return []


def smooth_group(block: nn.Layer, group: LinearGroup, seen: list, linears_of: list, args: ScriptArgs) -> list[str]:
    """Divide the inputs of linears by factors that their source and their weights take.

    seen, linears_of: [ActivationStats], [[linear, …]] of each. Lines about what is left out."""
    if group.fixed:
        return [f"smooth: not before {group.kind}: {group.fixed}"]
    most = sorted(range(len(seen)), key=lambda i: -seen[i].tokens)[:SEARCHED]
    readers = [layer for linears in linears_of for layer in linears]
    sampled = [rows for i in most for rows in seen[i].rows]
    statistics = channel_statistics(seen, sampled, [layer.weight.numpy() for layer in readers], args)
    heads, times = group.heads  # the heads of a group read the same channels of v: one factor for them
    if times > 1:
        statistics = [[v.reshape(heads, times, -1).max(1, keepdims=True) for v in pair] for pair in statistics]
        statistics = [[np.repeat(v, times, axis=1).reshape(-1) for v in pair] for pair in statistics]
    if args.smooth_piecewise_search:
        parts = [(seen[i], layer.weight.numpy()) for i in most for layer in linears_of[i]]
        scale, _ = piecewise_search(parts, statistics, args)
    else:
        scale = smooth_scale(*statistics[0], args.smooth_alpha)
    layers = dict(block.named_sublayers())
    if group.of_norm:  # a router too, which stays as it is, and what is skipped
        readers = [layers[name] for name in norm_consumers(block)[group.source]]
    smooth(layers[group.source], readers, scale, scale.reshape(heads, times, -1)[:, 0].reshape(-1), group.columns)
    for part in seen:
        part.transform(np.zeros_like(scale), scale)
    return []


def extremes(seen: list, batches: int) -> tuple:
    """(n,) least and largest of the first `batches` batches of several ActivationStats."""
    lows, highs = zip(*(inputs.extremes(batches) for inputs in seen))
    return np.min(lows, 0), np.max(highs, 0)
