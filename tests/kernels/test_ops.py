"""Every op of kernels/ on every back end that has it, forward and backward, against a naive float64 version in numpy.

    python -m pytest tests/kernels/test_ops.py                   # CPU, about 40 s, and 15 once to build the C++ ops
    python -m pytest tests/kernels/test_ops.py --hf-python PY    # also beside torch

Letters as in kernels/__init__.py. Tolerances are for float32: a relative 2e-6 per rounding, times the length of sums.
"""

import collections
import functools
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import kernels
import kernels.reference

import numpy as np
import ops as table
import paddle
import pytest
from conftest import ROOT

import model
from families import ModelConfig
from formats.files import UserError
from formats.weights import init_weights

pytestmark = pytest.mark.sweep(keep=12)

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


def run_all(op, backend, arrays, upstreams, residual=None, **kwargs):
    """As run, for one or several outputs; arrays may be None. Gradients of the arrays, then of the residual."""
    inputs = [a if a is None else tensor(a) for a in arrays]
    more = {} if residual is None else {"residual": tensor(residual)}
    with kernels.use(f"{op}={backend}"):
        outs = getattr(kernels, op)(*inputs, **kwargs, **more)
    outs = outs if isinstance(outs, tuple) else (outs,)
    paddle.autograd.backward(list(outs), [tensor(u, frozen=True) for u in upstreams])
    return [o.numpy() for o in outs], [i.grad.numpy() for i in [*inputs, *more.values()] if i is not None]


def close(actual, expected, tolerance=1e-5, what=""):
    """Maximum error, relative to the largest expected value (or 1)."""
    expected = np.asarray(expected)
    assert list(actual.shape) == list(expected.shape), f"{what}: {actual.shape} != {expected.shape}"
    error, scale = (
        np.abs(actual - expected).max() if expected.size else 0.0,
        max(1.0, np.abs(expected).max()) if expected.size else 1.0,
    )
    assert error < tolerance * scale, f"{what}: error {error:.2e} with values up to {scale:.2e}"


def numeric_gradient(function, array, upstream, epsilon=1e-6):
    """Central differences of sum(function(array) * upstream), element by element."""
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
    monkeypatch.setattr(kernels, "devices", lambda: ["cpu", "npu:0"])
    monkeypatch.setattr(paddle, "set_device", lambda device: None)
    monkeypatch.setattr(paddle, "get_device", lambda: where)
    with kernels.use("auto"):
        table = kernels.configure("cpu", "auto")
        assert set(table) == set(kernels.OPS)
        assert table["linear"] == ("cpu", "device is cpu")
        assert table["attention"] == (
            ("reference", cpu.missing("attention")) if cpu.missing("attention") else ("cpu", "device is cpu")
        )
        table = kernels.configure("cpu", "reference")
        assert {backend for backend, _ in table.values()} == {"reference"}
        table = kernels.configure("cpu", "reference, linear=cpu")
        assert table["linear"] == ("cpu", "asked for") and table["rms_norm"][0] == "reference"
        table = kernels.configure("cpu", "rms_norm=reference")
        assert table["rms_norm"] == ("reference", "asked for") and table["linear"][0] == "cpu"
        assert "rms_norm reference" in kernels.describe() and "linear cpu" in kernels.describe()
        where = "npu:0"  # a device without a file of its own
        assert {backend for backend, _ in kernels.configure("npu:0", "auto").values()} == {"reference"}
        if cpu.missing("attention"):
            return
        monkeypatch.delattr(cpu, "sample")
        table = kernels.configure("npu:0", "cpu")
        assert table["linear"] == ("cpu", "asked for") and "does not have it" in table["sample"][1]
        with pytest.raises(UserError, match="kernels/cpu.py has no sample"):
            kernels.configure("npu:0", "sample=cpu")


@pytest.mark.parametrize(
    "choice, named",
    [
        ("fpga", "fpga"),
        ("rms_norm=fpga", "fpga"),
        ("softmax=cpu", "softmax"),
        ("../model", "../model"),
        ("=cpu", "op"),
    ],
)
def test_configure_refuses_unknown_ops_and_back_ends(choice, named):
    before = kernels.describe()
    with pytest.raises(UserError, match=named):
        kernels.configure("cpu", choice)
    assert kernels.describe() == before, "a refused choice changes nothing"


@pytest.mark.parametrize(
    "device, needs",
    [
        ("fpga:0", "a plug-in"),
        ("gpu:99", "paddlepaddle-gpu"),
        ("dcu", "paddlepaddle-dcu.*ROCm"),
        ("xpu", "paddlepaddle-xpu"),
        ("npu", "paddle-custom-npu"),
        ("gcu:1", "paddle-custom-gcu"),
        ("cpu:0", "$"),
        ("", "a plug-in"),
    ],
)
def test_configure_refuses_a_missing_device(device, needs):
    before, where = kernels.describe(), paddle.get_device()
    with pytest.raises(
        UserError, match=f"device: '{device}' is not in this Paddle .*which has cpu.*{needs}"
    ) as refused:
        kernels.configure(device)
    assert "\n" not in str(refused.value)
    assert kernels.describe() == before and paddle.get_device() == where


def test_device_names(monkeypatch):
    """CUDA, ROCm (which Paddle calls gpu too), and plug-ins with one and with two devices."""
    monkeypatch.setattr(kernels, "devices", lambda: ["cpu", "gpu:0", "gpu:1", "one", "two:0", "two:1"])
    same = "cpu gpu gpu:0 gpu:1 one one:0 two two:1".split()
    assert [kernels.check_device(name) for name in same] == same
    for name in "gpu:2 gpu: gpu:x one:1 two:2 dcu".split():
        with pytest.raises(UserError, match=f"'{name}' is not in"):
            kernels.check_device(name)
    monkeypatch.setattr(kernels, "devices", lambda: ["cpu", "dcu:0", "dcu:1"])
    monkeypatch.setattr(paddle, "is_compiled_with_rocm", lambda: True)
    assert [kernels.check_device(name) for name in ("dcu", "dcu:1", "gpu:1")] == ["gpu", "gpu:1", "gpu:1"]
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:1")
    assert kernels._kind() == "dcu", "CUDA's kernels are not for it"


def test_devices_come_from_paddle(monkeypatch):
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle, "is_compiled_with_xpu", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(paddle.device.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(paddle.device, "get_available_custom_device", lambda: ["npu:0"])
    assert kernels.devices() == ["cpu", "gpu:0", "gpu:1", "xpu:0", "npu:0"]
    monkeypatch.setattr(paddle, "is_compiled_with_rocm", lambda: True)
    assert kernels.devices()[1:3] == ["dcu:0", "dcu:1"]


def test_a_new_chip_is_one_file_as_in_the_docs(monkeypatch, tmp_path):
    """Its op runs once per block in a model's forward; all other ops are the reference's."""
    text = (ROOT / "docs" / "kernels.md").read_text().split("```python\n# kernels/npu.py", 1)[1].split("```", 1)[0]
    (tmp_path / "pretend_chip.py").write_text("#" + text)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    monkeypatch.setattr(kernels, "devices", lambda: ["cpu", "pretend_chip:0", "pretend_chip:1"])
    monkeypatch.setattr(paddle, "set_device", lambda device: None)
    monkeypatch.setattr(paddle, "get_device", lambda: "pretend_chip:1")
    ids = np.arange(12).reshape(2, 6)
    tiny = model.build(
        ModelConfig.from_dict(
            dict(
                model_type="llama",
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=24,
                vocab_size=32,
            )
        )
    )
    init_weights(tiny, seed=0)
    calls = collections.Counter()

    def counted(module, op):
        function = getattr(module, op)

        def run(*args, **kwargs):
            calls[module.__name__, op] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, op, run)

    try:
        with kernels.use("reference"):
            expected = tiny(tensor(ids, "int64")).numpy()
        chip = kernels._module("pretend_chip")
        for module, op in [
            (chip, "swiglu"),
            (kernels.reference, "swiglu"),
            (kernels.reference, "rms_norm"),
            (kernels.reference, "attention"),
        ]:
            counted(module, op)
        table = kernels.configure("pretend_chip:1")
        assert table.pop("swiglu") == ("pretend_chip", "device is pretend_chip")
        assert set(table.values()) == {("reference", "no faster one for pretend_chip")}
        assert not kernels.bf16 and kernels.bf16_missing() == "the linear of pretend_chip cannot do it yet"
        close(tiny(tensor(ids, "int64")).numpy(), expected)
        assert calls == {
            ("kernels.pretend_chip", "swiglu"): 3,
            ("kernels.reference", "rms_norm"): 7,
            ("kernels.reference", "attention"): 3,
        }
        monkeypatch.setattr(chip, "missing", lambda op: "its driver is too old")
        assert kernels.configure("pretend_chip:1")["swiglu"] == ("reference", "its driver is too old")
        with pytest.raises(
            UserError,
            match="swiglu of kernels/pretend_chip.py cannot run here: its driver is too old; ask for swiglu=reference",
        ):
            kernels.configure("pretend_chip:1", "swiglu=pretend_chip")
    finally:
        monkeypatch.undo()
        sys.modules.pop("kernels.pretend_chip", None)
        kernels.configure("cpu")


# ====================================================================================== python tests/bench/ops.py


def test_every_op_has_a_case_in_the_benchmark():
    """A new op needs an entry in CASES of tests/bench/ops.py."""
    assert set(kernels.OPS) - set(table.CASES) == set()
    assert all(callable(getattr(kernels, op)) for op in kernels.OPS)


SMALL = {
    "rows": 3, "D": 8, "T": 6, "heads": 2, "H": 2, "Dh": 4, "F": 8, "M": 40, "K": 32, "N": 33, "n_in": 64, "n_out": 32,
        "group": 32, "tokens": 8, "V": 16,
    "size": 9, "sequences": 2, "context": 8, "block": 4,
}  # fmt: skip


@pytest.mark.parametrize("op", kernels.OPS)
def test_every_case_of_an_op_runs_and_counts_its_work(op):
    kernels.configure("cpu")
    makers = [table.CASES[op], *(functools.partial(make, kind="bfloat16") for make in table.IN_BFLOAT16.get(op, ()))]
    for make in makers:
        shape = {name: SMALL[name] for name in inspect.signature(make).parameters if name in SMALL}
        if op == "paged_attention":
            shape |= {"H": 4, "K": 2}
        cases = list(make(**shape))
        assert cases and all(case.work > 0 and case.kind in ("memory", "float32", "bfloat16", "int8") for case in cases)
        for case in cases:
            case.run()
    assert not kernels.bf16, "a row in bfloat16 leaves no trace"


BITS_OF_CASES = """
import functools, hashlib, inspect, json, os, sys
if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.path.insert(0, "tests/bench")
import ops as table
import numpy as np, paddle, kernels
backends, sizes, digests = kernels.configure("cpu", use_bf16=True), json.loads(sys.argv[2]), {}
with_bf16 = table.IN_BFLOAT16 if kernels.bf16 else {}
for op in (op for op in kernels.OPS if backends[op][0] == "cpu"):
    makers = [table.CASES[op], *(functools.partial(make, kind="bfloat16") for make in with_bf16.get(op, ()))]
    for make in makers + [functools.partial(table.attention, document=70)] * (op == "attention"):
        paddle.seed(0)
        names = [n for n in inspect.signature(make).parameters if n in sizes and (n, op) != ("K", "paged_attention")]
        for case in make(**{name: sizes[name] for name in names}):
            made = case.run()
            tensors = made if isinstance(made, (list, tuple)) else [made]
            digest = hashlib.sha256(b"".join(np.asarray(t).tobytes() for t in tensors)).hexdigest()
            digests[f"{op}, {case.kind}, {case.part}, {case.shape}"] = digest
print(json.dumps(digests))
"""
SIZES = {  # large enough that each has work for several threads, and no multiple of a tile
    "rows": 300, "D": 520, "T": 300, "heads": 3, "Dh": 40, "F": 700, "M": 300, "K": 520, "N": 200, "n_in": 256,
        "n_out": 512, "group": 32, "tokens": 320, "V": 1000,
    "size": 300_001, "sequences": 3, "context": 80,
}  # fmt: skip


@pytest.mark.sweep(keep=0)
def test_every_kernel_gives_the_same_bits_with_one_thread_and_with_all(run_python):
    """Forward and backward of each op that runs in the CPU back end here, with the cases of the benchmark."""
    one, every = (run_python(BITS_OF_CASES, threads, json.dumps(SIZES)) for threads in ("1", "all"))
    assert {row.split(",")[0] for row in one} == {
        op for op, (backend, _) in kernels.configure("cpu").items() if backend == "cpu"
    }
    assert [row for row in one if one[row] != every[row]] == []


def test_products_in_bfloat16_are_what_is_measured(monkeypatch):
    seen = []
    monkeypatch.setitem(
        kernels._table,
        "linear",
        (lambda x, weight, bias=None, residual=None: seen.append(kernels.bf16) or x @ weight, "spy", ""),
    )
    for kind in ("float32", "bfloat16"):
        for case in table.linear(40, 32, 33, kind):
            case.run()
    assert len(seen) == 6 and not any(seen[:3]) and all(seen[3:])


def test_attention_work_counts_visible_pairs():
    flops = {
        document: [case.work for case in table.attention(T=10, H=2, Dh=4, document=document)] for document in (None, 4)
    }
    assert flops[None] == [4.0 * 2 * 4 * 55, 10.0 * 2 * 4 * 55] and flops[4] == [4.0 * 2 * 4 * 23, 10.0 * 2 * 4 * 23]


@pytest.mark.skipif(cpu.missing("peak") is not None, reason="no C++ ops")
def test_peaks_are_above_what_a_product_reaches():
    """A loop that the compiler shortened would show ten times the possible rate."""
    most, _ = table.peaks(5)
    assert ("bfloat16" in most) == (cpu.missing("bf16") is None)
    a = tensor(normal((768, 768)))
    reached = 2 * 768**3 / min(table.turn(lambda: paddle.matmul(a, a)) for _ in range(5))
    assert 0.5 * reached < most["float32"] < 20 * reached, f"{most['float32']:.3g}, and a product has {reached:.3g}"
    assert 1e9 < most["memory"] < 2e12


def test_the_benchmark_prints_a_line_per_case(capsys, monkeypatch):
    monkeypatch.setattr(
        table,
        "CASES",
        {op: lambda: iter([table.Case("3 x 4", "forward", "memory", 1e9, lambda: None)]) for op in kernels.OPS},
    )
    monkeypatch.setattr(
        table, "IN_BFLOAT16", {"linear": [lambda kind: iter([table.Case("5 x 6", "forward", kind, 1e9, lambda: None)])]}
    )
    monkeypatch.setattr(table, "measure", lambda run: 0.01)
    monkeypatch.setattr(table, "peaks", lambda: ({"memory": 2e11, "bfloat16": 1e12}, "guessed"))
    try:
        table.main(["--kernels", "rms_norm=reference"])
        lines = capsys.readouterr().out.splitlines()
        assert (
            lines[0].startswith(f"Paddle {paddle.__version__} · cpu · ")
            and "2 threads" in lines[0]
            or len(os.sched_getaffinity(0)) != 2
        )
        assert lines[1] == "peak: memory 200 GB/s · bfloat16 1,000 GFLOP/s (guessed)"
        at = lines.index("rms_norm: reference (asked for)")
        assert lines[at + 1].split() == "forward 3 x 4 10.00 ms 100 GB/s 50% of memory".split()
        if cpu.missing("bf16") is None:
            assert (
                lines[lines.index("linear: cpu (device is cpu)") + 2].split()
                == "forward 5 x 6 10.00 ms 100 GFLOP/s 10% of bfloat16".split()
            )
        monkeypatch.setattr(kernels, "bf16_missing", lambda: "it has none")
        table.main([])
        assert capsys.readouterr().out.splitlines()[-1] == "no products in bfloat16: it has none"
    finally:
        kernels.configure("cpu")


def test_the_command_line_refuses_an_unknown_back_end_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "kernels", "--device", "npu"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.count("\n") == 1
        and "error: device: 'npu' is not in this Paddle" in done.stderr
    )


def test_use_restores_the_choice():
    before = kernels.describe()
    with pytest.raises(ZeroDivisionError), kernels.use("reference"):
        assert kernels.describe().count("reference") >= len(kernels.OPS)
        raise ZeroDivisionError
    assert kernels.describe() == before


# ============================================================================================ pointwise ops


@backends("rms_norm")
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 7), (1, 1, 1024), (3, 2, 1, 40), (130, 17)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm(backend, shape, scale):
    x, weight, upstream, eps = normal(shape) * scale, normal(shape[-1:], 1) + 1, normal(shape, 2), 1e-5
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    g = upstream * weight
    dx = r * (g - x * r**2 * (g * x).mean(-1, keepdims=True))
    dw = (upstream * x * r).reshape(-1, shape[-1]).sum(0)
    out, (actual_dx, actual_dw) = run("rms_norm", backend, (x, weight), upstream, epsilon=eps)
    close(out, x * r * weight, 3e-6)
    close(actual_dx, dx, 3e-6)
    close(actual_dw, dw)


@backends("rms_norm")
def test_rms_norm_with_a_frozen_weight(backend):
    x, weight = tensor(normal((4, 6))), tensor(normal((6,)), frozen=True)
    with kernels.use(f"rms_norm={backend}"):
        kernels.rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and weight.grad is None


@backends("rms_norm")
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (70, 3, 40)])
def test_rms_norm_with_a_residual(backend, shape):
    """y and h, and the gradients of both with respect to x and residual."""
    x, residual, weight, upstreams = (
        normal(shape),
        normal(shape, 1),
        normal(shape[-1:], 2),
        (normal(shape, 3), normal(shape, 4)),
    )
    outs, grads = run_all("rms_norm", backend, (x, weight), upstreams, epsilon=1e-5, residual=residual)
    h = x + residual
    r = 1 / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
    g = upstreams[0] * weight
    dh = r * (g - h * r**2 * (g * h).mean(-1, keepdims=True)) + upstreams[1]
    for actual, expected in zip(
        [*outs, *grads], [h * r * weight, h, dh, (upstreams[0] * h * r).reshape(-1, shape[-1]).sum(0), dh]
    ):
        close(actual, expected)


def naive_layer_norm(h, weight, bias, upstream, epsilon=1e-5):
    """y and the gradients of h, weight and bias."""
    r = 1 / np.sqrt(h.var(-1, keepdims=True) + epsilon)
    z, g = (h - h.mean(-1, keepdims=True)) * r, upstream * weight
    dh = r * (g - g.mean(-1, keepdims=True) - z * (g * z).mean(-1, keepdims=True))
    rows = lambda a: a.reshape(-1, h.shape[-1]).sum(0)
    return z * weight + bias, dh, rows(upstream * z), rows(upstream)


@backends("layer_norm")
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 7), (70, 3, 40)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(backend, shape, offset, bias):
    x, weight, upstream = normal(shape) + offset, normal(shape[-1:], 1), normal(shape, 2)
    b = normal(shape[-1:], 3) if bias else np.zeros(shape[-1:])
    expected = naive_layer_norm(x, weight, b, upstream)
    outs, grads = run_all(
        "layer_norm", backend, (x, weight, b) if bias else (x, weight, None), (upstream,), epsilon=1e-5
    )
    for actual, value in zip([*outs, *grads], expected):
        close(actual, value, 5e-5 if offset else 1e-5)  # 30 in float32 is known to 2e-6


@backends("layer_norm")
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_with_a_residual(backend, bias):
    x, residual, weight, upstreams = (
        normal((9, 21)),
        normal((9, 21), 1),
        normal((21,), 2),
        (normal((9, 21), 3), normal((9, 21), 4)),
    )
    b = normal((21,), 5) if bias else None
    y, dh, *d_rest = naive_layer_norm(x + residual, weight, b if bias else 0.0, upstreams[0])
    outs, grads = run_all("layer_norm", backend, (x, weight, b), upstreams, epsilon=1e-5, residual=residual)
    dh = dh + upstreams[1]
    for actual, expected in zip([*outs, *grads], [y, x + residual, dh, *d_rest[: 1 + bias], dh]):
        close(actual, expected)


@backends("layer_norm")
def test_layer_norm_gradients_against_differences(backend):
    x, weight, bias, upstream = normal((3, 4)), normal((4,), 1), normal((4,), 2), normal((3, 4), 3)
    _, grads = run_all("layer_norm", backend, (x, weight, bias), (upstream,), epsilon=1e-5)
    function = lambda *a: naive_layer_norm(*a, upstream)[0]
    close(grads[0], numeric_gradient(lambda a: function(a, weight, bias), x, upstream), 5e-6)
    close(grads[1], numeric_gradient(lambda a: function(x, a, bias), weight, upstream), 5e-6)
    close(grads[2], numeric_gradient(lambda a: function(x, weight, a), bias, upstream), 5e-6)


@backends("rms_norm")
def test_norms_with_a_residual_and_an_unused_output(backend):
    """Gradients of x and residual are separate tensors: an addition to one must not change the other."""
    x, residual, weight = (tensor(normal(s, i)) for i, s in enumerate([(4, 6), (4, 6), (6,)]))
    with kernels.use(f"rms_norm={backend}"):
        kernels.rms_norm(x, weight, 1e-6, residual)[1].sum().backward()
        assert (x.grad.numpy() == 1).all() and (residual.grad.numpy() == 1).all()
        x.grad.detach().add_(paddle.ones([4, 6]))
        assert (residual.grad.numpy() == 1).all()
        x.clear_grad(), residual.clear_grad(), weight.clear_grad()
        y, h = kernels.rms_norm(x, weight, 1e-6, residual)
        y.sum().backward()
        whole, alone = tensor(h.numpy()), tensor(weight.numpy())
        kernels.rms_norm(whole, alone, 1e-6).sum().backward()
        close(residual.grad.numpy(), whole.grad.numpy())
        close(weight.grad.numpy(), alone.grad.numpy())
        frozen = tensor(residual.numpy(), frozen=True)
        x.clear_grad()
        kernels.rms_norm(x, weight, 1e-6, frozen)[0].sum().backward()
        close(x.grad.numpy(), whole.grad.numpy())
        x.stop_gradient = True
        residual.clear_grad()
        kernels.rms_norm(x, weight, 1e-6, residual)[0].sum().backward()
        close(residual.grad.numpy(), whole.grad.numpy())


def naive_rope(x, angle, interleaved):
    """x (B, T, heads, Dh) with its first dims rotated by angle (B, T, 1, r/2), one pair after another."""
    half, y = angle.shape[-1], x.copy()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = np.cos(angle[..., i]), np.sin(angle[..., i])
        y[..., a], y[..., b] = x[..., a] * c - x[..., b] * s, x[..., b] * c + x[..., a] * s
    return y


def rope(backend, x, angle, interleaved, upstream):
    """Output, and gradient of sum(output * upstream)."""
    tables = [tensor(np.concatenate([a, a], -1), frozen=True) for a in (np.cos(angle), np.sin(angle))]
    q = tensor(x)
    with kernels.use(f"rope={backend}"):
        out = kernels.rope(q, *tables, interleaved)
    (out * tensor(upstream)).sum().backward()
    return out.numpy(), q.grad.numpy()


@backends("rope")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape, rotary_dims",
    [
        ((1, 1, 1, 2), 2),
        ((2, 5, 3, 8), 8),
        ((2, 5, 3, 8), 4),
        ((1, 7, 2, 6), 2),
        ((1, 123, 1, 80), 80),
        ((1, 65, 3, 256), 64),
        ((3, 70, 5, 40), 38),
        ((2, 9, 7, 120), 60),
        ((1, 6, 1, 5), 4),
        ((2, 3, 4, 16), 0),
    ],
)
def test_rope(backend, shape, rotary_dims, interleaved):
    B, T, _, _ = shape
    x, upstream = normal(shape), normal(shape, 1)
    angle = np.random.default_rng(0).uniform(0, 60, (B, T, 1, rotary_dims // 2))
    out, gradient = rope(backend, x, angle, interleaved, upstream)
    close(out, naive_rope(x, angle, interleaved), 3e-6)
    close(gradient, naive_rope(upstream, -angle, interleaved), 3e-6)
    assert np.array_equal(out[..., rotary_dims:], x[..., rotary_dims:].astype(np.float32)), (
        "the other dims pass unchanged"
    )


@backends("rope")
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_with_a_table_for_all_rows_and_without_a_gradient(backend, interleaved):
    x, angle = normal((3, 5, 2, 12)), normal((1, 5, 1, 4))
    tables = [tensor(np.concatenate([a, a], -1), frozen=True) for a in (np.cos(angle), np.sin(angle))]
    with kernels.use(f"rope={backend}"), paddle.no_grad():
        close(
            kernels.rope(tensor(x), *tables, interleaved=interleaved).numpy(),
            naive_rope(x, np.repeat(angle, 3, 0), interleaved),
            3e-6,
        )


@backends("rope")
@pytest.mark.parametrize("columns", [3, 10])
def test_rope_refuses_tables_of_another_width(backend, columns):
    table = tensor(np.ones((1, 2, 1, columns)), frozen=True)
    with (
        kernels.use(f"rope={backend}"),
        pytest.raises(AssertionError, match=f"tables of {columns} columns for heads of 8"),
    ):
        kernels.rope(tensor(normal((1, 2, 3, 8))), table, table)


@backends("swiglu")
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 7), (130, 129)])
def test_swiglu(backend, shape):
    gate, up, upstream = normal(shape) * 5, normal(shape, 1), normal(shape, 2)
    sigmoid = 1 / (1 + np.exp(-gate))
    out, (d_gate, d_up) = run("swiglu", backend, (gate, up), upstream)
    close(out, gate * sigmoid * up, 3e-6)
    close(d_up, upstream * gate * sigmoid, 3e-6)
    close(d_gate, upstream * up * sigmoid * (1 + gate * (1 - sigmoid)), 3e-6)


def naive_geglu(gate, up, approximate):
    if approximate:
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    return 0.5 * gate * (1 + np.vectorize(math.erf)(gate / np.sqrt(2))) * up


@backends("geglu")
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 7)])
@pytest.mark.parametrize("approximate", [True, False])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_geglu(backend, shape, approximate, scale):
    gate, up, upstream = normal(shape) * scale, normal(shape, 1), normal(shape, 2)
    out, (d_gate, d_up) = run("geglu", backend, (gate, up), upstream, approximate=approximate)
    close(out, naive_geglu(gate, up, approximate), 1e-6)
    close(d_up, naive_geglu(gate, upstream, approximate), 1e-6)
    slope = (naive_geglu(gate + 1e-6, up, approximate) - naive_geglu(gate - 1e-6, up, approximate)) / 2e-6
    close(d_gate, upstream * slope, 2e-6)


@backends("gelu")
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 7), (130, 129)])
@pytest.mark.parametrize("approximate", [True, False])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_gelu(backend, shape, approximate, scale):
    x, one, upstream = normal(shape) * scale, np.ones(shape), normal(shape, 1)
    out, (gradient,) = run("gelu", backend, (x,), upstream, approximate=approximate)
    close(out, naive_geglu(x, one, approximate), 1e-6)
    slope = (naive_geglu(x + 1e-6, one, approximate) - naive_geglu(x - 1e-6, one, approximate)) / 2e-6
    close(gradient, upstream * slope, 4e-6)
    with kernels.use(f"gelu={backend}"), paddle.no_grad():
        assert np.array_equal(kernels.gelu(tensor(x), approximate).numpy(), out)


@backends("geglu")
@pytest.mark.parametrize("approximate", [True, False])
def test_geglu_far_out(backend, approximate):
    gate = np.array([-1e4, -100.0, -14.0, -9.0, -1e-30, 0.0, 1e-30, 9.0, 14.0, 100.0, 1e4])
    out, (d_gate, _) = run("geglu", backend, (gate, np.ones(11)), np.ones(11), approximate=approximate)
    assert np.allclose(out, np.maximum(gate, 0), atol=1e-6) and np.allclose(
        d_gate, [0] * 4 + [0.5] * 3 + [1] * 4, atol=1e-6
    )


# =============================================================================================== embedding


def embed(backend, ids, weight):
    with kernels.use(f"embedding={backend}"):
        return kernels.embedding(paddle.to_tensor(ids), weight)


@backends("embedding")
@pytest.mark.parametrize("ids, V, D", [((1,), 1, 1), ((5, 7), 9, 123), ((2, 3, 4), 5, 300), ((0,), 4, 3)])
def test_embedding(backend, ids, V, D):
    ids, table, upstream = np.random.default_rng(0).integers(0, V, ids), normal((V, D)), normal((*ids, D), 1)
    weight = tensor(table)
    out = embed(backend, ids, weight)
    close(out.numpy(), table[ids])
    out.backward(tensor(upstream))
    expected = np.zeros((V, D))
    np.add.at(expected, ids.reshape(-1), upstream.reshape(-1, D))
    close(weight.grad.numpy(), expected)


@backends("embedding")
def test_embedding_gradients_wherever_they_are_asked_for(backend):
    """With one that is there already (accumulation), by paddle.grad(), in a tied head, seen by a hook, of a frozen
    table."""
    ids, weight = np.array([1, 1, 3]), tensor(normal((5, 4)))
    once = np.array([0, 2, 0, 1, 0])[:, None] * np.ones((5, 4))
    embed(backend, ids, weight).sum().backward()
    embed(backend, ids, weight).sum().backward()
    close(weight.grad.numpy(), 2 * once)
    (alone,) = paddle.grad(embed(backend, ids, weight).sum(), [weight])
    close(alone.numpy(), once)
    close(weight.grad.numpy(), 2 * once)
    weight.clear_grad()
    x = embed(backend, ids, weight)
    paddle.matmul(x, weight, transpose_y=True).sum().backward()
    close(weight.grad.numpy(), once * weight.numpy().sum(0) + weight.numpy()[ids].sum(0))
    weight.clear_grad()
    hook = weight.register_hook(lambda gradient: gradient * 3)
    embed(backend, ids, weight).sum().backward()
    close(weight.grad.numpy(), 3 * once)
    hook.remove()
    assert embed(backend, ids, tensor(normal((5, 4)), frozen=True)).stop_gradient


@backends("embedding")
def test_embedding_refuses_ids_out_of_range(backend):
    for ids in ([5], [-1])[
        : 1 if backend == "reference" else 2
    ]:  # Paddle's own reads what lies before the table for -1
        with pytest.raises(Exception, match="(?i)id"):
            embed(backend, np.array(ids), tensor(normal((5, 4))))


@pytest.mark.skipif("cpu" not in BACKENDS["embedding"], reason="no C++ ops")
def test_embedding_gradient_takes_memory_only_for_its_rows(run_python):
    """A table of 164 MB with 100 rows in use; the gradient is read too."""
    script = """
import json
import paddle, kernels
kernels.configure("cpu")
weight = paddle.zeros([20000, 2048])
weight.stop_gradient = False
ids = paddle.arange(0, 20000, 200)
now = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = now()
kernels.embedding(ids, weight).sum().backward()
assert float(kernels.squared_norm(weight.grad)) == 100 * 2048
print(json.dumps(now() - before))
"""
    assert run_python(script) < 30e6


# ================================================================================================== linear


@backends("linear")
@pytest.mark.parametrize("shape, n_out", [((1, 1), 1), ((5, 123), 7), ((2, 3, 17), 123)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(backend, shape, n_out, bias):
    x, weight, upstream = normal(shape), normal((shape[-1], n_out), 1), normal((*shape[:-1], n_out), 2)
    arrays = (x, weight, normal((n_out,), 3)) if bias else (x, weight)
    out, actual = run("linear", backend, arrays, upstream)
    close(out, x @ weight + (arrays[2] if bias else 0))
    flat, flat_up = x.reshape(-1, shape[-1]), upstream.reshape(-1, n_out)
    for gradient, expected in zip(actual, (upstream @ weight.T, flat.T @ flat_up, flat_up.sum(0))):
        close(gradient, expected)


@backends("linear")
def test_linear_with_a_weight_stored_in_bfloat16(backend):
    x, weight = tensor(normal((3, 8))), tensor(normal((8, 5), 1)).astype("bfloat16")
    with kernels.use(f"linear={backend}"):
        out = kernels.linear(x, weight)
    assert out.dtype == paddle.float32
    close(out.numpy(), x.numpy() @ weight.astype("float32").numpy())


# ================================================================================================ quantized


def packed(codes, bits, axis):
    """Packs unsigned codes (in, out), 32/bits consecutive ones along an axis per int32 word, lowest bits first."""
    codes = np.moveaxis(codes, axis, 0).reshape(-1, 32 // bits, codes.shape[1 - axis]).astype(np.uint32)
    words = sum(codes[:, i] << np.uint32(bits * i) for i in range(32 // bits))
    return np.moveaxis(words.astype(np.uint32).view(np.int32), 0, axis)


@backends("quant_linear")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "shape, n_out, group", [((1, 8), 16, 8), ((5, 120), 24, 40), ((3, 11, 64), 48, 32), ((2, 256), 160, 64)]
)
@pytest.mark.parametrize("layout", ["symmetric", "zeros", "act order"])
def test_quant_linear(backend, bits, shape, n_out, group, layout):
    generator, n_in = np.random.default_rng(bits), shape[-1]
    codes, zeros = (
        generator.integers(0, 2**bits, (n_in, n_out)),
        generator.integers(1, 2**bits, (n_in // group, -(-n_out // 8) * 8)),
    )
    scales, x, upstream = (
        generator.uniform(0.5, 1.5, (n_in // group, n_out)).astype(np.float32),
        normal(shape),
        normal((*shape[:-1], n_out), 1),
    )
    of = np.repeat(np.arange(n_in // group), group)
    if layout == "act order":
        generator.shuffle(of)
    zero = np.full((n_in // group, n_out), 2 ** (bits - 1)) if layout == "symmetric" else zeros[:, :n_out]
    weight = (codes - zero[of]) * scales[of].astype(np.float64)
    given = tensor(packed(codes, bits, 0), "int32"), tensor(scales)
    qzeros = None if layout == "symmetric" else tensor(packed(zeros - 1, bits, 1)[:, : n_out * bits // 32], "int32")
    g_index = tensor(of, "int32") if layout == "act order" else None
    for trained in (True, False):  # with a gradient the product may be another
        inputs, bias = tensor(x, frozen=not trained), normal((n_out,), 2)
        with kernels.use(f"quant_linear={backend}"):
            out = kernels.quant_linear(inputs, *given, tensor(bias, frozen=True), f"w{bits}", qzeros, g_index)
        close(out.numpy(), x @ weight + bias)
    inputs = tensor(x)
    with kernels.use(f"quant_linear={backend}"):
        (
            kernels.quant_linear(inputs, *given, None, f"w{bits}", qzeros, g_index) * tensor(upstream, frozen=True)
        ).sum().backward()
    close(inputs.grad.numpy(), upstream @ weight.T)


@backends("quant_linear")
@pytest.mark.parametrize("shape, n_out", [((1, 1), 1), ((5, 123), 7), ((2, 3, 64), 48)])
@pytest.mark.parametrize("static", [False, True])
def test_quant_linear_of_int8_by_int8(backend, shape, n_out, static):
    generator, x = np.random.default_rng(0), normal(shape).astype(np.float32)
    codes, scales, bias = (
        generator.integers(-128, 128, (shape[-1], n_out)),
        generator.uniform(0.5, 1.5, n_out).astype(np.float32),
        normal((n_out,), 1),
    )
    step = np.float32(0.02) if static else np.maximum(np.abs(x).max(-1, keepdims=True), 1e-8) / np.float32(127)
    expected = np.clip(np.round(x / step), -128, 127).astype(np.float64) @ codes * step * scales + bias
    with kernels.use(f"quant_linear={backend}"):
        out = kernels.quant_linear(
            tensor(x, frozen=True),
            tensor(codes, "int8"),
            tensor(scales),
            tensor(bias, frozen=True),
            "a8w8",
            input_scale=tensor([0.02]) if static else None,
        )
    close(out.numpy(), expected, 3e-6)


# ================================================================================================ attention


def visible(rows, causal, B, H, Tq, Tk):
    """(B, H, Tq, Tk) bool, by the docstring of kernels.attention, entry by entry."""
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


def naive_attention(q, k, v, upstream, seen, scale, slopes=None, softcap=None):
    """Output and gradients of q, k, v in float64, with a full (Tq, Tk) matrix per head."""
    B, Tq, H, Dh = q.shape
    Tk, group = k.shape[1], H // k.shape[2]
    out, d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h in np.ndindex(B, H):
        s = q[b, :, h] @ k[b, :, h // group].T * scale
        d_cap = 1.0
        if softcap is not None:
            s = softcap * np.tanh(s / softcap)
            d_cap = 1 - (s / softcap) ** 2
        if slopes is not None:
            s = s - slopes[h] * (np.arange(Tq)[:, None] + Tk - Tq - np.arange(Tk))
        s = np.where(seen[b, h], s, -np.inf)
        top = s.max(-1, keepdims=True)
        e = np.exp(s - np.where(np.isfinite(top), top, 0))
        p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)  # rows that see nothing stay zero
        out[b, :, h] = p @ v[b, :, h // group]
        d_p = upstream[b, :, h] @ v[b, :, h // group].T
        d_s = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * d_cap * scale
        d_q[b, :, h] = d_s @ k[b, :, h // group]
        d_k[b, :, h // group] += d_s.T @ q[b, :, h]
        d_v[b, :, h // group] += p.T @ upstream[b, :, h]
    return out, (d_q, d_k, d_v)


def check_attention(
    backend, B, Tq, Tk, H, K, Dh, rows=None, causal=True, scale=None, slopes=None, tolerance=5e-6, softcap=None
):
    q, upstream = normal((B, Tq, H, Dh)), normal((B, Tq, H, Dh), 1)
    k, v = normal((B, Tk, K, Dh), 2), normal((B, Tk, K, Dh), 3)
    seen = visible(rows, causal, B, H, Tq, Tk)
    expected, gradients = naive_attention(
        q, k, v, upstream, seen, Dh**-0.5 if scale is None else scale, slopes, softcap
    )
    out, actual = run(
        "attention",
        backend,
        (q, k, v),
        upstream,
        startend_row_indices=None if rows is None else paddle.to_tensor(rows.astype("int32")),
        causal=causal,
        scale=scale,
        alibi_slopes=None if slopes is None else tensor(slopes, frozen=True),
        softcap=softcap,
    )
    close(out, expected, tolerance, "out")
    for name, a, b in zip(("dq", "dk", "dv"), actual, gradients):
        close(a, b, tolerance, name)
    blind = ~seen.any(-1)  # (B, H, Tq)
    assert (out.transpose(0, 2, 1, 3)[blind] == 0).all() and (actual[0].transpose(0, 2, 1, 3)[blind] == 0).all()
    return seen


SHAPES = [  # B, Tq, Tk, H, K, Dh
    (1, 1, 1, 1, 1, 2), (2, 7, 7, 4, 2, 8), (1, 13, 13, 3, 3, 5), (1, 1, 9, 4, 1, 6), (2, 5, 12, 6, 2, 4), (1, 33, 33,
        2, 1, 16),
]  # fmt: skip


def random_rows(n, heads, B, Tk, causal, seed=0):
    """(B, heads, Tk, n) int32; some entries hide nothing, some hide everything."""
    generator = np.random.default_rng([seed, n, heads, Tk])
    pick = lambda: generator.integers(0, Tk + 2, (B, heads, Tk))
    if n == 1:
        return pick()[..., None]
    if n == 2 and not causal:  # rows >= a or rows < b
        a, b = pick(), pick()
        return np.stack([np.maximum(a, b), np.minimum(a, b)], -1)
    pairs = [np.sort(np.stack([pick(), pick()], -1), -1) for _ in range(n // 2)]
    return np.concatenate(pairs, -1)


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch):
    """Small blocks, so that every sum over blocks runs: 64 query rows is the minimum of the reference."""
    if request.param == "blocks":
        monkeypatch.setattr(kernels.reference, "BLOCK_ELEMENTS", 8)
        monkeypatch.setattr(kernels.reference, "LOGITS", 8)
        monkeypatch.setattr(cpu, "LOGITS", 8)
        monkeypatch.setattr(cpu, "LOGITS_ROWS", 16)


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
    check_attention(
        backend, *shape, rows=random_rows(n, {"one": 1, "K": K, "H": H}[heads], B, Tk, causal), causal=causal
    )


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
@pytest.mark.parametrize("shape", SHAPES + [(1, 77, 100, 4, 2, 24)])
@pytest.mark.parametrize("kind", ["causal", "full", "rows", "alibi", "rows and alibi", "prefix"])
@pytest.mark.parametrize("softcap", [0.3, 50.0])
def test_attention_with_a_softcap(backend, shape, kind, softcap):
    """Scores up to 10: a cap of 0.3 flattens nearly all of them, one of 50 nearly none."""
    B, _, Tk, H, K, _ = shape
    rows = {
        "rows": random_rows(1, 1, B, Tk, True),
        "rows and alibi": random_rows(2, K, B, Tk, True),
        "prefix": random_rows(2, 1, B, Tk, False),
    }.get(kind)
    slopes = 0.5 ** np.arange(1, H + 1) if "alibi" in kind else None
    check_attention(
        backend,
        *shape,
        rows=rows,
        causal=kind not in ("full", "prefix"),
        scale=1.0,
        slopes=slopes,
        softcap=softcap,
        tolerance=1e-5,
    )


@backends("attention")
def test_attention_with_a_softcap_far_out(backend):
    """Scores of thousands times the cap: all are the cap or its negative, with slope 0."""
    check_attention(backend, 1, 9, 9, 2, 1, 4, scale=1e6, softcap=30.0, tolerance=1e-4)


@backends("linear_cross_entropy")
def test_a_softcap_of_zero_is_refused(backend):
    with kernels.use(f"attention={backend}, linear_cross_entropy={backend}"):
        with pytest.raises(AssertionError, match="a softcap of 0.0"):
            kernels.attention(*[tensor(normal((1, 2, 1, 4)))] * 3, softcap=0.0)
        with pytest.raises(AssertionError, match="a softcap of 0"):
            kernels.linear_cross_entropy(
                tensor(normal((2, 3))), tensor(normal((3, 4))), paddle.to_tensor([1, 2]), softcap=0
            )


def prefix_rows(documents, Tk):
    """Rows (1, 1, Tk, 2 | 4) of a packed batch whose documents each begin with a context that all of the document sees.

    documents: (length, length of the context). The rows that must not see key j of a document [a, b) are all before a,
    and, if j is behind the context, those before j; and all from b on: with one document n=2 says it, and so it does
    with several."""
    rows, a = [], 0
    for length, context in documents:
        rows += [(a + length, a if j < context else a + j) for j in range(length)]
        a += length
    assert a == Tk
    return np.array(rows).reshape(1, 1, Tk, 2)


@backends("attention")
@pytest.mark.parametrize(
    "documents, Tq",
    [
        ([(13, 5)], 13),
        ([(13, 5)], 4),
        ([(13, 5)], 1),
        ([(9, 9)], 9),
        ([(7, 0)], 7),
        ([(40, 11), (1, 0), (90, 70), (26, 3)], 157),
        ([(40, 11), (117, 70)], 90),
    ],
)
@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("H, K, Dh", [(4, 2, 8), (3, 1, 24)])
def test_attention_with_a_bidirectional_prefix(backend, documents, Tq, columns, H, K, Dh):
    """ChatGLM's mask: single, packed, and behind a cache; as two hidden intervals the same rows are n=4."""
    Tk = sum(length for length, _ in documents)
    rows = prefix_rows(documents, Tk)
    if columns == 4:
        rows = np.stack(
            [rows[..., 0], np.full(rows.shape[:3], 2**31 - 1), np.zeros(rows.shape[:3], int), rows[..., 1]], -1
        )
    seen = check_attention(backend, 1, Tq, Tk, H, K, Dh, rows=rows, causal=False)
    of, start = (
        np.repeat(np.arange(len(documents)), [n for n, _ in documents]),
        np.repeat(np.cumsum([0] + [n for n, _ in documents])[:-1], [n for n, _ in documents]),
    )
    context = start + np.repeat([c for _, c in documents], [n for n, _ in documents])
    at = np.arange(Tk)
    expected = (of[:, None] == of) & ((at <= at[:, None]) | (at < context))
    assert np.array_equal(seen[0, 0], expected[Tk - Tq :])


@backends("attention")
@pytest.mark.parametrize("T, Tk", [(200, 200), (130, 157)])
@pytest.mark.parametrize("kind", ["none", "packed", "random", "alibi", "full", "four"])
def test_attention_in_blocks(backend, T, Tk, kind, monkeypatch):
    """Several blocks of 64 queries; with packed rows a block skips keys that no query of it sees."""
    monkeypatch.setattr(kernels.reference, "LOGITS", 8)
    ends = np.repeat([70, 71, 128, 150, Tk], np.diff([0, 70, 71, 128, 150, Tk]))
    rows = {
        "packed": np.stack([ends, np.full(Tk, Tk)])[:, None, :, None],
        "random": random_rows(1, 2, 2, Tk, True),
        "four": random_rows(4, 1, 2, Tk, False),
    }.get(kind)
    slopes = 0.5 ** np.arange(1, 5) if kind == "alibi" else None
    check_attention(backend, 2, T, Tk, 4, 2, 4, rows=rows, causal=kind not in ("full", "four"), slopes=slopes)


@backends("attention")
@pytest.mark.parametrize("Dh", [8, 24, 64, 80, 96, 112, 120, 128, 192, 256, 576])
@pytest.mark.parametrize("kind", ["causal", "packed", "full", "alibi"])
def test_attention_head_dims(backend, Dh, kind):
    """One tile of queries and keys and a few more; two query heads per key head."""
    T = 77
    rows = np.repeat([30, T], [30, T - 30]).reshape(1, 1, T, 1) if kind == "packed" else None
    check_attention(
        backend, 1, T, T, 2, 1, Dh, rows, kind != "full", slopes=np.array([0.5, 0.02]) if kind == "alibi" else None
    )


@backends("attention")
@pytest.mark.parametrize("H, K", [(5, 1), (6, 3), (7, 7), (12, 4), (71, 1)])
def test_attention_head_counts(backend, H, K):
    """One key/value head for all, and numbers of heads that are no power of two, as in Falcon, Bloom and
    Baichuan-13B."""
    check_attention(backend, 2, 9, 70, H, K, 16, slopes=0.9 ** np.arange(H))


@backends("attention_with_lse")
@pytest.mark.parametrize("T, cuts", [(9, (0, 4, 9)), (150, (0, 10, 80, 150)), (140, (0, 140))])
@pytest.mark.parametrize("kind", ["causal", "full", "rows", "window", "context", "alibi", "softcap", "alibi and rows"])
def test_merged_parts_of_attention_equal_attention(backend, T, cuts, kind):
    """Every part of the queries with every part of the keys, merged; backward with out and lse of all keys."""
    B, H, K, Dh = 2, 4, 2, 6
    q, k, v, upstream = (normal((B, T, n, Dh), s) for s, n in enumerate((H, K, K, H)))
    of = {
        "rows": random_rows(1, 1, B, T, True),
        "alibi and rows": random_rows(1, K, B, T, True),
        "context": random_rows(2, 1, B, T, False),
        "window": np.tile((np.arange(T) + 3).reshape(1, 1, T, 1), (B, 1, 1, 1)),
    }
    rows, causal = of.get(kind), kind not in ("full", "context")
    slopes = 0.5 ** np.arange(1, H + 1) if "alibi" in kind else None
    softcap = 0.7 if kind == "softcap" else None
    options = {
        "causal": causal,
        "alibi_slopes": None if slopes is None else tensor(slopes, frozen=True),
        "softcap": softcap,
    }
    seen = visible(rows, causal, B, H, T, T)
    expected, gradients = naive_attention(q, k, v, upstream, seen, Dh**-0.5, slopes, softcap)
    pieces = [(a, b, c, d) for a, b in zip(cuts, cuts[1:]) for c, d in zip(cuts, cuts[1:])]

    def at(a, b, c, d):
        here = None if rows is None else paddle.to_tensor((rows[:, :, c:d] - c).astype("int32"))
        return [tensor(x[:, i:j], frozen=True) for x, i, j in ((q, a, b), (k, c, d), (v, c, d))], here, a - c

    with kernels.use(f"attention_with_lse={backend}, attention_with_lse_backward={backend}"):
        out, lse = np.zeros((B, T, H, Dh)), np.full((B, H, T), -np.inf)
        for a, b, c, d in pieces:
            inputs, here, offset = at(a, b, c, d)
            o, l = (x.numpy().astype(float) for x in kernels.attention_with_lse(*inputs, here, offset, **options))
            new = np.logaddexp(lse[:, :, a:b], l)
            share = lambda x: np.exp(np.where(np.isinf(x), -np.inf, x - np.where(np.isinf(new), 0, new))).transpose(
                0, 2, 1
            )[..., None]
            out[:, a:b] = out[:, a:b] * share(lse[:, :, a:b]) + o * share(l)
            lse[:, :, a:b] = new
        close(out, expected, 5e-6, "out")
        actual = [np.zeros_like(x) for x in (q, k, v)]
        for a, b, c, d in pieces:
            inputs, here, offset = at(a, b, c, d)
            given = [tensor(x[:, a:b], frozen=True) for x in (out, upstream)]
            parts = kernels.attention_with_lse_backward(
                *inputs, given[0], tensor(lse[:, :, a:b], frozen=True), given[1], here, offset, **options
            )
            for total, part, (i, j) in zip(actual, parts, ((a, b), (c, d), (c, d))):
                total[:, i:j] += part.numpy()
    for name, a, b in zip(("dq", "dk", "dv"), actual, gradients):
        close(a, b, 5e-6, name)


@backends("attention")
@pytest.mark.parametrize("rows", [None, [5, 0], [3, 1], [0, 0]])
def test_attention_over_one_key(backend, rows):
    """Its weight is 1 wherever it is seen, so queries and keys have no gradient."""
    rows = None if rows is None else np.array(rows).reshape(1, 1, 1, 2)
    check_attention(backend, 1, 5, 1, 4, 2, 64, rows, causal=False)
    check_attention(backend, 1, 1, 1, 2, 1, 96, None if rows is None else rows[..., :1], causal=True)


@backends("attention")
def test_attention_with_large_scores(backend):
    """Scores of hundreds: softmax must not overflow."""
    check_attention(backend, 1, 9, 9, 2, 1, 4, scale=100.0, tolerance=1e-4)


@backends("attention")
@pytest.mark.parametrize("softcap", [None, 0.6])
def test_attention_gradients_against_differences(backend, softcap):
    """The oracle above is our formula; this test needs none."""
    q, k, v, upstream = (normal((1, 4, 2, 3), s) for s in range(4))
    k, v = k[:, :, :1], v[:, :, :1]
    rows = np.array([3, 4, 4, 4]).reshape(1, 1, 4, 1)
    seen = visible(rows, True, 1, 2, 4, 4)
    arrays = [q, k, v]
    _, actual = run(
        "attention",
        backend,
        arrays,
        upstream,
        startend_row_indices=paddle.to_tensor(rows.astype("int32")),
        softcap=softcap,
    )
    for i in range(3):
        function = lambda a, i=i: naive_attention(
            *arrays[:i], a, *arrays[i + 1 :], upstream, seen, 3**-0.5, softcap=softcap
        )[0]
        close(actual[i], numeric_gradient(function, arrays[i], upstream), 2e-6)


class Traced(paddle.nn.Layer):
    """kernels.rope, then kernels.attention, for a graph of any B, Tq and Tk."""

    def __init__(self, interleaved, **options):
        super().__init__()
        self.interleaved, self.options = interleaved, options

    def forward(self, q, k, v, cos, sin, rows=None):
        return rotate_and_attend(q, k, v, cos, sin, rows, self.interleaved, self.options)


@paddle.jit.not_to_static
def rotate_and_attend(q, k, v, cos, sin, rows, interleaved, options):
    slopes = options["alibi_slopes"]  # numpy, which becomes a constant of the graph
    options = options | {"alibi_slopes": None if slopes is None else kernels.to_tensor(slopes)}
    return kernels.attention(kernels.rope(q, cos, sin, interleaved), k, v, rows, **options)


@pytest.mark.parametrize("n, causal", [(0, True), (0, False), (1, True), (2, True), (2, False), (4, False)])
@pytest.mark.parametrize("alibi, softcap", [(False, None), (True, 0.7)])
def test_attention_and_rope_in_an_exported_graph(n, causal, alibi, softcap, tmp_path):
    B, Tq, Tk, H, K, Dh, rotary_dims = 2, 5, 9, 4, 2, 8, 6
    q, k, v, angle = (
        normal((B, Tq, H, Dh)),
        normal((B, Tk, K, Dh), 1),
        normal((B, Tk, K, Dh), 2),
        normal((B, Tq, 1, rotary_dims // 2), 3),
    )
    slopes = 0.5 ** np.arange(H) if alibi else None
    net = Traced(n % 2 == 0, causal=causal, softcap=softcap, alibi_slopes=slopes.astype("float32") if alibi else None)
    shapes = [(H, Dh), (K, Dh), (K, Dh), (1, rotary_dims), (1, rotary_dims)]
    specs = [paddle.static.InputSpec([None, None, *shape], "float32") for shape in shapes] + [
        paddle.static.InputSpec([None, 1, None, n], "int32")
    ] * (n > 0)
    with kernels.use("reference"):  # as export.py does
        paddle.jit.save(paddle.jit.to_static(net, input_spec=specs, full_graph=True), str(tmp_path / "net"))
    rows = random_rows(n, 1, B, Tk, causal) if n else None
    given = [
        tensor(a, frozen=True) for a in (q, k, v, *(np.concatenate([t, t], -1) for t in (np.cos(angle), np.sin(angle))))
    ]
    actual = paddle.jit.load(str(tmp_path / "net"))(*given, *([tensor(rows, "int32")] if n else []))
    seen = visible(rows, causal, B, H, Tq, Tk)
    expected, _ = naive_attention(
        naive_rope(q, angle, n % 2 == 0), k, v, np.zeros_like(q), seen, Dh**-0.5, slopes, softcap
    )
    close(actual.numpy(), expected, 5e-6)


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


@pytest.mark.parametrize(
    "queries, packed", [(32768, True), (2048, False), pytest.param(32768, False, marks=pytest.mark.slow)]
)
@pytest.mark.sweep(keep=0)
def test_attention_of_32768_tokens_stays_under_2_gb(queries, packed, run_python):
    """One head, forward and backward: the [T, T] scores alone would be 4.3 GB. 2,048 queries need as much at a time as
    all."""
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
# of this program: exec resets it
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before, start = peak(), time.time()
kernels.attention(q, k, v, rows).sum().backward()
assert np.isfinite(q.grad.numpy()).all() and np.abs(v.grad.numpy().sum() - Tq * 64) < 0.01 * Tq * 64
print(json.dumps({"peak": peak() - before, "seconds": time.time() - start}))
"""
    actual = run_python(script, queries, packed)
    print(f"{actual['peak'] / 1e6:.0f} MB above the start, {actual['seconds']:.1f} s")
    assert actual["peak"] < 2e9


# ===================================================================================== linear cross-entropy


def naive_cross_entropy(hidden, weight, labels, upstream, softcap=None):
    """losses and gradients in float64; weight (D, V)."""
    logits, slope = hidden @ weight, 1.0
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    kept = labels != -100
    e = np.exp(logits - logits.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    onehot = np.eye(weight.shape[1])[np.where(kept, labels, 0)]
    losses = np.where(kept, -np.log((p * onehot).sum(-1)), 0.0)
    d_logits = (p - onehot) * (upstream * kept)[:, None] * slope
    return losses, d_logits @ weight.T, hidden.T @ d_logits, np.where(kept, logits.argmax(-1), -1)


def lce(backend, hidden, weight, labels, upstream, frozen=False, **kwargs):
    h, w = tensor(hidden), tensor(weight, frozen=frozen)
    with kernels.use(f"linear_cross_entropy={backend}"):
        losses, predictions = kernels.linear_cross_entropy(
            h, w, paddle.to_tensor(labels), return_predictions=True, **kwargs
        )
        again = kernels.linear_cross_entropy(h, w, paddle.to_tensor(labels), **kwargs)
    assert np.array_equal(losses.numpy(), again.numpy(), equal_nan=True) and losses.dtype == paddle.float32
    (losses * tensor(upstream, frozen=True)).sum().backward()
    return losses.numpy(), predictions.numpy(), h.grad, w.grad


@backends("linear_cross_entropy")
@pytest.mark.parametrize("N, D, V", [(1, 1, 2), (5, 123, 17), (123, 5, 123), (70, 8, 3), (40, 6, 300)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_linear_cross_entropy(backend, N, D, V, transpose, ignored, blocks):
    generator = np.random.default_rng(N)
    hidden, weight, upstream = normal((N, D)), normal((D, V), 1), normal((N,), 2)
    labels = np.where(generator.random(N) < ignored, -100, generator.integers(0, V, N))
    losses, d_hidden, d_weight, predictions = naive_cross_entropy(hidden, weight, labels, upstream)
    actual = lce(
        backend, hidden, weight.T.copy() if transpose else weight, labels, upstream, transpose_weight=transpose
    )
    close(actual[0], losses)
    assert np.array_equal(actual[1], predictions)
    if (labels != -100).any():
        close(actual[2].numpy(), d_hidden)
        close(actual[3].numpy(), d_weight.T if transpose else d_weight)


@backends("linear_cross_entropy")
@pytest.mark.parametrize("N, D, V", [(1, 1, 2), (5, 123, 17), (123, 5, 123), (40, 6, 300)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_linear_cross_entropy_with_a_softcap(backend, N, D, V, transpose, frozen, softcap, blocks):
    generator = np.random.default_rng(N)
    hidden, weight, upstream = normal((N, D)), normal((D, V), 1), normal((N,), 2)
    labels = np.where(generator.random(N) < 0.3, -100, generator.integers(0, V, N))
    labels[0] = V - 1
    losses, d_hidden, d_weight, predictions = naive_cross_entropy(hidden, weight, labels, upstream, softcap)
    actual = lce(
        backend,
        hidden,
        weight.T.copy() if transpose else weight,
        labels,
        upstream,
        frozen,
        transpose_weight=transpose,
        softcap=softcap,
    )
    close(actual[0], losses)
    if softcap > 1:  # what the cap makes equal in float32 it need not in float64
        assert np.array_equal(actual[1], predictions)
    close(actual[2].numpy(), d_hidden)
    if not frozen:
        close(actual[3].numpy(), d_weight.T if transpose else d_weight)


@backends("linear_cross_entropy")
def test_linear_cross_entropy_with_every_label_ignored(backend):
    losses, predictions, d_hidden, d_weight = lce(backend, normal((6, 4)), normal((4, 9)), np.full(6, -100), np.ones(6))
    assert (losses == 0).all() and (predictions == -1).all() and (d_hidden.numpy() == 0).all()
    assert d_weight is None or (d_weight.numpy() == 0).all()


@backends("linear_cross_entropy")
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_linear_cross_entropy_with_a_frozen_weight(backend, transpose, scale, blocks):
    """30: all but certain of one word, in blocks whose maximum grows by hundreds."""
    hidden, weight, upstream = normal((70, 4)) * scale, normal((4, 300), 1), normal((70,), 2)
    labels = np.where(np.arange(70) % 2, (hidden @ weight).argmax(-1), np.arange(70) * 4)
    losses, d_hidden, _, _ = naive_cross_entropy(hidden, weight, labels, upstream)
    actual = lce(
        backend,
        hidden,
        weight.T.copy() if transpose else weight,
        labels,
        upstream,
        frozen=True,
        transpose_weight=transpose,
    )
    close(actual[0], losses)
    close(actual[2].numpy(), d_hidden, 1e-5 * scale)  # logits of some hundreds are known to 1e-5
    assert actual[3] is None


@backends("linear_cross_entropy")
def test_linear_cross_entropy_computes_gradients_in_forward_only_if_needed(backend, monkeypatch):
    """Products made: 1 without a gradient, 2 with a frozen weight, 4 with a trained one, 3 with only the weight
    trained."""
    products, plain = [], paddle.matmul
    monkeypatch.setattr(paddle, "matmul", lambda *args, **kwargs: products.append(1) or plain(*args, **kwargs))

    def count(hidden_frozen, weight_frozen):
        products.clear()
        hidden, weight = tensor(normal((7, 4)), frozen=hidden_frozen), tensor(normal((4, 9), 1), frozen=weight_frozen)
        with kernels.use(f"linear_cross_entropy={backend}"):
            loss = kernels.linear_cross_entropy(hidden, weight, paddle.arange(7)).sum()
        if not loss.stop_gradient:
            loss.backward()
        return len(products)

    assert count(True, True) == 1 and count(False, True) == 2 and count(False, False) == 4
    with paddle.no_grad():
        assert count(False, True) == 1 and count(False, False) == 1


@backends("linear_cross_entropy")
@pytest.mark.parametrize("transpose", [False, True])
def test_linear_cross_entropy_with_a_weight_stored_in_bfloat16(backend, transpose, blocks):
    hidden, labels, upstream = normal((70, 4)), np.arange(70) * 3, normal((70,), 2)
    stored = tensor(normal((300, 4) if transpose else (4, 300), 1), frozen=True).astype("bfloat16")
    weight = stored.astype("float32").numpy().astype(np.float64)
    h = tensor(hidden)
    with kernels.use(f"linear_cross_entropy={backend}"):
        losses = kernels.linear_cross_entropy(h, stored, paddle.to_tensor(labels), transpose)
    losses.backward(tensor(upstream))
    expected = naive_cross_entropy(hidden, weight.T if transpose else weight, labels, upstream)
    close(losses.numpy(), expected[0])
    close(h.grad.numpy(), expected[1])


@backends("linear_cross_entropy")
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_linear_cross_entropy_of_nan_and_infinite_logits(backend, softcap):
    """One NaN makes the loss NaN, wherever it lies: training must stop. Words at -inf do not count, or are as low as a
    softcap lets them."""
    weight = normal((1, 200))
    loss = lambda w: lce(backend, np.ones((1, 1)), w, np.array([3]), np.ones(1), softcap=softcap)[0][0]
    for column in (0, 3, 150, 199):
        broken = weight.copy()
        broken[0, column] = np.nan
        assert np.isnan(loss(broken)), column
    hidden = weight.copy()
    hidden[0, 100:] = -np.inf
    close(loss(hidden), loss(weight[:, :100]))  # e^-30 of a word is nothing either


class Shard:
    """The vocabulary shard of one of several threads; all_reduce waits for the others, like ranks."""

    def __init__(self, start, number, shared, widest):
        self.start, self.number, self.shared, self.widest = start, number, shared, widest

    def all_reduce(self, value, kind):
        self.shared["values"][self.number] = value
        self.shared["barrier"].wait()
        total = paddle.stack(self.shared["values"])
        self.shared["barrier"].wait()
        return total.max(0) if kind == "max" else total.sum(0)


@backends("linear_cross_entropy")
@pytest.mark.parametrize("ends", [(0, 150, 300), (0, 1, 130, 300)])
@pytest.mark.parametrize("transpose, frozen", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_linear_cross_entropy_of_a_sharded_vocabulary(backend, ends, transpose, frozen, softcap, blocks):
    hidden, weight, upstream = normal((40, 6)), normal((6, 300), 1), normal((40,), 2)
    weight[:, 200] = weight[:, 5]  # so that largest logits come twice
    hidden[3], hidden[4] = weight[:, 5] * 3, weight[:, 5] * 4
    labels = np.where(np.arange(40) % 5 == 2, -100, np.arange(40) * 7)
    losses, d_hidden, d_weight, predictions = naive_cross_entropy(hidden, weight, labels, upstream, softcap)
    count = len(ends) - 1
    shared, actual = {"values": [None] * count, "barrier": threading.Barrier(count, timeout=60)}, [None] * count
    ids = paddle.to_tensor(labels)
    inputs = []
    for a, b in zip(ends, ends[1:]):
        part = weight[:, a:b]
        inputs.append((tensor(hidden), tensor(part.T.copy() if transpose else part, frozen=frozen)))

    widest = max(b - a for a, b in zip(ends, ends[1:]))

    def rank(i):
        shard = Shard(ends[i], i, shared, widest)
        actual[i] = kernels.linear_cross_entropy(
            *inputs[i], ids, transpose, return_predictions=True, vocabulary=shard, softcap=softcap
        )

    with kernels.use(f"linear_cross_entropy={backend}"):
        threads = [threading.Thread(target=rank, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    total = np.zeros_like(hidden)
    for i, (h, w) in enumerate(inputs):
        assert np.array_equal(actual[i][0].numpy(), actual[0][0].numpy()), "the same on every rank"
        close(actual[i][0].numpy(), losses)
        assert np.array_equal(actual[i][1].numpy(), predictions)
        actual[i][0].backward(tensor(upstream))
        total += h.grad.numpy()
        if not frozen:
            expected = d_weight[:, ends[i] : ends[i + 1]]
            close(w.grad.numpy(), expected.T if transpose else expected)
    close(total, d_hidden)


@backends("linear_cross_entropy")
@pytest.mark.parametrize("softcap", [None, 0.6])
def test_linear_cross_entropy_gradients_against_differences(backend, softcap):
    hidden, weight, labels, upstream = normal((3, 2)), normal((2, 5), 1), np.array([1, -100, 4]), normal((3,), 2)
    actual = lce(backend, hidden, weight, labels, upstream, softcap=softcap)
    close(
        actual[2].numpy(),
        numeric_gradient(lambda h: naive_cross_entropy(h, weight, labels, upstream, softcap)[0], hidden, upstream),
        2e-6,
    )
    close(
        actual[3].numpy(),
        numeric_gradient(lambda w: naive_cross_entropy(hidden, w, labels, upstream, softcap)[0], weight, upstream),
        2e-6,
    )


def test_linear_cross_entropy_never_holds_all_logits(run_python):
    """4,096 tokens and a vocabulary of 50,000: the logits would take 819 MB, and their gradient as much."""
    script = """
import json
import paddle, kernels
kernels.configure()
h, w = paddle.randn([4096, 32]), paddle.randn([32, 50000])
h.stop_gradient = w.stop_gradient = False
labels = paddle.randint(0, 50000, [4096])
paddle.matmul(h[:8], w).numpy()
# of this program: exec resets it
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
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
            kernels.adamw(
                parameter, tensor(gradient), moment1, moment2, step, lr * step, beta1, beta2, epsilon, decay, grad_scale
            )
            g = gradient * grad_scale
            m1, m2 = beta1 * m1 + (1 - beta1) * g, beta2 * m2 + (1 - beta2) * g * g
            value = value * (1 - lr * step * decay)
            value = value - lr * step * (m1 / (1 - beta1**step)) / (np.sqrt(m2 / (1 - beta2**step)) + epsilon)
            close(parameter.numpy(), value, 2e-6, f"step {step}")
            close(moment1.numpy(), m1, 2e-6)
            close(moment2.numpy(), m2, 2e-6)
    assert parameter.data_ptr() == where, "in place"


@backends("adamw")
def test_adamw_does_not_change_the_gradient(backend):
    parameter, gradient = tensor(normal((4,))), tensor(normal((4,), 1))
    with kernels.use(f"adamw={backend}"):
        kernels.adamw(parameter, gradient, tensor(np.zeros(4)), tensor(np.zeros(4)), 1, 0.1, 0.9, 0.999, 1e-8, 0.0, 0.5)
    assert np.array_equal(gradient.numpy(), normal((4,), 1).astype(np.float32))


@backends("adamw")
def test_adamw_at_a_late_step(backend):
    """Step 100,000: bias corrections are 1 in float32."""
    value, m1, m2, g = normal((9,)), normal((9,), 1), normal((9,), 2) ** 2, normal((9,), 3)
    parameter, moment1, moment2 = tensor(value), tensor(m1), tensor(m2)
    with kernels.use(f"adamw={backend}"):
        kernels.adamw(parameter, tensor(g), moment1, moment2, 100_000, 0.01, 0.9, 0.999, 1e-8, 0.1)
    m1, m2 = 0.9 * m1 + 0.1 * g, 0.999 * m2 + 0.001 * g * g
    close(parameter.numpy(), value * (1 - 0.001) - 0.01 * m1 / (np.sqrt(m2 / (1 - 0.999**100_000)) + 1e-8), 2e-6)


@backends("adamw")
@pytest.mark.parametrize("kind, gradient_kind", list(itertools.product(["float32", "bfloat16"], repeat=2)))
def test_adamw_of_bfloat16(backend, kind, gradient_kind):
    """Computed in float32 and rounded to the nearest bfloat16; moments are not rounded."""
    parameter, gradient = tensor(normal((5, 123))).astype(kind), tensor(normal((5, 123), 1)).astype(gradient_kind)
    value, g = (t.astype("float32").numpy().astype(np.float64) for t in (parameter, gradient))
    moments = [tensor(np.zeros((5, 123))) for _ in range(2)]
    with kernels.use(f"adamw={backend}"):
        kernels.adamw(parameter, gradient, *moments, 1, 0.01, 0.9, 0.99, 1e-8, 0.1, 0.5)
    g = g * 0.5
    value = value * 0.999 - 0.01 * g / (np.abs(g) + 1e-8)
    close(moments[0].numpy(), 0.1 * g, 2e-6)
    close(moments[1].numpy(), 0.01 * g * g, 2e-6)
    assert parameter.dtype == getattr(paddle, kind)
    if kind == "float32":
        close(parameter.numpy(), value, 2e-6)
    else:
        assert (np.abs(parameter.astype("float32").numpy() - value) <= np.abs(value) * 2**-8 * 1.004 + 1e-7).all()


@backends("squared_norm")
@pytest.mark.parametrize("shape", [(1,), (5, 123), (3, 70, 1000)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_squared_norm(backend, shape, kind):
    x = tensor(normal(shape) * 1e3).astype(kind)
    with kernels.use(f"squared_norm={backend}"):
        actual = kernels.squared_norm(x)
    expected = (x.astype("float32").numpy().astype(np.float64) ** 2).sum()
    assert actual.dtype == paddle.float64 and actual.shape == [] and abs(float(actual) / expected - 1) < 1e-6


# ====================================================================================== our own C++ on the CPU

built = pytest.mark.skipif(cpu.missing("attention") is not None, reason=f"no C++ ops: {cpu.missing('attention')}")
with_bf16 = pytest.mark.skipif(cpu.missing("bf16") is not None, reason=f"no bfloat16: {cpu.missing('bf16')}")


def rounded(array):
    """Rounded to bfloat16, as float32."""
    return tensor(array).astype("bfloat16").astype("float32").numpy().astype(np.float64)


@with_bf16
@pytest.mark.parametrize(
    "M, N, K", [(1, 1, 1), (5, 123, 7), (7, 64, 33), (97, 65, 1030), (100, 200, 600), (33, 2100, 40)]
)
@pytest.mark.parametrize("transposed", list(itertools.product([False, True], repeat=2)))
def test_bf16_products_round_only_the_operands(M, N, K, transposed):
    a, b = normal((K, M) if transposed[0] else (M, K)), normal((N, K) if transposed[1] else (K, N), 1)
    actual = cpu.bf16_matmul(tensor(a), tensor(b), *transposed).numpy()
    left, right = (rounded(x).T if t else rounded(x) for x, t in zip((a, b), transposed))
    assert np.abs(actual - left @ right).max() < 2e-6 * np.sqrt(K) * 3


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
@pytest.mark.parametrize("transpose, frozen", list(itertools.product([False, True], repeat=2)))
def test_linear_cross_entropy_in_bf16(in_bf16, transpose, frozen):
    hidden, weight, upstream = normal((70, 48)), normal((48, 90), 1) * 0.3, normal((70,), 2)
    labels = np.random.default_rng(0).integers(0, 90, 70)
    losses, d_hidden, d_weight, _ = naive_cross_entropy(rounded(hidden), rounded(weight), labels, upstream)
    actual = lce(
        "cpu", hidden, weight.T.copy() if transpose else weight, labels, upstream, frozen, transpose_weight=transpose
    )
    close(actual[0], losses)
    close(actual[2].numpy(), d_hidden, 1e-2)  # the softmax is rounded as well
    if not frozen:
        close(actual[3].numpy(), d_weight.T if transpose else d_weight, 1e-2)


@with_bf16
def test_linear_cross_entropy_in_bf16_of_almost_certain_tokens(in_bf16):
    """p - onehot is nearly 0, and must be in the result although the products round p and W."""
    weight = normal((8, 40))
    labels = np.arange(40)
    hidden = weight.T * 9 / (weight.T**2).sum(-1, keepdims=True) * np.linspace(1, 8, 40)[:, None]
    expected = naive_cross_entropy(rounded(hidden), rounded(weight), labels, np.ones(40))[1]
    actual = lce("cpu", hidden, weight, labels, np.ones(40), frozen=True)[2].numpy()
    sure = np.abs(expected).max(-1) < 0.01
    assert sure.sum() > 10 and np.abs(actual - expected)[sure].max() < 1e-3 * 0.01 + 1e-2 * np.abs(expected[sure]).max()


IN_TORCH = """
import torch
import torch.nn.functional as F
given = np.load(sys.argv[2])

def bf16(name):
    return torch.from_numpy(given[name]).to(torch.bfloat16).requires_grad_()

def run(function, names, upstream):
    inputs = [bf16(name) for name in names]
    out = function(*inputs)
    out.backward(bf16(upstream).detach().reshape(out.shape))
    return [t.detach().float().numpy() for t in (out, *(i.grad for i in inputs))]

arrays = {}
for name in sorted({key.split(":")[0] for key in given}):
    at = lambda key: f"{name}:{key}"
    if name.startswith("linear "):
        tensors = run(lambda x, w: x @ w, [at("x"), at("w")], at("up"))
    elif name.startswith("attention"):
        def attend(q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        tensors = run(attend, [at("q"), at("k"), at("v")], at("up"))
    else:
        labels = torch.from_numpy(given[at("labels")])
        tensors = run(lambda h, w: F.cross_entropy(h @ w, labels, reduction="none"), [at("x"), at("w")], at("up"))
    arrays |= {f"{name}:{i}": array for i, array in enumerate(tensors)}
"""


@with_bf16
@pytest.mark.torch
def test_errors_in_bf16_are_at_most_those_of_torch(in_bf16, hf_python, tmp_path):
    """Against float64: at most 1.5 times the error of torch's bfloat16 op on the same numbers, in the mean and at
    worst."""
    given, exact, actual = {}, {}, {}

    def case(name, arrays, upstream, function, expected, labels=None):
        float32 = [a.astype(np.float32) for a in (*arrays, upstream)]
        given.update(
            {f"{name}:{key}": a for key, a in zip(("x", "w") if len(arrays) == 2 else ("q", "k", "v"), float32)}
        )
        given[f"{name}:up"] = float32[-1]
        if labels is not None:
            given[f"{name}:labels"] = labels
        *arrays, upstream = (a.astype(np.float64) for a in float32)
        inputs = [tensor(a) for a in arrays]
        out = function(*inputs)
        (out * tensor(upstream, frozen=True)).sum().backward()
        actual[name] = [out.numpy(), *(i.grad.numpy() for i in inputs)]
        exact[name] = expected(*arrays, upstream)

    for M, K, N in [(1, 1, 1), (5, 123, 7), (33, 130, 70), (97, 1030, 65), (130, 64, 513), (256, 768, 320)]:
        case(
            f"linear {M} x {K} x {N}",
            (normal((M, K)), normal((K, N), 1)),
            normal((M, N), 2),
            kernels.linear,
            lambda x, w, up: [x @ w, up @ w.T, x.T @ up],
        )
    for T, H, K, Dh in [(1, 1, 1, 8), (33, 2, 1, 16), (90, 4, 2, 80), (130, 2, 2, 128)]:
        seen = np.broadcast_to(np.tril(np.ones((T, T), bool)), (1, H, T, T))

        def naive(q, k, v, up, seen=seen, Dh=Dh):
            out, gradients = naive_attention(q, k, v, up, seen, Dh**-0.5)
            return [out, *gradients]

        arrays = normal((1, T, H, Dh)), normal((1, T, K, Dh), 1), normal((1, T, K, Dh), 2)
        case(f"attention {T} x {H} x {Dh}", arrays, normal((1, T, H, Dh), 3), kernels.attention, naive)
    for N, D, V in [(5, 123, 17), (70, 48, 90), (130, 256, 1001)]:
        labels = np.random.default_rng(N).integers(0, V, N)
        case(
            f"loss {N} x {D} x {V}",
            (normal((N, D)), normal((D, V), 1) * D**-0.5),
            normal((N,), 2),
            lambda h, w, labels=labels: kernels.linear_cross_entropy(h, w, paddle.to_tensor(labels)),
            lambda h, w, up, labels=labels: naive_cross_entropy(h, w, labels, up)[:3],
            labels,
        )
    np.savez(tmp_path / "given.npz", **given)
    torchs = hf_python(IN_TORCH, tmp_path / "given.npz")
    for name, arrays in actual.items():
        for i, ours in enumerate(arrays):
            errors = [
                [np.sqrt((e**2).mean()), np.abs(e).max()]
                for e in (a - exact[name][i] for a in (ours, torchs[f"{name}:{i}"]))
            ]
            print(
                f"{name:24} {('out', 'gradient 1', 'gradient 2', 'gradient 3')[i]:11} error {errors[0][0]:.2e}, "
                f"torch's {errors[1][0]:.2e}, "
                f"ratio {errors[0][0] / max(errors[1][0], 1e-9):.2f}; at worst {errors[0][1]:.2e}, {errors[1][1]:.2e}"
            )
            assert all(a <= 1.5 * b + 1e-6 for a, b in zip(*errors)), f"{name}, {i}: {errors}"


@built
@pytest.mark.parametrize("instructions", [0, 1, 2])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_with_every_instruction_set(instructions, softcap, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTIONS", instructions)
    rows = np.random.default_rng(0).integers(1, 90, (2, 1, 90, 1))
    check_attention("cpu", 2, 90, 90, 4, 2, 20, rows, scale=0.2, softcap=softcap)
    check_attention("cpu", 2, 90, 90, 4, 2, 20, rows, scale=0.2, slopes=0.5 ** np.arange(4), softcap=softcap)


@built
@pytest.mark.parametrize("instructions", [0, 1, 2])
def test_fused_ops_with_every_instruction_set(instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTIONS", instructions)
    test_rms_norm("cpu", (5, 123), 1.0)
    test_rms_norm_with_a_residual("cpu", (5, 123))
    test_layer_norm("cpu", (5, 123), 0.0, True)
    for interleaved in (False, True):
        test_rope("cpu", (3, 70, 5, 40), 38, interleaved)
    test_swiglu("cpu", (5, 123))
    test_geglu("cpu", (5, 123), True, 5.0)
    test_geglu("cpu", (5, 123), False, 5.0)
    test_gelu("cpu", (5, 123), True, 5.0)
    test_gelu("cpu", (5, 123), False, 5.0)
    test_linear_cross_entropy("cpu", 70, 8, 123, True, 0.4, None)
    test_linear_cross_entropy_with_a_frozen_weight("cpu", False, 30.0, None)
    for frozen in (False, True):
        test_linear_cross_entropy_with_a_softcap("cpu", 40, 6, 300, True, frozen, 0.5, None)
    test_linear_cross_entropy_with_a_weight_stored_in_bfloat16("cpu", True, None)
    test_linear_cross_entropy_of_nan_and_infinite_logits("cpu", None)
    test_linear_cross_entropy_of_nan_and_infinite_logits("cpu", 30.0)
    for kinds in itertools.product(["float32", "bfloat16"], repeat=2):
        test_adamw_of_bfloat16("cpu", *kinds)
    test_squared_norm("cpu", (5, 123), "bfloat16")
    test_squared_norm("cpu", (5, 123), "float32")


BITS = """
import hashlib, json, os, sys
if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np, kernels, paddle
kernels.configure("cpu", use_bf16=True)
x = [paddle.to_tensor(np.random.default_rng(i).standard_normal(s).astype("float32"), stop_gradient=False)
     for i, s in enumerate([(1, 300, 2, 40), (1, 300, 1, 40), (1, 300, 1, 40), (300, 520), (520, 96), (20000, 64),
         (520,), (520,)])]
y = kernels.attention(*x[:3]) + kernels.attention(*x[:3], softcap=2.0, alibi_slopes=paddle.ones([2]))
y = y + kernels.rope(y, *(t[:, :, :1, :24].detach() for t in x[1:3]), interleaved=True)
z = kernels.linear(*x[3:5])
table, labels = x[5], paddle.arange(0, 600, 2)
e = kernels.embedding(labels % 7, table)
n, h = kernels.rms_norm(x[3], x[6], 1e-5, x[3] * 2)
n = kernels.layer_norm(n, x[6], x[7], 1e-5) + kernels.geglu(n, h)
l = [kernels.linear_cross_entropy(e, w, labels, True, softcap=cap) for w in (table,
    table.detach()) for cap in (None, 3.0)]
(y.sum() + (z * z).sum() + n.sum() + sum(losses.sum() for losses in l)).backward()
norm = kernels.squared_norm(table.grad)
kernels.adamw(table, table.grad, paddle.zeros_like(table), paddle.zeros_like(table), 1, 0.1, 0.9, 0.99, 1e-8, 0.1)
draw = lambda low, high, shape, dtype: paddle.to_tensor(np.random.default_rng(9).integers(low, high,
    shape).astype(dtype))
rows, scales = x[3].detach()[:20], paddle.ones([1, 300])
q = [kernels.quant_linear(rows, draw(-128, 128, (520, 300), "int8"), scales[0], scheme="a8w8"),
     kernels.quant_linear(rows, draw(-2**31, 2**31, (65, 300), "int32"), scales, scheme="w4")]
print(json.dumps(hashlib.sha256(b"".join(t.numpy().tobytes() for t in [y, z, n, *l, *q, norm,
    table] + [t.grad for t in x])).hexdigest()))
"""


@built
def test_the_same_bits_with_one_thread_and_with_all(run_python):
    assert run_python(BITS, "1") == run_python(BITS, "all")


START = """
import json, sys
from pathlib import Path
import kernels, paddle
from kernels import cpu
if sys.argv[1] != "all":
    cpu.SOURCES = Path(sys.argv[1])
    cpu._load()
    result = paddle._C_ops._run_custom_op("the_only_op", paddle.zeros([1]))[0].item()
else:
    result = [backend for backend, _ in kernels.configure("cpu").values()].count("cpu")
print(json.dumps(result))
"""
ONE_OP = """
#include "paddle/phi/api/ext/op_meta_info.h"
std::vector<paddle::Tensor> Run(const paddle::Tensor& x) { return {x}; }
PD_BUILD_OP(the_only_op).Inputs({"x"}).Outputs({"y"}).SetKernelFn(PD_KERNEL(Run));
"""


def start(cache, sources):
    """A process in its own group that builds what is not in the cache, and loads it."""
    return subprocess.Popen(
        [sys.executable, "-c", START, str(sources)],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(params=["one op", pytest.param("all", marks=pytest.mark.slow)])
def sources(request, tmp_path):
    if request.param == "all":
        return "all"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "op.cc").write_text(ONE_OP)
    return tmp_path / "one"


@built
@pytest.mark.sweep(keep=1)
def test_processes_that_start_at_once_build_once(sources, tmp_path):
    processes = [start(tmp_path / "cache", sources) for _ in range(3)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("building the C++ ops" in out for out, _ in outputs) == 1
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1, "all have the same ops"
    (folder,) = [path for path in (tmp_path / "cache" / "paddle-llm-kernels").iterdir() if path.is_dir()]
    library = folder / "kernels_cpu" / "kernels_cpu.so"
    built_at = library.stat().st_mtime_ns
    assert (
        "building" not in start(tmp_path / "cache", sources).communicate(timeout=300)[0]
        and library.stat().st_mtime_ns == built_at
    )


@built
@pytest.mark.sweep(keep=0)
def test_a_killed_build_is_repeated(sources, tmp_path):
    cache = tmp_path / "cache" / "paddle-llm-kernels"
    process = start(tmp_path / "cache", sources)
    while not list(cache.glob("*.building/kernels_cpu/build/**/*")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.communicate()
    (half_done,) = [path for path in cache.iterdir() if path.is_dir()]
    out, error = start(tmp_path / "cache", sources).communicate(timeout=300)
    assert "building the C++ ops" in out and json.loads(out.splitlines()[-1]) == (
        0.0 if sources != "all" else kernels.describe().count(" cpu (")
    ), error
    assert not half_done.exists() and len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_without_a_compiler_the_reference_runs_and_an_explicit_choice_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu, "_state", None)
    try:
        assert kernels.configure("cpu", use_bf16=True)["attention"] == (
            "reference",
            "no C++ compiler: there is no no-such-compiler",
        )
        assert not kernels.bf16 and "no-such-compiler" in kernels.bf16_missing()
        with pytest.raises(UserError, match="no-such-compiler.*attention=reference"):
            kernels.configure("cpu", "attention=cpu")
    finally:
        monkeypatch.undo()
        kernels.configure("cpu")


def test_every_op_is_tested_on_every_back_end():
    texts = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py")))
    assert [op for op in kernels.OPS if f'@backends("{op}")' not in texts and f"kernels.{op}(" not in texts] == []
    assert {(op, b) for op, actual in BACKENDS.items() for b in actual} >= set(
        itertools.product(kernels.OPS, ["reference"])
    )
