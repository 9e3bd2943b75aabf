"""Sharding stages 1 to 3 on 2 and 4 processes: every loss, norm, gradient, moment and weight is one process's.

python -m pytest tests/test_sharding.py              # about a minute on two cores
python -m pytest tests/test_sharding.py --slow       # every family's kind, four ranks on every mixture of axes
"""

import json

import jobs_sharding
import numpy as np
import pytest
from conftest import ROOT

from distributed.sharding import ALIGNED, Bucket, GradReduction, unit_of
from parallel import Degrees, Topology

pytestmark = pytest.mark.sweep(keep=2)

# Of a tiny model: what is trained, and what else happens. Batches are of odd lengths, other ones on every rank; five
# and nine of a step leave some ranks a batch for company alone. Clipping, decay and LoRA+ are always on.
CASES = {
    "full": ("llama", {"micro": 5, "steps": 10}),
    "recompute": ("llama", {"recompute": True}),
    "tied": ("llama_bias_tied", {"micro": 3, "recompute": True}),
    "lora": ("llama", {"adapter": "lora"}),
    "dropout": ("llama", {"adapter": "dropout", "micro": 5}),
    "dropout_recompute": ("llama", {"adapter": "dropout", "recompute": True}),
    "prefix": ("llama", {"adapter": "prefix"}),
    "experts": ("qwen2_moe", {"micro": 3}),
    "experts_recompute": ("mixtral", {"recompute": True}),
    "experts_lora": ("qwen2_moe", {"adapter": "lora", "micro": 3}),
    "unused_experts": ("mixtral", {"micro": 1, "num_local_experts": 40}),
    "integers_lora": ("integers", {"adapter": "lora"}),
}
MORE = {
    "dora": ("llama", {"adapter": "dora"}),
    "learned_positions": ("opt_350m", {}),
    "two_positions": ("chatglm", {}),
    "fused": ("chatglm2", {"adapter": "lora", "recompute": True}),
    "latent": ("deepseek_v2", {"micro": 3}),
    "post_norms": ("gemma2", {}),
    "alibi": ("bloom", {"adapter": "prefix"}),
    "z_loss": ("baichuan2_13b", {}),
}
AXES = [
    {"sharding": 4, "stage": 2},
    {"dp": 2, "sharding": 2, "stage": 1},
    {"dp": 2, "sharding": 2, "stage": 3},
    {"tp": 2, "sharding": 2, "stage": 2},
    {"tp": 2, "sharding": 2, "stage": 3},
]
MORE_AXES = [
    {"dp": 2, "tp": 2},
    {"sharding": 4, "stage": 3},
    {"tp": 2, "sharding": 2, "stage": 1},
    {"tp": 2, "sharding": 2, "stage": 2, "sequence_parallel": True},
    {"tp": 2, "sharding": 2, "stage": 3, "sequence_parallel": True},
    {"tp": 4},
]


ONE = {}


def one(name, **how):
    """The same on one process, this one."""
    key = name, tuple(sorted(how.items()))
    if key not in ONE:
        ONE[key] = jobs_sharding.train(name, {}, **how)
    return ONE[key]


def compare(found, expected, tolerance=1e-5):
    for key in ("losses", "norms"):
        np.testing.assert_allclose(found[key], expected[key], rtol=tolerance, err_msg=key)
    for key in ("gradients", "moments", "weights"):
        missing = {name for name in expected[key] if name not in found[key]}
        assert not missing, (key, missing)
        largest = max(np.abs(wanted).max() for wanted in expected[key].values())
        for name, wanted in expected[key].items():
            scale = max(np.abs(wanted).max(), 1e-2 * largest)  # that of a key's bias is 0, but for rounding
            assert np.abs(found[key][name] - wanted).max() <= 2 * tolerance * scale, (key, name)
    np.testing.assert_allclose(found["evaluated"], expected["evaluated"], rtol=10 * tolerance, atol=10 * tolerance)
    if "generated" in found:
        np.testing.assert_array_equal(found["generated"], expected["generated"])


def check(ranks, ways, name, how, tolerance=1e-5):
    expected = one(name, **how)
    assert expected["norms"][0] > jobs_sharding.ARGS["max_grad_norm"] or how.get("adapter"), "nothing is clipped"
    found = ranks.run("jobs_sharding:train", name, ways, **how)
    for rank in found[1:]:
        assert rank["losses"] == found[0]["losses"] and rank["norms"] == found[0]["norms"]
    compare(found[0], expected, tolerance)
    return found, expected


ALSO_STAGE_1 = ("full", "tied", "lora", "experts")


def stages(cases):
    """(case, stage): stages 1 and 2 differ in when they send alone."""
    return [
        pytest.param(case, stage, marks=pytest.mark.slow if stage == 1 and case not in ALSO_STAGE_1 else ())
        for case in cases
        for stage in (1, 2, 3)
    ]


@pytest.mark.parametrize("case, stage", stages(CASES))
def test_two_ranks_train_as_one_process(two, case, stage):
    name, how = CASES[case]
    found, expected = check(two, {"sharding": 2, "stage": stage}, name, how)
    moments = [rank["bytes"]["moments"] for rank in found]
    assert sum(moments) == expected["bytes"]["moments"]
    assert max(moments) <= 0.5 * sum(moments) + 2 * 4 * ALIGNED * 40  # even, but for the padding of 40 units at most
    weights = [rank["bytes"]["weights"] / expected["bytes"]["weights"] for rank in found]
    assert all(share < 0.54 for share in weights) if stage == 3 else weights == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", MORE)
def test_other_models_too(two, case, stage):
    check(two, {"sharding": 2, "stage": stage}, *MORE[case])


@pytest.mark.parametrize("case", ["full", "experts"])
def test_dp_without_sharding(two, case):
    found, _ = check(two, {"dp": 2}, *CASES[case])
    assert found[0]["bytes"]["gradients"] == 0


@pytest.mark.parametrize("ways", AXES, ids=str)
@pytest.mark.sweep(keep=1)
def test_four_ranks_train_as_one_process(four, ways):
    check(four, ways, "llama", {"micro": 9})


@pytest.mark.slow
@pytest.mark.parametrize("ways", AXES + MORE_AXES, ids=str)
@pytest.mark.parametrize("case", ["one_key_head", "one_key_head_lora", "experts", "prefix"])
def test_four_ranks_on_every_mixture(four, ways, case):
    one_key_head = {"num_key_value_heads": 1}  # it is with both ranks of tp, and counts once
    cases = {
        "one_key_head": ("llama", one_key_head),
        "one_key_head_lora": ("llama", {**one_key_head, "adapter": "lora"}),
    }
    check(four, ways, *(cases | CASES)[case], tolerance=2e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_twice_is_the_same_to_the_bit(two, stage):
    ways, how = {"sharding": 2, "stage": stage}, {"adapter": "dropout", "micro": 5}
    first, second = (two.run("jobs_sharding:train", "llama", ways, **how)[0] for _ in range(2))
    for key in ("gradients", "moments", "weights"):
        for name in first[key]:
            np.testing.assert_array_equal(first[key][name], second[key][name])
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]


def test_when_whole_gradients_are_gone(two):
    """What is left of them after each of a rank's two micro-batches."""
    for stage in (1, 2, 3):
        found = two.run("jobs_sharding:train", "llama", {"sharding": 2, "stage": stage}, steps=1)[0]
        assert found["whole gradients"] == ([found["bytes"]["weights"], 0] if stage == 1 else [0, 0]), stage


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_products_in_bfloat16(two, stage):
    """Trained weights stay float32. A sum in another order moves a product's operand to its neighbor in bfloat16 here
    and there."""
    for adapter in (None, "lora"):
        expected = one("llama", bf16=True, adapter=adapter)
        found = two.run("jobs_sharding:train", "llama", {"sharding": 2, "stage": stage}, bf16=True, adapter=adapter)[0]
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-4)
        np.testing.assert_allclose(found["norms"], expected["norms"], rtol=2e-3)
        for name, wanted in expected["gradients"].items():  # of the first step: the weights are still the same
            assert np.abs(found["gradients"][name] - wanted).max() <= 2e-5 * np.abs(wanted).max(), name


def test_offloaded_moments_give_the_same_numbers(two):
    """The copies to a device and back, on this one: there is no other."""
    ways = {"sharding": 2, "stage": 2}
    plain, moved = (two.run("jobs_sharding:train", "llama", ways, on_host=moved)[0] for moved in (False, True))
    for key in ("moments", "weights"):
        for name in plain[key]:
            np.testing.assert_array_equal(plain[key][name], moved[key][name])


def test_whole_values_become_pieces_again(two):
    assert two.run("jobs_sharding:set_and_take_over", {"sharding": 2, "stage": 3}) == [[], []]


def test_a_script_with_sharding_and_offload(two, tmp_path):
    argv = """--dataset_name_or_path demo/sft --model_name_or_path demo/llama --do_train true --zero_padding true
              --max_length 128 --src_length 64 --max_steps 3 --logging_steps 1 --save_strategy no --learning_rate 1e-3
              --lora true --lora_plus_scale 4
              --per_device_train_batch_size 1 --disable_tqdm true""".split()
    sharded = ["--sharding", "stage2 offload", "--sharding_parallel_degree", "2", "--gradient_accumulation_steps", "2"]
    rows, printed = two.run(
        "jobs_parallel:script", "finetune", [*argv, *sharded, "--output_dir", str(tmp_path / "two")]
    )[0]
    import jobs_parallel

    alone, _ = jobs_parallel.script(
        "finetune", [*argv, "--gradient_accumulation_steps", "4", "--output_dir", str(tmp_path / "one")]
    )
    assert printed.count("offload has no effect") == 1
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[key] for row in rows[:3]], [row[key] for row in alone[:3]], rtol=1e-5)


@pytest.mark.parametrize("more", [[], ["--sharding", "stage3"]], ids=["dp2", "stage3"])
def test_answers_are_shared_out(two, tmp_path, more):
    """Two batches of prompts: the same answers and scores as of one process; with stage 3 nobody works alone."""
    for split, count in (("train", 4), ("dev", 40)):
        lines = (ROOT / "demo" / "sft" / f"{split}.json").read_text().splitlines()[:count]
        (tmp_path / f"{split}.json").write_text("\n".join(lines) + "\n")
    argv = f"""--dataset_name_or_path {tmp_path} --model_name_or_path demo/llama --do_train false --do_eval true
               --max_length 128 --src_length 64 --max_new_tokens 4 --eval_with_do_generation true
               --save_generation_output true
               --disable_tqdm true""".split()
    import jobs_parallel

    folders = tmp_path / "two", tmp_path / "one"
    two.run("jobs_parallel:script", "finetune", [*argv, *more, "--output_dir", str(folders[0])])
    jobs_parallel.script("finetune", [*argv, "--output_dir", str(folders[1])])
    of_two, of_one = ((folder / "generated_output.json").read_text() for folder in folders)
    assert of_two == of_one and of_one.count("\n") >= 40
    scores = [json.loads((folder / "dev_results.json").read_text()) for folder in folders]
    assert scores[0].keys() == scores[1].keys() and scores[0]["eval_bleu4"] == scores[1]["eval_bleu4"]


class _Shape:
    """Of a parameter that has only that."""

    def __init__(self, *shape):
        self.shape, self.dtype, self.grad = list(shape), "float32", None


@pytest.mark.parametrize("ways", [2, 3, 8])
def test_ranges_are_even_and_meet_every_element_once(ways):
    shapes = [(7, 5), (1,), (33,), (64, 3), (129,), (2, 2)]
    seen, widths = [np.zeros(np.prod(s), int) for s in shapes], set()
    for rank in range(ways):
        axis = Topology(Degrees(sharding=ways), rank).sharding
        bucket = Bucket([_Shape(*s) for s in shapes], list("abcdef"), GradReduction((), axis, (), True), 2)
        widths.add(bucket.width)
        for index, mine in enumerate(seen):
            if extent := bucket.extent(index):
                first, last, place = extent
                mine[first:last] += 1
                assert 0 <= place and place + last - first <= bucket.width
                assert bucket.starts[index] % ALIGNED == 0
    assert len(widths) == 1 and all((count == 1).all() for count in seen)
    elements = sum(len(count) for count in seen)
    assert widths.pop() * ways - elements < ALIGNED * (len(shapes) + ways)


def test_units():
    names = {
        "layers.11.mlp.experts.3.up_proj.weight": "layers.11",
        "layers.1.attention.q_proj.lora_A": "layers.1",
        "norm.weight": "norm",
        "embed_tokens.weight": "embed",
        "embed_positions.weight": "embed",
        "project_in.weight": "embed",
        "embed_norm.bias": "embed",
        "lm_head.weight": "head",
        "project_out.weight": "head",
        "prefix.hidden.weight": "prefix",
    }
    assert {name: unit_of(name, False) for name in names} == names
    assert unit_of("embed_tokens.weight", True) == "embed_tokens" != unit_of("embed_norm.bias", True)
