"""Structured output: automata against Python's `re` and plain comparisons, masks against token by token, and replies of
a random model against a JSON schema validator that knows nothing of automata.

    python -m pytest tests/test_structured_output.py             # CPU, about 10 s
    python -m pytest tests/test_structured_output.py --sweeps    # 200 schemas, all of the tool styles
"""

import functools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from json_schema_oracle import is_valid
from json_schemas import REFUSED, SHAPES, TREE, VALUES, changed, random_schema
from test_engine import DEMO, shared_model, tokenizer

from adapters import from_pretrained
from formats.files import UserError
from formats.tokenizer import load_tokenizer
from formats.tool_calls import STYLES, parse_reply
from serving.automaton import EMPTY, Automaton, Terms
from serving.engine import Engine, Request
from serving.guide import vocabulary_of
from serving.numbers import exact, integer_term, number_term
from serving.patterns import Characters, compile_pattern
from serving.sampling import Sampler, SamplingParams, sample_batch
from serving.schema import compile_schema
from serving.speculation import NgramSpeculator
from serving.structured_output import constraint_from, constraint_of

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
        "(a|b)*a.{3}",
        "^(?=.*\\d)(?=.*[a-b])[a-c1]{2,4}$",
        "^(?!^[ab.]*$)[ab]?c*\\.?1*$",
        "(?!a)b|c(?=1)",
        "(?=a|b$)",
        "a(?!bc)",
        "^(?:a|(?!b)[bc]+)$",
        "$|^a",
        "^(?:a|^b)",
        "(?:a$|b)$",
        "(?:^(?:^a|b)|c)(?:d|a$)",
        "^$",
        "^a*(?=(?!ab)a)",
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
        ("(?<=a)", "'(?<=' is not supported"),
        ("(?=a)*", "nothing to repeat"),
        ("((?=a)b)c", "lookahead is supported where"),
        ("a\\1", "back references are not supported; at character 1"),
        ("\\p{L}", "'\\p' is not supported"),
        ("(", "'(' without ')' at character 0"),
        ("a)", "')' without '('"),
        ("[a", "'[' without ']'"),
        ("*a", "nothing to repeat"),
        ("a{3,2}", "the lower number first"),
        ("a^b", "^ and $ are supported at the ends"),
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


def complete(guide, rng, most=200, tok=None, before=()):
    """Random tokens that the guide allows -> (ids, why it ended); ends of strings and lists come more often."""
    tok = tok or tokenizer()
    pieces, stops, state, ids = vocabulary_of(tok).pieces, set(tok.stop_ids), walk(guide, before), []
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


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.sweep(keep=3)
def test_masks_are_what_token_by_token_gives(seed):
    tok, rng = tokenizer(), random.Random(seed)
    schema = {"type": "object", "properties": {"é": {"type": "string", "maxLength": 3}, "n": {"type": "number"}}}
    fixed = [
        dict(json_schema=schema),
        dict(regex="[à-ÿ一-龥]{2}|\\w+"),
        dict(tools=[tool()], style="hermes"),
        dict(response_format={"type": "json_object"}),
        dict(json_schema=TREE),
        dict(regex=r"(\w+, ){2,}x"),
    ]
    for guide in (
        constraint_from(tok, **fixed[seed % len(fixed)]),
        constraint_from(tok, json_schema=schemas()[(7 * seed) % 200]),
    ):
        for _ in range(2):
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


def test_added_tokens_are_text_or_marks():
    tok = load_tokenizer(DEMO)
    tok.add_tokens(["    ", "<mark>"])
    spaces, mark = tok.token_id("    "), tok.token_id("<mark>")
    guide = constraint_from(tok, regex='" *(<mark>)?"')
    quote = tok.token_id("<0x22>")
    assert walk(guide, [quote, spaces, spaces, quote]) and not walk(guide, [quote, mark])
    assert guide.allowed(walk(guide, [quote]), set(), tok.vocab_size)[[spaces, mark]].tolist() == [True, False]


def test_guides_are_kept_and_limited(monkeypatch):
    tok = tokenizer()
    assert constraint_from(tok, choice=["a", "b"]) is constraint_from(tok, choice=["a", "b"])
    monkeypatch.setattr("serving.automaton.MAX_TERMS", 60)
    with pytest.raises(UserError, match="more than 60 terms"):
        constraint_from(tok, json_schema={"type": "string", "enum": [str(i) for i in range(99)]})
    monkeypatch.undo()
    monkeypatch.setattr("serving.guide.COMPILE_SECONDS", -1)
    with pytest.raises(UserError, match="takes too long"):
        constraint_from(tok, json_schema={"type": "string", "enum": [f"{i}" for i in range(999)]})
    monkeypatch.undo()
    monkeypatch.setattr("serving.guide.MAX_GUIDE_BYTES", 2_000_000)
    for i in range(9):
        constraint_from(tok, json_schema={"enum": [f"{i} {j}" for j in range(2000)]})
    assert len(vocabulary_of(tok)._guides) < 3
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


def other_judge(schema):
    """jsonschema's validator, if it is installed and the schema has no keyword that is OpenAPI's alone."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return lambda value: True
    checks = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return (lambda value: True) if "nullable" in json.dumps(schema) else checks.is_valid


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
                value = json.loads(text_of(ids))
                assert is_valid(value, schema) and other_judge(schema)(value), (schema, completion.text)
                assert json.loads(completion.text) == value
                complete_ones += 1
    assert complete_ones >= 15


@pytest.mark.parametrize("part", range(40))
@pytest.mark.sweep(keep=2)
def test_what_is_near_a_valid_answer_matches_only_if_it_is_valid(part):
    """5 schemas, 40 values each: parts of random answers left out, added, moved and changed."""
    tok, rng, valid = tokenizer(), random.Random(part), 0
    for schema in schemas()[part * 5 : part * 5 + 5]:
        guide = constraint_from(tok, json_schema=schema)
        answers = [ids for ids, reason in (complete(guide, rng, 60) for _ in range(3)) if reason == "stop"]
        values = [json.loads(text_of(ids)) for ids in answers] + VALUES[:3]
        for _ in range(40):
            value = changed(rng.choice(values), rng)
            written = json.dumps(value, ensure_ascii=False).encode()
            state = guide.start
            for byte in written:
                state = guide.automaton.next(state, byte)
            if guide.accepting(state):
                assert is_valid(value, schema) and other_judge(schema)(value), (schema, value)
                valid += 1
    assert valid > 0


@pytest.mark.parametrize("draft", ["draft4", "draft7", "draft2019-09", "draft2020-12"])
def test_the_public_suite(draft, request):
    """Of each group of JSON-Schema-Test-Suite: refused in one line, or no invalid instance matches. -s prints counts.

    The suite is the folder json/tests in jsonschema's source package."""
    folder = request.config.getoption("--json-schema-suite")
    if folder is None:
        pytest.skip("needs --json-schema-suite: the folder tests of JSON-Schema-Test-Suite")
    counts = dict.fromkeys(("refused", "compiled", "valid, matched", "valid, not matched", "invalid"), 0)
    for path in [*sorted(Path(folder, draft).glob("*.json")), *sorted(Path(folder, draft, "optional").rglob("*.json"))]:
        for group in json.loads(path.read_text()):
            terms = Terms()
            try:
                automaton = Automaton(terms, compile_schema(terms, group["schema"]))
            except UserError as error:
                assert str(error).startswith("#") and "\n" not in str(error), error
                counts["refused"] += 1
                continue
            counts["compiled"] += 1
            for case in group["tests"]:
                matches = automaton.accepts(json.dumps(case["data"]).encode())
                assert case["valid"] or not matches, (path, group["schema"], case)
                kind = "invalid" if not case["valid"] else "valid, matched" if matches else "valid, not matched"
                counts[kind] += 1
    print(draft, counts)
    assert counts["compiled"] > 100


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


# =============================================================================================================== tools

MARKS = """<tool_call> </tool_call> [TOOL_CALLS] <|assistant|> <think> </think> <|python_tag|>
    <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜>""".split()


class MarkTokenizer:
    """A token a byte, the marks of all styles as special tokens, the last id ends a reply."""

    vocab_size, stop_ids = 257 + len(MARKS), [256 + len(MARKS)]

    def __init__(self):
        self.added_ids = {256 + i: mark for i, mark in enumerate([*MARKS, "<end>"])}
        self.special_ids = set(self.added_ids)

    def piece_bytes(self, i):
        return self.added_ids[i].encode() if i >= 256 else bytes([i])

    def encode(self, text):
        parts = re.split(f"({'|'.join(map(re.escape, MARKS))})", text)
        ids = [[256 + MARKS.index(part)] if i % 2 else list(part.encode()) for i, part in enumerate(parts)]
        return [i for part in ids for i in part]


MARKED = MarkTokenizer()
OPENINGS = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "deepseek": "<｜tool▁calls▁begin｜>",
    "llama3": '{"name"',
    "glm-4": "weather\n",
}


def completed(guide, tok, rng, ids=()):
    """A random reply that completes, after these ids."""
    for _ in range(50):
        more, reason = complete(guide, rng, 900, tok, ids)
        if reason == "stop":
            return text_of([*ids, *more], tok)
    raise AssertionError("no reply completes")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("marked", [True, False])
def test_calls_are_written_in_the_form_of_the_style(style, marked):
    tok, rng = MARKED if marked else tokenizer(), random.Random(1)
    tools = [tool(), tool("now", True, None)]
    for choice, names in (
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
    ):
        for parallel in (True, False):
            guide = constraint_from(tok, tools=tools, tool_choice=choice, parallel_tool_calls=parallel, style=style)
            for _ in range(4):
                calls = parse_reply(completed(guide, tok, rng), style)
                assert calls["content"] == "" and (parallel or len(calls["tool_calls"]) == 1)
                for function in (one["function"] for one in calls["tool_calls"]):
                    schema = ARGUMENTS if function["name"] == "weather" else {"type": "object", "maxProperties": 0}
                    assert function["name"] in names and is_valid(json.loads(function["arguments"]), schema)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("marked", [True, False])
def test_auto_is_free_until_a_call_begins(style, marked):
    tok, rng = MARKED if marked else tokenizer(), random.Random(2)
    encode = tok.encode if marked else lambda text: [tok.token_id(f"<0x{b:02X}>") for b in text.encode()]
    guide = constraint_from(tok, tools=[tool()], style=style)
    opening = OPENINGS[style]
    text = "" if style in ("llama3", "glm-4") else "Let me < see [\n"
    for end in range(len(text) + 1):
        assert guide.accepting(walk(guide, encode(text[:end])))
    calls = parse_reply(completed(guide, tok, rng, encode(text + opening)), style)
    assert calls["content"].strip() == text.strip() and is_valid(
        json.loads(calls["tool_calls"][0]["function"]["arguments"]), ARGUMENTS
    )
    assert guide.accepting(walk(guide, encode("It is {4} <degrees> in \xc5rhus, weathe")))
    assert constraint_from(tok, tools=[tool(strict=False)], style=style) is None


def test_tools_and_a_schema_together():
    tok = MARKED
    asked = dict(tools=[tool()], style="hermes", response_format={"type": "json_object"})
    guide = constraint_from(tok, **asked)
    assert guide.accepting(walk(guide, tok.encode('{"a": 1}'))) and walk(guide, tok.encode("Hello")) == 0
    assert walk(guide, tok.encode("<tool_call>"))
    assert walk(constraint_from(tok, **asked, tool_choice="none"), tok.encode("<tool_call>")) == 0
    assert walk(constraint_from(tok, **asked, tool_choice="required"), tok.encode("{")) == 0


def test_thoughts_come_before_the_form():
    asked = dict(response_format={"type": "json_object"})
    for thinking, text, follows in (
        ("open", "hm {\n</think>\n\n{", True),
        ("open", "hm", True),
        ("open", "</think>x", False),
        ("optional", "<think>hm</think>{}", True),
        ("optional", "{}", True),
        ("optional", "hm", False),
        (None, "<think>", False),
    ):
        guide = constraint_from(MARKED, **asked, thinking=thinking)
        assert (walk(guide, MARKED.encode(text)) > 0) == follows, (thinking, text)
    guide = constraint_from(MARKED, tools=[tool()], tool_choice="required", style="hermes", thinking="open")
    reply = parse_reply(completed(guide, MARKED, random.Random(0), MARKED.encode("so</think>")), "hermes", True)
    assert reply["reasoning_content"] == "so" and reply["tool_calls"]


def test_what_a_request_may_ask():
    schema = {"type": "integer"}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}},
        {"response_format": {"type": "json_schema", "name": "n", "schema": schema}},
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"structured_outputs": {"json": schema}},
        {"guided_choice": ["1", "23"]},
        {"structured_outputs": {"regex": "[0-9]+", "choice": None}},
        {"guided_regex": "[0-9]+"},
    ):
        guide = constraint_of(body, MARKED)
        assert guide.accepting(walk(guide, b"23")) and walk(guide, b"x") == 0
    for body in ({"structured_outputs": {"json_object": True}}, {"response_format": {"type": "json_object"}}):
        guide = constraint_of(body, MARKED)
        assert guide.accepting(walk(guide, b'{"a": []}')) and walk(guide, b"[") == 0
    assert constraint_of({"response_format": {"type": "text"}, "structured_outputs": None}, MARKED) is None
    bad_tool = tool(parameters={"properties": {"a": {"not": {}}}})
    for body, tools, message in (
        ({"response_format": {"type": "x"}}, {}, "response_format: the type must be"),
        ({"guided_json": schema, "guided_regex": "a"}, {}, "guided_regex: not together with guided_json"),
        ({"guided_json": schema, "structured_outputs": {"json": schema}}, {}, "structured_outputs: not together with"),
        ({"structured_outputs": {"grammar": "x"}}, {}, 'structured_outputs: "grammar" is not supported'),
        ({"guided_choice": [""]}, {}, "guided_choice: a list of"),
        ({"guided_regex": "("}, {}, "guided_regex: '('"),
        ({}, {"tools": [bad_tool], "style": "hermes"}, "tools: [0].function.parameters: #/properties/a/not: keyword"),
        ({}, {"tools": [tool()], "style": None}, "tool_choice: the chat template writes calls in no form known here"),
        ({}, {"tools": [tool("a b")], "style": "hermes"}, "tools: [0].function.name: a name"),
        (
            {},
            {"tools": [tool()], "tool_choice": {"function": {"name": "x"}}, "style": "hermes"},
            "tool_choice: none, auto",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            constraint_of(body, MARKED, **tools)


# ================================================================================================= engine and sampling


def test_a_guided_reply_is_the_same_with_speculation_and_company():
    """Greedy and sampled, with penalties; drafts that leave the form are not taken."""
    model, tok = shared_model(), tokenizer()
    prompt = tok.encode('{"city": "Oslo", "days": 3} {"city": "Oslo", "days": 4} {"city": "Oslo"')
    guide = constraint_from(tok, json_schema={"type": "array", "items": ARGUMENTS, "minItems": 3})
    fields = dict(max_tokens=60, guide=guide, logit_bias=((tok.token_id("<0x5D>"), -5.0),))
    requests = [
        Request(prompt, SamplingParams(**fields, temperature=0.0)),
        Request(prompt, SamplingParams(**fields, temperature=0.0, repetition_penalty=1.1, min_tokens=40)),
        Request(prompt, SamplingParams(**fields, temperature=0.7, top_p=0.9, min_p=0.01, seed=3, n=2)),
        Request(prompt, SamplingParams(20, temperature=0.0)),
    ]

    def run(requests, **options):
        engine = Engine(model, tok, num_blocks=200, block_size=8, **options)
        results = engine.generate(requests)
        return [[(c.token_ids, c.finish_reason) for c in completions] for completions in results], engine.totals

    alone = [run([request])[0][0] for request in requests]
    assert run(requests)[0] == alone
    replies, totals = run(requests, speculator=NgramSpeculator(4, 3))
    assert replies == alone and totals["spec_decode_num_accepted_tokens"] > 0
    for ids, reason in (reply for completions in replies[:3] for reply in completions):
        states = [walk(guide, [i for i in ids[:end] if i not in tok.stop_ids]) for end in range(len(ids) + 1)]
        assert 0 not in states and reason == ("stop" if guide.accepting(states[-1]) else "length")


def test_a_guide_ends_a_reply_and_a_limit_cuts_it():
    tok, eng = tokenizer(), engine()
    for fields, text, reason in (
        (dict(guide=constraint_from(tok, regex="yes!"), ignore_eos=True), "yes!", "stop"),
        (dict(guide=constraint_from(tok, regex="yes!"), min_tokens=20), "yes!", "stop"),
        (
            dict(
                guide=constraint_from(tok, regex="[xy]{2,9}"), max_tokens=1, bad_words=((tok.encode("x", False)[-1],),)
            ),
            None,
            "length",
        ),
        (dict(guide=constraint_from(tok, choice=["yes!"]), stop=("s",)), "ye", "stop"),
        (dict(guide=constraint_from(tok, choice=["no"]), allowed_token_ids=(5,)), "no", "stop"),
    ):
        ((completion,),) = eng.generate([Request([5, 6], SamplingParams(**{"max_tokens": 30, **fields}))])
        assert completion.finish_reason == reason and text in (None, completion.text), completion


def test_rules_of_sampling():
    logits = np.array([2.0, 1.0, 0.5, -1.0, 3.0, 0.0], np.float32)

    def after(reply=(), **fields):
        sampler, result = Sampler(SamplingParams(**fields), 0, [5], 0), logits.copy()
        for token in reply:
            sampler.follow(token)
        sampler.apply_rules(result, [1, 1, *reply])
        return [round(float(x), 4) for x in result]

    low = -np.inf
    assert after(logit_bias=((1, 2.5), (4, -100.0))) == [2.0, 3.5, 0.5, -1.0, -97.0, 0.0]
    assert after(allowed_token_ids=(1, 3)) == [low, 1.0, low, -1.0, low, 0.0]
    assert after([2, 3], bad_words=((0,), (3, 4), (2, 1))) == [low, 1.0, 0.5, -1.0, low, 0.0]
    assert after(allowed_token_ids=(2,), bad_words=((2,), (5,))) == logits.tolist()  # nothing would be left
    probabilities = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum()
    kept = probabilities >= 0.05 * probabilities.max()
    assert after(min_p=0.05, temperature=0.5) == np.where(kept, logits, low).tolist() and 1 < kept.sum() < 6
    assert not Sampler(SamplingParams(temperature=0.0), 0, [], 0).has_rules
    before = np.tile(logits, (3, 1))
    fields = [dict(logit_bias=((3, 9.0),)), {}, dict(bad_words=((4,),), repetition_penalty=3.0)]
    samplers = [Sampler(SamplingParams(temperature=0.0, **each), 0, [], 0) for each in fields]
    after_all = before.copy()
    assert sample_batch(samplers, after_all, [[0], [0], [0]]) == [3, 4, 1] and (after_all == before).all()
    for field, value in (("min_p", 2), ("logit_bias", ((1, 101),)), ("bad_words", ((),))):
        with pytest.raises(UserError, match=f"^{field}"):
            SamplingParams(**{field: value}).check()


# ========================================================================================================= a real model


@pytest.fixture
def chat_model(request):
    folder = request.config.getoption("--chat-model", None)
    if folder is None:
        pytest.skip("needs --chat-model: the folder of a real chat model")
    return folder


QUESTIONS = {  # what is asked: the schema of the answer
    "Invent a person with a name, an age and three hobbies.": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 18, "maximum": 99},
            "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 3, "maxItems": 3},
        },
        "required": ["name", "age", "hobbies"],
        "additionalProperties": False,
    },
    "What is the capital of France, and how many people live there?": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "pattern": "^[A-Z][a-z]{1,20}$"},
            "population": {"type": "integer", "minimum": 1, "maximum": 50_000_000},
            "is_capital": {"type": "boolean"},
        },
        "required": ["city", "population", "is_capital"],
    },
    "Is this review positive: 'I loved every minute of it'? Answer with the mood and how sure you are.": {
        "type": "object",
        "properties": {
            "mood": {"enum": ["positive", "negative", "neutral"]},
            "sure": {"type": "number", "minimum": 0, "maximum": 1},
            "when": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        },
        "required": ["mood", "sure", "when"],
    },
    "Invent a small family.": {
        "$defs": {
            "person": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 2, "maxLength": 12},
                    "age": {"type": "integer", "minimum": 0, "maximum": 99},
                },
                "required": ["name", "age"],
            }
        },
        "type": "object",
        "properties": {
            "mother": {"$ref": "#/$defs/person"},
            "father": {"$ref": "#/$defs/person"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/person"}, "maxItems": 2},
        },
        "required": ["mother", "father", "children"],
    },
    "Which shape do you like?": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"shape": {"const": shape}, size: {"type": "number", "minimum": 0.5}},
                "required": ["shape", size],
                "additionalProperties": False,
            }
            for shape, size in (("circle", "radius"), ("square", "side"))
        ]
    },
}


@pytest.mark.slow
def test_answers_of_a_real_model_are_valid(chat_model):
    """5 schemas, each greedy and with 3 seeds: 20 answers, all complete and valid. -s prints them."""
    tok = load_tokenizer(chat_model)
    engine = Engine(from_pretrained(chat_model), tok, num_blocks=400, max_num_seqs=20)
    requests = []
    for question, schema in QUESTIONS.items():
        prompt = tok.apply_chat([{"role": "user", "content": f"{question} Answer in JSON."}])
        guide = constraint_from(tok, response_format={"type": "json_schema", "json_schema": {"schema": schema}})
        fields = dict(max_tokens=300, guide=guide)
        requests += [Request(prompt, SamplingParams(temperature=0.0, **fields))]
        requests += [Request(prompt, SamplingParams(temperature=0.8, top_p=0.95, seed=1, n=3, **fields))]
    completions = [completion for each in engine.generate(requests) for completion in each]
    wanted = [schema for schema in QUESTIONS.values() for _ in range(4)]
    assert len(completions) == 20
    for completion, schema in zip(completions, wanted):
        print(completion.finish_reason, completion.text)
        assert completion.finish_reason == "stop" and is_valid(json.loads(completion.text), schema)
