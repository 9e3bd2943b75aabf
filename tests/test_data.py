"""data.py: tokenizers, chat templates, SFT records, packing, corpora, and every message for bad data.

    python -m pytest tests/test_data.py            CPU, no network, under a minute

The vocabularies are trained here from made-up sentences. Only the two golden tests need ../shared and skip without it.
"""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import data
import formats.chat
import formats.tokenizer
from data import IGNORED, CorpusLoader, SFTDataset, SFTLoader, best_fit_packs, in_order_packs
from formats.chat import ChatTemplate, compile_template, load_chat_template
from formats.files import UserError
from formats.megatron import Corpus
from formats.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO.parent / "shared" / "golden" / "tokenizers"
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
WORDS = """the a small red blue lamp chair costs ten coins and shines warm over quiet water when evening comes to town
红色 台灯 温暖 夜晚""".split()


def sentences(count, seed=0, low=3, high=12):
    random = np.random.RandomState(seed)
    return [" ".join(random.choice(WORDS, random.randint(low, high))) for _ in range(count)]


def make_tokenizer(folder, config=None, added=None, **options):
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    settings = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.99,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences(300)), model_writer=model, **settings)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A vocabulary with the special tokens of ChatML and Llama 3."""
    return make_tokenizer(tmp_path_factory.mktemp("chat"), user_defined_symbols=CHATML + LLAMA3)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------ tokenizer ------------------------------


@pytest.mark.parametrize("name", ["llama2", "mistral_v1"])
def test_ids_and_text_equal_transformers(name):
    if not (GOLDEN / name).is_dir():
        pytest.skip(f"{GOLDEN / name} is not beside this repository")
    tokenizer = load_tokenizer(GOLDEN / name)
    for case in json.loads((GOLDEN / name / "golden.json").read_text())["cases"]:
        for mode, specials in (("hf_legacy_false", False), ("hf_with_bos", True)):
            ids = tokenizer.encode(case["text"], add_special_tokens=specials)
            assert ids == case[mode]["ids"]
            shown = case[mode]["decoded"]
            if mode == "hf_legacy_false" and not case[mode]["roundtrip"]:
                shown = case[
                    "text"
                ]  # transformers prints U+2581 for a run of spaces that loses its first; ours is the text itself
            assert tokenizer.decode(ids, skip_special_tokens=False) == shown
        assert tokenizer.decode(tokenizer.encode(case["text"], False), False) == case["text"]


@pytest.mark.parametrize(
    "text", ["the red lamp", " two  spaces ", "", " ", "naïve 🎈🎉 汉字 ñ", "\n\ttabs\n", "x</s>y<s>", "<unk>"]
)
def test_round_trip_with_byte_fallback(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == tokenizer.bos_token + (
        " " * bool(text) + text if text[:1] != "<" else text
    )
    assert tokenizer.decode(tokenizer.encode(text, False), skip_special_tokens=False) == text


def test_special_tokens_in_text(tokenizer):
    ids = tokenizer.encode("<s>lamp</s> lamp", False)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == "lamp lamp"


def test_bos_and_eos_rules(tmp_path, folder):
    for config, head, tail in (
        ({}, 1, 0),
        ({"add_bos_token": False}, 0, 0),
        ({"add_bos_token": False, "add_eos_token": True}, 0, 1),
        ({"add_eos_token": True}, 1, 1),
    ):
        (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
        bare = tokenizer.encode("red lamp", False)
        assert tokenizer.encode("red lamp") == [tokenizer.bos_token_id] * head + bare + [tokenizer.eos_token_id] * tail


def test_added_tokens(tmp_path, folder):
    size = load_tokenizer(folder).vocab_size
    config = {
        "added_tokens_decoder": {
            str(size): {"content": "<|call|>", "special": True, "rstrip": True},
            str(size + 1): {"content": "<|callback|>"},
        },
        "pad_token": "<pad>",
        "additional_special_tokens": ["<|call|>"],
    }
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "t", config, {"<tool>": size + 2}))
    assert (
        tokenizer.vocab_size == size + 4 and tokenizer.pad_token_id == size + 3
    )  # <pad> is in no file: it comes after everything, as in transformers
    assert tokenizer.encode("<|callback|>", False)[-1] == size + 1  # the longest token wins
    assert tokenizer.encode("<|call|>   lamp", False) == tokenizer.encode("<|call|>lamp", False)  # rstrip
    assert tokenizer.encode("a <tool> b", False).count(size + 2) == 1
    assert tokenizer.decode([size, size + 1]) == "<|callback|>"  # special ones are skipped, others are not
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.encode("a <tool><|call|>", True) == tokenizer.encode("a <tool><|call|>", True)
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == [
        "added_tokens.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_user_defined_symbols(chat_folder):
    tokenizer = load_tokenizer(chat_folder)
    ids = tokenizer.encode("<|im_start|>red", False)
    assert (
        "<|im_start|>" in [tokenizer.engine.sp.id_to_piece(i) for i in ids]
        and tokenizer.decode(ids) == "<|im_start|>red"
    )


def test_stream_never_emits_half_a_character(tokenizer):
    random = np.random.RandomState(0)
    texts = ["red 🎈🎉 汉字 naïve", "ñ", "𝒳y"]
    sequences = [tokenizer.encode(text) for text in texts] + [
        random.randint(0, tokenizer.vocab_size, 60).tolist() for _ in range(50)
    ]
    for ids in sequences:
        for skip in (True, False):
            decoder = tokenizer.stream_decoder(skip)
            pieces = [decoder.push(i) for i in ids] + [decoder.flush()]
            assert "".join(pieces) == tokenizer.decode(ids, skip)
    decoder = tokenizer.stream_decoder()
    out = [decoder.push(i) for i in tokenizer.encode("🎈", False)]
    assert [text for text in out if text] == ["🎈"] and len(out) >= 4


def test_decode_agrees_with_sentencepiece_on_broken_bytes(tokenizer):
    bytes_ = [i for i in range(tokenizer.engine.sp.get_piece_size()) if tokenizer.engine.sp.is_byte(i)]
    random = np.random.RandomState(1)
    for _ in range(100):
        ids = random.choice(bytes_, 7).tolist()
        assert tokenizer.decode(ids) == tokenizer.engine.sp.decode(ids)


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert "no tokenizer.model, tokenizer.json, vocab.json with merges.txt" in one_line(error)
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(UserError, match="neither a sentencepiece model nor tiktoken text"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_broken_side_file(tmp_path, folder):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true,\n oops}')
    with pytest.raises(UserError, match=r"tokenizer_config.json:2: not JSON"):
        load_tokenizer(tmp_path)


# ------------------------------ chat templates ------------------------------

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "red lamp"},
    {"role": "assistant", "content": "ten coins"},
    {"role": "user", "content": "blue chair"},
]


def template_text(tokenizer, template, messages, generate=True):
    """The prompt as text, with the space that encode() puts before each part that begins with a word."""
    tokenizer.chat_template = template
    return tokenizer.decode(tokenizer.apply_chat(messages, generate), skip_special_tokens=False)


def test_llama2_format(tokenizer):
    text = template_text(tokenizer, load_chat_template("llama2"), CHAT)
    assert (
        text == "<s> [INST] <<SYS>>\nbe kind\n<</SYS>>\n\nred lamp [/INST] ten coins </s><s> [INST] blue chair [/INST]"
    )
    assert template_text(tokenizer, load_chat_template("llama2"), CHAT[1:2]) == "<s> [INST] red lamp [/INST]"


def test_llama2_ids_are_those_of_the_published_tokenizer():
    if not (GOLDEN / "llama2").is_dir():
        pytest.skip(f"{GOLDEN} is not beside this repository")
    tokenizer = load_tokenizer(GOLDEN / "llama2")
    tokenizer.chat_template = load_chat_template("llama2")
    ids = tokenizer.apply_chat(
        [{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": "Hello world"}], False
    )
    # Meta encodes "[INST] prompt [/INST] answer " as one string
    assert ids == [1] + tokenizer.engine.sp.encode("\u2581[INST] Hello world [/INST] Hello world ") + [2]
    assert ids[:4] == [1, 518, 25580, 29962]


def test_llama3_and_chatml_formats(chat_folder):
    tokenizer = load_tokenizer(chat_folder)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    tight = lambda text: text.replace("|> ten", "|>ten").replace("\n ten", "\nten").replace(" <|", "<|").lstrip()
    assert tight(template_text(tokenizer, load_chat_template("llama3"), CHAT)) == (
        "<|begin_of_text|>"
        + header("system")
        + "be kind<|eot_id|>"
        + header("user")
        + "red lamp<|eot_id|>"
        + header("assistant")
        + "ten coins<|eot_id|>"
        + header("user")
        + "blue chair<|eot_id|>"
        + header("assistant")
    )
    assert tokenizer.stop_ids == [tokenizer.eos_token_id, tokenizer.engine.sp.piece_to_id("<|eot_id|>")]
    assert tight(template_text(tokenizer, load_chat_template("chatml"), CHAT)) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nred lamp<|im_end|>\n"
        "<|im_start|>assistant\nten coins<|im_end|>\n"
        "<|im_start|>user\nblue chair<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_is_no_template(tokenizer):
    assert (
        load_chat_template("plain") is None and load_chat_template("none") is None and load_chat_template(None) is None
    )
    ids = tokenizer.apply_chat(CHAT[1:3], False)
    assert ids == tokenizer.encode("red lamp") + tokenizer.encode("ten coins", False) + [tokenizer.eos_token_id]


def test_saved_tokenizer_keeps_the_chat_template_in_use(chat_folder, tmp_path):
    """A model trained with --chat_template chatml is asked in chatml by whoever opens its folder, and stops as it
    did."""
    tokenizer = formats.tokenizer.load_tokenizer(chat_folder)
    tokenizer.chat_template = formats.chat.load_chat_template("chatml")
    tokenizer.save(tmp_path)
    again = formats.tokenizer.load_tokenizer(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert again.apply_chat(messages, True) == tokenizer.apply_chat(messages, True)
    assert again.stop_ids == tokenizer.stop_ids and len(again.stop_ids) == 2
    again.chat_template = None
    again.save(tmp_path)
    assert formats.tokenizer.load_tokenizer(tmp_path).chat_template is None


def test_missing_special_token_is_named(tokenizer):
    with pytest.raises(UserError) as error:
        tokenizer.chat_template = load_chat_template("chatml")
    assert "'<|im_start|>'" in one_line(error)


def test_roles(tokenizer):
    for messages, generate in (
        ([], True),
        (CHAT[:1], True),
        (CHAT[2:], True),
        (CHAT[:3], True),
        (CHAT[:2], False),
        ([{"role": "tool", "content": ""}], True),
    ):
        with pytest.raises(UserError, match="messages"):
            tokenizer.apply_chat(messages, generate)


FILE_TEMPLATE = {
    "system": "{{system | 'You are a helpful assistant.'}}\n",
    "conversation": [
        "{% if is_first %}[first]{% elif index == 1 and not is_last %}[second]{% else %}\n[later]{% endif %}\n"
        "Q{{ index }}: {{user}}\n  A: ",
        "{{bot}}</s>",
    ],
    "query": "{# comment #}Q: {{query | trim}} ({{ mood['now'] | default('calm') }}, {{ style.tone }})\nA: ",
}


def test_chat_template_file(tmp_path, folder):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    write_lines(tmp_path / "chat_template.json", [FILE_TEMPLATE])
    tokenizer = load_tokenizer(tmp_path)  # picked up as the tokenizer's own
    template = tokenizer.chat_template
    turn = {"user": "u", "bot": "b", "is_first": True, "is_last": False, "index": 0, "system": "s"}
    assert (
        template.render("system", {}) == "You are a helpful assistant.\n" and template.render("system", turn) == "s\n"
    )
    assert template.render("user", turn) == "[first]Q0: u\n  A: "  # trim_blocks: the line break after {% endif %} goes
    assert template.render("user", turn | {"is_first": False, "index": 1}) == "[second]Q1: u\n  A: "
    assert template.render("user", turn | {"is_first": False, "index": 2}) == "[later]Q2: u\n  A: "
    assert template.render("query", {"query": " q ", "mood": {}, "style": {"tone": "dry"}}) == "Q: q (calm, dry)\nA: "
    with pytest.raises(
        UserError, match="chat_template.json: query: 'query' is undefined; this record's context has mood, style"
    ):
        template.render("query", {"mood": {}, "style": {}})
    assert load_chat_template(tmp_path).name == str(tmp_path / "chat_template.json")
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").chat_template is not None


@pytest.mark.parametrize(
    "text",
    ["{% if user %}x", "{% endif %}", "{{ user", "{{ 1 if }}", "{% else %}", "{% macro x() %}", "{% no_such_tag %}"],
)
def test_a_template_that_is_not_jinja_is_refused(tmp_path, text):
    write_lines(tmp_path / "odd.json", [{"conversation": [text, "{{bot}}"], "query": "{{query}}"}])
    with pytest.raises(UserError, match="odd.json: user: not a Jinja template: "):
        load_chat_template(tmp_path / "odd.json")


@pytest.mark.parametrize("text", ["{{ __import__('os') }}", "{{ ''.__class__.__mro__ }}", "{{ user.append(1) }}"])
def test_a_template_runs_in_the_sandbox(tokenizer, text):
    template = ChatTemplate({"conversation": [text, "{{bot}}"], "query": "{{query}}"}, "odd.json")
    with pytest.raises(UserError, match="odd.json: user: "):
        template.segments([("question", "reply")], {}, tokenizer)


@pytest.mark.parametrize(
    "text, expected",  # trim_blocks, lstrip_blocks and keep_trailing_newline, as PaddleNLP sets them
    [
        ("{% if a %}\n  {% if b %}\nx\n  {% endif %}\n\ty\n{% endif %}\n", "x\n\ty\n"),
        ("x  {% if a %} y {% endif %}  \n", "x   y   \n"),
        ("x {%- if a -%} y {%- endif -%} z\n", "xyz\n"),
        ("  {{ a }}  {#- c #}\nz", "  1z"),
        ("{{ none_such or 'text' }}{{ a and b }}{{ 'yes' if not a else 'no' }}", "text2no"),
        ("{{ none_such is defined }}{{ a == 1 }}{{ (a or b) != 1 }}", "FalseTrueFalse"),
    ],
)
def test_renders_as_jinja(text, expected):
    assert compile_template(text, "t", paddlenlp=True).render(a=1, b=2) == expected


def test_template_file_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_chat_template("llama4")
    for wrong in (
        {"chat_template": 1},
        {"conversation": ["a"], "query": "q"},
        {"conversation": ["a", "b"]},
        [],
        {"conversation": ["a", "b"], "query": "q", "bos": 1},
    ):
        (tmp_path / "t.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="t.json"):
            load_chat_template(tmp_path / "t.json")


# ------------------------------ supervised records ------------------------------


def learned(dataset, i):
    ids, labels = dataset.sample(i)
    assert len(ids) == len(labels) == dataset.lengths[i]
    return dataset.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=False)


def test_labels_only_on_replies_and_shifted_once(tmp_path, tokenizer):
    path = write_lines(tmp_path / "train.json", [{"src": "red lamp", "tgt": "ten coins"}])
    ids, labels = SFTDataset(path, tokenizer).sample(0)
    prompt, reply = tokenizer.encode("red lamp"), tokenizer.encode("ten coins", False) + [tokenizer.eos_token_id]
    assert ids.tolist() == (prompt + reply)[:-1]
    assert labels.tolist() == [IGNORED] * (len(prompt) - 1) + reply
    _, everything = SFTDataset(path, tokenizer, autoregressive=True).sample(0)
    assert everything.tolist() == (prompt + reply)[1:]


@pytest.mark.parametrize("template", [None, "llama2", "file"])
def test_multi_turn(tmp_path, tokenizer, template):
    if template == "file":
        template = str(
            write_lines(
                tmp_path / "t.json", [{"conversation": ["U:{{user}} B:", "{{bot}}</s>"], "query": "U:{{query}} B:"}]
            )
        )
    tokenizer.chat_template = load_chat_template(template)
    record = {
        "src": ["red lamp", "blue chair"],
        "tgt": ["ten coins", "quiet water"],
        "context": {"system": "be kind"},
        "keywords": ["water"],
    }
    dataset = SFTDataset(write_lines(tmp_path / "train.json", [record]), tokenizer)
    space = " " if template == "llama2" else ""
    assert learned(dataset, 0) == f"ten coins{space}</s> quiet water{space}</s>"
    assert dataset.record(0) == record and dataset.reference(0) == "quiet water"
    ids, _ = dataset.sample(0)
    prompt = dataset.prompt_ids(0)
    assert ids[: len(prompt)].tolist() == prompt
    shown = tokenizer.decode(ids)
    assert ("be kind" in shown) == (template is None or template == "llama2")
    if template:
        messages = [
            {"role": "user", "content": "red lamp"},
            {"role": "assistant", "content": "ten coins"},
            {"role": "user", "content": "blue chair"},
        ]
        assert tokenizer.apply_chat([{"role": "system", "content": "be kind"}] + messages) == prompt


def test_prompt_uses_the_query_form(tmp_path, tokenizer):
    template = {"conversation": ["{{user}}", "{{bot}}"], "query": "{{query}} go{% if is_training %}!{% endif %}:"}
    tokenizer.chat_template = ChatTemplate(template, "t")
    dataset = SFTDataset(write_lines(tmp_path / "train.json", [{"src": "red lamp", "tgt": "ten"}]), tokenizer)
    assert tokenizer.decode(dataset.prompt_ids(0)) == "red lamp go:"


def test_truncation_without_template(tmp_path, tokenizer):
    src, tgt = " ".join(WORDS[:8]), " ".join(WORDS[8:20])
    s, t = tokenizer.encode(src, False), tokenizer.encode(tgt, False)
    path = write_lines(tmp_path / "train.json", [{"src": src, "tgt": tgt}])
    dataset = SFTDataset(path, tokenizer, src_length=6, max_length=12)
    flat = [*dataset.sample(0)[0], dataset.sample(0)[1][-1]]
    assert (
        flat == [tokenizer.bos_token_id] + s[-5:] + t[:6]
    )  # src loses its beginning, tgt its end; no eos, as tgt was cut
    assert dataset.prompt_ids(0) == flat[:6]
    whole = SFTDataset(path, tokenizer, src_length=6, max_length=6 + len(t) + 1)
    assert whole.sample(0)[1][-1] == tokenizer.eos_token_id
    exact = SFTDataset(path, tokenizer, src_length=6, max_length=6 + len(t))
    assert exact.sample(0)[1][-1] == t[-1]


def test_truncation_with_template(tmp_path, tokenizer):
    tokenizer.chat_template = load_chat_template("llama2")
    turns = sentences(8, seed=3)
    record = {"src": turns[:4], "tgt": turns[4:], "context": {"system": "be kind"}}
    path = write_lines(tmp_path / "train.json", [record])
    full = SFTDataset(path, tokenizer, 1024, 2048)
    for max_length in range(int(full.lengths[0]) + 1, 110, -7):
        dataset = SFTDataset(path, tokenizer, 64, max_length)
        text = tokenizer.decode(dataset.sample(0)[0], skip_special_tokens=False)
        assert dataset.lengths[0] < max_length
        assert text.startswith("<s> [INST] <<SYS>>\nbe kind\n<</SYS>>")  # the system stays whatever goes
        assert turns[3] in text and f"{turns[3]} [/INST]" in text  # so does the last round, with its frame
        kept = [turn in text for turn in turns[:4]]
        assert kept == sorted(kept)  # rounds go from the first on
        assert tokenizer.decode(dataset.prompt_ids(0)) == tokenizer.decode(
            dataset.sample(0)[0][: len(dataset.prompt_ids(0))]
        )
    long = write_lines(tmp_path / "long.json", [{"src": " ".join(WORDS * 10), "tgt": "ten coins"}])
    dataset = SFTDataset(long, tokenizer, src_length=30, max_length=40)
    prompt = dataset.prompt_ids(0)
    assert 20 < len(prompt) <= 30 and tokenizer.decode(prompt).endswith(WORDS[-1] + " [/INST]")
    assert dataset.sample(0)[0][: len(prompt)].tolist() == prompt
    assert tokenizer.decode(dataset.sample(0)[0]).rstrip().endswith("ten coins")


def test_nothing_left_to_learn_is_dropped_and_counted(tmp_path, tokenizer):
    path = write_lines(tmp_path / "train.json", [{"src": " ".join(WORDS), "tgt": "lamp"}, {"src": "a", "tgt": "lamp"}])
    dataset = SFTDataset(path, tokenizer, src_length=20, max_length=20)
    assert len(dataset) == 1 and dataset.dropped == 1 and dataset.record(0)["src"] == "a"


def test_folders_and_lists_of_files(tmp_path, tokenizer):
    records = [{"src": s, "tgt": "lamp"} for s in sentences(7)]
    write_lines(tmp_path / "train.json", records[:3])
    write_lines(tmp_path / "dev.jsonl", records[3:4])
    (tmp_path / "parts" / "train").mkdir(parents=True)
    write_lines(tmp_path / "parts" / "train" / "b.json", records[5:])
    write_lines(tmp_path / "parts" / "train" / "a.jsonl", records[4:5])
    assert len(SFTDataset(tmp_path, tokenizer)) == 3 and len(SFTDataset(tmp_path, tokenizer, split="dev")) == 1
    parts = SFTDataset(tmp_path / "parts", tokenizer)
    assert [parts.record(i) for i in range(len(parts))] == records[4:]
    both = SFTDataset([tmp_path, tmp_path / "parts"], tokenizer)
    assert [both.record(i) for i in range(len(both))] == records[:3] + records[4:]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"src": "a", "tgt": "b"}\n{"src": "a",\n', "bad.json:2: not a JSON object"),
        ("[1]\n", "bad.json:1: a JSON object"),
        ("", "bad.json: the file is empty"),
        ("\n\n", "bad.json: the file is empty"),
        ('\n{"src": "a"}\n', "bad.json:2: key 'tgt' is missing; found 'src'"),
        ('{"tgt": "a"}\n', "bad.json:1: key 'src' is missing"),
        ('{"src": 3, "tgt": "a"}\n', "bad.json:1: 'src' must be a string"),
        ('{"src": ["a", 1], "tgt": ["a", "b"]}\n', "bad.json:1: 'src' must be"),
        ('{"src": ["a", "b"], "tgt": ["a"]}\n', "bad.json:1: 'src' has 2 turns and 'tgt' has 1"),
        ('{"src": [], "tgt": []}\n', "bad.json:1: 'src' has 0 turns"),
        ('{"src": "a", "tgt": "b", "context": "x"}\n', "bad.json:1: 'context' must be"),
        ('{"src": "a", "tgt": "b", "context": {"system": 1}}\n', "bad.json:1: 'context'"),
        (b'{"src": "\xff\xfe", "tgt": "b"}\n', "bad.json:1: not a JSON object"),
        ('{"src": "lamp lamp lamp lamp lamp lamp lamp lamp", "tgt": "b"}\n', "nothing to learn is left"),
    ],
)
def test_bad_records(tmp_path, tokenizer, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as error:
        SFTDataset(path, tokenizer, src_length=8, max_length=8)
    assert message in one_line(error)


def test_missing_files(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no such file or folder"):
        SFTDataset(tmp_path / "nowhere", tokenizer)
    with pytest.raises(UserError, match="none of dev.json"):
        SFTDataset(tmp_path, tokenizer, split="dev")


# ------------------------------ packing and batches ------------------------------


class FakeDataset:
    """Records of given lengths; record i is i * 10000, i * 10000 + 1, ... so that every token says where it is from."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, np.int32)

    def __len__(self):
        return len(self.lengths)

    def sample(self, i):
        ids = i * 10000 + np.arange(self.lengths[i])
        return ids, ids + 1


def instruction_lengths(count=4096):
    random = np.random.RandomState(0)
    return np.clip(random.lognormal(np.log(180) - 0.8**2 / 2, 0.8, count), 16, 1024).astype(np.int32)


def allowed(rows, T):
    """FlashMask rows [T] -> bool [T, T], may row i see key j."""
    i, j = np.indices((T, T))
    return (i >= j) & (i < rows[None, :])


def check_batch(batch, dataset, seen):
    B, T = batch["input_ids"].shape
    assert batch["startend_row_indices"].shape == (B, 1, T, 1) and batch["startend_row_indices"].dtype == np.int32
    assert all(
        batch[key].dtype == np.int64 and batch[key].shape == (B, T) for key in ("input_ids", "labels", "position_ids")
    )
    for b in range(B):
        owner = np.full(T, -1)
        start = 0
        for i in batch["sample_ids"][b]:
            end = start + int(dataset.lengths[i])
            ids, labels = dataset.sample(i)
            assert np.array_equal(batch["input_ids"][b, start:end], ids) and np.array_equal(
                batch["labels"][b, start:end], labels
            )
            owner[start:end] = i
            seen[i] = seen.get(i, 0) + 1
            start = end
        assert np.all(batch["labels"][b, start:] == IGNORED)
        begins = np.flatnonzero(np.diff(owner, prepend=-2))
        for begin, end in zip(begins, [*begins[1:], T]):
            assert np.array_equal(batch["position_ids"][b, begin:end], np.arange(end - begin))
        if T <= 256:
            i, j = np.indices((T, T))
            assert np.array_equal(
                allowed(batch["startend_row_indices"][b, 0, :, 0], T), (i >= j) & (owner[i] == owner[j])
            )


@pytest.mark.parametrize("greedy, least", [(True, 0.985), (False, 0.80)])
def test_packing_loses_nothing_and_fills(greedy, least):
    dataset = FakeDataset(instruction_lengths())
    loader = SFTLoader(dataset, 2, 2048, zero_padding=True, greedy_zero_padding=greedy, seed=1)
    assert loader.fill >= least
    seen, real, positions = {}, 0, 0
    for index in range(loader.batches_per_epoch):
        batch = loader.batch(0, index)
        check_batch(batch, dataset, seen)
        real += (batch["labels"] != IGNORED).sum()
        positions += batch["labels"].size
    assert sorted(seen) == list(range(len(dataset))) and set(seen.values()) == {1}
    assert (
        real == dataset.lengths.sum() and real / positions == pytest.approx(loader.fill) and real / positions >= least
    )


def test_packs_by_a_slow_oracle():
    random = np.random.RandomState(2)
    for _ in range(30):
        lengths, capacity = random.randint(1, 40, random.randint(1, 80)), 64
        order, bounds = best_fit_packs(lengths, capacity)
        rooms = []  # best fit, literally: the fullest bin that fits
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [k for k, room in enumerate(rooms) if room >= length]
            if fitting:
                rooms[min(fitting, key=lambda k: rooms[k])] -= length
            else:
                rooms.append(capacity - length)
        used = np.add.reduceat(lengths[order], bounds[:-1])
        assert sorted(capacity - used) == sorted(rooms) and sorted(order) == list(range(len(lengths)))
    order, bounds = in_order_packs(np.array([30, 30, 10, 64, 1]), 64)
    assert order.tolist() == [0, 1, 2, 3, 4] and bounds.tolist() == [0, 2, 3, 4, 5]


def test_mask_rows_and_positions_exactly():
    seen = {}
    dataset = FakeDataset([5, 3, 7, 2])
    for options in (
        {"zero_padding": True},
        {"zero_padding": True, "greedy_zero_padding": True},
        {},
        {"pad_to_max_length": True},
        {"pad_to_multiple_of": 8},
    ):
        loader = SFTLoader(dataset, 2, 12, **options)
        for index in range(loader.batches_per_epoch):
            check_batch(loader.batch(0, index), dataset, seen)
    batch = SFTLoader(dataset, 1, 12, zero_padding=True, shuffle=False).batch(0, 0)
    assert batch["startend_row_indices"][0, 0, :, 0].tolist() == [5] * 5 + [8] * 3 + [12] * 4
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]


def test_dynamic_padding_groups_lengths():
    dataset = FakeDataset(instruction_lengths())
    loader = SFTLoader(dataset, 8, 1024, seed=5)
    seen = {}
    widths = []
    for index in range(loader.batches_per_epoch):
        batch = loader.batch(3, index)
        check_batch(batch, dataset, seen)
        widths.append(batch["input_ids"].shape[1])
        assert widths[-1] == max(dataset.lengths[i] for row in batch["sample_ids"] for i in row)
    assert set(seen.values()) == {1} and len(seen) == len(dataset)
    assert loader.fill > 0.9 > SFTLoader(dataset, 8, 1024, shuffle=False).fill
    assert np.abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.2  # long batches come anywhere
    assert SFTLoader(dataset, 8, 1024, pad_to_max_length=True).batch(0, 0)["input_ids"].shape == (8, 1024)
    assert SFTLoader(dataset, 8, 1024, pad_to_multiple_of=64).batch(0, 0)["input_ids"].shape[1] % 64 == 0


@pytest.mark.parametrize("zero_padding", [False, True])
def test_order_is_a_function_of_seed_and_epoch(zero_padding):
    dataset = FakeDataset(instruction_lengths(300))
    make = lambda seed: SFTLoader(dataset, 4, 1024, zero_padding, seed=seed)
    straight = make(1)
    ids = [[straight.batch(epoch, i)["sample_ids"] for i in range(straight.batches_per_epoch)] for epoch in range(2)]
    resumed = make(1)
    assert [resumed.batch(1, i)["sample_ids"] for i in range(3, resumed.batches_per_epoch)] == ids[1][
        3:
    ]  # in the middle of an epoch
    assert resumed.batch(0, 2)["sample_ids"] == ids[0][2]
    assert ids[0] != ids[1] and make(2).batch(0, 0)["sample_ids"] != ids[0][0]


def test_file_order_and_last_batch():
    dataset = FakeDataset([3, 4, 5, 6, 7])
    loader = SFTLoader(dataset, 2, 8, shuffle=False)
    assert [loader.batch(0, i)["sample_ids"] for i in range(3)] == [[[0], [1]], [[2], [3]], [[4]]]
    assert SFTLoader(dataset, 2, 8, drop_last=True).batches_per_epoch == 2
    with pytest.raises(UserError, match="fewer than one batch"):
        SFTLoader(dataset, 8, 8, drop_last=True)
    with pytest.raises(AssertionError):
        SFTLoader(dataset, 2, 6)


# ------------------------------ corpora ------------------------------


def write_corpus(prefix, documents, dtype=np.uint16):
    """The format written out by hand, byte by byte, as upstream documents it."""
    import struct

    code = {np.uint16: 8, np.int32: 4}[dtype]
    sizes = [len(document) for document in documents]
    item = np.dtype(dtype).itemsize
    index = (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(sizes))
        + struct.pack("<Q", len(sizes) + 1)
    )
    index += b"".join(struct.pack("<i", size) for size in sizes)
    index += b"".join(struct.pack("<q", item * sum(sizes[:i])) for i in range(len(sizes)))
    index += b"".join(struct.pack("<q", i) for i in range(len(sizes) + 1))
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(b"".join(np.asarray(document, dtype).tobytes() for document in documents))


def numbered_documents(count=60, seed=0):
    """Token v of the corpus is v itself, so a sample says where it is from."""
    sizes = np.random.RandomState(seed).randint(1, 40, count)
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for size, end in zip(sizes, ends)]


@pytest.mark.parametrize("workers", [1, 2])
def test_corpus_bytes(tmp_path, folder, tokenizer, workers):
    texts = sentences(3000 if workers == 2 else 20, seed=7) + [""]
    write_lines(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    done = subprocess.run(
        [
            sys.executable,
            REPO / "data.py",
            "corpus",
            tmp_path / "c.jsonl",
            "--tokenizer",
            folder,
            "--output",
            tmp_path / "out" / "c",
            "--workers",
            str(workers),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    write_corpus(
        tmp_path / "hand", [tokenizer.encode(text, False) + [tokenizer.eos_token_id] for text in texts[:-1]]
    )  # an empty text is no document
    for end in (".bin", ".idx"):
        assert (tmp_path / "out" / f"c{end}").read_bytes() == (tmp_path / f"hand{end}").read_bytes()
    assert sorted(os.listdir(tmp_path / "out")) == ["c.bin", "c.idx"]


def test_corpus_from_txt_and_large_vocabulary(tmp_path, folder, tokenizer):
    (tmp_path / "c.txt").write_text("red lamp\nblue chair\n\n\n  quiet water \n \nten coins", encoding="utf-8")
    assert data.build_corpus(tmp_path / "c.txt", folder, tmp_path / "c", append_eos=False)[0] == 3
    corpus = Corpus(tmp_path / "c")
    texts = [tokenizer.decode(corpus.tokens[a:b].tolist()) for a, b in zip(corpus.bounds, corpus.bounds[1:])]
    assert texts == ["red lamp\nblue chair", "quiet water", "ten coins"]
    big = make_tokenizer(tmp_path / "big", added={"<far>": 70000})
    data.build_corpus(tmp_path / "c.txt", big, tmp_path / "wide")
    assert Corpus(tmp_path / "wide").tokens.dtype == np.int32 and Corpus(tmp_path / "c").tokens.dtype == np.uint16


def test_older_npy_form(tmp_path):
    documents = numbered_documents()
    write_corpus(tmp_path / "new", documents)
    flat = np.concatenate(documents).astype(np.int32)
    lens = np.array([n for document in documents for n in (1, len(document) - 1)], np.int32)  # two sentences a document
    np.save(tmp_path / "old_ids.npy", flat)
    np.savez(tmp_path / "old_idx.npz", lens=lens, docs=np.arange(len(documents) + 1) * 2)
    new, old = Corpus(tmp_path / "new"), Corpus(tmp_path / "old")
    assert np.array_equal(new.bounds, old.bounds) and np.array_equal(new.tokens, old.tokens)
    assert isinstance(new.tokens, np.memmap) and isinstance(old.tokens, np.memmap)


def test_samples_cover_every_token_of_each_pass_once(tmp_path):
    documents = numbered_documents()
    write_corpus(tmp_path / "c", documents)
    total, T = sum(map(len, documents)), 16
    loader = CorpusLoader(tmp_path / "c", "1,0,0", "train", 3 * total // T, T, 4, seed=3)
    rows = np.concatenate([loader.batch(0, i)["input_ids"] for i in range(loader.batches_per_epoch)])
    labels = np.concatenate([loader.batch(0, i)["labels"] for i in range(loader.batches_per_epoch)])
    assert np.array_equal(rows[:, 1:], labels[:, :-1])
    counts = np.bincount(rows.ravel(), minlength=total)
    assert counts.min() >= 2 and counts.max() <= 3 and len(rows) == 3 * total // T
    first_pass = rows[: total // T].ravel()
    assert (
        len(set(first_pass)) > len(first_pass) - T
    )  # nothing twice before everything once, but in the sample across two passes
    following = rows[:, 1:] - rows[:, :-1] == 1
    assert following.mean() > 0.9  # documents are whole, apart from their ends
    again = CorpusLoader(tmp_path / "c", "1,0,0", "train", 3 * total // T, T, 4, seed=3)
    assert np.array_equal(again.batch(0, 2)["input_ids"], rows[8:12])
    assert not np.array_equal(again.batch(1, 2)["input_ids"], rows[8:12])
    plain = CorpusLoader(tmp_path / "c", "1", "train", 5, T, 5, shuffle=False).batch(0, 0)
    assert np.array_equal(plain["input_ids"].ravel(), np.arange(5 * T))
    assert np.all(plain["startend_row_indices"] == T) and np.array_equal(plain["position_ids"][0], np.arange(T))


def test_one_pass_pads_its_tail(tmp_path):
    documents = numbered_documents()
    write_corpus(tmp_path / "c", documents)
    total, T = sum(map(len, documents)), 16
    loader = CorpusLoader(tmp_path / "c", "1", "train", None, T, 4, eos_token_id=77, shuffle=False)
    labels = np.concatenate([loader.batch(0, i)["labels"].ravel() for i in range(loader.batches_per_epoch)])
    assert np.array_equal(labels[labels != IGNORED], np.arange(1, total))  # every held-out token is a target once


def test_mask_across_documents(tmp_path):
    documents = numbered_documents()
    write_corpus(tmp_path / "c", documents)
    document_of = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    T = 64
    loader = CorpusLoader(tmp_path / "c", "1", "train", 20, T, 4, seed=1, mask_across_documents=True)
    for index in range(loader.batches_per_epoch):
        batch = loader.batch(0, index)
        for b in range(4):
            ids, labels = batch["input_ids"][b], batch["labels"][b]
            owner = document_of[ids]
            same = owner[1:] == owner[:-1]
            assert np.array_equal(labels[:-1], np.where(same & (ids[1:] == ids[:-1] + 1), ids[1:], IGNORED))
            i, j = np.indices((T, T))
            assert np.array_equal(
                allowed(batch["startend_row_indices"][b, 0, :, 0], T), (i >= j) & (owner[i] == owner[j])
            )
            begins = np.flatnonzero(np.concatenate([[True], ~same]))
            assert np.all(batch["position_ids"][b, begins] == 0) and batch["position_ids"][b].max() < 40


def test_split_by_documents(tmp_path):
    documents = numbered_documents(100)
    write_corpus(tmp_path / "c", documents)
    parts = {}
    for which in ("train", "valid", "test"):
        loader = CorpusLoader(tmp_path / "c", "80,15,5", which, None, 16, 1000, shuffle=False)
        labels = loader.batch(0, 0)["labels"]
        parts[which] = set(labels[labels != IGNORED].tolist()) | {int(loader.batch(0, 0)["input_ids"][0, 0])}
    edges = np.cumsum([0] + [len(d) for d in documents])[[0, 80, 95, 100]]
    assert [parts[w] for w in ("train", "valid", "test")] == [set(range(a, b)) for a, b in zip(edges, edges[1:])]
    with pytest.raises(UserError, match="leaves no text for 'test'"):
        CorpusLoader(tmp_path / "c", "949,50,0", "test", 10, 16, 1)
    for split in ("a,b", "1,2,3,4", "", "-1,2", "0,0,0"):
        with pytest.raises(UserError, match="split"):
            CorpusLoader(tmp_path / "c", split, "train", 10, 16, 1)


def test_blend_and_folder(tmp_path):
    for name, base in (("a", 0), ("b", 10000)):
        write_corpus(tmp_path / name, [[base + v for v in document] for document in numbered_documents()])
    loader = CorpusLoader(f"3 {tmp_path / 'a'} 1 {tmp_path / 'b'}", "1", "train", 200, 16, 8, seed=2)
    share = [(loader.batch(0, i)["input_ids"][:, 0] >= 10000).sum() for i in range(loader.batches_per_epoch)]
    assert sum(share) == 50 and max(share) <= 3 and min(share) >= 1  # a quarter, everywhere in the run
    folder = CorpusLoader(tmp_path, "1", "train", 100, 16, 100)
    assert (folder.batch(0, 0)["input_ids"][:, 0] >= 10000).sum() == 50
    single = CorpusLoader(tmp_path / "b", "1", "train", 10, 16, 10)
    assert np.all(single.batch(0, 0)["input_ids"] >= 10000)


def test_only_what_is_asked_for_is_read(tmp_path):
    sizes = np.full(
        20_000, 2_500, np.int32
    )  # 100 MB of tokens, in a file with a hole: no disk, and no memory unless it is all read
    (tmp_path / "c.idx").write_bytes(formats.megatron.index_bytes(np.uint16, sizes))
    with open(tmp_path / "c.bin", "wb") as stream:
        stream.truncate(int(sizes.sum()) * 2)
    script = (
        "import sys; from data import CorpusLoader\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        f"loader = CorpusLoader({str(tmp_path / 'c')!r}, '1', 'train', 2000, 1024, 4)\n"
        "[loader.batch(0, i) for i in range(20)]\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30_000  # KiB


def test_damaged_corpora(tmp_path):
    write_corpus(tmp_path / "c", numbered_documents())
    index, tokens = (tmp_path / "c.idx").read_bytes(), (tmp_path / "c.bin").read_bytes()
    for content, message in (
        (index[:-3], "cut off"),
        (b"", "not a Megatron index"),
        (b"TNTIDX\x00\x00" + index[8:], "not a Megatron index"),
        (index[:17] + b"\x06" + index[18:], "dtype code 6"),
        (index[:34] + b"\x09\x00\x00\x00" + index[38:], "without gaps"),
    ):
        (tmp_path / "c.idx").write_bytes(content)
        with pytest.raises(UserError, match=message):
            Corpus(tmp_path / "c")
    (tmp_path / "c.idx").write_bytes(index)
    (tmp_path / "c.bin").write_bytes(tokens[:-2])
    with pytest.raises(UserError, match="cut off"):
        Corpus(tmp_path / "c")
    for source, message in (
        (tmp_path / "nowhere", "neither"),
        (f"0.5 {tmp_path / 'c'} x", "weight prefix"),
        (f"x {tmp_path / 'c'}", "weight prefix"),
        (f"-1 {tmp_path / 'c'}", "positive"),
    ):
        with pytest.raises(UserError, match=message):
            CorpusLoader(source, "1", "train", 1, 4, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no \\*.idx"):
        CorpusLoader(tmp_path / "empty", "1", "train", 1, 4, 1)


# ------------------------------ command line ------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required"),
        (["corpus"], "required"),
        (["corpus", "x.jsonl", "--tokenizer", "TOKENIZER"], "--output"),
        (["corpus", "x.jsonl", "--nope", "1"], "required"),
        (["corpus", "x.jsonl", "--tokenizer", "TOKENIZER", "--output", "OUT"], "x.jsonl: no such file"),
        (["corpus", "BAD.jsonl", "--tokenizer", "TOKENIZER", "--output", "OUT"], "BAD.jsonl:2: not a JSON object"),
        (
            ["corpus", "BAD.jsonl", "--tokenizer", "TOKENIZER", "--output", "OUT", "--json_key", "body"],
            "BAD.jsonl:1: key 'body' must be there and a string",
        ),
        (["corpus", "EMPTY.txt", "--tokenizer", "TOKENIZER", "--output", "OUT"], "no text"),
        (["corpus", "ODD.docx", "--tokenizer", "TOKENIZER", "--output", "OUT"], "'.docx'"),
        (["corpus", "BYTES.txt", "--tokenizer", "TOKENIZER", "--output", "OUT"], "BYTES.txt:4: not UTF-8"),
        (["corpus", "BAD.jsonl", "--tokenizer", "nowhere", "--output", "OUT"], "no such folder"),
        (["corpus", "BAD.jsonl", "--workers", "two"], "--workers"),
        (["corpus", "BAD.jsonl", "--tokenizer", "TOKENIZER", "--output", "OUT", "--workers", "0"], "--workers 0"),
        (["corpus", "BAD.jsonl", "--tokenizer", "TOKENIZER", "--output", "OUT", "--append_eos", "maybe"], "'maybe'"),
        (["corpus", "BAD.jsonl", "--tokenizer", "TOKENIZER", "--output", "THERE"], "already there"),
    ],
)
def test_command_line_errors(tmp_path, folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("BAD.jsonl").write_text('{"text": "red lamp"}\n{"text": "blue\n')
    Path("EMPTY.txt").write_text("\n\n")
    Path("ODD.docx").write_text("a\n")
    Path("BYTES.txt").write_bytes(b"red\n\nlamp\nblue \xff chair\n")
    Path("THERE.idx").write_text("mine")
    assert data.main([str(folder) if a == "TOKENIZER" else a for a in arguments]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith(("\r", "tokenizing")) and line
    ]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert (
        sorted(os.listdir()) == ["BAD.jsonl", "BYTES.txt", "EMPTY.txt", "ODD.docx", "THERE.idx"]
        and Path("THERE.idx").read_text() == "mine"
    )


def test_error_from_a_worker_is_one_line_too(tmp_path, folder):
    (tmp_path / "c.jsonl").write_text('{"text": "lamp"}\n' * 3000 + "oops\n")
    done = subprocess.run(
        [
            sys.executable,
            REPO / "data.py",
            "corpus",
            tmp_path / "c.jsonl",
            "--tokenizer",
            folder,
            "--output",
            tmp_path / "c",
            "--workers",
            "2",
        ],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.splitlines()[-1].startswith("error: ")
        and "c.jsonl:3001: not a JSON object" in done.stderr
    )
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == ["c.jsonl"]


def test_data_never_imports_paddle():
    script = "import sys, data; assert not [m for m in sys.modules if m.split('.')[0] in ('paddle', 'torch')]"
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)


def test_the_order_of_samples_is_kept_in_few_bytes():
    """At most 4 a sample of one corpus and 9 of a blend, in every process; the same order as in full integers."""
    corpus = types.SimpleNamespace(bounds=np.arange(0, 100_100, 100), tokens=np.zeros(100_000, np.uint16))
    found = data.CorpusSamples(corpus, 0, 1000, 70_000, 10, 7, True, 0)
    edges, slow = -(-np.arange(9) * 100_000 // 10), []
    for e, (a, b) in enumerate(zip(edges[:-1], edges[1:])):
        order = data.epoch_order(b - a, 8, e)
        slow += [a + i for i in order if i != b - a - 1] + [b - 1]
    assert found.order.tolist() == slow[:70_000] and found.order.nbytes <= 4 * 70_000
    corpora, numbers = data.interleave([70_000], [1.0])
    assert corpora[69_999] == 0 and numbers[69_999] == 69_999 and corpora.strides == (0,)
    corpora, numbers = data.interleave([60_000, 40_000], [0.6, 0.4])
    due = np.concatenate([(np.arange(n) + 0.5) / w for n, w in ((60_000, 0.6), (40_000, 0.4))])
    order = np.argsort(due, kind="stable")
    assert np.array_equal(corpora, (order >= 60_000).astype(int))
    assert np.array_equal(numbers, np.where(order < 60_000, order, order - 60_000))
    assert corpora.nbytes + numbers.nbytes <= 9 * 100_000
