"""Pipeline parallelism: schedule, point-to-point transfers, stages."""

import atexit
import functools
import json
import queue
import threading
import time
from collections import defaultdict, deque, namedtuple
from multiprocessing.connection import Client, Listener

import numpy as np
import paddle
import paddle.distributed as dist

from distributed.collectives import Axis, _backend
from formats.weights import named_weights

# ========================================================================================================= pipeline


def partition_layers(layers, stages):
    """[range of layers] of each stage: as even as can be; stages in the middle, which have no embedding or head, take more."""
    order = sorted(range(stages), key=lambda stage: (stage in (0, stages - 1), stage == stages - 1, stage))
    sizes = [layers // stages + (order.index(stage) < layers % stages) for stage in range(stages)]
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for size, end in zip(sizes, ends)]


def check_pipeline(config, degrees):
    """[what stands against a pipeline of this model so, a line each]."""
    stages = degrees.pp * degrees.virtual
    if degrees.virtual > 1 and degrees.pp == 1:
        return [f"virtual_pp_degree {degrees.virtual} needs a pipeline_parallel_degree above 1"]
    if stages > config.num_hidden_layers:
        factors = f"pipeline_parallel_degree {degrees.pp}"
        if degrees.virtual > 1:
            factors += f" x virtual_pp_degree {degrees.virtual} = {stages}"
        return [f"{factors} is more than layers ({config.num_hidden_layers})"]
    return []


@functools.cache
def pipeline_schedule(ranks, virtual, batches):
    """For each rank of a pipeline its [("forward" or "backward", chunk, micro-batch)] of a step, in order.

    ScheduledTokens c of rank r is stage c · ranks + r. One forward, one backward (arXiv 2006.09503) with one chunk a rank, else
    interleaved (arXiv 2104.04473, 2.2): micro-batches go in groups of as many as there are ranks, all of a group through
    one chunk before the next; the last group may be smaller. A rank begins with as many forwards as lie between it and
    the first backward; where that order would wait for itself, as it can with a smaller group, with more.
    """
    groups = [range(first, min(first + ranks, batches)) for first in range(0, batches, ranks)]
    forwards = [("forward", chunk, i) for group in groups for chunk in range(virtual) for i in group]
    backwards = [("backward", chunk, i) for group in groups for chunk in reversed(range(virtual)) for i in group]
    for more in range(len(forwards) + 1):
        plan = []
        for rank in range(ranks):
            ahead = ranks - rank - 1 if virtual == 1 else 2 * (ranks - rank - 1) + (virtual - 1) * ranks
            ahead = min(ahead + more, len(forwards))
            steady = [step for pair in zip(forwards[ahead:], backwards) for step in pair]
            plan.append([*forwards[:ahead], *steady, *backwards[len(forwards) - ahead :]])
        if simulate_schedule(plan) is not None:
            return plan


def simulate_schedule(plan, costs={"forward": 1.0, "backward": 2.0}):
    """How long a pipeline_schedule takes, and the share of that time in which a rank is idle; None if it waits for itself."""
    ranks, virtual = len(plan), 1 + max(chunk for _, chunk, _ in plan[0])
    last, finished, places, clocks = ranks * virtual - 1, {}, [0] * ranks, [0.0] * ranks
    while any(place < len(steps) for place, steps in zip(places, plan)):
        moved = False
        for rank, steps in enumerate(plan):
            while places[rank] < len(steps):
                kind, chunk, batch = steps[places[rank]]
                stage = chunk * ranks + rank
                needed = [("forward", stage - 1, batch)] if kind == "forward" and stage else []
                if kind == "backward":
                    needed = [("forward", stage, batch)] + ([("backward", stage + 1, batch)] if stage < last else [])
                if not all(what in finished for what in needed):
                    break
                clocks[rank] = max([clocks[rank], *(finished[what] for what in needed)]) + costs[kind]
                finished[kind, stage, batch] = clocks[rank]
                places[rank], moved = places[rank] + 1, True
        if not moved:
            return None
    busy = sum(costs[kind] for steps in plan for kind, _, _ in steps)
    return max(clocks), 1 - busy / (ranks * max(clocks))


def bubble_fraction(ranks, virtual, batches):
    """The share of a step in which a rank of a pipeline is idle, if all stages take equally long: (p-1) / (v·m + p-1).

    With virtual stages, and micro-batches that are no multiple of the ranks, there is no formula: the pipeline_schedule's own.
    """
    if virtual == 1 or batches % ranks == 0:
        return (ranks - 1) / (virtual * batches + ranks - 1)
    return simulate_schedule(pipeline_schedule(ranks, virtual, batches))[1]


class Channel:
    """Messages, a header and tensors of any shapes, from one process to another, in the order of sending.

    A bell beside the group (a connection of Python's own) carries the headers, and says when both are ready: gloo gives up
    after 30 seconds, and a neighbor may need longer. It also tells at once that the neighbor is gone.
    """

    def __init__(self, source, target, groups):
        self.source, self.target, self.error = source, target, None
        self.group, mine = groups.connect([source, target], "channel "), groups.launch.rank
        key = f"bell {source} {target}"
        if mine == target:
            host = groups.launch.endpoints[source].split(":")[0]
            self.bell = Client((host, int(groups.store.get(key))))
        else:
            with Listener(("", 0)) as listener:
                groups.store.set(key, str(listener.address[1]))
                self.bell = listener.accept()
        self.waiting, self.sent = queue.SimpleQueue(), []
        if _backend() != "gloo":  # the first call connects, and waits for that of the other
            (dist.recv if mine == target else dist.send)(
                paddle.zeros([1]), source if mine == target else target, self.group
            )
        elif mine == source:  # gloo's sends end when they are received
            self.thread = threading.Thread(target=self._send_all, daemon=True)
            self.thread.start()
            atexit.register(self.close)

    def send(self, header, tensors):
        """header: what JSON can hold. Returns at once; the tensors must not change afterwards."""
        if self.error is not None:
            raise RuntimeError(f"rank {self.target} takes no more from rank {self.source}") from self.error
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        header = [header, [[tensor.shape, str(tensor.dtype).rpartition(".")[2]] for tensor in tensors]]
        if _backend() == "gloo":
            self.waiting.put((header, tensors))
        else:
            self.bell.send_bytes(json.dumps(header).encode())
            self.sent = [(task, tensor) for task, tensor in self.sent if not task.is_completed()]
            self.sent += [(dist.isend(tensor, self.target, self.group), tensor) for tensor in tensors]

    def _send_all(self):
        while (message := self.waiting.get()) is not None:
            header, tensors = message
            try:
                self.bell.send_bytes(json.dumps(header).encode())
                if tensors:
                    self.bell.recv_bytes()  # now the other receives
                for tensor in tensors:
                    dist.send(tensor, self.target, self.group)
            except Exception as error:  # send() raises it
                self.error = error
                self.bell.close()
                return
            message = tensors = tensor = None  # else kept until the next comes

    def receive(self):
        """(header, tensors) of the next message, however long it takes to come."""
        try:
            header, kinds = json.loads(self.bell.recv_bytes())
            if kinds and _backend() == "gloo":
                self.bell.send_bytes(b"now")
        except (EOFError, ConnectionError):
            raise RuntimeError(f"rank {self.source} of the pipeline is gone") from None
        tensors = [paddle.empty(shape, dtype) for shape, dtype in kinds]
        for tensor in tensors:
            dist.recv(tensor, self.source, self.group)
        return header, tensors

    def close(self):
        """What is not sent yet gets a little time."""
        self.waiting.put(None)
        self.thread.join(20)


@functools.cache  # a process has one
def channel(source, target, groups):
    return Channel(source, target, groups)


class HandedOn(Exception):
    """Raised inside a model's forward() where this rank's part of it ends, and the next rank's begins."""


MicrobatchIO = namedtuple(
    "MicrobatchIO", "inputs asked outputs"
)  # of a chunk's forward, for its backward; see Pipeline.take()


class Pipeline:
    """This rank's place in a pipeline, and its talk with its neighbors.

    ScheduledTokens c of it is stage c · size + rank; layers[c] are its layers. From stage to stage go x (B, T, D) and the
    probabilities of the routers before it, of which the last stage makes their loss; back go the gradients of those that
    have one. now: (chunk, micro-batch) of the forward that is being made while training, else None.
    """

    def __init__(self, topology, layers):
        pp = topology.pp
        self.axis, self.rank, self.size, self.virtual = pp, pp.rank, pp.size, topology.degrees.virtual
        stages = partition_layers(layers, self.size * self.virtual)
        self.layers, self.last = stages[self.rank :: self.size], len(stages) - 1
        self.now, self.starts, self.whole, self.begun = None, False, False, 0
        self.flights, self.arrived = {}, defaultdict(deque)  # messages, by (kind, chunk, micro-batch)
        self.waited = 0.0  # seconds, for messages
        pp.idle = pp.bubble = 0.0  # share of the last step in which this rank waited, and of bubble_fraction()
        # In an order of all, or ranks would wait for each other in a circle: every other edge first, at the same time.
        edges = sorted(range(self.size if self.virtual > 1 else self.size - 1), key=lambda rank: (rank % 2, rank))
        edges = [(pp.ranks[rank], pp.ranks[(rank + 1) % self.size]) for rank in edges]
        pairs = dict.fromkeys(pair for a, b in edges for pair in ((a, b), (b, a)) if topology.rank in pair)
        self.channels = {pair: channel(*pair, topology.groups) for pair in pairs if topology.groups is not None}

    def stage(self, chunk):
        return chunk * self.size + self.rank

    def send(self, step, header, tensors):
        """To the next rank (step 1) or the one before (-1); header: [kind, chunk there, micro-batch, …]."""
        target = (self.rank + step) % self.size
        self.axis.bytes += sum(tensor.size * tensor.element_size() for tensor in tensors)
        self.channels[self.axis.ranks[self.rank], self.axis.ranks[target]].send(header, tensors)

    def receive(self, step, kind, chunk, batch):
        """What the rank one step away sent of this kind for a chunk and a micro-batch: (rest of the header, tensors)."""
        begin, key = time.perf_counter(), (kind, chunk, batch)
        source = self.axis.ranks[(self.rank + step) % self.size]
        while not self.arrived[key]:
            (*found, rest), tensors = self.channels[source, self.axis.ranks[self.rank]].receive()
            self.arrived[tuple(found)].append((rest, tensors))
        self.waited += time.perf_counter() - begin
        return self.arrived[key].popleft()

    def take(self, chunk, recompute):
        """[x, *probabilities] that the stage before gave for a chunk. asked: which of them shall have a gradient."""
        batch = None if self.now is None else self.now[1]
        asked, tensors = self.receive(-1, "forward", chunk, batch)
        for tensor, wanted in zip(tensors, asked):
            tensor.stop_gradient = not wanted
        if recompute:  # see CausalLM.embed()
            tensors[0].stop_gradient = False
        return tensors, asked

    def give(self, chunk, tensors):
        """[x, *probabilities] of a chunk to the next stage."""
        batch = None if self.now is None else self.now[1]
        there = chunk + (self.rank == self.size - 1)
        self.send(1, ["forward", there, batch, [not tensor.stop_gradient for tensor in tensors]], tensors)

    def backward(self, chunk, batch):
        """The backward of a chunk's forward: gradients come from the next stage and go to the one before."""
        inputs, asked, outputs = self.flights.pop((chunk, batch))
        passed = []  # gradients of probabilities that only passed through
        if self.stage(chunk) == self.last:
            outputs[0].backward()
        else:
            there = chunk + (self.rank == self.size - 1)
            gradients = iter(self.receive(1, "backward", there, batch)[1])
            own = [(tensor, next(gradients)) for tensor in outputs if not tensor.stop_gradient]
            passed = list(gradients)
            if own:
                paddle.autograd.backward(*map(list, zip(*own)))
        if self.stage(chunk) > 0:
            wanted = [tensor for tensor, wanted in zip(inputs, asked) if wanted]
            if passed:
                wanted = wanted[: len(wanted) - len(passed)]
            found = [paddle.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in wanted]
            self.send(-1, ["backward", chunk, batch, None], [*found, *passed])

    def steps(self, batches, forward):
        """forward_backward() of a pipeline. forward(i): the loss of the i-th batch, or HandedOn."""
        begin, waited, losses = time.perf_counter(), self.waited, {}
        for kind, chunk, i in pipeline_schedule(self.size, self.virtual, len(batches))[self.rank]:
            if kind == "forward":
                self.now = chunk, i
                try:
                    loss = forward(i)
                    self.flights[self.now] = self.flights[self.now]._replace(outputs=[loss])
                    losses[i] = float(loss)
                except HandedOn:
                    pass
                finally:
                    self.now = None
                continue
            self.backward(chunk, i)
            if chunk == 0:
                yield losses.pop(i, 0.0), batches[i]
        # The first rank is the last to end; who went on to a collective would wait too long for gloo.
        if self.rank > 0:
            self.receive(-1, "end", 0, 0)
        if self.rank < self.size - 1:
            self.send(1, ["end", 0, 0, None], [])
        seconds = time.perf_counter() - begin
        self.axis.idle = (self.waited - waited) / seconds
        self.axis.bubble = bubble_fraction(self.size, self.virtual, len(batches))

    def everywhere(self, run):
        """What run() returns on the last stage, a tensor or several, on all ranks; elsewhere it raises HandedOn."""
        if self.now is not None or self.whole:
            return run()
        if paddle.is_grad_enabled():
            raise RuntimeError(
                "a pipeline is trained by parallel.forward_backward(), and runs by itself in paddle.no_grad() alone"
            )
        if self.begun:
            raise RuntimeError("a pipeline that works on batches pipelined_map() takes no other call")
        return self.end(self.begin(run))

    def begin(self, run):
        """This rank's part of run(), without gradients: its result on the last stage, which goes back at once, else None."""
        self.whole = True
        self.begun += 1
        try:
            found = run()
        except HandedOn:
            return None
        finally:
            self.whole = False
        self._back(found)
        return found

    def end(self, found):
        """The result of the oldest begin() that has none yet."""
        self.begun -= 1
        if found is None:
            several, found = self.receive(1, "result", 0, 0)
            found = tuple(found) if several else found[0]
            self._back(found)
        return found

    def _back(self, found):
        if self.rank > 0:
            several = isinstance(found, tuple)
            self.send(-1, ["result", 0, 0, several], found if several else [found])


class PipelineCausalLM:
    """A ParallelCausalLM of which this process has some layers. Without gradients a call runs through all of them."""

    def forward(self, *inputs, **options):
        forward = super().forward
        return self.pipeline.everywhere(lambda: forward(*inputs, **options))

    def hidden_states(self, *inputs, **options):
        hidden_states = super().hidden_states
        return self.pipeline.everywhere(lambda: hidden_states(*inputs, **options))

    def logits(self, x):
        logits = super().logits

        def run():
            if self.pipeline.rank < self.pipeline.size - 1:
                raise HandedOn
            return logits(x)

        return self.pipeline.everywhere(run)

    def trunk(self, input_ids, position_ids=None, rows=None, caches=None):
        pipeline = self.pipeline
        self.begin(input_ids, caches)
        if caches is None and self.prefix is not None:
            caches = self.new_cache(input_ids.shape[0])
        chunks = range(pipeline.virtual) if pipeline.now is None else pipeline.now[:1]
        pipeline.starts = pipeline.stage(chunks[0]) == 0
        x, shared = self.prepare(input_ids, position_ids, rows, caches)
        for chunk in chunks:
            inputs, asked = [x], []
            if pipeline.stage(chunk) > 0:
                inputs, asked = pipeline.take(chunk, self.recompute and self.training)
            x, probabilities = self.through(pipeline.layers[chunk], inputs[0], shared, caches)
            if pipeline.now is not None:
                assert pipeline.now not in pipeline.flights, "a model is called once for a micro-batch"
                pipeline.flights[pipeline.now] = MicrobatchIO(inputs if asked else [], asked, [x, *probabilities])
            probabilities = [*probabilities, *inputs[1:]]  # in this order: those that pass through come last
            if pipeline.stage(chunk) == pipeline.last:
                return self.last_norm(x), probabilities
            pipeline.give(chunk, [x, *probabilities] if self.training else [x])
        raise HandedOn

    def embed(self, input_ids, position_ids, before=0):
        return super().embed(input_ids, position_ids, before) if self.pipeline.starts else None

    def flops_per_token(self, T):
        fixed, each = self.whole_flops
        return fixed + each * T


class MissingLayer(paddle.nn.Layer):
    """Stands in a model for a layer that another stage of the pipeline holds."""


def apply_pipeline_parallel(model, topology):
    """Pipeline parallelism of a model as it was built: what other stages hold is taken out.

    A tied head is a copy of the embedding on the last stage; model.tied is the axis of the two ranks that have it.
    """
    if topology.pp.size == 1:
        return
    names = {weight.name for weight in named_weights(model)}
    fixed = model.flops_per_token(0)
    model.whole_flops = fixed, model.flops_per_token(1) - fixed
    pipeline = model.pipeline = Pipeline(topology, model.config.num_hidden_layers)
    first, last = pipeline.rank == 0, pipeline.rank == pipeline.size - 1
    for i in set(range(len(model.layers))) - {i for layers in pipeline.layers for i in layers}:
        model.layers[i] = MissingLayer()
    tied = model.lm_head is None
    for name, kept in (
        ("embed_tokens", first or tied and last),
        ("embed_positions", first),
        ("embed_norm", first),
        ("project_in", first),
        ("norm", last),
        ("project_out", last),
        ("lm_head", last),
    ):
        if getattr(model, name) is not None and not kept:
            setattr(model, name, MissingLayer())
    ends = [topology.pp.ranks[0], topology.pp.ranks[-1]]
    model.tied = Axis("tied", ends, topology.rank, topology.groups) if tied and (first or last) else None
    model.names_on_other_ranks |= names - {weight.name for weight in named_weights(model)}


def tied_axis(model, path):
    """The axis over whose ranks, stages of a pipeline, there are copies of the parameter of this path; None: it is alone."""
    if model.topology.pp.size > 1:
        if path.startswith("prefix."):
            return model.topology.pp
        if path == "embed_tokens.weight" and model.tied is not None:
            return model.tied
    return None
