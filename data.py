"""From a file on disk to a batch of numpy arrays: records, pairs, packing, corpora. Never imports paddle.

    python data.py show my_data/train.json --tokenizer demo/llama          # records as the model will see them
    python data.py corpus corpus.jsonl --tokenizer demo/llama --output data/corpus --workers 2

`corpus` turns text into Megatron's `.bin/.idx`, which pretrain.py reads by memory map. By import:

    tokenizer = load_tokenizer(folder)                  sentencepiece, byte pairs; special tokens, chat template
    dataset = SFTDataset(path, tokenizer, src_length, max_length)         conversations -> one flat int32 array
    loader = SFTLoader(dataset, batch_size, max_length, ...)              .batch(epoch, index) -> dict of arrays
    dataset = PreferenceDataset(path, tokenizer, max_seq_len, ...)        pairs of replies, one better than the other
    loader = PreferenceLoader(dataset, batch_size, max_seq_len, ...)      the same, several pairs a row
    loader = CorpusLoader(prefix, "949,50,1", "train", ...)               the same over memory-mapped tokens

Which records and files are read: docs/data.md, formats/records.py, formats/record_files.py.

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
halves of a run changes nothing."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from distributed.record_shares import RecordShare
from formats.chat import encode_conversation, load_chat_template
from formats.files import UserError, readers_may_leave
from formats.megatron import Corpus, build_corpus
from formats.record_files import RecordOptions, RecordReader, blend_records
from formats.records import (
    CONVERSATIONS,
    PAIRS,
    Conversation,
    Pair,
    parse_conversation,
    parse_pair,
    record_format,
    with_place,
)
from formats.rendering import PromptSegment
from formats.tokenizer import Tokenizer, load_tokenizer
from packing import best_fit_packs, epoch_order, in_order_packs

IGNORED = -100  # label of a position that teaches nothing


# ============================== supervised records ==============================


def longest_text(prompt: str | list) -> str:
    """A prompt's text; of several messages the longest one's."""
    return prompt if isinstance(prompt, str) else max((m["content"] for m in prompt), key=len, default="")


def truncate_user_turn(
    tokenizer: Tokenizer, user: str | list, bot: str | dict, context: dict, room: int, history: list = ()
) -> list[int]:
    """Prompt -> ids of its rendered part in at most `room` tokens: its text loses its beginning, the template around
    it stays whole; of several messages the longest text does. history: the rounds before it."""
    longest = text = longest_text(user)
    ids = tokenizer.encode(text, False)
    keep = len(ids)
    while True:
        shorter = (
            text if isinstance(user, str) else [{**m, "content": text} if m["content"] is longest else m for m in user]
        )
        part = tokenizer.encode_chat([*history, (shorter, bot)], context, True)[1][-1][0]
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
    count = 64  # of very many rounds, so many that some do not fit, or all
    while count < len(rounds):
        system, encoded = tokenizer.encode_chat(rounds[-count:], context, True)
        if len(system) + sum(len(user) + len(bot) for user, bot in encoded) > max_length:
            break
        count *= 2
    rounds = rounds[-count:]
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


def encode_plain(tokenizer: Tokenizer, prompt: str, reply: str) -> tuple[list[int], list[int]]:
    """Texts that no template surrounds -> ids (prompt, reply with eos). They are read as one text, as TRL does, but for
    a token across their border: the reply is learned as it would be generated, after the prompt's own ids."""
    segments = [PromptSegment(1, "text", prompt), PromptSegment(2, "text", reply)]
    _, before, after = encode_conversation(tokenizer, segments, 3)
    eos = [] if tokenizer.eos_token_id is None or after[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
    return tokenizer.head + before, after + eos


def cut_plain(tokenizer: Tokenizer, ids: list[int], room: int) -> list[int]:
    """Ids of a prompt of encode_plain -> its last `room`, with what the tokenizer puts before every text."""
    head = len(tokenizer.head)
    return ids if len(ids) <= room else ids[:head] + ids[len(ids) - max(0, room - head) :]


class TokenizedRecords:
    """Ids of records in one int32 array: a million records of 100 tokens are 400 MB, and never Python lists. A record's
    own JSON is read again from its file when asked for.

    Sample i is record numbers[i] of those that are kept: the same, unless a blend gives a record twice or not at all.
    Records that teach nothing are dropped: why_dropped counts them by reason, dropped is their number. not_learned:
    replies that the chat template shows otherwise in training than when they are served, so that they teach nothing."""

    not_learned = 0

    def _read(self, reader: RecordReader, encode: Callable, parts: int, nothing_left: str) -> None:
        """encode(record, where) -> the record as lists of ids, so many as `parts`, or the reason to drop it."""
        self.reader, self.files, share = reader, reader.files, RecordShare.of_run()
        for number, (place, where, record) in enumerate(reader):
            if share.has(number):
                try:
                    share.add(number, place, encode(record, where))
                except UserError as error:
                    raise with_place(error, where) from None
        share.not_learned = self.not_learned
        share.exchange(parts)
        self.not_learned, places = share.not_learned, share.places
        self.why_dropped = {reason: count for reason, (count, _) in share.dropped.items()}
        self.dropped, self.replaced = sum(self.why_dropped.values()), reader.replaced
        if not len(places):
            expected = "the file is empty; records are expected, see docs/data.md"
            if reader.options.val_size is not None and not self.dropped:
                side = "dev" if reader.wants_held_out else "train"
                expected = f"val_size {reader.options.val_size:g} leaves no {side} record; equal records stay together"
            if self.dropped and any(" within max_" in reason for reason in self.why_dropped):
                expected = nothing_left.format(self.dropped)
            elif self.dropped:  # whatever the lengths
                expected = f"none of the {self.dropped} records can be learned: {', '.join(self.why_dropped)}"
            raise UserError(f"{self.files[0]}: {expected}")
        # places: file number, byte offset, line number
        self._tokens, self._places = share.tokens, places.reshape(-1, 3)
        self._ends = np.concatenate([[0], np.cumsum(share.sizes)])
        sizes = np.bincount(reader.source_of_file[self._places[:, 0]], minlength=len(reader.weights))
        self.numbers = blend_records(sizes.tolist(), reader.weights)
        self.lengths = (np.diff(self._ends[::parts])[self.numbers] - 1).astype(np.int32)  # positions: tokens less one

    def __len__(self):
        return len(self.lengths)

    def record(self, i):
        """Sample number -> its record, read again, as the file has it."""
        return self.reader.record(self._places[self.numbers[i]])

    def where(self, i):
        """Sample number -> "file:line"."""
        number, _, line = self._places[self.numbers[i]]
        return f"{self.files[number]}:{line}"


class SFTDataset(TokenizedRecords):
    """Tokenized conversations: of a file, a folder with {split}.json, several of them, or a blend.

    Ids of learned tokens are kept as they are and all others as ~id (negative), so prompt and reply are told apart
    without a second array. Truncation: `truncate_templated`, `truncate_plain`. A record without a learned token left is
    dropped. autoregressive: prompts are learned too. UserError: missing or empty file, a bad record (file:line),
    nothing left to learn in any record."""

    def __init__(
        self,
        paths: str | Path | list,
        tokenizer: Tokenizer,
        src_length: int = 1024,
        max_length: int = 2048,
        split: str = "train",
        autoregressive: bool = False,
        progress: bool = False,
        options: RecordOptions | None = None,
    ):
        self.tokenizer, self.src_length, self.max_length = tokenizer, src_length, max_length
        self.autoregressive = autoregressive
        self.train_on = (options or RecordOptions()).train_on
        nothing_left = (
            f"nothing to learn is left in any of the {{}} records with max_length {max_length} and src_length "
            f"{src_length}; raise max_length or lower src_length"
        )
        self._read(RecordReader(paths, split, options, progress), self._encode, 1, nothing_left)

    def _encode(self, record, where):
        conversation = parse_conversation(record, where)
        if self.train_on == "last":
            *_, last = conversation.learned
            conversation = conversation._replace(learned=[False] * (len(conversation.learned) - 1) + [last])
        if not any(conversation.learned) and not self.autoregressive:
            return "no reply is to be learned"
        flat = self._flatten(conversation)
        return [flat] if any(token >= 0 for token in flat[1:]) else "nothing to learn is left within max_length"

    def _fit(self, rounds, context):
        fit = truncate_plain if self.tokenizer.chat_template is None else truncate_templated
        return fit(self.tokenizer, rounds, context, self.src_length, self.max_length)

    def _flatten(self, conversation: Conversation):
        """-> list of at most max_length tokens, ~id where nothing is learned."""
        if conversation.is_plain:
            user, bot = encode_plain(self.tokenizer, *conversation.rounds[0])
            system, encoded = [], [(cut_plain(self.tokenizer, user, self.src_length), bot)]
        else:
            system, encoded = self._fit(conversation.rounds, conversation.context)
        flat = [~i for i in system]
        for (user, bot), learned in zip(encoded, conversation.learned[-len(encoded) :]):
            flat += [~i for i in user]
            flat += bot if learned else [~i for i in bot]
            self.not_learned += learned and not bot
        flat = flat[: self.max_length]
        return [i if i >= 0 else ~i for i in flat] if self.autoregressive else flat

    def sample(self, i):
        """Sample number -> (input_ids, labels), int32 [lengths[i]]; labels[t] is the target of input_ids[t], -100 where
        nothing is learned."""
        ids, learned = self.tokens(i)
        return ids[:-1], np.where(learned, ids, IGNORED)[1:]

    def tokens(self, i):
        """Sample number -> (all its ids, whether each is learned), [lengths[i] + 1]; the first is never a target."""
        i = self.numbers[i]
        tokens = self._tokens[self._ends[i] : self._ends[i + 1]]
        return np.where(tokens < 0, ~tokens, tokens), tokens >= 0

    def conversation(self, i):
        """Sample number -> its Conversation. Of a plain text the first half is the prompt, the second the reply."""
        found = parse_conversation(self.reader.rename(self.record(i)), self.where(i))
        text = found.rounds[0][1]
        if found.is_plain and not found.rounds[0][0]:
            return found._replace(rounds=[(text[: len(text) // 2], text[len(text) // 2 :])])
        return found

    def prompt_ids(self, i):
        """Sample number -> ids up to the last reply: the rounds that training showed, the last in the query form."""
        return conversation_prompt(self.tokenizer, self.conversation(i), self.src_length, self.max_length)

    def prompt_text(self, i):
        """Sample number -> the text of its last prompt, for a person."""
        rounds = self.conversation(i).rounds
        prompt = rounds[-1][0]
        text = prompt if isinstance(prompt, str) else " | ".join(f"{m['role']}: {m['content']}" for m in prompt)
        return f"(turn {len(rounds)} of {len(rounds)}) {text}" if len(rounds) > 1 else text

    def reference(self, i):
        """Sample number -> text of its last reply."""
        reply = self.conversation(i).rounds[-1][1]
        return reply if isinstance(reply, str) else reply["content"]


def conversation_prompt(
    tokenizer: Tokenizer, conversation: Conversation, src_length: int, max_length: int
) -> list[int]:
    """Ids up to the last reply of a conversation, which is to be written; see truncate_prompt."""
    if conversation.is_plain:
        return cut_plain(tokenizer, tokenizer.encode(conversation.rounds[0][0]), src_length)
    return truncate_prompt(tokenizer, conversation.rounds, conversation.context, src_length, max_length)


# ============================== batches of records ==============================


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


def encode_pair(tokenizer: Tokenizer, pair: Pair, history: list, where: str) -> tuple[list, list, list, list]:
    """Pair after these rounds -> ids: system, [(turn, reply), …] of the rounds, prompt, (chosen, rejected); a reply
    that is None is []."""
    first, replies = None, []
    for reply in (pair.chosen, pair.rejected):
        if reply is None:
            replies.append([])
        elif pair.is_plain:
            prompt, ids = encode_plain(tokenizer, pair.prompt, reply)
            first = first or ([], [], prompt)
            replies.append(ids)
        else:
            system, encoded = tokenizer.encode_chat([*history, (pair.prompt, reply)], pair.context, True)
            first = first or (system, encoded[:-1], encoded[-1][0])
            if encoded[-1][0] != first[2]:
                raise UserError(
                    f"{where}: chat template {tokenizer.chat_template.name!r} puts the reply into the prompt, so that "
                    "two replies cannot share one"
                )
            replies.append(encoded[-1][1])
    return *first, tuple(replies)


def truncate_pair(
    tokenizer: Tokenizer, pair: Pair, max_seq_len: int, max_prompt_len: int, where: str, prompts: int = 1
) -> tuple[list, list, list]:
    """PaddleNLP's truncation of a pair -> ids (prompt, chosen, rejected), which take prompts * (len(prompt) - 1) +
    len(chosen) + len(rejected) <= max_seq_len positions; a reply is [] when there is no room for it.

    If the last turn and both replies do not fit, the prompt (system and last turn) loses its beginning down to
    max_prompt_len; if that is not enough, both replies lose their ends in proportion to their lengths. Earlier turns
    stand before it, from the newest back, while they fit. As in `truncate_templated` a template counts the turns that
    are kept. A reply that is cut has no end mark."""
    history, sides = pair.history, sum(reply is not None for reply in (pair.chosen, pair.rejected))
    while True:
        system, encoded, last, (good, bad) = encode_pair(tokenizer, pair, history, where)
        room = max_seq_len + prompts * (1 - len(system))  # 1: a prompt's last token is counted with the reply
        if prompts * len(last) + len(good) + len(bad) > room:
            if len(system) + len(last) > max_prompt_len:
                prompt_room = max(0, max_prompt_len - len(system))
                reply = pair.rejected if pair.chosen is None else pair.chosen
                last = (
                    cut_plain(tokenizer, last, prompt_room)
                    if pair.is_plain
                    else truncate_user_turn(tokenizer, pair.prompt, reply, pair.context, prompt_room, history)
                )
            left = max(0, room - prompts * len(last))
            if sides == 1:
                good, bad = good[:left], bad[:left]
            elif len(good) + len(bad) > left:
                keep = min(max(1, round(left * len(good) / (len(good) + len(bad)))), left - 1)
                good, bad = (good[:keep], bad[: left - keep]) if left >= 2 else ([], [])
        sizes = [prompts * (len(turn) + len(reply)) for turn, reply in encoded]
        room -= prompts * len(last) + len(good) + len(bad)
        if not history or sum(sizes) <= room:
            return system + [i for turn, reply in encoded for i in turn + reply] + last, good, bad
        fits = int(np.searchsorted(np.cumsum(sizes[::-1]), room, side="right"))
        history = history[len(history) - fits :]


class PreferenceDataset(TokenizedRecords):
    """Tokenized pairs of replies to one prompt: of a file, a folder with {split}.json, several of them, or a blend.

    Prompts and replies lie one after another. Truncation: `truncate_pair`. A pair that cannot be learned (no room for a
    token of each reply, no prompt, the same reply twice) is dropped. UserError: missing or empty file, a bad record
    (file:line), nothing left."""

    PARTS = 3  # lists of a record: prompt, chosen, rejected

    def __init__(
        self,
        path: str | Path | list,
        tokenizer: Tokenizer,
        max_seq_len: int = 4096,
        max_prompt_len: int = 2048,
        split: str = "train",
        progress: bool = False,
        options: RecordOptions | None = None,
        share_within: float = np.inf,
    ):
        """share_within: a pair of more positions has its prompt twice, see `pair_sample`."""
        self.tokenizer, self.max_seq_len, self.max_prompt_len = tokenizer, max_seq_len, max_prompt_len
        self.share_within = share_within
        nothing_left = (
            f"none of the {{}} pairs can be learned with max_seq_len {max_seq_len} and max_prompt_len "
            f"{max_prompt_len}; raise max_seq_len or lower max_prompt_len"
        )
        self._read(RecordReader(path, split, options, progress), self._encode, self.PARTS, nothing_left)
        prompts = np.diff(self._ends)[:: self.PARTS][self.numbers].astype(np.int32)
        self.lengths = self.lengths + np.where(self.lengths > share_within, prompts - 1, 0).astype(np.int32)

    def _encode(self, record, where):
        pair = parse_pair(record, where)
        for prompts in (1, 2):
            limits = self.max_seq_len, self.max_prompt_len, where, prompts
            prompt, chosen, rejected = truncate_pair(self.tokenizer, pair, *limits)
            if len(prompt) - 1 + len(chosen) + len(rejected) <= self.share_within:
                break
        if chosen and chosen == rejected:
            return "the same reply twice"
        if not prompt:
            return "no prompt"
        return [prompt, chosen, rejected] if chosen and rejected else "no room for both replies within max_seq_len"

    def pair(self, i):
        """Sample number -> ids (prompt, chosen, rejected), int32."""
        begin, *ends = self._ends[3 * self.numbers[i] : 3 * self.numbers[i] + 4]
        return tuple(np.split(self._tokens[begin : ends[2]], [ends[0] - begin, ends[1] - begin]))

    def sample(self, i):
        """Sample number -> input_ids, labels, position_ids, rows, replies; int32 [lengths[i]]. See `pair_sample`."""
        return pair_sample(*self.pair(i), self.share_within)

    def prompt_text(self, i):
        """Sample number -> the text of its last prompt, for a person."""
        return longest_text(parse_pair(self.reader.rename(self.record(i)), self.where(i)).prompt)


def reply_sample(prompt: np.ndarray, reply: np.ndarray, side: int = 0) -> tuple:
    """As `pair_sample`, with one reply."""
    n, a = len(prompt) - 1, len(reply)
    labels = np.concatenate([np.full(n, IGNORED), reply]).astype(np.int32)
    rows, replies = np.full(n + a, n + a, np.int32), np.repeat(np.array([-1, side], np.int32), [n, a])
    return (
        np.concatenate([prompt, reply[:-1]]).astype(np.int32),
        labels,
        np.arange(n + a, dtype=np.int32),
        rows,
        replies,
    )


def pair_sample(
    prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, share_within: float = np.inf
) -> tuple[np.ndarray, ...]:
    """Ids of one pair -> input_ids, labels, position_ids, rows, replies as one sequence; int32 [n - 1 + a + b].

        prompt p1 .. pn, chosen c1 .. ca, rejected r1 .. rb
        input_ids     p1 .. p(n-1)   pn  c1 .. c(a-1)   pn  r1 .. r(b-1)
        labels        -100 ........  c1  c2 .. ca       r1  r2 .. rb
        position_ids  0 .... n-2     n-1 n .. n+a-2     n-1 n .. n+b-2
        rows          end of pair    end of chosen      end of pair        FlashMask: rows from there on do not see it
        replies       -1             0                  1

    Both replies' first tokens are predicted from the prompt's last one, so each reply has a copy of it that the other
    does not see. So every token sees what it would see in a sequence of prompt and one reply, at the same positions.
    Where distances in the row count (ALiBi, windows), a pair of more than share_within positions is two sequences."""
    n, a, b = len(prompt) - 1, len(chosen), len(rejected)
    if n + a + b > share_within:
        one, two = reply_sample(prompt, chosen), reply_sample(prompt, rejected, 1)
        two = (*two[:3], two[3] + np.int32(n + a), two[4])
        return tuple(np.concatenate(both) for both in zip(one, two))
    input_ids = np.concatenate([prompt, chosen[:-1], prompt[-1:], rejected[:-1]]).astype(np.int32)
    labels = np.concatenate([np.full(n, IGNORED), chosen, rejected]).astype(np.int32)
    position_ids = np.concatenate([np.arange(n), n + np.arange(a), n + np.arange(b)]).astype(np.int32)
    rows = np.repeat(np.array([n + a + b, n + a, n + a + b], np.int32), [n, a, b])
    return input_ids, labels, position_ids, rows, np.repeat(np.array([-1, 0, 1], np.int32), [n, a, b])


def collate_pairs(rows: list, sample: Callable, width: int, pad_token_id: int, sides: int = 2) -> dict:
    """Pair numbers of each row, sample(i) as `pair_sample` -> the batch described at the top, T = width. sides: 1 for
    single replies."""
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
            batch["reply_ids"][here] = np.where(replies < 0, -1, sides * len(reply_tokens) + replies)
            reply_tokens.append([int((replies == side).sum()) for side in range(sides)])
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
        width = self._width(int(self._row_lengths[self._epoch_batches(epoch)[index]].max()))
        return collate_pairs(self.sample_ids(epoch, index), self.dataset.sample, width, self.pad_token_id)

    def sample_ids(self, epoch, index):
        """Numbers of the pairs of each row of a batch."""
        rows = self._epoch_batches(epoch)[index]
        return [self._order[self._bounds[row] : self._bounds[row + 1]].tolist() for row in rows]


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
    if len(sizes) == 1:
        return np.broadcast_to(np.uint8(0), sizes[0]), range(sizes[0])
    due = np.concatenate([(np.arange(n) + 0.5) / weight for n, weight in zip(sizes, weights)])
    order = np.argsort(due, kind="stable")
    order, kind = order.astype(np.min_scalar_type(len(order))), np.min_scalar_type(max(sizes))
    corpora = np.repeat(np.arange(len(sizes), dtype=np.min_scalar_type(len(sizes))), sizes)[order]
    return corpora, np.concatenate([np.arange(n, dtype=kind) for n in sizes])[order]


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
        self.order = np.empty(self.num_samples, np.min_scalar_type(int(edges[-1])))  # 4 bytes a sample for most runs
        for e, (a, b) in enumerate(zip(edges[:-1], edges[1:])):
            order = epoch_order(b - a, seed + 1, e) if shuffle else np.arange(b - a)
            last = order == b - a - 1  # it reaches into the next pass, so it comes when all else was seen
            used = self.order[a:b]
            used[:] = (a + np.concatenate([order[~last], order[last]]))[: len(used)]

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
            self.counts = (
                np.bincount(self._corpus_of, minlength=len(blend)).tolist() if len(blend) > 1 else [num_samples]
            )
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


# ============================== command line ==============================


def marked_text(tokenizer: Tokenizer, ids: np.ndarray, learned: np.ndarray, color: bool) -> str:
    """Ids -> their text; what is learned is green, or between [[ and ]] without color."""
    begin, end = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    decoder, text, inside = tokenizer.stream_decoder(False), "", False
    for i, is_learned in zip(ids.tolist(), learned.tolist()):
        if is_learned != inside:
            text, inside = text + decoder.flush() + (begin if is_learned else end), is_learned
        text += decoder.push(i)
    return text + decoder.flush() + end * inside


def show_sample(dataset: SFTDataset | PreferenceDataset, i: int, color: bool) -> None:
    """Print a record as the model will see it: where it is, ids, text, which tokens are learned."""
    if isinstance(dataset, PreferenceDataset):
        texts = dict(zip(("prompt", "chosen", "rejected"), dataset.pair(i)))
        parts = [(name, ids, np.full(len(ids), name != "prompt")) for name, ids in texts.items()]
    else:
        ids, flags = dataset.tokens(i)
        parts = [("", ids, flags)]
    row = record_format(dataset.reader.rename(dataset.record(i)), PAIRS if len(parts) > 1 else CONVERSATIONS)
    tokens, learned = (sum(len(ids) for _, ids, _ in parts), sum(int(flags.sum()) for _, _, flags in parts))
    print(f"{dataset.where(i)}: {row.name}, {tokens:,} tokens, {learned:,} learned")
    for name, ids, flags in parts:
        name = name and f"{name} "
        print(f"  {name}ids: {' '.join(map(str, ids.tolist()))}")
        print(f"  {name}text: {marked_text(dataset.tokenizer, ids, flags, color)}")


def show_counts(dataset: SFTDataset | PreferenceDataset) -> None:
    """Print how many records there are, which were dropped and why, and a histogram of their tokens."""
    unit = "pairs" if isinstance(dataset, PreferenceDataset) else "records"
    print(f"\n{len(dataset):,} {unit}, {dataset.dropped:,} dropped")
    for reason, count in dataset.why_dropped.items():
        print(f"  {count:,}: {reason}")
    if dataset.not_learned:
        print(f"{dataset.not_learned:,} replies are shown but not learned: docs/chat.md")
    tokens = dataset.lengths.astype(np.int64) + 1
    print(f"tokens: {tokens.min():,} to {tokens.max():,}, median {np.median(tokens):,.0f}, {tokens.sum():,} in all")
    bins = np.frexp(tokens)[1] - 1  # the power of two below
    for power in range(int(bins.min()), int(bins.max()) + 1):
        count = int((bins == power).sum())
        print(f"{2**power:>9,} - {2 ** (power + 1) - 1:<9,} {count:>9,} {'#' * -(-40 * count // len(bins))}")


def show(args: argparse.Namespace) -> None:
    """`python data.py show`: some records of a file as the model will see them, and counts of all."""
    tokenizer = load_tokenizer(args.tokenizer)
    if args.chat_template is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)
    options = RecordOptions.of(args)
    if args.max_length < 2 or args.n < 0:
        raise UserError(f"--max_length {args.max_length}, -n {args.n}: at least 2 and 0 are expected")
    first = next(iter(RecordReader(args.file, args.split, options)), (None, None, {}))[2]
    if record_format(first, PAIRS):
        dataset = PreferenceDataset(
            args.file, tokenizer, args.max_length, args.src_length or args.max_length // 2, args.split, True, options
        )
    else:
        src_length = args.src_length or min(1024, args.max_length // 2)
        dataset = SFTDataset(
            args.file, tokenizer, src_length, args.max_length, args.split, progress=True, options=options
        )
    for i in range(min(args.n, len(dataset))):
        show_sample(dataset, i, sys.stdout.isatty())
    show_counts(dataset)


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line."""

    def error(self, message):
        raise UserError(f"{message}; see `{self.prog} --help`")


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


def arguments() -> argparse.ArgumentParser:
    """The parser of `python data.py show` and `python data.py corpus`."""
    parser = OneLineParser(prog="python data.py", description="Look at records, or turn text into token files.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="print records as the model will see them, and counts")
    command.add_argument("file", help="a file of records, a folder or a blend, see docs/data.md")
    command.add_argument("--tokenizer", required=True, help="folder with a tokenizer's files")
    command.add_argument("--chat_template", help="a name of formats/chat.py, plain or a file; default: its own")
    command.add_argument("--max_length", type=int, default=2048, help="most tokens of a record, or of a pair")
    command.add_argument("--src_length", type=int, help="most tokens of a prompt that is too long")
    command.add_argument("--split", default="train", help="of a folder: train, dev or test")
    command.add_argument("-n", type=int, default=3, help="records to print")
    for field in dataclasses.fields(RecordOptions):
        kind = {"max_samples": int, "val_size": float}.get(field.name, str)
        command.add_argument(f"--{field.name}", type=kind, default=field.default, help="as in finetune.py")
    command = commands.add_parser("corpus", help="text -> PREFIX.bin and PREFIX.idx, which pretrain.py reads")
    command.add_argument("corpus", help=".jsonl, .json, .csv, .parquet, .txt (a document per paragraph), or a folder")
    command.add_argument("--tokenizer", required=True, help="folder with a tokenizer's files")
    command.add_argument("--output", required=True, help="prefix of the files to write")
    command.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    command.add_argument("--json_key", default="text", help="key of the text in each JSON object")
    command.add_argument("--append_eos", type=parse_bool, default=True, help="end each document with eos")
    command.add_argument("--overwrite", type=parse_bool, default=False, help="replace files that are there already")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 after a user's error, 130 after Ctrl-C."""
    try:
        args = arguments().parse_args(argv)
        if args.command == "show":
            with readers_may_leave():
                show(args)
            return 0
        if args.workers < 1:
            raise UserError(f"--workers {args.workers}: at least 1 is expected")
        documents, tokens = build_corpus(
            args.corpus, args.tokenizer, args.output, args.workers, args.json_key, args.append_eos, args.overwrite
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or getattr(args, 'output', args.command)}: {error.strerror}", file=sys.stderr)
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
