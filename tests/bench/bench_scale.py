"""What a save and a minute of watching cost with 8, 64 and 1,024 ranks: files, bytes, messages, waiting.

    python tests/bench/bench_scale.py [--ranks 8 64 1024] [--topology sharding]     # prints tables; some minutes

The ranks are threads of one process with the product's own classes (CheckpointManager, ZeroOptimizer, TreeNode,
Watchdog); only the sockets are missing (tests/ranks/simulated.py). The model is tiny, the numbers of files and messages
are those of a large one. "Waiting" counts the messages that the slowest rank handles one after another.
"""

import argparse
import collections
import contextlib
import shutil
import tempfile
import threading
from pathlib import Path

import paths  # noqa: F401

MODEL = {"model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
         "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "rope_theta": 1e4, "tie_word_embeddings": False}  # fmt: skip

TOPOLOGIES = {  # name: degrees of so many ranks
    "dp": lambda ranks: {"dp": ranks},
    "sharding": lambda ranks: {"sharding": ranks, "stage": 1},
    "tp8 sharding": lambda ranks: {"tp": 8, "sharding": ranks // 8, "stage": 1} if ranks > 8 else {"tp": 8},
}


def simulate_save(ranks, degrees, folder):
    """{what: count} of one save, the second of a run; the first one's messages are in "first"."""
    import jobs_checkpoint
    import simulated

    import checkpoint
    import distributed.shard_files as shard_files
    import parallel

    network = simulated.Network(ranks)
    runs = []
    for rank in range(ranks):
        topology = parallel.Topology(parallel.Degrees(**degrees), rank)
        run = jobs_checkpoint.Run(folder, MODEL, degrees, topology=topology)
        topology.groups = network.groups(rank)
        runs.append(run)
    written, opened, lock = collections.Counter(), collections.Counter(), threading.Lock()
    write, header = shard_files.write_safetensors, shard_files.safetensors_header

    def counted_write(path, *args, **more):
        done = write(path, *args, **more)
        with lock:
            kind = "parts" if path.parent.name.endswith("-parts") else "data"
            written[kind] += 1
            written[f"{kind} bytes"] += done["size"]
            written[threading.current_thread().name, kind] += 1
        return done

    def counted_header(path):
        with lock:
            opened["parts"] += 1
        return header(path)

    def save_all(step):
        written.clear()
        opened.clear()
        network.reset()
        errors = []

        def work(run):
            try:
                run.checkpoints.save(checkpoint.TrainState(step=step))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(run,), name=str(rank)) for rank, run in enumerate(runs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    shard_files.write_safetensors, shard_files.safetensors_header = counted_write, counted_header
    previous = threading.stack_size(512 << 10)
    try:
        save_all(1)
        first = sum(network.messages.values()), sum(network.bytes.values())
        save_all(2)
    finally:
        threading.stack_size(previous)
        shard_files.write_safetensors, shard_files.safetensors_header = write, header
    assert checkpoint.incomplete(Path(folder) / "checkpoint-2") is None
    return {
        "data files": written["data"],
        "data files a rank": max(count for key, count in written.items() if key[1] == "data"),
        "files of parts": written["parts"],
        "parts opened": opened["parts"],
        "all files": len(list((Path(folder) / "checkpoint-2").iterdir())) + written["parts"],
        "data bytes": written["data bytes"],
        "parts bytes": written["parts bytes"],
        "first messages": first[0],
        "first bytes": first[1],
        "messages": sum(network.messages.values()),
        "message bytes": sum(network.bytes.values()),
        "messages of rank 0": network.messages[0],
        "waiting": max(network.clock),
    }


def simulate_watch(ranks):
    """{what: count} of a minute of heartbeats, and of one barrier."""
    import simulated

    network = simulated.Network(ranks)
    simulated.watch_minute(network)
    found = {
        "messages": sum(network.messages.values()),
        "bytes": sum(network.bytes.values()),
        "of rank 0": network.messages[0],
        "of any rank": max(network.messages.values()),
        "depth": network.depth,
    }
    network.reset()
    for node in network.nodes:
        node.contribute("barrier", None, "first")
    network.deliver()
    return {**found, "barrier": max(network.clock)}


def table(rows, first):
    names = list(next(iter(rows.values())))
    lines = [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(f"{row[key]:,}" for key in names) + " |" for name, row in rows.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--topology", nargs="+", default=list(TOPOLOGIES))
    options, rows = parser.parse_args(), {}
    print("A save:\n")
    for ranks in options.ranks:
        for name in options.topology:
            folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
            with contextlib.ExitStack() as stack:
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                rows[f"{ranks:,} | {name}"] = simulate_save(ranks, TOPOLOGIES[name](ranks), folder)
    print("\n".join(table(rows, "ranks | topology")).replace("|---", "|---|---", 1))
    print("\nA minute of watching, and a barrier:\n")
    print("\n".join(table({f"{ranks:,}": simulate_watch(ranks) for ranks in options.ranks}, "ranks")))


if __name__ == "__main__":
    main()
