"""OpenAI's requests and replies over an Engine.

    class Server(openai_api.Server)              # in server.py: the paths that lead here, and what else there is

A request's body becomes an APICall: one engine Request for each prompt, n choices each. The engine's TokenOutputs
become ChoiceDeltas, which are sent as server-sent events, or added up to one answer.
"""

import asyncio
import dataclasses
import hashlib
import json
import sys
import time
import uuid
from collections.abc import Iterator

from formats.files import UserError, brief
from serving.engine import (
    PromptTooLong,
    QueueFull,
    Request,
    SamplingParams,
    ShuttingDown,
    TokenOutput,
    UnknownAdapter,
)
from serving.http_server import ClientGone, HTTPError
from serving.lanes import Lanes, TooManyTokens
from serving.metrics import Metrics

# ================================================================================== the fields of a request

KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


# Fields that would change the answer and are not supported, with the values that change nothing.
REFUSED = {"tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",),
           "response_format": ({"type": "text"},), "logit_bias": ({},), "suffix": ("",), "modalities": (["text"],),
           "audio": (), "prediction": (), "min_p": (0,), "bad_words": ([],), "use_beam_search": (False,),
           "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
           "structured_outputs": ()}  # fmt: skip


# field: (type, minimum, maximum)
NUMBERS = {"temperature": (float, 0, 2), "top_p": (float, 0, 1), "top_k": (int, -1, 2**31),
           "seed": (int, -(2**63), 2**63), "presence_penalty": (float, -2, 2), "frequency_penalty": (float, -2, 2),
           "repetition_penalty": (float, 0.01, 100), "min_tokens": (int, 0, 2**31),
           "ignore_eos": (bool, None, None)}  # fmt: skip

MAX_CHOICES = 128  # of one request: prompts times n
MAX_STOPS = 16
MAX_LOGPROBS = 20


class APIError(HTTPError):
    """`param` names the field of the request that is wrong."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(status, message, code)
        self.param = param


def error_body(error: HTTPError) -> dict:
    """OpenAI's error object."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    param = getattr(error, "param", None)
    return {"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, code, param)


def take_field(body: dict, name: str, kind: type, low: float | None = None, high: float | None = None) -> object:
    """body[name], None if absent or null; HTTPError 400 if it is not of this type or not between low and high."""
    value = body.get(name)
    if value is None:
        return None
    types = (int, float) if kind is float else kind
    is_kind = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    if not is_kind or (low is not None and not low <= value <= high):
        limits = "" if low is None else f" between {low} and {high}"
        raise bad_request(f"{name}: must be {KINDS[kind]}{limits}, found {brief(value)}", name)
    return float(value) if kind is float else value


def parse_body(data: bytes) -> dict:
    """Bytes -> dict; HTTPError 400 where they are not a JSON object, or ask for what is not supported."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object, found {brief(body)}", code="invalid_json")
    if rb"\ud" in data.lower():
        refuse_lone_surrogates(body)
    for name, harmless in REFUSED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise bad_request(f"{name}: not supported", name, "unsupported_parameter")
    if body.get("best_of") not in (None, body.get("n") or 1):
        raise bad_request("best_of: only supported if equal to n", "best_of", "unsupported_parameter")
    return body


def refuse_lone_surrogates(body: dict) -> None:
    """HTTPError 400 naming the field that has half a character somewhere; no tokenizer takes one."""
    for name, value in body.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request(f"{brief(name)[1:-1]}: a lone surrogate is not a character", name) from None
        except RecursionError:
            raise bad_request(f"{name}: nested too deeply", name, "invalid_json") from None


def take_strings(body: dict, name: str, limit: int) -> tuple[str, ...]:
    """body[name], a string or a list of at most `limit` strings, none of them empty."""
    value = body.get(name)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > limit or not all(isinstance(part, str) and part for part in value):
        expected = f"a string or a list of at most {limit} strings, none of them empty"
        raise bad_request(f"{name}: must be {expected}, found {brief(value)}", name)
    return tuple(value)


def take_ids(value: list, name: str, vocab_size: int) -> list[int]:
    """The list, if all of it are token ids."""
    for token_id in value:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
            raise bad_request(f"{name}: token ids are from 0 to {vocab_size - 1}, found {brief(token_id)}", name)
    return value


def sampling_fields(body: dict, is_chat: bool, vocab_size: int) -> dict:
    """The request's fields -> those of SamplingParams (max_tokens None: as many as the model has room for)."""
    fields = {name: value for name, row in NUMBERS.items() if (value := take_field(body, name, *row)) is not None}
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    if "seed" in fields:
        fields["seed"] %= 2**63
    if fields.get("top_p") == 0:
        fields["top_p"] = 1e-6  # OpenAI's clients may use 0 for greedy decoding
    limit = take_field(body, "max_tokens", int, 1, 2**31)
    if is_chat:
        limit = take_field(body, "max_completion_tokens", int, 1, 2**31) or limit
        enabled, logprobs = take_field(body, "logprobs", bool), take_field(body, "top_logprobs", int, 0, MAX_LOGPROBS)
        if logprobs is not None and not enabled:
            raise bad_request("top_logprobs: needs logprobs: true", "top_logprobs")
        logprobs = (logprobs or 0) if enabled else None
    else:
        limit = 16 if limit is None else limit  # OpenAI's default
        logprobs = take_field(body, "logprobs", int, 0, MAX_LOGPROBS)
    stop_ids = take_field(body, "stop_token_ids", list) or []
    return fields | {
        "max_tokens": limit,
        "logprobs": logprobs,
        "stop": take_strings(body, "stop", MAX_STOPS),
        "stop_token_ids": tuple(take_ids(stop_ids, "stop_token_ids", vocab_size)),
        "n": take_field(body, "n", int, 1, MAX_CHOICES) or 1,
    }


def message_text(message: dict, where: str) -> str:
    """A message's content, a string or a list of text parts -> str."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                expected = 'text parts {"type": "text", "text": ...}'
                raise bad_request(f"{where}.content: only {expected} are supported, found {brief(part)}", "messages")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        expected = "a string or a list of text parts"
        raise bad_request(f"{where}.content: must be {expected}, found {brief(content)}", "messages")
    return content


def chat_prompt(body: dict, tokenizer: object) -> list[tuple]:
    """messages -> [(ids, None)]. Their roles are system (or developer), user and assistant, in turn."""
    messages = take_field(body, "messages", list)
    if not messages:
        raise bad_request("messages: must be a list of at least one message", "messages")
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            expected = 'an object with the role "system", "user" or "assistant"'
            raise bad_request(f"messages[{i}]: must be {expected}, found {brief(message)}", "messages")
        role = "system" if message["role"] == "developer" else message["role"]
        turns.append({"role": role, "content": message_text(message, f"messages[{i}]")})
    return [(tokenizer.apply_chat(turns, add_generation_prompt=True), None)]


def texts_of(body: dict, is_chat: bool) -> list[str]:
    """The texts that all become tokens of the prompt: a template may leave out others, such as earlier thoughts."""
    if not is_chat:
        prompt = body.get("prompt")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        return [max((part for part in prompts if isinstance(part, str)), key=len, default="")]
    messages = body.get("messages")
    users = (
        [m for m in messages if isinstance(m, dict) and m.get("role") == "user"] if isinstance(messages, list) else []
    )
    return [message["content"] for message in users if isinstance(message.get("content"), str)]


def completion_prompts(body: dict, tokenizer: object) -> list[tuple]:
    """prompt (text, texts, ids or lists of ids) -> [(ids, text to echo or None), …]."""
    prompt, echo = body.get("prompt"), take_field(body, "echo", bool)
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or len(prompt) > MAX_CHOICES:
        expected = f"a string, a list of token ids, or a list of at most {MAX_CHOICES} of these"
        raise bad_request(f"prompt: must be {expected}, found {brief(prompt)}", "prompt")
    if echo and body.get("logprobs") is not None:
        raise bad_request("echo: not supported together with logprobs", "echo", "unsupported_parameter")
    prompts = []
    for part in prompt:
        if isinstance(part, str):
            prompts.append((tokenizer.encode(part), part if echo else None))
        elif isinstance(part, list):
            take_ids(part, "prompt", tokenizer.vocab_size)
            prompts.append((part, tokenizer.decode(part) if echo else None))
        else:
            raise bad_request(f"prompt: each must be a string or a list of token ids, found {brief(part)}", "prompt")
    return prompts


# ====================================================================================== the objects of an answer


@dataclasses.dataclass
class APICall:
    """One call of the API: one engine request for each prompt, n choices each."""

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
    cached: dict = dataclasses.field(default_factory=dict)  # index of a prompt -> tokens of it found in the cache
    first_token: float | None = None  # time.monotonic()
    last_token: float | None = None
    token_times: dict = dataclasses.field(default_factory=dict)  # index of a choice -> when its last token came
    lengths: dict = dataclasses.field(default_factory=dict)  # index of a choice -> its tokens
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
class ChoiceDelta:
    """What one token adds to one choice; a choice is the sum of its deltas, streamed or not."""

    index: int
    text: str
    logprobs: dict | None
    finish_reason: str | None


def token_logprob(tokenizer: object, token_id: int, logprob: float) -> dict:
    data = tokenizer.piece_bytes(token_id)
    # -9999.0 is OpenAI's smallest: JSON has no -inf
    return {"token": data.decode("utf-8", "replace"), "logprob": max(float(logprob), -9999.0), "bytes": list(data)}


def output_logprobs(call: APICall, output: TokenOutput, tokenizer: object, offset: int) -> list | dict:
    """The logprobs object of one token; offset: number of characters of the choice before it."""
    chosen = token_logprob(tokenizer, output.token_id, output.logprob)
    top = [token_logprob(tokenizer, *pair) for pair in output.top_logprobs or ()]
    if call.is_chat:
        return {"content": [chosen | {"top_logprobs": top}]}
    return {
        "tokens": [chosen["token"]],
        "token_logprobs": [chosen["logprob"]],
        "text_offset": [offset],
        "top_logprobs": [{row["token"]: row["logprob"] for row in top}],
    }


def stream_choices(call: APICall, delta: ChoiceDelta, is_first: bool) -> Iterator[dict]:
    """A delta -> the choices of the chunks that carry it; a chat has the role first and finish_reason by itself."""
    if not call.is_chat:
        if delta.text or delta.logprobs or delta.finish_reason:
            yield dataclasses.asdict(delta)
        return
    rows = [({"role": "assistant", "content": ""}, None, None)] if is_first else []
    if delta.text or delta.logprobs:
        rows.append(({"content": delta.text}, delta.logprobs, None))
    if delta.finish_reason:
        rows.append(({}, None, delta.finish_reason))
    for fields, logprobs, finish_reason in rows:
        yield {"index": delta.index, "delta": fields, "logprobs": logprobs, "finish_reason": finish_reason}


def full_choice(call: APICall, index: int, deltas: list) -> dict:
    """All deltas of a choice -> the choice of an answer that is not streamed."""
    text, parts = "".join(delta.text for delta in deltas), [delta.logprobs for delta in deltas if delta.logprobs]
    logprobs = {key: [row for part in parts for row in part[key]] for key in parts[0]} if parts else None
    choice = {"index": index, "logprobs": logprobs, "finish_reason": deltas[-1].finish_reason}
    if not call.is_chat:
        return choice | {"text": text}
    return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}


# =============================================================================================== the server


class Server:
    """The API and the page over one Engine. `handle` answers a request, `generate` one for tokens.

    Everything here runs in the event loop, except the encoding of prompts, which has a thread. The engine has its own
    thread; its callbacks are handed over by call_soon_threadsafe.
    """

    def __init__(self, engine, tokenizer, args):
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.model = self.names[0]  # set in server.py
        self.created = int(time.time())
        self.fingerprint = f"fp_{hashlib.sha256(f'{self.model} {engine.max_model_len}'.encode()).hexdigest()[:10]}"
        self.running, self.metrics, self.lanes = set(), Metrics(self.model, engine.max_model_len), Lanes()

    def log(self, line):
        print(line, file=sys.stderr, flush=True)

    # ---- an answer
    def prepare(self, data, is_chat):
        """The body's bytes -> APICall. Runs in a thread, as encoding a long prompt takes time."""
        body = parse_body(data)
        name = take_field(body, "model", str) or self.model
        if name not in self.names and name not in self.engine.adapters:
            self.no_model(name)
        stream, options = take_field(body, "stream", bool) or False, take_field(body, "stream_options", dict)
        if options and not stream:
            raise bad_request("stream_options: needs stream: true", "stream_options")
        include_usage = take_field(options or {}, "include_usage", bool) or False
        fields = sampling_fields(body, is_chat, self.tokenizer.vocab_size)
        field = "messages" if is_chat else "prompt"
        self.refuse_long(field, texts_of(body, is_chat))
        try:
            prompts = (chat_prompt if is_chat else completion_prompts)(body, self.tokenizer)
        except UnicodeEncodeError:
            raise bad_request(f"{field}: a lone surrogate is not a character", field) from None
        except UserError as error:
            raise bad_request(str(error), field) from None
        except TooManyTokens:
            raise self.too_long(field, f"more than {self.engine.max_model_len}") from None
        if len(prompts) * fields["n"] > MAX_CHOICES:
            raise bad_request(f"n: {len(prompts)} prompts times n are more than {MAX_CHOICES} choices", "n")
        call = APICall(
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
                raise self.too_long(field, len(ids))
            # A limit that is too high is not an error: the answer ends with finish_reason length where the room ends.
            limit = min(fields["max_tokens"] or room, room)
            params = SamplingParams(
                **fields | {"max_tokens": limit, "min_tokens": min(fields.get("min_tokens", 0), room)}
            )
            try:
                params.check()
            except UserError as error:
                raise bad_request(str(error), str(error).partition(":")[0]) from None
            adapter = None if name in self.names else name
            call.requests.append(Request(ids, params, adapter, f"{call.id}-{i}"))
        call.unfinished = len(prompts) * fields["n"]
        return call

    def too_long(self, field, count):
        limit = f"the model takes {self.engine.max_model_len}, prompt and answer together"
        return bad_request(f"{field}: {count} tokens; {limit}", field, "context_length_exceeded")

    def submit(self, call, connection, outputs):
        """Give the requests to the engine; (prompt index, TokenOutput) will be appended to `outputs` in the loop."""
        loop = asyncio.get_running_loop()

        def deliver(i, output):
            outputs.append((i, output))
            connection.changed.set()

        for i, request in enumerate(call.requests):
            try:
                self.engine.submit(request, lambda output, i=i: loop.call_soon_threadsafe(deliver, i, output))
                self.running.add(request.request_id)
            except QueueFull as error:
                raise HTTPError(429, str(error), "queue_full", headers={"Retry-After": "1"}) from None
            except ShuttingDown:
                raise self.shutting_down_error() from None
            except PromptTooLong as error:
                field = "messages" if call.is_chat else "prompt"
                raise bad_request(str(error), field, "context_length_exceeded") from None
            except UnknownAdapter:
                self.no_model(call.model)
            except UserError as error:
                raise bad_request(str(error), str(error).partition(":")[0]) from None

    def shutting_down_error(self):
        return HTTPError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5"})

    async def generate(self, connection, request, data):
        """POST of either API; returns the status. However it ends, none of its requests stays in the engine."""
        start, call, status = time.monotonic(), None, 500
        try:
            if self.http.draining:
                raise self.shutting_down_error()
            deadline, is_chat = start + self.args.request_timeout, request.path == "/v1/chat/completions"
            call = await self.lanes.run(connection, deadline, len(data), self.prepare, data, is_chat)
            outputs = []
            self.submit(call, connection, outputs)
            if call.stream:
                status = await self.stream(connection, call, outputs, start)
            else:
                status = await self.answer(connection, call, outputs, start)
        except HTTPError as error:
            status = error.status
            if call is None:
                self.log(f"- refused: {status} {error.code or getattr(error, 'param', None) or ''}")
            raise
        except ClientGone:
            status = 499
            raise
        finally:
            for each in call.requests if call else ():
                self.running.discard(each.request_id)
                if call.unfinished:
                    self.engine.abort(each.request_id)
            if call:
                self.record(call, status, start)
        return status

    async def deltas(self, connection, call, outputs, start):
        """Yields lists of ChoiceDeltas as they come, until all choices are finished.

        HTTPError: the time is up, or the engine failed. ClientGone.
        """
        deadline, lengths = start + self.args.request_timeout, {}
        while call.unfinished:
            if connection.client_disconnected(b": still here\n\n"):
                raise ClientGone
            if outputs:
                batch = [self.to_delta(call, i, output, lengths) for i, output in outputs]
                outputs.clear()
                yield batch
            elif time.monotonic() >= deadline:
                raise HTTPError(504, f"not finished within {self.args.request_timeout:g} seconds", "timeout")
            else:
                await connection.wait_until(deadline)

    def to_delta(self, call, i, output, lengths):
        if output.finish_reason in ("abort", "error"):
            call.finish = output.finish_reason
            self.metrics.finished[output.finish_reason] += 1
            raise (
                self.shutting_down_error()
                if self.http.draining
                else HTTPError(500, "the engine failed", "engine_error")
            )
        params = call.requests[i].params
        index, text, logprobs = i * params.n + output.index, output.text, None
        if output.token_id is not None:
            call.last_token = time.monotonic()
            call.first_token = call.first_token or call.last_token
            if index in call.token_times:
                self.metrics.token(call.last_token - call.token_times[index])
            call.token_times[index] = call.last_token
            call.lengths[index] = call.lengths.get(index, 0) + 1
            call.completion_tokens += 1
            call.cached.setdefault(i, output.cached_tokens)
        if index not in lengths and call.echoes[i] is not None:
            text = call.echoes[i] + text
        if params.logprobs is not None and output.token_id is not None:
            logprobs = output_logprobs(call, output, self.tokenizer, lengths.get(index, 0))
        lengths[index] = lengths.get(index, 0) + len(text)
        if output.finish_reason:
            call.unfinished -= 1
            call.finish = output.finish_reason
            self.metrics.finished[output.finish_reason] += 1
        return ChoiceDelta(index, text, logprobs, output.finish_reason)

    async def answer(self, connection, call, outputs, start):
        """Send one answer, not streamed."""
        choices = {}
        async for batch in self.deltas(connection, call, outputs, start):
            for delta in batch:
                choices.setdefault(delta.index, []).append(delta)
        full = [full_choice(call, index, choices[index]) for index in sorted(choices)]
        reply = call.reply(full, chunk=False) | {"usage": call.usage()}
        await connection.respond(200, reply, {"X-Request-Id": call.id})
        return 200

    async def stream(self, connection, call, outputs, start):
        """Send server-sent events. The status is 200 from the first one on; an error becomes an event."""
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "X-Accel-Buffering": "no",
            "X-Request-Id": call.id,
        }

        def event(reply):
            return f"data: {json.dumps(reply, separators=(',', ':'))}\n\n"

        await connection.start_response(200, headers)
        started, usage, status = set(), {"usage": None} if call.include_usage else {}, 200
        try:
            async for batch in self.deltas(connection, call, outputs, start):
                events = []
                for delta in batch:
                    for choice in stream_choices(call, delta, delta.index not in started):
                        events.append(event(call.reply([choice], chunk=True) | usage))
                    started.add(delta.index)
                if events:
                    await connection.send_data("".join(events).encode())
            last = event(call.reply([], chunk=True) | {"usage": call.usage()}) if call.include_usage else ""
        except HTTPError as error:
            last, status = event(error_body(error)), error.status
        await connection.send_data(f"{last}data: [DONE]\n\n".encode(), last=True)
        return status

    def record(self, call, status, start):
        """One line on stderr, and the histograms; no text of prompt or answer."""
        seconds, first, rate = time.monotonic() - start, "-", "-"
        if call.first_token is not None:
            first = f"{call.first_token - start:.3f}"
            if call.completion_tokens > 1:
                rate = f"{(call.completion_tokens - 1) / max(call.last_token - call.first_token, 1e-6):.1f}"
            if status == 200:
                self.metrics.request(call, start)
        self.log(
            f"{call.id} {call.model}: prompt {call.prompt_tokens} (cached {call.cached_tokens}), completion "
            f"{call.completion_tokens}, first token {first} s, {rate} tokens/s, total {seconds:.3f} s, "
            f"{call.finish} {status}"
        )
