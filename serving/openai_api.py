"""OpenAI's requests and replies over an Engine, and the chat page.

    serve_http(engine, tokenizer, args)          # until SIGTERM; args: serve.Args

A request's body becomes an APICall: one engine Request for each prompt, n choices each. The engine's TokenOutputs
become ChoiceDeltas, which are sent as server-sent events, or added up to one answer.
"""

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
    ShuttingDown,
    TokenOutput,
    UnknownAdapter,
)
from serving.http_server import ClientGone, HTTPError, HTTPServer, Limits
from serving.sampling import SamplingParams
from serving.structured_output import constraint_of

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
           "suffix": ("",), "modalities": (["text"],), "audio": (), "prediction": (), "use_beam_search": (False,),
           "grammar": (), "guided_grammar": ()}  # fmt: skip


# field: (type, minimum, maximum)
NUMBERS = {"temperature": (float, 0, 2), "top_p": (float, 0, 1), "top_k": (int, -1, 2**31),
           "seed": (int, -(2**63), 2**63), "presence_penalty": (float, -2, 2), "frequency_penalty": (float, -2, 2),
           "repetition_penalty": (float, 0.01, 100), "min_p": (float, 0, 1), "min_tokens": (int, 0, 2**31),
           "ignore_eos": (bool, None, None)}  # fmt: skip

MAX_CHOICES = 128  # of one request: prompts times n
MAX_STOPS = 16
MAX_BAD_WORDS = 1000
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
        body = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object, found {brief(body)}", code="invalid_json")
    for name, harmless in REFUSED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise bad_request(f"{name}: not supported", name, "unsupported_parameter")
    if body.get("best_of") not in (None, body.get("n") or 1):
        raise bad_request("best_of: only supported if equal to n", "best_of", "unsupported_parameter")
    return body


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


def take_logit_bias(body: dict, vocab_size: int) -> tuple:
    """logit_bias {"id": number of -100 to 100} -> pairs (id, number)."""
    pairs = []
    for key, value in (take_field(body, "logit_bias", dict) or {}).items():
        take_ids([int(key) if re.fullmatch("[0-9]{1,9}", key) else key], "logit_bias", vocab_size)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -100 <= value <= 100:
            raise bad_request(
                f"logit_bias: a number between -100 and 100 is expected, found {brief(value)}", "logit_bias"
            )
        pairs.append((int(key), float(value)))
    return tuple(pairs)


def take_bad_words(body: dict, tokenizer: object) -> tuple:
    """bad_words -> tuples of ids: each word as it is written at the beginning of a text and after a space."""
    words = take_strings(body, "bad_words", MAX_BAD_WORDS)
    ids = [tuple(tokenizer.encode(space + word, False)) for word in words for space in ("", " ")]
    return tuple(dict.fromkeys(filter(None, ids)))


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
    allowed_ids = take_field(body, "allowed_token_ids", list) or []
    return fields | {
        "max_tokens": limit,
        "logprobs": logprobs,
        "stop": take_strings(body, "stop", MAX_STOPS),
        "stop_token_ids": tuple(take_ids(stop_ids, "stop_token_ids", vocab_size)),
        "logit_bias": take_logit_bias(body, vocab_size),
        "allowed_token_ids": tuple(take_ids(allowed_ids, "allowed_token_ids", vocab_size)),
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
    drafted: tuple[int, int] = (0, 0)  # tokens of drafts that were accepted and rejected
    first_token: float | None = None  # time.monotonic()
    last_token: float | None = None
    finish: str = "-"  # for the log

    @property
    def prompt_tokens(self):
        return sum(len(request.prompt_ids) for request in self.requests)

    @property
    def predictions(self):  # of speculative decoding
        return {"accepted_prediction_tokens": self.drafted[0], "rejected_prediction_tokens": self.drafted[1]}

    @property
    def cached_tokens(self):
        return sum(self.cached.values())

    def usage(self):
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **({"completion_tokens_details": self.predictions} if any(self.predictions.values()) else {}),
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
    """page.html -> (bytes, headers). The policy allows its own inline script and style, by hash, and nothing else."""
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

    Everything here runs in the event loop, except the encoding of prompts, which has a thread. The engine has its own
    thread; its callbacks are handed over by call_soon_threadsafe.
    """

    def __init__(self, engine, tokenizer, args):
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.model = args.served_model_name or Path(args.model_name_or_path).resolve().name
        self.created = int(time.time())
        self.fingerprint = f"fp_{hashlib.sha256(f'{self.model} {engine.max_model_len}'.encode()).hexdigest()[:10]}"
        self.page, self.page_headers = read_page()
        limits = Limits(args.max_connections, args.max_body_bytes, args.read_timeout, args.write_timeout)
        self.http, self.running = HTTPServer(self.handle, self.refusal_body, limits), set()  # running: request ids
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
        handler = self.route(request)  # before the body: a refused client need not send it
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
        except Exception:  # a bug: it is printed, and other answers go on
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
        if origin and origin.partition("://")[2] != request.headers.get(
            "host"
        ):  # a browser, with another site's script
            raise HTTPError(403, "pages of other origins may not use this server", "wrong_origin")
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

    # ---- pages and lists
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
            if name.startswith("spec_decode_"):
                lines += [f"# TYPE vllm:{name} counter", f"vllm:{name} {value}"]
                continue
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
        """The body's bytes -> APICall. Runs in a thread, as encoding a long prompt takes time."""
        body = parse_body(data)
        name = take_field(body, "model", str) or self.model
        if name != self.model and name not in self.engine.adapters:
            self.no_model(name)
        stream, options = take_field(body, "stream", bool) or False, take_field(body, "stream_options", dict)
        if options and not stream:
            raise bad_request("stream_options: needs stream: true", "stream_options")
        include_usage = take_field(options or {}, "include_usage", bool) or False
        fields = sampling_fields(body, is_chat, self.tokenizer.vocab_size)
        fields["bad_words"] = take_bad_words(body, self.tokenizer)
        try:
            fields["guide"] = constraint_of(body, self.tokenizer)
        except UserError as error:
            raise bad_request(str(error), str(error).partition(":")[0]) from None
        field = "messages" if is_chat else "prompt"
        try:
            prompts = (chat_prompt if is_chat else completion_prompts)(body, self.tokenizer)
        except UnicodeEncodeError:
            raise bad_request(f"{field}: a lone surrogate is not a character", field) from None
        except UserError as error:
            raise bad_request(str(error), field) from None
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
                limit = f"the model takes {self.engine.max_model_len}, prompt and answer together"
                raise bad_request(f"{field}: {len(ids)} tokens; {limit}", field, "context_length_exceeded")
            # A limit that is too high is not an error: the answer ends with finish_reason length where the room ends.
            limit = min(fields["max_tokens"] or room, room)
            params = SamplingParams(
                **fields | {"max_tokens": limit, "min_tokens": min(fields.get("min_tokens", 0), room)}
            )
            try:
                params.check()
            except UserError as error:
                raise bad_request(str(error), str(error).partition(":")[0]) from None
            adapter = None if name == self.model else name
            call.requests.append(Request(ids, params, adapter, f"{call.id}-{i}"))
        call.unfinished = len(prompts) * fields["n"]
        return call

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
            call = await asyncio.to_thread(self.prepare, data, request.path == "/v1/chat/completions")
            if connection.lost:
                raise ClientGone
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
            call.completion_tokens += 1
            call.cached.setdefault(i, output.cached_tokens)
        if index not in lengths and call.echoes[i] is not None:
            text = call.echoes[i] + text
        if params.logprobs is not None and output.token_id is not None:
            logprobs = output_logprobs(call, output, self.tokenizer, lengths.get(index, 0))
        lengths[index] = lengths.get(index, 0) + len(text)
        if output.finish_reason:
            accepted, rejected = output.accepted_tokens, output.draft_tokens - output.accepted_tokens
            call.drafted = call.drafted[0] + accepted, call.drafted[1] + rejected
            call.unfinished -= 1
            call.finish = output.finish_reason
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
                self.latency.add(seconds)
                self.first_token.add(call.first_token - start)
        self.log(
            f"{call.id} {call.model}: prompt {call.prompt_tokens} (cached {call.cached_tokens}), completion "
            f"{call.completion_tokens}, first token {first} s, {rate} tokens/s, total {seconds:.3f} s, "
            f"{call.finish} {status}"
        )

    # ---- start and end
    async def run(self):
        """Listen until `stop`. Then new requests get a 503, and running ones have until force_stop or drain_timeout."""
        args, server = self.args, self.http
        url = await server.listen(args.host, args.port)
        adapters = "".join(f"; adapter {name}" for name in self.engine.adapters)
        print(
            f"serving {self.model} on {url} ({'with' if args.api_key else 'no'} API key); context "
            f"{self.engine.max_model_len} tokens, {args.max_connections} connections, {args.max_body_bytes:,} bytes a "
            f"body, {args.request_timeout:g} s a request{adapters}",
            flush=True,
        )
        print(f"chat in a browser: {url}   OpenAI's API: {url}v1   end: ctrl-C", flush=True)
        await server.stop.wait()

        self.log(f"shutting down: {len(self.running)} requests are still running")
        shutdown = asyncio.create_task(asyncio.to_thread(self.engine.shutdown, True, args.drain_timeout))
        await asyncio.wait(
            (shutdown, asyncio.create_task(server.force_stop.wait())), return_when=asyncio.FIRST_COMPLETED
        )
        for request_id in list(self.running):
            self.engine.abort(request_id)
        await shutdown
        await server.close(min(5.0, args.write_timeout))


def serve_http(engine: Engine, tokenizer: object, args: object) -> None:
    """Serve until SIGTERM; returns when everything has been answered. UserError if the port is taken.

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
