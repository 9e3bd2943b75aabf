"""Anthropic's client: Messages with tools and thinking, streamed and not, counted tokens and errors."""

from common import ANSWER, GREETING, QUESTION, THOUGHTS, WEATHER, base_url, held, package, run_tool

anthropic = package("anthropic")
client = anthropic.Anthropic(base_url=base_url(), api_key="none", max_retries=0, timeout=60)
MODEL = client.models.list().data[0].id
TOOL = {"name": "weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
HI = [{"role": "user", "content": "hi"}]
ASK = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]


def plain():
    message = client.messages.create(model=MODEL, max_tokens=200, messages=HI, system="Be brief.")
    assert [block.text for block in message.content if block.type == "text"] == [GREETING], message
    assert message.stop_reason == "end_turn" and message.usage.output_tokens > 0 and message.role == "assistant"
    cut = client.messages.create(model=MODEL, max_tokens=2, messages=HI)
    assert cut.stop_reason == "max_tokens"
    stopped = client.messages.create(model=MODEL, max_tokens=200, messages=HI, stop_sequences=["there"])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "there", stopped
    count = client.messages.count_tokens(model=MODEL, messages=HI, system="Be brief.")
    usage = message.usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0), (count, usage)
    held("a message, cut off, stopped, counted")


def streamed():
    with client.messages.stream(model=MODEL, max_tokens=200, messages=HI) as stream:
        assert "".join(stream.text_stream) == GREETING
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn" and message.usage.output_tokens > 0
    kinds = [event.type for event in client.messages.create(model=MODEL, max_tokens=200, messages=HI, stream=True)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") >= 1
    held("events of a message")


def tool_loop(stream):
    fields = {"model": MODEL, "max_tokens": 300, "tools": [TOOL], "messages": ASK}
    if stream:
        with client.messages.stream(**fields) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**fields)
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use" and call.id
    assert "".join(block.thinking for block in message.content if block.type == "thinking") == THOUGHTS, message
    for content in (run_tool(call.name, call.input), [{"type": "text", "text": run_tool(call.name, call.input)}]):
        result = {"type": "tool_result", "tool_use_id": call.id, "content": content}
        turns = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        final = client.messages.create(**fields | {"messages": turns})
        assert "".join(block.text for block in final.content if block.type == "text") == ANSWER, final
    held(f"a tool is called, its result is read{', streamed' if stream else ''}")


def choices_of_tools():
    fields = {"model": MODEL, "max_tokens": 300, "tools": [TOOL], "messages": ASK}
    for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}):
        message = client.messages.create(**fields, tool_choice=choice)
        assert [block.name for block in message.content if block.type == "tool_use"] == ["weather"], choice
    message = client.messages.create(**fields, tool_choice={"type": "none"})
    assert all(block.type != "tool_use" for block in message.content)
    held("tool_choice: auto, any, tool, none")


def errors():
    for kind, fields in (
        (anthropic.NotFoundError, {"model": "none_such"}),
        (anthropic.BadRequestError, {"messages": [{"role": "wizard", "content": "hi"}]}),
        (anthropic.BadRequestError, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
        (anthropic.BadRequestError, {"messages": [{"role": "user", "content": "x" * 90_000}]}),
    ):
        try:
            client.messages.create(**{"model": MODEL, "max_tokens": 9, "messages": HI} | fields)
        except kind as error:
            assert error.body["type"] == "error" and error.body["error"]["message"], error.body
        else:
            raise AssertionError(f"{fields} was taken")
    held("errors in Anthropic's shape")


if __name__ == "__main__":
    plain(), streamed(), tool_loop(False), tool_loop(True), choices_of_tools(), errors()
