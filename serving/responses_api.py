"""OpenAI's Responses: its requests as bodies of chat completions, and its replies as items.

    body = ResponsesReply.to_chat(parse_body(data), stored)      # what openai_api.py reads
    reply = ResponsesReply(call)                                 # call: openai_api.APICall
    reply.whole(choices), or reply.begin(), reply.events(delta), …, reply.end()

Names and shapes are those of https://platform.openai.com/docs/api-reference/responses.
"""

import collections
import json
import uuid

from formats.files import brief
from formats.tool_calls import pieces_of
from serving.fields import APIError, bad_request, error_body, take_field, unknown_field
from serving.http_server import HTTPError

MAX_STORED, MAX_STORED_BYTES = 256, 64 << 20  # responses that previous_response_id can name; the oldest go first
# Fields that are copied to the body of the chat, and those that change no answer here.
SAME = "model stream temperature top_p parallel_tool_calls seed chat_template_kwargs thinking_token_budget".split()
HARMLESS = """input instructions max_output_tokens tools tool_choice text reasoning previous_response_id store metadata
    user include service_tier prompt_cache_key prompt_cache_retention safety_identifier stream_options client_metadata
    truncation background max_tool_calls top_logprobs""".split()
INCLUDED = ("reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
            "web_search_call.action.sources", "code_interpreter_call.outputs", "message.input_image.image_url",
            "computer_call_output.output.image_url")  # fmt: skip
VERBOSITIES = ("low", "medium", "high")
REFUSED_VALUES = {"background": (False,), "truncation": ("disabled",), "max_tool_calls": (), "top_logprobs": (0,)}
ROLES = ("user", "assistant", "system", "developer")


class StoredResponses:
    """Finished responses and their conversations, for GET and previous_response_id. They are in memory alone."""

    def __init__(self):
        self.messages, self.responses, self.sizes = collections.OrderedDict(), {}, {}

    def keep(self, call: object, response: dict | None) -> None:
        """response: what the client got, of a call that may be gone on with."""
        if response is None or response.get("object") != "response" or call.body.get("store") is False:
            return
        reply = [message for i, item in enumerate(response["output"]) for message in _messages(item, f"output[{i}]")]
        system = {"system"} if call.body.get("instructions") else set()  # instructions are of one response alone
        messages = [m for i, m in enumerate(call.chat["messages"]) if i or m["role"] not in system] + merged(reply)
        self.messages[call.id], self.responses[call.id] = messages, response
        self.sizes[call.id] = len(json.dumps([messages, response]))
        while len(self.messages) > MAX_STORED or sum(self.sizes.values()) > MAX_STORED_BYTES:
            self.delete(next(iter(self.messages)))

    def get(self, name: str) -> dict:
        """A finished response. HTTPError 404."""
        if name not in self.responses:
            found = f"{brief(name)} is not kept; the last {MAX_STORED} are, until the server ends"
            raise APIError(404, f"response_id: {found}", "response_not_found", "response_id")
        return self.responses[name]

    def delete(self, name: str) -> dict:
        """Forget a response; the object that says so. HTTPError 404."""
        self.get(name)
        del self.messages[name], self.responses[name], self.sizes[name]
        return {"id": name, "object": "response.deleted", "deleted": True}

    def before(self, name: str | None) -> list[dict]:
        """The messages up to a response. HTTPError 404."""
        messages = [] if name is None else self.messages.get(name)
        if messages is None:
            found = f"previous_response_id: {brief(name)} is not kept; the last {MAX_STORED} are, until the server ends"
            error = bad_request(found, "previous_response_id", "previous_response_not_found")
            error.status = 404
            raise error
        return messages


# ============================================================================================ a request


def _content(content, where):
    """A string or parts of text -> str."""
    parts = content if isinstance(content, list) else [{"type": "input_text", "text": content}]
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") in ("input_text", "output_text", "text", "reasoning_text")
        if not is_text or not isinstance(part.get("text"), str):
            raise bad_request(f"{where}: only text is supported, found {brief(part)}", "input")
    return "".join(part["text"] for part in parts)


def _messages(item, where):
    """An item of the input -> the messages of a chat."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        if item.get("role") not in ROLES:
            raise bad_request(f"{where}: the role must be one of {', '.join(ROLES)}, found {brief(item)}", "input")
        return [{"role": item["role"], "content": _content(item.get("content"), where)}]
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}]
    if kind == "function_call_output":
        content = _content(item.get("output"), where)
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": content}]
    if kind == "reasoning":
        text = _content(item.get("content") or [], where)
        return [{"role": "assistant", "content": "", "reasoning_content": text}] if text else []
    raise bad_request(f"{where}: items of this kind are not supported, found {brief(item)}", "input")


def merged(messages: list[dict]) -> list[dict]:
    """Neighboring messages of the assistant, as items have them, become one."""
    joined = []
    for message in messages:
        if message["role"] == "assistant" and joined and joined[-1]["role"] == "assistant":
            last = dict(joined[-1])
            last["content"] += message["content"]
            for key in ("tool_calls", "reasoning_content"):
                if key in message:
                    last[key] = last[key] + message[key] if key in last else message[key]
            joined[-1] = last
        else:
            joined.append(message)
    return joined


def _tools(body):
    tools = []
    for i, tool in enumerate(take_field(body, "tools", list) or []):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            found = f"the type {brief(tool['type'])}" if isinstance(tool, dict) and "type" in tool else brief(tool)
            raise bad_request(f'tools[{i}]: only the type "function" is supported, found {found}', "tools")
        function = {
            key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None
        }
        tools.append({"type": "function", "function": function})
    if not tools:
        return {}
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return {"tools": tools, "tool_choice": choice}


def _parts(deltas):
    """[(kind, value)] of all parts, neighbors of text joined."""
    joined = []
    for kind, value in (pair for delta in deltas for part in delta.parts for pair in part.items()):
        if joined and joined[-1][0] == kind:
            joined[-1] = kind, joined[-1][1] + value
        else:
            joined.append((kind, value))
    return joined


# ============================================================================================ a reply


class ResponsesReply:
    """The reply to a request, whole or as events. A part of another kind than the one before opens a new item."""

    id_prefix, is_chat, tail = "resp", True, ""
    error_body = staticmethod(error_body)

    def __init__(self, call: object):
        self.call, self.number, self.output, self.finish_reason = call, 0, [], None

    @classmethod
    def to_chat(cls, body: dict, stored: StoredResponses) -> dict:
        """A request of Responses -> the same as a body of chat completions. HTTPError 400 names the field."""
        for name, value in body.items():
            harmless, known = REFUSED_VALUES.get(name), (*SAME, *HARMLESS)
            if name not in known or (harmless is not None and value not in (None, *harmless)):
                raise unknown_field(name, known, harmless is not None or value is None)
        for i, value in enumerate(take_field(body, "include", list) or []):
            if value not in INCLUDED:
                raise bad_request(f"include[{i}]: {brief(value)} is not supported", "include", "unsupported_parameter")
        chat = {key: body[key] for key in SAME if key in body}
        chat["max_tokens"] = take_field(body, "max_output_tokens", int, 1, 2**31)
        given = body.get("input")
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        if not isinstance(items, list) or not items:
            raise bad_request(f"input: must be a string or a list of items, found {brief(given)}", "input")
        messages = list(stored.before(take_field(body, "previous_response_id", str)))
        if instructions := take_field(body, "instructions", str):
            messages.insert(0, {"role": "system", "content": instructions})
        messages += [message for i, item in enumerate(items) for message in _messages(item, f"input[{i}]")]
        chat["messages"] = merged(messages)
        reasoning, text = take_field(body, "reasoning", dict) or {}, take_field(body, "text", dict) or {}
        if reasoning.get("effort") is not None:
            chat["reasoning_effort"] = reasoning["effort"]
        if text.get("verbosity") not in (None, *VERBOSITIES):
            found = f"must be one of {', '.join(VERBOSITIES)}, found {brief(text['verbosity'])}"
            raise bad_request(f"text.verbosity: {found}", "text")
        if text.get("format") is not None:
            chat["response_format"] = text["format"]
        return chat | _tools(body)

    def _response(self, status):
        call, body = self.call, self.call.body
        usage, is_cut = call.usage(), self.finish_reason == "length"
        done = status in ("completed", "incomplete")
        return {
            "id": call.id,
            "object": "response",
            "created_at": call.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": call.model,
            "output": self.output if done else [],
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": body.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None} | (body.get("reasoning") or {}),
            "store": body.get("store") is not False,
            "temperature": body.get("temperature", 1.0),
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p", 1.0),
            "truncation": "disabled",
            "metadata": body.get("metadata") or {},
            "user": body.get("user"),
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": call.cached_tokens},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": call.reasoning_tokens},
                "total_tokens": usage["total_tokens"],
            }
            if done
            else None,
        }

    def _status(self):
        return "incomplete" if self.finish_reason == "length" else "completed"

    def whole(self, choices: dict) -> dict:
        """{0: [ChoiceDelta, …]} -> the response."""
        (deltas,) = choices.values()
        self.finish_reason = deltas[-1].finish_reason
        for kind, value in _parts(deltas):
            for item in self._items(kind, value):
                self.output.append(self._filled(item, kind, value))
        return self._response(self._status())

    def _items(self, kind, value):
        """New items, empty."""
        if kind == "tool_calls":
            fixed = {"type": "function_call", "status": "in_progress"}
            return [
                fixed | {"id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"], **call["function"]} for call in value
            ]
        if kind == "reasoning_content":
            item = {"type": "reasoning", "id": f"rs_{uuid.uuid4().hex}", "summary": [], "content": []}
        else:
            item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "content": []}
        return [item | {"status": "in_progress"}]

    def _filled(self, item, kind, text):
        """The item as it is at its end."""
        item = {**item, "status": self._status()}
        return item if kind == "tool_calls" else {**item, "content": [_part(kind, text)]}

    # ---- as events
    def _event(self, kind, **fields):
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **fields}

    def begin(self) -> list[dict]:
        self.open = None  # (kind, item, text so far) of the item that is being written
        return [
            self._event("response.created", response=self._response("in_progress")),
            self._event("response.in_progress", response=self._response("in_progress")),
        ]

    def events(self, delta: object) -> list[dict]:
        events = []
        for kind, value in (pair for part in delta.parts for pair in part.items()):
            if kind == "tool_calls":
                for item in self._items(kind, value):
                    events += [*self._close(), *self._open(kind, {**item, "arguments": ""})]
                    self.open = kind, item, item["arguments"]
                    for piece in pieces_of(item["arguments"]):
                        events.append(self._change("response.function_call_arguments.delta", delta=piece))
                    events += self._close()
                continue
            if self.open is None or self.open[0] != kind:
                events += self._close()
                events += self._open(kind, self._items(kind, value)[0])
            self.open = kind, self.open[1], self.open[2] + value
            name = f"response.{'output_text' if kind == 'content' else 'reasoning_text'}.delta"
            more = {"logprobs": []} if kind == "content" else {}
            events.append(self._change(name, content_index=0, delta=value, **more))
        if delta.finish_reason:
            self.finish_reason = delta.finish_reason
            events += self._close()
        return events

    def end(self) -> list[dict]:
        status = self._status()
        return [self._event(f"response.{status}", response=self._response(status))]

    def failed(self, error: HTTPError) -> list[dict]:
        failure = {"code": error.code or "server_error", "message": error.message}
        return [self._event("response.failed", response=self._response("failed") | {"error": failure})]

    def _change(self, kind, **fields):
        return self._event(kind, item_id=self.open[1]["id"], output_index=len(self.output), **fields)

    def _open(self, kind, item):
        self.open = kind, item, ""
        events = [self._event("response.output_item.added", output_index=len(self.output), item=item)]
        if kind != "tool_calls":
            events.append(self._change("response.content_part.added", content_index=0, part=_part(kind, "")))
        return events

    def _close(self):
        if self.open is None:
            return []
        kind, item, text = self.open
        if kind == "tool_calls":
            done = {"arguments": text, "name": item["name"]}
            events = [self._change("response.function_call_arguments.done", **done)]
        else:
            name, more = ("output_text", {"logprobs": []}) if kind == "content" else ("reasoning_text", {})
            events = [self._change(f"response.{name}.done", content_index=0, text=text, **more)]
            events.append(self._change("response.content_part.done", content_index=0, part=_part(kind, text)))
        item = self._filled(item, kind, text)
        events.append(self._event("response.output_item.done", output_index=len(self.output), item=item))
        self.output.append(item)
        self.open = None
        return events

    @staticmethod
    def bytes_of(event: dict) -> str:
        """A server-sent event."""
        return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"


def _part(kind, text):
    if kind == "reasoning_content":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
