"""Records of every format: what of them is learned, the files they come in, odd text, and every message for bad ones.

    python -m pytest tests/test_records.py                              CPU, no network, under a minute
    python -m pytest tests/test_records.py --hf-python PYTHON           also ids and labels against TRL
    python -m pytest tests/test_records.py --slow                       1,500 odd records instead of 200

The tokenizer is made here: the id of a byte is its value, then come special tokens.
"""

import copy
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import data
import formats.record_files as record_files
from alignment.preference_data import UnpairedDataset
from data import PreferenceDataset, SFTDataset
from formats.chat import load_chat_template
from formats.files import UserError
from formats.record_files import RecordOptions, RecordReader, blend_records, parse_record
from formats.records import CONVERSATIONS, PAIRS, located, parse_prompt, record_format
from formats.tokenizer import load_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 256, 257, 258
USER, BOT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


def byte_characters():
    """The characters by which byte-level vocabularies write bytes 0..255."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in kept else next(moved) for byte in range(256)]


def make_tokenizer(folder, chat_template=None):
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [
        {
            "id": 256 + i,
            "content": text,
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for i, text in enumerate(SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "vocab": {c: i for i, c in enumerate(byte_characters())},
        "merges": [],
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
    }
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None}
    whole |= {"pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config |= {"chat_template": chat_template} if chat_template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("bytes")))
    tokenizer.chat_template = load_chat_template("chatml")
    return tokenizer


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def marked(dataset, i=0):
    """Text of a sample, learned stretches in [[ ]]; checks sample() against it."""
    if isinstance(dataset, PreferenceDataset):
        prompt, chosen, rejected = (dataset.tokenizer.decode(ids.tolist(), False) for ids in dataset.pair(i))
        return [prompt, chosen, rejected]
    ids, learned = dataset.tokens(i)
    inputs, labels = dataset.sample(i)
    assert inputs.tolist() == ids[:-1].tolist() and labels.tolist() == np.where(learned, ids, -100)[1:].tolist()
    return data.marked_text(dataset.tokenizer, ids, learned, color=False)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------ formats: what the model sees and learns ------------------------------

CALL = {"name": "now", "arguments": {}}
NOW = {"type": "function", "function": {"name": "now", "description": "time", "parameters": {"type": "object"}}}
CALLS = f"[[<tool_call>\n{json.dumps(CALL)}\n</tool_call>{END}]]"
RESULT = f"{USER}<tool_response>\n10\n</tool_response>{END}"


def chat(*texts, system=None):
    """What ChatML writes of texts of the user and the assistant in turn, replies in [[ ]]."""
    turns = [f"{USER}{text}{END}" if i % 2 == 0 else f"{BOT}[[{text}{END}]]" for i, text in enumerate(texts)]
    return "".join(turns) if system is None else f"<|im_start|>system\n{system}{END}" + "".join(turns)


def said(*texts):
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TIME = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {
        "name": "now", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "1", "name": None, "content": "10"},
    {"role": "assistant", "content": "ten"},
]  # fmt: skip
SHAREGPT = [("human", "time?"), ("function_call", json.dumps(CALL)), ("observation", "10"), ("gpt", "ten")]
TOOL_CHAT = f"{USER}time?{END}{BOT}{CALLS}{RESULT}{BOT}[[ten{END}]]"

# format -> [(record, what the model sees, learned stretches in [[ ]]; with tools what follows the tools)]
SEEN = {
    "src+tgt": [
        ({"src": "a", "tgt": "c"}, chat("a", "c")),
        ({"src": ["a", "b"], "tgt": ["c", "d"], "context": {"system": "S"}}, chat("a", "c", "b", "d", system="S")),
    ],
    "messages": [
        ({"messages": said("a", "c", "b", "d", "no reply to this")}, chat("a", "c", "b", "d")),
        ({"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "assistant", "content": "c",
            "refusal": None}], "id": 7}, chat("ab", "c", system="S")),
        ({"messages": TIME, "tools": [NOW]}, TOOL_CHAT),
        ({"messages": [*said("a", "c", "b"), {"role": "assistant", "content": "d", "weight": 0}]},
         chat("a", "c", "b") + f"{BOT}d{END}"),
        ({"messages": [{**m, "train": m["content"] == "d"} for m in said("a", "c", "b", "d")]},
         f"{USER}a{END}{BOT}c{END}" + chat("b", "d")),
    ],
    "conversations": [
        ({"conversations": [{"from": who, "value": text} for who, text in SHAREGPT], "tools": json.dumps([NOW])},
         TOOL_CHAT),
        ({"system": "S", "conversations": said("a", "c")}, chat("a", "c", system="S")),
    ],
    "prompt+completion": [
        ({"prompt": "a b", "completion": " c"}, "a b[[ c<|endoftext|>]]"),
        ({"prompt": said("a", "c", "b"), "completion": said("a", "d")[1:]},
         f"{USER}a{END}{BOT}c{END}" + chat("b", "d")),
    ],
    "instruction+output": [
        ({"instruction": "a", "input": "x", "output": "c", "system": "S", "history": [["q", "r"]], "text": "unused"},
         chat("q", "r", "a\nx", "c", system="S")),
        ({"instruction": "a", "input": "", "output": "c", "system": ""}, chat("a", "c")),
    ],
    "text": [({"text": "all of it"}, "[[all of it<|endoftext|>]]")],
}  # fmt: skip
OPENAI = {"input": {"messages": said("a"), "tools": [], "parallel_tool_calls": True}}
ENDS = {"chosen": said("", "x")[1:], "rejected": said("", "y")[1:]}
# format -> [(record of a pair, (prompt, chosen, rejected))]
CHATML_PAIR = (f"{USER}a{END}{BOT}", f"x{END}", f"y{END}")
PLAIN_PAIR = ("a", " x<|endoftext|>", " y<|endoftext|>")
SEEN_PAIRS = {
    "src+response+sort": [({"src": ["a"], "tgt": [], "response": ["y", "x"], "sort": [0, 1]}, CHATML_PAIR)],
    "input+preferred_output+non_preferred_output": [
        (OPENAI | {"preferred_output": ENDS["chosen"], "non_preferred_output": ENDS["rejected"]}, CHATML_PAIR)],
    "conversations+chosen+rejected": [
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "x"},
          "rejected": {"from": "gpt", "value": "y"}}, CHATML_PAIR)],
    "instruction+chosen+rejected": [({"instruction": "a", "input": "", "chosen": "x", "rejected": "y"}, CHATML_PAIR)],
    "chosen+rejected": [
        ({"prompt": "a", "chosen": " x", "rejected": " y"}, PLAIN_PAIR),
        ({"chosen": "a x", "rejected": "a y"}, PLAIN_PAIR),
        ({"prompt": said("a"), **ENDS}, CHATML_PAIR),
        ({"chosen": said("a", "x"), "rejected": said("a", "y")}, CHATML_PAIR),
        ({"prompt": "a", "chosen": said("a", "x"), "rejected": said("a", "y"), "messages": []}, CHATML_PAIR),
    ],
}  # fmt: skip


def test_the_tables_have_an_example_of_every_row():
    assert list(SEEN) == [row.name for row in CONVERSATIONS]
    assert list(SEEN_PAIRS) == [row.name for row in PAIRS]


@pytest.mark.parametrize("name", SEEN)
def test_what_is_learned_of_a_conversation(tmp_path, tokenizer, name):
    records, expected = zip(*SEEN[name])
    dataset = SFTDataset(write_lines(tmp_path / "train.jsonl", *records), tokenizer)
    for i, text in enumerate(expected):
        found = marked(dataset, i)
        if "tools" in records[i]:
            found = found[found.index(USER) :]
            assert '"name": "now"' in marked(dataset, i).partition(USER)[0]
        assert found == text
        ids = tokenizer.encode(found.replace("[[", "").replace("]]", ""), False)  # of one byte: its value
        assert dataset.tokens(i)[0].tolist()[-len(ids) :] == ids and dataset.record(i) == records[i]
        prompt = dataset.prompt_ids(i)
        assert name == "text" or dataset.tokens(i)[0][: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", SEEN_PAIRS)
def test_ids_of_pairs(tmp_path, tokenizer, name):
    records, expected = zip(*SEEN_PAIRS[name])
    dataset = PreferenceDataset(write_lines(tmp_path / "train.jsonl", *records), tokenizer)
    for i, texts in enumerate(expected):
        assert [part.tolist() for part in dataset.pair(i)] == [tokenizer.encode(text, False) for text in texts]
        assert dataset.prompt_text(i) == "a" and dataset.record(i) == records[i]


def test_train_on_the_last_reply_only(tmp_path, tokenizer):
    path = write_lines(
        tmp_path / "train.jsonl",
        {"messages": said("a", "c", "b", "d")},
        {"messages": [*said("a", "c", "b"), {"role": "assistant", "content": "d", "weight": 0}]},
    )
    dataset = SFTDataset(path, tokenizer, options=RecordOptions(train_on="last"))
    assert marked(dataset) == f"{USER}a{END}{BOT}c{END}" + chat("b", "d")
    assert dataset.why_dropped == {"no reply is to be learned": 1} and len(dataset) == dataset.dropped == 1


def test_truncation_of_new_formats(tmp_path, tokenizer):
    """A plain prompt keeps its end, a reply its beginning; of tool results the longest text is cut."""
    plain = {"prompt": "0123456789", "completion": "abcdefghij"}
    text = marked(SFTDataset(write_lines(tmp_path / "p.jsonl", plain), tokenizer, src_length=4, max_length=8))
    assert text == "6789[[abcd]]"
    messages = [*TIME[:2], {"role": "tool", "tool_call_id": "1", "content": "0123456789" * 9}, TIME[3]]
    path = write_lines(tmp_path / "t.jsonl", {"messages": messages})
    dataset = SFTDataset(path, tokenizer, src_length=90, max_length=140)
    assert len(dataset.tokens(0)[0]) <= 140 and marked(dataset).endswith(
        f"56789\n</tool_response>{END}{BOT}[[ten{END}]]"
    )
    pair = {"prompt": "0123456789" * 3, "chosen": "abcd", "rejected": "efgh"}
    found = PreferenceDataset(write_lines(tmp_path / "q.jsonl", pair), tokenizer, 15, 6)
    assert marked(found) == ["456789", "abcd<|endoftext|>", "efgh<|endoftext|>"] and found.lengths[0] == 15


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired preference: dpo.py with loss_type kto"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen+rejected is for dpo.py; taken are src+tgt, messages"),
        ({"question": "a", "answer": "b"}, "no key of a known format; found 'question', 'answer'; taken are src+tgt"),
        ({"instruction": "a", "response": "b"}, "key 'output' is missing; found 'instruction', 'response'"),
        ({"messages": said("a")}, "no message of the assistant to learn"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0]: expected an object with the role"),
        ({"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": 0.5}]}, "messages[1]: 'weight'"),
        ({"messages": "a"}, "'messages' must be a list of messages"),
        ({"conversations": [{"from": "function_call", "value": "now()"}]}, "the value of function_call must be JSON"),
        ({"prompt": "a", "completion": said("a")}, "must both be texts or both be messages"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "'history' must be a list of [question, answer]"),
        ({"text": 7}, "'text' must be a string, found 7"),
    ],
)
def test_refused_conversations(tmp_path, tokenizer, record, message):
    path = write_lines(tmp_path / "train.jsonl", {"text": "good"}, record)
    with pytest.raises(UserError) as error:
        SFTDataset(path, tokenizer)
    text = one_line(error)
    assert text.startswith(f"{path}:2: ") and message in text and repr(next(iter(record))) in text


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "a", "completion": "b", "label": True}, "loss_type kto"),
        ({"messages": said("a", "b")}, "messages is for finetune.py; taken are src+response+sort"),
        ({"prompt": "a", "chosen": "b"}, "key 'rejected' is missing; found 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": said("a")}, "must all be texts or all be messages"),
        ({"chosen": said("a", "b", "c", "d"), "rejected": said("a", "e", "f", "g")}, "'chosen' must be one message"),
        ({"prompt": "z", "chosen": said("a", "b"), "rejected": said("a", "c")}, "do not begin with it"),
        ({"input": "a", "preferred_output": [], "non_preferred_output": []}, "'input' must be an object with 'mess"),
    ],
)
def test_refused_pairs(tmp_path, tokenizer, record, message):
    path = write_lines(tmp_path / "train.jsonl", {"chosen": "a b", "rejected": "a c"}, record)
    with pytest.raises(UserError) as error:
        PreferenceDataset(path, tokenizer)
    text = one_line(error)
    assert text.startswith(f"{path}:2: ") and message in text and "docs/data.md" in text


def test_records_to_be_answered_may_lack_their_reply():
    for record, prompt in (
        ({"src": "a"}, "a"),
        ({"src": ["a", "b"], "tgt": ["c", "d"]}, "b"),
        ({"messages": said("a", "c", "b")}, "b"),
        ({"messages": said("a", "c")}, "a"),
        ({"prompt": "a"}, "a"),
        ({"prompt": said("a")}, "a"),
        ({"instruction": "a", "input": "b"}, "a\nb"),
        ({"text": "a"}, "a"),
    ):
        assert parse_prompt(record, "f:1").rounds[-1][0] == prompt


def test_the_examples_of_the_documentation(tmp_path, tokenizer):
    text = (ROOT / "docs" / "data.md").read_text()
    examples = re.findall(r"^\| [\w, ]+ \| `(\{.*?\})`", text, re.M)
    records = [json.loads(example) for example in examples]
    assert [record_format(record, CONVERSATIONS) for record in records[:6]] == list(CONVERSATIONS)
    assert [record_format(record, PAIRS) for record in records[6:11]] == list(PAIRS) and len(records) == 13
    assert len(SFTDataset(write_lines(tmp_path / "a.jsonl", *records[:6]), tokenizer)) == 6
    assert len(PreferenceDataset(write_lines(tmp_path / "b.jsonl", *records[6:11]), tokenizer)) == 5
    assert len(UnpairedDataset(write_lines(tmp_path / "c.jsonl", *records[11:]), tokenizer)) == 2


# ------------------------------ files ------------------------------

ALPACA = [{"instruction": f"do {i}", "output": f"done, {i}"} for i in range(5)]


def texts_of(paths, tokenizer, split="train", **options):
    dataset = SFTDataset(paths, tokenizer, split=split, options=RecordOptions(**options))
    return [dataset.record(i) for i in range(len(dataset))]


def test_kinds_of_files(tmp_path, tokenizer):
    lines = "".join(json.dumps(record) + "\r\n" for record in ALPACA)
    array = json.dumps(ALPACA, indent=1)
    cells = "instruction,output\n" + "".join(f'"{r["instruction"]}","{r["output"]}"\n' for r in ALPACA)
    files = {
        "a.json": lines.encode("utf-8-sig"),
        "b.json": array.encode("utf-8-sig"),
        "c.jsonl.gz": gzip.compress(lines.encode()),
        "d.json.gz": gzip.compress(array.encode()),
        "e.csv": cells.encode("utf-8-sig"),
        "f.tsv": cells.replace('","', '"\t"').replace("n,o", "n\to").encode(),
        "g.csv.gz": gzip.compress(cells.encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert texts_of(tmp_path / name, tokenizer) == ALPACA, name
    messages = {"messages": said("a", "c"), "tools": [NOW]}
    quoted = ",".join('"' + json.dumps(messages[key]).replace('"', '""') + '"' for key in messages)
    (tmp_path / "m.csv").write_text(f"messages,tools\n{quoted}\n")
    assert texts_of(tmp_path / "m.csv", tokenizer) == [messages]


def test_parquet(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match="a.parquet: reading .parquet needs pyarrow: pip install pyarrow"):
            SFTDataset(tmp_path / "a.parquet", tokenizer)
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    pyarrow = sys.modules["pyarrow"]
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        SFTDataset(tmp_path / "a.parquet", tokenizer)
    rows = [{"messages": TIME, "tools": [NOW], "system": None}, {"messages": said("a", "c"), "tools": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    dataset = SFTDataset(tmp_path, tokenizer)
    assert marked(dataset).endswith(TOOL_CHAT) and marked(dataset, 1) == chat("a", "c")


def test_a_reader_that_leaves_is_no_traceback():
    root = Path(record_files.__file__).resolve().parents[1]
    line = f"{sys.executable} data.py show demo/sft --tokenizer demo/llama -n 300 | head -1"
    done = subprocess.run(line, shell=True, cwd=root, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("demo/sft/train.json:1: src+tgt")


def test_why_nothing_can_be_learned(tmp_path, tokenizer):
    """Lengths are named where lengths are the reason."""
    pair = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(UserError, match="none of the 1 records can be learned: the same reply twice"):
        PreferenceDataset(write_lines(tmp_path / "a.jsonl", pair), tokenizer)
    unlearned = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    with pytest.raises(UserError, match="none of the 1 records can be learned: no reply is to be learned"):
        SFTDataset(write_lines(tmp_path / "b.jsonl", unlearned), tokenizer)


def test_lines_of_a_json_array_are_named(tmp_path, tokenizer, monkeypatch):
    text = '[\n{"text": "a"},\n\n{"text": 1},\n{"text": "b"}]\n'
    for content, message in (
        (text, ":4: 'text' must be a string, found 1"),
        (text.replace("1}", '"c"'), ":5: not JSON"),
        (text.replace("1", '"c"').replace("]", ""), ":6: the JSON array does not end with ]"),
        (text.replace("1", '"c"') + "{}", ":5: the JSON array ends here, but more text follows"),
        ("[[1]]", ":1: a JSON object is expected"),
        (
            '{\n  "text": "a"\n}',
            ":1: not a JSON object on one line: it goes on in the next lines; write each record on one",
        ),
        (
            '{"instruction": null, "output": "a"}',
            ":1: key 'instruction' is missing; found 'instruction' (null), 'output'",
        ),
        ('{"text": "a"}\n' + "[" * 5000, ":2: not a JSON object on one line: maximum recursion"),
        ("[" * 5000, ":1: nested more than 100 deep"),
        ('[{"text": "\udcff"}]', ":1: not UTF-8"),
    ):
        (tmp_path / "x.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError) as error:
            SFTDataset(tmp_path / "x.json", tokenizer)
        assert f"x.json{message}" in one_line(error)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe[\x00]\x00")
    with pytest.raises(UserError, match="x.json: is UTF-16; save it as UTF-8"):
        SFTDataset(tmp_path / "x.json", tokenizer)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-30])
    with pytest.raises(UserError, match="x.jsonl.gz: damaged gzip file"):
        SFTDataset(tmp_path / "x.jsonl.gz", tokenizer)
    (tmp_path / "x.csv").write_text('text\n"a"\n"b",c\n')
    with pytest.raises(UserError, match="x.csv:3: more cells than the header has names"):
        SFTDataset(tmp_path / "x.csv", tokenizer)
    for separator, hint in ((";", "expected"), ("\t", "name the file .tsv")):
        (tmp_path / "x.csv").write_text(f"instruction{separator}output\na{separator}b\n")
        with pytest.raises(
            UserError, match=f"x.csv:1: the cells are separated by .* where a comma is expected.*{hint}|{hint}"
        ):
            SFTDataset(tmp_path / "x.csv", tokenizer)
    long = [{"text": "red lamp " * n} for n in range(300)]  # more than one piece of the file
    (tmp_path / "long.json").write_text(json.dumps(long, indent=2))
    monkeypatch.setattr(record_files, "PIECE", 1000)
    assert [(line, record) for (_, _, line), _, record in RecordReader(tmp_path / "long.json")] == [
        (2 + 3 * i, record) for i, record in enumerate(long)
    ]


def test_folders_of_hugging_face(tmp_path, tokenizer):
    for name, record in zip(("train-00001-of-00002", "train-00000-of-00002", "validation-00000-of-00001"), ALPACA):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_lines(tmp_path / "data" / f"{name}.jsonl", record)
    assert texts_of(tmp_path, tokenizer) == [ALPACA[1], ALPACA[0]]
    assert texts_of(tmp_path, tokenizer, "dev") == [ALPACA[2]]
    write_lines(tmp_path / "data" / "train_gen-00000-of-00001.jsonl", ALPACA[0])
    with pytest.raises(UserError, match="train and train_gen are several sets of files; name the files of one"):
        SFTDataset(tmp_path, tokenizer)


def test_blends(tmp_path, tokenizer):
    """As many records as there are; each source gives its share, again from the start when it runs out."""
    one = write_lines(tmp_path / "one.jsonl", *({"text": f"a{i}"} for i in range(30)))
    two = write_lines(tmp_path / "two.jsonl", *({"text": f"b{i}"} for i in range(10)))
    blend = f"0.5 {one} 0.5 {two}"
    texts = [record["text"] for record in texts_of(blend, tokenizer)]
    assert len(texts) == 40 and sum(text[0] == "b" for text in texts) == 20
    assert all(texts.count(f"b{i}") == 2 for i in range(10)) and max(map(texts.count, texts)) == 2
    assert texts == [record["text"] for record in texts_of(blend, tokenizer)]
    assert all(sum(text[0] == "b" for text in texts[i : i + 4]) == 2 for i in range(0, 40, 4))
    dataset = SFTDataset(blend, tokenizer)
    assert sorted(dataset.lengths.tolist()) == sorted(len(text) for text in texts)
    assert len(texts_of([one, two], tokenizer)) == len(texts_of(blend, tokenizer, "dev")) == 40
    assert blend_records([3, 1], [0.25, 0.75]).tolist().count(3) == 3
    with pytest.raises(UserError, match="every weight must be a positive number"):
        SFTDataset(f"-1 {one} 2 {two}", tokenizer)


# ------------------------------ options ------------------------------


def test_max_samples_and_columns(tmp_path, tokenizer):
    path = write_lines(tmp_path / "train.jsonl", *({"question": f"q{i}", "answer": f"r{i}"} for i in range(9)))
    columns = {"instruction": "question", "output": "answer"}
    dataset = SFTDataset(path, tokenizer, options=RecordOptions(max_samples=4, columns=json.dumps(columns)))
    assert len(dataset) == 4 and marked(dataset, 3) == chat("q3", "r3") and dataset.reference(3) == "r3"
    assert dataset.record(3) == {"question": "q3", "answer": "r3"}
    pairs = write_lines(tmp_path / "pairs.jsonl", {"q": "a", "good": "x", "bad": "y"})
    names = {"instruction": "q", "chosen": "good", "rejected": "bad"}
    assert marked(PreferenceDataset(pairs, tokenizer, options=RecordOptions(columns=names))) == list(CHATML_PAIR)
    for options, message in (
        ({"columns": {"instruction": "question", "output": "reply"}}, "key 'output' is missing"),
        ({"columns": columns | {"system": "rules"}}, "columns: no record of .* has a key 'rules'"),
        ({"columns": {"outptu": "answer"}}, "columns: 'outptu' is no key of a format; did you mean output"),
        ({"columns": "question"}, "columns: not JSON"),
        ({"columns": ["a"]}, "columns: .* needed is a JSON object"),
        ({"max_samples": 0}, "max_samples: 0"),
        ({"val_size": 1.5}, "val_size: 1.5"),
        ({"train_on": "first"}, "train_on: 'first'; possible are all and last"),
    ):
        with pytest.raises(UserError, match=message):
            SFTDataset(path, tokenizer, options=RecordOptions(**options))


@pytest.mark.parametrize("size, low, high", [(0.2, 130, 270), (100, 100, 100)])
def test_val_size_holds_out_records_that_never_move(tmp_path, tokenizer, size, low, high):
    records = [{"instruction": f"do {i}", "output": f"done {i}"} for i in range(1000)]
    path = write_lines(tmp_path / "train.jsonl", *records)
    train, dev = (texts_of(path, tokenizer, split, val_size=size) for split in ("train", "dev"))
    assert low <= len(dev) <= high and len(train) + len(dev) == 1000
    assert sorted(map(str, train + dev)) == sorted(map(str, records))
    if size < 1:  # in any order, with other records beside them, and with their keys in another order
        shuffled = [dict(reversed(record.items())) for record in reversed(records)] + [{"text": "new"}] + records[:9]
        write_lines(path, *shuffled)
        held_out = [record for record in texts_of(path, tokenizer, "dev", val_size=size) if "text" not in record]
        assert {record["output"] for record in held_out} == {record["output"] for record in dev}


def test_val_size_is_refused_beside_dev_data(tmp_path, tokenizer):
    write_lines(tmp_path / "train.jsonl", *ALPACA)
    assert len(texts_of(tmp_path, tokenizer, val_size=2)) == 3
    with pytest.raises(UserError, match="val_size: 5 of 5 records leaves none to train on"):
        texts_of(tmp_path, tokenizer, val_size=5)
    with pytest.raises(UserError, match="val_size 1e-09 leaves no dev record; equal records stay together"):
        texts_of(tmp_path, tokenizer, "dev", val_size=1e-9)
    write_lines(tmp_path / "validation.jsonl", *ALPACA)
    with pytest.raises(UserError, match="val_size: .* has dev data, validation.jsonl; give one of the two"):
        texts_of(tmp_path, tokenizer, val_size=2)


# ------------------------------ odd text ------------------------------


def test_odd_text(tmp_path, tokenizer, capsys):
    """A BOM goes, U+2028, NUL and ZWJ stay, a lone surrogate becomes U+FFFD and is counted."""
    odd = "a\u2028b\x00c\u200dd"
    text = json.dumps({"src": odd, "tgt": "x"}, ensure_ascii=False) + '\r\n{"src": "\\ud83d!", "tgt": "\\ud83d\\ude00"}'
    (tmp_path / "train.jsonl").write_bytes(text.encode("utf-8-sig"))
    dataset = SFTDataset(tmp_path, tokenizer)
    assert [dataset.conversation(i).rounds for i in range(2)] == [[(odd, "x")], [("\ufffd!", "\U0001f600")]]
    assert dataset.replaced == 1
    assert capsys.readouterr().out == f"{tmp_path / 'train.jsonl'}: 1 lone surrogates became U+FFFD\n"
    for raw in (b'{"a\\udc00": ["\\ud800\\ud800"]}', b'{"a\xed\xb0\x80": ["\xed\xa0\x80\xed\xa0\x80"]}'):
        assert parse_record(raw, "f", 1) == ({"a\ufffd": ["\ufffd\ufffd"]}, 3)


def test_corpus_takes_folders_gzip_bom_and_surrogates(tmp_path, tokenizer, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes("one\ntwo\n\nthree".encode("utf-8-sig"))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "\\ud800"}\n'))
    (tmp_path / "in" / "c.json").write_text('[{"text": "four"},\n {"text": ""}]', encoding="utf-8-sig")
    (tmp_path / "in" / "d.csv").write_text('text\n"fi,ve"\n')
    (tmp_path / "in" / "e.txt.gz").write_bytes(gzip.compress(b"six"))
    (tmp_path / "in" / "notes.md").write_text("not read")
    assert (
        data.main(
            ["corpus", str(tmp_path / "in"), "--tokenizer", str(tokenizer.folder), "--output", str(tmp_path / "out")]
        )
        == 0
    )
    assert "1 lone surrogates became U+FFFD" in capsys.readouterr().out
    tokens = data.Corpus(tmp_path / "out").tokens
    texts = tokenizer.decode(tokens.tolist(), False).split("<|endoftext|>")
    assert texts == ["one\ntwo", "three", "\ufffd", "four", "fi,ve", "six", ""]
    (tmp_path / "in" / "f.json").write_text('[{"text": "a"},\n {"text": 1}]')
    assert (
        data.main(
            ["corpus", str(tmp_path / "in"), "--tokenizer", str(tokenizer.folder), "--output", str(tmp_path / "new")]
        )
        == 2
    )
    assert "f.json:2: key 'text' must be there and a string" in capsys.readouterr().err


def test_five_thousand_rounds(tmp_path, tokenizer):
    texts = [f"t{i}" for i in range(10_000)]
    path = write_lines(tmp_path / "train.jsonl", {"messages": said(*texts)})
    dataset = SFTDataset(path, tokenizer, src_length=500, max_length=1000)
    assert 900 < dataset.lengths[0] < 1000 and marked(dataset).endswith(chat("t9998", "t9999"))
    assert len(SFTDataset(path, tokenizer, max_length=10**6).tokens(0)[0]) > 10**5


# ------------------------------ python data.py show ------------------------------


def test_show(tmp_path, tokenizer, capsys):
    path = write_lines(
        tmp_path / "train.jsonl",
        {"text": "red"},
        *ALPACA,
        {"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": 0}]},
    )
    command = ["show", str(path), "--tokenizer", str(tokenizer.folder), "--chat_template", "chatml", "-n", "2"]
    assert data.main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{path}:1: text, 4 tokens, 4 learned"
    assert out[1:3] == ["  ids: 114 101 100 256", "  text: [[red<|endoftext|>]]"]
    assert out[3].startswith(f"{path}:2: instruction+output, ") and "6 records, 1 dropped" in out
    assert "  1: no reply is to be learned" in out
    histogram = [line.split() for line in out if line.strip().endswith("#")]
    assert sum(int(row[3]) for row in histogram) == 6 and [row[0] for row in histogram] == ["4", "32"]
    write_lines(path, {"chosen": "a b", "rejected": "a c"})
    assert data.main(command) == 0 and "  chosen text: [[ b<|endoftext|>]]" in capsys.readouterr().out
    assert data.main([*command, "--val_size", "0"]) == 2 and "error: val_size: 0" in capsys.readouterr().err
    colored = data.marked_text(tokenizer, np.array([114, 101]), np.array([False, True]), color=True)
    assert colored == "r\x1b[32me\x1b[0m"


# ------------------------------ against TRL ------------------------------

# ChatML that marks replies as TRL needs it; tools are compared where the completion tells what is learned.
MARKED_CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TRL = """
import json, types
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

arrays = {}
for name, (folder, records) in json.loads(open(sys.argv[2]).read()).items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = dict(output_dir="out", max_length=None, use_cpu=True, bf16=False, report_to="none")
    is_pair, is_completion = "rejected" in records[0], "completion" in records[0]
    if is_pair:
        args, Trainer = DPOConfig(**options), DPOTrainer
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    else:
        chats = "messages" in records[0] or "conversations" in records[0]
        args, Trainer = SFTConfig(assistant_only_loss=chats, **options), SFTTrainer
        keys = ("input_ids", "labels")
    trainer = types.SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=is_completion)
    more = () if is_pair else (False, None)
    rows = Trainer._prepare_dataset(trainer, Dataset.from_list(records), tokenizer, args, *more, "train")
    for i, row in enumerate(rows):
        for key in keys:
            arrays[f"{name} {i} {key}"] = np.array(row[key])
"""


@pytest.mark.torch
def test_ids_and_labels_equal_trl(tmp_path, hf_python):
    plain = load_tokenizer(make_tokenizer(tmp_path / "bytes"))
    folders = {"marked": make_tokenizer(tmp_path / "marked", MARKED_CHATML)}
    plain.chat_template = load_chat_template("chatml")
    plain.save(tmp_path / "tools")
    (tmp_path / "tools" / "tokenizer_config.json").write_text(
        (tmp_path / "bytes" / "tokenizer_config.json").read_text()
    )
    (tmp_path / "tools" / "chat_template.jinja").write_text(plain.chat_template.jinja())
    folders["tools"] = tmp_path / "tools"
    call = {"function": {"name": "now", "arguments": {"zone": "utc"}}, "type": "function"}
    time = [
        said("time?")[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "10"},
        {"role": "assistant", "content": "ten"},
    ]
    system = {"role": "system", "content": "S"}
    cases = {
        "messages": ("marked", [{"messages": said("a", "c", "b é", "d")}, {"messages": [system, *said(" a ", "c\n")]}]),
        "conversations": (
            "marked",
            [
                {
                    "conversations": [
                        {"from": "system", "value": "S"},
                        {"from": "user", "value": "a"},
                        {"from": "assistant", "value": "c"},
                    ]
                }
            ],
        ),
        "prompt+completion": ("marked", [{"prompt": "a b", "completion": " c"}, {"prompt": "", "completion": "x"}]),
        "prompt+completion messages": (
            "marked",
            [{"prompt": [system, *said("a", "c", "b")], "completion": said("", "d")[1:]}],
        ),
        "tools": (
            "tools",
            [
                {"prompt": time[:1], "completion": time[1:2], "tools": [NOW]},
                {"prompt": time[:3], "completion": time[3:], "tools": [NOW]},
            ],
        ),
        "text": ("marked", [{"text": "all of it"}, {"text": "ends<|endoftext|>"}]),
        "pairs of texts": ("marked", [{"prompt": "a", "chosen": " x", "rejected": " y"}]),
        "implicit texts": ("marked", [{"chosen": "a b x", "rejected": "a b y"}, {"chosen": "ab", "rejected": "ac"}]),
        "pairs of messages": ("marked", [{"prompt": [system, *said("a", "c", "b")], **ENDS}]),
        "implicit messages": ("marked", [{"chosen": said("a", "x"), "rejected": said("a", "y")}]),
    }
    given = {name: (str(folders[folder]), records) for name, (folder, records) in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(given))
    found = hf_python(TRL, tmp_path / "cases.json")
    for name, (folder, records) in given.items():
        path, tokenizer = write_lines(tmp_path / "train.jsonl", *records), load_tokenizer(folder)
        dataset = (PreferenceDataset if "rejected" in records[0] else SFTDataset)(path, tokenizer)
        for i in range(len(records)):
            if isinstance(dataset, PreferenceDataset):
                ours = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), dataset.pair(i)))
            else:
                ids, learned = dataset.tokens(i)
                ours = {"input_ids": ids, "labels": np.where(learned, ids, -100)}
            for key, value in ours.items():
                assert value.tolist() == found[f"{name} {i} {key}"].tolist(), (name, i, key)


# ------------------------------ fuzz ------------------------------

DEEP, LONG = "\0deep\0", "\0long\0"  # stand for what json.dumps cannot or should not write
ODD = (
    None,
    0,
    1,
    -1.5,
    True,
    "",
    " ",
    "a\x00b",
    "\ud800",
    "x\udc00y\ud83d",
    "\u2028",
    "<|im_end|>",
    [],
    {},
    [[]],
    [None],
    [{}],
    ["a"],
    [["a", "b"]],
    {"a": {}},
    {"role": "user"},
    {"from": "gpt", "value": 1},
    DEEP,
    LONG,
    10**30,
    float("nan"),
    "[1]",
    "{",
    [{"type": "image_url"}],
    said("a"),
    said("a", "b"),
    [{"role": "tool", "content": "x"}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": 3}}]}],
    "system",
    "tool",
    {"function": {"name": "f", "arguments": "{"}},
    {"name": "f", "parameters": None},
)


def odd_record(random, examples, names):
    """A good record with up to four oddities: values replaced, keys dropped, renamed or added, lists repeated."""
    record = json.loads(json.dumps(examples[random.randint(len(examples))]))

    def places(value, found):
        for key in list(value if isinstance(value, dict) else range(len(value))):
            found.append((value, key))
            if isinstance(value[key], dict | list):
                places(value[key], found)
        return found

    for _ in range(random.choice([1, 1, 2, 4])):
        found = places(record, [])
        if not found:
            break
        value, key = found[random.randint(len(found))]
        kind = random.randint(6)
        if kind <= 1:
            value[key] = copy.deepcopy(ODD[random.randint(len(ODD))])
        elif kind == 2:
            del value[key]
        elif kind == 3 and isinstance(value, dict):
            value[names[random.randint(len(names))]] = value.pop(key)
        elif kind == 4:
            record[names[random.randint(len(names))]] = copy.deepcopy(ODD[random.randint(len(ODD))])
        elif isinstance(value[key], list):
            value[key] *= random.choice([2, 3, 50])
    return record


@pytest.mark.parametrize("count, seed, most", [(200, 0, 10**4), pytest.param(1500, 1, 10**6, marks=pytest.mark.slow)])
def test_odd_records(tmp_path, tokenizer, capsys, count, seed, most):
    """A record of any shape is read, dropped or refused by one line with file and line; nothing else is raised."""
    random = np.random.RandomState(seed)
    examples = [record for rows in (SEEN, SEEN_PAIRS) for row in rows.values() for record, _ in row]
    names = sorted(
        {*record_files.KNOWN_KEYS, "role", "content", "from", "value", "weight", "label", "tool_calls", "name"}
    )
    templates = [load_chat_template(name) for name in ("chatml", "plain", "qwen3", "deepseek-v2")]
    templates.append(data.load_chat_template(tmp_path / "t.jinja") if write_jinja(tmp_path / "t.jinja") else None)
    good = '{"src": "a", "tgt": "b", "chosen": "a c", "rejected": "a d", "text": "a"}'
    outcomes = {"read": 0, "dropped": 0, "refused": 0}
    for n in range(count):
        record, path = odd_record(random, examples, names), tmp_path / f"{n}.json"
        if n % 500 == 99:
            record = {"messages": said(*"ab" * (5000 if most > 10**5 else 100))}
        elif n == 50:
            record = {"messages": said(LONG, LONG)}
        text = json.dumps(record).replace(json.dumps(DEEP), "[" * 2000 + "]" * 2000)
        text = text.replace(json.dumps(LONG), json.dumps("long text " * (most // 10 if n == 50 else 50)))
        text = text[: random.randint(len(text))] if n % 40 == 0 else text
        is_array = n % 3 == 2
        path.write_text(f"[{good},\n{text}]" if is_array else f"{good}\n{text}\n", encoding="utf-8")
        tokenizer.chat_template = templates[n % len(templates)]
        for open_file in (
            lambda path: SFTDataset(path, tokenizer, 64, 128),
            lambda path: PreferenceDataset(path, tokenizer, 128, 64),
            lambda path: prompts_of(path, tokenizer),
        ):
            try:
                dataset = open_file(path)
                if isinstance(dataset, SFTDataset):
                    assert all(dataset.prompt_text(i) is not None for i in range(len(dataset)))
                    assert all(dataset.prompt_ids(i) is not None for i in range(len(dataset)))
                outcomes["read" if len(dataset) == 2 else "dropped"] += 1
            except UserError as error:
                assert "\n" not in str(error) and f"{path}:2" in str(error), (str(error), text[:300])
                outcomes["refused"] += 1
        path.unlink()
    tokenizer.chat_template = templates[0]
    capsys.readouterr()
    print(outcomes)
    assert min(outcomes["read"], outcomes["refused"]) > count / 3, outcomes


def prompts_of(path, tokenizer):
    """As serve.py's data_file."""
    prompts = []
    for _, where, record in RecordReader(path):
        conversation = parse_prompt(record, where)
        with located(where):
            prompts.append(data.conversation_prompt(tokenizer, conversation, 64, 64))
    return prompts


def write_jinja(path):
    return path.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
        "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )


# ------------------------------ the scripts' keys ------------------------------


def test_keys_of_the_scripts(tmp_path, capsys):
    """columns as JSON text or an object of a JSON file; val_size of dpo.py stands for the dev data."""
    import dpo
    import finetune
    from arguments import parse_args

    columns = {"instruction": "question", "output": "answer"}
    (tmp_path / "c.json").write_text(json.dumps({"columns": columns, "max_samples": 3, "train_on": "last"}))
    basic = ["--model_name_or_path", "m", "--output_dir", str(tmp_path / "out"), "--do_train", "--do_eval"]
    tuned = [*basic, "--dataset_name_or_path", "d", str(tmp_path / "c.json")]
    args = parse_args(finetune.Args, tuned)
    assert RecordOptions.of(args) == RecordOptions(3, None, columns, "last")
    args = parse_args(finetune.Args, [*tuned, "--columns", json.dumps(columns), "--val_size", "0.1"])
    assert RecordOptions.of(args) == RecordOptions(3, 0.1, columns, "last")
    for more, message in (
        (["--train_on", "first"], "train_on: 'first'; possible are all and last"),
        (["--val_size", "1.5"], "val_size: 1.5; a share between 0 and 1 or a whole number of records is needed"),
        (["--columns", "question"], "columns: not JSON"),
    ):
        with pytest.raises(UserError) as error:
            parse_args(finetune.Args, [*tuned, *more])
        assert message in one_line(error)
    args = parse_args(dpo.Args, [*basic, "--train_dataset_path", "p", "--val_size", "7"])
    assert args.dev_dataset_path == "p" and RecordOptions.of(args).val_size == 7
    with pytest.raises(UserError, match="val_size and dev_dataset_path are both given"):
        parse_args(dpo.Args, [*basic, "--train_dataset_path", "p", "--dev_dataset_path", "q", "--val_size", "7"])


def test_what_scripts_print(capsys):
    """One line where more positions are asked for than a model was trained on; odd keywords."""
    from types import SimpleNamespace

    import trainer

    config = SimpleNamespace(max_position_embeddings=1024, position="rope", max_model_len=1024)
    trainer.check_positions(SimpleNamespace(config=config), "demo", {"max_length": 2048, "src_length": 9})
    trainer.check_positions(SimpleNamespace(config=config), "demo", {"max_length": 1024})
    assert capsys.readouterr().out == "max_length: 2,048 positions are asked for, but demo was trained on 1,024\n"
    trainer.print_replies(["(turn 2 of 2) b"], ["x"], ["y"])
    assert capsys.readouterr().out == "\nprompt: (turn 2 of 2) b\nbefore: x\nafter:  y\n"
    records = [{"keywords": None}, {"keywords": "red"}, {"keywords": ["red", 7]}]
    assert trainer.keyword_recall(["red"] * 3, records) == 0.5 and trainer.keyword_recall(["a"], [{}]) is None
