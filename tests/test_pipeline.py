"""Pipeline parallelism: the pipeline_schedule by itself, then steps on 2 and 4 ranks against one process.

python -m pytest tests/test_pipeline.py                  # 2 ranks, some of 4
python -m pytest tests/test_pipeline.py --slow           # more of 4, every family, a neighbor slower than gloo waits
"""

import itertools
import json

import jobs_pipeline
import numpy as np
import pytest
import tiny_models
from conftest import ROOT
from pool import Ranks
from test_quant_linear import quantized
from test_weights import paddlenlp_folder

import adapters
import formats.weights
import parallel
from distributed.pipeline import bubble_fraction, check_pipeline, partition_layers, pipeline_schedule, simulate_schedule

pytestmark = pytest.mark.sweep(keep=2)

# ============================================================================================== the pipeline_schedule

RANKS, VIRTUAL, BATCHES = (2, 3, 4, 8), (1, 2, 3), range(1, 18)
grid = pytest.mark.parametrize("ranks, virtual", list(itertools.product(RANKS, VIRTUAL)))


@grid
def test_a_timetable_is_whole_and_never_waits_for_itself(ranks, virtual):
    for batches in BATCHES:
        plan = pipeline_schedule(ranks, virtual, batches)
        wanted = {(kind, c, i) for kind in ("forward", "backward") for c in range(virtual) for i in range(batches)}
        for steps in plan:
            assert len(steps) == len(wanted) and set(steps) == wanted
        assert simulate_schedule(plan) is not None
        # Gradients of parameters, and of copies of one on two ranks, are added up in the order of the micro-batches.
        orders = {tuple(i for kind, c, i in steps if kind == "backward" and c == 0) for steps in plan}
        assert orders == {tuple(range(batches))}


@grid
def test_what_a_rank_keeps_does_not_grow_with_the_micro_batches(ranks, virtual):
    for batches in BATCHES:
        for rank, steps in enumerate(pipeline_schedule(ranks, virtual, batches)):
            kept = np.cumsum([1 if kind == "forward" else -1 for kind, _, _ in steps])
            most = ranks - rank if virtual == 1 else 2 * (ranks - rank - 1) + (virtual - 1) * ranks + 1
            if batches % ranks == 0 or virtual == 1:
                assert kept.max() <= most  # of chunks, each 1/virtual of a rank's layers
            assert kept.max() <= most + virtual * ranks and kept[-1] == 0


@grid
def test_the_bubble_is_the_formulas(ranks, virtual):
    for batches in (m for m in BATCHES if virtual == 1 or m % ranks == 0):
        formula = (ranks - 1) / (virtual * batches + ranks - 1)
        assert bubble_fraction(ranks, virtual, batches) == formula
        for backward in (1.0, 2.0, 3.5):
            plan = pipeline_schedule(ranks, virtual, batches)
            _, idle = simulate_schedule(plan, {"forward": 1.0, "backward": backward})
            assert idle == pytest.approx(formula, abs=1e-12)


def test_a_bubble_without_a_formula_is_the_timetables():
    assert 3 / (2 * 5 + 3) < bubble_fraction(4, 2, 5) < 1
    assert bubble_fraction(4, 2, 5) == simulate_schedule(pipeline_schedule(4, 2, 5))[1]


def test_a_wrong_timetable_is_found():
    plan = [list(steps) for steps in pipeline_schedule(2, 1, 3)]
    plan[1][0], plan[1][1] = plan[1][1], plan[1][0]  # backward before forward
    assert simulate_schedule(plan) is None


@pytest.mark.parametrize("layers, stages", [(2, 2), (3, 2), (5, 2), (5, 4), (7, 3), (61, 16), (32, 8)])
def test_stages_are_even(layers, stages):
    found = partition_layers(layers, stages)
    assert [i for part in found for i in part] == list(range(layers)) and len(found) == stages
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1 and (stages < 3 or max(sizes[0], sizes[-1]) <= min(sizes[1:-1]))


def test_complaints():
    config = tiny_models.config("llama")  # of two layers
    assert check_pipeline(config, parallel.Degrees(pp=2)) == []
    assert check_pipeline(config, parallel.Degrees(pp=3)) == ["pipeline_parallel_degree 3 is more than layers (2)"]
    (found,) = check_pipeline(config, parallel.Degrees(pp=2, virtual=2))
    assert found == "pipeline_parallel_degree 2 x virtual_pp_degree 2 = 4 is more than layers (2)"
    (found,) = check_pipeline(config, parallel.Degrees(virtual=2))
    assert found == "virtual_pp_degree 2 needs a pipeline_parallel_degree above 1"


# ============================================================================================ against one process


@pytest.fixture(scope="module")
def ranks():
    """ranks(n): n processes, kept for the tests of this file."""
    pools = {}

    def get(world):
        return pools.setdefault(world, Ranks(world))

    yield get
    for pool in pools.values():
        pool.stop()


ALONE = {}


def compare(ranks, name, degrees, count, tolerance=1e-5, **options):
    """train() of jobs_pipeline on the ranks of these degrees and in this process: the same."""
    key = json.dumps([name, count, options], sort_keys=True)
    if key not in ALONE:
        ALONE[key] = jobs_pipeline.train(name, {}, count, **options)
    one = ALONE[key]
    world = parallel.Degrees(**degrees).world
    found = ranks(world).run("jobs_pipeline:train", name, degrees, count, **options)
    places = [parallel.Topology(parallel.Degrees(**degrees), rank) for rank in range(world)]
    held = {}
    for place, rank in zip(places, found):
        np.testing.assert_allclose(rank["losses"], one["losses"], rtol=tolerance)
        np.testing.assert_allclose(rank["norms"], one["norms"], rtol=tolerance)
        for what in ("gradients", "weights"):
            for weight, array in rank[what].items():
                # An expert that no token chose has no gradient in one process, and zeros in several. Weights after
                # AdamW: where a gradient is nearly nothing, so is its sign.
                wanted = one[what].get(weight, np.zeros_like(array))
                atol = tolerance * np.abs(wanted).max() + 1e-7 if what == "gradients" else 1e-4
                np.testing.assert_allclose(array, wanted, rtol=0, atol=atol, err_msg=f"{place.coords} {weight}")
                same = held.setdefault((what, weight, place.sep.rank), array)
                np.testing.assert_array_equal(array, same, err_msg=weight)  # copies stay equal to the bit
        np.testing.assert_allclose(rank["evaluated"], one["evaluated"], atol=1e-4)
        np.testing.assert_array_equal(rank["evaluated"], found[0]["evaluated"])
        np.testing.assert_array_equal(rank["predictions"], one["predictions"])
        if "tokens" in one:
            np.testing.assert_array_equal(rank["tokens"], one["tokens"])
    assert {weight for what, weight, _ in held if what == "gradients"} >= set(one["gradients"])
    return one, found


LAYERS = {"num_hidden_layers": 4}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_two_stages(ranks, count):
    _, found = compare(ranks, "llama", {"pp": 2}, count, steps=3, changes={"num_hidden_layers": 5})
    for rank in found:
        idle, formula = rank["bubble"]
        assert 0 <= idle < 1 and formula == 1 / (count + 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_two_stages_with_two_chunks_each(ranks, count):
    compare(ranks, "qwen2", {"pp": 2, "virtual": 2}, count, steps=2, changes={"num_hidden_layers": 5})


@pytest.mark.parametrize(
    "name", ["llama_bias_tied", "opt_350m", "gemma2", "chatglm", "baichuan2_13b", "gpt2", "qwen_ntk"]
)
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_what_a_family_needs_travels(ranks, name, kind):
    compare(ranks, name, {"pp": 2}, 3, kind=kind)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_routers_are_balanced_over_all_stages(ranks, name):
    options = {"changes": LAYERS}
    compare(ranks, name, {"pp": 2}, 3, **options)
    compare(ranks, name, {"pp": 2, "virtual": 2}, 2, **options)


LORA = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize(
    "adapter",
    [
        LORA,
        {**LORA, "dropout": 0.3},
        {**LORA, "dora": True},
        {**LORA, "targets": r".*layers\.[23]\..*"},  # nothing to learn on the first stage
        {**LORA, "targets": r".*layers\.0\..*"},
        {"tokens": 3},
        {"tokens": 3, "projection": True},
    ],
    ids=lambda adapter: "-".join(map(str, list(adapter)[1:] or ["prefix"])),
)
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters(ranks, adapter, recompute):
    options = {"adapter": adapter, "changes": LAYERS, "options": {"recompute": recompute}, "steps": 2}
    compare(ranks, "llama_bias_tied", {"pp": 2}, 3, **options)


@pytest.mark.parametrize("scheme", ["w4_groups", "w8_shuffled"])
def test_lora_on_integers(ranks, tmp_path, scheme):
    folder = str(tmp_path / scheme)
    formats.weights.save_pretrained(quantized(scheme, "bias_tied")[0], folder)
    compare(ranks, scheme, {"pp": 2}, 2, adapter=LORA, folder=folder)


def test_a_prefix_where_distances_count(ranks):
    for name in ("bloom", "gemma2"):  # one sample a row, and no padding on the left
        compare(ranks, name, {"pp": 2}, 2, adapter={"tokens": 3}, kind="padded", generate=False)


def test_noise_on_embeddings(ranks):
    compare(ranks, "llama", {"pp": 2}, 3, options={"neftune_noise_alpha": 5.0})


@pytest.mark.parametrize(
    "degrees",
    [
        {"pp": 4},
        {"pp": 2, "dp": 2},
        {"pp": 2, "tp": 2},
        {"pp": 2, "tp": 2, "sequence_parallel": True},
        {"pp": 2, "tp": 2, "virtual": 2},
        {"pp": 2, "sep": 2},
        {"pp": 2, "sep": 2, "context": True},
    ],
    ids=lambda degrees: "".join(f"{k}{v}" for k, v in degrees.items()),
)
@pytest.mark.sweep(keep=1)
def test_four_ranks(ranks, degrees):
    compare(ranks, "llama_bias_tied", degrees, 5, steps=2, changes=LAYERS, kind="padded")


@pytest.mark.sweep(keep=0)
def test_four_ranks_of_experts_and_adapters(ranks):
    compare(ranks, "mixtral", {"pp": 2, "dp": 2}, 3, changes=LAYERS)
    compare(ranks, "llama", {"pp": 4}, 2, changes=LAYERS, adapter={"tokens": 3})
    compare(ranks, "opt_350m", {"pp": 2, "tp": 2}, 2, changes=LAYERS, adapter={**LORA, "dropout": 0.3})
    compare(ranks, "baichuan_7b", {"pp": 2, "tp": 2}, 2)  # a head of its own


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_family(ranks, name):
    compare(ranks, name, {"pp": 2}, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees", [{"pp": 4}, {"pp": 4, "virtual": 2}, {"pp": 2, "virtual": 4}, {"pp": 2, "dp": 2, "virtual": 2}]
)
@pytest.mark.parametrize("count", [1, 3, 4, 6, 9])
def test_deep_pipelines(ranks, degrees, count):
    if degrees.get("dp") and count < 2:
        count = 2
    compare(ranks, "llama_bias_tied", degrees, count, changes={"num_hidden_layers": 9})


# ============================================================================================== what a stage has


@pytest.mark.parametrize("name", ["llama", "llama_bias_tied", "opt_350m", "mixtral"])
def test_a_stage_knows_what_it_has_not(ranks, name):
    whole, _, _ = jobs_pipeline.held(name, {})
    found = ranks(2).run("jobs_pipeline:held", name, {"pp": 2})
    for here, elsewhere, _ in found:
        assert here | elsewhere == whole and not here & elsewhere
    first, last = (set(paths) for *_, paths in found)
    tied = tiny_models.config(name).tie_word_embeddings
    assert first & last == ({"embed_tokens.weight"} if tied else set())
    assert {path.split(".")[1] for path in first if path.startswith("layers.")}.isdisjoint(
        path.split(".")[1] for path in last if path.startswith("layers.")
    )


@pytest.mark.parametrize("case", ["llama_bias_tied", "opt_350m"])
def test_only_a_stages_own_weights_are_read(ranks, tmp_path, case):
    folder = tiny_models.write(tmp_path / "model", case)
    assert_parts(ranks(2).run("jobs_pipeline:loaded", str(folder), {"pp": 2}), folder)


@pytest.mark.parametrize("case", ["gpt_qkv", "qwen2_moe", "opt_350m"])
def test_folders_of_paddlenlp(ranks, tmp_path, case):
    theirs, ours = paddlenlp_folder(tmp_path, case)
    assert_parts(ranks(2).run("jobs_pipeline:loaded", str(theirs), {"pp": 2}), ours)


def assert_parts(found, folder):
    """Every stage has some weights of the folder's model, and all of them have all."""
    whole = {w.name: w.to_numpy() for w in formats.weights.named_weights(adapters.from_pretrained(folder))}
    for weights, _ in found:
        assert set(weights) < set(whole)
        for name, array in weights.items():
            np.testing.assert_array_equal(array, whole[name])
    assert set().union(*(weights for weights, _ in found)) == set(whole)


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_an_adapter_is_loaded_by_stages(ranks, tmp_path, adapter):
    folder = tiny_models.write(tmp_path / "model", "llama")
    model = adapters.from_pretrained(folder)
    jobs_pipeline.adapted(model, LORA if adapter == "lora" else {"tokens": 3}, parallel.SINGLE)
    adapters.save_adapter(model, tmp_path / "adapter")
    wanted = {w.name: w.to_numpy() for w in adapters.adapter_weights(model)}
    found = ranks(2).run("jobs_pipeline:loaded", str(folder), {"pp": 2}, str(tmp_path / "adapter"))
    assert set().union(*(weights for weights, _ in found)) >= set(wanted)
    for weights, targets in found:
        assert adapter == "prefix" or targets == model.lora_config["target_modules"]
        for name in set(weights) & set(wanted):
            np.testing.assert_array_equal(weights[name], wanted[name])


def test_a_call_with_gradients_says_what_to_do(ranks):
    with pytest.raises(RuntimeError, match=r"a pipeline is trained by parallel.forward_backward\(\)"):
        Ranks(2).run("jobs_pipeline:plain_call", {"pp": 2})


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_neighbor_is_waited_for(ranks, slow):
    found = ranks(2).run("jobs_pipeline:slow_neighbor", {"pp": 2}, slow, 40)
    np.testing.assert_array_equal(found[0][0], found[1][0])


# ======================================================================================================= scripts

RUN = {"overwrite_output_dir": True, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3,
       "do_train": True, "do_eval": True, "disable_tqdm": True, "gradient_accumulation_steps": 4}  # fmt: skip
SFT = {"model_name_or_path": "demo/llama", "dataset_name_or_path": "demo/sft", "src_length": 128, "max_length": 256,
       "per_device_train_batch_size": 1, "zero_padding": True, "max_evaluate_steps": 2,
           "max_new_tokens": 6}  # fmt: skip
PAIRS = {"model_name_or_path": "demo/llama", "train_dataset_path": "demo/preference",
    "dev_dataset_path": "demo/preference",
         "max_seq_len": 300, "max_prompt_len": 128, "max_new_tokens": 6, "max_evaluate_steps": 2,
         "per_device_train_batch_size": 1}  # fmt: skip
CORPUS = {"model_name_or_path": "demo/llama", "input_dir": str(ROOT / "demo/pretrain/corpus"), "max_seq_length": 128,
          "per_device_train_batch_size": 2, "max_evaluate_steps": 2}  # fmt: skip
SCRIPTS = {
    "pretrain": ("pretrain", CORPUS),
    "sft": ("finetune", SFT),
    "sft_padded": ("finetune", {**SFT, "zero_padding": False, "per_device_train_batch_size": 3}),
    "lora": ("finetune", {**SFT, "lora": True, "lora_dropout": 0.1}),
    "dpo": ("dpo", PAIRS),
    "dpo_lora": ("dpo", {**PAIRS, "lora": True}),
}


@pytest.mark.parametrize("case", SCRIPTS)
@pytest.mark.sweep(keep=1)
def test_a_script_on_two_stages(ranks, tmp_path, case):
    script, keys = SCRIPTS[case]
    keys = {**RUN, **keys}

    def run(world, **more):
        argv = [word for key, value in {**keys, **more}.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
        folder = tmp_path / str(world)
        rows, printed = ranks(world).run("jobs_parallel:script", script, [*argv, "--output_dir", str(folder)])[-1]
        printed = printed[printed.rfind("\ndev: ") + 1 : printed.rfind("next: ")]
        return rows, json.loads((folder / "dev_results.json").read_text()), printed

    (one, metrics, shown), (two, found, also) = run(1), run(2, pipeline_parallel_degree=2)
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4
        )
        assert "bubble" not in a and 0 < b["bubble"] < 1 and b["bubble_formula"] == 0.2
        for figure in set(a) & {"rewards/margins", "logps/chosen", "dpo_loss", "sft_loss"}:
            assert b[figure] == pytest.approx(a[figure], rel=1e-4, abs=1e-6)
    assert found == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert shown.splitlines()[1:] == also.splitlines()[1:]  # the answers of the trained model
