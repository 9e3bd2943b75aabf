"""Tensor files: safetensors, .bin and .pdparams; names at once, tensors one at a time."""

import functools
import itertools
import json
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np

from formats.files import UserError, atomic_file

# ============================================================================== tensor files on disk

_SAFETENSORS = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F64": "<f8",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "<i1",
    "U8": "<u1",
}


def from_bfloat16(bits):
    """uint16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(array):
    """float32 -> uint16 bits, to nearest even (NaN stays NaN)."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def safetensors_header(path):
    """{name: (dtype, shape, first byte, last byte)} of a file, checked against its length."""
    path, size = Path(path), os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(f"{path}: not a complete safetensors file: {size} bytes, its header should take {length}")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: the safetensors header is damaged") from None
    base = 8 + length
    try:
        header.pop("__metadata__", None)
        entries = {
            n: (e["dtype"], e["shape"], base + e["data_offsets"][0], base + e["data_offsets"][1])
            for n, e in header.items()
        }
        counts = {n: math.prod(shape) for n, (_, shape, _, _) in entries.items()}
    except (AttributeError, TypeError, KeyError, IndexError):
        raise UserError(f"{path}: the safetensors header is damaged") from None
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in _SAFETENSORS:
            raise UserError(f"{path}: tensor {name} has dtype {dtype}; readable are {', '.join(_SAFETENSORS)}")
        if end > size:
            raise UserError(f"{path}: truncated: tensor {name} ends at byte {end}, the file has {size}")
        if begin < base or end - begin != counts[name] * np.dtype(_SAFETENSORS[dtype]).itemsize:
            raise UserError(
                f"{path}: the safetensors header is damaged: tensor {name}, {dtype} of shape {shape}, has {end - begin} bytes"
            )
    return entries


def read_tensor(path, entry):
    """One tensor of a safetensors file as numpy; float16 and bfloat16 become float32.

    Read, not mapped: a mapped file would count as memory of this process.
    """
    dtype, shape, begin, end = entry
    array = np.fromfile(
        path, _SAFETENSORS[dtype], (end - begin) // np.dtype(_SAFETENSORS[dtype]).itemsize, offset=begin
    )
    return _as_float32(array, dtype).reshape(shape)


class LazyTensor:
    """A tensor of a safetensors file: called, it is read whole; ranges() reads no more than it is asked for.

    bytes_read: by all of them in this process.
    """

    bytes_read = 0

    def __init__(self, path, entry):
        self.path, self.entry = path, entry

    def __call__(self):
        LazyTensor.bytes_read += self.entry[3] - self.entry[2]
        return read_tensor(self.path, self.entry)

    def ranges(self, cuts):
        """The part of it that cuts, {dim: [(start, stop), …]}, leave of these dims; read row by row of those before the last."""
        dtype, shape, begin, _ = self.entry
        kind, dim = np.dtype(_SAFETENSORS[dtype]), max(cuts)
        cuts = {i: cuts.get(i, [(0, n)]) for i, n in enumerate(shape)}
        found = np.empty([sum(last - first for first, last in ranges) for ranges in cuts.values()], kind)
        inner, room, at = (
            math.prod(found.shape[dim + 1 :]) * kind.itemsize,
            memoryview(found.reshape([-1]).view(np.uint8)),
            0,
        )
        before = [[i for first, last in cuts[d] for i in range(first, last)] for d in range(dim)]
        with open(self.path, "rb", buffering=0) as file:
            for places in itertools.product(*before):
                row = functools.reduce(lambda row, place: row * place[1] + place[0], zip(places, shape), 0)
                for first, last in cuts[dim]:
                    size, start = (last - first) * inner, begin + (row * shape[dim] + first) * inner
                    while size:
                        done = os.preadv(file.fileno(), [room[at : at + size]], start)
                        if not done:
                            raise UserError(f"{self.path}: truncated at byte {start}")
                        at, start, size = at + done, start + done, size - done
        LazyTensor.bytes_read += found.nbytes
        return _as_float32(found, dtype)


def _as_float32(array, dtype):
    """What lies in a file as float16 or bfloat16, as float32; all else as it is."""
    if dtype == "BF16":
        return from_bfloat16(array)
    return array.astype(np.float32) if dtype == "F16" else array


def read_safetensors(path):
    """All of {name: array}."""
    return {name: read_tensor(path, entry) for name, entry in safetensors_header(path).items()}


def write_safetensors(path, tensors, metadata=None, sync=True):
    """Write {name: array, or a function that returns it} to `path`, atomically, one tensor in memory at a time.

    With functions, the value is (function, shape, dtype); "bfloat16" and "float16" convert what the function returns.
    Returns {"size", "crc32"} of the file. sync: wait until the disk has it.
    """
    names = {np.dtype(v): k for k, v in _SAFETENSORS.items() if k != "BF16"}
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, value in tensors.items():
        shape, kind = value[1:] if isinstance(value, tuple) else (value.shape, value.dtype)
        code = "BF16" if kind == "bfloat16" else names[np.dtype(kind)]
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
            array = np.ascontiguousarray(_rows(array), _SAFETENSORS[header[name]["dtype"]])
            assert array.nbytes == np.diff(header[name]["data_offsets"])[0], (name, array.shape, header[name])
            file.write(array.data)
            checksum = zlib.crc32(array.reshape([-1]).view(np.uint8), checksum)
    return {"size": size, "crc32": checksum}


def _rows(array):
    """A transposed matrix laid out anew, 16 rows of the original at a time: five times as fast as all at once."""
    if array.ndim != 2 or array.flags.c_contiguous or not array.flags.f_contiguous:
        return array
    found, original = np.empty(array.shape, array.dtype), array.T
    for i in range(0, len(original), 16):
        found[:, i : i + 16] = original[i : i + 16].T
    return found


_BinTensor = namedtuple("_BinTensor", "storage where offset size stride")


class _TensorUnpickler(pickle.Unpickler):
    """Reads the pickle inside a torch .bin file: tensors in dicts and lists. Any other object is refused, none is run."""

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
    """pytorch_model.bin (the zip format of torch >= 1.6): names known at once, tensors read one at a time."""

    def __init__(self, path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
            pickles = [n for n in self.zip.namelist() if n.endswith("data.pkl")]
        except zipfile.BadZipFile:
            raise UserError(
                f"{path}: not a torch zip file, or a truncated one; save it again with torch >= 1.6"
            ) from None
        if len(pickles) != 1:
            raise UserError(f"{path}: no data.pkl inside; not a torch checkpoint")
        self.folder = pickles[0][: -len("data.pkl")]
        with self.zip.open(pickles[0]) as file:
            try:
                loaded = _TensorUnpickler(file, path).load()
            except (
                pickle.UnpicklingError,
                EOFError,
                AssertionError,
                AttributeError,
                TypeError,
                IndexError,
                KeyError,
            ) as error:
                raise UserError(f"{path}: refused: not a plain dict of tensors ({type(error).__name__})") from None
        entries = dict(loaded) if isinstance(loaded, dict) else None
        if entries is None or not all(isinstance(v, _BinTensor) for v in entries.values()):
            raise UserError(f"{path}: refused: not a plain dict of tensors")
        self.entries = entries

    def read(self, name):
        storage, where, offset, size, stride = self.entries[name]
        try:
            dtype = np.dtype(_TensorUnpickler.storages[storage])
            flat = np.frombuffer(self.zip.read(f"{self.folder}data/{where}"), dtype)
        except (KeyError, ValueError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{self.path}: the storage of tensor {name} is missing or damaged") from None
        strides = [s * dtype.itemsize for s in stride]
        reach = offset + sum((n - 1) * s for n, s in zip(size, stride)) + 1
        if min((offset, *size, *stride)) < 0 or 0 not in size and reach > len(flat):
            raise UserError(f"{self.path}: tensor {name} reaches past its storage")
        array = np.lib.stride_tricks.as_strided(flat[offset:], size, strides)
        if storage == "BFloat16Storage":
            return from_bfloat16(array)
        return array.astype(np.float32) if storage == "HalfStorage" else array.copy()


class _ByteRange(namedtuple("_ByteRange", "offset size")):
    """Bytes of a file that were passed over."""


class _PickledArray:
    """What a pickle says of a numpy array."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state


class _PickledDtype:
    """What a pickle says of a numpy dtype; its byte order is the little-endian one of every machine here."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass


class _PaddleUnpickler(pickle._Unpickler):
    """Reads what paddle.save() writes of a state dict: arrays, alone or as (name, array). Nothing else is made, none is run.

    Python's own unpickler in Python, as it can pass over the arrays' bytes, which are then read one tensor at a time.
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

    def load_bytes(self, width):
        size = int.from_bytes(self.read(width), "little")
        if size < 1 << 16 or self._unframer.current_frame is not None:
            self.append(self.read(size))
        else:
            self.append(_ByteRange(self.file.tell(), size))
            self.file.seek(size, 1)

    dispatch[pickle.BINBYTES[0]] = lambda self: self.load_bytes(4)
    dispatch[pickle.BINBYTES8[0]] = lambda self: self.load_bytes(8)


def read_pdparams(path):
    """{name: (a function that reads the tensor, its shape)} of a file of paddle.save(); bfloat16 lies there as uint16."""
    dtypes = {"f4": "<f4", "f2": "<f2", "f8": "<f8", "u2": "<u2", "i8": "<i8", "i4": "<i4", "i1": "<i1", "u1": "<u1"}
    with open(path, "rb") as file:
        try:
            loaded = _PaddleUnpickler(file, path).load()
        except UserError:
            raise
        except Exception as error:  # whatever a damaged pickle makes of the unpickler's stack
            what = type(error).__name__
            raise UserError(f"{path}: not a whole file of paddle.save(): {what} while it was read") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: refused: holds a {type(loaded).__name__}, not a dict of tensors")

    def read(name, array):
        data, dtype = array.data, dtypes[array.dtype.code]
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

    found = {}
    for name, value in loaded.items():
        if name == "StructuredToParameterName@@":  # a list of Paddle's own names
            continue
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
        if not isinstance(array, _PickledArray) or getattr(array.dtype, "code", None) not in dtypes:
            raise UserError(f"{path}: refused: {name} is not a tensor of {', '.join(dtypes)}")
        found[name] = (functools.partial(read, name, array), list(array.shape))
    return found
