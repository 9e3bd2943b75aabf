"""Unified Checkpoint: save, verify and resume on any topology."""

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
from pathlib import Path

import kernels

import numpy as np

from adapters import adapter_files
from distributed.collectives import _bytes_of, _size_of, _to_host, assign_writers, gather_tensor_index
from formats.files import UserError, _disk_full, _sync, atomic_file, crc32_of
from formats.tensor_files import read_safetensors, read_tensor, safetensors_header, write_safetensors
from formats.weights import MASTER_WEIGHTS, MODEL_FILES, SaveEntry, load_weights, stored_tensors, weights_to_save
from parallel import NAMES, ORDERS, SINGLE, Degrees

# ============================================================ slicing and gathering: from what ranks hold to whole files

# Every tensor of a file is whole, and one rank, its owner, writes it. The others that have parts of it give them to the
# owner by way of the folder that is being written, in a file for each pair of ranks: so a part is sent once, no rank waits
# for another before it has given all, nothing of this is a collective, and so all of it can go on behind training.
# Reading needs none of it: a rank reads the ranges that it holds, see model.LazyTensor and Weight.read.

FILE_BYTES = 5 << 30  # a rank begins another file before one grows larger


class CheckpointShardWriter:
    """What this rank does of writing tensors of the whole model: which parts it gives to others, which files it writes.

    groups: {group: [SaveEntry]}, all of what this rank holds. A source (weight, tensor, first) is cut over sharding too: tensor
    has, laid flat, this rank's elements of the parameter from `first` on; None: none of them. The parts are taken here: as
    they are; or with buffers, a dict that the next may use again, copied into it, and what is written later is the state of now.
    """

    def __init__(self, groups, topology, buffers=None, together=(), metadata=None):
        """The ranks have met. together: groups of which one rank writes all that it holds, for one small file; metadata:
        {group: of its files}."""
        self.topology, self.rank, self.metadata = topology, topology.rank, metadata or {}
        self.entries = {(group, *entry.tensors): entry for group, entries in groups.items() for entry in entries}
        names = {key: " ".join(key) for key in self.entries}
        mine = {names[key]: _bytes_of(entry) for key, entry in self.entries.items()}
        sizes, holders = gather_tensor_index(mine, topology)
        for name in sizes:
            if name.partition(" ")[0] in together:
                holders[name] = holders[name][:1]
        self.owners = assign_writers(sizes, holders)
        self.owner = {key: self.owners[name] for key, name in names.items()}
        self.parts = {}  # (key, index of the source): numpy of the part, or None: this rank has nothing of it
        for key, entry in self.entries.items():
            for index, source in enumerate(entry.sources):
                if self.rank in self._givers(self.owner[key], source):
                    self.parts[key, index] = self._take(source[1], buffers, (key, index))

    def _givers(self, owner, source):
        """The ranks that together have all of a source: those of the owner's line along tp, if it is cut, and sharding."""
        grid, weight = self.topology.grid, source[0]
        axes = {"tp"} if weight.shard_spec is not None else set()
        axes |= {"sharding"} if len(source) > 2 else set()
        place = np.argwhere(grid == owner)[0]
        names = ORDERS[self.topology.degrees.order]
        return [
            int(r) for r in grid[tuple(slice(None) if n in axes else i for n, i in zip(names, place))].reshape([-1])
        ]

    def _take(self, tensor, buffers, key):
        found = _to_host(tensor)
        if buffers is None or found is None:
            return found
        if key not in buffers or buffers[key].shape != found.shape:
            buffers[key] = np.empty_like(found)
        np.copyto(buffers[key], found)
        return buffers[key]

    def write(self, folder, wait):
        """Give and write this rank's share; {group: {file: {"size", "crc32", "tensors": {name: bytes}}}} of its files.

        wait(path): returns when another rank has put that file there. Files are called GROUP.RANK.NUMBER.
        """
        folder, given = Path(folder), {}
        for (key, index), part in self.parts.items():
            if self.owner[key] != self.rank and part is not None:
                name, first = f"{' '.join(key)} {index}", self.entries[key].sources[index][2:]
                given.setdefault(self.owner[key], {}).update({name: part, f"{name} first": np.array(first, np.int64)})
        receivers = {self.owner[key] for key, _ in self.parts} - {self.rank}
        for receiver in sorted(receivers):
            write_safetensors(folder / f".parts-{self.rank}-{receiver}", given.get(receiver, {}), sync=False)
        report, files = {}, {}
        for key, entry in self.entries.items():
            if self.owner[key] == self.rank:
                size, mine = _bytes_of(entry), files.setdefault(key[0], [[0, []]])
                if mine[-1][0] and mine[-1][0] + size > FILE_BYTES:
                    mine.append([0, []])
                mine[-1][0] += size
                mine[-1][1].append(key)
        inbox = PartReader(folder, self.rank, wait)
        for group, parts in files.items():
            for number, (_, keys) in enumerate(parts):
                tensors = {}
                for key in keys:
                    tensors |= self._readers(key, inbox)
                name = f"{group}.{self.rank}.{number}"
                written = write_safetensors(folder / name, tensors, self.metadata.get(group))
                sizes = {name: _size_of(*value[1:]) for name, value in tensors.items()}
                report.setdefault(group, {})[name] = {**written, "tensors": sizes}
        inbox.close()
        return report

    def _readers(self, key, inbox):
        """{name: (function, shape, dtype)} of an entry's tensors for write_safetensors; its sources are gathered once."""
        entry, made = self.entries[key], []

        def array(index):
            if index == 0:
                made[:] = entry.arrays(*(self._whole(key, i, inbox) for i in range(len(entry.sources))))
            found, made[index] = made[index], None
            return found

        return {name: (functools.partial(array, i), *how) for i, (name, how) in enumerate(entry.tensors.items())}

    def _whole(self, key, index, inbox):
        """A source of an entry, of all its ranks, in the file's layout."""
        source = self.entries[key].sources[index]
        weight, first = source[0], source[2:]
        cut, name, parts = weight.shard_spec, f"{' '.join(key)} {index}", {}  # parts: by rank of tp
        for rank in self._givers(self.rank, source):
            if rank == self.rank:
                part, start = self.parts[key, index], first
            else:
                part, start = inbox.read(rank, name), inbox.read(rank, f"{name} first")
            tp = int(np.argwhere(self.topology.grid == rank)[0][-1])
            if not first:
                parts[tp] = part
            elif part is not None:
                shape = weight.shape[::-1] if weight.transposed else list(weight.shape)
                if cut is not None:
                    shape[cut.dim] = sum(b - a for a, b in cut.ranges_by_rank[tp])
                if tp not in parts:
                    parts[tp] = np.empty(shape, part.dtype)
                parts[tp].reshape([-1])[start[0] : start[0] + part.size] = part.reshape([-1])
        if cut is None:
            (found,) = parts.values()
        else:
            found = np.empty(cut.shape, next(iter(parts.values())).dtype)
            for tp, part in parts.items():
                cut.scatter_into(found, part, tp)
        return found.T if weight.transposed else found


class PartReader:
    """What other ranks give to this one, in the files .parts-GIVER-THIS of a folder; removed when it has been read."""

    def __init__(self, folder, rank, wait):
        self.folder, self.rank, self.wait, self.tensors = folder, rank, wait, {}

    def read(self, giver, name):
        """An array; None: the giver has nothing of it."""
        if giver not in self.tensors:
            path = self.folder / f".parts-{giver}-{self.rank}"
            self.wait(path)
            self.tensors[giver] = path, safetensors_header(path)
        path, header = self.tensors[giver]
        return read_tensor(path, header[name]) if name in header else None

    def close(self):
        for path, _ in self.tensors.values():
            path.unlink()


def checksums(folder, sizes, topology):
    """{name: crc32 as it is now} of files of a folder, {name: bytes}: each rank reads its share of them, by bytes, then all
    know all."""
    share = assign_writers(sizes, dict.fromkeys(sizes, range(topology.degrees.world)))
    mine = {name: crc32_of(Path(folder) / name) for name, rank in share.items() if rank == topology.rank}
    return {name: found for part in topology.all_gather_object(mine) for name, found in part.items()}


def _remove(path):
    """Remove a file or folder; a checkpoint loses its marker first, so that a part of it never looks complete."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / DONE).unlink(missing_ok=True)
    if re.fullmatch(r"checkpoint-\d+", path.name):
        path = path.rename(path.with_name(f"tmp-{path.name}-old"))
    shutil.rmtree(path)


# Moments in few bits, after upstream: the first in equal steps up to the largest of a row; of the second what it is there
# for, the ratio 1 / (sqrt(v) + 1e-8), in equal steps between the least and the largest. O1: 8 bits, rows of the file's
# layout (outputs); O2: 4 bits, groups of 32 along them, both numbers in one byte under the name of the first.
# Scales: float32, under NAME@scales, and NAME@min_scales, NAME@max_scales of the second.
GROUP = 32


MAX_QUANTIZATION_TIMES = 1  # a state that has been in few bits once is not rounded again


def _quantized(names, shape, sources, stage):
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    scales = [rows] if stage == "O1" else [rows, -(-columns // GROUP)]
    extra = {f"{names[0]}@scales": scales, f"{names[1]}@min_scales": scales, f"{names[1]}@max_scales": scales}
    integers = {names[0]: (shape, "int8")} | ({names[1]: (shape, "uint8")} if stage == "O1" else {})
    tensors = integers | {name: (size, "float32") for name, size in extra.items()}
    return SaveEntry(tensors, sources, quantize_8 if stage == "O1" else quantize_4)


def quantize_8(m, v):
    """Moments (…, n) -> [int8 m, uint8 ratio, scales, least, largest (rows,)]."""
    shape, m, ratio = (
        m.shape,
        m.reshape([-1, m.shape[-1]]),
        1 / (np.sqrt(v.reshape([-1, v.shape[-1]])) + np.float32(1e-8)),
    )
    scales, least, largest = _scales(m, ratio)
    m, ratio = np.round(m / scales * 127), np.round((ratio - least) / np.maximum(largest - least, 1e-30) * 255)
    return [
        m.astype(np.int8).reshape(shape),
        ratio.astype(np.uint8).reshape(shape),
        *(x[:, 0] for x in (scales, least, largest)),
    ]


def dequantize_8(m, ratio, scales, least, largest):
    shape, scales, least, largest = m.shape, scales[:, None], least[:, None], largest[:, None]
    m, ratio = m.reshape([-1, shape[-1]]).astype(np.float32), ratio.reshape([-1, shape[-1]]).astype(np.float32)
    return (m / 127 * scales).reshape(shape), _square(ratio / 255 * (largest - least) + least).reshape(shape)


def quantize_4(m, v):
    """Moments (…, n) -> [int8, m in the upper 4 bits and ratio in the lower, scales, least, largest (rows, n / 32)]."""
    shape, n = m.shape, m.shape[-1]
    m, ratio = (_grouped(x) for x in (m, 1 / (np.sqrt(v) + np.float32(1e-8))))
    scales, least, largest = _scales(m, ratio)
    m = np.round(m / scales * 7).astype(np.int8)
    ratio = np.round((ratio - least) / np.maximum(largest - least, 1e-30) * 15).astype(np.int8)
    packed = ((m << 4) | ratio).reshape([-1, scales.shape[1] * GROUP])[:, :n].reshape(shape)
    return [packed, *(x[..., 0] for x in (scales, least, largest))]


def dequantize_4(packed, scales, least, largest):
    shape, n = packed.shape, packed.shape[-1]
    packed, scales, least, largest = _grouped(packed), scales[..., None], least[..., None], largest[..., None]
    m, ratio = (
        (packed >> 4).astype(np.float32) / 7 * scales,
        (packed & 15).astype(np.float32) / 15 * (largest - least) + least,
    )
    return tuple(x.reshape([len(x), -1])[:, :n].reshape(shape) for x in (m, _square(ratio)))


def _grouped(x):
    """(…, n) -> (rows, groups, 32), the last padded by its row's last element."""
    x = x.reshape([-1, x.shape[-1]])
    return np.pad(x, [(0, 0), (0, -x.shape[1] % GROUP)], "edge").reshape([len(x), -1, GROUP])


def _scales(m, ratio):
    """Largest |m|, least and largest ratio along the last dim, kept."""
    largest = np.abs(m).max(-1, keepdims=True)
    return np.where(largest > 0, largest, np.float32(1e-8)), ratio.min(-1, keepdims=True), ratio.max(-1, keepdims=True)


def _square(ratio):
    """The second moment that has this ratio."""
    return np.maximum(1 / ratio - np.float32(1e-8), 0) ** 2


def _moments_of(weight, found, extent):
    """Both moments of what a rank has of a weight, in our layout; extent: (first, last), of it laid flat, or None."""
    names = [f"{weight.name}/moment{i}_0" for i in (1, 2)]
    for name in names[:1] if f"{names[0]}@scales" in found else names:
        if name not in found:
            raise UserError(f"optimizer state is not of what is trained now: missing {name}; unexpected none")
    for name in names if f"{names[0]}@scales" not in found else names[:1]:
        if list(found[name][1]) != weight.shape:
            raise UserError(f"optimizer state: {weight.name}: {list(found[name][1])} found, {weight.shape} needed")
    if f"{names[0]}@scales" not in found:
        return [weight.read(found[name][0], extent) for name in names]
    stored = [
        found[name][0]()
        for name in (*names, f"{names[0]}@scales", f"{names[1]}@min_scales", f"{names[1]}@max_scales")
        if name in found
    ]
    wholes = (dequantize_8 if len(stored) == 5 else dequantize_4)(*stored)
    return [weight.read(lambda array=array: array, extent) for array in wholes]


def _some(names):
    """A few of a set of names, for a message."""
    names = sorted(names)
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"


# ============================================================================================== checkpoints

DONE = ".checkpoint_done"


SINGLE_FILE_GROUPS = ("adapter_model", "prefix_projection")  # one file each, as PEFT has them


@dataclasses.dataclass
class TrainState:
    """Where a run stands; all of it is in trainer_state.json."""

    step: int = 0  # steps made; also says which batch comes next (micro_batches)
    epoch: float = 0.0  # step / steps of an epoch
    consumed_tokens: int = 0  # real input tokens so far
    best_metric: float | None = None  # of metric_for_best_model
    best_checkpoint: str | None = None  # "checkpoint-120", a folder of output_dir
    log_history: list = dataclasses.field(default_factory=list)  # the last 20 log lines


class CheckpointManager:
    """The saves of a run: output_dir/checkpoint-STEP, complete or not there, whole tensors, written by all ranks together.

        checkpoints = CheckpointManager(args, model, tokenizer, optimizer, shards, topology)
        checkpoints.save(state)         # with async_save it returns as soon as the state is copied
        checkpoints.wait()              # for the one that is being written; an error of it is raised here
        checkpoints.write_model(folder, dtype)

    Everything goes to a temporary folder, is synced, gets the marker and is renamed: whenever processes die, what has the
    name checkpoint-N and the marker is whole. A full disk is a UserError; half files are removed and earlier checkpoints
    stay. output_dir must be one folder for all processes.
    """

    def __init__(self, args, model, tokenizer, optimizer=None, shards=None, topology=SINGLE):
        self.args, self.model, self.tokenizer, self.topology = args, model, tokenizer, topology
        self.optimizer, self.shards = optimizer, shards
        self.adapted = getattr(args, "lora", False) or getattr(args, "prefix_tuning", False)
        self.options = getattr(args, "unified_checkpoint_config", None) or ()
        self.half = kernels.bf16 and not self.adapted  # weights rounded for use beside float32 ones to go on from
        self.masters = self.half and "remove_master_weight" not in self.options
        self.rounds = args.ckpt_quant_stage
        self.pending, self.last, self.buffers = None, None, {} if "async_save" in self.options else None
        if "skip_save_model_weight" in self.options and not self.masters:
            self._say("skip_save_model_weight is ignored: no master weights are saved that could stand for the weights")
        if self.rounds != "O0" and getattr(optimizer, "rounded", 0) >= MAX_QUANTIZATION_TIMES:
            self._say(
                f"ckpt_quant_stage: {self.rounds} is ignored: the moments were in few bits once; again would lose more"
            )
            self.rounds = "O0"
        if (
            self.buffers is not None
        ):  # made, and touched, before training begins: the first save is as short as the others
            topology.barrier()
            CheckpointShardWriter(self._all_groups()[0], topology, self.buffers, SINGLE_FILE_GROUPS)

    def _say(self, text):
        if self.topology.rank == 0:
            print(text, flush=True)

    def contents(self, dtype=None):
        """({group: [SaveEntry]}, {group: metadata}, function(folder) that writes what is small) of the model or adapter.

        dtype: of a model that is written to be used; None: what a checkpoint holds.
        """
        model, metadata = self.model, {}
        if self.adapted:
            with self.shards.present("prefix") if self.shards is not None else contextlib.nullcontext():
                config, files = adapter_files(model, self.args.model_name_or_path)
            groups = {file.removesuffix(".safetensors"): entries for file, (entries, _) in files.items()}
            metadata = {file.removesuffix(".safetensors"): more for file, (_, more) in files.items()}
            name, text = "adapter_config.json", json.dumps(config, indent=2)
        else:
            stored, groups = weights_to_save(model), {}
            kind = dtype or ("bfloat16" if self.half else "float32")
            if dtype or not (self.masters and "skip_save_model_weight" in self.options):
                groups["model"] = [SaveEntry.of(weight, kind) for weight in stored]
            if self.masters and not dtype:
                groups["master_weights"] = [SaveEntry.of(weight) for weight in stored]
            name, text = "config.json", model.config.to_json(kind)
        if self.shards is not None:
            groups = {group: [self._held(entry) for entry in entries] for group, entries in groups.items()}

        def write_small(folder):
            self.tokenizer.save(folder)
            with atomic_file(folder / name) as file:
                file.write(text)

        return groups, metadata, write_small

    def _all_groups(self):
        """contents() and the optimizer's."""
        groups, metadata, write_small = self.contents()
        if self.optimizer is not None and not self.args.ignore_save_lr_and_optim:
            groups["optimizer"] = self.optimizer.entries(self.shards, self.rounds)
        return groups, metadata, write_small

    def _held(self, entry):
        """An entry whose parameters are what this rank keeps of them."""
        sources = [(w, *self.shards.held(w)) if tensor is w.parameter else (w, tensor) for w, tensor in entry.sources]
        return entry._replace(sources=sources)

    def save(self, state):
        """Write checkpoint-STEP, then prune; called by all ranks at the same step."""
        self.wait()
        args, folder = self.args, Path(self.args.output_dir)
        groups, metadata, write_small = self._all_groups()
        index = {}
        if "optimizer" in groups:
            index["optimizer"] = {
                "master_weights": self.masters,
                "ckpt_quant_stage": self.rounds,
                "quant_ckpt_resume_times": getattr(self.optimizer, "rounded", 0),
            }
        record = {
            **dataclasses.asdict(state),
            "optimizer_steps": self.optimizer.steps if self.optimizer is not None else 0,
            "data_position": {"epoch": int(state.epoch), "next_step": state.step, "seed": args.seed},
            "weights": "rounded" if self.half and not self.masters else "exact",
            "degrees": dataclasses.asdict(self.topology.degrees),
            "args": dataclasses.asdict(args),
        }
        final, best = folder / f"checkpoint-{state.step}", state.best_checkpoint

        def publish(temporary, files):
            _complete(temporary, files, record)
            if final.exists():  # a step made again after resuming from an earlier checkpoint
                _remove(final)
            temporary.rename(final)
            _sync(folder)
            prune_checkpoints(folder, args.save_total_limit, best)

        kept = "this checkpoint was not written, earlier ones are intact"
        writing = CheckpointWriter(
            folder / f"tmp-checkpoint-{state.step}", final, kept, self.topology, write_small, publish, index, metadata
        )
        self.last, self.pending = state.step, writing
        writing.begin(groups, self.buffers)
        if self.buffers is None:
            self.wait()
        return final

    def wait(self):
        """Until what is being written is there; what went wrong with it is raised."""
        writing, self.pending = self.pending, None
        if writing is not None:
            writing.finish()

    def has(self, step):
        """Whether there is, or will be, a checkpoint of this step."""
        return step == self.last or (Path(self.args.output_dir) / f"checkpoint-{step}").is_dir()

    def write_model(self, folder, dtype="float32"):
        """The model, or the adapter, to be used: into a folder that may hold other things, its configuration last."""
        self.wait()
        folder = Path(folder)
        groups, metadata, write_small = self.contents(dtype)

        def publish(temporary, files):
            new = [path.name for path in temporary.iterdir() if not path.name.startswith(".")]
            for path in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"] * (
                not self.adapted
            ):
                if path.name not in new:  # of a run on another topology
                    path.unlink(missing_ok=True)
            for name in sorted(new, key=lambda name: name in ("config.json", "adapter_config.json")):
                os.replace(temporary / name, folder / name)
            shutil.rmtree(temporary)
            _sync(folder)

        kept = "the model was not written, checkpoints are intact"
        writing = CheckpointWriter(
            folder / "tmp-model", folder, kept, self.topology, write_small, publish, {}, metadata
        )
        writing.begin(groups)
        writing.finish()


class CheckpointWriter:
    """A folder that all ranks write to, on its way to be published: each rank its share, then rank 0 names the files and
    calls publish(temporary, {name: {"size", "crc32"}}). Ranks tell each other by files there that they are done or have failed."""

    def __init__(self, temporary, final, kept, topology, write_small, publish, index, metadata):
        self.temporary, self.final, self.kept, self.topology = temporary, final, kept, topology
        self.write_small, self.publish, self.index, self.metadata = write_small, publish, index, metadata
        self.thread, self.error = None, None

    def begin(self, groups, buffers=None):
        """buffers: a dict that the state is copied into; the rest goes on in a thread."""
        topology, error = self.topology, None
        if topology.rank == 0:
            try:
                self.temporary.parent.mkdir(parents=True, exist_ok=True)
                for left_over in {*self.temporary.parent.glob("tmp-checkpoint-*"), self.temporary}:
                    if left_over.exists():
                        shutil.rmtree(left_over)
                self.temporary.mkdir()
            except OSError as wrong:
                error = wrong
        if any(texts := topology.all_gather_object(error and self._text(error))):
            self._raise(error, texts)
        if not all(seen := topology.all_gather_object(self.temporary.is_dir(), met=True)):
            raise UserError(
                f"{self.final}: rank {seen.index(False)} does not see it; all processes need one output_dir"
            )
        try:
            self.share = CheckpointShardWriter(groups, topology, buffers, SINGLE_FILE_GROUPS, self.metadata)
        except BaseException:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        if buffers is None:
            self._run()
        else:
            # Not a daemon: a run that ends by an error still gets the checkpoint that it has begun.
            self.thread = threading.Thread(target=self._run, name="checkpoint")
            self.thread.start()

    def _run(self):
        rank, ranks = self.topology.rank, range(self.topology.degrees.world)
        try:
            report = self.share.write(self.temporary, self._wait_for)
            with atomic_file(self.temporary / f".done-{rank}", sync=False) as file:
                json.dump(report, file)
            if rank == 0:
                self.write_small(self.temporary)
                reports = []
                for path in [self.temporary / f".done-{rank}" for rank in ranks]:
                    self._wait_for(path)
                    reports.append(json.loads(path.read_text()))
                    path.unlink()
                self.publish(self.temporary, _name_files(self.temporary, reports, self.index, self.metadata))
            else:
                self._wait_for(self.temporary, there=False)  # so that all end together
        except BaseException as error:
            self.error = error
            with contextlib.suppress(OSError):
                (self.temporary / f".failed-{rank}").touch()

    def _wait_for(self, path, there=True):
        """Until another rank has put this file there, or taken it away; PeerFailed if one has failed, or goes no further."""
        pause, patience = 0.001, None
        while path.exists() != there:
            with contextlib.suppress(FileNotFoundError):  # published meanwhile
                if any(name.startswith(".failed-") for name in os.listdir(self.temporary)):
                    raise PeerFailed
            if not threading.main_thread().is_alive():  # this process ends, so others may have ended
                patience = patience or time.monotonic() + 30
                if time.monotonic() > patience:
                    raise PeerFailed
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)

    def finish(self):
        """Wait until it is published; what went wrong on any rank is raised on all."""
        if self.thread is not None:
            self.thread.join()
        if self.error is not None and not isinstance(self.error, Exception):  # interrupted: the others are too
            self._raise(self.error, [])
        wrong = self.error is not None and not isinstance(self.error, PeerFailed)
        texts = self.topology.all_gather_object(self._text(self.error) if wrong else None)
        if self.error is not None or any(texts):
            self._raise(self.error, texts)

    def _text(self, error):
        if _disk_full(error):
            free = f"{shutil.disk_usage(self.temporary.parent).free / 1e6:.1f} MB free"
            return f"{self.final}: the disk is full ({free}); {self.kept}; free some space, then resume"
        return f"{self.final}: {type(error).__name__}: {error}"

    def _raise(self, error, texts):
        if self.topology.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if error is None or isinstance(error, PeerFailed) or _disk_full(error):
            raise UserError(next(filter(None, texts), f"{self.final}: another rank has ended")) from None
        raise error


class PeerFailed(Exception):
    """Another rank has failed, and says itself why."""


def _name_files(folder, reports, index, metadata):
    """Give the files of all ranks their final names, and write the indexes; {name: {"size", "crc32"}} of all in the folder.

    index: {group: what its index says besides}.
    """
    found = {}
    for group in sorted({group for report in reports for group in report}):
        parts = [part for report in reports for part in report.get(group, {}).items()]
        if group in SINGLE_FILE_GROUPS and len(parts) > 1:  # of several stages; PEFT wants one file
            tensors = {name: array for part, _ in parts for name, array in read_safetensors(folder / part).items()}
            parts = [(f"{group}.whole", write_safetensors(folder / f"{group}.whole", tensors, metadata.get(group)))]
        alone = len(parts) == 1 and group not in ("optimizer", "master_weights")
        weight_map, total = {}, 0
        for i, (part, written) in enumerate(parts, 1):
            name = f"{group}.safetensors" if alone else f"{group}-{i:05d}-of-{len(parts):05d}.safetensors"
            (folder / part).rename(folder / name)
            found[name] = {key: written[key] for key in ("size", "crc32")}
            for tensor, size in written.get("tensors", {}).items():
                weight_map[tensor], total = name, total + size
        if not alone:
            content = {
                "metadata": {"total_size": total},
                **index.get(group, {}),
                "weight_map": dict(sorted(weight_map.items())),
            }
            with atomic_file(folder / f"{group}.safetensors.index.json") as file:
                json.dump(content, file, indent=1)
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path.name not in found:
            found[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "crc32": crc32_of(path)}
    return found


def _complete(folder, files, record):
    """trainer_state.json, all synced, then the marker, which has its checksum."""
    with atomic_file(folder / "trainer_state.json") as file:
        json.dump({**record, "files": files}, file, indent=1, ensure_ascii=False)
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    (folder / DONE).write_text(str(crc32_of(folder / "trainer_state.json")))
    _sync(folder / DONE)
    _sync(folder)


def list_checkpoints(output_dir):
    """Folders named checkpoint-STEP, newest first, complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def prune_checkpoints(output_dir, limit, best=None):
    """Remove the oldest beyond `limit`; the newest and the best (a folder's name) always stay and are counted."""
    checkpoints = list_checkpoints(output_dir)
    if not limit or limit < 1:
        return
    keep = [path for i, path in enumerate(checkpoints) if i == 0 or (best and path.name == Path(best).name)]
    keep += [path for path in checkpoints if path not in keep][: max(0, limit - len(keep))]
    for path in reversed(checkpoints):
        if path not in keep:
            _remove(path)


def incomplete(path):
    """None for a complete checkpoint, else what is wrong with it."""
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
        size = written["size"] if isinstance(written, dict) else written  # a number: saved before there were checksums
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes, {size} were written"
    return None


def damaged(path, topology=SINGLE):
    """None, or which file of a complete checkpoint is not what was written; all ranks read a part each and agree."""
    files = json.loads((Path(path) / "trainer_state.json").read_text(encoding="utf-8"))["files"]
    files = {name: written for name, written in files.items() if isinstance(written, dict)}
    found = checksums(path, {name: written["size"] for name, written in files.items()}, topology)
    wrong = sorted(name for name, written in files.items() if found[name] != written["crc32"])
    return f"{wrong[0]} is damaged: its checksum differs from what was written" if wrong else None


def find_checkpoint(args, topology=SINGLE):
    """The checkpoint that resume_from_checkpoint means: a path (UserError unless complete) or true = newest complete.

    None if there is none. Complete: all files have the size and the checksum that they were written with. Prints which it
    is, which were passed over, and arguments that have changed since. All ranks find the same.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None

    def say(text):
        if topology.rank == 0:
            print(text, flush=True)

    if isinstance(wanted, str):
        reason = "there is no such folder" if not Path(wanted).is_dir() else incomplete(wanted)
        if reason := next(filter(None, topology.all_gather_object(reason)), None) or damaged(wanted, topology):
            raise UserError(f"resume_from_checkpoint: {wanted}: {reason}; give a complete one, or true for the newest")
        path = Path(wanted)
        newer = [p for p in list_checkpoints(args.output_dir) if int(p.name[11:]) > _step_of(path)]
        if args.save_total_limit and newer:  # pruning goes by step: what this run saves would be the first to go
            raise UserError(
                f"resume_from_checkpoint: {path}: output_dir also holds the later {newer[0].name}, and save_total_limit keeps "
                "the latest steps; remove it, or go on in another output_dir"
            )
    else:
        listed = [(str(path), incomplete(path)) for path in list_checkpoints(args.output_dir) if topology.rank == 0]
        for path, reason in topology.all_gather_object(listed)[0]:
            if (reason := reason or damaged(path, topology)) is None:
                path = Path(path)
                break
            say(f"resume: {path} is passed over: {reason}")
        else:
            say(f"resume: no complete checkpoint in {args.output_dir}; starting at step 0")
            return None
    say(f"resume: from {path}{_changes(path, args, topology)}")
    return path


def _changes(path, args, topology):
    """What is another topology now than in the checkpoint, which changes no step, and what else is other, which may."""
    saved = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    then, degrees = saved["args"], Degrees(**saved.get("degrees", {}))
    aside = """resume_from_checkpoint overwrite_output_dir output_dir disable_tqdm logging_dir logging_steps logging_first_step report_to
        save_strategy save_steps save_total_limit unified_checkpoint unified_checkpoint_config evaluation_strategy eval_steps
        max_evaluate_steps sharding virtual_pp_degree sequence_parallel hybrid_parallel_topo_order gradient_accumulation_steps""".split()
    aside += [f"{name}_parallel_degree" for name in NAMES.values()]
    now = {key: value for key, value in dataclasses.asdict(args).items() if key in then and key not in aside}
    changed = [f"{key} {then[key]!r} -> {value!r}" for key, value in now.items() if then[key] != value]
    before = then["gradient_accumulation_steps"] * degrees.dp * degrees.sharding
    if before != (micro_batches := args.gradient_accumulation_steps * topology.data_size):
        changed.append(f"micro-batches of a step {before} -> {micro_batches}")
    text = "" if str(degrees) == str(topology.degrees) else f"; {degrees} -> {topology.degrees}"
    return text + (f"; not an exact continuation, changed: {', '.join(changed)}" if changed else "")


def _step_of(checkpoint):
    """The step that trainer_state.json names."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["step"]


def load_trained(model, path, args):
    """What was trained, without an adapter: a checkpoint's float32 weights into the model, from where they are exact."""
    path, masters = Path(path), (Path(path) / f"{MASTER_WEIGHTS}.index.json").is_file()
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    if state.get("weights") == "rounded":
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
    load_weights(model, path, (MASTER_WEIGHTS,) if masters else MODEL_FILES)


def load_checkpoint(path, optimizer=None, shards=None, output_dir=None):
    """TrainState of a checkpoint, its moments into `optimizer` (None: ignore_load_lr_and_optim); no weights.

    Each rank reads what it has of them, whatever the topology that wrote them.

    A best checkpoint that is not in output_dir (default: beside `path`) is forgotten: it could not be loaded at the end.
    """
    path = Path(path)
    saved = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    if optimizer is not None:
        index = path / "optimizer.safetensors.index.json"
        if not index.is_file():
            raise UserError(f"{path}: was saved without optimizer state; resume with ignore_load_lr_and_optim: true")
        optimizer.load(stored_tensors(path, ("optimizer.safetensors",)), shards)
        optimizer.steps, how = saved["optimizer_steps"], json.loads(index.read_text())
        optimizer.rounded = how.get("quant_ckpt_resume_times", 0) + (how.get("ckpt_quant_stage", "O0") != "O0")
    state = TrainState(**{field.name: saved[field.name] for field in dataclasses.fields(TrainState)})
    if state.best_checkpoint and not (Path(output_dir or path.parent) / state.best_checkpoint).is_dir():
        state.best_metric = state.best_checkpoint = None
    return state


def update_best(args, state, metrics, checkpoints):
    """Note in `state` that checkpoint-{state.step} is the best so far, if `metrics` say so; returns whether they do.

    An evaluation at a step that was not saved does not count: there is nothing to go back to.
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
