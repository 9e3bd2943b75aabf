"""A reply as the model writes it -> what an OpenAI client reads: content, reasoning_content and tool_calls.

    parse_reply('<tool_call>\\n{"name": "now", "arguments": {}}\\n</tool_call>', "hermes")["tool_calls"]

The text is decoded with its special tokens, up to the token that ended it. What is no complete call stays content.
"""

import json
import re
import uuid

# How a format's Jinja source shows the form of its calls; the first that is found.
STYLES = {
    "deepseek": "<｜tool▁call▁begin｜>",
    "mistral": "[TOOL_CALLS]",
    "hermes": '<tool_call>\\n{"name"',
    "llama3": "<|start_header_id|>ipython",
    "glm-4": "<|observation|>",
}

DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>[^<]*<｜tool▁sep｜>([^\n]+)\n```json\n(.*?)\n```<｜tool▁call▁end｜>", re.S
)
HERMES_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.S)
GLM_CALL = re.compile(r"([^\s{}\[\]]+)\n(.*)", re.S)


def tool_style(source: str) -> str | None:
    """A Jinja template's source -> a key of STYLES; None if it writes calls in no form known here."""
    if "<arg_key>" in source or "<function=" in source:  # calls as XML, such as GLM-4.5's and Qwen3-Coder's
        return None
    return next((style for style, mark in STYLES.items() if mark in source), None)


def parse_reply(text: str, style: str | None, thinks: bool = False) -> dict:
    """Decoded reply -> {"content": str, "reasoning_content"?: str, "tool_calls"?: list}, arguments as JSON text.

    style: a key of STYLES, None for no calls. thinks: the prompt had opened <think>, so that the reply begins with
    thoughts. Arguments and ids are the model's; a call without an id gets one.
    """
    thoughts, text = _split_thoughts(text, thinks)
    content, calls = _CALLS[style](text) if style else (text, [])
    reply = {"content": content}
    if thoughts:
        reply["reasoning_content"] = thoughts
    if calls:
        reply["tool_calls"] = calls
    return reply


def _split_thoughts(text, thinks):
    """(thoughts, what stands behind them); thoughts without an end are all that there is."""
    before, mark, rest = text.partition("<think>")
    if mark and not before.strip():
        text, thinks = rest, True
    if not thinks and (mark or "</think>" not in text):
        return "", text
    thoughts, _, text = text.partition("</think>")
    return thoughts.strip("\n"), text.lstrip("\n")


def _call(name, arguments, call_id=None):
    """A call in OpenAI's form; None if the name is no text or the arguments are no JSON object."""
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    call_id = call_id if isinstance(call_id, str) else f"call_{uuid.uuid4().hex[:24]}"
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": function}


def _json_call(text, key="arguments"):
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return None
    return _call(value.get("name"), value.get(key), value.get("id")) if isinstance(value, dict) else None


def _whole(text, content, calls):
    """(content, calls), or the text alone if one of the calls is none."""
    return (content, calls) if calls and all(calls) else (text, [])


def _hermes(text):
    calls = [_json_call(body) for body in HERMES_CALL.findall(text)]
    return _whole(text, HERMES_CALL.sub("", text).rstrip("\n"), calls)


def _llama3(text):
    call = _json_call(text.strip().removeprefix("<|python_tag|>"), "parameters")
    return _whole(text, "", [call])


def _mistral(text):
    content, _, listed = text.partition("[TOOL_CALLS]")
    try:
        listed = json.loads(listed)
    except (ValueError, RecursionError):
        listed = []
    return _whole(text, content.strip(), [_json_call(call) for call in listed] if isinstance(listed, list) else [])


def _deepseek(text):
    calls = [_call(name, arguments) for name, arguments in DEEPSEEK_CALL.findall(text)]
    return _whole(text, text.partition("<｜tool▁calls▁begin｜>")[0], calls)


def _glm4(text):
    contents, calls = [], []
    for part in text.split("<|assistant|>"):
        match = GLM_CALL.fullmatch(part)
        call = _call(*match.groups()) if match else None
        calls += [call] if call else []
        contents += [] if call else [part.removeprefix("\n")]
    return _whole(text.removeprefix("\n"), "\n".join(contents), calls)


_CALLS = {"hermes": _hermes, "llama3": _llama3, "mistral": _mistral, "deepseek": _deepseek, "glm-4": _glm4}
