"""export.py: Hugging Face folders and static programs, compared with the model they were made of; the runner of
serve.py.

python -m pytest tests/test_export.py                                    # CPU, half a minute
python -m pytest tests/test_export.py --hf-python /path/to/bin/python    # and transformers opens the export
"""

import dataclasses
import json
import shutil
import struct
import zipfile

import kernels

import numpy as np
import paddle
import pytest
import test_quant_linear
import tiny_models
from conftest import ROOT
from golden_weights import CASES, draw, shapes

import adapters
import export
import families
import formats.tensor_files
import formats.weights
import model as M
from arguments import parse_args
from data import SFTDataset
from formats.clients import Reply, compare
from formats.files import UserError
from formats.tokenizer import load_tokenizer
from serving.runners import ScheduledTokens, StaticRunner, TokenSequence

pytestmark = pytest.mark.sweep(keep=2)

DEMO = ROOT / "demo" / "llama"
GPTQ = {"quant_method": "gptq", "desc_act": False, "checkpoint_format": "gptq"}
SCHEMES = {  # name: quantization_config
    "w4": {**GPTQ, "bits": 4, "group_size": 64, "sym": False},
    "w8": {**GPTQ, "bits": 8, "group_size": -1, "sym": True},
    "a8w8": {"quant_method": "a8w8", "bits": 8, "activation": "per_token"},
}


def run(output_dir, **keys):
    """export.py with these keys; returns the folder."""
    argv = [f"--{key}={value}" for key, value in {"output_dir": output_dir, **keys}.items()]
    export.main(parse_args(export.Args, argv))
    return output_dir


def logits(model, seed=1):
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 20))
    return model.eval()(paddle.to_tensor(ids)).numpy()


def tokenizer_into(folder):
    load_tokenizer(DEMO).save(folder)
    return folder


def small(tmp_path, case="gqa"):
    """A golden model with the demo's tokenizer, which export.py wants, and so with its vocabulary."""
    folder, config = tmp_path / case, {**CASES[case][0], "vocab_size": 3072}
    folder.mkdir()
    formats.tensor_files.write_safetensors(folder / "model.safetensors", draw(shapes(config)))
    (folder / "config.json").write_text(json.dumps(config))
    return tokenizer_into(folder)


def write_bin(path, tensors):
    """pytorch_model.bin as torch writes it, in opcodes: there is no torch here."""

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    items = b""
    for name, array in tensors.items():
        where, strides = text(name), [stride // 4 for stride in array.strides]
        storage = (
            b"("
            + text("storage")
            + b"ctorch\nFloatStorage\n"
            + where
            + text("cpu")
            + numbers([array.size])[1:-1]
            + b"tQ"
        )
        items += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J\0\0\0\0" + numbers(array.shape)
        items += numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtRs"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + items + b".")
        for name, array in tensors.items():
            file.writestr(f"archive/data/{name}", array.tobytes())


def quantized(scheme, folder, source=DEMO):
    """A model, every linear rounded to nearest; as quantize.py would write it, but by the plainest means."""
    plain = adapters.from_pretrained(source)
    model = M.build(dataclasses.replace(plain.config, quantization=SCHEMES[scheme]))
    weights = {w.name: w.parameter.numpy() for w in formats.weights.named_weights(plain)}
    for w in formats.weights.named_weights(model):
        if w.name in weights:
            M.set_parameter(w.parameter, weights[w.name])
    for path, (_, _, layer) in M.block_linears(model).items():
        round_into(layer, weights[path + ".weight"])
    formats.weights.save_pretrained(model, folder)
    return tokenizer_into(folder)


def round_into(layer, weight):
    """weight (in, out) -> the integers of a QuantLinear."""
    if layer.scheme == "a8w8":
        scale = np.abs(weight).max(0) / 127
        M.set_parameter(layer.qweight, np.round(weight / scale).astype(np.int8))
        M.set_parameter(layer.scales, scale)
        return
    bits, (n_in, n_out) = int(layer.scheme[1:]), weight.shape
    grouped = weight.reshape(layer.scales.shape[0], -1, n_out)  # (groups, rows, out)
    half = 2 ** (bits - 1)
    scale = (np.abs(grouped).max(1) / (half - 0.5)).astype(np.float16).astype(np.float32)
    codes = np.clip(np.round(grouped / scale[:, None]) + half, 0, 2**bits - 1).reshape(n_in, n_out).astype(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = (codes.reshape(-1, len(shifts), n_out) << shifts[:, None]).sum(1, dtype=np.uint32)
    zeros = np.full((len(scale), n_out // len(shifts)), ((half - 1) << shifts).sum(dtype=np.uint32))
    for tensor, array in ((layer.qweight, words), (layer.qzeros, zeros)):
        M.set_parameter(tensor, array.view(np.int32))
    M.set_parameter(layer.scales, scale)


# ============================================================================================= format hf


def test_hf_from_shards_and_back(tmp_path, capsys):
    folder = run(tmp_path / "out", model_name_or_path=DEMO, max_shard_size="2MB", save_dtype="float32")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 6 and all((folder / file).stat().st_size < 2.4e6 for file in files)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    np.testing.assert_array_equal(logits(adapters.from_pretrained(folder)), logits(adapters.from_pretrained(DEMO)))
    assert load_tokenizer(folder).encode("hello") == load_tokenizer(DEMO).encode("hello")
    last = capsys.readouterr().out.splitlines()[-2]
    total = sum(path.stat().st_size for path in folder.iterdir() if path.name not in ("run_args.json", ".run_lock"))
    assert f"format hf, {len(files) + 6} files, {total:,} bytes; largest difference of logits 0" in last
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left aside


@pytest.mark.parametrize("dtype, width", [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_hf_dtypes(tmp_path, capsys, dtype, width):
    source = small(tmp_path)
    folder = run(tmp_path / "out", model_name_or_path=source, dtype=dtype)  # upstream's name of the key
    header = formats.tensor_files.safetensors_header(folder / "model.safetensors").values()
    assert {kind for kind, *_ in header} == {{"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]}
    exact, found = logits(adapters.from_pretrained(source)), logits(adapters.from_pretrained(folder))
    off = np.abs(found - exact).max()
    assert (off == 0) == (width == 4) and off < 0.02 * np.abs(exact).max()
    assert ("from rounding" in capsys.readouterr().out) == (width == 2)


def test_hf_from_bin_with_own_head(tmp_path):
    source = small(tmp_path)
    before = logits(adapters.from_pretrained(source))
    tensors = formats.tensor_files.read_safetensors(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    write_bin(source / "pytorch_model.bin", tensors)
    folder = run(tmp_path / "out", model_name_or_path=source, save_dtype="float32")
    assert not list(folder.glob("*.bin"))
    np.testing.assert_array_equal(logits(adapters.from_pretrained(folder)), before)


def lora_folder(tmp_path, base=DEMO, name="lora"):
    model = adapters.apply_lora(adapters.from_pretrained(base), rank=4)
    for i, layer in enumerate(adapters.lora_layers(model).values()):
        generator = np.random.default_rng(i)
        M.set_parameter(layer.lora_B, generator.standard_normal(layer.lora_B.shape).astype(np.float32) * 0.05)
    adapters.save_adapter(model, tmp_path / name, base)
    return tmp_path / name, logits(model)


def test_hf_merges_lora_given_either_way(tmp_path):
    adapter, expected = lora_folder(tmp_path)
    assert np.abs(expected - logits(adapters.from_pretrained(DEMO))).max() > 0.1
    for name, keys in (
        ("a", {"model_name_or_path": adapter}),
        ("b", {"model_name_or_path": DEMO, "lora_path": adapter}),
    ):
        folder = run(tmp_path / name, save_dtype="float32", **keys)
        assert not (folder / "adapter_config.json").exists()
        np.testing.assert_allclose(logits(adapters.from_pretrained(folder)), expected, atol=1e-4)


def test_hf_of_an_adapter_on_an_adapter(tmp_path):
    first, _ = lora_folder(tmp_path)
    second, expected = lora_folder(tmp_path, first, "second")  # as dpo.py after finetune.py: neither has a config.json
    folder = run(tmp_path / "out", model_name_or_path=second, save_dtype="float32")
    np.testing.assert_allclose(logits(adapters.from_pretrained(folder)), expected, atol=1e-4)
    assert load_tokenizer(folder).vocab_size == 3072  # of the model under both


def test_hf_keeps_every_file_of_a_tokenizer(tmp_path):
    source = small(tmp_path)
    (source / "tokenizer.model").unlink()
    parts = {
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
    }
    tokenizer = {
        **parts,
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }
    for name, text in (
        ("tokenizer.json", json.dumps(tokenizer)),
        ("merges.txt", "a b\n"),
        ("generation_config.json", '{\n  "unknown": 1,\n  "eos_token_id": 2\n}\n'),
    ):
        (source / name).write_text(text)
    folder = run(tmp_path / "out", model_name_or_path=source)
    for name in ("tokenizer.json", "merges.txt", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.model, tokenizer.json"):
        run(tmp_path / "static", model_name_or_path=source, format="static")


def test_hf_keeps_integers_or_makes_floats_of_them(tmp_path):
    source = quantized("w4", tmp_path / "w4")
    kept = run(tmp_path / "kept", model_name_or_path=source, save_dtype="float16")
    theirs, ours = (formats.tensor_files.read_safetensors(path / "model.safetensors") for path in (source, kept))
    packed = [name for name in theirs if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert len(packed) == 4 * 42 and theirs.keys() == ours.keys()
    for name in packed:
        np.testing.assert_array_equal(theirs[name], ours[name])
    assert families.ModelConfig.from_json(kept).quantization == SCHEMES["w4"]
    floats = run(tmp_path / "floats", model_name_or_path=source, dequantize="true", save_dtype="float32")
    assert families.ModelConfig.from_json(floats).quantization is None
    np.testing.assert_allclose(
        logits(adapters.from_pretrained(floats)), logits(adapters.from_pretrained(source)), atol=1e-4
    )


def reply_of(ours, tokens, sparse=False, shift=0.0):
    """What a client would say that has these logits (T, V) and takes these tokens."""
    theirs = ours + np.float32(shift)
    if sparse:  # log-probabilities of the four largest
        theirs = theirs - np.log(np.exp(theirs).sum(1, keepdims=True))
        theirs[theirs < np.sort(theirs, 1)[:, -4, None]] = np.nan
    return Reply("client", [[1]], [tokens], [theirs])


@pytest.mark.parametrize("sparse", [False, True])
def test_a_client_is_compared_token_by_token(capsys, sparse):
    ours = np.random.default_rng(0).standard_normal((3, 9)).astype(np.float32)
    best = ours.argmax(1).tolist()
    line = compare(reply_of(ours, best, sparse), ["a"], [[1]], lambda *_: ours, 0.01)
    assert "same tokens after 1 of 1 prompts (at 3 of 3 steps)" in line

    near = ours.copy()
    second = int(np.argsort(near[1])[-2])
    near[1, second] = near[1].max() - 0.01  # here; there it is 0.02 above
    there = near.copy()
    there[1, second] += 0.03
    tokens = [best[0], second, best[2]]
    line = compare(reply_of(there, tokens, sparse), ["a"], [[1]], lambda *_: near, 0.05)
    assert "after 0 of 1 prompts (at 2 of 3 steps)" in line
    assert f"the first 1 tokens are the same; then client takes {second}, not {best[1]}" in capsys.readouterr().out
    with pytest.raises(UserError, match="token 1 of client has a logit"):
        compare(reply_of(near, [best[0], int(near[1].argmin()), best[2]], sparse), ["a"], [[1]], lambda *_: near, 0.05)
    with pytest.raises(UserError, match="logits of client differ by"):
        compare(reply_of(2 * ours, best, sparse), ["a"], [[1]], lambda *_: ours, 0.05)


@pytest.mark.parametrize("sparse", [False, True])
def test_rounding_of_activations_is_compared_by_its_size(sparse):
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((40, 300)).astype(np.float32)
    errors = 0.1 * rng.standard_normal((2, 40, 300)).astype(np.float32)
    ours = plain + errors[0]

    def check(theirs):
        best = theirs.argmax(1).tolist()
        return compare(reply_of(theirs, best, sparse), ["a"], [[1]], lambda *_: ours, 0.01, lambda *_: plain)

    line = check(plain + errors[1])  # other errors of the same size
    there, here = (float(part.partition("%")[0]) for part in line.partition("activations change ")[2].split(" there, "))
    assert abs(there - here) < 2 and (sparse or abs(here - 10) < 0.5)
    for theirs in (plain, plain + 0.5 * errors[1], plain + 2 * errors[1]):
        with pytest.raises(UserError, match="client rounds activations otherwise; rounded activations change"):
            check(theirs)
    with pytest.raises(UserError, match="differ by|has a logit"):
        check(plain - 1.2 * errors[0])  # of the same size, but against ours


def test_verify_client_is_of_the_format(tmp_path):
    with pytest.raises(UserError, match="verify_client: 'vllm'; of format gguf: llama_cpp"):
        run(tmp_path / "out", model_name_or_path=DEMO, format="gguf", verify_with="python", verify_client="vllm")


@pytest.mark.torch
def test_transformers_opens_the_hf_export(tmp_path, hf_python):
    adapter, _ = lora_folder(tmp_path)
    folder = run(tmp_path / "out", model_name_or_path=adapter, save_dtype="bfloat16", max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    ids = np.random.default_rng(3).integers(3, 3072, (2, 20))
    np.save(tmp_path / "ids.npy", ids)
    theirs = hf_python(
        """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
assert next(model.parameters()).dtype == torch.bfloat16
with torch.no_grad():
    arrays = {"logits": model.float()(torch.tensor(np.load(sys.argv[3]))).logits.numpy()}
""",
        folder,
        tmp_path / "ids.npy",
    )
    ours = adapters.from_pretrained(folder).eval()(paddle.to_tensor(ids)).numpy()
    np.testing.assert_allclose(theirs["logits"], ours, atol=2e-4)


# ========================================================================================= format static


@pytest.fixture(scope="module")
def prompts():
    dataset = SFTDataset(ROOT / "demo" / "sft", load_tokenizer(DEMO), 128, 512, "dev", progress=False)
    return [dataset.prompt_ids(i) for i in range(50)]


def text_of(runner, prompt):
    """A sequence as the engine has it: virtual tokens of a prefix, the prompt, the reply."""
    P = runner.num_virtual_tokens
    return TokenSequence([-1] * P + list(prompt), P + len(prompt))


def greedy_static(runner, prompts, new, stop_ids, at_once=30):
    """New tokens of each prompt, greedily: at most `at_once` in the batch, the next joins when one has ended."""
    texts, running = [text_of(runner, prompt) for prompt in prompts], []
    waiting = list(texts)
    while waiting or running:
        chunks = [ScheduledTokens(text, len(text.tokens) - 1, 1) for text in running]
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            chunks.append(
                ScheduledTokens(
                    running[-1], runner.num_virtual_tokens, running[-1].num_prompt_tokens - runner.num_virtual_tokens
                )
            )
        for text, row in zip(list(running), runner.run(chunks)):
            text.tokens.append(int(row.argmax()))
            if text.tokens[-1] in stop_ids or len(text.tokens) == text.num_prompt_tokens + new:
                running.remove(text)
                runner.release(text)
    assert not runner.caches
    return [text.tokens[text.num_prompt_tokens :] for text in texts]


def greedy_dynamic(model, prompts, new, stop_ids):
    out = []
    for start in range(0, len(prompts), 50):
        batch = prompts[start : start + 50]
        T = max(map(len, batch))
        ids, mask = np.zeros((len(batch), T), np.int64), np.zeros((len(batch), T), np.int64)
        for row, prompt in enumerate(batch):
            ids[row, T - len(prompt) :], mask[row, T - len(prompt) :] = prompt, 1
        for row in M.generate(model, ids, new, stop_ids, mask)[:, T:]:
            ended = np.flatnonzero(np.isin(row, stop_ids))
            out.append(row[: ended[0] + 1 if len(ended) else None].tolist())
    return out


@pytest.mark.parametrize("scheme", ["float32", *SCHEMES])
@pytest.mark.sweep(keep=1)
def test_static_writes_the_same_tokens(tmp_path, prompts, scheme):
    source = DEMO if scheme == "float32" else quantized(scheme, tmp_path / "source")
    folder = run(tmp_path / "static", model_name_or_path=source, format="static")
    runner, model = StaticRunner(folder), adapters.from_pretrained(source)
    assert (runner.vocab_size, runner.max_positions, runner.num_virtual_tokens, runner.chunked_prefill) == (
        3072,
        1024,
        0,
        False,
    )
    new, stop_ids = 16 if scheme == "float32" else 8, runner.config["stop_ids"]
    with kernels.use("attention=reference"):  # another order of sums would move an a8w8 activation over a rounding step
        expected = greedy_dynamic(model, prompts, new, stop_ids)
    found = greedy_static(runner, prompts, new, stop_ids)
    assert found == expected and (new == 8 or any(len(tokens) < new for tokens in found))


CASES_OF_POSITIONS = ["gqa_linear", "gqa_yarn", "gqa_llama3", "gqa_dynamic", "bias_tied", "headdim", "mistral"]


@pytest.mark.parametrize("case", CASES_OF_POSITIONS)
def test_static_of_every_kind_of_positions(tmp_path, capsys, case):
    source = small(tmp_path, case)
    folder = run(tmp_path / "static", model_name_or_path=source, format="static")
    assert "largest difference of logits" in capsys.readouterr().out.splitlines()[-2]
    runner, model = StaticRunner(folder), adapters.from_pretrained(source)
    assert runner.max_positions == (24 if case == "gqa_dynamic" else 64)  # 8 positions and factor 3
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 3072, n).tolist() for n in (3, 14, 9)]
    found = greedy_static(runner, prompts, 8, [2])
    for prompt, reply in zip(prompts, found):  # each alone, as dynamic positions depend on the prompt's length
        assert [reply] == greedy_dynamic(model, [prompt], 8, [2])


# ------------------------------------------------------------------------------------------ every family


def of_family(tmp_path, name):
    """A folder of a tiny model with the demo's tokenizer, and so with its vocabulary."""
    key = "padded_vocab_size" if "padded_vocab_size" in tiny_models.CONFIGS[name] else "vocab_size"
    return tokenizer_into(tiny_models.write(tmp_path / name, name, **{key: 3072}))


def texts_of(lengths=(3, 14, 9), seed=0):
    """Prompts of random ids."""
    generator = np.random.default_rng(seed)
    return [generator.integers(70, 3072, n).tolist() for n in lengths]


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_family_in_both_formats(tmp_path, capsys, name):
    """A Hugging Face folder with the same tensors, and static programs that write the same tokens in any company."""
    source = of_family(tmp_path, name)
    folder = run(tmp_path / "hf", model_name_or_path=source)
    assert (
        formats.tensor_files.read_safetensors(folder / "model.safetensors").keys()
        == formats.tensor_files.read_safetensors(source / "model.safetensors").keys()
    )
    for key, tensor in formats.tensor_files.read_safetensors(source / "model.safetensors").items():
        np.testing.assert_array_equal(formats.tensor_files.read_safetensors(folder / "model.safetensors")[key], tensor)
    assert json.loads((folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    if name in tiny_models.TWO_POSITIONS:
        with pytest.raises(UserError, match="format: static is not supported for ChatGLM-6B"):
            run(tmp_path / "static", model_name_or_path=source, format="static")
        return
    folder = run(tmp_path / "static", model_name_or_path=source, format="static")
    assert "largest difference of logits" in capsys.readouterr().out.splitlines()[-2]
    runner, model = StaticRunner(folder), adapters.from_pretrained(source).eval()
    assert (
        runner.max_positions
        == model.config.max_model_len
        == (1 << 30 if name in tiny_models.ALIBI else 24 if name == "llama_dynamic" else 64)
    )
    texts = texts_of()
    found = greedy_static(runner, texts, 8, [])
    for text, reply in zip(texts, found):
        assert [reply] == greedy_dynamic(model, [text], 8, [])


def test_floats_of_shifted_integers_where_biases_have_a_place(tmp_path):
    for name in ("bloom", "llama"):
        (tmp_path / name).mkdir()
        config = tiny_models.config(name, vocab_size=3072)
        model = M.build(dataclasses.replace(config, quantization={**SCHEMES["a8w8"], "shift": True}))
        plain = {w.name: w for w in formats.weights.named_weights(tiny_models.fill(M.build(config)))}
        for w in formats.weights.named_weights(model):  # of the biases that a shift adds, none is 0
            if w.stored is None:
                array = (
                    plain[w.name].parameter.numpy() if w.name in plain else np.full(w.parameter.shape, 0.1, np.float32)
                )
                M.set_parameter(w.parameter, array)
        for path, (_, _, layer) in M.block_linears(model).items():
            round_into(layer, plain[path + ".weight"].parameter.numpy())
        formats.weights.save_pretrained(model, tmp_path / name)
        tokenizer_into(tmp_path / name)
    folder = run(tmp_path / "floats", model_name_or_path=tmp_path / "bloom", dequantize=True)
    again = adapters.from_pretrained(folder)
    assert again.config.quantization is None and all(
        isinstance(layer, M.Linear) for *_, layer in M.block_linears(again).values()
    )
    with pytest.raises(UserError, match="was shifted: .* have no place in a float llama"):
        run(tmp_path / "none", model_name_or_path=tmp_path / "llama", dequantize=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["qwen_ntk", "llama_dynamic", "bloom", "gpt2", "mistral", "deepseek_v2_lite"])
def test_static_goes_on_as_it_began(tmp_path, name):
    """Behind a prefix, in pieces, and computed again with part of the reply, as the engine does after it made room."""
    source = of_family(tmp_path, name)
    model = adapters.apply_prefix(adapters.from_pretrained(source), tokens=5)
    M.set_parameter(
        model.prefix.embedding,
        np.random.default_rng(0).standard_normal(model.prefix.embedding.shape).astype(np.float32),
    )
    adapters.save_adapter(model, tmp_path / "prefix", source)
    runner = StaticRunner(
        run(tmp_path / "static", model_name_or_path=source, prefix_path=tmp_path / "prefix", format="static")
    )
    assert runner.num_virtual_tokens == 5
    runner.PREFILL_CHUNK = 4
    texts, model = texts_of((4, 9)), model.eval()
    expected = [greedy_dynamic(model, [text], 7, [])[0] for text in texts]
    assert greedy_static(runner, texts, 7, []) == expected
    for text, reply in zip(texts, expected):
        again = text_of(runner, text)
        again.tokens += reply[:3]
        logits = runner.run([ScheduledTokens(again, 5, len(again.tokens) - 5)])
        assert logits.argmax() == reply[3]
        again.tokens.append(reply[3])
        assert runner.run([ScheduledTokens(again, len(again.tokens) - 1, 1)]).argmax() == reply[4]


@pytest.mark.sweep(keep=0)
def test_static_behind_a_prefix(tmp_path, prompts):
    model = adapters.apply_prefix(adapters.from_pretrained(DEMO), tokens=6)
    table = np.random.default_rng(0).standard_normal(model.prefix.embedding.shape).astype(np.float32)
    M.set_parameter(model.prefix.embedding, table)
    adapters.save_adapter(model, tmp_path / "prefix", DEMO)
    run(tmp_path / "a", model_name_or_path=tmp_path / "prefix", format="static")
    folder = run(tmp_path / "b", model_name_or_path=DEMO, prefix_path=tmp_path / "prefix", format="static")
    assert (tmp_path / "a" / "prefix.safetensors").read_bytes() == (folder / "prefix.safetensors").read_bytes()
    runner = StaticRunner(folder)
    assert (runner.num_virtual_tokens, runner.max_positions) == (6, 1024)
    found = greedy_static(runner, prompts[:8], 6, runner.config["stop_ids"], at_once=3)
    assert found == greedy_dynamic(model, prompts[:8], 6, runner.config["stop_ids"])
    assert found != greedy_dynamic(adapters.from_pretrained(DEMO), prompts[:8], 6, runner.config["stop_ids"])


def test_static_runner_cuts_long_prompts_and_takes_any_order(tmp_path, monkeypatch):
    source = small(tmp_path)
    runner, model = (
        StaticRunner(run(tmp_path / "static", model_name_or_path=source, format="static")),
        adapters.from_pretrained(source),
    )
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 7)
    monkeypatch.setattr(runner, "BATCH_TOKENS", 12)
    generator = np.random.default_rng(0)
    texts = [text_of(runner, generator.integers(3, 3072, n).tolist()) for n in (30, 5, 7, 1, 22)]

    def expected(text):
        return model.eval()(paddle.to_tensor([text.tokens])).numpy()[0, -1]

    logits = runner.run([ScheduledTokens(text, 0, len(text.tokens)) for text in texts[:4]])
    for text, row in zip(texts, logits):
        np.testing.assert_allclose(row, expected(text), atol=1e-4)
    for order in (
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [3, 1, 4],
        [1, 3],
        [4, 0, 2, 1, 3],
    ):  # 4 joins with its prompt in the third
        chunks = []
        for i in order:
            known = texts[i] in runner.caches
            texts[i].tokens += [int(generator.integers(3, 3072))] if known else []
            chunks.append(
                ScheduledTokens(texts[i], len(texts[i].tokens) - 1, 1)
                if known
                else ScheduledTokens(texts[i], 0, len(texts[i].tokens))
            )
        for i, row in zip(order, runner.run(chunks)):
            np.testing.assert_allclose(row, expected(texts[i]), atol=1e-4)
    runner.release(texts[0])
    runner.release(texts[0])
    assert texts[0] not in runner.caches and len(runner.caches) == 4


def test_static_folder_that_is_not_whole(tmp_path):
    whole = run(tmp_path / "whole", model_name_or_path=small(tmp_path), format="static")
    with pytest.raises(UserError, match="no static_config.json"):
        StaticRunner(DEMO)

    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        change(folder)
        with pytest.raises(UserError) as error:
            StaticRunner(folder)
        return str(error.value)

    assert "decode.json: is missing" in broken(lambda folder: (folder / "decode.json").unlink())
    weights = (whole / "static.pdiparams").read_bytes()
    assert "static.pdiparams: has" in broken(lambda folder: (folder / "static.pdiparams").write_bytes(weights[:-1]))
    assert "damaged" in broken(lambda folder: (folder / "static_config.json").write_text("{"))
    text = (whole / "static_config.json").read_text().replace('"format_version": 2', '"format_version": 7')
    assert "format_version 7" in broken(lambda folder: (folder / "static_config.json").write_text(text))


@pytest.mark.parametrize("scheme", test_quant_linear.SCHEMES)
def test_programs_of_every_layout_of_integers(tmp_path, scheme):
    model, _ = test_quant_linear.quantized(scheme)
    ids, mask = export.probe(model)
    expected = export.dynamic_logits(model, ids, mask)
    export.trace(model, tmp_path)
    export.write_static_config(tmp_path, model.config, max_model_len=export.max_model_len(model), prefix_tokens=0)
    found = export.static_logits(tmp_path, ids, mask)
    np.testing.assert_allclose(found, expected, atol=(0.02 if "a8w8" in scheme else 1e-4) * np.abs(expected).max())


def test_static_with_lora_beside_integers(tmp_path):
    plain = small(tmp_path)
    source, (adapter, _) = quantized("w8", tmp_path / "w8", plain), lora_folder(tmp_path, plain)
    runner = StaticRunner(run(tmp_path / "static", model_name_or_path=source, lora_path=adapter, format="static"))
    model, text = adapters.load_adapter(adapters.from_pretrained(source), adapter).eval(), text_of(runner, range(5, 25))
    expected = model(paddle.to_tensor([text.tokens])).numpy()[:, -1]
    np.testing.assert_allclose(runner.run([ScheduledTokens(text, 0, 20)]), expected, atol=1e-3)
    with pytest.raises(UserError, match="cannot be merged into integers"):
        run(tmp_path / "hf", model_name_or_path=source, lora_path=adapter)


# ============================================================================================= bad input


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"format": "onnx"}, "format: 'onnx'; possible are hf, static, gguf"),
        ({"save_dtype": "int8"}, "save_dtype: 'int8'; possible are"),
        ({"max_shard_size": "much"}, "max_shard_size: 'much'"),
        ({"max_shard_size": "0MB"}, "max_shard_size: '0MB'"),
        ({"model_name_or_path": "no/such"}, "model_name_or_path: no/such: no such folder"),
        ({"model_name_or_path": ""}, "model_name_or_path: missing"),
        ({"lora_path": "no/such"}, "lora_path: no/such: no such folder"),
        ({"lora_path": DEMO, "format": "hf"}, "adapter_config.json: no such file"),
        ({"prefix_path": DEMO, "format": "hf"}, "cannot hold a prefix"),
        ({"output_path": "elsewhere"}, "output_path to 'elsewhere'; give one"),
        ({"dequantize": "true"}, "is not quantized"),
        ({"model_name_or_path": ROOT / "demo" / "sft"}, "no tokenizer.model, tokenizer.json"),
        ({"tokenizer_name_or_path": ROOT / "demo" / "sft"}, "no tokenizer.model, tokenizer.json"),
        ({"save_dtyp": "float16"}, "did you mean 'save_dtype'"),
    ],
)
def test_bad_arguments(tmp_path, keys, words):
    with pytest.raises(UserError) as error:
        run(tmp_path / "out", **{"model_name_or_path": DEMO, **keys})
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_sizes():
    units = {"5GB": 5 * 10**9, "200MB": 2 * 10**8, "1.5 KiB": 1536, "12": 12, "7b": 7, "1gib": 1 << 30}
    assert {text: export.parse_size(text) for text in units} == units


def test_what_is_there_is_not_lost(tmp_path):
    out = run(tmp_path / "out", model_name_or_path=DEMO)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="overwrite_output_dir"):
        run(out, model_name_or_path=DEMO)
    with pytest.raises(UserError, match="is inside output_dir"):
        run(out, model_name_or_path=out, overwrite_output_dir="true")
    adapter, _ = lora_folder(tmp_path, out)
    with pytest.raises(UserError, match="the base of"):
        run(out, model_name_or_path=adapter, overwrite_output_dir="true")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / ".unfinished").mkdir()  # a killed run left it
    (out / ".unfinished" / "config.json").write_text("{}")
    run(out, model_name_or_path=DEMO, overwrite_output_dir="true", format="static")
    assert not (out / ".unfinished").exists()
    assert (out / "static_config.json").is_file() and not (out / "config.json").exists()


def test_the_check_leaves_gradients_on(tmp_path):
    """ALiBi behind a prefix is checked row by row; Paddle's no_grad decorator does not nest."""
    model = adapters.apply_prefix(tiny_models.build("bloom"), 2)
    ids, mask = np.ones((3, 8), np.int64), np.ones((3, 4), np.int64)
    assert export.dynamic_logits(model, ids, mask).shape[:2] == (3, 5)
    assert paddle.is_grad_enabled()


@pytest.mark.parametrize("format", ["hf", "static"])
def test_an_export_that_differs_is_refused(tmp_path, monkeypatch, format):
    source, real = small(tmp_path), export.save_pretrained if format == "hf" else export.trace

    def damaged(model, *args, **options):
        """What is written is of a model with one wrong weight."""
        weight = model.layers[1].mlp.up_proj.weight
        array = weight.numpy()
        M.set_parameter(weight, array * 1.5)
        real(model, *args, **options)
        M.set_parameter(weight, array)

    monkeypatch.setattr(export, real.__name__, damaged)
    with pytest.raises(UserError, match="logits differ by"):
        run(tmp_path / "out", model_name_or_path=source, format=format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gqa"]


def test_weights_too_large_for_float16(tmp_path):
    source = small(tmp_path)
    tensors = formats.tensor_files.read_safetensors(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    formats.tensor_files.write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(UserError, match="float16 is too coarse"):
        run(tmp_path / "out", model_name_or_path=source, save_dtype="float16")
    run(tmp_path / "out", model_name_or_path=source, save_dtype="bfloat16")
