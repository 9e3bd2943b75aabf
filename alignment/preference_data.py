"""Single replies that are good or bad, for KTO: records -> batches. Pairs are in data.py.

    dataset = UnpairedDataset(path, tokenizer, max_seq_len, max_prompt_len)
    batch = UnpairedLoader(dataset, batch_size, max_seq_len, ...).batch(epoch, index)

A batch is that of data.py with one reply a sample (reply_ids 0 … N - 1, reply_tokens (N, 1)), and
    desirable     float64 [N]   1 for a good reply, 0 for a bad one
    mismatched    a batch of the same prompts, each with the reply of another sample: see mismatched_replies()
    column        0, in `mismatched` 1: where the reference's log-probability is in alignment/preference.py's table
"""

import numpy as np

from data import PreferenceDataset, PreferenceLoader, collate_pairs, longest_text, reply_sample, truncate_pair
from formats.files import UserError
from formats.records import parse_unpaired


class UnpairedDataset(PreferenceDataset):
    """Tokenized replies, each good or bad; a record of a pair is two of them. Truncation: data.truncate_pair of each.

    A reply that cannot be learned (no room for it, no prompt) is dropped. UserError: as PreferenceDataset, and if all
    prompts are the same, so that there are no mismatched replies.
    """

    PARTS = 4  # lists of a record: prompt and good reply, prompt and bad reply; [] where there is none

    def __init__(self, path, tokenizer, max_seq_len: int = 4096, max_prompt_len: int = 2048, *options):
        super().__init__(path, tokenizer, max_seq_len, max_prompt_len, *options)
        sizes = np.diff(self._ends).reshape(-1, 2, 2)[self.numbers]  # (records, sides, prompt and reply)
        records, self.sides = np.nonzero(sizes[:, :, 1])
        self.numbers = self.numbers[records]
        self.partners = mismatched_replies([self.reply(i)[0].tobytes() for i in range(len(self.numbers))])
        if self.partners is None:
            raise UserError(f"{self.files[0]}: all prompts are the same; KTO needs replies to other prompts")
        prompts, replies = sizes[records, self.sides].T
        longer = np.minimum(np.maximum(replies, replies[self.partners]), max_seq_len + 1 - prompts)
        self.lengths = (prompts - 1 + longer).astype(np.int32)

    def _encode(self, record, where):
        pair, lists = parse_unpaired(record, where), []
        for side in ({"rejected": None}, {"chosen": None}):
            single = pair._replace(**side)
            if single.chosen is None and single.rejected is None:
                lists += [[], []]
                continue
            prompt, *replies = truncate_pair(self.tokenizer, single, self.max_seq_len, self.max_prompt_len, where)
            if not prompt:
                return "no prompt"
            if not any(replies):
                return "no room for the reply within max_seq_len"
            lists += [prompt, replies[0] or replies[1]]
        return lists

    def reply(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample number -> ids (prompt, reply), int32."""
        first = 4 * self.numbers[i] + 2 * self.sides[i]
        begin, middle, end = self._ends[first : first + 3]
        return self._tokens[begin:middle], self._tokens[middle:end]

    def sample(self, i: int, mismatched: bool = False) -> tuple[np.ndarray, ...]:
        """Sample number -> input_ids, labels, position_ids, rows, replies; int32. mismatched: the prompt with the reply
        of its partner, whose end is cut where both are too long."""
        prompt, reply = self.reply(i)
        if mismatched:
            reply = self.reply(self.partners[i])[1][: self.max_seq_len + 1 - len(prompt)]
        return reply_sample(prompt, reply)

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """reply(), by the name that scripts take a prompt from."""
        return self.reply(i)

    def prompt_text(self, i: int) -> str:
        """Sample number -> the text of its last prompt, for a person."""
        pair = parse_unpaired(self.reader.rename(self.record(i)), self.where(i))
        return longest_text(pair.prompt)


def mismatched_replies(prompts: list[bytes]) -> np.ndarray | None:
    """(N,) for each sample the nearest one before it, in a circle, that has another prompt; None if none has.

    In KTO's and TRL's code a batch's replies move on by one place. Here the partner is the same in every epoch, so that
    the reference is computed once, and it never answers the same prompt, as the replies of a pair do.
    """
    count = len(prompts)
    partners = np.full(count, -1)
    for i in [*range(count), *range(count)]:  # twice: the first ones' partners are at the end
        before = (i - 1) % count
        partners[i] = before if prompts[i] != prompts[before] else partners[before]
    return None if (partners < 0).any() else partners


class UnpairedLoader(PreferenceLoader):
    """Batches of an UnpairedDataset, as PreferenceLoader makes them of pairs."""

    def batch(self, epoch: int, index: int) -> dict:
        """-> the batch described at the top of this file."""
        samples, batches = self.sample_ids(epoch, index), []
        for mismatched in (False, True):
            found = {i: self.dataset.sample(i, mismatched) for row in samples for i in row}
            width = self._width(max(sum(len(found[i][0]) for i in row) for row in samples))
            batches.append(collate_pairs(samples, found.__getitem__, width, self.pad_token_id, sides=1))
        desirable = 1.0 - self.dataset.sides[[i for row in samples for i in row]]
        return {**batches[0], "column": 0, "desirable": desirable, "mismatched": {**batches[1], "column": 1}}
