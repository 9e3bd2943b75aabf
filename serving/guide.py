"""Structured output: which tokens may come next, so that a reply follows a schema, a pattern, a choice or a tool's
form.

    guide = constraint_from(tokenizer, response_format={"type": "json_schema", "json_schema": {"schema": {…}}})
    guide.allowed(guide.start, stop_ids, vocab_size)        # (V,) bool
    state = guide.advance(guide.start, token_id)            # states are integers: to go back is to keep the old one

A Vocabulary holds a tokenizer's tokens as a trie of bytes. A mask is made by one walk of the trie with the automaton, a
level at a time in numpy; branches that the automaton cannot follow are left out. A guide keeps the masks of its states
as bits, the least recently used go first. Guides are kept per vocabulary, so that a schema is compiled once.
"""

import collections
import json
import re
import threading
import weakref
from collections.abc import Callable

import numpy as np

from formats.files import UserError, brief
from formats.tool_calls import STYLES
from serving.automaton import EMPTY, EPSILON, Automaton, Terms
from serving.patterns import Characters, compile_pattern
from serving.schema import compile_schema

MAX_GUIDES, MAX_MASKS = 64, 512  # kept: guides of a vocabulary, masks of a guide (V / 8 bytes each)
MAX_STATES = 20_000  # of a guide that is used again; beyond it the next request compiles anew (1 KB a state)
MAX_CHOICES = 10_000


class Vocabulary:
    """A tokenizer's tokens as a trie of bytes. Special and added tokens are symbols of their own."""

    def __init__(self, tokenizer):
        self.size, stops = tokenizer.vocab_size, set(tokenizer.stop_ids)
        apart = {*tokenizer.special_ids, *tokenizer.added_ids}
        self.special_ids = sorted(i for i in apart if 0 <= i < self.size and i not in stops)
        self.special_index = {token: k for k, token in enumerate(self.special_ids)}
        texts = {tokenizer.added_ids[i]: i for i in self.special_ids if tokenizer.added_ids.get(i)}
        self.special_texts = texts
        words = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
        self._special_pattern = re.compile(f"({words})") if words else None
        self.pieces = [b"" if i in apart else tokenizer.piece_bytes(i) for i in range(self.size)]
        self._build_trie([i for i in range(self.size) if self.pieces[i]])
        self._guides, self._lock = collections.OrderedDict(), threading.Lock()

    def _build_trie(self, ids):
        """Nodes in order of their level, the children of a node side by side."""
        ids.sort(key=self.pieces.__getitem__)
        data = np.frombuffer(b"".join(self.pieces[i] for i in ids), np.uint8)
        lengths = np.array([len(self.pieces[i]) for i in ids], np.int64)
        starts = np.cumsum(lengths) - lengths
        self.token_ids, node = np.array(ids, np.int64), np.zeros(len(ids), np.int64)
        bytes_of, firsts, counts, size = [np.zeros(1, np.uint8)], [], [], 1
        parents, first_node = 1, 0  # of the level above: how many nodes, and the first of them
        for level in range(int(lengths.max(initial=0))):
            rows = np.flatnonzero(lengths > level)
            byte, above = data[starts[rows] + level], node[rows]
            is_new = np.ones(len(rows), bool)
            is_new[1:] = (byte[1:] != byte[:-1]) | (above[1:] != above[:-1])
            node[rows] = size + np.cumsum(is_new) - 1
            count = np.bincount(above[is_new] - first_node, minlength=parents)
            firsts.append(size + np.cumsum(count) - count)
            counts.append(count)
            bytes_of.append(byte[is_new])
            first_node, parents = size, int(is_new.sum())
            size += parents
        self.node_of_token, self.num_nodes = node, size
        self.byte = np.concatenate(bytes_of)
        last = np.zeros(parents, np.int64)
        self.first_child = np.concatenate([*firsts, last]).astype(np.int32)
        self.num_children = np.concatenate([*counts, last]).astype(np.int32)

    def special(self, text: str) -> int | None:
        """The number of the special token with this text, None if there is none."""
        found = self.special_texts.get(text)
        return None if found is None else self.special_index[found]

    def guide(self, key: str, build: Callable) -> "Guide":
        """The guide for a key, made once: build(Terms) -> the term of the whole reply."""
        with self._lock:
            found = self._guides.get(key)
            if found is not None and len(found.automaton.term_of) < MAX_STATES:
                self._guides.move_to_end(key)
                return found
        terms = Terms(len(self.special_ids))
        try:
            root = build(terms)
        except RecursionError:
            raise UserError("nested too deep") from None
        if root == EMPTY:
            raise UserError("nothing matches")
        guide = Guide(self, Automaton(terms, root))
        guide.mask(guide.start)
        with self._lock:
            self._guides[key] = guide
            while len(self._guides) > MAX_GUIDES:
                self._guides.popitem(last=False)
        return guide


_vocabularies, _vocabularies_lock = weakref.WeakKeyDictionary(), threading.Lock()


def vocabulary_of(tokenizer: object) -> Vocabulary:
    """The tokenizer's Vocabulary, made when it is first asked for (about a second for 150,000 tokens)."""
    with _vocabularies_lock:
        found = _vocabularies.get(tokenizer)
        if found is None or found.size != tokenizer.vocab_size:
            found = _vocabularies[tokenizer] = Vocabulary(tokenizer)
        return found


class Guide:
    """What may follow, by states: integers, 0 for "nothing matches any more". Methods may be called from any thread."""

    start = 1

    def __init__(self, vocabulary: Vocabulary, automaton: Automaton):
        self.vocabulary, self.automaton = vocabulary, automaton
        self._masks, self._lock = collections.OrderedDict(), threading.Lock()

    def advance(self, state: int, token: int) -> int:
        """The state after one more token; 0 if the token may not come."""
        with self._lock:
            k = self.vocabulary.special_index.get(token)
            if k is not None:
                return self.automaton.next_special(state, k)
            piece = self.vocabulary.pieces[token] if 0 <= token < self.vocabulary.size else b""
            state = state if piece else 0
            for byte in piece:
                state = self.automaton.next(state, byte)
            return state

    def accepting(self, state: int) -> bool:
        """Whether the reply may end here."""
        with self._lock:
            return self.automaton.accepting(state)

    def is_final(self, state: int) -> bool:
        """Whether the reply must end here."""
        with self._lock:
            return self.automaton.is_final(state)

    def mask(self, state: int) -> np.ndarray:
        """(ceil(V / 8),) uint8, little-endian bits: the tokens that may come next, without those that end a reply."""
        with self._lock:
            found = self._masks.get(state)
            if found is None:
                found = self._masks[state] = np.packbits(self._walk(state), bitorder="little")
                if len(self._masks) > MAX_MASKS:
                    self._masks.popitem(last=False)
            else:
                self._masks.move_to_end(state)
            return found

    def allowed(self, state: int, stop_ids: set[int], size: int) -> np.ndarray:
        """(size,) bool: the tokens that may come next; those of stop_ids where the reply may end."""
        bits = np.unpackbits(self.mask(state), bitorder="little", count=self.vocabulary.size).view(bool)
        result = np.zeros(size, bool)
        result[: min(size, len(bits))] = bits[:size]
        ends = self.accepting(state)
        for i in stop_ids:
            if i < size:
                result[i] = ends
        return result

    def _walk(self, state):
        """(V,) bool"""
        vocabulary, automaton = self.vocabulary, self.automaton
        alive = np.zeros(vocabulary.num_nodes, bool)
        nodes, states = np.zeros(1, np.int64), np.array([state], np.int64)
        while len(nodes):
            counts = vocabulary.num_children[nodes]
            inner = counts > 0
            nodes, states, counts = nodes[inner], states[inner], counts[inner]
            met = np.zeros(len(automaton.term_of), bool)
            met[states] = True
            for each in np.flatnonzero(met & ~automaton.has_row[: len(met)]).tolist():
                automaton.fill_row(each)
            ends = np.cumsum(counts)
            total = int(ends[-1]) if len(ends) else 0
            children = np.repeat(vocabulary.first_child[nodes] - (ends - counts), counts) + np.arange(total)
            states = automaton.table[np.repeat(states, counts), vocabulary.byte[children]]
            follows = states > 0
            nodes, states = children[follows], states[follows]
            alive[nodes] = True
        allowed = np.zeros(vocabulary.size, bool)
        allowed[vocabulary.token_ids] = alive[vocabulary.node_of_token]
        automaton.fill_row(state)
        for k in automaton.special.get(state, ()):
            allowed[vocabulary.special_ids[k]] = True
        return allowed


# ============================================================================================ what a request asks for


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
    json_schema, regex, choice, tools or tool_choice.
    """
    answer = _answer(response_format, json_schema, regex, choice)
    called = _tools_called(tools, tool_choice, answer is not None)
    if answer is None and called is None:
        return None
    if called and style not in STYLES:
        found = "no form known here" if style is None else brief(style)
        raise UserError(f"tool_choice: the chat template writes calls in {found}; known are {', '.join(STYLES)}")
    vocabulary = vocabulary_of(tokenizer)
    mode, functions = called or (None, [])
    key = json.dumps([answer, mode, functions, parallel_tool_calls, style, thinking], ensure_ascii=True)

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


def _named(field, function, *args):
    try:
        return function(*args)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def _answer(response_format, json_schema, regex, choice):
    """(field, kind, value) of what is asked for, None for free text."""
    kind = None
    if response_format is not None:
        kind = response_format.get("type") if isinstance(response_format, dict) else response_format
        if kind not in ("text", "json_object", "json_schema"):
            known = "text, json_object or json_schema"
            raise UserError(f"response_format: the type must be {known}, found {brief(kind)}")
    given = [("response_format", kind, response_format)] if kind not in (None, "text") else []
    others = (("json_schema", json_schema), ("regex", regex), ("choice", choice))
    given += [(name, name, value) for name, value in others if value is not None]
    if len(given) > 1:
        raise UserError(f"{given[1][0]}: not together with {given[0][0]}")
    if not given:
        return None
    field, kind, value = given[0]
    if field == "response_format" and kind == "json_schema":
        inner = value.get("json_schema", value)
        value = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(value, dict | bool):
            raise UserError(f"response_format: json_schema.schema: a schema is expected, found {brief(value)}")
    if field == "json_schema" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"json_schema: not JSON: {error}") from None
    if field == "regex" and not isinstance(value, str):
        raise UserError(f"regex: a string is expected, found {brief(value)}")
    if field == "choice":
        is_right = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
        if not is_right or not 0 < len(value) <= MAX_CHOICES:
            raise UserError(f"choice: a list of 1 to {MAX_CHOICES:,} texts that are not empty is expected")
    return field, kind, value


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
            return compile_schema(self.terms, {"type": "object"} if kind == "json_object" else value)
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
