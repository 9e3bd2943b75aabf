"""recompute_granularity and no_recompute_layers: the same bits as without, less memory.

    python -m pytest tests/test_recompute.py            # half a minute; --slow: every family

full keeps the input of a block. full_attn keeps of attention what it reads, the normed hidden states, and what it
gives. core_attn keeps the outputs of the first linears (of DeepSeek's latent attention those of the last before the
heads meet) and what attention gives, and drops rotated queries and keys, the mixed values and their log-sum-exp;
rotation, attention and the last linear are computed again."""

import json
import types

import jobs_tensor
import numpy as np
import pytest
import tiny_models
from pool import Ranks
from test_tensor import compare

import dpo
import finetune
import formats.weights
import model as M
import parallel
import pretrain
import trainer
from arguments import parse_args
from formats.files import UserError
from planning.memory_model import dry_run

pytestmark = pytest.mark.sweep(keep=3)

GRANULARITIES = ("full", "full_attn", "core_attn")
NAMES = (
    "llama_mqa",
    "qwen3",
    "bloom_post",
    "chatglm",
    "gemma2",
    "deepseek_v3",
    "mixtral",
    "gpt2",
    "baichuan2_13b",
)  # every norm_place


def losses_and_gradients(name, kind="full", packed=True, granularity=None, kept=()):
    model = tiny_models.build(name)
    jobs_tensor.adapt(model, kind)
    if granularity is not None:
        trainer.set_recompute(
            model,
            types.SimpleNamespace(recompute=True, recompute_granularity=granularity, no_recompute_layers=list(kept)),
        )
    rows, gradients = jobs_tensor.train(
        model, parallel.SINGLE, [jobs_tensor.batch(name, 1, packed)], 2, recompute=granularity or False
    )
    return rows, gradients


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """jobs_tensor.train() takes a model that knows its topology."""
    monkeypatch.setattr(M.CausalLM, "topology", parallel.SINGLE, raising=False)


def check_same_bits(name, kind, packed=True):
    expected, wanted = losses_and_gradients(name, kind, packed)
    for granularity in GRANULARITIES:
        rows, found = losses_and_gradients(name, kind, packed, granularity)
        if (name, granularity) == (
            "qwen2_moe",
            "full",
        ):  # four layers read its MLP's input: sums of their gradients in another order
            assert np.allclose(rows, expected, rtol=1e-5)
            continue
        assert rows == expected, granularity
        assert found.keys() == wanted.keys()
        assert [key for key in found if not np.array_equal(found[key], wanted[key])] == [], granularity


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name):
    check_same_bits(name, "full")


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_the_same_bits_of_every_family(name, packed):
    check_same_bits(name, "full", packed)


@pytest.mark.parametrize("kind", ["lora", "dropout", "dora", "prefix", "projection", "neftune"])
@pytest.mark.parametrize("name", ["llama", "baichuan_13b"])
def test_the_same_bits_of_adapters(name, kind):
    """Dropout draws the same mask again; a prefix's keys and values are inputs."""
    check_same_bits(name, kind, packed=name == "llama" or kind not in ("prefix", "projection"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layers_that_keep_theirs(granularity, monkeypatch):
    """no_recompute_layers: of three blocks the first and the last are run once, the other twice."""
    model = tiny_models.build("deepseek_v2")
    model.train()
    trainer.set_recompute(
        model, types.SimpleNamespace(recompute=True, recompute_granularity=granularity, no_recompute_layers=[0, 2])
    )
    runs = [0, 0, 0]
    for i, block in enumerate(model.layers):
        original = block.attention.apply_rotary
        monkeypatch.setattr(
            block.attention,
            "apply_rotary",
            lambda *a, i=i, original=original: runs.__setitem__(i, runs[i] + 1) or original(*a),
        )
    model(**trainer.model_inputs(jobs_tensor.batch("deepseek_v2", 0))).sum().backward()
    assert runs == [1, 2, 1]
    model.eval()
    model(**trainer.model_inputs(jobs_tensor.batch("deepseek_v2", 0))).sum().backward()
    assert runs == [2, 3, 2], "without training nothing is computed again"


MEASURE = """
import json, sys
import numpy as np, paddle
sys.path[:0] = ["tests", "tests/golden", "tests/ranks"]
import tiny_models, kernels, trainer
import model as M
kernels.configure("cpu")
T, changes, found = 2048, json.loads(sys.argv[1]), {}
count = lambda: paddle.base.core.host_memory_stat_current_value("Allocated", 0)
model = tiny_models.fill(M.build(tiny_models.config("llama", **changes)))
model.train()
ids = paddle.to_tensor(np.random.default_rng(0).integers(3, 57, [1, T]))
def run(T):
    before = count()
    losses = model(ids[:, :T], labels=ids[:, :T])
    kept = count() - before
    losses.sum().backward()
    return kept
run(64)
for model.recompute, model.recompute_granularity in ((False, "none"), (True, "core_attn"), (True, "full_attn"),
    (True, "full")):
    found[model.recompute_granularity] = run(T)
model.no_recompute_layers = frozenset([1])
found["all but one"] = run(T)
print(json.dumps(found))
"""


def test_memory_by_granularity(run_python, tmp_path):
    """Kept for backward after a forward of 2,048 tokens, and the same by the dry run's formula."""
    changes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": 4,
        "max_position_embeddings": 2048,
    }
    found = run_python(MEASURE, json.dumps(changes))
    assert found["full"] < found["all but one"] < found["full_attn"] < found["core_attn"] < found["none"], found
    tokens_and_layers = 4 * 2048 * 4  # bytes of a float of every token and layer
    assert found["none"] - found["core_attn"] == pytest.approx(
        tokens_and_layers * (64 + 8), rel=0.02
    )  # mixed values, and lse
    assert found["none"] - found["full_attn"] == pytest.approx(
        tokens_and_layers * (4 * 64 + 8), rel=0.02
    )  # and q, k, v
    formats.weights.save_pretrained(tiny_models.build("llama", **changes), tmp_path)

    def said(**keys):
        argv = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        argv += f"--model_name_or_path {tmp_path} --dry_run true --per_device_train_batch_size 1".split()
        argv += "--max_seq_length 2048 --recompute true".split()
        lines = dry_run(parse_args(pretrain.Args, argv)).splitlines()
        return {
            line.strip().rpartition("  ")[0].strip(): float(line.split()[-1].replace(",", "")) * 1e6
            for line in lines
            if line.startswith("  activations")
        }

    one_block = (
        said()["activations without recompute"] - 2 * 4 * 64 * 2048
    ) / 4  # but for the embeddings and the last norm
    for name, keys in {
        "full": {},
        "full_attn": {"recompute_granularity": "full_attn"},
        "core_attn": {"recompute_granularity": "core_attn"},
        "all but one": {"no_recompute_layers": 1},
    }.items():
        made = {"full_attn": 4 * 4 * 64 * 2048, "core_attn": 4 * 64 * 2048}.get(
            name, one_block
        )  # of one block, in backward
        assert said(**keys)["activations with recompute"] - made == pytest.approx(found[name], rel=0.1), name


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.sweep(keep=0)
def test_beside_parallelism(two):
    """What is computed again talks to other ranks again."""
    ways = ({"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"sep": 2}, {"sep": 2, "context": True})
    compare(
        two,
        [
            ("llama", {"degrees": way, "recompute": granularity, "packed": True, "steps": 2, "kind": kind})
            for way in ways
            for granularity, kind in zip(GRANULARITIES[1:], ("dropout" if "tp" in way else "lora", "full"))
        ],
    )


@pytest.mark.parametrize("script", [pretrain, finetune, dpo])
def test_keys(script, tmp_path):
    keys = "--recompute true --recompute_granularity core_attn --no_recompute_layers"
    argv = f"--dry_run true --model_name_or_path demo/llama --output_dir {tmp_path} {keys}"
    for value in ("0,2", "0 2"):
        args = parse_args(script.Args, [*argv.split(), *value.split()])
        assert (args.recompute_granularity, args.no_recompute_layers) == ("core_attn", [0, 2])
    (tmp_path / "c.json").write_text(json.dumps({"no_recompute_layers": [1]}))
    assert parse_args(
        script.Args, [str(tmp_path / "c.json"), *"--dry_run true --model_name_or_path demo/llama".split()]
    ).no_recompute_layers == [1]
    for value in ("a", "1.5", "-1"):
        with pytest.raises(UserError, match="no_recompute_layers"):
            parse_args(script.Args, [*argv.split(), value])
    (tmp_path / "c.json").write_text(json.dumps({"no_recompute_layers": ["1"]}))
    with pytest.raises(UserError, match="a list of whole numbers"):
        parse_args(script.Args, [str(tmp_path / "c.json"), *"--dry_run true --model_name_or_path demo/llama".split()])


def test_a_layer_that_is_not_there():
    model = tiny_models.build("llama")
    with pytest.raises(UserError, match="no_recompute_layers: 2; the model has 2 layers, counted from 0"):
        trainer.set_recompute(
            model, types.SimpleNamespace(recompute=True, recompute_granularity="full", no_recompute_layers=[0, 2])
        )
