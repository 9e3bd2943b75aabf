"""What another program makes of an exported model: its ids of texts, its greedy tokens and its logits.

    reply = ask_client(python, "llama_cpp", path, texts, prompts, tokens)      # Reply
    line = compare(reply, logits_of, ids_of, tolerance)                        # UserError if they do not agree

The client runs in its own Python, which has llama_cpp (GGUF), vllm or transformers (folders). It takes its own greedy
tokens; ours are computed over the same ones, so that the first token that differs follows the same text on both sides.
"""

import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from formats.files import UserError

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    " Leading space, tabs\tand\n\nline breaks   and runs",
    "naïve café – “quoted”, 東京 and 🙂 emoji's",
    "def f(x):\n    return x[1:] + 2025 * 3.14159\n",
)
QUESTIONS = (
    "What is the capital of France?", "Name three colors.", "Write a short poem about the sea.", "What is 12 times 7?",
    "Explain what a compiler does.", "Who wrote Hamlet?", "Give me a recipe for pancakes.", "Why is the sky blue?",
    "Translate good morning to Spanish.", "What does HTTP stand for?", "List the planets.", "What is a prime number?",
    "Tell me a joke.", "How do I sort a list in Python?", "What is photosynthesis?", "Tell me about Cinderella.",
    "What is the boiling point of water?", "Describe a sunset.", "How long is a leap year?", "What is gravity?",
)  # fmt: skip
CLIENTS = {  # format of export.py: its clients, the first that a Python can import is asked
    "hf": ["transformers", "vllm"],
    "gguf": ["llama_cpp"],
    "compressed-tensors": ["vllm", "transformers"],
    "awq": ["vllm", "transformers"],
    "fp8": ["vllm", "transformers"],
}
# Of compare(), by how weights are stored; "hf": floats. llama.cpp keeps keys in 16 bits, vllm runs 4 bits in float16.
# The others round activations: llama.cpp to 8 bits where weights are quantized, fp8 as it says.
TOLERANCE = {"hf": 0.001, "F32": 0.005, "F16": 0.01, "BF16": 0.05, "gptq": 0.02, "awq": 0.02, "fp8": 0.2}
TOLERANCE |= {"weight_only_fp8": 0.001}
ROUNDED_INPUTS = 0.15
# Where both sides round activations, a difference of 1e-6 that crosses a step grows from layer to layer, until the
# errors of rounding have only their size in common. So that is compared: what rounding changes of the logits there,
# beside what it changes here. A client that does not round changes nothing, one with other scales more.
SAME_SIZE = 1.25

_HEAD = """
import json, os, sys
import numpy as np
job = json.load(sys.stdin)
ids, tokens, logits = [], [], []
"""
_CONFIG = """
config = open(os.path.join(job["model"], "config.json")).read()
in_float16 = '"quant_method": "gptq"' in config or '"quant_method": "awq"' in config
"""
_TAIL = """
np.savez(job["out"], ids=json.dumps(ids), tokens=json.dumps(tokens), **{f"logits_{i}": a for i, a in enumerate(logits)})
"""
_SCRIPTS = {
    "llama_cpp": """
import llama_cpp
context = max(map(len, job["prompts"])) + job["count"] + 8
llm = llama_cpp.Llama(job["model"], n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=1)
ids = [llm.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
for prompt in job["prompts"]:
    llm.reset()
    llm.eval(prompt)
    new = []
    for _ in range(job["count"]):
        new.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        if new[-1] in job["stops"]:
            break
        llm.eval(new[-1:])
    first = len(prompt) - 1
    tokens.append(new)
    logits.append(np.array(llm.scores[first : first + len(new)], np.float32))
""",
    "transformers": _CONFIG
    + """
import torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
dtype = torch.float16 if in_float16 else torch.float32  # gptqmodel's kernels, which AWQ has too
model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
ids = [tokenizer(text)["input_ids"] for text in job["texts"]]
model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=job["stops"] or None)
width = max(map(len, job["prompts"]))
prompts = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in job["prompts"]])
mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in job["prompts"]])
options = dict(max_new_tokens=job["count"], do_sample=False, output_logits=True, return_dict_in_generate=True)
out = model.generate(prompts, attention_mask=mask, **options)  # all at once: gptqmodel unpacks weights for each
rows = torch.stack(out.logits, 1).float().numpy()
for new, row in zip(out.sequences[:, width:].tolist(), rows):
    ends = [i + 1 for i, token in enumerate(new) if token in job["stops"]]
    tokens.append(new[: ends[0] if ends else len(new)])
    logits.append(row[: len(tokens[-1])])
""",
    "vllm": _CONFIG
    + """
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
import vllm
try:  # its kernel of int8 for AMX has no float32, and rounds each token by its own largest value whatever the file says
    import vllm.model_executor.kernels.linear.scaled_mm.cpu as int8
    int8.check_cpu_sgl_kernel = lambda *shape: False
except ImportError:
    pass
length = max(map(len, job["prompts"])) + job["count"] + 8
dtype = "float16" if in_float16 or "pack-quantized" in config else "float32"  # those kernels have no float32
llm = vllm.LLM(job["model"], dtype=dtype, max_model_len=length, enforce_eager=True, seed=0)
ids = [llm.get_tokenizer()(text)["input_ids"] for text in job["texts"]]
params = vllm.SamplingParams(temperature=0, max_tokens=job["count"], stop_token_ids=job["stops"], logprobs=20)
for out in llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], params, use_tqdm=False):
    tokens.append(list(out.outputs[0].token_ids))
    rows = np.full((len(tokens[-1]), job["vocab_size"]), np.nan, np.float32)
    for row, largest in zip(rows, out.outputs[0].logprobs):
        row[list(largest)] = [entry.logprob for entry in largest.values()]
    logits.append(rows)
""",
}


@dataclasses.dataclass
class Reply:
    client: str
    ids: list[list[int]]  # of the texts
    tokens: list[list[int]]  # greedy, of each prompt
    logits: list[np.ndarray]  # of each prompt: (tokens, V), from which the tokens were chosen; NaN: not told


def ask_client(
    python: str,
    client: str,
    model: Path,
    texts: list[str],
    prompts: list[list[int]],
    count: int,
    stops: list[int],
    vocab_size: int,
) -> Reply:
    """Run a client of _SCRIPTS in its Python. UserError with its last line if it fails.

    vllm tells log-probabilities of the 20 most likely tokens; the others' are NaN.
    """
    job = {"model": str(model), "texts": texts, "prompts": prompts, "count": count, "stops": stops}
    job["vocab_size"] = vocab_size
    with tempfile.TemporaryDirectory(prefix="client-") as folder:
        job["out"] = str(Path(folder) / "reply.npz")
        script = Path(folder) / "ask.py"
        guarded = "\n".join("    " + line for line in (_HEAD + _SCRIPTS[client] + _TAIL).splitlines())
        script.write_text(f'if __name__ == "__main__":\n{guarded}\n')
        try:
            done = subprocess.run([python, script], input=json.dumps(job), capture_output=True, text=True, cwd=folder)
        except OSError as error:
            raise UserError(f"verify_with: {python} cannot be started: {error.strerror}") from None
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            reasons = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
            raise UserError(f"verify_with: {client} in {python} failed: {(reasons or lines)[-1]}")
        with np.load(job["out"]) as saved:
            logits = [saved[f"logits_{i}"] for i in range(len(prompts))]
            return Reply(client, json.loads(str(saved["ids"])), json.loads(str(saved["tokens"])), logits)


def importable_client(python: str, clients: list[str]) -> str:
    """The first of `clients` that this Python can import; UserError if it has none."""
    names = ", ".join(map(repr, clients))
    code = f"import importlib.util as u; print(next((n for n in [{names}] if u.find_spec(n)), ''))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"verify_with: {python} cannot be started: {error.strerror}") from None
    if not done.stdout.strip():
        raise UserError(f"verify_with: {python} has none of {', '.join(clients)}")
    return done.stdout.strip()


def check_ids(texts: Sequence[str], theirs: list[list[int]], ours: list[list[int]], who: str) -> int:
    """How many texts have the same ids; a note for each other one, UserError if it is the first, a plain sentence.

    llama.cpp's sentencepiece puts a space before every text and behind every special token, which others do not.
    """
    differ = [i for i in range(len(texts)) if theirs[i] != ours[i]]
    for i in differ:
        what = f"{who} reads {texts[i]!r} as {theirs[i]}, the tokenizer as {ours[i]}"
        if i == 0:
            raise UserError(f"export refused: {what}")
        print(f"note: {what}", flush=True)
    return len(texts) - len(differ)


def compare(
    reply: Reply,
    texts: list[str],
    expected_ids: list[list[int]],
    logits_of: Callable[[int, list[int]], np.ndarray],
    tolerance: float,
    unrounded_of: Callable[[int, list[int]], np.ndarray] | None = None,
) -> str:
    """A line on how the client's ids, greedy tokens and logits compare with ours; a note for each prompt that differs.

    logits_of(prompt number, tokens) are ours, (tokens, V), over the client's own tokens. tolerance is of the root mean
    square of the logits' differences beside that of the logits around their mean. Where the client takes another token
    than ours, its logit here may be below the largest by 8 root mean squares of the row's differences: so much the
    client's rounding explains. UserError beyond both, and for ids that check_ids() refuses.

    unrounded_of: as logits_of, of the same weights without rounded activations, where both sides round them: the
    tolerance is then 1.5 times the size of rounding here, and that of the client must be within SAME_SIZE of it.
    """
    same = check_ids(texts, reply.ids, expected_ids, reply.client)
    equal, equal_prompts, count, squares, of_logits, largest = 0, 0, 0, 0.0, 0.0, 0.0
    rounding = np.zeros(2)  # squares: ours, the client's
    for number, (tokens, theirs) in enumerate(zip(reply.tokens, reply.logits)):
        ours = logits_of(number, tokens)
        gap = ours.max(1) - np.take_along_axis(ours, np.array(tokens)[:, None], 1)[:, 0]
        differences = _differences(ours, theirs)
        error = np.sqrt(np.nanmean(np.square(differences), 1))
        largest = max(largest, float(np.nanmax(np.abs(differences))))
        if unrounded_of is not None:
            plain, told = unrounded_of(number, tokens), np.where(np.isnan(theirs), theirs, ours)
            rounding += [np.nanmean(np.square(_differences(plain, x)), 1).sum() for x in (told, theirs)]
        squares, of_logits = squares + float(np.square(error).sum()), of_logits + float(ours.var(1).sum())
        equal, count = equal + int((gap == 0).sum()), count + len(tokens)
        equal_prompts += int((gap == 0).all())
        if (gap > 8 * error).any():
            at = int((gap - 8 * error).argmax())
            raise UserError(
                f"export refused: prompt {number}: token {at} of {reply.client} has a logit {gap[at]:.3g} below the "
                f"largest here; its rounding explains {8 * error[at]:.3g}"
            )
        if (gap > 0).any():
            at = int((gap > 0).argmax())
            above = theirs[at, tokens[at]] - theirs[at, ours[at].argmax()]
            print(
                f"note: prompt {number}: the first {at} tokens are the same; then {reply.client} takes {tokens[at]}, "
                f"not {ours[at].argmax()}: its logit is {above:.3g} above there, {gap[at]:.3g} below here",
                flush=True,
            )
    relative, note = (squares / of_logits) ** 0.5, ""
    if unrounded_of is not None:
        tolerance, note = _same_rounding(*np.sqrt(rounding / of_logits), reply.client)
    if relative > tolerance:
        raise UserError(
            f"export refused: logits of {reply.client} differ by {relative:.2%} (root mean square), at most "
            f"{tolerance:.2%} is right"
        )
    return (
        f"{reply.client}: same ids of {same} of {len(texts)} texts, same tokens after {equal_prompts} of "
        f"{len(reply.tokens)} prompts (at {equal} of {count} steps); logits differ by {relative:.3%} (root mean "
        f"square), {largest:.3g} at most{note}"
    )


def _same_rounding(here: float, there: float, client: str) -> tuple[float, str]:
    """(how far the logits may be apart, a note) for what rounding activations changes; UserError for other sizes."""
    note = f"; rounded activations change {there:.2%} there, {here:.2%} here"
    if not 1 / SAME_SIZE <= there / max(here, 1e-12) <= SAME_SIZE:
        raise UserError(f"export refused: {client} rounds activations otherwise{note}")
    return 1.5 * here, note


def _differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(tokens, V); where only log-probabilities of some tokens are told, logits less a constant, about their mean."""
    differences = ours - theirs
    return differences - np.nanmean(differences, 1, keepdims=True) if np.isnan(theirs).any() else differences
