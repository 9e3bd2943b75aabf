"""From a file on disk to a batch of numpy arrays: records, pairs, packing, corpora. Never imports paddle.

    python data.py corpus corpus.jsonl --tokenizer demo/model --output data/corpus --workers 2

turns text (`.jsonl`: one {"text": ...} a line; `.txt`: documents separated by blank lines) into Megatron's `.bin/.idx`,
which pretrain.py reads by memory map. Everything else here is used by import:

    tokenizer = load_tokenizer(folder)                  sentencepiece, byte pairs; special tokens, chat template
    dataset = SFTDataset(path, tokenizer, src_length, max_length)         src/tgt JSON lines -> one flat int32 array
    loader = SFTLoader(dataset, batch_size, max_length, ...)              .batch(epoch, index) -> dict of arrays
    dataset = PreferenceDataset(path, tokenizer, max_seq_len, ...)        pairs of replies, one better than the other
    loader = PreferenceLoader(dataset, batch_size, max_seq_len, ...)      the same, several pairs a row
    loader = CorpusLoader(prefix, "949,50,1", "train", ...)               the same over memory-mapped tokens

A batch, everywhere (B batch, T sequence):
    input_ids, position_ids     int64 [B, T]   positions restart in each sample
    labels                      int64 [B, T]   shifted HERE, once: labels[t] is position t's target; -100 is ignored
    startend_row_indices        int32 [B, 1, T, 1]   causal FlashMask: rows i >= value[j] cannot see key j
    sample_ids                  per row, the list of record (or corpus sample) numbers in it
    tokens                      int, how many positions are real
and of preference pairs (N pairs in the batch, numbered as sample_ids lists them) also
    reply_ids                   int64 [B, T]   2 n + side (0 chosen, 1 rejected) where pair n has a label, else -1
    reply_tokens                int64 [N, 2]   labels of the chosen and of the rejected reply
Padding is a segment of its own: it sees itself, nobody sees it, and no row is fully masked.

Order is a pure function of (seed, epoch), and batch(epoch, index) is random access, so resuming needs no state but the
step number. Orders come from np.random.RandomState, whose stream numpy has frozen for good: an upgrade between the two
halves of a run changes nothing.

Not here: Unigram and WordPiece in tokenizer.json, tools in chats, Jinja of our own (jinja2 renders templates; without
it those of RECOGNISED are known)."""

import argparse
import bisect
import os
import re
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from formats.files import UserError, brief, names_in, parse_json_line
from formats.megatron import Corpus, index_bytes
from formats.tokenizer import Tokenizer, load_tokenizer

IGNORED = -100  # label of a position that teaches nothing


# ============================== supervised records ==============================


def sft_files(path: str | Path, split: str = "train") -> list[Path]:
    """File -> [file]. Folder -> its train.json or train.jsonl, else train/*.json(l); so for "dev". UserError: none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; a JSON-lines file or a folder with {split}.json is expected")
    for name in (f"{split}.json", f"{split}.jsonl"):
        if (path / name).is_file():
            return [path / name]
    files = sorted([*path.glob(f"{split}/*.json"), *path.glob(f"{split}/*.jsonl")])
    if not files:
        raise UserError(f"{path}: none of {split}.json, {split}.jsonl, {split}/*.json in it; found {names_in(path)}")
    return files


def numbered_lines(file: Path, progress: bool = False) -> Iterator[tuple[int, int, bytes]]:
    """Yields (byte offset, line number, line) of the lines that are not blank."""
    from tqdm import tqdm

    bar = tqdm(total=os.path.getsize(file), unit="B", unit_scale=True, desc=file.name, disable=not progress or None)
    with open(file, "rb") as stream, bar:
        offset = 0
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield offset, number, line
            offset += len(line)
            bar.update(len(line))


def record_at(files: list[Path], place: np.ndarray) -> dict:
    """(file number, byte offset, line number) -> the JSON object that stands there."""
    number, offset, line = (int(v) for v in place)
    with open(files[number], "rb") as stream:
        stream.seek(offset)
        return parse_json_line(stream.readline(), files[number], line)


def _texts(record, key, where):
    """record[key], a string or a list of strings, as a list."""
    if key not in record:
        raise UserError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, record)) or 'no keys'}")
    value = [record[key]] if isinstance(record[key], str) else record[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: {key!r} must be a string or a list of strings, found {brief(record[key])}")
    return value


def _context(record, where):
    context = record.get("context") or {}
    if not isinstance(context, dict) or not isinstance(context.get("system", ""), str):
        raise UserError(f"{where}: 'context' must be an object, and its 'system' a string; found {brief(context)}")
    return context


def parse_turns(record: dict, where: str) -> tuple[list, dict]:
    """{"src", "tgt", "context"?} -> [(user, bot)...], context. UserError names file:line and the key that is wrong."""
    turns = [_texts(record, key, where) for key in ("src", "tgt")]
    if len(turns[0]) != len(turns[1]) or not turns[0]:
        raise UserError(
            f"{where}: 'src' has {len(turns[0])} turns and 'tgt' has {len(turns[1])}; both need the same "
            "number, at least one"
        )
    context = _context(record, where)
    return list(zip(*turns)), context


def truncate_user_turn(
    tokenizer: Tokenizer, user: str, bot: str, context: dict, room: int, history: list = ()
) -> list[int]:
    """User text -> ids of its rendered part in at most `room` tokens: the text loses its beginning, the template around
    it stays whole. history: the rounds before it."""
    ids, text = tokenizer.encode(user, False), user
    keep = len(ids)
    while True:
        part = tokenizer.encode_chat([*history, (text, bot)], context, True)[1][-1][0]
        if len(part) <= room or keep == 0:
            return part
        keep = max(0, keep - (len(part) - room))
        text = tokenizer.decode(ids[len(ids) - keep :], skip_special_tokens=False)


def truncate_templated(
    tokenizer: Tokenizer, rounds: list, context: dict, src_length: int, max_length: int
) -> tuple[list, list]:
    """PaddleNLP's truncation with a template -> (system ids, [(user ids, bot ids)...]) of at most max_length tokens,
    unless the last user part alone is longer. The system stays; rounds are kept from the last to the first while they
    fit; the last one is always kept, its user part cut to src_length less the system, its reply to what is left. One
    deviation: index and is_first count the rounds that are kept, so that what a template says at the beginning (bos,
    Llama 2's system text) is there when early rounds had to go."""
    while True:
        system, encoded = tokenizer.encode_chat(rounds, context, True)
        room = max_length - len(system)
        sizes = [len(user) + len(bot) for user, bot in encoded]
        if sum(sizes) <= room:
            return system, encoded
        if len(rounds) == 1:
            break
        fits = int(np.searchsorted(np.cumsum(sizes[::-1]), room, side="right"))
        rounds = rounds[-max(1, min(fits, len(rounds) - 1)) :]
    (user, bot), user_room = encoded[0], max(0, src_length - len(system))
    if len(user) > user_room:
        user = truncate_user_turn(tokenizer, *rounds[0], context, user_room)
    return system, [(user, bot[: max(0, room - len(user))])]


def truncate_plain(
    tokenizer: Tokenizer, rounds: list, context: dict, src_length: int, max_length: int
) -> tuple[list, list]:
    """PaddleNLP's truncation without a template -> ([], [(src ids, tgt ids)...]). src keeps its last src_length tokens,
    special tokens included; tgt keeps its first max_length - len(src), and ends with eos only if it was not cut.
    PaddleNLP would drop all turns but the first; here the turns follow one another, and early ones go when they do not
    fit."""
    _, encoded = tokenizer.encode_chat(rounds, context, True)
    head, tail = tokenizer.head, tokenizer.tail
    room = max(0, src_length - len(head) - len(tail))
    bare = [(user[len(head) : len(user) - len(tail)], bot) for user, bot in encoded]
    cut = [(head + user[max(0, len(user) - room) :] + tail, bot) for user, bot in bare]
    user, bot = cut[-1]
    kept = [(user, bot[: max(0, max_length - len(user))])]
    total = len(user) + len(kept[0][1])
    for user, bot in reversed(cut[:-1]):
        total += len(user) + len(bot)
        if total > max_length:
            break
        kept.insert(0, (user, bot))
    return [], kept


def truncate_prompt(tokenizer: Tokenizer, rounds: list, context: dict, src_length: int, max_length: int) -> list[int]:
    """Ids up to the reply of the last round, which is to be written: the rounds that training would show, truncated as
    there (a reply given with the last round takes its part of max_length), the last in the template's query form."""
    template = tokenizer.chat_template
    fit = truncate_plain if template is None else truncate_templated
    system, encoded = fit(tokenizer, rounds, context, src_length, max_length)
    kept = rounds[-len(encoded) :]
    shortened = encoded[-1][0] != tokenizer.encode_chat(kept, context, True)[1][-1][0]
    if template is not None and not shortened:
        system, encoded = tokenizer.encode_chat([*kept[:-1], (kept[-1][0], None)], context)
    return system + [t for user, bot in encoded[:-1] for t in user + bot] + encoded[-1][0]


class SFTDataset:
    """Tokenized src/tgt records of one or more JSON-lines files (or folders with {split}.json).

    All records lie in one int32 array, ids of learned tokens as they are and all others as ~id (negative), so prompt
    and reply are told apart without a second array; a record's own JSON is re-read from the file when asked for. A
    million records of 100 tokens are 400 MB, and never Python lists. Truncation: `truncate_templated`,
    `truncate_plain`. A record without a learned token left is dropped and counted in .dropped. autoregressive: prompts
    are learned too. UserError: missing or empty file, a bad line (file:line), nothing left to learn in any record."""

    def __init__(
        self, paths, tokenizer, src_length=1024, max_length=2048, split="train", autoregressive=False, progress=False
    ):
        self.tokenizer, self.src_length, self.max_length = tokenizer, src_length, max_length
        paths = [paths] if isinstance(paths, (str, Path)) else paths
        self.files = [file for path in paths for file in sft_files(path, split)]
        self.dropped = 0
        tokens, ends, places = array("i"), array("q", [0]), array("q")  # places: file number, byte offset, line number
        for number, file in enumerate(self.files):
            for offset, line_number, line in numbered_lines(file, progress):
                where = f"{file}:{line_number}"
                flat = self._flatten(*parse_turns(parse_json_line(line, file, line_number), where), autoregressive)
                if not any(token >= 0 for token in flat[1:]):
                    self.dropped += 1
                    continue
                tokens.extend(flat)
                ends.append(len(tokens))
                places.extend((number, offset, line_number))
        if not places:
            raise UserError(
                f"{self.files[0]}: "
                + (
                    f"nothing to learn is left in any of the {self.dropped} records with max_length {max_length} and "
                    f"src_length {src_length}; raise max_length or lower src_length"
                    if self.dropped
                    else "the file is empty; JSON lines with src and tgt are expected"
                )
            )
        self._tokens, self._ends = np.frombuffer(tokens, np.int32), np.frombuffer(ends, np.int64)
        self._places = np.frombuffer(places, np.int64).reshape(-1, 3)
        self.lengths = (np.diff(self._ends) - 1).astype(np.int32)  # positions: one less than tokens

    def _fit(self, rounds, context):
        fit = truncate_plain if self.tokenizer.chat_template is None else truncate_templated
        return fit(self.tokenizer, rounds, context, self.src_length, self.max_length)

    def _flatten(self, rounds, context, autoregressive):
        """Rounds -> list of at most max_length tokens, ~id where nothing is learned."""
        system, encoded = self._fit(rounds, context)
        flat = [~i for i in system]
        for user, bot in encoded:
            flat += [~i for i in user]
            flat += bot
        flat = flat[: self.max_length]
        return [i if i >= 0 else ~i for i in flat] if autoregressive else flat

    def __len__(self):
        return len(self.lengths)

    def sample(self, i):
        """Record number -> (input_ids, labels), int32 [lengths[i]]; labels[t] is the target of input_ids[t], -100 where
        nothing is learned."""
        tokens = self._tokens[self._ends[i] : self._ends[i + 1]]
        return np.where(tokens < 0, ~tokens, tokens)[:-1], np.where(tokens < 0, IGNORED, tokens)[1:]

    def record(self, i):
        """Record number -> its JSON object, read again from the file."""
        return record_at(self.files, self._places[i])

    def prompt_ids(self, i):
        """Record number -> ids up to the last reply: the rounds that training showed, the last in the query form."""
        rounds, context = parse_turns(self.record(i), f"record {i}")
        return truncate_prompt(self.tokenizer, rounds, context, self.src_length, self.max_length)

    def reference(self, i):
        """Record number -> text of its last reply."""
        return parse_turns(self.record(i), f"record {i}")[0][-1][1]


# ============================== batches of records ==============================


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(n), a function of (seed, epoch) alone."""
    return np.random.RandomState([seed & 0xFFFFFFFF, epoch]).permutation(n)


def best_fit_packs(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest first, each into the fullest pack that still has room (best-fit decreasing) -> (order, bounds): pack p
    holds order[bounds[p]:bounds[p+1]].

    Never worse than 11/9 of the optimum + 6/9 packs (Dosa 2007); on instruction data nearly always full. O(n log
    capacity): packs are kept by the room they have left, in at most `capacity` stacks. A million records take 1
    second."""
    assert len(lengths) and lengths.max() <= capacity, (len(lengths), lengths.max(initial=0), capacity)
    pack_of = np.empty(len(lengths), np.int64)
    rooms, packs_with, packs, shortest = [], {}, 0, int(lengths.min())  # rooms: sorted sizes of room that some pack has
    for i in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[i])
        k = bisect.bisect_left(rooms, length)
        if k == len(rooms):
            pack, room, packs = packs, capacity, packs + 1
        else:
            room = rooms[k]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del packs_with[room], rooms[k]
        pack_of[i] = pack
        room -= length
        if room >= shortest:
            if room not in packs_with:
                packs_with[room] = []
                bisect.insort(rooms, room)
            packs_with[room].append(pack)
    return np.argsort(pack_of, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(pack_of))])


def in_order_packs(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Records in their order, a new pack when the next does not fit (PaddleNLP without greedy) -> (order, bounds)."""
    assert len(lengths) and lengths.max() <= capacity, (len(lengths), lengths.max(initial=0), capacity)
    bounds, used = [0], 0
    for i, length in enumerate(lengths.tolist()):
        if used + length > capacity:
            bounds.append(i)
            used = 0
        used += length
    return np.arange(len(lengths)), np.array([*bounds, len(lengths)])


def collate(rows: list, sample: Callable, width: int, pad_token_id: int) -> dict:
    """Record numbers of each row, sample(i) -> (input_ids, labels) -> the batch described at the top, T = width."""
    B = len(rows)
    input_ids = np.full((B, width), pad_token_id, np.int64)
    labels = np.full((B, width), IGNORED, np.int64)
    positions = np.zeros((B, width), np.int64)
    mask_rows = np.full((B, 1, width, 1), width, np.int32)
    tokens = 0
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            ids, targets = sample(i)
            end = start + len(ids)
            input_ids[b, start:end], labels[b, start:end] = ids, targets
            positions[b, start:end] = np.arange(len(ids))
            mask_rows[b, 0, start:end, 0] = end
            start = end
        tokens += start
        positions[b, start:] = np.arange(width - start)  # padding: a segment of its own, from `start` to the end
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": positions,
        "startend_row_indices": mask_rows,
        "sample_ids": [[int(i) for i in row] for row in rows],
        "tokens": tokens,
    }


class SFTLoader:
    """Batches of an SFTDataset; batch(epoch, index) is a pure function of its arguments and the constructor's.

    zero_padding: records are packed into rows of max_length once, and whole packs are shuffled each epoch
    (greedy_zero_padding: best fit; else in file order). Otherwise each batch is padded to its longest record; with
    shuffle, batches are made of records of similar length (sorted inside random windows of 50 batches) and come in
    random order. UserError when drop_last leaves no batch."""

    WINDOW = 50  # batches sorted together: larger saves padding, smaller mixes lengths better

    def __init__(
        self,
        dataset,
        batch_size,
        max_length,
        zero_padding=False,
        greedy_zero_padding=False,
        seed=0,
        shuffle=True,
        pad_to_max_length=False,
        pad_to_multiple_of=None,
        drop_last=False,
        pad_token_id=0,
    ):
        assert int(dataset.lengths.max()) <= max_length, (int(dataset.lengths.max()), max_length)
        self.dataset, self.batch_size, self.pad_token_id = dataset, batch_size, pad_token_id
        self.seed, self.shuffle = seed, shuffle
        self.multiple, self.grouped = pad_to_multiple_of or 1, shuffle and not zero_padding
        self.fixed_width = max_length if zero_padding or pad_to_max_length else None
        if zero_padding:
            pack = best_fit_packs if greedy_zero_padding else in_order_packs
            self._order, self._bounds = pack(dataset.lengths, max_length)
        else:
            self._order, self._bounds = np.arange(len(dataset)), np.arange(len(dataset) + 1)
        rows = len(self._bounds) - 1
        self.batches_per_epoch = rows // batch_size if drop_last else -(-rows // batch_size)
        if not self.batches_per_epoch:
            raise UserError(f"{len(dataset)} records make {rows} rows, fewer than one batch of {batch_size}; lower it")
        self._row_lengths = np.add.reduceat(dataset.lengths[self._order].astype(np.int64), self._bounds[:-1])
        self._epoch, self._batches = None, None

    def _width(self, longest):
        width = self.fixed_width or longest
        return -(-width // self.multiple) * self.multiple

    def _epoch_batches(self, epoch):
        """List of batches of row numbers, one may be short. Kept until another epoch is asked for."""
        if self._epoch != epoch:
            rows = np.arange(len(self._bounds) - 1)
            if self.shuffle:
                rows = epoch_order(len(rows), self.seed, epoch)
            if self.grouped:
                window = self.batch_size * self.WINDOW
                rows = np.concatenate(
                    [
                        part[np.argsort(-self._row_lengths[part], kind="stable")]
                        for part in (rows[i : i + window] for i in range(0, len(rows), window))
                    ]
                )
            starts = range(0, self.batches_per_epoch * self.batch_size, self.batch_size)
            batches = [rows[start : start + self.batch_size] for start in starts]
            if self.grouped:
                batches = [batches[i] for i in epoch_order(len(batches), self.seed + 1, epoch)]
            self._epoch, self._batches = epoch, batches
        return self._batches

    def batch(self, epoch, index):
        """-> the batch described at the top of this file."""
        rows = self._epoch_batches(epoch)[index]
        records = [self._order[self._bounds[row] : self._bounds[row + 1]].tolist() for row in rows]
        return collate(records, self.dataset.sample, self._width(int(self._row_lengths[rows].max())), self.pad_token_id)

    @property
    def fill(self):
        """Share of positions that are real, over epoch 0."""
        batches = self._epoch_batches(0)
        positions = sum(len(rows) * self._width(int(self._row_lengths[rows].max())) for rows in batches)
        return float(sum(self._row_lengths[rows].sum() for rows in batches) / positions)


# ============================== preference pairs ==============================


def preference_pair(record: dict, where: str) -> tuple:
    """{"src", "tgt"?, "response", "sort", "context"?} -> [(user, bot)... of earlier turns], user, chosen, rejected,
    context. The reply with the larger sort is the chosen one. UserError names file:line and what is wrong."""
    for key in ("src", "response", "sort"):
        if key not in record:
            raise UserError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, record)) or 'no keys'}")
    users, bots = _texts(record, "src", where), _texts({"tgt": record.get("tgt") or []}, "tgt", where)
    if len(users) != len(bots) + 1:
        raise UserError(
            f"{where}: 'src' has {len(users)} turns and 'tgt' has {len(bots)}; 'tgt' holds the replies to "
            "all turns but the last, so it must have one fewer"
        )
    replies, sort = record["response"], record["sort"]
    if not isinstance(replies, list) or len(replies) != 2 or not all(isinstance(text, str) for text in replies):
        single = isinstance(replies, list) and len(replies) == 1
        raise UserError(
            f"{where}: 'response' must be a list of two strings, found {brief(replies)}"
            + ("; single replies (KTO) are not trained on here" if single else "")
        )
    if empty := [i for i, text in enumerate(replies) if not text.strip()]:
        raise UserError(f"{where}: 'response' number {empty[0] + 1} is empty; both must have text")
    numbers = isinstance(sort, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in sort)
    if not numbers or len(sort) != 2:
        raise UserError(f"{where}: 'sort' must be a list of two numbers, found {brief(sort)}")
    if sort[0] == sort[1]:
        raise UserError(
            f"{where}: 'sort' is {brief(sort)}: equal, so neither reply is the better one; the chosen "
            "one's must be larger"
        )
    context = _context(record, where)
    chosen, rejected = replies if sort[0] > sort[1] else replies[::-1]
    return list(zip(users, bots)), users[-1], chosen, rejected, context


def truncate_pair(
    tokenizer: Tokenizer,
    history: list,
    user: str,
    chosen: str,
    rejected: str,
    context: dict,
    max_seq_len: int,
    max_prompt_len: int,
    where: str,
) -> tuple[list, list, list]:
    """PaddleNLP's truncation of a pair -> ids (prompt, chosen, rejected), which take len(prompt) - 1 + len(chosen) +
    len(rejected) <= max_seq_len positions; a reply is [] when there is no room for it.

    If the last turn and both replies do not fit, the prompt (system and last turn) loses its beginning down to
    max_prompt_len; if that is not enough, both replies lose their ends in proportion to their lengths. Earlier turns
    stand before it, from the newest back, while they fit. As in `truncate_templated` a template counts the turns that
    are kept. A reply that is cut has no end mark."""
    while True:
        system, encoded = tokenizer.encode_chat([*history, (user, chosen)], context, True)
        other = tokenizer.encode_chat([*history, (user, rejected)], context, True)[1][-1]
        (last, good), bad = encoded[-1], other[1]
        if last != other[0]:
            raise UserError(
                f"{where}: chat template {tokenizer.chat_template.name!r} puts the reply into the prompt, "
                "so that two replies cannot share one"
            )
        room = max_seq_len + 1 - len(system)  # + 1: the prompt's last token is counted with the chosen reply
        if len(last) + len(good) + len(bad) > room:
            if len(system) + len(last) > max_prompt_len:
                last = truncate_user_turn(
                    tokenizer, user, chosen, context, max(0, max_prompt_len - len(system)), history
                )
            if len(good) + len(bad) > room - len(last):
                left = max(0, room - len(last))
                keep = min(max(1, round(left * len(good) / (len(good) + len(bad)))), left - 1)
                good, bad = (good[:keep], bad[: left - keep]) if left >= 2 else ([], [])
        sizes = [len(turn) + len(reply) for turn, reply in encoded[:-1]]
        room -= len(last) + len(good) + len(bad)
        if not history or sum(sizes) <= room:
            return system + [i for turn, reply in encoded[:-1] for i in turn + reply] + last, good, bad
        fits = int(np.searchsorted(np.cumsum(sizes[::-1]), room, side="right"))
        history = history[len(history) - fits :]


class PreferenceDataset:
    """Tokenized pairs of replies to one prompt, from a JSON-lines file (or a folder with {split}.json).

    Prompts and replies lie one after another in one int32 array; records are re-read from the file when asked for, as
    in SFTDataset. Truncation: `truncate_pair`. A pair that cannot be learned (no room for a token of each reply, no
    prompt, the same reply twice) is dropped and counted in .dropped. UserError: missing or empty file, a bad line
    (file:line), nothing left."""

    def __init__(self, path, tokenizer, max_seq_len=4096, max_prompt_len=2048, split="train", progress=False):
        self.files, self.dropped = sft_files(path, split), 0
        tokens, ends, places = array("i"), array("q", [0]), array("q")  # ends: of the prompt, the chosen, the rejected
        for number, file in enumerate(self.files):
            for offset, line_number, line in numbered_lines(file, progress):
                where = f"{file}:{line_number}"
                pair = preference_pair(parse_json_line(line, file, line_number), where)
                prompt, chosen, rejected = truncate_pair(tokenizer, *pair, max_seq_len, max_prompt_len, where)
                if not (prompt and chosen and rejected) or chosen == rejected:
                    self.dropped += 1
                    continue
                for part in (prompt, chosen, rejected):
                    tokens.extend(part)
                    ends.append(len(tokens))
                places.extend((number, offset, line_number))
        if not places:
            raise UserError(
                f"{self.files[0]}: "
                + (
                    f"none of the {self.dropped} pairs can be learned with max_seq_len {max_seq_len} and "
                    "max_prompt_len "
                    f"{max_prompt_len}; raise max_seq_len or lower max_prompt_len"
                    if self.dropped
                    else "the file is empty; JSON lines with src, tgt, response and sort are expected"
                )
            )
        self._tokens, self._ends = np.frombuffer(tokens, np.int32), np.frombuffer(ends, np.int64)
        self._places = np.frombuffer(places, np.int64).reshape(-1, 3)
        self.lengths = (np.diff(self._ends[::3]) - 1).astype(np.int32)

    def __len__(self):
        return len(self.lengths)

    def pair(self, i):
        """Pair number -> ids (prompt, chosen, rejected), int32."""
        begin, *ends = self._ends[3 * i : 3 * i + 4]
        return tuple(np.split(self._tokens[begin : ends[2]], [ends[0] - begin, ends[1] - begin]))

    def sample(self, i):
        """Pair number -> input_ids, labels, position_ids, rows, replies; int32 [lengths[i]]. See `pair_sample`."""
        return pair_sample(*self.pair(i))

    def record(self, i):
        """Pair number -> its JSON object, read again from the file."""
        return record_at(self.files, self._places[i])


def pair_sample(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> tuple:
    """Ids of one pair -> input_ids, labels, position_ids, rows, replies as one sequence; int32 [n - 1 + a + b].

        prompt p1 .. pn, chosen c1 .. ca, rejected r1 .. rb
        input_ids     p1 .. p(n-1)   pn  c1 .. c(a-1)   pn  r1 .. r(b-1)
        labels        -100 ........  c1  c2 .. ca       r1  r2 .. rb
        position_ids  0 .... n-2     n-1 n .. n+a-2     n-1 n .. n+b-2
        rows          end of pair    end of chosen      end of pair        FlashMask: rows from there on do not see it
        replies       -1             0                  1

    Both replies' first tokens are predicted from the prompt's last one, so each reply has a copy of it that the other
    does not see. So every token sees what it would see in a sequence of prompt and one reply, at the same positions."""
    n, a, b = len(prompt) - 1, len(chosen), len(rejected)
    input_ids = np.concatenate([prompt, chosen[:-1], prompt[-1:], rejected[:-1]]).astype(np.int32)
    labels = np.concatenate([np.full(n, IGNORED), chosen, rejected]).astype(np.int32)
    position_ids = np.concatenate([np.arange(n), n + np.arange(a), n + np.arange(b)]).astype(np.int32)
    rows = np.repeat(np.array([n + a + b, n + a, n + a + b], np.int32), [n, a, b])
    return input_ids, labels, position_ids, rows, np.repeat(np.array([-1, 0, 1], np.int32), [n, a, b])


def collate_pairs(rows: list, sample: Callable, width: int, pad_token_id: int) -> dict:
    """Pair numbers of each row, sample(i) as `pair_sample` -> the batch described at the top, T = width."""
    B = len(rows)
    batch = {
        "input_ids": np.full((B, width), pad_token_id, np.int64),
        "labels": np.full((B, width), IGNORED, np.int64),
        "position_ids": np.zeros((B, width), np.int64),
        "reply_ids": np.full((B, width), -1, np.int64),
        "startend_row_indices": np.full((B, 1, width, 1), width, np.int32),
        "sample_ids": [[int(i) for i in row] for row in rows],
        "tokens": 0,
    }
    reply_tokens = []
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            ids, labels, positions, mask_rows, replies = sample(i)
            here = np.s_[b, start : start + len(ids)]
            batch["input_ids"][here], batch["labels"][here], batch["position_ids"][here] = ids, labels, positions
            batch["startend_row_indices"][b, 0, start : start + len(ids), 0] = start + mask_rows
            batch["reply_ids"][here] = np.where(replies < 0, -1, 2 * len(reply_tokens) + replies)
            reply_tokens.append([int((replies == side).sum()) for side in (0, 1)])
            start += len(ids)
        batch["tokens"] += start
        batch["position_ids"][b, start:] = np.arange(width - start)  # padding, as in `collate`
    return batch | {"reply_tokens": np.array(reply_tokens, np.int64)}


class PreferenceLoader(SFTLoader):
    """Batches of a PreferenceDataset: several pairs a row of at most max_seq_len (greedy_zero_padding: best fit, else
    in the order of the file), rows padded to the longest of their batch; else as SFTLoader with zero_padding."""

    def __init__(self, dataset: PreferenceDataset, batch_size: int, max_seq_len: int, **options):
        """options: greedy_zero_padding, seed, shuffle, drop_last and pad_token_id of SFTLoader."""
        super().__init__(dataset, batch_size, max_length=max_seq_len, zero_padding=True, **options)
        self.fixed_width = None

    def batch(self, epoch, index):
        """-> the batch described at the top of this file, with reply_ids and reply_tokens."""
        rows = self._epoch_batches(epoch)[index]
        pairs = [self._order[self._bounds[row] : self._bounds[row + 1]].tolist() for row in rows]
        width = self._width(int(self._row_lengths[rows].max()))
        return collate_pairs(pairs, self.dataset.sample, width, self.pad_token_id)


def parse_blend(source: str) -> list[tuple[float, str]]:
    """Folder | prefix | "w1 prefix1 w2 prefix2" -> [(weight, prefix)...], weights summing to 1. A folder's prefixes
    weigh the same, as upstream."""
    source = str(source)
    parts = source.split()
    if Path(source).is_dir():
        names = sorted({str(p)[: -len(end)] for end in (".idx", "_idx.npz") for p in Path(source).glob("*" + end)})
        if not names:
            raise UserError(f"{source}: no *.idx and no *_idx.npz in this folder; `python data.py corpus` writes them")
        pairs = [(1.0, name) for name in names]
    elif len(parts) < 2:
        pairs = [(1.0, source)]
    else:
        try:
            pairs = [(float(weight), prefix) for weight, prefix in zip(parts[::2], parts[1::2], strict=True)]
        except ValueError:
            raise UserError(f"{source!r}: no such folder, and not 'weight prefix weight prefix ...' either") from None
    if any(not 0 < weight < float("inf") for weight, _ in pairs):
        raise UserError(f"{source!r}: every weight must be a positive number")
    total = sum(weight for weight, _ in pairs)
    return [(weight / total, prefix) for weight, prefix in pairs]


def split_documents(split: str, count: int, which: str) -> tuple[int, int]:
    """Shares like "949,50,1" -> (first, last + 1) document of `which` (train | valid | test), by cumulated shares."""
    try:
        shares = [float(share) for share in re.split("[,/]", split)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"split {split!r}: up to three shares are expected: train,valid,test as in '949,50,1'")
    edges = np.concatenate([[0], np.cumsum(shares + [0.0] * (3 - len(shares)))]) / sum(shares)
    edges = np.round(edges * count).astype(np.int64)
    part = ("train", "valid", "test").index(which)
    return int(edges[part]), int(edges[part + 1])


def interleave(sizes: list[int], weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """(corpus of each sample of a blend, its number there). Sample j of a corpus of weight w is due at (j + 1/2) / w:
    sorted by time, every stretch has the blend's weights, and a longer run begins as a shorter one does."""
    due = np.concatenate([(np.arange(n) + 0.5) / weight for n, weight in zip(sizes, weights)])
    order = np.argsort(due, kind="stable")
    return np.repeat(np.arange(len(sizes)), sizes)[order], np.concatenate([np.arange(n) for n in sizes])[order]


class CorpusSamples:
    """Samples of seq_length + 1 tokens from the documents first..last of a corpus, laid end to end in an order shuffled
    anew for each pass.

    Sample k covers tokens k * seq_length ... (k + 1) * seq_length of that stream (one shared, as it is a target first
    and an input then); the samples of a pass come in shuffled order too, so nothing is seen twice before everything is
    seen once. More samples extend the order. num_samples None: one pass, the last sample padded."""

    def __init__(self, corpus, first, last, num_samples, seq_length, seed, shuffle, eos_token_id):
        sizes = np.diff(corpus.bounds[first : last + 1])
        total = int(sizes.sum())
        self.tokens, self.seq_length, self.eos_token_id = corpus.tokens, seq_length, eos_token_id
        self.num_samples = -(-(total - 1) // seq_length) if num_samples is None else num_samples
        edges = [0, self.num_samples]  # the passes' first samples; each pass is shuffled whole, whatever is used of it
        if num_samples is not None:
            count = num_samples * seq_length // total + 1
            edges = -(-np.arange(count + 1) * total // seq_length)
        passes = 1 if num_samples is None else -(-(int(edges[-1]) * seq_length + 1) // total)
        numbers = [epoch_order(len(sizes), seed, e) if shuffle else np.arange(len(sizes)) for e in range(passes)]
        order = np.concatenate(numbers)
        self.starts = corpus.bounds[first:last][order]  # (passes * documents,) where each document of the stream lies
        self.stream = np.concatenate([[0], np.cumsum(sizes[order])])  # (passes * documents + 1,) and in the stream
        orders = []
        for e, (a, b) in enumerate(zip(edges[:-1], edges[1:])):
            order = epoch_order(b - a, seed + 1, e) if shuffle else np.arange(b - a)
            last = order == b - a - 1  # it reaches into the next pass, so it comes when all else was seen
            orders.append(a + np.concatenate([order[~last], order[last]]))
        self.order = np.concatenate(orders)[: self.num_samples]

    def sample(self, index):
        """-> tokens (int64), number of the document in the stream (-1: padding), whether real; [seq_length + 1]."""
        where = int(self.order[index]) * self.seq_length + np.arange(self.seq_length + 1)
        real = where < self.stream[-1]
        where = np.minimum(where, self.stream[-1] - 1)
        document = np.searchsorted(self.stream, where, side="right") - 1
        tokens = self.tokens[self.starts[document] + where - self.stream[document]].astype(np.int64)
        return np.where(real, tokens, self.eos_token_id or 0), np.where(real, document, -1), real


class CorpusLoader:
    """Batches of [B, seq_length] over a folder of corpora, one prefix or a weighted blend; batch(epoch, index) as in
    SFTLoader.

    which: "train" | "valid" | "test" by documents. num_samples: how many samples an epoch has (a training run asks for
    all it will use, as one epoch; data shorter than that are passed over again, reshuffled); None: one pass over
    everything, the tail padded with eos and not learned. mask_across_documents: positions restart and attention ends at
    each document's end, and the last token of a document is not asked to predict the first of the next. UserError:
    nothing there, damaged index, a split without documents."""

    def __init__(
        self,
        source,
        split,
        which,
        num_samples,
        seq_length,
        batch_size,
        seed=0,
        eos_token_id=None,
        mask_across_documents=False,
        shuffle=True,
    ):
        self.batch_size, self.seq_length, self.mask_across_documents = batch_size, seq_length, mask_across_documents
        self.args = (seq_length, shuffle, eos_token_id, seed)
        self.parts, blend = [], parse_blend(source)
        for weight, prefix in blend:
            corpus = Corpus(prefix)
            documents = len(corpus.bounds) - 1
            first, last = split_documents(split, documents, which)
            if corpus.bounds[last] - corpus.bounds[first] < 2:
                raise UserError(
                    f"{prefix}: split {split!r} leaves no text for {which!r}: {last - first} of "
                    f"{documents} documents; change the split"
                )
            self.parts.append((weight, corpus, first, last))
        weights = [weight for weight, _ in blend]
        if num_samples is None:
            sizes = [-(-(int(c.bounds[b] - c.bounds[a]) - 1) // seq_length) for _, c, a, b in self.parts]
            self.counts, self.num_samples, weights = [None] * len(blend), sum(sizes), [max(1, n) for n in sizes]
        else:
            self.num_samples, sizes = num_samples, [int(weight * num_samples) + len(blend) + 1 for weight in weights]
        self._corpus_of, self._number_of = (row[: self.num_samples] for row in interleave(sizes, weights))
        if num_samples is not None:
            self.counts = np.bincount(self._corpus_of, minlength=len(blend)).tolist()
        self.batches_per_epoch = -(-self.num_samples // batch_size)
        self._epoch = None

    def _epoch_samples(self, epoch):
        """Sets the CorpusSamples of each corpus; kept as in SFTLoader."""
        if self._epoch != epoch:
            seq_length, shuffle, eos_token_id, seed = self.args
            self._samples = [
                CorpusSamples(corpus, first, last, count, seq_length, seed + 7919 * epoch, shuffle, eos_token_id)
                if count != 0
                else None
                for (_, corpus, first, last), count in zip(self.parts, self.counts)
            ]
            self._epoch = epoch

    def batch(self, epoch, index):
        """-> the batch described at the top of this file; the last one of an epoch may be short."""
        self._epoch_samples(epoch)
        chosen = range(index * self.batch_size, min((index + 1) * self.batch_size, self.num_samples))
        assert len(chosen), (index, self.batches_per_epoch)
        B, T = len(chosen), self.seq_length
        batch = {key: np.empty((B, T), np.int64) for key in ("input_ids", "labels", "position_ids")}
        batch |= {"startend_row_indices": np.empty((B, 1, T, 1), np.int32)}
        batch |= {"sample_ids": [[i] for i in chosen], "tokens": 0}
        for b, i in enumerate(chosen):
            tokens, document, real = self._samples[self._corpus_of[i]].sample(self._number_of[i])
            if not self.mask_across_documents:
                document = np.where(real, 0, -1)
            same = document[1:] == document[:-1]  # is position t's target of t's own document?
            begins = np.flatnonzero(np.concatenate([[True], ~same[:-1]]))  # positions at which a segment starts
            ends = np.append(begins[1:], T)
            batch["input_ids"][b] = tokens[:-1]
            batch["tokens"] += int(real[:-1].sum())
            batch["labels"][b] = np.where(same & real[1:], tokens[1:], IGNORED)
            batch["position_ids"][b] = np.arange(T) - np.repeat(begins, ends - begins)
            batch["startend_row_indices"][b, 0, :, 0] = np.repeat(ends, ends - begins)
        return batch


# ============================== python data.py corpus ==============================


def read_documents(path: str | Path) -> Iterator[list]:
    """Yields chunks, lists of (line number, bytes) of about a megabyte: JSON lines, or the paragraphs of a .txt."""
    chunk, size, paragraph, begin = [], 0, [], 1
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if path.suffix == ".txt":
                if line.strip():
                    begin = begin if paragraph else number
                    paragraph.append(line)
                    continue
                line, paragraph, number = b"".join(paragraph), [], begin
            if line.strip():
                chunk.append((number, line))
                size += len(line)
            if size > 1 << 20 or len(chunk) >= 1024:
                yield chunk
                chunk, size = [], 0
    chunk += [(begin, b"".join(paragraph))] if paragraph else []
    if chunk:
        yield chunk


@lru_cache(maxsize=1)
def cached_tokenizer(path: str | Path) -> Tokenizer:
    """A worker process loads its tokenizer once."""
    return load_tokenizer(path)


def encode_documents(
    chunk: list, path: str | Path, tokenizer_path: str, json_key: str, append_eos: bool, dtype: type
) -> tuple[bytes, array]:
    """Chunks of read_documents -> (tokens as bytes, tokens per document). Runs in a worker. UserError names
    file:line."""
    tokenizer, tokens, sizes = cached_tokenizer(tokenizer_path), [], array("i")
    for number, raw in chunk:
        if path.suffix == ".txt":
            try:
                text = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number + raw[: error.start].count(10)}: not UTF-8: {error.reason}") from None
        else:
            record = parse_json_line(raw, path, number)
            text = record.get(json_key)
            if not isinstance(text, str):
                raise UserError(f"{path}:{number}: key {json_key!r} must be there and a string; found {brief(record)}")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids:  # an empty text is no document
            ids += [tokenizer.eos_token_id] if append_eos else []
            tokens.append(np.array(ids, dtype).tobytes())
            sizes.append(len(ids))
    return b"".join(tokens), sizes


def ordered_map(executor: ProcessPoolExecutor, function: Callable, chunks: Iterator, window: int) -> Iterator:
    """Like executor.map, but never more than `window` chunks ahead of the reader: the corpus is not in memory."""
    waiting = deque()
    for chunk in chunks:
        waiting.append((chunk, executor.submit(function, chunk)))
        if len(waiting) >= window:
            done, result = waiting.popleft()
            yield done, result.result()
    while waiting:
        done, result = waiting.popleft()
        yield done, result.result()


def _write_corpus(results, files, path, dtype):
    """(chunk, (tokens as bytes, tokens per document)) of `path` -> both files, flushed to disk; tokens per document."""
    from tqdm import tqdm

    sizes = array("i")
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="tokenizing")
    with open(files[".bin"], "wb") as stream, bar:
        for chunk, (tokens, counts) in results:
            stream.write(tokens)
            sizes.extend(counts)
            bar.update(sum(len(raw) for _, raw in chunk))
        stream.flush()
        os.fsync(stream.fileno())
    if not sizes:
        raise UserError(f"{path}: no text in it")
    with open(files[".idx"], "wb") as stream:
        stream.write(index_bytes(dtype, sizes))
        stream.flush()
        os.fsync(stream.fileno())
    return sizes


def build_corpus(
    path: str | Path,
    tokenizer_path: str,
    output: str,
    workers: int = 1,
    json_key: str = "text",
    append_eos: bool = True,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Text -> output.bin and output.idx; documents in input order whatever `workers` is. -> (documents, tokens).

    Written under temporary names, flushed to disk, then renamed, the index last: a prefix with an index is complete.
    uint16 when the vocabulary is smaller than 65,535, else int32. UserError: missing or empty input, a bad line
    (file:line), an output that is there already."""
    path, output = Path(path), str(output)
    names = {end: Path(output + end) for end in (".bin", ".idx")}
    if not path.is_file():
        raise UserError(f"{path}: no such file; a .jsonl or .txt is expected")
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; .jsonl or .txt is expected")
    if not overwrite and (found := [str(name) for name in names.values() if name.exists()]):
        raise UserError(f"{' and '.join(found)}: already there; give another --output, or --overwrite true")
    tokenizer = cached_tokenizer(str(tokenizer_path))
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer_path}: the tokenizer has no eos token to append; give --append_eos false")
    dtype = np.uint16 if tokenizer.vocab_size < 65535 else np.int32
    encode = partial(
        encode_documents,
        path=path,
        tokenizer_path=str(tokenizer_path),
        json_key=json_key,
        append_eos=append_eos,
        dtype=dtype,
    )
    names[".bin"].parent.mkdir(parents=True, exist_ok=True)
    temporary = {end: Path(f"{output}{end}.tmp-{os.getpid()}") for end in names}
    # spawn: a fork of a process that has threads (tqdm's, the caller's) may hang
    executor = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    try:
        chunks = read_documents(path)
        results = ordered_map(executor, encode, chunks, 2 * workers) if executor else ((c, encode(c)) for c in chunks)
        sizes = _write_corpus(results, temporary, path, dtype)
        names[".idx"].unlink(missing_ok=True)  # with --overwrite: never an old index beside new tokens
        for end in (".bin", ".idx"):
            os.replace(temporary[end], names[end])
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)
        for name in temporary.values():
            name.unlink(missing_ok=True)
    return len(sizes), int(np.sum(np.frombuffer(sizes, np.int32), dtype=np.int64))


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line."""

    def error(self, message):
        raise UserError(f"{message}; see `python data.py corpus --help`")


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 after a user's error, 130 after Ctrl-C."""
    parser = OneLineParser(prog="data.py", description="Turn text into the token files that pretrain.py reads.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("corpus", help="text -> PREFIX.bin and PREFIX.idx")
    command.add_argument("corpus", help=".jsonl (a JSON object a line) or .txt (a document per paragraph)")
    command.add_argument("--tokenizer", required=True, help="folder with a tokenizer's files")
    command.add_argument("--output", required=True, help="prefix of the files to write")
    command.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    command.add_argument("--json_key", default="text", help="key of the text in each JSON object")
    command.add_argument("--append_eos", type=parse_bool, default=True, help="end each document with eos")
    command.add_argument("--overwrite", type=parse_bool, default=False, help="replace files that are there already")
    try:
        args = parser.parse_args(argv)
        if args.workers < 1:
            raise UserError(f"--workers {args.workers}: at least 1 is expected")
        documents, tokens = build_corpus(
            args.corpus, args.tokenizer, args.output, args.workers, args.json_key, args.append_eos, args.overwrite
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.output}: {error.strerror}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(f"error: --workers {args.workers}: a worker was killed (out of memory?); use fewer", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{args.output}.bin, {args.output}.idx: {documents:,} documents, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
