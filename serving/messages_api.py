"""Anthropic's Messages: its requests as bodies of chat completions, and its replies.

    body = MessagesReply.to_chat(parse_body(data))               # what openai_api.py reads
    reply = MessagesReply(call)                                  # call: openai_api.APICall
    reply.whole(choices), or reply.begin(), reply.events(delta), …, reply.end()

Names and shapes are those of https://docs.anthropic.com/en/api/messages.
"""

import json

from formats.files import brief
from formats.tool_calls import pieces_of
from serving.fields import bad_request, take_field, take_strings, unknown_field
from serving.http_server import HTTPError

ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}  # fmt: skip
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Fields of a request that are read; `metadata` and the like change no answer.
KNOWN = """model max_tokens messages system stop_sequences stream temperature top_p top_k tools tool_choice thinking
    output_config output_format metadata service_tier betas inference_geo cache_control""".split()


def error_body(error: HTTPError) -> dict:
    """Anthropic's error object."""
    kind = ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


# ============================================================================================ a request


def to_chat(body: dict) -> dict:
    """A request of Messages -> the same as a body of chat completions. HTTPError 400 names the field."""
    for name in body:
        if name not in KNOWN:
            raise unknown_field(name, KNOWN)
    if take_field(body, "max_tokens", int, 1, 2**31) is None:
        raise bad_request("max_tokens: must be given", "max_tokens")
    chat = {key: body[key] for key in ("model", "max_tokens", "stream", "temperature", "top_p", "top_k") if key in body}
    chat["stop"] = list(take_strings(body, "stop_sequences", 16))
    messages = take_field(body, "messages", list) or []
    system = _text(body.get("system") or "", "system")
    chat["messages"] = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(messages):
        chat["messages"] += _messages(message, f"messages[{i}]")
    chat |= _tools(body) | _thinking(take_field(body, "thinking", dict) or {})
    output = {"format": body.get("output_format")} | (take_field(body, "output_config", dict) or {})
    if output.get("format") is not None:
        form = output["format"]
        if not isinstance(form, dict) or form.get("type") != "json_schema":
            raise bad_request(
                f"output_config.format: the type must be json_schema, found {brief(form)}", "output_config"
            )
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    if output.get("effort") is not None:
        chat["reasoning_effort"] = output["effort"]
    return chat


def _text(content, where):
    """A string or text blocks -> str."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise bad_request(f"{where}: only text is supported, found {brief(block)}", where.partition("[")[0])
    return "".join(block["text"] for block in blocks)


def _messages(message, where):
    """A message -> those of a chat: results of tools come before the text beside them."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant"):
        raise bad_request(f'{where}: the role must be "user" or "assistant", found {brief(message)}', "messages")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise bad_request(f"{where}.content: must be a string or a list of blocks, found {brief(content)}", "messages")
    texts, calls, results, thoughts = [], [], [], []
    for k, block in enumerate(content):
        kind, place = block.get("type"), f"{where}.content[{k}]"
        if kind == "tool_use" and role == "assistant":
            function = {
                "name": block.get("name"),
                "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False),
            }
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            text = _text(block.get("content") or "", place)
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking" or role != "assistant":
            texts.append(_text([block], place))
    text = "".join(texts)
    if role == "user":
        return results + ([{"role": "user", "content": text}] if texts or not results else [])
    found = {"role": "assistant", "content": text}
    found |= {"tool_calls": calls} if calls else {}
    return [found | ({"reasoning_content": "".join(thoughts)} if thoughts else {})]


def _tools(body):
    tools = []
    for i, tool in enumerate(take_field(body, "tools", list) or []):
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom") or "name" not in tool:
            raise bad_request(f'tools[{i}]: only {{"name", "input_schema"}} is supported, found {brief(tool)}', "tools")
        function = {"name": tool["name"], "description": tool.get("description") or ""}
        function |= {"parameters": tool.get("input_schema") or {}, "strict": tool.get("strict") is True}
        tools.append({"type": "function", "function": function})
    chosen = take_field(body, "tool_choice", dict)
    if not tools:
        return {}
    fields = {"tools": tools}
    if chosen is not None:
        kind = chosen.get("type")
        if kind not in (*TOOL_CHOICES, "tool"):
            raise bad_request(
                f"tool_choice: the type must be auto, any, tool or none, found {brief(kind)}", "tool_choice"
            )
        named = {"type": "function", "function": {"name": chosen.get("name")}}
        fields["tool_choice"] = named if kind == "tool" else TOOL_CHOICES[kind]
        fields["parallel_tool_calls"] = chosen.get("disable_parallel_tool_use") is not True
    return fields


def _thinking(thinking):
    kind = thinking.get("type")
    if kind not in (None, "enabled", "disabled", "adaptive"):
        raise bad_request(f"thinking: the type must be enabled, adaptive or disabled, found {brief(kind)}", "thinking")
    fields = {} if kind is None else {"chat_template_kwargs": {"enable_thinking": kind != "disabled"}}
    if kind == "enabled":
        fields["thinking_token_budget"] = take_field(thinking, "budget_tokens", int, 1, 2**31)
    return fields


# ============================================================================================ a reply


class MessagesReply:
    """The reply to a request, whole or as events. A part of another kind than the one before opens a new block."""

    id_prefix, is_chat, tail = "msg", True, ""
    error_body = staticmethod(error_body)

    def __init__(self, call: object):
        self.call, self.blocks, self.open = call, 0, None

    @classmethod
    def to_chat(cls, body: dict, stored: object = None) -> dict:
        """A request of Messages -> the same as a body of chat completions. HTTPError 400 names the field."""
        return to_chat(body)

    def _message(self, content, finish_reason=None, stop_text=None):
        usage, cached = self.call.usage(), self.call.cached_tokens
        reason = None
        if finish_reason is not None:
            stopped = "end_turn" if stop_text is None else "stop_sequence"
            reason = STOP_REASONS.get(finish_reason, stopped)
        return {
            "id": self.call.id,
            "type": "message",
            "role": "assistant",
            "model": self.call.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop_text if reason == "stop_sequence" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"] - cached,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached,
                "output_tokens": usage["completion_tokens"],
            },
        }

    def whole(self, choices: dict) -> dict:
        """{0: [ChoiceDelta, …]} -> the message."""
        (deltas,) = choices.values()
        content = []
        for part in (part for delta in deltas for part in delta.parts):
            kind, value = next(iter(part.items()))
            if kind == "tool_calls":
                for call in value:
                    arguments = json.loads(call["function"]["arguments"])
                    block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"]}
                    content.append(block | {"input": arguments})
                continue
            name = "thinking" if kind == "reasoning_content" else "text"
            if not content or content[-1]["type"] != name:
                content.append({"type": name, name: ""} | ({"signature": ""} if name == "thinking" else {}))
            content[-1][name] += value
        return self._message(content, deltas[-1].finish_reason, deltas[-1].stop_text)

    def begin(self) -> list[dict]:
        return [{"type": "message_start", "message": self._message([])}]

    def events(self, delta: object) -> list[dict]:
        events = []
        for part in delta.parts:
            kind, value = next(iter(part.items()))
            if kind == "tool_calls":
                for call in value:
                    block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
                    events += [*self._close(), *self._open(block)]
                    for piece in pieces_of(call["function"]["arguments"]):
                        events.append(self._change({"type": "input_json_delta", "partial_json": piece}))
                    events += self._close()
                continue
            name = "thinking" if kind == "reasoning_content" else "text"
            if self.open != name:
                block = {"type": name, name: ""} | ({"signature": ""} if name == "thinking" else {})
                events += [*self._close(), *self._open(block)]
            events.append(self._change({"type": f"{name}_delta", name: value}))
        if delta.finish_reason:
            message = self._message([], delta.finish_reason, delta.stop_text)
            change = {key: message[key] for key in ("stop_reason", "stop_sequence")}
            events += [*self._close(), {"type": "message_delta", "delta": change, "usage": message["usage"]}]
        return events

    def end(self) -> list[dict]:
        return [{"type": "message_stop"}]

    def failed(self, error: HTTPError) -> list[dict]:
        return [error_body(error)]

    def _open(self, block):
        self.open = block["type"]
        return [{"type": "content_block_start", "index": self.blocks, "content_block": block}]

    def _change(self, change):
        return {"type": "content_block_delta", "index": self.blocks, "delta": change}

    def _close(self):
        if self.open is None:
            return []
        self.open, self.blocks = None, self.blocks + 1
        return [{"type": "content_block_stop", "index": self.blocks - 1}]

    @staticmethod
    def bytes_of(event: dict) -> str:
        """A server-sent event."""
        return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"
