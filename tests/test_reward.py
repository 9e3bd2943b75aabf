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
from alignment import heads, process_rewards, rollouts
from formats.files import UserError
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


# ------------------------------------------------------------------------------------------------- process rewards


def write_solutions(folder, placeholder):
    """steps.jsonl and dev.jsonl in PaddleNLP's format: a step that says "red" is right."""
    words, records = "lamp shirt chair table coat bag desk shoe".split(), []
    for i, word in enumerate(words):
        steps = [f"a {color} {word}" for color in ("red", "blue", "red")[: 1 + i % 3][:: 1 - 2 * (i % 2)]]
        texts = [
            "\n".join([f"colors of a {word}", *(f"{step} {mark(step)}" for step in steps)])
            for mark in (lambda step: placeholder, lambda step: "+" if "red" in step else "-")
        ]
        records.append(dict(zip(("src", "tgt"), texts)))
    for name in ("steps", "dev"):
        write_records(folder / f"{name}.jsonl", records)


def process_keys(world, folder, output_dir, placeholder="*", **changes):
    write_solutions(folder, placeholder)
    keys = {"process_reward": True, "placeholder_token": placeholder}
    keys |= {"train_dataset_path": f"{folder}/steps.jsonl", "dev_dataset_path": f"{folder}/dev.jsonl"}
    return keys_of(world, output_dir, **keys | changes)


def test_packed_solutions_have_the_losses_and_gradients_of_separate_passes(world, tmp_path):
    args = reward.Args(**process_keys(world, tmp_path, tmp_path / "none", greedy_zero_padding=True))
    task = process_rewards.StepTask(args, load_tokenizer(world / "base"))
    model, batch = task.load_model(parallel.SINGLE), task.make_loader("dev").batch(0, 0)
    steps = task.size_of([batch])
    loss, metrics = task.loss_and_metrics(model(**task.inputs(batch)), batch, steps, None)
    loss.backward()
    packed = {name: p.grad.numpy().copy() for name, p in model.model.named_parameters()}
    model.model.clear_gradients()
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    total, right, probabilities, good_bad = 0.0, 0, [], [task.tokenizer.encode(name, False)[-1] for name in "+-"]
    for record in records:
        ids, labels = (task.tokenizer.encode(record[key]) for key in ("src", "tgt"))
        logits = model.model(paddle.to_tensor(np.array([ids])))[0]  # (T, V)
        for t in (t for t, i in enumerate(ids) if i != labels[t]):
            logps = paddle.nn.functional.log_softmax(paddle.stack([logits[t, i] for i in good_bad]))
            label = good_bad.index(labels[t])
            total = total - logps[label] / steps
            right, probabilities = right + (int(logps.argmax()) == label), [*probabilities, float(logps[0].exp())]
    total.backward()
    assert steps == len(probabilities) == sum(record["src"].count("*") for record in records)
    assert abs(float(loss) - float(total)) < 1e-5 and metrics["accuracy"] == pytest.approx(right / steps)
    assert metrics["mean_reward"] == pytest.approx(np.mean(probabilities), abs=1e-5)
    for name, parameter in model.model.named_parameters():
        gradient = parameter.grad.numpy()
        assert abs(packed[name] - gradient).max() < 1e-5 * max(1, abs(gradient).max()), name


def test_steps_are_read_in_the_formats_of_paddlenlp_and_trl(world):
    tokens = process_rewards.RewardTokens(load_tokenizer(world / "base"), "*", "+,-")
    ours = tokens.parse({"src": ["1 + 1\n= 2 *\n= 3 *"], "tgt": ["1 + 1\n= 2 +\n= 3 -"]}, "x:1")
    theirs = tokens.parse({"prompt": "1 + 1", "completions": ["= 2", "= 3"], "labels": [True, False]}, "x:1")
    assert ours == theirs == ("1 + 1\n= 2 *\n= 3 *", [0, 1])
    for record, message in (
        ({"src": "a *\nb *", "tgt": "a +\nb ?"}, r"x:1: 'tgt' differs .* number 2: .*one of \+, -"),
        ({"src": "a *", "tgt": "b +"}, r"x:1: 'tgt' differs .* number 1"),
        ({"src": "a *"}, r"x:1: 'src' and 'tgt' are needed"),
        ({"prompt": "a", "completions": ["b"], "labels": []}, r"x:1: .*one label for each"),
    ):
        with pytest.raises(UserError, match=message):
            tokens.parse(record, "x:1")
    with pytest.raises(UserError, match=r"placeholder_token: 'ки' is 5 tokens here; add_tokens: ки makes it one"):
        process_rewards.RewardTokens(load_tokenizer(world / "base"), "ки", "+,-")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_process_rewards_are_learned_and_resumed_bitwise(kind, world, tmp_path, capfd):
    """Full training with the placeholder of PaddleNLP, which is a new token here."""
    more = {"lora": True, "do_eval": False} if kind == "lora" else {"placeholder": "ки", "add_tokens": "ки"}
    more |= {"max_steps": 30, "save_steps": 20, "lr_scheduler_type": "constant"}
    run(process_keys(world, tmp_path, tmp_path / "whole", **more))
    if kind == "full":
        results = json.loads((tmp_path / "whole" / "dev_results.json").read_text())
        assert results["eval_accuracy"] == 1.0 and results["eval_steps"] == 15
        assert "dev steps whose label is the likelier one: before" in capfd.readouterr().out
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
    with crash_after_saving(20):
        run(process_keys(world, tmp_path, tmp_path / "parts", **more, save_strategy="steps"))
    run(process_keys(world, tmp_path, tmp_path / "parts", **more, resume_from_checkpoint=True))
    assert_same(tmp_path / "parts", tmp_path / "whole")
    if kind == "full":  # what rl.py does with it: the least probability of a step to be right, as the model was trained
        reward_of = process_rewards.process_reward(tmp_path / "whole", "ки", "+,-")
        texts = ["a red desk\na blue desk", "a red desk\n\na red desk", "a red desk", ""]
        scores = reward_of(
            [f"colors of a {word}" for word in ("desk", "desk", "desk", "shoe")], texts, [[]] * 4, {}, [""] * 4
        )
        assert scores[0] < 0.5 < scores[1] <= scores[2] and scores[3] == 0.0


@pytest.mark.sweep(keep=1)
@pytest.mark.parametrize(
    "changes",
    [{}, {"sharding": "stage2"}, {"tensor_parallel_degree": 2}, {"tensor_parallel_degree": 2, "process_reward": True}],
    ids=str,
)
def test_two_ranks_equal_one_process(changes, two, world, tmp_path):
    alone = keys_of(world, tmp_path / "alone", center_rewards_coefficient=0.1)
    if "process_reward" in changes:
        alone = process_keys(world, tmp_path, tmp_path / "alone")
    if "tensor_parallel_degree" not in changes:  # one micro-batch on each rank
        changes = {**changes, "per_device_train_batch_size": 1}
    run(alone)
    keys = {**alone, **changes, "output_dir": tmp_path / "ranks", "logging_steps": 1}
    ((theirs, *_), *_) = two.run("jobs_parallel:script", "reward", options(keys))
    ours = logged(tmp_path / "alone")
    for name in {"loss", "grad_norm", "accuracy", "margin"} & ours[0].keys():
        found = [[row[name] for row in rows if name in row] for rows in (ours, theirs)]
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_train": False}, r"base: has no score head; reward.py makes"),
        ({"max_seq_len": 3}, r"max_seq_len: 3; it must be at least 4"),
        ({"train_dataset_path": "margin.jsonl"}, r"margin.jsonl:[123]: 'margin' must be a number, found 'big'"),
        ({"pipeline_parallel_degree": 2}, r"pipeline_parallel_degree"),
        ({"process_reward": True}, r"placeholder_token: 'ки' is 5 tokens here"),
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
