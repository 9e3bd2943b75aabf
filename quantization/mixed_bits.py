"""Bits linear by linear: how far each moves the model's distributions, and the choice of formats under a mean size.

    units = sensitivities(model, calibration, args)         # of the float model
    bits = choose_bits(units, 4.5)                          # [bits of each unit]
    quantization |= mixed_config(units, bits)               # bits, and GPTQModel's `dynamic` for the others

A unit are the linears of a block that run at the same time (q, k, v; o; gate and up; down; of all experts), because
engines that put q, k and v into one product want one format for them.
"""

import re
from collections.abc import Callable

from kernels.rounding import round_to_nearest

import numpy as np
import paddle

from arguments import ScriptArgs
from formats.files import UserError
from formats.quantization_config import QUANTIZATIONS, with_fused
from model import CausalLM, set_parameter
from quantization.calibration import Calibration, linear_refs, sequential_groups
from quantization.divergence import token_scores

FORMATS = QUANTIZATIONS["gptq"]["bits"]  # that a linear may have


def packed_bits(n_in: int, n_out: int, bits: int, group_size: int) -> float:
    """Bits of a linear in GPTQ's layout: codes, scales in float16, zeros, and 32 for the group of each input row."""
    groups = 1 if group_size == -1 else -(-n_in // group_size)
    return n_in * n_out * bits + groups * n_out * (16 + bits) + 32 * n_in


@paddle.no_grad()
def sensitivities(
    model: CausalLM, calibration: Calibration, args: ScriptArgs, print_line: Callable = print
) -> list[dict]:
    """A row per unit: linears, weights, and by format {bits: mean KL divergence in nats} and {bits: bits in the file}.

    The divergence is that of the model's distributions on the calibration tokens when this unit alone is rounded to
    nearest. Each costs the blocks from the unit's on: half a pass over the model on average. The model stays as it is;
    `calibration` is used up.
    """
    model.eval()
    exact = [_states(model, 0, *item) for item in calibration.items]
    units = []
    for index, block in enumerate(model.layers):
        refs = linear_refs(model, index)
        for stage in sequential_groups(block, model.config):
            some = [refs[name] for group in stage for name in group.names]
            shapes = [(ref.layer.n_in, ref.layer.n_out) for ref in some]
            unit = {"linears": [ref.path for ref in some], "weights": sum(n * m for n, m in shapes), "kl": {}}
            unit["bits"] = {str(b): sum(packed_bits(*shape, b, args.group_size) for shape in shapes) for b in FORMATS}
            floats = [ref.layer.weight.numpy() for ref in some]
            for bits in FORMATS:
                for ref, weight in zip(some, floats):
                    rounded = round_to_nearest(weight, bits, args.group_size, args.sym).weight()
                    set_parameter(ref.layer.weight, rounded)
                unit["kl"][str(bits)] = _divergence(model, index, calibration, exact)
            for ref, weight in zip(some, floats):
                set_parameter(ref.layer.weight, weight)
            units.append(unit)
            kinds = ", ".join(f"{bits} bits {kl:.2e}" for bits, kl in unit["kl"].items())
            print_line(f"sensitivity of {_short(unit)}: KL divergence {kinds}")
        calibration.advance(block)
    return units


def _states(model, first, x, context, real):
    """(tokens, D) before the head, from x (B, T, D) before block `first`."""
    for block in model.layers[first:]:
        x = block(x, context)[0]
    x = model.final_norm(x)
    x = x.reshape([-1, x.shape[-1]])
    return x if real is None else x.index_select(real)


def _divergence(model, first, calibration, exact):
    """Mean KL divergence to the distributions of hidden states `exact`, from block `first` on."""
    parts = []
    for item, right in zip(calibration.items, exact):
        targets = paddle.zeros([right.shape[0]], "int64")  # only the divergence is wanted
        parts.append(token_scores(model, _states(model, first, *item), targets, right)[2])
    return float(np.concatenate(parts).astype(np.float64).mean())


def _short(unit):
    first, *rest = unit["linears"]
    return first + (f" and {len(rest)} more" if rest else "")


def check_size(shapes: list[tuple], mean_bits: float, group_size: int) -> None:
    """UserError if linears of these shapes (n_in, n_out) have more than mean_bits a weight in the smallest format."""
    total = sum(n_in * n_out for n_in, n_out in shapes)
    means = {b: sum(packed_bits(*shape, b, group_size) for shape in shapes) / total for b in sorted(FORMATS)}
    if mean_bits < min(means.values()):
        sizes = ", ".join(f"{mean:.3f} in {bits} bits" for bits, mean in means.items())
        raise UserError(
            f"bits: {mean_bits:g} a weight is too small; scales and zeros counted, this model has {sizes} and "
            f"group_size {group_size}; a larger group_size has fewer scales"
        )


def choose_bits(units: list[dict], mean_bits: float) -> list[int]:
    """Bits of each unit: together at most mean_bits a weight, scales and zeros counted, and as little loss as can be.

    All begin with the smallest format, which must fit (check_size()). The step to a larger one that saves the most
    divergence per bit comes first, until none fits: the divergences are small, and add up.
    """
    formats = sorted(int(bits) for bits in units[0]["kl"])
    chosen = [formats[0]] * len(units)
    room = sum(mean_bits * unit["weights"] - unit["bits"][str(formats[0])] for unit in units)
    while True:
        steps = []
        for i, unit in enumerate(units):
            for bits in formats[formats.index(chosen[i]) + 1 :]:
                cost = unit["bits"][str(bits)] - unit["bits"][str(chosen[i])]
                gain = unit["kl"][str(chosen[i])] - unit["kl"][str(bits)]
                if cost <= room and gain > 0:
                    steps.append((gain / cost, -cost, i, bits))
        if not steps:
            return chosen
        _, cost, i, bits = max(steps)
        chosen[i], room = bits, room + cost


def mixed_config(units: list[dict], bits: list[int]) -> dict:
    """`bits` of most weights, and `dynamic`, as GPTQModel reads it: a pattern for each unit that has other bits.

    A pattern also names the linear that an engine makes of q, k, v, or of gate and up.
    """
    sizes = {b: sum(unit["weights"] for unit, own in zip(units, bits) if own == b) for b in bits}
    most, dynamic = max(sizes, key=sizes.get), {}
    for unit, own in zip(units, bits):
        if own == most:
            continue
        pattern = "|".join(map(re.escape, with_fused(list(unit["linears"]))))
        dynamic[f"+:^({pattern})$"] = {"bits": own}
    return {"bits": most, "dynamic": dynamic}
