"""Speculative decoding: every reply as it is without, in fewer steps, and nothing of a rejected draft is left.

    python -m pytest tests/test_speculation.py            # CPU, about 10 s

The oracle is the same engine without a speculator.
"""

import dataclasses
import functools

import numpy as np
import pytest
from test_engine import (
    DEMO,
    V,
    adapters,  # noqa: F401, a fixture
    all_given_back,
    greedy,
    prompts,
    random_requests,
    shared_model,
    tiny,
    tokenizer,
)
from test_openai_api import start  # noqa: F401, a fixture

import serve
from arguments import parse_args
from formats.files import UserError
from serving.engine import Engine, Request
from serving.runners import PagedRunner, ScheduledTokens, SequentialRunner, TokenSequence
from serving.sampling import SamplingParams
from serving.speculation import DraftSpeculator, NgramSpeculator, make_speculator, rows_of

POOL, TIGHT = {"num_blocks": 120, "block_size": 8}, {"num_blocks": 20, "block_size": 8}


def make(kind, pool):
    """A speculator of a kind, for tiny models: what was said before, the model itself, another model."""
    if kind == "ngram":
        return NgramSpeculator(4, 3)
    return DraftSpeculator(tiny(seed=0 if kind == "itself" else 7), 4, **pool)


def repetitive(count, seed=0):
    """Prompts that say a few tokens again and again."""
    g = np.random.default_rng(seed)
    return [(g.integers(10, V, int(g.integers(2, 6))).tolist() * 9)[: int(g.integers(12, 40))] for _ in range(count)]


def outcome(completions):
    return [(c.token_ids, c.text, c.finish_reason) for c in completions]


def logprobs(completions):
    return [logprob for c in completions for logprob, _ in c.logprobs or ()]


@pytest.mark.sweep(keep=3)
@pytest.mark.parametrize("kind", ["ngram", "itself", "other"])
@pytest.mark.parametrize("int8,layers", [(False, False), (True, True), (True, False), (False, True)])
def test_replies_are_those_without_drafts(kind, int8, layers):
    """Greedy and seeded, penalties, log-probabilities, stop texts, replies of one request, in a pool that runs dry."""

    def engine(pool, **options):
        model = PagedRunner(shared_model(), **pool, int8=int8) if layers else shared_model()
        return Engine(model, tokenizer(), **pool, int8_cache=int8 and not layers, **options)

    requests = random_requests(40, [], seed=3)
    for i, prompt in enumerate(repetitive(8)):
        requests.append(Request(prompt, SamplingParams(max_tokens=30, temperature=0.3 * (i % 2), seed=i)))
    plain, limits = engine(POOL), {"max_num_seqs": 7, "max_num_batched_tokens": 33}
    expected = [plain.generate([request])[0] for request in requests]
    speculative = engine(TIGHT, **limits, speculator=make(kind, TIGHT))
    found, totals = speculative.generate(requests), speculative.totals
    assert list(map(outcome, found)) == list(map(outcome, expected))
    assert sum(map(logprobs, found), []) == pytest.approx(sum(map(logprobs, expected), []), abs=2e-4)
    assert totals["preemptions"] > 3 and totals["cached_tokens"] > 100
    assert totals["spec_decode_num_draft_tokens"] > (20 if kind == "ngram" else 300)
    assert totals["spec_decode_num_accepted_tokens"] > {"ngram": 0, "itself": 200, "other": 0}[kind]
    drafted = [sum(getattr(c, name) for cs in found for c in cs) for name in ("draft_tokens", "accepted_tokens")]
    assert drafted == [totals["spec_decode_num_draft_tokens"], totals["spec_decode_num_accepted_tokens"]]
    all_given_back(speculative)


def test_a_model_that_drafts_for_itself_is_always_right_and_takes_fewer_steps():
    """Greedy and sampled: the draft draws with the numbers with which the model will choose."""
    requests = [Request(p, greedy(20)) for p in prompts(3, 20)]
    requests += [
        Request(p, SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, seed=i, ignore_eos=True))
        for i, p in enumerate(prompts(3, 20, seed=1))
    ]
    plain = Engine(shared_model(), **POOL)
    expected = plain.generate(requests)
    engine = Engine(shared_model(), **POOL, speculator=make("itself", POOL))
    assert list(map(outcome, engine.generate(requests))) == list(map(outcome, expected))
    totals = engine.totals
    assert totals["spec_decode_num_accepted_tokens"] == totals["spec_decode_num_draft_tokens"] == 6 * 15
    assert plain.totals["steps"] == 20 and engine.totals["steps"] == 5  # the prompt's, then five tokens a step


@functools.cache
def babbler():
    """A model of few words, which says the same again and again."""
    return tiny({"vocab_size": 16})


def test_text_that_repeats_itself_is_guessed():
    requests = [Request([i, 3, i], greedy(60)) for i in range(3)]
    expected = Engine(babbler(), **POOL).generate(requests)
    engine = Engine(babbler(), **POOL, speculator=NgramSpeculator(4, 2))
    for request, completions in zip(requests, expected):
        before = engine.totals["steps"]
        (found,) = engine.generate([request])
        assert outcome(found) == outcome(completions) and found[0].accepted_tokens > 5
        assert engine.totals["steps"] - before == 60 - found[0].accepted_tokens
    assert 20 < engine.totals["spec_decode_num_accepted_tokens"] < engine.totals["spec_decode_num_draft_tokens"]


def test_the_latest_and_longest_match_is_continued():
    speculator = NgramSpeculator(4, 3)

    class Text:
        def __init__(self, tokens):
            self.tokens = tokens

    def draft(tokens, limit=4):
        return speculator.propose([Text(tokens)], [limit])[0]

    assert draft([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3]) == [4, 5, 9, 2]  # three tokens before the later two
    assert draft([2, 3, 4, 0, 2, 3, 5, 0, 2, 3]) == [5, 0, 2, 3]  # the latest
    assert draft([6, 7, 6, 7]) == [6, 7, 6, 7] and draft([8] * 3, 5) == [8] * 5  # goes on into itself
    assert draft([1, 2, 3, 1]) == [] and draft([4]) == [] and draft([1, 2, 3, 1, 2], 0) == []
    assert NgramSpeculator(4, 1).propose([Text([1, 2, 3, 1])], [2]) == [[2, 3]]
    assert draft([5, 6, -1, -1, 5, 6]) == []  # a trained prefix is no text
    text = Text([1, 2, 3])
    assert speculator.propose([text], [3]) == [[]]
    text.tokens += [1, 2]
    assert speculator.propose([text], [3]) == [[3, 1, 2]] and text in speculator.places
    speculator.release(text)
    speculator.release(text)
    assert text not in speculator.places


class Wrong:
    """Drafts that are never right."""

    max_draft_tokens = 5

    def __init__(self, right):
        self.right = right

    def propose(self, sequences, limits):
        return [
            [(token + 1) % V for token in self.right[len(s.tokens) :][:limit]] for s, limit in zip(sequences, limits)
        ]

    def check_vocabulary(self, vocab_size):
        pass

    def computed(self, scheduled):
        pass

    def release(self, sequence):
        pass


def test_nothing_of_a_rejected_draft_is_seen_or_shared():
    """Blocks that are full because of rejected tokens get no hash, and later requests compute the same."""
    (prompt,), params = prompts(1, 40), greedy(41)
    plain = Engine(shared_model(), num_blocks=60, block_size=3)
    (expected,) = plain.generate([Request(prompt, params)])
    right = [*prompt, *expected[0].token_ids]
    engine = Engine(shared_model(), num_blocks=60, block_size=3, speculator=Wrong(right))
    (found,) = engine.generate([Request(prompt, params)])
    assert outcome(found) == outcome(expected) and found[0].accepted_tokens == 0 and found[0].draft_tokens > 100
    assert engine.pool.block_of.keys() == plain.pool.block_of.keys()
    longer = Request(right, greedy(10))
    cached = [e.generate([longer])[0] for e in (engine, plain)]
    assert outcome(cached[0]) == outcome(cached[1]) and cached[0][0].cached_tokens == cached[1][0].cached_tokens > 40
    all_given_back(engine)


def test_drafts_take_no_block_that_another_sequence_needs():
    """A pool that has room for the replies and no more: drafts shrink, nothing is preempted."""
    requests = [Request(p[:8], greedy(24)) for p in prompts(4, seed=2)]
    blocks = sum(-(-(len(r.prompt_ids) + 24) // 8) for r in requests) + 1
    plain = Engine(shared_model(), num_blocks=blocks, block_size=8)
    expected = plain.generate(requests)
    engine = Engine(shared_model(), num_blocks=blocks, block_size=8, speculator=NgramSpeculator(6, 2))
    assert list(map(outcome, engine.generate(requests))) == list(map(outcome, expected))
    assert plain.totals["preemptions"] == engine.totals["preemptions"] == 0


def test_drafts_with_adapters_and_behind_a_prefix(adapters):  # noqa: F811
    requests = random_requests(12, list(adapters), seed=5)
    expected = [Engine(tiny(), tokenizer(), **POOL, adapters=adapters).generate([r])[0] for r in requests]
    engine = Engine(tiny(), tokenizer(), **POOL, adapters=adapters, speculator=make("itself", POOL))
    assert list(map(outcome, engine.generate(requests))) == list(map(outcome, expected))
    assert engine.totals["spec_decode_num_accepted_tokens"] > 10
    requests, model = [Request([i, 3, i], greedy(20)) for i in range(3)], tiny({"vocab_size": 16}, prefix=5)
    expected = Engine(model, **POOL).generate(requests)
    engine = Engine(model, **POOL, speculator=NgramSpeculator(4, 2))
    assert list(map(outcome, engine.generate(requests))) == list(map(outcome, expected))
    assert engine.totals["spec_decode_num_draft_tokens"] > 10


def test_a_draft_model_with_fewer_positions_drafts_as_far_as_they_reach():
    draft = tiny({"max_position_embeddings": 30})
    requests = [Request(p[:20], greedy(40)) for p in prompts(3, seed=3)] + [Request(prompts(1)[0] * 2, greedy(9))]
    expected = Engine(shared_model(), **POOL).generate(requests)
    engine = Engine(shared_model(), **POOL, speculator=DraftSpeculator(draft, 4, **POOL))
    assert list(map(outcome, engine.generate(requests))) == list(map(outcome, expected))
    assert 10 < engine.totals["spec_decode_num_accepted_tokens"] <= 3 * 30


def test_what_cannot_speculate_is_refused():
    with pytest.raises(UserError, match="speculate_method: SequentialRunner computes one token of a reply a step"):
        Engine(SequentialRunner(shared_model()), **POOL, speculator=NgramSpeculator(4, 2))
    with pytest.raises(UserError, match="draft_model_name_or_path: a model with a trained prefix cannot draft"):
        DraftSpeculator(tiny(prefix=3), 4, **POOL)
    with pytest.raises(UserError, match="its vocabulary has 99 ids, the model's 3072; they must be the same"):
        speculator = make_speculator("draft_model", 4, 2, tiny({"vocab_size": 99}), **POOL)
        Engine(shared_model(), **POOL, speculator=speculator)


def test_a_draft_becomes_sequences_of_one_token_over_the_same_blocks():
    one, two = TokenSequence([5, 6, 7], 2, [4], "ads"), TokenSequence([8, 9], 2, [1])
    scheduled = [ScheduledTokens(one, 2, 1), ScheduledTokens(two, 0, 2)]
    rows, first = rows_of(scheduled, {one: [10, 11]})
    assert first == [0, 3]
    assert [(row.start, row.count) for row in rows] == [(2, 1), (3, 1), (4, 1), (0, 2)] and rows[3].sequence is two
    view = rows[0].sequence
    assert view.tokens == [5, 6, 7, 10, 11] and view.blocks is one.blocks and view.adapter == "ads"
    assert one.tokens == [5, 6, 7] and all(row.sequence is view for row in rows[:3])


def test_serve_speculates_and_its_usage_and_metrics_say_so(start):  # noqa: F811
    args = serve.Args(model_name_or_path=DEMO, num_blocks=64, speculate_method="inference_with_reference")
    plain, _ = serve.build_engine(dataclasses.replace(args, speculate_method=None))
    body = {"prompt": "type#dress*color#red" * 3, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    expected = start(plain, tokenizer()).post("/v1/completions", body)[2]
    assert "completion_tokens_details" not in expected["usage"]
    args = dataclasses.replace(args, speculate_method="draft_model", draft_model_name_or_path=DEMO)
    engine, ours = serve.build_engine(args)
    server = start(engine, ours)
    reply = server.post("/v1/completions", body)[2]
    assert reply["choices"][0]["text"] == expected["choices"][0]["text"]
    counts = reply["usage"]["completion_tokens_details"]
    assert counts == {"accepted_prediction_tokens": 32, "rejected_prediction_tokens": 0}  # its own draft model
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") == 32
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") == 32
    assert server.metric("vllm:spec_decode_num_drafts_total") == 7


@pytest.mark.parametrize(
    "keys,message",
    [
        ("--speculate_method eagle", "speculate_method: 'eagle'; possible are ngram, inference_with_reference, draft"),
        ("--speculate_method draft_model", "draft_model and draft_model_name_or_path need one another"),
        ("--speculate_method ngram --draft_model x", "draft_model and draft_model_name_or_path need one another"),
        ("--speculate_method ngram --mode static", "mode: static computes one token of a reply a step"),
        (
            "--speculate_method ngram --num_speculative_tokens 0",
            "speculate_max_draft_token_num: 0; it must be at least",
        ),
    ],
)
def test_keys_that_cannot_be_are_one_line(keys, message):
    with pytest.raises(UserError, match=message):
        parse_args(serve.Args, ["configs/llama_serve.json", *keys.split()])
