"""Folders that other tools quantized, as folders of floats: AWQ, GPTQ, compressed-tensors, bitsandbytes, fp8.

    tensors = float_tensors(stored_tensors(path), quantization_config, path)    # under the names of a float model

A tensor is dequantized when it is read. METHODS says what is read of each quant_method; everything else is refused by
name. Activations are not rounded, whatever the file says of them: the model computes with these weights in float.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from formats.files import UserError
from formats.quantization_config import bits_of
from formats.tensor_files import StoredTensor

Tensors = dict[str, StoredTensor]

# ================================================================================================= packed integers


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 words along the first dim, (n, …) -> codes (n * 32 / bits, …): a stream of bits, the lowest first.

    With 3 bits a code may lie in two words.
    """
    count = words.shape[0] * 32 // bits
    at = np.arange(count) * bits
    wide = np.concatenate([words.view(np.uint32), np.zeros((1, *words.shape[1:]), np.uint32)]).astype(np.uint64)
    pairs = wide[at // 32] | wide[at // 32 + 1] << np.uint64(32)
    shifts = (at % 32).astype(np.uint64).reshape(-1, *[1] * (words.ndim - 1))
    return (pairs >> shifts & np.uint64((1 << bits) - 1)).astype(np.uint8)


def _by_group(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(code - zero) · scale, (in, out); zeros and scales (groups, out), groups (in,) of each row."""
    return (codes.astype(np.float32) - zeros.astype(np.float32)[groups]) * scales.astype(np.float32)[groups]


def _modules(tensors: Tensors, suffix: str) -> list[str]:
    """The modules that have a tensor of this name, with the dot behind them."""
    return [name.removesuffix(suffix) for name in tensors if name.endswith("." + suffix)]


def _replaced(tensors: Tensors, module: str, kinds: tuple, shape: list[int], read: Callable) -> None:
    """module.weight in place of the tensors that it is made of."""
    for kind in kinds:
        tensors.pop(module + kind, None)
    tensors[module + "weight"] = StoredTensor(read, shape)


# ==================================================================================================== GPTQ and AWQ


def _gptq(tensors: Tensors, config: dict, path: Path) -> None:
    """qweight (in * bits / 32, out), scales, qzeros (minus 1, but in checkpoint_format gptq_v2), g_idx."""
    offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    for module in _modules(tensors, "qweight"):
        bits = bits_of(config, module.rstrip("."))
        if bits not in (2, 3, 4, 8):
            raise UserError(f"{path}: {module}qweight: {bits} bits; readable are 2, 3, 4 and 8")
        parts = {kind: tensors.get(module + kind) for kind in ("qweight", "qzeros", "scales", "g_idx")}
        n_in, n_out = parts["qweight"].shape[0] * 32 // bits, parts["qweight"].shape[1]

        def read(parts=parts, bits=bits, n_in=n_in) -> np.ndarray:
            scales = parts["scales"].read()
            codes = unpack(parts["qweight"].read(), bits)
            zeros = unpack(parts["qzeros"].read().T, bits).T[:, : scales.shape[1]]
            zeros = zeros + np.uint8(offset) & np.uint8((1 << bits) - 1)
            groups = np.arange(n_in) // -(-n_in // len(scales)) if parts["g_idx"] is None else parts["g_idx"].read()
            return _by_group(codes, scales, zeros, groups).T

        _replaced(tensors, module, tuple(parts), [n_out, n_in], read)


_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # a word's nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7


def awq_columns(words: np.ndarray) -> np.ndarray:
    """int32 words (rows, out / 8) -> codes (rows, out)."""
    codes = unpack(words.T, 4).T  # eight columns at a time in AWQ's order
    return codes.reshape(len(codes), -1, 8)[:, :, _AWQ_ORDER].reshape(len(codes), -1)


def _awq(tensors: Tensors, config: dict, path: Path) -> None:
    """qweight (in, out / 8), qzeros (in / group, out / 8), scales (in / group, out); AutoAWQ's version gemm."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or config.get("bits", config.get("w_bit", 4)) != 4:
        raise UserError(f"{path}: AWQ version {version!r} of {config.get('bits')} bits; readable is gemm of 4")

    for module in _modules(tensors, "qweight"):
        parts = {kind: tensors[module + kind] for kind in ("qweight", "qzeros", "scales")}
        n_in, n_out = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8

        def read(parts=parts, n_in=n_in) -> np.ndarray:
            scales = parts["scales"].read()
            groups = np.arange(n_in) // (n_in // len(scales))
            codes, zeros = (awq_columns(parts[kind].read()) for kind in ("qweight", "qzeros"))
            return _by_group(codes, scales, zeros, groups).T

        _replaced(tensors, module, tuple(parts), [n_out, n_in], read)


# =============================================================================================== compressed-tensors

_COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")


_COMPRESSED_TENSORS = """weight_packed weight_shape weight_scale weight_zero_point weight_g_idx input_scale
    input_zero_point output_scale""".split()


def _compressed_tensors(tensors: Tensors, config: dict, path: Path) -> None:
    """weight_packed (out, in * bits / 32), or weight in 8 bits; weight_scale (out, groups), weight_zero_point."""
    schemes = [group.get("weights") for group in (config.get("config_groups") or {}).values()]
    formats = {config.get("format"), *(group.get("format") for group in (config.get("config_groups") or {}).values())}
    for name in formats - {None, "mixed-precision"}:
        if name not in _COMPRESSED:
            raise UserError(f"{path}: compressed-tensors format {name!r}; readable are {', '.join(_COMPRESSED)}")
    if config.get("sparsity_config") and config["sparsity_config"].get("format") not in (None, "dense"):
        raise UserError(f"{path}: sparsity_config: format {config['sparsity_config']['format']!r} is not supported")
    if config.get("transform_config") and config["transform_config"].get("config_groups"):
        raise UserError(f"{path}: transform_config of compressed-tensors is not supported: it changes the maths")
    bits_there = {scheme["num_bits"] for scheme in schemes if scheme}
    kinds = tuple(_COMPRESSED_TENSORS)
    for module in _modules(tensors, "weight_packed"):
        parts = {kind: tensors.get(module + kind) for kind in kinds}
        n_out, n_in = map(int, parts["weight_shape"].read().reshape(-1))
        bits = next((b for b in bits_there if parts["weight_packed"].shape[1] == -(-n_in // (32 // b))), None)
        if bits not in (2, 4, 8):
            raise UserError(f"{path}: {module}weight_packed: of {sorted(bits_there)} bits; readable are 2, 4 and 8")

        def read(parts=parts, bits=bits, n_in=n_in, n_out=n_out) -> np.ndarray:
            codes = unpack(parts["weight_packed"].read().T, bits)[:n_in]  # (in, out)
            scales = parts["weight_scale"].read().T  # (groups, out)
            zeros = np.full(scales.shape, 1 << bits - 1)
            if parts["weight_zero_point"] is not None:
                zeros = unpack(parts["weight_zero_point"].read(), bits)[:n_out].T
            groups = np.arange(n_in) // -(-n_in // len(scales))
            if parts["weight_g_idx"] is not None:
                groups = parts["weight_g_idx"].read()
            return _by_group(codes, scales, zeros, groups).T

        _replaced(tensors, module, kinds, [n_out, n_in], read)
    block = next((s["block_structure"] for s in schemes if s and s.get("strategy") == "block"), None)
    for module in _modules(tensors, "weight_scale"):
        parts = {kind: tensors.get(module + kind) for kind in ("weight", *kinds)}
        if parts["weight"] is None:
            raise UserError(f"{path}: {module}weight_scale stands without {module}weight")
        _replaced(tensors, module, kinds, parts["weight"].shape, lambda parts=parts: _scaled(parts, block))
    for name in [name for name in tensors if name.endswith(("k_scale", "v_scale", "q_scale"))]:
        del tensors[name]  # of a cache in 8 bits


def _scaled(parts: dict, block: list[int] | None = None) -> np.ndarray:
    """A weight in 8 bits (out, in) with scales by tensor, channel, group of columns, or block of so many each way."""
    weight = parts["weight"].read().astype(np.float32)
    scale = parts["weight_scale"].read().astype(np.float32)
    if parts.get("weight_zero_point") is not None:
        zero = parts["weight_zero_point"].read().astype(np.float32)
        weight = weight - _spread(zero, weight.shape, block)
    return weight * _spread(scale, weight.shape, block)


def _spread(scale: np.ndarray, shape: tuple, block: list[int] | None = None) -> np.ndarray:
    """(), (1,), (out,), (out, 1), (out, groups), or with `block` (blocks, blocks) -> values that broadcast to shape."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    scale = scale.reshape(len(scale), -1)
    for dim in (0, 1):
        if block or scale.shape[dim] not in (1, shape[dim]):
            scale = np.repeat(scale, block[dim] if block else -(-shape[dim] // scale.shape[dim]), dim)
    return scale[: shape[0], : shape[1]]


# ============================================================================================= fp8 and bitsandbytes


def _fp8(tensors: Tensors, config: dict, path: Path) -> None:
    """weight in e4m3 with weight_scale_inv by blocks (DeepSeek-V3), or weight_scale by tensor or channel."""
    block = config.get("weight_block_size")
    for kind in ("weight_scale_inv", "weight_scale"):
        for module in _modules(tensors, kind):
            weight, scale = tensors[module + "weight"], tensors[module + kind]
            if kind.endswith("inv") and block:
                expected = [math.ceil(size / run) for size, run in zip(weight.shape, block)]
                if list(scale.shape) != expected:
                    raise UserError(f"{path}: {module}{kind} has shape {list(scale.shape)}; {expected} is right")

            def read(weight=weight, scale=scale, block=block if kind.endswith("inv") else None) -> np.ndarray:
                return weight.read() * _spread(scale.read().astype(np.float32), weight.shape, block)

            kinds = (kind, "input_scale", "activation_scale", "input_scale_ub")
            _replaced(tensors, module, kinds, weight.shape, read)
    for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale", ".input_scale_ub"))]:
        del tensors[name]


def _bitsandbytes(tensors: Tensors, config: dict, path: Path) -> None:
    """weight uint8 (n / 2, 1) with absmax, quant_map and quant_state (nf4, fp4), or int8 with SCB."""
    for name in [name for name in tensors if ".quant_state.bitsandbytes__" in name]:
        stem = name.partition("quant_state")[0]  # "….weight."
        parts = {
            kind: tensors.pop(stem + kind, None)
            for kind in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        }
        state = json.loads(tensors.pop(name).read().astype(np.uint8).tobytes())
        module, packed = stem.removesuffix("weight."), tensors[stem.removesuffix(".")]

        def read(parts=parts, state=state, packed=packed) -> np.ndarray:
            absmax = parts["absmax"].read()
            if parts["nested_absmax"] is not None:
                nested = parts["nested_quant_map"].read()[absmax]
                scales = np.repeat(parts["nested_absmax"].read(), state["nested_blocksize"])[: len(nested)]
                absmax = nested * scales + np.float32(state["nested_offset"])
            codes, shape = packed.read().reshape(-1), state["shape"]
            values = parts["quant_map"].read()[np.stack([codes >> 4, codes & 15], 1).reshape(-1)][: math.prod(shape)]
            return (values * np.repeat(absmax, state["blocksize"])[: len(values)]).reshape(shape)

        _replaced(tensors, module, (), list(state["shape"]), read)
    for module in _modules(tensors, "SCB"):
        weight, scale = tensors[module + "weight"], tensors[module + "SCB"]
        tensors.pop(module + "weight_format", None)
        _replaced(
            tensors,
            module,
            ("SCB",),
            weight.shape,
            lambda w=weight, s=scale: w.read().astype(np.float32) * (s.read()[:, None] / np.float32(127)),
        )


METHODS = {  # quant_method: (what is read of it, the function that replaces its tensors)
    "gptq": ("2, 3, 4 and 8 bits, v1 and v2", _gptq),
    "awq": ("4 bits, version gemm", _awq),
    "compressed-tensors": (", ".join(_COMPRESSED), _compressed_tensors),
    "fp8": ("e4m3 by blocks, channels or tensors", _fp8),
    "fbgemm_fp8": ("e4m3 by channels", _fp8),
    "bitsandbytes": ("nf4, fp4, int8", _bitsandbytes),
}


def float_tensors(tensors: Tensors, config: dict, path: Path) -> Tensors:
    """A quantized folder's tensors as those of a float model; config: its quantization_config, of METHODS."""
    result, method = dict(tensors), config["quant_method"]
    METHODS[method][1](result, config, Path(path))
    if result.keys() == tensors.keys() and not any(result[name] is not tensors[name] for name in result):
        raise UserError(f"{path}: quantization_config says {method}, but no tensor is quantized")
    return result
