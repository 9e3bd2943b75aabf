"""What the ranks of tests/ranks.py do for test_tensor_parallel.py: train a tiny model cut up, and whole, and compare."""

import functools
import types

import numpy as np
import paddle

import families
import model as M
import parallel
import trainer

ARGS = types.SimpleNamespace(adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.01, learning_rate=2e-3)


def grid(**degrees):
    """The Topology of this rank."""
    launch = parallel.Launch.of_environment()
    degrees = parallel.Degrees(**degrees)
    return parallel.Topology(degrees, launch.rank, parallel.Gloo(launch) if launch.world > 1 else None)


def batch(name, number, packed=False, B=2, T=13):
    """Rows of odd length, some padded behind, or two samples a row that do not see each other."""
    generator = np.random.default_rng([number, 5])
    ids = generator.integers(3, 57, [B, T])
    found = {"input_ids": ids, "labels": np.where(generator.random([B, T]) < 0.3, -100, generator.integers(3, 57, [B, T]))}
    if families.family(name) == "chatglm":
        ids[:, 4], ids[:, 5] = families.SPECIAL["gmask"], families.SPECIAL["sop"]
    if packed:
        cut = 8
        found["position_ids"] = np.concatenate([np.arange(cut), np.arange(T - cut)])[None].repeat(B, 0)
        ends = np.where(np.arange(T) < cut, cut, T).astype(np.int32)
        found["startend_row_indices"] = ends[None, None, :, None].repeat(B, 0)
    else:
        found["labels"][0, T - 3 :] = -100  # behind the last label: padding
    return found


def adapt(model, kind, seed=3):
    """What is trained: "full", "lora", "dora", "rslora", "pissa", "dropout", "prefix", "projection", or all with noise: "neftune"."""
    if kind == "neftune":
        model.neftune_noise_alpha = 5.0
    elif kind in ("prefix", "projection"):
        M.apply_prefix(model, 4, kind == "projection", 10, seed)
    elif kind != "full":
        M.apply_lora(model, 3, 6.0, 0.3 if "dropout" in kind else 0.0, kind == "rslora", "dora" in kind, kind == "pissa", seed=seed)
        if kind != "pissa":  # B starts at 0, and A would have no gradient
            fill_adapter(model, "lora_B.weight")


def fill_adapter(model, *ends):
    for weight in M.adapter_weights(model):
        if weight.name.endswith(ends):
            generator = np.random.default_rng([len(weight.name), *weight.name.encode()[-30:]])
            M.set_parameter(weight.parameter, weight.from_numpy(generator.standard_normal(weight.shape, np.float32) * 0.1))


def train(model, topology, batches, steps, seed=0, recompute=False):
    """Losses and norms of `steps` steps, and the gradients of the first, {name: whole array}."""
    model.train()
    model.recompute = recompute
    weights = M.trainable_weights(model)
    shards = parallel.Shards(model, weights, topology)
    optimizer = trainer.AdamW(shards.pieces, ARGS)
    rows, gradients = [], {}
    for step in range(steps):
        size, loss = sum(int((b["labels"] != -100).sum()) for b in batches), 0.0
        mine = [b for i, b in enumerate(batches) if i % topology.data_size == topology.data_rank]
        mine += [{**batches[0], "company": True}] * (-(-len(batches) // topology.data_size) - len(mine))

        def batch_loss(b, size=size):
            return model(**trainer.model_inputs(b)).sum() / size

        for part, _ in parallel.micro_steps(model, mine, batch_loss, functools.partial(trainer.seed_step, seed, step)):
            loss += part
        norm = shards.reduce_gradients()
        if step == 0:
            gradients = {w.name: parallel.whole(w, w.parameter.grad, topology).copy() for w in weights if w.parameter.grad is not None}
        rows.append((topology.total(loss), norm))
        optimizer.step(ARGS.learning_rate, trainer.clip_scale(norm, 1.0))
        shards.gather_weights()
        optimizer.zero_grad()
    return rows, gradients


def both(name, kind="full", steps=3, packed=False, micro=1, recompute=False, changes=None, degrees=None, T=13):
    """(largest relative difference of losses and norms, largest of gradients relative to each one's largest, its name)."""
    batches = [batch(name, i, packed, T=T - 2 * i) for i in range(micro)]
    expected, gradients = reference(name, kind, steps, packed, micro, recompute, tuple((changes or {}).items()), T)
    topology = grid(**degrees)
    model = families.fill(parallel.parallelize(M.build(families.config(name, **(changes or {}))), topology))
    adapt(model, kind)
    parallel.cut_adapters(model, topology)
    rows, found = train(model, topology, batches, steps, recompute=recompute)
    worst = max(abs(a - b) / abs(b) for row, wanted in zip(rows, expected) for a, b in zip(row, wanted))
    missing = set(gradients) - set(found) - model.elsewhere
    missing = {n for n in missing if not any(e.removesuffix(".weight") in n for e in model.elsewhere)}
    assert not missing and set(found) <= set(gradients), (missing, set(found) - set(gradients))
    scale = max(np.abs(g).max() for g in gradients.values())
    off = {n: float(np.abs(g - gradients[n]).max() / max(np.abs(gradients[n]).max(), 1e-2 * scale)) for n, g in found.items()}
    name_of_worst = max(off, key=off.get)
    return worst, off[name_of_worst], name_of_worst


@functools.cache
def reference(name, kind, steps, packed, micro, recompute, changes, T):
    batches = [batch(name, i, packed, T=T - 2 * i) for i in range(micro)]
    whole = parallel.parallelize(families.build(name, **dict(changes)), parallel.SINGLE)
    adapt(whole, kind)
    return train(whole, parallel.SINGLE, batches, steps, recompute=recompute)


def many(cases):
    """both() of [(name, options)]; what one raises is its result."""
    import time
    import traceback

    found = []
    for name, options in cases:
        begin = time.perf_counter()
        try:
            found.append((*both(name, **options), time.perf_counter() - begin))
        except Exception:
            found.append((traceback.format_exc(), None, name, time.perf_counter() - begin))
    return found
