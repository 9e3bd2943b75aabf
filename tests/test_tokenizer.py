"""data.py's tokenizers: ids and text equal those of the reference software; BPE against a naive oracle; bad files.

    python -m pytest tests/test_tokenizer.py                            CPU, no network, under a minute python -m
    pytest tests/test_tokenizer.py --hf-python .../python     also against the `tokenizers` library, run there python
    tests/bench/bench_tokenizer.py                                     the table: strings tried, mismatches, speed

Vocabularies of real models are read from ../shared where it is present, and never copied. The others are made here."""

import base64
import io
import json
import os
import random
import shutil
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from formats.bpe import BPE, BYTE_CHARS, GPT2_WORDS
from formats.files import UserError
from formats.tokenizer import LLAMA3_WORDS, QWEN_WORDS, StreamDecoder, clean_up, load_tokenizer
from formats.tokenizer_json import split_step

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO.parent / "shared" / "golden" / "tokenizers"

# ------------------------------ parts of a tokenizer.json ------------------------------


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
    return {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": known,
    }


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
    "mistral_v3 json": ("mistral_v3", "golden_tokenizer_json.json", None, None, {"hf": NONE,
        "hf_with_special": SPECIAL}),
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
            if mode == "raw":  # the text of sentencepiece itself; the family's is in the other modes
                continue
            shown = tokenizer.decode(want["ids"], False)
            text = want["decoded"]
            if "\u2581" in text:  # transformers prints these for a run of spaces that loses its first; ours are spaces
                shown, text = shown.lstrip(), text.lstrip("\u2581 ")
            if shown != text:
                found.append((mode, case["text"], "text", shown, want["decoded"]))
    return found


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, tmp_path):
    tokenizer, golden, modes = golden_tokenizer(name, tmp_path)
    assert mismatches(tokenizer, golden, modes) == [] and len(golden["cases"]) == 60
    for case in golden["cases"]:
        decoder, text = tokenizer.stream_decoder(False), case["text"]
        ids = tokenizer.encode(text)
        pieces = [decoder.push(i) for i in ids] + [decoder.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, False) and "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_every_special_id_is_the_reference_s(tmp_path):
    for name in ("chatglm2", "chatglm3", "chatglm1", "qwen1", "llama3", "gpt2", "opt"):
        (folder := tmp_path / name).mkdir()
        tokenizer, golden, _ = golden_tokenizer(name, folder)
        known = golden.get("special_tokens") or golden.get("special") or golden.get("special_first_12") or {}
        renamed = {"<bos>": tokenizer.bos_token, "<eos>": tokenizer.eos_token}
        renamed |= {"<pad>": tokenizer.pad_token} if name.startswith("chatglm") else {}
        for text, i in known.items():
            assert tokenizer.token_id(renamed.get(text, text)) == i, (name, text)
        assert tokenizer.vocab_size == golden.get("len", golden.get("n_words"))
        for key, ours in (
            ("eos", tokenizer.eos_token_id),
            ("bos", tokenizer.bos_token_id),
            ("pad", tokenizer.pad_token_id),
        ):
            assert ours == golden.get(key, ours) or golden[key] is None
    batch = json.loads((GOLDEN / "chatglm1_synthetic" / "batch.json").read_text())
    tokenizer = load_tokenizer(tmp_path / "chatglm1")
    assert tokenizer.encode("你好") + tokenizer.encode("世界", False) + [90] == batch["pair_encode(你好,世界)"]
    for text, row in zip(batch["texts"], batch["padded_batch"]["input_ids"]):
        assert [i for i in row if i != tokenizer.pad_token_id] == tokenizer.encode(text)


def test_several_files_of_one_folder_give_the_same_ids(tmp_path):
    """Qwen2's and GPT-2's vocab.json + merges.txt as a tokenizer.json; Mistral v3's two files but for what is said."""
    for name, words, normalizer in (("qwen2", QWEN_WORDS, {"type": "NFC"}), ("gpt2", GPT2_WORDS, None)):
        (folder := tmp_path / name).mkdir()
        tokenizer, golden, _ = golden_tokenizer(name, folder)
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        model = {"type": "BPE", "vocab": json.loads((folder / "vocab.json").read_text()), "merges": merges}
        spec = json_file(model, normalizer, sequence("pretokenizers", split(words), bytes_of()), None, bytes_of())
        added = [{"id": i, "content": text, "special": True} for text, i in tokenizer.added.items()]
        (folder / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": added}))
        again = load_tokenizer(folder)
        assert (tokenizer.kind, again.kind) == ("merges", "json")
        for text in [case["text"] for case in golden["cases"]] + odd_strings(300, 2):
            assert again.encode(text) == tokenizer.encode(text)
    (folder := tmp_path / "mistral").mkdir()
    (other := tmp_path / "mistral json").mkdir()
    (spm, golden, _), (fast, _, _) = golden_tokenizer("mistral_v3", folder), golden_tokenizer("mistral_v3 json", other)
    texts = [case["text"] for case in golden["cases"]]
    differ = [text for text in texts if spm.encode(text) != fast.encode(text)]
    assert fast.kind == "json" and all(text.startswith(" ") or "[INST]" in text for text in differ) and len(differ) == 5


# ------------------------------ made-up vocabularies ------------------------------


def json_file(model, normalizer=None, pre_tokenizer=None, post_processor=None, decoder=None):
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def trained(merges=300, texts=None):
    """(vocab, merges) of a byte-level BPE, by the book: the most frequent pair becomes a symbol, again and again."""
    import regex

    words = [
        list(word.encode().decode("latin-1").translate(BYTE_CHARS))
        for text in texts or odd_strings(200, 3)
        for word in regex.findall(GPT2_WORDS, text)
    ]
    vocab, pairs = {char: i for i, char in enumerate(BYTE_CHARS.values())}, []
    while len(pairs) < merges:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        (left, right), _ = max(counts.items(), key=lambda item: (item[1], item[0]))
        pairs.append((left, right))
        vocab[left + right] = len(vocab)
        words = [naive(word, {(left, right): 0}.get) for word in words]
    return vocab, pairs


def naive(symbols, rank):
    """The definition: join the leftmost of the neighbors with the lowest rank, until none has one. O(n^2)."""
    symbols = list(symbols)
    while True:
        ranked = [(r, i) for i, pair in enumerate(zip(symbols, symbols[1:])) if (r := rank(pair)) is not None]
        if not ranked:
            return symbols
        _, i = min(ranked)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@pytest.fixture(scope="module")
def small():
    return trained()


def write_folder(folder, small, kind, config=None):
    """The small vocabulary as vocab.json + merges.txt, tokenizer.json or tiktoken text, with <|endoftext|> after it."""
    vocab, merges = small
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "merges":
        (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
        )
    elif kind == "json":
        model = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]}
        spec = json_file(model, None, bytes_of(True), None, bytes_of())
        spec["added_tokens"] = [{"id": len(vocab), "content": "<|endoftext|>", "special": True}]
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    else:
        back = {char: b for b, char in BYTE_CHARS.items()}
        lines = [f"{base64.b64encode(bytes(back[c] for c in symbol)).decode()} {i}\n" for symbol, i in vocab.items()]
        (folder / "qwen.tiktoken").write_text("".join(lines))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = ["merges", "json", "tiktoken"]


def test_merging_equals_the_definition(small):
    vocab, merges = small
    shuffled = random.Random(4).sample(merges, len(merges))  # ranks that make long symbols before short ones
    for pairs in (merges, shuffled, None):
        ranks = pairs and {pair: i for i, pair in enumerate(pairs)}
        bpe = BPE(vocab, ranks, [])
        for text in odd_strings(400, 5) + ["ab" * 40, "the the the", " " * 50]:
            word = list(text[:60].encode().decode("latin-1").translate(BYTE_CHARS))
            assert bpe._joined(list(word)) == naive(word, bpe.rank)


def test_three_forms_of_one_vocabulary(small, tmp_path):
    forms = {kind: load_tokenizer(write_folder(tmp_path / kind, small, kind)) for kind in KINDS}
    assert [tokenizer.kind for tokenizer in forms.values()] == KINDS
    for text in odd_strings(1000, 6):
        ids = forms["merges"].encode(text)
        assert forms["json"].encode(text) == ids and forms["merges"].decode(ids) == text
        own = forms["tiktoken"].encode(text)  # Qwen's words, NFC
        assert forms["tiktoken"].decode(own) == unicodedata.normalize("NFC", text)
    ids = forms["merges"].encode("the lamp<|endoftext|>the lamp")
    assert ids.count(len(small[0])) == 1 and forms["merges"].decode(ids) == "the lampthe lamp"
    plain = forms["merges"].encode("<|endoftext|>", special_in_text=False)
    assert len(plain) > 1 and forms["merges"].decode(plain) == "<|endoftext|>"


def test_streaming_equals_decoding_the_bytes(small, tmp_path):
    random_ = random.Random(7)
    for kind in KINDS:
        tokenizer = load_tokenizer(write_folder(tmp_path / kind, small, kind))
        sequences = [tokenizer.encode(text) for text in odd_strings(100, 8)]
        sequences += [random_.choices(range(len(small[0])), k=30) for _ in range(200)]
        for number, ids in enumerate(sequences):
            decoder = tokenizer.stream_decoder()
            pieces = [decoder.push(i) for i in ids]
            whole = b"".join(map(tokenizer.piece_bytes, ids)).decode("utf-8", "replace")
            assert "".join(pieces) + decoder.flush() == whole == tokenizer.decode(ids)
            assert number >= 100 or not any("\ufffd" in piece for piece in pieces) or "\ufffd" in whole
        decoder = tokenizer.stream_decoder()
        pieces = [decoder.push(i) for i in tokenizer.encode("\U0002c0ff")]
        assert [piece for piece in pieces if piece] == ["\U0002c0ff"] and len(pieces) > 1


def test_streamed_clean_up_is_that_of_the_whole_text():
    class Plain:
        lead, gap, bare, cleans_up, special_ids, added_ids = 0, None, False, True, (), ()
        engine = type("Engine", (), {"errors": "replace", "byte_ids": ()})

        @staticmethod
        def piece_bytes(token_id):
            return chr(token_id).encode()

    random_ = random.Random(9)
    for _ in range(3000):
        text = "".join(random_.choices("  ''nvretmsx.,?!", k=random_.randint(0, 25)))
        decoder = StreamDecoder(Plain)
        assert "".join([decoder.push(ord(c)) for c in text]) + decoder.flush() == clean_up(text)


def test_long_words_and_runs_take_about_linear_time(small):
    vocab, merges = small
    ranks, random_ = {pair: i for i, pair in enumerate(merges)}, random.Random(10)
    steps = [split_step(GPT2_WORDS), split_step(LLAMA3_WORDS), split_step(QWEN_WORDS), split_step(r"\s+$")]

    def seconds(text):
        start = time.perf_counter()
        for step in steps:
            bpe = BPE(vocab, ranks, [step])
            assert sum(len(bpe.piece_bytes(i)) for i in bpe.encode(text, True)) == len(text)
        return time.perf_counter() - start

    for make in (
        lambda n: "a" * n,
        lambda n: "".join(random_.choices("abcdefghij", k=n)),
        lambda n: " " * n + "x",
        lambda n: " \n" * (n // 2),
        lambda n: "7" * n,
        lambda n: "!?" * (n // 2),
        lambda n: " a" * (n // 2),
    ):
        assert seconds(make(40_000)) < 40 * max(seconds(make(4_000)), 0.01)  # ten times the text; 100 if quadratic


def test_cache_of_words_is_bounded(small):
    bpe = BPE(small[0], {pair: i for i, pair in enumerate(small[1])}, [split_step(GPT2_WORDS)])
    bpe._ids_of_word.WORDS = 50
    text = " ".join(f"word{i}" for i in range(400)) + " " + "z" * 1000
    first = bpe.encode(text, True)
    assert len(bpe._ids_of_word) <= 50 and max(map(len, bpe._ids_of_word)) <= 64 and bpe.encode(text, True) == first


def test_bos_eos_and_padding(small, tmp_path):
    end = len(small[0])
    for number, (kind, config, head, tail) in enumerate(
        (
            ("merges", {}, [], []),
            ("merges", {"add_bos_token": True, "add_eos_token": True}, [end], [end]),
            ("json", {"bos_token": "<|endoftext|>"}, [], []),
            ("json", {"bos_token": {"content": "<|endoftext|>"}, "tokenizer_class": "LlamaTokenizerFast"}, [end], []),
            (
                "json",
                {"bos_token": "<|endoftext|>", "tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
                [],
                [],
            ),
            ("json", {"eos_token": "<|endoftext|>", "add_eos_token": True}, [], [end]),
            ("tiktoken", {"tokenizer_class": "QWenTokenizer"}, [], []),
        )
    ):
        tokenizer = load_tokenizer(write_folder(tmp_path / str(number), small, kind, config))
        assert tokenizer.encode("the") == head + tokenizer.encode("the", False) + tail
        assert 0 <= tokenizer.pad_token_id < tokenizer.vocab_size
    folder = write_folder(tmp_path / "opt", small, "merges")
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {symbol: i + 4 for symbol, i in small[0].items()}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = load_tokenizer(folder)  # no tokenizer_config.json: known by its first line
    assert tokenizer.encode("the")[0] == 2 == tokenizer.eos_token_id and tokenizer.pad_token_id == 1


def test_saved_files_open_again(small, tmp_path):
    for kind in KINDS:
        source = write_folder(tmp_path / kind, small, kind, {"eos_token": "<|endoftext|>"})
        tokenizer = load_tokenizer(source)
        tokenizer.save(tmp_path / "copy" / kind)
        again = load_tokenizer(tmp_path / "copy" / kind)
        assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in (tmp_path / "copy" / kind).iterdir())
        assert again.encode("the lamp<|endoftext|>") == tokenizer.encode("the lamp<|endoftext|>")
        assert again.stop_ids == tokenizer.stop_ids == [len(small[0])]


# ------------------------------ made-up sentencepiece models ------------------------------


def write_sentencepiece(folder, name="tokenizer.model", config=None, **options):
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    random_ = random.Random(11)
    texts = [" ".join(random_.choices(WORDS[:12] + WORDS[14:20], k=8)) for _ in range(300)]
    settings = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.99,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    (folder / name).write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def test_chatglm2_and_3(tmp_path):
    config = {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm2-6b"}
    two = load_tokenizer(write_sentencepiece(tmp_path / "2", config=config))
    three = load_tokenizer(write_sentencepiece(tmp_path / "3", config=config | {"name_or_path": "THUDM/chatglm3-6b"}))
    size = two.engine.size
    assert two.head == three.head == [size + 1, size + 3] and (two.vocab_size, three.vocab_size) == (size + 5, size + 9)
    text = "people say <|user|> sop"
    assert three.encode(text) == three.head + three.engine.sp.encode(text)  # nothing in the text is special...
    assert three.encode(text, True, True).count(three.token_id("<|user|>")) == 1  # ...unless asked for
    assert (
        two.decode(two.encode("the lamp"), False) == "the lamp" and three.decode(three.encode("the lamp")) == "the lamp"
    )
    assert three.decode(three.encode("the lamp"), False) == "[gMASK]sop the lamp"


def test_chatglm_6b(tmp_path):
    blanks = ["<n>", "<|tab|>", *(f"<|blank_{i}|>" for i in range(2, 81))]
    special = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
    options = {"user_defined_symbols": blanks + special, "pad_id": 3}
    config = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 20}
    old = load_tokenizer(write_sentencepiece(tmp_path / "old", "ice_text.model", config, **options))
    new = load_tokenizer(
        write_sentencepiece(tmp_path / "new", "ice_text.model", config | {"num_image_tokens": 0}, **options)
    )
    text = "def f(x):\n\treturn  x" + " " * 85 + "y"
    ids = new.encode(text, False)
    assert old.encode(text, False) == [i + 20 for i in ids] and old.decode([3]) == "<image_3>"
    pieces = [new.engine.sp.id_to_piece(i) for i in ids]
    assert {"<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "<|blank_5|>"} <= set(pieces)
    assert new.decode(ids) == text and new.encode("the") == new.encode("the", False) + [
        new.token_id("[gMASK]"),
        new.token_id("<sop>"),
    ]
    assert new.eos_token_id == new.token_id("<eop>") and new.decode(new.encode("the lamp .")) == "the lamp."


def test_legacy_puts_a_space_after_special_tokens(tmp_path):
    for legacy in (False, True):
        config = {"legacy": legacy, "tokenizer_class": "LlamaTokenizer"}
        tokenizer = load_tokenizer(write_sentencepiece(tmp_path / str(legacy), config=config))
        ids = tokenizer.encode("<s>the</s>", False)
        assert (ids[1:-1] == tokenizer.encode("the", False)) == legacy
        assert tokenizer.decode(ids, False) == ("<s> the</s>" if legacy else "<s>the</s>")
        decoder = tokenizer.stream_decoder(False)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids, False)


def test_broken_bytes_are_decoded_as_sentencepiece_does(tmp_path):
    tokenizer, random_ = load_tokenizer(write_sentencepiece(tmp_path, config={"legacy": True})), random.Random(12)
    for _ in range(300):
        ids = random_.choices(range(3, tokenizer.engine.size), k=12) + random_.choices(
            sorted(tokenizer.engine.byte_ids), k=5
        )
        want = tokenizer.engine.sp.decode(ids)
        assert tokenizer.decode(ids) in (want, want.removeprefix(" "))  # transformers drops one more


# ------------------------------ bad files ------------------------------


def refused(folder):
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": {"type": "Unigram"}}, 'tokenizer.json: model: "Unigram" is not supported; known are BPE'),
        ({"model": {"type": "WordPiece"}}, 'tokenizer.json: model: "WordPiece" is not supported'),
        ({"model": None}, "tokenizer.json: an object with a model is wanted"),
        (
            {"normalizer": {"type": "Lowercase"}},
            'tokenizer.json: normalizer: "Lowercase" is not supported; known are NFC',
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Precompiled"}]}},
            'normalizer.normalizers[1]: "Precompiled" is not supported',
        ),
        ({"normalizer": {"type": "NFC", "strength": 3}}, "normalizer: unknown key 'strength' of NFC"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "a"}}},
            "normalizer.content: a str is wanted, found nothing",
        ),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, 'pre_tokenizer: "BertPreTokenizer" is not supported'),
        (
            {"pre_tokenizer": sequence("pretokenizers", bytes_of(), split("a"))},
            "ByteLevel must come last; Split follows",
        ),
        ({"pre_tokenizer": split("a", "Contiguous")}, 'pre_tokenizer.behavior: "Contiguous" is not supported'),
        ({"pre_tokenizer": sequence("pretokenizers", split("a(b"), bytes_of())}, "cannot read the pattern 'a(b'"),
        ({"pre_tokenizer": split(r"\h+")}, r"'\\h' in the pattern"),
        ({"pre_tokenizer": split("(?m:a.b)")}, "'(?m:' in the pattern"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": "a", "behavior": "Isolated"}},
            "pre_tokenizer.pattern: a dict is wanted",
        ),
        ({"pre_tokenizer": None}, "pre_tokenizer and decoder must both be ByteLevel or both not"),
        ({"post_processor": {"type": "RobertaProcessing"}}, 'post_processor: "RobertaProcessing" is not supported'),
        (
            {"post_processor": template("<s>", 1) | {"special_tokens": {}}},
            "post_processor.single[0]: a SpecialToken of",
        ),
        ({"decoder": None}, "decoder: ByteLevel, or a Sequence with Metaspace"),
        ({"decoder": {"type": "WordPiece"}}, 'decoder: "WordPiece" is not supported'),
        ({"added_tokens": [{"content": "x"}]}, "added_tokens[0]: an object with content and id is wanted"),
        ({"added_tokens": [{"content": "x", "id": 7, "single_word": True}]}, "added_tokens[0]: single_word of 'x'"),
        ({"merges": ["a b", "a zz"]}, "model.merges[1]: the merge 'a zz' names 'zz', which is not in the vocabulary"),
        ({"merges": ["a b", "a b"]}, "model.merges[1]: the merge 'a b' has a rank already, that of "),
        ({"merges": ["a b", "abc"]}, 'model.merges[1]: two symbols are wanted, found "abc"'),
        ({"merges": [["a", 3]]}, "model.merges[0]: two symbols are wanted"),
        ({"vocab": {"a": 0, "b": 0}}, "model.vocab: the id 0 is given twice, to 'a' and to 'b'"),
        ({"vocab": {"a": "x"}}, "model.vocab: the id of 'a' must be a number from 0 on, found \"x\""),
        ({"unk_token": "<unk>"}, 'model.unk_token: "<unk>" is not in the vocabulary'),
        ({"dropout": 0.1}, "model.dropout: 0.1 is not supported"),
        ({"end_of_word_suffix": "</w>"}, 'model.end_of_word_suffix: "</w>" is not supported'),
    ],
)
def test_bad_tokenizer_json(change, message, tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    spec = json_file(model, None, bytes_of(True), None, bytes_of())
    for key, value in change.items():
        (spec if key in spec else model)[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert message in refused(tmp_path)


def test_damaged_files(small, tmp_path):
    folder = write_folder(tmp_path / "json", small, "json")
    (folder / "tokenizer.json").write_text('{"model":\n {"type": "BPE", ')
    assert "tokenizer.json:2: not JSON" in refused(folder)
    folder = write_folder(tmp_path / "merges", small, "merges")
    good = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    for line, message in (
        ("a b c", "merges.txt:4: two symbols with one space between them are wanted, found 'a b c'"),
        ("a \u4f60", "merges.txt:4: the merge 'a \u4f60' names '\u4f60'"),
        (good[2], "merges.txt:4: the merge"),
        ("", "merges.txt:4: two symbols with one space"),
    ):
        (folder / "merges.txt").write_text("\n".join([*good[:3], line, *good[4:]]), encoding="utf-8")
        assert message in refused(folder)
    (folder / "merges.txt").write_text("\n".join(good).replace("\n", "\r\n"), encoding="utf-8")
    load_tokenizer(folder)  # a Windows checkout
    (folder / "merges.txt").unlink()
    assert "no tokenizer.model, tokenizer.json, vocab.json with merges.txt" in refused(folder)
    folder = write_folder(tmp_path / "tiktoken", small, "tiktoken")
    good = (folder / "qwen.tiktoken").read_text().split("\n")
    for line, message in (
        ("!!! 3", "qwen.tiktoken:4: base64, a space and a rank are wanted, found '!!! 3'"),
        ("YQ==", "qwen.tiktoken:4: base64, a space and a rank"),
        ("enp6 1", "qwen.tiktoken:4: the rank 1 is that of line 2 too"),
        (good[0].split()[0] + " 9999", "qwen.tiktoken:4: these bytes have the rank 0 already"),
        ("enp6 -1", "qwen.tiktoken:4: the rank -1 is below 0"),
        ("", "qwen.tiktoken: no line for the byte"),
    ):
        (folder / "qwen.tiktoken").write_text("\n".join([*good[:3], line, *good[4:]]))
        assert message in refused(folder)
    folder = write_folder(tmp_path / "class", small, "merges", {"tokenizer_class": "RobertaTokenizer"})
    assert "tokenizer_class 'RobertaTokenizer' is not supported for vocab.json; known are GPT2Tokenizer" in refused(
        folder
    )
    folder = write_folder(tmp_path / "model type", small, "merges")
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    assert "tokenizer_class 'bloom' is not supported for vocab.json" in refused(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert load_tokenizer(folder).encode("e\u0301") == load_tokenizer(folder).encode("\u00e9")  # Qwen's NFC
    folder = write_folder(tmp_path / "token", small, "merges", {"eos_token": 5})
    assert "a token in tokenizer_config.json or special_tokens_map.json is text" in refused(folder)
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {"content": "y"}}}')
    assert "added_tokens_decoder: an object of tokens and their ids is wanted" in refused(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "added_tokens.json").write_text('{"x": "y"}')
    assert "added_tokens.json: an object of tokens and their ids is wanted" in refused(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json: an object is wanted, found a list" in refused(folder)


# ------------------------------ against the tokenizers library ------------------------------
# Each row trains a small vocabulary over there with these parts of a tokenizer.json, and answers for every string.

BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK_WORDS = [
    "[\r\n]", "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ]+",
    "\\s?[!-/:-~！-／：-～‘-‟　-。]+", "\\s+$", "[一-龥ࠀ-一가-퟿]+"]  # fmt: skip


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
        sequence("pretokenizers", *map(split, DEEPSEEK_WORDS), {"type": "Digits", "individual_digits": True},
            bytes_of()),
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
    "each unknown character": ({"type": "NFKD"}, metaspace("never", True), None, metaspace("never", True),
        {"unk_token": "<unk>"}),
}  # fmt: skip
ADDED = [  # content, special, lstrip, rstrip, normalized
    ("<unk>", True, False, False, False), ("<s>", True, False, False, False), ("</s>", True, False, True, False),
    ("<|call|>", False, False, False, False), ("<|call|>s", False, True, True, False), ("tool é", False, False, False,
        True),
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
WORDS = (
    """the lamp's water we'll don't I'M 2023 3.14 1,000,000 人工智能 你好，世界！ Привет мир नमस्ते สวัสดี안녕 Ångström naïve ﬁ ㍿
    Ⅷ ½
été tool_é tool é <s> </s> <|call|> <|call|>s <unk> x86 camelCase snake_case == --> !!! ... 😀👨‍👩‍👧
    e\u0301 \u2581 ſt K""".split()
    + ["tool é"]
)
GAPS = [
    " ",
    " ",
    " ",
    "",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\t",
    "\n\n ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x85",
    "\x1c",
    "\x1f",
    "\u200b",
    "\x00",
]


def odd_strings(count, seed):
    """Words, white space of every kind and characters from anywhere in Unicode, mixed but for those of Unicode 13
    and 14 that the library's NFKC does not know."""
    random_ = random.Random(seed)
    known = [
        chr(i)
        for i in {*range(0x30000)} - {*range(0x10780, 0x107C0), *range(0x1FBF0, 0x1FBFA)}
        if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")
    ]
    out = ["", " ", "\n", "  \n  x  ", "a" * 300, "\u2581", " \u2581 ", "<s>", " <s>x</s>  y"]
    while len(out) < count:
        parts = []
        for _ in range(random_.randint(1, 12)):
            kind = random_.random()
            parts.append(
                random_.choice(WORDS) if kind < 0.75 else "".join(random_.choices(known, k=random_.randint(1, 4)))
            )
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


REAL_VOCABULARIES = {  # folder: tokenizer_config.json where the golden has none
    "gpt2": {"tokenizer_class": "GPT2Tokenizer"},
    "opt": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>",
            "pad_token": "<pad>", "add_bos_token": True},
    "qwen2": None,
    "mistral_v3": None,
}  # fmt: skip


@pytest.mark.torch
def test_real_vocabularies_equal_transformers(hf_python, tmp_path):
    strings = odd_strings(2000, 13)
    (tmp_path / "strings.json").write_text(json.dumps(strings))
    for name, config in REAL_VOCABULARIES.items():
        if not (GOLDEN / name).is_dir():
            pytest.skip(f"{GOLDEN / name} is not beside this repository")
        (tmp_path / name).mkdir()
        for path in (GOLDEN / name).iterdir():
            os.symlink(path, tmp_path / name / path.name)
        if config:
            (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    script = """
import json
from pathlib import Path
from transformers import AutoTokenizer
folder, arrays = Path(sys.argv[2]), {}
strings = json.loads((folder / "strings.json").read_text())
for name in sys.argv[3:]:
    tokenizer, answers = AutoTokenizer.from_pretrained(folder / name), []
    for text in strings:
        ids, bare = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
        answers.append([ids, bare, tokenizer.decode(bare, skip_special_tokens=False)])
    (folder / f"{name}.json").write_text(json.dumps(answers))
"""
    hf_python(script, tmp_path, *REAL_VOCABULARIES)
    for name in REAL_VOCABULARIES:
        tokenizer = load_tokenizer(tmp_path / name)
        for text, want in zip(strings, json.loads((tmp_path / f"{name}.json").read_text()), strict=True):
            bare = tokenizer.encode(text, False)
            assert [tokenizer.encode(text), bare, tokenizer.decode(bare, False)] == want, (name, text)
