"""One decoder that is every family, their weight names, LoRA and prefix tuning, and a naive generate().

    model = from_pretrained("path/to/a/model")           # a Hugging Face or PaddleNLP folder of a family in FAMILIES
    logits = model(input_ids)                            # (B, T) int64 -> (B, T, V)
    losses = model(input_ids, labels=labels)             # (B, T) float32 per token, without ever holding the logits
    save_pretrained(model, "out")                        # Hugging Face layout again, of the same family

A family is a row of FAMILIES: how its config.json is read into the traits of a ModelConfig, and a table of weight names.
The decoder asks for traits, never for a family:
RMSNorm or LayerNorm before, after or around each half of a block, the residual around either · positions by rotation
(of all or some dims, halves or neighbours, in two dimensions; linear, dynamic, yarn, llama3 scaling), by ALiBi or learned ·
grouped-query attention that takes FlashMask rows, with windows, soft caps and norms of heads, or through latents (MLA) · q, k, v
in one linear or three, as the family's files have them, so that names, adapters and moments are one to one · MLPs with or
without gate, dense or of routed and shared experts · tied, own or normalised head.

Sections, each readable by itself: config, families, rotary positions, decoder | tensor files on disk, weights by their
names, PaddleNLP's names | LoRA adapters, prefix tuning, adapters on disk | generate.

This file knows nothing of topology or hardware: it reshapes with -1 and calls kernels.*. Labels come already shifted.
There is no dropout in the decoder, whatever config.json says: only LoRA has its own.

Letters: B batch, T sequence, D model width, H query heads, K key/value heads, Dh head dim, F feed-forward width,
V vocabulary, E experts, L layers, N tokens of a batch, P prefix tokens, R LoRA rank, r dims of a head that turn.
"""

import contextlib
import dataclasses
import functools
import itertools
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

import kernels

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from data import UserError

# ================================================================================================ config


@dataclasses.dataclass(frozen=True)
class Experts:
    """The sparse MLP of a block: each token goes to top_k of `count` experts, and to a shared one where there is one."""

    count: int  # E
    top_k: int
    width: int  # F of one expert
    shared_width: int = 0  # F of the expert that every token goes to; 0: there is none
    shared_gate: bool = False  # the shared expert's output is scaled by a sigmoid of its own
    scoring: str = "softmax"  # of the router: "softmax" or "sigmoid"
    normalise: bool = True  # the chosen experts' weights are made to add up to 1
    scale: float = 1.0  # of the chosen experts' weights
    groups: int = 1  # experts are chosen from the best `chosen_groups` of so many groups (arXiv 2405.04434, 2.2.1)
    chosen_groups: int = 1
    group_score_of: int = 1  # a group is judged by the sum of its so many best experts
    choice_bias: bool = False  # a bias that moves the choice alone, not the weights (arXiv 2408.15664)
    dense_layers: tuple = ()  # layers whose MLP is an ordinary one
    aux_loss_coef: float = 0.0  # of the load-balancing loss (arXiv 2101.03961, Eq. 4), added while training
    # Each layer is balanced by itself, with shares of all choices, and the layers' losses are added up; False: the tokens
    # of all layers together, with shares of all tokens.
    aux_by_layer: bool = False
    aux_by_sequence: bool = False  # ... and every sequence by itself (arXiv 2405.04434, 2.2.3)


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1): queries and keys through a narrow layer each."""

    q_rank: int | None  # None: queries come straight from the hidden state
    kv_rank: int
    nope_dim: int  # dims of a head without position
    rope_dim: int  # dims of a head with it; the keys' are shared by all heads
    value_dim: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What decides a model. The defaults are Llama's; a family's row in FAMILIES says where it differs."""

    family: str  # a key of FAMILIES
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # Dh, of queries and keys
    max_position_embeddings: int
    norm_eps: float
    initializer_range: float
    rope: dict  # {"rope_type", "rope_theta", and what that type needs}
    source: dict  # config.json as read: what it says beyond the above is written back unchanged
    quantization: dict | None = None  # how linears of the blocks are held as integers (QUANTIZATIONS); None: floats

    norm: str = "rms"  # "rms" or "layer"
    norm_offset: float = 0.0  # added to every norm's weight (Gemma: 1)
    norm_place: str = "before"  # of each half of a block; "after" (with its residual), or "both" (also on what it adds)
    residual_scale: float | None = None  # the residual is the norm's output times this, in place of its input

    embedding_size: int | None = None  # another width than D: projected in and, for the head, out
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = True

    position: str = "rope"  # "rope", "rope_2d" (ChatGLM-6B), "alibi" (arXiv 2108.12409) or "learned"
    position_offset: int = 0  # rows of the learned table before position 0
    rotary_dim: int = 0  # of each head; 0: all
    rope_interleaved: bool = False  # pairs are (2i, 2i+1) in place of (i, i + r/2)
    stored_frequencies: str | None = None  # name of RoPE's frequencies, where the files hold them too; {i}: the layer
    logn_length: int | None = None  # past so many tokens queries grow by log(position) to this base; not in training

    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o
    fused_qkv: str | None = None  # q, k, v in one linear: "blocks" q|k|v, or "groups": each key head's queries, k, v
    qk_norm: bool = False  # an RMSNorm over every head of q and k
    attention_scale: float | None = None  # None: Dh ** -0.5
    attention_softcap: float | None = None  # s -> c · tanh(s / c)
    windows: tuple = ()  # per layer: how many keys a query sees, itself included; None, or no entry: all
    latent: Latent | None = None

    activation: str = "silu"  # "silu", "gelu", "gelu_tanh" or "relu"
    gated: bool = True
    fused_gate_up: bool = False  # gate and up in one linear, gate first
    mlp_bias: bool = False
    experts: Experts | None = None

    tie_word_embeddings: bool = False
    norm_head: bool = False  # the head's columns are divided by their length (Baichuan 2, arXiv 2309.10305)
    z_loss_weight: float = 0.0  # of the mean squared largest logit, added while training
    final_softcap: float | None = None  # of the logits

    @property
    def most_tokens(self):
        """Tokens of the longest sequence: as many as there are positions, more where rope stretches them; ALiBi has no end."""
        if self.position == "alibi":
            return 1 << 30
        factor = self.rope["factor"] if self.rope["rope_type"] == "dynamic" else 1
        return int(self.max_position_embeddings * factor)

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
        source = _huggingface_source(source, path)
        family = _family_of(source, path)
        row = FAMILIES[family]
        _refuse_other_maths(source, family, path)

        def number(field, default, kind=int, least=1):
            key = _key(source, field)
            value = default if key is None else source[key]
            if isinstance(value, bool) or not isinstance(value, kind) or value < least:
                what = "a positive integer" if kind is int else "a positive number"
                raise UserError(f"{path}: {key or SYNONYMS[field][0]} must be {what}, found {value!r}")
            return value

        sizes = {field: number(field, None) for field in ("vocab_size", "hidden_size", "num_hidden_layers")}
        D, H = sizes["hidden_size"], number("num_attention_heads", None)
        K = number("num_key_value_heads", H)
        head_dim = number("head_dim", D // H)
        if H % K or (D % H and _key(source, "head_dim") is None):
            raise UserError(
                f"{path}: {H} heads over {K} key/value heads and hidden_size {D} do not divide (head_dim {head_dim})"
            )
        fields = dict(
            **sizes,
            intermediate_size=number("intermediate_size", 4 * D if row.four_times else None),
            num_attention_heads=H,
            num_key_value_heads=K,
            head_dim=head_dim,
            max_position_embeddings=number("max_position_embeddings", 2048),
            norm_eps=float(number("norm_eps", row.norm_eps, (int, float), 0)),
            initializer_range=float(number("initializer_range", 0.02, (int, float), 0)),
            rope=_rope_parameters({"rope_theta": row.rope_theta, **source}, path),
            tie_word_embeddings=bool(source.get("tie_word_embeddings", row.tied_by_default)),
            quantization=_quantization(source, path),
        )
        try:
            fields.update(row.traits(source, fields))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{path}: a key that {family} needs is missing or of another type: {error}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        config = ModelConfig(family=family, source=source, **fields)
        if config.position.startswith("rope") and (config.rotary_dim or config.head_dim) % 2:
            raise UserError(f"{path}: rotary positions turn pairs: {config.rotary_dim or config.head_dim} dims are odd")
        return config

    def to_json(self, dtype):
        """The text of config.json, in the dialect it was read in, with the dtype that the weights are saved in."""
        source = dict(self.source)
        source["dtype" if "rope_parameters" in source or "dtype" in source else "torch_dtype"] = dtype
        for field in ("vocab_size", "num_hidden_layers", "max_position_embeddings"):  # what a script may have changed
            if (key := _key(source, field)) is not None:
                source[key] = getattr(self, field)
        source.setdefault("architectures", [FAMILIES[self.family].architecture])
        source.pop("quantization_config", None)
        if self.quantization is not None:
            source["quantization_config"] = self.quantization
        return json.dumps(source, indent=2, ensure_ascii=False) + "\n"


SYNONYMS = {  # our field: the keys of config.json that hold it, the first that is there
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "inner_hidden_size", "n_inner"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "kv_channels"),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "max_sequence_length", "model_max_length", "seq_length",
    ),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "layer_norm_eps"),
    "initializer_range": ("initializer_range", "init_std"),
}  # fmt: skip


def _key(source, field):
    """The key of config.json that holds this field; None: it is not said."""
    return next((key for key in SYNONYMS[field] if source.get(key) is not None), None)


# ============================================================================================== families


@dataclasses.dataclass(frozen=True)
class Family:
    """One family: how its config.json is read, and what its weights are called."""

    architecture: str  # what its software calls the class
    names: tuple  # rows of _table(): (our name, theirs, transposed); {i} is the layer, {e} the expert
    traits: callable = lambda source, fields: {}  # config.json, fields read so far -> fields that differ from Llama's
    tied_by_default: bool = False  # tie_word_embeddings when config.json is silent
    norm_eps: float = 1e-6  # when config.json is silent
    four_times: bool = False  # intermediate_size is 4 D when config.json is silent
    rope_theta: float = 10000.0  # when config.json is silent
    prefix: str = "model."  # of the names of all but the head; some published files leave it out
    also_stores_head: bool = False  # a tied head is written to its files as well
    model_type: str | None = None  # in config.json, where it is not the row's own name
    told_by: tuple = ()  # keys of config.json, any of which tells the family from another of its model_type
    settings: dict = dataclasses.field(default_factory=dict)  # keys of config.json with the values read here, see below


def _table(text, linears_as_is=False):
    """Rows from lines "ours theirs" of modules, for weight and bias, or of one parameter where ours ends in "!".

    transposed: theirs is [out, in] as torch.nn.Linear has it, ours [in, out]. linears_as_is: theirs is [in, out] too.
    """
    rows = []
    for line in filter(str.strip, text.splitlines()):
        ours, theirs = line.split()
        if ours.endswith("!"):
            rows.append((ours[:-1], theirs, False))
            continue
        linear = ours.endswith(("_proj", "lm_head", "router", "shared_gate", "project_in", "project_out"))
        transposed = linear and not (linears_as_is and ours.startswith("layers."))
        rows.append((f"{ours}.weight", f"{theirs}.weight", transposed))
        rows.append((f"{ours}.bias", f"{theirs}.bias", False))
    return tuple(rows)


_LLAMA_ATTENTION = """
    embed_tokens                    model.embed_tokens
    layers.{i}.attention_norm       model.layers.{i}.input_layernorm
    layers.{i}.attention.q_proj     model.layers.{i}.self_attn.q_proj
    layers.{i}.attention.k_proj     model.layers.{i}.self_attn.k_proj
    layers.{i}.attention.v_proj     model.layers.{i}.self_attn.v_proj
    layers.{i}.attention.o_proj     model.layers.{i}.self_attn.o_proj
    layers.{i}.attention.q_norm     model.layers.{i}.self_attn.q_norm
    layers.{i}.attention.k_norm     model.layers.{i}.self_attn.k_norm
    layers.{i}.mlp_norm             model.layers.{i}.post_attention_layernorm
    norm                            model.norm
    lm_head                         lm_head
"""
_LLAMA_MLP = """
    layers.{i}.mlp.gate_proj        model.layers.{i}.mlp.gate_proj
    layers.{i}.mlp.up_proj          model.layers.{i}.mlp.up_proj
    layers.{i}.mlp.down_proj        model.layers.{i}.mlp.down_proj
"""
_LLAMA_EXPERTS = """
    layers.{i}.mlp.router           model.layers.{i}.mlp.gate
    layers.{i}.mlp.experts.{e}.gate_proj  model.layers.{i}.mlp.experts.{e}.gate_proj
    layers.{i}.mlp.experts.{e}.up_proj    model.layers.{i}.mlp.experts.{e}.up_proj
    layers.{i}.mlp.experts.{e}.down_proj  model.layers.{i}.mlp.experts.{e}.down_proj
"""
_NAMES_LLAMA = _table(_LLAMA_ATTENTION + _LLAMA_MLP)
_NAMES_MIXTRAL = _table(_LLAMA_ATTENTION + """
    layers.{i}.mlp.router           model.layers.{i}.block_sparse_moe.gate
    layers.{i}.mlp.experts.{e}.gate_proj  model.layers.{i}.block_sparse_moe.experts.{e}.w1
    layers.{i}.mlp.experts.{e}.up_proj    model.layers.{i}.block_sparse_moe.experts.{e}.w3
    layers.{i}.mlp.experts.{e}.down_proj  model.layers.{i}.block_sparse_moe.experts.{e}.w2
""")  # fmt: skip
_NAMES_QWEN_MOE = _table(_LLAMA_ATTENTION + _LLAMA_MLP + _LLAMA_EXPERTS + """
    layers.{i}.mlp.shared.gate_proj model.layers.{i}.mlp.shared_expert.gate_proj
    layers.{i}.mlp.shared.up_proj   model.layers.{i}.mlp.shared_expert.up_proj
    layers.{i}.mlp.shared.down_proj model.layers.{i}.mlp.shared_expert.down_proj
    layers.{i}.mlp.shared_gate      model.layers.{i}.mlp.shared_expert_gate
""")  # fmt: skip
_NAMES_DEEPSEEK = _table(_LLAMA_ATTENTION + _LLAMA_MLP + _LLAMA_EXPERTS + """
    layers.{i}.attention.q_a_proj   model.layers.{i}.self_attn.q_a_proj
    layers.{i}.attention.q_a_norm   model.layers.{i}.self_attn.q_a_layernorm
    layers.{i}.attention.q_b_proj   model.layers.{i}.self_attn.q_b_proj
    layers.{i}.attention.kv_a_proj  model.layers.{i}.self_attn.kv_a_proj_with_mqa
    layers.{i}.attention.kv_a_norm  model.layers.{i}.self_attn.kv_a_layernorm
    layers.{i}.attention.kv_b_proj  model.layers.{i}.self_attn.kv_b_proj
    layers.{i}.mlp.choice_bias!     model.layers.{i}.mlp.gate.e_score_correction_bias
    layers.{i}.mlp.shared.gate_proj model.layers.{i}.mlp.shared_experts.gate_proj
    layers.{i}.mlp.shared.up_proj   model.layers.{i}.mlp.shared_experts.up_proj
    layers.{i}.mlp.shared.down_proj model.layers.{i}.mlp.shared_experts.down_proj
""")  # fmt: skip
_NAMES_QWEN = _table("""
    embed_tokens                    transformer.wte
    layers.{i}.attention_norm       transformer.h.{i}.ln_1
    layers.{i}.attention.qkv_proj   transformer.h.{i}.attn.c_attn
    layers.{i}.attention.o_proj     transformer.h.{i}.attn.c_proj
    layers.{i}.mlp_norm             transformer.h.{i}.ln_2
    layers.{i}.mlp.gate_proj        transformer.h.{i}.mlp.w2
    layers.{i}.mlp.up_proj          transformer.h.{i}.mlp.w1
    layers.{i}.mlp.down_proj        transformer.h.{i}.mlp.c_proj
    norm                            transformer.ln_f
    lm_head                         lm_head
""")
_NAMES_BAICHUAN = _table("""
    embed_tokens                    model.embed_tokens
    layers.{i}.attention_norm       model.layers.{i}.input_layernorm
    layers.{i}.attention.qkv_proj   model.layers.{i}.self_attn.W_pack
    layers.{i}.attention.o_proj     model.layers.{i}.self_attn.o_proj
    layers.{i}.mlp_norm             model.layers.{i}.post_attention_layernorm
    norm                            model.norm
    lm_head                         lm_head
""" + _LLAMA_MLP)  # fmt: skip
_NAMES_CHATGLM = _table("""
    embed_tokens                    transformer.word_embeddings
    layers.{i}.attention_norm       transformer.layers.{i}.input_layernorm
    layers.{i}.attention.qkv_proj   transformer.layers.{i}.attention.query_key_value
    layers.{i}.attention.o_proj     transformer.layers.{i}.attention.dense
    layers.{i}.mlp_norm             transformer.layers.{i}.post_attention_layernorm
    layers.{i}.mlp.up_proj          transformer.layers.{i}.mlp.dense_h_to_4h
    layers.{i}.mlp.down_proj        transformer.layers.{i}.mlp.dense_4h_to_h
    norm                            transformer.final_layernorm
    lm_head                         lm_head
""")
_NAMES_CHATGLM2 = _table("""
    embed_tokens                    transformer.embedding.word_embeddings
    layers.{i}.attention_norm       transformer.encoder.layers.{i}.input_layernorm
    layers.{i}.attention.qkv_proj   transformer.encoder.layers.{i}.self_attention.query_key_value
    layers.{i}.attention.o_proj     transformer.encoder.layers.{i}.self_attention.dense
    layers.{i}.mlp_norm             transformer.encoder.layers.{i}.post_attention_layernorm
    layers.{i}.mlp.gate_up_proj     transformer.encoder.layers.{i}.mlp.dense_h_to_4h
    layers.{i}.mlp.down_proj        transformer.encoder.layers.{i}.mlp.dense_4h_to_h
    norm                            transformer.encoder.final_layernorm
    lm_head                         transformer.output_layer
""")
_NAMES_GLM = _table(_LLAMA_ATTENTION + """
    layers.{i}.attention_post_norm  model.layers.{i}.post_self_attn_layernorm
    layers.{i}.mlp.gate_up_proj     model.layers.{i}.mlp.gate_up_proj
    layers.{i}.mlp.down_proj        model.layers.{i}.mlp.down_proj
    layers.{i}.mlp_post_norm        model.layers.{i}.post_mlp_layernorm
""")  # fmt: skip
_NAMES_BLOOM = _table("""
    embed_tokens                    transformer.word_embeddings
    embed_norm                      transformer.word_embeddings_layernorm
    layers.{i}.attention_norm       transformer.h.{i}.input_layernorm
    layers.{i}.attention.qkv_proj   transformer.h.{i}.self_attention.query_key_value
    layers.{i}.attention.o_proj     transformer.h.{i}.self_attention.dense
    layers.{i}.mlp_norm             transformer.h.{i}.post_attention_layernorm
    layers.{i}.mlp.up_proj          transformer.h.{i}.mlp.dense_h_to_4h
    layers.{i}.mlp.down_proj        transformer.h.{i}.mlp.dense_4h_to_h
    norm                            transformer.ln_f
    lm_head                         lm_head
""")
_NAMES_GPT2 = _table("""
    embed_tokens                    transformer.wte
    embed_positions                 transformer.wpe
    layers.{i}.attention_norm       transformer.h.{i}.ln_1
    layers.{i}.attention.qkv_proj   transformer.h.{i}.attn.c_attn
    layers.{i}.attention.o_proj     transformer.h.{i}.attn.c_proj
    layers.{i}.mlp_norm             transformer.h.{i}.ln_2
    layers.{i}.mlp.up_proj          transformer.h.{i}.mlp.c_fc
    layers.{i}.mlp.down_proj        transformer.h.{i}.mlp.c_proj
    norm                            transformer.ln_f
    lm_head                         lm_head
""", linears_as_is=True)  # fmt: skip
_NAMES_OPT = _table("""
    embed_tokens                    model.decoder.embed_tokens
    embed_positions                 model.decoder.embed_positions
    project_in                      model.decoder.project_in
    project_out                     model.decoder.project_out
    layers.{i}.attention_norm       model.decoder.layers.{i}.self_attn_layer_norm
    layers.{i}.attention.q_proj     model.decoder.layers.{i}.self_attn.q_proj
    layers.{i}.attention.k_proj     model.decoder.layers.{i}.self_attn.k_proj
    layers.{i}.attention.v_proj     model.decoder.layers.{i}.self_attn.v_proj
    layers.{i}.attention.o_proj     model.decoder.layers.{i}.self_attn.out_proj
    layers.{i}.mlp_norm             model.decoder.layers.{i}.final_layer_norm
    layers.{i}.mlp.up_proj          model.decoder.layers.{i}.fc1
    layers.{i}.mlp.down_proj        model.decoder.layers.{i}.fc2
    norm                            model.decoder.final_layer_norm
    lm_head                         lm_head
""")
_NAMES_INTERNLM2 = _table("""
    embed_tokens                    model.tok_embeddings
    layers.{i}.attention_norm       model.layers.{i}.attention_norm
    layers.{i}.attention.qkv_proj   model.layers.{i}.attention.wqkv
    layers.{i}.attention.o_proj     model.layers.{i}.attention.wo
    layers.{i}.mlp_norm             model.layers.{i}.ffn_norm
    layers.{i}.mlp.gate_proj        model.layers.{i}.feed_forward.w1
    layers.{i}.mlp.up_proj          model.layers.{i}.feed_forward.w3
    layers.{i}.mlp.down_proj        model.layers.{i}.feed_forward.w2
    norm                            model.norm
    lm_head                         output
""")
_NAMES_GEMMA2 = _table(_LLAMA_ATTENTION.replace(
    "layers.{i}.mlp_norm             model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_norm             model.layers.{i}.pre_feedforward_layernorm",
) + _LLAMA_MLP + """
    layers.{i}.attention_post_norm  model.layers.{i}.post_attention_layernorm
    layers.{i}.mlp_post_norm        model.layers.{i}.post_feedforward_layernorm
""")  # fmt: skip
IGNORED_WEIGHTS = re.compile(  # in published files: tables that are computed, and masks
    r"(rotary_emb|rotary_pos_emb)\.inv_freq$|\.attn\.(bias|masked_bias)$|\.rotary_emb\.(cos|sin)_cached$|decoder\.version$"
)


def _llama(source, fields):
    bias = bool(source.get("attention_bias", False))
    return dict(attention_bias=bias, output_bias=bias, mlp_bias=bool(source.get("mlp_bias", False)))


def _windowed(source, fields):
    window = source.get("sliding_window")
    return dict(windows=(window,) * fields["num_hidden_layers"]) if window else {}


def _mistral(source, fields):
    return _windowed({"sliding_window": 4096, **source}, fields)  # null is none, no key is the class's own


def _mixtral(source, fields):
    return _windowed(source, fields) | dict(
        experts=Experts(
            source["num_local_experts"],
            source["num_experts_per_tok"],
            fields["intermediate_size"],
            aux_loss_coef=source.get("router_aux_loss_coef", 0.001),
        )
    )


def _qwen(source, fields):
    rope, length = fields["rope"], source.get("seq_length", 8192)
    rope = {"rope_type": "default", "rope_theta": float(source.get("rotary_emb_base", 10000.0))}
    if source.get("use_dynamic_ntk", True):
        rope |= {"rope_type": "qwen_ntk", "original_max_position_embeddings": length}
    return dict(
        attention_bias=True,
        fused_qkv="blocks",
        intermediate_size=fields["intermediate_size"] // 2,
        rope=rope,
        logn_length=length if source.get("use_logn_attn", True) else None,
    )


def _qwen_moe(source, fields):
    dense = set(source.get("mlp_only_layers") or ())
    step = source.get("decoder_sparse_step", 1)
    dense |= {i for i in range(fields["num_hidden_layers"]) if (i + 1) % step}
    qwen2 = source["model_type"] == "qwen2_moe"
    shared = source["shared_expert_intermediate_size"] or 0 if qwen2 else 0
    return dict(
        attention_bias=bool(source.get("qkv_bias", True) if qwen2 else source.get("attention_bias", False)),
        output_bias=False if qwen2 else bool(source.get("attention_bias", False)),
        qk_norm=not qwen2,
        experts=Experts(
            source.get("num_local_experts") or source["num_experts"],
            source["num_experts_per_tok"],
            source["moe_intermediate_size"],
            shared,
            qwen2,
            normalise=bool(source.get("norm_topk_prob", False)),
            dense_layers=tuple(sorted(dense)),
            aux_loss_coef=source.get("router_aux_loss_coef", 0.001),
        ),
    )


def _baichuan(source, fields):
    # 13B has no rotary positions and so no max_position_embeddings. Baichuan 2 writes z_loss_weight and has another
    # vocabulary; its 7B also spells the class as the 13B does.
    rope = "max_position_embeddings" in source
    two = (
        "z_loss_weight" in source
        or fields["vocab_size"] == 125696
        or rope
        and source.get("architectures") == ["BaichuanForCausalLM"]
    )
    return dict(
        fused_qkv="blocks",
        position="rope" if rope else "alibi",
        norm_head=two,
        stored_frequencies="model.layers.{i}.self_attn.rotary_emb.inv_freq" if rope and not two else None,
        z_loss_weight=float(source.get("z_loss_weight") or 0.0),
    )


def _chatglm(source, fields):
    # The official code gives every model the residual scale of 28 layers, the depth of the one that was published.
    return dict(
        norm="layer",
        position="rope_2d",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_qkv="groups",
        gated=False,
        activation="gelu_tanh",
        residual_scale=math.sqrt(2 * fields["num_hidden_layers"]),
        stored_frequencies="transformer.layers.{i}.attention.rotary_emb.inv_freq",
    )


def _chatglm2(source, fields):
    multi_query, name = source.get("multi_query_attention", False), str(source.get("_name_or_path"))
    ratio = source.get("rope_ratio", 1)
    # chatglm2-6b-32k divides positions by the ratio, ChatGLM3 and GLM-4 multiply the base with theirs (50 or more): the same
    # keys, told apart by the name, or the size of the number.
    if ratio != 1 and ratio < 50 and not re.search("chatglm[23]|glm-4", name):
        raise UserError(
            f"rope_ratio = {ratio} may divide positions (ChatGLM2) or multiply rope's base (ChatGLM3, GLM-4): _name_or_path = "
            f"{name!r} must name the model, chatglm2, chatglm3 or glm-4"
        )
    rope = {"rope_type": "default", "rope_theta": 10000.0 * ratio}
    if "chatglm2" in name and ratio != 1:
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": ratio}
    return dict(
        num_key_value_heads=source["multi_query_group_num"] if multi_query else fields["num_attention_heads"],
        fused_qkv="blocks" if multi_query else "groups",
        fused_gate_up=True,
        rotary_dim=fields["head_dim"] // 2,
        rope_interleaved=True,
        rope=rope,
        stored_frequencies="transformer.rotary_pos_emb.inv_freq",
        attention_bias=bool(source.get("add_qkv_bias", False) or source.get("add_bias_linear", False)),
        output_bias=bool(source.get("add_bias_linear", False)),
        mlp_bias=bool(source.get("add_bias_linear", False)),
    )


def _glm(source, fields):
    partial = ((source.get("rope_parameters") or {}) | source).get("partial_rotary_factor", 0.5)
    return dict(
        attention_bias=bool(source.get("attention_bias", True)),
        fused_gate_up=True,
        rope_interleaved=True,
        rotary_dim=int(fields["head_dim"] * partial),
        norm_place="both" if source["model_type"] == "glm4" else "before",
    )


def _bloom(source, fields):
    return dict(
        norm="layer",
        position="alibi",
        embedding_norm=True,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_qkv="groups",
        gated=False,
        activation="gelu_tanh",
        residual_scale=1.0 if source.get("apply_residual_connection_post_layernorm") else None,
    )


def _gpt2(source, fields):
    activation = source.get("activation_function", "gelu_new")
    return dict(
        norm="layer",
        position="learned",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_qkv="blocks",
        gated=False,
        activation=_GELU.get(activation, activation),
    )


_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _opt(source, fields):
    before, width = source.get("do_layer_norm_before", True), source.get("word_embed_proj_dim")
    bias = source.get("enable_bias", True)
    return dict(
        norm="layer",
        norm_place="before" if before else "after",
        position="learned",
        position_offset=2,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        gated=False,
        activation=_GELU.get(source.get("activation_function"), source.get("activation_function", "relu")),
        embedding_size=None if width == fields["hidden_size"] else width,
        final_norm=before and not source.get("_remove_final_layer_norm", False),
    )


def _gemma(source, fields):
    return dict(
        attention_bias=bool(source.get("attention_bias", False)),
        output_bias=bool(source.get("attention_bias", False)),
        norm_offset=1.0,
        embedding_scale=math.sqrt(fields["hidden_size"]),
        activation="gelu_tanh",
    )


def _gemma2(source, fields):
    window, layers = source.get("sliding_window", 4096), fields["num_hidden_layers"]
    types = source.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return _gemma(source, fields) | dict(
        norm_place="both",
        attention_scale=float(source.get("query_pre_attn_scalar", 256)) ** -0.5,
        attention_softcap=source.get("attn_logit_softcapping", 50.0),
        final_softcap=source.get("final_logit_softcapping", 30.0),
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
    )


def _deepseek(source, fields):
    v3, rope = source["model_type"] == "deepseek_v3", fields["rope"]
    latent = Latent(
        source["q_lora_rank"],
        source["kv_lora_rank"],
        source["qk_nope_head_dim"],
        source["qk_rope_head_dim"],
        source["v_head_dim"],
    )
    scale = (latent.nope_dim + latent.rope_dim) ** -0.5
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    dense = range(min(source["first_k_dense_replace"], fields["num_hidden_layers"]))
    grouped = v3 or source.get("topk_method") == "group_limited_greedy"
    experts = Experts(
        source["n_routed_experts"],
        source["num_experts_per_tok"],
        source["moe_intermediate_size"],
        (source["n_shared_experts"] or 0) * source["moe_intermediate_size"],
        scoring="sigmoid" if v3 else "softmax",
        normalise=bool(v3 and source.get("norm_topk_prob", True)),
        scale=source.get("routed_scaling_factor", 1.0),
        groups=source["n_group"] if grouped else 1,
        chosen_groups=source["topk_group"] if grouped else 1,
        group_score_of=2 if v3 else 1,
        choice_bias=v3,
        dense_layers=tuple(dense),
        aux_loss_coef=0.0 if v3 else source.get("aux_loss_alpha", 0.0),
        aux_by_layer=True,
        aux_by_sequence=bool(source.get("seq_aux", True)),
    )
    bias = bool(source.get("attention_bias", False))
    return dict(
        attention_bias=bias,
        output_bias=bias,
        num_key_value_heads=fields["num_attention_heads"],
        latent=latent,
        head_dim=latent.nope_dim + latent.rope_dim,
        rotary_dim=latent.rope_dim,
        attention_scale=scale,
        rope_interleaved=bool(source.get("rope_interleave", True)),
        experts=experts,
    )


def _internlm(source, fields):
    rotary, rope = source.get("rotary"), fields["rope"]
    if rotary is not None:  # {"type": "origin"} or, as Hugging Face's "dynamic", {"type": "dynamic"}
        rope = {"rope_type": "default", "rope_theta": float(rotary["base"])}
        if rotary["type"] == "dynamic":
            rope |= {"rope_type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
        elif rotary["type"] != "origin":
            raise UserError(f"rotary = {json.dumps(rotary)} is not supported; its type must be origin or dynamic")
    return dict(attention_bias=bool(source.get("bias", False)), output_bias=bool(source.get("bias", False)), rope=rope)


def _internlm2(source, fields):
    return _internlm(source, fields) | dict(fused_qkv="groups")


_SILU = {"hidden_act": ("silu",)}
_GELU_TANH = dict.fromkeys(("hidden_act", "hidden_activation"), ("gelu_pytorch_tanh", "gelu"))
_NO_WINDOW = {"use_sliding_window": (False,), "sliding_window": ...}  # unused then, as max_window_layers is
_BIAS = {"attention_bias": (True, False)}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _NAMES_LLAMA, _llama, settings=_SILU | _BIAS | {"mlp_bias": (True, False)}),
    "mistral": Family("MistralForCausalLM", _NAMES_LLAMA, _mistral, settings=_SILU | {"sliding_window": ...}),
    "mixtral": Family("MixtralForCausalLM", _NAMES_MIXTRAL, _mixtral, norm_eps=1e-5, rope_theta=1e6,
                      settings=_SILU | {"sliding_window": ..., "router_jitter_noise": (0, 0.0), "num_local_experts": ...}),
    "qwen": Family("QWenLMHeadModel", _NAMES_QWEN, _qwen, prefix="transformer.",
                   settings={"no_bias": (True,), "rotary_pct": (1.0, 1), "scale_attn_weights": (True,), "rotary_emb_base": ...,
                             "use_dynamic_ntk": (True, False), "use_logn_attn": (True, False)}),
    "qwen2": Family("Qwen2ForCausalLM", _NAMES_LLAMA, lambda source, fields: dict(attention_bias=True),
                    settings=_SILU | _NO_WINDOW | {"attention_bias": ...}),  # which its class does not read
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _NAMES_QWEN_MOE, _qwen_moe, settings=_SILU | _NO_WINDOW | {"qkv_bias": (True, False)}),
    "qwen3": Family("Qwen3ForCausalLM", _NAMES_LLAMA, lambda source, fields: _llama(source, fields) | dict(qk_norm=True),
                    settings=_SILU | _NO_WINDOW | _BIAS),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _NAMES_QWEN_MOE, _qwen_moe, settings=_SILU | _NO_WINDOW | _BIAS | {"num_local_experts": ...}),
    "baichuan": Family("BaichuanForCausalLM", _NAMES_BAICHUAN, _baichuan, settings=_SILU),
    "chatglm": Family("ChatGLMModel", _NAMES_CHATGLM, _chatglm, True, 1e-5, prefix="transformer.", also_stores_head=True,
                      told_by=("position_encoding_2d", "inner_hidden_size"), settings={"position_encoding_2d": (True,)}),
    "chatglm2": Family("ChatGLMModel", _NAMES_CHATGLM2, _chatglm2, norm_eps=1e-5, prefix="transformer.", model_type="chatglm",
                       settings={"apply_residual_connection_post_layernorm": (False,), "rmsnorm": (True,), "post_layer_norm": (True,),
                                 "original_rope": (True,), "apply_query_key_layer_scaling": (True, False), "add_qkv_bias": (True, False),
                                 "add_bias_linear": (True, False), "rope_ratio": ..., "multi_query_attention": (True, False)}),
    "glm": Family("GlmForCausalLM", _NAMES_GLM, _glm, norm_eps=1.5625e-7, settings=_SILU | _BIAS | {"partial_rotary_factor": ...}),
    "glm4": Family("Glm4ForCausalLM", _NAMES_GLM, _glm, norm_eps=1.5625e-7, settings=_SILU | _BIAS | {"partial_rotary_factor": ...}),
    "bloom": Family("BloomForCausalLM", _NAMES_BLOOM, _bloom, True, 1e-5, True, prefix="transformer.",
                    settings={"apply_residual_connection_post_layernorm": (True, False), "offset_alibi": ...}),
    "gpt2": Family("GPT2LMHeadModel", _NAMES_GPT2, _gpt2, True, 1e-5, True, prefix="transformer.",
                   settings={"activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu"), "scale_attn_weights": (True,),
                             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "reorder_and_upcast_attn": ...}),
    "opt": Family("OPTForCausalLM", _NAMES_OPT, _opt, True, 1e-5,
                  settings={"activation_function": ("relu", "gelu", "gelu_new"), "layer_norm_elementwise_affine": (True,)}),
    "internlm": Family("InternLMForCausalLM", _NAMES_LLAMA, _internlm, settings=_SILU | {"bias": (True, False), "rotary": ...}),
    "internlm2": Family("InternLM2ForCausalLM", _NAMES_INTERNLM2, _internlm2, settings=_SILU | {"bias": (True, False)}),
    "gemma": Family("GemmaForCausalLM", _NAMES_LLAMA, _gemma, True, settings=_GELU_TANH | _BIAS),
    "gemma2": Family("Gemma2ForCausalLM", _NAMES_GEMMA2, _gemma2, True,
                     settings=_GELU_TANH | _BIAS | dict.fromkeys(("sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
                                                                  "query_pre_attn_scalar", "sliding_window_size"), ...)),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _NAMES_DEEPSEEK, _deepseek,
                          settings=_SILU | _BIAS | {"topk_method": ("greedy", "group_limited_greedy"), "scoring_func": ("softmax",),
                                                    "norm_topk_prob": (False,), "moe_layer_freq": (1,)}),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _NAMES_DEEPSEEK, _deepseek,
                          settings=_SILU | _BIAS | {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), "rope_interleave": (True, False),
                                                    "moe_layer_freq": (1,)}),
}  # fmt: skip


def _family_of(source, path):
    """The row of FAMILIES for a config.json, by its model_type and, where rows share one, by the keys that tell them apart."""
    kind, types = source.get("model_type"), {name: row.model_type or name for name, row in FAMILIES.items()}
    rows = [(name, FAMILIES[name].told_by) for name, model_type in types.items() if model_type == kind]
    told = [name for name, keys in rows if source.keys() & set(keys)]
    family = next(iter(told or [name for name, keys in rows if not keys]), None)
    if family is None:
        known = ", ".join(sorted(set(types.values())))
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported are {known}")
    return family


# Keys that some family gives a meaning: where a family's `settings` do not list one, only the values here leave its maths alone.
_NEUTRAL = {
    "sliding_window": (), "use_sliding_window": (False,), "partial_rotary_factor": (1.0, 1), "rotary_pct": (1.0, 1),
    "attention_bias": (False,), "mlp_bias": (False,), "qkv_bias": (False,), "use_bias": (False,), "bias": (False,),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "query_pre_attn_scalar": (), "use_qk_norm": (False,),
    "qk_norm": (False,), "qk_layernorm": (False,), "clip_qkv": (), "logit_scale": (1.0, 1), "alibi": (False,),
    "attention_multiplier": (), "residual_multiplier": (1.0, 1), "embedding_multiplier": (1.0, 1), "logits_scaling": (1.0, 1),
    "attention_chunk_size": (), "no_rope_layers": (), "parallel_attn": (False,), "use_parallel_residual": (False,),
    "rope_local_base_freq": (), "use_bidirectional_attention": (False,), "is_encoder_decoder": (False,), "num_local_experts": (),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "router_jitter_noise": (0, 0.0),
    "apply_residual_connection_post_layernorm": (False,), "pre_seq_len": (), "position_encoding_2d": (False,), "use_mla": (False,),
    "rope_ratio": (1, 1.0), "use_dynamic_ntk": (False,), "use_logn_attn": (False,), "original_rope": (True,), "swiglu": (True,),
}  # fmt: skip
_LIKE_MATHS = re.compile(
    "scal(e|ing)|multiplier|softcap|window|rope|rotary|alibi|residual|_act$|activation_f|qk_|norm_type|chunk|mup"
)


def _refuse_other_maths(source, family, path):
    """Every key that would change what the decoder computes is either read here or refused by its name."""
    settings, rope = FAMILIES[family].settings, _rope_object(source, path)
    inside = {key: rope[key] for key in ("partial_rotary_factor",) if key in rope}
    for key, value in (source | inside).items():
        allowed = settings.get(key, _NEUTRAL.get(key))
        if allowed is None and key not in _READ_KEYS and _LIKE_MATHS.search(key):
            allowed = (False, 0, 0.0, 1, 1.0)
        if allowed is None or allowed is ... or value is None or value in ([], {}):
            continue
        if value in allowed and (value is not True or any(choice is True for choice in allowed)):  # 1 is not true here
            continue
        right = " or ".join(json.dumps(choice) for choice in allowed) or "no such key"
        raise UserError(
            f"{path}: {key} = {json.dumps(value)} is not supported for {family}: it changes the maths; supported is {right}"
        )


_READ_KEYS = {  # keys that read like maths, and are read above or change nothing
    *(key for keys in SYNONYMS.values() for key in keys),
    "rope_scaling", "rope_parameters", "rope_theta", "max_window_layers", "routed_scaling_factor", "word_embed_proj_dim",
    "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "hidden_act", "attention_softmax_in_fp32", "fp32_residual_connection",
    "masked_softmax_fusion", "slow_but_exact", "_sliding_window_pattern", "use_flash_attn", "scale_attn_weights",
}  # fmt: skip


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


def _rope_object(source, path):
    """What config.json says of RoPE in either dialect, {} if nothing."""
    key = "rope_parameters" if source.get("rope_parameters") else "rope_scaling"
    if not isinstance(source.get(key) or {}, dict):
        raise UserError(f"{path}: {key} must be an object, found {source[key]!r}")
    return source.get(key) or {}


def _rope_parameters(source, path):
    """{"rope_type", "rope_theta", …} from either dialect, checked."""
    rope = dict(_rope_object(source, path))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    known = {
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "low_freq_factor",
        "high_freq_factor",
        "truncate",
        "partial_rotary_factor",
    }
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
    for key in rope.keys() - known:
        if rope[key] is not None:
            found = f"rope type {rope['rope_type']}: {key} = {json.dumps(rope[key])}"
            raise UserError(f"{path}: {found} is not supported: it may change the maths")
    for key in ("rope_theta", *needed[rope["rope_type"]]):
        if not isinstance(rope.get(key), (int, float)):
            raise UserError(f"{path}: rope type {rope['rope_type']} needs a number {key}, found {rope.get(key)!r}")
    return rope


# ====================================================================================== rotary positions


def yarn_mscale(factor, m):
    """How much yarn raises the softmax's temperature at a context `factor` times as long (arXiv 2309.00071, Eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def rope_frequencies(config):
    """(r/2,) float32 angular frequencies of the r dims that turn, and the factor on cos and sin (only yarn's differs from 1).

    linear: Chen et al., arXiv 2306.15595. yarn: Peng et al., arXiv 2309.00071, Eq. 22-25. llama3: the rule that Meta
    published with Llama 3.1. dynamic is the default up to max_position_embeddings (see rope_tables).
    """
    rope, dim = config.rope, config.rotary_dim or config.head_dim
    if config.position == "rope_2d":
        dim //= 2  # a half for each of the two positions
    exponent = np.arange(0, dim, 2, dtype=np.float32) / dim
    frequency = (1.0 / np.float32(rope["rope_theta"]) ** exponent).astype(np.float32)
    kind, factor = rope["rope_type"], rope.get("factor")
    if config.position == "rope_2d":  # ChatGLM-6B's code rounds its frequencies to half precision when it is built
        return frequency.astype(np.float16).astype(np.float32), 1.0
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
        if rope.get("attention_factor") is not None:
            scale = rope["attention_factor"]
        elif rope.get("mscale") and rope.get("mscale_all_dim"):
            scale = yarn_mscale(factor, rope["mscale"]) / yarn_mscale(factor, rope["mscale_all_dim"])
        else:
            scale = yarn_mscale(factor, 1.0)
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


def rope_tables(config, position_ids, lengths=None):
    """cos and sin, each (B, T, 1, r) float32 for the r dims of a head that turn; None, None where no position rotates.

    position_ids (B, T), or for rope_2d (B, T, 2), whose tables stand one after the other. dynamic: past
    max_position_embeddings the base grows with the length of the token's own sample, so that neither padding nor packing
    changes the result. qwen_ntk grows in powers of two. lengths (B, T) or (B, 1) are those that each token is rotated for
    (None: the samples' own), see turning_lengths().
    """
    if not config.position.startswith("rope"):
        return None, None
    frequency, scale = rope_frequencies(config)
    dim, kind = 2 * len(frequency), config.rope["rope_type"]
    frequency = kernels.to_tensor(frequency)  # (r/2,)
    if kind in ("dynamic", "qwen_ntk"):
        length = (document_lengths(position_ids) if lengths is None else lengths).astype("float32")
        if kind == "dynamic":
            limit, factor = config.max_position_embeddings, config.rope["factor"]
            growth = factor * paddle.clip(length, min=limit) / limit - (factor - 1)  # (B, T), 1 within the limit
        else:
            limit = config.rope["original_max_position_embeddings"]
            doublings = paddle.ceil(paddle.log2(length / limit) + 1)
            growth = paddle.clip(2.0**doublings - 1, min=1.0)  # (B, T) or (B, 1)
        exponent = paddle.arange(0, dim, 2, dtype="float32") / dim
        frequency = frequency * (growth ** (dim / (dim - 2))).unsqueeze(-1) ** -exponent  # (B, T, r/2)
    angle = position_ids.unsqueeze(-1).astype("float32") * frequency  # (B, T[, 2], r/2)
    angle = paddle.concat([angle, angle], axis=-1)
    angle = (angle if angle.ndim == 3 else angle.flatten(2)).unsqueeze(2)  # (B, T, 1, r)
    return paddle.cos(angle) * scale, paddle.sin(angle) * scale


def turning_lengths(config, prompt, positions):
    """(n,) int64 lengths for rope_tables() of tokens at `positions` (n,) of a text that began with `prompt` tokens.

    None where rope does not depend on them. What is cached stays as it was rotated: a prompt for its own length, a token
    after it for the length then (dynamic), or still for the prompt's (qwen_ntk).
    """
    if config.rope["rope_type"] == "qwen_ntk":
        return np.full(len(positions), prompt, np.int64)
    return np.maximum(positions + 1, prompt) if config.rope["rope_type"] == "dynamic" else None


def stretch(config, prompt):
    """What turning_lengths() of a prompt of so many tokens make of it: prompts of equal numbers are turned alike."""
    if config.rope["rope_type"] == "qwen_ntk":
        return ((prompt - 1) // config.rope["original_max_position_embeddings"]).bit_length()  # doublings
    return max(prompt, config.max_position_embeddings) if config.rope["rope_type"] == "dynamic" else 0


def two_positions(config, input_ids, position_ids, rows):
    """ChatGLM-6B's positions (B, T, 2) and FlashMask rows (B, 1, T, 2), for whole samples (upstream of Du et al., 2103.10360).

    A sample is a context, whose tokens all see each other, and from <sop> (bos) on an answer, which is causal. The first
    position counts the context and stays at the mask token's place in the answer; the second is 0, then counts from 1.
    The mask token is [gMASK] if there is one, else [MASK]. A sample without <sop> is causal and all context. position_ids
    (B, T) restart at 0 with each sample; rows (B, 1, T, 1) or None are its causal rows.
    """
    B, T = input_ids.shape
    place = paddle.arange(T).unsqueeze(0).expand([B, T])
    first = paddle.cummax(paddle.where(position_ids == 0, place, paddle.zeros_like(place)), axis=1, dtype="int64")[0]
    never = paddle.full_like(place, 1 << 40)

    def next_one(found):  # (B, T): the place of the first such token of each token's sample; 1 << 40 if there is none
        after = paddle.cummin(paddle.where(found, place, never).flip(1), axis=1, dtype="int64")[0].flip(1)
        at = paddle.take_along_axis(after, first, axis=1)
        sample = paddle.take_along_axis(first, at.clip(max=T - 1), axis=1)
        return paddle.where((at < T) & (sample == first), at, never)

    source = config.source
    vocabulary = source["vocab_size"]
    start = next_one(input_ids == source.get("bos_token_id", vocabulary - 4))
    general = next_one(input_ids == source.get("gmask_token_id", vocabulary - 4))
    mask = paddle.where(general < T, general, next_one(input_ids == source.get("mask_token_id", vocabulary - 4)))
    mask = paddle.where(mask < T, mask, start)
    in_answer = place >= start
    answered = position_ids - (start - first)  # not place - start: two answers may share a context (dpo.py)
    positions = paddle.stack(
        [
            paddle.where(in_answer, mask - first, position_ids),
            paddle.where(in_answer, answered + 1, paddle.zeros_like(place)),
        ],
        axis=-1,
    )
    causal = in_answer | (start >= T)
    upper = paddle.where(causal, place, first)  # rows before it do not see the key
    upper = upper.astype("int32").reshape([B, 1, T, 1])
    if rows is None:
        rows = paddle.full([B, 1, T, 1], np.iinfo(np.int32).max, "int32")
    return positions, paddle.concat([rows, upper], axis=-1)


def two_positions_of(config, tokens, prompt):
    """Positions (n, 2) int64 and FlashMask rows (1, 1, n, 2) int32, numpy, of one text: a prompt of so many tokens, and its
    reply, which is causal and whose second position counts on."""
    ids, more = paddle.to_tensor([tokens[:prompt]]), np.arange(len(tokens) - prompt)
    found = two_positions(config, ids, paddle.arange(prompt).unsqueeze(0), None)
    positions, rows = (x[0].numpy() for x in found)
    steps = positions[-1] + np.stack([np.zeros_like(more), more + 1], axis=-1)
    causal = np.stack([np.full_like(more, np.iinfo(np.int32).max), prompt + more], axis=-1).astype(np.int32)
    return np.concatenate([positions, steps]), np.concatenate([rows, causal[None]], axis=1)[None]


def window_rows(rows, B, T, window):
    """FlashMask rows (B, 1, T, 1) under which a query also sees no key that is `window` or more before it; rows, if given,
    are of all T keys."""
    if rows is not None:
        T = _shape(rows)[2]
    end = (paddle.arange(T, dtype="int32") + window).reshape([1, 1, -1, 1])
    return end.expand([B, 1, T, 1]) if rows is None else paddle.minimum(rows, end)


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

    def product(self, x, bias=None):
        """x W, and a bias if one is given."""
        return kernels.linear(x, self.weight, bias)

    def norms(self, weight):
        """(out,) the lengths of the columns of a weight (in, out) in this one's place."""
        return weight.norm(axis=0)

    def whole_weight(self):
        """(in, out) float32, numpy; of a linear that is spread over processes, all of it."""
        return self.weight.astype("float32").numpy()


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
            tensors = {
                "qweight": ([n_in // per_word, n_out], "int32"),
                "scales": ([groups, n_out], "float32"),
                "qzeros": ([groups, n_out // per_word], "int32"),
                "g_index": ([n_in], "int32"),
            }
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
        y = self.product(x, self.bias)
        return y if residual is None else residual + y

    def product(self, x, bias=None):
        """x W, and a bias if one is given."""
        return kernels.quant_linear(
            x, self.qweight, self.scales, bias, self.scheme, self.qzeros, self._group_of_rows(), self.input_scale
        )

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


class Norm(nn.Layer):
    """RMSNorm (arXiv 1910.07467) or, with kind "layer", LayerNorm; `offset` is added to the weight."""

    def __init__(self, width, epsilon, kind="rms", offset=0.0):
        super().__init__()
        self.kind, self.epsilon, self.offset = kind, epsilon, offset
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0 - offset))
        # A bias of an RMSNorm: quantize.py's shift moves a constant out of the linears into it.
        self.bias = self.create_parameter([width], is_bias=True) if kind == "layer" else None

    def forward(self, x, residual=None):
        """The norm of x, or with a residual (the norm of h, h), h = x + residual."""
        if self.kind == "layer":
            return kernels.layer_norm(x, self.weight, self.bias, self.epsilon, residual)
        weight = self.weight + self.offset if self.offset else self.weight
        found = kernels.rms_norm(x, weight, self.epsilon, residual)
        if self.bias is None:
            return found
        return found + self.bias if residual is None else (found[0] + self.bias, found[1])

    def add_bias(self):
        self.bias = self.create_parameter(self.weight.shape, is_bias=True)


def _norm(config, width=None):
    return Norm(width or config.hidden_size, config.norm_eps, config.norm, config.norm_offset)


class Cache:
    """Keys and values of the tokens so far, a pair (B, T, K, Dh) a layer, and the mask rows that they came with."""

    def __init__(self, layers):
        self.keys, self.values = [None] * layers, [None] * layers
        self.rows = None  # (B, 1, tokens, 1 or 2) int32, once any token had rows
        self.last = None  # (B, 2) the last token's two positions, for rope_2d
        self.lengths = None  # (B, 1) of the samples when they were first seen, for qwen_ntk; see turning_lengths()
        self.tokens = 0
        self.prefix_tokens = 0  # trained prefixes stand before position 0 of the text

    def extend_rows(self, rows, B, T):
        """Append the rows of T new tokens (None: visible to all); returns those of all keys, in rows of the whole."""
        past, self.tokens = self.tokens, self.tokens + T
        if rows is None and self.rows is None:
            return None
        never = np.iinfo(np.int32).max
        columns = (rows if rows is not None else self.rows).shape[-1]
        before = self.rows if self.rows is not None else self._visible(B, past, columns)
        new = rows.clip(max=never - past) + past if rows is not None else self._visible(B, T, columns)
        self.rows = paddle.concat([before, new], axis=2)
        return self.rows

    @staticmethod
    def _visible(B, T, columns):
        """Rows of keys that every row sees, or with two columns every row."""
        rows = paddle.full([B, 1, T, 1], np.iinfo(np.int32).max, "int32")
        return rows if columns == 1 else paddle.concat([rows, paddle.zeros_like(rows)], axis=-1)


class PrefixPlaces:
    """A prefix before each sample of a row, for attention where distances count (ALiBi, windows).

    A cache has its prefix once, before everything: right for one sample a row, and, where nothing depends on the
    distance, for packed and left-padded rows too. Here keys and values stand as (prefix, sample), (prefix, sample), …
    during attention, each pair as it would be alone; rows with fewer samples than others begin with places nobody sees.
    """

    def __init__(self, position_ids, rows, P):
        """position_ids (B, T); rows (B, 1, T, 1); a prefix of P tokens."""
        (B, T), positions, ends = position_ids.shape, position_ids.numpy(), rows.numpy()[:, 0, :, 0].astype(np.int64)
        seen = ends > np.arange(T)  # padding on the left is not: it begins no sample
        first = seen & ((positions == 0) | (seen.cumsum(1) == 1))
        most = int(first.sum(1).max())
        width = T + P * most
        prefixes = most - first.sum(1, keepdims=True) + first.cumsum(1)  # that stand before each token of the text
        places = np.arange(T) + P * prefixes  # (B, T)
        never = np.iinfo(np.int32).max
        ends = np.where(
            ends < T, np.take_along_axis(places, ends.clip(0, T - 1), 1), np.minimum(ends + width - T, never)
        )
        self.rows = np.zeros((B, 1, width, 1), np.int32)
        source = np.zeros((B, width), np.int64)  # of each key, among the prefix's P and the text's T
        for b in range(B):
            source[b, places[b]], self.rows[b, 0, places[b], 0] = P + np.arange(T), np.where(seen[b], ends[b], 0)
            for t in np.flatnonzero(first[b]):
                before = np.s_[places[b, t] - P : places[b, t]]
                source[b, before], self.rows[b, 0, before, 0] = np.arange(P), ends[b, t]
        self.B, self.width, self.rows = B, width, paddle.to_tensor(self.rows)
        self.keys_from = paddle.to_tensor((source + np.arange(B)[:, None] * (P + T)).flatten())
        self.queries_from = paddle.to_tensor(((source - P).clip(0) + np.arange(B)[:, None] * T).flatten())
        self.back = paddle.to_tensor((places + np.arange(B)[:, None] * width).flatten())

    def keys(self, prefix, text):
        """(B, P, K, Dh) and (B, T, K, Dh) -> (B, width, K, Dh)"""
        return self._take(paddle.concat([prefix, text], axis=1), self.keys_from)

    def queries(self, q):
        """(B, T, H, Dh) -> (B, width, H, Dh), anything where there is no text."""
        return self._take(q, self.queries_from)

    def text(self, mixed):
        """(B, width, H, Dh) -> (B, T, H, Dh)"""
        return self._take(mixed, self.back)

    def _take(self, x, index):
        return paddle.index_select(x.flatten(0, 1), index).reshape([self.B, -1, *x.shape[2:]])


def alibi_slopes(heads):
    """(H,) float32: the rate at which each head's attention falls with distance (Press et al., arXiv 2108.12409, 3)."""
    # Where H is no power of two: the slopes of the one below it, then every other of the next one's.
    below = 1 << int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / below) for i in range(heads - below)]
    return np.array(slopes, np.float32)


class Attention(nn.Layer):
    order_back = (2, 0, 1)  # in which backward reaches what project() gives: v is not rotated

    def __init__(self, config, layer):
        super().__init__()
        D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.head_dim, self.group = config, Dh, H // K
        self.window = config.windows[layer] if config.windows else None
        self.options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        self.slopes = alibi_slopes(H) if config.position == "alibi" else None
        self.make_projections(config)
        self.o_proj = Linear(H * self.value_dim, D, config.output_bias)

    def make_projections(self, config):
        D, H, K, Dh, bias = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
        )
        self.value_dim = Dh
        if config.fused_qkv:
            self.qkv_proj = Linear(D, (H + 2 * K) * Dh, bias)
        else:
            self.q_proj = Linear(D, H * Dh, bias)
            self.k_proj = Linear(D, K * Dh, bias)
            self.v_proj = Linear(D, K * Dh, bias)
        self.q_norm = Norm(Dh, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(Dh, config.norm_eps) if config.qk_norm else None

    def forward(self, x, cos, sin, rows, past_k, past_v, attend=None, q_scale=None, spread=None, again=None):
        """x (B, T, D) -> (B, T, D), and all keys and values (B, past + T, K, Dh).

        rows: FlashMask rows of all keys, the window among them; one column is causal, two are not. attend: a function
        (q, k, v, **options) -> (B, T, H, Dh) in place of kernels.attention, for a cache that keeps k and v itself.
        q_scale (B, T, 1, 1): a factor on every query. spread: PrefixPlaces, whose prefix is past_k and past_v. again: as in
        Block.forward; "core_attn" is all behind the first linears.
        """
        states, more = self.project(x), (cos, sin, rows, past_k, past_v, q_scale, spread)
        if again is None:
            return self.core(*states, *more, attend)
        order = (0, 1, 2) if cos is None else self.order_back  # so that sums of gradients have the same bits as without

        def core(*inputs):
            return self.core(*(inputs[order.index(i)] for i in range(3)), *inputs[3:])[0]

        return again[1](core, *(states[i] for i in order), *more), None, None

    def output(self, x, cos, sin, rows, past_k, past_v, q_scale, spread):
        """forward() without keys and values."""
        return self(x, cos, sin, rows, past_k, past_v, q_scale=q_scale, spread=spread)[0]

    def core(self, q, k, v, cos, sin, rows, past_k, past_v, q_scale, spread, attend=None):
        """What forward() gives, from what project() gives."""
        q, k, v = self.rotated(q, k, v, cos, sin)
        q = q if q_scale is None else q * q_scale
        slopes = None if self.slopes is None else kernels.to_tensor(self.slopes)
        if attend is not None:
            mixed, k, v = attend(q, k, v, alibi_slopes=slopes, window=self.window, **self.options), None, None
        else:
            mixed, k, v = self.mixed(q, k, v, slopes, rows, past_k, past_v, spread)
        if self.value_dim != self.head_dim:
            mixed = mixed[..., : self.value_dim]  # values were padded to the width of keys
        return self.o_proj(mixed.reshape([0, 0, -1])), k, v

    def mixed(self, q, k, v, slopes, rows, past_k, past_v, spread):
        """q (B, T, H, Dh) over past and new keys -> (B, T, H, Dh), and all of these keys and values."""
        if spread is not None:
            q, k, v = spread.queries(q), spread.keys(past_k, k), spread.keys(past_v, v)
        elif past_k is not None:
            k, v = paddle.concat([past_k, k], axis=1), paddle.concat([past_v, v], axis=1)
        causal = rows is None or rows.shape[-1] == 1
        mixed = kernels.attention(q, k, v, rows, causal, alibi_slopes=slopes, **self.options)
        return mixed if spread is None else spread.text(mixed), k, v

    def rotated(self, q, k, v, cos, sin):
        """What project() gives -> q (B, T, H/tp, Dh), k and v (B, T, K/tp, Dh), with their positions."""
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is None:
            return q, k, v
        if self.config.position == "rope_2d":  # each half of a head turns with one of the two positions
            half = self.head_dim // 2
            q, k = (
                paddle.concat(
                    [
                        kernels.rope(part[..., :half], cos[..., :half], sin[..., :half]),
                        kernels.rope(part[..., half:], cos[..., half:], sin[..., half:]),
                    ],
                    axis=-1,
                )
                for part in (q, k)
            )
            return q, k, v
        interleaved = self.config.rope_interleaved
        return kernels.rope(q, cos, sin, interleaved), kernels.rope(k, cos, sin, interleaved), v

    def project(self, x):
        """What the first linears make of x (B, T, D), all that rotated() reads: q (B, T, H/tp, Dh), k, v (B, T, K/tp, Dh)."""
        Dh, G = self.head_dim, self.group
        if self.config.fused_qkv is None:
            return tuple(p(x).reshape([0, 0, -1, Dh]) for p in (self.q_proj, self.k_proj, self.v_proj))  # 0 keeps a dim
        qkv = self.qkv_proj(x)  # (B, T, (H + 2K)/tp · Dh)
        if self.config.fused_qkv == "blocks":
            K = qkv.shape[-1] // ((G + 2) * Dh)
            return tuple(t.reshape([0, 0, -1, Dh]) for t in qkv.split([G * K * Dh, K * Dh, K * Dh], axis=-1))
        q, k, v = qkv.reshape([0, 0, -1, G + 2, Dh]).split([G, 1, 1], axis=3)  # (B, T, K/tp, G | 1 | 1, Dh)
        return q.reshape([0, 0, -1, Dh]), k.squeeze(3), v.squeeze(3)


class LatentAttention(Attention):
    """Attention whose queries and keys come through narrow layers (see Latent); keys and values are kept in full."""

    order_back = (0, 1, 2)

    def make_projections(self, config):
        D, H, latent = config.hidden_size, config.num_attention_heads, config.latent
        self.value_dim = latent.value_dim
        width = H * (latent.nope_dim + latent.rope_dim)
        if latent.q_rank:
            self.q_a_proj = Linear(D, latent.q_rank, config.attention_bias)
            self.q_a_norm = Norm(latent.q_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(latent.q_rank, width, False)
        else:
            self.q_proj = Linear(D, width, False)
        self.kv_a_proj = Linear(D, latent.kv_rank + latent.rope_dim, config.attention_bias)
        self.kv_a_norm = Norm(latent.kv_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(latent.kv_rank, H * (latent.nope_dim + latent.value_dim), False)

    def project(self, x):
        """q (B, T, H/tp, nope + rope), keys and values (B, T, H/tp, nope + value), the heads' common key (B, T, rope)."""
        latent = self.config.latent
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if latent.q_rank else self.q_proj(x)
        narrow, k_rope = self.kv_a_proj(x).split([latent.kv_rank, latent.rope_dim], axis=-1)
        kv = self.kv_b_proj(self.kv_a_norm(narrow)).reshape([0, 0, -1, latent.nope_dim + latent.value_dim])
        return q.reshape([0, 0, -1, self.head_dim]), kv, k_rope

    def rotated(self, q, kv, k_rope, cos, sin):
        latent, interleaved = self.config.latent, self.config.rope_interleaved
        q_nope, q_rope = q.split([latent.nope_dim, latent.rope_dim], axis=-1)
        k_nope, v = kv.split([latent.nope_dim, latent.value_dim], axis=-1)
        q_rope = kernels.rope(q_rope, cos, sin, interleaved)
        k_rope = kernels.rope(k_rope.unsqueeze(2), cos, sin, interleaved)  # (B, T, 1, rope)
        k_rope = k_rope.expand([-1, -1, _shape(k_nope)[2], -1])
        q, k = paddle.concat([q_nope, q_rope], axis=-1), paddle.concat([k_nope, k_rope], axis=-1)
        return q, k, _padded(v, self.head_dim)


LATENT_NORM_EPS = 1e-6  # whatever config.json says of the other norms


def _padded(x, width):
    """x (…, n) -> (…, width), zeros behind."""
    more = width - x.shape[-1]
    return x if more <= 0 else F.pad(x, [0, 0] * (x.ndim - 1) + [0, more])


def _shape(x):
    """x.shape, also while a graph is traced, where it is -1 in part."""
    return x.shape if paddle.in_dynamic_mode() else paddle.shape(x)


def _activate(x, kind):
    if kind == "relu":
        return F.relu(x)
    return F.silu(x) if kind == "silu" else kernels.gelu(x, kind == "gelu_tanh")


class MLP(nn.Layer):
    """down(act(gate) · up) or, not gated, down(act(up)); of `width` in place of the config's."""

    def __init__(self, config, width=None):
        super().__init__()
        D, width = config.hidden_size, width or config.intermediate_size
        self.activation, self.gated = config.activation, config.gated
        self.gate_proj = self.up_proj = self.gate_up_proj = None
        if config.fused_gate_up:
            self.gate_up_proj = Linear(D, 2 * width, config.mlp_bias)
        else:
            self.gate_proj = Linear(D, width, config.mlp_bias) if config.gated else None
            self.up_proj = Linear(D, width, config.mlp_bias)
        self.down_proj = Linear(width, D, config.mlp_bias)

    def forward(self, x, residual=None):
        """x (B, T, D) -> (B, T, D), residual added if given."""
        if not self.gated:
            return self.down_proj(_activate(self.up_proj(x), self.activation), residual)
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)  # (B, T, F/tp)
        if self.activation == "silu":
            return self.down_proj(kernels.swiglu(gate, up), residual)
        return self.down_proj(kernels.geglu(gate, up, self.activation == "gelu_tanh"), residual)


def choose_experts(choice, how):
    """(N, E) -> (N, k): the ids of the highest, from the best groups where there are groups."""
    if how.groups > 1:
        grouped = choice.reshape([-1, how.groups, how.count // how.groups])
        best = paddle.topk(grouped, how.group_score_of, axis=-1)[0].sum(-1)  # (N, groups)
        kept = F.one_hot(paddle.topk(best, how.chosen_groups, axis=-1)[1], how.groups).sum(1)  # (N, groups)
        lost = paddle.full_like(grouped, -math.inf)
        choice = paddle.where(kept.unsqueeze(-1).expand(grouped.shape) > 0, grouped, lost).reshape([-1, how.count])
    return paddle.topk(choice, how.top_k, axis=-1)[1]


class SparseMLP(nn.Layer):
    """A sum over the top_k experts of each token, weighted by the router, and the shared expert (see Experts)."""

    def __init__(self, config):
        super().__init__()
        self.how = how = config.experts
        self.router = Linear(config.hidden_size, how.count, False)
        self.experts = nn.LayerList([MLP(config, how.width) for _ in range(how.count)])
        self.shared = MLP(config, how.shared_width) if how.shared_width else None
        self.shared_gate = Linear(config.hidden_size, 1, False) if how.shared_gate else None
        if how.choice_bias:
            self.register_buffer("choice_bias", paddle.zeros([how.count]))

    def forward(self, x, residual=None):
        """x (B, T, D) -> ((B, T, D), the router's probabilities (B · T, E) float32)"""
        mixed, probabilities = self.mixture(x)
        return mixed if residual is None else residual + mixed, probabilities

    def mixture(self, x):
        """What forward() gives, without a residual."""
        flat = x.reshape([-1, x.shape[-1]])  # (N, D)
        weights, chosen, probabilities = self.route(flat)
        mixed = self.mix(flat, weights, chosen).reshape(_shape(x))
        if self.shared is not None:
            shared = self.shared(x)
            mixed = mixed + (shared if self.shared_gate is None else F.sigmoid(self.shared_gate(x)) * shared)
        return mixed, probabilities

    def route(self, flat):
        """(N, D) -> weights (N, k) float32 and ids (N, k) of the chosen experts, probabilities (N, E)."""
        how = self.how
        logits = paddle.matmul(flat.astype("float32"), self.router.weight.astype("float32"))
        scores = F.sigmoid(logits) if how.scoring == "sigmoid" else F.softmax(logits, axis=-1)
        choice = scores.detach() + self.choice_bias if how.choice_bias else scores.detach()
        chosen = choose_experts(choice, how)
        weights = paddle.take_along_axis(scores, chosen, axis=-1)
        if how.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * how.scale, chosen, scores

    def mix(self, flat, weights, chosen):
        """Every expert on the tokens that chose it, which stand together after a sort; the sum in the order of choice."""
        k = chosen.shape[-1]
        if (
            not paddle.in_dynamic_mode()
        ):  # a static graph has no shapes that depend on values: all experts on all tokens
            share = (F.one_hot(chosen, self.how.count) * weights.unsqueeze(-1)).sum(1)  # (N, E)
            return sum(expert(flat) * share[:, e : e + 1] for e, expert in enumerate(self.experts))
        ids = chosen.flatten()  # (N · k,)
        order = paddle.argsort(ids, stable=True)
        counts = np.bincount(ids.numpy(), minlength=self.how.count)
        mixed = self.outputs(paddle.index_select(flat, order // k), counts)
        back = paddle.argsort(order)  # where each of a token's choices stands
        mixed = paddle.index_select(mixed, back).reshape([-1, k, flat.shape[-1]])
        return (mixed * weights.unsqueeze(-1).astype(mixed.dtype)).sum(1)

    def outputs(self, tokens, counts):
        """(n, D), the tokens of one expert behind those of another, so many of each -> (n, D), what the experts make of them."""
        parts = paddle.split(tokens, [int(n) for n in counts if n])
        used = [expert for expert, n in zip(self.experts, counts) if n]
        return paddle.concat([expert(part) for expert, part in zip(used, parts)])


def load_balancing_loss(probabilities, how, real):
    """E · sum over experts of (share of the tokens that chose it) · (its mean probability), arXiv 2101.03961, Eq. 4-6.

    probabilities: (B · T, E) of each sparse layer; shares and means are over the tokens of all layers together for which
    real (B, T) is 1. With how.aux_by_layer over those of one layer, and with aux_by_sequence of one row of it; their losses
    are averaged over rows and added up over layers, and shares are of all choices.
    """
    E, rows = how.count, len(real) if how.aux_by_layer and how.aux_by_sequence else 1
    layers = probabilities if how.aux_by_layer else [paddle.concat(probabilities)]
    real, total = real.flatten().tile([len(probabilities) // len(layers)]).reshape([rows, -1, 1]), 0.0
    share = real / real.sum(1, keepdim=True).clip(min=1.0)  # adds up to 1
    for p in layers:
        chosen = F.one_hot(choose_experts(p.detach(), how), E).sum(1).reshape([rows, -1, E])
        p = p.reshape([rows, -1, E])
        total = total + ((chosen * share).sum(1) * (p * share).sum(1)).sum(-1).mean() * E
    return total / how.top_k if how.aux_by_layer else total


class Block(nn.Layer):
    def __init__(self, config, layer):
        super().__init__()
        sparse = config.experts is not None and layer not in config.experts.dense_layers
        self.place, self.residual_scale = config.norm_place, config.residual_scale
        self.attention_norm = _norm(config)
        self.attention = (LatentAttention if config.latent else Attention)(config, layer)
        self.mlp_norm = _norm(config)
        self.mlp = SparseMLP(config) if sparse else MLP(config)
        self.attention_post_norm = _norm(config) if self.place == "both" else None
        self.mlp_post_norm = _norm(config) if self.place == "both" else None

    def forward(
        self, x, cos, sin, rows=None, past_k=None, past_v=None, attend=None, q_scale=None, spread=None, again=None
    ):
        """(B, T, D), all keys, all values, and the router's probabilities (N, E) of a sparse block, else None.

        again: what is computed again in backward, "full_attn" (all of attention) or "core_attn", and CausalLM.recomputed; then
        keys and values are None.
        """

        def attention(x, added=False):
            """What attention makes of x, with x added or not, and keys and values."""
            if again is not None and again[0] == "full_attn":
                output = self.attention.output
                function = (
                    (lambda x, *more: x + output(x, *more)) if added else output
                )  # inside: sums have the same bits as without
                return again[1](function, x, cos, sin, rows, past_k, past_v, q_scale, spread), None, None
            mixed, k, v = self.attention(x, cos, sin, rows, past_k, past_v, attend, q_scale, spread, again)
            return (x + mixed if added else mixed), k, v

        if self.place == "after":
            x, k, v = attention(x, added=True)
            x = self.attention_norm(x)
            return self.mlp_norm(self.mlp(x, residual=x)), k, v, None
        y = self.attention_norm(x)
        mixed, k, v = attention(y)
        if self.residual_scale is not None:
            y = self.mlp_norm(y * self.residual_scale + mixed)
            return self.mlp(y, residual=y * self.residual_scale), k, v, None
        if self.place == "both":
            y, x = self.mlp_norm(self.attention_post_norm(mixed), x)
            return x + self.mlp_post_norm(self.mlp(y)), k, v, None
        y, x = self.mlp_norm(mixed, x)
        y, probabilities = (
            self.mlp(y, residual=x) if isinstance(self.mlp, SparseMLP) else (self.mlp(y, residual=x), None)
        )
        return y, k, v, probabilities

    def output(self, x, cos, sin, rows, past_k, past_v, q_scale, spread):
        """What is kept of a block whose activations are computed again in backward (arXiv 1604.06174): no keys and values."""
        y, _, _, probabilities = self.forward(x, cos, sin, rows, past_k, past_v, None, q_scale, spread)
        return y if probabilities is None else (y, probabilities)


class Shared(namedtuple("Shared", "cos sin q_scale rows narrowed spread")):
    """What all blocks of a pass read: rotary tables, a factor on queries, FlashMask rows, {window: rows}, PrefixPlaces or
    None."""

    def rows_of(self, block):
        return self.narrowed.get(block.attention.window, self.rows)


class Draws:
    """Randomness of one pass of a model: what is drawn under a key depends on it, on paddle.seed() and on the shape alone.

    So whoever has a part of the model or of its tokens draws what one process would, however much others have drawn.
    """

    number = 0

    def renew(self):
        self.number = int(paddle.randint(0, (1 << 31) - 1, [1])[0])

    @contextlib.contextmanager
    def under(self, key, number=None):
        """What is drawn inside is drawn under this key, and leaves no trace outside. number: of another pass."""
        states = paddle.get_rng_state("cpu"), paddle.get_rng_state()
        paddle.seed(zlib.crc32(f"{self.number if number is None else number} {key}".encode()))
        try:
            yield
        finally:
            paddle.set_rng_state(states[0], "cpu")
            paddle.set_rng_state(states[1])


class CausalLM(nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.draws = Draws()
        self.config, width = config, config.embedding_size or config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions = None
        if config.position == "learned":
            self.embed_positions = nn.Embedding(
                config.max_position_embeddings + config.position_offset, config.hidden_size
            )
        projected = width != config.hidden_size
        self.project_in = Linear(width, config.hidden_size, bias=False) if projected else None
        self.project_out = Linear(config.hidden_size, width, bias=False) if projected else None
        self.embed_norm = _norm(config) if config.embedding_norm else None
        self.layers = nn.LayerList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = _norm(config) if config.final_norm else None
        self.lm_head = None if config.tie_word_embeddings else Linear(width, config.vocab_size, bias=False)
        self.prefix = None  # set by apply_prefix()
        self.distances_count = config.position == "alibi" or any(config.windows)  # between query and key
        self.elsewhere = frozenset()  # names of weights that other processes hold
        self.recompute = False  # compute activations again in backward instead of keeping them, of each block …
        self.recompute_granularity = (
            "full"  # … all, "full_attn": attention's, "core_attn": those behind its first linears, …
        )
        self.no_recompute_layers = frozenset()  # … but not of these
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
        additions=True,
    ):
        """input_ids (B, T) int64 -> logits (B, T, V), or with labels (B, T) -> losses (B, T) float32, 0 where -100.

        position_ids (B, T) default to 0…T-1 after what `caches` (a Cache, extended in place) holds; startend_row_indices
        (B, 1, T, 1) int32 are FlashMask rows. labels are already shifted: labels[t] is the target of position t.
        return_predictions: (losses, argmax ids (B, T) int64). While training, a family's own additions to the loss (of the
        router's balance, of large logits), which belong to the batch, are added to every loss that counts; additions=False
        leaves them out, for whoever wants log-probabilities.
        """
        x, probabilities = self.trunk(input_ids, position_ids, startend_row_indices, caches)
        if labels is None:
            return self.logits(x)
        return self.losses(x, probabilities, labels, return_predictions, additions)

    def losses(self, x, probabilities, labels, return_predictions=False, additions=True):
        """What forward() gives for labels, from trunk()'s hidden states (B, T, D) and probabilities."""
        x = self.read_by_head(x)
        weight, tied = self.head_weight()
        flat = x.reshape([-1, x.shape[-1]])
        found = self.cross_entropy(flat, weight, labels.flatten(), tied, return_predictions)
        losses = (found[0] if return_predictions else found).reshape(labels.shape)
        if (
            self.training
            and additions
            and (more := self.additions(flat, labels, weight, tied, probabilities)) is not None
        ):
            losses = losses + more * (labels != -100).astype(losses.dtype)
        return (losses, found[1].reshape(labels.shape)) if return_predictions else losses

    def read_by_head(self, x):
        """Hidden states (…, D) -> what the head multiplies."""
        return x if self.project_out is None else self.project_out(x)

    def cross_entropy(self, x, weight, labels, tied, return_predictions):
        """x (N, D) and labels (N,) -> losses (N,), and argmax ids (N,) if asked for."""
        return kernels.linear_cross_entropy(
            x,
            weight,
            labels,
            transpose_weight=tied,
            return_predictions=return_predictions,
            softcap=self.config.final_softcap,
        )

    def additions(self, x, labels, weight, tied, probabilities):
        """What a family adds to the mean loss of a batch, a scalar; None: nothing.

        Over the tokens up to the last label of each row: what stands behind it is padding, which would be balanced too.
        """
        config, more = self.config, None
        if not config.z_loss_weight and not (probabilities and config.experts.aux_loss_coef):
            return None
        real = (self.of_all(labels.flatten(), labels.shape).reshape([labels.shape[0], -1]) != -100).astype("float32")
        real = (real.flip(1).cumsum(1).flip(1) > 0).astype("float32")  # (B, T)
        if probabilities and config.experts.aux_loss_coef:
            probabilities = [self.of_all(p, labels.shape) for p in probabilities]
            more = load_balancing_loss(probabilities, config.experts, real) * config.experts.aux_loss_coef
        if config.z_loss_weight:
            largest = self.of_all(self.largest_logits(x, weight, tied), labels.shape)
            mean = (largest.square() * real.flatten()).sum() / real.sum().clip(min=1.0)
            more = (0.0 if more is None else more) + config.z_loss_weight * mean
        return more

    def largest_logits(self, x, weight, tied):
        """x (N, D) -> each row's largest logit (N,): found without gradient, then computed again alone."""
        with paddle.no_grad():
            best = paddle.concat(
                [
                    kernels.linear(part, weight.T if tied else weight).argmax(-1)
                    for part in x.split(-(-x.shape[0] // Z_LOSS_ROWS))
                ]
            )
        return (x * kernels.embedding(best, weight if tied else weight.T)).sum(-1)

    def head_weight(self):
        """The head's weight and whether it lies as (V, D), as a tied one does, in place of (D, V)."""
        if self.lm_head is None:
            return self.embed_tokens.weight, True
        if self.config.norm_head:
            weight = self.lm_head.weight.astype("float32")
            return weight / weight.norm(axis=0, keepdim=True).clip(min=1e-12), False
        return self.lm_head.weight, False

    def logits(self, x):
        """hidden states (…, D), after the final norm -> (…, V)"""
        x = self.read_by_head(x)
        weight, tied = self.head_weight()
        logits = (
            paddle.matmul(x, weight, transpose_y=True) if tied else kernels.linear(x, weight)
        )  # weight.T would be a copy
        cap = self.config.final_softcap
        return logits if cap is None else paddle.tanh(logits / cap) * cap

    def hidden_states(self, input_ids, position_ids=None, rows=None, caches=None):
        """(B, T, D) after the final norm; arguments as in forward.

        caches may also be any object with attend(layer, q, k, v, **options) -> (B, T, H, Dh), prefix_tokens and lengths
        (see turning_lengths()), which then keeps keys and values itself (serve.py's pool of blocks); position_ids, for
        rope_2d (B, T, 2), must be given with it.
        """
        return self.trunk(input_ids, position_ids, rows, caches)[0]

    def trunk(self, input_ids, position_ids=None, rows=None, caches=None):
        """hidden_states(), and a list of the probabilities (N, E) of each sparse block's router."""
        paged = caches is not None and not isinstance(caches, Cache)
        assert not paged or position_ids is not None, "a paged cache does not know the positions"
        self.begin(input_ids, caches)
        if caches is None and self.prefix is not None:
            caches = self.new_cache(input_ids.shape[0])
        x, shared = self.prepare(input_ids, position_ids, rows, caches)
        x, probabilities = self.through(range(len(self.layers)), x, shared, caches)
        return self.last_norm(x), probabilities

    def begin(self, input_ids, caches):
        """A pass begins."""
        if self.training:
            self.draws.renew()

    def through(self, places, x, shared, caches=None):
        """x (B, T, D) after the blocks at these places, one after another, and the probabilities of the sparse ones' routers."""
        paged = caches is not None and not isinstance(caches, Cache)
        turns, probabilities = (shared.cos, shared.sin), []
        for i in places:
            block = self.layers[i]
            if paged:
                x, *_, routed = block(x, *turns, attend=functools.partial(caches.attend, i), q_scale=shared.q_scale)
                continue
            seen = shared.rows_of(block)
            past = (None, None) if caches is None else (caches.keys[i], caches.values[i])
            again = self.recomputes(i)
            if again == "full":
                found = self.recomputed(block.output, x, *turns, seen, *past, shared.q_scale, shared.spread)
                x, routed = found if isinstance(found, (tuple, list)) else (found, None)
            else:
                x, k, v, routed = block(
                    x,
                    *turns,
                    seen,
                    *past,
                    q_scale=shared.q_scale,
                    spread=shared.spread,
                    again=again and (again, self.recomputed),
                )
                if caches is not None and k is not None:
                    caches.keys[i], caches.values[i] = k, v
            if routed is not None:
                probabilities.append(routed)
        return x, probabilities

    def last_norm(self, x):
        return x if self.norm is None else self.norm(x)

    def recomputes(self, layer):
        """What of this layer is not kept but computed again in backward: a granularity or None."""
        return (
            self.recompute_granularity
            if self.recompute and self.training and layer not in self.no_recompute_layers
            else None
        )

    def recomputed(self, function, *arguments):
        """function(*arguments), whose activations are not kept but made again in backward, with the same randomness."""
        number = self.draws.number

        def same(*arguments):
            self.draws.number = number
            return function(*arguments)

        return paddle.distributed.fleet.utils.recompute(same, *arguments)

    def prepare(self, input_ids, position_ids=None, rows=None, caches=None):
        """What the first block reads (B, T, D), and Shared; arguments as in hidden_states()."""
        B, T = input_ids.shape
        kept = isinstance(caches, Cache)
        before = 0 if caches is None else caches.prefix_tokens
        if position_ids is None:
            position_ids = (paddle.arange(T) + (caches.tokens if kept else 0) - before).unsqueeze(0).expand([B, T])
        x = self.embed(input_ids, position_ids, before)
        if self.config.position == "rope_2d" and position_ids.ndim == 2:
            position_ids, rows = self._two_positions(input_ids, position_ids, rows, caches)
        spread = None
        if rows is not None and self.distances_count and kept and before and caches.tokens == before:
            spread = PrefixPlaces(position_ids, rows, before)
            caches.rows, caches.tokens, rows = spread.rows, spread.width, spread.rows
        elif kept:
            rows = caches.extend_rows(rows, B, T)
        cos, sin, q_scale = self._turns(position_ids, before, caches)
        narrowed = {
            w: window_rows(rows, B, caches.tokens if kept else T, w)
            for w in set(self.config.windows) - {None}
            if kept or caches is None
        }
        return x, Shared(cos, sin, q_scale, rows, narrowed, spread)

    def embed(self, input_ids, position_ids, before=0):
        """Ids and positions (B, T) -> (B, T, D), what the first block reads; `before` tokens of a prefix stand in front."""
        config = self.config
        x = self.look_up(input_ids)
        if self.training and self.neftune_noise_alpha:
            size = paddle.sqrt(document_lengths(position_ids).astype("float32") * x.shape[-1]).unsqueeze(
                -1
            )  # (B, T, 1)
            noise = self.noise([*input_ids.shape, x.shape[-1]]).astype(x.dtype)
            x = x + self.kept(noise * (self.neftune_noise_alpha / size).astype(x.dtype))
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            places = self.kept(position_ids) + before + config.position_offset
            x = x + kernels.embedding(places, self.embed_positions.weight)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.recompute and self.training and x.stop_gradient:
            x.stop_gradient = False  # Paddle's recompute passes gradients to adapters only where an input has one
        return x

    def noise(self, shape):
        """NEFTune's, uniform in [-1, 1), for the embeddings of these tokens: shape (B, T, D)."""
        with self.draws.under("noise"):
            return paddle.uniform(shape, "float32", -1.0, 1.0)

    def look_up(self, input_ids):
        """Ids (B, T) -> their rows of the embedding (B, T, D)."""
        return kernels.embedding(input_ids, self.embed_tokens.weight)

    def kept(self, x):
        """The tokens of x (B, T, …) whose activations this model keeps: all of them."""
        return x

    def of_all(self, x, shape):
        """x (N, …) of the tokens whose losses this model computes, rows of this shape -> of all tokens of the batch: they are."""
        return x

    def _two_positions(self, input_ids, position_ids, rows, cache):
        """two_positions(), and for tokens after those that a cache holds: the answer goes on."""
        if cache is None or cache.last is None:
            position_ids, rows = two_positions(self.config, input_ids, position_ids, rows)
        else:
            B, T = input_ids.shape
            steps = paddle.stack([paddle.zeros([T], "int64"), paddle.arange(1, T + 1)], axis=-1)
            position_ids = cache.last.unsqueeze(1) + steps  # (B, T, 2)
            upper = paddle.arange(T, dtype="int32").reshape([1, 1, T, 1]).expand([B, 1, T, 1])
            rows = paddle.full([B, 1, T, 1], np.iinfo(np.int32).max, "int32") if rows is None else rows
            rows = paddle.concat([rows, upper], axis=-1)
        if cache is not None:
            cache.last = position_ids[:, -1]
        return position_ids, rows

    def _turns(self, position_ids, before, cache):
        """cos, sin, and what queries are multiplied by (B, T, 1, 1), or None."""
        config, lengths, q_scale = self.config, None if cache is None else cache.lengths, None
        if config.rope["rope_type"] == "qwen_ntk":
            if self.training:  # trained at its own length, without stretching
                config = dataclasses.replace(config, rope={**config.rope, "rope_type": "default"})
            elif isinstance(cache, Cache):  # keys are kept as they were rotated at first
                lengths = document_lengths(position_ids) + before if lengths is None else lengths
                cache.lengths = lengths[:, -1:]
        if (
            config.logn_length is not None and not self.training
        ):  # Su, "attention from the view of entropy invariance", 2021
            place = (position_ids + before + 1).astype("float32")
            q_scale = paddle.clip(paddle.log(place) / math.log(config.logn_length), min=1.0).unsqueeze(-1).unsqueeze(-1)
        if config.position == "rope_2d":
            before = 0  # a prefix has no place in the context
        return *rope_tables(config, position_ids + before, lengths), q_scale

    def num_parameters(self, trained=False):
        """Of the whole model, also where this process has a part of it. trained: those alone that have a gradient."""
        return sum(math.prod(p.shape) for p in self.parameters() if not (trained and p.stop_gradient))

    def flops_per_token(self, T):
        """Floating-point operations of one token's forward and backward in a causal sequence of T (arXiv 2204.02311, B).

        6 per weight of every linear that a token passes (the head too; embedding look-ups are free), and 12 · H · Dh · T/2
        a layer for attention.
        """
        c = self.config
        share = c.experts.top_k / c.experts.count if c.experts else 1.0
        weights = 0.0
        for name, layer in self.named_sublayers():
            if isinstance(layer, (Linear, QuantLinear)) and "prefix." not in name:
                weights += layer.n_in * layer.n_out * (share if ".experts." in name else 1.0)
        if self.lm_head is None:
            weights += c.vocab_size * self.embed_tokens.weight.shape[1]
        width = c.head_dim if c.latent is None else (c.head_dim + c.latent.value_dim) / 2
        return 6.0 * weights + 6.0 * c.num_hidden_layers * c.num_attention_heads * width * T


Z_LOSS_ROWS = 1024  # tokens whose logits are held at once while the largest is looked for


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
    return _as_float32(array, dtype).reshape(shape)


class StoredTensor:
    """A tensor of a safetensors file: called, it is read whole; ranges() reads no more than it is asked for.

    bytes_read: by all of them in this process.
    """

    bytes_read = 0

    def __init__(self, path, entry):
        self.path, self.entry = path, entry

    def __call__(self):
        StoredTensor.bytes_read += self.entry[3] - self.entry[2]
        return read_tensor(self.path, self.entry)

    def ranges(self, cuts):
        """The part of it that cuts, {dim: [(start, stop), …]}, leave of these dims; read row by row of those before the last."""
        dtype, shape, begin, _ = self.entry
        kind, dim = np.dtype(_SAFETENSORS[dtype]), max(cuts)
        cuts = {i: cuts.get(i, [(0, n)]) for i, n in enumerate(shape)}
        found = np.empty([sum(last - first for first, last in ranges) for ranges in cuts.values()], kind)
        inner, room, at = (
            math.prod(found.shape[dim + 1 :]) * kind.itemsize,
            memoryview(found.reshape([-1]).view(np.uint8)),
            0,
        )
        before = [[i for first, last in cuts[d] for i in range(first, last)] for d in range(dim)]
        with open(self.path, "rb", buffering=0) as file:
            for places in itertools.product(*before):
                row = functools.reduce(lambda row, place: row * place[1] + place[0], zip(places, shape), 0)
                for first, last in cuts[dim]:
                    size, start = (last - first) * inner, begin + (row * shape[dim] + first) * inner
                    while size:
                        done = os.preadv(file.fileno(), [room[at : at + size]], start)
                        if not done:
                            raise UserError(f"{self.path}: truncated at byte {start}")
                        at, start, size = at + done, start + done, size - done
        StoredTensor.bytes_read += found.nbytes
        return _as_float32(found, dtype)


def _as_float32(array, dtype):
    """What lies in a file as float16 or bfloat16, as float32; all else as it is."""
    if dtype == "BF16":
        return from_bfloat16(array)
    return array.astype(np.float32) if dtype == "F16" else array


def read_safetensors(path):
    """All of {name: array}."""
    return {name: read_tensor(path, entry) for name, entry in safetensors_header(path).items()}


def write_safetensors(path, tensors, metadata=None, sync=True):
    """Write {name: array, or a function that returns it} to `path`, atomically, one tensor in memory at a time.

    With functions, the value is (function, shape, dtype); "bfloat16" and "float16" convert what the function returns.
    Returns {"size", "crc32"} of the file. sync: wait until the disk has it.
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
    start = struct.pack("<Q", len(text)) + text
    size, checksum = len(start) + offset, zlib.crc32(start)
    with atomic_file(path, "wb", sync) as file:
        file.write(start)
        for name, value in tensors.items():
            array = value[0]() if isinstance(value, tuple) else value
            if header[name]["dtype"] == "BF16":
                array = to_bfloat16(array)
            array = np.ascontiguousarray(_rows(array), _SAFETENSORS[header[name]["dtype"]])
            assert array.nbytes == np.diff(header[name]["data_offsets"])[0], (name, array.shape, header[name])
            file.write(array.data)
            checksum = zlib.crc32(array.reshape([-1]).view(np.uint8), checksum)
    return {"size": size, "crc32": checksum}


def _rows(array):
    """A transposed matrix laid out anew, 16 rows of the original at a time: five times as fast as all at once."""
    if array.ndim != 2 or array.flags.c_contiguous or not array.flags.f_contiguous:
        return array
    found, original = np.empty(array.shape, array.dtype), array.T
    for i in range(0, len(original), 16):
        found[:, i : i + 16] = original[i : i + 16].T
    return found


@contextlib.contextmanager
def atomic_file(path, mode="w", sync=True):
    """A file that is complete or not there: written under a temporary name, synced, renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_BinTensor = namedtuple("_BinTensor", "storage where offset size stride")


class _TensorUnpickler(pickle.Unpickler):
    """Reads the pickle inside a torch .bin file: tensors in dicts and lists. Any other object is refused, none is run."""

    storages = {
        "FloatStorage": "<f4",
        "HalfStorage": "<f2",
        "BFloat16Storage": "<u2",
        "DoubleStorage": "<f8",
        "LongStorage": "<i8",
        "IntStorage": "<i4",
        "CharStorage": "<i1",
        "ByteStorage": "<u1",
        "BoolStorage": "?",
    }

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


class _Where(namedtuple("_Where", "offset size")):
    """Bytes of a file that were passed over."""


class _PickledArray:
    """What a pickle says of a numpy array."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state


class _PickledDtype:
    """What a pickle says of a numpy dtype; its byte order is the little-endian one of every machine here."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass


class _PaddleUnpickler(pickle._Unpickler):
    """Reads what paddle.save() writes of a state dict: arrays, alone or as (name, array). Nothing else is made, none is run.

    Python's own unpickler in Python, as it can pass over the arrays' bytes, which are then read one tensor at a time.
    """

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _PickledDtype,
        ("builtins", "tuple"): tuple,
        ("__builtin__", "tuple"): tuple,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
    }
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, path):
        super().__init__(file)
        self.file, self.path = file, path

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise UserError(f"{self.path}: refused: the pickle asks for {module}.{name}; only arrays are read")
        return self.allowed[module, name]

    def load_bytes(self, width):
        size = int.from_bytes(self.read(width), "little")
        if size < 1 << 16 or self._unframer.current_frame is not None:
            self.append(self.read(size))
        else:
            self.append(_Where(self.file.tell(), size))
            self.file.seek(size, 1)

    dispatch[pickle.BINBYTES[0]] = lambda self: self.load_bytes(4)
    dispatch[pickle.BINBYTES8[0]] = lambda self: self.load_bytes(8)


def read_pdparams(path):
    """{name: (a function that reads the tensor, its shape)} of a file of paddle.save(); bfloat16 lies there as uint16."""
    dtypes = {"f4": "<f4", "f2": "<f2", "f8": "<f8", "u2": "<u2", "i8": "<i8", "i4": "<i4", "i1": "<i1", "u1": "<u1"}
    with open(path, "rb") as file:
        try:
            loaded = _PaddleUnpickler(file, path).load()
        except UserError:
            raise
        except Exception as error:  # whatever a damaged pickle makes of the unpickler's stack
            what = type(error).__name__
            raise UserError(f"{path}: not a whole file of paddle.save(): {what} while it was read") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: refused: holds a {type(loaded).__name__}, not a dict of tensors")

    def read(name, array):
        data, dtype = array.data, dtypes[array.dtype.code]
        if isinstance(data, _Where):
            values = np.fromfile(path, dtype, data.size // np.dtype(dtype).itemsize, offset=data.offset)
        else:
            values = np.frombuffer(data, dtype)
        if len(values) != math.prod(array.shape):
            raise UserError(f"{path}: tensor {name} of shape {list(array.shape)} is truncated: {len(values)} values")
        if array.dtype.code == "u2":
            values = from_bfloat16(values)
        elif array.dtype.code == "f2":
            values = values.astype("<f4")
        return values.reshape(array.shape, order="F" if array.fortran else "C")

    found = {}
    for name, value in loaded.items():
        if name == "StructuredToParameterName@@":  # a list of Paddle's own names
            continue
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
        if not isinstance(array, _PickledArray) or getattr(array.dtype, "code", None) not in dtypes:
            raise UserError(f"{path}: refused: {name} is not a tensor of {', '.join(dtypes)}")
        found[name] = (functools.partial(read, name, array), list(array.shape))
    return found


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
        if tensor is None:
            assert self.parameter._is_initialized(), f"{self.name}: its values are not here"
            tensor = self.parameter
        if not isinstance(tensor, np.ndarray):
            tensor = (tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor).numpy()
        return tensor.T if self.transposed else tensor

    def from_numpy(self, array):
        """All of it in their layout -> what the parameter holds of it, in ours."""
        array = array.T if self.transposed else array
        return np.ascontiguousarray(_rows(array) if self.cut is None else self.cut.take(array))

    def read(self, read, extent=None):
        """What the parameter holds of a stored tensor, in our layout; or, laid flat, the elements extent = (first, last) of that.

        read() gives all of it, or is a StoredTensor: of that no rows and columns are read but those with elements in them.
        """
        cuts, row, shape = {} if self.cut is None else {self.cut.dim: self.cut.ranges}, 0, self.parameter.shape
        if extent is not None and isinstance(read, StoredTensor):
            inner = math.prod(shape[1:])
            row, stop = extent[0] // inner, -(-extent[1] // inner)
            cuts[0] = _within(cuts.get(0, [(0, shape[0])]), row, stop)
            extent = extent[0] - row * inner, extent[1] - row * inner
        if not cuts or not isinstance(read, StoredTensor):
            array = self.from_numpy(read())
        else:
            array = read.ranges(
                {len(shape) - 1 - dim if self.transposed else dim: ranges for dim, ranges in cuts.items()}
            )
            array = np.ascontiguousarray(_rows(array.T) if self.transposed else array)
        return array if extent is None else array.reshape([-1])[slice(*extent)]

    @property
    def tensor(self):
        """What an optimizer updates, and by what: see parallel.Piece for a part of it."""
        return self.parameter

    extent = None  # of its elements, laid flat: all

    def set(self, array):
        """What read() gives, into the parameter."""
        set_parameter(self.parameter, array)

    @property
    def grad(self):
        return self.parameter.grad

    def clear_gradient(self):
        self.parameter.clear_gradient(False)  # False: released, not filled with zeros

    @property
    def cut(self):
        """None, or which part of the whole the parameter is: an object with shape (of the whole) and take(array)."""
        return getattr(self.parameter, "cut", None)

    @property
    def shape(self):
        """Their shape of the whole."""
        shape = list(self.parameter.shape if self.cut is None else self.cut.shape)
        return shape[::-1] if self.transposed else shape


def _within(ranges, first, last):
    """The part from first to last of what ranges [(start, stop), …] are, behind one another."""
    found, at = [], 0
    for start, stop in ranges:
        a, b = max(first, at), min(last, at + stop - start)
        if a < b:
            found.append((start + a - at, start + b - at))
        at += stop - start
    return found


class Entry(namedtuple("Entry", "tensors sources make", defaults=(None,))):
    """Tensors of a file that are made of the same weights.

    tensors: {name: (shape, dtype)}, as stored; sources: [(Weight, its parameter or a tensor of that shape)]; make: from
    the sources' wholes in the file's layout to the arrays, in the order of tensors; None: they are stored as they are.
    """

    @classmethod
    def of(cls, weight, dtype="float32", name=None, tensor=None):
        """One stored as it is: a weight, or a tensor of its shape under another name."""
        source = weight.parameter if tensor is None else tensor
        return cls({name or weight.name: (weight.shape, weight.stored or dtype)}, [(weight, source)])

    def arrays(self, *wholes):
        return list(wholes) if self.make is None else self.make(*wholes)


# The tensors of a QuantLinear: our name, theirs, dtype on disk. (int8 weights lie as [out, in] there, packed ones as here.)
_QUANTIZED = (("qweight", "qweight", None), ("scales", "scales", None), ("qzeros", "qzeros", "int32"),
              ("g_index", "g_idx", "int32"), ("input_scale", "input_scale", "float32"))  # fmt: skip


def base_weights(model, rows=None):
    """[Weight] of the base model in the order of its name table, or of other rows; adapters and prefix are not among them."""
    found = {name.replace(".base.", "."): p for name, p in (*model.named_parameters(), *model.named_buffers())}
    weights = []
    for path, name, transposed in _names_of(model.config, rows):
        if (parameter := found.get(path)) is not None:
            weights.append(Weight(name, parameter, transposed))
        elif path.removesuffix("weight") + "qweight" in found:
            weights += _quantized_weights(found, path.removesuffix("weight"), name.removesuffix("weight"))
    return weights


def _names_of(config, rows=None):
    """The rows of the family's table, or others, for every layer and expert; not every name is one of this model."""
    experts = range(config.experts.count if config.experts else 0)
    for ours, theirs, transposed in rows or FAMILIES[config.family].names:
        for i in range(config.num_hidden_layers) if "{i}" in ours else (0,):
            for e in experts if "{e}" in ours else (0,):
                yield ours.format(i=i, e=e), theirs.format(i=i, e=e), transposed


def stored_weights(model):
    """base_weights() as a folder holds them: a tied head and rope's frequencies too, where the family's files have them."""
    weights, config = base_weights(model), model.config
    if model.lm_head is None and FAMILIES[config.family].also_stores_head:
        weights.append(Weight(_head_name(config), model.embed_tokens.weight, False))
    if (name := config.stored_frequencies) is not None:
        # They are stored as they would be without any stretching.
        plain = dataclasses.replace(config, rope={"rope_type": "default", "rope_theta": 10000.0})
        frequencies = paddle.to_tensor(rope_frequencies(plain)[0])
        layers = range(config.num_hidden_layers if "{i}" in name else 1)
        weights += [Weight(name.format(i=i), frequencies, False) for i in layers]
    return weights


def _head_name(config):
    return next(theirs for ours, theirs, _ in FAMILIES[config.family].names if ours == "lm_head.weight")


def _quantized_weights(found, ours, theirs):
    packed = found[ours + "qweight"].dtype == paddle.int32
    dtypes = {"qweight": "int32" if packed else "int8", "scales": "float16" if packed else "float32"}
    return [
        Weight(theirs + their_name, found[ours + name], name == "qweight" and not packed, dtype or dtypes[name])
        for name, their_name, dtype in _QUANTIZED
        if found.get(ours + name) is not None
    ]


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
                half = layer.create_parameter(layer.weight.shape, dtype="bfloat16")
            half.set_value(layer.weight.astype("bfloat16"))
            half.stop_gradient = True
            if (cut := getattr(layer.weight, "cut", None)) is not None:
                half.cut = cut
            layer.weight = half


def init_weights(model, seed):
    """Normal(0, initializer_range) for matrices, 1 for norms, 0 for biases; each from its own (seed, name) alone."""
    for weight in base_weights(model):
        if len(weight.shape) == 2:
            generator = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
            array = generator.standard_normal(weight.shape, np.float32) * np.float32(model.config.initializer_range)
        else:
            array = np.full(
                weight.shape, 0.0 if weight.name.endswith("bias") else 1.0 - model.config.norm_offset, np.float32
            )
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
    weights_alone, shifted = quantization["quant_method"] == "gptq", set()  # ids of linears
    for block in model.layers if quantization.get("shift") else ():
        layers = dict(block.named_sublayers())
        for norm, names in shifted_norms(block).items():
            shifted |= {id(layers[name]) for name in names}
            if layers[norm].bias is None:
                layers[norm].add_bias()
    for parent, attribute, layer in linears(model).values():
        quantized = QuantLinear(
            layer.n_in,
            layer.n_out,
            f"w{quantization['bits']}" if weights_alone else "a8w8",
            quantization.get("group_size", -1),
            layer.bias is not None or id(layer) in shifted,
            quantization.get("desc_act", False),
            quantization.get("activation") == "per_tensor",
        )
        setattr(parent, attribute, quantized)


_READERS = {  # a norm of a block: the names of all layers that read it
    "attention_norm": r"attention\.(q|k|v|qkv|q_a|kv_a)_proj",
    "attention.q_a_norm": r"attention\.q_b_proj",
    "attention.kv_a_norm": r"attention\.kv_b_proj",
    "mlp_norm": r"mlp\.(.*\.)?(gate_proj|up_proj|gate_up_proj|router|shared_gate)",
}


def norm_readers(block):
    """{norm: [layer, …]} by their names in a block of floats: norms that feed these layers alone, and no residual."""
    layers = [name for name, layer in block.named_sublayers() if isinstance(layer, Linear)]
    found = {norm: [name for name in layers if re.fullmatch(pattern, name)] for norm, pattern in _READERS.items()}
    if block.place == "after" or block.residual_scale is not None:
        del found["attention_norm"], found["mlp_norm"]
    return {norm: names for norm, names in found.items() if names}


def shifted_norms(block):
    """Those of norm_readers() whose output can be moved by a constant: a router has no bias to take it."""
    return {norm: names for norm, names in norm_readers(block).items() if all(n.endswith("_proj") for n in names)}


def set_parameter(parameter, array):
    """Materialise a lazy parameter, or overwrite one, with numpy values in our layout; one copy of them at a time."""
    if str(parameter.dtype).endswith(f".{array.dtype}"):
        parameter.set_value(np.ascontiguousarray(array))
    else:
        parameter.set_value(paddle.to_tensor(array).astype(parameter.dtype))


MASTERS = "master_weights.safetensors"  # float32 weights beside, or in place of, those in bfloat16
MODELS = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams", MASTERS)


def stored_tensors(path, singles=MODELS):
    """{tensor name: (a function that reads it, its shape)} over all weight files of a folder, one of `singles` or its parts."""
    path = Path(path)
    for single in singles:
        index = f"{single}.index.json"
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
            if file.endswith(".pdparams"):
                found.update(read_pdparams(path / file))
            elif file.endswith(".bin"):
                bin_file = BinFile(path / file)
                found.update(
                    {n: ((lambda b=bin_file, n=n: b.read(n)), list(e[3])) for n, e in bin_file.entries.items()}
                )
            else:
                header = safetensors_header(path / file)
                found.update({n: (StoredTensor(path / file, e), e[1]) for n, e in header.items()})
        return found
    if parts := sorted(path.glob("model_state.*.pdparams")):
        raise UserError(f"{parts[0]}: a part of a model cut up for tensor or pipeline parallelism: merge them first")
    raise UserError(f"{path}: no {', '.join(singles)} or an index of them")


def load_weights(model, path, singles=MODELS):
    """Fill the base weights from a folder of Hugging Face's or PaddleNLP's, tensor by tensor; every mismatch is named in
    one error."""
    config, found, elsewhere = model.config, stored_tensors(path, singles), model.elsewhere
    theirs = _paddlenlp_names(config)
    if theirs and any(name.startswith(theirs[0][1].partition(".")[0] + ".") for name in found):
        weights = base_weights(model, theirs)
        found = _paddlenlp_parts(found, config, theirs)
        places = {ours for ours, name, _ in _names_of(config) if name in elsewhere}
        elsewhere = {name for ours, name, _ in _names_of(config, theirs) if ours in places}
    else:
        weights = base_weights(model)
        found = _published_names(found, config, {w.name for w in weights} | elsewhere)
    weights = {w.name: w for w in weights}
    wrong = [f"missing {n}" for n in weights if n not in found]
    wrong += [f"unexpected {n}" for n in found if n not in weights and n not in elsewhere]
    wrong += [
        f"{n} has shape {list(found[n][1])}, config.json says {w.shape}"
        for n, w in weights.items()
        if n in found and list(found[n][1]) != w.shape
    ]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit: {'; '.join(wrong)}")
    for name, weight in weights.items():
        piece = getattr(weight.parameter, "piece", weight)  # of sharding stage 3: what this rank keeps, or None
        if piece is None:
            continue
        array = weight.read(found[name][0], piece.extent)
        stored = weight.stored or "float32"
        if stored.startswith("int") != (array.dtype.kind == "i"):
            raise UserError(f"{path}: {name} is of {array.dtype}; {stored} is needed")
        piece.set(array)
    for name, (_, _, layer) in linears(model).items():
        if isinstance(layer, QuantLinear):
            layer.check(path, name)


def _published_names(found, config, names):
    """stored_tensors() of a Hugging Face folder under the names of the family's table, without what is not a weight of it.

    Published files leave out the prefix of the names (GPT-2, Bloom), hold a tied head too, tables that are computed, the
    extra layers of DeepSeek-V3 that only speculate, and all experts of a layer in one tensor (transformers 5, if asked to).
    """
    prefix, result = FAMILIES[config.family].prefix, {}
    for name, value in found.items():
        if IGNORED_WEIGHTS.search(name):
            continue
        if name not in names and prefix + name in names:
            name = prefix + name
        router = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        if router in names:  # Mixtral's is called so beside experts that are one tensor
            name = router
        if name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj")):
            result |= _single_experts(name, value, config)
        else:
            result[name] = value
    if config.tie_word_embeddings:
        result.pop(_head_name(config), None)
    if config.source.get("num_nextn_predict_layers"):
        extra = re.compile(r"model\.layers\.(\d+)\.")
        result = {n: v for n, v in result.items() if not (m := extra.match(n)) or int(m[1]) < config.num_hidden_layers}
    return result


def _single_experts(name, value, config):
    """{name of the family's table: (read, shape)} for (E, 2F, D), gate before up, or (E, D, F) of all experts of a layer."""
    (read, shape), which = value, name.rpartition(".")[2]
    if len(shape) != 3 or config.experts is None:
        return {name: value}
    layer = int(re.search(r"layers\.(\d+)\.", name)[1])
    read = functools.lru_cache(1)(read)  # the whole is read once for all experts
    table = {ours: theirs for ours, theirs, _ in FAMILIES[config.family].names}
    parts = (
        {"down_proj": slice(None)}
        if which == "down_proj"
        else {"gate_proj": slice(0, shape[1] // 2), "up_proj": slice(shape[1] // 2, None)}
    )
    result = {}
    for part, rows in parts.items():
        for e in range(shape[0]):
            theirs = table["layers.{i}.mlp.experts.{e}." + part + ".weight"].format(i=layer, e=e)
            size = [len(range(shape[1])[rows]), shape[2]]
            result[theirs] = ((lambda e=e, rows=rows: read()[e, rows]), size)
    return result


def from_pretrained(path, dtype="float32"):
    """A CausalLM in eval mode from a Hugging Face folder. Peak memory: the model, its largest tensor, and a constant.

    From an adapter's folder, the base model that it names (which may be an adapter's folder too) with LoRA merged into
    it, or with the prefix put on.
    """
    *adapters, base = base_folders(path)
    model = build(ModelConfig.from_json(base), dtype)
    load_weights(model, base)
    for adapter in reversed(adapters):
        merge(load_adapter(model, adapter))
    model.eval()
    return model


def base_folders(path):
    """[path] of a model's folder; of an adapter's folder, itself, then the folder that it names as its base, and so on."""
    folders = [Path(path)]
    while not (folders[-1] / "config.json").is_file():
        files = [folders[-1] / name for name in ("adapter_config.json", "lora_config.json")]  # peft's, PaddleNLP's
        if (file := next(filter(Path.is_file, files), None)) is None:
            break
        base = _json_object(file).get("base_model_name_or_path")
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
    for w in stored_weights(model):
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


# ========================================================================================= PaddleNLP's names

# Its linears are [in, out] as ours are, its names Hugging Face's behind another prefix, but for GPT and OPT, which are
# called after Paddle's own transformer layers.

_PADDLENLP_PREFIX = {"gpt2": "gpt", "chatglm": "chatglm.transformer", "chatglm2": "chatglm_v2", "baichuan": "llama"}
_PADDLENLP_TABLES = {
    "gpt2": _table("""
        embed_tokens                gpt.embeddings.word_embeddings
        embed_positions             gpt.embeddings.position_embeddings
        layers.{i}.attention_norm   gpt.decoder.layers.{i}.norm1
        layers.{i}.attention.qkv_proj  gpt.decoder.layers.{i}.self_attn.qkv_proj
        layers.{i}.attention.o_proj gpt.decoder.layers.{i}.self_attn.out_proj
        layers.{i}.mlp_norm         gpt.decoder.layers.{i}.norm2
        layers.{i}.mlp.up_proj      gpt.decoder.layers.{i}.linear1
        layers.{i}.mlp.down_proj    gpt.decoder.layers.{i}.linear2
        norm                        gpt.decoder.norm
    """),
    "opt": _table("""
        embed_tokens                opt.embeddings.word_embeddings
        embed_positions             opt.embeddings.position_embeddings
        project_in                  opt.embeddings.project_in
        project_out                 opt.decoder.project_out
        layers.{i}.attention_norm   opt.decoder.layers.{i}.norm1
        layers.{i}.attention.q_proj opt.decoder.layers.{i}.self_attn.q_proj
        layers.{i}.attention.k_proj opt.decoder.layers.{i}.self_attn.k_proj
        layers.{i}.attention.v_proj opt.decoder.layers.{i}.self_attn.v_proj
        layers.{i}.attention.o_proj opt.decoder.layers.{i}.self_attn.out_proj
        layers.{i}.mlp_norm         opt.decoder.layers.{i}.norm2
        layers.{i}.mlp.up_proj      opt.decoder.layers.{i}.linear1
        layers.{i}.mlp.down_proj    opt.decoder.layers.{i}.linear2
        norm                        opt.decoder.final_layer_norm
    """),
}  # fmt: skip
_PADDLENLP_KEYS = {  # model_type: its keys that have another name in Hugging Face's config.json of that family
    "gpt": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions", "hidden_act": "activation_function", "hidden_activation": "activation_function"},
    "opt": {"intermediate_size": "ffn_dim", "normalize_before": "do_layer_norm_before", "hidden_act": "activation_function"},
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "chatglm": {"num_hidden_layers": "num_layers"},
    "chatglm_v2": {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size", "max_sequence_length": "seq_length"},
}  # fmt: skip
_PADDLENLP_MARKS = {
    "paddlenlp_version",
    "fuse_attention_qkv",
    "fuse_attention_ffn",
    "tensor_parallel_output",
    "normalize_before",
}
_PADDLENLP_MACHINE = re.compile(  # keys of how it computes, not what
    "paddlenlp_version|fuse_|_fused|fused_|parallel|recompute|use_flash|rope_fusion_level|long_sequence_(init|strategy)|virtual_pp|mp_degree"
)


def _huggingface_source(source, path):
    """config.json of PaddleNLP in the words of Hugging Face's; any other as it is."""
    kind = str(source.get("model_type"))
    if not (_PADDLENLP_MARKS & source.keys() or kind in ("gpt", "chatglm_v2")):
        return source
    source = {key: value for key, value in source.items() if not _PADDLENLP_MACHINE.search(key)}
    if source.pop("use_long_sequence_strategies", False) or kind == "gpt" and not source.pop("normalize_before", True):
        refused = "use_long_sequence_strategies = true and, for GPT, normalize_before = false"
        raise UserError(f"{path}: {refused} are not supported")
    for theirs, ours in _PADDLENLP_KEYS.get(kind, {}).items():
        if theirs in source:
            source[ours] = source.pop(theirs)
    source["model_type"] = {"gpt": "gpt2", "chatglm_v2": "chatglm"}.get(kind, kind)
    source.pop("architectures", None)
    if kind in ("gpt", "opt", "bloom", "chatglm"):
        source.pop("tie_word_embeddings", None)  # its classes tie them whatever it says
        if source.get("activation_function") == "gelu":
            source["activation_function"] = "gelu_new"
    stretch, factor = source.pop("rope_scaling_type", None), source.pop("rope_scaling_factor", 1.0)
    if stretch == "ntk":
        dim = source.get("head_dim") or source["hidden_size"] // source["num_attention_heads"]
        source["rope_theta"] = source.get("rope_theta", 10000.0) * factor ** (dim / (dim - 2))
    elif stretch is not None:
        source["rope_scaling"] = {"type": {"dynamic_ntk": "dynamic"}.get(stretch, stretch), "factor": factor}
    if kind == "llama" and source.pop("alibi", False):  # Baichuan-13B, which has no class of its own there
        source |= {"model_type": "baichuan", "model_max_length": source.pop("max_position_embeddings", 4096)}
    return source


def _paddlenlp_names(config):
    """Rows of PaddleNLP's names for the family; the first is the embedding's."""
    family = FAMILIES[config.family]
    if config.family in _PADDLENLP_TABLES:
        rows = _PADDLENLP_TABLES[config.family]
    else:
        prefix = _PADDLENLP_PREFIX.get(config.family, config.family) + "."
        rows = [
            (ours, theirs.replace(family.prefix, prefix, 1) if theirs.startswith(family.prefix) else theirs)
            for ours, theirs, _ in family.names
        ]
    return [(row[0], row[1].replace("W_pack", "qkv_proj"), False) for row in rows]


def _paddlenlp_parts(found, config, rows):
    """stored_tensors() of a PaddleNLP folder, with q, k, v and gate, up joined or apart as the model has them.

    fuse_attention_qkv: each key head's queries, key and value together, GPT's too; fuse_attention_ffn: gate, then up.
    """
    K, G, Dh = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim
    names = {ours: theirs for ours, theirs, _ in rows}
    result = {n: v for n, v in found.items() if not IGNORED_WEIGHTS.search(n)}
    if config.tie_word_embeddings:
        result = {n: v for n, v in result.items() if not n.startswith("lm_head.")}

    def part(value, begin, end, width):  # columns begin to end of every `width`
        read, shape = value
        many = shape[-1] // width
        return (lambda: read().reshape([*shape[:-1], many, width])[..., begin:end].reshape([*shape[:-1], -1])), [
            *shape[:-1],
            many * (end - begin),
        ]

    for name in list(result):
        stem, _, kind = name.rpartition(".")
        stem, _, module = stem.rpartition(".")
        shape = result[name][1]
        if module == "qkv_proj" and shape[-1] == K * (G + 2) * Dh:
            value, width = result.pop(name), (G + 2) * Dh
            for which, begin, end in (("q", 0, G), ("k", G, G + 1), ("v", G + 1, G + 2)):
                result[f"{stem}.{which}_proj.{kind}"] = part(value, begin * Dh, end * Dh, width)
        elif module == "gate_up_fused_proj" and "layers.{i}.mlp.gate_proj.weight" in names:
            value, width = result.pop(name), shape[-1]
            for which, begin, end in (("gate", 0, width // 2), ("up", width // 2, width)):
                theirs = names["layers.{i}.mlp." + which + "_proj.weight"].split(".")[-2]
                result[f"{stem}.{theirs}.{kind}"] = part(value, begin, end, width)
    if names.get("layers.{i}.attention.qkv_proj.weight", "").endswith("self_attn.qkv_proj.weight"):
        for name in [n for n in result if ".self_attn.q_proj." in n]:
            parts = [result.pop(name.replace(".q_proj.", f".{which}_proj."), None) for which in "qkv"]
            if None not in parts:
                shape = [*parts[0][1][:-1], sum(p[1][-1] for p in parts)]
                result[name.replace(".q_proj.", ".qkv_proj.")] = (
                    (lambda parts=parts: np.concatenate([read() for read, _ in parts], axis=-1)),
                    shape,
                )
    return result


def _paddlenlp_lora(model, path):
    """adapter_config.json and tensors, as peft would have written them, of a LoRA that PaddleNLP saved at `path`."""
    config, names = _json_object(path / "lora_config.json"), _paddlenlp_names(model.config)
    for key in (
        "use_mora",
        "pissa",
        "loraga",
        "lora_use_mixer",
        "do_qat",
        "trainable_modules",
        "trainable_bias",
        "enable_lora_list",
    ):
        if config.get(key):
            raise UserError(f"{path / 'lora_config.json'}: {key} = {json.dumps(config[key])} is not supported")
    modules = {theirs: ours for ours, theirs, _ in _names_of(model.config, names)}
    places = {ours: theirs.removesuffix(".weight") for ours, theirs, _ in _names_of(model.config)}
    tensors, targets = {}, set()
    for name, (read, _) in stored_tensors(path, ("lora_model_state.pdparams", "peft_model.safetensors")).items():
        module, _, which = name.rpartition(".")
        ours = modules.get(f"{module}.weight")
        if ours is None or which not in ("lora_A", "lora_B"):
            why = "the model has no linear of that name, or q, k and v in one where this has them apart"
            raise UserError(f"{path}: {name}: {why}")
        targets.add(places[ours])
        tensors[f"base_model.model.{places[ours]}.{which}.weight"] = read().T
    return {
        "peft_type": "LORA",
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "use_rslora": bool(config.get("rslora")),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": sorted(targets),
    }, tensors


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
        self.draws, self.key = Draws(), ""  # apply_lora() gives it the model's, and its path
        for p in base.parameters():
            p.stop_gradient = True
        if dora:
            self.lora_magnitude_vector = self.create_parameter(base.weight.shape[1:])
            self.lora_magnitude_vector.set_value(base.norms(self.base.weight.astype("float32")))
            if (cut := getattr(base.weight, "cut", None)) is not None and cut.dim == 1:
                self.lora_magnitude_vector.cut = cut.of(0, cut.shape[1:])

    def delta(self):
        """(in, out) float32: what the adapter adds to the weight."""
        return paddle.matmul(self.lora_A, self.lora_B) * self.scaling

    def forward(self, x, residual=None):
        y = self.product(x, self.base.bias) if self.enabled else self.base(x)
        return y if residual is None else residual + y

    def product(self, x, bias=None):
        """x times the adapted weight, and a bias if one is given; x W alone while the adapter is off."""
        base = self.base
        if not self.enabled:
            return base.product(x)
        dropped = self.dropped(x) if self.dropout else x
        if isinstance(base, Linear) and self.lora_magnitude_vector is None:
            more = bias, None if dropped is x else dropped
            return kernels.lora_linear(x, base.weight, self.lora_A, self.lora_B, self.scaling, *more)
        y = base.product(x)
        update = kernels.linear(kernels.linear(dropped, self.lora_A) * self.scaling, self.lora_B)
        if self.lora_magnitude_vector is None:
            return y + update if bias is None else y + bias + update
        with paddle.no_grad():
            norm = base.norms(base.weight.astype("float32") + self.delta())
        ratio = self.lora_magnitude_vector / norm  # (out,)
        plain = y if dropped is x else base.product(dropped)
        y = y if bias is None else y + bias
        return y + plain * (ratio - 1) + update * ratio

    def dropped(self, x):
        """x after dropout."""
        if not self.training:
            return x
        with self.draws.under(self.key):
            return F.dropout(x, self.dropout)

    @paddle.no_grad()
    def start_pissa(self):
        """A B = the R largest singular triples of the weight, which the base loses."""
        u, s, vt = np.linalg.svd(self.base.whole_weight().astype(np.float64), full_matrices=False)
        rank = self.lora_A.shape[1]
        root = np.sqrt(s[:rank] / self.scaling)
        self.set_pissa((u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32))

    @paddle.no_grad()
    def set_pissa(self, a, b):
        """Start at these, (in, R) and (R, out), of the whole weight."""
        set_parameter(self.lora_A, a)
        set_parameter(self.lora_B, b)
        self.initial, delta, weight = (a, b), self.delta(), self.base.weight
        if (cut := getattr(weight, "cut", None)) is not None:
            delta = paddle.to_tensor(cut.take(delta.numpy()))
        weight.set_value((weight.astype("float32") - delta).astype(weight.dtype))

    @paddle.no_grad()
    def merged(self):
        """The base layer with the adapter in its weight."""
        if isinstance(self.base, QuantLinear):
            raise UserError(
                "an adapter cannot be merged into quantized weights; merge it into the float model, then quantize"
            )
        weight = self.base.weight.astype("float32") + self.delta()
        if self.lora_magnitude_vector is not None:
            weight = weight * (self.lora_magnitude_vector / self.base.norms(weight))
        self.base.weight.set_value(weight.astype(self.base.weight.dtype))
        return self.base


def linears(model):
    """{Hugging Face module path: (parent layer, attribute, layer)} of every linear of the blocks."""
    layers = dict(model.named_sublayers())
    found = {}
    for ours, theirs, _ in _names_of(model.config):
        path = ours.removesuffix(".weight")
        if ours.startswith("layers.") and ours.endswith("_proj.weight") and path in layers:
            parent, _, attribute = path.rpartition(".")
            found[theirs.removesuffix(".weight")] = (layers[parent], attribute, layers[path])
    return found


def lora_layers(model):
    """{Hugging Face module path: LoRALinear}"""
    return {path: layer for path, (_, _, layer) in linears(model).items() if isinstance(layer, LoRALinear)}


def linears_elsewhere(model):
    """{Hugging Face module path} of the linears of the blocks that other processes hold."""
    rows = _names_of(model.config) if model.elsewhere else ()
    paths = [
        theirs.removesuffix(".weight")
        for ours, theirs, _ in rows
        if ours.startswith("layers.") and ours.endswith("_proj.weight")
    ]
    return {path for path in paths if not model.elsewhere.isdisjoint((path + ".weight", path + ".qweight"))}


def lora_paths(model, targets=None):
    """[Hugging Face module path] of the linears that `targets` names, as in apply_lora, and that this process holds."""
    here = linears(model)
    found = {*here, *linears_elsewhere(model)}
    if targets in (None, "all-linear", []):
        return list(here)
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(t)}" for t in targets]
    for pattern, target in zip(patterns, [targets] if isinstance(targets, str) else targets):
        if not any(re.fullmatch(pattern, path) for path in found):
            names = sorted({path.rpartition(".")[2] for path in found})
            raise UserError(f"lora_target_modules: {target!r} matches no linear layer; there are {', '.join(names)}")
    return [path for path in here if any(re.fullmatch(p, path) for p in patterns)]


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
    found, chosen = linears(model), lora_paths(model, targets)
    if targets in (None, "all-linear", []):
        targets = sorted({path.rpartition(".")[2] for path in {*found, *linears_elsewhere(model)}})
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for path in chosen:
        parent, attribute, layer = found[path]
        lora = LoRALinear(layer, rank, alpha, dropout, rslora, dora)
        generator = np.random.default_rng([seed, zlib.crc32(path.encode())])  # the start depends on seed and name alone
        bound = math.sqrt(1 / layer.n_in)
        set_parameter(lora.lora_A, generator.uniform(-bound, bound, lora.lora_A.shape).astype(np.float32))
        lora.draws, lora.key = model.draws, path
        if pissa:
            lora.start_pissa()
        setattr(parent, attribute, lora)
    model.lora_config = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }
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


def _as_is(config):
    """Whether the family's files hold the linears of the blocks as [in, out], as GPT-2's do."""
    return not any(t for ours, _, t in FAMILIES[config.family].names if ours.endswith("_proj.weight"))


def save_adapter(model, path, base_model=None):
    """adapter_config.json and adapter_model.safetensors, as peft writes them; the config last.

    PiSSA is saved as the plain LoRA of rank 2R that gives the same model on the unchanged base: [A A0] [B; -B0]. A
    prefix with a projection is saved as the table it makes; its MLP, to go on training, as prefix_projection.safetensors.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config, files = adapter_files(model, base_model)
    for file, (entries, metadata) in files.items():
        tensors = {}
        for entry in entries:
            wholes = [weight.to_numpy(tensor) for weight, tensor in entry.sources]
            tensors |= dict(zip(entry.tensors, entry.arrays(*wholes)))
        write_safetensors(path / file, tensors, metadata)
    with atomic_file(path / "adapter_config.json") as file:
        json.dump(config, file, indent=2)


def adapter_files(model, base_model=None):
    """(what adapter_config.json holds, {file: ([Entry], metadata)}), see save_adapter."""
    weights = {w.name: w for w in adapter_weights(model)}
    entries = {name: Entry.of(w) for name, w in weights.items()}
    config = {
        "base_model_name_or_path": str(base_model) if base_model else None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    if model.prefix is not None:
        prefix = model.prefix
        config.update(
            peft_type="PREFIX_TUNING",
            num_virtual_tokens=prefix.tokens,
            token_dim=prefix.heads * prefix.head_dim,
            num_transformer_submodules=1,
            num_attention_heads=prefix.heads,
            num_layers=prefix.layers,
            prefix_projection=prefix.hidden is not None,
            encoder_hidden_size=prefix.heads * prefix.head_dim
            if prefix.hidden is None
            else prefix.hidden.weight.shape[1],
        )
        if prefix.hidden is None:
            return config, {"adapter_model.safetensors": (list(entries.values()), {})}
        with paddle.no_grad():
            table = prefix.table().numpy()
        made = Entry({"prompt_embeddings": (list(table.shape), "float32")}, [], lambda: [table])
        return config, {
            "prefix_projection.safetensors": (list(entries.values()), {}),
            "adapter_model.safetensors": ([made], {}),
        }
    config.update(
        peft_type="LORA", bias="none", fan_in_fan_out=_as_is(model.config), init_lora_weights=True, **model.lora_config
    )
    layers, metadata = lora_layers(model), {}
    if any(layer.initial is not None for layer in layers.values()):
        for module, layer in layers.items():
            a, b = (weights[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")  # (R, in), (out, R) on disk
            a0, b0 = (start.T for start in layer.initial)  # whole, on every rank
            entries[a.name] = Entry(
                {a.name: ([2 * a.shape[0], a.shape[1]], "float32")},
                [(a, a.parameter)],
                lambda a, a0=a0: [np.concatenate([a, a0])],
            )
            entries[b.name] = Entry(
                {b.name: ([b.shape[0], 2 * b.shape[1]], "float32")},
                [(b, b.parameter)],
                lambda b, b0=b0: [np.concatenate([b, -b0], 1)],
            )
        config["r"] *= 2
        config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2  # so that the scaling stays
        metadata["pissa_start_included"] = "true"
    return config, {"adapter_model.safetensors": (list(entries.values()), metadata)}


def load_adapter(model, path, trainable=False):
    """Put the LoRA or prefix saved at `path` (by save_adapter, by peft, LoRA by PaddleNLP too) onto a plain model."""
    path = Path(path)
    config_path, weights_path = path / "adapter_config.json", path / "adapter_model.safetensors"
    if (path / "lora_config.json").is_file() and not config_path.is_file():
        config, tensors = _paddlenlp_lora(model, path)
    else:
        for needed in (config_path, weights_path):
            if not needed.is_file():
                raise UserError(
                    f"{needed}: no such file; an adapter is a folder with adapter_config.json and adapter_model.safetensors"
                )
        config, tensors = _json_object(config_path), None
    needed = {
        "LORA": ("r", "lora_alpha"),
        "PREFIX_TUNING": ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
    }
    for key in needed.get(config.get("peft_type"), ()):
        if not isinstance(config.get(key), (int, float)):
            raise UserError(f"{config_path}: {key} must be a number, found {config.get(key)!r}")
    tensors = read_safetensors(weights_path) if tensors is None else tensors
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


def _json_object(path):
    """The object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object, found {type(found).__name__}")
    return found


def _load_lora(model, config, tensors, path, trainable):
    for key in (
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
        "exclude_modules",
        "trainable_token_indices",
        "lora_bias",
        "layer_replication",
        "target_parameters",
        "use_qalora",
        "alora_invocation_tokens",
        "arrow_config",
        "use_bdlora",
    ):
        if config.get(key):
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f'{path}: bias = {config["bias"]!r} is not supported; only "none"')
    weights = path.parent / "adapter_model.safetensors"
    with_start = trainable and weights.is_file() and _metadata(weights).get("pissa_start_included") == "true"
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
    _fill(model, tensors, path.parent / "adapter_model.safetensors")


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
    _fill(model, tensors, file)


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
        _fill(model, read_safetensors(projection), projection)
    else:
        apply_prefix(model, config["num_virtual_tokens"])
        _fill(model, tensors, path.parent / "adapter_model.safetensors")


def _fill(model, tensors, path):
    """The values of the model's adapter; those of linears that other processes hold are left out."""
    weights, elsewhere = adapter_weights(model), linears_elsewhere(model)
    wrong = [f"missing {w.name}" for w in weights if w.name not in tensors]
    wrong += [
        f"unexpected {n}"
        for n in tensors
        if n not in {w.name for w in weights}
        and n.removeprefix("base_model.model.").partition(".lora_")[0] not in elsewhere
    ]
    wrong += [
        f"{w.name} has shape {list(tensors[w.name].shape)}, not {w.shape}"
        for w in weights
        if w.name in tensors and list(tensors[w.name].shape) != w.shape
    ]
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
def generate(
    model,
    input_ids,
    max_new_tokens=64,
    eos_token_id=None,
    attention_mask=None,
    do_sample=False,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    repetition_penalty=1.0,
    seed=0,
):
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
        logits = model.logits(x).astype("float32").numpy()  # (B, V)
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
