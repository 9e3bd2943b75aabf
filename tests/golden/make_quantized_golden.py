"""Makes quantized_folders.npz: a linear's tensors as other tools store them, and the weight that they read from these.

python make_quantized_golden.py       # in a Python with torch, vllm, compressed-tensors 0.17 and bitsandbytes 0.49
"""

from pathlib import Path

import bitsandbytes.functional as B
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from vllm.model_executor.layers.quantization.utils import quant_utils as Q

torch.manual_seed(0)
OUT, IN = 48, 96
weight = torch.randn(OUT, IN) * torch.rand(OUT, 1)
arrays = {}


def keep(case, tensors, expected):
    for name, tensor in tensors.items():
        tensor = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        arrays[f"{case}|{name}"] = tensor.numpy()
    arrays[f"{case}|expected"] = expected.float().numpy()


def compressed(case, format, bits, group=None, symmetric=True, kind="int", actorder=False):
    strategy = "channel" if group is None else "group"
    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, group_size=group, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    grouped = weight.reshape(OUT, -1, group or IN)
    top = 448.0 if kind == "float" else 2 ** (bits - 1) - 1
    state, zero = {"weight": weight}, None
    if symmetric:
        state["weight_scale"] = grouped.abs().amax(2) / top
    else:
        low, high = grouped.amin(2), grouped.amax(2)
        state["weight_scale"] = (high - low) / (2**bits - 1)
        zero = (-low / state["weight_scale"]).round() - 2 ** (bits - 1)
        state["weight_zero_point"] = zero.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    compressor = BaseCompressor.load_from_registry(format) if hasattr(BaseCompressor, "load_from_registry") else None
    cls = compressor or BaseCompressor.get_value_from_registry(format)
    saved = cls.compress(state, scheme)
    keep(case, saved, cls.decompress(saved, scheme)["weight"])


compressed("ct_w4_group", "pack-quantized", 4, 32)
compressed("ct_w4_zero", "pack-quantized", 4, 32, symmetric=False)
compressed("ct_w8_pack", "pack-quantized", 8)
compressed("ct_int8", "int-quantized", 8)
compressed("ct_fp8", "float-quantized", 8, kind="float")

for case, pack in (("gptq_v2", Q.gptq_pack), ("awq", Q.awq_pack)):
    codes, zeros = torch.randint(0, 16, (IN, OUT), dtype=torch.int32), torch.randint(0, 16, (3, OUT), dtype=torch.int32)
    scales = torch.rand(3, OUT).half()
    expected = ((codes - zeros.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)).T
    packed_zeros = Q.awq_pack(zeros, 4, 3, OUT) if case == "awq" else Q.pack_cols(zeros, 4, 3, OUT)
    keep(case, {"qweight": pack(codes, 4, IN, OUT), "qzeros": packed_zeros, "scales": scales}, expected)

for kind in ("nf4", "fp4"):
    # Rows of whole blocks: bitsandbytes' CPU kernel takes other scales for others.
    options = {"blocksize": 64, "quant_type": kind, "compress_statistics": kind == "nf4"}
    packed, state = B.quantize_4bit(weight.reshape(36, 128), **options)
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    keep(f"bnb_{kind}", {"weight": packed, **tensors}, B.dequantize_4bit(packed, state))
rows, scale, _ = B.int8_vectorwise_quant(weight.half())
keep("bnb_int8", {"weight": rows, "SCB": scale}, B.int8_vectorwise_dequant(rows, scale))

scale = torch.rand(2, 2) + 0.5
fp8 = (weight / scale.repeat_interleave(32, 0)[:OUT].repeat_interleave(64, 1)[:, :IN]).to(torch.float8_e4m3fn)
full = scale.repeat_interleave(32, 0)[:OUT].repeat_interleave(64, 1)[:, :IN]
keep("fp8_block", {"weight": fp8, "weight_scale_inv": scale}, fp8.float() * full)
keep(
    "fp8_values",
    {"weight": torch.arange(256, dtype=torch.uint8)},
    torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
)
np.savez_compressed(Path(__file__).parent / "quantized_folders.npz", **arrays)
