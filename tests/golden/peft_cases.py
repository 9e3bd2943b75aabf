"""The LoRA adapters that tests/golden/peft_options.npz holds: one a line, (base model of golden_weights.py, options).

Pure data: make_peft_golden.py (torch, peft) and the tests (Paddle) both import it. Keys of options that are not peft's:
`resize` ids are added to the vocabulary first, `write` is put into adapter_config.json afterwards (a start that needs
data but leaves the base as it is), `bin` saves adapter_model.bin.
"""

SOME = ["q_proj", "v_proj", "down_proj"]
EMBED, HEAD = ["q_proj", "embed_tokens"], ["v_proj", "lm_head"]
OPTIONS = {
    "init_true": ("gqa", {}),
    "init_false": ("gqa", {"init_lora_weights": False}),
    "init_gaussian": ("gqa", {"init_lora_weights": "gaussian"}),
    "init_orthogonal": ("gqa", {"init_lora_weights": "orthogonal"}),
    "init_eva": ("gqa", {"write": {"init_lora_weights": "eva"}}),
    "init_mica": ("gqa", {"init_lora_weights": "mica"}),
    "init_pissa": ("gqa", {"init_lora_weights": "pissa"}),
    "init_pissa_rslora": ("bias_tied", {"init_lora_weights": "pissa", "use_rslora": True}),
    "init_pissa_rank_pattern": ("gqa", {"init_lora_weights": "pissa", "rank_pattern": {"v_proj": 5},
                                        "alpha_pattern": {"down_proj": 9}}),
    "init_pissa_dora": ("gqa", {"init_lora_weights": "pissa", "use_dora": True}),
    "init_olora": ("gqa", {"init_lora_weights": "olora"}),
    "init_olora_tied": ("bias_tied", {"init_lora_weights": "olora"}),
    "init_pissa_embed": ("gqa", {"init_lora_weights": "pissa", "target_modules": EMBED}),
    "rank_pattern": ("gqa", {"rank_pattern": {"q_proj": 5, r"^model\.layers\.1\..*down_proj": 3}}),
    "alpha_pattern": ("gqa", {"alpha_pattern": {"0.self_attn.v_proj": 7, "v_proj": 2}, "use_rslora": True}),
    "layers_to_transform": ("gqa", {"layers_to_transform": [1]}),
    "layers_pattern": ("gqa", {"layers_to_transform": 0, "layers_pattern": "layers"}),
    "exclude_modules": ("gqa", {"exclude_modules": ["0.self_attn.q_proj"]}),
    "exclude_regex": ("gqa", {"exclude_modules": r".*\.1\..*v_proj", "target_modules": r".*_proj"}),
    "use_dora": ("bias_tied", {"use_dora": True}),
    "use_rslora": ("gqa", {"use_rslora": True}),
    "bias_all": ("bias_tied", {"bias": "all"}),
    "bias_lora_only": ("bias_tied", {"bias": "lora_only"}),
    "lora_bias": ("bias_tied", {"lora_bias": True}),
    "lora_bias_without": ("gqa", {"lora_bias": True}),
    "bin": ("gqa", {"bin": True}),
    "modules_to_save": ("gqa", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules_to_save_norm": ("gqa", {"modules_to_save": ["norm", "1.mlp.up_proj"]}),
    "modules_to_save_tied": ("bias_tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules_to_save_tied_embed": ("bias_tied", {"modules_to_save": ["embed_tokens"]}),
    "modules_to_save_tied_head": ("bias_tied", {"modules_to_save": ["lm_head"]}),
    "embed_tokens": ("gqa", {"target_modules": EMBED}),
    "embed_tokens_tied": ("bias_tied", {"target_modules": EMBED}),
    "embed_tokens_dora": ("gqa", {"target_modules": EMBED, "use_dora": True, "use_rslora": True}),
    "lm_head": ("gqa", {"target_modules": HEAD}),
    "lm_head_tied": ("bias_tied", {"target_modules": HEAD}),
    "lm_head_dora": ("gqa", {"target_modules": HEAD, "use_dora": True}),
    "lm_head_pissa": ("gqa", {"target_modules": HEAD, "init_lora_weights": "pissa"}),
    "resized": ("gqa", {"resize": 3}),
    "resized_tied": ("bias_tied", {"resize": 3}),
    "resized_embed_head": ("gqa", {"resize": 3, "target_modules": ["embed_tokens", "lm_head"]}),
    "resized_modules_to_save": ("gqa", {"resize": 3, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized_tokens": ("gqa", {"resize": 3, "trainable_token_indices": {"embed_tokens": [56, 57, 58],
                                                                        "lm_head": [56, 57, 58]}}),
    "tokens": ("gqa", {"trainable_token_indices": [3, 9, 40]}),
    "tokens_embed_head": ("gqa", {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [7]}}),
    "tokens_tied": ("bias_tied", {"trainable_token_indices": [3, 9, 40]}),
}  # fmt: skip
