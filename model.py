"""One decoder that is every family, and a naive generate().

    model = adapters.from_pretrained("path/to/a/model")  # a Hugging Face or PaddleNLP folder of a family in families.py
    logits = model(input_ids)                            # (B, T) int64 -> (B, T, V)
    losses = model(input_ids, labels=labels)             # (B, T) float32 per token, without ever holding the logits
    tokens = generate(model, input_ids)                  # (B, T + new) int64 numpy

The decoder asks for the traits of a ModelConfig, never for a family: RMSNorm or LayerNorm before, after or around
each half of a block, the residual around either · positions by rotation (of all or some dims, halves or neighbors, in
two dimensions; linear, dynamic, yarn, llama3 scaling), by ALiBi or learned · grouped-query attention with FlashMask
rows, with windows, soft caps and norms of heads, or through latents (MLA) · q, k, v in one linear or three, as the
family's files have them, so that names, adapters and moments are one to one · MLPs with or without gate, dense or of
routed and shared experts · tied, own or normalized head.

This file knows nothing of topology or hardware: it reshapes with -1, calls kernels.*, and calls `comm` wherever several
ranks would have to talk (see LocalComm; parallel.ParallelComm is its version for several ranks). Labels come already
shifted. There is no dropout in the decoder, whatever config.json says: only LoRA has its own.

Letters: B batch, T sequence, D model width, H query heads, K key/value heads, Dh head dim, F feed-forward width, V
vocabulary, E experts, L layers, N tokens of a batch, P prefix tokens, R LoRA rank, r rotary dims of a head. A dim
with a divisor is sharded: (B, T/sep, H/tp, Dh); sp is sep, or sep · tp with sequence parallelism.
"""

import dataclasses
import math

import kernels
from kernels.reference import penalize, sample_logits

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from families import ModelConfig, MoEConfig, weight_names
from formats.files import UserError
from formats.quantization_config import scheme_of
from modules.layers import LINEARS, Embedding, Linear, Norm, QuantLinear, RNGTracker, linear_row
from modules.layers import set_parameter as set_parameter  # for callers
from modules.positions import (
    NO_ROW,
    alibi_slopes,
    append_mask_rows,
    check_one_sample_a_row,
    document_lengths,
    glm_positions_and_mask,
    rope_tables,
    shape_of,
    sliding_window_rows,
)


def kernel_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    past_k: paddle.Tensor | None,
    past_v: paddle.Tensor | None,
    mask_rows: paddle.Tensor | None,
    **options,
) -> paddle.Tensor:
    """q (B, T, H, Dh) over the past keys (B, past, K, Dh; None: there are none) and k (B, T, K, Dh) -> (B, T, H, Dh).

    mask_rows: FlashMask rows of all these keys; one column is causal, two are not.
    """
    if past_k is not None:
        k, v = paddle.concat([past_k, k], axis=1), paddle.concat([past_v, v], axis=1)
    return kernels.attention(q, k, v, mask_rows, mask_rows is None or mask_rows.shape[-1] == 1, **options)


# ======================================================================== where ranks talk, and what a pass carries


class LocalComm:
    """Every point at which the ranks of a parallel model talk, for one process: nothing is sent, all is identity.

    x (B, T/sp, D) is the residual stream; inside attention and MLP each rank of tp has all T/sep tokens of its heads
    and channels. layout says which tokens of a row of T a rank has; None: all of them. parallel.ParallelComm does the
    rest.
    """

    is_last_stage = True  # of a pipeline: holds the head

    def token_layout(self, T: int, is_cached: bool):
        """Which of T tokens this rank has; is_cached: a KVCache holds the keys before them."""

    def shard_context(self, context: "ForwardContext") -> "ForwardContext":
        """Rotary tables and mask rows of whole rows -> those that attention of this rank's tokens needs."""
        return context

    def local_tokens(self, x, layout, tp=True, fill=0) -> paddle.Tensor:
        """(B, T, …), the same on every rank -> (B, T/sp, …); (B, T/sep, …) with tp False. fill: of padding."""
        return x

    def gather_tokens(self, x, layout, tp=False, sum_gradients=False) -> paddle.Tensor:
        """(B, T/sep, …), with tp (B, T/sp, …) -> (B, T, …). sum_gradients: ranks use different parts of it."""
        return x

    def copy_to_tp_region(self, x, layout) -> paddle.Tensor:
        """(B, T/sp, D) -> (B, T/sep, D), read by each rank's heads, channels or ids; gradients are added up over tp."""
        return x

    def reduce_from_tp_region(self, x) -> paddle.Tensor:
        """(B, T/sep, D) partial over tp -> (B, T/sp, D)."""
        return x

    def replicated_over_tp(self, x) -> paddle.Tensor:
        """x, computed alike on all ranks of tp inside a region: its gradient is divided by their number."""
        return x

    def attention(self, q, k, v, past_k, past_v, mask_rows, layout, **options) -> paddle.Tensor:
        """q (B, T/sep, H/tp, Dh) over the keys of the whole row; by all-to-all (Ulysses) or around a ring."""
        return kernel_attention(q, k, v, past_k, past_v, mask_rows, **options)

    def cross_entropy(self, x, weight, labels, **options):
        """x (N, D), weight (D, V/tp) -> losses (N,)."""
        return kernels.linear_cross_entropy(x, weight, labels, **options)

    def max_over_vocab(self, x) -> paddle.Tensor:
        """(N,) the largest logit of V/tp -> of V."""
        return x

    def gather_logits(self, logits) -> paddle.Tensor:
        """(…, V/tp) -> (…, V)"""
        return logits

    def run_unit(self, name: str, function, *args):
        """function(*args), which reads the parameters of a unit; ZeRO-3 gathers them first, then releases them."""
        return function(*args)

    def run_stages(self, model, input_ids, context, cache) -> tuple:
        """CausalLM.run_all(); in a pipeline each stage's layers in turn, and (None, []) on all but the last one."""
        return model.run_all(input_ids, context, cache)

    def broadcast_from_last_stage(self, outputs):
        """The last stage's outputs, on every stage."""
        return outputs

    def num_parameters(self, model, trained) -> int:
        """Of the model of all ranks."""
        sizes = [math.prod(p.shape) for p in model.parameters() if not (trained and p.stop_gradient)]
        return sum(sizes)


@dataclasses.dataclass
class ForwardContext:
    """What all blocks of one forward pass read."""

    comm: LocalComm
    layout: object = None  # distributed.context.TokenLayout; None: every token is here
    position_ids: paddle.Tensor | None = None  # (B, T) of the text, without a prefix
    prefix_tokens: int = 0  # P
    past: list | None = None  # [(k, v)] of each layer, (B, P, K/tp, Dh): a prefix's, where no cache holds it
    cos: paddle.Tensor | None = None  # (B, T/sep, 1, r); None: no rotary positions
    sin: paddle.Tensor | None = None
    q_scale: paddle.Tensor | None = None  # (B, T/sep, 1, 1): a factor on queries
    mask_rows: object = None  # FlashMask rows (B, 1, keys, 1 or 2) of whole rows; for a ring a RingMask
    window_mask_rows: dict = dataclasses.field(default_factory=dict)  # {window: mask rows}
    checkpoint: object = None  # CausalLM.checkpoint_activations

    def rows_of_window(self, window: int | None):
        return self.window_mask_rows.get(window, self.mask_rows)


class KVCache:
    """Keys and values of the tokens before those of a pass: Cache below, and serving.runners.PagedRunner."""

    prefix_tokens = 0  # trained tokens before position 0 of the text, which position_ids do not count
    lengths = None  # the sequence lengths that rope_tables() uses, see rope_lengths(); None: those of the samples
    last_positions = None  # (B, 2) of the last token, for rope_2d

    def attend(self, layer: int, q, k, v, *, mask_rows, window, **options) -> paddle.Tensor:
        """Keep k and v (B, T, K, Dh) of a layer; attention of q (B, T, H, Dh) over all of its keys -> (B, T, H, Dh).

        mask_rows: what extend_mask_rows() gave, narrowed to the window; options: scale, softcap, alibi_slopes.
        """
        raise NotImplementedError

    def default_position_ids(self, B: int, T: int) -> paddle.Tensor:
        raise ValueError("this cache does not know the positions: position_ids must be given")

    def extend_mask_rows(self, mask_rows, B: int, T: int):
        """The mask rows of T new tokens (None: visible to all) -> those of all keys; the cache grows by T tokens."""
        return mask_rows

    def window_mask_rows(self, mask_rows, windows: set, B: int, T: int) -> dict:
        """{window: mask rows}; empty where attend() takes care of the window itself."""
        return {}


class Cache(KVCache):
    """Keys and values in one tensor a layer, (B, tokens, K, Dh), and the mask rows that they came with."""

    def __init__(self, layers: int):
        self.keys, self.values = [None] * layers, [None] * layers
        self.rows = None  # (B, 1, tokens, 1 or 2) int32, once any token had mask rows
        self.tokens = 0

    def attend(self, layer, q, k, v, *, mask_rows, window, **options) -> paddle.Tensor:
        if self.keys[layer] is not None:
            k = paddle.concat([self.keys[layer], k], axis=1)
            v = paddle.concat([self.values[layer], v], axis=1)
        self.keys[layer], self.values[layer] = k, v
        return kernel_attention(q, k, v, None, None, mask_rows, **options)

    def default_position_ids(self, B, T) -> paddle.Tensor:
        return (paddle.arange(T) + (self.tokens - self.prefix_tokens)).unsqueeze(0).expand([B, T])

    def extend_mask_rows(self, mask_rows, B, T):
        self.rows = append_mask_rows(self.rows, mask_rows, B, self.tokens, T)
        self.tokens += T
        return self.rows

    def window_mask_rows(self, mask_rows, windows, B, T) -> dict:
        return {window: sliding_window_rows(mask_rows, B, self.tokens, window) for window in windows}


# ======================================================================================================== attention


def _norm(config, width=None):
    return Norm(width or config.hidden_size, config.norm_eps, config.norm, config.norm_offset)


class Attention(nn.Layer):
    """Grouped-query attention. Under tensor parallelism `group` and `slopes` are those of this rank's heads."""

    backward_order = (2, 0, 1)  # in which backward reaches the results of qkv(): v is not rotated

    def __init__(self, config, layer):
        super().__init__()
        D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.layer, self.head_dim, self.group = config, layer, Dh, H // K
        self.window = config.windows[layer] if config.windows else None
        self.options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        self.slopes = alibi_slopes(H) if config.position == "alibi" else None
        self.make_projections(config)
        self.o_proj = Linear(H * self.v_head_dim, D, config.output_bias)

    def make_projections(self, config) -> None:
        D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.v_head_dim, bias = Dh, config.attention_bias
        if config.fused_qkv:
            self.qkv_proj = Linear(D, (H + 2 * K) * Dh, bias)
        else:
            self.q_proj = Linear(D, H * Dh, bias)
            self.k_proj = Linear(D, K * Dh, bias)
            self.v_proj = Linear(D, K * Dh, bias)
        self.q_norm = Norm(Dh, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(Dh, config.norm_eps) if config.qk_norm else None

    def forward(self, x, context, past_k=None, past_v=None, cache=None, recompute_core=False):
        """x (B, T/sp, D) -> (B, T/sp, D).

        past_k, past_v (B, P, K/tp, Dh): a trained prefix's. cache: a KVCache. recompute_core: all behind the first
        linears is computed again in backward.
        """
        states = self.qkv(context.comm.copy_to_tp_region(x, context.layout))
        if not recompute_core:
            return self.core_attention(*states, context, past_k, past_v, cache)
        order = (0, 1, 2) if context.cos is None else self.backward_order  # sums of gradients keep their bits

        def core(*inputs):
            return self.core_attention(*(inputs[order.index(i)] for i in range(3)), context, *inputs[3:])

        return context.checkpoint(core, *(states[i] for i in order), past_k, past_v)

    def qkv(self, x) -> tuple:
        """x (B, T/sep, D) -> what apply_rotary() reads: q (B, T/sep, H/tp, Dh), k and v (B, T/sep, K/tp, Dh)."""
        Dh, G = self.head_dim, self.group
        if self.config.fused_qkv is None:
            return tuple(p(x).reshape([0, 0, -1, Dh]) for p in (self.q_proj, self.k_proj, self.v_proj))  # 0 keeps a dim
        qkv = self.qkv_proj(x)  # (B, T/sep, (H + 2K)/tp · Dh)
        if self.config.fused_qkv == "blocks":
            K = qkv.shape[-1] // ((G + 2) * Dh)
            return tuple(t.reshape([0, 0, -1, Dh]) for t in qkv.split([G * K * Dh, K * Dh, K * Dh], axis=-1))
        q, k, v = qkv.reshape([0, 0, -1, G + 2, Dh]).split([G, 1, 1], axis=3)  # (B, T/sep, K/tp, G | 1 | 1, Dh)
        return q.reshape([0, 0, -1, Dh]), k.squeeze(3), v.squeeze(3)

    def core_attention(self, q, k, v, context, past_k=None, past_v=None, cache=None) -> paddle.Tensor:
        """What qkv() gives -> (B, T/sp, D)."""
        q, k, v = self.apply_rotary(q, k, v, context.cos, context.sin)
        q = q if context.q_scale is None else q * context.q_scale
        options = {"alibi_slopes": None if self.slopes is None else kernels.to_tensor(self.slopes), **self.options}
        mask_rows = context.rows_of_window(self.window)
        if cache is not None:
            out = cache.attend(self.layer, q, k, v, mask_rows=mask_rows, window=self.window, **options)
        else:
            out = context.comm.attention(q, k, v, past_k, past_v, mask_rows, context.layout, **options)
        if self.v_head_dim != self.head_dim:
            out = out[..., : self.v_head_dim]  # values were padded to the width of keys
        return self.o_proj(out.reshape([0, 0, -1]))

    def apply_rotary(self, q, k, v, cos, sin) -> tuple:
        """What qkv() gives -> q (B, T/sep, H/tp, Dh), k and v (B, T/sep, K/tp, Dh), normed and rotated."""
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is None:
            return q, k, v
        if self.config.position != "rope_2d":
            interleaved = self.config.rope_interleaved
            return kernels.rope(q, cos, sin, interleaved), kernels.rope(k, cos, sin, interleaved), v
        half = self.head_dim // 2  # each half of a head rotates with one of the two positions

        def rotate(x):
            first = kernels.rope(x[..., :half], cos[..., :half], sin[..., :half])
            return paddle.concat([first, kernels.rope(x[..., half:], cos[..., half:], sin[..., half:])], axis=-1)

        return rotate(q), rotate(k), v


class MultiheadLatentAttention(Attention):
    """Attention whose queries and keys come through narrow layers (see MLAConfig); keys and values are kept in full."""

    backward_order = (0, 1, 2)

    def make_projections(self, config) -> None:
        D, H, latent = config.hidden_size, config.num_attention_heads, config.latent
        self.v_head_dim = latent.v_head_dim
        width = H * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        if latent.q_lora_rank:
            self.q_a_proj = Linear(D, latent.q_lora_rank, config.attention_bias)
            self.q_a_norm = Norm(latent.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(latent.q_lora_rank, width, False)
        else:
            self.q_proj = Linear(D, width, False)
        self.kv_a_proj = Linear(D, latent.kv_lora_rank + latent.qk_rope_head_dim, config.attention_bias)
        self.kv_a_norm = Norm(latent.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(latent.kv_lora_rank, H * (latent.qk_nope_head_dim + latent.v_head_dim), False)

    def qkv(self, x) -> tuple:
        """q (B, T/sep, H/tp, nope + rope), k and v (B, T/sep, H/tp, nope + value), common key (B, T/sep, rope)."""
        latent = self.config.latent
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if latent.q_lora_rank else self.q_proj(x)
        narrow, k_rope = self.kv_a_proj(x).split([latent.kv_lora_rank, latent.qk_rope_head_dim], axis=-1)
        kv = self.kv_b_proj(self.kv_a_norm(narrow)).reshape([0, 0, -1, latent.qk_nope_head_dim + latent.v_head_dim])
        return q.reshape([0, 0, -1, self.head_dim]), kv, k_rope

    def apply_rotary(self, q, kv, k_rope, cos, sin) -> tuple:
        latent, interleaved = self.config.latent, self.config.rope_interleaved
        q_nope, q_rope = q.split([latent.qk_nope_head_dim, latent.qk_rope_head_dim], axis=-1)
        k_nope, v = kv.split([latent.qk_nope_head_dim, latent.v_head_dim], axis=-1)
        q_rope = kernels.rope(q_rope, cos, sin, interleaved)
        k_rope = kernels.rope(k_rope.unsqueeze(2), cos, sin, interleaved)  # (B, T/sep, 1, rope)
        k_rope = k_rope.expand([-1, -1, shape_of(k_nope)[2], -1])
        q, k = paddle.concat([q_nope, q_rope], axis=-1), paddle.concat([k_nope, k_rope], axis=-1)
        missing = self.head_dim - v.shape[-1]
        return q, k, F.pad(v, [0, 0] * (v.ndim - 1) + [0, missing]) if missing > 0 else v


LATENT_NORM_EPS = 1e-6  # whatever config.json says of the other norms


# ========================================================================================================= MLP, MoE


def _activate(x, kind):
    if kind == "relu":
        return F.relu(x)
    return F.silu(x) if kind == "silu" else kernels.gelu(x, kind == "gelu_tanh")


class MLP(nn.Layer):
    """down(act(gate) · up) or, not gated, down(act(up)); of `width` in place of the config's."""

    def __init__(self, config, width=None):
        super().__init__()
        D, width = config.hidden_size, width or config.intermediate_size
        self.activation, self.gated = config.activation, config.gated
        self.gate_proj = self.up_proj = self.gate_up_proj = None
        if config.fused_gate_up:
            self.gate_up_proj = Linear(D, 2 * width, config.mlp_bias)
        else:
            self.gate_proj = Linear(D, width, config.mlp_bias) if config.gated else None
            self.up_proj = Linear(D, width, config.mlp_bias)
        self.down_proj = Linear(width, D, config.mlp_bias)

    def forward(self, x, residual=None):
        """x (B, T/sep, D) -> (B, T/sp, D), residual added if given."""
        if not self.gated:
            return self.down_proj(_activate(self.up_proj(x), self.activation), residual)
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)  # (B, T/sep, F/tp)
        if self.activation == "silu":
            return self.down_proj(kernels.swiglu(gate, up), residual)
        return self.down_proj(kernels.geglu(gate, up, self.activation == "gelu_tanh"), residual)


def select_experts(scores: paddle.Tensor, moe: MoEConfig) -> paddle.Tensor:
    """(N, E) -> (N, k): the ids of the highest scores; with groups, from the best groups."""
    if moe.n_group > 1:
        grouped = scores.reshape([-1, moe.n_group, moe.num_experts // moe.n_group])
        best = paddle.topk(grouped, moe.group_topk_sum, axis=-1)[0].sum(-1)  # (N, groups)
        allowed = F.one_hot(paddle.topk(best, moe.topk_group, axis=-1)[1], moe.n_group).sum(1)  # (N, groups)
        never = paddle.full_like(grouped, -math.inf)
        scores = paddle.where(allowed.unsqueeze(-1).expand(grouped.shape) > 0, grouped, never).flatten(1)
    return paddle.topk(scores, moe.top_k, axis=-1)[1]


class MoE(nn.Layer):
    """A sum over the top_k experts of each token, weighted by the router, and the shared expert (see MoEConfig)."""

    def __init__(self, config):
        super().__init__()
        self.moe = moe = config.experts
        self.router = Linear(config.hidden_size, moe.num_experts, False)
        self.experts = nn.LayerList([MLP(config, moe.expert_intermediate_size) for _ in range(moe.num_experts)])
        self.shared = MLP(config, moe.shared_expert_intermediate_size) if moe.shared_expert_intermediate_size else None
        self.shared_gate = Linear(config.hidden_size, 1, False) if moe.shared_gate else None
        if moe.correction_bias:
            self.register_buffer("correction_bias", paddle.zeros([moe.num_experts]))

    def forward(self, x, context, residual=None):
        """x (B, T/sp, D) -> ((B, T/sp, D), the router's probabilities (B · T/sep, E) float32)"""
        x = context.comm.copy_to_tp_region(x, context.layout)
        flat = x.reshape([-1, x.shape[-1]])  # (N, D)
        weights, chosen, probabilities = self.route(flat)
        y = self.dispatch_and_combine(flat, weights, chosen, context.layout).reshape(shape_of(x))
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else F.sigmoid(self.shared_gate(x)) * shared)
        y, probabilities = context.comm.reduce_from_tp_region(y), context.comm.replicated_over_tp(probabilities)
        return y if residual is None else residual + y, probabilities

    def route(self, flat) -> tuple:
        """(N, D) -> weights (N, k) float32 and ids (N, k) of the chosen experts, probabilities (N, E)."""
        moe = self.moe
        logits = paddle.matmul(flat.astype("float32"), self.router.weight.astype("float32"))
        scores = F.sigmoid(logits) if moe.scoring == "sigmoid" else F.softmax(logits, axis=-1)
        choice = scores.detach() + self.correction_bias if moe.correction_bias else scores.detach()
        chosen = select_experts(choice, moe)
        weights = paddle.take_along_axis(scores, chosen, axis=-1)
        if moe.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * moe.routed_scaling_factor, chosen, scores

    def dispatch_and_combine(self, flat, weights, chosen, layout=None) -> paddle.Tensor:
        """Sort the tokens by expert, run every expert on its own, add up each token's k results: (N, D) -> (N, D)."""
        k = chosen.shape[-1]
        if not paddle.in_dynamic_mode():  # no shapes that depend on values: all experts on all tokens
            share = (F.one_hot(chosen, self.moe.num_experts) * weights.unsqueeze(-1)).sum(1)  # (N, E)
            return sum(expert(flat) * share[:, e : e + 1] for e, expert in enumerate(self.experts))
        ids = chosen.flatten()  # (N · k,)
        order = paddle.argsort(ids, stable=True)
        counts = np.bincount(ids.numpy(), minlength=self.moe.num_experts)
        y = self.run_experts(paddle.index_select(flat, order // k), counts)
        restore_order = paddle.argsort(order)
        y = paddle.index_select(y, restore_order).reshape([-1, k, flat.shape[-1]])
        return (y * weights.unsqueeze(-1).astype(y.dtype)).sum(1)

    def run_experts(self, tokens, counts) -> paddle.Tensor:
        """tokens (n, D), sorted by expert, counts[e] of each -> (n, D), the experts' outputs."""
        parts = paddle.split(tokens, [int(n) for n in counts if n])
        used = [expert for expert, n in zip(self.experts, counts) if n]
        return paddle.concat([expert(part) for expert, part in zip(used, parts)])


def load_balancing_loss(probabilities: list, moe: MoEConfig, real: paddle.Tensor) -> paddle.Tensor:
    """E · sum over experts of (share of the tokens that chose it) · (its mean probability), arXiv 2101.03961, Eq. 4-6.

    probabilities: (B · T, E) of each sparse layer; shares and means are over the tokens of all layers together for
    which real (B, T) is 1. With moe.aux_by_layer over those of one layer, and with aux_by_sequence of one row of it;
    their losses are averaged over rows and added up over layers, and shares are of all choices.
    """
    E, rows = moe.num_experts, len(real) if moe.aux_by_layer and moe.aux_by_sequence else 1
    layers = probabilities if moe.aux_by_layer else [paddle.concat(probabilities)]
    real, total = real.flatten().tile([len(probabilities) // len(layers)]).reshape([rows, -1, 1]), 0.0
    share = real / real.sum(1, keepdim=True).clip(min=1.0)  # adds up to 1
    for p in layers:
        chosen = F.one_hot(select_experts(p.detach(), moe), E).sum(1).reshape([rows, -1, E])
        p = p.reshape([rows, -1, E])
        total = total + ((chosen * share).sum(1) * (p * share).sum(1)).sum(-1).mean() * E
    return total / moe.top_k if moe.aux_by_layer else total


# ========================================================================================================= the model


class Block(nn.Layer):
    """Attention and MLP with their norms and residuals, in the order of config.norm_place."""

    def __init__(self, config, layer):
        super().__init__()
        sparse = config.experts is not None and layer not in config.experts.dense_layers
        self.place, self.residual_scale = config.norm_place, config.residual_scale
        self.attention_norm = _norm(config)
        self.attention = (MultiheadLatentAttention if config.latent else Attention)(config, layer)
        self.mlp_norm = _norm(config)
        self.mlp = MoE(config) if sparse else MLP(config)
        self.attention_post_norm = _norm(config) if self.place == "both" else None
        self.mlp_post_norm = _norm(config) if self.place == "both" else None

    def forward(self, x, context, past_k=None, past_v=None, cache=None, granularity=None):
        """x (B, T/sp, D) -> (B, T/sp, D), and the router's probabilities (N, E) of a sparse block, else None.

        granularity: what is computed again in backward, "full_attn" (all of attention) or "core_attn"; None: nothing.
        """
        attention = past_k, past_v, cache, granularity
        if self.place == "after":
            x = self.attention_norm(self._attend(x, context, *attention, add_input=True))
            y, probabilities = self._feed_forward(x, context, residual=x)
            return self.mlp_norm(y), probabilities
        y = self.attention_norm(x)
        attended = self._attend(y, context, *attention)
        if self.residual_scale is not None:
            y = self.mlp_norm(y * self.residual_scale + attended)
            return self._feed_forward(y, context, residual=y * self.residual_scale)
        if self.place == "both":
            y, x = self.mlp_norm(self.attention_post_norm(attended), x)
            y, probabilities = self._feed_forward(y, context)
            return x + self.mlp_post_norm(y), probabilities
        y, x = self.mlp_norm(attended, x)
        return self._feed_forward(y, context, residual=x)

    def _attend(self, x, context, past_k, past_v, cache, granularity, add_input=False):
        """Attention of x; with add_input x + that."""
        if granularity == "full_attn":

            def attend(x, past_k, past_v):  # with the sum inside, gradients have the same bits as without recompute
                y = self.attention(x, context, past_k, past_v)
                return x + y if add_input else y

            return context.checkpoint(attend, x, past_k, past_v)
        y = self.attention(x, context, past_k, past_v, cache, granularity == "core_attn")
        return x + y if add_input else y

    def _feed_forward(self, x, context, residual=None):
        if isinstance(self.mlp, MoE):
            return self.mlp(x, context, residual)
        return self.mlp(context.comm.copy_to_tp_region(x, context.layout), residual), None


class CausalLM(nn.Layer):
    """The decoder. comm: where ranks talk, see LocalComm."""

    def __init__(self, config: ModelConfig, comm: LocalComm | None = None):
        super().__init__()
        self.comm, self.rng = comm or LocalComm(), RNGTracker()
        self.config, width = config, config.embedding_size or config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, width)
        self.embed_positions = None
        if config.position == "learned":
            positions = config.max_position_embeddings + config.position_offset
            self.embed_positions = Embedding(positions, config.hidden_size)
        projected = width != config.hidden_size
        self.project_in = Linear(width, config.hidden_size, bias=False) if projected else None
        self.project_out = Linear(config.hidden_size, width, bias=False) if projected else None
        self.embed_norm = _norm(config) if config.embedding_norm else None
        self.layers = nn.LayerList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = _norm(config) if config.final_norm else None
        self.lm_head = None if config.tie_word_embeddings else Linear(width, config.vocab_size, bias=False)
        self.prefix = None  # set by apply_prefix()
        self.score = None  # a head of one output, set by heads.add_score_head()
        self.distances_count = distances_count(config)
        self.names_on_other_ranks = frozenset()  # names of weights that other processes hold
        self.recompute = False  # compute activations of each block again in backward instead of keeping them
        self.recompute_granularity = (
            "full"  # all of a block, "full_attn": attention, "core_attn": behind its first linears
        )
        self.no_recompute_layers = frozenset()  # layers without recompute
        self.neftune_noise_alpha = 0.0  # training noise on the embeddings (Jain et al., arXiv 2310.05914)
        self.active_weights = self._count_active_weights()

    def forward(
        self,
        input_ids: paddle.Tensor,
        position_ids: paddle.Tensor | None = None,
        startend_row_indices: paddle.Tensor | None = None,
        caches: KVCache | None = None,
        labels: paddle.Tensor | None = None,
        return_predictions: bool = False,
        auxiliary_losses: bool | str = True,
    ):
        """input_ids (B, T) int64 -> logits (B, T, V), or with labels (B, T) -> losses (B, T) float32, 0 where -100.

        position_ids (B, T) default to 0…T-1 after what `caches` (a KVCache, extended in place) holds;
        startend_row_indices (B, 1, T, 1) int32 are FlashMask rows. labels are already shifted: labels[t] is the
        target of position t. return_predictions: (losses, argmax ids (B, T) int64). While training, a family's
        auxiliary losses of the batch (router balance, z-loss) are added to every loss that counts;
        auxiliary_losses=False: plain -log p; "apart": they stand where no loss counts.
        """
        context = self.start_forward(input_ids, position_ids, startend_row_indices, caches)
        x, probabilities = self.comm.run_stages(self, input_ids, context, caches)
        outputs = None
        if self.comm.is_last_stage:
            outputs = self.outputs(x, probabilities, context, labels, return_predictions, auxiliary_losses)
        return self.comm.broadcast_from_last_stage(outputs)

    def hidden_states(self, input_ids, position_ids=None, mask_rows=None, caches=None) -> paddle.Tensor:
        """(B, T, D) after the final norm; arguments as in forward(). A paged cache needs position_ids."""
        context = self.start_forward(input_ids, position_ids, mask_rows, caches)
        x, _ = self.comm.run_stages(self, input_ids, context, caches)
        if self.comm.is_last_stage:
            x = self.comm.gather_tokens(x, context.layout, tp=True)
        return self.comm.broadcast_from_last_stage(x)

    def logits(self, x: paddle.Tensor) -> paddle.Tensor:
        """hidden_states() (…, D) -> (…, V)"""
        outputs = self.comm.run_unit("head", self._logits, x, None) if self.comm.is_last_stage else None
        return self.comm.broadcast_from_last_stage(outputs)

    # ------------------------------------------------------------------------------------------------ before the blocks

    def start_forward(self, input_ids, position_ids=None, mask_rows=None, caches=None) -> ForwardContext:
        """The ForwardContext of a pass; a cache grows by T. Without a cache a trained prefix stands before each row."""
        (B, T), config = input_ids.shape, self.config
        if self.training:
            self.rng.renew()
        past, P = None, 0 if caches is None else caches.prefix_tokens
        if caches is None and self.prefix is not None:
            past, P = self.prefix.keys_and_values(B, self.comm), self.prefix.tokens
        if position_ids is None:
            row = paddle.arange(T).unsqueeze(0).expand([B, T])
            position_ids = row if caches is None else caches.default_position_ids(B, T)
        text_positions = position_ids
        if config.position == "rope_2d" and position_ids.ndim == 2:
            position_ids, mask_rows = self._glm_positions(input_ids, position_ids, mask_rows, caches)
        windows = set(config.windows) - {None}
        if caches is not None:
            mask_rows = caches.extend_mask_rows(mask_rows, B, T)
            window_mask_rows = caches.window_mask_rows(mask_rows, windows, B, T)
        else:
            mask_rows = append_mask_rows(None, mask_rows, B, P, T) if P else mask_rows
            window_mask_rows = {w: sliding_window_rows(mask_rows, B, P + T, w) for w in windows}
        cos, sin, q_scale = self._rotary(position_ids, P, caches)
        context = ForwardContext(
            comm=self.comm,
            layout=self.comm.token_layout(T, caches is not None),
            position_ids=text_positions,
            prefix_tokens=P,
            past=past,
            cos=cos,
            sin=sin,
            q_scale=q_scale,
            mask_rows=mask_rows,
            window_mask_rows=window_mask_rows,
            checkpoint=self.checkpoint_activations,
        )
        return self.comm.shard_context(context)

    def _glm_positions(self, input_ids, position_ids, mask_rows, cache):
        """glm_positions_and_mask(), and for tokens after those that a cache holds: the answer goes on."""
        if cache is None or cache.last_positions is None:
            position_ids, mask_rows = glm_positions_and_mask(self.config, input_ids, position_ids, mask_rows)
        else:
            B, T = input_ids.shape
            steps = paddle.stack([paddle.zeros([T], "int64"), paddle.arange(1, T + 1)], axis=-1)
            position_ids = cache.last_positions.unsqueeze(1) + steps  # (B, T, 2)
            upper = paddle.arange(T, dtype="int32").reshape([1, 1, T, 1]).expand([B, 1, T, 1])
            mask_rows = paddle.full([B, 1, T, 1], NO_ROW, "int32") if mask_rows is None else mask_rows
            mask_rows = paddle.concat([mask_rows, upper], axis=-1)
        if cache is not None:
            cache.last_positions = position_ids[:, -1]
        return position_ids, mask_rows

    def _rotary(self, position_ids, P, cache):
        """cos, sin (B, T, 1, r), and the factor on queries (B, T, 1, 1); each may be None."""
        config, lengths, q_scale = self.config, None if cache is None else cache.lengths, None
        if config.rope["rope_type"] == "qwen_ntk":
            if self.training:  # trained at its own length, without stretching
                config = dataclasses.replace(config, rope={**config.rope, "rope_type": "default"})
            elif cache is not None:  # keys keep the rotation they were written with
                lengths = document_lengths(position_ids) + P if lengths is None else lengths
                cache.lengths = lengths[:, -1:]
        if config.logn_length is not None and not self.training:  # Su, "Entropy invariance of attention", 2021
            position = (position_ids + P + 1).astype("float32")
            q_scale = paddle.clip(paddle.log(position) / math.log(config.logn_length), min=1.0)
            q_scale = q_scale.unsqueeze(-1).unsqueeze(-1)
        if config.position == "rope_2d":
            P = 0  # a prefix is no part of the context
        return *rope_tables(config, position_ids + P, lengths), q_scale

    def embed(self, input_ids, context) -> paddle.Tensor:
        """ids (B, T) -> (B, T/sp, D), the first block's input."""
        return self.comm.run_unit("embed", self._embed, input_ids, context)

    def _embed(self, input_ids, context):
        comm, config, layout = self.comm, self.config, context.layout
        x = self.embed_tokens(comm.local_tokens(input_ids, layout, tp=False))
        if self.training and self.neftune_noise_alpha:
            lengths = document_lengths(context.position_ids).astype("float32")
            size = paddle.sqrt(lengths * x.shape[-1]).unsqueeze(-1)  # (B, T, 1)
            with self.rng.fork("noise"):
                noise = paddle.uniform([*input_ids.shape, x.shape[-1]], "float32", -1.0, 1.0).astype(x.dtype)
            x = x + comm.local_tokens(noise * (self.neftune_noise_alpha / size).astype(x.dtype), layout)
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            positions = comm.local_tokens(context.position_ids, layout)
            x = x + self.embed_positions(positions + context.prefix_tokens + config.position_offset)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.recompute and self.training and x.stop_gradient:
            x.stop_gradient = False  # Paddle's recompute passes gradients to adapters only if an input has one
        return x

    # ------------------------------------------------------------------------------------------------------- the blocks

    def run_all(self, input_ids, context, cache) -> tuple:
        """Ids (B, T) -> hidden states (B, T/sp, D) after the final norm, and run_layers()' probabilities."""
        x, probabilities = self.run_layers(range(len(self.layers)), self.embed(input_ids, context), context, cache)
        return self.final_norm(x), probabilities

    def run_layers(self, layers, x, context, cache=None) -> tuple:
        """x (B, T/sp, D) after these layers (indices), and [probabilities (N, E)] of the sparse ones' routers."""
        probabilities = []
        for i in layers:
            past_k, past_v = (None, None) if context.past is None else context.past[i]
            x, routed = self.comm.run_unit(f"layers.{i}", self._run_block, i, x, context, past_k, past_v, cache)
            if routed is not None:
                probabilities.append(routed)
        return x, probabilities

    def _run_block(self, i, x, context, past_k, past_v, cache):
        block, granularity = self.layers[i], None
        if self.recompute and self.training and cache is None and i not in self.no_recompute_layers:
            granularity = self.recompute_granularity
        if granularity != "full":
            return block(x, context, past_k, past_v, cache, granularity)

        def outputs(x, past_k, past_v):
            y, probabilities = block(x, context, past_k, past_v)
            return y if probabilities is None else (y, probabilities)

        y = self.checkpoint_activations(outputs, x, past_k, past_v)
        return y if isinstance(y, (tuple, list)) else (y, None)

    def checkpoint_activations(self, function, *tensors):
        """function(*tensors), computed again in backward with the same randomness (arXiv 1604.06174)."""
        number = self.rng.number

        def in_this_pass(*tensors):
            self.rng.number = number
            return function(*tensors)

        return paddle.distributed.fleet.utils.recompute(in_this_pass, *tensors)

    def final_norm(self, x) -> paddle.Tensor:
        return x if self.norm is None else self.comm.run_unit("norm", self.norm, x)

    # ---------------------------------------------------------------------------------------------- behind the blocks

    def outputs(self, x, probabilities, context, labels=None, return_predictions=False, auxiliary_losses=True):
        """What forward() returns, from the hidden states (B, T/sp, D) after the final norm."""
        if labels is None:
            return self.comm.run_unit("head", self._logits, x, context.layout)
        if self.prefix is not None and self.distances_count:
            check_one_sample_a_row(context.position_ids, labels)
        options = context.layout, return_predictions, auxiliary_losses
        return self.comm.run_unit("head", self._losses, x, probabilities, labels, *options)

    def _head_input(self, x, layout):
        x = x if self.project_out is None else self.project_out(x)
        return self.comm.copy_to_tp_region(x, layout)

    def head_weight(self) -> tuple:
        """The head's weight (D, V/tp) and False, or, as a tied one is stored, (V/tp, D) and True."""
        if self.lm_head is None:
            return self.embed_tokens.weight, True
        if self.config.norm_head:
            weight = self.lm_head.weight.astype("float32")
            return weight / weight.norm(axis=0, keepdim=True).clip(min=1e-12), False
        return self.lm_head.weight, False

    def _logits(self, x, layout):
        """(B, T/sp, D), or without a layout (…, D) -> (B, T, V) or (…, V)"""
        x = self._head_input(x, layout)
        weight, tied = self.head_weight()
        logits = paddle.matmul(x, weight, transpose_y=True) if tied else kernels.linear(x, weight)  # .T would be a copy
        cap = self.config.final_softcap
        logits = logits if cap is None else paddle.tanh(logits / cap) * cap
        return self.comm.gather_tokens(self.comm.gather_logits(logits), layout)

    def _losses(self, x, probabilities, labels, layout, return_predictions, auxiliary_losses):
        """(B, T/sp, D) and labels (B, T) -> losses (B, T), and predictions (B, T) if asked for."""
        labels = self.comm.local_tokens(labels, layout, tp=False, fill=-100)
        x = self._head_input(x, layout)
        weight, tied = self.head_weight()
        flat, softcap = x.reshape([-1, x.shape[-1]]), self.config.final_softcap
        options = dict(transpose_weight=tied, return_predictions=return_predictions, softcap=softcap)
        outputs = self.comm.cross_entropy(flat, weight, labels.flatten(), **options)
        losses, predictions = outputs if return_predictions else (outputs, None)
        losses = losses.reshape(labels.shape)
        if self.training and auxiliary_losses:
            auxiliary = self.auxiliary_loss(flat, labels, weight, tied, probabilities, layout)
            if auxiliary is not None:
                losses = losses + auxiliary * ((labels == -100) == (auxiliary_losses == "apart")).astype(losses.dtype)
        losses = self.comm.gather_tokens(losses, layout)
        if not return_predictions:
            return losses
        return losses, self.comm.gather_tokens(predictions.reshape(labels.shape), layout)

    def auxiliary_loss(self, x, labels, weight, tied, probabilities, layout) -> paddle.Tensor | None:
        """A family's addition to the mean loss of the batch, a scalar, or None; x (N, D), labels (B, T/sep).

        Over the tokens up to the last label of each row: behind it is padding, which would be balanced too.
        """
        moe = self.config.experts if probabilities and self.config.experts.aux_loss_coef else None
        z_loss_weight, loss = self.config.z_loss_weight, None
        if not z_loss_weight and moe is None:
            return None

        def of_all_tokens(flat):  # (N, …) of local tokens -> (B · T, …)
            rows = flat.reshape([*labels.shape, *flat.shape[1:]])
            return self.comm.gather_tokens(rows, layout, sum_gradients=True).flatten(0, 1)

        real = (self.comm.gather_tokens(labels, layout) != -100).astype("float32")
        real = (real.flip(1).cumsum(1).flip(1) > 0).astype("float32")  # (B, T)
        if moe is not None:
            loss = load_balancing_loss([of_all_tokens(p) for p in probabilities], moe, real) * moe.aux_loss_coef
        if z_loss_weight:
            largest = of_all_tokens(self.comm.max_over_vocab(self._largest_logits(x, weight, tied)))
            mean = (largest.square() * real.flatten()).sum() / real.sum().clip(min=1.0)
            loss = (0.0 if loss is None else loss) + z_loss_weight * mean
        return loss

    def _largest_logits(self, x, weight, tied):
        """x (N, D) -> the largest logit of each row (N,): its id without gradient, then only that logit."""
        with paddle.no_grad():
            rows = x.split(-(-x.shape[0] // Z_LOSS_ROWS))
            best = paddle.concat([kernels.linear(part, weight.T if tied else weight).argmax(-1) for part in rows])
        return (x * kernels.embedding(best, weight if tied else weight.T)).sum(-1)

    # --------------------------------------------------------------------------------------------------------- others

    def new_cache(self, B: int) -> Cache:
        """An empty Cache for B sequences, or one that begins with the trained prefix."""
        cache = Cache(self.config.num_hidden_layers)
        if self.prefix is not None:
            states = self.prefix.keys_and_values(B, self.comm)
            cache.keys, cache.values = ([pair[i] for pair in states] for i in (0, 1))
            cache.tokens = cache.prefix_tokens = self.prefix.tokens
        return cache

    def num_parameters(self, trained: bool = False) -> int:
        """Of the whole model, also where this process has a part of it. trained: only those that have a gradient."""
        return self.comm.num_parameters(self, trained)

    def _count_active_weights(self):
        """Weights of the linears that a token passes, the head too; embedding look-ups are free."""
        moe, total = self.config.experts, 0.0
        for name, layer in self.named_sublayers():
            if isinstance(layer, Linear):
                total += layer.n_in * layer.n_out * (moe.top_k / moe.num_experts if ".experts." in name else 1.0)
        tied = self.config.vocab_size * self.embed_tokens.weight.shape[1] if self.lm_head is None else 0
        return total + tied

    def flops_per_token(self, T: int) -> float:
        """FLOPs of one token's forward and backward in a causal sequence of T (arXiv 2204.02311, B).

        6 per weight of every linear that a token passes, and 12 · H · Dh · T/2 a layer for attention.
        """
        c = self.config
        width = c.head_dim if c.latent is None else (c.head_dim + c.latent.v_head_dim) / 2
        return 6.0 * self.active_weights + 6.0 * c.num_hidden_layers * c.num_attention_heads * width * T


Z_LOSS_ROWS = 1024  # tokens whose logits are held at once while the largest is looked for


def distances_count(config: ModelConfig) -> bool:
    """Whether attention depends on the distance of query and key: then a prefix must be right before its sample."""
    return config.position == "alibi" or any(config.windows)


# ============================================================================================== making, linears by name

# The tensors of a QuantLinear: our name, theirs, dtype on disk. (There int8 weights are [out, in], packed ones as
# here.)
_QUANTIZED = (("qweight", "qweight", None), ("scales", "scales", None), ("qzeros", "qzeros", "int32"),
              ("g_index", "g_idx", "int32"), ("input_scale", "input_scale", "float32"))  # fmt: skip


def build(config: ModelConfig, dtype: str = "float32") -> CausalLM:
    """A CausalLM whose parameters take no memory until each is set."""
    before = paddle.get_default_dtype()
    try:
        paddle.set_default_dtype(dtype)
        with paddle.LazyGuard():
            model = CausalLM(config)
            if config.quantization is not None:
                _replace_by_quant_linears(model, config.quantization)
            return model
    finally:
        paddle.set_default_dtype(before)


def _replace_by_quant_linears(model, quantization):
    """Linears of the blocks become QuantLinear; after a shift, norms and the linears that read them have biases."""
    activation = quantization.get("activation")
    for block in model.layers if quantization.get("shift") else ():
        layers = dict(block.named_sublayers())
        for norm, names in shiftable_norms(block).items():
            if layers[norm].bias is None:
                layers[norm].add_bias()
            for layer in (layers[name] for name in names if layers[name].bias is None):
                layer.bias = layer.create_parameter([layer.n_out], is_bias=True)
    group_size, desc_act = quantization.get("group_size", -1), quantization.get("desc_act", False)
    for path, (parent, attribute, layer) in block_linears(model).items():
        if path in (quantization.get("modules_to_not_convert") or ()):
            continue
        scheme, bias = scheme_of(quantization, path), layer.bias is not None
        is_static = activation != "per_token" and path not in quantization.get("per_token_modules", ())
        layer = QuantLinear(layer.n_in, layer.n_out, scheme, group_size, bias, desc_act, is_static)
        setattr(parent, attribute, layer)


def norm_consumers(block: Block) -> dict[str, list[str]]:
    """{norm: [layer, …]} by their names in a block of float linears: norms that nothing else reads, no residual."""
    layers = [name for name, layer in block.named_sublayers() if isinstance(layer, Linear) and linear_row(name)]
    consumers = {row.input: [] for row in LINEARS.values() if row.input}
    for name in layers:
        if (norm := linear_row(name).input) is not None:
            consumers[norm].append(name)
    if block.place == "after" or block.residual_scale is not None:
        del consumers["attention_norm"], consumers["mlp_norm"]
    return {norm: names for norm, names in consumers.items() if names}


def shiftable_norms(block: Block) -> dict[str, list[str]]:
    """Those of norm_consumers() whose output can be moved by a constant: a router has no bias to take it."""
    return {norm: names for norm, names in norm_consumers(block).items() if all(linear_row(n).adaptable for n in names)}


def linear_paths(config: ModelConfig) -> list[tuple[str, str]]:
    """[(our path, Hugging Face's module path)] of the linears of all blocks."""
    paths = []
    for ours, theirs, _ in weight_names(config):
        row = linear_row(ours) if ours.startswith("layers.") and ours.endswith(".weight") else None
        if row is not None and row.adaptable:
            paths.append((ours.removesuffix(".weight"), theirs.removesuffix(".weight")))
    return paths


def block_linears(model: CausalLM) -> dict[str, tuple]:
    """{Hugging Face module path: (parent layer, attribute, layer)} of the linears of the blocks that are here."""
    layers, linears = dict(model.named_sublayers()), {}
    for ours, theirs in linear_paths(model.config):
        if ours in layers:
            parent, _, attribute = ours.rpartition(".")
            linears[theirs] = (layers[parent], attribute, layers[ours])
    return linears


# ============================================================================================== generate


@paddle.no_grad()
def generate(
    model: CausalLM,
    input_ids: np.ndarray,
    max_new_tokens: int = 64,
    eos_token_id: int | list | None = None,
    attention_mask: np.ndarray | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """The oracle: one batch, one step after another, nothing clever. Returns (B, T + new) int64.

    input_ids (B, T); rows may be padded on the left where attention_mask (B, T) is 0. A row that gave an eos_token_id
    is continued with it until all rows are done.
    """
    was_training, ids = model.training, np.asarray(input_ids, np.int64)
    model.eval()
    B, T = ids.shape
    mask = np.ones((B, T), np.int64) if attention_mask is None else np.asarray(attention_mask, np.int64)
    if model.prefix is not None and model.distances_count and not mask.all():
        raise UserError(
            "a prefix of a model with ALiBi or windows: padding would move the text away from it; one prompt a batch"
        )
    eos = np.array([] if eos_token_id is None else eos_token_id, np.int64).reshape(-1)
    generator = np.random.default_rng(seed)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    mask_rows = None if mask.all() else paddle.to_tensor(np.where(mask[:, None, :, None], NO_ROW, 0).astype(np.int32))
    cache, step_ids, step_positions, done = model.new_cache(B), ids, positions, np.zeros(B, bool)
    for _ in range(max_new_tokens):
        step = paddle.to_tensor(step_ids), paddle.to_tensor(step_positions), mask_rows
        logits = model.logits(model.hidden_states(*step, cache)[:, -1]).astype("float32").numpy()  # (B, V)
        if repetition_penalty != 1.0:
            seen = np.concatenate([mask, np.ones((B, ids.shape[1] - T), int)], 1)
            logits = penalize(logits, ids, seen, repetition_penalty)
        next_ids = sample_logits(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
        next_ids = np.where(done, eos[0] if eos.size else 0, next_ids)
        ids, mask_rows = np.concatenate([ids, next_ids[:, None]], 1), None  # new tokens see all and are seen
        done |= np.isin(next_ids, eos)
        step_ids, step_positions = next_ids[:, None], (step_positions[:, -1:] + 1)
        if done.all():
            break
    if was_training:
        model.train()
    return ids
