"""From logits to tokens: what a request may ask of its sampling, and the choice of the next token for a batch.

    params = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.95, seed=1)
    sampler = Sampler(params, index=0, stop_ids=[2], seed=1)         # one for each reply
    ids = sample_batch([sampler], logits)                            # (S, V) float32 -> one id a row

Letters: S sequences, V vocabulary.
"""

import collections
import dataclasses

import kernels
from kernels.reference import penalize

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


# ============================================================================================ from logits to a token


class Sampler:
    """How one sequence chooses: its penalties, its bans and its own random numbers, one a token."""

    def __init__(self, params: SamplingParams, index: int, stop_ids: list[int], seed: int):
        self.params = p = params
        self.stop_ids = {*(() if p.ignore_eos else stop_ids), *p.stop_token_ids}
        self.generator = np.random.default_rng([seed, index])
        self.ahead = collections.deque()  # its next numbers, as far as peek() has drawn them
        self.greedy = p.temperature < 1e-5
        self.counts = collections.Counter()  # of the reply's tokens
        no_penalty = p.repetition_penalty == 1 and not p.presence_penalty and not p.frequency_penalty
        reports = p.logprobs is not None or p.scaled_logprobs
        self.state = None if p.guide is None else p.guide.start
        self.has_rules = bool(p.logit_bias or p.allowed_token_ids or p.bad_words or p.guide)
        self.argmax_suffices = self.greedy and no_penalty and not reports and not self.has_rules  # from min_tokens on

    def uniform(self) -> float:
        """The next number of [0, 1)."""
        return self.ahead.popleft() if self.ahead else self.generator.random()

    def peek(self, n: int) -> float:
        """What uniform() will return after n more calls."""
        while len(self.ahead) <= n:
            self.ahead.append(self.generator.random())
        return self.ahead[n]

    def choose(self, logits: np.ndarray, token_ids: list[int]) -> tuple:
        """logits (V,) float32, ids of prompt and reply -> (id, log-probability or None, likeliest or None)."""
        (token,) = sample_batch([self], self.apply_penalties(logits, token_ids)[None])
        return token, *self.logprobs_of(logits, token)

    def apply_penalties(self, logits: np.ndarray, token_ids: list[int]) -> np.ndarray:
        """logits (V,) with penalties, and without the stop ids before min_tokens; the same array where none apply."""
        p = self.params
        if p.repetition_penalty != 1.0:
            ids, mask = np.array([token_ids]), np.ones((1, len(token_ids)), np.int64)
            logits = penalize(logits[None], ids, mask, p.repetition_penalty)[0]
        if (p.presence_penalty or p.frequency_penalty) and self.counts:
            ids, counts = np.array(list(self.counts.keys())), np.array(list(self.counts.values()))
            logits = logits.copy()
            logits[ids] -= (p.presence_penalty + p.frequency_penalty * counts).astype(np.float32)
        if self.stop_ids and self.counts.total() < p.min_tokens:
            logits = logits.copy()
            logits[[i for i in self.stop_ids if i < len(logits)]] = -np.inf
        if self.has_rules:
            logits = self._apply_rules(logits, token_ids)
        if p.min_p and not self.greedy:
            logits = np.where(logits < logits.max() + p.temperature * np.log(p.min_p), -np.inf, logits)
        return logits

    def _apply_rules(self, logits, token_ids):
        """logits with bias, and -inf for what may not come next. Of rules that leave nothing, the guide's is kept."""
        p, plain, size = self.params, logits, len(logits)
        logits = logits.copy()
        for token, bias in p.logit_bias:
            logits[token] += bias
        if p.allowed_token_ids:
            kept = [i for i in {*p.allowed_token_ids, *self.stop_ids} if i < size]
            logits = np.full_like(logits, -np.inf)
            logits[kept] = plain[kept]
        reply = token_ids[len(token_ids) - self.counts.total() :]
        for *before, last in p.bad_words:
            if reply[len(reply) - len(before) :] == before:
                logits[last] = -np.inf
        if p.guide is None:
            return logits
        allowed = p.guide.allowed(self.state, self.stop_ids, size)
        guided = np.where(allowed, logits, -np.inf)
        return guided if np.isfinite(guided.max()) else np.where(allowed, plain, -np.inf)

    def follow(self, token: int) -> None:
        """The token was chosen."""
        self.counts[token] += 1
        if self.state is not None and token not in self.stop_ids:
            self.state = self.params.guide.advance(self.state, token)

    def guide_ends(self) -> str | None:
        """The reason for which the guide ends the reply: "stop": nothing may follow; "length": nothing can."""
        return None if self.state is None else self.params.guide.ends(self.state)

    def logprobs_of(self, logits: np.ndarray, token: int) -> tuple:
        """(log-probability of the token, [(id, log-probability)] of the likeliest) by logits (V,), or Nones."""
        p = self.params
        if p.logprobs is None:
            return None, None
        x = logits.astype(np.float64)
        x -= x.max()
        x -= np.log(np.exp(x).sum())
        best = np.argpartition(-x, min(p.logprobs, len(x) - 1))[: p.logprobs]
        best = best[np.lexsort((best, -x[best]))]
        return float(x[token]), [(int(i), float(x[i])) for i in best]


def sample_batch(samplers: list[Sampler], logits: np.ndarray) -> list[int]:
    """One id for each sampler from its row of logits (S, V) float32; each draws one number of its own generator."""
    options = [
        (0.0, 0, 1.0, 0.0) if s.greedy else (s.params.temperature, s.params.top_k, s.params.top_p, s.uniform())
        for s in samplers
    ]
    temperature, top_k, top_p, uniform = zip(*options)
    ids = kernels.sample(kernels.to_tensor(logits, share=True), temperature, top_k, top_p, uniform).tolist()
    for sampler, token in zip(samplers, ids):
        sampler.follow(token)
    return ids


def scaled_logprobs(logits: np.ndarray, ids: list[int], temperatures: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """logits (S, V) float32 -> log-probabilities of ids (S,) in softmax(logits / temperature), and its entropies."""
    x = logits / np.array(temperatures, np.float32)[:, None]
    x -= x.max(-1, keepdims=True)
    weights = np.exp(x)
    total = weights.sum(-1, dtype=np.float64)
    entropies = np.log(total) - np.einsum("sv,sv->s", weights, x, dtype=np.float64) / total
    return x[np.arange(len(ids)), ids] - np.log(total), entropies
