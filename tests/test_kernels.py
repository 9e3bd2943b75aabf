"""Every op of kernels/ on every back end that has it, forward and backward, against a naive float64 version in numpy.

    python -m pytest tests/test_kernels.py          # CPU, about 20 s, and as much once to build the C++ ops

Letters as in kernels/__init__.py. Tolerances are for float32: a relative 2e-6 a rounding, times what the sums add up.
"""
import itertools

import numpy as np
import paddle
import pytest

import kernels
import kernels.reference
from data import UserError

cpu = kernels._module("cpu")
BACKENDS = {
    op: ["reference"] + [b for b in ("cpu",) if hasattr(kernels._module(b), op) and not kernels._missing(b, op)]
    for op in kernels.OPS
}


def backends(op):
    return pytest.mark.parametrize("backend", BACKENDS[op])


def normal(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def tensor(array, dtype="float32", frozen=False):
    return paddle.to_tensor(np.asarray(array), dtype=dtype, stop_gradient=frozen)


def run(op, backend, arrays, upstream, **kwargs):
    """Output of kernels.<op> on float32 copies of `arrays`, and the gradients of sum(output * upstream)."""
    inputs = [tensor(a) for a in arrays]
    with kernels.use(f"{op}={backend}"):
        out = getattr(kernels, op)(*inputs, **kwargs)
    (out * tensor(upstream, frozen=True)).sum().backward()
    return out.numpy(), [i.grad.numpy() for i in inputs]


def close(found, expected, tolerance=1e-5, what=""):
    """Absolute, in units of the largest expected number (or 1)."""
    expected = np.asarray(expected)
    assert list(found.shape) == list(expected.shape), f"{what}: {found.shape} != {expected.shape}"
    error, scale = np.abs(found - expected).max() if expected.size else 0.0, max(1.0, np.abs(expected).max()) if expected.size else 1.0
    assert error < tolerance * scale, f"{what}: error {error:.2e} with values up to {scale:.2e}"


def numeric_gradient(function, array, upstream, epsilon=1e-6):
    """Central differences of sum(function(array) * upstream), one element after another."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(*array.shape):
        plus, minus = array.copy(), array.copy()
        plus[index] += epsilon
        minus[index] -= epsilon
        gradient[index] = ((function(plus) - function(minus)) * upstream).sum() / (2 * epsilon)
    return gradient


# ================================================================================================= configure


def test_configure_chooses_and_gives_reasons(monkeypatch):
    where = "cpu"
    monkeypatch.setattr(paddle, "set_device", lambda device: None)
    monkeypatch.setattr(paddle, "get_device", lambda: where)
    with kernels.use("auto"):
        table = kernels.configure("cpu", "auto")
        assert set(table) == set(kernels.OPS)
        assert table["adamw"] == ("cpu", "device is cpu")
        assert table["attention"] == (("reference", cpu.missing("attention")) if cpu.missing("attention") else ("cpu", "device is cpu"))
        table = kernels.configure("cpu", "reference")
        assert {backend for backend, _ in table.values()} == {"reference"}
        table = kernels.configure("cpu", "reference, adamw=cpu")
        assert table["adamw"] == ("cpu", "asked for") and table["rms_norm"][0] == "reference"
        table = kernels.configure("cpu", "rms_norm=reference")
        assert table["rms_norm"] == ("reference", "asked for") and table["adamw"][0] == "cpu"
        assert "rms_norm reference" in kernels.describe() and "adamw cpu" in kernels.describe()
        where = "npu:0"  # a device without a file of its own
        assert {backend for backend, _ in kernels.configure("npu:0", "auto").values()} == {"reference"}
        if cpu.missing("attention"):
            return
        monkeypatch.delattr(cpu, "sample")
        table = kernels.configure("npu:0", "cpu")
        assert table["adamw"] == ("cpu", "asked for") and "does not have it" in table["sample"][1]
        with pytest.raises(UserError, match="kernels/cpu.py has no sample"):
            kernels.configure("npu:0", "sample=cpu")


@pytest.mark.parametrize("choice, named", [
    ("fpga", "fpga"), ("rms_norm=fpga", "fpga"), ("softmax=cpu", "softmax"), ("../model", "../model"), ("=cpu", "op"),
])  # fmt: skip
def test_configure_refuses_what_is_not_there(choice, named):
    before = kernels.describe()
    with pytest.raises(UserError, match=named):
        kernels.configure("cpu", choice)
    assert kernels.describe() == before, "a refused choice changes nothing"


@pytest.mark.parametrize("device", ["fpga:0", "gpu:99", "npu"])
def test_configure_refuses_a_device_that_is_not_there(device):
    before, where = kernels.describe(), paddle.get_device()
    with pytest.raises(UserError, match=device):
        kernels.configure(device)
    assert kernels.describe() == before and paddle.get_device() == where


def test_use_restores_the_choice():
    before = kernels.describe()
    with pytest.raises(ZeroDivisionError), kernels.use("reference"):
        assert kernels.describe().count("reference") >= len(kernels.OPS)
        raise ZeroDivisionError
    assert kernels.describe() == before


# ============================================================================================ pointwise ops


@backends("rms_norm")
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 7), (1, 1, 1024), (3, 2, 1, 40)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm(backend, shape, scale):
    x, weight, upstream, eps = normal(shape) * scale, normal(shape[-1:], 1) + 1, normal(shape, 2), 1e-5
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    g = upstream * weight
    dx = r * (g - x * r**2 * (g * x).mean(-1, keepdims=True))
    dw = (upstream * x * r).reshape(-1, shape[-1]).sum(0)
    out, (found_dx, found_dw) = run("rms_norm", backend, (x, weight), upstream, epsilon=eps)
    close(out, x * r * weight, 3e-6)
    close(found_dx, dx, 3e-6)
    close(found_dw, dw)


@backends("rms_norm")
def test_rms_norm_with_a_frozen_weight(backend):
    x, weight = tensor(normal((4, 6))), tensor(normal((6,)), frozen=True)
    with kernels.use(f"rms_norm={backend}"):
        kernels.rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and weight.grad is None


@backends("rope")
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 8), (1, 7, 2, 6)])
def test_rope(backend, shape):
    B, T, _, Dh = shape
    x, upstream = normal(shape), normal(shape, 1)
    angle = np.random.default_rng(0).uniform(0, 60, (B, T, 1, Dh // 2))
    cos, sin = np.cos(angle), np.sin(angle)
    rotate = lambda a, s: np.concatenate([a[..., : Dh // 2] * cos - a[..., Dh // 2 :] * s, a[..., Dh // 2 :] * cos + a[..., : Dh // 2] * s], -1)  # noqa: E731
    tables = [tensor(np.concatenate([a, a], -1), frozen=True) for a in (cos, sin)]
    q = tensor(x)
    with kernels.use(f"rope={backend}"):
        out = kernels.rope(q, *tables)
    (out * tensor(upstream)).sum().backward()
    close(out.numpy(), rotate(x, sin), 3e-6)
    close(q.grad.numpy(), rotate(upstream, -sin), 3e-6)


@backends("swiglu")
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 7)])
def test_swiglu(backend, shape):
    gate, up, upstream = normal(shape) * 5, normal(shape, 1), normal(shape, 2)
    sigmoid = 1 / (1 + np.exp(-gate))
    out, (d_gate, d_up) = run("swiglu", backend, (gate, up), upstream)
    close(out, gate * sigmoid * up, 3e-6)
    close(d_up, upstream * gate * sigmoid, 3e-6)
    close(d_gate, upstream * up * sigmoid * (1 + gate * (1 - sigmoid)), 3e-6)


@backends("linear")
@pytest.mark.parametrize("shape, n_out", [((1, 1), 1), ((5, 123), 7), ((2, 3, 17), 123)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(backend, shape, n_out, bias):
    x, weight, upstream = normal(shape), normal((shape[-1], n_out), 1), normal((*shape[:-1], n_out), 2)
    arrays = (x, weight, normal((n_out,), 3)) if bias else (x, weight)
    out, found = run("linear", backend, arrays, upstream)
    close(out, x @ weight + (arrays[2] if bias else 0))
    flat, flat_up = x.reshape(-1, shape[-1]), upstream.reshape(-1, n_out)
    for gradient, expected in zip(found, (upstream @ weight.T, flat.T @ flat_up, flat_up.sum(0))):
        close(gradient, expected)


@backends("linear")
def test_linear_with_a_weight_stored_in_bfloat16(backend):
    x, weight = tensor(normal((3, 8))), tensor(normal((8, 5), 1)).astype("bfloat16")
    with kernels.use(f"linear={backend}"):
        out = kernels.linear(x, weight)
    assert out.dtype == paddle.float32
    close(out.numpy(), x.numpy() @ weight.astype("float32").numpy())


# ================================================================================================ attention


def visible(rows, causal, B, H, Tq, Tk):
    """(B, H, Tq, Tk) bool, from the words of kernels.attention's docstring, one entry after another."""
    seen = np.ones((B, H, Tq, Tk), bool)
    for b, h, i, j in np.ndindex(B, H, Tq, Tk):
        row = i + Tk - Tq
        if causal and j > row:
            seen[b, h, i, j] = False
        if rows is not None:
            r = rows[b, h * rows.shape[1] // H, j]
            if causal:
                hidden = row >= r[0] if len(r) == 1 else r[0] <= row < r[1]
            elif len(r) == 2:
                hidden = row >= r[0] or row < r[1]
            else:
                hidden = r[0] <= row < r[1] or r[2] <= row < r[3]
            seen[b, h, i, j] &= not hidden
    return seen


def naive_attention(q, k, v, upstream, seen, scale, slopes=None):
    """Output and gradients of q, k, v in float64, a whole (Tq, Tk) matrix a head."""
    B, Tq, H, Dh = q.shape
    Tk, group = k.shape[1], H // k.shape[2]
    out, d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h in np.ndindex(B, H):
        s = q[b, :, h] @ k[b, :, h // group].T * scale
        if slopes is not None:
            s = s - slopes[h] * (np.arange(Tq)[:, None] + Tk - Tq - np.arange(Tk))
        s = np.where(seen[b, h], s, -np.inf)
        top = s.max(-1, keepdims=True)
        e = np.exp(s - np.where(np.isfinite(top), top, 0))
        p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)  # rows that see nothing stay zero
        out[b, :, h] = p @ v[b, :, h // group]
        d_p = upstream[b, :, h] @ v[b, :, h // group].T
        d_s = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * scale
        d_q[b, :, h] = d_s @ k[b, :, h // group]
        d_k[b, :, h // group] += d_s.T @ q[b, :, h]
        d_v[b, :, h // group] += p.T @ upstream[b, :, h]
    return out, (d_q, d_k, d_v)


def check_attention(backend, B, Tq, Tk, H, K, Dh, rows=None, causal=True, scale=None, slopes=None, tolerance=5e-6):
    q, upstream = normal((B, Tq, H, Dh)), normal((B, Tq, H, Dh), 1)
    k, v = normal((B, Tk, K, Dh), 2), normal((B, Tk, K, Dh), 3)
    seen = visible(rows, causal, B, H, Tq, Tk)
    expected, gradients = naive_attention(q, k, v, upstream, seen, Dh**-0.5 if scale is None else scale, slopes)
    out, found = run(
        "attention", backend, (q, k, v), upstream, startend_row_indices=None if rows is None else paddle.to_tensor(rows.astype("int32")),
        causal=causal, scale=scale, alibi_slopes=None if slopes is None else tensor(slopes, frozen=True),
    )  # fmt: skip
    close(out, expected, tolerance, "out")
    for name, a, b in zip(("dq", "dk", "dv"), found, gradients):
        close(a, b, tolerance, name)
    blind = ~seen.any(-1)  # (B, H, Tq)
    assert (out.transpose(0, 2, 1, 3)[blind] == 0).all() and (found[0].transpose(0, 2, 1, 3)[blind] == 0).all()
    return seen


SHAPES = [  # B, Tq, Tk, H, K, Dh
    (1, 1, 1, 1, 1, 2), (2, 7, 7, 4, 2, 8), (1, 13, 13, 3, 3, 5), (1, 1, 9, 4, 1, 6), (2, 5, 12, 6, 2, 4), (1, 33, 33, 2, 1, 16),
]  # fmt: skip


def random_rows(n, heads, B, Tk, causal, seed=0):
    """(B, heads, Tk, n) int32, some of which hide nothing and some everything that they can."""
    generator = np.random.default_rng([seed, n, heads, Tk])
    pick = lambda: generator.integers(0, Tk + 2, (B, heads, Tk))  # noqa: E731
    if n == 1:
        return pick()[..., None]
    if n == 2 and not causal:  # rows >= a or rows < b
        a, b = pick(), pick()
        return np.stack([np.maximum(a, b), np.minimum(a, b)], -1)
    pairs = [np.sort(np.stack([pick(), pick()], -1), -1) for _ in range(n // 2)]
    return np.concatenate(pairs, -1)


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """Small blocks, so that every sum over blocks is exercised: 64 query rows is the least that the reference takes."""
    if request.param == "blocks":
        monkeypatch.setattr(kernels.reference, "BLOCK_ELEMENTS", 8)
        monkeypatch.setattr(kernels.reference, "LOGITS", 8)


@backends("attention")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_without_rows(backend, shape, causal):
    check_attention(backend, *shape, causal=causal)
    check_attention(backend, *shape, causal=causal, scale=0.7)


@backends("attention")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n, causal", [(1, True), (2, True), (2, False), (4, False)])
@pytest.mark.parametrize("heads", ["one", "K", "H"])
def test_attention_rows(backend, shape, n, causal, heads):
    B, _, Tk, H, K, _ = shape
    check_attention(backend, *shape, rows=random_rows(n, {"one": 1, "K": K, "H": H}[heads], B, Tk, causal), causal=causal)


@backends("attention")
def test_attention_rows_that_hide_everything(backend):
    rows = np.zeros((2, 1, 9, 1), int)
    assert not check_attention(backend, 2, 9, 9, 2, 2, 4, rows=rows).any()
    rows[1] = 9  # the first sample blind, the second not
    seen = check_attention(backend, 2, 9, 9, 2, 2, 4, rows=rows)
    assert not seen[0].any() and seen[1].any()


@backends("attention")
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_alibi(backend, rows, causal):
    slopes = 0.5 ** np.arange(1, 5)
    rows = random_rows(1 if causal else 2, 1, 2, 11, causal) if rows else None
    check_attention(backend, 2, 8, 11, 4, 2, 6, rows=rows, causal=causal, slopes=slopes)


@backends("attention")
@pytest.mark.parametrize("T, Tk", [(200, 200), (130, 157)])
@pytest.mark.parametrize("kind", ["none", "packed", "random", "alibi", "full", "four"])
def test_attention_in_blocks(backend, T, Tk, kind, monkeypatch):
    """Several blocks of 64 queries; packed rows let a block skip the keys that no query of it sees."""
    monkeypatch.setattr(kernels.reference, "LOGITS", 8)
    ends = np.repeat([70, 71, 128, 150, Tk], np.diff([0, 70, 71, 128, 150, Tk]))
    rows = {"packed": np.stack([ends, np.full(Tk, Tk)])[:, None, :, None], "random": random_rows(1, 2, 2, Tk, True), "four": random_rows(4, 1, 2, Tk, False)}.get(kind)
    slopes = 0.5 ** np.arange(1, 5) if kind == "alibi" else None
    check_attention(backend, 2, T, Tk, 4, 2, 4, rows=rows, causal=kind not in ("full", "four"), slopes=slopes)


@backends("attention")
def test_attention_with_large_scores(backend):
    """Softmax must not overflow: scores of some hundreds."""
    check_attention(backend, 1, 9, 9, 2, 1, 4, scale=100.0, tolerance=1e-4)


@backends("attention")
def test_attention_gradients_against_differences(backend):
    """The oracle above is our own formula: here numbers alone."""
    q, k, v, upstream = (normal((1, 4, 2, 3), s) for s in range(4))
    k, v = k[:, :, :1], v[:, :, :1]
    rows = np.array([3, 4, 4, 4]).reshape(1, 1, 4, 1)
    seen = visible(rows, True, 1, 2, 4, 4)
    arrays = [q, k, v]
    _, found = run("attention", backend, arrays, upstream, startend_row_indices=paddle.to_tensor(rows.astype("int32")))
    for i in range(3):
        function = lambda a, i=i: naive_attention(*arrays[:i], a, *arrays[i + 1 :], upstream, seen, 3**-0.5)[0]  # noqa: E731
        close(found[i], numeric_gradient(function, arrays[i], upstream), 2e-6)


def test_attention_test_can_fail():
    with pytest.raises(AssertionError, match="error"):
        with kernels.use("reference"):
            rows = random_rows(1, 1, 2, 7, True)
            original = kernels.reference._Mask
            try:
                kernels.reference._Mask = lambda rows, *rest: original(None if rows is None else rows + 1, *rest)
                check_attention("reference", 2, 7, 7, 4, 2, 8, rows=rows)
            finally:
                kernels.reference._Mask = original


@pytest.mark.parametrize("queries, packed", [(32768, True), (2048, False), pytest.param(32768, False, marks=pytest.mark.slow)])
def test_attention_of_32768_tokens_stays_under_2_gb(queries, packed, run_python):
    """One head, forward and backward: the [T, T] scores alone would be 4.3 GB. 2,048 queries need as much at a time as all."""
    script = """
import json, sys, time
import numpy as np, paddle
import kernels
kernels.configure()
T, Tq, packed = 32768, int(sys.argv[1]), sys.argv[2] == "True"
q, k, v = (paddle.randn([1, n, 1, 64]) for n in (Tq, T, T))
q.stop_gradient = k.stop_gradient = v.stop_gradient = False
rows = paddle.to_tensor((np.arange(T) // 1024 * 1024 + 1024).astype("int32").reshape(1, 1, T, 1)) if packed else None
(paddle.matmul(q[0, :64, 0], k[0, :64, 0], transpose_y=True)).numpy()
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024  # of this program: exec resets it
before, start = peak(), time.time()
kernels.attention(q, k, v, rows).sum().backward()
assert np.isfinite(q.grad.numpy()).all() and np.abs(v.grad.numpy().sum() - Tq * 64) < 0.01 * Tq * 64
print(json.dumps({"peak": peak() - before, "seconds": time.time() - start}))
"""
    found = run_python(script, queries, packed)
    print(f"{found['peak'] / 1e6:.0f} MB above the start, {found['seconds']:.1f} s")
    assert found["peak"] < 2e9


# ===================================================================================== linear cross-entropy


def naive_cross_entropy(hidden, weight, labels, upstream):
    """losses and gradients in float64; weight (D, V)."""
    logits = hidden @ weight
    kept = labels != -100
    e = np.exp(logits - logits.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    onehot = np.eye(weight.shape[1])[np.where(kept, labels, 0)]
    losses = np.where(kept, -np.log((p * onehot).sum(-1)), 0.0)
    d_logits = (p - onehot) * (upstream * kept)[:, None]
    return losses, d_logits @ weight.T, hidden.T @ d_logits, np.where(kept, logits.argmax(-1), -1)


def lce(backend, hidden, weight, labels, upstream, frozen=False, **kwargs):
    h, w = tensor(hidden), tensor(weight, frozen=frozen)
    with kernels.use(f"linear_cross_entropy={backend}"):
        losses, predictions = kernels.linear_cross_entropy(h, w, paddle.to_tensor(labels), return_predictions=True, **kwargs)
        again = kernels.linear_cross_entropy(h, w, paddle.to_tensor(labels), **kwargs)
    assert np.array_equal(losses.numpy(), again.numpy()) and losses.dtype == paddle.float32
    (losses * tensor(upstream, frozen=True)).sum().backward()
    return losses.numpy(), predictions.numpy(), h.grad, w.grad


@backends("linear_cross_entropy")
@pytest.mark.parametrize("N, D, V", [(1, 1, 2), (5, 123, 17), (123, 5, 123), (70, 8, 3)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_linear_cross_entropy(backend, N, D, V, transpose, ignored, blocks):
    generator = np.random.default_rng(N)
    hidden, weight, upstream = normal((N, D)), normal((D, V), 1), normal((N,), 2)
    labels = np.where(generator.random(N) < ignored, -100, generator.integers(0, V, N))
    losses, d_hidden, d_weight, predictions = naive_cross_entropy(hidden, weight, labels, upstream)
    found = lce(backend, hidden, weight.T.copy() if transpose else weight, labels, upstream, transpose_weight=transpose)
    close(found[0], losses)
    assert np.array_equal(found[1], predictions)
    if (labels != -100).any():
        close(found[2].numpy(), d_hidden)
        close(found[3].numpy(), d_weight.T if transpose else d_weight)


@backends("linear_cross_entropy")
def test_linear_cross_entropy_with_every_label_ignored(backend):
    losses, predictions, d_hidden, d_weight = lce(backend, normal((6, 4)), normal((4, 9)), np.full(6, -100), np.ones(6))
    assert (losses == 0).all() and (predictions == -1).all() and (d_hidden.numpy() == 0).all()
    assert d_weight is None or (d_weight.numpy() == 0).all()


@backends("linear_cross_entropy")
@pytest.mark.parametrize("transpose", [False, True])
def test_linear_cross_entropy_with_a_frozen_weight(backend, transpose):
    hidden, weight, labels = normal((7, 4)), normal((4, 9), 1), np.arange(7)
    found = lce(backend, hidden, weight.T.copy() if transpose else weight, labels, np.ones(7), frozen=True, transpose_weight=transpose)
    close(found[2].numpy(), naive_cross_entropy(hidden, weight, labels, np.ones(7))[1])
    assert found[3] is None


@backends("linear_cross_entropy")
def test_linear_cross_entropy_with_a_weight_stored_in_bfloat16(backend):
    hidden, labels = normal((7, 4)), np.arange(7)
    stored = tensor(normal((4, 9), 1)).astype("bfloat16")
    h = tensor(hidden)
    with kernels.use(f"linear_cross_entropy={backend}"):
        losses = kernels.linear_cross_entropy(h, stored, paddle.to_tensor(labels))
    close(losses.numpy(), naive_cross_entropy(hidden, stored.astype("float32").numpy(), labels, np.ones(7))[0])


@backends("linear_cross_entropy")
def test_linear_cross_entropy_gradients_against_differences(backend):
    hidden, weight, labels, upstream = normal((3, 2)), normal((2, 5), 1), np.array([1, -100, 4]), normal((3,), 2)
    found = lce(backend, hidden, weight, labels, upstream)
    close(found[2].numpy(), numeric_gradient(lambda h: naive_cross_entropy(h, weight, labels, upstream)[0], hidden, upstream), 2e-6)
    close(found[3].numpy(), numeric_gradient(lambda w: naive_cross_entropy(hidden, w, labels, upstream)[0], weight, upstream), 2e-6)


def test_linear_cross_entropy_never_holds_all_logits(run_python):
    """4,096 tokens over 50,000 words: the logits would be 819 MB, and as much again for their gradient."""
    script = """
import json
import paddle, kernels
kernels.configure()
h, w = paddle.randn([4096, 32]), paddle.randn([32, 50000])
h.stop_gradient = w.stop_gradient = False
labels = paddle.randint(0, 50000, [4096])
paddle.matmul(h[:8], w).numpy()
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024  # of this program: exec resets it
before = peak()
kernels.linear_cross_entropy(h, w, labels).mean().backward()
print(json.dumps(peak() - before))
"""
    assert run_python(script) < 500e6


# ==================================================================================================== adamw


@backends("adamw")
@pytest.mark.parametrize("shape", [(1,), (5, 123), (3, 2, 7)])
@pytest.mark.parametrize("decay, grad_scale", [(0.0, 1.0), (0.1, 1.0), (0.1, 0.3)])
def test_adamw_over_several_steps(backend, shape, decay, grad_scale):
    lr, beta1, beta2, epsilon = 0.01, 0.9, 0.95, 1e-6
    value, m1, m2 = normal(shape), np.zeros(shape), np.zeros(shape)
    parameter, moment1, moment2 = tensor(value), tensor(m1), tensor(m2)
    where = parameter.data_ptr()
    with kernels.use(f"adamw={backend}"):
        for step in range(1, 7):
            gradient = normal(shape, step) * 10.0 ** (step - 3)
            kernels.adamw(parameter, tensor(gradient), moment1, moment2, step, lr * step, beta1, beta2, epsilon, decay, grad_scale)
            g = gradient * grad_scale
            m1, m2 = beta1 * m1 + (1 - beta1) * g, beta2 * m2 + (1 - beta2) * g * g
            value = value * (1 - lr * step * decay)
            value = value - lr * step * (m1 / (1 - beta1**step)) / (np.sqrt(m2 / (1 - beta2**step)) + epsilon)
            close(parameter.numpy(), value, 2e-6, f"step {step}")
            close(moment1.numpy(), m1, 2e-6)
            close(moment2.numpy(), m2, 2e-6)
    assert parameter.data_ptr() == where, "in place"


@backends("adamw")
def test_adamw_leaves_the_gradient_alone(backend):
    parameter, gradient = tensor(normal((4,))), tensor(normal((4,), 1))
    with kernels.use(f"adamw={backend}"):
        kernels.adamw(parameter, gradient, tensor(np.zeros(4)), tensor(np.zeros(4)), 1, 0.1, 0.9, 0.999, 1e-8, 0.0, 0.5)
    assert np.array_equal(gradient.numpy(), normal((4,), 1).astype(np.float32))


@backends("adamw")
def test_adamw_far_into_a_run(backend):
    """Step 100,000, where the bias corrections are 1 to float32."""
    value, m1, m2, g = normal((9,)), normal((9,), 1), normal((9,), 2) ** 2, normal((9,), 3)
    parameter, moment1, moment2 = tensor(value), tensor(m1), tensor(m2)
    with kernels.use(f"adamw={backend}"):
        kernels.adamw(parameter, tensor(g), moment1, moment2, 100_000, 0.01, 0.9, 0.999, 1e-8, 0.1)
    m1, m2 = 0.9 * m1 + 0.1 * g, 0.999 * m2 + 0.001 * g * g
    close(parameter.numpy(), value * (1 - 0.001) - 0.01 * m1 / (np.sqrt(m2 / (1 - 0.999**100_000)) + 1e-8), 2e-6)


# ====================================================================================== our own C++ on the CPU

built = pytest.mark.skipif(cpu.missing("attention") is not None, reason=f"no C++ ops: {cpu.missing('attention')}")
with_bf16 = pytest.mark.skipif(cpu.missing("bf16") is not None, reason=f"no bfloat16: {cpu.missing('bf16')}")


def rounded(array):
    """To bfloat16 and back."""
    return tensor(array).astype("bfloat16").astype("float32").numpy().astype(np.float64)


@with_bf16
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (5, 123, 7), (7, 64, 33), (97, 65, 1030), (100, 200, 600), (33, 2100, 40)])
@pytest.mark.parametrize("turned", list(itertools.product([False, True], repeat=2)))
def test_bf16_products_are_exact_but_for_the_operands(M, N, K, turned):
    a, b = normal((K, M) if turned[0] else (M, K)), normal((N, K) if turned[1] else (K, N), 1)
    found = cpu.bf16_matmul(tensor(a), tensor(b), *turned).numpy()
    left, right = (rounded(x).T if t else rounded(x) for x, t in zip((a, b), turned))
    assert np.abs(found - left @ right).max() < 2e-6 * np.sqrt(K) * 3


@pytest.fixture
def in_bf16():
    kernels.configure("cpu", use_bf16=True)
    yield
    kernels.configure("cpu")


@with_bf16
@pytest.mark.parametrize("shape, n_out", [((40, 64), 32), ((3, 33, 130), 70)])
def test_linear_in_bf16(in_bf16, shape, n_out):
    x, weight, upstream = normal(shape), normal((shape[-1], n_out), 1), normal((*shape[:-1], n_out), 2)
    out, (d_x, d_weight) = run("linear", "cpu", (x, weight), upstream)
    flat, flat_up = rounded(x).reshape(-1, shape[-1]), rounded(upstream).reshape(-1, n_out)
    close(out, rounded(x) @ rounded(weight))
    close(d_x, rounded(upstream) @ rounded(weight).T)
    close(d_weight, flat.T @ flat_up)
    assert np.abs(out - x @ weight).max() > 1e-3, "this would be float32"
    small, _ = run("linear", "cpu", (x.reshape(-1, shape[-1])[:5], weight), upstream.reshape(-1, n_out)[:5])
    close(small, x.reshape(-1, shape[-1])[:5] @ weight)  # a few rows stay float32


@with_bf16
@pytest.mark.parametrize("transpose", [False, True])
def test_linear_cross_entropy_in_bf16(in_bf16, transpose):
    hidden, weight, upstream = normal((70, 48)), normal((48, 90), 1) * 0.3, normal((70,), 2)
    labels = np.random.default_rng(0).integers(0, 90, 70)
    losses, d_hidden, d_weight, _ = naive_cross_entropy(rounded(hidden), rounded(weight), labels, upstream)
    found = lce("cpu", hidden, weight.T.copy() if transpose else weight, labels, upstream, transpose_weight=transpose)
    close(found[0], losses)
    close(found[2].numpy(), d_hidden, 1e-2)  # the softmax is rounded as well
    close(found[3].numpy(), d_weight.T if transpose else d_weight, 1e-2)


@built
@pytest.mark.parametrize("instructions", [0, 1, 2])
def test_attention_with_every_instruction_set(instructions):
    q, k, v, d_out = (tensor(normal((2, 90, heads, 20), i)) for i, heads in enumerate((4, 2, 2, 4)))
    rows = tensor(np.random.default_rng(0).integers(1, 90, (2, 1, 90, 1)), "int32")
    out, lse = cpu._C_ops._run_custom_op("cpu_attention", q, k, v, rows, None, True, 0.2, instructions)
    grads = cpu._C_ops._run_custom_op("cpu_attention_backward", q, k, v, rows, None, out, lse, d_out, True, 0.2, instructions)
    inputs = [tensor(t.numpy()) for t in (q, k, v)]
    expected = kernels.reference.attention(*inputs, rows, True, 0.2)
    expected.backward(d_out)
    close(out.numpy(), expected.numpy())
    for found, x in zip(grads, inputs):
        close(found.numpy(), x.grad.numpy())


BITS = """
import hashlib, json, os, sys
if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np, kernels, paddle
kernels.configure("cpu", use_bf16=True)
x = [paddle.to_tensor(np.random.default_rng(i).standard_normal(s).astype("float32"), stop_gradient=False)
     for i, s in enumerate([(1, 300, 2, 40), (1, 300, 1, 40), (1, 300, 1, 40), (300, 520), (520, 96)])]
y = kernels.attention(*x[:3])
z = kernels.linear(*x[3:])
(y.sum() + (z * z).sum()).backward()
print(json.dumps(hashlib.sha256(b"".join(t.numpy().tobytes() for t in [y, z] + [t.grad for t in x])).hexdigest()))
"""


@built
def test_the_same_bits_with_one_thread_and_with_all(run_python):
    assert run_python(BITS, "1") == run_python(BITS, "all")


def test_without_a_compiler_the_reference_runs_and_an_explicit_choice_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu, "_state", None)
    try:
        assert kernels.configure("cpu", use_bf16=True)["attention"] == ("reference", "no C++ compiler: there is no no-such-compiler")
        assert not kernels.bf16 and "no-such-compiler" in kernels.bf16_missing()
        with pytest.raises(UserError, match="no-such-compiler.*attention=reference"):
            kernels.configure("cpu", "attention=cpu")
    finally:
        monkeypatch.undo()
        kernels.configure("cpu")


def test_every_op_is_tested_on_every_back_end():
    assert {(op, b) for op, found in BACKENDS.items() for b in found} >= set(itertools.product(kernels.OPS, ["reference"]))
