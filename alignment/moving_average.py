"""An exponential moving average of the trained weights, which is evaluated and written in their place.

    average = MovingAverage(run, args, checkpoint)  # of setup_training(); does nothing without use_ema
    average.follow()                                # after each update
    with average.in_place(): evaluate()             # inside, the model has the averaged weights
    average.stay()                                  # for good, before the model is written

average = beta · average + (1 - beta) · weights after each update, from the weights at the start on: the averaging of
Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992, with an exponential window.
Checkpoints hold it as ema*.safetensors beside the weights that training goes on from.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import paddle

from formats.files import UserError
from formats.weights import SaveEntry, SaveSource, stored_tensors
from trainer import Run


class MovingAverage:
    """The average of all trained weights; with sharding, each rank has that of the elements which it updates."""

    def __init__(self, run: Run, args: object, checkpoint: Path | None = None):
        self.shards, self.beta, self.args = run.shards, args.ema_beta, args
        self.pieces = run.shards.pieces if args.use_ema else []
        self.averages = {piece.name: piece.tensor.detach().clone() for piece in self.pieces}
        if args.use_ema:
            run.checkpoints.further.append(self)
            if checkpoint is not None:
                self._read(checkpoint)

    def _read(self, checkpoint):
        found = stored_tensors(checkpoint, ("ema.safetensors",), trust_index=True)
        for weight in self.shards.weights:
            if weight.name not in found:
                raise UserError(
                    f"use_ema: {checkpoint} holds no average of {weight.name}; it was saved without use_ema"
                )
            if weight.name in self.averages:
                array = weight.read(found[weight.name].read, self.shards.extent(weight))
                self.averages[weight.name].set_value(array)

    def groups(self) -> dict[str, list[SaveEntry]]:
        """What a checkpoint holds of it, see SavePlan; every rank that has a weight names it."""
        entries = []
        for weight in self.shards.weights:
            tensor = self.shards.laid(weight, self.averages.get(weight.name))
            source = SaveSource(weight, tensor, *self.shards.place_of(weight))
            entries.append(SaveEntry({weight.name: (weight.shape, "float32")}, [source]))
        return {"ema": entries}

    @paddle.no_grad()
    def follow(self) -> None:
        """Take one step towards the weights as they are now."""
        for piece in self.pieces:
            self.averages[piece.name].lerp_(piece.tensor.detach(), 1 - self.beta)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside, and the trained ones after it."""
        self._exchange()
        yield
        self._exchange()

    def stay(self, best: Path | None = None) -> None:
        """Give the model the average for good. best: the checkpoint that was loaded as the best; None: none."""
        if self.pieces and best is not None:
            self._read(best)
        self._exchange()

    @paddle.no_grad()
    def _exchange(self):
        for piece in self.pieces:
            average, trained = self.averages[piece.name], piece.tensor.detach()
            kept = trained.clone()
            trained.copy_(average, True)
            average.copy_(kept, True)
        if self.pieces:
            self.shards.gather_weights()
