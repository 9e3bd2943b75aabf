"""Ops for which Paddle's CPU operators are slow: our own C++ (kernels/cpu/*.cc), or another of Paddle's operators.

The C++ is built once, on first use, by paddle.utils.cpp_extension, into a cache outside the tree that is named after its
sources, its flags and Paddle's version. It holds code for AVX-512, AVX2 and SSE2 and chooses at run time. Without a compiler
the ops that need it are not there (see missing()), and the reference runs instead.

rms_norm, rope, swiglu: one pass forward, one backward. adamw: Paddle's own, one pass over parameter, gradient and both
moments instead of a dozen; on 1.6 M values 3.3 ms instead of 6.4 (two cores of an EPYC with AVX-512, busy with other work).

linear, linear_cross_entropy: with kernels.bf16, products in bfloat16 (vdpbf16ps) of float32 tensors that are converted and
packed inside; else Paddle's own.

quant_linear: 4- and 8-bit weights are unpacked in registers for up to 32 rows, in one pass for more. a8w8: products of int8
by AMX, AVX512-VNNI or pmaddwd, sums exact. Weights are read as they are stored, no packed copy is kept.

attention: tiles of 72 queries by 64 keys, online softmax (Dao, arXiv 2307.08691), masked tiles skipped; q, k, v, the output
and one float a query are kept for backward. Sums are in an order that depends on shapes alone.
"""

import functools
import hashlib
import os
import shutil
import sys
import types
from pathlib import Path

import paddle
from paddle import _C_ops
from paddle.autograd import PyLayer

import kernels
from kernels import reference

SOURCES = Path(__file__).with_suffix("")  # the folder kernels/cpu
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
OF_EXTENSION = "attention lora_linear rms_norm rope swiglu quant_linear bf16".split()  # what needs it: ops, products in bfloat16

_state = None  # True once the built ops are loaded, or the reason why they cannot be


def missing(op):
    """Why this op, or "bf16", cannot run here, or None. Builds the C++ the first time that it is asked for."""
    global _state
    if op not in OF_EXTENSION:
        return None
    if _state is None:
        try:
            _load()
            _state = True
        except (OSError, RuntimeError, ImportError) as error:
            _state = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if _state is not True:
        return _state
    if op == "bf16" and not _has_bfloat16():
        return "this processor has no bfloat16 instructions (AVX512-BF16)"
    return None


def _has_bfloat16():
    with open("/proc/cpuinfo") as file:
        return " avx512_bf16" in file.read(10000)


def _load():
    """Load the built ops from the cache, or build them into it; several processes that start at once build them once."""
    import fcntl  # not on every system

    name, compiler = "kernels_cpu", os.environ.get("CXX", "g++")
    sources = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(" ".join([paddle.__version__, sys.version, compiler, *FLAGS]).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paddle-llm-kernels"
    folder = cache / digest.hexdigest()[:16]
    library = folder / name / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").is_file():
            if shutil.which(compiler) is None:
                raise OSError(f"no C++ compiler: there is no {compiler}")
            print("kernels: building the C++ ops for this processor, about half a minute, once …", flush=True)
            _build(name, [str(s) for s in sources if s.suffix == ".cc"], folder)
            (folder / "complete").touch()
            return  # building has loaded it
    paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(library))


def _build(name, sources, folder):
    """Compile into folder/name/name.so; what the compiler and Paddle say goes to folder/build.log."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(folder / "build.log", "w") as log:
        kept = [os.dup(1), os.dup(2)]
        for stream in (1, 2):  # not only Python's: a process of its own compiles
            os.dup2(log.fileno(), stream)
        try:
            paddle.utils.cpp_extension.load(name=name, sources=sources, extra_cxx_cflags=FLAGS, extra_ldflags=["-pthread"],
                                            build_directory=str(folder))  # fmt: skip
        except (RuntimeError, OSError) as error:
            raise OSError(f"building the C++ ops failed, see {folder / 'build.log'}") from error
        finally:
            for stream, before in zip((1, 2), kept):
                os.dup2(before, stream)
                os.close(before)


# ---------------------------------------------------------------------------------------------- products


def _plain(*tensors):
    """Whether the C++ takes these: float32 on a dynamic graph."""
    return paddle.in_dynamic_mode() and all(t.dtype == paddle.float32 for t in tensors)


def bf16_matmul(x, y, transpose_x=False, transpose_y=False, bias=None, residual=None):
    """x (M, K) or transposed, y (K, N) or transposed, float32 or bfloat16 -> x y + bias + residual (M, N) float32.

    Products are of bfloat16, sums in float32.
    """
    operands = x.contiguous(), y.contiguous(), bias, residual
    return _C_ops._run_custom_op("cpu_bf16_matmul", *operands, transpose_x, transpose_y)[0]


def _takes_bf16(x, *weights):
    """Whether the C++ makes this product in bfloat16: asked for, on a dynamic graph, and x float32."""
    stored = (paddle.float32, paddle.bfloat16)
    return kernels.bf16 and paddle.in_dynamic_mode() and x.dtype == paddle.float32 and all(w.dtype in stored for w in weights)


def linear(x, weight, bias=None, residual=None):
    n_in, n_out = weight.shape
    wide = min(x.size // n_in, n_in, n_out) >= 32  # below, packing costs more than the faster product saves
    if not (wide and _takes_bf16(x, weight)):
        return reference.linear(x, weight, bias, residual)
    return _Bf16Linear.apply(x, weight, bias, residual)


class _Bf16Linear(PyLayer):
    """y = x W + b + residual; dx = dy W^T, dW = x^T dy, db = sum of dy over its rows."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual):
        ctx.save_for_backward(x, weight)
        ctx.frozen = [t is None or t.stop_gradient for t in (x, weight, bias, residual)]
        ctx.given = [t is not None for t in (x, weight, bias, residual)]
        n_in, n_out = weight.shape
        more = bias, None if residual is None else residual.reshape([-1, n_out]).contiguous()
        return bf16_matmul(x.reshape([-1, n_in]), weight, False, False, *more).reshape([*x.shape[:-1], n_out])

    @staticmethod
    def backward(ctx, dy):
        (x, weight), frozen = ctx.saved_tensor(), ctx.frozen
        n_in, n_out = weight.shape
        rows = dy.reshape([-1, n_out])
        found = [
            None if frozen[0] else bf16_matmul(rows, weight, transpose_y=True).reshape(x.shape),
            None if frozen[1] else bf16_matmul(x.reshape([-1, n_in]), rows, transpose_x=True),
            None if frozen[2] else rows.sum(0),
            None if frozen[3] else dy,
        ]
        return tuple(d for d, given in zip(found, ctx.given) if given)


def lora_linear(x, weight, lora_A, lora_B, scaling, bias=None, dropped=None):
    n_in, n_out = weight.shape
    wide = min(x.size // n_in, n_in, n_out) >= 32
    if not (wide and weight.stop_gradient and (bias is None or bias.stop_gradient) and _takes_bf16(x, weight, lora_A, lora_B)):
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropped)
    held = types.SimpleNamespace(weight=weight, bias=bias, scaling=float(scaling))  # frozen: no inputs of the PyLayer
    return _Bf16LoRA.apply(x, dropped, lora_A, lora_B, held)


class _Bf16LoRA(PyLayer):
    """t = s x A, y = [x t] [W; B]; dt = s dy B^T, dx = [dy dt] [W^T; A^T], dA = x^T dt, dB = t^T dy."""

    @staticmethod
    def forward(ctx, x, dropped, a, b, held):
        args = x.contiguous(), None if dropped is None else dropped.contiguous(), held.weight, a, b, held.bias
        y, t = _C_ops._run_custom_op("cpu_bf16_lora", *args, held.scaling)
        ctx.save_for_backward(x if dropped is None else dropped, t, a, b)
        ctx.held, ctx.dropped, ctx.frozen = held, dropped is not None, [x.stop_gradient, a.stop_gradient, b.stop_gradient]
        return y.reshape([*x.shape[:-1], b.shape[1]])

    @staticmethod
    def backward(ctx, dy):
        x, t, a, b = ctx.saved_tensor()
        args = dy.contiguous(), x, t, ctx.held.weight, a, b, ctx.held.scaling
        dx, d_dropped, da, db = _C_ops._run_custom_op("cpu_bf16_lora_backward", *args, not ctx.frozen[0], ctx.dropped)
        d_inputs = [None if ctx.frozen[0] else dx.reshape(x.shape)]
        if ctx.dropped:
            d_inputs.append(None if ctx.frozen[0] else d_dropped.reshape(x.shape))
        return *d_inputs, None if ctx.frozen[1] else da, None if ctx.frozen[2] else db


def linear_cross_entropy(hidden, weight, labels, transpose_weight=False, ignore_index=-100, return_predictions=False,
                         vocabulary=None):  # fmt: skip
    if not _takes_bf16(hidden, weight):
        return reference.linear_cross_entropy(hidden, weight, labels, transpose_weight, ignore_index, return_predictions, vocabulary)  # fmt: skip
    held = types.SimpleNamespace(turned=transpose_weight, vocabulary=vocabulary, frozen=weight.stop_gradient,
                                 train=paddle.is_grad_enabled() and not hidden.stop_gradient)  # fmt: skip
    losses_of = functools.partial(_Bf16CrossEntropy.apply, held=held)
    return reference.over_targets(losses_of, hidden, weight, labels, ignore_index, return_predictions)


class _Bf16CrossEntropy(PyLayer):
    """loss = logsumexp(h W) - (h W)[label], over the vocabulary in blocks; see gemm.cc.

    With a frozen W the gradient of h, but for the factor d loss of each row, is made together with the loss (an online
    softmax). Else the logits are made again in backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, predictions, held):
        ctx.held, ctx.online = held, held.train and held.frozen
        labels = labels if held.vocabulary is None else labels - held.vocabulary.start
        found = _C_ops._run_custom_op("cpu_bf16_cross_entropy", hidden, weight, labels, held.turned, ctx.online)
        most, total, target, best, acc = found
        lse, target, best = reference.of_whole_vocabulary(most, total, target, best, held.vocabulary)
        if predictions is not None:
            predictions.append(best)
        kept = (acc, paddle.exp(most - lse)) if ctx.online else (hidden, lse)
        ctx.save_for_backward(weight, labels, *kept)
        return lse - target

    @staticmethod
    def backward(ctx, d_losses):
        weight, labels, *kept = ctx.saved_tensor()
        d_losses, turned = d_losses.contiguous(), ctx.held.turned
        if ctx.online:
            return _C_ops._run_custom_op("cpu_softmax_part", *kept, weight, labels, d_losses, turned)[0], None, None
        hidden, lse = kept
        args = hidden, weight, labels, lse, d_losses, turned, ctx.held.frozen
        d_hidden, d_weight = _C_ops._run_custom_op("cpu_bf16_cross_entropy_backward", *args)
        return d_hidden, None if ctx.held.frozen else d_weight, None


def quant_linear(x, qweight, scales, bias=None, scheme="w8", qzeros=None, g_index=None, input_scale=None):
    if scheme == "a8w8":
        return _int8_linear(x, qweight, scales, bias, input_scale)
    floats = [t for t in (x, scales, bias) if t is not None]
    n_in, bits = x.shape[-1], int(scheme[1:])
    if not _plain(*floats) or qweight.shape[1] < 4:
        return reference.quant_linear(x, qweight, scales, bias, scheme, qzeros, g_index, input_scale)
    packed = qweight, scales, qzeros, g_index
    if x.size // n_in > 32 or paddle.is_grad_enabled() and not x.stop_gradient:  # faster as one product with floats
        return linear(x, _C_ops._run_custom_op("cpu_dequantize", *packed, bits, -1)[0], bias)
    return _C_ops._run_custom_op("cpu_quant_linear", x.contiguous(), *packed, bias, bits, -1)[0]


def _int8_linear(x, weight, scales, bias, input_scale):
    floats = [t for t in (x, scales, bias, input_scale) if t is not None]
    if not _plain(*floats) or weight.shape[0] >= 1 << 17:  # more products may not fit in 32 bits
        return reference.quant_linear(x, weight, scales, bias, "a8w8", input_scale=input_scale)
    return _C_ops._run_custom_op("cpu_int8_linear", x.contiguous(), weight, scales, bias, input_scale, -1)[0]


# ---------------------------------------------------------------------------------------------- attention


def attention(q, k, v, startend_row_indices=None, causal=True, scale=None, alibi_slopes=None):
    if q.dtype != paddle.float32 or not paddle.in_dynamic_mode():
        return reference.attention(q, k, v, startend_row_indices, causal, scale, alibi_slopes)
    rows = startend_row_indices
    B, Tq, H, Dh = q.shape
    Tk, K = k.shape[1], k.shape[2]
    assert H % K == 0, f"{H} query heads are not a multiple of {K} key/value heads"
    assert not causal or Tk >= Tq, f"causal attention of {Tq} queries over {Tk} keys"
    if rows is not None:
        n = rows.shape[-1]
        assert list(rows.shape[:3:2]) == [B, Tk] and rows.shape[1] in (1, K, H), f"rows {rows.shape}, keys {k.shape}"
        assert n in ((1, 2) if causal else (2, 4)), f"{n} columns of rows with causal={causal}"
    how = types.SimpleNamespace(  # a plain object, as a PyLayer would take tensors among its arguments for inputs
        rows=None if rows is None else rows.astype("int32").contiguous(),
        slopes=None if alibi_slopes is None else alibi_slopes.astype("float32").contiguous(),
        rest=(bool(causal), Dh**-0.5 if scale is None else float(scale), 3 if kernels.bf16 else -1),
    )
    return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), how)


class _Attention(PyLayer):
    @staticmethod
    def forward(ctx, q, k, v, how):
        out, lse = _C_ops._run_custom_op("cpu_attention", q, k, v, how.rows, how.slopes, *how.rest)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how, ctx.frozen = how, [t.stop_gradient for t in (q, k, v)]
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensor()
        how = ctx.how
        found = _C_ops._run_custom_op(
            "cpu_attention_backward", q, k, v, how.rows, how.slopes, out, lse, d_out.contiguous(), *how.rest
        )
        return tuple(None if frozen else d for d, frozen in zip(found, ctx.frozen))


# ------------------------------------------------------------------------------------- norm, rotation, gate


def rms_norm(x, weight, epsilon):
    if not _plain(x, weight):
        return reference.rms_norm(x, weight, epsilon)
    return _RMSNorm.apply(x.contiguous(), weight, epsilon)


class _RMSNorm(PyLayer):
    """y = x r w with r = rsqrt(mean(x^2) + eps): dx = r (dy w - x r^2 mean(dy w x)), dw = sum(dy x r)."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        y, r = _C_ops._run_custom_op("cpu_rms_norm", x, weight, epsilon)
        ctx.save_for_backward(x, weight, r)
        ctx.frozen = [x.stop_gradient, weight.stop_gradient]
        return y

    @staticmethod
    def backward(ctx, dy):
        found = _C_ops._run_custom_op("cpu_rms_norm_backward", *ctx.saved_tensor(), dy.contiguous())
        return tuple(None if frozen else d for d, frozen in zip(found, ctx.frozen))


def rope(x, cos, sin):
    if not _plain(x, cos, sin):
        return reference.rope(x, cos, sin)
    return _Rope.apply(x.contiguous(), cos.expand([*x.shape[:2], 1, -1]), sin.expand([*x.shape[:2], 1, -1]))


class _Rope(PyLayer):
    """A rotation: its gradient is the rotation back. Nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.tables = cos.contiguous(), sin.contiguous()
        return _C_ops._run_custom_op("cpu_rope", x, *ctx.tables, 1.0)[0]

    @staticmethod
    def backward(ctx, dy):
        return _C_ops._run_custom_op("cpu_rope", dy.contiguous(), *ctx.tables, -1.0)[0], None, None


def swiglu(gate, up):
    if not _plain(gate, up):
        return reference.swiglu(gate, up)
    return _SwiGLU.apply(gate.contiguous(), up.contiguous())


class _SwiGLU(PyLayer):
    """y = g s u with s = sigmoid(g): dg = dy u s (1 + g (1 - s)), du = dy g s."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.frozen = [gate.stop_gradient, up.stop_gradient]
        return _C_ops._run_custom_op("cpu_swiglu", gate, up)[0]

    @staticmethod
    def backward(ctx, dy):
        found = _C_ops._run_custom_op("cpu_swiglu_backward", *ctx.saved_tensor(), dy.contiguous())
        return tuple(None if frozen else d for d, frozen in zip(found, ctx.frozen))


# ---------------------------------------------------------------------------------------------- optimizer


@paddle.no_grad()
def adamw(parameter, gradient, moment1, moment2, step, lr, beta1, beta2, epsilon, weight_decay, grad_scale=1.0):
    if grad_scale != 1.0:
        gradient = gradient * grad_scale
    _C_ops.adamw_(
        parameter, gradient, paddle.to_tensor(lr, "float32"), moment1, moment2, None,
        paddle.to_tensor([beta1 ** (step - 1) * beta1]), paddle.to_tensor([beta2 ** (step - 1) * beta2]),
        None, None, beta1, beta2, epsilon, 1.0, weight_decay, weight_decay != 0.0, False, 1000, False, False, False,
    )  # fmt: skip
