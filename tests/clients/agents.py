"""The requests of coding agents, as they send them, over plain HTTP: Responses as Codex has them, Messages as Claude
Code has them, chat completions as Cline and Qwen Code have them; all streamed, with tools, for two turns."""

import json
import urllib.request

from common import ANSWER, QUESTION, WEATHER, base_url, held, run_tool

SHELL = {
    "name": "shell",
    "description": "Runs a command.",
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}},
            "workdir": {"type": "string"},
            "timeout_ms": {"type": "number"},
        },
        "required": ["command"],
        "additionalProperties": False,
    },
}
FUNCTIONS = [SHELL, WEATHER]


def post(path, body, headers=()):
    """The events of a stream: [(event name or None, object), …]."""
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **dict(headers)}
    request = urllib.request.Request(base_url() + path, data, headers)
    try:
        text = urllib.request.urlopen(request, timeout=60).read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None
    events = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "data" in lines and lines["data"] != "[DONE]":
            events.append((lines.get("event"), json.loads(lines["data"])))
    return events


def model():
    with urllib.request.urlopen(base_url() + "/v1/models", timeout=60) as reply:
        return json.load(reply)["data"][0]["id"]


def codex():
    """store false: everything is sent again at every turn, reasoning with it."""

    def text(role, kind, words):
        return {"type": "message", "role": role, "content": [{"type": kind, "text": words}]}

    body = {
        "model": model(),
        "instructions": "You are a coding agent running in a terminal.",
        "input": [
            text("developer", "input_text", "<permissions>read-only</permissions>"),
            text("user", "input_text", "<environment_context><cwd>/src</cwd></environment_context>"),
            text("user", "input_text", QUESTION),
        ],
        "tools": [{"type": "function", **function, "strict": False} for function in FUNCTIONS],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199d0c5-7d0a-7c10-b6a1-000000000000",
        "text": {"verbosity": "medium"},
    }
    for _ in range(2):
        events = post("/v1/responses", body)
        assert all(name == event["type"] for name, event in events)
        items = [event["item"] for _, event in events if event["type"] == "response.output_item.done"]
        last = events[-1][1]
        assert last["type"] == "response.completed" and last["response"]["usage"]["total_tokens"] > 0, last
        assert [item["id"] for item in last["response"]["output"]] == [item["id"] for item in items]
        calls = [item for item in items if item["type"] == "function_call"]
        body["input"] += items
        if not calls:
            break
        for call in calls:
            output = run_tool(call["name"], call["arguments"])
            body["input"].append({"type": "function_call_output", "call_id": call["call_id"], "output": output})
    (message,) = [item for item in items if item["type"] == "message"]
    assert message["content"][0]["text"] == ANSWER
    held("Responses as Codex sends them")


def claude_code():
    cached = {"type": "ephemeral"}
    body = {
        "model": model(),
        "max_tokens": 500,
        "system": [
            {"type": "text", "text": "You are a coding agent.", "cache_control": cached},
            {"type": "text", "text": "Be brief.", "cache_control": cached},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>The date is today.</system-reminder>"},
                    {"type": "text", "text": QUESTION, "cache_control": cached},
                ],
            },
        ],
        "tools": [
            {
                "name": f["name"],
                "description": f["description"],
                "input_schema": f["parameters"] | {"$schema": "http://json-schema.org/draft-07/schema#"},
            }
            for f in FUNCTIONS
        ],
        "metadata": {"user_id": "user_0_account__session_0"},
        "thinking": {"type": "enabled", "budget_tokens": 400},
        "stream": True,
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14", "x-api-key": "-"}
    for _ in range(2):
        blocks, reason = {}, None
        for name, event in post("/v1/messages?beta=true", body, headers):
            assert name == event["type"]
            if name == "content_block_start":
                blocks[event["index"]] = event["content_block"] | {"json": ""}
            if name == "content_block_delta":
                block, delta = blocks[event["index"]], event["delta"]
                if delta["type"] == "input_json_delta":
                    block["json"] += delta["partial_json"]
                elif delta["type"] == "signature_delta":
                    block["signature"] = delta["signature"]
                else:
                    kind = delta["type"].removesuffix("_delta")
                    block[kind] += delta[kind]
            if name == "message_delta":
                reason = event["delta"]["stop_reason"]
        content = []
        for _, block in sorted(blocks.items()):
            arguments = block.pop("json")
            content.append(block | ({"input": json.loads(arguments or "{}")} if block["type"] == "tool_use" else {}))
        body["messages"].append({"role": "assistant", "content": content})
        if reason != "tool_use":
            break
        results = [
            {
                "type": "tool_result",
                "tool_use_id": block["id"],
                "content": run_tool(block["name"], block["input"]),
                "is_error": False,
                "cache_control": cached,
            }
            for block in content
            if block["type"] == "tool_use"
        ]
        body["messages"].append({"role": "user", "content": results})
    assert [block["text"] for block in content if block["type"] == "text"] == [ANSWER] and reason == "end_turn"
    counted = {key: body[key] for key in ("model", "messages", "tools", "system")}
    request = urllib.request.Request(
        base_url() + "/v1/messages/count_tokens?beta=true",
        json.dumps(counted).encode(),
        {"Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert json.load(reply)["input_tokens"] > 100
    held("Messages as Claude Code sends them")


def cline():
    messages = [
        {"role": "system", "content": "You are a coding agent."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "text", "text": "<env>/src</env>"}]},
    ]
    body = {
        "model": model(),
        "messages": messages,
        "temperature": 0,
        "stream": True,
        "max_completion_tokens": 500,
        "stream_options": {"include_usage": True},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "tools": [{"type": "function", "function": function} for function in FUNCTIONS],
    }
    for _ in range(2):
        content, calls, reason = "", {}, None
        for _, chunk in post("/v1/chat/completions", body):
            for choice in chunk["choices"]:
                content += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
                for part in choice["delta"].get("tool_calls") or ():
                    call = calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
                    call["id"] += part.get("id") or ""
                    call["name"] += part["function"].get("name") or ""
                    call["arguments"] += part["function"].get("arguments") or ""
        if reason != "tool_calls":
            break
        called = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in calls.values()
        ]
        messages.append({"role": "assistant", "content": content or None, "tool_calls": called})
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": run_tool(call["name"], call["arguments"])}
            for call in calls.values()
        ]
    assert content == ANSWER and reason == "stop"
    held("chat completions as Cline sends them")


if __name__ == "__main__":
    codex(), claude_code(), cline()
