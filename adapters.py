"""LoRA and prefix tuning: layers, merging, PEFT folders, from_pretrained.

    model = from_pretrained("path/to/model")     # or an adapter's folder: its base model with the adapter merged in
    apply_lora(model, rank=8, alpha=16.0, targets=["q_proj", "v_proj"])
    apply_prefix(model, tokens=128)              # in place of LoRA
    weights = trainable_weights(model)           # what an optimizer updates: the adapter
    save_adapter(model, folder, base_model="path/to/model")
    load_adapter(model, folder, trainable=True)  # onto the plain base model
    merge(model)                                 # LoRA into the base weights: a plain model again

Adapters on disk are peft's: adapter_config.json and adapter_model.safetensors. LoRA folders of PaddleNLP are read too.

Shapes: D_in, D_out of a linear, R LoRA rank, P prefix tokens, L layers, K key/value heads, Dh head dim.
"""

import contextlib
import dataclasses
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import kernels

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from families import FAMILIES, ModelConfig, weight_names
from formats.files import UserError, _json_object, atomic_file
from formats.tensor_files import read_safetensors, safetensors_metadata, write_safetensors
from formats.weights import (
    SaveEntry,
    SaveSource,
    Weight,
    load_weights,
    named_weights,
    paddlenlp_names,
    read_config,
    stored_tensors,
)
from model import CausalLM, Linear, QuantLinear, RNGTracker, block_linears, build, linear_paths, set_parameter

# ============================================================================================ models and their weights


def from_pretrained(path: str | Path, dtype: str = "float32") -> CausalLM:
    """A CausalLM in eval mode from a Hugging Face folder. Peak memory: the model, its largest tensor, and a constant.

    path: a model's folder, or an adapter's: then the base model that it names (which may be an adapter's folder too),
    with LoRA merged into it or the prefix put on.
    """
    *adapters, base = base_folders(path)
    model = build(read_config(base), dtype)
    load_weights(model, base)
    for adapter in reversed(adapters):
        merge(load_adapter(model, adapter))
    model.eval()
    return model


def base_folders(path: str | Path) -> list[Path]:
    """A model's folder -> [it]; an adapter's -> [it, the base that it names, …, down to a model's folder]."""
    folders = [Path(path)]
    while not (folders[-1] / "config.json").is_file():
        files = [folders[-1] / name for name in ("adapter_config.json", "lora_config.json")]  # peft's, PaddleNLP's
        if (file := next(filter(Path.is_file, files), None)) is None:
            break
        base = _json_object(file).get("base_model_name_or_path")
        if not isinstance(base, str) or not Path(base).is_dir():
            raise UserError(f"{file}: base_model_name_or_path: {base!r} is not a folder of a model")
        if Path(base).resolve() in [folder.resolve() for folder in folders]:
            raise UserError(f"{file}: base_model_name_or_path: {base!r} is built on this adapter itself")
        folders.append(Path(base))
    return folders


def trainable_weights(model: CausalLM) -> list[Weight]:
    """The weights that have a gradient: PEFT's names for adapters and prefix, Hugging Face's for the others."""
    if (quantization := model.config.quantization) is not None:
        if quantization["quant_method"] == "a8w8":
            raise UserError(
                "the model is quantized to a8w8: rounded activations have no gradient; train the float model"
            )
        if not lora_layers(model) and model.prefix is None:
            raise UserError(
                "the model is quantized: its weights are integers; train LoRA or a prefix, or the float model"
            )
    return [w for w in named_weights(model) + adapter_weights(model) if not w.parameter.stop_gradient]


def cast_frozen_to_bf16(model: CausalLM) -> None:
    """Store frozen weights of linears, the head too, in bfloat16 only: bfloat16 products round them to it anyway."""
    for layer in model.sublayers():
        if isinstance(layer, Linear) and layer.weight.stop_gradient and layer.weight.dtype == paddle.float32:
            with paddle.LazyGuard():  # no memory until it is set
                half = layer.create_parameter(layer.weight.shape, dtype="bfloat16")
            half.set_value(layer.weight.astype("bfloat16"))
            half.stop_gradient = True
            if (shard_spec := getattr(layer.weight, "shard_spec", None)) is not None:
                half.shard_spec = shard_spec
            layer.weight = half


# =============================================================================================================== LoRA


class LoRALinear(nn.Layer):
    """base(x) + scaling · dropout(x) A B (Hu et al., arXiv 2106.09685) around any linear layer `base`.

    scaling is alpha/R, or alpha/sqrt(R) (rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353) rescales every output to
    the trained magnitude; its norm is a constant to the gradient (their section 4.3). PiSSA (arXiv 2404.02948) starts A
    B at the largest singular values and takes them out of the base weight; `pissa_init` keeps that start, (A, B) of the
    full weight.
    """

    def __init__(
        self,
        base: nn.Layer,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
    ):
        super().__init__()
        n_in, n_out = base.n_in, base.n_out
        if dora and isinstance(base, QuantLinear):
            raise UserError("DoRA needs the base model's float weights; this one is quantized")
        self.base, self.dropout = base, dropout
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled = True
        bound = math.sqrt(1 / n_in)  # Kaiming uniform with a = sqrt(5), as in the paper's code and peft
        self.lora_A = self.create_parameter([n_in, rank], default_initializer=nn.initializer.Uniform(-bound, bound))
        self.lora_B = self.create_parameter([rank, n_out], default_initializer=nn.initializer.Constant(0.0))
        self.lora_magnitude_vector = None
        self.pissa_init = None
        self.rng, self.key = RNGTracker(), ""  # apply_lora() sets the model's tracker, and the layer's path
        for parameter in base.parameters():
            parameter.stop_gradient = True
        if dora:
            self.lora_magnitude_vector = self.create_parameter(base.weight.shape[1:])
            self.lora_magnitude_vector.set_value(base.column_norms(base.weight.astype("float32")))
            shard_spec = getattr(base.weight, "shard_spec", None)
            if shard_spec is not None and shard_spec.dim == 1:
                self.lora_magnitude_vector.shard_spec = shard_spec.of(0, shard_spec.shape[1:])

    def delta(self) -> paddle.Tensor:
        """(D_in, D_out) float32: what the adapter adds to the weight."""
        return paddle.matmul(self.lora_A, self.lora_B) * self.scaling

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None) -> paddle.Tensor:
        y = self.product(x, self.base.bias) if self.enabled else self.base(x)
        return y if residual is None else residual + y

    def product(self, x: paddle.Tensor, bias: paddle.Tensor | None = None) -> paddle.Tensor:
        """x (…, D_in) times the adapted weight (the base weight while the adapter is off), plus a bias."""
        base = self.base
        if not self.enabled:
            return base.product(x)
        dropped = self.dropped(x) if self.dropout else x
        if isinstance(base, Linear) and self.lora_magnitude_vector is None:
            dropped_or_none = None if dropped is x else dropped
            return kernels.lora_linear(
                x, base.weight, self.lora_A, self.lora_B, self.scaling, bias=bias, dropped=dropped_or_none
            )
        y = base.product(x)
        update = kernels.linear(kernels.linear(dropped, self.lora_A) * self.scaling, self.lora_B)
        if self.lora_magnitude_vector is None:
            return y + update if bias is None else y + bias + update
        with paddle.no_grad():
            norm = base.column_norms(base.weight.astype("float32") + self.delta())
        ratio = self.lora_magnitude_vector / norm  # (D_out,)
        y_dropped = y if dropped is x else base.product(dropped)
        y = y if bias is None else y + bias
        return y + y_dropped * (ratio - 1) + update * ratio

    def dropped(self, x: paddle.Tensor) -> paddle.Tensor:
        """x after dropout; x itself in eval mode."""
        if not self.training:
            return x
        with self.rng.fork(self.key):
            return F.dropout(x, self.dropout)

    @paddle.no_grad()
    def init_pissa(self) -> None:
        """Set A B to the R largest singular triples of the weight, and take them out of the base."""
        u, s, vt = np.linalg.svd(self.base.full_weight().astype(np.float64), full_matrices=False)
        rank = self.lora_A.shape[1]
        root = np.sqrt(s[:rank] / self.scaling)
        self.set_pissa_init((u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32))

    @paddle.no_grad()
    def set_pissa_init(self, a: np.ndarray, b: np.ndarray) -> None:
        """Start at these A (D_in, R) and B (R, D_out) of the full weight, which the base loses."""
        set_parameter(self.lora_A, a)
        set_parameter(self.lora_B, b)
        self.pissa_init, delta, weight = (a, b), self.delta(), self.base.weight
        if (shard_spec := getattr(weight, "shard_spec", None)) is not None:
            delta = paddle.to_tensor(shard_spec.slice(delta.numpy()))
        weight.set_value((weight.astype("float32") - delta).astype(weight.dtype))

    @paddle.no_grad()
    def merged(self) -> nn.Layer:
        """The base layer, with the adapter added to its weight."""
        if isinstance(self.base, QuantLinear):
            raise UserError(
                "an adapter cannot be merged into quantized weights; merge it into the float model, then quantize"
            )
        weight = self.base.weight.astype("float32") + self.delta()
        if self.lora_magnitude_vector is not None:
            weight = weight * (self.lora_magnitude_vector / self.base.column_norms(weight))
        self.base.weight.set_value(weight.astype(self.base.weight.dtype))
        return self.base


def lora_layers(model: CausalLM) -> dict[str, LoRALinear]:
    """{Hugging Face module path: LoRALinear} on this rank."""
    return {path: layer for path, (_, _, layer) in block_linears(model).items() if isinstance(layer, LoRALinear)}


def linears_on_other_ranks(model: CausalLM) -> set[str]:
    """Hugging Face module paths of the blocks' linears that only other ranks hold."""
    paths = [theirs for _, theirs in linear_paths(model.config)] if model.names_on_other_ranks else []
    return {path for path in paths if not model.names_on_other_ranks.isdisjoint((path + ".weight", path + ".qweight"))}


def _all_linear(targets: str | list[str] | None) -> bool:
    return targets in (None, "all-linear", [])


def match_lora_targets(model: CausalLM, targets: str | list[str] | None = None) -> list[str]:
    """Hugging Face paths of this rank's linears that `targets` names (see apply_lora); each must match something."""
    local = block_linears(model)
    if _all_linear(targets):
        return list(local)
    names = [targets] if isinstance(targets, str) else targets
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(target)}" for target in targets]
    paths = {*local, *linears_on_other_ranks(model)}
    for pattern, name in zip(patterns, names):
        if not any(re.fullmatch(pattern, path) for path in paths):
            linears = sorted({path.rpartition(".")[2] for path in paths})
            raise UserError(f"lora_target_modules: {name!r} matches no linear layer; there are {', '.join(linears)}")
    return [path for path in local if any(re.fullmatch(pattern, path) for pattern in patterns)]


def apply_lora(
    model: CausalLM,
    rank: int = 8,
    *,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    pissa: bool = False,
    targets: str | list[str] | None = None,
    seed: int = 0,
) -> CausalLM:
    """Freeze the model and put a LoRALinear around every linear named in `targets` (default: all of the blocks).

    targets: names such as "q_proj", matched as the end of the Hugging Face module path; or one string: a regular
    expression over the whole path, or "all-linear". A target that matches nothing is a UserError, and nothing is
    changed.
    """
    assert not lora_layers(model), "the model has LoRA already"
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(f"lora_rank must be at least 1 and lora_dropout in [0, 1): found {rank} and {dropout}")
    if pissa and dora:
        raise UserError("pissa and dora exclude each other: both redefine what the base weight is")
    if pissa and model.config.quantization is not None:
        raise UserError("PiSSA needs the base model's float weights; this one is quantized")
    linears, chosen = block_linears(model), match_lora_targets(model, targets)
    if _all_linear(targets):
        targets = sorted({path.rpartition(".")[2] for path in {*linears, *linears_on_other_ranks(model)}})
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for path in chosen:
        parent, attribute, layer = linears[path]
        lora = LoRALinear(layer, rank, alpha, dropout=dropout, rslora=rslora, dora=dora)
        generator = np.random.default_rng([seed, zlib.crc32(path.encode())])  # depends on seed and name only
        bound = math.sqrt(1 / layer.n_in)
        set_parameter(lora.lora_A, generator.uniform(-bound, bound, lora.lora_A.shape).astype(np.float32))
        lora.rng, lora.key = model.rng, path
        if pissa:
            lora.init_pissa()
        setattr(parent, attribute, lora)
    model.lora_config = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }
    return model


@contextlib.contextmanager
def adapter_disabled(model: CausalLM) -> Iterator[CausalLM]:
    """The base model inside the block, the adapted one after it. Not for PiSSA, which has changed the base weights."""
    layers, prefix = lora_layers(model).values(), model.prefix
    assert all(layer.pissa_init is None for layer in layers), "PiSSA changes the base: there is no base to go back to"
    for layer in layers:
        layer.enabled = False
    model.prefix = None
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True
        model.prefix = prefix


def merge(model: CausalLM) -> CausalLM:
    """Merge every LoRA into its base weight, in place; the model is a plain one afterwards. A prefix stays."""
    for parent, attribute, layer in block_linears(model).values():
        if isinstance(layer, LoRALinear):
            setattr(parent, attribute, layer.merged())
    return model


# ====================================================================================================== prefix tuning


class Prefix(nn.Layer):
    """Trained keys and values of P tokens before the text in every layer (Li & Liang, arXiv 2101.00190).

    One table (P, L · 2 · K · Dh), or with a projection an embedding and a two-layer tanh MLP that computes it. It has K
    heads, so grouped-query models are right; keys are not rotated, and the text starts at position P, as in peft.
    """

    def __init__(
        self, config: ModelConfig, tokens: int, *, projection: bool = False, projection_hidden_size: int | None = None
    ):
        super().__init__()
        self.tokens, self.layers = tokens, config.num_hidden_layers
        self.heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.local_heads = None  # slice of the key heads that a rank of tp uses; None: all
        width = self.heads * self.head_dim
        self.embedding = self.create_parameter([tokens, width if projection else self.layers * 2 * width])
        self.hidden, self.output = None, None
        if projection:
            hidden_size = projection_hidden_size or config.hidden_size
            self.hidden = Linear(width, hidden_size, bias=True)
            self.output = Linear(hidden_size, self.layers * 2 * width, bias=True)

    def table(self) -> paddle.Tensor:
        """(P, L · 2 · K · Dh)"""
        if self.hidden is None:
            return self.embedding
        return self.output(paddle.tanh(self.hidden(self.embedding)))

    def keys_and_values(self, B: int, comm) -> list[tuple[paddle.Tensor, paddle.Tensor]]:
        """(k, v) of each layer, each (B, P, K/tp, Dh); comm: model.LocalComm, or its version for several ranks."""
        return comm.run_unit("prefix", self._keys_and_values, B)

    def _keys_and_values(self, B):
        table = self.table().clone().reshape([self.tokens, self.layers, 2, self.heads, self.head_dim])
        if self.local_heads is not None:
            table = table[:, :, :, self.local_heads]
        table = table.unsqueeze(0).expand([B, *table.shape])  # (B, P, L, 2, K/tp, Dh)
        return [(table[:, :, layer, 0], table[:, :, layer, 1]) for layer in range(self.layers)]


def apply_prefix(
    model: CausalLM,
    tokens: int = 128,
    *,
    projection: bool = False,
    projection_hidden_size: int | None = None,
    seed: int = 0,
) -> CausalLM:
    """Freeze the model and give it a trainable prefix of `tokens` tokens."""
    if tokens < 1:
        raise UserError(f"num_prefix_tokens must be at least 1, found {tokens}")
    for parameter in model.parameters():
        parameter.stop_gradient = True
    model.prefix = Prefix(model.config, tokens, projection=projection, projection_hidden_size=projection_hidden_size)
    for name, parameter in model.prefix.named_parameters():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        std = 0.02 if parameter.ndim == 2 else 0.0
        set_parameter(parameter, generator.standard_normal(parameter.shape, np.float32) * np.float32(std))
    return model


# ============================================================================================ saving, in peft's format


def adapter_weights(model: CausalLM) -> list[Weight]:
    """The weights of LoRA and prefix under the names that peft gives them."""
    weights = []
    for path, layer in lora_layers(model).items():
        stem = f"base_model.model.{path}."
        weights += [
            Weight(stem + "lora_A.weight", layer.lora_A, True),
            Weight(stem + "lora_B.weight", layer.lora_B, True),
        ]
        if layer.lora_magnitude_vector is not None:
            weights.append(Weight(stem + "lora_magnitude_vector", layer.lora_magnitude_vector, False))
    if (prefix := model.prefix) is not None:
        name = "prompt_embeddings" if prefix.hidden is None else "embedding.weight"
        weights.append(Weight(name, prefix.embedding, False))
        if prefix.hidden is not None:
            for name, layer in (("transform.0", prefix.hidden), ("transform.2", prefix.output)):
                weights += [
                    Weight(f"{name}.weight", layer.weight, True),
                    Weight(f"{name}.bias", layer.bias, False),
                ]
    return weights


@dataclasses.dataclass
class AdapterFile:
    """A safetensors file of an adapter's folder."""

    entries: list[SaveEntry]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def save_adapter(model: CausalLM, path: str | Path, base_model: str | Path | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft does; the configuration last.

    PiSSA is saved as the plain LoRA of rank 2R that gives the same model on the unchanged base: [A A0] [B; -B0], with
    A0 B0 its start. A prefix with a projection is saved as the table that it computes; its MLP, for further training,
    as prefix_projection.safetensors.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config, files = adapter_files(model, base_model)
    for name, file in files.items():
        tensors = {}
        for entry in file.entries:
            sources = [source.weight.to_numpy(source.tensor) for source in entry.sources]
            tensors |= dict(zip(entry.tensors, entry.arrays(*sources)))
        write_safetensors(path / name, tensors, file.metadata)
    with atomic_file(path / "adapter_config.json") as file:
        json.dump(config, file, indent=2)


def adapter_files(model: CausalLM, base_model: str | Path | None = None) -> tuple[dict, dict[str, AdapterFile]]:
    """(content of adapter_config.json, {name: AdapterFile}), see save_adapter."""
    config = {
        "base_model_name_or_path": str(base_model) if base_model else None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    more, files = _lora_files(model) if model.prefix is None else _prefix_files(model)
    return config | more, files


def _prefix_files(model: CausalLM) -> tuple[dict, dict[str, AdapterFile]]:
    prefix, entries = model.prefix, [SaveEntry.of(weight) for weight in adapter_weights(model)]
    width = prefix.heads * prefix.head_dim
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": prefix.tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": prefix.heads,
        "num_layers": prefix.layers,
        "prefix_projection": prefix.hidden is not None,
        "encoder_hidden_size": width if prefix.hidden is None else prefix.hidden.weight.shape[1],
    }
    if prefix.hidden is None:
        return config, {"adapter_model.safetensors": AdapterFile(entries)}
    with paddle.no_grad():
        table = model.comm.run_unit("prefix", lambda: prefix.table().clone()).numpy()
    computed = SaveEntry({"prompt_embeddings": (list(table.shape), "float32")}, [], lambda: [table])
    return config, {
        "prefix_projection.safetensors": AdapterFile(entries),
        "adapter_model.safetensors": AdapterFile([computed]),
    }


def _lora_files(model: CausalLM) -> tuple[dict, dict[str, AdapterFile]]:
    weights = {weight.name: weight for weight in adapter_weights(model)}
    entries, metadata = {name: SaveEntry.of(weight) for name, weight in weights.items()}, {}
    config = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": _stores_in_out(model.config),
        "init_lora_weights": True,
        **model.lora_config,
    }
    layers = lora_layers(model)
    if any(layer.pissa_init is not None for layer in layers.values()):
        for path, layer in layers.items():
            a, b = (weights[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")  # stored (R, D_in), (D_out, R)
            a0, b0 = (start.T for start in layer.pissa_init)
            entries[a.name] = SaveEntry(
                {a.name: ([2 * a.shape[0], a.shape[1]], "float32")},
                [SaveSource(a, a.parameter)],
                lambda a, a0=a0: [np.concatenate([a, a0])],
            )
            entries[b.name] = SaveEntry(
                {b.name: ([b.shape[0], 2 * b.shape[1]], "float32")},
                [SaveSource(b, b.parameter)],
                lambda b, b0=b0: [np.concatenate([b, -b0], 1)],
            )
        config["r"] *= 2
        config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2  # so that the scaling stays
        metadata["pissa_start_included"] = "true"
    return config, {"adapter_model.safetensors": AdapterFile(list(entries.values()), metadata)}


def _stores_in_out(config: ModelConfig) -> bool:
    """Whether the family's files store the linears of the blocks as [in, out], as GPT-2's do."""
    rows = FAMILIES[config.family].names
    return not any(transposed for ours, _, transposed in rows if ours.endswith("_proj.weight"))


# ============================================================================================================= loading

# Keys that must be absent or false, as what they ask for is not here.
UNSUPPORTED_PEFT_KEYS = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "exclude_modules",
    "trainable_token_indices",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
)

UNSUPPORTED_PADDLENLP_KEYS = (
    "use_mora",
    "pissa",
    "loraga",
    "lora_use_mixer",
    "do_qat",
    "trainable_modules",
    "trainable_bias",
    "enable_lora_list",
)

NUMBERS = {  # of adapter_config.json, by peft_type
    "LORA": ("r", "lora_alpha"),
    "PREFIX_TUNING": ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
}


def load_adapter(model: CausalLM, path: str | Path, *, trainable: bool = False) -> CausalLM:
    """Put a saved LoRA or prefix onto a plain model: saved by save_adapter, by peft, or a LoRA by PaddleNLP.

    trainable: to train it further, exactly from where it was saved (PiSSA and a prefix's projection too).
    """
    path = Path(path)
    config_path, weights_path = path / "adapter_config.json", path / "adapter_model.safetensors"
    if (path / "lora_config.json").is_file() and not config_path.is_file():
        config, tensors = _paddlenlp_lora(model, path)
    else:
        for needed in (config_path, weights_path):
            if not needed.is_file():
                raise UserError(
                    f"{needed}: no such file; an adapter is a folder with adapter_config.json and "
                    "adapter_model.safetensors"
                )
        config, tensors = _json_object(config_path), None
    kind = config.get("peft_type")
    if kind not in NUMBERS:
        raise UserError(f"{config_path}: peft_type {kind!r} is not supported; LORA and PREFIX_TUNING are")
    for key in NUMBERS[kind]:
        if not isinstance(config.get(key), (int, float)):
            raise UserError(f"{config_path}: {key} must be a number, found {config.get(key)!r}")
    tensors = read_safetensors(weights_path) if tensors is None else tensors
    load = _load_lora if kind == "LORA" else _load_prefix
    load(model, config, tensors, config_path, trainable)
    for weight in adapter_weights(model):
        weight.parameter.stop_gradient = not trainable
    return model


def _load_lora(model: CausalLM, config: dict, tensors: dict, config_path: Path, trainable: bool) -> None:
    for key in UNSUPPORTED_PEFT_KEYS:
        if config.get(key):
            raise UserError(f"{config_path}: {key} = {config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f'{config_path}: bias = {config["bias"]!r} is not supported; only "none"')
    weights_path = config_path.parent / "adapter_model.safetensors"
    resume_pissa = (
        trainable
        and weights_path.is_file()
        and safetensors_metadata(weights_path).get("pissa_start_included") == "true"
    )
    rank, alpha, rslora = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))
    if resume_pissa:  # split [A A0] [B; -B0] again, so that training goes on where it was
        rank, alpha = rank // 2, alpha / (math.sqrt(2) if rslora else 2)
    apply_lora(
        model,
        rank,
        alpha=alpha,
        dropout=config.get("lora_dropout") or 0.0,
        rslora=rslora,
        dora=bool(config.get("use_dora")),
        targets=config.get("target_modules"),
    )
    if resume_pissa:
        for path, layer in lora_layers(model).items():
            a_name, b_name = (f"base_model.model.{path}.lora_{x}.weight" for x in "AB")
            a, b = tensors[a_name].T, tensors[b_name].T  # (D_in, 2R), (2R, D_out)
            layer.set_pissa_init(np.ascontiguousarray(a[:, rank:]), np.ascontiguousarray(-b[rank:]))
            tensors[a_name], tensors[b_name] = a[:, :rank].T, b[:rank].T
    fill_adapter(model, tensors, weights_path)


def _load_prefix(model: CausalLM, config: dict, tensors: dict, config_path: Path, trainable: bool) -> None:
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    model_sizes = layers, heads, heads * model.config.head_dim
    sizes = config["num_layers"], config["num_attention_heads"], config["token_dim"]
    if sizes != model_sizes:
        raise UserError(
            f"{config_path}: prefix of {sizes[0]} layers, {sizes[1]} heads, width {sizes[2]}; "
            f"the model has {model_sizes[0]}, {model_sizes[1]}, {model_sizes[2]}"
        )
    tokens, projection = config["num_virtual_tokens"], config_path.parent / "prefix_projection.safetensors"
    if trainable and projection.is_file():
        apply_prefix(model, tokens, projection=True, projection_hidden_size=config["encoder_hidden_size"])
        fill_adapter(model, read_safetensors(projection), projection)
    else:
        apply_prefix(model, tokens)
        fill_adapter(model, tensors, config_path.parent / "adapter_model.safetensors")


def restore_adapter(model: CausalLM, path: str | Path) -> None:
    """Overwrite the values of the model's adapter with those that save_adapter wrote earlier in the same run."""
    path = Path(path)
    projection = path / "prefix_projection.safetensors"
    file = projection if projection.is_file() else path / "adapter_model.safetensors"
    tensors = read_safetensors(file)
    for module, layer in lora_layers(model).items():
        if layer.pissa_init is not None:  # PiSSA is saved as [A A0] [B; -B0]
            a, b = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
            rank = layer.lora_A.shape[1]
            tensors[a], tensors[b] = tensors[a][:rank], tensors[b][:, :rank]
    fill_adapter(model, tensors, file)


def fill_adapter(model: CausalLM, tensors: dict[str, np.ndarray], path: Path) -> None:
    """Set the model's adapter to full tensors under peft's names (from `path`, for messages); each rank takes its
    shards.

    All tensors that are missing, unexpected (for linears of no rank) or of another shape are named in one UserError.
    """
    weights, other_linears = {w.name: w for w in adapter_weights(model)}, linears_on_other_ranks(model)
    mismatches = [f"missing {name}" for name in weights if name not in tensors]
    for name in tensors:
        linear = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if name not in weights and linear not in other_linears:
            mismatches.append(f"unexpected {name}")
    mismatches += [
        f"{name} has shape {list(tensors[name].shape)}, not {weight.shape}"
        for name, weight in weights.items()
        if name in tensors and list(tensors[name].shape) != weight.shape
    ]
    if mismatches:
        raise UserError(f"{path}: {len(mismatches)} tensors do not fit: {'; '.join(mismatches)}")
    for name, weight in weights.items():
        array = weight.from_numpy(np.ascontiguousarray(tensors[name], np.float32))
        set_parameter(weight.parameter, array)


def _paddlenlp_lora(model: CausalLM, path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A LoRA that PaddleNLP saved -> adapter_config.json and tensors, as peft would have written them."""
    config, rows = _json_object(path / "lora_config.json"), paddlenlp_names(model.config)
    for key in UNSUPPORTED_PADDLENLP_KEYS:
        if config.get(key):
            raise UserError(f"{path / 'lora_config.json'}: {key} = {json.dumps(config[key])} is not supported")
    ours_of = {theirs: ours for ours, theirs, _ in weight_names(model.config, rows)}
    peft_path_of = {ours: theirs.removesuffix(".weight") for ours, theirs, _ in weight_names(model.config)}
    tensors, targets = {}, set()
    stored = stored_tensors(path, ("lora_model_state.pdparams", "peft_model.safetensors"))
    for name, tensor in stored.items():
        module, _, which = name.rpartition(".")
        ours = ours_of.get(f"{module}.weight")
        if ours is None or which not in ("lora_A", "lora_B"):
            why = "the model has no linear of that name, or q, k and v in one where this has them apart"
            raise UserError(f"{path}: {name}: {why}")
        targets.add(peft_path_of[ours])
        tensors[f"base_model.model.{peft_path_of[ours]}.{which}.weight"] = tensor.read().T
    return {
        "peft_type": "LORA",
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "use_rslora": bool(config.get("rslora")),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": sorted(targets),
    }, tensors
