"""kernels.fused: packed products against float64, and whole models against their layers, step by step.

    python -m pytest tests/kernels/test_fused.py          # CPU, about 15 s, and as much once to build the C++ ops

The oracle of a model is PagedRunner, which runs the layers of model.py; of integers, the weights that they stand for.
"""

import dataclasses
import functools

import kernels
import kernels.fused
import kernels.rounding

import numpy as np
import pytest
import tiny_models

from adapters import apply_lora, load_adapter, lora_layers, save_adapter
from model import set_parameter
from modules.layers import Embedding, Linear
from serving.fused import FusedRunner, choose_dtype, fastest_runner, why_not_fused
from serving.runners import PagedRunner, ScheduledTokens, TokenSequence, round_linears

cpu = kernels._module("cpu")
pytestmark = pytest.mark.skipif(cpu.missing("fused_multi_transformer") is not None, reason="no compiler")
NOT_COVERED = {"chatglm": "two-dimensional positions"}
_LATENT = dict(qk_nope_head_dim=16, qk_rope_head_dim=8, kv_lora_rank=16, v_head_dim=16, hidden_size=48)
_LATENT |= dict(moe_intermediate_size=16)
PACKABLE = {  # widths of linears that 4 bits pack, where those of the tiny config are odd
    "bloom_7heads": {"hidden_size": 56},
    "chatglm2_mha": {"kv_channels": 16},
    "deepseek_v2": _LATENT | {"q_lora_rank": 16},
    "deepseek_v2_lite": _LATENT,
    "deepseek_v3": _LATENT | {"q_lora_rank": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "gpt2": {"n_embd": 48},
    "llama_mqa": {"head_dim": 16},
    "mistral": {"hidden_size": 40},
    "mixtral": {"hidden_size": 32},
    "opt": {"ffn_dim": 48},
    "opt_350m": {"ffn_dim": 48},
    "qwen2": {"hidden_size": 48},
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16},
}
STEPS = [  # (sequence, first token, how many): pieces of prompts and decodes in one step, over the blocks' ends
    [(0, 0, 5), (1, 0, 7)],
    [(0, 5, 1), (1, 7, 4), (2, 0, 2)],
    [(0, 6, 1), (1, 11, 1), (2, 2, 1), (3, 0, 20)],
    [(0, 7, 1), (1, 12, 1), (2, 3, 1), (3, 20, 1)],
]


def needs(storage):
    """Skip where the processor lacks the instructions of a storage."""
    if why := kernels.fused.storage_missing(storage):
        pytest.skip(why)


def sequences():
    generator = np.random.default_rng(0)
    blocks = [(generator.permutation(8) + 8 * i).tolist() for i in range(4)]
    return [
        TokenSequence(generator.integers(3, 60, 30).tolist(), n, blocks=blocks[i]) for i, n in enumerate((5, 11, 2, 20))
    ]


def logits_of_steps(runner, names=(None,) * 4):
    """Logits of every step, one row a sequence; names: of their adapters."""
    texts = sequences()
    for text, name in zip(texts, names):
        text.adapter = name
    return np.concatenate([runner.run([ScheduledTokens(texts[s], i, n) for s, i, n in step]) for step in STEPS])


@functools.cache
def llama(**changes):
    model = tiny_models.build("llama", **changes)
    model.eval()
    return model


def difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


# ========================================================================================================= products


@pytest.mark.parametrize("name", sorted(set(tiny_models.CONFIGS) - set(NOT_COVERED)))
def test_logits_in_float32_are_those_of_the_layers(name):
    model = tiny_models.build(name)
    layers, fused = (logits_of_steps(runner(model, 32, 4)) for runner in (PagedRunner, FusedRunner))
    assert difference(fused, layers) < 1e-5 and (fused.argmax(-1) == layers.argmax(-1)).all()


@pytest.mark.parametrize("name", sorted(NOT_COVERED))
def test_a_model_that_is_not_covered_runs_its_layers_and_says_why(name, capsys):
    model = tiny_models.build(name)
    assert NOT_COVERED[name] in why_not_fused(model, None, "float32")
    assert type(fastest_runner(model, 32, 4)) is not FusedRunner
    assert NOT_COVERED[name] in capsys.readouterr().out


@pytest.mark.parametrize("instructions", [0, 1])
def test_every_instruction_set_gives_the_same_logits(instructions, monkeypatch):
    expected = logits_of_steps(FusedRunner(llama(), 32, 4))
    monkeypatch.setattr(cpu, "INSTRUCTIONS", instructions)
    assert difference(logits_of_steps(FusedRunner(llama(), 32, 4)), expected) < 1e-5


@pytest.mark.parametrize("kind", [True, "static"])
def test_an_int8_cache_is_that_of_the_layers(kind):
    model = tiny_models.build("llama")
    heads = [[0.02, 0.03]] * len(model.layers)  # 0.02: some values are cut off
    model.config = dataclasses.replace(model.config, quantization={"k_scales": heads, "v_scales": heads})
    layers, fused = (logits_of_steps(runner(model, 32, 4, int8=kind)) for runner in (PagedRunner, FusedRunner))
    assert difference(fused, layers) < 1e-4  # a code at the edge may round the other way
    assert difference(fused, logits_of_steps(FusedRunner(model, 32, 4))) > 1e-3


def test_bfloat16_moves_the_logits_by_its_rounding():
    needs("bfloat16")
    expected = logits_of_steps(PagedRunner(llama(), 32, 4))
    found = logits_of_steps(FusedRunner(llama(), 32, 4, dtype="bfloat16"))
    assert 1e-4 < difference(found, expected) < 0.03
    pool = FusedRunner(llama(), 32, 4, dtype="bfloat16").pools[0][0]
    assert 2 * pool.size * len(llama().layers) * 2 == 32 * FusedRunner.block_bytes(llama().config, 4, dtype="bfloat16")


@pytest.mark.sweep(keep=8)
@pytest.mark.parametrize("scheme", ["bfloat16", "w8", "w4", "w4 groups", "a8w8"])
@pytest.mark.parametrize("name", sorted(set(tiny_models.CONFIGS) - set(NOT_COVERED)))
def test_logits_in_bfloat16_and_in_integers_of_every_config(name, scheme):
    """Rounded inputs move a row's logits by 1 % (bfloat16) or 2 % (int8), in the median; an expert may change."""
    scheme, _, groups = scheme.partition(" ")
    needs("bfloat16")
    model = tiny_models.build(name, **(PACKABLE.get(name, {}) if scheme != "bfloat16" else {}))
    if scheme != "bfloat16":
        needs(scheme)
        round_linears(model, scheme, 16 if groups else -1)
    expected = logits_of_steps(PagedRunner(model, 32, 4))  # of the dequantized weights; a8w8 rounds its inputs too
    found = logits_of_steps(FusedRunner(model, 32, 4, dtype="bfloat16"))
    rows = [difference(*pair) for pair in zip(found, expected)]
    assert 1e-4 < np.median(rows) < (0.02 if scheme == "bfloat16" else 0.04)
    assert model.config.experts or max(rows) < (0.06 if scheme == "bfloat16" else 0.1)


@pytest.mark.parametrize("scheme,group", [("w8", -1), ("w4", 16), ("a8w8", -1)])
def test_integer_weights_beside_float32_and_with_an_integer_head(scheme, group):
    needs("bfloat16")
    needs(scheme)
    model = tiny_models.build("qwen2", hidden_size=96, intermediate_size=112)  # with biases
    round_linears(model, scheme, group)
    if scheme == "a8w8":
        exact = logits_of_steps(FusedRunner(model, 32, 4))
        assert difference(exact, logits_of_steps(PagedRunner(model, 32, 4))) < 1e-4
    else:
        assert "excludes" in why_not_fused(model, None, "float32")
    found = logits_of_steps(FusedRunner(model, 32, 4, dtype="bfloat16"))
    head = logits_of_steps(FusedRunner(model, 32, 4, dtype="bfloat16", int8_head=True))
    assert 1e-5 < difference(head, found) < 0.03


def saved_loras(name, folder, changes, **options):
    """{name: folder} of two LoRAs of a tiny model, both of whose factors are random."""
    paths = {}
    for seed, rank in ((1, 2), (2, 5)):
        model = apply_lora(tiny_models.build(name, **changes), rank=rank, seed=seed, **options)
        for i, layer in enumerate(lora_layers(model).values()):
            g = np.random.default_rng([seed, i])
            set_parameter(layer.lora_B, 0.2 * g.standard_normal(layer.lora_B.shape).astype(np.float32))
        paths[f"lora{seed}"] = folder / f"lora{seed}"
        save_adapter(model, paths[f"lora{seed}"])
    return paths


@pytest.mark.parametrize("name", ["llama", "chatglm2", "internlm2", "gemma2"])
def test_loras_of_several_requests_in_one_step(name, tmp_path):
    paths, names = saved_loras(name, tmp_path, {}), ("lora2", None, "lora1", "lora2")
    layers, fused = (runner(tiny_models.build(name), 32, 4, paths) for runner in (PagedRunner, FusedRunner))
    expected, found = logits_of_steps(layers, names), logits_of_steps(fused, names)
    assert difference(found, expected) < 1e-5
    assert difference(logits_of_steps(fused), expected) > 1e-2
    assert difference(logits_of_steps(fused), logits_of_steps(layers)) < 1e-5


def test_loras_that_are_trained_stay_beside_bfloat16_weights(tmp_path):
    """As the trainer computes, and so with the bits of the same LoRA given by a request; not bfloat16(W + A B)."""
    needs("bfloat16")
    paths = saved_loras("qwen2", tmp_path, {"hidden_size": 48})
    model = load_adapter(tiny_models.build("qwen2", hidden_size=48), paths["lora2"], trainable=True)
    runner = FusedRunner(model, 32, 4, dtype="bfloat16")
    given = FusedRunner(tiny_models.build("qwen2", hidden_size=48), 32, 4, paths, dtype="bfloat16")
    assert (logits_of_steps(runner) == logits_of_steps(given, ("lora2",) * 4)).all()
    lora = next(iter(lora_layers(model).values()))
    set_parameter(lora.lora_B, 2 * lora.lora_B.numpy())
    assert difference(logits_of_steps(runner), logits_of_steps(given, ("lora2",) * 4)) > 1e-3
    assert difference(logits_of_steps(runner), logits_of_steps(PagedRunner(model, 32, 4))) < 0.03
    model = apply_lora(
        tiny_models.build("llama"), rank=2, targets=["lm_head"]
    )  # none in the blocks: packed with the head's weight
    assert (
        difference(
            logits_of_steps(FusedRunner(model, 32, 4, dtype="bfloat16")), logits_of_steps(PagedRunner(model, 32, 4))
        )
        < 0.03
    )


def test_loras_beside_integer_weights_and_those_that_are_not_covered(tmp_path):
    needs("a8w8")
    changes = dict(hidden_size=96, intermediate_size=112)
    paths = saved_loras("qwen2", tmp_path, changes, targets=["q_proj", "up_proj"])
    names = "lora2", None, "lora1", None
    models = [tiny_models.build("qwen2", **changes) for _ in range(2)]
    for model in models:
        round_linears(model, "a8w8")
    layers, fused = (runner(model, 32, 4, paths) for runner, model in zip((PagedRunner, FusedRunner), models))
    assert difference(logits_of_steps(fused, names), logits_of_steps(layers, names)) < 1e-4
    assert difference(logits_of_steps(fused, names), logits_of_steps(fused)) > 1e-2
    save_adapter(apply_lora(tiny_models.build("llama"), rank=2, dora=True), tmp_path / "dora")
    assert "DoRA" in why_not_fused(llama(), {"dora": tmp_path / "dora"}, "float32")


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # of a head of its own, and of a tied one
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_freed_once_they_are_packed(name, dtype):
    needs(dtype)
    model = tiny_models.build(name)
    expected = logits_of_steps(FusedRunner(model, 32, 4, dtype=dtype))
    runner = FusedRunner(model, 32, 4, dtype=dtype, free_weights=True)
    assert (logits_of_steps(runner) == expected).all()
    kept = [layer for layer in model.sublayers() if isinstance(layer, (Linear, Embedding))]
    kept = [layer for layer in kept if layer.weight._is_initialized()]
    assert kept == ([model.embed_tokens] if (name, dtype) == ("llama", "float32") else [])  # which is read in place


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v2"])
def test_experts_and_mla_in_integers_and_in_bfloat16(name):
    needs("bfloat16")
    needs("a8w8")
    model = tiny_models.build(name)
    found = logits_of_steps(FusedRunner(model, 32, 4, dtype="bfloat16"))
    assert 1e-4 < difference(found, logits_of_steps(PagedRunner(model, 32, 4))) < 0.05
    round_linears(model, "a8w8")
    expected = logits_of_steps(PagedRunner(model, 32, 4))
    found = logits_of_steps(FusedRunner(model, 32, 4, free_weights=True))
    rows = [difference(*pair) for pair in zip(found, expected)]
    assert np.median(rows) < 1e-5 and max(rows) < 0.02  # a code of x at the edge may round the other way


def test_weights_that_were_trained_are_packed_again():
    model = tiny_models.build("llama")
    runner = FusedRunner(model, 32, 4)
    before = logits_of_steps(runner)
    weight = model.layers[0].mlp.down_proj.weight
    weight.set_value(weight * 3)
    after = logits_of_steps(runner)
    assert difference(after, before) > 1e-2 and difference(after, logits_of_steps(PagedRunner(model, 32, 4))) < 1e-5
    zeros = weight * 0
    kernels.adamw(weight, zeros + 1, zeros.clone(), zeros.clone(), 1, 0.1, 0.9, 0.99, 1e-8, 0.0)
    assert difference(logits_of_steps(runner), logits_of_steps(PagedRunner(model, 32, 4))) < 1e-5


def test_auto_takes_float32_where_bfloat16_cannot_be():
    assert choose_dtype(tiny_models.build("chatglm"), None, "auto") == "float32"
    with pytest.raises(kernels.UserError, match="bfloat16 is not possible here: it does not cover two-dimensional"):
        choose_dtype(tiny_models.build("chatglm"), None, "bfloat16")
    with kernels.use("reference"):
        assert "reference" in why_not_fused(llama(), None, "float32")


# --------------------------------------------------------------------------------------------- one product


def product(weight: kernels.fused.Weight, x):
    """x (rows, in) through a model without blocks: its embedding is x, its head the weight."""
    n_out = weight.values.shape[0 if weight.transposed else 1]
    sizes = dict(layers=0, D=x.shape[1], H=1, K=1, Dh=2, rotary=2, V=n_out)
    options = dict(norm_place="before", activation="silu", gated=False, interleaved=False, cache="float32")
    shape = kernels.fused.FusedShape(**sizes, **options, block_size=4, attention_scale=1.0)
    model = kernels.fused.FusedMultiTransformer(shape, kernels.to_tensor(x))
    model.set_linear(None, "head", weight)
    ids = np.arange(len(x))
    return model.step(ids, ids, ids[:, None], np.ones_like(ids), np.ones_like(ids))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 37, 130])
@pytest.mark.parametrize(
    "storage", ["float32", "bfloat16", "w8", "a8w8", "w4", "w4 groups", "w4 zeros", "w4 act order"]
)
def test_products(storage, rows):
    scheme, _, variant = storage.partition(" ")
    needs(scheme)
    generator = np.random.default_rng([rows, len(storage)])
    n_in, n_out = (192, 150) if variant else (203, 150) if scheme != "w4" else (208, 150)
    x = generator.standard_normal((rows, n_in)).astype(np.float32)
    float_weight = generator.standard_normal((n_in, n_out)).astype(np.float32)
    bias = generator.standard_normal(n_out).astype(np.float32)
    if scheme in ("float32", "bfloat16"):
        weight, exact = kernels.fused.Weight(scheme, float_weight.T, bias, transposed=True), float_weight
    elif scheme == "a8w8":
        codes, scales = kernels.rounding.int8_weight(float_weight)
        codes[:5] = -128  # as GPTQ may have it
        weight = kernels.fused.Weight(scheme, codes.view(np.uint8) ^ np.uint8(128), bias, scales=scales[None])
        exact = codes * scales
    else:
        size = {"": -1, "groups": 32, "zeros": 64, "act order": 16}[variant]
        found = kernels.rounding.round_to_nearest(float_weight, int(scheme[1:]), size, variant != "zeros")
        zeros = found.zeros.astype(np.float32) if variant == "zeros" else None
        options = dict(scales=found.scales, zeros=zeros, group_size=n_in if size == -1 else size)
        exact = found.weight()
        if variant == "act order":  # the rows of the weight as they are grouped; x comes in another order
            options["order"] = generator.permutation(n_in)
            exact = exact[np.argsort(options["order"])]
        weight = kernels.fused.Weight(scheme, found.codes, bias, **options)
    found = product(weight, x)
    expected = x.astype(np.float64) @ exact + bias
    bound = {"float32": 1e-6, "bfloat16": 4e-3}.get(scheme, 1.2e-2)  # of rounding x: half a step of 127
    assert difference(found, expected) < bound
    alone = np.concatenate([product(weight, row[None]) for row in x[:3]])
    assert difference(found[:3], alone) < 1e-6
