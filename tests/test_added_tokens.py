"""New tokens in the tokenizer's files, rows for them in embedding and head, and training runs that add them.

python -m pytest tests/test_added_tokens.py                                        # CPU, no torch
python -m pytest tests/test_added_tokens.py --hf-python /path/to/venv/bin/python   # also: transformers and peft open it
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_model import build, largest, tensor
from test_scripts import keys_of, quick, world  # noqa: F401

import adapters
import export
import finetune
import formats.weights
from arguments import parse_args
from formats.added_tokens import split_tokens
from formats.files import UserError
from formats.tensor_files import read_safetensors
from formats.tokenizer import load_tokenizer
from modules import vocabulary

TEXTS = ["x <a> y", "<b><a>hello", "say <|tool|> now <a>"]


def byte_level_folder(path, **config):
    """A tokenizer.json of byte-level BPE with the 256 bytes, one merge and one special token."""
    from formats.bpe import BYTE_CHARS

    path.mkdir()
    vocab = {char: i for i, char in enumerate(BYTE_CHARS.values())} | {"he": 256}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    eos = {
        "id": 257,
        "content": "</s>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": ["h e"],
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [eos],
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": pre,
        "model": model,
    }
    (path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(params=["sentencepiece", "sentencepiece_alone", "tokenizer_json"])
def folder(request, tmp_path):
    if request.param == "tokenizer_json":
        return byte_level_folder(tmp_path / "source")
    load_tokenizer(ROOT / "demo" / "llama").save(tmp_path / "source")
    if request.param == "sentencepiece_alone":
        (tmp_path / "source" / "tokenizer_config.json").unlink()
    return tmp_path / "source"


def test_added_tokens_are_saved_with_their_ids(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    size, plain = tokenizer.vocab_size, tokenizer.encode("hello there")
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.add_tokens(["<|tool|>", tokenizer.eos_token], special=True)
    assert tokenizer.new_ids == [size, size + 1, size + 2] and tokenizer.vocab_size == size + 3
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.vocab_size == size + 3 and not again.new_ids and again.encode("hello there") == plain
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) and size in again.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    ids = again.encode(TEXTS[2])
    assert "<a>" in again.decode(ids) and "<|tool|>" not in again.decode(ids)
    assert "<|tool|>" in again.decode(ids, skip_special_tokens=False)


def test_a_token_of_the_vocabulary_keeps_its_id(tmp_path):
    tokenizer = load_tokenizer(byte_level_folder(tmp_path / "source"))
    tokenizer.add_tokens(["he", "</s>"])
    assert not tokenizer.new_ids and tokenizer.encode("the") == [*tokenizer.encode("t"), 256]


def test_split_tokens():
    assert split_tokens(None, "k") == [] and split_tokens("<a> <b>\n<a>", "k") == ["<a>", "<b>"]
    assert split_tokens(["<a b>"], "k") == ["<a b>"]
    for wrong in ([""], [" "], [3]):
        with pytest.raises(UserError, match="k: .* is not a token"):
            split_tokens(wrong, "k")


@pytest.mark.parametrize("case", ["gqa", "bias_tied"])
def test_new_rows_are_near_the_mean(case):
    model = build(case)
    before = {w.name: w.to_numpy() for w in formats.weights.named_weights(model)}
    vocabulary.resize_embeddings(model, 60, seed=3)
    after = {w.name: w.to_numpy() for w in formats.weights.named_weights(model)}
    assert model.config.vocab_size == 60 and json.loads(model.config.to_json("float32"))["vocab_size"] == 60
    names = {"model.embed_tokens.weight", "lm_head.weight"} & before.keys()
    for name, array in before.items():
        assert np.array_equal(after[name][: len(array)], array) and (name in names) == (len(after[name]) > len(array))
    assert model(tensor(np.array([[1, 57, 59]]))).shape == [1, 3, 60]
    again = build(case)
    vocabulary.resize_embeddings(again, 60, seed=3)
    assert all(np.array_equal(w.to_numpy(), after[w.name]) for w in formats.weights.named_weights(again))


def test_new_rows_have_the_covariance_of_the_old_ones():
    """As transformers' mean resizing: mean, and 1e-9 of the covariance."""
    generator = np.random.default_rng(0)
    rows = (generator.standard_normal((300, 3)) @ np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0.1]]) + 5).astype(np.float32)
    new = vocabulary.grown(rows.astype(np.float64), 300 + 20000, [1])[300:].astype(np.float64)
    scale = np.sqrt(vocabulary.NEW_ROW_VARIANCE)
    deviations = (new - rows.mean(0, dtype=np.float64)) / scale
    found, wanted = np.cov(deviations.T, bias=True), np.cov(rows.T, bias=True)
    assert np.abs((found - wanted) / np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))).max() < 0.03
    with pytest.raises(UserError, match="300 ids already"):
        vocabulary.grown(rows, 299, [1])


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def tagged(world, tmp_path_factory):  # noqa: F811
    """The world's records, their replies with two new tokens before them."""
    folder = tmp_path_factory.mktemp("tagged")
    for path in (world / "sft").iterdir():
        records = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps({**record, "tgt": f"<a> <b> {record['tgt']}"}) + "\n" for record in records]
        (folder / path.name).write_text("".join(lines))
    return folder


def run(script, keys):
    """The script's run with these keys; UserError for what a user can mend."""
    path = Path(keys["output_dir"] + ".json")
    path.write_text(json.dumps(keys))
    args = parse_args(script.Args, [str(path)])
    args.check_model()
    script.main(args)


def arguments(world, tagged, out, **changes):  # noqa: F811
    changes = {"dataset_name_or_path": str(tagged), "max_steps": 2, "learning_rate": 0.05, **changes}
    return keys_of(finetune, world, out, add_tokens="<a> <b>", **changes)


def test_lora_trains_the_rows_of_new_tokens(world, tagged, tmp_path):  # noqa: F811
    lora, out = {"lora": True, "lora_rank": 2, "save_strategy": "steps", "save_steps": 1}, tmp_path / "out"
    run(finetune, arguments(world, tagged, out, **lora))
    tensors = read_safetensors(out / "adapter_model.safetensors")
    embed = "base_model.model.model.embed_tokens.token_adapter."
    size = load_tokenizer(world / "base").vocab_size
    trained, whole = tensors[f"{embed}trainable_tokens_delta"], tensors[f"{embed}base_layer.weight"]
    assert len(whole) == size + 2 and np.abs(trained - whole[size:]).max() > 0.01
    tokenizer = load_tokenizer(out)
    assert tokenizer.token_id("<a>") == size and tokenizer.vocab_size == size + 2
    ids = tensor(np.array([tokenizer.encode("<a> hello <b>")]))
    live = adapters.from_pretrained(out)(ids).numpy()
    assert live.shape[-1] == size + 2

    # the same, resumed from its first checkpoint; with the tokens forgotten; continued; exported
    run(finetune, arguments(world, tagged, out, **lora, resume_from_checkpoint=str(out / "checkpoint-1")))
    resumed = read_safetensors(out / "adapter_model.safetensors")
    assert all(np.array_equal(resumed[name], tensors[name]) for name in tensors)
    keys = arguments(world, tagged, out, **lora, resume_from_checkpoint=True)
    with pytest.raises(UserError, match=f"holds rows for {size + 2} ids, the tokenizer has {size}; give add_tokens"):
        run(finetune, {key: value for key, value in keys.items() if key != "add_tokens"})
    keys = arguments(world, tagged, tmp_path / "more", **lora, lora_path=str(out))
    run(finetune, {key: value for key, value in keys.items() if key != "add_tokens"})
    assert load_tokenizer(tmp_path / "more").vocab_size == size + 2
    keys["add_tokens"] = "<c>"
    with pytest.raises(UserError, match="merge it first"):
        run(finetune, {**keys, "output_dir": str(tmp_path / "most")})
    run(
        export,
        {
            "model_name_or_path": str(world / "base"),
            "lora_path": str(out),
            "output_dir": str(tmp_path / "hf"),
            "format": "hf",
            "save_dtype": "float32",
        },
    )
    assert largest(adapters.from_pretrained(tmp_path / "hf")(ids).numpy(), live) < 1e-5


def test_all_weights_with_new_tokens(world, tagged, tmp_path):  # noqa: F811
    keys, out = arguments(world, tagged, tmp_path / "out"), tmp_path / "out"
    run(finetune, keys)
    size = load_tokenizer(world / "base").vocab_size
    assert json.loads((out / "config.json").read_text())["vocab_size"] == size + 2
    assert load_tokenizer(out).vocab_size == size + 2
    for changes in ({"model_name_or_path": str(world / "base"), "tokenizer_name_or_path": str(out)},):
        other = {**keys, **changes, "output_dir": str(tmp_path / "other")}
        del other["add_tokens"]
        with pytest.raises(UserError, match=rf"vocab_size {size} in config.json.*{size + 2} ids.*resize_vocab: true"):
            run(finetune, other)
        run(finetune, {**other, "resize_vocab": True})
    with pytest.raises(UserError, match="prefix_tuning: a prefix does not train the rows of new tokens"):
        run(finetune, {**keys, "output_dir": str(tmp_path / "prefix"), "prefix_tuning": True, "num_prefix_tokens": 2})


def test_a_saved_lora_against_the_arguments(world, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    keys = keys_of(
        finetune,
        world,
        out,
        lora=True,
        lora_rank=2,
        lora_alpha=6.0,
        max_steps=1,
        lora_dropout=0.1,
        lora_target_modules=["q_proj", "up_proj"],
    )
    run(finetune, keys)
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.json"):
        (out / name).unlink(missing_ok=True)  # as peft would have written the folder: the base's tokenizer is used
    more = {"lora": True, "lora_rank": 2, "max_steps": 1, "lora_path": str(out)}
    capsys.readouterr()
    run(finetune, keys_of(finetune, world, tmp_path / "more", **more))
    own = 'lora_alpha: 6.0, lora_dropout: 0.1, lora_target_modules: ["q_proj", "up_proj"]'
    assert f"{out}: its own {own}\n" in capsys.readouterr().out
    run(finetune, keys_of(finetune, world, tmp_path / "onto", model_name_or_path=str(out), max_steps=1))
    assert load_tokenizer(tmp_path / "onto").vocab_size == load_tokenizer(world / "base").vocab_size
    for key, wanted in {
        "lora_alpha": 64.0,
        "lora_dropout": 0.5,
        "rslora": True,
        "dora": True,
        "pissa": True,
        "lora_target_modules": ["q_proj"],
    }.items():
        with pytest.raises(
            UserError, match=f"holds a LoRA with {key}: .*, but the arguments ask for .*leave {key} out"
        ):
            run(finetune, keys_of(finetune, world, tmp_path / "wrong", **more, **{key: wanted}))


def test_a_base_that_is_not_on_this_disk(tmp_path):
    adapters.save_adapter(adapters.apply_lora(build()), tmp_path, base_model="someone/some-model")
    with pytest.raises(
        UserError, match="'someone/some-model' is not a folder on this disk; write .*model_name_or_path"
    ):
        adapters.from_pretrained(tmp_path)


@pytest.mark.torch
def test_transformers_and_peft_open_what_new_tokens_make(hf_python, world, tagged, tmp_path):  # noqa: F811
    size = load_tokenizer(world / "base").vocab_size
    run(finetune, arguments(world, tagged, tmp_path / "lora", lora=True, lora_rank=2))
    run(finetune, arguments(world, tagged, tmp_path / "full"))
    tokenizer = load_tokenizer(byte_level_folder(tmp_path / "source"))
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.add_tokens(["<|tool|>"], special=True)
    tokenizer.save(tmp_path / "tokenizer")
    ids = np.array([[5, size, 9, size + 1, 77]])
    np.save(tmp_path / "ids.npy", ids)
    script = """
import torch, transformers, peft
base, root, texts = sys.argv[2], sys.argv[3], sys.argv[4:]
ids, arrays = torch.from_numpy(np.load(root + "/ids.npy")), {}
def opened(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
model = opened(base)
model.resize_token_embeddings(model.config.vocab_size + 2)
with torch.no_grad():
    arrays["full"] = opened(root + "/full").eval()(input_ids=ids).logits.numpy()
    arrays["lora"] = peft.PeftModel.from_pretrained(model, root + "/lora").eval()(input_ids=ids).logits.numpy()
tokenizer = transformers.AutoTokenizer.from_pretrained(root + "/tokenizer")
for i, text in enumerate(texts):
    arrays[f"text{i}"] = np.array(tokenizer.encode(text))
    arrays[f"decoded{i}"] = np.array(tokenizer.decode(arrays[f"text{i}"], skip_special_tokens=True))
"""
    theirs = hf_python(script, world / "base", tmp_path, *TEXTS)
    for name in ("full", "lora"):
        assert largest(theirs[name], adapters.from_pretrained(tmp_path / name)(tensor(ids)).numpy()) < 1e-5
    for i, text in enumerate(TEXTS):
        assert theirs[f"text{i}"].tolist() == tokenizer.encode(text)
        assert str(theirs[f"decoded{i}"]) == tokenizer.decode(tokenizer.encode(text))
