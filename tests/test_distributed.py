"""Paddle's launcher and our scripts: runs on two processes and on two nodes, and every way in which one rank can fail.

The console is what a user sees: the launcher's output. Each test starts its own processes and checks that none is left.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny_models
from conftest import ROOT
from family_cells import give_tokenizer, make_world

LAUNCH = [sys.executable, "-m", "paddle.distributed.launch"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model, its tokenizer and data, and args.json for finetune.py."""
    folder = tmp_path_factory.mktemp("launch")
    world, model = make_world(folder / "world"), folder / "model"
    tiny_models.write(model, "llama")
    give_tokenizer(model, world)
    keys = {
        "model_name_or_path": str(model),
        "dataset_name_or_path": str(world / "sft"),
        "output_dir": str(folder / "out"),
        "do_train": True,
        "src_length": 20,
        "max_length": 44,
        "max_new_tokens": 4,
        "zero_padding": True,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "overwrite_output_dir": True,
        "device": "cpu",
    }
    (folder / "args.json").write_text(json.dumps(keys))
    return folder


def start(folder, what, *argv, processes=2, options=(), name="log"):
    """Start the launcher with finetune.py. what: how a rank fails, see launched.py; None: the script itself."""
    own = [str(ROOT / "tests" / "ranks" / "launched.py"), "finetune", what] if what else [str(ROOT / "finetune.py")]
    command = [
        *LAUNCH,
        "--nproc_per_node",
        str(processes),
        "--log_dir",
        str(folder / name),
        *options,
        *own,
        str(folder / "args.json"),
        *argv,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def console(process, folder, limit=150):
    """(what the launcher printed, its exit code, seconds); checks that none of its processes is left."""
    begin = time.monotonic()
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert wait_until(lambda: not left(folder), 5), left(folder)
    return text, process.returncode, time.monotonic() - begin


def left(folder):
    """Command lines of processes that still work on this folder."""
    found = []
    for path in os.listdir("/proc"):
        if path.isdecimal():
            try:
                line = open(f"/proc/{path}/cmdline").read().split("\0")
            except OSError:
                continue
            if str(folder / "args.json") in line and int(path) != os.getpid():
                found.append(line)
    return found


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def logged(folder, key="loss"):
    return [json.loads(line)[key] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_as_one(base):
    """README's command. Only rank 0's console is shown, without Paddle's notes about connections."""
    code = subprocess.run(
        [sys.executable, str(ROOT / "finetune.py"), str(base / "args.json")], cwd=ROOT, capture_output=True
    ).returncode
    assert code == 0
    alone = logged(base)
    text, code, _ = console(start(base, None, "--tensor_parallel_degree", "2"), base)
    assert code == 0, text
    assert logged(base) == pytest.approx(alone, rel=1e-5) and len(alone) == 4
    assert all(talked.keys() == {"tp"} and 0 < talked["tp"] < 1 for talked in logged(base, "communication"))
    assert text.count("step 4/4") == 1 and "tcp_store" not in text and "it/s" not in text
    assert "step 4/4" in (base / "log" / "workerlog.1").read_text()


SECONDS = r"1\d"  # ddp_timeout is 12 here, and rank 0 looks once a second
WRONG = {  # what: (the line that the console ends with, exit code)
    "max_steps=5@1": (
        "error: rank 1: arguments: max_steps is 5 here and 4 on rank 0; all processes must have the same",
        2,
    ),
    "user@1": ("error: rank 1: the record on line 7 has no src", 2),
    "user@0": ("error: rank 0: the record on line 7 has no src", 2),
    "bug@1": ("error: rank 1: ZeroDivisionError: division by zero (its traceback is in its own log)", 1),
    "early@0": ("error: rank 0: this file cannot be read here", 2),
    "early@1": ("error: rank 1: this file cannot be read here", 2),
    "hang@1": (f"error: rank 1 hangs or is far behind: others have waited {SECONDS} s for it in a collective (tp)", 1),
    "stop@1": (f"error: rank 1 gives no sign of life for {SECONDS} s", 1),
    "exit@1": (r"error: rank 1 has vanished: it was killed, or ran out of memory", 1),
    "leave@1": (r"error: rank 1 has ended before the others", 1),
    "code@1": ("error: rank 1: the scripts: model.py is 'another' here and '", 2),
    "config:max_position_embeddings=7@1": (
        "error: rank 1: the model: max_position_embeddings is 7 here and 64 on rank 0",
        2,
    ),
}


@pytest.mark.parametrize(
    "what", [what if i == 0 else pytest.param(what, marks=pytest.mark.slow) for i, what in enumerate(WRONG)]
)
def test_a_rank_goes_wrong(base, what):
    """Its own message is the last line of the run, and all ranks end with its exit code within a minute."""
    line, wanted = WRONG[what]
    steps = "--max_steps=9" if "=" not in what else "--max_steps=4"
    text, code, seconds = console(start(base, what, "--tensor_parallel_degree=2", steps, "--ddp_timeout=12"), base)
    shown = [row for row in text.splitlines() if row.strip() and not row.startswith(("LAUNCH", "Container"))]
    line = re.escape(line).replace(re.escape(SECONDS), SECONDS)
    assert re.match(line, shown[-1]), text[-3000:]
    if what in ("hang@1", "stop@1"):
        assert re.search(r"^waiting: rank 1 .*; the run ends after ddp_timeout, 12 s$", text, re.M), text[-3000:]
    assert code == wanted
    print(f"{what}\t{shown[-1]}\t{seconds:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["slow@1", "pause@1", "pause@0"])
def test_a_slow_rank_is_not_a_dead_one(base, what):
    """It computes, or is stopped, for longer than gloo waits (30 s): a line after a tenth of ddp_timeout, no more."""
    options = ("--tensor_parallel_degree=2", "--max_steps=4", "--ddp_timeout=200")
    text, code, _ = console(start(base, what, *options), base)
    assert code == 0 and len(logged(base)) == 4, text[-3000:]
    if what != "pause@0":  # rank 0 would print it
        assert re.search(r"^waiting: rank 1 .*; the run ends after ddp_timeout, 200 s$", text, re.M), text[-3000:]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named(base, rank):
    """The launcher or another rank names it, whichever notices first; no other rank's log has a traceback."""
    text, code, _ = console(start(base, f"kill@{rank}", "--tensor_parallel_degree", "2", "--max_steps=9"), base)
    assert code != 0
    assert re.search(rf"^(Container rank {rank} .* code -9 .*|error: rank {rank} has vanished.*)$", text, re.M), text[
        -3000:
    ]
    assert "Traceback" not in (base / "log" / f"workerlog.{1 - rank}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("line", [5, 40])
def test_a_bad_record_ends_all_processes(base, line, tmp_path):
    """The processes tokenize 32 records each in turn; one of them meets it."""
    rows = [{"src": f"color {i}", "tgt": "red"} if i + 1 != line else {"src": 7, "tgt": "red"} for i in range(70)]
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = set(Path(tempfile.gettempdir()).glob("records-*"))
    text, code, _ = console(start(base, None, "--tensor_parallel_degree=2", f"--dataset_name_or_path={tmp_path}"), base)
    assert code == 2 and f"error: rank {int(line > 32)}: {tmp_path}/train.json:{line}: " in text, text[-3000:]
    assert "Traceback" not in text and set(Path(tempfile.gettempdir()).glob("records-*")) <= before


def status(waits=(), idle=0.0, silent=(), at=""):
    return {"waits": [list(wait) for wait in waits], "idle": idle, "silent": dict(silent), "at": at}


@pytest.mark.parametrize(
    "statuses, found",
    [
        (
            [status(idle=630.0), status(idle=660.0, at="data.py:7 (batch)"), status(idle=620.0)],
            (1, 620.0, "no rank has made progress for 620 s; rank 1 is at data.py:7 (batch)"),
        ),
        # Rank 2 computes while 0 and 1 wait, for each other's axis and for it.
        (
            [status([("tp", [0, 1], 40.0)]), status([("dp", [1, 2], 70.0)]), status(idle=75.0, at="x.py:1")],
            (
                2,
                70.0,
                "rank 2 hangs or is far behind: others have waited 70 s for it in a collective (dp); it is at x.py:1",
            ),
        ),
        # It writes or computes, so it is slow and does not hang.
        (
            [status([("save 3", None, 900.0)]), status(idle=2.0), status([("save 3", None, 900.0)])],
            (1, 2.0, "rank 1 hangs or is far behind: others have waited 2 s for it in a barrier"),
        ),
        (
            [status([("dp", [0, 2], 90.0)]), status(silent={"2": 95.0}), None],
            (2, 95.0, "rank 2 gives no sign of life for 95 s"),
        ),
        (
            [status([("tp", [0, 1], 90.0)]), status([("main 4", None, 80.0)])],
            (0, 80.0, "ranks wait for each other: rank 0 in tp, rank 1 in main 4"),
        ),
    ],
)
def test_which_rank_is_late(statuses, found):
    from distributed.watchdog import find_late

    assert find_late({rank: s for rank, s in enumerate(statuses) if s is not None}, len(statuses)) == found


MASTER = """import os, sys
sys.path.insert(0, {root!r})
import paddle
from distributed.watchdog import current_watchdog
watchdog, before = current_watchdog(), os.environ["PADDLE_MASTER"]
assert before == watchdog.launch.endpoints[0]
watchdog.choose_master()
store = paddle.base.core.create_or_get_global_tcp_store()  # as dist.init_parallel_env() does between accelerators
store.add("there", 1)
watchdog.barrier()
print("met:", store.add("there", 0), os.environ["PADDLE_MASTER"] != before, flush=True)
watchdog.shutdown()
os._exit(0)
"""


@pytest.mark.slow
def test_launched_by_ips_paddles_store_has_a_port_of_its_own(tmp_path):
    (tmp_path / "script.py").write_text(MASTER.format(root=str(ROOT)))
    command = [*LAUNCH, "--ips", "127.0.0.1", "--nproc_per_node", "2", "--log_dir", str(tmp_path / "log")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")], env=environment, capture_output=True, text=True, timeout=150
    )
    logs = [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in (0, 1)]
    assert done.returncode == 0 and all("met: 2 True" in log for log in logs), logs


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_launcher(base, number):
    process = start(base, "none@9", "--tensor_parallel_degree", "2", "--max_steps=100000", "--logging_steps=1")
    assert wait_until(
        lambda: (base / "out" / "metrics.jsonl").is_file() and len(logged(base)) > 2 and len(left(base)) == 3, 60
    )
    process.send_signal(number)
    begin = time.monotonic()
    assert wait_until(lambda: not left(base), 60), left(base)
    process.communicate(timeout=60)
    print(f"{number.name}: all gone after {time.monotonic() - begin:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("what", [None, "user@3", "kill@3", "early@2"])
def test_two_nodes(base, what):
    """Two launchers on this machine; a failure on the second node is shown on the first one's console."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for rank in (0, 1):
        options = ("--nnodes", "2", "--master", f"127.0.0.1:{port}", "--rank", str(rank))
        nodes.append(
            start(base, what, "--tensor_parallel_degree", "2", "--max_steps=4", options=options, name=f"node{rank}")
        )
    texts = [node.communicate(timeout=200)[0] for node in nodes]
    assert wait_until(lambda: not left(base), 5)
    codes = [node.returncode for node in nodes]
    if what is None:
        assert codes == [0, 0] and len(logged(base)) == 4, texts
        assert "data" not in texts[1] or "step 4/4" in texts[0]
        return
    wanted = {
        "user@3": "error: rank 3: the record on line 7 has no src",
        "early@2": "error: rank 2: this file cannot be read here",
        "kill@3": "error: rank 3 has vanished",
    }[what]
    assert all(codes) and wanted in texts[0], texts[0][-3000:]


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--tensor_parallel_degree", "3"], "= 3 processes, but this run has 2; give a product that divides 2"),
        (["--device", "gpu:0"], "device: 'gpu:0'"),
        (
            ["--tensor_parallel_config", "sync_parm"],
            "tensor_parallel_config: unknown option 'sync_parm'; did you mean 'sync_param'?",
        ),
    ],
)
def test_arguments_that_every_rank_refuses(base, argv, line, monkeypatch):
    """Refused before anything is connected, so that one process which believes to be one of two shows it."""
    import arguments
    import finetune
    from formats.files import UserError

    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(UserError, match=re.escape(line)):
        arguments.parse_args(finetune.Args, [str(base / "args.json"), *argv])
