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


# ------------------------------ against the tokenizers library ------------------------------
# Each row trains a small vocabulary over there with these parts of a tokenizer.json, and answers for every string.

BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK_WORDS = [
    "[\r\n]", "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ]+",
    "\\s?[!-/:-~！-／：-～‘-‟　-。]+", "\\s+$", "[一-龥ࠀ-一가-퟿]+"]  # fmt: skip


def sequence(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def bytes_of(use_regex=False, prefix=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


def metaspace(scheme, split):
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}


def replace(old, new):
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def template(token, number):
    parts = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": parts, "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": known}  # fmt: skip


SPACES_BACK = [replace("\u2581", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
PIPELINES = {  # name: normalizer, pre_tokenizer, post_processor, decoder, keys of the model
    "gpt2": (None, bytes_of(True), bytes_of(), bytes_of(), {}),
    "prefix space": (None, bytes_of(True, True), None, bytes_of(), {}),
    "qwen2": ({"type": "NFC"}, sequence("pretokenizers", split(QWEN_WORDS), bytes_of()), bytes_of(), bytes_of(), {}),
    "llama3": (
        None, sequence("pretokenizers", split(LLAMA3_WORDS), bytes_of()),
        sequence("processors", bytes_of(), template("<s>", 1)), bytes_of(), {"ignore_merges": True}),
    "bloom": (None, sequence("pretokenizers", split(BLOOM_WORDS), bytes_of()), bytes_of(), bytes_of(), {}),
    "deepseek": (
        sequence("normalizers"),
        sequence("pretokenizers", *map(split, DEEPSEEK_WORDS), {"type": "Digits", "individual_digits": True}, bytes_of()),
        bytes_of(), bytes_of(), {}),
    "splits": (
        {"type": "NFKC"},
        sequence("pretokenizers", split(",", "MergedWithPrevious", kind="String"), split(r"\s+", "MergedWithNext"),
                 split("[.;]", "Removed"), split(r"\p{L}+|\P{L}+", "Removed", True),
                 {"type": "Digits", "individual_digits": False}, bytes_of()),
        None, bytes_of(), {}),
    "mistral": (
        None, metaspace("first", False), template("<s>", 1), sequence("decoders", *SPACES_BACK, STRIP),
        {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}),
    "llama2": (
        sequence("normalizers", {"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")), None,
        template("<s>", 1), sequence("decoders", *SPACES_BACK, STRIP),
        {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}),
    "gemma": (
        replace(" ", "\u2581"), split(" ", "MergedWithPrevious", kind="String"), template("<s>", 1),
        sequence("decoders", *SPACES_BACK), {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}),
    "unknown characters": (
        {"type": "NFD"}, metaspace("always", True), None, metaspace("always", True),
        {"fuse_unk": True, "unk_token": "<unk>"}),
    "each unknown character": ({"type": "NFKD"}, metaspace("never", True), None, metaspace("never", True), {"unk_token": "<unk>"}),
}  # fmt: skip
ADDED = [  # content, special, lstrip, rstrip, normalized
    ("<unk>", True, False, False, False), ("<s>", True, False, False, False), ("</s>", True, False, True, False),
    ("<|call|>", False, False, False, False), ("<|call|>s", False, True, True, False), ("tool é", False, False, False, True),
]  # fmt: skip
THERE = """
import json, random
from pathlib import Path
from tokenizers import Tokenizer, trainers, AddedToken
folder, arrays = Path(sys.argv[2]), {}
job = json.loads((folder / "job.json").read_text())
for name, (normalizer, pre_tokenizer, post_processor, decoder, keys) in job["pipelines"].items():
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder,
            "model": {"type": "BPE", "vocab": {}, "merges": []}}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    byte_level = "ByteLevel" in json.dumps(pre_tokenizer)
    pieces = [f"<0x{b:02X}>" for b in range(256)] if keys.get("byte_fallback") else []
    from tokenizers.pre_tokenizers import ByteLevel
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[token[0] for token in job["added"][:3]] + pieces,
                                  initial_alphabet=ByteLevel.alphabet() if byte_level else [], show_progress=False)
    tokenizer.train_from_iterator(job["corpus"], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["model"] |= keys
    spec["post_processor"] = post_processor
    spec["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    for content, special, lstrip, rstrip, normalized in job["added"]:
        token = AddedToken(content, lstrip=lstrip, rstrip=rstrip, normalized=normalized, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    (folder / name).mkdir()
    tokenizer.save(str(folder / name / "tokenizer.json"))
    answers = []
    for text in job["strings"]:
        ids, bare = tokenizer.encode(text).ids, tokenizer.encode(text, add_special_tokens=False).ids
        answers.append([ids, bare, tokenizer.decode(ids, skip_special_tokens=False), tokenizer.decode(ids)])
    (folder / name / "answers.json").write_text(json.dumps(answers))
"""
WORDS = """the lamp's water we'll don't I'M 2023 3.14 1,000,000 人工智能 你好，世界！ Привет мир नमस्ते สวัสดี안녕 Ångström naïve ﬁ ㍿ Ⅷ ½
été tool_é tool é <s> </s> <|call|> <|call|>s <unk> x86 camelCase snake_case == --> !!! ... 😀👨‍👩‍👧 e\u0301 \u2581 ſt K""".split() + ["tool é"]
GAPS = [" ", " ", " ", "", "  ", "   ", "\n", "\r\n", "\t", "\n\n ", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\x1f", "\u200b", "\x00"]


def odd_strings(count, seed):
    """Words, white space of every kind and characters from anywhere in Unicode, mixed but for those of Unicode 13
    and 14 that the library's NFKC does not know."""
    random_ = random.Random(seed)
    known = [chr(i) for i in {*range(0x30000)} - {*range(0x10780, 0x107C0), *range(0x1FBF0, 0x1FBFA)} if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    out = ["", " ", "\n", "  \n  x  ", "a" * 300, "\u2581", " \u2581 ", "<s>", " <s>x</s>  y"]
    while len(out) < count:
        parts = []
        for _ in range(random_.randint(1, 12)):
            kind = random_.random()
            parts.append(random_.choice(WORDS) if kind < 0.75 else "".join(random_.choices(known, k=random_.randint(1, 4))))
            parts.append(random_.choice(GAPS))
        out.append("".join(parts))
    return out


@pytest.mark.torch
def test_tokenizer_json_equals_the_library(hf_python, tmp_path):
    job = {"pipelines": PIPELINES, "added": ADDED, "corpus": odd_strings(600, 0), "strings": odd_strings(3000, 1)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    hf_python(THERE, tmp_path)
    for name in PIPELINES:
        tokenizer = load_tokenizer(tmp_path / name)
        answers = json.loads((tmp_path / name / "answers.json").read_text())
        for text, (ids, bare, shown, plain) in zip(job["strings"], answers, strict=True):
            assert (tokenizer.encode(text), tokenizer.encode(text, False)) == (ids, bare), (name, text)
            assert (tokenizer.decode(ids, False), tokenizer.decode(ids)) == (shown, plain), (name, text)
