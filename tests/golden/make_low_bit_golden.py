"""Makes low_bit.npz: weights as bitsandbytes rounds them to nf4 and fp4, with and without double quantization.

python make_low_bit_golden.py       # in a Python with torch and bitsandbytes (0.49)
"""

from pathlib import Path

import bitsandbytes.functional as B
import numpy as np
import torch

rng = np.random.default_rng(0)
weight = (rng.standard_normal((8, 640)) * rng.lognormal(0, 1, (8, 1))).astype(np.float32)
weight[2, :64] = 0
arrays = {"weight": weight, "dynamic_map": B.create_dynamic_map().numpy()}
for algo in ("nf4", "fp4"):
    for blocksize in (64,) if algo == "fp4" else (64, 128):
        for double in (False, True):
            packed, state = B.quantize_4bit(
                torch.from_numpy(weight), blocksize=blocksize, quant_type=algo, compress_statistics=double
            )
            name = f"{algo}_{blocksize}_{'double' if double else 'plain'}"
            arrays[f"{name}_codes"] = packed.numpy().ravel()
            arrays[f"{name}_absmax"] = state.absmax.numpy()
            if double:
                arrays[f"{name}_absmax_scales"] = state.state2.absmax.numpy()
                arrays[f"{name}_absmax_mean"] = state.offset.numpy().reshape(1)
            arrays[f"{name}_values"] = B.dequantize_4bit(packed, state).numpy()[:2]
np.savez_compressed(Path(__file__).parent / "low_bit.npz", **arrays)
