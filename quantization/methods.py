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

from formats.files import UserError
from model import QuantLinear
from quantization.gptq import gptq, gptq_plan, output_error
from quantization.smoothing import prepare_block


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
        weight, static = ref.layer.weight.numpy(), stats.scale
        codes, scales = int8_weight(weight)
        layer = QuantLinear(*weight.shape, "a8w8", bias=ref.layer.bias is not None, static_input=static is not None)
        tensors = {} if static is None else {"input_scale": np.array([static], np.float32)}
        rows = np.concatenate(stats.rows)
        ref.replace(layer, qweight=codes, scales=scales, **tensors)
        exact = rows @ weight
        rounded = layer.product(kernels.to_tensor(rows)).numpy()
        return float(np.linalg.norm(rounded - exact) / max(np.linalg.norm(exact), 1e-30)), None

    def config(self, args) -> dict:
        return {"quant_method": "a8w8", "activation": args.activation, "sym": True, "desc_act": False}


METHODS = {"rtn": WeightOnly(), "gptq": GPTQ(), "a8w8": A8W8()}
