"""The configs and weights behind tests/golden: drawn from a seed and the key list, so that no checkpoint is stored.

Pure numpy: make_golden.py (torch) and the tests (Paddle) both import it, and so hold the same model. Letters: B batch,
T sequence, D model width, H query heads, K key/value heads, Dh head dim, F feed-forward width, V vocabulary."""

import zlib

import numpy as np

V, B, T, NEW = 56, 2, 12, 10  # vocabulary, batch, prompt, and how many tokens are generated


def _case(rope=None, family="llama", **changes):
    """(config.json of transformers 4, that of transformers 5) of one small model."""
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
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    theta = common.pop("rope_theta", 10000.0)
    v4 = {
        **common,
        "rope_theta": theta,
        "rope_scaling": rope
        and {("type" if k == "rope_type" and rope[k] in ("linear", "dynamic") else k): rope[k] for k in rope},
        "torch_dtype": "float32",
    }
    v5 = {**common, "rope_parameters": {"rope_theta": theta, **(rope or {"rope_type": "default"})}, "dtype": "float32"}
    return v4, v5


CASES = {
    "mha": _case(num_key_value_heads=4, rms_norm_eps=1e-6),
    "gqa": _case(rope_theta=500.0),
    "gqa_linear": _case({"rope_type": "linear", "factor": 2.5}, rope_theta=100.0),
    "gqa_dynamic": _case({"rope_type": "dynamic", "factor": 3.0}, rope_theta=100.0, max_position_embeddings=8),
    "gqa_yarn": _case({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, rope_theta=1000.0),
    "gqa_yarn_mscale": _case(
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 4, "beta_slow": 0.5,
         "mscale": 0.8, "mscale_all_dim": 0.3, "truncate": False}, rope_theta=200.0),
    "gqa_llama3": _case(
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32}, rope_theta=500.0),
    "headdim": _case(head_dim=12, num_key_value_heads=1, rms_norm_eps=0.02),
    "bias_tied": _case(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": _case(family="mistral", sliding_window=None, head_dim=None, rope_theta=1e5),
}  # fmt: skip


def shapes(config):
    """{Hugging Face name: shape} of a config.json."""
    D, F, H = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    K, Dh = config["num_key_value_heads"], config.get("head_dim") or D // H
    shapes_by_name = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    if not config.get("tie_word_embeddings"):
        shapes_by_name["lm_head.weight"] = (config["vocab_size"], D)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        shapes_by_name[block + "input_layernorm.weight"] = shapes_by_name[block + "post_attention_layernorm.weight"] = (
            D,
        )
        rows = [
            ("self_attn.q_proj", H * Dh, D),
            ("self_attn.k_proj", K * Dh, D),
            ("self_attn.v_proj", K * Dh, D),
            ("self_attn.o_proj", D, H * Dh),
            ("mlp.gate_proj", F, D),
            ("mlp.up_proj", F, D),
            ("mlp.down_proj", D, F),
        ]
        for name, n_out, n_in in rows:
            shapes_by_name[f"{block}{name}.weight"] = (n_out, n_in)
            if config.get("attention_bias" if "attn" in name else "mlp_bias"):
                shapes_by_name[f"{block}{name}.bias"] = (n_out,)
    return shapes_by_name


def draw(names_and_shapes, seed=0):
    """{name: float32 array}, each from (seed, name) alone; large enough that a swapped tensor is visible."""
    arrays = {}
    for name, shape in names_and_shapes.items():
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            arrays[name] = noise * np.float32(1.0 / np.sqrt(shape[1]))
        else:
            arrays[name] = noise * np.float32(0.2) + np.float32(0.0 if name.endswith("bias") else 1.0)
    return arrays


def inputs(seed=23):
    """input_ids and labels (B, T) (shifted already, some ignored), and a left-padded batch: ids and mask (B, T).

    The seed is one for which no greedy step of any case is a close call (make_golden.py checks it).
    """
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, V, (B, T))
    labels = np.concatenate([ids[:, 1:], np.full((B, 1), -100)], 1)
    labels[1, :4] = -100
    mask = np.ones((B, T), np.int64)
    mask[1, :5] = 0
    return ids, labels, np.where(mask == 1, generator.integers(3, V, (B, T)), 0), mask
