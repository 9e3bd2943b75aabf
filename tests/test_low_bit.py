"""Bases in 4 and 8 bits that LoRA trains on: codes against bitsandbytes', gradients against the dequantized base, runs.

python -m pytest tests/test_low_bit.py      # CPU, some seconds
"""

import itertools
import json
import types

import kernels

import numpy as np
import paddle
import pytest
import tiny_models
from conftest import ROOT, SHARED
from test_export import DEMO, run, tokenizer_into

import adapters
import dpo
import finetune
import formats.weights
import model as M
import rl
from arguments import parse_args
from distributed.tensor import cut_blocks
from formats.files import UserError
from modules import low_bit
from modules.lora import truncated_svd
from modules.low_bit import LowBit, LowBitLinear

CPU, BF16 = not kernels._missing("cpu", "dequantize_table"), not kernels._missing("cpu", "bf16")
ALL = [LowBit(algo) for algo in low_bit.ALGORITHMS] + [LowBit("nf4", 64, True, 32), LowBit("fp4", 128, True)]


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(ROOT / "tests" / "golden" / "low_bit.npz"))


def held(weight, low):
    """A LowBitLinear with this weight (out, in)."""
    layer = LowBitLinear(M.Linear(weight.shape[1], weight.shape[0], False), low)
    layer.set_weight(weight)
    return layer


# ======================================================================================================= the codes


def test_codes_and_scales_are_those_of_bitsandbytes(golden):
    np.testing.assert_allclose(
        low_bit.dynamic_map(), golden["dynamic_map"], rtol=2e-7
    )  # torch fuses a product and a sum
    names = [name.removesuffix("_values") for name in golden if name.endswith("_values")]
    for name in names:
        algo, blocksize, kind = name.split("_")
        low = LowBit(algo, int(blocksize), kind == "double")
        found = low_bit.round_weight(golden["weight"], low)
        for key, array in found.items():
            if key in ("absmax_mean", "absmax_scales"):  # a mean of floats in another order
                np.testing.assert_allclose(array, golden[f"{name}_{key}"], rtol=1e-6, err_msg=name)
                continue
            expected = golden[f"{name}_{key}"]
            if key == "codes" and algo == "fp4":  # 8 is -0
                halves = np.stack([expected >> 4, expected & 15])
                expected = np.where(halves == 8, 0, halves)
                expected = expected[0] << 4 | expected[1]
            np.testing.assert_array_equal(array, expected, err_msg=f"{name} {key}")
        values = held(golden["weight"], low).dequantized().numpy().T[:2]
        np.testing.assert_allclose(values, golden[f"{name}_values"], rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("algo, bits", [("weight_only_int8", 8), ("weight_only_int4", 4)])
def test_integers_are_to_nearest_by_output_channel(algo, bits):
    weight = np.random.default_rng(0).standard_normal((6, 34)).astype(np.float32)
    weight[2] = 0
    most = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(weight).max(1, keepdims=True), 1e-8) / most
    found = held(weight, LowBit(algo)).dequantized().numpy().T
    np.testing.assert_allclose(found, np.rint(weight / scale) * scale, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not CPU, reason="no C++ ops")
@pytest.mark.parametrize("low", ALL, ids=str)
def test_the_fast_dequantization_has_the_bits_of_the_reference(low, monkeypatch):
    for shape in ((5, 122), (37, 64), (16, 6), (1, 2), (33, 50), (70, 18)):
        layer = held(np.random.default_rng(1).standard_normal(shape).astype(np.float32), low)
        values = paddle.to_tensor(low_bit.TABLES[low.algo])
        for kind in ("float32", "bfloat16"):
            with kernels.use("reference"):
                expected = layer.dequantized(False, kind).astype("float32").numpy()
            for transposed, instructions in itertools.product((False, True), (-1, 2, 1, 0)):
                monkeypatch.setattr("kernels.cpu.INSTRUCTIONS", instructions)
                found = kernels.dequantize_table(layer.codes, layer.scales(), values, *shape[::-1], transposed, kind)
                found = found.astype("float32").numpy()
                np.testing.assert_array_equal(found.T if transposed else found, expected, err_msg=str(shape))


PRODUCTS = [(1, 5, 34, 40), (2, 37, 64, 48), (1, 33, 6, 100), (3, 20, 96, 33)]  # B, T, in, out


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.skipif(not BF16, reason="no bfloat16"))])
@pytest.mark.parametrize("dropped, bias", [(False, False), (True, True)])
@pytest.mark.parametrize("low", ALL[:1] + ALL[3:5], ids=str)
def test_products_are_those_of_the_dequantized_weight(low, dropped, bias, bf16, monkeypatch):
    """Of linear and lora_linear, forward and backward, beside the same weight as a tensor."""
    with kernels.use("auto"):
        monkeypatch.setattr(kernels, "bf16", bf16)
        for B, T, n_in, n_out in PRODUCTS:
            generator = np.random.default_rng(T)
            layer = held(generator.standard_normal((n_out, n_in)).astype(np.float32), low)
            arrays = [generator.standard_normal(s).astype(np.float32) for s in ((n_in, 3), (3, n_out), (n_out,))]
            x0, dy = (generator.standard_normal((B, T, n)).astype(np.float32) for n in (n_in, n_out))
            found = {}
            for name, weight in (("codes", layer.weight), ("floats", layer.dequantized())):
                x, a, b = (paddle.to_tensor(array, stop_gradient=False) for array in (x0, *arrays[:2]))
                added = paddle.to_tensor(arrays[2]) if bias else None
                y = kernels.linear(x, weight, added)
                z = kernels.lora_linear(x, weight, a, b, 0.5, added, x * 0.5 if dropped else None)
                (y * z * paddle.to_tensor(dy)).sum().backward()
                found[name] = [t.numpy() for t in (y, z, x.grad, a.grad, b.grad)]
            for codes, floats in zip(found["codes"], found["floats"]):
                np.testing.assert_allclose(codes, floats, rtol=2e-5, atol=2e-5 * np.abs(floats).max())


def test_bits_a_weight():
    weight = np.random.default_rng(1).standard_normal((512, 512)).astype(np.float32)
    bits = {low: 8 * held(weight, low).nbytes() / weight.size for low in ALL}
    assert bits[LowBit("nf4")] == 4.5 and bits[LowBit("fp4", 128, True)] < 4.08
    assert 4.12 < 8 * held(weight, LowBit("nf4", 64, True)).nbytes() / weight.size < 4.13


# ============================================================================ a model: loading, gradients, merging


def rounded(folder, low):
    """Its model with rounded linears, as finetune.py loads it, and the same in float with those values."""
    import parallel

    model = parallel.from_pretrained(folder, parallel.SINGLE, low_bit=low)
    plain = adapters.from_pretrained(folder)
    linears = M.block_linears(plain)
    for path, (_, _, layer) in M.block_linears(model).items():
        assert isinstance(layer, LowBitLinear) and layer.weight.shape == linears[path][2].weight.shape
        linears[path][2].weight.set_value(layer.dequantized())
    return model, plain


IDS = np.random.default_rng(0).integers(3, 60, (2, 11))


def loss_and_gradients(model, **lora):
    adapters.apply_lora(model, 4, seed=3, **lora)
    for layer in adapters.lora_layers(model).values():  # B begins at 0: no gradient would reach A
        M.set_parameter(layer.lora_B, np.random.default_rng(5).standard_normal(layer.lora_B.shape).astype(np.float32))
    model.train()
    loss = model(paddle.to_tensor(IDS)).astype("float32").square().mean()
    loss.backward()
    return float(loss), {w.name: w.grad.numpy() for w in adapters.trainable_weights(model)}


@pytest.mark.parametrize("low", ALL[:1] + ALL[3:5], ids=str)
@pytest.mark.parametrize("name, lora", [("llama", {}), ("qwen2_moe", {"dora": True})])
def test_gradients_are_those_of_lora_on_the_dequantized_base(tmp_path, name, lora, low):
    model, plain = rounded(tiny_models.write(tmp_path, name), low)
    loss, gradients = loss_and_gradients(model, **lora)
    expected_loss, expected = loss_and_gradients(plain, **lora)
    assert loss == pytest.approx(expected_loss, rel=1e-5) and gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[key], rtol=1e-3, atol=1e-5 * np.abs(expected[key]).max())
    model.eval(), plain.eval()
    with paddle.no_grad():
        before = model(paddle.to_tensor(IDS)).numpy()
        adapters.merge(model)
        assert not any(isinstance(layer, LowBitLinear) for layer in model.sublayers())
        np.testing.assert_allclose(model(paddle.to_tensor(IDS)).numpy(), before, rtol=1e-3, atol=1e-4)


def test_weights_are_rounded_one_by_one(tmp_path, monkeypatch):
    """No linear of the blocks ever has a float parameter, and each is set once."""
    folder, calls = tiny_models.write(tmp_path, "llama"), []
    real = LowBitLinear.set_weight
    monkeypatch.setattr(LowBitLinear, "set_weight", lambda self, array: calls.append(array.shape) or real(self, array))
    import parallel

    model = parallel.from_pretrained(folder, parallel.SINGLE, low_bit=LowBit("nf4"))
    assert len(calls) == len(M.block_linears(model)) == 14
    names = {name for name, _ in model.named_parameters()}
    assert names == {"embed_tokens.weight", "lm_head.weight", "norm.weight"} | {
        f"layers.{i}.{kind}_norm.weight" for i in range(2) for kind in ("attention", "mlp")
    }
    expected = {w.name: w.shape for w in formats.weights.named_weights(adapters.from_pretrained(folder))}
    assert {w.name: w.shape for w in formats.weights.named_weights(model)} == expected


def test_backward_keeps_no_float_weight(tmp_path, monkeypatch):
    """Each product dequantizes its weight anew: twice a layer in a step."""
    model, _ = rounded(tiny_models.write(tmp_path, "llama"), LowBit("nf4"))
    calls, real = [], LowBitLinear.dequantized
    monkeypatch.setattr(LowBitLinear, "dequantized", lambda self, *at, **key: calls.append(1) or real(self, *at, **key))
    loss_and_gradients(model)
    assert 2 * 14 - 3 <= len(calls) <= 2 * 14  # the first block's q, k and v read no gradient


# ================================================================================================ scripts and files


def data(tmp_path, record):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.json").write_text((json.dumps(record) + "\n") * 4)
    return folder


def arguments(script, tmp_path, **keys):
    keys = dict(output_dir=tmp_path / "out", device="cpu", do_train="true", do_eval="false", max_steps=2) | keys
    return parse_args(script.Args, [f"--{key}={value}" for key, value in keys.items()])


def qlora(tmp_path, script=finetune, **keys):
    source = tokenizer_into(tiny_models.write(tmp_path / "base", "llama", vocab_size=3072))
    keys = dict(model_name_or_path=source, lora="true", learning_rate=0.05, weight_quantize_algo="nf4") | keys
    script.main(arguments(script, tmp_path, **keys))
    return source, tmp_path / "out"


def logits(path):
    with paddle.no_grad():
        return adapters.from_pretrained(path)(paddle.to_tensor(IDS)).numpy()


def test_finetune_and_what_becomes_of_its_adapter(tmp_path, capsys):
    keys = dict(qlora_weight_blocksize=32, qlora_weight_double_quant="true", max_length=32)
    records = data(tmp_path, {"src": "question", "tgt": "answer"})
    source, out = qlora(tmp_path, dataset_name_or_path=records, **keys)
    assert "base: 14 linears (13,824 weights) in nf4, 4." in capsys.readouterr().out
    saved = json.loads((out / "adapter_config.json").read_text())["base_quantization"]
    assert saved == {"algo": "nf4", "blocksize": 32, "double_quant": True, "double_quant_block_size": 256}

    _, plain = rounded(source, LowBit("nf4", 32, True))  # LoRA is merged into the rounded base that it was trained on
    with paddle.no_grad():
        expected = adapters.merge(adapters.load_adapter(plain, out))(paddle.to_tensor(IDS)).numpy()
    np.testing.assert_allclose(logits(out), expected, rtol=1e-4, atol=1e-5)
    merged = run(tmp_path / "merged", model_name_or_path=out, save_dtype="float32")
    np.testing.assert_allclose(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    records = data(tmp_path, {"src": "question", "tgt": "answer"})
    keys = dict(dataset_name_or_path=records, max_length=32, max_steps=4, save_steps=2)
    source, out = qlora(tmp_path, **keys)
    whole = logits(out)
    resumed = dict(keys, model_name_or_path=source, lora="true", learning_rate=0.05, weight_quantize_algo="nf4")
    resumed |= dict(output_dir=tmp_path / "again", resume_from_checkpoint=out / "checkpoint-2")
    finetune.main(arguments(finetune, tmp_path, **resumed))
    np.testing.assert_array_equal(logits(tmp_path / "again"), whole)


def test_dpo_on_a_rounded_base(tmp_path):
    records = data(tmp_path, {"src": ["question"], "tgt": [], "response": ["good", "bad"], "sort": [1, 0]})
    _, out = qlora(tmp_path, dpo, train_dataset_path=records / "train.json", max_seq_len=64, max_prompt_len=32)
    assert json.loads((out / "adapter_config.json").read_text())["base_quantization"]["algo"] == "nf4"


def test_rl_on_a_rounded_base(tmp_path):
    """The engine's log-probabilities are those of training, whose linears are codes."""
    (tmp_path / "rewards.py").write_text("def short(completions, **_): return [-len(c) / 10 for c in completions]\n")
    prompts = tmp_path / "train.jsonl"
    prompts.write_text('{"src": "red lamp"}\n{"src": "blue shirt"}\n')
    keys = dict(train_datasets=prompts, reward_funcs=f"{tmp_path}/rewards.py:short", max_dec_len=8, max_src_len=16)
    keys |= dict(global_batch_size=2, rollout_n=2, save_strategy="no", logging_steps=1)
    source, out = qlora(tmp_path, rl, **keys)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["engine_kl"] for row in rows) < 1e-8 and len(rows) == 2
    assert json.loads((out / "adapter_config.json").read_text())["base_quantization"]["algo"] == "nf4"
    _, plain = rounded(source, LowBit("nf4"))
    with paddle.no_grad():
        expected = adapters.merge(adapters.load_adapter(plain, out))(paddle.to_tensor(IDS)).numpy()
    np.testing.assert_allclose(logits(out), expected, rtol=1e-4, atol=1e-5)


# ============================================================================================================== loftq


def test_the_singular_vectors_are_the_first():
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((60, 90)).astype(np.float32) * np.linspace(0.1, 3, 60, dtype=np.float32)[:, None]
    u, s, vt = truncated_svd(matrix, 6)
    _, exact, _ = np.linalg.svd(matrix)
    np.testing.assert_allclose(u.T @ u, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(s, exact[:6], rtol=0.02)
    assert np.linalg.norm(matrix - u * s @ vt) < 1.001 * np.sqrt(np.square(exact[6:]).sum())


@pytest.mark.parametrize("name, dora", [("llama", False), ("qwen2_moe", True)])
def test_loftq_starts_at_what_rounding_took(tmp_path, name, dora):
    folder = tiny_models.write(tmp_path, name, hidden_size=64, intermediate_size=96)
    model, _ = rounded(folder, LowBit("nf4"))
    ids = paddle.to_tensor(IDS)
    with paddle.no_grad():
        exact, before = adapters.from_pretrained(folder)(ids).numpy(), model(ids).numpy()
        adapters.apply_lora(model, 16, seed=3, dora=dora)
        np.testing.assert_allclose(model(ids).numpy(), before, rtol=1e-3, atol=1e-4)
        adapters.start_at_residual(model, folder)
        started = model(ids).numpy()
        assert np.linalg.norm(started - exact) < 0.8 * np.linalg.norm(before - exact)
        layer = next(iter(adapters.lora_layers(model).values()))
        assert layer.base.on_rounded is None
        weight = (layer.base.dequantized() + layer.delta()).numpy()
        x = np.random.default_rng(1).standard_normal((3, layer.base.n_in)).astype(np.float32)
        np.testing.assert_allclose(layer.product(paddle.to_tensor(x)).numpy(), x @ weight, rtol=1e-3, atol=1e-4)


def test_finetune_with_loftq(tmp_path):
    records = data(tmp_path, {"src": "question", "tgt": "answer"})
    source, out = qlora(tmp_path, dataset_name_or_path=records, max_length=32, loftq="true", learning_rate=1e-9)
    _, plain = rounded(source, LowBit("nf4"))
    with paddle.no_grad():
        adapters.load_adapter(plain, out)
        assert all(np.abs(x.lora_B.numpy()).max() > 1e-4 for x in adapters.lora_layers(plain).values())
        expected = adapters.merge(plain)(paddle.to_tensor(IDS)).numpy()
    np.testing.assert_allclose(logits(out), expected, rtol=1e-4, atol=1e-5)


def test_scales_of_scales_are_not_cut():
    spec = types.SimpleNamespace(shape=[64, 64], dim=1, ranges_by_rank=[[(0, 32)], [(32, 64)]])
    assert cut_blocks(spec, LowBit("nf4", 64)) is None and "blocks of 4096" in cut_blocks(spec, LowBit("nf4", 4096))
    assert "would be on several ranks" in cut_blocks(spec, LowBit("nf4", 64, double_quant=True))
    assert cut_blocks(spec, LowBit("weight_only_int8", 64, double_quant=True)) is None  # it has no blocks


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"weight_quantize_algo": "nf5"}, "'nf5'; possible are nf4, fp4, weight_only_int4, weight_only_int8"),
        ({"lora": "false"}, "weight_quantize_algo needs lora: true"),
        ({"pissa": "true"}, "pissa takes its start out of float weights"),
        ({"qlora_weight_blocksize": 63}, "qlora_weight_blocksize: 63; an even number"),
        ({"loftq": "true", "weight_quantize_algo": ""}, "loftq needs weight_quantize_algo"),
        ({"loftq": "true", "pipeline_parallel_degree": 2}, "loftq needs the whole model on each rank"),
        ({"loftq": "true", "tensor_parallel_degree": 2}, "loftq needs the whole model on each rank"),
        ({"load_in_4bit": "true", "weight_quantize_algo": "nf4"}, "load_in_4bit.*give weight_quantize_algo"),
    ],
)
def test_keys_that_cannot_be(tmp_path, keys, reason):
    with pytest.raises(UserError, match=reason):
        wanted = dict(model_name_or_path=DEMO, dataset_name_or_path=DEMO, lora="true", weight_quantize_algo="nf4")
        arguments(finetune, tmp_path, **wanted | keys).check()


@pytest.mark.parametrize("file", ["llama/qlora_argument.json", "llama/wint8_lora_argument.json"])
def test_files_of_paddlenlp_run_with_other_paths_and_lengths(tmp_path, file):
    path = SHARED / "upstream" / "configs" / file
    if not path.is_file():
        pytest.skip("needs PaddleNLP's files")
    records = data(tmp_path, {"src": "question", "tgt": "answer"})
    (records / "dev.json").write_text(json.dumps({"src": "another", "tgt": "one"}) + "\n")
    source = tokenizer_into(tiny_models.write(tmp_path / "base", "llama", vocab_size=3072))
    changes = dict(model_name_or_path=source, dataset_name_or_path=records, output_dir=tmp_path / "out")
    changes |= dict(src_length=16, max_length=32, num_train_epochs=1, device="cpu")
    finetune.main(parse_args(finetune.Args, [str(path), *(f"--{key}={value}" for key, value in changes.items())]))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
