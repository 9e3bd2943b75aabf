"""Answer prompts: one engine with continuous batching behind a terminal, a file of prompts, or an HTTP server.

    python serve.py configs/llama_serve.json                                   # OpenAI's HTTP interface and a chat page
    python serve.py configs/llama_serve.json --prompt "type#dress*color#red"   # one reply, as it is written
    python serve.py configs/llama_serve.json --data_file in.jsonl --output_file out.jsonl
    python serve.py configs/llama_serve.json --benchmark

Opens full, merged, quantized, LoRA and prefix-tuned folders; `lora_path "name=path,name2=path2"` serves several
adapters of one base, chosen by each request. `mode: static` runs what export.py wrote with `format: static`. Messages
of a chat are written in the model's chat template; a model without one gets plain text, as finetune.py trains it.

The engine (serving/engine.py): requests join and leave at every step; a step computes one token of every running
sequence and, with the rest of `max_num_batched_tokens`, pieces of new prompts. Keys and values are kept in a pool of
blocks (Kwon et al., arXiv 2309.06180); identical full blocks are shared; when no block is free, the youngest sequence
waits and is computed again. The pool may be int8 (`cachekv_int8_type dynamic`), a quarter of the memory. Not supported:
beam search, speculative decoding, more than one process.
"""

import collections
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import numpy as np
import paddle
from tqdm import tqdm

import trainer
from adapters import base_folders, from_pretrained, load_adapter, tokenizer_folder
from arguments import ScriptArgs
from data import conversation_prompt
from formats.chat import load_chat_template
from formats.files import UserError, parse_json_line
from formats.record_files import RecordOptions, RecordReader, with_reply
from formats.records import Conversation, located, parse_prompt
from formats.tokenizer import Tokenizer, load_tokenizer
from model import CausalLM
from serving.engine import Engine, Request, SamplingParams
from serving.fused import choose_dtype
from serving.openai_api import serve_http
from serving.runners import PagedRunner, StaticRunner, round_linears

QUANT_GROUPS = {"w8": -1, "w4": 64, "a8w8": -1}  # `quant`: input rows that share a scale; -1: all

# ====================================================================================================== 1. arguments


@dataclasses.dataclass
class Args(ScriptArgs):
    model_name_or_path: str = ""  # folder of the model: full, merged, quantized, an adapter's, or of export.py (static)
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    lora_path: str | None = None  # an adapter's folder, or several: "name=folder,name2=folder2"
    prefix_path: str | None = None  # folder of a trained prefix
    mode: str = "dynamic"  # dynamic: model.py and a pool of blocks; static: the graph that export.py wrote
    chat_template: str | None = None  # name in chat.FORMATS, plain, none, or a template file; None: the model's own
    src_length: int | None = None  # most tokens of a prompt; None: total_max_length - max_length
    max_length: int = 1024  # most new tokens of a reply
    min_length: int = 1  # fewest
    total_max_length: int = 4096  # most tokens of prompt and reply; never more than the model's positions
    decode_strategy: str = "sampling"  # or greedy_search, which is temperature 0
    temperature: float = 0.95
    top_k: int = 0  # sample among this many likeliest tokens; 0: all
    top_p: float = 0.7  # sample among the likeliest whose probabilities sum to it
    repetition_penalty: float = 1.0
    batch_size: int = 16  # most sequences at once
    block_size: int = 16  # tokens of a block of the pool
    num_blocks: int | None = None  # blocks of the pool; None: what kv_cache_gb holds, but no more than can be in use
    kv_cache_gb: float = 1.0  # memory of the pool
    cachekv_int8_type: str | None = None  # dynamic: the pool in int8 with a scale a token and head; None: float32
    dtype: str | None = None  # float32, bfloat16, or auto: bfloat16 where possible; None: float32, with quant auto
    quant: str | None = None  # w8, w4 or a8w8: round the weights when they are loaded; None: as the folder has them
    max_num_batched_tokens: int = 512  # most tokens of one step; longer prompts are computed in pieces
    max_queue: int = 256  # most sequences waiting; more are refused
    prompt: str | None = None  # answer this and exit
    system: str | None = None  # the system text before prompt
    data_file: str | None = None  # answer every record of this file; the replies may be missing: docs/data.md
    columns: str | dict | None = None  # other names of its keys: {"instruction": "question", …}
    output_file: str = "output.json"  # into this one, each with "output"; lines already there are kept
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

    def check(self) -> list[str]:
        notes = super().check()
        if not self.model_name_or_path:
            raise UserError("model_name_or_path: missing")
        for key, choices in (
            ("mode", ("dynamic", "static")),
            ("decode_strategy", ("sampling", "greedy_search")),
            ("cachekv_int8_type", (None, "dynamic")),
            ("dtype", (None, "auto", "float32", "bfloat16")),
            ("quant", (None, *QUANT_GROUPS)),
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
        if self.mode == "static" and (self.quant or self.dtype not in (None, "float32")):
            raise UserError("mode: static has its weights in the graph; dtype and quant are for dynamic")
        if sum(map(bool, (self.prompt, self.data_file, self.benchmark))) > 1:
            raise UserError("prompt, data_file and benchmark are different ways to run; give one")
        if self.system and self.prompt is None:
            raise UserError("system is the system text before prompt; records and HTTP requests have their own")
        RecordOptions.of(self)
        if self.data_file and not Path(self.data_file).is_file():
            raise UserError(f"data_file: {self.data_file}: no such file")
        self.sampling().check()
        return notes

    def sampling(self) -> SamplingParams:
        """For the offline modes; over HTTP, OpenAI's defaults apply to what a request leaves out."""
        greedy = self.decode_strategy == "greedy_search"
        return SamplingParams(
            max_tokens=self.max_length,
            min_tokens=min(self.min_length, self.max_length),
            temperature=0.0 if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


# ======================================================================================= 2. from a folder to an engine


def adapter_paths(lora_path: str | None) -> dict[str, str]:
    """`lora_path` -> {name: folder}; a folder without a name is called by its last part."""
    paths = {}
    for part in (lora_path or "").split(","):
        if part.strip():
            name, equals, path = part.strip().partition("=")
            path = path if equals else name
            name = name if equals else Path(path).name
            if not Path(path).is_dir():
                raise UserError(f"lora_path: {path}: no such folder")
            if not name or name in paths:
                raise UserError(f"lora_path: {part.strip()!r}: each needs a name of its own: name=folder,name2=folder2")
            paths[name] = path
    return paths


def build_engine(args: Args) -> tuple[Engine, Tokenizer]:
    path = Path(args.model_name_or_path)
    if not path.is_dir():
        raise UserError(f"model_name_or_path: {path}: no such folder")
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or tokenizer_folder(path), base_folders(path))
    if args.chat_template is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)
    adapters, dtype = adapter_paths(args.lora_path), "float32"
    if args.mode == "static":
        model = StaticRunner(path, paddle.get_device())
        num_blocks = blocks_in_use(args, model.num_virtual_tokens, model.max_positions)
    else:
        model = open_model(path, args.prefix_path)
        trainer.check_vocabulary(model, tokenizer, path)
        if args.quant:
            round_linears(model, args.quant, QUANT_GROUPS[args.quant])
        dtype = choose_dtype(model, adapters, args.dtype or ("auto" if args.quant else "float32"))
        num_virtual_tokens = model.prefix.tokens if model.prefix is not None else 0
        # twice what can be in use at once: the other half keeps prompts for later requests
        wanted = 2 * blocks_in_use(args, num_virtual_tokens, model.config.max_model_len)
        int8 = args.cachekv_int8_type is not None
        block_bytes = PagedRunner.block_bytes(model.config, args.block_size, int8, dtype)
        num_blocks = min(wanted, int(args.kv_cache_gb * 1e9) // block_bytes)
        if num_blocks < 1 and args.num_blocks is None:
            megabytes = block_bytes / 1e6
            raise UserError(f"kv_cache_gb: {args.kv_cache_gb} holds no block of {megabytes:.1f} MB; raise it")
    engine = Engine(
        model,
        tokenizer,
        num_blocks=args.num_blocks or num_blocks,
        block_size=args.block_size,
        max_num_seqs=args.batch_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.total_max_length,
        max_queue=args.max_queue,
        seed=args.seed,
        adapters=adapters,
        int8_cache=args.cachekv_int8_type is not None,
        dtype=dtype,
        int8_head=args.quant in ("w8", "w4"),
        free_weights=True,
    )
    blocks = f"{engine.pool.num_blocks:,} blocks of {args.block_size} tokens"
    sequences = f"at most {engine.max_model_len:,} tokens a sequence, {args.batch_size} sequences at once"
    names = f"; adapters {', '.join(engine.adapters)}" if engine.adapters else ""
    print(f"engine: {blocks}, {sequences}{names}", flush=True)
    return engine, tokenizer


def blocks_in_use(args: Args, num_virtual_tokens: int, max_positions: int) -> int:
    """Blocks that batch_size sequences of the greatest length take."""
    length = min(args.total_max_length + num_virtual_tokens, max_positions)
    return args.batch_size * -(-length // args.block_size)


def open_model(path: Path, prefix_path: str | None) -> CausalLM:
    """The model with a trained prefix, if there is one."""
    model = from_pretrained(path)
    if prefix_path:
        if model.prefix is not None:
            raise UserError(f"prefix_path: {path} has a prefix of its own")
        load_adapter(model, prefix_path)
        if model.prefix is None:
            raise UserError(f"prefix_path: {prefix_path} holds a LoRA; give it as lora_path")
    return model


# ==================================================================== 3. offline: one prompt, a file, a benchmark


def prompt_ids(tokenizer: Tokenizer, turns: list, context: dict, src_length: int, is_plain: bool = False) -> list[int]:
    """[(prompt, reply), …], the last to be written -> at most src_length ids where they can be cut."""
    conversation = Conversation(context, [*turns[:-1], (turns[-1][0], "")], [], is_plain)
    return conversation_prompt(tokenizer, conversation, src_length, src_length)


def prompt_limit(engine: Engine, args: Args) -> int:
    """Most tokens of a prompt, which must leave room for a reply."""
    total = engine.max_model_len
    if args.src_length is not None and args.src_length >= total:
        raise UserError(f"src_length: {args.src_length} leaves no room for a reply in {total} tokens")
    return args.src_length or max(total - args.max_length, total // 2)


def only_adapter(engine: Engine) -> str | None:
    """The adapter that the offline modes use: the one that is loaded, if it is one."""
    return engine.adapters[0] if len(engine.adapters) == 1 else None


def answer_prompt(engine: Engine, tokenizer: Tokenizer, args: Args) -> None:
    """Print one reply as it is written."""
    context = {"system": args.system} if args.system else {}
    ids = prompt_ids(tokenizer, [(args.prompt, None)], context, prompt_limit(engine, args))
    request = Request(ids, dataclasses.replace(args.sampling(), seed=args.seed), only_adapter(engine))
    start, first, tokens = time.perf_counter(), None, 0
    for output in engine.stream(request):
        first = first or time.perf_counter() - start
        tokens += output.token_id is not None
        print(output.text, end="", flush=True)
    seconds = time.perf_counter() - start - first
    speed = f", {(tokens - 1) / seconds:,.1f} tokens/s after it" if tokens > 1 else ""
    print(f"\n\n{len(ids)} tokens of prompt, {tokens} new; first after {1000 * first:,.0f} ms{speed}", flush=True)


def read_records(args: Args, says_replaced: bool = False) -> Iterator[tuple]:
    """Yields ("file:line", record, Conversation) of every record; the reply is to be written, so it may be missing."""
    for _, where, record in RecordReader(args.data_file, options=RecordOptions.of(args), says_replaced=says_replaced):
        yield where, record, parse_prompt(record, where)


def with_output(record: dict, text: str) -> dict:
    """A record and its answer, as a line of output_file has them."""
    return with_reply({"src": record["src"], "tgt": record.get("tgt", "")} if "src" in record else record, text)


def count_answered(args: Args) -> int:
    """How many lines of output_file are done: they must be those of data_file. Removes a last line cut by a kill, if it
    is the beginning of the answer that is due: any other file stays as it is."""
    path = Path(args.output_file)
    if not path.exists():
        return 0
    if path.is_dir():
        raise UserError(f"output_file: {path} is a folder")
    if path.resolve() == Path(args.data_file).resolve():
        raise UserError(f"output_file: {path} is the data_file")
    done, size = 0, 0  # of whole lines
    records = read_records(args)
    with open(path, "rb") as stream:
        for line in stream:
            where, record, _ = next(records, (None, None, None))
            is_cut, is_answer = not line.endswith(b"\n"), False
            if is_cut and record is not None:
                start = json.dumps(with_output(record, ""), ensure_ascii=False).encode()[: -len(b'"}')]
                is_answer = line.startswith(start) or start.startswith(line)
            elif record is not None:
                with contextlib.suppress(UserError):
                    answer = parse_json_line(line, path, done + 1)
                    is_answer = "output" in answer and with_output(record, answer["output"]) == answer
            if not is_answer:
                question = f"line {where.rpartition(':')[2]}" if where else "no line"
                reason = f"is not the answer to {question} of {args.data_file}"
                raise UserError(f"{path}:{done + 1}: {reason}; give another output_file or remove this one")
            if is_cut:
                break
            done, size = done + 1, size + len(line)
    if size < path.stat().st_size:
        os.truncate(path, size)
    return done


def answer_file(engine: Engine, tokenizer: Tokenizer, args: Args) -> None:
    """data_file -> output_file, in its order; each line is written as soon as all before it are."""
    src_length, params, adapter = prompt_limit(engine, args), args.sampling(), only_adapter(engine)
    total = sum(1 for _ in read_records(args, True))  # every line is checked before the first is answered
    if not total:
        raise UserError(f"data_file: {args.data_file} is empty; it needs records, see docs/data.md")
    done = count_answered(args)
    records = collections.deque()  # those that the engine has and that are not written yet

    def requests():
        for i, (where, record, conversation) in enumerate(read_records(args)):
            if i >= done:
                records.append(record)
                context, turns, _, is_plain = conversation
                with located(where):
                    ids = prompt_ids(tokenizer, turns, context, src_length, is_plain)
                if len(ids) >= engine.max_model_len:
                    raise UserError(f"{where}: {len(ids)} tokens; {engine.max_model_len - 1} fit")
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
                line = with_output(records.popleft(), ready.pop(written))
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())  # one write: a whole line or none
                written += 1
            bar.update(1)

        engine.generate(requests(), progress)
    speed = f"{tokens:,} new tokens, {tokens / (time.perf_counter() - start):,.1f} tokens/s"
    print(f"{total} lines in {args.output_file}, {done} of them kept; {speed}", flush=True)


def benchmark(engine: Engine, args: Args) -> None:
    """Time to first token and tokens/s for 1, 2, 4, 8 and 16 greedy prompts of random ids at once."""
    prompt = min(args.src_length or 128, engine.max_model_len // 2)
    new = min(args.max_length, 128, engine.max_model_len - prompt)
    generator = np.random.default_rng(args.seed)
    print(f"prompts of {prompt} tokens, {new} new ones each")
    print(f"{'batch':>5} {'first token ms':>15} {'prefill tokens/s':>17} {'decode tokens/s':>16}")
    for batch in [size for size in (1, 2, 4, 8, 16) if size <= engine.max_num_seqs]:
        rates = []
        for _ in range(3):  # the first is the warm-up
            prompts = generator.integers(10, engine.runner.vocab_size, (batch, prompt)).tolist()
            first, last = measure(engine, prompts, new)
            rates.append((1000 * first, batch * prompt / first, batch * (new - 1) / max(last - first, 1e-9)))
        first, prefill, decode = np.median(rates[1:], axis=0)
        print(f"{batch:>5} {first:>15,.1f} {prefill:>17,.0f} {decode:>16,.1f}", flush=True)


def measure(engine: Engine, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """Seconds until every prompt has its first token, and until all have `new`; no block is reused."""
    engine.pool.reset_prefix_cache()
    first_times, params = {}, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.submit(Request(prompt, params), lambda _, i=i: first_times.setdefault(i, time.perf_counter() - start))
    while engine.step():
        pass
    return max(first_times.values()), time.perf_counter() - start


# =========================================================================================================== 4. main


def main(args: Args) -> None:
    engine, tokenizer = build_engine(args)
    if args.benchmark:
        benchmark(engine, args)
    elif args.prompt is not None:
        answer_prompt(engine, tokenizer, args)
    elif args.data_file is not None:
        answer_file(engine, tokenizer, args)
    else:
        if not tokenizer.has_chat_format:
            path = args.tokenizer_name_or_path or args.model_name_or_path
            print(f"chat: {path} has no chat template; messages are plain text, or give --chat_template", flush=True)
        serve_http(engine, tokenizer, args)


if __name__ == "__main__":
    trainer.run_script(main, Args)
