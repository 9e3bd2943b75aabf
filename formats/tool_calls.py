"""A reply as the model writes it -> what an OpenAI client reads: content, reasoning_content and tool_calls.

    parse_reply('<tool_call>\\n{"name": "now", "arguments": {}}\\n</tool_call>', "hermes")["tool_calls"]
    stream = ReplyStream("hermes")                     # the same of a reply that is still being written
    stream.push("Let me "), stream.finish()            # lists of deltas

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


def style_of(template: object | None) -> str | None:
    """tool_style() of a tokenizer's chat template; None without a template or a form known here."""
    return tool_style(template_source(template))


def template_source(template: object | None) -> str:
    """The Jinja source of a tokenizer's chat template, "" for one that has none."""
    source = getattr(template, "source", None)
    return template.jinja() if source is None and hasattr(template, "jinja") else source or ""


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
    calls = []

    def take(match):  # a block that is no call stays
        call = _json_call(match.group(1))
        calls.extend([call] if call else [])
        return "" if call else match.group()

    content = HERMES_CALL.sub(take, text)
    return (content.rstrip("\n"), calls) if calls else (text, [])


def _llama3(text):
    call = _json_call(text.strip().removeprefix("<|python_tag|>"), "parameters")
    return _whole(text, "", [call])


def _mistral(text):
    content, _, listed = text.partition("[TOOL_CALLS]")
    try:
        listed = json.loads(listed)
    except (ValueError, RecursionError):
        listed = []
    return _whole(text, content.rstrip(), [_json_call(call) for call in listed] if isinstance(listed, list) else [])


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


# =============================================================================================== as it is written


class ReplyStream:
    """A reply as it is written -> deltas, whose sums are parse_reply() of the whole text.

    A delta is {"reasoning_content": text}, {"content": text} or {"tool_calls": [call]}, a call in OpenAI's form with
    its `index`. Text comes as soon as it cannot be the beginning of a mark any more. A call comes as a whole: only
    then is it known to be one. Thoughts without their opening mark are found only with `thinks`.
    """

    def __init__(self, style: str | None, thinks: bool = False):
        self.style, self.thinks = style, thinks
        self.text, self.part, self.calls = "", "thoughts" if thinks else "start", 0
        self.has_thoughts = self.has_content = False
        self.blank = ""  # ends of lines that belong to the content if more of it follows

    def push(self, text: str) -> list[dict]:
        """More of the reply -> the deltas that are certain now."""
        self.text += text
        deltas, part = [], None
        while part != self.part:
            part = self.part
            deltas += getattr(self, f"_{part}")()
        return [delta for delta in deltas if any(delta.values())]

    def finish(self) -> list[dict]:
        """The deltas of what was held back, at the reply's end."""
        deltas = []
        if self.part == "start":
            self.part = "content"
            deltas += self._content()
        if self.part == "thoughts":
            deltas.append({"reasoning_content": self._thoughts_text(self.text).rstrip("\n")})
        elif self.part == "held":
            content, calls = _CALLS[self.style](self.text)
            deltas += [{"content": content if calls else self.blank + content}, *map(self._numbered, calls)]
        else:
            rest = self.blank + self.text
            deltas.append({"content": rest.rstrip("\n") if self.calls else rest})
        self.text = ""
        return [delta for delta in deltas if any(delta.values())]

    def _numbered(self, call):
        self.calls += 1
        return {"tool_calls": [{"index": self.calls - 1, **call}]}

    def _start(self):
        opened = self.text.lstrip()
        if opened.startswith("<think>"):
            self.text, self.part = opened.removeprefix("<think>"), "thoughts"
        elif not "<think>".startswith(opened):
            self.part = "content"
        return []

    def _thoughts(self):
        before, mark, behind = self.text.partition("</think>")
        if mark:
            self.text, self.part = behind, "gap"
            return [{"reasoning_content": self._thoughts_text(before).rstrip("\n")}]
        sure = len(self.text) - _begun(self.text, "</think>")
        sure = len(self.text[:sure].rstrip("\n"))
        text, self.text = self.text[:sure], self.text[sure:]
        return [{"reasoning_content": self._thoughts_text(text)}]

    def _thoughts_text(self, text):
        if not self.has_thoughts:
            text = text.lstrip("\n")
            self.has_thoughts = bool(text)
        return text

    def _gap(self):
        self.text = self.text.lstrip("\n")
        self.part = "content" if self.text else "gap"
        return []

    def _content(self):
        if self.style is None:
            return self._take(len(self.text))
        if self.style == "hermes":
            return self._hermes_content()
        if self.style in ("llama3", "glm-4") and not self.has_content:  # a call is all of the reply
            opened = self.text.lstrip()
            marks = ("{", "<|python_tag|>") if self.style == "llama3" else ("",)
            if any(opened.startswith(mark) or mark.startswith(opened) for mark in marks):
                self.part = "held" if any(opened.startswith(mark) for mark in marks) else self.part
                return []
        mark = {"mistral": "[TOOL_CALLS]", "deepseek": "<｜tool▁calls▁begin｜>"}.get(self.style)
        if mark is None:
            return self._take(len(self.text))
        before, found, _ = self.text.partition(mark)
        if found:
            self.part = "held"
            deltas = self._take(len(before))
            if self.style == "deepseek":  # there they belong to the content before calls
                self.text, self.blank = self.blank + self.text, ""
            return deltas
        return self._take(len(self.text) - _begun(self.text, mark))

    def _held(self):
        return []

    def _hermes_content(self):
        deltas = []
        while True:
            before, mark, behind = self.text.partition("<tool_call>")
            deltas += self._take(len(before) if mark else len(self.text) - _begun(self.text, "<tool_call>"))
            match = HERMES_CALL.match(self.text) if mark else None
            if match is None:
                return deltas
            call = _json_call(match.group(1))
            if call:
                self.text = self.text[match.end() :]
                deltas.append(self._numbered(call))
            else:
                deltas += self._take(match.end())

    def _take(self, count):
        """The first `count` characters become content, but for line ends behind which nothing has come yet."""
        text, self.text = self.text[:count], self.text[count:]
        return self._content_text(text)

    def _content_text(self, text):
        self.has_content = self.has_content or bool(text)
        if self.style not in ("hermes", "mistral", "deepseek"):
            return [{"content": text}]
        text = self.blank + text
        kept = text.rstrip() if self.style == "mistral" else text.rstrip("\n")
        self.blank = text[len(kept) :]
        return [{"content": kept}]


ARGUMENT_CHARACTERS = 64  # of one delta, as clients are used to from models that write them token by token


def pieces_of(arguments: str) -> list[str]:
    """The JSON text of a call's arguments in pieces of at most ARGUMENT_CHARACTERS."""
    return [arguments[at : at + ARGUMENT_CHARACTERS] for at in range(0, len(arguments), ARGUMENT_CHARACTERS)]


def argument_deltas(delta: dict) -> list[dict]:
    """A delta of ReplyStream -> those that OpenAI streams: of a call, first all but the arguments, then these in
    pieces."""
    deltas = []
    for call in delta.get("tool_calls", ()):
        deltas.append({"tool_calls": [call | {"function": call["function"] | {"arguments": ""}}]})
        for piece in pieces_of(call["function"]["arguments"]):
            deltas.append({"tool_calls": [{"index": call["index"], "function": {"arguments": piece}}]})
    return deltas or [delta]


def _begun(text, mark):
    """How many characters at the end of the text may be the beginning of the mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
