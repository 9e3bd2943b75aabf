"""OpenAI's client: Pydantic models as response_format, and strict tools, of a model that guides its replies."""

import enum
import json

from common import TOOL, base_url, held, package, run_tool

openai, pydantic = package("openai"), package("pydantic")
client = openai.OpenAI(base_url=f"{base_url()}/v1", api_key="none", max_retries=0, timeout=120)
MODEL = client.models.list().data[0].id
MESSAGES = [{"role": "user", "content": "Describe a red dress."}]


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class Size(pydantic.BaseModel):
    label: Color
    is_large: bool


class Dress(pydantic.BaseModel):
    color: Color
    sizes: tuple[Size, Size]
    note: None


def whole():
    completion = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Size, max_tokens=200)
    assert isinstance(completion.choices[0].message.parsed, Size)
    held(f"parse: {completion.choices[0].message.parsed!r}")


def streamed():
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, response_format=Size, max_tokens=200) as stream:
        kinds = [event.type for event in stream]
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert "content.delta" in kinds and isinstance(parsed, Size), kinds
    held(f"stream: {parsed!r}")


def raw_schema():
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=form, max_tokens=200)
    value = json.loads(reply.choices[0].message.content)
    assert value["a"] in (1, 2) and isinstance(value["b"], bool) and len(value) == 2
    held(f"json_schema: {value}")


def forced_tools():
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        fields = {"model": MODEL, "messages": MESSAGES, "tools": [strict], "tool_choice": choice, "max_tokens": 300}
        reply = client.chat.completions.create(**fields, parallel_tool_calls=False, temperature=0)
        (call,) = reply.choices[0].message.tool_calls
        assert reply.choices[0].finish_reason == "tool_calls"
        run_tool(call.function.name, call.function.arguments)
        arguments, name = "", None
        for chunk in client.chat.completions.create(**fields, stream=True, parallel_tool_calls=False, temperature=0):
            for part in chunk.choices[0].delta.tool_calls or ():
                name, arguments = name or part.function.name, arguments + (part.function.arguments or "")
        run_tool(name, arguments)
        assert json.loads(arguments) == json.loads(call.function.arguments)
    held("tool_choice required and named force a valid call, streamed and not")


if __name__ == "__main__":
    whole(), streamed(), raw_schema(), forced_tools()
