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
from families import ModelConfig
from formats.weights import named_weights
from model import CausalLM

# ========================================================================================================= pipeline


def partition_layers(layers: int, stages: int) -> list[range]:
    """[range of layers] of each stage, as even as possible; the middle ones, without embedding or head, take more."""
    order = sorted(range(stages), key=lambda stage: (stage in (0, stages - 1), stage == stages - 1, stage))
    sizes = [layers // stages + (order.index(stage) < layers % stages) for stage in range(stages)]
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for size, end in zip(sizes, ends)]


def check_pipeline(config: ModelConfig, degrees: object) -> list[str]:
    """Why this model cannot be a pipeline of these degrees, a line each."""
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
def pipeline_schedule(ranks: int, virtual: int, batches: int) -> list[list[tuple]]:
    """For each rank its [("forward" or "backward", chunk, micro-batch)] of a step, in order.

    Chunk c of rank r is stage c · ranks + r. One forward, one backward (arXiv 2006.09503) with one chunk a rank, else
    interleaved (arXiv 2104.04473, 2.2): micro-batches go in groups of one per rank, all of a group through one chunk
    before the next. A rank warms up with as many forwards as lie between it and the first backward. If the last group
    is smaller, the schedule is that of a full one without the steps of the micro-batches that are missing: an order in
    which nothing waits for a later step stays one when a micro-batch is left out.
    """
    groups = [range(first, first + ranks) for first in range(0, batches, ranks)]
    forwards = [("forward", chunk, i) for group in groups for chunk in range(virtual) for i in group]
    backwards = [("backward", chunk, i) for group in groups for chunk in reversed(range(virtual)) for i in group]
    plan = []
    for rank in range(ranks):
        ahead = ranks - rank - 1 if virtual == 1 else 2 * (ranks - rank - 1) + (virtual - 1) * ranks
        ahead = min(ahead, len(forwards))
        steady = [step for pair in zip(forwards[ahead:], backwards) for step in pair]
        steps = [*forwards[:ahead], *steady, *backwards[len(forwards) - ahead :]]
        plan.append([step for step in steps if step[2] < batches])
    return plan


def simulate_schedule(plan: list[list[tuple]], costs: dict | None = None) -> tuple[float, float] | None:
    """(duration of a pipeline_schedule, share of it in which a rank is idle); None if it deadlocks."""
    costs = costs or {"forward": 1.0, "backward": 2.0}
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


def bubble_fraction(ranks: int, virtual: int, batches: int) -> float:
    """The share of a step in which a rank is idle, if all stages take equally long: (p-1) / (v·m + p-1).

    With virtual stages and micro-batches that are not a multiple of the ranks there is no formula: it is simulated.
    """
    if virtual == 1 or batches % ranks == 0:
        return (ranks - 1) / (virtual * batches + ranks - 1)
    return simulate_schedule(pipeline_schedule(ranks, virtual, batches))[1]


class Channel:
    """Messages, a header and tensors of any shapes, from one process to another, in the order of sending.

    A control socket beside the group carries the headers, and says when both ranks are ready: gloo gives up after 30
    seconds, and a neighbor may need longer. It also tells at once that the neighbor has died.
    """

    def __init__(self, source: int, target: int, groups):
        self.source, self.target, self.error, self.watchdog = source, target, None, groups.watchdog
        self.group, rank = groups.connect([source, target], "channel "), groups.launch.rank
        key = f"control {source} {target}"
        if rank == target:
            host = groups.launch.endpoints[source].split(":")[0]
            self.control = Client((host, self.watchdog.ask("get", key)))
        else:
            with Listener(("", 0)) as listener:
                self.watchdog.ask("set", key, listener.address[1])
                self.control = listener.accept()
        self.waiting, self.sent = queue.SimpleQueue(), []
        if _backend() != "gloo":  # the first call connects, and waits for that of the other
            (dist.recv if rank == target else dist.send)(
                paddle.zeros([1]), source if rank == target else target, self.group
            )
        elif rank == source:  # gloo's sends end when they are received
            self.thread = threading.Thread(target=self._send_all, daemon=True)
            self.thread.start()
            atexit.register(self.close)

    def send(self, header, tensors) -> None:
        """header: JSON values. Returns at once; the tensors must not change afterwards."""
        if self.error is not None:
            raise RuntimeError(f"rank {self.target} accepts nothing more from rank {self.source}") from self.error
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        header = [header, [[tensor.shape, str(tensor.dtype).rpartition(".")[2]] for tensor in tensors]]
        if _backend() == "gloo":
            self.waiting.put((header, tensors))
        else:
            self.control.send_bytes(json.dumps(header).encode())
            self.sent = [(task, tensor) for task, tensor in self.sent if not task.is_completed()]
            self.sent += [(dist.isend(tensor, self.target, self.group), tensor) for tensor in tensors]

    def _send_all(self):
        while (message := self.waiting.get()) is not None:
            header, tensors = message
            try:
                self.control.send_bytes(json.dumps(header).encode())
                if tensors:
                    self.control.recv_bytes()  # the target is receiving now
                for tensor in tensors:
                    dist.send(tensor, self.target, self.group)
            except Exception as error:  # send() raises it
                self.error = error
                self.control.close()
                return
            message = tensors = tensor = None  # else they stay in memory until the next message

    def receive(self) -> tuple:
        """(header, tensors) of the next message; waits as long as the watchdog lets it."""
        self.watchdog.since["pp"] = "pp", [self.source], self.watchdog.moved()
        try:
            header, specs = json.loads(self.control.recv_bytes())
            if specs and _backend() == "gloo":
                self.control.send_bytes(b"now")
        except (EOFError, ConnectionError):
            raise RuntimeError(f"rank {self.source} of the pipeline has died") from None
        self.watchdog.since.pop("pp", None)
        tensors = [paddle.empty(shape, dtype) for shape, dtype in specs]
        for tensor in tensors:
            dist.recv(tensor, self.source, self.group)
        return header, tensors

    def close(self) -> None:
        """Waits a little for messages that are not sent yet."""
        self.waiting.put(None)
        self.thread.join(20)


@functools.cache  # one per process
def channel(source: int, target: int, groups: object) -> Channel:
    return Channel(source, target, groups)


MicrobatchIO = namedtuple("MicrobatchIO", "inputs wants_gradient outputs")  # of a chunk's forward, for its backward


class Pipeline:
    """This rank's stages, and its messages with its neighbors.

    Chunk c of rank r is stage c · size + r; layers[c] are its layers. From stage to stage go x (B, T/sp, D) and the
    probabilities of the routers before it, of which the last stage makes their loss; gradients of those that have one
    go back.
    """

    def __init__(self, topology, layers: int):
        pp = topology.pp
        self.axis, self.rank, self.size, self.virtual = pp, pp.rank, pp.size, topology.degrees.virtual
        stages = partition_layers(layers, self.size * self.virtual)
        self.layers, self.last = stages[self.rank :: self.size], len(stages) - 1
        self.microbatches, self.messages = {}, defaultdict(deque)  # messages: by (kind, chunk, micro-batch)
        self.pending_results = 0  # of start_inference()
        self.waited = 0.0  # seconds, for messages
        pp.idle = pp.bubble = 0.0  # share of the last step in which this rank waited, and bubble_fraction() of it
        # Every other edge first, all of these at the same time: in a circle the ranks would wait for each other.
        edges = sorted(range(self.size if self.virtual > 1 else self.size - 1), key=lambda rank: (rank % 2, rank))
        edges = [(pp.ranks[rank], pp.ranks[(rank + 1) % self.size]) for rank in edges]
        pairs = dict.fromkeys(pair for a, b in edges for pair in ((a, b), (b, a)) if topology.rank in pair)
        self.channels = {pair: channel(*pair, topology.groups) for pair in pairs if topology.groups is not None}

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.size - 1

    def stage(self, chunk: int) -> int:
        return chunk * self.size + self.rank

    # --------------------------------------------------------------------------------------------------- messages

    def send(self, step: int, header: list, tensors: list) -> None:
        """To the next rank (step 1) or the one before (-1); header: [kind, chunk there, micro-batch, …]."""
        target = (self.rank + step) % self.size
        self.axis.bytes += sum(tensor.size * tensor.element_size() for tensor in tensors)
        self.channels[self.axis.ranks[self.rank], self.axis.ranks[target]].send(header, tensors)

    def receive(self, step: int, kind: str, chunk: int, microbatch: int | None) -> tuple:
        """(rest of the header, tensors) of the message of this kind, chunk and micro-batch; step: -1 or 1."""
        begin, key = time.perf_counter(), (kind, chunk, microbatch)
        source = self.axis.ranks[(self.rank + step) % self.size]
        while not self.messages[key]:
            (*header, rest), tensors = self.channels[source, self.axis.ranks[self.rank]].receive()
            self.messages[tuple(header)].append((rest, tensors))
        self.waited += time.perf_counter() - begin
        return self.messages[key].popleft()

    def recv_activations(self, chunk: int, microbatch: int | None, recompute: bool) -> tuple:
        """([x, *probabilities] that the stage before sent for a chunk, [whether each gets a gradient])."""
        wants_gradient, tensors = self.receive(-1, "forward", chunk, microbatch)
        for tensor, wanted in zip(tensors, wants_gradient):
            tensor.stop_gradient = not wanted
        if recompute:  # see CausalLM._embed()
            tensors[0].stop_gradient = False
        return tensors, wants_gradient

    def send_activations(self, chunk: int, microbatch: int | None, tensors: list) -> None:
        """[x, *probabilities] of a chunk to the next stage."""
        target_chunk = chunk + self.is_last_rank
        header = ["forward", target_chunk, microbatch, [not tensor.stop_gradient for tensor in tensors]]
        self.send(1, header, tensors)

    # --------------------------------------------------------------------------------------------------- training

    def train_step(self, model, batches: list, inputs, loss_of, seed):
        """forward_backward() of a pipeline: yields (loss, batch); the loss is 0.0 but on the last stage."""
        begin, waited, losses = time.perf_counter(), self.waited, {}
        for kind, chunk, i in pipeline_schedule(self.size, self.virtual, len(batches))[self.rank]:
            if kind == "forward":
                seed(i)
                loss = self.forward(model, chunk, i, inputs(batches[i]), functools.partial(loss_of, batch=batches[i]))
                losses[i] = 0.0 if loss is None else float(loss)
                continue
            self.backward(chunk, i)
            if chunk == 0:
                yield losses.pop(i), batches[i]
        # The first rank ends last; gloo's collectives would time out on the others.
        if self.rank > 0:
            self.receive(-1, "end", 0, 0)
        if not self.is_last_rank:
            self.send(1, ["end", 0, 0, None], [])
        seconds = time.perf_counter() - begin
        self.axis.idle = (self.waited - waited) / seconds
        self.axis.bubble = bubble_fraction(self.size, self.virtual, len(batches))

    def forward(self, model, chunk: int, microbatch: int, inputs: dict, loss_of):
        """The forward of one chunk; inputs: CausalLM.forward()'s arguments. The loss of the last stage, else None."""
        inputs = dict(inputs)
        ids, positions = inputs.pop("input_ids"), inputs.pop("position_ids", None)
        context = model.start_forward(ids, positions, inputs.pop("startend_row_indices", None))
        received, wants_gradient = [model.embed(ids, context)] if self.stage(chunk) == 0 else [], []
        if self.stage(chunk) > 0:
            recompute = model.recompute and model.training
            received, wants_gradient = self.recv_activations(chunk, microbatch, recompute)
        x, probabilities = model.run_layers(self.layers[chunk], received[0], context)
        outputs, loss = [x, *probabilities], None
        probabilities = [*probabilities, *received[1:]]  # in this order: those that only pass through come last
        if self.stage(chunk) == self.last:
            loss = loss_of(model.outputs(model.final_norm(x), probabilities, context, **inputs))
            outputs = [loss]
        else:
            self.send_activations(chunk, microbatch, [x, *probabilities])
        self.microbatches[chunk, microbatch] = MicrobatchIO(received if wants_gradient else [], wants_gradient, outputs)
        return loss

    def backward(self, chunk: int, microbatch: int) -> None:
        """The backward of a chunk's forward: gradients come from the next stage and go to the one before."""
        inputs, wants_gradient, outputs = self.microbatches.pop((chunk, microbatch))
        passed = []  # gradients of probabilities that only passed through
        if self.stage(chunk) == self.last:
            outputs[0].backward()
        else:
            gradients = iter(self.receive(1, "backward", chunk + self.is_last_rank, microbatch)[1])
            own = [(tensor, next(gradients)) for tensor in outputs if not tensor.stop_gradient]
            passed = list(gradients)
            if own:
                paddle.autograd.backward(*map(list, zip(*own)))
        if self.stage(chunk) > 0:
            wanted = [tensor for tensor, wanted in zip(inputs, wants_gradient) if wanted]
            if passed:
                wanted = wanted[: len(wanted) - len(passed)]
            gradients = [paddle.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in wanted]
            self.send(-1, ["backward", chunk, microbatch, None], [*gradients, *passed])

    # -------------------------------------------------------------------------------------------------- inference

    def run_stages(self, model, input_ids, context, cache) -> tuple:
        """CausalLM.run_all() without gradients: this rank's stages; (None, []) but on the last rank."""
        if paddle.is_grad_enabled():
            raise RuntimeError("a pipeline is trained by parallel.forward_backward(); call it in paddle.no_grad()")
        for chunk, layers in enumerate(self.layers):
            if self.stage(chunk) == 0:
                x, received = model.embed(input_ids, context), []
            else:
                (x, *received), _ = self.recv_activations(chunk, None, False)
            x, probabilities = model.run_layers(layers, x, context, cache)
            if self.stage(chunk) == self.last:
                return model.final_norm(x), [*probabilities, *received]
            self.send_activations(chunk, None, [x, *probabilities, *received] if model.training else [x])
        return None, []

    def broadcast_from_last_stage(self, outputs):
        """The last rank's outputs, a tensor or a tuple of them, on every rank."""
        if self.pending_results:
            raise RuntimeError("a pipeline that works on batches pipelined_map() takes no other call")
        self.start_inference(outputs)
        return self.finish_inference(outputs)

    def start_inference(self, outputs) -> None:
        """This rank has done its stages of a batch; the last one sends its outputs back."""
        self.pending_results += 1
        if self.is_last_rank:
            self._send_back(outputs)

    def finish_inference(self, outputs):
        """The outputs of the oldest start_inference() that has not been finished."""
        self.pending_results -= 1
        if self.is_last_rank:
            return outputs
        is_tuple, tensors = self.receive(1, "result", 0, 0)
        outputs = tuple(tensors) if is_tuple else tensors[0]
        self._send_back(outputs)
        return outputs

    def _send_back(self, outputs):
        if self.rank > 0:
            is_tuple = isinstance(outputs, tuple)
            self.send(-1, ["result", 0, 0, is_tuple], list(outputs) if is_tuple else [outputs])

    def map(self, model, batches, inputs, outputs_of):
        """pipelined_map(): as many batches are in flight as there are ranks from this one on."""
        in_flight = deque()
        for batch in batches:
            with paddle.no_grad():
                outputs = self._map_one(model, inputs(batch), lambda outputs, batch=batch: outputs_of(outputs, batch))
            in_flight.append((batch, outputs))
            if len(in_flight) == self.size - self.rank:
                batch, outputs = in_flight.popleft()
                yield batch, self.finish_inference(outputs)
        for batch, outputs in in_flight:
            yield batch, self.finish_inference(outputs)

    def _map_one(self, model, inputs, outputs_of):
        inputs = dict(inputs)
        ids, positions = inputs.pop("input_ids"), inputs.pop("position_ids", None)
        context = model.start_forward(ids, positions, inputs.pop("startend_row_indices", None))
        x, probabilities = self.run_stages(model, ids, context, None)
        outputs = outputs_of(model.outputs(x, probabilities, context, **inputs)) if self.is_last_rank else None
        self.start_inference(outputs)
        return outputs


class MissingLayer(paddle.nn.Layer):
    """Stands in a model for a layer that another stage holds."""


def apply_pipeline_parallel(model: CausalLM, topology: object) -> Pipeline | None:
    """Take out of a model, as build() gives it, what other stages hold.

    A tied head is a copy of the embedding on the last stage; model.tied is the axis of the two ranks that have it.
    """
    model.tied = None
    if topology.pp.size == 1:
        return None
    names = {weight.name for weight in named_weights(model)}
    pipeline = Pipeline(topology, model.config.num_hidden_layers)
    first, last, tied = pipeline.rank == 0, pipeline.is_last_rank, model.lm_head is None
    for i in set(range(len(model.layers))) - {i for layers in pipeline.layers for i in layers}:
        model.layers[i] = MissingLayer()
    for name, is_here in (
        ("embed_tokens", first or tied and last),
        ("embed_positions", first),
        ("embed_norm", first),
        ("project_in", first),
        ("norm", last),
        ("project_out", last),
        ("lm_head", last),
    ):
        if getattr(model, name) is not None and not is_here:
            setattr(model, name, MissingLayer())
    ends = [topology.pp.ranks[0], topology.pp.ranks[-1]]
    model.tied = Axis("tied", ends, topology.rank, topology.groups) if tied and (first or last) else None
    model.names_on_other_ranks |= names - {weight.name for weight in named_weights(model)}
    return pipeline


def tied_axis(model: CausalLM, path: str) -> Axis | None:
    """The axis of the stages that have a copy of the parameter of this path; None: only one stage has it."""
    if model.topology.pp.size > 1:
        if path.startswith("prefix."):
            return model.topology.pp
        if path == "embed_tokens.weight" and model.tied is not None:
            return model.tied
    return None
