"""A GGUF file as a Hugging Face folder: config.json, the tokenizer's files and the chat template from its metadata.

    folder = open_folder("model.gguf")     # a folder with a link to the file; any other path is returned as it is

What every script does with a folder it does with this one: formats/weights.py reads the tensors through the link, one
at a time. The folder is a temporary one of this process and goes with it.
"""

import atexit
import functools
import json
import math
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np

from formats.bpe import GPT2_WORDS, LLAMA3_WORDS, QWEN_WORDS, TEKKEN_WORDS
from formats.files import UserError
from formats.gguf import ARCHITECTURES, GGUFFile, architecture, read_header

LINK = "model.gguf"  # name of the link in the folder; formats.weights.MODEL_FILES has it
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pdparams", "*.index.json", "static_config.json")


def open_folder(path: str | Path) -> Path:
    """A .gguf file, or a folder with one and no other weights -> a Hugging Face folder; other paths unchanged."""
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return _folder_of(path.resolve())
    if path.is_dir() and not (path / LINK).is_symlink():
        files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("mmproj"))
        firsts = [file for file in files if "-of-" not in file.name or "-00001-of-" in file.name]
        if files and not any(next(path.glob(pattern), None) for pattern in _OTHER_WEIGHTS):
            if len(firsts) != 1:
                names = ", ".join(file.name for file in firsts[:4])
                raise UserError(f"{path}: holds {len(firsts)} models ({names}); give the path of one file")
            return _folder_of(firsts[0].resolve())
    return path


@functools.lru_cache(8)
def _folder_of(path: Path) -> Path:
    file = read_header(path)
    files = {"config.json": json.dumps(huggingface_config(file, path), indent=2)} | tokenizer_files(file, path)
    temporary = tempfile.mkdtemp(prefix="gguf-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    folder = Path(temporary) / path.name  # messages name files of it: …/MODEL.gguf/config.json
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / LINK).symlink_to(path)
    return folder


# ========================================================================================= metadata -> config.json

_READ = """block_count context_length embedding_length feed_forward_length vocab_size attention.head_count
    attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length attention.value_length
    attention.sliding_window rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.finetuned rope.scaling.attn_factor expert_count
    expert_used_count expert_feed_forward_length expert_shared_feed_forward_length attn_logit_softcapping
    final_logit_softcapping""".split()


def _number(value: float) -> float:
    """float32 -> the shortest decimal that is it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def huggingface_config(file: GGUFFile, path: Path) -> dict:
    """The content of config.json. UserError for a key that may change the maths and is not read."""
    name = architecture(file, path)
    kind, row, metadata = name.partition("/")[0], ARCHITECTURES[name], file.metadata
    values = {key[len(kind) + 1 :]: value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    for key, value in values.items():
        if key not in _READ or isinstance(value, list):
            raise UserError(f"{path}: {kind}.{key} = {value!r} is not supported: it may change the maths")
    try:
        D, H = values["embedding_length"], values["attention.head_count"]
        head_dim = values.get("attention.key_length", D // H)
        config = {
            "model_type": row.model_type,
            "hidden_size": D,
            "intermediate_size": values.get("feed_forward_length", 4 * D),
            "num_hidden_layers": values["block_count"],
            "num_attention_heads": H,
            "num_key_value_heads": values.get("attention.head_count_kv", H),
            "head_dim": head_dim,
            "max_position_embeddings": values["context_length"],
            "rms_norm_eps": _number(values["attention.layer_norm_rms_epsilon"]),
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "rope_theta": _number(values.get("rope.freq_base", 10000.0)),
        }
    except KeyError as error:
        raise UserError(f"{path}: has no {error.args[0]}") from None
    if values.get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: {kind}.rope.dimension_count is not the size of a head, {head_dim}")
    if scaling := _rope_scaling(file, values, path):
        config["rope_scaling"] = scaling
    config |= _family_keys(row.model_type, file, values)
    for key in ("bos", "eos", "padding"):
        if (token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{key.replace('padding', 'pad')}_token_id"] = token
    stops = [config.get("eos_token_id"), *(metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if len(stops) > 1:
        config["eos_token_id"] = stops
    return config


def _family_keys(model_type: str, file: GGUFFile, values: dict) -> dict:
    """Keys of config.json that only some families have."""
    result = {}
    if model_type in ("llama", "qwen3", "qwen3_moe"):
        result["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if model_type == "llama":
        result["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if model_type.startswith("gemma"):
        result["hidden_act"] = result["hidden_activation"] = "gelu_pytorch_tanh"
    if model_type == "gemma2":
        result["attn_logit_softcapping"] = _number(values.get("attn_logit_softcapping", 50.0))
        result["final_logit_softcapping"] = _number(values.get("final_logit_softcapping", 30.0))
        result["sliding_window"] = values.get("attention.sliding_window", 4096)
        result["query_pre_attn_scalar"] = gemma2_scalar(values)
    if experts := values.get("expert_count"):
        result["num_local_experts" if model_type == "mixtral" else "num_experts"] = experts
        result["num_experts_per_tok"] = values["expert_used_count"]
        if model_type != "mixtral":
            width = file.tensors["blk.0.ffn_gate_exps.weight"].shape[1]
            result["moe_intermediate_size"] = values.get("expert_feed_forward_length", width)
            result["norm_topk_prob"] = model_type == "qwen3_moe"  # as llama.cpp computes the two
        if model_type == "qwen2_moe":
            result["shared_expert_intermediate_size"] = file.tensors["blk.0.ffn_gate_shexp.weight"].shape[0]
    return result


def gemma2_scalar(values: dict) -> int:
    """query_pre_attn_scalar, which llama.cpp knows of the three published sizes: of 27B it is D / H, else Dh."""
    D, H = values["embedding_length"], values["attention.head_count"]
    return D // H if values["block_count"] == 46 else values.get("attention.key_length", D // H)


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """rope_freqs.weight (Dh/2,): by what Llama 3.1's rope divides each frequency."""
    theta, factor = rope["rope_theta"], rope["factor"]
    low, high, original = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _rope_scaling(file: GGUFFile, values: dict, path: Path) -> dict | None:
    """rope_scaling of config.json; None for plain rope."""
    if tensor := file.tensors.get("rope_freqs.weight"):
        factors = tensor.read()
        rope = {"rope_theta": _number(values.get("rope.freq_base", 10000.0)), "factor": float(factors.max())}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        for power in range(4, 21):  # 8192 in all published models
            rope["original_max_position_embeddings"] = 1 << power
            if np.allclose(llama3_factors(rope, 2 * len(factors)), factors, rtol=1e-4):
                del rope["rope_theta"]
                return {"rope_type": "llama3", **rope}
        raise UserError(f"{path}: rope_freqs.weight is not that of Llama 3.1's rope: it is not supported")
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _number(values.get("rope.scaling.factor", 1.0))}
    if kind not in ("linear", "yarn"):
        raise UserError(f"{path}: rope.scaling.type {kind!r} is not supported; supported are linear and yarn")
    if (original := values.get("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    if values.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise UserError(f"{path}: rope.scaling.attn_factor is not supported: it changes the maths")
    return scaling


# ================================================================================ metadata -> the tokenizer's files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token_type; sentencepiece's own numbers

# tokenizer.ggml.pre: (patterns that cut a text into words, one after another; whether a word that is a token is taken
# whole, whatever the merges say). The first name with a row's value is the one that is written.
PRE_TOKENIZERS = {
    "gpt-2": ([GPT2_WORDS], False),
    "smollm": ([r"\p{N}", GPT2_WORDS], False),
    "llama-bpe": ([LLAMA3_WORDS], True),
    "dbrx": ([LLAMA3_WORDS], False),
    "qwen2": ([QWEN_WORDS], False),
    "tekken": ([TEKKEN_WORDS], True),
}
PRE_TOKENIZERS |= dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "roberta-bpe"), PRE_TOKENIZERS["gpt-2"])
PRE_TOKENIZERS |= dict.fromkeys(("starcoder", "refact", "command-r"), PRE_TOKENIZERS["smollm"])
PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3"), PRE_TOKENIZERS["llama-bpe"])
PRE_TOKENIZERS |= dict.fromkeys(("smaug-bpe", "chatglm-bpe", "glm4"), PRE_TOKENIZERS["dbrx"])
PRE_TOKENIZERS |= dict.fromkeys(("deepseek-r1-qwen", "megrez"), PRE_TOKENIZERS["qwen2"])


def tokenizer_files(file: GGUFFile, path: Path) -> dict[str, str | bytes]:
    """{file name: content} of a tokenizer's folder."""
    metadata = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.")
    }
    kind, tokens = metadata.get("model"), metadata.get("tokens")
    makers = {"gpt2": _byte_pairs, "llama": _sentencepiece}
    if kind not in makers or not isinstance(tokens, list):
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; supported are {', '.join(makers)}")
    types = metadata.get("token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{path}: {len(types)} token types for {len(tokens)} tokens")
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    for key in names.values():
        if metadata.get(key) is not None and not 0 <= metadata[key] < len(tokens):
            raise UserError(f"{path}: tokenizer.ggml.{key} = {metadata[key]}; there are {len(tokens)} tokens")
    settings = {f"{name}_token": tokens[metadata[key]] for name, key in names.items() if metadata.get(key) is not None}
    files = makers[kind](metadata, tokens, types, settings, path)
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False)
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        files["chat_template.jinja"] = template
    return files


_TOKEN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)  # flags of an added token


def _byte_pairs(metadata, tokens, types, settings, path):
    """tokenizer.json of byte pairs over bytes."""
    pre = metadata.get("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"{path}: tokenizer.ggml.pre {pre!r} is not supported; known are {', '.join(PRE_TOKENIZERS)}")
    patterns, whole_words = PRE_TOKENIZERS[pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    bos = settings.get("bos_token")
    around = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    if metadata.get("add_bos_token", pre in ("llama-bpe", "llama3", "llama-v3", "tekken")) and bos is not None:
        around.insert(0, {"SpecialToken": {"id": bos, "type_id": 0}})
        special[bos] = {"id": bos, "ids": [metadata["bos_token_id"]], "tokens": [bos]}
    added = [i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **_TOKEN, "special": types[i] == CONTROL} for i in added],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "post_processor": {"type": "TemplateProcessing", "single": around, "pair": [], "special_tokens": special},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": whole_words,
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
            "merges": metadata.get("merges") or [],
        },
    }
    return {"tokenizer.json": json.dumps(content, ensure_ascii=False)}


def _varint(value: int) -> bytes:
    result = b""
    while value > 127:
        result, value = result + bytes([value & 127 | 128]), value >> 7
    return result + bytes([value])


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value % (1 << 64))


def _sentencepiece(metadata, tokens, types, settings, path):
    """tokenizer.model: a sentencepiece model of byte pairs, as Llama 2's."""
    scores = metadata.get("scores") or []
    if len(scores) != len(tokens):
        raise UserError(f"{path}: {len(scores)} scores for {len(tokens)} tokens")
    prefix, pieces = metadata.get("add_space_prefix", True), b""
    for token, score, kind in zip(tokens, scores, types):
        pieces += _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, kind))
    ids = {41: "bos_token_id", 42: "eos_token_id", 40: "unknown_token_id", 43: "padding_token_id"}
    trainer = _field(3, 2) + _field(4, len(tokens)) + _field(35, 1)
    trainer += b"".join(_field(number, metadata.get(key, -1)) for number, key in ids.items())
    normalizer = _field(1, b"identity") + _field(3, int(prefix)) + _field(4, 0) + _field(5, 1)
    settings["tokenizer_class"] = "LlamaTokenizer" if prefix else "GemmaTokenizer"
    settings["add_bos_token"] = metadata.get("add_bos_token", True)
    settings["add_eos_token"] = metadata.get("add_eos_token", False)
    controls = [i for i, kind in enumerate(types) if kind == CONTROL]
    settings["added_tokens_decoder"] = {str(i): _TOKEN | {"content": tokens[i], "special": True} for i in controls}
    return {"tokenizer.model": pieces + _field(2, trainer) + _field(3, normalizer)}
