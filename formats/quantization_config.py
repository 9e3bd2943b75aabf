"""quantization_config of config.json: which models keep their integers, and which are opened as floats."""

import re

QUANTIZATIONS = {  # quant_method: the keys of quantization_config that it needs, with the supported values
    "gptq": {"bits": (4, 8), "checkpoint_format": ("gptq", None), "desc_act": (True, False), "sym": (True, False)},
    "a8w8": {"bits": (8,), "activation": ("per_token", "per_tensor", "mixed")},
    "weight_only_fp8": {"bits": (8,)},
    "a8w8_fp8": {"bits": (8,), "activation": ("per_token", "per_tensor")},
}
DEQUANTIZED = {  # quant_method of what formats/dequantize.py opens as floats: {key: what it may be, the default first}
    "gptq": {"bits": (4, 2, 3, 8), "checkpoint_format": ("gptq", "gptq_v2", None)},
    "awq": {"bits": (4, None), "version": ("gemm", "GEMM", None)},
    "compressed-tensors": {},
    "fp8": {"fmt": ("e4m3", None)},
    "fbgemm_fp8": {},
    "bitsandbytes": {},
}
KEYS = ("quantization_config", "compression_config")  # of config.json; the second is older compressed-tensors'


def runs_as_integers(quantization: dict) -> bool:
    """Whether a GPTQ model keeps its integers: a QuantLinear for every linear of the blocks, and for no other, but for
    those that modules_to_not_convert names; what leave_out() adds says the same of these."""
    known, dynamic = QUANTIZATIONS["gptq"], dict(quantization.get("dynamic") or {})
    is_ours = dynamic.pop(_skip_pattern(quantization.get("modules_to_not_convert") or []), None) is not None
    if quantization.get("lm_head") or quantization.get("modules_in_block_to_quantize") and not is_ours:
        return False
    of_bits = [{"bits": quantization.get("bits")}, *dynamic.values()]
    return (
        quantization.get("checkpoint_format") in known["checkpoint_format"]
        and all(pattern[:2] == "+:" for pattern in dynamic)
        and all(values.keys() == {"bits"} and values["bits"] in known["bits"] for values in of_bits)
    )


def leave_out(skipped: list[str], quantized: list[str]) -> dict:
    """Keys of quantization_config for linears that stay floats, as GPTQModel and vLLM read them (dynamic) and as
    transformers does (modules_in_block_to_quantize, ends of names); quantized: all others of the blocks."""
    ends = [list(dict.fromkeys(re.sub(r".*?\.\d+\.", "", path, count=1) for path in p)) for p in (quantized, skipped)]
    uniform = not {*ends[0]} & {*ends[1]}
    return {
        "dynamic": {_skip_pattern(skipped): {}},
        "modules_in_block_to_quantize": [ends[0] if uniform else quantized],
    }


def _skip_pattern(skipped: list[str]) -> str:
    return f"-:^({'|'.join(map(re.escape, with_fused(skipped)))})$"


def with_fused(names: list[str]) -> list[str]:
    """Names of linears, and of those that an engine makes of q, k, v, or of gate and up, where all parts are there."""
    fused = {"v_proj": (("q_proj", "k_proj"), "qkv_proj"), "up_proj": (("gate_proj",), "gate_up_proj")}
    added = []
    for name in names:
        stem, _, last = name.rpartition(".")
        others, whole = fused.get(last, ((), ""))
        if whole and all(f"{stem}.{other}" in names for other in others):
            added.append(f"{stem}.{whole}")
    return [*names, *added]


def bits_of(quantization: dict, module: str) -> int:
    """Bits of a module (Hugging Face's path): GPTQModel's `dynamic` may say others for those that a pattern matches."""
    for pattern, values in (quantization.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and "bits" in values and re.match(pattern.removeprefix("+:"), module):
            return values["bits"]
    return quantization.get("bits", quantization.get("w_bit"))


def scheme_of(quantization: dict, module: str) -> str:
    """The scheme of the QuantLinear that a module of a model with these integers is."""
    method = quantization["quant_method"]
    return f"w{bits_of(quantization, module)}" if method == "gptq" else method.removeprefix("weight_only_")


def all_bits(quantization: dict) -> list[int]:
    """The bits that modules of a GPTQ model may have, the least first."""
    others = (values["bits"] for values in (quantization.get("dynamic") or {}).values() if "bits" in values)
    return sorted({quantization["bits"], *others})


def read_quantization(source: dict) -> tuple[dict | None, str | None]:
    """(quantization_config of a model that keeps its integers, else None; what is wrong with it, else None)."""
    quantization = source.get(KEYS[0]) or source.get(KEYS[1])
    if quantization is None:
        return None, None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in (*QUANTIZATIONS, *DEQUANTIZED):
        known = ", ".join(dict.fromkeys((*QUANTIZATIONS, *DEQUANTIZED)))
        return None, f"quant_method {method!r} cannot be read; readable are {known}"
    is_float = method in DEQUANTIZED and not (method == "gptq" and runs_as_integers(quantization))
    for key, allowed in (DEQUANTIZED if is_float else QUANTIZATIONS)[method].items():
        if quantization.get(key, allowed[0] if is_float else None) not in allowed:
            choices = ", ".join(str(a) for a in allowed if a is not None)
            return None, f"quantization_config: {key} = {quantization.get(key)!r}; readable are {choices}"
    group = quantization.get("group_size", -1)
    if not is_float and not isinstance(group, int) or group in (0,) or isinstance(group, int) and group < -1:
        return None, f"quantization_config: group_size = {group!r}; it must be -1 or positive"
    return None if is_float else quantization, None
