"""data.py's tokenizers: ids and text equal those of the reference software; BPE against a naive oracle; bad files.

    python -m pytest tests/test_tokenizer.py                            CPU, no network, under a minute
    python -m pytest tests/test_tokenizer.py --hf-python .../python     also against the `tokenizers` library, run there
    python tests/bench_tokenizer.py                                     the table: strings tried, mismatches, speed

Vocabularies of real models are read from ../shared where it is present, and never copied. The others are made here."""

import base64
import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import pytest

import data
from data import BPE, BYTE_CHARS, GPT2_WORDS, LLAMA3_WORDS, QWEN_WORDS, UserError, load_tokenizer, split_step

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO.parent / "shared" / "golden" / "tokenizers"

# ------------------------------ the reference's ids and text ------------------------------
# name: (folder, golden file, files of the folder to use, tokenizer_config.json or None for the folder's own,
#        mode of the golden -> (add_special_tokens, special_in_text))
NONE, SPECIAL = (False, None), (True, None)
SPM = ["tokenizer.model"]
LEGACY, MODERN = {"legacy": True}, {"legacy": False}
CASES = {
    "llama2": ("llama2", "golden.json", SPM, MODERN, {"hf_legacy_false": NONE, "hf_with_bos": SPECIAL}),
    "llama2 legacy": ("llama2", "golden.json", SPM, LEGACY, {"hf_legacy_true": NONE, "raw": (False, False)}),
    "mistral_v1": ("mistral_v1", "golden.json", SPM, MODERN, {"hf_legacy_false": NONE, "hf_with_bos": SPECIAL}),
    "mistral_v1 legacy": ("mistral_v1", "golden.json", SPM, LEGACY, {"hf_legacy_true": NONE, "raw": (False, False)}),
    "mistral_v3": ("mistral_v3", "golden.json", SPM, MODERN, {"hf_legacy_false": NONE, "hf_with_bos": SPECIAL}),
    "mistral_v3 legacy": ("mistral_v3", "golden.json", SPM, LEGACY, {"hf_legacy_true": NONE, "raw": (False, False)}),
    "mistral_v3 json": ("mistral_v3", "golden_tokenizer_json.json", None, None, {"hf": NONE, "hf_with_special": SPECIAL}),
    "internlm1": ("internlm1", "golden.json", SPM, MODERN, {"hf_legacy_false": NONE, "hf_with_bos": SPECIAL}),
    "internlm1 legacy": ("internlm1", "golden.json", SPM, LEGACY, {"hf_legacy_true": NONE, "raw": (False, False)}),
    "internlm1 own class": (
        "internlm1", "golden_internlm_tokenizer.json", SPM, {"tokenizer_class": "InternLMTokenizer"},
        {"hf": NONE, "hf_with_special": SPECIAL}),
    "baichuan2": ("baichuan2", "golden.json", None, None, {"hf": NONE, "raw": (False, False)}),
    "baichuan2 bos": ("baichuan2", "golden.json", None, {"add_bos_token": True}, {"hf_add_bos_token": SPECIAL}),
    "chatglm1": ("chatglm1_synthetic", "golden.json", None, None, {"hf": NONE, "hf_with_special": SPECIAL}),
    "chatglm2": (
        "chatglm2_3", "golden_chatglm2.json", SPM, "tokenizer_config.chatglm2.json",
        {"hf": NONE, "hf_with_special": SPECIAL, "raw": NONE}),
    "chatglm3": (
        "chatglm2_3", "golden_chatglm3.json", SPM, "tokenizer_config.chatglm3.json",
        {"hf": NONE, "hf_with_special": SPECIAL, "raw": NONE, "hf_encode_special_tokens": (False, True)}),
    "glm4 pattern": (
        "qwen1", "../glm4_logic/golden.json", ["qwen.tiktoken"], {"tokenizer_class": "ChatGLM4Tokenizer"},
        {"tiktoken": (False, False)}),
    "qwen1": ("qwen1", "golden.json", None, None, {"hf": NONE, "tiktoken_no_special": (False, False)}),
    "qwen2": ("qwen2", "golden.json", None, None, {"hf": NONE}),
    "gpt2": ("gpt2", "golden.json", None, None, {"plain": (False, False), "hf": NONE}),
    "opt": ("opt", "golden.json", None, None, {"plain": (False, False), "hf": NONE, "hf_with_bos": SPECIAL}),
    "llama3": ("llama3", "golden.json", None, {"add_eos_token": True},
               {"no_special": (False, False), "all_special": NONE, "bos_eos": (True, False)}),
}  # fmt: skip


def golden_tokenizer(name, folder):
    """Links a case's files into `folder` -> (Tokenizer, golden, modes)."""
    source, golden, files, config, modes = CASES[name]
    source = GOLDEN / source
    if not source.is_dir():
        pytest.skip(f"{source} is not beside this repository")
    for path in source.iterdir():
        if files is None and "golden" not in path.name or files and path.name in files:
            target = "tokenizer.model" if name == "glm4 pattern" else path.name
            os.symlink(path, folder / target)
    if isinstance(config, str):
        shutil.copyfile(source / config, folder / "tokenizer_config.json")
    elif config is not None:
        own = folder / "tokenizer_config.json"
        config = (json.loads(own.read_text()) if own.exists() else {}) | config
        own.unlink(missing_ok=True)
        own.write_text(json.dumps(config))
    return load_tokenizer(folder), json.loads((source / golden).read_text()), modes


def mismatches(tokenizer, golden, modes):
    """[(mode, text, what, ours, the reference's)...] over every string of a golden."""
    found = []
    for case in golden["cases"]:
        for mode, (special, in_text) in modes.items():
            ids, want = tokenizer.encode(case["text"], special, in_text), case[mode]
            if mode == "tiktoken_no_special":  # without the family's NFC
                ids = tokenizer.engine.encode(case["text"], True)
            if ids != want["ids"]:
                found.append((mode, case["text"], "ids", ids, want["ids"]))
            # Raw sentencepiece drops the leading space of its own only; transformers' legacy class one more.
            shown = tokenizer.engine.sp.decode(want["ids"]) if mode == "raw" else tokenizer.decode(want["ids"], False)
            if shown != want["decoded"] and "\u2581" not in want["decoded"]:
                found.append((mode, case["text"], "text", shown, want["decoded"]))
    return found


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, tmp_path):
    tokenizer, golden, modes = golden_tokenizer(name, tmp_path)
    assert mismatches(tokenizer, golden, modes) == [] and len(golden["cases"]) == 60
