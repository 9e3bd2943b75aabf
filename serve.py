"""Answer prompts: one engine with continuous batching behind a terminal, a file of prompts, or an HTTP server.

    python serve.py configs/llama_serve.json                                  # OpenAI's HTTP interface and a page to chat
    python serve.py configs/llama_serve.json --prompt "type#dress*color#red"   # one reply, as it is written
    python serve.py configs/llama_serve.json --data_file in.jsonl --output_file out.jsonl
    python serve.py configs/llama_serve.json --benchmark

Opens full, merged, quantized, LoRA and prefix-tuned folders; `lora_path "name=path,name2=path2"` serves several adapters of
one base, chosen by each request. `mode: static` runs what export.py wrote with `format: static`.

The engine: requests join and leave at every step; a step computes one token of every running sequence and, with what is
left of `max_num_batched_tokens`, pieces of new prompts. Keys and values lie in a pool of blocks (Kwon et al., arXiv
2309.06180); identical full blocks are kept once; when the pool runs dry the youngest sequence waits and is computed again.
The pool may be int8 (`cachekv_int8_type dynamic`), a quarter of the memory. Not here: beam search, speculative decoding,
more than one process.
"""

import asyncio
import base64
import bisect
import collections
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import http
import itertools
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import kernels  # before paddle: it silences what paddle says while it is imported

import numpy as np
import paddle
from tqdm import tqdm

import trainer
from data import (
    UserError,
    brief,
    fit_prompt,
    load_chat_template,
    load_tokenizer,
    numbered_lines,
    parse_json_line,
    record_rounds,
)
from model import (
    CausalLM,
    LoRALinear,
    ModelConfig,
    SparseMLP,
    from_pretrained,
    linears,
    load_adapter,
    lora_layers,
    penalize,
    read_safetensors,
    stretch,
    turning_lengths,
    two_positions_of,
)

# ================================================================== 1. arguments


@dataclasses.dataclass
class Args(trainer.ScriptArgs):
    model_name_or_path: str = ""  # folder of the model: full, merged, quantized, an adapter's, or of export.py (static)
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    lora_path: str | None = None  # an adapter's folder, or several: "name=folder,name2=folder2"
    prefix_path: str | None = None  # folder of a trained prefix
    mode: str = "dynamic"  # dynamic: model.py and a pool of blocks; static: the graph that export.py wrote
    chat_template: str | None = (
        None  # a name of data.FORMATS, plain, none, a chat_template.json or .jinja; None: the model's own
    )
    src_length: int | None = None  # most tokens of a prompt; None: total_max_length - max_length
    max_length: int = 1024  # most new tokens of a reply
    min_length: int = 1  # fewest
    total_max_length: int = 4096  # most tokens of prompt and reply; never more than the model's positions
    decode_strategy: str = "sampling"  # or greedy_search, which is temperature 0
    temperature: float = 0.95
    top_k: int = 0  # sample among so many likeliest; 0: all
    top_p: float = 0.7  # sample among the likeliest whose probabilities sum to it
    repetition_penalty: float = 1.0
    batch_size: int = 16  # most sequences at once
    block_size: int = 16  # tokens of a block of the pool
    num_blocks: int | None = None  # blocks of the pool; None: what kv_cache_gb holds, but no more than can be in use
    kv_cache_gb: float = 1.0  # memory of the pool
    cachekv_int8_type: str | None = None  # dynamic: the pool in int8 with a scale a token and head; None: float32
    max_num_batched_tokens: int = 512  # most tokens of one step; longer prompts are computed in pieces
    max_queue: int = 256  # most sequences waiting; more are refused
    prompt: str | None = None  # answer this and exit
    data_file: str | None = None  # answer every {"src", "tgt"} line of this file
    output_file: str = "output.json"  # into this one, as {"src", "tgt", "output"}; lines already there are kept
    benchmark: bool = False  # print time to first token and tokens/s by batch size, and exit
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8011
    api_key: str | None = None  # what clients must send as "Authorization: Bearer KEY"; None: nothing
    served_model_name: str | None = None  # what clients call the model; None: the last part of its path
    request_timeout: float = 600.0  # seconds a request may take
    max_body_bytes: int = 1 << 20  # of a request
    read_timeout: float = 30.0  # seconds in which a request must have arrived, and an idle connection is kept
    write_timeout: float = 30.0  # seconds in which a client must take what is waiting for it
    drain_timeout: float = 60.0  # seconds that running requests have to finish after SIGTERM
    max_connections: int = 256  # at once

    def check(self):
        notes = super().check()
        if not self.model_name_or_path:
            raise UserError("model_name_or_path: missing")
        for key, choices in (
            ("mode", ("dynamic", "static")),
            ("decode_strategy", ("sampling", "greedy_search")),
            ("cachekv_int8_type", (None, "dynamic")),
        ):
            if getattr(self, key) not in choices:
                raise UserError(f"{key}: {getattr(self, key)!r}; possible are {', '.join(filter(None, choices))}")
        positive = "max_length total_max_length batch_size block_size max_num_batched_tokens max_queue max_body_bytes"
        for key in f"src_length num_blocks {positive} max_connections".split():
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key)}; it must be at least 1")
        for key in ("kv_cache_gb", "request_timeout"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}: {getattr(self, key)}; it must be positive")
        if not 0 <= self.port < 65536:
            raise UserError(f"port: {self.port}; it must be between 0 (any free one) and 65535")
        if self.lora_path and self.prefix_path:
            raise UserError("lora_path and prefix_path are both given; choose one")
        if self.mode == "static" and (self.lora_path or self.prefix_path):
            raise UserError("mode: static has its weights in the graph; export the merged model instead of an adapter")
        if self.mode == "static" and self.cachekv_int8_type:
            raise UserError("mode: static keeps keys and values in float32; cachekv_int8_type is for dynamic")
        if sum(map(bool, (self.prompt, self.data_file, self.benchmark))) > 1:
            raise UserError("prompt, data_file and benchmark are different ways to run; give one")
        if self.data_file and not Path(self.data_file).is_file():
            raise UserError(f"data_file: {self.data_file}: no such file")
        self.sampling().check()
        return notes

    def sampling(self):
        """The SamplingParams of the offline modes; over HTTP, what a request leaves out is OpenAI's default."""
        greedy = self.decode_strategy == "greedy_search"
        return SamplingParams(
            max_tokens=self.max_length,
            min_tokens=min(self.min_length, self.max_length),
            temperature=0.0 if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


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
class Output:
    """One token of one of the n replies. Its text may be "" while half a character or a possible stop text is held back."""

    index: int  # 0..n-1
    token_id: int | None = None  # None: the reply ended without one (abort, error)
    text: str = ""
    logprob: float | None = None  # of the distribution as the model gives it: before penalties and temperature
    top_logprobs: list | None = None  # [(token_id, logprob)], the likeliest first
    finish_reason: str | None = None  # stop, length, abort, error: on the last Output of a reply
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
        (token,) = draw([self], self.adjusted(logits, seen)[None])
        return token, *self.report(logits, token)

    def adjusted(self, logits, seen):
        """The same with penalties and bans; logits themselves where there are none."""
        p = self.params
        if p.repetition_penalty != 1.0:
            logits = penalize(logits[None], np.array([seen]), np.ones((1, len(seen)), np.int64), p.repetition_penalty)[
                0
            ]
        if (p.presence_penalty or p.frequency_penalty) and self.counts:
            ids, counts = (np.array(list(part)) for part in (self.counts.keys(), self.counts.values()))
            logits = logits.copy()
            logits[ids] -= (p.presence_penalty + p.frequency_penalty * counts).astype(np.float32)
        if self.stops and self.counts.total() < p.min_tokens:
            logits = logits.copy()
            logits[[i for i in self.stops if i < len(logits)]] = -np.inf
        return logits

    def report(self, logits, token):
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


def draw(samplers, logits):
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


class TextStream:
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
        self.keys = [None] * num_blocks  # the chain key of a block whose tokens are known
        self.known = {}  # chain key -> block
        self.cached = 0  # free blocks that are known
        self.free = collections.OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first

    def chain(self, parent, tokens):
        """The key of a block: a digest of all tokens up to its end, and of what `parent` says of their beginning."""
        return hashlib.blake2b(np.array(tokens, np.int64).tobytes(), key=parent, digest_size=16).digest()

    def match(self, keys):
        """Take the longest run of cached blocks with these keys: their list."""
        blocks = []
        for key in keys if self.reuse else ():
            block = self.known.get(key)
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
        if self.keys[block] is not None:
            del self.known[self.keys[block]]
            self.keys[block] = None
            self.cached -= 1
        self.counts[block] = 1
        return block

    def publish(self, block, key):
        """The block is full and computed: others may share it. The first of several equal ones is the one that is found."""
        if self.reuse and key not in self.known:
            self.known[key], self.keys[block] = block, key

    def release(self, blocks):
        """Give back a sequence's blocks. The last goes first: without its parent a block would never be found again."""
        for block in reversed(blocks):
            self.counts[block] -= 1
            assert self.counts[block] >= 0, f"block {block} was released twice"
            if self.counts[block] == 0:
                self.free[block] = None
                if self.keys[block] is None:
                    self.free.move_to_end(block, last=False)  # empty ones are taken before cached ones
                else:
                    self.cached += 1

    def forget(self):
        """Nothing cached is to be found again."""
        self.known.clear()
        self.keys, self.cached = [None] * self.num_blocks, 0


# ================================================================== 5. sequences


WAITING, PREFILL, DECODE, DONE = "waiting", "prefill", "decode", "done"  # stored, never derived from lengths


class Sequence:
    """One of the n replies of a request, from the queue to its end."""

    def __init__(self, request, index, arrival, on_output, leader, sampler, text, virtual, root):
        self.request, self.index, self.arrival, self.on_output = request, index, arrival, on_output
        self.leader = leader  # the sequence of the same request whose prompt this one waits to share, or None
        self.sampler, self.text = sampler, text
        self.virtual = virtual  # tokens of a trained prefix in front, as -1
        self.tokens = [-1] * virtual + list(request.prompt_ids)  # and then the reply's
        self.prompt_end = len(self.tokens)
        self.phase = WAITING
        self.computed = 0  # tokens whose keys and values are in the blocks
        self.blocks = []
        self.keys = [root]  # chain keys: the root and one for each full block
        self.cached_tokens = None  # set when first admitted

    @property
    def generated(self):
        return len(self.tokens) - self.prompt_end


class Chunk(NamedTuple):
    """What a step computes of one sequence: tokens[start : start + count]."""

    sequence: Sequence
    start: int
    count: int


# ================================================================== 6. the model on a pool of blocks

NEVER = np.iinfo(np.int32).max  # the mask row from which a key is hidden; 0 (of one column): hidden from all


class AdapterLinear(paddle.nn.Layer):
    """A linear and LoRAs around it: each applied to its own slice of the step's tokens."""

    def __init__(self, base, loras, slices):
        super().__init__()
        self.base, self.by_name, self.loras = base, dict(loras), paddle.nn.LayerList(loras.values())
        self.slices = slices  # [(adapter name or None, first token, end)], the runner's list, set before each step

    def forward(self, x, residual=None):
        """x (1, N, in) -> (1, N, out), residual added if given"""
        layers = [(self.by_name.get(name, self.base), a, b) for name, a, b in self.slices]
        if len(layers) == 1:
            return layers[0][0](x, residual)
        y = paddle.concat([layer(x[:, a:b]) for layer, a, b in layers], axis=1)
        return y if residual is None else residual + y


class PagedRunner:
    """Computes chunks with model.py and keeps their keys and values in blocks.

    run(chunks) -> (chunks, V) float32 numpy: the logits after each chunk's last token. The tokens of all chunks are one
    row of the model; only attention knows sequences, through attend(). A token is rotated as model.generate does it, for the
    length of its prompt and, with dynamic rope, of the reply up to it; so are those that are computed again.

    With two positions (rope_2d) the tokens of a prompt see those behind them as well: it must come whole, and its blocks
    are like no other prompt's.
    """

    def __init__(self, model, num_blocks, block_size, adapters=None, int8=False):
        model.eval()
        c, self.model, self.block_size = model.config, model, block_size
        self.config, self.vocab_size, self.max_positions = c, c.vocab_size, c.most_tokens
        self.chunked = c.position != "rope_2d"  # a prompt may come in pieces, and share blocks
        self.prefix_tokens = 0  # of the text's positions: they are given with the virtual tokens counted
        self.virtual = model.prefix.tokens if model.prefix is not None else 0
        shape = [num_blocks, block_size, c.num_key_value_heads, c.head_dim]
        kind, layers = "int8" if int8 else "float32", range(c.num_hidden_layers)
        self.pools = [(paddle.zeros(shape, kind), paddle.zeros(shape, kind)) for _ in layers]  # keys, values of a layer
        self.scales = [(paddle.zeros(shape[:3]), paddle.zeros(shape[:3])) if int8 else (None, None) for _ in layers]
        self.slices = []
        self.adapters = self._load_adapters(adapters or {})
        # Of the step being computed:
        self.slots = self.tables = self.query_lengths = self.context_lengths = self.lengths = None
        self.wholes = []  # prompts whose attention is not causal: (first, end, slots, rows)
        self.others = self.order = None  # the other tokens with their tables and lengths; where each token's output is
        self.last_positions = {}  # sequence -> (2,) of its prompt's last token, for rope_2d

    @staticmethod
    def block_bytes(config, block_size, int8=False):
        of_head = config.head_dim + 4 if int8 else 4 * config.head_dim
        return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * of_head

    def root(self, prompt):
        """What keys and values depend on besides the tokens, where a prompt has so many."""
        return stretch(self.config, prompt)

    def _load_adapters(self, paths):
        """{name: folder} -> names. Their LoRALinears share the one base layer."""
        found = collections.defaultdict(dict)  # module path -> {name: LoRALinear}
        for name, path in paths.items():
            load_adapter(self.model, path)
            if self.model.prefix is not None:
                raise UserError(f"lora_path: {path} holds a prefix; give it as prefix_path")
            for module, layer in lora_layers(self.model).items():
                found[module][name] = layer
            for parent, attribute, layer in linears(self.model).values():
                if isinstance(layer, LoRALinear):
                    setattr(parent, attribute, layer.base)
        for module, (parent, attribute, base) in linears(self.model).items():
            if module in found:
                setattr(parent, attribute, AdapterLinear(base, found[module], self.slices))
        for mlp in self.model.sublayers():
            layers = mlp.experts.sublayers() if isinstance(mlp, SparseMLP) else ()
            if any(isinstance(layer, AdapterLinear) for layer in layers):
                mlp.mix = functools.partial(self._mix_slices, mlp)
        self.model.eval()
        return list(paths)

    def _mix_slices(self, mlp, *routed):
        """SparseMLP.mix, one adapter's tokens after another's: inside, tokens stand in the order of their experts."""
        slices, mixed = list(self.slices), []
        for name, first, end in slices:
            self.slices[:] = [(name, first, end)]
            mixed.append(SparseMLP.mix(mlp, *(x[first:end] for x in routed)))
        self.slices[:] = slices
        return paddle.concat(mixed)

    @paddle.no_grad()
    def run(self, chunks):
        order = list(range(len(chunks)))
        if self.adapters:  # each adapter's tokens become one slice
            order.sort(key=lambda i: chunks[i].sequence.request.adapter or "")
            self._set_slices([chunks[i] for i in order])
        ordered = [chunks[i] for i in order]
        ids = self._prepare(ordered)
        x = self.model.hidden_states(ids, self.positions, caches=self)[0]  # (N, D)
        if len(chunks) < x.shape[0]:
            x = paddle.gather(x, kernels.to_tensor(self.query_lengths.cumsum() - 1))  # (chunks, D)
        logits = self.model.logits(x).astype("float32").numpy()
        return logits[np.argsort(order)] if self.adapters else logits

    def _prepare(self, chunks):
        """Ids (1, N), and on self the positions (1, N), slots (N,), block tables and lengths of the step."""
        size, counts = self.block_size, [chunk.count for chunk in chunks]
        starts = np.array([chunk.start for chunk in chunks])
        self.query_lengths = np.array(counts)
        self.context_lengths = starts + self.query_lengths
        self.tables = np.zeros((len(chunks), -(-int(self.context_lengths.max()) // size)), np.int32)
        ids = []
        for row, chunk in enumerate(chunks):
            end = chunk.start + chunk.count
            ids += chunk.sequence.tokens[chunk.start : end]
            blocks = chunk.sequence.blocks[: -(-end // size)]
            self.tables[row, : len(blocks)] = blocks
        for array in (self.tables, self.query_lengths, self.context_lengths):
            array.flags.writeable = False  # so that the layers after the first know them again
        rows = np.repeat(np.arange(len(chunks)), counts)
        firsts = np.repeat(self.query_lengths.cumsum() - counts, counts)
        positions = np.arange(len(ids)) - firsts + starts[rows]
        self.slots = kernels.to_tensor(self.tables[rows, positions // size].astype(np.int64) * size + positions % size)
        ends = [chunk.sequence.prompt_end for chunk in chunks]
        lengths = [turning_lengths(self.config, end, positions[rows == row]) for row, end in enumerate(ends)]
        self.lengths = None if lengths[0] is None else kernels.to_tensor(np.concatenate(lengths)[None])
        if not self.chunked:
            positions = self._two_positions(chunks)  # (N, 2)
        self.positions = kernels.to_tensor(positions[None])
        return kernels.to_tensor(np.array([ids], np.int64))

    def _two_positions(self, chunks):
        """(N, 2) of all tokens; `wholes` are the prompts among the chunks, with the replies that they had before."""
        self.wholes, found, end = [], [], 0
        for row, (sequence, start, count) in enumerate(chunks):
            end += count
            if start > self.virtual:
                step = start - sequence.prompt_end + 1
                found.append(self.last_positions[sequence] + np.array([[0, step]]))
                continue
            prompt, context = sequence.prompt_end - self.virtual, np.arange(self.virtual + count)
            positions, rows = two_positions_of(self.config, sequence.tokens[self.virtual :], prompt)
            self.last_positions[sequence] = positions[prompt - 1]
            seen = np.broadcast_to(np.array([NEVER, 0], np.int32), (1, 1, self.virtual, 2))  # the prefix, by every row
            rows = np.concatenate([seen, rows + np.minimum(self.virtual, NEVER - rows)], axis=2)
            blocks = self.tables[row, context // self.block_size].astype(np.int64)
            slots = blocks * self.block_size + context % self.block_size
            self.wholes.append((end - count, end, kernels.to_tensor(slots), kernels.to_tensor(rows)))
            found.append(positions)
        whole = np.array([chunk.start == self.virtual for chunk in chunks])
        at, firsts = np.arange(end), self.query_lengths.cumsum() - self.query_lengths
        order = np.concatenate([at[first:stop] for first, stop, *_ in self.wholes] + [firsts[~whole]])
        self.order, self.others = kernels.to_tensor(order.argsort()), None
        if not whole.all():
            arrays = [array[~whole] for array in (self.tables, self.query_lengths, self.context_lengths)]
            for array in arrays:
                array.flags.writeable = False
            self.others = kernels.to_tensor(firsts[~whole]), *arrays
        return np.concatenate(found)

    def _set_slices(self, chunks):
        self.slices.clear()
        end = 0
        for name, group in itertools.groupby(chunks, lambda chunk: chunk.sequence.request.adapter):
            first, end = end, end + sum(chunk.count for chunk in group)
            self.slices.append((name, first, end))

    def attend(self, layer, q, k, v, scale=None, **options):
        """q (1, N, H, Dh), k and v (1, N, K, Dh) -> (1, N, H, Dh): keeps k and v, then reads the sequences' blocks.

        scale and options are those of kernels.paged_attention.
        """
        pool, scales = self.pools[layer], self.scales[layer]
        kernels.write_cache(k[0], v[0], *pool, self.slots, *scales)
        if self.wholes:
            return self._attend_two_ways(q, pool, scales, scale, options)
        out = kernels.paged_attention(
            q[0], *pool, self.tables, self.query_lengths, self.context_lengths, scale, *scales, **options
        )
        return out.unsqueeze(0)

    def _attend_two_ways(self, q, pool, scales, scale, options):
        """attend() of a step with whole prompts, each by itself under its mask, and with tokens of replies."""
        parts, flat = [], [part.reshape([-1, *part.shape[2:]]) for part in pool]  # (slots, K, Dh)
        for first, end, slots, rows in self.wholes:
            k, v = (paddle.gather(part, slots) for part in flat)
            if scales[0] is not None:
                of_slots = (paddle.gather(s.reshape([-1, s.shape[2]]), slots).unsqueeze(-1) for s in scales)
                k, v = (x.astype("float32") * s for x, s in zip((k, v), of_slots))
            more = {key: value for key, value in options.items() if key != "window"}  # which no such model has
            found = kernels.attention(q[:, first:end], k.unsqueeze(0), v.unsqueeze(0), rows, False, scale, **more)
            parts.append(found[0])
        if self.others is not None:
            at, *lengths = self.others
            parts.append(kernels.paged_attention(paddle.gather(q[0], at), *pool, *lengths, scale, *scales, **options))
        return paddle.gather(paddle.concat(parts), self.order).unsqueeze(0)

    @paddle.no_grad()
    def fill_prefix(self, sequence, start):
        """Write the trained prefix's keys and values from virtual token `start` on into the sequence's blocks."""
        prefix, size = self.model.prefix, self.block_size
        table = prefix.table().reshape([prefix.tokens, prefix.layers, 2, prefix.heads, prefix.head_dim])[start:]
        at = np.arange(start, prefix.tokens)
        slots = kernels.to_tensor(np.array(sequence.blocks)[at // size] * size + at % size)
        for layer in range(prefix.layers):
            kernels.write_cache(table[:, layer, 0], table[:, layer, 1], *self.pools[layer], slots, *self.scales[layer])

    def release(self, sequence):
        """The blocks are the engine's."""
        self.last_positions.pop(sequence, None)


# ================================================================== 7. the model as an exported graph

STATIC_FORMAT = 2  # of static_config.json, as export.py writes it


class StaticRunner:
    """The two programs of a folder that export.py wrote with format static, run by paddle.inference.

        runner = StaticRunner("checkpoints/llama_static")
        logits = runner.run(chunks)          # (len(chunks), V) float32: of the last token of each chunk

    Takes PagedRunner's place in the engine: chunks as there, but the first of a sequence is its whole prompt (what the
    engine preempted comes again with all its tokens) and each later one is a token. Keys and values of a sequence stay here
    until release(sequence); the engine's blocks only count them.

    A cache is padded on the left, (B, C, K, Dh) a layer and once for keys, once for values, as the decode program takes
    and gives it; while the same sequences come in the same order, its output is its next input. Prompts longer than
    CHUNK go through the decode program piece by piece, so that scores take H * CHUNK * T floats at most, and prompts
    behind a trained prefix do from the start. Each program holds the weights, so memory is twice the file.
    """

    CHUNK = 512  # tokens of one piece of a long prompt
    BATCH_TOKENS = 4096  # tokens of one batch of prompts, padding included
    chunked = False  # a prompt must come whole
    adapters = ()  # what LoRA there was is in the programs' weights

    def __init__(self, folder, device="cpu"):
        self.folder, self.config = Path(folder), _static_config(folder)
        self.vocab_size, self.layers = self.config["vocab_size"], self.config["num_hidden_layers"]
        self.virtual = self.config["prefix_tokens"]  # positions of a trained prefix, before the text's
        self.max_positions = self.config["max_model_len"] + self.virtual
        self.heads = self.config["num_key_value_heads"], self.config["head_dim"]
        self.model_config = ModelConfig.from_dict(self.config["model_config"], self.folder / "static_config.json")
        self.two = self.model_config.position == "rope_2d"
        self.piece = self.max_positions if self.two else self.CHUNK  # there a prompt's tokens see those behind them
        self.prefill_program = self._load("prefill.json", device)
        self.decode_program = self._load("decode.json", device)
        self.records = {}  # sequence -> (caches, its row in them, its tokens)
        self.last_positions = {}  # sequence -> (2,) of its prompt's last token, where there are two
        self.prefix = None
        if self.virtual:
            tensors = read_safetensors(self.folder / "prefix.safetensors")  # {"keys.0": (P, K, Dh), …}
            self.prefix = [tensors[f"{kind}.{i}"] for kind in ("keys", "values") for i in range(self.layers)]

    def _load(self, program, device):
        config = paddle.inference.Config(str(self.folder / program), str(self.folder / "static.pdiparams"))
        kind, _, index = device.partition(":")
        if kind == "gpu":
            config.enable_use_gpu(256, int(index or 0))
        elif kind == "xpu":
            config.enable_xpu()
            config.set_xpu_device_id(int(index or 0))
        elif kind != "cpu":
            config.enable_custom_device(kind, int(index or 0))
        else:
            config.disable_gpu()
            config.disable_mkldnn()  # its float32 products differ from those of training
            config.set_cpu_math_library_num_threads(len(os.sched_getaffinity(0)))
        config.disable_glog_info()
        if self.config["quantization"]:  # folded, the integers would be floats again: 93 MB instead of 22 for the demo
            config.delete_pass("constant_folding_pass")
        try:
            return paddle.inference.create_predictor(config)
        except (ValueError, RuntimeError, OSError) as error:
            versions = f"written by Paddle {self.config['paddle_version']}, this is {paddle.__version__}"
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.folder / program}: cannot be loaded ({versions}): {reason}") from None

    def run(self, chunks):
        """[chunk] -> (len(chunks), V) float32."""
        logits = np.empty((len(chunks), self.vocab_size), np.float32)
        tokens = [chunk.sequence.tokens[chunk.start : chunk.start + chunk.count] for chunk in chunks]
        prompts = [i for i, chunk in enumerate(chunks) if chunk.start == self.virtual]
        steps = [i for i, chunk in enumerate(chunks) if chunk.start != self.virtual]
        if prompts:
            logits[prompts] = self.prefill([chunks[i].sequence for i in prompts], [tokens[i] for i in prompts])
        if steps:
            for i in steps:
                held = self.records[chunks[i].sequence][2]
                assert chunks[i].start == held and chunks[i].count == 1, (
                    f"{chunks[i].count} tokens at {chunks[i].start} after {held}"
                )
            logits[steps] = self.decode([chunks[i].sequence for i in steps], [tokens[i][0] for i in steps])
        return logits

    def fill_prefix(self, sequence, start):
        """Nothing to do yet: prefill() puts the prefix before each prompt."""

    def release(self, sequence):
        """Forget the keys and values of a sequence; one that is not known is no error."""
        self.records.pop(sequence, None)
        self.last_positions.pop(sequence, None)

    def prefill(self, sequences, prompts):
        """Whole prompts, lists of ids -> (S, V) float32 of their last tokens; prompts of like length share a batch."""
        logits = np.empty((len(prompts), self.vocab_size), np.float32)
        batch, waiting = [], sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first
        while waiting:
            T = len(prompts[waiting[0]])
            alone = self.prefix is not None or T > self.piece
            batch = waiting[: 1 if alone else max(1, self.BATCH_TOKENS // T)]
            waiting = waiting[len(batch) :]
            if alone:
                logits[batch], caches = self._prefill_one(sequences[batch[0]], prompts[batch[0]])
            else:
                logits[batch], caches = self._prefill_batch([sequences[i] for i in batch], [prompts[i] for i in batch])
            for row, i in enumerate(batch):
                self.records[sequences[i]] = (caches, row, len(prompts[i]) + self.virtual)
        return logits

    def _prefill_batch(self, sequences, prompts):
        """Prompts padded on the left -> (B, V), caches."""
        B, T = len(prompts), max(map(len, prompts))
        ids, lengths = np.zeros((B, T), np.int64), np.array([len(prompt) for prompt in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, T - len(prompt) :] = prompt
        at = np.maximum(np.arange(T) - (T - lengths[:, None]), 0)
        places = at, self._rows(lengths, T)
        if self.two:
            places = self._two_positions(sequences, prompts, T)
        return self._call(self.prefill_program, [], ids, *places, self._lengths(sequences, at))

    def _prefill_one(self, sequence, prompt):
        """One prompt, after the prefix if there is one, piece by piece -> (1, V), caches."""
        caches, start, logits = [], 0, None
        if self.prefix is not None:
            caches = [array[None] for array in self.prefix]  # (1, P, K, Dh)
        while start < len(prompt):
            ids = np.array([prompt[start : start + self.piece]], np.int64)  # (1, T)
            before = start + self.virtual
            at, total = before + np.arange(ids.shape[1])[None], before + ids.shape[1]
            places = at, self._rows(np.array([total]), total)
            if self.two:
                places = self._two_positions([sequence], [prompt], len(prompt))
            program = self.decode_program if caches else self.prefill_program
            logits, caches = self._call(program, caches, ids, *places, self._lengths([sequence], at))
            start += ids.shape[1]
        return logits, caches

    def decode(self, sequences, tokens):
        """One more token of each sequence -> (S, V) float32."""
        lengths = np.array([self.records[sequence][2] for sequence in sequences])
        caches = self._gather(sequences, lengths)
        ids, positions = np.array(tokens, np.int64)[:, None], lengths[:, None]  # (B, 1): the prefix has positions too
        rows = self._rows(lengths + 1, caches[0].shape[1] + 1)
        places = positions, rows
        if self.two:
            steps = [[0, n - sequence.prompt_end + 1] for n, sequence in zip(lengths, sequences)]
            places = np.stack([self.last_positions[s] for s in sequences])[:, None] + np.array(steps)[:, None]
            places = places, np.concatenate([rows, np.zeros_like(rows)], axis=-1)
        logits, caches = self._call(self.decode_program, caches, ids, *places, self._lengths(sequences, positions))
        for row, sequence in enumerate(sequences):
            self.records[sequence] = (caches, row, int(lengths[row]) + 1)
        return logits

    def _lengths(self, sequences, positions):
        """(B, T): the lengths of turning_lengths() for tokens at these positions (B, T); None where rope takes none."""
        found = [turning_lengths(self.model_config, s.prompt_end, at) for s, at in zip(sequences, positions)]
        return None if found[0] is None else np.stack(found)

    def _two_positions(self, sequences, texts, T):
        """Positions (B, T, 2) and rows (B, 1, virtual + T, 2) of whole texts padded on the left, behind the prefix."""
        positions, before = np.zeros((len(texts), T, 2), np.int64), self.virtual
        rows = np.zeros((len(texts), 1, before + T, 2), np.int32)
        rows[:, :, :before, 0] = NEVER
        for i, (sequence, text) in enumerate(zip(sequences, texts)):
            prompt, first = sequence.prompt_end - before, T - len(text)
            positions[i, first:], own = two_positions_of(self.model_config, text, prompt)
            self.last_positions[sequence] = positions[i, first + prompt - 1]
            rows[i, :, before + first :] = own[0] + np.minimum(before + first, NEVER - own[0])
        return positions, rows

    def _gather(self, sequences, lengths):
        """The caches of these sequences as one batch, padded on the left: what the last step gave, if it still fits."""
        records, C = [self.records[sequence] for sequence in sequences], int(lengths.max())
        held = records[0][0]
        if all(caches is held and row == i for i, (caches, row, _) in enumerate(records)) and held[0].shape[:2] == (
            len(sequences),
            C,
        ):
            return held
        gathered = []
        for layer in range(2 * self.layers):
            batch = np.zeros((len(sequences), C, *self.heads), np.float32)
            for i, (caches, row, length) in enumerate(records):
                batch[i, C - length :] = caches[layer][row, -length:]
            gathered.append(batch)
        return gathered

    def _rows(self, lengths, T):
        """(B, 1, T, 1) int32 FlashMask rows: the last `length` keys of each row may be seen, the padding may not."""
        padded = np.arange(T) < T - lengths[:, None]
        return np.where(padded, 0, NEVER).astype(np.int32)[:, None, :, None]

    def _call(self, program, caches, ids, positions, rows, lengths):
        """(B, V) float32 and the caches, keys of all layers before values. A program takes of the inputs what it has names for."""
        arrays = {"input_ids": ids, "position_ids": positions, "rows": rows, "lengths": lengths}
        arrays |= dict(zip((f"{kind}_{i}" for kind in ("keys", "values") for i in range(self.layers)), caches))
        for name in program.get_input_names():
            program.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(arrays[name]))
        program.run()
        logits, *caches = (program.get_output_handle(name).copy_to_cpu() for name in program.get_output_names())
        return logits, caches


def _static_config(folder):
    """static_config.json, after a look at whether the folder is whole."""
    path = Path(folder) / "static_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no static_config.json; a static export is written by export.py with format: static")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        files, version = dict(config["files"]), config["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; export again") from None
    if version != STATIC_FORMAT:
        raise UserError(f"{path}: format_version {version}; this serve.py reads {STATIC_FORMAT}; export again")
    for name, size in files.items():
        found = (Path(folder) / name).stat().st_size if (Path(folder) / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{Path(folder) / name}: {state}, {size} were written; export again")
    return config


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
        room = min(runner.max_positions, num_blocks * block_size) - runner.virtual
        self.max_model_len = min(room, max_model_len or room)
        if self.max_model_len < 2:
            raise UserError(
                f"{num_blocks} blocks of {block_size} and {runner.max_positions} positions leave no room for a prompt "
                f"and a token after {runner.virtual} tokens of a prefix; raise num_blocks"
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
        """Queue a request; on_output(Output) is called from the engine's thread for each token of each reply."""
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
            # What the cached keys and values depend on besides the tokens, as the root of the chain of blocks.
            turned = self.runner.root(len(prompt) + self.runner.virtual) if self.pool.reuse else 0
            root, leader = hashlib.blake2b(f"{turned} {request.adapter or ''}".encode(), digest_size=16).digest(), None
            for index in range(params.n):
                sampler = Sampler(params, index, self.stop_ids, seed)
                text = TextStream(self.tokenizer, params.stop)
                sequence = Sequence(
                    request, index, next(self.arrivals), on_output, leader, sampler, text, self.runner.virtual, root
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
            while sequence.phase == DECODE and len(sequence.blocks) * size <= sequence.computed:
                if self.pool.free:
                    sequence.blocks.append(self.pool.allocate())
                else:
                    self._preempt(max(self.running, key=lambda s: s.arrival))
                    preempted = True
            if sequence.phase == DECODE:
                chunks.append(Chunk(sequence, sequence.computed, 1))
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
        count = len(sequence.tokens) - sequence.computed
        count = min(count, budget) if self.runner.chunked else count
        if count > 0:
            chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _admit(self, sequence):
        """Give the head of the queue its blocks; False if they are not free.

        Full blocks that are cached are shared, but never all of the sequence: its last token must be computed, since it
        is its logits that are wanted.
        """
        assert sequence is self.waiting[0] and sequence.phase == WAITING and not sequence.blocks
        size, length = self.pool.block_size, len(sequence.tokens)
        self._extend_keys(sequence, (length - 1) // size)
        shared = self.pool.match(sequence.keys[1 : 1 + (length - 1) // size])
        missing = -(-length // size) - len(shared)
        if missing > len(self.pool.free) - (self.watermark if self.running else 0):
            self.pool.release(shared)
            return False
        self.waiting.popleft()
        sequence.blocks = shared + [self.pool.allocate() for _ in range(missing)]
        sequence.computed = len(shared) * size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = max(0, sequence.computed - sequence.virtual)
            self.totals["cached_tokens"] += sequence.cached_tokens
        if sequence.computed < sequence.virtual:
            self.runner.fill_prefix(sequence, sequence.computed)
            sequence.computed = sequence.virtual
        sequence.phase = PREFILL
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)
        return True

    def _extend_keys(self, sequence, blocks):
        """The chain keys of the first so many blocks, from tokens that are all there."""
        size = self.pool.block_size
        for i in range(len(sequence.keys) - 1, blocks if self.pool.reuse else 0):
            sequence.keys.append(self.pool.chain(sequence.keys[i], sequence.tokens[i * size : (i + 1) * size]))

    def _preempt(self, sequence):
        """Back to the head of the queue, with its tokens and its random state; what it had computed is given up."""
        self._give_back(sequence)
        self.running.remove(sequence)
        sequence.phase, sequence.computed = WAITING, 0
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
            full = sequence.computed // size
            sequence.computed += chunk.count
            if sequence.computed // size > full:
                self._extend_keys(sequence, sequence.computed // size)
                for i in range(full, sequence.computed // size if self.pool.reuse else full):
                    self.pool.publish(sequence.blocks[i], sequence.keys[i + 1])
            if sequence.computed < len(sequence.tokens):
                continue
            sequence.phase = DECODE
            if not finite[row]:
                print(f"request {sequence.request.request_id}: the logits are not finite", file=sys.stderr, flush=True)
                self._finish(sequence, "error")
            elif sequence.sampler.plain and sequence.generated >= sequence.sampler.params.min_tokens:
                self._append(sequence, best[row], None, None)
            else:
                self._append(sequence, chosen[row], *sequence.sampler.report(logits[row], chosen[row]))

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
            s.adjusted(logits[row], chunks[row].sequence.tokens[chunks[row].sequence.virtual :])
            for row, s in zip(rows, samplers)
        ]
        return dict(zip(rows, draw(samplers, np.stack(adjusted))))

    def _append(self, sequence, token, logprob, top):
        """A new token: is it the last, what text is certain with it?"""
        params, sampler = sequence.request.params, sequence.sampler
        sequence.tokens.append(token)
        self.totals["generation_tokens"] += 1
        may_stop = sequence.generated >= params.min_tokens
        full = sequence.generated >= params.max_tokens or len(sequence.tokens) - sequence.virtual >= self.max_model_len
        if may_stop and token in sampler.stops:
            text, reason = sequence.text.flush()[0], "stop"
        else:
            text, stopped = sequence.text.push(token, may_stop)
            if full and not stopped:
                rest, stopped = sequence.text.flush(may_stop)
                text += rest
            reason = "stop" if stopped else "length" if full else None
        output = Output(sequence.index, token, text, logprob, top, None, sequence.cached_tokens)
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
        output = output or Output(sequence.index, cached_tokens=sequence.cached_tokens or 0)
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
        self.pool.forget()

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


# ================================================================== 9. from a folder to an engine


def adapter_paths(lora_path):
    """`lora_path` -> {name: folder}; one folder without a name is called by its last part."""
    found = {}
    for part in (lora_path or "").split(","):
        if part.strip():
            name, equals, path = part.strip().partition("=")
            path = path if equals else name
            name = name if equals else Path(path).name
            if not Path(path).is_dir():
                raise UserError(f"lora_path: {path}: no such folder")
            if not name or name in found:
                raise UserError(f"lora_path: {part.strip()!r}: a name of its own is needed: name=folder,name2=folder2")
            found[name] = path
    return found


def build_engine(args):
    """(engine, tokenizer) as the arguments say."""
    path = Path(args.model_name_or_path)
    if not path.is_dir():
        raise UserError(f"model_name_or_path: {path}: no such folder")
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or path)
    if args.chat_template is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)
    adapters = adapter_paths(args.lora_path)
    if args.mode == "static":
        runner = StaticRunner(path, paddle.get_device())
        length = min(args.total_max_length + runner.virtual, runner.max_positions)
        num_blocks = args.num_blocks or args.batch_size * -(-length // args.block_size)
        return engine_of(runner, tokenizer, num_blocks, None, args), tokenizer
    model = from_pretrained(path)
    trainer.check_vocabulary(model, tokenizer, path)
    if args.prefix_path:
        if model.prefix is not None:
            raise UserError(f"prefix_path: {path} has a prefix of its own")
        load_adapter(model, args.prefix_path)
        if model.prefix is None:
            raise UserError(f"prefix_path: {args.prefix_path} holds a LoRA; give it as lora_path")
    virtual = model.prefix.tokens if model.prefix is not None else 0
    length = min(args.total_max_length + virtual, model.config.most_tokens)
    wanted = 2 * args.batch_size * -(-length // args.block_size)  # as much again to keep prompts for later ones
    block = PagedRunner.block_bytes(model.config, args.block_size, args.cachekv_int8_type is not None)
    num_blocks = args.num_blocks or min(wanted, int(args.kv_cache_gb * 1e9) // block)
    if num_blocks < 1:
        raise UserError(f"kv_cache_gb: {args.kv_cache_gb} holds no block of {block / 1e6:.1f} MB; raise it")
    return engine_of(model, tokenizer, num_blocks, adapters, args), tokenizer


def engine_of(model, tokenizer, num_blocks, adapters, args):
    engine = Engine(
        model,
        tokenizer,
        num_blocks,
        args.block_size,
        args.batch_size,
        args.max_num_batched_tokens,
        args.total_max_length,
        args.max_queue,
        args.seed,
        adapters,
        args.cachekv_int8_type is not None,
    )
    print(
        f"engine: {num_blocks:,} blocks of {args.block_size} tokens, at most {engine.max_model_len:,} tokens a sequence, "
        f"{args.batch_size} sequences at once"
        + (f"; adapters {', '.join(engine.adapters)}" if engine.adapters else ""),
        flush=True,
    )
    return engine


# ================================================================== 10. offline: a prompt, a file, a benchmark


def prompt_ids(tokenizer, rounds, context, src_length):
    """[(user, bot)…] whose last bot is to be written -> ids, at most src_length where they can be cut."""
    return fit_prompt(tokenizer, [*rounds[:-1], (rounds[-1][0], "")], context, src_length, src_length)


def lengths(engine, args):
    """(most tokens of a prompt, SamplingParams) of the offline modes, which must fit the engine together."""
    total = engine.max_model_len
    if args.src_length is not None and args.src_length >= total:
        raise UserError(f"src_length: {args.src_length} leaves no room for a reply in {total} tokens")
    src_length = args.src_length or max(total - args.max_length, total // 2)
    return src_length, args.sampling()


def answer_prompt(engine, tokenizer, args):
    """Print one reply as it is written."""
    src_length, params = lengths(engine, args)
    params = dataclasses.replace(params, seed=args.seed)
    ids = prompt_ids(tokenizer, [(args.prompt, None)], {}, src_length)
    request = Request(ids, params, engine.adapters[0] if len(engine.adapters) == 1 else None)
    start, first, tokens = time.perf_counter(), None, 0
    for output in engine.stream(request):
        first = first or time.perf_counter() - start
        tokens += output.token_id is not None
        print(output.text, end="", flush=True)
    seconds = time.perf_counter() - start - first
    speed = f", {(tokens - 1) / seconds:,.1f} tokens/s after it" if tokens > 1 else ""
    print(f"\n\n{len(ids)} tokens of prompt, {tokens} new; first after {1000 * first:,.0f} ms{speed}", flush=True)


def read_records(path):
    """Yields (line number, record, rounds, context) of the lines that are not blank."""
    for _, number, line in numbered_lines(Path(path)):
        record = parse_json_line(line, path, number)
        src = record.get("src")
        without = [""] * len(src) if isinstance(src, list) else ""  # the last reply is to be written: it may be missing
        yield number, record, *record_rounds({"tgt": without, **record}, f"{path}:{number}")


def answered(args):
    """How many lines of output_file are done: they must be those of data_file. A last line cut off by a kill is removed."""
    path = Path(args.output_file)
    if not path.exists():
        return 0
    if path.is_dir():
        raise UserError(f"output_file: {path} is a folder")
    if path.resolve() == Path(args.data_file).resolve():
        raise UserError(f"output_file: {path} is the data_file")
    done, whole = 0, 0
    records = read_records(args.data_file)
    with open(path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                break
            number, record, _, _ = next(records, (None, None, None, None))
            found = parse_json_line(line, path, done + 1)
            if record is None or found.get("src") != record.get("src") or "output" not in found:
                which = f"line {number}" if record is not None else "no line"
                raise UserError(
                    f"{path}:{done + 1}: is not the answer to {which} of {args.data_file}; give another output_file or remove this one"
                )
            done, whole = done + 1, whole + len(line)
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return done


def answer_file(engine, tokenizer, args):
    """data_file -> output_file, in its order, each line written as soon as all before it are."""
    src_length, params = lengths(engine, args)
    total = sum(1 for _ in read_records(args.data_file))  # every line is checked before the first is answered
    if not total:
        raise UserError(f"data_file: {args.data_file} is empty; JSON lines with src and tgt are wanted")
    done = answered(args)
    adapter = engine.adapters[0] if len(engine.adapters) == 1 else None
    records = collections.deque()  # those handed to the engine and not written yet

    def requests():
        for i, (number, record, rounds, context) in enumerate(read_records(args.data_file)):
            if i >= done:
                records.append(record)
                ids = prompt_ids(tokenizer, rounds, context, src_length)
                if len(ids) >= engine.max_model_len:
                    raise UserError(f"{args.data_file}:{number}: {len(ids)} tokens; {engine.max_model_len - 1} fit")
                yield Request(ids, dataclasses.replace(params, seed=args.seed + i), adapter)

    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    ready, start, tokens = {}, time.perf_counter(), 0
    with (
        open(args.output_file, "ab", buffering=0) as file,
        tqdm(total=total, initial=done, desc="answered", disable=args.disable_tqdm) as bar,
    ):
        written = 0

        def progress(i, completions):
            nonlocal written, tokens
            ready[i] = completions[0].text.strip()
            tokens += len(completions[0].token_ids)
            while written in ready:
                record = records.popleft()
                line = {"src": record["src"], "tgt": record.get("tgt", ""), "output": ready.pop(written)}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())  # one write: a whole line or none
                written += 1
            bar.update(1)

        engine.generate(requests(), progress)
    seconds = time.perf_counter() - start
    print(
        f"{total} lines in {args.output_file}, {done} of them kept; {tokens:,} new tokens, {tokens / seconds:,.1f} tokens/s",
        flush=True,
    )


def benchmark(engine, args):
    """Time to first token and tokens/s of 1, 2, 4, 8 and 16 prompts of random ids at once, greedily, to the last token."""
    prompt = min(args.src_length or 128, engine.max_model_len // 2)
    new = min(args.max_length, 128, engine.max_model_len - prompt)
    ids = np.random.default_rng(args.seed)
    print(
        f"prompts of {prompt} tokens, {new} new ones each\n{'batch':>5} {'first token ms':>15} {'prefill tokens/s':>17} {'decode tokens/s':>16}"
    )
    for batch in [b for b in (1, 2, 4, 8, 16) if b <= engine.max_num_seqs]:
        rates = []
        for _ in range(3):  # the first to warm up
            first, last = measure(engine, ids.integers(10, engine.runner.vocab_size, (batch, prompt)).tolist(), new)
            rates.append((1000 * first, batch * prompt / first, batch * (new - 1) / max(last - first, 1e-9)))
        first, prefill, decode = np.median(rates[1:], axis=0)
        print(f"{batch:>5} {first:>15,.1f} {prefill:>17,.0f} {decode:>16,.1f}", flush=True)


def measure(engine, prompts, new):
    """(seconds until every prompt has its first token, seconds until all have `new`), without the cache of blocks."""
    engine.pool.forget()
    firsts, params = [], SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    start, seen = time.perf_counter(), set()

    def listen(request_id):
        def on_output(output):
            if request_id not in seen:
                seen.add(request_id)
                firsts.append(time.perf_counter() - start)

        return on_output

    for prompt in prompts:
        request = Request(prompt, params)
        engine.submit(request, listen(request.request_id))
    while engine.step():
        pass
    return max(firsts), time.perf_counter() - start


# ================================================================== 11. HTTP: one connection
# HTTP/1.1 by hand on asyncio: one event loop holds every connection, so that a thousand idle or slow clients cost no
# threads, a closed socket is seen while its request still waits, and every wait has a time limit. The loop never
# computes: prompts are encoded in a thread, tokens come from the engine's thread.

MAX_HEADER_BYTES = 16 * 1024  # request line and headers together
MAX_HEADERS = 100
READ_AHEAD = 64 * 1024  # bytes taken from a client before it is its turn; then TCP makes it wait
WRITE_AHEAD = 64 * 1024  # bytes kept for a client that reads slowly; then its request waits, write_timeout at most
LINGER = 2.0  # seconds in which a refused client may finish sending, so that it reads the answer and not a reset
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a method or header name (RFC 9110, 5.6.2)


class ClientGone(Exception):
    """The client closed its connection, or reads nothing any more."""


class HTTPError(Exception):
    """An answer other than 200, as OpenAI's error object; `param` names the field of the request that is wrong."""

    def __init__(self, status, message, code=None, param=None, headers=()):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, dict(headers)

    def body(self):
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass
class HTTPRequest:
    method: str
    path: str  # without the query
    version: str  # HTTP/1.0 or HTTP/1.1
    headers: dict  # lower-case name: value
    keep_alive: bool


def parse_head(head):
    """Bytes up to the empty line -> HTTPRequest. HTTPError 400, 431 or 505 where they are not HTTP/1."""
    line, *rest = head.split(b"\r\n")
    parts = line.split(b" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]) or not re.fullmatch(rb"HTTP/\d\.\d", parts[2]):
        raise HTTPError(400, "the request line must be METHOD PATH HTTP/1.1", "malformed_request")
    method, target, version = (part.decode("latin-1") for part in parts)
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise HTTPError(505, f"{version}: HTTP/1.0 and HTTP/1.1 are spoken here")
    path = urlsplit(target).path if target.startswith("http://") else target.partition("?")[0]
    if len(rest) > MAX_HEADERS:
        raise HTTPError(431, f"more than {MAX_HEADERS} headers")
    headers = {}
    for line in rest:
        name, colon, value = line.partition(b":")
        if not colon or not TOKEN.fullmatch(name) or re.search(rb"[\r\n\0]", value):
            raise HTTPError(400, "a header line must be NAME: VALUE", "malformed_request")
        name, value = name.decode("latin-1").lower(), value.strip(b" \t").decode("latin-1")
        if headers.get(name, value) != value and name in ("content-length", "transfer-encoding", "host"):
            raise HTTPError(400, f"two different {name} headers", "malformed_request")
        headers[name] = value
    if version == "HTTP/1.1" and "host" not in headers:
        raise HTTPError(400, "a Host header is needed in HTTP/1.1", "malformed_request")
    keep_alive = version == "HTTP/1.1" and "close" not in headers.get("connection", "").lower()
    return HTTPRequest(method, path, version, headers, keep_alive)


class Connection(asyncio.Protocol):
    """A client's socket: what it sent and what it is sent, both bounded, and whether it is still there.

    Everything that changes sets `changed`, the one event that the connection's task sleeps on (`until`)."""

    def __init__(self, server):
        self.server, self.args = server, server.args
        self.buffer, self.changed = bytearray(), asyncio.Event()
        self.eof = self.lost = self.paused = self.busy = self.probed = False
        self.writable = True

    # ---- called by asyncio
    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(high=WRITE_AHEAD)
        self.server.connections.add(self)
        self.too_many = len(self.server.connections) > self.args.max_connections
        if len(self.server.connections) > 2 * self.args.max_connections:  # refusals are connections, too
            transport.abort()
        self.task = asyncio.get_running_loop().create_task(self.server.converse(self))

    def data_received(self, data):
        self.buffer += data
        if len(self.buffer) > READ_AHEAD and not self.paused:
            self.paused = True
            self.transport.pause_reading()
        self.changed.set()

    def eof_received(self):
        self.eof = True
        self.changed.set()
        return True  # the other direction stays open: a half-closed client still gets its answer

    def connection_lost(self, error):
        self.lost = True
        self.server.connections.discard(self)
        self.changed.set()

    def pause_writing(self):
        self.writable = False

    def resume_writing(self):
        self.writable = True
        self.changed.set()

    # ---- called by the server's task
    async def until(self, ready, deadline):
        """Sleep until ready() is true or time.monotonic() passes the deadline; returns ready()."""
        loop = asyncio.get_running_loop()
        while not ready() and (left := deadline - time.monotonic()) > 0:
            timer = loop.call_later(left, self.changed.set)
            await self.changed.wait()
            timer.cancel()
            self.changed.clear()
        return ready()

    async def fill(self, deadline):
        """Wait for more bytes of a request that has begun."""
        size = len(self.buffer)
        if self.paused and size <= READ_AHEAD:
            self.paused = False
            self.transport.resume_reading()
        if not await self.until(lambda: len(self.buffer) > size or self.eof or self.lost, deadline):
            raise HTTPError(408, f"the request did not arrive within {self.args.read_timeout:g} seconds")
        if self.lost:
            raise ClientGone
        if len(self.buffer) == size:
            raise HTTPError(400, "the request ends early", "malformed_request")

    async def read_head(self):
        """The next HTTPRequest, or None if none comes: the connection was closed or idle for too long."""

        def ready():
            while self.buffer[:2] == b"\r\n":  # some clients end a body with an extra line
                del self.buffer[:2]
            return self.buffer or self.eof or self.lost

        await self.until(ready, time.monotonic() + self.args.read_timeout)
        if not self.buffer or self.lost:
            return None
        self.busy, deadline = True, time.monotonic() + self.args.read_timeout
        while (end := self.buffer.find(b"\r\n\r\n", 0, MAX_HEADER_BYTES)) < 0:
            if len(self.buffer) >= MAX_HEADER_BYTES:
                raise HTTPError(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")
            await self.fill(deadline)
        head = bytes(self.buffer[:end])
        del self.buffer[: end + 4]
        return parse_head(head)

    async def read_body(self, request):
        """The body's bytes, by Content-Length or in chunks; HTTPError 400, 411, 413, 501."""
        deadline, length = time.monotonic() + self.args.read_timeout, request.headers.get("content-length")
        coding = request.headers.get("transfer-encoding")
        if coding is None and length is None:
            if request.method == "POST":
                raise HTTPError(411, "a Content-Length header or a chunked body is needed")
            return b""
        if coding is not None and length is not None:
            raise HTTPError(400, "Content-Length and Transfer-Encoding exclude each other", "malformed_request")
        if coding is not None and coding.lower() != "chunked":
            raise HTTPError(501, f"Transfer-Encoding: {brief(coding)}; chunked is understood")
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise HTTPError(400, f"Content-Length: a number of bytes is wanted, found {brief(length)}")
        self._check_size(int(length or 0))
        if request.headers.get("expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is not None:
            return await self._take(int(length), deadline)
        body = bytearray()
        while size := await self._chunk_size(deadline):
            self._check_size(len(body) + size)
            body += await self._take(size, deadline)
            if await self._take(2, deadline) != b"\r\n":
                raise HTTPError(400, "a chunk is longer than its size says", "malformed_request")
        while await self._line(deadline):  # trailers say nothing that is needed here
            pass
        return bytes(body)

    def _check_size(self, size):
        if size > self.args.max_body_bytes:
            raise HTTPError(413, f"the body is longer than {self.args.max_body_bytes:,} bytes", "body_too_large")

    async def _take(self, size, deadline):
        """Exactly `size` bytes."""
        out = bytearray()
        while len(out) < size:
            if not self.buffer:
                await self.fill(deadline)
            part = self.buffer[: size - len(out)]
            del self.buffer[: len(part)]
            out += part
        return bytes(out)

    async def _line(self, deadline):
        while (end := self.buffer.find(b"\r\n", 0, 1024)) < 0:
            if len(self.buffer) >= 1024:
                raise HTTPError(400, "a chunk's first line is too long", "malformed_request")
            await self.fill(deadline)
        return await self._take(end + 2, deadline) if end else (await self._take(2, deadline))[2:]

    async def _chunk_size(self, deadline):
        digits = (await self._line(deadline)).split(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", digits):
            raise HTTPError(400, "a chunk's size must be a hexadecimal number", "malformed_request")
        return int(digits, 16)

    async def send(self, data):
        """Write; wait while the client is behind by more than WRITE_AHEAD, write_timeout at most, then cut it off."""
        if self.lost:
            raise ClientGone
        self.transport.write(data)
        if not await self.until(lambda: self.writable or self.lost, time.monotonic() + self.args.write_timeout):
            self.transport.abort()
            raise ClientGone
        if self.lost:
            raise ClientGone

    async def respond(self, status, body, headers=(), keep_alive=False, with_body=True):
        """A whole answer; a dict becomes JSON. ASCII JSON carries any text through any client, lone surrogates too."""
        kind = "text/plain; charset=utf-8"
        if isinstance(body, dict):
            body, kind = json.dumps(body).encode() + b"\n", "application/json"
        lines = {
            "Content-Type": kind,
            "Content-Length": len(body),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            **dict(headers),
        }
        if not keep_alive:
            lines["Connection"] = "close"
        await self.send(response_head(status, lines) + (body if with_body else b""))

    def client_left(self, probe):
        """Whether the client is known to have closed both directions.

        A closed and a half-closed socket look alike until something is sent: `probe`, bytes that mean nothing to one
        who still reads and draw a reset from one who does not. None: half-closed counts as gone."""
        if self.eof and not self.probed:
            self.probed = True
            if probe is None:
                return True
            self.transport.write(probe)
        if self.lost or not self.probed:
            return self.lost
        return self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    async def close(self):
        """Flush and close, within limits; read on for a moment, since closing over unread bytes would reset the
        connection and take the answer away from a client that is still sending."""
        deadline = time.monotonic() + self.args.write_timeout
        while not self.lost and self.transport.get_write_buffer_size() and time.monotonic() < deadline:
            await self.until(lambda: self.lost, min(deadline, time.monotonic() + 0.02))
        if not self.lost and not self.transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # reset by the client, which the loop has not been told yet
                self.transport.write_eof()
            deadline = time.monotonic() + LINGER
            while not (self.lost or self.eof) and time.monotonic() < deadline:
                self.buffer.clear()
                if self.paused:
                    self.paused = False
                    self.transport.resume_reading()
                await self.until(lambda: self.buffer or self.lost or self.eof, deadline)
        self.transport.abort()  # nothing is left to be sent, or nobody takes it


def response_head(status, headers):
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{lines}\r\n".encode("latin-1")


# ================================================================== 12. HTTP: OpenAI's objects

KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
# Fields that would change the answer but that the engine has not, and the values with which they change nothing.
REFUSED = {"tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",),
           "response_format": ({"type": "text"},), "logit_bias": ({},), "suffix": ("",), "modalities": (["text"],),
           "audio": (), "prediction": (), "min_p": (0,), "bad_words": ([],), "use_beam_search": (False,),
           "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
           "structured_outputs": ()}  # fmt: skip
# field: its kind, the least and the most
NUMBERS = {"temperature": (float, 0, 2), "top_p": (float, 0, 1), "top_k": (int, -1, 2**31),
           "seed": (int, -(2**63), 2**63), "presence_penalty": (float, -2, 2), "frequency_penalty": (float, -2, 2),
           "repetition_penalty": (float, 0.01, 100), "min_tokens": (int, 0, 2**31),
           "ignore_eos": (bool, None, None)}  # fmt: skip
MAX_CHOICES = 128  # of one request: prompts times n
MAX_STOPS = 16
MAX_LOGPROBS = 20


def bad_request(message, param=None, code=None):
    return HTTPError(400, message, code, param)


def take_field(body, name, kind, least=None, most=None):
    """body[name], None if absent or null; HTTPError 400 if it is not of this kind or not within least..most."""
    value = body.get(name)
    if value is None:
        return None
    right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not right or (least is not None and not least <= value <= most):
        bounds = "" if least is None else f" between {least} and {most}"
        raise bad_request(f"{name}: {KINDS[kind]}{bounds} is wanted, found {brief(value)}", name)
    return float(value) if kind is float else value


def parse_body(data):
    """Bytes -> dict; HTTPError 400 where they are no JSON object."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object, found {brief(body)}", code="invalid_json")
    for name, harmless in REFUSED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise bad_request(f"{name}: not supported here", name, "unsupported_parameter")
    if body.get("best_of") not in (None, body.get("n") or 1):
        raise bad_request("best_of: not supported here, except equal to n", "best_of", "unsupported_parameter")
    return body


def take_strings(body, name, most):
    """A string or a list of at most `most` strings, none of them empty -> tuple."""
    value = body.get(name)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > most or not all(isinstance(part, str) and part for part in value):
        raise bad_request(
            f"{name}: a string or a list of at most {most} is wanted, none empty, found {brief(value)}", name
        )
    return tuple(value)


def take_ids(value, name, vocab_size):
    for token_id in value:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
            raise bad_request(f"{name}: token ids from 0 to {vocab_size - 1} are wanted, found {brief(token_id)}", name)
    return value


def sampling_fields(body, is_chat, vocab_size):
    """The request's fields -> SamplingParams' (max_tokens None: as many as the model has room for)."""
    fields = {name: value for name, row in NUMBERS.items() if (value := take_field(body, name, *row)) is not None}
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    if "seed" in fields:
        fields["seed"] %= 2**63
    if fields.get("top_p") == 0:
        fields["top_p"] = 1e-6  # OpenAI's clients may say 0 for the likeliest alone
    limit = take_field(body, "max_tokens", int, 1, 2**31)
    if is_chat:
        limit = take_field(body, "max_completion_tokens", int, 1, 2**31) or limit
        wanted, logprobs = take_field(body, "logprobs", bool), take_field(body, "top_logprobs", int, 0, MAX_LOGPROBS)
        if logprobs is not None and not wanted:
            raise bad_request("top_logprobs: needs logprobs: true", "top_logprobs")
        logprobs = (logprobs or 0) if wanted else None
    else:
        limit = 16 if limit is None else limit  # OpenAI's
        logprobs = take_field(body, "logprobs", int, 0, MAX_LOGPROBS)
    stop_ids = take_field(body, "stop_token_ids", list) or []
    return fields | {
        "max_tokens": limit,
        "logprobs": logprobs,
        "stop": take_strings(body, "stop", MAX_STOPS),
        "stop_token_ids": tuple(take_ids(stop_ids, "stop_token_ids", vocab_size)),
        "n": take_field(body, "n", int, 1, MAX_CHOICES) or 1,
    }


def message_text(message, where):
    """A message's content, a string or a list of text parts -> str."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad_request(
                    f'{where}.content: text parts {{"type": "text", "text": ...}} are understood, found {brief(part)}',
                    "messages",
                )
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise bad_request(
            f"{where}.content: a string or a list of text parts is wanted, found {brief(content)}", "messages"
        )
    return content


def chat_prompt(body, tokenizer):
    """messages -> [(ids, None)]. Their roles are system (or developer), user and assistant, in turn."""
    messages = take_field(body, "messages", list)
    if not messages:
        raise bad_request("messages: a list of at least one message is wanted", "messages")
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise bad_request(
                f'messages[{i}]: an object with the role "system", "user" or "assistant" is wanted, '
                f"found {brief(message)}",
                "messages",
            )
        role = "system" if message["role"] == "developer" else message["role"]
        turns.append({"role": role, "content": message_text(message, f"messages[{i}]")})
    if tokenizer.chat_template is None:
        raise bad_request(
            "the model's tokenizer has no chat template: ask /v1/completions, or start the server with a chat_template",
            "messages",
            "no_chat_template",
        )
    return [(tokenizer.apply_chat(turns, add_generation_prompt=True), None)]


def completion_prompts(body, tokenizer):
    """prompt (text, texts, ids or lists of ids) -> [(ids, text to be echoed or None)...]."""
    prompt, echo = body.get("prompt"), take_field(body, "echo", bool)
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or len(prompt) > MAX_CHOICES:
        raise bad_request(
            f"prompt: a string, a list of token ids, or a list of at most {MAX_CHOICES} of these is "
            f"wanted, found {brief(prompt)}",
            "prompt",
        )
    if echo and body.get("logprobs") is not None:
        raise bad_request("echo: not supported together with logprobs", "echo", "unsupported_parameter")
    out = []
    for part in prompt:
        if isinstance(part, str):
            out.append((tokenizer.encode(part), part if echo else None))
        elif isinstance(part, list):
            take_ids(part, "prompt", tokenizer.vocab_size)
            out.append((part, tokenizer.decode(part) if echo else None))
        else:
            raise bad_request(f"prompt: a string or a list of token ids is wanted, found {brief(part)}", "prompt")
    return out


@dataclasses.dataclass
class Job:
    """One call of the API while it runs: one engine request a prompt, n choices each."""

    id: str
    model: str  # as the client named it
    is_chat: bool
    requests: list  # of Request
    echoes: list  # text before each prompt's answers, or None
    stream: bool
    include_usage: bool
    fingerprint: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    unfinished: int = 0  # choices
    completion_tokens: int = 0
    cached: dict = dataclasses.field(default_factory=dict)  # prompt: how many of its tokens were found in the cache
    first_token: float | None = None  # time.monotonic()
    last_token: float | None = None
    finish: str = "-"  # for the log

    @property
    def prompt_tokens(self):
        return sum(len(request.prompt_ids) for request in self.requests)

    @property
    def cached_tokens(self):
        return sum(self.cached.values())

    def usage(self):
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def reply(self, choices, chunk):
        kind = "text_completion" if not self.is_chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


@dataclasses.dataclass
class Piece:
    """What one token adds to one choice; a choice is the sum of its pieces, streamed or not."""

    index: int
    text: str
    logprobs: dict | None
    finish_reason: str | None


def token_logprob(tokenizer, token_id, logprob):
    data = tokenizer.piece_bytes(token_id)
    # OpenAI's smallest: JSON has no -inf.
    return {"token": data.decode("utf-8", "replace"), "logprob": max(float(logprob), -9999.0), "bytes": list(data)}


def output_logprobs(job, output, tokenizer, offset):
    """An Output -> the logprobs object of its API, of one token; `offset`: characters of the choice before it."""
    chosen = token_logprob(tokenizer, output.token_id, output.logprob)
    top = [token_logprob(tokenizer, *pair) for pair in output.top_logprobs or ()]
    if job.is_chat:
        return {"content": [chosen | {"top_logprobs": top}]}
    return {
        "tokens": [chosen["token"]],
        "token_logprobs": [chosen["logprob"]],
        "text_offset": [offset],
        "top_logprobs": [{row["token"]: row["logprob"] for row in top}],
    }


def stream_choices(job, piece, is_first):
    """A piece -> the choices of the chunks that carry it; a chat has the role first and finish_reason by itself."""
    if not job.is_chat:
        if piece.text or piece.logprobs or piece.finish_reason:
            yield dataclasses.asdict(piece)
        return
    rows = [({"role": "assistant", "content": ""}, None, None)] if is_first else []
    if piece.text or piece.logprobs:
        rows.append(({"content": piece.text}, piece.logprobs, None))
    if piece.finish_reason:
        rows.append(({}, None, piece.finish_reason))
    for delta, logprobs, finish_reason in rows:
        yield {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def whole_choice(job, index, pieces):
    """All pieces of a choice -> the choice of an answer that is not streamed."""
    text, parts = "".join(piece.text for piece in pieces), [piece.logprobs for piece in pieces if piece.logprobs]
    logprobs = {key: [row for part in parts for row in part[key]] for key in parts[0]} if parts else None
    choice = {"index": index, "logprobs": logprobs, "finish_reason": pieces[-1].finish_reason}
    if not job.is_chat:
        return choice | {"text": text}
    return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}


# ================================================================== 13. HTTP: the server


class Histogram:
    """Prometheus' cumulative histogram of seconds."""

    BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

    def __init__(self):
        self.counts, self.total, self.count = [0] * len(self.BOUNDS), 0.0, 0

    def add(self, seconds):
        self.total, self.count = self.total + seconds, self.count + 1
        for i, bound in enumerate(self.BOUNDS):
            self.counts[i] += seconds <= bound

    def lines(self, name):
        yield f"# TYPE {name} histogram"
        for bound, count in (*zip(self.BOUNDS, self.counts), ("+Inf", self.count)):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {self.count}"


def read_page():
    """serve.html -> (bytes, headers): its policy allows its own inline script and style, by hash, and nothing else."""
    page = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
    inline = {}
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        inline[tag] = f"{tag}-src 'sha256-{digest}'"
    policy = (
        f"default-src 'none'; {inline['script']}; {inline['style']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
    }
    return page.encode(), headers


class Server:
    """The API and the page over one Engine. `converse` is a connection's life, `generate` an answer's.

    What runs where: everything here in the event loop, encoding of prompts in a thread, the engine in its own. The
    engine's callbacks come from there and are handed over by call_soon_threadsafe."""

    def __init__(self, engine, tokenizer, args):
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.model = args.served_model_name or Path(args.model_name_or_path).resolve().name
        self.created = int(time.time())
        self.fingerprint = f"fp_{hashlib.sha256(f'{self.model} {engine.max_model_len}'.encode()).hexdigest()[:10]}"
        self.page, self.page_headers = read_page()
        self.connections, self.draining, self.port = set(), False, None
        self.stop, self.hurry, self.running = asyncio.Event(), asyncio.Event(), set()  # running: ids of requests
        self.answers, self.latency, self.first_token = {}, Histogram(), Histogram()
        self.routes = {  # path: (method, handler, open to all)
            "/": ("GET", self.get_page, True),
            "/health": ("GET", self.get_health, True),
            "/metrics": ("GET", self.get_metrics, False),
            "/v1/models": ("GET", self.get_models, False),
            "/v1/chat/completions": ("POST", self.generate, False),
            "/v1/completions": ("POST", self.generate, False),
        }

    # ---- a connection
    async def converse(self, connection):
        """Requests one after another, as they come, until either side has enough."""
        try:
            if connection.too_many:
                raise HTTPError(
                    503,
                    f"all {self.args.max_connections} connections are taken",
                    "too_many_connections",
                    headers={"Retry-After": 1},
                )
            while await self.one_request(connection):
                pass
        except HTTPError as error:  # what comes next on this connection cannot be told apart from this request's rest
            self.count("", error.status)
            self.log(f"- refused: {error.status} {error.code or ''}")
            with contextlib.suppress(ClientGone):
                await connection.respond(error.status, error.body(), error.headers)
        except ClientGone:
            pass
        finally:
            await connection.close()

    async def one_request(self, connection):
        """Read and answer a request; returns whether the connection lives on. HTTPError: it cannot, and why."""
        request = await connection.read_head()
        if request is None:
            return False
        handler = self.route(request)  # before the body: whoever may not ask need not send it
        body = await connection.read_body(request)
        status = 500
        try:
            status = await handler(connection, request, body)
        except HTTPError as error:
            status = error.status
            request.keep_alive &= not self.draining
            await connection.respond(status, error.body(), error.headers, request.keep_alive, request.method != "HEAD")
        except ClientGone:
            status = 499
            raise
        except Exception:  # a bug; it must show, but not end the others' answers
            traceback.print_exc()
            await connection.respond(500, HTTPError(500, "internal error", "internal_error").body())
            return False
        finally:
            self.count(request.path, status)
            connection.busy = False
        return request.keep_alive and not self.draining

    def route(self, request):
        if request.path not in self.routes and not request.path.startswith("/v1/models/"):
            raise HTTPError(404, "no such path; there are " + ", ".join(self.routes), "unknown_path")
        method, handler, is_open = self.routes.get(request.path, ("GET", self.get_models, False))
        allowed = {"GET": ("GET", "HEAD"), "POST": ("POST",)}[method]
        if request.method not in allowed:
            raise HTTPError(
                405,
                f"{request.path} takes {' and '.join(allowed)}",
                "method_not_allowed",
                headers={"Allow": ", ".join(allowed)},
            )
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.headers.get("host"):  # another site's script in a browser
            raise HTTPError(403, "pages of other origins may not ask this server", "wrong_origin")
        if self.args.api_key and not is_open:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.args.api_key}".encode()):
                raise HTTPError(
                    401,
                    "a valid key is needed: Authorization: Bearer KEY",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return handler

    def log(self, line):
        print(line, file=sys.stderr, flush=True)

    def count(self, path, status):
        path = path if path in self.routes else "other"
        self.answers[path, status] = self.answers.get((path, status), 0) + 1

    # ---- what can be looked at
    async def get_page(self, connection, request, body):
        await connection.respond(200, self.page, self.page_headers, request.keep_alive, request.method != "HEAD")
        return 200

    async def get_health(self, connection, request, body):
        status = 503 if self.draining else 200
        text = {"status": "draining" if self.draining else "ok"}
        await connection.respond(status, text, (), request.keep_alive, request.method != "HEAD")
        return status

    async def get_models(self, connection, request, body):
        rows = [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "local",
                "max_model_len": self.engine.max_model_len,
                "parent": None if name == self.model else self.model,
            }
            for name in (self.model, *self.engine.adapters)
        ]
        answer = {"object": "list", "data": rows}
        if request.path != "/v1/models":
            name = unquote(request.path.removeprefix("/v1/models/"))
            answer = next((row for row in rows if row["id"] == name), None) or self.no_model(name)
        await connection.respond(200, answer, (), request.keep_alive, request.method != "HEAD")
        return 200

    async def get_metrics(self, connection, request, body):
        lines = []
        for name, value in self.engine.stats().items():
            kind = "counter" if name.endswith("_total") and not name.startswith("blocks_") else "gauge"
            name = "llm_" + ("blocks" if name == "blocks_total" else name)
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        lines += ["# TYPE llm_connections gauge", f"llm_connections {len(self.connections)}"]
        lines.append("# TYPE llm_http_responses_total counter")
        for (path, status), count in sorted(self.answers.items()):
            lines.append(f'llm_http_responses_total{{path="{path}",status="{status}"}} {count}')
        lines += [
            *self.latency.lines("llm_request_seconds"),
            *self.first_token.lines("llm_time_to_first_token_seconds"),
        ]
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        text = "\n".join(lines) + "\n"
        await connection.respond(200, text.encode(), headers, request.keep_alive, request.method != "HEAD")
        return 200

    def no_model(self, name):
        known = ", ".join((self.model, *self.engine.adapters))
        raise HTTPError(404, f"model: {brief(name)} does not exist; there are {known}", "model_not_found", "model")

    # ---- an answer
    def prepare(self, data, is_chat):
        """The body's bytes -> Job. Runs in a thread, as encoding a long prompt takes its time."""
        body = parse_body(data)
        name = take_field(body, "model", str) or self.model
        if name != self.model and name not in self.engine.adapters:
            self.no_model(name)
        stream, options = take_field(body, "stream", bool) or False, take_field(body, "stream_options", dict)
        if options and not stream:
            raise bad_request("stream_options: needs stream: true", "stream_options")
        include_usage = take_field(options or {}, "include_usage", bool) or False
        fields = sampling_fields(body, is_chat, self.tokenizer.vocab_size)
        field = "messages" if is_chat else "prompt"
        try:
            prompts = (chat_prompt if is_chat else completion_prompts)(body, self.tokenizer)
        except UnicodeEncodeError:
            raise bad_request(f"{field}: a lone surrogate is no character", field) from None
        except UserError as error:
            raise bad_request(str(error), field) from None
        if len(prompts) * fields["n"] > MAX_CHOICES:
            raise bad_request(f"n: {len(prompts)} prompts times n are more than {MAX_CHOICES} choices", "n")
        job = Job(
            f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            name,
            is_chat,
            [],
            [echo for _, echo in prompts],
            stream,
            include_usage,
            self.fingerprint,
        )
        for i, (ids, _) in enumerate(prompts):
            room = self.engine.max_model_len - len(ids)
            if not ids:
                raise bad_request(f"{field}: empty", field)
            if room < 1:
                raise bad_request(
                    f"{field}: {len(ids)} tokens; the model takes {self.engine.max_model_len}, prompt "
                    "and answer together",
                    field,
                    "context_length_exceeded",
                )
            # A limit that is too high is no error: the answer ends with finish_reason length where the room does.
            limit = min(fields["max_tokens"] or room, room)
            params = SamplingParams(
                **fields | {"max_tokens": limit, "min_tokens": min(fields.get("min_tokens", 0), room)}
            )
            try:
                params.check()
            except UserError as error:
                raise bad_request(str(error), str(error).partition(":")[0]) from None
            adapter = None if name == self.model else name
            job.requests.append(Request(ids, params, adapter, f"{job.id}-{i}"))
        job.unfinished = len(prompts) * fields["n"]
        return job

    def submit(self, job, connection, outputs):
        """Hand the job's requests to the engine; its Outputs will be appended to `outputs`, in the loop's thread."""
        loop = asyncio.get_running_loop()

        def deliver(i, output):
            outputs.append((i, output))
            connection.changed.set()

        for i, request in enumerate(job.requests):
            try:
                self.engine.submit(request, lambda output, i=i: loop.call_soon_threadsafe(deliver, i, output))
                self.running.add(request.request_id)
            except QueueFull as error:
                raise HTTPError(429, str(error), "queue_full", headers={"Retry-After": 1}) from None
            except ShuttingDown:
                raise self.going() from None
            except PromptTooLong as error:
                field = "messages" if job.is_chat else "prompt"
                raise bad_request(str(error), field, "context_length_exceeded") from None
            except UnknownAdapter:
                self.no_model(job.model)
            except UserError as error:
                raise bad_request(str(error), str(error).partition(":")[0]) from None

    def going(self):
        return HTTPError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": 5})

    async def generate(self, connection, request, data):
        """POST of either API: returns the status. Whatever happens, nothing of it stays in the engine."""
        start, job, status = time.monotonic(), None, 500
        try:
            if self.draining:
                raise self.going()
            job = await asyncio.to_thread(self.prepare, data, request.path == "/v1/chat/completions")
            if connection.lost:
                raise ClientGone
            outputs = []
            self.submit(job, connection, outputs)
            if job.stream:
                status = await self.stream(connection, request, job, outputs, start)
            else:
                status = await self.answer(connection, request, job, outputs, start)
        except HTTPError as error:
            status = error.status
            if job is None:
                self.log(f"- refused: {status} {error.code or error.param or ''}")
            raise
        except ClientGone:
            status = 499
            raise
        finally:
            for each in job.requests if job else ():
                self.running.discard(each.request_id)
                if job.unfinished:
                    self.engine.abort(each.request_id)
            if job:
                self.record(job, status, start)
        return status

    async def pieces(self, connection, job, outputs, start, probe):
        """Yields lists of Pieces as they come, until all choices are finished. HTTPError: time is up, or the engine
        gave up; ClientGone."""
        deadline, lengths = start + self.args.request_timeout, {}
        while job.unfinished:
            now = time.monotonic()
            if connection.client_left(probe):
                raise ClientGone
            if outputs:
                batch = [self.piece(job, i, output, lengths) for i, output in outputs]
                outputs.clear()
                yield batch
            elif now >= deadline:
                raise HTTPError(504, f"not finished within {self.args.request_timeout:g} seconds", "timeout")
            elif connection.probed:  # a reset in answer to the probe wakes nobody
                await connection.until(lambda: outputs or connection.lost, min(deadline, now + 0.05))
            else:
                await connection.until(lambda: outputs or connection.lost or connection.eof, deadline)

    def piece(self, job, i, output, lengths):
        if output.finish_reason in ("abort", "error"):
            job.finish = output.finish_reason
            raise self.going() if self.draining else HTTPError(500, "the engine failed", "engine_error")
        params = job.requests[i].params
        index, text, logprobs = i * params.n + output.index, output.text, None
        if output.token_id is not None:
            job.last_token = time.monotonic()
            job.first_token = job.first_token or job.last_token
            job.completion_tokens += 1
            job.cached.setdefault(i, output.cached_tokens)
        if index not in lengths and job.echoes[i] is not None:
            text = job.echoes[i] + text
        if params.logprobs is not None and output.token_id is not None:
            logprobs = output_logprobs(job, output, self.tokenizer, lengths.get(index, 0))
        lengths[index] = lengths.get(index, 0) + len(text)
        if output.finish_reason:
            job.unfinished -= 1
            job.finish = output.finish_reason
        return Piece(index, text, logprobs, output.finish_reason)

    async def answer(self, connection, request, job, outputs, start):
        """Not streamed. The probe is what may always be sent ahead of an answer (RFC 9110, 15.2): 100 Continue."""
        probe = b"HTTP/1.1 100 Continue\r\n\r\n" if request.version == "HTTP/1.1" else None
        choices = {}
        async for batch in self.pieces(connection, job, outputs, start, probe):
            for piece in batch:
                choices.setdefault(piece.index, []).append(piece)
        whole = [whole_choice(job, index, choices[index]) for index in sorted(choices)]
        reply = job.reply(whole, chunk=False) | {"usage": job.usage()}
        request.keep_alive &= not self.draining
        await connection.respond(200, reply, {"X-Request-Id": job.id}, request.keep_alive)
        return 200

    async def stream(self, connection, request, job, outputs, start):
        """Server-sent events. Once they flow the status is 200; an error becomes an event."""
        chunked = request.version == "HTTP/1.1"
        request.keep_alive &= chunked and not self.draining
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
            "X-Content-Type-Options": "nosniff",
            "X-Request-Id": job.id,
        }
        headers |= {"Transfer-Encoding": "chunked"} if chunked else {}
        headers |= {} if request.keep_alive else {"Connection": "close"}

        def frame(text):
            data = text.encode()
            return b"%X\r\n%s\r\n" % (len(data), data) if chunked else data

        def event(reply):
            return f"data: {json.dumps(reply, separators=(',', ':'))}\n\n"

        await connection.send(response_head(200, headers))
        started, usage, status = set(), {"usage": None} if job.include_usage else {}, 200
        try:
            async for batch in self.pieces(connection, job, outputs, start, frame(": still here\n\n")):
                events = []
                for piece in batch:
                    for choice in stream_choices(job, piece, piece.index not in started):
                        events.append(event(job.reply([choice], chunk=True) | usage))
                    started.add(piece.index)
                if events:
                    await connection.send(frame("".join(events)))
            last = event(job.reply([], chunk=True) | {"usage": job.usage()}) if job.include_usage else ""
        except HTTPError as error:
            last, status = event(error.body()), error.status
        await connection.send(frame(last + "data: [DONE]\n\n") + (b"0\r\n\r\n" if chunked else b""))
        return status

    def record(self, job, status, start):
        """One line on stderr, and the histograms; nothing of what was asked or answered."""
        seconds, first, rate = time.monotonic() - start, "-", "-"
        if job.first_token is not None:
            first = f"{job.first_token - start:.3f}"
            if job.completion_tokens > 1:
                rate = f"{(job.completion_tokens - 1) / max(job.last_token - job.first_token, 1e-6):.1f}"
            if status == 200:
                self.latency.add(seconds)
                self.first_token.add(job.first_token - start)
        self.log(
            f"{job.id} {job.model}: prompt {job.prompt_tokens} (cached {job.cached_tokens}), completion "
            f"{job.completion_tokens}, first token {first} s, {rate} tokens/s, total {seconds:.3f} s, "
            f"{job.finish} {status}"
        )

    # ---- the whole
    async def run(self):
        """Listen until `stop`; then new requests get a 503, and what runs has until `hurry` or drain_timeout."""
        loop, args = asyncio.get_running_loop(), self.args
        try:
            listener = await loop.create_server(lambda: Connection(self), args.host, args.port, backlog=512)
        except OSError as error:
            reason = str(error.strerror).rpartition(": ")[2]
            raise UserError(
                f"port: cannot listen on {args.host}:{args.port}: {reason}; give another --port, or "
                "--port 0 for a free one"
            ) from None
        host, self.port = listener.sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        adapters = "".join(f"; adapter {name}" for name in self.engine.adapters)
        print(
            f"serving {self.model} on http://{host}:{self.port}/ ({'with' if args.api_key else 'no'} API key); context "
            f"{self.engine.max_model_len} tokens, {args.max_connections} connections, {args.max_body_bytes:,} bytes a "
            f"body, {args.request_timeout:g} s a request{adapters}",
            flush=True,
        )
        await self.stop.wait()

        self.draining = True
        self.log(f"shutting down: {len(self.running)} requests are to be finished")
        shutdown = asyncio.create_task(asyncio.to_thread(self.engine.shutdown, True, args.drain_timeout))
        await asyncio.wait((shutdown, asyncio.create_task(self.hurry.wait())), return_when=asyncio.FIRST_COMPLETED)
        for request_id in list(self.running):
            self.engine.abort(request_id)
        await shutdown
        deadline = time.monotonic() + min(5.0, args.write_timeout)  # for the last bytes to be taken
        while (
            any(c.busy or c.transport.get_write_buffer_size() for c in self.connections) and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.02)
        listener.close()
        for connection in list(self.connections):
            connection.transport.abort()


def serve_http(engine, tokenizer, args):
    """Serve until SIGTERM; returns when everything has been answered. UserError where the port cannot be had.

    args: host, port (0: a free one), api_key, model_name_or_path, served_model_name, max_connections, max_body_bytes,
    read_timeout, write_timeout, request_timeout, drain_timeout."""

    async def serve():
        server = Server(engine, tokenizer, args)
        for each in (signal.SIGTERM, signal.SIGINT):  # a second one cuts the draining short
            asyncio.get_running_loop().add_signal_handler(
                each, lambda: (server.hurry if server.stop.is_set() else server.stop).set()
            )
        engine.start()
        try:
            await server.run()
        finally:
            await asyncio.to_thread(engine.shutdown, False, 0)

    asyncio.run(serve())


# ================================================================== 14. main


def main(args):
    engine, tokenizer = build_engine(args)
    if args.benchmark:
        benchmark(engine, args)
    elif args.prompt is not None:
        answer_prompt(engine, tokenizer, args)
    elif args.data_file is not None:
        answer_file(engine, tokenizer, args)
    else:
        serve_http(engine, tokenizer, args)


if __name__ == "__main__":
    trainer.run_script(main, Args)
