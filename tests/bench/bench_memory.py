"""Memory of a rank under each way to cut a run, measured, beside what --dry_run says of it.

    python tests/bench/bench_memory.py                                              # sharding 2 and 4, stages 0 to 3;
    tp and pp 2 and 4 python tests/bench/bench_memory.py --ways "dp=2" "sharding=2 stage=3 tp=2"      # any others; the
    first of them may be "" (one process) python tests/bench/bench_memory.py --lora
    # LoRA of rank 8 in place of all weights

The model is a Llama of 32 M parameters of random weights in float32; a step is two micro-batches of 1 x 128 tokens a
rank. Each row has processes of its own. Weights, gradients and moments are the bytes of the live tensors that hold
them, of the fullest rank: gradients between two micro-batches, and again right before the optimizer's step. `a unit at
work` is what came on top of weights and gradients at the most: sharding lays a unit's gradients flat to send them,
from stage 2 on in the middle of backward, and stage 3 has a unit's weights whole. In brackets what --dry_run says.
`allocated` is the most that Paddle had allocated on the rank in the second step, activations and all, and `resident`
the growth of the process's peak resident memory over its size before the model."""

import argparse
import json
import resource
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import paths  # noqa: F401

MODEL = {"model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}  # fmt: skip
TOKENS = 128
WAYS = ["", "dp=2", *(f"sharding={n} stage={s}" for n in (2, 4) for s in (1, 2, 3)), "tp=2", "tp=4", "pp=2", "pp=4"]
NAMES = {"tp": "tensor", "pp": "pipeline", "sharding": "sharding", "sep": "sep"}


def measure(ways, lora):
    """On every rank: train two steps; bytes by what they are for."""
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

    core, before = paddle.base.core, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    degrees, together = parallel.Degrees(**ways), distributed.watchdog.current_watchdog()
    place = (
        parallel.Topology(degrees, together.launch.rank, distributed.collectives.Gloo(together.launch))
        if together
        else parallel.SINGLE
    )
    model = parallel.parallelize(M.build(families.ModelConfig.from_dict(MODEL)), place)
    formats.weights.init_weights(model, 0)
    if lora:
        adapters.apply_lora(model)
        parallel.shard_adapters(model, place)
    weights = adapters.trainable_weights(model)
    shards = distributed.sharding.ZeroOptimizer(model, weights, place)
    args = types.SimpleNamespace(weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, sharding=None)
    optimizer = trainer.AdamW(shards.pieces, args)
    most, buckets = (
        {"weights": 0, "gradients": 0},
        [bucket for unit in shards.units.values() for bucket in unit.buckets],
    )

    def size(tensors):
        return sum(t.size * t.element_size() for t in tensors if t is not None and t._is_initialized())

    def held(flat=0):
        gradients = [w.parameter.grad for w in weights] + [
            b.gradient if b.owned is None else b.owned.grad for b in buckets
        ]
        now = {
            "weights": size(model.parameters()) + size(b.owned for b in buckets),
            "gradients": size(gradients) + flat,
        }
        for part, number in now.items():
            most[part] = max(most[part], number)
        return now

    for weight in weights:  # as gradients arrive, and while a unit's are laid flat
        weight.parameter._register_backward_hook(lambda *_: held() and None)
    lay, gather = distributed.sharding.Bucket.flatten, distributed.sharding.Bucket.unshard

    def laid(bucket, tensors):
        flat = lay(bucket, tensors)
        held(size([flat]) if tensors is not bucket.parameters else 0)
        return flat

    def gathered(bucket):
        gather(bucket)
        held()

    model.train()
    rng, found = np.random.default_rng(place.data_rank), {}
    with (
        mock.patch.object(distributed.sharding.Bucket, "flatten", laid),
        mock.patch.object(distributed.sharding.Bucket, "unshard", gathered),
    ):
        for _ in range(2):
            ids = rng.integers(3, MODEL["vocab_size"], (2, 1, TOKENS + 1))
            batches = [{"input_ids": paddle.to_tensor(i[:, :-1]), "labels": paddle.to_tensor(i[:, 1:])} for i in ids]
            core.host_memory_stat_reset_peak_value("Allocated", 0)
            for _ in parallel.forward_backward(
                model, batches, lambda batch: batch, lambda losses, batch: losses.mean() / 2, lambda number: None
            ):
                found["gradients"] = max(found.get("gradients", 0), held()["gradients"])
            norm = shards.reduce_gradients()
            found.update({f"{part} before the step": number for part, number in held().items()})
            optimizer.step(1e-4, min(1.0, 1.0 / norm))
            shards.gather_weights()
            optimizer.zero_grad()
    found["weights"] = found.pop("weights before the step")
    found["unit"] = sum(most[part] - found[part] for part in most)
    found["moments"] = size(m for pair in optimizer.moments.values() for m in pair)
    found["allocated"] = core.host_memory_stat_peak_value("Allocated", 0)
    found["resident"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return found


def said(ways, lora, folder):
    """{part: MB} of --dry_run for these degrees."""
    import arguments
    import finetune
    from planning import memory_model

    argv = [
        "--model_name_or_path",
        str(folder),
        "--dry_run",
        "true",
        "--max_length",
        str(TOKENS),
        "--src_length",
        "1",
        "--per_device_train_batch_size",
        "1",
        "--gradient_accumulation_steps",
        "2",
        "--lora",
        str(lora).lower(),
    ]
    for axis, degree in ways.items():
        if axis in NAMES:
            argv += [f"--{NAMES[axis]}_parallel_degree", str(degree)]
    argv += ["--sharding", f"stage{ways['stage']}"] if "stage" in ways else []
    argv += ["--virtual_pp_degree", str(ways.get("virtual", 1))]
    lines = memory_model.dry_run(arguments.parse_args(finetune.Args, argv)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("memory of the fullest rank in MB"))
    return {line[:32].strip(): float(line[32:].replace(",", "")) for line in lines[start + 1 :]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="*", default=WAYS, help='such as "sharding=2 stage=3"')
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()
    from pool import Ranks

    print(
        f"`{' '.join(['python', 'tests/bench/bench_memory.py', *sys.argv[1:]])}`: MB (1e6 bytes) of the fullest "
        "rank, measured (in brackets: --dry_run)\n"
    )
    print(
        "| | weights | gradients | moments | a unit at work | gradients before the step | allocated | resident |\n|---|"
        + "---:|" * 7
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        for text in args.ways:
            ways = {key: int(value) for key, value in (word.split("=") for word in text.split())}
            world = 1
            for axis in ("dp", "pp", "sharding", "sep", "tp"):
                world *= ways.get(axis, 1)
            with Ranks(world) as ranks:
                ranks_found = ranks.run("bench_memory:measure", ways, args.lora)
            found = {key: max(rank[key] for rank in ranks_found) / 1e6 for key in ranks_found[0]}
            formula = said(ways, args.lora, folder)
            cells = [f"{found[part]:.1f} ({formula[part]:.1f})" for part in ("weights", "gradients", "moments")]
            cells.append(f"{found['unit']:.1f} ({formula.get('a unit at work', 0.0):.1f})")
            cells += [f"{found[part]:.1f}" for part in ("gradients before the step", "allocated", "resident")]
            print(f"| {text or 'one process'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
