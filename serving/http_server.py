"""HTTP/1.1 on asyncio."""

import asyncio
import contextlib
import dataclasses
import http
import json
import re
import socket
import time
from urllib.parse import urlsplit

from formats.files import brief

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
