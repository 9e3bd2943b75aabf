"""A model and its tokenizer -> a GGUF file for llama.cpp, Ollama and LM Studio, with an Ollama Modelfile.

    write_model(path, model, tokenizer, "Q4_K_M", name="my model")
    rounded = round_model(model, "Q4_K_M")        # in place: the weights that the file stands for
    write_modelfile(folder, "model.gguf", model, tokenizer)

What a file cannot say is refused by name: another family, rope, tokenizer or maths than llama.cpp has.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from families import ModelConfig
from formats.bpe import GPT2_WORDS, SPACE
from formats.chat import JinjaTemplate
from formats.chat_formats import JINJA_FILE
from formats.files import UserError, atomic_file, read_json
from formats.gguf import _GLOBAL, ARCHITECTURES, Architecture, permute, write_gguf
from formats.gguf_blocks import block_size, decode, encode
from formats.gguf_folder import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    gemma2_scalar,
    llama3_factors,
)
from formats.tokenizer import Tokenizer
from formats.weights import Weight, named_weights
from model import CausalLM, set_parameter

FILE_TYPES = {  # our key: (general.file_type of llama.cpp, the type of most matrices)
    "F32": (0, "F32"), "F16": (1, "F16"), "BF16": (32, "BF16"), "Q8_0": (7, "Q8_0"), "Q6_K": (18, "Q6_K"),
    "Q5_0": (8, "Q5_0"), "Q5_1": (9, "Q5_1"), "Q4_0": (2, "Q4_0"), "Q4_1": (3, "Q4_1"), "Q4_K_S": (14, "Q4_K"),
    "Q4_K_M": (15, "Q4_K"),
}  # fmt: skip
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # for rows that are not whole blocks of 256, as llama.cpp has it
FAMILIES = {  # ours: key of ARCHITECTURES
    "llama": "llama", "mistral": "llama", "mixtral": "llama/moe", "qwen2": "qwen2", "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2",
}  # fmt: skip


# ======================================================================================================= tensors


def gguf_name(name: str, row: Architecture) -> str | None:
    """Hugging Face's name of a weight -> llama.cpp's, "{e}" dropped; None: there is no place for it."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem):
        layer = re.sub(r"\.experts\.\d+\.", ".experts.{e}.", match[2])
        theirs = next((gguf for gguf, hf in row.names.items() if hf == layer), None)
        return None if theirs is None else f"blk.{match[1]}.{theirs}.{kind}"
    theirs = next((gguf for gguf, hf in _GLOBAL.items() if hf == stem), None)
    return None if theirs is None else f"{theirs}.{kind}"


def tensor_type(name: str, shape: list[int], file_type: str, config: ModelConfig) -> str:
    """The block type of a tensor: vectors and routers stay float32, the head is finer, as llama.cpp chooses."""
    _, kind = FILE_TYPES[file_type]
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    is_head = name == ("token_embd.weight" if config.tie_word_embeddings else "output.weight")
    if kind.startswith(("Q4", "Q5")) and is_head:
        kind = "Q6_K"
    if file_type == "Q4_K_M" and name.startswith("blk."):
        layer, L = int(name.split(".")[1]), config.num_hidden_layers
        is_important = layer < L // 8 or layer >= 7 * L // 8 or (layer - L // 8) % 3 == 2
        if is_important and re.search(r"attn_v|ffn_down", name):
            kind = "Q6_K"
    if shape[-1] % block_size(kind):
        kind = FALLBACK.get(kind, kind)
    return "F16" if shape[-1] % block_size(kind) else kind


def _checked_config(config: ModelConfig) -> str:
    """The key of ARCHITECTURES; UserError for what llama.cpp would compute in another way."""
    if config.family not in FAMILIES:
        raise UserError(f"format: gguf is not supported for {config.family}; supported are {', '.join(FAMILIES)}")
    if config.quantization is not None:
        raise UserError(
            "format: gguf: integers of another layout would be rounded again; add dequantize: true to do so"
        )
    problems = []
    if config.rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        problems.append(f"rope_type {config.rope['rope_type']!r}")
    if config.rotary_dim not in (0, config.head_dim):
        problems.append(f"rotary dims of a part of a head ({config.rotary_dim} of {config.head_dim})")
    if config.family in ("qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2") and config.attention_bias:
        problems.append(f"biases in the attention of {config.family}")
    if config.activation not in (("gelu_tanh",) if config.family.startswith("gemma") else ("silu",)):
        problems.append(f"the activation {config.activation}")
    if config.family == "gemma2":
        if abs(config.attention_scale - gemma2_scalar(_values(config)) ** -0.5) > 1e-6:
            problems.append(f"query_pre_attn_scalar {config.source.get('query_pre_attn_scalar')}")
        if any((window is None) != (i % 2 == 1) for i, window in enumerate(config.windows)):
            problems.append("other layer_types than a sliding and a full one by turns")
    if config.experts is not None and config.family != "mixtral":
        normalizes = bool(config.source.get("norm_topk_prob"))
        if normalizes != (config.family == "qwen3_moe"):
            problems.append(f"norm_topk_prob {normalizes}")
        if config.source.get("mlp_only_layers") or config.source.get("decoder_sparse_step", 1) != 1:
            problems.append("layers without experts")
    if problems:
        raise UserError(f"format: gguf: llama.cpp has no {problems[0]} for {config.family}")
    return FAMILIES[config.family]


def _tensors(model: CausalLM) -> dict[str, tuple[Callable, list[int], list[Weight]]]:
    """{llama.cpp's name: (function that returns it, shape, the weights that it is made of)}."""
    config, row = model.config, ARCHITECTURES[_checked_config(model.config)]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    groups: dict[str, list[Weight]] = {}
    for weight in named_weights(model):
        name = gguf_name(weight.name, row)
        if name is None:
            raise UserError(f"format: gguf: llama.cpp has no place for {weight.name} of {config.family}")
        groups.setdefault(name, []).append(weight)
    result = {}
    for name, weights in groups.items():
        which, shape = name.split(".")[-2], weights[0].shape
        if which.endswith("_exps"):
            result[name] = (lambda w=weights: np.stack([one.to_numpy() for one in w])), [len(weights), *shape], weights
        elif row.permuted and which in heads:
            result[name] = (lambda w=weights[0], h=heads[which]: permute(w.to_numpy(), h)), shape, weights
        elif row.norm_offset and which.endswith("norm"):
            result[name] = (lambda w=weights[0]: w.to_numpy() + np.float32(row.norm_offset)), shape, weights
        elif which == "ffn_gate_inp_shexp":
            result[name] = (lambda w=weights[0]: w.to_numpy()[0]), shape[1:], weights
        else:
            result[name] = weights[0].to_numpy, shape, weights
    return result


def write_model(path: Path, model: CausalLM, tokenizer: Tokenizer, file_type: str, name: str) -> None:
    """Write a model as one GGUF file, one tensor in memory at a time."""
    config, tensors = model.config, {}
    if config.rope["rope_type"] == "llama3":
        factors = llama3_factors(config.rope, config.head_dim)
        tensors["rope_freqs.weight"] = (lambda: factors), list(factors.shape), "F32"
    for tensor, (function, shape, _) in _tensors(model).items():
        tensors[tensor] = function, shape, tensor_type(tensor, shape, file_type, config)
    about = {
        "general.architecture": FAMILIES[config.family].partition("/")[0],
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[file_type][0],
    }
    write_gguf(path, about | _config_metadata(config) | tokenizer_metadata(tokenizer, config.vocab_size), tensors)


def round_model(model: CausalLM, file_type: str) -> None:
    """Round every weight in place to what the file of this type holds. (Blocks run along rows, which permute() keeps
    whole, and experts are rounded one by one.)"""
    for name, (_, shape, weights) in _tensors(model).items():
        kind = tensor_type(name, shape, file_type, model.config)
        for weight in weights if kind != "F32" else ():
            array = weight.to_numpy()
            rounded = decode(encode(array, kind), kind).reshape(array.shape)
            set_parameter(weight.parameter, weight.from_numpy(rounded))


# ====================================================================================================== metadata


def _values(config: ModelConfig) -> dict:
    """Metadata of the architecture, without its name before the keys."""
    windows = [window for window in config.windows if window]
    context = config.max_position_embeddings
    if windows and config.family != "gemma2":  # llama.cpp has no window here: within one, nothing is lost
        context = min(context, *windows)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope["rope_theta"]),
    }


def _config_metadata(config: ModelConfig) -> dict:
    kind, values, rope = FAMILIES[config.family].partition("/")[0], _values(config), config.rope
    if rope["rope_type"] in ("linear", "yarn"):
        values["rope.scaling.type"], values["rope.scaling.factor"] = rope["rope_type"], float(rope["factor"])
        if (original := rope.get("original_max_position_embeddings")) is not None:
            values["rope.scaling.original_context_length"] = original
    if config.experts is not None:
        values["expert_count"] = config.experts.num_experts
        values["expert_used_count"] = config.source["num_experts_per_tok"]
        if config.family != "mixtral":
            values["expert_feed_forward_length"] = config.source["moe_intermediate_size"]
        if (shared := config.source.get("shared_expert_intermediate_size")) is not None:
            values["expert_shared_feed_forward_length"] = shared
    if config.family == "gemma2":
        values["attn_logit_softcapping"] = float(config.attention_softcap)
        values["final_logit_softcapping"] = float(config.final_softcap)
        values["attention.sliding_window"] = config.source["sliding_window"]
    return {f"{kind}.{key}": value for key, value in values.items()}


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """tokenizer.ggml.* and the chat template. Ids beyond the tokenizer's are tokens that no text has."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types, result = [UNUSED] * vocab_size, {}
    fill = {"sentencepiece": _sentencepiece, "json": _byte_pairs, "merges": _byte_pairs, "tiktoken": _byte_pairs}
    if tokenizer.kind not in fill:
        raise UserError(f"{tokenizer.folder}: format: gguf has no tokenizer of the kind {tokenizer.kind}")
    result |= fill[tokenizer.kind](tokenizer, tokens, types)
    for text, i in tokenizer.added.items():
        if i < vocab_size:
            tokens[i], types[i] = text, CONTROL if text in tokenizer.special else USER_DEFINED
    if tokenizer.unk_token_id is not None and result["tokenizer.ggml.model"] == "llama":
        types[tokenizer.unk_token_id] = UNKNOWN
    result |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    stops = tokenizer.stop_ids
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in stops or not stops else stops[0]
    others = [stop for stop in stops if stop != eos]
    ids = {"bos": tokenizer.bos_token_id, "eos": eos, "eot": others[0] if others else None}
    ids |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id if tokenizer.pad_token else None}
    result |= {f"tokenizer.ggml.{name}_token_id": int(i) for name, i in ids.items() if i is not None}
    result["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and (
        list(tokenizer.head) == [tokenizer.bos_token_id]
    )
    result["tokenizer.ggml.add_eos_token"] = bool(tokenizer.tail) and list(tokenizer.tail) == [eos]
    if unknown := [i for i in (*tokenizer.head, *tokenizer.tail) if i not in (tokenizer.bos_token_id, eos)]:
        raise UserError(f"{tokenizer.folder}: format: gguf: llama.cpp cannot put the ids {unknown} around a text")
    if (template := jinja_template(tokenizer)) is not None:
        result["tokenizer.chat_template"] = template
    return result


def jinja_template(tokenizer: Tokenizer) -> str | None:
    """The chat template as Jinja's text; None: there is none, or it is of another kind (PaddleNLP's)."""
    return None if tokenizer.chat_template is None else tokenizer.chat_template.files().get(JINJA_FILE)


def _patterns(tokenizer: Tokenizer) -> list[str]:
    """The patterns that cut a text into words, one after another; UserError for steps that llama.cpp has not."""
    if tokenizer.kind != "json":
        return [tokenizer._row["words"]]
    path = tokenizer.folder / "tokenizer.json"
    step = read_json(path).get("pre_tokenizer") or {}
    patterns = []
    for part in step.get("pretokenizers", [step]):
        kind = part.get("type")
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            patterns += [GPT2_WORDS] if part.get("use_regex", True) else []
        elif kind == "Digits" and part.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            patterns.append(part["pattern"].get("Regex") or re.escape(part["pattern"]["String"]))
        else:
            raise UserError(f"{path}: format: gguf: llama.cpp has no pre_tokenizer like {part}")
    return patterns


def _byte_pairs(tokenizer, tokens, types):
    """Fills tokens and their types; returns the other keys of byte pairs over bytes."""
    engine = tokenizer.engine
    if not engine.byte_level:
        return _scored_pairs(tokenizer, tokens, types)
    if len(engine.symbols) > len(tokens):
        raise UserError(f"{tokenizer.folder}: {len(engine.symbols)} tokens, but the model has {len(tokens)}")
    patterns = _patterns(tokenizer)
    pre = next((name for name, row in PRE_TOKENIZERS.items() if row == (patterns, engine.whole_words)), None)
    pre = pre or next((name for name, row in PRE_TOKENIZERS.items() if row[0] == patterns), None)
    if pre is None:
        raise UserError(f"{tokenizer.folder}: format: gguf: llama.cpp has no pre-tokenizer with the pattern {patterns}")
    for i, symbol in enumerate(engine.symbols):
        if symbol is not None:
            tokens[i], types[i] = symbol, NORMAL
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(engine)],
    }


def _merges(engine) -> list[tuple[str, str]]:
    """Pairs in the order of their ranks. tiktoken has none: a token's pair is what lower ranks make of it."""
    ranks = getattr(engine.rank, "__self__", None)
    if isinstance(ranks, dict):
        return sorted(ranks, key=ranks.get)
    pairs = []
    for symbol, rank in sorted(engine.vocab.items(), key=lambda item: item[1]):
        parts = list(symbol)
        while len(parts) > 2:
            known = [(engine.vocab.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            best, i = min(known)
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def _scored_pairs(tokenizer, tokens, types):
    """tokenizer.json of byte pairs over characters (Llama 2, Mistral): llama.cpp joins the pair of best score first."""
    engine, scores = tokenizer.engine, [-1e6] * len(tokens)
    if not engine.byte_fallback:
        raise UserError(f"{tokenizer.folder}: format: gguf: byte pairs over characters need byte_fallback")
    for symbol, i in engine.vocab.items():
        tokens[i], types[i] = symbol, BYTE if i in engine.byte_ids else NORMAL
    for rank, (left, right) in enumerate(_merges(engine)):
        i = engine.vocab[left + right]
        if scores[i] == -1e6:
            scores[i] = float(-rank)
    prefix = engine.encode("a", True) == [engine.vocab.get(f"{SPACE}a")] or bool(tokenizer.add_prefix_space)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix or bool(tokenizer.lead),
    }


def _sentencepiece(tokenizer, tokens, types):
    """Fills tokens and their types; returns the other keys of a sentencepiece model."""
    engine, scores = tokenizer.engine, [-1e6] * len(tokens)
    if engine.size > len(tokens):
        raise UserError(f"{tokenizer.folder}: {engine.size} tokens, but the model has {len(tokens)}")
    sp = engine.sp
    checks = ((sp.is_control, CONTROL), (sp.is_unknown, UNKNOWN), (sp.is_unused, UNUSED), (sp.is_byte, BYTE))
    for i in range(engine.size):
        tokens[i], scores[i] = sp.id_to_piece(i), float(sp.get_score(i))
        types[i] = next((kind for check, kind in checks if check(i)), NORMAL)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": engine.own_prefix if engine.legacy else bool(tokenizer.add_prefix_space),
    }


# ===================================================================================================== Modelfile


def write_modelfile(folder: Path, file: str, model: CausalLM, tokenizer: Tokenizer) -> None:
    """Ollama's Modelfile: `ollama create NAME -f Modelfile`."""
    lines = [f"FROM ./{file}"]
    if (template := ollama_template(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines.append(f"PARAMETER num_ctx {min(_values(model.config)['context_length'], 8192)}")
    lines += [f'PARAMETER stop "{text}"' for text in map(tokenizer.added_ids.get, tokenizer.stop_ids) if text]
    defaults = tokenizer.generation_config or {}
    for key in ("temperature", "top_p", "top_k"):
        if defaults.get("do_sample") and defaults.get(key) is not None:
            lines.append(f"PARAMETER {key} {defaults[key]}")
    with atomic_file(folder / "Modelfile") as opened:
        opened.write("\n".join(lines) + "\n")


def ollama_template(tokenizer: Tokenizer) -> str | None:
    """The chat template in the language of Ollama (Go's text/template), for system, user and assistant messages.

    It is read off from rendered conversations. None where one piece per role does not write what the template writes;
    Ollama then looks for the template of the GGUF file among those that it knows.
    """
    source = jinja_template(tokenizer)
    if source is None:
        return None
    template, words = JinjaTemplate(source, "chat template"), ["system-word", "user-word", "reply-word"]
    roles = ["system", "user", "assistant"]
    messages = [{"role": role, "content": word} for role, word in zip(roles, words)]

    def render(messages, add_generation_prompt=False):
        text = template.render(messages, tokenizer, add_generation_prompt)
        bos = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer.head else None
        return text.removeprefix(bos) if bos else text  # Ollama puts it there itself

    try:
        pieces = re.split("|".join(words), render(messages + messages[1:]))
        plain = re.split("user-word", render(messages[1:2], True))
        system, after_system, after_user, between, _, after_reply = pieces
    except (UserError, ValueError):
        return None
    before_user = between.removeprefix(after_reply)
    if not (between.startswith(after_reply) and after_system.endswith(before_user) and len(plain) == 2):
        return None
    if not plain[0].endswith(before_user) or plain[1] != after_user:
        return None
    begin, after_system = plain[0].removesuffix(before_user), after_system.removesuffix(before_user)
    if any(mark in text for text in (*pieces, *plain) for mark in ("{{", '"""')):
        return None
    default = f"{{{{ if not .System }}}}{begin}{{{{ end }}}}" if begin else ""
    return (
        f"{default}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "system" }}}}{system}{{{{ .Content }}}}{after_system}'
        f'{{{{ else if eq .Role "user" }}}}{before_user}{{{{ .Content }}}}{after_user}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{after_reply}{{{{ end }}}}{{{{ end }}}}'
    )
