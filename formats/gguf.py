"""GGUF files (llama.cpp, Ollama, LM Studio): metadata and tensors in one file, read one tensor at a time, and written.

    file = read_header("model.gguf")              # GGUFFile: metadata {key: value}, tensors {name: GGUFTensor}
    array = file.tensors["output_norm.weight"].read()
    tensors = huggingface_tensors("model.gguf")   # {Hugging Face's name: (function that reads it, shape)}
    write_gguf(path, metadata, {name: (function, shape, "Q8_0")})

The architectures are those of ARCHITECTURES; names and layouts are llama.cpp's. It computes Llama's rope on pairs
(2i, 2i+1), so that its files hold the rows of q and k of these models in another order than Hugging Face's.
"""

import dataclasses
import functools
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from formats.files import UserError, atomic_file, refuse_lfs_pointer
from formats.gguf_blocks import NAMES, OTHER_TYPES, TYPES, block_size, data_bytes, decode, encode, integers

# ======================================================================================================= reading

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file; shape as numpy has it (the file lists dims the other way round)."""

    path: Path
    type: str  # a key of TYPES
    shape: list[int]
    begin: int  # byte of the file

    def read(self) -> np.ndarray:
        """float32, dequantized."""
        size = data_bytes(math.prod(self.shape), self.type)
        return decode(np.fromfile(self.path, np.uint8, size, offset=self.begin), self.type).reshape(self.shape)

    def integers(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes (out, in) uint8 and scales (out, in / 32) float32 of a Q8_0 or Q4_0: (code - 128 or 8) · scale."""
        size = data_bytes(math.prod(self.shape), self.type)
        codes, scales = integers(np.fromfile(self.path, np.uint8, size, offset=self.begin), self.type)
        return codes.reshape(self.shape), scales.reshape(self.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a tensor of a file is under Hugging Face's name: its rows, perhaps in another order."""

    tensor: GGUFTensor
    rows: Callable[[np.ndarray], np.ndarray]  # (out, …) -> (out, …)

    def __call__(self) -> np.ndarray:
        return self.rows(self.tensor.read())

    def integers(self) -> tuple[np.ndarray, np.ndarray]:
        codes, scales = self.tensor.integers()
        return self.rows(codes), self.rows(scales)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]


class _Reader:
    """Values one after another, in the file's own order of bytes."""

    def __init__(self, path: Path, data):
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> memoryview:
        if count < 0 or self.at + count > len(self.data):
            raise UserError(f"{self.path}: truncated: the header goes on behind byte {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, format: str):
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8", "replace")

    def value(self, kind: int):
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind in _SCALARS:
                return np.frombuffer(self.take(count * np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind]).tolist()
            return [self.value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise UserError(f"{self.path}: the header is damaged: type {kind} of a value at byte {self.at}")
        return np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[0].item()


def read_header(path: str | Path) -> GGUFFile:
    """Metadata and where the tensors lie; of a model in several files (…-00001-of-00003.gguf), of all of them."""
    path = Path(path)
    if match := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name):
        count = int(match[2])
        parts = [path.with_name(f"{match[1]}-{i + 1:05d}-of-{match[2]}.gguf") for i in range(count)]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise UserError(f"{path.parent / missing[0]}: no such file; the model is in {count} files")
        files = [_read_one(part) for part in parts]
        tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
        return GGUFFile(files[0].metadata, tensors)
    return _read_one(path)


def _read_one(path: Path) -> GGUFFile:
    try:
        data = memoryview(np.memmap(path, np.uint8, "r"))  # only the pages of the header are read
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if bytes(data[:4]) != b"GGUF":
        refuse_lfs_pointer(path)
        raise UserError(f"{path}: not a GGUF file: it begins with {bytes(data[:4])!r}")
    reader = _Reader(path, data)
    reader.take(4)
    version = reader.number("<I")
    if version not in (2, 3):
        what = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise UserError(f"{path}: GGUF {what}; readable are versions 2 and 3, little-endian")
    tensor_count, pair_count = reader.number("<Q"), reader.number("<Q")
    metadata = {}
    for _ in range(pair_count):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    entries = []
    for _ in range(tensor_count):
        name, dims = reader.string(), reader.number("<I")
        shape = [reader.number("<Q") for _ in range(dims)][::-1]
        entries.append((name, shape, reader.number("<I"), reader.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    base = -(-reader.at // alignment) * alignment
    return GGUFFile(metadata, {entry[0]: _tensor(path, len(data), base, *entry) for entry in entries})


def _tensor(path, file_size, base, name, shape, number, offset):
    """One entry of the header, checked against the file's length."""
    if number not in NAMES:
        found, known = OTHER_TYPES.get(number, f"number {number}"), ", ".join(TYPES)
        raise UserError(f"{path}: tensor {name} has the type {found}; readable are {known}")
    type_name = NAMES[number]
    if not shape or shape[-1] % block_size(type_name):
        raise UserError(f"{path}: the header is damaged: tensor {name} of shape {shape} cannot be {type_name}")
    end = base + offset + data_bytes(math.prod(shape), type_name)
    if end > file_size:
        raise UserError(f"{path}: truncated: tensor {name} ends at byte {end}, the file has {file_size}")
    return GGUFTensor(path, type_name, shape, base + offset)


# ======================================================================================================= writing


def _packed(value: object) -> bytes:
    """A metadata value with its type: bool, int (u32), float (f32), str, or a list of one of them (ints as i32)."""
    if isinstance(value, list):
        kind = _STRING if isinstance(value[0], str) else 6 if isinstance(value[0], float) else 5
        if kind == _STRING:
            content = b"".join(struct.pack("<Q", len(text)) + text for text in (item.encode() for item in value))
        else:
            content = np.array(value, _SCALARS[kind]).tobytes()
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + content
    if isinstance(value, str):
        text = value.encode()
        return struct.pack("<IQ", _STRING, len(text)) + text
    kind = 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6
    return struct.pack("<I", kind) + np.array(value, _SCALARS[kind]).tobytes()


def write_gguf(path: str | Path, metadata: dict, tensors: dict[str, tuple[Callable, list[int], str]]) -> None:
    """Write a file of version 3, atomically; tensors: {name: (function that returns it as float32, shape, type)}.

    Functions are called one at a time, so one tensor is in memory at a time.
    """
    header, offset = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)), 0
    for key, value in metadata.items():
        header += struct.pack("<Q", len(key.encode())) + key.encode() + _packed(value)
    for name, (_, shape, type_name) in tensors.items():
        header += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}QIQ", *shape[::-1], TYPES[type_name][0], offset)
        offset += -(-data_bytes(math.prod(shape), type_name) // 32) * 32
    with atomic_file(path, "wb") as file:
        file.write(header + bytes(-len(header) % 32))
        for name, (function, shape, type_name) in tensors.items():
            array = function()
            assert list(array.shape) == list(shape), (name, array.shape, shape)
            data = encode(array, type_name)
            file.write(data.data)
            file.write(bytes(-len(data) % 32))


# ================================================================================== architectures and their names


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures lies in Hugging Face's names."""

    model_type: str  # config.json's
    names: dict[str, str]  # llama.cpp's name: Hugging Face's; of a layer without "blk.{i}." and "model.layers.{i}."
    permuted: bool = False  # rows of q and k are in the order of interleaved rope
    norm_offset: float = 0.0  # which the file adds to every norm's weight


_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
_GEMMA2 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ARCHITECTURES = {  # general.architecture, after a slash our mark for its sparse variant: Architecture
    "llama": Architecture("llama", _ATTENTION | _MLP, permuted=True),
    "llama/moe": Architecture("mixtral", _ATTENTION | _MIXTRAL, permuted=True),
    "qwen2": Architecture("qwen2", _ATTENTION | _MLP),
    "qwen2moe": Architecture("qwen2_moe", _ATTENTION | _EXPERTS | _SHARED),
    "qwen3": Architecture("qwen3", _ATTENTION | _MLP),
    "qwen3moe": Architecture("qwen3_moe", _ATTENTION | _EXPERTS),
    "gemma": Architecture("gemma", _ATTENTION | _MLP, norm_offset=1.0),
    "gemma2": Architecture("gemma2", _ATTENTION | _MLP | _GEMMA2, norm_offset=1.0),
}
_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def architecture(file: GGUFFile, path: Path) -> str:
    """The key of ARCHITECTURES of a file; UserError for others."""
    name = file.metadata.get("general.architecture")
    if name == "llama" and file.metadata.get("llama.expert_count"):
        name = "llama/moe"
    if name not in ARCHITECTURES:
        known = ", ".join(key for key in ARCHITECTURES if "/" not in key)
        raise UserError(f"{path}: general.architecture {name!r} is not supported; supported are {known}")
    return name


def permute(array: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """Rows of q or k (heads · Dh, …): halves of each head (i, i + Dh/2) -> pairs (2i, 2i + 1); `back`: the inverse."""
    halves = [heads, 2, -1] if not back else [heads, -1, 2]
    return array.reshape([*halves, *array.shape[1:]]).swapaxes(1, 2).reshape(array.shape)


def rename(name: str, table: dict[str, str]) -> str | None:
    """A GGUF name -> Hugging Face's, "{e}" in place of the expert; None: not in the table."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        theirs = table.get(match[2])
        return None if theirs is None else f"model.layers.{match[1]}.{theirs}.{kind}"
    return f"{_GLOBAL[stem]}.{kind}" if stem in _GLOBAL else None


def _pieces(name: str, tensor: GGUFTensor, row: Architecture, heads: dict[str, int]) -> Iterator[tuple]:
    """(Hugging Face's name, function that reads it, shape) of a tensor: one, or one for each expert."""
    theirs, read = rename(name, row.names), tensor.read
    which = name.split(".")[-2]
    if "{e}" in theirs:
        read_all = functools.lru_cache(1)(read)  # read once for all experts
        for e in range(tensor.shape[0]):
            yield theirs.format(e=e), lambda e=e: read_all()[e], tensor.shape[1:]
        return
    if row.permuted and which in heads:
        yield theirs, Piece(tensor, lambda array: permute(array, heads[which], back=True)), tensor.shape
    elif row.norm_offset and which.endswith("norm"):
        yield theirs, lambda: tensor.read() - np.float32(row.norm_offset), tensor.shape
    elif which == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:
        yield theirs, lambda: tensor.read()[None], [1, *tensor.shape]
    else:
        yield theirs, Piece(tensor, lambda array: array), tensor.shape


def huggingface_tensors(path: str | Path) -> dict[str, tuple[Callable, list[int]]]:
    """{Hugging Face's name: (function that reads it as float32, shape)}. UserError for a tensor without a place."""
    path = Path(path).resolve()  # parts of a model lie beside the file, not beside a link to it
    file = read_header(path)
    name = architecture(file, path)
    row, kind = ARCHITECTURES[name], name.partition("/")[0]
    H = file.metadata[f"{kind}.attention.head_count"]
    heads = {"attn_q": H, "attn_k": file.metadata.get(f"{kind}.attention.head_count_kv", H)}
    result = {}
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight":  # huggingface_config() reads it
            continue
        if rename(name, row.names) is None:
            raise UserError(f"{path}: tensor {name} has no place in {row.model_type}; it may change the maths")
        result |= {theirs: (read, list(shape)) for theirs, read, shape in _pieces(name, tensor, row, heads)}
    return result
