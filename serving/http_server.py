"""HTTP/1.1 on asyncio streams: h11 parses and frames; this room limits size, time and number.

    server = HTTPServer(handler, refusal_body, Limits(...))
    await server.listen("127.0.0.1", 8011)

    async def handler(connection, request):
        body = await connection.read_body(request)
        await connection.respond(200, {"bytes": len(body)})

One event loop holds every connection, so that a thousand idle or slow clients cost no threads. A client that
disconnects is noticed while its request still waits, and every wait has a time limit. The loop never computes: a
handler gives long work to a thread and sleeps in `wait_until`.
"""

import asyncio
import contextlib
import dataclasses
import http
import json
import re
import signal
import socket
import time
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable, Iterator

import h11

from formats.files import UserError

MAX_HEADER_BYTES = 16 * 1024  # request line and headers together
MAX_HEADERS = 100
READ_SIZE = 16 * 1024  # bytes parsed between two looks at the other connections
READ_AHEAD = 64 * 1024  # bytes taken from a client before it is its turn; then TCP makes it wait
WRITE_AHEAD = 64 * 1024  # bytes kept for a client that reads slowly; then its request waits, write_timeout at most
PIECE = 32 * 1024  # characters of JSON that are made between two looks at the other connections
JSON_DEPTH = 5  # deeper values are made in one go: a row of logprobs is choices[0].logprobs.content[0]
LINGER = 2.0  # seconds in which a refused client may finish sending, so that it reads the reply and not a reset
CONTINUE = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
BOTH_DONE = {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}


class ClientGone(Exception):
    """The client closed its connection, or reads nothing any more."""


class HTTPError(Exception):
    """A reply other than 200. `code` is a word for programs, `message` a sentence for people."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclasses.dataclass
class Limits:
    max_connections: int  # more are refused with 503; of twice as many even that is too much
    max_body_bytes: int
    read_timeout: float  # seconds in which a request must have arrived, and an idle connection is kept
    write_timeout: float  # seconds in which a client must take what is waiting for it
    uncounted: tuple = ()  # paths that are answered though all connections are taken: those of health checks
    uncounted_timeout: float = 0.5  # seconds in which a connection beyond max_connections must say what it wants


def json_pieces(value: object, depth: int = JSON_DEPTH) -> Iterator[str]:
    """json.dumps(value) in pieces, none of which takes long, so that a reply of 40 MB delays nobody else's."""
    if depth and isinstance(value, dict) and value and all(type(key) is str for key in value):
        for i, (key, item) in enumerate(value.items()):
            yield f"{', ' if i else '{'}{json.dumps(key)}: "
            yield from json_pieces(item, depth - 1)
        yield "}"
    elif depth and isinstance(value, (list, tuple)) and value:
        is_nested = isinstance(value[0], (dict, list, tuple))
        group = 1 if is_nested else 256
        for i in range(0, len(value), group):
            yield ", " if i else "["
            yield from json_pieces(value[i], depth - 1) if is_nested else (json.dumps(value[i : i + 256])[1:-1],)
        yield "]"
    else:
        yield json.dumps(value)


@dataclasses.dataclass
class HTTPRequest:
    method: str
    path: str  # without the query, with one slash between its parts and none at its end
    headers: dict  # lower-case name: value

    @classmethod
    def from_event(cls, event: h11.Request, head: bytes) -> "HTTPRequest":
        """head: the bytes that h11 parsed. HTTPError 400, 431 or 505 for what h11 lets pass."""
        if event.http_version not in (b"1.0", b"1.1"):
            raise HTTPError(505, f"HTTP/{event.http_version.decode()}: HTTP/1.0 and HTTP/1.1 are supported")
        if len(head) > MAX_HEADER_BYTES:
            raise HTTPError(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")
        if len(event.headers) > MAX_HEADERS:
            raise HTTPError(431, f"more than {MAX_HEADERS} headers")
        if re.search(rb"\n[ \t]", head):
            raise HTTPError(400, "a header line must not be folded", "malformed_request")
        target = event.target.decode()
        try:
            path = urllib.parse.urlsplit(target).path if target.startswith("http://") else target.partition("?")[0]
        except ValueError:  # such as http://[
            raise HTTPError(400, "the request's target is not a URL", "malformed_request") from None
        headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        return cls(event.method.decode(), re.sub("/+", "/", path).rstrip("/") or "/", headers)


class BodyDecoder:
    """The pieces of a body -> what Content-Encoding wrapped: gzip, deflate or nothing. HTTPError 415 for others."""

    def __init__(self, coding: str, max_bytes: int):
        coding, self.max_bytes, self.body = coding.strip().lower(), max_bytes, bytearray()
        if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            message = f"Content-Encoding: {coding[:40]!r} is not supported; send gzip, deflate or none"
            raise HTTPError(415, message, "unsupported_encoding", {"Accept-Encoding": "gzip, deflate"})
        self.inflate = zlib.decompressobj(wbits=47) if coding not in ("", "identity") else None  # 47: either header

    def add(self, data: bytes) -> None:
        """HTTPError 413 as soon as the body is too long, before more of it is inflated."""
        try:
            room = self.max_bytes - len(self.body) + 1
            self.body += data if self.inflate is None else self.inflate.decompress(data, room)
        except zlib.error as error:
            raise HTTPError(400, f"the body is not {error}"[:200], "malformed_body") from None
        if len(self.body) > self.max_bytes or (self.inflate is not None and self.inflate.unconsumed_tail):
            raise HTTPError(413, f"the body is longer than {self.max_bytes:,} bytes", "body_too_large")

    def finish(self) -> bytes:
        if self.inflate is not None and (not self.inflate.eof or self.inflate.unused_data):
            raise HTTPError(400, "the compressed body is cut off, or more follows it", "malformed_body")
        return bytes(self.body)


class Connection:
    """A client: what it sends and what it is sent, both bounded, and whether it is still there.

    `http` is the h11.Connection of the current request; a new request gets a new one. `changed` wakes `wait_until`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: "HTTPServer"):
        self.reader, self.writer, self.server, self.limits = reader, writer, server, server.limits
        self.http, self.changed, self.watcher = h11.Connection(h11.SERVER), asyncio.Event(), None
        self.method, self.busy, self.eof, self.probed = None, False, False, False
        self.extra_headers = {}  # of every reply to the current request, whatever it is
        writer.transport.set_write_buffer_limits(high=WRITE_AHEAD)

    # ---- requests
    async def next_request(self, timeout: float | None = None) -> HTTPRequest | None:
        """None: no more, or the client was idle for `timeout` (read_timeout). HTTPError 400, 408, 431, 501, 505."""
        if self.method is not None and (self.server.draining or self.http.states != BOTH_DONE):
            return None
        await self._stop_watching()
        data = self.http.trailing_data[0].lstrip(b"\r\n")  # some clients end a body with an extra line
        self.http, self.method, self.extra_headers = h11.Connection(h11.SERVER, MAX_HEADER_BYTES), None, {}
        timeout = self.limits.read_timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while not data:
            with contextlib.suppress(HTTPError):
                data = await self._read(deadline)
            if not data:
                return None
            data = data.lstrip(b"\r\n")
        self.busy, deadline, head = True, time.monotonic() + timeout, bytearray(data)
        self.http.receive_data(data)
        event = await self._next_event(deadline, head)
        self.method = event.method.decode()
        return HTTPRequest.from_event(event, head[: len(head) - len(self.http.trailing_data[0])])

    async def read_body(self, request: HTTPRequest) -> bytes:
        """The whole body, inflated where it was compressed. HTTPError 400, 408, 411, 413, 415."""
        length, deadline = request.headers.get("content-length"), time.monotonic() + self.limits.read_timeout
        if length is None and "transfer-encoding" not in request.headers and request.method == "POST":
            raise HTTPError(411, "a Content-Length header or a chunked body is needed")
        if length is not None and "transfer-encoding" in request.headers:
            raise HTTPError(400, "Content-Length and Transfer-Encoding exclude each other", "malformed_request")
        most = self.limits.max_body_bytes
        if int(length or 0) > most:
            raise HTTPError(413, f"the body is longer than {most:,} bytes", "body_too_large")
        decoder = BodyDecoder(request.headers.get("content-encoding", ""), most)
        if self.http.they_are_waiting_for_100_continue:
            self.writer.write(self.http.send(CONTINUE))
        while isinstance(event := await self._next_event(deadline), h11.Data):
            decoder.add(event.data)
        return decoder.finish()

    async def _next_event(self, deadline: float, received: bytearray | None = None) -> h11.Event:
        """What is read from the client meanwhile is also appended to `received`."""
        try:
            while (event := self.http.next_event()) is h11.NEED_DATA:
                data = await self._read(deadline)
                self.http.receive_data(data)
                if received is not None:
                    received += data
        except h11.RemoteProtocolError as error:
            raise HTTPError(error.error_status_hint, str(error)[:200], "malformed_request") from None
        return event

    async def _read(self, deadline: float) -> bytes:
        """Some bytes; b"" at the end of what the client sends. HTTPError 408, ClientGone."""
        try:
            data = await asyncio.wait_for(self.reader.read(READ_SIZE), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise HTTPError(408, f"the request did not arrive within {self.limits.read_timeout:g} seconds") from None
        except OSError:
            raise ClientGone from None
        self.eof = not data
        return data

    # ---- replies
    @property
    def may_respond(self) -> bool:
        return self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    async def respond(self, status: int, body: bytes | dict, headers: dict | None = None, close: bool = False) -> None:
        """A whole reply; a dict becomes JSON. ASCII JSON carries any text through any client, lone surrogates too."""
        content_type = "text/plain; charset=utf-8"
        if isinstance(body, dict):
            body, content_type = await self._json(body), "application/json"
        length = {} if status == 204 else {"Content-Type": content_type, "Content-Length": str(len(body))}
        data = self._head(status, length | (headers or {}), close)
        for start in range(0, len(body) if self.method != "HEAD" and status != 204 else 0, WRITE_AHEAD):
            if start:
                await self._send(data)
                data = b""
            data += self.http.send(h11.Data(data=body[start : start + WRITE_AHEAD]))
        await self._send(data + self.http.send(h11.EndOfMessage()))

    async def _json(self, value: dict) -> bytes:
        """The other connections have their turn between two pieces of it."""
        parts, done, size = [], [], 0
        for piece in json_pieces(value):
            parts.append(piece)
            size += len(piece)
            if size >= PIECE:
                done.append("".join(parts).encode())
                parts, size = [], 0
                await asyncio.sleep(0)
        return b"".join((*done, "".join(parts).encode(), b"\n"))

    async def start_response(self, status: int, headers: dict) -> None:
        """The head of a reply whose body comes in pieces, by send_data."""
        await self._send(self._head(status, headers))

    async def send_data(self, data: bytes, last: bool = False) -> None:
        data = self.http.send(h11.Data(data=data))
        await self._send(data + self.http.send(h11.EndOfMessage()) if last else data)

    def _head(self, status: int, headers: dict, close: bool = False) -> bytes:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} | self.extra_headers | headers
        if close or self.server.draining:
            headers["Connection"] = "close"
        reason = http.HTTPStatus(status).phrase
        return self.http.send(h11.Response(status_code=status, headers=list(headers.items()), reason=reason))

    async def _send(self, data: bytes) -> None:
        """Write; wait while the client is behind by more than WRITE_AHEAD, write_timeout at most, then cut it off."""
        self.writer.write(data)
        try:
            if self.writer.transport.get_write_buffer_size():
                await asyncio.wait_for(self.writer.drain(), self.limits.write_timeout)
            else:
                await self.writer.drain()  # returns at once; OSError if the client is gone
        except (OSError, asyncio.TimeoutError):
            self.writer.transport.abort()
            raise ClientGone from None

    # ---- whether the client is still there
    async def wait_until(self, deadline: float) -> None:
        """Sleep until `changed` is set, by the handler's own news or by the client's end, or until `deadline` (of
        time.monotonic)."""
        if self.watcher is None:
            self.watcher = asyncio.create_task(self._watch())
        seconds = deadline - time.monotonic()
        if self.probed:  # a reset in reply to the probe wakes nobody
            seconds = min(seconds, 0.05)
        timer = asyncio.get_running_loop().call_later(seconds, self.changed.set)
        await self.changed.wait()
        timer.cancel()
        self.changed.clear()

    async def _watch(self) -> None:
        """Read while a request is answered: the next requests, up to READ_AHEAD, and the end."""
        with contextlib.suppress(OSError):
            while len(self.http.trailing_data[0]) <= READ_AHEAD:
                self.http.receive_data(data := await self.reader.read(READ_SIZE))
                if not data:
                    self.eof = True
                    break
        self.changed.set()

    async def _stop_watching(self) -> None:
        if self.watcher is not None:
            self.watcher.cancel()
            await asyncio.wait([self.watcher])
            self.watcher = None

    @property
    def peer(self) -> str:
        """The client's address, or its proxy's."""
        return str((self.writer.get_extra_info("peername") or ("",))[0])

    @property
    def lost(self) -> bool:
        return self.writer.transport.is_closing()

    def client_disconnected(self, probe: bytes = b"") -> bool:
        """Whether the client is known to have closed both directions.

        A closed and a half-closed socket look alike until something is sent: bytes that mean nothing to a client that
        still reads and draw a reset from one that does not. Before a reply that is 100 Continue (RFC 9110, 15.2), which
        HTTP/1.0 does not have: there, half-closed counts as gone. Within a body it is `probe`."""
        if self.eof and not self.probed:
            self.probed = True
            if self.http.our_state is h11.SEND_BODY:
                self.writer.write(self.http.send(h11.Data(data=probe)))
            elif self.http.their_http_version == b"1.1":
                self.writer.write(self.http.send(CONTINUE))
            else:
                return True
        if self.lost or not self.probed:
            return self.lost
        return self.writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    async def close(self) -> None:
        """Flush and close, within limits; read on for a moment, since closing over unread bytes would reset the
        connection and take the reply away from a client that is still sending."""

        async def discard():
            while await self.reader.read(READ_SIZE):
                pass

        await self._stop_watching()
        self.writer.transport.set_write_buffer_limits(high=0)  # now _send waits for the last byte
        with contextlib.suppress(ClientGone, OSError, asyncio.TimeoutError):
            await self._send(b"")
            if not self.eof:
                self.writer.write_eof()
                await asyncio.wait_for(discard(), LINGER)
        self.writer.transport.abort()  # nothing is left to be sent, or nobody takes it


class HTTPServer:
    """Listens; gives the requests of each connection to `handler`, one after another, as they come.

    The handler must read the body and send a whole reply, or raise: HTTPError before it replies (then `refusal_body`
    makes the reply's JSON, as for what is not even a request, and the connection ends), or ClientGone."""

    def __init__(
        self,
        handler: Callable[[Connection, HTTPRequest], Awaitable[None]],
        refusal_body: Callable[[HTTPError], dict],
        limits: Limits,
    ):
        self.handler, self.refusal_body, self.limits = handler, refusal_body, limits
        self.connections, self.listener, self.port = set(), None, None
        self.stop, self.force_stop = asyncio.Event(), asyncio.Event()

    @property
    def draining(self) -> bool:
        """Replies are finished, and then connections closed."""
        return self.stop.is_set()

    async def listen(self, host: str, port: int) -> str:
        """Returns the URL; port 0 is a free one. UserError where the port is taken."""
        limit = READ_AHEAD // 2  # a StreamReader reads up to twice its limit
        try:
            self.listener = await asyncio.start_server(self.serve_connection, host, port, limit=limit, backlog=512)
        except OSError as error:
            reason = str(error.strerror).rpartition(": ")[2]
            message = f"port: cannot listen on {host}:{port}: {reason}; give another --port, or --port 0 for a free one"
            raise UserError(message) from None
        host, self.port = self.listener.sockets[0].getsockname()[:2]
        return f"http://[{host}]:{self.port}/" if ":" in host else f"http://{host}:{self.port}/"

    def stop_on_signals(self) -> None:
        """SIGTERM or SIGINT sets `stop`, a second one `force_stop`."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(
                number, lambda: (self.force_stop if self.stop.is_set() else self.stop).set()
            )

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        most = self.limits.max_connections
        if len(self.connections) >= 2 * most:  # refusals are connections, too
            writer.transport.abort()
            return
        connection = Connection(reader, writer, self)
        self.connections.add(connection)
        try:
            if len(self.connections) > most:
                request = await connection.next_request(self.limits.uncounted_timeout)
                if request is None or request.path not in self.limits.uncounted:
                    message = f"all {most} connections are taken"
                    raise HTTPError(503, message, "too_many_connections", {"Retry-After": "1"})
                connection.extra_headers["Connection"] = "close"
                await self.handler(connection, request)
                return
            while request := await connection.next_request():
                await self.handler(connection, request)
                connection.busy = False
        except HTTPError as error:  # the rest of this request cannot be told apart from the next one
            with contextlib.suppress(ClientGone):
                await connection.respond(error.status, self.refusal_body(error), error.headers, close=True)
        except ClientGone:
            pass
        finally:
            await connection.close()
            self.connections.discard(connection)

    async def close(self, timeout: float) -> None:
        """Wait until all replies are taken, `timeout` seconds at most, and close everything."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and any(
            connection.busy or connection.writer.transport.get_write_buffer_size() for connection in self.connections
        ):
            await asyncio.sleep(0.02)
        self.listener.close()
        for connection in self.connections:
            connection.writer.transport.abort()
