"""Export: a checkpoint becomes a plain Hugging Face folder, or two static graphs that run without this code.

    python export.py configs/llama_hf.json                               # any key again as --key value
    python export.py configs/llama_static.json --model_name_or_path checkpoints/llama_gptq

Input: a Hugging Face folder (safetensors or .bin, whole or in shards), a quantized folder, an adapter's folder (a LoRA
is merged into its base), and another adapter on top by lora_path or prefix_path.

--format hf      config.json, model*.safetensors of at most max_shard_size in save_dtype, tokenizer. Integers of a
                 quantized model stay integers (save_dtype is for the rest); dequantize: true makes floats of them.
--format static  prefill.json, decode.json, static.pdiparams (one file of weights for both programs),
                 static_config.json, tokenizer, and prefix.safetensors with a trained prefix: all that
                 serve.py --mode static needs. float32.
--format gguf    model.gguf for llama.cpp, Ollama and LM Studio: weights as gguf_type, tokenizer, chat template and
                 stop ids; and Modelfile, for `ollama create`. Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma.
--format compressed-tensors, awq
                 the codes of a quantized model (4 and 8 bits, A8W8, fp8; awq: 4 bits in groups) in the layouts that
                 vLLM and transformers open. GPTQ's own layout is format hf.
--format fp8     a float model, its linears in e4m3 with a scale an output channel: compressed-tensors' float-quantized.

Every export is written to a temporary folder, loaded again from there, and its logits are compared with those of the
model in memory. With verify_with, a client of the format (llama_cpp; transformers) opens it too: its ids of texts,
greedy tokens and logits are compared with ours. Only then it moves to output_dir, the file that marks it complete last.
Not supported: static graphs of ChatGLM-6B.
"""

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import numpy as np
import paddle

import trainer
from adapters import adapted_layers, base_folders, from_pretrained, load_adapter, merge, weights_in_adapter
from arguments import DTYPES, ScriptArgs
from families import ModelConfig
from formats.chat import load_chat_template
from formats.clients import (
    CLIENTS,
    QUESTIONS,
    ROUNDED_INPUTS,
    TEXTS,
    TOLERANCE,
    ask_client,
    check_ids,
    compare,
    importable_client,
)
from formats.files import UserError
from formats.gguf_export import FILE_TYPES, round_model, write_model, write_modelfile
from formats.gguf_folder import open_folder
from formats.quantized_export import LAYOUTS, quantized_weights
from formats.tensor_files import from_bfloat16, to_bfloat16
from formats.tokenizer import MODEL_FILES, Tokenizer, load_tokenizer
from formats.weights import named_weights, save_pretrained
from model import CausalLM, Linear, QuantLinear, block_linears, build, set_parameter
from modules.positions import NO_ROW
from serving.static_graphs import static_logits, trace, write_prefix, write_static_config


@dataclasses.dataclass
class Args(ScriptArgs):
    model_name_or_path: str = ""  # folder of the model, or of an adapter
    lora_path: str | None = None  # a LoRA to merge into it
    prefix_path: str | None = None  # a prefix to put before it; format static only
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; None: with the adapter or the model
    chat_template: str | None = None  # as in finetune.py; None: the tokenizer's own
    format: str = "hf"  # hf, static, gguf, compressed-tensors, awq or fp8
    save_dtype: str | None = None  # format hf: float32, bfloat16 or float16; None: the one that config.json names
    max_shard_size: str = "5GB"  # format hf: most bytes of one file, in B, KB, MB, GB (powers of 1000) or KiB, MiB, GiB
    dequantize: bool = False  # floats instead of the integers of a quantized model
    gguf_type: str = "F16"  # format gguf: F32, F16, BF16, Q8_0, Q6_K, Q5_0, Q5_1, Q4_K_M, Q4_K_S, Q4_1 or Q4_0
    verify_with: str | None = None  # a Python with a client of the format: llama_cpp (gguf), vllm or transformers
    verify_client: str | None = None  # which of them; None: the first that this Python can import

    aliases = {
        "output_path": "output_dir",
        "dtype": "save_dtype",
        "outtype": "gguf_type",
    }  # PaddleNLP's names, in this script only

    def check(self) -> list[str]:
        for key in ("model_name_or_path", "output_dir"):
            if not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.format not in WRITERS:
            raise UserError(f"format: {self.format!r}; possible are {', '.join(WRITERS)}")
        self.gguf_type = {"Q4_K": "Q4_K_M"}.get(self.gguf_type.upper(), self.gguf_type.upper())
        if self.gguf_type not in FILE_TYPES:
            raise UserError(f"gguf_type: {self.gguf_type!r}; possible are {', '.join(FILE_TYPES)}")
        if self.verify_with and self.format not in CLIENTS:
            raise UserError(f"verify_with: format {self.format} has no client but serve.py")
        if self.verify_client not in (None, *CLIENTS.get(self.format, ())):
            known = ", ".join(CLIENTS.get(self.format, ["none"]))
            raise UserError(f"verify_client: {self.verify_client!r}; of format {self.format}: {known}")
        if self.save_dtype not in (None, *DTYPES):
            raise UserError(f"save_dtype: {self.save_dtype!r}; possible are {', '.join(DTYPES)}")
        if self.lora_path and self.prefix_path:
            raise UserError("lora_path and prefix_path are both given; choose one")
        if self.prefix_path and self.format != "static":
            raise UserError(f"prefix_path: the format {self.format} cannot hold a prefix; use format: static")
        parse_size(self.max_shard_size)
        notes = super().check()
        if self.format == "static" and self.save_dtype not in (None, "float32"):
            notes.append(f"save_dtype: {self.save_dtype}: static graphs compute in float32, so float32 is used")
        return notes


def parse_size(text: str) -> int:
    """ "200MB" -> bytes; units as in transformers: KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024."""
    match, size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(i?)B?", text.strip(), re.IGNORECASE), 0
    if match and not (match[3] and not match[2]):
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2].upper() or " "))
    if size < 1:
        raise UserError(f'max_shard_size: {text!r} is not a size such as "5GB" or "200MB"')
    return size


# ======================================================================================= the model and the tokenizer


def load_model(args: Args, tokenizer: Tokenizer) -> CausalLM:
    """The model with its LoRA merged and its prefix installed. LoRA on integers is not merged (format static only)."""
    model = from_pretrained(args.model_name_or_path)
    if args.dequantize:
        dequantize(model, args.model_name_or_path)
    if path := args.lora_path or args.prefix_path:
        load_adapter(model, path)
        if bool(adapted_layers(model) or weights_in_adapter(model)) != bool(args.lora_path):
            holds, key = ("LoRA", "lora_path") if args.prefix_path else ("a prefix", "prefix_path")
            raise UserError(f"{path}: holds {holds}; give it as {key}")
        if model.config.quantization is None:
            merge(model)
        elif args.lora_path and args.format != "static":
            raise UserError(
                f"lora_path: {path}: LoRA cannot be merged into integers; add dequantize: true, or use format: static"
            )
    if args.format != "static" and model.prefix is not None:
        what = "a Hugging Face folder" if args.format == "hf" else f"the format {args.format}"
        raise UserError(f"{args.model_name_or_path}: {what} cannot hold its prefix; use format: static")
    if args.format == "static" and model.config.position == "rope_2d":
        raise UserError(
            f"format: static is not supported for ChatGLM-6B; serve.py serves {args.model_name_or_path} in mode dynamic"
        )
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path)
    model.eval()
    return model


def open_tokenizer(args: Args) -> Tokenizer:
    """tokenizer_name_or_path, else the adapter's, the model's, or that of the adapter's base."""
    given = [args.tokenizer_name_or_path] if args.tokenizer_name_or_path else []
    folders = given or [*filter(None, [args.lora_path, args.prefix_path]), *base_folders(args.model_name_or_path)]
    for folder in map(Path, folders):
        if any((folder / name).is_file() for name in MODEL_FILES) or args.format == "static" and given:
            tokenizer = load_tokenizer(folder, base_folders(args.model_name_or_path))
            if args.chat_template is not None:
                tokenizer.chat_template = load_chat_template(args.chat_template)
            return tokenizer
    where = ", ".join(map(str, folders))
    raise UserError(f"no tokenizer.model, tokenizer.json or other vocabulary in {where}; give tokenizer_name_or_path")


def dequantize(model: CausalLM, path: str) -> None:
    """Replace every QuantLinear by a Linear of the floats that its integers stand for."""
    if model.config.quantization is None:
        raise UserError(f"dequantize: {path} is not quantized")
    for parent, attribute, layer in block_linears(model).values():
        if isinstance(layer, QuantLinear):
            linear = Linear(layer.n_in, layer.n_out, layer.bias is not None)
            linear.weight.set_value(layer.dequantized())
            if layer.bias is not None:
                linear.bias.set_value(layer.bias)
            setattr(parent, attribute, linear)
    source = {key: value for key, value in model.config.source.items() if key != "quantization_config"}
    model.config = dataclasses.replace(model.config, quantization=None, source=source)
    float_names = {weight.name for weight in named_weights(build(model.config))}
    if added := [weight.name for weight in named_weights(model) if weight.name not in float_names]:
        names = f"{added[0]} and {len(added) - 1} more have no place in a float {model.config.family}"
        raise UserError(f"dequantize: {path} was shifted: {names}")


def saved_dtype(args: Args, config: ModelConfig) -> str:
    """In what format hf stores floats."""
    dtype = args.save_dtype or config.source.get("dtype") or config.source.get("torch_dtype")
    return dtype if dtype in DTYPES else "float32"


# ========================================================================================== logits to compare


def probe(model: CausalLM) -> tuple[np.ndarray, np.ndarray]:
    """Three prompts padded on the left and four more tokens to decode: ids (3, T + 4), mask (3, T)."""
    room = max_model_len(model)
    if room < 6:
        raise UserError(f"the model has room for {room} tokens: too few to check an export with")
    length = min(room, 28)
    generator, T = np.random.default_rng(0), length - 4
    mask = np.arange(T) >= T - np.array([[T], [1 + T // 4], [1 + T // 2]])
    ids, source = generator.integers(0, model.config.vocab_size, (3, length)), model.config.source
    if model.config.position == "rope_2d":  # a prompt is a context, the mask token, <sop>
        for column, key in ((T - 2, "gmask_token_id"), (T - 1, "bos_token_id")):
            ids[:, column] = source.get(key, ids[0, column])
    return ids, mask.astype(np.int64)


def max_model_len(model: CausalLM) -> int:
    """Tokens of prompt and reply together."""
    return model.config.max_model_len - (model.prefix.tokens if model.prefix is not None else 0)


@paddle.no_grad()
def dynamic_logits(model: CausalLM, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(3, 5, V) float32: after the prompt and after each of the four tokens, as model.generate computes them."""
    if model.prefix is not None and model.distances_count and len(ids) > 1:  # no padding between prefix and text
        rows = [(row[part.argmax() :][None], part[part.argmax() :][None]) for row, part in zip(ids, mask)]
        return np.concatenate([dynamic_logits.__wrapped__(model, *row) for row in rows])  # no_grad does not nest
    T, cache = mask.shape[1], model.new_cache(len(ids))
    positions = np.maximum(mask.cumsum(1) - 1, 0)  # (3, T)
    mask_rows = np.where(mask[:, None, :, None] == 1, NO_ROW, 0).astype(np.int32)  # (3, 1, T, 1) hides the padding
    logits = [model(*map(paddle.to_tensor, (ids[:, :T], positions, mask_rows)), caches=cache)[:, -1]]
    for step in range(T, ids.shape[1]):
        position = positions[:, -1:] + step - T + 1
        token = paddle.to_tensor(ids[:, step : step + 1])
        logits.append(model(token, paddle.to_tensor(position), caches=cache)[:, -1])
    return paddle.stack(logits, axis=1).astype("float32").numpy()


def difference(logits: np.ndarray, expected: np.ndarray, tolerance: float, subject: str) -> float:
    """The largest difference of logits; UserError beyond `tolerance` times the largest logit."""
    largest, limit = float(np.abs(logits - expected).max()), tolerance * float(np.abs(expected).max())
    if not (math.isfinite(largest) and largest <= limit):
        problem = f"logits differ by {largest:.3g}, at most {limit:.3g} is right"
        raise UserError(f"export refused: {subject}: {problem}; nothing was written")
    return largest


# ===================================================================================================== format hf


def export_hf(tokenizer: Tokenizer, folder: Path, args: Args) -> str:
    """Write a Hugging Face folder and load it again; returns a line about the differences."""
    model = load_model(args, tokenizer)
    ids, mask = probe(model)
    dtype, exact = saved_dtype(args, model.config), dynamic_logits(model, ids, mask)
    if dtype != "float32":
        round_weights(model, dtype)
    rounded = dynamic_logits(model, ids, mask)
    rounding = difference(rounded, exact, 0.1, f"save_dtype {dtype} is too coarse for these weights")
    save_pretrained(model, folder, dtype, max_shard_bytes=parse_size(args.max_shard_size))
    tokenizer.save(folder)
    del model  # one at a time in memory
    reloaded = from_pretrained(folder).eval()
    largest = difference(dynamic_logits(reloaded, ids, mask), rounded, 1e-4, "the folder, loaded again")
    note = "" if dtype == "float32" else f"; {rounding:.3g} from rounding to {dtype}"
    return f"largest difference of logits {largest:.3g}{note}{verified(args, folder, reloaded, tokenizer)}"


def round_weights(model: CausalLM, dtype: str) -> None:
    """Round the float weights in place to `dtype`, which save_pretrained will write."""
    for weight in named_weights(model):
        if weight.stored is None:
            array = weight.parameter.numpy()
            with np.errstate(over="ignore"):  # overflow becomes infinity, which difference() refuses
                rounded = from_bfloat16(to_bfloat16(array)) if dtype == "bfloat16" else array.astype(np.float16)
            set_parameter(weight.parameter, rounded.astype(np.float32))


# =================================================================================================== format gguf


def export_gguf(tokenizer: Tokenizer, folder: Path, args: Args) -> str:
    """Write model.gguf and Modelfile and open the file again; returns a line about the differences."""
    model = load_model(args, tokenizer)
    ids, mask = probe(model)
    path, exact = folder / "model.gguf", dynamic_logits(model, ids, mask)
    write_model(path, model, tokenizer, args.gguf_type, Path(args.model_name_or_path).stem)
    write_modelfile(folder, path.name, model, tokenizer)
    round_model(model, args.gguf_type)
    rounded = dynamic_logits(model, ids, mask)
    difference(rounded, exact, math.inf, f"gguf_type {args.gguf_type}")  # finite, that is
    del model  # one at a time in memory
    reloaded, opened = from_pretrained(path).eval(), load_tokenizer(path)
    largest = difference(dynamic_logits(reloaded, ids, mask), rounded, 1e-4, "the file, opened again")
    check_ids(TEXTS, [opened.encode(text) for text in TEXTS], [tokenizer.encode(text) for text in TEXTS], "the file")
    if opened.chat_template is None and tokenizer.chat_template is not None:
        print("note: the chat template is not Jinja; the file has none", flush=True)
    rounding = float(np.abs(rounded - exact).max())
    asked = verified(args, path, reloaded, tokenizer)
    return f"largest difference of logits {largest:.3g}; {rounding:.3g} from rounding to {args.gguf_type}{asked}"


# ======================================================================================= formats of integers


def export_quantized(tokenizer: Tokenizer, folder: Path, args: Args) -> str:
    """Write a quantized model in another layout, or fp8, and open it; returns a line about the differences."""
    model = load_model(args, tokenizer)
    dtype, size = saved_dtype(args, model.config), parse_size(args.max_shard_size)
    if dtype != "float32":
        round_weights(model, dtype)
    weights, quantization = quantized_weights(model, args.format)
    save_pretrained(model, folder, dtype, max_shard_bytes=size, weights=weights, quantization=quantization)
    tokenizer.save(folder)
    if model.config.quantization is not None:
        dequantize(model, args.model_name_or_path)  # rounded activations are the client's
    ids, mask = probe(model)
    expected = dynamic_logits(model, ids, mask)
    del model, weights  # one at a time in memory
    reloaded = from_pretrained(folder).eval()
    largest = difference(dynamic_logits(reloaded, ids, mask), expected, 1e-4, "the folder, loaded again")
    line, unrounded = f"largest difference of logits {largest:.3g}", None
    if args.verify_with and args.format == "compressed-tensors":
        unrounded, reloaded = reloaded, load_model(args, tokenizer)  # which rounds activations as the client does
    return f"{line}{verified(args, folder, reloaded, tokenizer, unrounded)}"


# ================================================================================== what the format's client answers


def verified(args: Args, path: Path, model: CausalLM, tokenizer: Tokenizer, unrounded: CausalLM | None = None) -> str:
    """ "; " and a line on how the client of verify_with agrees over 64 greedy tokens of 20 prompts; "" without one.

    unrounded: the model of the same weights whose activations are not rounded."""
    if not args.verify_with:
        return ""
    clients = [args.verify_client] if args.verify_client else CLIENTS[args.format]
    client = importable_client(args.verify_with, clients)
    prompts = [tokenizer.apply_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    count = min(64, max_model_len(model) - max(map(len, prompts)))
    if count <= 0:
        raise UserError(f"verify_with: the model has room for {max_model_len(model)} tokens, too few for a question")
    stops, vocab_size = sorted(tokenizer.stop_ids), model.config.vocab_size
    reply = ask_client(args.verify_with, client, path, list(TEXTS), prompts, count, stops, vocab_size)

    def logits_by(net: CausalLM) -> Callable[[int, list[int]], np.ndarray]:
        @paddle.no_grad()
        def logits_of(number: int, tokens: list[int]) -> np.ndarray:
            sequence = np.array([prompts[number] + tokens[:-1]])
            return net(paddle.to_tensor(sequence))[0, len(prompts[number]) - 1 :].astype("float32").numpy()

        return logits_of

    method = (model.config.quantization or {}).get("quant_method", args.format)
    tolerance = TOLERANCE.get(args.gguf_type if args.format == "gguf" else method, ROUNDED_INPUTS)
    rounds = logits_by(unrounded) if unrounded is not None and method.startswith("a8w8") else None
    ids = [tokenizer.encode(text) for text in TEXTS]
    return "; " + compare(reply, list(TEXTS), ids, logits_by(model), tolerance, rounds)


# ================================================================================================= format static


def export_static(tokenizer: Tokenizer, folder: Path, args: Args) -> str:
    """Write both programs, their weights and static_config.json, and run them; returns a line about the differences."""
    model = load_model(args, tokenizer)
    ids, mask = probe(model)
    expected, room, prefix_tokens = dynamic_logits(model, ids, mask), max_model_len(model), 0
    if model.prefix is not None:
        prefix_tokens = write_prefix(model, folder / "prefix.safetensors")
        model.prefix = None  # its keys and values are an input
    trace(model, folder)
    tokenizer.save(folder)
    write_static_config(
        folder,
        model.config,
        source=str(args.model_name_or_path),
        max_model_len=room,
        prefix_tokens=prefix_tokens,
        eos_token_id=tokenizer.eos_token_id,
        stop_ids=tokenizer.stop_ids,
    )
    # Rounding of activations is a step function: where float32 noise crosses a step, a8w8 logits jump.
    quantization = model.config.quantization
    is_a8w8 = quantization is not None and quantization["quant_method"].startswith("a8w8")
    largest = difference(static_logits(folder, ids, mask), expected, 0.02 if is_a8w8 else 1e-4, "the static programs")
    return f"largest difference of logits {largest:.3g}"


# ========================================================================================================== main

WRITERS = {"hf": export_hf, "static": export_static, "gguf": export_gguf} | dict.fromkeys(LAYOUTS, export_quantized)


def check_base_is_elsewhere(args: Args) -> None:
    """UserError if output_dir holds the adapter's base, which overwriting would delete."""
    for base in base_folders(args.model_name_or_path)[1:]:
        if base.resolve().is_relative_to(Path(args.output_dir).resolve()):
            reason = f"holds {base}, the base of {args.model_name_or_path}"
            raise UserError(f"output_dir: {args.output_dir} {reason}; choose another folder")


def move_into_place(temporary: Path, folder: Path) -> list[Path]:
    """Rename every file into the folder, the marker last: without it the folder is no model."""
    markers = ("config.json", "static_config.json", "model.gguf")
    files = sorted(temporary.iterdir(), key=lambda path: (path.name in markers, path.name))
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for path in files:
        os.replace(path, folder / path.name)
    temporary.rmdir()
    return [folder / path.name for path in files]


def main(args: Args) -> None:
    # ====================================================================== 1. check the folders, open the tokenizer
    for key in ("model_name_or_path", "lora_path", "prefix_path", "tokenizer_name_or_path"):
        if getattr(args, key) and not open_folder(getattr(args, key)).is_dir():
            raise UserError(f"{key}: {getattr(args, key)}: no such folder")
    trainer.check_output_dir(args)
    check_base_is_elsewhere(args)
    tokenizer, folder = open_tokenizer(args), Path(args.output_dir)
    is_new, temporary = not folder.exists(), folder / ".unfinished"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written to: {error.strerror}") from None

    # ====================================================================== 2. export to a temporary folder and compare
    try:
        compared = WRITERS[args.format](tokenizer, temporary, args)

        # ================================================================== 3. move into output_dir
        trainer.prepare_output_dir(args)
        files = move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
    for path in files:
        print(f"  {path.name}: {path.stat().st_size:,} bytes")
    total = sum(path.stat().st_size for path in files)
    print(f"export: {folder}, format {args.format}, {len(files)} files, {total:,} bytes; {compared}")
    mode = " --mode static" if args.format == "static" else ""
    print(f"next: python serve.py{mode} --model_name_or_path {folder}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
