"""Serving without a server: one prompt, a file of records, a benchmark.

answer_prompt(engine, tokenizer, args)      # print one reply as it is written; args: serve.Args
answer_file(engine, tokenizer, args)        # data_file -> output_file; a killed run continues
benchmark(engine, args)                     # time to first token and tokens/s
"""

import collections
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import conversation_prompt
from formats.files import UserError, parse_json_line
from formats.record_files import RecordOptions, RecordReader, with_reply
from formats.records import Conversation, located, parse_prompt
from formats.tokenizer import Tokenizer
from serving.engine import Engine, Request
from serving.sampling import SamplingParams


def prompt_ids(tokenizer: Tokenizer, turns: list, context: dict, src_length: int, is_plain: bool = False) -> list[int]:
    """[(prompt, reply), …], the last to be written -> at most src_length ids where they can be cut."""
    conversation = Conversation(context, [*turns[:-1], (turns[-1][0], "")], [], is_plain)
    return conversation_prompt(tokenizer, conversation, src_length, src_length)


def prompt_limit(engine: Engine, args: object) -> int:
    """Most tokens of a prompt, which must leave room for a reply."""
    total = engine.max_model_len
    if args.src_length is not None and args.src_length >= total:
        raise UserError(f"src_length: {args.src_length} leaves no room for a reply in {total} tokens")
    return args.src_length or max(total - args.max_length, total // 2)


def only_adapter(engine: Engine) -> str | None:
    """The adapter that the offline modes use: the one that is loaded, if it is one."""
    return engine.adapters[0] if len(engine.adapters) == 1 else None


def answer_prompt(engine: Engine, tokenizer: Tokenizer, args: object) -> None:
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


def read_records(args: object, says_replaced: bool = False) -> Iterator[tuple]:
    """Yields ("file:line", record, Conversation) of every record; the reply is to be written, so it may be missing."""
    for _, where, record in RecordReader(args.data_file, options=RecordOptions.of(args), says_replaced=says_replaced):
        yield where, record, parse_prompt(record, where)


def with_output(record: dict, text: str) -> dict:
    """A record and its answer, as a line of output_file has them."""
    return with_reply({"src": record["src"], "tgt": record.get("tgt", "")} if "src" in record else record, text)


def count_answered(args: object) -> int:
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


def answer_file(engine: Engine, tokenizer: Tokenizer, args: object) -> None:
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


def benchmark(engine: Engine, args: object) -> None:
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


def measure(engine: Engine, prompts: list[list[int]], new: int, **sampling: object) -> tuple[float, float]:
    """Seconds until prompts have a first token, and until all have `new`; greedy by default. No block is reused."""
    engine.pool.reset_prefix_cache()
    first_times, params = {}, SamplingParams(**{"temperature": 0.0} | sampling, max_tokens=new, ignore_eos=True)
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.submit(Request(prompt, params), lambda _, i=i: first_times.setdefault(i, time.perf_counter() - start))
    while engine.step():
        pass
    return max(first_times.values()), time.perf_counter() - start
