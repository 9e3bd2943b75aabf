"""Weights alone: AWQ, AutoRound, GPTQ with static groups, 2 and 3 bits; each against a plain form of its math."""

import itertools
import json

from kernels import rounding

import numpy as np
import paddle
import pytest
import tiny_models
from test_quantize import (
    PACKABLE,
    Texts,
    keys_of,
    layer_problem,
    logits,
    logits_of_texts,
    make_args,
    make_loader,
    mean_hessian,
    output_error,
    plain_gptq,
    run,
    tiny_model,
    world,  # noqa: F401, a fixture
)

import model
import quantize
from adapters import from_pretrained
from formats.dequantize import unpack
from formats.weights import save_pretrained
from quantization import auto_round, awq, gptq
from quantization.calibration import Calibration, linear_refs, real_rows, sequential_groups

pytestmark = pytest.mark.sweep(keep=1)

# ------------------------------------------------------------------------------------------------ AWQ


def plain_rounded(weight, bits, size, sym):
    """(in, out): each value on its own to the nearest point of its group's grid."""
    result = np.empty(weight.shape)
    for first in range(0, len(weight), size):
        rows = weight[first : first + size]
        scale, zero = rounding.qparams(rows, bits, sym)
        for i, o in itertools.product(range(len(rows)), range(weight.shape[1])):
            code = min(max(round(rows[i, o] / scale[o]) + zero[o], 0), 2**bits - 1)
            result[first + i, o] = scale[o] * (code - zero[o])
    return result


@pytest.mark.parametrize(
    "bits, size, sym, shape", [(4, 8, True, (27, 5)), (3, 16, False, (40, 3)), (2, 27, True, (27, 4))]
)
def test_awq_takes_the_factors_of_least_error(bits, size, sym, shape):
    x, weight = layer_problem(*shape, tokens=50, rank=9)
    x[:, 3] = 0  # a channel without inputs
    args = make_args(do_awq=True, quant_type=f"wint{bits}", group_size=-1, sym=sym)
    args.group_size = size
    mean, errors = np.abs(x).mean(0), []
    scale, least, plain = awq.search_scale([(x[:20], weight), (x[20:], weight)], mean, args)
    seen = mean > 0
    for ratio in range(20):
        factors = np.ones(shape[0])
        factors[seen] = np.maximum(mean[seen], 1e-4) ** (ratio / 20)
        factors[seen] /= np.sqrt(factors[seen].max() * factors[seen].min())
        rounded = plain_rounded((weight * factors[:, None].astype(np.float32)).astype(np.float32), bits, size, sym)
        errors.append(np.square(x @ (rounded / factors[:, None] - weight)).sum() / np.square(x @ weight).sum())
    assert least <= plain and scale[3] == 1
    np.testing.assert_allclose([least, plain], [min(errors), errors[0]], rtol=1e-3)


@pytest.mark.parametrize("bits, size, sym", [(4, 8, True), (3, 12, False)])
def test_clipping_takes_each_group_s_best_range(bits, size, sym):
    x, weight = layer_problem(27, 5, 60, rank=9)
    hessian, nearest = mean_hessian(x), rounding.round_to_nearest(weight, bits, size, sym).weight()
    found = awq.clip(weight, hessian, bits, size, sym).weight()
    for first in range(0, 27, size):
        rows, inputs = weight[first : first + size], x[:, first : first + size]
        for o in range(5):

            def error(values):
                return np.square(inputs @ (values - rows[:, o])).sum()

            tried = []
            for shrink in 1 - 0.02 * np.arange(26):
                scale, zero = rounding.qparams(rows[:, o : o + 1], bits, sym, np.float32(shrink))
                codes = rounding.quantize_to_codes(rows[:, o : o + 1], scale, zero, bits)
                tried.append(error((scale * (codes.astype(np.float32) - zero))[:, 0]))
            own = error(found[first : first + size, o])
            assert own <= error(nearest[first : first + size, o]) + 1e-9
            np.testing.assert_allclose(own, min(tried), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "mixtral", "chatglm2", "deepseek_v2", "bloom"])
def test_awq_leaves_the_function_of_a_block_as_it_is(name):
    """Norms (a router reads one, too), v to o with fewer heads of keys, fused and latent attention, gelu in between."""
    net, lines = tiny_models.build(name), set()
    before, args = logits_of_texts(net), make_args(do_awq=True, quant_type="wint3", search_tokens=64)
    with paddle.no_grad():
        calibration = Calibration(net, Texts(net), 2)
        for index, block in enumerate(net.layers):
            refs, parts = linear_refs(net, index), sequential_groups(block, net.config)
            weights = {name: ref.layer.weight.numpy() for name, ref in refs.items()}
            lines |= set(awq.scale_block(block, refs, parts, calibration, args))
            assert any(not np.array_equal(w, refs[name].layer.weight.numpy()) for name, w in weights.items())
            calibration.advance(block)
    np.testing.assert_allclose(logits_of_texts(net), before, rtol=0, atol=2e-5 * np.abs(before).max() + 1e-4)
    gelu = {"awq: not before down_proj: gelu_tanh lies between, which no factor passes"}
    assert lines == (gelu if name == "bloom" else set())


# ------------------------------------------------------------------------------------------------ AutoRound


class Batches:
    """What learn() takes of a Calibration: a linear stands for the block."""

    def __init__(self, x, count=2):
        self.x = [paddle.to_tensor(part).unsqueeze(0) for part in np.array_split(x, count)]

    def run(self, block):
        for number, x in enumerate(self.x):
            yield number, None, lambda: block(x)


def rounded_linear(weight, bits, size, sym):
    """(a RoundedLinear that starts from the nearest codes, these codes)."""
    layer = model.Linear(*weight.shape, bias=False)
    model.set_parameter(layer.weight, weight)
    start = rounding.round_to_nearest(weight, bits, size, sym)
    return auto_round.RoundedLinear(layer, start, bits), start


@pytest.mark.parametrize("bits, size, sym", [(3, 8, True), (2, 5, False)])
def test_gradients_pass_the_rounding_as_if_it_were_not_there(bits, size, sym):
    """Against Paddle's gradients, with the distance that round() moved a value held constant."""
    r, top = np.random.RandomState(0), 2**bits - 1
    weight, upstream = r.randn(19, 4).astype(np.float32), r.randn(19, 4).astype(np.float32)
    linear, _ = rounded_linear(weight, bits, size, sym)
    linear.V[:] = r.rand(19, 4) - 0.5
    linear.factors[:] = (
        r.rand(*linear.factors.shape[1:]) * 0.3 + 0.7 if sym else r.rand(*linear.factors.shape) * 0.3 + 0.7
    )
    linear.use(linear.rounded_weight())
    (linear.rounded * paddle.to_tensor(upstream)).sum().backward()
    for group, rows, of_v, of_factors in linear.gradients():
        v, factors = (paddle.to_tensor(a, stop_gradient=False) for a in (linear.V[rows], linear.factors[:, group]))
        ends = paddle.to_tensor(linear.first_ends[:, group]) * factors
        scale = (ends[1] - ends[0]) / top
        zero, ratio = -ends[0] / scale, paddle.to_tensor(weight[rows]) / scale + v
        zero, ratio = (value + (paddle.round(value) - value).detach() for value in (zero, ratio))
        rounded = scale * ((ratio + zero).clip(0, top) - zero)
        np.testing.assert_allclose(linear.rounded[rows].numpy(), rounded.numpy(), rtol=1e-4, atol=1e-5)
        (rounded * paddle.to_tensor(upstream[rows])).sum().backward()
        expected = factors.grad.sum(0, keepdim=True).tile([2, 1]) if sym else factors.grad
        np.testing.assert_allclose(of_v, v.grad.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_factors, expected.numpy(), rtol=1e-3, atol=1e-4)


def error_of(x, weight, rounded, batches=2):
    """What block_error() says of a linear and batches of one size."""
    errors = []
    for part in np.array_split(x, batches):
        exact = part @ weight
        size = np.linalg.norm(exact, axis=1)
        errors.append((np.square(part @ rounded - exact).sum(1) / size).mean() / size.mean())
    return np.mean(errors)


@pytest.mark.parametrize(
    "bits, size, sym, shape", [(4, 16, True, (40, 6)), (3, 40, False, (40, 8)), (2, 24, False, (56, 3))]
)
def test_rounding_starts_at_the_given_codes_and_ends_at_no_worse_ones(bits, size, sym, shape):
    x, weight = layer_problem(*shape, tokens=120, rank=6)
    linear, start = rounded_linear(weight, bits, size, sym)
    first = linear.quantized()
    for name in ("codes", "zeros", "groups"):
        np.testing.assert_array_equal(getattr(first, name), getattr(start, name))
    np.testing.assert_allclose(first.scales, start.scales, rtol=1e-3)
    args, batches = make_args(do_autoround=True, autoround_iters=40), Batches(x)
    targets = [part[0] @ paddle.to_tensor(weight) for part in batches.x]
    before, after = auto_round.learn(linear, [linear], batches, targets, args)
    found = linear.quantized()
    by_codes = [error_of(x, weight, q.weight()) for q in (start, found)]
    np.testing.assert_allclose([before, after], by_codes, rtol=0.02)  # scales are stored in float16
    assert after < 0.95 * before
    assert np.abs(linear.V).max() <= 0.5 and found.codes.max() < 2**bits and found.zeros.min() >= 1
    linear, _ = rounded_linear(weight, bits, size, sym)
    args.autoround_iters, args.autoround_lr = 1, 1.0  # a step as long as that can only do harm, and is undone
    before, after = auto_round.learn(linear, [linear], batches, targets, args)
    assert after == before and not linear.V.any() and (linear.factors == 1).all()


def test_the_learned_rounding_lies_between_the_nearest_and_the_best_of_all():
    """Ten weights of one output, beside all 2^10 ways of rounding them up or down."""
    x, weight = layer_problem(10, 1, 200, seed=3, rank=6)
    x = x[np.abs(x @ weight)[:, 0] > 0.2]  # outputs that no error is large beside
    linear, start = rounded_linear(weight, 3, 10, True)
    scale = start.scales[0, 0]
    lower = np.floor(weight[:, 0] / scale)

    def error(codes):
        return error_of(x, weight, np.clip(codes, -4, 3)[:, None] * scale, batches=1)

    best = min(error(lower + ups) for ups in itertools.product((0, 1), repeat=10))
    nearest = error(np.round(weight[:, 0] / scale))
    batches, args = Batches(x, 1), make_args(do_autoround=True, autoround_iters=100)
    _, after = auto_round.learn(linear, [linear], batches, [batches.x[0][0] @ paddle.to_tensor(weight)], args)
    assert best <= after < nearest, (best, after, nearest)


def test_autoround_lowers_the_error_of_a_block_below_gptq_s():
    net, args = tiny_model(), make_args(do_autoround=True, quant_type="wint3", group_size=16, autoround_iters=30)
    block = net.layers[0]
    with paddle.no_grad():
        calibration, refs = Calibration(net, make_loader(64, 2), 2), linear_refs(net, 0)
        targets, floats = calibration.float_outputs(block), {n: ref.layer for n, ref in refs.items()}
        found = auto_round.learn_block(block, refs, sequential_groups(block, net.config), calibration, targets, args)
        assert all(refs[n].layer is layer for n, layer in floats.items()) and len(found) == len(refs)
        errors = []
        for codes in (lambda ref, stats: found[ref.path], None):
            for groups in sequential_groups(block, net.config):
                for group in groups:
                    (stats,) = calibration.observe(block, [refs[group.names[0]]], keep_hessian=True)
                    plan = gptq.gptq_plan(stats.hessian, 16)
                    for ref in (refs[n] for n in group.names):
                        weight = floats[next(n for n in refs if refs[n] is ref)].weight.numpy()
                        q = codes(ref, stats) if codes else gptq.gptq(weight, plan, 3)
                        new = model.Linear(*weight.shape, bias=False)
                        model.set_parameter(new.weight, q.weight())
                        setattr(ref.parent, ref.attribute, new)
            errors.append(auto_round.block_error(block, calibration, targets))
            for name, layer in floats.items():
                setattr(refs[name].parent, refs[name].attribute, layer)
    assert errors[0] < 0.95 * errors[1], errors


def test_targets_of_a_block_are_the_float_model_s(monkeypatch):
    """Of each block, although the blocks before it are quantized."""
    net, args = tiny_model(), make_args(do_autoround=True, quant_type="wint2", group_size=16, autoround_iters=2)
    calibration, seen = Calibration(net, make_loader(64, 2), 2), []
    with paddle.no_grad():
        floats = Calibration(net, make_loader(64, 2), 2)
        for block in net.layers:
            floats.advance(block)
            seen.append([real_rows(x, real).numpy() for x, _, real in floats.items])
        learn = auto_round.learn

        def learn_and_compare(block, linears, calibration, targets, args):
            for target, right in zip(targets, seen.pop(0), strict=True):
                np.testing.assert_array_equal(target.numpy(), right)
            return learn(block, linears, calibration, targets, args)

        monkeypatch.setattr(auto_round, "learn", learn_and_compare)
        quantize.quantize_model(net, calibration, args, print_line=lambda line: None)
        assert not seen and np.abs(calibration.items[0][0].numpy() - floats.items[0][0].numpy()).max() > 1e-3


# ------------------------------------------------------------------------------------------------ GPTQ, static groups


@pytest.mark.parametrize(
    "bits, size, sym, desc_act", [(4, 16, True, True), (3, 24, False, True), (2, 16, False, False)]
)
def test_static_groups_equal_the_plain_algorithm(bits, size, sym, desc_act):
    x, weight = layer_problem(56, 7, 300, rank=20)
    weight, hessian = weight.astype(np.float64), mean_hessian(x)
    plan = gptq.gptq_plan(hessian, size, desc_act, static_groups=True)
    found = gptq.gptq(weight, plan, bits, sym, search_range=False)
    expected = plain_gptq(weight, hessian, bits, size, sym, desc_act, 0.01, static=True)
    np.testing.assert_allclose(found.weight(), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.groups, np.arange(56) // size)
    nearest = rounding.round_to_nearest(weight.astype(np.float32), bits, size, sym)
    errors = [output_error(weight, q.weight(), hessian) for q in (gptq.gptq(weight, plan, bits, sym), nearest)]
    assert errors[0] < 0.7 * errors[1]


# ------------------------------------------------------------------------------------------------ the script


def test_few_tokens_of_an_expert_are_made_up_for_and_said(monkeypatch):
    net, args, lines = tiny_models.build("mixtral", hidden_size=32), make_args(do_gptq=True, quant_type="wint8"), []
    monkeypatch.setattr("quantization.calibration.FEW", 1.0)
    with paddle.no_grad():
        rows = quantize.quantize_model(net, Calibration(net, Texts(net), 2), args, lines.append)
    noted = [row for row in rows if "note" in row]
    assert noted and all(".experts." in row["linear"] for row in noted)
    for row in noted:
        assert int(row["note"].split()[0]) < row["shape"][0] and "calibrated on all" in row["note"]
    assert sum("calibrated on all" in line for line in lines) == len(noted)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2", "bloom_7heads", "opt_350m"])
def test_learned_rounding_of_other_families(name):
    """Experts, routers that read a norm, fused and latent attention, biases, norms behind the sum."""
    net = tiny_models.build(name, **PACKABLE.get(name, {}))
    wanted, args = logits_of_texts(net), make_args(do_autoround=True, do_awq=True, autoround_iters=4)
    with paddle.no_grad():
        rows = quantize.quantize_model(net, Calibration(net, Texts(net), 2), args, print_line=lambda line: None)
    assert sorted(row["linear"] for row in rows) == sorted(model.block_linears(net))
    found = logits_of_texts(net)
    assert np.median(np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)) < 0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_of_every_width_is_read_back(bits):
    for shape in ((32, 32), (96, 160)):
        codes = np.random.RandomState(bits).randint(0, 2**bits, shape).astype(np.uint8)
        packed = rounding.pack_rows(codes, bits)
        assert packed.dtype == np.int32 and packed.shape == (shape[0] * bits // 32, shape[1])
        np.testing.assert_array_equal(unpack(packed, bits), codes)
        value = sum(
            int(code) << (bits * i) for i, code in enumerate(codes[:32, 1])
        )  # the first code in the lowest bits
        assert value == sum(int(word) << (32 * i) for i, word in enumerate(packed[:bits, 1].view(np.uint32)))


METHODS = {
    "do_ptq": {"do_ptq": True, "sym": False},
    "do_gptq": {"do_gptq": True, "desc_act": True, "static_groups": True},
    "do_awq": {"do_awq": True, "auto_clip": True, "sym": False},
    "do_autoround": {"do_autoround": True, "do_awq": True, "autoround_iters": 4, "desc_act": True},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3])
def test_two_and_three_bits_are_written_and_opened_as_floats(method, bits, tmp_path):
    net = tiny_model(num_key_value_heads=4, intermediate_size=96)
    args = make_args(quant_type=f"wint{bits}", group_size=32, **METHODS[method])
    with paddle.no_grad():
        quantize.quantize_model(net, Calibration(net, make_loader(64, 2), 2), args, print_line=lambda line: None)
    assert {layer.scheme for *_, layer in model.block_linears(net).values()} == {f"w{bits}"}
    save_pretrained(net, tmp_path / "out")
    again = from_pretrained(tmp_path / "out").eval()
    assert again.config.quantization is None
    np.testing.assert_allclose(logits(again), logits(net), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["do_awq", "do_autoround"])
def test_the_script_writes_four_bits_that_run_as_integers(method, world, tmp_path):  # noqa: F811
    run(keys_of(world, tmp_path / "out", **METHODS[method], group_size=16, awq_step=2, autoclip_step=2))
    again = from_pretrained(tmp_path / "out").eval()
    assert {layer.scheme for *_, layer in model.block_linears(again).values()} == {"w4"}
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert report["algorithm"] == {"do_awq": "awq_clip", "do_autoround": "awq_autoround"}[method]
    assert all(0 < row["error"] < 0.5 for row in report["linears"])
