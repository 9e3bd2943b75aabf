"""The launcher's ranks, heartbeats, and the report of the rank that failed first."""

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
from collections import namedtuple

import paddle

from formats.files import UserError


class Launch(namedtuple("Launch", "rank world endpoints")):
    """What Paddle's launcher says of this process."""

    @staticmethod
    def of_environment():
        endpoints = tuple(os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(","))
        return Launch(
            int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1)), endpoints
        )


STORE_GONE = ValueError, RuntimeError, OSError  # what Paddle raises where there is no store any more


class Watchdog:
    """All processes of a run: they meet, and no one goes on alone when another has ended.

    Rank 0 keeps the store that all talk through. A thread in each tells the others every second that it is alive and
    which collective it waits in, and ends this process when a failure is told there, when rank 0 is gone, or when the
    launcher is. The first failure is the one that all ranks show.
    """

    SILENCE = 45.0  # seconds without a sign of life, after which a rank is given up
    RANK_0_GONE = "rank 0 has vanished: it was killed, or ran out of memory"

    @staticmethod
    @functools.cache  # a process has one
    def of(launch):
        return Watchdog(launch)

    def __init__(self, launch):
        self.launch, self.waiting_in, self.meetings, self.agreements = launch, None, 0, 0
        self.store = self._client(launch.rank == 0)
        self.parent = (
            os.getppid() if "PADDLE_LOG_DIR" in os.environ else None
        )  # the launcher, if that is what started us
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's; Paddle would show where its C++ stands
        self.ending, self.done = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def _client(self, opens=False):
        """A connection of its own for each thread; the one that opens is the server too."""
        host, port = self.launch.endpoints[0].split(":")
        return paddle.base.core.TCPStore(host, int(port), opens, 1, 120)

    def barrier(self):
        """Wait for all processes, however long they take."""
        self.meetings += 1
        name = f"meeting {self.meetings}"
        if self.store.add(name, 1) < self.launch.world:
            self._wait(lambda: self.store.add(name, 0) >= self.launch.world)

    @staticmethod
    def _wait(condition):
        """However long; the store's own way gives up after a time, and cannot be interrupted."""
        pause = 0.001
        while not condition():
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)

    def check_equal_on_all_ranks(self, what, values):
        """UserError unless every process has the same {key: value}; it names the rank that differs from rank 0, and a key."""
        mine, self.agreements = {key: repr(value) for key, value in values.items()}, self.agreements + 1
        name = f"agreement {self.agreements}"
        if self.launch.rank == 0:
            self.store.set(name, json.dumps(mine).encode())
            self.store.add(f"{name} is there", 1)
            return
        self._wait(lambda: self.store.add(f"{name} is there", 0))
        theirs = json.loads(self.store.get(name))
        for key in {**theirs, **mine}:
            if mine.get(key) != theirs.get(key):
                here, there = (found.get(key, "not there") for found in (mine, theirs))
                raise UserError(
                    f"{what}: {key} is {here:.80} here and {there:.80} on rank 0; all processes must have the same"
                )

    def shutdown(self):
        """At the end of a run: rank 0 stays until the others have gone, as the store is with it."""
        if self.launch.rank:
            self.stop()  # before rank 0 knows, as it may be gone at once
        self.store.add("left", 1)
        self._wait(lambda: self.launch.rank or self.store.add("left", 0) >= self.launch.world)
        self.stop()

    def stop(self):
        self.done.set()
        if self.thread is not threading.current_thread():
            self.thread.join()

    def abort_on_error(self, error, code, line):
        """End this process, as `error` has ended its work: code 2 and a line for what the user can mend, else a traceback.

        One that only lost its company shows why: another's failure, or who is missing.
        """
        lost = code == 1 and (self.waiting_in is not None or re.search(r"gloo|TCP (send|receive)|TCPStore", str(error)))
        if lost:
            print(
                f"lost in {self.waiting_in.name if self.waiting_in else 'a message'}: {error}",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(0.5)  # a failure that is told in the store ends us here, by the other thread
            try:
                code, line = 1, self._who_is_missing(str(error))
            except STORE_GONE:
                code, line = 1, self.RANK_0_GONE
        elif line is None:
            traceback.print_exception(error)
            line = f"rank {self.launch.rank}: {type(error).__name__}: {error} (its traceback is in its own log)"
        else:
            line = f"rank {self.launch.rank}: {line}"
        try:
            self.end(code, line)
        except STORE_GONE:
            self._exit(code, line)

    def end(self, code, line, store=None):
        """Tell all, wait until they know, and exit; who is told first is who all show."""
        store = store or self.store
        if store.add("failures", 1) == 1:
            store.set("failure", json.dumps([code, line]).encode())
        self._exit(*json.loads(store.get("failure")), store)

    def _exit(self, code, line, store=None):
        if not self.ending.acquire(blocking=False):
            time.sleep(60)  # the other thread is about to
        sys.stdout.flush()
        print(f"error: {line}", file=sys.stderr, flush=True)
        if store is not None:
            with contextlib.suppress(*STORE_GONE):
                told, end = store.add("told", 1), time.monotonic() + 8.0
                while told < self.launch.world and time.monotonic() < end:
                    time.sleep(0.05)
                    told = store.add("told", 0)
        os._exit(code)  # threads may be inside of a collective that will never end

    def _watch(self):
        try:
            store = self._client()
            self._keep_watch(store)
        except STORE_GONE:
            if not self.done.is_set():
                self._exit(1, self.RANK_0_GONE)

    def _keep_watch(self, store):
        rank, world, beat, heard = self.launch.rank, self.launch.world, 0, {}
        while not self.done.wait(0.25):
            if self.parent is not None and os.getppid() != self.parent:
                self._exit(1, "the launcher is gone")
            if store.add("failures", 0):
                self._exit(*json.loads(store.get("failure")), store)
            beat += 1
            if beat % 4 == 1:
                store.set(
                    f"rank {rank}", json.dumps([beat, self.waiting_in and self.waiting_in.name, time.time()]).encode()
                )
                store.add(f"rank {rank} is there", int(beat == 1))
            if rank == 0 and beat % 20 == 0:
                now = time.monotonic()
                for other in range(1, world):
                    if store.add(f"rank {other} is there", 0):
                        sign = store.get(f"rank {other}")
                        if heard.get(other, (None,))[0] != sign:
                            heard[other] = sign, now
                        elif now - heard[other][1] > self.SILENCE and not store.add("left", 0):
                            self.end(1, f"rank {other} has given no sign of life for {self.SILENCE:.0f} s", store)

    def _who_is_missing(self, message):
        """The line about who did not come to the collective that this rank waited in."""
        place = self.waiting_in.name if self.waiting_in else "a message"
        ranks = self.waiting_in.ranks if self.waiting_in else range(self.launch.world)
        closed = re.search(r"pair\.cc|onnection (closed|reset)|roken pipe", message)

        def signs():
            return {
                r: json.loads(self.store.get(f"rank {r}"))
                for r in range(self.launch.world)
                if self.store.add(f"rank {r} is there", 0)
            }

        before = signs()
        time.sleep(3.0)  # every rank gives three
        after = signs()
        silent = [r for r in before if before[r][0] == after[r][0]]
        silent.sort(key=lambda r: after[r][2])  # the first to go: a launcher ends the others of its node for that
        elsewhere = [
            r for r in ranks if r not in silent and r in after and after[r][1] is None and r != self.launch.rank
        ]
        if silent and closed:
            return f"rank {silent[0]} has vanished: it was killed, or ran out of memory"
        if silent:
            return f"rank {silent[0]} gives no sign of life; others waited 30 s for it in a collective ({place})"
        if elsewhere:
            return f"rank {elsewhere[0]} hangs or is far behind: others waited 30 s for it in a collective ({place})"
        waits = ", ".join(f"rank {r} in {where}" for r, (_, where, _) in after.items())
        return f"ranks wait for each other: {waits}: {message.strip().splitlines()[-1]:.200}"


def current_watchdog():
    """The Watchdog that this process belongs to; None if it is alone."""
    launch = Launch.of_environment()
    return Watchdog.of(launch) if launch.world > 1 else None
