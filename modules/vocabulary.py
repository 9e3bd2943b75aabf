"""Embedding and head as a vocabulary has them: resized for more tokens, untied, found by their published names.

    resize_embeddings(model, 32002, seed=0)      # rows for more tokens, in place
    untie_head(model)                            # a tied head gets weights of its own

Letters: V ids, D width, n new ids.
"""

import dataclasses
import re
import zlib
from pathlib import Path

import numpy as np

from families import ModelConfig, weight_names
from formats.files import UserError
from formats.tensor_files import safetensors_header
from formats.tokenizer import Tokenizer
from model import CausalLM
from modules.layers import Embedding, Linear, set_parameter

NEW_ROW_VARIANCE = 1e-9  # of new rows over that of the old ones, as in transformers' resize_token_embeddings


def embedding_paths(config: ModelConfig) -> tuple[str, str]:
    """Hugging Face's module paths of embedding and head."""
    names = {ours: theirs for ours, theirs, _ in weight_names(config) if not ours.startswith("layers.")}
    return tuple(names[f"{ours}.weight"].removesuffix(".weight") for ours in ("embed_tokens", "lm_head"))


def embedding_layers(model: CausalLM) -> dict[str, tuple]:
    """{Hugging Face module path: (parent layer, attribute, layer)} of embedding and head, where they are here."""
    layers = {}
    for path, attribute in zip(embedding_paths(model.config), ("embed_tokens", "lm_head")):
        layer = getattr(model, attribute)
        if getattr(getattr(layer, "base", layer), "weight", None) is not None:
            layers[path] = (model, attribute, layer)
    return layers


def refuse_sharded(model: CausalLM, what: str) -> None:
    """UserError where tensor or pipeline parallelism shards the model."""
    topology = getattr(model, "topology", None)
    if topology is not None and (topology.tp.size > 1 or topology.pp.size > 1):
        raise UserError(
            f"{what}: not possible with tensor_parallel_degree or pipeline_parallel_degree above 1; use data "
            "parallelism (sharding)"
        )


def untie_head(model: CausalLM) -> None:
    """Give a tied head weights of its own, a copy of the embedding's."""
    if not model.config.tie_word_embeddings:
        return
    refuse_sharded(model, "a head of its own beside a tied embedding")
    table = getattr(model.embed_tokens, "base", model.embed_tokens).weight  # (V, D)
    head = Linear(table.shape[1], table.shape[0], bias=False)
    head.weight.set_value(table.T)
    model.lm_head = head
    source = {**model.config.source, "tie_word_embeddings": False}
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False, source=source)


def resize_embeddings(model: CausalLM, size: int, seed: int = 0) -> None:
    """Give embedding and head rows for `size` ids, in place; rows of the old ids are kept.

    New rows are drawn as transformers' resize_token_embeddings draws them, from a normal distribution with the mean of
    the old rows and 1e-9 of their covariance, here from (seed, name) alone.
    """
    refuse_sharded(model, "more ids than the model has")
    for path, (parent, attribute, layer) in embedding_layers(model).items():
        is_head = isinstance(layer, Linear)
        old = layer.weight.astype("float32").numpy()
        rows = grown(old.T if is_head else old, size, [seed, zlib.crc32(path.encode())])
        D = rows.shape[1]
        larger = Linear(D, size, bias=layer.bias is not None) if is_head else Embedding(size, D)
        set_parameter(larger.weight, rows.T if is_head else rows)
        if is_head and layer.bias is not None:
            added = np.zeros(size - len(layer.bias), np.float32)
            set_parameter(larger.bias, np.concatenate([layer.bias.numpy(), added]))
        for new, before in zip(larger.parameters(), layer.parameters()):
            new.stop_gradient = before.stop_gradient
        setattr(parent, attribute, larger)
    model.config, model.resized = dataclasses.replace(model.config, vocab_size=size), True


def grown(rows: np.ndarray, size: int, seed: list[int]) -> np.ndarray:
    """(V, D) -> (size, D): the old rows, then mean + sqrt(1e-9 / V) · z (rows - mean), z standard normal (n, V)."""
    V, mean = len(rows), rows.mean(0, dtype=np.float64)
    if size < V:
        raise UserError(f"the model has {V} ids already; {size} is less")
    new = np.tile(mean, (size - V, 1))
    generator = np.random.default_rng(seed)
    for start in range(0, V, 65536):  # in parts: z would have n · V elements
        part = rows[start : start + 65536]
        new += generator.standard_normal((size - V, len(part))) @ (part - mean) * np.sqrt(NEW_ROW_VARIANCE / V)
    return np.concatenate([rows, new.astype(np.float32)])


def stored_rows(model: CausalLM, adapter: str | Path) -> int:
    """Rows of the embedding that an adapter's file holds; 0: it holds none."""
    file = Path(adapter) / "adapter_model.safetensors"
    pattern = (
        rf"base_model\.model\.{re.escape(embedding_paths(model.config)[0])}\.(token_adapter\.)?(base_layer\.)?weight"
    )
    entries = safetensors_header(file).items() if file.is_file() else ()
    return max((entry.shape[0] for name, entry in entries if re.fullmatch(pattern, name)), default=0)


def check_vocabulary(model: CausalLM, tokenizer: Tokenizer, path: str, args: object = None) -> None:
    """UserError if the tokenizer has ids that the model's embedding has no row for, unless the arguments ask for rows.

    args: of a script that trains; with add_tokens, add_special_tokens or resize_vocab the model is resized.
    """
    old, size = model.config.vocab_size, tokenizer.vocab_size
    asked = any(getattr(args, key, None) for key in ("add_tokens", "add_special_tokens", "resize_vocab"))
    lora_path = getattr(args, "lora_path", None)
    if not asked and lora_path and stored_rows(model, lora_path) >= size > old:  # the adapter brings the rows
        resize_embeddings(model, size)
        old = size
    if asked and getattr(args, "prefix_tuning", False):
        raise UserError("prefix_tuning: a prefix does not train the rows of new tokens; use lora: true, or all weights")
    if size > old and not asked:
        raise UserError(
            f"{path}: vocab_size {old} in config.json, but the tokenizer has {size} ids; they belong to different "
            "models, or tokens were added: resize_vocab: true (or add_tokens) in finetune.py or dpo.py gives them rows"
        )
    model.new_ids = sorted({*tokenizer.new_ids, *range(old, size)}) if asked else []
    if size > old:
        resize_embeddings(model, size, args.seed)
        print(f"vocabulary: {size - old} rows added to embedding and head, now {size}")
