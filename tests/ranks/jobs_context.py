"""What the ranks of tests/ranks/pool.py do for test_context.py, beside jobs_tensor.many."""

import jobs_tensor
import numpy as np
import paddle
import tiny_models

import model as M
import parallel
import trainer
from alignment import preference


def collectives(size):
    """What Axis.ring_shift and Axis.all_to_all give each rank for [rank, …], and how much was counted as sent."""
    sep = jobs_tensor.grid(sep=size).sep
    passed = sep.ring_shift(paddle.full([3, 2], sep.rank, "float32"))
    parts = paddle.to_tensor([[10.0 * sep.rank + target] * 5 for target in range(size)])
    return passed.numpy(), sep.all_to_all(parts).numpy(), sep.bytes


def outside_of_training(name, degrees, T=11):
    """How far from one process are, each relative to the largest: losses, logits, hidden states, reply_logps; and
    whether predictions and generated tokens are the same."""
    topology, batch = jobs_tensor.grid(**degrees), jobs_tensor.batch(name, 3, packed=True, T=T)
    pairs = {**batch, "labels": np.where(batch["labels"] < 0, 5, batch["labels"]), "reply_ids": np.full([2, T], -1)}
    for row in range(2):
        pairs["reply_ids"][row, 4:7], pairs["reply_ids"][row, 7:] = 2 * row, 2 * row + 1
    found = []
    for where in (parallel.SINGLE, topology):
        model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config(name)), where))
        model.eval()
        with paddle.no_grad():
            losses, predictions = model(**trainer.model_inputs(batch), return_predictions=True)
            inputs = {k: v for k, v in trainer.model_inputs(batch).items() if k != "labels"}
            logits = model(**inputs)
            hidden = model.hidden_states(inputs["input_ids"], inputs["position_ids"], inputs["startend_row_indices"])
            sums = preference.reply_logps(model, pairs)
        texts = M.generate(model, batch["input_ids"][:, :8], 4)
        found.append(([x.numpy() for x in (losses, logits, hidden, sums)], predictions.numpy(), np.asarray(texts)))
    (exact, *same), (here, *also) = found
    assert all(a.shape == b.shape for a, b in zip(exact, here))
    off = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(exact, here))
    return off, [bool(np.array_equal(a, b)) for a, b in zip(same, also)]


def live_bytes(degrees, T, changes, kind="full"):
    """Bytes that a rank keeps for backward after one forward pass of T tokens, by Paddle's own count."""
    topology = jobs_tensor.grid(**degrees)
    model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config("llama", **changes)), topology))
    jobs_tensor.adapt(model, kind)
    parallel.shard_adapters(model, topology)
    model.train()
    ids = paddle.to_tensor(np.random.default_rng(0).integers(3, 57, [1, T]))
    model(ids[:, :64], labels=ids[:, :64]).sum().backward()  # what is made once
    before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
    losses = model(ids, labels=ids)
    kept = paddle.base.core.host_memory_stat_current_value("Allocated", 0) - before
    del losses
    return kept
