"""What the ranks of tests/ranks/pool.py do for test_tensor.py: train a tiny model cut up, and whole, and compare."""

import functools
import json
import time
import traceback
import types
from pathlib import Path

import numpy as np
import paddle
import tiny_models
from jobs_parallel import whole

import adapters
import formats.tensor_files
import formats.weights
import model as M
import parallel
import trainer
from checkpoint import CheckpointManager
from distributed.collectives import Gloo, _AllToAllV
from distributed.sharding import ZeroOptimizer
from distributed.watchdog import Launch
from modules.low_bit import LowBit, LowBitLinear

# epsilon: an element whose gradient is rounding alone would be moved by as much as any other, this way or that.
ARGS = types.SimpleNamespace(adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-5, weight_decay=0.01, learning_rate=2e-3)


def grid(**degrees):
    """The Topology of this rank."""
    launch = Launch.of_environment()
    degrees = parallel.Degrees(**degrees)
    return parallel.Topology(degrees, launch.rank, Gloo(launch) if launch.world > 1 else None)


def batch(name, number, packed=False, B=2, T=13):
    """Rows of odd length, some padded behind, or two samples a row that do not see each other."""
    generator = np.random.default_rng([number, 5])
    ids = generator.integers(3, 57, [B, T])
    found = {
        "input_ids": ids,
        "labels": np.where(generator.random([B, T]) < 0.3, -100, generator.integers(3, 57, [B, T])),
    }
    if tiny_models.family(name) == "chatglm":
        ids[:, 4], ids[:, 5] = tiny_models.SPECIAL["gmask"], tiny_models.SPECIAL["sop"]
    if packed:
        cut = 8
        found["position_ids"] = np.concatenate([np.arange(cut), np.arange(T - cut)])[None].repeat(B, 0)
        ends = np.where(np.arange(T) < cut, cut, T).astype(np.int32)
        found["startend_row_indices"] = ends[None, None, :, None].repeat(B, 0)
    else:
        found["labels"][0, T - 3 :] = -100  # behind the last label: padding
    return found


def adapt(model, kind, seed=3):
    """What is trained: "full", "lora", "dora", "rslora", "pissa", "dropout", "prefix", "projection", all with noise:
    "neftune", or LoRA on the first experts alone: "one"."""
    if kind == "neftune":
        model.neftune_noise_alpha = 5.0
    elif kind in ("prefix", "projection"):
        adapters.apply_prefix(model, 4, projection=kind == "projection", projection_hidden_size=10, seed=seed)
    elif kind == "one":
        adapters.apply_lora(model, 3, alpha=6.0, targets=r".*layers\.\d\..*experts\.0\..*", seed=seed)
        fill_adapter(model, "lora_B.weight")
    elif kind != "full":
        adapters.apply_lora(
            model,
            3,
            alpha=6.0,
            dropout=0.3 if "dropout" in kind else 0.0,
            rslora=kind == "rslora",
            dora="dora" in kind,
            pissa=kind == "pissa",
            seed=seed,
        )
        if kind != "pissa":  # B starts at 0, and A would have no gradient
            fill_adapter(model, "lora_B.weight")


def fill_adapter(model, *ends):
    for weight in adapters.adapter_weights(model):
        if weight.name.endswith(ends):
            generator = np.random.default_rng([len(weight.name), *weight.name.encode()[-30:]])
            M.set_parameter(
                weight.parameter, weight.from_numpy(generator.standard_normal(weight.shape, np.float32) * 0.1)
            )


def train(model, topology, batches, steps, seed=0, recompute=False):
    """Losses and norms of `steps` steps, and the gradients of the first, {name: whole array}."""
    model.train()
    model.recompute = bool(recompute)
    model.recompute_granularity = recompute if isinstance(recompute, str) else "full"
    weights = adapters.trainable_weights(model)
    shards = ZeroOptimizer(model, weights, topology)
    optimizer = trainer.AdamW(shards.pieces, ARGS)
    rows, gradients = [], {}
    for step in range(steps):
        size, loss = sum(int((b["labels"] != -100).sum()) for b in batches), 0.0
        mine = [b for i, b in enumerate(batches) if i % topology.data_size == topology.data_rank]
        mine += [{**batches[0], "is_dummy": True}] * (-(-len(batches) // topology.data_size) - len(mine))

        def loss_of(losses, batch, size=size):
            return losses.sum() / size

        seeds = functools.partial(trainer.seed_step, seed, step)
        for part, _ in parallel.forward_backward(model, mine, trainer.model_inputs, loss_of, seeds):
            loss += part
        norm = shards.reduce_gradients()
        if step == 0:
            gradients = gradients_of(shards, weights, topology)
        rows.append((topology.all_reduce_sum(loss), norm))
        optimizer.step(ARGS.learning_rate, trainer.clip_scale(norm, 1.0))
        shards.gather_weights()
        optimizer.zero_grad()
    return rows, gradients


def gradients_of(shards, weights, topology):
    """{name: the whole gradient, numpy}, wherever sharding has put it."""
    if not shards.stage:
        return {w.name: whole(w, w.parameter.grad, topology).copy() for w in weights if w.parameter.grad is not None}
    pieces, found = {piece.name: piece for piece in shards.pieces}, {}
    for weight in weights:
        piece = pieces.get(weight.name)
        if weight.name in shards.arrived:
            gradient = paddle.to_tensor(shards.gather_full(weight, None if piece is None else piece.grad))
            found[weight.name] = whole(weight, gradient, topology).copy()
    return found


def both(
    name,
    kind="full",
    steps=3,
    packed=False,
    micro=1,
    recompute=False,
    changes=None,
    degrees=None,
    T=13,
    folder=None,
    adapter=None,
    one_expert=False,
    low_bit=None,
):
    """Train cut and whole: (largest relative difference of losses and norms, largest of gradients relative to each
    one's largest, its name, [norm of each step]).

    folder: where the model is read from; else it is drawn. adapter: a folder, put on in place of `kind`. one_expert:
    all routers choose the same experts for every token. low_bit: how the base is rounded, as pairs of LowBit's."""
    topology = grid(**degrees)
    options = dict(
        kind=kind,
        steps=steps,
        packed=packed,
        micro=micro,
        recompute=recompute,
        changes=tuple((changes or {}).items()),
        T=T,
        folder=folder,
        adapter=adapter,
        one_expert=one_expert,
        low_bit=low_bit,
    )
    (rows, found, elsewhere), (expected, gradients, _) = trained(name, topology, **options), alone(name, **options)
    worst = max(abs(a - b) / abs(b) for row, wanted in zip(rows, expected) for a, b in zip(row, wanted))
    absent = {n for n in gradients if n not in found}
    assert set(found) <= set(gradients) and all(any(e in n for e in elsewhere) for n in absent), absent
    assert not elsewhere or topology.ep.size > 1
    scale = max(np.abs(g).max() for g in gradients.values())
    # Some are 0 but for rounding, such as those of a bias of keys, which moves all scores of a query alike.
    off = {
        n: float(np.abs(g - gradients[n]).max() / max(np.abs(gradients[n]).max(), 1e-2 * scale))
        for n, g in found.items()
    }
    name_of_worst = max(off, key=off.get, default=None)  # a rank may train nothing
    return worst, off.get(name_of_worst, 0.0), name_of_worst, [norm for _, norm in expected]


def trained(name, topology, kind, steps, packed, micro, recompute, changes, T, folder, adapter, one_expert, low_bit):
    if folder is None:
        model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config(name, **dict(changes))), topology))
    else:
        low_bit = low_bit and LowBit(**dict(low_bit))
        model = parallel.from_pretrained(folder, topology, low_bit=low_bit)
    if one_expert:
        for weight in formats.weights.named_weights(model):
            if weight.name.endswith(".gate.weight"):
                M.set_parameter(weight.parameter, np.zeros(weight.parameter.shape, np.float32))
    if adapter is None:
        adapt(model, kind)
    else:
        adapters.load_adapter(model, adapter, trainable=True)
    parallel.shard_adapters(model, topology)
    packed = packed and not (model.prefix is not None and model.distances_count)  # which takes one sample a row
    batches = [batch(name, i, packed, T=T - 2 * i) for i in range(micro)]
    elsewhere = {name.removesuffix(".weight") for name in model.names_on_other_ranks}
    return *train(model, topology, batches, steps, recompute=recompute), elsewhere


@functools.cache
def alone(name, **options):
    return trained(name, parallel.SINGLE, **options)


def many(cases):
    """both() of [(name, options)]; what one raises is its result."""
    found = []
    for name, options in cases:
        begin = time.perf_counter()
        try:
            found.append((*both(name, **options), time.perf_counter() - begin))
        except Exception:
            found.append((traceback.format_exc(), None, name, time.perf_counter() - begin))
    return found


def codes(folder, degrees, low_bit):
    """Names of the linears whose dequantized weight, of all ranks, is not to the bit that of one process."""
    low_bit, topology = LowBit(**dict(low_bit)), grid(**degrees)
    cut, whole = (parallel.from_pretrained(folder, where, low_bit=low_bit) for where in (topology, parallel.SINGLE))
    wanted = {path: layer.full_weight() for path, (_, _, layer) in M.block_linears(whole).items()}
    layers = {path: layer for path, (_, _, layer) in M.block_linears(cut).items()}
    assert layers.keys() == wanted.keys() and all(isinstance(layer, LowBitLinear) for layer in layers.values())
    assert sum(x.nbytes() for x in layers.values()) < 0.75 * sum(x[2].nbytes() for x in M.block_linears(whole).values())
    return [path for path, layer in layers.items() if not np.array_equal(layer.full_weight(), wanted[path])]


def tokens(name, degrees, kind="full", folder=None, new=9, changes=None):
    """What generate() gives for prompts padded on the left, cut and whole; and what evaluation gives."""
    topology, found = grid(**degrees), []
    for where in (topology, parallel.SINGLE):
        if folder is None:
            model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config(name, **(changes or {}))), where))
        else:
            model = parallel.from_pretrained(folder, where)
        adapt(model, kind)
        parallel.shard_adapters(model, where)
        model.eval()
        ids = np.random.default_rng(4).integers(3, 57, [3, 7])
        if tiny_models.family(name) == "chatglm":
            ids[:, 5], ids[:, 6] = tiny_models.SPECIAL["gmask"], tiny_models.SPECIAL["sop"]
        mask = np.ones_like(ids)
        mask[1, :3] = 0
        texts = M.generate(model, ids, new, attention_mask=mask)
        sampled = M.generate(
            model, ids, new, do_sample=True, top_p=0.9, temperature=0.7, repetition_penalty=1.1, seed=3
        )
        with paddle.no_grad():
            losses, best = model(**trainer.model_inputs(batch(name, 1)), return_predictions=True)
            logits = model(paddle.to_tensor(ids))
        found.append((texts.tolist(), sampled.tolist(), best.numpy(), losses.numpy(), logits.numpy()))
    (a, b), close = found, lambda x, y: float(np.abs(x - y).max() / np.abs(y).max())
    return a[0] == b[0] and a[1] == b[1] and bool((a[2] == b[2]).all()), close(a[3], b[3]), close(a[4], b[4])


def starts(name, degrees, changes=None):
    """Names of the weights whose start, after init_weights, is not bitwise the part of one process's; (bytes here, of
    all)."""
    topology, config = grid(**degrees), tiny_models.config(name, **(changes or {}))
    model, alone = parallel.parallelize(M.build(config), topology), M.build(config)
    formats.weights.init_weights(model, 5)
    formats.weights.init_weights(alone, 5)
    wanted = {w.name: w.to_numpy() for w in formats.weights.named_weights(alone)}
    weights = formats.weights.named_weights(model)
    assert {w.name for w in weights} | model.names_on_other_ranks >= set(wanted) and not {
        w.name for w in weights
    } & model.names_on_other_ranks
    wrong = [w.name for w in weights if not np.array_equal(whole(w, w.parameter, topology), wanted[w.name])]
    return wrong, sum(p.size * 4 for p in model.parameters()), sum(p.size * 4 for p in alone.parameters())


def on_disk(base, adapter, degrees, folder):
    """An adapter on a cut model: loaded to go on, written, loaded again, merged. Names of what differs from one
    process."""
    topology, wrong = grid(**degrees), []
    model, alone = parallel.from_pretrained(base, topology), adapters.from_pretrained(base)
    for one in (model, alone):
        adapters.load_adapter(one, adapter, trainable=True)
    parallel.shard_adapters(model, topology)

    def compare(found, wanted, what, tolerance=0.0):
        assert found.keys() == wanted.keys(), (what, found.keys() ^ wanted.keys())
        assert found.pop("adapter_config.json", None) == wanted.pop("adapter_config.json", None)
        wrong.extend(
            f"{what} {n}"
            for n in found
            if not np.abs(found[n] - wanted[n]).max() <= tolerance * np.abs(wanted[n]).max()
        )

    def base_of(one):
        return {w.name: whole(w, w.parameter, topology) for w in formats.weights.named_weights(one)}

    compare(
        written(model, topology, f"{folder}/all"),
        written(alone, parallel.SINGLE, f"{folder}/{topology.rank}"),
        "loaded",
    )
    wanted = {n: a for n, a in base_of(alone).items() if n not in model.names_on_other_ranks}
    compare(base_of(model), wanted, "base", 1e-7)
    for weight in adapters.adapter_weights(model):
        M.set_parameter(weight.parameter, np.full(weight.parameter.shape, 0.5, np.float32))
    adapters.restore_adapter(model, adapter)
    compare(
        written(model, topology, f"{folder}/all"),
        written(alone, parallel.SINGLE, f"{folder}/{topology.rank}"),
        "loaded again",
    )
    if model.prefix is None:
        merged = parallel.from_pretrained(adapter, topology)
        wanted = {
            n: a for n, a in base_of(adapters.from_pretrained(adapter)).items() if n not in model.names_on_other_ranks
        }
        compare(base_of(merged), wanted, "merged", 1e-6)
    return wrong


def written(model, topology, folder):
    """{file and name: array} of the adapter that the ranks write together, as the scripts do."""
    folder = Path(folder)
    args = types.SimpleNamespace(
        lora=True, model_name_or_path=None, unified_checkpoint_config=[], ckpt_quant_stage="O0"
    )
    CheckpointManager(args, model, types.SimpleNamespace(save=lambda folder: None), topology=topology).write_model(
        folder
    )
    topology.barrier()
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {
            f"{path.name} {name}": formats.tensor_files.read_tensor(path, entry).copy()
            for name, entry in formats.tensor_files.safetensors_header(path).items()
        }
    found["adapter_config.json"] = json.loads((folder / "adapter_config.json").read_text())
    topology.barrier()  # before it is written again
    return found


def halved(name, degrees):
    """In bfloat16: frozen weights after cast_frozen_to_bf16() that have lost their place in the whole, and a loss
    beside one process's."""
    import kernels

    topology, found = grid(**degrees), []
    kernels.bf16 = True
    try:
        for where in (topology, parallel.SINGLE):
            model = tiny_models.fill(parallel.parallelize(M.build(tiny_models.config(name)), where))
            adapt(model, "lora")
            parallel.shard_adapters(model, where)
            cut = {path for path, p in model.named_parameters() if getattr(p, "shard_spec", None) is not None}
            adapters.cast_frozen_to_bf16(model)
            lost = [
                path for path, p in model.named_parameters() if path in cut and getattr(p, "shard_spec", None) is None
            ]
            halves = sum(p.dtype == paddle.bfloat16 for p in model.parameters())
            model.train()
            loss = model(**trainer.model_inputs(batch(name, 1)))
            loss.sum().backward()
            found.append((lost, halves, float(loss.sum())))
    finally:
        kernels.bf16 = False
    return found


def exchanged(counts):
    """Rows that this rank gets when each sends counts[from][to], and those that it should; forward, and gradients
    back."""
    topology, counts = grid(dp=len(counts), ep=len(counts)), np.array(counts)
    ep, rows = topology.ep, lambda a, b: [[100 * a + 10 * b + i, -1] for i in range(counts[a][b])]
    mine = [row for to in range(ep.size) for row in rows(ep.rank, to)]
    x = paddle.to_tensor(np.array(mine, np.float32).reshape([-1, 2]), stop_gradient=False)
    y = _AllToAllV.apply(x, ep, counts)
    (y * y.detach()).sum().backward()
    wanted = [row for source in range(ep.size) for row in rows(source, ep.rank)]
    back = [] if x.grad is None else x.grad.numpy().tolist()
    return [y.numpy().tolist(), back], [wanted, mine]


def counted(name, degrees, kind, changes=None):
    """num_parameters() of all and of what is trained: [cut, in one process]."""
    topology, found = grid(**degrees), []
    for where in (topology, parallel.SINGLE):
        model = parallel.parallelize(M.build(tiny_models.config(name, **(changes or {}))), where)
        tiny_models.fill(model)
        adapt(model, kind)
        parallel.shard_adapters(model, where)
        if where.degrees.stage == 3:
            ZeroOptimizer(model, adapters.trainable_weights(model), where)
        found.append((model.num_parameters(), model.num_parameters(trained=True)))
    return found
