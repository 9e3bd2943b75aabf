"""Answer prompts: one engine with continuous batching behind a terminal, a file of prompts, or an HTTP server.

    python serve.py checkpoints/llama_lora                                     # OpenAI's HTTP interface and a chat page
    python serve.py configs/llama_serve.json                                   # the same, with keys from a file
    python serve.py configs/llama_serve.json --prompt "type#dress*color#red"   # one reply, as it is written
    python serve.py configs/llama_serve.json --data_file in.jsonl --output_file out.jsonl
    python serve.py configs/llama_serve.json --benchmark

Opens full, merged, quantized, LoRA and prefix-tuned folders; `lora_path "name=path,name2=path2"` serves several
adapters of one base, chosen by each request. `mode: static` runs what export.py wrote with `format: static`. Messages
of a chat are written in the model's chat template; a model without one gets plain text, as finetune.py trains it.

The engine (serving/engine.py): requests join and leave at every step; a step computes one token of every running
sequence and, with the rest of `max_num_batched_tokens`, pieces of new prompts. Keys and values are kept in a pool of
blocks (Kwon et al., arXiv 2309.06180); identical full blocks are shared; when no block is free, the youngest sequence
waits and is computed again. The pool may be int8 (`cachekv_int8_type dynamic`), a quarter of the memory.
`speculate_method` guesses several tokens and checks them in one step; replies stay the same. Not supported: beam
search, more than one process.
"""

import dataclasses
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import paddle

import trainer
from adapters import base_folders, from_pretrained, load_adapter, tokenizer_folder
from arguments import ScriptArgs
from formats.chat import load_chat_template
from formats.files import UserError
from formats.gguf_folder import open_folder
from formats.record_files import RecordOptions
from formats.tokenizer import Tokenizer, load_tokenizer
from model import CausalLM, QuantLinear
from serving.access import Access, model_names
from serving.engine import Engine
from serving.fused import choose_dtype, why_not_fused
from serving.offline import answer_file, answer_prompt, benchmark
from serving.pooling import POOLINGS
from serving.runners import PagedRunner, StaticRunner, round_linears
from serving.sampling import SamplingParams
from serving.server import serve_http
from serving.speculation import METHODS, DraftSpeculator, NgramSpeculator, make_speculator

QUANT_GROUPS = {"w8": -1, "w4": 64, "a8w8": -1}  # `quant`: input rows that share a scale; -1: all

# ====================================================================================================== 1. arguments


@dataclasses.dataclass
class Args(ScriptArgs):
    model_name_or_path: str = ""  # folder of the model: full, merged, quantized, an adapter's, or of export.py (static)
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    lora_path: str | None = None  # an adapter's folder, or several: "name=folder,name2=folder2"
    prefix_path: str | None = None  # folder of a trained prefix
    mode: str = "dynamic"  # dynamic: model.py and a pool of blocks; static: the graph that export.py wrote
    chat_template: str | None = None  # name in chat.FORMATS, plain, none, or a template file; None: the model's own
    src_length: int | None = None  # most tokens of a prompt; None: total_max_length - max_length
    max_length: int = 1024  # most new tokens of a reply
    min_length: int = 1  # fewest
    total_max_length: int = 4096  # most tokens of prompt and reply; never more than the model's positions
    decode_strategy: str = "sampling"  # or greedy_search, which is temperature 0
    temperature: float = 0.95
    top_k: int = 0  # sample among this many likeliest tokens; 0: all
    top_p: float = 0.7  # sample among the likeliest whose probabilities sum to it
    repetition_penalty: float = 1.0
    batch_size: int = 16  # most sequences at once
    block_size: int = 16  # tokens of a block of the pool
    num_blocks: int | None = None  # blocks of the pool; None: what kv_cache_gb holds, but no more than can be in use
    kv_cache_gb: float = 1.0  # memory of the pool
    cachekv_int8_type: str | None = None  # dynamic: the pool in int8 with a scale a token and head; static: with the
    # scales of heads that quantize.py's quant_type …c8 left in the folder; None: float32
    dtype: str | None = None  # float32, bfloat16, or auto (None): bfloat16 where processor and model allow it
    quant: str | None = None  # w8, w4 or a8w8: round the weights when they are loaded; None: as the folder has them
    max_num_batched_tokens: int = 512  # most tokens of one step; longer prompts are computed in pieces
    chunked_prefill_size: int = 128  # most tokens of prompts in a step that replies wait for
    max_queue: int = 256  # most sequences waiting; more are refused
    keep_weights: bool = False  # keep the layers' weights beside packed ones, for embeddings and echoed logprobs
    speculate_method: str | None = None  # ngram (or inference_with_reference), or draft_model; None: no speculation
    speculate_max_draft_token_num: int = 5  # most tokens of a sequence that are guessed for a step
    speculate_max_ngram_size: int = 3  # ngram: most last tokens that are looked up in prompt and reply
    draft_model_name_or_path: str | None = None  # draft_model: folder of a smaller model with the same vocabulary
    prompt: str | None = None  # answer this and exit
    system: str | None = None  # the system text before prompt
    data_file: str | None = None  # answer every record of this file; the replies may be missing: docs/data.md
    columns: str | dict | None = None  # other names of its keys: {"instruction": "question", …}
    output_file: str = "output.json"  # into this one, each with "output"; lines already there are kept
    benchmark: bool = False  # print time to first token and tokens/s by batch size, and exit
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8011
    api_key: str | None = None  # what clients must send as "Authorization: Bearer KEY"; None: nothing
    allowed_origins: str | list | None = None  # of pages besides the server's own: "https://a.example,…", "*": all
    trusted_proxies: str | list | None = "127.0.0.1,::1"  # addresses whose X-Forwarded-Host holds; "*": all
    served_model_name: str | list | None = None  # what clients call it, or several names; None: its path's last part
    pooling_type: str = "last"  # of /v1/embeddings: the last token's hidden state, or "mean" of all
    allow_runtime_lora: bool = False  # POST /v1/load_lora_adapter and /v1/unload_lora_adapter
    special_in_messages: bool = False  # special tokens that a client writes in messages are tokens; else they are text
    request_timeout: float = 600.0  # seconds a request may take
    max_body_bytes: int = 1 << 20  # of a request
    read_timeout: float = 30.0  # seconds in which a request must have arrived, and an idle connection is kept
    write_timeout: float = 30.0  # seconds in which a client must take what is waiting for it
    drain_timeout: float = 60.0  # seconds that running requests have to finish after SIGTERM
    max_connections: int = 256  # at once

    def check(self) -> list[str]:
        notes = super().check()
        if not self.model_name_or_path:
            raise UserError("model_name_or_path: missing")
        for key, choices in (
            ("mode", ("dynamic", "static")),
            ("decode_strategy", ("sampling", "greedy_search")),
            ("cachekv_int8_type", (None, "dynamic", "static")),
            ("dtype", (None, "auto", "float32", "bfloat16")),
            ("quant", (None, *QUANT_GROUPS)),
            ("pooling_type", POOLINGS),
            ("speculate_method", (None, *METHODS)),
        ):
            if getattr(self, key) not in choices:
                raise UserError(f"{key}: {getattr(self, key)!r}; possible are {', '.join(filter(None, choices))}")
        positive = "max_length total_max_length batch_size block_size max_num_batched_tokens max_queue max_body_bytes"
        positive += " chunked_prefill_size speculate_max_draft_token_num speculate_max_ngram_size"
        for key in f"src_length num_blocks {positive} max_connections".split():
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key)}; it must be at least 1")
        for key in ("kv_cache_gb", "request_timeout"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}: {getattr(self, key)}; it must be positive")
        if not 0 <= self.port < 65536:
            raise UserError(f"port: {self.port}; it must be between 0 (any free one) and 65535")
        if self.lora_path and self.prefix_path:
            raise UserError("lora_path and prefix_path are both given; choose one")
        if self.mode == "static" and (self.lora_path or self.prefix_path):
            raise UserError("mode: static has its weights in the graph; export the merged model instead of an adapter")
        if self.mode == "static" and self.cachekv_int8_type:
            raise UserError("mode: static keeps keys and values in float32; cachekv_int8_type is for dynamic")
        if self.mode == "static" and (self.quant or self.dtype not in (None, "float32")):
            raise UserError("mode: static has its weights in the graph; dtype and quant are for dynamic")
        if self.mode == "static" and self.speculate_method:
            raise UserError("mode: static computes one token of a reply a step; speculate_method is for dynamic")
        if (self.speculate_method == "draft_model") != (self.draft_model_name_or_path is not None):
            raise UserError("speculate_method: draft_model and draft_model_name_or_path need one another")
        if sum(map(bool, (self.prompt, self.data_file, self.benchmark))) > 1:
            raise UserError("prompt, data_file and benchmark are different ways to run; give one")
        if self.system and self.prompt is None:
            raise UserError("system is the system text before prompt; records and HTTP requests have their own")
        RecordOptions.of(self)
        Access(self.api_key, self.allowed_origins, self.trusted_proxies)
        check_names(model_names(self.served_model_name, self.model_name_or_path), adapter_paths(self.lora_path))
        if self.data_file and not Path(self.data_file).is_file():
            raise UserError(f"data_file: {self.data_file}: no such file")
        self.sampling().check()
        return notes

    def sampling(self) -> SamplingParams:
        """For the offline modes; over HTTP, OpenAI's defaults apply to what a request leaves out."""
        greedy = self.decode_strategy == "greedy_search"
        return SamplingParams(
            max_tokens=self.max_length,
            min_tokens=min(self.min_length, self.max_length),
            temperature=0.0 if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


# ======================================================================================= 2. from a folder to an engine


def adapter_paths(lora_path: str | None) -> dict[str, str]:
    """`lora_path` -> {name: folder}; a folder without a name is called by its last part."""
    paths = {}
    for part in (lora_path or "").split(","):
        if part.strip():
            name, equals, path = part.strip().partition("=")
            path = path if equals else name
            name = name if equals else Path(path).name
            if not Path(path).is_dir():
                raise UserError(f"lora_path: {path}: no such folder")
            if not name or name in paths:
                raise UserError(f"lora_path: {part.strip()!r}: each needs a name of its own: name=folder,name2=folder2")
            paths[name] = path
    return paths


def check_names(names: list[str], adapters: dict) -> None:
    """UserError where an adapter has a name of the model: a request for it could mean either."""
    for name in adapters:
        if name in names:
            raise UserError(
                f"lora_path: {name!r} is the model's name; give the adapter another: other={adapters[name]}"
            )


def build_engine(args: Args) -> tuple[Engine, Tokenizer]:
    path = Path(args.model_name_or_path)
    if not open_folder(path).is_dir():
        raise UserError(f"model_name_or_path: {path}: no such folder")
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or tokenizer_folder(path), base_folders(path))
    if args.chat_template is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)
    tokenizer.special_in_messages = args.special_in_messages
    adapters, dtype = adapter_paths(args.lora_path), "float32"
    if args.mode == "static":
        model = StaticRunner(path, paddle.get_device())
        num_blocks = blocks_in_use(args, model.num_virtual_tokens, model.max_positions)
    else:
        model = open_model(path, args.prefix_path, not (adapters or args.quant or args.allow_runtime_lora))
        trainer.check_vocabulary(model, tokenizer, path)
        if args.quant:
            round_linears(model, args.quant, QUANT_GROUPS[args.quant])
        dtype = choose_dtype(model, adapters, args.dtype or "auto")
        if args.dtype in (None, "auto"):
            why = why_not_fused(model, adapters, "bfloat16")
            reason = why or "which this processor multiplies natively; --dtype float32 is exact and slower"
            print(f"dtype: {dtype}, {reason}", flush=True)
        num_virtual_tokens = model.prefix.tokens if model.prefix is not None else 0
        # twice what can be in use at once: the other half keeps prompts for later requests
        wanted = 2 * blocks_in_use(args, num_virtual_tokens, model.config.max_model_len)
        int8 = args.cachekv_int8_type is not None
        block_bytes = PagedRunner.block_bytes(model.config, args.block_size, int8, dtype)
        num_blocks = min(wanted, int(args.kv_cache_gb * 1e9) // block_bytes)
        if num_blocks < 1 and args.num_blocks is None:
            megabytes = block_bytes / 1e6
            raise UserError(f"kv_cache_gb: {args.kv_cache_gb} holds no block of {megabytes:.1f} MB; raise it")
    num_blocks = args.num_blocks or num_blocks
    engine = Engine(
        model,
        tokenizer,
        num_blocks=num_blocks,
        block_size=args.block_size,
        max_num_seqs=args.batch_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        chunked_prefill_size=args.chunked_prefill_size,
        max_model_len=args.total_max_length,
        max_queue=args.max_queue,
        seed=args.seed,
        adapters=adapters,
        int8_cache=args.cachekv_int8_type or False,
        dtype=dtype,
        int8_head=args.quant in ("w8", "w4"),
        speculator=open_speculator(args, tokenizer, num_blocks, dtype) if args.speculate_method else None,
        free_weights=not (args.keep_weights or args.allow_runtime_lora),
    )
    blocks = f"{engine.pool.num_blocks:,} blocks of {args.block_size} tokens"
    sequences = f"at most {engine.max_model_len:,} tokens a sequence, {args.batch_size} sequences at once"
    names = f"; adapters {', '.join(engine.adapters)}" if engine.adapters else ""
    print(f"engine: {blocks}, {sequences}{names}", flush=True)
    return engine, tokenizer


def open_speculator(args: Args, tokenizer: Tokenizer, num_blocks: int, dtype: str) -> NgramSpeculator | DraftSpeculator:
    """The speculator that the keys speculate_* ask for."""
    draft, sizes = None, (args.speculate_max_draft_token_num, args.speculate_max_ngram_size)
    if args.draft_model_name_or_path is not None:
        path = Path(args.draft_model_name_or_path)
        if not path.is_dir():
            raise UserError(f"draft_model_name_or_path: {path}: no such folder")
        draft = from_pretrained(path)
        trainer.check_vocabulary(draft, tokenizer, path)
        dtype = choose_dtype(draft, None, "auto" if dtype == "bfloat16" else dtype)
    return make_speculator(
        args.speculate_method, *sizes, draft, num_blocks=num_blocks, block_size=args.block_size, dtype=dtype
    )


def blocks_in_use(args: Args, num_virtual_tokens: int, max_positions: int) -> int:
    """Blocks that batch_size sequences of the greatest length take."""
    length = min(args.total_max_length + num_virtual_tokens, max_positions)
    return args.batch_size * -(-length // args.block_size)


def open_model(path: Path, prefix_path: str | None, integers: bool = False) -> CausalLM:
    """The model with a trained prefix, if there is one; integers: on those of AWQ and GGUF files, where they fit."""
    model = from_pretrained(path, integers=integers)
    if integers and (layers := [layer for layer in model.sublayers() if isinstance(layer, QuantLinear)]):
        count = sum(x.n_in * x.n_out for x in layers)
        size = sum(b.size * b.element_size() for x in layers for b in x.buffers())
        print(
            f"model: {count:,} weights as {layers[0].scheme}, {size / 1e6:,.1f} MB instead of {count / 2.5e5:,.1f} MB"
        )
    if prefix_path:
        if model.prefix is not None:
            raise UserError(f"prefix_path: {path} has a prefix of its own")
        load_adapter(model, prefix_path)
        if model.prefix is None:
            raise UserError(f"prefix_path: {prefix_path} holds a LoRA; give it as lora_path")
    return model


# =========================================================================================================== 3. main


def main(args: Args) -> None:
    engine, tokenizer = build_engine(args)
    if args.benchmark:
        benchmark(engine, args)
    elif args.prompt is not None:
        answer_prompt(engine, tokenizer, args)
    elif args.data_file is not None:
        answer_file(engine, tokenizer, args)
    else:
        if not tokenizer.has_chat_format:
            path = args.tokenizer_name_or_path or args.model_name_or_path
            print(f"chat: {path} has no chat template; messages are plain text, or give --chat_template", flush=True)
        serve_http(engine, tokenizer, args)


if __name__ == "__main__":
    trainer.run_script(main, Args)
