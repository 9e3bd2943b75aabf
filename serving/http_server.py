"""An HTTP/1.1 server on asyncio and h11: one event loop holds every connection, every wait has a limit.

    class Hello(HTTPServer):
        def __init__(self, args):
            super().__init__(args)
            self.routes = {"/": ("GET", self.get_root, True)}          # path: (method, handler, open to all)

        async def get_root(self, connection, request, body):
            await connection.respond(200, {"hello": "world"}, request=request)
            return 200

h11 parses requests and frames answers. A thousand idle or slow clients cost no threads, a closed socket is noticed
while its request still waits, and nobody can make the server keep more than READ_AHEAD, WRITE_AHEAD and one body for
him."""

import asyncio
import contextlib
import dataclasses
import hmac
import http
import json
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

import h11

from formats.files import UserError

MAX_HEADER_BYTES = 16 * 1024  # request line and headers together
MAX_HEADERS = 100
READ_AHEAD = 64 * 1024  # bytes taken from a client before the server reads them; then TCP makes it wait
WRITE_AHEAD = 64 * 1024  # bytes kept for a client that reads slowly; then its request waits, write_timeout at most
LINGER = 2.0  # seconds in which a refused client may finish sending, so that it reads the answer and not a reset
CONTINUE = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")


class ClientGone(Exception):
    """The client closed its connection, or no longer reads."""


class HTTPError(Exception):
    """An answer other than 200, as OpenAI's error object; `param` names the field of the request that is wrong."""

    def __init__(self, status: int, message: str, code=None, param=None, headers: Iterable = ()):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, dict(headers)

    def body(self) -> dict:
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

    @staticmethod
    def from_h11(event: h11.Request) -> "HTTPRequest":
        """HTTPError 400, 431, 501 or 505 for what h11 lets pass and this server does not."""
        target, version = event.target.decode("latin-1"), f"HTTP/{event.http_version.decode()}"
        if version not in ("HTTP/1.0", "HTTP/1.1"):
            raise HTTPError(505, f"{version}: this server speaks HTTP/1.0 and HTTP/1.1")
        if len(event.headers) > MAX_HEADERS:
            raise HTTPError(431, f"more than {MAX_HEADERS} headers")
        if len(target) + sum(len(name) + len(value) + 4 for name, value in event.headers) > MAX_HEADER_BYTES:
            raise HTTPError(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")
        headers = {}
        for name, value in ((name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers):
            if headers.get(name, value) != value and name == "host":
                raise HTTPError(400, f"two different {name} headers", "malformed_request")
            headers[name] = value
        if "content-length" in headers and "transfer-encoding" in headers:
            raise HTTPError(400, "Content-Length and Transfer-Encoding exclude each other", "malformed_request")
        path = urlsplit(target).path if target.startswith("http://") else target.partition("?")[0]
        keep_alive = version == "HTTP/1.1" and "close" not in headers.get("connection", "").lower()
        return HTTPRequest(event.method.decode("latin-1"), path, version, headers, keep_alive)


class Connection(asyncio.Protocol):
    """A client's socket: what it sent and what it is sent, both bounded, and whether it is still there.

    Everything that changes sets `changed`, the one event that the connection's task waits for (`wait_until`).
    """

    def __init__(self, server: "HTTPServer"):
        self.server, self.args, self.http = server, server.args, None
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
        self.task = asyncio.get_running_loop().create_task(self.server.serve_connection(self))

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
    async def wait_until(self, ready: Callable, deadline: float) -> bool:
        """Sleep until ready() is true or time.monotonic() passes the deadline; returns ready()."""
        loop = asyncio.get_running_loop()
        while not ready() and (left := deadline - time.monotonic()) > 0:
            timer = loop.call_later(left, self.changed.set)
            await self.changed.wait()
            timer.cancel()
            self.changed.clear()
        return ready()

    def _resume_reading(self):
        if self.paused:
            self.paused = False
            self.transport.resume_reading()

    async def _next_event(self, deadline):
        """The next h11 event of the request that has begun. HTTPError: it is malformed, cut off, or late."""
        while True:
            try:
                event = self.http.next_event()
            except h11.RemoteProtocolError as error:
                status = error.error_status_hint
                raise HTTPError(status, f"malformed HTTP: {error}", "malformed_request" if status == 400 else None)
            if event is not h11.NEED_DATA:
                return event
            if not self.buffer:
                self._resume_reading()
                if not await self.wait_until(lambda: self.buffer or self.eof or self.lost, deadline):
                    raise HTTPError(408, f"the request did not arrive within {self.args.read_timeout:g} seconds")
                if self.lost:
                    raise ClientGone
                if not self.buffer:
                    raise HTTPError(400, "the request ends early", "malformed_request")
            self.http.receive_data(bytes(self.buffer))
            self.buffer.clear()

    async def read_head(self) -> HTTPRequest | None:
        """The next request, or None if none comes: the connection was closed, or idle for too long."""
        if self.http is not None:  # what was received behind the last request
            self.buffer[:0] = self.http.trailing_data[0]
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)

        def ready():
            while self.buffer[:2] == b"\r\n":  # some clients end a body with an extra line
                del self.buffer[:2]
            return self.buffer or self.eof or self.lost

        self._resume_reading()
        await self.wait_until(ready, time.monotonic() + self.args.read_timeout)
        if not self.buffer or self.lost:
            return None
        self.busy = True
        return HTTPRequest.from_h11(await self._next_event(time.monotonic() + self.args.read_timeout))

    async def read_body(self, request: HTTPRequest) -> bytes:
        """The body's bytes; HTTPError 400, 408, 411, 413."""
        deadline, length = time.monotonic() + self.args.read_timeout, request.headers.get("content-length")
        if request.method == "POST" and length is None and "transfer-encoding" not in request.headers:
            raise HTTPError(411, "a Content-Length header or a chunked body is needed")
        self._check_size(int(length or 0))
        if self.http.they_are_waiting_for_100_continue:
            self.transport.write(self.http.send(CONTINUE))
        body = bytearray()
        while not isinstance(event := await self._next_event(deadline), h11.EndOfMessage):
            body += event.data
            self._check_size(len(body))
        return bytes(body)

    def _check_size(self, size):
        if size > self.args.max_body_bytes:
            raise HTTPError(413, f"the body is longer than {self.args.max_body_bytes:,} bytes", "body_too_large")

    async def send(self, *events: h11.Event) -> None:
        """Write; wait while the client is behind by more than WRITE_AHEAD, write_timeout at most, then cut it off."""
        if self.lost:
            raise ClientGone
        self.transport.write(b"".join(self.http.send(event) for event in events))
        if not await self.wait_until(lambda: self.writable or self.lost, time.monotonic() + self.args.write_timeout):
            self.transport.abort()
            raise ClientGone
        if self.lost:
            raise ClientGone

    async def respond(self, status: int, body: dict | bytes, headers=(), request: HTTPRequest | None = None) -> None:
        """A whole answer; a dict becomes JSON. ASCII JSON carries any text through any client, lone surrogates too.

        request: None closes the connection after the answer.
        """
        kind = "text/plain; charset=utf-8"
        if isinstance(body, dict):
            body, kind = json.dumps(body).encode() + b"\n", "application/json"
        lines = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            **dict(headers),
        }
        content = [] if request is not None and request.method == "HEAD" else [h11.Data(data=body)]
        await self.send(self._response(status, lines, request), *content, h11.EndOfMessage())

    async def start_stream(self, status: int, headers: dict, request: HTTPRequest) -> None:
        """An answer without a length: in chunks, or to an HTTP/1.0 client until the connection ends."""
        await self.send(self._response(status, headers, request))

    def _response(self, status, headers, request):
        if request is None or not request.keep_alive:
            headers = {**headers, "Connection": "close"}
        lines = [(name, str(value).encode("latin-1")) for name, value in headers.items()]
        return h11.Response(status_code=status, headers=lines, reason=http.HTTPStatus(status).phrase.encode())

    def client_disconnected(self, probe: h11.Event | None) -> bool:
        """Whether the client is known to have closed both directions.

        A closed and a half-closed socket look alike until something is sent: `probe` is an event that means nothing to
        a client that still reads, and draws a reset from one that does not. None: half-closed counts as gone."""
        if self.eof and not self.probed:
            self.probed = True
            if probe is None:
                return True
            self.transport.write(self.http.send(probe))
        if self.lost or not self.probed:
            return self.lost
        return self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    async def close(self) -> None:
        """Flush and close, within limits.

        It reads on for a moment: closing over unread bytes would reset the connection and take the answer away from a
        client that is still sending.
        """
        deadline = time.monotonic() + self.args.write_timeout
        while not self.lost and self.transport.get_write_buffer_size() and time.monotonic() < deadline:
            await self.wait_until(lambda: self.lost, min(deadline, time.monotonic() + 0.02))
        if not self.lost and not self.transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # reset by the client, which the loop has not been told yet
                self.transport.write_eof()
            deadline = time.monotonic() + LINGER
            while not (self.lost or self.eof) and time.monotonic() < deadline:
                self.buffer.clear()
                self._resume_reading()
                await self.wait_until(lambda: self.buffer or self.lost or self.eof, deadline)
        self.transport.abort()  # nothing is left to be sent, or nobody reads it


class HTTPServer:
    """Connections, routes and the end of a server; subclasses fill `routes` and write the handlers.

    args: host, port, api_key, max_connections, max_body_bytes, read_timeout and write_timeout in seconds.
    """

    def __init__(self, args):
        self.args, self.routes, self.connections, self.answers = args, {}, set(), {}
        self.draining, self.port, self.stop, self.force_stop = False, None, asyncio.Event(), asyncio.Event()

    async def serve_connection(self, connection: Connection) -> None:
        """Requests one after another, as they come, until either side has enough."""
        try:
            if connection.too_many:
                connection.http = h11.Connection(h11.SERVER)
                message = f"all {self.args.max_connections} connections are taken"
                raise HTTPError(503, message, "too_many_connections", headers={"Retry-After": 1})
            while await self._one_request(connection):
                pass
        except HTTPError as error:  # what follows on this connection cannot be told apart from this request's rest
            self.count("", error.status)
            self.log(f"- refused: {error.status} {error.code or ''}")
            with contextlib.suppress(ClientGone):
                await connection.respond(error.status, error.body(), error.headers)
        except ClientGone:
            pass
        finally:
            await connection.close()

    async def _one_request(self, connection):
        """Read and answer a request; returns whether the connection stays open. HTTPError: it cannot, and why."""
        request = await connection.read_head()
        if request is None:
            return False
        handler = self.route(request)  # before the body: a client that may not ask need not send it
        body = await connection.read_body(request)
        status = 500
        try:
            status = await handler(connection, request, body)
        except HTTPError as error:
            status = error.status
            request.keep_alive &= not self.draining
            await connection.respond(status, error.body(), error.headers, request)
        except ClientGone:
            status = 499
            raise
        except Exception:  # a bug; it must show, but not end the others' answers
            traceback.print_exc()
            await connection.respond(500, HTTPError(500, "internal error", "internal_error").body())
            return False
        finally:
            self.count(request.path, status)
            connection.busy = False
        return request.keep_alive and not self.draining

    def find_route(self, path: str) -> tuple | None:
        return self.routes.get(path)

    def route(self, request: HTTPRequest) -> Callable:
        """The handler of a request; HTTPError 401, 403, 404 or 405."""
        if (found := self.find_route(request.path)) is None:
            raise HTTPError(404, "no such path; there are " + ", ".join(self.routes), "unknown_path")
        method, handler, is_open = found
        allowed = {"GET": ("GET", "HEAD"), "POST": ("POST",)}[method]
        if request.method not in allowed:
            message, headers = f"{request.path} takes {' and '.join(allowed)}", {"Allow": ", ".join(allowed)}
            raise HTTPError(405, message, "method_not_allowed", headers=headers)
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.headers.get("host"):  # another site's script in a browser
            raise HTTPError(403, "pages of other origins may not ask this server", "wrong_origin")
        if self.args.api_key and not is_open:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.args.api_key}".encode()):
                message, headers = "a valid key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
                raise HTTPError(401, message, "invalid_api_key", headers=headers)
        return handler

    def shutting_down_error(self) -> HTTPError:
        return HTTPError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": 5})

    def log(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def count(self, path: str, status: int) -> None:
        path = path if path in self.routes else "other"
        self.answers[path, status] = self.answers.get((path, status), 0) + 1

    async def listen(self) -> asyncio.Server:
        """Open the port, which `port` then holds; UserError if that is not possible."""
        loop, args = asyncio.get_running_loop(), self.args
        try:
            listener = await loop.create_server(lambda: Connection(self), args.host, args.port, backlog=512)
        except OSError as error:
            reason = str(error.strerror).rpartition(": ")[2]
            raise UserError(
                f"port: cannot listen on {args.host}:{args.port}: {reason}; give another --port, or "
                "--port 0 for a free one"
            ) from None
        self.port = listener.sockets[0].getsockname()[1]
        return listener

    async def close_connections(self, listener: asyncio.Server) -> None:
        """Stop listening; clients have a moment to take their last bytes."""
        deadline = time.monotonic() + min(5.0, self.args.write_timeout)
        while (
            any(c.busy or c.transport.get_write_buffer_size() for c in self.connections) and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.02)
        listener.close()
        for connection in list(self.connections):
            connection.transport.abort()
