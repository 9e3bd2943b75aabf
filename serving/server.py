"""The server: which paths there are, who may use them, and what /health, /metrics and the model's own routes say.

    serve_http(engine, tokenizer, args)          # until SIGTERM; args: serve.Args

Requests for text are answered in openai_api.py. Everything here runs in the event loop; tokenizing has threads
(lanes.py), and what needs the model runs between two steps of the engine (pooling.py, loras.py).
"""

import asyncio
import base64
import hashlib
import re
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from formats.files import UserError, brief
from serving import openai_api
from serving.access import Access, is_preflight, model_names, preflight_headers
from serving.engine import Engine
from serving.fields import APIError, bad_request, chat_prompt, error_body, parse_body, take_field, take_ids
from serving.http_server import ClientGone, Connection, HTTPError, HTTPRequest, HTTPServer, Limits
from serving.lanes import TooManyTokens, limit_tokens
from serving.loras import load_lora, unload_lora
from serving.pooling import embed

VERSION = "1.0"  # of this server's routes
MOST_INPUTS = 2048  # of one request for embeddings, as OpenAI has it
REFUSED_BY_EMBEDDINGS = {"dimensions": (), "messages": (), "normalize": (True,), "use_activation": (True,),
                         "embed_dtype": ("float32",), "endianness": ("native", "little")}  # fmt: skip


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


class Server(openai_api.Server):
    """The API and the page over one Engine. `handle` answers a request."""

    def __init__(self, engine: Engine, tokenizer: object, args: object):
        self.names = model_names(args.served_model_name, args.model_name_or_path)
        super().__init__(engine, tokenizer, args)
        self.page, self.page_headers = read_page()
        self.access = Access(args.api_key, args.allowed_origins, args.trusted_proxies)
        limits = args.max_connections, args.max_body_bytes, args.read_timeout, args.write_timeout
        self.http = HTTPServer(self.handle, self.refusal_body, Limits(*limits, uncounted=("/health", "/ping")))
        get, post = ("GET", "HEAD"), ("POST",)
        self.routes = {  # path: (methods, handler, open to all)
            "/": (get, self.get_page, True),
            "/health": (get, self.get_health, True),
            "/ping": ((*get, *post), self.get_health, True),
            "/version": (get, self.get_version, True),
            "/metrics": (get, self.get_metrics, False),
            "/v1/models": (get, self.get_models, False),
            "/v1/chat/completions": (post, self.generate, False),
            "/v1/completions": (post, self.generate, False),
            "/v1/responses": (post, self.generate, False),
            "/v1/responses/{response_id}": (("GET", "HEAD", "DELETE"), self.stored_response, False),
            "/v1/messages": (post, self.generate, False),
            "/v1/messages/count_tokens": (post, self.count_messages, False),
            "/v1/embeddings": (post, self.embeddings, False),
            "/tokenize": (post, self.tokenize, False),
            "/detokenize": (post, self.detokenize, False),
            "/v1/load_lora_adapter": (post, self.change_loras, False),
            "/v1/unload_lora_adapter": (post, self.change_loras, False),
        }

    # ---- a request
    async def handle(self, connection: Connection, request: HTTPRequest) -> None:
        """Read the rest of a request and answer it. HTTPError before its body is here: the connection ends."""
        form = openai_api.FORMATS.get(request.path)
        error_object = form.error_body if form else error_body
        try:
            connection.extra_headers |= self.access.origin_headers(request, connection.peer)
            methods, handler = self.route(request)  # before the body: a refused client need not send it
            body = await connection.read_body(request)
        except HTTPError as error:
            error.body = error_object(error)
            raise
        if handler is None:  # a preflight
            await connection.respond(204, b"", preflight_headers(request, methods))
            self.count(request.path, 204)
            return
        status = 500
        try:
            status = await handler(connection, request, body)
        except HTTPError as error:
            status = error.status
            await connection.respond(status, error_object(error), error.headers)
        except ClientGone:
            status = 499
            raise
        except Exception:  # a bug: it is printed, and other answers go on
            traceback.print_exc()
            if connection.may_respond:
                error = HTTPError(500, "internal error", "internal_error")
                await connection.respond(500, error_object(error), close=True)
        finally:
            self.count(request.path, status)

    def route(self, request: HTTPRequest) -> tuple:
        """(methods of the path, its handler; None for a browser's preflight). HTTPError 401, 404, 405."""
        path = re.sub("^/v1/responses/[^/]+$", "/v1/responses/{response_id}", request.path)
        if path not in self.routes and not path.startswith("/v1/models/"):
            raise HTTPError(404, "no such path; there are " + ", ".join(self.routes), "unknown_path")
        methods, handler, is_open = self.routes.get(path, (("GET", "HEAD"), self.get_models, False))
        if is_preflight(request):
            return methods, None
        if request.method not in methods:
            allowed = {"Allow": ", ".join(methods)}
            raise HTTPError(405, f"{request.path} takes {' and '.join(methods)}", "method_not_allowed", allowed)
        if not is_open:
            self.access.check_key(request)
        return methods, handler

    def refusal_body(self, error):
        self.count("", error.status)
        self.log(f"- refused: {error.status} {error.code or ''}")
        return getattr(error, "body", None) or error_body(error)

    def count(self, path: str, status: int) -> None:
        self.metrics.response(path if path in self.routes else "other", status)

    async def read_in_lane(self, connection: Connection, body: bytes, function: Callable, *supported) -> object:
        """function(the body's object) in a thread; supported: as in parse_body."""

        def work():
            try:
                return function(parse_body(body, supported))
            except UnicodeEncodeError:
                raise bad_request("a lone surrogate is not a character") from None
            except UserError as error:
                raise bad_request(str(error)) from None
            except TooManyTokens:
                raise self.too_long("input", f"more than {self.engine.max_model_len}") from None

        deadline = time.monotonic() + self.args.request_timeout
        return await self.lanes.run(connection, deadline, len(body), work)

    async def until_done(self, connection: Connection, future: Future) -> object:
        """The result of what runs between two steps of the engine. ClientGone, HTTPError 400, 504."""
        deadline, loop = time.monotonic() + self.args.request_timeout, asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(connection.changed.set))
        try:
            while not future.done():
                if connection.client_disconnected():
                    raise ClientGone
                if time.monotonic() >= deadline:
                    raise HTTPError(504, f"not finished within {self.args.request_timeout:g} seconds", "timeout")
                await connection.wait_until(deadline)
            return future.result()
        except UserError as error:
            raise bad_request(str(error), str(error).partition(":")[0]) from None
        finally:
            future.cancel()

    def adapter_of(self, body: dict) -> str | None:
        """The adapter that the request's `model` names, None for the base model. HTTPError 404."""
        name = take_field(body, "model", str) or self.model
        if name not in self.names and name not in self.engine.adapters:
            self.no_model(name)
        return None if name in self.names else name

    # ---- state
    async def get_page(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        await connection.respond(200, self.page, self.page_headers)
        return 200

    async def get_health(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        status = 503 if self.http.draining else 200
        await connection.respond(status, {"status": "draining" if self.http.draining else "ok"})
        return status

    async def get_version(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        await connection.respond(200, {"version": VERSION})
        return 200

    async def get_models(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        rows = [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "local",
                "root": self.model,
                "max_model_len": self.engine.max_model_len,
                "parent": None if name in self.names else self.model,
            }
            for name in (*self.names, *self.engine.adapters)
        ]
        answer = {"object": "list", "data": rows}
        if request.path != "/v1/models":
            name = unquote(request.path.removeprefix("/v1/models/"))
            answer = next((row for row in rows if row["id"] == name), None) or self.no_model(name)
        await connection.respond(200, answer)
        return 200

    async def stored_response(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        name = unquote(request.path.removeprefix("/v1/responses/"))
        found = self.stored.delete(name) if request.method == "DELETE" else self.stored.get(name)
        await connection.respond(200, found)
        return 200

    async def get_metrics(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        text = self.metrics.text(self.engine.stats(), len(self.http.connections))
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        await connection.respond(200, text.encode(), headers)
        return 200

    def no_model(self, name: str) -> None:
        known = ", ".join((*self.names, *self.engine.adapters))
        raise APIError(404, f"model: {brief(name)} does not exist; there are {known}", "model_not_found", "model")

    # ---- tokens, as vLLM's server has them
    async def tokenize(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        await connection.respond(
            200, await self.read_in_lane(connection, body, self.count_tokens, "add_special_tokens")
        )
        return 200

    def count_tokens(self, body: dict) -> dict:
        self.adapter_of(body)
        with_strings = take_field(body, "return_token_strs", bool)
        if "messages" in body:
            ids = chat_prompt(body, self.tokenizer).ids
        else:
            text, special = take_field(body, "prompt", str), take_field(body, "add_special_tokens", bool)
            if text is None:
                raise bad_request("prompt: must be a string; or give messages", "prompt")
            ids = self.tokenizer.encode(text, special is not False)
        pieces = [self.tokenizer.piece_bytes(i).decode("utf-8", "replace") for i in ids] if with_strings else None
        return {"count": len(ids), "max_model_len": self.engine.max_model_len, "tokens": ids, "token_strs": pieces}

    async def count_messages(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        """Anthropic's count_tokens: the prompt's, as /v1/messages would have it."""

        def count(body):
            chat = openai_api.MessagesReply.to_chat(body | {"max_tokens": 1})
            self.adapter_of(chat)
            return {"input_tokens": len(chat_prompt(chat, self.tokenizer).ids)}

        await connection.respond(200, await self.read_in_lane(connection, body, count))
        return 200

    async def detokenize(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        await connection.respond(200, await self.read_in_lane(connection, body, self.text_of_tokens))
        return 200

    def text_of_tokens(self, body: dict) -> dict:
        self.adapter_of(body)
        ids = take_field(body, "tokens", list)
        if ids is None:
            raise bad_request("tokens: must be a list of token ids", "tokens")
        return {"prompt": self.tokenizer.decode(take_ids(ids, "tokens", self.tokenizer.vocab_size), False)}

    # ---- embeddings
    async def embeddings(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        """OpenAI's embeddings: pooled hidden states of length 1."""
        if self.http.draining:
            raise self.shutting_down_error()
        name, adapter, inputs, encoding = await self.read_in_lane(connection, body, self.embedding_inputs)
        rows = []
        for i, ids in enumerate(inputs):  # one at a time, so that replies go on between them
            future = embed(self.engine, ids, adapter, self.args.pooling_type)
            vector = await self.until_done(connection, future)
            data = vector.astype("<f4").tobytes()
            value = base64.b64encode(data).decode() if encoding == "base64" else vector.astype(np.float64).tolist()
            rows.append({"object": "embedding", "index": i, "embedding": value})
        tokens = sum(map(len, inputs))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await connection.respond(200, {"object": "list", "data": rows, "model": name, "usage": usage})
        return 200

    def embedding_inputs(self, body: dict) -> tuple:
        """(model as the client names it, adapter, ids of each input, encoding_format)."""
        for name, harmless in REFUSED_BY_EMBEDDINGS.items():
            if body.get(name) is not None and body[name] not in harmless:
                raise bad_request(f"{name}: not supported by embeddings", name, "unsupported_parameter")
        adapter, encoding = self.adapter_of(body), take_field(body, "encoding_format", str) or "float"
        if encoding not in ("float", "base64"):
            raise bad_request(
                f'encoding_format: must be "float" or "base64", found {brief(encoding)}', "encoding_format"
            )
        given = body.get("input")
        if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
            given = [given]
        if not isinstance(given, list) or not 1 <= len(given) <= MOST_INPUTS:
            expected = f"a string, a list of token ids, or a list of at most {MOST_INPUTS} of these"
            raise bad_request(f"input: must be {expected}, found {brief(given)}", "input")
        limit, inputs = self.engine.max_model_len, []
        for part in given:
            if not isinstance(part, (str, list)):
                raise bad_request(f"input: each must be a string or a list of token ids, found {brief(part)}", "input")
            self.refuse_long("input", [part] if isinstance(part, str) else ())
            ids = part if isinstance(part, list) else self.tokenizer.encode(part)
            take_ids(ids, "input", self.tokenizer.vocab_size)
            if not 1 <= len(ids) <= limit:
                code = "context_length_exceeded" if ids else None
                raise bad_request(f"input: {len(ids)} tokens; 1 to {limit} are possible", "input", code)
            inputs.append(ids)
        return take_field(body, "model", str) or self.model, adapter, inputs, encoding

    # ---- adapters
    async def change_loras(self, connection: Connection, request: HTTPRequest, body: bytes) -> int:
        """vLLM's load_lora_adapter and unload_lora_adapter: {"lora_name", "lora_path"}."""
        if not self.args.allow_runtime_lora:
            raise HTTPError(403, "adapters may be changed if the server runs with --allow_runtime_lora", "not_allowed")
        body = parse_body(body)
        name, loads = take_field(body, "lora_name", str), request.path == "/v1/load_lora_adapter"
        path = take_field(body, "lora_path", str)
        if not name or (loads and not path):
            missing = "lora_name" if not name else "lora_path"
            raise bad_request(f"{missing}: must be a string that is not empty", missing)
        if name in self.names:
            raise bad_request(f"lora_name: {brief(name)} is the model's name", "lora_name")
        if loads:
            await self.until_done(connection, load_lora(self.engine, name, path))
        elif name not in self.engine.adapters:
            self.no_model(name)
        else:
            await self.until_done(connection, unload_lora(self.engine, name))
        self.log(f"- adapter {name} {'loaded' if loads else 'unloaded'}")
        done = f"Success: LoRA adapter '{name}' {'added' if loads else 'removed'} successfully."
        await connection.respond(200, done.encode())
        return 200

    def refuse_long(self, field: str, texts: list[str]) -> None:
        """HTTPError 400 for texts that cannot fit, before they are tokenized; and while they are, from here on."""
        limit_tokens(self.engine.max_model_len)
        fewest = sum(map(self.tokenizer.fewest_tokens, texts))
        if fewest > self.engine.max_model_len:
            raise self.too_long(field, f"at least {fewest}")

    # ---- start and end
    async def run(self):
        """Listen until `stop`. Then new requests get a 503, and running ones have until force_stop or drain_timeout."""
        args, server = self.args, self.http
        url = await server.listen(args.host, args.port)
        url = url.replace("//0.0.0.0:", "//localhost:").replace("//[::]:", "//localhost:")  # which browsers open
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

    args: those of serve.Args from `host` on, and model_name_or_path."""

    async def serve():
        server = Server(engine, tokenizer, args)
        server.http.stop_on_signals()
        engine.start()
        try:
            await server.run()
        finally:
            await asyncio.to_thread(engine.shutdown, False, 0)

    asyncio.run(serve())
