"""Products: linear with bias and residual, fused LoRA, and bfloat16, against float64 in numpy.

python -m pytest tests/kernels/test_bf16.py          # CPU; bfloat16 if the processor has it
"""

import kernels

import numpy as np
import paddle
import pytest
from test_ops import (
    backends,
    close,
    cpu,
    in_bf16,
    lce,
    naive_cross_entropy,
    normal,
    random_rows,
    rounded,
    run,
    tensor,
    with_bf16,
)

from adapters import LoRALinear, cast_frozen_to_bf16
from model import Linear

pytestmark = pytest.mark.sweep(keep=12)

assert in_bf16  # a fixture


@backends("linear")
@pytest.mark.parametrize("shape, n_out", [((1, 1), 1), ((2, 3, 17), 123)])
def test_linear_with_bias_and_residual(backend, shape, n_out):
    arrays = normal(shape), normal((shape[-1], n_out), 1), normal((n_out,), 3), normal((*shape[:-1], n_out), 4)
    upstream = normal((*shape[:-1], n_out), 2)
    out, (d_x, d_weight, d_bias, d_residual) = run("linear", backend, arrays, upstream)
    flat, flat_up = arrays[0].reshape(-1, shape[-1]), upstream.reshape(-1, n_out)
    close(out, arrays[0] @ arrays[1] + arrays[2] + arrays[3])
    close(d_x, upstream @ arrays[1].T)
    close(d_weight, flat.T @ flat_up)
    close(d_bias, flat_up.sum(0))
    close(d_residual, upstream)


@with_bf16
def test_linear_in_bf16_with_bias_and_residual(in_bf16):
    arrays = normal((3, 33, 130)), normal((130, 70), 1), normal((70,), 3), normal((3, 33, 70), 4)
    upstream = normal((3, 33, 70), 2)
    out, (d_x, d_weight, d_bias, d_residual) = run("linear", "cpu", arrays, upstream)
    flat, flat_up = rounded(arrays[0]).reshape(-1, 130), rounded(upstream).reshape(-1, 70)
    close(out, rounded(arrays[0]) @ rounded(arrays[1]) + arrays[2] + arrays[3])
    close(d_x, rounded(upstream) @ rounded(arrays[1]).T)
    close(d_weight, flat.T @ flat_up)
    close(d_bias, upstream.reshape(-1, 70).sum(0))
    close(d_residual, upstream)


@with_bf16
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (5, 123, 7), (97, 65, 1030), (33, 1100, 40)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_operands_stored_in_bf16_give_the_same_bits(M, N, K, transposed):
    a, b = tensor(normal((K, M) if transposed[0] else (M, K))), tensor(normal((N, K) if transposed[1] else (K, N), 1))
    expected = cpu.bf16_matmul(a, b, *transposed).numpy()
    for left, right in (
        (a, b.astype("bfloat16")),
        (a.astype("bfloat16"), b),
        (a.astype("bfloat16"), b.astype("bfloat16")),
    ):
        assert np.array_equal(cpu.bf16_matmul(left, right, *transposed).numpy(), expected)


# ==================================================================================================== LoRA


def naive_lora(x, weight, a, b, scaling, bias, dropped, upstream):
    """y and the gradients of x, A, B (and of dropped, whose part is then not in that of x)."""
    flat = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
    up = upstream.reshape(-1, b.shape[1])
    y = x @ weight + (0 if bias is None else bias) + scaling * (flat @ a @ b).reshape(upstream.shape)
    dt = scaling * up @ b.T
    dx, d_dropped = upstream @ weight.T, (dt @ a.T).reshape(x.shape)
    d_a, d_b = flat.T @ dt, scaling * (flat @ a).T @ up
    return y, [dx + d_dropped, d_a, d_b] if dropped is None else [dx, d_a, d_b, d_dropped]


def run_lora(backend, x, weight, a, b, scaling, bias, dropped, upstream, stored="float32"):
    inputs = [tensor(t) for t in (x, a, b) + (() if dropped is None else (dropped,))]
    frozen = tensor(weight, frozen=True).astype(stored)
    with kernels.use(f"lora_linear={backend}"):
        y = kernels.lora_linear(
            inputs[0],
            frozen,
            *inputs[1:3],
            scaling,
            None if bias is None else tensor(bias, frozen=True),
            None if dropped is None else inputs[3],
        )
    (y * tensor(upstream, frozen=True)).sum().backward()
    return y.numpy(), [t.grad.numpy() for t in inputs]


LORA = [((1, 1), 1, 1), ((5, 123), 7, 3), ((2, 33, 40), 96, 8), ((3, 50, 129), 65, 64), ((70, 64), 200, 100)]


@backends("lora_linear")
@pytest.mark.parametrize("shape, n_out, rank", LORA)
@pytest.mark.parametrize("bias, dropped", [(False, False), (True, True)])
def test_lora_linear(backend, shape, n_out, rank, bias, dropped):
    x, weight, a, b = (
        normal(shape),
        normal((shape[-1], n_out), 1),
        normal((shape[-1], rank), 2),
        normal((rank, n_out), 3),
    )
    x2 = normal(shape, 5) if dropped else None
    args = x, weight, a, b, 0.5, normal((n_out,), 4) if bias else None, x2, normal((*shape[:-1], n_out), 6)
    y, expected = naive_lora(*args)
    actual, gradients = run_lora(backend, *args)
    close(actual, y)
    for gradient, right in zip(gradients, expected):
        close(gradient, right)


@with_bf16
@pytest.mark.parametrize("shape, n_out, rank", LORA[2:])
@pytest.mark.parametrize("bias, dropped", [(False, False), (True, True)])
def test_lora_linear_in_bf16(in_bf16, shape, n_out, rank, bias, dropped):
    """Rounding of x, W, A, B, of t = s x A and of the gradients: each product within 2^-8 of a typical sum's size."""
    x, weight, a, b = (
        normal(shape),
        normal((shape[-1], n_out), 1),
        normal((shape[-1], rank), 2),
        normal((rank, n_out), 3),
    )
    x2 = normal(shape, 5) if dropped else None
    args = x, weight, a, b, 0.5, normal((n_out,), 4) if bias else None, x2, normal((*shape[:-1], n_out), 6)
    y, expected = naive_lora(*args)
    actual, gradients = run_lora("cpu", *args)
    for ours, right in zip([actual, *gradients], [y, *expected]):
        assert np.sqrt(np.mean((ours - right) ** 2)) < 2**-8 * np.sqrt(np.mean(right**2))
    assert np.abs(actual - y).max() > 1e-4 * np.abs(y).max(), "this would be float32"
    again, others = run_lora("cpu", *args, stored="bfloat16")  # what is stored rounded is rounded once, not twice
    assert all(np.array_equal(p, q) for p, q in zip([actual, *gradients], [again, *others]))


@with_bf16
def test_a_zero_adapter_does_not_change_a_bit(in_bf16):
    """With B = 0, as at the first step: DPO's policy must equal its reference."""
    base = Linear(96, 80, bias=False)
    x = tensor(normal((50, 96)))
    plain = base(x).numpy()
    assert np.array_equal(LoRALinear(base, rank=8, alpha=16)(x).numpy(), plain)


@with_bf16
def test_cast_frozen_to_bf16_keeps_bits_and_trained_weights(in_bf16):
    net = paddle.nn.Sequential(Linear(64, 96, bias=True), LoRALinear(Linear(96, 40, bias=False), rank=4, alpha=8))
    x = tensor(normal((50, 64)))
    before = net(x).numpy()
    cast_frozen_to_bf16(net)
    assert net[1].base.weight.dtype == paddle.bfloat16 and net[1].base.weight.stop_gradient
    assert net[0].weight.dtype == net[1].lora_A.dtype == paddle.float32 and not net[0].weight.stop_gradient
    assert np.array_equal(net(x).numpy(), before)


# =========================================================================================== cross-entropy


@with_bf16
@pytest.mark.parametrize("N, D, V", [(1, 1, 2), (5, 123, 17), (123, 40, 1030), (200, 64, 2100)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("frozen, stored", [(False, "float32"), (True, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_cross_entropy_in_bf16(in_bf16, N, D, V, transpose, frozen, stored, softcap):
    generator = np.random.default_rng(N)
    hidden, weight, upstream = normal((N, D)), normal((D, V), 1) * 0.3, normal((N,), 2)
    labels = np.where(generator.random(N) < 0.3, -100, generator.integers(0, V, N)) if N > 1 else np.array([V - 1])
    expected = naive_cross_entropy(rounded(hidden), rounded(weight), labels, upstream, softcap)
    array = np.ascontiguousarray(weight.T) if transpose else weight
    h, w = tensor(hidden), tensor(array, frozen=frozen)
    w = w.astype("bfloat16") if stored == "bfloat16" else w
    args = h, w, paddle.to_tensor(labels), transpose
    losses, predictions = kernels.linear_cross_entropy(*args, return_predictions=True, softcap=softcap)
    close(losses.numpy(), expected[0], 1e-5)
    if softcap is None:  # what a cap makes equal in float32 it need not in float64
        assert np.array_equal(predictions.numpy(), expected[3])
    with paddle.no_grad():
        assert np.array_equal(kernels.linear_cross_entropy(*args, softcap=softcap).numpy(), losses.numpy())
    (losses * tensor(upstream, frozen=True)).sum().backward()
    close(h.grad.numpy(), expected[1], 5e-3)  # the softmax is rounded as well
    if frozen:
        assert w.grad is None
    else:
        close(w.grad.numpy(), expected[2].T if transpose else expected[2], 5e-3)


@with_bf16
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_gradient_in_bf16_of_a_token_that_is_almost_certain(in_bf16, frozen, softcap):
    """softmax - onehot is 1e-4, far below the rounding of either in bfloat16."""
    hidden, labels = np.full((3, 64), 0.25), np.array([5, 5, 5])
    weight = normal((64, 40)) * 0.05
    weight[:, 5] += 0.8
    expected = naive_cross_entropy(rounded(hidden), rounded(weight), labels, np.ones(3), softcap)[1]
    _, _, d_hidden, _ = lce("cpu", hidden, weight, labels, np.ones(3), frozen=frozen, softcap=softcap)
    assert np.abs(expected).max() < 1e-3
    assert np.abs(d_hidden.numpy() - expected).max() < 1e-2 * np.abs(expected).max()


# =============================================================================================== attention


def attend(bf16, arrays, upstream, **kwargs):
    """Output and the gradients of q, k and v."""
    kernels.configure("cpu", use_bf16=bf16)
    inputs = [tensor(a) for a in arrays]
    out = kernels.attention(*inputs, **kwargs)
    out.backward(tensor(upstream))
    return [out.numpy(), *(t.grad.numpy() for t in inputs)]


@with_bf16
@pytest.mark.parametrize(
    "B, Tq, Tk, H, K, Dh",
    [
        (1, 1, 1, 1, 1, 1),
        (2, 5, 5, 2, 1, 12),
        (2, 7, 123, 4, 2, 40),
        (1, 130, 130, 4, 2, 64),
        (2, 200, 260, 4, 4, 80),
        (1, 97, 97, 2, 2, 96),
        (1, 300, 300, 6, 2, 128),
        (1, 100, 170, 2, 1, 256),
        (1, 70, 70, 3, 1, 8),
        (2, 99, 120, 5, 5, 24),
        (1, 70, 70, 7, 1, 112),
        (1, 65, 65, 2, 1, 120),
        (1, 130, 130, 3, 3, 192),
        (1, 70, 70, 2, 1, 576),
    ],
)
@pytest.mark.parametrize("mask", ["causal", "rows", "bidirectional", "alibi", "softcap", "prefix, alibi, softcap"])
def test_attention_in_bf16(in_bf16, B, Tq, Tk, H, K, Dh, mask):
    """Against float32 on the same rounded q, k, v and upstream: what is left is the rounding of softmax and of its
    gradient."""
    arrays = [rounded(normal(s, i)) for i, s in enumerate([(B, Tq, H, Dh), (B, Tk, K, Dh), (B, Tk, K, Dh)])]
    upstream = rounded(normal((B, Tq, H, Dh), 3))
    options = {"causal": mask != "bidirectional" and "prefix" not in mask}
    if mask == "rows" or "prefix" in mask:
        options["startend_row_indices"] = tensor(
            random_rows(1 if options["causal"] else 2, 1, B, Tk, options["causal"]), "int32"
        )
    if "alibi" in mask:
        options["alibi_slopes"] = tensor(2.0 ** -np.arange(1, H + 1), frozen=True)
    if "softcap" in mask:
        options["softcap"] = 1.5
    expected, actual = attend(False, arrays, upstream, **options), attend(True, arrays, upstream, **options)
    for ours, right in zip(actual, expected):
        error, size = np.sqrt(np.mean((ours - right) ** 2)), np.sqrt(np.mean(right**2))
        assert error < 2**-8 * max(size, 1e-2), f"{error:.2e} of {size:.2e}"
    if Tk > 1:
        assert np.abs(actual[0] - expected[0]).max() > 1e-5, "this would be float32"
    assert np.array_equal((actual[0] == 0).all(-1), (expected[0] == 0).all(-1)), "a query that sees no key gets zeros"
