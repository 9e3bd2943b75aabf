"""quantize.py: codes and packing, GPTQ, shift and smoothing, the script, and the table of methods on planted outliers.

python -m pytest tests/test_quantize.py            # CPU, under 40 seconds
python -m pytest tests/test_quantize.py -k figures_of_every_method --slow -s       # prints the whole table (minutes)
"""

import json
from pathlib import Path

import kernels
from kernels import rounding

import numpy as np
import paddle
import pytest
import tiny_models
from conftest import ROOT, SHARED

import data
import model
import quantize
import trainer
from adapters import apply_lora, apply_prefix, from_pretrained, lora_layers, save_adapter
from arguments import parse_args
from families import ModelConfig
from formats.files import UserError
from formats.quantized_export import quantized_weights
from formats.tokenizer import load_tokenizer
from formats.weights import init_weights, save_pretrained
from quantization import gptq, methods, smoothing
from quantization.calibration import ActivationStats, Calibration, linear_refs, real_positions, sequential_groups
from serving.engine import Engine, Request
from serving.runners import ScheduledTokens, TokenSequence, make_runner
from serving.sampling import SamplingParams

pytestmark = pytest.mark.sweep(keep=4)

DEMO = ROOT / "demo"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 3072,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


# ---------------------------------------------------------------------------------------------- a tiny world


def unpack_rows(packed, bits):
    """The inverse of rounding.pack_rows."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    codes = (packed.view(np.uint32)[:, None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(-1, packed.shape[1]).astype(np.uint8)


def tiny_model(**changes):
    tiny = model.build(ModelConfig.from_dict({**CONFIG, **changes}))
    init_weights(tiny, seed=1)
    tiny.eval()
    return tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with base/ (model), lora/ and prefix/ (adapters of it), sft/ (24 train, 6 dev records). Read only."""
    world = tmp_path_factory.mktemp("world")
    tokenizer = load_tokenizer(DEMO / "llama")
    save_pretrained(tiny_model(), world / "base")
    tokenizer.save(world / "base")
    adapted = apply_lora(tiny_model(), rank=2)
    for layer in lora_layers(adapted).values():
        model.set_parameter(layer.lora_B, np.random.RandomState(3).randn(*layer.lora_B.shape).astype(np.float32) * 0.1)
    save_adapter(adapted, world / "lora", world / "base")
    save_adapter(apply_prefix(tiny_model(), 4), world / "prefix", world / "base")
    for name in ("lora", "prefix"):
        tokenizer.save(world / name)
    lines = (DEMO / "sft" / "train.json").read_text().splitlines()[:30]
    (world / "sft").mkdir()
    (world / "sft" / "train.json").write_text("\n".join(lines[:24]) + "\n")
    (world / "sft" / "dev.json").write_text("\n".join(lines[24:]) + "\n")
    return world


def keys_of(world, output_dir, **changes):
    keys = {
        "model_name_or_path": str(world / "base"),
        "dataset_name_or_path": str(world / "sft"),
        "output_dir": str(output_dir),
        "src_length": 96,
        "max_length": 224,
        "per_device_train_batch_size": 2,
        "gptq_step": 2,
        "ptq_step": 2,
        "shift_step": 2,
        "smooth_step": 2,
        "search_tokens": 64,
        "search_alpha_step": 0.3,
        "disable_tqdm": True,
    }
    return keys | changes


def run(keys):
    """The script's run with these keys from a JSON file beside output_dir; SystemExit(2) for what a user can mend."""
    path = Path(str(keys.get("output_dir") or "run") + ".json")
    path.write_text(json.dumps(keys))
    trainer.run_script(quantize.main, quantize.Args, [str(path)])


def fails(keys, capfd):
    """The one line that this run ends with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(keys)
    assert stop.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def make_args(**values):
    args = quantize.Args(**{"model_name_or_path": "m", "output_dir": "o", "dataset_name_or_path": "d", **values})
    args.check()
    return args


def layer_problem(n_in=256, n_out=192, tokens=2048, seed=0, rank=40):
    """Correlated inputs of unequal sizes X (tokens, in) and a weight W (in, out)."""
    r = np.random.RandomState(seed)
    mix = r.randn(rank, n_in) * np.exp(r.randn(n_in) * 0.7)
    x = (r.randn(tokens, rank) @ mix + 0.3 * r.randn(tokens, n_in) * np.exp(r.randn(n_in) * 0.5)).astype(np.float32)
    return x, (r.randn(n_in, n_out) * 0.05).astype(np.float32)


def mean_hessian(x):
    return x.T.astype(np.float64) @ x / len(x)


def output_error(weight, rounded, hessian):
    """||X (W - Q)|| / ||X W|| from X^T X, up to any factor of it."""
    sizes = [np.sum((hessian @ w) * w) for w in (weight - rounded, weight.astype(np.float64))]
    return np.sqrt(sizes[0] / sizes[1])


def solve(weight, hessian, bits, group_size=-1, sym=True, desc_act=False, percdamp=0.01, search_range=True):
    """(QuantizedWeight, damping) by the two steps in one."""
    plan = gptq.gptq_plan(hessian, group_size, desc_act, percdamp)
    return gptq.gptq(weight, plan, bits, sym, search_range), plan.damping


def logits(net, seed=0, T=20):
    """(2, T, V) numpy for random ids."""
    ids = np.random.RandomState(seed).randint(3, net.config.vocab_size, (2, T))
    with paddle.no_grad():
        return net(paddle.to_tensor(ids)).numpy()


# ---------------------------------------------------------------------------------------------- codes and packing


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(8, 1), (24, 7), (40, 33), (192, 512)])
def test_packing_is_undone_exactly(bits, shape):
    codes = np.random.RandomState(0).randint(0, 2**bits, shape).astype(np.uint8)
    packed = rounding.pack_rows(codes, bits)
    assert packed.dtype == np.int32 and packed.shape == (shape[0] * bits // 32, shape[1])
    np.testing.assert_array_equal(unpack_rows(packed, bits), codes)
    first_word = sum(int(codes[i, 0]) << (bits * i) for i in range(32 // bits))  # the first row in the lowest bits
    assert int(packed.view(np.uint32)[0, 0]) == first_word


@pytest.mark.parametrize(
    "bits, group_size, sym", [(4, 32, True), (4, -1, False), (4, 64, False), (8, 32, False), (8, -1, True)]
)
def test_the_kernel_reads_the_same_weight_from_the_packed_codes(bits, group_size, sym):
    weight = np.random.RandomState(1).randn(80, 24).astype(np.float32) + 0.5
    found = rounding.round_to_nearest(weight, bits, group_size, sym)
    read = kernels.dequantize(
        paddle.to_tensor(rounding.pack_rows(found.codes, bits)),
        paddle.to_tensor(found.scales),
        bits,
        paddle.to_tensor(rounding.pack_zeros(found.zeros, bits)),
        paddle.to_tensor(found.groups),
    ).numpy()
    np.testing.assert_array_equal(read, found.weight())
    np.testing.assert_array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))
    half_step = found.scales[found.groups] * (0.5 + 2**bits * 2**-11)  # rounding, and the scale's own to float16
    clipped = 0.5 * found.scales[found.groups] * sym  # the symmetric grid ends half a step early
    assert np.all(np.abs(read - weight) <= half_step + clipped + 1e-6)


@pytest.mark.parametrize("sym", [True, False])
def test_grids_of_one_sided_and_empty_groups(sym):
    for rows in (np.full((8, 2), 3.0), np.full((8, 2), -3.0), np.zeros((8, 2)), np.linspace(1, 2, 16).reshape(8, 2)):
        scale, zero = rounding.qparams(rows.astype(np.float32), 4, sym)
        assert np.all((zero >= 1) & (zero <= 15)) and np.all(scale > 0)  # zero less one is unsigned in the file
        codes = rounding.quantize_to_codes(rows, scale, zero, 4)
        assert np.all(np.abs(scale * (codes.astype(int) - zero) - rows) <= 0.51 * scale * (2 if sym else 1))


def test_a_weight_too_large_for_float16_scales_is_named(world, tmp_path, capfd):
    huge = tiny_model()
    _, _, layer = model.block_linears(huge)["model.layers.1.mlp.up_proj"]
    model.set_parameter(layer.weight, layer.weight.numpy() * 1e9)
    save_pretrained(huge, tmp_path / "huge")
    load_tokenizer(DEMO / "llama").save(tmp_path / "huge")
    keys = keys_of(world, tmp_path / "out", do_ptq=True, quant_type="wint8", dataset_name_or_path="")
    line = fails(keys | {"model_name_or_path": str(tmp_path / "huge")}, capfd)
    assert "model.layers.1.mlp.up_proj" in line and "float16" in line
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- GPTQ


def plain_gptq(weight, hessian, bits, group_size, sym, desc_act, percdamp, static=False, search=False):
    """Optimal brain quantization, row after row, the inverse Hessian of the rows left taken anew each time; float64.

    static: groups by position, their scales from the weight as it was. search: the better of this and of searched
    ranges, output by output."""
    n_in = len(weight)
    hessian = hessian + percdamp * np.mean(np.diag(hessian)) * np.eye(n_in)
    size, found = n_in if group_size == -1 else group_size, []
    order, groups = np.argsort(-np.diag(hessian), kind="stable"), np.arange(n_in) // size  # groups: in this order
    if not desc_act:  # a group after another, the one with the largest row first
        members = [np.flatnonzero(np.arange(n_in) // size == group) for group in range(groups[-1] + 1)]
        members = [own[np.argsort(-np.diag(hessian)[own], kind="stable")] for own in members]
        members.sort(key=lambda own: -np.diag(hessian)[own[0]])
        order = np.concatenate(members)
        groups = order // size
    inverses = [np.linalg.inv(hessian[np.ix_(order[k:], order[k:])]) for k in range(n_in)]
    importance = np.empty(n_in)
    importance[order] = [1 / inverse[0, 0] for inverse in inverses]

    def grid(rows, own, searches):
        tried = [rounding.qparams(rows, bits, sym, np.float32(1 - 0.02 * i)) for i in range(20 if searches else 1)]
        rounded = [s * (rounding.quantize_to_codes(rows, s, z, bits).astype(np.float64) - z) for s, z in tried]
        best = np.argmin([importance[own] @ np.square(rows - r) for r in rounded], 0)
        return [np.stack(values)[best, np.arange(rows.shape[1])] for values in zip(*tried)]

    for searches in (False, True) if search else (False,):
        left, result = weight.copy(), np.empty_like(weight)
        for place, (row, inverse) in enumerate(zip(order, inverses)):
            if static:
                own = np.arange(row // size * size, min(row // size * size + size, n_in))
                scale, zero = grid(weight[own], own, searches)
            elif place == 0 or groups[place] != groups[place - 1]:
                own = order[groups == groups[place]]
                scale, zero = grid(left[own], own, searches)
            result[row] = scale * (rounding.quantize_to_codes(left[row], scale, zero, bits).astype(np.float64) - zero)
            left[order[place:]] -= np.outer(inverse[0] / inverse[0, 0], left[row] - result[row])
        found.append((np.sum((weight - result) * (hessian @ (weight - result)), 0), result))
    return np.where(found[-1][0] < found[0][0], found[-1][1], found[0][1])


@pytest.mark.parametrize(
    "bits, group_size, sym, desc_act",
    [(4, -1, True, False), (4, 32, True, False), (4, 32, False, True), (8, 24, False, False), (4, -1, False, True)],
)
@pytest.mark.parametrize("block, columns, search", [(128, 2048, False), (20, 5, False), (32, 7, True)])
def test_gptq_equals_the_plain_algorithm(bits, group_size, sym, desc_act, block, columns, search, monkeypatch):
    """Also groups that do not divide the rows, blocks that do not divide the groups, and outputs in parts."""
    x, weight = layer_problem(61, 16, 300, rank=20)
    x[:, 58] *= 50  # the last group, which may be shorter, comes first
    weight, hessian = weight.astype(np.float64), mean_hessian(x)
    if group_size != -1 and not desc_act:
        assert gptq.gptq_plan(hessian, group_size).groups[0] == 60 // group_size > 0
    monkeypatch.setattr(gptq.gptq_solve, "__defaults__", (block,))
    monkeypatch.setattr(gptq, "COLUMNS", columns)
    found, damping = solve(weight, hessian, bits, group_size, sym, desc_act, 0.01, search_range=search)
    expected = plain_gptq(weight, hessian, bits, group_size, sym, desc_act, 0.01, search=search)
    np.testing.assert_allclose(found.weight(), expected, rtol=1e-5, atol=1e-7)
    assert damping == 0.01


def test_gptq_in_float32_is_as_good_as_in_float64():
    """Roundings next to a tie may differ, and with them the rows after it: not the loss."""
    x, weight = layer_problem(192, 48, 1000)
    hessian = mean_hessian(x)
    exact, _ = solve(weight.astype(np.float64), hessian, 4, 64)
    found, _ = solve(weight, hessian.astype(np.float32), 4, 64)
    assert (found.codes == exact.codes).mean() > 0.98
    errors = [output_error(weight, q.weight(), hessian) for q in (found, exact)]
    assert abs(errors[0] / errors[1] - 1) < 5e-3


@pytest.mark.parametrize("bits, group_size", [(4, -1), (4, 64), (4, 32), (8, -1), (8, 128)])
def test_gptq_beats_round_to_nearest_and_searching_ranges_beats_gptq(bits, group_size):
    for seed in range(2):
        x, weight = layer_problem(n_out=64, seed=seed)
        hessian, errors = mean_hessian(x), []
        for found in (
            rounding.round_to_nearest(weight, bits, group_size),
            solve(weight, hessian, bits, group_size, search_range=False)[0],
            solve(weight, hessian, bits, group_size)[0],
        ):
            errors.append(output_error(weight, found.weight(), hessian))
            by_inputs = np.linalg.norm(x @ (weight - found.weight())) / np.linalg.norm(x @ weight)
            assert abs(errors[-1] - by_inputs) < 1e-3 * by_inputs
        assert errors[1] < 0.5 * errors[0] and errors[2] <= 1.001 * errors[1]


# ||X (W - Q)|| / ||X W|| of GPTQModel 7.7.0 (torch 2.13.0, CPU) for layer_problem(), damp_percent 0.01, and
# act_group_aware=True where it takes it (groups without desc_act): GPTQ(torch.nn.Linear with W^T, QuantizeConfig(...)),
# quantizer.configure(perchannel=True), add_batch(X[None], X W), quantize().
GPTQMODEL = {  # (bits, group_size, sym, desc_act): error
    (4, -1, True, False): 0.03521998,
    (4, 64, True, False): 0.01662068,
    (4, 128, True, False): 0.01330238,
    (4, 64, True, True): 0.01025315,
    (4, 64, False, False): 0.01540028,
    (4, 64, False, True): 0.00926019,
    (4, 128, True, True): 0.01121637,
    (8, 64, True, True): 0.00060836,
    (8, -1, True, False): 0.00208731,
}


@pytest.mark.parametrize("case", GPTQMODEL)
def test_the_error_is_at_most_that_of_gptqmodel(case):
    x, weight = layer_problem()
    found, _ = solve(weight, mean_hessian(x), *case, percdamp=0.01)
    assert output_error(weight, found.weight(), mean_hessian(x)) <= GPTQMODEL[case]


def test_a_hessian_that_is_not_positive_definite_gets_more_damping(monkeypatch):
    x, weight = layer_problem(64, 16, 20)  # fewer tokens than inputs: singular
    found, damping = solve(weight, mean_hessian(x), 4, percdamp=0.0)
    assert damping > 0 and np.isfinite(found.weight()).all()
    broken = mean_hessian(x) - 0.5 * np.trace(mean_hessian(x)) / 64 * np.eye(64)
    found, damping = solve(weight, broken, 4, percdamp=0.01)
    assert damping in (1.0, 10.0) and np.isfinite(found.weight()).all()
    plan = gptq.gptq_plan(mean_hessian(x), desc_act=True)
    monkeypatch.setattr(gptq.cholesky_, "__defaults__", (16,))  # several blocks
    again = gptq.gptq_plan(mean_hessian(x), desc_act=True)
    np.testing.assert_allclose(again.feedback, plan.feedback, rtol=1e-9, atol=1e-9)
    damped = mean_hessian(x) + plan.damping * np.mean(np.diag(mean_hessian(x))) * np.eye(64)
    found, expected = (plan.feedback * plan.importance) @ plan.feedback.T, damped[np.ix_(plan.order, plan.order)]
    np.testing.assert_allclose(found * expected[-1, -1] / found[-1, -1], expected, rtol=1e-8)
    assert np.array_equal(plan.feedback, np.triu(plan.feedback)) and plan.importance.max() == 1


@pytest.mark.parametrize("n", [1, 63, 64, 200])
def test_cholesky_in_place_is_numpy_s(n):
    x = np.random.RandomState(n).randn(n + 3, n)
    found = x.T @ x
    expected = np.linalg.cholesky(found)
    gptq.cholesky_(found, block=64)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    found = np.eye(n)
    found[-1, -1] = -1
    with pytest.raises(np.linalg.LinAlgError):
        gptq.cholesky_(found, block=64)


@pytest.mark.parametrize("desc_act", [False, True])
def test_dead_inputs_are_rounded_to_nearest(desc_act):
    x, weight = layer_problem(64, 16, 300)
    dead = [0, 7, 31, 63]
    x[:, dead] = 0
    found, _ = solve(weight, mean_hessian(x), 8, -1, False, desc_act, search_range=False)
    step = found.scales[found.groups]
    assert np.all(np.abs(found.weight() - weight)[dead] <= 0.501 * step[dead])  # nothing was moved onto them
    everything_dead, _ = solve(weight, np.zeros((64, 64)), 4, 32)
    nearest = rounding.round_to_nearest(weight, 4, 32)
    assert np.abs(everything_dead.weight() - weight).mean() <= np.abs(nearest.weight() - weight).mean()


def test_act_order_keeps_the_group_of_each_row():
    x, weight = layer_problem(96, 16, 500)
    hessian = mean_hessian(x)
    found, _ = solve(weight, hessian, 4, 32, desc_act=True)
    order = np.argsort(-np.diag(hessian), kind="stable")
    np.testing.assert_array_equal(found.groups[order], np.arange(96) // 32)
    layer = model.QuantLinear(96, 16, "w4", 32, desc_act=True)
    for name, array in (
        ("qweight", rounding.pack_rows(found.codes, 4)),
        ("scales", found.scales),
        ("qzeros", rounding.pack_zeros(found.zeros, 4)),
        ("g_index", found.groups),
    ):
        model.set_parameter(getattr(layer, name), array)
    np.testing.assert_array_equal(layer.dequantized().numpy(), found.weight())
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), x @ found.weight(), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- shift and smoothing


def make_loader(T=96, batch_size=2, zero_padding=True, split="train", source=DEMO / "sft"):
    records = data.SFTDataset(source, load_tokenizer(DEMO / "llama"), min(128, T // 2), T, split)
    return data.SFTLoader(records, batch_size, T, zero_padding, zero_padding, 42, split == "train")


SEARCH = {"smooth_piecewise_search": True, "smooth_search_piece": True, "search_alpha_step": 0.2, "search_tokens": 96}


def groups(net, block):
    return [group for stage in sequential_groups(block, net.config) for group in stage]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"shift": True},
        {"smooth": True, "smooth_all_linears": True},
        {"shift": True, "smooth": True, "smooth_all_linears": True, **SEARCH},
    ],
)
def test_shift_and_smoothing_leave_the_function_as_it_is(keys, biased):
    net = tiny_model(attention_bias=biased, mlp_bias=biased)
    for layer in (layer for *_, layer in model.block_linears(net).values() if biased):
        model.set_parameter(layer.bias, np.random.RandomState(2).randn(layer.n_out).astype(np.float32))
    before, args = logits(net), make_args(do_ptq=True, **keys)
    with paddle.no_grad():
        calibration = Calibration(net, make_loader(), 2)
        for index, block in enumerate(net.layers):
            slots = linear_refs(net, index)
            firsts = [group.names[0] for group in groups(net, block)]
            observed = calibration.observe(block, [slots[name] for name in firsts], keep_rows=96)
            weights = [slots[name].layer.weight.numpy() for name in firsts]
            smoothing.prepare_block(block, slots, dict(zip(firsts, observed)), net.config, args)
            again = calibration.observe(block, [slots[name] for name in firsts], keep_rows=96)
            for old, new in zip(observed, again):  # the statistics were carried along rightly
                np.testing.assert_allclose(np.min(old.low, 0), np.min(new.low, 0), rtol=1e-3, atol=1e-4)
                np.testing.assert_allclose(np.concatenate(old.rows), np.concatenate(new.rows), rtol=1e-3, atol=1e-3)
            changed = [not np.array_equal(w, slots[name].layer.weight.numpy()) for w, name in zip(weights, firsts)]
            assert changed == [args.smooth, args.smooth_all_linears, args.smooth, args.smooth_all_linears]
            calibration.advance(block)
    np.testing.assert_allclose(logits(net), before, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ every family

_WIDE = {"head_dim": 16}
_LATENT = {"hidden_size": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "moe_intermediate_size": 16,
           "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
PACKABLE = {  # changes that make every linear's sizes multiples of 8, as eight 4-bit codes share a word
    "llama_mqa": _WIDE | {"hidden_size": 24}, "qwen2": _WIDE | {"hidden_size": 48},
        "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "mistral": {"hidden_size": 40}, "mixtral": {"hidden_size": 32}, "qwen3": _WIDE, "qwen3_moe": _WIDE, "glm": _WIDE,
        "gemma": _WIDE, "gemma2": _WIDE, "gpt2": {"n_embd": 48},
    "chatglm2_mha": {"kv_channels": 16}, "bloom_7heads": {"hidden_size": 56}, "opt": {"ffn_dim": 40},
        "opt_350m": {"ffn_dim": 40},
    "deepseek_v2": _LATENT | {"q_lora_rank": 24}, "deepseek_v2_lite": _LATENT,
        "deepseek_v3": _LATENT | {"q_lora_rank": 24},
}  # fmt: skip


class Texts:
    """What Calibration takes of a loader: two batches of random texts, rows padded and packed."""

    rows = [[[0, 1], [2]], [[3], [4, 5], [6]]]  # texts of each row of each batch

    def __init__(self, net, seed=0):
        generator, source = np.random.default_rng(seed), net.config.source
        self.texts = [generator.integers(3, 55, n) for n in (9, 14, 17, 24, 5, 12, 8)]
        if net.config.position == "rope_2d":
            for text in self.texts:
                text[2:4] = source["gmask_token_id"], source["bos_token_id"]
        self.dataset = type("Dataset", (), {"lengths": np.array([len(text) for text in self.texts])})

    def batch(self, epoch, index):
        return data.collate(self.rows[index], lambda i: (self.texts[i], self.texts[i]), 26, 0)


@paddle.no_grad()
def logits_of_texts(net):
    """(tokens, V) of the real tokens of the batches."""
    found, loader = [], Texts(net)
    for index in range(2):
        batch = loader.batch(0, index)
        arrays = (paddle.to_tensor(batch[key]) for key in ("input_ids", "position_ids", "startend_row_indices"))
        found.append(net(*arrays).numpy()[real_positions(batch, loader)])
    return np.concatenate(found)


RESIDUAL = "the residual reads the norm, too"
NO_BIAS = "a router reads the norm, and has no bias to take the constant"
LEFT_OUT = {  # name: the lines that say what is not done
    "opt_350m": {f"{way}: not before {name}: {RESIDUAL}" for way in ("shift", "smooth") for name in ("q_proj",
        "up_proj")},
    "chatglm": {f"{way}: not before {name}: {RESIDUAL}" for way in ("shift", "smooth") for name in ("qkv_proj",
        "up_proj")}
    | {"smooth: not before down_proj: gelu_tanh lies between, which no factor passes"},
    "bloom": {"smooth: not before down_proj: gelu_tanh lies between, which no factor passes"},
    "mixtral": {f"shift: not before gate_proj: {NO_BIAS}"},
    "opt": set(), "llama": set(), "gemma2": set(), "chatglm2": set(), "internlm2": set(), "glm4": set(),
}  # fmt: skip
LEFT_OUT |= {
    "bloom_7heads": LEFT_OUT["bloom"],
    "gpt2": LEFT_OUT["bloom"],
    "deepseek_v3": LEFT_OUT["mixtral"],
    "bloom_post": {line.replace("q_proj", "qkv_proj") for line in LEFT_OUT["opt_350m"]} | LEFT_OUT["bloom"],
}


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_shift_and_smoothing_leave_every_family_as_it_is(name):
    """All that is done before rounding, on every linear that can take it; what cannot is named."""
    net = tiny_models.build(name)
    keys = {"search_scale_max": 1.0, "smooth_k_piece": 2, **SEARCH} if name in ("deepseek_v2", "gemma2") else {}
    before, args, lines = (
        logits_of_texts(net),
        make_args(do_ptq=True, shift=True, smooth=True, smooth_all_linears=True, **keys),
        set(),
    )
    with paddle.no_grad():
        calibration = Calibration(net, Texts(net), 2)
        assert calibration.tokens == 89
        for index, block in enumerate(net.layers):
            slots, found = linear_refs(net, index), groups(net, block)
            assert sorted(n for group in found for n in group.names) == sorted(slots)  # every linear is in one group
            firsts = [group.names[0] for group in found]
            observed = calibration.observe(block, [slots[first] for first in firsts], keep_rows=96)
            weights = [slots[first].layer.weight.numpy() for first in firsts]
            lines |= set(smoothing.prepare_block(block, slots, dict(zip(firsts, observed)), net.config, args))
            again = calibration.observe(block, [slots[first] for first in firsts], keep_rows=96)
            for old, new in zip(observed, again):  # the statistics were carried along rightly
                np.testing.assert_allclose(np.min(old.low, 0), np.min(new.low, 0), rtol=1e-3, atol=1e-3)
            changed = [not np.array_equal(w, slots[first].layer.weight.numpy()) for w, first in zip(weights, firsts)]
            sources = {group.source for group in found if not group.fixed}
            assert changed == [not group.fixed or group.names[0] in sources for group in found]
            calibration.advance(block)
    assert lines == LEFT_OUT.get(name, lines) and (lines or name not in tiny_models.MOE)
    np.testing.assert_allclose(logits_of_texts(net), before, rtol=0, atol=2e-5 * np.abs(before).max() + 1e-4)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_family_is_quantized(name, tmp_path, monkeypatch):
    """Round to nearest, GPTQ (each linear better than to nearest), a8w8: written, opened again, the same logits and
    tokens."""
    plain = tiny_models.build(name, **PACKABLE.get(name, {}))
    wanted, errors = logits_of_texts(plain), []

    def of_both(method, ref, stats, shared, args, original=methods.WeightOnly.quantize):
        weight = ref.layer.weight.numpy()
        nearest = rounding.round_to_nearest(weight, args.bits, args.group_size, args.sym).weight()
        error, damping = original(method, ref, stats, shared, args)
        errors.append((error, methods.relative_error(shared[0] @ nearest, shared[0] @ weight)))
        return error, damping

    monkeypatch.setattr(methods.WeightOnly, "quantize", of_both)
    for keys, most in (
        ({"do_ptq": True, "quant_type": "wint8"}, 0.03),
        ({"do_gptq": True}, 0.5),
        ({"do_ptq": True, "activation": "per_token", "shift": True, "smooth": True}, 0.05),
    ):
        net, args = tiny_models.build(name, **PACKABLE.get(name, {})), make_args(**keys)
        errors.clear()
        with paddle.no_grad():
            rows = quantize.quantize_model(net, Calibration(net, Texts(net), 2), args, print_line=lambda line: None)
        assert sorted(row["linear"] for row in rows) == sorted(model.block_linears(net))
        assert all(isinstance(layer, model.QuantLinear) for *_, layer in model.block_linears(net).values())
        if args.do_gptq:
            assert all(found < nearest for found, nearest in errors), errors
        found = logits_of_texts(net)
        error = np.median(
            np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        )  # routers may flip a few
        assert error < most, (keys, error)
        save_pretrained(net, tmp_path / args.algorithm)
        again = from_pretrained(tmp_path / args.algorithm).eval()
        np.testing.assert_allclose(logits_of_texts(again), found, rtol=0, atol=1e-5)
        prompts = [text.tolist() for text in Texts(net, 1).texts[:3]]
        engine = Engine(again, num_blocks=40, block_size=8)
        params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        replies = [c.token_ids for (c,) in engine.generate([Request(prompt, params) for prompt in prompts])]
        assert [len(reply) for reply in replies] == [min(5, engine.max_model_len - len(prompt)) for prompt in prompts]
        if args.quant_type != "a8w8":  # whose steps another order of sums may cross
            for prompt, reply in zip(prompts, replies):
                assert reply == model.generate(again, np.array([prompt]), len(reply))[0, len(prompt) :].tolist()


@pytest.mark.parametrize("keys", [{"do_ptq": True, "quant_type": "wint8"}, {"do_gptq": True}], ids=str)
def test_the_reported_error_is_that_of_the_outputs_on_sampled_tokens(keys):
    reported, names = {}, ("attention.q_proj", "mlp.down_proj")
    for tokens in (10**6, 48):
        net, args = tiny_model(), make_args(**keys, search_tokens=tokens)
        with paddle.no_grad():
            calibration, refs = Calibration(net, make_loader(), 2), linear_refs(net, 0)
            stats = calibration.observe(net.layers[0], [refs[name] for name in names], keep_hessian=True)
            weights = [refs[name].layer.weight.numpy() for name in names]
            rows = {row["linear"]: row["error"] for row in quantize.quantize_model(net, calibration, args, print)}
        reported[tokens] = [rows[refs[name].path] for name in names]
    rounded = [refs[name].layer.dequantized().numpy() for name in names]
    exact = [output_error(w, q, s.hessian) for w, q, s in zip(weights, rounded, stats)]
    # GPTQ's down_proj reads what the quantized linears before it put out
    np.testing.assert_allclose(reported[10**6], exact, rtol=0.1 if args.do_gptq else 1e-3)
    np.testing.assert_allclose(reported[10**6][0], exact[0], rtol=1e-3)
    np.testing.assert_allclose(reported[48], exact, rtol=0.3)


@paddle.no_grad()
def test_experts_keep_fewer_rows_of_their_inputs():
    """A search keeps rows of every linear of a block at once, and a block may have hundreds of experts."""
    net = tiny_models.build("mixtral_window")
    calibration, refs = Calibration(net, Texts(net), 2), linear_refs(net, 0)
    names = ["attention.q_proj", "mlp.experts.0.gate_proj"]
    args = make_args(do_ptq=True, smooth=True, smooth_piecewise_search=True, search_tokens=4)
    wanted = methods.METHODS["a8w8"].observes(args)
    found = calibration.observe(net.layers[0], [refs[name] for name in names], **wanted)
    assert [len(stats.sample()) for stats in found] == [32, 4]


def test_an_expert_that_no_token_is_sent_to_is_calibrated_on_all(tmp_path):
    net = tiny_models.build("mixtral_window")
    for block in net.layers:
        model.set_parameter(
            block.mlp.router.weight,
            block.mlp.router.weight.numpy() * np.array([1, 1, 0], np.float32) - np.array([0, 0, 1e3], np.float32),
        )
    block = net.layers[0]
    model.set_parameter(block.mlp_norm.weight, np.abs(block.mlp_norm.weight.numpy()))
    with paddle.no_grad():
        calibration, slots = Calibration(net, Texts(net), 2), linear_refs(net, 0)
        names = [f"mlp.experts.{e}.{proj}" for e in range(3) for proj in ("gate_proj", "down_proj")]

        def never(flat, route=model.MoE.route):
            weights, chosen, probabilities = route(block.mlp, flat)
            return weights, chosen * 0 + (flat[:, :1] > 0).astype("int64"), probabilities

        block.mlp.route = never  # to experts 0 and 1
        found = dict(zip(names, calibration.observe(block, [slots[name] for name in names], True, 64)))
    tokens = {name: inputs.tokens for name, inputs in found.items()}
    assert (
        tokens[names[0]] + tokens[names[2]] == 89 and tokens[names[0]] == tokens[names[1]] and 0 < tokens[names[0]] < 89
    )
    assert tokens[names[4]] == tokens[names[5]] == 89
    together = found[names[0]].hessian + found[names[2]].hessian  # each token once: padding counts for nothing
    np.testing.assert_allclose(found[names[4]].hessian, together, rtol=1e-4, atol=1e-4)


def test_shift_centers_every_channel_that_a_norm_puts_out():
    net, args = tiny_model(), make_args(do_ptq=True, shift=True)
    with paddle.no_grad():
        calibration, slots = Calibration(net, make_loader(), 2), linear_refs(net, 0)
        firsts = [group.names[0] for group in groups(net, net.layers[0])]
        observed = dict(zip(firsts, calibration.observe(net.layers[0], [slots[name] for name in firsts])))
        smoothing.prepare_block(net.layers[0], slots, observed, net.config, args)
        low, high = calibration.observe(net.layers[0], [slots["mlp.gate_proj"]])[0].extremes(2)
    np.testing.assert_allclose(low, -high, atol=1e-4)


def test_padding_counts_for_nothing():
    """The same records packed and padded: the same extremes and, up to order, the same Hessian."""
    net, found = tiny_model(), []
    for zero_padding in (True, False):
        loader = make_loader(T=224, batch_size=4, zero_padding=zero_padding, split="dev")
        with paddle.no_grad():
            calibration = Calibration(net, loader, loader.batches_per_epoch)
            slots = linear_refs(net, 0)
            found.append(calibration.observe(net.layers[0], [slots["attention.q_proj"], slots["mlp.down_proj"]], True))
    for packed, padded in zip(*found):
        assert packed.tokens == padded.tokens == int(loader.dataset.lengths.sum())
        np.testing.assert_allclose(packed.hessian, padded.hessian, rtol=1e-3, atol=1e-4 * packed.tokens)
        np.testing.assert_allclose(packed.extremes(99), padded.extremes(99), rtol=1e-4, atol=1e-4)


def test_smoothing_scales_are_the_paper_s():
    x_max, w_max = np.array([4.0, 100.0, 0.0, 1.0], np.float32), np.array([1.0, 0.01, 1.0, 0.0], np.float32)
    np.testing.assert_allclose(smoothing.smooth_scale(x_max, w_max, 0.5), [2.0, 100.0, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(smoothing.smooth_scale(x_max, w_max, 1.0), [4.0, 100.0, 1.0, 1.0], rtol=1e-6)


def test_pieces_are_runs_of_sorted_values():
    r = np.random.RandomState(0)
    values = np.concatenate([r.rand(50), 10 + r.rand(20), 100 + r.rand(5)])
    assert np.array_equal(smoothing.split_channels(values, 3), np.repeat([0, 1, 2], [50, 20, 5]))
    assert smoothing.split_channels(np.ones(7), 3).max() == 0
    for k in (1, 2, 5):
        found = smoothing.split_channels(values, k)
        assert np.all(np.diff(found[np.argsort(values)]) >= 0)


def observed(x, keep_rows=10**6):
    """ActivationStats of x (tokens, n)."""
    stats = ActivationStats(x.shape[1], False, keep_rows)
    stats.add(paddle.to_tensor(x))
    return stats


def plain_error(rows, weight, scale, static):
    """RoundingError.measure() written out, in float64."""
    weight = weight[:, :: -(-weight.shape[1] // 512)]
    x, (codes, scales) = rows / scale, rounding.int8_weight(weight * scale[:, None])
    step = np.abs(x).max(1, keepdims=True) / 127 if static is None else static
    rounded = np.clip(np.rint(x / step), -128, 127).astype(np.float64) * step @ (codes.astype(np.float64) * scales)
    exact = rows.astype(np.float64) @ weight
    size = np.square(exact).sum(1)
    return float(np.mean(np.square(rounded - exact).sum(1) / np.maximum(size, np.median(size))))


def plain_search(x, weights, statistics, args):
    """piecewise_search() written out: each candidate is measured in full."""

    def error(scale):
        static = None if args.activation == "per_token" else max(np.abs(x / scale).max(), 1e-8) / 127
        return sum(plain_error(x, weight, scale, static) for weight in weights)

    (whole, constants), found = smoothing.candidate_scales(statistics, args), []
    whole[0] += [smoothing.smooth_scale(*statistics[0], 0.5), np.ones_like(x[0])]
    candidates = min(whole, key=lambda scales: min(map(error, scales)))
    start = min(candidates, key=error)
    for k in range(1, args.smooth_k_piece + 1):
        piece_of, scale = smoothing.split_channels(statistics[0][0], k), start
        for piece in range(piece_of.max() + 1):
            tried = [scale] + [np.where(piece_of == piece, candidate, scale) for candidate in candidates + constants]
            scale = min(tried, key=error)
        found.append((error(scale), scale))
    return min(found, key=lambda pair: pair[0])


@pytest.mark.parametrize("activation", ["per_tensor", "per_token"])
def test_the_search_finds_what_trying_everything_in_full_finds(activation):
    x, weight = layer_problem(40, 700, 150, rank=12)
    x[:, 3] *= 30
    x[7] *= 50  # a token
    stats, weights = observed(x), [weight[:, :600], weight[:, 600:]]
    keys = {**SEARCH, "search_alpha_step": 0.15, "search_tokens": len(x)}
    args = make_args(do_ptq=True, smooth=True, activation=activation, **keys)
    statistics = smoothing.channel_statistics([stats], stats.rows, weights, args)
    np.testing.assert_allclose(statistics[0], [np.abs(x).max(0), np.abs(weight).max(1)], rtol=1e-6)
    sizes = np.linalg.norm(x, axis=1, keepdims=True)
    even = x / np.maximum(sizes, np.median(sizes)) * np.sqrt(x.shape[1])
    for (of_inputs, of_weights), power in zip(statistics[1:], (2, 4)):
        np.testing.assert_allclose(of_inputs, np.mean(np.abs(even) ** power, 0) ** (1 / power), rtol=1e-4)
        np.testing.assert_allclose(of_weights, np.sqrt(np.mean(weight**2, 1)), rtol=1e-5)
    scale, error = smoothing.piecewise_search([(stats, w) for w in weights], statistics, args)
    expected_error, expected = plain_search(x, weights, statistics, args)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    np.testing.assert_allclose(error, expected_error, rtol=1e-3)
    plain = smoothing.smooth_scale(*statistics[0], 0.5)
    measured = smoothing.RoundingError(stats, weights[0], 10**6)
    assert np.array_equal(smoothing.RoundingError(stats, weights[0], 50).rows, x[::3])
    static = None if activation == "per_token" else smoothing.input_scale(stats, "avg", plain)
    whole = measured.measure(plain, static)
    np.testing.assert_allclose(whole, plain_error(x, weights[0], plain, static), rtol=1e-3)


def test_weights_of_a8w8_by_gptq_lose_less_and_see_smoothed_inputs_of_quantized_linears(monkeypatch):
    x, weight = layer_problem(160, 120, 2000)
    args = make_args(do_gptq=True, quant_type="a8w8", activation="per_token", smooth=True, smooth_all_linears=True)
    method = methods.METHODS[args.method]
    stats = ActivationStats(160, True, 0)
    stats.add(paddle.to_tensor(x))
    codes, scales = method.codes(weight, method.prepare(stats, args), args)
    nearest, nearest_scales = rounding.int8_weight(weight)
    errors = [np.linalg.norm(x @ (c * s - weight)) for c, s in ((codes, scales), (nearest, nearest_scales))]
    assert codes.dtype == np.int8 and errors[0] < 0.7 * errors[1], errors
    small, small_scales = method.codes(weight * np.float32(1e-6), method.prepare(stats, args), args)
    np.testing.assert_allclose(small * small_scales * 1e6, codes * scales, atol=1e-6)  # below float16
    hessians, prepare = [], method.prepare
    net, loader = tiny_model(), make_loader()
    observed = [group.names[0] for group in groups(net, net.layers[0])]
    monkeypatch.setattr(
        method, "prepare", lambda stats, args: (hessians.append(stats.hessian), prepare(stats, args))[1]
    )
    with paddle.no_grad():
        rows = quantize.quantize_model(net, Calibration(net, loader, 2), args, print_line=lambda line: None)
        refs = linear_refs(net, 0)
        found = Calibration(net, loader, 2).observe(net.layers[0], [refs[name] for name in observed], keep_hessian=True)
    assert {row["damping"] for row in rows} == {args.percdamp}
    assert net.config.quantization["algorithm"] == "smooth_gptq"
    for hessian, after in zip(hessians, found):  # of the block as it is now
        np.testing.assert_allclose(hessian, after.hessian, rtol=1e-3, atol=1e-4 * after.tokens)


def test_input_scales_are_chosen_by_their_error():
    x, weight = layer_problem(40, 30, 200, rank=12)
    x /= np.abs(x).max(1, keepdims=True)
    even, uneven = observed(x), observed(np.concatenate([x, 100 * x[:1]]))
    mixed = make_args(do_ptq=True, activation="mixed", act_quant_method="abs_max")
    assert smoothing.choose_input_scale(even, [weight], mixed) == smoothing.input_scale(even, "abs_max")
    assert smoothing.choose_input_scale(uneven, [weight], mixed) is None
    assert uneven.outliers["token_outlier"] > 40 > even.outliers["token_outlier"]
    assert smoothing.choose_input_scale(even, [weight], make_args(do_ptq=True, activation="per_token")) is None


SKIPPED = {  # keys: how many linears of the 14 stay floats
    "gptq": ({"do_gptq": True, "quant_type": "wint8", "skip_list_names": "down_proj"}, 2),
    "a8w8": ({"do_ptq": True, "activation": "mixed", "shift": True, "smooth": True, "smooth_all_linears": True,
              "skip_list_names": ["0.self_attn.q_proj", "1.mlp.gate_proj", "1.mlp.up_proj"]}, 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", SKIPPED)
def test_skipped_linears_stay_floats_and_folders_with_them_open_again(kind, tmp_path):
    keys, count = SKIPPED[kind]
    net, loader, args = tiny_model(), make_loader(), make_args(**keys)
    wanted = logits(net)
    with paddle.no_grad():
        rows = quantize.quantize_model(net, Calibration(net, loader, 2), args, print_line=lambda line: None)
    floats = [p for p, (*_, layer) in model.block_linears(net).items() if not isinstance(layer, model.QuantLinear)]
    assert len(floats) == count == 14 - len(rows) and not set(floats) & {row["linear"] for row in rows}
    assert net.config.quantization["modules_to_not_convert"] == floats
    save_pretrained(net, tmp_path / "out")
    again = from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(logits(again), logits(net), rtol=0, atol=1e-5)
    assert np.abs(logits(net) - wanted).mean() < 0.1 * np.abs(wanted).mean()
    if args.activation == "mixed" and args.method == "a8w8":
        with pytest.raises(UserError, match="activation mixed is not supported"):
            quantized_weights(net, "compressed-tensors")
    else:
        weights, config = quantized_weights(net, "compressed-tensors")
        assert set(floats) < set(config["ignore"]) and {f"{p}.weight" for p in floats} < {w.name for w in weights}


def test_scales_of_an_int8_cache_are_calibrated_and_served(tmp_path):
    """quant_type …c8: largest |k| and |v| of each head, over 127; the engine's int8 codes are x / scale, rounded."""
    net, args = tiny_model(), make_args(do_ptq=True, quant_type="wint8c8")
    with paddle.no_grad():
        rows = quantize.quantize_model(net, Calibration(net, make_loader(), 2), args, print_line=lambda line: None)
    assert len(rows) == 14 and net.config.quantization["bits"] == 8
    save_pretrained(net, tmp_path / "out")
    again = from_pretrained(tmp_path / "out").eval()
    assert again.config.quantization == net.config.quantization
    batch, cache = make_loader().batch(0, 0), model.Cache(2)
    args_of_batch = (paddle.to_tensor(batch[key]) for key in ("input_ids", "position_ids", "startend_row_indices"))
    with paddle.no_grad():
        again.hidden_states(*args_of_batch, caches=cache)
    real = real_positions(batch, make_loader())
    for kept, name in ((cache.keys, "k_scales"), (cache.values, "v_scales")):
        largest = np.array([np.abs(x.numpy()[real]).max((0, 2)) for x in kept])  # (L, K) of the first of two batches
        scales = np.array(again.config.quantization[name])
        assert (
            scales.shape == (2, 2) and np.all(largest / 127 <= scales * 1.0001) and np.all(largest / 127 > scales / 2)
        )
    params, prompt = SamplingParams(max_tokens=1, temperature=0.0), np.random.RandomState(5).randint(3, 3000, 30)
    runners, found = {}, {}
    for kind in (False, "static"):
        engine = Engine(again, num_blocks=8, block_size=8, int8_cache=kind)
        runner = runners[kind] = make_runner(again, 8, 8, int8=kind)
        sequence = TokenSequence(prompt.tolist(), len(prompt), blocks=[0, 1, 2, 3])
        found[kind] = runner.run([ScheduledTokens(sequence, 0, len(prompt))])[0]
        assert len(engine.generate([Request(prompt.tolist(), params)])[0][0].token_ids) == 1
    exact, codes = (runners[kind].pools[0][0].numpy().reshape(64, 2, -1)[:30] for kind in (False, "static"))
    scale = np.array(again.config.quantization["k_scales"], np.float32)[0][:, None]
    np.testing.assert_array_equal(codes, np.clip(np.rint(exact / scale), -127, 127))
    assert 0 < np.abs(found["static"] - found[False]).mean() < 0.05 * np.abs(found[False]).mean()
    with pytest.raises(UserError, match="static needs k_scales and v_scales"):
        make_runner(tiny_model(), 8, 8, int8="static")


def test_outliers_are_reported_by_linear():
    rows = [{"linear": f"layers.{i}", "channel_outlier": 10.0 * i, "token_outlier": 1.0} for i in range(5)]
    (line,) = quantize.outlier_lines([*rows, {"linear": "no data"}], 15.0)
    assert line == "outlier channels, over 15 x the median, before 3 linears: layers.4 40, layers.3 30, layers.2 20"


# ---------------------------------------------------------------------------------------------- the script

KINDS = {
    "rtn8": {"do_ptq": True, "quant_type": "weight_only_int8"},
    "rtn4_groups": {"do_ptq": True, "quant_type": "wint4", "weight_quant_method": "groupwise", "group_size": 32},
    "gptq4": {"do_gptq": True},
    "gptq4_act_order": {"do_gptq": True, "group_size": 32, "desc_act": True, "sym": False},
    "gptq8_groups": {"do_gptq": True, "quant_type": "wint8", "group_size": 64},
    "a8w8_per_token": {"do_ptq": True, "activation": "per_token"},
    "a8w8_gptq": {"do_gptq": True, "quant_type": "a8w8", "activation": "mixed", "shift": True},
    "a8w8_all": {"do_ptq": True, "shift": True, "smooth": True, "smooth_all_linears": True, **SEARCH},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_was_measured(kind, world, tmp_path, monkeypatch, capfd):
    """The folder opens to the same logits as the model in memory; the report is whole."""
    kept = []
    original = quantize.save_pretrained
    monkeypatch.setattr(quantize, "save_pretrained", lambda net, *rest: (kept.append(net), original(net, *rest)))
    run(keys_of(world, tmp_path / "out", do_eval=True, **KINDS[kind]))
    again = from_pretrained(tmp_path / "out")
    again.eval()
    np.testing.assert_allclose(logits(again), logits(kept[0]), rtol=0, atol=1e-6)
    assert all(isinstance(layer, model.QuantLinear) for *_, layer in model.block_linears(again).values())
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert [row["linear"] for row in report["linears"]] == sorted(
        model.block_linears(again), key=lambda p: int(p.split(".")[2])
    )
    assert all(0 < row["error"] < 0.5 for row in report["linears"])
    assert report["bytes_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size < report["bytes_float32"]
    loader = data.SFTLoader(data.SFTDataset(world / "sft", load_tokenizer(tmp_path / "out"), 96, 224, "dev"), 8, 224)
    assert abs(trainer.evaluate(again, loader)["eval_loss"] - report["dev_after"]["eval_loss"]) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == report["quantization_config"] and set(config) >= {
        "quant_method",
        "bits",
        "group_size",
        "sym",
        "desc_act",
    }
    out = capfd.readouterr().out
    assert "dev perplexity" in out and "weight files" in out


def test_a_lora_folder_is_merged_and_quantized_in_one_run(world, tmp_path):
    run(keys_of(world, tmp_path / "one", model_name_or_path=str(world / "lora"), do_gptq=True, quant_type="wint8"))
    run(keys_of(world, tmp_path / "two", lora_path=str(world / "lora"), do_gptq=True, quant_type="wint8"))
    one, two = (from_pretrained(tmp_path / name) for name in ("one", "two"))
    merged = from_pretrained(world / "lora")
    np.testing.assert_array_equal(logits(one), logits(two))
    base = logits(from_pretrained(world / "base"))
    assert np.abs(logits(one) - logits(merged)).max() < 0.2 * np.abs(base - logits(merged)).max()


def test_rounding_needs_no_data(world, tmp_path):
    run(keys_of(world, tmp_path / "out", dataset_name_or_path="", do_ptq=True, quant_type="wint8"))
    assert json.loads((tmp_path / "out" / "quant_report.json").read_text())["calibration_tokens"] == 0


def test_calibration_takes_quant_json_and_corpora(world, tmp_path, capfd):
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "quant.json").write_text((world / "sft" / "dev.json").read_text())
    run(keys_of(world, tmp_path / "one", dataset_name_or_path=str(sft), do_gptq=True))  # train.json is not there
    assert "3 batches" not in capfd.readouterr().out
    keys = keys_of(world, tmp_path / "two", do_gptq=True, do_eval=True, max_length=64, src_length=32)
    run(keys | {"dataset_name_or_path": str(DEMO / "pretrain" / "corpus"), "max_evaluate_steps": 1})
    report = json.loads((tmp_path / "two" / "quant_report.json").read_text())
    assert report["calibration_tokens"] == 2 * 2 * 64 and report["dev_after"]["eval_tokens"] > 0


def test_more_damping_is_said_layer_by_layer(world, tmp_path, capfd):
    keys = keys_of(world, tmp_path / "out", do_gptq=True, percdamp=0.0, gptq_step=1, max_length=40, src_length=20)
    run(keys | {"per_device_train_batch_size": 1})
    lines = [line for line in capfd.readouterr().out.splitlines() if "not positive definite" in line]
    assert any("down_proj" in line for line in lines)


def test_a_folder_is_replaced_only_when_told_and_only_by_something_whole(world, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    keys = keys_of(world, out, do_ptq=True, quant_type="wint8")
    run(keys)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "overwrite_output_dir" in fails(keys, capfd)

    def broken(*_, **__):
        raise UserError("model.layers.0: stopped")

    monkeypatch.setattr(quantize, "quantize_model", broken)
    fails(keys | {"overwrite_output_dir": True}, capfd)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.undo()
    run(keys | {"overwrite_output_dir": True, "quant_type": "wint4"})
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 4


BAD = [
    ({}, "none: true; choose one of do_ptq, do_gptq and do_autoround"),
    ({"do_ptq": True, "do_gptq": True}, "do_ptq and do_gptq: true; choose one"),
    ({"do_ptq": True, "do_awq": True, "quant_type": "a8w8"}, "do_awq quantizes weights alone"),
    ({"do_ptq": True, "auto_clip": True}, "auto_clip quantizes weights alone"),
    ({"do_awq": True, "dataset_name_or_path": ""}, "dataset_name_or_path: missing; do_awq needs records"),
    ({"do_autoround": True, "autoround_iters": 0}, "autoround_iters: 0"),
    ({"do_gptq": True, "quant_type": "wint3"}, "cannot be packed to 3 bits: not multiples of 32"),
    ({"do_qat": True}, "do_qat: "),
    ({"do_ptq": True, "shift": True, "shift_all_linears": True}, "shift_all_linears: "),
    ({"do_ptq": True, "quant_type": "a8w8c4"}, "a8w8c4"),
    ({"do_ptq": True, "quant_type": "wint8c8", "dataset_name_or_path": ""}, "c8 needs records"),
    ({"do_autoround": True, "quant_type": "a8w8"}, "weights alone"),
    ({"do_ptq": True, "quant_type": "a8w8_fp8", "smooth": True}, "needs quant_type: a8w8, found a8w8_fp8"),
    ({"do_ptq": True, "quant_type": "a8w8_fp8", "activation": "mixed"}, "mixed compares errors of int8"),
    ({"do_ptq": True, "quant_type": "a8w8_fp8", "dataset_name_or_path": ""}, "a8w8_fp8 is calibrated on records"),
    ({"do_gptq": True, "quant_type": "fp8"}, "do_gptq quantizes weights alone, to integers"),
    ({"do_ptq": True, "quant_type": "fp8", "group_size": 64}, "fp8 has one weight scale per output channel"),
    ({"do_ptq": True, "quant_type": "wint8", "weight_quant_method": "abs_max"}, "abs_max_channel_wise and groupwise"),
    ({"do_gptq": True, "smooth": True}, "needs quant_type: a8w8"),
    ({"do_ptq": True, "quant_type": "wint4", "group_size": 12}, "group_size: 12"),
    ({"do_ptq": True, "group_size": 64}, "must be -1"),
    ({"do_gptq": True, "group_size": 64, "weight_quant_method": "abs_max_channel_wise"}, "contradicts"),
    ({"do_gptq": True, "percdamp": -1.0}, "percdamp"),
    ({"do_gptq": True, "gptq_step": 0}, "gptq_step"),
    ({"do_ptq": True, "act_quant_method": "mse"}, "act_quant_method"),
    ({"do_ptq": True, "skip_list_names": ["down_proj", "head"]}, "skip_list_names: 'head' is in no name"),
    ({"do_gptq": True, "skip_list_names": "layers"}, "nothing is left to quantize"),
    ({"do_ptq": True, "activation": "mixed", "per_token_ratio": 0.5}, "per_token_ratio: 0.5"),
    ({"do_ptq": True, "activation": "per_channel"}, "activation"),
    ({"do_gptq": True, "dataset_name_or_path": ""}, "dataset_name_or_path: missing"),
    ({"do_gptq": True, "dataset_name_or_path": "/no/such/folder"}, "/no/such/folder"),
    ({"do_gptq": True, "model_name_or_path": "/no/such/model"}, "/no/such/model"),
    ({"do_gptq": True, "src_length": 500}, "src_length 500"),
    ({"do_gptq": True, "grup_size": 64}, "did you mean 'group_size'"),
]


@pytest.mark.parametrize("keys, expected", BAD, ids=[text for _, text in BAD])
def test_bad_input_is_one_line(keys, expected, world, tmp_path, capfd):
    assert expected in fails(keys_of(world, tmp_path / "out", **keys), capfd)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_quantized_are_named(world, tmp_path, capfd):
    run(keys_of(world, tmp_path / "once", do_ptq=True, quant_type="wint8"))
    keys = keys_of(world, tmp_path / "out", do_gptq=True)
    assert "quantized already" in fails(keys | {"model_name_or_path": str(tmp_path / "once")}, capfd)
    assert "prefix" in fails(keys | {"model_name_or_path": str(world / "prefix")}, capfd)
    odd = tiny_model(intermediate_size=44)
    save_pretrained(odd, tmp_path / "odd")
    load_tokenizer(DEMO / "llama").save(tmp_path / "odd")
    line = fails(keys | {"model_name_or_path": str(tmp_path / "odd")}, capfd)
    assert "gate_proj" in line and "44" in line
    assert not (tmp_path / "out").exists()


def test_configs_and_upstream_s_configs_run(world, tmp_path):
    for path in sorted((ROOT / "configs").glob("llama_*.json")):
        if path.name in ("llama_gptq.json", "llama_ptq.json", "llama_wint8.json"):
            parse_args(quantize.Args, [str(path)])
    upstream = SHARED / "upstream" / "configs" / "llama"
    if not upstream.is_dir():
        pytest.skip("PaddleNLP's configs are not on this machine")
    for name in ("gptq_argument.json", "ptq_argument.json"):
        changes = keys_of(world, tmp_path / name)
        flags = [
            f"--{key}={changes[key]}"
            for key in ("model_name_or_path", "dataset_name_or_path", "output_dir", "src_length", "max_length")
        ]
        flags += ["--gptq_step=1", "--ptq_step=1", "--smooth_step=1", "--search_tokens=32", "--search_alpha_step=0.3"]
        trainer.run_script(quantize.main, quantize.Args, [str(upstream / name), *flags])
        assert from_pretrained(tmp_path / name).config.quantization["algorithm"] in ("gptq", "smooth_search")


# ---------------------------------------------------------------------------------------------- planted outliers


@paddle.no_grad()
def plant(net, loader, factor=50.0, offset=0.0, channels=4):
    """Give every norm of the blocks a few outlier channels; the function stays.

    The channels' weights in the norm grow by `factor` and the rows of the linears that read them shrink by it. offset
    moves these channels' outputs off centre as well, by so many times half their range, taken back by biases in the
    linears: what shift is there for. (RMSNorm has no bias in a plain Llama; norms that have one, and residual streams
    with channels of a large mean, give such ranges.) Scaling alone smoothing undoes exactly: s at alpha 0.5 grows by
    the very factor, so what is left is the model without outliers.
    """
    calibration = Calibration(net, loader, 1)
    for index, block in enumerate(net.layers):
        slots = linear_refs(net, index)
        observed = calibration.observe(block, [slots["attention.q_proj"], slots["mlp.gate_proj"]])
        for group, inputs in zip(groups(net, block)[::2], observed):
            low, high = inputs.extremes(1)
            chosen = np.argsort(-np.abs(low + high) / (high - low), kind="stable")[:channels]  # the most one-sided
            scale, moved = np.ones_like(low), np.zeros_like(low)
            scale[chosen] = 1 / factor
            moved[chosen] = -offset * factor * (high - low)[chosen] / 2
            layers, norm = [slots[name].layer for name in group.names], getattr(block, group.source)
            smoothing.smooth(norm, layers, scale)
            if offset:
                smoothing.shift(norm, layers, moved)
        calibration.advance(block)
    return net


METHODS = {
    "naive": {},
    "smooth": {"smooth": True},
    "shift": {"shift": True},
    "shift, smooth": {"shift": True, "smooth": True},
    "smooth, search": {"smooth": True, **SEARCH},
    "shift, smooth, search": {"shift": True, "smooth": True, **SEARCH},
    "the same, all linears": {"shift": True, "smooth": True, "smooth_all_linears": True, **SEARCH},
}


def measure(train, dev, batches, planted=None, eval_batches=None, **keys):
    """{"ppl", "accuracy", "error" (mean over linears)} of demo/llama, perhaps with planted outliers, quantized."""
    net = from_pretrained(DEMO / "llama")
    net.eval()
    if planted:
        plant(net, train, **planted)
    error = 0.0
    if keys:
        args = make_args(act_quant_method="abs_max", **keys)
        with paddle.no_grad():
            calibration = Calibration(net, train, batches)
        rows = quantize.quantize_model(net, calibration, args, print_line=lambda line: None)
        error = float(np.mean([row["error"] for row in rows]))
    found = trainer.evaluate(net, dev, eval_batches)
    return {"ppl": found["eval_ppl"], "accuracy": found["eval_accuracy"], "error": error}


SCALED = {"factor": 30.0}
OFF_CENTRE = {"factor": 30.0, "offset": 50.0}


@pytest.mark.sweep(keep=0)
def test_methods_rank_as_they_should_on_planted_outliers():
    train, dev = make_loader(256, 4), make_loader(256, 4, split="dev")

    def found(planted, method, eval_batches=2, **keys):
        quick = {"search_scale_max": 1.0, "smooth_search_piece": False, "smooth_k_piece": 2}  # few candidates
        return measure(train, dev, 1, planted, eval_batches, **({**METHODS[method], "do_ptq": True} | keys | quick))

    whole = measure(train, dev, 0, None, 2)["ppl"]
    assert abs(measure(train, dev, 0, OFF_CENTRE, 2)["ppl"] / whole - 1) < 1e-3  # the function did stay
    naive, smooth, best = (found(OFF_CENTRE, m)["ppl"] for m in ("naive", "smooth", "shift, smooth, search"))
    assert best < smooth < naive, (best, smooth, naive)
    assert best < 1.01 * whole, (best, whole)
    naive, smooth, best = (found(SCALED, m, 1)["error"] for m in ("naive", "smooth", "shift, smooth, search"))
    assert best < smooth < naive, (best, smooth, naive)
    weights = {"quant_type": "wint4", "group_size": 64}
    nearest = found(SCALED, "naive", **weights)["ppl"]
    solved = found(SCALED, "naive", **weights, do_gptq=True, do_ptq=False)["ppl"]
    assert solved < nearest, (solved, nearest)


@pytest.mark.slow
def test_figures_of_every_method():
    """With -s: a table in Markdown, without and with planted outliers."""
    train, dev = make_loader(256, 8), make_loader(256, 8, split="dev")
    worlds = {"as it is": None, "scaled x 30": SCALED, "scaled x 30 and off centre": OFF_CENTRE}
    whole = measure(train, dev, 0)
    print(f"demo/llama, dev of demo/sft: perplexity {whole['ppl']:.4f}, token accuracy {whole['accuracy']:.4f}")
    print("| method | " + " | ".join(f"{name}: ppl, error %" for name in worlds) + " |\n|---|" + "---|" * len(worlds))

    errors = {}  # by line, where channels are scaled

    def line(name, **keys):
        cells = []
        for world, planted in worlds.items():
            found = measure(train, dev, 2, planted, **keys)
            if world == "scaled x 30":
                errors[name] = found["error"]
            cells.append(
                f"{found['ppl']:.4f} ({100 * (found['ppl'] / whole['ppl'] - 1):+.2f} %), {100 * found['error']:.2f}"
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    for activation in ("per_tensor", "per_token"):
        for name, keys in METHODS.items():
            line(f"A8W8 {activation}, {name}", do_ptq=True, activation=activation, **keys)
    for bits in (8, 4):
        for group_size in (-1, 128, 64, 32) if bits == 4 else (-1,):
            keys = {"quant_type": f"wint{bits}", "group_size": group_size}
            line(f"W{bits} groups of {group_size}, round to nearest", do_ptq=True, **keys)
            line(f"W{bits} groups of {group_size}, GPTQ", do_gptq=True, **keys)
            line(f"W{bits} groups of {group_size}, GPTQ, act order", do_gptq=True, desc_act=True, **keys)
    for name in ("A8W8 per_tensor", "A8W8 per_token"):
        assert errors[f"{name}, smooth"] < 0.2 * errors[f"{name}, naive"]
        assert errors[f"{name}, the same, all linears"] < errors[f"{name}, shift, smooth, search"]
    for size in (128, 64, 32):
        start = f"W4 groups of {size}, "
        assert errors[f"{start}GPTQ, act order"] < errors[f"{start}GPTQ"] < 0.7 * errors[f"{start}round to nearest"]
