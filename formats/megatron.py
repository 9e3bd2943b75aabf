"""Megatron's token files, PREFIX.bin and PREFIX.idx, and PaddleNLP's older PREFIX_ids.npy and PREFIX_idx.npz."""

import struct
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from formats.files import UserError

# ============================== pretraining corpora ==============================
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
