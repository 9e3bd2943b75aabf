"""Every family of tests/golden/tiny_models.py: goldens, masks, positions, adapters, experts, generation, scripts.

    python -m pytest tests/test_families.py                  # CPU, about a minute; with goldens if ../shared is there
    python -m pytest tests/test_families.py --slow           # every script on every family
    python -m pytest tests/test_families.py --hf-python PY   # also compares with transformers on the same weights

The result for a sample must not depend on its batch: packed with others, padded left or right, or by itself.
"""

import math
import re

import kernels

import family_table
import numpy as np
import paddle
import pytest
import tiny_models
from bench_train import global_grad_norm
from conftest import ROOT
from family_cells import (
    GOLDEN,
    GOLDENS,
    assert_layouts_agree,
    compare_with_golden,
    give_tokenizer,
    golden_files,
    golden_model,
    golden_tokens,
    losses_and_gradients,
    make_samples,
    make_world,
    pretrain_and_go_on,
    run_script,
    tune,
)
from make_families_golden import STEPS, record
from test_model import gradients, largest, left_padding, mean_loss, packed_batch, tensor, zero_grad
from tiny_models import ALIBI, MOE, NAMES, SPECIAL, STRETCHED, TWO_POSITIONS, build

import adapters
import data
import families
import finetune
import formats.weights
import model as M
import trainer
from alignment import preference
from arguments import TrainingArgs
from data import collate_pairs, pair_sample
from formats.files import UserError
from formats.tokenizer import load_tokenizer
from modules import positions as rotary

pytestmark = pytest.mark.sweep(keep=6)


def each_with(kinds):
    """(name, kind) for all families and kinds: by default one kind per family, in rotation; the rest with --slow."""
    return [
        pytest.param(name, kind, marks=[] if (i - k) % len(kinds) == 0 else [pytest.mark.slow])
        for i, name in enumerate(NAMES)
        for k, kind in enumerate(kinds)
    ]


# ==================================================================================== packing, padding, single samples


def test_every_family_has_a_tiny_model():
    assert {tiny_models.family(name) for name in NAMES} == set(families.FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_packed_padded_and_single_samples_agree(name):
    model = build(name)
    actual = assert_layouts_agree(model, make_samples(name))
    silent = [key for key, g in actual.items() if not np.abs(g).max()]
    assert not silent or name in MOE, f"no gradient: {silent}"


@pytest.mark.parametrize("name, kind", each_with(("plain", "projection")))
def test_prefix_packed_padded_and_single_samples_agree(name, kind):
    model = prefixed(name, kind == "projection")
    layouts = ("right",) if model.distances_count else ("packed", "left", "right")
    actual = assert_layouts_agree(model, make_samples(name), layouts)
    assert all(np.abs(g).max() > 0 for g in actual.values())


def prefixed(name, projection=False, tokens=3):
    """The model with a prefix of random values."""
    model = adapters.apply_prefix(
        build(name), tokens, projection=projection, projection_hidden_size=20 if projection else None
    )
    for i, w in enumerate(adapters.adapter_weights(model)):
        M.set_parameter(
            w.parameter, np.random.default_rng([7, i]).standard_normal(w.parameter.shape).astype(np.float32)
        )
    return model.eval()


@pytest.mark.parametrize("name", ALIBI + ("mistral", "gemma2"))
def test_distances_to_a_prefix_are_those_of_a_single_sample(name, monkeypatch):
    """The test above can fail: with one prefix per packed row, later samples would be too far from it."""
    model, packs = prefixed(name), make_samples(name)
    assert model.distances_count
    expected = losses_and_gradients(model, packs, "alone")[0]
    with pytest.raises(UserError, match="a row holds several samples; put one in each row"):
        losses_and_gradients(model, packs, "packed")
    monkeypatch.setattr(model, "distances_count", False)
    assert max(largest(a, b) for a, b in zip(losses_and_gradients(model, packs, "packed")[0], expected)) > 1e-3


def samples_of(name, n=2, T=12, seed=5):
    """ids (B, T), one prompt per row (ChatGLM-6B: a context that ends with <sop>), and shifted labels (B, T)."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, 50, (n, T))
    if name in TWO_POSITIONS:
        ids[:, -2:] = SPECIAL["gmask"], SPECIAL["sop"]
    labels = generator.integers(3, 50, (n, T))
    labels[:, : T // 3] = -100
    return ids, labels


@pytest.mark.parametrize("name", NAMES)
def test_recompute_gives_the_same_bits(name):
    """In training mode, with the family's auxiliary losses."""
    actual = []
    for recompute in (False, True):
        model = build(name)
        model.train()
        model.recompute = recompute
        ids, labels, positions, rows = packed_batch(make_samples(name), 32)
        losses = model(tensor(ids), tensor(positions), tensor(rows), labels=tensor(labels))
        losses.sum().backward()
        actual.append((losses.numpy(), gradients(model)))
    assert np.array_equal(actual[0][0], actual[1][0])
    assert all(np.array_equal(actual[0][1][key], actual[1][1][key]) for key in actual[0][1])


# =========================================================================================================== experts


def naive_balance(model, ids, positions, rows, kept):
    """The balancing loss by loops over the tokens that are not padding (kept (B, T)).

    Of all layers together or, for DeepSeek-V2, per layer and row, with shares of all choices.
    """
    moe, ids = model.config.experts, tensor(ids)
    _, probabilities = model.run_all(ids, model.start_forward(ids, tensor(positions), tensor(rows)), None)
    layers = [layer.numpy().astype(np.float64).reshape(*kept.shape, moe.num_experts) for layer in probabilities]
    all_layers = [[p[b][kept[b]] for p in layers for b in range(len(kept))]]
    groups = [[p[b][kept[b]]] for p in layers for b in range(len(kept))] if moe.aux_by_layer else all_layers
    total = 0.0
    for group in groups:
        chosen, tokens = np.zeros(moe.num_experts), np.concatenate(group)
        for p in tokens:
            teams = p.reshape(moe.n_group, -1)
            allowed = np.argsort(-teams.max(1), kind="stable")[: moe.topk_group]
            p = np.where(np.isin(np.arange(moe.num_experts) // teams.shape[1], allowed), p, -1.0)
            chosen[np.argsort(-p, kind="stable")[: moe.top_k]] += 1
        total += moe.num_experts * (chosen / len(tokens) * tokens.mean(0)).sum()
    return total / len(kept) / moe.top_k if moe.aux_by_layer else total


def aux_loss(model, batch):
    """The term that training adds to the loss of each labelled token."""
    ids, labels, positions, rows = (tensor(a) for a in batch)
    model.train()
    added = (
        model(ids, positions, rows, labels=labels) - model(ids, positions, rows, labels=labels, auxiliary_losses=False)
    ).numpy()
    model.eval()
    counted = added[batch[1] != -100]
    assert np.abs(added[batch[1] == -100]).max(initial=0) == 0 and np.ptp(counted) < 1e-6
    return counted.mean()


@pytest.mark.parametrize("name", [name for name in MOE if name != "deepseek_v3"])
def test_balancing_loss_counts_no_padding(name):
    model = build(name)
    packs, coefficient = make_samples(name), model.config.experts.aux_loss_coef
    assert coefficient > 0
    for T in (32, 57):
        ids, labels, positions, rows = packed_batch(packs, T)
        lengths = [sum(len(s) for s, _ in pack) for pack in packs]
        kept = np.arange(T) < np.array(lengths)[:, None]
        expected = coefficient * naive_balance(model, ids, positions, rows, kept)
        assert aux_loss(model, (ids, labels, positions, rows)) == pytest.approx(expected, rel=1e-3), T
    model.train()
    moe, with_it = model.config.experts, {}
    for with_balance in (True, False):
        zero_grad(model)
        losses = model(
            tensor(ids), tensor(positions), tensor(rows), labels=tensor(labels), auxiliary_losses=with_balance
        )
        losses.sum().backward()
        router = {key: g for key, g in gradients(model).items() if key.endswith("gate.weight") and "shared" not in key}
        # With one expert per token, whose weight is normalized to 1, only the balancing loss moves the router.
        assert router and all(
            (np.abs(g).max() > 0) == (with_balance or moe.top_k > 1 or not moe.norm_topk_prob) for g in router.values()
        )
        assert all(largest(g, with_it[key]) > 1e-5 for key, g in router.items() if with_it), (
            "the balance moves the router"
        )
        with_it |= router


def test_deepseek_v3_has_no_balancing_loss():
    assert build("deepseek_v3").config.experts.aux_loss_coef == 0


def test_micro_batches_weigh_the_balance_by_their_tokens():
    """As in gradient accumulation: the sum of micro-batch losses over the step's target tokens."""
    model, packs = build("mixtral"), make_samples("mixtral")
    parts = [packed_batch([pack], 32) for pack in packs]
    counts = [int((part[1] != -100).sum()) for part in parts]
    model.train()
    whole = sum(float(model(*(tensor(part[i]) for i in (0, 2, 3)), labels=tensor(part[1])).sum()) for part in parts)
    model.eval()
    plain = sum(float(model(*(tensor(part[i]) for i in (0, 2, 3)), labels=tensor(part[1])).sum()) for part in parts)
    weighted = sum(count * aux_loss(model, part) for count, part in zip(counts, parts))
    assert whole - plain == pytest.approx(weighted, rel=1e-3)


@pytest.mark.parametrize("name", MOE)
def test_experts_without_tokens_and_with_all_of_them(name):
    """Oracle: each expert on each token in a loop. One expert gets all tokens, most get none."""
    model = build(name)
    for layer in model.layers:
        if isinstance(layer.mlp, M.MoE) and layer.mlp.moe.correction_bias:
            layer.mlp.correction_bias.set_value(paddle.linspace(0, 9, layer.mlp.moe.num_experts))
    ids = np.full((2, 7), 11)
    for text in (ids, ids[:1, :1], samples_of(name, 1, 1)[0], samples_of(name, 3, 5)[0]):
        for layer in model.layers:
            if not isinstance(layer.mlp, M.MoE):
                continue
            x = paddle.to_tensor(
                np.random.default_rng(text.size)
                .standard_normal([*text.shape, model.config.hidden_size])
                .astype("float32")
            )
            x = x if text.size != ids.size else x[:1, :1].expand(x.shape)  # equal tokens: the same experts
            flat = x.reshape([-1, x.shape[-1]])
            weights, chosen, _ = layer.mlp.route(flat)
            expected = np.zeros(flat.shape, np.float64)
            for n in range(len(flat)):
                for w, e in zip(weights[n].numpy(), chosen[n].numpy()):
                    expected[n] += w * layer.mlp.experts[int(e)](flat[n : n + 1]).numpy()[0]
            assert largest(layer.mlp.dispatch_and_combine(flat, weights, chosen).numpy(), expected) < 1e-5
    model.train()
    model(tensor(ids), labels=tensor(ids)).sum().backward()
    weights = adapters.trainable_weights(model)
    assert any(w.parameter.grad is None for w in weights), "every expert was selected"
    assert np.isfinite(global_grad_norm(weights))


# ========================================================================================================== generate


@pytest.mark.parametrize("new, behind_prefix", [(9, False), (7, True)], ids=["plain", "prefix"])
@pytest.mark.parametrize("name", NAMES)
def test_cached_generation_equals_whole_forwards(name, new, behind_prefix):
    """Greedy. Left-padded rows equal single rows; for dynamic RoPE only this is checked."""
    model = prefixed(name) if behind_prefix else build(name)
    ids, _ = samples_of(name, 3, 8)
    if name not in STRETCHED:
        text = ids
        for _ in range(new):
            text = np.concatenate([text, model(tensor(text)).numpy()[:, -1].argmax(-1)[:, None]], 1)
        assert np.array_equal(M.generate(model, ids, new), text)
    mask, padded = np.ones((3, 13), np.int64), np.zeros((3, 13), np.int64)
    for row, pad in enumerate((5, 7, 10)):
        mask[row, :pad], padded[row, pad:] = 0, ids[row, pad - 5 :]
    if model.prefix is not None and model.distances_count:
        with pytest.raises(UserError, match="one prompt a batch"):
            M.generate(model, padded, new, attention_mask=mask)
        return
    actual = M.generate(model, padded, new, attention_mask=mask)[:, 13:]
    for row, pad in enumerate((0, 2, 5)):
        assert np.array_equal(actual[row], M.generate(model, ids[row : row + 1, pad:], new)[0, 8 - pad :]), row


@pytest.mark.parametrize("name", NAMES)
def test_chunks_through_the_cache_equal_one_forward(name):
    """Logits of chunks of 1, 5, 1 and 3 tokens (ChatGLM-6B: its context first) equal those of one forward."""
    model = build(name)
    ids, _ = samples_of(name, 2, 10)
    ends = (1, 6, 7, 10)
    if name in TWO_POSITIONS:
        ids[:, 4:6], ids[:, 8:] = (SPECIAL["gmask"], SPECIAL["sop"]), 9
        ends = (6, 7, 10)
    if name in STRETCHED:
        ends = (10,)
    cache, parts = model.new_cache(2), []
    for start, end in zip((0, *ends), ends):
        parts.append(model(tensor(ids[:, start:end]), caches=cache).numpy())
    assert largest(np.concatenate(parts, 1), model(tensor(ids)).numpy()) < 2e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STRETCHED])
def test_padded_chunks_through_the_cache_equal_one_forward(name):
    """Left-padded rows, with a prefix if distances do not count; chunks with mask rows, with their own, and without."""
    model, (ids, _) = build(name), samples_of(name, 2, 10)
    model = model if model.distances_count else prefixed(name)
    if name in TWO_POSITIONS:
        ids[:, 4:6], ids[:, 8:] = (SPECIAL["gmask"], SPECIAL["sop"]), 9
    mask = np.ones((2, 13), np.int64)
    mask[0, :3], mask[1, :3] = 0, 0
    mask[1, :5] = 0
    padded = np.concatenate([np.zeros((2, 3), np.int64), ids], 1)
    positions, rows = left_padding(mask)
    whole = model(tensor(padded), tensor(positions), tensor(rows)).numpy()
    cache, parts = model.new_cache(2), []
    for start, end, with_rows in ((0, 9, True), (9, 11, True), (11, 13, False)):
        given = np.full((2, 1, end - start, 1), np.iinfo(np.int32).max, np.int32) if start else rows[:, :, :end]
        parts.append(
            model(
                tensor(padded[:, start:end]),
                tensor(positions[:, start:end]),
                tensor(given) if with_rows else None,
                cache,
            ).numpy()
        )
    actual = np.concatenate(parts, 1)
    assert largest(actual[mask == 1], whole[mask == 1]) < 2e-5
    for row, pad in ((0, 3), (1, 5)):
        assert largest(whole[row, pad:], model(tensor(padded[row : row + 1, pad:])).numpy()[0]) < 2e-5


# ================================================================================================ preference pairs


def pair_batch(name, seed=3, share_within=np.inf):
    """Two rows of pairs, packed by data.py, and [(prompt, chosen, rejected)]."""
    generator, pairs = np.random.default_rng(seed), []
    for n, a, b in ((9, 4, 6), (5, 1, 3), (12, 7, 2)):
        prompt, chosen, rejected = (generator.integers(3, 50, size) for size in (n, a, b))
        if name in TWO_POSITIONS:
            prompt[-2:] = SPECIAL["gmask"], SPECIAL["sop"]
        pairs.append((prompt, chosen, rejected))
    return collate_pairs([[0, 1], [2]], lambda i: pair_sample(*pairs[i], share_within), 48, 0), pairs


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen_ntk"])  # trains without stretching
def test_packed_pairs_equal_separate_samples(name):
    """Log-probabilities and gradients in training mode equal sums over single samples in eval mode. Where distances in
    a row count, a long pair has its prompt twice."""
    model = build(name)
    limit, _ = trainer.shared_prompt_limit(model.config)
    assert (limit < 40) == (name in (*ALIBI, *STRETCHED, *tiny_models.WINDOWED))
    batch, pairs = pair_batch(name, share_within=limit)
    model.train()
    actual = preference.reply_logps(model, batch)
    (actual * tensor(np.arange(1.0, 7.0, dtype="float32").reshape(3, 2))).sum().backward()
    shared = gradients(model)
    zero_grad(model)
    model.eval()
    for n, (prompt, *replies) in enumerate(pairs):
        for side, reply in enumerate(replies):
            ids = np.concatenate([prompt, reply])
            labels = np.where(np.arange(len(ids) - 1) < len(prompt) - 1, -100, ids[1:])
            logp = -model(tensor(ids[None, :-1]), labels=tensor(labels[None])).sum()
            assert float(logp) == pytest.approx(float(actual[n, side]), abs=3e-5)
            (logp * float(2 * n + side + 1)).backward()
    scale = max(np.abs(g).max() for g in shared.values())
    assert all(largest(g, shared[key]) < 2e-5 * scale for key, g in gradients(model).items())


@pytest.mark.parametrize("name, limit", [("mistral", 16), ("gemma2", 16), ("llama_dynamic", 24), ("qwen_ntk", 24)])
def test_a_pair_within_the_limit_shares_its_prompt(name, limit):
    """The other side of the test above: of pairs of 18, 8 and 20 positions, the short ones are one sequence."""
    batch, _ = pair_batch(name, share_within=limit)
    assert batch["tokens"] == {16: 18 + 8 + 8 + 20 + 11, 24: 18 + 8 + 20}[limit]


@pytest.mark.parametrize(
    "name, words",
    [
        ("bloom", "ALiBi"),
        ("baichuan_13b", "ALiBi"),
        ("qwen_ntk", "at most 8"),
        ("llama_dynamic", "at most 8"),
        ("mistral", "at most 5"),
        ("gemma2", "at most 4"),
    ],
)
def test_replies_that_cannot_share_a_prompt_are_refused_in_rl(name, words):
    with pytest.raises(UserError, match=words):
        trainer.check_shared_prompts(build(name), name, "max_seq_len", 40)


# ======================================================================================================== adapters

LORA = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "pissa": {"pissa": True}}


def moved(model, seed=5):
    """Every value of the adapter moved, as training would."""
    for i, w in enumerate(adapters.adapter_weights(model)):
        noise = np.random.default_rng([seed, i]).standard_normal(w.parameter.shape).astype(np.float32)
        M.set_parameter(w.parameter, w.parameter.numpy() + noise * np.float32(0.05))
    return model


def lora_targets(name):
    """The linears that an adapter of everything must reach: all of the blocks but routers and gates."""
    model = build(name)
    rest = ("router", "shared_gate")
    return {
        path
        for path, layer in model.named_sublayers()
        if isinstance(layer, M.Linear) and path.startswith("layers.") and path.rpartition(".")[2] not in rest
    }


@pytest.mark.parametrize("name, kind", each_with(tuple(LORA)))
def test_lora_of_every_linear(name, kind, tmp_path):
    base, (ids, labels) = build(name), samples_of(name)
    before = base(tensor(ids)).numpy()
    model = adapters.apply_lora(build(name), rank=2, alpha=3.0, **LORA[kind])
    model.eval()
    assert {path for path, layer in model.named_sublayers() if isinstance(layer, adapters.LoRALinear)} == lora_targets(
        name
    )
    assert largest(model(tensor(ids)).numpy(), before) < 2e-5, "it starts as the base"
    moved(model)
    adapted = model(tensor(ids)).numpy()
    assert largest(adapted, before) > 0.02
    model.train()
    model(tensor(ids), labels=tensor(labels)).sum().backward()
    used = {key for key, g in gradients(model).items() if np.abs(g).max() > 0}
    assert {w.name for w in adapters.adapter_weights(model)} - used <= {
        w.name for w in adapters.adapter_weights(model) if ".experts." in w.name
    }
    model.eval()
    adapters.save_adapter(model, tmp_path / "adapter")
    again = adapters.load_adapter(build(name), tmp_path / "adapter")
    again.eval()
    assert largest(again(tensor(ids)).numpy(), adapted) < 2e-5
    merged = adapters.merge(model)
    assert not adapters.lora_layers(merged) and largest(merged(tensor(ids)).numpy(), adapted) < 3e-5
    formats.weights.save_pretrained(merged, tmp_path / "merged")
    assert largest(adapters.from_pretrained(tmp_path / "merged")(tensor(ids)).numpy(), adapted) < 3e-5


@pytest.mark.parametrize("name", NAMES)
def test_prefix_round_trip(name, tmp_path):
    ids, _ = samples_of(name)
    for projection in (False, True):
        model, folder = prefixed(name, projection), tmp_path / str(projection)
        adapters.save_adapter(model, folder)
        again = adapters.load_adapter(build(name), folder)
        again.eval()
        assert largest(again(tensor(ids)).numpy(), model(tensor(ids)).numpy()) < 1e-5
        going_on = adapters.load_adapter(build(name), folder, trainable=True)
        assert {w.name for w in adapters.trainable_weights(going_on)} == {
            w.name for w in adapters.adapter_weights(model)
        }


@pytest.mark.parametrize("name, kind", each_with(("full", "lora", "prefix")))
def test_a_few_steps_lower_the_loss(name, kind):
    """With the trainer's AdamW on one packed batch, in training mode."""
    model = build(name)
    if kind == "lora":
        adapters.apply_lora(model, rank=4, alpha=8.0)
    elif kind == "prefix":
        adapters.apply_prefix(model, 4)
    packs = make_samples(name)
    if kind == "prefix" and model.distances_count:
        packs = [[sample] for pack in packs for sample in pack]
    ids, labels, positions, rows = (tensor(a) for a in packed_batch(packs, 32))
    model.train()
    args = TrainingArgs(output_dir="x")
    weights = adapters.trainable_weights(model)
    optimizer, losses = trainer.AdamW(weights, args), []
    for _ in range(5):
        loss = model(ids, positions, rows, labels=labels).sum() / float((labels != -100).sum())
        losses.append(float(loss))
        loss.backward()
        optimizer.step({"full": 0.003, "lora": 0.01, "prefix": 0.05}[kind])
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - (0.01 if kind == "prefix" else 0.1), losses


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_training_step(name):
    """LoRA with frozen weights in bfloat16: loss and gradient norm near those of float32."""
    ids, labels, positions, rows = (tensor(a) for a in packed_batch(make_samples(name), 32))
    actual = []
    for half in (False, True):
        model = moved(adapters.apply_lora(build(name), rank=2, alpha=3.0))
        model.train()
        if half:
            kernels.configure(use_bf16=True)  # float32 again after each test, see conftest.py
            if not kernels.bf16:
                pytest.skip(f"no bfloat16 here: {kernels.bf16_missing()}")
            adapters.cast_frozen_to_bf16(model)
            assert {p.dtype for n, p in model.named_parameters() if n.endswith("base.weight")} == {paddle.bfloat16}
        losses = model(ids, positions, rows, labels=labels)
        losses.sum().backward()
        actual.append((losses.numpy(), gradients(model)))
    (a, ga), (b, gb) = actual
    assert 0 < np.abs(a - b).mean() < 0.05 * np.abs(a).mean()
    norms = [np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gs.values())) for gs in (ga, gb)]
    assert (
        norms[1] == pytest.approx(norms[0], rel=0.1) if name not in MOE else np.isfinite(norms[1])
    )  # rounding may select other experts


def test_positions_beyond_a_learned_table():
    """The last row of the table is used, with a prefix too; one position more is an error, not another row."""
    for name in tiny_models.LEARNED:
        for model, room in ((build(name), 64), (prefixed(name), 61)):
            ids = np.random.default_rng(0).integers(3, 50, (1, room))
            whole = model(tensor(ids)).numpy()
            assert largest(model(tensor(ids[:, : room - 1])).numpy(), whole[:, :-1]) < 2e-5
            with pytest.raises((OSError, ValueError, IndexError), match="64|out of range|table"):
                model(tensor(np.concatenate([ids, ids[:, :1]], 1)))


@pytest.mark.parametrize("name", NAMES)
def test_smallest_shapes(name):
    """B = 1 and T = 1: forward, loss and generation, also with a prefix."""
    for model in (build(name), prefixed(name)):
        ids = np.array([[7]])
        losses = model(tensor(ids), labels=tensor(ids + 1))
        losses.sum().backward()
        assert float(losses.sum()) == pytest.approx(
            float(paddle.nn.functional.cross_entropy(model(tensor(ids))[0], tensor([8]))), rel=1e-4
        )
        assert M.generate(model, ids, 3).shape == (1, 4)


# ========================================================================================================= goldens

RECORDED = ROOT / "tests" / "golden" / "families.npz"


@pytest.mark.parametrize("name", NAMES)
def test_equals_recorded_numbers(name):
    """Recorded by make_families_golden.py when all goldens of ../shared passed: any change is a regression."""
    recorded, actual = np.load(RECORDED), record(name)
    for key, value in actual.items():
        assert value.dtype.kind in "fi"
        if value.dtype.kind == "i":
            assert np.array_equal(value, recorded[f"{name}/{key}"]), key
        else:
            expected = recorded[f"{name}/{key}"]
            assert largest(value, expected) < 1e-4 * max(1.0, np.abs(expected).max()), key


with_goldens = pytest.mark.skipif(not GOLDENS, reason="no ../shared/golden beside the repository")


@with_goldens
@pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)
def test_equals_the_software_of_the_family(folder):
    actual = compare_with_golden(folder)
    limits = {"logits": 1e-4, "hidden": 1e-5, "loss": 1e-5, "norm": 1e-4, "gradients": 1e-4, "padded": 1e-4}
    assert actual.keys() == limits.keys() and all(actual[key] < limit for key, limit in limits.items()), actual


@with_goldens
@pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)
def test_golden_tokens(folder):
    assert golden_tokens(folder)
    if (folder / "config_v4.json").is_file():  # config.json of transformers 4 means the same
        ours = [families.ModelConfig.from_json(folder / dialect) for dialect in ("config.json", "config_v4.json")]
        same = [{key: value for key, value in vars(config).items() if key not in ("source", "rope")} for config in ours]
        assert same[0] == same[1]
        assert all(np.array_equal(*(rotary.rope_frequencies(config)[k] for config in ours)) for k in (0, 1))
        assert ours[0].rope["rope_type"] == ours[1].rope["rope_type"]


@with_goldens
@pytest.mark.parametrize("name", ["baichuan2-7b", "baichuan2-13b"])
def test_golden_z_loss(name):
    """Over all shifted positions, including those with an ignored label."""
    folder = GOLDEN / "models" / name
    oracle, notes = golden_files(folder)
    labels = np.concatenate([oracle["labels"][:, 1:], np.full((2, 1), -100)], 1).astype(np.int64)
    model = golden_model(folder, z_loss_weight=0.01)
    model.train()
    loss = mean_loss(model(tensor(oracle["input_ids"].astype(np.int64)), labels=tensor(labels)), labels)
    assert float(loss) == pytest.approx(notes["loss_z_loss_weight_0.01"], rel=1e-6)


@with_goldens
@pytest.mark.parametrize("name", ["baichuan-13b", "baichuan-13b-6heads", "baichuan2-13b"])
def test_golden_beyond_the_length_of_alibi(name):
    oracle, _ = golden_files(GOLDEN / "models" / name)
    actual = golden_model(GOLDEN / "models" / name)(tensor(oracle["long_input_ids"].astype(np.int64))).numpy()[:, -4:]
    assert largest(actual, oracle["long_logits_last"]) < 1e-4


@with_goldens
def test_golden_residual_scale_of_chatglm():
    """The official code gives a model of three layers the scale of 28."""
    folder = GOLDEN / "models" / "chatglm-6b-3l"
    model, (oracle, _) = golden_model(folder), golden_files(folder)
    for block in model.layers:
        block.residual_scale = math.sqrt(2 * 28)
    assert largest(model(tensor(oracle["input_ids"].astype(np.int64))).numpy(), oracle["logits_alpha28"]) < 1e-4


@with_goldens
def test_golden_lengths_of_qwen():
    """NTK and logn: each one, neither, lengths around a step, decoding with the base of the prefill, training."""
    folder = GOLDEN / "models" / "qwen-7b-ntk-logn"
    oracle, notes = golden_files(folder)
    ids = oracle["input_ids"].astype(np.int64)
    for key, switches in (("logn_only", (False, True)), ("ntk_only", (True, False)), ("both_off", (False, False))):
        model = golden_model(folder, use_dynamic_ntk=switches[0], use_logn_attn=switches[1])
        assert largest(model(tensor(ids)).numpy(), oracle[f"logits_{key}"]) < 1e-4, key
    model = golden_model(folder)
    for length in (12, 16, 17, 24, 31, 32, 33, 40):
        actual = model(tensor(ids[:, :length])).numpy()[:, -1]
        assert largest(actual, oracle[f"logits_last_len{length}"]) < 1e-4, length
    for suffix in ("", "_short"):
        prompt, expected_tokens = (
            oracle[f"gen_prompt{suffix}"].astype(np.int64),
            oracle[f"gen_ids{suffix}"].astype(np.int64),
        )
        for row in range(2):
            cache, start = model.new_cache(1), prompt.shape[1]
            steps = [model(tensor(prompt[row : row + 1]), caches=cache).numpy()[0, -1]]
            steps += [
                model(tensor(expected_tokens[row : row + 1, at : at + 1]), caches=cache).numpy()[0, -1]
                for at in range(start, expected_tokens.shape[1] - 1)
            ]
            assert largest(np.stack(steps), oracle[f"gen_step_logits{suffix}"][row]) < 1e-4, suffix
            assert np.array_equal(M.generate(model, prompt[row : row + 1], 12)[0], expected_tokens[row])
    model.train()
    labels = np.concatenate([oracle["labels"][:, 1:], np.full((2, 1), -100)], 1).astype(np.int64)
    assert largest(model(tensor(ids)).numpy(), oracle["logits_trainmode"]) < 1e-4
    assert float(mean_loss(model(tensor(ids), labels=tensor(labels)), labels)) == pytest.approx(
        notes["loss_trainmode"], rel=1e-6
    )


@with_goldens
@pytest.mark.parametrize("name", ["chatglm-6b-3l", "chatglm-6b-28l"])
def test_golden_masks_and_positions_of_chatglm(name):
    """FlashMask rows and positions, computed from the ids, equal the official code's dense mask and position ids."""
    oracle, _ = golden_files(GOLDEN / "models" / name)
    ids = oracle["input_ids"].astype(np.int64)
    T = ids.shape[1]
    places = np.broadcast_to(np.arange(T), ids.shape)
    positions, rows = M.glm_positions_and_mask(
        golden_model(GOLDEN / "models" / name).config, tensor(ids), tensor(places), None
    )
    assert np.array_equal(positions.numpy().transpose(0, 2, 1), oracle["position_ids"])
    row, rows = np.arange(T)[:, None], rows.numpy()[:, 0, None]  # (B, 1, keys, 2)
    hidden = (row >= rows[..., 0]) | (row < rows[..., 1])
    assert np.array_equal(hidden, oracle["attention_mask"][:, 0].astype(bool))


IN_TRANSFORMERS = tuple(
    name for name in NAMES if not name.startswith(("qwen_", "baichuan", "chatglm", "internlm")) and name != "qwen"
)


@pytest.mark.torch
def test_recorded_numbers_equal_transformers(hf_python, tmp_path):
    """Logits, loss, gradient norms and tokens of all families in transformers, on the same weights."""
    for name in IN_TRANSFORMERS:
        tiny_models.write(tmp_path / "models" / name, name)
        np.savez(
            tmp_path / "models" / name / "inputs.npz", **dict(zip(("ids", "labels"), samples_of(name))), steps=STEPS
        )
    actual = hf_python(TRANSFORMERS, tmp_path / "models")
    for name in IN_TRANSFORMERS:
        ours = record(name, every_logit=True)
        for key in ("logits", "loss", "norms", "generated"):
            if key == "norms":  # transformers has one tensor for all experts
                norms = np.linalg.norm(ours[key]), np.linalg.norm(actual[f"{name}/{key}"])
                assert norms[0] == pytest.approx(norms[1], rel=1e-4), name
            else:
                assert largest(ours[key], actual[f"{name}/{key}"]) < (1 if key == "generated" else 1e-4), (name, key)


TRANSFORMERS = """
import pathlib, torch, transformers
arrays = {}
for folder in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    given = np.load(folder / "inputs.npz")
    make = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager",
        experts_implementation="eager", dtype=torch.float32).eval()
    model, ids, labels = make(), torch.from_numpy(given["ids"]), torch.from_numpy(given["labels"])
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    loss.backward()
    norms = np.array([float(p.grad.norm()) for p in model.parameters() if p.grad is not None])
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    steps = int(given["steps"])
    out = make().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False,
        eos_token_id=None)
    for key, value in dict(logits=logits.detach().numpy(), loss=np.float32(loss.item()), norms=norms,
        generated=out.numpy()).items():
        arrays[f"{folder.name}/{key}"] = value
"""


@pytest.mark.torch
def test_peft_opens_the_adapters_of_every_family(hf_python, tmp_path):
    """Prefix and LoRA. Two limits of others: peft has no prefix whose keys and values differ in width (MLA), and
    transformers 5 stores the experts of these families as one tensor each, in which peft finds no linears."""
    expected = {}
    for name in IN_TRANSFORMERS:
        tiny_models.write(tmp_path / "models" / name / "base", name)
        fused = name in MOE and not name.startswith("mixtral")
        targets = r".*\.self_attn\..*_proj(_with_mqa)?" if fused else None
        made = {
            "lora": lambda: moved(adapters.apply_lora(build(name), rank=2, alpha=3.0, targets=targets)),
            "prefix": lambda: prefixed(name),
        }
        for kind in made if name not in tiny_models.LATENT else ["lora"]:
            model = made[kind]()
            model.eval()
            adapters.save_adapter(
                model, tmp_path / "models" / name / kind, base_model=tmp_path / "models" / name / "base"
            )
            expected[f"{name}/{kind}"] = model(tensor(samples_of(name)[0])).numpy()
    np.save(tmp_path / "ids.npy", samples_of("llama")[0])
    actual = hf_python(PEFT, tmp_path / "models", tmp_path / "ids.npy")
    assert actual.keys() == expected.keys()
    errors = {key: largest(actual[key], value) for key, value in expected.items()}
    assert max(errors.values()) < 2e-5, errors


PEFT = """
import pathlib, torch, transformers, peft
arrays, ids = {}, torch.from_numpy(np.load(sys.argv[3]))
for folder in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    for kind in ("lora", "prefix"):
        if (folder / kind).is_dir():
            base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager",
                experts_implementation="eager", dtype=torch.float32)
            model = peft.PeftModel.from_pretrained(base, folder / kind).eval()
            with torch.no_grad():
                arrays[f"{folder.name}/{kind}"] = model(input_ids=ids,
                    attention_mask=torch.ones_like(ids)).logits.numpy()
"""


# ========================================================================================================= scripts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name, kind", each_with(("sft", "lora", "prefix", "pretrain")))
def test_scripts(name, kind, world, tmp_path):
    """finetune.py with packed rows, and pretrain.py: stopped, resumed, evaluated, saved, loaded."""
    folder = tiny_models.write(tmp_path / "base", name)
    give_tokenizer(folder, world)
    if kind == "pretrain":
        pretrain_and_go_on(folder, world, tmp_path / "out")
    else:
        tune(folder, world, tmp_path / "out", kind)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"max_length": 65}, "max_length asks for 65"),
        ({"max_length": 61, "prefix_tuning": True, "num_prefix_tokens": 4}, "asks for 65"),
        ({"max_length": 60, "src_length": 50, "max_new_tokens": 15}, "src_length . max_new_tokens asks for 65"),
    ],
)
def test_lengths_beyond_a_learned_table_are_refused(keys, words, world, tmp_path, capsys):
    folder = tiny_models.write(tmp_path / "base", "gpt2")
    give_tokenizer(folder, world)
    given = {
        "model_name_or_path": str(folder),
        "dataset_name_or_path": str(world / "sft"),
        "output_dir": str(tmp_path / "out"),
        "do_train": True,
        "src_length": 20,
        "max_new_tokens": 4,
        "disable_tqdm": True,
        **keys,
    }
    with pytest.raises(SystemExit):
        run_script(finetune, given)
    assert (
        re.search(f"base: has 64 learned positions, .*{words}", capsys.readouterr().err)
        and not (tmp_path / "out").exists()
    )


def test_chatglm_batches_end_their_prompts_with_the_mask_and_sop(world, tmp_path):
    """Batches of finetune.py: a context ends with [gMASK] <sop> and is bidirectional; the answer is causal."""
    folder = tiny_models.write(tmp_path / "base", "chatglm")
    give_tokenizer(folder, world)
    dataset = data.SFTDataset(str(world / "sft"), load_tokenizer(folder), 20, 44, "train")
    batch = data.SFTLoader(dataset, 2, 44, zero_padding=True, shuffle=False).batch(0, 0)
    ids, labels, places = batch["input_ids"], batch["labels"], batch["position_ids"]
    config = families.ModelConfig.from_json(folder)
    positions, rows = M.glm_positions_and_mask(
        config, tensor(ids), tensor(places), tensor(batch["startend_row_indices"])
    )
    positions, rows = positions.numpy(), rows.numpy()[:, 0]
    for b in range(len(ids)):
        starts = [t for t in range(44) if places[b, t] == 0]
        for start, end in zip(starts, [*starts[1:], 44]):
            actual = np.flatnonzero(ids[b, start:end] == SPECIAL["sop"])
            if not len(actual):
                assert (labels[b, start:end] == -100).all(), "only padding has no <sop>"
                continue
            sop = start + actual[0]
            assert (
                ids[b, sop - 1] == SPECIAL["gmask"] and labels[b, sop] != -100 and (labels[b, start:sop] == -100).all()
            )
            assert (rows[b, start:sop, 1] == start).all() and (rows[b, sop:end, 1] == np.arange(sop, end)).all()
            assert (rows[b, start:end, 0] == end).all()
            assert positions[b, start:end].tolist() == [
                *([t, 0] for t in range(sop - start)),
                *([sop - 1 - start, t + 1] for t in range(end - sop)),
            ]
            assert labels[b, start:end][-1] == SPECIAL["eop"]


def test_the_family_table_names_every_family():
    """family_table.py writes the table of tests/RESULTS.md by running every cell."""
    text = (ROOT / "tests" / "RESULTS.md").read_text()
    table = text[text.index(family_table.BEGIN) : text.index(family_table.END)]
    rows = {line.split("|")[1].strip().strip("`"): line for line in table.splitlines() if line.startswith("| `")}
    assert set(rows) == set(families.FAMILIES)
    assert all(line.count("✓") == len(family_table.CELLS) for line in rows.values()), "a cell that failed"


@with_goldens
def test_a_cell_that_fails_has_no_mark(monkeypatch, capsys):
    def fails(folder, work):
        assert folder.name != "opt_350m_style"

    numbers = dict.fromkeys(("logits", "loss", "norm"), 2e-6)
    monkeypatch.setattr(
        family_table, "CELLS", {"load": lambda folder, work: numbers, "save": fails, "SFT": lambda folder, work: None}
    )
    assert (
        family_table.table(["opt"]).splitlines()[-1]
        == "| `opt` | OPT, 350m too (2) | ✓ |   | ✓ | 2.0e-6 | 2.0e-6 | 2.0e-6 |"
    )
    assert "opt_350m_style: save: AssertionError" in capsys.readouterr().err
