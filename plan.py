"""What a run will need: presets, shapes and memory; --dry_run."""

import collections
import dataclasses
import difflib
import functools
import json
import math
import re
from pathlib import Path

import numpy as np

from adapters import match_lora_targets
from distributed.pipeline import partition_layers, pipeline_schedule
from distributed.sharding import unit_of
from distributed.tensor import ROW_PARALLEL
from families import ModelConfig
from formats.files import UserError
from formats.weights import named_weights
from model import block_linears, build
from parallel import Degrees

# ================================================================================ presets, and runs that only count

CATALOGUE = Path(__file__).resolve().parent / "configs" / "catalogue.json"


@functools.cache
def presets():
    """{name: {"repo", "licence", "parameters", "config"}} of configs/catalogue.json.

    A preset with "like" is another checkpoint of that one's shape: what it does not say itself is the other's.
    """
    found = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    for name, preset in found.items():
        base = found.get(preset.get("like"), {})
        found[name] = {**base, **preset, "config": {**base.get("config", {}), **preset.get("config", {})}}
    return found


def find_preset(name):
    """(name, preset) by the preset's name or its repository on Hugging Face, in any case; None if there is none."""
    wanted = str(name).lower().rstrip("/")
    return next((item for item in presets().items() if wanted in (item[0], (item[1]["repo"] or "").lower())), None)


def missing_model_message(key, path):
    """The line that says what to download, and to where, for a model's name that is no folder; or the nearest names."""
    if (found := find_preset(path)) is None:
        names = {name.lower(): name for name in [*presets(), *(p["repo"] for p in presets().values() if p["repo"])]}
        near = [names[name] for name in difflib.get_close_matches(str(path).lower(), names, 3)]
        line = f"{key}: {path}: no such folder, and no preset of configs/{CATALOGUE.name}"
        return line + (f"; nearest: {', '.join(near)}" if near else "")
    name, preset = found
    if preset["repo"] is None:
        return f"{key}: {name} has no published weights: pretrain.py makes them, with a tokenizer's folder as tokenizer_name_or_path"
    files = "config.json, *.safetensors or *.bin, and the tokenizer's files"
    if key.startswith("tokenizer"):
        files = "the tokenizer's files"
    else:
        files += f", {2 * preset['parameters'] / 1e9:,.1f} GB with 16 bits a weight"
    return f"{key}: {path} is not here: download {preset['repo']} from Hugging Face ({files}) into the folder {path}, or give the folder that holds it"


def model_config(path):
    """ModelConfig of a folder, or of a preset of the catalogue."""
    if Path(path).exists() or (found := find_preset(path)) is None:
        return ModelConfig.from_json(path)
    return ModelConfig.from_dict(dict(found[1]["config"]), f"{CATALOGUE.name}: {found[0]}")


def dry_run(args):
    """The text of a run that only counts: shapes, parameters, FLOPs a token, memory a rank. No weight takes memory."""
    name, found = args.model_name_or_path, find_preset(args.model_name_or_path)
    if not Path(name).exists():
        if found is None:
            raise UserError(missing_model_message("model_name_or_path", name))
        name = found[0] + (f" ({found[1]['repo']})" if found[1]["repo"] else "")
    config = model_config(args.model_name_or_path)
    if config.quantization is not None:
        raise UserError(f"{args.model_name_or_path}: is quantized; a dry run counts models of floats")
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
    return "\n".join([*lines, "", *_memory(args, model, adapter, degrees, T)])


def _shapes(model):
    """(lines of a table of weights, layers and experts folded; parameters; those at work on a token; experts of a layer)."""
    folded, total, experts = {}, 0, 0
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
    """[(layer or None, numbers in all, on a rank, there when sharded)] of what an adapter trains; None for all weights."""
    config, sizes = model.config, []
    if getattr(args, "lora", False):
        found = block_linears(model)
        for path in match_lora_targets(model, args.lora_target_modules):
            _, name, layer = found[path]
            name = (".experts." if ".experts." in path else ".") + name
            a, b = args.lora_rank * layer.n_in, (args.lora_rank + int(args.dora)) * layer.n_out
            ways = degrees.tp_shards(
                name, config
            )  # of the base: its cut side's matrix is cut with it, the other is whole
            mine = a / ways + b if name.rpartition(".")[2] in ROW_PARALLEL else a + b / ways
            sizes.append(
                (int(re.search(r"\.(\d+)\.", path)[1]), a + b, mine, mine / degrees.sharding_shards(name, config))
            )
        return sizes
    if not getattr(args, "prefix_tuning", False):
        return None
    width, layers = config.num_key_value_heads * config.head_dim, config.num_hidden_layers
    if args.prefix_projection:
        inner = args.prefix_projection_hidden_size or config.hidden_size
        whole = args.num_prefix_tokens * width + (width + 1) * inner + (inner + 1) * layers * 2 * width
        return [(None, whole, whole, whole / degrees.sharding)]
    whole = args.num_prefix_tokens * 2 * width
    mine = whole / min(degrees.tp, config.num_key_value_heads)
    return [(layer, whole, mine, mine / degrees.sharding) for layer in range(layers)]


# Bytes a number. In bf16 as accelerators keep it: weights and activations in bfloat16 beside float32 masters.
FLOAT32 = {"weights": 4, "gradients": 4, "moments": 8, "master weights": 0, "activations": 4}


BFLOAT16 = {"weights": 2, "gradients": 4, "moments": 8, "master weights": 4, "activations": 2}


SHARDED_FROM = {"weights": 3, "gradients": 2, "moments": 1, "master weights": 1}  # the stage of sharding


def _memory(args, model, adapter, degrees, T):
    """Lines: the bytes that the fullest rank keeps, by what they are for."""
    bytes_of = BFLOAT16 if args.bf16 else FLOAT32
    layers, first, last = _numbers(model, degrees)
    places, ranks = partition_layers(model.config.num_hidden_layers, degrees.pp * degrees.virtual), []
    for rank in range(degrees.pp):
        chunks, is_last = places[rank :: degrees.pp], rank == degrees.pp - 1
        here = [i for chunk in chunks for i in chunk]
        held = layers[here].sum(0) + (first if rank == 0 else 0) + (last if is_last else 0)
        mine = None
        if adapter is not None:
            sizes = (np.array(size[2:]) for size in adapter if size[0] is None or size[0] in here)
            mine = sum(sizes, np.zeros(2))
        rows = _bytes(bytes_of, degrees, held, mine)
        if degrees.sharding > 1:
            rows["a unit at work"] = _transient_bytes(model, degrees, bytes_of, adapter)
        whole, again = _activation_bytes(args, model, degrees, rank, chunks)
        tokens = args.per_device_train_batch_size * T / degrees.sep
        head = model.config.norm_head and is_last  # divided by its columns' lengths: a second head
        head = (
            math.prod(model.lm_head.weight.shape) / degrees.tp_shards("lm_head.weight", model.config) if head else 0.0
        )
        for way, numbers in (("without recompute", whole), ("with recompute", again)):
            rows[f"activations {way}"] = (numbers * tokens + head) * bytes_of["activations"]
        for way in ("without recompute", "with recompute"):
            rows[f"in all {way}"] = sum(
                rows.get(part, 0.0) for part in (*SHARDED_FROM, "a unit at work", f"activations {way}")
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


def _numbers(model, degrees):
    """How many numbers a rank holds of the weights, [whole, when sharded]: of each layer (L, 2), before, after them."""
    layers, first, last = np.zeros([model.config.num_hidden_layers, 2]), np.zeros(2), np.zeros(2)
    for name, parameter in model.named_parameters():
        mine = math.prod(parameter.shape) / degrees.tp_shards(name, model.config)
        mine = np.array([mine, mine / degrees.sharding_shards(name, model.config)])
        if name.startswith("layers."):
            layers[int(name.split(".")[1])] += mine
        elif name.startswith(("embed", "project_in")):
            first += mine
        else:
            last += mine
        if name == "embed_tokens.weight" and model.lm_head is None and degrees.pp > 1:
            last += mine  # a tied head is the embedding once more
    return layers, first, last


def _bytes(bytes_of, degrees, held, adapter):
    """{part: bytes} of a rank that holds so many numbers, [whole, when sharded]; adapter: those of it, in float32, or None."""
    of_trained, trained = (bytes_of, held) if adapter is None else (FLOAT32, adapter)
    parts = {}
    for part, stage in SHARDED_FROM.items():
        which = int(degrees.stage >= stage)
        parts[part] = float(trained[which] * of_trained[part])
        if part == "weights" and adapter is not None:
            parts[part] += float(held[which] * bytes_of[part])
        if degrees.offload and stage == 1:
            parts[part] = 0.0
    return parts


def _transient_bytes(model, degrees, bytes_of, adapter):
    """Bytes that come and go with sharding, at the largest unit: its gradients laid flat, from stage 2 on beside those that
    they were laid from, and in stage 3 its weights. (An adapter's gradients are small.)"""
    sizes, tied = collections.Counter(), model.lm_head is None
    for name, parameter in model.named_parameters():
        sizes[unit_of(name, tied)] += math.prod(parameter.shape) / degrees.tp_shards(name, model.config)
    copies = 0 if adapter is not None else min(2, degrees.stage)
    weights = bytes_of["weights"] if degrees.stage == 3 else 0
    return max(sizes.values()) * (copies * bytes_of["gradients"] + weights)


def _activation_bytes(args, model, degrees, rank, chunks):
    """Activations of a token that a rank of a pipeline keeps at the most, without and with recompute; chunks: its layers.

    With recompute what is left of all blocks, and what is made again of one. Of each chunk those of as many micro-batches
    as lie between their forward and their backward.
    """
    config, whole, again, made = model.config, [], [], 0.0
    width = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
    for chunk, layers in enumerate(chunks):
        is_first, is_last = rank == chunk == 0, (rank, chunk) == (degrees.pp - 1, degrees.virtual - 1)
        split = [_recomputed(args, i, model.layers[i], config, degrees) for i in layers]
        ends = (is_first + is_last) * width  # the first block's input; what the last norm gives
        whole.append(sum(_activations(model.layers[i], config, degrees) for i in layers) + ends)
        # A whole block that is made again has its input counted, any other its output.
        inputs = [left == width for left, _ in split]
        ends += width * (is_last * inputs[-1] - is_first * inputs[0])
        again.append(sum(left for left, _ in split) + ends)
        made = max(made, *(part for _, part in split))
    now, most = np.zeros([2, len(chunks)]), np.zeros(2)
    for kind, chunk, _ in pipeline_schedule(degrees.pp, degrees.virtual, args.gradient_accumulation_steps)[rank]:
        now[:, chunk] += np.array([whole[chunk], again[chunk]]) * (1 if kind == "forward" else -1)
        most = np.maximum(most, now.sum(1))
    return most[0], most[1] + made


def _recomputed(args, i, block, config, degrees):
    """(numbers of a token that recompute leaves of the i-th block, those that it makes again)."""
    kept, how = _activations(block, config, degrees), args.recompute_granularity
    width = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
    if i in (args.no_recompute_layers or ()):
        return kept, 0.0
    if how == "full":
        return width, kept
    of_attention = (
        ("attention.",) if how == "full_attn" else ("attention.o_proj", "attention.q_norm", "attention.k_norm")
    )
    made = _activations(block, config, degrees, of_attention) - width  # what attention gives stays
    return kept - made, made


def _activations(block, config, degrees, names=("",)):
    """Numbers that backward needs of one token in this block, or in the layers in it whose names begin so, on one rank.

    They are the outputs of its linears and norms, and what the last linears of attention and MLP read. Temporary
    tensors of an op, and blocks of logits (128 MB), come on top.
    """
    D, share = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1), 1.0
    numbers = 0.0 if config.residual_scale is None or names != ("",) else D  # the scaled residual
    if hasattr(block.mlp, "experts") and names == ("",):  # each chosen expert's copy of the token, and the experts' sum
        share = config.experts.top_k / config.experts.count
        numbers += (config.experts.top_k + 1) * D
    for name, layer in block.named_sublayers():
        if not name.startswith(names):
            continue
        part, routed = name.rpartition(".")[2], share if ".experts." in name else 1.0
        ways = degrees.tp_shards(f".{part}", config)
        if hasattr(layer, "epsilon"):  # a norm: of the whole width, of a part of it, or of each head
            width = layer.weight.shape[0]
            heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}.get(part)
            if heads:
                numbers += width * heads / min(degrees.tp, heads)
            else:
                numbers += D if width == config.hidden_size else width
        elif hasattr(layer, "n_out") and not (
            part == "up_proj" and config.activation == "relu"
        ):  # relu keeps its result
            numbers += routed * (layer.n_in / ways + D if part in ROW_PARALLEL else layer.n_out / ways)
    return numbers
