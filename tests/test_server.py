"""serving/server.py: who may ask, what proxies and browsers send, vLLM's routes and metrics, and fairness.

The cases are those of real clients; most run on the engine without a model of test_openai_api.py.
"""

import asyncio
import base64
import gzip
import json
import re
import socket
import time

import numpy as np
import paddle
import pytest
from conftest import ROOT
from test_openai_api import (  # noqa: F401, fixtures
    SAY,
    TEXTS,
    ByteTokenizer,
    FakeEngine,
    browser,
    eventually,
    request_bytes,
    server,
    sse,
    start,
)

import adapters
import serve
from arguments import parse_args
from formats.files import UserError
from formats.tokenizer import load_tokenizer
from serving import http_server
from serving.access import Access, is_same_origin
from serving.engine import TokenOutput
from serving.metrics import Histogram, token_bounds

DEMO = ROOT / "demo" / "llama"

# ================================================================================================ origins and keys


def origin(server, headers, method="POST"):  # noqa: F811
    """The status of a request with these headers, and the headers of the reply that browsers read."""
    body = {"prompt": "x", "max_tokens": 2} if method == "POST" else None
    status, answer, _ = server.ask(method, "/v1/completions", body, headers)
    return status, answer["Access-Control-Allow-Origin"]


PAGE = "https://chat.example"
PROXIED = [  # what a browser and a proxy send, and whether the page is the server's own
    ({"Origin": PAGE, "Host": "chat.example"}, True),  # nginx: proxy_set_header Host $http_host
    ({"Origin": f"{PAGE}:8443", "Host": "chat.example:8443"}, True),
    ({"Origin": f"{PAGE}:8443", "Host": "chat.example"}, True),  # nginx: proxy_set_header Host $host
    ({"Origin": PAGE, "Host": "chat.example:443"}, True),
    ({"Origin": PAGE, "Host": "backend:8011", "X-Forwarded-Host": "chat.example"}, True),
    ({"Origin": PAGE, "Host": "backend:8011", "X-Forwarded-Host": "chat.example, inner"}, True),
    ({"Origin": PAGE, "Host": "backend:8011", "Sec-Fetch-Site": "same-origin"}, True),  # nginx: a plain proxy_pass
    ({"Origin": PAGE, "Host": "backend:8011"}, False),
    ({"Origin": PAGE, "Host": "backend:8011", "Sec-Fetch-Site": "cross-site"}, False),
    ({"Origin": PAGE, "Host": "chat.example:8011"}, False),
    ({"Origin": PAGE, "Host": "backend", "X-Forwarded-Host": "evil.example, chat.example"}, False),
    ({"Origin": "null", "Host": "chat.example"}, False),
    ({"Origin": "https://", "Host": ""}, False),
    ({"Origin": "https://chat.example:port", "Host": "chat.example"}, False),
]


@pytest.mark.parametrize("headers, is_own", PROXIED, ids=str)
def test_pages_behind_proxies(server, headers, is_own):  # noqa: F811
    expected = (200, headers["Origin"]) if is_own else (403, None)
    assert origin(server, headers) == expected


def test_origins_that_are_allowed_and_proxies_that_are_not_trusted(start):  # noqa: F811
    mine = start(allowed_origins="http://localhost:3000, https://Chat.example/", trusted_proxies=None, api_key="k")
    key = {"Authorization": "Bearer k"}
    for page in ("http://localhost:3000", "https://chat.example", "https://CHAT.example"):
        assert origin(mine, {"Origin": page} | key) == (200, page)
    for page in ("http://localhost:3001", "https://chat.example.evil", "null"):
        assert origin(mine, {"Origin": page} | key) == (403, None)
    forwarded = {"Origin": "https://other.example", "X-Forwarded-Host": "other.example"}
    assert origin(mine, forwarded | key) == (403, None)  # nobody is trusted
    preflight = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    status, headers, _ = mine.ask("OPTIONS", "/v1/completions", None, preflight)
    assert status == 204 and headers["Access-Control-Allow-Origin"] == "http://localhost:3000"  # it carries no key
    assert headers["Access-Control-Allow-Headers"] == "authorization,content-type,x-stainless-os"
    assert headers["Access-Control-Allow-Methods"] == "POST, OPTIONS" and headers["Vary"] == "Origin"
    assert headers["Access-Control-Allow-Private-Network"] == "true" and headers["Content-Length"] is None
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert mine.ask("OPTIONS", "/v1/completions", None, preflight)[0] == 403
    page = {"Origin": "http://localhost:3000"}  # it may read refusals, too
    for status, request_headers in ((401, page), (400, page | key)):
        got, headers, _ = mine.post("/v1/completions", {"prompt": 5}, request_headers)
        assert got == status and headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    text = mine.post("/v1/completions", {"prompt": "x", "stream": True}, page | key)
    assert text[1]["Access-Control-Allow-Origin"] == "http://localhost:3000" and sse(text[2])


def test_all_origins(start):  # noqa: F811
    assert origin(start(allowed_origins=["*"]), {"Origin": "null"}) == (200, "null")


@pytest.mark.parametrize(
    "given, match",
    [
        ({"api_key": ""}, "api_key: it must be printable ASCII that is not empty"),
        ({"api_key": " "}, "api_key"),
        ({"api_key": "é"}, "api_key"),
        ({"allowed_origins": "localhost:3000"}, "allowed_origins: 'localhost:3000'; an origin is like"),
        ({"allowed_origins": "http://a/b"}, "allowed_origins"),
        ({"trusted_proxies": "nginx"}, "trusted_proxies: 'nginx'; an address or a network"),
        ({"trusted_proxies": "10.0.0.1/8"}, "trusted_proxies"),
    ],
    ids=str,
)
def test_arguments_of_access(given, match):
    with pytest.raises(UserError, match=match):
        Access(**given)
    with pytest.raises(UserError, match=match):
        parse_args(serve.Args, [str(DEMO), *(part for key, value in given.items() for part in (f"--{key}={value}",))])


def test_trusted_networks():
    access = Access(trusted_proxies="10.0.0.0/8, ::1")
    assert all(map(access.is_trusted, ("10.9.9.9", "::ffff:10.1.1.1", "::1")))
    assert not any(map(access.is_trusted, ("11.0.0.1", "", "x")))
    assert Access(trusted_proxies="*").is_trusted("fe80::1") and not is_same_origin("https://a", "b")


@pytest.mark.parametrize("header", ["Authorization: bearer k", "Authorization: BEARER  k ", "X-Api-Key: k"])
def test_spellings_of_the_key(start, header):  # noqa: F811
    name, _, value = header.partition(": ")
    mine = start(api_key="k")
    assert mine.ask("GET", "/v1/models", None, {name: value})[0] == 200
    wrong = {name: value.replace("k", "x")}
    assert mine.ask("GET", "/v1/models", None, wrong)[0] == 401
    status, _, reply = mine.post("/v1/messages", {}, wrong)  # Anthropic's error
    assert (status, reply["type"], reply["error"]["type"]) == (401, "error", "authentication_error")


# =========================================================================================== what clients send


def test_names_of_the_model(start):  # noqa: F811
    mine = start(served_model_name="main, org/alias")
    rows = mine.ask("GET", "/v1/models")[2]["data"]
    assert [(row["id"], row["parent"]) for row in rows] == [("main", None), ("org/alias", None), ("poet", "main")]
    for path in ("/v1/models/org/alias", "/v1//models/org/alias/", "/v1/models/org%2Falias"):
        assert mine.ask("GET", path)[2]["id"] == "org/alias"
    for name in ("main", "org/alias", "poet"):
        status, _, reply = mine.chat(model=name)
        said = "poet" if name == "poet" else "base"
        assert (status, reply["model"]) == (200, name) and reply["choices"][0]["message"]["content"].startswith(said)
    assert mine.chat()[2]["model"] == "main" and mine.chat(model="base")[0] == 404


def test_an_adapter_named_like_the_model_is_refused(tmp_path):
    (tmp_path / "llama").mkdir()
    for names in ((), ("--served_model_name", "x,poet")):
        adapter = f"{'poet' if names else 'llama'}={tmp_path / 'llama'}"
        with pytest.raises(UserError, match="is the model's name; give the adapter another"):
            parse_args(serve.Args, [str(DEMO), "--lora_path", adapter, *names])


@pytest.mark.parametrize("change", ["bom", "gzip", "gzip bom", "charset", "slash", "slashes"])
def test_bodies_and_paths_as_clients_write_them(server, change):  # noqa: F811
    body, headers, path = json.dumps({"prompt": "x"}).encode(), {}, "/v1/completions"
    body = b"\xef\xbb\xbf" + body if "bom" in change else body
    if "gzip" in change:
        body, headers = gzip.compress(body), {"Content-Encoding": "gzip"}
    headers |= {"Content-Type": "application/json; charset=utf-8"} if change == "charset" else {}
    path = {"slash": path + "/", "slashes": "//v1//completions"}.get(change, path)
    assert server.post(path, body, headers)[0] == 200


@pytest.mark.parametrize("path, status", [("/nothing", 404), ("/v1/completions", 405), ("/v1/models/x", 404)])
def test_a_head_has_no_body_whatever_the_status(server, path, status):  # noqa: F811
    out = server.raw(f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert out.startswith(f"HTTP/1.1 {status} ".encode()) and out.endswith(b"\r\n\r\n") and b"Content-Length" in out


def test_routes_of_vllm(server):  # noqa: F811
    assert server.ask("GET", "/version")[2].keys() == {"version"}
    assert server.ask("GET", "/ping")[0] == server.post("/ping", b"")[0] == 200
    reply = server.post("/tokenize", {"prompt": "hé", "return_token_strs": True})[2]
    assert reply == {
        "count": 3,
        "max_model_len": 2048,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    reply = server.post("/tokenize", chat)[2]
    assert server.post("/tokenize", {"prompt": "x", "add_special_tokens": False})[0] == 200
    assert bytes(reply["tokens"]) == b"user: hi\nassistant: " and reply["token_strs"] is None
    assert reply["count"] == server.post("/v1/chat/completions", chat)[2]["usage"]["prompt_tokens"]
    assert server.post("/detokenize", {"tokens": reply["tokens"]})[2] == {"prompt": "user: hi\nassistant: "}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "none"}, "model"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": [[1], 5]}, "input"),
        ("/v1/embeddings", {"input": "x" * 3000}, "input"),
        ("/v1/embeddings", {"input": "x", "dimensions": 8}, "dimensions"),
        ("/v1/embeddings", {"input": "x", "normalize": False}, "normalize"),
        ("/v1/embeddings", {"input": "x", "add_special_tokens": False}, "add_special_tokens"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ):
        status, _, reply = server.post(path, body)
        assert status in (400, 404) and reply["error"]["param"] == param, (path, body, reply)
    assert server.post("/tokenize", {"prompt": "\ud83d"})[0] == 400
    status, _, reply = server.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/"})
    assert status == 403 and "--allow_runtime_lora" in reply["error"]["message"]


# ================================================================================================= metrics

BOARD = """vllm:e2e_request_latency_seconds_bucket vllm:e2e_request_latency_seconds_sum
vllm:e2e_request_latency_seconds_count vllm:prompt_tokens_total vllm:generation_tokens_total
vllm:time_per_output_token_seconds_bucket vllm:inter_token_latency_seconds_bucket vllm:num_requests_running
vllm:num_requests_waiting vllm:time_to_first_token_seconds_bucket vllm:kv_cache_usage_perc vllm:gpu_cache_usage_perc
vllm:request_prompt_tokens_bucket vllm:request_generation_tokens_bucket vllm:request_success_total
vllm:request_queue_time_seconds_sum vllm:request_prefill_time_seconds_sum vllm:request_decode_time_seconds_sum
vllm:request_max_num_generation_tokens_sum""".split()  # what the queries of vLLM's Grafana board ask for


def samples(text):
    """Prometheus text -> {name: [(labels, value), …]}; asserts that every family has HELP and TYPE before it."""
    found, families = {}, {}
    for line in text.splitlines():
        if line.startswith("#"):
            _, what, name, rest = line.split(" ", 3)
            families.setdefault(name, []).append(what)
            continue
        name, labels, value = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line).groups()
        family = next(f for f in (name, re.sub("_(bucket|sum|count)$", "", name)) if f in families)
        assert families[family] == ["HELP", "TYPE"]
        found.setdefault(name, []).append((dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")), float(value)))
    return found


def test_metrics_under_vllms_names(start):  # noqa: F811
    mine = start(served_model_name='my "model"')
    mine.chat("x", n=2, max_tokens=5)
    mine.chat("x", stream=True)
    found = samples(mine.ask("GET", "/metrics")[2])
    for name in BOARD:
        assert name in found and all(labels["model_name"] == r"my \"model\"" for labels, _ in found[name]), name
    ended = {labels["finished_reason"]: value for labels, value in found["vllm:request_success_total"]}
    assert ended == {"stop": 1, "length": 2, "abort": 0, "error": 0}
    value = lambda name: found[name][0][1]
    assert value("vllm:generation_tokens_total") == value("vllm:request_generation_tokens_sum") == 10 + 61
    assert value("vllm:inter_token_latency_seconds_count") == 10 + 61 - 3
    assert value("vllm:request_max_num_generation_tokens_sum") == 5 + 61 and value("vllm:request_params_n_sum") == 3
    assert value("vllm:e2e_request_latency_seconds_count") == value("llm_request_seconds_count") == 2
    buckets = [(float(labels["le"]), value) for labels, value in found["vllm:time_to_first_token_seconds_bucket"]]
    assert buckets == sorted(buckets) and buckets[-1] == (float("inf"), 2)


def test_histogram_bounds():
    assert token_bounds(2048) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) and token_bounds(9) == (1, 2, 5)
    histogram = Histogram("x", (1, 2))
    for value in (0.5, 1, 1.5, 9):
        histogram.add(value)
    lines = 'h_bucket{le="1"} 2', 'h_bucket{le="2"} 3', 'h_bucket{le="+Inf"} 4', "h_sum 12.000000", "h_count 4"
    assert tuple(histogram.lines("h"))[2:] == lines


# ================================================================================================ fairness


class SlowTokenizer(ByteTokenizer):
    """Takes a second for each 10,000 bytes, and looks up as formats/bpe.py does."""

    def __init__(self):
        self.encoded, self.running = 0, 0

    def fewest_tokens(self, text):
        return len(text) // 1000

    def encode(self, text, add_special_tokens=True):
        from formats.progress import check_progress

        self.running += 1
        try:
            for _ in range(len(text) // 100):
                check_progress.get()(0)
                time.sleep(0.01)
        finally:
            self.running -= 1
        self.encoded += 1
        return list(text[:100].encode())


def test_large_prompts_do_not_hold_up_small_ones(start):  # noqa: F811
    tokenizer = SlowTokenizer()
    mine = start(tokenizer=tokenizer)
    large = request_bytes({"prompt": "x" * 90_000})
    socks = [socket.create_connection(("127.0.0.1", mine.port)) for _ in range(6)]
    for sock in socks:
        sock.sendall(large)
    assert eventually(lambda: tokenizer.running == 1)
    begin = time.monotonic()
    assert mine.post("/v1/completions", {"prompt": "small"})[0] == 200 and time.monotonic() - begin < 1
    for sock in socks:
        sock.close()
    assert eventually(lambda: tokenizer.running == 0, 2) and tokenizer.encoded == 1  # none of the large ones


def test_tokenizing_counts_for_request_timeout(start):  # noqa: F811
    tokenizer = SlowTokenizer()
    mine = start(tokenizer=tokenizer, request_timeout=0.3)
    begin = time.monotonic()
    status, _, reply = mine.post("/v1/completions", {"prompt": "x" * 90_000})
    assert (status, reply["error"]["code"]) == (504, "timeout") and time.monotonic() - begin < 2
    assert eventually(lambda: not tokenizer.running, 2)


def test_prompts_are_refused_by_their_length_before_they_are_tokenized(start):  # noqa: F811
    tokenizer = SlowTokenizer()
    mine = start(FakeEngine(max_model_len=50), tokenizer=tokenizer)
    for path, body, param in (
        ("/v1/completions", {"prompt": "x" * 60_000}, "prompt"),
        ("/v1/completions", {"prompt": ["y", "x" * 60_000]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 30_000}] * 2}, "messages"),
        ("/v1/embeddings", {"input": ["x" * 60_000]}, "input"),
    ):
        status, _, reply = mine.post(path, body)
        assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "context_length_exceeded", param)
        assert "at least 6" in reply["error"]["message"] or "at least 5" in reply["error"]["message"]
    assert tokenizer.encoded == 0


class CountingTokenizer(ByteTokenizer):
    """Knows that a text is too long only while it is encoded, as byte pairs do."""

    def fewest_tokens(self, text):
        return 0

    def encode(self, text, add_special_tokens=True):
        from formats.progress import check_progress

        check_progress.get()(len(text))
        return super().encode(text)


def test_prompts_are_refused_while_they_are_tokenized(start):  # noqa: F811
    mine = start(tokenizer=CountingTokenizer())
    for path, body, param in (
        ("/v1/completions", {"prompt": "x" * 3000}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
        ("/v1/embeddings", {"input": "x" * 3000}, "input"),
    ):
        status, _, reply = mine.post(path, body)
        assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "context_length_exceeded", param)
        assert "more than 2048 tokens" in reply["error"]["message"]
    assert mine.post("/tokenize", {"prompt": "x" * 3000})[2]["count"] == 3000  # which may be longer


@pytest.mark.parametrize("text", ["x" * 100_000, "x y " * 25_000, "你好" * 30_000, " " * 100_000, "a\u0301" * 50_000])
def test_the_fewest_tokens_are_no_more_than_there_are(text):
    for folder in (DEMO,):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.fewest_tokens("x" * 100_000) > 1000


def test_others_have_their_turn_while_a_large_reply_is_written(start, monkeypatch):  # noqa: F811
    """n=128, 20 logprobs: its reply has 10 MB. No clock and no second client, whose turn a busy machine may delay: the
    turns of the server's loop are counted from the reply's first piece to its last."""
    mine = start(FakeEngine(delay=0.0, max_model_len=300), write_timeout=60.0)
    engine, turns = mine.engine, []

    def step(job, top=[(i, -1.0) for i in range(20)]):  # noqa: B006
        params, tell = job.request.params, job.tell
        for index in range(params.n):
            for token in range(40):
                output = TokenOutput(index, 97, "a", -0.5, top, finish_reason="length" if token == 39 else None)
                tell(output)
        engine.live.pop(job.request.request_id, None)

    json_pieces = http_server.json_pieces

    def counted_pieces(value, *depth):
        if depth:  # of its parts the function calls itself
            yield from json_pieces(value, *depth)
            return
        loop, counted = asyncio.get_running_loop(), [0]

        def turn():
            counted[0] += 1
            handle[0] = loop.call_soon(turn)

        handle = [loop.call_soon(turn)]
        yield from json_pieces(value)
        handle[0].cancel()
        turns.append(counted[0])

    engine._step = step
    monkeypatch.setattr(http_server, "json_pieces", counted_pieces)
    body = {"messages": [{"role": "user", "content": "x"}], "n": 128, "logprobs": True, "top_logprobs": 20}
    connection = mine.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    text = connection.getresponse().read()
    assert len(json.loads(text)["choices"]) == 128 and len(text) > 5_000_000
    assert len(turns) == 1 and turns[0] >= len(text) // (2 * http_server.PIECE)


# ============================================================================================ with the model


@pytest.fixture(scope="module")
def demo_server():
    """As `python serve.py demo/llama --allow_runtime_lora` starts it."""
    from test_openai_api import LIMITS, Running

    args = parse_args(serve.Args, [str(DEMO), "--allow_runtime_lora", "--num_blocks", "64"])
    engine, tokenizer = serve.build_engine(args)
    limits = {key: getattr(args, key) for key in LIMITS} | {"port": 0}
    running = Running(engine, tokenizer, **limits)
    yield running
    running.stop()


def test_a_folder_is_enough_and_every_shipped_configuration_chats(demo_server):
    """Case 1: README's road ends in a folder like demo/llama, whose tokenizer files say how it was trained."""
    assert demo_server.chat("type#dress*color#red", max_tokens=4)[0] == 200
    args = parse_args(serve.Args, [str(ROOT / "configs" / "llama_serve.json"), str(DEMO)])
    assert args.model_name_or_path == str(DEMO) and args.batch_size == 16
    assert demo_server.ask("GET", "/v1/models")[2]["data"][0]["id"] == "llama"
    found = {name: rows[0][1] for name, rows in samples(demo_server.ask("GET", "/metrics")[2]).items()}
    whole = found["vllm:request_queue_time_seconds_sum"] + found["vllm:request_inference_time_seconds_sum"]
    parts = found["vllm:request_prefill_time_seconds_sum"] + found["vllm:request_decode_time_seconds_sum"]
    assert 0 < whole <= found["vllm:e2e_request_latency_seconds_sum"] and found["vllm:request_queue_time_seconds_count"]
    assert parts == pytest.approx(found["vllm:request_inference_time_seconds_sum"], abs=1e-5)


@pytest.mark.parametrize("width, height", [(1200, 800), (375, 667)])
def test_the_page_chats_with_the_demo(demo_server, browser, tmp_path, width, height):  # noqa: F811
    browser.show(f"http://127.0.0.1:{demo_server.port}/", width, height)
    browser.screenshot(tmp_path / "empty.png")
    browser.js("document.querySelector('#max_tokens').value = 40; document.querySelector('#seed').value = '3'")
    idle = "!document.querySelector('.busy')"
    for text in ("type#dress*color#red", "Now in blue"):
        browser.js(SAY.format(json.dumps(text)))
        assert eventually(lambda: browser.js(f"{idle} && !!document.querySelector('.assistant .foot')"), 20)
    texts = browser.js(TEXTS)
    assert len(texts) == 4 and all(texts) and not browser.js("document.querySelectorAll('.error').length")
    browser.screenshot(tmp_path / "chat.png")
    browser.js("[...document.querySelectorAll('.foot button')].find(b => b.innerText === 'Regenerate').click()")
    assert eventually(lambda: browser.js(f"{idle} && {TEXTS}.length === 4"), 20)
    assert browser.js(TEXTS)[:3] == texts[:3] and browser.js("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("text", ["\ud83d", "a\udfffb"])
def test_half_a_character_is_refused_by_every_tokenizer(demo_server, text):
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": "x", "stop": [text]}),
        ("/tokenize", {"prompt": text}),
        ("/v1/embeddings", {"input": [text]}),
    ):
        status, _, reply = demo_server.post(path, body)
        assert status == 400 and "a lone surrogate is not a character" in reply["error"]["message"]
        assert reply["error"]["param"] in body


def test_embeddings(demo_server):
    tokenizer, model = load_tokenizer(DEMO), adapters.from_pretrained(DEMO)
    model.eval()
    texts = ["A red dress", "a coat"]
    ids = [tokenizer.encode(text) for text in texts]
    with paddle.no_grad():
        hidden = [model.hidden_states(paddle.to_tensor([part]))[0, -1].numpy() for part in ids]
    expected = [vector / np.linalg.norm(vector) for vector in hidden]
    for given in (texts, ids):
        status, _, reply = demo_server.post("/v1/embeddings", {"input": given, "model": "llama", "user": "me"})
        assert status == 200 and reply["object"] == "list" and reply["model"] == "llama"
        assert reply["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
        for i, row in enumerate(reply["data"]):
            assert (row["object"], row["index"]) == ("embedding", i)
            np.testing.assert_allclose(row["embedding"], expected[i], atol=2e-6)
    reply = demo_server.post("/v1/embeddings", {"input": texts[1], "encoding_format": "base64"})[2]
    found = np.frombuffer(base64.b64decode(reply["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(found, expected[1], atol=2e-6)


def test_adapters_over_http(demo_server, tmp_path):
    model = adapters.apply_lora(adapters.from_pretrained(DEMO), rank=2, alpha=4, targets=["q_proj"])
    adapters.save_adapter(model, tmp_path / "lora")
    body = {"lora_name": "red", "lora_path": str(tmp_path / "lora")}
    status, _, text = demo_server.post("/v1/load_lora_adapter", body)
    assert (status, text) == (200, "Success: LoRA adapter 'red' added successfully.")
    assert [row["id"] for row in demo_server.ask("GET", "/v1/models")[2]["data"]] == ["llama", "red"]
    assert demo_server.chat(model="red", max_tokens=3)[0] == 200
    for wrong, param in (
        (body, "lora_name"),
        (body | {"lora_name": "llama"}, "lora_name"),
        ({"lora_name": "b"}, "lora_path"),
        ({"lora_path": "b"}, "lora_name"),
        ({"lora_name": "b", "lora_path": str(tmp_path)}, "lora_path"),
    ):
        status, _, reply = demo_server.post("/v1/load_lora_adapter", wrong)
        assert (status, reply["error"]["param"]) == (400, param)
    status, _, text = demo_server.post("/v1/unload_lora_adapter", {"lora_name": "red"})
    assert (status, text) == (200, "Success: LoRA adapter 'red' removed successfully.")
    assert demo_server.post("/v1/unload_lora_adapter", {"lora_name": "red"})[0] == 404
    assert demo_server.chat(model="red")[0] == 404 and demo_server.chat(max_tokens=3)[0] == 200
