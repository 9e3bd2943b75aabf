"""Folders of models as people have them: heads of their own, several weight files, pointers, ids that end a reply; and
folders as they leave here: complete for transformers.

python -m pytest tests/test_model_folders.py                                  # CPU, half a minute
python -m pytest tests/test_model_folders.py --hf-python /path/to/bin/python  # the same in transformers
"""

import json
import shutil

import numpy as np
import paddle
import pytest
import tiny_models
from conftest import ROOT
from test_export import write_bin

import adapters
import families
import formats.weights
from formats.files import UserError
from formats.tensor_files import read_safetensors, write_safetensors
from formats.tokenizer import load_tokenizer

DEMO = ROOT / "demo" / "llama"
IDS = np.random.default_rng(0).integers(3, 50, (2, 11))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"


def logits(folder, ids=IDS):
    with paddle.no_grad():
        return adapters.from_pretrained(folder)(paddle.to_tensor(ids)).numpy()


def tensors_of(folder):
    return read_safetensors(folder / "model.safetensors")


def edit_config(folder, name="config.json", **keys):
    path = folder / name
    source = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(source | keys))
    return folder


TIED = {  # family: names of head and embedding in its files
    "llama_bias_tied": ("lm_head.weight", "model.embed_tokens.weight"),
    "gemma": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "opt": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    "chatglm": ("lm_head.weight", "transformer.word_embeddings.weight"),
}


def with_head(folder, head, **files):
    """A tied model's folder with this head in its file."""
    write_safetensors(folder / "model.safetensors", tensors_of(folder) | {"lm_head.weight": head})
    return folder


def other_head(folder, embedding):
    table = tensors_of(folder)[embedding]
    return table + np.random.default_rng(1).standard_normal(table.shape).astype(np.float32)


# ================================================================================================== tied heads


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_differs_is_kept_and_an_equal_one_stays_tied(name, tmp_path, capsys):
    head_name, embedding = TIED[name]
    folder = tiny_models.write(tmp_path / "a", name)
    config, expected = families.ModelConfig.from_json(folder), logits(folder)
    assert config.tie_word_embeddings
    head = other_head(folder, embedding)
    with_head(folder, tensors_of(folder)[embedding])
    assert formats.weights.read_config(folder).tie_word_embeddings
    np.testing.assert_array_equal(logits(folder), expected)
    assert capsys.readouterr().out == ""
    with_head(folder, head)
    model = adapters.from_pretrained(folder)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and f"{head_name} differs from {embedding}: both are kept, untied" in printed
    stored = {w.name: w.to_numpy() for w in formats.weights.named_weights(model)}
    np.testing.assert_array_equal(stored[head_name], head)
    np.testing.assert_array_equal(stored[embedding], tensors_of(folder)[embedding])
    found = logits(folder)
    assert np.abs(found - expected).max() > 0.5
    untied = edit_config(tiny_models.write(tmp_path / "b", name), tie_word_embeddings=False)
    np.testing.assert_array_equal(found, logits(with_head(untied, head)))  # as a folder that says so
    capsys.readouterr()
    formats.weights.save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(logits(tmp_path / "saved"), found)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", TIED)
def test_a_tied_file_may_hold_the_head_alone(name, tmp_path):
    _, embedding = TIED[name]
    folder = tiny_models.write(tmp_path / "a", name)
    expected, tensors = logits(folder), tensors_of(folder)
    tensors["lm_head.weight"] = tensors.pop(embedding)
    write_safetensors(folder / "model.safetensors", tensors)
    np.testing.assert_array_equal(logits(folder), expected)
    del tensors["lm_head.weight"]
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(UserError, match=f"missing {embedding}"):
        logits(folder)


def test_heads_of_bin_files_of_paddle_files_and_without_a_prefix(tmp_path):
    folder = tiny_models.write(tmp_path / "a", "llama_bias_tied")
    embedding = TIED["llama_bias_tied"][1]
    head = other_head(folder, embedding)
    with_head(folder, head)
    expected, tensors = logits(folder), tensors_of(folder)
    (folder / "model.safetensors").unlink()
    write_bin(folder / "pytorch_model.bin", tensors)
    np.testing.assert_array_equal(logits(folder), expected)
    (folder / "pytorch_model.bin").unlink()
    write_safetensors(folder / "model.safetensors", {n.removeprefix("model."): a for n, a in tensors.items()})
    np.testing.assert_array_equal(logits(folder), expected)
    paddle_names = {  # PaddleNLP's linears are [in, out]; its head is (V, D) in a class that ties it, else (D, V)
        n.replace("model.", "llama.", 1): a.T if "proj" in n and a.ndim == 2 else a for n, a in tensors.items()
    }
    edit_config(folder, paddlenlp_version="3.0.0b4")
    for stored in (head, head.T):
        stored = {"lm_head.weight": np.ascontiguousarray(stored)}
        part = {n: np.ascontiguousarray(a) for n, a in paddle_names.items()} | stored
        write_safetensors(folder / "model.safetensors", part)
        np.testing.assert_array_equal(logits(folder), expected)
        del part["llama.embed_tokens.weight"]
        write_safetensors(folder / "model.safetensors", part)
        config = formats.weights.read_config(folder)
        assert config.tie_word_embeddings
        alone = {w.name: w.to_numpy() for w in formats.weights.named_weights(adapters.from_pretrained(folder))}
        np.testing.assert_array_equal(alone[embedding], head)


def test_untied_heads_under_tensor_parallelism_and_pipeline(tmp_path, two):
    folder = tiny_models.write(tmp_path / "a", "llama_bias_tied", num_attention_heads=4, num_key_value_heads=2)
    head = other_head(folder, TIED["llama_bias_tied"][1])
    with_head(folder, head)
    for same_tokens, loss, difference in two.run(
        "jobs_tensor:tokens", "llama_bias_tied", {"tp": 2}, folder=str(folder)
    ):
        assert same_tokens and loss < 1e-4 and difference < 1e-4
    stages = two.run("jobs_pipeline:loaded", str(folder), {"pp": 2})
    with_heads = [weights for weights, _ in stages if "lm_head.weight" in weights]
    assert len(with_heads) == 1 and "model.embed_tokens.weight" not in with_heads[0]  # nothing is shared any more
    np.testing.assert_array_equal(with_heads[0]["lm_head.weight"], head)
    tensors = tensors_of(folder)
    del tensors["model.embed_tokens.weight"]
    write_safetensors(folder / "model.safetensors", tensors)
    for weights, _ in two.run("jobs_pipeline:loaded", str(folder), {"pp": 2}):
        np.testing.assert_array_equal(weights["model.embed_tokens.weight"], head)  # of both stages: tied


# ================================================================================================ files of a folder


def in_two_shards(folder, tensors, end="safetensors"):
    names, first = list(tensors), "model" if end == "safetensors" else "pytorch_model"
    files = {f"{first}-0000{i + 1}-of-00002.{end}": names[i::2] for i in (0, 1)}
    for file, part in files.items():
        content = {n: np.ascontiguousarray(tensors[n]) for n in part}
        (write_safetensors if end == "safetensors" else write_bin)(folder / file, content)
    weight_map = {n: file for file, part in files.items() for n in part}
    (folder / f"{first}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_which_of_several_weight_files_is_read(tmp_path):
    """transformers' order: one file before an index, safetensors before .bin, nothing else."""
    folder = tiny_models.write(tmp_path / "a", "llama")
    tensors = tensors_of(folder)
    wrong = {n: a + 1 for n, a in tensors.items()}
    expected = logits(folder)
    in_two_shards(folder, wrong)
    write_bin(folder / "pytorch_model.bin", wrong)
    write_safetensors(folder / "consolidated.safetensors", wrong)
    (folder / "original").mkdir()
    write_safetensors(folder / "original" / "model.safetensors", wrong)
    np.testing.assert_array_equal(logits(folder), expected)
    (folder / "model.safetensors").unlink()
    in_two_shards(folder, tensors)
    np.testing.assert_array_equal(logits(folder), expected)
    for path in folder.glob("model*safetensors*"):
        path.unlink()
    in_two_shards(folder, wrong, "bin")
    write_bin(folder / "pytorch_model.bin", tensors)
    np.testing.assert_array_equal(logits(folder), expected)
    (folder / "pytorch_model.bin").unlink()
    weight_map = in_two_shards(folder, tensors, "bin")
    np.testing.assert_array_equal(logits(folder), expected)
    gone = folder / sorted(set(weight_map.values()))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"names the file {gone.name}, which is not there"):
        logits(folder)
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    with pytest.raises(UserError, match="no model.safetensors, .*; consolidated.safetensors cannot be opened without"):
        logits(folder)


def test_saving_in_another_layout_removes_what_would_be_read_first(tmp_path):
    a, b = tiny_models.build("llama", 0), tiny_models.build("llama", 1)
    for model, size in ((a, 1 << 30), (b, 8_000), (a, 1 << 30)):
        formats.weights.save_pretrained(model, tmp_path, max_shard_bytes=size)
        again = adapters.from_pretrained(tmp_path)
        for saved, read in zip(formats.weights.named_weights(model), formats.weights.named_weights(again)):
            np.testing.assert_array_equal(saved.to_numpy(), read.to_numpy())


def test_shards_in_a_subfolder_of_the_index_and_none_outside(tmp_path):
    folder = tiny_models.write(tmp_path / "a", "llama")
    expected = logits(folder)
    (folder / "parts").mkdir()
    shutil.move(folder / "model.safetensors", folder / "parts" / "x.safetensors")
    names = formats.weights.stored_tensors(folder / "parts", ("x.safetensors",))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "parts/x.safetensors")}))
    np.testing.assert_array_equal(logits(folder), expected)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, f"../{folder.name}/parts/x.safetensors")}))
    with pytest.raises(UserError, match="names the file .*, which is not there"):
        logits(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model_state.pdparams", "index"])
def test_pointers_of_git_lfs_are_named(file, tmp_path):
    folder = tiny_models.write(tmp_path / "a", "llama")
    if file == "index":
        weight_map = in_two_shards(folder, tensors_of(folder))
        file = sorted(weight_map.values())[0]
    (folder / "model.safetensors").unlink()
    (folder / file).write_text(LFS)
    with pytest.raises(UserError, match=rf"{file}: a git-lfs pointer, .* run `git lfs pull` in {folder}"):
        logits(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_pointers_in_place_of_a_tokenizer(file, tmp_path):
    (tmp_path / file).write_text(LFS)
    with pytest.raises(UserError, match=rf"{file}: a git-lfs pointer, .* run `git lfs pull`"):
        load_tokenizer(tmp_path)


def test_masks_of_booleans_beside_the_weights_are_ignored(tmp_path):
    folder = tiny_models.write(tmp_path / "a", "gpt2")
    expected, tensors = logits(folder), tensors_of(folder)
    write_safetensors(folder / "model.safetensors", tensors | {"transformer.h.0.attn.bias": np.tri(8, dtype=bool)})
    np.testing.assert_array_equal(logits(folder), expected)


def test_both_names_of_the_dtype(tmp_path):
    """torch_dtype of transformers 4 and dtype of 5: one of them is written, and no stale other."""
    folder = tiny_models.write(tmp_path / "a", "llama")
    for keys, written in (
        ({"torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float16", "dtype": "float16"}, {"dtype": "bfloat16"}),
    ):
        edit_config(folder, **keys)
        formats.weights.save_pretrained(adapters.from_pretrained(folder), tmp_path / "b", "bfloat16")
        source = json.loads((tmp_path / "b" / "config.json").read_text())
        assert {key: source[key] for key in ("dtype", "torch_dtype") if key in source} == written


def test_multimodal_configs_and_folders_of_the_download_cache_are_refused_by_name(tmp_path):
    llama = tiny_models.CONFIGS["llama"]
    for kind in ("gemma3", "llama4", "mistral3", "llava"):
        source = {"model_type": kind, "text_config": llama, "vision_config": {}}
        with pytest.raises(UserError, match=rf"model_type '{kind}' is multimodal \(text_config: model_type 'llama'\)"):
            families.ModelConfig.from_dict(source)
    (tmp_path / "models--a--b" / "snapshots" / "12ab").mkdir(parents=True)
    (tmp_path / "models--a--b" / "snapshots" / "12ab" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no such file; the model is in .*models--a--b/snapshots/12ab"):
        families.ModelConfig.from_json(tmp_path / "models--a--b")


# ============================================================================================= names of activations


TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
ACTIVATIONS = {  # config: the key, {its value: what is computed}
    "llama": ("hidden_act", {"silu": "silu", "swish": "silu"}),
    "deepseek_v2": ("hidden_act", {"silu": "silu", "swish": "silu"}),
    "gemma": ("hidden_act", dict.fromkeys(TANH, "gelu_tanh") | {"gelu": "gelu_tanh"}),
    "gemma2": ("hidden_activation", dict.fromkeys(TANH, "gelu_tanh") | {"gelu": "gelu"}),
    "gpt2": ("activation_function", dict.fromkeys(TANH, "gelu_tanh") | {"gelu": "gelu", "gelu_python": "gelu",
                                                                       "relu": "relu"}),
    "opt": ("activation_function", dict.fromkeys(TANH, "gelu_tanh") | {"gelu": "gelu", "relu": "relu"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_names_of_activations(name):
    key, values = ACTIVATIONS[name]
    for value, computed in values.items():
        config = families.ModelConfig.from_dict(tiny_models.CONFIGS[name] | {key: value})
        assert config.activation == computed and json.loads(config.to_json("float32"))[key] == value


OPENS_EACH = """
import pathlib, torch, transformers
arrays = {}
for folder in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        arrays[folder.name] = model(torch.from_numpy(np.load(sys.argv[3]))).logits.numpy()
"""


@pytest.mark.torch
def test_transformers_opens_the_same_folders(hf_python, tmp_path):
    """Heads of their own, a head alone, one file beside an index, and every name of an activation."""
    expected, changes = {}, {"pad_token_id": 0}
    for name, (key, values) in ACTIVATIONS.items():
        if name == "deepseek_v2":
            continue
        for value in values:
            size = {"hidden_size": 36} if name == "gemma" else {}
            folder = tiny_models.write(tmp_path / "all" / f"{name}_{value}", name, **size)
            edit_config(folder, **changes, **{key: value})
    for name in ("llama_bias_tied", "gpt2", "opt"):
        embedding = TIED[name][1]
        folder = edit_config(tiny_models.write(tmp_path / "all" / f"{name}_head", name), **changes)
        with_head(folder, other_head(folder, embedding))
        folder = edit_config(tiny_models.write(tmp_path / "all" / f"{name}_alone", name), **changes)
        tensors = tensors_of(folder)
        tensors["lm_head.weight"] = tensors.pop(embedding)
        write_safetensors(folder / "model.safetensors", tensors)
    folder = edit_config(tiny_models.write(tmp_path / "all" / "two", "llama"), **changes)
    in_two_shards(folder, {n: a + 1 for n, a in tensors_of(folder).items()})
    for folder in sorted((tmp_path / "all").iterdir()):
        expected[folder.name] = logits(folder)
    np.save(tmp_path / "ids.npy", IDS)
    found = hf_python(OPENS_EACH, tmp_path / "all", tmp_path / "ids.npy")
    errors = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    print(errors)
    assert len(errors) > 25 and max(errors.values()) < 1e-4, errors
