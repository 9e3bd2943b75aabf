"""How long training stands still for a checkpoint: async_save beside a blocking save, and what a verified resume costs.

    python tests/bench/bench_checkpoint.py                      # 134 M parameters, AdamW: 1.6 GB a checkpoint; needs 12 GB of memory
    python tests/bench/bench_checkpoint.py --layers 2 --rounds 3

Prints a markdown table. Stall: seconds in save(), the median of the rounds. An async save is waited for before the next one
is timed, as saves are further apart than they take. Its buffers are made before. "behind":
until the checkpoint is complete. Training meanwhile: matrix products of one thread a rank, in seconds beside what they take
when nothing is written.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import paths  # noqa: F401


def measure(folder, config, degrees, rounds):
    """On each rank: {"blocking": [s], "first": s, "async": [s], "behind": [s], "alone": s, "beside": s, …}."""
    import numpy as np
    from jobs_checkpoint import Run

    import checkpoint

    found = {"blocking": [], "async": [], "behind": [], "beside": []}

    def timed(work):
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    x = np.ones((700, 700), np.float32)

    def busy(end=lambda: False, limit=200):
        """Seconds of a product, on average, while it is not at its end."""
        begin, n = time.perf_counter(), 0
        while n < limit and not end():
            x @ x
            n += 1
        return (time.perf_counter() - begin) / max(n, 1)

    run = Run(Path(folder) / "blocking", config, degrees, save_total_limit=1)
    found["bytes"] = sum(12 * w.parameter.size for w in run.weights)
    run.set(1)
    for step in range(1, rounds + 2):
        seconds = timed(lambda: run.save(step))
        found["blocking"] += [seconds] if step > 1 else []
    topology, path = run.topology, Path(folder) / "blocking" / f"checkpoint-{rounds + 1}"
    topology.barrier()
    found["verify"] = timed(lambda: checkpoint.damaged(path, topology))
    topology.barrier()
    found["load"] = timed(
        lambda: (
            checkpoint.load_trained(run.model, path, run.args),
            checkpoint.load_checkpoint(path, run.optimizer, run.shards),
        )
    )
    topology.barrier()
    if topology.rank == 0:
        shutil.rmtree(Path(folder) / "blocking")
    topology.barrier()
    del run
    run = Run(Path(folder) / "async", config, degrees, "async_save", save_total_limit=1)
    run.set(1)
    busy()
    found["alone"] = busy()
    for step in range(1, rounds + 2):
        topology.barrier()
        begin = time.perf_counter()
        run.save(step)
        stall = time.perf_counter() - begin
        thread = run.checkpoints.pending.thread
        found["beside"].append(busy(lambda: not thread.is_alive(), 10**9))
        run.checkpoints.wait()
        found["behind"].append(time.perf_counter() - begin)
        found["async"].append(stall)
    return found


def main():
    import numpy as np
    from pool import Ranks

    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows with this in their name")
    parser.add_argument("--folder", help="on the disk to measure; default: the one of temporary files")
    options = parser.parse_args()
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }
    print(
        "| processes | a rank holds | blocking save | async: stall | less | the first | until complete | a product beside it | verify | load |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, degrees in (("1", {}), ("2: dp 2", {"dp": 2}), ("2: tp 2", {"tp": 2})):
        if options.only not in name:
            continue
        folder = tempfile.mkdtemp(prefix="bench_checkpoint", dir=options.folder)
        try:
            with Ranks(int(np.prod(list(degrees.values()) or [1]))) as ranks:
                found = ranks.run("bench_checkpoint:measure", folder, config, degrees, options.rounds)
        finally:
            shutil.rmtree(folder)
        slowest = [
            max(rank["async"][0] for rank in found),
            *(max(rank[key] for rank in found) for key in ("verify", "load")),
        ]
        blocking, stall, behind = (
            max(statistics.median(rank[key]) for rank in found) for key in ("blocking", "async", "behind")
        )
        beside = statistics.median(
            rank["beside"][i] / rank["alone"] for rank in found for i in range(len(rank["beside"]))
        )
        print(
            f"| {name} | {found[0]['bytes'] / 1e9:.2f} GB | {blocking:.2f} s | {stall:.3f} s | {100 * (1 - stall / blocking):.1f} % | {slowest[0]:.2f} s "
            f"| {behind:.2f} s | {beside:.2f} x | {slowest[1]:.2f} s | {slowest[2]:.2f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
