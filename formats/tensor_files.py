"""Tensor files: safetensors, .bin and .pdparams; all names at once, tensors one at a time.

    header = safetensors_header(path)                    # {name: TensorEntry(dtype, shape, begin, end)}
    array = read_tensor(path, header["lm_head.weight"])  # numpy; float16 and bfloat16 as float32
    lazy = LazyTensor(path, header["lm_head.weight"])
    rows = lazy.read_slices({0: [(0, 100)]})             # its first 100 rows; no other bytes are read
    write_safetensors(path, {"a": array, "b": (function, [7, 5], "bfloat16")})    # complete, or not there
    array = BinFile(path).read(name)                     # pytorch_model.bin
    array = read_pdparams(path)[name].read()             # model_state.pdparams

.bin and .pdparams are pickles: restricted unpicklers read them, which refuse everything but tensors and run nothing.
A file that is damaged, truncated or of another kind is a UserError that names file and tensor.
"""

import functools
import itertools
import json
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.files import UserError, atomic_file, brief, refuse_lfs_pointer

# =========================================================================================== safetensors

_SAFETENSORS = {  # name of a dtype in the file: numpy's; bfloat16 is read as its bits
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F64": "<f8",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "|b1",
    "F8_E4M3": "<u1",  # read as its bits, like bfloat16
    "F8_E5M2": "<u1",
}


class TensorEntry(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    dtype: str  # a key of _SAFETENSORS
    shape: list[int]
    begin: int  # bytes from the start of the file
    end: int

    @property
    def kind(self) -> np.dtype:
        """The numpy dtype of its elements in the file."""
        return np.dtype(_SAFETENSORS[self.dtype])


class StoredTensor(NamedTuple):
    """A tensor of any weight file: a function that reads it (a LazyTensor for safetensors), and its shape."""

    read: Callable[[], np.ndarray]
    shape: list[int]


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits, rounded to nearest even (NaN stays NaN)."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def safetensors_header(path: str | Path) -> dict[str, TensorEntry]:
    """{name: TensorEntry} of a file, checked against the file's length."""
    path, file_size = Path(path), os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= file_size - 8:
            refuse_lfs_pointer(path)
            raise UserError(
                f"{path}: not a complete safetensors file: {file_size} bytes, its header should take {length}"
            )
        text = file.read(length)
    base = 8 + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {}
        for name, value in header.items():
            begin, end = value["data_offsets"][0], value["data_offsets"][1]
            entries[name] = TensorEntry(value["dtype"], value["shape"], base + begin, base + end)
            if not are_counts([begin, end, *value["shape"]]):
                raise ValueError
        counts = {name: math.prod(entry.shape) for name, entry in entries.items()}
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
        raise UserError(f"{path}: the safetensors header is damaged") from None
    for name, entry in entries.items():
        if not isinstance(entry.dtype, str) or entry.dtype not in _SAFETENSORS:
            raise UserError(f"{path}: tensor {name} has dtype {entry.dtype}; readable are {', '.join(_SAFETENSORS)}")
        if entry.end > file_size:
            raise UserError(f"{path}: truncated: tensor {name} ends at byte {entry.end}, the file has {file_size}")
        size = entry.end - entry.begin
        if entry.begin < base or size != counts[name] * entry.kind.itemsize:
            raise UserError(
                f"{path}: the safetensors header is damaged: tensor {name}, {entry.dtype} of shape {entry.shape}, "
                f"has {size} bytes"
            )
    _refuse_overlaps(path, entries)
    return entries


def are_counts(values: list) -> bool:
    """Whether all are whole numbers from 0 on."""
    return all(type(value) is int and value >= 0 for value in values)


def _refuse_overlaps(path: Path, entries: dict[str, TensorEntry]) -> None:
    """UserError where two tensors have bytes in common: the file says of one what the other is."""
    before, end = None, 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end and entry.begin < entry.end:
            raise UserError(f"{path}: the safetensors header is damaged: {before} and {name} share bytes")
        if entry.end > end:
            before, end = name, entry.end


def safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The file's own key-value pairs, {} if it has none."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length)).get("__metadata__") or {}


def read_tensor(path: str | Path, entry: TensorEntry) -> np.ndarray:
    """One tensor of a safetensors file; float16 and bfloat16 become float32.

    It is read, not mapped: a mapped file would count as memory of this process.
    """
    array = np.fromfile(path, entry.kind, (entry.end - entry.begin) // entry.kind.itemsize, offset=entry.begin)
    return _as_float32(array, entry.dtype).reshape(entry.shape)


class LazyTensor:
    """A tensor of a safetensors file: a call reads all of it, read_slices() only the rows and columns asked for.

    bytes_read: by all LazyTensors of this process.
    """

    bytes_read = 0

    def __init__(self, path: str | Path, entry: TensorEntry):
        self.path, self.entry = path, entry

    def __call__(self) -> np.ndarray:
        LazyTensor.bytes_read += self.entry.end - self.entry.begin
        return read_tensor(self.path, self.entry)

    def read_slices(self, slices: dict[int, list[tuple[int, int]]]) -> np.ndarray:
        """slices: {dim: [(start, stop), …]}; along each dim these ranges are read and concatenated, other dims whole.

        Ranges of the last dim named are contiguous in the file; each is one read, for every index of the dims before
        it.
        """
        shape, kind, last_dim = self.entry.shape, self.entry.kind, max(slices)
        slices = {dim: slices.get(dim, [(0, size)]) for dim, size in enumerate(shape)}
        result = np.empty([sum(stop - start for start, stop in ranges) for ranges in slices.values()], kind)
        inner = math.prod(result.shape[last_dim + 1 :]) * kind.itemsize  # bytes per index of last_dim
        buffer, filled = memoryview(result.reshape([-1]).view(np.uint8)), 0
        outer = [[i for start, stop in slices[dim] for i in range(start, stop)] for dim in range(last_dim)]
        with open(self.path, "rb", buffering=0) as file:
            for index in itertools.product(*outer):
                row = functools.reduce(lambda row, step: row * step[1] + step[0], zip(index, shape), 0)
                for start, stop in slices[last_dim]:
                    size = (stop - start) * inner
                    position = self.entry.begin + (row * shape[last_dim] + start) * inner
                    self._read_into(file, buffer[filled : filled + size], position)
                    filled += size
        LazyTensor.bytes_read += result.nbytes
        return _as_float32(result, self.entry.dtype)

    def _read_into(self, file, buffer: memoryview, position: int) -> None:
        """Fill the buffer from this byte of the file on; one call of preadv may read less than asked for."""
        filled = 0
        while filled < len(buffer):
            count = os.preadv(file.fileno(), [buffer[filled:]], position + filled)
            if not count:
                raise UserError(f"{self.path}: truncated at byte {position + filled}")
            filled += count


@functools.cache
def float8_values(exponent_bits: int) -> np.ndarray:
    """(256,) float32: e4m3 (finite but for 0x7F and 0xFF) with 4 bits of exponent, e5m2 (as IEEE) with 5."""
    if exponent_bits == 5:
        return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values = np.where(bits < 128, size, -size)
    values[[127, 255]] = np.nan
    return values.astype(np.float32)


def _as_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """float16, bfloat16 and float8 (as they lie in the file) as float32; other dtypes unchanged."""
    if dtype == "BF16":
        return from_bfloat16(array)
    if dtype.startswith("F8"):
        return float8_values(int(dtype[4]))[array]
    return array.astype(np.float32) if dtype == "F16" else array


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file."""
    return {name: read_tensor(path, entry) for name, entry in safetensors_header(path).items()}


def write_safetensors(path: str | Path, tensors: dict, metadata: dict | None = None, sync: bool = True) -> dict:
    """Write {name: array, or (function that returns it, shape, dtype)} to `path`, atomically; functions are called one
    at a time, so one tensor is in memory at a time.

    dtype: "float32", "int8", …; "bfloat16" and "float16" convert what the function returns; of "F8_E4M3" it returns
    the bits. metadata: the file's own key-value pairs. sync: wait until the disk has it. Returns {"size", "crc32"} of
    the file.
    """
    names = {np.dtype(kind): name for name, kind in _SAFETENSORS.items() if name[:2] not in ("BF", "F8")}
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, value in tensors.items():
        shape, kind = value[1:] if isinstance(value, tuple) else (value.shape, value.dtype)
        code = "BF16" if kind == "bfloat16" else kind if kind == "F8_E4M3" else names[np.dtype(kind)]
        size = int(np.prod(shape)) * np.dtype(_SAFETENSORS[code]).itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    start = struct.pack("<Q", len(text)) + text
    size, checksum = len(start) + offset, zlib.crc32(start)
    with atomic_file(path, "wb", sync) as file:
        file.write(start)
        for name, value in tensors.items():
            array = value[0]() if isinstance(value, tuple) else value
            if header[name]["dtype"] == "BF16":
                array = to_bfloat16(array)
            array = to_contiguous(array, _SAFETENSORS[header[name]["dtype"]])
            assert array.nbytes == np.diff(header[name]["data_offsets"])[0], (name, array.shape, header[name])
            file.write(array.data)
            checksum = zlib.crc32(array.reshape([-1]).view(np.uint8), checksum)
    return {"size": size, "crc32": checksum}


def to_contiguous(array: np.ndarray, dtype: str | None = None) -> np.ndarray:
    """The array in C order. A transposed matrix is copied 16 of its columns at a time: five times as fast."""
    if array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous:
        result, original = np.empty(array.shape, array.dtype), array.T
        for i in range(0, len(original), 16):
            result[:, i : i + 16] = original[i : i + 16].T
        array = result
    return np.ascontiguousarray(array, dtype)


# ================================================================================================= .bin (torch)


class _BinTensor(NamedTuple):
    """What the pickle of a .bin file says of a tensor; offset, size and stride count elements."""

    storage: str  # a key of _TensorUnpickler.storages
    where: str  # name of the storage's file inside the zip
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_sound(self) -> bool:
        """Whether the fields, which come from a pickle, are of these types."""
        lists = isinstance(self.size, tuple) and isinstance(self.stride, tuple) and len(self.size) == len(self.stride)
        names = isinstance(self.storage, str) and isinstance(self.where, str)
        return lists and names and all(type(n) is int for n in (self.offset, *self.size, *self.stride))


class _TensorUnpickler(pickle.Unpickler):
    """Reads the pickle of a torch .bin file: tensors in dicts and lists. All else is refused; nothing is run."""

    storages = {
        "FloatStorage": "<f4",
        "HalfStorage": "<f2",
        "BFloat16Storage": "<u2",
        "DoubleStorage": "<f8",
        "LongStorage": "<i8",
        "IntStorage": "<i4",
        "CharStorage": "<i1",
        "ByteStorage": "<u1",
        "BoolStorage": "?",
    }

    def __init__(self, file, path):
        super().__init__(file)
        self.path = path

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _BinTensor(*storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in self.storages:
            return name
        raise UserError(f"{self.path}: refused: the pickle asks for {module}.{name}; only tensors are read")

    def persistent_load(self, key):
        kind, storage, where = key[:3]
        assert kind == "storage"
        return storage, where


class BinFile:
    """pytorch_model.bin, the zip format of torch >= 1.6. entries: {name: _BinTensor}; read(name): one tensor, numpy."""

    def __init__(self, path: str | Path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
            pickles = [n for n in self.zip.namelist() if n.endswith("data.pkl")]
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError):
            refuse_lfs_pointer(path)
            raise UserError(
                f"{path}: not a torch zip file, or a truncated one; save it again with torch >= 1.6"
            ) from None
        if len(pickles) != 1:
            raise UserError(f"{path}: no data.pkl inside; not a torch checkpoint")
        self.folder = pickles[0][: -len("data.pkl")]
        for entry in self.zip.infolist():  # torch writes them as they are: 7 MB of zip could hold 10 GB
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise UserError(f"{path}: refused: {entry.filename} is compressed; save it again with torch")
        try:
            with self.zip.open(pickles[0]) as file:
                loaded = _TensorUnpickler(file, path).load()
        except UserError:
            raise
        except Exception as error:  # a damaged zip or pickle can raise anything
            raise UserError(f"{path}: refused: not a plain dict of tensors ({type(error).__name__})") from None
        entries = dict(loaded) if isinstance(loaded, dict) else None
        if entries is None or not all(isinstance(v, _BinTensor) for v in entries.values()):
            raise UserError(f"{path}: refused: not a plain dict of tensors")
        for name, tensor in entries.items():
            if not isinstance(name, str) or not tensor.is_sound:
                raise UserError(f"{path}: refused: {brief(name)} is not a tensor with a name, a size and strides")
        self.entries = entries

    def read(self, name: str) -> np.ndarray:
        """float16 and bfloat16 become float32."""
        tensor = self.entries[name]
        size, stride = tensor.size, tensor.stride
        try:
            dtype = np.dtype(_TensorUnpickler.storages[tensor.storage])
            flat = np.frombuffer(self.zip.read(f"{self.folder}data/{tensor.where}"), dtype)
        except (KeyError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{self.path}: the storage of tensor {name} is missing or damaged") from None
        strides = [s * dtype.itemsize for s in stride]
        reach = tensor.offset + sum((n - 1) * s for n, s in zip(size, stride)) + 1
        if min((tensor.offset, *size, *stride)) < 0 or 0 not in size and reach > len(flat):
            raise UserError(f"{self.path}: tensor {name} reaches past the end of its storage")
        array = np.lib.stride_tricks.as_strided(flat[tensor.offset :], size, strides)
        if tensor.storage == "BFloat16Storage":
            return from_bfloat16(array)
        return array.astype(np.float32) if tensor.storage == "HalfStorage" else array.copy()


# =========================================================================================== .pdparams (Paddle)


class _ByteRange(NamedTuple):
    """Bytes of a file that the unpickler has skipped, to be read when the tensor is."""

    offset: int
    size: int


class _PickledArray:
    """What the pickle says of a numpy array; data: bytes, or a _ByteRange."""

    shape = dtype = data = None

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state

    @property
    def is_sound(self) -> bool:
        """Whether the fields, which come from a pickle, are of their types."""
        code = getattr(self.dtype, "code", None)
        is_readable = isinstance(code, str) and code in _PADDLE_DTYPES and isinstance(self.data, (bytes, _ByteRange))
        return is_readable and isinstance(self.shape, tuple) and are_counts(self.shape)


class _PickledDtype:
    """What the pickle says of a numpy dtype; the byte order is taken as little-endian."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass


class _PaddleUnpickler(pickle._Unpickler):
    """Reads a state dict that paddle.save() wrote: arrays, alone or as (name, array). All else is refused; nothing is
    run.

    It extends pickle's pure-Python unpickler, which can be made to skip the bytes of large arrays: they are read later,
    one tensor at a time.
    """

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _PickledDtype,
        ("builtins", "tuple"): tuple,
        ("__builtin__", "tuple"): tuple,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
    }
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, path):
        super().__init__(file)
        self.file, self.path = file, path

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise UserError(f"{self.path}: refused: the pickle asks for {module}.{name}; only arrays are read")
        return self.allowed[module, name]

    def load_bytes(self, width):  # opcodes BINBYTES and BINBYTES8: a length of `width` bytes, then the bytes
        size = int.from_bytes(self.read(width), "little")
        if size < 1 << 16 or self._unframer.current_frame is not None:
            self.append(self.read(size))
        else:
            self.append(_ByteRange(self.file.tell(), size))
            self.file.seek(size, 1)

    dispatch[pickle.BINBYTES[0]] = lambda self: self.load_bytes(4)
    dispatch[pickle.BINBYTES8[0]] = lambda self: self.load_bytes(8)


_PADDLE_DTYPES = {  # code of a dtype in the pickle: numpy's; bfloat16 lies there as uint16
    "f4": "<f4",
    "f2": "<f2",
    "f8": "<f8",
    "u2": "<u2",
    "i8": "<i8",
    "i4": "<i4",
    "i1": "<i1",
    "u1": "<u1",
}


def read_pdparams(path: str | Path) -> dict[str, StoredTensor]:
    """{name: StoredTensor} of a file that paddle.save() wrote; float16 and bfloat16 are read as float32."""
    with open(path, "rb") as file:
        try:
            state_dict = _PaddleUnpickler(file, path).load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            refuse_lfs_pointer(path)
            kind = type(error).__name__
            raise UserError(f"{path}: not a complete file of paddle.save(): {kind} while it was read") from None
    if not isinstance(state_dict, dict):
        raise UserError(f"{path}: refused: holds a {type(state_dict).__name__}, not a dict of tensors")
    tensors = {}
    for name, value in state_dict.items():
        if name == "StructuredToParameterName@@":  # a list of Paddle's own names
            continue
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
        if not isinstance(name, str) or not isinstance(array, _PickledArray) or not array.is_sound:
            shown = name if isinstance(name, str) else brief(name)
            raise UserError(f"{path}: refused: {shown} is not a tensor of {', '.join(_PADDLE_DTYPES)}")
        tensors[name] = StoredTensor(functools.partial(_read_pickled, path, name, array), list(array.shape))
    return tensors


def _read_pickled(path: str | Path, name: str, array: _PickledArray) -> np.ndarray:
    data, dtype = array.data, _PADDLE_DTYPES[array.dtype.code]
    if isinstance(data, _ByteRange):
        values = np.fromfile(path, dtype, data.size // np.dtype(dtype).itemsize, offset=data.offset)
    else:
        values = np.frombuffer(data, dtype)
    if len(values) != math.prod(array.shape):
        raise UserError(f"{path}: tensor {name} of shape {list(array.shape)} is truncated: {len(values)} values")
    if array.dtype.code == "u2":
        values = from_bfloat16(values)
    elif array.dtype.code == "f2":
        values = values.astype("<f4")
    return values.reshape(array.shape, order="F" if array.fortran else "C")
