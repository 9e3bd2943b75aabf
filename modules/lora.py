"""The layers of adapters: LoRA around a linear or an embedding, and trained rows of an embedding or a head.

    lora = LoRALinear(linear, rank=8, alpha=16.0)      # y = linear(x) + scaling · x A B
    linear = lora.merged()                             # the same function as one linear

adapters.py puts them into a model, reads them and writes them.

Letters: D_in, D_out of a linear, R LoRA rank, V rows of an embedding, D its width, n trained tokens.
"""

import math

import kernels

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from formats.files import UserError
from modules.layers import Embedding, Linear, QuantLinear, RNGTracker, set_parameter
from modules.low_bit import LowBitLinear


def truncated_svd(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `rank` singular vectors and values by random projection (arXiv 0909.4061): (n, R), (R,), (R, m)."""
    width = min(rank + 8, *matrix.shape)
    q = np.linalg.qr(matrix @ np.random.default_rng(0).standard_normal((matrix.shape[1], width), np.float32))[0]
    for _ in range(4):  # powers set the large ones apart
        q = np.linalg.qr(matrix @ (matrix.T @ q))[0]
    u, s, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank]


class LoRALinear(nn.Layer):
    """base(x) + scaling · dropout(x) A B (Hu et al., arXiv 2106.09685) around any linear layer `base`.

    scaling is alpha/R, or alpha/sqrt(R) (rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353) rescales every output to
    the trained magnitude; its norm is a constant to the gradient (their section 4.3). PiSSA (arXiv 2404.02948) starts A
    B at the largest singular values and takes them out of the base weight, OLoRA (arXiv 2406.01775) at the first
    columns of a QR decomposition; `pissa_init` keeps that start, (A, B) of the full weight. bias: B has one too.
    """

    def __init__(
        self,
        base: nn.Layer,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        n_in, n_out = base.n_in, base.n_out
        if dora and isinstance(base, QuantLinear):
            raise UserError("DoRA needs the base model's float weights; this one is quantized")
        self.base, self.dropout = base, dropout
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled = True
        bound = math.sqrt(1 / n_in)  # Kaiming uniform with a = sqrt(5), as in the paper's code and peft
        self.lora_A = self.create_parameter([n_in, rank], default_initializer=nn.initializer.Uniform(-bound, bound))
        self.lora_B = self.create_parameter([rank, n_out], default_initializer=nn.initializer.Constant(0.0))
        self.lora_B_bias = self.create_parameter([n_out], is_bias=True) if bias else None
        self.lora_magnitude_vector = None
        self.pissa_init = None
        self.rng, self.key = RNGTracker(), ""  # apply_lora() sets the model's tracker, and the layer's path
        for parameter in base.parameters():
            parameter.stop_gradient = True
        if dora:
            self.lora_magnitude_vector = self.create_parameter(base.weight.shape[1:])
            self.lora_magnitude_vector.set_value(base.column_norms(base.weight.astype("float32")))
            shard_spec = getattr(base.weight, "shard_spec", None)
            if shard_spec is not None and shard_spec.dim == 1:
                self.lora_magnitude_vector.shard_spec = shard_spec.of(0, shard_spec.shape[1:])

    def delta(self) -> paddle.Tensor:
        """(D_in, D_out) float32: what the adapter adds to the weight."""
        return paddle.matmul(self.lora_A, self.lora_B) * self.scaling

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None) -> paddle.Tensor:
        y = self.product(x, self.base.bias) if self.enabled else self.base(x)
        return y if residual is None else residual + y

    def product(self, x: paddle.Tensor, bias: paddle.Tensor | None = None) -> paddle.Tensor:
        """x (…, D_in) times the adapted weight (the base weight while the adapter is off), plus a bias."""
        base = self.base
        if not self.enabled:
            return base.product(x)
        if self.lora_B_bias is not None:
            bias = self.lora_B_bias * self.scaling if bias is None else bias + self.lora_B_bias * self.scaling
        dropped = self.dropped(x) if self.dropout else x
        if isinstance(base, (Linear, LowBitLinear)) and self.lora_magnitude_vector is None:
            dropped_or_none = None if dropped is x else dropped
            return kernels.lora_linear(
                x, base.weight, self.lora_A, self.lora_B, self.scaling, bias=bias, dropped=dropped_or_none
            )
        y = base.product(x)
        update = kernels.linear(kernels.linear(dropped, self.lora_A) * self.scaling, self.lora_B)
        if self.lora_magnitude_vector is None:
            return y + update if bias is None else y + bias + update
        with paddle.no_grad():
            norm = base.column_norms(base.weight.astype("float32") + self.delta())
        ratio = self.lora_magnitude_vector / norm  # (D_out,)
        y_dropped = y if dropped is x else base.product(dropped)
        y = y if bias is None else y + bias
        return y + y_dropped * (ratio - 1) + update * ratio

    def dropped(self, x: paddle.Tensor) -> paddle.Tensor:
        """x after dropout; x itself in eval mode."""
        if not self.training:
            return x
        with self.rng.fork(self.key):
            return F.dropout(x, self.dropout)

    def decompose(self, start: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """A (D_in, R) and B (R, D_out) that "pissa" or "olora" takes out of the full weight, as peft computes them."""
        weight = self.base.full_weight().astype(np.float64)  # (D_in, D_out)
        if start == "pissa":
            u, s, vt = np.linalg.svd(weight, full_matrices=False)
            root = np.sqrt(s[:rank] / self.scaling)
            a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
        else:
            q, r = np.linalg.qr(weight.T)  # (D_out, k), (k, D_in)
            a, b = r[:rank].T, q[:, :rank].T
        return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)

    @paddle.no_grad()
    def set_pissa_init(self, a: np.ndarray, b: np.ndarray) -> None:
        """Start at these A (D_in, R) and B (R, D_out) of the full weight, which the base loses."""
        set_parameter(self.lora_A, a)
        set_parameter(self.lora_B, b)
        self.pissa_init, delta, weight = (a, b), self.delta(), self.base.weight
        if (shard_spec := getattr(weight, "shard_spec", None)) is not None:
            delta = paddle.to_tensor(shard_spec.slice(delta.numpy()))
        weight.set_value((weight.astype("float32") - delta).astype(weight.dtype))

    @paddle.no_grad()
    def start_at_residual(self, input_sizes: np.ndarray, residual: np.ndarray) -> None:
        """Start A B at what rounding took from the base: the part of `residual` (D_in, D_out) of rank R that its
        outputs need most, inputs being of these sizes (D_in,) (LoftQ, arXiv 2310.08659; QERA, arXiv 2410.06040)."""
        sizes = input_sizes[:, None] + np.float32(1e-6)
        u, s, vt = truncated_svd(sizes * residual, self.lora_A.shape[1])
        root = np.sqrt(s / self.scaling)
        set_parameter(self.lora_A, u * root / sizes)
        set_parameter(self.lora_B, root[:, None] * vt)
        if self.lora_magnitude_vector is not None:
            weight = self.base.weight.astype("float32") + self.delta()
            self.lora_magnitude_vector.set_value(self.base.column_norms(weight))

    @paddle.no_grad()
    def merged(self) -> nn.Layer:
        """The base layer, with the adapter added to its weight; of a LowBitLinear, a linear in float."""
        if isinstance(self.base, LowBitLinear):
            self.base = self.base.to_linear()
        if isinstance(self.base, QuantLinear):
            raise UserError(
                "an adapter cannot be merged into quantized weights; merge it into the float model, then quantize"
            )
        weight = self.base.weight.astype("float32") + self.delta()
        if self.lora_magnitude_vector is not None:
            weight = weight * (self.lora_magnitude_vector / self.base.column_norms(weight))
        if self.lora_B_bias is not None:
            if self.base.bias is None:
                raise UserError(f"{self.key}: lora_bias cannot be merged, as in peft: the base model has no bias there")
            self.base.bias.set_value(self.base.bias + self.lora_B_bias * self.scaling)
        self.base.weight.set_value(weight.astype(self.base.weight.dtype))
        return self.base

    @property
    def weight(self) -> paddle.Tensor:
        """(D_in, D_out): the adapted weight, for a head that is read as one matrix; without dropout."""
        if not self.enabled:
            return self.base.weight
        weight = self.base.weight.astype("float32") + self.delta()
        if self.lora_magnitude_vector is None:
            return weight
        return weight * (self.lora_magnitude_vector / self.base.column_norms(weight.detach()))

    def parts(self) -> list[tuple[str, paddle.Tensor, bool]]:
        """[(the end of peft's name, parameter, whether it is stored transposed)]"""
        rows = [("lora_A.weight", self.lora_A, True), ("lora_B.weight", self.lora_B, True)]
        if self.lora_B_bias is not None:
            rows.append(("lora_B.bias", self.lora_B_bias, False))
        if self.lora_magnitude_vector is not None:
            rows.append(("lora_magnitude_vector", self.lora_magnitude_vector, False))
        return rows


class LoRAEmbedding(nn.Layer):
    """base(ids) + scaling · A[ids] B around an embedding (V, D), with A (V, R) and B (R, D); no dropout, as in peft.

    DoRA rescales every column of the table to the trained magnitude, see LoRALinear.
    """

    def __init__(self, base: Embedding, rank: int, alpha: float, *, rslora: bool = False, dora: bool = False):
        super().__init__()
        (V, D), zeros = base.weight.shape, nn.initializer.Constant(0.0)
        self.base, self.enabled, self.key = base, True, ""
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.lora_embedding_A = self.create_parameter([V, rank], default_initializer=zeros)
        self.lora_embedding_B = self.create_parameter([rank, D], default_initializer=nn.initializer.Normal())
        self.lora_magnitude_vector = None
        base.weight.stop_gradient = True
        if dora:
            self.lora_magnitude_vector = self.create_parameter([D])
            self.lora_magnitude_vector.set_value(base.weight.norm(axis=0))

    def delta(self) -> paddle.Tensor:
        """(V, D) float32: what the adapter adds to the table."""
        return paddle.matmul(self.lora_embedding_A, self.lora_embedding_B) * self.scaling

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        x = self.base(ids)
        if not self.enabled:
            return x
        x = x + paddle.matmul(kernels.embedding(ids, self.lora_embedding_A), self.lora_embedding_B) * self.scaling
        if self.lora_magnitude_vector is None:
            return x
        with paddle.no_grad():
            norm = (self.base.weight + self.delta()).norm(axis=0)  # (D,)
        return x * (self.lora_magnitude_vector / norm)

    @paddle.no_grad()
    def merged(self) -> Embedding:
        """The embedding, with the adapter added to its table."""
        table = self.base.weight + self.delta()
        if self.lora_magnitude_vector is not None:
            table = table * (self.lora_magnitude_vector / table.norm(axis=0))
        self.base.weight.set_value(table)
        return self.base

    @property
    def weight(self) -> paddle.Tensor:
        """(V, D) of the base, which a tied head reads: as in peft, the adapter is not tied."""
        return self.base.weight

    def parts(self) -> list[tuple[str, paddle.Tensor, bool]]:
        """[(the end of peft's name, parameter, whether it is stored transposed)]"""
        rows = [("lora_embedding_A", self.lora_embedding_A, True), ("lora_embedding_B", self.lora_embedding_B, True)]
        if self.lora_magnitude_vector is not None:
            rows.append(("lora_magnitude_vector", self.lora_magnitude_vector, False))
        return rows


class TrainedTokens(nn.Layer):
    """An embedding (V, D) or a head (D, V) of which the rows of a few tokens are trained: peft's trainable tokens.

    The trained rows (n, D) stand in place of the base's. With a tied head both read them.
    """

    def __init__(self, base: Embedding | Linear, tokens: list[int]):
        super().__init__()
        self.base, self.tokens, self.enabled, self.key = base, list(tokens), True, ""
        self.is_head = isinstance(base, Linear)
        V, D = base.weight.shape[::-1] if self.is_head else base.weight.shape
        if not tokens or len({*tokens}) < len(tokens) or not all(type(i) is int and 0 <= i < V for i in tokens):
            raise UserError(f"trainable_token_indices: {tokens} must be different ids below the vocabulary's {V}")
        self.trainable_tokens_delta = self.create_parameter([len(tokens), D])
        rows = base.weight.T if self.is_head else base.weight
        self.trainable_tokens_delta.set_value(rows[paddle.to_tensor(self.tokens)].astype("float32"))
        row_of = np.full(V, -1, np.int64)
        row_of[self.tokens] = np.arange(len(tokens))
        self.register_buffer("row_of", paddle.to_tensor(row_of), persistable=False)  # id -> its trained row, or -1
        base.weight.stop_gradient = True

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        x = self.base(ids)
        if not self.enabled:
            return x
        rows = self.row_of[ids.flatten()].reshape(ids.shape)
        trained = kernels.embedding(rows.clip(min=0), self.trainable_tokens_delta)
        return paddle.where((rows >= 0).unsqueeze(-1), trained.astype(x.dtype), x)

    @property
    def weight(self) -> paddle.Tensor:
        """The table (V, D) or the head's weight (D, V) with the trained rows in it."""
        base = self.base.weight
        if not self.enabled:
            return base
        rows = (base.T if self.is_head else base).astype("float32")
        rows = paddle.scatter(rows, paddle.to_tensor(self.tokens), self.trainable_tokens_delta)
        return rows.T if self.is_head else rows

    @paddle.no_grad()
    def merged(self) -> Embedding | Linear:
        """The base layer, with the trained rows in it."""
        self.base.weight.set_value(self.weight.astype(self.base.weight.dtype))
        return self.base

    def parts(self) -> list[tuple[str, paddle.Tensor, bool]]:
        """[(the end of peft's name, parameter, whether it is stored transposed)]"""
        return [("token_adapter.trainable_tokens_delta", self.trainable_tokens_delta, False)]
