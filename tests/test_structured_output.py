"""Structured output: automata against Python's `re` and plain comparisons, masks against token by token, and replies of
a random model against a JSON schema validator that knows nothing of automata.

    python -m pytest tests/test_structured_output.py             # CPU, about 10 s
    python -m pytest tests/test_structured_output.py --sweeps    # 200 schemas, all of the tool styles
"""

import functools
import json
import random
import re

import numpy as np
import pytest
from json_schema_oracle import is_valid
from json_schemas import REFUSED, SHAPES, TREE, random_schema
from test_engine import shared_model, tokenizer

from formats.files import UserError
from serving.automaton import EMPTY, Automaton, Terms
from serving.engine import Engine, Request
from serving.guide import vocabulary_of
from serving.numbers import exact, integer_term, number_term
from serving.patterns import Characters, compile_pattern
from serving.sampling import SamplingParams
from serving.schema import compile_schema
from serving.structured_output import constraint_from

ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Århus"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name="weather", strict=True, parameters=ARGUMENTS):
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


# ============================================================================================================ automata


def random_pattern(rng, depth=0):
    kind = rng.random()
    if depth > 3 or kind < 0.3:
        return rng.choice(
            ["a", "b", "c", ".", "[ab]", "[^a]", r"\d", "1", "é", r"\w", r"\W", "[a-c1]", r"\s", "\\.", "😀"]
        )
    if kind < 0.55:
        return random_pattern(rng, depth + 1) + random_pattern(rng, depth + 1)
    if kind < 0.75:
        return f"(?:{random_pattern(rng, depth + 1)}|{random_pattern(rng, depth + 1)})"
    return f"(?:{random_pattern(rng, depth + 1)}){rng.choice(['*', '+', '?', '{2}', '{1,3}', '{0,2}?', '{2,}'])}"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.sweep(keep=2)
def test_patterns_match_as_re_does(seed):
    rng = random.Random(seed)
    fixed = [
        "a|bc",
        "^a$",
        "^(a|b)c$",
        "(^a|b$)",
        "((a*)*b)*",
        "",
        "(a|)b{0}",
        r"[\w.-]+@[a-z]+",
        "^(?:a|^b)",
        "(a|b)*a.{3}",
    ]
    for pattern in fixed * (seed == 0) + [random_pattern(rng) for _ in range(25)]:
        for search in (False, True):
            terms = Terms()
            automaton = Automaton(terms, compile_pattern(pattern, Characters(terms), search))
            for _ in range(30):
                text = "".join(rng.choice("abc1é .@x😀") for _ in range(rng.randrange(7)))
                found = (re.search if search else re.fullmatch)(pattern, text, re.ASCII) is not None
                assert automaton.accepts(text.encode()) == found, (pattern, text, search)


def test_patterns_that_are_refused_name_the_place():
    for pattern, message in (
        ("(?=a)", "'(?=a' is not supported"),
        ("a\\1", "back references are not supported; at character 1"),
        ("\\p{L}", "'\\p' is not supported"),
        ("(", "'(' without ')' at character 0"),
        ("a)", "')' without '('"),
        ("[a", "'[' without ']'"),
        ("*a", "nothing to repeat"),
        ("a{3,2}", "the lower number first"),
        ("a^b", "^ is supported at the ends"),
        ("[b-a]", "not a range"),
        ("a\\", "a backslash with nothing"),
        ("(" * 60 + "a" + ")" * 60, "more than 40 groups"),
        ("a" * 30_000, "at most 20,000"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            compile_pattern(pattern, Characters(Terms()))


def test_numbers_within_limits():
    rng = random.Random(0)
    limits = [None, 0, 1, -1, 10, 100, -100, 0.5, -0.5, 0.1, 12.75, 99, 1234, -7, 3.14159, 1e-9]
    texts = "0 -0 0.0 -0.0 0.5 00 1. - .5 0.10 0.09 100 100.0 100.01 99.999 -100 12.75 12.7500 5.0 -1 3.14159 x".split()
    for _ in range(60):
        low, high = rng.choice(limits), rng.choice(limits)
        low, high = (high, low) if None not in (low, high) and low > high else (low, high)
        low_open, high_open = (limit is not None and rng.random() < 0.3 for limit in (low, high))
        bounds = [None if limit is None else exact(limit) for limit in (low, high)]
        terms = Terms()
        number = Automaton(terms, number_term(terms, *bounds, low_open, high_open))
        integer = Automaton(terms, integer_term(terms, *bounds))
        for text in texts + [str(rng.randrange(-130, 130)), f"{rng.uniform(-13, 13):.{rng.randrange(1, 5)}f}"] * 3:
            inside = re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", text) is not None
            value = float(text) if inside else 0
            inside = inside and (low is None or value > low or value == low and not low_open)
            inside = inside and (high is None or value < high or value == high and not high_open)
            if not (value == 0 and text[0] == "-"):  # -0.0 is valid and may be left out
                assert number.accepts(text.encode()) == inside, (text, low, high, low_open, high_open)
            inside = re.fullmatch(r"-?[1-9]\d*|0", text) is not None
            inside = inside and (low is None or int(text) >= low) and (high is None or int(text) <= high)
            assert integer.accepts(text.encode()) == inside, (text, low, high)


def test_both_complement_and_what_is_empty():
    terms = Terms()
    letters = terms.repeat(terms.byte_set(b"ab"))
    no_aa = terms.complement(terms.cat(terms.everything, terms.literal(b"aa"), terms.everything))
    automaton = Automaton(terms, terms.both((letters, no_aa, terms.repeat(terms.byte_set(b"ab"), 2, 3))))
    for text in ("", "a", "ab", "aa", "bab", "baa", "abab", "ac"):
        assert automaton.accepts(text.encode()) == (2 <= len(text) <= 3 and "aa" not in text and set(text) <= set("ab"))
    assert terms.both((terms.literal(b"a"), terms.repeat(terms.byte_set(b"ab"), 2, 9))) == EMPTY
    dead_end = Automaton(
        terms, terms.both((terms.repeat(terms.byte_set(b"ab")), terms.alt((terms.literal(b"ac"), terms.literal(b"b")))))
    )
    assert dead_end.next(1, ord("a")) == 0 and dead_end.next(1, ord("b"))  # "a" leads to nothing that both match


# =============================================================================================================== masks


def walk(guide, tokens):
    state = guide.start
    for token in tokens:
        state = guide.advance(state, token)
    return state


def complete(guide, rng, most=200, tok=None):
    """Random tokens that the guide allows -> (ids, why it ended); ends of strings and lists come more often."""
    tok = tok or tokenizer()
    pieces, stops, state, ids = vocabulary_of(tok).pieces, set(tok.stop_ids), guide.start, []
    for _ in range(most):
        if reason := guide.ends(state):
            return ids, reason
        allowed = np.flatnonzero(guide.allowed(state, stops, tok.vocab_size)).tolist()
        if stops & set(allowed) and rng.random() < 0.5:
            return ids, "stop"
        ids.append(rng.choices(allowed, [9 if set(pieces[i]) & set(b'"]}>') else 1 for i in allowed])[0])
        if ids[-1] in stops:
            return ids[:-1], "stop"
        state = guide.advance(state, ids[-1])
    return ids, "length"


def text_of(ids, tok=None):
    return b"".join((tok or tokenizer()).piece_bytes(i) for i in ids).decode()


def test_masks_are_what_token_by_token_gives():
    tok, rng = tokenizer(), random.Random(0)
    schema = {"type": "object", "properties": {"é": {"type": "string", "maxLength": 3}, "n": {"type": "number"}}}
    for guide in (
        constraint_from(tok, json_schema=schema),
        constraint_from(tok, regex="[à-ÿ一-龥]{2}|\\w+"),
        constraint_from(tok, tools=[tool()], style="hermes"),
    ):
        for _ in range(3):
            ids, _ = complete(guide, rng, 12)
            for end in range(len(ids) + 1):
                state = walk(guide, ids[:end])
                allowed = guide.allowed(state, set(tok.stop_ids), tok.vocab_size + 5)
                slow = [guide.advance(state, i) > 0 for i in range(tok.vocab_size)]
                for i in tok.stop_ids:
                    slow[i] = guide.accepting(state)
                assert allowed.tolist() == [*slow, *[False] * 5]
                if end % 4 == 0:
                    assert guide.advance(state, tok.vocab_size + 1) == 0 == guide.advance(0, ids[0] if ids else 0)


def test_a_character_may_be_split_over_tokens():
    tok = tokenizer()
    byte = {tok.piece_bytes(i): i for i in sorted(tok.engine.byte_ids)}
    guide = constraint_from(tok, regex="[é😀]x")
    for text in ("éx", "😀x"):
        states = [walk(guide, [byte[bytes([b])] for b in text.encode()[:end]]) for end in range(len(text.encode()) + 1)]
        assert 0 not in states and guide.ends(states[-1]) == "stop"
    assert walk(guide, [byte[b"\xc3"], byte[b"\xa8"]]) == 0  # è


def test_guides_are_kept_and_limited(monkeypatch):
    tok = tokenizer()
    assert constraint_from(tok, choice=["a", "b"]) is constraint_from(tok, choice=["a", "b"])
    monkeypatch.setattr("serving.automaton.MAX_TERMS", 60)
    with pytest.raises(UserError, match="json_schema: the grammar has more than 60 terms"):
        constraint_from(tok, json_schema={"type": "string", "enum": [str(i) for i in range(99)]})
    monkeypatch.setattr("serving.automaton.MAX_TERMS", 300)
    guide = constraint_from(tok, regex="(a|b)*a(a|b){200}")  # grows while it is used: the reply ends, nothing fails
    assert complete(guide, random.Random(0))[1] == "length"


# ============================================================================================================= schemas


@functools.cache
def schemas():
    rng = random.Random(3)
    return SHAPES + [random_schema(rng) for _ in range(200 - len(SHAPES))]


@functools.cache
def engine():
    return Engine(shared_model(), tokenizer(), num_blocks=200, block_size=8, max_num_seqs=16)


@pytest.mark.parametrize("part", range(20))
@pytest.mark.sweep(keep=2)
def test_completed_answers_of_a_random_model_are_valid(part):
    """10 schemas, 3 replies each. Tokens that end strings and lists are made likelier, so that replies complete."""
    tok = tokenizer()
    ends = [i for i, piece in enumerate(vocabulary_of(tok).pieces) if set(piece) & set(b'"]}')]
    chosen, requests = schemas()[part * 10 : part * 10 + 10], []
    for i, schema in enumerate(chosen):
        bias = tuple((token, 3.0) for token in ends)
        params = SamplingParams(100, seed=i, n=3, logit_bias=bias, guide=constraint_from(tok, json_schema=schema))
        requests.append(Request([7, 8, 9], params))
    complete_ones = 0
    for schema, completions in zip(chosen, engine().generate(requests)):
        for completion in completions:
            assert completion.finish_reason in ("stop", "length")
            if completion.finish_reason == "stop":
                ids = [i for i in completion.token_ids if i not in tok.stop_ids]
                assert is_valid(json.loads(text_of(ids)), schema), (schema, completion.text)
                assert json.loads(completion.text) == json.loads(text_of(ids))
                complete_ones += 1
    assert complete_ones >= 15


def test_values_that_a_schema_allows_are_matched():
    """The other way round: what is valid, in the order of the properties, can be written."""
    nested = {"v": 1, "next": {"v": -2, "next": None}}
    for schema, value in (
        (TREE, nested),
        ({}, {"a": [1, None, {"b": "é😀"}], "c": -1.5e3}),
        ({"type": "object"}, {}),
        ({"type": "string", "format": "date-time"}, "2024-02-29T23:59:59.123Z"),
        ({"type": "string", "format": "email"}, "jane.doe+x@mail.example.org"),
        ({"type": "string", "minLength": 2, "maxLength": 2}, '\n"'),
        ({"type": "string", "pattern": "b"}, '"abc\\\né'),
        ({"type": "object", "patternProperties": {"^x-": {"type": "integer"}}}, {"x-a": 1, "x-b": 2}),
    ):
        terms = Terms()
        automaton = Automaton(terms, compile_schema(terms, schema))
        for layout in ({}, {"separators": (",", ":")}, {"indent": 2}):
            for ensure_ascii in (False, "pattern" not in schema):
                assert automaton.accepts(json.dumps(value, ensure_ascii=ensure_ascii, **layout).encode()), (
                    schema,
                    value,
                )
        assert not automaton.accepts(json.dumps(value).encode() + b" ")
    terms = Terms()
    automaton = Automaton(terms, compile_schema(terms, {"type": "array"}))
    assert automaton.accepts(b"[\n" + b" " * 20 + b"]") and not automaton.accepts(b"[\n" + b" " * 21 + b"]")
    assert not automaton.accepts(b'["\\ud83d"]') and automaton.accepts(b'["\\ud83d\\ude00"]')
    assert automaton.accepts(b"[" * 16 + b"]" * 16) and not automaton.accepts(b"[" * 17 + b"]" * 17)


@pytest.mark.parametrize("schema, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refusals_name_the_keyword(schema, message):
    with pytest.raises(UserError) as error:
        compile_schema(Terms(), schema)
    assert str(error.value).startswith(message) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_huge_schemas_are_refused_and_large_ones_are_not():
    wide = {"type": "object", "properties": {f"field_{i}": {"type": "integer"} for i in range(300)}}
    terms = Terms()
    assert Automaton(terms, compile_schema(terms, wide)).accepts(b'{"field_7": 1, "field_299": 2}')
    for schema, message in (
        ({"enum": ["x" * 300_000]}, "a schema of 300,0"),
        (functools.reduce(lambda inner, _: {"items": inner}, range(99), {}), "nested deeper"),
        ({"allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(12)]}, "more than 256 alternatives"),
    ):
        with pytest.raises(UserError, match=message):
            compile_schema(Terms(), schema)
