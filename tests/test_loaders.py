"""Files that are not what they should be: one line that names the file and what is wrong; nothing runs, hangs or fills
the memory. Damaged tokenizers, chat templates and data have their own tests beside those of their rooms.
"""

import io
import json
import math
import pickle
import struct
import zipfile

import numpy as np
import pytest
from conftest import ROOT

import adapters
from families import ModelConfig
from formats.files import UserError, read_json
from formats.tensor_files import BinFile, read_pdparams, safetensors_header, write_safetensors
from formats.tokenizer import load_tokenizer

DEMO = ROOT / "demo" / "llama"
DEEP = "[" * 100_000


def refused(match, function, *args):
    """The one line that function(*args) is refused with."""
    with pytest.raises(UserError, match=match) as caught:
        function(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# ============================================================================================ safetensors


def header_file(path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, match",
    [
        ({"a": entry(["F32"])}, "tensor a has dtype"),
        ({"a": entry({})}, "tensor a has dtype"),
        ({"a": entry(None)}, "tensor a has dtype"),
        ({"a": entry(shape=(2.0,))}, "header is damaged"),
        ({"a": entry(shape=(-1, -2))}, "header is damaged"),
        ({"a": entry(shape=(True, 2))}, "header is damaged"),
        ({"a": entry(begin=0.0)}, "header is damaged"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, "a and b share bytes"),
        ({"a": entry(), "b": entry()}, "a and b share bytes"),
        ({"a": entry(shape=(4,), end=16), "b": entry(begin=4, end=12)}, "a and b share bytes"),
        (f'{{"a": {DEEP}'.encode(), "header is damaged"),
    ],
    ids=str,
)
def test_safetensors(tmp_path, header, match):
    path = header_file(tmp_path / "x.safetensors", header)
    assert str(path) in refused(match, safetensors_header, path)


def test_empty_tensors_share_no_bytes(tmp_path):
    header = {"a": entry(), "e": entry(shape=(0,), begin=4, end=4), "b": entry(begin=8, end=16)}
    assert list(safetensors_header(header_file(tmp_path / "x.safetensors", header))) == ["a", "e", "b"]


# =================================================================================================== .bin


def torch_zip(path, data, storage=b"", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", storage)
    return path


def tensor_pickle(name=b"\x8c\x01a", offset=b"K\x00", size=b"K\x02\x85", stride=b"K\x01\x85", persid=None):
    """The pickle of {name: a float tensor of 2}, as torch writes it; arguments are opcodes."""
    persid = persid or b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x02t"
    call = persid + b"Q" + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtRs."
    return b"\x80\x02}" + name + b"ctorch._utils\n_rebuild_tensor_v2\n(" + call


FLOATS = np.arange(2, dtype="<f4").tobytes()


def test_a_bin_file_is_read(tmp_path):
    path = torch_zip(tmp_path / "x.bin", tensor_pickle(), FLOATS)
    assert BinFile(path).read("a").tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "data",
    [
        tensor_pickle(name=b"K\x05"),
        tensor_pickle(name=b"\x8c\x02\xff\xfe"),
        tensor_pickle(offset=b"\x8c\x01x"),
        tensor_pickle(offset=b"G" + struct.pack(">d", 0.0)),
        tensor_pickle(stride=b"\x8c\x01x\x85"),
        tensor_pickle(stride=b")"),
        tensor_pickle(size=b"N"),
        tensor_pickle(persid=b"(\x8c\x07storaget"),
        tensor_pickle(persid=b"K\x01"),
        tensor_pickle(persid=b"(\x8c\x07storage]\x8c\x010\x8c\x03cpuK\x02t"),
        b"\x80\x02\x82\x05.",  # EXT1: a class by its number
        b"\x80\x02c\xff\xfe\nx\n.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02I" + b"9" * 9000 + b"\n.",
        b"\x80\x02]" + b"]" * 10_000 + b"a" * 10_000 + b".",
        b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x63.",
        b"",
    ],
    ids=lambda data: repr(data[-60:]),
)
def test_odd_pickles_of_torch(tmp_path, data):
    path = torch_zip(tmp_path / "x.bin", data, FLOATS)
    assert str(path) in refused("refused", BinFile, path)


def test_a_compressed_bin_is_refused_before_it_is_inflated(tmp_path):
    path = torch_zip(tmp_path / "x.bin", tensor_pickle(), bytes(50_000_000), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "archive/data.pkl is compressed" in refused("refused", BinFile, path)


@pytest.mark.parametrize("change", ["encrypted", "method", "cut", "size", "name"])
def test_damaged_zips(tmp_path, change):
    path = torch_zip(tmp_path / "x.bin", tensor_pickle(), FLOATS)
    data, central = bytearray(path.read_bytes()), path.read_bytes().index(b"PK\x01\x02")
    if change == "encrypted":
        data[central + 8] |= 1
        data[6] |= 1
    elif change == "method":
        data[central + 10] = data[8] = 99
    elif change == "cut":
        del data[-30:]
    elif change == "size":
        data[central + 20 : central + 28] = b"\xff\xff\xff\x7f" * 2
    else:
        data[central + 46] = 0xFF
    path.write_bytes(data)
    refused("refused|not a torch zip file|missing or damaged", lambda: BinFile(path).read("a"))


# ============================================================================================== .pdparams


def array_pickle(shape=b"K\x02\x85", code=b"\x8c\x02f4", data=b"C\x08" + FLOATS, name=b"\x8c\x01a"):
    """The pickle of {name: a numpy array}, as paddle.save() writes it; arguments are opcodes."""
    dtype = b"cnumpy\ndtype\n" + code + b"\x85R"
    state = b"(K\x01" + shape + dtype + b"\x89" + data + b"t"
    return b"\x80\x04}" + name + b"cnumpy.core.multiarray\n_reconstruct\n)R" + state + b"bs."


def test_a_pdparams_file_is_read(tmp_path):
    (tmp_path / "x.pdparams").write_bytes(array_pickle())
    assert read_pdparams(tmp_path / "x.pdparams")["a"].read().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "data",
    [
        array_pickle(shape=b"N"),
        array_pickle(shape=b"K\x02"),
        array_pickle(shape=b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86"),
        array_pickle(shape=b"\x8c\x01x\x85"),
        array_pickle(code=b"]"),
        array_pickle(code=b"\x8c\x02O8"),
        array_pickle(data=b"N"),
        array_pickle(data=b"\x8c\x08abcdefgh"),
        array_pickle(name=b"K\x05"),
        b"\x80\x04}\x8c\x01acnumpy.core.multiarray\n_reconstruct\n)Rs.",
        b"\x80\x04\x82\x05.",
        b"\x80\x04N.",
    ],
    ids=lambda data: repr(data[-60:]),
)
def test_odd_pickles_of_paddle(tmp_path, data):
    path = tmp_path / "x.pdparams"
    path.write_bytes(data)
    assert str(path) in refused("refused|not a complete file", read_pdparams, path)


def test_an_array_shorter_than_its_shape(tmp_path):
    (tmp_path / "x.pdparams").write_bytes(array_pickle(shape=b"\x8a\x0510000\x85"))
    refused("truncated", read_pdparams(tmp_path / "x.pdparams")["a"].read)


# =================================================================================== JSON, config, adapter


@pytest.mark.parametrize(
    "text", [DEEP, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=["list", "dict", "number"]
)
def test_json_that_is_nested_too_deeply_or_too_long(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused("not JSON", read_json, tmp_path / "config.json")
    refused("not JSON", ModelConfig.from_json, tmp_path)


def demo_config(**changes):
    return json.loads((DEMO / "config.json").read_text()) | changes


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer below 16,384, found 1000000000"),
        ({"hidden_size": 10**12}, "hidden_size must be a positive integer below"),
        ({"vocab_size": 10**12}, "vocab_size must be"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer, found -1"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, found nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a positive number, found inf"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be"),
        ({"rope_theta": 0}, "needs a number rope_theta above 0, found 0"),
        ({"rope_theta": math.nan}, "rope_theta must be a finite number"),
        ({"rope_theta": True}, "needs a number rope_theta above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope type linear needs a number factor above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": math.inf}}, "factor must be a finite number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": math.nan}}, "beta_fast must be a finite"),
        ({"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2}, "num_experts must be"),
    ],
    ids=str,
)
def test_numbers_of_config_json(tmp_path, changes, match):
    (tmp_path / "config.json").write_text(json.dumps(demo_config(**changes)))
    assert str(tmp_path) in refused(match, ModelConfig.from_json, tmp_path)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"r": 10**9}, "r must be a number below"),
        ({"r": 10**6}, "r = 1000000; a rank is a whole number from 1 to 65536"),
        ({"r": 0}, "r = 0; a rank"),
        ({"r": 2.5}, "r = 2.5; a rank"),
        ({"r": True}, "r must be a number"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern 'q_proj' = 1000000000; a rank"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a number"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**9}, "num_virtual_tokens must be a number"),
    ],
    ids=str,
)
def test_numbers_of_adapter_config(tmp_path, changes, match):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    write_safetensors(tmp_path / "adapter_model.safetensors", {"a": np.zeros(2, np.float32)})
    refused(match, adapters.load_adapter, demo_model(), tmp_path)


def demo_model(cache=[]):  # noqa: B006, one model for all of these tests
    if not cache:
        cache.append(adapters.from_pretrained(DEMO))
    return cache[0]


# ============================================================================================== tokenizers


@pytest.mark.parametrize("token_id", [10**12, 10**40, -1])
def test_token_ids_beyond_any_vocabulary(tmp_path, token_id):
    vocab = {"a": 0, "b": token_id}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "decoder": {"type": "ByteLevel"}}))
    refused("the id", load_tokenizer, tmp_path)
    added = [{"content": "<x>", "id": token_id}]
    spec = {"model": model | {"vocab": {"a": 0}}, "added_tokens": added}
    spec |= {"decoder": {"type": "ByteLevel"}, "pre_tokenizer": {"type": "ByteLevel"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    refused("the id", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": []}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": token_id}))
    refused("an object of tokens and their ids", load_tokenizer, tmp_path)


def test_an_unpickler_runs_nothing(tmp_path):
    class Gadget:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    data = io.BytesIO()
    pickle.dump({"a": Gadget()}, data, protocol=2)
    refused("refused", BinFile, torch_zip(tmp_path / "x.bin", data.getvalue()))
    (tmp_path / "x.pdparams").write_bytes(data.getvalue())
    refused("refused", read_pdparams, tmp_path / "x.pdparams")
    assert not (tmp_path / "ran").exists()
