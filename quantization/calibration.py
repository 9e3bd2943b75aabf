"""Calibration: the inputs of a model's linears on calibration data, block by block, and which linears share an input.

    calibration = Calibration(model, loader, batches)
    for index, block in enumerate(model.layers):
        refs, stages = linear_refs(model, index), sequential_groups(block, model.config)
        stats = calibration.observe(block, [refs["attention.q_proj"]], keep_hessian=True)
        ...                                                   # replace linears of this block
        calibration.advance(block)                            # the next block sees what this one puts out

Memory: the hidden states of the calibration tokens (tokens * D floats, one array for all blocks) with their rotary
tables."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn

from families import ModelConfig
from formats.files import UserError
from model import (
    CausalLM,
    KVCache,
    Linear,
    MoE,
    QuantLinear,
    block_linears,
    kernel_attention,
    norm_consumers,
    set_parameter,
)

FEW = 1 / 8  # tokens per input, below which an expert is calibrated on all tokens


class ActivationStats:
    """Statistics of an input X (tokens, n) that linears share: its Hessian, extremes per batch, sampled rows."""

    def __init__(self, n, keep_hessian, keep_rows):
        self.n, self.tokens, self.rows_per_batch = n, 0, keep_rows
        self.hessian = np.zeros((n, n), np.float32) if keep_hessian else None  # X^T X; methods take it up to a factor
        self.note = ""  # what the report says of these inputs
        self.low, self.high, self.rows = [], [], []  # a batch: (n,) least, (n,) largest, (rows_per_batch, n)
        self.token_max = []  # a batch: (tokens,) the largest |x| of each
        self.scale = None  # a8w8: the scale of all tokens, if each has not its own

    def add(self, x):
        """x (tokens, n) of one batch, padding taken out."""
        self.tokens += x.shape[0]
        if self.hessian is not None:
            self.hessian += paddle.matmul(x, x, transpose_x=True).numpy()
        x = x.numpy()  # whose extremes take a sixth of the time of Paddle's
        self.low.append(x.min(0))
        self.high.append(x.max(0))
        self.token_max.append(np.maximum(x.max(1), -x.min(1)))
        if self.rows_per_batch:
            self.rows.append(x[np.unique(np.linspace(0, len(x) - 1, self.rows_per_batch).astype(np.int64))])

    def sample(self):
        """The rows kept; without calibration data the identity, for which errors are those of the weights."""
        return np.concatenate(self.rows) if self.tokens else np.eye(self.n, dtype=np.float32)

    def extremes(self, batches):
        """(n,) least and largest of the first `batches` batches."""
        return np.min(self.low[:batches], 0), np.max(self.high[:batches], 0)

    @functools.cached_property
    def outliers(self):
        """How many times the median the largest channel and the largest token are, by their largest |x|; {} unknown.

        Of the inputs as they were observed: computed before they are transformed."""
        if not self.tokens:
            return {}
        low, high = self.extremes(None)
        sizes = {"channel": np.maximum(-low, high), "token": np.concatenate(self.token_max)}
        return {f"{name}_outlier": round(float(v.max() / max(np.median(v), 1e-30)), 2) for name, v in sizes.items()}

    def transform(self, shift, scale):
        """The same of (X - shift) / scale, both (n,)."""
        self.outliers  # noqa: B018, of the inputs before
        for values in (self.low, self.high, self.rows):
            values[:] = [(v - shift) / scale for v in values]


class AllRecorded(Exception):
    """Ends a run of a block whose other linears nobody asks for."""


class ActivationRecorder(nn.Layer):
    """Stands in for a linear and records its inputs."""

    def __init__(self, ref, inputs):
        super().__init__()
        self.ref, self.layer, self.inputs = ref, ref.layer, inputs
        self.real, self.active = None, True
        self.waiting = set()  # the recorders of this run that have not recorded yet, shared by them

    def forward(self, x, residual=None):
        if self.active:
            flat = x.reshape([-1, x.shape[-1]])
            # A routed expert gets real tokens alone, see real_experts().
            all_real = self.real is None or self.ref.routed
            self.inputs.add(flat if all_real else flat.index_select(self.real))
            self.waiting.discard(self)
            if not self.waiting and not self.ref.routed:
                raise AllRecorded
        return self.layer(x, residual)


class Calibration:
    """The hidden states of the calibration tokens before the block in hand."""

    def __init__(self, model, loader, batches):
        self.items = []  # a batch: [x (B, T, D), model.ForwardContext, places of real tokens or None]
        self.float_states = None  # a batch: x as the float model has it, where a method asks for it
        model.eval()
        for index in range(batches):
            batch = loader.batch(0, index)
            real = None if batch["tokens"] == batch["input_ids"].size else np.flatnonzero(real_positions(batch, loader))
            keys = ("input_ids", "position_ids", "startend_row_indices")
            arrays = (None if a is None else paddle.to_tensor(a) for a in (*(batch[key] for key in keys), real))
            *arrays, real = arrays
            ids, positions, mask_rows = arrays
            context = model.start_forward(ids, positions, mask_rows)
            self.items.append([model.embed(ids, context), context, real])

    @property
    def tokens(self):
        return sum(int(x.shape[0] * x.shape[1] if real is None else real.shape[0]) for x, _, real in self.items)

    def run(self, block, every=(), cache=None, states=None):
        """Yields (batch number, places of real tokens, block's output) of each batch, which runs when called.

        every: experts that are given all tokens besides, for Recorders in them. cache: a KVCache for its attention.
        states: a batch's x in place of the one in hand.
        """
        for number, (x, context, real) in enumerate(self.items):
            output = functools.partial(block, states[number] if states else x, context, cache=cache)
            with real_experts(block.mlp, real, every):
                yield number, real, lambda: output()[0]

    def observe(self, block, refs, keep_hessian=False, keep_rows=0, expert_rows=None):
        """[ActivationStats] of the linears in `refs`, by running the block over all batches as far as they need it.

        keep_rows: how many rows of the inputs are kept; expert_rows: the same of a routed expert; None: keep_rows.

        An expert that got fewer tokens than FEW * its inputs is shown all of them besides, in a second run: so few say
        nothing of most directions of its inputs, and it may well get others of other texts. Its stats say so.
        """
        recorders = []
        for ref in refs:
            rows = keep_rows if expert_rows is None or not ref.routed else expert_rows
            stats = ActivationStats(ref.layer.n_in, keep_hessian, -(-rows // max(1, len(self.items))))
            recorders.append(ActivationRecorder(ref, stats))
        for ref, recorder in zip(refs, recorders):
            setattr(ref.parent, ref.attribute, recorder)
        self._record(block, recorders)
        if idle := [r for r in recorders if r.ref.routed and r.inputs.tokens < FEW * r.layer.n_in and self.items]:
            for recorder in recorders:
                recorder.active = recorder in idle
            for recorder in idle:
                recorder.inputs.note = f"{recorder.inputs.tokens} tokens were sent to it: calibrated on all"
            self._record(block, idle, {id(r.ref.parent): r.ref.parent for r in idle}.values())
        for ref, recorder in zip(refs, recorders):
            setattr(ref.parent, ref.attribute, recorder.layer)
        for ref, recorder in zip(refs, recorders):
            if self.items and not np.isfinite([recorder.inputs.low, recorder.inputs.high]).all():
                raise UserError(f"{ref.path}: its inputs are not finite on the calibration data; is the model sound?")
        return [recorder.inputs for recorder in recorders]

    def _record(self, block, recorders, every=()):
        for _, real, output in self.run(block, every):
            waiting = set(recorders)
            for recorder in recorders:
                recorder.real, recorder.waiting = real, waiting
            with contextlib.suppress(AllRecorded):
                output()

    def float_outputs(self, block):
        """A float block's outputs (tokens, D) for each batch on what the float blocks before it put out."""
        states = self.float_states or [x for x, *_ in self.items]
        self.float_states = [output() for *_, output in self.run(block, states=states)]
        return [real_rows(x, real) for x, (*_, real) in zip(self.float_states, self.items)]

    def advance(self, block, cache: "CacheRecorder | None" = None):
        """Replace the hidden states by the block's outputs."""
        for number, real, output in self.run(block, cache=cache):
            if cache is not None:
                cache.real = real
            self.items[number][0] = output()


class CacheRecorder(KVCache):
    """Attention as without a cache; keeps the largest |k| and |v| of each head (K,), by layer and batch."""

    def __init__(self, layers: int):
        self.keys, self.values = [[] for _ in range(layers)], [[] for _ in range(layers)]
        self.real = None  # places of real tokens in this batch; None: all

    def attend(self, layer, q, k, v, *, mask_rows, window, **options) -> paddle.Tensor:
        for x, largest in ((k, self.keys), (v, self.values)):
            by_token = x.abs().max(-1).reshape([-1, x.shape[2]])  # (B T, K)
            by_token = by_token if self.real is None else by_token.index_select(self.real)
            largest[layer].append(by_token.max(0).numpy())
        return kernel_attention(q, k, v, None, None, mask_rows, **options)

    def scales(self, method: str) -> dict[str, list]:
        """{"k_scales", "v_scales"}: by layer the scales of int8 codes of its K heads, from the largest value of all
        batches (abs_max_headwise) or the mean of theirs (avg_headwise)."""
        over = np.mean if method == "avg_headwise" else np.max
        layers = {"k_scales": self.keys, "v_scales": self.values}
        return {
            name: [[float(np.float32(max(x, 1e-8) / 127)) for x in over(batches, axis=0)] for batches in largest]
            for name, largest in layers.items()
        }


@contextlib.contextmanager
def real_experts(mlp: nn.Layer, real: paddle.Tensor | None, every: tuple = ()) -> Iterator[None]:
    """Inside, the experts of a MoE get the tokens at `real` (n,) alone (None: all), and those in `every` all of
    these."""
    if not isinstance(mlp, MoE) or real is None and not every:
        yield
        return

    def mix(flat, weights, chosen, layout=None):
        routed = flat, weights, chosen
        if real is not None:
            routed = [x.index_select(real) for x in routed]
        for expert in every:
            expert(routed[0])
        mixed = MoE.dispatch_and_combine(mlp, *routed)
        return mixed if real is None else paddle.scatter(paddle.zeros_like(flat), real, mixed)

    mlp.dispatch_and_combine = mix
    try:
        yield
    finally:
        del mlp.dispatch_and_combine


def real_rows(x: paddle.Tensor, real: paddle.Tensor | None) -> paddle.Tensor:
    """(B, T, D) -> (tokens, D), without padding."""
    x = x.reshape([-1, x.shape[-1]])
    return x if real is None else x.index_select(real)


def real_positions(batch: dict, loader: object) -> np.ndarray:
    """(B, T) bool: where there is a token of a record, not padding."""
    lengths = [sum(int(loader.dataset.lengths[i]) for i in row) for row in batch["sample_ids"]]
    return np.arange(batch["input_ids"].shape[1]) < np.array(lengths)[:, None]


class LinearRef(NamedTuple):
    """A linear of a block, wherever it stands."""

    path: str  # Hugging Face's
    parent: nn.Layer
    attribute: str
    routed: bool = False  # of an expert that only some tokens are sent to

    @property
    def layer(self):
        return getattr(self.parent, self.attribute)

    def replace(self, layer, **tensors):
        """Put a QuantLinear with these arrays and the old bias in the linear's place; the float weight goes."""
        for name, array in tensors.items():
            set_parameter(getattr(layer, name), array)
        if layer.bias is not None:
            set_parameter(layer.bias, self.layer.bias.numpy())
        setattr(self.parent, self.attribute, layer)


def linear_refs(model: CausalLM, index: int) -> dict[str, LinearRef]:
    """{name inside the block: LinearRef} of block `index`."""
    names = {id(layer): name for name, layer in model.layers[index].named_sublayers()}
    return {
        names[id(layer)]: LinearRef(path, parent, attribute, ".experts." in names[id(layer)])
        for path, (parent, attribute, layer) in block_linears(model).items()
        if id(layer) in names
    }


class LinearGroup(NamedTuple):
    """Linears of a block that share an input."""

    names: tuple  # inside the block, in the order in which they run
    source: str  # the norm or linear that makes the input, channel by channel; a norm may feed several groups
    columns: np.ndarray | None = None  # of a linear source: which of its outputs become the inputs; None: all, in order
    heads: tuple = (1, 1)  # each of so many runs of these outputs is read so many times over
    fixed: str = ""  # why the source cannot be scaled

    @property
    def kind(self):
        return self.names[0].rpartition(".")[2]

    @property
    def of_norm(self):
        return self.source.endswith("norm")


def sequential_groups(block: nn.Layer, config: ModelConfig) -> list[list[LinearGroup]]:
    """[[LinearGroup, …], …] in the order in which they run; the groups of a stage do not wait for one another."""
    layers, readers = dict(block.named_sublayers()), norm_consumers(block)
    present = [n for n, layer in layers.items() if isinstance(layer, (Linear, QuantLinear)) and n.endswith("_proj")]

    def reading(norm, prefix, *attributes):
        names = tuple(name for name in (prefix + attribute for attribute in attributes) if name in present)
        return LinearGroup(names, norm, fixed="" if norm in readers else "the residual reads the norm, too")

    names = ("q_proj", "q_a_proj", "k_proj", "v_proj", "kv_a_proj", "qkv_proj")
    attention = [reading("attention_norm", "attention.", *names)]
    inner = [reading(f"attention.{a}_a_norm", "attention.", f"{a}_b_proj") for a in ("q", "kv")]
    inner = [group for group in inner if group.names]  # of latent attention
    first, second = [], []
    for up in (name for name in present if name.endswith("up_proj")):
        prefix = up[: up.rindex(".") + 1]
        first.append(reading("mlp_norm", prefix, "gate_proj", "up_proj", "gate_up_proj"))
        mlp, width = layers[prefix[:-1]], layers[prefix + "down_proj"].n_in
        passes = mlp.gated or mlp.activation == "relu"  # relu(x / s) = relu(x) / s
        second.append(
            LinearGroup(
                (prefix + "down_proj",),
                up,
                np.arange(width) + width * up.endswith("gate_up_proj"),
                fixed="" if passes else f"{mlp.activation} lies between, which no factor passes",
            )
        )
    return [stage for stage in (attention, inner, [values_group(present, config)], first, second) if stage]


def values_group(present: list, config: ModelConfig) -> LinearGroup:
    """The group of o_proj, whose inputs are means of the values that one linear puts out beside other things."""
    H, K, Dh, latent = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.latent
    if latent is not None:  # each head's keys, then its values
        wide = np.arange(H * (latent.qk_nope_head_dim + latent.v_head_dim)).reshape(H, -1)
        return LinearGroup(
            ("attention.o_proj",), "attention.kv_b_proj", wide[:, latent.qk_nope_head_dim :].reshape(-1), (H, 1)
        )
    if "attention.v_proj" in present:
        return LinearGroup(("attention.o_proj",), "attention.v_proj", None, (K, H // K))
    wide = np.arange((H + 2 * K) * Dh)
    columns = wide[(H + K) * Dh :] if config.fused_qkv == "blocks" else wide.reshape(K, -1, Dh)[:, -1].reshape(-1)
    return LinearGroup(("attention.o_proj",), "attention.qkv_proj", columns, (K, H // K))
