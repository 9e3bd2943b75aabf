"""Makes gguf_blocks.npz: blocks of every GGUF type with what gguf-py reads in them, and llama.cpp's own rounding.

python make_gguf_golden.py LIBGGML_BASE.so       # in a Python with gguf; the library is in llama-cpp-python
"""

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np

DECODED = """Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS""".split()
ENCODED = """Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q6_K""".split()
rng, arrays = np.random.default_rng(0), {}
for name in DECODED:
    kind = gguf.GGMLQuantizationType[name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (512 // weights, size), dtype=np.uint8)
    scales = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}.get(name, [0])  # bytes of float16 scales
    scales += [2] if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else []
    for at in scales:
        half = rng.standard_normal(len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = half.view(np.uint8).reshape(-1, 2)
    arrays[f"{name}_blocks"] = blocks
    arrays[f"{name}_values"] = gguf.quants.dequantize(blocks.reshape(1, -1), kind).reshape(-1)
x = (rng.standard_normal((4, 512)) * rng.lognormal(0, 1, (4, 1))).astype(np.float32)
x[1, :40], x[2] = 0, np.abs(x[2])
arrays["x"] = x
library = ctypes.CDLL(sys.argv[1])
quantize = library.ggml_quantize_chunk
quantize.restype = ctypes.c_size_t
quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
for name in ENCODED:
    kind = gguf.GGMLQuantizationType[name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros(x.size // weights * size, np.uint8)
    quantize(kind.value, x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    arrays[f"{name}_encoded"] = out
np.savez_compressed(Path(__file__).parent / "gguf_blocks.npz", **arrays)
