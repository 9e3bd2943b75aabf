"""A part of tests/bench/parallel_table.py, on two processes; with --slow all of README's cells, and what the table's
judgement is worth."""

import parallel_table as table
import pytest

pytestmark = pytest.mark.sweep(keep=3)

PART = [
    ("tp2 sequence parallel", "lora"),
    ("pp2", "pretrain"),
    ("pp2, 2 stages a rank", "sft"),
    ("dp2", "pretrain"),
    ("sharding2 stage1", "prefix"),
    ("sharding2 stage2 offload", "lora"),
    ("sharding2 stage3", "sft"),
    ("sep2", "sft"),
    ("context2", "lora"),
]
OF_FAMILIES = [("opt_350m", "pp2"), ("bloom", "context2"), ("qwen2_moe", "sharding2 stage3")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = table.Bench(tmp_path_factory.mktemp("parallel"))
    yield bench
    bench.close()


@pytest.mark.parametrize("topology, task", PART)
@pytest.mark.sweep(keep=2)
def test_llama(bench, topology, task):
    cell = bench.cell(table.TOPOLOGIES[topology], bench.model("llama", table.LLAMA), task)
    assert table.fine(cell), table.shown(cell)


@pytest.mark.parametrize("name, topology", OF_FAMILIES)
@pytest.mark.sweep(keep=1)
def test_families(bench, name, topology):
    cell = bench.cell(table.TOPOLOGIES[topology], bench.model(name, table.FAMILIES[name]), "sft")
    assert table.fine(cell), table.shown(cell)


def test_the_table_is_what_was_asked_for():
    """At least 24 topologies of 2, 4 and 8 processes for Llama, 4 for every family that model.py has."""
    import tiny_models

    assert len(table.TOPOLOGIES) >= 24 and {way.world for way in table.TOPOLOGIES.values()} == {2, 4, 8}
    assert len(table.FAMILY_TOPOLOGIES) >= 4 and {tiny_models.family(name) for name in table.FAMILIES} == {
        tiny_models.family(name) for name in tiny_models.NAMES
    }


def test_a_wrong_run_is_seen(bench):
    """Another learning rate, by a hundredth, is far above the limit; what does not fit is a cell that says so."""
    model, way = bench.model("llama", table.LLAMA), table.TOPOLOGIES["dp2"]
    bench.cell(way, model, "sft")
    other = bench.run(way, model, "sft", learning_rate=1.01e-3)
    assert table.difference(other, bench.references[model, "sft"]) > 3 * table.LIMIT
    cell = bench.cell(table.Way(2, 1, {"tensor_parallel_degree": 3}), model, "sft")
    assert "3 processes, but this run has 2" in cell and not table.fine(cell)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["llama", "families"])
def test_all(part):
    with pytest.raises(SystemExit) as stop:
        table.main(["--part", part])
    assert stop.value.code == 0
