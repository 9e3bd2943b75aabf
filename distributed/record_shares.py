"""Records that the processes of one machine tokenize together: each its share, exchanged through files.

    share = RecordShare.of_run()                                # everything, in a run of one process
    for number, (place, where, record) in enumerate(reader):
        if share.has(number):
            share.add(number, place, encode(record))
    share.exchange(parts)                                       # now it holds the records of all, in the files' order

Every process reads the files, which is cheap beside tokenizing them. Records are dealt out in blocks, so the first bad
one is met as early as in a run of one process; its error ends the run, as any error does.
"""

import os
import shutil
import tempfile
from array import array
from pathlib import Path

import numpy as np

from distributed.watchdog import Watchdog, current_watchdog
from formats.files import UserError

BLOCK = 32  # records of one process before those of the next
ARRAYS = ("tokens", "sizes", "places", "numbers")


class RecordShare:
    """The records that this process tokenizes.

    tokens int32; sizes int64 (records · parts,), of a record's lists of tokens; places int64 (records · 3,); numbers
    int64 (records,), which record of the files each is; dropped {reason: [how many, the first one's number]};
    not_learned, a count of the data set, which exchange() adds up. mates: the ranks of this machine.
    """

    def __init__(self, mates: list[int] = (0,), folder: str | None = None, watchdog: Watchdog | None = None):
        self.mates, self.folder, self.watchdog = mates, folder, watchdog
        self.index = mates.index(watchdog.launch.rank if watchdog else 0)
        self.tokens, self.sizes, self.places, self.numbers = array("i"), array("q"), array("q"), array("q")
        self.dropped, self.not_learned = {}, 0

    @classmethod
    def of_run(cls) -> "RecordShare":
        """The share of this process; all processes of a run call it. Where those of a machine have no folder for
        temporary files in common, each process tokenizes everything."""
        watchdog = current_watchdog()
        hosts = [endpoint.rpartition(":")[0] for endpoint in watchdog.launch.endpoints] if watchdog else []
        if len(set(hosts)) == len(hosts):
            return cls()
        rank, folder = watchdog.launch.rank, None
        mates = [other for other, host in enumerate(hosts) if host == hosts[rank]]
        if rank == mates[0]:
            folder = _make_folder()
            watchdog.at_exit.append(lambda: shutil.rmtree(folder or "", ignore_errors=True))
        folder = watchdog.gather(folder)[mates[0]]
        reached = watchdog.gather(folder is not None and os.access(folder, os.W_OK))
        return cls(mates, folder, watchdog) if all(reached) else cls()

    def has(self, number: int) -> bool:
        """Whether this process tokenizes that record of the files."""
        return number // BLOCK % len(self.mates) == self.index

    def add(self, number: int, place: tuple[int, int, int], lists: list[list[int]] | str) -> None:
        """A record's lists of tokens, or the reason to drop it. Numbers ascend."""
        if isinstance(lists, str):
            self.dropped.setdefault(lists, [0, number])[0] += 1
            return
        for ids in lists:
            self.tokens.extend(ids)
            self.sizes.append(len(ids))
        self.places.extend(place)
        self.numbers.append(number)

    def exchange(self, parts: int) -> None:
        """Make the lists arrays, of all records of the machine's processes. parts: lists of a record. UserError: no
        room for the files."""
        for name in ARRAYS:
            setattr(self, name, np.frombuffer(getattr(self, name), np.int32 if name == "tokens" else np.int64))
        if self.watchdog is None:
            return
        try:
            for name in ARRAYS:
                np.save(self._file(name, self.index), getattr(self, name))
        except OSError as error:
            advice = "processes exchange tokenized records there: set TMPDIR to a folder with room"
            raise UserError(f"{self.folder}: {error.strerror or error}; {advice}") from None
        found = self.watchdog.gather([self.dropped, self.not_learned])
        dropped, counts = zip(*(found[mate] for mate in self.mates))
        self.dropped, self.not_learned = _add_up(dropped), sum(counts)
        shares = [{name: np.load(self._file(name, i)) for name in ARRAYS} for i in range(len(self.mates))]
        self.watchdog.barrier()
        if self.index == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        vars(self).update(in_order(shares, parts))

    def _file(self, name, index):
        return Path(self.folder) / f"{name}-{index}.npy"


def _make_folder() -> str | None:
    """A new folder for temporary files; None if there is no place for one."""
    try:
        return tempfile.mkdtemp(prefix="records-")
    except OSError:
        return None


def _add_up(dropped: list[dict]) -> dict:
    """RecordShare.dropped of each process -> of all, the reasons in the order of their first records."""
    total = {}
    for reason, (count, first) in (item for each in dropped for item in each.items()):
        old_count, old_first = total.get(reason, (0, first))
        total[reason] = [old_count + count, min(old_first, first)]
    return dict(sorted(total.items(), key=lambda item: item[1][1]))


def in_order(shares: list[dict[str, np.ndarray]], parts: int) -> dict[str, np.ndarray]:
    """ARRAYS of several processes -> those of one process that has all their records."""
    blocks = []  # (number of the first record, arrays of the records)
    for share in shares:
        numbers, sizes = share["numbers"], share["sizes"].reshape(-1, parts)
        begins = np.concatenate([[0], np.cumsum(sizes.sum(1))])  # of the records' tokens
        firsts = np.flatnonzero(np.diff(numbers // BLOCK, prepend=-1))
        for first, last in zip(firsts, [*firsts[1:], len(numbers)]):
            records = slice(first, last)
            tokens, places = share["tokens"][begins[first] : begins[last]], share["places"].reshape(-1, 3)[records]
            blocks.append((numbers[first], (tokens, sizes[records].ravel(), places.ravel(), numbers[records])))
    blocks = [arrays for _, arrays in sorted(blocks, key=lambda block: block[0])]
    return {name: np.concatenate(arrays) for name, arrays in zip(ARRAYS, zip(*blocks))} if blocks else shares[0]
