"""Ops of serving on every back end that has them: paged attention, the cache, products of few rows, sampling.

    python -m pytest tests/kernels/test_serving_ops.py          # CPU, about 20 s, and as much once to build the C++ ops

Oracles: float64 attention per sequence, and reference.sample_logits. Letters as in kernels/__init__.py; S sequences.
"""

import itertools

import kernels
import kernels.reference

import numpy as np
import paddle
import pytest

pytestmark = pytest.mark.sweep(keep=12)

cpu = kernels._module("cpu")
BACKENDS = ["reference"] + ([] if cpu.missing("paged_attention") else ["cpu"])
built = pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiler")
on_each = pytest.mark.parametrize("backend", BACKENDS)
with_each_set = pytest.mark.parametrize("instructions", [0, 1, 2])


def random(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# ============================================================================================== paged attention


def paged_case(
    queries, contexts, block_size, H, K, Dh, int8=False, seed=0, spoil=1e4, slopes=None, window=None, softcap=None
):
    """(arguments of kernels.paged_attention, naive float64 output (N, H, Dh)) with blocks in any order.

    What must not be seen is `spoil`. int8 caches hold random codes; the oracle multiplies them by their scales.
    """
    unseen = window is not None and spoil
    g = np.random.default_rng([seed, H, Dh, block_size])
    queries, contexts = np.array(queries), np.array(contexts)
    widths = -(-contexts // block_size)
    free = g.permutation(int(widths.sum()) + 3)
    tables = np.zeros((len(queries), widths.max()), np.int32)
    shape = len(free), block_size, K, Dh
    if int8:
        caches = [np.full(shape, 127, np.int8) for _ in range(2)]
        scales = [np.full(shape[:3], spoil, np.float32) for _ in range(2)]
    else:
        caches, scales = [np.full(shape, spoil, np.float32) for _ in range(2)], [None, None]
    q, expected, first = g.standard_normal((queries.sum(), H, Dh)).astype(np.float32), [], 0
    for s, (count, context, width) in enumerate(zip(queries, contexts, widths)):
        tables[s, :width], free = free[:width], free[width:]
        at = tables[s, np.arange(context) // block_size], np.arange(context) % block_size
        kv = []
        for cache, of in zip(caches, scales):
            if int8:
                cache[at] = g.integers(-127, 128, (context, K, Dh))
                of[at] = g.uniform(0.001, 0.02, (context, K))
                kv.append(cache[at].astype(np.float64) * of[at][..., None])
            else:
                cache[at] = g.standard_normal((context, K, Dh))
                kv.append(cache[at].astype(np.float64))
            if unseen:  # keys that the window of the first query is past
                past = [x[: max(0, context - count + 1 - window)] for x in at]
                (of if int8 else cache)[tuple(past)] = spoil
        k, v = (np.repeat(x, H // K, axis=1) for x in kv)  # (context, H, Dh)
        x = np.einsum("qhd,khd->hqk", q[first : first + count].astype(np.float64), k) * Dh**-0.5
        distance = np.arange(context - count, context)[:, None] - np.arange(context)  # (queries, keys)
        if softcap is not None:
            x = softcap * np.tanh(x / softcap)
        if slopes is not None:
            x -= slopes[:, None, None] * distance
        x[:, (distance < 0) | (distance >= (window or np.inf))] = -np.inf
        p = np.exp(x - x.max(-1, keepdims=True))
        expected.append(np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v))
        first += count
    tensors = [paddle.to_tensor(x) for x in (q, *caches)]
    extra = {n: paddle.to_tensor(s) for n, s in zip(("k_scales", "v_scales"), scales)} if int8 else {}
    given = {
        "alibi_slopes": None if slopes is None else paddle.to_tensor(slopes.astype(np.float32)),
        "window": window,
        "softcap": softcap,
    }
    extra |= {name: value for name, value in given.items() if value is not None}
    return (*tensors, tables, queries, contexts), extra, np.concatenate(expected)


CASES = [  # queries, contexts, block_size, H, K, Dh
    ([1], [1], 16, 1, 1, 1), ([1], [1], 1, 4, 2, 64), ([1, 1, 1], [5, 123, 16], 16, 4, 4, 32), ([1, 1], [700, 255], 16,
        6, 2, 80),
    ([1], [1025], 3, 7, 1, 5), ([1, 1], [256, 257], 8, 8, 1, 128), ([1], [300], 16, 3, 3, 256), ([1, 1], [40, 33], 16,
        10, 2, 96),
    ([5], [5], 16, 4, 4, 64), ([5, 123], [123, 123], 16, 4, 2, 20), ([130, 1, 2, 1], [200, 300, 2, 64], 16, 12, 3, 64),
    ([64, 65], [64, 129], 7, 2, 1, 33), ([3], [70], 16, 9, 1, 256), ([1, 17, 1], [1, 17, 90], 1, 2, 2, 16),
]  # fmt: skip


@on_each
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_paged_attention(backend, int8, case):
    arguments, extra, expected = paged_case(*case, int8=int8)
    with kernels.use(f"paged_attention={backend}"):
        actual = kernels.paged_attention(*arguments, **extra).numpy()
    assert actual.shape == expected.shape and np.abs(actual - expected).max() < 5e-6 * max(1, np.abs(expected).max())


@on_each
@pytest.mark.parametrize("case", CASES[:6] + CASES[8:11])
def test_paged_attention_of_a_bfloat16_cache(backend, case):
    (q, k, v, *rest), _, _ = paged_case(*case)
    halves = [t.astype("bfloat16") for t in (k, v)]
    with kernels.use(f"paged_attention={backend}"):
        actual = kernels.paged_attention(q, *halves, *rest).numpy()
        expected = kernels.paged_attention(q, *(t.astype("float32") for t in halves), *rest).numpy()
    assert np.abs(actual - expected).max() < 1e-6 * max(1, np.abs(expected).max())


@on_each
def test_a_bfloat16_cache_is_written_rounded(backend):
    k, v, slots = random((3, 2, 5)), random((3, 2, 5), 1), np.array([4, 0, 7])
    caches = [paddle.zeros([3, 3, 2, 5], "bfloat16") for _ in range(2)]
    with kernels.use(f"write_cache={backend}"):
        kernels.write_cache(*map(paddle.to_tensor, (k, v)), *caches, paddle.to_tensor(slots))
    for x, cache in zip((k, v), caches):
        expected = np.zeros((9, 2, 5), np.float32)
        expected[slots] = paddle.to_tensor(x).astype("bfloat16").astype("float32").numpy()
        assert np.array_equal(cache.astype("float32").numpy().reshape(9, 2, 5), expected)


def options(names, H):
    """Keyword arguments of paged_case for names: "alibi", "softcap" or a number (window)."""
    actual = {"slopes": np.float64(0.9 ** np.arange(1, H + 1).astype(np.float32))} if "alibi" in names else {}
    if "softcap" in names:
        actual["softcap"] = 1.5
    windows = [int(name) for name in names.split() if name.isdigit()]
    return actual | ({"window": windows[-1]} if windows else {})


@on_each
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("names", ["alibi", "softcap", "1", "7", "100", "256", "alibi softcap 60"])
def test_paged_attention_with_a_bias_a_window_and_a_cap(backend, int8, case, names):
    arguments, extra, expected = paged_case(*case, int8=int8, **options(names, case[3]))
    with kernels.use(f"paged_attention={backend}"):
        actual = kernels.paged_attention(*arguments, **extra).numpy()
    assert actual.shape == expected.shape and np.abs(actual - expected).max() < 5e-6 * max(1, np.abs(expected).max())


@on_each
def test_paged_attention_with_alternating_windows(backend):
    """As in Gemma 2, layer by layer, with arrays that the back end may reuse."""
    q, k, v, *arrays = paged_case([1, 1, 4], [30, 20, 60], 16, 4, 2, 32)[0]
    for a in arrays:
        a.flags.writeable = False
    with kernels.use(f"paged_attention={backend}"):
        actual = [kernels.paged_attention(q, k, v, *arrays, window=window).numpy() for window in (None, 8, None, 8, 25)]
    assert np.array_equal(actual[0], actual[2]) and np.array_equal(actual[1], actual[3])
    assert np.abs(actual[0] - actual[1]).max() > 0.1 and np.abs(actual[1] - actual[4]).max() > 0.1
    with kernels.use(f"paged_attention={backend}"):
        for wrong, says in (({"window": 0}, "a window of 0 keys"), ({"softcap": 0.0}, "a softcap of 0.0")):
            with pytest.raises(AssertionError, match=says):
                kernels.paged_attention(q, k, v, *arrays, **wrong)


@on_each
def test_paged_attention_with_large_scores(backend):
    (q, *rest), extra, _ = paged_case([1, 70], [600, 130], 16, 4, 2, 64)
    with kernels.use(f"paged_attention={backend}"):
        actual = kernels.paged_attention(q * 200.0, *rest, scale=1.0).numpy()
    assert np.isfinite(actual).all() and np.abs(actual).max() < 10


@built
@with_each_set
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("Dh", [64, 20, 7])
@pytest.mark.parametrize("names", ["", "alibi softcap 60"])
def test_paged_attention_with_every_instruction_set(instructions, int8, Dh, names, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTIONS", instructions)
    arguments, extra, expected = paged_case([1, 90, 1, 3], [520, 100, 7, 80], 16, 14, 2, Dh, int8, **options(names, 14))
    assert np.abs(kernels.paged_attention(*arguments, **extra).numpy() - expected).max() < 5e-6


@on_each
def test_paged_attention_sees_nothing_beyond_its_contexts(backend):
    """Not even NaN in the rest of a block, in slots of other heads, or in other blocks."""
    for int8, names in itertools.product((False, True), ("", "4", "alibi 21 softcap")):
        for case in (([1, 1], [33, 5], 16, 4, 2, 20), ([20, 1], [33, 5], 16, 4, 2, 20)):
            arguments, extra, expected = paged_case(*case, int8=int8, spoil=np.nan, **options(names, 4))
            if backend == "reference":
                continue  # reads a sequence's own last block to its end and multiplies by zero
            actual = kernels.paged_attention(*arguments, **extra).numpy()
            assert np.abs(actual - expected).max() < 5e-6


@on_each
def test_paged_attention_reuses_tables_only_for_the_same_frozen_arrays(backend):
    arguments, _, expected = paged_case([1, 1], [30, 20], 16, 4, 2, 32)
    tensors, arrays = arguments[:3], [a.copy() for a in arguments[3:]]
    with kernels.use(f"paged_attention={backend}"):
        assert np.abs(kernels.paged_attention(*tensors, *arrays).numpy() - expected).max() < 5e-6
        arrays[2][0] = 25  # the same object, changed: it is writeable, so it must be read again
        changed = kernels.paged_attention(*tensors, *arrays).numpy()
        assert np.abs(changed[0] - expected[0]).max() > 1e-3 and np.abs(changed[1] - expected[1]).max() < 5e-6
        frozen = [a.copy() for a in arguments[3:]]
        for a in frozen:
            a.flags.writeable = False
        for _ in range(2):
            assert np.abs(kernels.paged_attention(*tensors, *frozen).numpy() - expected).max() < 5e-6
        with pytest.raises(AssertionError, match="count the queries"):
            kernels.paged_attention(tensors[0], *tensors[1:], frozen[0], np.array([1, 1]), np.array([30, 0]))


@built
def test_a_block_outside_the_pool_is_refused():
    (q, k, v, tables, queries, contexts), _, _ = paged_case([1, 4], [30, 20], 16, 4, 2, 32)
    tables[1, 1] = k.shape[0]
    with pytest.raises((ValueError, RuntimeError, OSError), match="is not one of"):
        kernels.paged_attention(q, k, v, tables, queries, contexts)
    with pytest.raises((ValueError, RuntimeError, OSError), match="is not one of"):
        kernels.write_cache(k[0], v[0], k, v, kernels.to_tensor(np.full(16, k.shape[0] * 16)))


# ==================================================================================================== the cache


@on_each
@pytest.mark.parametrize("K, Dh", [(2, 64), (1, 5), (3, 20)])
def test_write_cache_in_float(backend, K, Dh):
    k, v, slots = random((7, K, Dh), 1), random((7, K, Dh), 2), np.array([5, 0, 11, 3, 4, 9, 7])
    caches = [paddle.full([4, 3, K, Dh], 9.0) for _ in range(2)]
    expected = np.full((2, 12, K, Dh), 9.0, np.float32)
    expected[0, slots], expected[1, slots] = k, v
    with kernels.use(f"write_cache={backend}"):
        kernels.write_cache(paddle.to_tensor(k), paddle.to_tensor(v), *caches, kernels.to_tensor(slots))
    for cache, rows in zip(caches, expected):
        assert (cache.numpy().reshape(rows.shape) == rows).all()


@on_each
@pytest.mark.parametrize("K, Dh", [(2, 64), (1, 5), (3, 20)])
def test_write_cache_in_int8(backend, K, Dh):
    """Each value is within half a step of its token and head; nothing else changes; zeros stay zeros."""
    k, v, slots = random((7, K, Dh), 1) * 3, random((7, K, Dh), 2), np.array([5, 0, 11, 3, 4, 9, 7])
    k[2], v[3, -1] = 0.0, 0.0
    caches = [paddle.full([4, 3, K, Dh], 9, "int8") for _ in range(2)]
    scales = [paddle.full([4, 3, K], 7.0) for _ in range(2)]
    with kernels.use(f"write_cache={backend}"):
        kernels.write_cache(paddle.to_tensor(k), paddle.to_tensor(v), *caches, kernels.to_tensor(slots), *scales)
    others = np.setdiff1d(np.arange(12), slots)
    for x, cache, scale in zip((k, v), caches, scales):
        codes, scale = cache.numpy().reshape(12, K, Dh), scale.numpy().reshape(12, K)
        assert (codes[others] == 9).all() and (scale[others] == 7).all()
        assert np.abs(scale[slots] - np.abs(x).max(-1) / 127).max() < 1e-7
        assert (
            np.abs(codes[slots].astype(np.float32) * scale[slots][..., None] - x) <= 0.5001 * scale[slots][..., None]
        ).all()
        assert (np.abs(codes[slots]).max(-1) == 127 * (np.abs(x).max(-1) > 0)).all()


@built
@with_each_set
def test_write_cache_with_every_instruction_set(instructions):
    k, v, slots = (
        (paddle.to_tensor(random((9, 2, 20), i)) for i in range(2)),
        None,
        kernels.to_tensor(np.arange(9)[::-1].copy()),
    )
    k, v = k
    actual = []
    for which in (instructions, -1):
        made = [paddle.zeros([3, 3, 2, 20], "int8") for _ in range(2)] + [paddle.zeros([3, 3, 2]) for _ in range(2)]
        cpu._C_ops._run_custom_op("cpu_write_cache", k, v, *made[:2], slots, *made[2:], which)
        actual.append([t.numpy() for t in made])
    for a, b in zip(*actual):
        assert (a == b).all()


# ================================================================================================ few-row products


@built
@pytest.mark.parametrize(
    "rows, n_in, n_out",
    [(1, 1, 1), (5, 123, 77), (1, 300, 1000), (3, 64, 48), (16, 129, 400), (32, 70, 770), (7, 65, 16)],
)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_linear_of_few_rows(rows, n_in, n_out, stored, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    x, w, b = random((rows, n_in)), paddle.to_tensor(random((n_in, n_out), 1)).astype(stored), random((n_out,), 2)
    expected = x.astype(np.float64) @ w.astype("float32").numpy().astype(np.float64) + b
    scale = np.abs(x).astype(np.float64) @ np.abs(w.astype("float32").numpy())
    shape = [rows, n_in] if rows % 2 else [1, rows, n_in]
    bias = paddle.to_tensor(b)
    with paddle.no_grad():
        actual = kernels.linear(paddle.to_tensor(x).reshape(shape), w, bias)
        assert cpu._few_rows(paddle.to_tensor(x), w, bias) is not None and actual.dtype == paddle.float32
    assert (
        actual.shape == [*shape[:-1], n_out]
        and (np.abs(actual.numpy().reshape(expected.shape) - expected) < 2e-6 * (scale + 1)).all()
    )
    for which in (0, 1, 2):
        y = cpu._C_ops._run_custom_op("cpu_few_rows_linear", paddle.to_tensor(x), w, bias, which)[0].numpy()
        assert (np.abs(y - expected) < 2e-6 * (scale + 1)).all()


@built
def test_the_few_rows_kernel_is_not_used_with_gradients_or_many_rows():
    x, w = paddle.to_tensor(random((2, 8)), stop_gradient=False), paddle.to_tensor(random((8, 4)))
    assert cpu._few_rows(x, w, None) is None
    (kernels.linear(x, w).sum()).backward()
    assert np.abs(x.grad.numpy() - w.numpy().sum(1)).max() < 1e-5
    with paddle.no_grad():
        assert cpu._few_rows(paddle.to_tensor(random((33, 8))), w, None) is None
        assert cpu._few_rows(x.astype("float64"), w, None) is None
        one = x[:1].contiguous()
        assert cpu._few_rows(one, w, None) is None and cpu._few_rows(one, w.astype("bfloat16"), None) is not None


# ==================================================================================================== sampling


def drawn(logits, temperature, top_k, top_p, seeds):
    """sample_logits of each row with its own generator, and the uniform numbers that the generators draw."""
    rows = zip(logits, temperature, top_k, top_p, seeds)
    ids = [
        kernels.reference.sample_logits(x[None], t, k, p, np.random.default_rng(seed))[0] if t else x.argmax()
        for x, t, k, p, seed in rows
    ]
    return np.array(ids), np.array([np.random.default_rng(seed).random() for seed in seeds])


@on_each
@pytest.mark.parametrize("S, V", [(1, 1), (40, 5), (60, 123), (30, 4096), (3, 32000)])
@pytest.mark.parametrize("kind", ["spread", "flat", "ties", "banned"])
def test_sample_equals_the_oracle(backend, S, V, kind, monkeypatch):
    g = np.random.default_rng([S, V])
    logits = g.standard_normal((S, V)).astype(np.float32) * {"spread": 4, "flat": 0.01, "ties": 2, "banned": 3}[kind]
    if kind == "ties":
        logits = logits.round()
    if kind == "banned":
        logits[:, ::3] = -np.inf
        logits[:, V // 2] = 0
    temperature = g.choice([0.0, 0.3, 0.95, 1.0, 2.5], S)
    top_k, top_p = g.choice([0, 1, 7, 40, V, V + 3], S), g.choice([1e-6, 0.2, 0.7, 0.95, 1.0], S)
    expected, uniform = drawn(logits, temperature, top_k, top_p, range(100, 100 + S))
    with kernels.use(f"sample={backend}"):
        actual = kernels.sample(paddle.to_tensor(logits), temperature, top_k, top_p, uniform)
    assert actual.dtype == paddle.int64 and actual.numpy().tolist() == expected.tolist()
    if backend == "cpu":
        for which in (0, 1):
            monkeypatch.setattr(cpu, "INSTRUCTIONS", which)
            actual = kernels.sample(paddle.to_tensor(logits), temperature, top_k, top_p, uniform)
            assert actual.tolist() == expected.tolist()


@on_each
def test_sample_with_probabilities_that_sum_to_exactly_top_p(backend):
    """Four ids of probability 1/4 and top_p 1/2: two are kept; a uniform number on the boundary selects the next id."""
    logits = paddle.to_tensor(np.array([[1, 0, 1, 1, 1]] * 5, np.float32) * 1e4)
    uniform = np.array([0.0, 0.49999, 0.5, 0.75, 0.99999])
    with kernels.use(f"sample={backend}"):
        for top_p, expected in ((0.5, [0, 0, 2, 2, 2]), (0.25, [0] * 5), (1.0, [0, 2, 3, 4, 4])):
            assert kernels.sample(logits, np.ones(5), np.zeros(5, int), np.full(5, top_p), uniform).tolist() == expected


@on_each
def test_penalties_are_those_of_each_id_and_the_logits_stay(backend):
    g, (S, V) = np.random.default_rng(2), (12, 3000)
    logits = g.standard_normal((S, V)).astype(np.float32)
    logits[:, ::7] = -np.inf
    said = [np.stack([g.permutation(V)[:n], g.integers(0, 3, n)], 1) for n in (0, 1, 40, *[2500] * (S - 3))]
    penalties = list(zip(g.choice([1.0, 0.8, 1.3], S), g.choice([0.0, 0.4, -0.2], S), g.choice([0.0, 0.3], S)))
    changed = logits.copy()
    for row, ids, (repetition, presence, frequency) in zip(changed, said, penalties):
        for i, count in ids:
            row[i] = row[i] / np.float32(repetition) if row[i] > 0 else row[i] * np.float32(repetition)
            row[i] -= np.float32(presence * (count > 0) + frequency * count)
    how = g.choice([0.0, 0.8], S), np.zeros(S, int), np.full(S, 0.9), g.random(S)
    with kernels.use(f"sample={backend}"):
        tensor = paddle.to_tensor(logits)
        expected = kernels.sample(paddle.to_tensor(changed), *how).tolist()
        assert kernels.sample(tensor, *how, said, penalties).tolist() == expected
        assert np.array_equal(tensor.numpy(), logits) and kernels.sample(tensor, *how).tolist() != expected


@on_each
def test_sample_reports_rows_that_are_not_finite(backend):
    rows = random((5, 50))
    rows[0, 3], rows[1, 49], rows[2], rows[3, 7] = np.nan, np.inf, -np.inf, -np.inf
    for temperature in (0.0, 1.0):
        with kernels.use(f"sample={backend}"):
            actual = kernels.sample(
                paddle.to_tensor(rows), np.full(5, temperature), np.zeros(5, int), np.full(5, 0.9), np.full(5, 0.5)
            )
        assert (actual.numpy() < 0).tolist() == [True, True, True, False, False]


@on_each
@pytest.mark.parametrize("S, V, count", [(1, 1, 1), (40, 123, 20), (3, 32000, 0), (5, 32000, 20)])
def test_log_probabilities_equal_float64(backend, S, V, count):
    g = np.random.default_rng([S, V])
    logits = (4 * g.standard_normal((S, V))).astype(np.float32)
    logits[::2] = logits[::2].round()  # ties
    logits[1:, 7 % V] = -np.inf
    ids, temperature = g.integers(0, V, S), g.choice([0.3, 1.0, 2.5], S)
    x = logits.astype(np.float64) / temperature[:, None]
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    entropy = -(np.exp(x) * np.maximum(x, -1e4)).sum(-1)
    expected = x[np.arange(S), ids], entropy, best, np.take_along_axis(x, best, -1)
    with kernels.use(f"log_probabilities={backend}"):
        found = kernels.log_probabilities(paddle.to_tensor(logits), ids, temperature, count)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-6)
    for which in (0, 1) if backend == "cpu" else ():
        tensors = paddle.to_tensor(logits), paddle.to_tensor(ids), paddle.to_tensor(temperature)
        numbers, tops = cpu._C_ops._run_custom_op("cpu_log_probabilities", *tensors, count, which)
        np.testing.assert_allclose(numbers.numpy()[:, 2:], found[3], atol=1e-6)
        assert np.array_equal(tops.numpy(), best)


# ================================================================================================== determinism

BITS = """
import hashlib, json, os, sys
if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np, kernels, paddle
kernels.configure("cpu")
g = np.random.default_rng(0)
n = lambda *s: paddle.to_tensor(g.standard_normal(s).astype("float32"))
tables = np.arange(300, dtype=np.int32).reshape(3, 100)
with paddle.no_grad():
    lengths = np.array([1, 78, 1]), np.array([1600, 500, 3])
    results = [kernels.paged_attention(n(80, 8, 64), n(300, 16, 2, 64), n(300, 16, 2, 64), tables, *lengths, **more)
             for more in ({}, {"alibi_slopes": n(8).abs(), "window": 700, "softcap": 2.0})]
    results += [kernels.sample(n(16, 4096), np.full(16, 0.8), np.zeros(16, int), np.full(16, 0.9), g.random(16))]
    results += [kernels.linear(n(m, 300), n(300, 1000)) for m in (1, 16)]
print(json.dumps(hashlib.sha256(b"".join(t.numpy().tobytes() for t in results)).hexdigest()))
"""


@built
def test_the_same_bits_with_one_thread_and_with_all(run_python):
    assert run_python(BITS, "1") == run_python(BITS, "all")
