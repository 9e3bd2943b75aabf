"""Tools, thoughts, Responses and Messages over HTTP, and with the official clients where they are installed.

    python -m pytest tests/test_agent_api.py                                       # plain HTTP, and openai's client
    python -m pytest tests/test_agent_api.py --client-python /path/to/bin/python   # and four more clients

The engine's replies are scripts: what is tested is how they are read and sent.
"""

import json
from types import SimpleNamespace

import pytest
from test_openai_api import ByteTokenizer, FakeEngine, Running

from formats.chat_formats import FORMATS
from formats.messages import parse_messages

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SCRIPTS = {
    "weather": f"Let me look.\n{CALL}",
    "think": "<think>\nhm, 2 and 2\n</think>\n\nIt is 4.",
    "both": f"<think>\nhm\n</think>\n\n{CALL}\n{CALL.replace('Oslo', 'Bergen')}",
    "long": CALL.replace("Oslo", "Llanfairpwllgwyngyll " * 9),
    "hello": "Good day.",
}
TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CHAT_TOOLS = [{"type": "function", "function": TOOL}]
CLAUDE_TOOLS = [{"name": "weather", "description": "The weather.", "input_schema": TOOL["parameters"]}]


class ToolTokenizer(ByteTokenizer):
    """A token a byte; the template shows tools and calls as Hermes does."""

    chat_template = SimpleNamespace(source=FORMATS["qwen2.5"].jinja())

    def apply_chat(self, messages, add_generation_prompt=True, tools=None, template_kwargs=None):
        parse_messages(messages, tools)
        lines = [f"tools: {json.dumps(tools)}"] if tools else []
        lines += [f"kwargs: {json.dumps(template_kwargs)}"] if template_kwargs else []
        for message in messages:
            lines.append(f"{message['role']}: {message['content']}{json.dumps(message.get('tool_calls', ''))}")
        return self.encode("\n".join(lines) + "\nassistant: ")


class ScriptEngine(FakeEngine):
    """Replies with the script that the last message names; without one, with the prompt."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def reply(self, request, index):
        prompt = ByteTokenizer().decode(request.prompt_ids)
        if request.request_id not in self.asked:
            self.asked.append(request.request_id)
            self.prompt, self.params = prompt, request.params
        last = prompt.rsplit("\n", 2)[-2]
        text = next((text for name, text in SCRIPTS.items() if name in last), "You said: " + last).encode()
        limit = request.params.max_tokens
        return (text, "stop") if len(text) < limit else (text[:limit], "length")


@pytest.fixture(scope="module")
def server():
    running = Running(ScriptEngine(), ToolTokenizer())
    yield running
    running.stop()


def post(server, path, **body):
    status, _, reply = server.ask("POST", path, body)
    assert status == 200, reply
    return reply


def events(server, path, **body):
    """The events of a stream: (name, object)."""
    status, _, text = server.ask("POST", path, body | {"stream": True})
    assert status == 200, text
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if lines.get("data") not in (None, "[DONE]"):
            found.append((lines.get("event"), json.loads(lines["data"])))
    return found


def user(text):
    return [{"role": "user", "content": text}]


# =================================================================================================== chat completions


def test_a_chat_calls_tools(server):
    reply = post(server, "/v1/chat/completions", messages=user("weather"), tools=CHAT_TOOLS)
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me look."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"] and set(call) == {"type", "function", "id"}
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert '"name": "weather"' in server.engine.prompt and not server.engine.params.skip_special_tokens
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    messages = [*user("weather"), {**choice["message"], "content": None}, result]
    reply = post(server, "/v1/chat/completions", messages=messages, tools=CHAT_TOOLS)
    assert reply["choices"][0]["message"]["content"] == 'You said: tool: rain""'
    for tools in ({}, {"tools": CHAT_TOOLS, "tool_choice": "none"}):
        message = post(server, "/v1/chat/completions", messages=user("weather"), **tools)["choices"][0]["message"]
        assert message["content"] == SCRIPTS["weather"] and "tool_calls" not in message


def test_a_stream_is_the_sum_of_its_deltas(server):
    for name in SCRIPTS:
        body = {"messages": user(name), "tools": CHAT_TOOLS}
        whole = post(server, "/v1/chat/completions", **body)["choices"][0]
        chunks = [event for _, event in events(server, "/v1/chat/completions", **body)]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
        for key in ("content", "reasoning_content"):
            assert "".join(delta.get(key, "") for delta in deltas) == (whole["message"].get(key) or "")
        calls = []
        for part in (call for delta in deltas for call in delta.get("tool_calls", ())):
            if "id" in part:  # first all but the arguments, then these in pieces
                assert part["index"] == len(calls) and part["function"]["arguments"] == ""
                calls.append(dict(part["function"]))
            else:
                assert set(part) == {"index", "function"} and part["index"] == len(calls) - 1
                assert set(part["function"]) == {"arguments"} and 0 < len(part["function"]["arguments"]) <= 64
                calls[-1]["arguments"] += part["function"]["arguments"]
        assert calls == [call["function"] for call in whole["message"].get("tool_calls", ())]


def test_thoughts_are_apart_and_counted(server):
    reply = post(server, "/v1/chat/completions", messages=user("think"), reasoning_effort="low")
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, 2 and 2", "It is 4.")
    assert 12 <= reply["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 22
    assert 'kwargs: {"reasoning_effort": "low"}' in server.engine.prompt
    post(server, "/v1/chat/completions", messages=user("x"), reasoning_effort="none", chat_template_kwargs={"a": 1})
    assert 'kwargs: {"reasoning_effort": "none", "enable_thinking": false, "a": 1}' in server.engine.prompt


def test_a_reply_goes_on_with_the_assistants_message(server):
    for more in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        messages = [*user("x"), {"role": "assistant", "content": "Once"}]
        post(server, "/v1/chat/completions", messages=messages, max_tokens=3, **more)
        assert server.engine.prompt.endswith('user: x""\nassistant: Once'), server.engine.prompt


@pytest.mark.parametrize(
    "field, body",
    [
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": CHAT_TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("tools", {"tools": [{"type": "web_search"}]}),
        ("continue_final_message", {"continue_final_message": True}),
        ("add_generation_prompt", {"add_generation_prompt": False}),
        ("functions", {"functions": [TOOL]}),
        ("chat_template", {"chat_template": "{{ messages }}"}),
        ("min_tokens", {"min_tokens": 9999}),
        ("prompt_logprobs", {"prompt_logprobs": 1}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("messages", {"messages": [{"role": "assistant", "content": "alone"}]}),
        ("messages", {"messages": user("\ud83d")}),
    ],
)
def test_what_cannot_be_done_is_named(field, body, server):
    status, _, reply = server.ask("POST", "/v1/chat/completions", {"messages": user("x")} | body)
    assert status == 400 and reply["error"]["param"] == field, reply


# =================================================================================================== Messages


def test_messages_have_blocks(server):
    ask = {"model": "base", "max_tokens": 500, "system": [{"type": "text", "text": "be kind"}]}
    reply = post(server, "/v1/messages", messages=user("both"), tools=CLAUDE_TOOLS, **ask)
    assert reply["type"] == "message" and reply["stop_reason"] == "tool_use" and reply["stop_sequence"] is None
    kinds = [block["type"] for block in reply["content"]]
    assert kinds == ["thinking", "tool_use", "tool_use"] and reply["content"][0]["thinking"] == "hm"
    assert [block["input"] for block in reply["content"][1:]] == [{"city": "Oslo"}, {"city": "Bergen"}]
    assert server.engine.prompt.splitlines()[1] == 'system: be kind""'
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "rain"}]}
        for block in reply["content"][1:]
    ]
    last = {"role": "user", "content": [*results, {"type": "text", "text": "hello"}]}
    messages = [*user("both"), {"role": "assistant", "content": reply["content"]}, last]
    after = post(server, "/v1/messages", messages=messages, tools=CLAUDE_TOOLS, **ask)
    assert after["content"] == [{"type": "text", "text": "Good day."}] and after["stop_reason"] == "end_turn"
    assert server.engine.prompt.count("tool: rain") == 2
    counted = post(server, "/v1/messages/count_tokens", messages=messages, tools=CLAUDE_TOOLS, system=ask["system"])
    assert counted == {"input_tokens": after["usage"]["input_tokens"]}
    cut = post(server, "/v1/messages", model="base", max_tokens=4, messages=user("hello"))
    assert (cut["stop_reason"], cut["content"]) == ("max_tokens", [{"type": "text", "text": "Good"}])


def test_a_streamed_message_is_the_whole_one(server):
    for name in SCRIPTS:
        body = {"max_tokens": 500, "messages": user(name), "tools": CLAUDE_TOOLS}
        whole = post(server, "/v1/messages", **body)
        found, blocks = events(server, "/v1/messages", **body), []
        assert all(kind == event["type"] for kind, event in found)
        assert [kind for kind, _ in (found[0], *found[-2:])] == ["message_start", "message_delta", "message_stop"]
        for kind, event in found:
            if kind == "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"] | ({"input": ""} if "input" in event["content_block"] else {}))
            elif kind == "content_block_delta":
                change = event["delta"]
                key = {"text_delta": "text", "thinking_delta": "thinking"}.get(change["type"])
                if key:
                    blocks[event["index"]][key] += change[key]
                else:
                    assert len(change["partial_json"]) <= 64
                    blocks[event["index"]]["input"] += change["partial_json"]
        for block in blocks:
            if "input" in block:
                block["input"] = json.loads(block["input"])
        plain = [[{**block, "id": None} for block in content] for content in (blocks, whole["content"])]
        assert plain[0] == plain[1]
        assert found[-2][1]["delta"]["stop_reason"] == whole["stop_reason"]


def test_anthropics_errors(server):
    status, _, reply = server.ask("POST", "/v1/messages", {"messages": user("x")})
    assert status == 400 and reply["type"] == "error" and reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["message"].startswith("max_tokens")
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    for field, body in (("messages", {"messages": image}), ("mcp_servers", {"mcp_servers": [1]})):
        status, _, reply = server.ask("POST", "/v1/messages", {"max_tokens": 5, "messages": user("x")} | body)
        assert status == 400 and reply["error"]["message"].startswith(field)


# =================================================================================================== Responses


def test_responses_have_items(server):
    tools = [{"type": "function", **TOOL}]
    reply = post(server, "/v1/responses", input="both", instructions="be kind", tools=tools)
    assert reply["status"] == "completed" and reply["object"] == "response"
    assert [item["type"] for item in reply["output"]] == ["reasoning", "function_call", "function_call"]
    calls = [item for item in reply["output"] if item["type"] == "function_call"]
    assert [json.loads(call["arguments"])["city"] for call in calls] == ["Oslo", "Bergen"]
    outputs = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"} for call in calls]
    by_id = post(server, "/v1/responses", input=outputs, previous_response_id=reply["id"], tools=tools)
    prompt = server.engine.prompt
    by_hand = post(
        server, "/v1/responses", input=[{"role": "user", "content": "both"}, *reply["output"], *outputs], tools=tools
    )
    assert by_id["output"][0]["content"][0]["text"] == by_hand["output"][0]["content"][0]["text"]
    assert prompt == server.engine.prompt and "be kind" not in prompt and prompt.count("tool: rain") == 2
    cut = post(
        server, "/v1/responses", input=[{"type": "message", "role": "user", "content": "hello"}], max_output_tokens=4
    )
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    status, _, error = server.ask("POST", "/v1/responses", {"input": "x", "previous_response_id": "resp_gone"})
    assert status == 404 and error["error"]["param"] == "previous_response_id"
    for field, value in (("tools", [{"type": "web_search"}]), ("background", True), ("conversation", "c")):
        status, _, error = server.ask("POST", "/v1/responses", {"input": "x", field: value})
        assert status == 400 and error["error"]["param"] == field


def test_a_streamed_response_is_the_whole_one(server):
    for name in SCRIPTS:
        body = {"input": name, "tools": [{"type": "function", **TOOL}]}
        whole, found = post(server, "/v1/responses", **body), events(server, "/v1/responses", **body)
        assert [event["sequence_number"] for _, event in found] == list(range(len(found)))
        assert all(kind == event["type"] for kind, event in found)
        last, items = (
            found[-1][1]["response"],
            [event["item"] for kind, event in found if kind == "response.output_item.done"],
        )
        assert items == last["output"] and last["status"] == whole["status"]

        def plain(output):
            return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in output]

        assert plain(last["output"]) == plain(whole["output"])
        pieces = [event["delta"] for kind, event in found if kind == "response.function_call_arguments.delta"]
        calls = [item["arguments"] for item in whole["output"] if item["type"] == "function_call"]
        assert "".join(pieces) == "".join(calls) and max(map(len, pieces), default=0) <= 64
        text = "".join(event["delta"] for kind, event in found if kind == "response.output_text.delta")
        assert text == "".join(i["content"][0]["text"] for i in whole["output"] if i["type"] == "message")


def test_stored_responses_are_read_and_deleted(server):
    reply = post(
        server,
        "/v1/responses",
        input="hello",
        include=["reasoning.encrypted_content"],
        text={"verbosity": "low"},
        reasoning={"summary": "auto"},
    )
    streamed = events(server, "/v1/responses", input="hello")[-1][1]["response"]
    for body in (reply, streamed):
        path = f"/v1/responses/{body['id']}"
        status, _, found = server.ask("GET", path)
        assert status == 200 and found == body
        status, _, found = server.ask("DELETE", path)
        assert status == 200 and found == {"id": body["id"], "object": "response.deleted", "deleted": True}
        for method in ("GET", "DELETE"):
            status, _, error = server.ask(method, path)
            assert status == 404 and error["error"]["param"] == "response_id", error
        status, _, error = server.ask("POST", "/v1/responses", {"input": "x", "previous_response_id": body["id"]})
        assert status == 404
    kept = post(server, "/v1/responses", input="hello", store=False)
    assert server.ask("GET", f"/v1/responses/{kept['id']}")[0] == 404
    assert server.ask("POST", f"/v1/responses/{kept['id']}", {})[0] == 405


def test_what_responses_refuse_is_named(server):
    custom = {"type": "custom", "name": "apply_patch", "description": "d", "format": {"type": "grammar"}}
    for field, word, value in (
        ("tools", '"custom"', [custom]),
        ("include", "logprobs", ["message.output_text.logprobs"]),
        ("text", "verbosity", {"verbosity": 5}),
        ("input_", "is input meant?", 5),
    ):
        status, _, reply = server.ask("POST", "/v1/responses", {"input": "x", field: value})
        assert status == 400 and reply["error"]["param"] == field and word in reply["error"]["message"], reply


def test_anthropics_headers():
    keyed = Running(ScriptEngine(), ToolTokenizer(), api_key="secret")
    try:
        body = json.dumps({"max_tokens": 9, "messages": user("hello")}).encode()
        for headers, wanted in (
            ({"x-api-key": "secret", "anthropic-version": "2023-06-01", "anthropic-beta": "a-b"}, 200),
            ({"Authorization": "Bearer secret"}, 200),
            ({"x-api-key": "wrong"}, 401),
            ({}, 401),
        ):
            status, _, reply = keyed.ask("POST", "/v1/messages?beta=true", body, headers=headers)
            assert status == wanted, reply
    finally:
        keyed.stop()


# =================================================================================================== clients

OPENAI = """
import json, sys
from openai import OpenAI, BadRequestError
client = OpenAI(base_url=sys.argv[1] + "v1", api_key="none")
tools = json.loads(sys.argv[2])
chat = dict(model="base", messages=[{"role": "user", "content": "both"}])
reply = client.chat.completions.create(**chat, tools=tools).choices[0]
assert reply.finish_reason == "tool_calls" and len(reply.message.tool_calls) == 2, reply
with client.chat.completions.stream(**chat, tools=tools) as stream:
    for event in stream:
        pass
    final = stream.get_final_completion().choices[0]
    names = [json.loads(call.function.arguments)["city"] for call in final.message.tool_calls]
    assert names == ["Oslo", "Bergen"], final
functions = [{"type": "function", **tool["function"]} for tool in tools]
response = client.responses.create(model="base", input="weather", tools=functions)
assert response.output_text == "Let me look." and response.output[-1].name == "weather", response
with client.responses.stream(model="base", input="both", tools=functions) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_response()
assert [item.type for item in final.output] == ["reasoning", "function_call", "function_call"], final
assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
call = final.output[-1]
more = client.responses.create(model="base", previous_response_id=final.id, input=[
    {"type": "function_call_output", "call_id": item.call_id, "output": "hello"} for item in final.output[1:]])
assert more.output_text == "Good day.", more
"""

ANTHROPIC = """
import json, sys
from anthropic import Anthropic
client = Anthropic(base_url=sys.argv[1], api_key="none")
tools = [{"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in json.loads(sys.argv[2])]
ask = dict(model="base", max_tokens=400, tools=tools)
messages = [{"role": "user", "content": "both"}]
reply = client.messages.create(messages=messages, **ask)
assert reply.stop_reason == "tool_use" and [b.type for b in reply.content] == ["thinking", "tool_use", "tool_use"]
with client.messages.stream(messages=messages, **ask) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_message()
assert [b.input for b in final.content[1:]] == [{"city": "Oslo"}, {"city": "Bergen"}], final
results = [{"type": "tool_result", "tool_use_id": b.id, "content": "hello"} for b in final.content[1:]]
messages += [{"role": "assistant", "content": final.content}, {"role": "user", "content": results}]
assert client.messages.create(messages=messages, **ask).content[0].text == "Good day."
assert client.messages.count_tokens(model="base", messages=messages).input_tokens > 10
with client.messages.stream(model="base", max_tokens=99, messages=[{"role": "user", "content": "hello"}]) as stream:
    assert "".join(stream.text_stream) == "Good day."
"""

LITELLM = """
import json, sys
import litellm
ask = dict(model="openai/base", api_base=sys.argv[1] + "v1", api_key="none", tools=json.loads(sys.argv[2]))
reply = litellm.completion(messages=[{"role": "user", "content": "weather"}], **ask).choices[0]
assert reply.message.tool_calls[0].function.name == "weather", reply
chunks = list(litellm.completion(messages=[{"role": "user", "content": "both"}], stream=True, **ask))
whole = litellm.stream_chunk_builder(chunks)
assert len(whole.choices[0].message.tool_calls) == 2, whole
ask["model"], ask["api_base"] = "anthropic/base", sys.argv[1].rstrip("/")
reply = litellm.completion(messages=[{"role": "user", "content": "weather"}], max_tokens=400, **ask).choices[0]
assert reply.message.tool_calls[0].function.name == "weather", reply
"""

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
for responses in (False, True):
    model = ChatOpenAI(base_url=sys.argv[1] + "v1", api_key="none", model="base", use_responses_api=responses)
    bound = model.bind_tools(json.loads(sys.argv[2]))
    assert [call["args"]["city"] for call in bound.invoke("both").tool_calls] == ["Oslo", "Bergen"]
    whole = None
    for chunk in bound.stream("both"):
        whole = chunk if whole is None else whole + chunk
    assert [call["args"]["city"] for call in whole.tool_calls] == ["Oslo", "Bergen"], whole
"""

INSTRUCTOR = """
import sys
import instructor
from openai import OpenAI
from pydantic import BaseModel

class weather(BaseModel):
    city: str

client = instructor.from_openai(OpenAI(base_url=sys.argv[1] + "v1", api_key="none"), mode=instructor.Mode.TOOLS)
found = client.chat.completions.create(
    model="base", response_model=weather, tool_choice="auto", messages=[{"role": "user", "content": "weather"}])
assert found.city == "Oslo", found
"""

CLIENTS = {
    "openai": OPENAI,
    "anthropic": ANTHROPIC,
    "litellm": LITELLM,
    "langchain": LANGCHAIN,
    "instructor": INSTRUCTOR,
}


@pytest.mark.parametrize("name", CLIENTS)
def test_clients(name, server, client_python):
    client_python(name, CLIENTS[name], f"http://127.0.0.1:{server.port}/", json.dumps(CHAT_TOOLS))
