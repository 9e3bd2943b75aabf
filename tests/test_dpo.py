"""dpo.py: pairs as one sequence, losses, reference, and whole runs.

    python -m pytest tests/test_dpo.py                                   # CPU, no torch, about 20 s
    python -m pytest tests/test_dpo.py --hf-python PYTHON_WITH_TRL       # and TRL's losses computed again over there
    export PYTHONPATH=.:tests/golden:tests/ranks:tests/bench
    python tests/test_dpo.py PYTHON_WITH_TRL      # write tests/golden/dpo_trl.json anew

tests/golden/dpo_trl.json holds what TRL 1.16 computes for two small models of golden_weights.py; RECIPE made it.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import types

import numpy as np
import paddle
import pytest
import tiny_models
from conftest import ROOT, SHARED
from golden_weights import CASES, draw, shapes
from test_scripts import (
    CONFIG,
    assert_same,
    crash_after_saving,
    fails,
    losses,
    rows,
    tensors,
    tree,
    write_model,
    write_records,
)

import adapters
import data
import dpo
import families
import formats.weights
import model as M
import trainer
from alignment import preference, preference_data, preference_losses
from arguments import parse_args
from checkpoint import TrainState
from formats.chat import ChatTemplate, load_chat_template
from formats.files import UserError
from formats.tensor_files import read_safetensors
from formats.tokenizer import load_tokenizer

pytestmark = pytest.mark.sweep(keep=8)

DEMO = ROOT / "demo"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "dpo_trl.json").read_text())

RECIPE = """
import json, sys, tempfile, types
sys.path.append(sys.argv[2])
import torch
from golden_weights import CASES, draw, shapes
arrays = {}
try:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
except ImportError as error:
    arrays["missing"] = str(error)
if not arrays:
    given = json.loads(sys.argv[3])

    def opened(mix):
        config = CASES["gqa"][1]
        model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager", pad_token_id=0))
        first, second = (draw(shapes(config), seed) for seed in (0, 1))
        model.load_state_dict({key: torch.from_numpy(first[key] + mix * second[key]) for key in first})
        return model

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    policy, reference = opened(0.0), opened(given["mix"])
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(output_dir=folder, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False)
        data = Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c"}] * 2)
        trainer = DPOTrainer(policy, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
    rows = [(prompt, pair[side]) for side in (1, 2) for pair in given["pairs"] for prompt in [pair[0]]]
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids, mask, reply_mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, reply) in enumerate(rows):
        ids[row, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        mask[row, : len(prompt) + len(reply)] = 1
        reply_mask[row, len(prompt) : len(prompt) + len(reply)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": reply_mask}
    policy.eval(), reference.eval()
    watched = policy.model.layers[1].self_attn.q_proj.weight
    for kind, beta in given["dpo"]:
        trainer.loss_types, trainer.loss_weights, trainer.beta = [kind], [1.0], beta
        trainer._metrics["eval"].clear()
        loss = trainer._compute_loss(trainer.model, inputs, False)
        policy.zero_grad()
        loss.backward()
        arrays[kind + ":loss"], arrays[kind + ":gradient"] = loss.item(), watched.grad.norm().item()
        names = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
        for name in (*names, "logps/chosen", "logps/rejected"):
            arrays[kind + ":" + name] = trainer._metrics["eval"][name][0]
    for name, run in given["more"].items():
        trainer.loss_types, trainer.loss_weights = run["loss_type"], run.get("loss_weights", [1.0])
        trainer.beta, trainer.label_smoothing = run["beta"], run.get("label_smoothing", 0.0)
        trainer.ld_alpha, trainer.args.discopop_tau = run.get("ld_alpha"), run.get("discopop_tau", 0.05)
        policy.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs, False)
        loss.backward()
        arrays[name + ":loss"], arrays[name + ":gradient"] = loss.item(), watched.grad.norm().item()
    labels = ids.masked_fill(reply_mask == 0, -100)
    device = types.SimpleNamespace(device="cpu")
    for kind, beta, gamma, smoothing in given["cpo"]:
        policy.zero_grad()
        logits, average = policy(ids, attention_mask=mask).logits, kind == "simpo"
        logps = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=average)
        chosen, rejected = logps.chunk(2)
        options = dict(alpha=0.0, loss_type=kind, beta=beta, simpo_gamma=gamma, label_smoothing=smoothing)
        options = types.SimpleNamespace(**options, accelerator=device)
        loss = CPOTrainer.cpo_loss(options, chosen, rejected)[0].mean()
        loss.backward()
        arrays["cpo_" + kind + ":loss"], arrays["cpo_" + kind + ":gradient"] = loss.item(), watched.grad.norm().item()
    policy.zero_grad()
    logps = ORPOTrainer.get_batch_logps(policy(ids, attention_mask=mask).logits, labels, average_log_prob=True)
    loss = -ORPOTrainer.odds_ratio_loss(types.SimpleNamespace(beta=1.0, accelerator=device), *logps.chunk(2))[0].mean()
    loss.backward()
    arrays["orpo:loss"], arrays["orpo:gradient"] = loss.item(), watched.grad.norm().item()
    # TRL has neither of these: the formulas of arXiv 2402.13228 and of the first KTO code, from its log-probabilities
    with torch.no_grad():
        base = CPOTrainer.get_batch_logps(reference(ids, attention_mask=mask).logits, labels)
    for kind, beta, weight in given["formulas"]:
        policy.zero_grad()
        logps = CPOTrainer.get_batch_logps(policy(ids, attention_mask=mask).logits, labels)
        c, r = (logps - base).chunk(2)
        if kind == "dpop":
            penalty = torch.clamp((base - logps).chunk(2)[0], min=0)
            loss = -torch.nn.functional.logsigmoid(beta * (c - r - weight * penalty)).mean()
        else:
            kl_c, kl_r = (x.detach().mean().clamp(min=0) for x in (c, r))
            loss = torch.cat([1 - torch.sigmoid(beta * (c - kl_r)), 1 - torch.sigmoid(beta * (kl_c - r))]).mean()
        loss.backward()
        arrays[kind + ":loss"], arrays[kind + ":gradient"] = loss.item(), watched.grad.norm().item()
    from trl import KTOConfig, KTOTrainer
    policy, reference = opened(0.0), opened(given["mix"])
    watched = policy.model.layers[1].self_attn.q_proj.weight
    with tempfile.TemporaryDirectory() as folder:
        options = dict(use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False)
        args = KTOConfig(output_dir=folder, per_device_train_batch_size=2, **options)
        data = Dataset.from_list([{"prompt": "a ", "completion": "b", "label": i == 0} for i in range(2)])
        trainer = KTOTrainer(policy, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
    replies = [reply for _, reply, _ in given["unpaired"]]
    inputs = {"label": torch.tensor([good for _, _, good in given["unpaired"]])}
    for prefix, order in (("", replies), ("KL_", replies[-1:] + replies[:-1])):
        rows = [(prompt, reply) for (prompt, _, _), reply in zip(given["unpaired"], order)]
        width = max(len(prompt) + len(reply) for prompt, reply in rows)
        ids, mask, reply_mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        for row, (prompt, reply) in enumerate(rows):
            ids[row, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
            mask[row, : len(prompt) + len(reply)] = 1
            reply_mask[row, len(prompt) : len(prompt) + len(reply)] = 1
        names = ("input_ids", "attention_mask", "completion_mask")
        inputs |= dict(zip((prefix + name for name in names), (ids, mask, reply_mask)))
    policy.eval(), reference.eval()
    for kind, beta, desirable, undesirable in given["kto"]:
        trainer.loss_type, trainer.beta, trainer.calculate_KL = kind, beta, kind == "kto"
        trainer.desirable_weight, trainer.undesirable_weight = desirable, undesirable
        trainer._metrics["eval"].clear()
        policy.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs, False)
        loss.backward()
        arrays[kind + ":loss"], arrays[kind + ":gradient"] = loss.item(), watched.grad.norm().item()
        for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
            arrays[kind + ":" + name] = trainer._metrics["eval"][name][0]
"""


def opened(case="gqa", mix=0.0, **changes):
    """A model of golden_weights.py; mix: how much of another draw is added to its weights."""
    config = {**CASES[case][1], **changes}
    first, second = (draw(shapes(config), seed) for seed in (0, 1))
    found = M.build(families.ModelConfig.from_dict(config))
    for weight in formats.weights.named_weights(found):
        M.set_parameter(weight.parameter, weight.from_numpy(first[weight.name] + np.float32(mix) * second[weight.name]))
    return found


def collated(pairs, rows, width):
    """Pairs of ids -> a batch with these rows of pair numbers."""
    return data.collate_pairs(rows, lambda i: data.pair_sample(*map(np.array, pairs[i])), width, 0)


def gradients(model):
    """{name: array} of all gradients, which are cleared."""
    found = {}
    for weight in adapters.trainable_weights(model):
        found[weight.name] = weight.parameter.grad.numpy()
        weight.parameter.clear_gradient(False)
    return found


def random_pairs(*lengths, seed=2):
    generator = np.random.default_rng(seed)
    return [tuple(generator.integers(3, 56, n).tolist() for n in each) for each in lengths]


# ---------------------------------------------------------------------------------------------- pairs as one sequence


def test_one_pair_by_hand():
    """Prompt 1 2 3, chosen 4 5, rejected 6 7 8, after another pair of prompt 9, chosen 10, rejected 11 12."""
    batch = collated([([9], [10], [11, 12]), ([1, 2, 3], [4, 5], [6, 7, 8])], [[0, 1]], 11)
    x = -100
    assert batch["input_ids"].tolist() == [[9, 9, 11, 1, 2, 3, 4, 3, 6, 7, 0]]
    assert batch["labels"].tolist() == [[10, 11, 12, x, x, 4, 5, 6, 7, 8, x]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 0, 1, 2, 3, 2, 3, 4, 0]]
    assert batch["startend_row_indices"][0, 0, :, 0].tolist() == [1, 3, 3, 10, 10, 7, 7, 10, 10, 10, 11]
    assert batch["reply_ids"].tolist() == [[0, 1, 1, -1, -1, 2, 2, 3, 3, 3, -1]]
    assert batch["reply_tokens"].tolist() == [[1, 2], [2, 3]] and batch["tokens"] == 10
    assert batch["sample_ids"] == [[0, 1]]
    rejected_sees = [j for j in range(11) if j <= 9 < batch["startend_row_indices"][0, 0, j, 0]]
    assert rejected_sees == [3, 4, 7, 8, 9]  # prompt, its own copy of the prompt's last token, itself


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo", "or"])
def test_packed_equals_separate_passes(loss_type):
    """Logps, loss and every gradient of two rows of five pairs against ten sequences, each alone and without a mask."""
    pairs = random_pairs((6, 5, 9), (1, 7, 3), (11, 2, 4), (3, 1, 1), (8, 6, 2))
    model, args = opened(), dpo.Args(loss_type=loss_type, beta=0.3, label_smoothing=0.1, sft_loss_ratio=0.5)
    generator = np.random.default_rng(0)
    reference = paddle.to_tensor(generator.normal(-15, 3, (5, 2)).astype("float32"))
    batch = collated(pairs, [[3, 0, 4], [2, 1]], 48)
    order = np.concatenate(batch["sample_ids"])
    counts = preference.pair_counts([batch])
    assert counts == (5, sum(len(chosen) for _, chosen, _ in pairs))

    packed = preference.reply_logps(model, batch)
    loss, figures = preference.loss_and_metrics(packed, reference, batch["reply_tokens"], counts, args)
    loss.backward()
    ours = gradients(model)

    separate = []
    for i in order:
        prompt, *replies = pairs[i]
        for reply in replies:
            ids = np.array([prompt + reply])
            labels = np.full_like(ids, -100)
            labels[0, len(prompt) - 1 : -1] = reply
            separate.append(-model(paddle.to_tensor(ids), labels=paddle.to_tensor(labels)).sum())
    separate = paddle.stack(separate).reshape([5, 2])
    assert np.abs(packed.numpy() - separate.numpy()).max() < 1e-5
    expected, other = preference.loss_and_metrics(separate, reference, batch["reply_tokens"], counts, args)
    expected.backward()
    theirs = gradients(model)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert figures == pytest.approx(other, abs=1e-5)
    assert ours.keys() == theirs.keys() and len(ours) > 15
    for name in ours:
        assert np.abs(ours[name] - theirs[name]).max() < 1e-5 * max(1, np.abs(theirs[name]).max()), name


def test_packed_pairs_of_chatglm_6b():
    """Its prompts end in [gMASK]<sop> and see each other; each reply has positions of its own."""
    model = tiny_models.build("chatglm").eval()
    ends = [model.config.source[f"{name}_token_id"] for name in ("gmask", "bos")]
    pairs = [(prompt + ends, *replies) for prompt, *replies in random_pairs((4, 5, 7), (3, 3, 2))]
    packed = preference.reply_logps(model, collated(pairs, [[0, 1]], 32)).numpy()
    for i, (prompt, *replies) in enumerate(pairs):
        for side, reply in enumerate(replies):
            ids = np.array([prompt + reply])
            labels = np.full_like(ids, -100)
            labels[0, len(prompt) - 1 : -1] = reply
            alone = -float(model(paddle.to_tensor(ids), labels=paddle.to_tensor(labels)).sum())
            assert packed[i, side] == pytest.approx(alone, abs=1e-5)


def test_a_packed_pair_does_not_see_its_neighbors():
    """Other tokens in the first reply, or in another pair, leave the rest of the row bit for bit as it was."""
    model, pairs = opened(), random_pairs((6, 5, 9), (4, 7, 3))
    before = preference.reply_logps(model, collated(pairs, [[0, 1]], 40)).numpy()
    prompt, chosen, rejected = pairs[0]
    after = preference.reply_logps(
        model, collated([(prompt, [3] * len(chosen), rejected), pairs[1]], [[0, 1]], 40)
    ).numpy()
    assert (before != after).tolist() == [[True, False], [False, False]]


# ---------------------------------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO / "llama")


def pair_set(tmp_path, tokenizer, records, max_seq_len=512, max_prompt_len=256):
    write_records(tmp_path / "pairs" / "train.jsonl", records)
    return data.PreferenceDataset(tmp_path / "pairs", tokenizer, max_seq_len, max_prompt_len)


def record(src="red lamp", tgt=(), response=("a red lamp", "ten coins"), sort=(1, 0), **more):
    return {
        "src": src,
        "tgt": list(tgt) if isinstance(tgt, tuple) else tgt,
        "response": list(response),
        "sort": list(sort),
    } | more


def test_records_without_a_template(tmp_path, tokenizer):
    eos, encode = [tokenizer.eos_token_id], tokenizer.encode
    found = pair_set(
        tmp_path,
        tokenizer,
        [
            record(),
            record(src=["red lamp"], sort=(0.1, 0.7)),
            record(tgt=""),
            record(src=["red lamp", "and why"], tgt=["ten"]),
        ],
    )
    prompt, good, bad = encode("red lamp"), encode("a red lamp", False) + eos, encode("ten coins", False) + eos
    assert [part.tolist() for part in found.pair(0)] == [prompt, good, bad]
    assert [part.tolist() for part in found.pair(1)] == [prompt, bad, good]
    assert [part.tolist() for part in found.pair(2)] == [prompt, good, bad]
    history = prompt + encode("ten", False) + eos
    assert [part.tolist() for part in found.pair(3)] == [history + encode("and why"), good, bad]
    assert found.lengths.tolist() == [len(found.sample(i)[0]) for i in range(4)]
    assert found.record(3)["src"] == ["red lamp", "and why"] and len(found) == 4 and found.dropped == 0


def test_records_with_a_template(tmp_path, tokenizer):
    tokenizer = load_tokenizer(DEMO / "llama")
    tokenizer.chat_template = load_chat_template("llama2")
    given = record(src=["red lamp", "and why"], tgt=["ten"], context={"system": "be brief"})
    prompt, good, bad = (part.tolist() for part in pair_set(tmp_path, tokenizer, [given]).pair(0))
    for reply, text in ((good, "a red lamp"), (bad, "ten coins")):
        system, encoded = tokenizer.encode_chat([("red lamp", "ten"), ("and why", text)], given["context"], True)
        assert prompt + reply == system + [i for user, bot in encoded for i in user + bot]
    assert "be brief" in tokenizer.decode(prompt)
    bad_template = {"conversation": ["{{user}} ({{bot}})", "{{bot}}"], "query": "{{user}}"}
    tokenizer.chat_template = ChatTemplate(bad_template, "odd.json")
    with pytest.raises(UserError, match=r"train.jsonl:1: chat template 'odd.json' puts the reply into the prompt"):
        pair_set(tmp_path, tokenizer, [given])


@pytest.mark.parametrize("template", [None, "llama2"])
def test_truncation(template, tmp_path):
    """The prompt from the left, then the replies in proportion; then the newest of the earlier turns that fit."""
    tokenizer = load_tokenizer(DEMO / "llama")
    tokenizer.chat_template = load_chat_template(template)
    words = "one two three four five six seven eight nine ten".split()
    old, new, last = (" ".join(f"{word} {n}" for word in words) for n in ("red", "blue", "gold"))
    given = record(src=[old, new, last], tgt=["ten", "coins"], response=(" ".join(words * 2), " ".join(words)))
    whole = pair_set(tmp_path, tokenizer, [given]).pair(0)
    full = len(whole[0]) - 1 + len(whole[1]) + len(whole[2])

    def cut(max_seq_len, max_prompt_len):
        found = pair_set(tmp_path, tokenizer, [given], max_seq_len, max_prompt_len)
        assert found.lengths[0] <= max_seq_len
        return [part.tolist() for part in found.pair(0)]

    assert cut(full, 256) == [part.tolist() for part in whole]
    prompt, good, bad = cut(full - 1, 256)  # the oldest turn goes; replies stay
    assert [good, bad] == [part.tolist() for part in whole[1:]]
    assert "red" not in tokenizer.decode(prompt) and "blue" in tokenizer.decode(prompt)
    alone = len(cut(len(good) + len(bad) + 60, 256)[0])
    prompt, good, bad = cut(len(good) + len(bad) + 20, 20)  # the last turn alone is longer than its room
    assert [good, bad] == [part.tolist() for part in whole[1:]] and len(prompt) <= 20 < alone
    text = tokenizer.decode(prompt)
    assert "ten gold" in text and "one gold" not in text and (template is None or "[INST]" in text)
    prompt, good, bad = cut(60, 20)
    a, b = len(whole[1]), len(whole[2])
    assert len(prompt) - 1 + len(good) + len(bad) == 60 and abs(len(good) / len(bad) - a / b) < 0.25
    assert good == whole[1][: len(good)].tolist() and bad == whole[2][: len(bad)].tolist()


def test_pairs_that_cannot_be_learned_are_dropped(tmp_path, tokenizer):
    long = " ".join(["lamp"] * 60)
    found = pair_set(tmp_path, tokenizer, [record(), record(response=("same", "same")), record(src=long)], 40, 40)
    assert len(found) == 1 and found.dropped == 2
    with pytest.raises(UserError, match="none of the 1 pairs can be learned with max_seq_len 40"):
        pair_set(tmp_path, tokenizer, [record(src=long)], 40, 40)


def chat(text, reply):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


UNPAIRED_RECORDS = [
    {"prompt": "red lamp", "completion": " a red lamp", "label": True},  # TRL
    {"messages": chat("blue lamp", "ten coins"), "label": False},  # LLaMA-Factory and TRL
    {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}], "kto_tag": "false"},
    {"instruction": "three", "input": "", "output": "four", "kto_tag": 1},
    {"src": ["five"], "tgt": [], "response": ["six"], "sort": [0]},  # PaddleNLP
    record(),  # a pair: one good and one bad reply
]


def test_unpaired_records(tmp_path, tokenizer):
    """Every format: prompt, reply, whether it is good; the mismatched reply is another prompt's."""
    write_records(tmp_path / "train.jsonl", UNPAIRED_RECORDS)
    found = preference_data.UnpairedDataset(tmp_path, tokenizer, 64, 32)
    assert (1 - found.sides).tolist() == [1, 0, 0, 1, 0, 1, 0] and found.dropped == 0
    replies = [tokenizer.decode(found.reply(i)[1]).strip() for i in range(7)]
    assert replies == ["a red lamp", "ten coins", "two", "four", "six", "a red lamp", "ten coins"]
    assert found.partners.tolist() == [4, 0, 1, 2, 3, 4, 4] and found.prompt_text(6) == "red lamp"
    prompt, reply = found.reply(5)
    ids, labels, positions, mask_rows, _ = found.sample(5, mismatched=True)
    assert ids.tolist() == [*prompt, *found.reply(4)[1][:-1]] and set(mask_rows) == {len(ids)}
    assert labels[len(prompt) - 1 :].tolist() == found.reply(4)[1].tolist() and positions.tolist() == [*range(len(ids))]
    loader = preference_data.UnpairedLoader(found, 2, 64, shuffle=False)
    batch = loader.batch(0, 0)
    assert batch["desirable"].tolist() == [1 - found.sides[i] for row in batch["sample_ids"] for i in row]
    for each in (batch, batch["mismatched"]):
        assert (np.bincount(each["reply_ids"][each["reply_ids"] >= 0]) == each["reply_tokens"][:, 0]).all()
    same = [UNPAIRED_RECORDS[0], UNPAIRED_RECORDS[0] | {"label": False}]
    for bad, words in (
        (same, "all prompts are the same"),
        ([same[0] | {"label": "maybe"}], 'must be true or false, found "maybe"'),
        (
            [{"src": "a", "response": "b", "sort": 2}],
            r"'sort' of one response must be 1 \(good\) or 0 \(bad\), found 2",
        ),
        ([{"prompt": "a", "completion": "b"}], "key 'label' is missing"),
    ):
        write_records(tmp_path / "train.jsonl", bad)
        with pytest.raises(UserError, match=words):
            preference_data.UnpairedDataset(tmp_path, tokenizer, 64, 32)


def test_a_run_learns_good_and_bad_replies(world, tmp_path, capfd):
    """KTO on the pairs' replies with LoRA, whose reference is the model without it, and on all weights."""
    for name, keys in {"lora": {"lora": True, "lora_rank": 4}, "full": {"gradient_accumulation_steps": 3}}.items():
        common = dict(loss_type="kto", do_eval=True, per_device_train_batch_size=4, desirable_weight=1.2)
        run(keys_of(world, tmp_path / name, **common, **keys))
        found, printed = rows(tmp_path / name), capfd.readouterr().out
        assert found[0]["kl"] == 0 and found[0]["rewards/margins"] == 0
        assert found[-1]["rewards/margins"] > 0.01 and found[-1]["kl"] >= 0
        result = json.loads((tmp_path / name / "dev_results.json").read_text())
        assert result["eval_pairs"] == 16 and result["eval_rewards/accuracies"] == result["eval_accuracy"]
        assert "share of dev replies on the right side of the KL" in printed
        prompts = re.findall(r"^prompt: (.*)$", printed, re.M)
        assert len(prompts) == len(set(prompts)) == 3  # a pair is two samples with one prompt


def test_loader_covers_every_pair_once_an_epoch(tokenizer):
    pairs = data.PreferenceDataset(DEMO / "preference" / "dev.jsonl", tokenizer, 300, 128)
    for greedy in (False, True):
        loader = data.PreferenceLoader(pairs, 2, 300, greedy_zero_padding=greedy, seed=3)
        for epoch in (0, 1):
            batches = [loader.batch(epoch, i) for i in range(loader.batches_per_epoch)]
            seen = [i for batch in batches for row in batch["sample_ids"] for i in row]
            assert sorted(seen) == list(range(100)) and loader.fill > 0.8
            for batch in batches:
                found = batch["reply_ids"][batch["reply_ids"] >= 0]
                assert (np.bincount(found).reshape(-1, 2) == batch["reply_tokens"]).all()
                assert (np.diff(found) >= 0).all() and batch["input_ids"].shape[1] <= 300
                assert ((batch["reply_ids"] >= 0) == (batch["labels"] != -100)).all()


# ---------------------------------------------------------------------------------------------- losses


def sigma(x):
    return 1 / (1 + np.exp(-x))


def odds(logp):
    return np.exp(logp) / (1 - np.exp(logp))


BY_HAND = {  # of averaged (a) or summed (s) log-probabilities: policy c, r; reference C, R; all float64
    "sigmoid": lambda c, r, C, R: (
        -0.9 * np.log(sigma(0.4 * (c - r - C + R))) - 0.1 * np.log(1 - sigma(0.4 * (c - r - C + R)))
    ),
    "hinge": lambda c, r, C, R: np.maximum(0, 1 - 0.4 * ((c - C) - (r - R))),
    "ipo": lambda c, r, C, R: ((c - C) - (r - R) - 1.25) ** 2,
    "simpo": lambda c, r, C, R: -0.9 * np.log(sigma(0.4 * (c - r) - 0.7)) - 0.1 * np.log(sigma(0.7 - 0.4 * (c - r))),
    "or": lambda c, r, C, R: -np.log(sigma(np.log(odds(c) / odds(r)))),
}  # fmt: skip


@pytest.mark.parametrize("loss_type", BY_HAND)
def test_losses_by_hand(loss_type):
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 9, (50, 2))
    policy, reference = -tokens * generator.uniform(0.02, 3, (2, 50, 2))
    args = dpo.Args(
        loss_type=loss_type, beta=0.4, label_smoothing=0.1, simpo_gamma=0.7, pref_loss_ratio=2.0, sft_loss_ratio=0.3
    )
    args.reference_free = loss_type in ("simpo", "or")
    given = reference * (not args.reference_free)
    tensors = (paddle.to_tensor(values.astype("float32")) for values in (policy, given))
    loss, figures = preference.loss_and_metrics(*tensors, tokens, (50, tokens[:, 0].sum()), args)
    scale = tokens if loss_type in ("ipo", "simpo", "or") else 1.0
    (c, r), (C, R) = (policy / scale).T, (given / scale).T
    mean_loss, sft = BY_HAND[loss_type](c, r, C, R).mean(), -policy[:, 0].sum() / tokens[:, 0].sum()
    expected = {
        "dpo_loss": mean_loss,
        "sft_loss": sft,
        "logps/chosen": c.mean(),
        "logps/rejected": r.mean(),
        "logps/accuracies": (c > r).mean(),
        "rewards/chosen": 0.4 * (c - C).mean(),
        "rewards/rejected": 0.4 * (r - R).mean(),
        "rewards/accuracies": (c - C > r - R).mean(),
        "rewards/margins": 0.4 * (c - C - r + R).mean(),
    }
    assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(loss) == pytest.approx(2 * mean_loss + 0.3 * sft, rel=1e-5)


def test_ties_count_one_half_and_a_certain_reply_is_finite():
    assert preference.count_wins(np.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]])) == 1.5
    chosen = paddle.to_tensor([0.0, -40.0])
    chosen.stop_gradient = False
    loss = preference_losses.orpo_loss(chosen, paddle.to_tensor([-0.5, 0.0]))
    loss.sum().backward()
    assert np.isfinite(loss.numpy()).all() and np.isfinite(chosen.grad.numpy()).all()


UNPAIRED = ("kto", "apo_zero_unpaired")


def assert_as_trl(found):
    """Our packed sequence and TRL's separate ones, from ids to loss and gradient, to 1e-5."""
    given = GOLDEN["given"]
    policy, reference = opened(), opened(mix=given["mix"])
    batch = collated(given["pairs"], [[0, 1, 2]], 60)
    with paddle.no_grad():
        base = preference.reply_logps(reference, batch)
    runs = [(kind, kind, base, dict(beta=beta)) for kind, beta in given["dpo"]]
    runs += [
        (f"cpo_{kind}", kind, paddle.zeros_like(base), dict(beta=beta, simpo_gamma=gamma, label_smoothing=smoothing))
        for kind, beta, gamma, smoothing in given["cpo"]
    ]
    runs.append(("orpo", "or", paddle.zeros_like(base), {}))
    runs += [(name, row.pop("loss_type"), base, row) for name, row in json.loads(json.dumps(given["more"])).items()]
    runs += [(kind, kind, base, dict(beta=beta, dpop_lambda=weight)) for kind, beta, weight in given["formulas"]]
    compared, found = 0, {key: value for key, value in found.items() if key.partition(":")[0] not in UNPAIRED}
    for name, kind, base, options in runs:
        args = dpo.Args(loss_type=kind, **options)
        args._check_loss()
        with paddle.no_grad():
            base = preference.reply_logps(reference, batch, args.ld_alpha) if args.ld_alpha is not None else base
        losses = policy(**preference.model_inputs(batch))
        logps = preference.sum_of_replies(losses, batch, args.ld_alpha)
        plain = preference.sum_of_replies(losses, batch)[:, 0]
        given_numbers = batch["reply_tokens"], preference.pair_counts([batch])
        loss, figures = preference.loss_and_metrics(logps, base, *given_numbers, args, sft_logps=plain)
        loss.backward()
        gradient = gradients(policy)["model.layers.1.self_attn.q_proj.weight"]
        if kind == "ipo":  # TRL shows summed log-probabilities here, the loss compares means
            figures |= {"logps/chosen": float(logps[:, 0].mean()), "logps/rejected": float(logps[:, 1].mean())}
            found = {key: value for key, value in found.items() if not key.startswith("ipo:rewards/")}
        figures |= {"loss": float(loss), "gradient": float(np.linalg.norm(gradient))}
        for key in (key for key in found if key.startswith(f"{name}:")):
            assert figures[key.partition(":")[2]] == pytest.approx(float(found[key]), rel=1e-5, abs=1e-5), key
            compared += 1
    assert compared == len(found) == 26 + 2 * (len(given["more"]) + 2)


class Given:
    """An UnpairedDataset of ids: [(prompt, reply, is_good)]."""

    max_seq_len = 60
    partners = property(lambda self: preference_data.mismatched_replies([bytes(p) for p, _, _ in self.records]))
    sample = preference_data.UnpairedDataset.sample

    def __init__(self, records):
        self.records, self.sides = records, np.array([0 if good else 1 for _, _, good in records])
        self.lengths = np.array([20] * len(records))

    def __len__(self):
        return len(self.records)

    def reply(self, i):
        return tuple(np.array(ids, np.int32) for ids in self.records[i][:2])


def unpaired_run(records, rows, args):
    """Loss, metrics and gradients of a step over micro-batches of so many packed rows each."""
    policy, reference = opened(), opened(mix=GOLDEN["given"]["mix"])
    loader = preference_data.UnpairedLoader(Given(records), rows, 60, shuffle=False)
    indices = [(0, i) for i in range(loader.batches_per_epoch)]
    base = preference.precompute_reference_logps(reference, loader, indices)
    batches, total, figures = [loader.batch(*index) for index in indices], 0.0, {}
    preference.prepare_step(policy, batches, base, args)
    counts = preference.pair_counts(batches)
    for batch in batches:
        losses, given = policy(**preference.model_inputs(batch)), preference.reference_logps(policy, batch, base, args)
        loss, metrics = preference.batch_loss(losses, batch, given, counts, args)
        loss.backward()
        total, figures = total + float(loss), {name: figures.get(name, 0) + value for name, value in metrics.items()}
    return total, figures, gradients(policy), len(batches)


def assert_kto_is_trls(found):
    """Packed rows of two micro-batches against TRL's one batch: loss, gradient and figures, to 1e-5."""
    compared = 0
    for kind, beta, desirable, undesirable in GOLDEN["given"]["kto"]:
        args = dpo.Args(loss_type=kind, beta=beta, desirable_weight=desirable, undesirable_weight=undesirable)
        whole, parts = (unpaired_run(GOLDEN["given"]["unpaired"], rows, args) for rows in (2, 1))
        assert parts[0] == pytest.approx(whole[0], rel=1e-6) and (whole[3], parts[3]) == (1, 2)
        total, figures, gradient, _ = parts
        figures |= {"loss": total, "gradient": np.linalg.norm(gradient["model.layers.1.self_attn.q_proj.weight"])}
        for key in (key for key in found if key.startswith(f"{kind}:")):
            assert figures[key.partition(":")[2]] == pytest.approx(float(found[key]), rel=1e-5, abs=1e-5), key
            compared += 1
    assert compared == 16


def test_losses_are_trls():
    assert_as_trl(GOLDEN["trl"])


def test_kto_is_trls():
    assert_kto_is_trls(GOLDEN["trl"])


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "kto_pair"])
def test_a_loss_of_all_pairs_does_not_depend_on_micro_batches(loss_type):
    """Loss and gradients of one batch of five pairs equal those of three batches behind prepare_step()."""
    pairs = random_pairs((6, 5, 9), (1, 7, 3), (11, 2, 4), (3, 1, 1), (8, 6, 2))
    model, args = opened(), dpo.Args(loss_type=[loss_type, "sigmoid"], loss_weights=[1.0, 0.3], beta=0.3)
    base = np.random.default_rng(0).normal(-15, 3, (5, 2))
    found = []
    for micro_batches in ([[0, 1, 2, 3, 4]], [[3, 0], [2], [4, 1]]):
        batches = [collated(pairs, [row], 80) for row in micro_batches]
        preference.prepare_step(model, batches, base, args)
        counts, total = preference.pair_counts(batches), 0.0
        for batch in batches:
            given = preference.reference_logps(model, batch, base, args), batch["reply_tokens"], counts, args
            logps = preference.reply_logps(model, batch)
            loss, _ = preference.loss_and_metrics(logps, *given, batch.get("of_step"))
            loss.backward()
            total += float(loss)
        found.append((total, gradients(model)))
    (one, of_one), (several, of_several) = found
    assert several == pytest.approx(one, rel=1e-6)
    for name in of_one:
        assert np.abs(of_one[name] - of_several[name]).max() < 1e-5 * max(1, np.abs(of_one[name]).max()), name


def test_the_shift_of_bco_is_the_mean_reward_of_all_steps():
    """Three steps of different pairs in one or two micro-batches, against the formula with TRL 0.24's running mean."""
    model, args = opened(), dpo.Args(loss_type="bco_pair", bco_shift=True, beta=0.3)
    state, means, generator = TrainState(), [], np.random.default_rng(0)
    for lengths, rows_of in (((4, 5, 9), [[0, 1]]), ((11, 2, 4), [[0], [1]]), ((6, 3, 1), [[1], [0]])):
        pairs, base = random_pairs(lengths, (2, 7, 3)), generator.normal(-15, 3, (2, 2))
        batches = [collated(pairs, [row], 80) for row in rows_of]
        preference.prepare_step(model, batches, base, args, state=state)
        counts, total, rewards = preference.pair_counts(batches), 0.0, []
        for batch in batches:
            losses, reference = model(**preference.model_inputs(batch)), base[np.concatenate(batch["sample_ids"])]
            total += float(preference.batch_loss(losses, batch, paddle.to_tensor(reference), counts, args)[0])
            rewards.append(0.3 * (preference.reply_logps(model, batch).numpy() - reference))
        means.append(np.concatenate(rewards).mean())
        (c, r), shift = np.concatenate(rewards).T, np.mean(means)
        assert total == pytest.approx((-np.log(sigma(c - shift)) - np.log(sigma(shift - r))).mean(), rel=1e-5)
        assert state.reward_mean == pytest.approx(shift, rel=1e-5)
        state.step += 1


def test_a_moving_reference_follows_the_policy(world, tmp_path):
    """A hard update makes reference and policy equal again; a soft one goes its share of the way."""
    run(keys_of(world, tmp_path / "hard", ref_model_update_steps=2, learning_rate=3e-3))
    run(keys_of(world, tmp_path / "soft", sync_ref_model=True, ref_model_sync_steps=2, learning_rate=3e-3))
    run(keys_of(world, tmp_path / "still", learning_rate=3e-3))
    hard, soft, still = (rows(tmp_path / name) for name in ("hard", "soft", "still"))
    for step in (0, 1):  # a reference that has not moved yet is the one that was computed before training
        assert hard[step]["loss"] == pytest.approx(still[step]["loss"], rel=1e-5)
    assert hard[2]["loss"] == pytest.approx(math.log(2), abs=1e-6) and still[2]["loss"] != hard[2]["loss"]
    assert min(abs(soft[2]["loss"] - other[2]["loss"]) for other in (hard, still)) > 1e-4


MOVING = {
    "hard": {"ref_model_update_steps": 2},
    "soft": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3},
    "lora": {"ref_model_update_steps": 2, "lora": True, "lora_rank": 4},
    "dora": {"ref_model_update_steps": 2, "lora": True, "lora_rank": 4, "dora": True},
    "prefix": {"ref_model_update_steps": 2, "prefix_tuning": True, "num_prefix_tokens": 4},
}


def slow_logp(model, prompt, reply):
    """log p of a reply by itself, from all logits."""
    ids = np.concatenate([prompt, reply]).astype("int64")
    logps = paddle.nn.functional.log_softmax(model(paddle.to_tensor(ids[None, :-1]))[0].astype("float64"), -1)
    places = np.arange(len(prompt) - 1, len(ids) - 1)
    return logps[paddle.to_tensor(places), paddle.to_tensor(ids[1:][places])].sum()


@pytest.mark.sweep(keep=2)
@pytest.mark.parametrize("kind", MOVING)
def test_a_moving_reference_by_hand(kind, world, tmp_path):
    """Loss and gradient norm of five packed steps, one reply after another, by a policy and a reference that are two
    models, opened from the checkpoints of single steps; and what checkpoints hold of the reference."""
    keys, changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "max_prompt_len": 48}, MOVING[kind]
    run(keys_of(world, tmp_path / "out", **keys, **changes))
    pairs = data.PreferenceDataset(world / "pairs", load_tokenizer(world / "base"), 400, 48)
    loader, found = data.PreferenceLoader(pairs, 1, 400, seed=42), rows(tmp_path / "out")
    alpha, is_adapter = changes.get("ref_model_mixup_alpha", 1), kind not in ("hard", "soft")
    steps = [world / "base", *(tmp_path / "out" / f"checkpoint-{step}" for step in range(1, 6))]
    reference, mixed = adapters.from_pretrained(steps[0]), tensors(steps[0])
    for step, folder in enumerate(steps[:-1]):
        if not step and kind == "prefix":  # the one that it starts with is in no checkpoint
            continue
        if step:
            name = "adapter_model" if is_adapter else "model"
            stored, trained = (read_safetensors(folder / f"{n}.safetensors") for n in ("reference", name))
            if not is_adapter:
                assert all(np.abs(stored[name] - mixed[name]).max() < 1e-6 for name in stored), step
            if step % 2 == 0 and is_adapter:
                reference = adapters.from_pretrained(folder)
            elif step % 2 == 0:
                mixed = {name: (1 - alpha) * mixed[name] + alpha * trained[name] for name in trained}
                for weight in formats.weights.named_weights(reference):
                    M.set_parameter(weight.parameter, weight.from_numpy(mixed[weight.name]))
        policy = adapters.from_pretrained(world / "base" if is_adapter else folder)
        if is_adapter and step:
            adapters.load_adapter(policy, folder, trainable=True)
        ids, total = np.concatenate(loader.sample_ids(0, step)), 0.0
        assert len(ids) > 1
        for prompt, *replies in map(pairs.pair, ids):
            with paddle.no_grad():
                base = [slow_logp(reference, prompt, reply) for reply in replies]
            chosen, rejected = (slow_logp(policy, prompt, reply) - b for reply, b in zip(replies, base))
            loss = -paddle.nn.functional.log_sigmoid(0.5 * (chosen - rejected)) / len(ids)
            loss.backward()
            total += float(loss)
        assert found[step]["loss"] == pytest.approx(total, rel=1e-5), step
        if step or not is_adapter:
            norm = math.sqrt(sum(float((g.astype("float64") ** 2).sum()) for g in gradients(policy).values()))
            assert found[step]["grad_norm"] == pytest.approx(norm, rel=1e-4), step
    assert found[2]["loss"] == pytest.approx(math.log(2), abs=1e-6) or alpha < 1
    assert abs(found[3]["loss"] - math.log(2)) > 1e-3


@pytest.mark.torch
def test_losses_are_trls_live(hf_python):
    found = hf_python(RECIPE, ROOT / "tests" / "golden", json.dumps(GOLDEN["given"]))
    if "missing" in found:
        pytest.skip(f"needs TRL 1.16 over there: {found['missing']}")
    assert_as_trl({key: value.item() for key, value in found.items()})
    assert_kto_is_trls({key: value.item() for key, value in found.items()})


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with base/ (model) and pairs/ (20 train, 8 dev). Read only."""
    world = tmp_path_factory.mktemp("world")
    write_model(world / "base")
    for split, count in (("train", 20), ("dev", 8)):
        lines = (DEMO / "preference" / f"{split}.jsonl").read_text().splitlines()[:count]
        write_records(world / "pairs" / f"{split}.jsonl", map(json.loads, lines))
    return world


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("logger.draw_curves", lambda folder: None)


def keys_of(world, output_dir, **changes):
    return {
        "model_name_or_path": str(world / "base"),
        "train_dataset_path": str(world / "pairs"),
        "dev_dataset_path": str(world / "pairs" / "dev.jsonl"),
        "output_dir": str(output_dir),
        "do_train": True,
        "max_steps": 4,
        "max_seq_len": 400,
        "max_prompt_len": 96,
        "max_new_tokens": 3,
        "learning_rate": 0.005,
        "lr_scheduler_type": "constant",
        "beta": 0.5,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes


def run(keys):
    path = f"{keys['output_dir']}.json"
    with open(path, "w") as file:
        json.dump(keys, file)
    trainer.run_script(dpo.main, dpo.Args, [path])


KINDS = {"full": {}, "lora": {"lora": True, "lora_rank": 4}, "dora": {"lora": True, "lora_rank": 4, "dora": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_its_pairs(kind, world, tmp_path, capfd):
    """One step is all pairs, so losses fall. The reference is the base model. What was evaluated is written."""
    out = tmp_path / "out"
    run(
        keys_of(
            world,
            out,
            do_eval=True,
            evaluation_strategy="steps",
            eval_steps=2,
            per_device_train_batch_size=20,
            **KINDS[kind],
        )
    )
    printed, found = capfd.readouterr().out, rows(out)
    assert [row["dpo_loss"] for row in found] == [row["loss"] for row in found]
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and found[0]["rewards/accuracies"] == 0.5
    assert found[-1]["loss"] < found[0]["loss"] - 0.05 and found[-1]["rewards/margins"] > 0.1
    assert "reward: before 50.0 %, after " in printed and "log-probability: before " in printed
    assert [len(re.findall(rf"^{word}: ", printed, re.M)) for word in ("prompt", "before", "after")] == [3, 3, 3]
    assert ("reference: log-probabilities of 20 pairs" in printed) == (kind == "full")

    base = adapters.from_pretrained(world / "base")
    policy = adapters.from_pretrained(world / "base" if kind != "full" else out)
    if kind != "full":
        adapters.load_adapter(policy, out)
    pairs = data.PreferenceDataset(world / "pairs", load_tokenizer(out), 400, 96, "dev")
    loader = data.PreferenceLoader(pairs, 3, 400, shuffle=False)
    known = preference.precompute_reference_logps(base, loader, [(0, i) for i in range(loader.batches_per_epoch)])
    expected = preference.evaluate_pairs(policy, loader, known, dpo.Args(beta=0.5))
    reported = json.loads((out / "dev_results.json").read_text())
    assert reported == pytest.approx(expected, rel=1e-4, abs=1e-5) and reported["eval_pairs"] == 8
    assert [json.loads(line)["step"] for line in (out / "eval_metrics.jsonl").read_text().splitlines()] == [2, 4]


def test_the_balance_of_experts_is_added(tmp_path):
    """Mixtral: the gradient is that of the preference loss plus the balance of the row, and replies stay -log p."""
    model, args = tiny_models.build("mixtral"), dpo.Args(beta=0.3, reference_free=True)
    batch = collated(random_pairs((6, 5, 9), (4, 7, 3)), [[0, 1]], 40)
    model.train()
    plain = preference.reply_logps(model, batch)
    no_reference, counts = paddle.zeros_like(plain), preference.pair_counts([batch])
    loss, _ = preference.loss_and_metrics(plain, no_reference, batch["reply_tokens"], counts, args)
    labelled = model(**{**preference.model_inputs(batch), "auxiliary_losses": True})
    auxiliary = (labelled - model(**preference.model_inputs(batch))).flatten()[int(np.argmax(batch["labels"] >= 0))]
    assert preference.has_auxiliary_losses(model) and float(auxiliary) > 1e-3
    (loss + auxiliary.astype(loss.dtype)).backward()
    expected = gradients(model)
    losses = model(**preference.training_inputs(batch))
    both, figures = preference.batch_loss(losses, batch, no_reference, counts, args, auxiliary=True)
    both.backward()
    assert figures["aux_loss"] == pytest.approx(float(auxiliary), rel=1e-5)
    assert np.abs(preference.sum_of_replies(losses, batch).numpy() - plain.numpy()).max() < 1e-6
    found = gradients(model)
    for name in expected:
        assert np.abs(found[name] - expected[name]).max() < 1e-5 * max(1, np.abs(expected[name]).max()), name


@pytest.mark.parametrize("algo", ["nf4", "weight_only_int8"])
def test_an_adapter_of_a_quantized_base_learns_its_pairs(algo, world, tmp_path):
    """The reference is the quantized base: policy and reference are equal before the first step."""
    keys = {"weight_quantize_algo": algo, "lora": True, "lora_rank": 4, "per_device_train_batch_size": 20}
    run(keys_of(world, tmp_path / "out", **keys))
    found = rows(tmp_path / "out")
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and found[-1]["loss"] < found[0]["loss"] - 0.05


def test_a_prefix_learns_its_pairs(world, tmp_path):
    """The reference is the model without a prefix; resuming is bit for bit."""
    keys = {"prefix_tuning": True, "num_prefix_tokens": 4, "learning_rate": 0.05, "per_device_train_batch_size": 20}
    run(keys_of(world, tmp_path / "whole", **keys))
    found = rows(tmp_path / "whole")
    assert found[-1]["loss"] < found[0]["loss"] - 0.02
    tuned = adapters.load_adapter(adapters.from_pretrained(world / "base"), tmp_path / "whole")
    pairs = data.PreferenceDataset(world / "pairs", load_tokenizer(world / "base"), 400, 96)
    batch = data.PreferenceLoader(pairs, 2, 400).batch(0, 0)
    reference = preference.reference_logps(tuned, batch, None, dpo.Args(prefix_tuning=True)).numpy()
    base = preference.reply_logps(adapters.from_pretrained(world / "base"), batch).numpy()
    assert reference.tobytes() == base.tobytes()
    packed = preference.reply_logps(tuned, batch).numpy()
    for number, i in enumerate(np.concatenate(batch["sample_ids"])[:2]):
        prompt, *replies = pairs.pair(i)
        for side, reply in enumerate(replies):
            ids, labels, *_ = data.reply_sample(prompt, reply)
            ids, labels = (paddle.to_tensor(array[None].astype("int64")) for array in (ids, labels))
            alone = -float(tuned(ids, labels=labels).sum())
            assert packed[number, side] == pytest.approx(alone, abs=1e-4)


def test_a_window_splits_the_long_pairs_of_a_run(world, tmp_path, capfd):
    """Mistral with a window of 40: as a window that never matters where pairs are short, and said in a line."""
    pairs = [record(src=f"lamp {i}", response=[f"red {i}", f"ten {i} " * (12 * (i % 2) + 1)]) for i in range(6)]
    write_records(tmp_path / "pairs" / "train.jsonl", pairs)
    shutil.copytree(world / "base", tmp_path / "base")
    config = CONFIG | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 40}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    keys = {"model_name_or_path": str(tmp_path / "base"), "train_dataset_path": str(tmp_path / "pairs")}
    run(keys_of(world, tmp_path / "out", **keys, max_seq_len=120, greedy_zero_padding=True))
    printed = capfd.readouterr().out
    assert "max_seq_len: 120: mistral has a sliding window, so pairs of more than 40 positions have their" in printed
    assert rows(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    tokenizer = load_tokenizer(world / "base")
    whole, parts = (data.PreferenceDataset(tmp_path / "pairs", tokenizer, 200, 50, share_within=n) for n in (200, 40))
    assert (parts.lengths > whole.lengths).tolist() == (whole.lengths > 40).tolist() == [False, True] * 3
    assert parts.lengths.tolist() == [len(parts.sample(i)[0]) for i in range(6)]
    cut = data.PreferenceDataset(tmp_path / "pairs", tokenizer, 44, 50, share_within=40)
    assert cut.lengths.max() <= 44 and len(cut) == 6


def test_the_adapter_switched_off_is_the_base_model(world):
    """The reference of LoRA against another copy of the base, after the adapter has moved; the policy differs."""
    base, model = adapters.from_pretrained(world / "base"), adapters.from_pretrained(world / "base")
    adapters.apply_lora(model, 4, alpha=8.0)
    for layer in adapters.lora_layers(model).values():
        M.set_parameter(layer.lora_B, np.full(layer.lora_B.shape, 0.02, np.float32))
    pairs = data.PreferenceDataset(world / "pairs", load_tokenizer(world / "base"), 400, 96)
    batch = data.PreferenceLoader(pairs, 2, 400).batch(0, 0)
    reference = preference.reference_logps(model, batch, None, dpo.Args(lora=True)).numpy()
    assert reference.tobytes() == preference.reply_logps(base, batch).numpy().tobytes()
    assert np.abs(preference.reply_logps(model, batch).numpy() - reference).max() > 1e-2
    assert not preference.reference_logps(model, batch, None, dpo.Args(reference_free=True)).numpy().any()


RESUMED = {
    "full": {"gradient_accumulation_steps": 2, "greedy_zero_padding": True},
    "lora_plus": KINDS["lora"] | {"rslora_plus": True, "gradient_accumulation_steps": 2, "loss_type": "ipo"},
    "dora_simpo": KINDS["dora"] | {"loss_type": "simpo", "beta": 2.0},
    "hard_updates": {"ref_model_update_steps": 2, "loss_type": "kto"},
    "soft_updates": {"sync_ref_model": True, "ref_model_sync_steps": 3},
    "moving_lora": KINDS["lora"] | {"ref_model_update_steps": 3},
    "bco_shift": {"loss_type": "bco_pair", "bco_shift": True},
    "orpo_recompute": {"loss_type": "orpo", "recompute": True},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise(name, world, tmp_path):
    """Stopped in an epoch, against one run without a stop."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"max_steps": 9, "max_seq_len": 300, "warmup_steps": 2, "weight_decay": 0.1} | RESUMED[name]
    run(keys_of(world, whole, **common))
    common |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    with crash_after_saving(4):
        run(keys_of(world, parts, **common))
    run(keys_of(world, parts, **common, resume_from_checkpoint=True))
    assert_same(parts, whole)


def test_a_checkpoint_without_the_reference_is_refused(world, tmp_path, capfd):
    keys = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    with crash_after_saving(4):
        run(keys_of(world, tmp_path / "out", **keys))
    keys |= {"ref_model_update_steps": 3, "resume_from_checkpoint": True}
    (tmp_path / "again.json").write_text(json.dumps(keys_of(world, tmp_path / "out", **keys)))
    line = fails(dpo, [tmp_path / "again.json"], capfd)
    assert re.search("ref_model_update_steps: .*checkpoint-4 holds no reference of .*; it was saved without", line)


def test_accumulating_equals_one_batch(world, tmp_path):
    """The means are over the pairs and the chosen tokens of the whole step, whatever micro-batch they are in."""
    keys = {"max_seq_len": 300, "max_steps": 2, "loss_type": "orpo", "learning_rate": 3e-4, "sft_loss_ratio": 0.7}
    run(keys_of(world, tmp_path / "once", per_device_train_batch_size=32, **keys))
    run(keys_of(world, tmp_path / "apart", gradient_accumulation_steps=32, **keys))
    for ours, theirs in zip(rows(tmp_path / "apart"), rows(tmp_path / "once")):
        for key in ("loss", "grad_norm", "sft_loss", "rewards/margins", "logps/chosen"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    ours, theirs = tensors(tmp_path / "apart"), tensors(tmp_path / "once")
    assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) < 1e-5


def test_the_best_is_kept_and_loaded(world, tmp_path, capfd):
    out = tmp_path / "out"
    run(
        keys_of(
            world,
            out,
            do_eval=True,
            evaluation_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            save_total_limit=2,
            **KINDS["lora"],
        )
    )
    found = [json.loads(line) for line in (out / "eval_metrics.jsonl").read_text().splitlines()]
    assert [row["eval_accuracy"] for row in found] == [row["eval_rewards/accuracies"] for row in found]
    best = min(found, key=lambda row: row["eval_loss"])
    assert f"best: checkpoint-{best['step']}, loss" in capfd.readouterr().out
    assert json.loads((out / "dev_results.json").read_text())["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)


def test_evaluation_alone_of_a_saved_adapter(world, tmp_path):
    run(keys_of(world, tmp_path / "lora", do_eval=True, **KINDS["lora"]))
    before = tree(tmp_path / "lora")
    run(
        keys_of(
            world, tmp_path / "eval", do_train=False, do_eval=True, lora_path=str(tmp_path / "lora"), **KINDS["lora"]
        )
    )
    found = [json.loads((tmp_path / name / "dev_results.json").read_text()) for name in ("lora", "eval")]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and tree(tmp_path / "lora") == before


TOPOLOGIES = {
    "dp2": {},
    "tp2": {"tensor_parallel_degree": 2},
    "pp2": {"pipeline_parallel_degree": 2},
    "sharding2": {"sharding": "stage2", "sharding_parallel_degree": 2},
    "stage3": {"sharding": "stage3", "sharding_parallel_degree": 2},
}
OF_A_STEP = {  # losses that need numbers of all pairs of a step, and a reference that moves
    "pairs": {"loss_type": ["kto_pair", "aot_unpaired", "aot", "sft"], "loss_weights": [1.0, 0.5, 0.5, 0.1]},
    "moving": {"ref_model_update_steps": 1, "ref_model_mixup_alpha": 0.5, "ld_alpha": 0.5},
    "moving_lora": {"ref_model_update_steps": 1, "lora": True, "lora_rank": 4},
    "kto": {"loss_type": "kto", "undesirable_weight": 1.5},
    "bco": {"loss_type": "bco_pair", "bco_shift": True},
    "kto_lora": {"loss_type": "kto", "lora": True, "lora_rank": 4},
    "experts": {"model_name_or_path": "mixtral"},
}


@pytest.mark.parametrize(
    "way, case", [(way, case) for case in OF_A_STEP for way in TOPOLOGIES if way != "stage3" or "moving" in case]
)
@pytest.mark.sweep(keep=1)
def test_numbers_of_a_step_do_not_depend_on_the_topology(two, world, tmp_path, way, case):
    """Each logged number of three steps of four micro-batches, and the evaluation, against one process."""
    common = {"max_steps": 3, "do_eval": True, "max_seq_len": 300, "learning_rate": 1e-3, **OF_A_STEP[case]}
    if case == "experts":
        shutil.copytree(world / "base", tmp_path / "mixtral")
        changes = {
            "vocab_size": 3072,
            "max_position_embeddings": 512,
            "num_key_value_heads": 2,
            "num_attention_heads": 6,
        }
        tiny_models.write(tmp_path / "mixtral", "mixtral", **changes)
        common["model_name_or_path"] = str(tmp_path / "mixtral")
    run(keys_of(world, tmp_path / "one", gradient_accumulation_steps=4, **common))
    ranks = 2 if way in ("dp2", "sharding2", "stage3") else 1
    keys = keys_of(world, tmp_path / "two", gradient_accumulation_steps=4 // ranks, **common, **TOPOLOGIES[way])
    (tmp_path / "two.json").write_text(json.dumps(keys))
    two.run("jobs_parallel:script", "dpo", [str(tmp_path / "two.json")])
    for one, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        names = {"loss", "grad_norm", "kl", "sft_loss", "rewards/margins", "rewards/chosen", "logps/rejected"}
        assert ("aux_loss" in one) == (case == "experts")
        for name in {*names, "aux_loss"} & set(one):
            # a sum of log-probabilities of 400 nats has a float32 step of 3e-5, times beta
            assert other[name] == pytest.approx(one[name], rel=2e-4, abs=4e-6), name
    results = [json.loads((tmp_path / name / "dev_results.json").read_text()) for name in ("one", "two")]
    assert results[1] == pytest.approx(results[0], rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("kind", ["soft", "lora"])
def test_a_moving_reference_resumes_on_another_topology(kind, two, world, tmp_path):
    """Saved by one process between two updates, resumed by two with stage 3, and the other way round."""
    keys = {"max_steps": 7, "max_seq_len": 300, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    keys = keys_of(world, tmp_path / "one", gradient_accumulation_steps=2, **keys, **MOVING[kind])
    sharded = keys | {"gradient_accumulation_steps": 1, **TOPOLOGIES["stage3"]}
    resumed = {"output_dir": str(tmp_path / "two"), "resume_from_checkpoint": str(tmp_path / "one" / "checkpoint-3")}
    run(keys)
    (tmp_path / "two.json").write_text(json.dumps(sharded | resumed))
    two.run("jobs_parallel:script", "dpo", [str(tmp_path / "two.json")])
    resumed = {"output_dir": str(tmp_path / "back"), "resume_from_checkpoint": str(tmp_path / "two" / "checkpoint-5")}
    run(keys | resumed)
    for folder in ("two", "back"):
        found, expected = rows(tmp_path / folder), rows(tmp_path / "one")
        for ours, theirs in zip(found[::-1], expected[::-1]):
            for name in ("loss", "grad_norm", "rewards/margins"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=4e-6), (folder, ours["step"], name)


# ---------------------------------------------------------------------------------------------- bad input


def put(**changes):
    return lambda world, keys: keys.update(changes)


def lines(*changed):
    """train.jsonl of a good record and then these."""

    def change(world, keys):
        text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in (record(), *changed))
        (world / "pairs" / "train.jsonl").write_text(text + "\n")

    return change


def prefix_model(world, keys):
    tuned = adapters.apply_prefix(adapters.from_pretrained(world / "base"), 4)
    adapters.save_adapter(tuned, world / "prefix", world / "base")
    load_tokenizer(world / "base").save(world / "prefix")
    keys["model_name_or_path"] = str(world / "prefix")


def pissa_adapter(world, keys):
    tuned = adapters.apply_lora(adapters.from_pretrained(world / "base"), 4, alpha=8.0, pissa=True)
    adapters.save_adapter(tuned, world / "pissa", world / "base")
    keys.update(lora=True, lora_rank=4, lora_path=str(world / "pissa"))


def stretched_qwen(world, keys):
    path, old = world / "base" / "config.json", tiny_models.CONFIGS["qwen_ntk"]
    path.write_text(json.dumps(old))
    keys["max_seq_len"] = 600


BAD = {  # name: (change(world, keys), what the line says)
    "not_json": (lines("{src: 1}"), r"train\.jsonl:2: not a JSON object"),
    "missing_response": (lines({"src": "a", "sort": [1, 0]}), r"train\.jsonl:2: key 'response' is missing"),
    "src_type": (lines(record(src=[1])), r"train\.jsonl:2: 'src' must be a string or a list of strings, found \[1\]"),
    "tgt_count": (lines(record(tgt=["b"])), r"train\.jsonl:2: 'src' has 1 turns and 'tgt' has 1; .* one fewer"),
    "no_src": (lines(record(src=[])), r"train\.jsonl:2: 'src' has 0 turns and 'tgt' has 0"),
    "one_response": (
        lines(record(response=["b"], sort=[1])),
        r"train\.jsonl:2: 'response' must be a list of two .*loss_type kto",
    ),
    "response_type": (lines(record(response=["b", 2])), r"train\.jsonl:2: 'response' must be a list of two strings"),
    "empty_response": (lines(record(response=["b", " "])), r"train\.jsonl:2: 'response' number 2 is empty"),
    "equal_sort": (lines(record(sort=[1, 1])), r"train\.jsonl:2: 'sort' is \[1, 1\]: equal"),
    "sort_count": (lines(record(sort=[1])), r"train\.jsonl:2: 'sort' must be a list of two numbers"),
    "sort_type": (lines(record(sort=["a", "b"])), r"train\.jsonl:2: 'sort' must be a list of two numbers"),
    "context": (lines(record(context="x")), r"train\.jsonl:2: 'context' must be an object"),
    "missing_file": (put(train_dataset_path="nowhere.jsonl"), r"nowhere\.jsonl: no such file or folder"),
    "no_train_path": (put(train_dataset_path=""), "train_dataset_path: missing"),
    "no_dev_path": (put(dev_dataset_path="", do_eval=True), "dev_dataset_path: missing"),
    "too_short": (put(max_seq_len=3), "none of the 20 pairs can be learned with max_seq_len 3"),
    "no_room": (put(max_seq_len=2), "max_seq_len: 2; it must be at least 3"),
    "loss_type": (put(loss_type="dpo"), "loss_type: 'dpo'; possible are sigmoid, hinge, ipo, simpo, or, robust, .*sft"),
    "loss_weights": (put(loss_weights=[1.0, 2.0]), "loss_weights: 2 weights for 1 losses: sigmoid"),
    "kto_weights": (put(desirable_weight=2), "desirable_weight: 2.0; only kto and apo_zero_unpaired have it"),
    "kto_of_several": (put(loss_type=["kto", "sigmoid"]), "loss_type: 'kto'; possible are sigmoid"),
    "kto_ld_alpha": (put(loss_type="kto", ld_alpha=0.5), "ld_alpha: 0.5; it compares the replies of a pair"),
    "kto_without_reference": (put(loss_type="kto", reference_free=True), "reference_free: loss_type kto needs a ref"),
    "unpaired": (lines({"prompt": "a", "completion": "b", "label": True}), r"unpaired preference: dpo.py with loss_ty"),
    "only_sft": (put(loss_type=["sft"]), "loss_type: no preference loss; finetune.py learns replies alone"),
    "exo_pair": (put(loss_type="exo_pair"), r"label_smoothing: 0.0; exo_pair takes the logarithm of it"),
    "ld_alpha": (put(ld_alpha=1.5), "ld_alpha: 1.5; it must be between 0 and 1"),
    "reference_free": (put(reference_free=True, loss_type="dpop"), "reference_free: loss_type dpop needs a reference"),
    "mixup": (put(ref_model_mixup_alpha=0), "ref_model_mixup_alpha: 0.0; it must be above 0 and at most 1"),
    "beta": (put(beta=0), "beta: 0.0; it must be positive"),
    "smoothing": (put(label_smoothing=0.5), "label_smoothing: 0.5; it must be at least 0 and below 0.5"),
    "smoothing_of_hinge": (put(label_smoothing=0.1, loss_type="hinge"), "label_smoothing: loss_type hinge has none"),
    "nothing_to_learn": (put(pref_loss_ratio=0), "pref_loss_ratio and sft_loss_ratio are both 0"),
    "bco_shift": (put(bco_shift=True, loss_type="hinge"), "bco_shift: loss_type hinge has no shift"),
    "mixed_adapters": (
        put(sync_ref_model=True, lora=True),
        "ref_model_mixup_alpha: 0.6; with an adapter it must be 1, a copy: the mean of two adapters' A and B",
    ),
    "pissa": (put(lora=True, pissa=True), "pissa: True: only finetune.py trains PiSSA: it changes the base weights"),
    "pissa_adapter": (pissa_adapter, "pissa: a PiSSA adapter changes the base weights"),
    "adapter_rank": (
        lambda world, keys: (pissa_adapter(world, keys), keys.update(lora_rank=8)),
        "holds LoRA of rank 4, but the arguments ask for LoRA of rank 8",
    ),
    "dora_alone": (put(dora=True), "dora needs lora: true"),
    "prefix_and_lora": (put(prefix_tuning=True, lora=True), "lora and prefix_tuning are both true; choose one"),
    "prefix_model": (prefix_model, "has a trained prefix"),
    "stretched_qwen": (stretched_qwen, "max_seq_len: 600: qwen stretches its positions behind 8 only outside"),
    "best_by": (
        put(do_eval=True, evaluation_strategy="steps", save_strategy="steps", metric_for_best_model="ppl",
            load_best_model_at_end=True),
        "metric_for_best_model: ppl; possible here are loss and accuracy",
    ),
    "do_predict": (put(do_predict=True), "do_predict: there are no test pairs"),
    "degrees": (put(tensor_parallel_degree=2), "= 2 processes, but this run has 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, world, tmp_path, capfd):
    """One line, exit code 2; the run that output_dir holds is still complete, although overwrite_output_dir is set."""
    change, expected = BAD[name]
    own, out = tmp_path / "world", tmp_path / "out"
    shutil.copytree(world, own)
    (out / "checkpoint-3").mkdir(parents=True)
    for old in ("run_args.json", "adapter_config.json", "metrics.jsonl", "checkpoint-3/model.safetensors"):
        (out / old).write_text("{}")
    keys = keys_of(own, out, overwrite_output_dir=True)
    change(own, keys)
    path = tmp_path / "out.json"
    path.write_text(json.dumps(keys))
    before = tree(tmp_path)
    line = fails(dpo, [path], capfd)
    assert re.search(expected, line), line
    assert tree(tmp_path) == before
    print(f"{name}\t{line.replace(str(tmp_path), '…')}")


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, capfd):
    keys = keys_of(world, tmp_path / "out", learning_rate=1e38)
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    line = fails(dpo, [tmp_path / "keys.json"], capfd)
    assert re.search(r"step 1: the loss or its gradient is (nan|-?inf); its batch is in ", line), line
    assert "reply_ids" in json.loads((tmp_path / "out" / "nonfinite-step-1.json").read_text())


# ---------------------------------------------------------------------------------------------- configs, repository

UPSTREAM = SHARED / "upstream" / "configs" / "llama"
UPSTREAM_RUNS = {
    "dpo_lora_argument.json": True,
    "dpo_argument.json": False,
    "simpo_argument.json": False,
    "flashmask/dpo.json": False,
    "kto_lora_argument.json": False,
    "kto_argument.json": False,
}


@pytest.mark.parametrize("name", UPSTREAM_RUNS)
def test_upstream_config(name, world, tmp_path, capfd):
    """Only paths, lengths and steps change. If it asks for several processes, one line says so; then degrees are 1."""
    if not UPSTREAM.is_dir():
        pytest.skip("needs ../shared/upstream, on the machine where the project is developed")
    ours = keys_of(world, tmp_path / "out", max_steps=2)
    given = (
        "model_name_or_path train_dataset_path output_dir max_steps max_seq_len max_prompt_len max_new_tokens".split()
    )
    given += ["dev_dataset_path"] * ("flashmask" not in name)
    ours["loss_type"] = "kto"  # PaddleNLP has a script for that
    given += ["loss_type"] * ("kto" in name)
    argv = [str(UPSTREAM / name), *(part for key in given for part in (f"--{key}", str(ours[key])))]
    if not UPSTREAM_RUNS[name]:
        assert "processes, but this run has 1" in fails(dpo, argv, capfd) and not (tmp_path / "out").exists()
        argv += ["--tensor_parallel_degree", "1"]
    capfd.readouterr()
    trainer.run_script(dpo.main, dpo.Args, argv)
    assert len(losses(tmp_path / "out")) == 2 and "a key of" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["llama_dpo", "llama_kto"])
def test_demo_config_parses(name):
    args = parse_args(dpo.Args, [str(ROOT / "configs" / f"{name}.json")])
    assert args.do_train and args.lora and args.model_name_or_path == "checkpoints/llama_lora"
    assert (ROOT / args.train_dataset_path).is_file() and (ROOT / args.dev_dataset_path).is_file()


def test_replies_end_with_the_table_of_positions():
    """A learned table has an end; a prompt longer than max_prompt_len is kept where its pair fits."""
    model = tiny_models.build("gpt2").eval()
    limit = model.config.max_position_embeddings
    prompt = np.arange(limit - 3) % model.config.vocab_size
    tokenizer = types.SimpleNamespace(stop_ids=[], decode_reply=list)
    limits = {"max_new_tokens": 9, "max_length": model.config.max_model_len}
    (reply,) = trainer.generate_replies(model, tokenizer, [prompt], **limits)
    assert len(reply) == 3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        script = f"import sys\nimport numpy as np\n{RECIPE}\nnp.savez(sys.argv[1], **arrays)\n"
        arguments = [f"{folder}/out.npz", str(ROOT / "tests" / "golden"), json.dumps(GOLDEN["given"])]
        subprocess.run([sys.argv[1], "-c", script, *arguments], check=True, cwd=folder)
        arrays = {name: value.item() for name, value in np.load(f"{folder}/out.npz").items()}
    text = json.dumps({"given": GOLDEN["given"], "trl": arrays}, indent=1) + "\n"
    (ROOT / "tests" / "golden" / "dpo_trl.json").write_text(text)
