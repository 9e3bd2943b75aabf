"""Structured output: what a request asks of its reply's form -> the Guide that the sampler follows.

guide = constraint_from(tokenizer, response_format={"type": "json_schema", "json_schema": {"schema": {…}}})
SamplingParams(max_tokens=200, guide=guide)
"""

import collections
import json
import re

from formats.files import UserError, brief
from formats.tool_calls import STYLES
from serving.automaton import EPSILON
from serving.guide import Guide, vocabulary_of
from serving.patterns import Characters, compile_pattern
from serving.schema import compile_schema

MAX_CHOICES = 10_000


def constraint_from(
    tokenizer: object,
    response_format: dict | None = None,
    *,
    json_schema: object = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    tools: list[dict] | None = None,
    tool_choice: object = "auto",
    parallel_tool_calls: bool = True,
    style: str | None = None,
    thinking: str | None = None,
    field_names: dict | None = None,
) -> Guide | None:
    """What a request asks of the reply's form -> the Guide for SamplingParams.guide, None if it asks nothing.

    response_format: {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": …}}
    (or with "schema" beside "type", as in /v1/responses). json_schema (a schema, or its JSON text), regex, choice:
    vLLM's guided_* and structured_outputs. Of these four one may be given.
    tools: OpenAI's list; style: formats.tool_calls.tool_style of the template. tool_choice: "none", "auto", "required"
    or {"type": "function", "function": {"name": …}}. With auto and a strict tool the reply is free text until it begins
    a call; what follows is a call in the style's form, its arguments by the tool's schema (an object, if the tool is
    not strict). Without a strict tool, auto asks nothing. With required or a name the reply is calls alone. With a
    response_format, auto means: either the one or calls.
    thinking: "open" if the prompt has opened <think>, "optional" if the reply may do so; it is free until </think>.

    Takes up to a second for the first request of a tokenizer, and milliseconds for a schema that is new: call it
    outside of the event loop. UserError "FIELD: #/pointer: problem" names the field of the request: response_format,
    json_schema, regex, choice, tools or tool_choice, or what field_names has in place of one.
    """
    given = {"json_schema": json_schema, "regex": regex, "choice": choice}
    answer = _answer(response_format, given, field_names or {})
    called = _tools_called(tools, tool_choice, answer is not None)
    if answer is None and called is None:
        return None
    if called and style not in STYLES:
        found = "no form known here" if style is None else brief(style)
        raise UserError(f"tool_choice: the chat template writes calls in {found}; known are {', '.join(STYLES)}")
    vocabulary = vocabulary_of(tokenizer)
    mode, functions = called or (None, [])
    key = json.dumps([answer and answer[1:], mode, functions, parallel_tool_calls, style, thinking])

    def build(terms):
        writer = _Writer(terms, vocabulary)
        reply = None if answer is None else _named(answer[0], writer.answer, *answer[1:])
        if called:
            calls = writer.calls(style, functions, parallel_tool_calls)
            if mode == "auto":
                reply = (
                    writer.free_or_calls(style, functions, calls) if reply is None else terms.alt((reply, calls.all))
                )
            else:
                reply = calls.all
        return writer.after_thoughts(reply, thinking)

    return vocabulary.guide(key, build)


def constraint_of(body: dict, tokenizer: object, **tools: object) -> Guide | None:
    """The same of a request's fields: response_format, vLLM's guided_json, guided_regex, guided_choice, and its newer
    structured_outputs {"json" | "regex" | "choice" | "json_object": …}; llama.cpp's json_schema. tools: as for
    constraint_from."""
    given, field_names = {}, {}

    def ask(kind, value, field):
        if value is not None and kind in given:
            raise UserError(f"{field}: not together with {field_names[kind]}")
        if value is not None:
            given[kind], field_names[kind] = value, field

    for field in ("json_schema", "guided_json", "guided_regex", "guided_choice"):  # the first is llama.cpp's
        kind = "json_schema" if field.endswith("json") else field.removeprefix("guided_")
        ask(kind, body.get(field), field)
    outputs = body.get("structured_outputs") or {}
    if not isinstance(outputs, dict):
        raise UserError(f"structured_outputs: an object is expected, found {brief(outputs)}")
    kinds = {"json": "json_schema", "json_object": "json_schema", "regex": "regex", "choice": "choice"}
    for key, value in outputs.items():
        if value is not None and key not in kinds:
            raise UserError(f"structured_outputs: {brief(key)} is not supported; known are {', '.join(kinds)}")
        if key == "json_object":
            value = {"type": "object"} if value else None
        ask(kinds.get(key), value, "structured_outputs")
    return constraint_from(tokenizer, body.get("response_format"), **given, **tools, field_names=field_names)


def _named(field, function, *args):
    try:
        return function(*args)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def _answer(response_format, given, field_names):
    """(field, kind, value) of what is asked for, None for free text."""
    kind = None
    if response_format is not None:
        kind = response_format.get("type") if isinstance(response_format, dict) else response_format
        if kind not in ("text", "json_object", "json_schema"):
            known = "text, json_object or json_schema"
            raise UserError(f"response_format: the type must be {known}, found {brief(kind)}")
    asked = [("response_format", kind, response_format)] if kind not in (None, "text") else []
    asked += [(field_names.get(name, name), name, value) for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise UserError(f"{asked[1][0]}: not together with {asked[0][0]}")
    return (*asked[0][:2], _checked(*asked[0])) if asked else None


def _checked(field, kind, value):
    """The value that was given for a kind of answer, as _Writer.answer takes it."""
    if field == "response_format" and kind == "json_schema":
        inner = value.get("json_schema", value)
        value = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(value, dict | bool):
            raise UserError(f"response_format: json_schema.schema: a schema is expected, found {brief(value)}")
    if kind == "json_object":
        value = {"type": "object"}
    if kind == "json_schema" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{field}: not JSON: {error}") from None
    if kind == "regex" and not isinstance(value, str):
        raise UserError(f"{field}: a string is expected, found {brief(value)}")
    if kind == "choice":
        is_right = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
        if not is_right or not 0 < len(value) <= MAX_CHOICES:
            raise UserError(f"{field}: a list of 1 to {MAX_CHOICES:,} texts that are not empty is expected")
    return value


def _tools_called(tools, tool_choice, has_answer):
    """("auto", "required" or "named", [(place, name, schema)]), None if calls are not constrained."""
    if not tools or tool_choice == "none":
        return None
    functions = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[^\s\"\\{}\[\]<>]{1,128}", name):
            raise UserError(f"tools: [{i}].function.name: a name is expected, found {brief(name)}")
        schema = function.get("parameters")
        schema = {"type": "object", "properties": {}} if schema in (None, {}) else schema
        functions.append((f"tools: [{i}].function.parameters", name, schema, function.get("strict") is True))
    if tool_choice in (None, "auto"):
        if not has_answer and not any(strict for *_, strict in functions):
            return None
        rows = [(place, name, schema if strict else {"type": "object"}) for place, name, schema, strict in functions]
        return "auto", rows
    if tool_choice in ("required", "any"):
        return "required", [row[:3] for row in functions]
    inner = tool_choice.get("function", tool_choice) if isinstance(tool_choice, dict) else {}
    name = inner.get("name") if isinstance(inner, dict) else None
    chosen = [row[:3] for row in functions if row[1] == name]
    if not chosen:
        known = ", ".join(row[1] for row in functions)
        expected = "none, auto, required or a function"
        raise UserError(f"tool_choice: {expected} is expected, found {brief(tool_choice)}; tools are {known}")
    return "named", chosen


_Calls = collections.namedtuple("_Calls", "opening rest all")  # terms: the first mark, what follows it, both


class _Writer:
    """Terms of replies."""

    def __init__(self, terms, vocabulary):
        self.terms, self.vocabulary = terms, vocabulary

    def text(self, text):
        """A text of the template, whose special tokens are themselves."""
        pattern = self.vocabulary._special_pattern
        parts = pattern.split(text) if pattern else [text]
        return self.terms.cat(
            *(
                self.terms.symbols(1 << (256 + self.vocabulary.special(part)))
                if i % 2
                else self.terms.literal(part.encode())
                for i, part in enumerate(parts)
            )
        )

    def answer(self, kind, value):
        if kind in ("json_object", "json_schema"):
            return compile_schema(self.terms, value)
        if kind == "regex":
            return compile_pattern(value, Characters(self.terms))
        return self.terms.alt(self.terms.literal(text.encode()) for text in value)

    def calls(self, style, functions, parallel):
        """The calls of a reply, without what ends it."""
        terms = self.terms
        bodies = []
        for place, name, schema in functions:
            arguments = _named(place, compile_schema, terms, schema)
            before, behind = {
                "hermes": ('\n{"name": "%s", "arguments": ', "}\n</tool_call>"),
                "llama3": ('{"name": "%s", "parameters": ', "}"),
                "mistral": ('{"name": "%s", "arguments": ', "}"),
                "deepseek": ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n", "\n```<｜tool▁call▁end｜>"),
                "glm-4": ("%s\n", ""),
            }[style]
            bodies.append(terms.cat(self.text(before % name), arguments, self.text(behind)))
        call = terms.alt(bodies)
        opening, first, between, closing = {
            "hermes": ("<tool_call>", "", "\n<tool_call>", ""),
            "llama3": ("", "", None, ""),
            "mistral": ("[TOOL_CALLS]", "[", ", ", "]"),
            "deepseek": ("<｜tool▁calls▁begin｜>", "", "\n", "<｜tool▁calls▁end｜>"),
            "glm-4": ("", "", "<|assistant|>", ""),
        }[style]
        more = terms.repeat(terms.cat(self.text(between), call)) if parallel and between else EPSILON
        first = terms.cat(terms.optional(terms.literal(b" ")), self.text(first)) if style == "mistral" else EPSILON
        rest = terms.cat(first, call, more, self.text(closing))
        opening = self.text(opening)
        return _Calls(opening, rest, terms.cat(opening, rest))

    def free_or_calls(self, style, functions, calls):
        """Free text, or free text and then calls."""
        terms = self.terms
        anything, blanks = terms.everything, terms.repeat(terms.byte_set(b" \n"))
        if style == "llama3":
            opened = terms.cat(blanks, terms.optional(self.text("<|python_tag|>")), terms.literal(b'{"name"'))
        elif style == "glm-4":
            names = terms.alt(self.text(name) for _, name, _ in functions)
            opened = terms.cat(blanks, names, terms.literal(b"\n"))
        else:
            symbol = terms.symbols(terms.all_symbols)
            opened = terms.cat(anything, calls.opening)
            until = terms.both((opened, terms.complement(terms.cat(opened, symbol, anything))))
            return terms.alt((terms.complement(terms.cat(opened, anything)), terms.cat(until, calls.rest)))
        return terms.alt((terms.complement(terms.cat(opened, anything)), calls.all))

    def after_thoughts(self, reply, thinking):
        if thinking not in ("open", "optional"):
            return reply
        terms, end = self.terms, self.text("</think>")
        thoughts = terms.cat(terms.everything, end)
        until = terms.both(
            (thoughts, terms.complement(terms.cat(thoughts, terms.symbols(terms.all_symbols), terms.everything)))
        )
        after = terms.cat(until, terms.repeat(terms.literal(b"\n"), 0, 2), reply)
        return after if thinking == "open" else terms.alt((reply, terms.cat(self.text("<think>"), after)))
