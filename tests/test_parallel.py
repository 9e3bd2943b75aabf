"""How a run is cut: degrees from arguments, what does not fit in one line, ranks' places on the grid, upstream's
option strings."""

import itertools
import re

import pytest
import tiny_models

import dpo
import export
import finetune
import parallel
import pretrain
import quantize
import serve
from arguments import parse_args
from formats.files import UserError
from formats.paddlenlp import OPTIONS
from model import build
from parallel import Degrees, Topology

pytestmark = pytest.mark.sweep(keep=4)

SHORT = {"tensor": "tensor_parallel_degree", "pipeline": "pipeline_parallel_degree",
    "sharding_degree": "sharding_parallel_degree",
         "sep": "sep_parallel_degree", "context": "context_parallel_degree", "expert": "expert_parallel_degree",
             "virtual": "virtual_pp_degree",
         "order": "hybrid_parallel_topo_order"}  # fmt: skip


def args_of(**keys):
    return pretrain.Args(output_dir="out", do_train=True, **{SHORT.get(key, key): value for key, value in keys.items()})


@pytest.mark.parametrize(
    "world, keys, wanted",
    [
        (1, {}, Degrees()),
        (8, {}, Degrees(dp=8)),
        (8, dict(tensor=2, pipeline=2), Degrees(dp=2, pp=2, tp=2)),
        (8, dict(tensor=-1, pipeline=0, sep=-1), Degrees(dp=8)),
        (8, dict(sharding_degree=2), Degrees(dp=4, sharding=2, stage=1)),
        (8, dict(sharding="stage2", tensor=2), Degrees(sharding=4, tp=2, stage=2)),  # -1: all that is left
        (8, dict(sharding="stage3,offload", sharding_degree=4), Degrees(dp=2, sharding=4, stage=3, offload=True)),
        (8, dict(sharding="stage3", sharding_degree=1), Degrees(dp=8)),  # as upstream: no sharding
        (8, dict(sharding="offload stage1", sharding_degree=8), Degrees(sharding=8, stage=1, offload=True)),
        (4, dict(context=2), Degrees(dp=2, sep=2, context=True)),
        (4, dict(sep=2, sep_parallel_degree=2), Degrees(dp=2, sep=2)),
        (4, dict(pipeline=4, virtual=3, order="sharding_first"), Degrees(pp=4, virtual=3, order="sharding_first")),
        (4, dict(tensor=2, sequence_parallel=True), Degrees(dp=2, tp=2, sequence_parallel=True)),
        (None, dict(tensor=8, sharding="stage2", sharding_degree=2), Degrees(sharding=2, tp=8, stage=2)),  # a dry run's
        (
            None,
            dict(expert=4, sharding_degree=2),
            Degrees(dp=2, sharding=2, ep=4, stage=1),
        ),  # experts need ranks with other tokens
    ],
)
def test_degrees(world, keys, wanted):
    assert Degrees.of(args_of(**keys), world=world) == wanted


LLAMA = tiny_models.config(
    "llama", num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=4, intermediate_size=5, vocab_size=7
)


@pytest.mark.parametrize(
    "world, keys, line",
    [
        (
            8,
            dict(tensor=3, sharding_degree=2),
            "tensor_parallel_degree 3 x pipeline_parallel_degree 1 x sharding_parallel_degree 2 x sep_parallel_degree 1"
            " x context_parallel_degree 1 = 6 processes, but this run has 8; give a product that divides 8",
        ),
        (
            1,
            dict(pipeline=2),
            "pipeline_parallel_degree 2 x .* = 2 processes, but this run has 1; set the degrees to 1",
        ),
        (6, dict(tensor=6), r"^tensor_parallel_degree 6 is more than channels of the MLP \(5\)$"),
        (
            16,
            dict(tensor=16),
            r"tensor_parallel_degree 16 is more than attention heads \(8\); .* ids of the vocabulary \(7\); .* "
            r"channels of the MLP \(5\)",
        ),
        (8, dict(tensor=8), r"tensor_parallel_degree 8 is more than ids of the vocabulary \(7\)"),
        (8, dict(pipeline=8), r"pipeline_parallel_degree 8 is more than layers \(4\)"),
        (
            4,
            dict(pipeline=4, virtual=2),
            r"pipeline_parallel_degree 4 x virtual_pp_degree 2 = 8 is more than layers \(4\)",
        ),
        (2, dict(virtual=2), "^virtual_pp_degree 2 needs a pipeline_parallel_degree above 1$"),
        (
            3,
            dict(sep=3),
            r"sep_parallel_degree 3 does not divide attention heads \(8\): context_parallel_degree takes any",
        ),
        (
            8,
            dict(sep=4, tensor=4),
            r"sep_parallel_degree 4 does not divide attention heads \(2, which tensor_parallel_degree 4 leaves a "
            r"rank of 8\)",
        ),
        (4, dict(sep=2, context=2), "sep_parallel_degree and context_parallel_degree exclude each other"),
        (
            4,
            dict(sharding="stage2", pipeline=2),
            "sharding stage2 and pipeline_parallel_degree 2 exclude each other: use stage1",
        ),
        (4, dict(sharding="stage3 offload", pipeline=2), "sharding stage3 and pipeline"),
        (2, dict(sequence_parallel=True), "sequence_parallel needs a tensor_parallel_degree above 1"),
        (2, dict(sharding="stage5"), "sharding: 'stage5'; possible are stage1, stage2, stage3"),
        (2, dict(order="tp_first"), "hybrid_parallel_topo_order: 'tp_first'; possible are pp_first, sharding_first"),
        (2, dict(expert=2), r"expert_parallel_degree 2 needs a model with experts, this one has none \(0\)"),
        (2, dict(expert=4), "expert_parallel_degree: 4, but this run has 2 process"),
        (4, dict(context=4), r"context_parallel_degree 4 x 2 = 8 is more than tokens of a sequence \(3\)"),
    ],
)
def test_what_does_not_fit_is_one_line(world, keys, line):
    with pytest.raises(UserError, match=line) as error:
        Degrees.of(args_of(**keys), LLAMA, 3, world)
    assert "\n" not in str(error.value)


def test_all_that_does_not_fit_is_in_the_one_line():
    with pytest.raises(UserError) as error:
        Degrees.of(args_of(tensor=8, pipeline=5, virtual=2, sep=7), LLAMA, 2, 4)
    assert len(str(error.value).split("; ")) >= 7, error.value


@pytest.mark.parametrize(
    "keys, fits", [(dict(expert=3), False), (dict(expert=4), True), (dict(expert=8), True), (dict(tensor=8), False)]
)
def test_experts(keys, fits):
    """8 experts 6 wide."""
    config, T = (
        tiny_models.config(
            "qwen3_moe", num_attention_heads=8, num_key_value_heads=8, num_experts=8, moe_intermediate_size=6
        ),
        64,
    )
    if fits:
        assert Degrees.of(args_of(**keys), config, T, 8).ep == keys.get("expert", 1)
    else:
        with pytest.raises(
            UserError,
            match=r"^expert_parallel_degree 3 does not divide experts \(8\)$"
            if "expert" in keys
            else r"channels of an expert \(6\)",
        ):
            Degrees.of(args_of(**keys), config, T, 6 if "expert" in keys else 8)


def test_a_model_is_checked_before_its_weights_are_there():
    built = build(tiny_models.config("llama"))
    with pytest.raises(UserError, match=r"^tensor_parallel_degree 5 is more than attention heads \(4\)$"):
        parallel.parallelize(built, Topology(Degrees(tp=5)))


@pytest.mark.parametrize("order", ["pp_first", "sharding_first"])
def test_places_on_the_grid(order):
    """Upstream's statement, not ours: the last axis named varies fastest, then the one before it, …"""
    names = {"pp_first": "dp pp sharding sep tp", "sharding_first": "dp sharding pp sep tp"}[order].split()
    sizes = dict(dp=2, pp=3, sharding=2, sep=2, tp=2)
    degrees = Degrees(**sizes, order=order)
    places = list(itertools.product(*(range(sizes[name]) for name in names)))  # the last varies fastest
    for rank, place in enumerate(places):
        place = dict(zip(names, place))
        topology = Topology(degrees, rank)
        assert topology.coords == place
        for axis in topology.axes:
            line = [
                r
                for r, other in enumerate(places)
                if all(v == place[n] for n, v in zip(names, other) if n != axis.name)
            ]
            assert axis.ranks == line and axis.rank == place[axis.name] and line[axis.rank] == rank
        assert (
            topology.data_rank == sizes["sharding"] * place["dp"] + place["sharding"] and topology.data_size == 4
        )  # upstream's dataset_rank


def test_the_drawn_example_is_right():
    """The grid at the top of parallel.py, read as it is drawn."""
    text = parallel.__doc__
    topologies = [Topology(Degrees.of(args_of(tensor=2, pipeline=2), world=8), rank) for rank in range(8)]
    columns = [(pp, tp) for pp in (0, 1) for tp in (0, 1)]
    assert [int(n) for n in re.findall(r"pp (\d) \(", text)] == [0, 1] and re.findall(r"\btp (\d)\s", text)[:4] == [
        "0",
        "1",
        "0",
        "1",
    ]
    for dp, row in re.findall(r"^ +dp (\d) +((?:rank \d +){4})", text, re.M):
        for (pp, tp), rank in zip(columns, map(int, re.findall(r"\d", row)), strict=True):
            assert topologies[rank].coords == dict(dp=int(dp), pp=pp, sharding=0, sep=0, tp=tp)
    copy = re.search(r"one copy of the model: ([\d, ]+)", text)[1]
    assert [int(n) for n in copy.split(",")] == [t.rank for t in topologies if t.dp.rank == 0]
    drawn = {
        axis: re.search(rf"\b{axis} ((?:\{{[\d,]+\}}[ ;.]*)+)", text.replace("\n", " "))[1]
        for axis in ("tp", "pp", "dp")
    }
    for axis, groups in drawn.items():
        found = {tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", groups)}
        assert found == {tuple(getattr(t, axis).ranks) for t in topologies}, axis


# ----------------------------------------------------------------------------------------------- the arguments of
# scripts


@pytest.mark.parametrize("script", [quantize, export, serve])
def test_what_does_not_train_is_refused_with_several_processes(script, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    config = {quantize: "llama_gptq", export: "llama_hf", serve: "llama_serve"}[script]
    with pytest.raises(
        UserError, match="this script runs in one process, but 2 were started: start it without the launcher"
    ):
        parse_args(script.Args, [f"configs/{config}.json"])


def test_the_world_is_the_launchers(monkeypatch):
    argv = ["configs/llama_lora.json", "--tensor_parallel_degree", "4"]
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    assert parse_args(finetune.Args, argv).tensor_parallel_degree == 4
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "6")
    with pytest.raises(UserError, match="= 4 processes, but this run has 6; give a product that divides 6"):
        parse_args(finetune.Args, argv)


@pytest.mark.parametrize("key", OPTIONS)
def test_options_of_upstream(key, capsys):
    given = list(OPTIONS[key])
    for text in (" ".join(given), ",".join(given)):
        parse_args(dpo.Args, ["configs/llama_dpo.json", f"--{key}", text])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(given) and all(
            f"ignored: {key}: " in line and "no effect here: " in line for line in lines
        )
    parse_args(dpo.Args, ["configs/llama_dpo.json", f"--{key}="])
    assert capsys.readouterr().out == ""
    wrong = given[0].replace("_", "-", 1)
    with pytest.raises(UserError, match=f"{key}: unknown option '{wrong}'; did you mean '{given[0]}'?"):
        parse_args(dpo.Args, ["configs/llama_dpo.json", f"--{key}", wrong])


def test_option_names_are_upstreams():
    """The lists of upstream's documentation, copied."""
    wanted = {
        "tensor_parallel_config": "enable_mp_async_allreduce, enable_mp_skip_c_identity, "
        "enable_mp_fused_linear_param_grad_add, enable_sp_async_reduce_scatter, "
        "enable_delay_scale_loss, sync_param, sync_grad, sync_moment, "
        "replace_with_c_embedding, replace_with_parallel_cross_entropy",
        "pipeline_parallel_config": "disable_p2p_cache_shape, disable_partial_send_recv, enable_delay_scale_loss, "
        "enable_dp_comm_overlap, enable_sharding_comm_overlap, enable_timer, "
        "enable_release_grads, enable_clear_every_step_cache, enable_overlap_p2p_comm, "
        "disable_batch_p2p_comm, best_unbalanced_scheduler, enable_offload_queue, "
        "use_dualpipev, forward_backward_overlap_scheduler, enable_dynamic_shape",
        "sharding_parallel_config": "enable_stage1_tensor_fusion, enable_stage1_overlap, enable_stage2_overlap, "
        "split_param, disable_stage1_reduce_avg, enable_stage1_broadcast_overlap, "
        "enable_stage1_allgather_overlap, enable_release_grads, "
        "enable_fuse_optimizer_states",
        "data_parallel_config": "enable_allreduce_avg_in_gradinent_scale, gradient_sync_after_accumulate",
        "sequence_parallel_config": "enable_allreduce_avg_in_gradinent_scale, gradient_sync_after_accumulate",
    }
    assert {key: set(names.split(", ")) for key, names in wanted.items()} == {
        key: set(options) for key, options in OPTIONS.items()
    }
