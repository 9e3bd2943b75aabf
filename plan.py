"""What a run will need: published configurations, shapes, FLOPs and memory per rank (--dry_run)."""

import collections
import dataclasses
import difflib
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from adapters import match_lora_targets
from distributed.pipeline import partition_layers, pipeline_schedule
from distributed.sharding import unit_of
from families import ModelConfig
from formats.files import UserError
from formats.gguf_folder import open_folder
from formats.weights import named_weights
from layers import linear_row
from model import CausalLM, block_linears, build
from parallel import Degrees
from vocabulary import embedding_layers

# ============================================================================================ published configurations

CATALOGUE = Path(__file__).resolve().parent / "configs" / "models.json"


@functools.cache
def presets() -> dict[str, dict]:
    """{name: {"repo", "licence", "parameters", "config"}} of configs/models.json.

    A preset with "like" is another checkpoint of the same shape: it inherits what it does not define itself.
    """
    catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    for name, preset in catalogue.items():
        base = catalogue.get(preset.get("like"), {})
        catalogue[name] = {**base, **preset, "config": {**base.get("config", {}), **preset.get("config", {})}}
    return catalogue


def find_preset(name: str) -> tuple[str, dict] | None:
    """(name, preset) by the preset's name or its Hugging Face repository, in upper or lower case; None if unknown."""
    wanted = str(name).lower().rstrip("/")
    return next((item for item in presets().items() if wanted in (item[0], (item[1]["repo"] or "").lower())), None)


def missing_model_message(key: str, path: str) -> str:
    """The error line for a model that is not on this disk: what to download and to where, or the nearest names."""
    if (item := find_preset(path)) is None:
        names = {name.lower(): name for name in [*presets(), *(p["repo"] for p in presets().values() if p["repo"])]}
        near = [names[name] for name in difflib.get_close_matches(str(path).lower(), names, 3)]
        line = f"{key}: {path}: no such folder, and no preset of configs/{CATALOGUE.name}"
        return line + (f"; nearest: {', '.join(near)}" if near else "")
    name, preset = item
    if preset["repo"] is None:
        return (
            f"{key}: {name} has no published weights: pretrain.py trains them; tokenizer_name_or_path is the folder of "
            "the tokenizer"
        )
    files = "config.json, *.safetensors or *.bin, and the tokenizer's files"
    if key.startswith("tokenizer"):
        files = "the tokenizer's files"
    else:
        files += f", {2 * preset['parameters'] / 1e9:,.1f} GB with 16 bits a weight"
    return (
        f"{key}: {path} is not here: download {preset['repo']} from Hugging Face ({files}) into the folder {path}, or "
        "give the folder that holds it"
    )


def model_config(path: str) -> ModelConfig:
    """ModelConfig of a folder, or of a preset."""
    if Path(path).exists() or (item := find_preset(path)) is None:
        return ModelConfig.from_json(open_folder(path))
    return ModelConfig.from_dict(dict(item[1]["config"]), f"{CATALOGUE.name}: {item[0]}")


# ============================================================================================================= dry run


def dry_run(args: Any) -> str:
    """The text that --dry_run prints: shapes, parameters, FLOPs per token, memory per rank. No weight is allocated.

    args: the Args of a training script.
    """
    name, item = args.model_name_or_path, find_preset(args.model_name_or_path)
    if not Path(name).exists():
        if item is None:
            raise UserError(missing_model_message("model_name_or_path", name))
        name = item[0] + (f" ({item[1]['repo']})" if item[1]["repo"] else "")
    config = model_config(args.model_name_or_path)
    if config.quantization is not None:
        raise UserError(f"{args.model_name_or_path}: is quantized; a dry run is for float models")
    if layers := getattr(args, "num_hidden_layers", None):
        config = dataclasses.replace(config, num_hidden_layers=layers)
    T = next(getattr(args, key) for key in ("max_seq_length", "max_length", "max_seq_len") if hasattr(args, key))
    model = build(config)
    table, total, active, experts = _shapes(model)
    degrees = Degrees.of(args, config, T)
    flops = model.flops_per_token(T)
    lines = [f"{name}: {config.family}, {config.num_hidden_layers} layers", *table, ""]
    lines.append(f"parameters: {total:,}" + (f", {active:,} of them at work on a token" if experts else ""))
    if (adapter := _adapter_sizes(args, model, degrees)) is not None:
        trained = sum(size[1] for size in adapter)
        lines.append(f"trained: {trained:,} ({100 * trained / total:.4f} % of the parameters)")
    lines.append(f"FLOPs a token, forward and backward, in sequences of {T:,}: {flops:.4g}")
    notes = ["not in the memory below: temporary tensors and logits, communication buffers, loading, evaluation"]
    if args.bf16:
        notes.append("assumed: weights and activations in bfloat16; the kernels here store float32, see --bf16 false")
    return "\n".join([*lines, "", *notes, *_memory(args, model, adapter, degrees, T)])


def _shapes(model):
    """(lines of a table of weights, one row for all layers and experts; parameters; active per token; experts)."""
    folded, total, experts = {}, 0, 0  # folded: {(name pattern, shape): [layers, number of weights]}
    for weight in named_weights(model):
        parts = re.split(r"\.(\d+)\.", weight.name)  # name, layer, name, and with experts: expert, name
        expert = parts[3] if len(parts) > 3 else None
        pattern = ".{e}.".join([".{i}.".join(parts[0:3:2]), *parts[4:]])
        row = folded.setdefault((pattern, tuple(weight.shape)), [set(), 0])
        row[0].update(map(int, parts[1:2]))
        row[1] += 1
        experts = max(experts, int(expert or -1) + 1)
        total += math.prod(weight.shape)
    routed = sum(count * math.prod(shape) for (name, shape), (_, count) in folded.items() if "{e}" in name)
    width = max(len(name) for name, _ in folded)
    lines = [f"{'weight':{width}}  {'shape':>16}  {'layers':>7}  {'experts':>7}  {'parameters':>17}"]
    for (name, shape), (layers, count) in folded.items():
        size, where = " x ".join(map(str, shape)), f"{min(layers)}-{max(layers)}" if layers else ""
        each = f"{count // len(layers)}" if "{e}" in name else ""
        lines.append(f"{name:{width}}  {size:>16}  {where:>7}  {each:>7}  {count * math.prod(shape):>17,}")
    chosen = model.config.experts.top_k if experts else 0
    return lines, total, total - routed + (routed * chosen // experts if experts else 0), experts


def _adapter_sizes(args, model, degrees):
    """[(layer or None, elements in all, on a rank, on a rank with sharding)] of an adapter; None without an adapter."""
    config, sizes = model.config, []
    if getattr(args, "lora", False):
        linears, embeddings = block_linears(model), embedding_layers(model)
        for path in match_lora_targets(model, args.lora_target_modules):
            if path in embeddings:  # not sharded over tp
                total = args.lora_rank * sum(embeddings[path][2].weight.shape)
                sizes.append((None, total, total, total / degrees.sharding))
                continue
            _, name, layer = linears[path]
            name = (".experts." if ".experts." in path else ".") + name
            a, b = args.lora_rank * layer.n_in, (args.lora_rank + int(args.dora)) * layer.n_out
            shards = degrees.tp_shards(name, config)  # of the base; the matrix on its sharded side is sharded too
            local = a / shards + b if linear_row(name).parallel == "row" else a + b / shards
            sizes.append(
                (int(re.search(r"\.(\d+)\.", path)[1]), a + b, local, local / degrees.sharding_shards(name, config))
            )
        return sizes
    if not getattr(args, "prefix_tuning", False):
        return None
    width, layers = config.num_key_value_heads * config.head_dim, config.num_hidden_layers
    if args.prefix_projection:
        inner = args.prefix_projection_hidden_size or config.hidden_size
        total = args.num_prefix_tokens * width + (width + 1) * inner + (inner + 1) * layers * 2 * width
        return [(None, total, total, total / degrees.sharding)]
    total = args.num_prefix_tokens * 2 * width
    local = total / min(degrees.tp, config.num_key_value_heads)
    return [(layer, total, local, local / degrees.sharding) for layer in range(layers)]


# Bytes per element. bf16 as on an accelerator: weights and activations in bfloat16, and float32 master weights.
FLOAT32 = {"weights": 4, "gradients": 4, "moments": 8, "master weights": 0, "activations": 4}
BFLOAT16 = {"weights": 2, "gradients": 4, "moments": 8, "master weights": 4, "activations": 2}
SHARDED_FROM = {"weights": 3, "gradients": 2, "moments": 1, "master weights": 1}  # the ZeRO stage that shards them


def _memory(args, model, adapter, degrees, T):
    """Lines of a table of the bytes on the fullest rank, by purpose."""
    bytes_of = BFLOAT16 if args.bf16 else FLOAT32
    layers, first, last = _local_elements(model, degrees)
    stages, ranks = partition_layers(model.config.num_hidden_layers, degrees.pp * degrees.virtual), []
    for rank in range(degrees.pp):
        chunks, is_last = stages[rank :: degrees.pp], rank == degrees.pp - 1
        local_layers = [i for chunk in chunks for i in chunk]
        elements = layers[local_layers].sum(0) + (first if rank == 0 else 0) + (last if is_last else 0)
        trained = None
        if adapter is not None:
            sizes = (np.array(size[2:]) for size in adapter if size[0] is None or size[0] in local_layers)
            trained = sum(sizes, np.zeros(2))
        rows = _state_bytes(bytes_of, degrees, elements, trained)
        if degrees.sharding > 1:
            rows["a unit at work"] = transient_bytes(model, degrees, bytes_of, adapter)
        without, with_recompute = activation_bytes(args, model, degrees, rank, chunks)
        tokens = args.per_device_train_batch_size * T / degrees.sep
        head = model.config.norm_head and is_last  # a normalized head is a second head
        head = (
            math.prod(model.lm_head.weight.shape) / degrees.tp_shards("lm_head.weight", model.config) if head else 0.0
        )
        for mode, per_token in (("without recompute", without), ("with recompute", with_recompute)):
            rows[f"activations {mode}"] = (per_token * tokens + head) * bytes_of["activations"]
        for mode in ("without recompute", "with recompute"):
            rows[f"in all {mode}"] = sum(
                rows.get(part, 0.0) for part in (*SHARDED_FROM, "a unit at work", f"activations {mode}")
            )
        ranks.append(rows)
    rows = max(ranks, key=lambda rows: rows["in all with recompute" if args.recompute else "in all without recompute"])
    unit, size = ("GB", 1e9) if rows["weights"] >= 1e9 else ("MB", 1e6)
    kind = "bfloat16 beside float32 masters" if args.bf16 else "float32"
    lines = [
        f"memory of the fullest rank in {unit} (1e{9 if size == 1e9 else 6} bytes): {degrees}; {kind}; "
        f"{args.per_device_train_batch_size} x {T:,} tokens a micro-batch"
    ]
    return lines + [f"  {name:<30}{value / size:>14,.3f}" for name, value in rows.items()]


def _local_elements(model, degrees):
    """Weight elements on a rank, [unsharded, with ZeRO sharding]: of each layer (L, 2), before and after the layers."""
    layers, first, last = np.zeros([model.config.num_hidden_layers, 2]), np.zeros(2), np.zeros(2)
    for name, parameter in model.named_parameters():
        local = math.prod(parameter.shape) / degrees.tp_shards(name, model.config)
        local = np.array([local, local / degrees.sharding_shards(name, model.config)])
        if name.startswith("layers."):
            layers[int(name.split(".")[1])] += local
        elif name.startswith(("embed", "project_in")):
            first += local
        else:
            last += local
        if name == "embed_tokens.weight" and model.lm_head is None and degrees.pp > 1:
            last += local  # the last stage has its own copy of a tied head
    return layers, first, last


def _state_bytes(bytes_of, degrees, elements, adapter):
    """{part: bytes} of weights, gradients, moments and masters on a rank.

    elements: of the model's weights, [unsharded, with ZeRO sharding]; adapter: of the adapter, in float32, or None.
    """
    of_trained, trained = (bytes_of, elements) if adapter is None else (FLOAT32, adapter)
    parts = {}
    for part, stage in SHARDED_FROM.items():
        is_sharded = int(degrees.stage >= stage)
        parts[part] = float(trained[is_sharded] * of_trained[part])
        if part == "weights" and adapter is not None:
            parts[part] += float(elements[is_sharded] * bytes_of[part])
        if degrees.offload and stage == 1:
            parts[part] = 0.0
    return parts


def transient_bytes(model: CausalLM, degrees: Degrees, bytes_of: dict, adapter: list | None) -> float:
    """Temporary bytes of ZeRO for its largest unit: flattened gradients, and the unflattened ones from stage 2 on; in
    stage 3 the unsharded weights too. An adapter's gradients are too small to count."""
    sizes, tied = collections.Counter(), model.lm_head is None
    for name, parameter in model.named_parameters():
        sizes[unit_of(name, tied)] += math.prod(parameter.shape) / degrees.tp_shards(name, model.config)
    copies = 0 if adapter is not None else min(2, degrees.stage)
    weights = bytes_of["weights"] if degrees.stage == 3 else 0
    return max(sizes.values()) * (copies * bytes_of["gradients"] + weights)


def activation_bytes(
    args: Any, model: CausalLM, degrees: Degrees, rank: int, chunks: list[range]
) -> tuple[float, float]:
    """Most activation elements per token that a pipeline rank keeps: (without recompute, with recompute).

    chunks: the rank's layers. A chunk keeps the activations of all micro-batches that are between their forward and
    their backward. With recompute, one block at a time is recomputed on top of what all blocks keep.
    """
    config, without, with_recompute, recomputed = model.config, [], [], 0.0
    width = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
    for chunk, layers in enumerate(chunks):
        is_first, is_last = rank == chunk == 0, (rank, chunk) == (degrees.pp - 1, degrees.virtual - 1)
        split = [_recomputed(args, i, model.layers[i], config, degrees) for i in layers]
        ends = (is_first + is_last) * width  # the first block's input; the final norm's output
        without.append(sum(_activations(model.layers[i], config, degrees) for i in layers) + ends)
        # A block that is recomputed in full counts its input, any other block its output.
        inputs = [left == width for left, _ in split]
        ends += width * (is_last * inputs[-1] - is_first * inputs[0])
        with_recompute.append(sum(left for left, _ in split) + ends)
        recomputed = max(recomputed, *(part for _, part in split))
    current, peak = np.zeros([2, len(chunks)]), np.zeros(2)
    for kind, chunk, _ in pipeline_schedule(degrees.pp, degrees.virtual, args.gradient_accumulation_steps)[rank]:
        current[:, chunk] += np.array([without[chunk], with_recompute[chunk]]) * (1 if kind == "forward" else -1)
        peak = np.maximum(peak, current.sum(1))
    return peak[0], peak[1] + recomputed


def _recomputed(args, i, block, config, degrees):
    """Elements per token of the i-th block: (kept with recompute, recomputed)."""
    total, granularity = _activations(block, config, degrees), args.recompute_granularity
    width = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
    if i in (args.no_recompute_layers or ()):
        return total, 0.0
    if granularity == "full":
        return width, total
    of_attention = ("attention.o_proj", "attention.q_norm", "attention.k_norm")
    if granularity == "full_attn":
        of_attention = ("attention.",)
    recomputed = _activations(block, config, degrees, of_attention) - width  # attention's output is kept
    return total - recomputed, recomputed


def _activations(block, config, degrees, names=("",)):
    """Elements per token that one rank keeps for the backward of this block, or of its layers with these name prefixes.

    They are the outputs of linears and norms, and the inputs of the last linears of attention and MLP. Temporary
    tensors of ops and blocks of logits (128 MB) are not counted.
    """
    D, share = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1), 1.0
    elements = 0.0 if config.residual_scale is None or names != ("",) else D  # the scaled residual
    if hasattr(block.mlp, "experts") and names == ("",):  # the token's copy for each selected expert, and their sum
        share = config.experts.top_k / config.experts.num_experts
        elements += (config.experts.top_k + 1) * D
    for name, layer in block.named_sublayers():
        if not name.startswith(names):
            continue
        part, routed = name.rpartition(".")[2], share if ".experts." in name else 1.0
        shards = degrees.tp_shards(f".{part}", config)
        if hasattr(layer, "epsilon"):  # a norm: over the model width, over a part of it, or per head
            width = layer.weight.shape[0]
            heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}.get(part)
            if heads:
                elements += width * heads / min(degrees.tp, heads)
            else:
                elements += D if width == config.hidden_size else width
        elif hasattr(layer, "n_out") and not (
            part == "up_proj" and config.activation == "relu"
        ):  # relu keeps its output
            row = linear_row(part)
            is_row_parallel = row is not None and row.parallel == "row"
            elements += routed * (layer.n_in / shards + D if is_row_parallel else layer.n_out / shards)
    return elements
