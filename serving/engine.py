"""The inference engine: scheduler, block pool, sequences, sampler, detokenizer."""

import bisect
import collections
import dataclasses
import hashlib
import itertools
import os
import queue
import sys
import threading
import time
import traceback
from typing import NamedTuple

import kernels
from kernels.reference import penalize

import numpy as np

from formats.files import UserError
from model import CausalLM
from serving.runners import PagedRunner

# ================================================================== 2. requests and what comes back


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    max_tokens: int = 64  # most new tokens
    min_tokens: int = 0  # no end of sequence and no stop before so many
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # on tokens of prompt and reply (arXiv 1909.05858)
    presence_penalty: float = 0.0  # taken off the logit of every token that the reply has
    frequency_penalty: float = 0.0  # the same, times how often it has it
    seed: int | None = None  # the same seed gives the same text, whatever else runs
    stop: tuple = ()  # texts that end the reply; they are not part of it
    stop_token_ids: tuple = ()  # ids that end it, besides the tokenizer's
    ignore_eos: bool = False  # go on past the tokenizer's
    logprobs: int | None = None  # report log-probabilities, of the chosen token and of so many likeliest
    n: int = 1  # replies to the one prompt

    def check(self):
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
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or value < low
                or (high is not None and value > high)
            ):
                limits = f"of at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"{key}: {value!r}; it must be a whole number {limits}")
        for key, low, high in (
            ("temperature", 0, 100),
            ("top_p", 0, 1),
            ("repetition_penalty", 0, 100),
            ("presence_penalty", -100, 100),
            ("frequency_penalty", -100, 100),
        ):
            value = getattr(self, key)
            bad = isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high
            if bad or (value == 0 and key in ("top_p", "repetition_penalty")):
                above = "above 0, up to" if key in ("top_p", "repetition_penalty") else f"between {low} and"
                raise UserError(f"{key}: {value!r}; it must be a number {above} {high}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop: {self.stop!r}; it must be texts, none of them empty")
        if not isinstance(self.stop_token_ids, tuple) or not all(isinstance(i, int) for i in self.stop_token_ids):
            raise UserError(f"stop_token_ids: {self.stop_token_ids!r}; it must be ids")


@dataclasses.dataclass
class Request:
    prompt_ids: list  # of int
    params: SamplingParams = SamplingParams()
    adapter: str | None = None  # name of a loaded LoRA; None: the base model
    request_id: str = dataclasses.field(default_factory=lambda: os.urandom(12).hex())


@dataclasses.dataclass(slots=True)
class TokenOutput:
    """One token of one of the n replies. Its text may be "" while half a character or a possible stop text is held back."""

    index: int  # 0..n-1
    token_id: int | None = None  # None: the reply ended without one (abort, error)
    text: str = ""
    logprob: float | None = None  # of the distribution as the model gives it: before penalties and temperature
    top_logprobs: list | None = None  # [(token_id, logprob)], the likeliest first
    finish_reason: str | None = None  # stop, length, abort, error: on the last TokenOutput of a reply
    cached_tokens: int = 0  # of the prompt, found in blocks that were there already


@dataclasses.dataclass
class Completion:
    text: str
    token_ids: list
    finish_reason: str
    logprobs: list | None  # [(logprob, [(token_id, logprob)])] a token
    prompt_tokens: int
    cached_tokens: int


class PromptTooLong(UserError):
    """No room for a single new token after the prompt."""


class QueueFull(UserError):
    """Too many are waiting: come again."""


class UnknownAdapter(UserError):
    """No LoRA of that name is loaded."""


class ShuttingDown(UserError):
    """The engine takes no more requests."""


# ================================================================== 3. from logits to a token, from tokens to text


class Sampler:
    """How one sequence chooses: its penalties, its bans and its own stream of random numbers, one draw a token."""

    def __init__(self, params, index, stop_ids, seed):
        self.params = params
        self.stops = {*(() if params.ignore_eos else stop_ids), *params.stop_token_ids}
        self.generator = np.random.default_rng([seed, index])
        self.greedy = params.temperature < 1e-5
        self.counts = collections.Counter()  # of the reply's tokens
        p = params
        self.plain = self.greedy and p.repetition_penalty == 1 and not p.presence_penalty and not p.frequency_penalty
        self.plain = self.plain and p.logprobs is None  # then the argmax is all there is to it, from min_tokens on

    def choose(self, logits, seen):
        """logits (V,) float32, seen: ids of prompt and reply -> (id, log-probability or None, likeliest or None)."""
        (token,) = sample_batch([self], self.apply_penalties(logits, seen)[None])
        return token, *self.logprobs_of(logits, token)

    def apply_penalties(self, logits, seen):
        """The same with penalties and bans; logits themselves where there are none."""
        p = self.params
        if p.repetition_penalty != 1.0:
            logits = penalize(logits[None], np.array([seen]), np.ones((1, len(seen)), np.int64), p.repetition_penalty)[
                0
            ]
        if (p.presence_penalty or p.frequency_penalty) and self.counts:
            ids, counts = (np.array(list(part)) for part in (self.counts.block_hashes(), self.counts.values()))
            logits = logits.copy()
            logits[ids] -= (p.presence_penalty + p.frequency_penalty * counts).astype(np.float32)
        if self.stops and self.counts.total() < p.min_tokens:
            logits = logits.copy()
            logits[[i for i in self.stops if i < len(logits)]] = -np.inf
        return logits

    def logprobs_of(self, logits, token):
        """What is told of the token chosen: (log-probability, likeliest), of the logits as the model gave them, or Nones."""
        p = self.params
        if p.logprobs is None:
            return None, None
        x = logits.astype(np.float64)
        x -= x.max()
        x -= np.log(np.exp(x).sum())
        best = np.argpartition(-x, min(p.logprobs, len(x) - 1))[: p.logprobs]
        best = best[np.lexsort((best, -x[best]))]
        return float(x[token]), [(int(i), float(x[i])) for i in best]


def sample_batch(samplers, logits):
    """One id for each sampler from its row of logits (S, V) float32; each takes one number of its own stream."""
    ways = [
        (0.0, 0, 1.0, 0.0) if s.greedy else (s.params.temperature, s.params.top_k, s.params.top_p, s.generator.random())
        for s in samplers
    ]
    temperature, top_k, top_p, uniform = zip(*ways)
    ids = kernels.sample(kernels.to_tensor(logits), temperature, top_k, top_p, uniform).tolist()
    for sampler, token in zip(samplers, ids):
        sampler.counts[token] += 1
    return ids


class Detokenizer:
    """Ids of a reply in, text out as soon as it is certain that it stays: no half character, no beginning of a stop text."""

    def __init__(self, tokenizer, stop):
        self.decoder = tokenizer.stream_decoder() if tokenizer is not None else None
        self.stop, self.held = stop, ""

    def push(self, token_id, may_stop=True):
        """(text, whether a stop text was met; what follows it is dropped)"""
        return ("", False) if self.decoder is None else self._certain(self.decoder.push(token_id), may_stop)

    def flush(self, may_stop=True):
        """The same for what was held back, when no more comes."""
        if self.decoder is None:
            return "", False
        text, stopped = self._certain(self.decoder.flush(), may_stop)
        held, self.held = self.held, ""
        return (text, True) if stopped else (text + held, False)

    def _certain(self, new, may_stop):
        text = self.held + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0] if new and may_stop else []
        if found:
            self.held = ""
            return text[: min(found)], True
        keep = 0  # the longest end of the text that begins a stop text
        for stop in self.stop if may_stop else ():
            for length in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:length]):
                    keep = length
                    break
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False


# ================================================================== 4. the pool of blocks


class BlockPool:
    """Which block of the pool holds what: reference counts, and full blocks found again by the chain of their tokens.

    A block is in use (count > 0), or free: empty, or cached, which means that a later sequence with the same tokens may
    take it back until it is needed for something else, the longest unused one first.
    """

    def __init__(self, num_blocks, block_size, reuse=True):
        self.num_blocks, self.block_size, self.reuse = num_blocks, block_size, reuse
        self.counts = [0] * num_blocks
        self.hashes = [None] * num_blocks  # the block hash of a block whose tokens are known
        self.block_of = {}  # block hash -> block
        self.cached = 0  # free blocks that are known
        self.free = collections.OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first

    def block_hash(self, parent, tokens):
        """The key of a block: a digest of all tokens up to its end, and of what `parent` says of their beginning."""
        return hashlib.blake2b(np.array(tokens, np.int64).tobytes(), key=parent, digest_size=16).digest()

    def match_prefix(self, hashes):
        """Take the longest run of cached blocks with these hashes; returns the blocks."""
        blocks = []
        for key in hashes if self.reuse else ():
            block = self.block_of.get(key)
            if block is None:
                break
            if self.counts[block] == 0:
                del self.free[block]
                self.cached -= 1
            self.counts[block] += 1
            blocks.append(block)
        return blocks

    def allocate(self):
        """An empty block; there must be a free one."""
        block, _ = self.free.popitem(last=False)
        if self.hashes[block] is not None:
            del self.block_of[self.hashes[block]]
            self.hashes[block] = None
            self.cached -= 1
        self.counts[block] = 1
        return block

    def cache_block(self, block, key):
        """The block is full and computed: others may share it. The first of several equal ones is the one that is found."""
        if self.reuse and key not in self.block_of:
            self.block_of[key], self.hashes[block] = block, key

    def release(self, blocks):
        """Give back a sequence's blocks. The last goes first: without its parent a block would never be found again."""
        for block in reversed(blocks):
            self.counts[block] -= 1
            assert self.counts[block] >= 0, f"block {block} was released twice"
            if self.counts[block] == 0:
                self.free[block] = None
                if self.hashes[block] is None:
                    self.free.move_to_end(block, last=False)  # empty ones are taken before cached ones
                else:
                    self.cached += 1

    def reset_prefix_cache(self):
        """Nothing cached is to be found again."""
        self.block_of.clear()
        self.hashes, self.cached = [None] * self.num_blocks, 0


# ================================================================== 5. sequences


WAITING, PREFILL, DECODE, DONE = "waiting", "prefill", "decode", "done"  # stored, never derived from lengths


class Sequence:
    """One of the n replies of a request, from the queue to its end."""

    def __init__(self, request, index, arrival, on_output, leader, sampler, text, num_virtual_tokens, hash_seed):
        self.request, self.index, self.arrival, self.on_output = request, index, arrival, on_output
        self.leader = leader  # the sequence of the same request whose prompt this one waits to share, or None
        self.sampler, self.text = sampler, text
        self.num_virtual_tokens = num_virtual_tokens  # tokens of a trained prefix in front, as -1
        self.tokens = [-1] * num_virtual_tokens + list(request.prompt_ids)  # and then the reply's
        self.num_prompt_tokens = len(self.tokens)
        self.phase = WAITING
        self.num_computed_tokens = 0  # tokens whose keys and values are in the blocks
        self.blocks = []
        self.block_hashes = [hash_seed]  # block hashs: the root and one for each full block
        self.cached_tokens = None  # set when first admitted

    @property
    def generated(self):
        return len(self.tokens) - self.num_prompt_tokens


class ScheduledTokens(NamedTuple):
    """What a step computes of one sequence: tokens[start : start + count]."""

    sequence: Sequence
    start: int
    count: int


# ================================================================== 8. the engine


class Engine:
    """Requests in, tokens and text out, many at once.

    generate() and stream() block; submit() and abort() may be called from any thread, with start() and shutdown() for
    the thread that then calls step(). model: a CausalLM, or a runner such as StaticRunner: anything with PagedRunner's
    run, fill_prefix, release, chunked (and then root), adapters, virtual, vocab_size and max_positions. adapters: {name:
    folder of a LoRA}.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        num_blocks=256,
        block_size=16,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        max_model_len=None,
        max_queue=256,
        seed=0,
        adapters=None,
        int8_cache=False,
    ):
        paged = isinstance(model, CausalLM)
        self.runner = runner = PagedRunner(model, num_blocks, block_size, adapters, int8_cache) if paged else model
        self.tokenizer = tokenizer
        self.pool = BlockPool(num_blocks, block_size, reuse=runner.chunked)
        self.max_num_seqs, self.max_queue = max_num_seqs, max_queue
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)  # every running sequence gets its token
        room = min(runner.max_positions, num_blocks * block_size) - runner.num_virtual_tokens
        self.max_model_len = min(room, max_model_len or room)
        if self.max_model_len < 2:
            raise UserError(
                f"{num_blocks} blocks of {block_size} and {runner.max_positions} positions leave no room for a prompt "
                f"and a token after {runner.num_virtual_tokens} tokens of a prefix; raise num_blocks"
            )
        self.adapters = list(runner.adapters)
        self.watermark = max(1, num_blocks // 100)  # blocks left free when a sequence is admitted beside others
        self.stop_ids = tokenizer.stop_ids if tokenizer is not None else []
        self.running, self.waiting = [], collections.deque()  # by arrival
        self.seeds = np.random.default_rng(seed)
        self.arrivals = itertools.count()
        self.totals = dict.fromkeys(
            (
                "requests",
                "prompt_tokens",
                "cached_tokens",
                "generation_tokens",
                "preemptions",
                "aborted",
                "errors",
                "steps",
            ),
            0,
        )
        # What other threads touch, under the condition's lock:
        self.condition = threading.Condition()
        self.inbox, self.to_abort, self.live = [], set(), {}  # live: request_id -> replies not finished
        self.thread, self.closing, self.stopped = None, False, False

    # ---------------------------------------------------------------- in from any thread

    def submit(self, request, on_output):
        """Queue a request; on_output(TokenOutput) is called from the engine's thread for each token of each reply."""
        params, prompt = request.params, request.prompt_ids
        params.check()
        if request.adapter is not None and request.adapter not in self.adapters:
            raise UnknownAdapter(
                f"adapter: {request.adapter!r} is not loaded; loaded are {', '.join(self.adapters) or 'none'}"
            )
        if not len(prompt):
            raise UserError("prompt: empty; at least one token is needed")
        if min(prompt) < 0 or max(prompt) >= self.runner.vocab_size:
            raise UserError(f"prompt: ids must be between 0 and {self.runner.vocab_size - 1}")
        if len(prompt) >= self.max_model_len:
            raise PromptTooLong(
                f"prompt: {len(prompt)} tokens; at most {self.max_model_len - 1} fit, with one new token, in {self.max_model_len}"
            )
        with self.condition:
            if self.closing:
                raise ShuttingDown("the server is shutting down")
            if len(self.inbox) + len(self.waiting) >= self.max_queue:
                raise QueueFull(f"{self.max_queue} replies are waiting already; try again later")
            if request.request_id in self.live:
                raise UserError(f"request_id: {request.request_id!r} is running already")
            self.live[request.request_id] = params.n
            seed = int(self.seeds.integers(1 << 62)) if params.seed is None else params.seed
            # Cached keys and values depend on more than the tokens: on the rotation and on the adapter.
            rotation = self.runner.hash_seed(len(prompt) + self.runner.num_virtual_tokens) if self.pool.reuse else 0
            root, leader = (
                hashlib.blake2b(f"{rotation} {request.adapter or ''}".encode(), digest_size=16).digest(),
                None,
            )
            for index in range(params.n):
                sampler = Sampler(params, index, self.stop_ids, seed)
                text = Detokenizer(self.tokenizer, params.stop)
                sequence = Sequence(
                    request,
                    index,
                    next(self.arrivals),
                    on_output,
                    leader,
                    sampler,
                    text,
                    self.runner.num_virtual_tokens,
                    root,
                )
                leader = leader or sequence
                self.inbox.append(sequence)
            self.totals["requests"] += 1
            self.totals["prompt_tokens"] += len(prompt)
            self.condition.notify_all()

    def abort(self, request_id):
        """End a request before the next step; unknown or finished ones are ignored."""
        with self.condition:
            if request_id in self.live:
                self.to_abort.add(request_id)
                self.condition.notify_all()

    def stats(self):
        """{name: number}; blocks_free counts the cached ones, too."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting) + len(self.inbox),
            "blocks_total": self.pool.num_blocks,
            "blocks_free": len(self.pool.free),
            "blocks_cached": self.pool.cached,
            **{f"{name}_total": value for name, value in self.totals.items()},
        }

    # ---------------------------------------------------------------- one step

    def step(self):
        """Admit, compute one batch, hand out its tokens. False: there was nothing to do."""
        self._take_inbox()
        chunks = self._schedule()
        if not chunks:
            assert not self.running and not self.waiting, "a step without chunks while sequences wait"
            return False
        logits = self.runner.run(chunks)
        self.totals["steps"] += 1
        self._advance(chunks, logits)
        return True

    def _take_inbox(self):
        with self.condition:
            self.waiting += self.inbox
            self.inbox.clear()
            aborted, self.to_abort = self.to_abort, set()
        self.totals["aborted"] += len(aborted)
        for sequence in [s for s in (*self.running, *self.waiting) if s.request.request_id in aborted]:
            self._finish(sequence, "abort")

    def _schedule(self):
        """The chunks of this step: a token of every running sequence, then pieces of prompts, the oldest first."""
        chunks, size, preempted, whole = [], self.pool.block_size, False, not self.runner.chunked
        for sequence in [s for s in self.running if s.phase == DECODE]:
            while sequence.phase == DECODE and len(sequence.blocks) * size <= sequence.num_computed_tokens:
                if self.pool.free:
                    sequence.blocks.append(self.pool.allocate())
                else:
                    self._preempt(max(self.running, key=lambda s: s.arrival))
                    preempted = True
            if sequence.phase == DECODE:
                chunks.append(ScheduledTokens(sequence, sequence.num_computed_tokens, 1))
        budget = self.max_num_batched_tokens - len(chunks)
        for sequence in [s for s in self.running if s.phase == PREFILL]:
            budget -= self._add_prefill(chunks, sequence, budget)
        passed = []  # replies that wait for the first one of their request to compute the prompt
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and not preempted:
            sequence = self.waiting[0]
            leader = sequence.leader
            if leader is not None and not whole and leader.phase in (WAITING, PREFILL) and not sequence.generated:
                passed.append(self.waiting.popleft())
                continue
            if whole and len(sequence.tokens) > budget and any(chunk.count > 1 for chunk in chunks):
                break  # a prompt of more than the budget comes alone
            if not self._admit(sequence):
                break
            budget -= self._add_prefill(chunks, sequence, budget)
        self.waiting.extendleft(reversed(passed))
        return chunks

    def _add_prefill(self, chunks, sequence, budget):
        """A chunk of a prompt within the budget (the whole of it, if the runner takes no pieces): its tokens."""
        count = len(sequence.tokens) - sequence.num_computed_tokens
        count = min(count, budget) if self.runner.chunked else count
        if count > 0:
            chunks.append(ScheduledTokens(sequence, sequence.num_computed_tokens, count))
        return count

    def _admit(self, sequence):
        """Give the head of the queue its blocks; False if they are not free.

        Full blocks that are cached are shared, but never all of the sequence: its last token must be computed, since it
        is its logits that are wanted.
        """
        assert sequence is self.waiting[0] and sequence.phase == WAITING and not sequence.blocks
        size, length = self.pool.block_size, len(sequence.tokens)
        self._extend_hashes(sequence, (length - 1) // size)
        shared = self.pool.match_prefix(sequence.block_hashes[1 : 1 + (length - 1) // size])
        missing = -(-length // size) - len(shared)
        if missing > len(self.pool.free) - (self.watermark if self.running else 0):
            self.pool.release(shared)
            return False
        self.waiting.popleft()
        sequence.blocks = shared + [self.pool.allocate() for _ in range(missing)]
        sequence.num_computed_tokens = len(shared) * size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = max(0, sequence.num_computed_tokens - sequence.num_virtual_tokens)
            self.totals["cached_tokens"] += sequence.cached_tokens
        if sequence.num_computed_tokens < sequence.num_virtual_tokens:
            self.runner.fill_prefix(sequence, sequence.num_computed_tokens)
            sequence.num_computed_tokens = sequence.num_virtual_tokens
        sequence.phase = PREFILL
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)
        return True

    def _extend_hashes(self, sequence, blocks):
        """The block hashs of the first so many blocks, from tokens that are all there."""
        size = self.pool.block_size
        for i in range(len(sequence.block_hashes) - 1, blocks if self.pool.reuse else 0):
            sequence.block_hashes.append(
                self.pool.block_hash(sequence.block_hashes[i], sequence.tokens[i * size : (i + 1) * size])
            )

    def _preempt(self, sequence):
        """Back to the head of the queue, with its tokens and its random state; what it had computed is given up."""
        self._give_back(sequence)
        self.running.remove(sequence)
        sequence.phase, sequence.num_computed_tokens = WAITING, 0
        self.waiting.appendleft(sequence)
        self.totals["preemptions"] += 1

    def _give_back(self, sequence):
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self.runner.release(sequence)

    def _advance(self, chunks, logits):
        """What was computed is kept and, where a sequence is computed to its end, the next token chosen."""
        best, finite = logits.argmax(-1).tolist(), np.isfinite(logits.max(-1)).tolist()
        chosen = self._draw(chunks, logits, finite)
        for row, chunk in enumerate(chunks):
            sequence, size = chunk.sequence, self.pool.block_size
            full = sequence.num_computed_tokens // size
            sequence.num_computed_tokens += chunk.count
            if sequence.num_computed_tokens // size > full:
                self._extend_hashes(sequence, sequence.num_computed_tokens // size)
                for i in range(full, sequence.num_computed_tokens // size if self.pool.reuse else full):
                    self.pool.cache_block(sequence.blocks[i], sequence.block_hashes[i + 1])
            if sequence.num_computed_tokens < len(sequence.tokens):
                continue
            sequence.phase = DECODE
            if not finite[row]:
                print(f"request {sequence.request.request_id}: the logits are not finite", file=sys.stderr, flush=True)
                self._finish(sequence, "error")
            elif sequence.sampler.plain and sequence.generated >= sequence.sampler.params.min_tokens:
                self._append(sequence, best[row], None, None)
            else:
                self._append(sequence, chosen[row], *sequence.sampler.logprobs_of(logits[row], chosen[row]))

    def _draw(self, chunks, logits, finite):
        """{row: id} of the rows that are computed to their end and for which the argmax is not all."""
        rows = []
        for row, (s, start, count) in enumerate(chunks):
            plain = s.sampler.plain and s.generated >= s.sampler.params.min_tokens
            if start + count == len(s.tokens) and finite[row] and not plain:
                rows.append(row)
        if not rows:
            return {}
        samplers = [chunks[row].sequence.sampler for row in rows]
        adjusted = [
            s.apply_penalties(logits[row], chunks[row].sequence.tokens[chunks[row].sequence.num_virtual_tokens :])
            for row, s in zip(rows, samplers)
        ]
        return dict(zip(rows, sample_batch(samplers, np.stack(adjusted))))

    def _append(self, sequence, token, logprob, top):
        """A new token: is it the last, what text is certain with it?"""
        params, sampler = sequence.request.params, sequence.sampler
        sequence.tokens.append(token)
        self.totals["generation_tokens"] += 1
        may_stop = sequence.generated >= params.min_tokens
        full = (
            sequence.generated >= params.max_tokens
            or len(sequence.tokens) - sequence.num_virtual_tokens >= self.max_model_len
        )
        if may_stop and token in sampler.stops:
            text, reason = sequence.text.flush()[0], "stop"
        else:
            text, stopped = sequence.text.push(token, may_stop)
            if full and not stopped:
                rest, stopped = sequence.text.flush(may_stop)
                text += rest
            reason = "stop" if stopped else "length" if full else None
        output = TokenOutput(sequence.index, token, text, logprob, top, None, sequence.cached_tokens)
        if reason is None:
            self._hand_out(sequence, output)
        else:
            self._finish(sequence, reason, output)

    def _finish(self, sequence, reason, output=None):
        if sequence.phase == DONE:
            return
        if sequence.phase == WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._give_back(sequence)
        sequence.phase = DONE
        with self.condition:
            name = sequence.request.request_id
            self.live[name] -= 1
            if not self.live[name]:
                del self.live[name]
        output = output or TokenOutput(sequence.index, cached_tokens=sequence.cached_tokens or 0)
        output.finish_reason = reason
        self._hand_out(sequence, output)

    def _hand_out(self, sequence, output):
        try:
            sequence.on_output(output)
        except Exception:
            traceback.print_exc()
            self.abort(sequence.request.request_id)

    # ---------------------------------------------------------------- the thread

    def start(self):
        """Step from now on in a thread of its own."""
        assert self.thread is None, "the engine runs already"
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.thread.start()

    def _loop(self):
        while True:
            with self.condition:
                self.condition.wait_for(
                    lambda: self.inbox or self.to_abort or self.running or self.waiting or self.stopped
                )
                if self.stopped:
                    return
            try:
                self.step()
            except Exception:
                traceback.print_exc()
                self._fail()

    def _fail(self):
        """A step has failed: end what ran with "error", since what it had computed cannot be trusted; then go on."""
        failed = list(self.running) or list(self.waiting)
        self.totals["errors"] += len(failed)
        for sequence in failed:
            self._finish(sequence, "error")
        self.pool.reset_prefix_cache()

    def shutdown(self, drain=True, timeout=None):
        """Refuse new requests; drain: finish what there is, for at most `timeout` seconds; abort what is left."""
        with self.condition:
            self.closing = True
        if self.thread is not None:
            end = None if timeout is None else time.monotonic() + timeout
            while drain and self.live and (end is None or time.monotonic() < end):
                time.sleep(0.01)
            with self.condition:
                self.stopped = True
                self.condition.notify_all()
            self.thread.join()
            self.thread = None
        with self.condition:
            self.to_abort.update(self.live)
        self._take_inbox()

    # ---------------------------------------------------------------- blocking calls

    def generate(self, requests, progress=None):
        """[Request, …], or an iterator that is read as there is room -> for each the list of its n Completions.

        progress(i, completions) is called as soon as request i is complete, and then nothing is kept of it.
        """
        requests, finished, results, left = enumerate(requests), queue.SimpleQueue(), {}, 0
        pending = next(requests, None)
        while pending is not None or left:
            while pending is not None and len(self.waiting) + len(self.inbox) < min(self.max_num_seqs, self.max_queue):
                i, request = pending
                self.submit(request, _Collector(i, request, finished))
                left, pending = left + 1, next(requests, None)
            if self.thread is None:
                self.step()
            elif not left:
                time.sleep(0.001)  # the queue is full of others' requests
            while left and (self.thread is not None or not finished.empty()):
                i, completions = finished.get()
                left -= 1
                results[i] = completions if progress is None else progress(i, completions)
                if self.thread is not None:
                    break
        return [results[i] for i in range(len(results))]

    def stream(self, request):
        """Iterator of the request's Outputs; closing it aborts the request."""
        outputs, left = queue.SimpleQueue(), request.params.n
        self.submit(request, outputs.put)
        try:
            while left:
                while self.thread is None and outputs.empty():
                    self.step()
                output = outputs.get()
                left -= output.finish_reason is not None
                yield output
        finally:
            self.abort(request.request_id)
            if self.thread is None:
                self._take_inbox()


class _Collector:
    """on_output of generate(): puts (i, completions) into `finished` when all n replies are."""

    def __init__(self, i, request, finished):
        n, prompt, wanted = request.params.n, len(request.prompt_ids), request.params.logprobs is not None
        self.i, self.left, self.finished = i, n, finished
        self.completions = [Completion("", [], None, [] if wanted else None, prompt, 0) for _ in range(n)]

    def __call__(self, output):
        c = self.completions[output.index]
        c.text += output.text
        c.cached_tokens = output.cached_tokens
        if output.token_id is not None:
            c.token_ids.append(output.token_id)
            if c.logprobs is not None:
                c.logprobs.append((output.logprob, output.top_logprobs))
        if output.finish_reason is not None:
            c.finish_reason = output.finish_reason
            self.left -= 1
            if self.left == 0:
                self.finished.put((self.i, self.completions))
