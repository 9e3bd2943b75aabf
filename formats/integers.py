"""Other programs' integers as those of a QuantLinear, so that a model runs on them: AWQ folders, GGUF's Q8_0 and Q4_0.

    quantization = quantization_of(tensors, source, linears)       # in GPTQ's words; None: the integers do not fit
    tensors = integer_tensors(tensors, source, quantization, linears)

They fit where every linear of the blocks, and no other, has codes of one width with a scale and a whole zero point a
group. Codes are only moved, so the weights are the same to the bit. Q4_1 and the k-quants have a least value (or scales
of scales) in place of a zero point: they are opened as floats.
"""

from collections.abc import Callable, Iterable

from kernels.rounding import group_numbers, pack_rows, pack_zeros

import numpy as np

from formats.dequantize import Tensors, awq_columns
from formats.gguf import Piece
from formats.tensor_files import StoredTensor

GGUF_BITS = {"Q8_0": 8, "Q4_0": 4}
SCHEME = {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "lm_head": False}


def quantization_of(tensors: Tensors, source: dict | None, linears: Iterable[str]) -> dict | None:
    """quantization_config of a model that keeps these integers; None: it is opened as floats.

    source: quantization_config of the folder's config.json. linears: Hugging Face's paths of those of the blocks.
    """
    linears = list(linears)
    if source is not None:
        if source.get("quant_method") != "awq" or source.get("bits", source.get("w_bit", 4)) != 4:
            return None
        packed = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
        if packed != {*linears}:
            return None
        sizes = {tensors[f"{x}.qweight"].shape[0] / tensors[f"{x}.scales"].shape[0] for x in linears}
        size = sizes.pop()
        fits = not sizes and size == int(size)
        return {**SCHEME, "bits": 4, "group_size": int(size), "sym": False} if fits else None
    pieces = [getattr(tensors.get(f"{x}.weight"), "read", None) for x in linears]
    types = {piece.tensor.type if isinstance(piece, Piece) else None for piece in pieces}
    bits = GGUF_BITS.get(types.pop()) if len(types) == 1 else None
    if bits is None or any(tensors[f"{x}.weight"].shape[0] % (32 // bits) for x in linears):
        return None
    return {**SCHEME, "bits": bits, "group_size": 32, "sym": True}


def integer_tensors(tensors: Tensors, source: dict | None, quantization: dict, linears: Iterable[str]) -> Tensors:
    """The tensors with qweight, scales, qzeros and g_idx of each linear in place of what the folder has."""
    result, bits, size = dict(tensors), quantization["bits"], quantization["group_size"]
    for path in linears:
        if source is not None:
            parts = [result.pop(f"{path}.{kind}") for kind in ("qweight", "qzeros", "scales")]
            n_in, n_out = parts[0].shape[0], parts[2].shape[1]
            functions = _awq(*(part.read for part in parts))
        else:
            weight = result.pop(f"{path}.weight")
            n_out, n_in = weight.shape
            functions = _gguf(weight.read, bits, [n_in // size, n_out])
        groups = n_in // size
        shapes = [n_in * bits // 32, n_out], [groups, n_out * bits // 32], [groups, n_out]
        for kind, function, shape in zip(("qweight", "qzeros", "scales"), functions, shapes):
            result[f"{path}.{kind}"] = StoredTensor(function, shape)
        result[f"{path}.g_idx"] = StoredTensor(lambda n_in=n_in: group_numbers(n_in, size), [n_in])
    return result


def _awq(qweight: Callable, qzeros: Callable, scales: Callable) -> tuple[Callable, Callable, Callable]:
    """Functions that read qweight, qzeros and scales of an AWQ linear in a QuantLinear's layout."""
    return (
        lambda: pack_rows(awq_columns(qweight()), 4),
        lambda: pack_zeros(awq_columns(qzeros()).astype(np.int32), 4),
        scales,
    )


def _gguf(piece: Piece, bits: int, shape: list[int]) -> tuple[Callable, Callable, Callable]:
    """The same of a tensor (out, in) of a GGUF file; shape: (groups, out)."""
    return (
        lambda: pack_rows(np.ascontiguousarray(piece.integers()[0].T), bits),
        lambda: pack_zeros(np.full(shape, 1 << bits - 1, np.int32), bits),
        lambda: np.ascontiguousarray(piece.integers()[1].T),
    )
