"""Measures in two seconds what cost_model.py needs of the machine: products, copies, attention, collectives.

    machine = probe(topology)    # a Machine; under the launcher all ranks call it, and collectives are measured too

Each figure is the fastest of as many runs as its share of the time allows.
"""

import math
import os
import statistics
import time
from collections.abc import Callable

import kernels

import paddle

from parallel import SINGLE, Topology
from planning.cost_model import Machine

SHAPES = ((512, 512, 2048), (1024, 1024, 1024), (2048, 512, 512))  # (M, K, N) of products
SIZES = (1 << 12, 1 << 20)  # bytes of the tensors of collectives
ON_ONE_MACHINE = 1 << 20  # ranks a node: all


def _fastest(function: Callable, seconds: float, least: int = 2) -> float:
    """Seconds of the fastest call."""
    best, end, calls = math.inf, time.perf_counter() + seconds, 0
    while calls < least or time.perf_counter() < end:
        begin = time.perf_counter()
        function()
        best, calls = min(best, time.perf_counter() - begin), calls + 1
    return best


def _wait(x: paddle.Tensor) -> None:
    """Until the device has computed it."""
    x.reshape([-1])[:1].numpy()


@paddle.no_grad()
def probe(topology: Topology = SINGLE, seconds: float = 2.0) -> Machine:
    """The Machine that this process runs on. What one process cannot measure, the links between ranks, is assumed."""
    share, world = seconds / 8, topology.degrees.world
    is_cpu = paddle.device.get_device().startswith("cpu")
    rates = []
    for M, K, N in SHAPES:
        x, weight = paddle.rand([M, K]), paddle.rand([K, N])
        rates.append(2 * M * K * N / _fastest(lambda x=x, weight=weight: _wait(kernels.linear(x, weight)), share))
    B, T, H, Dh = 1, 512, 8, 64
    q, k, v = (paddle.rand([B, T, H, Dh]) for _ in range(3))
    attention = 4 * B * T * T / 2 * H * Dh / _fastest(lambda: _wait(kernels.attention(q, k, v)), share)
    data = paddle.rand([1 << 22])  # 16 MB: beyond the caches
    copied = 2 * data.size * 4 / _fastest(lambda: _wait(paddle.assign(data)), share)
    one = paddle.ones([1])
    launch = _fastest(lambda: one + one, share / 4)
    peak = max(rates)
    efficiency = math.exp(sum(math.log(rate / peak) for rate in rates) / len(rates))
    latency, bandwidth = 50e-6 if is_cpu else 6e-6, copied / 4  # assumed
    measured = _collectives(topology) if world > 1 else None
    if measured:
        latency, bandwidth = measured["all_reduce"]
    return Machine(
        peak_flops=peak,
        memory_bandwidth=copied,
        ranks_per_node=ON_ONE_MACHINE,
        node_bandwidth=bandwidth,
        network_bandwidth=bandwidth,
        efficiency=efficiency,
        attention_efficiency=min(1.0, attention / peak),
        node_latency=latency,
        network_latency=latency,
        launch=launch,
        measured=measured,
        overlaps=not is_cpu,
        shares_cores=is_cpu and world == 1,
        product_bytes=2 if kernels.bf16 else 4,
    )


def _collectives(topology):
    """{collective: (α, β)} between all ranks, by the formulas of Machine, from a small and a large tensor.

    The median of a few: in training too, ranks wait for the one that comes last.
    """
    axis = max(topology.axes, key=lambda axis: axis.size)
    n = axis.size
    # {name: (function of x (n, …), times α, times S/β; S: bytes of x, of what all gather, of a message)}
    shapes = {
        "all_reduce": (axis.all_reduce, 2 * math.ceil(math.log2(n)), 2 * (n - 1) / n),
        "all_gather": (axis.all_gather, n - 1, n - 1),
        "all_to_all": (axis.all_to_all, n - 1, (n - 1) / n),
        "ring_shift": (axis.ring_shift, 1, 1),
    }
    found = {}
    for name, (function, hops, share) in shapes.items():
        seconds = []
        for size in SIZES:
            x, times = paddle.ones([n, size // n // 4]), []
            for _ in range(9):  # as many on every rank; the first one connects
                begin = time.perf_counter()
                _wait(function(x))
                times.append(time.perf_counter() - begin)
            seconds.append(statistics.median(times[1:]))
        small, large = seconds
        found[name] = small / hops, share * (SIZES[1] - SIZES[0]) / max(1e-9, large - small)
    return found


def memory_here(world: int) -> float:
    """Bytes that each of `world` ranks here may take."""
    if not paddle.device.get_device().startswith("cpu"):
        return float(paddle.device.cuda.get_device_properties().total_memory)
    return 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world
