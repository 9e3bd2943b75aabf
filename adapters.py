"""LoRA and prefix tuning: layers, merging, PEFT folders, from_pretrained."""

import contextlib
import json
import math
import re
import struct
import zlib
from pathlib import Path

import kernels

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from families import FAMILIES, ModelConfig, weight_names
from formats.files import UserError, _json_object, atomic_file
from formats.tensor_files import read_safetensors, write_safetensors
from formats.weights import SaveEntry, Weight, _paddlenlp_names, load_weights, named_weights, stored_tensors
from model import Linear, QuantLinear, RNGTracker, block_linears, build, linear_paths, set_parameter


def trainable_weights(model):
    """[Weight] of all that has a gradient: PEFT's names for adapters and prefix, Hugging Face's for the rest."""
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


def cast_frozen_to_bf16(model):
    """Keep frozen weights of linears, the head's too, in bfloat16 alone: products in bfloat16 round them so anyway."""
    for layer in model.sublayers():
        if isinstance(layer, Linear) and layer.weight.stop_gradient and layer.weight.dtype == paddle.float32:
            with paddle.LazyGuard():  # no memory until it is set
                half = layer.create_parameter(layer.weight.shape, dtype="bfloat16")
            half.set_value(layer.weight.astype("bfloat16"))
            half.stop_gradient = True
            if (cut := getattr(layer.weight, "shard_spec", None)) is not None:
                half.shard_spec = cut
            layer.weight = half


def from_pretrained(path, dtype="float32"):
    """A CausalLM in eval mode from a Hugging Face folder. Peak memory: the model, its largest tensor, and a constant.

    From an adapter's folder, the base model that it names (which may be an adapter's folder too) with LoRA merged into
    it, or with the prefix put on.
    """
    *adapters, base = base_folders(path)
    model = build(ModelConfig.from_json(base), dtype)
    load_weights(model, base)
    for adapter in reversed(adapters):
        merge(load_adapter(model, adapter))
    model.eval()
    return model


def base_folders(path):
    """[path] of a model's folder; of an adapter's folder, itself, then the folder that it names as its base, and so on."""
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


def _paddlenlp_lora(model, path):
    """adapter_config.json and tensors, as peft would have written them, of a LoRA that PaddleNLP saved at `path`."""
    config, names = _json_object(path / "lora_config.json"), _paddlenlp_names(model.config)
    for key in (
        "use_mora",
        "pissa",
        "loraga",
        "lora_use_mixer",
        "do_qat",
        "trainable_modules",
        "trainable_bias",
        "enable_lora_list",
    ):
        if config.get(key):
            raise UserError(f"{path / 'lora_config.json'}: {key} = {json.dumps(config[key])} is not supported")
    modules = {theirs: ours for ours, theirs, _ in weight_names(model.config, names)}
    places = {ours: theirs.removesuffix(".weight") for ours, theirs, _ in weight_names(model.config)}
    tensors, targets = {}, set()
    for name, (read, _) in stored_tensors(path, ("lora_model_state.pdparams", "peft_model.safetensors")).items():
        module, _, which = name.rpartition(".")
        ours = modules.get(f"{module}.weight")
        if ours is None or which not in ("lora_A", "lora_B"):
            why = "the model has no linear of that name, or q, k and v in one where this has them apart"
            raise UserError(f"{path}: {name}: {why}")
        targets.add(places[ours])
        tensors[f"base_model.model.{places[ours]}.{which}.weight"] = read().T
    return {
        "peft_type": "LORA",
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "use_rslora": bool(config.get("rslora")),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": sorted(targets),
    }, tensors


# ========================================================================================= LoRA adapters


class LoRALinear(nn.Layer):
    """base(x) + scaling · dropout(x) A B (Hu et al., arXiv 2106.09685) around any linear layer `base`.

    scaling is alpha/R, or alpha/sqrt(R) (rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353) rescales every output to the
    trained magnitude; its norm is a constant to the gradient (their 4.3). PiSSA (arXiv 2404.02948) starts A B at the
    largest singular values and takes them out of the base; `initial` keeps that start.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, dora=False):
        super().__init__()
        n_in, n_out = base.n_in, base.n_out
        if dora and isinstance(base, QuantLinear):
            raise UserError("DoRA needs the base model's float weights; this one is quantized")
        self.base, self.dropout = base, dropout
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled = True
        bound = math.sqrt(1 / n_in)  # Kaiming uniform with a = sqrt(5), as the paper's code and peft have it
        self.lora_A = self.create_parameter([n_in, rank], default_initializer=nn.initializer.Uniform(-bound, bound))
        self.lora_B = self.create_parameter([rank, n_out], default_initializer=nn.initializer.Constant(0.0))
        self.lora_magnitude_vector = None
        self.initial = None
        self.rng, self.key = RNGTracker(), ""  # apply_lora() sets the model's, and its path
        for p in base.parameters():
            p.stop_gradient = True
        if dora:
            self.lora_magnitude_vector = self.create_parameter(base.weight.shape[1:])
            self.lora_magnitude_vector.set_value(base.column_norms(self.base.weight.astype("float32")))
            if (cut := getattr(base.weight, "shard_spec", None)) is not None and cut.dim == 1:
                self.lora_magnitude_vector.shard_spec = cut.of(0, cut.shape[1:])

    def delta(self):
        """(in, out) float32: what the adapter adds to the weight."""
        return paddle.matmul(self.lora_A, self.lora_B) * self.scaling

    def forward(self, x, residual=None):
        y = self.product(x, self.base.bias) if self.enabled else self.base(x)
        return y if residual is None else residual + y

    def product(self, x, bias=None):
        """x times the adapted weight, and a bias if one is given; x W alone while the adapter is off."""
        base = self.base
        if not self.enabled:
            return base.product(x)
        dropped = self.dropped(x) if self.dropout else x
        if isinstance(base, Linear) and self.lora_magnitude_vector is None:
            more = bias, None if dropped is x else dropped
            return kernels.lora_linear(x, base.weight, self.lora_A, self.lora_B, self.scaling, *more)
        y = base.product(x)
        update = kernels.linear(kernels.linear(dropped, self.lora_A) * self.scaling, self.lora_B)
        if self.lora_magnitude_vector is None:
            return y + update if bias is None else y + bias + update
        with paddle.no_grad():
            norm = base.column_norms(base.weight.astype("float32") + self.delta())
        ratio = self.lora_magnitude_vector / norm  # (out,)
        plain = y if dropped is x else base.product(dropped)
        y = y if bias is None else y + bias
        return y + plain * (ratio - 1) + update * ratio

    def dropped(self, x):
        """x after dropout."""
        if not self.training:
            return x
        with self.rng.fork(self.key):
            return F.dropout(x, self.dropout)

    @paddle.no_grad()
    def start_pissa(self):
        """A B = the R largest singular triples of the weight, which the base loses."""
        u, s, vt = np.linalg.svd(self.base.full_weight().astype(np.float64), full_matrices=False)
        rank = self.lora_A.shape[1]
        root = np.sqrt(s[:rank] / self.scaling)
        self.set_pissa((u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32))

    @paddle.no_grad()
    def set_pissa(self, a, b):
        """Start at these, (in, R) and (R, out), of the whole weight."""
        set_parameter(self.lora_A, a)
        set_parameter(self.lora_B, b)
        self.initial, delta, weight = (a, b), self.delta(), self.base.weight
        if (cut := getattr(weight, "shard_spec", None)) is not None:
            delta = paddle.to_tensor(cut.slice(delta.numpy()))
        weight.set_value((weight.astype("float32") - delta).astype(weight.dtype))

    @paddle.no_grad()
    def merged(self):
        """The base layer with the adapter in its weight."""
        if isinstance(self.base, QuantLinear):
            raise UserError(
                "an adapter cannot be merged into quantized weights; merge it into the float model, then quantize"
            )
        weight = self.base.weight.astype("float32") + self.delta()
        if self.lora_magnitude_vector is not None:
            weight = weight * (self.lora_magnitude_vector / self.base.column_norms(weight))
        self.base.weight.set_value(weight.astype(self.base.weight.dtype))
        return self.base


def lora_layers(model):
    """{Hugging Face module path: LoRALinear}"""
    return {path: layer for path, (_, _, layer) in block_linears(model).items() if isinstance(layer, LoRALinear)}


def linears_on_other_ranks(model):
    """{Hugging Face module path} of the linears of the blocks that other processes hold."""
    paths = [theirs for _, theirs in linear_paths(model.config)] if model.names_on_other_ranks else []
    return {path for path in paths if not model.names_on_other_ranks.isdisjoint((path + ".weight", path + ".qweight"))}


def match_lora_targets(model, targets=None):
    """[Hugging Face module path] of the linears that `targets` names, as in apply_lora, and that this process holds."""
    here = block_linears(model)
    found = {*here, *linears_on_other_ranks(model)}
    if targets in (None, "all-linear", []):
        return list(here)
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(t)}" for t in targets]
    for pattern, target in zip(patterns, [targets] if isinstance(targets, str) else targets):
        if not any(re.fullmatch(pattern, path) for path in found):
            names = sorted({path.rpartition(".")[2] for path in found})
            raise UserError(f"lora_target_modules: {target!r} matches no linear layer; there are {', '.join(names)}")
    return [path for path in here if any(re.fullmatch(p, path) for p in patterns)]


def apply_lora(model, rank=8, alpha=16.0, dropout=0.0, rslora=False, dora=False, pissa=False, targets=None, seed=0):
    """Freeze the model and put a LoRALinear around every linear named in `targets` (default: all of the blocks).

    targets: names such as "q_proj", matched as the end of the Hugging Face module path, or one string: a regular
    expression over the whole path, or "all-linear". A target that matches nothing is an error.
    """
    assert not lora_layers(model), "the model has LoRA already"
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(f"lora_rank must be at least 1 and lora_dropout in [0, 1): found {rank} and {dropout}")
    if pissa and dora:
        raise UserError("pissa and dora exclude each other: both redefine what the base weight is")
    if pissa and model.config.quantization is not None:
        raise UserError("PiSSA needs the base model's float weights; this one is quantized")
    found, chosen = block_linears(model), match_lora_targets(model, targets)
    if targets in (None, "all-linear", []):
        targets = sorted({path.rpartition(".")[2] for path in {*found, *linears_on_other_ranks(model)}})
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for path in chosen:
        parent, attribute, layer = found[path]
        lora = LoRALinear(layer, rank, alpha, dropout, rslora, dora)
        generator = np.random.default_rng([seed, zlib.crc32(path.encode())])  # the start depends on seed and name alone
        bound = math.sqrt(1 / layer.n_in)
        set_parameter(lora.lora_A, generator.uniform(-bound, bound, lora.lora_A.shape).astype(np.float32))
        lora.rng, lora.key = model.rng, path
        if pissa:
            lora.start_pissa()
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
def adapter_disabled(model):
    """The base model inside the block, the adapted one after it (LoRA other than PiSSA, whose base has changed; prefix)."""
    layers, prefix = lora_layers(model).values(), model.prefix
    assert all(layer.initial is None for layer in layers), "PiSSA changes the base: there is no base to go back to"
    for layer in layers:
        layer.enabled = False
    model.prefix = None
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True
        model.prefix = prefix


def merge(model):
    """Fold every LoRA into its base weight, in place; the model is a plain one afterwards."""
    for parent, attribute, layer in block_linears(model).values():
        if isinstance(layer, LoRALinear):
            setattr(parent, attribute, layer.merged())
    return model


# ========================================================================================= prefix tuning


class Prefix(nn.Layer):
    """Trained keys and values of P tokens before the text in every layer (Li & Liang, arXiv 2101.00190).

    One table (P, L · 2 · K · Dh), or with a projection an embedding and a two-layer tanh MLP that makes it. They have
    K heads, so grouped-query models are right; they are not rotated, and the text starts at position P, as in peft.
    """

    def __init__(self, config, tokens, projection=False, projection_hidden_size=None):
        super().__init__()
        self.tokens, self.layers, self.heads, self.head_dim = (
            tokens,
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.local_heads = None  # slice of the key heads that a rank of tp uses; None: all
        width = self.heads * self.head_dim
        self.embedding = self.create_parameter([tokens, width if projection else self.layers * 2 * width])
        self.hidden, self.output = None, None
        if projection:
            inner = projection_hidden_size or config.hidden_size
            self.hidden = Linear(width, inner, bias=True)
            self.output = Linear(inner, self.layers * 2 * width, bias=True)

    def table(self):
        """(P, L · 2 · K · Dh)"""
        if self.hidden is None:
            return self.embedding
        return self.output(paddle.tanh(self.hidden(self.embedding)))

    def keys_and_values(self, B, comm):
        """[(k, v)] of each layer, each (B, P, K/tp, Dh); comm: model.LocalComm, or its version for several ranks."""
        return comm.run_unit("prefix", self._keys_and_values, B)

    def _keys_and_values(self, B):
        table = self.table().clone().reshape([self.tokens, self.layers, 2, self.heads, self.head_dim])
        if self.local_heads is not None:
            table = table[:, :, :, self.local_heads]
        table = table.unsqueeze(0).expand([B, *table.shape])  # (B, P, L, 2, K/tp, Dh)
        return [(table[:, :, layer, 0], table[:, :, layer, 1]) for layer in range(self.layers)]


def apply_prefix(model, tokens=128, projection=False, projection_hidden_size=None, seed=0):
    """Freeze the model and give it a trainable prefix of `tokens` tokens."""
    if tokens < 1:
        raise UserError(f"num_prefix_tokens must be at least 1, found {tokens}")
    for parameter in model.parameters():
        parameter.stop_gradient = True
    model.prefix = Prefix(model.config, tokens, projection, projection_hidden_size)
    for name, parameter in model.prefix.named_parameters():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        spread = 0.02 if parameter.ndim == 2 else 0.0
        set_parameter(parameter, generator.standard_normal(parameter.shape, np.float32) * np.float32(spread))
    return model


# ====================================================================== adapters on disk, as peft has them


def adapter_weights(model):
    """[Weight] of LoRA and prefix parameters under the names that peft gives them."""
    weights = []
    for path, layer in lora_layers(model).items():
        stem = f"base_model.model.{path}."
        weights += [
            Weight(stem + "lora_A.weight", layer.lora_A, True),
            Weight(stem + "lora_B.weight", layer.lora_B, True),
        ]
        if layer.lora_magnitude_vector is not None:
            weights.append(Weight(stem + "lora_magnitude_vector", layer.lora_magnitude_vector, False))
    if model.prefix is not None:
        prefix = model.prefix
        rows = [("prompt_embeddings" if prefix.hidden is None else "embedding.weight", prefix.embedding, False)]
        if prefix.hidden is not None:
            for name, layer in (("transform.0", prefix.hidden), ("transform.2", prefix.output)):
                rows += [(f"{name}.weight", layer.weight, True), (f"{name}.bias", layer.bias, False)]
        weights += [Weight(*row) for row in rows]
    return weights


def _as_is(config):
    """Whether the family's files hold the linears of the blocks as [in, out], as GPT-2's do."""
    return not any(t for ours, _, t in FAMILIES[config.family].names if ours.endswith("_proj.weight"))


def save_adapter(model, path, base_model=None):
    """adapter_config.json and adapter_model.safetensors, as peft writes them; the config last.

    PiSSA is saved as the plain LoRA of rank 2R that gives the same model on the unchanged base: [A A0] [B; -B0]. A
    prefix with a projection is saved as the table it makes; its MLP, to go on training, as prefix_projection.safetensors.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config, files = adapter_files(model, base_model)
    for file, (entries, metadata) in files.items():
        tensors = {}
        for entry in entries:
            wholes = [weight.to_numpy(tensor) for weight, tensor in entry.sources]
            tensors |= dict(zip(entry.tensors, entry.arrays(*wholes)))
        write_safetensors(path / file, tensors, metadata)
    with atomic_file(path / "adapter_config.json") as file:
        json.dump(config, file, indent=2)


def adapter_files(model, base_model=None):
    """(what adapter_config.json holds, {file: ([SaveEntry], metadata)}), see save_adapter."""
    weights = {w.name: w for w in adapter_weights(model)}
    entries = {name: SaveEntry.of(w) for name, w in weights.items()}
    config = {
        "base_model_name_or_path": str(base_model) if base_model else None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    if model.prefix is not None:
        prefix = model.prefix
        config.update(
            peft_type="PREFIX_TUNING",
            num_virtual_tokens=prefix.tokens,
            token_dim=prefix.heads * prefix.head_dim,
            num_transformer_submodules=1,
            num_attention_heads=prefix.heads,
            num_layers=prefix.layers,
            prefix_projection=prefix.hidden is not None,
            encoder_hidden_size=prefix.heads * prefix.head_dim
            if prefix.hidden is None
            else prefix.hidden.weight.shape[1],
        )
        if prefix.hidden is None:
            return config, {"adapter_model.safetensors": (list(entries.values()), {})}
        with paddle.no_grad():
            table = model.comm.run_unit("prefix", lambda: prefix.table().clone()).numpy()
        made = SaveEntry({"prompt_embeddings": (list(table.shape), "float32")}, [], lambda: [table])
        return config, {
            "prefix_projection.safetensors": (list(entries.values()), {}),
            "adapter_model.safetensors": ([made], {}),
        }
    config.update(
        peft_type="LORA", bias="none", fan_in_fan_out=_as_is(model.config), init_lora_weights=True, **model.lora_config
    )
    layers, metadata = lora_layers(model), {}
    if any(layer.initial is not None for layer in layers.values()):
        for module, layer in layers.items():
            a, b = (weights[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")  # (R, in), (out, R) on disk
            a0, b0 = (start.T for start in layer.initial)  # whole, on every rank
            entries[a.name] = SaveEntry(
                {a.name: ([2 * a.shape[0], a.shape[1]], "float32")},
                [(a, a.parameter)],
                lambda a, a0=a0: [np.concatenate([a, a0])],
            )
            entries[b.name] = SaveEntry(
                {b.name: ([b.shape[0], 2 * b.shape[1]], "float32")},
                [(b, b.parameter)],
                lambda b, b0=b0: [np.concatenate([b, -b0], 1)],
            )
        config["r"] *= 2
        config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2  # so that the scaling stays
        metadata["pissa_start_included"] = "true"
    return config, {"adapter_model.safetensors": (list(entries.values()), metadata)}


def load_adapter(model, path, trainable=False):
    """Put the LoRA or prefix saved at `path` (by save_adapter, by peft, LoRA by PaddleNLP too) onto a plain model."""
    path = Path(path)
    config_path, weights_path = path / "adapter_config.json", path / "adapter_model.safetensors"
    if (path / "lora_config.json").is_file() and not config_path.is_file():
        config, tensors = _paddlenlp_lora(model, path)
    else:
        for needed in (config_path, weights_path):
            if not needed.is_file():
                raise UserError(
                    f"{needed}: no such file; an adapter is a folder with adapter_config.json and adapter_model.safetensors"
                )
        config, tensors = _json_object(config_path), None
    needed = {
        "LORA": ("r", "lora_alpha"),
        "PREFIX_TUNING": ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
    }
    for key in needed.get(config.get("peft_type"), ()):
        if not isinstance(config.get(key), (int, float)):
            raise UserError(f"{config_path}: {key} must be a number, found {config.get(key)!r}")
    tensors = read_safetensors(weights_path) if tensors is None else tensors
    if config.get("peft_type") == "LORA":
        _load_lora(model, config, tensors, config_path, trainable)
    elif config.get("peft_type") == "PREFIX_TUNING":
        _load_prefix(model, config, tensors, config_path, trainable)
    else:
        raise UserError(
            f"{config_path}: peft_type {config.get('peft_type')!r} is not supported; LORA and PREFIX_TUNING are"
        )
    for weight in adapter_weights(model):
        weight.parameter.stop_gradient = not trainable
    return model


def _load_lora(model, config, tensors, path, trainable):
    for key in (
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
    ):
        if config.get(key):
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f'{path}: bias = {config["bias"]!r} is not supported; only "none"')
    weights = path.parent / "adapter_model.safetensors"
    with_start = trainable and weights.is_file() and _metadata(weights).get("pissa_start_included") == "true"
    rank, alpha, rslora = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))
    if with_start:  # split [A A0] [B; -B0] again, so that training goes on where it was
        rank, alpha = rank // 2, alpha / (math.sqrt(2) if rslora else 2)
    apply_lora(
        model,
        rank,
        alpha,
        config.get("lora_dropout") or 0.0,
        rslora,
        bool(config.get("use_dora")),
        targets=config.get("target_modules"),
    )
    if with_start:
        for module, layer in lora_layers(model).items():
            a = tensors[f"base_model.model.{module}.lora_A.weight"].T
            b = tensors[f"base_model.model.{module}.lora_B.weight"].T
            layer.set_pissa(np.ascontiguousarray(a[:, rank:]), np.ascontiguousarray(-b[rank:]))
            tensors[f"base_model.model.{module}.lora_A.weight"] = a[:, :rank].T
            tensors[f"base_model.model.{module}.lora_B.weight"] = b[:rank].T
    _fill_adapter(model, tensors, path.parent / "adapter_model.safetensors")


def restore_adapter(model, path):
    """Overwrite the values of the model's adapter with those that save_adapter wrote of it at another time."""
    path = Path(path)
    projection = path / "prefix_projection.safetensors"
    file = projection if projection.is_file() else path / "adapter_model.safetensors"
    tensors = read_safetensors(file)
    for module, layer in lora_layers(model).items():
        if layer.initial is not None:  # PiSSA is saved as [A A0] [B; -B0]
            a, b = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
            rank = layer.lora_A.shape[1]
            tensors[a], tensors[b] = tensors[a][:rank], tensors[b][:, :rank]
    _fill_adapter(model, tensors, file)


def _load_prefix(model, config, tensors, path, trainable):
    heads, dim = model.config.num_key_value_heads, model.config.num_key_value_heads * model.config.head_dim
    if (config["num_attention_heads"], config["token_dim"], config["num_layers"]) != (
        heads,
        dim,
        model.config.num_hidden_layers,
    ):
        raise UserError(
            f"{path}: prefix of {config['num_layers']} layers, {config['num_attention_heads']} heads, width {config['token_dim']}; "
            f"the model has {model.config.num_hidden_layers}, {heads}, {dim}"
        )
    projection = path.parent / "prefix_projection.safetensors"
    if trainable and projection.is_file():
        apply_prefix(model, config["num_virtual_tokens"], True, config["encoder_hidden_size"])
        _fill_adapter(model, read_safetensors(projection), projection)
    else:
        apply_prefix(model, config["num_virtual_tokens"])
        _fill_adapter(model, tensors, path.parent / "adapter_model.safetensors")


def _fill_adapter(model, tensors, path):
    """The values of the model's adapter; those of linears that other processes hold are left out."""
    weights, elsewhere = adapter_weights(model), linears_on_other_ranks(model)
    wrong = [f"missing {w.name}" for w in weights if w.name not in tensors]
    wrong += [
        f"unexpected {n}"
        for n in tensors
        if n not in {w.name for w in weights}
        and n.removeprefix("base_model.model.").partition(".lora_")[0] not in elsewhere
    ]
    wrong += [
        f"{w.name} has shape {list(tensors[w.name].shape)}, not {w.shape}"
        for w in weights
        if w.name in tensors and list(tensors[w.name].shape) != w.shape
    ]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit: {'; '.join(wrong)}")
    for w in weights:
        set_parameter(w.parameter, w.from_numpy(np.ascontiguousarray(tensors[w.name], np.float32)))


def _metadata(path):
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length)).get("__metadata__") or {}
