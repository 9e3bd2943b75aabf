"""Messages between the processes of a run along a tree: gathers, values that all can read, heartbeats, failures.

    parents = tree_parents(hosts)                        # rank -> the rank above it; by machine, then FAN_OUT-ary
    node = TreeNode(rank, parents, send, now)            # no sockets, no threads: what a rank says to its neighbors
    links = TreeLinks(rank, parents, endpoints, clock)   # the same over TCP, in a thread of this process
    values = links.gather("barrier 3", value, "all")     # [value of each rank], on every rank

Every rank talks to the rank above it and to those below it only: FAN_OUT of its machine, and a first rank of a machine
also to FAN_OUT machines. So a gather takes O(log N) messages one after another, a rank never has more connections than
that, and a minute of heartbeats costs each rank the same, whatever the number of ranks. A process that dies closes its
connections, so that its neighbors know it at once. One that stops without closing them sends no heartbeats.
"""

import contextlib
import hashlib
import json
import os
import selectors
import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

FAN_OUT = 8  # ranks below a rank on its machine, and machines below a machine

START_SECONDS = 600.0  # to connect to the rank above: its process may start later

GATHERS = ("all", "root", "first")  # who gets what of a gather: see TreeNode.contribute


def tree_parents(hosts: list[str]) -> list[int | None]:
    """[host of each rank] -> [the rank above each rank, or None]: rank 0 is the root."""
    members, parents = {}, [None] * len(hosts)
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    first_ranks = [ranks[0] for ranks in members.values()]
    for line in (first_ranks, *members.values()):
        for place, rank in enumerate(line[1:]):
            parents[rank] = line[place // FAN_OUT]
    return parents


class Pending:
    """The result of a gather or a question, when it is there."""

    def __init__(self):
        self.event, self.value = threading.Event(), None

    def set(self, value: object) -> None:
        self.value = value
        self.event.set()

    def wait(self) -> object:
        while not self.event.wait(1.0):  # in pieces, so that signals are handled
            pass
        return self.value


class TreeNode:
    """What one rank does with the messages of its neighbors; without sockets, so that many can be simulated.

    send(rank, message): hands a list of JSON values to a neighbor. now(): seconds. on_end(code, text): the root has
    decided that the run has failed. status(): what this rank does, for a report; on_report(statuses): of the root.
    """

    def __init__(self, rank: int, parents: list[int | None], send: Callable, now: Callable[[], float]):
        self.rank, self.parent, self.world, self.send, self.now = rank, parents[rank], len(parents), send, now
        self.children = [child for child, parent in enumerate(parents) if parent == rank]
        self.neighbors = self.children + ([] if self.parent is None else [self.parent])
        self.heard = dict.fromkeys(self.neighbors, now())  # {neighbor: when it last sent anything}
        self.parts, self.pending, self.questions = {}, {}, 0
        self.values, self.askers = {}, {}  # of the root: {key: value}, {key: [(path, number) that wait for it]}
        self.failure, self.statuses, self.asked_at = None, {}, None
        self.on_end = self.on_report = lambda *_: None
        self.status = dict

    # ------------------------------------------------------------------------------------------- gathers

    def contribute(self, name: str, value: object, kind: str = "all") -> Pending:
        """This rank's value of the gather `name`, which every rank contributes to once.

        kind: "all": every rank gets the list of all values; "root": rank 0 gets it, the others None when it is
        complete; "first": every rank gets the value of the first rank whose value is not None.
        """
        pending = self.pending[name] = Pending()
        own = {str(self.rank): value} if kind != "first" or value is not None else {}
        self._add(name, kind, self.rank, own)
        return pending

    def _add(self, name: str, kind: str, source: int, part: dict) -> None:
        """The part {rank: value} of this rank, or of all below a child, has come."""
        parts = self.parts.setdefault(name, {})
        parts[source] = part
        if len(parts) <= len(self.children):
            return
        merged = {rank: value for part in self.parts.pop(name).values() for rank, value in part.items()}
        if kind == "first" and merged:
            first = min(merged, key=int)
            merged = {first: merged[first]}
        if self.parent is not None:
            self.send(self.parent, ["up", name, kind, merged])
            return
        if kind == "first":
            result = next(iter(merged.values()), None)
        else:
            result = [merged[str(rank)] for rank in range(self.world)]
        self._finish(name, None if kind == "root" else result)
        self.pending.pop(name).set(result)

    def _finish(self, name: str, result: object) -> None:
        """Hand a result down."""
        for child in self.children:
            self.send(child, ["down", name, result])

    # ------------------------------------------------------------------------------------------- values

    def ask(self, operation: str, key: str, value: object = None) -> Pending:
        """Of the root's values: "set"; "get", which waits until it is set; "add" to a number, which returns the sum."""
        pending, self.questions = Pending(), self.questions + 1
        self.pending[self.questions] = pending
        self._ask([], self.questions, operation, key, value)
        return pending

    def _ask(self, path: list[int], number: int, operation: str, key: str, value: object) -> None:
        if self.parent is not None:
            self.send(self.parent, ["ask", [*path, self.rank], number, operation, key, value])
        elif operation == "get" and key not in self.values:
            self.askers.setdefault(key, []).append((path, number))
        else:
            if operation == "add":
                value = self.values.get(key, 0) + value
            if operation != "get":
                self.values[key] = value
            self._answer(path, number, self.values[key])
            for waiting in self.askers.pop(key, ()):
                self._answer(*waiting, self.values[key])

    def _answer(self, path: list[int], number: int, value: object) -> None:
        if path:
            self.send(path[-1], ["answer", path[:-1], number, value])
        else:
            self.pending.pop(number).set(value)

    # ------------------------------------------------------------------------------------------- messages, life

    def receive(self, sender: int, message: list) -> None:
        kind, *content = message
        self.heard[sender] = self.now()
        if kind == "up":
            self._add(*content[:2], sender, content[2])
        elif kind == "down":
            self._finish(*content)
            self.pending.pop(content[0]).set(content[1])
        elif kind == "ask":
            self._ask(*content)
        elif kind == "answer":
            self._answer(*content)
        elif kind == "failed":
            self.fail(*content)
        elif kind == "end":
            self._end(*content)
        elif kind == "suspect":
            self.suspect()
        elif kind == "report":
            self._report()
        elif kind == "status":
            self._note_status(*content)

    def beat(self) -> None:
        """A sign of life to all neighbors."""
        for neighbor in self.neighbors:
            self.send(neighbor, ["beat"])

    def silent(self) -> dict[int, float]:
        """{neighbor: seconds since it last sent anything}."""
        return {neighbor: self.now() - heard for neighbor, heard in self.heard.items()}

    def fail(self, code: int, text: str) -> None:
        """Tell the root that the run has failed; the first to tell is believed, and all end with its text."""
        if self.parent is not None and self.parent in self.heard:
            self.send(self.parent, ["failed", code, text])
        else:
            self._end(code, text)

    def _end(self, code: int, text: str) -> None:
        if self.failure is None:
            self.failure = code, text
            for child in self.children:
                self.send(child, ["end", code, text])
            self.on_end(code, text)

    def lost(self, neighbor: int, text: str) -> None:
        """A neighbor has closed its connection."""
        self.heard.pop(neighbor, None)
        if neighbor in self.children:
            self.children.remove(neighbor)
        self.neighbors.remove(neighbor)
        if self.failure is None:
            self.fail(1, text)

    # ------------------------------------------------------------------------------------------- reports

    def suspect(self) -> None:
        """Ask the root for a report of all ranks: this one waits for long, or does not hear a neighbor."""
        if self.parent is not None:
            self.send(self.parent, ["suspect"])
        elif self.asked_at is None:
            self.asked_at, self.statuses = self.now(), {}
            self._report()

    def _report(self) -> None:
        for child in self.children:
            self.send(child, ["report"])
        silent = {str(child): seconds for child, seconds in self.silent().items() if child in self.children}
        self._note_status(self.rank, {**self.status(), "silent": silent})

    def _note_status(self, rank: int, status: dict) -> None:
        """Each status goes up at once, not with others: a rank that is stopped must not hide those beside it."""
        if self.parent is not None:
            self.send(self.parent, ["status", rank, status])
        elif self.asked_at is not None:
            self.statuses[rank] = status

    def evaluate(self, patience: float) -> None:
        """The root: look at a report once all have answered, or `patience` seconds after it was asked for."""
        if self.asked_at is None:
            return
        if len(self.statuses) == self.world or self.now() - self.asked_at > patience:
            self.asked_at = None
            self.on_report(self.statuses)


# ============================================================================================== over TCP


class TreeLinks:
    """A TreeNode over TCP: one thread holds the connections; other threads call gather() and ask().

    endpoints: "host:port" of every rank; a rank with others below it listens on its own. tick(): called by the thread
    about every second. on_lost(rank): text for the failure when a neighbor's connection ends.
    """

    TICK = 1.0  # seconds

    def __init__(self, rank: int, endpoints: tuple[str, ...], tick: Callable, on_lost: Callable[[int], str]):
        hosts = [endpoint.rpartition(":")[0] for endpoint in endpoints]
        self.rank, self.endpoints, self.tick, self.on_lost = rank, endpoints, tick, on_lost
        self.job = hashlib.blake2b("|".join(endpoints).encode(), digest_size=8).hexdigest()
        self.selector, self.calls = selectors.DefaultSelector(), deque()
        self.sockets, self.received, self.outbox, self.left = {}, {}, {}, {}
        self.node = TreeNode(rank, tree_parents(hosts), self._send, time.monotonic)
        self.wakes, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        self._connect()
        self.selector.register(self.wakes, selectors.EVENT_READ, None)
        self.leaving, self.stopped = False, threading.Event()
        self.thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        self.thread.start()

    # ------------------------------------------------------------------------------------------- for other threads

    def gather(self, name: str, value: object, kind: str = "all") -> object:
        """TreeNode.contribute, and wait for the result."""
        return self._call(self.node.contribute, name, value, kind)

    def ask(self, operation: str, key: str, value: object = None) -> object:
        """TreeNode.ask, and wait for the answer."""
        return self._call(self.node.ask, operation, key, value)

    def _call(self, function: Callable, *args) -> object:
        handed = Pending()
        self.post(lambda: handed.set(function(*args)))
        return handed.wait().wait()

    def post(self, call: Callable[[], None]) -> None:
        """Run call() in the thread of the links."""
        self.calls.append(call)
        with contextlib.suppress(OSError):
            self.waker.send(b"x")

    # ------------------------------------------------------------------------------------------- connections

    def _connect(self) -> None:
        """Connect to the rank above, and accept those below."""
        listener, node = None, self.node
        if node.children:
            listener = self._listen()
        if node.parent is not None:
            self._adopt(node.parent, self._dial(node.parent))
        waiting, end = set(node.children), time.monotonic() + START_SECONDS
        while waiting:
            listener.settimeout(max(0.1, end - time.monotonic()))
            try:
                connection, _ = listener.accept()
                connection.settimeout(10.0)
                hello = json.loads(self._read_frame(connection))
            except TimeoutError:
                if time.monotonic() > end:
                    raise ConnectionError(f"rank {min(waiting)} has not started within {START_SECONDS:.0f} s") from None
                continue
            except (OSError, ValueError):  # not one of ours
                continue
            if hello[:1] != [self.job] or hello[1] not in waiting:
                connection.close()
                continue
            waiting.discard(hello[1])
            self._adopt(hello[1], connection)
        if listener is not None:
            listener.close()

    def _listen(self) -> socket.socket:
        port, end = int(self.endpoints[self.rank].rpartition(":")[2]), time.monotonic() + 30
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            try:
                listener.bind(("", port))
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise ConnectionError(f"port {port} of rank {self.rank} is taken: {error.strerror}") from None
                time.sleep(0.5)
        listener.listen(2 * FAN_OUT)
        return listener

    def _dial(self, rank: int) -> socket.socket:
        host, _, port = self.endpoints[rank].rpartition(":")
        pause, end = 0.02, time.monotonic() + START_SECONDS
        while True:
            try:
                connection = socket.create_connection((host, int(port)), timeout=10.0)
                if connection.getsockname() == connection.getpeername():  # TCP connects to itself on its own port
                    connection.close()  # or the other rank could never listen on it
                    raise ConnectionRefusedError
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise ConnectionError(f"rank {rank} at {self.endpoints[rank]} cannot be reached: {error}") from None
                time.sleep(pause)
                pause = min(1.0, 1.5 * pause)
        text = json.dumps([self.job, self.rank]).encode()
        connection.sendall(struct.pack("<I", len(text)) + text)
        return connection

    @staticmethod
    def _read_frame(connection: socket.socket) -> bytes:
        size, content = 4, b""
        for _ in range(2):
            content = b""
            while len(content) < size:
                more = connection.recv(size - len(content))
                if not more:
                    raise ConnectionError
                content += more
            size = min(struct.unpack("<I", content)[0], 4096) if size == 4 else size
        return content

    def _adopt(self, rank: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets[rank], self.received[rank], self.outbox[rank] = connection, bytearray(), bytearray()
        self.selector.register(connection, selectors.EVENT_READ, rank)

    # ------------------------------------------------------------------------------------------- the thread

    def _send(self, rank: int, message: list) -> None:
        """Send what the socket takes now and keep the rest: two ranks that both send much must both read, too."""
        if rank in self.sockets:
            text = json.dumps(message, separators=(",", ":")).encode()
            self.outbox[rank] += struct.pack("<I", len(text)) + text
            self._flush(rank)

    def _flush(self, rank: int) -> None:
        outbox, connection = self.outbox[rank], self.sockets[rank]
        try:
            while outbox:
                del outbox[: connection.send(bytes(outbox[: 1 << 18]))]
        except BlockingIOError:
            pass
        except OSError:  # its end is noticed when reading
            outbox.clear()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if outbox else 0)
        if self.selector.get_key(connection).events != wanted:
            self.selector.modify(connection, wanted, rank)
        if self.leaving and not outbox:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def _run(self) -> None:
        try:
            self._serve_all()
        except BaseException:  # without this thread the process would hear of nothing any more
            traceback.print_exc()
            os._exit(1)

    def _serve_all(self) -> None:
        next_tick = time.monotonic() + self.TICK
        while not (self.leaving and not self.sockets):
            for key, events in self.selector.select(max(0.0, next_tick - time.monotonic())):
                if key.data is None:
                    self.wakes.recv(4096)
                else:
                    self._serve(key.data, events)
            while self.calls:
                self.calls.popleft()()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self.TICK
                self.tick()
                for rank, since in self.left.items():  # all leave together, at the end of a run
                    if not self.leaving and time.monotonic() - since > 5.0:
                        self.node.fail(1, f"rank {rank} has ended before the others")
                if self.leaving and time.monotonic() > self.leaving:
                    break
        self.stopped.set()

    def _serve(self, rank: int, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(rank)
        if events & selectors.EVENT_READ:
            self._read(rank)

    def _read(self, rank: int) -> None:
        try:
            content = self.sockets[rank].recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content:
            self._close(rank)
            return
        buffer = self.received[rank]
        buffer += content
        while len(buffer) >= 4:
            (size,) = struct.unpack_from("<I", buffer)
            if len(buffer) < 4 + size:
                break
            message = json.loads(bytes(buffer[4 : 4 + size]))
            del buffer[: 4 + size]
            if message[0] == "bye":
                self.left[rank] = time.monotonic()
            else:
                self.node.receive(rank, message)

    def _close(self, rank: int) -> None:
        connection = self.sockets.pop(rank)
        self.selector.unregister(connection)
        connection.close()
        if not self.leaving and rank not in self.left:
            self.node.lost(rank, self.on_lost(rank))

    def leave(self) -> None:
        """End the connections, when all ranks do; returns when the neighbors have, or after five seconds."""
        self.post(self._leave)
        if self.thread is not threading.current_thread():
            self.stopped.wait(6.0)

    def _leave(self) -> None:
        self.leaving = time.monotonic() + 5.0
        for rank in list(self.sockets):
            self._send(rank, ["bye"])

    def drain(self, ranks: list[int], seconds: float) -> None:
        """In the thread: wait until these neighbors have closed their connections, at most so long."""
        end = time.monotonic() + seconds
        while (waiting := [rank for rank in ranks if rank in self.sockets]) and time.monotonic() < end:
            for key, events in self.selector.select(0.1):
                if key.data in waiting:
                    self._serve(key.data, events)
