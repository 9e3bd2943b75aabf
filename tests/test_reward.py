"""reward.py: pairs with scores, whole runs, resume, and what transformers reads of the result.

    python -m pytest tests/test_reward.py                                # CPU, no torch, about 30 s
    python -m pytest tests/test_reward.py --hf-python PYTHON             # and transformers and peft open what it wrote

The loss is compared with TRL's in test_rl.py.
"""

import json
import re

import numpy as np
import paddle
import pytest
import tiny_models
from test_scripts import assert_same, crash_after_saving, fails, losses, options, write_model, write_records
from test_scripts import rows as logged

import parallel
import reward
import trainer
from alignment import heads, rollouts
from formats.tensor_files import read_safetensors
from formats.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """base/, train.jsonl and dev.jsonl: the reply that says "red" is the better one."""
    world = tmp_path_factory.mktemp("reward")
    write_model(world / "base")
    words = "lamp shirt chair table coat bag desk shoe hat cup".split()
    records = [
        {
            "src": f"a {word}",
            "response": [f"a red {word}", f"a blue {word}"][:: 1 - 2 * (i % 2)],
            "sort": [1 - i % 2, i % 2],
        }
        for i, word in enumerate(words)
    ]
    write_records(world / "train.jsonl", records)
    write_records(world / "dev.jsonl", [{**record, "margin": 0.5} for record in records[:4]])
    return world


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("logger.draw_curves", lambda folder: None)


def keys_of(world, output_dir, **changes):
    keys = {
        "model_name_or_path": str(world / "base"),
        "train_dataset_path": str(world / "train.jsonl"),
        "dev_dataset_path": str(world / "dev.jsonl"),
        "output_dir": str(output_dir),
        "do_train": True,
        "do_eval": True,
        "max_seq_len": 64,
        "max_prompt_len": 16,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return keys | changes


def run(keys):
    path = keys["output_dir"] + ".json"
    with open(path, "w") as file:
        json.dump(keys, file)
    trainer.run_script(reward.main, reward.Args, [path])


def score_alone(model, ids):
    x = model.hidden_states(paddle.to_tensor(np.array([ids], np.int64)))
    return paddle.matmul(x[0, -1:], model.score.weight).item()


def test_packed_pairs_have_the_scores_of_single_replies(world):
    args = reward.Args(**keys_of(world, world / "none", greedy_zero_padding=True))
    loader = reward.make_loader(args, load_tokenizer(world / "base"), "dev")
    model = heads.load_reward_model(world / "base", parallel.SINGLE, seed=3)
    batch = loader.batch(0, 0)
    scores = reward.scores_of_replies(heads.ScoreModel(model)(**reward.model_inputs(batch)), batch)
    pairs = [loader.dataset.pair(i) for row in batch["sample_ids"] for i in row]
    expected = [[score_alone(model, [*prompt, *reply]) for reply in replies] for prompt, *replies in pairs]
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)
    assert reward.margins_of(loader.dataset, batch).tolist() == [0.5] * 4
    assert max(loader.dataset.lengths) <= args.max_seq_len


@pytest.mark.parametrize("name, limit", [("bloom", 0), ("mistral", 8)])
def test_long_pairs_have_their_prompt_twice_where_distances_count(name, limit, world, tmp_path):
    """Bloom, and Mistral with a window of 8: the scores of single replies, within the same length of rows."""
    changes = {"vocab_size": 3072} | ({"sliding_window": limit} if limit else {})
    tiny_models.write(tmp_path / "model", name, **changes)
    assert trainer.share_within(tmp_path / "model", "max_seq_len", 300) == limit
    args = reward.Args(**keys_of(world, world / "none", greedy_zero_padding=True))
    loader = reward.make_loader(args, load_tokenizer(world / "base"), "dev", limit)
    model = heads.load_reward_model(tmp_path / "model", parallel.SINGLE, seed=3)
    batch = loader.batch(0, 0)
    scores = reward.scores_of_replies(heads.ScoreModel(model)(**reward.model_inputs(batch)), batch)
    pairs = [loader.dataset.pair(i) for row in batch["sample_ids"] for i in row]
    expected = [[score_alone(model, [*prompt, *reply]) for reply in replies] for prompt, *replies in pairs]
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)
    assert max(loader.dataset.lengths) <= args.max_seq_len and all(sum(map(len, pair)) > limit for pair in pairs)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_learns_its_pairs_and_is_a_reward_model(kind, world, tmp_path, capfd):
    run(keys_of(world, tmp_path / "out", lora=kind == "lora", center_rewards_coefficient=0.01, max_steps=12))
    assert losses(tmp_path / "out")[-1] < 0.5 * losses(tmp_path / "out")[0]
    results = json.loads((tmp_path / "out" / "dev_results.json").read_text())
    assert results["eval_accuracy"] == 1.0 and results["eval_margin"] > 0 and results["eval_std_reward"] > 0
    assert "larger score: before" in capfd.readouterr().out
    found = {name for path in (tmp_path / "out").glob("*.safetensors") for name in read_safetensors(path)}
    if kind == "full":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"] and config["id2label"] == {"0": "LABEL_0"}
        assert "score.weight" in found and not any("lm_head" in name for name in found)
    else:
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
        assert "base_model.model.score.weight" in found
    # rl.py reads it: the same scores as the one that was trained, packed or alone
    tokenizer = load_tokenizer(world / "base")
    model = rollouts.RewardModel(tmp_path / "out", tokenizer, parallel.SINGLE)
    replies = [tokenizer.encode(text, False) + [2] for text in ("a red lamp", "a blue lamp", "red")]
    prompts = [np.array(tokenizer.encode(text)) for text in ("a lamp", "the table")]
    groups = [rollouts.Group(i, p, [rollouts.Reply(r, None, "") for r in replies]) for i, p in enumerate(prompts)]
    expected = [score_alone(model.model.model, [*p, *r]) for p in prompts for r in replies]
    np.testing.assert_allclose(model.scores(groups), expected, atol=1e-5)
    assert expected[0] > expected[1]


def test_resume_is_bitwise(world, tmp_path):
    for kind in ("full", "lora"):
        whole, parts = tmp_path / f"whole {kind}", tmp_path / f"parts {kind}"
        common = {"lora": kind == "lora", "do_eval": False}
        run(keys_of(world, whole, **common))
        common |= {"save_strategy": "steps", "save_steps": 3}
        with crash_after_saving(3):
            run(keys_of(world, parts, **common))
        run(keys_of(world, parts, **common, resume_from_checkpoint=True))
        assert_same(parts, whole)


@pytest.mark.sweep(keep=1)
@pytest.mark.parametrize("changes", [{}, {"sharding": "stage2"}, {"tensor_parallel_degree": 2}], ids=str)
def test_two_ranks_equal_one_process(changes, two, world, tmp_path):
    alone = keys_of(world, tmp_path / "alone", center_rewards_coefficient=0.1)
    if "tensor_parallel_degree" not in changes:  # one micro-batch on each rank
        changes = {**changes, "per_device_train_batch_size": 1}
    run(alone)
    keys = {**alone, **changes, "output_dir": tmp_path / "ranks", "logging_steps": 1}
    ((theirs, *_), *_) = two.run("jobs_parallel:script", "reward", options(keys))
    ours = logged(tmp_path / "alone")
    for name in ("loss", "grad_norm", "accuracy", "margin"):
        found = [[row[name] for row in rows if name in row] for rows in (ours, theirs)]
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_train": False}, r"base: has no score head; reward.py makes"),
        ({"max_seq_len": 3}, r"max_seq_len: 3; it must be at least 4"),
        ({"train_dataset_path": "margin.jsonl"}, r"margin.jsonl:[123]: 'margin' must be a number, found 'big'"),
        ({"pipeline_parallel_degree": 2}, r"pipeline_parallel_degree"),
        ({"process_reward": True}, r"process_reward"),
    ],
)
def test_bad_input(changes, message, world, tmp_path, capfd):
    record = {"src": "a", "response": ["b", "c"], "sort": [1, 0], "margin": "big"}
    write_records(tmp_path / "margin.jsonl", [record] * 3)
    changes = {key: str(tmp_path / value) if value == "margin.jsonl" else value for key, value in changes.items()}
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(keys_of(world, tmp_path / "out", **changes)))
    assert re.search(message, fails(reward, [path], capfd))


HF = """
import torch
from transformers import AutoModelForSequenceClassification
folder, adapter, ids = sys.argv[2], sys.argv[3], [int(i) for i in sys.argv[4].split(",")]
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
model.config.pad_token_id = 0
with torch.no_grad():
    arrays = {"full": model(torch.tensor([ids])).logits.numpy()}
from peft import PeftModel
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[5], num_labels=1)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    arrays["lora"] = model(torch.tensor([ids])).logits.numpy()
"""


@pytest.mark.torch
def test_transformers_and_peft_give_the_same_scores(hf_python, world, tmp_path):
    ids, expected = [5, 9, 300, 41, 2], {}
    for kind in ("full", "lora"):
        run(keys_of(world, tmp_path / kind, lora=kind == "lora", max_steps=4, do_eval=False))
        model = heads.load_reward_model(tmp_path / kind, parallel.SINGLE)
        expected[kind] = score_alone(model, ids)
    theirs = hf_python(HF, tmp_path / "full", tmp_path / "lora", ",".join(map(str, ids)), world / "base")
    for kind, score in expected.items():
        assert abs(theirs[kind].item() - score) < 1e-5, kind
