"""Jinja chat templates: messages -> text -> prompt segments, in which the replies to learn are told apart.

    template = RenderedTemplate(source, "chat_template.jinja")
    text = template.render([{"role": "user", "content": "Hi"}], tokenizer, add_generation_prompt=True)
    segments = template.divided(*conversation([("Hi", "Hello!"), ("Bye", None)], {}), {}, tokenizer)

What is learned: what {% generation %} blocks mark, where the template has them; else every reply whose prompt the whole
conversation begins with exactly as it would be served. Replies behind another prompt are shown and not learned, such as
those before which a template drops the thoughts or the tools of earlier turns.
"""

import contextvars
import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from formats.files import UserError, brief
from formats.progress import AbortedWork, check_progress

# ============================== the sandbox ==============================

SPAN = "\ufdd0", "\ufdd1"  # stand around {% generation %} blocks in a marked rendering: no characters of any text
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _Missing(jinja2.Undefined):
    """A variable that a record does not give: false in a condition, an error where its text is expected."""

    def __str__(self) -> str:
        self._fail_with_undefined_error()


class _Generation(Extension):
    """{% generation %} marks what is learned; the text around it is the same with and without."""

    tags = {"generation"}
    marks = "", ""

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller):
        return self.marks[0] + caller() + self.marks[1]


class _MarkedGeneration(_Generation):
    marks = SPAN


MOST_TURNS = 10_000_000  # of the loops and macros of one rendering, some ten seconds
_turns = contextvars.ContextVar("turns")


class TemplateTooLong(jinja2.TemplateError):
    """Trying the messages in another form would take as long again."""


class _CountTurns(Extension):
    """Counts the turns of loops and the calls of macros: a template must end, whatever it says."""

    def _count(self):
        turns = _turns.get()
        turns[0] += 1
        if turns[0] % 4096 == 0:
            check_progress.get()(0)
            if turns[0] > MOST_TURNS:
                raise TemplateTooLong(f"its loops and macros run more than {MOST_TURNS:,} times")
        return ""

    def count_in(self, tree):
        for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            node.body.insert(0, jinja2.nodes.ExprStmt(self.call_method("_count")).set_lineno(node.lineno))
        return tree


class _BoundedTemplate(jinja2.Template):
    def render(self, *args, **kwargs):
        before = _turns.set([0])
        try:
            return super().render(*args, **kwargs)
        finally:
            _turns.reset(before)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    template_class = _BoundedTemplate

    def _parse(self, source, name, filename):
        return self.extensions[_CountTurns.identifier].count_in(super()._parse(source, name, filename))


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# PaddleNLP's documentation writes {{ system | 'text' }} for {{ system | default('text') }}.
PADDLENLP_DEFAULT = re.compile(r"""(\{\{[^{}]*?\|\s*)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")


@lru_cache(maxsize=64)
def compile_template(source: str, where: str, paddlenlp: bool = False, marked: bool = False) -> jinja2.Template:
    """A template is somebody else's program: it runs in jinja2's sandbox, with what transformers gives to it.

    paddlenlp: keeps the last line break and refuses to print a variable that is not there, as PaddleNLP does.
    marked: what {% generation %} blocks write stands between SPAN. UserError when the text is not Jinja.
    """
    options = {}
    if paddlenlp:
        options = {"keep_trailing_newline": True, "undefined": _Missing}
        source = PADDLENLP_DEFAULT.sub(r"\1default(\2)", source)
    extensions = [_MarkedGeneration if marked else _Generation, _CountTurns, loopcontrols]
    env = _BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, **options)
    env.filters["tojson"] = _to_json
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda text: datetime.now().strftime(text)}
    try:
        return env.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: not a Jinja template: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class PromptSegment(NamedTuple):
    """A stretch of a conversation on its way to ids.

    part: 0 the beginning, 1 + 2 k what stands before the reply of turn k, 2 + 2 k that reply, which is learned.
    kind: "text": adjacent segments of this kind are read as one text, special tokens in it included (Hugging Face reads
    a rendered template so); "separate": a text encoded by itself; "verbatim": the same, but special tokens in it are
    ordinary characters; "token": one token.
    """

    part: int
    kind: str
    text: str | int  # of a token its text or its id


# ============================== templates ==============================

EXACT_ROUNDS = 16  # up to here every beginning of a conversation is rendered; beyond it is tried by windows
MOST_RENDERED_ROUNDS = 500  # up to here every beginning is rendered if the windows do not fit


class RenderedTemplate:
    """A Jinja chat template as transformers has it. not_learned: replies that were shown and not learned so far."""

    def __init__(self, source: str, where: str):
        if not isinstance(source, str):
            raise UserError(f"{where}: chat_template must be a text, found {brief(source)}")
        self.source, self.name, self.not_learned = source, where, 0
        self.marks_replies = GENERATION_BLOCK.search(source) is not None

    def missing(self, tokenizer) -> str | None:
        """As in transformers: what is no token of the vocabulary is ordinary text."""
        return None

    def render(
        self, messages: list, tokenizer, add_generation_prompt: bool, context: dict | None = None, marked: bool = False
    ) -> str:
        """Messages -> text; context: {"tools"?: list, "chat_template_kwargs"?: dict}.

        Arguments of tool calls are objects and a content is text. A template that fails with these, or leaves calls or
        the last question out, gets JSON text, null or text parts. UserError when it refuses the messages or fails.
        """
        context = context or {}
        template = compile_template(self.source, self.name, marked=marked)
        names = [f"{name}_token" for name in ("bos", "eos", "unk", "pad")]
        variables = {name: token for name in names if (token := getattr(tokenizer, name, None)) is not None}
        kwargs = context.get("chat_template_kwargs") or {}
        if not isinstance(kwargs, dict):
            raise UserError(f"chat_template_kwargs must be an object, found {brief(kwargs)}")
        variables |= {"tools": context.get("tools"), "documents": None, **kwargs}
        variables["add_generation_prompt"] = add_generation_prompt
        question = next((m["content"].strip() for m in reversed(messages) if m["role"] == "user"), "")
        functions = [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
        first_text = problem = None
        for form in FORMS if functions else (FORMS[0], FORMS[-1]):
            try:
                text = template.render(messages=[_in_form(message, *form) for message in messages], **variables)
            except TemplateTooLong as error:
                raise UserError(f"messages: {self.name} refuses this conversation: {error}") from None
            except AbortedWork:
                raise
            except Exception as error:  # somebody else's program: it may fail in any way
                problem = problem or one_line(error)
                continue
            if question in text and all(function in text for function in functions):
                return text
            first_text = first_text or text
            problem = problem or "it writes no tool calls"
        if first_text is not None and all(function in first_text for function in functions):
            return first_text  # the template changes what a user writes
        raise UserError(f"messages: {self.name} refuses this conversation: {problem}") from None

    def divided(
        self, messages: list, starts: list[int], context: dict, tokenizer, is_training=False, split=True
    ) -> list[PromptSegment]:
        """Messages and the number of them before each reply -> [PromptSegment, …]; the last reply may be missing.

        split: replies are told apart; otherwise only the last. UserError where the prompt to be served is not the
        beginning of the whole conversation and no block marks what is learned.
        """
        if context.get("tools") and "tools" not in self.source:
            raise UserError(f"messages: {self.name} has no tools; give a chat_template that has them")
        if starts[-1] == 0:
            raise UserError("messages[0]: expected a message that the assistant answers, found the assistant's")
        render = lambda messages, generate: self.render(messages, tokenizer, generate, context) if messages else ""
        prompt, is_finished = render(messages[: starts[-1]], True), len(messages) > starts[-1]
        whole = render(messages, False) if is_finished else prompt
        if self.marks_replies and (split or is_finished):
            marked = self.render(messages, tokenizer, not is_finished, context, marked=True)
            spans = self._marked_spans(marked, whole, len(starts), is_finished)
        elif whole.startswith(prompt):
            spans = [None] * (len(starts) - 1) + [(len(prompt), len(whole))]
            if split:
                spans[:-1] = find_replies(render, messages, starts, whole, len(prompt))
        else:
            raise UserError(
                f"{self.name}: this template's prompt is not the beginning of the finished conversation, so that "
                f"replies cannot be told apart; give another chat_template: docs/chat.md has the names"
            )
        if is_training:
            self.not_learned += spans[:-1].count(None)
        return _segments(whole, spans, is_finished and not self.marks_replies, tokenizer)

    def _marked_spans(self, marked, whole, count, is_finished):
        """The stretches of the whole that {% generation %} blocks write, one a reply: [(start, end), …]."""
        pieces = re.split("|".join(SPAN), marked)
        if "".join(pieces) != whole:
            raise UserError(f"messages: {self.name}: U+FDD0 and U+FDD1 are no characters of a text")
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece))
        spans = []
        for start, end in zip(ends[1::2], ends[2::2]):
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)  # such as an end mark in a block of its own
            elif end > start:
                spans.append((start, end))
        if not is_finished:
            spans.append((ends[-1], ends[-1]))
        if len(spans) != count:
            raise UserError(
                f"{self.name}: its generation blocks mark {len(spans)} stretches in a conversation of {count} replies; "
                "one for each is expected"
            )
        return spans


def _segments(whole, spans, needs_end, tokenizer):
    """A rendered text and the stretch of each reply, or None -> [PromptSegment, …]."""
    segments, done = [], 0
    for k, span in enumerate(spans):
        if span is not None:
            segments.append(PromptSegment(1 + 2 * k, "text", whole[done : span[0]]))
            if span[1] > span[0]:
                segments.append(PromptSegment(2 + 2 * k, "text", whole[span[0] : span[1]]))
            done = span[1]
    ended = not needs_end or segments[-1].text.rstrip().endswith(tuple(tokenizer.special))
    if not ended and tokenizer.eos_token is not None:
        segments.append(PromptSegment(segments[-1].part, "token", tokenizer.eos_token))  # a reply must end
    return segments


# Forms of a message: null for an empty content beside tool calls, arguments as JSON text, content as text parts.
FORMS = (False, False, False), (True, False, False), (False, True, False), (True, True, False), (False, False, True)


def _in_form(message, as_null, as_json, as_parts):
    """A message as some templates want it; reasoning also under the name that gpt-oss has for it."""
    changed = {"thinking": message["reasoning_content"]} if "reasoning_content" in message else {}
    changed |= message
    if as_null and "tool_calls" in message and message["content"] == "":
        changed["content"] = None
    if as_parts:
        changed["content"] = [{"type": "text", "text": message["content"]}]
    if as_json and "tool_calls" in message:
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _to_json(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return changed


# ============================== where the replies are ==============================


def find_replies(
    render: Callable, messages: list, starts: list[int], whole: str, prompt_length: int
) -> list[tuple[int, int] | None]:
    """Of all replies but the last: where each stands in the rendered conversation; None if its prompt was another.

    render: (messages, add_generation_prompt) -> text. starts: the number of messages before each reply. prompt_length:
    characters of the whole before the last reply. Every beginning of a short conversation is rendered. A long one is
    rendered by windows of two rounds, in a time that grows with its length; only if their texts, one after another, are
    not the whole, every beginning is.
    """
    if len(starts) > EXACT_ROUNDS and (spans := _replies_by_windows(render, messages, starts, whole, prompt_length)):
        return spans
    if len(starts) > MOST_RENDERED_ROUNDS:
        return [None] * (len(starts) - 1)
    return [_find_reply(render, messages[:end], start, whole) for start, end in zip(starts, starts[1:])]


def _find_reply(render, messages, start, whole):
    """(start, end) in the whole of the reply behind `start` messages; None if the whole does not begin with its prompt.

    messages: those before the next reply. A reply that is written otherwise while it is the last (Qwen3 gives it empty
    thoughts) ends where the end mark ends that stands behind any text in its place."""
    prompt = render(messages[:start], True)
    if not start or not whole.startswith(prompt):  # an answer to nothing is never served
        return None
    finished = render(messages[: start + 1], False)
    if whole.startswith(finished) and finished.startswith(prompt):
        return len(prompt), len(finished)
    following = render(messages, True)
    if not whole.startswith(following) or not following.startswith(prompt):
        return None
    other = [*messages[:start], {"role": "assistant", "content": "reply"}]
    end = render(other, False).rpartition("reply")[2]
    behind = render([*other, *messages[start + 1 :]], True)[len(prompt) :].partition("reply")[2]
    if not following.endswith(behind):
        return None
    if not behind.startswith(end):  # such as Phi-3's eos, which only the last has: what both have, in whole marks
        end = WHOLE_MARKS.match(commonprefix([behind, end]))[0]
    return len(prompt), len(following) - len(behind) + len(end)


WHOLE_MARKS = re.compile(r"(?:.*[\s>\]])?", re.S)


def _replies_by_windows(render, messages, starts, whole, prompt_length):
    """find_replies from what each round adds to the two before it; None if that is not the whole.

    A window begins with the system message and the last question, if it would have none."""
    prompt = render(messages[: starts[0]], True)
    if not whole.startswith(prompt):
        return None
    spans, done, question = [], len(prompt), []
    for k, (start, end) in enumerate(zip(starts, starts[1:])):
        first = starts[k - 2] + 1 if k > 1 else 0
        questions = [message for message in messages[first:start] if message["role"] == "user"]
        head = messages[:1] if first and messages[0]["role"] == "system" else []
        head = [*head, *([] if questions or not first else question)]
        question = questions[-1:] or question
        window, before = [*head, *messages[first:end]], len(head) + start - first
        prompt, following = render(window[:before], True), render(window, True)
        if not following.startswith(prompt) or not whole.startswith(following[len(prompt) :], done):
            return None
        span = _find_reply(render, window, before, following)
        spans.append(span and (span[0] - len(prompt) + done, span[1] - len(prompt) + done))
        done += len(following) - len(prompt)
    return spans if done == prompt_length else None
