"""Two static graphs of a model, which serving/runners.py runs without this code: written, and run to compare.

trace(model, folder)                     # prefill.json, decode.json, static.pdiparams
write_static_config(folder, config, …)   # static_config.json, last
logits = static_logits(folder, ids, mask)

prefill   input_ids (B, T) int64, rows (B, 1, T, 1) int32, position_ids (B, T) int64 -> logits (B, V) of the last
          position, then keys of every layer and values of every layer (B, T, K, Dh)
decode    the same of T new tokens (one, when text is generated), rows (B, 1, C + T, 1), and keys_0… and values_0…
          (B, C, K, Dh) of every layer -> logits (B, V), keys and values (B, C + T, K, Dh)
B, T and C are free. Inputs are padded on the left; rows are 0 where a key is padding, else the largest int32. A
prefix's keys and values are the first C, and positions count on from it. With ALiBi there are no position_ids.
Where rope depends on the length of a text, lengths (B, T) int64 are another input (see positions.rope_lengths).
A graph cannot choose what to compute by values: every expert of a sparse MLP works on every token.
"""

import filecmp
import json
from pathlib import Path

import kernels

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

from families import ModelConfig
from formats.files import atomic_file
from formats.tensor_files import write_safetensors
from model import Cache, CausalLM
from modules.positions import rope_lengths
from serving.runners import STATIC_FORMAT, ScheduledTokens, StaticRunner, TokenSequence


class _GivenRows(Cache):
    """A Cache that takes the mask rows of all keys, old and new, as given."""

    def extend_mask_rows(self, mask_rows, B: int, T: int):
        return mask_rows


class Prefill(nn.Layer):
    """The first program: a prompt, with nothing before it."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids, rows, position_ids=None, lengths=None) -> list[paddle.Tensor]:
        cache = _GivenRows(len(self.model.layers))
        return _last_logits(self.model, input_ids, rows, position_ids, lengths, cache)


class Decode(nn.Layer):
    """The second program: more tokens after those whose keys and values are given."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids, rows, past, position_ids=None, lengths=None) -> list[paddle.Tensor]:
        cache, layers = _GivenRows(len(self.model.layers)), len(self.model.layers)
        cache.keys, cache.values = list(past[:layers]), list(past[layers:])
        return _last_logits(self.model, input_ids, rows, position_ids, lengths, cache)


@paddle.jit.not_to_static  # no branch here depends on values; without it jit rewrites the source: four times as slow
def _last_logits(model, input_ids, rows, position_ids, lengths, cache):
    """[logits (B, V) float32 of the last position, keys of each layer, values of each layer]"""
    cache.lengths = lengths
    position_ids = input_ids if position_ids is None else position_ids  # ALiBi reads no positions
    logits = model.logits(model.hidden_states(input_ids, position_ids, rows, cache)[:, -1])  # (B, V)
    return [logits.astype("float32"), *cache.keys, *cache.values]


def trace(model: CausalLM, folder: Path) -> None:
    """Write prefill.json, decode.json and static.pdiparams, the one file of weights for both programs."""
    config = model.config
    caches = [
        InputSpec([None, None, config.num_key_value_heads, config.head_dim], "float32", f"{kind}_{i}")
        for kind in ("keys", "values")
        for i in range(config.num_hidden_layers)
    ]
    inputs = [InputSpec([None, None], "int64", "input_ids"), InputSpec([None, 1, None, 1], "int32", "rows")]
    positions = []
    if config.position != "alibi":  # jit refuses an input that nothing reads
        positions.append(InputSpec([None, None], "int64", "position_ids"))
    if rope_lengths(config, 1, np.zeros(1)) is not None:
        positions.append(InputSpec([None, None], "int64", "lengths"))
    with kernels.use("reference"):  # the ops of other back ends are not all traceable
        for name, layer, past in (("prefill", Prefill(model), []), ("decode", Decode(model), [caches])):
            layer.eval()
            program = paddle.jit.to_static(layer, input_spec=[*inputs, *past, *positions], full_graph=True)
            paddle.jit.save(program, str(folder / name))
    assert filecmp.cmp(folder / "prefill.pdiparams", folder / "decode.pdiparams", shallow=False), "weights differ"
    (folder / "decode.pdiparams").unlink()
    (folder / "prefill.pdiparams").rename(folder / "static.pdiparams")


def write_static_config(folder: Path, config: ModelConfig, **facts) -> None:
    """Write static_config.json: what StaticRunner needs to know, and the sizes of all other files."""
    description = {
        "format_version": STATIC_FORMAT,
        "paddle_version": paddle.__version__,
        "dtype": "float32",
        "quantization": config.quantization,
        "family": config.family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "model_config": {key: value for key, value in config.source.items() if key != "quantization_config"},
        **facts,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    with atomic_file(folder / "static_config.json") as file:
        json.dump(description, file, indent=2, ensure_ascii=False)


@paddle.no_grad()
def write_prefix(model: CausalLM, path: Path) -> int:
    """Write the prefix's keys and values (P, K, Dh), with which every cache begins; returns P."""
    cache, tensors = model.new_cache(1), {}
    for kind, layers in (("keys", cache.keys), ("values", cache.values)):
        tensors |= {f"{kind}.{i}": array[0].numpy() for i, array in enumerate(layers)}
    write_safetensors(path, tensors)
    return cache.prefix_tokens


def static_logits(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(3, 5, V) float32: as dynamic_logits, by the programs of the folder as the engine runs them."""
    runner, T = StaticRunner(folder), mask.shape[1]
    P, sequences = runner.num_virtual_tokens, []
    for row, length in zip(ids, mask.sum(1)):
        sequences.append(TokenSequence([-1] * P + row[T - length :].tolist(), P + int(length)))
    logits = [runner.run([ScheduledTokens(s, P, s.num_prompt_tokens - P) for s in sequences])]
    for step in range(ids.shape[1] - T):
        logits.append(runner.run([ScheduledTokens(s, s.num_prompt_tokens + step, 1) for s in sequences]))
    return np.stack(logits, axis=1)
