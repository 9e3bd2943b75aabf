"""Fused operations behind one signature each; which back end runs is decided here, once, as (choice, reason).

    import kernels
    kernels.configure(device="cpu", choice="auto")         # or choice="reference", or "rms_norm=reference,adamw=cpu"
    y = kernels.rms_norm(x, weight, 1e-5)

A back end is a module of this package with functions that have the names of the ops below. `reference.py` has all ops
in plain Paddle, for every device that Paddle supports; the tests compare the others with it. `cpu.py` has the ops for
which other Paddle operators, or our C++ in kernels/cpu/, are faster; `gpu.py` is the same for NVIDIA GPUs. A new chip
is one more file, `kernels/<device>.py`, with the ops that it overrides and, optionally, missing(op) -> the reason why
an op cannot run on this machine, or None.

Choice: "auto" takes, per op, the file named after the device if it has the op, else the reference. The name of a back
end forces it for every op that it has (an unknown name is an error). `op=backend` forces one op, and raises an error if
the back end lacks it.

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

warnings.filterwarnings("ignore", message="No ccache found")  # printed when Paddle is imported; no use here
os.environ.setdefault("GLOG_minloglevel", "1")  # the same for its notes about connections
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
    "dequantize_table",
    "attention",
    "attention_with_lse",
    "attention_with_lse_backward",
    "paged_attention",
    "write_cache",
    "sample",
    "log_probabilities",
    "linear_cross_entropy",
    "adamw",
    "squared_norm",
)

WHEELS = "https://www.paddlepaddle.org.cn/packages/stable"  # Paddle's index, for packages that are not on PyPI
NEEDED = {  # device: the package that it needs besides the maker's driver
    "gpu": f"is NVIDIA's: paddlepaddle-gpu instead of paddlepaddle, from {WHEELS}/cu126/",
    "dcu": f"is Hygon's: paddlepaddle-dcu (Paddle for ROCm) instead of paddlepaddle, from {WHEELS}/dcu/",
    "xpu": f"is Kunlun's: paddlepaddle-xpu instead of paddlepaddle, from {WHEELS}/xpu-p800/",
    "npu": f"is Ascend's: the plug-in paddle-custom-npu beside paddlepaddle, from {WHEELS}/npu/",
    "gcu": f"is Enflame's: the plug-in paddle-custom-gcu beside paddlepaddle, from {WHEELS}/gcu/",
}

bf16 = False  # matrix products in bfloat16; set by configure()
few_alike = False  # a product of one row has the bits that it has among others; set by products_of_few_alike()
_table = {}  # op: (function, back end, reason); filled by configure(), at the latest on first use


def configure(device: str = "auto", choice: str = "auto", use_bf16: bool = False) -> dict:
    """Decide device and back end of every op, and make them the current ones.

    device: "auto" (Paddle's choice: an accelerator if this Paddle has one) or a name as in check_device(). choice: see
    the top of this file. use_bf16: compute products in bfloat16 if the back end can; sets kernels.bf16, and
    bf16_missing() gives the reason if it cannot. Returns {op: (back end, reason)}. Raises UserError for an unknown
    device, back end or op.
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


def devices() -> list[str]:
    """Names of the devices that this Paddle can use on this machine, as check_device() takes them; "cpu" first."""
    names = ["cpu"]
    if paddle.is_compiled_with_cuda():
        names += [f"{_gpu()}:{i}" for i in range(paddle.device.cuda.device_count())]
    if paddle.is_compiled_with_xpu():
        names += [f"xpu:{i}" for i in range(paddle.device.xpu.device_count())]
    return names + (paddle.device.get_available_custom_device() or [])


def check_device(device: str) -> str:
    """Paddle's name of this device. Raises UserError, with the devices that exist and what this one needs, if missing.

    device: "cpu"; "gpu" or "gpu:1" (CUDA); "dcu:1" (ROCm; Paddle calls it gpu); "xpu:0"; or a device of a Paddle
    plug-in: "npu", "gcu:1", …. Without a number, Paddle takes the first device of the process.
    """
    kind, colon, index = device.partition(":")
    kind = _gpu() if kind == "gpu" else kind
    here = [(name.split(":") + ["0"])[:2] for name in devices()]  # a plug-in's only device has no number
    kinds = {name for name, _ in here}
    if kind in kinds and (not colon or kind != "cpu" and [kind, index] in here):
        return ("gpu" if kind == "dcu" else kind) + colon + index
    message = f"device: {device!r} is not in this Paddle ({paddle.__version__}), which has {', '.join(devices())}"
    needed = NEEDED.get(kind, "is not a device of Paddle itself: it needs a plug-in of the chip's maker")
    raise UserError(message if kind in kinds else f"{message}; {kind} {needed}")


def _gpu():
    return "dcu" if paddle.is_compiled_with_rocm() else "gpu"


def _kind():
    """The current device without its number: the name of its back end's file."""
    kind = paddle.get_device().split(":")[0]
    return _gpu() if kind == "gpu" else kind


def bf16_missing() -> str | None:
    """The reason why matrix products in bfloat16 are not possible here; None if they are."""
    kind = _kind()
    if not _exists(kind) or _table["linear"][1] != kind:
        return f"the linear of {kind} cannot do it yet"
    return _missing(kind, "bf16")


def fused_missing() -> str | None:
    """The reason why kernels.fused.FusedMultiTransformer cannot run a server's steps here; None if it can."""
    if not _table:
        configure()
    kind = _kind()
    if kind != "cpu":
        return f"there is no fused_multi_transformer for {kind}"
    if _table["paged_attention"][1] != kind:
        return f"paged_attention is {_table['paged_attention'][1]} ({_table['paged_attention'][2]})"
    return _missing(kind, "fused_multi_transformer")


def describe() -> str:
    """One line for the start of a run: `cpu · rms_norm cpu (device is cpu) · rope reference (…) · …`."""
    if not _table:
        configure()
    return " · ".join(
        [paddle.get_device()] + [f"{op} {backend} ({reason})" for op, (_, backend, reason) in _table.items()]
    )


def summary() -> str:
    """describe() in a few words: `19 ops by cpu (device is cpu)`; back ends with few ops name them."""
    if not _table:
        configure()
    groups = {}
    for op, (_, backend, reason) in _table.items():
        groups.setdefault((backend, reason), []).append(op)
    parts = []
    for (backend, reason), ops in sorted(groups.items(), key=lambda item: -len(item[1])):
        parts.append(f"{', '.join(ops) if len(ops) < 4 else f'{len(ops)} ops'} by {backend} ({reason})")
    return "; ".join(parts)


@contextlib.contextmanager
def products_of_few_alike() -> Iterator[None]:
    """Within, linear() and quant_linear() give a row the same bits alone and among up to 32, without gradients."""
    global few_alike
    before, few_alike = few_alike, True
    try:
        yield
    finally:
        few_alike = before


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """`with kernels.use("reference"):` runs the block with that choice; for tests."""
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
    """Four settings of the process; without them, Paddle's CPU operators run several times slower.

    Threads: Paddle starts with one for matmul. Set one per core of this process, or its share of the cores if the
    launcher started several processes here. Our C++ reads the number from the environment (see cpu/threads.h).

    Memory: the C library returns every large block to the system at once, so each new tensor costs page faults. With
    freed memory kept, the sum of two 15 MB tensors takes 0.55 ms instead of 6.5.

    AMD: MKL takes its slowest path unless the vendor is Intel. With the instruction set named, a float32 matmul of
    1024^3 reaches 232 GFLOP/s instead of 45. Memory and AMD were measured on two cores of an EPYC with AVX-512.

    OpenMP: MKL's threads spin for 0.2 s after each product, on cores that our C++ could use. If they sleep at once,
    LoRA on 134 M parameters in bfloat16 runs at 1,090 tokens/s instead of 950; float32 does not change.
    """
    if not sys.platform.startswith("linux"):
        return
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PADDLE_LOCAL_SIZE", 1)))
    paddle.base.core.set_num_threads(threads)
    os.environ["PADDLE_LLM_THREADS"] = str(threads)
    try:
        ctypes.CDLL("libiomp5.so", mode=os.RTLD_NOLOAD | os.RTLD_NOW).kmp_set_blocktime(0)
    except OSError:  # this Paddle has no libiomp5
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


def trim_memory() -> None:
    """Freed memory goes back to the system; glibc keeps most of it otherwise."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


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
    """The reason why a back end's op cannot run on this machine (no compiler, …); None if it can."""
    missing = getattr(_module(backend), "missing", None)
    return missing and missing(op)


def to_tensor(array: np.ndarray, share: bool = False) -> paddle.Tensor:
    """Copy a numpy array into a tensor; for hot paths. share: on a CPU, use its memory instead.

    paddle.to_tensor (3.3.1) leaks 104 bytes per call, too much for a server, and paddle.assign visits every element in
    Python (0.85 ms for 3,000). Filling an empty tensor takes 2 µs and leaks nothing.
    """
    place = paddle.framework._current_expected_place()
    if paddle.in_dynamic_mode() and isinstance(place, paddle.CPUPlace):
        tensor = paddle._C_ops.empty([0], paddle.float32, place)
        tensor.get_tensor().set(array, place, share)  # sets dtype and shape too
        return tensor
    return paddle.assign(array) if array.size <= 1 << 20 else paddle.to_tensor(array)  # the limit of assign


def _run(op, *args, **kwargs):
    if not _table:
        configure()
    return _table[op][0](*args, **kwargs)


def rms_norm(
    x: paddle.Tensor, weight: paddle.Tensor, epsilon: float, residual: paddle.Tensor | None = None
) -> paddle.Tensor | tuple:
    """h / sqrt(mean(h^2) + epsilon) * weight over the last dim, h = x + residual (Zhang & Sennrich, arXiv 1910.07467).

    x, residual (..., D), weight (D,) -> y (..., D), or (y, h) with a residual. Statistics in float32.
    """
    return _run("rms_norm", x, weight, epsilon, residual)


def layer_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None,
    epsilon: float,
    residual: paddle.Tensor | None = None,
) -> paddle.Tensor | tuple:
    """(h - mean(h)) / sqrt(var(h) + epsilon) * weight + bias over the last dim, h = x + residual (arXiv 1607.06450).

    x, residual (..., D), weight (D,), bias (D,) or None -> y (..., D), or (y, h) with a residual. Statistics in
    float32.
    """
    return _run("layer_norm", x, weight, bias, epsilon, residual)


def rope(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, interleaved: bool = False) -> paddle.Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of the first r dims of each head; the rest is unchanged.

    x (B, T, heads, Dh); cos, sin (B, T, 1, r) float32, r even and at most Dh -> (B, T, heads, Dh). Column i and column
    i + r/2 of the tables hold the angle of pair i < r/2: dims (i, i + r/2) or, if interleaved, dims (2 i, 2 i + 1).
    """
    return _run("rope", x, cos, sin, interleaved)


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202); both (..., F) -> (..., F)."""
    return _run("swiglu", gate, up)


def geglu(gate: paddle.Tensor, up: paddle.Tensor, approximate: bool = True) -> paddle.Tensor:
    """gelu(gate) * up (arXiv 2002.05202); both (..., F) -> (..., F).

    gelu(x) = x Phi(x); approximate: the tanh formula (arXiv 1606.08415).
    """
    return _run("geglu", gate, up, approximate)


def gelu(x: paddle.Tensor, approximate: bool = True) -> paddle.Tensor:
    """gelu(x) as in geglu, for an MLP without a gate: (..., F) -> (..., F)."""
    return _run("gelu", x, approximate)


def embedding(ids: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """weight[ids]; ids (...) int64, weight (V, D) -> (..., D). Gradients of equal ids are summed in order."""
    return _run("embedding", ids, weight)


class ComputedWeight:
    """A frozen weight that linear() and lora_linear() take in place of a tensor: it is computed for a product, and for
    the gradient of x once more, so that nothing of it is kept between them."""

    shape: list[int]  # [in, out]
    stop_gradient = True

    def computed(self, transposed: bool, dtype: str) -> paddle.Tensor:
        """(in, out), or (out, in) transposed; "float32" or "bfloat16", or another type that x has."""
        raise NotImplementedError


def linear(
    x: paddle.Tensor,
    weight: paddle.Tensor | ComputedWeight,
    bias: paddle.Tensor | None = None,
    residual: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """x @ weight + bias + residual.

    x (..., in), weight (in, out), bias (out,), residual (..., out) -> (..., out) in x's dtype. A weight of another
    dtype is converted to x's for the product.
    """
    return _run("linear", x, weight, bias, residual)


def lora_linear(
    x: paddle.Tensor,
    weight: paddle.Tensor | ComputedWeight,
    lora_A: paddle.Tensor,
    lora_B: paddle.Tensor,
    scaling: float,
    bias: paddle.Tensor | None = None,
    dropped: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """x @ weight + bias + scaling * (dropped or x) @ lora_A @ lora_B (Hu et al., arXiv 2106.09685).

    x (..., in), dropped (x after dropout) (..., in), weight (in, out), lora_A (in, R), lora_B (R, out) -> (..., out).
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
    """x @ W + bias with W stored as integers; x (..., in) -> (..., out) in x's dtype.

    scheme "w4", "w8" (only weights; layout of GPTQ tools): qweight (in * bits/32, out) int32 packs the unsigned codes
    of 32/bits consecutive input rows, lowest bits first. scales (groups, out) float32. qzeros (groups, out * bits/32)
    int32 packs zero points minus 1 along out; None: 2^(bits-1), symmetric. g_index (in,) int32: the group of each input
    row; None: groups are equal runs of rows. W[i, o] = scales[g[i], o] * (code[i, o] - zero[g[i], o]).

    scheme "a8w8": qweight (in, out) int8, scales (out,) float32. x is rounded to int8 too, with input_scale (1,) for
    all tokens or, if None, with max |x| / 127 per token. No gradient with respect to x.
    """
    return _run("quant_linear", x, qweight, scales, bias, scheme, qzeros, g_index, input_scale)


def dequantize(
    qweight: paddle.Tensor,
    scales: paddle.Tensor,
    bits: int,
    qzeros: paddle.Tensor | None = None,
    g_index: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Packed codes -> weights (in, out) float32; arguments as in quant_linear. Has only a reference implementation."""
    return importlib.import_module("kernels.reference").dequantize(qweight, scales, bits, qzeros, g_index)


def round_to_float8(x: paddle.Tensor, scale: paddle.Tensor | None = None) -> paddle.Tensor:
    """x (..., n) rounded to e4m3 with a scale (1,) for all tokens or, if None, max |x| / 448 of each; in x's dtype.

    Has only a reference implementation."""
    return importlib.import_module("kernels.reference").round_to_float8(x, scale)


def dequantize_table(
    codes: paddle.Tensor,
    scales: paddle.Tensor,
    values: paddle.Tensor,
    n_in: int,
    n_out: int,
    transposed: bool = False,
    dtype: str = "float32",
) -> paddle.Tensor:
    """Codes with a scale per block (nf4, fp4, int8, int4 of low_bit.py) -> weight (in, out), or (out, in) transposed.

    codes uint8: the weight (out, in), flat, in blocks of equal length, the last filled up. values float32: of each
    code, (256,) for one code a byte, (16,) for two, the first in the high bits. scales (blocks,) float32. dtype:
    float32 or bfloat16. The order in which codes lie is (out, in): transposed is faster.
    """
    return _run("dequantize_table", codes, scales, values, n_in, n_out, transposed, dtype)


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
    """Scaled dot-product attention with FlashMask rows (arXiv 2410.01359), in blocks: memory is linear in T.

    q (B, Tq, H, Dh), k and v (B, Tk, K, Dh), K divides H -> (B, Tq, H, Dh). Query i has row i + Tk - Tq: with a cache
    or a prefix, the last query sees the last key. scale: None means Dh ** -0.5. A query that sees no key gets zeros.

    startend_row_indices int32 (B, 1 | K | H, Tk, n) gives, per key, the rows that must not see it. causal: n=1 rows
    >= [0]; n=2 rows in [0, 1). Not causal: n=2 rows >= [0] or < [1]; n=4 rows in [0, 1) or in [2, 3).

    softcap: a scaled score s becomes softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118). alibi_slopes (H,): then
    -slope * (row - key) is added (arXiv 2108.12409).
    """
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
    """Attention over a part of the keys, for ring attention: (out, lse), from which parts are merged.

    As attention, but query i has row i + offset, counted from the first of these keys; causal queries may be before or
    after all of them, and rows may be negative. lse (B, H, Tq) float32: logsumexp of a query's scores, -inf if it sees
    no key. No gradients: see attention_with_lse_backward.
    """
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
    """Gradients (dq, dk, dv) from a part of the keys; out (B, Tq, H, Dh) and lse (B, H, Tq) are those of all keys."""
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
    """Causal attention of S sequences whose keys and values are in blocks of a pool (Kwon et al., arXiv 2309.06180).

    q (N, H, Dh): the queries of all sequences in a row -> (N, H, Dh). k_cache, v_cache (blocks, block_size, K, Dh)
    already contain the new tokens. numpy: block_tables (S, max_blocks) int32, query_lengths (S,), context_lengths (S,),
    which count the queries too: query j is at position context - query + j. Arrays that are not writeable and are the
    same objects as in the last call are taken as unchanged, which saves checks in all layers of a step but the first.

    int8 caches have k_scales, v_scales (blocks, block_size, K) float32: a value is code * scale of its slot and head.
    window: a query at position p sees only keys at positions > p - window. alibi_slopes, softcap: as in attention. No
    gradients.
    """
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
    """Write new keys and values into a pool, in place: token i to slot slots[i] = block * block_size + index in block.

    k, v (N, K, Dh) float32; caches and scales as in paged_attention; slots (N,) int64 tensor, all different. An int8
    cache gets round(x * 127 / m) and the scale m / 127, where m is max |x| of a token's head.
    """
    _run("write_cache", k, v, k_cache, v_cache, slots, k_scales, v_scales)


def sample(
    logits: paddle.Tensor,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    uniform: np.ndarray,
    said: list[np.ndarray] | None = None,
    penalties: list[tuple] | None = None,
) -> paddle.Tensor:
    """Sample one id per row, as reference.sample_logits does, with the random numbers given.

    logits (S, V) float32. numpy (S,): temperature (0: the largest logit, the first of equals), top_k (0: all), top_p,
    and uniform in [0, 1), which numpy's Generator.choice would draw -> ids (S,) int64 tensor; -1 for a row that has NaN
    or an infinite largest logit.

    said: for each row (n, 2) int64, different ids of prompt and reply and how often each occurs in the reply. Their
    logits are first changed by penalties (S, 3): divided by the repetition penalty, or multiplied if negative (Keskar
    et al., arXiv 1909.05858); then lowered by the presence penalty if they occur in the reply, and by the frequency
    penalty for each time. The tensor has them for as long as the call lasts.
    """
    return _run("sample", logits, temperature, top_k, top_p, uniform, said, penalties)


def log_probabilities(logits: paddle.Tensor, ids: np.ndarray, temperature: np.ndarray, count: int) -> tuple:
    """What softmax(logits / temperature) says of an id per row, and the `count` likeliest ids of each row.

    logits (S, V) float32; ids (S,), temperature (S,) > 0 -> numpy: the log-probabilities of ids (S,) and the entropies
    (S,), in nats; ids of the likeliest (S, count), the likeliest first and the first of equals, and their
    log-probabilities (S, count). Floats are float64 and summed as such; NaN where a row's largest logit is not finite.
    """
    return _run("log_probabilities", logits, ids, temperature, count)


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
    """Cross-entropy of softmax(hidden @ weight) against labels, in chunks: the (N, V) logits never exist at once.

    hidden (N, D), weight (D, V) or, with transpose_weight, (V, D), labels (N,) int64 -> losses (N,) float32, 0 where
    the label is ignore_index; with return_predictions also the argmax ids (N,) int64, -1 there. Ignored rows are not
    computed. With a frozen weight, the gradient of hidden is made in forward: two products instead of three.

    vocabulary: the columns of the weight are sharded over ranks (arXiv 1909.08053, 3). An object with `start`, the id
    of this rank's first column, and all_reduce(tensor, "max" | "sum") -> tensor. labels are global ids. Losses and
    predictions are equal on all ranks (the lowest id among equal logits); the gradient of hidden is this rank's partial
    sum, which the caller all-reduces.

    softcap: a logit l becomes softcap * tanh(l / softcap) (Gemma 2, arXiv 2408.00118).
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

    gradient is multiplied by grad_scale (clipping) first; step counts from 1; the decay is lr * weight_decay *
    parameter. parameter, gradient: float32, bfloat16 or float16; moments: float32. Computed in float32.
    """
    _run("adamw", parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale)


def squared_norm(x: paddle.Tensor) -> paddle.Tensor:
    """Sum of squares of all elements of x -> () float64."""
    return _run("squared_norm", x)
