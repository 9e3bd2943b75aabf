"""Work before the engine: tokenizing, templates, schemas. It has threads, limits and an end when its client leaves.

    lanes = Lanes()
    call = await lanes.run(connection, deadline, len(data), prepare, data)

Requests of few bytes have threads of their own, so that they do not wait behind large ones.
"""

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from formats.progress import AbortedWork, check_progress
from serving.http_server import ClientGone, Connection, HTTPError

SMALL_BYTES = 16 * 1024


class Work:
    """What check_progress is while a request is prepared: it stops work that nobody waits for, and long prompts."""

    def __init__(self):
        self.given_up, self.most_tokens = False, None

    def __call__(self, count: int) -> None:
        if self.given_up:
            raise AbortedWork
        if self.most_tokens is not None and count > self.most_tokens:
            raise TooManyTokens(self.most_tokens)


class TooManyTokens(AbortedWork):
    """A text has more tokens than limit_tokens() allows; they are not counted to the end."""


def limit_tokens(limit: int) -> None:
    """From here on, in work of a lane, a text of more than `limit` tokens raises TooManyTokens."""
    work = check_progress.get()
    if isinstance(work, Work):
        work.most_tokens = limit


class Lanes:
    def __init__(self, small_bytes: int = SMALL_BYTES):
        self.small_bytes = small_bytes
        self.small, self.large = ThreadPoolExecutor(2, "small"), ThreadPoolExecutor(1, "large")

    async def run(self, connection: Connection, deadline: float, size: int, function: Callable, *args) -> object:
        """function(*args) in a thread of the lane for `size` bytes. HTTPError 504 at the deadline (of time.monotonic)
        and ClientGone: the work then ends at its next check, or never begins."""
        work, loop = Work(), asyncio.get_running_loop()

        def in_thread():
            check_progress.set(work)  # in a context of its own
            work(0)
            return function(*args)

        def wake(_):
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(connection.changed.set)

        lane = self.small if size <= self.small_bytes else self.large
        future = lane.submit(contextvars.copy_context().run, in_thread)
        future.add_done_callback(wake)
        try:
            while not future.done():
                if connection.client_disconnected():
                    raise ClientGone
                if time.monotonic() >= deadline:
                    raise HTTPError(504, "the prompt was not read within request_timeout", "timeout")
                await connection.wait_until(deadline)
            if connection.lost:
                raise ClientGone
            return future.result()
        finally:
            work.given_up = True
            future.cancel()
