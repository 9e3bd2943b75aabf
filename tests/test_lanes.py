"""serving/lanes.py: work before the engine ends with its client, at its deadline and at its limit; small goes first."""

import asyncio
import threading
import time

import pytest

from formats.bpe import BPE, BYTE_CHARS, GPT2_WORDS, split_step
from formats.files import UserError
from formats.progress import AbortedWork, check_progress
from formats.rendering import RenderedTemplate
from serving.automaton import Terms
from serving.http_server import ClientGone, HTTPError
from serving.lanes import Lanes, TooManyTokens, Work, limit_tokens
from serving.schema import compile_schema

BYTES = {char: i for i, char in enumerate(BYTE_CHARS.values())}
LETTERS = BPE({**BYTES, "aa": 256, "aaaa": 257}, None, [split_step(GPT2_WORDS)])


class Client:
    """What lanes see of a Connection."""

    def __init__(self):
        self.lost, self.changed = False, asyncio.Event()

    def client_disconnected(self):
        return self.lost

    async def wait_until(self, deadline):
        timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self.changed.set)
        await self.changed.wait()
        timer.cancel()
        self.changed.clear()

    def leave(self):
        self.lost = True
        self.changed.set()


def encode_forever(started):
    """Work like that of a tokenizer, which never ends by itself."""
    started.set()
    while True:
        LETTERS.encode("a" * 50_000, True)
        check_progress.get()(0)


def test_small_requests_do_not_wait_and_large_ones_end_with_their_client():
    async def main():
        lanes, clients, ended = Lanes(), [Client() for _ in range(5)], threading.Event()
        started = threading.Event()
        end = time.monotonic() + 30
        tasks = [asyncio.ensure_future(lanes.run(c, end, 10**6, encode_forever, started)) for c in clients]
        await asyncio.to_thread(started.wait, 10)
        assert await lanes.run(Client(), end, 10, len, "four") == 4  # the large lane is full
        for client in clients:
            client.leave()
        for task in tasks:
            with pytest.raises(ClientGone):
                await task
        assert await lanes.run(Client(), end, 10**6, lambda: ended.set() or 7) == 7  # the large lane is free again

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_deadline_holds_and_errors_are_those_of_the_work():
    async def main():
        lanes = Lanes()
        with pytest.raises(HTTPError) as caught:
            await lanes.run(Client(), time.monotonic() + 0.2, 10, encode_forever, threading.Event())
        assert caught.value.status == 504
        with pytest.raises(ZeroDivisionError):
            await lanes.run(Client(), time.monotonic() + 20, 10, lambda: 1 / 0)
        with pytest.raises(TooManyTokens):
            await lanes.run(
                Client(), time.monotonic() + 20, 10, lambda: (limit_tokens(99), LETTERS.encode("a b " * 10**5, True))
            )
        limit_tokens(3)  # outside of a lane there are no limits
        assert len(LETTERS.encode("ab" * 100, True)) == 200

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("text", ["a" * 30_000, "a b " * 3000], ids=["one word", "many words"])
def test_an_encoding_looks_up_now_and_then(text):
    work, calls = Work(), []
    token = check_progress.set(lambda count: calls.append(count))
    ids = LETTERS.encode(text, True)
    check_progress.set(work)
    assert LETTERS.encode(text, True) == ids and len(calls) > 2
    work.given_up = True
    with pytest.raises(AbortedWork):
        LETTERS.encode(text, True)
    check_progress.reset(token)


def test_a_schema_ends_with_its_client():
    work = Work()
    work.given_up = True
    token = check_progress.set(work)
    properties = {f"key{i}": {"type": "string", "maxLength": 20 + i} for i in range(100)}
    with pytest.raises(AbortedWork):
        compile_schema(Terms(), {"type": "object", "properties": properties, "additionalProperties": False})
    check_progress.reset(token)


LOOP = "{% for x in range(9999) %}"
TEMPLATES = {
    "nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "macro": "{% macro two(n) %}{% if n %}{{ two(n - 1) + two(n - 1) }}{% endif %}{% endmacro %}{{ two(60) }}",
    "recursive": "{% for x in [1] * 99 recursive %}{% if loop.depth < 30 %}{{ loop([1] * 99) }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_does_not_end_is_refused(name, monkeypatch):
    monkeypatch.setattr("formats.rendering.MOST_TURNS", 50_000)
    with pytest.raises(UserError, match="its loops and macros run more than 50,000 times"):
        RenderedTemplate(TEMPLATES[name], name).render([{"role": "user", "content": "x"}], None, True)
    work = Work()
    work.given_up = True
    token = check_progress.set(work)
    with pytest.raises(AbortedWork):
        RenderedTemplate(TEMPLATES[name], name).render([{"role": "user", "content": "x"}], None, True)
    check_progress.reset(token)
