"""Scheduled tokens -> logits: a paged model, or a static graph."""

import collections
import functools
import itertools
import json
import os
from pathlib import Path

import kernels

import numpy as np
import paddle

from adapters import LoRALinear, load_adapter, lora_layers
from families import ModelConfig
from formats.files import UserError
from formats.tensor_files import read_safetensors
from model import KVCache, MoE, block_linears
from positions import NO_ROW as NEVER
from positions import glm_positions_of_prompt, rope_cache_key, rope_lengths

# ================================================================== 6. the model on a pool of blocks


class AdapterLinear(paddle.nn.Layer):
    """A linear and LoRAs around it: each applied to its own slice of the step's tokens."""

    def __init__(self, base, loras, slices):
        super().__init__()
        self.base, self.by_name, self.loras = base, dict(loras), paddle.nn.LayerList(loras.values())
        self.slices = slices  # [(adapter name or None, first token, end)], the runner's list, set before each step

    def forward(self, x, residual=None):
        """x (1, N, in) -> (1, N, out), residual added if given"""
        layers = [(self.by_name.get(name, self.base), a, b) for name, a, b in self.slices]
        if len(layers) == 1:
            return layers[0][0](x, residual)
        y = paddle.concat([layer(x[:, a:b]) for layer, a, b in layers], axis=1)
        return y if residual is None else residual + y


class PagedRunner(KVCache):
    """Computes chunks with model.py and keeps their keys and values in blocks.

    run(chunks) -> (chunks, V) float32 numpy: the logits after each chunk's last token. The tokens of all chunks are one
    row of the model; only attention knows sequences, through attend(). A token is rotated as model.generate does it, for the
    length of its prompt and, with dynamic rope, of the reply up to it; so are those that are computed again.

    With two positions (rope_2d) the tokens of a prompt see those behind them as well: it must come whole, and its blocks
    are like no other prompt's.
    """

    def __init__(self, model, num_blocks, block_size, adapters=None, int8=False):
        model.eval()
        c, self.model, self.block_size = model.config, model, block_size
        self.config, self.vocab_size, self.max_positions = c, c.vocab_size, c.max_model_len
        self.chunked = c.position != "rope_2d"  # a prompt may come in pieces, and share blocks
        self.prefix_tokens = 0  # of the text's positions: they are given with the virtual tokens counted
        self.num_virtual_tokens = model.prefix.tokens if model.prefix is not None else 0
        shape = [num_blocks, block_size, c.num_key_value_heads, c.head_dim]
        kind, layers = "int8" if int8 else "float32", range(c.num_hidden_layers)
        self.pools = [(paddle.zeros(shape, kind), paddle.zeros(shape, kind)) for _ in layers]  # keys, values of a layer
        self.scales = [(paddle.zeros(shape[:3]), paddle.zeros(shape[:3])) if int8 else (None, None) for _ in layers]
        self.slices = []
        self.adapters = self._load_adapters(adapters or {})
        # Of the step being computed:
        self.slots = self.tables = self.query_lengths = self.context_lengths = self.lengths = None
        self.full_prompts = []  # prompts whose attention is not causal: (first, end, slots, rows)
        self.decode_rows = self.output_order = (
            None  # the other tokens with their tables and lengths; where each token's output is
        )
        self.last_positions = {}  # sequence -> (2,) of its prompt's last token, for rope_2d

    @staticmethod
    def block_bytes(config, block_size, int8=False):
        of_head = config.head_dim + 4 if int8 else 4 * config.head_dim
        return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * of_head

    def hash_seed(self, prompt):
        """What keys and values depend on besides the tokens, where a prompt has so many."""
        return rope_cache_key(self.config, prompt)

    def _load_adapters(self, paths):
        """{name: folder} -> names. Their LoRALinears share the one base layer."""
        found = collections.defaultdict(dict)  # module path -> {name: LoRALinear}
        for name, path in paths.items():
            load_adapter(self.model, path)
            if self.model.prefix is not None:
                raise UserError(f"lora_path: {path} holds a prefix; give it as prefix_path")
            for module, layer in lora_layers(self.model).items():
                found[module][name] = layer
            for parent, attribute, layer in block_linears(self.model).values():
                if isinstance(layer, LoRALinear):
                    setattr(parent, attribute, layer.base)
        for module, (parent, attribute, base) in block_linears(self.model).items():
            if module in found:
                setattr(parent, attribute, AdapterLinear(base, found[module], self.slices))
        for mlp in self.model.sublayers():
            layers = mlp.experts.sublayers() if isinstance(mlp, MoE) else ()
            if any(isinstance(layer, AdapterLinear) for layer in layers):
                mlp.dispatch_and_combine = functools.partial(self._mix_slices, mlp)
        self.model.eval()
        return list(paths)

    def _mix_slices(self, mlp, flat, weights, chosen, layout=None):
        """MoE.dispatch_and_combine, one adapter's tokens after another's: inside, tokens stand in the order of their experts."""
        slices, mixed = list(self.slices), []
        for name, first, end in slices:
            self.slices[:] = [(name, first, end)]
            mixed.append(MoE.dispatch_and_combine(mlp, *(x[first:end] for x in (flat, weights, chosen))))
        self.slices[:] = slices
        return paddle.concat(mixed)

    @paddle.no_grad()
    def run(self, chunks):
        order = list(range(len(chunks)))
        if self.adapters:  # each adapter's tokens become one slice
            order.sort(key=lambda i: chunks[i].sequence.request.adapter or "")
            self._set_slices([chunks[i] for i in order])
        ordered = [chunks[i] for i in order]
        ids = self._prepare(ordered)
        x = self.model.hidden_states(ids, self.positions, caches=self)[0]  # (N, D)
        if len(chunks) < x.shape[0]:
            x = paddle.gather(x, kernels.to_tensor(self.query_lengths.cumsum() - 1))  # (chunks, D)
        logits = self.model.logits(x).astype("float32").numpy()
        return logits[np.argsort(order)] if self.adapters else logits

    def _prepare(self, chunks):
        """Ids (1, N), and on self the positions (1, N), slots (N,), block tables and lengths of the step."""
        size, counts = self.block_size, [chunk.count for chunk in chunks]
        starts = np.array([chunk.start for chunk in chunks])
        self.query_lengths = np.array(counts)
        self.context_lengths = starts + self.query_lengths
        self.tables = np.zeros((len(chunks), -(-int(self.context_lengths.max()) // size)), np.int32)
        ids = []
        for row, chunk in enumerate(chunks):
            end = chunk.start + chunk.count
            ids += chunk.sequence.tokens[chunk.start : end]
            blocks = chunk.sequence.blocks[: -(-end // size)]
            self.tables[row, : len(blocks)] = blocks
        for array in (self.tables, self.query_lengths, self.context_lengths):
            array.flags.writeable = False  # so that the layers after the first know them again
        rows = np.repeat(np.arange(len(chunks)), counts)
        firsts = np.repeat(self.query_lengths.cumsum() - counts, counts)
        positions = np.arange(len(ids)) - firsts + starts[rows]
        self.slots = kernels.to_tensor(self.tables[rows, positions // size].astype(np.int64) * size + positions % size)
        ends = [chunk.sequence.num_prompt_tokens for chunk in chunks]
        lengths = [rope_lengths(self.config, end, positions[rows == row]) for row, end in enumerate(ends)]
        self.lengths = None if lengths[0] is None else kernels.to_tensor(np.concatenate(lengths)[None])
        if not self.chunked:
            positions = self._glm_positions(chunks)  # (N, 2)
        self.positions = kernels.to_tensor(positions[None])
        return kernels.to_tensor(np.array([ids], np.int64))

    def _glm_positions(self, chunks):
        """(N, 2) of all tokens; `full_prompts` are the prompts among the chunks, with the replies that they had before."""
        self.full_prompts, found, end = [], [], 0
        for row, (sequence, start, count) in enumerate(chunks):
            end += count
            if start > self.num_virtual_tokens:
                step = start - sequence.num_prompt_tokens + 1
                found.append(self.last_positions[sequence] + np.array([[0, step]]))
                continue
            prompt, context = (
                sequence.num_prompt_tokens - self.num_virtual_tokens,
                np.arange(self.num_virtual_tokens + count),
            )
            positions, rows = glm_positions_of_prompt(self.config, sequence.tokens[self.num_virtual_tokens :], prompt)
            self.last_positions[sequence] = positions[prompt - 1]
            seen = np.broadcast_to(
                np.array([NEVER, 0], np.int32), (1, 1, self.num_virtual_tokens, 2)
            )  # the prefix, by every row
            rows = np.concatenate([seen, rows + np.minimum(self.num_virtual_tokens, NEVER - rows)], axis=2)
            blocks = self.tables[row, context // self.block_size].astype(np.int64)
            slots = blocks * self.block_size + context % self.block_size
            self.full_prompts.append((end - count, end, kernels.to_tensor(slots), kernels.to_tensor(rows)))
            found.append(positions)
        whole = np.array([chunk.start == self.num_virtual_tokens for chunk in chunks])
        at, firsts = np.arange(end), self.query_lengths.cumsum() - self.query_lengths
        order = np.concatenate([at[first:stop] for first, stop, *_ in self.full_prompts] + [firsts[~whole]])
        self.output_order, self.decode_rows = kernels.to_tensor(order.argsort()), None
        if not whole.all():
            arrays = [array[~whole] for array in (self.tables, self.query_lengths, self.context_lengths)]
            for array in arrays:
                array.flags.writeable = False
            self.decode_rows = kernels.to_tensor(firsts[~whole]), *arrays
        return np.concatenate(found)

    def _set_slices(self, chunks):
        self.slices.clear()
        end = 0
        for name, group in itertools.groupby(chunks, lambda chunk: chunk.sequence.request.adapter):
            first, end = end, end + sum(chunk.count for chunk in group)
            self.slices.append((name, first, end))

    def attend(self, layer, q, k, v, *, mask_rows=None, scale=None, **options):
        """q (1, N, H, Dh), k and v (1, N, K, Dh) -> (1, N, H, Dh): keeps k and v, then reads the sequences' blocks.

        scale and options (window, softcap, alibi_slopes) are those of kernels.paged_attention, which makes the masks.
        """
        pool, scales = self.pools[layer], self.scales[layer]
        kernels.write_cache(k[0], v[0], *pool, self.slots, *scales)
        if self.full_prompts:
            return self._attend_two_ways(q, pool, scales, scale, options)
        out = kernels.paged_attention(
            q[0], *pool, self.tables, self.query_lengths, self.context_lengths, scale, *scales, **options
        )
        return out.unsqueeze(0)

    def _attend_two_ways(self, q, pool, scales, scale, options):
        """attend() of a step with whole prompts, each by itself under its mask, and with tokens of replies."""
        parts, flat = [], [part.reshape([-1, *part.shape[2:]]) for part in pool]  # (slots, K, Dh)
        for first, end, slots, rows in self.full_prompts:
            k, v = (paddle.gather(part, slots) for part in flat)
            if scales[0] is not None:
                of_slots = (paddle.gather(s.reshape([-1, s.shape[2]]), slots).unsqueeze(-1) for s in scales)
                k, v = (x.astype("float32") * s for x, s in zip((k, v), of_slots))
            more = {key: value for key, value in options.items() if key != "window"}  # which no such model has
            found = kernels.attention(q[:, first:end], k.unsqueeze(0), v.unsqueeze(0), rows, False, scale, **more)
            parts.append(found[0])
        if self.decode_rows is not None:
            at, *lengths = self.decode_rows
            parts.append(kernels.paged_attention(paddle.gather(q[0], at), *pool, *lengths, scale, *scales, **options))
        return paddle.gather(paddle.concat(parts), self.output_order).unsqueeze(0)

    @paddle.no_grad()
    def fill_prefix(self, sequence, start):
        """Write the trained prefix's keys and values from virtual token `start` on into the sequence's blocks."""
        prefix, size = self.model.prefix, self.block_size
        table = prefix.table().reshape([prefix.tokens, prefix.layers, 2, prefix.heads, prefix.head_dim])[start:]
        at = np.arange(start, prefix.tokens)
        slots = kernels.to_tensor(np.array(sequence.blocks)[at // size] * size + at % size)
        for layer in range(prefix.layers):
            kernels.write_cache(table[:, layer, 0], table[:, layer, 1], *self.pools[layer], slots, *self.scales[layer])

    def release(self, sequence):
        """The blocks are the engine's."""
        self.last_positions.pop(sequence, None)


# ================================================================== 7. the model as an exported graph

STATIC_FORMAT = 2  # of static_config.json, as export.py writes it


class StaticRunner:
    """The two programs of a folder that export.py wrote with format static, run by paddle.inference.

        runner = StaticRunner("checkpoints/llama_static")
        logits = runner.run(chunks)          # (len(chunks), V) float32: of the last token of each chunk

    Takes PagedRunner's place in the engine: chunks as there, but the first of a sequence is its whole prompt (what the
    engine preempted comes again with all its tokens) and each later one is a token. Keys and values of a sequence stay here
    until release(sequence); the engine's blocks only count them.

    A cache is padded on the left, (B, C, K, Dh) a layer and once for keys, once for values, as the decode program takes
    and gives it; while the same sequences come in the same order, its output is its next input. Prompts longer than
    CHUNK go through the decode program piece by piece, so that scores take H * CHUNK * T floats at most, and prompts
    behind a trained prefix do from the start. Each program holds the weights, so memory is twice the file.
    """

    CHUNK = 512  # tokens of one piece of a long prompt
    BATCH_TOKENS = 4096  # tokens of one batch of prompts, padding included
    chunked = False  # a prompt must come whole
    adapters = ()  # what LoRA there was is in the programs' weights

    def __init__(self, folder, device="cpu"):
        self.folder, self.config = Path(folder), _static_config(folder)
        self.vocab_size, self.layers = self.config["vocab_size"], self.config["num_hidden_layers"]
        self.num_virtual_tokens = self.config["prefix_tokens"]  # positions of a trained prefix, before the text's
        self.max_positions = self.config["max_model_len"] + self.num_virtual_tokens
        self.heads = self.config["num_key_value_heads"], self.config["head_dim"]
        self.model_config = ModelConfig.from_dict(self.config["model_config"], self.folder / "static_config.json")
        self.is_2d_rope = self.model_config.position == "rope_2d"
        self.piece = (
            self.max_positions if self.is_2d_rope else self.CHUNK
        )  # there a prompt's tokens see those behind them
        self.prefill_program = self._load("prefill.json", device)
        self.decode_program = self._load("decode.json", device)
        self.caches_of = {}  # sequence -> (caches, its row in them, its tokens)
        self.last_positions = {}  # sequence -> (2,) of its prompt's last token, where there are two
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

    def run(self, chunks):
        """[chunk] -> (len(chunks), V) float32."""
        logits = np.empty((len(chunks), self.vocab_size), np.float32)
        tokens = [chunk.sequence.tokens[chunk.start : chunk.start + chunk.count] for chunk in chunks]
        prompts = [i for i, chunk in enumerate(chunks) if chunk.start == self.num_virtual_tokens]
        steps = [i for i, chunk in enumerate(chunks) if chunk.start != self.num_virtual_tokens]
        if prompts:
            logits[prompts] = self.prefill([chunks[i].sequence for i in prompts], [tokens[i] for i in prompts])
        if steps:
            for i in steps:
                held = self.caches_of[chunks[i].sequence][2]
                assert chunks[i].start == held and chunks[i].count == 1, (
                    f"{chunks[i].count} tokens at {chunks[i].start} after {held}"
                )
            logits[steps] = self.decode([chunks[i].sequence for i in steps], [tokens[i][0] for i in steps])
        return logits

    def fill_prefix(self, sequence, start):
        """Nothing to do yet: prefill() puts the prefix before each prompt."""

    def release(self, sequence):
        """Forget the keys and values of a sequence; one that is not known is no error."""
        self.caches_of.pop(sequence, None)
        self.last_positions.pop(sequence, None)

    def prefill(self, sequences, prompts):
        """Whole prompts, lists of ids -> (S, V) float32 of their last tokens; prompts of like length share a batch."""
        logits = np.empty((len(prompts), self.vocab_size), np.float32)
        batch, waiting = [], sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first
        while waiting:
            T = len(prompts[waiting[0]])
            alone = self.prefix is not None or T > self.piece
            batch = waiting[: 1 if alone else max(1, self.BATCH_TOKENS // T)]
            waiting = waiting[len(batch) :]
            if alone:
                logits[batch], caches = self._prefill_one(sequences[batch[0]], prompts[batch[0]])
            else:
                logits[batch], caches = self._prefill_batch([sequences[i] for i in batch], [prompts[i] for i in batch])
            for row, i in enumerate(batch):
                self.caches_of[sequences[i]] = (caches, row, len(prompts[i]) + self.num_virtual_tokens)
        return logits

    def _prefill_batch(self, sequences, prompts):
        """Prompts padded on the left -> (B, V), caches."""
        B, T = len(prompts), max(map(len, prompts))
        ids, lengths = np.zeros((B, T), np.int64), np.array([len(prompt) for prompt in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, T - len(prompt) :] = prompt
        at = np.maximum(np.arange(T) - (T - lengths[:, None]), 0)
        places = at, self._rows(lengths, T)
        if self.is_2d_rope:
            places = self._glm_positions(sequences, prompts, T)
        return self._call(self.prefill_program, [], ids, *places, self._lengths(sequences, at))

    def _prefill_one(self, sequence, prompt):
        """One prompt, after the prefix if there is one, piece by piece -> (1, V), caches."""
        caches, start, logits = [], 0, None
        if self.prefix is not None:
            caches = [array[None] for array in self.prefix]  # (1, P, K, Dh)
        while start < len(prompt):
            ids = np.array([prompt[start : start + self.piece]], np.int64)  # (1, T)
            before = start + self.num_virtual_tokens
            at, total = before + np.arange(ids.shape[1])[None], before + ids.shape[1]
            places = at, self._rows(np.array([total]), total)
            if self.is_2d_rope:
                places = self._glm_positions([sequence], [prompt], len(prompt))
            program = self.decode_program if caches else self.prefill_program
            logits, caches = self._call(program, caches, ids, *places, self._lengths([sequence], at))
            start += ids.shape[1]
        return logits, caches

    def decode(self, sequences, tokens):
        """One more token of each sequence -> (S, V) float32."""
        lengths = np.array([self.caches_of[sequence][2] for sequence in sequences])
        caches = self._gather(sequences, lengths)
        ids, positions = np.array(tokens, np.int64)[:, None], lengths[:, None]  # (B, 1): the prefix has positions too
        rows = self._rows(lengths + 1, caches[0].shape[1] + 1)
        places = positions, rows
        if self.is_2d_rope:
            steps = [[0, n - sequence.num_prompt_tokens + 1] for n, sequence in zip(lengths, sequences)]
            places = np.stack([self.last_positions[s] for s in sequences])[:, None] + np.array(steps)[:, None]
            places = places, np.concatenate([rows, np.zeros_like(rows)], axis=-1)
        logits, caches = self._call(self.decode_program, caches, ids, *places, self._lengths(sequences, positions))
        for row, sequence in enumerate(sequences):
            self.caches_of[sequence] = (caches, row, int(lengths[row]) + 1)
        return logits

    def _lengths(self, sequences, positions):
        """(B, T): the lengths of rope_lengths() for tokens at these positions (B, T); None where rope takes none."""
        found = [rope_lengths(self.model_config, s.num_prompt_tokens, at) for s, at in zip(sequences, positions)]
        return None if found[0] is None else np.stack(found)

    def _glm_positions(self, sequences, texts, T):
        """Positions (B, T, 2) and rows (B, 1, virtual + T, 2) of whole texts padded on the left, behind the prefix."""
        positions, before = np.zeros((len(texts), T, 2), np.int64), self.num_virtual_tokens
        rows = np.zeros((len(texts), 1, before + T, 2), np.int32)
        rows[:, :, :before, 0] = NEVER
        for i, (sequence, text) in enumerate(zip(sequences, texts)):
            prompt, first = sequence.num_prompt_tokens - before, T - len(text)
            positions[i, first:], own = glm_positions_of_prompt(self.model_config, text, prompt)
            self.last_positions[sequence] = positions[i, first + prompt - 1]
            rows[i, :, before + first :] = own[0] + np.minimum(before + first, NEVER - own[0])
        return positions, rows

    def _gather(self, sequences, lengths):
        """The caches of these sequences as one batch, padded on the left: what the last step gave, if it still fits."""
        caches_of, C = [self.caches_of[sequence] for sequence in sequences], int(lengths.max())
        held = caches_of[0][0]
        if all(caches is held and row == i for i, (caches, row, _) in enumerate(caches_of)) and held[0].shape[:2] == (
            len(sequences),
            C,
        ):
            return held
        gathered = []
        for layer in range(2 * self.layers):
            batch = np.zeros((len(sequences), C, *self.heads), np.float32)
            for i, (caches, row, length) in enumerate(caches_of):
                batch[i, C - length :] = caches[layer][row, -length:]
            gathered.append(batch)
        return gathered

    def _rows(self, lengths, T):
        """(B, 1, T, 1) int32 FlashMask rows: the last `length` keys of each row may be seen, the padding may not."""
        padded = np.arange(T) < T - lengths[:, None]
        return np.where(padded, 0, NEVER).astype(np.int32)[:, None, :, None]

    def _call(self, program, caches, ids, positions, rows, lengths):
        """(B, V) float32 and the caches, keys of all layers before values. A program takes of the inputs what it has names for."""
        arrays = {"input_ids": ids, "position_ids": positions, "rows": rows, "lengths": lengths}
        arrays |= dict(zip((f"{kind}_{i}" for kind in ("keys", "values") for i in range(self.layers)), caches))
        for name in program.get_input_names():
            program.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(arrays[name]))
        program.run()
        logits, *caches = (program.get_output_handle(name).copy_to_cpu() for name in program.get_output_names())
        return logits, caches


def _static_config(folder):
    """static_config.json, after a look at whether the folder is whole."""
    path = Path(folder) / "static_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no static_config.json; a static export is written by export.py with format: static")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        files, version = dict(config["files"]), config["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; export again") from None
    if version != STATIC_FORMAT:
        raise UserError(f"{path}: format_version {version}; this serve.py reads {STATIC_FORMAT}; export again")
    for name, size in files.items():
        found = (Path(folder) / name).stat().st_size if (Path(folder) / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{Path(folder) / name}: {state}, {size} were written; export again")
    return config
