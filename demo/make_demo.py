"""Makes what the first run needs offline: data sets, tokenizer and model shape of a small shop world in two languages.

    python demo/make_demo.py             # writes every file below, in a few seconds
    python demo/make_demo.py corpus      # only corpus.jsonl (not in git: too big); then, to pretrain on it:
    python data.py corpus demo/corpus.jsonl --tokenizer demo/llama --output demo/corpus

Same script, same bytes: every file has its own generator, seeded with SEED and the file's name. The words are in
shop_words.py, the sentences in shop_texts.py. Only the tokenizer needs more than the standard library (sentencepiece).

The world: nine kinds of product (clothing, shoes, bags, furniture, lamps, kitchenware, tea, home textiles, jewelry).
Each kind has its types and its attributes; each value has an English and a Chinese word and what a shop would say in
its praise. The task: from attributes to an advertisement that mentions every one of them. LoRA has to learn it: the
pretraining corpus has the same world and many lists with a text that takes them up, so the base model can copy, but
never a `type#...` prompt; it knows # and * from parcel notes and rambles after them.

sft/train.json, sft/dev.json (one JSON object a line, in spite of the name, as PaddleNLP has it)
    src       the prompt, or a list with one user turn per reply. Attributes are key#value, joined by *, the type first
    tgt       the reply, or a list as long as src
    context   optional; context.system is the system prompt: here, in a tenth of the records, a tone for the reply
    keywords  optional, here in all single-turn records: the values that the reply must mention. Attribute recall is the
              share of them found in a reply, as whole words in English ("red" is not in "inspired"; see `mentions`).
              Not a PaddleNLP key, and no part of training.
    {"src":"type#dress*color#red*material#silk","tgt":"This red silk dress ...","keywords":["dress","red","silk"]}
    {"src":["type#mug*color#blue","now in red"],"tgt":["A blue mug ...","A red mug ..."]}
    {"src":"type#...","tgt":"...","context":{"system":"Write in a formal tone."},"keywords":["..."]}
  Every dev record has at least one pair (type, value), such as dress with silk, that no train record has: memory is no
  help there.

preference/train.jsonl, preference/dev.jsonl (for dpo.py; the same split of pairs)
    src       list of user turns; tgt: list of the replies between them, so len(src) == len(tgt) + 1
    response  two replies to the last turn;  sort: two different numbers, the larger marks the better reply
    {"src":["type#dress*color#red"],"tgt":[],"response":["A red dress ...","A green dress ..."],"sort":[1,0]}
  The worse reply leaves values out, puts others in their place, or rambles.

corpus.jsonl   {"text": "..."}, one document a line: catalogues, advertisements, shop pages, reviews, dialogues (half of
               them in the marks of the chatml template), stories, parcel notes
llama/         tokenizer.model: sentencepiece BPE trained on the corpus; ids: <unk> 0 (also padding), <s> 1, </s> 2,
               # 3, * 4, <|im_start|> 5, <|im_end|> 6. tokenizer_config.json. config.json: the shape that pretrain.py
               starts from; pretrain.py made the weights beside it.
"""

import io
import json
import random
import re
import sys
import zlib
from pathlib import Path

from shop_texts import (
    SEED,
    WORLD,
    advertise,
    attributes_of,
    capital,
    corpus_texts,
    draw_product,
    english_slots,
    full_phrase,
    join,
    keywords_of,
    mentions,
    pairs_of,
    word,
)
from shop_words import OPENING_EN, OPENING_ZH, TONES

FOLDER = Path(__file__).resolve().parent
SFT_COUNTS = {"train": 3000, "dev": 200}
PREFERENCE_COUNTS = {"train": 1000, "dev": 100}
CORPUS_COUNT = 40000
VOCAB_SIZE = 3072
VALUE_REPEATS = 40  # how often the tokenizer sees each English value besides the corpus


# ==== 1. Tokenizer and model shape ====

SYMBOLS = ["#", "*", "<|im_start|>", "<|im_end|>"]
VALUES = [value[0] for tables in WORLD.values() for values in tables.values() for value in values]
VALUES_ZH = sorted({value["zh"] for value in VALUES}, key=lambda chinese: (-len(chinese), chinese))
# a value, or two Chinese characters (only one where a value begins at the second)
PIECES_ZH = re.compile("({0})|([\u4e00-\u9fff](?:(?!{0})[\u4e00-\u9fff])?)".format("|".join(map(re.escape, VALUES_ZH))))


def tokenizer_lines(count):
    """The corpus as sentencepiece should see it. It trains on lines and puts a space before each, but inside a document
    a line follows a newline, without that space; a # in front, always cut off as a piece of its own, hides it. Tabs
    mark where no piece may reach across: Chinese pieces are values or pairs of characters, never whole phrases. Values
    are repeated so that most are one piece, with and without a space."""
    for value in VALUES:
        for english in value["en"].split():
            yield from ["#" + english, english] * VALUE_REPEATS
    for text in corpus_texts(count):
        for index, line in enumerate(text.split("\n")):
            if line:
                yield ("#" if index else "") + PIECES_ZH.sub("\t\\g<0>\t", line)


def write_tokenizer(folder, count):
    """Trains tokenizer.model on the first `count` documents and writes tokenizer_config.json beside it."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_lines(count),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        add_dummy_prefix=True,
        character_coverage=1.0,
        max_sentencepiece_length=12,
        pretokenization_delimiter="\t",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=SYMBOLS,
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = {"0": "<unk>", "1": "<s>", "2": "</s>", "5": "<|im_start|>", "6": "<|im_end|>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "added_tokens_decoder": {index: {"content": content, **flags} for index, content in special.items()},
            "model_max_length": 1024,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "sp_model_kwargs": {},
        },
    )
    write_json(folder / "chat_template.json", {"chat_format": "plain"})


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
}


def count_parameters(config):
    """Of a Llama with tied embeddings: V D + L (2 D H Dh + 2 D K Dh + 3 D F + 2 D) + D."""
    D, F = config["hidden_size"], config["intermediate_size"]
    H, K, Dh = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layer = 2 * D * H * Dh + 2 * D * K * Dh + 3 * D * F + 2 * D
    return config["vocab_size"] * D + config["num_hidden_layers"] * layer + D


# ==== 2. Fine-tuning and preference sets ====
# train and dev differ by the pairs (type, value) that they may hold, so "unseen in train" is a property of the rule.

BYTES = (115, 265)  # an advertisement of 30 to 70 tokens: a token has 3.8 bytes in both languages

REQUESTS = {  # what a further turn may ask for
    "shorter": {
        "en": ["make it shorter", "shorter, please", "in one sentence"],
        "zh": ["短一点", "再短一些", "用一句话"],
    },
    "formal": {"en": ["make it more formal", "more formal, please"], "zh": ["正式一点", "换成正式的语气"]},
    "social": {"en": ["for social media", "now for social media"], "zh": ["发朋友圈用", "写成社交媒体的"]},
    "color": {"en": ["now in {}", "the same in {}", "now make it {}"], "zh": ["换成{}", "改成{}", "要{}的"]},
}

RAMBLE = {
    "en": [
        "By the way, the weather has been strange this week.",
        "Shops are shops, and streets are streets.",
        "There are many things, and then some more things.",
        "As we said before, we have said it before.",
        "My cousin once had one, or maybe two.",
        "Please also think about lunch.",
        "It is what it is, whatever it is.",
        "The bus comes at ten, if it comes.",
    ],
    "zh": [
        "对了，这星期天气很奇怪。",
        "店就是店，街就是街。",
        "东西很多，然后还有更多东西。",
        "就像刚才说的，刚才已经说过了。",
        "我表弟好像也有一个，也许两个。",
        "别忘了还有午饭。",
        "反正就是这样，就是这样。",
        "公交车十点来，如果它来的话。",
    ],
}


def pairs_in(product):
    """The pairs (type, value) of a product, in English words: {("dress", "red"), ("dress", "silk")}"""
    return {(word(product, "type", "en"), word(product, attribute, "en")) for attribute in attributes_of(product)}


def held_out(product):
    """True when the product has a pair (type, value) that is reserved for dev, as one pair in ten is."""
    return any(zlib.crc32(f"{kind} {value}".encode()) % 10 == 0 for kind, value in pairs_in(product))


def draw_for(rng, split, smallest=2, largest=5):
    """A random product that belongs to the split, "train" or "dev"."""
    while True:
        product = draw_product(rng, smallest, largest)
        if held_out(product) == (split == "dev"):
            return product


def advertise_at_length(rng, product, language, tone=None):
    """An advertisement within BYTES or, when twenty tries give none (very few or very long values), the last one."""
    for _ in range(20):
        text = advertise(rng, product, language, tone)
        if BYTES[0] <= len(text.encode()) <= BYTES[1]:
            break
    return text


def prompt(rng, product, language):
    return pairs_of(rng, product, language, "#", "*")


def shorten(product, language):
    return capital(full_phrase(product, language)) + ("." if language == "en" else "。")


def for_social_media(product, language):
    """A line and hashtags (for values of one word)."""
    tags = " ".join("#" + value for value in keywords_of(product, language) if " " not in value)
    phrase = full_phrase(product, language)
    return f"New: {phrase}! {tags}" if language == "en" else f"上新：{phrase}！{tags}"


def follow_up(rng, product, language, split):
    """A further turn about a product -> (request, reply, the product as it is now)."""
    wish = rng.choice(["shorter", "formal", "social"] + ["color", "color"] * ("color" in product))
    request = rng.choice(REQUESTS[wish][language])
    if wish == "shorter":
        return request, shorten(product, language), product
    if wish == "formal":
        return request, advertise_at_length(rng, product, language, "formal"), product
    if wish == "social":
        return request, for_social_media(product, language), product
    repainted = product
    while repainted["color"] == product["color"] or (split == "train" and held_out(repainted)):
        repainted = {**product, "color": rng.choice(WORLD[product["kind"]]["color"])}
    request = request.format(word(repainted, "color", language))
    return request, advertise_at_length(rng, repainted, language), repainted


def sft_records(split, count):
    """Yields `count` records: four fifths one turn, a tenth two or three turns, a tenth with a system prompt. The first
    ones do not depend on `count`."""
    rng = random.Random(f"{SEED} sft {split}")
    for _ in range(count):
        product, language, form = draw_for(rng, split), rng.choice(["en", "zh"]), rng.random()
        source, keywords = prompt(rng, product, language), keywords_of(product, language)
        if form < 0.1:
            sources, targets = [source], [advertise_at_length(rng, product, language)]
            for _ in range(rng.choice([1, 1, 2])):
                request, reply, product = follow_up(rng, product, language, split)
                sources.append(request)
                targets.append(reply)
            yield {"src": sources, "tgt": targets}
        elif form < 0.2:
            tone = rng.choice(list(TONES))
            context = {"system": rng.choice(TONES[tone][language])}
            target = advertise_at_length(rng, product, language, tone)
            yield {"src": source, "tgt": target, "context": context, "keywords": keywords}
        else:
            yield {"src": source, "tgt": advertise_at_length(rng, product, language), "keywords": keywords}


def without_some(rng, product):
    """The product without two or more of its attributes (it keeps at least one)."""
    attributes = attributes_of(product)
    dropped = rng.sample(attributes, rng.randint(2, len(attributes) - 1))
    return {attribute: value for attribute, value in product.items() if attribute not in dropped}


def with_others(rng, product):
    """The product with other values for two or more of its attributes."""
    attributes = attributes_of(product)
    changed = dict(product)
    for attribute in rng.sample(attributes, rng.randint(2, len(attributes))):
        others = [value for value in WORLD[product["kind"]][attribute] if value != product[attribute]]
        changed[attribute] = rng.choice(others)
    return changed


def ramble(rng, product, language):
    """An opening that names the type and nothing else, then talk about anything, one sentence twice."""
    slots = english_slots(product, []) if language == "en" else {"np": word(product, "type", "zh")}
    opening = rng.choice((OPENING_EN if language == "en" else OPENING_ZH)["any"]).format(**slots)
    lines = rng.sample(RAMBLE[language], 3)
    return join([opening, *lines, rng.choice(lines)], language)


def good_reply(rng, product, language, short):
    return shorten(product, language) if short else advertise_at_length(rng, product, language)


def worse_reply(rng, product, language, short):
    """A reply with a fault: values left out, values invented, or a ramble; at least one keyword is not in it."""
    fault = rng.choice(["missing", "invented", "ramble"])
    while True:
        if fault == "missing":
            text = good_reply(rng, without_some(rng, product), language, short)
        elif fault == "invented":
            text = good_reply(rng, with_others(rng, product), language, short)
        else:
            text = ramble(rng, product, language)
        if not all(mentions(text, keyword) for keyword in keywords_of(product, language)):
            return text


def preference_records(split, count):
    """Yields `count` records, nine tenths with one turn, one tenth with "make it shorter" as a second one. The first
    ones do not depend on `count`."""
    rng = random.Random(f"{SEED} preference {split}")
    for _ in range(count):
        product, language = draw_for(rng, split, smallest=3), rng.choice(["en", "zh"])
        sources, targets = [prompt(rng, product, language)], []
        short = rng.random() < 0.1
        if short:
            sources.append(rng.choice(REQUESTS["shorter"][language]))
            targets.append(good_reply(rng, product, language, short=False))
        better, worse = good_reply(rng, product, language, short), worse_reply(rng, product, language, short)
        if rng.random() < 0.5:
            yield {"src": sources, "tgt": targets, "response": [better, worse], "sort": [1, 0]}
        else:
            yield {"src": sources, "tgt": targets, "response": [worse, better], "sort": [0, 1]}


# ==== 3. Files ====


def write_json(path, value):
    path.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path, records):
    """One compact JSON object a line, \\n on every system; prints the count and the size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records]
    path.write_bytes(("\n".join(lines) + "\n").encode())
    print(f"{path}: {len(lines)} records, {path.stat().st_size:,} bytes")


def write_corpus(folder):
    write_lines(folder / "corpus.jsonl", ({"text": text} for text in corpus_texts(CORPUS_COUNT)))


def write_sets(folder):
    for split, count in SFT_COUNTS.items():
        write_lines(folder / "sft" / f"{split}.json", sft_records(split, count))
    for split, count in PREFERENCE_COUNTS.items():
        write_lines(folder / "preference" / f"{split}.jsonl", preference_records(split, count))


def write_model_folder(folder):
    """llama/: tokenizer and config.json. The tokenizer learns from a third of the corpus; more hardly changes it."""
    (folder / "llama").mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "llama", CORPUS_COUNT // 3)
    write_json(folder / "llama" / "config.json", CONFIG)
    print(f"{folder / 'llama'}: vocabulary {VOCAB_SIZE}, {count_parameters(CONFIG):,} parameters")


def main(argv):
    """No argument: everything. "corpus": only the corpus, which is not in git."""
    if argv not in ([], ["corpus"]):
        print(f"error: make_demo.py: {' '.join(argv)}: expected no argument, or corpus", file=sys.stderr)
        return 2
    write_corpus(FOLDER)
    if not argv:
        write_sets(FOLDER)
        write_model_folder(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
