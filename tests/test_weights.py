"""Weights of every family both ways: Hugging Face's files as published and as transformers writes them, PaddleNLP's files,
names of checkpoints, and what config.json may say.

    python -m pytest tests/test_weights.py                                          # CPU, about 60 s, neither torch nor peft
    python -m pytest tests/test_weights.py --hf-python /path/to/venv/bin/python     # also: transformers and peft open ours
"""
import io
import json
import pickle
import shutil
import tracemalloc

import numpy as np
import paddle
import pytest
from conftest import SHARED
from families import CONFIGS, LATENT, MOE, V, build, config, write
from test_model import largest, tensor

import model as M
from data import UserError

NOT_IN_FAMILIES = ("ernie4_5", "gemma3_text", "gpt_neox", "phi3")
FOLDERS = sorted(p.parent for group in ("hf", "models") for p in (SHARED / "golden" / group).glob("*/config.json")
                 if p.parent.name not in NOT_IN_FAMILIES)  # fmt: skip
needs_goldens = pytest.mark.skipif(not FOLDERS, reason="no ../shared/golden beside the repository")
IDS = np.random.default_rng(0).integers(3, 50, (2, 11))
# Configs whose software is in transformers; the others' is code that is published with the weights.
REMOTE = [name for name in CONFIGS if name.startswith(("baichuan", "chatglm", "qwen_", "internlm")) or name == "qwen"]
IN_TRANSFORMERS = [name for name in CONFIGS if name not in REMOTE]


def logits(model, ids=IDS):
    model.eval()
    with paddle.no_grad():
        return model(tensor(ids)).numpy()


def entries(folder):
    """{name: (dtype, shape, bytes)} of all safetensors of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        found.update({n: (d, s, raw[b:e]) for n, (d, s, b, e) in M.safetensors_header(path).items()})
    return found


def hf_tensors(folder):
    """{name: array} of a Hugging Face folder of any storage."""
    return {name: read() for name, (read, _) in M._shards(folder).items()}


# ================================================================================== Hugging Face's files, both ways


@needs_goldens
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_every_golden_comes_back_bit_by_bit(folder, tmp_path):
    """Names, shapes, dtypes and bits; config.json but for the dtype it names."""
    source = entries(folder)
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[next(iter(source.values()))[0] if source else "F32"]
    model = M.from_pretrained(folder)
    M.save_pretrained(model, tmp_path / "one", dtype)
    M.save_pretrained(model, tmp_path / "many", dtype, max_shard_bytes=20_000)
    saved = entries(tmp_path / "one")
    assert entries(tmp_path / "many") == saved and len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    if source:
        assert saved.keys() == source.keys() and all(saved[n] == source[n] for n in saved)
    else:  # .bin files
        theirs = hf_tensors(folder)
        ours = M.read_safetensors(tmp_path / "one" / "model.safetensors")
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == saved.keys()
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "many"))
    for key in ("dtype", "torch_dtype"):
        before.pop(key, None), after.pop(key, None)
    assert before == after
    again = M.from_pretrained(tmp_path / "many")
    for a, b in zip(M.base_weights(model), M.base_weights(again)):
        assert np.array_equal(a.to_numpy(), b.to_numpy()), a.name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back(name, tmp_path):
    model = build(name)
    M.save_pretrained(model, tmp_path / "a", max_shard_bytes=8_000)
    again = M.from_pretrained(tmp_path / "a")
    M.save_pretrained(again, tmp_path / "b", max_shard_bytes=8_000)
    assert entries(tmp_path / "a") == entries(tmp_path / "b") != {}
    assert np.array_equal(logits(model), logits(again))
    assert {k: v for k, v in vars(again.config).items() if k != "source"} == {k: v for k, v in vars(model.config).items() if k != "source"}


def rewritten(folder, tensors):
    """The folder's weights replaced by these."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    M.write_safetensors(folder / "model.safetensors", {n: np.ascontiguousarray(a) for n, a in tensors.items()})
    return folder


PUBLISHED = {  # config: how published files of the family differ from what its class saves
    "gpt2": lambda t: {n.removeprefix("transformer."): a for n, a in t.items()}
    | {f"h.{i}.attn.bias": np.tri(64, dtype=np.float32)[None, None] for i in (0, 1)}
    | {"h.0.attn.masked_bias": np.float32([-1e4])},
    "bloom": lambda t: {n.removeprefix("transformer."): a for n, a in t.items()},
    "bloom_7heads": lambda t: t | {"lm_head.weight": t["transformer.word_embeddings.weight"]},
    "opt": lambda t: {n.removeprefix("model."): a for n, a in t.items()} | {"decoder.version": np.float32([3])},
    "opt_350m": lambda t: t | {"lm_head.weight": t["model.decoder.embed_tokens.weight"]},
    "llama": lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in (0, 1)},
    "internlm": lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in (0, 1)},
    "internlm2": lambda t: {n.removeprefix("model."): a for n, a in t.items()},
    "baichuan2_7b": lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in (0, 1)},
    "chatglm": lambda t: {n: a for n, a in t.items() if "inv_freq" not in n},
    "qwen": lambda t: t | {"transformer.rotary_emb.inv_freq": np.ones(4, np.float32)},
    "qwen2": lambda t: {n.removeprefix("model."): a for n, a in t.items()} | {"lm_head.weight": t["model.embed_tokens.weight"]},
    "gemma": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]},
    "deepseek_v3": lambda t: t | {"model.layers.3.eh_proj.weight": np.zeros((2, 4), np.float32), "model.layers.3.mlp.gate.weight": np.zeros((2, 4), np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_as_published(name, tmp_path):
    change = {"num_nextn_predict_layers": 1} if name == "deepseek_v3" else {}
    folder = write(tmp_path / "a", name, **change)
    expected = logits(M.from_pretrained(folder))
    rewritten(folder, PUBLISHED[name](M.read_safetensors(folder / "model.safetensors")))
    assert np.array_equal(logits(M.from_pretrained(folder)), expected)


def fused_experts(tensors):
    """As transformers 5 keeps them in memory, and saves them with save_original_format=False."""
    result, experts = {}, {}
    for name, array in tensors.items():
        stem, found, rest = name.partition(".experts.")
        if not found:
            result[name.replace(".block_sparse_moe.", ".mlp.")] = array
            continue
        e, which, _ = rest.split(".")
        which = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(which, which)
        experts.setdefault(stem.replace("block_sparse_moe", "mlp"), {})[int(e), which] = array
    for stem, parts in experts.items():
        E = range(len(parts) // 3)
        result[f"{stem}.experts.gate_up_proj"] = np.stack([np.concatenate([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in E])
        result[f"{stem}.experts.down_proj"] = np.stack([parts[e, "down_proj"] for e in E])
    return result


@pytest.mark.parametrize("name", MOE)
def test_all_experts_of_a_layer_in_one_tensor(name, tmp_path):
    folder = write(tmp_path / "a", name)
    expected, tensors = logits(M.from_pretrained(folder)), M.read_safetensors(folder / "model.safetensors")
    fused = fused_experts(tensors)
    assert len(fused) < len(tensors)
    assert np.array_equal(logits(M.from_pretrained(rewritten(folder, fused))), expected)
    wrong = next(n for n in fused if n.endswith("gate_up_proj"))
    with pytest.raises(UserError, match="has shape"):
        M.from_pretrained(rewritten(folder, fused | {wrong: fused[wrong][:, 2:]}))


def test_fp8_is_refused_by_name(tmp_path):
    folder = write(tmp_path / "a", "deepseek_v3")
    source = json.loads((folder / "config.json").read_text())
    source["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match="quant_method 'fp8' cannot be read"):
        M.from_pretrained(folder)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    for name in ("gpt2", "mixtral", "chatglm2", "deepseek_v2"):
        folder = write(tmp_path / name, name)
        tensors = M.read_safetensors(folder / "model.safetensors")
        gone = next(n for n in tensors if ".1." in n)
        rewritten(folder, {n: a for n, a in tensors.items() if n != gone} | {"model.extra": np.zeros(2, np.float32)})
        with pytest.raises(UserError) as error:
            M.from_pretrained(folder)
        assert f"missing {gone}" in str(error.value) and "unexpected model.extra" in str(error.value)


# ====================================================================================== transformers and peft


def what_its_class_asks_for(name):
    """Keys that transformers checks although nothing depends on them: D as a multiple of H, a padding id below V."""
    D, H = CONFIGS[name].get("hidden_size"), CONFIGS[name].get("num_attention_heads")
    more = {"hidden_size": -(-D // H) * H} if D and H else {}
    return {"pad_token_id": CONFIGS[name].get("pad_token_id", 0)} | more


@pytest.mark.torch
def test_transformers_opens_every_family(hf_python, tmp_path):
    models = {name: build(name, **what_its_class_asks_for(name)) for name in IN_TRANSFORMERS}
    for i, (name, model) in enumerate(models.items()):
        M.save_pretrained(model, tmp_path / "ours" / name, max_shard_bytes=8_000 if i % 2 else 5 << 30)
    np.save(tmp_path / "ids.npy", IDS)
    script = """
import pathlib, torch, transformers
arrays = {}
for folder in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    with torch.no_grad():
        arrays[folder.name] = model(torch.from_numpy(np.load(sys.argv[3]))).logits.numpy()
"""
    theirs = hf_python(script, tmp_path / "ours", tmp_path / "ids.npy")
    assert theirs.keys() == models.keys()
    errors = {name: largest(theirs[name], logits(model)) for name, model in models.items()}
    print(errors)
    assert max(errors.values()) < 1e-4, errors


# name: (class of transformers, changes of its config)
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "llama_linear_head_dim": ("Llama", {"head_dim": 12, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "llama_yarn_factor": ("Llama", {"rope_parameters": {**_YARN, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}}),
    "llama_yarn_not_truncated": ("Llama", {"rope_parameters": {**_YARN, "truncate": False}}),
    "mistral_yarn": ("Mistral", {"head_dim": 16, "sliding_window": None, "rope_parameters": _YARN}),
    "mistral_linear_window": ("Mistral", {"sliding_window": 5, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    "qwen2_linear": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    "qwen2_yarn_tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen2_dynamic": ("Qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}}),
    "qwen3_bias": ("Qwen3", {"attention_bias": True, "head_dim": 16}),
    "mixtral_window": ("Mixtral", {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral_one": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "mixtral_tied": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True, "head_dim": 16}),
    "qwen2_moe_dense": ("Qwen2Moe", {**_EXPERTS, "mlp_only_layers": [1], "shared_expert_intermediate_size": 40}),
    "qwen2_moe_step": ("Qwen2Moe", {**_EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True, "shared_expert_intermediate_size": 40}),
    "qwen2_moe_no_bias": ("Qwen2Moe", {**_EXPERTS, "qkv_bias": False, "shared_expert_intermediate_size": 40}),
    "qwen3_moe_dense": ("Qwen3Moe", {**_EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3_moe_raw": ("Qwen3Moe", {**_EXPERTS, "attention_bias": True, "norm_topk_prob": False}),
    "gemma_untied_bias": ("Gemma", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    "gemma2_scalar": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 100, "sliding_window": 5}),
    "gemma2_types": ("Gemma2", {"head_dim": 16, "layer_types": ["full_attention", "full_attention", "sliding_attention"], "sliding_window": 4,
                                "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "glm_quarter": ("Glm", {"head_dim": 16, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "glm_whole": ("Glm", {"head_dim": 16, "attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    "glm4_most": ("Glm4", {"head_dim": 16, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    "bloom_post": ("Bloom", {"apply_residual_connection_post_layernorm": True}),
    "gpt2_relu_inner": ("GPT2", {"activation_function": "relu", "n_inner": 72}),
    "gpt2_gelu_untied": ("GPT2", {"activation_function": "gelu", "tie_word_embeddings": False}),
    "gpt2_upcast": ("GPT2", {"reorder_and_upcast_attn": True}),
    "opt_no_bias": ("OPT", {"enable_bias": False}),
    "opt_no_final_norm": ("OPT", {"_remove_final_layer_norm": True}),
    "opt_gelu": ("OPT", {"activation_function": "gelu"}),
    "opt_gelu_new": ("OPT", {"activation_function": "gelu_new"}),
    "opt_after": ("OPT", {"do_layer_norm_before": False}),
    "opt_untied": ("OPT", {"tie_word_embeddings": False}),
    "deepseek_v2_greedy": ("DeepseekV2", {"topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v2_groups": ("DeepseekV2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "deepseek_v2_yarn": ("DeepseekV2", {"rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "deepseek_v2_yarn_uneven": ("DeepseekV2", {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "deepseek_v2_bias": ("DeepseekV2", {"attention_bias": True}),
    "deepseek_v3": ("DeepseekV3", {}),
    "deepseek_v3_halves_bias": ("DeepseekV3", {"rope_interleave": False, "attention_bias": True}),
    "deepseek_v3_raw": ("DeepseekV3", {"norm_topk_prob": False, "q_lora_rank": None}),
    "deepseek_v3_yarn": ("DeepseekV3", {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
}  # fmt: skip
_SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
_LLAMA_SIZES = {**_SIZES, "intermediate_size": 56, "num_key_value_heads": 2}
_LATENT_SIZES = {**_LLAMA_SIZES, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                 "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 24,
                 "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
CLASS_SIZES = {
    "GPT2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "Bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "OPT": {**_SIZES, "ffn_dim": 56, "word_embed_proj_dim": 32},
    "DeepseekV2": _LATENT_SIZES,
    "DeepseekV3": {**_LATENT_SIZES, "n_group": 4, "topk_group": 2},
}

MAKE_VARIANTS = """
import json, pathlib, torch, transformers
from transformers import AutoModelForCausalLM
out, variants, arrays = pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]), {}
for name, (kind, keys) in variants.items():
    config = getattr(transformers, kind + "Config")(**keys)
    config._attn_implementation = "eager"
    model, generator = AutoModelForCausalLM.from_config(config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            norm = p.ndim == 1 and key.endswith("weight") and not kind.startswith("Gemma")
            p.copy_(torch.randn(p.shape, generator=generator) * (0.25 if p.ndim > 1 else 0.1) + norm)
        for key, b in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                b.copy_(torch.randn(b.shape, generator=generator) * 0.2)
        ids = torch.randint(3, 96, (2, 12), generator=generator)
        found = model(ids, labels=ids)
        arrays.update({name + ":ids": ids.numpy(), name + ":logits": found.logits.numpy(), name + ":loss": found.loss.numpy()})
        if kind in ("Mixtral", "Qwen2Moe", "Qwen3Moe"):  # of the tokens that have a label in our layout: all but the last
            found = model(ids[:, :-1], output_router_logits=True)
            arrays[name + ":aux"] = config.router_aux_loss_coef * found.aux_loss.numpy()
    model.save_pretrained(out / name, max_shard_size="30KB")
    if ":aux" in "".join(arrays) and kind in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3"):
        model.save_pretrained(out / (name + "_fused"), save_original_format=False)
"""


@pytest.mark.torch
def test_variants_equal_transformers(hf_python, tmp_path):
    """Random weights, saved by transformers in shards, with experts one by one and all in one; logits, loss, balance."""
    variants = {name: (kind, {**CLASS_SIZES.get(kind, _LLAMA_SIZES), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, **keys})
                for name, (kind, keys) in VARIANTS.items()}  # fmt: skip
    theirs, errors = hf_python(MAKE_VARIANTS, tmp_path, json.dumps(variants)), {}
    for name in VARIANTS:
        model, ids = M.from_pretrained(tmp_path / name), theirs[f"{name}:ids"]
        inputs, labels = tensor(ids[:, :-1]), tensor(np.ascontiguousarray(ids[:, 1:]))
        errors[name] = largest(logits(model, ids), theirs[f"{name}:logits"])
        plain = float(model(inputs, labels=labels).mean())
        errors[f"{name} loss"] = abs(plain - theirs[f"{name}:loss"])
        if f"{name}:aux" in theirs:
            model.train()
            errors[f"{name} balance"] = 10 * abs(float(model(inputs, labels=labels).mean()) - plain - theirs[f"{name}:aux"])
        if (tmp_path / f"{name}_fused").is_dir():
            again = M.from_pretrained(tmp_path / f"{name}_fused")
            assert all(np.array_equal(a.to_numpy(), b.to_numpy()) for a, b in zip(M.base_weights(model), M.base_weights(again)))
    print(errors)
    assert max(errors.values()) < 1e-4, {k: v for k, v in errors.items() if v >= 1e-4}
