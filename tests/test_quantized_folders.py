"""Folders that other tools quantized open as floats: tensors against those tools' own reading, models, refusals.

python -m pytest tests/test_quantized_folders.py      # CPU, some seconds
python -m pytest tests/test_quantized_folders.py --gptq-python PYTHON --vllm-python PYTHON    # and clients open them
"""

import json
import re
import struct

import numpy as np
import paddle
import pytest
import tiny_models
from conftest import ROOT
from test_export import DEMO, quantized, run, tokenizer_into
from test_quantize import keys_of, world  # noqa: F401, world is a fixture
from test_quantize import run as quantize_run

import adapters
import export
import formats.weights
import model as M
from formats.dequantize import METHODS, float_tensors, unpack
from formats.files import UserError
from formats.quantization_config import all_bits, bits_of, leave_out, runs_as_integers
from formats.quantized_export import float8_weight, to_float8
from formats.tensor_files import (
    StoredTensor,
    float8_values,
    from_bfloat16,
    read_safetensors,
    safetensors_header,
    to_bfloat16,
    write_safetensors,
)
from modules import low_bit
from modules.layers import Float8Weight, QuantLinear
from serving.engine import Engine, Request
from serving.fused import FusedRunner, why_not_fused
from serving.runners import PagedRunner
from serving.sampling import SamplingParams

GOLDEN = dict(np.load(ROOT / "tests" / "golden" / "quantized_folders.npz"))


def scheme(format, bits, **weights):
    groups = {"group_0": {"weights": {"num_bits": bits, **weights}}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}


CASES = {  # name of the golden: quantization_config
    "ct_w4_group": scheme("pack-quantized", 4),
    "ct_w4_zero": scheme("pack-quantized", 4),
    "ct_w8_pack": scheme("pack-quantized", 8),
    "ct_int8": scheme("int-quantized", 8),
    "ct_fp8": scheme("float-quantized", 8),
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "bnb_nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bnb_fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bnb_int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8_block": {"quant_method": "fp8", "weight_block_size": [32, 64], "fmt": "e4m3"},
}


def tensors_of(case):
    arrays = {name.partition("|")[2]: array for name, array in GOLDEN.items() if name.startswith(f"{case}|")}
    if case in ("ct_fp8", "fp8_block"):
        arrays["weight"] = float8_values(4)[arrays["weight"]]
    return arrays.pop("expected"), arrays


def stored(arrays):
    return {name: StoredTensor(lambda a=array: a, list(array.shape)) for name, array in arrays.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_is_read_as_its_own_tool_reads_it(case):
    expected, arrays = tensors_of(case)
    found = float_tensors(stored({f"m.{name}": array for name, array in arrays.items()}), CASES[case], ROOT)
    assert list(found) == ["m.weight"] and list(found["m.weight"].shape) == list(expected.shape)
    tolerance = 2e-3 if case == "bnb_int8" else 1e-6  # bitsandbytes gives int8's weight in float16
    np.testing.assert_allclose(found["m.weight"].read(), expected, rtol=tolerance, atol=tolerance * abs(expected).max())


def test_every_float8():
    expected, _ = tensors_of("fp8_values")
    np.testing.assert_array_equal(float8_values(4), expected)
    assert float8_values(5)[0x3C] == 1 and float8_values(5)[0x7B] == 57344


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_any_width_are_one_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (64, 5)).astype(np.uint8)
    stream = np.unpackbits(codes[..., None], axis=2, bitorder="little")[:, :, :bits]  # (64, 5, bits)
    stream = stream.transpose(1, 0, 2).reshape(5, -1, 32)
    words = np.packbits(stream, axis=2, bitorder="little").view(np.int32)[:, :, 0].T
    np.testing.assert_array_equal(unpack(np.ascontiguousarray(words), bits), codes)


# ======================================================================================================== models


def write_with_float8(path, tensors, names):
    """A safetensors file in which the uint8 tensors of these names are called F8_E4M3."""
    write_safetensors(path, tensors)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for name in names:
        header[name]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def quantized_linear(method, weight):
    """A linear's tensors in a method's layout, and the weight that they stand for. Plain rounding; layouts as in
    the goldens."""
    n_out, n_in = weight.shape
    if method == "bitsandbytes":
        low = low_bit.LowBit("nf4")
        parts = low_bit.round_weight(weight, low)
        state = {"quant_type": "nf4", "blocksize": 64, "shape": [n_out, n_in], "dtype": "float32"}
        tensors = {"weight": parts["codes"][:, None], "weight.absmax": parts["absmax"]}
        tensors["weight.quant_map"] = low_bit.TABLES["nf4"]
        tensors["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        layer = low_bit.LowBitLinear(M.Linear(n_in, n_out, False), low)
        layer.set_weight(weight)
        return tensors, layer.dequantized().numpy().T
    if method == "fp8":
        scale = np.repeat(np.repeat([[0.5, 2.0]], -(-n_out // 16), 0), 1, 1)[:, : -(-n_in // 32)].astype(np.float32)
        spread = np.repeat(np.repeat(scale, 16, 0), 32, 1)[:n_out, :n_in]
        table = float8_values(4)[:127]
        codes = np.abs(np.abs(weight / spread)[..., None] - table).argmin(-1).astype(np.uint8)
        codes |= np.where(weight < 0, 128, 0).astype(np.uint8)
        return {"weight": codes, "weight_scale_inv": scale}, float8_values(4)[codes] * spread
    scale = np.abs(weight).max(1, keepdims=True) / 127
    codes = np.rint(weight / scale).astype(np.int8)
    return {"weight": codes, "weight_scale": scale}, codes * scale


QUANTIZATION = {
    "bitsandbytes": CASES["bnb_nf4"],
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 32]},
    "compressed-tensors": scheme("int-quantized", 8),
}


@pytest.mark.parametrize(
    "method, name", [("bitsandbytes", "llama"), ("fp8", "deepseek_v3"), ("compressed-tensors", "gpt2")]
)
def test_a_model_is_that_of_the_dequantized_weights(tmp_path, method, name):
    plain = tiny_models.build(name)
    stored_in_out = name == "gpt2"
    folder = tmp_path / "quantized"
    formats.weights.save_pretrained(plain, folder)
    arrays, named = read_safetensors(folder / "model.safetensors"), {}
    for path, (_, _, layer) in M.block_linears(plain).items():
        weight = arrays.pop(f"{path}.weight")
        parts, value = quantized_linear(method, weight)
        arrays |= {f"{path}.{kind}": array for kind, array in parts.items()}
        layer.weight.set_value(value if stored_in_out else np.ascontiguousarray(value.T))
        named[f"{path}.weight"] = method == "fp8"
    write_with_float8(folder / "model.safetensors", arrays, [n for n, is_float8 in named.items() if is_float8])
    source = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(source | {"quantization_config": QUANTIZATION[method]}))
    ids = paddle.to_tensor(np.random.default_rng(0).integers(3, 60, (2, 11)))
    opened = adapters.from_pretrained(folder)
    with paddle.no_grad():
        np.testing.assert_allclose(opened(ids).numpy(), plain.eval()(ids).numpy(), rtol=1e-5, atol=1e-4)
    formats.weights.save_pretrained(opened, tmp_path / "saved")  # what is saved of it is a float model
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    np.testing.assert_array_equal(adapters.from_pretrained(tmp_path / "saved")(ids).numpy(), opened(ids).numpy())


# ===================================================================================================== and out again


@pytest.mark.sweep(keep=3)
@pytest.mark.parametrize(
    "scheme_name, format",
    [("w4", "compressed-tensors"), ("w4", "awq"), ("w8", "compressed-tensors"), ("a8w8", "compressed-tensors")],
)
def test_integers_in_another_layout_are_the_same_weights(tmp_path, scheme_name, format):
    source = quantized(scheme_name, tmp_path / "source")
    integers = adapters.from_pretrained(source)
    out = run(tmp_path / "out", model_name_or_path=source, format=format)
    opened = M.block_linears(adapters.from_pretrained(out))
    for path, (_, _, layer) in M.block_linears(integers).items():
        expected = layer.dequantized().numpy()
        np.testing.assert_allclose(opened[path][2].weight.numpy(), expected, rtol=1e-5, atol=1e-7, err_msg=path)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == format
    if format == "awq":  # served, it runs on the same integers
        kept = adapters.from_pretrained(out, integers=True)
        for path, (_, _, layer) in M.block_linears(kept).items():
            expected = M.block_linears(integers)[path][2]
            np.testing.assert_array_equal(layer.qweight.numpy(), expected.qweight.numpy(), err_msg=path)
            np.testing.assert_array_equal(layer.dequantized().numpy(), expected.dequantized().numpy(), err_msg=path)


def test_float8_is_rounded_to_the_nearest():
    table = float8_values(4)
    codes = np.array([code for code in range(256) if code & 127 < 127], np.uint8)
    np.testing.assert_array_equal(to_float8(table[codes]), codes)
    middles = (table[:126] + table[1:127]) / 2
    assert not (to_float8(middles) % 2).any()  # to the even code
    values = np.random.default_rng(0).uniform(-448, 448, 500).astype(np.float32)
    nearest = np.abs(values[:, None] - table[codes]).min(1)
    np.testing.assert_array_equal(np.abs(values - table[to_float8(values)]), nearest)


def test_fp8_out_and_in_again(tmp_path):
    source = tokenizer_into(tiny_models.write(tmp_path / "a", "qwen2", vocab_size=3072))
    out = run(tmp_path / "out", model_name_or_path=source, format="fp8", save_dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized" and config["config_groups"]["group_0"]["input_activations"]["dynamic"]
    header = safetensors_header(out / "model.safetensors")
    assert header["model.layers.0.mlp.up_proj.weight"].dtype == "F8_E4M3"
    opened = M.block_linears(adapters.from_pretrained(out))
    for path, (_, _, layer) in M.block_linears(adapters.from_pretrained(source)).items():
        weight = from_bfloat16(to_bfloat16(layer.weight.numpy()))
        largest = np.abs(weight).max(0)
        error = np.abs(opened[path][2].weight.numpy() - weight)
        assert (error <= np.maximum(np.abs(weight) / 16, largest / 448 / 1024) * 1.001).all(), path
    with pytest.raises(UserError, match="fp8 is of a float model"):
        run(tmp_path / "b", model_name_or_path=quantized("w8", tmp_path / "w8"), format="fp8")


# ============================================================================================ quantize.py's fp8

E4M3 = np.sort(float8_values(4)[np.r_[:127, 128:255]])  # all values, rising


def nearest_float8(values):
    """By looking at all of them; a midpoint to the one with an even code, which is the one with more zeros."""
    right = np.searchsorted(E4M3, values).clip(1, len(E4M3) - 1)
    low, high = E4M3[right - 1], E4M3[right]
    even = np.where(to_float8(high) % 2 == 0, high, low)
    return np.where(values - low == high - values, even, np.where(values - low < high - values, low, high))


FP8 = {  # name: (keys, whether inputs are rounded, the scale of a compressed-tensors input)
    "fp8": ({"quant_type": "weight_only_fp8", "dataset_name_or_path": ""}, False, None),
    "one_scale": ({"quant_type": "fp8", "weight_quant_method": "abs_max"}, False, None),
    "tensor": ({"quant_type": "a8w8_fp8", "act_quant_method": "abs_max"}, True, "tensor"),
    "token": ({"quant_type": "a8w8_fp8", "activation": "per_token"}, True, "token"),
}


@pytest.mark.sweep(keep=4)
@pytest.mark.parametrize("name", FP8)
def test_fp8_of_quantize_py(name, world, tmp_path):  # noqa: F811
    """The folder holds e4m3, so does the model in memory; products are those of the dequantized weights, and of inputs
    rounded by looking at all values; other layouts hold the same."""
    keys, rounds, strategy = FP8[name]
    out, plain = tmp_path / "out", M.block_linears(adapters.from_pretrained(world / "base"))
    quantize_run(keys_of(world, out, do_ptq=True, do_eval=name == "tensor", skip_list_names="1.mlp.down_proj", **keys))
    report = json.loads((out / "quant_report.json").read_text())
    assert len(report["linears"]) == 13 and 8 < report["bits_per_weight"] < 10
    assert all(0.005 < row["error"] < (0.06 if rounds else 0.04) for row in report["linears"])
    assert (report["dev_after"] is not None) == (name == "tensor")
    model, rng = adapters.from_pretrained(out), np.random.default_rng(0)
    for path, (_, _, layer) in M.block_linears(model).items():
        weight, x = plain[path][2].weight.numpy(), rng.standard_normal((7, layer.n_in)).astype(np.float32)
        if path == "model.layers.1.mlp.down_proj":
            np.testing.assert_array_equal(layer.weight.numpy(), weight)
            continue
        assert layer.qweight.dtype == paddle.uint8 and layer.qweight.size == weight.size
        assert sum(b.numpy().nbytes for b in layer.buffers()) < 1.2 * weight.size
        largest = np.abs(weight).max(0) if name != "one_scale" else np.full(layer.n_out, np.abs(weight).max())
        scales = (largest / 448).astype(np.float32)
        expected = nearest_float8(weight / scales) * scales
        np.testing.assert_allclose(layer.dequantized().numpy(), expected, rtol=1e-6, err_msg=path)
        rounded = x
        if rounds:
            x[0] *= 100  # what static scales clip
            scale = np.abs(x).max(1, keepdims=True) / 448 if strategy == "token" else layer.input_scale.numpy()
            rounded = nearest_float8((x / scale).clip(-448, 448)) * scale
        y = layer.product(paddle.to_tensor(x)).numpy()
        np.testing.assert_allclose(y, rounded @ expected, rtol=1e-5, atol=1e-5 * np.abs(y).max(), err_msg=path)
    ids = paddle.to_tensor(rng.integers(3, 3000, (2, 11)))
    logits = model.eval()(ids).numpy()
    for format in ("hf", "compressed-tensors", "static"):
        other = run(tmp_path / format, model_name_or_path=out, format=format)
        if format == "hf":
            np.testing.assert_array_equal(adapters.from_pretrained(other).eval()(ids).numpy(), logits)
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert config["format"] == "float-quantized" and (inputs and inputs["strategy"]) == strategy
    assert "model.layers.1.mlp.down_proj" in config["ignore"]
    floats = M.block_linears(adapters.from_pretrained(tmp_path / "compressed-tensors"))
    for path, (_, _, layer) in M.block_linears(model).items():
        np.testing.assert_allclose(floats[path][2].weight.numpy(), layer.full_weight(), rtol=1e-6, err_msg=path)


def test_fp8_is_served_in_one_call_and_trains_lora(world, tmp_path):  # noqa: F811
    out, request = tmp_path / "out", Request(list(range(5, 30)), SamplingParams(max_tokens=6, temperature=0.0))
    quantize_run(keys_of(world, out, do_ptq=True, quant_type="fp8"))
    floats = run(tmp_path / "floats", model_name_or_path=out, dequantize=True)
    replies = [
        Engine(runner(adapters.from_pretrained(folder), 16, 16), num_blocks=16, block_size=16).generate([request])
        for runner, folder in ((PagedRunner, out), (FusedRunner, out), (FusedRunner, floats))
    ]
    assert replies[0][0][0].token_ids == replies[1][0][0].token_ids == replies[2][0][0].token_ids
    model = adapters.apply_lora(adapters.from_pretrained(out), rank=2)
    model(paddle.to_tensor([[5, 6, 7]])).sum().backward()
    assert all(lora.lora_B.grad.abs().sum() > 0 for lora in adapters.lora_layers(model).values())
    quantize_run(keys_of(world, tmp_path / "rounded", do_ptq=True, quant_type="a8w8_fp8"))
    model = adapters.from_pretrained(tmp_path / "rounded")
    assert why_not_fused(model, None, "float32") == "it does not round the inputs of products to e4m3"
    with pytest.raises(UserError, match="a8w8_fp8: rounded activations have no gradient"):
        adapters.trainable_weights(adapters.apply_lora(model, rank=2))


def test_layouts_that_a_model_does_not_fit(tmp_path):
    eight = quantized("w8", tmp_path / "w8")
    for source, format, reason in (
        (eight, "awq", "awq holds 4 bits without act order"),
        (DEMO, "compressed-tensors", "compressed-tensors is of a quantized model"),
    ):
        with pytest.raises(UserError, match=reason):
            run(tmp_path / "out", model_name_or_path=source, format=format)
        assert not (tmp_path / "out").exists()


# ======================================================================================================= clients

W4 = {"do_ptq": True, "quant_type": "wint4", "group_size": 64, "dataset_name_or_path": ""}
A8W8 = {"do_ptq": True, "quant_type": "a8w8", "ptq_step": 1}
OPENED = {  # name: (quantize.py's keys, format, clients)
    "gptq": (W4, "hf", ("gptq", "vllm")),
    "gptq_skip": ({**W4, "skip_list_names": "down_proj"}, "hf", ("gptq", "vllm")),
    "gptq_skip_one": ({**W4, "skip_list_names": "3.mlp.down_proj"}, "hf", ("gptq", "vllm")),
    "awq": ({**W4, "sym": False}, "awq", ("gptq", "vllm")),
    "ct_mixed": ({"do_ptq": True, "bits": 6.0, "group_size": 64, "gptq_step": 1}, "compressed-tensors", ("vllm/hf",)),
    "ct_tensor": (A8W8, "compressed-tensors", ("vllm", "vllm/hf")),
    "ct_token": ({**A8W8, "activation": "per_token"}, "compressed-tensors", ("vllm", "vllm/hf")),
    "ct_fp8": ({"do_ptq": True, "quant_type": "fp8", "dataset_name_or_path": ""}, "compressed-tensors", ("vllm/hf",)),
    "ct_fp8_tensor": ({**A8W8, "quant_type": "a8w8_fp8"}, "compressed-tensors", ("vllm/hf",)),
    "ct_fp8_token": (
        {**A8W8, "quant_type": "a8w8_fp8", "activation": "per_token"},
        "compressed-tensors",
        ("vllm", "vllm/hf"),
    ),
}


@pytest.mark.parametrize("name, client", [(name, client) for name, row in OPENED.items() for client in row[2]])
def test_clients_compute_the_same(name, client, world, tmp_path, request, monkeypatch, capsys):  # noqa: F811
    """transformers (with gptqmodel, or in vllm's Python) and vllm open what quantize.py made."""
    python = request.config.getoption(f"--{client.partition('/')[0]}-python")
    if python is None:
        pytest.skip(f"needs --{client.partition('/')[0]}-python: a Python with it")
    monkeypatch.setattr(export, "QUESTIONS", export.QUESTIONS[:3])
    keys, format, _ = OPENED[name]
    keys = keys_of(world, tmp_path / "out", src_length=200, max_length=400) | {"model_name_or_path": str(DEMO), **keys}
    quantize_run(keys)
    who = "vllm" if client == "vllm" else "transformers"
    keys = {"format": format, "verify_with": python, "verify_client": who}
    run(tmp_path / "export", model_name_or_path=tmp_path / "out", **keys)
    assert f"{who}: same ids of" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [3, 40])
def test_e4m3_weights_are_made_again_for_the_gradient(tokens, monkeypatch):
    """They are not kept from the forward pass on."""
    layer, generator, made = QuantLinear(24, 56, "fp8"), np.random.default_rng(0), []
    codes, scales = float8_weight(generator.standard_normal((24, 56)).astype(np.float32), False)
    layer.qweight.set_value(codes), layer.scales.set_value(scales)
    computed = Float8Weight.computed
    monkeypatch.setattr(Float8Weight, "computed", lambda *a: made.append(a) or computed(*a))
    x = paddle.to_tensor(generator.standard_normal((tokens, 24)).astype(np.float32), stop_gradient=False)
    weight, dy = layer.dequantized(), generator.standard_normal((tokens, 56)).astype(np.float32)
    made.clear()
    y = layer.product(x)
    assert len(made) == 1
    y.backward(paddle.to_tensor(dy))
    assert len(made) == 2
    np.testing.assert_allclose(y.numpy(), x.numpy() @ weight.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), dy @ weight.numpy().T, rtol=1e-5, atol=1e-5)


def test_skipped_linears_are_named_in_the_words_of_every_reader():
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    keys = leave_out(names[1::2], names[::2])
    assert keys["modules_in_block_to_quantize"] == [["self_attn.q_proj"]]  # the same in every block
    one = leave_out(names[3:], names[:3])
    assert one["modules_in_block_to_quantize"] == [names[:3]]
    config = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", **one}
    assert [re.match(pattern[2:], name) is not None for pattern in one["dynamic"] for name in names] == [0, 0, 0, 1]
    assert runs_as_integers(config | {"modules_to_not_convert": names[3:]}) and not runs_as_integers(config)
    assert bits_of(config, names[0]) == 4 and all_bits(config) == [4]
    attention = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    fused = "model.layers.0.self_attn.qkv_proj"  # as vLLM asks for it
    of_all, of_two = (next(iter(leave_out(skipped, names)["dynamic"]))[2:] for skipped in (attention, attention[1:]))
    assert re.match(of_all, fused) and not re.match(of_two, fused)
    foreign = {"modules_to_not_convert": ["lm_head"], "dynamic": {"-:.*self_attn.*": {}}}
    assert not runs_as_integers({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", **foreign})


# ====================================================================================================== refusals


@pytest.mark.parametrize(
    "quantization, reason",
    [
        (
            {"quant_method": "hqq"},
            "quant_method 'hqq' cannot be read; readable are gptq, a8w8, weight_only_fp8, a8w8_fp8, awq",
        ),
        ({"quant_method": "gptq", "bits": 5}, "bits = 5; readable are 4, 2, 3, 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version = 'gemv'"),
        ({"quant_method": "fp8"}, "says fp8, but no tensor is quantized"),
        (scheme("nvfp4-pack-quantized", 4), "format 'nvfp4-pack-quantized'; readable are pack-quantized"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, quantization, reason):
    folder = tiny_models.write(tmp_path / "a", "llama")
    source = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(source | {"quantization_config": quantization}))
    with pytest.raises(UserError, match=reason):
        adapters.from_pretrained(folder)


def test_scales_of_another_shape(tmp_path):
    arrays = {"m.weight": np.zeros((48, 96), np.float32), "m.weight_scale_inv": np.ones((3, 2), np.float32)}
    with pytest.raises(UserError, match=r"m.weight_scale_inv has shape \[3, 2\]; \[2, 2\] is right"):
        float_tensors(stored(arrays), CASES["fp8_block"], ROOT)


def test_methods_are_the_ones_that_families_knows():
    from formats.quantization_config import DEQUANTIZED

    assert set(METHODS) == set(DEQUANTIZED)
