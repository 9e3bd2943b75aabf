"""A base model is trained on a chat format, and the folder chats and stops elsewhere as here: generation_config.json,
its ids in every script, and the same greedy replies from this server, transformers and vLLM.

python -m pytest tests/test_chat_folders.py                                  # CPU, half a minute
python -m pytest tests/test_chat_folders.py --hf-python /path/to/bin/python  # five formats in transformers, and in vLLM
                                                                             # if a venv "vllm" lies beside that one
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from conftest import ROOT
from test_export import lora_folder, run
from test_openai_api import Running

import adapters
import finetune
import formats.weights
import model as M
import quantize
import serve
import trainer
from arguments import parse_args
from families import ModelConfig
from formats.bpe import BYTE_CHARS
from formats.files import UserError
from formats.generation_config import eos_ids, read_generation_config, write_generation_config
from formats.tokenizer import load_tokenizer
from serving.engine import Request
from serving.sampling import SamplingParams

DEMO = ROOT / "demo" / "llama"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def read(path):
    return json.loads(path.read_text())


# ============================================================================================ generation_config.json


def test_what_is_read(tmp_path):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    assert read_generation_config([adapter, base]) == {}
    write(
        base / "config.json", {"eos_token_id": [2, 5], "bos_token_id": 1, "hidden_size": 8, "top_p": 0.8, "top_k": None}
    )
    assert read_generation_config([adapter, base]) == {"eos_token_id": [2, 5], "bos_token_id": 1, "top_p": 0.8}
    write(base / "generation_config.json", {"temperature": 0.6, "unknown": {"a": 1}})  # has no eos: config.json's
    assert read_generation_config([base]) == {"temperature": 0.6, "unknown": {"a": 1}, "eos_token_id": [2, 5]}
    write(base / "generation_config.json", {"eos_token_id": 7})  # wins over config.json, as in transformers and vLLM
    assert read_generation_config([adapter, base]) == {"eos_token_id": 7}
    write(adapter / "generation_config.json", {"eos_token_id": [7, 9]})
    assert eos_ids(read_generation_config([adapter, base])) == [7, 9]
    assert eos_ids({}) == eos_ids({"eos_token_id": None}) == eos_ids({"eos_token_id": -1}) == []
    for wrong in ("</s>", [2, "x"], 1.5, True, {}):
        write(adapter / "generation_config.json", {"eos_token_id": wrong})
        with pytest.raises(UserError, match=r"generation_config.json: eos_token_id: an id or a list of ids"):
            read_generation_config([adapter, base])
    write(adapter / "generation_config.json", [])
    with pytest.raises(UserError, match="generation_config.json: must hold a JSON object"):
        read_generation_config([adapter, base])


def test_what_is_written(tmp_path):
    def written(content, stop_ids, **ids):
        write_generation_config(tmp_path, content, stop_ids, **ids)
        return read(tmp_path / "generation_config.json")

    assert written({}, [2], bos_id=1, pad_id=None) == {"bos_token_id": 1, "eos_token_id": 2}
    same = {"eos_token_id": [5, 2], "temperature": 0.6, "unknown": [1], "_from_model_config": True}
    assert written(same, [2, 5], bos_id=1, pad_id=0) == same
    more = written({"eos_token_id": 5, "top_k": 20, "_from_model_config": True}, [2, 5], bos_id=1)
    assert more == {"eos_token_id": [5, 2], "top_k": 20}  # transformers 4 would read config.json's in place of these
    assert written({"top_k": 20}, []) == {"top_k": 20}


# ================================================================================================ stops everywhere


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """(folder of the demo's model, prompt ids, its greedy reply, the reply's fourth token): the token is an eos of
    generation_config.json, the first's is not."""
    folder = tmp_path_factory.mktemp("stopping") / "model"
    tokenizer, model = load_tokenizer(DEMO), adapters.from_pretrained(DEMO)
    formats.weights.save_pretrained(model, folder)
    tokenizer.save(folder)
    prompt = tokenizer.apply_chat([{"role": "user", "content": "Write about a red linen dress"}])
    reply = M.generate(model, np.array([prompt]), 24)[0, len(prompt) :].tolist()
    at = next(i for i in range(3, 24) if reply[i] not in reply[:i])
    write(folder / "generation_config.json", {"eos_token_id": [2, reply[at]], "temperature": 0.3, "unknown": 1})
    return folder, prompt, reply[: at + 1], reply[at]


def engine_reply(folder, prompt, **keys):
    engine, _ = serve.build_engine(serve.Args(model_name_or_path=str(folder), num_blocks=64, dtype="float32", **keys))
    (completion,) = engine.generate([Request(prompt, SamplingParams(max_tokens=40, temperature=0.0))])[0]
    return completion.token_ids, completion.finish_reason


def test_ids_of_generation_config_end_replies(stopping, tmp_path):
    folder, prompt, reply, stop = stopping
    assert engine_reply(folder, prompt) == (reply, "stop")
    args = finetune.Args(model_name_or_path=str(folder), output_dir=str(tmp_path))
    tokenizer = trainer.setup_tokenizer(args)  # of finetune.py, dpo.py and quantize.py
    assert tokenizer.stop_ids == [2, stop]
    model = adapters.from_pretrained(folder)
    (text,) = trainer.generate_replies(model, tokenizer, [prompt], max_new_tokens=40)
    assert text == tokenizer.decode(reply[:-1]).strip()
    write(tmp_path / "t" / "config.json", read(DEMO / "config.json"))  # a tokenizer of another folder: the model's ids
    load_tokenizer(DEMO).save(tmp_path / "t")
    assert engine_reply(folder, prompt, tokenizer_name_or_path=str(tmp_path / "t")) == (reply, "stop")


def test_ids_of_config_json_end_replies_where_nothing_else_says(stopping, tmp_path):
    folder, prompt, reply, stop = stopping
    other = tmp_path / "other"
    formats.weights.save_pretrained(adapters.from_pretrained(folder), other)
    load_tokenizer(DEMO).save(other)
    (other / "generation_config.json").unlink()
    write(other / "config.json", read(other / "config.json") | {"eos_token_id": [2, stop]})
    assert engine_reply(other, prompt) == (reply, "stop")
    write(other / "generation_config.json", {"eos_token_id": 2})
    assert len(engine_reply(other, prompt)[0]) > len(reply)


def test_an_adapter_stops_as_its_base_does(stopping, tmp_path):
    folder, _, _, stop = stopping
    adapter, _ = lora_folder(tmp_path, folder)
    load_tokenizer(DEMO).save(adapter)
    (adapter / "generation_config.json").unlink()  # as peft leaves it
    _, tokenizer = serve.build_engine(serve.Args(model_name_or_path=str(adapter), num_blocks=64))
    assert tokenizer.stop_ids == [2, stop]
    merged = run(tmp_path / "merged", model_name_or_path=adapter, save_dtype="float32")
    assert read(merged / "generation_config.json") == read(folder / "generation_config.json")


def test_static_and_quantized_folders_stop_there_too(stopping, tmp_path):
    folder, prompt, reply, stop = stopping
    static = run(tmp_path / "static", model_name_or_path=folder, format="static")
    assert read(static / "static_config.json")["stop_ids"] == [2, stop]
    assert engine_reply(static, prompt, mode="static") == (reply, "stop")
    keys = {"quant_type": "a8w8", "do_ptq": True, "ptq_step": 1, "dataset_name_or_path": str(ROOT / "demo" / "sft")}
    keys |= {
        "model_name_or_path": str(folder),
        "output_dir": str(tmp_path / "quantized"),
        "max_length": 96,
        "src_length": 48,
    }
    argv = [f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in keys.items()]
    quantize.main(parse_args(quantize.Args, argv))
    assert read(tmp_path / "quantized" / "generation_config.json") == read(folder / "generation_config.json")


# ============================================================================== trained here, and chatting elsewhere

FORMATS = {  # chat_template: the family, (bos, eos, the format's own tokens …)
    "chatml": ("llama", ("<s>", "</s>", "<|im_start|>", "<|im_end|>")),
    "llama3": (
        "llama",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": ("gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "mistral-v3": ("mistral", ("<s>", "</s>", "[INST]", "[/INST]")),
    "chatml by add_special_tokens": ("llama", ("<s>", "</s>", "<|im_start|>", "<|im_end|>")),
}
ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral-v3": "</s>",
    "chatml by add_special_tokens": "<|im_end|>",
}
RECORDS = [
    {"src": ["red lamp"], "tgt": ["It is warm."]},
    {"src": ["ten coins?"], "tgt": ["Five each!"]},
    {"src": ["red lamp", "and blue?"], "tgt": ["It is warm.", "Cold, I think."]},
]
CHATS = [
    [{"role": "user", "content": "red lamp"}],
    [{"role": "user", "content": "ten coins?"}],
    [
        {"role": "user", "content": "red lamp"},
        {"role": "assistant", "content": "It is warm."},
        {"role": "user", "content": "and blue?"},
    ],
]
BASE_GENERATION = {
    "eos_token_id": 257,
    "bos_token_id": 256,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "x": 7,
}


def byte_tokenizer(folder, tokens):
    """tokenizer.json with a token per byte and these special ones behind them."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": token, **flags} for i, token in enumerate(tokens)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {char: i for i, char in enumerate(BYTE_CHARS.values())},
            "merges": [],
        },
    }
    write(folder / "tokenizer.json", spec)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[0], "eos_token": tokens[1]}
    write(folder / "tokenizer_config.json", named)


def trained(folder, chat_format):
    """A base model without a chat format -> the folder of its SFT on three conversations in this format."""
    (family, tokens), adds = FORMATS[chat_format], chat_format.endswith("add_special_tokens")
    tokens, added = (tokens[:2], tokens[2:]) if adds else (tokens, ())
    base, out = folder / "base", folder / "out"
    size = {"vocab_size": 256 + len(tokens), "hidden_size": 48, "head_dim": 32, "num_hidden_layers": 2}
    size |= {"intermediate_size": 96, "max_position_embeddings": 256, "rope_theta": 10000.0, "sliding_window": None}
    size |= {"eos_token_id": 257, "bos_token_id": 256, "pad_token_id": None}
    config = {key: value for key, value in {**tiny_models.CONFIGS[family], **size}.items() if value is not None}
    model = M.build(ModelConfig.from_dict(config | ({"sliding_window": None} if family == "mistral" else {})))
    formats.weights.init_weights(model, 1)
    formats.weights.save_pretrained(model, base)
    write(base / "generation_config.json", BASE_GENERATION)
    byte_tokenizer(base, tokens)
    (folder / "sft").mkdir(parents=True)
    (folder / "sft" / "train.json").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    keys = {
        "model_name_or_path": str(base),
        "dataset_name_or_path": str(folder / "sft"),
        "output_dir": str(out),
        "chat_template": chat_format.split()[0],
        "max_steps": 90,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 3,
        "src_length": 128,
        "max_length": 192,
        "do_train": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | ({"add_special_tokens": " ".join(added)} if added else {})
    argv = [f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in keys.items()]
    finetune.main(parse_args(finetune.Args, argv))
    return out


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("logger.draw_curves", lambda folder: None)
    monkeypatch.setattr(trainer, "measure_matmul_peak", lambda: 1e11)


def served(folder):
    """[(prompt ids, greedy reply's ids, its text)] of CHATS, the text from the HTTP server."""
    args = serve.Args(model_name_or_path=str(folder), num_blocks=64, dtype="float32")
    engine, tokenizer = serve.build_engine(args)
    prompts, params = [tokenizer.apply_chat(chat) for chat in CHATS], SamplingParams(max_tokens=60, temperature=0.0)
    ids = [completions[0].token_ids for completions in engine.generate([Request(p, params) for p in prompts])]
    server, texts = Running(engine, tokenizer), []
    try:
        for chat, reply in zip(CHATS, ids):
            body = {"messages": chat, "temperature": 0, "max_tokens": 60}
            answer = server.post("/v1/chat/completions", body)[2]
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == len(reply)
            texts.append(answer["choices"][0]["message"]["content"])
    finally:
        server.stop()
    return list(zip(prompts, ids, texts))


def check_folder(folder, chat_format):
    """It says where replies end and has the base's other keys; replies were learned and end in the format's token."""
    end = 256 + FORMATS[chat_format][1].index(ENDS[chat_format])
    eos = 257 if end == 257 else [257, end]
    assert read(folder / "generation_config.json") == BASE_GENERATION | {"eos_token_id": eos}
    source = read(folder / "config.json")
    assert (source["eos_token_id"], source["bos_token_id"]) == (257, 256)
    assert (folder / "chat_template.jinja").is_file()
    found = served(folder)
    assert [text.strip() for *_, text in found] == ["It is warm.", "Five each!", "Cold, I think."]
    assert all(reply[-1] == end for _, reply, _ in found)
    return found


def test_sft_of_a_base_model_on_chatml_chats_and_stops(tmp_path, quick):
    folder = trained(tmp_path, "chatml")
    found = check_folder(folder, "chatml")
    again = run(tmp_path / "again", model_name_or_path=folder, save_dtype="float32")
    assert read(again / "generation_config.json") == read(folder / "generation_config.json")
    assert (again / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    assert served(again) == found


TRANSFORMERS = """
import json, pathlib, torch, transformers
arrays, chats = {}, json.loads(pathlib.Path(sys.argv[2]).read_text())
for folder in map(pathlib.Path, sys.argv[3:]):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for i, chat in enumerate(chats):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**prompt, do_sample=False, max_new_tokens=60)[0]
        length = prompt["input_ids"].shape[1]
        arrays[f"{folder.parent.name} {i} prompt"] = out[:length]
        arrays[f"{folder.parent.name} {i} reply"] = out[length:]
        arrays[f"{folder.parent.name} {i} text"] = np.array(tokenizer.decode(out[length:], skip_special_tokens=True))
    arrays[f"{folder.parent.name} temperature"] = np.array(model.generation_config.temperature)
"""

VLLM = """
import json, os, pathlib, sys
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
import vllm
chats, answers = json.loads(pathlib.Path(sys.argv[1]).read_text()), {}
for folder in map(pathlib.Path, sys.argv[2:]):
    model = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=192)
    outputs = model.chat(chats, vllm.SamplingParams(temperature=0.0, max_tokens=60), use_tqdm=False)
    answers[folder.parent.name] = [[list(o.prompt_token_ids), list(o.outputs[0].token_ids), o.outputs[0].text]
                                   for o in outputs]
    del model
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def chat_folders(tmp_path_factory, request):
    """({format: folder of its SFT}, {format: what served() gives}, chats.json)."""
    if request.config.getoption("--hf-python") is None:
        pytest.skip("needs --hf-python: a Python with torch and transformers")
    folder = tmp_path_factory.mktemp("formats")
    write(folder / "chats.json", CHATS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logger.draw_curves", lambda folder: None)
        patch.setattr(trainer, "measure_matmul_peak", lambda: 1e11)
        folders = {name: trained(folder / name, name) for name in FORMATS}
    return folders, {name: check_folder(path, name) for name, path in folders.items()}, folder / "chats.json"


@pytest.mark.torch
def test_transformers_chats_as_this_server_does(chat_folders, hf_python):
    """The same prompt ids, greedy ids with the stop token, and text, for every format."""
    folders, ours, chats = chat_folders
    theirs = hf_python(TRANSFORMERS, chats, *folders.values())
    for name, replies in ours.items():
        for i, (prompt, reply, text) in enumerate(replies):
            assert theirs[f"{name} {i} prompt"].tolist() == prompt, (name, i)
            assert theirs[f"{name} {i} reply"].tolist() == reply and str(theirs[f"{name} {i} text"]) == text, (name, i)
        assert theirs[f"{name} temperature"] == 0.6
        lengths = [f"{len(prompt)} + {len(reply)}" for prompt, reply, _ in replies]
        print(f"| {name} | {FORMATS[name][0]} | {', '.join(lengths)} | `{ENDS[name]}` | equal |")


@pytest.mark.torch
def test_vllm_chats_as_this_server_does(chat_folders, tmp_path, request):
    folders, ours, chats = chat_folders
    python = Path(request.config.getoption("--hf-python")).parents[2] / "vllm" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no vLLM at {python}")
    command = [python, "-c", VLLM, chats, *folders.values()]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, replies in json.loads(done.stdout.splitlines()[-1]).items():
        assert [tuple(reply) for reply in replies] == ours[name], name
