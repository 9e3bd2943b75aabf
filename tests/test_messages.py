"""Messages of OpenAI, TRL and transformers become a context and rounds, or are refused by a line that names them."""

import pytest

from formats.chat import parse_messages
from formats.files import UserError

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
PARSED_CALL = CALL | {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TEXT_PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_plain_conversations_are_pairs_of_texts():
    assert parse_messages([USER, BOT, USER]) == ({}, [("a", "b"), ("a", None)])
    for role in ("system", "developer"):
        assert parse_messages([{"role": role, "content": "s"}, USER, BOT]) == ({"system": "s"}, [("a", "b")])
    parts = {"role": "user", "content": TEXT_PARTS, "name": None, "tool_calls": None, "weight": 1}
    assert parse_messages([parts, {**BOT, "tool_calls": []}]) == ({}, [("ab", "b")])


def test_tools_and_what_is_not_plain_stay_messages():
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "3 degrees", "tool_call_id": "c1"}
    context, rounds = parse_messages([USER, call, result, BOT], [TOOL])
    assert context == {"tools": [TOOL]}
    assert rounds == [("a", {"role": "assistant", "content": "", "tool_calls": [PARSED_CALL]}), ([result], "b")]
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    reply = parse_messages([USER, old, {"role": "function", "name": "weather", "content": "3"}])[1]
    assert reply[0][1]["tool_calls"] == [{"type": "function", "function": PARSED_CALL["function"]}]
    assert reply[1] == ([{"role": "tool", "content": "3", "name": "weather"}], None)
    assert parse_messages([USER], '[{"name": "weather"}]')[0] == {
        "tools": [{"type": "function", "function": {"name": "weather"}}]
    }


def test_prompts_of_several_or_no_messages_are_lists():
    system = {"role": "system", "content": "s"}
    assert parse_messages([USER, USER])[1] == [([USER, USER], None)]
    assert parse_messages([BOT, USER, system, BOT, BOT])[1] == [([], "b"), ([USER, system], "b"), ([], "b")]
    named, thinking = {**USER, "name": "Ann"}, {**BOT, "reasoning_content": "hm"}
    assert parse_messages([named, thinking])[1] == [([named], thinking)]
    assert parse_messages([system]) == ({"system": "s"}, [([], None)])


@pytest.mark.parametrize(
    "messages, tools, words",
    [
        ([], None, "f:3: messages: expected a list of at least one message"),
        ([USER, {"role": "bot", "content": "x"}], None, 'f:3: messages[1]: expected an object with the role "system"'),
        ([{"role": ["user"], "content": "x"}], None, "messages[0]"),
        (["x"], None, "messages[0]"),
        ([{"role": "user"}], None, "messages[0]: content must be a string or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], None, "content must be a string or a list"),
        ([{**USER, "name": 3}], None, "messages[0]: name must be a string"),
        ([{**USER, "tool_calls": [CALL]}], None, "tool_calls belong to the role 'assistant'"),
        ([{**BOT, "tool_calls": {}}], None, "messages[0]: tool_calls must be a list"),
        ([{**BOT, "tool_calls": [{"function": {}}]}], None, "messages[0]: tool_calls[0] must be"),
        (
            [{**BOT, "tool_calls": [{"name": "f", "arguments": "{"}]}],
            None,
            "tool_calls[0].function.arguments: not JSON",
        ),
        ([{**BOT, "tool_calls": [{"name": "f", "arguments": "[1]"}]}], None, "must be an object or its JSON text"),
        ([USER], {"name": "f"}, "tools must be a list"),
        ([USER], [{"type": "function"}], "as number 0"),
        ([USER], "[", "tools: not JSON"),
    ],
)
def test_bad_messages_are_refused_in_one_line(messages, tools, words):
    with pytest.raises(UserError) as error:
        parse_messages(messages, tools, "f:3: messages")
    assert words in str(error.value) and "\n" not in str(error.value)
