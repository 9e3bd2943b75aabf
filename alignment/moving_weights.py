"""A second set of the trained weights, which follows them: rl.py's average and dpo.py's reference.

    average = MovingAverage(run, args, checkpoint)  # of setup_training(); does nothing without use_ema
    average.follow()                                # after each update
    with average.in_place(): evaluate()             # inside, the model has the averaged weights
    average.stay()                                  # for good, before the model is written

    reference = MovingReference(run, model, args, checkpoint)
    reference.follow(state.step)                    # the update that is due, if any
    with reference.in_place(): ...                  # inside, the model is the reference

There is one model: the second set takes the place of the first for a while. It is sharded as the optimizer's moments
are, and checkpoints hold it beside the weights that training goes on from.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import paddle

import trainer
from adapters import adapter_disabled
from formats.files import UserError
from formats.weights import SaveEntry, SaveSource, stored_tensors
from model import CausalLM
from trainer import Run


class MovingWeights:
    """A copy of all trained weights; with sharding, each rank has the elements which it updates.

    name: of its files in a checkpoint. key: the argument that asks for it. is_used: False: it holds nothing.
    """

    def __init__(self, run: Run, name: str, key: str, checkpoint: Path | None, is_used: bool = True):
        self.shards, self.name, self.key = run.shards, name, key
        self.pieces = run.shards.pieces if is_used else []
        self.tensors = {piece.name: piece.tensor.detach().clone() for piece in self.pieces}
        if is_used:
            run.checkpoints.further.append(self)
            if checkpoint is not None:
                self.read(checkpoint)

    def read(self, checkpoint: Path) -> None:
        """Take what a checkpoint holds."""
        is_there = any(checkpoint.glob(f"{self.name}*.safetensors"))
        found = stored_tensors(checkpoint, (f"{self.name}.safetensors",), trust_index=True) if is_there else {}
        for weight in self.shards.weights:
            if weight.name not in found:
                raise UserError(
                    f"{self.key}: {checkpoint} holds no {self.name} of {weight.name}; it was saved without {self.key}"
                )
            if weight.name in self.tensors:
                array = weight.read(found[weight.name].read, self.shards.extent(weight))
                self.tensors[weight.name].set_value(array)

    def groups(self) -> dict[str, list[SaveEntry]]:
        """What a checkpoint holds of it, see SavePlan; every rank that has a weight names it."""
        entries = []
        for weight in self.shards.weights:
            tensor = self.shards.laid(weight, self.tensors.get(weight.name))
            source = SaveSource(weight, tensor, *self.shards.place_of(weight))
            entries.append(SaveEntry({weight.name: (weight.shape, "float32")}, [source]))
        return {self.name: entries}

    @paddle.no_grad()
    def move(self, share: float) -> None:
        """Go this share of the way to the weights as they are now; 1: become equal to them, bit for bit."""
        for piece in self.pieces:
            ours, theirs = self.tensors[piece.name], piece.tensor.detach()
            if share == 1:
                ours.copy_(theirs, True)
            else:
                ours.lerp_(theirs, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the second set of weights inside, and the trained ones after it."""
        self.exchange()
        yield
        self.exchange()

    @paddle.no_grad()
    def exchange(self) -> None:
        for piece in self.pieces:
            ours, trained = self.tensors[piece.name], piece.tensor.detach()
            kept = trained.clone()
            trained.copy_(ours, True)
            ours.copy_(kept, True)
        if self.pieces:
            self.shards.gather_weights()


class MovingAverage(MovingWeights):
    """average = beta · average + (1 - beta) · weights after each update, from the weights at the start on: the
    averaging of Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992, with an exponential
    window."""

    def __init__(self, run: Run, args: object, checkpoint: Path | None = None):
        super().__init__(run, "ema", "use_ema", checkpoint, args.use_ema)
        self.beta = args.ema_beta

    def follow(self) -> None:
        """Take one step towards the weights as they are now."""
        self.move(1 - self.beta)

    def stay(self, best: Path | None = None) -> None:
        """Give the model the average for good. best: the checkpoint that was loaded as the best; None: none."""
        if self.pieces and best is not None:
            self.read(best)
        self.exchange()


class MovingReference(MovingWeights):
    """Every ref_model_update_steps steps the reference's weights become α times the policy's plus (1 - α) times their
    own, α: ref_model_mixup_alpha. TR-DPO, Gorbatovski et al., arXiv 2404.09656: soft updates, and hard ones with α = 1.

    Of an adapter, only hard ones: its reference is the model without it, and after the first update a copy of it.
    """

    def __init__(self, run: Run, model: CausalLM, args: object, checkpoint: Path | None = None):
        super().__init__(run, "reference", "ref_model_update_steps", checkpoint)
        self.model, self.is_adapter = model, trainer.trains_adapter(args)
        self.every, self.alpha = args.ref_model_update_steps, args.ref_model_mixup_alpha
        self.updates = max(0, run.state.step - 1) // self.every  # a checkpoint is saved before the update of its step

    def follow(self, step: int) -> None:
        """Do the update that is due after `step` steps, once."""
        if step // self.every > self.updates:
            self.updates = step // self.every
            self.move(self.alpha)

    def in_place(self) -> contextlib.AbstractContextManager:
        """The model is the reference inside, and the policy after it."""
        return adapter_disabled(self.model) if self.is_adapter and not self.updates else super().in_place()
