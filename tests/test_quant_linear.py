"""QuantLinear and quant_linear: layouts, folders of integers, adapters on top of them; adapter folders opened as
models.

    python -m pytest tests/test_quant_linear.py            # CPU, a few seconds

How integers are chosen is quantize.py's matter (test_quantize.py); here random ones are held, written and read.
"""

import dataclasses
import json

import kernels

import numpy as np
import paddle
import pytest
from test_model import build, gradients, inputs, largest, tensor

import adapters
import families
import formats.tensor_files
import formats.weights
import model as M
from formats.files import UserError

pytestmark = pytest.mark.sweep(keep=12)

IDS = tensor(inputs()[0])
SCHEMES = {  # name: quantization_config
    "w4": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq"},
    "w4_groups": {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False,
        "checkpoint_format": "gptq"},
    "w4_short_group": {"quant_method": "gptq", "bits": 4, "group_size": 20, "sym": False, "desc_act": False},
    "w8_shuffled": {"quant_method": "gptq", "bits": 8, "group_size": 16, "sym": True, "desc_act": True,
        "checkpoint_format": "gptq"},
    "a8w8": {"quant_method": "a8w8", "bits": 8, "activation": "per_token"},
    "a8w8_shift": {"quant_method": "a8w8", "bits": 8, "activation": "per_tensor", "shift": True},
}  # fmt: skip

ROUNDED = ("w4", "a8w8")  # what else is in the folder is saved in bfloat16


def fill(layer, seed, weight_of=None):
    """Random integers for one QuantLinear; returns the (in, out) weight that they stand for, by plain numpy."""
    rng, (n_in, n_out) = np.random.default_rng(seed), (layer.n_in, layer.n_out)
    if layer.scheme == "a8w8":
        codes, scales = rng.integers(-128, 128, (n_in, n_out)), rng.uniform(0.5, 1.5, n_out).astype(np.float32) * 0.002
        M.set_parameter(layer.qweight, codes.astype(np.int8))
        M.set_parameter(layer.scales, scales)
        if layer.input_scale is not None:
            M.set_parameter(layer.input_scale, np.array([0.05], np.float32))
        return codes * scales
    bits, groups = int(layer.scheme[1:]), layer.scales.shape[0]
    per_word, group = 32 // bits, layer.g_index.numpy()
    if not layer.in_order and n_in % layer.group_size == 0:
        group = rng.permutation(group).astype(np.int32)
    codes, zeros = rng.integers(0, 2**bits, (n_in, n_out)), rng.integers(0, 2**bits, (groups, n_out))
    scales = (rng.uniform(0.5, 1.5, (groups, n_out)) * 0.5 / 2**bits).astype(np.float16).astype(np.float32)
    words, zero_words = np.zeros((n_in // per_word, n_out), np.uint32), np.zeros((groups, n_out // per_word), np.uint32)
    for row in range(n_in):
        words[row // per_word] |= codes[row].astype(np.uint32) << np.uint32(bits * (row % per_word))
    for column in range(n_out):
        stored = (zeros[:, column] - 1) % 2**bits  # zero point 0 wraps around to the largest code
        zero_words[:, column // per_word] |= stored.astype(np.uint32) << np.uint32(bits * (column % per_word))
    for name, array in (
        ("qweight", words.view(np.int32)),
        ("qzeros", zero_words.view(np.int32)),
        ("scales", scales),
        ("g_index", group),
    ):
        M.set_parameter(getattr(layer, name), array)
    return (codes - zeros[group]) * scales[group]


def quantized(scheme, case="gqa", seed=0):
    """A model of random integers, and the float model that it stands for."""
    plain = build(case)
    config = dataclasses.replace(plain.config, quantization=SCHEMES[scheme])
    model, weights = M.build(config), {}
    for i, (path, (_, _, layer)) in enumerate(M.block_linears(model).items()):
        weights[path] = fill(layer, [seed, i])
    from_plain = {w.name: w for w in formats.weights.named_weights(plain)}
    for w in formats.weights.named_weights(model):
        if w.name in from_plain and w.parameter.dtype == paddle.float32 and "scales" not in w.name:
            M.set_parameter(w.parameter, from_plain[w.name].parameter.numpy())
        elif w.name.endswith("bias"):
            M.set_parameter(w.parameter, np.random.default_rng(7).standard_normal(w.shape).astype(np.float32) * 0.1)
    for path, (_, _, layer) in M.block_linears(plain).items():
        M.set_parameter(layer.weight, weights[path].astype(np.float32))
    return model.eval(), plain.eval()


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.startswith("w")])
@pytest.mark.parametrize("case", ["gqa", "bias_tied"])
def test_integers_stand_for_their_floats(scheme, case):
    model, plain = quantized(scheme, case)
    assert largest(model(IDS).numpy(), plain(IDS).numpy()) < 2e-5
    for (_, _, ours), (_, _, theirs) in zip(M.block_linears(model).values(), M.block_linears(plain).values()):
        assert largest(ours.dequantized().numpy(), theirs.weight.numpy()) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 33])
@pytest.mark.parametrize(
    "scheme, shape, group",
    [("w4", (64, 48), -1), ("w4", (96, 160), 32), ("w8", (40, 16), 20), ("w8", (64, 144), -1), ("w4", (64, 24), 64)],
)
def test_a_few_rows_equal_the_product_with_unpacked_weights(rows, scheme, shape, group):
    layer = M.QuantLinear(*shape, scheme, group, bias=True)
    weight, x = (
        fill(layer, [rows, *shape]),
        np.random.default_rng(rows).standard_normal((1, rows, shape[0])).astype(np.float32),
    )
    M.set_parameter(layer.bias, np.arange(shape[1], dtype=np.float32))
    with paddle.no_grad():
        found = layer(tensor(x)).numpy()
        with kernels.use("reference"):
            slow = layer(tensor(x)).numpy()
    assert np.abs(found - (x.astype(np.float64) @ weight + np.arange(shape[1]))).max() < 1e-4
    assert np.abs(found - slow).max() < 1e-4


def draw_packed(bits, n_in, n_out, kind):
    """qweight, scales, qzeros and g_index of random codes, and the (in, out) weight that they stand for."""
    rng, group = (
        np.random.default_rng([bits, n_in, n_out]),
        {"runs": 16, "one": n_in, "odd": 20, "short": 48, "words": 16, "shuffled": 16}[kind],
    )
    g_index = np.arange(n_in) // group  # "odd": runs end within a word; "short": so is the last run
    if kind == "words":
        g_index = rng.permutation(g_index.reshape(-1, 32 // bits)).reshape(-1)
    if kind == "shuffled":
        g_index = rng.permutation(g_index)
    groups, per_word = g_index.max() + 1, 32 // bits
    codes, zeros = rng.integers(0, 2**bits, (n_in, n_out)), rng.integers(0, 2**bits, (groups, n_out))
    scales = rng.uniform(0.5, 1.5, (groups, n_out)).astype(np.float32) / 2**bits
    shifts = bits * np.arange(per_word, dtype=np.uint32)
    qweight = (codes.reshape(-1, per_word, n_out).astype(np.uint32) << shifts[:, None]).sum(1, dtype=np.uint32)
    qzeros = (((zeros - 1) % 2**bits).reshape(groups, -1, per_word).astype(np.uint32) << shifts).sum(
        -1, dtype=np.uint32
    )
    arrays = qweight.view(np.int32), scales, qzeros.view(np.int32), g_index.astype(np.int32)
    return (
        [paddle.to_tensor(a) for a in arrays],
        (codes - zeros[g_index]) * scales[g_index],
        (codes - 2 ** (bits - 1)) * scales[g_index],
    )


@pytest.mark.parametrize("n_out", [1, 3, 5, 18, 33, 131])
def test_widths_that_are_no_whole_words_without_zeros(n_out):
    """No folder has them, as QuantLinear refuses, but the op takes them."""
    (qweight, scales, _, _), _, weight = draw_packed(4, 80, n_out + -n_out % 8, "one")
    x = np.random.default_rng(0).standard_normal((5, 80)).astype(np.float32)
    with paddle.no_grad():
        found = kernels.quant_linear(
            tensor(x), qweight[:, :n_out].contiguous(), scales[:, :n_out].contiguous(), scheme="w4"
        )
    assert np.abs(found.numpy() - x @ weight[:, :n_out]).max() < 1e-4


@pytest.mark.skipif(kernels._missing("cpu", "quant_linear") is not None, reason="no C++ ops")
@pytest.mark.parametrize("instructions", [0, 1, 2, -1])
@pytest.mark.parametrize("kind", ["runs", "one", "odd", "short", "words", "shuffled"])
@pytest.mark.parametrize(
    "bits, n_in, n_out", [(4, 80, 8), (4, 160, 200), (8, 80, 4), (8, 160, 268), (8, 240, 132), (4, 240, 688)]
)
def test_packed_weights_by_every_instruction_set(bits, n_in, n_out, kind, instructions):
    """No group, width or order that a folder may have is left to the reference."""
    (qweight, scales, qzeros, g_index), weight, symmetric = draw_packed(bits, n_in, n_out, kind)
    bias, run = np.random.default_rng(1).standard_normal(n_out).astype(np.float32), paddle._C_ops._run_custom_op
    for rows, zeros, order, b in ((1, qzeros, g_index, None), (7, None, g_index, bias), (32, qzeros, None, bias)):
        if order is None and (kind in ("short", "words", "shuffled") or n_in % scales.shape[0]):
            continue
        x, wanted = (
            np.random.default_rng(rows).standard_normal((rows, n_in)).astype(np.float32),
            weight if zeros is qzeros else symmetric,
        )
        found = run(
            "cpu_quant_linear",
            tensor(x),
            qweight,
            scales,
            zeros,
            order,
            None if b is None else tensor(b),
            bits,
            instructions,
        )[0]
        assert np.abs(found.numpy() - (x @ wanted + (0 if b is None else b))).max() < 1e-5 * np.sqrt(n_in)
        assert (
            np.abs(run("cpu_dequantize", qweight, scales, zeros, order, bits, instructions)[0].numpy() - wanted).max()
            < 1e-6
        )
    g_index[n_in - 1] = 99
    with pytest.raises(OSError, match="names a group"):
        run("cpu_quant_linear", tensor(x), qweight, scales, None, g_index, None, bits, instructions)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_folder_of_integers_is_left_to_the_reference(scheme, monkeypatch):
    if why := kernels._missing("cpu", "quant_linear"):
        pytest.skip(why)
    model, _ = quantized(scheme)

    def slow(*args, **kwargs):
        raise AssertionError("the slow path")

    monkeypatch.setattr(kernels.reference, "quant_linear", slow)
    monkeypatch.setattr(kernels.reference, "dequantize", slow)
    kernels.configure("cpu")
    with paddle.no_grad():
        model(IDS)
        model(IDS[:1, :1])


@pytest.mark.parametrize("static", [False, True])
def test_a8w8_rounds_activations_and_weights(static):
    rng = np.random.default_rng(0)
    layer = M.QuantLinear(24, 7, "a8w8", bias=True, static_input=static)
    w, x = fill(layer, 3), rng.standard_normal((2, 5, 24)).astype(np.float32)
    x[0, 0] = 0.0  # a token of nothing
    M.set_parameter(layer.bias, rng.standard_normal(7).astype(np.float32))
    scale = 0.05 if static else np.maximum(np.abs(x).max(-1, keepdims=True), 1e-8).astype(np.float64) / 127
    codes = np.clip(np.round(x.astype(np.float64) / scale), -128, 127)
    want = codes * scale @ w + layer.bias.numpy()
    found = layer(tensor(x)).numpy()
    near_half = np.abs(np.abs(x / scale) % 1 - 0.5).min(-1) < 1e-4  # where float32 may round the other way
    assert np.abs(found - want)[~near_half].max() < 1e-5 and near_half.mean() < 0.2
    assert np.isfinite(found).all() and np.abs(codes).max() == (127 if not static else np.round(np.abs(x).max() / 0.05))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_of_integers_comes_back_bit_for_bit(scheme, tmp_path):
    model, _ = quantized(scheme)
    formats.weights.save_pretrained(
        model, tmp_path / "q", dtype="bfloat16" if scheme in ROUNDED else "float32", max_shard_bytes=3000
    )
    again = adapters.from_pretrained(tmp_path / "q").eval()
    for a, b in zip(formats.weights.named_weights(model), formats.weights.named_weights(again)):
        assert a.name == b.name and (scheme in ROUNDED or np.array_equal(a.to_numpy(), b.to_numpy())), a.name
    if scheme not in ROUNDED:
        assert np.array_equal(model(IDS).numpy(), again(IDS).numpy())
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"] == SCHEMES[scheme]
    header = [
        entry
        for f in (tmp_path / "q").glob("*.safetensors")
        for entry in formats.tensor_files.safetensors_header(f).items()
    ]
    types = {kind: {e[0] for n, e in header if n.endswith(kind)} for kind in ("qweight", ".scales", "norm.weight")}
    norms = {"BF16"} if scheme in ROUNDED else {"F32"}
    of_integers = ({"I8"}, {"F32"}) if "a8w8" in scheme else ({"I32"}, {"F16"})
    assert tuple(types.values()) == (*of_integers, norms), "scales keep their precision whatever the rest is saved in"


def test_nothing_else_is_said_in_a_plain_config(tmp_path):
    formats.weights.save_pretrained(build(), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["w4_groups", "w8_shuffled"])
def test_lora_on_integers_learns_as_on_their_floats(scheme):
    results = []
    for model in quantized(scheme):
        adapters.apply_lora(model, rank=2, alpha=4.0)
        for i, weight in enumerate(adapters.adapter_weights(model)):
            M.set_parameter(
                weight.parameter,
                np.random.default_rng([5, i]).standard_normal(weight.parameter.shape).astype(np.float32) * 0.1,
            )
        losses = model(IDS, labels=IDS).sum()
        losses.backward()
        results.append((float(losses), gradients(model)))
    (a, a_grads), (b, b_grads) = results
    assert a == pytest.approx(b, rel=1e-6) and a_grads.keys() == b_grads.keys()
    for name in a_grads:
        assert largest(a_grads[name], b_grads[name]) < 1e-4 * max(1.0, np.abs(b_grads[name]).max()), name


def test_what_integers_cannot_do_is_said():
    model, _ = quantized("w4")
    with pytest.raises(UserError, match="LoRA or a prefix"):
        adapters.trainable_weights(model)
    for option in ({"dora": True}, {"pissa": True}):
        with pytest.raises(UserError, match="quantized"):
            adapters.apply_lora(quantized("w4")[0], rank=2, alpha=2.0, **option)
    with pytest.raises(UserError, match="merge"):
        adapters.merge(adapters.apply_lora(model, rank=2, alpha=2.0))
    with pytest.raises(UserError, match="no gradient"):
        adapters.trainable_weights(adapters.apply_lora(quantized("a8w8")[0], rank=2, alpha=2.0))
    with pytest.raises(UserError, match="multiples of 8"):
        M.QuantLinear(12, 16, "w4")


def test_damaged_folders_of_integers_are_refused_by_name(tmp_path):
    model, _ = quantized("w4_groups")
    formats.weights.save_pretrained(model, tmp_path)
    tensors = formats.tensor_files.read_safetensors(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj."
    for change, named in (
        ({name + "g_idx": tensors[name + "g_idx"][::-1].copy()}, "not in order"),
        ({name + "g_idx": tensors[name + "g_idx"] + 9}, "names group"),
        ({name + "qweight": tensors[name + "qweight"].astype(np.float32)}, "int32 is needed"),
        ({name + "scales": tensors[name + "scales"][:1]}, "shape"),
    ):
        formats.tensor_files.write_safetensors(tmp_path / "model.safetensors", {**tensors, **change})
        with pytest.raises(UserError, match=named):
            adapters.from_pretrained(tmp_path)
    for key, value in (
        ("quant_method", "hqq"),
        ("bits", 5),
        ("checkpoint_format", "marlin"),
        ("group_size", 0),
    ):
        with pytest.raises(UserError, match=key):
            families.ModelConfig.from_dict(
                {**model.config.source, "quantization_config": {**SCHEMES["w4_groups"], key: value}}
            )


# ------------------------------------------------------------------------------------ folders of adapters


def test_an_adapter_folder_opens_as_its_base_with_it(tmp_path):
    base = build()
    formats.weights.save_pretrained(base, tmp_path / "base")
    first = adapters.apply_lora(build(), rank=2, alpha=4.0)
    for w in adapters.adapter_weights(first):
        M.set_parameter(
            w.parameter, np.random.default_rng(1).standard_normal(w.parameter.shape).astype(np.float32) * 0.2
        )
    adapters.save_adapter(first, tmp_path / "first", tmp_path / "base")
    opened = adapters.from_pretrained(tmp_path / "first")
    assert not adapters.lora_layers(opened), "merged"
    assert (
        1e-7 < largest(opened(IDS).numpy(), base(IDS).numpy())
        and largest(opened(IDS).numpy(), first.eval()(IDS).numpy()) < 1e-4
    )
    second = adapters.apply_prefix(opened, tokens=3)
    adapters.save_adapter(second, tmp_path / "second", tmp_path / "first")
    assert largest(adapters.from_pretrained(tmp_path / "second")(IDS).numpy(), second(IDS).numpy()) < 1e-5
    for name, base_name in (("lost", "other"), ("other", "lost")):  # two that name each other
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(tmp_path / base_name)})
        )
    for base_name in (None, "nowhere", str(tmp_path / "lost"), str(tmp_path / "other")):
        (tmp_path / "lost" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base_name}))
        with pytest.raises(UserError, match="base_model_name_or_path"):
            adapters.from_pretrained(tmp_path / "lost")


# ------------------------------------------------------------------------- caches that keep keys themselves


def test_a_cache_that_attends_by_itself_gives_the_same_logits():
    """Two sequences flattened to one row, in steps, over a pool of blocks: the door that serve.py's engine uses."""
    model, ids = build().eval(), inputs()[0]
    c, size = model.config, 4

    class Pool(M.KVCache):
        def __init__(self):
            shape = [16, size, c.num_key_value_heads, c.head_dim]
            self.k, self.v = ([paddle.zeros(shape) for _ in model.layers] for _ in "kv")
            self.tables = np.array([[3, 9, 1, 4], [8, 2, 7, 0]], np.int32)

        def attend(self, layer, q, k, v, *, mask_rows, **options):
            for pool, new in ((self.k[layer], k), (self.v[layer], v)):
                at = 0
                for s, (start, stop) in enumerate(self.spans):
                    for position in range(start, stop):
                        pool[int(self.tables[s, position // size]), position % size] = new[0, at]
                        at += 1
            lengths = [stop - start for start, stop in self.spans]
            contexts = np.array([stop for _, stop in self.spans])
            return kernels.paged_attention(
                q[0], self.k[layer], self.v[layer], self.tables, np.array(lengths), contexts, **options
            ).unsqueeze(0)

    pool, found = Pool(), [[], []]
    for pool.spans in (((0, 5), (0, 1)), ((5, 6), (1, 8)), ((6, 12), (8, 9))):
        step = np.concatenate([ids[s, a:b] for s, (a, b) in enumerate(pool.spans)])[None]
        positions = np.concatenate([np.arange(a, b) for a, b in pool.spans])[None]
        x = model.hidden_states(tensor(step), tensor(positions), caches=pool)
        head = model.embed_tokens.weight.T if model.lm_head is None else model.lm_head.weight
        logits = kernels.linear(x, head)[0].numpy()
        cut = pool.spans[0][1] - pool.spans[0][0]
        found[0].append(logits[:cut])
        found[1].append(logits[cut:])
    whole = model(tensor(ids)).numpy()
    assert (
        largest(np.concatenate(found[0]), whole[0, :12]) < 1e-5
        and largest(np.concatenate(found[1]), whole[1, :9]) < 1e-5
    )
