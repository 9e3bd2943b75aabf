"""Any published config.json -> ModelConfig: one row of traits per family, in FAMILIES.

Weight names are in formats/weight_names.py; PaddleNLP's config.json is translated to Hugging Face's keys first.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from formats.files import UserError
from formats.quantization_config import KEYS, read_quantization
from formats.weight_names import (
    NAMES_BAICHUAN,
    NAMES_BLOOM,
    NAMES_CHATGLM,
    NAMES_CHATGLM2,
    NAMES_DEEPSEEK,
    NAMES_GEMMA2,
    NAMES_GLM,
    NAMES_GPT2,
    NAMES_INTERNLM2,
    NAMES_LLAMA,
    NAMES_MIXTRAL,
    NAMES_OPT,
    NAMES_QWEN,
    NAMES_QWEN_MOE,
)

# ================================================================================================ config


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The sparse MLP of a block: each token goes to top_k of num_experts experts, and to a shared one, if any."""

    num_experts: int  # E
    top_k: int
    expert_intermediate_size: int  # F of one expert
    shared_expert_intermediate_size: int = 0  # F of the expert that every token goes to; 0: there is none
    shared_gate: bool = False  # the shared expert's output is scaled by a sigmoid gate
    scoring: str = "softmax"  # of the router: "softmax" or "sigmoid"
    norm_topk_prob: bool = True  # the weights of the selected experts are normalized to a sum of 1
    routed_scaling_factor: float = 1.0  # multiplies the weights of the selected experts
    n_group: int = 1  # groups of experts; only experts of the best topk_group groups can be selected
    topk_group: int = 1  # (arXiv 2405.04434, 2.2.1)
    group_topk_sum: int = 1  # a group's score is the sum of this many of its best scores
    correction_bias: bool = False  # a bias on the selection of experts, not on their weights (arXiv 2408.15664)
    dense_layers: tuple = ()  # layers with an ordinary MLP
    aux_loss_coef: float = 0.0  # of the load-balancing loss (arXiv 2101.03961, Eq. 4), added in training
    # True: one loss per layer, from shares of all choices, summed over layers. False: one loss over the tokens of all
    # layers, from shares of all tokens.
    aux_by_layer: bool = False
    aux_by_sequence: bool = False  # with aux_by_layer: one loss per sequence (arXiv 2405.04434, 2.2.3)


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1): low-rank projections of queries and keys."""

    q_lora_rank: int | None  # None: queries are projected from the hidden state directly
    kv_lora_rank: int
    qk_nope_head_dim: int  # dims of a head without position
    qk_rope_head_dim: int  # rotary dims of a head; those of the key are shared by all heads
    v_head_dim: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model. Defaults are Llama's; the traits in a family's row of FAMILIES say what differs."""

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
    rope: dict  # {"rope_type", "rope_theta", and the parameters of that type}
    source: dict  # config.json as read; keys without a field here are written back unchanged
    quantization: dict | None = None  # quantization_config of the blocks' linears (see QUANTIZATIONS); None: floats

    norm: str = "rms"  # "rms" or "layer"
    norm_offset: float = 0.0  # added to every norm's weight (Gemma: 1)
    norm_place: str = (
        "before"  # of each half of a block: "before", "after" (the residual sum), or "both" (input and output)
    )
    residual_scale: float | None = None  # the residual is the norm's output times this, not the norm's input

    embedding_size: int | None = None  # if not D: embeddings are projected to D, and back before the head
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = True

    position: str = "rope"  # "rope", "rope_2d" (ChatGLM-6B), "alibi" (arXiv 2108.12409) or "learned"
    position_offset: int = 0  # row of the learned table that holds position 0
    rotary_dim: int = 0  # of each head; 0: all
    rope_interleaved: bool = False  # pairs are (2i, 2i+1) in place of (i, i + r/2)
    stored_frequencies: str | None = None  # tensor name of RoPE's frequencies if files store them; {i}: layer
    logn_length: int | None = (
        None  # beyond this position, queries are scaled by log(position, base logn_length); inference
    )

    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o
    fused_qkv: str | None = None  # one linear: "blocks" q|k|v, or "groups": per key/value head its queries, k, v
    qk_norm: bool = False  # an RMSNorm over every head of q and k
    attention_scale: float | None = None  # None: Dh ** -0.5
    attention_softcap: float | None = None  # s -> c · tanh(s / c)
    windows: tuple = ()  # per layer: number of keys that a query sees, itself included; None or no entry: all
    latent: MLAConfig | None = None

    activation: str = "silu"  # "silu", "gelu", "gelu_tanh" or "relu"
    gated: bool = True
    fused_gate_up: bool = False  # gate and up in one linear, gate first
    mlp_bias: bool = False
    experts: MoEConfig | None = None

    tie_word_embeddings: bool = False
    norm_head: bool = False  # columns of the head are L2-normalized (Baichuan 2, arXiv 2309.10305)
    z_loss_weight: float = 0.0  # times the mean squared largest logit, added in training
    final_softcap: float | None = None  # of the logits

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens: max_position_embeddings, times the factor of dynamic RoPE; no limit for ALiBi."""
        if self.position == "alibi":
            return 1 << 30
        factor = self.rope["factor"] if self.rope["rope_type"] == "dynamic" else 1
        return int(self.max_position_embeddings * factor)

    @staticmethod
    def from_json(path: str | Path) -> "ModelConfig":
        """path: config.json or its folder, of transformers 4 (rope_scaling, …) or 5 (rope_parameters, …)."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            found = next((path.parent / "snapshots").glob("*/config.json"), None)  # of Hugging Face's download cache
            what = f"the model is in {found.parent}" if found else "a model is a Hugging Face folder with config.json"
            raise UserError(f"{path}: no such file; {what} and its weights")
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        if not isinstance(source, dict):
            raise UserError(f"{path}: must hold a JSON object, found {type(source).__name__}")
        return ModelConfig.from_dict(source, path)

    @staticmethod
    def from_dict(source: dict, path: str | Path = "config") -> "ModelConfig":
        """source: the object of a config.json, Hugging Face's or PaddleNLP's; path: its name in error messages."""
        source = _huggingface_source(source, path)
        family = _family_of(source, path)
        row = FAMILIES[family]
        _refuse_other_maths(source, family, path)

        def number(field, default, kind=int, least=1):
            key = _key(source, field)
            value = default if key is None else source[key]
            if (
                isinstance(value, bool)
                or not isinstance(value, kind)
                or not least <= value < MOST.get(field, MOST_SIZE)
            ):
                what = "a positive integer" if kind is int else "a positive number"
                if isinstance(value, int) and value >= least:
                    what += f" below {MOST.get(field, MOST_SIZE):,}"
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
            intermediate_size=number("intermediate_size", 4 * D if row.ffn_is_4x else None),
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
        if fields["quantization"] is None:
            source = {key: value for key, value in source.items() if key not in KEYS}
        config = ModelConfig(family=family, source=source, **fields)
        for sizes in filter(None, (config.experts, config.latent)):
            for field in dataclasses.fields(sizes):
                value = getattr(sizes, field.name)
                if field.type == "int" or field.type is int:
                    if type(value) is not int or not 0 <= value < MOST.get(field.name, MOST_SIZE):
                        raise UserError(f"{path}: {field.name} must be a whole number, found {value!r}")
        if config.position.startswith("rope") and (config.rotary_dim or config.head_dim) % 2:
            raise UserError(f"{path}: rotary dims must be even, found {config.rotary_dim or config.head_dim}")
        return config

    def to_json(self, dtype: str) -> str:
        """The text of config.json with the keys it was read with; dtype: of the saved weights, such as "float32"."""
        source = {key: value for key, value in self.source.items() if key not in ("dtype", "torch_dtype")}
        source["dtype" if "rope_parameters" in source or "dtype" in self.source else "torch_dtype"] = dtype
        for field in ("vocab_size", "num_hidden_layers", "max_position_embeddings"):  # which a script may have changed
            if (key := _key(source, field)) is not None:
                source[key] = getattr(self, field)
        source.setdefault("architectures", [FAMILIES[self.family].architecture])
        source.pop("quantization_config", None)
        if self.quantization is not None:
            source["quantization_config"] = self.quantization
        return json.dumps(source, indent=2, ensure_ascii=False) + "\n"


MOST_SIZE, MOST = (
    1 << 28,
    {"num_hidden_layers": 1 << 14, "num_experts": 1 << 14},
)  # of a number of config.json: far beyond any model


SYNONYMS = {  # our field: its keys in config.json, in order of preference
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
    """The key of config.json that holds this field; None if there is none."""
    return next((key for key in SYNONYMS[field] if source.get(key) is not None), None)


# ============================================================================================== families


@dataclasses.dataclass(frozen=True)
class Family:
    """One family: how to read its config.json, and the names of its weights."""

    architecture: str  # class name in its own software
    names: tuple  # rows of name_table(): (our name, theirs, transposed); {i}: layer, {e}: expert
    traits: Callable = lambda source, fields: {}  # config.json, fields read so far -> fields that differ from Llama's
    tied_by_default: bool = False  # tie_word_embeddings if config.json does not say
    norm_eps: float = 1e-6  # if config.json does not say
    ffn_is_4x: bool = False  # intermediate_size is 4 D if config.json does not say
    rope_theta: float = 10000.0  # if config.json does not say
    prefix: str = "model."  # of all weight names but the head's; some published files omit it
    also_stores_head: bool = False  # its files hold a tied head as well
    model_type: str | None = None  # in config.json, if it is not the name of the row
    discriminating_keys: tuple = ()  # any of these keys in config.json marks this family among those of its model_type
    # Keys of config.json that change the maths: the values that this family supports; ...: any value.
    supported_values: dict = dataclasses.field(default_factory=dict)


def _llama(source, fields):
    bias = bool(source.get("attention_bias", False))
    return dict(attention_bias=bias, output_bias=bias, mlp_bias=bool(source.get("mlp_bias", False)))


def _windowed(source, fields):
    window = source.get("sliding_window")
    return dict(windows=(window,) * fields["num_hidden_layers"]) if window else {}


def _mistral(source, fields):
    return _windowed(
        {"sliding_window": 4096, **source}, fields
    )  # null means no window; without the key, the class has 4096


def _mixtral(source, fields):
    return _windowed(source, fields) | dict(
        experts=MoEConfig(
            num_experts=source["num_local_experts"],
            top_k=source["num_experts_per_tok"],
            expert_intermediate_size=fields["intermediate_size"],
            aux_loss_coef=source.get("router_aux_loss_coef", 0.001),
        )
    )


def _qwen(source, fields):
    length = source.get("seq_length", 8192)
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
        experts=MoEConfig(
            num_experts=source.get("num_local_experts") or source["num_experts"],
            top_k=source["num_experts_per_tok"],
            expert_intermediate_size=source["moe_intermediate_size"],
            shared_expert_intermediate_size=shared,
            shared_gate=qwen2,
            norm_topk_prob=bool(source.get("norm_topk_prob", False)),
            dense_layers=tuple(sorted(dense)),
            aux_loss_coef=source.get("router_aux_loss_coef", 0.001),
        ),
    )


def _baichuan(source, fields):
    # The 13B models use ALiBi and have no max_position_embeddings. Baichuan 2 has z_loss_weight or its own vocabulary
    # size; its 7B model also names the class as the 13B model does.
    rope = "max_position_embeddings" in source
    baichuan2 = (
        "z_loss_weight" in source
        or fields["vocab_size"] == 125696
        or rope
        and source.get("architectures") == ["BaichuanForCausalLM"]
    )
    return dict(
        fused_qkv="blocks",
        position="rope" if rope else "alibi",
        norm_head=baichuan2,
        stored_frequencies="model.layers.{i}.self_attn.rotary_emb.inv_freq" if rope and not baichuan2 else None,
        z_loss_weight=float(source.get("z_loss_weight") or 0.0),
    )


def _chatglm(source, fields):
    # The official code always uses the scale of 28 layers, the depth of the published model.
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
    # chatglm2-6b-32k divides positions by the ratio; ChatGLM3 and GLM-4 multiply the base by it (50 or more). The key
    # is the same, so the model's name or the size of the ratio decides.
    if ratio != 1 and ratio < 50 and not re.search("chatglm[23]|glm-4", name):
        raise UserError(
            f"rope_ratio = {ratio} may divide positions (ChatGLM2) or multiply rope's base (ChatGLM3, GLM-4): "
            f"_name_or_path = {name!r} must name the model, chatglm2, chatglm3 or glm-4"
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
    return dict(
        norm="layer",
        position="learned",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_qkv="blocks",
        gated=False,
        activation=_ACTIVATIONS[source.get("activation_function") or "gelu_new"],
    )


_TANH = "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"  # five names of one formula
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "relu": "relu"} | dict.fromkeys(
    _TANH, "gelu_tanh"
)  # name in Hugging Face's config.json: ModelConfig.activation


def _opt(source, fields):
    pre_norm, width = source.get("do_layer_norm_before", True), source.get("word_embed_proj_dim")
    bias = source.get("enable_bias", True)
    return dict(
        norm="layer",
        norm_place="before" if pre_norm else "after",
        position="learned",
        position_offset=2,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        gated=False,
        activation=_ACTIVATIONS[source.get("activation_function") or "relu"],
        embedding_size=None if width == fields["hidden_size"] else width,
        final_norm=pre_norm and not source.get("_remove_final_layer_norm", False),
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
        activation=_ACTIVATIONS[source.get("hidden_activation") or "gelu_pytorch_tanh"],
        norm_place="both",
        attention_scale=float(source.get("query_pre_attn_scalar", 256)) ** -0.5,
        attention_softcap=source.get("attn_logit_softcapping", 50.0),
        final_softcap=source.get("final_logit_softcapping", 30.0),
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
    )


def _deepseek(source, fields):
    v3, rope = source["model_type"] == "deepseek_v3", fields["rope"]
    latent = MLAConfig(
        q_lora_rank=source["q_lora_rank"],
        kv_lora_rank=source["kv_lora_rank"],
        qk_nope_head_dim=source["qk_nope_head_dim"],
        qk_rope_head_dim=source["qk_rope_head_dim"],
        v_head_dim=source["v_head_dim"],
    )
    scale = (latent.qk_nope_head_dim + latent.qk_rope_head_dim) ** -0.5
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    dense = range(min(source["first_k_dense_replace"], fields["num_hidden_layers"]))
    grouped = v3 or source.get("topk_method") == "group_limited_greedy"
    experts = MoEConfig(
        num_experts=source["n_routed_experts"],
        top_k=source["num_experts_per_tok"],
        expert_intermediate_size=source["moe_intermediate_size"],
        shared_expert_intermediate_size=(source["n_shared_experts"] or 0) * source["moe_intermediate_size"],
        scoring="sigmoid" if v3 else "softmax",
        norm_topk_prob=bool(v3 and source.get("norm_topk_prob", True)),
        routed_scaling_factor=source.get("routed_scaling_factor", 1.0),
        n_group=source["n_group"] if grouped else 1,
        topk_group=source["topk_group"] if grouped else 1,
        group_topk_sum=2 if v3 else 1,
        correction_bias=v3,
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
        head_dim=latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        rotary_dim=latent.qk_rope_head_dim,
        attention_scale=scale,
        rope_interleaved=bool(source.get("rope_interleave", True)),
        experts=experts,
    )


def _internlm(source, fields):
    rotary, rope = source.get("rotary"), fields["rope"]
    if rotary is not None:  # {"type": "origin" | "dynamic", …}
        rope = {"rope_type": "default", "rope_theta": float(rotary["base"])}
        if rotary["type"] == "dynamic":
            rope |= {"rope_type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
        elif rotary["type"] != "origin":
            raise UserError(f"rotary = {json.dumps(rotary)} is not supported; its type must be origin or dynamic")
    return dict(attention_bias=bool(source.get("bias", False)), output_bias=bool(source.get("bias", False)), rope=rope)


def _internlm2(source, fields):
    return _internlm(source, fields) | dict(fused_qkv="groups")


_SILU = {"hidden_act": ("silu", "swish")}


_GELU_TANH = dict.fromkeys(
    ("hidden_act", "hidden_activation"), (*_TANH, "gelu")
)  # "gelu" of Gemma 1 means tanh as well


_ANY_ACTIVATION = {"activation_function": tuple(name for name in _ACTIVATIONS if _ACTIVATIONS[name] != "silu")}


_NO_WINDOW = {"use_sliding_window": (False,), "sliding_window": ...}  # without use_sliding_window, the window is unused


_BIAS = {"attention_bias": (True, False)}


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", NAMES_LLAMA, _llama, supported_values=_SILU | _BIAS | {"mlp_bias": (True, False)}
    ),
    "mistral": Family("MistralForCausalLM", NAMES_LLAMA, _mistral, supported_values=_SILU | {"sliding_window": ...}),
    "mixtral": Family(
        "MixtralForCausalLM",
        NAMES_MIXTRAL,
        _mixtral,
        norm_eps=1e-5,
        rope_theta=1e6,
        supported_values=_SILU | {"sliding_window": ..., "router_jitter_noise": (0, 0.0), "num_local_experts": ...},
    ),
    "qwen": Family(
        "QWenLMHeadModel",
        NAMES_QWEN,
        _qwen,
        prefix="transformer.",
        supported_values={
            "no_bias": (True,),
            "rotary_pct": (1.0, 1),
            "scale_attn_weights": (True,),
            "rotary_emb_base": ...,
            "use_dynamic_ntk": (True, False),
            "use_logn_attn": (True, False),
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        NAMES_LLAMA,
        lambda source, fields: dict(attention_bias=True),
        supported_values=_SILU | _NO_WINDOW | {"attention_bias": ...},
    ),  # which its class does not read
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        NAMES_QWEN_MOE,
        _qwen_moe,
        supported_values=_SILU | _NO_WINDOW | {"qkv_bias": (True, False)},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        NAMES_LLAMA,
        lambda source, fields: _llama(source, fields) | dict(qk_norm=True),
        supported_values=_SILU | _NO_WINDOW | _BIAS,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        NAMES_QWEN_MOE,
        _qwen_moe,
        supported_values=_SILU | _NO_WINDOW | _BIAS | {"num_local_experts": ...},
    ),
    "baichuan": Family("BaichuanForCausalLM", NAMES_BAICHUAN, _baichuan, supported_values=_SILU),
    "chatglm": Family(
        "ChatGLMModel",
        NAMES_CHATGLM,
        _chatglm,
        tied_by_default=True,
        norm_eps=1e-5,
        prefix="transformer.",
        also_stores_head=True,
        discriminating_keys=("position_encoding_2d", "inner_hidden_size"),
        supported_values={"position_encoding_2d": (True,)},
    ),
    "chatglm2": Family(
        "ChatGLMModel",
        NAMES_CHATGLM2,
        _chatglm2,
        norm_eps=1e-5,
        prefix="transformer.",
        model_type="chatglm",
        supported_values={
            "apply_residual_connection_post_layernorm": (False,),
            "rmsnorm": (True,),
            "post_layer_norm": (True,),
            "original_rope": (True,),
            "apply_query_key_layer_scaling": (True, False),
            "add_qkv_bias": (True, False),
            "add_bias_linear": (True, False),
            "rope_ratio": ...,
            "multi_query_attention": (True, False),
        },
    ),
    "glm": Family(
        "GlmForCausalLM",
        NAMES_GLM,
        _glm,
        norm_eps=1.5625e-7,
        supported_values=_SILU | _BIAS | {"partial_rotary_factor": ...},
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        NAMES_GLM,
        _glm,
        norm_eps=1.5625e-7,
        supported_values=_SILU | _BIAS | {"partial_rotary_factor": ...},
    ),
    "bloom": Family(
        "BloomForCausalLM",
        NAMES_BLOOM,
        _bloom,
        tied_by_default=True,
        norm_eps=1e-5,
        ffn_is_4x=True,
        prefix="transformer.",
        supported_values={"apply_residual_connection_post_layernorm": (True, False), "offset_alibi": ...},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        NAMES_GPT2,
        _gpt2,
        tied_by_default=True,
        norm_eps=1e-5,
        ffn_is_4x=True,
        prefix="transformer.",
        supported_values=_ANY_ACTIVATION
        | {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "reorder_and_upcast_attn": ...,
        },
    ),
    "opt": Family(
        "OPTForCausalLM",
        NAMES_OPT,
        _opt,
        tied_by_default=True,
        norm_eps=1e-5,
        supported_values=_ANY_ACTIVATION | {"layer_norm_elementwise_affine": (True,)},
    ),
    "internlm": Family(
        "InternLMForCausalLM", NAMES_LLAMA, _internlm, supported_values=_SILU | {"bias": (True, False), "rotary": ...}
    ),
    "internlm2": Family(
        "InternLM2ForCausalLM", NAMES_INTERNLM2, _internlm2, supported_values=_SILU | {"bias": (True, False)}
    ),
    "gemma": Family("GemmaForCausalLM", NAMES_LLAMA, _gemma, tied_by_default=True, supported_values=_GELU_TANH | _BIAS),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        NAMES_GEMMA2,
        _gemma2,
        tied_by_default=True,
        supported_values=_GELU_TANH
        | _BIAS
        | dict.fromkeys(
            (
                "sliding_window",
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "query_pre_attn_scalar",
                "sliding_window_size",
            ),
            ...,
        ),
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        NAMES_DEEPSEEK,
        _deepseek,
        supported_values=_SILU
        | _BIAS
        | {
            "topk_method": ("greedy", "group_limited_greedy"),
            "scoring_func": ("softmax",),
            "norm_topk_prob": (False,),
            "moe_layer_freq": (1,),
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        NAMES_DEEPSEEK,
        _deepseek,
        supported_values=_SILU
        | _BIAS
        | {
            "topk_method": ("noaux_tc",),
            "scoring_func": ("sigmoid",),
            "rope_interleave": (True, False),
            "moe_layer_freq": (1,),
        },
    ),
}


def _family_of(source, path):
    """The name of the row of FAMILIES: by model_type and, if several rows have it, by their discriminating_keys."""
    kind, types = source.get("model_type"), {name: row.model_type or name for name, row in FAMILIES.items()}
    rows = [(name, FAMILIES[name].discriminating_keys) for name, model_type in types.items() if model_type == kind]
    by_key = [name for name, keys in rows if source.keys() & set(keys)]
    family = next(iter(by_key or [name for name, keys in rows if not keys]), None)
    if family is None and isinstance(source.get("text_config"), dict):
        text = source["text_config"].get("model_type")
        raise UserError(
            f"{path}: model_type {kind!r} is multimodal (text_config: model_type {text!r}), which is not supported; "
            "give a folder of a language model alone"
        )
    if family is None:
        known = ", ".join(sorted(set(types.values())))
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported are {known}")
    return family


# Keys that have a meaning in some family. If a family's supported_values do not list such a key, only the values here
# leave its maths unchanged.
_NEUTRAL = {
    "sliding_window": (), "use_sliding_window": (False,), "partial_rotary_factor": (1.0, 1), "rotary_pct": (1.0, 1),
    "attention_bias": (False,), "mlp_bias": (False,), "qkv_bias": (False,), "use_bias": (False,), "bias": (False,),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "query_pre_attn_scalar": (), "use_qk_norm": (False,),
    "qk_norm": (False,), "qk_layernorm": (False,), "clip_qkv": (), "logit_scale": (1.0, 1), "alibi": (False,),
    "attention_multiplier": (), "residual_multiplier": (1.0, 1), "embedding_multiplier": (1.0, 1),
    "logits_scaling": (1.0, 1),
    "attention_chunk_size": (), "no_rope_layers": (), "parallel_attn": (False,), "use_parallel_residual": (False,),
    "rope_local_base_freq": (), "use_bidirectional_attention": (False,), "is_encoder_decoder": (False,),
    "num_local_experts": (),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "router_jitter_noise": (0, 0.0),
    "apply_residual_connection_post_layernorm": (False,), "pre_seq_len": (), "position_encoding_2d": (False,),
    "use_mla": (False,),
    "rope_ratio": (1, 1.0), "use_dynamic_ntk": (False,), "use_logn_attn": (False,), "original_rope": (True,),
    "swiglu": (True,),
}  # fmt: skip


_LIKE_MATHS = re.compile(
    "scal(e|ing)|multiplier|softcap|window|rope|rotary|alibi|residual|_act$|activation_f|qk_|norm_type|chunk|mup"
)


def _refuse_other_maths(source, family, path):
    """UserError for a key that would change what the decoder computes and that this room does not read."""
    supported_values, rope = FAMILIES[family].supported_values, _rope_object(source, path)
    inside = {key: rope[key] for key in ("partial_rotary_factor",) if key in rope}
    for key, value in (source | inside).items():
        allowed = supported_values.get(key, _NEUTRAL.get(key))
        if allowed is None and key not in _READ_KEYS and _LIKE_MATHS.search(key):
            allowed = (False, 0, 0.0, 1, 1.0)
        if allowed is None or allowed is ... or value is None or value in ([], {}):
            continue
        if value in allowed and (
            value is not True or any(choice is True for choice in allowed)
        ):  # 1 == True in Python, not here
            continue
        right = " or ".join(json.dumps(choice) for choice in allowed) or "no such key"
        raise UserError(
            f"{path}: {key} = {json.dumps(value)} is not supported for {family}: it changes the maths; supported is "
            f"{right}"
        )


_READ_KEYS = {  # keys that match _LIKE_MATHS, and are read above or change nothing
    *(key for keys in SYNONYMS.values() for key in keys),
    "rope_scaling", "rope_parameters", "rope_theta", "max_window_layers", "routed_scaling_factor",
    "word_embed_proj_dim",
    "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "hidden_act", "attention_softmax_in_fp32",
    "fp32_residual_connection",
    "masked_softmax_fusion", "slow_but_exact", "_sliding_window_pattern", "use_flash_attn", "scale_attn_weights",
}  # fmt: skip


def _quantization(source, path):
    """quantization_config, checked; None for a model of floats, and for one that is opened as floats."""
    quantization, problem = read_quantization(source)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    return quantization


def _rope_object(source, path):
    """The RoPE object of config.json: rope_parameters (transformers 5) or rope_scaling (4), {} if there is none."""
    key = "rope_parameters" if source.get("rope_parameters") else "rope_scaling"
    if not isinstance(source.get(key) or {}, dict):
        raise UserError(f"{path}: {key} must be an object, found {source[key]!r}")
    return source.get(key) or {}


_ROPE_NEEDS = {  # rope_type: the numbers that it needs besides rope_theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


_ROPE_KEYS = {
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "truncate",
    "partial_rotary_factor",
}  # fmt: skip


def _rope_parameters(source, path):
    """{"rope_type", "rope_theta", …}, checked; of transformers 4 or 5."""
    rope = dict(_rope_object(source, path))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", source.get("rope_theta", 10000.0))
    if rope["rope_type"] not in _ROPE_NEEDS:
        raise UserError(
            f"{path}: rope type {rope['rope_type']!r} is not supported; supported are {', '.join(_ROPE_NEEDS)}"
        )
    for key in rope.keys() - _ROPE_KEYS:
        if rope[key] is not None:
            entry = f"rope type {rope['rope_type']}: {key} = {json.dumps(rope[key])}"
            raise UserError(f"{path}: {entry} is not supported: it may change the maths")
    for key, value in rope.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: rope type {rope['rope_type']}: {key} must be a finite number, found {value!r}")
    for key in ("rope_theta", *_ROPE_NEEDS[rope["rope_type"]]):
        value = rope.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"{path}: rope type {rope['rope_type']} needs a number {key} above 0, found {value!r}")
    return rope


# ====================================================================================== rotary positions


def yarn_mscale(factor: float, m: float) -> float:
    """YaRN's attention scale for a context `factor` times as long (arXiv 2309.00071, Eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def weight_names(config: ModelConfig, rows: list | None = None) -> Iterator[tuple]:
    """(our name, theirs, transposed) for every layer and expert, from the family's table or `rows`.

    Some names may not exist in this model: a table covers all variants of a family.
    """
    experts = range(config.experts.num_experts if config.experts else 0)
    for ours, theirs, transposed in rows or FAMILIES[config.family].names:
        for i in range(config.num_hidden_layers) if "{i}" in ours else (0,):
            for e in experts if "{e}" in ours else (0,):
                yield ours.format(i=i, e=e), theirs.format(i=i, e=e), transposed


_PADDLENLP_KEYS = {  # PaddleNLP's model_type: {its key: Hugging Face's}
    "gpt": {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
        "hidden_activation": "activation_function",
    },
    "opt": {
        "intermediate_size": "ffn_dim", "normalize_before": "do_layer_norm_before", "hidden_act": "activation_function",
    },
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "chatglm": {"num_hidden_layers": "num_layers"},
    "chatglm_v2": {
        "num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size", "max_sequence_length": "seq_length",
    },
}  # fmt: skip


_PADDLENLP_MARKS = {  # only PaddleNLP's config.json has these keys
    "paddlenlp_version",
    "fuse_attention_qkv",
    "fuse_attention_ffn",
    "tensor_parallel_output",
    "normalize_before",
}


_PADDLENLP_RUNTIME = re.compile(  # keys that change how it computes, not what
    "paddlenlp_version|fuse_|_fused|fused_|parallel|recompute|use_flash|rope_fusion_level|"
    "long_sequence_(init|strategy)|virtual_pp|mp_degree"
)


def _huggingface_source(source, path):
    """PaddleNLP's config.json with Hugging Face's keys; any other unchanged."""
    kind = str(source.get("model_type"))
    if not (_PADDLENLP_MARKS & source.keys() or kind in ("gpt", "chatglm_v2")):
        return source
    source = {key: value for key, value in source.items() if not _PADDLENLP_RUNTIME.search(key)}
    if source.pop("use_long_sequence_strategies", False) or kind == "gpt" and not source.pop("normalize_before", True):
        refused = "use_long_sequence_strategies = true and, for GPT, normalize_before = false"
        raise UserError(f"{path}: {refused} are not supported")
    for theirs, ours in _PADDLENLP_KEYS.get(kind, {}).items():
        if theirs in source:
            source[ours] = source.pop(theirs)
    source["model_type"] = {"gpt": "gpt2", "chatglm_v2": "chatglm"}.get(kind, kind)
    source.pop("architectures", None)
    if kind in ("gpt", "opt", "bloom", "chatglm"):
        source.pop("tie_word_embeddings", None)  # its classes tie the weights whatever this key says
        if source.get("activation_function") == "gelu":
            source["activation_function"] = "gelu_new"
    scaling, factor = source.pop("rope_scaling_type", None), source.pop("rope_scaling_factor", 1.0)
    if scaling == "ntk":
        dim = source.get("head_dim") or source["hidden_size"] // source["num_attention_heads"]
        source["rope_theta"] = source.get("rope_theta", 10000.0) * factor ** (dim / (dim - 2))
    elif scaling is not None:
        source["rope_scaling"] = {"type": {"dynamic_ntk": "dynamic"}.get(scaling, scaling), "factor": factor}
    if kind == "llama" and source.pop("alibi", False):  # Baichuan-13B, which PaddleNLP runs as Llama with ALiBi
        source |= {"model_type": "baichuan", "model_max_length": source.pop("max_position_embeddings", 4096)}
    return source
