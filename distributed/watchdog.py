"""The launcher's ranks, messages and heartbeats between them, and one clear message when one of them fails.

    watchdog = current_watchdog()                 # None in a run of one process
    watchdog.barrier()
    values = watchdog.gather(value)               # [value of each rank]
    watchdog.check_equal_on_all_ranks("arguments", vars(args))
    try:
        train()
        watchdog.shutdown()
    except BaseException as error:
        watchdog.abort_on_error(error, exit_code=1, message=None)     # never returns; all other ranks exit too

`paddle.distributed.launch` starts the processes and gives each its rank in environment variables, which only this file
reads. All processes talk along a tree of connections (distributed/tree.py). Without a watchdog, a rank that waits in a
collective for a dead rank would wait for ever, or die of an error that names no cause.

Dead, silent and late are three things. A process that has ended is known at once, by its connection. A rank without
heartbeats, and one that others wait for and that makes no progress, may be slow: after a tenth of `limit` seconds rank
0 prints a line, after `limit` the run ends.
"""

import atexit
import contextlib
import functools
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from typing import NamedTuple, NoReturn

from distributed.tree import TreeLinks
from formats.files import UserError


class Launch(NamedTuple):
    """What Paddle's launcher says of this process."""

    rank: int
    world: int  # number of processes
    endpoints: tuple[str, ...]  # "host:port" of every rank

    @staticmethod
    def of_environment() -> "Launch":
        endpoints = tuple(os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(","))
        rank, world = os.environ.get("PADDLE_TRAINER_ID", 0), os.environ.get("PADDLE_TRAINERS_NUM", 1)
        return Launch(int(rank), int(world), endpoints)


class Watchdog:
    """Gathers, heartbeats and failure propagation: if one rank fails, all exit with its message.

    waiting_in: the Axis whose collective this rank is in now, else None; enter() and leave() set it. limit: seconds
    after which a rank that gives no sign of life, or makes no progress while others wait for it, ends the run.
    """

    LIMIT = 600.0  # ddp_timeout

    @staticmethod
    @functools.cache  # one per process
    def of(launch: Launch) -> "Watchdog":
        return Watchdog(launch)

    def __init__(self, launch: Launch):
        self.launch, self.limit, self.numbers = launch, self.LIMIT, Counter()
        self.waiting_in, self.since, self.progressed = None, {}, time.monotonic()
        self.launcher_pid = (
            os.getppid() if "PADDLE_LOG_DIR" in os.environ else None
        )  # None: not started by the launcher
        if threading.current_thread() is threading.main_thread():
            # The launcher ends ranks by SIGTERM; Paddle's own handler would print a C++ stack.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.last_tick = self.last_beat = self.last_suspicion = self.resumed = time.monotonic()
        self.stack, self.place = None, ""  # of the main thread at the last tick, see _look()
        self.told, self.ended = {}, threading.Event()
        self.at_exit = []  # calls before the process ends by a failure
        self.links = TreeLinks(launch.rank, launch.endpoints, self._tick, _vanished)
        node = self.links.node
        node.on_end, node.on_report, node.status = self._terminate, self._judge, self._status
        self.links.start()
        atexit.register(self.stop)

    # ------------------------------------------------------------------------------------------- between all ranks

    def gather(self, value: object, kind: str = "all", channel: str = "main") -> object:
        """A small JSON value of each rank -> the list of all; kind: see TreeNode.contribute. No time limit but `limit`.

        Ranks call it in one order in each channel: a thread beside training needs a channel of its own.
        """
        self.numbers[channel] += 1
        name = f"{channel} {self.numbers[channel]}"
        self.since[channel] = name, None, self.moved()
        try:
            return self.links.gather(name, value, kind)
        finally:
            self.since.pop(channel, None)
            self.moved()

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather(None, "first")

    def ask(self, operation: str, key: str, value: object = None) -> object:
        """Of the values that all ranks share: "set", "get" (waits until it is set), "add" to a number."""
        return self.links.ask(operation, key, value)

    def check_equal_on_all_ranks(self, what: str, values: dict) -> None:
        """UserError on every rank whose {key: value} differs from rank 0's; it names the first key that differs."""
        local = {key: repr(value) for key, value in values.items()}
        reference = self.gather(local if self.launch.rank == 0 else None, "first")
        for key in {**reference, **local}:
            if local.get(key) != reference.get(key):
                here, there = (side.get(key, "not there") for side in (local, reference))
                raise UserError(
                    f"{what}: {key} is {here:.80} here and {there:.80} on rank 0; all processes must have the same"
                )

    def choose_master(self) -> None:
        """Give Paddle's own store a free port: with the launcher's --ips its address is the one of this tree's root."""
        port = None
        if self.launch.rank == 0:
            with socket.create_server(("", 0)) as probe:
                port = probe.getsockname()[1]
        host = self.launch.endpoints[0].rpartition(":")[0]
        os.environ["PADDLE_MASTER"] = f"{host}:{self.gather(port, 'first')}"
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)

    def moved(self) -> float:
        """This rank makes progress; returns the time."""
        self.progressed = time.monotonic()
        return self.progressed

    def enter(self, axis: object) -> None:
        """This rank's main thread goes into a collective of an Axis."""
        self.since["axis"] = axis.name, axis.ranks, self.moved()
        self.waiting_in = axis

    def leave(self) -> None:
        self.waiting_in = None
        self.since.pop("axis", None)
        self.moved()

    def shutdown(self) -> None:
        """End of a run: all ranks leave together."""
        self.barrier()
        self.stop()

    def stop(self) -> None:
        """End the connections."""
        self.links.leave()

    # ------------------------------------------------------------------------------------------- ending all processes

    def abort_on_error(self, error: BaseException, exit_code: int, message: str | None) -> NoReturn:
        """End all processes, because `error` ended this rank's work.

        message: one line for a mistake that the user can mend (exit code 2); None: a bug, whose traceback is printed.
        If this rank failed only because a peer did, the peer's message is shown.
        """
        lost = re.search(r"gloo|TCP (send|receive)|TCPStore|onnection (closed|reset)|roken pipe|has died$", str(error))
        if exit_code == 1 and (self.waiting_in is not None or lost):
            self.ended.wait(10.0)  # the peer's end is known by now: the control thread ends this process
            where = self.waiting_in.name if self.waiting_in else "a message"
            message = f"rank {self.launch.rank}: connection lost in {where}: {str(error).strip():.300}"
        elif message is None:
            traceback.print_exception(error)
            message = f"rank {self.launch.rank}: {type(error).__name__}: {error} (its traceback is in its own log)"
        else:
            message = f"rank {self.launch.rank}: {message}"
        self.abort(exit_code, message)

    def abort(self, exit_code: int, message: str) -> NoReturn:
        """Report a failure to all ranks, then exit; whichever rank reports first, its message is what all show."""
        self.links.post(lambda: self.links.node.fail(exit_code, message))
        self.ended.wait(10.0)  # rank 0 has decided
        time.sleep(10.0 if self.ended.is_set() else 0.0)  # the control thread is about to exit
        self._exit(exit_code, message)

    def _terminate(self, exit_code: int, message: str) -> None:
        """In the control thread: wait until the ranks below have ended, print the message and exit."""
        self.ended.set()
        self.links.drain(self.links.node.children, 3.0)
        self._exit(exit_code, message)

    def _exit(self, exit_code: int, message: str) -> NoReturn:
        for call in self.at_exit:
            with contextlib.suppress(OSError):
                call()
        sys.stdout.flush()
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(exit_code)  # other threads may be inside a collective that will never end

    # ---------------------------------------------------------------------------------------------------- heartbeats

    def _tick(self) -> None:
        """Of the control thread, every second."""
        node, now, warn = self.links.node, time.monotonic(), self.limit / 10
        pause, self.last_tick = now - self.last_tick, now
        if pause > 5.0:  # this process was stopped, perhaps all were: nobody was silent while nobody listened
            node.heard = dict.fromkeys(node.heard, now)
            self.resumed = now
        self._look()
        if self.launcher_pid is not None and os.getppid() != self.launcher_pid:
            node.fail(1, "the launcher is gone")
        if now - self.last_beat >= min(5.0, self.limit / 20):
            self.last_beat = now
            node.beat()
        silent = node.silent()
        if silent.get(node.parent, 0.0) > 1.2 * self.limit:  # cut off from rank 0, which names the rank at `limit`
            self._terminate(1, f"rank {node.parent} gives no sign of life for {silent[node.parent]:.0f} s")
        status = self._status()
        waited = [seconds for _, _, seconds in status["waits"]]
        waited += [status["idle"]] if status["idle"] > self.limit else []
        if max([*waited, *silent.values()], default=0.0) > warn and now - self.last_suspicion > warn:
            self.last_suspicion = now
            node.suspect()
        node.evaluate(3.0)

    def _look(self) -> None:
        """The main thread makes progress if its Python stack is not what it was a second ago."""
        frame = sys._current_frames().get(threading.main_thread().ident)
        stack, place = [], ""
        while frame is not None:
            stack.append((frame.f_code, frame.f_lasti))
            name = os.path.basename(frame.f_code.co_filename)
            if not place and "-packages" not in frame.f_code.co_filename:
                place = f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        if stack != self.stack:
            self.stack, self.place = stack, place
            self.moved()

    def _status(self) -> dict:
        """{"waits": [[what, ranks or None, seconds], …], "idle": seconds without progress, "at": where it is}."""
        now, resumed = time.monotonic(), self.resumed
        waits = [[what, ranks, now - max(since, resumed)] for what, ranks, since in list(self.since.values())]
        return {"waits": waits, "idle": now - max(self.progressed, resumed), "at": self.place}

    def _judge(self, statuses: dict[int, dict]) -> None:
        """Rank 0, with a report of all ranks: say who is late, or end the run."""
        found = find_late(statuses, self.launch.world)
        if found is None:
            return
        rank, seconds, text = found
        if seconds > self.limit:
            self.links.node.fail(1, f"{text} (limit: ddp_timeout {self.limit:.0f})")
        elif seconds > self.limit / 10 and seconds > 2 * self.told.get(rank, 0.0):
            self.told = {rank: seconds}
            print(f"waiting: {text}; the run ends after ddp_timeout, {self.limit:.0f} s", file=sys.stderr, flush=True)
        elif seconds < self.told.get(rank, 0.0):  # it moved meanwhile
            self.told = {}


def _vanished(rank: int) -> str:
    return f"rank {rank} has vanished: it was killed, or ran out of memory"


def find_late(statuses: dict[int, dict], world: int) -> tuple[int, float, str] | None:
    """(rank, seconds, line) of the rank that the others wait for, from the statuses of those that answered; or None.

    A rank that gives no sign of life comes first. Else it is a rank that waits for nobody, makes no progress, and is
    missing in a collective or gather of others.
    """
    silent = {int(rank): s for status in statuses.values() for rank, s in status["silent"].items()}
    silent = {rank: seconds for rank, seconds in silent.items() if rank not in statuses}
    if silent:
        rank = max(silent, key=silent.get)
        return rank, silent[rank], f"rank {rank} gives no sign of life for {silent[rank]:.0f} s"
    late = {}
    for status in statuses.values():
        for what, ranks, seconds in status["waits"]:
            for rank in range(world) if ranks is None else ranks:
                other = statuses.get(rank)
                if other is not None and not other["waits"]:
                    seconds = min(seconds, other["idle"])
                    late[rank] = max(late.get(rank, (0.0, "")), (seconds, "a collective " * (ranks is not None) + what))
    if late:
        rank = max(late, key=late.get)
        seconds, what = late[rank]
        what = what.replace("collective ", "collective (") + ")" if what.startswith("a collective") else "a barrier"
        text = f"rank {rank} hangs or is far behind: others have waited {seconds:.0f} s for it in {what}"
        return rank, seconds, text + (f"; it is at {at}" if (at := statuses[rank].get("at")) else "")
    if len(statuses) == world and all(status["waits"] for status in statuses.values()):
        waits = {rank: max(status["waits"], key=lambda wait: wait[2]) for rank, status in statuses.items()}
        if len({what for what, _, _ in waits.values()}) > 1:
            shown = ", ".join(f"rank {rank} in {what}" for rank, (what, _, _) in list(waits.items())[:8])
            seconds = min(wait[2] for wait in waits.values())
            return 0, seconds, f"ranks wait for each other: {shown}"
    if len(statuses) == world and not any(status["waits"] for status in statuses.values()):
        # Between accelerators a collective returns at once; where its result is needed, nobody knows whom it waits for.
        rank = max(statuses, key=lambda one: statuses[one]["idle"])
        seconds = min(status["idle"] for status in statuses.values())
        return rank, seconds, f"no rank has made progress for {seconds:.0f} s; rank {rank} is at {statuses[rank]['at']}"
    return None


def current_watchdog() -> Watchdog | None:
    """The Watchdog of this process; None in a run of one process."""
    launch = Launch.of_environment()
    try:
        return Watchdog.of(launch) if launch.world > 1 else None
    except ConnectionError as error:
        print(f"error: rank {launch.rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
