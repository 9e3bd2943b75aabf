"""Byte pairs: texts are split into words, words into bytes or characters, and merged by rank."""

import re
import unicodedata
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import chain, starmap
from operator import add
from pathlib import Path

from formats.files import UserError, brief, read_json
from formats.progress import check_progress

# ============================== tokenizer ==============================
# A family's tokenizer is data: the files of its folder and a row of CLASSES. Two engines turn text into ids:
# SentencePieceModel (the C++ library) and BPE (ours); readers make one from the files; Tokenizer, the door, adds what
# stands around it: special tokens, bos and eos, chat templates.

SPACE = "\u2581"  # how sentencepiece writes a space


WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+")  # fmt: skip


QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")  # each digit by itself


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_WORDS = (  # Mistral NeMo and later: a word ends where a small letter meets a capital one
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip


# GPT-2 writes the 256 bytes as characters that can be seen: printable Latin-1 as itself, the others from U+0100 on.
_seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {b: chr(b) for b in _seen} | {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(_seen)))}


CHAR_BYTES = {char: b for b, char in BYTE_CHARS.items()}


WORDS_A_CHECK, MERGES_A_CHECK = 1024, 4096  # between two calls of check_progress


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
        ids, check = [], check_progress.get()
        for start in range(0, len(words), WORDS_A_CHECK):
            check(len(ids))
            ids.extend(chain.from_iterable(map(self._ids_of_word.__getitem__, words[start : start + WORDS_A_CHECK])))
        return ids

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
        check, pops = check_progress.get(), 0
        while heap:
            pops += 1
            if pops == MERGES_A_CHECK:
                check(pops := 0)
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


MOST_IDS = 1 << 24  # more than any vocabulary has; a table of that many fits into memory


def check_vocabulary_ids(vocab: dict, where: str) -> None:
    """UserError unless vocab is {symbol: id}, each id once."""
    if not isinstance(vocab, dict) or not vocab:
        raise UserError(f"{where}: an object of symbols and their ids is expected, found {brief(vocab)}")
    ids = vocab.values()
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < MOST_IDS and len(set(ids)) == len(vocab):
        return
    seen = {}
    for symbol, i in vocab.items():
        if type(i) is not int or i < 0:
            raise UserError(f"{where}: the id of {symbol!r} must be a number from 0 on, found {brief(i)}")
        if i >= MOST_IDS:
            raise UserError(f"{where}: the id {i} of {symbol!r} is beyond {MOST_IDS:,}, which no vocabulary has")
        if seen.setdefault(i, symbol) is not symbol:
            raise UserError(f"{where}: the id {i} is given twice, to {seen[i]!r} and to {symbol!r}")


def merge_ranks(merges: list, vocab: dict, where: str) -> dict:
    """[(left, right)...] in order of rank -> {(left, right): rank}. UserError from `where(rank)` for one that repeats
    or names a symbol that is not in the vocabulary."""
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


def read_merges(path: Path, row: dict, add_prefix_space: bool, unk: str | None) -> BPE:
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
                f"{merges_path}:{first + number + 1}: two symbols with one space between them are expected, "
                f"found {lines[first + number]!r}"
            )
    ranks = merge_ranks(merges, vocab, lambda number: f"{merges_path}:{first + number + 1}")
    steps = [*([prefix_step] if add_prefix_space else []), split_step(row["words"])]
    return BPE(vocab, ranks, steps, [to_nfc] if row.get("nfc") else [], unk=unk if unk in vocab else None)


def to_nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def compile_words(pattern: str, where: str = "the built-in pattern") -> object:
    """Pattern of a tokenizer.json (Oniguruma's dialect) -> compiled. UserError for what the two would read
    differently."""
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


def split_step(
    pattern: str, behavior: str = "Isolated", invert: bool = False, where: str = "the built-in pattern"
) -> Callable:
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
            matches = findall(text) if behavior == "Isolated" else ()
            out += matches if sum(map(len, matches)) == len(text) else cut(text)  # no gaps: the usual case, and fast
        return out

    return step


def prefix_step(texts: list, at_start: bool) -> list[str]:
    return [text if text.startswith(" ") else f" {text}" for text in texts]
