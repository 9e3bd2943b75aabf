"""Many clients at once on the demo model: chats, tools, schemas, embeddings, adapters that come and go, clients that
leave. Every answer is checked, nothing stays behind, and the memory is flat.

    python -m pytest tests/test_load.py -s                          # 8 clients for two seconds
    python -m pytest tests/test_load.py -s --slow                   # and 64 clients for two minutes
"""

import json
import threading
import time

import numpy as np
import pytest
from conftest import ROOT
from test_openai_api import LIMITS, Running, eventually, request_bytes, resident, sse

import adapters
import serve
from arguments import parse_args
from model import set_parameter

DEMO = ROOT / "demo" / "llama"
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["color", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "show", "parameters": SCHEMA}}
PROMPT = "type#dress*color#red"


def make_lora(folder, seed):
    """A LoRA of the demo model that changes its replies."""
    model = adapters.apply_lora(adapters.from_pretrained(DEMO), rank=2, alpha=8, targets=["q_proj", "up_proj"])
    for i, layer in enumerate(adapters.lora_layers(model).values()):
        values = np.random.default_rng([seed, i]).standard_normal(layer.lora_B.shape) * 0.2
        set_parameter(layer.lora_B, values.astype(np.float32))
    adapters.save_adapter(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    first, extra = make_lora(folder / "first", 1), make_lora(folder / "extra", 2)
    options = ["--chat_template", "qwen2.5", "--allow_runtime_lora", "--kv_cache_gb", "0.2", "--max_queue", "1000"]
    args = parse_args(serve.Args, [str(DEMO), "--lora_path", f"first={first}", *options])
    engine, tokenizer = serve.build_engine(args)
    running = Running(engine, tokenizer, **{key: getattr(args, key) for key in LIMITS} | {"port": 0})
    running.extra = extra
    yield running
    running.stop()


def ask(server, path, **body):
    status, _, reply = server.post(path, body)
    assert status == 200, (path, status, reply)
    return reply


def message_of(reply):
    (choice,) = reply["choices"]
    return choice["message"], choice["finish_reason"]


def user(text):
    return [{"role": "user", "content": text}]


def check_color(text):
    value = json.loads(text)
    assert value["color"] in ("red", "blue") and 0 <= value["count"] <= 99 and len(value) == 2, text


CHAT = "/v1/chat/completions"


def stream_chat(server, draw):
    status, _, text = server.post(CHAT, {"messages": user(PROMPT), "max_tokens": 12, "stream": True, "seed": draw})
    rows = sse(text)
    assert status == 200 and rows[-1]["choices"][0]["finish_reason"] in ("stop", "length"), text


def adapter_chat(server, draw):
    """Greedy replies do not depend on what else runs."""
    name = ("llama", "first")[draw % 2]
    reply = ask(server, CHAT, model=name, messages=user(PROMPT), max_tokens=8, temperature=0)
    text = message_of(reply)[0]["content"]
    assert server.greedy.setdefault(name, text) == text


def leave(server, draw):
    sock = server.open_stream(max_tokens=60, model=("llama", "first")[draw % 2])
    if draw % 3:
        sock.recv(300)
    sock.close()


def leave_while_it_is_read(server, draw):
    sock = server.open_stream()
    sock.sendall(request_bytes({"prompt": "word " * 100_000}))
    sock.close()


def schema(server, draw):
    form = {"type": "json_schema", "json_schema": {"name": "show", "schema": SCHEMA, "strict": True}}
    message, reason = message_of(ask(server, CHAT, messages=user(PROMPT), response_format=form, max_tokens=40))
    assert reason == "length" or check_color(message["content"]) is None


def new_schema(server, draw):
    """One that no other request has: caches must not grow without end."""
    value = {"type": "object", "properties": {f"key{draw}": {"type": "boolean"}}, "required": [f"key{draw}"]}
    form = {"type": "json_schema", "json_schema": {"name": "show", "schema": value | {"additionalProperties": False}}}
    message, reason = message_of(ask(server, CHAT, messages=user(PROMPT), response_format=form, max_tokens=40))
    assert reason == "length" or isinstance(json.loads(message["content"])[f"key{draw}"], bool)


def tools(server, draw):
    reply = ask(server, CHAT, messages=user(PROMPT), tools=[TOOL], tool_choice="required", max_tokens=60)
    message, reason = message_of(reply)
    if reason == "tool_calls":
        assert message["tool_calls"][0]["function"]["name"] == "show"
        check_color(message["tool_calls"][0]["function"]["arguments"])


def choice(server, draw):
    reply = ask(server, CHAT, messages=user(PROMPT), structured_outputs={"choice": ["red", "blue"]}, max_tokens=20)
    assert message_of(reply)[0]["content"] in ("red", "blue")


def embeddings(server, draw):
    rows = ask(server, "/v1/embeddings", input=[PROMPT, "a coat"])["data"]
    assert [abs(np.linalg.norm(row["embedding"]) - 1) < 1e-3 for row in rows] == [True, True]


def agents(server, draw):
    ask(server, "/v1/responses", input=PROMPT, max_output_tokens=8)
    ask(server, "/v1/messages", messages=user(PROMPT), max_tokens=8)
    assert ask(server, "/tokenize", messages=user(PROMPT))["count"] > 5


def refused(server, draw):
    assert server.chat("x " * 5000)[2]["error"]["code"] == "context_length_exceeded"
    assert server.chat("x", model="none")[0] == 404 and server.chat("x", temperature="hot")[0] == 400


JOBS = [stream_chat, adapter_chat, leave, schema, tools, choice, embeddings, agents, leave_while_it_is_read, refused]
JOBS += [stream_chat, adapter_chat, leave, schema, new_schema]


def run_clients(server, seconds, clients):
    """Failures, and how often each job was done."""
    end, wrong, done = time.monotonic() + seconds, [], dict.fromkeys((job.__name__ for job in JOBS), 0)

    def client(i):
        k = 0
        while time.monotonic() < end:
            job = JOBS[(7 * i + k) % len(JOBS)]
            k += 1
            try:
                job(server, 100_000 * i + k)
                done[job.__name__] += 1
            except Exception as error:
                wrong.append((job.__name__, repr(error)[:500]))

    def change_adapters():
        while time.monotonic() < end:
            try:
                for route, name in (("load", "extra"), ("unload", "extra")):
                    body = {"lora_name": name, "lora_path": server.extra}
                    while (status := server.post(f"/v1/{route}_lora_adapter", body)[0]) == 400:
                        time.sleep(0.05)  # the replies of the one before are not finished
                    assert status == 200
                    if route == "load":
                        ask(server, CHAT, model=name, messages=user(PROMPT), max_tokens=4)
            except Exception as error:
                wrong.append(("change_adapters", repr(error)[:500]))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    threads.append(threading.Thread(target=change_adapters))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong, done


@pytest.mark.parametrize("clients, seconds", [(8, 1.5), pytest.param(64, 120, marks=pytest.mark.slow)])
def test_clients_of_every_kind(loaded, clients, seconds):
    loaded.greedy = {}
    wrong, _ = run_clients(loaded, seconds / 5, clients)  # until caches have their size
    before = resident()
    again, done = run_clients(loaded, seconds, clients)
    assert wrong + again == [], (wrong + again)[:5]
    grown = resident() - before
    print(f"{sum(done.values())} answers to {clients} clients in {seconds} s, {grown:+.1f} MiB: {done}")
    engine = loaded.engine
    assert eventually(lambda: not engine.live and not loaded.server.http.connections, 20)
    assert not loaded.server.running and len(engine.pool.free) == engine.pool.num_blocks
    assert engine.adapters == ["first"] and grown < 30
    assert len(loaded.greedy) == 2 and loaded.greedy["llama"] != loaded.greedy["first"]
    if seconds > 60:
        assert min(done.values()) > 0
