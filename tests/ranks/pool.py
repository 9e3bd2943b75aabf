"""Processes that stand for the ranks of a run, for tests: started once, they do one job after another.

    with Ranks(4) as ranks:
        results = ranks.run("jobs_parallel:train", {...})        # [result of rank 0, of rank 1, …]

A job is a function of a module under tests/, called on every rank with the same arguments; process groups are kept from
one job to the next. If it raises on any rank, run() raises RuntimeError with that rank's traceback, and all are ended.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Client, Listener, wait
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


class Ranks:
    """`world` processes of `threads` compute threads each; they are started by the first run()."""

    def __init__(self, world: int, threads: int = 1):
        self.world, self.threads, self.processes, self.pipes = world, str(threads), [], []

    def start(self):
        self.listener = Listener(None, "AF_UNIX", backlog=self.world, authkey=b"ranks")
        endpoints = ",".join(f"127.0.0.1:{port}" for port in _free_ports(self.world))
        for rank in range(self.world):
            environment = {
                **os.environ,
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINERS_NUM": str(self.world),
                "PADDLE_TRAINER_ENDPOINTS": endpoints,
                "PADDLE_LOCAL_SIZE": str(self.world),
                "OMP_NUM_THREADS": self.threads,
                "MKL_NUM_THREADS": self.threads,
            }
            command = [sys.executable, __file__, self.listener.address]
            self.processes.append(subprocess.Popen(command, env=environment, cwd=TESTS.parent))
        pipes = [self.listener.accept() for _ in range(self.world)]
        self.pipes = [pipe for _, pipe in sorted(((pipe.recv(), pipe) for pipe in pipes), key=lambda entry: entry[0])]

    def run(self, job, *args, timeout=300, **kwargs):
        """[what the job "module:function" returns on each rank]; RuntimeError with the traceback of every rank that has
        one."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((job, args, kwargs))
        answers, end = {}, time.monotonic() + timeout
        while len(answers) < self.world and time.monotonic() < end:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            for pipe in wait(waiting, timeout=1.0):
                try:
                    answers[self.pipes.index(pipe)] = pipe.recv()
                except EOFError:
                    answers[self.pipes.index(pipe)] = False, "it ended"
            if any(not succeeded for succeeded, _ in answers.values()):
                end = min(end, time.monotonic() + 5.0)  # the others wait for it; some have a reason of their own
        answers = [answers.get(rank, (False, f"no answer within {timeout} s")) for rank in range(self.world)]
        if errors := [f"rank {rank}: {text}" for rank, (succeeded, text) in enumerate(answers) if not succeeded]:
            self.stop()  # their connections may be broken
            raise RuntimeError("\n".join(errors))
        return [result for _, result in answers]

    def stop(self):
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)  # else one would report that another is gone
        for process in self.processes:
            process.kill()
            process.wait()
        if self.processes:
            self.listener.close()
        self.processes, self.pipes = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def serve(address):
    """One rank: do jobs until the test process is gone."""
    sys.path[:0] = [str(TESTS.parent), str(TESTS), *(str(TESTS / name) for name in ("golden", "ranks", "bench"))]
    with Client(address, authkey=b"ranks") as pipe:
        pipe.send(int(os.environ["PADDLE_TRAINER_ID"]))
        while True:
            try:
                job, args, kwargs = pipe.recv()
            except EOFError:
                return
            module, _, name = job.partition(":")
            try:
                pipe.send((True, getattr(importlib.import_module(module), name)(*args, **kwargs)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))


if __name__ == "__main__":
    serve(sys.argv[1])
