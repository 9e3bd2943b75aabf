"""Reward models: from pairs of replies to one prompt, learn a score that is higher for the better one.

    python reward.py configs/llama_reward.json                           # any key again as --key value
    python reward.py KEYS.json --process_reward true                     # steps of solutions, right or wrong

Reads pairs in many formats (docs/data.md), and "margin" where they have it. Prompt, chosen and rejected reply are one
sequence, several pairs are a row; a reply's score is the head's output at its last token. Trains all weights or
LoRA, and the head. Writes a folder of transformers' AutoModelForSequenceClassification with num_labels 1, or with LoRA
a PEFT adapter of task type SEQ_CLS; rl.py takes either as reward_model_name_or_path.

With process_reward a language model learns which reward token stands after each step of a solution, and is written as
a language model: alignment/process_rewards.py.
"""

import dataclasses
import functools
import math
import shlex
import time
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import numpy as np
import paddle
from paddle import Tensor

import parallel
import trainer
from adapters import lora_layers
from alignment.heads import ScoreModel, load_reward_model, scored_sample, train_score_head
from alignment.process_rewards import StepTask
from alignment.rl_math import preference_losses
from arguments import LoraArgs
from checkpoint import find_checkpoint
from data import IGNORED, PreferenceDataset, PreferenceLoader
from formats.files import UserError
from formats.record_files import RecordOptions
from formats.tokenizer import Tokenizer
from model import CausalLM
from parallel import SINGLE, Topology

METRICS = ("accuracy", "margin", "mean_reward", "std_reward")


@dataclasses.dataclass
class Args(LoraArgs):
    model_name_or_path: str = ""  # folder of the language model, or reward model, to start from; an adapter's is merged
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    train_dataset_path: str = ""  # pairs to learn: a file, a folder with train.json(l), or a blend: docs/data.md
    dev_dataset_path: str = ""  # pairs to evaluate on: a file, or a folder with dev.json(l)
    max_samples: int | None = None  # take only the first so many pairs of each source
    val_size: float | None = None  # without dev_dataset_path: hold out this share (< 1) or number of the training pairs
    columns: str | dict | None = None  # other names of a record's keys: {"chosen": "good", …}
    max_seq_len: int = 4096  # most positions of a packed row, so of a prompt and both replies
    max_prompt_len: int = 2048  # most tokens of a prompt whose pair is longer than max_seq_len
    greedy_zero_padding: bool = False  # pack by best fit over all data, instead of in order
    chat_template: str | None = None  # name in chat.FORMATS, plain, none, or a template file; None: the tokenizer's own
    center_rewards_coefficient: float = 0.0  # weight of (chosen + rejected)^2, which keeps rewards around 0
    process_reward: bool = False  # learn from labels of the steps of solutions, not from pairs
    placeholder_token: str = "ки"  # what stands after each step of a solution
    reward_tokens: str | list[str] = "+,-"  # what the model says there: the first means right

    aliases = {"regularization": "center_rewards_coefficient"}  # PaddleNLP's

    def check(self) -> list[str]:
        if self.weight_quantize_algo:
            raise UserError("weight_quantize_algo: reward.py keeps its base in float; finetune.py and dpo.py round it")
        notes = super().check()
        self.dev_dataset_path = RecordOptions.of(self).dev_path(self.train_dataset_path, self.dev_dataset_path)
        needed = {"model_name_or_path": True, "train_dataset_path": self.do_train, "dev_dataset_path": self.do_eval}
        for key, is_needed in needed.items():
            if is_needed and not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.do_predict:
            raise UserError("do_predict: there are no test pairs; evaluate other pairs by do_eval and dev_dataset_path")
        for key, low in (("max_prompt_len", 1), ("max_seq_len", 4), ("center_rewards_coefficient", 0)):
            if getattr(self, key) < low:
                raise UserError(f"{key}: {getattr(self, key)}; it must be at least {low}")
        if self.load_best_model_at_end and self.metric_for_best_model not in ("loss", "accuracy"):
            raise UserError(f"metric_for_best_model: {self.metric_for_best_model}; possible here are loss and accuracy")
        for key in ("pipeline", "context", "sep", "expert"):
            if getattr(self, f"{key}_parallel_degree") > 1:
                raise UserError(
                    f"{key}_parallel_degree: reward.py runs with data and tensor parallelism and sharding only"
                )
        if self.process_reward and self.center_rewards_coefficient:
            raise UserError("center_rewards_coefficient: rewards of steps are probabilities; it is of pairs' scores")
        if "stage3" in (self.sharding or ""):
            raise UserError("sharding: stage3 is not supported by reward.py; use stage2")
        return notes


class ScoredPairs(PreferenceDataset):
    """Pairs as one sequence whose replies end with a token that gets a score. Truncation is PreferenceDataset's."""

    def __init__(self, path: str, tokenizer: Tokenizer, max_seq_len: int, *options, share_within: float = math.inf):
        """share_within: a pair of more positions is two sequences, each with the prompt; see trainer.share_within()."""
        longer = 1 if share_within == math.inf else 2  # each sequence has one position more than data.pair_sample()'s
        super().__init__(path, tokenizer, max_seq_len - longer, *options, share_within=share_within - 1)
        sizes = np.array([len(self.sample(i)[0]) for i in range(len(self))]) if longer == 2 else self.lengths + 1
        self.lengths = sizes.astype(np.int32)

    def sample(self, i: int) -> tuple[np.ndarray, ...]:
        """Pair number -> input_ids, labels, position_ids, rows, replies of heads.scored_sample(); a label stands where
        there is a score."""
        prompt, chosen, rejected = self.pair(i)
        input_ids, position_ids, rows, replies = scored_sample(prompt, [chosen, rejected])
        if len(input_ids) - 1 > self.share_within:
            one, two = scored_sample(prompt, [chosen]), scored_sample(prompt, [rejected])
            two = (*two[:2], two[2] + len(one[0]), np.where(two[3] < 0, -1, 1))
            input_ids, position_ids, rows, replies = (np.concatenate(both) for both in zip(one, two))
        return input_ids, np.where(replies >= 0, input_ids, IGNORED), position_ids, rows, replies

    def margin(self, i: int) -> float:
        """By how much the chosen reply should score higher; 0 if the record has no "margin"."""
        margin = self.record(i).get("margin") or 0.0
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise UserError(f"{self.where(i)}: 'margin' must be a number, found {margin!r}")
        return float(margin)


def pair_count(batches: list[dict]) -> int:
    """Pairs of some batches: what the means of a step are over."""
    return sum(len(batch["reply_tokens"]) for batch in batches if not batch.get("is_dummy"))


def scores_of_replies(scores: Tensor, batch: dict) -> Tensor:
    """Scores (B, T) of a batch -> (N, 2): of the chosen and the rejected reply of each pair."""
    reply_ids = batch["reply_ids"].flatten()
    here = np.flatnonzero(reply_ids >= 0)
    ordered = here[np.argsort(reply_ids[here])]
    return paddle.gather(scores.flatten(), paddle.to_tensor(ordered)).reshape([-1, 2])


def loss_and_metrics(scores: Tensor, margins: np.ndarray, pairs: int, args: Args) -> tuple[Tensor, dict[str, float]]:
    """A batch's part of the mean loss of `pairs` pairs, and of the sums behind METRICS; scores (N, 2), margins (N,)."""
    chosen, rejected = scores[:, 0], scores[:, 1]
    losses = preference_losses(
        chosen, rejected, paddle.to_tensor(margins.astype("float32")), args.center_rewards_coefficient
    )
    x = scores.numpy().astype(np.float64)
    wins = float((x[:, 0] > x[:, 1]).sum() + 0.5 * (x[:, 0] == x[:, 1]).sum())
    sums = wins, float((x[:, 0] - x[:, 1]).sum()), float(x.sum()) / 2, float((x**2).sum()) / 2
    return losses.sum() / pairs, dict(zip(("accuracy", "margin", "mean_reward", "square"), (s / pairs for s in sums)))


def with_std(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of all parts -> METRICS: std_reward from the mean of squares."""
    std = math.sqrt(max(0.0, sums["square"] - sums["mean_reward"] ** 2))
    return {**{name: sums[name] for name in METRICS[:3]}, "std_reward": std}


def model_inputs(batch: dict) -> dict:
    """What the model is called with: no labels, as a score is not compared with a token."""
    return {name: value for name, value in trainer.model_inputs(batch).items() if name != "labels"}


def evaluate_pairs(model: ScoreModel, loader: PreferenceLoader, args: Args, topology: Topology = SINGLE) -> dict:
    """{"eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward", "eval_std_reward", "eval_pairs"}"""
    indices = trainer.eval_batches(loader, args.max_evaluate_steps)
    pairs = pair_count([loader.batch(*index) for index in indices])
    loss, sums = 0.0, dict.fromkeys(("accuracy", "margin", "mean_reward", "square"), 0.0)
    with trainer.eval_mode(model.model):
        for index, is_real in trainer.local_micro_batches(indices, topology):
            batch = loader.batch(*index)
            scores = scores_of_replies(model(**model_inputs(batch)), batch)
            part, metrics = loss_and_metrics(scores, margins_of(loader.dataset, batch), pairs, args)
            if is_real:
                loss += float(part)
                sums = {name: sums[name] + value for name, value in metrics.items()}
    loss, sums = topology.all_reduce_sum(loss), topology.all_reduce_sum(sums)
    return {"eval_loss": loss, **{f"eval_{k}": v for k, v in with_std(sums).items()}, "eval_pairs": pairs}


def margins_of(dataset: ScoredPairs, batch: dict) -> np.ndarray:
    """(N,) of the batch's pairs."""
    return np.array([dataset.margin(i) for row in batch["sample_ids"] for i in row])


# ======================================================================================================== set-up


class PairTask:
    """A score head learns from pairs. What main() asks of it, process_rewards.StepTask answers for steps."""

    metrics = METRICS[:3]  # a std is no sum over micro-batches
    report = "dev pairs whose chosen reply has the larger score"
    size_of, inputs = staticmethod(pair_count), staticmethod(model_inputs)

    def __init__(self, args: Args, tokenizer: Tokenizer):
        self.args, self.tokenizer = args, tokenizer
        self.share_within = trainer.share_within(args.model_name_or_path, "max_seq_len", args.max_seq_len)

    def make_loader(self, split: str) -> PreferenceLoader:
        return make_loader(self.args, self.tokenizer, split, self.share_within)

    def load_model(self, topology: Topology) -> ScoreModel:
        """The reward model or language model of model_name_or_path; only training gives the latter a head."""
        args, seed = self.args, self.args.seed if self.args.do_train else None
        network = load_reward_model(args.model_name_or_path, topology, seed=seed)
        network.config.source.setdefault("pad_token_id", self.tokenizer.pad_token_id)  # transformers batches need one
        trainer.check_shared_prompts(network, args.model_name_or_path, "max_seq_len", 0, ("rope_2d",))
        return ScoreModel(network)

    def loss_and_metrics(self, scores: Tensor, batch: dict, size: int, loader: PreferenceLoader) -> tuple:
        """From the model's scores (B, T)."""
        return loss_and_metrics(scores_of_replies(scores, batch), margins_of(loader.dataset, batch), size, self.args)

    def evaluate(self, model: ScoreModel, loader: PreferenceLoader, topology: Topology) -> dict:
        return evaluate_pairs(model, loader, self.args, topology)


def setup_adapter(model: CausalLM, args: Args, checkpoint: Path | None = None) -> None:
    """trainer.setup_adapter(), and a score head that is trained, if there is one."""
    trainer.setup_adapter(model, args, checkpoint)
    for layer in lora_layers(model).values():
        layer.dropout = 0.0
    if model.score is not None:
        train_score_head(model)


def make_loader(args: Args, tokenizer: Tokenizer, split: str, share_within: float = math.inf) -> PreferenceLoader:
    """The loader of the pairs for "train" or "dev"; share_within: see ScoredPairs."""
    is_train, limits = split == "train", (args.max_seq_len, args.max_prompt_len)
    path, options = getattr(args, f"{split}_dataset_path"), RecordOptions.of(args)
    given = path, tokenizer, *limits, split, not args.disable_tqdm, options
    dataset = ScoredPairs(*given, share_within=share_within)
    loader = PreferenceLoader(
        dataset,
        args.per_device_train_batch_size if is_train else args.per_device_eval_batch_size,
        max_seq_len=args.max_seq_len,
        greedy_zero_padding=args.greedy_zero_padding,
        seed=args.seed,
        shuffle=is_train,
        drop_last=is_train and args.dataloader_drop_last,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer.print_data(split, "pairs", loader)
    return loader


def main(args: Args) -> None:
    # ====================================================================== 1. topology, output folder, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    checkpoint = find_checkpoint(args, topology) if args.do_train else None
    tokenizer = trainer.setup_tokenizer(args)
    task = StepTask(args, tokenizer) if args.process_reward else PairTask(args, tokenizer)
    train = task.make_loader("train") if args.do_train else None
    dev = task.make_loader("dev") if args.do_eval else None

    # ====================================================================== 2. model and head
    model, before = task.load_model(topology), None  # ids -> scores of replies, or logits of reward tokens
    network = model.model
    trainer.set_recompute(network, args)
    trainer.check_vocabulary(network, tokenizer, args.model_name_or_path, args)
    trainer.check_positions(network, args.model_name_or_path, {"max_seq_len": args.max_seq_len})

    def evaluate():
        return task.evaluate(model, dev, topology)

    if args.do_train:
        # ================================================================== 3. adapter, optimizer, log
        setup_adapter(network, args, checkpoint)
        more = {"checkpoint": checkpoint, "metrics": task.metrics}
        run = trainer.setup_training(args, network, tokenizer, train, topology, **more)
        optimizer, shards, log, checkpoints = run.optimizer, run.shards, run.log, run.checkpoints
        state, total, steps_per_epoch = run.state, run.total_steps, run.steps_per_epoch
        before = evaluate() if dev else None
        step_size = task.size_of  # what the means are over: pairs or steps
        inputs = task.inputs  # what the model is called with

        def loss_of(outputs, batch, size):
            """This micro-batch's part of the step's loss, from the model's outputs."""
            part, metrics = task.loss_and_metrics(outputs, batch, size, train)
            if not batch.get("is_dummy"):
                log.add_metrics(metrics)
            return part

        # ================================================================== 4. training loop (the same in every script)
        model.train()
        resumed_step = state.step
        while True:
            if state.step > resumed_step and trainer.is_due(
                args.save_strategy, args.save_steps, state.step, steps_per_epoch
            ):
                checkpoints.save(state)
            if trainer.is_due(args.evaluation_strategy, args.eval_steps, state.step, steps_per_epoch):
                metrics = evaluate()
                log.evaluation(state.step, metrics)
                if trainer.note_evaluation(args, state, metrics, checkpoints, log):  # no longer better: early stopping
                    break
            if state.step >= total:
                break
            start = log.begin()
            batches = trainer.step_micro_batches(train, state.step, args, topology)
            # The mean is over what the whole step holds: a mean of micro-batch means would weigh short ones more.
            size, loss = topology.all_reduce_sum(step_size(batches)), 0.0
            seed = functools.partial(trainer.seed_step, args.seed, state.step)
            part_loss = functools.partial(loss_of, size=size)
            for part, batch in parallel.forward_backward(model, batches, inputs, part_loss, seed):
                loss += part
                trainer.check_finite(loss, args.output_dir, state.step, batch)
            loss = topology.all_reduce_sum(loss, stages=True)
            grad_norm = shards.reduce_gradients()
            trainer.check_finite(grad_norm, args.output_dir, state.step, batches[-1])
            lr = trainer.learning_rate(state.step, args, total)
            optimizer.step(lr, trainer.clip_scale(grad_norm, args.max_grad_norm))
            shards.gather_weights()
            optimizer.zero_grad()
            tokens = topology.all_reduce_sum(sum(batch["tokens"] for batch in batches))
            state.step, state.consumed_tokens = state.step + 1, state.consumed_tokens + tokens
            state.epoch = state.step / steps_per_epoch
            log.step(state, loss, lr, grad_norm, tokens, time.perf_counter() - start)
        checkpoints.wait()
        # ================================================================== end of the training loop

        trainer.finish_training(run, network, args)
    else:
        if args.lora_path:
            setup_adapter(network, args)
            parallel.shard_adapters(network, topology)
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. evaluation, before and after
    if args.do_eval:
        metrics = evaluate()
        trainer.write_results(args.output_dir, "dev", metrics, topology)
        print(f"dev: {trainer.format_metrics(metrics)}")
        if before:
            old, new = (100 * values["eval_accuracy"] for values in (before, metrics))
            print(f"{task.report}: before {old:.1f} %, after {new:.1f} %")
    if args.do_train:
        path = shlex.quote(args.output_dir) + " --process_reward true" * args.process_reward
        print(f"\nnext: python rl.py configs/llama_ppo.json --reward_model_name_or_path {path}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
