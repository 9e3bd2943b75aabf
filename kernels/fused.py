"""All blocks of a decoder for one step of a server in one C++ call, as Paddle's FusedMultiTransformer is one operator.

    model = FusedMultiTransformer(shape, embedding)          # shape: FusedShape
    model.set_norm(0, "attention", weight, bias, epsilon)    # …
    model.set_linear(0, "qkv", Weight(...))                  # packed once, in the layout of the instruction set
    model.set_adapter(0, "qkv", 0, a, b)                     # a LoRA, for the tokens that step() names
    model.set_cache(0, k_cache, v_cache)                     # blocks of a pool, as kernels.paged_attention has them
    logits = model.step(ids=..., slots=..., ...)             # (S, V) float32

The C++ is kernels/cpu/transformer.cc; why it cannot run is in kernels.fused_missing(). The layers of model.py are its
oracle. Storage of a weight: float32 on every instruction set; bfloat16 with AVX512-BF16 (inputs are rounded to
bfloat16); w8, w4, a8w8 with AVX512-VNNI. Inputs of w8 and w4 are rounded to int8 by blocks of at most 128 input rows,
those of a8w8 by whole rows; sums within a block are exact.
"""

import ctypes
import dataclasses
from typing import NamedTuple

from kernels import cpu

import numpy as np
import paddle

CACHES = {"float32": 0, "bfloat16": 1, "int8": 2}
STORAGES = {"float32": 0, "bfloat16": 1, "w8": 2, "a8w8": 2, "w4": 3}
PLACES = {"before": 0, "after": 1, "both": 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
NORMS = ("attention", "mlp", "attention_post", "mlp_post", "q", "k", "q_latent", "kv_latent")
OUTER_NORMS = ("embedding", "final")
LINEARS = ("qkv", "output", "up", "down", "q_up", "kv_up", "router", "shared_gate")
OUTER_LINEARS = ("head", "project_in", "project_out")


@dataclasses.dataclass(frozen=True)
class FusedShape:
    """Letters as in kernels/__init__.py; strings are keys of the tables above."""

    layers: int
    D: int
    H: int
    K: int
    Dh: int
    rotary: int  # dims of a head that are rotated
    V: int
    norm_place: str
    activation: str
    gated: bool
    interleaved: bool  # rotation of dims (2 i, 2 i + 1)
    cache: str
    block_size: int
    attention_scale: float
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float | None = None  # the residual is the norm's output times this
    q_latent: int = 0  # MLA: width of narrow queries, 0: they come in full; of keys and values, 0: no MLA
    kv_latent: int = 0
    nope: int = 0  # MLA: dims of a head without position, and of its values
    value: int = 0


class Routing(NamedTuple):
    """Of the experts of a block; the fields are those of families.MoEConfig."""

    experts: int
    top_k: int
    n_group: int
    topk_group: int
    group_topk_sum: int
    sigmoid: bool  # scores are sigmoids, not a softmax
    norm_topk_prob: bool
    routed_scaling_factor: float


class Weight(NamedTuple):
    """A weight (in, out). `values`: float32 or, for integers, codes in uint8 (in, out) as GPTQ has them: less a zero
    point, which is 128 (w8, a8w8) or 8 (w4) unless `zeros` are given."""

    storage: str  # a key of STORAGES
    values: np.ndarray
    bias: np.ndarray | None = None  # (out,) float32
    transposed: bool = False  # values are (out, in); only float32 and bfloat16
    scales: np.ndarray | None = None  # (groups, out) float32; groups are runs of group_size input rows
    zeros: np.ndarray | None = None  # (groups, out) float32
    group_size: int = 0
    order: np.ndarray | None = None  # (in,) int32: the input that row k belongs to
    input_scale: float = 0.0  # a8w8: of all inputs; 0: max |x| / 127 of each row


class _Shape(ctypes.Structure):  # of cpu/transformer.cc
    _numbers = """layers D H K Dh rotary V place activation gated neighbours cache block_size half_embedding
        q_latent kv_latent nope value instructions"""
    _factors = "attention_scale attention_softcap final_softcap embedding_scale residual_scale"
    _fields_ = [(name, ctypes.c_int64) for name in _numbers.split()]
    _fields_ += [(name, ctypes.c_double) for name in _factors.split()]


class _Routing(ctypes.Structure):  # of cpu/experts.h
    _fields_ = [(name, ctypes.c_int64) for name in Routing._fields[:-1]]
    _fields_ += [(Routing._fields[-1], ctypes.c_double), ("correction", ctypes.c_void_p)]


class _Source(ctypes.Structure):  # of cpu/panels.h
    _fields_ = [
        ("storage", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("n_in", "n_out", "group")),
        *((name, ctypes.c_bool) for name in ("transposed", "whole_rows")),
        *((name, ctypes.c_void_p) for name in ("data", "scales", "zeros", "bias", "order")),
        ("input_scale", ctypes.c_float),
    ]


class _Step(ctypes.Structure):  # of cpu/transformer.cc
    _arrays = "ids rows slots first last tables queries contexts cos sin q_scale slices logits".split()
    _fields_ = [(name, ctypes.c_int64) for name in ("tokens", "sequences", "width", "slice_count")] + [
        (name, ctypes.c_void_p) for name in _arrays
    ]


def storage_missing(storage: str) -> str | None:
    """The reason why weights of a storage cannot be used here; None if they can."""
    flag, name = {"bfloat16": ("avx512_bf16", "AVX512-BF16")}.get(storage, ("avx512_vnni", "AVX512-VNNI"))
    if storage == "float32" or cpu.has_instructions(flag) and cpu.INSTRUCTIONS in (-1, 2):
        return None
    return f"{storage} needs {name}, which this processor does not have"


def _pointer(array):
    return None if array is None else array.ctypes.data


def _floats(array):
    return None if array is None else np.ascontiguousarray(array, np.float32)


def _source(weight):
    """The _Source of a Weight, and the arrays that it points into."""
    is_float = weight.storage in ("float32", "bfloat16")
    values = np.ascontiguousarray(weight.values, np.float32 if is_float else np.uint8)
    n_in, n_out = values.shape[::-1] if weight.transposed else values.shape
    order = None if weight.order is None else np.ascontiguousarray(weight.order, np.int32)
    arrays = _floats(weight.scales), _floats(weight.zeros), _floats(weight.bias), order
    source = _Source(
        storage=STORAGES[weight.storage],
        n_in=n_in,
        n_out=n_out,
        group=min(weight.group_size or n_in, n_in),
        transposed=weight.transposed,
        whole_rows=weight.storage == "a8w8",
        input_scale=weight.input_scale,
        data=_pointer(values),
        **dict(zip(("scales", "zeros", "bias", "order"), map(_pointer, arrays))),
    )
    return source, (values, *arrays)


class FusedMultiTransformer:
    """The weights of a decoder, packed, and the pool's caches. Not for several threads at once."""

    def __init__(
        self,
        shape: FusedShape,
        embedding: paddle.Tensor | None,
        positions: paddle.Tensor | None = None,
        slopes: np.ndarray | None = None,
    ):
        """embedding (V, D), or as wide as "project_in" reads, float32 or bfloat16; None: it is the head's weight, in
        float32 or bfloat16. positions (rows, D) float32 or None: learned positions. Both are kept and read in place.
        slopes (H,): of ALiBi."""
        self.shape, self.packed_bytes = shape, 0
        self._library = cpu.library()
        self._kept = [embedding, positions]  # the C++ reads their memory
        raw = _Shape(
            layers=shape.layers,
            D=shape.D,
            H=shape.H,
            K=shape.K,
            Dh=shape.Dh,
            rotary=shape.rotary,
            V=shape.V,
            place=PLACES[shape.norm_place],
            activation=ACTIVATIONS[shape.activation],
            gated=shape.gated,
            neighbours=shape.interleaved,
            cache=CACHES[shape.cache],
            block_size=shape.block_size,
            **{name: getattr(shape, name) for name in ("q_latent", "kv_latent", "nope", "value")},
            half_embedding=embedding is not None and embedding.dtype == paddle.bfloat16,
            instructions=cpu.INSTRUCTIONS,
            attention_scale=shape.attention_scale,
            attention_softcap=shape.attention_softcap or 0.0,
            final_softcap=shape.final_softcap or 0.0,
            embedding_scale=shape.embedding_scale,
            residual_scale=shape.residual_scale or 0.0,
        )
        self._library.fused_new.restype = ctypes.c_void_p
        for function in (self._library.fused_linear, self._library.fused_expert):
            function.restype = ctypes.c_long
        self._model = ctypes.c_void_p(self._library.fused_new(ctypes.byref(raw)))
        slopes = _floats(slopes)
        tables = (None if table is None else table.data_ptr() for table in (embedding, positions))
        self._library.fused_inputs(self._model, *map(ctypes.c_void_p, (*tables, _pointer(slopes))))

    def __del__(self):
        if getattr(self, "_model", None):
            self._library.fused_free(self._model)

    def set_norm(
        self,
        layer: int | None,
        name: str,
        weight: np.ndarray,
        bias: np.ndarray | None,
        epsilon: float,
        center: bool = False,
    ) -> None:
        """layer None: a name of OUTER_NORMS, else of NORMS; center: LayerNorm, else RMSNorm."""
        weight, bias = _floats(weight), _floats(bias)
        names = OUTER_NORMS if layer is None else NORMS
        place = ctypes.c_long(-1 if layer is None else layer), ctypes.c_long(names.index(name))
        values = ctypes.c_void_p(_pointer(weight)), ctypes.c_void_p(_pointer(bias)), ctypes.c_long(weight.size)
        self._library.fused_norm(self._model, *place, *values, ctypes.c_double(epsilon), ctypes.c_long(center))

    def set_linear(self, layer: int | None, name: str, weight: Weight) -> None:
        """Pack a weight; layer None: a name of OUTER_LINEARS, else of LINEARS. `up` of a gated MLP alternates 64
        columns of gate and of up, see
        gate_and_up()."""
        source, arrays = _source(weight)
        names = OUTER_LINEARS if layer is None else LINEARS
        place = ctypes.c_long(-1 if layer is None else layer), ctypes.c_long(names.index(name))
        self.packed_bytes += self._library.fused_linear(self._model, *place, ctypes.byref(source))
        del arrays  # the source points into them

    def set_experts(self, layer: int, routing: Routing, correction: np.ndarray | None = None) -> None:
        """The MLP is a sum of experts, given by set_expert(), and of the shared expert, which is its "up" and "down".

        The linears "router" and, where there is one, "shared_gate" are float32. correction (E,): see MoEConfig.
        """
        correction = _floats(correction)
        raw = _Routing(*routing, _pointer(correction))
        self._library.fused_experts(self._model, ctypes.c_long(layer), ctypes.byref(raw))

    def set_expert(self, layer: int, expert: int, up: Weight, down: Weight) -> None:
        (raw_up, _up), (raw_down, _down) = _source(up), _source(down)
        place = ctypes.c_long(layer), ctypes.c_long(expert)
        self.packed_bytes += self._library.fused_expert(
            self._model, *place, ctypes.byref(raw_up), ctypes.byref(raw_down)
        )

    def set_adapter(self, layer: int, name: str, adapter: int, a: np.ndarray, b: np.ndarray, bias: np.ndarray) -> None:
        """A LoRA of a weight: x a b + bias is added for the tokens of this adapter, counted from 0.

        a (in, R), b (R, out) with the scaling in it, bias (out,); b and bias have the columns of the weight.
        """
        columns = -b.shape[1] % 64
        b, bias = np.pad(b, [(0, 0), (0, columns)]), np.pad(bias, (0, columns))
        (down, _a), (up, _b) = _source(Weight("float32", a)), _source(Weight("float32", b, bias))
        place = (ctypes.c_long(n) for n in (layer, LINEARS.index(name), adapter))
        self._library.fused_adapter(self._model, *place, ctypes.byref(down), ctypes.byref(up))

    def set_cache(
        self,
        layer: int,
        k_cache: paddle.Tensor,
        v_cache: paddle.Tensor,
        k_scales: paddle.Tensor | None = None,
        v_scales: paddle.Tensor | None = None,
        window: int | None = None,
        fixed_scales: bool = False,
    ) -> None:
        """Pools and scales as in kernels.paged_attention, of the dtype that the shape names.

        fixed_scales: the scales are not each token's own; codes are those of the scales that are there.
        """
        tensors = k_cache, v_cache, k_scales, v_scales
        self._kept.append(tensors)
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        sizes = layer, window or 0, k_cache.size * k_cache.element_size(), fixed_scales
        numbers = [ctypes.c_long(n) for n in sizes]
        self._library.fused_layer(self._model, *numbers, *pointers)

    def step(
        self,
        ids: np.ndarray,
        slots: np.ndarray,
        tables: np.ndarray,
        queries: np.ndarray,
        contexts: np.ndarray,
        rows: np.ndarray | None = None,
        cos: np.ndarray | None = None,
        sin: np.ndarray | None = None,
        q_scale: np.ndarray | None = None,
        slices: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits (S, V) float32 after the last token of each sequence.

        ids, slots (N,) int64: of the tokens of all sequences in a row; slots as in kernels.write_cache. tables
        (S, blocks), queries, contexts (S,) int32 as in kernels.paged_attention. rows (N,) int64: of the learned
        positions. cos, sin (N, rotary / 2) and q_scale (N,) float32, or None. slices (n, 5) int64: an adapter or -1,
        its first token and the end of them, its first sequence and the end of them.
        """
        ends = np.cumsum(queries, dtype=np.int64)
        logits = np.empty((len(queries), self.shape.V), np.float32)
        given = dict(ids=ids, rows=rows, slots=slots, first=ends - queries, last=ends - 1, tables=tables)
        given |= dict(queries=queries, contexts=contexts, cos=cos, sin=sin, q_scale=q_scale, slices=slices)
        types = dict.fromkeys(("tables", "queries", "contexts"), np.int32)
        types |= dict.fromkeys(("cos", "sin", "q_scale"), np.float32)
        arrays = {
            name: np.ascontiguousarray(array, types.get(name, np.int64))
            for name, array in given.items()
            if array is not None
        }
        pointers = {name: array.ctypes.data for name, array in arrays.items()}
        sizes = dict(tokens=len(ids), sequences=len(queries), width=tables.shape[1])
        sizes["slice_count"] = 0 if slices is None else len(slices)
        step = _Step(**sizes, **pointers, logits=logits.ctypes.data)
        self._library.fused_step(self._model, ctypes.byref(step))
        return logits


def gate_and_up(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Two (…, F) -> (…, 2 · F rounded up to 64): 64 columns of one and of the other in turn; zeros where F ends."""
    width = -gate.shape[-1] % 64
    parts = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width)]) for x in (gate, up)]
    return np.stack([x.reshape(*x.shape[:-1], -1, 64) for x in parts], axis=-2).reshape(*gate.shape[:-1], -1)
