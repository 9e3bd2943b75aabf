"""Odd requests to every route: no 500, no answer that does not come, nothing left behind.

    python -m pytest tests/test_fuzz.py            # 200 requests
    python -m pytest tests/test_fuzz.py --slow     # 10,000

They are a function of the seed: REQUESTS[i] is the same in every run, so that a failure can be repeated.
"""

import gzip
import http.client
import json
import random
import time

import pytest
from conftest import ROOT
from test_openai_api import ByteTokenizer, FakeEngine, Running, eventually

from formats.tokenizer import load_tokenizer

SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "string", "pattern": "^a+$"}}},
    {"$ref": "#"},
    {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    {"type": ["string", "null"], "maxLength": 10**9},
    {"enum": []},
    {"not": {}},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "("},
    {"const": {"x": [1, None, "\ud800"]}},
    True,
    [],
    5,
]
ODD = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "\ud83d", "\0", "é" * 50,
       "x" * 3000,
       [], {}, [[]], [{}], [None], ["x"], [1], [257], [-1], [True], [1.5], ["x"] * 130, {"a": 1}, {"type": "x"},
       [{"type": "text", "text": "x"}], {"type": "function", "function": {"name": "f"}}]  # fmt: skip
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": SCHEMAS[0]}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
GOOD = {  # field: values that are meant
    "model": ["base", "poet", "none"],
    "max_tokens": [1, 5, 4000],
    "max_completion_tokens": [3],
    "temperature": [0, 1, 2],
    "top_p": [0, 1],
    "top_k": [-1, 0, 5],
    "min_p": [0, 0.1],
    "n": [1, 2, 128],
    "best_of": [1, 2],
    "seed": [1, -1],
    "stop": ["x", ["a", "b"], None],
    "stop_token_ids": [[1]],
    "presence_penalty": [1],
    "frequency_penalty": [-2],
    "repetition_penalty": [1.1],
    "logit_bias": [{}, {"5": 1}, {"x": 1}],
    "logprobs": [True, False, 0, 3],
    "top_logprobs": [0, 20],
    "prompt_logprobs": [1],
    "echo": [True],
    "suffix": ["x"],
    "min_tokens": [0, 9999],
    "ignore_eos": [True],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}, {}],
    "tools": [[], [FUNCTION], [FUNCTION] * 2],
    "tool_choice": ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}, {"type": "json_object"}]
    + [{"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}} for schema in SCHEMAS],
    "structured_outputs": [{"json": SCHEMAS[0]}, {"regex": "a+"}, {"choice": ["a", "b"]}, {"regex": "("}],
    "guided_json": SCHEMAS,
    "guided_regex": ["[0-9]+", "("],
    "guided_choice": [["a", "b"]],
    "reasoning_effort": ["low", "none"],
    "chat_template_kwargs": [{}, {"enable_thinking": False}, {"messages": 5}],
    "chat_template": ["x", "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"],
    "add_generation_prompt": [True, False],
    "continue_final_message": [True],
    "truncate_prompt_tokens": [1, 10],
    "encoding_format": ["float", "base64"],
    "dimensions": [8],
    "return_token_strs": [True],
    "add_special_tokens": [True, False],
    "tokens": [[1, 2, 3]],
    "user": ["me"],
    "lora_name": ["x", "base"],
    "lora_path": ["/", "x"],
    "instructions": ["Be brief."],
    "max_output_tokens": [5],
    "text": [{"format": {"type": "text"}}, {"format": {"type": "json_schema", "name": "s", "schema": SCHEMAS[0]}}],
    "previous_response_id": ["resp_1"],
    "store": [False],
    "system": ["Be brief.", [{"type": "text", "text": "x"}]],
    "stop_sequences": [["x"]],
    "thinking": [{"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}],
}
CONTENTS = ["hello", "", None, [{"type": "text", "text": "x"}], [{"type": "image_url", "image_url": {"url": "x"}}],
            [{"type": "tool_result", "tool_use_id": "call_1", "content": "x"}], "\ud83d", "<|im_end|>", 5]  # fmt: skip
ROLES = ["system", "developer", "user", "user", "user", "assistant", "tool", "function", "robot", None, 5]
PATHS = ["/v1/chat/completions"] * 20 + ["/v1/completions"] * 10 + [
    "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models", "/v1/models/poet", "/health", "/ping", "/version",
    "/metrics", "/", "/v1", "//v1//completions/", "/v1/models/%ff%00", "/%"]  # fmt: skip
METHODS = ["POST"] * 60 + ["GET", "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"]


def odd_value(draw, depth=0):
    value = draw.choice(ODD)
    if depth < 4 and draw.random() < 0.2:
        value = [odd_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    elif depth < 4 and draw.random() < 0.2:
        value = {draw.choice(["type", "role", "content", "name", "a", ""]): odd_value(draw, depth + 1)}
    return value


def messages(draw):
    if draw.random() < 0.1:
        return odd_value(draw)
    rows = []
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 5))):
        row = {"role": draw.choice(ROLES), "content": draw.choice(CONTENTS)}
        if draw.random() < 0.2:
            row["tool_calls"] = draw.choice(([CALL], [], odd_value(draw)))
        if row["role"] == "tool" and draw.random() < 0.8:
            row["tool_call_id"] = draw.choice(("call_1", "other", 5))
        if draw.random() < 0.05:
            row[draw.choice(("name", "role", "content", "x", "reasoning_content"))] = odd_value(draw)
        rows.append(odd_value(draw) if draw.random() < 0.05 else row)
    return rows


def request(seed):
    """(method, path, body bytes, headers) of a seed."""
    draw = random.Random(seed)
    path = draw.choice(PATHS)
    body = {
        "messages": messages(draw),
        "prompt": draw.choice(["abc", ["a", "b"], [1, 2], [[1], [2]], odd_value(draw)]),
        "input": draw.choice(["abc", ["a"], [1, 2], [{"role": "user", "content": "x"}], odd_value(draw)]),
    }
    if draw.random() < 0.8:
        del body["prompt" if "chat" in path or "message" in path else "messages"]
    for name in draw.sample(sorted(GOOD), draw.choice((0, 1, 2, 3, 5, 9))):
        body[name] = odd_value(draw) if draw.random() < 0.3 else draw.choice(GOOD[name])
    if draw.random() < 0.05:
        body[draw.choice(["", "x", "Model", "max_token"])] = odd_value(draw)
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    if draw.random() < 0.15:  # the text of it, damaged
        data = bytearray(data)
        for _ in range(draw.choice((1, 1, 3))):
            at = draw.randrange(len(data))
            data[at : at + draw.randrange(3)] = draw.choice(
                (b"", b'"', b"{", b"]", b"\\", b"\xff", b"1e9", b"null", b"\0")
            )
        data = bytes(data)
    if draw.random() < 0.05:
        data, headers["Content-Encoding"] = gzip.compress(data), draw.choice(("gzip", "gzip", "deflate", "br", ""))
    if draw.random() < 0.1:
        headers |= draw.choice(
            [
                {"Origin": "http://x"},
                {"Origin": "null", "Access-Control-Request-Method": "POST"},
                {"Authorization": "Basic \xff"},
                {"X-Forwarded-Host": ",", "Origin": "http://[::1"},
                {"Accept": "x/y"},
                {"Content-Type": "text/plain; charset=utf-16"},
                {"anthropic-version": "2023-06-01", "x-api-key": ""},
            ]
        )
    return draw.choice(METHODS), path, data, headers


def fuzz(server, seeds):
    """What went wrong: [(seed, what), …], and how often each status came."""
    wrong, statuses, connection = [], {}, None
    for seed in seeds:
        method, path, data, headers = request(seed)
        begin = time.monotonic()
        connection = connection or http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            text = response.read()
            status = response.status
            if response.will_close:
                connection = None
            if status >= 500 and status != 501 or time.monotonic() - begin > 10:
                wrong.append((seed, status, text[:300]))
            elif status >= 400 and method != "HEAD" and not json.loads(text)["error"]["message"]:
                wrong.append((seed, status, "no message"))
            statuses[status] = statuses.get(status, 0) + 1
        except (OSError, http.client.HTTPException) as error:  # refused before the body was read
            connection = None
            statuses[type(error).__name__] = statuses.get(type(error).__name__, 0) + 1
    return wrong, statuses


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_odd_requests(kind, count, capfd):
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(ROOT / "demo" / "llama")
    server = Running(FakeEngine(delay=0.0, max_queue=10_000), tokenizer, request_timeout=15.0, allow_runtime_lora=True)
    first = 0 if kind == "bytes" else 10**6
    try:
        wrong, statuses = fuzz(server, range(first, first + count))
        print(statuses)
        assert not wrong, wrong[:5]
        assert statuses[200] > count / 20 and statuses[400] > count / 20
        assert sum(n for status, n in statuses.items() if isinstance(status, str)) < count / 20, statuses
        assert eventually(lambda: not server.engine.live and not server.server.running, 10)
        assert "Traceback" not in capfd.readouterr().err
        assert server.chat()[0] == 200
    finally:
        server.stop()
