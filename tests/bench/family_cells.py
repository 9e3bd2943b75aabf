"""Checks of one family, for test_families.py (tiny models and goldens) and family_table.py (tests/RESULTS.md).

Layouts: the same samples packed, padded left, padded right, and single: losses and all gradients must agree.
Goldens: numbers of the family's own software, ../shared/golden/hf and ../shared/golden/models.
Scripts: finetune.py (all weights, LoRA, prefix) and pretrain.py on tiny data: stopped, resumed, their output loaded.
"""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import paddle
from conftest import SHARED
from jobs_parallel import quick
from test_model import gradients, largest, left_padding, mean_loss, packed_batch, tensor, zero_grad
from tiny_models import SPECIAL, TWO_POSITIONS

import adapters
import data
import families
import finetune
import formats.weights
import model as M
import pretrain
import trainer
from formats.tokenizer import load_tokenizer
from modules import positions as rotary

# ========================================================================================================= layouts

LENGTHS = ((9, 1, 14, 5), (17, 12), (30,), (1,))


def make_samples(name, lengths=LENGTHS, seed=1, special=SPECIAL):
    """Packs of (ids, labels); the first third of a sample is its prompt, for ChatGLM-6B with a mask token and <sop>."""
    generator = np.random.default_rng(seed)
    packs = []
    for row in lengths:
        pack = []
        for n in row:
            ids, target = generator.integers(3, 50, n), generator.integers(3, 50, n)
            prompt = n // 3
            target[:prompt] = -100
            if name in TWO_POSITIONS and prompt > 1:
                ids[prompt - 1], ids[prompt] = special["gmask" if n % 2 else "mask"], special["sop"]
            pack.append((ids, target))
        packs.append(pack)
    return packs


def batches(packs, layout):
    """[(ids, labels, positions, mask rows)], and where each sample is: [(batch, row, first, end)]."""
    samples = [sample for pack in packs for sample in pack]
    if layout == "packed":
        T, where = 32, []
        for b, pack in enumerate(packs):
            ends = np.cumsum([len(ids) for ids, _ in pack])
            where += [(0, b, end - len(ids), end) for end, (ids, _) in zip(ends, pack)]
        return [packed_batch(packs, T)], where
    if layout == "alone":
        singles = [(ids[None], labels[None], None, None) for ids, labels in samples]
        return singles, [(i, 0, 0, len(ids)) for i, (ids, _) in enumerate(samples)]
    T = max(len(ids) for ids, _ in samples) + 2
    if layout == "right":
        return [packed_batch([[sample] for sample in samples], T)], [
            (0, i, 0, len(ids)) for i, (ids, _) in enumerate(samples)
        ]
    ids, labels, mask = (
        np.zeros((len(samples), T), np.int64),
        np.full((len(samples), T), -100),
        np.zeros((len(samples), T), np.int64),
    )
    for i, (sample, target) in enumerate(samples):
        ids[i, T - len(sample) :], labels[i, T - len(sample) :], mask[i, T - len(sample) :] = sample, target, 1
    return [(ids, labels, *left_padding(mask))], [(0, i, T - len(ids), T) for i, (ids, _) in enumerate(samples)]


def losses_and_gradients(model, packs, layout):
    """([losses (T,) of each sample], {name: gradient of the mean loss})."""
    zero_grad(model)
    layout_batches, where = batches(packs, layout)
    total, losses = sum(int((labels != -100).sum()) for pack in packs for _, labels in pack), []
    for ids, labels, positions, rows in layout_batches:
        optional = [None if a is None else tensor(a) for a in (positions, rows)]
        loss = model(tensor(ids), *optional, labels=tensor(labels))
        losses.append(loss.numpy())
        (loss.sum() / total).backward()
    return [losses[i][b, first:end] for i, b, first, end in where], gradients(model)


def assert_layouts_agree(model, packs, layouts=("packed", "left", "right")):
    expected, expected_gradients = losses_and_gradients(model, packs, "alone")
    scale = max(np.abs(g).max() for g in expected_gradients.values())
    for layout in layouts:
        losses, actual = losses_and_gradients(model, packs, layout)
        for i, (a, b) in enumerate(zip(losses, expected)):
            assert largest(a, b) < 2e-5 * max(1.0, np.abs(b).max()), (layout, i, largest(a, b))
        for key in expected_gradients:
            assert largest(actual[key], expected_gradients[key]) < 2e-5 * scale, (
                layout,
                key,
                largest(actual[key], expected_gradients[key]),
                scale,
            )
    return expected_gradients


# ========================================================================================================= goldens

GOLDEN = SHARED / "golden"
NOT_OURS = ("ernie4_5", "gemma3_text", "gpt_neox", "phi3")  # goldens of families that FAMILIES does not have
GOLDENS = sorted(
    path.parent
    for kind in ("hf", "models")
    for path in (GOLDEN / kind).glob("*/config.json")
    if path.parent.name not in NOT_OURS
)


def golden_files(folder):
    """({name: array}, the object of golden.json or {}) of a golden folder."""
    oracle = dict(
        np.load(folder / ("oracle.npz" if (folder / "oracle.npz").is_file() else "golden.npz"), allow_pickle=False)
    )
    notes = json.loads((folder / "golden.json").read_text()) if (folder / "golden.json").is_file() else {}
    return oracle, notes


def golden_model(folder, dialect="config.json", **changes):
    """The model of a golden folder in eval mode; changes replace keys of its config.json."""
    source = json.loads((folder / dialect).read_text()) | changes
    model = M.build(families.ModelConfig.from_dict(source, folder / dialect))
    formats.weights.load_weights(model, folder)
    model.eval()
    return model


@contextlib.contextmanager
def as_its_oracle(folder):
    """The oracle of dynamic RoPE used the frequencies of an earlier call with 31 tokens."""
    before = rotary.document_lengths
    if "dynamic" in folder.name:
        rotary.document_lengths = lambda positions: paddle.full(positions.shape, 31, "int64")
    try:
        yield
    finally:
        rotary.document_lengths = before


def hidden_states(model, ids):
    """[input of the first block, output of each block, output of the final norm], each (B, T, D) numpy."""
    states, embed = [], model.embed
    hooks = [
        layer.register_forward_post_hook(lambda layer, given, out: states.append(out[0].numpy()))
        for layer in model.layers
    ]
    model.embed = lambda *args: states.append(embed(*args)) or states[0]
    with paddle.no_grad():
        states.append(model.hidden_states(tensor(ids)).numpy())
    del model.embed
    for hook in hooks:
        hook.remove()
    return [states[0].numpy(), *states[1:]]


def compare_with_golden(folder):
    """{"logits", "hidden", "loss", "norm", "gradients", "padded"}: largest differences, relative for the gradients."""
    oracle, notes = golden_files(folder)
    ids, model = oracle["input_ids"].astype(np.int64), golden_model(folder)
    labels = np.concatenate([oracle.get("labels", ids)[:, 1:], np.full((len(ids), 1), -100)], 1).astype(np.int64)
    differences = {}
    with as_its_oracle(folder):
        with paddle.no_grad():
            differences["logits"] = largest(model(tensor(ids)).numpy(), oracle["logits"])
        differences["hidden"] = compare_hidden(model, ids, oracle)
        loss = mean_loss(model(tensor(ids), labels=tensor(labels)), labels)
        loss.backward()
        differences["loss"] = abs(float(loss) - float(notes.get("loss", oracle["loss"])))
        ours = gradients(model)
        differences["norm"], differences["gradients"] = compare_gradients(model, ours, oracle, notes)
        differences["padded"] = compare_padded(model, oracle, folder)
    return differences


def compare_hidden(model, ids, oracle):
    """Largest difference of the hidden states, relative to the largest value of each."""
    ours = hidden_states(model, ids)
    if "hidden_embed" in oracle:
        theirs = [oracle["hidden_embed"], *(oracle[f"hidden_layer_{i}"] for i in range(len(model.layers)))]
        ours, theirs = [*ours[:-1], ours[-1]], [*theirs, oracle["hidden_final_norm"]]
    else:  # transformers returns the last one only after the final norm
        theirs = [oracle[f"hidden_{i}"] for i in range(len(model.layers) + 1)]
        ours = [*ours[:-2], ours[-1]]
        if model.project_out is not None:
            ours[-1] = model.project_out(tensor(ours[-1])).numpy()
    return max(largest(a, b) / max(1.0, np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


def compare_gradients(model, ours, oracle, notes):
    """(relative difference of the gradient norms, largest difference of the gradients in the oracle)."""
    if "grad_norm" in oracle:
        norms = [(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in ours.values())), float(oracle["grad_norm"]))]
        theirs = {str(name): oracle[f"grad_{i}"] for i, name in enumerate(oracle["grad_names"])}
    else:
        norms = [
            (np.linalg.norm(ours[name].astype(np.float64)), norm)
            for name, norm in notes["grad_norms"].items()
            if name in ours
        ]
        theirs = {key[5:]: value for key, value in oracle.items() if key.startswith("grad:")}
    unknown = [name for name in theirs if name not in ours and not name.endswith(("gate_up_proj", "experts.down_proj"))]
    assert not unknown and any(name in ours for name in theirs), unknown
    worst = max(largest(ours[name], g) / max(1.0, np.abs(g).max()) for name, g in theirs.items() if name in ours)
    return max(abs(a / b - 1) for a, b in norms), worst


def compare_padded(model, oracle, folder):
    """Largest difference of the logits of the left-padded batch, without padding."""
    ids = oracle["lp_input_ids" if "lp_input_ids" in oracle else "pad_input_ids"].astype(np.int64)
    mask = oracle["lp_attention_mask" if "lp_attention_mask" in oracle else "pad_attention_mask"]
    theirs = oracle["lp_logits" if "lp_logits" in oracle else "pad_logits"]
    if mask.ndim == 4:  # ChatGLM-6B's marks hidden keys: padding is hidden from all
        mask = 1 - mask[:, 0].all(1).astype(np.int64)
    if "ntk" in folder.name:  # its logn counts padding, so a padded row differs from a single one; ours does not
        alone = model(tensor(ids[1:, mask[1] == 1])).numpy()
        theirs = np.concatenate([theirs[:1], np.concatenate([theirs[1:, : ids.shape[1] - alone.shape[1]], alone], 1)])
    positions, rows = left_padding(mask)
    with paddle.no_grad():
        return largest(model(tensor(ids), tensor(positions), tensor(rows)).numpy()[mask == 1], theirs[mask == 1])


def golden_tokens(folder, dialect="config.json"):
    """Whether greedy tokens of single rows, and of a left-padded batch if there is one, equal the golden's."""
    oracle, _ = golden_files(folder)
    model, right = golden_model(folder, dialect), True
    prompt = oracle["gen_prompt"].astype(np.int64)
    expected_tokens = oracle["gen_out" if "gen_out" in oracle else "gen_ids"]
    expected_tokens = expected_tokens[:, prompt.shape[1] :] if expected_tokens.shape[1] > 20 else expected_tokens
    for row in range(len(prompt)):
        right &= np.array_equal(
            M.generate(model, prompt[row : row + 1], expected_tokens.shape[1])[0, prompt.shape[1] :],
            expected_tokens[row],
        )
    if "lpgen_out" in oracle and "dynamic" not in folder.name:
        ids, mask, expected_tokens = oracle["lp_input_ids"], oracle["lp_attention_mask"], oracle["lpgen_out"]
        actual = M.generate(model, ids, 20, attention_mask=mask)
        right &= np.array_equal(actual[:, -20:], expected_tokens[:, -20:])
    return right


# ========================================================================================================= scripts

COLORS = ("red", "blue", "green", "grey", "black", "white")
THINGS = ("shirt", "coat", "lamp", "sofa", "shoe", "scarf", "bag")


def make_world(folder):
    """A folder with tokenizer.model (48 pieces), records of train and dev, and corpus.bin with its index."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(f"{color} {thing}", f"a {color} {thing} to love.") for color in COLORS for thing in THINGS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for pair in pairs for text in pair]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=48,
        model_type="bpe",
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    for split, part in (("train", pairs[:36]), ("dev", pairs[36:])):
        (folder / "sft").mkdir(exist_ok=True)
        (folder / "sft" / f"{split}.json").write_text(
            "".join(json.dumps({"src": a, "tgt": b}) + "\n" for a, b in pairs if (a, b) in part)
        )
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": b}) + "\n" for _, b in pairs * 4))
    data.main(["corpus", str(folder / "corpus.jsonl"), "--tokenizer", str(folder), "--output", str(folder / "corpus")])
    return folder


def give_tokenizer(folder, world):
    """Copy the tokenizer into a model's folder; for ChatGLM-6B with its special ids and its chat template."""
    config = families.ModelConfig.from_json(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(world / name, folder / name)
    if config.position != "rope_2d":
        return
    ids = {"[MASK]": "mask_token_id", "[gMASK]": "gmask_token_id", "<sop>": "bos_token_id", "<eop>": "eos_token_id"}
    added = {str(config.source[key]): {"content": text, "special": True} for text, key in ids.items()}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "eos_token": "<eop>",
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = {
        "system": "",
        "conversation": ["{{ user }}[gMASK]<sop>", "{{ bot }}<eop>"],
        "query": "{{ query }}[gMASK]<sop>",
    }
    (folder / "chat_template.json").write_text(json.dumps(template))


def run_script(script, keys):
    path = Path(keys["output_dir"] + ".json")
    path.write_text(json.dumps(keys))
    with quick():
        trainer.run_script(script.main, script.Args, [str(path)])


TUNINGS = {
    "sft": ({}, 0.005),
    "lora": ({"lora": True, "lora_rank": 4}, 0.02),
    "prefix": ({"prefix_tuning": True, "num_prefix_tokens": 4}, 0.1),
}


def tune(folder, world, out, kind):
    """finetune.py with packed rows, stopped after 4 of 8 steps, resumed; the loss falls, the result can generate."""
    kind_keys, rate = TUNINGS[kind]
    keys = {
        "model_name_or_path": str(folder),
        "dataset_name_or_path": str(world / "sft"),
        "output_dir": str(out),
        "do_train": True,
        "do_eval": True,
        "src_length": 20,
        "max_length": 44,
        "zero_padding": True,
        "flash_mask": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_new_tokens": 4,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "evaluation_strategy": "no",
        "disable_tqdm": True,
        **kind_keys,
    }
    run_script(finetune, {**keys, "max_steps": 4})
    run_script(finetune, {**keys, "max_steps": 8, "resume_from_checkpoint": True})
    results = json.loads((out / "dev_results.json").read_text())
    model = adapters.from_pretrained(folder if kind == "prefix" else out)
    if kind == "prefix":
        adapters.load_adapter(model, out)
        model.eval()
    tokenizer, tuned = load_tokenizer(out), [row["loss"] for row in log_rows(out)]
    train, dev = (finetune.SFTDataset(str(world / "sft"), tokenizer, 20, 44, split) for split in ("train", "dev"))
    assert len(tuned) == 8 and np.isfinite(tuned).all(), tuned
    before, after = loss_on(adapters.from_pretrained(folder), train), loss_on(model, train)
    assert after < before - (0.001 if kind == "prefix" else 0.1), (before, after)
    assert abs(loss_on(model, dev) - results["eval_loss"]) < 1e-4
    prompt = np.asarray(dev.prompt_ids(0), np.int64)[None]
    assert M.generate(model, prompt, 4).shape == (1, prompt.shape[1] + 4)


def pretrain_and_go_on(folder, world, out):
    """pretrain.py from random weights, stopped after 4 of 8 steps, resumed; the loss falls."""
    keys = {
        "model_name_or_path": str(folder),
        "input_dir": str(world / "corpus"),
        "output_dir": str(out),
        "do_train": True,
        "do_eval": True,
        "split": "90,10,0",
        "max_seq_length": 40,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "evaluation_strategy": "no",
        "max_evaluate_steps": 1,
        "disable_tqdm": True,
    }
    run_script(pretrain, {**keys, "max_steps": 4})
    run_script(pretrain, {**keys, "max_steps": 8, "resume_from_checkpoint": True})
    losses = [row["loss"] for row in log_rows(out)]
    assert len(losses) == 8 and np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.05, losses
    model = adapters.from_pretrained(out)
    ids = np.array([[5, 6, 7, 8]])
    assert np.isfinite(model(tensor(ids)).numpy()).all() and M.generate(model, ids, 3).shape == (1, 7)


def log_rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def loss_on(model, dataset):
    """Mean loss of the target tokens, one sample at a time with default positions."""
    total, tokens = 0.0, 0
    with paddle.no_grad():
        for i in range(len(dataset)):
            ids, labels = (tensor(part[None].astype(np.int64)) for part in dataset.sample(i))
            total += float(model(ids, labels=labels).sum())
            tokens += int((labels != -100).sum())
    return total / tokens
