"""Tokenizers of every family: text <-> ids."""

import base64
import codecs
import os
import re
import shutil
import unicodedata
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import chain, starmap
from operator import add
from pathlib import Path

from formats.chat import TEMPLATE_FILE, check_messages, encode_conversation, folder_template, save_chat_template
from formats.files import UserError, brief, names_in, read_json

# ============================== tokenizer ==============================
# A family's tokenizer is data: the files of its folder and a row of CLASSES. Two engines turn text into ids:
# SentencePieceModel (the C++ library) and BPE (ours); readers make one from the files; Tokenizer, the door, adds what stands
# around it: special tokens, bos and eos, chat templates.

SPACE = "\u2581"  # how sentencepiece writes a space


WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model")  # Hugging Face's name, PaddleNLP's name


MODEL_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken", "ice_text.model", *SENTENCEPIECE_FILES)


SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)


SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+")  # fmt: skip


QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")  # each digit by itself


LLAMA3_TOKENS = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|> "
    "<|image|>").split() + [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]  # fmt: skip


QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


GLM_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]"]


GLM_ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


# Kind of file -> tokenizer_class (less "Fast") -> what the class does. Keys as in tokenizer_config.json are defaults
# that this file overrides. The others are the class's own code:
#   words, nfc      the pattern that cuts text into words; text is brought to Unicode's NFC first
#   tokens          special tokens numbered on from the vocabulary's end
#   head, tail      tokens before and after every text, in place of bos and eos
#   parse           special tokens that are recognized in text, if not all; `roles` are those recognized on request
#   strips          white space around a special token in the text goes
#   lead            spaces that decoding drops at the beginning, besides those that a sentencepiece model drops itself
#   gap             where legacy decoding keeps the space before a text that a special token ends: "inside" (not at the
#                   very beginning) or "always"
#   bare            special tokens are decoded as the sentencepiece model would, most of them as nothing
#   blanks          line breaks, tabs and runs of spaces have pieces of their own
LLAMA = {"add_bos_token": True, "add_prefix_space": True, "lead": 1, "gap": "inside"}


BAICHUAN = {"legacy": True, "gap": "inside"}


INTERNLM = {"legacy": True, "gap": "always", "add_bos_token": True, "clean_up_tokenization_spaces": True}


CHATGLM2 = {"legacy": True, "pad_token": "<unk>", "tokens": [*GLM_TOKENS, "sop", "eop"],
            "head": ["[gMASK]", "sop"], "parse": [], "bare": True}  # fmt: skip


GPT2 = {"words": GPT2_WORDS, **dict.fromkeys(SPECIAL_NAMES[:3], "<|endoftext|>")}


QWEN = {"words": QWEN_WORDS, "nfc": True, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


LLAMA3 = {"words": LLAMA3_WORDS, "tokens": LLAMA3_TOKENS, "add_bos_token": True, "bos_token": "<|begin_of_text|>",
          "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"}  # fmt: skip


CLASSES = {
    "sentencepiece": {
        "LlamaTokenizer": LLAMA, "CodeLlamaTokenizer": LLAMA, "MistralTokenizer": LLAMA,
        "GemmaTokenizer": {"add_bos_token": True},
        "BaichuanTokenizer": BAICHUAN, "BaiChuanTokenizer": BAICHUAN,
        "InternLMTokenizer": INTERNLM, "InternLM2Tokenizer": INTERNLM,
        "ChatGLMTokenizer": CHATGLM2, "ChatGLMv2Tokenizer": CHATGLM2,
        "ChatGLM3Tokenizer": {**CHATGLM2, "tokens": CHATGLM2["tokens"] + GLM_ROLES, "roles": GLM_ROLES, "bare": False},
    },
    "ice_text": {
        "ChatGLMTokenizer": {
            "legacy": True, "bos_token": "<sop>", "eos_token": "<eop>", "unk_token": "<unk>",
            "pad_token": "<pad>", "additional_special_tokens": ["[MASK]"], "tail": ["[gMASK]", "<sop>"],
            "bare": True, "strips": True, "blanks": True, "clean_up_tokenization_spaces": True},
    },
    "merges": {
        "GPT2Tokenizer": GPT2, "GPTTokenizer": GPT2, "Qwen2Tokenizer": QWEN,
        "OPTTokenizer": {**GPT2, **dict.fromkeys(SPECIAL_NAMES[:3], "</s>"), "pad_token": "<pad>",
                         "add_bos_token": True},
    },
    "tiktoken": {
        "QWenTokenizer": {**QWEN, "tokens": QWEN_TOKENS},
        "Llama3Tokenizer": LLAMA3, "LlamaTokenizer": LLAMA3, "PreTrainedTokenizer": LLAMA3,
        "ChatGLM4Tokenizer": {
            "words": LLAMA3_WORDS, "tokens": ["<|endoftext|>", *GLM_TOKENS, "<sop>", "<eop>", *GLM_ROLES],
            "head": ["[gMASK]", "<sop>"], "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    },
}  # fmt: skip


# The class where tokenizer_config.json names none, by config.json's model_type and the kind of file.
MODEL_TYPES = {
    "gpt2": "GPT2Tokenizer", "opt": "OPTTokenizer", "qwen": "QWenTokenizer",
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    "baichuan": "BaichuanTokenizer", "internlm": "InternLMTokenizer", "internlm2": "InternLM2Tokenizer",
    **dict.fromkeys(("gemma", "gemma2"), "GemmaTokenizer")}  # fmt: skip


# Their own software has no use for a tokenizer.json, even if one lies beside the file that it reads.
SLOW_CLASSES = ("BaichuanTokenizer", "BaiChuanTokenizer", "InternLMTokenizer", "ChatGLMTokenizer", "ChatGLM4Tokenizer",
                "QWenTokenizer")  # fmt: skip


# These put bos before a text unless add_bos_token is false, whatever tokenizer.json's post_processor says.
BOS_BY_CONFIG = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "InternLM2Tokenizer")


# A byte that is no UTF-8 becomes one U+FFFD each, as in sentencepiece itself ("replace" would write one for several).
codecs.register_error("one_mark_per_byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


# ---- Engines: a stretch of text without special tokens -> ids; an id -> its bytes ----


class SentencePieceModel:
    """A model of the sentencepiece library. `shift` ids before its own are ChatGLM-6B's images.

    legacy: every stretch gets the model's own leading space. Otherwise none does: Tokenizer puts one before the very
    beginning of a text, and spaces that begin a stretch are kept."""

    normalizers, errors = (), "one_mark_per_byte"

    def __init__(self, path, legacy=False, blanks=False, shift=0):
        import sentencepiece

        self.legacy, self.blanks, self.shift = legacy, blanks, shift
        try:
            model = path.read_bytes()
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.own_prefix = self.sp.encode("a", out_type=str)[0].startswith(SPACE)
            if not legacy:
                # Bytes appended to a protobuf message are merged into it: normalizer_spec (3) {add_dummy_prefix (3): false}
                self.sp = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise UserError(
                f"{path}: neither a sentencepiece model nor tiktoken text (base64, a space, the rank)"
            ) from None
        count = self.sp.get_piece_size()
        self.size, self.byte_ids = shift + count, {shift + i for i in range(count) if self.sp.is_byte(i)}
        self._bytes = [f"<image_{i}>".encode() for i in range(shift)] + [self._decoded(i) for i in range(count)]
        self._unk = self.sp.id_to_piece(max(self.sp.unk_id(), 0))
        self._unk_length = len(self.sp.encode(self._unk))

    def _decoded(self, i):
        """PromptSegment number -> its bytes; control pieces have none, unk is a visible mark, as the library decodes them."""
        text = self.sp.id_to_piece(i)
        if self.sp.is_byte(i):  # written <0x0A>
            return bytes([int(text[3:5], 16)])
        if self.sp.is_control(i) or self.sp.is_unknown(i):
            return b"" if self.sp.is_control(i) else " \u2047 ".encode()
        if self.blanks:
            text = {"<n>": "\n", "<|tab|>": "\t"}.get(text, text)
            text = re.sub(r"^<\|blank_(\d+)\|>$", lambda match: " " * int(match[1]), text)
        return text.replace(SPACE, " ").encode()

    def own_special_tokens(self):
        """[bos, eos, unk, pad] of the model itself, None where it has none."""
        ids = self.sp.bos_id(), self.sp.eos_id(), self.sp.unk_id(), self.sp.pad_id()
        return [self.sp.id_to_piece(i) if i >= 0 else None for i in ids]

    def id_of(self, piece):
        """PromptSegment -> id, None if the vocabulary lacks it."""
        i = self.sp.piece_to_id(piece)
        return self.shift + i if self.sp.id_to_piece(i) == piece else None

    def piece_bytes(self, token_id):
        return self._bytes[token_id] if 0 <= token_id < self.size else b""

    def encode(self, text, at_start):
        if self.blanks:
            text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
            text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        if not self.legacy and text.startswith((SPACE, " ")):  # behind unk, these survive sentencepiece's clean-up
            return self.sp.encode(self._unk + text)[self._unk_length :]
        ids = self.sp.encode(text)
        return [self.shift + i for i in ids] if self.shift else ids


# GPT-2 writes the 256 bytes as characters that can be seen: printable Latin-1 as itself, the others from U+0100 on.
_seen = [*range(33, 127), *range(161, 173), *range(174, 256)]


BYTE_CHARS = {b: chr(b) for b in _seen} | {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(_seen)))}


CHAR_BYTES = {char: b for b, char in BYTE_CHARS.items()}


class WordCache(dict):
    """cache[word] = function(word), called once a word. Emptied when full, and long words are not kept: its memory is
    bounded whatever is encoded."""

    WORDS, LETTERS = 1 << 17, 64

    def __init__(self, function):
        self.function = function

    def __missing__(self, word):
        value = self.function(word)
        if len(word) <= self.LETTERS:
            if len(self) >= self.WORDS:
                self.clear()
            self[word] = value
        return value


class BPE:
    """Byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909), over bytes (GPT-2) or over characters.

    A text is cut into words by `steps`, functions (list of str, at_start) -> list of str. A word begins as its bytes
    (byte_level; symbols are written in BYTE_CHARS) or its characters; then the two neighbors of lowest rank are joined,
    the leftmost first, until no two have a rank. ranks: {(left, right): rank}; None ranks a pair by the id of what it
    makes, as tiktoken does. whole_words: a word of the vocabulary is its id, whatever the ranks say. A character that
    the vocabulary lacks is its bytes <0x00>... (byte_fallback), else unk (once for a run of them: fuse_unk), else
    nothing. normalizers are functions str -> str that Tokenizer applies before."""

    def __init__(
        self,
        vocab,
        ranks,
        steps,
        normalizers=(),
        byte_level=True,
        whole_words=False,
        unk=None,
        fuse_unk=False,
        byte_fallback=False,
    ):
        self.vocab, self.byte_level, self.whole_words, self.normalizers = vocab, byte_level, whole_words, normalizers
        self.unk, self.fuse_unk, self.byte_fallback = unk, fuse_unk, byte_fallback
        self.rank = (lambda pair: vocab.get(pair[0] + pair[1])) if ranks is None else ranks.get
        self.steps = list(steps)
        if (
            not (byte_level or whole_words)
            and SPACE in vocab
            and not any(right[0] == SPACE != left[-1] for left, right in ranks)
        ):  # no pair reaches over the beginning of a word: a text may be cut there, and words can be remembered
            self.steps.append(split_step(f"{SPACE}*[^{SPACE}]+|{SPACE}+"))
        self.size = max(vocab.values(), default=-1) + 1
        self.symbols = [None] * self.size
        for symbol, i in vocab.items():
            self.symbols[i] = symbol
        is_byte = re.compile("<0x[0-9A-F]{2}>").fullmatch
        self.byte_ids = (
            range(self.size) if byte_level else {i for s, i in vocab.items() if byte_fallback and is_byte(s)}
        )
        self.errors = "replace" if byte_level else "one_mark_per_byte"
        self._ids_of_word = WordCache(self._encode_word)

    def own_special_tokens(self):
        return [None, None, self.unk, None]

    def id_of(self, symbol):
        return self.vocab.get(symbol)

    def piece_bytes(self, token_id):
        symbol = self.symbols[token_id] if 0 <= token_id < self.size else None
        if symbol is None:
            return b""
        if self.byte_level:
            known = all(char in CHAR_BYTES for char in symbol)  # others stand for themselves
            return bytes([CHAR_BYTES[char] for char in symbol]) if known else symbol.encode()
        return bytes([int(symbol[3:5], 16)]) if token_id in self.byte_ids else symbol.replace(SPACE, " ").encode()

    def encode(self, text, at_start):
        words = [text]
        for step in self.steps:
            words = step(words, at_start)
        return list(chain.from_iterable(map(self._ids_of_word.__getitem__, words)))

    def _encode_word(self, word):
        if self.byte_level:
            word = word.encode().decode("latin-1").translate(BYTE_CHARS)
        if self.whole_words and word in self.vocab:
            return [self.vocab[word]]
        symbols = list(word)
        if not all(map(self.vocab.__contains__, symbols)):
            symbols = self._without_unknown(symbols)
        return [self.vocab[symbol] for symbol in self._joined(symbols)]

    def _without_unknown(self, characters):
        out = []
        for char in characters:
            as_bytes = [f"<0x{b:02X}>" for b in char.encode()] if self.byte_fallback else [char]
            if char in self.vocab:
                out.append(char)
            elif all(map(self.vocab.__contains__, as_bytes)):
                out += as_bytes
            elif self.unk is not None and not (self.fuse_unk and out[-1:] == [self.unk]):
                out.append(self.unk)
        return out

    def _joined(self, symbols):
        """Symbols of a word -> those after all merges. A heap of (rank, place): O(n log n), however long the word."""
        count, rank = len(symbols), self.rank
        after, before = [*range(1, count + 1)], [*range(-1, count - 1)]  # places of the neighbors that are still there
        ranks = map(rank, zip(symbols, symbols[1:]))
        heap = [(r, place) for place, r in enumerate(ranks) if r is not None]
        heapify(heap)
        while heap:
            r, left = heappop(heap)
            right = after[left]
            if symbols[left] is None or right == count or rank((symbols[left], symbols[right])) != r:
                continue  # one of the two was joined with another meanwhile
            symbols[left] += symbols[right]
            symbols[right] = None
            beyond, previous = after[right], before[left]
            after[left] = beyond
            if beyond < count:
                before[beyond] = left
                if (r := rank((symbols[left], symbols[beyond]))) is not None:
                    heappush(heap, (r, left))
            if previous >= 0 and (r := rank((symbols[previous], symbols[left]))) is not None:
                heappush(heap, (r, previous))
        return [symbol for symbol in symbols if symbol is not None]


# ---- Readers: a folder's files -> an engine ----


def tokenizer_class(folder, config):
    """(kind of file, the file, class) that a folder is read by: as transformers chooses, which prefers tokenizer.json,
    but for the classes that only ever read their own file. UserError when nothing fits."""
    name = (config.get("tokenizer_class") or "").removesuffix("Fast")
    about = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model_type, origin = about.get("model_type"), f"{config.get('name_or_path')} {about.get('_name_or_path')}"
    present = [file for file in MODEL_FILES if (folder / file).is_file()]
    if present[:1] == ["tokenizer.json"] and (name not in SLOW_CLASSES or len(present) == 1):
        return "json", folder / present[0], name
    if "ice_text.model" in present:
        kind, file, default = "ice_text", "ice_text.model", "ChatGLMTokenizer"
    elif "qwen.tiktoken" in present:
        kind, file, default = "tiktoken", "qwen.tiktoken", "QWenTokenizer"
    elif "vocab.json" in present and "merges.txt" in present:
        kind, file = "merges", "vocab.json"
        with open(folder / file, "rb") as opened:
            begins_as_opt = re.match(rb'\s*{\s*"<s>"\s*:\s*0\b', opened.read(64))
        default = MODEL_TYPES.get(model_type, model_type) or ("OPTTokenizer" if begins_as_opt else "GPT2Tokenizer")
    elif file := next((file for file in SENTENCEPIECE_FILES if file in present), None):
        with open(folder / file, "rb") as opened:
            is_text = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", opened.read(4096))
        kind, default = ("tiktoken", "Llama3Tokenizer") if is_text else ("sentencepiece", "LlamaTokenizer")
        if model_type == "chatglm":
            default = "ChatGLM4Tokenizer" if is_text else "ChatGLMTokenizer"
        elif not is_text:
            default = MODEL_TYPES.get(model_type, default)
    else:
        raise UserError(
            f"{folder}: no tokenizer.model, tokenizer.json, vocab.json with merges.txt, qwen.tiktoken or "
            f"ice_text.model in it; found {names_in(folder)}"
        )
    name = name or default
    if kind == "sentencepiece" and name.startswith("ChatGLM") and "chatglm3" in origin:
        name = "ChatGLM3Tokenizer"  # chatglm2 and 3 share a class name and the vocabulary, not the special tokens
    if name not in CLASSES[kind]:
        raise UserError(
            f"{folder}: tokenizer_class {name!r} is not supported for {file}; known are {', '.join(CLASSES[kind])}"
        )
    return kind, folder / file, name


def check_vocabulary_ids(vocab, where):
    """UserError unless vocab is {symbol: id}, each id once."""
    if not isinstance(vocab, dict) or not vocab:
        raise UserError(f"{where}: an object of symbols and their ids is wanted, found {brief(vocab)}")
    ids = vocab.values()
    if set(map(type, ids)) == {int} and min(ids) >= 0 and len(set(ids)) == len(vocab):
        return
    seen = {}
    for symbol, i in vocab.items():
        if type(i) is not int or i < 0:
            raise UserError(f"{where}: the id of {symbol!r} must be a number from 0 on, found {brief(i)}")
        if seen.setdefault(i, symbol) is not symbol:
            raise UserError(f"{where}: the id {i} is given twice, to {seen[i]!r} and to {symbol!r}")


def merge_ranks(merges, vocab, where):
    """[(left, right)...] in order of rank -> {(left, right): rank}. UserError from `where(rank)` for one that repeats or
    names a symbol that is not in the vocabulary."""
    ranks = dict(zip(merges, range(len(merges))))
    if len(ranks) != len(merges):
        number = next(n for n, pair in enumerate(merges) if ranks[pair] != n)
        raise UserError(
            f"{where(ranks[merges[number]])}: the merge {' '.join(merges[number])!r} has a rank already, "
            f"that of {where(number)}"
        )
    if not all(map(vocab.__contains__, chain(chain.from_iterable(merges), starmap(add, merges)))):
        number, missing = next(
            (number, symbol)
            for number, (left, right) in enumerate(merges)
            for symbol in (left, right, left + right)
            if symbol not in vocab
        )
        raise UserError(
            f"{where(number)}: the merge {' '.join(merges[number])!r} names {missing!r}, which is not in the vocabulary"
        )
    return ranks


def read_merges(path, row, add_prefix_space, unk):
    """vocab.json with merges.txt beside it -> BPE over bytes."""
    vocab, merges_path = read_json(path), path.with_name("merges.txt")
    check_vocabulary_ids(vocab, path)
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{merges_path}: not UTF-8 at byte {error.start}") from None
    first = 1 if lines[0].startswith("#version") else 0
    last = len(lines) - 1 if not lines[-1] else len(lines)  # the file ends with a line break
    merges = [tuple(line.rstrip("\r").split(" ")) for line in lines[first:last]]
    for number, pair in enumerate(merges):
        if len(pair) != 2 or not (pair[0] and pair[1]):
            raise UserError(
                f"{merges_path}:{first + number + 1}: two symbols with one space between them are wanted, "
                f"found {lines[first + number]!r}"
            )
    ranks = merge_ranks(merges, vocab, lambda number: f"{merges_path}:{first + number + 1}")
    steps = [*([prefix_step] if add_prefix_space else []), split_step(row["words"])]
    return BPE(vocab, ranks, steps, [to_nfc] if row.get("nfc") else [], unk=unk if unk in vocab else None)


def read_tiktoken(path, row):
    """Lines of base64, a space and the rank, which is the id -> BPE over bytes."""
    vocab, seen = {}, {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            symbol, rank = base64.b64decode(text, validate=True).decode("latin-1").translate(BYTE_CHARS), int(rank)
        except ValueError:
            shown = line[:40].decode("utf-8", "replace")
            raise UserError(f"{path}:{number}: base64, a space and a rank are wanted, found {shown!r}") from None
        if rank < 0 or seen.setdefault(rank, number) != number:
            found = f"the rank {rank} is that of line {seen[rank]} too" if rank >= 0 else f"the rank {rank} is below 0"
            raise UserError(f"{path}:{number}: {found}")
        if symbol in vocab:
            raise UserError(f"{path}:{number}: these bytes have the rank {vocab[symbol]} already")
        vocab[symbol] = rank
    if missing := [b for b, char in BYTE_CHARS.items() if char not in vocab]:
        raise UserError(f"{path}: no line for the byte {missing[0]:#04x}; a tiktoken vocabulary has all 256")
    return BPE(vocab, None, [split_step(row["words"])], [to_nfc] if row.get("nfc") else [], whole_words=True)


def to_nfc(text):
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def compile_words(pattern, where="the built-in pattern"):
    """Pattern of a tokenizer.json (Oniguruma's dialect) -> compiled. UserError for what the two would read differently."""
    import regex

    escaped = next((found for found in re.findall(r"\\.", pattern) if re.match(r"\\[^\W_pPsSdDrntfvux]", found)), None)
    group = re.search(r"\(\?(?!-?i?[:)]|[=!>]|<[=!])..?|--|~~|\|\|", re.sub(r"\\.", "", pattern))
    if escaped or group:
        raise UserError(f"{where}: {escaped or group[0]!r} in the pattern {pattern!r} is not supported")
    # Tried at every blank of a long run, \s+$ would take quadratic time; it can only match from the run's beginning.
    pattern = re.sub(r"^\\s\+\$$", r"(?<!\\s)\\s+$", pattern)
    try:
        return regex.compile(pattern, regex.VERSION1 | regex.MULTILINE)  # nested sets; ^ and $ are a line's, as there
    except regex.error as error:
        raise UserError(f"{where}: cannot read the pattern {pattern!r}: {error}") from None


def split_step(pattern, behavior="Isolated", invert=False, where="the built-in pattern"):
    """Step that cuts each piece at the pattern's matches. Isolated: matches and what lies between are pieces; Removed:
    only what lies between; MergedWithPrevious, MergedWithNext: a match stays with what is before or after it."""
    compiled = compile_words(pattern, where)
    findall = compiled.findall if not compiled.groups else lambda text: [match[0] for match in compiled.finditer(text)]

    def cut(text):
        at, marked = 0, []  # [piece, whether it is a match]
        for match in compiled.finditer(text):
            marked += [[text[at : match.start()], invert], [match[0], not invert]]
            at = match.end()
        marked = [mark for mark in [*marked, [text[at:], invert]] if mark[0]]
        if behavior == "Isolated":
            return [piece for piece, _ in marked]
        if behavior == "Removed":
            return [piece for piece, is_match in marked if not is_match]
        forwards = behavior == "MergedWithPrevious"
        out, after_match = [], False
        for piece, is_match in marked if forwards else reversed(marked):
            if is_match and not after_match and out:
                out[-1] = out[-1] + piece if forwards else piece + out[-1]
            else:
                out.append(piece)
            after_match = is_match
        return out if forwards else out[::-1]

    def step(texts, at_start):
        out = []
        for text in texts:
            found = findall(text) if behavior == "Isolated" else ()
            out += found if sum(map(len, found)) == len(text) else cut(text)  # no gaps: the usual case, and fast
        return out

    return step


def prefix_step(texts, at_start):
    return [text if text.startswith(" ") else f" {text}" for text in texts]


def metaspace_step(replacement, scheme, split):
    """Step that writes spaces as `replacement` and puts one before every piece (always), that at the text's beginning
    (first) or none (never); with split, each begins a new piece."""
    words = split_step(f"{re.escape(replacement)}[^{re.escape(replacement)}]*|[^{re.escape(replacement)}]+")

    def step(texts, at_start):
        texts = [text.replace(" ", replacement) for text in texts]
        for n, text in enumerate(texts):
            if not text.startswith(replacement) and (scheme == "always" or scheme == "first" and at_start and n == 0):
                texts[n] = replacement + text
        return words(texts, at_start) if split else texts

    return step


# What may stand in a tokenizer.json: part -> type -> its keys, with the default or, where one must be given, the type.
JSON_PARTS = {
    "normalizer": {
        "NFC": {}, "NFD": {}, "NFKC": {}, "NFKD": {}, "Prepend": {"prepend": str},
        "Replace": {"pattern": dict, "content": str}, "Sequence": {"normalizers": list}},
    "pre_tokenizer": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "Split": {"pattern": dict, "behavior": str, "invert": False}, "Digits": {"individual_digits": False},
        "Metaspace": {"replacement": SPACE, "add_prefix_space": True, "prepend_scheme": "always", "split": True,
                      "str_rep": SPACE}, "Sequence": {"pretokenizers": list}},
    "post_processor": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "TemplateProcessing": {"single": list, "pair": [], "special_tokens": dict}, "Sequence": {"processors": list}},
    "decoder": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "Metaspace": {"replacement": SPACE, "add_prefix_space": True, "prepend_scheme": "always", "split": True,
                      "str_rep": SPACE},
        "Replace": {"pattern": dict, "content": str}, "ByteFallback": {}, "Fuse": {},
        "Strip": {"content": str, "start": 0, "stop": 0}, "Sequence": {"decoders": list}},
    "model": {
        "BPE": {"vocab": dict, "merges": list, "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}},
}  # fmt: skip


def json_parts(spec, part, where):
    """A component of tokenizer.json -> [(where, type, its keys)...], sequences laid flat, [] for null. UserError for a
    type or key that is not in JSON_PARTS."""
    if spec is None:
        return []
    known, kind = JSON_PARTS[part], spec.get("type") if isinstance(spec, dict) else None
    if kind is None and part == "model" and isinstance(spec, dict) and "merges" in spec:
        kind = "BPE"  # files of 2020 do not say
    if kind not in known:
        raise UserError(f"{where}: {brief(kind or spec)} is not supported; known are {', '.join(known)}")
    values = known[kind] | {key: value for key, value in spec.items() if key != "type"}
    if unknown := sorted(set(values) - set(known[kind])):
        raise UserError(f"{where}: unknown key {unknown[0]!r} of {kind}; known are {', '.join(known[kind]) or 'none'}")
    for key, default in known[kind].items():
        wanted = default if isinstance(default, type) else type(default)
        if default is not None and not isinstance(values[key], wanted):
            found = "nothing" if values[key] is default else brief(values[key])
            raise UserError(f"{where}.{key}: a {wanted.__name__} is wanted, found {found}")
    if kind != "Sequence":
        return [(where, kind, values)]
    ((key, inner),) = values.items()
    return [found for n, one in enumerate(inner) for found in json_parts(one, part, f"{where}.{key}[{n}]")]


def pattern_text(pattern, where):
    """{"String": text} or {"Regex": text} -> a pattern."""
    (kind, text), *more = pattern.items() or [(None, None)]
    if more or kind not in ("String", "Regex") or not isinstance(text, str):
        raise UserError(f'{where}.pattern: {{"String": text}} or {{"Regex": text}} is wanted, found {brief(pattern)}')
    return re.escape(text) if kind == "String" else text


def json_normalizer(where, kind, values):
    """-> function str -> str."""
    if kind == "Prepend":
        return lambda text: values["prepend"] + text if text else text
    if kind == "Replace":
        compiled, content = compile_words(pattern_text(values["pattern"], where), where), values["content"]
        return lambda text: compiled.sub(lambda match: content, text)
    return to_nfc if kind == "NFC" else partial(unicodedata.normalize, kind)


def json_steps(parts):
    """Parts of a pre_tokenizer -> (steps, whether the last of them was ByteLevel)."""
    steps = []
    for n, (where, kind, values) in enumerate(parts):
        if kind == "ByteLevel":
            if n + 1 < len(parts):
                raise UserError(f"{where}: ByteLevel must come last; {parts[n + 1][1]} follows")
            steps += [prefix_step] if values["add_prefix_space"] else []
            steps += [split_step(GPT2_WORDS)] if values["use_regex"] else []
        elif kind == "Metaspace":
            scheme = values["prepend_scheme"] if values["add_prefix_space"] else "never"
            if scheme not in ("always", "first", "never"):
                raise UserError(f"{where}.prepend_scheme: always, first or never is wanted, found {brief(scheme)}")
            steps.append(metaspace_step(values["replacement"], scheme, values["split"]))
        elif kind == "Digits":
            steps.append(split_step(r"\p{N}" if values["individual_digits"] else r"\p{N}+"))
        elif values["behavior"] not in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext"):
            raise UserError(
                f"{where}.behavior: {brief(values['behavior'])} is not supported; known are Isolated, Removed, "
                "MergedWithPrevious, MergedWithNext"
            )
        else:
            pattern = pattern_text(values["pattern"], where)
            steps.append(split_step(pattern, values["behavior"], values["invert"], where))
    return steps, bool(parts) and parts[-1][1] == "ByteLevel"


def json_around(parts):
    """Parts of a post_processor -> (ids before a text, ids after it)."""
    head, tail = [], []
    for where, kind, values in parts:
        if kind == "ByteLevel":
            continue  # moves offsets, which nobody here asks for
        side = None
        for n, item in enumerate(values["single"]):
            what, about = next(iter(item.items())) if isinstance(item, dict) and item else (None, None)
            token = about.get("id") if isinstance(about, dict) else None
            if what == "Sequence" and token == "A" and side is None:
                side = tail
                continue
            entry = values["special_tokens"].get(token) if what == "SpecialToken" else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            if not isinstance(ids, list):
                raise UserError(
                    f"{where}.single[{n}]: a SpecialToken of special_tokens or, once, the Sequence A is wanted, "
                    f"found {brief(item)}"
                )
            (head if side is None else tail).extend(ids)
        if side is None:
            raise UserError(f"{where}.single: it has no Sequence A, the text itself")
    return head, tail


def json_decoder(parts, where):
    """Parts of a decoder -> (whether it is ByteLevel, how many leading spaces it drops)."""
    kinds = [kind for _, kind, _ in parts]
    if kinds == ["ByteLevel"]:
        return True, 0
    lead = 0
    for at, kind, values in parts:
        if kind == "Metaspace":
            lead = int(values["add_prefix_space"] and values["prepend_scheme"] != "never")
        elif kind == "Strip":
            lead = values["start"]
        if (
            kind == "ByteLevel"
            or kind == "Replace"
            and (values["pattern"], values["content"]) != ({"String": SPACE}, " ")
            or kind == "Strip"
            and (values["content"], values["stop"]) != (" ", 0)
            or kind == "Metaspace"
            and values["replacement"] != SPACE
        ):
            raise UserError(f"{at}: this {kind} is not supported here: {brief(values)}")
    if not {"Replace", "Metaspace"} & set(kinds):
        raise UserError(
            f"{where}: ByteLevel, or a Sequence with Metaspace or with {SPACE!r} replaced by a space, is "
            f"wanted; found {', '.join(kinds) or 'null'}"
        )
    return False, lead


def read_tokenizer_json(path):
    """tokenizer.json -> (BPE, its added tokens, ids before a text, ids after it, leading spaces that decoding drops)."""
    spec = read_json(path)
    if not isinstance(spec, dict) or not spec.get("model"):
        raise UserError(f"{path}: an object with a model is wanted, found {brief(spec)}")
    parts = {name: json_parts(spec.get(name), name, f"{path}: {name}") for name in JSON_PARTS}
    where, _, model = parts["model"][0]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            raise UserError(f"{where}.{key}: {brief(model[key])} is not supported")
    vocab, unk = model["vocab"], model["unk_token"]
    check_vocabulary_ids(vocab, f"{where}.vocab")
    if unk is not None and (not isinstance(unk, str) or unk not in vocab):
        raise UserError(f"{where}.unk_token: {brief(unk)} is not in the vocabulary")
    merges = [
        tuple(pair.split(" ") if isinstance(pair, str) else pair if isinstance(pair, list) else ())
        for pair in model["merges"]
    ]
    if {*map(len, merges)} - {2} or {*map(type, chain.from_iterable(merges))} - {str}:
        number = next(n for n, pair in enumerate(merges) if len(pair) != 2 or {*map(type, pair)} != {str})
        raise UserError(f"{where}.merges[{number}]: two symbols are wanted, found {brief(model['merges'][number])}")
    ranks = merge_ranks(merges, vocab, lambda number: f"{where}.merges[{number}]")
    steps, byte_level = json_steps(parts["pre_tokenizer"])
    decodes_bytes, lead = json_decoder(parts["decoder"], f"{path}: decoder")
    if byte_level != decodes_bytes:
        raise UserError(
            f"{path}: pre_tokenizer and decoder must both be ByteLevel or both not; one is, the other is not"
        )
    added = spec.get("added_tokens") or []
    for n, token in enumerate(added):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise UserError(f"{path}: added_tokens[{n}]: an object with content and id is wanted, found {brief(token)}")
        if token.get("single_word"):
            raise UserError(f"{path}: added_tokens[{n}]: single_word of {token['content']!r} is not supported")
    engine = BPE(
        vocab,
        ranks,
        steps,
        [json_normalizer(*part) for part in parts["normalizer"]],
        byte_level,
        model["ignore_merges"],
        unk,
        model["fuse_unk"],
        model["byte_fallback"],
    )
    return engine, added, *json_around(parts["post_processor"]), lead


# ---- The door ----


def trie_regex(words):
    """Words -> a pattern that matches the longest of them at a place, as quickly for a thousand as for two."""
    prefix = os.path.commonprefix(words)
    rests, branches = {word[len(prefix) :] for word in words}, {}
    for rest in sorted(rests - {""}):
        branches.setdefault(rest[0], []).append(rest)
    tail = "|".join(map(trie_regex, branches.values()))
    return re.escape(prefix) + (f"(?:{tail})" + "?" * ("" in rests) if tail else "")


def clean_up(text):
    """transformers' clean_up_tokenization_spaces: no space before punctuation and English contractions."""
    for found in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(found, found.strip())
    return text


def token_text(token, folder):
    """A token of a side file, text or {"content": text, ...} -> text; None for null."""
    text = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(text, str):
        raise UserError(
            f"{folder}: a token in {SIDE_FILES[0]} or {SIDE_FILES[1]} is text or has a content; found {brief(token)}"
        )
    return text


class StreamDecoder:
    """Ids in, text out as soon as it is certain: push(id) never returns half a character, and all pushes plus flush()
    are decode(ids)."""

    def __init__(self, tokenizer, skip_special_tokens=True):
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.engine.errors)
        self.lead = tokenizer.lead  # spaces at the beginning that are still to be dropped
        self.gap = None if skip_special_tokens else tokenizer.gap
        self.stretch = ""  # with a gap: text since the last special token
        self.after_special, self.is_first = False, True
        self.unclean = ""

    def push(self, token_id):
        """id -> text that became complete with it, perhaps ''."""
        tokenizer = self.tokenizer
        is_special = token_id in tokenizer.special_ids
        if self.skip and is_special:
            return ""
        piece = tokenizer.piece_bytes(token_id)
        if token_id in tokenizer.engine.byte_ids and token_id not in tokenizer.added_ids:
            text, self.lead = self.utf8.decode(piece), 0
        else:
            text = piece.decode("utf-8")
            if self.lead and text:
                kept = text[min(self.lead, len(text) - len(text.lstrip(" "))) :]
                text, self.lead = kept, 0 if kept else self.lead - len(text)
            text = self._rest_of_bytes() + text
        if self.gap:
            text = self._between_special(text, is_special)
        return self._cleaned(text) if tokenizer.cleans_up else text

    def flush(self):
        """Whatever is left; incomplete bytes become replacement characters."""
        text = self.stretch + self._rest_of_bytes()
        self.stretch = ""
        return self._cleaned(text, True) if self.tokenizer.cleans_up else text

    def _rest_of_bytes(self):
        text = self.utf8.decode(b"", True)
        self.utf8.reset()
        return text

    def _between_special(self, text, is_special):
        """Holds the text of a stretch back until it is known whether a special token ends it: only then the space that
        was put before the stretch is kept."""
        if not is_special:
            self.stretch += text
            text = ""
        else:
            keeps_space = not self.after_special and (self.gap == "always" or not self.is_first)
            text, self.stretch = " " * keeps_space + self.stretch + text, ""
            self.lead = self.tokenizer.lead_within
        self.after_special, self.is_first = is_special, False
        return text

    def _cleaned(self, text, is_last=False):
        """Text that clean_up can no longer change: all replaced texts begin with a space, and what they have before
        their last character ends in one of " 'nvr"."""
        self.unclean += text
        ready = self.unclean if is_last else self.unclean.rstrip(" 'nvr")
        self.unclean = self.unclean[len(ready) :]
        return clean_up(ready)


class Tokenizer:
    """What is around an engine: special tokens, bos and eos, decoding, chat templates.

    Special tokens written in a text become their ids, the text between them is the engine's. A folder is read as
    transformers would (tokenizer.json first), and ids and text equal its own, or those of the family's own code:
    tests/test_tokenizer.py. What differs: bytes that are no UTF-8 are one U+FFFD each wherever there is byte fallback, as
    in sentencepiece; a run of spaces that lost its first is printed as spaces; clean_up_tokenization_spaces is for
    sentencepiece models alone, as in transformers 5; Llama 3's own library cuts a text every 400,000 characters, and
    runs of letters or blanks every 25,000, this does not."""

    def __init__(self, folder):
        self.folder = Path(folder)
        config = self._read_side_files()
        self.kind, path, name = tokenizer_class(self.folder, config)
        row = CLASSES.get(self.kind, {}).get(name, {})
        settings = {**row, **config}
        tokens, legacy = (), bool(settings.get("legacy"))
        self._white_space = WHITE_SPACE if self.kind == "json" else None
        self.lead, self.gap, self.bare = row.get("lead", 0), row.get("gap") if legacy else None, row.get("bare", False)
        self.add_prefix_space = self.cleans_up = False
        if self.kind in ("sentencepiece", "ice_text"):
            for key in ("remove_space", "do_lower_case"):
                if config.get(key):
                    raise UserError(f"{self.folder / SIDE_FILES[0]}: {key}: true is not supported")
            shift = config.get("num_image_tokens", 0) if self.kind == "ice_text" else 0
            if type(shift) is not int or shift < 0:
                raise UserError(
                    f"{self.folder / SIDE_FILES[0]}: num_image_tokens: a count is wanted, found {brief(shift)}"
                )
            self.engine = SentencePieceModel(path, legacy, row.get("blanks", False), shift)
            if legacy:
                self.lead_within = int(self.engine.own_prefix)
                self.lead += self.lead_within
            else:
                self.add_prefix_space = bool(settings.get("add_prefix_space"))
                self.lead = int(self.add_prefix_space)
            self.cleans_up = bool(settings.get("clean_up_tokenization_spaces"))
        elif self.kind == "merges":
            unk = token_text(settings.get("unk_token"), self.folder)
            self.engine = read_merges(path, row, settings.get("add_prefix_space"), unk)
        elif self.kind == "tiktoken":
            self.engine = read_tiktoken(path, row)
        else:
            self.engine, tokens, self.head, self.tail, self.lead = read_tokenizer_json(path)
        self._collect_special_tokens(settings, row, tokens)
        says_so = [settings.get(key) for key in ("add_bos_token", "add_eos_token")]
        if self.kind != "json" or name in BOS_BY_CONFIG or says_so != [None, None]:
            adds_bos, adds_eos = name in BOS_BY_CONFIG if says_so[0] is None else says_so[0], says_so[1]
            self.head = self._ids_around(row.get("head", [self.bos_token] if adds_bos else []))
            self.tail = self._ids_around(row.get("tail", [self.eos_token] if adds_eos else []))
        self.special_ids |= {*self.head, *self.tail}
        self.vocab_size = max([self.engine.size, *(i + 1 for i in self.added.values())])
        self._chat_template = None
        self.chat_template = folder_template(self.folder)

    def _read_side_files(self):
        """tokenizer_config.json over special_tokens_map.json, {} without them."""
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; a folder with a tokenizer's files is wanted")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (self.folder / name).is_file():
                content = read_json(self.folder / name)
                if not isinstance(content, dict):
                    raise UserError(f"{self.folder / name}: an object is wanted, found a {type(content).__name__}")
                config |= content
        return config

    def _side_tokens(self, settings):
        """added_tokens_decoder {id: token} and added_tokens.json {text: id} -> [(text, id, flags)...]."""
        path = self.folder / "added_tokens.json"
        decoder, listed = settings.get("added_tokens_decoder") or {}, read_json(path) if path.is_file() else {}
        for where, ids in ((f"{self.folder / SIDE_FILES[0]}: added_tokens_decoder", decoder), (path, listed)):
            if not isinstance(ids, dict) or not all(
                str(i).isdecimal() for i in (ids if ids is decoder else ids.values())
            ):
                raise UserError(f"{where}: an object of tokens and their ids is wanted, found {brief(ids)}")
        named = [
            (token_text(token, self.folder), int(i), token if isinstance(token, dict) else {})
            for i, token in decoder.items()
        ]
        return [*named, *((text, int(i), {}) for text, i in listed.items())]

    def _collect_special_tokens(self, settings, row, tokens):
        """Fills added {text: id}, flags {text: dict}, special (texts), special_ids, and bos, eos, unk and pad. Of two files
        that know a token, the first of tokenizer.json, added_tokens_decoder, added_tokens.json and the rest is right."""
        self.added, self.flags = {}, {}
        for text, i, flags in [
            *((token["content"], token["id"], token) for token in tokens),
            *self._side_tokens(settings),
        ]:
            self.added.setdefault(text, i)
            self.flags.setdefault(text, flags)
        special = [text for text, flags in self.flags.items() if flags.get("special")]
        taken = set(self.added.values())
        for i, text in enumerate(row.get("tokens", ()), self.engine.size):
            special.append(text)
            if text not in self.added and i not in taken:
                self.added[text] = i
        extra = settings.get("extra_special_tokens") or []  # transformers 5's name for the other list
        extra = [
            *(extra.values() if isinstance(extra, dict) else extra),
            *(settings.get("additional_special_tokens") or []),
        ]
        named = [settings.get(name) or own for name, own in zip(SPECIAL_NAMES, self.engine.own_special_tokens())]
        for name, token in [*zip(SPECIAL_NAMES, named), *((None, token) for token in extra)]:
            text = token_text(token, self.folder)
            if name:
                setattr(self, name, text)
            if text:
                special.append(text)
                self.flags.setdefault(text, token if isinstance(token, dict) else {})
        for token in special:  # with no id in any file: the vocabulary's, or else after it, as in transformers
            if token not in self.added:
                free = max([self.engine.size - 1, *self.added.values()]) + 1
                self.added[token] = free if self.engine.id_of(token) is None else self.engine.id_of(token)
        for name in SPECIAL_NAMES:
            setattr(self, f"{name}_id", self.added.get(getattr(self, name)))
        if self.pad_token_id is None:  # padding is never seen nor learnt, any id will do
            self.pad_token_id = next((i for i in (self.unk_token_id, self.eos_token_id) if i is not None), 0)
        self.special, self.special_ids = set(special), {self.added[token] for token in special}
        self.added_ids = {i: text for text, i in self.added.items()}
        if row.get("strips"):
            self.flags = {text: {"lstrip": True, "rstrip": True} | self.flags.get(text, {}) for text in self.added}
        self._prepare_split(row)

    def _prepare_split(self, row):
        """Fills _token_ids {text as it is found: id} and _patterns {special_in_text: (before normalization, after it)}."""
        everything = [text for text in self.added if text]
        sought = {
            None: row.get("parse", everything),
            True: row.get("roles", everything),
            False: [text for text in everything if text not in self.special],
        }
        late = {
            text: self.normalize(text)
            for text in everything
            if self.kind == "json" and self.engine.normalizers and self.flags.get(text, {}).get("normalized")
        }
        self._token_ids = self.added | {found: self.added[text] for text, found in late.items()}
        self.added_ids |= {self.added[text]: found.replace(SPACE, " ") for text, found in late.items()}
        self.flags |= {found: self.flags[text] for text, found in late.items()}
        self._patterns = {}
        for mode, texts in sought.items():
            both = [text for text in texts if text not in late], [late[text] for text in texts if text in late]
            self._patterns[mode] = [re.compile(f"({trie_regex(words)})") if words else None for words in both]

    def _ids_around(self, tokens):
        ids = [self.token_id(token) for token in tokens if token is not None]
        if None in ids:
            raise UserError(
                f"{self.folder}: the vocabulary lacks {tokens[ids.index(None)]!r}, which stands around every text"
            )
        return ids

    @property
    def chat_template(self):
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template):
        """UserError when the vocabulary lacks a token of the template: its text would otherwise be cut into ordinary
        pieces, silently."""
        if template is not None and (token := template.missing(self)):
            raise UserError(
                f"chat_template {template.name!r}: the vocabulary of {self.folder} has no token "
                f"{token!r}; give a tokenizer that has it or another chat_template"
            )
        self._chat_template = template

    def token_id(self, text):
        """The id of a token by its text, special or of the vocabulary; None if there is none."""
        return self.added.get(text, self.engine.id_of(text))

    def has_token(self, text):
        """Whether `text` becomes one token however it is written: added, or user-defined in the sentencepiece model."""
        return text in self.added or self.engine.encode(text, False) == [self.engine.id_of(text)]

    @property
    def stop_ids(self):
        """Ids that end a reply: eos, and the tokens with which the chat template ends a turn."""
        ends = self.chat_template.stops if self.chat_template else []
        ids = [self.eos_token_id, *(self.token_id(end) for end in ends if self.has_token(end))]
        return [i for i in dict.fromkeys(ids) if i is not None]

    def normalize(self, text):
        for normalizer in self.engine.normalizers:
            text = normalizer(text)
        return text

    def _cut(self, text, pattern):
        """Text -> alternating [text, token, text, ..., text], after the tokens' own rules on neighboring spaces."""
        pieces = pattern.split(text) if pattern else [text]
        for i in range(1, len(pieces), 2):
            flags = self.flags.get(pieces[i], {})
            if flags.get("rstrip"):
                pieces[i + 1] = pieces[i + 1].lstrip(self._white_space)
            if flags.get("lstrip"):
                pieces[i - 1] = pieces[i - 1].rstrip(self._white_space)
        return pieces

    def _split(self, text, special_in_text):
        """The same of normalized text; tokens marked "normalized" are looked for in what the others leave."""
        before, after = self._patterns[special_in_text]
        pieces = self._cut(text, before)
        if self.engine.normalizers:
            pieces = [
                part
                for i, piece in enumerate(pieces)
                for part in ([piece] if i % 2 else self._cut(self.normalize(piece), after))
            ]
        return pieces

    def encode(self, text, add_special_tokens=True, special_in_text=None):
        """str -> list of ids. special_in_text: True takes special tokens that are written in the text as such, False as
        ordinary text, None as the family does. A prompt and its reply as one sequence are encode(prompt) +
        encode(reply, False) + [eos], for ChatGLM-6B's pair form too."""
        ids = []
        if text:
            prefix = self.add_prefix_space
            pieces = self._split(SPACE + text.replace(SPACE, " ") if prefix else text, special_in_text)
            if prefix and len(pieces) > 1 and pieces[0] == SPACE and pieces[1] in self.special:
                pieces[0] = ""  # a text that begins with a special token gets no space before it
            for i, piece in enumerate(pieces):
                if piece:
                    ids += [self._token_ids[piece]] if i % 2 else self.engine.encode(piece, i == 0)
        return self.head + ids + self.tail if add_special_tokens else ids

    def piece_bytes(self, token_id):
        """id -> its UTF-8 bytes, one for a byte-fallback token, none beyond the vocabulary (models pad theirs)."""
        if token_id in self.added_ids and not self.bare:
            return self.added_ids[token_id].encode()
        return self.engine.piece_bytes(token_id)

    def stream_decoder(self, skip_special_tokens=True):
        return StreamDecoder(self, skip_special_tokens)

    def decode(self, ids, skip_special_tokens=True):
        """ids -> str, by the very decoder that streaming uses."""
        decoder = self.stream_decoder(skip_special_tokens)
        return "".join([decoder.push(int(i)) for i in ids]) + decoder.flush()

    def decode_reply(self, ids):
        """Generated ids -> the text before the first of stop_ids."""
        stop = next((at for at, i in enumerate(ids) if int(i) in self.stop_ids), None)
        return self.decode(ids[:stop]).strip()

    def encode_chat(self, rounds, context=None, is_training=False):
        """[(user, bot)...] -> system ids, [(user ids, bot ids)...]. The last bot may be None: still to be generated.

        A prompt is the same ids in training and in generation, whatever reply follows it. Without a template: each user
        turn with special tokens, each bot turn followed by eos, and a context's system text on a line of its own before
        the first user turn."""
        context, template = context or {}, self.chat_template
        if template is None:
            system = f"{context['system']}\n" if context.get("system") else ""
            eos = [] if self.eos_token_id is None else [self.eos_token_id]
            users = [self.encode((system if i == 0 else "") + user) for i, (user, _) in enumerate(rounds)]
            bots = [None if bot is None else self.encode(bot, False) + eos for _, bot in rounds]
            return [], list(zip(users, bots))
        segments = template.segments(rounds, context, self, is_training)
        system_ids, *turns = encode_conversation(self, segments, 1 + 2 * len(rounds))
        bots = [None if bot is None else ids for (_, bot), ids in zip(rounds, turns[1::2])]
        return system_ids, list(zip(turns[::2], bots))

    def apply_chat(self, messages, add_generation_prompt=True):
        """[{"role": "system" | "user" | "assistant", "content": str}...] -> ids by the chat template (plain text
        without one).

        UserError unless the roles are: system at most once and first, then user and assistant in turn, a user last if a
        reply is to follow."""
        context, rounds = check_messages(messages, add_generation_prompt)
        if self.chat_template is None:
            _, encoded = self.encode_chat(rounds, context)
            return [i for user, bot in encoded for i in user + (bot or [])]
        segments = self.chat_template.segments(rounds, context, self, split=False)
        last = 2 * len(rounds)  # only the last reply is cut off: earlier ones are read in one with what is around them
        segments = [segment._replace(part=2 if segment.part == last else 1) for segment in segments]
        return sum(encode_conversation(self, segments, 3), [])

    def save(self, path):
        """Copies the tokenizer's files and writes its chat template, so that whoever opens the folder asks as it learnt."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for source in [self.folder / name for name in (*MODEL_FILES, *SIDE_FILES) if name != TEMPLATE_FILE]:
            if source.is_file() and source.resolve() != (path / source.name).resolve():
                shutil.copyfile(source, path / source.name)
        save_chat_template(self.chat_template, path)


def load_tokenizer(path):
    """Folder with MODEL_FILES and perhaps SIDE_FILES -> Tokenizer. UserError for what CLASSES and JSON_PARTS lack."""
    return Tokenizer(path)
