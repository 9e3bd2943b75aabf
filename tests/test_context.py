"""Context parallelism (ranks of sep share the tokens of a row), by heads and around a ring, beside one process.

    python -m pytest tests/test_context.py             # a minute on two cores
    python -m pytest tests/test_context.py --slow      # all 41 configurations of families.py

Losses and norms of several steps of AdamW and every gradient of the first are compared (jobs_tensor.both); rows are of
an odd length, packed or padded."""

import functools
import math

import numpy as np
import paddle
import pytest
import tiny_models
from pool import Ranks
from test_ops import random_rows
from test_tensor import compare

import formats.files
import parallel
from distributed.context import RingMask, check_context, token_layout, zigzag_indices
from distributed.tensor import check_tensor
from parallel import Degrees, Topology

pytestmark = pytest.mark.sweep(keep=2)

ALIBI, WINDOW = "baichuan_13b", "mistral"


def heads(sep, **more):
    return {"sep": sep, **more}


def ring(sep, **more):
    return {"sep": sep, "context": True, **more}


def takes(name, degrees):
    return not check_context(tiny_models.config(name), Degrees(**degrees))


# ========================================================================================== which tokens, and masks


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("T", [1, 5, 8, 13, 24])
@pytest.mark.parametrize("is_ring", [False, True])
def test_every_token_is_with_one_rank(size, T, is_ring):
    places = [zigzag_indices(T, size, rank, is_ring) for rank in range(size)]
    assert len({len(p) for p in places}) == 1
    everyone = np.concatenate(places)
    assert sorted(everyone) == list(range(len(everyone))) and len(everyone) >= T


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ranks_of_a_ring_have_as_much_to_do(size):
    """Pairs of query and key under a causal mask: in even runs the last rank would have nearly twice the mean."""
    T = 16 * size
    pairs = [int((zigzag_indices(T, size, rank, True) + 1).sum()) for rank in range(size)]
    assert len(set(pairs)) == 1
    even = [int((zigzag_indices(T, size, rank, False) + 1).sum()) for rank in range(size)]
    assert max(even) / (sum(even) / size) == pytest.approx(2 - 1 / size, abs=0.05)


@pytest.mark.parametrize("kind", ["none", "packed", "random", "window", "context"])
@pytest.mark.parametrize("T, size", [(13, 2), (24, 3), (5, 4), (40, 4)])
@pytest.mark.parametrize("before", [0, 3])
def test_chunks_see_what_rows_say(kind, T, size, before):
    """Each rank's pairs of chunks put together, those that are left out as zeros, are the mask of the whole."""
    B, Tk, n = 2, before + T, 2 if kind == "context" else 1
    packed = np.where(np.arange(Tk) < before + 4, before + 4, Tk)
    rows = {
        "packed": np.tile(packed.reshape(1, 1, -1, 1), (B, 1, 1, 1)),
        "random": random_rows(1, 1, B, Tk, True),
        "context": random_rows(2, 1, B, Tk, False),
        "window": np.tile((np.arange(Tk) + 4).reshape(1, 1, -1, 1), (B, 1, 1, 1)),
    }.get(kind)
    row, key = np.arange(before, Tk)[:, None], np.arange(Tk)
    seen = np.ones((B, T, Tk), bool) if n == 2 else np.tile(key <= row, (B, 1, 1))
    if rows is not None:
        at = rows[:, 0, None]  # (B, 1, Tk, n)
        seen &= ~((row >= at[..., 0]) | (row < at[..., 1]) if n == 2 else row >= at[..., 0])
    found, skipped = np.zeros_like(seen), 0
    for rank in range(size):
        sep = Topology(Degrees(sep=size), rank).sep
        mask_rows = None if rows is None else paddle.to_tensor(rows.astype("int32"))
        chunks = RingMask(mask_rows, before, token_layout(T, sep, True), sep)
        assert chunks.causal == (n == 1)
        C = chunks.C
        for queries in chunks.local_chunks:
            for keys in [*range(2 * size), *([None] if before else [])]:
                if (pair := chunks.pair(queries, keys)) is None:
                    skipped += 1
                    continue
                here, offset = pair
                first, width = (0, before) if keys is None else (before + keys * C, C)
                r, k = np.arange(C)[:, None] + offset, np.arange(width)
                part = np.ones((B, C, width), bool) if n == 2 else np.tile(k <= r, (B, 1, 1))
                if here is not None:
                    at = here.numpy()[:, 0, None]
                    part &= ~((r >= at[..., 0]) | (r < at[..., 1]) if n == 2 else r >= at[..., 0])
                for i in range(C):
                    for j in range(width):
                        if queries * C + i < T and first + j < Tk:
                            found[:, queries * C + i, first + j] |= part[:, i, j]
                        elif first + j >= Tk and queries * C + i < T:
                            assert not part[:, i, j].any(), "a token sees what fills the row up"
    assert np.array_equal(found, seen)
    assert skipped > 0 or kind == "context"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.sweep(keep=1)
def test_collectives_of_an_axis(size, two, four):
    for rank, (passed, parts, sent) in enumerate((two if size == 2 else four).run("jobs_context:collectives", size)):
        assert (passed == (rank - 1) % size).all()
        assert np.array_equal(parts, np.tile(10.0 * np.arange(size)[:, None] + rank, (1, 5)))
        assert sent == 4 * (6 + 5 * size)


# ============================================================================================= beside one process

FAMILIES = (
    "llama",
    "llama_bias_tied",
    "glm4",
    "bloom",
    ALIBI,
    WINDOW,
    "gemma2",
    "chatglm",
    "opt",
    "mixtral",
)  # of even heads
BY_RING = ("llama_mqa", "gpt2", "deepseek_v2", "qwen2_moe", "baichuan2_13b", "opt_350m")  # and of any


@pytest.mark.parametrize("way", [heads, ring])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.sweep(keep=1)
def test_families(two, way, packed):
    names = FAMILIES + (BY_RING if way is ring else ())
    compare(two, [(name, {"degrees": way(2), "steps": 2, "packed": packed}) for name in names])


@pytest.mark.parametrize("way", [heads, ring])
def test_adapters(two, way):
    kinds = {
        "llama": ("lora", "prefix", "neftune"),
        ALIBI: ("prefix",),
        WINDOW: ("prefix",),
        "chatglm": ("prefix",),
    }
    cases = [
        (name, {"degrees": way(2), "steps": 2, "kind": kind, "packed": True})
        for name, found in kinds.items()
        for kind in found
    ]
    compare(two, [*cases, (ALIBI, {"degrees": way(2), "steps": 2, "kind": "lora", "packed": True})])


@pytest.mark.parametrize("way", [heads, ring])
def test_four_ranks(four, way):
    """Also where key heads are fewer than ranks, and rows so short that ranks have no token."""
    cases = [
        ("llama", {"degrees": way(4), "packed": True}),
        ("llama", {"degrees": way(4), "T": 3, "steps": 1}),
        ("gemma2", {"degrees": way(4), "packed": True, "steps": 2}),
        ("qwen3_moe", {"degrees": way(4), "steps": 2}),
        ("chatglm", {"degrees": way(4), "kind": "prefix", "packed": True, "steps": 1}),
    ]
    compare(four, cases)


@pytest.mark.parametrize("way", [heads, ring])
@pytest.mark.sweep(keep=1)
def test_beside_tensor_and_data_parallelism(four, way):
    cases = [
        ("llama", {"degrees": way(2, tp=2), "packed": True, "steps": 2}),
        (
            "llama",
            {
                "degrees": way(2, tp=2, sequence_parallel=True),
                "kind": "lora",
                "packed": True,
                "steps": 2,
                "recompute": True,
            },
        ),
        ("mixtral_window", {"degrees": way(2, tp=2, sequence_parallel=True), "steps": 2, "packed": True}),
        ("bloom", {"degrees": way(2, dp=2), "micro": 2, "packed": True}),
        ("llama", {"degrees": way(2, sharding=2), "micro": 3, "kind": "lora", "steps": 2}),
    ]
    compare(four, cases)


@pytest.mark.parametrize("way", [heads, ring])
@pytest.mark.parametrize("name", ["llama", "chatglm", WINDOW])
def test_outside_of_training(two, way, name):
    """Losses and predictions of an evaluation, logits, hidden states, the sums of dpo.py; generated tokens."""
    for off, same in two.run("jobs_context:outside_of_training", name, way(2)):
        assert off < 2e-6 and same == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("way", [heads, ring])
@pytest.mark.parametrize("packed", [False, True])
def test_every_family(two, four, way, packed):
    options = {"steps": 2, "packed": packed}
    for ranks, degrees in ((two, way(2)), (four, way(4)), (four, way(2, tp=2, sequence_parallel=True))):
        names = [
            n
            for n in tiny_models.NAMES
            if takes(n, degrees) and not check_tensor(tiny_models.config(n), Degrees(**degrees))
        ]
        compare(ranks, [(name, {"degrees": degrees, **options}) for name in names])


@pytest.mark.slow
def test_every_adapter_of_every_way(four):
    cases = []
    for way in (heads(4), ring(4), heads(2, tp=2, sequence_parallel=True), ring(2, tp=2, sequence_parallel=True)):
        for name in ("llama", "deepseek_v2", WINDOW, "bloom"):
            if not takes(name, way) or check_tensor(tiny_models.config(name), Degrees(**way)):
                continue
            kinds = ["lora", "dora", "neftune", "prefix", "projection"]
            cases += [(name, {"degrees": way, "kind": kind, "packed": True, "recompute": True}) for kind in kinds]
    compare(four, cases)


# ========================================================================================= memory, and what is refused


def test_activations_fall_with_the_ranks(two, four):
    """Of 4,096 tokens, with adapters alone trained: what is kept for backward, nearly in half and in four."""
    changes = {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    }
    measure = functools.partial(four.run, "jobs_context:live_bytes", T=4096, changes=changes)
    for way in (heads, ring):
        one = max(two.run("jobs_context:live_bytes", way(1, dp=2), T=4096, changes=changes))
        half = max(two.run("jobs_context:live_bytes", way(2), T=4096, changes=changes))
        quarter = max(measure(way(4)))
        assert half < 0.55 * one and quarter < 0.3 * one, (one, half, quarter)


@pytest.mark.parametrize(
    "name, degrees, T, message",
    [
        ("llama", heads(3), None, "sep_parallel_degree 3 does not divide attention heads (4): "),
        ("llama", heads(4, tp=2), None, "attention heads (2, which tensor_parallel_degree 2 leaves a rank of 4)"),
        ("llama", ring(4), 7, "context_parallel_degree 4 x 2 = 8 is more than tokens of a sequence (7)"),
        ("llama", heads(4), 3, "sep_parallel_degree 4 is more than tokens of a sequence (3)"),
    ],
)
def test_what_cannot_be_shared(name, degrees, T, message):
    found = check_context(tiny_models.config(name), Degrees(**degrees), T)
    assert len(found) == 1 and message in found[0]
    if T is None:
        with pytest.raises(formats.files.UserError, match="does not divide"):
            parallel.parallelize(tiny_models.build(name), Topology(Degrees(**degrees)))


def test_what_can_be_shared():
    for degrees in (Degrees(), Degrees(sep=2), Degrees(sep=3, context=True), Degrees(sep=2, tp=2)):
        assert check_context(tiny_models.config("llama"), degrees, 64) == []


# ======================================================================================================= a script


@pytest.mark.parametrize("key", ["sep_parallel_degree", "context_parallel_degree"])
@pytest.mark.sweep(keep=1)
def test_a_script(two, tmp_path, key):
    """finetune.py, packed, as the same with one process: losses, norms, evaluation."""
    argv = """--dataset_name_or_path demo/sft --model_name_or_path demo/llama --do_train true --zero_padding true
        --max_length 96 --src_length 48 --max_steps 2 --lora true --logging_steps 1 --save_strategy no
        --learning_rate 1e-3 --per_device_train_batch_size 1 --disable_tqdm true""".split()
    found = []
    for more in ([f"--{key}", "2"], []):
        folder = str(tmp_path / f"{len(found)}")
        if more:
            rows = two.run("jobs_parallel:script", "finetune", [*argv, *more, "--output_dir", folder])[0][0]
        else:
            rows = run_alone([*argv, "--output_dir", folder])
        found.append([(row["loss"], row["grad_norm"]) for row in rows])
    assert len(found[0]) == len(found[1]) == 2
    for row, wanted in zip(*found):
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(row, wanted)), (row, wanted)


def run_alone(argv):
    with Ranks(1) as one:
        return one.run("jobs_parallel:script", "finetune", argv)[0][0]
