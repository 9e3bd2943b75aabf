"""The runner whose steps are one C++ call: a model of model.py, packed for kernels.fused.

    why = why_not_fused(model, adapters, dtype)     # None, or why PagedRunner must run the model's layers instead
    runner = FusedRunner(model, num_blocks=64, block_size=16, dtype="bfloat16")

dtype "float32" is PagedRunner's arithmetic. "bfloat16" stores float weights, keys and values in bfloat16 and rounds the
inputs of products to bfloat16; sums, norms and softmax stay float32.

Letters as in runners.py.
"""

import ctypes
import itertools
import json
from pathlib import Path

import kernels
from kernels.fused import FusedMultiTransformer, FusedShape, Routing, Weight, gate_and_up, storage_missing
from kernels.rounding import round_to_nearest

import numpy as np
import paddle

from formats.files import UserError
from model import CausalLM, MoE
from modules.layers import Linear, QuantLinear
from modules.lora import LoRALinear
from modules.positions import alibi_slopes, rope_tables
from serving.runners import AdapterLinear, PagedRunner, SequentialRunner, make_runner

# ==================================================================================== which models, and their weights


def why_not_fused(model: CausalLM, adapters: dict | None, dtype: str) -> str | None:
    """The reason why FusedRunner cannot run this model here, with adapters {name: folder}; None if it can."""
    c = model.config
    not_covered = {
        "two-dimensional positions": c.position == "rope_2d",
        "values wider than keys": c.latent and c.latent.v_head_dim > c.head_dim,
        "LoRA adapters beside experts": c.experts and adapters,
        "DoRA adapters": any(map(_is_dora, (adapters or {}).values())),
    }
    for name, found in not_covered.items():
        if found:
            return f"it does not cover {name}"
    if why := kernels.fused_missing():
        return why
    storages = {
        _storage(layer, dtype) for layer in model.layers.sublayers() if isinstance(layer, (Linear, QuantLinear))
    }
    for storage in sorted(storages):
        if storage == "a8w8_fp8":
            return "it does not round the inputs of products to e4m3"
        if storage in ("w8", "w4") and dtype == "float32":
            return f"{storage} rounds the inputs of products too, which dtype float32 excludes"
        if why := storage_missing(storage):
            return why
    for block in model.layers:
        for products in (_products(block), *map(_mlp_products, _experts(block))):
            for name, layers in products.items():
                if why := _why_not_together(layers):
                    return f"{name}: {why}"
    return None


def _is_dora(folder):
    """Whether an adapter's folder says so; what is wrong with a folder is load_adapter()'s to say."""
    file = Path(folder) / "adapter_config.json"
    try:
        return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("use_dora")
    except (ValueError, AttributeError):
        return False


def choose_dtype(model: CausalLM, adapters: dict | None, asked: str) -> str:
    """What is asked for, or for "auto" bfloat16 where FusedRunner can, else float32.

    UserError where bfloat16 was asked for and cannot be.
    """
    why = why_not_fused(model, adapters, "bfloat16") if asked != "float32" else None
    if asked == "bfloat16" and why:
        raise UserError(f"dtype: bfloat16 is not possible here: {why}; auto takes float32 then")
    return "float32" if asked == "float32" or why else "bfloat16"


def _storage(layer, dtype):
    return dtype if _is_float(layer) else layer.scheme


def _is_float(layer):
    """Whether the weight is packed as floats: weights in e4m3 have no products of their own."""
    return isinstance(layer, Linear) or layer.scheme == "fp8"


def _products(block):
    """{a key of kernels.fused.LINEARS: the layers of one product, whose outputs are side by side}

    A layer with adapters around it is an AdapterLinear.
    """
    attention, mlp, found = block.attention, block.mlp, {}
    if latent := attention.config.latent:
        found["qkv"] = [attention.q_a_proj if latent.q_lora_rank else attention.q_proj, attention.kv_a_proj]
        found |= {"q_up": [attention.q_b_proj]} if latent.q_lora_rank else {}
        found["kv_up"] = [attention.kv_b_proj]
    elif attention.config.fused_qkv is not None:
        found["qkv"] = [attention.qkv_proj]
    else:
        found["qkv"] = [attention.q_proj, attention.k_proj, attention.v_proj]
    mlp = mlp.shared if isinstance(mlp, MoE) else mlp
    return found | {"output": [attention.o_proj]} | ({} if mlp is None else _mlp_products(mlp))


def _mlp_products(mlp):
    up = mlp.gate_up_proj if mlp.gate_up_proj is not None else mlp.up_proj
    return {"up": [up] if mlp.gate_proj is None else [mlp.gate_proj, up], "down": [mlp.down_proj]}


def _experts(block):
    return block.mlp.experts if isinstance(block.mlp, MoE) else ()


LIVE = "of the model itself"  # the name of the LoRAs that are trained, where they stay apart from their weights


def _without_adapters(layers, adapters=()):
    apart = (AdapterLinear, LoRALinear) if LIVE in adapters else AdapterLinear
    return [layer.base if isinstance(layer, apart) else layer for layer in layers]


def _is_trained(layer):
    """Whether it is a LoRA that is being trained on a float weight."""
    return isinstance(layer, LoRALinear) and isinstance(layer.base, Linear)


def _stay_apart(model, dtype):
    """Whether trained LoRAs are adapters beside rounded weights, as in the trainer; else weights are packed with them.

    bfloat16(W + A B) would be other numbers than the trainer's bfloat16(W) and A B."""
    loras = [layer for layer in model.layers.sublayers() if isinstance(layer, LoRALinear)]  # those of the blocks
    is_plain = all(_is_trained(lora) and lora.lora_magnitude_vector is None for lora in loras)
    return dtype == "bfloat16" and bool(loras) and is_plain and not model.config.experts


def _lora(layer, adapter):
    """The layer's LoRA of this name, or None."""
    if isinstance(layer, AdapterLinear):
        return layer.by_name.get(adapter)
    return layer if adapter == LIVE and isinstance(layer, LoRALinear) else None


def _why_not_together(layers):
    """Why these layers are not the columns of one weight; None if they are."""
    layers = [layer.base if _is_trained(layer) else layer for layer in _without_adapters(layers)]
    first = layers[0]
    for layer in layers:
        if type(layer) not in (Linear, QuantLinear):
            return f"it does not cover {type(layer).__name__}"
        if type(layer) is not type(first):
            return "float and integer weights read one input"
        if isinstance(layer, Linear):
            continue
        if (layer.scheme, layer.group_size) != (first.scheme, first.group_size):
            return "weights of several schemes or group sizes read one input"
        if layer.scheme != "a8w8" and layer.group_size < layer.n_in and (layer.group_size % 8 or layer.n_in % 8):
            return f"groups of {layer.group_size} rows are no multiple of 8"
        if not layer.in_order and layer.n_in % layer.group_size:
            return "groups in any order of which one is shorter"
        for name in ("input_scale", "g_index"):
            tensors = [getattr(layer, name), getattr(first, name)]
            used = name == "input_scale" or not layer.in_order
            if used and tensors[0] is not None and not np.array_equal(*(t.numpy() for t in tensors)):
                return f"weights with several {name} read one input"
    return None


def _unpacked(words, bits):
    """int32 (n · bits / 32, out) -> codes (n, out) uint8, the lowest bits first."""
    shifts = (bits * np.arange(32 // bits, dtype=np.uint32))[:, None]
    codes = (words.view(np.uint32)[:, None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(-1, words.shape[1])


def _columns(layer, dtype) -> dict:
    """The fields of Weight that have a column of each output: values, bias, scales, zeros; the last axis is outputs."""
    if _is_trained(layer):
        columns = _columns(layer.base, dtype)
        more = 0.0 if layer.lora_B_bias is None else (layer.lora_B_bias * layer.scaling).numpy()
        return {"values": layer.weight.astype("float32").numpy(), "bias": columns["bias"] + more}
    n_out = layer.n_out
    bias = np.zeros(n_out, np.float32) if layer.bias is None else layer.bias.astype("float32").numpy()
    if _is_float(layer):
        return {"values": layer.full_weight(), "bias": bias}
    scales = layer.scales.numpy().reshape(-1, n_out)
    if layer.scheme == "a8w8":
        return {"values": layer.qweight.numpy().view(np.uint8) ^ np.uint8(128), "bias": bias, "scales": scales}
    bits = int(layer.scheme[1:])
    codes = _unpacked(layer.qweight.numpy(), bits)
    zeros = np.full(scales.shape, 1 << (bits - 1), np.float32)
    if layer.qzeros is not None:
        packed = np.ascontiguousarray(layer.qzeros.numpy().T)  # along the outputs
        zeros = ((_unpacked(packed, bits).T.astype(np.int32) + 1) & ((1 << bits) - 1)).astype(np.float32)
    return {"values": codes, "bias": bias, "scales": scales, "zeros": zeros}


def _heads_apart(columns, config):
    """Columns of a fused_qkv linear in groups, per key head its queries, k, v -> all queries, all keys, all values."""
    K, G, Dh = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim

    def apart(x):
        x = x.reshape(*x.shape[:-1], K, G + 2, Dh)
        parts = x[..., :G, :], x[..., G : G + 1, :], x[..., G + 1 :, :]
        return np.concatenate([part.reshape(*x.shape[:-3], -1) for part in parts], axis=-1)

    return {name: apart(x) for name, x in columns.items()}


def _side_by_side(name, parts, config) -> dict:
    """Columns of the layers of one product -> those of its weight, in the order that kernels.fused wants."""
    if name == "qkv" and config.fused_qkv == "groups":
        parts = [_heads_apart(parts[0], config)]
    if name == "up" and config.gated:
        if len(parts) == 1:  # gate and up in one linear
            parts = [{key: half for key, half in zip(parts[0], halves)} for halves in _halves(parts[0])]
        return {key: gate_and_up(parts[0][key], parts[1][key]) for key in parts[0]}
    return {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]}


def _adapter(name, loras, layers, config):
    """A (in, R), B (R, out) with the scaling in it, and bias (out,) of the LoRAs, or None, of the layers of a product.

    The layers read one input, so that their A stand side by side; each B has rows of its own.
    """
    A, parts = [lora.lora_A.astype("float32").numpy() for lora in loras if lora is not None], []
    R, row = sum(a.shape[1] for a in A), 0
    for lora, layer in zip(loras, layers):
        values, bias = np.zeros((R, layer.n_out), np.float32), np.zeros(layer.n_out, np.float32)
        if lora is not None:
            B = lora.lora_B.astype("float32").numpy() * np.float32(lora.scaling)
            values[row : row + len(B)] = B
            row += len(B)
            if lora.lora_B_bias is not None:
                bias = lora.lora_B_bias.astype("float32").numpy() * np.float32(lora.scaling)
        parts.append({"values": values, "bias": bias})
    columns = _side_by_side(name, parts, config)
    return np.concatenate(A, axis=1), columns["values"], columns["bias"]


def _weight(name, layers, config, dtype) -> Weight:
    first = layers[0]
    columns = _side_by_side(name, [_columns(layer, dtype) for layer in layers], config)
    if not columns["bias"].any():
        columns["bias"] = None
    if _is_trained(first) or _is_float(first):
        if dtype == "w8":
            found = round_to_nearest(columns["values"], 8)
            columns |= {"values": found.codes, "scales": found.scales}
        return Weight(dtype, **columns)
    options = {"group_size": first.group_size}
    if first.scheme == "a8w8":
        options["input_scale"] = 0.0 if first.input_scale is None else first.input_scale.item()
    elif (columns["zeros"][columns["scales"] > 0] == 1 << (int(first.scheme[1:]) - 1)).all():
        columns["zeros"] = None
    if not first.in_order:  # rows of a group one after another
        options["order"] = np.argsort(first.g_index.numpy(), kind="stable")
        columns["values"] = columns["values"][options["order"]]
    return Weight(first.scheme, **columns, **options)


def _halves(columns):
    return zip(*(np.split(x, 2, axis=-1) for x in columns.values()))


def _norm(layer):
    """(weight, bias, epsilon, center) of a Norm."""
    weight = layer.weight.astype("float32").numpy() + np.float32(layer.offset)
    bias = None if layer.bias is None else layer.bias.astype("float32").numpy()
    return weight, bias, layer.epsilon, layer.kind == "layer"


def _head(model, dtype, int8) -> Weight:
    weight, tied = model.head_weight()
    values = weight.astype("float32").numpy()
    if not int8:
        return Weight(dtype, values, transposed=tied)
    found = round_to_nearest(values.T if tied else values, 8)
    return Weight("w8", found.codes, scales=found.scales)


def _free(*layers):
    """Give the memory of these layers' tensors back."""
    for layer in layers:
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor._clear_data()
    kernels.trim_memory()


def _shape(c, block_size, cache) -> FusedShape:
    latent = {}
    if c.latent:
        latent = {"q_latent": c.latent.q_lora_rank or 0, "kv_latent": c.latent.kv_lora_rank}
        latent |= {"nope": c.latent.qk_nope_head_dim, "value": c.latent.v_head_dim}
    return FusedShape(
        layers=c.num_hidden_layers,
        D=c.hidden_size,
        H=c.num_attention_heads,
        K=c.num_key_value_heads,
        Dh=c.head_dim,
        rotary=c.rotary_dim or c.head_dim,
        V=c.vocab_size,
        norm_place=c.norm_place,
        activation=c.activation,
        gated=c.gated,
        interleaved=c.rope_interleaved,
        cache=cache,
        block_size=block_size,
        attention_scale=c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
        attention_softcap=c.attention_softcap,
        final_softcap=c.final_softcap,
        embedding_scale=c.embedding_scale,
        residual_scale=c.residual_scale,
        **latent,
    )


def _pack_block(packed, i, block, c, dtype, adapters, free_weights):
    """Norms, linears and LoRAs of block i."""
    norms = {"attention": block.attention_norm, "mlp": block.mlp_norm}
    norms |= {"attention_post": block.attention_post_norm, "mlp_post": block.mlp_post_norm}
    if c.latent:
        norms |= {"q_latent": getattr(block.attention, "q_a_norm", None), "kv_latent": block.attention.kv_a_norm}
    else:
        norms |= {"q": block.attention.q_norm, "k": block.attention.k_norm}
    for name, norm in norms.items():
        if norm is not None:
            packed.set_norm(i, name, *_norm(norm))
    for name, layers in _products(block).items():
        bases = _without_adapters(layers, adapters)
        packed.set_linear(i, name, _weight(name, bases, c, dtype))
        for number, adapter in enumerate(adapters):
            loras = [_lora(layer, adapter) for layer in layers]
            if any(lora is not None for lora in loras):
                packed.set_adapter(i, name, number, *_adapter(name, loras, bases, c))
        if free_weights:
            _free(*layers)
    if isinstance(block.mlp, MoE):
        _pack_experts(packed, i, block.mlp, c, dtype, free_weights)


def _pack_experts(packed, i, mlp, c, dtype, free_weights):
    moe = mlp.moe
    numbers = moe.num_experts, moe.top_k, moe.n_group, moe.topk_group, moe.group_topk_sum
    routing = Routing(*numbers, moe.scoring == "sigmoid", moe.norm_topk_prob, moe.routed_scaling_factor)
    packed.set_experts(i, routing, mlp.correction_bias.numpy() if moe.correction_bias else None)
    packed.set_linear(i, "router", Weight("float32", mlp.router.full_weight()))
    if mlp.shared_gate is not None:
        packed.set_linear(i, "shared_gate", Weight("float32", mlp.shared_gate.full_weight()))
    for number, expert in enumerate(mlp.experts):
        products = _mlp_products(expert)
        packed.set_expert(i, number, *(_weight(name, products[name], c, dtype) for name in ("up", "down")))
        if free_weights:
            _free(*products["up"], *products["down"])


def pack_model(
    model: CausalLM,
    block_size: int,
    dtype: str,
    cache: str,
    int8_head: bool = False,
    adapters: list[str] | None = None,
    free_weights: bool = False,
    linears: str | None = None,
) -> FusedMultiTransformer:
    """The model's weights in the layout of the instruction set; the caches are still to be set.

    adapters: names of LoRAs, see install_adapters(); LIVE: of those that are trained. free_weights: each weight of the
    model is freed when it is packed.
    linears: storage of the blocks' float linears: "w8", or None: dtype.
    """
    c, shape = model.config, _shape(model.config, block_size, cache)
    is_head = model.lm_head is None and not int8_head  # the embedding is read from the packed head
    table = None if is_head else model.embed_tokens.weight.astype(dtype)
    positions = None if model.embed_positions is None else model.embed_positions.weight.astype("float32")
    slopes = alibi_slopes(shape.H) if c.position == "alibi" else None
    packed = FusedMultiTransformer(shape, table, positions, slopes)
    for name, norm in (("embedding", model.embed_norm), ("final", model.norm)):
        if norm is not None:
            packed.set_norm(None, name, *_norm(norm))
    for i, block in enumerate(model.layers):
        _pack_block(packed, i, block, c, linears or dtype, adapters or (), free_weights)
    for name in ("project_in", "project_out"):
        if (layer := getattr(model, name)) is not None:
            packed.set_linear(None, name, Weight("float32", layer.full_weight()))
    packed.set_linear(None, "head", _head(model, dtype, int8_head))
    if free_weights:
        is_read_in_place = table is not None and table.data_ptr() == model.embed_tokens.weight.data_ptr()
        _free(*([] if model.lm_head is None else [model.lm_head]), *([] if is_read_in_place else [model.embed_tokens]))
    return packed


# ========================================================================================================= the runner


class FusedRunner(PagedRunner):
    """PagedRunner's steps, each one call of FusedMultiTransformer.step().

    free_weights: the packed weights are the only ones from then on; the model's layers can compute nothing any more.
    Without it the model may be trained, and its weights are packed again.
    """

    is_row_invariant = True

    def __init__(
        self,
        model: CausalLM,
        num_blocks: int,
        block_size: int,
        adapters: dict | None = None,
        int8: bool = False,
        dtype: str = "float32",
        int8_head: bool = False,
        free_weights: bool = False,
        linears: str | None = None,
    ):
        super().__init__(model, num_blocks, block_size, adapters, int8, dtype)
        cache = "int8" if int8 else dtype
        options = {"int8_head": int8_head, "free_weights": free_weights, "linears": linears}
        self.is_live = not self.adapters and linears is None and _stay_apart(model, dtype)
        packed = [LIVE] if self.is_live else self.adapters
        self._pack = lambda: pack_model(model, block_size, dtype, cache, adapters=packed, **options)
        self.weights_are_free = free_weights
        self.cos = self.sin = np.zeros((0, 0), np.float32)  # (positions, r/2): of positions seen so far
        self.pack()

    def pack(self) -> None:
        """Pack the model's weights, as they are now."""
        self.packed = self._pack()
        windows = self.config.windows or [None] * self.config.num_hidden_layers
        for layer, (pool, scales, window) in enumerate(zip(self.pools, self.scales, windows)):
            self.packed.set_cache(layer, *pool, *scales, window, self.static_scales is not None)
        self.fingerprint = None if self.weights_are_free else self._fingerprint()

    def _fingerprint(self):
        """Where each parameter is, and its first, middle and last word: training changes every value."""
        found = []
        for parameter in self.model.parameters():
            at, words = parameter.data_ptr(), parameter.size * parameter.element_size() // 4
            offsets = {0, words // 2, words - 1} if words else ()
            found.append((at, *(ctypes.c_uint32.from_address(at + 4 * i).value for i in offsets)))
        return found

    @paddle.no_grad()
    def run(self, scheduled) -> np.ndarray:
        """(S, V) float32: the logits after the last token of each."""
        if self.fingerprint and any(tokens.count > 1 for tokens in scheduled):
            if self.fingerprint != self._fingerprint():
                self.pack()  # the model was trained since
        order = slices = None
        if self.adapters:  # each adapter's tokens become one slice
            order = sorted(range(len(scheduled)), key=lambda i: scheduled[i].sequence.adapter or "")
            scheduled = [scheduled[i] for i in order]
            slices = self._adapter_slices(scheduled)
        step, c = self.layout(scheduled), self.config
        if self.is_live:
            slices = np.array([(0, 0, len(step.ids), 0, len(scheduled))])
        cos, sin = self._rotary(step)
        q_scale = None
        if c.logn_length is not None:
            q_scale = np.maximum(np.log((step.positions + 1).astype(np.float32)) / np.log(c.logn_length), 1.0)
        rows = step.positions + c.position_offset if self.model.embed_positions is not None else None
        arrays = step.ids, step.slots, step.tables, step.query_lengths, step.context_lengths
        logits = self.packed.step(*arrays, rows=rows, cos=cos, sin=sin, q_scale=q_scale, slices=slices)
        return logits if order is None else logits[np.argsort(order)]

    def _adapter_slices(self, scheduled):
        """(n, 5) int64, see FusedMultiTransformer.step()."""
        numbers, found, token, row = {name: i for i, name in enumerate(self.adapters)}, [], 0, 0
        for name, group in itertools.groupby(scheduled, lambda tokens: tokens.sequence.adapter):
            counts = [tokens.count for tokens in group]
            found.append((numbers.get(name, -1), token, token + sum(counts), row, row + len(counts)))
            token, row = token + sum(counts), row + len(counts)
        return np.array(found, np.int64)

    def _rotary(self, step) -> tuple:
        """cos and sin (N, r/2) of the step's tokens."""
        if not self.config.position.startswith("rope"):
            return None, None
        if step.lengths is not None:  # the rotation depends on more than the position
            lengths = kernels.to_tensor(step.lengths[None])
            tables = rope_tables(self.config, kernels.to_tensor(step.positions[None]), lengths)
            return tuple(self._half(table) for table in tables)
        last = int(step.positions.max())
        if last >= len(self.cos):
            positions = paddle.arange(max(256, 2 * last)).unsqueeze(0)
            self.cos, self.sin = (self._half(table) for table in rope_tables(self.config, positions))
        return self.cos[step.positions], self.sin[step.positions]

    @staticmethod
    def _half(table):
        """(1, N, 1, r) -> (N, r/2): both halves hold the same angles."""
        return np.ascontiguousarray(table.numpy()[0, :, 0, : table.shape[-1] // 2])


def fastest_runner(
    model: CausalLM,
    num_blocks: int,
    block_size: int,
    adapters: dict | None = None,
    int8: bool | str = False,
    dtype: str = "float32",
    int8_head: bool = False,
    free_weights: bool = False,
) -> PagedRunner | SequentialRunner:
    """FusedRunner where it covers the model, else that of make_runner(), in float32, after a line that says why."""
    model.eval()
    why = why_not_fused(model, adapters, dtype) or (storage_missing("w8") if int8_head else None)
    if why is None:
        return FusedRunner(model, num_blocks, block_size, adapters, int8, dtype, int8_head, free_weights)
    print(f"fused_multi_transformer: not used, {why}; the model's layers run one by one", flush=True)
    return make_runner(model, num_blocks, block_size, adapters, int8)
