"""A script in which one rank fails: `launched.py SCRIPT WHAT@RANK ARGUMENTS…`, for tests/test_distributed.py.

WHAT happens after the second step of that rank: it raises (user, bug), dies (kill, exit, leave), stops or hangs; "slow"
and "pause" go on after 36 seconds. "early" fails before arguments are read; KEY=VALUE gives the rank another argument,
config:KEY=VALUE another key of the model's configuration, "code" other scripts.
"""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import parallel
import trainer
from formats.files import UserError

script, (what, _, rank) = importlib.import_module(sys.argv[1]), sys.argv[2].partition("@")
if os.environ.get("PADDLE_TRAINER_ID", "0") == rank:
    step, versions, build = trainer.Log.step, parallel._versions, parallel.build

    def after(log, state, *args, **kwargs):
        step(log, state, *args, **kwargs)
        if state.step == 2:
            if what == "user":
                raise UserError("the record on line 7 has no src")
            if what == "bug":
                raise ZeroDivisionError("division by zero")
            if what in ("kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
            if what == "leave":
                sys.exit(0)
            if what == "exit":
                os._exit(0)
            if what in ("hang", "slow"):
                time.sleep(1000 if what == "hang" else 36)
            if what == "pause":
                subprocess.Popen(["sh", "-c", f"sleep 36; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)

    def early(*args):
        raise UserError("this file cannot be read here")

    trainer.Log.step = after
    if what == "early":
        trainer.parse_args = early
    elif what == "code":
        parallel._versions = lambda: {**versions(), "model.py": "another"}
    elif what.startswith("config:"):
        key, _, value = what[7:].partition("=")
        parallel.build = lambda config, *args: build(
            dataclasses.replace(config, **{key: type(getattr(config, key))(value)}), *args
        )
    elif "=" in what:
        sys.argv.append(f"--{what}")
sys.argv[1:] = sys.argv[3:]
trainer.run_script(script.main, script.Args)
