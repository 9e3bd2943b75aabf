"""Unified Checkpoint: save, verify and resume on any topology.

    checkpoints = CheckpointManager(args, model, tokenizer, optimizer=optimizer, shards=shards, topology=topology)
    checkpoints.save(state)    # output_dir/checkpoint-120; with async_save it returns once the state is copied
    checkpoints.wait()         # at the end of a run: wait for the last save, raise its error
    checkpoints.write_model(folder, dtype="bfloat16")

    path = find_checkpoint(args, topology)             # resume_from_checkpoint: a path, or true for the newest
    load_trained(model, path, args)                    # weights (adapters: adapters.load_adapter)
    state = load_checkpoint(path, optimizer, shards)   # moments and TrainState

Layout of a checkpoint, which Hugging Face's tools open as a model's folder, and peft as an adapter's:

    checkpoint-120/
        config.json, tokenizer.json, …
        model.safetensors             full float32 weights; in a bf16 run rounded to bfloat16, for use
        master_weights-*.safetensors  bf16 runs only: the float32 weights that training goes on from
        adapter_config.json, adapter_model.safetensors     LoRA and prefix tuning, in place of model and config
        optimizer-*.safetensors       "NAME/moment1_0", "NAME/moment2_0", "NAME/beta1_pow_acc_0", … of each weight
        ema, value, value_optimizer   *.safetensors of rl.py: alignment/moving_weights.py, alignment/critic.py
        reference-*.safetensors       dpo.py's reference, where it moves: alignment/moving_weights.py
        *.safetensors.index.json      which file has which tensor, where a group of tensors has several files
        trainer_state.json            TrainState, arguments, topology; size and checksum of every file
        .checkpoint_done              completion marker, written last: the checksum of trainer_state.json

Who writes what: distributed/shard_files.py. Each tensor is written by one rank, from parts that other ranks hand to it
in one file each. Ranks tell each other by three messages how far they are, and if one has failed; no collective is
needed, so everything after the copy can run in a thread behind training. Rank 0 waits for all, writes the indexes,
trainer_state.json and the marker, and renames the folder.

Resume on another topology. Because stored tensors are full and named as Hugging Face names them, whatever wrote them,
each rank reads the rows and columns that it holds under the new topology (Weight.read) and nothing else.
"""

import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import kernels

import numpy as np
from tqdm import tqdm

from adapters import adapter_files
from data import parse_blend
from distributed.run_lock import LOCK, RunLock
from distributed.shard_files import CheckpointShardWriter, SaveLayout, assign_writers, entries_of, layout_digest
from distributed.watchdog import current_watchdog
from formats.files import UserError, _disk_full, _sync, atomic_file, crc32_of, fingerprint
from formats.quantized_moments import MAX_QUANTIZATION_TIMES, MOMENT_BITS, dequantize_4, dequantize_8
from formats.tensor_files import StoredTensor, read_safetensors, write_safetensors
from formats.weights import (
    MASTER_WEIGHTS,
    MODEL_FILES,
    SaveEntry,
    SaveSource,
    Weight,
    load_weights,
    stored_tensors,
    weights_to_save,
)
from model import CausalLM
from parallel import NAMES, SINGLE, Degrees, Topology

DONE = ".checkpoint_done"


@dataclasses.dataclass
class TrainState:
    """Where a run stands; all of it is in trainer_state.json."""

    step: int = 0  # steps made; also says which batch comes next (micro_batches)
    epoch: float = 0.0  # step / steps of an epoch
    consumed_tokens: int = 0  # real input tokens so far
    best_metric: float | None = None  # of metric_for_best_model
    best_checkpoint: str | None = None  # "checkpoint-120", a folder of output_dir
    early_stopping_best: float | None = None  # of metric_for_best_model, over all evaluations
    early_stopping_counter: int = 0  # evaluations in a row that were not better by early_stopping_threshold
    reward_mean: float = 0.0  # of the pairs of all steps so far, each step counting once: dpo.py's bco_shift
    log_history: list = dataclasses.field(default_factory=list)  # the last 20 log lines


@dataclasses.dataclass
class SavePlan:
    """What one folder will hold."""

    groups: dict[str, list[SaveEntry]]  # "model", "optimizer", "adapter_model", …: what this rank holds of each
    metadata: dict[str, dict]  # {group: key-value pairs of its safetensors files}
    write_sidecar_files: Callable[[Path], None]  # configuration and tokenizer, into a folder; rank 0 calls it
    index: dict[str, dict] = dataclasses.field(default_factory=dict)  # {group: further keys of its index file}


# ============================================================================================ saving, for scripts


class CheckpointManager:
    """The saves of a run: output_dir/checkpoint-STEP, complete or not there, written by all ranks together.

    output_dir must be one folder for all processes. A full disk is a UserError: half-written files are removed, earlier
    checkpoints stay. save_total_limit counts the newest and the best checkpoint, but never removes either of them: 1
    keeps two as soon as they differ, which is said once.
    """

    def __init__(self, args, model, tokenizer, *, optimizer=None, shards=None, topology: Topology = SINGLE):
        self.args, self.model, self.tokenizer, self.topology = args, model, tokenizer, topology
        self.optimizer, self.shards = optimizer, shards
        self.has_adapter = getattr(args, "lora", False) or getattr(args, "prefix_tuning", False)
        self.options = getattr(args, "unified_checkpoint_config", None) or ()
        self.bf16_weights = kernels.bf16 and not self.has_adapter  # rounded, for use, beside float32 ones for resuming
        self.save_master_weights = self.bf16_weights and "remove_master_weight" not in self.options
        self.moment_bits = MOMENT_BITS[args.ckpt_quant_stage]
        self.pending: CheckpointWriter | None = None  # the save that is being written
        self.last_step: int | None = None  # of the last save, pending or not
        self.buffers = {} if "async_save" in self.options else None  # host copies of what is being written
        self.layout: SaveLayout | None = None  # of the last save
        self.further = []  # what else checkpoints hold: objects with groups(), as SavePlan has them
        self.data = data_fingerprints(args) if topology.rank == 0 else {}  # now: it may be edited during the run
        self.said_limit = False
        if "skip_save_model_weight" in self.options and not self.save_master_weights:
            self._print(
                "skip_save_model_weight is ignored: no master weights are saved that could stand for the weights"
            )
        if self.moment_bits < 32 and getattr(optimizer, "requantized", 0) >= MAX_QUANTIZATION_TIMES:
            self._print(
                f"ckpt_quant_stage: {args.ckpt_quant_stage} is ignored: the moments come from a quantized checkpoint; "
                "to quantize them again would lose more"
            )
            self.moment_bits = 32
        if self.buffers is not None:
            # Allocate and touch the buffers before training, so that the first save stalls no longer than later ones.
            plan = self._training_plan()
            self.layout = SaveLayout(entries_of(plan.groups), topology)
            CheckpointShardWriter(plan.groups, plan.metadata, topology, self.layout, buffers=self.buffers)

    def _print(self, text: str) -> None:
        if self.topology.rank == 0:
            tqdm.write(text)  # does not tear a progress bar

    def save(self, state: TrainState) -> Path:
        """Write checkpoint-STEP, then prune; all ranks call it at the same step. Raises the last async save's error."""
        self.wait()
        args, output_dir = self.args, Path(self.args.output_dir)
        final, best, plan = output_dir / f"checkpoint-{state.step}", state.best_checkpoint, self._training_plan()
        record = {
            **dataclasses.asdict(state),
            "optimizer_steps": self.optimizer.steps if self.optimizer is not None else 0,
            "data_position": {"epoch": int(state.epoch), "next_step": state.step, "seed": args.seed},
            "weights": "rounded" if self.bf16_weights and not self.save_master_weights else "exact",
            "degrees": dataclasses.asdict(self.topology.degrees),
            "data": self.data,
            "args": dataclasses.asdict(args),
        }

        def commit(temporary: Path, files: dict) -> None:
            if lock := RunLock.held.get(output_dir.resolve() / LOCK):
                lock.check()
            _mark_complete(temporary, files, record)
            replace_checkpoint(temporary, final)
            if reason := incomplete(final):  # what was written is not there: keep all others
                self._print(f"{final}: {reason}; earlier checkpoints are kept")
            else:
                prune_checkpoints(output_dir, args.save_total_limit, best, final.name)

        if args.save_total_limit == 1 and best not in (None, final.name) and not self.said_limit:
            self._print(f"save_total_limit: 1 keeps two checkpoints: the last one and the best one, {best}")
            self.said_limit = True
        writer = CheckpointWriter(
            output_dir / f"tmp-checkpoint-{state.step}",
            final,
            plan,
            commit=commit,
            topology=self.topology,
            on_failure="this checkpoint was not written, earlier ones are intact",
        )
        self.last_step, self.pending = state.step, writer
        self.layout = writer.start(self.layout, self.buffers)
        if self.buffers is None:
            self.wait()
        return final

    def wait(self) -> None:
        """Wait for the pending save; re-raise its error."""
        writer, self.pending = self.pending, None
        if writer is not None:
            writer.finish()

    def has(self, step: int) -> bool:
        """Whether there is, or will be, a checkpoint of this step."""
        return step == self.last_step or (Path(self.args.output_dir) / f"checkpoint-{step}").is_dir()

    def write_model(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write the model or adapter for use, into a folder that may hold other things; the configuration last."""
        self.wait()
        folder, plan = Path(folder), self.tensors_to_save(dtype)

        def commit(temporary: Path, files: dict) -> None:
            new = [path.name for path in temporary.iterdir() if not path.name.startswith(".")]
            if not self.has_adapter:  # weight files of a run on another topology
                for path in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
                    if path.name not in new:
                        path.unlink(missing_ok=True)
            for name in sorted(new, key=lambda name: name in ("config.json", "adapter_config.json")):
                os.replace(temporary / name, folder / name)
            shutil.rmtree(temporary)
            _sync(folder)

        writer = CheckpointWriter(
            folder / "tmp-model",
            folder,
            plan,
            commit=commit,
            topology=self.topology,
            on_failure="the model was not written, checkpoints are intact",
        )
        writer.start()
        writer.finish()
        unlock_output_dir(folder)  # the last write of a run

    def tensors_to_save(self, dtype: str | None = None) -> SavePlan:
        """The model or adapter. dtype: of a model that is written for use; None: what a checkpoint holds."""
        model = self.model
        if self.has_adapter:
            with self.shards.present("prefix") if self.shards is not None else contextlib.nullcontext():
                config, files = adapter_files(model, self.args.model_name_or_path)
            groups = {name.removesuffix(".safetensors"): file.entries for name, file in files.items()}
            metadata = {name.removesuffix(".safetensors"): file.metadata for name, file in files.items()}
            config_name, text = "adapter_config.json", json.dumps(config, indent=2)
        else:
            weights, groups, metadata = weights_to_save(model), {}, {}
            weights_dtype = dtype or ("bfloat16" if self.bf16_weights else "float32")
            if dtype or not (self.save_master_weights and "skip_save_model_weight" in self.options):
                groups["model"] = [SaveEntry.of(weight, weights_dtype) for weight in weights]
            if self.save_master_weights and not dtype:
                groups["master_weights"] = [SaveEntry.of(weight) for weight in weights]
            config_name, text = "config.json", model.config.to_json(weights_dtype)
        if self.shards is not None:
            groups = {group: [self._local(entry) for entry in entries] for group, entries in groups.items()}

        def write_sidecar_files(folder: Path) -> None:
            self.tokenizer.save(folder)
            with atomic_file(folder / config_name) as file:
                file.write(text)

        return SavePlan(groups, metadata, write_sidecar_files)

    def _training_plan(self) -> SavePlan:
        """The model or adapter, and the optimizer's state."""
        plan = self.tensors_to_save()
        if self.optimizer is not None and not self.args.ignore_save_lr_and_optim:
            plan.groups["optimizer"] = self.optimizer.entries(self.shards, self.moment_bits)
            plan.index["optimizer"] = {
                "master_weights": self.save_master_weights,
                "ckpt_quant_stage": self.args.ckpt_quant_stage if self.moment_bits < 32 else "O0",
                "quant_ckpt_resume_times": getattr(self.optimizer, "requantized", 0),
            }
        for state in self.further:
            plan.groups |= state.groups()
        return plan

    def _local(self, entry: SaveEntry) -> SaveEntry:
        """The entry with its parameters replaced by what this rank holds of them under ZeRO stage 3."""
        sources = [
            SaveSource(source.weight, *self.shards.held(source.weight))
            if source.tensor is source.weight.parameter
            else source
            for source in entry.sources
        ]
        return dataclasses.replace(entry, sources=sources)


# ============================================================================================ one folder, all ranks


class CheckpointWriter:
    """Writes one folder: every rank its tensor files into `temporary`, then rank 0 adds the rest and commits.

    commit(temporary, {file: {"size", "crc32"}}) moves it to `final`. Ranks tell each other by messages that they are
    done or have failed, never by files: a disk that takes no file more must not keep the others waiting. on_failure:
    what a message says of the state that a failure leaves behind. layout: of an earlier save of the same tensors.
    """

    def __init__(self, temporary: Path, final: Path, plan: SavePlan, *, commit, topology: Topology, on_failure: str):
        self.temporary, self.final, self.plan, self.commit = temporary, final, plan, commit
        self.topology, self.on_failure = topology, on_failure
        self.parts = temporary.with_name(f"{temporary.name}-parts")
        self.thread, self.error, self.failure = None, None, None

    def start(self, layout: SaveLayout | None = None, buffers: dict | None = None) -> SaveLayout:
        """buffers: the state is copied into them and the rest runs in a thread; None: all is done when it returns."""
        topology, failure = self.topology, None
        if topology.rank == 0:
            try:
                self.temporary.parent.mkdir(parents=True, exist_ok=True)
                for left_over in {*self.temporary.parent.glob("tmp-checkpoint-*"), self.temporary, self.parts}:
                    if left_over.exists():
                        shutil.rmtree(left_over)
                self.temporary.mkdir()
                self.parts.mkdir()
            except OSError as error:
                failure = self._message(error)
        if failure := topology.all_gather_object(failure, "first"):
            self._clean()
            raise UserError(failure)
        unseen = None if self.parts.is_dir() else topology.rank
        if (rank := topology.all_gather_object(unseen, "first")) is not None:
            raise UserError(f"{self.final}: rank {rank} does not see it; all processes need one output_dir")
        try:
            entries = entries_of(self.plan.groups)
            changed = 1 if layout is None or layout.digest != layout_digest(entries) else None
            if topology.all_gather_object(changed, "first"):
                layout = SaveLayout(entries, topology)
            self.shard_writer = CheckpointShardWriter(
                self.plan.groups, self.plan.metadata, topology, layout, buffers=buffers, progress=topology.moved
            )
        except BaseException:
            self._clean()
            raise
        if buffers is None:
            try:
                self._run()
            except BaseException:  # interrupted: so are the others
                self._clean()
                raise
        else:
            # Not a daemon: a run that ends by an error still completes the checkpoint that it has started.
            self.thread = threading.Thread(target=self._run, name="checkpoint")
            self.thread.start()
        return layout

    def _run(self) -> None:
        """Three messages of all ranks: the parts are written, the files are written, the folder is committed."""
        gather, rank = functools.partial(self.topology.all_gather_object, channel="save"), self.topology.rank
        _, failure = self._try(self.shard_writer.send_parts, self.parts)
        failure = gather(failure, "first")
        if failure is None:
            answer = gather(self._try(self.shard_writer.write, self.temporary, self.parts), "root")
            if rank == 0:
                failure = next((text for _, text in answer if text), None)
                if failure is None:
                    _, failure = self._try(self._complete, [report for report, _ in answer])
            failure = gather(failure, "first")
        self.failure = failure
        if failure is not None:
            self._clean()

    def _try(self, function: Callable, *args) -> tuple[object, str | None]:
        """(result of function(*args), None) or (None, the message of its error)."""
        try:
            return function(*args), None
        except Exception as error:  # any: the other ranks wait for this one's message; finish() raises a bug again
            self.error = error
            return None, self._message(error)

    def _complete(self, reports: list[dict]) -> None:
        self.plan.write_sidecar_files(self.temporary)
        self.commit(self.temporary, _index_files(self.temporary, reports, self.plan))
        shutil.rmtree(self.parts, ignore_errors=True)

    def _clean(self) -> None:
        if self.topology.rank == 0:
            for folder in (self.temporary, self.parts):
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Wait until it is committed; an error on any rank is raised on all."""
        if self.thread is not None:
            self.thread.join()
        if self.failure is not None:
            if self.error is not None and not isinstance(self.error, (OSError, UserError)):
                raise self.error  # a bug, with its traceback
            raise UserError(self.failure) from None

    def _message(self, error: BaseException) -> str:
        if _disk_full(error):
            with contextlib.suppress(OSError):
                usage, left = shutil.disk_usage(self.temporary.parent), os.statvfs(self.temporary.parent)
                free = f"{usage.free / 1e6:.1f} MB free" + ("" if left.f_favail else ", but no inodes for more files")
                return f"{self.final}: the disk is full ({free}); {self.on_failure}; free some space, then resume"
        if isinstance(error, UserError):
            return str(error)
        if isinstance(error, OSError):
            return f"{self.final}: cannot be written: {error.strerror or error}; {self.on_failure}; then resume"
        return f"{self.final}: rank {self.topology.rank}: {type(error).__name__}: {error}"


def _index_files(folder: Path, reports: list[dict], plan: SavePlan) -> dict[str, dict]:
    """Write the indexes of all ranks' files; {name: {"size", "crc32"}} of all in the folder, which are on the disk.

    reports: of CheckpointShardWriter.write on each rank.
    """
    files = {}
    for group in sorted({group for report in reports for group in report}):
        parts = [part for report in reports for part in report.get(group, {}).items()]
        if parts[0][0].startswith("."):  # one per pipeline stage
            tensors = {name: array for part, _ in parts for name, array in read_safetensors(folder / part).items()}
            written = write_safetensors(folder / f"{group}.safetensors", tensors, plan.metadata.get(group))
            for part, _ in parts:
                (folder / part).unlink()
            parts = [(f"{group}.safetensors", written)]
        weight_map, total = {}, 0
        for name, written in parts:
            files[name] = {key: written[key] for key in ("size", "crc32")}
            for tensor, size in written.get("tensors", {}).items():
                weight_map[tensor], total = name, total + size
        if parts[0][0] != f"{group}.safetensors":
            content = {
                "metadata": {"total_size": total},
                **plan.index.get(group, {}),
                "weight_map": dict(sorted(weight_map.items())),
            }
            with atomic_file(folder / f"{group}.safetensors.index.json") as file:
                json.dump(content, file, indent=1)
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path.name not in files:
            _sync(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "crc32": crc32_of(path)}
    return files


def _mark_complete(folder: Path, files: dict[str, dict], record: dict) -> None:
    """Write trainer_state.json, then the marker, each after all that it stands for is on the disk."""
    with atomic_file(folder / "trainer_state.json") as file:
        json.dump({**record, "files": files}, file, indent=1, ensure_ascii=False)
    _sync(folder)
    (folder / DONE).write_text(str(crc32_of(folder / "trainer_state.json")))
    _sync(folder / DONE)
    _sync(folder)


# ====================================================================================== the checkpoints of output_dir


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders named checkpoint-STEP, newest first, complete or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def prune_checkpoints(
    output_dir: str | Path, limit: int | None, best: str | None = None, saved: str | None = None
) -> None:
    """Remove the oldest complete checkpoints beyond `limit`.

    saved: the folder's name of the one that has just been written and verified; None: the newest complete one. It
    stays, and so does the best (a folder's name); both are counted. Incomplete folders are not counted, so that they
    never take the place of a good one. Checkpoints of later steps are of another attempt, which this run did not resume
    from: they are neither counted nor removed.
    """
    if saved is None:
        saved = next((path.name for path in list_checkpoints(output_dir) if incomplete(path) is None), None)
    if not limit or limit < 1 or saved is None:
        return
    step = int(saved.rpartition("-")[2])
    earlier = [path for path in list_checkpoints(output_dir) if int(path.name[11:]) <= step]
    keep = {path.name for path in earlier if path.name in (saved, best and Path(best).name)}
    remove = []
    for path in earlier:  # newest first
        if path.name not in keep and len(keep) < limit and incomplete(path) is None:
            keep.add(path.name)
        elif path.name not in keep and len(keep) >= limit:
            remove.append(path)
    for path in reversed(remove):
        remove_path(path)


def replace_checkpoint(temporary: Path, final: Path) -> None:
    """Rename a complete folder; what had its name is removed after that (a step made again after resuming)."""
    old = final.with_name(f"tmp-{final.name}-old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _sync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def recover_checkpoints(output_dir: str | Path) -> list[str]:
    """Give folders their names that a killed run had completed, and not yet renamed; returns lines that say so."""
    lines = []
    for temporary in sorted(Path(output_dir).glob("tmp-checkpoint-*")):
        final = temporary.with_name(temporary.name.removeprefix("tmp-").removesuffix("-old"))
        if re.fullmatch(r"checkpoint-\d+", final.name) and not final.exists() and incomplete(temporary) is None:
            temporary.rename(final)
            lines.append(f"resume: {final} was complete, but its run was killed before it got its name")
    return lines


def remove_path(path: Path) -> None:
    """Remove a file or folder; a checkpoint loses its marker first, so that what is left of it never looks complete."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / DONE).unlink(missing_ok=True)
    if re.fullmatch(r"checkpoint-\d+", path.name):
        path = path.rename(path.with_name(f"tmp-{path.name}-old"))
    shutil.rmtree(path)


def incomplete(path: str | Path) -> str | None:
    """What a checkpoint lacks, by marker, checksum of trainer_state.json and file sizes; None: it is complete."""
    path = Path(path)
    try:
        marked = (path / DONE).read_bytes().strip()
    except OSError:
        return "it has no completion marker"
    state = path / "trainer_state.json"
    try:
        files = dict(json.loads(state.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json is missing or damaged"
    if not marked.isdigit():
        return f"{DONE} is damaged: it holds no checksum"
    if int(marked) != crc32_of(state):
        return "trainer_state.json is damaged: its checksum differs"
    for name, written in files.items():
        wanted = written["size"] if isinstance(written, dict) else written  # a number: saved before checksums were
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != wanted:
            return f"{name} is missing" if size is None else f"{name} has {size} bytes, {wanted} were written"
    return None


def damaged(path: str | Path, topology: Topology = SINGLE) -> str | None:
    """Which file of a complete checkpoint differs from what was written; ranks share the reading."""
    files = json.loads((Path(path) / "trainer_state.json").read_text(encoding="utf-8"))["files"]
    files = {name: written for name, written in files.items() if isinstance(written, dict)}
    read = checksums(path, {name: written["size"] for name, written in files.items()}, topology)
    wrong = sorted(name for name, written in files.items() if read[name] != written["crc32"])
    return f"{wrong[0]} is damaged: its checksum differs from what was written" if wrong else None


def checksums(folder: str | Path, sizes: dict[str, int], topology: Topology) -> dict[str, int | None]:
    """{name: crc32} of the files {name: bytes} of a folder, on every rank; ranks share the reading by bytes."""
    readers = assign_writers(sizes, dict.fromkeys(sizes, range(topology.degrees.world)))
    local = {name: crc32_of(Path(folder) / name) for name, rank in readers.items() if rank == topology.rank}
    return {name: checksum for part in topology.all_gather_object(local) for name, checksum in part.items()}


# =========================================================================================================== resuming


def lock_output_dir(args: object, topology: Topology = SINGLE) -> None:
    """From here on no other run may write to output_dir, until unlock_output_dir(). UserError that names the run which
    does. Only rank 0 looks; a run that does not train needs no lock."""
    if topology.rank or not args.output_dir or not getattr(args, "do_train", True):
        return
    try:
        lock = RunLock.take(args.output_dir)
        if (watchdog := current_watchdog()) is not None:
            watchdog.at_exit.append(lock.release)
    except OSError as error:
        raise UserError(f"output_dir: {args.output_dir} cannot be written to: {error.strerror}") from None


def unlock_output_dir(folder: str | Path) -> None:
    """The end of what lock_output_dir began; nothing where this process holds no lock of the folder."""
    if lock := RunLock.held.get(Path(folder).resolve() / LOCK):
        lock.release()


def find_checkpoint(args: object, topology: Topology = SINGLE) -> Path | None:
    """The checkpoint that resume_from_checkpoint means: a path (UserError unless complete), or true: the newest
    complete one.

    None if there is none. Complete: every file has the size and the checksum that it was written with. Prints which it
    is, which were passed over, and which arguments have changed since. All ranks get the same answer.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    lock_output_dir(args, topology)  # before anything in there is looked at
    path, lines = _check_given(Path(wanted), args, topology) if isinstance(wanted, str) else _newest(args, topology)
    if path is not None:
        lines.append(f"resume: from {path}{_describe_changes(path, args, topology)}")
    for line in lines if topology.rank == 0 else ():
        print(line, flush=True)
    return path


def _check_given(path: Path, args, topology: Topology) -> tuple[Path, list[str]]:
    reason = "there is no such folder" if not path.is_dir() else incomplete(path) if topology.rank == 0 else None
    if reason := topology.all_gather_object(reason, "first") or damaged(path, topology):
        raise UserError(f"resume_from_checkpoint: {path}: {reason}; give a complete one, or true for the newest")
    step = _read_state(path)["step"]
    later = [other for other in list_checkpoints(args.output_dir) if int(other.name[11:]) > step]
    if args.save_total_limit and later:  # pruning goes by step, so what this run saves would be removed first
        raise UserError(
            f"resume_from_checkpoint: {path}: output_dir also holds the later {later[0].name}, and save_total_limit "
            "keeps the latest steps; remove it, or go on in another output_dir"
        )
    return path, []


def _newest(args, topology: Topology) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint of output_dir or None, lines about the others); rank 0 lists them for all."""
    lines, candidates = [], None
    if topology.rank == 0:
        lines = recover_checkpoints(args.output_dir)
        candidates = [(str(path), incomplete(path)) for path in list_checkpoints(args.output_dir)]
    for path, reason in topology.all_gather_object(candidates, "first"):
        if (reason := reason or damaged(path, topology)) is None:
            return Path(path), lines
        lines.append(f"resume: {path} is passed over: {reason}")
    return None, [*lines, f"resume: no complete checkpoint in {args.output_dir}; starting at step 0"]


def _read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def saved_arguments(checkpoint: Path) -> dict:
    """{key: value} of the arguments of the run that wrote a checkpoint."""
    return _read_state(checkpoint)["args"]


# Arguments that change no training step.
HARMLESS_CHANGES = {
    *"resume_from_checkpoint overwrite_output_dir output_dir disable_tqdm logging_dir logging_steps".split(),
    *"logging_first_step report_to save_strategy save_steps save_total_limit unified_checkpoint".split(),
    *"unified_checkpoint_config evaluation_strategy eval_steps max_evaluate_steps sharding virtual_pp_degree".split(),
    *"run_name early_stopping_patience early_stopping_threshold".split(),
    *"sequence_parallel hybrid_parallel_topo_order gradient_accumulation_steps".split(),
    "ddp_timeout",
    *(f"{name}_parallel_degree" for name in NAMES.values()),
}


def _describe_changes(path: Path, args, topology: Topology) -> str:
    """What changed since the checkpoint: the topology (harmless), and arguments (no exact continuation)."""
    saved = _read_state(path)
    old_args, old_degrees = saved["args"], Degrees(**saved.get("degrees", {}))
    changed = [
        f"{key} {old_args[key]!r} -> {value!r}"
        for key, value in dataclasses.asdict(args).items()
        if key in old_args and key not in HARMLESS_CHANGES and old_args[key] != value
    ]
    before = old_args["gradient_accumulation_steps"] * old_degrees.dp * old_degrees.sharding
    if before != (now := args.gradient_accumulation_steps * topology.data_size):
        changed.append(f"micro-batches of a step {before} -> {now}")
    changed += changed_data(saved.get("data") or {}, data_fingerprints(args)) if topology.rank == 0 else []
    text = "" if str(old_degrees) == str(topology.degrees) else f"; {old_degrees} -> {topology.degrees}"
    return text + (f"; not an exact continuation, changed: {', '.join(changed)}" if changed else "")


def data_fingerprints(args: object) -> dict[str, list]:
    """{name of a training file, from its key on: [size, hash]}; {} of arguments without data."""
    files = {}
    for key in ("dataset_name_or_path", "train_dataset_path"):
        path = Path(getattr(args, key, None) or "")
        if path.is_dir() and getattr(args, key, None):
            found = [file for file in sorted(path.rglob("*")) if file.is_file()]
            train = [file for file in found if file.relative_to(path).parts[0].startswith("train")]
            files |= {f"{key}/{file.relative_to(path)}": file for file in train or found}
        elif path.is_file():
            files[f"{key}/{path.name}"] = path
    if getattr(args, "input_dir", None):
        for _, prefix in parse_blend(args.input_dir):
            for file in sorted(Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}[._]*")):
                files[f"input_dir/{file.name}"] = file
    return {name: fingerprint(path) for name, path in files.items()}


def changed_data(before: dict[str, list], now: dict[str, list]) -> list[str]:
    """What changed in the training files between two data_fingerprints(); [] where one of them is {}."""
    lines = []
    for name in sorted({**before, **now}) if before and now else ():
        old, new = (side.get(name, ("no file", "")) for side in (before, now))
        if tuple(old) != tuple(new):
            sizes = f"{old[0]} -> {new[0]}" + " bytes" * (name in before and name in now)
            lines.append(f"data {name}: {'its content, size unchanged' if old[0] == new[0] else sizes}")
    return lines


def load_trained(model: CausalLM, path: str | Path, args: object) -> None:
    """Load the float32 weights of a checkpoint of full training into the model: its master weights, if it has any."""
    path = Path(path)
    if _read_state(path).get("weights") == "rounded":
        if not {"remove_master_weight", "master_weight_compatible"} & set(args.unified_checkpoint_config or ()):
            raise UserError(
                f"{path}: has bfloat16 weights and no master weights; unified_checkpoint_config: "
                "master_weight_compatible goes on from the rounded ones"
            )
        if getattr(model, "topology", SINGLE).rank == 0:
            print(
                f"resume: {path} has no master weights: from bfloat16 weights it is not an exact continuation",
                flush=True,
            )
    has_master_weights = (path / f"{MASTER_WEIGHTS}.index.json").is_file()
    load_weights(model, path, (MASTER_WEIGHTS,) if has_master_weights else MODEL_FILES, trust_index=True)


def load_checkpoint(
    path: str | Path, optimizer: object = None, shards: object = None, output_dir: str | Path | None = None
) -> TrainState:
    """TrainState of a checkpoint, and its moments into `optimizer` (None: ignore_load_lr_and_optim); no weights.

    Each rank reads what it holds of the moments, whatever topology wrote them. A best checkpoint that is not in
    output_dir (default: the folder that holds `path`) is forgotten, as it could not be loaded at the end.
    """
    path = Path(path)
    saved = _read_state(path)
    if optimizer is not None:
        index_path = path / "optimizer.safetensors.index.json"
        if not index_path.is_file():
            raise UserError(f"{path}: was saved without optimizer state; resume with ignore_load_lr_and_optim: true")
        optimizer.load(stored_tensors(path, ("optimizer.safetensors",), trust_index=True), shards)
        optimizer.steps, index = saved["optimizer_steps"], json.loads(index_path.read_text())
        was_quantized = index.get("ckpt_quant_stage", "O0") != "O0"
        optimizer.requantized = index.get("quant_ckpt_resume_times", 0) + was_quantized
    names = [field.name for field in dataclasses.fields(TrainState)]
    state = TrainState(**{name: saved[name] for name in names if name in saved})
    if state.best_checkpoint and not (Path(output_dir or path.parent) / state.best_checkpoint).is_dir():
        state.best_metric = state.best_checkpoint = None
    return state


def update_best(args: object, state: TrainState, metrics: dict[str, float], checkpoints: CheckpointManager) -> bool:
    """Note in `state` that checkpoint-{state.step} is the best so far, if `metrics` say so; returns whether they do.

    An evaluation at a step that was not saved does not count: there would be nothing to go back to.
    """
    name = f"eval_{args.metric_for_best_model}"
    if name not in metrics:
        raise UserError(f"metric_for_best_model: {name} is not computed here; there are {', '.join(metrics)}")
    value, best = metrics[name], state.best_metric
    saved = checkpoints.has(state.step)
    better = best is None or (value > best if args.greater_is_better else value < best)
    if not (saved and better and math.isfinite(value)):
        return False
    state.best_metric, state.best_checkpoint = value, f"checkpoint-{state.step}"
    return True


def read_moments(weight: Weight, tensors: dict[str, StoredTensor], extent: tuple[int, int] | None) -> list[np.ndarray]:
    """Both moments of this rank's shard of a weight, in our layout; extent: only flat elements [first, last) of it."""
    names = [f"{weight.name}/moment{i}_0" for i in (1, 2)]
    scale_names = [f"{names[0]}@scales", f"{names[1]}@min_scales", f"{names[1]}@max_scales"]
    quantized = scale_names[0] in tensors
    for name in names[:1] if quantized else names:
        if name not in tensors:
            raise UserError(f"the optimizer state is of other weights: missing {name}; unexpected none")
        if (shape := list(tensors[name].shape)) != weight.shape:
            raise UserError(f"optimizer state: {weight.name}: {shape} found, {weight.shape} needed")
    if not quantized:
        return [weight.read(tensors[name].read, extent) for name in names]
    stored = [tensors[name].read() for name in (*names, *scale_names) if name in tensors]
    full = (dequantize_8 if len(stored) == 5 else dequantize_4)(*stored)
    return [weight.read(lambda moment=moment: moment, extent) for moment in full]
