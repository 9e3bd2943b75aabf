"""Rounding learned by gradients (Cheng et al., arXiv 2309.05516): signed steps on the output of one block at a time.

A weight W (in, out) becomes s q, q = clip(round(W / s + V) + z, 0, 2^bits - 1) - z. V (in, out), between -0.5 and 0.5,
chooses up or down; the ends of each group's range, -z s and (2^bits - 1 - z) s, are multiplied by factors that are
learned too. The gradient passes round() as if it were not there, and a step moves every value by the learning rate, up
or down. Where |W / s + V| is clipped, V does not matter. Steps start from the ranges of awq.clip().
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import kernels
from kernels.rounding import QuantizedWeight, stored_scale

import numpy as np
import paddle
from paddle import nn

from arguments import ScriptArgs
from model import Linear
from quantization.awq import clip
from quantization.calibration import Calibration, LinearRef, real_rows


class RoundedLinear(nn.Layer):
    """Stands in for a linear while its rounding is learned; start: the grid to begin with, whose codes do not count.

    The arithmetic on weights is numpy's, group by group, in arrays that fit into a core's cache."""

    def __init__(self, layer: Linear, start: QuantizedWeight, bits: int):
        super().__init__()
        self.layer, self.groups, self.top = layer, start.groups, 2**bits - 1
        self.W, (self.n_in, self.n_out) = layer.weight.numpy(), layer.weight.shape
        zeros = start.zeros.astype(np.float32)
        self.symmetric = bool((start.zeros == 2 ** (bits - 1)).all())
        self.first_ends = np.stack([-zeros, self.top - zeros]) * start.scales  # (2, groups, out)
        self.factors, self.V = np.ones_like(self.first_ends), np.zeros_like(self.W)
        self.rounded = None  # (in, out), what forward() multiplies by

    def grid(self) -> tuple:
        """(scale, zero), each (groups, out), of the ends as they are learned so far."""
        low, high = self.first_ends * self.factors
        scale = (high - low) / self.top
        return scale, np.clip(np.rint(-low / scale), 1, self.top)

    def slabs(self) -> Iterator[tuple]:
        """(group, its rows, scale, zero, W / s, round(W / s + V) + z) of one group after another."""
        size = int((self.groups == 0).sum())
        for group, (scale, zero) in enumerate(zip(*self.grid())):
            rows = slice(group * size, (group + 1) * size)
            ratio = self.W[rows] / scale
            codes = ratio + self.V[rows]
            np.rint(codes, out=codes)
            codes += zero
            yield group, rows, scale, zero, ratio, codes

    def rounded_weight(self) -> np.ndarray:
        """(in, out), as it is learned so far."""
        rounded = np.empty_like(self.W)
        for _, rows, scale, zero, _, codes in self.slabs():
            np.clip(codes, 0, self.top, out=codes)
            codes -= zero
            np.multiply(codes, scale, out=rounded[rows])
        return rounded

    def forward(self, x, residual=None):
        return kernels.linear(x, self.rounded, self.layer.bias, residual)

    def use(self, rounded: np.ndarray) -> None:
        """Multiply by this weight from now on, and learn from its gradient."""
        self.rounded = paddle.to_tensor(rounded, stop_gradient=False)

    def gradients(self) -> Iterator[tuple]:
        """(group, its rows, gradient of V (rows, out), of the factors (2, out)) from that of the rounded weight."""
        weight_gradient = self.rounded.grad.numpy()
        for group, rows, scale, zero, ratio, codes in self.slabs():
            gradient = weight_gradient[rows]
            kept = gradient * ((codes >= 0) & (codes <= self.top))
            np.clip(codes, 0, self.top, out=codes)
            codes -= zero
            of_scale = np.einsum("io,io->o", gradient, codes) - np.einsum("io,io->o", kept, ratio)
            of_zero = (kept.sum(0) - gradient.sum(0)) * scale
            first_low, first_high = self.first_ends[:, group]
            bent = first_low * self.factors[0, group] / (scale * scale * self.top)  # dz/ds, as z = -low / s
            of_low = first_low * (-of_scale / self.top - of_zero * (1 / scale + bent))
            of_high = first_high * (of_scale / self.top + of_zero * bent)
            if self.symmetric:  # one factor for both ends: the zero point stays
                of_low = of_high = of_low + of_high
            kept *= scale
            yield group, rows, kept, np.stack([of_low, of_high])

    def step(self, rate: float) -> np.ndarray:
        """A signed step of V and of the factors against the gradient; returns rounded_weight() after it."""
        for group, rows, of_v, of_factors in self.gradients():
            own, ends = self.V[rows], self.factors[:, group]
            np.sign(of_v, out=of_v)
            of_v *= rate
            own -= of_v
            np.clip(own, -0.5, 0.5, out=own)
            ends[:] = np.clip(ends - rate * np.sign(of_factors), 0.5, 1.2)
        return self.rounded_weight()

    def quantized(self) -> QuantizedWeight:
        """The codes as they are learned so far, for scales as they are stored."""
        scale, zero = self.grid()
        codes = np.concatenate([np.clip(slab[-1], 0, self.top) for slab in self.slabs()]).astype(np.uint8)
        return QuantizedWeight(codes, stored_scale(scale), zero.astype(np.int32), self.groups)


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Inside, products are in bfloat16 where the processor has it: their errors are far below those of rounding."""
    before, kernels.bf16 = kernels.bf16, kernels.bf16_missing() is None
    try:
        yield
    finally:
        kernels.bf16 = before


def block_error(block: nn.Layer, calibration: Calibration, targets: list) -> float:
    """Mean of weighted_errors() over all tokens."""
    runs = calibration.run(block)
    errors = [weighted_errors(real_rows(output(), real), targets[number]) for number, real, output in runs]
    return float(paddle.concat(errors).mean())


def weighted_errors(output: paddle.Tensor, target: paddle.Tensor) -> paddle.Tensor:
    """(tokens,): ||output - target||^2 of each token, divided by ||target|| and by the mean of that.

    Squares alone would be those of a few tokens, such as the first, whose hidden states are hundreds of times as large
    and which the next norm makes as large as others. But all tokens attend to these few, and ||target||^2 makes too
    little of them (SmolLM2, 4 bits in groups of 128: perplexity 15.08, here 14.81)."""
    size = target.square().sum(-1).sqrt()
    return (output - target).square().sum(-1) / (size * size.mean() + 1e-12)


def learn(
    block: nn.Layer, linears: list[RoundedLinear], calibration: Calibration, targets: list, args: ScriptArgs
) -> tuple[float, float]:
    """Learn the rounding of a block's linears, a calibration batch a step; block_error() before and after.

    The start is kept where the steps did not lower the error over all batches.
    """
    for linear in linears:
        linear.use(linear.rounded_weight())
    before, steps = block_error(block, calibration, targets), args.autoround_iters
    rate = args.autoround_lr or 1 / steps
    done = 0
    with paddle.enable_grad(), bfloat16_products(), ThreadPoolExecutor(os.cpu_count()) as pool:
        while done < steps:
            with contextlib.closing(calibration.run(block)) as batches:
                for number, real, output in itertools.islice(batches, steps - done):
                    weighted_errors(real_rows(output(), real), targets[number]).mean().backward()
                    learned = [linear for linear in linears if linear.rounded.grad is not None]  # experts with tokens
                    rates = [rate * (1 - done / steps)] * len(learned)
                    for linear, rounded in zip(learned, pool.map(RoundedLinear.step, learned, rates)):
                        linear.use(rounded)
                    done += 1
    after = block_error(block, calibration, targets)
    if not after < before:
        for linear in linears:
            linear.V[:], linear.factors[:] = 0, 1
    return before, min(before, after)


def learn_block(
    block: nn.Layer,
    refs: dict[str, LinearRef],
    parts: list,
    calibration: Calibration,
    targets: list[paddle.Tensor],
    args: ScriptArgs,
) -> dict[str, QuantizedWeight]:
    """{path: codes} of the linears of a block, whose floats are left in place; parts: [[LinearGroup, …], …] of it.

    targets: a batch's outputs (tokens, D). They are those of the float model, while inputs are what the quantized
    blocks before this one put out: what those lost, this one makes up for.
    """
    if not parts:  # all are left as they are
        return {}
    rounded = {}
    for parameter in block.parameters():
        parameter.stop_gradient = True
    for groups in parts:
        observed = calibration.observe(block, [refs[g.names[0]] for g in groups], keep_hessian=True)
        for group, inputs in zip(groups, observed):
            for ref in (refs[name] for name in group.names):
                weight, hessian = ref.layer.weight.numpy(), inputs.hessian
                start = clip(weight, hessian, args.bits, args.group_size, args.sym)
                rounded[ref] = RoundedLinear(ref.layer, start, args.bits)
    for ref, linear in rounded.items():
        setattr(ref.parent, ref.attribute, linear)
    learn(block, list(rounded.values()), calibration, targets, args)
    for ref, linear in rounded.items():
        setattr(ref.parent, ref.attribute, linear.layer)
    return {ref.path: linear.quantized() for ref, linear in rounded.items()}
