"""The methods of quantize.py: what each observes of a linear's inputs, how it rounds a weight, what config.json says.

A new method is a class with the functions of WeightOnly and a row in METHODS.
"""

import kernels
from kernels.rounding import (
    QuantizedWeight,
    int8_weight,
    pack_rows,
    pack_zeros,
    round_to_nearest,
)

import numpy as np

from arguments import ScriptArgs
from formats.files import UserError
from formats.quantized_export import float8_weight
from model import Linear, QuantLinear
from quantization.auto_round import learn_block
from quantization.awq import clip, scale_block
from quantization.gptq import gptq, gptq_plan
from quantization.smoothing import prepare_block, some_rows


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """||found - exact|| / ||exact||."""
    return float(np.linalg.norm(found - exact) / max(np.linalg.norm(exact), 1e-30))


class WeightOnly:
    """Weights alone, each rounded to the nearest of its group's grid; also the base of methods that choose the codes.

    A method says what it keeps of a linear's inputs (`observes`), what linears that read one input share (`prepare`),
    how one linear is replaced (`quantize`), and what config.json tells other tools (`config`). A new method is such a
    class and a row in METHODS."""

    whole_block = True  # False: a group's inputs come through the quantized linears before it
    float_targets = False  # whether a block's targets are what the float model puts out there
    needs_hessian = False  # of the prepared block besides, as inputs come through the quantized linears before them

    def observes(self, args) -> dict:
        """Keyword arguments of Calibration.observe()."""
        return {"keep_rows": args.search_tokens}

    def start_block(self, block, refs, parts, calibration, args) -> list:
        """What is done to a block of float weights before its linears are observed; lines that say what was left out.

        parts: [[LinearGroup, …], …] in the order in which they run."""
        return scale_block(block, refs, parts, calibration, args) if args.do_awq else []

    def prepare_block(self, block, refs, stats, config, args) -> list:
        """Change a block's float weights before they are quantized; lines that say what was left out, and why."""
        return []

    def prepare(self, stats, args):
        """What all linears that read one input share: (inputs that errors are measured on, what codes() takes)."""
        return stats.sample(), None

    def codes(self, ref, weight, plan, args) -> QuantizedWeight:
        return round_to_nearest(weight, args.bits, args.group_size, args.sym)

    def quantize(self, ref, stats, shared, args) -> tuple:
        """Replace a linear by its codes; (relative error of its outputs, damping of the Hessian or None)."""
        weight, (rows, plan) = ref.layer.weight.numpy(), shared
        try:
            quantized = self.codes(ref, weight, plan, args)
            in_order = not self.config(args)["desc_act"]
            layer = QuantLinear(
                *weight.shape, f"w{args.bits}", args.group_size, ref.layer.bias is not None, not in_order
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
        exact = rows @ weight
        return relative_error(rows @ quantized.weight(), exact), getattr(plan, "damping", None)

    def config(self, args) -> dict:
        """quantization_config in the words of GPTQ tools; desc_act: whether groups are in the order of the inputs."""
        order = {"sym": args.sym, "desc_act": args.do_gptq and args.desc_act and not args.static_groups}
        return {"quant_method": "gptq", "checkpoint_format": "gptq", "lm_head": False, **order}


class GPTQ(WeightOnly):
    """Weights alone, the error of each row made up for by the rows to come (arXiv 2210.17323)."""

    whole_block = False

    def observes(self, args) -> dict:
        return {**super().observes(args), "keep_hessian": True}

    def prepare(self, stats, args):
        how = args.group_size, args.desc_act, args.percdamp, args.static_groups
        return stats.sample(), gptq_plan(stats.hessian, *how)

    def codes(self, ref, weight, plan, args) -> QuantizedWeight:
        return gptq(weight, plan, args.bits, args.sym, args.search_range)


class AWQ(WeightOnly):
    """Weights alone, to nearest in ranges that are searched (auto_clip), after channels were scaled (do_awq)."""

    whole_block = False

    def observes(self, args) -> dict:
        return {**super().observes(args), "keep_hessian": args.auto_clip}

    def prepare(self, stats, args):
        return stats.sample(), stats.hessian if args.auto_clip else None

    def codes(self, ref, weight, plan, args) -> QuantizedWeight:
        if not args.auto_clip:
            return super().codes(ref, weight, plan, args)
        return clip(weight, plan, args.bits, args.group_size, args.sym)


class AutoRound(WeightOnly):
    """Weights alone, rounded up or down as lowers the error of the block's output (arXiv 2309.05516)."""

    float_targets = True

    def start_block(self, block, refs, parts, calibration, args) -> list:
        targets = calibration.float_outputs(block)  # before AWQ, as a run that goes on after a kill has them
        lines = super().start_block(block, refs, parts, calibration, args)
        self.learned = learn_block(block, refs, parts, calibration, targets, args)  # of this block, by path
        return lines

    def codes(self, ref, weight, plan, args) -> QuantizedWeight:
        return self.learned.pop(ref.path)


STATISTICS_ROWS = 8  # tokens that channels are described by, of each that an error is measured on


class A8W8:
    """Weights and activations in int8; the whole block is observed first, as smoothing moves factors between
    linears."""

    whole_block, float_targets, needs_hessian = True, False, False

    def observes(self, args) -> dict:
        rows = args.search_tokens  # an expert keeps fewer: those that read one norm are described together
        return {"keep_rows": rows * (STATISTICS_ROWS if args.smooth_piecewise_search else 1), "expert_rows": rows}

    def codes(self, weight, plan, args) -> tuple:
        """Codes (in, out) int8 and scales (out,)."""
        return int8_weight(weight)

    def start_block(self, block, refs, parts, calibration, args) -> list:
        return []

    prepare_block = staticmethod(prepare_block)

    def prepare(self, stats, args):
        return None

    def quantize(self, ref, stats, shared, args) -> tuple:
        """Replace a linear by its int8 codes; (relative error of rounded inputs and weights, None)."""
        weight, static = ref.layer.weight.numpy(), stats.scale
        codes, scales = self.codes(weight, shared, args)
        layer = QuantLinear(*weight.shape, "a8w8", bias=ref.layer.bias is not None, static_input=static is not None)
        tensors = {} if static is None else {"input_scale": np.array([static], np.float32)}
        rows = some_rows(stats, args.search_tokens)
        ref.replace(layer, qweight=codes, scales=scales, **tensors)
        exact = rows @ weight
        return relative_error(layer.product(kernels.to_tensor(rows)).numpy(), exact), None

    def config(self, args) -> dict:
        return {"quant_method": "a8w8", "activation": args.activation, "sym": True, "desc_act": False}


class A8W8GPTQ(A8W8):
    """A8W8 whose weights are rounded by GPTQ, with the smoothed inputs that come through the quantized linears before.

    A scale of its own for each output, whatever the order of the rows: they always go by the size of their inputs."""

    needs_hessian = True

    def prepare(self, stats, args):
        return gptq_plan(stats.hessian, percdamp=args.percdamp)

    def codes(self, weight, plan, args) -> tuple:
        size = np.abs(weight).max(0)  # scales here are float32, and gptq() stores them in float16
        size[size == 0] = 1
        found = gptq(weight / size, plan, 8, search_range=False)  # smaller ranges are of use with few bits
        return (found.codes.astype(np.int16) - 128).astype(np.int8), found.scales[0] * size

    def quantize(self, ref, stats, shared, args) -> tuple:
        return super().quantize(ref, stats, shared, args)[0], shared.damping


class FP8(WeightOnly):
    """Weights alone, to the nearest e4m3."""

    def quantize(self, ref, stats, shared, args) -> tuple:
        weight, (rows, _) = ref.layer.weight.numpy(), shared
        layer, tensors = float8_layer(ref.layer, args)
        ref.replace(layer, **tensors)
        return relative_error(rows @ layer.full_weight(), rows @ weight), None

    def config(self, args) -> dict:
        return {"quant_method": "weight_only_fp8", "sym": True, "desc_act": False}


class A8W8FP8(A8W8):
    """Weights and activations in e4m3."""

    def quantize(self, ref, stats, shared, args) -> tuple:
        weight, rows = ref.layer.weight.numpy(), some_rows(stats, args.search_tokens)
        layer, tensors = float8_layer(ref.layer, args, stats.scale is not None)
        if stats.scale is not None:
            tensors["input_scale"] = np.array([stats.scale * 127 / 448], np.float32)  # it is that of int8
        ref.replace(layer, **tensors)
        return relative_error(layer.product(kernels.to_tensor(rows)).numpy(), rows @ weight), None

    def config(self, args) -> dict:
        return super().config(args) | {"quant_method": "a8w8_fp8"}


def float8_layer(linear: Linear, args: ScriptArgs, static_input: bool = False) -> tuple[QuantLinear, dict]:
    """A QuantLinear in e4m3 in place of a linear, and the tensors of its weight."""
    codes, scales = float8_weight(linear.weight.numpy(), args.weight_quant_method == "abs_max")
    has_bias = linear.bias is not None
    layer = QuantLinear(linear.n_in, linear.n_out, args.weights_type, bias=has_bias, static_input=static_input)
    return layer, {"qweight": codes, "scales": scales}


METHODS = {
    "rtn": WeightOnly(),
    "gptq": GPTQ(),
    "awq": AWQ(),
    "autoround": AutoRound(),
    "a8w8": A8W8(),
    "a8w8_gptq": A8W8GPTQ(),
    "fp8": FP8(),
    "a8w8_fp8": A8W8FP8(),
}
