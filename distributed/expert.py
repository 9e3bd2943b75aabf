"""Expert parallelism: experts sharded over ranks that have other tokens."""

from collections import namedtuple

import numpy as np
import paddle

from distributed.collectives import _AllToAllV, mix_in
from families import FAMILIES
from model import MoE


def is_expert_sharded(path, topology):
    """Whether the parameter of this path is one of an expert that other ranks of topology.ep do not have."""
    return topology.ep.size > 1 and ".mlp.experts." in path


def local_experts(config, ep, rank=None):
    """range of the experts that a rank (this one) of ep has."""
    each, rank = config.experts.count // ep.size, ep.rank if rank is None else rank
    return range(rank * each, (rank + 1) * each)


class ExpertTokens(namedtuple("ExpertTokens", "number count places whole")):
    """Tokens of one rank at an expert: the number of that rank's RNGTracker, how many, and, where that rank has some tokens of
    its rows alone (sep), their places among the `whole` tokens of all of these rows at this expert."""


class ExpertParallelMoE:
    """A MoE that has the experts of its rank of ep alone: tokens are sent to where their experts are, and back."""

    dropout = False  # whether the experts' adapters have any, on any rank

    def mix(self, flat, weights, chosen):
        """Where ranks of sep have some tokens of each row, those of one row are known to be so at each expert, for dropout;
        and what fills rows up goes to no expert: one that no token chose has no gradient."""
        self.places, self.wholes, sep = None, None, self.topology.sep
        if self.training and self.dropout and sep.places is not None:
            self.places, self.wholes = self._places(chosen)
        real = np.ones(1, bool) if sep.places is None else sep.places < sep.whole
        if real.all() or not real.any():  # (an operation on no rows at all is not worth its trouble)
            return super().mix(flat, weights, chosen)
        N, D = flat.shape
        rows = np.flatnonzero(np.tile(real, N // len(real)))
        if self.places is not None:
            self.places = self.places[self.places >= 0]
        index = paddle.to_tensor(rows)
        mixed = super().mix(*(paddle.index_select(x, index) for x in (flat, weights, chosen)))
        back = np.full(N, len(rows))
        back[rows] = np.arange(len(rows))
        return paddle.index_select(paddle.concat([mixed, paddle.zeros([1, D], mixed.dtype)]), paddle.to_tensor(back))

    def _places(self, chosen):
        """(N, k) -> for each choice, expert by expert, its place among all choices of this expert (-1: it is of no token),
        as one process would have them; and how many there are of each expert."""
        sep, E, k = self.topology.sep, self.how.count, chosen.shape[-1]
        mine = chosen.reshape([-1, len(sep.places), k])  # (B, T/sep, k)
        everyone = sep.all_gather(mine.unsqueeze(0)).numpy()
        places = sep.all_gather(paddle.to_tensor(sep.places).unsqueeze(0)).numpy()
        whole = np.full([mine.shape[0], sep.whole + 1, k], E)
        for ids, of_rank in zip(everyone, places):
            whole[:, np.minimum(of_rank, sep.whole)] = ids
        whole[:, sep.whole] = E  # tokens that fill rows up
        ids, found = whole.flatten(), np.empty(whole.size, np.int64)
        order, counts = np.argsort(ids, kind="stable"), np.bincount(ids, minlength=E + 1)
        found[order] = np.arange(ids.size) - np.repeat(counts.cumsum() - counts, counts)
        found[ids == E] = -1
        found = found.reshape(whole.shape)[:, np.minimum(sep.places, sep.whole)].flatten()
        return found[np.argsort(chosen.numpy().flatten(), kind="stable")], counts[:E]

    def outputs(self, tokens, counts):
        ep = self.topology.ep
        if paddle.is_grad_enabled() and tokens.stop_gradient:
            tokens = tokens.clone()
            tokens.stop_gradient = False  # every rank goes back through the exchange, whatever of its own is trained
        wholes = np.zeros_like(counts) if self.wholes is None else self.wholes
        told = paddle.to_tensor(np.concatenate([counts, wholes, [self.draws.number]]).astype(np.int64)).unsqueeze(0)
        told = ep.all_gather(told).numpy()  # (ep, 2 E + 1)
        numbers, told = told[:, -1], told[:, :-1].reshape([ep.size, 2, ep.size, -1])
        counts, wholes = told[:, 0], told[:, 1, ep.rank]  # (from, to, expert), (from, expert)
        sent, here = counts.sum(-1), counts[:, ep.rank]  # (from, to), (from, expert)
        tokens, places = _AllToAllV.apply(tokens, ep, sent), None
        if self.places is not None:
            places = ep.all_to_all_v(paddle.to_tensor(self.places).unsqueeze(-1), sent).numpy().flatten()
        if here.any():
            runs = _runs(here)
            order = np.concatenate([np.arange(first, last) for first, last in runs])  # rank by rank -> expert by expert
            pieces = [
                ExpertTokens(
                    int(numbers[i % ep.size]),
                    last - first,
                    None if places is None else places[first:last],
                    int(wholes.T.flat[i]),
                )
                for i, (first, last) in enumerate(runs)
            ]
            mixed = self._by_expert(paddle.index_select(tokens, paddle.to_tensor(order)), here.sum(0), pieces)
            tokens = paddle.index_select(mixed, paddle.to_tensor(np.argsort(order)))
        return _AllToAllV.apply(tokens, ep, sent.T)

    def _by_expert(self, tokens, counts, pieces):
        """(n, D), one expert's tokens behind another's -> what this rank's experts make of them."""
        ep, parts, found = self.topology.ep, paddle.split(tokens, [int(n) for n in counts if n]), []
        experts = list(self.experts)
        for e in np.flatnonzero(counts):
            ep.pieces = pieces[e * ep.size : (e + 1) * ep.size]
            found.append(experts[e](parts[len(found)]))
        return paddle.concat(found)


def _runs(here):
    """(from, expert) counts of rows that stand rank by rank -> (start, stop) of each run, expert by expert."""
    ends = here.flatten().cumsum().reshape(here.shape)
    return [(int(end - n), int(end)) for end, n in zip(ends.T.flat, here.T.flat)]


def apply_expert_parallel(model, topology):
    """Leave this rank its experts. What is elsewhere takes no memory and is not read."""
    ep, config = topology.ep, model.config
    if config.experts is None or ep.size == topology.sep.size == 1:
        return
    mine = local_experts(config, ep)
    for layer in model.sublayers():
        if isinstance(layer, MoE):
            for e in set(range(config.experts.count)) - set(mine):
                del layer.experts._sub_layers[str(e)]
            mix_in(layer, ExpertParallelMoE, topology=topology, draws=model.draws)
    rows = [row for row in FAMILIES[config.family].names if "{e}" in row[0]]
    elsewhere = {
        theirs.format(i=i, e=e)
        for _, theirs, _ in rows
        for i in range(config.num_hidden_layers)
        for e in range(config.experts.count)
        if e not in mine
    }
    model.names_on_other_ranks = model.names_on_other_ranks | elsewhere
