"""LoRA (plain, rsLoRA, DoRA, PiSSA) and prefix tuning: against peft both ways, against dense formulas, on disk.

    python -m pytest tests/test_adapters.py                                            # CPU, about 10 s, no torch
    python -m pytest tests/test_adapters.py --hf-python /path/to/venv/bin/python       # also: peft opens what we save

peft cannot share a process with Paddle here, so what it computes comes from tests/golden/peft_* or from --hf-python.
"""

import json
import math
import shutil

import numpy as np
import paddle
import pytest
from conftest import ROOT
from golden_weights import CASES, NEW, inputs
from test_model import build, gradients, largest, left_padding, packed_batch, random_packs, tensor, zero_grad

import adapters
import families
import formats.tensor_files
import formats.weights
import model as M
from formats.files import UserError

pytestmark = pytest.mark.sweep(keep=8)

GOLDEN = ROOT / "tests" / "golden"
ADAPTERS = {  # name: (base model, how it is made)
    "lora": ("gqa", lambda m: adapters.apply_lora(m, rank=4, alpha=6.0)),
    "lora_some": (
        "headdim",
        lambda m: adapters.apply_lora(m, rank=3, alpha=6.0, targets=["q_proj", "v_proj", "1.mlp.up_proj"]),
    ),
    "lora_regex": ("gqa", lambda m: adapters.apply_lora(m, rank=3, alpha=6.0, targets=r".*\.1\.self_attn\.[qk]_proj")),
    "rslora": ("gqa", lambda m: adapters.apply_lora(m, rank=3, alpha=2.0, rslora=True)),
    "lora_bias": ("bias_tied", lambda m: adapters.apply_lora(m, rank=2, alpha=6.0)),
    "dora": ("bias_tied", lambda m: adapters.apply_lora(m, rank=2, alpha=5.0, dora=True)),
    "dora_rslora": ("gqa", lambda m: adapters.apply_lora(m, rank=3, alpha=2.0, dora=True, rslora=True)),
    "pissa": ("gqa", lambda m: adapters.apply_lora(m, rank=3, alpha=5.0, pissa=True)),
    "pissa_rslora": ("bias_tied", lambda m: adapters.apply_lora(m, rank=3, alpha=5.0, pissa=True, rslora=True)),
    "prefix": ("gqa", lambda m: adapters.apply_prefix(m, tokens=5)),
    "prefix_mha": ("mha", lambda m: adapters.apply_prefix(m, tokens=1)),
    "prefix_projection": (
        "gqa",
        lambda m: adapters.apply_prefix(m, tokens=3, projection=True, projection_hidden_size=20),
    ),
    "prefix_projection_mha": ("mha", lambda m: adapters.apply_prefix(m, tokens=3, projection=True)),
}
LORA = [name for name in ADAPTERS if "prefix" not in name]
IDS = tensor(inputs()[0])


def trained(name):
    """A model with the adapter, every parameter of which has been moved as training would."""
    base, apply = ADAPTERS[name]
    model = apply(build(base))
    for i, weight in enumerate(adapters.adapter_weights(model)):
        noise = np.random.default_rng([5, i]).standard_normal(weight.parameter.shape).astype(np.float32)
        spread = 0.02 if "pissa" in name else 0.12 if "lora" in weight.name else 1.0
        M.set_parameter(weight.parameter, weight.parameter.numpy() + noise * np.float32(spread))
    return model.eval()


def logits(model, ids=IDS):
    return model(ids).numpy()


# ================================================================================================ against peft


@pytest.mark.parametrize("name", sorted(p.name[5:] for p in GOLDEN.glob("peft_*")))
def test_adapters_saved_by_peft(name):
    golden = np.load(GOLDEN / f"peft_{name}" / "golden.npz")
    base = build(str(golden["base"]))
    plain = logits(base)
    assert largest(logits(adapters.load_adapter(base, GOLDEN / f"peft_{name}")), golden["logits"]) < 1e-4
    assert largest(plain, golden["logits"]) > 0.5, "the adapter does nothing"


def test_there_is_a_golden_of_every_kind():
    assert {p.name for p in GOLDEN.glob("peft_*")} == {
        f"peft_{n}" for n in ("lora", "rslora", "dora", "pissa", "prefix", "prefix_projection")
    }


@pytest.mark.torch
def test_peft_opens_what_we_save(hf_python, tmp_path):
    models = {name: trained(name) for name in ADAPTERS}
    for name, model in models.items():
        base = ADAPTERS[name][0]
        formats.weights.save_pretrained(build(base), tmp_path / "base" / base)
        adapters.save_adapter(model, tmp_path / "ours" / name, base_model=tmp_path / "base" / base)
    np.save(tmp_path / "ids.npy", IDS.numpy())
    script = """
import json, pathlib, torch, transformers, peft
arrays, ids = {}, torch.from_numpy(np.load(sys.argv[3]))
for folder in pathlib.Path(sys.argv[2]).iterdir():
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        arrays[folder.name] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
"""
    theirs = hf_python(script, tmp_path / "ours", tmp_path / "ids.npy")
    assert theirs.keys() == models.keys()
    errors = {name: largest(theirs[name], logits(model)) for name, model in models.items()}
    print(errors)
    assert max(errors.values()) < 1e-5, errors


# ======================================================================================= what an adapter computes


@pytest.mark.parametrize("name", ADAPTERS)
def test_only_the_adapter_is_trainable(name):
    base, apply = ADAPTERS[name]
    model = apply(build(base))
    adapter = {w.name for w in adapters.adapter_weights(model)}
    assert {w.name for w in adapters.trainable_weights(model)} == adapter and adapter
    trainable = {id(p) for p in model.parameters() if not p.stop_gradient}
    assert trainable == {id(w.parameter) for w in adapters.adapter_weights(model)}
    before = {w.name: w.to_numpy().copy() for w in formats.weights.named_weights(model)}
    model.train()
    model(IDS, labels=IDS).sum().backward()
    for w in formats.weights.named_weights(model):
        assert w.parameter.grad is None and np.array_equal(w.to_numpy(), before[w.name])
    assert len(before) == len(formats.weights.named_weights(build(base))), "the adapter hides no base weight"
    with_gradient = {w.name for w in adapters.adapter_weights(model) if w.parameter.grad is not None}
    assert with_gradient == adapter


@pytest.mark.parametrize("name", LORA)
def test_lora_starts_as_the_base_model(name):
    base, apply = ADAPTERS[name]
    model = apply(build(base)).eval()
    assert largest(logits(model), logits(build(base))) < 1e-5
    assert largest(logits(trained(name)), logits(build(base))) > 0.05


@pytest.mark.parametrize("name", LORA)
def test_merged_equals_unmerged(name):
    model = trained(name)
    before = logits(model)
    merged = adapters.merge(model)
    assert largest(logits(merged), before) < 1e-5
    assert not adapters.lora_layers(merged) and not adapters.adapter_weights(merged)


def test_merged_model_is_saved_as_a_plain_one(tmp_path):
    model = trained("lora")
    before = logits(model)
    formats.weights.save_pretrained(adapters.merge(model), tmp_path)
    assert largest(logits(adapters.from_pretrained(tmp_path)), before) < 1e-5


@pytest.mark.parametrize("name", ["lora", "rslora", "lora_bias", "dora", "dora_rslora", "pissa"])
def test_lora_gradients_equal_the_dense_formula(name):
    """With G the gradient of the merged weight: dA = s G' B^T, dB = s A^T G', where G' = G, or for DoRA G m / ||V||."""
    model = trained(name)
    model(IDS, labels=IDS).sum().backward()
    found = gradients(model)
    dense = adapters.merge(trained(name))
    for parameter in dense.parameters():
        parameter.stop_gradient = False
    dense(IDS, labels=IDS).sum().backward()
    for path, layer in adapters.lora_layers(model).items():
        G = M.block_linears(dense)[path][2].weight.grad.numpy().astype(np.float64)  # (in, out)
        A, B = layer.lora_A.numpy().astype(np.float64), layer.lora_B.numpy().astype(np.float64)
        if layer.lora_magnitude_vector is not None:
            V = layer.base.weight.numpy() + layer.scaling * A @ B
            norm = np.linalg.norm(V, axis=0)
            expected = (G * V / norm).sum(0)
            close(found[f"base_model.model.{path}.lora_magnitude_vector"], expected)
            G = G * layer.lora_magnitude_vector.numpy() / norm
        close(found[f"base_model.model.{path}.lora_A.weight"], (layer.scaling * G @ B.T).T)
        close(found[f"base_model.model.{path}.lora_B.weight"], (layer.scaling * A.T @ G).T)


def close(found, expected):
    assert largest(found, expected) < 1e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", ["prefix", "prefix_projection", "lora"])
def test_gradients_equal_differences(name):
    """Along the gradient itself, whose slope is its norm."""
    model = trained(name)
    loss = lambda: model(IDS, labels=IDS).sum()
    loss().backward()
    weights = adapters.trainable_weights(model)
    found = [w.parameter.grad.numpy().astype(np.float64) for w in weights]
    start = [w.parameter.numpy() for w in weights]
    norm, sums, epsilon = np.sqrt(sum((g**2).sum() for g in found)), [], 5e-3
    for sign in (1, -1):
        for w, p, g in zip(weights, start, found):
            M.set_parameter(w.parameter, (p + sign * epsilon * g / norm).astype(np.float32))
        sums.append(float(loss()))
    assert (sums[0] - sums[1]) / (2 * epsilon) == pytest.approx(norm, rel=5e-3)


def test_scaling():
    for rslora, scaling in ((False, 6 / 4), (True, 6 / math.sqrt(4))):
        model = adapters.apply_lora(build(), rank=4, alpha=6.0, rslora=rslora)
        assert all(layer.scaling == scaling for layer in adapters.lora_layers(model).values())


def test_dropout_is_for_training_only():
    base = build()
    model = adapters.apply_lora(base, rank=4, alpha=16.0, dropout=0.5)
    for weight in adapters.adapter_weights(model):
        M.set_parameter(weight.parameter, np.full(weight.parameter.shape, 0.1, np.float32))
    model.eval()
    assert np.array_equal(logits(model), logits(model))
    model.train()
    assert not np.array_equal(logits(model), logits(model))
    layer = adapters.lora_layers(model)["model.layers.0.self_attn.q_proj"]
    x = tensor(np.ones((1, 20000, 32), np.float32))
    update = (layer(x) - layer.base(x)).numpy()  # its mean over masks is the update without dropout
    layer.eval()
    assert update.mean() == pytest.approx((layer(x) - layer.base(x)).numpy().mean(), rel=0.02)


def test_the_start_depends_on_seed_and_name_alone():
    a, b = (adapters.apply_lora(build(), rank=4, targets=t, seed=3) for t in (None, ["k_proj"]))
    path = "model.layers.1.self_attn.k_proj"
    assert np.array_equal(adapters.lora_layers(a)[path].lora_A.numpy(), adapters.lora_layers(b)[path].lora_A.numpy())
    c = adapters.apply_lora(build(), rank=4, seed=4)
    assert not np.array_equal(
        adapters.lora_layers(a)[path].lora_A.numpy(), adapters.lora_layers(c)[path].lora_A.numpy()
    )
    assert (adapters.lora_layers(a)[path].lora_B.numpy() == 0).all()


# ====================================================================================================== targets


def suffixes(model):
    return {path.split("layers.")[1] for path in adapters.lora_layers(model)}


@pytest.mark.parametrize(
    "targets, expected",
    [
        (
            None,
            {
                f"{i}.{n}"
                for i in (0, 1)
                for n in [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
            },
        ),
        (
            "all-linear",
            {
                f"{i}.{n}"
                for i in (0, 1)
                for n in [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
            },
        ),
        (["k_proj"], {"0.self_attn.k_proj", "1.self_attn.k_proj"}),
        (["mlp.up_proj", "q_proj"], {"0.mlp.up_proj", "1.mlp.up_proj", "0.self_attn.q_proj", "1.self_attn.q_proj"}),
        (["layers.1.mlp.up_proj"], {"1.mlp.up_proj"}),
        (r".*\.0\.self_attn\.[qv]_proj", {"0.self_attn.q_proj", "0.self_attn.v_proj"}),
    ],
)
def test_targets_are_found_by_name_not_by_shape(targets, expected):
    """q, k, v, o and the MLP have five different shapes under grouped-query attention: all are found."""
    assert suffixes(adapters.apply_lora(build(), targets=targets)) == expected


@pytest.mark.parametrize(
    "targets, named",
    [
        (["q_proj", "qkv_proj"], "qkv_proj"),
        (["proj"], "proj"),
        (["q.proj"], "q.proj"),
        ("q_proj", "q_proj"),
        (["lm_head"], "lm_head"),
        (["embed_tokens"], "embed_tokens"),
    ],
)
def test_an_unmatched_target_is_an_error(targets, named):
    model = build()
    with pytest.raises(UserError, match=f"'{named}' matches no linear.*gate_proj"):
        adapters.apply_lora(model, targets=targets)
    assert not adapters.lora_layers(model) and not any(p.stop_gradient for p in model.parameters()), (
        "a refused call changes nothing"
    )


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": -1}, {"dropout": 1.0}, {"dropout": -0.1}, {"pissa": True, "dora": True}]
)
def test_options_out_of_range(options):
    with pytest.raises(UserError):
        adapters.apply_lora(build(), **options)
    with pytest.raises(UserError, match="num_prefix_tokens"):
        adapters.apply_prefix(build(), tokens=0)


# ====================================================================================================== on disk


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_adapter_on_the_untouched_base_equals_the_live_model(name, tmp_path):
    model = trained(name)
    adapters.save_adapter(model, tmp_path, base_model="somewhere")
    loaded = adapters.load_adapter(build(ADAPTERS[name][0]), tmp_path).eval()
    assert largest(logits(loaded), logits(model)) < 1e-5
    assert not adapters.trainable_weights(loaded), "loaded for inference"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere" and config["inference_mode"] is True
    assert not list(tmp_path.glob(".*")), "temporary files are left"


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_save_load_save_is_identical(name, trainable, tmp_path):
    if not trainable and ("pissa" in name or "projection" in name):
        pytest.skip("loaded for inference, these become a plain LoRA and a plain prefix")
    adapters.save_adapter(trained(name), tmp_path / "a")
    adapters.save_adapter(
        adapters.load_adapter(build(ADAPTERS[name][0]), tmp_path / "a", trainable=trainable), tmp_path / "b"
    )
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_goes_on_exactly_from_a_saved_adapter(name, tmp_path):
    live = trained(name)
    adapters.save_adapter(live, tmp_path)
    resumed = adapters.load_adapter(build(ADAPTERS[name][0]), tmp_path, trainable=True).eval()
    weights = {w.name: w for w in adapters.trainable_weights(resumed)}
    assert weights.keys() == {w.name for w in adapters.trainable_weights(live)}
    for w in adapters.trainable_weights(live):
        assert np.array_equal(w.to_numpy(), weights[w.name].to_numpy()), w.name
    assert np.array_equal(logits(resumed), logits(live))
    for m in (live, resumed):
        m(IDS, labels=IDS).sum().backward()
    for key, gradient in gradients(live).items():
        assert np.array_equal(gradient, gradients(resumed)[key]), key


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_files_hold_peft_s_names_and_shapes(name, tmp_path):
    adapters.save_adapter(trained(name), tmp_path)
    tensors, config = (
        formats.tensor_files.read_safetensors(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    c = families.ModelConfig.from_dict(CASES[ADAPTERS[name][0]][0])
    if "prefix" in name:
        width = c.num_key_value_heads * c.head_dim  # under grouped-query attention narrower than hidden_size
        assert {k: v.shape for k, v in tensors.items()} == {
            "prompt_embeddings": (config["num_virtual_tokens"], 2 * 2 * width)
        }
        assert (config["token_dim"], config["num_attention_heads"], config["num_layers"]) == (
            width,
            c.num_key_value_heads,
            2,
        )
        return
    for key, array in tensors.items():
        assert key.startswith("base_model.model.model.layers.")
        if key.endswith("lora_A.weight"):
            assert array.shape[0] == config["r"]
            assert tensors[key.replace("lora_A", "lora_B")].shape[1] == config["r"]
    assert any("q_proj.lora_A.weight" in k for k in tensors)


def test_adapters_that_do_not_fit(tmp_path):
    adapters.save_adapter(trained("lora"), tmp_path / "lora")
    adapters.save_adapter(trained("prefix"), tmp_path / "prefix")
    with pytest.raises(UserError, match="adapter_model.safetensors: .*k_proj.lora_B.weight has shape"):
        adapters.load_adapter(build("mha"), tmp_path / "lora")
    with pytest.raises(UserError, match="adapter_config.json: prefix of 2 layers, 2 heads"):
        adapters.load_adapter(build("mha"), tmp_path / "prefix")
    tensors = formats.tensor_files.read_safetensors(tmp_path / "lora" / "adapter_model.safetensors")
    gone = [k for k in tensors if "layers.1.mlp.up_proj" in k]
    formats.tensor_files.write_safetensors(
        tmp_path / "lora" / "adapter_model.safetensors",
        {**{k: v for k, v in tensors.items() if k not in gone}, "extra": np.zeros(2, np.float32)},
    )
    with pytest.raises(UserError) as error:
        adapters.load_adapter(build(), tmp_path / "lora")
    assert all(f"missing {k}" in str(error.value) for k in gone) and "unexpected extra" in str(error.value)
    with pytest.raises(UserError, match="adapter_config.json: no such file"):
        adapters.load_adapter(build(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["nope"]}, "nope"),
        ({"r": None}, "r"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"lora_alpha": "16"}, "lora_alpha"),
    ],
)
def test_adapter_configs_that_are_not_supported(change, named, tmp_path):
    adapters.save_adapter(trained("lora"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=named):
        adapters.load_adapter(build(), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"peft_type": "LORA"}', '{"peft_type": "PREFIX_TUNING"}'])
def test_damaged_adapter_configs(text, tmp_path):
    adapters.save_adapter(trained("lora"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter_config.json"):
        adapters.load_adapter(build(), tmp_path)


def test_truncated_adapter(tmp_path):
    adapters.save_adapter(trained("lora"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        adapters.load_adapter(build(), tmp_path)


def test_goldens_of_peft_can_be_trained_further(tmp_path):
    for name in ("lora", "dora", "prefix", "prefix_projection"):
        golden = np.load(GOLDEN / f"peft_{name}" / "golden.npz")
        model = adapters.load_adapter(build(str(golden["base"])), GOLDEN / f"peft_{name}", trainable=True)
        assert adapters.trainable_weights(model)
        adapters.save_adapter(model, tmp_path / name)
        theirs, ours = (
            formats.tensor_files.read_safetensors(f / "adapter_model.safetensors")
            for f in (GOLDEN / f"peft_{name}", tmp_path / name)
        )
        assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[k], ours[k]) for k in theirs)
        shutil.rmtree(tmp_path / name)


# ======================================================================================================= PiSSA


def test_pissa_takes_the_largest_singular_values_out_of_the_base():
    model, plain = adapters.apply_lora(build(), rank=3, alpha=5.0, pissa=True), build()
    for path, layer in adapters.lora_layers(model).items():
        whole = M.block_linears(plain)[path][2].weight.numpy().astype(np.float64)
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        assert largest(layer.delta().numpy(), (u[:, :3] * s[:3]) @ vt[:3]) < 1e-5
        assert largest(np.linalg.svd(layer.base.weight.numpy(), compute_uv=False)[: len(s) - 3], s[3:]) < 1e-5


# ====================================================================================================== prefix


@pytest.mark.parametrize("name", ["prefix", "prefix_projection", "prefix_mha"])
def test_prefix_equals_keys_and_values_put_before_the_text(name):
    """The same arrays put into an empty cache by hand; the text is rotated from position P on."""
    model = trained(name)
    table, P, c = model.prefix.table().numpy(), model.prefix.tokens, model.config
    live, model.prefix = logits(model), None
    parts = table.reshape(P, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
    cache = model.new_cache(2)
    for layer in range(c.num_hidden_layers):
        cache.keys[layer], cache.values[layer] = (tensor(np.stack([parts[:, layer, i]] * 2)) for i in (0, 1))
    cache.tokens = P
    assert largest(model(IDS, caches=cache).numpy(), live) < 1e-5
    assert largest(logits(model), live) > 0.1


@pytest.mark.parametrize("name", ["prefix", "prefix_projection"])
def test_prefix_with_generate_and_left_padding(name):
    model, (ids, _, padded, mask) = trained(name), inputs()
    expected = ids
    for _ in range(NEW):
        expected = np.concatenate([expected, model(tensor(expected)).numpy()[:, -1].argmax(-1)[:, None]], 1)
    assert np.array_equal(M.generate(model, ids, max_new_tokens=NEW), expected)
    positions, rows = left_padding(mask)
    found = model(tensor(padded), tensor(positions), tensor(rows)).numpy()
    for row in range(2):
        alone = padded[row, mask[row] == 1][None]
        assert largest(found[row, mask[row] == 1], model(tensor(alone)).numpy()[0]) < 1e-5
        new = M.generate(model, padded, max_new_tokens=NEW, attention_mask=mask)[row, -NEW:]
        assert np.array_equal(new, M.generate(model, alone, max_new_tokens=NEW)[0, -NEW:])


@pytest.mark.parametrize("name", ["prefix", "prefix_projection", "lora", "dora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_equals_unpacked_with_adapters(name, recompute):
    packs, model = random_packs(), trained(name)
    model.recompute = recompute
    model.train()
    ids, labels, positions, rows = packed_batch(packs, 32)
    total = sum(int((t != -100).sum()) for pack in packs for _, t in pack)
    losses = model(tensor(ids), tensor(positions), tensor(rows), labels=tensor(labels))
    (losses.sum() / total).backward()
    packed = gradients(model)
    zero_grad(model)
    model.recompute = False
    for b, pack in enumerate(packs):
        at = 0
        for sample, target in pack:
            alone = model(tensor(sample[None]), labels=tensor(target[None]))
            assert largest(losses.numpy()[b, at : at + len(sample)], alone.numpy()[0]) < 1e-5
            (alone.sum() / total).backward()
            at += len(sample)
    for key, gradient in gradients(model).items():
        assert largest(packed[key], gradient) < 1e-5, key


@pytest.mark.parametrize("name", ["lora", "dora", "prefix", "prefix_projection"])
def test_adapter_disabled_is_the_base_model(name):
    model = trained(name)
    live, plain = logits(model), logits(build(ADAPTERS[name][0]))
    with pytest.raises(ZeroDivisionError), adapters.adapter_disabled(model):
        assert np.array_equal(logits(model), plain)
        raise ZeroDivisionError
    assert np.array_equal(logits(model), live)


def test_prefix_and_paddle_agree_on_what_is_trained():
    """One step of plain descent on the prefix lowers the loss."""
    model = trained("prefix_projection")
    model.train()
    found = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).mean()
        loss.backward()
        found.append(float(loss))
        for weight in adapters.trainable_weights(model):
            weight.parameter.set_value(weight.parameter - 0.05 * weight.parameter.grad)
        zero_grad(model)
    assert found[2] < found[1] < found[0]
    assert paddle.is_grad_enabled()
