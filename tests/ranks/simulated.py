"""Many ranks in one process, for tests and tables of what a run costs at 1,024 ranks: the product's code, no processes.

    network = Network(1024, per_machine=8)
    groups = [network.groups(rank) for rank in range(1024)]     # in place of distributed.collectives.Gloo
    watch_minute(network)                                       # a minute of distributed.watchdog.Watchdog

Each rank is a TreeNode; messages are handed over in memory and counted. `clock` of a rank counts messages one after
another: a rank handles one at a time, and a message is handled after it was sent. So the largest clock is how many
messages the slowest rank has to wait for.
"""

import functools
import json
import threading
import types
from collections import Counter, deque

import distributed.watchdog
from distributed.tree import TreeNode, tree_parents


class Network:
    """Nodes of the tree, with counters of messages and bytes by sender."""

    def __init__(self, world, per_machine=8):
        self.world, self.lock, self.queue, self.time = world, threading.RLock(), deque(), 0.0
        self.parents = tree_parents([f"host{rank // per_machine}" for rank in range(world)])
        self.nodes = [
            TreeNode(rank, self.parents, functools.partial(self._send, rank), lambda: self.time)
            for rank in range(world)
        ]
        self.reset()

    def reset(self):
        self.messages, self.bytes, self.clock = Counter(), Counter(), [0] * self.world

    def _send(self, sender, to, message):
        self.messages[sender] += 1
        self.bytes[sender] += len(json.dumps(message))
        self.queue.append((sender, to, message, self.clock[sender]))

    def deliver(self):
        while self.queue:
            sender, to, message, sent = self.queue.popleft()
            self.clock[to] = max(self.clock[to], sent) + 1
            self.nodes[to].receive(sender, message)

    def groups(self, rank):
        numbers = Counter()

        def gather(value, kind="all", channel="main"):
            with self.lock:
                numbers[channel] += 1
                pending = self.nodes[rank].contribute(f"{channel} {numbers[channel]}", value, kind)
                self.deliver()
            pending.event.wait()  # not in pieces: a thousand threads wait
            return pending.value

        watchdog = types.SimpleNamespace(moved=lambda: None, gather=gather)
        return types.SimpleNamespace(
            all_gather_object=gather, barrier=lambda: gather(None, "first"), watchdog=watchdog, launch=None
        )

    @property
    def depth(self):
        """Of the tree."""

        def of(rank):
            return 0 if self.parents[rank] is None else 1 + of(self.parents[rank])

        return max(map(of, range(self.world)))


def watch_minute(network, limit=600.0, seconds=60, stopped=()):
    """The watchdog's ticks of every rank but the stopped ones for so many seconds; counters are in the network
    afterwards."""
    clock, real = types.SimpleNamespace(now=0.0), distributed.watchdog.time
    network.time = 0.0
    distributed.watchdog.time = types.SimpleNamespace(monotonic=lambda: clock.now)
    try:
        dogs = []
        for rank, node in enumerate(network.nodes):
            dog = object.__new__(distributed.watchdog.Watchdog)
            dog.launch = distributed.watchdog.Launch(rank, network.world, ())
            dog.limit, dog.since, dog.launcher_pid, dog.told, dog.progressed = limit, {}, None, {}, 0.0
            dog.last_tick = dog.last_beat = dog.last_suspicion = dog.resumed = 0.0
            dog.stack, dog.place, dog._look = None, "", lambda: None
            dog.links = types.SimpleNamespace(node=node)
            node.heard = dict.fromkeys(node.neighbors, 0.0)
            node.on_report, node.status = dog._judge, dog._status
            dogs.append(dog)
        network.reset()
        for second in range(1, seconds + 1):
            clock.now = network.time = float(second)
            for rank, dog in enumerate(dogs):
                if rank not in stopped:
                    dog._tick()
            network.deliver()
    finally:
        distributed.watchdog.time = real
    return dogs
