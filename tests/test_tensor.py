"""Tensor, sequence and expert parallelism: every family and adapter cut up, beside one process.

    python -m pytest tests/test_tensor.py             # a minute on two cores
    python -m pytest tests/test_tensor.py --slow      # all 41 configurations of families.py, several ways: five

Losses and norms of three steps of AdamW and every gradient of the first are compared (jobs_tensor.both).
"""

import itertools

import jobs_tensor
import numpy as np
import pytest
import tiny_models
from golden_weights import draw
from test_quant_linear import SCHEMES
from test_quant_linear import fill as fill_integers

import adapters
import formats.tensor_files
import formats.weights
import model as M
import parallel
from distributed.collectives import ShardSpec
from distributed.sharding import gradient_reduction_of
from distributed.tensor import check_tensor, cut_blocks, local_heads
from formats.files import UserError
from modules.low_bit import LowBit, LowBitLinear
from parallel import Degrees, Topology

pytestmark = pytest.mark.sweep(keep=2)

EVEN = {"mixtral": {"num_local_experts": 4}, "mixtral_window": {"num_local_experts": 4, "num_experts_per_tok": 1},
        "qwen2_moe": {"num_experts": 6},
            "qwen3_moe": {"num_experts": 8}}  # experts that two ranks share out  # fmt: skip


def compare(ranks, cases, tolerance=1e-5, of_gradients=2e-5):
    """cases: [(name, options of jobs_tensor.both)]; returns the norms of each case's steps."""
    found, wrong = ranks.run("jobs_tensor:many", cases), []
    for case, *results in zip(cases, *found):
        for rank, (rows, gradients, where, *_) in enumerate(results):
            if gradients is None:
                ranks.stop()  # they may be at different places
            if gradients is None or rows > tolerance or gradients > of_gradients:
                wrong.append(f"{case}, rank {rank}: losses and norms off by {rows}, gradients by {gradients} ({where})")
    assert not wrong, "\n".join(wrong)
    return [result[3] for result in found[0]]


def ways(tp=1, **more):
    return {"tp": tp, **more}


# ============================================================================================ what goes where


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_part_of_a_weight_is_somewhere(name):
    """Each output, input or id once; a key head as often as there are ranks with queries of it."""
    for size in (2, 3, 4, 5):
        config = tiny_models.config(name)
        if check_tensor(config, Degrees(tp=size)):
            continue
        heads = [local_heads(config, size, rank) for rank in range(size)]
        assert [q for (first, last), _ in heads for q in range(first, last)] == list(range(config.num_attention_heads))
        G = config.num_attention_heads // config.num_key_value_heads
        for (first, last), (first_key, last_key) in heads:
            assert {q // G for q in range(first, last)} == set(range(first_key, last_key))
            assert (last - first) % (last_key - first_key) == 0  # as attention wants them
        model = parallel.parallelize(M.build(config), Topology(Degrees(tp=size), size - 1))
        for weight in formats.weights.named_weights(model):
            cut = weight.shard_spec
            if cut is None:
                continue
            times = np.zeros(cut.shape[cut.dim], int)
            for rank, ranges in enumerate(cut.ranges_by_rank):
                assert all(first < last for first, last in ranges), (weight.name, size, rank)
                for first, last in ranges:
                    times[first:last] += 1
            assert times.min() >= 1 and (times.max() > 1) == cut.replicated, weight.name
            assert not cut.replicated or config.num_key_value_heads < size


def test_expert_ranks_are_neighbors_on_the_data_axes():
    degrees = Degrees(dp=2, pp=2, sharding=2, sep=1, tp=2, ep=2)
    topology = Topology(degrees, 5)  # dp 0, pp 1, sharding 0, tp 1
    assert topology.ep.ranks == [5, 7] and topology.expert_dp.ranks == [5, 13]
    degrees = Degrees(dp=2, sharding=2, sep=2, tp=1, ep=4)
    assert Topology(degrees, 6).ep.ranks == [4, 5, 6, 7] and Topology(degrees, 6).expert_dp.ranks == [2, 6]
    for rank in range(8):
        topology = Topology(degrees, rank)
        assert topology.ep.ranks[topology.ep.rank] == rank == topology.expert_dp.ranks[topology.expert_dp.rank]
    model = parallel.parallelize(M.build(tiny_models.config("qwen2_moe", num_experts=8)), topology)
    rules = {path: gradient_reduction_of(path, parameter, model) for path, parameter in model.named_parameters()}
    rule = rules[f"layers.1.mlp.experts.{2 * topology.ep.rank}.up_proj.weight"]
    # Sharded over all that have the same experts, here one of dp and one of sharding.
    assert [axis.name for axis in (*rule.sum_over, rule.shard_axis, *rule.norm_axes)] == ["expert_dp", "ep"]
    unsharded = Topology(Degrees(dp=4, sep=2, ep=4), 6)
    other = parallel.parallelize(M.build(tiny_models.config("qwen2_moe", num_experts=8)), unsharded)
    path = f"layers.1.mlp.experts.{2 * unsharded.ep.rank}.up_proj.weight"
    rule = gradient_reduction_of(path, dict(other.named_parameters())[path], other)
    assert [axis.name for axis in (*rule.sum_over, rule.shard_axis, *rule.norm_axes)] == ["expert_dp", "alone", "ep"]
    for path in (
        "layers.1.mlp.shared.up_proj.weight",
        "layers.1.mlp.router.weight",
        "layers.0.attention.q_proj.weight",
    ):
        assert [axis.name for axis in (*rules[path].sum_over, rules[path].shard_axis, *rules[path].norm_axes)] == [
            "sep",
            "dp",
            "sharding",
        ]


@pytest.mark.parametrize(
    "name, changes, degrees, words",
    [
        ("llama", {}, {"tp": 8}, "tensor_parallel_degree 8 is more than attention heads (4)"),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}, {"tp": 6}, None),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}, {"tp": 5}, None),
        ("llama", {"intermediate_size": 3}, {"tp": 4}, "is more than channels of the MLP (3)"),
        ("mixtral", {"intermediate_size": 3}, {"tp": 4}, "is more than channels of an expert (3)"),
        ("mixtral", {}, {"dp": 2, "ep": 2}, "expert_parallel_degree 2 does not divide experts (5)"),
        ("llama", {}, {"dp": 2, "ep": 2}, "needs a model with experts, this one has none (0)"),
        (
            "qwen2_moe",
            {"num_experts": 6},
            {"dp": 2, "sharding": 2, "tp": 3, "ep": 3},
            "does not divide the data-parallel ranks (dp 2 x sharding 2 x sep 1 = 4)",
        ),
        ("llama", {"quantization_config": SCHEMES["a8w8"]}, {"tp": 2}, "a8w8 cannot be sharded"),
        ("llama", {"quantization_config": SCHEMES["w4"], "head_dim": 12}, {"tp": 2}, "heads, whose channels (12)"),
    ],
)
def test_what_cannot_be_cut_is_said(name, changes, degrees, words):
    config = tiny_models.config(name, **changes)
    found = check_tensor(config, Degrees(**degrees))
    assert (found == []) if words is None else any(words in line for line in found), found
    assert check_tensor(config, Degrees(dp=2)) == []


def test_a_model_that_cannot_be_cut_is_refused_in_one_line(tmp_path):
    tiny_models.write(tmp_path, "mixtral")
    with pytest.raises(UserError, match=r"expert_parallel_degree 2 does not divide experts \(5\)"):
        parallel.from_pretrained(tmp_path, Topology(Degrees(dp=2, ep=2)))


@pytest.mark.parametrize("names", ("Hugging Face", "PaddleNLP"))
@pytest.mark.parametrize("name", ("mixtral", "qwen2_moe"))
def test_a_rank_reads_its_experts_alone(tmp_path, name, names, monkeypatch):
    whole = tiny_models.build(name, **EVEN[name])
    if names == "Hugging Face":
        formats.weights.save_pretrained(whole, tmp_path)
    else:
        tensors = {
            w.name: w.parameter.numpy()
            for w in formats.weights.named_weights(whole, formats.weights.paddlenlp_names(whole.config))
        }
        formats.tensor_files.write_safetensors(tmp_path / "model.safetensors", tensors)
        (tmp_path / "config.json").write_text(whole.config.to_json("float32"))
    read, plain = [], formats.tensor_files.read_tensor
    monkeypatch.setattr(
        formats.tensor_files, "read_tensor", lambda path, entry: read.append(entry) or plain(path, entry)
    )
    model = parallel.from_pretrained(tmp_path, Topology(Degrees(dp=2, ep=2), 1))
    wanted, weights = (
        {w.name: w.to_numpy() for w in formats.weights.named_weights(whole)},
        formats.weights.named_weights(model),
    )
    assert all(np.array_equal(w.to_numpy(), wanted[w.name]) for w in weights)
    assert len(read) == len(weights) and {w.name for w in weights} == set(wanted) - model.names_on_other_ranks
    E = whole.config.experts.num_experts
    assert {int(n.partition(".experts.")[2].partition(".")[0]) for n in model.names_on_other_ranks} == set(
        range(E // 2)
    )
    assert model.num_parameters() == whole.num_parameters()
    assert model.flops_per_token(9) == pytest.approx(whole.flops_per_token(9), rel=1e-12)


# ======================================================================================= training, two ranks


def test_families_cut_in_two(two):
    """Heads and ids that two do not divide, key heads that both have, fused linears, latents, ALiBi, two positions."""
    names = (
        "llama",
        "qwen2",
        "chatglm",
        "chatglm3",
        "bloom_7heads",
        "gemma2",
        "opt_350m",
        "deepseek_v3",
        "baichuan2_13b",
    )
    compare(
        two,
        [
            (name, dict(degrees=ways(2, sequence_parallel=i % 2 == 0), packed=i % 3 == 0))
            for i, name in enumerate(names)
        ],
    )


def test_adapters_on_a_model_cut_in_two(two):
    cases = [
        ("llama", "lora"),
        ("chatglm2", "rslora"),
        ("gpt2", "dora"),
        ("qwen2", "pissa"),
        ("deepseek_v2", "dora_dropout"),
        ("llama", "neftune"),
        ("llama", "dropout"),
        ("mistral", "prefix"),
        ("bloom", "projection"),
        ("qwen3", "prefix"),
    ]
    cases = [
        (name, dict(kind=kind, degrees=ways(2, sequence_parallel=i % 2 == 1), packed=i % 3 == 0, recompute=i % 4 == 2))
        for i, (name, kind) in enumerate(cases)
    ]
    cases += [("llama", dict(kind="lora", packed=True, degrees=ways(2))), ("llama", dict(packed=True, degrees=ways(2)))]
    cases += [("llama", dict(kind=kind, packed=True, degrees=ways(2))) for kind in ("dropout", "neftune")]
    norms = compare(two, cases)
    assert norms[-4] != norms[-2] and norms[-3] != norms[-1]  # there was dropout, and noise


def test_experts_cut_in_two(two):
    cases = [
        ("mixtral", "full", False),
        ("qwen2_moe", "dropout", True),
        ("qwen3_moe", "full", True),
        ("deepseek_v2_lite", "lora", False),
    ]
    compare(
        two, [(name, dict(kind=kind, degrees=ways(2, sequence_parallel=sequence))) for name, kind, sequence in cases]
    )


def test_experts_shared_out(two):
    """dp or sharding with another number of batches than ranks, experts without a token, a rank without one."""
    degrees = {"dp": 2, "ep": 2}
    cases = [
        (name, dict(degrees=degrees, micro=3, changes=EVEN.get(name)))
        for name in ("qwen2_moe", "deepseek_v2", "deepseek_v3")
    ]
    cases += [
        (
            "mixtral",
            dict(degrees={"sharding": 2, "ep": 2}, kind="dora", packed=True, micro=2, changes=EVEN["mixtral"]),
        ),
        ("mixtral", dict(degrees=degrees, micro=1, changes={"num_local_experts": 32}, recompute=True)),
        ("mixtral_window", dict(degrees=degrees, micro=3, changes=EVEN["mixtral_window"], one_expert=True)),
        (
            "mixtral_window",
            dict(degrees=degrees, kind="lora", micro=2, changes=EVEN["mixtral_window"], one_expert=True),
        ),
        ("mixtral", dict(degrees=degrees, kind="one", micro=2, changes=EVEN["mixtral"])),  # one rank trains nothing
    ]
    compare(two, cases)


def quantized(folder, name, scheme):
    """A folder of random integers."""
    model = M.build(tiny_models.config(name, quantization_config=SCHEMES[scheme]))
    for i, (_, _, layer) in enumerate(M.block_linears(model).values()):
        fill_integers(layer, [3, i])
    floats = [w for w in formats.weights.named_weights(model) if w.stored is None]
    arrays = draw({w.name: tuple(w.shape) for w in floats}, 0)
    for w in floats:
        M.set_parameter(w.parameter, w.from_numpy(arrays[w.name]))
    formats.weights.save_pretrained(model, folder)
    return str(folder)


def test_adapters_on_integers_cut_in_two(two, tmp_path):
    """Groups that end with the ranks' parts, that do not, one group of all, rows out of order."""
    cases = []
    for name, scheme in (
        ("llama", "w4"),
        ("llama", "w4_groups"),
        ("llama", "w4_short_group"),
        ("llama_bias_tied", "w8_shuffled"),
        ("bloom", "w8_shuffled"),
    ):
        folder = quantized(tmp_path / f"{name}_{scheme}", name, scheme)
        cases.append(
            (
                name,
                dict(
                    kind="dropout" if "w8" in scheme else "lora",
                    folder=folder,
                    degrees=ways(2, sequence_parallel=len(cases) % 2 == 0),
                ),
            )
        )
    compare(two, cases)


NF4, INT8 = (("algo", "nf4"), ("blocksize", 16)), (("algo", "weight_only_int8"),)
WIDE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def test_rounded_bases_cut_in_two(two, tmp_path):
    """QLoRA: codes are parts of one process's codes, so that training is the same; whole under sharding."""
    experts = dict(num_experts=6, moe_intermediate_size=32, shared_expert_intermediate_size=64)
    folders = {
        "llama": str(tiny_models.write(tmp_path / "llama", "llama", **WIDE)),
        "bloom": str(tiny_models.write(tmp_path / "bloom", "bloom", hidden_size=64, n_head=4)),
        "qwen2_moe": str(tiny_models.write(tmp_path / "qwen2_moe", "qwen2_moe", **WIDE, **experts)),
    }
    for name, low_bit in itertools.product(folders, (NF4, INT8)):
        assert two.run("jobs_tensor:codes", folders[name], {"tp": 2}, low_bit) == [[], []], name
    stage3 = {"sharding": 2, "stage": 3}
    cases = [
        ("llama", NF4, "lora", ways(2)),
        ("llama", INT8, "dora_dropout", ways(2, sequence_parallel=True)),
        ("bloom", NF4, "dora", ways(2, sequence_parallel=True)),
        ("qwen2_moe", NF4, "lora", ways(2)),
        ("qwen2_moe", INT8, "dropout", ways(2)),
        ("llama", NF4, "lora", stage3),
        ("qwen2_moe", INT8, "dora", stage3),
    ]
    compare(
        two,
        [
            (
                name,
                dict(folder=folders[name], kind=kind, degrees=degrees, low_bit=low_bit, micro=1 + ("stage" in degrees)),
            )
            for name, low_bit, kind, degrees in cases
        ],
    )


@pytest.mark.parametrize(
    "dim, shape, edges, blocksize, fits",
    [
        (1, [48, 64], (0, 32, 64), 64, None),  # 32 rows of 48: 24 blocks
        (1, [3, 50], (0, 20, 50), 64, 4),
        (1, [3, 50], (0, 20, 50), 4, None),  # the last block is short in one process too
        (0, [96, 5], (0, 48, 96), 64, 16),
        (0, [128, 5], (0, 64, 128), 64, None),
        (0, [100, 64], (0, 64, 100), 64, 4),  # a block of one row ends in the next
    ],
)
def test_blocks_are_whole_on_each_rank_or_refused(dim, shape, edges, blocksize, fits):
    spec = ShardSpec(dim, [[part] for part in itertools.pairwise(edges)], 0, shape)
    wrong = cut_blocks(spec, LowBit("nf4", blocksize))
    assert wrong is None if fits is None else f"qlora_weight_blocksize {fits} is whole there" in wrong
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if fits is not None:
        blocksize = fits
    low, whole = LowBit("nf4", blocksize), LowBitLinear(M.Linear(*shape, False), LowBit("nf4", blocksize))
    whole.set_weight(weight.T)
    assert cut_blocks(spec, low) is None
    for rank in range(len(edges) - 1):
        part = ShardSpec(dim, spec.ranges_by_rank, rank, shape)
        layer = LowBitLinear(M.Linear(*part.slice(weight).shape, False), low)
        layer.set_weight(part.slice(weight).T)
        np.testing.assert_array_equal(layer.dequantized().numpy(), part.slice(whole.dequantized().numpy()))


def test_adapters_are_loaded_and_written_whole(two, tmp_path):
    for name, kinds in (("qwen2", ("dora", "pissa", "projection")), ("mixtral", ("lora", "pissa", "dora"))):
        base = tiny_models.write(tmp_path / name, name, **EVEN.get(name, {}))
        for kind in kinds:
            model, adapter = adapters.from_pretrained(base), tmp_path / f"{name}_{kind}"
            jobs_tensor.adapt(model, kind)
            jobs_tensor.fill_adapter(model, "lora_A.weight", "lora_B.weight")
            adapters.save_adapter(model, adapter, base)
            for degrees in ({"tp": 2}, {"dp": 2, "ep": 2}) if name == "mixtral" else ({"tp": 2},):
                assert two.run(
                    "jobs_tensor:on_disk",
                    str(base),
                    str(adapter),
                    degrees,
                    str(tmp_path / f"{name}_{kind}_{len(degrees)}"),
                ) == [[], []], (name, kind, degrees)
    options = dict(adapter=str(tmp_path / "mixtral_pissa"), folder=str(base), micro=2)
    compare(
        two, [("mixtral", dict(options, degrees={"tp": 2})), ("mixtral", dict(options, degrees={"dp": 2, "ep": 2}))]
    )


# ========================================================================================= other than training


@pytest.mark.parametrize(
    "name, kind",
    [("llama", "full"), ("chatglm", "prefix"), ("bloom_7heads", "full"), ("glm4", "prefix"), ("deepseek_v2", "lora")],
)
def test_generates_what_one_process_does(two, name, kind):
    for same, losses, logits in two.run("jobs_tensor:tokens", name, {"tp": 2, "sequence_parallel": True}, kind):
        assert same and losses < 1e-5 and logits < 1e-5


def test_generates_with_experts_shared_out(two):
    for same, losses, logits in two.run("jobs_tensor:tokens", "deepseek_v2", {"dp": 2, "ep": 2}):
        assert same and losses < 1e-6 and logits < 1e-6


def test_a_start_does_not_depend_on_the_cut(two):
    for name, degrees in (("bloom_7heads", {"tp": 2}), ("deepseek_v3", {"tp": 2}), ("mixtral", {"dp": 2, "ep": 2})):
        for wrong, here, whole in two.run("jobs_tensor:starts", name, degrees, EVEN.get(name)):
            assert wrong == [] and here < 0.8 * whole


def test_halved_weights_keep_their_place(two):
    for cut, whole in two.run("jobs_tensor:halved", "llama", {"tp": 2}):
        assert cut[0] == [] and cut[1] == whole[1] > 0
        assert cut[2] == pytest.approx(whole[2], rel=2e-2)


def test_parameters_are_counted_once(two, four):
    """On every rank those of the whole model: of parts, stages with a copy of the tied head or of the prefix, experts,
    shards."""
    cases = [
        (two, "llama_bias_tied", {"pp": 2}, "full"),
        (two, "llama", {"pp": 2}, "prefix"),
        (two, "gpt2", {"tp": 2}, "dora"),
        (two, "llama", {"sharding": 2, "stage": 3}, "lora"),
        (four, "llama_mqa", {"tp": 2, "pp": 2}, "lora"),
        (four, "mixtral", {"pp": 2, "dp": 2, "ep": 2}, "lora"),
    ]
    for ranks, name, degrees, kind in cases:
        for cut, whole in ranks.run("jobs_tensor:counted", name, degrees, kind, EVEN.get(name)):
            assert cut == whole and (whole[0] == whole[1]) == (kind == "full"), (name, degrees)


def test_rows_reach_the_ranks_they_are_for(four):
    for found, wanted in four.run("jobs_tensor:exchanged", [[0, 2, 1, 0], [3, 0, 0, 1], [0, 0, 0, 0], [5, 1, 0, 2]]):
        assert found == wanted


# ======================================================================================= training, four ranks


@pytest.mark.sweep(keep=0)
def test_four_ranks(four):
    """Key heads that several ranks have, experts with copies, all at once."""
    both = ways(2, dp=2, ep=2, sequence_parallel=True)
    compare(
        four,
        [
            ("llama", dict(degrees=ways(4, sequence_parallel=True), T=15)),
            ("chatglm3", dict(degrees=ways(4), packed=True)),
            ("qwen2", dict(degrees=ways(4), kind="pissa")),
            ("deepseek_v2", dict(degrees=both, kind="lora", micro=3)),
            ("qwen2_moe", dict(degrees=both, micro=2, packed=True, changes=EVEN["qwen2_moe"])),
            ("mixtral", dict(degrees={"dp": 2, "sharding": 2, "ep": 2}, micro=3, changes=EVEN["mixtral"])),
            ("mixtral", dict(degrees={"dp": 4, "ep": 4}, micro=4, changes=EVEN["mixtral"])),
        ],
    )


KINDS = ("full", "lora", "dropout", "dora", "pissa", "prefix")


@pytest.mark.slow
@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_cut_in_two(two, kind, sequence):
    compare(
        two,
        [
            (name, dict(kind=kind, degrees=ways(2, sequence_parallel=sequence), packed=i % 2 == 0))
            for i, name in enumerate(tiny_models.NAMES)
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("sequence", (False, True))
def test_every_family_cut_in_four(four, sequence):
    """In two, and two copies, where there are fewer than four heads."""
    cases = []
    for name, packed in zip(tiny_models.NAMES, itertools.cycle((True, False, False))):
        degrees = ways(4) if tiny_models.config(name).num_attention_heads >= 4 else ways(2, dp=2)
        cases.append((name, dict(degrees=degrees | {"sequence_parallel": sequence}, micro=3, packed=packed)))
    compare(four, cases)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_of_experts_shared_out(four, kind):
    both = ways(2, dp=2, ep=2, sequence_parallel=True)
    kind = "lora" if kind == "dropout" else kind  # each rank draws the masks of its own experts
    compare(
        four,
        [
            (name, dict(kind=kind, degrees=degrees, micro=3, changes=EVEN.get(name), packed=packed))
            for name in tiny_models.MOE
            for degrees, packed in ((both, True), ({"dp": 4, "ep": 2}, False))
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_family_generates_what_one_process_does(two, name):
    for same, losses, logits in two.run("jobs_tensor:tokens", name, {"tp": 2}):
        assert same and losses < 1e-5 and logits < 1e-5
