"""Replies as models write them become an OpenAI client's messages, and back."""

import json

import pytest
from test_chat_tools import CONVERSATIONS, TOOL, USER, WITH_TOOLS, call, result, small, thinking, trained

from formats.chat_formats import FORMATS
from formats.tool_calls import ReplyStream, parse_reply, tool_style


def last_reply(name, messages):
    """The last reply as the model writes it, without the token that ends it."""
    text = trained(small(name), messages, [TOOL])[1][-1]
    for end in ("<|im_end|>\n", "<|eot_id|>", "</s>", "<｜end▁of▁sentence｜>", "<|observation|>", "<|user|>"):
        text = text.removesuffix(end)
    return text


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_written_call_is_read_back(name):
    style, thinks = tool_style(FORMATS[name].jinja()), name == "deepseek-r1"
    two = call("é{}")
    two["tool_calls"] = [*two["tool_calls"], *call("Bergen", number=2)["tool_calls"]]
    replies = [call(), call('Oslo\n"q"'), CONVERSATIONS["tools"][-1]] + ([two] if style != "llama3" else [])
    if style not in ("llama3", "mistral"):
        replies.append(call(content="let me see"))
    for message in replies:
        reply = parse_reply(last_reply(name, [USER, message]), style, thinks)
        assert reply["content"].strip() == message["content"] and "reasoning_content" not in reply
        functions = [one["function"] for one in reply.get("tool_calls", ())]
        expected = [one["function"] for one in message.get("tool_calls", ())]
        assert [(f["name"], json.loads(f["arguments"])) for f in functions] == [
            (f["name"], f["arguments"]) for f in expected
        ]
        if expected:  # the message goes back into a conversation as it is
            again = [USER, {"role": "assistant", **reply}]
            assert last_reply(name, again).split('"id"')[0] == last_reply(name, [USER, message]).split('"id"')[0]
            small(name).apply_chat([*again, result()], tools=[TOOL])


def test_thoughts_are_read_back():
    reply = parse_reply(last_reply("qwen3", [USER, call(reasoning_content="hm\nso")]), "hermes")
    assert reply["reasoning_content"] == "hm\nso" and reply["content"] == "" and len(reply["tool_calls"]) == 1
    reply = parse_reply(last_reply("deepseek-r1", [USER, thinking("a", "hm")]), "deepseek", True)
    assert reply == {"content": "a", "reasoning_content": "hm"}
    assert parse_reply("<think>\ncut", None) == {"content": "", "reasoning_content": "cut"}
    assert parse_reply("a <think> b", None) == {"content": "a <think> b"}
    assert parse_reply("hm</think>\n\nb", None) == {"content": "b", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    "style, text",
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {}}'),
        ("hermes", '<tool_call>\n["f"]\n</tool_call>'),
        ("llama3", '{"name": "f"}'),
        ("llama3", '{"parameters": {}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": 3}]'),
        ("mistral", "[TOOL_CALLS] 3"),
        (
            "deepseek",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\n```<｜tool▁call▁end｜>",
        ),
        ("glm-4", "weather\n{city"),
        ("glm-4", "a\n3"),
        (None, "<tool_call>"),
    ],
)
def test_what_is_no_complete_call_stays_text(style, text):
    assert parse_reply(text, style) == {"content": text}


def streamed(text, style, thinks, cuts):
    """The sums of the deltas of a text that comes in pieces."""
    stream, deltas = ReplyStream(style, thinks), []
    for first, end in zip([0, *cuts], [*cuts, len(text)]):
        deltas += stream.push(text[first:end])
    deltas += stream.finish()
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    reply = {key: "".join(delta.get(key, "") for delta in deltas) for key in ("content", "reasoning_content")}
    reply = {key: value for key, value in reply.items() if value or key == "content"}
    return reply | ({"tool_calls": calls} if calls else {})


def without_ids(reply):
    calls = [call["function"] for call in reply.get("tool_calls", ())]
    return {key: value for key, value in reply.items() if key != "tool_calls"} | {"calls": calls}


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_stream_is_the_whole_reply(name):
    """Cut at every place, and into single characters."""
    style, thinks = tool_style(FORMATS[name].jinja()), name == "deepseek-r1"
    one = last_reply(name, [USER, call('Oslo\n"q"')])
    texts = [one, one[:-1], "plain < text\n\n", "a {b}\n", "<tool_cal\n\n[TOOL", "", "\n"]
    if style not in ("llama3", "mistral"):
        texts.append(last_reply(name, [USER, call(content="let me\n\nsee")]))
    if style == "hermes":
        texts += [
            f"x\n{one}\n<tool_call>3</tool_call>\n{one}\ny\n",
            f"<think>\nhm\n\n</think>\n\n{one}",
            "<think>\ncut\n",
        ]
    if thinks:
        texts = [f"hm\n\nso</think>\n\n{text}" for text in texts] + ["cut\n"]
    for text in texts:
        whole = without_ids(parse_reply(text, style, thinks))
        for cuts in [*([i] for i in range(len(text))), range(1, len(text))]:
            assert without_ids(streamed(text, style, thinks, cuts)) == whole, (text, cuts)


def test_text_is_not_held_back_without_need():
    stream = ReplyStream("hermes")
    assert stream.push("Let me") == [{"content": "Let me"}] and stream.push(" see <") == [{"content": " see "}]
    assert stream.push("b") == [{"content": "<b"}]
    stream = ReplyStream(None, True)
    assert stream.push("\nI th") == [{"reasoning_content": "I th"}] and stream.push("\n</thin") == []


def test_where_no_form_is_known():
    assert tool_style("{{ messages }}") is None
