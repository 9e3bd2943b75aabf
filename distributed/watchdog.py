"""The launcher's ranks, heartbeats between processes, and one clear message when one of them fails.

    watchdog = current_watchdog()                 # None in a run of one process
    watchdog.barrier()
    watchdog.check_equal_on_all_ranks("arguments", vars(args))
    try:
        train()
        watchdog.shutdown()
    except BaseException as error:
        watchdog.abort_on_error(error, exit_code=1, message=None)     # never returns; all other ranks exit too

`paddle.distributed.launch` starts the processes and gives each its rank in environment variables, which only this file
reads. All processes talk through one TCP store, which rank 0 serves. Without a watchdog, a rank that waits in a
collective for a dead rank would wait for ever, or die of an error that names no cause.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import paddle

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


STORE_LOST = ValueError, RuntimeError, OSError  # what Paddle raises when the store's server is gone


class Watchdog:
    """Barrier, heartbeats and failure propagation: if one rank dies, all exit with its message.

    A thread in each process writes a heartbeat to the store every second: a counter and the collective in which the
    rank waits. It ends the process when another rank has reported a failure, when rank 0 (the store's server) is gone,
    or when the launcher is. All ranks show the failure that was reported first.

    waiting_in: the Axis whose collective this rank is in now, else None; Axis sets it.
    """

    HEARTBEAT_TIMEOUT = 45.0  # seconds without a heartbeat after which a rank counts as dead
    RANK_0_GONE = "rank 0 has vanished: it was killed, or ran out of memory"

    @staticmethod
    @functools.cache  # one per process
    def of(launch: Launch) -> "Watchdog":
        return Watchdog(launch)

    def __init__(self, launch: Launch):
        self.launch, self.waiting_in, self.barriers, self.checks = launch, None, 0, 0
        self.store = self._connect(serve=launch.rank == 0)
        self.launcher_pid = (
            os.getppid() if "PADDLE_LOG_DIR" in os.environ else None
        )  # None: not started by the launcher
        if threading.current_thread() is threading.main_thread():
            # The launcher ends ranks by SIGTERM; Paddle's own handler would print a C++ stack.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.terminating, self.stopped = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def _connect(self, serve: bool = False):
        """A connection to the store; each thread needs its own. serve: be the server too."""
        host, port = self.launch.endpoints[0].split(":")
        return paddle.base.core.TCPStore(host, int(port), serve, 1, 120)

    def barrier(self) -> None:
        """Wait for all processes, without a time limit."""
        self.barriers += 1
        key = f"barrier {self.barriers}"
        if self.store.add(key, 1) < self.launch.world:
            self._wait_until(lambda: self.store.add(key, 0) >= self.launch.world)

    @staticmethod
    def _wait_until(condition: Callable[[], bool]) -> None:
        """Poll, without a time limit; the store's own wait() has one, and cannot be interrupted."""
        pause = 0.001
        while not condition():
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)

    def check_equal_on_all_ranks(self, what: str, values: dict) -> None:
        """UserError on every rank whose {key: value} differs from rank 0's; it names the first key that differs."""
        self.checks += 1
        local, key_in_store = {key: repr(value) for key, value in values.items()}, f"check {self.checks}"
        if self.launch.rank == 0:
            self.store.set(key_in_store, json.dumps(local).encode())
            self.store.add(f"{key_in_store} is set", 1)
            return
        self._wait_until(lambda: self.store.add(f"{key_in_store} is set", 0))
        reference = json.loads(self.store.get(key_in_store))
        for key in {**reference, **local}:
            if local.get(key) != reference.get(key):
                here, there = (side.get(key, "not there") for side in (local, reference))
                raise UserError(
                    f"{what}: {key} is {here:.80} here and {there:.80} on rank 0; all processes must have the same"
                )

    def shutdown(self) -> None:
        """End of a run: rank 0, which serves the store, stays until the others have left."""
        if self.launch.rank:
            self.stop()  # before rank 0 knows, as it may exit at once
        self.store.add("left", 1)
        self._wait_until(lambda: self.launch.rank or self.store.add("left", 0) >= self.launch.world)
        self.stop()

    def stop(self) -> None:
        """Stop the heartbeat thread."""
        self.stopped.set()
        if self.thread is not threading.current_thread():
            self.thread.join()

    # ------------------------------------------------------------------------------------------- ending all processes

    def abort_on_error(self, error: BaseException, exit_code: int, message: str | None) -> NoReturn:
        """End all processes, because `error` ended this rank's work.

        message: one line for a mistake that the user can mend (exit code 2); None: a bug, whose traceback is printed.
        If this rank failed only because a peer did, show the peer's error or name the missing rank.
        """
        peer_failed = exit_code == 1 and (
            self.waiting_in is not None or re.search(r"gloo|TCP (send|receive)|TCPStore", str(error))
        )
        if peer_failed:
            print(f"connection lost in {self._collective()}: {error}", file=sys.stderr, flush=True)
            time.sleep(0.5)  # if the peer has reported its failure, the heartbeat thread ends this process now
            try:
                message = self.diagnose(str(error))
            except STORE_LOST:
                message = self.RANK_0_GONE
        elif message is None:
            traceback.print_exception(error)
            message = f"rank {self.launch.rank}: {type(error).__name__}: {error} (its traceback is in its own log)"
        else:
            message = f"rank {self.launch.rank}: {message}"
        try:
            self.abort(exit_code, message)
        except STORE_LOST:
            self._terminate(exit_code, message)

    def abort(self, exit_code: int, message: str, store=None) -> NoReturn:
        """Report a failure to all ranks, then terminate; whichever rank reports first, its message is what all show."""
        store = store or self.store
        if store.add("failures", 1) == 1:
            store.set("failure", json.dumps([exit_code, message]).encode())
        self._terminate(*json.loads(store.get("failure")), store)

    def _terminate(self, exit_code: int, message: str, store=None) -> NoReturn:
        """Print the message, wait until all ranks have seen the failure (at most 8 seconds), and exit."""
        if not self.terminating.acquire(blocking=False):
            time.sleep(60)  # the other thread is about to exit
        sys.stdout.flush()
        print(f"error: {message}", file=sys.stderr, flush=True)
        if store is not None:
            with contextlib.suppress(*STORE_LOST):
                informed, end = store.add("informed", 1), time.monotonic() + 8.0
                while informed < self.launch.world and time.monotonic() < end:
                    time.sleep(0.05)
                    informed = store.add("informed", 0)
        os._exit(exit_code)  # other threads may be inside a collective that will never end

    # ---------------------------------------------------------------------------------------------------- heartbeats

    def _run(self) -> None:
        try:
            self._heartbeat(self._connect())
        except STORE_LOST:
            if not self.stopped.is_set():
                self._terminate(1, self.RANK_0_GONE)

    def _heartbeat(self, store) -> None:
        rank, world, beat, last_seen = self.launch.rank, self.launch.world, 0, {}
        while not self.stopped.wait(0.25):
            if self.launcher_pid is not None and os.getppid() != self.launcher_pid:
                self._terminate(1, "the launcher is gone")
            if store.add("failures", 0):
                self._terminate(*json.loads(store.get("failure")), store)
            beat += 1
            if beat % 4 == 1:
                axis = self.waiting_in
                store.set(f"heartbeat {rank}", json.dumps([beat, axis and axis.name, time.time()]).encode())
                store.add(f"heartbeat {rank} is set", int(beat == 1))
            if rank == 0 and beat % 20 == 0:
                for other in range(1, world):
                    self._check_alive(other, store, last_seen)

    def _check_alive(self, other: int, store, last_seen: dict) -> None:
        """Rank 0: abort if a rank's heartbeat is too old. last_seen: {rank: (heartbeat, when it was new)}."""
        if not store.add(f"heartbeat {other} is set", 0):
            return
        heartbeat, now = store.get(f"heartbeat {other}"), time.monotonic()
        if last_seen.get(other, (None,))[0] != heartbeat:
            last_seen[other] = heartbeat, now
        elif now - last_seen[other][1] > self.HEARTBEAT_TIMEOUT and not store.add("left", 0):
            self.abort(1, f"rank {other} has given no sign of life for {self.HEARTBEAT_TIMEOUT:.0f} s", store)

    def diagnose(self, error_text: str) -> str:
        """The message that names the rank for which the collective of this rank waited in vain."""
        ranks = self.waiting_in.ranks if self.waiting_in else range(self.launch.world)
        before = self._heartbeats()
        time.sleep(3.0)  # every live rank beats three times
        after = self._heartbeats()
        silent = [rank for rank in before if before[rank][0] == after[rank][0]]
        silent.sort(
            key=lambda rank: after[rank][2]
        )  # the oldest heartbeat first: a launcher ends its other ranks later
        not_waiting = [
            rank
            for rank in ranks
            if rank not in silent and rank in after and after[rank][1] is None and rank != self.launch.rank
        ]
        if silent and re.search(r"pair\.cc|onnection (closed|reset)|roken pipe", error_text):
            return f"rank {silent[0]} has vanished: it was killed, or ran out of memory"
        waited = f"others waited 30 s for it in a collective ({self._collective()})"
        if silent:
            return f"rank {silent[0]} gives no sign of life; {waited}"
        if not_waiting:
            return f"rank {not_waiting[0]} hangs or is far behind: {waited}"
        waits = ", ".join(f"rank {rank} in {name}" for rank, (_, name, _) in after.items())
        return f"ranks wait for each other: {waits}: {error_text.strip().splitlines()[-1]:.200}"

    def _heartbeats(self) -> dict[int, list]:
        """{rank: [counter, name of the axis whose collective it waits in or None, seconds since the epoch]}."""
        ranks = [rank for rank in range(self.launch.world) if self.store.add(f"heartbeat {rank} is set", 0)]
        return {rank: json.loads(self.store.get(f"heartbeat {rank}")) for rank in ranks}

    def _collective(self) -> str:
        return self.waiting_in.name if self.waiting_in else "a message"


def current_watchdog() -> Watchdog | None:
    """The Watchdog of this process; None in a run of one process."""
    launch = Launch.of_environment()
    return Watchdog.of(launch) if launch.world > 1 else None
