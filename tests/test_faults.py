"""What breaks between many processes: disks that take nothing more, two runs in one folder, changed data, many ranks.

python -m pytest tests/test_faults.py                 # under a minute
python -m pytest tests/test_faults.py --slow          # also a run on a disk that becomes read-only, and random kills
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import types

import jobs_checkpoint
import numpy as np
import pytest
from conftest import ROOT
from test_checkpoint import TINY, flip
from tiny_models import write as write_family

import checkpoint
from arguments import TrainingArgs
from checkpoint import DONE, find_checkpoint, incomplete, list_checkpoints
from distributed import run_lock, tree
from distributed.run_lock import LOCK, RunLock
from formats.files import UserError

SLOW = pytest.mark.slow


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


# ---------------------------------------------------------------------------------------------- case 1: pruning


def save(run, *steps, best=None):
    for step in steps:
        run.set(step)
        run.checkpoints.save(checkpoint.TrainState(step=step, best_checkpoint=best))


def damage(path, how):
    if how == "no marker":
        (path / DONE).unlink()
    elif how == "a file cut":
        os.truncate(path / "optimizer-00001-of-00001.safetensors", 100)
    elif how == "a bit":
        flip(path / "model.safetensors")
    elif how == "empty":
        for file in path.iterdir():
            file.unlink()


@pytest.mark.parametrize("how", ["no marker", "a file cut", "a bit", "empty"])
@pytest.mark.parametrize("limit", [1, 2])
def test_pruning_never_deletes_the_last_good_checkpoint(how, limit, tmp_path):
    """The newest is damaged, so the run resumes from the one before and saves again, at a lower step."""
    save(jobs_checkpoint.Run(tmp_path, TINY, {}), 1, 9)
    damage(tmp_path / "checkpoint-9", how)
    args = TrainingArgs(output_dir=str(tmp_path), resume_from_checkpoint=True, do_train=True, save_total_limit=limit)
    assert find_checkpoint(args).name == "checkpoint-1"
    run = jobs_checkpoint.Run(tmp_path, TINY, {}, save_total_limit=limit)
    for step in (3, 5):
        save(run, step)
        assert find_checkpoint(args).name == f"checkpoint-{step}"
    assert names(tmp_path) == [f"checkpoint-{step}" for step in ((5, 9) if limit == 1 else (3, 5, 9))]
    save(run, 9)  # the damaged one is replaced
    assert find_checkpoint(args).name == "checkpoint-9"
    checkpoint.unlock_output_dir(args.output_dir)


def test_nothing_is_pruned_for_a_checkpoint_that_is_not_there(tmp_path, monkeypatch, capsys):
    """The file system loses a file of the new checkpoint: the old one stays, and a line says so."""
    run = jobs_checkpoint.Run(tmp_path, TINY, {}, save_total_limit=1)
    save(run, 1)
    real = checkpoint.replace_checkpoint

    def lossy(temporary, final):
        real(temporary, final)
        (final / "model.safetensors").unlink()

    monkeypatch.setattr(checkpoint, "replace_checkpoint", lossy)
    save(run, 2)
    assert "checkpoint-2: model.safetensors is missing; earlier checkpoints are kept" in capsys.readouterr().out
    assert incomplete(tmp_path / "checkpoint-1") is None


def test_a_checkpoint_killed_before_its_rename_is_recovered(tmp_path, capsys):
    """Complete under its temporary name, or under the one that it has while it is replaced."""
    args = TrainingArgs(output_dir=str(tmp_path), resume_from_checkpoint=True, do_train=True)
    save(jobs_checkpoint.Run(tmp_path, TINY, {}), 1, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "tmp-checkpoint-2")
    (tmp_path / "checkpoint-1").rename(tmp_path / "tmp-checkpoint-1-old")
    (tmp_path / "tmp-checkpoint-3").mkdir()  # half-written
    assert find_checkpoint(args).name == "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "tmp-checkpoint-3"]
    assert capsys.readouterr().out.count("its run was killed before it got its name") == 2
    checkpoint.unlock_output_dir(args.output_dir)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"12 34", b"999"])
def test_a_damaged_marker_is_one_reason(content, tmp_path):
    """Bytes that are no UTF-8 are no traceback, and an empty marker does not switch the checksum off."""
    save(jobs_checkpoint.Run(tmp_path, TINY, {}), 1)
    (tmp_path / "checkpoint-1" / DONE).write_bytes(content)
    assert "damaged" in incomplete(tmp_path / "checkpoint-1")


# ---------------------------------------------------------------------------------------------- cases 2, 3: the disk


@pytest.fixture
def mount(tmp_path):
    """mount(options) -> a small file system in memory; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def make(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("options", ["", "async_save"], ids=["blocking", "async"])
def test_no_inodes_left(options, two, mount):
    """Rank 1 cannot create a file, nor one that would say so; all ranks end with one line, and the first save stays."""
    disk = mount("nr_inodes=26,size=64m")
    found = two.run("jobs_checkpoint:save_until_full", str(disk), TINY, {"tp": 2}, options, timeout=60)
    assert found[0] == found[1] and "the disk is full" in found[0] and "no inodes" in found[0], found
    assert "earlier ones are intact" in found[0] and "\n" not in found[0]
    assert names(disk)[:1] == ["checkpoint-1"] and all(incomplete(path) is None for path in list_checkpoints(disk))


RUN = """import sys
sys.path.insert(0, {root!r})
import subprocess
import trainer, finetune
step = trainer.Log.step
def after(log, state, *args, **kwargs):
    step(log, state, *args, **kwargs)
    if state.step == 2:
        subprocess.run(["mount", "-o", "remount,ro", {disk!r}], check=True)
trainer.Log.step = after
trainer.run_script(finetune.main, finetune.Args, sys.argv[1:])
"""


@SLOW
def test_a_read_only_remount_is_one_line(mount):
    disk = mount("size=64m")
    keys = {
        "model_name_or_path": str(ROOT / "demo" / "llama"),
        "dataset_name_or_path": str(ROOT / "demo" / "sft"),
        "output_dir": str(disk / "out"),
        "max_steps": 4,
        "logging_steps": 1,
        "lora": True,
        "do_train": True,
        "device": "cpu",
    }
    argv = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    script = RUN.format(root=str(ROOT), disk=str(disk))
    done = subprocess.run([sys.executable, "-c", script, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "metrics.jsonl: the file system is read-only now; make it writable again, then resume" in last


# ---------------------------------------------------------------------------------------------- case 4: two runs


@pytest.fixture
def other():
    """A process of another run."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def write_lock(folder, **owner):
    """The lock of another run."""
    content = {"host": socket.gethostname(), "pid": 1, "process_start": "0", "started": "2026-01-01", "id": "other"}
    (folder / LOCK).write_text(json.dumps({**content, **owner}))


def test_a_second_run_is_refused_by_name(other, tmp_path):
    """Another live process of this machine; one of another machine that gave a sign of life a minute ago."""
    write_lock(tmp_path, pid=other.pid, process_start=run_lock._process_start(other.pid))
    before = (tmp_path / LOCK).read_bytes()
    with pytest.raises(UserError, match=rf"the run of process {other.pid} on .*, started 2026-01-01, is writing there"):
        RunLock.take(tmp_path)
    write_lock(tmp_path, host="elsewhere")
    os.utime(tmp_path / LOCK, (time.time() - 60, time.time() - 60))
    with pytest.raises(UserError, match=r"1 on elsewhere, .* is writing there \(last sign of life (59|6\d) s ago\)"):
        RunLock.take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK] and b"other" in before
    args = TrainingArgs(output_dir=str(tmp_path), resume_from_checkpoint=True, do_train=True)
    with pytest.raises(UserError, match="is writing there"):
        find_checkpoint(args)


def test_a_stale_lock_is_taken_over_with_a_line(other, tmp_path, capsys):
    """Of a process that is gone, of a number that is another program's now, of a silent machine, of a killed writer."""
    old = time.time() - 600
    for owner, reason in (
        ({"pid": 2**22 + 1}, "its process is gone"),
        ({"pid": other.pid}, "its process is gone, its number is another program's"),
        ({"host": "elsewhere"}, "no sign of life for 600 s"),
        (None, "it is empty"),
    ):
        write_lock(tmp_path, **(owner or {}))
        if owner is None:
            (tmp_path / LOCK).write_text("")
        os.utime(tmp_path / LOCK, (old, old))
        lock = RunLock.take(tmp_path)
        assert f"is taken over: {reason}\n" in capsys.readouterr().out
        assert RunLock.take(tmp_path) is lock and capsys.readouterr().out == ""
        lock.release()
        assert list(tmp_path.iterdir()) == []


def test_one_of_many_takes_a_stale_lock(tmp_path):
    """Threads with locks of their own stand for processes."""
    for attempt in range(20):
        write_lock(tmp_path, pid=2**22 + 1)
        locks, barrier = [RunLock(tmp_path / LOCK) for _ in range(6)], threading.Barrier(6)
        won = []

        def work(lock):
            barrier.wait()
            for _ in range(4):
                try:
                    if lock._create():
                        won.append(lock)
                        return
                    lock._remove_stale()
                except UserError:
                    return

        threads = [threading.Thread(target=work, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and won[0]._is_own(), attempt
        (tmp_path / LOCK).unlink()


def test_a_run_whose_lock_is_gone_commits_nothing(tmp_path):
    run = jobs_checkpoint.Run(tmp_path, TINY, {}, save_total_limit=1)
    lock = RunLock.take(tmp_path)
    save(run, 1)
    write_lock(tmp_path)
    with pytest.raises(UserError, match="another run has taken it over: the run of process 1 on"):
        save(run, 2)
    assert names(tmp_path) == ["checkpoint-1"]
    lock.release()
    assert (tmp_path / LOCK).exists()  # the other's


# ---------------------------------------------------------------------------------------------- cases 7, 8: the data


def write_corpora(folder):
    import formats.megatron

    for name, length, count in (("a", 37, 40), ("b", 23, 55)):
        sizes = np.arange(count, dtype=np.int32) % length + 3
        (folder / f"{name}.idx").write_bytes(formats.megatron.index_bytes(np.uint16, sizes))
        np.arange(int(sizes.sum()), dtype=np.uint16).tofile(folder / f"{name}.bin")


@pytest.mark.parametrize("source", ["{0}/a", "2 {0}/a 1 {0}/b", "1 {0}/a 1 {0}/b"])
def test_more_steps_extend_the_order_of_a_corpus(source, tmp_path):
    """The samples of 9 to 600, over many passes: each longer run begins as the shorter ones do."""
    from data import CorpusLoader

    write_corpora(tmp_path)
    whole = CorpusLoader(source.format(tmp_path), "1", "train", 600, 16, 1, seed=5)
    rows = [whole.batch(0, i)["input_ids"][0].tolist() for i in range(600)]
    for count in (9, 40, 41, 200, 333):
        loader = CorpusLoader(source.format(tmp_path), "1", "train", count, 16, 1, seed=5)
        assert [loader.batch(0, i)["input_ids"][0].tolist() for i in range(loader.batches_per_epoch)] == rows[:count]
    assert rows[:200] != rows[200:400]


def test_data_edited_between_save_and_resume_is_named(tmp_path, capsys):
    """One byte in place, another size, another file; a large file by its samples; dev data do not count."""
    from dataclasses import make_dataclass

    data = tmp_path / "sft"
    data.mkdir()
    for name in ("train.json", "dev.json"):
        (data / name).write_text('{"src": "a", "tgt": "b"}\n' * 9)
    write_corpora(tmp_path)
    more = [("dataset_name_or_path", str, str(data)), ("input_dir", str, f"1 {tmp_path}/a 2 {tmp_path}/b")]
    Args = make_dataclass("Args", more, bases=(TrainingArgs,))
    before = checkpoint.data_fingerprints(Args())
    assert sorted(before) == [
        "dataset_name_or_path/train.json",
        *(f"input_dir/{name}" for name in ("a.bin", "a.idx", "b.bin", "b.idx")),
    ]
    (data / "dev.json").write_text("{}")
    assert checkpoint.changed_data(before, checkpoint.data_fingerprints(Args())) == []
    flip(tmp_path / "b.bin", 7)
    (data / "train.json").write_text('{"src": "a", "tgt": "c"}\n')
    (tmp_path / "a.idx").unlink()
    lines = checkpoint.changed_data(before, checkpoint.data_fingerprints(Args()))
    assert lines == [
        "data dataset_name_or_path/train.json: 225 -> 25 bytes",
        f"data input_dir/a.idx: {before['input_dir/a.idx'][0]} -> no file",
        "data input_dir/b.bin: its content, size unchanged",
    ]
    with open(tmp_path / "large", "wb") as file:
        file.truncate(200 << 20)
        old = checkpoint.fingerprint(tmp_path / "large")
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
        file.flush()
        assert checkpoint.fingerprint(tmp_path / "large") != old


def test_the_line_of_a_resume_names_changed_data(tmp_path, capsys):
    run = jobs_checkpoint.Run(tmp_path, TINY, {})
    run.checkpoints.data = {"dataset_name_or_path/train.json": [1, "ab"]}
    save(run, 1)
    args = TrainingArgs(output_dir=str(tmp_path), resume_from_checkpoint=True, do_train=True)
    saved = checkpoint._read_state(tmp_path / "checkpoint-1")
    assert saved["data"] == run.checkpoints.data
    checkpoint.data_fingerprints, real = (
        lambda args: {"dataset_name_or_path/train.json": [1, "cd"]},
        (checkpoint.data_fingerprints),
    )
    try:
        find_checkpoint(args)
    finally:
        checkpoint.data_fingerprints = real
        checkpoint.unlock_output_dir(args.output_dir)
    line = "not an exact continuation, changed: "
    printed = capsys.readouterr().out
    assert line in printed and "data dataset_name_or_path/train.json: its content, size unchanged" in printed


# ---------------------------------------------------------------------------------------------- case 6: experts


@pytest.mark.parametrize(
    "degrees",
    [
        {"dp": 2, "sharding": 2, "ep": 2, "stage": 1},
        {"sharding": 4, "ep": 2, "stage": 2},
        {"sharding": 4, "ep": 2, "stage": 3},
        {"dp": 2, "sharding": 4, "ep": 4, "stage": 3},
        {"sharding": 2, "sep": 2, "ep": 2, "stage": 1},
        {"sharding": 4, "tp": 2, "ep": 2, "stage": 1},
        {"dp": 4, "ep": 2, "stage": 0},
    ],
    ids=str,
)
def test_experts_are_sharded_over_their_copies(degrees, tmp_path):
    """Moments and weights that each rank holds, without processes: all of an expert once among the ranks that have it,
    and as many as the dry run says."""
    import adapters
    import distributed.sharding
    import formats.weights
    import model as M
    import parallel
    from families import ModelConfig
    from planning import memory_model

    write_family(tmp_path / "moe", "qwen2_moe", num_experts=4)
    config, degrees = ModelConfig.from_json(tmp_path / "moe"), parallel.Degrees(**degrees)
    held, owned = [], {}
    for rank in range(degrees.world):
        topology = parallel.Topology(degrees, rank)
        model = parallel.parallelize(M.build(config), topology)
        formats.weights.init_weights(model, 1)
        shards = distributed.sharding.ZeroOptimizer(model, adapters.trainable_weights(model), topology)
        sizes = {
            piece.name: piece.last - piece.first if degrees.stage else int(np.prod(piece.parameter.shape))
            for piece in shards.pieces
        }
        for name, size in sizes.items():
            if ".experts." in name:
                owned[name] = owned.get(name, 0) + size
        held.append(sum(sizes.values()))
    full = {weight.name: int(np.prod(weight.shape)) for weight in adapters.trainable_weights(M.build(config))}
    copies = degrees.world // degrees.ep // degrees.tp if not degrees.stage else 1
    assert {name: size * copies for name, size in full.items() if ".experts." in name} == owned
    args = types.SimpleNamespace(device="cpu")
    layers, first, last = memory_model.MemoryModel(args, config, 64).local_elements(degrees)
    predicted = (layers.sum(0) + first + last)[1 if degrees.stage else 0]
    assert max(held) == pytest.approx(predicted, rel=0.02)  # parts are multiples of 16 elements


# ---------------------------------------------------------------------------------------------- case 10: vocabulary


def test_an_uneven_vocabulary_is_chunked_alike_on_all_ranks(two):
    """Else they would reduce tensors of different shapes."""
    found = two.run("jobs_checkpoint:uneven_vocabulary", timeout=60)
    (_, (losses, gradients)) = found[0]
    for shard, _ in found:
        assert np.allclose(shard[0], losses, atol=1e-5)
    assert np.allclose([row for shard, _ in found for row in shard[1]], gradients, atol=1e-4)


# ---------------------------------------------------------------------------------------------- case 11: interleaving


def most_held(plan):
    """The largest number of forwards whose backward is still to come, of any rank."""
    return max(max(np.cumsum([1 if kind == "forward" else -1 for kind, _, _ in steps]), default=0) for steps in plan)


@pytest.mark.parametrize(
    "ranks, virtual, batches", [(8, 4, 36), (8, 4, 1), (4, 2, 5), (3, 3, 7), (2, 2, 1), (4, 1, 6), (16, 4, 500)]
)
def test_a_smaller_last_group_costs_no_memory(ranks, virtual, batches):
    """Each step once, no deadlock, at most what full groups hold (Megatron's), built in under a second."""
    from distributed.pipeline import pipeline_schedule, simulate_schedule

    begin = time.perf_counter()
    plan = pipeline_schedule.__wrapped__(ranks, virtual, batches)
    assert time.perf_counter() - begin < 1.0
    full = pipeline_schedule(ranks, virtual, -(-batches // ranks) * ranks)
    steps = {(kind, chunk, i) for kind in ("forward", "backward") for chunk in range(virtual) for i in range(batches)}
    assert all(len(row) == len(steps) and set(row) == steps for row in plan)
    assert most_held(plan) <= most_held(full) and simulate_schedule(plan)[0] <= simulate_schedule(full)[0]


# ---------------------------------------------------------------------------------------------- case 9: many ranks


@pytest.mark.parametrize("topology", ["dp", "sharding", "tp8 sharding"])
def test_files_and_messages_of_a_save_grow_as_the_ranks(topology, tmp_path):
    """16 ranks in threads: one data file and one file of parts a rank, nine messages a rank, no message of all to
    all. Larger: tests/bench/bench_scale.py."""
    from bench_scale import TOPOLOGIES, simulate_save

    ranks = 16
    found = simulate_save(ranks, TOPOLOGIES[topology](ranks), tmp_path)
    assert found["data files a rank"] == 1 and found["data files"] <= ranks and found["files of parts"] <= ranks
    assert found["all files"] <= 2 * ranks + 6
    assert found["messages"] <= 12 * (ranks - 1) and found["waiting"] <= 100


def test_resuming_opens_only_files_that_a_rank_reads(tmp_path, monkeypatch):
    """Eight files, one tensor each; a tensor that is not where the index says is named."""
    import formats.tensor_files
    import formats.weights

    opened, real = [], formats.weights.safetensors_header
    weight_map = {f"w{i}": f"optimizer-{i}.safetensors" for i in range(8)}
    for name, file in weight_map.items():
        formats.tensor_files.write_safetensors(tmp_path / file, {name: np.full([2, 3], int(name[1]), np.float32)})
    index = tmp_path / "optimizer.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, "gone": "optimizer-2.safetensors"}}))
    monkeypatch.setattr(formats.weights, "safetensors_header", lambda path: opened.append(path.name) or real(path))
    found = formats.weights.stored_tensors(tmp_path, ("optimizer.safetensors",), trust_index=True)
    assert len(found) == 9 and opened == []
    assert found["w3"].read().tolist() == [[3.0] * 3] * 2 and found["w3"].shape == [2, 3]
    assert opened == ["optimizer-3.safetensors"]
    with pytest.raises(UserError, match="optimizer-2.safetensors: has no tensor gone, which the index says it has"):
        found["gone"].read()


def test_watching_costs_a_rank_the_same_whatever_their_number():
    """A minute of heartbeats and a barrier at 8, 64 and 1,024 ranks."""
    from bench_scale import simulate_watch

    from distributed.tree import FAN_OUT

    small, middle, large = (simulate_watch(ranks) for ranks in (8, 64, 1024))
    most = 12 * (2 * FAN_OUT + 1)  # neighbors, to each of which it beats every five seconds
    assert max(found["of any rank"] for found in (small, middle, large)) <= most and large["messages"] == 24 * 1023
    assert large["depth"] <= 4 and large["barrier"] <= 4 * middle["barrier"]
    assert small["messages"] == 24 * 7


def test_a_silent_rank_of_1024_is_named():
    """It neither beats nor answers: first a line, after ddp_timeout all ranks end with one message."""
    import simulated

    network, ended = simulated.Network(1024), {}
    for rank, node in enumerate(network.nodes):
        node.on_end = lambda code, text, rank=rank: ended.setdefault(rank, (code, text))
    deaf = network.nodes[517]
    deaf.receive = lambda *message: None
    dogs = simulated.watch_minute(network, limit=40.0, seconds=60, stopped=[517])
    assert len(dogs) == 1024 and set(ended) == set(range(1024)) - {517}
    (message,) = set(ended.values())
    assert (
        message[0] == 1
        and message[1].startswith("rank 517 gives no sign of life for 4")
        and "ddp_timeout 40" in message[1]
    )


# ---------------------------------------------------------------------------------------------- case 15: tokenizing


def write_records(path, count):
    """Conversations with pairs beside them; every seventh is dropped, as its reply is not to be learned."""
    with open(path, "w") as file:
        for i in range(count):
            prompt, reply = f"color {i} " * (1 + i % 5), {"role": "assistant", "content": f"red {i * i}"}
            record = {"messages": [{"role": "user", "content": prompt}, {**reply, "weight": int(i % 7 != 3)}]}
            pair = {"prompt": prompt, "chosen": f"blue {i}", "rejected": "blue 5" if i % 9 else f"blue {i}"}
            file.write(json.dumps(record if "sft" in path.name else pair) + "\n")
    return str(path)


@pytest.mark.parametrize("kind", ["sft", pytest.param("pairs", marks=SLOW), pytest.param("replies", marks=SLOW)])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=SLOW)])
def test_a_record_is_tokenized_by_one_process_of_a_machine(kind, processes, request, tmp_path):
    """Bit for bit what one process reads: a blend of two files, the second of fewer records than a block."""
    a, b = (write_records(tmp_path / f"{kind}-{count}.json", count) for count in (150, 20))
    source, ranks = f"0.9 {a} 0.1 {b}", request.getfixturevalue({2: "two", 4: "four"}[processes])
    whole, *wanted = jobs_checkpoint.tokenize(source, kind)
    found = ranks.run("jobs_checkpoint:tokenize", source, kind, timeout=60)
    encodes = [count for count, *_ in found]
    assert sum(encodes) == whole == 170 and max(encodes) <= {2: 96, 4: 64}[processes]
    assert all(list(rest) == wanted for _, *rest in found)
    assert kind == "replies" or wanted[1][1] > 0  # dropped


def test_processes_without_a_folder_in_common_tokenize_everything(two, tmp_path):
    source = write_records(tmp_path / "sft.json", 40)
    assert [rank[0] for rank in two.run("jobs_checkpoint:tokenize", source, "sft", timeout=60)] == [32, 8]
    found = two.run("jobs_checkpoint:without_temporary_folders", source, timeout=60)
    assert [rank[0] for rank in found] == [40, 40] and found[0] == found[1] == jobs_checkpoint.tokenize(source, "sft")


# ---------------------------------------------------------------------------------------------- kills


@SLOW
def test_random_kills(tmp_path):
    """SIGKILL of a random rank or of the launcher while saving, on six topologies, with save_total_limit 1. More of
    them: tests/bench/bench_kills.py."""
    from bench_kills import TOPOLOGIES, kill_runs

    total, _ = kill_runs(tmp_path, 2 * len(TOPOLOGIES), seed=int(time.time()))
    assert total["lost"] == 0 and total["half"] > 0


def test_a_connection_to_itself_does_not_keep_the_port(monkeypatch):
    """TCP may connect to itself while nobody listens on a port; kept open, that would keep the rank from listening."""
    made = []

    class Connection:
        closed = False

        def __init__(self, itself):
            self.itself = itself

        def getsockname(self):
            return ("host", 1)

        def getpeername(self):
            return ("host", 1 if self.itself else 2)

        def close(self):
            self.closed = True

        def sendall(self, content):
            pass

    def connect(address, timeout):
        made.append(Connection(itself=not made))
        return made[-1]

    monkeypatch.setattr(tree.socket, "create_connection", connect)
    links = tree.TreeLinks.__new__(tree.TreeLinks)
    links.endpoints, links.job, links.rank = ("host:1",), "job", 1
    assert links._dial(0) is made[1] and made[0].closed
