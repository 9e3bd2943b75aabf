"""A model <-> named tensors, under Hugging Face's and PaddleNLP's names.

    model = build(read_config(path))                  # config.json, as the weight files bear it out
    load_weights(model, path)                         # from a folder of either, whatever the file type
    save_pretrained(model, path, dtype="bfloat16")    # a folder in Hugging Face's layout
    for weight in named_weights(model):               # Weight: name, parameter, how the stored layout differs from ours
        array = weight.to_numpy()

families.py has a table of names per family, which both loading and saving read. Weight is the seam to parallelism: its
parameter may be this rank's shard of the full tensor (shard_spec), and read() reads only that part of the file.
SaveEntry is the seam to checkpoint.py: tensors of a file, and the parts of weights and moments that they are made of.
"""

import dataclasses
import functools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import paddle

from families import FAMILIES, ModelConfig, weight_names
from formats.dequantize import float_tensors
from formats.files import UserError, atomic_file, read_json
from formats.gguf import huggingface_tensors
from formats.integers import integer_tensors, quantization_of
from formats.tensor_files import (
    BinFile,
    LazyTensor,
    StoredTensor,
    read_pdparams,
    safetensors_header,
    to_contiguous,
    write_safetensors,
)
from formats.weight_names import IGNORED_WEIGHTS, name_table
from model import _QUANTIZED, CausalLM, QuantLinear, block_linears, linear_paths, set_parameter
from modules.low_bit import LowBitLinear
from modules.positions import rope_frequencies

# ================================================================================= weights by their names


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter under the name that Hugging Face (or PEFT) gives it, and how the stored layout differs from ours.

    An optimizer updates `tensor` by `grad`; distributed.sharding.ParamShard is the same interface for a part of a
    weight.
    """

    name: str
    parameter: paddle.Tensor
    transposed: bool  # stored as [out, in], ours is [in, out]
    stored: str | None = None  # dtype on disk; None: the one that the folder is saved in

    def to_numpy(self, tensor: paddle.Tensor | np.ndarray | None = None) -> np.ndarray:
        """The parameter, or a tensor of its shape (a moment, a gradient), in the stored layout; bfloat16 as float32."""
        if tensor is None:
            assert self.parameter._is_initialized(), f"{self.name}: its values are not on this rank"
            tensor = self.parameter
        if not isinstance(tensor, np.ndarray):
            tensor = (tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor).numpy()
        return tensor.T if self.transposed else tensor

    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        """The full tensor in the stored layout -> this rank's shard of it, in ours."""
        array = array.T if self.transposed else array
        return to_contiguous(array) if self.shard_spec is None else np.ascontiguousarray(self.shard_spec.slice(array))

    def read(self, read: Callable[[], np.ndarray], extent: tuple[int, int] | None = None) -> np.ndarray:
        """Read this rank's shard, in our layout; with `extent`, only flat elements [first, last) of the shard.

        read() returns the full tensor in the stored layout. If it is a LazyTensor, only rows and columns that are
        needed are read from the file.
        """
        slices = {} if self.shard_spec is None else {self.shard_spec.dim: self.shard_spec.ranges}
        shape = self.parameter.shape
        if extent is not None and isinstance(read, LazyTensor):  # narrow the rows to those with such elements
            row_size = math.prod(shape[1:])
            first_row, last_row = extent[0] // row_size, -(-extent[1] // row_size)
            slices[0] = intersect(slices.get(0, [(0, shape[0])]), first_row, last_row)
            extent = extent[0] - first_row * row_size, extent[1] - first_row * row_size
        if not slices or not isinstance(read, LazyTensor):
            array = self.from_numpy(read())
        else:
            last_dim = len(shape) - 1
            stored = {last_dim - dim if self.transposed else dim: ranges for dim, ranges in slices.items()}
            array = read.read_slices(stored)
            array = to_contiguous(array.T if self.transposed else array)
        return array if extent is None else array.reshape([-1])[slice(*extent)]

    @property
    def tensor(self) -> paddle.Tensor:
        """What an optimizer updates."""
        return self.parameter

    extent = None  # all elements; a ParamShard has (first, last) of the flattened parameter

    def set(self, array: np.ndarray) -> None:
        """What read() returns, into the parameter."""
        set_parameter(self.parameter, array)

    @property
    def grad(self) -> paddle.Tensor | None:
        return self.parameter.grad

    def clear_gradient(self) -> None:
        self.parameter.clear_gradient(False)  # False: released, not filled with zeros

    @property
    def shard_spec(self):
        """The ShardSpec of the parameter under tensor parallelism; None: it is the full tensor."""
        return getattr(self.parameter, "shard_spec", None)

    @property
    def shape(self) -> list[int]:
        """Of the full tensor, in the stored layout."""
        shape = list(self.parameter.shape if self.shard_spec is None else self.shard_spec.shape)
        return shape[::-1] if self.transposed else shape


def intersect(ranges: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Elements [first, last) of the concatenation of ranges [(start, stop), …], as ranges."""
    result, offset = [], 0
    for start, stop in ranges:
        begin, end = max(first, offset), min(last, offset + stop - start)
        if begin < end:
            result.append((start + begin - offset, start + end - offset))
        offset += stop - start
    return result


@dataclasses.dataclass(frozen=True)
class SaveSource:
    """What this rank holds of a weight, or of a tensor of the weight's shape, that is to be saved.

    tensor: the parameter or a moment, in our layout, sharded over tp as the weight is. With ZeRO, tensor is flat and
    holds only the elements from `offset` on of that (None: this rank holds none of them).
    """

    weight: Weight
    tensor: paddle.Tensor | np.ndarray | None
    offset: int | None = None  # None: not sharded by ZeRO


@dataclasses.dataclass(frozen=True)
class SaveEntry:
    """Output tensors computed from one set of source weights.

    tensors: {name: (shape, dtype)}, as stored. convert: from the full sources in the stored layout to the arrays, in
    the order of `tensors`; None: the sources are stored as they are.
    """

    tensors: dict[str, tuple[list[int], str]]
    sources: list[SaveSource]
    convert: Callable[..., list[np.ndarray]] | None = None

    @classmethod
    def of(cls, weight: Weight, dtype: str = "float32") -> "SaveEntry":
        """A weight, stored as it is."""
        return cls({weight.name: (weight.shape, weight.stored or dtype)}, [SaveSource(weight, weight.parameter)])

    def arrays(self, *full_sources: np.ndarray) -> list[np.ndarray]:
        return list(full_sources) if self.convert is None else self.convert(*full_sources)

    @property
    def nbytes(self) -> int:
        return sum(stored_bytes(shape, dtype) for shape, dtype in self.tensors.values())


def stored_bytes(shape: list[int], dtype: str) -> int:
    other = {"bfloat16": 2, "F8_E4M3": 1}  # which numpy has not
    return math.prod(shape) * (other.get(dtype) or np.dtype(dtype).itemsize)


def named_weights(model: CausalLM, rows: Iterable | None = None) -> list[Weight]:
    """Weights of the base model (no adapters, no prefix), in the order of its family's name table, or of `rows`."""
    parameters = {name.replace(".base.", "."): p for name, p in (*model.named_parameters(), *model.named_buffers())}
    rounded = [(name, layer) for name, layer in model.named_sublayers() if isinstance(layer, LowBitLinear)]
    parameters |= {f"{name.removesuffix('.base')}.weight": layer.weight for name, layer in rounded}
    weights = []
    for path, name, transposed in (*weight_names(model.config, rows), ("score.weight", "score.weight", True)):
        if (parameter := parameters.get(path)) is not None:
            weights.append(Weight(name, parameter, transposed))
        elif path.removesuffix("weight") + "qweight" in parameters:
            weights += _quantized_weights(parameters, path.removesuffix("weight"), name.removesuffix("weight"))
    return weights


def weights_to_save(model: CausalLM) -> list[Weight]:
    """named_weights(), and what the family's files hold besides: a tied head, rotary frequencies."""
    weights, config = named_weights(model), model.config
    if model.lm_head is None and FAMILIES[config.family].also_stores_head:
        weights.append(Weight(_head_name(config), model.embed_tokens.weight, False))
    if (name := config.stored_frequencies) is not None:
        # The files hold the frequencies without any scaling.
        unscaled = dataclasses.replace(config, rope={"rope_type": "default", "rope_theta": 10000.0})
        frequencies = paddle.to_tensor(rope_frequencies(unscaled)[0])
        layers = range(config.num_hidden_layers if "{i}" in name else 1)
        weights += [Weight(name.format(i=i), frequencies, False) for i in layers]
    return weights


def _head_name(config: ModelConfig) -> str:
    return _stored_name("lm_head.weight", config)


def _stored_name(our_name: str, config: ModelConfig) -> str:
    return next(theirs for ours, theirs, _ in FAMILIES[config.family].names if ours == our_name)


def _quantized_weights(parameters: dict, ours: str, theirs: str) -> list[Weight]:
    """The tensors of one quantized linear; ours, theirs: its path in the model and in files, up to "weight"."""
    kind = {paddle.int32: "int32", paddle.int8: "int8", paddle.uint8: "uint8"}[parameters[ours + "qweight"].dtype]
    dtypes = {"qweight": kind, "scales": "float16" if kind == "int32" else "float32"}
    return [
        Weight(
            theirs + their_name, parameters[ours + name], name == "qweight" and kind == "int8", dtype or dtypes[name]
        )
        for name, their_name, dtype in _QUANTIZED
        if parameters.get(ours + name) is not None
    ]


def init_weights(model: CausalLM, seed: int) -> None:
    """Normal(0, initializer_range) for matrices, 1 for norms, 0 for biases; each depends only on (seed, its name)."""
    for weight in named_weights(model):
        if len(weight.shape) == 2:
            generator = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
            array = generator.standard_normal(weight.shape, np.float32) * np.float32(model.config.initializer_range)
        else:
            value = 0.0 if weight.name.endswith("bias") else 1.0 - model.config.norm_offset
            array = np.full(weight.shape, value, np.float32)
        set_parameter(weight.parameter, weight.from_numpy(array))


# ============================================================================================ folders of weights

MASTER_WEIGHTS = "master_weights.safetensors"  # float32 weights beside, or in place of, those in bfloat16


MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams", MASTER_WEIGHTS, "model.gguf")


class IndexedTensor:
    """A StoredTensor of a file that an index names: the file's header is read when `read` or `shape` is asked for."""

    def __init__(self, name: str, path: Path, headers: dict):
        self.name, self.path, self.headers = name, path, headers

    def _entry(self):
        if not self.path.is_file():
            raise UserError(f"{self.path.parent}: an index names the file {self.path.name}, which is not there")
        if self.path not in self.headers:
            self.headers[self.path] = safetensors_header(self.path)
        if self.name not in self.headers[self.path]:
            raise UserError(f"{self.path}: has no tensor {self.name}, which the index says it has")
        return self.headers[self.path][self.name]

    @property
    def read(self) -> LazyTensor:
        return LazyTensor(self.path, self._entry())

    @property
    def shape(self) -> list[int]:
        return self._entry().shape


def stored_tensors(
    path: str | Path, candidates: tuple[str, ...] = MODEL_FILES, trust_index: bool = False
) -> dict[str, StoredTensor]:
    """{name: StoredTensor} of a folder: from the first of `candidates` that is there, as one file or as an index.

    transformers' order: one file before an index, safetensors before .bin; consolidated.*, subfolders and other weight
    files beside them are not read.
    trust_index: names are the index's, and only files of which something is read are opened. A thousand ranks that
    each open a thousand files would keep a file server busy for minutes.
    """
    path = Path(path)
    for candidate in candidates:
        index = path / f"{candidate}.index.json"
        if index.is_file() and not (path / candidate).is_file() and trust_index:
            weight_map, headers = json.loads(index.read_text(encoding="utf-8"))["weight_map"], {}
            return {name: IndexedTensor(name, path / file, headers) for name, file in weight_map.items()}
        if (path / candidate).is_file():
            files = [candidate]
        elif index.is_file():
            files = _files_of_index(index)
        else:
            continue
        tensors = {}
        for file in files:
            tensors |= _tensors_of_file(path / file)
        return tensors
    if shards := sorted(path.glob("model_state.*.pdparams")):
        raise UserError(f"{shards[0]}: a shard of a model saved under tensor or pipeline parallelism: merge them first")
    others = sorted(file.name for end in ("safetensors", "bin", "pth", "gguf") for file in path.glob(f"*.{end}"))
    found = f"; {', '.join(others[:4])} cannot be opened without it" if others else ""
    raise UserError(f"{path}: no {', '.join(candidates)} or an index of them{found}")


def _files_of_index(index: Path) -> list[str]:
    """The files that an index names, each of them there and in its folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{index}: not an index with a weight_map") from None
    for file in files:
        is_inside = not Path(file).is_absolute() and ".." not in Path(file).parts
        if not is_inside or not (index.parent / file).is_file():
            raise UserError(f"{index}: names the file {file}, which is not there")
    return files


def _tensors_of_file(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".pdparams":
        return read_pdparams(path)
    if path.suffix == ".gguf":
        return {name: StoredTensor(*tensor) for name, tensor in huggingface_tensors(path).items()}
    if path.suffix == ".bin":
        file = BinFile(path)
        return {
            name: StoredTensor(functools.partial(file.read, name), list(tensor.size))
            for name, tensor in file.entries.items()
        }
    return {
        name: StoredTensor(LazyTensor(path, entry), entry.shape) for name, entry in safetensors_header(path).items()
    }


def as_config_says(tensors: dict[str, StoredTensor], config: ModelConfig, path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a folder; those that another tool quantized as floats, or as integers if the config keeps them."""
    quantization = _folder_quantization(path)
    if config.quantization is None:
        return tensors if quantization is None else float_tensors(tensors, quantization, Path(path))
    is_foreign = quantization["quant_method"] == "awq" if quantization else (Path(path) / "model.gguf").is_file()
    linears = [theirs for _, theirs in linear_paths(config)]
    return integer_tensors(tensors, quantization, config.quantization, linears) if is_foreign else tensors


def _folder_quantization(path: str | Path) -> dict | None:
    """quantization_config of a folder's config.json."""
    file = Path(path) / "config.json"
    source = read_json(file) if file.is_file() else {}
    return source.get("quantization_config") or source.get("compression_config")


def keep_integers(config: ModelConfig, path: str | Path) -> ModelConfig:
    """The config, with a quantization if a QuantLinear can hold the integers of this folder as they are."""
    if config.quantization is not None:
        return config
    linears = [theirs for _, theirs in linear_paths(config)]
    return dataclasses.replace(
        config, quantization=quantization_of(stored_tensors(path), _folder_quantization(path), linears)
    )


def read_config(path: str | Path) -> ModelConfig:
    """ModelConfig of a folder with its weights: untied if they hold a head that differs from a tied embedding.

    transformers keeps both then; a line says so, and what is saved says tie_word_embeddings: false.
    """
    config = ModelConfig.from_json(path)
    if not config.tie_word_embeddings:
        return config
    tensors = as_config_says(stored_tensors(path), config, path)
    head, embedding = _head_and_embedding(tensors, config)
    if head not in tensors or embedding not in tensors or _are_equal(tensors[head], tensors[embedding]):
        return config
    found = f"tie_word_embeddings is true, but {head} differs from {embedding}"
    print(f"{path}: {found}: both are kept, untied", flush=True)
    source = {**config.source, "tie_word_embeddings": False}
    return dataclasses.replace(config, tie_word_embeddings=False, source=source)


def _head_and_embedding(tensors: dict[str, StoredTensor], config: ModelConfig) -> tuple[str | None, str]:
    """Names of the two in a folder's files, Hugging Face's or PaddleNLP's; None: the latter has no head."""
    if _is_paddlenlp(tensors, config):
        names = {ours: theirs for ours, theirs, _ in paddlenlp_names(config)}
        return names.get("lm_head.weight"), names["embed_tokens.weight"]
    embedding, prefix = _stored_name("embed_tokens.weight", config), FAMILIES[config.family].prefix
    if embedding not in tensors and embedding.removeprefix(prefix) in tensors:
        embedding = embedding.removeprefix(prefix)
    return _head_name(config), embedding


def _are_equal(head: StoredTensor, embedding: StoredTensor) -> bool:
    """Whether all values are, read a block of rows at a time. PaddleNLP stores a head as (V, D) or (D, V)."""
    if head.shape == embedding.shape[::-1] != embedding.shape:
        return np.array_equal(head.read().T, embedding.read())
    if list(head.shape) != list(embedding.shape):
        return False
    if not (isinstance(head.read, LazyTensor) and isinstance(embedding.read, LazyTensor)):
        return np.array_equal(head.read(), embedding.read())
    blocks = ({0: [(first, min(first + 4096, head.shape[0]))]} for first in range(0, head.shape[0], 4096))
    return all(np.array_equal(head.read.read_slices(rows), embedding.read.read_slices(rows)) for rows in blocks)


def load_weights(
    model: CausalLM, path: str | Path, candidates: tuple[str, ...] = MODEL_FILES, trust_index: bool = False
) -> None:
    """Fill the base weights from a folder of Hugging Face's or PaddleNLP's, tensor by tensor; each rank reads its
    shards. trust_index: see stored_tensors().

    All tensors that are missing, unexpected or of another shape are named in one UserError.
    """
    config = model.config
    tensors = as_config_says(stored_tensors(path, candidates, trust_index), config, path)
    if _is_paddlenlp(tensors, config):
        paddlenlp = paddlenlp_names(config)
        weights = {w.name: w for w in named_weights(model, paddlenlp)}
        tensors = _split_or_fuse_paddlenlp(tensors, config, paddlenlp)
        other_paths = {ours for ours, name, _ in weight_names(config) if name in model.names_on_other_ranks}
        names_on_other_ranks = {name for ours, name, _ in weight_names(config, paddlenlp) if ours in other_paths}
    else:
        weights, names_on_other_ranks = {w.name: w for w in named_weights(model)}, model.names_on_other_ranks
        tensors = _published_names(tensors, config, weights.keys() | names_on_other_ranks)
    mismatches = [f"missing {name}" for name in weights if name not in tensors]
    mismatches += [f"unexpected {name}" for name in tensors if name not in weights and name not in names_on_other_ranks]
    mismatches += [
        f"{name} has shape {list(tensors[name].shape)}, config.json says {weight.shape}"
        for name, weight in weights.items()
        if name in tensors and list(tensors[name].shape) != weight.shape
    ]
    if mismatches:
        raise UserError(f"{path}: {len(mismatches)} tensors do not fit: {'; '.join(mismatches)}")
    for name, weight in weights.items():
        shard = getattr(weight.parameter, "piece", weight)  # ZeRO stage 3: this rank's ParamShard, None if it has none
        if shard is None:
            continue
        array, wanted = weight.read(tensors[name].read, shard.extent), weight.stored or "float32"
        if ("int" in wanted) != (array.dtype.kind in "iu"):
            raise UserError(f"{path}: {name} has dtype {array.dtype}; {wanted} is needed")
        shard.set(array)
    for name, (_, _, layer) in block_linears(model).items():
        if isinstance(layer, QuantLinear):
            layer.check(path, name)


def _is_paddlenlp(tensors: dict[str, StoredTensor], config: ModelConfig) -> bool:
    """Whether a folder's tensors have PaddleNLP's names: those of its table begin with the class's own word."""
    prefix = paddlenlp_names(config)[0][1].partition(".")[0] + "."
    return any(name.startswith(prefix) for name in tensors)


def _published_names(tensors: dict[str, StoredTensor], config: ModelConfig, names: set[str]) -> dict[str, StoredTensor]:
    """stored_tensors() of a Hugging Face folder under the names of the family's table, without what is not a weight.

    Published files differ from the table: they leave out the prefix of the names (GPT-2, Bloom), hold a tied head too,
    tables that are computed, DeepSeek-V3's extra layers for speculative decoding, and, in transformers 5, all experts
    of a layer in one tensor.
    """
    prefix, result = FAMILIES[config.family].prefix, {}
    for name, tensor in tensors.items():
        if IGNORED_WEIGHTS.search(name):
            continue
        if name not in names and prefix + name in names:
            name = prefix + name
        router = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        if router in names:  # Mixtral's name for it beside experts in one tensor
            name = router
        if name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj")):
            result |= _split_experts(name, tensor, config)
        else:
            result[name] = tensor
    if config.tie_word_embeddings and (head := result.pop(_head_name(config), None)) is not None:
        result.setdefault(_stored_name("embed_tokens.weight", config), head)  # a file may hold only one of the two
    if config.source.get("num_nextn_predict_layers"):
        layer = re.compile(r"model\.layers\.(\d+)\.")
        result = {n: t for n, t in result.items() if not (m := layer.match(n)) or int(m[1]) < config.num_hidden_layers}
    return result


def _split_experts(name: str, tensor: StoredTensor, config: ModelConfig) -> dict[str, StoredTensor]:
    """All experts of a layer, (E, 2F, D) with gate before up, or (E, D, F) -> a StoredTensor per expert and linear."""
    shape, which = tensor.shape, name.rpartition(".")[2]
    if len(shape) != 3 or config.experts is None:
        return {name: tensor}
    layer = int(re.search(r"layers\.(\d+)\.", name)[1])
    read_all = functools.lru_cache(1)(tensor.read)  # read once for all experts
    table = {ours: theirs for ours, theirs, _ in FAMILIES[config.family].names}
    if which == "down_proj":
        rows_of = {"down_proj": slice(None)}
    else:
        rows_of = {"gate_proj": slice(0, shape[1] // 2), "up_proj": slice(shape[1] // 2, None)}
    result = {}
    for linear, rows in rows_of.items():
        for expert in range(shape[0]):
            theirs = table["layers.{i}.mlp.experts.{e}." + linear + ".weight"].format(i=layer, e=expert)
            size = [len(range(shape[1])[rows]), shape[2]]
            result[theirs] = StoredTensor(lambda expert=expert, rows=rows: read_all()[expert, rows], size)
    return result


def save_pretrained(
    model: CausalLM,
    path: str | Path,
    dtype: str = "float32",
    *,
    max_shard_bytes: int = 5 << 30,
    weights: Iterable | None = None,
    quantization: dict | None = None,
) -> None:
    """Write config.json and model*.safetensors in Hugging Face's layout; each file atomically, config.json last.

    weights, quantization: of formats.quantized_export, in place of the model's own.

    A model.safetensors or index that is there in the other layout is removed: it would be read in place of the new one.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    files, sizes = [{}], [0]  # a file: {name: (function, shape, dtype)}
    for weight in weights_to_save(model) if weights is None else weights:
        stored = weight.stored or dtype
        size = stored_bytes(weight.shape, stored)
        if sizes[-1] and sizes[-1] + size > max_shard_bytes:
            files.append({})
            sizes.append(0)
        files[-1][weight.name] = (weight.to_numpy, weight.shape, stored)
        sizes[-1] += size
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, tensors in zip(names, files):
        write_safetensors(path / name, tensors)
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, files) for tensor in tensors}
        with atomic_file(path / "model.safetensors.index.json") as file:
            json.dump({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}, file, indent=2)
    stale = "model.safetensors.index.json" if len(files) == 1 else "model.safetensors"  # of another layout
    (path / stale).unlink(missing_ok=True)
    config = model.config if quantization is None else dataclasses.replace(model.config, quantization=quantization)
    with atomic_file(path / "config.json") as file:
        file.write(config.to_json(dtype))


# ========================================================================================= PaddleNLP's names

# PaddleNLP's linears are [in, out], as ours are. Its names are Hugging Face's behind another prefix, except for GPT and
# OPT, whose names are those of Paddle's own transformer layers.

_PADDLENLP_PREFIX = {"gpt2": "gpt", "chatglm": "chatglm.transformer", "chatglm2": "chatglm_v2", "baichuan": "llama"}


_PADDLENLP_TABLES = {
    "gpt2": name_table("""
        embed_tokens                gpt.embeddings.word_embeddings
        embed_positions             gpt.embeddings.position_embeddings
        layers.{i}.attention_norm   gpt.decoder.layers.{i}.norm1
        layers.{i}.attention.qkv_proj  gpt.decoder.layers.{i}.self_attn.qkv_proj
        layers.{i}.attention.o_proj gpt.decoder.layers.{i}.self_attn.out_proj
        layers.{i}.mlp_norm         gpt.decoder.layers.{i}.norm2
        layers.{i}.mlp.up_proj      gpt.decoder.layers.{i}.linear1
        layers.{i}.mlp.down_proj    gpt.decoder.layers.{i}.linear2
        norm                        gpt.decoder.norm
    """),
    "opt": name_table("""
        embed_tokens                opt.embeddings.word_embeddings
        embed_positions             opt.embeddings.position_embeddings
        project_in                  opt.embeddings.project_in
        project_out                 opt.decoder.project_out
        layers.{i}.attention_norm   opt.decoder.layers.{i}.norm1
        layers.{i}.attention.q_proj opt.decoder.layers.{i}.self_attn.q_proj
        layers.{i}.attention.k_proj opt.decoder.layers.{i}.self_attn.k_proj
        layers.{i}.attention.v_proj opt.decoder.layers.{i}.self_attn.v_proj
        layers.{i}.attention.o_proj opt.decoder.layers.{i}.self_attn.out_proj
        layers.{i}.mlp_norm         opt.decoder.layers.{i}.norm2
        layers.{i}.mlp.up_proj      opt.decoder.layers.{i}.linear1
        layers.{i}.mlp.down_proj    opt.decoder.layers.{i}.linear2
        norm                        opt.decoder.final_layer_norm
    """),
}  # fmt: skip


def paddlenlp_names(config: ModelConfig) -> list[tuple[str, str, bool]]:
    """(ours, PaddleNLP's, transposed) rows of the family's name table; the first is the embedding's."""
    family = FAMILIES[config.family]
    if config.family in _PADDLENLP_TABLES:
        rows = _PADDLENLP_TABLES[config.family]
    else:
        prefix = _PADDLENLP_PREFIX.get(config.family, config.family) + "."
        rows = [
            (ours, theirs.replace(family.prefix, prefix, 1) if theirs.startswith(family.prefix) else theirs)
            for ours, theirs, _ in family.names
        ]
    return [(row[0], row[1].replace("W_pack", "qkv_proj"), False) for row in rows]


def _split_or_fuse_paddlenlp(
    tensors: dict[str, StoredTensor], config: ModelConfig, rows: list[tuple[str, str, bool]]
) -> dict[str, StoredTensor]:
    """stored_tensors() of a PaddleNLP folder, with q, k, v and gate, up split or fused as the model has them.

    fuse_attention_qkv stores each key head's queries, key and value side by side, GPT's too; fuse_attention_ffn gate,
    then up.
    """
    K, G, Dh = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim
    names = {ours: theirs for ours, theirs, _ in rows}
    result = {name: tensor for name, tensor in tensors.items() if not IGNORED_WEIGHTS.search(name)}
    head = result.get("lm_head.weight")  # (D, V), or (V, D) of a class that ties it
    is_rows = head is not None and head.shape == [config.vocab_size, config.hidden_size] != head.shape[::-1]
    if config.tie_word_embeddings:
        result = {name: tensor for name, tensor in result.items() if not name.startswith("lm_head.")}
        if head is not None:
            result.setdefault(names["embed_tokens.weight"], head if is_rows else _transposed(head))
    elif is_rows:
        result["lm_head.weight"] = _transposed(head)
    for name in list(result):
        stem, _, kind = name.rpartition(".")
        stem, _, module = stem.rpartition(".")
        columns = result[name].shape[-1]
        if module == "qkv_proj" and columns == K * (G + 2) * Dh:
            fused, group = result.pop(name), (G + 2) * Dh
            for which, begin, end in (("q", 0, G), ("k", G, G + 1), ("v", G + 1, G + 2)):
                result[f"{stem}.{which}_proj.{kind}"] = _columns(fused, begin * Dh, end * Dh, group)
        elif module == "gate_up_fused_proj" and "layers.{i}.mlp.gate_proj.weight" in names:
            fused = result.pop(name)
            for which, begin, end in (("gate", 0, columns // 2), ("up", columns // 2, columns)):
                linear = names["layers.{i}.mlp." + which + "_proj.weight"].split(".")[-2]
                result[f"{stem}.{linear}.{kind}"] = _columns(fused, begin, end, columns)
    if names.get("layers.{i}.attention.qkv_proj.weight", "").endswith("self_attn.qkv_proj.weight"):
        for name in [n for n in result if ".self_attn.q_proj." in n]:
            parts = [result.pop(name.replace(".q_proj.", f".{which}_proj."), None) for which in "qkv"]
            if None not in parts:
                result[name.replace(".q_proj.", ".qkv_proj.")] = _concatenated(parts)
    return result


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(lambda: tensor.read().T, tensor.shape[::-1])


def _columns(tensor: StoredTensor, begin: int, end: int, group: int) -> StoredTensor:
    """Columns [begin, end) of every `group` columns."""
    *outer, columns = tensor.shape
    groups = columns // group

    def read() -> np.ndarray:
        return tensor.read().reshape([*outer, groups, group])[..., begin:end].reshape([*outer, -1])

    return StoredTensor(read, [*outer, groups * (end - begin)])


def _concatenated(parts: list[StoredTensor]) -> StoredTensor:
    """Tensors side by side along the last dim."""
    shape = [*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)]
    return StoredTensor(lambda: np.concatenate([part.read() for part in parts], axis=-1), shape)
