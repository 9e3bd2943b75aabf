"""Fused operations behind one signature each; which back end runs is decided here, once, as (choice, reason).

    import kernels
    kernels.configure(device="cpu", choice="auto")         # or choice="reference", or "rms_norm=reference,adamw=cpu"
    y = kernels.rms_norm(x, weight, 1e-5)

A back end is a module of this package with functions of the same names as the ops below: `reference.py` (plain Paddle,
on every device that Paddle knows, and the oracle of the tests) has all of them; `cpu.py` has those for which Paddle's
own CPU operators, or our own C++ under kernels/cpu/, are faster. A new chip is one more file, `kernels/<device>.py`,
holding just the ops it wants to override and, if it likes, missing(op) -> why one of them cannot run on this machine,
or None.

Choice: "auto" takes, per op, the file named after the device if it has the op, else the reference. A name forces that
back end for every op that it has (an unknown name is an error); `op=backend` forces one op and raises if the back end
lacks it.

Letters: B batch, T sequence (Tq queries, Tk keys), D model width, H query heads, K key/value heads, Dh head dim,
F feed-forward width, V vocabulary, N = B * T tokens.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator

warnings.filterwarnings("ignore", message="No ccache found")  # a line of Paddle's at import that concerns nobody here
os.environ.setdefault("GLOG_minloglevel", "1")  # nor do its notes about connections
import numpy as np
import paddle

from formats.files import UserError

OPS = (
    "rms_norm",
    "layer_norm",
    "rope",
    "swiglu",
    "geglu",
    "gelu",
    "embedding",
    "linear",
    "lora_linear",
    "quant_linear",
    "attention",
    "attention_with_lse",
    "attention_with_lse_backward",
    "paged_attention",
    "write_cache",
    "sample",
    "linear_cross_entropy",
    "adamw",
    "squared_norm",
)

WHEELS = "https://www.paddlepaddle.org.cn/packages/stable"  # Paddle's own index: what PyPI does not have
NEEDED = {  # device -> what has to be installed for it, beside the maker's driver
    "gpu": f"is NVIDIA's: paddlepaddle-gpu instead of paddlepaddle, from {WHEELS}/cu126/",
    "dcu": f"is Hygon's: paddlepaddle-dcu (Paddle for ROCm) instead of paddlepaddle, from {WHEELS}/dcu/",
    "xpu": f"is Kunlun's: paddlepaddle-xpu instead of paddlepaddle, from {WHEELS}/xpu-p800/",
    "npu": f"is Ascend's: the plug-in paddle-custom-npu beside paddlepaddle, from {WHEELS}/npu/",
    "gcu": f"is Enflame's: the plug-in paddle-custom-gcu beside paddlepaddle, from {WHEELS}/gcu/",
}

bf16 = False  # whether products of linears and of the head are made in bfloat16; set by configure()
_table = {}  # op -> (function, back end, reason); filled by configure(), on first use at the latest


def configure(device: str = "auto", choice: str = "auto", use_bf16: bool = False) -> dict:
    """Decide device and back end of every op, and make them the current ones.

    device "auto" keeps Paddle's own choice (an accelerator if this Paddle has one); else a name as in check_device().
    use_bf16 asks for products in bfloat16 where the back end has them: see bf16, and bf16_missing() for why it may
    stay False. Returns {op: (back end, reason)}. Raises UserError for a device, back end or op that does not exist.
    """
    if device != "auto":
        name = check_device(device)
        try:
            paddle.set_device(name)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"device: {device!r} cannot be used: {str(error).strip().splitlines()[-1]}") from None
    kind = _kind()
    if kind == "cpu":
        _prepare_cpu()
    forced, every = {}, None
    for part in filter(None, (p.strip() for p in choice.split(","))):
        op, equals, backend = part.partition("=")
        if equals:
            if op not in OPS:
                raise UserError(f"kernels: no op {op!r}; there are {', '.join(OPS)}")
            forced[op] = backend
        elif part != "auto":
            every = part
    table = {}
    for op in OPS:
        if op in forced:
            table[op] = (_load(forced[op], op), forced[op], "asked for")
        elif every:
            backend = every if hasattr(_module(every), op) else "reference"
            table[op] = (_load(backend, op), backend, "asked for" if backend == every else f"{every} does not have it")
        elif _exists(kind) and hasattr(_module(kind), op):
            why = _missing(kind, op)
            backend, reason = ("reference", why) if why else (kind, f"device is {kind}")
            table[op] = (_load(backend, op), backend, reason)
        else:
            table[op] = (_load("reference", op), "reference", f"no faster one for {kind}")
    _table.clear()
    _table.update(table)
    global bf16
    bf16 = use_bf16 and bf16_missing() is None
    return {op: (backend, reason) for op, (_, backend, reason) in table.items()}


def devices() -> list:
    """Names of the devices that this Paddle can use here, as check_device() takes them; "cpu" is the first."""
    found = ["cpu"]
    if paddle.is_compiled_with_cuda():
        found += [f"{_gpu()}:{i}" for i in range(paddle.device.cuda.device_count())]
    if paddle.is_compiled_with_xpu():
        found += [f"xpu:{i}" for i in range(paddle.device.xpu.device_count())]
    return found + (paddle.device.get_available_custom_device() or [])


def check_device(device: str) -> None:
    """What Paddle calls this device; UserError, with what is here and what the device would need, if it is not here.

    "cpu"; "gpu" or "gpu:1" (CUDA); "dcu:1" (ROCm, whose devices Paddle calls gpu); "xpu:0"; any other name is a device
    that one of Paddle's plug-ins brings: "npu", "gcu:1", …. Without a number Paddle takes the process's first."""
    kind, colon, index = device.partition(":")
    kind = _gpu() if kind == "gpu" else kind
    here = [(name.split(":") + ["0"])[:2] for name in devices()]  # the only device of a plug-in has no number
    kinds = {name for name, _ in here}
    if kind in kinds and (not colon or kind != "cpu" and [kind, index] in here):
        return ("gpu" if kind == "dcu" else kind) + colon + index
    found = f"device: {device!r} is not in this Paddle ({paddle.__version__}), which has {', '.join(devices())}"
    needed = NEEDED.get(kind, "is no name that Paddle itself has: a plug-in for the chip would bring it")
    raise UserError(found if kind in kinds else f"{found}; {kind} {needed}")


def _gpu():
    return "dcu" if paddle.is_compiled_with_rocm() else "gpu"


def _kind():
    """The current device's name without its number, which is that of its back end's file."""
    kind = paddle.get_device().split(":")[0]
    return _gpu() if kind == "gpu" else kind


def bf16_missing() -> str | None:
    """Why products cannot be made in bfloat16 here; None if they can."""
    kind = _kind()
    if not _exists(kind) or _table["linear"][1] != kind:
        return f"the linear of {kind} has none yet"
    return _missing(kind, "bf16")


def describe() -> str:
    """One line for the start of a run: `cpu · rms_norm cpu (device is cpu) · rope reference (…) · …`."""
    if not _table:
        configure()
    return " · ".join(
        [paddle.get_device()] + [f"{op} {backend} ({reason})" for op, (_, backend, reason) in _table.items()]
    )


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """`with kernels.use("reference"):` runs the block on that choice; for tests."""
    global bf16
    before, bf16_before = dict(_table), bf16
    configure(choice=choice, use_bf16=bf16)
    try:
        yield
    finally:
        _table.clear()
        _table.update(before)
        bf16 = bf16_before


def _prepare_cpu():
    """Four settings of the process, without which Paddle's own CPU operators run several times slower than they can.

    Threads: Paddle starts with one for matmul; take one for each core that this process may run on, or its share of
    them where the launcher has started several here (our C++ is told by the environment, see cpu/threads.h).

    Memory: the C library gives every large block back to the system at once, so each new tensor costs page faults; told
    to keep freed memory, an addition of two 15 MB tensors took 0.55 ms instead of 6.5. AMD: the MKL in Paddle's wheel
    takes its slowest path unless the vendor is Intel; named the instruction set, a float32 matmul of 1024^3 took 232
    GFLOP/s instead of 45. Both seen on two cores of an EPYC with AVX-512.

    OpenMP: MKL's threads wait busily for 0.2 s after each of its products, on the cores that our C++ could use; told to
    sleep at once, LoRA on 134 M parameters in bfloat16 made 1,090 tokens/s instead of 950, in float32 nothing changed.
    """
    if not sys.platform.startswith("linux"):
        return
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PADDLE_LOCAL_SIZE", 1)))
    paddle.base.core.set_num_threads(threads)
    os.environ["PADDLE_LLM_THREADS"] = str(threads)
    try:
        ctypes.CDLL("libiomp5.so", mode=os.RTLD_NOLOAD | os.RTLD_NOW).kmp_set_blocktime(0)
    except OSError:  # a Paddle without it
        pass
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_TOP_PAD, 64 << 20)
    with open("/proc/cpuinfo") as file:
        info = file.read(10000)
    if "AuthenticAMD" in info:
        wide = all(f" {flag} " in info for flag in ("avx512f", "avx512dq", "avx512bw", "avx512vl"))
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if wide else "5")  # read by MKL at its first product


def _exists(backend):
    return importlib.util.find_spec(f"kernels.{backend}") is not None


def _module(backend):
    if not backend.isidentifier() or backend.startswith("_") or not _exists(backend):
        raise UserError(f"kernels: no back end {backend!r}: there is no file kernels/{backend}.py")
    return importlib.import_module(f"kernels.{backend}")


def _load(backend, op):
    function = getattr(_module(backend), op, None)
    if function is None:
        raise UserError(f"kernels: kernels/{backend}.py has no {op}; ask for {op}=reference instead")
    if why := _missing(backend, op):
        raise UserError(f"kernels: {op} of kernels/{backend}.py cannot run here: {why}; ask for {op}=reference instead")
    return function


def _missing(backend, op):
    """Why a back end's op cannot run on this machine (no compiler, …), as its module says; None if it can."""
    asked = getattr(_module(backend), "missing", None)
    return asked and asked(op)


def to_tensor(array: np.ndarray) -> paddle.Tensor:
    """A numpy array's copy as a tensor, for hot paths.

    paddle.to_tensor (3.3.1) keeps 104 bytes of every call for ever, too much for a server, and paddle.assign looks at
    every element in Python (0.85 ms for 3,000 of them). Filling an empty tensor takes 2 µs and keeps nothing."""
    place = paddle.framework._current_expected_place()
    if paddle.in_dynamic_mode() and isinstance(place, paddle.CPUPlace):
        tensor = paddle._C_ops.empty([0], paddle.float32, place)
        tensor.get_tensor().set(array, place)  # takes over dtype and shape
        return tensor
    return paddle.assign(array) if array.size <= 1 << 20 else paddle.to_tensor(array)  # assign takes no more than that


def _run(op, *args, **kwargs):
    if not _table:
        configure()
    return _table[op][0](*args, **kwargs)


def rms_norm(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float, residual: paddle.Tensor | None = None
) -> paddle.Tensor | tuple:
    """h / sqrt(mean(h^2) + epsilon) * weight over the last dim, h = x + residual (Zhang & Sennrich, arXiv 1910.07467).

    x, residual (..., D), weight (D,) -> (..., D), or (that, h) with a residual. Statistics in float32.
    """
    return _run("rms_norm", x, weight, epsilon, residual)


def layer_norm(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float, residual: paddle.Tensor | None = None
) -> paddle.Tensor | tuple:
    """(h - mean(h)) / sqrt(var(h) + epsilon) * weight + bias over the last dim, h = x + residual (Ba et al., arXiv
    1607.06450).

    x, residual (..., D), weight, bias (D,) or bias None -> (..., D), or (that, h) with a residual. Statistics in
    float32."""
    return _run("layer_norm", x, weight, bias, epsilon, residual)


def rope(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, interleaved: bool = False) -> paddle.Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of the first r dims of each head; the others stay as
    they are.

    x (B, T, heads, Dh); cos, sin (B, T, 1, r) float32, r even and at most Dh -> (B, T, heads, Dh). Pair i, of r/2,
    turns by the angle of column i, which column i + r/2 repeats: it is (i, i + r/2), or, interleaved, (2 i, 2 i + 1).
    """
    return _run("rope", x, cos, sin, interleaved)


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202); both (..., F) -> (..., F)."""
    return _run("swiglu", gate, up)


def geglu(gate: paddle.Tensor, up: paddle.Tensor, approximate: bool = True) -> paddle.Tensor:
    """gelu(gate) * up (arXiv 2002.05202); both (..., F) -> (..., F). gelu(x) = x Phi(x), or approximate by tanh (arXiv
    1606.08415)."""
    return _run("geglu", gate, up, approximate)


def gelu(x: paddle.Tensor, approximate: bool = True) -> paddle.Tensor:
    """gelu(x) as in geglu, of an MLP that has no gate: (..., F) -> (..., F)."""
    return _run("gelu", x, approximate)


def embedding(ids: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """weight[ids]; ids (...) int64, weight (V, D) -> (..., D). Gradients of equal ids are summed in the order of the
    ids."""
    return _run("embedding", ids, weight)


def linear(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None, residual: paddle.Tensor | None = None
) -> paddle.Tensor:
    """x @ weight + bias + residual; x (..., in), weight (in, out), bias (out,), residual and result (..., out) in x's
    dtype.

    The weight may be stored in another dtype than x: it is converted for the product.
    """
    return _run("linear", x, weight, bias, residual)


def lora_linear(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    lora_A: paddle.Tensor,
    lora_B: paddle.Tensor,
    scaling: float,
    bias: paddle.Tensor | None = None,
    dropped: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """x @ weight + bias + scaling * (dropped or x) @ lora_A @ lora_B (Hu et al., arXiv 2106.09685).

    x and dropped (x after dropout) (..., in), weight (in, out), lora_A (in, R), lora_B (R, out) -> (..., out).
    """
    return _run("lora_linear", x, weight, lora_A, lora_B, scaling, bias, dropped)


def quant_linear(
    x: paddle.Tensor,
    qweight: paddle.Tensor,
    scales: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    scheme: str = "w8",
    qzeros: paddle.Tensor | None = None,
    g_index: paddle.Tensor | None = None,
    input_scale: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """x @ W + bias with W held as integers; x (..., in) -> (..., out) in x's dtype.

    scheme "w4", "w8" (weights alone; layout of GPTQ tools): qweight (in * bits/32, out) int32 holds the unsigned codes
    of 32/bits consecutive input rows, lowest bits first; scales (groups, out) float32; qzeros (groups, out * bits/32)
    int32 holds zero points less one, packed along out (None: 2^(bits-1), symmetric); g_index (in,) int32 is the group
    of each input row (None: equal runs in order). W[i, o] = scales[g[i], o] * (code[i, o] - zero[g[i], o]).

    scheme "a8w8": qweight (in, out) int8, scales (out,) float32; x is rounded to int8 too, with input_scale (1,) for
    all of it, or with its own largest value / 127 per token where input_scale is None. No gradient with respect to x.
    """
    return _run("quant_linear", x, qweight, scales, bias, scheme, qzeros, g_index, input_scale)


def dequantize(
    qweight: paddle.Tensor,
    scales: paddle.Tensor,
    bits: int,
    qzeros: paddle.Tensor | None = None,
    g_index: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """(in, out) float32 weights of packed codes; arguments as in quant_linear. Not a fast path: one implementation."""
    return importlib.import_module("kernels.reference").dequantize(qweight, scales, bits, qzeros, g_index)


def attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    startend_row_indices: paddle.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: paddle.Tensor | None = None,
    softcap: float | None = None,
) -> paddle.Tensor:
    """Scaled dot-product attention with FlashMask rows (arXiv 2410.01359), never a [Tq, Tk] matrix of more than a
    block.

    q (B, Tq, H, Dh), k and v (B, Tk, K, Dh) with K dividing H -> (B, Tq, H, Dh). Query i stands on row i + Tk - Tq, so
    that with a cache or a prefix the last query sees the last key. startend_row_indices int32 (B, 1 | K | H, Tk, n)
    names for each key the rows that must not see it: causal n=1 rows >= [0]; n=2 rows in [0, 1); not causal n=2 rows
    >= [0] or < [1]; n=4 rows in [0, 1) or in [2, 3). softcap makes softcap * tanh(s / softcap) of each scaled product
    s (Gemma 2, arXiv 2408.00118), after which alibi_slopes (H,) adds -slope * (row - key) (arXiv 2108.12409). A query
    that sees no key gets zeros. scale defaults to Dh ** -0.5."""
    return _run("attention", q, k, v, startend_row_indices, causal, scale, alibi_slopes, softcap)


def attention_with_lse(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    startend_row_indices: paddle.Tensor | None,
    offset: int,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: paddle.Tensor | None = None,
    softcap: float | None = None,
) -> tuple:
    """Attention over some of the keys: (its result, lse), from which parallel.py's ring makes that over all of them.

    As in attention, but query i stands on row i + offset, counted from the first of these keys, so that causal queries
    may stand before or behind all of them: rows are counted likewise and may be negative. lse (B, H, Tq) float32 is
    the logarithm of the sum of the exponentials of a query's scores, -inf where it sees no key. No gradients: see
    attention_with_lse_backward."""
    return _run("attention_with_lse", q, k, v, startend_row_indices, offset, causal, scale, alibi_slopes, softcap)


def attention_with_lse_backward(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    out: paddle.Tensor,
    lse: paddle.Tensor,
    d_out: paddle.Tensor,
    startend_row_indices: paddle.Tensor | None,
    offset: int,
    causal: bool = True,
    scale: float | None = None,
    alibi_slopes: paddle.Tensor | None = None,
    softcap: float | None = None,
) -> tuple:
    """Gradients of q, k and v from these keys alone, given out (B, Tq, H, Dh) and lse (B, H, Tq) of attention over all
    keys."""
    return _run(
        "attention_with_lse_backward",
        q,
        k,
        v,
        out,
        lse,
        d_out,
        startend_row_indices,
        offset,
        causal,
        scale,
        alibi_slopes,
        softcap,
    )


def paged_attention(
    q: paddle.Tensor,
    k_cache: paddle.Tensor,
    v_cache: paddle.Tensor,
    block_tables: np.ndarray,
    query_lengths: np.ndarray,
    context_lengths: np.ndarray,
    scale: float | None = None,
    k_scales: paddle.Tensor | None = None,
    v_scales: paddle.Tensor | None = None,
    alibi_slopes: paddle.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> paddle.Tensor:
    """Causal attention of several sequences whose keys and values lie in blocks of a pool (Kwon et al., arXiv
    2309.06180).

    q (N, H, Dh): the queries of all S sequences one after another; k_cache, v_cache (blocks, block_size, K, Dh), the
    new tokens in place already; block_tables (S, most blocks) int32, query_lengths and context_lengths (S,), numpy: a
    sequence's context includes its queries, query j stands at context - query + j -> (N, H, Dh). Arrays that are not
    writeable may be taken for the same as in the last call if they are the same objects: of a step's layers, all but
    the first are spared the look at them.

    Caches may be int8 with k_scales, v_scales (blocks, block_size, K) float32: a value is its code times the scale of
    its slot and head. With a window a query at p sees the keys above p - window alone; alibi_slopes and softcap are as
    in attention. No gradients."""
    return _run(
        "paged_attention",
        q,
        k_cache,
        v_cache,
        block_tables,
        query_lengths,
        context_lengths,
        scale,
        k_scales,
        v_scales,
        alibi_slopes,
        window,
        softcap,
    )


def write_cache(
    k: paddle.Tensor,
    v: paddle.Tensor,
    k_cache: paddle.Tensor,
    v_cache: paddle.Tensor,
    slots: paddle.Tensor,
    k_scales: paddle.Tensor | None = None,
    v_scales: paddle.Tensor | None = None,
) -> None:
    """Put new keys and values into a pool, in place: token i into slot slots[i] = block * block_size + place in the
    block.

    k, v (N, K, Dh) float32; caches and scales as in paged_attention; slots (N,) int64 tensor, none of them twice. int8
    caches take round(x * 127 / most) and the scale most / 127, most being the largest absolute value of a token's head.
    """
    _run("write_cache", k, v, k_cache, v_cache, slots, k_scales, v_scales)


def sample(logits: paddle.Tensor, temperature: tuple, top_k: tuple, top_p: tuple, uniform: tuple) -> paddle.Tensor:
    """Choose an id of each row: model.sample says how; here the random number is given, and rows differ in their ways.

    logits (S, V) float32 tensor; per row, as numpy (S,): temperature (0: the likeliest, the first of equals), top_k
    (0: all), top_p, and uniform in [0, 1), what numpy's Generator.choice would draw -> (S,) int64 tensor, -1 for a row
    with NaN or whose largest logit is infinite."""
    return _run("sample", logits, temperature, top_k, top_p, uniform)


def linear_cross_entropy(
    hidden: paddle.Tensor,
    weight: paddle.Tensor,
    labels: paddle.Tensor,
    transpose_weight: bool = False,
    ignore_index: int = -100,
    return_predictions: bool = False,
    vocabulary: object = None,
    softcap: float | None = None,
) -> paddle.Tensor | tuple:
    """Cross-entropy of softmax(hidden @ weight) against labels, in chunks: the [N, V] logits never exist at once.

    hidden (N, D), weight (D, V) or, with transpose_weight, (V, D); labels (N,) int64 -> losses (N,) float32, 0 where
    ignored; with return_predictions also the argmax ids (N,) int64, -1 where ignored. Rows with an ignored label are
    not computed at all. Gradients of hidden with a frozen weight are made in forward: two products in place of three.

    vocabulary: several ranks hold V columns each (arXiv 1909.08053, 3). An object with `start`, the id of this rank's
    first column, and all_reduce(tensor, "max" | "sum") -> tensor over the ranks. labels are ids of the whole
    vocabulary; losses and predictions come out the same on every rank (the lowest id, of several largest logits), the
    gradient of hidden is this rank's part, which the caller adds up.

    softcap makes softcap * tanh(l / softcap) of each logit l (Gemma 2, arXiv 2408.00118).
    """
    return _run(
        "linear_cross_entropy",
        hidden,
        weight,
        labels,
        transpose_weight,
        ignore_index,
        return_predictions,
        vocabulary,
        softcap,
    )


def adamw(
    parameter: paddle.Tensor,
    gradient: paddle.Tensor,
    moment1: paddle.Tensor,
    moment2: paddle.Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step (Loshchilov & Hutter, arXiv 1711.05101), in place on parameter, moment1 and moment2.

    gradient is multiplied by grad_scale (clipping) first; step counts from 1. The decay is lr * weight_decay *
    parameter. parameter and gradient float32, bfloat16 or float16, moments float32: all is computed in float32."""
    return _run(
        "adamw", parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale
    )


def squared_norm(x: paddle.Tensor) -> paddle.Tensor:
    """The sum of squares of all values of x, () float64."""
    return _run("squared_norm", x)
