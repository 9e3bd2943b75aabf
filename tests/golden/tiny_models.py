"""A tiny config.json for every family and variant, and model folders with weights from a seed.

    CONFIGS[name]                        config.json as a dict; names are FAMILY or FAMILY_VARIANT
    family(name)                         its row of families.FAMILIES
    build(name, seed=0, **changes)       a CausalLM; changes replace keys of config.json
    write(folder, name, ...)             the same as a Hugging Face folder
    MOE, WINDOWED, ...                   names by a trait

Sizes are deliberately small and odd: one key head, heads that are no power of two, head_dim * heads unequal to
hidden_size, a first dense layer, windows of 3 to 5. Nothing here is a published model; every weight comes from (seed,
its name) (golden_weights.draw), large enough that exchanging two is visible. The vocabulary has V ids; SPECIAL ids are
not ordinary text.
"""

import json
from pathlib import Path

from golden_weights import draw

import families
import formats.weights
import model as M

V = 67
SPECIAL = {"bos": 1, "eos": 2, "pad": 0, "mask": 57, "gmask": 58, "sop": 60, "eop": 61}  # the last four: ChatGLM-6B's


def _config(family, **keys):
    """Keys that most families share; None removes one of them, and is null for other keys."""
    common = {
        "model_type": family,
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    return {key: value for key, value in (common | keys).items() if value is not None or key not in common}


def _plain(family, **keys):
    """Without the keys of Llama's config.json, for families with other names."""
    none = dict.fromkeys(
        (
            "intermediate_size",
            "num_key_value_heads",
            "rms_norm_eps",
            "max_position_embeddings",
            "hidden_act",
            "rope_theta",
        )
    )
    return _config(family, **none | keys)


_BAICHUAN = dict(num_key_value_heads=None, rope_theta=None, architectures=["BaichuanForCausalLM"])
_CHATGLM2 = dict(num_hidden_layers=None, vocab_size=None, padded_vocab_size=V, num_layers=2, num_attention_heads=6,
    kv_channels=8, ffn_hidden_size=40,
                 layernorm_epsilon=1e-5, seq_length=64, multi_query_attention=True, multi_query_group_num=2,
                     add_qkv_bias=True, add_bias_linear=False,
                 apply_residual_connection_post_layernorm=False, rmsnorm=True, post_layer_norm=True, original_rope=True,
                 architectures=["ChatGLMModel"])  # fmt: skip
_QWEN = dict(intermediate_size=80, kv_channels=8, layer_norm_epsilon=1e-6, rotary_emb_base=500.0, rotary_pct=1.0,
    scale_attn_weights=True,
             no_bias=True, max_position_embeddings=64)  # fmt: skip
_MOE = dict(moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2, router_aux_loss_coef=0.02)
_LATENT = dict(hidden_size=36, kv_lora_rank=10, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=10,
    num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=3,
               n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=12,
                   first_k_dense_replace=1,
               routed_scaling_factor=1.5, aux_loss_alpha=0.02)  # fmt: skip
_BLOOM = dict(
    n_layer=2, num_hidden_layers=None, num_attention_heads=None, layer_norm_epsilon=1e-5, tie_word_embeddings=None
)
_OPT = dict(ffn_dim=44, max_position_embeddings=64, activation_function="relu", do_layer_norm_before=True,
    word_embed_proj_dim=32,
            tie_word_embeddings=None, bos_token_id=2, pad_token_id=1, init_std=0.05,
                initializer_range=None)  # fmt: skip

CONFIGS = {
    "llama": _config("llama"),
    "llama_mqa": _config("llama", num_attention_heads=3, num_key_value_heads=1, head_dim=12, hidden_size=24),
    "llama_bias_tied": _config(
        "llama", num_attention_heads=8, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama_llama3": _config(
        "llama",
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama_yarn": _config(
        "llama", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "llama_dynamic": _config(
        "llama", rope_scaling={"type": "dynamic", "factor": 3.0}, max_position_embeddings=8, rope_theta=100.0
    ),
    "llama_linear": _config("llama", rope_scaling={"type": "linear", "factor": 2.0}),
    "mistral": _config(
        "mistral", hidden_size=36, num_attention_heads=6, num_key_value_heads=2, head_dim=8, sliding_window=5
    ),
    "mistral_full": _config("mistral", sliding_window=None),
    "mixtral": _config(
        "mixtral",
        hidden_size=30,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        intermediate_size=24,
    ),
    "mixtral_window": _config(
        "mixtral",
        num_local_experts=3,
        num_experts_per_tok=1,
        router_aux_loss_coef=0.02,
        sliding_window=4,
        intermediate_size=24,
    ),
    "qwen": _plain("qwen", **_QWEN, seq_length=64, use_dynamic_ntk=False, use_logn_attn=False),
    "qwen_ntk": _plain("qwen", **_QWEN, seq_length=8, use_dynamic_ntk=True, use_logn_attn=True),
    "qwen2": _config(
        "qwen2",
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_size=36,
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=32,
        max_window_layers=2,
    ),
    "qwen2_moe": _config(
        "qwen2_moe",
        **_MOE,
        num_hidden_layers=3,
        mlp_only_layers=[0],
        shared_expert_intermediate_size=20,
        norm_topk_prob=False,
        use_sliding_window=False,
    ),
    "qwen3": _config(
        "qwen3", hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=12, tie_word_embeddings=True
    ),
    "qwen3_moe": _config(
        "qwen3_moe",
        **_MOE | {"num_experts": 7, "num_experts_per_tok": 3},
        head_dim=10,
        num_hidden_layers=3,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        mlp_only_layers=[],
    ),
    "baichuan_7b": _config("baichuan", **_BAICHUAN | {"architectures": ["BaiChuanForCausalLM"]}),
    "baichuan_13b": _config(
        "baichuan",
        **_BAICHUAN,
        num_attention_heads=6,
        hidden_size=48,
        max_position_embeddings=None,
        model_max_length=64,
    ),
    "baichuan2_7b": _config("baichuan", **_BAICHUAN, model_max_length=64, z_loss_weight=0),
    "baichuan2_13b": _config(
        "baichuan",
        **_BAICHUAN,
        num_attention_heads=5,
        hidden_size=40,
        max_position_embeddings=None,
        model_max_length=64,
        z_loss_weight=0.01,
    ),
    "chatglm": _plain(
        "chatglm",
        num_hidden_layers=None,
        num_layers=2,
        inner_hidden_size=48,
        layernorm_epsilon=1e-5,
        max_sequence_length=64,
        position_encoding_2d=True,
        num_attention_heads=4,
        tie_word_embeddings=None,
        bos_token_id=SPECIAL["sop"],
        eos_token_id=SPECIAL["eop"],
        mask_token_id=SPECIAL["mask"],
        gmask_token_id=SPECIAL["gmask"],
        pad_token_id=3,
    ),
    "chatglm2": _plain("chatglm", **_CHATGLM2),
    "chatglm3": _plain("chatglm", **_CHATGLM2 | {"num_attention_heads": 4, "multi_query_group_num": 1}),
    "chatglm2_glm_4_9b": _plain("chatglm", **_CHATGLM2, rope_ratio=50),
    "chatglm2_mha": _plain(
        "chatglm",
        **_CHATGLM2
        | {"multi_query_attention": False, "num_attention_heads": 3, "kv_channels": 12, "add_bias_linear": True},
    ),
    "glm": _config(
        "glm",
        hidden_size=24,
        head_dim=12,
        num_attention_heads=3,
        num_key_value_heads=1,
        attention_bias=True,
        partial_rotary_factor=0.5,
    ),
    "glm4": _config("glm4", head_dim=8, attention_bias=True, partial_rotary_factor=0.5),
    "bloom": _plain("bloom", **_BLOOM, n_head=4),
    "bloom_7heads": _plain("bloom", **_BLOOM | {"hidden_size": 42}, n_head=7),
    "bloom_post": _plain("bloom", **_BLOOM, n_head=4, apply_residual_connection_post_layernorm=True),
    "gpt2": _plain(
        "gpt2",
        hidden_size=None,
        n_embd=36,
        num_hidden_layers=None,
        n_layer=2,
        num_attention_heads=None,
        n_head=3,
        n_positions=64,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=None,
    ),
    "opt": _plain("opt", **_OPT),
    "opt_350m": _plain("opt", **_OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}, num_hidden_layers=3),
    "internlm": _config("internlm", num_key_value_heads=None, bias=True),
    "internlm2": _config("internlm2", num_attention_heads=6, num_key_value_heads=2, hidden_size=48, bias=False),
    "gemma": _config(
        "gemma",
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        hidden_act=None,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    "gemma2": _config(
        "gemma2",
        num_attention_heads=4,
        head_dim=10,
        hidden_act=None,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=4,
        num_hidden_layers=3,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
    ),
    "deepseek_v2": _config(
        "deepseek_v2",
        **_LATENT,
        q_lora_rank=14,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        scoring_func="softmax",
        norm_topk_prob=False,
    ),
    "deepseek_v2_lite": _config(
        "deepseek_v2",
        **_LATENT,
        q_lora_rank=None,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    ),
    "deepseek_v3": _config(
        "deepseek_v3",
        **_LATENT,
        q_lora_rank=14,
        topk_method="noaux_tc",
        n_group=4,
        topk_group=2,
        scoring_func="sigmoid",
        norm_topk_prob=True,
    ),
}

NAMES = tuple(CONFIGS)
MOE = tuple(name for name in NAMES if name.startswith(("mixtral", "qwen2_moe", "qwen3_moe", "deepseek")))
WINDOWED = ("mistral", "mixtral_window", "gemma2")
ALIBI = ("baichuan_13b", "baichuan2_13b", "bloom", "bloom_7heads", "bloom_post")
LEARNED = ("gpt2", "opt", "opt_350m")
TWO_POSITIONS = ("chatglm",)
LATENT = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3")
# Past a length, keys are turned by a base that depends on the whole text: tokens of different steps cannot agree.
STRETCHED = ("qwen_ntk", "llama_dynamic")


def config(name, **changes):
    """The ModelConfig; changes replace keys of config.json (None takes one away)."""
    source = {key: value for key, value in (CONFIGS[name] | changes).items() if value is not None or key not in changes}
    return families.ModelConfig.from_dict(json.loads(json.dumps(source)), name)


def family(name):
    return config(name).family


def fill(model, seed=0):
    """Every weight from (seed, its Hugging Face name); returns the model."""
    weights = formats.weights.named_weights(model)
    arrays = draw({w.name: tuple(w.shape) for w in weights}, seed)
    for w in weights:
        array = arrays[w.name]
        if w.name.endswith("norm.weight"):
            array = array - model.config.norm_offset
        M.set_parameter(w.parameter, w.from_numpy(array))
    return model


def build(name, seed=0, **changes):
    """A CausalLM in eval mode, every weight drawn."""
    model = fill(M.build(config(name, **changes)), seed)
    model.eval()
    return model


def write(folder, name, seed=0, dtype="float32", **changes):
    """A Hugging Face folder of build(name, seed, **changes), without a tokenizer; returns its Path."""
    formats.weights.save_pretrained(build(name, seed, **changes), folder, dtype)
    return Path(folder)
