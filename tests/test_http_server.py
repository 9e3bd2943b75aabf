"""serving/http_server.py with a handler of a few lines: what it parses, what it refuses, and what clients may do to it.

The limits of time and number, disconnects and shutdown are tested in test_openai_api.py, through the API.
"""

import ast
import asyncio
import contextlib
import gzip
import json
import random
import re
import socket
import threading
import time
import zlib

import pytest
from conftest import ROOT

from serving.http_server import (
    MAX_HEADER_BYTES,
    PIECE,
    READ_AHEAD,
    ClientGone,
    HTTPError,
    HTTPServer,
    Limits,
    json_pieces,
)


class Echo:
    """A server in a thread. /echo answers with the body, /wait after `release`, /stream in pieces, /unread without
    reading, /big with a large JSON object, /refuse and /bug not at all."""

    def __init__(self, **limits):
        self.limits, self.requests, self.gone, ready = limits, [], 0, threading.Event()

        async def main():
            defaults = {"max_connections": 50, "max_body_bytes": 100_000, "read_timeout": 3.0, "write_timeout": 3.0}
            self.server = HTTPServer(self.handle, lambda error: {"error": error.message}, Limits(**defaults | limits))
            self.loop, self.release = asyncio.get_running_loop(), asyncio.Event()
            await self.server.listen("127.0.0.1", 0)
            ready.set()
            await self.server.stop.wait()
            await self.server.close(5.0)

        self.thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        self.thread.start()
        assert ready.wait(20)

    async def handle(self, connection, request):
        self.requests.append(request)
        if request.path == "/unread":
            return await connection.respond(200, b"")
        if request.path == "/big":
            return await connection.respond(200, BIG)
        if request.path == "/refuse":
            raise HTTPError(418, "no", headers={"X-Why": "tea"})
        body = await connection.read_body(request)
        if request.path == "/bug":
            raise ZeroDivisionError
        if request.path == "/stream":
            await connection.start_response(200, {"Content-Type": "text/plain"})
            for piece in (b"one ", b"", b"two"):
                await connection.send_data(piece)
            return await connection.send_data(b".", last=True)
        while request.path == "/wait" and not self.release.is_set():
            if connection.client_disconnected():
                self.gone += 1
                raise ClientGone
            await connection.wait_until(time.monotonic() + 0.2)
        await connection.respond(200, body)

    def raw(self, *parts, half_close=False, pause=0.02):
        """Bytes in, one part after another; all bytes out until the server closes."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=8) as sock:
            for part in parts:
                sock.sendall(part)
                time.sleep(pause if len(parts) > 1 else 0)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            out = b""
            while part := sock.recv(65536):
                out += part
            return out


@pytest.fixture
def echo():
    server = Echo()
    yield server
    server.loop.call_soon_threadsafe(server.release.set)
    server.loop.call_soon_threadsafe(server.server.stop.set)
    server.thread.join(10)
    assert not server.thread.is_alive()


ROWS = [{"token": "é", "bytes": [195, 169], "top_logprobs": [{"token": "a", "logprob": -0.5}] * 5}] * 300
BIG = {"choices": [{"index": i, "logprobs": {"content": ROWS}} for i in range(20)], "usage": {"n": 1}}


def statuses(out):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d\d\d) ", out)]


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_it_imports_nothing_of_its_user():
    tree = ast.parse((ROOT / "serving" / "http_server.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"collections.abc", "formats.files"}


GET, POST, CLOSE = b"GET /echo HTTP/1.1\r\nHost: x\r\n", b"POST /echo HTTP/1.1\r\nHost: x\r\n", b"Connection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def packed(coding, data):
    return POST + CLOSE + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n%s" % (coding, len(data), data)


def head_of(size):
    """A request's head of exactly so many bytes."""
    start = GET + CLOSE + b"A: "
    return start + b"b" * (size - len(start) - 4) + b"\r\n\r\n"


TALKS = {  # name: what is sent, the statuses of the replies until the server closes
    "target with query": (b"GET /echo?a=b HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n", [200]),
    "absolute target": (b"GET http://x/echo HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n", [200]),
    "absolute target that is no URL": (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    "slashes": (b"GET //echo// HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n", [200]),
    "gzip": (packed(b"gzip", gzip.compress(b"{}")), [200]),
    "deflate": (packed(b"Deflate", zlib.compress(b"{}")), [200]),
    "longest gzip body": (packed(b"gzip", gzip.compress(b"x" * 100_000)), [200]),
    "gzip body too long by one": (packed(b"gzip", gzip.compress(b"x" * 100_001)), [413]),
    "gzip bomb": (packed(b"gzip", gzip.compress(b"x" * 90_000_000)), [413]),
    "gzip cut off": (packed(b"gzip", gzip.compress(b"{}")[:-3]), [400]),
    "gzip and more": (packed(b"gzip", gzip.compress(b"{}") + b"x"), [400]),
    "gzip that is none": (packed(b"gzip", b"{}"), [400]),
    "zstd": (packed(b"zstd", b"{}"), [415]),
    "HEAD of a refusal": (b"HEAD /refuse HTTP/1.1\r\nHost: x\r\n\r\n", [418]),
    "two Hosts": (GET + b"Host: y\r\n\r\n", [400]),
    "bare line feeds": (b"GET /echo HTTP/1.1\nHost: x\nConnection: close\n\n", [200]),
    "folded header": (GET + b"A: b\r\n\tc\r\n\r\n", [400]),
    "folded header, bare line feeds": (b"GET /echo HTTP/1.1\nHost: x\nA: b\n c\n\n", [400]),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    "HTTP/0.9": (b"GET /echo HTTP/0.9\r\nHost: x\r\n\r\n", [505]),
    "no version": (b"GET /echo\r\n\r\n", [400]),
    "longest head": (head_of(MAX_HEADER_BYTES), [200]),
    "head too long by one": (head_of(MAX_HEADER_BYTES + 1), [431]),
    "100 headers": (GET + CLOSE + b"A: b\r\n" * 98 + b"\r\n", [200]),
    "101 headers": (GET + CLOSE + b"A: b\r\n" * 99 + b"\r\n", [431]),
    "empty lines before a request": (b"\r\n" * 30_000 + GET + CLOSE + b"\r\n", [200]),
    "equal lengths": (POST + CLOSE + b"Content-Length: 2\r\nContent-Length: 2, 2\r\n\r\n{}", [200]),
    "length with a sign": (POST + b"Content-Length: +2\r\n\r\n{}", [400]),
    "length without digits": (POST + b"Content-Length:\r\n\r\n", [400]),
    "length of 5000 digits": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", [400]),
    "longest body": (POST + CLOSE + b"Content-Length: 100000\r\n\r\n" + b"x" * 100_000, [200]),
    "body too long by one": (POST + b"Content-Length: 100001\r\n\r\n", [413]),
    "longest chunked body": (POST + CLOSE + CHUNKED + b"\r\n186A0\r\n" + b"x" * 100_000 + b"\r\n0\r\n\r\n", [200]),
    "chunked body too long by one": (POST + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 100_001 + b"0\r\n\r\n", [413]),
    "chunk extension and trailer": (POST + CLOSE + CHUNKED + b"\r\n2;a=b\r\n{}\r\n0\r\nA: b\r\n\r\n", [200]),
    "chunk size with a sign": (POST + CHUNKED + b"\r\n-1\r\n", [400]),
    "chunk size of 40 digits": (POST + CHUNKED + b"\r\n" + b"0" * 39 + b"1\r\n", [400]),
    "long chunk extension": (POST + CHUNKED + b"\r\n1;" + b"a" * 40_000, [431]),
    "long trailer": (POST + CHUNKED + b"\r\n0\r\nA: " + b"a" * 40_000, [431]),
    "two codings": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", [501]),
    "chunked twice": (POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n", [501]),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n", [501]),
    "GET with a body": (GET + b"Content-Length: 5\r\n\r\nhello" + GET + CLOSE + b"\r\n", [200, 200]),
    "HEAD": (b"HEAD /echo HTTP/1.1\r\nHost: x\r\n\r\n" + GET + CLOSE + b"\r\n", [200, 200]),
    "HTTP/1.0": (b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2, [200]),
    "Upgrade is declined": (GET + b"Upgrade: h2c\r\nConnection: Upgrade\r\n\r\n" + GET + CLOSE + b"\r\n", [200, 200]),
    "unread body": (b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" + GET + b"\r\n", [200]),
    "refusal": (b"GET /refuse HTTP/1.1\r\nHost: x\r\n\r\n" + GET + b"\r\n", [418]),
    "50 in a row": ((GET + b"\r\n") * 50 + GET + CLOSE + b"\r\n", [200] * 51),
}


@pytest.mark.parametrize("name", TALKS)
def test_talk(echo, name):
    """Whole, and in two parts."""
    data, expected = TALKS[name]
    for cut in (len(data), len(data) // 2, len(data) - 1):
        out = echo.raw(data[:cut], data[cut:])
        assert statuses(out) == expected and out.startswith(b"HTTP/1.1 "), out[:300]


def test_expect_continue(echo):
    def ask(line, body, version=b"1.1"):
        data = b"POST /echo HTTP/%s\r\nHost: x\r\n%sExpect: %s\r\n" % (version, CLOSE, line)
        return statuses(echo.raw(data + b"Content-Length: 2\r\n\r\n", body))

    assert ask(b"100-continue", b"{}") == [100, 200]
    assert ask(b"100-continue", b"{}", b"1.0") == [200]  # HTTP/1.0 has no interim replies
    assert ask(b"fire", b"{}") == [200]
    at_once = POST + CLOSE + b"Expect: 100-Continue\r\nContent-Length: 2\r\n\r\n{}"
    assert statuses(echo.raw(at_once)) in ([200], [100, 200])
    assert statuses(echo.raw(POST + b"Expect: 100-continue\r\nContent-Length: 100001\r\n\r\n")) == [413]


def test_streams_are_chunked_or_end_with_the_connection(echo):
    head = b"GET /stream HTTP/%s\r\nHost: x\r\n" + CLOSE + b"\r\n"
    out = echo.raw(head % b"1.1")
    assert out.partition(b"\r\n\r\n")[2] == b"4\r\none \r\n3\r\ntwo\r\n1\r\n.\r\n0\r\n\r\n"
    out = echo.raw(head % b"1.0")
    assert out.partition(b"\r\n\r\n")[2] == b"one two." and b"chunked" not in out


@pytest.mark.parametrize("path", ["echo", "stream"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_half_requests(echo, path, framing):
    """Cut anywhere: refused if the client still reads, and nothing stays if it does not. Byte by byte: answered."""
    framed = b"Content-Length: 5\r\n\r\nhello" if framing == "length" else CHUNKED + b"\r\n5\r\nhello\r\n0\r\n\r\n"
    data = f"POST /{path} HTTP/1.1\r\nHost: x\r\n".encode() + framed
    for cut in range(1, len(data), 5):
        assert statuses(echo.raw(data[:cut], half_close=True)) == [400]
        with socket.create_connection(("127.0.0.1", echo.server.port)) as sock:
            sock.sendall(data[:cut])
            if cut % 2:  # close with a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    parts = [data[i : i + 1] for i in range(len(data))]
    assert statuses(echo.raw(*parts, half_close=True, pause=0)) == [200]
    assert eventually(lambda: not echo.server.connections)


def test_requests_after_a_body_longer_than_what_is_read_ahead(echo):
    """Reading was paused for this body; it goes on for the next request."""
    body = b"x" * 99_000
    with socket.create_connection(("127.0.0.1", echo.server.port), timeout=2) as sock:
        for _ in range(5):
            sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            out = b""
            while not out.endswith(body):
                out += sock.recv(1 << 20)
            assert statuses(out) == [200]


def test_a_client_that_never_stops_sending_is_read_ahead_within_limits(echo):
    """TCP makes it wait while its first request is answered."""
    with socket.create_connection(("127.0.0.1", echo.server.port), timeout=0.5) as sock:
        sock.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        data, sent = (GET + b"\r\n") * 1000, 0
        with contextlib.suppress(TimeoutError):
            while sent < 100_000_000:
                sent += sock.send(data)
        (connection,) = echo.server.connections
        assert READ_AHEAD < len(connection.http.trailing_data[0]) < 2 * READ_AHEAD and sent < 50_000_000
    assert len(echo.requests) == 1


@pytest.mark.parametrize("pipelined", [b"", GET + b"\r\n"])
def test_a_client_that_leaves_is_noticed(echo, pipelined):
    with socket.create_connection(("127.0.0.1", echo.server.port)) as sock:
        sock.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + pipelined)
        assert eventually(lambda: echo.requests)
        time.sleep(0.1)
        assert echo.gone == 0
    assert eventually(lambda: echo.gone == 1, 1.0) and eventually(lambda: not echo.server.connections)


def test_half_closed_client_gets_all_its_replies(echo):
    threading.Timer(0.3, lambda: echo.loop.call_soon_threadsafe(echo.release.set)).start()
    out = echo.raw(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + (GET + b"\r\n") * 3, half_close=True)
    assert statuses(out) == [100, 200, 200, 200, 200] and echo.gone == 0
    echo.release.clear()
    assert echo.raw(b"GET /wait HTTP/1.0\r\nHost: x\r\n\r\n", half_close=True) == b"" and echo.gone == 1


def test_a_bug_in_the_handler_ends_its_connection_only(echo):
    assert echo.raw(b"GET /bug HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    assert statuses(echo.raw(GET + CLOSE + b"\r\n")) == [200] and eventually(lambda: not echo.server.connections)


def test_mutated_requests(echo):
    """Whatever comes: replies with a status that is meant, and no connection that stays."""
    draw, seeds = random.Random(0), [data for data, _ in TALKS.values() if len(data) < 2000]
    inserts = [b"\r\n", b"\n", b" ", b"\0", b"\xff", b":", b",", b"0", CHUNKED, b"Content-Length: 3\r\n", b"HTTP/1.1"]
    for _ in range(300):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((1, 1, 2, 4, 8))):
            at, kind = draw.randrange(len(data) + 1), draw.randrange(4)
            if kind == 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            elif kind == 1:
                data[at:at] = draw.choice(inserts)
            elif kind == 2:
                del data[at : at + draw.randrange(1, 12)]
            else:
                data += draw.choice(seeds)
        out = echo.raw(bytes(data), half_close=True)
        assert not out or out.startswith(b"HTTP/1.1 "), (data, out)
        assert set(statuses(out)) <= {100, 200, 400, 411, 413, 415, 418, 431, 501, 505}, (data, out)
    assert eventually(lambda: not echo.server.connections) and statuses(echo.raw(GET + CLOSE + b"\r\n")) == [200]


def test_twice_as_many_connections_as_are_allowed_are_cut_off():
    echo, sockets = Echo(max_connections=1), []
    for replies in (b"", b"HTTP/1.1 503 ", b""):
        sockets.append(socket.create_connection(("127.0.0.1", echo.server.port), timeout=1))
        with contextlib.suppress(OSError):  # the first is idle, the third is cut off
            out = b""
            out = sockets[-1].recv(13)
        assert out == replies
    assert len(echo.server.connections) == 2
    for sock in sockets:
        sock.close()
    assert eventually(lambda: not echo.server.connections)
    echo.loop.call_soon_threadsafe(echo.server.stop.set)
    echo.thread.join(10)


def test_health_is_answered_when_all_connections_are_taken():
    echo = Echo(max_connections=1, uncounted=("/echo",))
    with socket.create_connection(("127.0.0.1", echo.server.port)):
        assert eventually(lambda: echo.server.connections)
        out = echo.raw(GET + b"\r\n")
        assert statuses(out) == [200] and b"Connection: close" in out
        assert statuses(echo.raw(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")) == [503]
    assert eventually(lambda: not echo.server.connections) and len(echo.requests) == 1
    echo.loop.call_soon_threadsafe(echo.server.stop.set)
    echo.thread.join(10)


@pytest.mark.parametrize(
    "value", [{}, [], {"a": []}, {"a": {}}, {"é": ["\ud83d", 1, None]}, {1: 2}, [[1], 2, {"a": 3}], BIG]
)
def test_json_in_pieces_is_json(value):
    assert "".join(json_pieces(value)) == json.dumps(value)
    assert max(map(len, json_pieces(value))) < PIECE


def test_others_have_their_turn_while_a_large_reply_is_made(echo):
    turns, size = [], len(json.dumps(BIG))

    async def count_turns():
        while echo.server.connections or not turns:
            turns.append(1)
            await asyncio.sleep(0)

    with socket.create_connection(("127.0.0.1", echo.server.port), timeout=20) as sock:
        assert eventually(lambda: echo.server.connections)
        asyncio.run_coroutine_threadsafe(count_turns(), echo.loop)
        sock.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n")
        out = b""
        while part := sock.recv(1 << 20):
            out += part
    assert json.loads(out.partition(b"\r\n\r\n")[2]) == BIG and size > 1_000_000
    assert len(turns) > size / PIECE / 2


def test_a_head_that_is_refused_has_no_body(echo):
    out = echo.raw(b"HEAD /refuse HTTP/1.1\r\nHost: x\r\n\r\n")
    assert out.endswith(b"\r\n\r\n") and b"X-Why: tea" in out
