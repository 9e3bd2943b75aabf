"""From logits to tokens: what a request may ask of its sampling, and the choice of the next token for a batch.

    params = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.95, seed=1)
    sampler = Sampler(params, index=0, stop_ids=[2], seed=1)         # one for each reply
    choices = choose_batch([sampler], logits, [token_ids])           # (S, V) float32 -> a Choice for each row

Work is done over the batch, and only what a request asks for. One kernels.sample changes the logits that have
penalties, draws from all rows, and puts the logits back; rows with rules are changed and put back here.

Letters: S sequences, V vocabulary.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import kernels

import numpy as np

from formats.files import UserError
from serving.guide import Guide

# ================================================================================================ what a request asks


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    max_tokens: int = 64  # most new tokens
    min_tokens: int = 0  # before as many new tokens, neither end of sequence nor stop ends the reply
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # tokens less likely than this share of the likeliest one's probability are left out
    repetition_penalty: float = 1.0  # on tokens of prompt and reply (arXiv 1909.05858)
    presence_penalty: float = 0.0  # subtracted from the logit of every token that the reply contains
    frequency_penalty: float = 0.0  # the same, times its number of occurrences
    seed: int | None = None  # the same seed gives the same text, whatever else is running
    stop: tuple = ()  # texts that end the reply; they are not part of it
    stop_token_ids: tuple = ()  # ids that end it, besides the tokenizer's
    ignore_eos: bool = False  # continue after the tokenizer's stop ids
    skip_special_tokens: bool = True  # special tokens have no text
    logprobs: int | None = None  # report log-probabilities of the chosen token and of this many likeliest ones
    n: int = 1  # replies to the one prompt
    logit_bias: tuple = ()  # (id, number): added to the logits of these tokens
    allowed_token_ids: tuple = ()  # if any: only these, and the ids that end the reply
    bad_words: tuple = ()  # tuples of ids: the last of them may not follow the others
    guide: Guide | None = None  # the form of the reply, such as JSON by a schema
    thinking_budget: "ThinkingBudget | None" = None
    scaled_logprobs: bool = False  # report log-probabilities after temperature, and entropies: those of rl.py

    def check(self) -> None:
        """UserError naming the field."""
        for key, low, high in (
            ("max_tokens", 1, None),
            ("min_tokens", 0, self.max_tokens),
            ("top_k", 0, None),
            ("seed", 0, (1 << 63) - 1),
            ("logprobs", 0, 20),
            ("n", 1, 128),
        ):
            value = getattr(self, key)
            if value is None and key in ("seed", "logprobs"):
                continue
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if not is_int or value < low or (high is not None and value > high):
                limits = f"of at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"{key}: {value!r}; it must be a whole number {limits}")
        for key, low, high in (
            ("temperature", 0, 100),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0, 100),
            ("presence_penalty", -100, 100),
            ("frequency_penalty", -100, 100),
        ):
            value, positive = getattr(self, key), key in ("top_p", "repetition_penalty")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high or (positive and value == 0):
                limits = f"above 0, up to {high}" if positive else f"between {low} and {high}"
                raise UserError(f"{key}: {value!r}; it must be a number {limits}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop: {self.stop!r}; it must be a tuple of texts that are not empty")
        if not isinstance(self.stop_token_ids, tuple) or not all(isinstance(i, int) for i in self.stop_token_ids):
            raise UserError(f"stop_token_ids: {self.stop_token_ids!r}; it must be a tuple of token ids")
        if not all(abs(bias) <= 100 for _, bias in self.logit_bias):
            raise UserError(f"logit_bias: {self.logit_bias!r}; it must be pairs of an id and a number of -100 to 100")
        if () in self.bad_words:
            raise UserError("bad_words: no word may be empty")


@dataclasses.dataclass(frozen=True)
class ThinkingBudget:
    """After `tokens` tokens of thoughts, the reply goes on with the ids of `closing`, which ends them."""

    tokens: int
    closing: tuple[int, ...]
    is_open: bool  # whether the prompt has opened <think>; else the reply may begin with it
    piece_bytes: Callable  # id -> bytes


class Thoughts:
    """Where one reply is in its thoughts."""

    def __init__(self, budget: ThinkingBudget):
        self.budget, self.used, self.text = budget, 0, b""
        self.phase = "open" if budget.is_open else "start"
        self.closing = collections.deque()  # what is left of the ids that are forced

    def forced(self) -> int | None:
        """The id that must come next, None for any."""
        if self.phase == "open" and self.used >= self.budget.tokens:
            self.phase, self.closing = "done", collections.deque(self.budget.closing)
        return self.closing[0] if self.closing else None

    def follow(self, token: int) -> None:
        """The token was chosen."""
        if self.closing:
            self.closing.popleft()
        if self.phase == "done":
            return
        self.text += self.budget.piece_bytes(token)
        if self.phase == "start":
            begun = self.text.lstrip()
            if begun.startswith(b"<think>"):
                self.phase, self.text = "open", begun[len(b"<think>") :]
            elif not b"<think>".startswith(begun):
                self.phase = "done"
        else:
            self.used += 1
        if self.phase == "open":
            self.phase = "done" if b"</think>" in self.text else "open"
            self.text = self.text[-len(b"</think>") :]


# ============================================================================================ from logits to a token


class TokenCounts:
    """Different ids of prompt and reply, and how often each occurs in the reply, in an array that grows."""

    def __init__(self):
        self.place, self.total, self.room = {}, 0, np.zeros((64, 2), np.int64)

    def update(self, ids: Iterable[int], in_reply: bool = True) -> None:
        """Count these ids as well."""
        for i in ids:
            place = self.place.setdefault(i, len(self.place))
            if place == len(self.room):
                self.room = np.concatenate([self.room, np.zeros_like(self.room)])
            self.room[place, 0] = i
            self.room[place, 1] += in_reply
            self.total += in_reply

    @property
    def table(self) -> np.ndarray:
        """(n, 2): an id and its count in each row."""
        return self.room[: len(self.place)]


NOTHING = TokenCounts().table


class Choice(NamedTuple):
    """What a sampler chose; numbers that it was not asked for are None."""

    token_id: int  # -1: the logits are not finite
    logprob: float | None = None
    top_logprobs: list | None = None  # [(token_id, logprob)], the likeliest first
    entropy: float | None = None


class Sampler:
    """How one sequence chooses: its penalties, its bans and its own random numbers, one a token."""

    def __init__(self, params: SamplingParams, index: int, stop_ids: list[int], seed: int):
        self.params = p = params
        self.stop_ids = {*(() if p.ignore_eos else stop_ids), *p.stop_token_ids}
        self.generator = np.random.default_rng([seed, index])
        self.ahead = collections.deque()  # its next numbers, as far as peek() has drawn them
        self.greedy = p.temperature < 1e-5
        self.counts = TokenCounts()
        self.options = (0.0, 0, 1.0) if self.greedy else (p.temperature, p.top_k, p.top_p)
        self.penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        self.needs_prompt = p.repetition_penalty != 1.0  # whether the prompt is still to be counted
        self.state = None if p.guide is None else p.guide.start
        self.thoughts = None if p.thinking_budget is None else Thoughts(p.thinking_budget)
        self.reports = p.logprobs is not None or p.scaled_logprobs
        self.has_rules = bool(p.logit_bias or p.allowed_token_ids or p.bad_words or p.guide or p.min_p)

    def uniform(self) -> float:
        """The next number of [0, 1)."""
        return self.ahead.popleft() if self.ahead else self.generator.random()

    def peek(self, n: int) -> float:
        """What uniform() will return after n more calls."""
        while len(self.ahead) <= n:
            self.ahead.append(self.generator.random())
        return self.ahead[n]

    def said(self, token_ids: list[int]) -> np.ndarray:
        """The ids that have penalties, with their counts; -1 in token_ids stands for a token of a trained prefix."""
        if self.penalties == (1.0, 0.0, 0.0):
            return NOTHING
        if self.needs_prompt:
            self.counts.update([i for i in token_ids if i >= 0], in_reply=False)
            self.needs_prompt = False
        return self.counts.table

    def is_early(self) -> bool:
        """Whether the reply may not end yet."""
        return self.counts.total < self.params.min_tokens and bool(self.stop_ids)

    def apply_rules(self, logits: np.ndarray, token_ids: list[int]) -> None:
        """Bias and bans on logits (V,), in place. Where bans leave nothing that the guide allows, they are dropped,
        except that of stop ids before min_tokens."""
        p, size = self.params, len(logits)
        if self.is_early():
            logits[[i for i in self.stop_ids if i < size]] = -np.inf
        plain = logits.copy()
        reply = token_ids[len(token_ids) - self.counts.total :]
        for token, bias in p.logit_bias:
            logits[token] += bias
        if p.allowed_token_ids:
            banned = np.ones(size, bool)
            banned[[i for i in {*p.allowed_token_ids, *self.stop_ids} if i < size]] = False
            logits[banned] = -np.inf
        for *before, last in p.bad_words:
            if reply[len(reply) - len(before) :] == before:
                logits[last] = -np.inf
        banned = None if p.guide is None else ~p.guide.allowed(self.state, self.stop_ids, size)
        if banned is not None:
            logits[banned] = -np.inf
        if logits.max() == -np.inf:
            logits[:] = plain
            if banned is not None:
                logits[banned] = -np.inf
        if p.min_p and not self.greedy:
            logits[logits < logits.max() + p.temperature * np.log(p.min_p)] = -np.inf

    def follow(self, token: int) -> None:
        """The token was chosen."""
        self.counts.update((token,))
        if self.thoughts is not None:
            self.thoughts.follow(token)
        if self.state is not None and token not in self.stop_ids:
            self.state = self.params.guide.advance(self.state, token)

    def guide_ends(self) -> str | None:
        """The reason for which the guide ends the reply: "stop": nothing may follow; "length": nothing can."""
        return None if self.state is None else self.params.guide.ends(self.state)

    def choose(self, logits: np.ndarray, token_ids: list[int]) -> Choice:
        """logits (V,) float32, ids of prompt and reply -> Choice."""
        return choose_batch([self], logits[None].copy(), [token_ids])[0]


def sample_batch(samplers: list[Sampler], logits: np.ndarray, token_ids: list[list[int]]) -> list[int]:
    """One id for each sampler from its row of logits (S, V) float32, which draws one number; -1: it is not finite.

    token_ids: of prompt and reply. The logits are changed meanwhile.
    """
    said, ruled = [sampler.said(ids) for sampler, ids in zip(samplers, token_ids)], []
    for i, sampler in enumerate(samplers):
        if sampler.has_rules or sampler.is_early():
            ruled.append((i, logits[i].copy()))
            kernels.reference.penalize_said(logits[i], said[i], *sampler.penalties)
            sampler.apply_rules(logits[i], token_ids[i])
            said[i] = NOTHING
    temperature, top_k, top_p = zip(*[s.options for s in samplers])
    uniform = [0.0 if s.greedy else s.uniform() for s in samplers]
    penalties = [s.penalties for s in samplers]
    tensor = kernels.to_tensor(logits, share=True)
    ids = kernels.sample(tensor, temperature, top_k, top_p, uniform, said, penalties).tolist()
    for i, row in ruled:
        logits[i] = row
    for i, sampler in enumerate(samplers):
        forced = sampler.thoughts.forced() if sampler.thoughts is not None else None
        if forced is not None and ids[i] >= 0:
            ids[i] = forced
        sampler.follow(ids[i])
    return ids


def choose_batch(samplers: list[Sampler], logits: np.ndarray, token_ids: list[list[int]]) -> list[Choice]:
    """As sample_batch, with the numbers that the samplers' params ask for."""
    ids = sample_batch(samplers, logits, token_ids)
    choices = [Choice(token) for token in ids]
    rows = [i for i, s in enumerate(samplers) if ids[i] >= 0 and s.reports]
    if not rows:
        return choices
    asked, part = [samplers[i].params for i in rows], logits if len(rows) == len(logits) else logits[rows]
    temperatures = [1.0 if not p.scaled_logprobs or samplers[i].greedy else p.temperature for i, p in zip(rows, asked)]
    counts = [0 if p.scaled_logprobs else p.logprobs for p in asked]
    numbers = kernels.log_probabilities(
        kernels.to_tensor(part, share=True), [ids[i] for i in rows], temperatures, min(max(counts), logits.shape[1])
    )
    for i, p, n, logprob, entropy, best, top in zip(rows, asked, counts, *(column.tolist() for column in numbers)):
        reported = (None, entropy) if p.scaled_logprobs else (list(zip(best[:n], top[:n])), None)
        choices[i] = Choice(ids[i], logprob, *reported)
    return choices
