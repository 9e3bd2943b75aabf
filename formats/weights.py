"""A model <-> named tensors, under Hugging Face's and PaddleNLP's names."""

import dataclasses
import functools
import json
import math
import re
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import paddle

from families import FAMILIES, IGNORED_WEIGHTS, _table, weight_names
from formats.files import UserError, atomic_file
from formats.tensor_files import BinFile, LazyTensor, _rows, read_pdparams, safetensors_header, write_safetensors
from model import _QUANTIZED, QuantLinear, block_linears, set_parameter
from positions import rope_frequencies

# ================================================================================= weights by their names


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter under the name that Hugging Face (or PEFT) gives it, and how its layout differs from ours."""

    name: str
    parameter: paddle.Tensor
    transposed: bool  # theirs is [out, in], ours [in, out]
    stored: str | None = None  # dtype on disk; None: the one that the folder is saved in

    def to_numpy(self, tensor=None):
        """The parameter, or a tensor of its shape (a moment, a gradient), as numpy in their layout; bfloat16 as float32."""
        if tensor is None:
            assert self.parameter._is_initialized(), f"{self.name}: its values are not here"
            tensor = self.parameter
        if not isinstance(tensor, np.ndarray):
            tensor = (tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor).numpy()
        return tensor.T if self.transposed else tensor

    def from_numpy(self, array):
        """All of it in their layout -> what the parameter holds of it, in ours."""
        array = array.T if self.transposed else array
        return np.ascontiguousarray(_rows(array) if self.shard_spec is None else self.shard_spec.slice(array))

    def read(self, read, extent=None):
        """What the parameter holds of a stored tensor, in our layout; or, laid flat, the elements extent = (first, last) of that.

        read() gives all of it, or is a LazyTensor: of that no rows and columns are read but those with elements in them.
        """
        cuts, row, shape = (
            {} if self.shard_spec is None else {self.shard_spec.dim: self.shard_spec.ranges},
            0,
            self.parameter.shape,
        )
        if extent is not None and isinstance(read, LazyTensor):
            inner = math.prod(shape[1:])
            row, stop = extent[0] // inner, -(-extent[1] // inner)
            cuts[0] = intersect(cuts.get(0, [(0, shape[0])]), row, stop)
            extent = extent[0] - row * inner, extent[1] - row * inner
        if not cuts or not isinstance(read, LazyTensor):
            array = self.from_numpy(read())
        else:
            array = read.ranges(
                {len(shape) - 1 - dim if self.transposed else dim: ranges for dim, ranges in cuts.items()}
            )
            array = np.ascontiguousarray(_rows(array.T) if self.transposed else array)
        return array if extent is None else array.reshape([-1])[slice(*extent)]

    @property
    def tensor(self):
        """What an optimizer updates, and by what: see parallel.Piece for a part of it."""
        return self.parameter

    extent = None  # of its elements, laid flat: all

    def set(self, array):
        """What read() gives, into the parameter."""
        set_parameter(self.parameter, array)

    @property
    def grad(self):
        return self.parameter.grad

    def clear_gradient(self):
        self.parameter.clear_gradient(False)  # False: released, not filled with zeros

    @property
    def shard_spec(self):
        """None, or which part of the whole the parameter is: an object with shape (of the whole) and take(array)."""
        return getattr(self.parameter, "shard_spec", None)

    @property
    def shape(self):
        """Their shape of the whole."""
        shape = list(self.parameter.shape if self.shard_spec is None else self.shard_spec.shape)
        return shape[::-1] if self.transposed else shape


def intersect(ranges, first, last):
    """The part from first to last of what ranges [(start, stop), …] are, behind one another."""
    found, at = [], 0
    for start, stop in ranges:
        a, b = max(first, at), min(last, at + stop - start)
        if a < b:
            found.append((start + a - at, start + b - at))
        at += stop - start
    return found


class SaveEntry(namedtuple("SaveEntry", "tensors sources make", defaults=(None,))):
    """Tensors of a file that are made of the same weights.

    tensors: {name: (shape, dtype)}, as stored; sources: [(Weight, its parameter or a tensor of that shape)]; make: from
    the sources' wholes in the file's layout to the arrays, in the order of tensors; None: they are stored as they are.
    """

    @classmethod
    def of(cls, weight, dtype="float32", name=None, tensor=None):
        """One stored as it is: a weight, or a tensor of its shape under another name."""
        source = weight.parameter if tensor is None else tensor
        return cls({name or weight.name: (weight.shape, weight.stored or dtype)}, [(weight, source)])

    def arrays(self, *wholes):
        return list(wholes) if self.make is None else self.make(*wholes)


def named_weights(model, rows=None):
    """[Weight] of the base model in the order of its name table, or of other rows; adapters and prefix are not among them."""
    found = {name.replace(".base.", "."): p for name, p in (*model.named_parameters(), *model.named_buffers())}
    weights = []
    for path, name, transposed in weight_names(model.config, rows):
        if (parameter := found.get(path)) is not None:
            weights.append(Weight(name, parameter, transposed))
        elif path.removesuffix("weight") + "qweight" in found:
            weights += _quantized_weights(found, path.removesuffix("weight"), name.removesuffix("weight"))
    return weights


def weights_to_save(model):
    """named_weights() as a folder holds them: a tied head and rope's frequencies too, where the family's files have them."""
    weights, config = named_weights(model), model.config
    if model.lm_head is None and FAMILIES[config.family].also_stores_head:
        weights.append(Weight(_head_name(config), model.embed_tokens.weight, False))
    if (name := config.stored_frequencies) is not None:
        # They are stored as they would be without any stretching.
        plain = dataclasses.replace(config, rope={"rope_type": "default", "rope_theta": 10000.0})
        frequencies = paddle.to_tensor(rope_frequencies(plain)[0])
        layers = range(config.num_hidden_layers if "{i}" in name else 1)
        weights += [Weight(name.format(i=i), frequencies, False) for i in layers]
    return weights


def _head_name(config):
    return next(theirs for ours, theirs, _ in FAMILIES[config.family].names if ours == "lm_head.weight")


def _quantized_weights(found, ours, theirs):
    packed = found[ours + "qweight"].dtype == paddle.int32
    dtypes = {"qweight": "int32" if packed else "int8", "scales": "float16" if packed else "float32"}
    return [
        Weight(theirs + their_name, found[ours + name], name == "qweight" and not packed, dtype or dtypes[name])
        for name, their_name, dtype in _QUANTIZED
        if found.get(ours + name) is not None
    ]


def init_weights(model, seed):
    """Normal(0, initializer_range) for matrices, 1 for norms, 0 for biases; each from its own (seed, name) alone."""
    for weight in named_weights(model):
        if len(weight.shape) == 2:
            generator = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
            array = generator.standard_normal(weight.shape, np.float32) * np.float32(model.config.initializer_range)
        else:
            array = np.full(
                weight.shape, 0.0 if weight.name.endswith("bias") else 1.0 - model.config.norm_offset, np.float32
            )
        set_parameter(weight.parameter, weight.from_numpy(array))


MASTER_WEIGHTS = "master_weights.safetensors"  # float32 weights beside, or in place of, those in bfloat16


MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams", MASTER_WEIGHTS)


def stored_tensors(path, singles=MODEL_FILES):
    """{tensor name: (a function that reads it, its shape)} over all weight files of a folder, one of `singles` or its parts."""
    path = Path(path)
    for single in singles:
        index = f"{single}.index.json"
        if (path / index).is_file():
            try:
                files = sorted(
                    {str(f) for f in json.loads((path / index).read_text(encoding="utf-8"))["weight_map"].values()}
                )
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{path / index}: not an index with a weight_map") from None
        elif (path / single).is_file():
            files = [single]
        else:
            continue
        found = {}
        for file in files:
            if Path(file).name != file or not (path / file).is_file():
                raise UserError(f"{path / index}: names the file {file}, which is not there")
            if file.endswith(".pdparams"):
                found.update(read_pdparams(path / file))
            elif file.endswith(".bin"):
                bin_file = BinFile(path / file)
                found.update(
                    {n: ((lambda b=bin_file, n=n: b.read(n)), list(e[3])) for n, e in bin_file.entries.items()}
                )
            else:
                header = safetensors_header(path / file)
                found.update({n: (LazyTensor(path / file, e), e[1]) for n, e in header.items()})
        return found
    if parts := sorted(path.glob("model_state.*.pdparams")):
        raise UserError(f"{parts[0]}: a part of a model cut up for tensor or pipeline parallelism: merge them first")
    raise UserError(f"{path}: no {', '.join(singles)} or an index of them")


def load_weights(model, path, singles=MODEL_FILES):
    """Fill the base weights from a folder of Hugging Face's or PaddleNLP's, tensor by tensor; every mismatch is named in
    one error."""
    config, found, elsewhere = model.config, stored_tensors(path, singles), model.names_on_other_ranks
    theirs = _paddlenlp_names(config)
    if theirs and any(name.startswith(theirs[0][1].partition(".")[0] + ".") for name in found):
        weights = named_weights(model, theirs)
        found = _paddlenlp_parts(found, config, theirs)
        places = {ours for ours, name, _ in weight_names(config) if name in elsewhere}
        elsewhere = {name for ours, name, _ in weight_names(config, theirs) if ours in places}
    else:
        weights = named_weights(model)
        found = _published_names(found, config, {w.name for w in weights} | elsewhere)
    weights = {w.name: w for w in weights}
    wrong = [f"missing {n}" for n in weights if n not in found]
    wrong += [f"unexpected {n}" for n in found if n not in weights and n not in elsewhere]
    wrong += [
        f"{n} has shape {list(found[n][1])}, config.json says {w.shape}"
        for n, w in weights.items()
        if n in found and list(found[n][1]) != w.shape
    ]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit: {'; '.join(wrong)}")
    for name, weight in weights.items():
        piece = getattr(weight.parameter, "piece", weight)  # of sharding stage 3: what this rank keeps, or None
        if piece is None:
            continue
        array = weight.read(found[name][0], piece.extent)
        stored = weight.stored or "float32"
        if stored.startswith("int") != (array.dtype.kind == "i"):
            raise UserError(f"{path}: {name} is of {array.dtype}; {stored} is needed")
        piece.set(array)
    for name, (_, _, layer) in block_linears(model).items():
        if isinstance(layer, QuantLinear):
            layer.check(path, name)


def _published_names(found, config, names):
    """stored_tensors() of a Hugging Face folder under the names of the family's table, without what is not a weight of it.

    Published files leave out the prefix of the names (GPT-2, Bloom), hold a tied head too, tables that are computed, the
    extra layers of DeepSeek-V3 that only speculate, and all experts of a layer in one tensor (transformers 5, if asked to).
    """
    prefix, result = FAMILIES[config.family].prefix, {}
    for name, value in found.items():
        if IGNORED_WEIGHTS.search(name):
            continue
        if name not in names and prefix + name in names:
            name = prefix + name
        router = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        if router in names:  # Mixtral's is called so beside experts that are one tensor
            name = router
        if name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj")):
            result |= _single_experts(name, value, config)
        else:
            result[name] = value
    if config.tie_word_embeddings:
        result.pop(_head_name(config), None)
    if config.source.get("num_nextn_predict_layers"):
        extra = re.compile(r"model\.layers\.(\d+)\.")
        result = {n: v for n, v in result.items() if not (m := extra.match(n)) or int(m[1]) < config.num_hidden_layers}
    return result


def _single_experts(name, value, config):
    """{name of the family's table: (read, shape)} for (E, 2F, D), gate before up, or (E, D, F) of all experts of a layer."""
    (read, shape), which = value, name.rpartition(".")[2]
    if len(shape) != 3 or config.experts is None:
        return {name: value}
    layer = int(re.search(r"layers\.(\d+)\.", name)[1])
    read = functools.lru_cache(1)(read)  # the whole is read once for all experts
    table = {ours: theirs for ours, theirs, _ in FAMILIES[config.family].names}
    parts = (
        {"down_proj": slice(None)}
        if which == "down_proj"
        else {"gate_proj": slice(0, shape[1] // 2), "up_proj": slice(shape[1] // 2, None)}
    )
    result = {}
    for part, rows in parts.items():
        for e in range(shape[0]):
            theirs = table["layers.{i}.mlp.experts.{e}." + part + ".weight"].format(i=layer, e=e)
            size = [len(range(shape[1])[rows]), shape[2]]
            result[theirs] = ((lambda e=e, rows=rows: read()[e, rows]), size)
    return result


def save_pretrained(model, path, dtype="float32", max_shard_bytes=5 << 30):
    """Write config.json and model*.safetensors in Hugging Face's layout; config.json last, each file atomically."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    shards, sizes = [{}], [0]
    for w in weights_to_save(model):
        stored = w.stored or dtype
        width = 2 if stored == "bfloat16" else np.dtype(stored).itemsize
        size = int(np.prod(w.shape)) * width
        if sizes[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][w.name] = (w.to_numpy, w.shape, stored)
        sizes[-1] += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        write_safetensors(path / name, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {n: f for f, s in zip(names, shards) for n in s}}
        with atomic_file(path / "model.safetensors.index.json") as file:
            json.dump(index, file, indent=2)
    with atomic_file(path / "config.json") as file:
        file.write(model.config.to_json(dtype))


# ========================================================================================= PaddleNLP's names

# Its linears are [in, out] as ours are, its names Hugging Face's behind another prefix, but for GPT and OPT, which are
# called after Paddle's own transformer layers.

_PADDLENLP_PREFIX = {"gpt2": "gpt", "chatglm": "chatglm.transformer", "chatglm2": "chatglm_v2", "baichuan": "llama"}


_PADDLENLP_TABLES = {
    "gpt2": _table("""
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
    "opt": _table("""
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


def _paddlenlp_names(config):
    """Rows of PaddleNLP's names for the family; the first is the embedding's."""
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


def _paddlenlp_parts(found, config, rows):
    """stored_tensors() of a PaddleNLP folder, with q, k, v and gate, up joined or apart as the model has them.

    fuse_attention_qkv: each key head's queries, key and value together, GPT's too; fuse_attention_ffn: gate, then up.
    """
    K, G, Dh = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim
    names = {ours: theirs for ours, theirs, _ in rows}
    result = {n: v for n, v in found.items() if not IGNORED_WEIGHTS.search(n)}
    if config.tie_word_embeddings:
        result = {n: v for n, v in result.items() if not n.startswith("lm_head.")}

    def part(value, begin, end, width):  # columns begin to end of every `width`
        read, shape = value
        many = shape[-1] // width
        return (lambda: read().reshape([*shape[:-1], many, width])[..., begin:end].reshape([*shape[:-1], -1])), [
            *shape[:-1],
            many * (end - begin),
        ]

    for name in list(result):
        stem, _, kind = name.rpartition(".")
        stem, _, module = stem.rpartition(".")
        shape = result[name][1]
        if module == "qkv_proj" and shape[-1] == K * (G + 2) * Dh:
            value, width = result.pop(name), (G + 2) * Dh
            for which, begin, end in (("q", 0, G), ("k", G, G + 1), ("v", G + 1, G + 2)):
                result[f"{stem}.{which}_proj.{kind}"] = part(value, begin * Dh, end * Dh, width)
        elif module == "gate_up_fused_proj" and "layers.{i}.mlp.gate_proj.weight" in names:
            value, width = result.pop(name), shape[-1]
            for which, begin, end in (("gate", 0, width // 2), ("up", width // 2, width)):
                theirs = names["layers.{i}.mlp." + which + "_proj.weight"].split(".")[-2]
                result[f"{stem}.{theirs}.{kind}"] = part(value, begin, end, width)
    if names.get("layers.{i}.attention.qkv_proj.weight", "").endswith("self_attn.qkv_proj.weight"):
        for name in [n for n in result if ".self_attn.q_proj." in n]:
            parts = [result.pop(name.replace(".q_proj.", f".{which}_proj."), None) for which in "qkv"]
            if None not in parts:
                shape = [*parts[0][1][:-1], sum(p[1][-1] for p in parts)]
                result[name.replace(".q_proj.", ".qkv_proj.")] = (
                    (lambda parts=parts: np.concatenate([read() for read, _ in parts], axis=-1)),
                    shape,
                )
    return result
