"""Weights of every family, both ways: Hugging Face's files as published and as transformers writes them, PaddleNLP's
files, names of checkpoints, and what config.json may say.

    python -m pytest tests/test_weights.py                                       # CPU, about 60 s, no torch, no peft
    python -m pytest tests/test_weights.py --hf-python /path/to/venv/bin/python  # also: transformers and peft open ours
"""

import json
import pickle
import re
import tracemalloc
import types

import numpy as np
import paddle
import pytest
from conftest import SHARED
from test_model import largest, tensor
from test_trainer import make_args
from tiny_models import CONFIGS, LATENT, MOE, V, build, config, write

import adapters
import families
import formats.tensor_files
import formats.weights
import model as M
import parallel
import trainer
from checkpoint import CheckpointManager, TrainState, find_checkpoint, load_checkpoint, load_trained
from distributed.sharding import ZeroOptimizer
from formats.files import UserError

pytestmark = pytest.mark.sweep(keep=12)

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
        found.update({n: (d, s, raw[b:e]) for n, (d, s, b, e) in formats.tensor_files.safetensors_header(path).items()})
    return found


def hf_tensors(folder):
    """{name: array} of a Hugging Face folder of any storage."""
    return {name: read() for name, (read, _) in formats.weights.stored_tensors(folder).items()}


# ================================================================================== Hugging Face's files, both ways


@needs_goldens
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_every_golden_comes_back_bit_by_bit(folder, tmp_path):
    """Names, shapes, dtypes and bits; config.json but for the dtype it names."""
    source = entries(folder)
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[
        next(iter(source.values()))[0] if source else "F32"
    ]
    model = adapters.from_pretrained(folder)
    formats.weights.save_pretrained(model, tmp_path / "one", dtype)
    formats.weights.save_pretrained(model, tmp_path / "many", dtype, max_shard_bytes=20_000)
    saved = entries(tmp_path / "one")
    assert entries(tmp_path / "many") == saved and len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    if source:
        assert saved.keys() == source.keys() and all(saved[n] == source[n] for n in saved)
    else:  # .bin files
        theirs = hf_tensors(folder)
        ours = formats.tensor_files.read_safetensors(tmp_path / "one" / "model.safetensors")
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == saved.keys()
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "many"))
    for key in ("dtype", "torch_dtype"):
        before.pop(key, None), after.pop(key, None)
    assert before == after
    again = adapters.from_pretrained(tmp_path / "many")
    for a, b in zip(formats.weights.named_weights(model), formats.weights.named_weights(again)):
        assert np.array_equal(a.to_numpy(), b.to_numpy()), a.name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back(name, tmp_path):
    model = build(name)
    formats.weights.save_pretrained(model, tmp_path / "a", max_shard_bytes=8_000)
    again = adapters.from_pretrained(tmp_path / "a")
    formats.weights.save_pretrained(again, tmp_path / "b", max_shard_bytes=8_000)
    assert entries(tmp_path / "a") == entries(tmp_path / "b") != {}
    assert np.array_equal(logits(model), logits(again))
    assert {k: v for k, v in vars(again.config).items() if k != "source"} == {
        k: v for k, v in vars(model.config).items() if k != "source"
    }


def rewritten(folder, tensors):
    """The folder's weights replaced by these."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    formats.tensor_files.write_safetensors(
        folder / "model.safetensors", {n: np.ascontiguousarray(a) for n, a in tensors.items()}
    )
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
    "internlm": lambda t: t
    | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in (0, 1)},
    "internlm2": lambda t: {n.removeprefix("model."): a for n, a in t.items()},
    "baichuan2_7b": lambda t: t
    | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in (0, 1)},
    "chatglm": lambda t: {n: a for n, a in t.items() if "inv_freq" not in n},
    "qwen": lambda t: t | {"transformer.rotary_emb.inv_freq": np.ones(4, np.float32)},
    "qwen2": lambda t: {n.removeprefix("model."): a for n, a in t.items()}
    | {"lm_head.weight": t["model.embed_tokens.weight"]},
    "gemma": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]},
    "deepseek_v3": lambda t: t | {"model.layers.3.eh_proj.weight": np.zeros((2, 4), np.float32),
        "model.layers.3.mlp.gate.weight": np.zeros((2, 4), np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_as_published(name, tmp_path):
    change = {"num_nextn_predict_layers": 1} if name == "deepseek_v3" else {}
    folder = write(tmp_path / "a", name, **change)
    expected = logits(adapters.from_pretrained(folder))
    rewritten(folder, PUBLISHED[name](formats.tensor_files.read_safetensors(folder / "model.safetensors")))
    assert np.array_equal(logits(adapters.from_pretrained(folder)), expected)


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
        result[f"{stem}.experts.gate_up_proj"] = np.stack(
            [np.concatenate([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in E]
        )
        result[f"{stem}.experts.down_proj"] = np.stack([parts[e, "down_proj"] for e in E])
    return result


@pytest.mark.parametrize("name", MOE)
def test_all_experts_of_a_layer_in_one_tensor(name, tmp_path):
    folder = write(tmp_path / "a", name)
    expected, tensors = (
        logits(adapters.from_pretrained(folder)),
        formats.tensor_files.read_safetensors(folder / "model.safetensors"),
    )
    fused = fused_experts(tensors)
    assert len(fused) < len(tensors)
    assert np.array_equal(logits(adapters.from_pretrained(rewritten(folder, fused))), expected)
    wrong = next(n for n in fused if n.endswith("gate_up_proj"))
    with pytest.raises(UserError, match="has shape"):
        adapters.from_pretrained(rewritten(folder, fused | {wrong: fused[wrong][:, 2:]}))


def test_fp8_without_scales_is_refused_by_name(tmp_path):
    folder = write(tmp_path / "a", "deepseek_v3")
    source = json.loads((folder / "config.json").read_text())
    source["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match="quantization_config says fp8, but no tensor is quantized"):
        adapters.from_pretrained(folder)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    for name in ("gpt2", "mixtral", "chatglm2", "deepseek_v2"):
        folder = write(tmp_path / name, name)
        tensors = formats.tensor_files.read_safetensors(folder / "model.safetensors")
        gone = next(n for n in tensors if ".1." in n)
        rewritten(folder, {n: a for n, a in tensors.items() if n != gone} | {"model.extra": np.zeros(2, np.float32)})
        with pytest.raises(UserError) as error:
            adapters.from_pretrained(folder)
        assert f"missing {gone}" in str(error.value) and "unexpected model.extra" in str(error.value)


# ====================================================================================== transformers and peft


def what_its_class_asks_for(name):
    """Keys that transformers checks although nothing depends on them: D as a multiple of H, a padding id below V."""
    D, H = CONFIGS[name].get("hidden_size"), CONFIGS[name].get("num_attention_heads")
    more = {"hidden_size": -(-D // H) * H} if D and H else {}
    return {"pad_token_id": CONFIGS[name].get("pad_token_id", 0)} | more


OPENS_ALL = """
import pathlib, torch, transformers
arrays = {}
for folder in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    with torch.no_grad():
        arrays[folder.name] = model(torch.from_numpy(np.load(sys.argv[3]))).logits.numpy()
"""  # the logits of every model of a folder, by its name


@pytest.mark.torch
def test_transformers_opens_every_family(hf_python, tmp_path):
    models = {name: build(name, **what_its_class_asks_for(name)) for name in IN_TRANSFORMERS}
    for i, (name, model) in enumerate(models.items()):
        formats.weights.save_pretrained(model, tmp_path / "ours" / name, max_shard_bytes=8_000 if i % 2 else 5 << 30)
    np.save(tmp_path / "ids.npy", IDS)
    theirs = hf_python(OPENS_ALL, tmp_path / "ours", tmp_path / "ids.npy")
    assert theirs.keys() == models.keys()
    errors = {name: largest(theirs[name], logits(model)) for name, model in models.items()}
    print(errors)
    assert max(errors.values()) < 1e-4, errors


# name: (class of transformers, changes of its config)
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "llama_linear_head_dim": ("Llama", {"head_dim": 12,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "llama_yarn_factor": ("Llama", {"rope_parameters": {**_YARN, "attention_factor": 1.3, "beta_fast": 16,
        "beta_slow": 2}}),
    "llama_yarn_not_truncated": ("Llama", {"rope_parameters": {**_YARN, "truncate": False}}),
    "mistral_yarn": ("Mistral", {"head_dim": 16, "sliding_window": None, "rope_parameters": _YARN}),
    "mistral_linear_window": ("Mistral", {"sliding_window": 5,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    "qwen2_linear": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    "qwen2_yarn_tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen2_dynamic": ("Qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}}),
    "qwen3_bias": ("Qwen3", {"attention_bias": True, "head_dim": 16}),
    "mixtral_window": ("Mixtral", {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral_one": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "mixtral_tied": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True,
        "head_dim": 16}),
    "qwen2_moe_dense": ("Qwen2Moe", {**_EXPERTS, "mlp_only_layers": [1], "shared_expert_intermediate_size": 40}),
    "qwen2_moe_step": ("Qwen2Moe", {**_EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True,
        "shared_expert_intermediate_size": 40}),
    "qwen2_moe_no_bias": ("Qwen2Moe", {**_EXPERTS, "qkv_bias": False, "shared_expert_intermediate_size": 40}),
    "qwen3_moe_dense": ("Qwen3Moe", {**_EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3_moe_raw": ("Qwen3Moe", {**_EXPERTS, "attention_bias": True, "norm_topk_prob": False}),
    "gemma_untied_bias": ("Gemma", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    "gemma2_scalar": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 100, "sliding_window": 5}),
    "gemma2_types": ("Gemma2", {"head_dim": 16,
                                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
                                "sliding_window": 4,
                                "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "glm_quarter": ("Glm", {"head_dim": 16, "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "glm_whole": ("Glm", {"head_dim": 16, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    "glm4_most": ("Glm4", {"head_dim": 16, "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
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
    "deepseek_v2_groups": ("DeepseekV2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5}),
    "deepseek_v2_yarn": ("DeepseekV2", {"rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "deepseek_v2_yarn_uneven": ("DeepseekV2", {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "deepseek_v2_bias": ("DeepseekV2", {"attention_bias": True}),
    "deepseek_v3": ("DeepseekV3", {}),
    "deepseek_v3_halves_bias": ("DeepseekV3", {"rope_interleave": False, "attention_bias": True}),
    "deepseek_v3_raw": ("DeepseekV3", {"norm_topk_prob": False, "q_lora_rank": None}),
    "deepseek_v3_yarn": ("DeepseekV3", {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
}  # fmt: skip
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA_SIZES = {**_SIZES, "intermediate_size": 56, "num_key_value_heads": 2}
_LATENT_SIZES = {**_LLAMA_SIZES, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16,
                 "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                 "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
                 "moe_intermediate_size": 24,
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
        arrays.update({name + ":ids": ids.numpy(), name + ":logits": found.logits.numpy()})
        arrays[name + ":loss"] = found.loss.numpy()
        if kind in ("Mixtral", "Qwen2Moe", "Qwen3Moe"):  # of tokens with a label in our layout: all but the last
            found = model(ids[:, :-1], output_router_logits=True)
            arrays[name + ":aux"] = config.router_aux_loss_coef * found.aux_loss.numpy()
    model.save_pretrained(out / name, max_shard_size="30KB")
    if ":aux" in "".join(arrays) and kind in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3"):
        model.save_pretrained(out / (name + "_fused"), save_original_format=False)
"""


@pytest.mark.torch
def test_variants_equal_transformers(hf_python, tmp_path):
    """Random weights saved by transformers in shards, experts one by one and all in one; logits, loss, balance."""
    variants = {
        name: (
            kind,
            {**CLASS_SIZES.get(kind, _LLAMA_SIZES), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, **keys},
        )
        for name, (kind, keys) in VARIANTS.items()
    }
    theirs, errors = hf_python(MAKE_VARIANTS, tmp_path, json.dumps(variants)), {}
    for name in VARIANTS:
        model, ids = adapters.from_pretrained(tmp_path / name), theirs[f"{name}:ids"]
        inputs, labels = tensor(ids[:, :-1]), tensor(np.ascontiguousarray(ids[:, 1:]))
        errors[name] = largest(logits(model, ids), theirs[f"{name}:logits"])
        plain = float(model(inputs, labels=labels).mean())
        errors[f"{name} loss"] = abs(plain - theirs[f"{name}:loss"])
        if f"{name}:aux" in theirs:
            model.train()
            errors[f"{name} balance"] = 10 * abs(
                float(model(inputs, labels=labels).mean()) - plain - theirs[f"{name}:aux"]
            )
        if (tmp_path / f"{name}_fused").is_dir():
            again = adapters.from_pretrained(tmp_path / f"{name}_fused")
            assert all(
                np.array_equal(a.to_numpy(), b.to_numpy())
                for a, b in zip(formats.weights.named_weights(model), formats.weights.named_weights(again))
            )
    print(errors)
    assert max(errors.values()) < 1e-4, {k: v for k, v in errors.items() if v >= 1e-4}


# ============================================================================================ PaddleNLP's files


def turned(tensors, *linears):
    """Linears as Paddle has them: [in, out]."""
    return {n: a.T if n.endswith(".weight") and any(l in n for l in linears) else a for n, a in tensors.items()}


_LLAMA_LINEARS = ("_proj.", "lm_head.", "gate.", "w1.", "w2.", "w3.")


def renamed(tensors, *pairs):
    result = {}
    for name, array in tensors.items():
        for a, b in pairs:
            name = name.replace(a, b, 1)
        result[name] = array
    return result


def paddle_gpt(tensors):
    """q, k, v apart, Conv1D's orientation kept, the layers called after paddle.nn.TransformerDecoderLayer."""
    result = {}
    for name, array in tensors.items():
        if ".c_attn." in name:
            for which, part in zip("qkv", np.split(array, 3, axis=-1)):
                result[name.replace("attn.c_attn", f"self_attn.{which}_proj")] = part
        else:
            result[name] = array
    return renamed(
        result,
        ("transformer.wte", "gpt.embeddings.word_embeddings"),
        ("transformer.wpe", "gpt.embeddings.position_embeddings"),
        ("transformer.ln_f", "gpt.decoder.norm"),
        ("transformer.h.", "gpt.decoder.layers."),
        (".ln_1.", ".norm1."),
        (".ln_2.", ".norm2."),
        ("attn.c_proj", "self_attn.out_proj"),
        ("mlp.c_fc", "linear1"),
        ("mlp.c_proj", "linear2"),
    )


def paddle_opt(tensors):
    tensors = turned(tensors, "_proj.", "fc1.", "fc2.", "project_")
    tensors = renamed(
        tensors,
        ("model.decoder.final_layer_norm", "opt.decoder.FINAL"),
        ("model.decoder.embed_tokens", "opt.embeddings.word_embeddings"),
        ("model.decoder.embed_positions", "opt.embeddings.position_embeddings"),
        ("model.decoder.project_in", "opt.embeddings.project_in"),
        ("model.", "opt."),
        ("self_attn_layer_norm", "norm1"),
        ("final_layer_norm", "norm2"),
        ("FINAL", "final_layer_norm"),
        ("fc1", "linear1"),
        ("fc2", "linear2"),
    )
    return {n.replace("opt.opt.", "opt."): a for n, a in tensors.items()}


def paddle_llama(prefix):
    return lambda tensors: renamed(turned(tensors, *_LLAMA_LINEARS), ("model.", prefix))


def fuse_attention(tensors, K, G, Dh):
    """fuse_attention_qkv: for each key head its queries, its key, its value."""
    result = dict(tensors)
    for name in [n for n in tensors if ".q_proj." in n]:
        q, k, v = (result.pop(name.replace(".q_proj.", f".{which}_proj.")) for which in "qkv")
        parts = [a.reshape(*a.shape[:-1], K, n * Dh) for a, n in ((q, G), (k, 1), (v, 1))]
        result[name.replace(".q_proj.", ".qkv_proj.")] = np.concatenate(parts, -1).reshape(*q.shape[:-1], -1)
    return result


def fuse_ffn(tensors, gate, up):
    result = dict(tensors)
    for name in [n for n in tensors if f".mlp.{gate}." in n]:
        parts = [result.pop(name.replace(f".{gate}.", f".{which}.")) for which in (gate, up)]
        result[name.replace(f".{gate}.", ".gate_up_fused_proj.")] = np.concatenate(parts, -1)
    return result


def paddle_baichuan_13b(tensors):
    """As Paddle's bucket has it: a Llama with ALiBi."""
    result = {}
    for name, array in tensors.items():
        if "W_pack" in name:
            for which, part in zip("qkv", np.split(array, 3)):
                result[name.replace("W_pack", f"{which}_proj")] = part
        else:
            result[name] = array
    return paddle_llama("llama.")(result)


_GLM_LINEARS = ("query_key_value.", "dense.", "dense_h_to_4h.", "dense_4h_to_h.", "output_layer.")
_OPT_CONFIG = {"model_type": "opt", "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2,
               "num_attention_heads": 4, "intermediate_size": 44,
               "hidden_act": "relu", "max_position_embeddings": 64, "word_embed_proj_dim": 32,
               "normalize_before": True, "paddlenlp_version": "3.0.0b4",
               "fuse_attention_qkv": False, "mp_degree": 1, "pad_token_id": 1}  # fmt: skip
_GPT_CONFIG = {"model_type": "gpt", "architectures": ["GPTForCausalLM"], "vocab_size": V, "hidden_size": 36,
               "num_hidden_layers": 2,
               "num_attention_heads": 3, "intermediate_size": 144, "hidden_activation": "gelu",
               "max_position_embeddings": 64, "type_vocab_size": 16,
               "normalize_before": True, "tie_word_embeddings": False, "fuse_attention_qkv": False,
               "use_flash_attention": False,
               "tensor_parallel_output": True, "paddlenlp_version": "3.0.0b4"}  # fmt: skip
_CHATGLM2_CONFIG = {"model_type": "chatglm_v2", "num_layers": None, "num_hidden_layers": 2, "padded_vocab_size": V,
                    "seq_length": None,
                    "max_sequence_length": 64, "architectures": ["ChatGLMv2ForCausalLM"],
                    "paddlenlp_version": "2.8.0"}  # fmt: skip
_LLAMA_CONFIG = {"paddlenlp_version": "3.0.0b4", "fuse_attention_qkv": False, "fuse_attention_ffn": False,
                 "use_fused_rms_norm": False, "alibi": False,
                 "rope_scaling_factor": 1.0, "rope_scaling_type": None, "rope_fusion_level": None,
                 "tensor_parallel_degree": 1, "seq_length": 64,
                 "use_recompute": False, "long_sequence_init_args": {}, "use_long_sequence_strategies": False,
                 "dtype": "float32"}  # fmt: skip
# config of ours: (its tensors by hand in PaddleNLP's layout, keys of its config.json; a callable makes the whole)
PADDLENLP = {
    "llama": ("llama", paddle_llama("llama."), _LLAMA_CONFIG),
    "llama_tied": ("llama_bias_tied", paddle_llama("llama."), _LLAMA_CONFIG),
    "llama_qkv": ("llama_mqa", lambda t: fuse_attention(paddle_llama("llama.")(t), 1, 3, 12),
        _LLAMA_CONFIG | {"fuse_attention_qkv": True}),
    "llama_ffn": ("llama", lambda t: fuse_ffn(fuse_attention(paddle_llama("llama.")(t), 2, 2, 8), "gate_proj",
                  "up_proj"),
                  _LLAMA_CONFIG | {"fuse_attention_qkv": True, "fuse_attention_ffn": True}),
    "llama_alibi": ("baichuan_13b", paddle_baichuan_13b,
                                                                         _LLAMA_CONFIG | {"model_type": "llama",
                                                                             "alibi": True, "model_max_length": None,
                                                                         "max_position_embeddings": 64,
                                                                         "architectures": ["LlamaForCausalLM"]}),
    "llama_linear": ("llama_linear", paddle_llama("llama."),
        _LLAMA_CONFIG | {"rope_scaling": None, "rope_scaling_type": "linear", "rope_scaling_factor": 2.0}),
    "llama_dynamic": ("llama_dynamic", paddle_llama("llama."),
        _LLAMA_CONFIG | {"rope_scaling": None, "rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 3.0}),
    "mistral": ("mistral", paddle_llama("mistral."), {"paddlenlp_version": "3.0.0b4"}),
    "mixtral": ("mixtral", paddle_llama("mixtral."), {"paddlenlp_version": "3.0.0b4", "fuse_attention_qkv": False}),
    "qwen": ("qwen", lambda t: renamed(turned(t, "c_attn.", "c_proj.", "w1.", "w2.", "lm_head."),
        ("transformer.", "qwen.")), {"paddlenlp_version": "3.0.0b4"}),
    "qwen_ffn": ("qwen", lambda t: fuse_ffn(renamed(turned(t, "c_attn.", "c_proj.", "w1.", "w2.", "lm_head."),
                 ("transformer.", "qwen.")), "w2", "w1"),
                 {"fuse_attention_ffn": True}),
    "qwen2": ("qwen2", paddle_llama("qwen2."), {"paddlenlp_version": "3.0.0b4"}),
    "qwen2_qkv": ("qwen2", lambda t: fuse_attention(paddle_llama("qwen2.")(t), 3, 2, 6), {"fuse_attention_qkv": True}),
    "qwen2_moe": ("qwen2_moe", paddle_llama("qwen2_moe."), {"paddlenlp_version": "3.0.0b4"}),
    "gemma": ("gemma", paddle_llama("gemma."), {"paddlenlp_version": "3.0.0b4"}),
    "bloom": ("bloom", lambda t: renamed(turned(t, *_GLM_LINEARS), ("transformer.", "bloom.")),
              {"n_layer": None, "n_head": None, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "paddlenlp_version": "2.8.0"}),
    "chatglm": ("chatglm", lambda t: renamed(
                    {n: a for n, a in turned(t, *_GLM_LINEARS).items() if n != "lm_head.weight"},
                    ("transformer.", "chatglm.transformer."))
                | {"lm_head.decoder_weight": t["transformer.word_embeddings.weight"]},
                {"num_layers": None, "num_hidden_layers": 2, "paddlenlp_version": "2.8.0"}),
    "chatglm2": ("chatglm2", lambda t: renamed(turned(t, *_GLM_LINEARS), ("transformer.", "chatglm_v2.")),
        _CHATGLM2_CONFIG),
    "gpt": ("gpt2", lambda t: paddle_gpt(t) | {"lm_head.decoder.weight": t["transformer.wte.weight"]},
        lambda source: _GPT_CONFIG),
    "gpt_qkv": ("gpt2", lambda t: fuse_attention(paddle_gpt(t), 3, 1, 12),
        lambda source: _GPT_CONFIG | {"fuse_attention_qkv": True}),
    "opt": ("opt", paddle_opt, lambda source: _OPT_CONFIG),
    "opt_350m": ("opt_350m", paddle_opt, lambda source: _OPT_CONFIG | {"num_hidden_layers": 3,
        "word_embed_proj_dim": 20, "normalize_before": False}),
}  # fmt: skip


def paddlenlp_folder(folder, case, storage="pdparams"):
    """(folder as PaddleNLP would have saved it, the Hugging Face folder of the same model)"""
    name, by_hand, change = PADDLENLP[case]
    source = write(folder / "hf", name)
    keys = json.loads((source / "config.json").read_text())
    keys = (
        change(keys)
        if callable(change)
        else {k: v for k, v in (keys | change).items() if v is not None or k not in change}
    )
    theirs = folder / "paddle"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(keys))
    tensors = {
        n: np.ascontiguousarray(a)
        for n, a in by_hand(formats.tensor_files.read_safetensors(source / "model.safetensors")).items()
    }
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    as_paddle = lambda part: {n: tensor(a) for n, a in part.items()}
    if storage == "pdparams":
        paddle.save(as_paddle(tensors), str(theirs / "model_state.pdparams"))
        return theirs, source
    suffix = "pdparams" if storage == "sharded pdparams" else "safetensors"
    index, files = (
        {"metadata": {"total_size": 1}, "weight_map": {}},
        {"pdparams": "model_state-{}.pdparams", "safetensors": "model-{}.safetensors"}[suffix],
    )
    for i, part in enumerate(halves):
        file = files.format(f"{i + 1:05d}-of-00002")
        index["weight_map"].update(dict.fromkeys(part, file))
        paddle.save(
            as_paddle(part), str(theirs / file)
        ) if suffix == "pdparams" else formats.tensor_files.write_safetensors(theirs / file, part)
    (
        theirs / ("model_state.pdparams.index.json" if suffix == "pdparams" else "model.safetensors.index.json")
    ).write_text(json.dumps(index))
    return theirs, source


@pytest.mark.parametrize("storage", ["pdparams", "sharded pdparams", "safetensors"])
@pytest.mark.parametrize("case", PADDLENLP)
def test_folders_of_paddlenlp(case, storage, tmp_path):
    """The same logits as from Hugging Face's folder; saved, the same files: that is the conversion."""
    theirs, source = paddlenlp_folder(tmp_path, case, storage)
    model, expected = adapters.from_pretrained(theirs), adapters.from_pretrained(source)
    difference = largest(logits(model), logits(expected))
    assert difference == 0
    formats.weights.save_pretrained(model, tmp_path / "converted")
    assert entries(tmp_path / "converted") == entries(source)
    again = adapters.from_pretrained(tmp_path / "converted")
    assert np.array_equal(logits(again), logits(expected)) and again.config.family == expected.config.family
    source_keys = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert not [k for k in source_keys if "fuse" in k or "paddle" in k or "parallel" in k]


@pytest.mark.torch
def test_transformers_opens_what_was_converted_from_paddlenlp(hf_python, tmp_path):
    cases = [
        case
        for case, (name, _, _) in PADDLENLP.items()
        if name in IN_TRANSFORMERS
        and what_its_class_asks_for(name).get("hidden_size") in (None, CONFIGS[name].get("hidden_size"))
    ]
    expected = {}
    for case in cases:
        (tmp_path / case).mkdir()
        theirs, _ = paddlenlp_folder(tmp_path / case, case)
        keys = json.loads((theirs / "config.json").read_text())
        (theirs / "config.json").write_text(json.dumps({"pad_token_id": 0} | keys))
        model = adapters.from_pretrained(theirs)
        formats.weights.save_pretrained(model, tmp_path / "ours" / case)
        expected[case] = logits(model)
    np.save(tmp_path / "ids.npy", IDS)
    theirs = hf_python(OPENS_ALL, tmp_path / "ours", tmp_path / "ids.npy")
    errors = {case: largest(theirs[case], expected[case]) for case in cases}
    print(errors)
    assert len(errors) > 10 and max(errors.values()) < 1e-4, errors


def test_bfloat16_and_pairs_of_paddle_save(tmp_path):
    """bfloat16 lies there as uint16, a tensor as (name, array), a state dict with a list of Paddle's own names."""
    layer, rng = paddle.nn.Linear(3, 4), np.random.default_rng(0)
    half, large = (
        tensor(rng.standard_normal((5, 7)).astype(np.float32)).astype("bfloat16"),
        rng.standard_normal((300, 200)).astype(np.float32),
    )
    state = {
        **layer.state_dict(),
        "half": half,
        "large": tensor(large),
        "f16": tensor(large).astype("float16"),
        "numpy": large.T,
        "i64": tensor(np.arange(3)),
    }
    for protocol in (2, 3, 4):
        paddle.save(state, str(tmp_path / "a.pdparams"), protocol=protocol)
        found = formats.tensor_files.read_pdparams(tmp_path / "a.pdparams")
        assert found.keys() == state.keys()
        assert all(shape == list(state[n].shape) for n, (_, shape) in found.items())
        arrays = {n: read() for n, (read, _) in found.items()}
        assert np.array_equal(arrays["half"], half.astype("float32").numpy()) and np.array_equal(arrays["large"], large)
        assert np.array_equal(arrays["numpy"], large.T) and np.array_equal(arrays["weight"], layer.weight.numpy())
        assert np.array_equal(arrays["f16"], large.astype(np.float16).astype(np.float32)) and np.array_equal(
            arrays["i64"], np.arange(3)
        )


def test_pdparams_are_read_one_tensor_at_a_time(tmp_path):
    state = {f"layer.{i}": paddle.ones([512, 1024]) for i in range(8)}  # 2 MB each
    paddle.save(state, str(tmp_path / "a.pdparams"))
    tracemalloc.start()
    found = formats.tensor_files.read_pdparams(tmp_path / "a.pdparams")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    for read, _ in found.values():
        assert read().sum() == 512 * 1024
    assert tracemalloc.get_traced_memory()[1] < 6 << 20
    tracemalloc.stop()


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content, named",
    [
        ({"a": Evil()}, "refused: the pickle asks for builtins.print"),
        ({"a": np.zeros(3), "b": 3}, "b is not a tensor"),
        ({"a": np.array([{}])}, "a is not a tensor"),
        ([np.zeros(3)], "holds a list"),
        ({"a": slice(3)}, "asks for builtins.slice"),
        ({"a": np.zeros(3, "S3")}, "a is not a tensor"),
        ({"a": np.float32(3)}, "numpy"),
        ({"a": (np.zeros(2), np.zeros(2), np.zeros(2))}, "a is not a tensor"),
    ],
)
def test_other_pickles_are_refused(content, named, tmp_path, capfd):
    for protocol in (2, 4):
        (tmp_path / "a.pdparams").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError) as error:
            formats.tensor_files.read_pdparams(tmp_path / "a.pdparams")
        assert named in str(error.value).replace("__builtin__", "builtins") and "\n" not in str(error.value)
    assert "executed" not in capfd.readouterr().out


def test_damaged_pdparams(tmp_path):
    paddle.save({"a": paddle.ones([300, 300]), "b": paddle.ones([3])}, str(tmp_path / "a.pdparams"))
    raw, rng = (tmp_path / "a.pdparams").read_bytes(), np.random.default_rng(0)
    for cut in (0, 1, 10, 100, 1000, len(raw) - 1):
        (tmp_path / "b.pdparams").write_bytes(raw[:cut])
        with pytest.raises(UserError, match="b.pdparams: "):
            for read, _ in formats.tensor_files.read_pdparams(tmp_path / "b.pdparams").values():
                read()
    for _ in range(300):
        broken = bytearray(raw[:200] + raw[-300:])
        broken[rng.integers(len(broken))] = rng.integers(256)
        (tmp_path / "b.pdparams").write_bytes(bytes(broken))
        try:
            for read, _ in formats.tensor_files.read_pdparams(tmp_path / "b.pdparams").values():
                read()
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("files", ["lora_model_state.pdparams", "peft_model.safetensors"])
@pytest.mark.parametrize("name", ["llama", "bloom", "chatglm2", "qwen", "opt", "mixtral", "gpt2"])
def test_lora_of_paddlenlp(name, files, tmp_path):
    """y = x W + (alpha / r) x A B, or alpha / sqrt(r), with A (in, r) and B (r, out) under PaddleNLP's names."""
    case = {"gpt2": "gpt"}.get(name, name)
    base, _ = paddlenlp_folder(tmp_path, case)
    modules = {
        n.removesuffix(".weight")
        for n in formats.weights.stored_tensors(base)
        if re.search(r"o_proj\.w|out_proj\.w|h_to_4h\.w|query_key_value\.w|mlp\.c_proj\.w|w1\.w|linear1\.w", n)
    }
    rng, rslora = np.random.default_rng(0), name in ("opt", "bloom")
    plain, arrays, weights = (
        adapters.from_pretrained(base),
        {},
        {n: read() for n, (read, _) in formats.weights.stored_tensors(base).items()},
    )
    for module in sorted(modules):
        n_in, n_out = weights[f"{module}.weight"].shape
        a, b = (0.2 * rng.standard_normal(shape).astype(np.float32) for shape in ((n_in, 4), (4, n_out)))
        arrays |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + a @ b * np.float32(6 / (2 if rslora else 4))
    folder = tmp_path / "lora"
    folder.mkdir()
    if files.endswith("pdparams"):
        paddle.save({n: tensor(a) for n, a in arrays.items()}, str(folder / files))
    else:
        formats.tensor_files.write_safetensors(folder / files, arrays)
    keys = {
        "r": 4,
        "lora_alpha": 6,
        "rslora": rslora,
        "lora_dropout": 0.0,
        "target_modules": [".*o_proj.*"],
        "merge_weights": False,
        "pissa": False,
        "base_model_name_or_path": str(base),
        "trainable_bias": None,
        "use_mora": False,
        "tensor_parallel_degree": -1,
    }
    (folder / "lora_config.json").write_text(json.dumps(keys))
    found = logits(adapters.load_adapter(adapters.from_pretrained(base), folder))
    assert largest(found, logits(plain)) > 0.05
    paddle.save({n: tensor(a) for n, a in weights.items()}, str(base / "model_state.pdparams"))
    assert largest(found, logits(adapters.from_pretrained(base))) < 1e-5
    (folder / "lora_config.json").write_text(json.dumps(keys | {"pissa": True}))
    with pytest.raises(UserError, match="lora_config.json: pissa = true is not supported"):
        adapters.load_adapter(adapters.from_pretrained(base), folder)


def test_lora_of_paddlenlp_is_merged_from_its_own_folder(tmp_path):
    base, _ = paddlenlp_folder(tmp_path, "gpt")
    (tmp_path / "lora").mkdir()
    paddle.save(
        {
            f"gpt.decoder.layers.0.linear1.lora_{x}": paddle.ones(shape)
            for x, shape in (("A", [36, 2]), ("B", [2, 144]))
        },
        str(tmp_path / "lora" / "lora_model_state.pdparams"),
    )
    keys = {"r": 2, "lora_alpha": 1, "base_model_name_or_path": str(base)}
    (tmp_path / "lora" / "lora_config.json").write_text(json.dumps(keys))
    merged, plain = adapters.from_pretrained(tmp_path / "lora"), adapters.from_pretrained(base)
    assert largest(merged.layers[0].mlp.up_proj.weight.numpy() - plain.layers[0].mlp.up_proj.weight.numpy(), 1.0) < 1e-5
    paddle.save(
        {"gpt.decoder.layers.0.self_attn.q_proj.lora_A": paddle.ones([36, 2])},
        str(tmp_path / "lora" / "lora_model_state.pdparams"),
    )
    with pytest.raises(
        UserError, match=r"gpt.decoder.layers.0.self_attn.q_proj.lora_A: the model has no linear of that name"
    ):
        adapters.from_pretrained(tmp_path / "lora")


def test_what_of_paddlenlp_is_refused(tmp_path):
    theirs, _ = paddlenlp_folder(tmp_path, "gpt")
    keys = json.loads((theirs / "config.json").read_text())
    for change in ({"normalize_before": False}, {"use_long_sequence_strategies": True}, {"hidden_activation": "swish"}):
        with pytest.raises(UserError, match=next(iter(change)).replace("hidden_activation", "activation_function")):
            families.ModelConfig.from_dict(keys | change)
    (theirs / "model_state.pdparams").rename(theirs / "model_state.tp00.pdparams")
    with pytest.raises(UserError, match="model_state.tp00.pdparams: a shard of a model"):
        adapters.from_pretrained(theirs)
    with pytest.raises(UserError, match="alibi"):
        config("llama", alibi=True)  # of no PaddleNLP: transformers would not see it


# ============================================================================================ peft's adapters

# peft 0.21 with transformers 5, whose experts are one tensor a layer, turns LoRA of single experts into LoRA of that
# tensor, by the last part of the names alone: right where all of gate_proj, up_proj, down_proj are experts (Mixtral,
# Qwen3-MoE); where dense layers or shared experts bear these names too (Qwen2-MoE, DeepSeek), it would leave those out.
# There, attention alone is compared. Its prefixes have one width for keys and values, which latent attention does not.
MIXED_EXPERTS = [name for name in MOE if not name.startswith("mixtral")]
PEFT_BASES = {name: {} for name in IN_TRANSFORMERS} | {"qwen3_moe_all": {"decoder_sparse_step": 1}}


def peft_base(case):
    name = case.removesuffix("_all")
    return build(name, **what_its_class_asks_for(name) | PEFT_BASES[case])


def peft_targets(case, model):
    """Last parts of the names to adapt; None: all."""
    if case not in MIXED_EXPERTS:
        return None
    return sorted({path.rpartition(".")[2] for path in M.block_linears(model) if ".self_attn." in path})


def moved(model, spread):
    for i, weight in enumerate(adapters.adapter_weights(model)):
        noise = np.random.default_rng([5, i]).standard_normal(weight.parameter.shape).astype(np.float32)
        M.set_parameter(weight.parameter, noise * np.float32(spread))
    return model.eval()


@pytest.mark.torch
def test_peft_opens_adapters_of_every_family(hf_python, tmp_path):
    expected = {}
    for case in PEFT_BASES:
        formats.weights.save_pretrained(peft_base(case), tmp_path / "base" / case)
        for kind in ("lora", "prefix"):
            model = peft_base(case)
            if kind == "lora":
                moved(adapters.apply_lora(model, rank=3, alpha=6.0, targets=peft_targets(case, model)), 0.15)
            elif case not in LATENT:
                moved(adapters.apply_prefix(model, tokens=4), 1.0)
            else:
                continue
            adapters.save_adapter(model, tmp_path / "ours" / f"{case}-{kind}", base_model=tmp_path / "base" / case)
            expected[f"{case}-{kind}"] = logits(model)
    np.save(tmp_path / "ids.npy", IDS)
    script = """
import json, pathlib, torch, transformers, peft
arrays, ids = {}, torch.from_numpy(np.load(sys.argv[3]))
for folder in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = transformers.AutoModelForCausalLM.from_pretrained(
        base, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        arrays[folder.name] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
"""
    theirs = hf_python(script, tmp_path / "ours", tmp_path / "ids.npy")
    errors = {name: largest(theirs[name], found) for name, found in expected.items()}
    print(errors)
    assert errors.keys() == theirs.keys() and max(errors.values()) < 1e-4, {
        k: v for k, v in errors.items() if v >= 1e-4
    }


@pytest.mark.torch
def test_adapters_of_peft_are_opened_for_every_family(hf_python, tmp_path):
    targets = {}
    for case in PEFT_BASES:
        model = peft_base(case)
        formats.weights.save_pretrained(model, tmp_path / "base" / case)
        named = M.block_linears(model)
        targets[case] = peft_targets(case, model) or sorted(
            {path.rpartition(".")[2] for path in named if ".experts." not in path}
        )
    np.save(tmp_path / "ids.npy", IDS)
    script = """
import json, pathlib, torch, transformers, peft
arrays, ids, out = {}, torch.from_numpy(np.load(sys.argv[3])), pathlib.Path(sys.argv[4])
for name, targets in json.loads(sys.argv[5]).items():
    for kind in ("lora", "prefix"):
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            pathlib.Path(sys.argv[2]) / name,
            attn_implementation="eager", experts_implementation="eager", dtype=torch.float32)
        if kind == "lora":
            config = peft.LoraConfig(
                r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM",
                fan_in_fan_out=name == "gpt2", use_dora=name == "qwen3")
        elif "deepseek" in name:
            continue
        else:
            config = peft.PrefixTuningConfig(
                num_virtual_tokens=4, task_type="CAUSAL_LM",
                prefix_projection=name in ("bloom", "qwen2"), encoder_hidden_size=12)
        model = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_A" in key or "lora_B" in key or "prompt" in key:
                    p.copy_(torch.randn(p.shape) * (0.2 if "lora" in key else 1.0))
            arrays[name + "-" + kind] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
        model.save_pretrained(out / (name + "-" + kind))
"""
    (tmp_path / "theirs").mkdir()
    theirs, errors = (
        hf_python(script, tmp_path / "base", tmp_path / "ids.npy", tmp_path / "theirs", json.dumps(targets)),
        {},
    )
    for name, found in theirs.items():
        base = adapters.from_pretrained(tmp_path / "base" / name.rpartition("-")[0])
        assert largest(logits(base), found) > 0.05, name
        errors[name] = largest(logits(adapters.load_adapter(base, tmp_path / "theirs" / name)), found)
    print(errors)
    assert len(errors) > 50 and max(errors.values()) < 1e-4, {k: v for k, v in errors.items() if v >= 1e-4}


# ============================================================================================ checkpoints


def training(folder, model, stop, resume=False):
    """Three steps of a script's loop on the model; a checkpoint after the second. Returns the final weights."""
    args = make_args(folder, resume_from_checkpoint=resume or None, weight_decay=0.1)
    weights = adapters.trainable_weights(model)
    shards = ZeroOptimizer(model, weights, parallel.SINGLE)
    optimizer, state = trainer.AdamW(weights, args), TrainState()
    no_tokenizer = types.SimpleNamespace(save=lambda folder: None)
    checkpoints = CheckpointManager(args, model, no_tokenizer, optimizer=optimizer, shards=shards)
    if resume:
        checkpoint = find_checkpoint(args)
        state = load_checkpoint(checkpoint, optimizer, shards)
        load_trained(model, checkpoint, args)
    model.train()
    while state.step < stop:
        ids = np.random.default_rng(state.step).integers(3, 50, (2, 9))
        model(tensor(ids[:, :-1]), labels=tensor(np.ascontiguousarray(ids[:, 1:]))).mean().backward()
        optimizer.step(0.01)
        optimizer.zero_grad()
        state.step += 1
        if state.step == 2 and not resume:
            checkpoints.save(state)
    return {w.name: w.to_numpy().copy() for w in formats.weights.named_weights(model)}


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_have_hugging_face_names_and_resume_is_bitwise(name, tmp_path):
    whole = training(tmp_path, build(name), 3)
    files = entries(tmp_path / "checkpoint-2")
    moments = formats.tensor_files.read_safetensors(tmp_path / "checkpoint-2" / "optimizer-00001-of-00001.safetensors")
    model_files = {n: shape for n, (_, shape, _) in entries(tmp_path / "checkpoint-2").items() if "/" not in n}
    assert len(files) > len(model_files)
    trained = {key.rpartition("/")[0] for key in moments}
    assert trained == {w.name for w in adapters.trainable_weights(build(name))} <= model_files.keys()
    assert all(list(moments[f"{n}/moment{i}_0"].shape) == model_files[n] for n in trained for i in (1, 2))
    assert any(np.abs(moments[f"{n}/moment1_0"]).max() > 0 for n in trained)
    resumed = training(tmp_path, build(name, seed=5), 3, resume=True)
    assert all(np.array_equal(whole[n], resumed[n]) for n in whole)


# ================================================================================== what config.json may say

NOBODYS = {  # keys of other families, with values that change the maths
    "attention_multiplier": 0.5, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "clip_qkv": 8.0, "use_parallel_residual": True, "parallel_attn": True, "attention_chunk_size": 8192,
    "no_rope_layers": [1, 1, 0],
    "use_qk_norm": True, "qk_layernorm": True, "is_encoder_decoder": True, "use_bidirectional_attention": True,
    "rope_local_base_freq": 1e4,
    "some_new_rope_thing": 3.0, "use_some_rope_thing": True, "mup_width": 256,
    "quantization_config": {"quant_method": "hqq", "bits": 4},
    "dual_chunk_attention_config": {"chunk_size": 262144},
}  # fmt: skip
ONES_OWN = [  # (config, key, value that is not supported there)
    *((name, "rope_scaling", {"type": kind, "factor": 2.0}) for name in ("llama", "qwen2", "mistral", "deepseek_v2",
      "internlm2", "glm")
      for kind in ("longrope", "su", "mrope", "ntk")),
    *((name, "rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}) for name in ("gemma2", "qwen3_moe")),
    *((name, "rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}) for name in ("gemma2",
        "llama")),
    ("llama", "rope_scaling", {"alpha": 1000.0, "type": "dynamic", "factor": 2.0}),
    *((name, "hidden_act", "gelu") for name in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe",
                                                 "qwen3_moe", "baichuan_7b",
                                                 "internlm", "internlm2", "glm", "glm4", "deepseek_v2", "deepseek_v3")),
    *((name, "use_sliding_window", True) for name in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")),
    *((name, "sliding_window", 8) for name in ("llama", "glm", "internlm2", "gemma", "deepseek_v3", "bloom")),
    *((name, "alibi", True) for name in ("llama", "qwen2", "bloom", "opt")),
    *((name, "attention_bias", True) for name in ("mistral", "mixtral", "qwen2_moe", "baichuan_7b")),
    *((name, "mlp_bias", True) for name in ("mistral", "qwen3", "deepseek_v3", "gemma")),
    *((name, "partial_rotary_factor", 0.5) for name in ("llama", "qwen3", "gemma")),
    *((name, "attn_logit_softcapping", 50.0) for name in ("llama", "gemma", "mistral")),
    *((name, "final_logit_softcapping", 30.0) for name in ("llama", "gemma")),
    *((name, "query_pre_attn_scalar", 256) for name in ("llama", "gemma")),
    ("gemma", "hidden_activation", "silu"), ("gemma2", "hidden_activation", "relu"),
    ("gpt2", "activation_function", "silu"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True), ("gpt2", "scale_attn_weights", False),
    ("gpt2", "add_cross_attention", True),
    ("opt", "activation_function", "silu"), ("opt", "layer_norm_elementwise_affine", False),
    ("opt", "add_cross_attention", True),
    ("mixtral", "router_jitter_noise", 0.1), ("deepseek_v2", "norm_topk_prob", True),
    ("deepseek_v2", "moe_layer_freq", 2),
    ("deepseek_v2", "topk_method", "noaux_tc"), ("deepseek_v2", "scoring_func", "sigmoid"),
    ("deepseek_v3", "topk_method", "greedy"),
    ("deepseek_v3", "scoring_func", "softmax"),
    ("deepseek_v3", "quantization_config", {"quant_method": "modelopt", "weight_block_size": [128, 128]}),
    ("qwen", "no_bias", False), ("qwen", "rotary_pct", 0.5), ("qwen", "scale_attn_weights", False),
    ("chatglm", "position_encoding_2d", False),
    ("chatglm", "pre_seq_len", 128), ("chatglm2", "pre_seq_len", 128), ("chatglm2", "original_rope", False),
    ("chatglm2", "rmsnorm", False),
    ("chatglm2", "post_layer_norm", False), ("chatglm2", "apply_residual_connection_post_layernorm", True),
    ("chatglm2", "rope_ratio", 16),
    ("internlm", "rotary", {"type": "other", "base": 10000}),
    ("llama", "quantization_config", {"quant_method": "quanto", "weights": "int4"}),
]  # fmt: skip


def refusal(name, **changes):
    """The message that these keys are refused with."""
    with pytest.raises(UserError) as error:
        config(name, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_of_other_families_are_refused_by_name(name):
    for key, value in NOBODYS.items():
        message = refusal(name, **{key: value})
        if key == "quantization_config":
            assert "quant_method 'hqq'" in message
        else:
            assert f"{key} = {json.dumps(value)} is not supported for" in message
    assert config(name, **dict.fromkeys(NOBODYS)) == config(name), "null is as if it were not there"


@pytest.mark.parametrize("name, key, value", ONES_OWN, ids=lambda v: str(v)[:30])
def test_values_that_change_the_maths_are_refused_by_name(name, key, value):
    message = refusal(name, **{key: value})
    shown = json.dumps(next(iter(value.values())) if isinstance(value, dict) else value).strip('"')
    assert shown in message and (key in message or "rope type" in message or "quant_method" in message), message


def test_unknown_model_types_are_named():
    for kind in ("phi3", "gpt_neox", "ernie4_5", "chatglm2", None, ["llama"]):
        with pytest.raises(UserError, match="model_type .* is not supported; supported are baichuan, bloom"):
            families.ModelConfig.from_dict(CONFIGS["llama"] | {"model_type": kind})


@pytest.mark.parametrize("name", CONFIGS)
def test_missing_keys_and_values_of_other_types_are_one_line(name):
    """No key of a config is without effect by being absent or odd other than as one line of an error."""
    refused = 0
    for key in CONFIGS[name]:
        for change in ("gone", None, "x", -1, [], {}, True, 0, 1.5, [1]):
            source = {k: v for k, v in CONFIGS[name].items() if k != key} | ({} if change == "gone" else {key: change})
            try:
                families.ModelConfig.from_dict(source, name)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and str(error).startswith(name)
    assert refused > 20


COMMON = {"architectures": ["X"], "auto_map": {"AutoConfig": "configuration_x.X"}, "bos_token_id": 1,
          "eos_token_id": [2, 3], "pad_token_id": None,
          "use_cache": True, "transformers_version": "4.44.0", "torch_dtype": "bfloat16", "pretraining_tp": 1,
          "_name_or_path": "somewhere",
          "initializer_range": 0.02, "tie_word_embeddings": False, "gradient_checkpointing": False,
          "tokenizer_class": "X", "use_flash_attn": "auto",
          "attention_dropout": 0.0, "hidden_dropout": 0.0, "output_attentions": False, "return_dict": True,
          "torchscript": False}  # fmt: skip
LLAMA = {"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
         "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": None,
         "rope_theta": 10000.0, "vocab_size": 32000,
         "attention_bias": False, "mlp_bias": False}  # fmt: skip
QWEN2 = {k: v for k, v in LLAMA.items() if "bias" not in k} | {"hidden_size": 3584, "num_attention_heads": 28,
         "num_key_value_heads": 4, "num_hidden_layers": 28,
         "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "rope_theta": 1e6,
         "vocab_size": 152064, "use_mrope": False}  # fmt: skip
GLM_REMOTE = {"add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
              "apply_residual_connection_post_layernorm": False,
              "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "classifier_dropout": None,
              "ffn_hidden_size": 13696, "fp32_residual_connection": False,
              "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-05, "multi_query_attention": True,
              "multi_query_group_num": 2,
              "num_attention_heads": 32, "num_layers": 28, "original_rope": True, "padded_vocab_size": 65024,
              "post_layer_norm": True, "pre_seq_len": None,
              "prefix_projection": False, "quantization_bit": 0, "rmsnorm": True, "seq_length": 8192,
              "vocab_size": 65024}  # fmt: skip
DEEPSEEK = {k: v for k, v in LLAMA.items() if k != "mlp_bias"} | {"hidden_size": 2048, "num_attention_heads": 16,
            "num_key_value_heads": 16, "num_hidden_layers": 27,
            "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "kv_lora_rank": 512,
            "moe_intermediate_size": 1408, "moe_layer_freq": 1,
            "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
            "num_experts_per_tok": 6, "q_lora_rank": None,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
            "seq_aux": True, "topk_group": 1,
            "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"}}  # fmt: skip
BAICHUAN = {
    k: v
    for k, v in LLAMA.items()
    if k not in ("attention_bias", "mlp_bias", "rope_scaling", "rope_theta", "num_key_value_heads")
}
INTERNLM = {
    k: v
    for k, v in LLAMA.items()
    if k not in ("attention_bias", "mlp_bias", "rope_scaling", "rope_theta", "num_key_value_heads")
}
ROUTED = {"router_aux_loss_coef": 0.001, "output_router_logits": False, "decoder_sparse_step": 1,
          "mlp_only_layers": [], "num_experts_per_tok": 8,
          "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128}  # fmt: skip
AS_PUBLISHED = {  # the keys of the published files of each family, with what they say where it is special
    "llama-2-7b": {"model_type": "llama", **LLAMA},
    "llama-3.1-8b": {"model_type": "llama", **LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336,
                     "vocab_size": 128256, "rope_theta": 500000.0,
                     "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
    "mistral-7b-v0.1": {"model_type": "mistral", **{k: v for k, v in LLAMA.items() if "bias" not in k},
        "sliding_window": 4096, "num_key_value_heads": 8},
    "mistral-nemo": {"model_type": "mistral", **{k: v for k, v in LLAMA.items() if "bias" not in k},
        "sliding_window": None, "head_dim": 128, "hidden_size": 5120, "num_key_value_heads": 8},
    "mixtral-8x7b": {"model_type": "mixtral", **{k: v for k, v in LLAMA.items() if "bias" not in k},
                     "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
                     "output_router_logits": False, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0,
                     "rope_theta": 1e6},
    "qwen-7b-chat": {"model_type": "qwen", "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0,
                     "fp16": False, "fp32": False, "hidden_size": 4096,
                     "intermediate_size": 22016, "kv_channels": 128, "layer_norm_epsilon": 1e-06,
                     "max_position_embeddings": 32768, "no_bias": True, "num_attention_heads": 32,
                     "num_hidden_layers": 32, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0,
                     "scale_attn_weights": True, "seq_length": 8192, "softmax_in_fp32": False,
                     "use_cache_quantization": False, "use_cache_kernel": False, "use_dynamic_ntk": True,
                     "use_logn_attn": True, "vocab_size": 151936},
    "qwen2.5-7b": {"model_type": "qwen2", **QWEN2},
    "qwen2-57b-a14b": {"model_type": "qwen2_moe", **QWEN2, **ROUTED, "num_experts": 64, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 20480},
    "qwen3-8b": {"model_type": "qwen3", **QWEN2, "attention_bias": False, "head_dim": 128, "sliding_window": None,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", **QWEN2, **ROUTED, "attention_bias": False, "head_dim": 128,
        "sliding_window": None, "num_attention_heads": 32, "hidden_size": 2048},
    "baichuan-7b": {"model_type": "baichuan", **BAICHUAN, "architectures": ["BaiChuanForCausalLM"],
        "vocab_size": 64000},
    "baichuan-13b": {"model_type": "baichuan", **{k: v for k, v in BAICHUAN.items() if k != "max_position_embeddings"},
                     "_from_model_config": True, "model_max_length": 4096,
                     "num_attention_heads": 40, "hidden_size": 5120, "vocab_size": 64000},
    "baichuan2-13b": {"model_type": "baichuan",
                      **{k: v for k, v in BAICHUAN.items() if k != "max_position_embeddings"},
                      "model_max_length": 4096, "z_loss_weight": 0, "vocab_size": 125696,
                      "num_attention_heads": 40, "hidden_size": 5120},
    "chatglm-6b": {"model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384,
                   "layernorm_epsilon": 1e-05, "max_sequence_length": 2048, "num_attention_heads": 32,
                   "num_layers": 28, "position_encoding_2d": True, "vocab_size": 130528, "gmask_token_id": 130001,
                   "mask_token_id": 130000, "pre_seq_len": None,
                   "prefix_projection": False, "quantization_bit": 0},
    "chatglm2-6b": {"model_type": "chatglm", **GLM_REMOTE, "_name_or_path": "THUDM/chatglm2-6b"},
    "chatglm2-6b-32k": {"model_type": "chatglm", **GLM_REMOTE, "_name_or_path": "THUDM/chatglm2-6b-32k",
        "rope_ratio": 16},
    "chatglm3-6b-32k": {"model_type": "chatglm", **GLM_REMOTE, "_name_or_path": "THUDM/chatglm3-6b-32k",
        "rope_ratio": 50},
    "glm-4-9b-chat": {"model_type": "chatglm", **GLM_REMOTE, "num_layers": 40, "padded_vocab_size": 151552,
        "rope_ratio": 500, "layernorm_epsilon": 1.5625e-07},
    "glm-4-9b-hf": {"model_type": "glm", **LLAMA, "attention_bias": True, "head_dim": 128,
        "partial_rotary_factor": 0.5, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07, "mlp_bias": False},
    "glm-4-9b-0414": {"model_type": "glm4", **{k: v for k, v in LLAMA.items() if k != "mlp_bias"},
        "attention_bias": False, "head_dim": 128, "partial_rotary_factor": 0.5, "num_key_value_heads": 2},
    "bloom-560m": {"model_type": "bloom", "apply_residual_connection_post_layernorm": False,
                   "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "hidden_size": 1024,
                   "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "n_head": 16, "n_inner": None,
                   "n_layer": 24, "offset_alibi": 100, "seq_length": 2048,
                   "skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False, "unk_token_id": 0,
                   "vocab_size": 250880},
    "gpt2": {"model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
             "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12,
             "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
             "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
             "summary_type": "cls_index", "summary_use_proj": True,
             "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257},
    "opt-350m": {"model_type": "opt", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
                 "activation_function": "relu", "do_layer_norm_before": False, "dropout": 0.1,
                 "ffn_dim": 4096, "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0,
                 "max_position_embeddings": 2048, "num_attention_heads": 16, "num_hidden_layers": 24,
                 "prefix": "</s>", "vocab_size": 50272, "word_embed_proj_dim": 512},
    "internlm-7b": {"model_type": "internlm", **INTERNLM, "bias": True, "vocab_size": 103168,
        "rotary": {"base": 10000, "type": "dynamic"}},
    "internlm2.5-7b": {"model_type": "internlm2", **INTERNLM, "bias": False, "num_key_value_heads": 8,
        "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_implementation": "eager"},
    "gemma-2b": {"model_type": "gemma", **{k: v for k, v in LLAMA.items() if k != "mlp_bias"}, "head_dim": 256,
                 "hidden_act": "gelu", "hidden_activation": None, "num_attention_heads": 8, "num_key_value_heads": 1,
                 "hidden_size": 2048, "vocab_size": 256000},
    "gemma-2-9b": {"model_type": "gemma2", **{k: v for k, v in LLAMA.items() if k != "mlp_bias"}, "head_dim": 256,
                   "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
                   "num_key_value_heads": 8,
                   "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid",
                   "query_pre_attn_scalar": 256, "sliding_window": 4096,
                   "sliding_window_size": 4096, "num_attention_heads": 16, "hidden_size": 3584},
    "deepseek-v2-lite": {"model_type": "deepseek_v2", **DEEPSEEK},
    "deepseek-v3": {"model_type": "deepseek_v3", **DEEPSEEK, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
                    "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
                    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "q_lora_rank": 1536,
                    "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
                    "routed_scaling_factor": 2.5},
}  # fmt: skip


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_keys_of_published_files_pass(name):
    source = COMMON | AS_PUBLISHED[name]
    if (
        "tie_word_embeddings" not in AS_PUBLISHED[name]
        and source["model_type"] in ("gpt2", "bloom", "opt", "gemma", "gemma2", "chatglm")
        and "num_layers" not in source
    ):
        del source["tie_word_embeddings"]
    found = families.ModelConfig.from_dict(source)
    written = json.loads(found.to_json("bfloat16"))
    assert written | {"torch_dtype": "bfloat16"} == source | {"torch_dtype": "bfloat16"}


def test_32k_of_chatglm2_divides_positions_and_of_chatglm3_raises_the_base():
    assert config("chatglm2", _name_or_path="glm-4-9b", rope_ratio=5).rope["rope_theta"] == 50000.0
    two, three = (families.ModelConfig.from_dict(COMMON | AS_PUBLISHED[f"chatglm{n}-6b-32k"]).rope for n in (2, 3))
    assert two == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 16} and three == {
        "rope_type": "default",
        "rope_theta": 500000.0,
    }
    position = tensor(np.array([[32, 64]]))
    long = M.rope_tables(config("chatglm2", _name_or_path="THUDM/chatglm2-6b-32k", rope_ratio=16), position)
    short = M.rope_tables(config("chatglm2"), position // 16)
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(long, short))


def test_internlm_s_own_word_for_dynamic():
    assert config("internlm", rotary={"base": 20000, "type": "dynamic"}).rope == {
        "rope_type": "dynamic",
        "rope_theta": 20000.0,
        "factor": 1.0,
    }
    assert config("internlm", rotary={"base": 20000, "type": "origin"}).rope == {
        "rope_type": "default",
        "rope_theta": 20000.0,
    }
    position = tensor(np.arange(128)[None])  # twice the 64 of the config: the base grows by 2 ** (8 / 6)
    cos, _ = M.rope_tables(config("internlm", rotary={"base": 10000, "type": "dynamic"}), position)
    expected = np.cos(127 * (10000 * 2 ** (8 / 6)) ** (-np.arange(0, 8, 2) / 8))
    assert largest(cos.numpy()[0, 127, 0, :4], expected) < 1e-4
