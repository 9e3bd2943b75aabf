"""OpenAI's requests and replies over an Engine.

    class Server(openai_api.Server)              # in server.py: the paths that lead here, and what else there is

A request's body becomes an APICall: one engine Request for each prompt, n choices each. The engine's TokenOutputs
become ChoiceDeltas, which a reply's format turns into server-sent events, or adds up to one answer. FORMATS has a
format for each path; those of Anthropic's Messages and OpenAI's Responses read their bodies as ones of a chat.
"""

import asyncio
import dataclasses
import hashlib
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator

from formats.files import UserError
from formats.tool_calls import ReplyStream, argument_deltas, template_source
from serving.engine import PromptTooLong, QueueFull, Request, ShuttingDown, TokenOutput, UnknownAdapter
from serving.fields import (
    MAX_CHOICES,
    Prompt,
    bad_request,
    chat_prompt,
    completion_prompts,
    error_body,
    parse_body,
    sampling_fields,
    take_bad_words,
    take_field,
    texts_of,
    thinking_budget,
)
from serving.http_server import ClientGone, Connection, HTTPError, HTTPRequest
from serving.known_fields import known_body
from serving.lanes import Lanes, TooManyTokens
from serving.messages_api import MessagesReply
from serving.metrics import Metrics
from serving.pooling import prompt_logprobs
from serving.responses_api import ResponsesReply, StoredResponses
from serving.sampling import SamplingParams
from serving.structured_output import constraint_of

# ====================================================================================== the objects of an answer


@dataclasses.dataclass
class APICall:
    """One call of the API: one engine request for each prompt, n choices each."""

    id: str
    model: str  # as the client named it
    body: dict  # the request's own, and
    chat: dict  # as one of chat completions
    prompts: list[Prompt]
    stream: bool
    include_usage: bool
    fingerprint: str
    requests: list = dataclasses.field(default_factory=list)  # of Request
    prompt_rows: dict = dataclasses.field(default_factory=dict)  # index of a prompt -> what prompt_logprobs() gives
    readers: dict = dataclasses.field(default_factory=dict)  # index of a chat's choice -> ReplyStream
    shows_thoughts: bool = True
    decoders: dict = dataclasses.field(default_factory=dict)  # index of a completion's choice -> TextOffsets
    hides_reply: bool = False  # max_tokens was 0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    unfinished: int = 0  # choices
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached: dict = dataclasses.field(default_factory=dict)  # index of a prompt -> tokens of it found in the cache
    drafted: tuple[int, int] = (0, 0)  # tokens of drafts that were accepted and rejected
    admitted: float | None = None  # time.monotonic() at which the engine took it from its queue
    first_token: float | None = None
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

    def usage(self) -> dict:
        details = {"reasoning_tokens": self.reasoning_tokens} if self.reasoning_tokens else {}
        if any(self.drafted):
            details |= {"accepted_prediction_tokens": self.drafted[0], "rejected_prediction_tokens": self.drafted[1]}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **({"completion_tokens_details": details} if details else {}),
        }


@dataclasses.dataclass
class ChoiceDelta:
    """What one token adds to one choice; a choice is the sum of its deltas, streamed or not."""

    index: int
    parts: list[dict]  # {"content": text}, or a chat's {"reasoning_content": text} and {"tool_calls": [call]}
    logprobs: dict | None
    finish_reason: str | None
    stop_text: str | None = None  # of the request's `stop`, which ended the reply

    @property
    def text(self):
        return "".join(part.get("content", "") for part in self.parts)


def token_logprob(tokenizer: object, token_id: int, logprob: float | None) -> dict:
    data = tokenizer.piece_bytes(token_id)
    # -9999.0 is OpenAI's smallest: JSON has no -inf
    logprob = None if logprob is None else max(float(logprob), -9999.0)
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


class TextOffsets:
    """Where the text of each token of a choice begins: the next one's after every push."""

    def __init__(self, tokenizer: object, prompt_ids: list[int], echoes: bool, skip_special_tokens: bool):
        self.decoder, self.next = tokenizer.stream_decoder(skip_special_tokens), 0
        if not echoes:
            self.decoder.begin_after(prompt_ids)

    def push(self, token_id: int) -> int:
        """The number of characters before this token."""
        offset = self.next
        self.next += len(self.decoder.push(token_id))
        return offset


def completion_logprobs(tokenizer: object, rows: list[tuple], text_offsets: TextOffsets) -> dict:
    """The logprobs object of a completion's tokens [(id, log-probability, [(id, log-probability), …] or None)].

    The likeliest tokens have the chosen one among them.
    """
    chosen, tops, offsets = [], [], []
    for token_id, logprob, top in rows:
        chosen.append(token_logprob(tokenizer, token_id, logprob))
        offsets.append(text_offsets.push(token_id))
        likeliest = [token_logprob(tokenizer, *pair) for pair in top or ()] + [chosen[-1]]
        tops.append({row["token"]: row["logprob"] for row in likeliest} if top else top and {})
    return {
        "tokens": [row["token"] for row in chosen],
        "token_logprobs": [row["logprob"] for row in chosen],
        "text_offset": offsets,
        "top_logprobs": tops,
    }


class CompletionReply:
    """The reply of /v1/completions, whole or as events."""

    kind, id_prefix, is_chat, tail = "text_completion", "cmpl", False, "data: [DONE]\n\n"
    error_body = staticmethod(error_body)

    def __init__(self, call: APICall):
        self.call, self.started = call, set()

    @classmethod
    def to_chat(cls, body: dict, stored: object) -> dict:
        """The request's body as one of chat completions."""
        return known_body(body, cls.is_chat)

    def _reply(self, choices, kind=None):
        call = self.call
        return {
            "id": call.id,
            "object": kind or self.kind,
            "created": call.created,
            "model": call.model,
            "system_fingerprint": call.fingerprint,
            "choices": choices,
        }

    def whole(self, choices: dict[int, list[ChoiceDelta]]) -> dict:
        """All deltas of each choice -> the answer."""
        rows = []
        for index in sorted(choices):
            parts = [delta.logprobs for delta in choices[index] if delta.logprobs]
            logprobs = {key: [row for part in parts for row in part[key]] for key in parts[0]} if parts else None
            row = {"index": index, "logprobs": logprobs, "finish_reason": choices[index][-1].finish_reason}
            rows.append(row | self._content(choices[index]))
        return self._reply(rows) | {"usage": self.call.usage()}

    def _content(self, deltas):
        return {"text": "".join(delta.text for delta in deltas)}

    def begin(self) -> list[dict]:
        return []

    def events(self, delta: ChoiceDelta) -> list[dict]:
        """A delta -> the chunks that carry it."""
        usage = {"usage": None} if self.call.include_usage else {}
        chunks = [self._reply([choice], f"{self.kind}.chunk" if self.is_chat else None) for choice in self._rows(delta)]
        return [chunk | usage for chunk in chunks]

    def _rows(self, delta):
        row = {"index": delta.index, "text": delta.text, "logprobs": delta.logprobs}
        row["finish_reason"] = delta.finish_reason
        return [row] if delta.text or delta.logprobs or delta.finish_reason else []

    def end(self) -> list[dict]:
        chunk = self._reply([], f"{self.kind}.chunk" if self.is_chat else None)
        return [chunk | {"usage": self.call.usage()}] if self.call.include_usage else []

    def failed(self, error: HTTPError) -> list[dict]:
        return [error_body(error)]

    @staticmethod
    def bytes_of(event: dict) -> str:
        """A server-sent event."""
        return f"data: {json.dumps(event, separators=(',', ':'))}\n\n"


class ChatReply(CompletionReply):
    """The reply of /v1/chat/completions; a stream has the role first and finish_reason by itself."""

    kind, id_prefix, is_chat = "chat.completion", "chatcmpl", True

    def _content(self, deltas):
        parts = [part for delta in deltas for part in delta.parts]
        message = {"role": "assistant", "content": "".join(part.get("content", "") for part in parts), "refusal": None}
        if thoughts := "".join(part.get("reasoning_content", "") for part in parts):
            message["reasoning_content"] = thoughts
        if calls := [call for part in parts for call in part.get("tool_calls", ())]:
            message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
            message["content"] = message["content"] or None
        return {"message": message}

    def _rows(self, delta):
        rows = [] if delta.index in self.started else [({"role": "assistant", "content": ""}, None, None)]
        self.started.add(delta.index)
        logprobs = delta.logprobs
        parts = [piece for part in delta.parts for piece in argument_deltas(part)]
        for part in parts or ([{"content": ""}] if logprobs else []):
            rows.append((part, logprobs, None))
            logprobs = None
        if delta.finish_reason:
            rows.append(({}, None, delta.finish_reason))
        keys = "delta", "logprobs", "finish_reason"
        return [{"index": delta.index, **dict(zip(keys, row))} for row in rows]


FORMATS = {
    "/v1/completions": CompletionReply,
    "/v1/chat/completions": ChatReply,
    "/v1/responses": ResponsesReply,
    "/v1/messages": MessagesReply,
}

OUTPUTS_A_TURN = 128  # tokens of a reply between two looks at the other connections

# =============================================================================================== the server


class Server:
    """The API over one Engine: `generate` answers a request for tokens.

    Everything here runs in the event loop, except the encoding of prompts, which has a thread. The engine has its own
    thread; its callbacks are handed over by call_soon_threadsafe.
    """

    def __init__(self, engine, tokenizer, args):
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.model = self.names[0]  # set in server.py
        self.created = int(time.time())
        self.fingerprint = f"fp_{hashlib.sha256(f'{self.model} {engine.max_model_len}'.encode()).hexdigest()[:10]}"
        self.running, self.metrics, self.lanes = set(), Metrics(self.model, engine.max_model_len), Lanes()
        self.stored = StoredResponses()

    def log(self, line):
        print(line, file=sys.stderr, flush=True)

    # ---- a request
    def prepare(self, data: bytes, form: type) -> APICall:
        """The body's bytes -> APICall. Runs in a thread, as encoding a long prompt takes time."""
        body = parse_body(data)
        chat = form.to_chat(body, self.stored)
        name = take_field(chat, "model", str) or self.model
        if name not in self.names and name not in self.engine.adapters:
            self.no_model(name)
        stream, options = take_field(chat, "stream", bool) or False, take_field(chat, "stream_options", dict)
        if options and not stream:
            raise bad_request("stream_options: needs stream: true", "stream_options")
        include_usage = take_field(options or {}, "include_usage", bool) or False
        fields = sampling_fields(chat, form.is_chat, self.tokenizer.vocab_size)
        fields["bad_words"] = take_bad_words(chat, self.tokenizer)
        prompts = self.read_prompts(chat, form.is_chat)
        if len(prompts) * fields["n"] > MAX_CHOICES:
            raise bad_request(f"n: {len(prompts)} prompts times n are more than {MAX_CHOICES} choices", "n")
        fields["guide"] = self.guide_of(chat, form.is_chat, prompts[0])
        if form.is_chat:
            fields["thinking_budget"] = thinking_budget(chat, self.tokenizer, prompts[0], form is MessagesReply)
        if prompts[0].style is not None:  # marks of calls may be special tokens
            fields.setdefault("skip_special_tokens", False)
        call_id = f"{form.id_prefix}{'_' if form in (ResponsesReply, MessagesReply) else '-'}{uuid.uuid4().hex}"
        call = APICall(call_id, name, body, chat, prompts, stream, include_usage, self.fingerprint)
        call.hides_reply = fields["max_tokens"] == 0
        call.shows_thoughts = take_field(chat, "include_reasoning", bool) is not False
        for i, prompt in enumerate(prompts):
            params = self.params_of(fields, prompt, "messages" if form.is_chat else "prompt")
            adapter = None if name in self.names else name
            request = Request(prompt.ids, params, adapter, f"{call.id}-{i}")
            request.continues_prompt = prompt.continues or not form.is_chat
            call.requests.append(request)
        call.unfinished = len(prompts) * fields["n"]
        return call

    def read_prompts(self, chat: dict, is_chat: bool) -> list[Prompt]:
        """HTTPError 400 for what cannot be a prompt, with the field."""
        field = "messages" if is_chat else "prompt"
        self.refuse_long(field, texts_of(chat, is_chat))
        try:
            return [chat_prompt(chat, self.tokenizer)] if is_chat else completion_prompts(chat, self.tokenizer)
        except UnicodeEncodeError:
            raise bad_request(f"{field}: a lone surrogate is not a character", field) from None
        except UserError as error:
            raise bad_request(str(error), field) from None
        except TooManyTokens:
            raise self.too_long(field, f"more than {self.engine.max_model_len}") from None

    def guide_of(self, chat: dict, is_chat: bool, prompt: Prompt) -> object:
        """The form that the reply must have, None for any."""
        options = {}
        if is_chat:
            parallel = take_field(chat, "parallel_tool_calls", bool)
            template = template_source(self.tokenizer.chat_template)
            thinking = "open" if prompt.thinks else "optional" if "<think>" in template else None
            options = {"tools": chat.get("tools"), "tool_choice": chat.get("tool_choice"), "style": prompt.style}
            options |= {"parallel_tool_calls": parallel is not False, "thinking": thinking}
        try:
            guide = constraint_of(chat, self.tokenizer, **options)
        except UserError as error:
            raise bad_request(str(error), str(error).partition(":")[0]) from None
        if prompt.continues and guide is not None:
            asked = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice")
            given = (name for name in asked if chat.get(name) not in (None, {"type": "text"}))
            field = next(given, "tool_choice")
            if field != "tool_choice" or chat.get("tool_choice") not in (None, "auto"):
                problem = "not together with a last message of the assistant's, which the reply goes on with"
                raise bad_request(f"{field}: {problem}", field)
        return guide

    def params_of(self, fields: dict, prompt: Prompt, field: str) -> SamplingParams:
        room = self.engine.max_model_len - len(prompt.ids)
        if not prompt.ids:
            raise bad_request(f"{field}: empty", field)
        if room < 1:
            raise self.too_long(field, len(prompt.ids))
        asked, fewest = fields["max_tokens"], fields.get("min_tokens", 0)
        if fewest > (room if asked is None else asked):
            most = f"max_tokens, {asked}" if asked is not None else f"what the model has room for, {room}"
            raise bad_request(f"min_tokens: {fewest}; at most {most}", "min_tokens")
        # A limit that is too high is not an error: the answer ends with finish_reason length where the room ends.
        limit = max(1, min(room if asked is None else asked, room))
        params = SamplingParams(**fields | {"max_tokens": limit, "min_tokens": min(fewest, limit)})
        try:
            params.check()
        except UserError as error:
            raise bad_request(str(error), str(error).partition(":")[0]) from None
        return params

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
                field = "messages" if "messages" in call.chat else "prompt"
                raise bad_request(str(error), field, "context_length_exceeded") from None
            except UnknownAdapter:
                self.no_model(call.model)
            except UserError as error:
                raise bad_request(str(error), str(error).partition(":")[0]) from None

    def shutting_down_error(self):
        return HTTPError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5"})

    async def generate(self, connection: Connection, request: HTTPRequest, data: bytes) -> int:
        """POST of one of FORMATS; returns the status. However it ends, none of its requests stays in the engine."""
        start, call, status, form = time.monotonic(), None, 500, FORMATS[request.path]
        try:
            if self.http.draining:
                raise self.shutting_down_error()
            deadline = start + self.args.request_timeout
            call = await self.lanes.run(connection, deadline, len(data), self.prepare, data, form)
            for i, each in enumerate(call.requests):
                if call.prompts[i].echo is not None and each.params.logprobs is not None:
                    rows = prompt_logprobs(self.engine, each.prompt_ids, each.adapter, each.params.logprobs)
                    call.prompt_rows[i] = await self.until_done(connection, rows)
            outputs, reply = [], form(call)
            self.submit(call, connection, outputs)
            if call.stream:
                status = await self.stream(connection, call, reply, outputs, start)
            else:
                status = await self.answer(connection, call, reply, outputs, start)
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

    # ---- a reply
    async def deltas(self, connection: Connection, call: APICall, outputs: list, start: float) -> AsyncIterator[list]:
        """Yields lists of ChoiceDeltas as they come, until all choices are finished.

        HTTPError: the time is up, or the engine failed. ClientGone.
        """
        deadline, lengths = start + self.args.request_timeout, {}
        while call.unfinished:
            if connection.client_disconnected(b": still here\n\n"):
                raise ClientGone
            if outputs:
                batch, outputs[:] = outputs[:OUTPUTS_A_TURN], outputs[OUTPUTS_A_TURN:]
                yield [self.to_delta(call, i, output, lengths) for i, output in batch]
                if outputs:
                    await asyncio.sleep(0)
            elif time.monotonic() >= deadline:
                raise HTTPError(504, f"not finished within {self.args.request_timeout:g} seconds", "timeout")
            else:
                await connection.wait_until(deadline)

    def to_delta(self, call: APICall, i: int, output: TokenOutput, lengths: dict) -> ChoiceDelta:
        """lengths: characters of each choice so far, which grow."""
        if output.finish_reason in ("abort", "error"):
            call.finish = output.finish_reason
            self.metrics.finished[output.finish_reason] += 1
            raise (
                self.shutting_down_error()
                if self.http.draining
                else HTTPError(500, "the engine failed", "engine_error")
            )
        index = i * call.requests[i].params.n + output.index
        if output.token_id is not None:
            self.count_token(call, i, index, output)
        if "messages" in call.chat:
            delta = self.chat_delta(call, i, index, output)
        else:
            delta = self.completion_delta(call, i, index, output, lengths)
        if output.finish_reason:
            accepted, rejected = output.accepted_tokens, output.draft_tokens - output.accepted_tokens
            call.drafted = call.drafted[0] + accepted, call.drafted[1] + rejected
            call.unfinished -= 1
            call.finish = delta.finish_reason
            self.metrics.finished[output.finish_reason] += 1
        return delta

    def count_token(self, call, i, index, output):
        call.last_token = time.monotonic()
        call.first_token = call.first_token or call.last_token
        call.admitted = call.admitted or output.admitted
        if index in call.token_times:
            self.metrics.token(call.last_token - call.token_times[index])
        call.token_times[index] = call.last_token
        call.lengths[index] = call.lengths.get(index, 0) + 1
        call.completion_tokens += not call.hides_reply
        call.cached.setdefault(i, output.cached_tokens)

    def chat_delta(self, call: APICall, i: int, index: int, output: TokenOutput) -> ChoiceDelta:
        prompt, params = call.prompts[i], call.requests[i].params
        reader = call.readers.setdefault(index, ReplyStream(prompt.style, prompt.thinks))
        parts, reason, logprobs = reader.push(output.text), output.finish_reason, None
        call.reasoning_tokens += reader.part == "thoughts" and output.token_id is not None
        if reason:
            parts += reader.finish()
            reason = "tool_calls" if reason == "stop" and reader.calls else reason
        if not call.shows_thoughts:
            parts = [part for part in parts if "reasoning_content" not in part]
        is_hidden = not call.shows_thoughts and reader.part == "thoughts"
        if params.logprobs is not None and output.token_id is not None and not is_hidden:
            top = [token_logprob(self.tokenizer, *pair) for pair in output.top_logprobs or ()]
            row = token_logprob(self.tokenizer, output.token_id, output.logprob)
            logprobs = {"content": [row | {"top_logprobs": top}]}
        return ChoiceDelta(index, parts, logprobs, reason, output.stop_text)

    def completion_delta(self, call, i, index, output, lengths) -> ChoiceDelta:
        text, rows, request, reason = output.text, [], call.requests[i], output.finish_reason
        if request.params.logprobs is not None and output.token_id is not None:
            rows = [(output.token_id, output.logprob, output.top_logprobs)]
        if call.hides_reply:
            text, rows, reason = "", [], "length"
        if index not in lengths and call.prompts[i].echo is not None:
            text, rows = call.prompts[i].echo + text, call.prompt_rows.get(i, []) + rows
        lengths[index], logprobs = lengths.get(index, 0) + len(text), None
        if rows:
            echoes, skips = call.prompts[i].echo is not None, request.params.skip_special_tokens
            if index not in call.decoders:
                call.decoders[index] = TextOffsets(self.tokenizer, request.prompt_ids, echoes, skips)
            logprobs = completion_logprobs(self.tokenizer, rows, call.decoders[index])
        return ChoiceDelta(index, [{"content": text}] if text else [], logprobs, reason)

    async def answer(self, connection, call, reply, outputs, start):
        """Send one answer, not streamed."""
        choices = {}
        async for batch in self.deltas(connection, call, outputs, start):
            for delta in batch:
                choices.setdefault(delta.index, []).append(delta)
        body = reply.whole(choices)
        self.stored.keep(call, body)
        await connection.respond(200, body, {"X-Request-Id": call.id})
        return 200

    async def stream(self, connection, call, reply, outputs, start):
        """Send server-sent events. The status is 200 from the first one on; an error becomes an event."""
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "X-Accel-Buffering": "no",
            "X-Request-Id": call.id,
        }
        await connection.start_response(200, headers)
        if begun := "".join(map(reply.bytes_of, reply.begin())):
            await connection.send_data(begun.encode())
        status = 200
        try:
            async for batch in self.deltas(connection, call, outputs, start):
                events = [reply.bytes_of(event) for delta in batch for event in reply.events(delta)]
                if events:
                    await connection.send_data("".join(events).encode())
            last = reply.end()
            self.stored.keep(call, last[-1].get("response") if last else None)
        except HTTPError as error:
            last, status = reply.failed(error), error.status
        await connection.send_data(("".join(map(reply.bytes_of, last)) + reply.tail).encode(), last=True)
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
