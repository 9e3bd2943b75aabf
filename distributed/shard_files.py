"""One rank's share of a save: which tensors it writes, and the parts of others that it hands to their writers.

    layout = SaveLayout(entries, topology)                   # the same on all ranks; made once, used by every save
    writer = CheckpointShardWriter(plan, topology, layout)   # takes the parts: as they are, or copied to host memory
    writer.send_parts(parts_folder)                          # at most one file a rank
    …                                                        # all ranks have sent their parts
    report = writer.write(folder, parts_folder)              # this rank's tensor files, under their final names

Every stored tensor is full: shards of tensor parallelism and ZeRO are put together. Each tensor has one writer, a rank
that holds some of it. The other ranks that hold parts write them into one file each, from which the writers read what
is theirs. Where a group of ranks is large enough, each writes one group of tensors alone (weights, or moments), so that
a save has at most one data file and one file of parts a rank.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import paddle

from distributed.collectives import gather_tensor_index
from formats.tensor_files import read_tensor, safetensors_header, write_safetensors
from formats.weights import SaveEntry, SaveSource, stored_bytes
from parallel import ORDERS, Topology

SINGLE_FILE_GROUPS = ("adapter_model", "prefix_projection")  # one file each, as peft has them

NUMBERED_GROUPS = ("optimizer", "master_weights")  # have an index also where there is one file

FILE_BYTES = 5 << 30  # a rank starts another file before one grows larger

MAX_UNEVEN = 1.25  # largest load over the mean that one group of tensors a rank may cost


class SaveLayout:
    """Who writes what, and who holds which flat elements: the same on every rank, a function of names and sizes.

    writer: {key: rank}; extents: {(key, index of a source): {rank: (offset, size)}} of what ZeRO shards; file_names:
    {(rank, group): [name of each file]}; files: {group: [keys of each file]} of this rank.
    """

    def __init__(self, entries: dict[str, SaveEntry], topology: Topology):
        self.digest = layout_digest(entries)
        sizes, holders = gather_tensor_index({key: entry.nbytes for key, entry in entries.items()}, topology)
        for key in sizes:
            if group_of(key) in SINGLE_FILE_GROUPS:
                holders[key] = holders[key][:1]
        self.writer, self.extents = assign_writers(sizes, holders), {}
        keys = sorted(sizes)  # by number: names would be most of the message
        number = {key: i for i, key in enumerate(keys)}
        local = [[number[key], *extent] for key, *extent in flat_extents(entries) if extent[-1]]
        if topology.all_gather_object(1 if local else None, "first"):
            for rank, found in enumerate(topology.all_gather_object(local)):
                for i, index, offset, size in found:
                    self.extents.setdefault((keys[i], index), {})[rank] = offset, size
        self.file_names, self.files = {}, {}
        self._name_files(sizes, topology.rank)

    def _name_files(self, sizes: dict[str, int], own_rank: int) -> None:
        by_rank = {}
        for key, rank in self.writer.items():
            by_rank.setdefault((group_of(key), rank), []).append(key)
        split, counts = {}, Counter()
        for (group, rank), keys in sorted(by_rank.items()):
            files, size = [[]], 0
            for key in sorted(keys):
                if size and size + sizes[key] > FILE_BYTES:
                    files.append([])
                    size = 0
                files[-1].append(key)
                size += sizes[key]
            split[group, rank] = files
            counts[group] += len(files)
        number = Counter()
        for (group, rank), files in split.items():
            names = self.file_names[rank, group] = []
            for _ in files:
                number[group] += 1
                if counts[group] == 1 and group not in NUMBERED_GROUPS:
                    names.append(f"{group}.safetensors")
                elif group in SINGLE_FILE_GROUPS:  # one per pipeline stage, merged by rank 0
                    names.append(f".{group}.{number[group]}")
                else:
                    names.append(f"{group}-{number[group]:05d}-of-{counts[group]:05d}.safetensors")
            if rank == own_rank:
                self.files[group] = files


def layout_digest(entries: dict[str, SaveEntry]) -> str:
    """Of all that this rank's SaveLayout depends on."""
    content = [[key, entry.nbytes] for key, entry in entries.items()], flat_extents(entries)
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def flat_extents(entries: dict[str, SaveEntry]) -> list[tuple]:
    """[(key, index of the source, offset, size)] of what this rank holds of sources that ZeRO shards, perhaps 0."""
    return [
        (key, index, source.offset, 0 if source.tensor is None else int(np.prod(source.tensor.shape)))
        for key, entry in entries.items()
        for index, source in enumerate(entry.sources)
        if source.offset is not None
    ]


def entries_of(groups: dict[str, list[SaveEntry]]) -> dict[str, SaveEntry]:
    """{"GROUP TENSOR …": what is computed and written together}."""
    return {" ".join((group, *entry.tensors)): entry for group, entries in groups.items() for entry in entries}


class CheckpointShardWriter:
    """Writes the tensors assigned to this rank, and hands the parts that it holds of other tensors to their writers.

    The parts are taken when it is made: as they are, or, with buffers (a dict, used again by the next one), copied to
    host memory, so that training may go on before write(). progress() is called for every tensor.
    """

    def __init__(
        self,
        groups: dict[str, list[SaveEntry]],
        metadata: dict[str, dict],
        topology: Topology,
        layout: SaveLayout,
        *,
        buffers: dict | None = None,
        progress: Callable[[], object] = lambda: None,
    ):
        self.topology, self.rank, self.metadata, self.layout = topology, topology.rank, metadata, layout
        self.entries, self.progress = entries_of(groups), progress
        coords = np.indices(topology.grid.shape).reshape([topology.grid.ndim, -1]).tolist()  # of every rank, by axis
        self.coords = dict(zip(ORDERS[topology.degrees.order], coords))
        self.parts = {}  # {(key, index of the source): numpy array, None where this rank holds nothing of it}
        for key, entry in self.entries.items():
            for index, source in enumerate(entry.sources):
                if self.rank in self._contributors(key, index, source):
                    self.parts[key, index] = _copy(source.tensor, buffers, (key, index))

    def _contributors(self, key: str, index: int, source: SaveSource) -> list[int]:
        """The ranks that together hold all of a source; of copies, the writer's own or the next after it."""
        topology, writer, tp, pp = self.topology, self.layout.writer[key], self.coords["tp"], self.coords["pp"]
        is_sharded = source.weight.shard_spec is not None
        if source.offset is None:
            axes = ORDERS[topology.degrees.order]
            lines = (slice(None) if axis == "tp" and is_sharded else self.coords[axis][writer] for axis in axes)
            return topology.grid[tuple(lines)].reshape([-1]).tolist()
        nearest, world = {}, topology.grid.size  # {(rank of tp, offset): rank}
        for rank, (offset, _) in self.layout.extents[key, index].items():
            if pp[rank] == pp[writer] and (is_sharded or tp[rank] == tp[writer]):
                other = nearest.setdefault((tp[rank], offset), rank)
                if (rank - writer) % world < (other - writer) % world:
                    nearest[tp[rank], offset] = rank
        return sorted(nearest.values())

    # ------------------------------------------------------------------------------------------- parts

    def send_parts(self, folder: str | Path) -> None:
        """Write this rank's file of parts that others write, if it has any."""
        outbox, sent = {}, self.layout.writer
        for (key, index), part in self.parts.items():
            if sent[key] != self.rank and part is not None:
                outbox[f"{key} {index}"] = part
        if outbox:
            self.progress()
            write_safetensors(Path(folder) / str(self.rank), outbox, sync=False)

    # ------------------------------------------------------------------------------------------- tensor files

    def write(self, folder: str | Path, parts_folder: str | Path) -> dict:
        """Write this rank's files. Returns {group: {file: {"size", "crc32", "tensors": {name: bytes}}}}."""
        folder, report, inbox = Path(folder), {}, PartReader(parts_folder)
        for group, files in self.layout.files.items():
            for name, keys in zip(self.layout.file_names[self.rank, group], files):
                tensors = {}
                for key in keys:
                    tensors |= self._tensors(key, inbox)
                written = write_safetensors(folder / name, tensors, self.metadata.get(group))
                sizes = {tensor: stored_bytes(shape, dtype) for tensor, (_, shape, dtype) in tensors.items()}
                report.setdefault(group, {})[name] = {**written, "tensors": sizes}
        return report

    def _tensors(self, key: str, inbox: "PartReader") -> dict[str, tuple]:
        """{name: (function, shape, dtype)} of an entry, for write_safetensors; the first call gathers its sources."""
        entry, arrays = self.entries[key], []

        def array(index: int) -> np.ndarray:
            self.progress()
            if index == 0:
                arrays[:] = entry.arrays(*(self._full_source(key, i, inbox) for i in range(len(entry.sources))))
            result, arrays[index] = arrays[index], None  # not kept longer than it is needed
            return result

        tensors = enumerate(entry.tensors.items())
        return {name: (functools.partial(array, i), shape, dtype) for i, (name, (shape, dtype)) in tensors}

    def _full_source(self, key: str, index: int, inbox: "PartReader") -> np.ndarray:
        """A source of an entry, put together from all ranks that hold some of it, in the stored layout."""
        source = self.entries[key].sources[index]
        weight, spec, tp_shards = source.weight, source.weight.shard_spec, {}  # tp_shards: {rank of tp: array}
        for rank in self._contributors(key, index, source):
            part = self.parts[key, index] if rank == self.rank else inbox.read(rank, f"{key} {index}")
            tp = self.coords["tp"][rank]
            if source.offset is None:
                tp_shards[tp] = part
                continue
            if tp not in tp_shards:  # flat elements, from `start` on, of this tp shard
                shape = weight.shape[::-1] if weight.transposed else list(weight.shape)
                if spec is not None:
                    shape[spec.dim] = sum(stop - start for start, stop in spec.ranges_by_rank[tp])
                tp_shards[tp] = np.empty(shape, part.dtype)
            start, _ = self.layout.extents[key, index][rank]
            tp_shards[tp].reshape([-1])[start : start + part.size] = part.reshape([-1])
        if spec is None:
            (full,) = tp_shards.values()
        else:
            full = np.empty(spec.shape, next(iter(tp_shards.values())).dtype)
            for tp, shard in tp_shards.items():
                spec.scatter_into(full, shard, tp)
        return full.T if weight.transposed else full


class PartReader:
    """Reads what other ranks hand to this one, from the file of each in the folder of parts."""

    def __init__(self, folder: str | Path):
        self.folder, self.headers = Path(folder), {}  # {sender: header}

    def read(self, sender: int, name: str) -> np.ndarray:
        path = self.folder / str(sender)
        if sender not in self.headers:
            self.headers[sender] = safetensors_header(path)
        return read_tensor(path, self.headers[sender][name])


# ============================================================================================== who writes what


def assign_writers(sizes: dict[str, int], holders: dict[str, Iterable[int]]) -> dict[str, int]:
    """{key: rank that writes it}. Greedy balance: largest tensor first, to the least-loaded rank that holds it.

    sizes: {"GROUP NAME": bytes}; holders: {key: ranks}. If every rank holds everything, the largest load is at most the
    mean plus the largest tensor; ranks that are many enough write one group each, within MAX_UNEVEN of the mean.
    """
    writers, load, groups = {}, Counter(), group_of_ranks(sizes, holders)
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        ranks = [rank for rank in holders[key] if groups.get(rank, group_of(key)) == group_of(key)] or holders[key]
        writers[key] = min(ranks, key=lambda rank: (load[rank], rank))
        load[writers[key]] += sizes[key]
    return writers


def group_of_ranks(sizes: dict[str, int], holders: dict[str, Iterable[int]]) -> dict[int, str]:
    """{rank: the one group of tensors that it writes}, of ranks that are many enough for that."""
    totals, groups = {}, {}  # totals: {ranks that hold the same tensors: {group: bytes}}
    for key, size in sizes.items():
        totals.setdefault(tuple(holders[key]), Counter())[group_of(key)] += size
    for ranks, size_of in sorted(totals.items(), key=lambda item: (-sum(item[1].values()), item[0])):
        free = [rank for rank in ranks if rank not in groups]
        if len(size_of) == 1 or len(free) < max(len(size_of), len(ranks)):
            continue
        count = dict.fromkeys(sorted(size_of), 1)
        for _ in range(len(free) - len(count)):
            count[max(count, key=lambda group: (size_of[group] / count[group], group))] += 1
        mean = sum(size_of.values()) / len(free)
        if max(size_of[group] / count[group] for group in count) <= MAX_UNEVEN * mean:
            # Spread over the ranks, so that a machine's ranks write all groups.
            order = sorted((place / count[group], group) for group in count for place in range(count[group]))
            groups |= dict(zip(free, (group for _, group in order)))
    return groups


def group_of(key: str) -> str:
    return key.partition(" ")[0]


# ============================================================================================== copies in host memory


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
