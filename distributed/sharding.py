"""Gradient synchronization and ZeRO stages 1 to 3."""

import contextlib
import functools
import math
import re
from collections import namedtuple
from collections.abc import Callable
from typing import NamedTuple

import kernels

import numpy as np
import paddle
from paddle.autograd import PyLayer

from distributed.collectives import Axis
from distributed.expert import is_expert_sharded
from distributed.pipeline import tied_axis
from model import CausalLM, linear_row

# =============================================================================== gradients, and who updates what


class GradReduction(NamedTuple):
    """How the gradient of a parameter is reduced."""

    sum_over: tuple  # axes on which it is a partial sum and must be all-reduced
    shard_axis: Axis  # the axis over which it is added up too, and the update sharded (of size 1: not at all)
    norm_axes: tuple  # further axes whose ranks have other elements, so that their squares are added up for the norm
    counts_in_norm: bool  # this rank adds its squares, so that each element of the model is in the norm once


def gradient_reduction_of(path: str, parameter: paddle.Tensor, model: CausalLM) -> GradReduction:
    """The GradReduction of a parameter by its path: the one place that says who has which part of which gradient."""
    topology, replicas = model.topology, tied_axis(model, path)
    tp, spec = topology.tp, getattr(parameter, "shard_spec", None)
    is_expert = is_expert_sharded(path, topology)  # sharded already, by whole experts: the rest over their copies
    shard_axis = topology.sharding
    if is_expert:
        shard_axis = topology.expert_dp if topology.sharding.size > 1 else topology.alone
    sum_over = [topology.expert_dp] * (shard_axis is topology.alone) if is_expert else [topology.sep, topology.dp]
    sum_over += [tp] * partial_over_tp(path, parameter, tp) + ([] if replicas is None else [replicas])
    counts = (spec is not None or tp.rank == 0) and (replicas is None or replicas.rank == 0)
    return GradReduction(
        sum_over=tuple(axis for axis in sum_over if axis.size > 1),
        shard_axis=shard_axis,
        norm_axes=(topology.ep,) if is_expert else (),
        counts_in_norm=counts,
    )


def partial_over_tp(path: str, parameter: paddle.Tensor, tp: Axis) -> bool:
    """Whether the gradient of this parameter, which all ranks of tp hold, is a partial sum on each.

    It is so inside attention and MLP, where each rank computes its heads and channels; and with sequence parallelism
    also outside, where each has its tokens, but for a score head, which reads all tokens. The bias of a
    RowParallelLinear is added outside.
    """
    if tp.size == 1 or getattr(parameter, "shard_spec", None) is not None:
        return False
    inside = re.match(r"layers\.\d+\.(attention|mlp)\.|prefix\.", path)
    row = linear_row(path.replace(".base.", "."))
    is_row_bias = path.endswith(".bias") and row is not None and row.parallel == "row"
    return tp.sequence_parallel and not path.startswith("score.") or bool(inside and not is_row_bias)


def unit_of(path: str, tied: bool) -> str:
    """The unit of a parameter, by its path: units are reduced, and in stage 3 unsharded, as one."""
    if match := re.match(r"layers\.\d+", path):
        return match[0]
    if tied and path.startswith("embed_tokens."):
        return "embed_tokens"  # the head reads only this
    if path.startswith(("embed_", "project_in.")):
        return "embed"
    return next((name for name in ("norm", "prefix") if path.startswith(f"{name}.")), "head")


IN_FLIGHT = 2  # reductions of buckets that overlap with backward: each holds the bucket's full gradients


ALIGNED = 16  # elements: a parameter within a flat range starts at a multiple, for kernels that read vectors


class Bucket:
    """Parameters of a unit, of one dtype and one GradReduction, flattened into one range and padded.

    Rank i of the shard axis owns the i-th of equal parts of the range, whatever the shapes: even by bytes. gradient: of
    the owned part, added up over the shard axis; None: none yet. owned: stage 3's weights.
    """

    def __init__(self, parameters, names, rule, stage):
        self.parameters, self.names, self.rule, self.axis = parameters, names, rule, rule.shard_axis
        self.dtype, self.sizes = parameters[0].dtype, [math.prod(p.shape) for p in parameters]
        self.starts, end = [], 0
        for size in self.sizes:
            self.starts.append(end)
            end += -(-size // ALIGNED) * ALIGNED
        self.width = -(-end // ALIGNED // self.axis.size) * ALIGNED  # of the owned part
        # Reduced over the first of these during backward, over the others once a step.
        self.reduce_axes = [axis for axis in (self.axis, *rule.sum_over) if axis.size > 1] or [self.axis]
        self.gradient, self.pending, self.owned = None, [], None
        if stage == 3:
            self.owned = self.axis.local_chunk(self.flatten(parameters)).clone()
            self.owned.stop_gradient = names[0] is None
            self.reshard()

    def extent(self, index, rank=None) -> tuple | None:
        """(first, last) element of a parameter that a rank owns, and the index of the first in its part; or None."""
        start, size, rank = self.starts[index], self.sizes[index], self.axis.rank if rank is None else rank
        first, last = max(start, rank * self.width), min(start + size, (rank + 1) * self.width)
        return (first - start, last - start, first - rank * self.width) if first < last else None

    def flatten(self, tensors) -> paddle.Tensor:
        """Tensors of the parameters' shapes (None: zeros) -> one flat tensor (width * ranks,)."""
        parts, end = [], 0
        for start, size, tensor in zip([*self.starts, self.width * self.axis.size], [*self.sizes, 0], [*tensors, None]):
            if start > end:
                parts.append(paddle.zeros([start - end], self.dtype))
            if size:
                part = paddle.zeros([size], self.dtype) if tensor is None else tensor.detach().reshape([-1])
                parts.append(part)
            end = start + size
        return paddle.concat(parts)

    def unflatten(self, flat) -> list:
        """The flat tensor -> views of it in the parameters' shapes."""
        views = []
        for start, size, parameter in zip(self.starts, self.sizes, self.parameters):
            part = flat._slice(start, start + size)
            part.get_tensor()._set_dims(parameter.shape)
            views.append(part)
        return views

    @paddle.no_grad()
    def unshard(self) -> None:
        """Stage 3: the parameters get their values, until reshard()."""
        self.adopt_full_values()
        for parameter, part in zip(
            self.parameters, self.unflatten(self.axis.all_gather_into_tensor(self.owned.detach()))
        ):
            part._share_buffer_to(parameter)

    def reshard(self) -> None:
        for parameter in self.parameters:
            parameter._clear_data()

    @paddle.no_grad()
    def adopt_full_values(self) -> None:
        """Stage 3: of parameters that were set to full values (by loading) keep this rank's part."""
        for index, parameter in enumerate(self.parameters):
            if not parameter._is_initialized():
                continue
            if extent := self.extent(index):
                first, last, place = extent
                values = parameter.detach().view([-1])._slice(first, last)
                self.owned.detach()._slice(place, place + last - first).copy_(values, True)
            parameter._clear_data()

    def start_grad_sync(self) -> list[str]:
        """Take the parameters' gradients and start their sum over the shard axis; returns the names that have one."""
        gradients = [p.grad for p in self.parameters]
        arrived = [name for name, gradient in zip(self.names, gradients) if gradient is not None]
        flat = self.flatten(gradients)
        del gradients
        for parameter in self.parameters:
            parameter.clear_gradient(False)
        self.pending.append(self.reduce_axes[0].reduce_async(flat, scatter=self.reduce_axes[0] is self.axis))
        return arrived

    def finish_grad_sync(self) -> None:
        while self.pending:
            part = self.pending.pop(0)()
            self.gradient = part if self.gradient is None else self.gradient.add_(part)


class ParamShard:
    """The elements of a flattened weight that this rank updates."""

    def __init__(self, weight, bucket, index):
        self.weight, self.name, self.bucket, self.index = weight, weight.name, bucket, index
        self.first, self.last, self.place = bucket.extent(index)
        self.arrived = True  # some rank has a gradient

    @property
    def extent(self) -> tuple | None:
        """(first, last) of its elements in the flattened parameter."""
        return self.first, self.last

    def set(self, array) -> None:
        """Set it to what Weight.read(…, extent) returns, (n,) numpy."""
        self.tensor.copy_(paddle.to_tensor(array).astype(self.bucket.dtype), True)

    @property
    def shape(self) -> list[int]:
        """Of the full weight: decay depends on its number of dimensions."""
        return self.weight.shape

    @property
    def tensor(self) -> paddle.Tensor:
        """(n,) the elements, a view."""
        if self.bucket.owned is not None:
            return self.bucket.owned.detach()._slice(self.place, self.place + self.last - self.first)
        return self.weight.parameter.detach().view([-1])._slice(self.first, self.last)

    @property
    def grad(self) -> paddle.Tensor | None:
        """(n,) their gradient, or None."""
        if self.bucket.gradient is None or not self.arrived:
            return None
        return self.bucket.gradient._slice(self.place, self.place + self.last - self.first)

    def clear_gradient(self) -> None:
        self.bucket.gradient = None


class ZeroOptimizer:
    """This rank's part of a step's update: gradients reduced over the data-parallel ranks, and its shard of the
    weights.

    weights: the Weight objects of all that is trained. `pieces` is what the optimizer updates, with name, tensor,
    grad and shape (of the full weight): the weights themselves, or with sharding a ParamShard of each that this rank
    owns a part of. Trained weights are float32 in bf16 runs too, where only products are in bfloat16: they are the
    master weights.

    Experts of expert parallelism are sharded over all ranks that have the same ones, which may be more or fewer than n.

    What a rank of n along the sharding axis holds (Rajbhandari et al., arXiv 1910.02054): stage 1: 1/n of the
    moments. Full gradients, until those of the last micro-batch are there; then 1/n too. stage 2: 1/n of the
    gradients, and those of the unit (embedding, block, norm, head) whose backward is under way. stage 3: 1/n of the
    weights, frozen ones too, and those of the unit that computes. Forward keeps only each unit's inputs, and backward
    computes the unit's activations again: `recompute` is always on, in effect.

    The reduction of a unit overlaps with backward where the backend allows (NCCL; gloo blocks). All ranks start the
    units' reductions in the same order, backward's, whatever their batches are.
    """

    def __init__(self, model, weights, topology):
        self.model, self.weights, self.topology = model, weights, topology
        degrees, model.topology, model.shards = topology.degrees, topology, self
        self.stage = max(1, degrees.stage) if topology.sharding.size > 1 else 0
        self.paths = {id(parameter): path for path, parameter in weight_tensors(model)}
        self.reductions = {
            id(w.parameter): gradient_reduction_of(self.paths[id(w.parameter)], w.parameter, model) for w in weights
        }
        self.units, self.shards_here = {}, {}  # by name; {id of a parameter: this rank's ParamShard}
        self.arrived, self.early, self.in_flight = set(), False, []
        self.overlaps = True  # False where a parameter gets its gradient in several parts, which hooks would count
        if degrees.world > 1:
            self._make_units()
        owned = [self.shards_here[id(w.parameter)] for w in weights if id(w.parameter) in self.shards_here]
        self.pieces = owned if self.stage else weights
        if self.stage == 3:
            model.comm.shards = self  # see run_unit()
            model.recompute = False  # each unit is computed again anyway

    def _make_units(self):
        grouped, trained = {}, {id(w.parameter): w for w in self.weights}
        for path, parameter in weight_tensors(self.model):
            weight = trained.get(id(parameter))
            if weight is None and self.stage < 3:
                continue
            if (rule := self.reductions.get(id(parameter))) is None:
                rule = GradReduction((), gradient_reduction_of(path, parameter, self.model).shard_axis, (), False)
            unit = unit_of(path, self.model.lm_head is None)
            key = weight is not None, str(parameter.dtype), rule
            grouped.setdefault(unit, {}).setdefault(key, []).append((path, weight, parameter))
        for name, groups in grouped.items():
            self.units[name] = FSDPUnit(name, self)
            for (is_trained, _, rule), entries in groups.items():
                names = [weight.name if is_trained else None for _, weight, _ in entries]
                bucket = Bucket([parameter for *_, parameter in entries], names, rule, self.stage)
                self.units[name].buckets.append(bucket)
                for index, (path, weight, parameter) in enumerate(entries):
                    if self.stage and bucket.extent(index):
                        self.shards_here[id(parameter)] = ParamShard(weight or Frozen(path, parameter), bucket, index)
                    if self.stage == 3:
                        parameter.piece = self.shards_here.get(id(parameter))  # weights.load_weights() reads into it
                    if is_trained and self.stage < 3:
                        self.units[name].watch(path, parameter)

    @property
    def buckets(self) -> list[Bucket]:
        """The trained ones, in the order in which all ranks reduce them: backward's."""
        return [bucket for unit in reversed(self.units.values()) for bucket in unit.trained]

    @contextlib.contextmanager
    def backward(self, last):
        """Wraps the backward of a micro-batch; last: the step's last one. Units are reduced as they get ready."""
        is_due = self.stage == 2 or self.stage < 2 and last
        self.early = is_due and self.overlaps
        for unit in self.units.values():
            unit.start()
        yield
        if is_due:
            self._reduce_rest()
        self.early = False

    @paddle.no_grad()
    def reduce_ready(self) -> None:
        """Reduce the units that are ready, up to the first that is not, so that all ranks reduce in the same order."""
        for unit in reversed(self.units.values()):
            if not unit.reduced:
                if not unit.is_ready:
                    return
                unit.reduce()

    @paddle.no_grad()
    def _reduce_rest(self):
        for unit in reversed(self.units.values()):
            unit.reduce_rest()

    @paddle.no_grad()
    def reduce_gradients(self) -> float:
        """Finish the sums of gradients over the ranks; returns their Euclidean norm over the whole model."""
        if self.units and self.stage < 2:
            self._reduce_rest()
        for bucket in self.buckets:
            if self.stage == 3:
                bucket.gradient = bucket.owned.grad
            bucket.finish_grad_sync()
        self.in_flight.clear()
        for unit in self.units.values():
            unit.start()
        if self.units:
            self._agree_on_arrivals()
        for bucket in self.buckets:
            if bucket.gradient is None:
                continue
            for axis in bucket.reduce_axes[1:]:
                axis.all_reduce(bucket.gradient)
            if not self.stage:
                self._hand_back(bucket)
        for piece in self.shards_here.values():
            piece.arrived = piece.name in self.arrived
        return self._norm()

    def _hand_back(self, bucket):
        """Stage 0: the sums are the parameters' gradients."""
        for name, parameter, part in zip(bucket.names, bucket.parameters, bucket.unflatten(bucket.gradient)):
            if name in self.arrived:
                parameter.grad = part
        bucket.gradient = None

    def _agree_on_arrivals(self):
        """An expert that no token chose on this rank has a gradient if one did on another; else it is not updated."""
        if self.model.config.experts is None:
            self.arrived.update(weight.name for weight in self.weights)
            return
        for name in ("sharding", "sep", "dp", "expert_dp", "tp"):
            axis = getattr(self.topology, name)
            rules = [(w.name, self.reductions[id(w.parameter)]) for w in self.weights]
            names = [
                name for name, rule in rules if axis.size > 1 and (axis in rule.sum_over or axis is rule.shard_axis)
            ]
            if names:
                seen = paddle.to_tensor([float(name in self.arrived) for name in names])
                self.arrived |= {name for name, there in zip(names, axis.all_reduce(seen, "max").numpy()) if there}

    def _norm(self):
        topology = self.topology
        sums = {((), topology.sharding): paddle.zeros([], "float64")}
        if topology.ep.size > 1:  # also on a rank that trains none of its experts: the others wait for it
            sums[(topology.ep,), topology.expert_dp if self.stage else topology.alone] = paddle.zeros([], "float64")
        for piece in self.pieces:
            parameter = piece.weight.parameter if self.stage else piece.parameter
            rule, gradient = self.reductions[id(parameter)], piece.grad
            if gradient is None or not rule.counts_in_norm:
                continue
            if (spec := getattr(parameter, "shard_spec", None)) is not None and spec.replicated:
                counted = spec.first_owner_mask(parameter.shape)
                gradient = gradient * (counted.reshape([-1])[piece.first : piece.last] if self.stage else counted)
            sums[rule.norm_axes, rule.shard_axis] += kernels.squared_norm(gradient)
        total = paddle.zeros([], "float64")
        for (axes, sharded), squares in sums.items():
            for axis in (*axes, *([sharded] if self.stage else [])):
                axis.all_reduce(squares)
            total = total + squares
        for axis in (self.topology.tp, self.topology.pp):
            axis.all_reduce(total)
        return math.sqrt(float(total))

    @paddle.no_grad()
    def gather_weights(self) -> None:
        """After the optimizer's step: get the weights that other ranks have updated; gradients are released."""
        self.arrived.clear()
        if not self.stage:
            return
        for bucket in self.buckets:
            if self.stage < 3:
                flat = bucket.axis.all_gather_into_tensor(bucket.axis.local_chunk(bucket.flatten(bucket.parameters)))
                for parameter, part in zip(bucket.parameters, bucket.unflatten(flat)):
                    parameter.set_value(part)
            else:
                bucket.owned.clear_gradient(False)
            bucket.gradient = None

    # ------------------------------------------------------------------------------- for checkpoints
    # Moments are optimizer.moments[name], each (n,) of the piece of this name. Only the elements in extent() are read
    # of a file's moments, and those of parameter.piece of stage 3's weights.

    def place_of(self, weight) -> tuple:
        """(offset,) of this rank's shard in the flattened parameter; () if it holds the moments of all of it."""
        if not self.stage or self._bucket(weight)[0].axis.size == 1:
            return ()
        piece = self.shards_here.get(id(weight.parameter))
        return (0 if piece is None else piece.first,)

    def laid(self, weight, moment) -> paddle.Tensor | None:
        """A moment in the parameter's shape if all of it is here, else flat; or None."""
        return moment if moment is None or self.place_of(weight) else moment.reshape(weight.parameter.shape)

    def held(self, weight) -> tuple:
        """What this rank holds of a weight: (parameter,), or in stage 3 (its elements or None, their offset)."""
        if self.stage < 3 or id(weight.parameter) not in self.paths:  # a table that is computed
            return (weight.parameter,)
        self._bucket(weight)[0].adopt_full_values()
        piece = self.shards_here.get(id(weight.parameter))
        return (self.laid(weight, piece and piece.tensor), *self.place_of(weight))

    def present(self, name):
        """Inside, a unit's parameters have their values. Ranks along sharding enter it together."""
        return self.units[name].unsharded() if self.stage == 3 and name in self.units else contextlib.nullcontext()

    def _bucket(self, weight):
        """(bucket of a parameter, its index in there)."""
        unit = self.units[unit_of(self.paths[id(weight.parameter)], self.model.lm_head is None)]
        return next((b, i) for b in unit.buckets for i, p in enumerate(b.parameters) if p is weight.parameter)

    def extent(self, weight) -> tuple | None:
        """(first, last) of the flattened elements that this rank updates; None: all of them."""
        return self.shards_here[id(weight.parameter)].extent if self.stage else None

    @paddle.no_grad()
    def gather_full(self, weight, tensor) -> np.ndarray:
        """numpy of the parameter's shape, from each rank's tensor (n,) of its piece: a moment, a gradient, or the
        weight.

        Ranks along sharding call it together; tensor is None where a rank owns nothing of it.
        """
        if not self.stage:
            return tensor.numpy()
        parameter, (bucket, index) = weight.parameter, self._bucket(weight)
        extents = [bucket.extent(index, rank) for rank in range(bucket.axis.size)]
        most = max(extent[1] - extent[0] for extent in extents if extent)
        dtype = bucket.dtype if tensor is None else tensor.dtype
        part = paddle.zeros([most], dtype)
        if tensor is not None:
            part[: tensor.shape[0]] = tensor
        parts = bucket.axis.all_gather_into_tensor(part).reshape([-1, most])
        parts = (parts.astype("float32") if dtype == paddle.bfloat16 else parts).numpy()
        parts = [part[: extent[1] - extent[0]] for part, extent in zip(parts, extents) if extent]
        return np.concatenate(parts).reshape(parameter.shape)

    def unsharded_units(self):
        """Yields the ids of each unit's parameters while they are unsharded. Ranks along sharding iterate together."""
        for unit in self.units.values():
            with unit.unsharded() if self.stage == 3 else contextlib.nullcontext():
                yield {id(parameter) for bucket in unit.buckets for parameter in bucket.parameters}

    def adopt_full_values(self) -> None:
        """Stage 3: release full values (set by loading) now, not when the parameters are used next."""
        for unit in self.units.values():
            for bucket in unit.buckets if self.stage == 3 else ():
                bucket.adopt_full_values()


Frozen = namedtuple("Frozen", "name parameter")  # in place of a Weight; name: our path


def weight_tensors(model: CausalLM) -> list[tuple]:
    """(path, tensor) of parameters, and of the buffers that hold a quantized model's weights."""
    names = (".qweight", ".qzeros", ".scales", ".g_index")
    return [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0].endswith(names))]


class FSDPUnit:
    """Buckets that get ready together.

    A unit is ready in backward when all parameters that always get a gradient have one. Those of a sparse block's
    experts may get none, if no token chooses them; but backward reaches them before the attention's.
    """

    def __init__(self, name, shards):
        self.name, self.shards, self.buckets = name, shards, []
        self.always, self.missing, self.reduced, self.users = set(), set(), False, 0

    @property
    def trained(self) -> list[Bucket]:
        return [bucket for bucket in self.buckets if bucket.names[0] is not None]

    def watch(self, path, parameter) -> None:
        sparse, topology = self.shards.model.config.experts is not None, self.shards.topology
        if topology.sep.size > 1 or sparse and topology.ep.size > 1:
            # Ranks with other tokens use other experts, or have no label at all: their backwards may reach this unit
            # before or after a collective of backward itself. All units are reduced after backward.
            return
        if not (sparse and ".mlp." in path):
            self.always.add(path)
            parameter._register_backward_hook(functools.partial(self.arrived, path))

    def start(self) -> None:
        self.missing, self.reduced = set(self.always), False

    def arrived(self, path, *_) -> None:
        self.missing.discard(path)
        if self.shards.early and not self.missing:
            self.shards.reduce_ready()

    @property
    def is_ready(self) -> bool:
        return bool(self.always) and not self.missing

    def stays(self, bucket) -> bool:
        """Whether its gradients need no reduction."""
        return not self.shards.stage and not bucket.rule.sum_over

    def reduce(self) -> None:
        shards = self.shards
        for bucket in self.trained:
            _add_overlaps(bucket.parameters, shards.topology.tp)
            if self.stays(bucket):
                continue
            shards.arrived.update(bucket.start_grad_sync())
            shards.in_flight.append(bucket)
            while len(shards.in_flight) > IN_FLIGHT:
                shards.in_flight.pop(0).finish_grad_sync()
        self.reduced = True

    def reduce_rest(self) -> None:
        if not self.reduced:
            self.reduce()
            return
        sent = [bucket for bucket in self.trained if not self.stays(bucket)]
        late = [name for b in sent for name, p in zip(b.names, b.parameters) if p.grad is not None]
        assert not late, f"gradients that came after their unit's reduction: {late}"

    # ------------------------------------------------------------------------------- stage 3

    @contextlib.contextmanager
    def unsharded(self):
        """Inside, the unit's parameters have their values."""
        if not self.users:
            for bucket in self.buckets:
                bucket.unshard()
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                for bucket in self.buckets:
                    bucket.reshard()


def _add_overlaps(parameters, tp):
    """Add up, in place, gradients of rows that several ranks of tp have."""
    for parameter in parameters:
        spec = getattr(parameter, "shard_spec", None)
        if spec is None or not spec.replicated:
            continue
        full = np.zeros(spec.shape, np.float32)
        if parameter.grad is not None:
            spec.scatter_into(full, parameter.grad.numpy())
        full = tp.all_reduce(paddle.to_tensor(full))
        parameter.grad = paddle.to_tensor(spec.slice(full.numpy()))


# ---------------------------------------------------------------------------------- stage 3: unshard, compute, reshard


class _RecomputeSharded(PyLayer):
    """A function whose units are unsharded only while it runs; in backward it runs again, with gradients."""

    @staticmethod
    def forward(ctx, call, *tensors):
        ctx.call, ctx.random = call, paddle.get_rng_state()
        ctx.set_materialize_grads(False)
        tensors = tensors[len(call.trained) :]
        ctx.frozen = [t.stop_gradient for t in tensors]
        ctx.save_for_backward(*tensors)
        return call.run(tensors)

    @staticmethod
    def backward(ctx, *gradients):
        call, now, inputs = ctx.call, paddle.get_rng_state(), []
        for tensor, frozen in zip(ctx.saved_tensor(), ctx.frozen):
            inputs.append(tensor.detach())
            inputs[-1].stop_gradient = frozen
        with contextlib.ExitStack() as stack:
            for unit in call.units:
                stack.enter_context(unit.unsharded())
            paddle.set_rng_state(ctx.random)
            with paddle.set_grad_enabled(True):
                outputs = call.run(inputs)
            paddle.set_rng_state(now)
            pairs = [(y, dy) for y, dy in zip(outputs, gradients) if dy is not None and not y.stop_gradient]
            if pairs:
                paddle.autograd.backward(*map(list, zip(*pairs)))
            of_weights = []
            for unit in call.units:
                _add_overlaps([p for bucket in unit.trained for p in bucket.parameters], unit.shards.topology.tp)
                for bucket in unit.trained:
                    unit.shards.arrived.update(bucket.start_grad_sync())
                    of_weights.append(bucket.pending.pop()())
        return (*of_weights, *(None if frozen else x.grad for x, frozen in zip(inputs, ctx.frozen)))


class _FlattenedCall:
    """A function, its units, and its arguments: tensors in any nesting of tuples, lists and dicts, and others."""

    def __init__(self, units, function, args):
        self.units, self.function, self.tensors = units, function, []
        self.arguments = _flatten(args, self.tensors)
        self.trained = [bucket.owned for unit in units for bucket in unit.trained]

    def __call__(self):
        wanted = self.trained or any(not t.stop_gradient for t in self.tensors)
        with contextlib.ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(unit.unsharded())
            if paddle.is_grad_enabled() and wanted:
                outputs = _RecomputeSharded.apply(self, *self.trained, *self.tensors)
            else:
                with paddle.no_grad():
                    outputs = self.run(self.tensors)
        return _unflatten(self.result, outputs)

    def run(self, tensors):
        """A tuple of the tensors that the function returns; `result` is their nesting."""
        outputs = []
        self.result = _flatten(self.function(*_unflatten(self.arguments, tensors)), outputs)
        return tuple(outputs)


_TensorIndex = namedtuple("_TensorIndex", "index")


def _flatten(value, tensors):
    """The value with a _TensorIndex in place of each tensor, which is appended to `tensors`."""
    if isinstance(value, paddle.Tensor):
        tensors.append(value)
        return _TensorIndex(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _flatten(part, tensors) for key, part in value.items()}
    return type(value)([_flatten(part, tensors) for part in value]) if type(value) in (tuple, list) else value


def _unflatten(value, tensors):
    if isinstance(value, _TensorIndex):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _unflatten(part, tensors) for key, part in value.items()}
    return type(value)([_unflatten(part, tensors) for part in value]) if type(value) in (tuple, list) else value


# Functions of a model, and the units whose parameters they read (a tied head reads the embedding).
UNITS_READ_BY = {"embed": ("embed_tokens", "embed"), "head": ("head", "embed_tokens")}


def run_unit(shards: "ZeroOptimizer", name: str, function: Callable, args: tuple) -> object:
    """Stage 3: function(*args) while the units that it reads are unsharded; in backward it is computed again."""
    names = UNITS_READ_BY.get(name, (name,))
    return _FlattenedCall([shards.units[n] for n in names if n in shards.units], function, args)()
