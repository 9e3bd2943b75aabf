"""Speculative decoding: the next tokens are guessed cheaply, and the model checks all of them in one step.

    speculator = NgramSpeculator(max_draft_tokens=5, max_ngram_size=3)
    drafts = speculator.propose(sequences, limits)      # for each sequence at most limits[i] ids that may come next

The engine computes a sequence's last token and its draft as so many sequences of one token each, over the same blocks:
row i sees the tokens before it, so its logits are those of plain decoding. It then chooses tokens row by row, each with
its own random number, and goes on while the choice is what was drafted (Leviathan et al., arXiv 2211.17192, with the
draw fixed beforehand). The reply is the one without speculation; a rejected token costs its row. Its keys and values
stay in the block until the next step writes over them, and no hash is taken of them.

NgramSpeculator    what followed the same last tokens earlier in prompt and reply (Saxena, "prompt lookup decoding")
DraftSpeculator    a smaller model with the same vocabulary, with caches of its own in blocks of the same numbers
"""

import kernels

from formats.files import UserError
from model import CausalLM
from serving.fused import fastest_runner
from serving.runners import ScheduledTokens, TokenSequence

METHODS = {"ngram": "ngram", "inference_with_reference": "ngram", "draft_model": "draft_model"}  # `speculate_method`


class NgramSpeculator:
    """Draft: the tokens behind the latest place where the last n tokens, n as large as possible, stood before."""

    def __init__(self, max_draft_tokens: int, max_ngram_size: int):
        self.max_draft_tokens = max_draft_tokens
        self.sizes = range(max_ngram_size, min(2, max_ngram_size) - 1, -1)  # one token alone is a poor guide
        self.places = {}  # sequence -> (tokens that are indexed, {n-gram: index of the token behind it})

    def check_vocabulary(self, vocab_size: int) -> None:
        """Nothing to do: the drafts are of the text."""

    def propose(self, sequences: list[TokenSequence], limits: list[int]) -> list[list[int]]:
        return [self._draft(sequence, limit) if limit > 0 else [] for sequence, limit in zip(sequences, limits)]

    def _draft(self, sequence, limit):
        tokens, length = sequence.tokens, len(sequence.tokens)
        indexed, places = self.places.get(sequence, (0, {}))
        for end in range(max(indexed, 1), length):  # n-grams that end before `end`, where a token follows
            for size in self.sizes:
                if size <= end:
                    places[tuple(tokens[end - size : end])] = end
        self.places[sequence] = length, places
        for size in self.sizes:
            at = places.get(tuple(tokens[length - size :])) if size < length else None
            if at is not None:
                draft = tokens[at : at + limit]
                while len(draft) < limit:  # the text repeats itself: so does the draft
                    draft += draft[: limit - len(draft)]
                return draft if -1 not in draft else []
        return []

    def computed(self, scheduled: list[ScheduledTokens]) -> None:
        """Nothing to do: there are no keys and values."""

    def release(self, sequence: TokenSequence) -> None:
        """Forget a sequence; an unknown one is no error."""
        self.places.pop(sequence, None)


class DraftSpeculator:
    """Draft: what a smaller model chooses, with the sequence's own random numbers.

    Its keys and values are in a pool of as many blocks, under the numbers of the sequence's own blocks. So prompts that
    share blocks share them here as well. A draft's keys and values may be missing where a request ended early; then the
    guess is worse, the reply is not.
    """

    def __init__(
        self, model: CausalLM, max_draft_tokens: int, num_blocks: int, block_size: int, dtype: str = "float32"
    ):
        self.max_draft_tokens = max_draft_tokens
        self.runner = fastest_runner(model, num_blocks, block_size, None, False, dtype)
        if not self.runner.chunked_prefill or self.runner.num_virtual_tokens:
            what = "a trained prefix" if self.runner.num_virtual_tokens else "prompts that see themselves both ways"
            raise UserError(f"draft_model_name_or_path: a model with {what} cannot draft")
        self.fed = {}  # sequence -> (tokens whose keys and values are in the blocks, the drafted ones at their end)

    def check_vocabulary(self, vocab_size: int) -> None:
        """UserError where the model has another number of ids."""
        if self.runner.vocab_size != vocab_size:
            raise UserError(
                f"draft_model_name_or_path: its vocabulary has {self.runner.vocab_size} ids, the model's {vocab_size}; "
                "they must be the same"
            )

    def propose(self, sequences: list[TokenSequence], limits: list[int]) -> list[list[int]]:
        """The blocks of the sequences have room for limits[i] - 1 more tokens."""
        limits = [min(limit, self.runner.max_positions - len(s.tokens)) for s, limit in zip(sequences, limits)]
        drafts, active, rows = [[] for _ in sequences], [], []
        for i, (sequence, limit) in enumerate(zip(sequences, limits)):
            if limit > 0 and sequence in self.fed:
                view = _plain(sequence, list(sequence.tokens))
                start = self._valid(sequence)
                active.append((i, view))
                rows.append(ScheduledTokens(view, start, len(view.tokens) - start))
        while active:
            chosen = self._choose([sequences[i].sampler for i, _ in active], [len(drafts[i]) for i, _ in active], rows)
            for (i, view), token in zip(active, chosen):
                drafts[i].append(token)
                view.tokens.append(token)
            active = [(i, view) for i, view in active if len(drafts[i]) < limits[i]]
            rows = [ScheduledTokens(view, len(view.tokens) - 1, 1) for _, view in active]
        for sequence, draft in zip(sequences, drafts):
            if draft:
                self.fed[sequence] = len(sequence.tokens) + len(draft) - 1, draft[:-1]
        return drafts

    def _choose(self, samplers, ahead, rows):
        """The ids that the draft model chooses after these rows; ahead: tokens already drafted of each."""
        options = [
            (0.0, 0, 1.0, 0.0) if s.greedy else (s.params.temperature, s.params.top_k, s.params.top_p, s.peek(n))
            for s, n in zip(samplers, ahead)
        ]
        logits = self.runner.run(rows)
        ids = kernels.sample(kernels.to_tensor(logits, share=True), *zip(*options)).tolist()
        return [max(token, 0) for token in ids]  # -1: the logits are not finite

    def _valid(self, sequence):
        """How many of the sequence's tokens have their keys and values in the blocks; the last one has none."""
        fed, draft = self.fed[sequence]
        first = fed - len(draft)
        for i, token in enumerate(draft):
            if first + i >= len(sequence.tokens) - 1 or sequence.tokens[first + i] != token:
                return first + i
        return min(fed, len(sequence.tokens) - 1)

    def computed(self, scheduled: list[ScheduledTokens]) -> None:
        """Compute the pieces of prompts that the model computes in this step."""
        rows = []
        for sequence, start, count in scheduled:
            if start + count <= self.runner.max_positions:
                rows.append(ScheduledTokens(_plain(sequence), start, count))
                self.fed[sequence] = start + count, []
        if rows:
            self.runner.run(rows)

    def release(self, sequence: TokenSequence) -> None:
        """Forget a sequence; an unknown one is no error."""
        self.fed.pop(sequence, None)


def _plain(sequence, tokens=None):
    """What the draft model knows of a sequence: no adapter."""
    return TokenSequence(tokens or sequence.tokens, sequence.num_prompt_tokens, sequence.blocks)


def rows_of(
    scheduled: list[ScheduledTokens], drafts: dict[TokenSequence, list[int]]
) -> tuple[list[ScheduledTokens], list[int]]:
    """What the runner computes, and which of its rows is the first whose logits count, for each of `scheduled`.

    A sequence with a draft becomes 1 + len(draft) sequences of one token. So do the tokens of a reply that are computed
    again after a preemption, if the request has a seed: one by one is how they were computed the first time.
    """
    rows, first = [], []
    for tokens in scheduled:
        sequence, start, count = tokens
        draft, again = drafts.get(sequence, ()), start + count - max(start, sequence.num_prompt_tokens)
        if draft:
            all_tokens = [*sequence.tokens, *draft]
            s = sequence
            view = TokenSequence(all_tokens, s.num_prompt_tokens, s.blocks, s.adapter, s.is_seeded)
            first.append(len(rows))
            rows += [ScheduledTokens(view, start + i, 1) for i in range(1 + len(draft))]
        elif count > 1 and again > 0 and sequence.is_seeded:
            if count > again:
                rows.append(ScheduledTokens(sequence, start, count - again))
            rows += [ScheduledTokens(sequence, start + i, 1) for i in range(count - again, count)]
            first.append(len(rows) - 1)
        else:
            first.append(len(rows))
            rows.append(tokens)
    return rows, first


def make_speculator(
    method: str,
    max_draft_tokens: int,
    max_ngram_size: int,
    draft_model: CausalLM | None = None,
    **pool: object,
) -> NgramSpeculator | DraftSpeculator:
    """method: a key of METHODS; pool: num_blocks, block_size and dtype, for a draft model."""
    if METHODS[method] == "ngram":
        return NgramSpeculator(max_draft_tokens, max_ngram_size)
    return DraftSpeculator(draft_model, max_draft_tokens, **pool)
