"""OpenAI's client: chat completions with tools and reasoning, streamed and not, and completions."""

from common import ANSWER, CITY, GREETING, QUESTION, THOUGHTS, TOOL, base_url, held, package, run_tool

openai = package("openai")
client = openai.OpenAI(base_url=f"{base_url()}/v1", api_key="none", max_retries=0, timeout=60)
MODEL = client.models.list().data[0].id


def ask(messages, **fields):
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def plain():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    choice = ask(messages).choices[0]
    assert choice.message.content == GREETING and choice.finish_reason == "stop" and not choice.message.tool_calls
    stream = ask(messages, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == GREETING
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["stop"]
    held("chat, streamed and not, usage in the last chunk")


def tool_loop():
    messages = [{"role": "user", "content": QUESTION}]
    choice = ask(messages, tools=[TOOL]).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.type == "function" and call.id
    assert choice.message.content in (None, "") and choice.message.reasoning_content == THOUGHTS
    result = run_tool(call.function.name, call.function.arguments)
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    final = ask(messages, tools=[TOOL]).choices[0]
    assert final.message.content == ANSWER and final.finish_reason == "stop"
    held("a tool is called, its result is read")


def tool_loop_streamed():
    messages = [{"role": "user", "content": QUESTION}]
    content, thoughts, calls, reasons = "", "", {}, []
    for chunk in ask(messages, tools=[TOOL], stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        thoughts += getattr(delta, "reasoning_content", None) or ""
        for part in delta.tool_calls or ():
            call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
            assert part.id in (None, call["id"])
            call["arguments"] += part.function.arguments or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (content.strip(), thoughts, list(calls)) == ("", THOUGHTS, [0]), (content, thoughts, calls)
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])
    run_tool(calls[0]["name"], calls[0]["arguments"])
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=[TOOL]) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds, kinds
    run_tool(message.tool_calls[0].function.name, message.tool_calls[0].function.arguments)
    held("deltas of calls and of reasoning add up; the client's own stream helper reads them")


def choices_of_tools():
    messages = [{"role": "user", "content": QUESTION}]
    assert ask(messages, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls is None
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("auto", "required", named):
        reply = ask(messages, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert [call.function.name for call in reply.message.tool_calls] == ["weather"], choice
    for wrong in ({"type": "function", "function": {"name": "none_such"}}, "sometimes"):
        try:
            ask(messages, tools=[TOOL], tool_choice=wrong)
        except openai.BadRequestError as error:
            assert error.param == "tool_choice", error
        else:
            raise AssertionError(f"tool_choice {wrong} was taken")
    held("tool_choice: none, auto, required, named, wrong")


def histories():
    """What agents send back: null content, names, two user turns, a late system message, reasoning."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": f'{{"city": "{CITY}"}}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": QUESTION, "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": '{"degrees": 7}'}]},
    ]
    assert ask(messages, tools=[TOOL]).choices[0].message.content == ANSWER
    prefill = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hel"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert ask(prefill, extra_body=fields).choices[0].finish_reason in ("stop", "length")
    held("histories of agents, a reply that is continued")


def completions():
    reply = client.completions.create(model=MODEL, prompt=["a b", "c"], max_tokens=4, logprobs=2, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt="a b", max_tokens=4, stream=True)
    )
    assert text == reply.choices[0].text
    held("completions")


if __name__ == "__main__":
    plain(), tool_loop(), tool_loop_streamed(), choices_of_tools(), histories(), completions()
