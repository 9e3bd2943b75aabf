"""What ranks of a run really hold, for tests of planning/memory_model.py. Jobs of ranks/pool.py."""

import gc

import numpy as np
import paddle

import adapters
import distributed.collectives
import distributed.sharding
import distributed.watchdog
import families
import formats.weights
import model as M
import parallel
import trainer


def peak(model_config, degrees, batch_size, T, accumulation, lora=False, recompute=None):
    """Most bytes that Paddle had allocated in the second step of training, over what it had before the model."""
    core, together = paddle.base.core, distributed.watchdog.current_watchdog()
    gc.collect()
    before = core.host_memory_stat_current_value("Allocated", 0)
    topology = parallel.SINGLE
    if together:
        groups = distributed.collectives.Gloo(together.launch)
        topology = parallel.Topology(parallel.Degrees(**degrees), together.launch.rank, groups)
    model = parallel.parallelize(M.build(families.ModelConfig.from_dict(model_config)), topology)
    formats.weights.init_weights(model, 0)
    if lora:
        adapters.apply_lora(model)
        parallel.shard_adapters(model, topology)
    model.recompute, model.recompute_granularity = recompute is not None, recompute or "full"
    weights = adapters.trainable_weights(model)
    shards = distributed.sharding.ZeroOptimizer(model, weights, topology)
    optimizer = trainer.AdamW(shards.pieces, trainer.TrainingArgs(output_dir="x", do_train=True))
    model.train()
    rng = np.random.default_rng(topology.data_rank)
    for _ in range(2):
        ids = rng.integers(3, model_config["vocab_size"], (accumulation, batch_size, T + 1))
        batches = [{"input_ids": paddle.to_tensor(i[:, :-1]), "labels": paddle.to_tensor(i[:, 1:])} for i in ids]
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        for _ in parallel.forward_backward(model, batches, dict, lambda losses, batch: losses.mean(), lambda i: None):
            pass
        shards.reduce_gradients()
        optimizer.step(1e-4)
        shards.gather_weights()
        optimizer.zero_grad()
    found = core.host_memory_stat_peak_value("Allocated", 0) - before
    del model, weights, shards, optimizer, batches
    gc.collect()
    return found
