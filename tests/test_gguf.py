"""GGUF files: blocks of every type against gguf-py's and llama.cpp's, models written and opened, llama.cpp beside us.

python -m pytest tests/test_gguf.py                                         # CPU, ten seconds
python -m pytest tests/test_gguf.py --llama-cpp-python /path/to/bin/python  # and llama.cpp opens what is exported
"""

import json
import re
import struct

import numpy as np
import paddle
import pytest
import tiny_models
from conftest import ROOT
from test_export import DEMO, run, tokenizer_into

import adapters
import export
import finetune
import model as M
import serve
from arguments import parse_args
from formats import gguf, gguf_blocks, gguf_export, gguf_folder
from formats.files import UserError
from formats.tokenizer import load_tokenizer

GOLDEN = ROOT / "tests" / "golden" / "gguf_blocks.npz"
IDS = np.random.default_rng(0).integers(3, 3000, (2, 11))
FAMILIES = "llama_llama3 llama_bias_tied mistral_full mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2".split()
SPARSE = {"mlp_only_layers": [], "decoder_sparse_step": 1}
CHANGES = {
    "qwen2_moe": SPARSE | {"norm_topk_prob": False},
    "qwen3_moe": SPARSE | {"norm_topk_prob": True},
    "gemma2": {"query_pre_attn_scalar": 10},
}


def logits(path):
    with paddle.no_grad():
        return adapters.from_pretrained(path)(paddle.to_tensor(IDS)).numpy()


def source(tmp_path, name="llama", **changes):
    """A tiny model with the demo's tokenizer, and so with its vocabulary."""
    return tokenizer_into(tiny_models.write(tmp_path / name, name, vocab_size=3072, **changes))


# ======================================================================================================== blocks


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def test_blocks_are_read_as_gguf_py_reads_them(golden):
    names = [name.removesuffix("_blocks") for name in golden if name.endswith("_blocks")]
    assert set(names) == gguf_blocks.TYPES.keys() - {"F32", "F16", "BF16", "F64"}
    for name in names:
        np.testing.assert_array_equal(
            gguf_blocks.decode(golden[f"{name}_blocks"].tobytes(), name), golden[f"{name}_values"], err_msg=name
        )


def test_blocks_are_rounded_as_llama_cpp_rounds_them(golden):
    x = golden["x"]
    for name in [name.removesuffix("_encoded") for name in golden if name.endswith("_encoded")]:
        ours, theirs = gguf_blocks.encode(x, name), golden[f"{name}_encoded"]
        if not name.endswith("_K"):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            continue
        # float32 sums in another order: a candidate scale may win by a hair
        errors = [np.square(gguf_blocks.decode(data.tobytes(), name) - x.ravel()).sum() for data in (ours, theirs)]
        assert (ours != theirs).mean() < 0.05 and errors[0] < 1.005 * errors[1], (name, errors)


def test_small_types_and_blocks_of_zeros():
    x = np.array([[0.1, -2.5, 3e38, 1e-30] * 64], np.float32)
    for name, error in (("F32", 0), ("BF16", 2**-8)):
        back = gguf_blocks.decode(gguf_blocks.encode(x, name).tobytes(), name)
        assert (np.abs(back - x[0]) <= error * np.abs(x[0])).all()
    for name in gguf_blocks.ENCODERS:
        assert not gguf_blocks.decode(gguf_blocks.encode(np.zeros((1, 256)), name).tobytes(), name).any(), name


def test_file_and_values_of_every_type(tmp_path):
    metadata = {"a.text": "é", "a.yes": True, "a.count": 7, "a.scale": 0.5, "a.list": [-1, 2], "a.words": ["x", "y z"]}
    metadata |= {"a.floats": [0.25, 4.0]}
    array = np.arange(64, dtype=np.float32).reshape(2, 32)
    gguf.write_gguf(tmp_path / "x.gguf", metadata, {"t": (lambda: array, [2, 32], "F16")})
    file = gguf.read_header(tmp_path / "x.gguf")
    assert file.metadata == metadata and file.tensors["t"].shape == [2, 32]
    np.testing.assert_array_equal(file.tensors["t"].read(), array)


# ======================================================================================================== models


@pytest.mark.sweep(keep=3)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_the_same_after_export_and_opening(tmp_path, name):
    folder = source(tmp_path, name, **CHANGES.get(name, {}))
    out = run(tmp_path / "out", model_name_or_path=folder, format="gguf", gguf_type="F32")
    np.testing.assert_allclose(logits(out / "model.gguf"), logits(folder), rtol=1e-5, atol=1e-4)
    before, after = adapters.from_pretrained(folder).config, adapters.from_pretrained(out).config
    for field in ("norm_eps", "rope", "attention_bias", "tie_word_embeddings", "head_dim", "attention_softcap"):
        assert getattr(after, field) == getattr(before, field), field


def test_types_of_a_file_and_rows_that_are_no_whole_blocks(tmp_path, capsys):
    folder = source(tmp_path, hidden_size=64, intermediate_size=256, num_hidden_layers=3)
    out = run(tmp_path / "out", model_name_or_path=folder, format="gguf", outtype="q4_k")
    types = {name: tensor.type for name, tensor in gguf.read_header(out / "model.gguf").tensors.items()}
    assert types["blk.0.attn_q.weight"] == "Q5_0" and types["token_embd.weight"] == "Q5_0"  # 64 is no multiple of 256
    assert types["output.weight"] == "Q8_0" and types["blk.0.attn_norm.weight"] == "F32"
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(3)} == {"Q4_K", "Q6_K"}
    assert re.search(r"model.gguf: [\d,]+ bytes\n", capsys.readouterr().out)
    assert (out / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


@pytest.mark.parametrize("gguf_type, bits", [("Q8_0", 8), ("Q4_0", 4), ("Q4_1", None)])
def test_integers_of_a_file_run_as_they_are(tmp_path, gguf_type, bits, capsys):
    folder = source(tmp_path, hidden_size=64, intermediate_size=256)
    out = run(tmp_path / "out", model_name_or_path=folder, format="gguf", gguf_type=gguf_type)
    capsys.readouterr()
    integers, floats = serve.open_model(out, None, integers=True), adapters.from_pretrained(out)
    assert (f"weights as w{bits}, 0." in capsys.readouterr().out) == bool(bits)
    assert (integers.config.quantization or {}).get("bits") == bits and floats.config.quantization is None
    plain = M.block_linears(floats)
    for path, (_, _, layer) in M.block_linears(integers).items() if bits else ():
        np.testing.assert_array_equal(layer.dequantized().numpy(), plain[path][2].weight.numpy(), err_msg=path)
    with paddle.no_grad():
        expected = floats(paddle.to_tensor(IDS)).numpy()
        found = integers(paddle.to_tensor(IDS)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_damaged_export_is_refused(tmp_path, monkeypatch):
    real = gguf_blocks.encode
    monkeypatch.setattr(gguf, "encode", lambda array, name: real(array * 1.01, name))
    with pytest.raises(UserError, match="the file, opened again: logits differ"):
        run(tmp_path / "out", model_name_or_path=source(tmp_path), format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("bloom", {}, "gguf is not supported for bloom"),
        ("llama_dynamic", {}, "no rope_type 'dynamic'"),
        ("qwen3", {"attention_bias": True}, "no biases in the attention of qwen3"),
        ("qwen3_moe", {"norm_topk_prob": False}, "no norm_topk_prob False"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, changes, reason):
    with pytest.raises(UserError, match=reason):
        gguf_export._tensors(tiny_models.build(name, **changes))


# ============================================================================== scripts open a file, or its folder


def test_a_file_trains_and_is_the_base_of_its_adapter(tmp_path):
    out = run(tmp_path / "out", model_name_or_path=source(tmp_path), format="gguf", gguf_type="F32")
    file = out / "model.gguf"
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.json").write_text(json.dumps({"src": "question", "tgt": "answer"}) + "\n")
    keys = dict(model_name_or_path=file, dataset_name_or_path=data, output_dir=tmp_path / "lora", max_steps=1)
    keys |= dict(lora="true", do_eval="false", max_length=32, learning_rate=0.1, device="cpu", do_train="true")
    finetune.main(parse_args(finetune.Args, [f"--{key}={value}" for key, value in keys.items()]))
    base, tuned = logits(out), logits(tmp_path / "lora")
    assert np.abs(tuned - base).max() > 0
    merged = run(tmp_path / "merged", model_name_or_path=tmp_path / "lora", save_dtype="float32")
    np.testing.assert_allclose(logits(merged), tuned, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(merged).encode("question") == load_tokenizer(DEMO).encode("question")


def test_the_file_among_others(tmp_path):
    out = run(tmp_path / "out", model_name_or_path=source(tmp_path), format="gguf")
    (out / "mmproj-x.gguf").write_bytes(b"")
    assert gguf_folder.open_folder(out).name == "model.gguf"
    (out / "other.gguf").write_bytes((out / "model.gguf").read_bytes())
    with pytest.raises(UserError, match="holds 2 models .model.gguf, other.gguf.; give the path of one file"):
        adapters.from_pretrained(out)


def edited(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    out = run(tmp_path / "out", model_name_or_path=source(tmp_path), format="gguf")
    file = out / "model.gguf"
    whole = file.read_bytes()
    cases = {
        "not a GGUF file": lambda data: data.__setitem__(slice(0, 4), b"GGML"),
        "of version 9": lambda data: data.__setitem__(slice(4, 8), struct.pack("<I", 9)),
        "truncated: tensor": lambda data: data.__delitem__(slice(-5000, None)),
        "truncated: the header": lambda data: data.__delitem__(slice(200, None)),
        "general.architecture 'qwex2'": lambda data: data.__setitem__(slice(0, None), data.replace(b"llama", b"qwex2")),
        "tokenizer.ggml.model 'llamx'": lambda data: data.__setitem__(
            slice(0, None), data.replace(b"\x05\0\0\0\0\0\0\0llama\x12", b"\x05\0\0\0\0\0\0\0llamx\x12")
        ),
        "llama.rope.freq_basf": lambda data: data.__setitem__(slice(0, None), data.replace(b"freq_base", b"freq_basf")),
        "tensor blk.0.attn_x.weight has no place": lambda data: data.__setitem__(
            slice(0, None), data.replace(b"blk.0.attn_q", b"blk.0.attn_x")
        ),
    }
    for number, (reason, change) in enumerate(cases.items()):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(whole)
        with pytest.raises(UserError, match=re.escape(reason)):
            adapters.from_pretrained(edited(path, change))
    gguf_type = struct.pack("<I", 2) + struct.pack("<QQ", 32, 32) + struct.pack("<I", 1)
    assert gguf_type in whole
    path = tmp_path / "type.gguf"
    path.write_bytes(whole.replace(gguf_type, gguf_type[:-4] + struct.pack("<I", 19)))
    with pytest.raises(UserError, match="has the type IQ1_S; readable are F32, "):
        adapters.from_pretrained(path)


# ===================================================================================================== tokenizers

TEXTS = [*export.TEXTS, "", "a", "  two", "12345678 1234", "end ", "\r\n x"]


def byte_pairs(folder, pre_tokenizer, **model):
    """A tokenizer.json over bytes with a few merges, two special tokens and a chat template."""
    from formats.bpe import BYTE_CHARS

    symbols = [*BYTE_CHARS.values(), "th", "the", "\u0120q", "12", "123"]
    merges = ["t h", "th e", "\u0120 q", "1 2", "12 3"]
    added = [
        {"id": 261, "content": "<|im_start|>", "special": True},
        {"id": 262, "content": "<|im_end|>", "special": True},
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre_tokenizer, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {s: i for i, s in enumerate(symbols)}, "merges": merges, **model},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder


def split(pattern):
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2"])
def test_byte_pairs_and_their_pre_tokenizer(tmp_path, pre):
    patterns, whole_words = gguf_folder.PRE_TOKENIZERS[pre]
    steps = [step for pattern in patterns for step in split(pattern)]
    folder = byte_pairs(tmp_path, steps, ignore_merges=whole_words)
    tokenizer = load_tokenizer(folder)
    metadata = gguf_export.tokenizer_metadata(tokenizer, 270)
    assert metadata["tokenizer.ggml.pre"] == pre and metadata["tokenizer.ggml.tokens"][-1] == "[PAD269]"
    gguf_export.write_model(folder / "x.gguf", tiny_models.build("qwen2", vocab_size=270), tokenizer, "F16", "x")
    opened = load_tokenizer(folder / "x.gguf")
    for text in TEXTS:
        assert opened.encode(text) == tokenizer.encode(text) and opened.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "the 1234"}]
    assert opened.apply_chat(chat) == tokenizer.apply_chat(chat) and opened.stop_ids == tokenizer.stop_ids
    template = gguf_export.ollama_template(tokenizer)
    assert (
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n' in template
    )


def test_a_pre_tokenizer_that_llama_cpp_lacks(tmp_path):
    folder = byte_pairs(tmp_path, split(r"\s+"))
    with pytest.raises(UserError, match="no pre-tokenizer with the pattern"):
        gguf_export.tokenizer_metadata(load_tokenizer(folder), 270)


def test_sentencepiece(tmp_path):
    tokenizer = load_tokenizer(DEMO)
    gguf_export.write_model(tmp_path / "x.gguf", tiny_models.build("llama", vocab_size=3072), tokenizer, "F16", "x")
    opened = load_tokenizer(tmp_path / "x.gguf")
    assert (opened.bos_token, opened.eos_token, opened.unk_token_id) == ("<s>", "</s>", 0)
    for text in [*TEXTS, "<s>x</s> y"]:
        assert opened.encode(text) == tokenizer.encode(text)
        assert opened.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


# ====================================================================================================== llama.cpp


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_same(tmp_path, name, request, monkeypatch):
    python = request.config.getoption("--llama-cpp-python")
    if python is None:
        pytest.skip("needs --llama-cpp-python: a Python with llama_cpp")
    monkeypatch.setattr(export, "QUESTIONS", export.QUESTIONS[:3])
    folder = source(tmp_path, name, max_position_embeddings=512, **CHANGES.get(name, {}))
    run(tmp_path / "out", model_name_or_path=folder, format="gguf", gguf_type="F32", verify_with=python)
