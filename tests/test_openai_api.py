"""serve.py's HTTP interface and its page, on an engine of 80 lines that answers without a model.

    python -m pytest tests/test_openai_api.py            # 64 clients for 3 seconds
    python -m pytest tests/test_openai_api.py --slow     # for two minutes

The page's tests need chromium (apt install chromium), the client's the openai package; each is skipped without.
"""

import asyncio
import base64
import codecs
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import serve
from formats.files import UserError
from formats.messages import parse_message, parse_tools
from serving.engine import Engine, QueueFull, ShuttingDown, TokenOutput
from serving.sampling import SamplingParams
from serving.server import Server, serve_http

ROOT = Path(serve.__file__).resolve().parent


# ========================================================================================= an engine without a model


class ByteTokenizer:
    """A token a byte, 256 ends a reply."""

    vocab_size, eos, stop_ids, chat_template = 257, 256, [256], SimpleNamespace(source="chat")
    special_ids, added_ids, special_in_messages = {256}, {256: "</s>"}, True

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def fewest_tokens(self, text):
        return len(text)

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def piece_bytes(self, token_id):
        return bytes([token_id]) if token_id < 256 else b"</s>"

    def stream_decoder(self, skip_special_tokens=True):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        push = lambda i: decoder.decode(bytes([i])) if i < 256 else ""
        return SimpleNamespace(push=push, begin_after=lambda ids: None)

    def apply_chat(self, messages, add_generation_prompt=True, tools=None, template_kwargs=None):
        parse_tools(tools)
        messages = [parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        if messages[-1]["role"] != "user":
            raise UserError("messages: the last must be the user's")
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: ")


class FakeEngine:
    """serve.Engine's interface. A reply is "<adapter or base><index>: " and then the prompt's last 20 characters, in
    capitals, again and again; it ends after `reply_bytes` bytes. `delay` seconds a step."""

    runner = None

    def __init__(self, delay=0.0005, reply_bytes=60, max_queue=64, max_num_seqs=64, max_model_len=2048):
        self.delay, self.reply_bytes, self.max_queue, self.max_num_seqs = delay, reply_bytes, max_queue, max_num_seqs
        self.max_model_len, self.adapters = max_model_len, ["poet"]
        self.condition, self.live, self.aborted, self.closing, self.thread = (
            threading.Condition(),
            {},
            set(),
            False,
            None,
        )
        self.tokens, self.aborts, self.fail = 0, 0, False

    def submit(self, request, on_output):
        with self.condition:
            if self.closing:
                raise ShuttingDown("closing")
            if len(self.live) >= self.max_queue:
                raise QueueFull("the queue is full")
            self.live[request.request_id] = SimpleNamespace(request=request, tell=on_output, at=0, done=set())
            self.condition.notify()

    def between_steps(self, function):
        future = concurrent.futures.Future()
        try:
            future.set_result(function())
        except UserError as error:
            future.set_exception(error)
        return future

    def abort(self, request_id):
        with self.condition:
            self.aborted.add(request_id)
            self.condition.notify()

    def stats(self):
        count = len(self.live)
        return {
            "running": min(count, self.max_num_seqs),
            "waiting": max(0, count - self.max_num_seqs),
            "blocks_total": 100,
            "blocks_free": 100 - count,
            "generation_tokens_total": self.tokens,
            **dict.fromkeys(("prompt_tokens_total", "cached_tokens_total", "preemptions_total"), 0),
            "aborted_total": self.aborts,
        }

    def start(self):
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def shutdown(self, drain=True, timeout=None):
        end = time.monotonic() + (timeout or 0)
        self.closing = True
        while drain and self.live and time.monotonic() < end:
            time.sleep(0.005)
        for request_id in list(self.live):
            self.abort(request_id)
        while self.live and self.thread is not None:
            time.sleep(0.005)

    def _loop(self):
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.live or self.aborted)
                for request_id in self.aborted & self.live.keys():
                    job = self.live.pop(request_id)
                    self.aborts += 1
                    for index in set(range(job.request.params.n)) - job.done:
                        job.tell(TokenOutput(index, None, "", finish_reason="abort"))
                self.aborted.clear()
                jobs = list(self.live.values())[: self.max_num_seqs]
            for job in jobs:
                self._step(job)
            time.sleep(self.delay)

    def reply(self, request, index):
        """The whole reply's bytes, and how it ends."""
        said = ByteTokenizer().decode(request.prompt_ids)[-20:].upper() or "?"
        text = f"{request.adapter or 'base'}{index}: {said * request.params.max_tokens}".encode()
        text = text if request.params.ignore_eos else text[: self.reply_bytes]
        cut = min((at for stop in request.params.stop if (at := text.find(stop.encode())) >= 0), default=None)
        if cut is not None and cut < request.params.max_tokens:
            return text[:cut], "stop"
        return (
            (text, "stop") if len(text) < request.params.max_tokens else (text[: request.params.max_tokens], "length")
        )

    def _step(self, job):
        params = job.request.params
        for index in range(params.n):
            if index in job.done:
                continue
            data, reason = self.reply(job.request, index)
            ends = job.at >= len(data) - (reason == "length")
            token = data[job.at] if job.at < len(data) else 256
            # Half characters are held back, as the engine does it.
            before, after = (data[: job.at + i].decode("utf-8", "ignore") for i in (0, 1))
            output = TokenOutput(index, token, after[len(before) :], finish_reason=reason if ends else None)
            if params.logprobs is not None:
                output.logprob = -0.5
                output.top_logprobs = [(token, -0.5), (65, float("-inf"))][: params.logprobs]
            if self.fail:
                output = TokenOutput(index, None, "", finish_reason="error")
            self.tokens += 1
            if output.finish_reason:
                job.done.add(index)
            if len(job.done) == params.n:
                with self.condition:
                    self.live.pop(job.request.request_id, None)
            job.tell(output)
        job.at += 1


LIMITS = {"host": "127.0.0.1", "port": 0, "api_key": None, "model_name_or_path": "some/base", "served_model_name": None,
          "max_connections": 200, "max_body_bytes": 100_000, "read_timeout": 20.0, "write_timeout": 20.0,
          "request_timeout": 60.0, "drain_timeout": 20.0, "allowed_origins": None,
          "trusted_proxies": "127.0.0.1", "pooling_type": "last", "allow_runtime_lora": False}  # fmt: skip


class Running:
    """A server in a thread of this process; `post`, `get` and `raw` talk to it."""

    def __init__(self, engine=None, tokenizer=None, **limits):
        self.engine, ready = engine or FakeEngine(), threading.Event()
        args = SimpleNamespace(**LIMITS | limits)

        async def main():
            self.loop, self.server = (
                asyncio.get_running_loop(),
                Server(self.engine, tokenizer or ByteTokenizer(), args),
            )
            self.engine.start()
            task = asyncio.create_task(self.server.run())
            while self.server.http.port is None:
                await asyncio.sleep(0.005)
            ready.set()
            await task

        self.thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        self.thread.start()
        assert ready.wait(20)
        self.port = self.server.http.port

    def stop(self):
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self.loop.call_soon_threadsafe(self.server.http.stop.set)
        self.thread.join(30)
        assert not self.thread.is_alive()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method, path, body=None, headers=()):
        """(status, headers, JSON or text)"""
        connection = self.connect()
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.getheader("Content-Type", "").startswith("application/json") and text
        return response.status, response.headers, json.loads(text) if is_json else text

    def post(self, path, body, headers=()):
        return self.ask("POST", path, body, headers)

    def chat(self, text="hello", **fields):
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def raw(self, data, half_close=False):
        """Bytes in, all bytes out until the server closes or falls silent for three seconds."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=3) as sock:
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            out = b""
            with contextlib.suppress(TimeoutError):
                while part := sock.recv(65536):
                    out += part
            return out

    def open_stream(self, rcvbuf=None, **fields):
        """A socket that has asked for a long streamed answer and read nothing yet."""
        sock = socket.socket()
        if rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", self.port))
        sock.sendall(request_bytes({"prompt": "x", "stream": True, "max_tokens": 2000, "ignore_eos": True, **fields}))
        return sock

    def metric(self, name):
        text = self.ask("GET", "/metrics")[2]
        return float(re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE).group(1))


def request_bytes(body, path="/v1/completions", extra=""):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n{extra}\r\n".encode() + data


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def sse(text):
    """A stream's text -> its JSON events; asserts the framing."""
    assert text.endswith("data: [DONE]\n\n")
    blocks = text.split("\n\n")[:-2]
    assert all(block.startswith("data: {") and "\n" not in block for block in blocks)
    return [json.loads(block[6:]) for block in blocks]


@pytest.fixture
def start():
    servers = []

    def make(*args, **limits):
        servers.append(Running(*args, **limits))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server():
    server = Running()
    yield server
    server.stop()


# ========================================================================================= answers


def test_chat_is_openais_object(server):
    status, headers, reply = server.chat("hello", max_tokens=200)
    assert status == 200 and headers["Content-Type"] == "application/json" and headers["Cache-Control"] == "no-store"
    assert reply["object"] == "chat.completion" and reply["id"].startswith("chatcmpl-") and reply["model"] == "base"
    assert headers["X-Request-Id"] == reply["id"] and abs(reply["created"] - time.time()) < 60
    assert reply["system_fingerprint"].startswith("fp_")
    (choice,) = reply["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"].startswith(
        "base0: R: HELLO\nASSISTANT: "
    )
    usage = reply["usage"]
    assert (
        usage["prompt_tokens"] == len("user: hello\nassistant: ") and usage["completion_tokens"] == 61
    )  # with its end
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize(
    "fields", [{}, {"n": 3}, {"stop": "HEL"}, {"max_tokens": 7}, {"logprobs": True, "top_logprobs": 2}]
)
def test_chat_stream_is_the_answer_in_pieces(server, fields):
    whole = server.chat("héllo 你好 👋", **fields)[2]
    fields = fields | {"stream": True, "stream_options": {"include_usage": True}}
    status, headers, text = server.chat("héllo 你好 👋", **fields)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    chunks = sse(text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len(
        {chunk["id"] for chunk in chunks}
    ) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks[:-1])
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(row["delta"].get("content", "") for row in mine) == choice["message"]["content"]
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == choice["finish_reason"]
        assert all(row["finish_reason"] is None for row in mine[:-1])
        if "logprobs" in fields:
            parts = [part for row in mine if row["logprobs"] for part in row["logprobs"]["content"]]
            assert parts == choice["logprobs"]["content"] and len(parts) == whole["usage"]["completion_tokens"]
            b, a = {"token": "b", "logprob": -0.5, "bytes": [98]}, {"token": "A", "logprob": -9999.0, "bytes": [65]}
            assert parts[0] == {**b, "top_logprobs": [b, a]}


def test_completion_takes_texts_and_ids(server):
    status, _, reply = server.post(
        "/v1/completions", {"model": "base", "prompt": ["abc", "xyz"], "n": 2, "max_tokens": 9}
    )
    assert status == 200 and reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")
    assert [row["index"] for row in reply["choices"]] == [0, 1, 2, 3]
    assert [row["text"] for row in reply["choices"]] == ["base0: AB", "base1: AB", "base0: XY", "base1: XY"]
    assert all(row["finish_reason"] == "length" and row["logprobs"] is None for row in reply["choices"])
    assert reply["usage"]["prompt_tokens"] == 6 and reply["usage"]["completion_tokens"] == 36
    for prompt in ("abc", [97, 98, 99], ["abc"], [[97, 98, 99]]):
        reply = server.post("/v1/completions", {"prompt": prompt})[2]
        assert reply["choices"][0]["text"] == "base0: ABCABCABC" and reply["usage"]["completion_tokens"] == 16


def test_completion_streams_echoes_and_has_logprobs(server):
    body = {"prompt": ["abc", [120]], "max_tokens": 12, "echo": True}
    whole = server.post("/v1/completions", body)[2]
    assert [row["text"] for row in whole["choices"]] == ["abcbase0: ABCAB", "xbase0: XXXXX"]
    chunks = sse(server.post("/v1/completions", body | {"stream": True})[2])
    assert all("usage" not in chunk and chunk["object"] == "text_completion" for chunk in chunks)
    for index, row in enumerate(whole["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in mine) == row["text"] and mine[-1]["finish_reason"] == "length"
    reply = server.post("/v1/completions", {"prompt": "a", "max_tokens": 3, "logprobs": 2})[2]["choices"][0]
    assert reply["logprobs"] == {
        "tokens": ["b", "a", "s"],
        "token_logprobs": [-0.5] * 3,
        "text_offset": [0, 1, 2],
        "top_logprobs": [{t: -0.5, "A": -9999.0} for t in "bas"],
    }


def test_every_sampling_field_reaches_the_engine(start):
    engine, seen = FakeEngine(), []
    server, submit = start(engine), engine.submit
    engine.submit = lambda request, on_output: (seen.append(request), submit(request, on_output))
    fields = {
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "seed": 11,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "n": 2,
        "ignore_eos": True,
    }
    more = {
        "stop": ["QQQ", "ZZZ"],
        "stop_token_ids": [3],
        "max_completion_tokens": 5,
        "max_tokens": 9,
        "top_logprobs": 3,
    }
    assert (
        server.chat("x", **fields, **more, logprobs=True, model="poet", user="me", store=False, metadata=None)[0] == 200
    )
    assert server.chat("x")[0] == 200
    assert server.chat("x", temperature=0, top_k=-1, seed=-1, top_p=None, stop=None, n=None)[0] == 200
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 10**6, "logprobs": 0})[0] == 200
    first, default, third, completion = (request.params for request in seen)
    assert {key: getattr(first, key) for key in fields} == fields
    assert (first.stop, first.stop_token_ids, first.max_tokens, first.logprobs) == (("QQQ", "ZZZ"), (3,), 5, 3)
    assert [request.adapter for request in seen] == ["poet", None, None, None]
    room = engine.max_model_len - len(seen[1].prompt_ids)
    assert default == SamplingParams(max_tokens=room)  # temperature 1, and as long as there is room
    assert third == SamplingParams(max_tokens=room, temperature=0, seed=2**63 - 1)
    assert (completion.max_tokens, completion.logprobs) == (engine.max_model_len - 1, 0)


def test_messages_may_be_text_parts_and_developer(server):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    reply = server.post("/v1/chat/completions", {"messages": messages})[2]
    assert reply["usage"]["prompt_tokens"] == len("system: be kind\nuser: hello\nassistant: ")


def test_models_health_metrics_page(server):
    status, _, reply = server.ask("GET", "/v1/models")
    assert status == 200 and [row["id"] for row in reply["data"]] == ["base", "poet"] and reply["object"] == "list"
    assert server.ask("GET", "/v1/models/poet")[2]["parent"] == "base"
    assert server.ask("GET", "/v1/models/none")[2]["error"]["code"] == "model_not_found"
    assert server.chat("x", model="poet")[2]["choices"][0]["message"]["content"].startswith("poet0: ")
    assert server.ask("GET", "/health")[::2] == (200, {"status": "ok"})
    assert server.ask("GET", "/health?full=1")[0] == 200
    status, headers, text = server.ask("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for line in text.splitlines():
        assert re.fullmatch(
            r"# TYPE [\w:]+ (counter|gauge|histogram)|# HELP [\w:]+ .+|[\w:]+(\{[^{}]*\})? [0-9.e+-]+", line
        ), line
    assert "# TYPE llm_blocks gauge\nllm_blocks 100\n" in text and "# TYPE llm_generation_tokens_total counter" in text
    assert 'llm_http_responses_total{path="/v1/chat/completions",status="200"}' in text
    count = server.metric("llm_request_seconds_count")
    assert count > 0 and server.metric('llm_time_to_first_token_seconds_bucket{le="+Inf"}') == count
    status, headers, page = server.ask("GET", "/")
    assert status == 200 and page.startswith("<!doctype html>") and headers["X-Content-Type-Options"] == "nosniff"
    assert (
        "default-src 'none'" in headers["Content-Security-Policy"] and "sha256-" in headers["Content-Security-Policy"]
    )
    for path in ("/", "/health"):
        status, headers, text = server.ask("HEAD", path)
        assert status == 200 and text == "" and int(headers["Content-Length"]) > 5


def test_the_page_asks_no_other_server_and_makes_no_html_of_text():
    page = (ROOT / "serving" / "page.html").read_text(encoding="utf-8")
    assert not re.search(
        r"(src|href)=\"(?!data:)|url\(|@import|https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", page
    )
    assert not re.search(r"\son\w+=\"|\sstyle=\"", page)  # the policy would not let them run


# ========================================================================================= refusals


BAD_FIELDS = [  # and values that no answer may be given to
    ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", "12"), ("max_tokens", 1.5), ("max_tokens", True),
    ("temperature", "hot"), ("temperature", 2.5), ("temperature", -0.1), ("temperature", [1]), ("top_p", 1.1),
    ("top_k", 0.5), ("top_k", -2), ("n", 0), ("n", 129), ("n", "2"), ("seed", 1.5), ("seed", 10**30), ("stop", 3),
    ("stop", [1]), ("stop", ["a"] * 17), ("stop", [""]), ("presence_penalty", 3), ("frequency_penalty", "x"),
    ("repetition_penalty", 0), ("min_tokens", -1), ("ignore_eos", 1), ("stop_token_ids", [-1]), ("stop_token_ids", 5),
    ("stop_token_ids", ["a"]), ("stream", "yes"), ("stream_options", {"include_usage": True}), ("model", 3),
    ("tools", [{}]), ("tool_choice", "required"), ("response_format", {"type": "xml"}), ("response_format", {}),
    ("response_format", {"type": "json_schema"}), ("logit_bias", {"5": 101}), ("logit_bias", {"x": 1}),
    ("logit_bias", {"257": 1}), ("allowed_token_ids", [257]), ("bad_words", [3]), ("min_p", 1.5),
    ("best_of", 2), ("suffix", "x"), ("functions", [{}]), ("modalities", ["audio"]), ("guided_grammar", "a"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"not": {}}}}}}),
    ("guided_json", "{"), ("guided_regex", "("), ("guided_choice", []), ("structured_outputs", {"grammar": "x"}),
]  # fmt: skip
BAD_CHATS = [
    ("messages", None), ("messages", []), ("messages", "hi"), ("messages", [3]), ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": 5}]), ("messages", [{"role": "robot", "content": "x"}]),
    ("messages", [{"role": [], "content": "x"}]), ("messages", [{"role": "assistant", "content": "x"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "user", "content": "\ud800"}]), ("max_completion_tokens", 0), ("logprobs", 3),
    ("top_logprobs", 2),
]  # fmt: skip
BAD_PROMPTS = [
    ("prompt", None), ("prompt", ""), ("prompt", []), ("prompt", 5), ("prompt", {}), ("prompt", [1.5]),
    ("prompt", [257]), ("prompt", [-1]), ("prompt", [True]), ("prompt", ["a", 3]), ("prompt", [[]]),
    ("prompt", [[1, "a"]]), ("prompt", ["a"] * 129), ("prompt", "\udfff"), ("echo", "yes"), ("logprobs", True),
    ("logprobs", 21),
]  # fmt: skip


@pytest.mark.parametrize("field, value", BAD_FIELDS + BAD_CHATS, ids=str)
def test_wrong_chat_field_is_named(server, field, value):
    check_named(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, field, value)


@pytest.mark.parametrize("field, value", BAD_FIELDS + BAD_PROMPTS, ids=str)
def test_wrong_completion_field_is_named(server, field, value):
    check_named(server, "/v1/completions", {"prompt": "x"}, field, value)


def check_named(server, path, good, field, value):
    status, _, reply = server.post(path, good | {field: value})
    error = reply["error"]
    assert status == 400 and error["param"] == field and error["type"] == "invalid_request_error", reply
    assert (
        error["message"].startswith(field)
        and "\n" not in error["message"]
        and set(error) == {"message", "type", "param", "code"}
    )


BAD_JSON = [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe{}", b"{'a': 1}", b'{"n": NaN}', b'{"n": Infinity}',
            b'{"n": 1' + b"0" * 5000 + b"}", b"[" * 50_000, b'{"messages": ' + b"[" * 50_000]  # fmt: skip


@pytest.mark.parametrize("data", BAD_JSON, ids=lambda data: repr(data[:12]))
def test_malformed_json(server, data):
    status, _, reply = server.post("/v1/chat/completions", data)
    assert status == 400 and reply["error"]["code"] == "invalid_json"
    assert server.chat()[0] == 200


def test_numbers_beyond_float(server):
    assert (
        server.post("/v1/completions", b'{"prompt": "x", "temperature": 1e999}')[2]["error"]["param"] == "temperature"
    )


def test_unknown_model_and_long_prompt(server):
    status, _, reply = server.chat("x", model="gpt-5\n")
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (404, "model_not_found", "model")
    assert "base, poet" in reply["error"]["message"]
    for path, body, param in (
        ("/v1/completions", {"prompt": "x" * 2048}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
    ):
        status, _, reply = server.post(path, body)
        assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "context_length_exceeded", param)
        assert "2048" in reply["error"]["message"]
    assert (
        server.post("/v1/completions", {"prompt": "x" * 2047, "max_tokens": 50})[2]["usage"]["completion_tokens"] == 1
    )


def test_chat_without_a_template_is_plain_text(start):
    """As finetune.py trains a model without one: user turns begin like any text, replies end with eos."""
    import adapters
    from formats.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "demo" / "llama")
    assert tokenizer.chat_template is None and tokenizer.has_chat_format  # the folder says so
    model = adapters.from_pretrained(ROOT / "demo" / "llama")
    engine, asked = Engine(model, tokenizer, num_blocks=16), []
    submit = engine.submit
    engine.submit = lambda request, on_output: (asked.append(request.prompt_ids), submit(request, on_output))
    server = start(engine, tokenizer)
    turns = [("type#dress", "A dress."), ("now in red", None)]
    messages = [{"role": "user", "content": turns[0][0]}, {"role": "assistant", "content": turns[0][1]}]
    messages.append({"role": "user", "content": turns[1][0]})
    status, _, reply = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 3})
    assert status == 200 and reply["usage"]["completion_tokens"] <= 3
    _, ((user, bot), (last, _)) = tokenizer.encode_chat(turns)
    assert asked == [user + bot + last] and user[0] == tokenizer.bos_token_id and bot[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer ", "secret", "Bearer secret2", "Bearer s\xe9cret"])
def test_wrong_key(start, key):
    server = start(api_key="secret")
    headers = {} if key is None else {"Authorization": key}
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions")):
        status, answer, reply = server.ask(method, path, None if method == "GET" else {"prompt": "x"}, headers)
        assert (status, reply["error"]["code"], answer["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert server.ask("GET", "/health")[0] == server.ask("GET", "/")[0] == 200
    assert server.post("/v1/completions", {"prompt": "x"}, {"Authorization": "Bearer secret"})[0] == 200


def test_paths_methods_and_origins(server):
    for path in (
        "/v1",
        "/v1/",
        "/favicon.ico",
        "/../data.py",
        "/%2e%2e/data.py",
        "//etc/passwd",
        "/serve.py",
    ):
        assert server.ask("GET", path)[0] == 404
    for method, path, allow in (
        ("POST", "/", "GET, HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("GET", "/v1/chat/completions/", "POST"),
        ("DELETE", "/health", "GET, HEAD"),
        ("PUT", "/v1/models", "GET, HEAD"),
    ):
        status, headers, reply = server.ask(method, path, {} if method == "POST" else None)
        assert status == 405 and headers["Allow"] == allow and reply["error"]["code"] == "method_not_allowed"
    status, headers, _ = server.post("/v1/completions", {"prompt": "x"}, {"Origin": "https://elsewhere.example"})
    assert status == 403 and "Access-Control-Allow-Origin" not in headers
    assert server.post("/v1/completions", {"prompt": "x"}, {"Origin": f"http://127.0.0.1:{server.port}"})[0] == 200


GET, POST = b"GET / HTTP/1.1\r\nHost: x\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BAD_HTTP = [
    (b"GARBAGE\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400), (b"GET  / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\n\r\n", 505), (b"GET / FTP/1.1\r\n\r\n", 400), (b"G\xc3T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400), (GET + b"no colon\r\n\r\n", 400), (GET + b"A : b\r\n\r\n", 400),
    (GET + b" folded\r\n\r\n", 400), (GET + b"A: \x00\r\n\r\n", 400), (b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (GET + b"A: b\r\n" * 200 + b"\r\n", 431), (GET + b"A: " + b"b" * 20_000, 431),
    (b"GET /" + b"a" * 30_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431), (POST + b"\r\n", 411),
    (POST + b"Content-Length: -1\r\n\r\n", 400), (POST + b"Content-Length: ten\r\n\r\n", 400),
    (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    (POST + b"Content-Length: 99999999999\r\n\r\n", 413),
    (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501), (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFF\r\n" + b"x" * 100_001, 413),
]  # fmt: skip


@pytest.mark.parametrize("data, status", BAD_HTTP, ids=lambda value: repr(value)[-50:])
def test_malformed_http(server, data, status):
    head, _, body = server.raw(data, half_close=True).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()) and b"Connection: close" in head
    assert json.loads(body)["error"]["message"]
    assert server.ask("GET", "/health")[0] == 200


def test_body_shorter_than_said(server):
    data = request_bytes({"prompt": "x"})[:-3]
    assert server.raw(data, half_close=True).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("chunked", [False, True])
def test_body_of_10_mb_is_refused_and_the_answer_arrives(server, chunked):
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    connection = server.connect()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
        parts = (body[i : i + 65536] for i in range(0, len(body), 65536))
        connection.request(
            "POST",
            "/v1/completions",
            parts if chunked else body,
            encode_chunked=chunked,
            headers={"Transfer-Encoding": "chunked"} if chunked else {},
        )
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["error"]["code"] == "body_too_large"
    assert server.chat()[0] == 200


def test_expect_continue(server):
    body = json.dumps({"prompt": "x"}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(request_bytes(body, extra="Expect: 100-continue\r\n")[: -len(body)])
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


# ========================================================================================= connections


def test_keep_alive_chunked_bodies_and_pipelining(server):
    connection = server.connect()
    for i in range(3):
        parts = iter([b'{"prompt"', b': "x", "stream": true}'])
        chunked = {"Transfer-Encoding": "chunked"}
        connection.request("POST", "/v1/completions", parts, chunked, encode_chunked=True)
        assert len(sse(connection.getresponse().read().decode())) == 16
        connection.request("POST", "/v1/completions", json.dumps({"prompt": 5}))
        assert json.loads(connection.getresponse().read())["error"]["param"] == "prompt"
        if i == 0:
            sock = connection.sock
        assert connection.sock is sock  # the same connection throughout
    data = b"".join(request_bytes({"prompt": text, "max_tokens": 9}) for text in "abc")
    out = server.raw(data + b"\r\nGET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert re.findall(rb'"text": "(.*?)"', out) == [b"base0: AA", b"base0: BB", b"base0: CC"]  # in order
    assert out.count(b"HTTP/1.1 200 OK") == 4 and out.endswith(b'{"status": "ok"}\n')


def test_http_1_0(server):
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    out = server.raw(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    head, _, text = out.partition(b"\r\n\r\n")
    assert b"chunked" not in head and len(sse(text.decode())) == 16


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_blocks(start, stream):
    engine = FakeEngine(delay=0.02)
    server = start(engine)
    sock = server.open_stream(stream=stream)
    assert eventually(lambda: len(engine.live) == 1)
    if stream:
        sock.recv(1000)
    sock.close()
    assert eventually(lambda: not engine.live and engine.aborts == 1, 2)
    assert engine.stats()["blocks_free"] == 100 and server.metric("llm_running") == 0
    assert server.chat()[0] == 200


def test_client_that_leaves_while_it_waits_in_the_queue(start):
    engine = FakeEngine(delay=0.02, max_num_seqs=1)
    server = start(engine)
    socks = [server.open_stream(stream=stream) for stream in (True, True, False)]
    assert eventually(lambda: len(engine.live) == 3)
    socks[1].close()
    socks[2].close()
    assert eventually(lambda: len(engine.live) == 1, 2)
    socks[0].close()
    assert eventually(lambda: not engine.live, 2)


@pytest.mark.parametrize("stream", [True, False])
def test_half_closed_client_gets_its_answer(start, stream):
    server = start(FakeEngine(delay=0.01))
    out = server.raw(request_bytes({"prompt": "x", "max_tokens": 40, "stream": stream}), half_close=True)
    assert b"HTTP/1.1 200 OK" in out
    if stream:
        assert out.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and out.count(b'"text"') == 40
    else:  # the probe is an interim answer, which any client must skip
        assert out.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
        assert json.loads(out.split(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 40


def test_python_client_skips_the_probe(start):
    connection = start(FakeEngine(delay=0.01)).connect()
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
    connection.sock.shutdown(socket.SHUT_WR)
    response = connection.getresponse()
    assert response.status == 200 and json.loads(response.read())["choices"][0]["text"] == "base0: XXXXXXXXX"


def test_slow_reader_is_cut_off_and_no_one_else_notices(start):
    engine = FakeEngine(delay=0.0, max_model_len=20_000)
    server = start(engine, write_timeout=1.0)
    slow = [server.open_stream(rcvbuf=2048, n=64, max_tokens=10_000) for _ in range(2)]
    assert eventually(lambda: len(engine.live) == 2)
    start_time = time.monotonic()
    assert server.chat(max_tokens=5)[0] == 200 and time.monotonic() - start_time < 5
    assert eventually(lambda: not engine.live, 20) and engine.aborts == 2
    assert server.chat()[0] == 200 and eventually(lambda: server.metric("llm_connections") == 1)
    for sock in slow:
        sock.close()


def test_silent_and_dripping_clients_are_dropped(start):
    server = start(read_timeout=0.5)
    begin = time.monotonic()
    assert server.raw(b"") == b"" and time.monotonic() - begin < 2.5  # idle: closed without a word
    assert server.raw(b"POST /v1/comp").startswith(b"HTTP/1.1 408 ")
    assert server.raw(request_bytes({"prompt": "x"})[:-3]).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", server.port)) as sock, pytest.raises(OSError):
        for _ in range(60):  # a byte at a time does not buy time
            sock.sendall(b"G")
            time.sleep(0.1)
    assert time.monotonic() - begin < 12 and server.chat()[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_request_time_is_limited(start, stream):
    engine = FakeEngine(delay=0.05)
    server = start(engine, request_timeout=0.4)
    status, _, reply = server.chat(ignore_eos=True, stream=stream)
    assert status == (200 if stream else 504)
    error = sse(reply)[-1]["error"] if stream else reply["error"]
    assert error["code"] == "timeout" and error["type"] == "server_error"
    assert eventually(lambda: not engine.live) and engine.aborts == 1


def test_full_queue(start):
    engine = FakeEngine(delay=0.05, max_queue=2)
    server = start(engine)
    socks = [server.open_stream() for _ in range(2)]
    assert eventually(lambda: len(engine.live) == 2)
    for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
        status, headers, reply = server.post("/v1/completions", body)
        assert (status, headers["Retry-After"], reply["error"]["type"]) == (429, "1", "rate_limit_error")
    socks.pop().close()
    assert eventually(lambda: len(engine.live) == 1)
    assert server.post("/v1/completions", {"prompt": ["x", "y"]})[0] == 429  # the first of them leaves with the second
    assert eventually(lambda: len(engine.live) == 1) and server.post("/v1/completions", {"prompt": "x"})[0] == 200
    socks.pop().close()


def test_connections_are_limited(start):
    server = start(max_connections=3)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    assert eventually(lambda: len(server.server.http.connections) == 3)
    status, headers, reply = server.ask("GET", "/v1/models")
    assert (status, reply["error"]["code"], headers["Retry-After"]) == (503, "too_many_connections", "1")
    assert server.ask("GET", "/health")[0] == 200
    for sock in idle:
        sock.close()
    assert eventually(lambda: not server.server.http.connections)
    assert server.ask("GET", "/health")[0] == 200


def test_failing_engine_and_failing_handler(start, capfd):
    engine = FakeEngine()
    server = start(engine)
    engine.fail = True
    assert server.chat()[0] == 500 and server.chat()[2]["error"]["code"] == "engine_error"
    status, _, text = server.chat(stream=True)
    assert status == 200 and sse(text)[-1]["error"]["code"] == "engine_error"
    engine.fail, engine.stats = False, lambda: 1 / 0
    assert server.ask("GET", "/metrics")[0] == 500 and "ZeroDivisionError" in capfd.readouterr().err
    assert server.chat()[0] == 200


def test_log_has_a_line_a_request_and_no_content(start, capfd):
    server = start(api_key="secret")
    key = {"Authorization": "Bearer secret"}
    body = {"prompt": "private words", "max_tokens": 20}
    server.post("/v1/completions", body, key)
    server.post("/v1/completions", body | {"n": "private words"}, key)
    server.post("/v1/completions", body, {"Authorization": "Bearer private words"})
    assert eventually(lambda: not server.server.http.connections)
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 3 and "private" not in out + err and "secret" not in out + err
    assert re.fullmatch(
        r"cmpl-\w{32} base: prompt 13 \(cached 0\), completion 20, first token \d\.\d{3} s, "
        r"[\d.]+ tokens/s, total \d\.\d{3} s, length 200",
        lines[0],
    )
    assert " 400" in lines[1] and " 401" in lines[2]


# ========================================================================================= many clients, and the end


def hammer(server, seconds, clients=64):
    """Clients that ask, streaming or not, and sometimes leave, one request after another; returns what went wrong."""
    end, wrong, answered = time.monotonic() + seconds, [], [0] * clients

    def client(i):
        k = 0
        while time.monotonic() < end:
            k += 1
            try:
                if (i + k) % 9 == 0:
                    sock = server.open_stream(max_tokens=50)
                    sock.recv(500)
                    sock.close()
                    continue
                text = f"{i}-{k} é"
                status, _, reply = server.post(
                    "/v1/completions", {"prompt": text, "max_tokens": 30, "stream": k % 2 == 0}
                )
                rows = sse(reply) if k % 2 == 0 else [reply]
                got = "".join(row["choices"][0]["text"] for row in rows)
                want = ("base0: " + text.upper() * 9).encode()[:30].decode("utf-8", "ignore")
                if status != 200 or got != want:
                    wrong.append((status, got, want))
                answered[i] += 1
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong, answered


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def check_many_clients(server, seconds):
    hammer(server, min(2, seconds / 10))  # until caches and thread pools have their size
    before = resident()
    wrong, answered = hammer(server, seconds)
    assert wrong == [] and min(answered) > 0, (wrong[:3], answered)
    assert eventually(lambda: not server.engine.live and not server.server.http.connections)
    assert not server.server.running and resident() - before < 20, (before, resident())
    print(f"{sum(answered)} answers in {seconds} s, {resident() - before:+.1f} MiB")


def test_64_clients(start):
    check_many_clients(start(FakeEngine(max_queue=256)), 3)


@pytest.mark.slow
def test_64_clients_for_two_minutes(start):
    check_many_clients(start(FakeEngine(max_queue=256)), 120)


CHILD = """
from types import SimpleNamespace
import serve, test_openai_api
from serving.server import serve_http
args = SimpleNamespace(**test_openai_api.LIMITS)
serve_http(test_openai_api.FakeEngine(delay=0.02, reply_bytes=150), test_openai_api.ByteTokenizer(), args)
"""


def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0():
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    line = process.stdout.readline()
    assert "no API key" in line and "context 2048 tokens" in line
    server = Running.__new__(Running)
    server.port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line).group(1))
    kept = server.connect()
    kept.request("GET", "/health")
    kept.getresponse().read()
    sock = server.open_stream(ignore_eos=False)
    data = sock.recv(100)
    process.send_signal(signal.SIGTERM)
    assert eventually(lambda: server.ask("GET", "/health")[::2] == (503, {"status": "draining"}), 2)
    assert server.chat()[2]["error"]["code"] == "shutting_down"
    kept.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
    assert kept.getresponse().status == 503
    while part := sock.recv(65536):
        data += part
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and data.count(b'"text"') == 151  # all of it
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in err and "Error" not in err, err


@pytest.mark.parametrize("drain, hurry", [(0.3, False), (60, True)])
def test_draining_ends(start, drain, hurry):
    server = start(FakeEngine(delay=0.02), drain_timeout=drain)
    sock, begin = server.open_stream(), time.monotonic()
    data = sock.recv(100)
    server.loop.call_soon_threadsafe(server.server.http.stop.set)
    if hurry:  # a second signal
        server.loop.call_soon_threadsafe(server.server.http.force_stop.set)
    while part := sock.recv(65536):
        data += part
    assert b'"code":"shutting_down"' in data.replace(b" ", b"") and data.endswith(b"0\r\n\r\n")
    server.thread.join(10)
    assert time.monotonic() - begin < 10 and not server.engine.live


def test_port_in_use(server):
    args = SimpleNamespace(**LIMITS | {"port": server.port})
    with pytest.raises(
        UserError, match=f"port: cannot listen on 127.0.0.1:{server.port}: address already in use; give"
    ):
        serve_http(FakeEngine(), ByteTokenizer(), args)


# ========================================================================================= with the model


def test_demo_model_over_http(start):
    """Greedy answers equal model.generate's, alone and among others, streamed or not; a prompt is read once."""
    import numpy as np

    import adapters
    import model as models

    demo = str(ROOT / "demo" / "llama")
    args = serve.Args(model_name_or_path=demo, chat_template="chatml", num_blocks=64, dtype="float32")
    engine, tokenizer = serve.build_engine(args)
    server = start(engine, tokenizer)
    prompts = ["The red dress is made of", "A warm coat", "This linen shirt has a collar and " * 3]
    oracle, wanted = adapters.from_pretrained(args.model_name_or_path), []
    for prompt in prompts:
        ids = np.array([tokenizer.encode(prompt)])
        out = models.generate(oracle, ids, 12, tokenizer.stop_ids)[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(out) if token in tokenizer.stop_ids), None)
        text, whole = tokenizer.decode(ids[0]), tokenizer.decode([*ids[0], *out[:end]])
        assert whole.startswith(text)
        wanted.append(whole[len(text) :])  # a continuation, with the space before its first word
    body = {"max_tokens": 12, "temperature": 0}
    reply = server.post("/v1/completions", body | {"prompt": prompts})[2]
    assert [choice["text"] for choice in reply["choices"]] == wanted
    for prompt, text in zip(prompts, wanted):
        chunks = sse(server.post("/v1/completions", body | {"prompt": prompt, "stream": True})[2])
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert (
        server.post("/v1/completions", body | {"prompt": prompts[2]})[2]["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        > 0
    )
    assert server.chat("Write about a red dress", max_tokens=5, logprobs=True)[2]["usage"]["completion_tokens"] <= 5
    sock = server.open_stream(max_tokens=900)
    sock.recv(1000)
    assert eventually(lambda: server.metric("llm_running") == 1)  # headers may come before the engine has admitted it
    sock.close()
    assert eventually(lambda: server.metric("llm_running") == 0) and server.metric("llm_blocks_free") == 64
    assert server.chat("x " * 2000)[2]["error"]["code"] == "context_length_exceeded"


# ========================================================================================= OpenAI's client


def test_openai_client(start):
    openai = pytest.importorskip("openai")
    server = start(api_key="secret")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="secret", max_retries=0, timeout=20)
    assert [model.id for model in client.models.list()] == ["base", "poet"]
    messages = [{"role": "user", "content": "hi 你好"}]
    whole = client.chat.completions.create(
        model="poet",
        messages=messages,
        logprobs=True,
        top_logprobs=1,
        n=2,
        extra_body={"top_k": 5, "repetition_penalty": 1.1},
    )
    assert whole.choices[0].message.content.startswith("poet0: ") and whole.choices[1].finish_reason == "stop"
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].token == "p" and whole.usage.completion_tokens == 122
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model="poet", messages=messages, stream=True, stream_options={"include_usage": True}
    ):
        text, usage = text + (chunk.choices[0].delta.content or "" if chunk.choices else ""), chunk.usage
    assert text == whole.choices[0].message.content and usage.completion_tokens == 61
    completion = client.completions.create(model="base", prompt=["a", "b"], max_tokens=9, logprobs=1)
    assert [choice.text for choice in completion.choices] == ["base0: AA", "base0: BB"]
    for kind, call in (
        (openai.NotFoundError, {"model": "none", "messages": messages}),
        (openai.BadRequestError, {"model": "base", "messages": []}),
        (openai.BadRequestError, {"model": "base", "messages": [{"role": "user", "content": "x" * 5000}]}),
    ):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**call)
        assert caught.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    server.engine.delay = 0.02
    with client.chat.completions.create(
        model="base", messages=messages, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    assert eventually(lambda: not server.engine.live) and server.engine.aborts == 1


# ========================================================================================= the page in a browser


class Browser:
    """Headless Chromium, spoken to over its debugging pipe: JSON and a zero byte each way, on its files 3 and 4."""

    def __init__(self, binary, profile):
        to_read, self.out = os.pipe()
        self.inp, to_write = os.pipe()

        def files():
            spare = os.dup(to_read), os.dup(to_write)  # first out of the way: either might be 3 or 4
            for fd, wanted in zip(spare, (3, 4)):
                os.dup2(fd, wanted)

        self.process = subprocess.Popen(
            [
                binary,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            preexec_fn=files,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.rest, self.number = b"", 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    session = None

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.inp, 1 << 20)
                assert part, "chromium ended"
                self.rest += part
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def key(self, name, code, modifiers=0):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=code,
                text="\r",
                modifiers=modifiers,
            )

    def show(self, url, width, height, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url=url)
        assert eventually(
            lambda: self.js("document.readyState === 'complete' && !!document.querySelector('#model')?.value"), 10
        )

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.inp)


@pytest.fixture(scope="module")
def browser():
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("needs a headless browser: apt install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # its helpers outlive it by a moment
        browser = Browser(binary, profile)
        yield browser
        browser.close()


SAY = "document.querySelector('#input').value = {}; document.querySelector('#form').requestSubmit()"
TEXTS = "[...document.querySelectorAll('.message .text')].map(node => node.innerText)"


@pytest.mark.parametrize("width, height, dark", [(1200, 800, False), (360, 640, True)])
def test_page_chats(start, browser, tmp_path, width, height, dark):
    engine, seen = FakeEngine(delay=0.01, reply_bytes=50), []
    server, submit = start(engine), engine.submit
    engine.submit = lambda request, on_output: (seen.append(request), submit(request, on_output))
    browser.show(f"http://127.0.0.1:{server.port}/", width, height, dark)
    assert browser.js("[...document.querySelector('#model').options].map(o => o.value)") == ["base", "poet"]
    browser.screenshot(tmp_path / "empty.png")

    for field, value in (("system", "Be brief."), ("temperature", "0.3"), ("seed", "7")):
        browser.js(f"document.querySelector('#{field}').value = '{value}'")
    browser.js("document.querySelector('#input').focus()")
    browser.call("Input.insertText", text="<b>hé</b>")
    browser.key("Enter", 13, modifiers=8)  # with Shift: a new line
    browser.call("Input.insertText", text="你")
    browser.key("Enter", 13)
    assert eventually(
        lambda: len(browser.js("document.querySelector('.busy .text')?.innerText") or "") > 3, 5
    )  # it streams
    assert browser.js("document.querySelector('#send').innerText") == "Stop"
    assert eventually(lambda: not browser.js("!!document.querySelector('.busy')"), 5)
    texts = browser.js(TEXTS)
    assert texts[0] == "<b>hé</b>\n你" and texts[1].startswith("base0: ") and "HÉ</B>\n你" in texts[1]
    prompt, params = ByteTokenizer().decode(seen[0].prompt_ids), seen[0].params
    assert prompt == "system: Be brief.\nuser: <b>hé</b>\n你\nassistant: "
    assert (params.temperature, params.seed, params.max_tokens, params.top_p) == (0.3, 7, 512, 0.95)
    assert browser.js("document.querySelectorAll('#log b, #log script').length") == 0
    foot = browser.js("document.querySelector('.assistant .foot').innerText")
    assert re.search(r"51 tokens, [\d.]+ tokens/s, first after \d\.\d\d s", foot)

    browser.js("document.querySelector('#model').value = 'poet'")
    browser.js("[...document.querySelectorAll('.foot button')].find(b => b.innerText === 'Regenerate').click()")
    assert eventually(
        lambda: browser.js(TEXTS)[1].startswith("poet0: ") and not browser.js("!!document.querySelector('.busy')"), 5
    )

    engine.reply_bytes = 5000
    browser.js(SAY.format(json.dumps("a fence:\n```python\nprint('" + "long " * 40 + "')\n```\nand " + "w" * 80)))
    assert eventually(lambda: browser.js("!!document.querySelector('.busy')") and len(engine.live) == 1, 5)
    assert f"assistant: {browser.js(TEXTS)[1]}\nuser: a fence" in ByteTokenizer().decode(seen[2].prompt_ids)
    assert browser.js("document.querySelector('.user pre').innerText").startswith("PRINT".lower())
    browser.js("document.querySelector('#send').click()")
    assert eventually(lambda: not engine.live and engine.aborts == 1, 5)  # stopped over there as well
    assert eventually(lambda: "stopped" in browser.js("document.querySelector('#log').lastChild.innerText"), 5)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("document.querySelector('#log').scrollWidth - document.querySelector('#log').clientWidth") <= 0
    browser.screenshot(tmp_path / "chat.png")
    if width < 500:
        browser.js("document.querySelector('#toggle').click()")
        assert browser.js("document.documentElement.scrollWidth") <= width
        browser.screenshot(tmp_path / "settings.png")

    browser.js("[...document.querySelectorAll('.foot button')].filter(b => b.innerText === 'Edit').at(-1).click()")
    assert browser.js("document.querySelectorAll('.message').length") == 2
    assert browser.js("document.querySelector('#input').value").startswith("a fence")
    browser.js("document.querySelector('#clear').click()")
    assert browser.js(TEXTS) == []


def test_page_asks_for_the_key_and_every_control_has_a_label(start, browser):
    server = start(api_key="secret")
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
    browser.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
    assert eventually(lambda: browser.js("document.readyState") == "complete", 10)
    browser.js(SAY.format("'hello'"))
    assert eventually(lambda: "valid key" in (browser.js("document.querySelector('.error .text')?.innerText") or ""), 5)
    assert browser.js("getComputedStyle(document.querySelector('#settings')).display") == "block"
    browser.js("const k = document.querySelector('#key'); k.value = 'secret'; k.dispatchEvent(new Event('change'))")
    assert eventually(lambda: browser.js("document.querySelector('#model').value") == "base", 5)
    browser.js("[...document.querySelectorAll('.foot button')].find(b => b.innerText === 'Try again').click()")
    assert eventually(lambda: browser.js(TEXTS)[1:] != [] and browser.js(TEXTS)[1].startswith("base0: "), 5)
    assert browser.js("sessionStorage.getItem('key')") == "secret" and browser.js("localStorage.length") == 0
    assert browser.js(
        "[...document.querySelectorAll('input, textarea, select')].every(node => node.labels.length === 1)"
    )
