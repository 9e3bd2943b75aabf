"""One decoder, the weight names of its families, LoRA and prefix tuning, and a naive generate().

    model = from_pretrained("path/to/llama")            # any Hugging Face folder of a family listed in FAMILIES
    logits = model(input_ids)                            # (B, T) int64 -> (B, T, V)
    losses = model(input_ids, labels=labels)             # (B, T) float32 per token, without ever holding the logits
    save_pretrained(model, "out")                        # Hugging Face layout again

Architecture: pre-norm RMSNorm · rotary positions in the half-split layout, with linear, dynamic, yarn and llama3 scaling ·
grouped-query attention that takes FlashMask rows · SwiGLU · tied or own head · biases where the config says so.

This file knows nothing of topology or hardware: it reshapes with -1 and calls kernels.*. Labels come already shifted.

Letters: B batch, T sequence, D model width, H query heads, K key/value heads, Dh head dim, F feed-forward width,
V vocabulary, L layers, P prefix tokens, R LoRA rank.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

import kernels
from data import UserError

# ================================================================================================ config


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    family: str  # a key of FAMILIES
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # Dh
    rms_norm_eps: float
    max_position_embeddings: int
    rope: dict  # {"rope_type", "rope_theta", and what that type needs}
    attention_bias: bool  # on q, k, v and o
    mlp_bias: bool  # on gate, up and down
    tie_word_embeddings: bool
    initializer_range: float
    quantization: dict | None  # how the linears of the blocks are held as integers: see QUANTIZATIONS; None: floats
    source: dict  # config.json as read: what it says beyond the above is written back unchanged

    @staticmethod
    def from_json(path):
        """config.json of transformers 4 (rope_theta, rope_scaling, torch_dtype) or 5 (rope_parameters, dtype)."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{path}: no such file; a model is a Hugging Face folder with config.json and its weights")
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        if not isinstance(source, dict):
            raise UserError(f"{path}: must hold a JSON object, found {type(source).__name__}")
        return ModelConfig.from_dict(source, path)

    @staticmethod
    def from_dict(source, path="config"):
        family = source.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"{path}: model_type {family!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
            )
        for key, (plain, why) in CHANGES_THE_MATHS.items():
            if source.get(key, plain) not in (plain, None):
                raise UserError(f"{path}: {key} = {source[key]!r} is not supported: {why}")

        def need(key):
            if not isinstance(source.get(key), int) or source[key] <= 0:
                raise UserError(f"{path}: {key} must be a positive integer, found {source.get(key)!r}")
            return source[key]

        for key, kind in (("num_key_value_heads", int), ("head_dim", int), ("max_position_embeddings", int),
                          ("rms_norm_eps", (int, float)), ("initializer_range", (int, float))):  # fmt: skip
            if source.get(key) is not None and (not isinstance(source[key], kind) or source[key] < 0):
                raise UserError(f"{path}: {key} must be a positive number, found {source[key]!r}")
        D, H = need("hidden_size"), need("num_attention_heads")
        K = source.get("num_key_value_heads") or H
        head_dim = source.get("head_dim") or D // H
        if H % K or head_dim % 2 or (source.get("head_dim") is None and D % H):
            raise UserError(
                f"{path}: {H} heads over {K} key/value heads and hidden_size {D} do not divide (head_dim {head_dim})"
            )
        return ModelConfig(
            family=family,
            vocab_size=need("vocab_size"),
            hidden_size=D,
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=H,
            num_key_value_heads=K,
            head_dim=head_dim,
            rms_norm_eps=float(source.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(source.get("max_position_embeddings", 2048)),
            rope=_rope_parameters(source, path),
            attention_bias=bool(source.get("attention_bias", False)),
            mlp_bias=bool(source.get("mlp_bias", False)),
            tie_word_embeddings=bool(source.get("tie_word_embeddings", FAMILIES[family].tied_by_default)),
            initializer_range=float(source.get("initializer_range", 0.02)),
            quantization=_quantization(source, path),
            source=source,
        )

    def to_json(self, dtype):
        """The text of config.json, in the dialect it was read in, with the dtype that the weights are saved in."""
        source = dict(self.source)
        source["dtype" if "rope_parameters" in source or "dtype" in source else "torch_dtype"] = dtype
        for key in ("vocab_size", "num_hidden_layers", "max_position_embeddings"):  # what a script may have changed
            source[key] = getattr(self, key)
        source.setdefault("architectures", [FAMILIES[self.family].architecture])
        source.pop("quantization_config", None)
        if self.quantization is not None:
            source["quantization_config"] = self.quantization
        return json.dumps(source, indent=2, ensure_ascii=False) + "\n"


@dataclasses.dataclass(frozen=True)
class Family:
    architecture: str  # what transformers calls the class
    tied_by_default: bool  # tie_word_embeddings when config.json is silent
    names: tuple  # rows (our name, Hugging Face name, transposed); {i} is the layer
    lora_targets: tuple  # our names of every linear of the block


_LLAMA_NAMES = (
    ("embed_tokens.weight", "model.embed_tokens.weight", False),
    ("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight", False),
    ("layers.{i}.attention_norm.bias", "model.layers.{i}.input_layernorm.bias", False),
    *(
        row
        for linear, theirs in (
            *((f"attention.{x}_proj", f"self_attn.{x}_proj") for x in "qkvo"),
            *((f"mlp.{x}_proj", f"mlp.{x}_proj") for x in ("gate", "up", "down")),
        )
        for row in (
            (f"layers.{{i}}.{linear}.weight", f"model.layers.{{i}}.{theirs}.weight", True),
            (f"layers.{{i}}.{linear}.bias", f"model.layers.{{i}}.{theirs}.bias", False),
        )
    ),
    ("layers.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", False),
    ("layers.{i}.mlp_norm.bias", "model.layers.{i}.post_attention_layernorm.bias", False),
    ("norm.weight", "model.norm.weight", False),
    ("lm_head.weight", "lm_head.weight", True),
)
_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", False, _LLAMA_NAMES, _LLAMA_TARGETS),
    "mistral": Family("MistralForCausalLM", False, _LLAMA_NAMES, _LLAMA_TARGETS),
}
IGNORED_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")  # in old checkpoints; recomputed from the config
CHANGES_THE_MATHS = {  # config.json key: (the value under which this decoder is right, why another is refused)
    "hidden_act": ("silu", "the MLP is SwiGLU"),
    "sliding_window": (None, "attention here has no window"),
    "partial_rotary_factor": (1.0, "the whole head is rotated"),
}


QUANTIZATIONS = {  # quant_method: the keys of quantization_config that it needs, with the values that can be read
    "gptq": {"bits": (4, 8), "checkpoint_format": ("gptq", None), "desc_act": (True, False), "sym": (True, False)},
    "a8w8": {"bits": (8,), "activation": ("per_token", "per_tensor")},
}


def _quantization(source, path):
    """quantization_config, checked; None for a model of floats."""
    found = source.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method not in QUANTIZATIONS:
        raise UserError(f"{path}: quant_method {method!r} cannot be read; readable are {', '.join(QUANTIZATIONS)}")
    for key, allowed in QUANTIZATIONS[method].items():
        if found.get(key) not in allowed:
            choices = ", ".join(str(a) for a in allowed if a is not None)
            raise UserError(f"{path}: quantization_config: {key} = {found.get(key)!r}; readable are {choices}")
    group = found.get("group_size", -1)
    if not isinstance(group, int) or group == 0 or group < -1:
        raise UserError(f"{path}: quantization_config: group_size = {group!r}; it must be -1 or positive")
    for key in ("dynamic", "modules_in_block_to_quantize", "lm_head"):
        if found.get(key):
            raise UserError(
                f"{path}: quantization_config: {key} = {found[key]!r} is not supported: every linear of the blocks, and only these"
            )
    return found


def _rope_parameters(source, path):
    """{"rope_type", "rope_theta", …} from either dialect, checked."""
    rope = dict(source.get("rope_parameters") or source.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", source.get("rope_theta", 10000.0))
    needed = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if rope["rope_type"] not in needed:
        raise UserError(f"{path}: rope type {rope['rope_type']!r} is not supported; supported are {', '.join(needed)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{path}: partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported: the whole head is rotated"
        )
    for key in ("rope_theta", *needed[rope["rope_type"]]):
        if not isinstance(rope.get(key), (int, float)):
            raise UserError(f"{path}: rope type {rope['rope_type']} needs a number {key}, found {rope.get(key)!r}")
    return rope


# ====================================================================================== rotary positions


def rope_frequencies(config):
    """(Dh/2,) float32 angular frequencies, and the factor on cos and sin (only yarn's differs from 1).

    linear: Chen et al., arXiv 2306.15595. yarn: Peng et al., arXiv 2309.00071, Eq. 22-25. llama3: the rule that Meta
    published with Llama 3.1. dynamic is the default up to max_position_embeddings (see rope_tables).
    """
    rope, dim = config.rope, config.head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / dim
    frequency = (1.0 / np.float32(rope["rope_theta"]) ** exponent).astype(np.float32)
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "linear":
        return frequency / np.float32(factor), 1.0
    if kind == "llama3":
        original = rope["original_max_position_embeddings"]
        wavelength = 2 * math.pi / frequency
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)  # 0: scaled wholly, 1: left alone
        return ((1 - smooth) * frequency / factor + smooth * frequency).astype(np.float32), 1.0
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings

        def dim_of(rotations):  # the dim whose frequency turns that often over the original context
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

        low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
        scaled = ramp * frequency / factor + (1 - ramp) * frequency

        def mscale(m):
            return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

        if rope.get("attention_factor") is not None:
            scale = rope["attention_factor"]
        elif rope.get("mscale") and rope.get("mscale_all_dim"):
            scale = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
        else:
            scale = mscale(1.0)
        return scaled.astype(np.float32), float(scale)
    return frequency, 1.0


def document_lengths(position_ids):
    """(B, T) int64 -> (B, T): for each token the last position of its own sample, plus one.

    A sample is a run of consecutive positions; packed rows restart at 0, a cached step is a run of one.
    """
    places = (position_ids * 0 + 1).cumsum(1)  # (B, T)
    starts = position_ids - places  # the same all along a run
    goes_on = paddle.concat([starts[:, 1:] == starts[:, :-1], starts[:, :1] != starts[:, :1]], axis=1)
    ends = paddle.where(goes_on, places + (1 << 40), places)
    ends = paddle.cummin(ends.flip(1), axis=1, dtype="int64")[0].flip(1)  # for each token the place of its run's last
    return starts + ends + 1


def rope_tables(config, position_ids):
    """cos and sin, each (B, T, 1, Dh) float32, for position_ids (B, T).

    dynamic: past max_position_embeddings the base grows with the length of the token's own sample, so that neither
    padding nor packing changes the result.
    """
    frequency, scale = rope_frequencies(config)
    frequency = kernels.to_tensor(frequency)  # (Dh/2,)
    if config.rope["rope_type"] == "dynamic":
        limit, factor, dim = config.max_position_embeddings, config.rope["factor"], config.head_dim
        length = paddle.clip(document_lengths(position_ids).astype("float32"), min=limit)
        growth = (factor * length / limit - (factor - 1)) ** (dim / (dim - 2))  # (B, T), 1 within the limit
        exponent = paddle.arange(0, dim, 2, dtype="float32") / dim
        frequency = frequency * growth.unsqueeze(-1) ** -exponent  # (B, T, Dh/2)
    angle = position_ids.unsqueeze(-1).astype("float32") * frequency
    angle = paddle.concat([angle, angle], axis=-1).unsqueeze(2)  # (B, T, 1, Dh)
    return paddle.cos(angle) * scale, paddle.sin(angle) * scale


# =============================================================================================== decoder


class Linear(nn.Layer):
    """y = x W + b (+ residual) with W (in, out), on kernels.linear."""

    def __init__(self, n_in, n_out, bias):
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        self.weight = self.create_parameter([n_in, n_out])
        self.bias = self.create_parameter([n_out], is_bias=True) if bias else None

    def forward(self, x, residual=None):
        return kernels.linear(x, self.weight, self.bias, residual)


class QuantLinear(nn.Layer):
    """y = x W + b with W (in, out) held as integers, on kernels.quant_linear, whose docstring has the layouts.

    scheme "w4" or "w8": weights alone, in groups of group_size input rows (-1: one group). scheme "a8w8": weights by
    output channel, activations rounded as well, by input_scale if static_input, else token by token.
    """

    def __init__(self, n_in, n_out, scheme, group_size=-1, bias=False, desc_act=False, static_input=False):
        super().__init__()
        self.n_in, self.n_out, self.scheme = n_in, n_out, scheme
        self.group_size = n_in if group_size == -1 else group_size
        tensors = {"qweight": ([n_in, n_out], "int8"), "scales": ([n_out], "float32")}
        if scheme == "a8w8":
            if static_input:
                tensors["input_scale"] = ([1], "float32")
        else:
            per_word, groups = 32 // int(scheme[1:]), -(-n_in // self.group_size)
            if n_in % per_word or n_out % per_word:
                raise UserError(
                    f"a linear of {n_in} x {n_out} cannot be packed to {scheme[1:]} bits: not multiples of {per_word}"
                )
            tensors = {"qweight": ([n_in // per_word, n_out], "int32"), "scales": ([groups, n_out], "float32"),
                       "qzeros": ([groups, n_out // per_word], "int32"), "g_index": ([n_in], "int32")}  # fmt: skip
        for name, (shape, dtype) in tensors.items():
            self.register_buffer(name, paddle.zeros(shape, dtype))
        for name in {"qzeros", "g_index", "input_scale"} - tensors.keys():
            setattr(self, name, None)
        if self.g_index is not None:
            self.g_index.set_value(paddle.arange(n_in, dtype="int32") // self.group_size)
        # Groups are runs of input rows, or all rows are one group: no look-up is needed.
        self.in_order = self.group_size >= n_in or not desc_act and n_in % self.group_size == 0
        self.bias = self.create_parameter([n_out], is_bias=True) if bias else None

    def _group_of_rows(self):
        return None if self.in_order else self.g_index

    def forward(self, x, residual=None):
        y = kernels.quant_linear(
            x, self.qweight, self.scales, self.bias, self.scheme, self.qzeros, self._group_of_rows(), self.input_scale
        )
        return y if residual is None else residual + y

    def dequantized(self):
        """(in, out) float32: the weight that the integers stand for."""
        if self.scheme == "a8w8":
            return self.qweight.astype("float32") * self.scales
        bits = int(self.scheme[1:])
        return kernels.dequantize(self.qweight, self.scales, bits, self.qzeros, self._group_of_rows())

    def check(self, path, name):
        """What was read must be what forward() takes it for."""
        if self.g_index is None:
            return
        groups, last = self.g_index.numpy(), self.scales.shape[0] - 1
        if groups.min() < 0 or groups.max() > last:
            raise UserError(f"{path}: {name}.g_idx names group {groups.max()}, {name}.scales has 0 to {last}")
        if self.in_order and not np.array_equal(groups, np.arange(self.n_in) // self.group_size):
            raise UserError(f"{path}: {name}.g_idx is not in order, but desc_act is false")


class RMSNorm(nn.Layer):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0))
        self.bias = None  # quantize.py's shift moves a constant out of the linears into it
        self.epsilon = epsilon

    def forward(self, x, residual=None):
        """The norm of x, or with a residual (the norm of h, h), h = x + residual."""
        found = kernels.rms_norm(x, self.weight, self.epsilon, residual)
        if self.bias is None:
            return found
        return found + self.bias if residual is None else (found[0] + self.bias, found[1])

    def add_bias(self):
        self.bias = self.create_parameter(self.weight.shape, is_bias=True)


class Cache:
    """Keys and values of the tokens so far, a pair (B, T, K, Dh) a layer, and the mask rows that they came with."""

    def __init__(self, layers):
        self.keys, self.values = [None] * layers, [None] * layers
        self.rows = None  # (B, 1, tokens, 1) int32, once any token had rows
        self.tokens = 0
        self.prefix_tokens = 0  # trained prefixes stand before position 0 of the text

    def extend_rows(self, rows, B, T):
        """Append the rows of T new tokens (None: visible to all); returns those of all keys, in rows of the whole."""
        past, self.tokens = self.tokens, self.tokens + T
        if rows is None and self.rows is None:
            return None
        never = np.iinfo(np.int32).max
        before = self.rows if self.rows is not None else paddle.full([B, 1, past, 1], never, "int32")
        new = rows.clip(max=never - past) + past if rows is not None else paddle.full([B, 1, T, 1], never, "int32")
        self.rows = paddle.concat([before, new], axis=2)
        return self.rows


class Attention(nn.Layer):
    def __init__(self, config):
        super().__init__()
        D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = Dh
        self.q_proj = Linear(D, H * Dh, config.attention_bias)
        self.k_proj = Linear(D, K * Dh, config.attention_bias)
        self.v_proj = Linear(D, K * Dh, config.attention_bias)
        self.o_proj = Linear(H * Dh, D, config.attention_bias)

    def forward(self, x, cos, sin, rows, past_k, past_v, attend=None):
        """x (B, T, D) -> (B, T, D), and all keys and values (B, past + T, K, Dh).

        attend: a function (q, k, v) -> (B, T, H, Dh) in place of kernels.attention, for a cache that keeps k and v itself.
        """
        q = kernels.rope(self.q_proj(x).reshape([0, 0, -1, self.head_dim]), cos, sin)  # (B, T, H/tp, Dh); 0 keeps a dim
        k = kernels.rope(self.k_proj(x).reshape([0, 0, -1, self.head_dim]), cos, sin)  # (B, T, K/tp, Dh)
        v = self.v_proj(x).reshape([0, 0, -1, self.head_dim])
        if attend is not None:
            return self.o_proj(attend(q, k, v).reshape([0, 0, -1])), None, None
        if past_k is not None:
            k, v = paddle.concat([past_k, k], axis=1), paddle.concat([past_v, v], axis=1)
        return self.o_proj(kernels.attention(q, k, v, rows).reshape([0, 0, -1])), k, v


class MLP(nn.Layer):
    def __init__(self, config):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, width, config.mlp_bias)
        self.up_proj = Linear(D, width, config.mlp_bias)
        self.down_proj = Linear(width, D, config.mlp_bias)

    def forward(self, x, residual=None):
        """x (B, T, D) -> (B, T, D), residual added if given."""
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)), residual)  # (B, T, F/tp) inside


class Block(nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, rows=None, past_k=None, past_v=None, attend=None):
        mixed, k, v = self.attention(self.attention_norm(x), cos, sin, rows, past_k, past_v, attend)
        y, x = self.mlp_norm(mixed, x)
        return self.mlp(y, residual=x), k, v

    def output(self, x, cos, sin, rows, past_k, past_v):
        """(B, T, D) alone: what is kept of a block whose activations are computed again in backward (arXiv 1604.06174)."""
        return self.forward(x, cos, sin, rows, past_k, past_v)[0]


class CausalLM(nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.LayerList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.prefix = None  # set by apply_prefix()
        self.recompute = False  # compute each block's activations again in backward instead of keeping them
        self.neftune_noise_alpha = 0.0  # training noise on the embeddings (Jain et al., arXiv 2310.05914)

    def new_cache(self, B):
        """An empty Cache for B sequences, or one that begins with the trained prefix."""
        cache = Cache(self.config.num_hidden_layers)
        if self.prefix is not None:
            self.prefix.fill(cache, B)
        return cache

    def forward(
        self,
        input_ids,
        position_ids=None,
        startend_row_indices=None,
        caches=None,
        labels=None,
        return_predictions=False,
    ):
        """input_ids (B, T) int64 -> logits (B, T, V), or with labels (B, T) -> losses (B, T) float32, 0 where -100.

        position_ids (B, T) default to 0…T-1 after what `caches` (a Cache, extended in place) holds; startend_row_indices
        (B, 1, T, 1) int32 are FlashMask rows. labels are already shifted: labels[t] is the target of position t.
        return_predictions: (losses, argmax ids (B, T) int64).
        """
        x = self.hidden_states(input_ids, position_ids, startend_row_indices, caches)
        tied = self.lm_head is None
        weight = self.embed_tokens.weight if tied else self.lm_head.weight
        if labels is None:
            return kernels.linear(x, weight.T if tied else weight)
        found = kernels.linear_cross_entropy(
            x.reshape([-1, x.shape[-1]]),
            weight,
            labels.flatten(),
            transpose_weight=tied,
            return_predictions=return_predictions,
        )
        return tuple(f.reshape(labels.shape) for f in found) if return_predictions else found.reshape(labels.shape)

    def hidden_states(self, input_ids, position_ids=None, rows=None, caches=None):
        """(B, T, D) after the final norm; arguments as in forward.

        caches may also be any object with attend(layer, q, k, v) -> (B, T, H, Dh) and prefix_tokens, which then keeps
        keys and values itself (serve.py's pool of blocks); position_ids must be given with it.
        """
        B, T = input_ids.shape
        paged = caches is not None and not isinstance(caches, Cache)
        assert not paged or position_ids is not None, "a paged cache does not know the positions"
        if caches is None and self.prefix is not None:
            caches = self.new_cache(B)
        past = 0 if caches is None or paged else caches.tokens
        before = 0 if caches is None else caches.prefix_tokens
        if position_ids is None:
            position_ids = (paddle.arange(T) + past - before).unsqueeze(0).expand([B, T])
        if caches is not None and not paged:
            rows = caches.extend_rows(rows, B, T)
        x = kernels.embedding(input_ids, self.embed_tokens.weight)
        if self.training and self.neftune_noise_alpha:
            size = paddle.sqrt(document_lengths(position_ids).astype("float32") * x.shape[-1]).unsqueeze(
                -1
            )  # (B, T, 1)
            x = x + paddle.uniform(x.shape, x.dtype, -1.0, 1.0) * (self.neftune_noise_alpha / size).astype(x.dtype)
        if self.recompute and self.training and x.stop_gradient:
            x.stop_gradient = False  # Paddle's recompute passes gradients to adapters only where an input has one
        cos, sin = rope_tables(self.config, position_ids + before)
        for i, block in enumerate(self.layers):
            if paged:
                x, _, _ = block(x, cos, sin, attend=functools.partial(caches.attend, i))
                continue
            past = (None, None) if caches is None else (caches.keys[i], caches.values[i])
            if self.recompute and self.training:
                x = paddle.distributed.fleet.utils.recompute(block.output, x, cos, sin, rows, *past)
            else:
                x, k, v = block(x, cos, sin, rows, *past)
                if caches is not None:
                    caches.keys[i], caches.values[i] = k, v
        return self.norm(x)

    def num_parameters(self):
        return sum(int(np.prod(p.shape)) for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations of one token's forward and backward in a causal sequence of T (arXiv 2204.02311, B).

        6 per weight of every linear (the head too; embedding look-ups are free), and 12 · H · Dh · T/2 a layer for attention.
        """
        c = self.config
        block = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
        block += 3 * c.hidden_size * c.intermediate_size
        linears = c.num_hidden_layers * block + c.hidden_size * c.vocab_size
        return 6.0 * linears + 6.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T


# ============================================================================== tensor files on disk

_SAFETENSORS = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F64": "<f8",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "<i1",
    "U8": "<u1",
}


def from_bfloat16(bits):
    """uint16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(array):
    """float32 -> uint16 bits, to nearest even (NaN stays NaN)."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def safetensors_header(path):
    """{name: (dtype, shape, first byte, last byte)} of a file, checked against its length."""
    path, size = Path(path), os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(f"{path}: not a complete safetensors file: {size} bytes, its header should take {length}")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: the safetensors header is damaged") from None
    base = 8 + length
    try:
        header.pop("__metadata__", None)
        entries = {
            n: (e["dtype"], e["shape"], base + e["data_offsets"][0], base + e["data_offsets"][1])
            for n, e in header.items()
        }
        counts = {n: math.prod(shape) for n, (_, shape, _, _) in entries.items()}
    except (AttributeError, TypeError, KeyError, IndexError):
        raise UserError(f"{path}: the safetensors header is damaged") from None
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in _SAFETENSORS:
            raise UserError(f"{path}: tensor {name} has dtype {dtype}; readable are {', '.join(_SAFETENSORS)}")
        if end > size:
            raise UserError(f"{path}: truncated: tensor {name} ends at byte {end}, the file has {size}")
        if begin < base or end - begin != counts[name] * np.dtype(_SAFETENSORS[dtype]).itemsize:
            raise UserError(
                f"{path}: the safetensors header is damaged: tensor {name}, {dtype} of shape {shape}, has {end - begin} bytes"
            )
    return entries


def read_tensor(path, entry):
    """One tensor of a safetensors file as numpy; float16 and bfloat16 become float32.

    Read, not mapped: a mapped file would count as memory of this process.
    """
    dtype, shape, begin, end = entry
    array = np.fromfile(
        path, _SAFETENSORS[dtype], (end - begin) // np.dtype(_SAFETENSORS[dtype]).itemsize, offset=begin
    )
    if dtype == "BF16":
        array = from_bfloat16(array)
    elif dtype == "F16":
        array = array.astype(np.float32)
    return array.reshape(shape)


def read_safetensors(path):
    """All of {name: array}."""
    return {name: read_tensor(path, entry) for name, entry in safetensors_header(path).items()}


def write_safetensors(path, tensors, metadata=None):
    """Write {name: array, or a function that returns it} to `path`, atomically, one tensor in memory at a time.

    With functions, the value is (function, shape, dtype); "bfloat16" and "float16" convert what the function returns.
    """
    names = {np.dtype(v): k for k, v in _SAFETENSORS.items() if k != "BF16"}
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, value in tensors.items():
        shape, kind = value[1:] if isinstance(value, tuple) else (value.shape, value.dtype)
        code = "BF16" if kind == "bfloat16" else names[np.dtype(kind)]
        size = int(np.prod(shape)) * np.dtype(_SAFETENSORS[code]).itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with atomic_file(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, value in tensors.items():
            array = value[0]() if isinstance(value, tuple) else value
            if header[name]["dtype"] == "BF16":
                array = to_bfloat16(array)
            file.write(np.ascontiguousarray(array, _SAFETENSORS[header[name]["dtype"]]).data)


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """A file that is complete or not there: written under a temporary name, synced, renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_BinTensor = namedtuple("_BinTensor", "storage where offset size stride")


class _TensorUnpickler(pickle.Unpickler):
    """Reads the pickle inside a torch .bin file: tensors in dicts and lists. Any other object is refused, none is run."""

    storages = {"FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2", "DoubleStorage": "<f8",
                "LongStorage": "<i8", "IntStorage": "<i4", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?"}  # fmt: skip

    def __init__(self, file, path):
        super().__init__(file)
        self.path = path

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _BinTensor(*storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in self.storages:
            return name
        raise UserError(f"{self.path}: refused: the pickle asks for {module}.{name}; only tensors are read")

    def persistent_load(self, key):
        kind, storage, where = key[:3]
        assert kind == "storage"
        return storage, where


class BinFile:
    """pytorch_model.bin (the zip format of torch >= 1.6): names known at once, tensors read one at a time."""

    def __init__(self, path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
            pickles = [n for n in self.zip.namelist() if n.endswith("data.pkl")]
        except zipfile.BadZipFile:
            raise UserError(
                f"{path}: not a torch zip file, or a truncated one; save it again with torch >= 1.6"
            ) from None
        if len(pickles) != 1:
            raise UserError(f"{path}: no data.pkl inside; not a torch checkpoint")
        self.folder = pickles[0][: -len("data.pkl")]
        with self.zip.open(pickles[0]) as file:
            try:
                loaded = _TensorUnpickler(file, path).load()
            except (
                pickle.UnpicklingError,
                EOFError,
                AssertionError,
                AttributeError,
                TypeError,
                IndexError,
                KeyError,
            ) as error:
                raise UserError(f"{path}: refused: not a plain dict of tensors ({type(error).__name__})") from None
        entries = dict(loaded) if isinstance(loaded, dict) else None
        if entries is None or not all(isinstance(v, _BinTensor) for v in entries.values()):
            raise UserError(f"{path}: refused: not a plain dict of tensors")
        self.entries = entries

    def read(self, name):
        storage, where, offset, size, stride = self.entries[name]
        try:
            dtype = np.dtype(_TensorUnpickler.storages[storage])
            flat = np.frombuffer(self.zip.read(f"{self.folder}data/{where}"), dtype)
        except (KeyError, ValueError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{self.path}: the storage of tensor {name} is missing or damaged") from None
        strides = [s * dtype.itemsize for s in stride]
        reach = offset + sum((n - 1) * s for n, s in zip(size, stride)) + 1
        if min((offset, *size, *stride)) < 0 or 0 not in size and reach > len(flat):
            raise UserError(f"{self.path}: tensor {name} reaches past its storage")
        array = np.lib.stride_tricks.as_strided(flat[offset:], size, strides)
        if storage == "BFloat16Storage":
            return from_bfloat16(array)
        return array.astype(np.float32) if storage == "HalfStorage" else array.copy()


# ================================================================================= weights by their names


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter under the name that Hugging Face (or PEFT) gives it, and how its layout differs from ours."""

    name: str
    parameter: paddle.Tensor
    transposed: bool  # theirs is [out, in], ours [in, out]
    stored: str | None = None  # dtype on disk; None: the one that the folder is saved in

    def to_numpy(self, tensor=None):
        """The parameter, or a tensor of its shape (a moment, a gradient), as numpy in their layout; bfloat16 as float32."""
        tensor = self.parameter if tensor is None else tensor
        if not isinstance(tensor, np.ndarray):
            tensor = (tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor).numpy()
        return tensor.T if self.transposed else tensor

    def from_numpy(self, array):
        """Their layout -> ours."""
        return np.ascontiguousarray(array.T) if self.transposed else array

    @property
    def shape(self):
        """Their shape."""
        return list(self.parameter.shape)[::-1] if self.transposed else list(self.parameter.shape)


# The tensors of a QuantLinear: our name, theirs, dtype on disk. (int8 weights lie as [out, in] there, packed ones as here.)
_QUANTIZED = (("qweight", "qweight", None), ("scales", "scales", None), ("qzeros", "qzeros", "int32"),
              ("g_index", "g_idx", "int32"), ("input_scale", "input_scale", "float32"))  # fmt: skip


def base_weights(model):
    """[Weight] of the base model in the order of its name table; adapters and prefix are not among them."""
    found = {name.replace(".base.", "."): p for name, p in (*model.named_parameters(), *model.named_buffers())}
    weights = []
    for ours, theirs, transposed in FAMILIES[model.config.family].names:
        for i in range(model.config.num_hidden_layers) if "{i}" in ours else (0,):
            path, name = ours.format(i=i), theirs.format(i=i)
            if (parameter := found.get(path)) is not None:
                weights.append(Weight(name, parameter, transposed))
            elif path.removesuffix("weight") + "qweight" in found:
                weights += _quantized_weights(found, path.removesuffix("weight"), name.removesuffix("weight"))
    return weights


def _quantized_weights(found, ours, theirs):
    packed = found[ours + "qweight"].dtype == paddle.int32
    dtypes = {"qweight": "int32" if packed else "int8", "scales": "float16" if packed else "float32"}
    return [Weight(theirs + their_name, found[ours + name], name == "qweight" and not packed, dtype or dtypes[name])
            for name, their_name, dtype in _QUANTIZED if found.get(ours + name) is not None]  # fmt: skip


def trainable_weights(model):
    """[Weight] of all that has a gradient: PEFT's names for adapters and prefix, Hugging Face's for the rest."""
    if (quantization := model.config.quantization) is not None:
        if quantization["quant_method"] == "a8w8":
            raise UserError(
                "the model is quantized to a8w8: rounded activations have no gradient; train the float model"
            )
        if not lora_layers(model) and model.prefix is None:
            raise UserError(
                "the model is quantized: its weights are integers; train LoRA or a prefix, or the float model"
            )
    return [w for w in base_weights(model) + adapter_weights(model) if not w.parameter.stop_gradient]


def halve_frozen(model):
    """Keep frozen weights of linears, the head's too, in bfloat16 alone: products in bfloat16 round them so anyway."""
    for layer in model.sublayers():
        if isinstance(layer, Linear) and layer.weight.stop_gradient and layer.weight.dtype == paddle.float32:
            with paddle.LazyGuard():  # no memory until it is set
                half = layer.create_parameter([layer.n_in, layer.n_out], dtype="bfloat16")
            half.set_value(layer.weight.astype("bfloat16"))
            half.stop_gradient = True
            layer.weight = half


def init_weights(model, seed):
    """Normal(0, initializer_range) for matrices, 1 for norms, 0 for biases; each from its own (seed, name) alone."""
    for weight in base_weights(model):
        if len(weight.shape) == 2:
            generator = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
            array = generator.standard_normal(weight.shape, np.float32) * np.float32(model.config.initializer_range)
        else:
            array = np.full(weight.shape, 0.0 if weight.name.endswith("bias") else 1.0, np.float32)
        set_parameter(weight.parameter, weight.from_numpy(array))


def build(config, dtype="float32"):
    """A CausalLM whose parameters take no memory until each is set."""
    before = paddle.get_default_dtype()
    try:
        paddle.set_default_dtype(dtype)
        with paddle.LazyGuard():
            model = CausalLM(config)
            if config.quantization is not None:
                _make_room_for_integers(model, config.quantization)
            return model
    finally:
        paddle.set_default_dtype(before)


def _make_room_for_integers(model, quantization):
    """Linears of the blocks become QuantLinear; after a shift, norms have biases and so have the linears they feed."""
    weights_alone, shift = quantization["quant_method"] == "gptq", quantization.get("shift", False)
    for parent, attribute, layer in linears(model).values():
        shifted = shift and attribute not in ("o_proj", "down_proj")
        quantized = QuantLinear(layer.n_in, layer.n_out, f"w{quantization['bits']}" if weights_alone else "a8w8",
                                quantization.get("group_size", -1), layer.bias is not None or shifted, quantization.get("desc_act", False),
                                quantization.get("activation") == "per_tensor")  # fmt: skip
        setattr(parent, attribute, quantized)
    if shift:
        for block in model.layers:
            block.attention_norm.add_bias()
            block.mlp_norm.add_bias()


def set_parameter(parameter, array):
    """Materialise a lazy parameter, or overwrite one, with numpy values in our layout; one copy of them at a time."""
    if str(parameter.dtype).endswith(f".{array.dtype}"):
        parameter.set_value(np.ascontiguousarray(array))
    else:
        parameter.set_value(paddle.to_tensor(array).astype(parameter.dtype))


def _shards(path):
    """{tensor name: (a function that reads it, its shape)} over all weight files of a Hugging Face folder."""
    path = Path(path)
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (path / index).is_file():
            try:
                files = sorted(
                    {str(f) for f in json.loads((path / index).read_text(encoding="utf-8"))["weight_map"].values()}
                )
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{path / index}: not an index with a weight_map") from None
        elif (path / single).is_file():
            files = [single]
        else:
            continue
        found = {}
        for file in files:
            if Path(file).name != file or not (path / file).is_file():
                raise UserError(f"{path / index}: names the file {file}, which is not there")
            if file.endswith(".bin"):
                bin_file = BinFile(path / file)
                found.update(
                    {n: ((lambda b=bin_file, n=n: b.read(n)), list(e[3])) for n, e in bin_file.entries.items()}
                )
            else:
                header = safetensors_header(path / file)
                found.update({n: ((lambda f=path / file, e=e: read_tensor(f, e)), e[1]) for n, e in header.items()})
        return found
    raise UserError(f"{path}: no model.safetensors, pytorch_model.bin or an index of them")


def load_weights(model, path):
    """Fill the base weights from a Hugging Face folder, tensor by tensor; every mismatch is named in one error."""
    found = {n: v for n, v in _shards(path).items() if not IGNORED_WEIGHTS.search(n)}
    weights = {w.name: w for w in base_weights(model)}
    if model.lm_head is None:
        found.pop("lm_head.weight", None)  # a tied head may be stored as well
    wrong = [f"missing {n}" for n in weights if n not in found]
    wrong += [f"unexpected {n}" for n in found if n not in weights]
    wrong += [
        f"{n} has shape {list(found[n][1])}, config.json says {w.shape}"
        for n, w in weights.items()
        if n in found and list(found[n][1]) != w.shape
    ]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit: {'; '.join(wrong)}")
    for name, weight in weights.items():
        array = found[name][0]()
        stored = weight.stored or "float32"
        if stored.startswith("int") != (array.dtype.kind == "i"):
            raise UserError(f"{path}: {name} is of {array.dtype}; {stored} is needed")
        array = weight.from_numpy(array)  # under the same name, so that theirs is gone before ours is copied
        set_parameter(weight.parameter, array)
    for name, (_, _, layer) in linears(model).items():
        if isinstance(layer, QuantLinear):
            layer.check(path, name)


def from_pretrained(path, dtype="float32"):
    """A CausalLM from a Hugging Face folder. Peak memory: the model, its largest tensor, and a constant.

    From an adapter's folder, the base model that it names (which may be an adapter's folder too) with LoRA merged into
    it, or with the prefix put on.
    """
    *adapters, base = base_folders(path)
    model = build(ModelConfig.from_json(base), dtype)
    load_weights(model, base)
    for adapter in reversed(adapters):
        merge(load_adapter(model, adapter))
    return model


def base_folders(path):
    """[path] of a model's folder; of an adapter's folder, itself, then the folder that it names as its base, and so on."""
    folders = [Path(path)]
    while (file := folders[-1] / "adapter_config.json").is_file() and not (folders[-1] / "config.json").is_file():
        try:
            base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            raise UserError(f"{file}: not a JSON object") from None
        if not isinstance(base, str) or not Path(base).is_dir():
            raise UserError(f"{file}: base_model_name_or_path: {base!r} is not a folder of a model")
        if Path(base).resolve() in [folder.resolve() for folder in folders]:
            raise UserError(f"{file}: base_model_name_or_path: {base!r} is built on this adapter itself")
        folders.append(Path(base))
    return folders


def save_pretrained(model, path, dtype="float32", max_shard_bytes=5 << 30):
    """Write config.json and model*.safetensors in Hugging Face's layout; config.json last, each file atomically."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    shards, sizes = [{}], [0]
    for w in base_weights(model):
        stored = w.stored or dtype
        width = 2 if stored == "bfloat16" else np.dtype(stored).itemsize
        size = int(np.prod(w.shape)) * width
        if sizes[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][w.name] = (w.to_numpy, w.shape, stored)
        sizes[-1] += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        write_safetensors(path / name, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {n: f for f, s in zip(names, shards) for n in s}}
        with atomic_file(path / "model.safetensors.index.json") as file:
            json.dump(index, file, indent=2)
    with atomic_file(path / "config.json") as file:
        file.write(model.config.to_json(dtype))


# ========================================================================================= LoRA adapters


class LoRALinear(nn.Layer):
    """base(x) + scaling · dropout(x) A B (Hu et al., arXiv 2106.09685) around any linear layer `base`.

    scaling is alpha/R, or alpha/sqrt(R) (rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353) rescales every output to the
    trained magnitude; its norm is a constant to the gradient (their 4.3). PiSSA (arXiv 2404.02948) starts A B at the
    largest singular values and takes them out of the base; `initial` keeps that start.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, dora=False):
        super().__init__()
        n_in, n_out = base.n_in, base.n_out
        if dora and isinstance(base, QuantLinear):
            raise UserError("DoRA needs the base model's float weights; this one is quantized")
        self.base, self.dropout = base, dropout
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled = True
        bound = math.sqrt(1 / n_in)  # Kaiming uniform with a = sqrt(5), as the paper's code and peft have it
        self.lora_A = self.create_parameter([n_in, rank], default_initializer=nn.initializer.Uniform(-bound, bound))
        self.lora_B = self.create_parameter([rank, n_out], default_initializer=nn.initializer.Constant(0.0))
        self.lora_magnitude_vector = None
        self.initial = None
        for p in base.parameters():
            p.stop_gradient = True
        if dora:
            self.lora_magnitude_vector = self.create_parameter([n_out])
            self.lora_magnitude_vector.set_value(self.base.weight.astype("float32").norm(axis=0))

    def delta(self):
        """(in, out) float32: what the adapter adds to the weight."""
        return paddle.matmul(self.lora_A, self.lora_B) * self.scaling

    def forward(self, x, residual=None):
        y = self.adapted(x) if self.enabled else self.base(x)
        return y if residual is None else residual + y

    def adapted(self, x):
        """base(x) and what the adapter adds."""
        dropped = F.dropout(x, self.dropout, training=self.training) if self.dropout else x
        if isinstance(self.base, Linear) and self.lora_magnitude_vector is None:
            more = self.base.bias, None if dropped is x else dropped
            return kernels.lora_linear(x, self.base.weight, self.lora_A, self.lora_B, self.scaling, *more)
        y = self.base(x)
        update = kernels.linear(kernels.linear(dropped, self.lora_A) * self.scaling, self.lora_B)
        if self.lora_magnitude_vector is None:
            return y + update
        with paddle.no_grad():
            norm = (self.base.weight.astype("float32") + self.delta()).norm(axis=0)
        ratio = self.lora_magnitude_vector / norm  # (out,)
        plain = y if dropped is x else self.base(dropped)
        bias = self.base.bias
        return y + (plain if bias is None else plain - bias) * (ratio - 1) + update * ratio

    @paddle.no_grad()
    def start_pissa(self):
        """A B = the R largest singular triples of the weight, which the base loses."""
        weight = self.base.weight.astype("float32").numpy()
        u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        rank = self.lora_A.shape[1]
        root = np.sqrt(s[:rank] / self.scaling)
        self.set_pissa((u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32))

    @paddle.no_grad()
    def set_pissa(self, a, b):
        set_parameter(self.lora_A, a)
        set_parameter(self.lora_B, b)
        self.initial = (a, b)
        self.base.weight.set_value((self.base.weight.astype("float32") - self.delta()).astype(self.base.weight.dtype))

    @paddle.no_grad()
    def merged(self):
        """The base layer with the adapter in its weight."""
        if isinstance(self.base, QuantLinear):
            raise UserError(
                "an adapter cannot be merged into quantized weights; merge it into the float model, then quantize"
            )
        weight = self.base.weight.astype("float32") + self.delta()
        if self.lora_magnitude_vector is not None:
            weight = weight * (self.lora_magnitude_vector / weight.norm(axis=0))
        self.base.weight.set_value(weight.astype(self.base.weight.dtype))
        return self.base


def linears(model):
    """{Hugging Face module path: (parent layer, attribute, layer)} of every linear of the blocks."""
    layers = dict(model.named_sublayers())
    found = {}
    for ours, theirs, _ in FAMILIES[model.config.family].names:
        if not (ours.startswith("layers.") and ours.endswith("_proj.weight")):
            continue
        for i in range(model.config.num_hidden_layers):
            path = ours.format(i=i)[: -len(".weight")]
            parent, _, attribute = path.rpartition(".")
            found[theirs.format(i=i)[: -len(".weight")]] = (layers[parent], attribute, layers[path])
    return found


def lora_layers(model):
    """{Hugging Face module path: LoRALinear}"""
    return {path: layer for path, (_, _, layer) in linears(model).items() if isinstance(layer, LoRALinear)}


def apply_lora(model, rank=8, alpha=16.0, dropout=0.0, rslora=False, dora=False, pissa=False, targets=None, seed=0):
    """Freeze the model and put a LoRALinear around every linear named in `targets` (default: all of the blocks).

    targets: names such as "q_proj", matched as the end of the Hugging Face module path, or one string: a regular
    expression over the whole path, or "all-linear". A target that matches nothing is an error.
    """
    assert not lora_layers(model), "the model has LoRA already"
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(f"lora_rank must be at least 1 and lora_dropout in [0, 1): found {rank} and {dropout}")
    if pissa and dora:
        raise UserError("pissa and dora exclude each other: both redefine what the base weight is")
    if pissa and model.config.quantization is not None:
        raise UserError("PiSSA needs the base model's float weights; this one is quantized")
    found = linears(model)
    targets = FAMILIES[model.config.family].lora_targets if targets in (None, "all-linear", []) else targets
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(t)}" for t in targets]
    chosen = [path for path in found if any(re.fullmatch(p, path) for p in patterns)]
    for pattern, target in zip(patterns, [targets] if isinstance(targets, str) else targets):
        if not any(re.fullmatch(pattern, path) for path in found):
            names = sorted({path.rpartition(".")[2] for path in found})
            raise UserError(f"lora_target_modules: {target!r} matches no linear layer; there are {', '.join(names)}")
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for path in chosen:
        parent, attribute, layer = found[path]
        lora = LoRALinear(layer, rank, alpha, dropout, rslora, dora)
        generator = np.random.default_rng([seed, zlib.crc32(path.encode())])  # the start depends on seed and name alone
        bound = math.sqrt(1 / layer.n_in)
        set_parameter(lora.lora_A, generator.uniform(-bound, bound, lora.lora_A.shape).astype(np.float32))
        if pissa:
            lora.start_pissa()
        setattr(parent, attribute, lora)
    model.lora_config = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora, "use_dora": dora,
                         "target_modules": targets if isinstance(targets, str) else sorted(targets)}  # fmt: skip
    return model


@contextlib.contextmanager
def adapter_disabled(model):
    """The base model inside the block, the adapted one after it (LoRA other than PiSSA, whose base has changed; prefix)."""
    layers, prefix = lora_layers(model).values(), model.prefix
    assert all(layer.initial is None for layer in layers), "PiSSA changes the base: there is no base to go back to"
    for layer in layers:
        layer.enabled = False
    model.prefix = None
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True
        model.prefix = prefix


def merge(model):
    """Fold every LoRA into its base weight, in place; the model is a plain one afterwards."""
    for parent, attribute, layer in linears(model).values():
        if isinstance(layer, LoRALinear):
            setattr(parent, attribute, layer.merged())
    return model


# ========================================================================================= prefix tuning


class Prefix(nn.Layer):
    """Trained keys and values of P tokens before the text in every layer (Li & Liang, arXiv 2101.00190).

    One table (P, L · 2 · K · Dh), or with a projection an embedding and a two-layer tanh MLP that makes it. They have
    K heads, so grouped-query models are right; they are not rotated, and the text starts at position P, as in peft.
    """

    def __init__(self, config, tokens, projection=False, projection_hidden_size=None):
        super().__init__()
        self.tokens, self.layers, self.heads, self.head_dim = (
            tokens,
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
        )
        width = self.heads * self.head_dim
        self.embedding = self.create_parameter([tokens, width if projection else self.layers * 2 * width])
        self.hidden, self.output = None, None
        if projection:
            inner = projection_hidden_size or config.hidden_size
            self.hidden = Linear(width, inner, bias=True)
            self.output = Linear(inner, self.layers * 2 * width, bias=True)

    def table(self):
        """(P, L · 2 · K · Dh)"""
        if self.hidden is None:
            return self.embedding
        return self.output(paddle.tanh(self.hidden(self.embedding)))

    def fill(self, cache, B):
        table = self.table().reshape([self.tokens, self.layers, 2, self.heads, self.head_dim])
        table = table.unsqueeze(0).expand([B, *table.shape])  # (B, P, L, 2, K, Dh)
        for layer in range(self.layers):
            cache.keys[layer], cache.values[layer] = table[:, :, layer, 0], table[:, :, layer, 1]
        cache.tokens = cache.prefix_tokens = self.tokens


def apply_prefix(model, tokens=128, projection=False, projection_hidden_size=None, seed=0):
    """Freeze the model and give it a trainable prefix of `tokens` tokens."""
    if tokens < 1:
        raise UserError(f"num_prefix_tokens must be at least 1, found {tokens}")
    for parameter in model.parameters():
        parameter.stop_gradient = True
    model.prefix = Prefix(model.config, tokens, projection, projection_hidden_size)
    for name, parameter in model.prefix.named_parameters():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        spread = 0.02 if parameter.ndim == 2 else 0.0
        set_parameter(parameter, generator.standard_normal(parameter.shape, np.float32) * np.float32(spread))
    return model


# ====================================================================== adapters on disk, as peft has them


def adapter_weights(model):
    """[Weight] of LoRA and prefix parameters under the names that peft gives them."""
    weights = []
    for path, layer in lora_layers(model).items():
        stem = f"base_model.model.{path}."
        weights += [
            Weight(stem + "lora_A.weight", layer.lora_A, True),
            Weight(stem + "lora_B.weight", layer.lora_B, True),
        ]
        if layer.lora_magnitude_vector is not None:
            weights.append(Weight(stem + "lora_magnitude_vector", layer.lora_magnitude_vector, False))
    if model.prefix is not None:
        prefix = model.prefix
        rows = [("prompt_embeddings" if prefix.hidden is None else "embedding.weight", prefix.embedding, False)]
        if prefix.hidden is not None:
            for name, layer in (("transform.0", prefix.hidden), ("transform.2", prefix.output)):
                rows += [(f"{name}.weight", layer.weight, True), (f"{name}.bias", layer.bias, False)]
        weights += [Weight(*row) for row in rows]
    return weights


def save_adapter(model, path, base_model=None):
    """adapter_config.json and adapter_model.safetensors, as peft writes them; the config last.

    PiSSA is saved as the plain LoRA of rank 2R that gives the same model on the unchanged base: [A A0] [B; -B0]. A
    prefix with a projection is saved as the table it makes; its MLP, to go on training, as prefix_projection.safetensors.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {w.name: w.to_numpy() for w in adapter_weights(model)}
    config = {
        "base_model_name_or_path": str(base_model) if base_model else None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    if model.prefix is None:
        config.update(peft_type="LORA", bias="none", fan_in_fan_out=False, init_lora_weights=True, **model.lora_config)
        layers = lora_layers(model)
        if any(layer.initial is not None for layer in layers.values()):
            for module, layer in layers.items():
                (a, b), stem = layer.initial, f"base_model.model.{module}."
                tensors[stem + "lora_A.weight"] = np.concatenate([tensors[stem + "lora_A.weight"], a.T])
                tensors[stem + "lora_B.weight"] = np.concatenate([tensors[stem + "lora_B.weight"], -b.T], axis=1)
            config["r"] *= 2
            config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2  # so that the scaling stays
            config["pissa_start_included"] = True
    else:
        prefix = model.prefix
        config.update(peft_type="PREFIX_TUNING", num_virtual_tokens=prefix.tokens, token_dim=prefix.heads * prefix.head_dim,
                      num_transformer_submodules=1, num_attention_heads=prefix.heads, num_layers=prefix.layers,
                      prefix_projection=prefix.hidden is not None,
                      encoder_hidden_size=prefix.heads * prefix.head_dim if prefix.hidden is None else prefix.hidden.weight.shape[1])  # fmt: skip
        if prefix.hidden is not None:
            write_safetensors(path / "prefix_projection.safetensors", tensors)
            with paddle.no_grad():
                tensors = {"prompt_embeddings": prefix.table().numpy()}
    extra = {k: config.pop(k) for k in ("pissa_start_included",) if k in config}
    write_safetensors(
        path / "adapter_model.safetensors", tensors, metadata={k: json.dumps(v) for k, v in extra.items()}
    )
    with atomic_file(path / "adapter_config.json") as file:
        json.dump(config, file, indent=2)


def load_adapter(model, path, trainable=False):
    """Put the LoRA or prefix saved at `path` (by save_adapter or by peft) onto a plain model."""
    path = Path(path)
    config_path, weights_path = path / "adapter_config.json", path / "adapter_model.safetensors"
    for needed in (config_path, weights_path):
        if not needed.is_file():
            raise UserError(
                f"{needed}: no such file; an adapter is a folder with adapter_config.json and adapter_model.safetensors"
            )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{config_path}: must hold a JSON object, found {type(config).__name__}")
    needed = {
        "LORA": ("r", "lora_alpha"),
        "PREFIX_TUNING": ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
    }
    for key in needed.get(config.get("peft_type"), ()):
        if not isinstance(config.get(key), (int, float)):
            raise UserError(f"{config_path}: {key} must be a number, found {config.get(key)!r}")
    tensors = read_safetensors(weights_path)
    if config.get("peft_type") == "LORA":
        _load_lora(model, config, tensors, config_path, trainable)
    elif config.get("peft_type") == "PREFIX_TUNING":
        _load_prefix(model, config, tensors, config_path, trainable)
    else:
        raise UserError(
            f"{config_path}: peft_type {config.get('peft_type')!r} is not supported; LORA and PREFIX_TUNING are"
        )
    for weight in adapter_weights(model):
        weight.parameter.stop_gradient = not trainable
    return model


def _load_lora(model, config, tensors, path, trainable):
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules", "trainable_token_indices", "lora_bias",
                "layer_replication", "target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora"):  # fmt: skip
        if config.get(key):
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f'{path}: bias = {config["bias"]!r} is not supported; only "none"')
    with_start = (
        trainable and _metadata(path.parent / "adapter_model.safetensors").get("pissa_start_included") == "true"
    )
    rank, alpha, rslora = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))
    if with_start:  # split [A A0] [B; -B0] again, so that training goes on where it was
        rank, alpha = rank // 2, alpha / (math.sqrt(2) if rslora else 2)
    apply_lora(
        model,
        rank,
        alpha,
        config.get("lora_dropout") or 0.0,
        rslora,
        bool(config.get("use_dora")),
        targets=config.get("target_modules"),
    )
    if with_start:
        for module, layer in lora_layers(model).items():
            a = tensors[f"base_model.model.{module}.lora_A.weight"].T
            b = tensors[f"base_model.model.{module}.lora_B.weight"].T
            layer.set_pissa(np.ascontiguousarray(a[:, rank:]), np.ascontiguousarray(-b[rank:]))
            tensors[f"base_model.model.{module}.lora_A.weight"] = a[:, :rank].T
            tensors[f"base_model.model.{module}.lora_B.weight"] = b[:rank].T
    _fill(adapter_weights(model), tensors, path.parent / "adapter_model.safetensors")


def reload_adapter(model, path):
    """Overwrite the values of the model's adapter with those that save_adapter wrote of it at another time."""
    path = Path(path)
    projection = path / "prefix_projection.safetensors"
    file = projection if projection.is_file() else path / "adapter_model.safetensors"
    tensors = read_safetensors(file)
    for module, layer in lora_layers(model).items():
        if layer.initial is not None:  # PiSSA is saved as [A A0] [B; -B0]
            a, b = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
            rank = layer.lora_A.shape[1]
            tensors[a], tensors[b] = tensors[a][:rank], tensors[b][:, :rank]
    _fill(adapter_weights(model), tensors, file)


def _load_prefix(model, config, tensors, path, trainable):
    heads, dim = model.config.num_key_value_heads, model.config.num_key_value_heads * model.config.head_dim
    if (config["num_attention_heads"], config["token_dim"], config["num_layers"]) != (
        heads,
        dim,
        model.config.num_hidden_layers,
    ):
        raise UserError(
            f"{path}: prefix of {config['num_layers']} layers, {config['num_attention_heads']} heads, width {config['token_dim']}; "
            f"the model has {model.config.num_hidden_layers}, {heads}, {dim}"
        )
    projection = path.parent / "prefix_projection.safetensors"
    if trainable and projection.is_file():
        apply_prefix(model, config["num_virtual_tokens"], True, config["encoder_hidden_size"])
        _fill(adapter_weights(model), read_safetensors(projection), projection)
    else:
        apply_prefix(model, config["num_virtual_tokens"])
        _fill(adapter_weights(model), tensors, path.parent / "adapter_model.safetensors")


def _fill(weights, tensors, path):
    wrong = [f"missing {w.name}" for w in weights if w.name not in tensors]
    wrong += [f"unexpected {n}" for n in tensors if n not in {w.name for w in weights}]
    wrong += [f"{w.name} has shape {list(tensors[w.name].shape)}, not {w.shape}" for w in weights
              if w.name in tensors and list(tensors[w.name].shape) != w.shape]  # fmt: skip
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit: {'; '.join(wrong)}")
    for w in weights:
        set_parameter(w.parameter, w.from_numpy(np.ascontiguousarray(tensors[w.name], np.float32)))


def _metadata(path):
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length)).get("__metadata__") or {}


# ============================================================================================== generate


@paddle.no_grad()
def generate(model, input_ids, max_new_tokens=64, eos_token_id=None, attention_mask=None, do_sample=False, temperature=1.0,
             top_k=0, top_p=1.0, repetition_penalty=1.0, seed=0):  # fmt: skip
    """The oracle: one batch, one step after another, nothing clever. Returns (B, T + new) int64 numpy.

    input_ids (B, T) numpy; rows may be padded on the left where attention_mask (B, T) is 0. A row that gave an
    eos_token_id (int or list) is continued with it until all rows are done.
    """
    was_training, ids = model.training, np.asarray(input_ids, np.int64)
    model.eval()
    B, T = ids.shape
    mask = np.ones((B, T), np.int64) if attention_mask is None else np.asarray(attention_mask, np.int64)
    eos = np.array([] if eos_token_id is None else eos_token_id, np.int64).reshape(-1)
    generator = np.random.default_rng(seed)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    rows = np.where(mask[:, None, :, None] == 1, np.iinfo(np.int32).max, 0).astype(np.int32)  # no row sees a padded key
    cache, step_ids, step_positions = model.new_cache(B), ids, positions
    rows, done = None if mask.all() else paddle.to_tensor(rows), np.zeros(B, bool)
    for _ in range(max_new_tokens):
        x = model.hidden_states(paddle.to_tensor(step_ids), paddle.to_tensor(step_positions), rows, cache)[:, -1]
        head = model.embed_tokens.weight.T if model.lm_head is None else model.lm_head.weight
        logits = kernels.linear(x, head).astype("float32").numpy()  # (B, V)
        if repetition_penalty != 1.0:
            logits = penalize(
                logits, ids, np.concatenate([mask, np.ones((B, ids.shape[1] - T), int)], 1), repetition_penalty
            )
        next_ids = sample(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
        next_ids = np.where(done, eos[0] if eos.size else 0, next_ids)
        ids, rows = np.concatenate([ids, next_ids[:, None]], 1), None
        done |= np.isin(next_ids, eos)
        step_ids, step_positions = next_ids[:, None], (step_positions[:, -1:] + 1)
        if done.all():
            break
    if was_training:
        model.train()
    return ids


def penalize(logits, ids, mask, penalty):
    """Divide (or, if negative, multiply) the logits of tokens already there by penalty (Keskar et al., arXiv 1909.05858)."""
    logits = logits.copy()
    for row, (seen, keep) in enumerate(zip(ids, mask)):
        seen = np.unique(seen[keep == 1])
        logits[row, seen] = np.where(logits[row, seen] > 0, logits[row, seen] / penalty, logits[row, seen] * penalty)
    return logits


def sample(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> ids (B,): temperature, then the top_k highest, then the least set whose mass reaches top_p."""
    assert temperature > 0, "temperature must be positive; greedy is do_sample=False"
    logits = logits.astype(np.float64) / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < kth, -np.inf, logits)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if top_p < 1.0:
        order = np.argsort(-p, axis=-1, kind="stable")
        sorted_p = np.take_along_axis(p, order, -1)
        sorted_p[sorted_p.cumsum(-1) - sorted_p >= top_p] = 0.0  # the token that crosses top_p is kept
        np.put_along_axis(p, order, sorted_p, -1)
        p /= p.sum(-1, keepdims=True)
    return np.array([generator.choice(p.shape[-1], p=row) for row in p], np.int64)
