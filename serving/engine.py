"""The inference engine: many requests at once, one batch of tokens a step.

    engine = Engine(model, tokenizer, num_blocks=256)
    completions = engine.generate([Request(tokenizer.encode("Once"), SamplingParams(max_tokens=20))])[0]
    for output in engine.stream(request): print(output.text, end="")

The life of a request:
1. Engine.submit checks it, in any thread, and makes a Sequence for each of its n replies. They wait in `inbox`.
2. Engine.step, in the engine's thread, moves them to the end of the queue `waiting` and ends those that were aborted.
3. _schedule chooses the tokens of this step: the next one of every running sequence, then prompts, or pieces of them,
   up to max_num_batched_tokens. If the pool has no free block, the youngest sequence returns to the queue (preemption).
4. _admit gives the first of the queue its blocks. Full blocks that another sequence has computed are shared: BlockPool
   finds them by a hash of all tokens up to their end.
5. runner.run (runners.py) computes the scheduled tokens, writes their keys and values into the blocks, and returns the
   logits after the last token of each sequence; where a speculator (speculation.py) has guessed further tokens, after
   each of them as well.
6. _advance marks full blocks as shareable. Where a sequence is computed to its end, choose_batch (sampling.py) draws
   the next token from the logits with penalties, temperature, top-k and top-p; each Sampler has its own random numbers.
   If it is the guessed one, the token after it follows at once.
7. _append lets Detokenizer turn the token into text, and decides whether the reply ends here: a stop id, a stop text,
   or the length. on_output gets a TokenOutput.
8. _finish releases the blocks of an ended reply. Those that hold full blocks stay findable until they are needed.
"""

import bisect
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from formats.files import UserError
from model import CausalLM
from serving.fused import fastest_runner
from serving.runners import ScheduledTokens, TokenSequence
from serving.sampling import Sampler, SamplingParams, choose_batch
from serving.speculation import DraftSpeculator, NgramSpeculator, rows_of

# ======================================================================================= requests and their results


@dataclasses.dataclass
class Request:
    prompt_ids: list[int]
    params: SamplingParams = SamplingParams()
    adapter: str | None = None  # name of a loaded LoRA; None: the base model
    request_id: str = dataclasses.field(default_factory=lambda: os.urandom(12).hex())
    continues_prompt: bool = False  # its text goes on with the prompt's, spaces and half characters included


@dataclasses.dataclass(slots=True)
class TokenOutput:
    """One token of one of the n replies. Its text may be "" while Detokenizer holds some back."""

    index: int  # 0..n-1
    token_id: int | None = None  # None: the reply ended without one (abort, error)
    text: str = ""
    logprob: float | None = None  # of the model's own distribution, before penalties; scaled_logprobs: at temperature
    top_logprobs: list | None = None  # [(token_id, logprob)], the likeliest first
    entropy: float | None = None  # with scaled_logprobs, of the distribution at temperature, in nats
    finish_reason: str | None = None  # stop, length, abort, error: on the last TokenOutput of a reply
    cached_tokens: int = 0  # tokens of the prompt whose blocks were already computed
    draft_tokens: int = 0  # of the reply so far: tokens that were guessed,
    accepted_tokens: int = 0  # and those of them that the model chose
    stop_text: str | None = None  # which of the request's `stop` ended the reply
    admitted: float | None = None  # time.monotonic() at which the reply left the queue for the first time


@dataclasses.dataclass
class Completion:
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list | None  # [(logprob, [(token_id, logprob)])], one a token
    prompt_tokens: int
    cached_tokens: int
    entropies: list | None = None  # with scaled_logprobs, one a token; logprobs then holds (logprob, None)
    draft_tokens: int = 0
    accepted_tokens: int = 0


class PromptTooLong(UserError):
    """There is no room for a single new token after the prompt."""


class QueueFull(UserError):
    """Too many sequences are waiting; the client may try again later."""


class UnknownAdapter(UserError):
    """No LoRA of that name is loaded."""


class ShuttingDown(UserError):
    """The engine accepts no more requests."""


# ============================================================================================ from tokens to text


class Detokenizer:
    """Ids of a reply -> its text, as soon as it is final: half a character or the start of a stop text is held back."""

    def __init__(self, tokenizer, stop: tuple[str, ...], skip_special_tokens: bool = True, after: list[int] = ()):
        """after: ids of the text that the reply goes on with."""
        self.decoder = tokenizer.stream_decoder(skip_special_tokens) if tokenizer is not None else None
        if self.decoder is not None and len(after):
            self.decoder.begin_after(after)
        self.stop, self.pending, self.stop_text = stop, "", None  # stop_text: the one that was found

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """(text, whether a stop text was found; the text after it is dropped)"""
        return ("", False) if self.decoder is None else self._final_text(self.decoder.push(token_id), may_stop)

    def flush(self, may_stop: bool = True) -> tuple[str, bool]:
        """As push() for the text that was held back, at the end of the reply."""
        if self.decoder is None:
            return "", False
        text, stopped = self._final_text(self.decoder.flush(), may_stop)
        pending, self.pending = self.pending, ""
        return (text, True) if stopped else (text + pending, False)

    def _final_text(self, new, may_stop):
        text = self.pending + new
        starts = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0] if new and may_stop else []
        if starts:
            at, self.stop_text = min(starts)
            self.pending = ""
            return text[:at], True
        keep = 0  # length of the longest end of the text with which a stop text begins
        for stop in self.stop if may_stop else ():
            for length in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:length]):
                    keep = length
                    break
        self.pending = text[len(text) - keep :]
        return text[: len(text) - keep], False


# ============================================================================================= the pool of blocks


class BlockPool:
    """Reference counts of blocks, and full blocks found again by the hash of all tokens up to their end.

    A block is in use (count > 0) or free. A free one is empty or cached: a later sequence with the same tokens may take
    a cached block back until it is needed for something else. The least recently used one is taken first.
    """

    def __init__(self, num_blocks: int, block_size: int, reuse: bool = True):
        self.num_blocks, self.block_size, self.reuse = num_blocks, block_size, reuse
        self.ref_counts = [0] * num_blocks
        self.hashes = [None] * num_blocks  # of each block that others may share
        self.is_exact = [False] * num_blocks  # whether seeded sequences may share it, see Sequence
        self.block_of = {}  # hash -> block
        self.num_cached = 0  # free blocks with a hash
        self.free = collections.OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first

    def block_hash(self, parent: bytes, tokens: list[int]) -> bytes:
        """Hash of a full block: of its tokens and of its parent's hash (for the first block, the sequence's seed)."""
        return hashlib.blake2b(np.array(tokens, np.int64).tobytes(), key=parent, digest_size=16).digest()

    def match_prefix(self, block_hashes: list[bytes], only_exact: bool = False) -> list[int]:
        """Take the longest run of blocks with these hashes, of exact ones if only_exact; returns the blocks."""
        blocks = []
        for key in block_hashes if self.reuse else ():
            block = self.block_of.get(key)
            if block is None or only_exact and not self.is_exact[block]:
                break
            if self.ref_counts[block] == 0:
                del self.free[block]
                self.num_cached -= 1
            self.ref_counts[block] += 1
            blocks.append(block)
        return blocks

    def allocate(self) -> int:
        """An empty block; KeyError if none is free."""
        block, _ = self.free.popitem(last=False)
        if self.hashes[block] is not None:
            del self.block_of[self.hashes[block]]
            self.hashes[block] = None
            self.num_cached -= 1
        self.ref_counts[block] = 1
        return block

    def cache_block(self, block: int, block_hash: bytes, is_exact: bool = False) -> None:
        """The block is full and computed: others may share it. Of several equal blocks the first is found."""
        if self.reuse and block_hash not in self.block_of:
            self.block_of[block_hash], self.hashes[block], self.is_exact[block] = block, block_hash, is_exact

    def release(self, blocks: list[int]) -> None:
        """Give back a sequence's blocks, the last one first: no block is found without its parent."""
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            assert self.ref_counts[block] >= 0, f"block {block} was released twice"
            if self.ref_counts[block] == 0:
                self.free[block] = None
                if self.hashes[block] is None:
                    self.free.move_to_end(block, last=False)  # empty blocks are taken before cached ones
                else:
                    self.num_cached += 1

    def reset_prefix_cache(self) -> None:
        """Forget all hashes: no block is found again."""
        self.block_of.clear()
        self.hashes, self.num_cached = [None] * self.num_blocks, 0


# ====================================================================================================== sequences


WAITING, PREFILL, DECODE, DONE = "waiting", "prefill", "decode", "done"


@dataclasses.dataclass(eq=False, kw_only=True)
class Sequence(TokenSequence):
    """One of the n replies of a request, from the queue to its end.

    is_seeded: the request has a seed, so its text must not depend on what else runs. A step computes each sequence by
    itself, but one token otherwise than several. So the tokens of its prompt are always computed several at once, those
    of its reply one by one, and it shares only blocks that were.
    """

    request: Request
    index: int  # 0..n-1
    arrival: int  # in order of submission
    on_output: Callable
    leader: "Sequence | None"  # the first of the request's sequences: the others wait to share its prompt's blocks
    sampler: Sampler
    detokenizer: Detokenizer
    num_virtual_tokens: int  # of a trained prefix
    block_hashes: list[bytes]  # the seed, then one for each full block
    phase: str = WAITING
    num_computed_tokens: int = 0  # tokens whose keys and values are in the blocks
    admitted: float | None = None  # see TokenOutput
    num_cached_tokens: int | None = None  # of the prompt, found in the pool when it was first admitted
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


# ===================================================================================================== the engine


class Engine:
    """Requests in, tokens and text out, many at once.

    generate() and stream() block. submit() and abort() may be called from any thread; start() begins a thread that
    calls step(), shutdown() ends it. model: a CausalLM, or a runner (StaticRunner). adapters: {name: folder of a LoRA}.
    dtype, int8_head, free_weights: of serving.fused. speculator: of serving.speculation; replies are the same with it.
    chunked_prefill_size: most tokens of prompts in a step that other replies wait for; None: max_num_batched_tokens.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        num_blocks: int = 256,
        block_size: int = 16,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        chunked_prefill_size: int | None = None,
        max_model_len: int | None = None,
        max_queue: int = 256,
        seed: int = 0,
        adapters: dict | None = None,
        int8_cache: bool | str = False,
        dtype: str = "float32",
        int8_head: bool = False,
        speculator: NgramSpeculator | DraftSpeculator | None = None,
        free_weights: bool = False,
    ):
        if isinstance(model, CausalLM):
            options = adapters, int8_cache, dtype, int8_head, free_weights
            model = fastest_runner(model, num_blocks, block_size, *options)
        if speculator is not None and not model.chunked_prefill:
            raise UserError(
                f"speculate_method: {type(model).__name__} computes one token of a reply a step; leave it out"
            )
        if speculator is not None:
            speculator.check_vocabulary(model.vocab_size)
        self.runner, self.tokenizer, self.speculator = model, tokenizer, speculator
        self.pool = BlockPool(num_blocks, block_size, reuse=model.chunked_prefill)
        self.max_num_seqs, self.max_queue = max_num_seqs, max_queue
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)  # one token for each running sequence
        self.chunked_prefill_size = chunked_prefill_size or self.max_num_batched_tokens
        room = min(model.max_positions, num_blocks * block_size) - model.num_virtual_tokens
        self.max_model_len = min(room, max_model_len or room)
        if self.max_model_len < 2:
            raise UserError(
                f"{num_blocks} blocks of {block_size} and {model.max_positions} positions leave no room for a prompt "
                f"and a token after {model.num_virtual_tokens} tokens of a prefix; raise num_blocks"
            )
        self.adapters = list(model.adapters)
        self.watermark = max(1, num_blocks // 100)  # blocks left free when a sequence joins others
        self.stop_ids = tokenizer.stop_ids if tokenizer is not None else []
        self.running, self.waiting = [], collections.deque()  # both by arrival
        self.seeds, self.arrivals = np.random.default_rng(seed), itertools.count()
        counters = "requests prompt_tokens cached_tokens generation_tokens preemptions aborted errors steps"
        drafts = "spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens"
        self.totals = dict.fromkeys(f"{counters} {drafts}".split(), 0)
        # Shared with other threads, under the condition's lock; live: request_id -> number of replies not finished
        self.condition = threading.Condition()
        self.inbox, self.to_abort, self.live = [], set(), {}
        self.calls = []  # (function, its Future) for between two steps
        self.thread, self.closing, self.stopped = None, False, False

    # ---------------------------------------------------------------- called from any thread

    def submit(self, request: Request, on_output: Callable) -> None:
        """Queue a request; on_output(TokenOutput) is called from the engine's thread for each token of each reply.

        UserError, or one of its kinds above, where the request cannot be served.
        """
        params, prompt = request.params, request.prompt_ids
        params.check()
        if not len(prompt):
            raise UserError("prompt: empty; at least one token is needed")
        if min(prompt) < 0 or max(prompt) >= self.runner.vocab_size:
            raise UserError(f"prompt: ids must be between 0 and {self.runner.vocab_size - 1}")
        if len(prompt) >= self.max_model_len:
            limit = f"at most {self.max_model_len - 1} fit, with one new token, in {self.max_model_len}"
            raise PromptTooLong(f"prompt: {len(prompt)} tokens; {limit}")
        with self.condition:
            if self.closing:
                raise ShuttingDown("the server is shutting down")
            if request.adapter is not None and request.adapter not in self.adapters:  # here, as they come and go
                names = ", ".join(self.adapters) or "none"
                raise UnknownAdapter(f"adapter: {request.adapter!r} is not loaded; loaded are {names}")
            if len(self.inbox) + len(self.waiting) >= self.max_queue:
                raise QueueFull(f"{self.max_queue} replies are already waiting; try again later")
            if request.request_id in self.live:
                raise UserError(f"request_id: {request.request_id!r} is already running")
            self.live[request.request_id] = params.n
            self._add_sequences(request, on_output)
            self.totals["requests"] += 1
            self.totals["prompt_tokens"] += len(prompt)
            self.condition.notify_all()

    def _add_sequences(self, request, on_output):
        """Put the request's n sequences into the inbox."""
        params, num_virtual_tokens = request.params, self.runner.num_virtual_tokens
        tokens = [-1] * num_virtual_tokens + list(request.prompt_ids)
        seed = int(self.seeds.integers(1 << 62)) if params.seed is None else params.seed
        # Cached keys and values depend on more than the tokens: on the rotation and on the adapter.
        rotation = self.runner.hash_seed(len(tokens)) if self.pool.reuse else 0
        hash_seed = hashlib.blake2b(f"{rotation} {request.adapter or ''}".encode(), digest_size=16).digest()
        leader, after = None, request.prompt_ids if request.continues_prompt else ()
        for index in range(params.n):
            sequence = Sequence(
                tokens=list(tokens),
                num_prompt_tokens=len(tokens),
                adapter=request.adapter,
                is_seeded=params.seed is not None,
                request=request,
                index=index,
                arrival=next(self.arrivals),
                on_output=on_output,
                leader=leader,
                sampler=Sampler(params, index, self.stop_ids, seed),
                detokenizer=Detokenizer(self.tokenizer, params.stop, params.skip_special_tokens, after),
                num_virtual_tokens=num_virtual_tokens,
                block_hashes=[hash_seed],
            )
            leader = leader or sequence
            self.inbox.append(sequence)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; unknown or finished ones are ignored."""
        with self.condition:
            if request_id in self.live:
                self.to_abort.add(request_id)
                self.condition.notify_all()

    def between_steps(self, function: Callable) -> concurrent.futures.Future:
        """function() in the engine's thread, while no step is computed; without a thread, in the next step()."""
        future = concurrent.futures.Future()
        with self.condition:
            self.calls.append((function, future))
            self.condition.notify_all()
        return future

    def uses_adapter(self, name: str) -> bool:
        """Whether a reply that is not finished needs the adapter. In the engine's thread."""
        with self.condition:
            return any(s.adapter == name for s in (*self.running, *self.waiting, *self.inbox))

    def weights_changed(self) -> None:
        """The model's weights were updated in place: keys and values in the pool are of the old ones.

        UserError while requests are running: their replies would be of two models.
        """
        if self.running or self.waiting or self.inbox:
            raise UserError("the weights were updated while the engine was answering requests; let them finish first")
        self.pool.reset_prefix_cache()

    def stats(self) -> dict[str, int]:
        """blocks_free includes blocks_cached."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting) + len(self.inbox),
            "blocks_total": self.pool.num_blocks,
            "blocks_free": len(self.pool.free),
            "blocks_cached": self.pool.num_cached,
            **{f"{name}_total": value for name, value in self.totals.items()},
        }

    # ---------------------------------------------------------------- one step

    def step(self) -> bool:
        """Schedule, compute one batch, deliver its tokens. False: there was nothing to do."""
        self._take_inbox()
        scheduled = self._schedule()
        if not scheduled:
            assert not self.running and not self.waiting, "nothing was scheduled while sequences wait"
            return False
        drafts = self._draft(scheduled) if self.speculator is not None else {}
        rows, first = rows_of(scheduled, drafts)
        logits = self.runner.run(rows)
        if self.speculator is not None:
            self.speculator.computed([tokens for tokens in scheduled if tokens.sequence.phase == PREFILL])
        self.totals["steps"] += 1
        self._advance(scheduled, drafts, logits, first)
        return True

    def _take_inbox(self):
        with self.condition:
            calls, self.calls = self.calls, []
        for function, future in calls:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # its caller's
                    future.set_exception(error)
        with self.condition:
            self.waiting += self.inbox
            self.inbox.clear()
            aborted, self.to_abort = self.to_abort, set()
        self.totals["aborted"] += len(aborted)
        for sequence in [s for s in (*self.running, *self.waiting) if s.request.request_id in aborted]:
            self._finish(sequence, "abort")

    def _schedule(self):
        """The tokens of this step: one of every decoding sequence, then pieces of prompts, the oldest first."""
        scheduled, preempted = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(scheduled)
        if scheduled and self.runner.chunked_prefill:
            budget = min(budget, self.chunked_prefill_size)  # so that the replies need not wait long for this step
        for sequence in [s for s in self.running if s.phase == PREFILL]:
            budget -= self._add_prefill(scheduled, sequence, budget)
        chunked, skipped = self.runner.chunked_prefill, []  # skipped: waiting for their leader to compute the prompt
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and not preempted:
            sequence = self.waiting[0]
            leader = sequence.leader
            if chunked and leader and leader.phase in (WAITING, PREFILL) and not sequence.num_new_tokens:
                skipped.append(self.waiting.popleft())
                continue
            if not chunked and len(sequence.tokens) > budget and any(tokens.count > 1 for tokens in scheduled):
                break  # a whole prompt beyond the budget is the only prompt of its step
            if not self._admit(sequence):
                break
            budget -= self._add_prefill(scheduled, sequence, budget)
        self.waiting.extendleft(reversed(skipped))
        return scheduled

    def _schedule_decodes(self):
        """([one token of every decoding sequence], whether a sequence was preempted to make room for them)"""
        scheduled, size, preempted = [], self.pool.block_size, False
        for sequence in [s for s in self.running if s.phase == DECODE]:
            while sequence.phase == DECODE and len(sequence.blocks) * size <= sequence.num_computed_tokens:
                if self.pool.free:
                    sequence.blocks.append(self.pool.allocate())
                else:
                    self._preempt(max(self.running, key=lambda s: s.arrival))
                    preempted = True
            if sequence.phase == DECODE:
                scheduled.append(ScheduledTokens(sequence, sequence.num_computed_tokens, 1))
        return scheduled, preempted

    def _draft(self, scheduled):
        """{decoding sequence: ids that may come next}, where the step and the pool have room for them."""
        room = self.max_num_batched_tokens - sum(tokens.count for tokens in scheduled)
        sequences, limits = [tokens.sequence for tokens in scheduled if tokens.sequence.phase == DECODE], []
        for sequence in sequences:
            limit = min(self.speculator.max_draft_tokens, room, self._tokens_left(sequence) - 1)
            while len(sequence.blocks) * self.pool.block_size < len(sequence.tokens) + limit:
                if len(self.pool.free) <= self.watermark:
                    limit = len(sequence.blocks) * self.pool.block_size - len(sequence.tokens)
                    break
                sequence.blocks.append(self.pool.allocate())
            room -= max(0, limit)
            limits.append(limit)
        drafts = {s: draft for s, draft in zip(sequences, self.speculator.propose(sequences, limits)) if draft}
        for sequence, draft in drafts.items():
            sequence.num_draft_tokens += len(draft)
        self.totals["spec_decode_num_drafts"] += len(drafts)
        self.totals["spec_decode_num_draft_tokens"] += sum(map(len, drafts.values()))
        return drafts

    def _tokens_left(self, sequence):
        """The most tokens that the reply may still get."""
        text_length = len(sequence.tokens) - sequence.num_virtual_tokens
        return min(sequence.request.params.max_tokens - sequence.num_new_tokens, self.max_model_len - text_length)

    def _add_prefill(self, scheduled, sequence, budget):
        """Schedule a prompt's next tokens within the budget (all, if the runner takes no pieces); returns how many."""
        count = len(sequence.tokens) - sequence.num_computed_tokens
        if self.runner.chunked_prefill:
            count = min(count, budget)
            if sequence.is_seeded:
                left = sequence.num_prompt_tokens - sequence.num_computed_tokens
                count = min(count, max(0, left) + self.max_num_seqs)  # each token of a reply is a row of logits
                count -= left - count == 1  # no single token at the end
                count = 0 if count == 1 < left and scheduled else count
        if count > 0:
            scheduled.append(ScheduledTokens(sequence, sequence.num_computed_tokens, count))
        return count

    def _admit(self, sequence):
        """Give the first of the queue its blocks; False if not enough are free.

        Cached full blocks are shared, but never all of the sequence: its last token must be computed for its logits.
        """
        assert sequence is self.waiting[0] and sequence.phase == WAITING and not sequence.blocks
        size, length = self.pool.block_size, len(sequence.tokens)
        shareable = (length - 1) // size
        if sequence.is_seeded:
            shareable = max(0, sequence.num_prompt_tokens - 2) // size
        self._extend_block_hashes(sequence, shareable)
        shared = self.pool.match_prefix(sequence.block_hashes[1 : 1 + shareable], sequence.is_seeded)
        missing = -(-length // size) - len(shared)
        if missing > len(self.pool.free) - (self.watermark if self.running else 0):
            self.pool.release(shared)
            return False
        self.waiting.popleft()
        sequence.blocks = shared + [self.pool.allocate() for _ in range(missing)]
        sequence.num_computed_tokens = len(shared) * size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = max(0, sequence.num_computed_tokens - sequence.num_virtual_tokens)
            self.totals["cached_tokens"] += sequence.num_cached_tokens
            sequence.admitted = time.monotonic()
        if sequence.num_computed_tokens < sequence.num_virtual_tokens:
            self.runner.fill_prefix(sequence, sequence.num_computed_tokens)
            sequence.num_computed_tokens = sequence.num_virtual_tokens
        sequence.phase = PREFILL
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)
        return True

    def _extend_block_hashes(self, sequence, num_blocks):
        """Hash the first num_blocks blocks, whose tokens are all known."""
        size, hashes = self.pool.block_size, sequence.block_hashes
        for i in range(len(hashes) - 1, num_blocks if self.pool.reuse else 0):
            hashes.append(self.pool.block_hash(hashes[i], sequence.tokens[i * size : (i + 1) * size]))

    def _preempt(self, sequence):
        """Back to the head of the queue, with its tokens and random state; its keys and values are computed again."""
        self._release(sequence)
        self.running.remove(sequence)
        sequence.phase, sequence.num_computed_tokens = WAITING, 0
        self.waiting.appendleft(sequence)
        self.totals["preemptions"] += 1

    def _release(self, sequence):
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self.runner.release(sequence)
        if self.speculator is not None:
            self.speculator.release(sequence)

    def _advance(self, scheduled, drafts, logits, first):
        """Count the computed tokens; where a sequence is computed to its end, append the next one, and those after it
        while they are what was drafted. logits (rows, V): first[i] is the row of scheduled[i], then those of its draft.
        """
        ended = []  # [(sequence, row of its logits, draft)]
        for (sequence, _, count), row in zip(scheduled, first):
            draft = drafts.get(sequence, ())
            self._count_computed(sequence, count)
            if sequence.num_computed_tokens == len(sequence.tokens):
                sequence.phase = DECODE
                ended.append((sequence, row, draft))
        place = 0  # in the drafts
        while ended:
            rows, sequences = [row + place for _, row, _ in ended], [sequence for sequence, _, _ in ended]
            part = logits if len(rows) == len(logits) else logits[rows]
            choices, accepted = choose_batch([s.sampler for s in sequences], part, [s.tokens for s in sequences]), []
            for (sequence, row, draft), choice in zip(ended, choices):
                if choice.token_id < 0:
                    name = sequence.request.request_id
                    print(f"request {name}: the logits are not finite", file=sys.stderr, flush=True)
                    self._finish(sequence, "error")
                    continue
                if place < len(draft) and choice.token_id == draft[place]:
                    self._accept(sequence)
                    accepted.append((sequence, row, draft))
                self._append(sequence, *choice)
            ended, place = [entry for entry in accepted if entry[0].phase == DECODE], place + 1
            for sequence, _, _ in ended:
                self._count_computed(sequence, 1)

    def _accept(self, sequence):
        sequence.num_accepted_tokens += 1
        self.totals["spec_decode_num_accepted_tokens"] += 1

    def _count_computed(self, sequence, count):
        """Add to the computed tokens, and let others share the blocks that are full now."""
        size = self.pool.block_size
        full_before = sequence.num_computed_tokens // size
        sequence.num_computed_tokens += count
        full = sequence.num_computed_tokens // size
        if full > full_before and self.pool.reuse:
            self._extend_block_hashes(sequence, full)
            may_be_exact = sequence.is_seeded or self.runner.is_row_invariant
            for i in range(full_before, full):
                is_exact = (i + 1) * size <= sequence.num_prompt_tokens and may_be_exact
                self.pool.cache_block(sequence.blocks[i], sequence.block_hashes[i + 1], is_exact)

    def _append(self, sequence, token, logprob, top_logprobs, entropy):
        """Add a new token, deliver the text that is final with it, and end the reply if this is its last."""
        params, sampler, detokenizer = sequence.request.params, sequence.sampler, sequence.detokenizer
        sequence.tokens.append(token)
        self.totals["generation_tokens"] += 1
        may_stop = sequence.num_new_tokens >= params.min_tokens
        text_length = len(sequence.tokens) - sequence.num_virtual_tokens
        full = sequence.num_new_tokens >= params.max_tokens or text_length >= self.max_model_len
        if may_stop and token in sampler.stop_ids:
            text, reason = detokenizer.flush()[0], "stop"
        else:
            text, stopped = detokenizer.push(token, may_stop)
            if full and not stopped:
                rest, stopped = detokenizer.flush(may_stop)
                text += rest
            reason = "stop" if stopped else sampler.guide_ends() or ("length" if full else None)
            if reason and not (stopped or full):
                text += detokenizer.flush()[0]
        output = TokenOutput(
            sequence.index,
            token,
            text,
            logprob,
            top_logprobs,
            entropy,
            cached_tokens=sequence.num_cached_tokens,
            draft_tokens=sequence.num_draft_tokens,
            accepted_tokens=sequence.num_accepted_tokens,
            stop_text=detokenizer.stop_text,
        )
        if reason is None:
            self._deliver(sequence, output)
        else:
            self._finish(sequence, reason, output)

    def _finish(self, sequence, reason, output=None):
        if sequence.phase == DONE:
            return
        if sequence.phase == WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)
        sequence.phase = DONE
        with self.condition:
            name = sequence.request.request_id
            self.live[name] -= 1
            if not self.live[name]:
                del self.live[name]
        output = output or TokenOutput(
            sequence.index,
            cached_tokens=sequence.num_cached_tokens or 0,
            draft_tokens=sequence.num_draft_tokens,
            accepted_tokens=sequence.num_accepted_tokens,
        )
        output.finish_reason = reason
        self._deliver(sequence, output)

    def _deliver(self, sequence, output):
        output.admitted = sequence.admitted
        try:
            sequence.on_output(output)
        except Exception:  # of the caller's function, any: the other requests go on
            traceback.print_exc()
            self.abort(sequence.request.request_id)

    # ---------------------------------------------------------------- the thread

    def start(self) -> None:
        """Begin a thread that calls step()."""
        assert self.thread is None, "the engine's thread is already running"
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.thread.start()

    def _loop(self):
        while True:
            with self.condition:
                self.condition.wait_for(
                    lambda: self.inbox or self.to_abort or self.calls or self.running or self.waiting or self.stopped
                )
                if self.stopped:
                    return
            try:
                self.step()
            except Exception:  # any: without this thread no request would end; the next ones may well succeed
                traceback.print_exc()
                self._fail()

    def _fail(self):
        """After a failed step: end the running sequences with "error", since their keys and values may be wrong."""
        failed = list(self.running) or list(self.waiting)
        self.totals["errors"] += len(failed)
        for sequence in failed:
            self._finish(sequence, "error")
        self.pool.reset_prefix_cache()

    def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        """Refuse new requests; drain: finish the others, for at most `timeout` seconds; abort what is left."""
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

    def generate(self, requests: Iterable[Request], progress: Callable | None = None) -> list:
        """Requests, or an iterator that is read as there is room -> for each the list of its n Completions.

        progress(i, completions) is called as soon as request i is complete, and its result is returned in their place.
        """
        requests, finished, results, unfinished = enumerate(requests), queue.SimpleQueue(), {}, 0
        pending, room = next(requests, None), min(self.max_num_seqs, self.max_queue)
        while pending is not None or unfinished:
            while pending is not None and len(self.waiting) + len(self.inbox) < room:
                i, request = pending
                self.submit(request, _Collector(i, request, finished))
                unfinished, pending = unfinished + 1, next(requests, None)
            if self.thread is None:
                self.step()
            elif not unfinished:
                time.sleep(0.001)  # the queue is full of others' requests
            while unfinished and (self.thread is not None or not finished.empty()):
                i, completions = finished.get()
                unfinished -= 1
                results[i] = completions if progress is None else progress(i, completions)
                if self.thread is not None:
                    break
        return [results[i] for i in range(len(results))]

    def stream(self, request: Request) -> Iterator[TokenOutput]:
        """The request's TokenOutputs as they come; closing the iterator aborts the request."""
        outputs, unfinished = queue.SimpleQueue(), request.params.n
        self.submit(request, outputs.put)
        try:
            while unfinished:
                while self.thread is None and outputs.empty():
                    self.step()
                output = outputs.get()
                unfinished -= output.finish_reason is not None
                yield output
        finally:
            self.abort(request.request_id)
            if self.thread is None:
                self._take_inbox()


class _Collector:
    """on_output of generate(): puts (i, completions) into `finished` when all n replies are."""

    def __init__(self, i, request, finished):
        n, prompt, scaled = request.params.n, len(request.prompt_ids), request.params.scaled_logprobs
        wanted = scaled or request.params.logprobs is not None
        self.i, self.unfinished, self.finished = i, n, finished
        self.completions = [
            Completion("", [], None, [] if wanted else None, prompt, 0, [] if scaled else None) for _ in range(n)
        ]

    def __call__(self, output):
        c = self.completions[output.index]
        c.text += output.text
        c.cached_tokens = output.cached_tokens
        c.draft_tokens, c.accepted_tokens = output.draft_tokens, output.accepted_tokens
        if output.token_id is not None:
            c.token_ids.append(output.token_id)
            if c.logprobs is not None:
                c.logprobs.append((output.logprob, output.top_logprobs))
            if c.entropies is not None:
                c.entropies.append(output.entropy)
        if output.finish_reason is not None:
            c.finish_reason = output.finish_reason
            self.unfinished -= 1
            if self.unfinished == 0:
                self.finished.put((self.i, self.completions))
