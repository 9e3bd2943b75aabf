"""Random kills of runs that save all the time, with save_total_limit 1: is any checkpoint lost, any process left?

    python tests/bench/bench_kills.py --kills 100 [--seed 0]      # about 20 seconds a kill; prints a table

Each run is started by Paddle's launcher and goes on from what the killed one left. SIGKILL goes to a random rank or to
the launcher, at a random moment, in every other run with async_save. After each kill: all processes must end within a
minute, the newest complete checkpoint must be at least the last one that any rank had been told of, and each complete
one must hold, byte for byte, what was saved at its step.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import paths  # noqa: F401

TESTS = Path(__file__).resolve().parents[1]

TOPOLOGIES = {
    "tp2": {"tp": 2},
    "dp2": {"dp": 2},
    "pp2": {"pp": 2},
    "sharding2 stage1": {"sharding": 2, "stage": 1},
    "sharding2 stage3": {"sharding": 2, "stage": 3},
    "tp2 sharding2": {"tp": 2, "sharding": 2, "stage": 1},
}


def start(folder, degrees, options):
    """(the launcher's process, number of ranks)."""
    world = 1
    for axis in ("tp", "dp", "pp", "sharding"):
        world *= degrees.get(axis, 1)
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(world)]
    command += ["--log_dir", str(folder / "log"), str(TESTS / "ranks" / "save_loop.py")]
    command += [str(folder), json.dumps(degrees), options or "none"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    output = open(folder / "console.txt", "w")
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT), world


def left(folder):
    """Processes that still work on this folder."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and int(name) != os.getpid():
            found.append(int(name))
    return found


def told(folder):
    return max((int(path.read_text()) for path in folder.glob("told-*")), default=0)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def kill_once(folder, name, generator, options):
    """One run and one kill: {"victim", "half": a folder was half-written, "seconds" until all were gone}."""
    for path in (*folder.glob("told-*"), *folder.glob("pid-*")):
        path.unlink()
    launcher, world = start(folder, TOPOLOGIES[name], options)
    first = {path.name for path in (folder / "out").glob("checkpoint-*")} if (folder / "out").is_dir() else set()
    ready = wait_until(
        lambda: (
            launcher.poll() is not None
            or {path.name for path in (folder / "out").glob("checkpoint-*")} - first
            and len(list(folder.glob("pid-*"))) == world
        ),
        120,
    )
    if not ready or launcher.poll() is not None:
        raise RuntimeError((folder / "console.txt").read_text()[-3000:])
    time.sleep(generator.uniform(0, 0.6))
    victim = generator.choice(["launcher", *range(world)])
    pid = launcher.pid if victim == "launcher" else int((folder / f"pid-{victim}").read_text())
    if generator.random() < 0.5:  # within a save
        wait_until(lambda: any((folder / "out").glob("tmp-checkpoint-*")), 5)
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    half = any((folder / "out").glob("tmp-checkpoint-*"))
    launcher_gone = wait_until(lambda: launcher.poll() is not None, 60)
    gone = wait_until(lambda: not left(folder), 60)
    seconds = time.monotonic() - begin
    if not gone or not launcher_gone:
        raise RuntimeError(f"left after {seconds:.0f} s: {left(folder)}")
    return {"victim": victim, "half": half, "seconds": seconds}


def kill_runs(folder, kills, seed=0):
    """Kill so many runs; {"kills", "lost", "half", "longest"}, and a Counter of (topology, victim, options)."""
    from test_checkpoint import check_saves

    generator, rows, longest, half = random.Random(seed), collections.Counter(), 0.0, 0
    for number in range(kills):
        name = list(TOPOLOGIES)[number % len(TOPOLOGIES)]
        options = "async_save" if number // len(TOPOLOGIES) % 2 else ""
        out = folder / name.replace(" ", "-")
        out.mkdir(exist_ok=True)
        found = kill_once(out, name, generator, options)
        with contextlib.redirect_stdout(io.StringIO()):
            newest = check_saves(out / "out", told(out))  # raises if anything is lost
        longest, half = max(longest, found["seconds"]), half + found["half"]
        victim = "launcher" if found["victim"] == "launcher" else "rank 0" if found["victim"] == 0 else "another rank"
        rows[name, victim, options or "blocking"] += 1
        print(f"{number + 1}/{kills} {name} {options or 'blocking'} {victim}: {found}, step {newest}", file=sys.stderr)
    return {"kills": kills, "lost": 0, "half": half, "longest": longest}, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options, folder = parser.parse_args(), Path(tempfile.mkdtemp())
    try:
        total, rows = kill_runs(folder, options.kills, options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    victims = ("launcher", "rank 0", "another rank")
    print(f"| topology | save | {' | '.join(victims)} |\n|---|---|---|---|---|")
    for name in TOPOLOGIES:
        for kind in ("blocking", "async_save"):
            print(f"| {name} | {kind} | " + " | ".join(str(rows[name, victim, kind]) for victim in victims) + " |")
    print(
        f"\n{total['kills']} kills, {total['half']} of them with a half-written folder: {total['lost']} checkpoints "
        f"lost, 0 processes left; all ended within {total['longest']:.1f} s."
    )


if __name__ == "__main__":
    main()
