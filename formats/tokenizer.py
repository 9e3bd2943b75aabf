"""Tokenizers of every family: text <-> ids."""

import base64
import codecs
import os
import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from formats.added_tokens import AddedToken, write_added_tokens
from formats.bpe import (
    BPE,
    BYTE_CHARS,
    GPT2_WORDS,
    LLAMA3_WORDS,
    MOST_IDS,
    QWEN_WORDS,
    SPACE,
    WHITE_SPACE,
    read_merges,
    split_step,
    to_nfc,
)
from formats.chat import encode_conversation, folder_template, is_plain_folder, save_chat_template
from formats.chat_formats import TEMPLATE_FILE
from formats.files import UserError, brief, names_in, read_json, refuse_lfs_pointer
from formats.generation_config import eos_ids, read_generation_config, write_generation_config
from formats.gguf_folder import open_folder
from formats.messages import parse_messages, plain_rounds
from formats.tokenizer_json import read_tokenizer_json

SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model")  # Hugging Face's name, PaddleNLP's name


MODEL_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken", "ice_text.model", *SENTENCEPIECE_FILES)


SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)


SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


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


SHIELD = "\ufdd2"  # no character of any text: behind the first one of a special token's text, which is then ordinary


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
                # Bytes appended to a protobuf message are merged into it: normalizer_spec (3) {add_dummy_prefix (3):
                # false}
                self.sp = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        except RuntimeError:
            refuse_lfs_pointer(path)
            raise UserError(
                f"{path}: neither a sentencepiece model nor tiktoken text (base64, a space, the rank)"
            ) from None
        count = self.sp.get_piece_size()
        self.size, self.byte_ids = shift + count, {shift + i for i in range(count) if self.sp.is_byte(i)}
        self._bytes = [f"<image_{i}>".encode() for i in range(shift)] + [self._decoded(i) for i in range(count)]
        self._unk = self.sp.id_to_piece(max(self.sp.unk_id(), 0))
        self._unk_length = len(self.sp.encode(self._unk))

    def _decoded(self, i):
        """PromptSegment number -> its bytes; control pieces have none, unk is a visible mark, as the library decodes
        them."""
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


# ---- Readers: a folder's files -> an engine ----


def tokenizer_class(folder: Path, config: dict) -> tuple:
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


def read_tiktoken(path: str | Path, row: dict) -> BPE:
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
            raise UserError(f"{path}:{number}: base64, a space and a rank are expected, found {shown!r}") from None
        if rank >= MOST_IDS:
            raise UserError(f"{path}:{number}: the rank {rank} is beyond {MOST_IDS:,}, which no vocabulary has")
        if rank < 0 or seen.setdefault(rank, number) != number:
            problem = (
                f"the rank {rank} is that of line {seen[rank]} too" if rank >= 0 else f"the rank {rank} is below 0"
            )
            raise UserError(f"{path}:{number}: {problem}")
        if symbol in vocab:
            raise UserError(f"{path}:{number}: these bytes have the rank {vocab[symbol]} already")
        vocab[symbol] = rank
    if missing := [b for b, char in BYTE_CHARS.items() if char not in vocab]:
        raise UserError(f"{path}: no line for the byte {missing[0]:#04x}; a tiktoken vocabulary has all 256")
    return BPE(vocab, None, [split_step(row["words"])], [to_nfc] if row.get("nfc") else [], whole_words=True)


# ---- The door ----


def trie_regex(words: list) -> str:
    """Words -> a pattern that matches the longest of them at a place, as quickly for a thousand as for two."""
    prefix = os.path.commonprefix(words)
    rests, branches = {word[len(prefix) :] for word in words}, {}
    for rest in sorted(rests - {""}):
        branches.setdefault(rest[0], []).append(rest)
    tail = "|".join(map(trie_regex, branches.values()))
    return re.escape(prefix) + (f"(?:{tail})" + "?" * ("" in rests) if tail else "")


def clean_up(text: str) -> str:
    """transformers' clean_up_tokenization_spaces: no space before punctuation and English contractions."""
    for pattern in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(pattern, pattern.strip())
    return text


def is_token_id(value: object) -> bool:
    """Whether a number, or the text of one, can be the id of a token."""
    return bool(re.fullmatch("[0-9]{1,9}", str(value))) and int(value) < MOST_IDS


def token_text(token: object, folder: Path) -> str | None:
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

    def begin_after(self, ids):
        """What is pushed from here on goes on with these ids, whose own text is not given again."""
        for at, token_id in enumerate(ids):
            if self.lead or at >= len(ids) - 8:  # no character and no rule on spaces reaches farther back
                self.push(int(token_id))
        self.after_special = self.after_special or bool(self.stretch)
        self.stretch = self.unclean = ""

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
                stripped = text[min(self.lead, len(text) - len(text.lstrip(" "))) :]
                text, self.lead = stripped, 0 if stripped else self.lead - len(text)
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
    tests/test_tokenizer.py. What differs: bytes that are no UTF-8 are one U+FFFD each wherever there is byte fallback,
    as in sentencepiece; a run of spaces that lost its first is printed as spaces; clean_up_tokenization_spaces is for
    sentencepiece models alone, as in transformers 5; Llama 3's own library cuts a text every 400,000 characters, and
    runs of letters or blanks every 25,000, this does not."""

    special_in_messages = False  # whether apply_chat takes special tokens that a message writes as such
    _special_pattern = None  # of the texts that shielded() changes

    def __init__(self, folder):
        self.folder = Path(folder)
        config = self._read_side_files()
        self.kind, path, name = tokenizer_class(self.folder, config)
        row = self._row = CLASSES.get(self.kind, {}).get(name, {})
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
                    f"{self.folder / SIDE_FILES[0]}: num_image_tokens: a count is expected, found {brief(shift)}"
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
        self.generation_config = read_generation_config([self.folder]) or None  # None: of a model that is not known
        self.new_tokens, self.new_ids = [], []  # of add_tokens(): AddedTokens, and ids that no file has
        self._chat_template = None
        self.chat_template = folder_template(self.folder)
        self.has_chat_format = self.chat_template is not None or is_plain_folder(
            self.folder
        )  # False: plain text is a guess

    def _read_side_files(self):
        """tokenizer_config.json over special_tokens_map.json, {} without them."""
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; a folder with a tokenizer's files is expected")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (self.folder / name).is_file():
                content = read_json(self.folder / name)
                if not isinstance(content, dict):
                    raise UserError(f"{self.folder / name}: an object is expected, found a {type(content).__name__}")
                config |= content
        return config

    def _side_tokens(self, settings):
        """added_tokens_decoder {id: token} and added_tokens.json {text: id} -> [(text, id, flags)...]."""
        path = self.folder / "added_tokens.json"
        decoder, listed = settings.get("added_tokens_decoder") or {}, read_json(path) if path.is_file() else {}
        for where, ids in ((f"{self.folder / SIDE_FILES[0]}: added_tokens_decoder", decoder), (path, listed)):
            numbers = ids if ids is decoder else ids.values() if isinstance(ids, dict) else ()
            if not isinstance(ids, dict) or not all(map(is_token_id, numbers)):
                raise UserError(f"{where}: an object of tokens and their ids is expected, found {brief(ids)}")
        named = [
            (token_text(token, self.folder), int(i), token if isinstance(token, dict) else {})
            for i, token in decoder.items()
        ]
        return [*named, *((text, int(i), {}) for text, i in listed.items())]

    def _collect_special_tokens(self, settings, row, tokens):
        """Fills added {text: id}, flags {text: dict}, special (texts), special_ids, and bos, eos, unk and pad. Of two
        files that know a token, the first of tokenizer.json, added_tokens_decoder, added_tokens.json and the rest is
        right."""
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
        if self.pad_token_id is None:  # padding is never seen nor learned, any id will do
            self.pad_token_id = next((i for i in (self.unk_token_id, self.eos_token_id) if i is not None), 0)
        self.special, self.special_ids = set(special), {self.added[token] for token in special}
        self.added_ids = {i: text for text, i in self.added.items()}
        if row.get("strips"):
            self.flags = {text: {"lstrip": True, "rstrip": True} | self.flags.get(text, {}) for text in self.added}
        self._prepare_split(row)

    def add_tokens(self, tokens, special=False):
        """Makes texts tokens: with an id of their own after all others, unless the vocabulary has them; save() writes
        them. special: left out of decoded text."""
        for text in tokens:
            token_id = self.token_id(text)
            if token_id is None:
                token_id, self.vocab_size = self.vocab_size, self.vocab_size + 1
                self.new_ids.append(token_id)
            if text not in self.added or special and text not in self.special:
                self.new_tokens.append(AddedToken(text, token_id, special))
                self.added[text], self.added_ids[token_id], self.flags[text] = token_id, text, {"special": special}
                self.special |= {text} if special else set()
                self.special_ids |= {token_id} if special else set()
        self._prepare_split(self._row)

    def _prepare_split(self, row):
        """Fills _token_ids {text as it is found: id} and _patterns {special_in_text: (before normalization, after
        it)}."""
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
        whole = [text for text in self.special if text and text not in ("<think>", "</think>")]  # templates read these
        self._special_pattern = re.compile(f"({trie_regex(whole)})") if whole else None
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
        self._chat_template, self.has_chat_format = template, True

    def token_id(self, text):
        """The id of a token by its text, special or of the vocabulary; None if there is none."""
        return self.added.get(text, self.engine.id_of(text))

    def has_token(self, text):
        """Whether `text` becomes one token however it is written: added, or user-defined in the sentencepiece model."""
        return text in self.added or self.engine.encode(text, False) == [self.engine.id_of(text)]

    @property
    def stop_ids(self):
        """Ids that end a reply: eos, those of the model's generation_config.json or config.json, and the tokens with
        which the chat template ends a turn."""
        ids = [self.eos_token_id, *eos_ids(self.generation_config or {})]
        for end in self.chat_template.stops if self.chat_template else ():
            if not self.has_token(end):  # such as an end mark, a line break and eos
                end = max((token for token in self.special if end.startswith(token)), key=len, default=None)
            ids.append(None if end is None else self.token_id(end))
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
                if i % 2:
                    ids.append(self._token_ids[piece])
                elif SHIELD in piece and self.kind == "sentencepiece" and not self.engine.legacy:
                    for k, part in enumerate(filter(None, piece.split(SHIELD))):  # the model may have the whole token
                        ids += self.engine.encode(part, i == k == 0)
                elif piece := piece.replace(SHIELD, ""):
                    ids += self.engine.encode(piece, i == 0)
        return self.head + ids + self.tail if add_special_tokens else ids

    def shielded(self, value):
        """Messages, or any object of dicts, lists and strings -> the same, in which special tokens that are written in
        a string will be encoded as ordinary text, whatever a template puts around it."""
        if isinstance(value, str):
            pattern = self._special_pattern
            return pattern.sub(lambda found: found[0][0] + SHIELD + found[0][1:], value) if pattern else value
        if isinstance(value, dict):
            return {self.shielded(key): self.shielded(item) for key, item in value.items()}
        return type(value)(map(self.shielded, value)) if isinstance(value, list | tuple) else value

    @cached_property
    def _most_bytes(self):
        """Of a token."""
        return max(len(self.piece_bytes(i)) for i in range(self.vocab_size))

    def fewest_tokens(self, text):
        """A number of ids that encode(text) has at least, without encoding it: no token stands for more bytes than the
        longest. 0 where characters may be dropped or runs of them become one."""
        if not self.engine.byte_ids:
            return 0
        size = len(re.sub(r"\s+", " ", text).encode("utf-8", "replace"))  # special tokens may swallow spaces
        shrinks = (
            4 if self.engine.normalizers or self.kind in ("sentencepiece", "ice_text") else 1
        )  # NFC, sentencepiece's own normalizer
        return size // (self._most_bytes * shrinks)

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
        """[(prompt, reply)...] as parse_messages gives them -> system ids, [(prompt ids, reply ids)...].

        The last reply may be None: still to be generated. A prompt is the same ids in training and in generation,
        whatever reply follows it. reply ids are what is learned: [] for a reply that the template shows and that is
        not learned (formats/rendering.py). Without a template: each user turn with special tokens, each reply followed
        by eos, and a context's system text on a line of its own before the first user turn."""
        context, template = context or {}, self.chat_template
        if template is None:
            system = f"{context['system']}\n" if context.get("system") else ""
            eos = [] if self.eos_token_id is None else [self.eos_token_id]
            turns = plain_rounds(rounds, context, "plain text without a chat template")
            users = [self.encode((system if i == 0 else "") + user) for i, (user, _) in enumerate(turns)]
            bots = [None if bot is None else self.encode(bot, False) + eos for _, bot in turns]
            return [], list(zip(users, bots))
        segments = template.segments(rounds, context, self, is_training)
        system_ids, *parts = encode_conversation(self, segments, 1 + 2 * len(rounds))
        bots = [None if bot is None else ids for (_, bot), ids in zip(rounds, parts[1::2])]
        return system_ids, list(zip(parts[::2], bots))

    def apply_chat(self, messages, add_generation_prompt=True, *, tools=None, template_kwargs=None):
        """Messages of OpenAI or transformers, tools, chat_template_kwargs -> ids by the chat template (plain text
        without one). UserError for messages that parse_messages or the template refuses, and unless the last message
        is the assistant's or, with add_generation_prompt, another's. Special tokens that messages and tools write are
        text, unless special_in_messages is set."""
        context, rounds = parse_messages(messages, tools)
        if not self.special_in_messages:
            context, rounds = self.shielded(context), self.shielded(rounds)
        if template_kwargs:
            context["chat_template_kwargs"] = template_kwargs
        if (rounds[-1][1] is None) != add_generation_prompt or rounds[-1] == ([], None):
            raise UserError(
                "messages: the last must be the user's or a tool's if a reply is to be generated, else the "
                f"assistant's; found {brief(messages[-1].get('role'))}"
            )
        if self.chat_template is None:
            _, encoded = self.encode_chat(rounds, context)
            return [i for user, bot in encoded for i in user + (bot or [])]
        segments = self.chat_template.segments(rounds, context, self, split=False)
        last = 2 * len(rounds)  # only the last reply is cut off: earlier ones are read in one with what is around them
        segments = [segment._replace(part=2 if segment.part == last else 1) for segment in segments]
        return sum(encode_conversation(self, segments, 3), [])

    def save(self, path):
        """Copies the tokenizer's files and writes its chat template and, for a model, generation_config.json, so that
        whoever opens the folder asks as it learned and stops where it stops."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for source in [self.folder / name for name in (*MODEL_FILES, *SIDE_FILES) if name != TEMPLATE_FILE]:
            if source.is_file() and source.resolve() != (path / source.name).resolve():
                shutil.copyfile(source, path / source.name)
        if self.new_tokens:
            write_added_tokens(path, self.new_tokens)
        save_chat_template(self.chat_template, path, plain=self.has_chat_format)
        if self.generation_config is not None:
            pad_id = None if self.pad_token is None else self.pad_token_id
            write_generation_config(path, self.generation_config, self.stop_ids, self.bos_token_id, pad_id)


def load_tokenizer(path: str | Path, model_folders: Iterable[str | Path] = ()) -> Tokenizer:
    """Folder with MODEL_FILES and perhaps SIDE_FILES -> Tokenizer. UserError for what CLASSES and JSON_PARTS lack.

    model_folders: of the model that it is for, an adapter's before its base's: Tokenizer.stop_ids holds what their
    generation_config.json or config.json says; by default, what those of `path` say.
    """
    tokenizer = Tokenizer(open_folder(path))
    if folders := list(model_folders):
        tokenizer.generation_config = read_generation_config(folders) or tokenizer.generation_config or {}
    return tokenizer
