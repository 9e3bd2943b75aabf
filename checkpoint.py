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
        *.safetensors.index.json      which file has which tensor, where a group of tensors has several files
        trainer_state.json            TrainState, arguments, topology; size and checksum of every file
        .checkpoint_done              completion marker, written last: the checksum of trainer_state.json

Who writes what. Every stored tensor is full: shards of tensor parallelism and ZeRO are put together. assign_writers
gives each tensor to one rank that holds some of it, evenly by bytes. The other ranks that hold parts (contributors)
write them as files for that rank into the temporary folder. So a part is sent once, no rank waits for another before it
has sent all its own, no collective is needed, and everything after the copy can run in a thread behind training. Rank 0
waits for all, gives the files their final names, writes trainer_state.json, syncs, sets the marker and renames the
folder.

Resume on another topology. Because stored tensors are full and named as Hugging Face names them, whatever wrote them,
each rank reads the rows and columns that it holds under the new topology (Weight.read) and nothing else.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import kernels

import numpy as np
import paddle
from tqdm import tqdm

from adapters import adapter_files
from distributed.collectives import gather_tensor_index
from formats.files import UserError, _disk_full, _sync, atomic_file, crc32_of
from formats.tensor_files import StoredTensor, read_safetensors, read_tensor, safetensors_header, write_safetensors
from formats.weights import (
    MASTER_WEIGHTS,
    MODEL_FILES,
    SaveEntry,
    SaveSource,
    Weight,
    load_weights,
    stored_bytes,
    stored_tensors,
    weights_to_save,
)
from model import CausalLM
from parallel import NAMES, ORDERS, SINGLE, Degrees, Topology

DONE = ".checkpoint_done"

SINGLE_FILE_GROUPS = ("adapter_model", "prefix_projection")  # one file each, as peft has them

FILE_BYTES = 5 << 30  # a rank starts another file before one grows larger

MOMENT_BITS = {"O0": 32, "O1": 8, "O2": 4}  # ckpt_quant_stage: bits of a stored moment

MAX_QUANTIZATION_TIMES = 1  # moments that come from a quantized checkpoint are not quantized again


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
            topology.barrier()
            CheckpointShardWriter(self._training_plan(), topology, buffers=self.buffers)

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
            "args": dataclasses.asdict(args),
        }

        def commit(temporary: Path, files: dict) -> None:
            _mark_complete(temporary, files, record)
            if final.exists():  # a step made again after resuming from an earlier checkpoint
                remove_path(final)
            temporary.rename(final)
            _sync(output_dir)
            prune_checkpoints(output_dir, args.save_total_limit, best)

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
        writer.start(self.buffers)
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


class PeerFailed(Exception):
    """Another rank has failed; its own message says why."""


class CheckpointWriter:
    """Writes one folder: every rank its tensor files into `temporary`, then rank 0 names them and commits.

    commit(temporary, {file: {"size", "crc32"}}) moves it to `final`. Ranks signal by empty files in `temporary` that
    they are done or have failed. on_failure: what a message says of the state that a failure leaves behind.
    """

    def __init__(self, temporary: Path, final: Path, plan: SavePlan, *, commit, topology: Topology, on_failure: str):
        self.temporary, self.final, self.plan, self.commit = temporary, final, plan, commit
        self.topology, self.on_failure = topology, on_failure
        self.thread, self.error = None, None

    def start(self, buffers: dict | None = None) -> None:
        """buffers: the state is copied into them and the rest runs in a thread; None: all is done when it returns."""
        topology, error = self.topology, None
        if topology.rank == 0:
            try:
                self.temporary.parent.mkdir(parents=True, exist_ok=True)
                for left_over in {*self.temporary.parent.glob("tmp-checkpoint-*"), self.temporary}:
                    if left_over.exists():
                        shutil.rmtree(left_over)
                self.temporary.mkdir()
            except OSError as raised:
                error = raised
        if any(messages := topology.all_gather_object(error and self._message(error))):
            self._raise(error, messages)
        if not all(visible := topology.all_gather_object(self.temporary.is_dir(), met=True)):
            rank = visible.index(False)
            raise UserError(f"{self.final}: rank {rank} does not see it; all processes need one output_dir")
        try:
            self.shard_writer = CheckpointShardWriter(self.plan, topology, buffers=buffers)
        except BaseException:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        if buffers is None:
            self._run()
        else:
            # Not a daemon: a run that ends by an error still completes the checkpoint that it has started.
            self.thread = threading.Thread(target=self._run, name="checkpoint")
            self.thread.start()

    def _run(self) -> None:
        rank, world = self.topology.rank, self.topology.degrees.world
        try:
            report = self.shard_writer.write(self.temporary, self._wait_for)
            with atomic_file(self.temporary / f".done-{rank}", sync=False) as file:
                json.dump(report, file)
            if rank == 0:
                self.plan.write_sidecar_files(self.temporary)
                reports = []
                for path in [self.temporary / f".done-{other}" for other in range(world)]:
                    self._wait_for(path)
                    reports.append(json.loads(path.read_text()))
                    path.unlink()
                self.commit(self.temporary, _name_files(self.temporary, reports, self.plan))
            else:
                self._wait_for(self.temporary, exists=False)  # so that all ranks end together
        except BaseException as error:
            self.error = error
            with contextlib.suppress(OSError):
                (self.temporary / f".failed-{rank}").touch()

    def _wait_for(self, path: Path, exists: bool = True) -> None:
        """Wait until another rank has created the file, or removed it; PeerFailed if a rank failed or is gone."""
        pause, deadline = 0.001, None
        while path.exists() != exists:
            with contextlib.suppress(FileNotFoundError):  # committed meanwhile
                if any(name.startswith(".failed-") for name in os.listdir(self.temporary)):
                    raise PeerFailed
            if not threading.main_thread().is_alive():  # this process is ending, so others may have ended
                deadline = deadline or time.monotonic() + 30
                if time.monotonic() > deadline:
                    raise PeerFailed
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)

    def finish(self) -> None:
        """Wait until it is committed; an error on any rank is raised on all."""
        if self.thread is not None:
            self.thread.join()
        if self.error is not None and not isinstance(self.error, Exception):  # interrupted: so are the others
            self._raise(self.error, [])
        own_error = self.error is not None and not isinstance(self.error, PeerFailed)
        messages = self.topology.all_gather_object(self._message(self.error) if own_error else None)
        if self.error is not None or any(messages):
            self._raise(self.error, messages)

    def _message(self, error: BaseException) -> str:
        if _disk_full(error):
            free = f"{shutil.disk_usage(self.temporary.parent).free / 1e6:.1f} MB free"
            return f"{self.final}: the disk is full ({free}); {self.on_failure}; free some space, then resume"
        return f"{self.final}: {type(error).__name__}: {error}"

    def _raise(self, error: BaseException | None, messages: list[str | None]) -> None:
        if self.topology.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if error is None or isinstance(error, PeerFailed) or _disk_full(error):
            raise UserError(next(filter(None, messages), f"{self.final}: another rank has ended")) from None
        raise error


def _name_files(folder: Path, reports: list[dict], plan: SavePlan) -> dict[str, dict]:
    """Give the files of all ranks their final names, and write the indexes; {name: {"size", "crc32"}} of all in the
    folder.

    reports: of CheckpointShardWriter.write on each rank.
    """
    files = {}
    for group in sorted({group for report in reports for group in report}):
        parts = [part for report in reports for part in report.get(group, {}).items()]
        if group in SINGLE_FILE_GROUPS and len(parts) > 1:  # one per pipeline stage
            tensors = {name: array for part, _ in parts for name, array in read_safetensors(folder / part).items()}
            merged = f"{group}.merged"
            parts = [(merged, write_safetensors(folder / merged, tensors, plan.metadata.get(group)))]
        single = len(parts) == 1 and group not in ("optimizer", "master_weights")
        weight_map, total = {}, 0
        for i, (part, written) in enumerate(parts, 1):
            name = f"{group}.safetensors" if single else f"{group}-{i:05d}-of-{len(parts):05d}.safetensors"
            (folder / part).rename(folder / name)
            files[name] = {key: written[key] for key in ("size", "crc32")}
            for tensor, size in written.get("tensors", {}).items():
                weight_map[tensor], total = name, total + size
        if not single:
            content = {
                "metadata": {"total_size": total},
                **plan.index.get(group, {}),
                "weight_map": dict(sorted(weight_map.items())),
            }
            with atomic_file(folder / f"{group}.safetensors.index.json") as file:
                json.dump(content, file, indent=1)
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path.name not in files:
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "crc32": crc32_of(path)}
    return files


def _mark_complete(folder: Path, files: dict[str, dict], record: dict) -> None:
    """Write trainer_state.json, sync everything, then write the marker."""
    with atomic_file(folder / "trainer_state.json") as file:
        json.dump({**record, "files": files}, file, indent=1, ensure_ascii=False)
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    (folder / DONE).write_text(str(crc32_of(folder / "trainer_state.json")))
    _sync(folder / DONE)
    _sync(folder)


# ==================================================================================== one rank's share of the tensors


class CheckpointShardWriter:
    """Writes the tensors assigned to this rank, and hands the parts that it holds of other tensors to their writers.

    The parts are taken when it is made: as they are, or, with buffers (a dict, used again by the next one), copied to
    host memory, so that training may go on before write(). All ranks make it together, just after a barrier.
    """

    def __init__(self, plan: SavePlan, topology: Topology, *, buffers: dict | None = None):
        self.topology, self.rank, self.metadata = topology, topology.rank, plan.metadata
        self.entries = {  # "GROUP TENSOR …": what is computed and written together
            " ".join((group, *entry.tensors)): entry for group, entries in plan.groups.items() for entry in entries
        }
        sizes, holders = gather_tensor_index({key: entry.nbytes for key, entry in self.entries.items()}, topology)
        for key in sizes:
            if _group_of(key) in SINGLE_FILE_GROUPS:
                holders[key] = holders[key][:1]
        self.writer = assign_writers(sizes, holders)  # {key: rank}
        self.parts = {}  # {(key, index of the source): numpy array, None where this rank holds nothing of it}
        for key, entry in self.entries.items():
            for index, source in enumerate(entry.sources):
                if self.rank in self._contributors(self.writer[key], source):
                    self.parts[key, index] = _copy(source.tensor, buffers, (key, index))

    def _contributors(self, writer: int, source: SaveSource) -> list[int]:
        """The ranks that together hold all of a source: the writer's along those of tp and sharding that shard it."""
        grid, order = self.topology.grid, ORDERS[self.topology.degrees.order]
        sharded = {"tp": source.weight.shard_spec is not None, "sharding": source.offset is not None}
        coords = np.argwhere(grid == writer)[0]
        lines = tuple(slice(None) if sharded.get(axis) else coord for axis, coord in zip(order, coords))
        return [int(rank) for rank in grid[lines].reshape([-1])]

    def write(self, folder: str | Path, wait_for: Callable[[Path], None]) -> dict:
        """Write this rank's files, called GROUP.RANK.NUMBER; wait_for(path) waits until another rank wrote it.

        Returns {group: {file: {"size", "crc32", "tensors": {name: bytes}}}}.
        """
        folder = Path(folder)
        self._send_parts(folder)
        inbox, report = PartReader(folder, self.rank, wait_for), {}
        for group, files in self._files().items():
            for number, keys in enumerate(files):
                tensors = {}
                for key in keys:
                    tensors |= self._tensors(key, inbox)
                name = f"{group}.{self.rank}.{number}"
                written = write_safetensors(folder / name, tensors, self.metadata.get(group))
                sizes = {tensor: stored_bytes(shape, dtype) for tensor, (_, shape, dtype) in tensors.items()}
                report.setdefault(group, {})[name] = {**written, "tensors": sizes}
        inbox.close()
        return report

    def _send_parts(self, folder: Path) -> None:
        """Write .parts-FROM-TO for each rank that waits for parts of this one; it is empty if this one holds none."""
        outbox = {self.writer[key]: {} for key, _ in self.parts if self.writer[key] != self.rank}
        for (key, index), part in self.parts.items():
            if self.writer[key] != self.rank and part is not None:
                name, offset = f"{key} {index}", self.entries[key].sources[index].offset
                outbox[self.writer[key]] |= {name: part, f"{name} offset": np.array([offset or 0], np.int64)}
        for receiver in sorted(outbox):
            write_safetensors(folder / f".parts-{self.rank}-{receiver}", outbox[receiver], sync=False)

    def _files(self) -> dict[str, list[list[str]]]:
        """{group: [keys of a file]} that this rank writes, each file of at most FILE_BYTES or one entry."""
        files, sizes = {}, Counter()
        for key, entry in self.entries.items():
            if self.writer[key] == self.rank:
                group = _group_of(key)
                keys_of_files = files.setdefault(group, [[]])
                if sizes[group] and sizes[group] + entry.nbytes > FILE_BYTES:
                    keys_of_files.append([])
                    sizes[group] = 0
                keys_of_files[-1].append(key)
                sizes[group] += entry.nbytes
        return files

    def _tensors(self, key: str, inbox: "PartReader") -> dict[str, tuple]:
        """{name: (function, shape, dtype)} of an entry, for write_safetensors; the first call gathers its sources."""
        entry, arrays = self.entries[key], []

        def array(index: int) -> np.ndarray:
            if index == 0:
                arrays[:] = entry.arrays(*(self._full_source(key, i, inbox) for i in range(len(entry.sources))))
            result, arrays[index] = arrays[index], None  # not kept longer than it is needed
            return result

        tensors = enumerate(entry.tensors.items())
        return {name: (functools.partial(array, i), shape, dtype) for i, (name, (shape, dtype)) in tensors}

    def _full_source(self, key: str, index: int, inbox: "PartReader") -> np.ndarray:
        """A source of an entry, put together from all ranks that hold some of it, in the stored layout."""
        source, name = self.entries[key].sources[index], f"{key} {index}"
        weight, spec, tp_shards = source.weight, source.weight.shard_spec, {}  # tp_shards: {rank of tp: array}
        for rank in self._contributors(self.rank, source):
            if rank == self.rank:
                part, offset = self.parts[key, index], source.offset
            else:
                part, offset = inbox.read(rank, name), inbox.read(rank, f"{name} offset")
            tp = int(np.argwhere(self.topology.grid == rank)[0][-1])  # tp is the last axis in every order
            if source.offset is None:
                tp_shards[tp] = part
            elif part is not None:  # flat elements, from `offset` on, of this tp shard
                if tp not in tp_shards:
                    shape = weight.shape[::-1] if weight.transposed else list(weight.shape)
                    if spec is not None:
                        shape[spec.dim] = sum(stop - start for start, stop in spec.ranges_by_rank[tp])
                    tp_shards[tp] = np.empty(shape, part.dtype)
                start = int(np.asarray(offset).reshape([-1])[0])
                tp_shards[tp].reshape([-1])[start : start + part.size] = part.reshape([-1])
        if spec is None:
            (full,) = tp_shards.values()
        else:
            full = np.empty(spec.shape, next(iter(tp_shards.values())).dtype)
            for tp, shard in tp_shards.items():
                spec.scatter_into(full, shard, tp)
        return full.T if weight.transposed else full


class PartReader:
    """Reads what other ranks hand to this one, in files .parts-FROM-TO of the folder; close() removes them."""

    def __init__(self, folder: Path, rank: int, wait_for: Callable[[Path], None]):
        self.folder, self.rank, self.wait_for = folder, rank, wait_for
        self.headers = {}  # {sender: (path, header)}

    def read(self, sender: int, name: str) -> np.ndarray | None:
        """None: the sender holds nothing of it."""
        if sender not in self.headers:
            path = self.folder / f".parts-{sender}-{self.rank}"
            self.wait_for(path)
            self.headers[sender] = path, safetensors_header(path)
        path, header = self.headers[sender]
        return read_tensor(path, header[name]) if name in header else None

    def close(self) -> None:
        for path, _ in self.headers.values():
            path.unlink()


def assign_writers(sizes: dict[str, int], holders: dict[str, Iterable[int]]) -> dict[str, int]:
    """{name: rank that writes it}. Greedy balance: largest tensor first, to the least-loaded rank that holds it.

    sizes: {name: bytes}; holders: {name: ranks}. If every rank holds everything, the largest load is at most the mean
    plus the largest tensor.
    """
    writers, load = {}, Counter()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        writers[name] = min(holders[name], key=lambda rank: (load[rank], rank))
        load[writers[name]] += sizes[name]
    return writers


def _group_of(key: str) -> str:
    return key.partition(" ")[0]


def _copy(tensor, buffers: dict | None, key: tuple) -> np.ndarray | None:
    """to_host(tensor), with buffers a copy in buffers[key], which is used again if it has the right shape."""
    array = to_host(tensor)
    if buffers is None or array is None:
        return array
    if key not in buffers or buffers[key].shape != array.shape:
        buffers[key] = np.empty_like(array)
    np.copyto(buffers[key], array)
    return buffers[key]


def to_host(tensor: paddle.Tensor | np.ndarray | None) -> np.ndarray | None:
    """numpy array of a tensor, without a copy if it is in host memory; bfloat16 as float32; None of None."""
    if tensor is None or isinstance(tensor, np.ndarray):
        return tensor
    if tensor.dtype == paddle.bfloat16:
        return tensor.astype("float32").numpy()
    return np.from_dlpack(tensor.detach()) if tensor.place.is_cpu_place() and tensor.size else tensor.numpy()


# ====================================================================================== the checkpoints of output_dir


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders named checkpoint-STEP, newest first, complete or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def prune_checkpoints(output_dir: str | Path, limit: int | None, best: str | None = None) -> None:
    """Remove the oldest beyond `limit`; the newest and the best (a folder's name) always stay and are counted."""
    checkpoints = list_checkpoints(output_dir)
    if not limit or limit < 1:
        return
    keep = [path for i, path in enumerate(checkpoints) if i == 0 or (best and path.name == Path(best).name)]
    keep += [path for path in checkpoints if path not in keep][: max(0, limit - len(keep))]
    for path in reversed(checkpoints):
        if path not in keep:
            remove_path(path)


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
    if not (path / DONE).is_file():
        return "it has no completion marker"
    marked, state = (path / DONE).read_text(), path / "trainer_state.json"
    try:
        files = json.loads(state.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return "trainer_state.json is missing or damaged"
    if marked and marked != str(crc32_of(state)):
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


def find_checkpoint(args: object, topology: Topology = SINGLE) -> Path | None:
    """The checkpoint that resume_from_checkpoint means: a path (UserError unless complete), or true: the newest
    complete one.

    None if there is none. Complete: every file has the size and the checksum that it was written with. Prints which it
    is, which were passed over, and which arguments have changed since. All ranks get the same answer.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    path, lines = _check_given(Path(wanted), args, topology) if isinstance(wanted, str) else _newest(args, topology)
    if path is not None:
        lines.append(f"resume: from {path}{_describe_changes(path, args, topology)}")
    for line in lines if topology.rank == 0 else ():
        print(line, flush=True)
    return path


def _check_given(path: Path, args, topology: Topology) -> tuple[Path, list[str]]:
    reason = "there is no such folder" if not path.is_dir() else incomplete(path)
    reasons = topology.all_gather_object(reason)
    if reason := next(filter(None, reasons), None) or damaged(path, topology):
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
    candidates = [(str(path), incomplete(path)) for path in list_checkpoints(args.output_dir) if topology.rank == 0]
    lines = []
    for path, reason in topology.all_gather_object(candidates)[0]:
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
    text = "" if str(old_degrees) == str(topology.degrees) else f"; {old_degrees} -> {topology.degrees}"
    return text + (f"; not an exact continuation, changed: {', '.join(changed)}" if changed else "")


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
    load_weights(model, path, (MASTER_WEIGHTS,) if has_master_weights else MODEL_FILES)


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
        optimizer.load(stored_tensors(path, ("optimizer.safetensors",)), shards)
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


# ================================================================================ quantized moments (ckpt_quant_stage)

# PaddleNLP's scheme. The first moment m is stored in equal steps up to its largest absolute value; of the second moment
# v, the ratio 1 / (sqrt(v) + 1e-8) that Adam multiplies by is stored in equal steps between its extremes. O1: 8 bits,
# scales per row of the stored layout (outputs). O2: 4 bits, scales per 32 elements of a row, both numbers in one byte
# under the first moment's name. Scales are float32: NAME@scales of m, NAME@min_scales and NAME@max_scales of v.
GROUP = 32


def quantized_moments(names: list[str], shape: list[int], sources: list[SaveSource], moment_bits: int) -> SaveEntry:
    """The SaveEntry of both moments (names, sources) of a weight of this stored shape, in 8 or 4 bits."""
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    scale_shape = [rows] if moment_bits == 8 else [rows, -(-columns // GROUP)]
    tensors = {names[0]: (shape, "int8")}
    if moment_bits == 8:
        tensors[names[1]] = (shape, "uint8")
    for name in (f"{names[0]}@scales", f"{names[1]}@min_scales", f"{names[1]}@max_scales"):
        tensors[name] = (scale_shape, "float32")
    return SaveEntry(tensors, sources, quantize_8 if moment_bits == 8 else quantize_4)


def quantize_8(m: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Moments (…, n) -> [int8 m, uint8 ratio, scales of m, min and max of ratio (rows,)]."""
    shape, n = m.shape, m.shape[-1]
    m, ratio = m.reshape([-1, n]), _ratio(v.reshape([-1, n]))
    scales, low, high = _scales(m, ratio)
    m = np.round(m / scales * 127).astype(np.int8)
    ratio = np.round((ratio - low) / np.maximum(high - low, 1e-30) * 255).astype(np.uint8)
    return [m.reshape(shape), ratio.reshape(shape), scales[:, 0], low[:, 0], high[:, 0]]


def dequantize_8(
    m: np.ndarray, ratio: np.ndarray, scales: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What quantize_8 returns -> float32 moments (…, n)."""
    shape, scales, low, high = m.shape, scales[:, None], low[:, None], high[:, None]
    m, ratio = m.reshape([-1, shape[-1]]).astype(np.float32), ratio.reshape([-1, shape[-1]]).astype(np.float32)
    return (m / 127 * scales).reshape(shape), _second_moment(ratio / 255 * (high - low) + low).reshape(shape)


def quantize_4(m: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Moments (…, n) -> [int8: m in the upper 4 bits, ratio in the lower; scales, min, max of ratio (rows, n / 32)]."""
    shape, n = m.shape, m.shape[-1]
    m, ratio = _grouped(m), _grouped(_ratio(v))
    scales, low, high = _scales(m, ratio)
    m = np.round(m / scales * 7).astype(np.int8)
    ratio = np.round((ratio - low) / np.maximum(high - low, 1e-30) * 15).astype(np.int8)
    packed = ((m << 4) | ratio).reshape([-1, scales.shape[1] * GROUP])[:, :n].reshape(shape)
    return [packed, scales[..., 0], low[..., 0], high[..., 0]]


def dequantize_4(
    packed: np.ndarray, scales: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What quantize_4 returns -> float32 moments (…, n)."""
    shape, n = packed.shape, packed.shape[-1]
    packed, scales, low, high = _grouped(packed), scales[..., None], low[..., None], high[..., None]
    m = (packed >> 4).astype(np.float32) / 7 * scales
    ratio = (packed & 15).astype(np.float32) / 15 * (high - low) + low
    return tuple(x.reshape([len(x), -1])[:, :n].reshape(shape) for x in (m, _second_moment(ratio)))


def _grouped(x: np.ndarray) -> np.ndarray:
    """(…, n) -> (rows, groups, 32), the last group padded by its row's last element."""
    x = x.reshape([-1, x.shape[-1]])
    return np.pad(x, [(0, 0), (0, -x.shape[1] % GROUP)], "edge").reshape([len(x), -1, GROUP])


def _scales(m: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest |m|, smallest and largest ratio along the last dim, which stays with size 1."""
    largest = np.abs(m).max(-1, keepdims=True)
    return np.where(largest > 0, largest, np.float32(1e-8)), ratio.min(-1, keepdims=True), ratio.max(-1, keepdims=True)


def _ratio(v: np.ndarray) -> np.ndarray:
    return 1 / (np.sqrt(v) + np.float32(1e-8))


def _second_moment(ratio: np.ndarray) -> np.ndarray:
    """The inverse of _ratio."""
    return np.maximum(1 / ratio - np.float32(1e-8), 0) ** 2
