"""Integers of a quantized model in other tools' layouts: compressed-tensors (vLLM, transformers), AWQ.

    weights, quantization = quantized_weights(model, "compressed-tensors")
    save_pretrained(model, folder, dtype, weights=weights, quantization=quantization)

Codes and scales are those of the model; nothing is rounded again. (GPTQ's layout is the one of quantize.py: format hf.)
"""

import dataclasses

import numpy as np

from families import FAMILIES
from formats.dequantize import unpack
from formats.files import UserError
from formats.weights import weights_to_save
from model import CausalLM, block_linears
from modules.layers import QuantLinear

LAYOUTS = ("compressed-tensors", "awq")


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """A tensor to save under a name; as formats.weights.Weight is to save_pretrained."""

    name: str
    array: np.ndarray
    stored: str  # dtype on disk

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def to_numpy(self) -> np.ndarray:
        return self.array


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (n, …) -> int32 words (ceil(n * bits / 32), …) along the first dim, the lowest bits first."""
    per_word = 32 // bits
    codes = np.pad(codes, [(0, -len(codes) % per_word)] + [(0, 0)] * (codes.ndim - 1)).astype(np.uint32)
    codes = codes.reshape(-1, per_word, *codes.shape[1:])
    shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape(1, -1, *[1] * (codes.ndim - 2))
    return np.bitwise_or.reduce(codes << shifts, axis=1).view(np.int32)


def _zeros(layer: QuantLinear, bits: int) -> np.ndarray:
    """(groups, out) zero points."""
    packed = unpack(np.ascontiguousarray(layer.qzeros.numpy().T), bits).T
    return packed + np.uint8(1) & np.uint8((1 << bits) - 1)


def _compressed_tensors(layer: QuantLinear) -> dict[str, tuple[np.ndarray, str]]:
    qweight, scales = layer.qweight.numpy(), layer.scales.numpy()
    if layer.scheme == "a8w8":
        tensors = {"weight": (qweight.T, "int8"), "weight_scale": (scales[:, None], "float32")}
        if layer.input_scale is not None:
            tensors["input_scale"] = layer.input_scale.numpy(), "float32"
        return tensors
    bits = int(layer.scheme[1:])
    zeros = _zeros(layer, bits)
    tensors = {
        "weight_packed": (qweight.T, "int32"),  # the same words as GPTQ's, by rows
        "weight_scale": (scales.T, "float16"),
        "weight_shape": (np.array([layer.n_out, layer.n_in], np.int64), "int64"),
    }
    if (zeros != 1 << bits - 1).any():
        tensors["weight_zero_point"] = pack(np.ascontiguousarray(zeros.T), bits), "int32"
    if not layer.in_order:
        tensors["weight_g_idx"] = layer.g_index.numpy(), "int32"
    return tensors


def _compressed_config(model: CausalLM, tensors: list[dict]) -> dict:
    """quantization_config of a folder whose linears have these tensors."""
    quantization = model.config.quantization
    a8w8, kinds = quantization["quant_method"] == "a8w8", set().union(*tensors)
    group = quantization.get("group_size", -1)
    weights = {
        "num_bits": quantization["bits"],
        "type": "int",
        "symmetric": "weight_zero_point" not in kinds,
        "strategy": "channel" if a8w8 or group == -1 else "group",
        "group_size": None if a8w8 or group == -1 else group,
        "dynamic": False,
        "actorder": "group" if "weight_g_idx" in kinds else None,
    }
    inputs = None
    if a8w8:
        is_static = "input_scale" in kinds
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": not is_static}
        inputs["strategy"] = "tensor" if is_static else "token"
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if a8w8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", *_other_linears(model)],
        "kv_cache_scheme": None,
    }


def _other_linears(model: CausalLM) -> list[str]:
    """Module paths of the routers and other linears of the blocks that stay in float."""
    names = [weight.name for weight in weights_to_save(model)]
    return (model.config.quantization.get("modules_to_not_convert") or []) + [
        name.removesuffix(".weight") for name in names if name.endswith(("gate.weight", "shared_expert_gate.weight"))
    ]


_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # columns of a word, from its lowest bits


def _awq(layer: QuantLinear) -> dict[str, tuple[np.ndarray, str]]:
    if layer.scheme != "w4" or not layer.in_order:
        raise UserError("format: awq holds 4 bits without act order (desc_act); use format: compressed-tensors")

    def columns(codes: np.ndarray) -> np.ndarray:
        ordered = codes.reshape(len(codes), -1, 8)[:, :, _AWQ_ORDER].reshape(len(codes), -1)
        return np.ascontiguousarray(pack(np.ascontiguousarray(ordered.T), 4).T)

    return {
        "qweight": (columns(unpack(layer.qweight.numpy(), 4)), "int32"),
        "qzeros": (columns(_zeros(layer, 4)), "int32"),
        "scales": (layer.scales.numpy(), "float16"),
    }


def _awq_config(model: CausalLM, tensors: list[dict]) -> dict:
    group = model.config.quantization.get("group_size", -1)
    if group == -1:
        raise UserError("format: awq needs groups: quantize with a group_size, such as 128")
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return config | {"modules_to_not_convert": _other_linears(model) or None}


def quantized_weights(model: CausalLM, layout: str) -> tuple[list, dict]:
    """([what save_pretrained() writes], quantization_config) of a quantized model in a layout of LAYOUTS."""
    if model.config.quantization is None:
        raise UserError(f"format: {layout} is of a quantized model: quantize.py makes one")
    if FAMILIES[model.config.family].architecture == "GPT2LMHeadModel":
        raise UserError(f"format: {layout} is not supported for gpt2: its linears are [in, out] there")
    of_layer, config_of = {"compressed-tensors": (_compressed_tensors, _compressed_config), "awq": (_awq, _awq_config)}[
        layout
    ]
    if model.config.quantization.get("activation") == "mixed":
        raise UserError(f"format: {layout}: activation mixed is not supported; quantize with per_tensor or per_token")
    layers = {path: layer for path, (*_, layer) in block_linears(model).items()}
    linears = {path: of_layer(layer) for path, layer in layers.items() if isinstance(layer, QuantLinear)}
    own = tuple(f"{path}." for path in linears)
    weights = [w for w in weights_to_save(model) if not w.name.startswith(own) or w.name.endswith(".bias")]
    for path, tensors in linears.items():
        for kind, (array, dtype) in tensors.items():
            weights.append(StoredArray(f"{path}.{kind}", np.ascontiguousarray(array), dtype))
    return weights, config_of(model, list(linears.values()))
