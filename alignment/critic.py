"""The critic of PPO as a model of its own: a trunk with a score head, which learns the values of the policy's tokens.

    critic = Critic(args, tokenizer, topology)      # from critic_model_name_or_path
    critic.join(run, checkpoint)                    # checkpoints hold it from then on
    values = critic.values(batch)                   # (M,) before the updates of a rollout
    metrics = critic.update(batches, step, total)   # on the micro-batches of the policy's update
    critic.finish(best)                             # writes output_dir/value

It has its own optimizer, and its own schedule where a critic_… key gives one. With lora: true it trains LoRA and the
head. What it writes is a reward model's folder. Without such a model the values are a head on the policy; see rl.py.
"""

import collections
import dataclasses
import functools
from pathlib import Path

import kernels

import paddle
from paddle import Tensor

import trainer
from adapters import cast_frozen_to_bf16, lora_layers, trainable_weights
from alignment import rl_math
from alignment.groups import counts_of
from alignment.heads import ScoreModel, check_same_tokenizer, load_reward_model, train_score_head
from checkpoint import CheckpointManager
from distributed.sharding import ZeroOptimizer
from formats.files import UserError
from formats.tokenizer import Tokenizer
from formats.weights import SaveEntry, stored_tensors
from parallel import Topology, forward_backward, shard_adapters

OWN_KEYS = "learning_rate weight_decay lr_scheduler_type warmup_ratio min_learning_rate decay_steps recompute".split()


def critic_args(args: object) -> object:
    """The policy's arguments with those of the critic in their place, where critic_… keys give them."""
    given = {key: getattr(args, f"critic_{key}") for key in OWN_KEYS}
    changes = {key: value for key, value in given.items() if value is not None}
    if "warmup_ratio" in changes:
        changes["warmup_steps"] = 0  # which would win over it
    return dataclasses.replace(args, model_name_or_path=args.critic_model_name_or_path, lora_path=None, **changes)


def value_losses_and_metrics(
    values: Tensor, batch: dict, counts: rl_math.Counts, args: object
) -> tuple[Tensor, dict[str, float]]:
    """value_loss_coeff · rl_math.value_losses() of a micro-batch's tokens (M,), and its part of VALUE_METRICS."""
    old, returns = (paddle.to_tensor(batch[name]) for name in ("values", "returns"))
    losses, clipped = rl_math.value_losses(values.astype("float64"), old, returns, args.clip_range_value)
    sums = {"value_loss": losses, "value_clip_ratio": clipped}
    return args.value_loss_coeff * losses, {name: float(x.sum()) / max(1, counts.tokens) for name, x in sums.items()}


class Critic:
    """A model of values, its optimizer and its part of checkpoints."""

    def __init__(self, args: object, tokenizer: Tokenizer, topology: Topology):
        self.args, self.tokenizer, self.topology = critic_args(args), tokenizer, topology
        key, path = "critic_model_name_or_path", args.critic_model_name_or_path
        check_same_tokenizer(key, path, tokenizer)
        network = load_reward_model(path, topology, seed=args.seed)
        trainer.check_shared_prompts(network, path, key, 0, ("rope_2d",))
        network.config.source.setdefault("pad_token_id", tokenizer.pad_token_id)
        trainer.set_recompute(network, self.args)
        trainer.setup_adapter(network, self.args)
        for layer in lora_layers(network).values():
            layer.dropout = 0.0
        train_score_head(network)
        shard_adapters(network, topology)
        if kernels.bf16:
            cast_frozen_to_bf16(network)
        self.network, self.model = network, ScoreModel(network)
        self.shards = ZeroOptimizer(network, trainable_weights(network), topology)
        self.optimizer = trainer.AdamW(self.shards.pieces, self.args)

    def join(self, run: trainer.Run, checkpoint: Path | None) -> None:
        """Let the checkpoints of a run hold the critic, and go on from one of them."""
        run.checkpoints.further.append(self)
        if checkpoint is not None:
            self._read(checkpoint)
            if not self.args.ignore_load_lr_and_optim:
                moments = stored_tensors(checkpoint, ("value_optimizer.safetensors",), trust_index=True)
                self.optimizer.load(moments, self.shards)
                self.optimizer.steps = run.optimizer.steps

    def _read(self, checkpoint):
        found = stored_tensors(checkpoint, ("value.safetensors",), trust_index=True)
        for weight in self.shards.weights:
            if weight.name not in found:
                raise UserError(f"critic_model_name_or_path: {checkpoint} holds no critic with {weight.name}")
            weight.set(weight.read(found[weight.name].read))

    def groups(self) -> dict[str, list[SaveEntry]]:
        """What a checkpoint holds of it, see SavePlan: the weights that are trained, and their moments."""
        groups = {"value": [SaveEntry.of(weight) for weight in self.shards.weights]}
        if not self.args.ignore_save_lr_and_optim:
            groups["value_optimizer"] = self.optimizer.entries(self.shards)
        return groups

    def values(self, batch: dict) -> Tensor:
        """(M,) of the tokens of a batch."""
        with trainer.eval_mode(self.network):
            return self._of_tokens(self.model(**trainer.model_inputs(batch)), batch)

    @staticmethod
    def _of_tokens(scores, batch):
        here = paddle.to_tensor((batch["labels"] != -100).flatten().nonzero()[0])
        return paddle.gather(scores.flatten(), here)

    def update(self, batches: list[dict], step: int, total: int) -> dict[str, float]:
        """One update on these micro-batches; returns this rank's part of VALUE_METRICS."""
        args, metrics = self.args, collections.Counter()
        counts = rl_math.Counts(*self.topology.all_reduce_sum(counts_of(batches)))

        def loss_of(scores, batch):
            losses, sums = value_losses_and_metrics(self._of_tokens(scores, batch), batch, counts, args)
            if not batch.get("is_dummy"):
                metrics.update(sums)
            tokens = batch["segments"], batch["reply_tokens"]
            return rl_math.mean_loss(losses, *tokens, args.loss_type, counts, args.max_dec_len)

        self.network.train()
        seed = functools.partial(trainer.seed_step, args.seed, step)
        for part, batch in forward_backward(self.model, batches, trainer.model_inputs, loss_of, seed):
            trainer.check_finite(part, args.output_dir, step, batch)
        grad_norm = self.shards.reduce_gradients()
        trainer.check_finite(grad_norm, args.output_dir, step, batches[-1])
        rate = trainer.learning_rate(step, args, total)
        self.optimizer.step(rate, trainer.clip_scale(grad_norm, args.max_grad_norm))
        self.shards.gather_weights()
        self.optimizer.zero_grad()
        return dict(metrics)

    def finish(self, best: Path | None) -> None:
        """Write the critic to output_dir/value, as it was in the checkpoint that is the best, if there is one."""
        if best is not None:
            self._read(best)
        writer = CheckpointManager(self.args, self.network, self.tokenizer, shards=self.shards, topology=self.topology)
        writer.write_model(Path(self.args.output_dir) / "value", self.args.save_dtype)
