"""Finished blocks of a run of quantize.py in its output_dir, so that a killed run goes on where it was.

    progress = Progress(args, files)                        # files: model and data, whose content must be the same
    before = progress.once("before", lambda: evaluate(…))   # computed, or as the killed run had it
    rows = progress.rows()                                  # of the report, for the finished blocks
    progress.restore(model, quantization)                   # which are put into the model
    progress.save(index, block, rows)                       # after each block
    progress.remove()                                       # when the model is written

Every file is complete or not there: written under another name, synced, renamed; a block's rows after its tensors. What
is restored are the tensors as they were in memory, and the calibration data pass through them again, so that the result
is the one of an undisturbed run, bit for bit. The folder is made when there is something to keep.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from paddle import nn

from checkpoint import lock_output_dir, remove_path, unlock_output_dir
from formats.files import UserError, atomic_file, fingerprint, read_json
from formats.tensor_files import read_safetensors, write_safetensors
from model import CausalLM, build, set_parameter

FOLDER = "tmp-quantize"
UNCOMPARED = ("output_dir", "disable_tqdm", "ddp_timeout")  # arguments that change nothing in the result


class Progress:
    """What a run has finished, in output_dir/tmp-quantize."""

    def __init__(self, args, files: Iterable[Path]):
        self.args, self.folder = args, Path(args.output_dir) / FOLDER
        values = {key: value for key, value in dataclasses.asdict(args).items() if key not in UNCOMPARED}
        contents = {str(path): fingerprint(path) for path in sorted(set(files)) if path.is_file()}
        self.facts = json.loads(json.dumps({"arguments": values, "files": contents}))
        self.started = False  # whether the folder is this run's
        if (self.folder / "run.json").is_file():
            self._check(read_json(self.folder / "run.json"))

    def _check(self, found):
        """Go on with a run of the same arguments and files; start anew if nothing is lost by it, or if told to."""
        different = _differences(found, self.facts)
        if not different:
            self.started = True
        elif self.finished_blocks() and not self.args.overwrite_output_dir:
            raise UserError(
                f"{self.folder}: {self.finished_blocks()} blocks are finished of a run with {different}; give what it "
                "had to go on, or overwrite_output_dir: true to start anew"
            )
        elif self.finished_blocks():
            print(f"{self.folder}: was of a run with {different}; starts anew")

    def start(self) -> None:
        """Make the folder this run's, and lock output_dir."""
        lock_output_dir(self.args)
        if not self.started:
            remove_path(self.folder)
            self.folder.mkdir(parents=True)
            self._write("run.json", self.facts)
            self.started = True

    def _write(self, name, value):
        with atomic_file(self.folder / name) as file:
            json.dump(value, file)

    def once(self, name: str, function: Callable) -> object:
        """function()'s value, a JSON value, kept under this name; of a run that goes on, the one kept."""
        file = self.folder / f"{name}.json"
        if not (self.started and file.is_file()):
            self.start()
            self._write(file.name, function())
        return read_json(file)

    def finished_blocks(self) -> int:
        """How many blocks, from the first on, are complete."""
        return next(i for i in range(1 << 30) if not (self.folder / f"block-{i:05d}.json").is_file())

    def save(self, index: int, block: nn.Layer, rows: list[dict]) -> None:
        """Keep a finished block (its tensors, as they are in memory) and its rows of the report."""
        self.start()
        tensors = {name: tensor.numpy() for name, tensor in block.state_dict().items()}
        write_safetensors(self.folder / f"block-{index:05d}.safetensors", tensors)
        self._write(f"block-{index:05d}.json", rows)

    def rows(self) -> list[dict]:
        """The report's rows of the finished blocks; none of a run that does not go on."""
        count = self.finished_blocks() if self.started else 0
        return [row for index in range(count) for row in read_json(self.folder / f"block-{index:05d}.json")]

    def restore(self, model: CausalLM, quantization: dict) -> None:
        """Put the finished blocks into a float model that quantization_config `quantization` says."""
        rounded, count = build(dataclasses.replace(model.config, quantization=quantization)), self.finished_blocks()
        for index in range(count):
            file = self.folder / f"block-{index:05d}.safetensors"
            places, arrays = rounded.layers[index].state_dict(), read_safetensors(file)
            if wrong := places.keys() ^ arrays.keys():
                raise UserError(f"{file}: {', '.join(sorted(wrong))}: not what this block has; remove {self.folder}")
            for name, array in arrays.items():
                set_parameter(places[name], array)
            model.layers[index] = rounded.layers[index]
        model.eval()
        print(f"{self.folder}: goes on behind {count} finished blocks", flush=True)

    @property
    def saving(self) -> bool:
        """Whether the run was killed while it wrote the model: what lies in output_dir is its own."""
        return self.started and (self.folder / "saving.json").is_file()

    def remove(self) -> None:
        remove_path(self.folder)

    def abandon(self) -> None:
        """Leave output_dir as if nothing had begun: the same arguments would end in the same error."""
        if self.started:
            self.remove()
            unlock_output_dir(self.args.output_dir)
            with contextlib.suppress(OSError):  # other files are in it
                Path(self.args.output_dir).rmdir()


def _differences(found, facts):
    """`key value, not value` of the first argument that differs, or the files that did; "" if none does."""
    for kind in ("arguments", "files"):
        for key in facts[kind].keys() | found.get(kind, {}).keys():
            was, now = (values.get(kind, {}).get(key) for values in (found, facts))
            if was != now:
                return f"{key}: {json.dumps(was)}, now {json.dumps(now)}" if kind == "arguments" else f"another {key}"
    return ""
