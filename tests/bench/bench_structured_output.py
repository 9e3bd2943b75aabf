"""Structured output: what a tokenizer's trie, a schema, a new mask and a known one cost.

    python tests/bench/bench_structured_output.py [FOLDER]      10 s, one core; a tokenizer's folder

Without a folder: ../shared's qwen2, 151,646 tokens. Replies are drawn at random among the tokens that are allowed,
those that end strings and lists more often. "first": compilation and the mask of the first state; "new": a mask for a
state that was not met before; "known": one that is looked up; "apply": unpacked for 151,936 logits and written over
them.
"""

import json
import random
import statistics
import sys
import time

import paths  # noqa: F401

import numpy as np
from conftest import SHARED

from formats.tokenizer import load_tokenizer
from serving.guide import vocabulary_of
from serving.structured_output import constraint_from

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 5},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "address": {"type": "object", "properties": {"street": {"type": "string", "maxLength": 40}}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASKED = {
    "json_object": {"response_format": {"type": "json_object"}},
    "person": {"json_schema": PERSON},
    "300 properties": {"json_schema": {"properties": {f"field_{i}": {"type": "integer"} for i in range(300)}}},
    "regex": {"regex": r"[A-Z]\w{3,20}( [A-Z]\w{3,20}){1,3}, \d{4}-\d{2}-\d{2}"},
    "tool, auto": {
        "tools": [{"type": "function", "function": {"name": "save", "parameters": PERSON, "strict": True}}],
        "style": "hermes",
    },
}
V = 151_936


def replies(guide, stops, rng, times):
    """Walks of 20 random replies; times["new" and "known"] in ms."""
    ends = [i for i, piece in enumerate(guide.vocabulary.pieces) if len(piece) < 3 and set(piece) & set(b'"]},')]
    for _ in range(20):
        state = guide.start
        for _ in range(120):
            kind = "known" if state in guide._masks else "new"
            start = time.perf_counter()
            guide.mask(state)
            times[kind].append(1e3 * (time.perf_counter() - start))
            if guide.ends(state):
                break
            allowed = guide.allowed(state, stops, V)
            likely = [i for i in ends if allowed[i]] if rng.random() < 0.3 else []
            token = rng.choice(likely or np.flatnonzero(allowed).tolist())
            if token in stops:
                break
            state = guide.advance(state, token)


def milliseconds(function):
    start = time.perf_counter()
    result = function()
    return result, 1e3 * (time.perf_counter() - start)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else SHARED / "golden" / "tokenizers" / "qwen2"
    tokenizer = load_tokenizer(folder)
    vocabulary, taken = milliseconds(lambda: vocabulary_of(tokenizer))
    stops, logits, rng = set(tokenizer.stop_ids), np.zeros(V, np.float32), random.Random(0)
    print(f"{vocabulary.size} tokens, {vocabulary.num_nodes} nodes: {taken:.0f} ms once")
    print(
        f"{'ms':16} {'first':>6} {'new':>5} {'p99':>6} {'max':>6} {'masks':>5} {'known':>6} {'apply':>6} {'states':>6}"
    )
    rows = {}
    for name, asked in ASKED.items():
        guide, first = milliseconds(lambda asked=asked: constraint_from(tokenizer, **asked))
        times = {"new": [], "known": []}
        replies(guide, stops, rng, times)
        _, applied = milliseconds(
            lambda guide=guide: [np.where(guide.allowed(1, stops, V), logits, -np.inf) for _ in "x" * 50]
        )
        new, known = times["new"] or [0.0], statistics.median(times["known"] or [0.0])
        median, p99 = statistics.median(new), float(np.quantile(new, 0.99))
        states = len(guide.automaton.term_of)
        print(
            f"{name:16} {first:6.1f} {median:5.1f} {p99:6.1f} {max(new):6.1f} {len(times['new']):5} {known:6.4f} "
            f"{applied / 50:6.3f} {states:6}"
        )
        rows[name] = {
            "first_ms": first,
            "new_ms": median,
            "new_p99_ms": p99,
            "known_ms": known,
            "apply_ms": applied / 50,
        }
    print(json.dumps({"tokens": vocabulary.size, "vocabulary_ms": taken, **rows}))


if __name__ == "__main__":
    main()
