"""Save step after step until killed, under Paddle's launcher: `save_loop.py FOLDER DEGREES OPTIONS`.

DEGREES: JSON of parallel.Degrees. The run goes on from the newest complete checkpoint, as the training scripts do.
FOLDER/pid-RANK is the process, FOLDER/told-RANK the last step whose checkpoint this rank knows to be written.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import kernels

import jobs_checkpoint
import paddle

import checkpoint
from distributed.watchdog import current_watchdog
from trainer import exit_status

TINY = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": False}  # fmt: skip


def main(folder, degrees, options):
    kernels.configure("cpu", "auto", False)
    run = jobs_checkpoint.Run(
        folder / "out",
        TINY,
        degrees,
        options,
        save_total_limit=1,
        resume_from_checkpoint=True,
        overwrite_output_dir=True,
    )
    rank, axes = run.topology.rank, [axis for axis in run.topology.axes if axis.size > 1]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    found = checkpoint.find_checkpoint(run.args, run.topology)
    first = checkpoint.load_checkpoint(found, run.optimizer, run.shards).step + 1 if found else 1
    for step in range(first, 100_000):
        for axis in axes:  # as a step of training would
            assert float(axis.all_reduce(paddle.ones([]))) == axis.size
        run.set(step)
        run.save(step)
        told = step - 1 if "async_save" in options else step
        (folder / f".told-{rank}").write_text(str(told))
        os.replace(folder / f".told-{rank}", folder / f"told-{rank}")


if __name__ == "__main__":
    watchdog = current_watchdog()
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3].replace("none", ""))
    except BaseException as error:
        code, line = exit_status(error, sys.argv[1])
        watchdog.abort_on_error(error, exit_code=code, message=line)
