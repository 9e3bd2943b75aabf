"""Gradient synchronization and ZeRO stages 1 to 3."""

import contextlib
import functools
import math
import re
from collections import namedtuple

import kernels

import numpy as np
import paddle
from paddle.autograd import PyLayer

from distributed.expert import is_expert_sharded
from distributed.pipeline import tied_axis
from model import linear_row

# =============================================================================== gradients, and who updates what


class GradReduction(namedtuple("GradReduction", "parts sharded apart counts")):
    """What becomes of the gradient of a parameter.

    parts: axes along which each rank has a part of it, and all get the sum. sharded: the axis along which it is added up
    too, and the update divided (one of size 1: not at all). counts: whether this rank adds its squares to the norm, so that
    each element of the model is in it once; ranks of tp, pp and of `sharded` are added up, and those of the axes `apart`.
    """


def gradient_reduction_of(path, parameter, model):
    """The GradReduction of a parameter by its path in the model: the one place that says who has which part of which gradient."""
    topology, copied = model.topology, tied_axis(model, path)
    tp, cut = topology.tp, getattr(parameter, "shard_spec", None)
    spread = is_expert_sharded(path, topology)  # sharded already: by whole experts
    parts = [topology.expert_dp] if spread else [topology.sep, topology.dp]
    parts += [tp] * partial_over_tp(path, parameter, tp) + ([] if copied is None else [copied])
    parts = tuple(axis for axis in parts if axis.size > 1)
    sharded, apart = (topology.alone, (topology.ep,)) if spread else (topology.sharding, ())
    return GradReduction(
        parts, sharded, apart, (cut is not None or tp.rank == 0) and (copied is None or copied.rank == 0)
    )


def partial_over_tp(path, parameter, tp):
    """Whether each rank of tp has a part of the gradient of this parameter, which all of them hold.

    So it is inside of attention and MLP, where each rank computes its heads and channels; and with sequence parallelism
    outside too, where each has its tokens. The bias of a RowParallelLinear is added outside.
    """
    if tp.size == 1 or getattr(parameter, "shard_spec", None) is not None:
        return False
    inside = re.match(r"layers\.\d+\.(attention|mlp)\.|prefix\.", path)
    row = linear_row(path.replace(".base.", "."))
    is_row_bias = path.endswith(".bias") and row is not None and row.parallel == "row"
    return tp.sequence_parallel or bool(inside and not is_row_bias)


def unit_of(path, tied):
    """The unit of a parameter, by its path: what is reduced, and in stage 3 gathered, together."""
    if match := re.match(r"layers\.\d+", path):
        return match[0]
    if tied and path.startswith("embed_tokens."):
        return "embed_tokens"  # the head reads it alone
    if path.startswith(("embed_", "project_in.")):
        return "embed"
    return next((name for name in ("norm", "prefix") if path.startswith(f"{name}.")), "head")


IN_FLIGHT = 2  # reductions of buckets that go on while backward does: each holds the bucket's whole gradients


ALIGNED = 16  # elements: a parameter within a flat range starts at a multiple, for kernels that read vectors


class Bucket:
    """Parameters of a unit, of one dtype and one GradReduction, as one flat range: one behind the other, padded to a multiple of
    the ranks. Rank i of the rule's sharded axis owns the i-th of equal ranges, whatever the shapes: even by bytes.

    gradient: of the owned range, added up over the sharded axis; None: none yet. owned: stage 3's weights.
    """

    def __init__(self, parameters, names, rule, stage):
        self.parameters, self.names, self.rule, self.axis = parameters, names, rule, rule.sharded
        self.dtype, self.sizes = parameters[0].dtype, [math.prod(p.shape) for p in parameters]
        self.starts, end = [], 0
        for size in self.sizes:
            self.starts.append(end)
            end += -(-size // ALIGNED) * ALIGNED
        self.width = -(-end // ALIGNED // self.axis.size) * ALIGNED  # of the owned range
        # Along the first of these while backward goes on, along the others once a step.
        self.summed = [axis for axis in (self.axis, *rule.parts) if axis.size > 1] or [self.axis]
        self.gradient, self.pending, self.owned = None, [], None
        if stage == 3:
            self.owned = self.axis.local_chunk(self.lay(parameters)).clone()
            self.owned.stop_gradient = names[0] is None
            self.reshard()

    def extent(self, index, rank=None):
        """(first, last) element of a parameter that a rank owns, and where the first lies in its range; or None."""
        start, size, rank = self.starts[index], self.sizes[index], self.axis.rank if rank is None else rank
        first, last = max(start, rank * self.width), min(start + size, (rank + 1) * self.width)
        return (first - start, last - start, first - rank * self.width) if first < last else None

    def lay(self, tensors):
        """Tensors of the parameters' shapes (None: zeros) -> the flat range (width * ranks,)."""
        parts, end = [], 0
        for start, size, tensor in zip([*self.starts, self.width * self.axis.size], [*self.sizes, 0], [*tensors, None]):
            if start > end:
                parts.append(paddle.zeros([start - end], self.dtype))
            if size:
                part = paddle.zeros([size], self.dtype) if tensor is None else tensor.detach().reshape([-1])
                parts.append(part)
            end = start + size
        return paddle.concat(parts)

    def parts_of(self, flat):
        """The flat range -> views of it in the parameters' shapes."""
        found = []
        for start, size, parameter in zip(self.starts, self.sizes, self.parameters):
            part = flat._slice(start, start + size)
            part.get_tensor()._set_dims(parameter.shape)
            found.append(part)
        return found

    @paddle.no_grad()
    def unshard(self):
        """Stage 3: the parameters get their values, until reshard()."""
        self.take_over()
        for parameter, part in zip(
            self.parameters, self.parts_of(self.axis.all_gather_into_tensor(self.owned.detach()))
        ):
            part._share_buffer_to(parameter)

    def reshard(self):
        for parameter in self.parameters:
            parameter._clear_data()

    @paddle.no_grad()
    def take_over(self):
        """Stage 3: what was set to whole values meanwhile (loaded) becomes this rank's part of them."""
        for index, parameter in enumerate(self.parameters):
            if not parameter._is_initialized():
                continue
            if extent := self.extent(index):
                first, last, place = extent
                values = parameter.detach().view([-1])._slice(first, last)
                self.owned.detach()._slice(place, place + last - first).copy_(values, True)
            parameter._clear_data()

    def begin(self):
        """Take the parameters' gradients and begin to add them up over the sharded axis; the names that have one."""
        gradients = [p.grad for p in self.parameters]
        arrived = [name for name, gradient in zip(self.names, gradients) if gradient is not None]
        flat = self.lay(gradients)
        del gradients
        for parameter in self.parameters:
            parameter.clear_gradient(False)
        self.pending.append(self.summed[0].reduce_async(flat, scatter=self.summed[0] is self.axis))
        return arrived

    def finish(self):
        while self.pending:
            found = self.pending.pop(0)()
            self.gradient = found if self.gradient is None else self.gradient.add_(found)


class ParamShard:
    """What this rank updates of a weight: some of its elements, laid flat."""

    def __init__(self, weight, bucket, index):
        self.weight, self.name, self.bucket, self.index = weight, weight.name, bucket, index
        self.first, self.last, self.place = bucket.extent(index)
        self.arrived = True  # a gradient has, on some rank

    @property
    def extent(self):
        """(first, last) of its elements within the parameter laid flat."""
        return self.first, self.last

    def set(self, array):
        """What Weight.read(…, extent) gives, (n,) numpy, into it."""
        self.tensor.copy_(paddle.to_tensor(array).astype(self.bucket.dtype), True)

    @property
    def shape(self):
        """Of the whole weight: decay depends on its number of dimensions."""
        return self.weight.shape

    @property
    def tensor(self):
        """(n,) the elements, a view."""
        if self.bucket.owned is not None:
            return self.bucket.owned.detach()._slice(self.place, self.place + self.last - self.first)
        return self.weight.parameter.detach().view([-1])._slice(self.first, self.last)

    @property
    def grad(self):
        """(n,) their gradient, or None."""
        if self.bucket.gradient is None or not self.arrived:
            return None
        return self.bucket.gradient._slice(self.place, self.place + self.last - self.first)

    def clear_gradient(self):
        self.bucket.gradient = None


class ZeroOptimizer:
    """What this rank does of a step's update: gradients added up over the ranks that hold other data, and its weights.

    weights: model.Weight objects of all that is trained here. `pieces` is what the optimizer updates, with name, tensor,
    grad and shape (of the whole): the weights themselves, or with sharding the ranges of them that this rank owns. Trained
    weights are float32 in bf16 runs too, where only products are in bfloat16: they are the master weights.

    What a rank of n along the sharding axis holds (Rajbhandari et al., arXiv 1910.02054):
    stage 1: moments of its n-th. Gradients whole, until the last micro-batch's are there; then n-th too.
    stage 2: gradients of its n-th, but for the unit (embedding, block, norm, head) whose backward is under way.
    stage 3: weights of its n-th, frozen ones too, but for the unit that is at work. So forward keeps no more than each
    unit's inputs, and backward computes the unit's activations again: `recompute` is always on, in effect.

    Gradients of a unit are on their way while backward goes on, where the backend allows (NCCL; gloo blocks). All ranks
    begin with the units in the same order, backward's, whatever their batches are.
    """

    def __init__(self, model, weights, topology):
        self.model, self.weights, self.topology = model, weights, topology
        degrees, model.topology, model.shards = topology.degrees, topology, self
        self.stage = max(1, degrees.stage) if topology.sharding.size > 1 else 0
        self.paths = {id(parameter): path for path, parameter in weight_tensors(model)}
        self.rules = {
            id(w.parameter): gradient_reduction_of(self.paths[id(w.parameter)], w.parameter, model) for w in weights
        }
        self.units, self.mine = {}, {}  # by name; {id of a parameter: the ParamShard that is here}
        self.arrived, self.early, self.flying = set(), False, []
        if degrees.world > 1:
            self._make_units()
        mine = [self.mine[id(w.parameter)] for w in weights if id(w.parameter) in self.mine]
        self.pieces = mine if self.stage else weights
        if self.stage == 3:
            model.comm.shards = self  # see run_unit()
            model.recompute = False  # each unit is computed again anyway

    def _make_units(self):
        grouped, trained = {}, {id(w.parameter): w for w in self.weights}
        for path, parameter in weight_tensors(self.model):
            weight = trained.get(id(parameter))
            if weight is None and self.stage < 3:
                continue
            if (rule := self.rules.get(id(parameter))) is None:
                rule = GradReduction((), gradient_reduction_of(path, parameter, self.model).sharded, (), False)
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
                        self.mine[id(parameter)] = ParamShard(weight or Frozen(path, parameter), bucket, index)
                    if self.stage == 3:
                        parameter.piece = self.mine.get(
                            id(parameter)
                        )  # a folder's weights are read into it, see model.load_weights
                    if is_trained and self.stage < 3:
                        self.units[name].watch(path, parameter)

    @property
    def buckets(self):
        """Of what is trained, in the order in which all ranks reduce them: backward's."""
        return [bucket for unit in reversed(self.units.values()) for bucket in unit.trained]

    @contextlib.contextmanager
    def backward(self, last):
        """Around the backward of a micro-batch; last: of the step's. Units are reduced as they get ready."""
        self.early = self.stage == 2 or self.stage < 2 and last
        for unit in self.units.values():
            unit.start()
        yield
        if self.early:
            self._reduce_rest()
        self.early = False

    @paddle.no_grad()
    def reduce_ready(self):
        """Begin with the units that are ready, up to the first that is not: a batch for company may pass some by."""
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
    def reduce_gradients(self):
        """Add gradients up over the ranks; returns their Euclidean norm over the whole model."""
        if self.units and self.stage < 2:
            self._reduce_rest()
        for bucket in self.buckets:
            if self.stage == 3:
                bucket.gradient = bucket.owned.grad
            bucket.finish()
        self.flying.clear()
        for unit in self.units.values():
            unit.start()
        if self.units:
            self._agree_on_arrivals()
        for bucket in self.buckets:
            if bucket.gradient is None:
                continue
            for axis in bucket.summed[1:]:
                axis.all_reduce(bucket.gradient)
            if not self.stage:
                self._hand_back(bucket)
        for piece in self.mine.values():
            piece.arrived = piece.name in self.arrived
        return self._norm()

    def _hand_back(self, bucket):
        """Stage 0: the sums are the parameters' gradients."""
        for name, parameter, part in zip(bucket.names, bucket.parameters, bucket.parts_of(bucket.gradient)):
            if name in self.arrived:
                parameter.grad = part
        bucket.gradient = None

    def _agree_on_arrivals(self):
        """Experts that no token chose here have a gradient if one did elsewhere; who has none anywhere is not updated."""
        if self.model.config.experts is None:
            self.arrived.update(weight.name for weight in self.weights)
            return
        for name in ("sharding", "sep", "dp", "expert_dp", "tp"):
            axis = getattr(self.topology, name)
            rules = [(w.name, self.rules[id(w.parameter)]) for w in self.weights]
            names = [name for name, rule in rules if axis.size > 1 and (axis in rule.parts or axis is rule.sharded)]
            if names:
                seen = paddle.to_tensor([float(name in self.arrived) for name in names])
                self.arrived |= {name for name, there in zip(names, axis.all_reduce(seen, "max").numpy()) if there}

    def _norm(self):
        topology = self.topology
        sums = {((), topology.sharding): paddle.zeros([], "float64")}
        if topology.ep.size > 1:  # also on a rank that trains none of its experts: the others wait for it
            sums[(topology.ep,), topology.alone] = paddle.zeros([], "float64")
        for piece in self.pieces:
            parameter = piece.weight.parameter if self.stage else piece.parameter
            rule, gradient = self.rules[id(parameter)], piece.grad
            if gradient is None or not rule.counts:
                continue
            if (cut := getattr(parameter, "shard_spec", None)) is not None and cut.overlaps:
                counted = cut.counted(parameter.shape)
                gradient = gradient * (counted.reshape([-1])[piece.first : piece.last] if self.stage else counted)
            sums[rule.apart, rule.sharded] += kernels.squared_norm(gradient)
        total = paddle.zeros([], "float64")
        for (axes, sharded), squares in sums.items():
            for axis in (*axes, *([sharded] if self.stage else [])):
                axis.all_reduce(squares)
            total = total + squares
        for axis in (self.topology.tp, self.topology.pp):
            axis.all_reduce(total)
        return math.sqrt(float(total))

    @paddle.no_grad()
    def gather_weights(self):
        """After the optimizer's step: the weights that other ranks have updated. Gradients are gone."""
        self.arrived.clear()
        if not self.stage:
            return
        for bucket in self.buckets:
            if self.stage < 3:
                flat = bucket.axis.all_gather_into_tensor(bucket.axis.local_chunk(bucket.lay(bucket.parameters)))
                for parameter, part in zip(bucket.parameters, bucket.parts_of(flat)):
                    parameter.set_value(part)
            else:
                bucket.owned.clear_gradient(False)
            bucket.gradient = None

    # ------------------------------------------------------------------------------- for checkpoints
    # Moments are optimizer.moments[name], each (n,) of the piece of this name. A file is written from whole(), weight by
    # weight; or, of weights, in each_unit(), while they are whole. Of a file no more is read than extent() says of moments,
    # and parameter.piece of stage 3's weights.

    def place_of(self, weight):
        """() where this rank's moments are of all of the parameter; else (first,) of its elements, laid flat, that they are of."""
        if not self.stage or self._bucket(weight)[0].axis.size == 1:
            return ()
        piece = self.mine.get(id(weight.parameter))
        return (0 if piece is None else piece.first,)

    def laid(self, weight, moment):
        """A moment as place_of() says: of the parameter's shape, or flat, or None."""
        return moment if moment is None or self.place_of(weight) else moment.reshape(weight.parameter.shape)

    def held(self, weight):
        """(tensor, *place) of what this rank has of a weight: (the parameter,); or in stage 3 (its elements or None, first)."""
        if self.stage < 3 or id(weight.parameter) not in self.paths:  # a table that is computed
            return (weight.parameter,)
        self._bucket(weight)[0].take_over()
        piece = self.mine.get(id(weight.parameter))
        return (self.laid(weight, piece and piece.tensor), *self.place_of(weight))

    def present(self, name):
        """While it is entered a unit's parameters have their values. Ranks along sharding enter it together."""
        return self.units[name].unsharded() if self.stage == 3 and name in self.units else contextlib.nullcontext()

    def _bucket(self, weight):
        """(its bucket, its number in there) of a parameter."""
        unit = self.units[unit_of(self.paths[id(weight.parameter)], self.model.lm_head is None)]
        return next((b, i) for b in unit.buckets for i, p in enumerate(b.parameters) if p is weight.parameter)

    def extent(self, weight):
        """None if this rank updates all of the parameter; else (first, last) of its elements, laid flat in our layout."""
        return self.mine[id(weight.parameter)].extent if self.stage else None

    @paddle.no_grad()
    def whole(self, weight, tensor):
        """numpy of the parameter's shape (our layout), from each rank's tensor (n,) of its piece: a moment, a gradient, or
        the piece's own. Ranks along sharding call it together; tensor is None where a rank owns nothing of it."""
        if not self.stage:
            return tensor.numpy()
        parameter, (bucket, index) = weight.parameter, self._bucket(weight)
        extents = [bucket.extent(index, rank) for rank in range(bucket.axis.size)]
        most = max(extent[1] - extent[0] for extent in extents if extent)
        dtype = bucket.dtype if tensor is None else tensor.dtype
        mine = paddle.zeros([most], dtype)
        if tensor is not None:
            mine[: tensor.shape[0]] = tensor
        parts = bucket.axis.all_gather_into_tensor(mine).reshape([-1, most])
        parts = (parts.astype("float32") if dtype == paddle.bfloat16 else parts).numpy()
        parts = [part[: extent[1] - extent[0]] for part, extent in zip(parts, extents) if extent]
        return np.concatenate(parts).reshape(parameter.shape)

    def each_unit(self):
        """Yields the ids of each unit's parameters while they are whole. Ranks of sharding go through it together."""
        for unit in self.units.values():
            with unit.unsharded() if self.stage == 3 else contextlib.nullcontext():
                yield {id(parameter) for bucket in unit.buckets for parameter in bucket.parameters}

    def take_over(self):
        """Stage 3: parameters set to whole values (by loading) are given back now, not when they are used next."""
        for unit in self.units.values():
            for bucket in unit.buckets if self.stage == 3 else ():
                bucket.take_over()


Frozen = namedtuple("Frozen", "name parameter")  # in a Weight's place; name: our path


def weight_tensors(model):
    """(path, tensor) of parameters, and of the buffers that hold a quantized model's weights."""
    names = (".qweight", ".qzeros", ".scales", ".g_index")
    return [*model.named_parameters(), *(found for found in model.named_buffers() if found[0].endswith(names))]


class FSDPUnit:
    """Buckets that get ready together.

    A unit is ready in backward when all the parameters have a gradient that always get one. Those of a sparse block's
    experts do not, as nobody may choose an expert; but they are computed before the attention's, which come after them.
    """

    def __init__(self, name, shards):
        self.name, self.shards, self.buckets = name, shards, []
        self.always, self.missing, self.reduced, self.users = set(), set(), False, 0

    @property
    def trained(self):
        return [bucket for bucket in self.buckets if bucket.names[0] is not None]

    def watch(self, path, parameter):
        sparse, topology = self.shards.model.config.experts is not None, self.shards.topology
        if topology.sep.size > 1 or sparse and topology.ep.size > 1:
            # Ranks with other tokens have other experts at work, or none of their tokens has a label: their backwards may go in
            # other orders and come to this unit before or after a collective of backward itself. All are reduced behind it.
            return
        if not (sparse and ".mlp." in path):
            self.always.add(path)
            parameter._register_backward_hook(functools.partial(self.arrived, path))

    def start(self):
        self.missing, self.reduced = set(self.always), False

    def arrived(self, path, *_):
        self.missing.discard(path)
        if self.shards.early and not self.missing:
            self.shards.reduce_ready()

    @property
    def is_ready(self):
        return bool(self.always) and not self.missing

    def stays(self, bucket):
        """Whether its gradients are complete on this rank as they are."""
        return not self.shards.stage and not bucket.rule.parts

    def reduce(self):
        shards = self.shards
        for bucket in self.trained:
            _add_overlaps(bucket.parameters, shards.topology.tp)
            if self.stays(bucket):
                continue
            shards.arrived.update(bucket.begin())
            shards.flying.append(bucket)
            while len(shards.flying) > IN_FLIGHT:
                shards.flying.pop(0).finish()
        self.reduced = True

    def reduce_rest(self):
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
    """Gradients whose rows several ranks of tp have are added up over these ranks, in place."""
    for parameter in parameters:
        cut = getattr(parameter, "shard_spec", None)
        if cut is None or not cut.overlaps:
            continue
        whole = np.zeros(cut.shape, np.float32)
        if parameter.grad is not None:
            cut.put(whole, parameter.grad.numpy())
        whole = tp.all_reduce(paddle.to_tensor(whole))
        parameter.grad = paddle.to_tensor(cut.take(whole.numpy()))


# ----------------------------------------------------------------------------------- stage 3: whole while they are used


class _RecomputeSharded(PyLayer):
    """A computation with units whose weights are whole only while it runs; in backward it runs again, with gradients."""

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
                    unit.shards.arrived.update(bucket.begin())
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


def run_unit(shards: "ZeroOptimizer", name: str, function, args: tuple):
    """Stage 3: function(*args) while the units that it reads are unsharded; in backward it is computed again."""
    names = UNITS_READ_BY.get(name, (name,))
    return _FlattenedCall([shards.units[n] for n in names if n in shards.units], function, args)()
