"""Megatron's token files, PREFIX.bin and PREFIX.idx: read, and built from text. PaddleNLP's older PREFIX_ids.npy and
PREFIX_idx.npz are read too.

    documents, tokens = build_corpus("corpus.jsonl", "demo/llama", "data/corpus", workers=2)
    corpus = Corpus("data/corpus")             # memory-mapped; document d is corpus.tokens[bounds[d] : bounds[d + 1]]
"""

import gzip
import os
import struct
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from formats.files import UserError, brief
from formats.record_files import SUFFIXES, parse_record, raw_records
from formats.tokenizer import Tokenizer, load_tokenizer

# ============================== reading ==============================
# PREFIX.bin: tokens of all documents, one after another. PREFIX.idx, little endian: magic, u64 version 1, u8 dtype
# code, u64 number of sequences, u64 length of doc_idx, int32 sizes[sequences], int64 pointers[sequences] (bytes into
# .bin), int64 doc_idx (sequence at which each document starts, last = all).

MAGIC = b"MMIDIDX\x00\x00"


DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32, 10: np.uint64}


def index_bytes(dtype: type, sizes: np.ndarray) -> bytes:
    """Header and arrays of the .idx of documents with these token counts (one sequence each)."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    sizes = np.asarray(sizes, "<i4")
    pointers = np.zeros(len(sizes), "<i8")
    np.cumsum(sizes[:-1].astype(np.int64) * np.dtype(dtype).itemsize, out=pointers[1:])
    header = MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    return header + sizes.tobytes() + pointers.tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes()


def read_index(path: Path) -> tuple[type, np.ndarray, np.ndarray]:
    """.idx -> (dtype, sizes int32 [sequences], doc_idx int64 [documents + 1]). UserError: not one, cut off, gaps."""
    raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    if raw[:9].tobytes() != MAGIC or len(raw) < 34:
        raise UserError(f"{path}: not a Megatron index: it must begin with {MAGIC!r}, found {raw[:9].tobytes()!r}")
    version, code, count, documents = struct.unpack("<QBQQ", raw[9:34].tobytes())
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{path}: version {version}, dtype code {code}; version 1 and one of {list(DTYPES)} are expected"
        )
    if len(raw) != 34 + 12 * count + 8 * documents:
        raise UserError(f"{path}: {len(raw)} bytes, not {34 + 12 * count + 8 * documents} as its header says: cut off")
    sizes = raw[34 : 34 + 4 * count].view("<i4")
    pointers = raw[34 + 4 * count : 34 + 12 * count].view("<i8")
    doc_idx = raw[34 + 12 * count :].view("<i8")
    ends = np.cumsum(sizes, dtype=np.int64) * np.dtype(DTYPES[code]).itemsize
    if count and not (pointers[0] == 0 and np.array_equal(pointers[1:], ends[:-1])):
        raise UserError(f"{path}: its sequences do not follow one another without gaps; write the corpus again")
    return DTYPES[code], sizes, doc_idx


class Corpus:
    """One prefix: memory-mapped tokens and where each document starts. Only the pages that are asked for are read.

    PREFIX_ids.npy + PREFIX_idx.npz (PaddleNLP's older form: lens, docs) is taken before PREFIX.bin + PREFIX.idx, as
    upstream does."""

    def __init__(self, prefix):
        self.prefix = str(prefix)
        ids, npz, idx, data = (Path(self.prefix + end) for end in ("_ids.npy", "_idx.npz", ".idx", ".bin"))
        if npz.is_file() and ids.is_file():
            try:
                self.tokens, arrays = np.load(ids, mmap_mode="r"), np.load(npz)
                sizes, doc_idx = arrays["lens"], arrays["docs"].astype(np.int64)
            except (OSError, ValueError, KeyError, BadZipFile) as error:
                raise UserError(f"{npz} and {ids.name} cannot be read as lens, docs and tokens: {error}") from None
        elif idx.is_file() and data.is_file():
            dtype, sizes, doc_idx = read_index(idx)
            size, promised = data.stat().st_size, int(np.sum(sizes, dtype=np.int64)) * np.dtype(dtype).itemsize
            if size != promised:
                raise UserError(f"{data}: {size} bytes, {idx.name} promises {promised}: cut off or of another corpus")
            self.tokens = np.memmap(data, dtype, "r") if size else np.zeros(0, dtype)
        else:
            raise UserError(f"{prefix}: neither its .bin with .idx nor its _ids.npy with _idx.npz is there")
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        fits = len(doc_idx) and doc_idx[0] == 0 and doc_idx[-1] == len(sizes) and np.all(np.diff(doc_idx) >= 0)
        if not fits or ends[-1] != len(self.tokens):
            raise UserError(
                f"{prefix}: its document boundaries do not fit its {len(sizes)} sequences and "
                f"{len(self.tokens)} tokens; write the corpus again"
            )
        self.bounds = ends[doc_idx]  # (documents + 1,): document d is tokens[bounds[d]:bounds[d + 1]]


# ============================== building ==============================


CORPUS_SUFFIXES = (".txt", ".txt.gz", *SUFFIXES)


def corpus_files(path: str | Path) -> list[Path]:
    """A file of CORPUS_SUFFIXES -> [file]; a folder -> its files of these kinds, by name. UserError: none."""
    path, kinds = Path(path), "a .jsonl, .json, .csv, .tsv, .parquet or .txt, or a folder of them"
    if path.is_dir():
        if files := sorted(file for file in path.iterdir() if file.name.lower().endswith(CORPUS_SUFFIXES)):
            return files
        raise UserError(f"{path}: no text in this folder; expected is {kinds}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected is {kinds}")
    if not path.name.lower().endswith(CORPUS_SUFFIXES):
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; expected is {kinds}")
    return [path]


def read_documents(path: str | Path) -> Iterator[tuple]:
    """Yields (file, chunk): lists of (line number, bytes) of about a megabyte: records, or the paragraphs of a .txt."""
    for file in corpus_files(path):
        is_text = file.name.lower().removesuffix(".gz").endswith(".txt")
        documents = _paragraphs(file) if is_text else (row[1:] for row in raw_records(file))
        chunk, size = [], 0
        for number, raw in documents:
            chunk.append((number, raw))
            size += len(raw)
            if size > 1 << 20 or len(chunk) >= 1024:
                yield file, chunk
                chunk, size = [], 0
        if chunk:
            yield file, chunk


def _paragraphs(file):
    """Yields (number of its first line, bytes) of every paragraph of a .txt or .txt.gz, without a BOM."""
    paragraph, begin = [], 1
    with gzip.open(file) if file.suffix.lower() == ".gz" else open(file, "rb") as stream:
        try:
            for number, line in enumerate(stream, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    begin = begin if paragraph else number
                    paragraph.append(line)
                elif paragraph:
                    yield begin, b"".join(paragraph)
                    paragraph = []
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file}: damaged gzip file: {error}") from None
    if paragraph:
        yield begin, b"".join(paragraph)


@lru_cache(maxsize=1)
def cached_tokenizer(path: str | Path) -> Tokenizer:
    """A worker process loads its tokenizer once."""
    return load_tokenizer(path)


def encode_documents(
    file_and_chunk: tuple, tokenizer_path: str, json_key: str, append_eos: bool, dtype: type
) -> tuple[bytes, array, int]:
    """What read_documents yields -> (tokens as bytes, tokens per document, lone surrogates that became U+FFFD). Runs in
    a worker. UserError names file:line."""
    tokenizer, tokens, sizes, replaced = cached_tokenizer(tokenizer_path), [], array("i"), 0
    path, chunk = file_and_chunk
    for number, raw in chunk:
        if path.name.lower().removesuffix(".gz").endswith(".txt"):
            try:
                text = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number + raw[: error.start].count(10)}: not UTF-8: {error.reason}") from None
        else:
            record, count = parse_record(raw, path, number)
            replaced += count
            text = record.get(json_key)
            if not isinstance(text, str):
                raise UserError(f"{path}:{number}: key {json_key!r} must be there and a string; found {brief(record)}")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids:  # an empty text is no document
            ids += [tokenizer.eos_token_id] if append_eos else []
            tokens.append(np.array(ids, dtype).tobytes())
            sizes.append(len(ids))
    return b"".join(tokens), sizes, replaced


def ordered_map(executor: ProcessPoolExecutor, function: Callable, chunks: Iterator, window: int) -> Iterator:
    """Like executor.map, but never more than `window` chunks ahead of the reader: the corpus is not in memory."""
    waiting = deque()
    for chunk in chunks:
        waiting.append((chunk, executor.submit(function, chunk)))
        if len(waiting) >= window:
            done, result = waiting.popleft()
            yield done, result.result()
    while waiting:
        done, result = waiting.popleft()
        yield done, result.result()


def _write_corpus(results, files, path, dtype):
    """(file and chunk, what encode_documents makes of it) … -> both files, flushed to disk; tokens per document."""
    from tqdm import tqdm

    sizes, replaced = array("i"), 0
    total = sum(file.stat().st_size for file in corpus_files(path))
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing")
    with open(files[".bin"], "wb") as stream, bar:
        for (_, chunk), (tokens, counts, count) in results:
            stream.write(tokens)
            sizes.extend(counts)
            replaced += count
            bar.update(sum(len(raw) for _, raw in chunk))
        stream.flush()
        os.fsync(stream.fileno())
    if not sizes:
        raise UserError(f"{path}: no text in it")
    if replaced:
        print(f"{path}: {replaced:,} lone surrogates became U+FFFD", flush=True)
    with open(files[".idx"], "wb") as stream:
        stream.write(index_bytes(dtype, sizes))
        stream.flush()
        os.fsync(stream.fileno())
    return sizes


def build_corpus(
    path: str | Path,
    tokenizer_path: str,
    output: str,
    workers: int = 1,
    json_key: str = "text",
    append_eos: bool = True,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Text -> output.bin and output.idx; documents in input order whatever `workers` is. -> (documents, tokens).

    Written under temporary names, flushed to disk, then renamed, the index last: a prefix with an index is complete.
    uint16 when the vocabulary is smaller than 65,535, else int32. UserError: missing or empty input, a bad line
    (file:line), an output that is there already."""
    path, output = Path(path), str(output)
    names = {end: Path(output + end) for end in (".bin", ".idx")}
    corpus_files(path)
    if not overwrite and (found := [str(name) for name in names.values() if name.exists()]):
        raise UserError(f"{' and '.join(found)}: already there; give another --output, or --overwrite true")
    tokenizer = cached_tokenizer(str(tokenizer_path))
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer_path}: the tokenizer has no eos token to append; give --append_eos false")
    dtype = np.uint16 if tokenizer.vocab_size < 65535 else np.int32
    encode = partial(
        encode_documents,
        tokenizer_path=str(tokenizer_path),
        json_key=json_key,
        append_eos=append_eos,
        dtype=dtype,
    )
    names[".bin"].parent.mkdir(parents=True, exist_ok=True)
    temporary = {end: Path(f"{output}{end}.tmp-{os.getpid()}") for end in names}
    # spawn: a fork of a process that has threads (tqdm's, the caller's) may hang
    executor = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    try:
        chunks = read_documents(path)
        results = ordered_map(executor, encode, chunks, 2 * workers) if executor else ((c, encode(c)) for c in chunks)
        sizes = _write_corpus(results, temporary, path, dtype)
        names[".idx"].unlink(missing_ok=True)  # with --overwrite: never an old index beside new tokens
        for end in (".bin", ".idx"):
            os.replace(temporary[end], names[end])
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)
        for name in temporary.values():
            name.unlink(missing_ok=True)
    return len(sizes), int(np.sum(np.frombuffer(sizes, np.int32), dtype=np.int64))
