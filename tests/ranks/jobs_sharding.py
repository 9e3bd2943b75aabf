"""What the ranks of test_sharding.py do (see ranks.py): train a tiny model on a topology, and give back all that it
came to."""

import functools
import types

import kernels

import numpy as np
import paddle
import tiny_models
from jobs_parallel import whole

import adapters
import model as M
import parallel
import trainer
from distributed.collectives import Gloo
from distributed.sharding import ZeroOptimizer, weight_tensors
from distributed.watchdog import Launch

ARGS = {
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-4,
    "max_grad_norm": 0.5,
    "sharding": None,
}


@functools.cache
def topology(**ways):
    degrees = parallel.Degrees(**ways)
    if degrees.world == 1:
        return parallel.Topology(degrees)
    launch = Launch.of_environment()
    return parallel.Topology(degrees, launch.rank, Gloo(launch))


def make_model(name, place, adapter=None, recompute=False, **changes):
    """The model of families.py with its adapter on: weights depend on names alone."""
    if name == "integers":
        import test_quant_linear

        model = parallel.parallelize(test_quant_linear.quantized("w4_groups")[0], place)
    else:
        model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config(name, **changes)), place))
    if adapter == "prefix":
        adapters.apply_prefix(model, 3, seed=1)
    elif adapter:
        adapters.apply_lora(
            model, 4, alpha=8.0, dropout=0.2 if adapter == "dropout" else 0.0, dora=adapter == "dora", seed=1
        )
        rng = np.random.default_rng(5)
        for layer in adapters.lora_layers(model).values():
            M.set_parameter(layer.lora_B, (0.1 * rng.standard_normal(layer.lora_B.shape)).astype(np.float32))
    parallel.shard_adapters(model, place)
    model.recompute = recompute
    return model


def batch_of(step, number, vocabulary):
    """Rows of odd lengths, other ones in every batch, padded; labels shifted."""
    rng = np.random.default_rng([step, number])
    lengths = rng.integers(3, 12, 2)
    ids = rng.integers(3, vocabulary, (2, lengths.max() + 1))
    labels = ids[:, 1:].copy()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return {"input_ids": ids[:, :-1], "labels": labels, "tokens": int(lengths.sum())}


def train(name, ways, steps=3, micro=4, adapter=None, recompute=False, bf16=False, on_host=False, **changes):
    """{"losses", "norms", "gradients" of the first step, "weights" after the last, "bytes"}; micro: batches of a step,
    of all ranks."""
    if bf16:
        kernels.configure(use_bf16=True)
    try:
        return _train(name, topology(**ways), steps, micro, adapter, recompute, bf16, on_host, **changes)
    finally:
        if bf16:
            kernels.configure(use_bf16=False)


def _train(name, place, steps, micro, adapter, recompute, bf16, on_host, **changes):
    model = make_model(name, place, adapter, recompute, **changes)
    if bf16:
        adapters.cast_frozen_to_bf16(model)
    weights = adapters.trainable_weights(model)
    shards = ZeroOptimizer(model, weights, place)
    faster = {w.name: 4.0 for w in weights if ".lora_B." in w.name}
    args = types.SimpleNamespace(**ARGS)
    optimizer = trainer.AdamW(shards.pieces, args, lr_scale=faster)
    if on_host:  # moments go to and fro as they would between a host and its device
        optimizer.on_host = True
    found = {"losses": [], "norms": []}
    model.train()
    for step in range(steps):
        batches = [batch_of(step, number, model.config.vocab_size) for number in range(micro)]
        size, mine = sum(int((b["labels"] != -100).sum()) for b in batches), []
        for batch, counts in trainer.local_micro_batches(batches, place):
            mine.append(batch if counts else {**batch, "labels": np.full_like(batch["labels"], -100), "is_dummy": True})

        def loss_of(losses, batch):
            return losses.sum() / size

        loss, left = 0.0, []
        seeds = functools.partial(trainer.seed_step, 3, step)
        for part, _ in parallel.forward_backward(model, mine, trainer.model_inputs, loss_of, seeds):
            loss += part
            left.append(sum(p.grad.size * 4 for p in model.parameters() if p.grad is not None))
        found["whole gradients"] = left
        found["losses"].append(place.all_reduce_sum(loss))
        norm = shards.reduce_gradients()
        found["norms"].append(norm)
        if step == 0:
            found["gradients"] = tensors_of(shards, weights, place, lambda piece: piece.grad)
        optimizer.step(1e-2, trainer.clip_scale(norm, args.max_grad_norm))
        shards.gather_weights()
        optimizer.zero_grad()
    found["bytes"] = bytes_of(model, shards, optimizer)
    found["moments"] = tensors_of(shards, weights, place, lambda piece: optimizer.moments[piece.name][0])
    found["weights"] = {}
    for ids in shards.unsharded_units() if shards.units else [{id(w.parameter) for w in weights}]:
        found["weights"] |= {w.name: whole(w, w.parameter, place) for w in weights if id(w.parameter) in ids}
    model.eval()
    batch = batch_of(99, 0, model.config.vocab_size)
    with paddle.no_grad():
        found["evaluated"] = model(**trainer.model_inputs(batch), return_predictions=True)[0].numpy()
    if not place.tp.sequence_parallel:
        found["generated"] = M.generate(model, batch["input_ids"][:1, :5], 4)
    return found if place.rank == 0 else {key: found[key] for key in ("losses", "norms", "bytes")}


def set_and_take_over(ways):
    """Whole values put into a stage 3 model, as by loading: what its pieces hold afterwards, and what is still
    whole."""
    place = topology(**ways)
    model = make_model("llama_bias_tied", place)
    weights = adapters.trainable_weights(model)
    shards = ZeroOptimizer(model, weights, place)
    values = {
        w.name: np.random.default_rng(len(w.name)).standard_normal(w.parameter.shape).astype(np.float32)
        for w in weights
    }
    for weight in weights:
        M.set_parameter(weight.parameter, values[weight.name])
    shards.adopt_full_values()
    left = [w.name for w in weights if w.parameter._is_initialized()]
    pieces = {piece.name: piece for piece in shards.pieces}
    for weight in weights:
        piece = pieces.get(weight.name)
        if piece is not None:
            np.testing.assert_array_equal(
                piece.tensor.numpy(), values[weight.name].reshape([-1])[slice(*shards.extent(weight))]
            )
        whole = shards.gather_full(weight, None if piece is None else piece.tensor)
        np.testing.assert_array_equal(whole, values[weight.name])
    return left


def tensors_of(shards, weights, place, read):
    """{name: numpy} whole, of what read(piece) gives of each rank's piece; None: left out."""
    found, pieces = {}, {piece.name: piece for piece in shards.pieces}
    for weight in weights:
        piece = pieces.get(weight.name)
        tensor = None if piece is None else read(piece)
        if not shards.stage:
            if tensor is not None:
                found[weight.name] = whole(weight, tensor, place)
            continue
        local = paddle.to_tensor(shards.gather_full(weight, tensor))
        found[weight.name] = whole(weight, local, place)
    return found


def bytes_of(model, shards, optimizer):
    """Of the weights and moments that are held here, in bytes; gradients are gone."""

    def size(tensors):
        return sum(t.size * t.element_size() for t in tensors if t is not None and t._is_initialized())

    weights = size(tensor for _, tensor in weight_tensors(model)) + size(
        b.owned for u in shards.units.values() for b in u.buckets
    )
    moments = size(m for pair in optimizer.moments.values() for m in pair)
    gradients = size(p.grad for p in model.parameters()) + size(b.gradient for b in shards.buckets)
    return {"weights": weights, "moments": moments, "gradients": gradients}
