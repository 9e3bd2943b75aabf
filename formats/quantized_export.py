"""Quantized models in other tools' layouts: compressed-tensors (vLLM, transformers), AWQ; and float models in fp8.

    weights, quantization = quantized_weights(model, "compressed-tensors")
    save_pretrained(model, folder, dtype, weights=weights, quantization=quantization)

compressed-tensors, awq: codes and scales are those of the model; nothing is rounded again. (GPTQ's layout is the one of
quantize.py: format hf.) fp8: weights of a float model to e4m3, one scale an output channel; compressed-tensors'
float-quantized. The client rounds activations to e4m3 token by token; ours computes in float.
"""

import dataclasses

import numpy as np

from families import FAMILIES
from formats.dequantize import unpack
from formats.files import UserError
from formats.quantization_config import bits_of
from formats.tensor_files import float8_values
from formats.weights import weights_to_save
from model import CausalLM, block_linears
from modules.layers import FLOAT8, Linear, QuantLinear

LAYOUTS = ("compressed-tensors", "awq", "fp8")


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
    if layer.scheme == "a8w8" or layer.scheme in FLOAT8:
        codes = (qweight.T, "int8") if layer.scheme == "a8w8" else (qweight, "F8_E4M3")
        tensors = {"weight": codes, "weight_scale": (scales[:, None], "float32")}
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


def _compressed_config(model: CausalLM, linears: dict[str, dict]) -> dict:
    """quantization_config of a folder whose linears have these tensors: a group of linears for each number of bits."""
    quantization, paths_of = model.config.quantization, {}
    for path in linears:
        paths_of.setdefault(bits_of(quantization, path), []).append(path)
    groups = {}
    for number, (bits, paths) in enumerate(sorted(paths_of.items())):
        kinds = set().union(*(linears[path] for path in paths))
        targets = ["Linear"] if len(paths_of) == 1 else paths
        groups[f"group_{number}"] = {"targets": targets, **_compressed_scheme(quantization, bits, kinds)}
    format = {"gptq": "pack-quantized", "a8w8": "int-quantized"}.get(quantization["quant_method"], "float-quantized")
    return _config_of(model, format, groups)


def _compressed_scheme(quantization, bits, kinds):
    """What a config group says of its weights and activations; kinds: the names of the tensors that a linear has."""
    method, group = quantization["quant_method"], quantization.get("group_size", -1)
    is_whole, kind = method != "gptq" or group == -1, "float" if method.endswith("fp8") else "int"
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": "weight_zero_point" not in kinds,
        "strategy": "channel" if is_whole else "group",
        "group_size": None if is_whole else group,
        "dynamic": False,
        "actorder": "group" if "weight_g_idx" in kinds else None,
    }
    inputs = None
    if method.startswith("a8w8"):
        is_static = "input_scale" in kinds
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": not is_static}
        inputs["strategy"] = "tensor" if is_static else "token"
    return _scheme(weights, inputs)


def _scheme(weights, inputs):
    return {"weights": weights, "input_activations": inputs, "output_activations": None}


def _config_of(model: CausalLM, format: str, groups: dict[str, dict]) -> dict:
    """quantization_config of compressed-tensors, with these config groups of the linears of the blocks."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *_other_linears(model)],
        "kv_cache_scheme": None,
    }


def to_float8(values: np.ndarray) -> np.ndarray:
    """float32 within ±448 -> the bits of the nearest e4m3, a midpoint to the even one; uint8."""
    table = float8_values(4)[:127]  # 0 to 448, rising with their codes
    middles, sizes = (table[1:] + table[:-1]) / 2, np.abs(values)
    codes = np.searchsorted(middles, sizes).astype(np.uint8)  # a midpoint to the lower one
    codes += (codes % 2 == 1) & (sizes == np.append(middles, np.inf)[codes])
    return codes | np.signbit(values).astype(np.uint8) << np.uint8(7)


def float8_weight(weight: np.ndarray, one_scale: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A weight (in, out) float32 -> the bits of e4m3 (out, in), and scales (out,): of each output, or all the same."""
    largest = np.abs(weight).max(0)
    largest = np.full_like(largest, largest.max()) if one_scale else largest
    scales = np.maximum(largest, np.float32(1e-12)) / np.float32(448)
    return to_float8((weight / scales).clip(-448, 448).T), scales


def _fp8(layer: Linear) -> dict[str, tuple[np.ndarray, str]]:
    """Rounds the layer's weight too, in place: the model is then what the file says."""
    codes, scales = float8_weight(layer.weight.astype("float32").numpy())
    layer.weight.set_value(np.ascontiguousarray(float8_values(4)[codes].T) * scales)
    return {"weight": (codes, "F8_E4M3"), "weight_scale": (scales[:, None], "float32")}


def _fp8_config(model: CausalLM, linears: dict[str, dict]) -> dict:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return _config_of(model, "float-quantized", {"group_0": {"targets": ["Linear"], **_scheme(weights, inputs)}})


def _other_linears(model: CausalLM) -> list[str]:
    """Module paths of the routers and other linears of the blocks that stay in float."""
    names = [weight.name for weight in weights_to_save(model)]
    return list((model.config.quantization or {}).get("modules_to_not_convert") or []) + [
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


def _awq_config(model: CausalLM, linears: dict[str, dict]) -> dict:
    group = model.config.quantization.get("group_size", -1)
    if group == -1:
        raise UserError("format: awq needs groups: quantize with a group_size, such as 128")
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return config | {"modules_to_not_convert": _other_linears(model) or None}


_WRITERS = {  # layout: (tensors of a linear, quantization_config)
    "compressed-tensors": (_compressed_tensors, _compressed_config),
    "awq": (_awq, _awq_config),
    "fp8": (_fp8, _fp8_config),
}


def quantized_weights(model: CausalLM, layout: str) -> tuple[list, dict]:
    """([what save_pretrained() writes], quantization_config) of a model in a layout of LAYOUTS; fp8 rounds it."""
    is_quantized = model.config.quantization is not None
    if layout == "fp8" and is_quantized:
        raise UserError("format: fp8 is of a float model; dequantize: true makes one of integers")
    if layout != "fp8" and not is_quantized:
        raise UserError(f"format: {layout} is of a quantized model: quantize.py makes one")
    if FAMILIES[model.config.family].architecture == "GPT2LMHeadModel":
        raise UserError(f"format: {layout} is not supported for gpt2: its linears are [in, out] there")
    if is_quantized and model.config.quantization.get("activation") == "mixed":
        raise UserError(f"format: {layout}: activation mixed is not supported; quantize with per_tensor or per_token")
    of_layer, config_of = _WRITERS[layout]
    layers = {path: layer for path, (*_, layer) in block_linears(model).items()}
    linears = {p: of_layer(layer) for p, layer in layers.items() if isinstance(layer, QuantLinear) or not is_quantized}
    own = tuple(f"{path}." for path in linears)
    weights = [w for w in weights_to_save(model) if not w.name.startswith(own) or w.name.endswith(".bias")]
    for path, tensors in linears.items():
        for kind, (array, dtype) in tensors.items():
            weights.append(StoredArray(f"{path}.{kind}", np.ascontiguousarray(array), dtype))
    return weights, config_of(model, linears)
