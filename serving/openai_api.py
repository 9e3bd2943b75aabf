"""OpenAI's requests and replies over an Engine."""

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from formats.files import UserError, brief
from serving.engine import (
    Engine,
    PromptTooLong,
    QueueFull,
    Request,
    SamplingParams,
    ShuttingDown,
    TokenOutput,
    UnknownAdapter,
)
from serving.http_server import ClientGone, HTTPError, HTTPServer, Limits

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


def take_field(body: dict, name: str, kind: type, least: float | None = None, most: float | None = None) -> object:
    """body[name], None if absent or null; HTTPError 400 if it is not of this kind or not within least..most."""
    value = body.get(name)
    if value is None:
        return None
    right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not right or (least is not None and not least <= value <= most):
        bounds = "" if least is None else f" between {least} and {most}"
        raise bad_request(f"{name}: {KINDS[kind]}{bounds} is wanted, found {brief(value)}", name)
    return float(value) if kind is float else value


def parse_body(data: bytes) -> dict:
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


def take_strings(body: dict, name: str, most: float | None) -> list[str]:
    """A string or a list of at most `most` strings, none of them empty -> tuple."""
    value = body.get(name)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > most or not all(isinstance(part, str) and part for part in value):
        raise bad_request(
            f"{name}: a string or a list of at most {most} is wanted, none empty, found {brief(value)}", name
        )
    return tuple(value)


def take_ids(value: object, name: str, vocab_size: int) -> list[int]:
    for token_id in value:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
            raise bad_request(f"{name}: token ids from 0 to {vocab_size - 1} are wanted, found {brief(token_id)}", name)
    return value


def sampling_fields(body: dict, is_chat: bool, vocab_size: int) -> dict:
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


def message_text(message: dict, where: str) -> str:
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


def chat_prompt(body: dict, tokenizer: object) -> list:
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


def completion_prompts(body: dict, tokenizer: object) -> list:
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
class APICall:
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
class ChoiceDelta:
    """What one token adds to one choice; a choice is the sum of its pieces, streamed or not."""

    index: int
    text: str
    logprobs: dict | None
    finish_reason: str | None


def token_logprob(tokenizer: object, token_id: int, logprob: float) -> dict:
    data = tokenizer.piece_bytes(token_id)
    # OpenAI's smallest: JSON has no -inf.
    return {"token": data.decode("utf-8", "replace"), "logprob": max(float(logprob), -9999.0), "bytes": list(data)}


def output_logprobs(job: APICall, output: TokenOutput, tokenizer: object, offset: int) -> list | dict:
    """An TokenOutput -> the logprobs object of its API, of one token; `offset`: characters of the choice before it."""
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


def stream_choices(job: APICall, piece: ChoiceDelta, is_first: bool) -> Iterator[dict]:
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


def whole_choice(job: APICall, index: int, pieces: list) -> dict:
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


def read_page() -> tuple[bytes, dict]:
    """page.html -> (bytes, headers): its policy allows its own inline script and style, by hash, and nothing else."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
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
    """The API and the page over one Engine. `handle` answers a request, `generate` one for tokens.

    What runs where: everything here in the event loop, encoding of prompts in a thread, the engine in its own. The
    engine's callbacks come from there and are handed over by call_soon_threadsafe."""

    def __init__(self, engine, tokenizer, args):
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.model = args.served_model_name or Path(args.model_name_or_path).resolve().name
        self.created = int(time.time())
        self.fingerprint = f"fp_{hashlib.sha256(f'{self.model} {engine.max_model_len}'.encode()).hexdigest()[:10]}"
        self.page, self.page_headers = read_page()
        limits = Limits(args.max_connections, args.max_body_bytes, args.read_timeout, args.write_timeout)
        self.http, self.running = HTTPServer(self.handle, self.refusal_body, limits), set()  # running: ids of requests
        self.answers, self.latency, self.first_token = {}, Histogram(), Histogram()
        self.routes = {  # path: (method, handler, open to all)
            "/": ("GET", self.get_page, True),
            "/health": ("GET", self.get_health, True),
            "/metrics": ("GET", self.get_metrics, False),
            "/v1/models": ("GET", self.get_models, False),
            "/v1/chat/completions": ("POST", self.generate, False),
            "/v1/completions": ("POST", self.generate, False),
        }

    # ---- a request
    async def handle(self, connection, request):
        """Read the rest of a request and answer it. HTTPError before its body is here: the connection ends."""
        handler = self.route(request)  # before the body: whoever may not ask need not send it
        body = await connection.read_body(request)
        status = 500
        try:
            status = await handler(connection, request, body)
        except HTTPError as error:
            status = error.status
            await connection.respond(status, error_body(error), error.headers)
        except ClientGone:
            status = 499
            raise
        except Exception:  # a bug; it must show, but not end the others' answers
            traceback.print_exc()
            if connection.may_respond:
                await connection.respond(
                    500, error_body(HTTPError(500, "internal error", "internal_error")), close=True
                )
        finally:
            self.count(request.path, status)

    def refusal_body(self, error):
        self.count("", error.status)
        self.log(f"- refused: {error.status} {error.code or ''}")
        return error_body(error)

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
        if origin and origin.partition("://")[2] != request.headers.get("host"):  # another site's script in a browser
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
        await connection.respond(200, self.page, self.page_headers)
        return 200

    async def get_health(self, connection, request, body):
        status = 503 if self.http.draining else 200
        await connection.respond(status, {"status": "draining" if self.http.draining else "ok"})
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
        await connection.respond(200, answer)
        return 200

    async def get_metrics(self, connection, request, body):
        lines = []
        for name, value in self.engine.stats().items():
            kind = "counter" if name.endswith("_total") and not name.startswith("blocks_") else "gauge"
            name = "llm_" + ("blocks" if name == "blocks_total" else name)
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        lines += ["# TYPE llm_connections gauge", f"llm_connections {len(self.http.connections)}"]
        lines.append("# TYPE llm_http_responses_total counter")
        for (path, status), count in sorted(self.answers.items()):
            lines.append(f'llm_http_responses_total{{path="{path}",status="{status}"}} {count}')
        lines += [
            *self.latency.lines("llm_request_seconds"),
            *self.first_token.lines("llm_time_to_first_token_seconds"),
        ]
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        await connection.respond(200, ("\n".join(lines) + "\n").encode(), headers)
        return 200

    def no_model(self, name):
        known = ", ".join((self.model, *self.engine.adapters))
        raise APIError(404, f"model: {brief(name)} does not exist; there are {known}", "model_not_found", "model")

    # ---- an answer
    def prepare(self, data, is_chat):
        """The body's bytes -> APICall. Runs in a thread, as encoding a long prompt takes its time."""
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
        job = APICall(
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
                raise HTTPError(429, str(error), "queue_full", headers={"Retry-After": "1"}) from None
            except ShuttingDown:
                raise self.shutting_down_error() from None
            except PromptTooLong as error:
                field = "messages" if job.is_chat else "prompt"
                raise bad_request(str(error), field, "context_length_exceeded") from None
            except UnknownAdapter:
                self.no_model(job.model)
            except UserError as error:
                raise bad_request(str(error), str(error).partition(":")[0]) from None

    def shutting_down_error(self):
        return HTTPError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5"})

    async def generate(self, connection, request, data):
        """POST of either API: returns the status. Whatever happens, nothing of it stays in the engine."""
        start, job, status = time.monotonic(), None, 500
        try:
            if self.http.draining:
                raise self.shutting_down_error()
            job = await asyncio.to_thread(self.prepare, data, request.path == "/v1/chat/completions")
            if connection.lost:
                raise ClientGone
            outputs = []
            self.submit(job, connection, outputs)
            if job.stream:
                status = await self.stream(connection, job, outputs, start)
            else:
                status = await self.answer(connection, job, outputs, start)
        except HTTPError as error:
            status = error.status
            if job is None:
                self.log(f"- refused: {status} {error.code or getattr(error, 'param', None) or ''}")
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

    async def pieces(self, connection, job, outputs, start):
        """Yields lists of Pieces as they come, until all choices are finished. HTTPError: time is up, or the engine
        gave up; ClientGone."""
        deadline, lengths = start + self.args.request_timeout, {}
        while job.unfinished:
            if connection.client_disconnected(b": still here\n\n"):
                raise ClientGone
            if outputs:
                batch = [self.piece(job, i, output, lengths) for i, output in outputs]
                outputs.clear()
                yield batch
            elif time.monotonic() >= deadline:
                raise HTTPError(504, f"not finished within {self.args.request_timeout:g} seconds", "timeout")
            else:
                await connection.wait_until(deadline)

    def piece(self, job, i, output, lengths):
        if output.finish_reason in ("abort", "error"):
            job.finish = output.finish_reason
            raise (
                self.shutting_down_error()
                if self.http.draining
                else HTTPError(500, "the engine failed", "engine_error")
            )
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
        return ChoiceDelta(index, text, logprobs, output.finish_reason)

    async def answer(self, connection, job, outputs, start):
        """Not streamed."""
        choices = {}
        async for batch in self.pieces(connection, job, outputs, start):
            for piece in batch:
                choices.setdefault(piece.index, []).append(piece)
        whole = [whole_choice(job, index, choices[index]) for index in sorted(choices)]
        reply = job.reply(whole, chunk=False) | {"usage": job.usage()}
        await connection.respond(200, reply, {"X-Request-Id": job.id})
        return 200

    async def stream(self, connection, job, outputs, start):
        """Server-sent events. Once they flow the status is 200; an error becomes an event."""
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "X-Accel-Buffering": "no",
            "X-Request-Id": job.id,
        }

        def event(reply):
            return f"data: {json.dumps(reply, separators=(',', ':'))}\n\n"

        await connection.start_response(200, headers)
        started, usage, status = set(), {"usage": None} if job.include_usage else {}, 200
        try:
            async for batch in self.pieces(connection, job, outputs, start):
                events = []
                for piece in batch:
                    for choice in stream_choices(job, piece, piece.index not in started):
                        events.append(event(job.reply([choice], chunk=True) | usage))
                    started.add(piece.index)
                if events:
                    await connection.send_data("".join(events).encode())
            last = event(job.reply([], chunk=True) | {"usage": job.usage()}) if job.include_usage else ""
        except HTTPError as error:
            last, status = event(error_body(error)), error.status
        await connection.send_data(f"{last}data: [DONE]\n\n".encode(), last=True)
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
        """Listen until `stop`; then new requests get a 503, and what runs has until `force_stop` or drain_timeout."""
        args, server = self.args, self.http
        url = await server.listen(args.host, args.port)
        adapters = "".join(f"; adapter {name}" for name in self.engine.adapters)
        print(
            f"serving {self.model} on {url} ({'with' if args.api_key else 'no'} API key); context "
            f"{self.engine.max_model_len} tokens, {args.max_connections} connections, {args.max_body_bytes:,} bytes a "
            f"body, {args.request_timeout:g} s a request{adapters}",
            flush=True,
        )
        await server.stop.wait()

        self.log(f"shutting down: {len(self.running)} requests are to be finished")
        shutdown = asyncio.create_task(asyncio.to_thread(self.engine.shutdown, True, args.drain_timeout))
        await asyncio.wait(
            (shutdown, asyncio.create_task(server.force_stop.wait())), return_when=asyncio.FIRST_COMPLETED
        )
        for request_id in list(self.running):
            self.engine.abort(request_id)
        await shutdown
        await server.close(min(5.0, args.write_timeout))


def serve_http(engine: Engine, tokenizer: object, args: object) -> None:
    """Serve until SIGTERM; returns when everything has been answered. UserError where the port cannot be had.

    args: host, port (0: a free one), api_key, model_name_or_path, served_model_name, max_connections, max_body_bytes,
    read_timeout, write_timeout, request_timeout, drain_timeout."""

    async def serve():
        server = Server(engine, tokenizer, args)
        server.http.stop_on_signals()
        engine.start()
        try:
            await server.run()
        finally:
            await asyncio.to_thread(engine.shutdown, False, 0)

    asyncio.run(serve())
