"""LoRA and prefix tuning: layers, merging, PEFT folders, from_pretrained.

    model = from_pretrained("path/to/model")     # or an adapter's folder: its base model with the adapter merged in
    apply_lora(model, rank=8, alpha=16.0, targets=["q_proj", "v_proj"])
    apply_prefix(model, tokens=128)              # in place of LoRA
    weights = trainable_weights(model)           # what an optimizer updates: the adapter
    save_adapter(model, folder, base_model="path/to/model")
    load_adapter(model, folder, trainable=True)  # onto the plain base model
    merge(model)                                 # LoRA into the base weights: a plain model again

Adapters on disk are peft's: adapter_config.json and adapter_model.safetensors; docs/adapters.md says which keys are
honored. LoRA folders of PaddleNLP are read too. The layers of LoRA are in modules/lora.py.

Shapes: D_in, D_out of a linear, R LoRA rank, P prefix tokens, L layers, K key/value heads, Dh head dim.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from families import FAMILIES, ModelConfig, weight_names
from formats.files import UserError, _json_object, atomic_file
from formats.gguf_folder import open_folder
from formats.peft import LoraConfig
from formats.tensor_files import read_safetensors, safetensors_metadata, write_safetensors
from formats.tokenizer import MODEL_FILES as TOKENIZER_FILES
from formats.weights import (
    SaveEntry,
    SaveSource,
    Weight,
    keep_integers,
    load_weights,
    named_weights,
    paddlenlp_names,
    read_config,
    stored_tensors,
)
from model import CausalLM, block_linears, build, linear_paths
from modules.layers import Embedding, Linear, set_parameter
from modules.lora import LoRAEmbedding, LoRALinear, TrainedTokens
from modules.low_bit import ALGORITHMS, LowBit, LowBitLinear, round_base
from modules.vocabulary import (
    embedding_layers,
    embedding_paths,
    refuse_sharded,
    resize_embeddings,
    stored_rows,
    untie_head,
)

# ============================================================================================ models and their weights


def from_pretrained(path: str | Path, dtype: str = "float32", integers: bool = False) -> CausalLM:
    """A CausalLM in eval mode from a Hugging Face folder. Peak memory: the model, its largest tensor, and a constant.

    path: a model's folder, or an adapter's: then the base model that it names (which may be an adapter's folder too),
    with LoRA merged into it or the prefix put on. integers: run on those of AWQ and GGUF where they fit, which no
    adapter can be merged into; else they become floats.
    """
    *adapters, base = base_folders(path)
    config = read_config(base)
    model = build(keep_integers(config, base) if integers and not adapters else config, dtype)
    load_weights(model, base)
    for adapter in reversed(adapters):
        round_as_trained(model, adapter)
        merge(load_adapter(model, adapter))
    model.eval()
    return model


def round_as_trained(model: CausalLM, adapter: str | Path) -> None:
    """Round a float base as it was while this adapter was trained on it (weight_quantize_algo), before it is merged."""
    file = Path(adapter) / "adapter_config.json"
    saved = _json_object(file).get("base_quantization") if file.is_file() else None
    if saved is None or model.config.quantization is not None:
        return
    try:
        low_bit = LowBit(**saved)
    except TypeError:
        raise UserError(f"{file}: base_quantization = {json.dumps(saved)} is not what finetune.py writes") from None
    if low_bit.algo not in ALGORITHMS:
        raise UserError(f"{file}: base_quantization: algo {low_bit.algo!r}; possible are {', '.join(ALGORITHMS)}")
    try:
        round_base(block_linears(model), low_bit)
    except UserError as error:  # of tensor parallelism
        raise UserError(f"{file}: base_quantization: {error}; or merge the adapter with export.py first") from None


def base_folders(path: str | Path) -> list[Path]:
    """A model's folder -> [it]; an adapter's -> [it, the base that it names, …, down to a model's folder].

    A GGUF file, or a folder with one, stands as the folder that formats/gguf_folder.py makes of it.
    """
    folders = [open_folder(path)]
    while not (folders[-1] / "config.json").is_file():
        files = [folders[-1] / name for name in ("adapter_config.json", "lora_config.json")]  # peft's, PaddleNLP's
        if (file := next(filter(Path.is_file, files), None)) is None:
            break
        base = _json_object(file).get("base_model_name_or_path")
        if not isinstance(base, str) or not open_folder(base).is_dir():
            raise UserError(
                f"{file}: base_model_name_or_path: {base!r} is not a folder on this disk; write the base model's "
                "folder there, or give it as model_name_or_path and this adapter as lora_path"
            )
        if Path(base).resolve() in [folder.resolve() for folder in folders]:
            raise UserError(f"{file}: base_model_name_or_path: {base!r} is built on this adapter itself")
        folders.append(open_folder(base))
    return folders


def tokenizer_folder(path: str | Path, adapter: str | Path | None = None) -> Path:
    """The first folder with a tokenizer's files of an adapter, of base_folders(path); path if none has."""
    folders = [*([Path(adapter)] if adapter else []), *base_folders(path)]
    return next((f for f in folders if any((f / name).is_file() for name in TOKENIZER_FILES)), Path(path))


def trainable_weights(model: CausalLM) -> list[Weight]:
    """The weights that have a gradient: PEFT's names for adapters and prefix, Hugging Face's for the others."""
    if (quantization := model.config.quantization) is not None:
        if (method := quantization["quant_method"]).startswith("a8w8"):
            raise UserError(
                f"the model is quantized to {method}: rounded activations have no gradient; train the float model"
            )
        if not lora_layers(model) and model.prefix is None:
            raise UserError(
                "the model is quantized: its weights are integers; train LoRA or a prefix, or the float model"
            )
    in_adapter = weights_in_adapter(model)
    weights = [w for w in named_weights(model) if w.name not in in_adapter] + adapter_weights(model)
    return [w for w in weights if not w.parameter.stop_gradient]


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


def adapted_layers(model: CausalLM) -> dict[str, tuple]:
    """{Hugging Face module path: (parent layer, attribute, layer)} of the layers of modules/lora.py on this rank."""
    layers = {**block_linears(model), **embedding_layers(model)}
    kinds = LoRALinear, LoRAEmbedding, TrainedTokens
    return {path: entry for path, entry in layers.items() if isinstance(entry[2], kinds)}


def lora_layers(model: CausalLM) -> dict[str, LoRALinear]:
    """{Hugging Face module path: LoRALinear} on this rank: of the blocks, and of a head."""
    return {path: layer for path, (_, _, layer) in adapted_layers(model).items() if isinstance(layer, LoRALinear)}


def weights_in_adapter(model: CausalLM) -> dict[str, bool]:
    """{name: whether it is trained} of the base model's weights that the adapter replaces and its folder holds.

    They are modules_to_save and biases, which are trained, and a resized vocabulary's embedding and head.
    """
    return getattr(model, "replaced_weights", {})


def changes_base(model: CausalLM) -> bool:
    """Whether the base weights are not those of the base model any more, so that there is no going back to it."""
    trained = any(is_trained for name, is_trained in weights_in_adapter(model).items() if name != "score.weight")
    return trained or any(x.pissa_init is not None for x in lora_layers(model).values())


def linears_on_other_ranks(model: CausalLM) -> set[str]:
    """Hugging Face module paths of the blocks' linears that only other ranks hold."""
    paths = [theirs for _, theirs in linear_paths(model.config)] if model.names_on_other_ranks else []
    return {path for path in paths if not model.names_on_other_ranks.isdisjoint((path + ".weight", path + ".qweight"))}


def match_lora_targets(model: CausalLM, targets: str | list[str] | None = None) -> list[str]:
    """Hugging Face paths of this rank's layers that `targets` names (see apply_lora); each must match something."""
    config, local = LoraConfig(target_modules=targets), {**block_linears(model), **embedding_layers(model)}
    if config.all_linear:
        return list(block_linears(model))
    paths = {*local, *linears_on_other_ranks(model), *embedding_paths(model.config)}
    for name in [targets] if isinstance(targets, str) else targets:
        part = LoraConfig(target_modules=name if isinstance(targets, str) else [name])
        if not any(part.targets(path) for path in paths):
            raise UserError(f"lora_target_modules: {name!r} matches no linear layer; there are {_last_names(paths)}")
    return [path for path in local if config.targets(path)]


def _last_names(paths) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))


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
    trained_tokens: list[int] | None = None,
    seed: int = 0,
) -> CausalLM:
    """Freeze the model and put a LoRALinear around every linear named in `targets` (default: all of the blocks).

    targets: names such as "q_proj", matched as the end of the Hugging Face module path; or one string: a regular
    expression over the whole path, or "all-linear". Embedding and head ("embed_tokens", "lm_head") must be named. A
    target that matches nothing is a UserError, and nothing is changed. trained_tokens: ids whose rows of embedding and
    head are trained too.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(f"lora_rank must be at least 1 and lora_dropout in [0, 1): found {rank} and {dropout}")
    if pissa and dora:
        raise UserError("pissa and dora exclude each other: both redefine what the base weight is")
    match_lora_targets(model, targets)
    rows, paths = None, embedding_paths(model.config)
    if trained_tokens:
        modules = paths[: 1 if model.config.tie_word_embeddings else 2]
        modules = [path for path in modules if path not in match_lora_targets(model, targets)]
        rows = {path.rpartition(".")[2]: list(trained_tokens) for path in modules}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=targets,
        trainable_token_indices=rows,
        start="pissa" if pissa else "keep",
    )
    attach_lora(model, config, seed)
    for layer in lora_layers(model).values() if pissa else ():
        layer.set_pissa_init(*layer.decompose("pissa", rank))
    return model


@paddle.no_grad()
def start_at_residual(model: CausalLM, folder: str | Path, rows: int = 4, tokens: int = 256) -> None:
    """Start the LoRA on a base in low bits at what rounding took from it; the weights are read once more, one by one.

    folder: what the model was opened from. The sizes of the inputs are measured on random ids: which channels are large
    depends little on the text.
    """
    *adapters, base = base_folders(folder)
    if adapters or getattr(model, "new_ids", None):
        what = "an adapter: merge it first (export.py)" if adapters else "a model with new tokens"
        raise UserError(f"loftq: model_name_or_path: {folder} is {what}")
    layers = [layer for layer in lora_layers(model).values() if isinstance(layer.base, LowBitLinear)]
    squares = {layer: np.ones(layer.base.n_in, np.float32) for layer in layers}  # an expert may see no token

    def observe(layer, inputs):
        squares[layer] = inputs[0].astype("float32").square().reshape([-1, layer.base.n_in]).mean(0).numpy()

    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    shape = rows, min(tokens, model.config.max_model_len)
    model(paddle.to_tensor(np.random.default_rng(0).integers(0, model.config.vocab_size, shape)))
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.base.on_rounded = functools.partial(layer.start_at_residual, np.sqrt(squares[layer]))
    load_weights(model, base)
    for layer in layers:
        layer.base.on_rounded = None
    print(f"loftq: {len(layers)} adapters start at what rounding took from the base")


def attach_lora(model: CausalLM, config: LoraConfig, seed: int = 0) -> None:
    """Freeze the model and put the layers of modules/lora.py where a LoraConfig says; A and B as for a new adapter."""
    assert not adapted_layers(model), "the model has LoRA already"
    if config.start != "keep" and model.config.quantization is not None:
        raise UserError("PiSSA and OLoRA need the base model's float weights; this one is quantized")
    if config.start == "olora" and _stores_in_out(model.config):
        raise UserError(
            "init_lora_weights = 'olora' is not possible, as in peft: this family stores linears as [in, out]"
        )
    tokens = _prepare_embeddings(model, config)
    layers, others = {**block_linears(model), **embedding_layers(model)}, linears_on_other_ranks(model)
    chosen = [path for path in (block_linears(model) if config.all_linear else layers) if config.targets(path)]
    if not (chosen or tokens or config.modules_to_save or any(config.targets(path) for path in others)):
        there = _last_names(layers)
        raise UserError(f"target_modules: {config.target_modules!r} matches no linear layer; there are {there}")
    if config.all_linear:
        names = sorted({path.rpartition(".")[2] for path in {*block_linears(model), *others}})
        config = dataclasses.replace(config, target_modules=names)
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for path in chosen:
        parent, attribute, layer = layers[path]
        setattr(parent, attribute, _new_lora(model, layer, path, config, seed))
    for path, ids in tokens.items():
        setattr(model, layers[path][1], TrainedTokens(layers[path][2], ids))
    targets = config.target_modules
    config = dataclasses.replace(config, target_modules=targets if isinstance(targets, str) else sorted(targets))
    model.lora_config, model.replaced_weights = config.to_json(), _replaced_weights(model, config)


def _new_lora(model, layer, path, config, seed):
    """A LoRALinear or LoRAEmbedding around a layer; its start depends on seed and path only."""
    rank, alpha = config.rank_of(path), config.alpha_of(path)
    generator = np.random.default_rng([seed, zlib.crc32(path.encode())])
    options = {"rslora": config.use_rslora, "dora": config.use_dora}
    if isinstance(layer, Embedding):
        lora = LoRAEmbedding(layer, rank, alpha, **options)
        set_parameter(lora.lora_embedding_B, generator.standard_normal(lora.lora_embedding_B.shape, np.float32))
    else:
        lora = LoRALinear(layer, rank, alpha, dropout=config.lora_dropout, bias=config.lora_bias, **options)
        bound = math.sqrt(1 / layer.n_in)
        set_parameter(lora.lora_A, generator.uniform(-bound, bound, lora.lora_A.shape).astype(np.float32))
        lora.rng = model.rng
    lora.key = path
    return lora


def _prepare_embeddings(model, config) -> dict[str, list[int]]:
    """{path: ids of trained rows}; refuses what cannot be had with embedding and head, unties the head if it has to."""
    embed, head = paths = embedding_paths(model.config)
    targeted = {path for path in paths if not config.all_linear and config.targets(path)}
    saved, tied, rows = {path for path in paths if config.is_saved(path)}, model.config.tie_word_embeddings, {}
    wanted = config.trainable_token_indices or {}
    for name, ids in wanted.items() if isinstance(wanted, dict) else [(embed, wanted)]:
        path = next((path for path in paths if path.endswith(name)), None)
        if path is None:
            raise UserError(f"trainable_token_indices: {name!r} is no embedding; there are {_last_names(paths)}")
        rows[path] = ids
    if tied and len(rows) == 2:
        if rows[embed] != rows[head]:
            raise UserError("trainable_token_indices: embedding and head are tied, but their ids differ")
        del rows[head]
    if both := rows.keys() & (targeted | saved):
        raise UserError(f"trainable_token_indices: {_last_names(both)} is in target_modules or modules_to_save too")
    if tied and head in targeted and config.start != "keep":
        raise UserError(f"init_lora_weights = {config.start!r} is not possible with a target lm_head that is tied")
    for is_there, what in (
        (targeted, f"LoRA on {_last_names(targeted)}"),
        (rows, "trainable_token_indices (add_tokens)"),
        (config.modules_to_save, "modules_to_save"),
        (config.bias != "none", "bias"),
        (config.lora_bias, "lora_bias"),
    ):
        if is_there:
            refuse_sharded(model, what)
    if head in targeted or saved or rows.keys() == {head}:
        untie_head(model)
    return rows


def _replaced_weights(model, config) -> dict[str, bool]:
    """See weights_in_adapter()."""
    names, adapted = {}, lora_layers(model)
    if getattr(model, "resized", False):
        names = {f"{path}.weight": False for path in embedding_layers(model)}
    for weight in named_weights(model) if config.modules_to_save or config.bias != "none" else ():
        module, _, leaf = weight.name.rpartition(".")
        parts = module.split(".")
        saved = any(config.is_saved(".".join(parts[:end])) for end in range(1, len(parts) + 1))
        is_bias = leaf == "bias" and (config.bias == "all" or config.bias == "lora_only" and module in adapted)
        if saved or is_bias:
            names[weight.name] = True
            weight.parameter.stop_gradient = False
    return names


@contextlib.contextmanager
def adapter_disabled(model: CausalLM) -> Iterator[CausalLM]:
    """The base model inside the block, the adapted one after it. Not where changes_base()."""
    layers, prefix = [layer for _, _, layer in adapted_layers(model).values()], model.prefix
    assert not changes_base(model), "the adapter changes the base weights: there is no base to go back to"
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
    """Merge every LoRA into its base weight, in place; the model is a plain one afterwards. A prefix stays.

    A head tied to an embedding that has LoRA is untied: the adapter was trained beside the head's old weights.
    """
    if isinstance(model.embed_tokens, LoRAEmbedding):
        untie_head(model)
    adapted = adapted_layers(model)
    for parent, attribute, layer in adapted.values():
        setattr(parent, attribute, layer.merged())
    for name, parameter in model.named_parameters() if adapted else ():
        if not name.startswith("prefix."):  # attach_lora() froze them
            parameter.stop_gradient = False
    model.replaced_weights = {}
    return model


def _with_rank_times(config: LoraConfig, up: int, down: int, keep: set[str]) -> LoraConfig:
    """The config with ranks times up/down and the same scaling, but for the layers of these paths."""

    def times(value, up, down):
        return int(value * up / down) if value * up / down == int(value * up / down) else value * up / down

    roots = (math.sqrt(up), math.sqrt(down)) if config.use_rslora else (up, down)
    ranks = {name: times(rank, up, down) for name, rank in config.rank_pattern.items()}
    alphas = {name: times(alpha, *roots) for name, alpha in config.alpha_pattern.items()}
    kept = {re.escape(path): path for path in sorted(keep)}
    return dataclasses.replace(
        config,
        r=times(config.r, up, down),
        lora_alpha=times(config.lora_alpha, *roots),
        rank_pattern=dict.fromkeys(kept, 0) | ranks | {name: config.rank_of(path) for name, path in kept.items()},
        alpha_pattern=dict.fromkeys(kept, 0) | alphas | {name: config.alpha_of(path) for name, path in kept.items()},
    )


def _without_start(model: CausalLM, config: LoraConfig, stored: set[str]) -> set[str]:
    """Paths of the layers that PiSSA and OLoRA do not start in a way of their own: an embedding's, and a head's whose
    base weight the file holds."""
    embed, head = embedding_paths(model.config)
    paths = {embed} | ({head} & stored)
    return {path for path in paths if not config.all_linear and config.targets(path)}


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


PEFT_ROOT = "base_model.model."


def adapter_weights(model: CausalLM) -> list[Weight]:
    """The weights of LoRA and prefix under the names that peft gives them, and those of weights_in_adapter()."""
    weights, adapted, in_adapter = [], adapted_layers(model), weights_in_adapter(model)
    for path, (_, _, layer) in adapted.items():
        weights += [
            Weight(f"{PEFT_ROOT}{path}.{name}", tensor, transposed) for name, tensor, transposed in layer.parts()
        ]
    for weight in named_weights(model) if in_adapter else ():
        if weight.name in in_adapter:
            module, _, leaf = weight.name.rpartition(".")
            layer = adapted[module][2] if module in adapted else None
            within = "" if layer is None else "token_adapter." * isinstance(layer, TrainedTokens) + "base_layer."
            weights.append(dataclasses.replace(weight, name=f"{PEFT_ROOT}{module}.{within}{leaf}"))
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
    if (rounded := getattr(model, "base_quantization", None)) is not None:
        config["base_quantization"] = rounded
    if model.score is not None:
        config["task_type"] = "SEQ_CLS"
    layers = lora_layers(model)
    if any(layer.pissa_init is not None for layer in layers.values()):
        for path, layer in layers.items():
            if layer.pissa_init is None:
                continue
            a, b = (weights[f"{PEFT_ROOT}{path}.lora_{x}.weight"] for x in "AB")  # stored (R, D_in), (D_out, R)
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
        lora, stored = (
            LoraConfig(**model.lora_config),
            {name.removesuffix(".weight") for name in weights_in_adapter(model)},
        )
        config |= _with_rank_times(lora, 2, 1, _without_start(model, lora, stored)).to_json()
        metadata["pissa_start_included"] = "true"
    return config, {"adapter_model.safetensors": AdapterFile(list(entries.values()), metadata)}


def _stores_in_out(config: ModelConfig) -> bool:
    """Whether the family's files store the linears of the blocks as [in, out], as GPT-2's do."""
    rows = FAMILIES[config.family].names
    return not any(transposed for ours, _, transposed in rows if ours.endswith("_proj.weight"))


# ============================================================================================================= loading

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


MOST_NUMBER = 1 << 20  # of these; NaN is not below it either


WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def load_adapter(model: CausalLM, path: str | Path, *, trainable: bool = False) -> CausalLM:
    """Put a saved LoRA or prefix onto a plain model: saved by save_adapter, by peft, or a LoRA by PaddleNLP.

    trainable: to train it further, exactly from where it was saved (PiSSA and a prefix's projection too).
    """
    path = Path(path)
    config_path = path / "adapter_config.json"
    if (path / "lora_config.json").is_file() and not config_path.is_file():
        config, tensors = _paddlenlp_lora(model, path)
    else:
        if not config_path.is_file() or not any((path / name).is_file() for name in WEIGHT_FILES):
            missing = path / WEIGHT_FILES[0] if config_path.is_file() else config_path
            raise UserError(
                f"{missing}: no such file; an adapter is a folder with adapter_config.json and "
                "adapter_model.safetensors or adapter_model.bin"
            )
        config, tensors = _json_object(config_path), None
    kind = config.get("peft_type")
    if kind not in NUMBERS:
        raise UserError(f"{config_path}: peft_type {kind!r} is not supported; LORA and PREFIX_TUNING are")
    for key in NUMBERS[kind]:
        value = config.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < MOST_NUMBER:
            raise UserError(f"{config_path}: {key} must be a number below {MOST_NUMBER:,}, found {value!r}")
    if tensors is None:
        tensors = {name: tensor.read() for name, tensor in stored_tensors(path, WEIGHT_FILES).items()}
    load = _load_lora if kind == "LORA" else _load_prefix
    load(model, config, tensors, config_path, trainable)
    frozen = {name for name, is_trained in weights_in_adapter(model).items() if not is_trained}
    frozen = {id(weight.parameter) for weight in named_weights(model) if weight.name in frozen}
    for weight in adapter_weights(model):
        weight.parameter.stop_gradient = not trainable or id(weight.parameter) in frozen
    return model


def _load_lora(model: CausalLM, config: dict, tensors: dict, config_path: Path, trainable: bool) -> None:
    lora, weights_path = LoraConfig.from_json(config, config_path), config_path.parent / WEIGHT_FILES[0]
    start, includes_start = lora.start, False
    if weights_path.is_file():
        includes_start = safetensors_metadata(weights_path).get("pissa_start_included") == "true"
    if trainable and config.get("init_lora_weights") == "mica":
        raise UserError(f"{config_path}: init_lora_weights = 'mica' cannot be trained further: its B stays frozen")
    if config.get("ensure_weight_tying") and model.config.tie_word_embeddings:
        raise UserError(f"{config_path}: ensure_weight_tying = true is not supported with a tied head")
    expand = start != "keep" and not trainable  # [A A0] [B; -B0], so that the base stays as it is
    split = trainable and includes_start  # [A A0] [B; -B0] were saved: training goes on where it was
    stored = _stored_embeddings(model, tensors)
    keep = _without_start(model, lora, stored.keys())
    try:
        factor = (2, 1) if expand else (1, 2)
        wanted = _with_rank_times(lora, *factor, keep) if expand or split else lora
        _attach_with_stored(model, wanted, tensors, stored)
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from None
    for path, layer in lora_layers(model).items() if start != "keep" or split else ():
        a_name, b_name = (f"{PEFT_ROOT}{path}.lora_{x}.weight" for x in "AB")
        if path in keep or not {a_name, b_name} <= tensors.keys():
            continue  # fill_adapter() names what is missing
        a, b = tensors[a_name].T, tensors[b_name].T  # (D_in, R), (R, D_out)
        if split:
            rank = layer.lora_A.shape[1]
            layer.set_pissa_init(np.ascontiguousarray(a[:, rank:]), np.ascontiguousarray(-b[rank:]))
            tensors[a_name], tensors[b_name] = a[:, :rank].T, b[:rank].T
            continue
        a0, b0 = layer.decompose(start, lora.rank_of(path))
        if trainable:
            layer.set_pissa_init(a0, b0)
        else:
            tensors[a_name], tensors[b_name] = np.concatenate([a, a0], 1).T, np.concatenate([b, -b0]).T
    fill_adapter(model, tensors, weights_path)


def _stored_embeddings(model: CausalLM, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """{path of embedding or head: name of its whole weight in an adapter's file}; drops copies from `tensors`."""
    stored = {}
    for name in list(tensors):
        if ".modules_to_save." in name:  # some versions of peft write both
            tensors.setdefault(name.replace(".modules_to_save.", "."), tensors[name])
        if re.search(r"\.(modules_to_save|original_module)\.|\.token_adapter\.trainable_tokens_original$", name):
            del tensors[name]
    for path in embedding_paths(model.config):
        for within in ("", "base_layer.", "token_adapter.base_layer."):
            if (name := f"{PEFT_ROOT}{path}.{within}weight") in tensors:
                stored[path] = name
    return stored


def _attach_with_stored(model: CausalLM, config: LoraConfig, tensors: dict, stored: dict[str, str]) -> None:
    """attach_lora(), after the model got the rows of an embedding and a head that the adapter's file holds.

    peft saves them where the vocabulary was resized, and where LoRA is on one of them. stored: _stored_embeddings().
    """
    embed, head = embedding_paths(model.config)
    if model.config.tie_word_embeddings and head in stored and not (config.is_saved(embed) or config.is_saved(head)):
        if embed in stored and np.array_equal(tensors[stored[embed]], tensors[stored[head]]):
            del tensors[stored.pop(head)]
        else:
            untie_head(model)
    sizes = {len(tensors[name]) for name in stored.values()}
    if stored and max(sizes) > model.config.vocab_size:
        wanted = {embed} if model.config.tie_word_embeddings and not config.modules_to_save else {embed, head}
        if len(sizes) > 1 or stored.keys() < wanted:
            found = ", ".join(f"{name} with {len(tensors[name])} rows" for name in stored.values())
            raise UserError(
                f"the vocabulary was resized from {model.config.vocab_size} ids, but the file has only {found}; in "
                "peft, save it with save_embedding_layers=True"
            )
        resize_embeddings(model, *sizes)
    attach_lora(model, config)
    model.replaced_weights = {f"{path}.weight": False for path in stored} | model.replaced_weights


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
            a, b = (f"{PEFT_ROOT}{module}.lora_{x}.weight" for x in "AB")
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
        linear = name.removeprefix(PEFT_ROOT).partition(".lora_")[0]
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
        tensors[f"{PEFT_ROOT}{peft_path_of[ours]}.{which}.weight"] = tensor.read().T
    return {
        "peft_type": "LORA",
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "use_rslora": bool(config.get("rslora")),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": sorted(targets),
    }, tensors


# =============================================================================================== what arguments ask for


def setup_adapter(model: CausalLM, args: object, checkpoint: Path | None = None) -> None:
    """Attach the LoRA or prefix that is trained: from a checkpoint, from lora_path or prefix_path, or a new one.

    args: TrainingArgs of a script. A saved adapter that differs from what the arguments ask for is a UserError; where
    they ask for nothing, it is said in one line.
    """
    lora, new_ids = getattr(args, "lora", False), getattr(model, "new_ids", None)
    if not (lora or getattr(args, "prefix_tuning", False)):
        return
    path = checkpoint or args.lora_path or getattr(args, "prefix_path", None)
    if path:
        targets = lora and args.lora_target_modules is not None and match_lora_targets(model, args.lora_target_modules)
        _check_rows(model, path, new_ids, is_resumed=checkpoint is not None)
        load_adapter(model, path, trainable=True)
        wanted = f"LoRA of rank {args.lora_rank}" if lora else f"a prefix of {args.num_prefix_tokens} tokens"
        if adapted_layers(model):
            loaded = f"LoRA of rank {model.lora_config['r']}"
        else:
            loaded = f"a prefix of {model.prefix.tokens} tokens"
        if loaded != wanted:
            raise UserError(f"{path}: holds {loaded}, but the arguments ask for {wanted}")
        if lora:
            _compare_with_arguments(model, args, path, targets)
        if new_ids and not {*new_ids} <= _trained_ids(model):
            raise UserError(
                f"{path}: does not train the rows of new tokens; merge it first (export.py), then add_tokens"
            )
    elif lora:
        apply_lora(
            model,
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=getattr(args, "lora_dropout", 0.0),
            rslora=args.rslora,
            dora=args.dora,
            pissa=getattr(args, "pissa", False),
            targets=args.lora_target_modules,
            trained_tokens=new_ids,
            seed=args.seed,
        )
        if getattr(args, "loftq", False):
            start_at_residual(model, args.model_name_or_path)
    else:
        apply_prefix(
            model,
            tokens=args.num_prefix_tokens,
            projection=args.prefix_projection,
            projection_hidden_size=args.prefix_projection_hidden_size,
            seed=args.seed,
        )


def _check_rows(model, path, new_ids, is_resumed):
    """UserError where the rows of an adapter's embedding are not those of the run's tokenizer."""
    rows, size = stored_rows(model, path), model.config.vocab_size
    if new_ids and rows not in (0, size):
        raise UserError(
            f"{path}: holds rows for {rows} ids, with add_tokens there are {size}; merge it first (export.py), then "
            "add tokens to the merged model"
        )
    if rows > size and is_resumed:
        raise UserError(f"{path}: holds rows for {rows} ids, the tokenizer has {size}; give add_tokens as in that run")
    if rows > size:
        print(f"{path}: holds rows for {rows} ids, the tokenizer knows {size} of them")


def _compare_with_arguments(model, args, path, targets):
    """UserError where a saved LoRA differs from an argument that was given; a line on what it has besides.

    targets: the paths that lora_target_modules names; False: not given.
    """
    config, given, kept = model.lora_config, [], []
    default_alpha = 4.0 if args.rslora else 2.0 * args.lora_rank
    rows = [
        ("lora_alpha", config["lora_alpha"], args.lora_alpha, default_alpha),
        ("lora_dropout", config["lora_dropout"], getattr(args, "lora_dropout", None), 0.0),
        ("rslora", config["use_rslora"], args.rslora, False),
        ("dora", config["use_dora"], args.dora, False),
        (
            "pissa",
            any(x.pissa_init is not None for x in lora_layers(model).values()),
            getattr(args, "pissa", None),
            False,
        ),
    ]
    has = adapted_layers(model).keys() - {*_token_layers(model)}
    names, wanted = json.dumps(config["target_modules"]), json.dumps(args.lora_target_modules)
    same = has == {*(block_linears(model) if targets is False else targets)}
    rows.append(("lora_target_modules", names, names if same else wanted, json.dumps(None)))
    for key, has, wanted, default in rows:
        if wanted is not None and has != wanted:
            (kept if wanted == default else given).append((key, has, wanted))
    if given:
        key, has, wanted = given[0]
        raise UserError(
            f"{path}: holds a LoRA with {key}: {has}, but the arguments ask for {wanted}; leave {key} out, or train a "
            "new adapter"
        )
    if kept:
        print(f"{path}: its own {', '.join(f'{key}: {has}' for key, has, _ in kept)}")


def _token_layers(model) -> list[str]:
    return [path for path, (_, _, layer) in adapted_layers(model).items() if isinstance(layer, TrainedTokens)]


def _trained_ids(model) -> set[int]:
    """Ids whose rows of the embedding are trained."""
    embed = embedding_paths(model.config)[0]
    if isinstance(model.embed_tokens, TrainedTokens):
        return {*model.embed_tokens.tokens}
    all_rows = isinstance(model.embed_tokens, LoRAEmbedding) or weights_in_adapter(model).get(f"{embed}.weight")
    return {*range(model.config.vocab_size)} if all_rows else set()
