"""The bytes that each rank of a run holds, by purpose, from shapes alone; and the text of --dry_run.

    memory = MemoryModel(args, config, T)                         # a script's arguments, its model, its longest row
    rows = memory.fullest(degrees, batch_size=1, accumulation=8)  # {purpose: bytes} of the fullest rank

No weight is allocated. Weights, gradients and moments are counted from the shapes of the model's parameters and from
what parallel.Degrees says of each. Activations are what each op keeps for its backward, as in Korthikanti et al.
(arXiv 2205.05198, 4), but counted for the ops of model.py and every family's layers; micro-batches in flight are those
of the pipeline's own schedule. tests/test_plan_memory.py measures.
"""

import collections
import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from kernels import cpu, gpu, reference

import numpy as np

from adapters import match_lora_targets
from distributed.pipeline import partition_layers, pipeline_schedule
from distributed.sharding import unit_of
from families import ModelConfig
from formats.files import UserError
from formats.weights import named_weights
from model import block_linears, build
from modules.layers import linear_row
from modules.low_bit import LowBit
from modules.vocabulary import embedding_layers
from parallel import Degrees
from planning.presets import find_preset, missing_model_message, model_config

# ============================================================================================================= dry run


def sequence_length(args: Any) -> int:
    """Positions of the longest row that a training script's arguments allow."""
    if getattr(args, "max_dec_len", None):  # rl.py: a prompt and its replies side by side
        return args.max_length or args.max_src_len + args.max_dec_len
    return next(getattr(args, key) for key in ("max_seq_length", "max_length", "max_seq_len") if hasattr(args, key))


def planned_model(args: Any) -> tuple[str, ModelConfig]:
    """(name, ModelConfig) of model_name_or_path, a folder or a preset; UserError: unknown, or quantized."""
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
    return name, config


def dry_run(args: Any) -> str:
    """The text that --dry_run prints: shapes, parameters, FLOPs per token, memory per rank. No weight is allocated.

    args: the Args of a training script.
    """
    name, config = planned_model(args)
    T = sequence_length(args)
    memory = MemoryModel(args, config, T)
    table, total, active, experts = _shapes(memory.model)
    degrees = Degrees.of(args, config, T)
    lines = [f"{name}: {config.family}, {config.num_hidden_layers} layers", *table, ""]
    lines.append(f"parameters: {total:,}" + (f", {active:,} of them at work on a token" if experts else ""))
    if (adapter := memory.adapter_sizes(degrees)) is not None:
        trained = sum(size[1] for size in adapter)
        lines.append(f"trained: {trained:,} ({100 * trained / total:.4f} % of the parameters)")
    flops = memory.model.flops_per_token(T)
    lines.append(f"FLOPs a token, forward and backward, in sequences of {T:,}: {flops:.4g}")
    notes = ["not in the memory below: gaps of the allocator, buffers of NCCL, loading, evaluation"]
    if args.bf16:
        notes.append(
            "bf16: products are in bfloat16; trained weights and activations are float32, frozen linears bfloat16"
        )
    return "\n".join([*lines, "", *notes, *_memory_lines(args, memory, degrees)])


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


# ============================================================================================================== memory

FLOAT32, BFLOAT16 = 4, 2  # bytes of an element
SHARDED_FROM = {"weights": 3, "gradients": 2, "moments": 1}  # the ZeRO stage that shards them
BYTES = {"weights": 4, "gradients": 4, "moments": 8}  # of a trained weight; with bf16 too, see kernels/gpu.py
HELD = ("weights", "moments", "reference", "average of the weights", "critic", "keys and values of the engine")
HEAD = "logits and the head's gradient"
MODES = ("without recompute", "with recompute")


def _memory_lines(args, memory, degrees):
    """Lines of a table of the bytes on the fullest rank, by purpose."""
    rows = memory.fullest(degrees, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    unit, size = ("GB", 1e9) if rows["weights"] >= 1e9 else ("MB", 1e6)
    kind = "float32, products in bfloat16" if args.bf16 else "float32"
    lines = [
        f"memory of the fullest rank in {unit} (1e{9 if size == 1e9 else 6} bytes): {degrees}; {kind}; "
        f"{args.per_device_train_batch_size} x {memory.T:,} tokens a micro-batch"
    ]
    return lines + [f"  {name:<40}{value / size:>14,.3f}" for name, value in rows.items()]


class Stage(NamedTuple):
    """What a rank of the pipeline holds."""

    rank: int
    layers: list[int]
    kinds: collections.Counter  # {kind: how many of its layers}
    chunks: tuple[tuple, ...]  # (kind, whether it keeps its activations) of each layer of each chunk
    counts: list[collections.Counter]  # the same, counted


class MemoryModel:
    """The bytes on the ranks of one run, by purpose, for any Degrees and micro-batches."""

    def __init__(self, args: Any, config: ModelConfig, T: int):
        """args: of a training script; its degrees and batch sizes are not read. T: positions of a row."""
        self.args, self.config, self.T, self.model = args, config, T, build(config)
        self.blocks, self.kinds, names = [], [], {}  # one block of each kind; the kind of each layer
        for block in self.model.layers:
            shape = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
            if names.setdefault(shape, len(names)) == len(self.blocks):
                self.blocks.append(block)
            self.kinds.append(names[shape])
        self.outside = [
            (name, math.prod(p.shape)) for name, p in self.model.named_parameters() if not name.startswith("layers.")
        ]
        self.is_adapter = bool(getattr(args, "lora", False) or getattr(args, "prefix_tuning", False))
        self.on_cpu, self.cache, self.low_bit = args.device == "cpu", {}, LowBit.of(args)

    # ------------------------------------------------------------------------------------------- elements on a rank

    def cached(self, key, make) -> Any:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def adapter_sizes(self, degrees: Degrees) -> list | None:
        """_adapter_sizes() of these degrees."""
        key = ("adapter", *_sharding_key(degrees))
        return self.cached(key, lambda: _adapter_sizes(self.args, self.model, degrees))

    def _adapter_elements(self, degrees):
        """(L + 1, 2) of the adapter's elements on a rank, [unsharded, with ZeRO sharding]: of layers, then the rest."""

        def make():
            found = np.zeros([len(self.kinds) + 1, 2])
            for layer, _, *local in self.adapter_sizes(degrees):
                found[len(self.kinds) if layer is None else layer] += local
            return found

        return self.cached(("adapter elements", *_sharding_key(degrees)), make)

    def _elements(self, degrees):
        """Weight elements on a rank, [unsharded, with ZeRO sharding, of linears]: by kind of layer, before, after."""
        return self.cached(("elements", *_sharding_key(degrees), degrees.pp > 1), lambda: self._count(degrees))

    def _count(self, degrees):
        def counted(name, size):
            local = size / degrees.tp_shards(name, self.config)
            is_linear = linear_row(name) is not None and name.endswith(".weight") and "embed" not in name
            return np.array([local, local / degrees.sharding_shards(name, self.config), local * is_linear])

        kinds = [
            sum(counted(f"layers.0.{name}", math.prod(p.shape)) for name, p in block.named_parameters())
            for block in self.blocks
        ]
        first, last, units = np.zeros(3), np.zeros(3), collections.Counter()
        tied = self.model.lm_head is None
        for name, size in self.outside:
            local = counted(name, size)
            units[unit_of(name, tied)] += local[0]
            if name.startswith(("embed", "project_in")):
                first += local
            else:
                last += local
            if name == "embed_tokens.weight" and tied and degrees.pp > 1:
                last += local  # the last stage has its own copy of a tied head
        return kinds, first, last, max([*units.values(), *(kind[0] for kind in kinds)])

    def local_elements(self, degrees: Degrees) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weight elements on a rank, [unsharded, with ZeRO sharding]: of each layer (L, 2), before and after them."""
        kinds, first, last, _ = self._elements(degrees)
        return np.array([kinds[kind][:2] for kind in self.kinds]), first[:2], last[:2]

    # ------------------------------------------------------------------------------------------------- the ranks

    def stages(self, degrees: Degrees) -> list["Stage"]:
        """One of the ranks of the pipeline that hold the same, the first one, which has the most micro-batches in
        flight; and the last rank."""
        return self.cached(("stages", degrees.pp, degrees.virtual), lambda: self._make_stages(degrees))

    def _make_stages(self, degrees):
        stages = partition_layers(self.config.num_hidden_layers, degrees.pp * degrees.virtual)
        kept, found = frozenset(self.args.no_recompute_layers or ()), {}
        for rank in range(degrees.pp):
            chunks = stages[rank :: degrees.pp]
            what = tuple(tuple((self.kinds[i], i in kept) for i in chunk) for chunk in chunks)
            key = what, rank == 0, rank == degrees.pp - 1
            if key not in found:
                layers = [i for chunk in chunks for i in chunk]
                kinds = collections.Counter(self.kinds[i] for i in layers)
                found[key] = Stage(rank, layers, kinds, what, [collections.Counter(chunk) for chunk in what])
        return list(found.values())

    def fullest(self, degrees: Degrees, batch_size: int, accumulation: int, recompute: bool | None = None) -> dict:
        """{purpose: bytes} of the rank that holds most; recompute: see ranks(); None: as the arguments say."""
        mode = MODES[self.args.recompute if recompute is None else recompute]
        return max(self.ranks(degrees, batch_size, accumulation), key=lambda rows: rows[f"in all {mode}"])

    def ranks(self, degrees: Degrees, batch_size: int, accumulation: int, granularity: str | None = None) -> list[dict]:
        """[{purpose: bytes}] of the ranks of stages(). granularity: of recompute; None: as the arguments say."""
        kinds, first, last, unit = self._elements(degrees)
        adapter, ranks = self._adapter_elements(degrees) if self.is_adapter else None, []
        tokens = batch_size * self.T / degrees.sep
        for stage in self.stages(degrees):
            rank, counts = stage.rank, stage.kinds
            is_first, is_last = rank == 0, rank == degrees.pp - 1
            elements = sum(n * kinds[kind] for kind, n in counts.items()) + is_first * first + is_last * last
            trained = None
            if adapter is not None:
                trained = adapter[stage.layers].sum(0) + adapter[-1]
            in_blocks = sum(n * kinds[kind][2] for kind, n in counts.items())
            rows = self._state_bytes(degrees, elements, trained, in_blocks)
            rows |= self._transient_bytes(degrees, unit, tokens, is_last)
            temporary = max(self._mlp_activations(kind, degrees) for kind in counts)
            rows["gradients of activations"] = temporary * tokens * FLOAT32
            if self.low_bit is not None:
                rows["a dequantized weight"] = self._largest_linear() * FLOAT32
            without, kept, recomputed = self._activation_elements(degrees, stage, accumulation, granularity)
            head = self._normalized_head(degrees) if is_last else 0.0
            with_recompute = kept + recomputed
            without = with_recompute if degrees.stage == 3 else without
            for mode, per_token in zip(MODES, (without, with_recompute)):
                rows[f"activations {mode}"] = float((per_token * tokens + head) * FLOAT32)
            rows["of these recomputed"] = float(recomputed * tokens * FLOAT32)
            self._add_half_weights(rows, degrees, kinds, stage, accumulation)
            for mode in MODES:
                rows[f"in all {mode}"] = self._peak(rows, degrees, mode, accumulation)
            ranks.append(rows)
        return ranks

    def _state_bytes(self, degrees, elements, trained, in_blocks):
        """{part: bytes} of weights, gradients and moments. elements: of the model's weights, as in _elements();
        trained: of the adapter, [unsharded, sharded], or None. in_blocks: of the linears of blocks."""
        parts, of_trained = {}, elements if trained is None else trained
        for part, stage in SHARDED_FROM.items():
            is_sharded = int(degrees.stage >= stage)
            parts[part] = float(of_trained[is_sharded] * BYTES[part])
            if part == "weights" and trained is not None:
                parts[part] += float(elements[is_sharded] * FLOAT32)
                if self.args.bf16:  # frozen linears are stored in bfloat16
                    shards = elements[0] / elements[1] if is_sharded else 1.0
                    parts[part] -= float(elements[2] / shards * (FLOAT32 - BFLOAT16))
                if self.low_bit is not None:  # QLoRA: codes are whole on every rank of sharding
                    stored = (BFLOAT16 if self.args.bf16 else FLOAT32) * elements[is_sharded] / elements[0]
                    parts[part] -= float(in_blocks * (stored - self.low_bit.bytes_per_weight))
            if degrees.offload and stage == 1:
                parts[part] = 0.0
        if getattr(self.args, "needs_reference", False) and trained is None:  # rl.py: a frozen copy
            parts["reference"] = float(elements[0] * (BFLOAT16 if self.args.bf16 else FLOAT32))
        if getattr(self.args, "ref_model_update_steps", -1) > 0:  # dpo.py: weights that follow the policy's
            parts["reference"] = float(of_trained[int(degrees.stage >= 1)] * FLOAT32)
        if getattr(self.args, "use_ema", False):  # rl.py: an average of the trained weights
            parts["average of the weights"] = float(of_trained[int(degrees.stage >= 1)] * FLOAT32)
        if getattr(self.args, "critic_model_name_or_path", None):  # rl.py: taken to be as large as the policy
            parts["critic"] = sum(parts[part] for part in SHARDED_FROM)
        if cache := self._engine_cache():
            parts["keys and values of the engine"] = cache
        return parts

    def _engine_cache(self):
        """Bytes of the blocks of rl.py's engine: room for as many replies at once, each prompt once for its group."""
        args, c = self.args, self.config
        if not getattr(args, "max_dec_len", None):
            return 0.0
        sequences = args.rollout_max_num_seqs
        sequences = min(args.global_batch_size * args.rollout_n, 128) if sequences < 1 else sequences
        prompts = -(-sequences // args.rollout_n)
        width = 2 * c.num_key_value_heads * c.head_dim if c.latent is None else c.num_attention_heads * c.head_dim * 2
        return float(
            (prompts * args.max_src_len + sequences * args.max_dec_len) * width * c.num_hidden_layers * FLOAT32
        )

    def _transient_bytes(self, degrees, unit, tokens, is_last):
        """{part: bytes} of what comes and goes: logits with the head's gradient, and ZeRO's largest unit at work.

        The unit: its flattened gradients, the unflattened ones too from stage 2 on, and in stage 3 its unsharded
        weights. An adapter's gradients are too small to count. Of a head that is trained there is a gradient of a chunk
        of tokens and one of the micro-batch, beside the sum of earlier ones; in stage 3 also its unsharded weight.
        """
        rows = {}
        if degrees.sharding > 1 or degrees.dp * degrees.sep > 1:
            copies = 0 if self.is_adapter else min(2, max(1, degrees.stage))
            rows["a unit at work"] = float(unit * (copies * FLOAT32 + FLOAT32 * (degrees.stage == 3)))
        V, width = -(-self.config.vocab_size // degrees.tp), self.config.embedding_size or self.config.hidden_size
        if is_last:
            copies = 2 * (not self.is_adapter) + (degrees.stage == 3)
            rows[HEAD] = float(copies * V * width * FLOAT32 + self._logits_bytes(tokens, V, degrees.tp))
        return rows

    def _logits_bytes(self, tokens, V, tp):
        """Of the chunk of logits that linear_cross_entropy holds at once, see the back ends."""
        if self.on_cpu:
            return min(tokens * V, cpu.LOGITS) * FLOAT32
        if tp > 1 or not self.args.bf16:
            return 2.0 * min(tokens * V, reference.LOGITS) * FLOAT32
        return 2.0 * min(tokens * V, gpu.LOGITS) * BFLOAT16

    def _largest_linear(self):
        sizes = (layer.n_in * layer.n_out for _, _, layer in block_linears(self.model).values())
        return self.cached("largest linear", lambda: max(sizes))

    def _normalized_head(self, degrees):
        """Elements: a normalized head is a second head."""
        if not self.config.norm_head:
            return 0.0
        return math.prod(self.model.lm_head.weight.shape) / degrees.tp_shards("lm_head.weight", self.config)

    def _add_half_weights(self, rows, degrees, kinds, stage, accumulation):
        """bf16 on an accelerator: each product keeps a bfloat16 copy of its trained weight until its backward."""
        if not self.args.bf16 or self.on_cpu or self.is_adapter:
            return
        largest = max(kinds[kind][2] for kind in stage.kinds) * BFLOAT16
        of_rank = sum(n * kinds[kind][2] for kind, n in stage.kinds.items()) * BFLOAT16
        flights = in_flight(degrees.pp, degrees.virtual, accumulation, stage.rank)
        waiting = flights.sum(1).max() / degrees.virtual  # micro-batches whose backward is to come
        for mode, size in zip(MODES, (largest if degrees.stage == 3 else of_rank * waiting, largest)):
            rows[f"half-precision weights {mode}"] = float(size)

    def _peak(self, rows, degrees, mode, accumulation):
        """The most bytes at one time. One micro-batch without a pipeline: gradients come as activations go."""
        held = sum(rows.get(part, 0.0) for part in HELD)
        gradients, unit = rows["gradients"], rows.get("a unit at work", 0.0)
        block = rows["of these recomputed"] if mode == MODES[1] or degrees.stage == 3 else 0.0
        activations = rows[f"activations {mode}"] + rows.get(f"half-precision weights {mode}", 0.0) - block
        block += rows["gradients of activations"] + rows.get("a dequantized weight", 0.0)
        temporary = max(unit, rows.get(HEAD, 0.0), block)
        if accumulation == 1 and degrees.pp == 1:
            return held + max(activations + temporary, gradients + unit)
        return held + gradients + activations + temporary

    # ------------------------------------------------------------------------------------------------- activations

    def _activation_elements(self, degrees, stage, accumulation, granularity):
        """Most elements per token that a pipeline rank keeps: (without recompute, with it, of the block at work).

        A chunk keeps the activations of all micro-batches that are between their forward and their backward. With
        recompute, one block at a time is recomputed on top of what all blocks keep.
        """
        shape = (degrees.pp, degrees.virtual, accumulation, stage.rank)
        key = ("activations", shape, degrees.tp, degrees.ep, degrees.sequence_parallel, granularity, degrees.stage == 3)
        make = functools.partial(self._count_activations, degrees, stage, in_flight(*shape), granularity)
        return self.cached(key, make)

    def _count_activations(self, degrees, stage, flights, granularity):
        without, with_recompute, recomputed = [], [], 0.0
        width = self.config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
        for chunk, (layers, counts) in enumerate(zip(stage.chunks, stage.counts)):
            is_first = stage.rank == chunk == 0
            is_last = (stage.rank, chunk) == (degrees.pp - 1, degrees.virtual - 1)
            split = {layer: self.block_activations(*layer, degrees, granularity) for layer in counts}
            ends = (is_first + is_last) * width  # the first block's input; the final norm's output
            without.append(sum(n * split[layer][0] for layer, n in counts.items()) + ends)
            # A block that is recomputed in full counts its input, any other block its output.
            ends += width * (is_last * (split[layers[-1]][1] == width) - is_first * (split[layers[0]][1] == width))
            with_recompute.append(sum(n * split[layer][1] for layer, n in counts.items()) + ends)
            recomputed = max(recomputed, *(part for _, _, part in split.values()))
        return (flights @ without).max(), (flights @ with_recompute).max(), recomputed

    def block_activations(self, kind: int, is_kept: bool, degrees: Degrees, granularity: str | None = None) -> tuple:
        """Elements per token of a block on a rank: (kept without recompute, kept with it, recomputed).

        is_kept: it is one of no_recompute_layers.
        """
        granularity = "full" if degrees.stage == 3 else granularity or self.args.recompute_granularity
        key = ("block", kind, is_kept, granularity, degrees.tp, degrees.ep, degrees.sequence_parallel)

        def make():
            total = _activations(self.blocks[kind], self.config, degrees)
            split = (total, 0.0) if is_kept else _recomputed(granularity, self.blocks[kind], self.config, degrees)
            return total, *split

        return self.cached(key, make)

    def _mlp_activations(self, kind, degrees):
        key = ("mlp", kind, degrees.tp, degrees.ep, degrees.sequence_parallel)
        return self.cached(key, lambda: _activations(self.blocks[kind], self.config, degrees, ("mlp.",)))


def _sharding_key(degrees):
    """What the number of elements on a rank depends on, beside its layers."""
    data = degrees.dp * degrees.sharding * degrees.sep
    return degrees.tp, degrees.ep, degrees.sharding, data, degrees.stage > 0


@functools.cache
def in_flight(pp: int, virtual: int, accumulation: int, rank: int) -> np.ndarray:
    """(n, chunks): how many micro-batches of each chunk are between forward and backward, at the times of a step at
    which no other time has as many of each.

    In the middle of a step the schedule repeats itself group by group, so a step of a few groups shows all of them.
    """
    groups = 4 + virtual
    accumulation = min(accumulation, groups * pp + accumulation % pp)
    now, seen = np.zeros(virtual, int), set()
    for kind, chunk, _ in pipeline_schedule(pp, virtual, accumulation)[rank]:
        now[chunk] += 1 if kind == "forward" else -1
        if kind == "forward":
            seen.add(tuple(now))
    found = np.array(sorted(seen))
    dominated = [any((other >= row).all() and (other > row).any() for other in found) for row in found]
    return found[~np.array(dominated)]


def _recomputed(granularity, block, config, degrees):
    """Elements per token of a block: (kept with recompute, recomputed)."""
    total = _activations(block, config, degrees)
    width = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
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
