"""Files of records: JSON lines, a JSON array, CSV or Parquet, also gzipped, or folders and blends of them.

reader = RecordReader("0.7 chats.jsonl 0.3 alpaca.json", "train", RecordOptions(max_samples=1000))
for place, where, record in reader:                     # where: file:line, for messages
    ...
record = reader.record(place)                           # the record again, as its file has it
"""

import codecs
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from array import array
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from formats.files import UserError, brief, names_in, parse_json_line
from formats.records import CONVERSATIONS, KNOWN_KEYS, PAIRS

# ============================== files ==============================

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".parquet")
SPLITS = {"dev": ("dev", "validation", "valid", "val", "eval")}  # other names of a split's files
PIECE = 1 << 20  # bytes of a JSON array that are read at once
CELLS = {"src", "tgt", "response", "sort", "context", "history"}  # keys whose CSV cells are JSON text


def record_files(path: str | Path, split: str = "train") -> list[Path]:
    """File -> [file]. Folder -> its train.json or another of SUFFIXES, else train-00000-of-00002.parquet and the like,
    else what is in its folder train/, else the same in its folder data/; so for "dev". UserError: none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; a file of records or a folder with {split}.json is expected")
    if files := _files_of_split(path, split) or (path / "data").is_dir() and _files_of_split(path / "data", split):
        return files
    raise UserError(
        f"{path}: none of {split}.json, {split}.jsonl, {split}/*.json in it, nor .csv, .parquet or .gz; found "
        f"{names_in(path)}"
    )


def _files_of_split(folder, split):
    """The files of a split in a folder, [] if there are none. UserError for several data sets."""
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.is_file())
    for name in SPLITS.get(split, (split,)):
        for suffix in SUFFIXES:
            if name + suffix in names:
                return [folder / (name + suffix)]
        shards = [shard for shard in names if re.match(rf"{name}[-_.]", shard)]
        sets = {re.sub(r"[-_.]\d.*|\..*", "", shard) for shard in shards}
        if len(sets) > 1:
            raise UserError(f"{folder}: {' and '.join(sorted(sets))} are several sets of files; name the files of one")
        if shards:
            return [folder / shard for shard in shards]
        if (folder / name).is_dir():
            return sorted(path for path in (folder / name).iterdir() if path.name.endswith(SUFFIXES))
    return []


def parse_sources(paths: str | Path | list) -> list[tuple[float | None, str]]:
    """A path, a list of paths, or a blend "0.7 a.jsonl 0.3 b" -> [(weight, path), …]; None: all records, once."""
    if not isinstance(paths, (str, Path)):
        return [(None, str(path)) for path in paths]
    parts = str(paths).split()
    if len(parts) < 2 or len(parts) % 2 or Path(paths).exists():
        return [(None, str(paths))]
    try:
        weights = [float(part) for part in parts[::2]]
    except ValueError:
        return [(None, str(paths))]
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"{str(paths)!r}: every weight must be a positive number")
    return [(weight / sum(weights), path) for weight, path in zip(weights, parts[1::2])]


def blend_records(sizes: list[int], weights: list[float | None], seed: int = 0) -> np.ndarray:
    """Records of each source, its share -> numbers of the records that an epoch has, int64 [sum(sizes)].

    An epoch has as many records as the sources together: source i gives weights[i] of them, all of its records as often
    as they fit and then some, drawn without replacement by `seed`. Sources are mixed evenly: record j of a source that
    gives n is due at (j + 1/2) / n. Without weights: every record once, in order."""
    starts = np.cumsum([0, *sizes])
    if None in weights:
        return np.arange(starts[-1])
    ends = np.round(np.cumsum(weights) * starts[-1]).astype(np.int64)
    numbers, due = [], []
    for i, (count, size) in enumerate(zip(np.diff(ends, prepend=0).tolist(), sizes)):
        if count and not size:
            raise UserError("a source of the blend has no records that can be learned; take it out")
        rest = np.sort(np.random.RandomState([seed, i]).permutation(size)[: count % max(size, 1)])
        numbers.append(starts[i] + np.concatenate([np.tile(np.arange(size), count // max(size, 1)), rest]))
        due.append((np.arange(count) + 0.5) / max(count, 1))
    return np.concatenate(numbers)[np.argsort(np.concatenate(due), kind="stable")].astype(np.int64)


def raw_records(file: Path, progress: bool = False) -> Iterator[tuple[int | None, int, bytes]]:
    """Yields (byte offset, line number, JSON text) of every record of a file. The offset is None where the file is not
    plain JSON lines; the line number of Parquet is that of the row. UserError names file:line."""
    from tqdm import tqdm

    file, name = Path(file), Path(file).name.lower()
    bar = tqdm(total=os.path.getsize(file), unit="B", unit_scale=True, desc=name, disable=not progress or None)
    with open(file, "rb") as stream, bar:
        try:
            text = gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else stream
            for offset, number, raw in _records_of(text, file, name.removesuffix(".gz")):
                offset = offset if text is stream else None
                yield offset, number, raw
                bar.update(stream.tell() - bar.n if offset is None else len(raw))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file}: damaged gzip file: {error}") from None


def _records_of(stream, file, name):
    if name.endswith((".csv", ".tsv")):
        return _csv_records(stream, file, "\t" if name.endswith(".tsv") else ",")
    if name.endswith(".parquet"):
        return _parquet_records(stream, file)
    head = stream.peek(256)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{file}: is UTF-16; save it as UTF-8")
    is_array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return _array_records(stream, file) if is_array else _line_records(stream)


def _line_records(stream):
    offset = 0
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield offset, number, line
        offset += len(line)


def _compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "surrogatepass")


def _array_records(stream, file):
    """The elements of a JSON array, a megabyte of text at a time."""
    scan, decode = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8-sig")("surrogatepass").decode
    text, at, line, begun = "", 0, 1, False
    between = re.compile(r"[\s,]*")
    while True:
        end = between.match(text, at).end()
        line, at = line + text.count("\n", at, end), end
        value, end = ..., at
        if not begun and text[at : at + 1] == "[":
            at, begun = at + 1, True
            continue
        if text[at : at + 1] == "]":
            if (text[at + 1 :] + stream.read(1 << 20).decode("utf-8", "replace")).strip():
                raise UserError(f"{file}:{line}: the JSON array ends here, but more text follows")
            return
        try:
            value, end = scan(text, at) if at < len(text) else (..., at)
            if value is not ... and _depth(value) > MAX_DEPTH:
                raise RecursionError
            problem = f"{file}:{line}: the JSON array does not end with ]"
        except json.JSONDecodeError as error:
            problem = f"{file}:{line + text.count(chr(10), at, error.pos)}: not JSON: {error.msg}"
        except RecursionError:
            raise UserError(f"{file}:{line}: nested more than {MAX_DEPTH} deep") from None
        if value is not ... and end < len(text):
            yield None, line, _compact(value)
            line, at = line + text.count("\n", at, end), end
            continue
        chunk = stream.read(max(PIECE, len(text) - at))
        if not chunk:
            raise UserError(problem)
        try:
            text, at = text[at:] + decode(chunk), 0
        except UnicodeDecodeError as error:
            line += text.count("\n", at) + chunk.count(b"\n", 0, error.start)
            raise UserError(f"{file}:{line}: not UTF-8: {error.reason}") from None


def _cell(key, text):
    """A CSV cell; where it is JSON text of messages or lists, what that says."""
    if key in CELLS or text[:1] in ("[", "{") and key in KNOWN_KEYS:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        items = value if isinstance(value, list) else [value]
        if _depth(value) <= MAX_DEPTH and (key in CELLS or items and all(isinstance(item, dict) for item in items)):
            return value
    return text


def _csv_records(stream, file, delimiter):
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        if len(rows.fieldnames or ()) == 1 and (other := re.search(r"[;\t|]", rows.fieldnames[0])):
            expected = "a comma is expected" + "; name the file .tsv" * (other[0] == "\t")
            raise UserError(f"{file}:1: the cells are separated by {other[0]!r}, where {expected}")
        while rows.fieldnames:  # None in an empty file
            line = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if None in row:
                raise UserError(f"{file}:{line}: more cells than the header has names; found {brief(row[None])}")
            cells = {key: _cell(key, text) for key, text in row.items() if text is not None}
            yield None, line, _compact({key: cell for key, cell in cells.items() if cell != "" or key in REQUIRED})
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{line}: not UTF-8 from here on: {error.reason}") from None
    except csv.Error as error:
        raise UserError(f"{file}:{line}: not CSV: {error}") from None


REQUIRED = {key for row in (*CONVERSATIONS, *PAIRS) for key in row.keys}  # an empty cell of these is an empty text


def _parquet_records(stream, file):
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{file}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        number = 0
        for batch in ParquetFile(stream).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield None, number, _compact(row)
    except ArrowException as error:
        raise UserError(f"{file}: cannot be read as Parquet: {' '.join(str(error).split())}") from None


# ============================== odd text ==============================

MAX_DEPTH = 100  # objects and lists inside one another


def parse_record(raw: bytes, file: str | Path, line: int) -> tuple[dict, int]:
    """JSON text of one record -> (dict, lone surrogates that became U+FFFD). UserError names file:line."""
    try:
        record = parse_json_line(raw, file, line)
        deep = raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _depth(record) > MAX_DEPTH
    except RecursionError:
        deep = True
    if deep:
        raise UserError(f"{file}:{line}: nested more than {MAX_DEPTH} deep")
    return _mend(record) if b"\\u" in raw or b"\xed" in raw else (record, 0)


def _depth(value):
    """How deep lists and objects are inside one another, up to MAX_DEPTH + 1."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [v for v in level if isinstance(v, (dict, list))]
        level = [item for v in inner for item in (v.values() if isinstance(v, dict) else v)]
        depth += bool(inner)
    return depth


def mend_text(text: str) -> tuple[str, int]:
    """(text with every lone surrogate made U+FFFD, how many they were)."""
    if not re.search("[\ud800-\udfff]", text):
        return text, 0
    mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return mended, mended.count("\ufffd") - text.count("\ufffd")


def _mend(value):
    if isinstance(value, str):
        return mend_text(value)
    if isinstance(value, dict):
        pairs = [(_mend(key), _mend(item)) for key, item in value.items()]
        return {key[0]: item[0] for key, item in pairs}, sum(key[1] + item[1] for key, item in pairs)
    if isinstance(value, list):
        items = [_mend(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    return value, 0


# ============================== reading ==============================


@dataclasses.dataclass
class RecordOptions:
    """What a run takes of its records; the keys of finetune.py and dpo.py."""

    max_samples: int | None = None  # the first so many records of each source
    val_size: float | None = None  # hold out this share (< 1) or number of the training records as dev
    columns: dict | str | None = None  # {our name: the files' name}, also as JSON text
    train_on: str = "all"  # all replies of a conversation, or the last

    @classmethod
    def of(cls, args: object) -> "RecordOptions":
        """The options among a script's arguments, checked."""
        options = cls(**{field.name: getattr(args, field.name, field.default) for field in dataclasses.fields(cls)})
        options.check()
        return options

    def dev_path(self, train_path: str, dev_path: str) -> str:
        """Where the dev data are: with val_size they are held out of the training data."""
        if self.val_size and dev_path and dev_path != train_path:
            raise UserError("val_size and dev_dataset_path are both given; choose one")
        return train_path if self.val_size else dev_path

    def check(self) -> None:
        """UserError for a value that cannot be; makes columns a dict."""
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"max_samples: {self.max_samples}; it must be at least 1")
        size = self.val_size
        if size is not None and (not 0 < size < float("inf") or size >= 1 and size != int(size)):
            raise UserError(f"val_size: {size}; a share between 0 and 1 or a whole number of records is needed")
        if self.train_on not in ("all", "last"):
            raise UserError(f"train_on: {self.train_on!r}; possible are all and last")
        columns = self.columns or {}
        try:
            columns = json.loads(columns) if isinstance(columns, str) else columns
        except ValueError as error:
            raise UserError(f"columns: not JSON: {error}; found {columns[:60]!r}") from None
        if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
            expected = '{"instruction": "question", "output": "answer"}: our name, the name in the file'
            raise UserError(f"columns: {brief(columns)}; needed is a JSON object like {expected}")
        for key in columns:
            if key not in KNOWN_KEYS:
                near = get_close_matches(key, KNOWN_KEYS, 1) or list(KNOWN_KEYS)
                raise UserError(f"columns: {key!r} is no key of a format; did you mean {', '.join(near)}?")
        self.columns = columns


class RecordReader:
    """The records of some files, read from the first to the last, and any of them again by its place.

    A place is (file number, byte offset, line number), int64 [3]; records of files that are not plain JSON lines are
    kept as compact JSON. With val_size, "train" has the training files' records but those held out, and "dev" these: by
    a hash of the record with its keys sorted, so that a record never changes sides and equal records are on one.
    .replaced counts lone surrogates made U+FFFD; after the last file a line says it, unless says_replaced is false."""

    def __init__(
        self,
        paths: str | Path | list,
        split: str = "train",
        options: RecordOptions | None = None,
        progress: bool = False,
        says_replaced: bool = True,
    ):
        self.options, self.progress, self.says_replaced = options or RecordOptions(), progress, says_replaced
        self.options.check()
        sources = parse_sources(paths)
        self.holds_out = self.options.val_size is not None and split in ("train", "dev")
        if self.holds_out:
            self._refuse_dev_files(sources)
        self.wants_held_out = self.holds_out and split == "dev"
        files = [record_files(path, "train" if self.holds_out else split) for _, path in sources]
        self.weights = [weight if split in ("train", "quant") else None for weight, _ in sources]
        self.files = [file for group in files for file in group]
        self.source_of_file = np.repeat(np.arange(len(files)), [len(group) for group in files])
        self.replaced, self._kept, self._files_kept, self._seen = 0, bytearray(), set(), set()

    def _refuse_dev_files(self, sources):
        for path in (Path(path) for _, path in sources):
            if path.is_dir():
                for folder in (path, path / "data"):
                    if folder.is_dir() and (found := _files_of_split(folder, "dev")):
                        raise UserError(f"val_size: {path} has dev data, {found[0].name}; give one of the two")

    def _raw(self):
        """Yields (file number, byte offset or None, line number, JSON text, record)."""
        taken = 0
        for number, file in enumerate(self.files):
            if number and self.source_of_file[number] != self.source_of_file[number - 1]:
                taken = 0
            for offset, line, raw in raw_records(file, self.progress):
                if taken == self.options.max_samples:
                    break
                record, replaced = parse_record(raw, file, line)
                self.replaced, taken = self.replaced + replaced, taken + 1
                yield number, offset, line, raw, record

    def _threshold(self):
        """The greatest digest of a record that is held out."""
        size = self.options.val_size
        if size < 1:
            return int(size * 2**64)
        digests = np.frombuffer(array("Q", (record_digest(record) for *_, record in self._raw())), np.uint64)
        if size >= len(digests):
            raise UserError(f"val_size: {int(size)} of {len(digests)} records leaves none to train on; lower it")
        self.replaced = 0
        return int(np.partition(digests, int(size) - 1)[int(size) - 1])

    def __iter__(self) -> Iterator[tuple[tuple, str, dict]]:
        """Yields (place, "file:line", record with its columns renamed)."""
        threshold = self._threshold() if self.holds_out else None
        for number, offset, line, raw, record in self._raw():
            if threshold is not None and (record_digest(record) <= threshold) != self.wants_held_out:
                continue
            if offset is None:
                offset = len(self._kept)
                self._kept += raw.strip() + b"\n"
                self._files_kept.add(number)
            yield (number, offset, line), f"{self.files[number]}:{line}", self.rename(record)
        if unused := [name for name in self.options.columns.values() if name not in self._seen] if self._seen else []:
            raise UserError(f"columns: no record of {self.files[0]} has a key {unused[0]!r}")
        if self.replaced and self.says_replaced:
            print(f"{self.files[0]}: {self.replaced:,} lone surrogates became U+FFFD", flush=True)

    def rename(self, record: dict) -> dict:
        """The record under our names, as `columns` maps them."""
        if not self.options.columns:
            return record
        self._seen.update(record)
        named = {ours: record[theirs] for ours, theirs in self.options.columns.items() if theirs in record}
        return {key: value for key, value in record.items() if key not in self.options.columns.values()} | named

    def record(self, place: np.ndarray) -> dict:
        """The record that stands there, as the file has it."""
        number, offset, line = (int(v) for v in place)
        file = self.files[number]
        if number in self._files_kept:
            raw = bytes(self._kept[offset : self._kept.index(b"\n", offset)])
        else:
            with open(file, "rb") as stream:
                stream.seek(offset)
                raw = stream.readline()
        return parse_record(raw, file, line)[0]


def with_reply(record: dict, reply: str) -> dict:
    """The record and, last, the model's reply as "output"; an output of its own, as Alpaca's, becomes "reference"."""
    kept = {"reference" if key == "output" else key: value for key, value in record.items()}
    return {**kept, "output": reply}


def record_digest(record: dict) -> int:
    """64 bits of a hash of the record, whatever the order of its keys."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"held out").digest(), "big")
