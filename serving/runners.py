"""Scheduled tokens -> logits: what the engine computes a step with.

    runner = PagedRunner(model, num_blocks=64, block_size=16)
    logits = runner.run([ScheduledTokens(sequence, start=0, count=5)])       # (1, V) float32 numpy

PagedRunner        any model of model.py but ChatGLM-6B: one batch of tokens, keys and values in a pool of blocks
SequentialRunner   ChatGLM-6B, whose prompts see themselves both ways: one sequence after another, as generate() does it
StaticRunner       the graphs of a folder that export.py wrote, by paddle.inference

Letters: S sequences, N tokens of a step, C of a cache, P of a trained prefix; otherwise those of model.py.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import kernels
from kernels.rounding import rounded_tensors

import numpy as np
import paddle

from adapters import LoRALinear, adapted_layers, load_adapter, lora_layers, weights_in_adapter
from families import ModelConfig
from formats.files import UserError
from formats.tensor_files import read_safetensors
from model import CausalLM, KVCache, MoE, block_linears, set_parameter
from modules.layers import Linear, QuantLinear
from modules.positions import NO_ROW, rope_cache_key, rope_lengths

# ============================================================================================ what a runner reads


@dataclasses.dataclass(eq=False)
class TokenSequence:
    """What a runner knows of a sequence; the engine's Sequence adds the rest."""

    tokens: list[int]  # a -1 for each token of a trained prefix, then the prompt, then the reply so far
    num_prompt_tokens: int  # with those of the prefix
    blocks: list[int] = dataclasses.field(default_factory=list)  # of the pool: block i holds tokens[i * size :][:size]
    adapter: str | None = None  # name of a LoRA; None: the base model
    is_seeded: bool = False  # no bit of its logits may depend on what else is in a step


class ScheduledTokens(NamedTuple):
    """What a step computes of one sequence: tokens[start : start + count]."""

    sequence: TokenSequence
    start: int
    count: int


class StepLayout(NamedTuple):
    """The tokens of a step in a row, and where they are."""

    ids: np.ndarray  # (N,) int64
    positions: np.ndarray  # (N,) in their sequences, with the tokens of a trained prefix
    slots: np.ndarray  # (N,) int64 of the pool
    tables: np.ndarray  # (S, blocks) int32 of each sequence
    query_lengths: np.ndarray  # (S,)
    context_lengths: np.ndarray  # (S,)
    lengths: np.ndarray | None  # (N,) see rope_lengths()


def make_runner(
    model: CausalLM,
    num_blocks: int,
    block_size: int,
    adapters: dict | None = None,
    int8: bool | str = False,
    key_heads: int | None = None,
) -> "PagedRunner | SequentialRunner":
    """The runner for a model; UserError where it cannot have an int8 cache. key_heads: see PagedRunner."""
    if model.config.position != "rope_2d":
        return PagedRunner(model, num_blocks, block_size, adapters, int8, key_heads=key_heads)
    if int8:
        raise UserError("cachekv_int8_type: ChatGLM-6B keeps keys and values in float32; leave the key out")
    return SequentialRunner(model, adapters)


def static_cache_scales(config: ModelConfig) -> list[tuple]:
    """[(of keys (K, 1), of values (K, 1)), …] by layer: the scales of an int8 cache that quantize.py found."""
    found = [(config.quantization or {}).get(name) for name in ("k_scales", "v_scales")]
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    if any(scales is None or np.shape(scales) != shape for scales in found):
        have = "none" if None in found else f"{np.shape(found[0])} and {np.shape(found[1])}"
        raise UserError(
            f"cachekv_int8_type: static needs k_scales and v_scales {shape} in quantization_config, there are {have}; "
            "quantize.py writes them with a quant_type that ends in c8, and dynamic needs none"
        )
    return [tuple(paddle.to_tensor(np.array(of, np.float32)[:, None]) for of in layer) for layer in zip(*found)]


@paddle.no_grad()
def round_linears(model: CausalLM, scheme: str, group_size: int = -1) -> None:
    """Every float linear of the blocks becomes a QuantLinear, rounded to nearest; scheme "w8", "w4" or "a8w8".

    group_size: input rows that share a scale, in linears that have a multiple of it; -1 and others: all rows.
    UserError, naming the linear, where one cannot be packed.
    """
    for path, (parent, attribute, layer) in block_linears(model).items():
        if not isinstance(layer, Linear):
            raise UserError(f"quant: {path} is {type(layer).__name__}; quant rounds a model of float weights")
        group = group_size if layer.n_in % group_size == 0 else -1
        try:
            new = QuantLinear(layer.n_in, layer.n_out, scheme, group, layer.bias is not None)
            tensors = rounded_tensors(layer.full_weight(), scheme, group)
        except UserError as error:
            raise UserError(f"quant: {path}: {error}") from None
        for name, array in tensors.items():
            set_parameter(getattr(new, name), array)
        if layer.bias is not None:
            set_parameter(new.bias, layer.bias.astype("float32").numpy())
        setattr(parent, attribute, new)
        layer.weight._clear_data()  # one linear at a time has both


# ================================================================================================== LoRA by name


class AdapterLinear(paddle.nn.Layer):
    """A linear and LoRAs around it: each applied to its own slice of the step's tokens."""

    def __init__(self, base, loras: dict, slices: list):
        super().__init__()
        self.base, self.by_name, self.loras = base, dict(loras), paddle.nn.LayerList(loras.values())
        self.slices = slices  # [(adapter name or None, first token, end)]: the runner's list, set before each step

    def forward(self, x, residual=None):
        """x (1, N, in) -> (1, N, out), residual added if given"""
        layers = [(self.by_name.get(name, self.base), a, b) for name, a, b in self.slices]
        if len(layers) == 1:
            return layers[0][0](x, residual)
        y = paddle.concat([layer(x[:, a:b]) for layer, a, b in layers], axis=1)
        return y if residual is None else residual + y


def install_adapters(model: CausalLM, paths: dict[str, str], slices: list) -> list[str]:
    """Put the LoRAs {name: folder} beside the model's linears, which they share; returns the names."""
    layers_of = collections.defaultdict(dict)  # module path -> {name: LoRALinear}
    for name, path in paths.items():
        load_adapter(model, path)
        if model.prefix is not None:
            raise UserError(f"lora_path: {path} holds a prefix; give it as prefix_path")
        if weights_in_adapter(model) or adapted_layers(model).keys() - block_linears(model).keys():
            raise UserError(
                f"lora_path: {path} changes embedding, head, biases or whole modules, which all adapters share; "
                "give it as model_name_or_path"
            )
        for module, layer in lora_layers(model).items():
            layers_of[module][name] = layer
        for parent, attribute, layer in block_linears(model).values():
            if isinstance(layer, LoRALinear):
                setattr(parent, attribute, layer.base)
    for module, (parent, attribute, base) in block_linears(model).items():
        if module in layers_of:
            setattr(parent, attribute, AdapterLinear(base, layers_of[module], slices))
    for mlp in model.sublayers():
        experts = mlp.experts.sublayers() if isinstance(mlp, MoE) else ()
        if any(isinstance(layer, AdapterLinear) for layer in experts):
            mlp.dispatch_and_combine = functools.partial(_mix_slices, mlp, slices)
    model.eval()
    return list(paths)


def _mix_slices(mlp, slices, flat, weights, chosen, layout=None):
    """MoE.dispatch_and_combine for each adapter's tokens separately: inside it, tokens are in the order of experts."""
    all_slices, mixed = list(slices), []
    for name, first, end in all_slices:
        slices[:] = [(name, first, end)]
        mixed.append(MoE.dispatch_and_combine(mlp, *(x[first:end] for x in (flat, weights, chosen))))
    slices[:] = all_slices
    return paddle.concat(mixed)


# ==================================================================================== the model on a pool of blocks


class PagedRunner(KVCache):
    """Computes scheduled tokens with model.py and keeps their keys and values in blocks.

    The tokens of all sequences are one row of the model; only attention knows sequences, through attend(). A token is
    rotated as model.generate does it: for the length of its prompt and, with dynamic rope, of the reply up to it. The
    same holds for tokens that are computed again.

    Products of another number of rows may sum in another order. So sequences that are seeded are computed by passes of
    exactly SEEDED_ROWS tokens of one adapter, filled up with the first token of a sequence: it sees only itself, so its
    keys and values are the same bits again. (Behind a trained prefix it does not, and passes are not filled up.)
    """

    chunked_prefill = True  # a prompt may come in pieces, and share blocks with others
    is_row_invariant = False  # whether what else is in a step changes no bit of a sequence, seeded or not
    SEEDED_ROWS = 32  # the most that kernels.linear computes as it computes a few
    weights_are_free = False  # whether the model's layers have no weights any more, see FusedRunner

    def __init__(
        self,
        model: CausalLM,
        num_blocks: int,
        block_size: int,
        adapters: dict | None = None,
        int8: bool | str = False,
        dtype: str = "float32",
        key_heads: int | None = None,
    ):
        """int8, dtype: of the pool; dtype is "float32" or "bfloat16". key_heads: this rank's of tp; None: all.

        int8 "static": codes have the scales of their layer and head in quantization_config (quant_type …c8); any other
        that is true: each token's own."""
        model.eval()
        c, self.model, self.block_size = model.config, model, block_size
        self.config, self.vocab_size, self.max_positions = c, c.vocab_size, c.max_model_len
        self.prefix_tokens = 0  # KVCache: the positions that the model gets count the virtual tokens already
        self.num_virtual_tokens = model.prefix.tokens if model.prefix is not None else 0
        shape = [num_blocks, block_size, key_heads or c.num_key_value_heads, c.head_dim]
        dtype, layers = "int8" if int8 else dtype, range(c.num_hidden_layers)
        self.pools = [(paddle.zeros(shape, dtype), paddle.zeros(shape, dtype)) for _ in layers]  # keys, values
        self.scales = [(paddle.zeros(shape[:3]), paddle.zeros(shape[:3])) if int8 else (None, None) for _ in layers]
        self.static_scales = static_cache_scales(c) if int8 == "static" else None
        for (k_scales, v_scales), fixed in zip(self.scales, self.static_scales or ()):
            k_scales[:], v_scales[:] = fixed[0].squeeze(-1), fixed[1].squeeze(-1)
        self.slices = []
        self.adapters = install_adapters(model, adapters or {}, self.slices)
        # Of the step that is being computed, see _prepare:
        self.slots = self.tables = self.query_lengths = self.context_lengths = self.lengths = None

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, int8: bool = False, dtype: str = "float32") -> int:
        bytes_of_head = config.head_dim + 4 if int8 else config.head_dim * {"float32": 4, "bfloat16": 2}[dtype]
        return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * bytes_of_head

    def hash_seed(self, num_prompt_tokens: int) -> int:
        """What keys and values depend on besides the tokens, for a prompt of this length."""
        return rope_cache_key(self.config, num_prompt_tokens)

    def run(self, scheduled: list[ScheduledTokens]) -> np.ndarray:
        """(S, V) float32: the logits after the last token of each."""
        seeded = [i for i, tokens in enumerate(scheduled) if tokens.sequence.is_seeded]
        if not seeded:
            return self._run(scheduled)
        logits = np.empty((len(scheduled), self.vocab_size), np.float32)
        others = [i for i, tokens in enumerate(scheduled) if not tokens.sequence.is_seeded]
        if others:
            logits[others] = self._run([scheduled[i] for i in others])
        for rows, parts in self._passes(scheduled, seeded):
            if not self.num_virtual_tokens:
                missing = self.SEEDED_ROWS - sum(part.count for part in parts)
                parts += [ScheduledTokens(parts[0].sequence, 0, 1)] * missing
            with kernels.products_of_few_alike():  # experts get any number of rows
                logits[rows] = self._run(parts, self.SEEDED_ROWS)[: len(rows)]
        return logits

    def _passes(self, scheduled, rows):
        """Yields (rows, their tokens or a part of them), SEEDED_ROWS tokens of one adapter at most, in order.

        A part is one token only where all is: attention computes one token otherwise than several.
        """
        taken, parts, room = [], [], self.SEEDED_ROWS
        for row in sorted(rows, key=lambda i: scheduled[i].sequence.adapter or ""):
            sequence, start, count = scheduled[row]
            while count:
                part = min(count, self.SEEDED_ROWS)
                part -= count - part == 1
                if parts and (part > room or parts[0].sequence.adapter != sequence.adapter):
                    yield taken, parts
                    taken, parts, room = [], [], self.SEEDED_ROWS
                taken.append(row)
                parts.append(ScheduledTokens(sequence, start, part))
                start, count, room = start + part, count - part, room - part
        yield taken, parts

    @paddle.no_grad()
    def _run(self, scheduled, head_rows=None):
        """As run(), in one pass; head_rows: of the head's product, filled up with zeros."""
        order = list(range(len(scheduled)))
        if self.adapters:  # each adapter's tokens become one slice
            order.sort(key=lambda i: scheduled[i].sequence.adapter or "")
            self._set_slices([scheduled[i] for i in order])
        ids = self._prepare([scheduled[i] for i in order])
        x = self.model.hidden_states(ids, self.positions, caches=self)[0]  # (N, D)
        if len(scheduled) < x.shape[0]:
            x = paddle.gather(x, kernels.to_tensor(self.query_lengths.cumsum() - 1))  # (S, D)
        if head_rows is not None and head_rows > x.shape[0]:
            x = paddle.concat([x, paddle.zeros([head_rows - x.shape[0], x.shape[1]], x.dtype)])
        logits = self.model.logits(x).astype("float32").numpy()
        return logits[np.argsort(order)] if self.adapters else logits

    def _prepare(self, scheduled):
        """Ids (1, N); on self the step's positions (1, N), slots (N,), block tables and lengths."""
        step = self.layout(scheduled)
        self.tables, self.query_lengths, self.context_lengths = step.tables, step.query_lengths, step.context_lengths
        for array in (self.tables, self.query_lengths, self.context_lengths):
            array.flags.writeable = False  # so that kernels may keep what they derive from it for the next layers
        self.slots = kernels.to_tensor(step.slots)
        self.lengths = None if step.lengths is None else kernels.to_tensor(step.lengths[None])
        self.positions = kernels.to_tensor(step.positions[None])
        return kernels.to_tensor(step.ids[None])

    def layout(self, scheduled: list[ScheduledTokens]) -> StepLayout:
        """Where the tokens of a step are in their sequences and in the pool."""
        size, counts = self.block_size, np.array([tokens.count for tokens in scheduled])
        starts = np.array([tokens.start for tokens in scheduled])
        contexts = starts + counts
        tables = np.zeros((len(scheduled), -(-int(contexts.max()) // size)), np.int32)
        ids = []
        for row, (sequence, start, count) in enumerate(scheduled):
            ids += sequence.tokens[start : start + count]
            blocks = sequence.blocks[: -(-(start + count) // size)]
            tables[row, : len(blocks)] = blocks
        rows = np.repeat(np.arange(len(scheduled)), counts)  # (N,) the sequence of each token
        firsts = np.repeat(counts.cumsum() - counts, counts)
        positions = np.arange(len(ids)) - firsts + starts[rows]
        slots = tables[rows, positions // size].astype(np.int64) * size + positions % size
        lengths = None
        if self.config.rope["rope_type"] in ("qwen_ntk", "dynamic"):
            prompts = [tokens.sequence.num_prompt_tokens for tokens in scheduled]
            lengths = [rope_lengths(self.config, prompt, positions[rows == row]) for row, prompt in enumerate(prompts)]
            lengths = np.concatenate(lengths)
        return StepLayout(np.array(ids, np.int64), positions, slots, tables, counts, contexts, lengths)

    def _set_slices(self, scheduled):
        self.slices.clear()
        end = 0
        for name, group in itertools.groupby(scheduled, lambda tokens: tokens.sequence.adapter):
            first, end = end, end + sum(tokens.count for tokens in group)
            self.slices.append((name, first, end))

    def attend(self, layer: int, q, k, v, *, mask_rows=None, scale=None, **options) -> paddle.Tensor:
        """q (1, N, H, Dh), k and v (1, N, K, Dh) -> (1, N, H, Dh): keeps k and v, then reads the sequences' blocks.

        scale and options (window, softcap, alibi_slopes) are those of kernels.paged_attention, which makes the masks.
        """
        pool, scales = self.pools[layer], self.scales[layer]
        self._write(layer, k[0], v[0], self.slots)
        out = kernels.paged_attention(
            q[0], *pool, self.tables, self.query_lengths, self.context_lengths, scale, *scales, **options
        )
        return out.unsqueeze(0)

    def _write(self, layer, k, v, slots):
        """k and v (N, K, Dh) into these slots (N,) of a layer's pool."""
        if self.static_scales is None:
            kernels.write_cache(k, v, *self.pools[layer], slots, *self.scales[layer])
        else:  # the pool of scales is as it should be, and codes are whole numbers
            fixed = self.static_scales[layer]
            codes = (paddle.clip(paddle.round(x / scale), -127, 127) for x, scale in zip((k, v), fixed))
            kernels.write_cache(*codes, *self.pools[layer], slots)

    @paddle.no_grad()
    def fill_prefix(self, sequence: TokenSequence, start: int) -> None:
        """Write the trained prefix's keys and values from virtual token `start` on into the sequence's blocks."""
        prefix, size = self.model.prefix, self.block_size
        table = prefix.table().reshape([prefix.tokens, prefix.layers, 2, prefix.heads, prefix.head_dim])[start:]
        at = np.arange(start, prefix.tokens)
        slots = kernels.to_tensor(np.array(sequence.blocks)[at // size] * size + at % size)
        for layer in range(prefix.layers):
            self._write(layer, table[:, layer, 0], table[:, layer, 1], slots)

    def release(self, sequence: TokenSequence) -> None:
        """Nothing to do: the blocks are the engine's."""


# ====================================================================================== one sequence after another


class SequentialRunner:
    """ChatGLM-6B: each sequence has a cache of model.py's and is computed by itself, as model.generate computes it.

    The tokens of a prompt see those behind them as well, so a prompt must come whole and shares no blocks; the engine's
    blocks only count tokens. A prompt that comes with a part of its reply was preempted.
    """

    chunked_prefill = False

    def __init__(self, model: CausalLM, adapters: dict | None = None):
        model.eval()
        c, self.model = model.config, model
        self.config, self.vocab_size, self.max_positions = c, c.vocab_size, c.max_model_len
        self.num_virtual_tokens = model.prefix.tokens if model.prefix is not None else 0
        self.slices = []
        self.adapters = install_adapters(model, adapters or {}, self.slices)
        self.caches = {}  # sequence -> Cache

    @paddle.no_grad()
    def run(self, scheduled: list[ScheduledTokens]) -> np.ndarray:
        """(S, V) float32: the logits after the last token of each."""
        logits = []
        for sequence, start, count in scheduled:
            tokens = sequence.tokens[start : start + count]
            if start == self.num_virtual_tokens:
                self.caches[sequence] = self.model.new_cache(1)  # which begins with the prefix
            prompt = max(0, sequence.num_prompt_tokens - start)
            for part in filter(None, (tokens[:prompt], tokens[prompt:])):
                self.slices[:] = [(sequence.adapter, 0, len(part))]
                ids = kernels.to_tensor(np.array([part], np.int64))
                x = self.model.hidden_states(ids, caches=self.caches[sequence])[:, -1]  # (1, D)
            logits.append(self.model.logits(x).astype("float32").numpy())
        return np.concatenate(logits)

    def fill_prefix(self, sequence: TokenSequence, start: int) -> None:
        """Nothing to do: run() begins each cache with the prefix."""

    def release(self, sequence: TokenSequence) -> None:
        """Forget the keys and values of a sequence; an unknown one is no error."""
        self.caches.pop(sequence, None)


# =================================================================================== the model as exported graphs

STATIC_FORMAT = 2  # of static_config.json


class StaticRunner:
    """The two programs of a folder that export.py wrote with format static, run by paddle.inference.

        runner = StaticRunner("checkpoints/llama_static")
        logits = runner.run(scheduled)               # (S, V) float32: after the last token of each sequence

    The first tokens of a sequence are its whole prompt (with the reply so far, if it was preempted), each later step is
    one token. Keys and values of a sequence stay here until release(sequence); the engine's blocks only count tokens.

    A cache is padded on the left: (B, C, K, Dh) for the keys of every layer, then for the values of every layer, as the
    decode program takes and gives it. While the same sequences come in the same order, its output is its next input.
    Prompts longer than PREFILL_CHUNK go through the decode program in pieces, so that attention scores take at most
    H * PREFILL_CHUNK * T floats; prompts behind a trained prefix do so from the start. Each program holds the weights,
    so memory is twice the file.
    """

    PREFILL_CHUNK = 512  # tokens of one piece of a long prompt
    BATCH_TOKENS = 4096  # tokens of one batch of prompts, padding included
    chunked_prefill = False  # to the engine: a prompt must come whole
    adapters = ()  # a LoRA is in the programs' weights

    def __init__(self, folder: str | Path, device: str = "cpu"):
        self.folder, self.config = Path(folder), _static_config(folder)
        self.vocab_size, self.layers = self.config["vocab_size"], self.config["num_hidden_layers"]
        self.num_virtual_tokens = self.config["prefix_tokens"]  # positions of a trained prefix, before the text's
        self.max_positions = self.config["max_model_len"] + self.num_virtual_tokens
        self.heads = self.config["num_key_value_heads"], self.config["head_dim"]
        self.model_config = ModelConfig.from_dict(self.config["model_config"], self.folder / "static_config.json")
        if self.model_config.position == "rope_2d":
            raise UserError(f"{folder}: static graphs of ChatGLM-6B are not supported; serve the folder it was made of")
        self.prefill_program = self._load("prefill.json", device)
        self.decode_program = self._load("decode.json", device)
        self.caches = {}  # sequence -> (arrays of a batch, its row in them, its number of tokens)
        self.prefix = None
        if self.num_virtual_tokens:
            tensors = read_safetensors(self.folder / "prefix.safetensors")  # {"keys.0": (P, K, Dh), …}
            self.prefix = [tensors[f"{kind}.{i}"] for kind in ("keys", "values") for i in range(self.layers)]

    def _load(self, program, device):
        config = paddle.inference.Config(str(self.folder / program), str(self.folder / "static.pdiparams"))
        kind, _, index = device.partition(":")
        if kind == "gpu":
            config.enable_use_gpu(256, int(index or 0))
        elif kind == "xpu":
            config.enable_xpu()
            config.set_xpu_device_id(int(index or 0))
        elif kind != "cpu":
            config.enable_custom_device(kind, int(index or 0))
        else:
            config.disable_gpu()
            config.disable_mkldnn()  # its float32 products differ from those of training
            config.set_cpu_math_library_num_threads(len(os.sched_getaffinity(0)))
        config.disable_glog_info()
        if self.config["quantization"]:  # folded, the integers would be floats again: 93 MB instead of 22 for the demo
            config.delete_pass("constant_folding_pass")
        try:
            return paddle.inference.create_predictor(config)
        except (ValueError, RuntimeError, OSError) as error:
            versions = f"written by Paddle {self.config['paddle_version']}, this is {paddle.__version__}"
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.folder / program}: cannot be loaded ({versions}): {reason}") from None

    def run(self, scheduled: list[ScheduledTokens]) -> np.ndarray:
        """(S, V) float32: the logits after the last token of each."""
        logits = np.empty((len(scheduled), self.vocab_size), np.float32)
        tokens = [sequence.tokens[start : start + count] for sequence, start, count in scheduled]
        prompts = [i for i, (_, start, _) in enumerate(scheduled) if start == self.num_virtual_tokens]
        steps = [i for i, (_, start, _) in enumerate(scheduled) if start != self.num_virtual_tokens]
        if prompts:
            logits[prompts] = self._prefill([scheduled[i].sequence for i in prompts], [tokens[i] for i in prompts])
        if steps:
            for sequence, start, count in (scheduled[i] for i in steps):
                cached = self.caches[sequence][2]
                assert start == cached and count == 1, f"{count} tokens at {start} after {cached}"
            logits[steps] = self._decode([scheduled[i].sequence for i in steps], [tokens[i][0] for i in steps])
        return logits

    def fill_prefix(self, sequence: TokenSequence, start: int) -> None:
        """Nothing to do: run() puts the prefix before each prompt."""

    def release(self, sequence: TokenSequence) -> None:
        """Forget the keys and values of a sequence; an unknown one is no error."""
        self.caches.pop(sequence, None)

    def _prefill(self, sequences, prompts):
        """Whole prompts, lists of ids -> (S, V) of their last tokens; prompts of similar lengths share a batch."""
        logits = np.empty((len(prompts), self.vocab_size), np.float32)
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first
        while waiting:
            T = len(prompts[waiting[0]])
            is_single = self.prefix is not None or T > self.PREFILL_CHUNK
            batch = waiting[: 1 if is_single else max(1, self.BATCH_TOKENS // T)]
            waiting = waiting[len(batch) :]
            if is_single:
                logits[batch], caches = self._prefill_one(sequences[batch[0]], prompts[batch[0]])
            else:
                logits[batch], caches = self._prefill_batch([sequences[i] for i in batch], [prompts[i] for i in batch])
            for row, i in enumerate(batch):
                self.caches[sequences[i]] = (caches, row, len(prompts[i]) + self.num_virtual_tokens)
        return logits

    def _prefill_batch(self, sequences, prompts):
        """Prompts padded on the left -> (B, V), caches."""
        B, T = len(prompts), max(map(len, prompts))
        ids, lengths = np.zeros((B, T), np.int64), np.array([len(prompt) for prompt in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, T - len(prompt) :] = prompt
        positions = np.maximum(np.arange(T) - (T - lengths[:, None]), 0)  # (B, T)
        return self._call(self.prefill_program, [], sequences, ids, positions, self._mask_rows(lengths, T))

    def _prefill_one(self, sequence, prompt):
        """One prompt in pieces, after the prefix if there is one -> (1, V), caches."""
        caches, start, logits = [], 0, None
        if self.prefix is not None:
            caches = [array[None] for array in self.prefix]  # (1, P, K, Dh)
        while start < len(prompt):
            ids = np.array([prompt[start : start + self.PREFILL_CHUNK]], np.int64)  # (1, T)
            past = start + self.num_virtual_tokens
            positions, total = past + np.arange(ids.shape[1])[None], past + ids.shape[1]
            program = self.decode_program if caches else self.prefill_program
            mask_rows = self._mask_rows(np.array([total]), total)
            logits, caches = self._call(program, caches, [sequence], ids, positions, mask_rows)
            start += ids.shape[1]
        return logits, caches

    def _decode(self, sequences, tokens):
        """One more token of each sequence -> (S, V)."""
        lengths = np.array([self.caches[sequence][2] for sequence in sequences])
        caches = self._batch_caches(sequences, lengths)
        ids, positions = np.array(tokens, np.int64)[:, None], lengths[:, None]  # (B, 1): the prefix has positions too
        mask_rows = self._mask_rows(lengths + 1, caches[0].shape[1] + 1)
        logits, caches = self._call(self.decode_program, caches, sequences, ids, positions, mask_rows)
        for row, sequence in enumerate(sequences):
            self.caches[sequence] = (caches, row, int(lengths[row]) + 1)
        return logits

    def _batch_caches(self, sequences, lengths):
        """The caches of these sequences as one batch padded on the left: the last step's output, if it is that."""
        entries, C = [self.caches[sequence] for sequence in sequences], int(lengths.max())
        last = entries[0][0]
        is_last_batch = all(arrays is last and row == i for i, (arrays, row, _) in enumerate(entries))
        if is_last_batch and last[0].shape[:2] == (len(sequences), C):
            return last
        batched = []
        for layer in range(2 * self.layers):
            batch = np.zeros((len(sequences), C, *self.heads), np.float32)
            for i, (arrays, row, length) in enumerate(entries):
                batch[i, C - length :] = arrays[layer][row, -length:]
            batched.append(batch)
        return batched

    @staticmethod
    def _mask_rows(lengths, T):
        """(B, 1, T, 1) int32 FlashMask rows: the last `length` keys of each row may be seen, the padding may not."""
        is_padding = np.arange(T) < T - lengths[:, None]
        return np.where(is_padding, 0, NO_ROW).astype(np.int32)[:, None, :, None]

    def _call(self, program, caches, sequences, ids, positions, mask_rows):
        """(B, V) float32 and the new caches. A program gets those of the inputs that it has names for."""
        arrays = {"input_ids": ids, "position_ids": positions, "rows": mask_rows}
        lengths = [rope_lengths(self.model_config, s.num_prompt_tokens, at) for s, at in zip(sequences, positions)]
        arrays["lengths"] = None if lengths[0] is None else np.stack(lengths)  # (B, T)
        arrays |= dict(zip((f"{kind}_{i}" for kind in ("keys", "values") for i in range(self.layers)), caches))
        for name in program.get_input_names():
            program.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(arrays[name]))
        program.run()
        logits, *caches = (program.get_output_handle(name).copy_to_cpu() for name in program.get_output_names())
        return logits, caches


def _static_config(folder):
    """static_config.json. UserError where the folder is not complete."""
    path = Path(folder) / "static_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no static_config.json; export.py writes a static export with format: static")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        files, version = dict(config["files"]), config["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged; export again") from None
    if version != STATIC_FORMAT:
        raise UserError(f"{path}: format_version {version}; this serve.py reads {STATIC_FORMAT}; export again")
    for name, size in files.items():
        file = Path(folder) / name
        if not file.is_file() or file.stat().st_size != size:
            state = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
            raise UserError(f"{file}: {state}, {size} were written; export again")
    return config
