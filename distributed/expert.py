"""Expert parallelism: experts sharded over ranks that have other tokens, which go there and back by all-to-all."""

import numpy as np
import paddle

from distributed.collectives import Axis, _AllToAllV, recast
from families import FAMILIES
from model import CausalLM, MoE


def is_expert_sharded(path: str, topology: object) -> bool:
    """Whether the parameter of this path belongs to an expert that other ranks of topology.ep do not have."""
    return topology.ep.size > 1 and ".mlp.experts." in path


def local_experts(count: int, ep: Axis) -> range:
    """Which of `count` experts this rank of ep has."""
    each = count // ep.size
    return range(ep.rank * each, (ep.rank + 1) * each)


class ExpertParallelMoE(MoE):
    """A MoE with only this rank's experts, or one whose tokens are sharded over sep."""

    @classmethod
    def from_moe(cls, moe: MoE, ep: Axis) -> "ExpertParallelMoE":
        layer = recast(moe, cls)
        layer.ep = ep
        for e in set(range(moe.moe.num_experts)) - set(local_experts(moe.moe.num_experts, ep)):
            del layer.experts._sub_layers[str(e)]
        return layer

    def dispatch_and_combine(self, flat, weights, chosen, layout=None) -> paddle.Tensor:
        """As in MoE. Padding tokens of a rank of sep go to no expert: one that no token chose has no gradient."""
        real = np.ones(1, bool) if layout is None else layout.is_real
        if real.all() or not real.any():  # an operation on no rows at all is not worth its trouble
            return super().dispatch_and_combine(flat, weights, chosen)
        N, D = flat.shape
        rows = np.flatnonzero(np.tile(real, N // len(real)))
        index = paddle.to_tensor(rows)
        y = super().dispatch_and_combine(*(paddle.index_select(x, index) for x in (flat, weights, chosen)))
        source = np.full(N, len(rows))  # padding takes the row of zeros behind the others
        source[rows] = np.arange(len(rows))
        return paddle.index_select(paddle.concat([y, paddle.zeros([1, D], y.dtype)]), paddle.to_tensor(source))

    def run_experts(self, tokens, counts) -> paddle.Tensor:
        ep = self.ep
        if ep.size == 1:
            return super().run_experts(tokens, counts)
        if paddle.is_grad_enabled() and tokens.stop_gradient:
            tokens = tokens.clone()
            tokens.stop_gradient = False  # every rank takes part in the all-to-all of backward, whatever it trains
        counts = ep.all_gather(paddle.to_tensor(counts.astype(np.int64)).unsqueeze(0)).numpy()
        counts = counts.reshape([ep.size, ep.size, -1])  # (from, to, expert)
        sent, received = counts.sum(-1), counts[:, ep.rank]  # (from, to), (from, expert)
        tokens = _AllToAllV.apply(tokens, ep, sent)
        if received.any():
            order = _order_by_expert(received)
            y = super().run_experts(paddle.index_select(tokens, paddle.to_tensor(order)), received.sum(0))
            tokens = paddle.index_select(y, paddle.to_tensor(np.argsort(order)))
        return _AllToAllV.apply(tokens, ep, sent.T)


def _order_by_expert(counts):
    """(from, expert) counts of rows that stand rank by rank -> the indices of these rows, expert by expert."""
    ends = counts.flatten().cumsum().reshape(counts.shape)
    return np.concatenate([np.arange(end - n, end) for end, n in zip(ends.T.flat, counts.T.flat)])


def apply_expert_parallel(model: CausalLM, topology: object) -> None:
    """Keep only this rank's experts. Those of other ranks take no memory and are not read."""
    ep, config = topology.ep, model.config
    if config.experts is None or ep.size == topology.sep.size == 1:
        return
    for block in model.layers:
        if isinstance(getattr(block, "mlp", None), MoE):
            block.mlp = ExpertParallelMoE.from_moe(block.mlp, ep)
    rows = [row for row in FAMILIES[config.family].names if "{e}" in row[0]]
    here = local_experts(config.experts.num_experts, ep)
    on_other_ranks = {
        theirs.format(i=i, e=e)
        for _, theirs, _ in rows
        for i in range(config.num_hidden_layers)
        for e in range(config.experts.num_experts)
        if e not in here
    }
    model.names_on_other_ranks = model.names_on_other_ranks | on_other_ranks
