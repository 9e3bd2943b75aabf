"""A tool loop and answers by schema of a real model, through OpenAI's and Anthropic's clients; prints a transcript.

tool_loop.py http://127.0.0.1:8011
"""

import json

from common import QUESTION, TOOL, WEATHER, base_url, held, package, run_tool

openai, anthropic = package("openai"), package("anthropic")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]},
          "degrees": {"type": "integer", "minimum": -60, "maximum": 60}, "is_cold": {"type": "boolean"}},
          "required": ["city", "degrees", "is_cold"], "additionalProperties": False}  # fmt: skip


def say(who, text):
    print(f"{who}: {text}", flush=True)


def use_openai():
    client = openai.OpenAI(base_url=f"{base_url()}/v1", api_key="none", max_retries=0, timeout=250)
    model = client.models.list().data[0].id
    fields = {"model": model, "temperature": 0, "max_tokens": 60, "tools": [TOOL]}
    messages = [{"role": "user", "content": QUESTION}]
    say("user", QUESTION)
    message = (
        client.chat.completions.create(messages=messages, tool_choice="required", parallel_tool_calls=False, **fields)
        .choices[0]
        .message
    )
    call = message.tool_calls[0]
    say("assistant calls", f"{call.function.name}({call.function.arguments})")
    result = run_tool(call.function.name, call.function.arguments)
    say("tool", result)
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    reply = client.chat.completions.create(messages=messages, tool_choice="none", **fields).choices[0].message
    say("assistant", reply.content)
    assert reply.content.strip() and not reply.tool_calls
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    messages += [reply, {"role": "user", "content": "Say it as JSON with city, degrees and is_cold."}]
    del fields["tools"]
    text = ""
    for chunk in client.chat.completions.create(messages=messages, response_format=form, stream=True, **fields):
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    say("assistant, by schema", text)
    value = json.loads(text)
    assert value.keys() == SCHEMA["properties"].keys() and -60 <= value["degrees"] <= 60
    held("OpenAI's client: a tool loop and an answer by schema")


def use_anthropic():
    client = anthropic.Anthropic(base_url=base_url(), api_key="none", max_retries=0, timeout=250)
    model = client.models.list().data[0].id
    tool = {"name": "weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
    fields = {"model": model, "max_tokens": 60, "tools": [tool], "extra_body": {"temperature": 0}}
    messages = [{"role": "user", "content": QUESTION}]
    say("user", QUESTION)
    with client.messages.stream(
        messages=messages, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **fields
    ) as stream:
        message = stream.get_final_message()
    (call,) = [block for block in message.content if block.type == "tool_use"]
    say("assistant calls", f"{call.name}({json.dumps(call.input)})")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": run_tool(call.name, call.input)}
    say("tool", result["content"])
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    final = client.messages.create(messages=messages, tool_choice={"type": "none"}, **fields)
    text = "".join(block.text for block in final.content if block.type == "text")
    say("assistant", text)
    assert text.strip()
    held("Anthropic's client: a tool loop")


if __name__ == "__main__":
    use_openai(), use_anthropic()
