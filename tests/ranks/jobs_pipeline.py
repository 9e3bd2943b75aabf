"""What the ranks of test_pipeline.py do; without a topology the same in one process, to compare with."""

import functools
import types

import numpy as np
import paddle
import tiny_models
from jobs_parallel import whole

import adapters
import formats.weights
import model as M
import parallel
import trainer
from distributed.collectives import Gloo
from distributed.sharding import ZeroOptimizer
from distributed.watchdog import Launch

ARGS = types.SimpleNamespace(adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.1)


def topology(degrees):
    """The place of this process on a grid of these degrees; {}: alone."""
    degrees = parallel.Degrees(**degrees)
    if degrees.world == 1:
        return parallel.Topology(degrees)
    launch = Launch.of_environment()
    return parallel.Topology(degrees, launch.rank, Gloo(launch))


def batches(count, seed=0, kind="packed", least=5):
    """Micro-batches of different lengths: rows of several samples, or padded ones."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        B, T = (1, 2 * least + 3 * i) if kind == "packed" else (2, least + 2 * i)
        ids = rng.integers(4, 50, [B, T])
        labels = np.where(rng.random([B, T]) < 0.7, rng.integers(4, 50, [B, T]), -100)
        positions, rows = np.tile(np.arange(T), [B, 1]), np.full([B, 1, T, 1], T, np.int32)
        if kind == "packed":
            cut = int(rng.integers(2, T - 2))
            positions[:, cut:] -= cut
            rows[:, :, :cut] = cut
            labels[:, cut - 1] = -100
        else:  # the second row ends earlier
            end = T - 1 - i % 3
            ids[1, end:], labels[1, end - 1 :] = 0, -100
        found.append({"input_ids": ids, "position_ids": positions, "startend_row_indices": rows, "labels": labels})
    return found


def adapted(model, adapter, topology):
    """The model with its adapter; values that are no start, so that all of it has a gradient."""
    if adapter is None:
        return
    if "tokens" in adapter:
        adapters.apply_prefix(model, **adapter)
    else:
        adapters.apply_lora(model, **adapter)
        for path, layer in adapters.lora_layers(model).items():
            rng = np.random.default_rng([len(path), *path.encode()])
            M.set_parameter(layer.lora_B, rng.normal(0, 0.1, layer.lora_B.shape).astype(np.float32))
    parallel.shard_adapters(model, topology)


def train(
    name, degrees, count, steps=1, adapter=None, changes=None, kind="packed", options=None, generate=True, folder=None
):
    """Steps of AdamW on a model of families.py, or one in a folder. {"evaluated", "predictions", "tokens": of the
    model before them, "losses", "norms", "gradients" of the first step, "weights" after all, "bubble"}."""
    place = topology(degrees)
    if folder is None:
        model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config(name, **(changes or {}))), place))
    else:
        model = parallel.from_pretrained(folder, place)
    adapted(model, adapter, place)
    for key, value in (options or {}).items():
        setattr(model, key, value)
    weights = adapters.trainable_weights(model)
    shards = ZeroOptimizer(model, weights, place)
    optimizer = trainer.AdamW(shards.pieces, ARGS)
    found = {"losses": [], "norms": []}
    found["evaluated"], found["predictions"] = evaluated(model, kind)
    if generate:
        prompt, mask = batches(1, 5, "padded")[0]["input_ids"], np.ones([2, 5], np.int64)
        prompt[1, :2] = mask[1, :2] = 0  # padded on the left
        found["tokens"] = M.generate(model, prompt, 4, attention_mask=mask)
    model.train()
    for step in range(steps):
        every = batches(count, step, kind)
        size = sum(int((batch["labels"] != -100).sum()) for batch in every)
        mine = []
        for batch, counts in trainer.local_micro_batches(every, place):
            company = {"labels": np.full_like(batch["labels"], -100), "is_dummy": True}
            mine.append(batch if counts else {**batch, **company})

        def loss_of(losses, batch):
            return losses.sum() / size

        seed = functools.partial(trainer.seed_step, 7, step)
        parts = list(parallel.forward_backward(model, mine, trainer.model_inputs, loss_of, seed))
        assert [batch is other for (_, batch), other in zip(parts, mine)] == [True] * len(mine)
        found["losses"].append(place.all_reduce_sum(float(sum(part for part, _ in parts)), stages=True))
        found["norms"].append(shards.reduce_gradients())
        if step == 0:
            found["gradients"] = {
                w.name: np.array(whole(w, w.parameter.grad, place)) for w in weights if w.parameter.grad is not None
            }
        optimizer.step(1e-2, trainer.clip_scale(found["norms"][-1], 1.0))
        shards.gather_weights()
        optimizer.zero_grad()
    found["weights"] = {w.name: np.array(whole(w, w.parameter, place)) for w in weights}
    found["bubble"] = (place.pp.idle, place.pp.bubble) if place.pp.size > 1 else None
    return found


@paddle.no_grad()
def evaluated(model, kind):
    """Losses and predictions of a batch, and its logits."""
    model.eval()
    given = trainer.model_inputs(batches(2, 9, kind)[1])
    losses, predictions = model(**given, return_predictions=True)
    alone = model(**given)
    assert (losses - alone).abs().max() < 1e-6
    every = batches(5, 9, kind)  # several on their way at once

    inputs = trainer.model_inputs
    found = list(parallel.pipelined_map(model, iter(every), inputs, lambda outputs, batch: outputs))
    assert [other is batch for batch, (other, _) in zip(every, found, strict=True)] == [True] * 5
    assert all((losses == model(**inputs(batch))).all() for batch, losses in found)
    given.pop("labels")
    return np.concatenate([losses.numpy()[..., None], model(**given).numpy()], -1), predictions.numpy()


def plain_call(degrees):
    """Calling a pipeline's model with gradients, and no schedule."""
    model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config("llama")), topology(degrees)))
    model(**trainer.model_inputs(batches(1)[0]))


def slow_neighbor(degrees, slow, seconds):
    """A stage that takes longer than gloo waits."""
    import time

    place = topology(degrees)
    model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config("llama")), place))
    if place.pp.rank == slow:
        time.sleep(seconds)
    return evaluated(model, "packed")


def held(name, degrees, **changes):
    """Names of the weights of this process, those it knows to be elsewhere, and the paths of its parameters."""
    model = parallel.parallelize(M.build(tiny_models.config(name, **(changes or {}))), topology(degrees))
    return (
        {w.name for w in formats.weights.named_weights(model)},
        set(model.names_on_other_ranks),
        [path for path, _ in model.named_parameters()],
    )


def loaded(folder, degrees, adapter=None):
    """The weights of parallel.from_pretrained(), with an adapter's of another folder."""
    place = topology(degrees)
    model = parallel.from_pretrained(folder, place)
    if adapter is not None:
        adapters.load_adapter(model, adapter, trainable=True)
        parallel.shard_adapters(model, place)
        adapters.restore_adapter(model, adapter)
    weights = formats.weights.named_weights(model) + adapters.adapter_weights(model)
    targets = model.lora_config["target_modules"] if adapter is not None and model.prefix is None else None
    return {w.name: np.array(whole(w, w.parameter, place)) for w in weights}, targets
