"""The demo data: formats, keywords, what dev may hold, sizes, and that make_demo.py still writes what is committed.

python -m pytest -q tests/test_demo.py     # any machine, a few seconds; no corpus.jsonl and no weights needed
"""

import json
import random
import sys
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece

DEMO = Path(__file__).resolve().parent.parent / "demo"
sys.path.insert(0, str(DEMO))
import draw_curves
import make_demo
import make_sums
import rewards
import shop_texts
import shop_words

SFT_FILES = ("sft/train.json", "sft/dev.json")
PREFERENCE_FILES = ("preference/train.jsonl", "preference/dev.jsonl")


def read(name):
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def as_list(text):
    return [text] if isinstance(text, str) else text


def pairs_asked(source):
    """'type#dress*color#red*material#silk' -> {("dress", "red"), ("dress", "silk")}"""
    kind, *values = [pair.split("#")[1] for pair in source.split("*")]
    return {(kind, value) for value in values}


def values_asked(source):
    return [pair.split("#")[1] for pair in source.split("*")]


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "llama" / "tokenizer.model"))


@pytest.mark.parametrize(
    "write",
    [
        shop_texts.corpus_texts,
        lambda count: make_demo.sft_records("train", count),
        lambda count: make_demo.preference_records("dev", count),
    ],
)
def test_same_seed_same_records_whatever_the_count(write):
    first = list(write(60))
    assert first == list(write(60)) == list(islice(write(100), 60))


def test_committed_sets_are_what_the_script_writes(tmp_path):
    make_demo.write_sets(tmp_path)
    for name in SFT_FILES + PREFERENCE_FILES:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_committed_tokenizer_is_what_the_script_trains(tmp_path, tokenizer):
    """Pieces, not bytes: another sentencepiece release may store its options differently. config.json may have more
    keys once pretrain.py has saved the weights beside it."""
    make_demo.write_model_folder(tmp_path)
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama" / "tokenizer.model"))
    assert again.get_piece_size() == tokenizer.get_piece_size() == make_demo.VOCAB_SIZE
    for index in range(make_demo.VOCAB_SIZE):
        assert again.id_to_piece(index) == tokenizer.id_to_piece(index)
    for name in ("tokenizer_config.json", "chat_template.json", "config.json"):
        written, committed = [json.loads((folder / "llama" / name).read_text()) for folder in (tmp_path, DEMO)]
        assert {key: committed.get(key) for key in written} == written, name


@pytest.mark.parametrize("name", SFT_FILES)
def test_sft_format(name):
    records = read(name)
    assert len(records) == make_demo.SFT_COUNTS[Path(name).stem]
    for record in records:
        assert set(record) <= {"src", "tgt", "context", "keywords"}
        assert type(record["src"]) is type(record["tgt"])
        sources, targets = as_list(record["src"]), as_list(record["tgt"])
        assert len(sources) == len(targets) and all(text.strip() for text in sources + targets)
        assert isinstance(record["src"], str) == ("keywords" in record)
        assert record.get("context", {"system": "-"})["system"]
    shares = [
        sum(isinstance(record["src"], list) for record in records),
        sum("context" in record for record in records),
        sum(record_is_chinese(record) for record in records),
    ]
    for share, expected in zip(shares, (0.1, 0.1, 0.5)):
        assert abs(share / len(records) - expected) < 0.1


def record_is_chinese(record):
    return as_list(record["src"])[0].startswith("类型#")


@pytest.mark.parametrize("name", SFT_FILES)
def test_every_reply_mentions_what_was_asked(name):
    for record in read(name):
        source, target = as_list(record["src"])[0], as_list(record["tgt"])[0]
        asked = values_asked(source)
        assert [value for value in asked if not shop_texts.mentions(target, value)] == []
        if "keywords" in record:
            assert sorted(record["keywords"]) == sorted(asked)


def test_replies_are_short_and_varied(tokenizer):
    texts = [record["tgt"] for record in read("sft/train.json") if "keywords" in record]
    lengths = sorted(len(tokenizer.encode(text)) for text in texts)
    assert lengths[len(lengths) // 20] >= 28 and lengths[-len(lengths) // 20] <= 70
    assert all(1 < shop_texts.count_sentences(text) <= 5 for text in texts)
    assert len(set(texts)) > 0.98 * len(texts)


@pytest.mark.parametrize("train, dev", [SFT_FILES, PREFERENCE_FILES])
def test_each_dev_record_has_a_pair_that_train_never_has(train, dev):
    seen = set().union(*(pairs_asked(as_list(record["src"])[0]) for record in read(train)))
    assert all(pairs_asked(as_list(record["src"])[0]) - seen for record in read(dev))


def test_system_prompts_are_kept():
    endings = {"zh": shop_words.CLOSING_ZH, "en": shop_words.CLOSING_EN}
    openings = {"zh": shop_words.OPENING_ZH, "en": shop_words.OPENING_EN}
    tones = {
        prompt: (tone, language)
        for tone, prompts in shop_words.TONES.items()
        for language in prompts
        for prompt in prompts[language]
    }
    for record in [record for name in SFT_FILES for record in read(name) if "context" in record]:
        tone, language = tones[record["context"]["system"]]
        text = record["tgt"]
        if tone == "brief":
            assert shop_texts.count_sentences(text) == 2
        if tone in endings[language]:
            possible = [closing.format(them=them) for closing in endings[language][tone] for them in ("it", "them")]
            assert text.endswith(tuple(possible))
        if tone in openings[language]:
            assert any(text.startswith(opening.split("{")[0]) for opening in openings[language][tone])


@pytest.mark.parametrize("name", PREFERENCE_FILES)
def test_preference_format(name):
    records = read(name)
    assert len(records) == make_demo.PREFERENCE_COUNTS[Path(name).stem]
    for record in records:
        assert set(record) == {"src", "tgt", "response", "sort"}
        assert len(record["src"]) == len(record["tgt"]) + 1
        assert len(record["response"]) == 2 and all(text.strip() for text in record["response"])
        assert sorted(record["sort"]) == [0, 1]
        better, worse = [record["response"][record["sort"].index(mark)] for mark in (1, 0)]
        asked = values_asked(record["src"][0])
        assert all(shop_texts.mentions(better, value) for value in asked)
        assert not all(shop_texts.mentions(worse, value) for value in asked)
    first_is_better = sum(record["sort"][0] for record in records) / len(records)
    assert 0.35 < first_is_better < 0.65
    assert any(record["tgt"] for record in records)


def test_a_curve_is_drawn(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 3, "reward": 0.75}\n')
    assert draw_curves.main([str(tmp_path), str(tmp_path / "out.svg"), "reward"]) == 0
    svg = (tmp_path / "out.svg").read_text()
    assert '<path d="M46.0,148.0 260.0,26.0"/>' in svg and ">0.75</text>" in svg
    assert draw_curves.main(["x"]) == 2 and capsys.readouterr().err.startswith("error: draw_curves.py")
    with pytest.raises(SystemExit, match="no line has 'kl'; it has step, reward"):
        draw_curves.main([str(tmp_path), "out.svg", "kl"])


def test_corpus_never_shows_the_task():
    texts = list(shop_texts.corpus_texts(4000))
    for key in shop_words.KEY_NAMES.values():
        assert not any(f"{word}#" in text for word in key for text in texts)
    for mark in ("#", "*", "<|im_start|>", "<|im_end|>"):
        assert any(mark in text for text in texts)


def test_tokenizer(tokenizer):
    assert [tokenizer.id_to_piece(index) for index in range(7)] == ["<unk>", "<s>", "</s>", *make_demo.SYMBOLS]
    assert tokenizer.encode("type#red*color#red", out_type=str)[-4:] == ["*", "color", "#", "red"]
    for text in (
        "The 48 red dresses",
        "这款红色连衣裙，很好看。",
        "two\nlines",
        "😀 not in the corpus: ë",
        "<|im_start|>user",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    texts = list(shop_texts.corpus_texts(300))
    ids = [tokenizer.encode(text) for text in texts]
    assert sum(len(text.encode()) for text in texts) / sum(map(len, ids)) > 3.5  # bytes a token
    assert 0 not in set().union(*ids)


def test_config_and_sizes():
    config = json.loads((DEMO / "llama" / "config.json").read_text())
    assert config["vocab_size"] == make_demo.VOCAB_SIZE
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    assert make_demo.count_parameters(config) <= 3_000_000
    names = (*SFT_FILES, *PREFERENCE_FILES, "llama/tokenizer.model", "llama/tokenizer_config.json", "llama/config.json")
    assert sum((DEMO / name).stat().st_size for name in names) <= 1_900_000


def test_wrong_argument_is_one_line(capsys):
    assert make_demo.main(["corpse"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- sums


def test_sums_are_the_same_each_time_and_those_of_dev_are_new(tmp_path, capsys):
    for folder in ("a", "b"):
        assert make_sums.main([str(tmp_path / folder)]) == 0
    sums = {}
    for name, count in make_sums.COUNTS.items():
        text = (tmp_path / "a" / f"{name}.json").read_bytes()
        assert text == (tmp_path / "b" / f"{name}.json").read_bytes() and text.count(b"\n") == count
        sums[name] = {json.loads(line)["src"] for line in text.splitlines()}
    assert not (sums["sft/train"] | sums["rl/train"]) & (sums["sft/dev"] | sums["rl/dev"])
    assert make_sums.main([]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_sum_is_right_only_with_every_carry():
    rng = random.Random(0)
    assert make_sums.steps_of(37, 85, 0.0, rng) == "7+5=12\n3+8+1=12\n122"
    assert make_sums.steps_of(37, 85, 1.0, rng) == "7+5=12\n3+8=11\n112"
    assert make_sums.steps_of(995, 5 + 100, 0.0, rng) == "5+5=10\n9+0+1=10\n9+1+1=11\n1100"
    records = make_sums.records("rl/dev", 300)
    for forgotten, reward in ((0.0, 1.0), (1.0, 0.0)):
        pairs = [map(int, record["src"].rstrip("=").split("+")) for record in records]
        replies = [make_sums.steps_of(*pair, forgotten, rng) for pair in pairs]
        assert rewards.sum_is_right(replies, [record["answer"] for record in records]) == [reward] * 300
    assert rewards.sum_is_right(["7+5=12\n122 ", "1220", ""], [122, 122, 122]) == [1.0, 0.0, 0.0]
