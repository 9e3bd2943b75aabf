"""Preference alignment: from pairs of replies to one prompt, make the better one likelier than the worse one.

    python dpo.py configs/llama_dpo.json                                 # any key again as --key value
    python dpo.py configs/llama_dpo.json --loss_type simpo --beta 2.0 --simpo_gamma 1.0
    python dpo.py configs/llama_dpo.json --loss_type kto   # single replies that are good or bad; a pair is two

The losses, each with its formula and paper, are the rows of alignment/preference_losses.py; what they are computed from
is in alignment/preference.py. Reads pairs in many formats (docs/data.md). Prompt, chosen and rejected reply are one
sequence, several pairs are a row. Trains all weights or LoRA. The reference is the model before training: with LoRA the
same model with the adapter off; otherwise its log-probabilities of all pairs, computed before the first step (16 bytes
a pair, no second model). Ends with reward accuracy on the dev pairs (50 % before: policy and reference are equal) and
replies to three prompts.
"""

import dataclasses
import functools
import re
import shlex
import time
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import numpy as np

import parallel
import trainer
from adapters import changes_base, lora_layers
from alignment.moving_weights import MovingReference
from alignment.preference import (
    METRICS,
    UNPAIRED_METRICS,
    batch_loss,
    evaluate_pairs,
    has_auxiliary_losses,
    model_inputs,
    pair_counts,
    precompute_reference_logps,
    prepare_step,
    reference_logps,
    training_inputs,
)
from alignment.preference_data import UnpairedDataset, UnpairedLoader
from alignment.preference_losses import LOSSES, UNPAIRED_LOSSES, Loss
from arguments import LoraArgs
from checkpoint import find_checkpoint
from data import PreferenceDataset, PreferenceLoader
from formats.files import UserError
from formats.record_files import RecordOptions
from formats.tokenizer import Tokenizer
from model import CausalLM

SYNONYMS = {"orpo": "or", "aot_pair": "aot"}  # other names of losses


@dataclasses.dataclass
class Args(LoraArgs):
    model_name_or_path: str = ""  # folder of the model to align, which is also the reference; an adapter's is merged
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
    loss_type: str | list[str] = (
        "sigmoid"  # names in LOSSES, orpo, sft (adds to sft_loss_ratio); or kto: single replies
    )
    loss_weights: list[float] | None = None  # of several losses, which are added up; default: 1 each
    beta: float = 0.1  # weight of a difference in log-probability; large: stay near the reference
    label_smoothing: float = 0.0  # expected share of pairs whose labels are wrong
    simpo_gamma: float = 0.5  # simpo: margin that the rewards of a pair should have
    dpop_lambda: float = 50.0  # dpop: weight of a chosen reply less likely than under the reference
    bco_shift: bool = False  # bco_pair: rewards are compared with their mean over all steps so far
    discopop_tau: float = 0.05  # discopop: temperature of the change from one loss to the other
    ld_alpha: float | None = None  # weight of a reply's tokens beyond the length of the pair's shorter one (LD-DPO)
    pref_loss_ratio: float = 1.0  # weight of the preference loss; orpo's lambda
    sft_loss_ratio: float = 0.0  # weight of the chosen replies' mean cross-entropy beside it; orpo: 0 means 1
    desirable_weight: float = 1.0  # kto, apo_zero_unpaired: weight of good replies
    undesirable_weight: float = 1.0  # and of bad ones
    reference_free: bool = False  # losses of a margin: a reference to which all replies are equally likely
    ref_model_update_steps: int = -1  # > 0: every so many steps the reference moves to the policy (TR-DPO)
    ref_model_mixup_alpha: float | None = None  # by this share of the way; default: 1, with sync_ref_model 0.6
    sync_ref_model: bool = False  # TRL's switch: ref_model_update_steps is ref_model_sync_steps
    ref_model_sync_steps: int = 512  # for sync_ref_model
    max_new_tokens: int = 128  # most tokens of the replies before and after
    prefix_tuning: bool = False  # train a prefix of keys and values (arXiv 2101.00190); the reference has none
    prefix_path: str | None = None  # continue from this prefix
    num_prefix_tokens: int = 128
    prefix_projection: bool = False  # an MLP computes the prefix while training
    prefix_projection_hidden_size: int | None = None  # width of that MLP; None: the model's

    aliases = {"kto_chosen_weight": "desirable_weight", "kto_rejected_weight": "undesirable_weight"}  # LLaMA-Factory's

    def check(self) -> list[str]:
        notes = super().check()
        self.dev_dataset_path = RecordOptions.of(self).dev_path(self.train_dataset_path, self.dev_dataset_path)
        needed = {"model_name_or_path": True, "train_dataset_path": self.do_train, "dev_dataset_path": self.do_eval}
        for key, is_needed in needed.items():
            if is_needed and not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.do_predict:
            raise UserError("do_predict: there are no test pairs; evaluate other pairs by do_eval and dev_dataset_path")
        for key, low in (("max_prompt_len", 1), ("max_seq_len", 3), ("max_new_tokens", 1)):
            if getattr(self, key) < low:
                raise UserError(f"{key}: {getattr(self, key)}; it must be at least {low}")
        if self.load_best_model_at_end and self.metric_for_best_model not in ("loss", "accuracy"):
            raise UserError(f"metric_for_best_model: {self.metric_for_best_model}; possible here are loss and accuracy")
        if self.lora and self.prefix_tuning:
            raise UserError("lora and prefix_tuning are both true; choose one")
        if self.prefix_path and not self.prefix_tuning:
            raise UserError("prefix_path needs prefix_tuning: true")
        notes += self._check_loss()
        self._check_reference()
        return notes

    @property
    def is_unpaired(self) -> bool:
        """Whether the data are single replies that are good or bad."""
        return self.loss_type in [*UNPAIRED_LOSSES]

    @property
    def losses(self) -> list[tuple[float, Loss]]:
        """[(weight, row of LOSSES)] of loss_type and loss_weights."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if self.is_unpaired:
            return []
        return list(zip(self.loss_weights or [1.0] * len(names), (LOSSES[name] for name in names)))

    def _check_loss(self):
        notes, given = [], self.loss_type
        names = re.findall(r"[^\s,]+", given) if isinstance(given, str) else given
        weights = self.loss_weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise UserError(f"loss_weights: {len(weights)} weights for {len(names)} losses: {', '.join(names)}")
        if "orpo" in names:
            self.sft_loss_ratio = self.sft_loss_ratio or 1.0
            notes.append(f"loss_type: orpo is loss_type or with sft_loss_ratio {self.sft_loss_ratio:g}")
        if "aot_pair" in names:
            notes.append("loss_type: aot_pair is called aot now, as in TRL; what was aot before is aot_unpaired")
        rows = [(SYNONYMS.get(name, name), weight) for name, weight in zip(names, weights)]
        if "sft" in names:
            self.sft_loss_ratio += sum(weight for name, weight in rows if name == "sft")
            notes.append(f"loss_type: sft adds its weight to sft_loss_ratio, which is {self.sft_loss_ratio:g}")
            rows = [(name, weight) for name, weight in rows if name != "sft"]
        alone = UNPAIRED_LOSSES if len(names) == 1 and not self.loss_weights else ()
        for name, _ in rows:
            if name not in LOSSES and name not in alone:
                possible = ", ".join([*LOSSES, *SYNONYMS, "sft", *alone])
                raise UserError(f"loss_type: {name!r}; possible are {possible}")
        if not rows:
            raise UserError("loss_type: no preference loss; finetune.py learns replies alone")
        self.loss_type = rows[0][0] if len(rows) == 1 else [name for name, _ in rows]
        self.loss_weights = [weight for _, weight in rows] if self.loss_weights else None
        self._check_loss_numbers([name for name, _ in rows])
        return notes

    def _check_loss_numbers(self, names):
        for key in ("beta", "discopop_tau"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}: {getattr(self, key)}; it must be positive")
        ratios = ("pref_loss_ratio", "sft_loss_ratio", "desirable_weight", "undesirable_weight")
        for key in ("simpo_gamma", "dpop_lambda", *ratios):
            if getattr(self, key) < 0:
                raise UserError(f"{key}: {getattr(self, key)}; it must not be negative")
        for key in ratios[2:]:
            if getattr(self, key) != 1 and not self.is_unpaired:
                raise UserError(f"{key}: {getattr(self, key)}; only {' and '.join(UNPAIRED_LOSSES)} have it")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing: {self.label_smoothing}; it must be at least 0 and below 0.5")
        smoothed = [name for name, row in LOSSES.items() if "label_smoothing" in row.extra_keys]
        if self.label_smoothing and not set(names) & set(smoothed):
            raise UserError(f"label_smoothing: loss_type {names[0]} has none; {', '.join(smoothed)} have it")
        if "exo_pair" in names and not self.label_smoothing:
            raise UserError("label_smoothing: 0.0; exo_pair takes the logarithm of it: set a small one, 0.001")
        if self.bco_shift and "bco_pair" not in names:
            raise UserError(f"bco_shift: loss_type {names[0]} has no shift; bco_pair has it")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UserError(f"ld_alpha: {self.ld_alpha}; it must be between 0 and 1")
        if self.ld_alpha is not None and self.is_unpaired:
            raise UserError(f"ld_alpha: {self.ld_alpha}; it compares the replies of a pair; {names[0]} has single ones")
        if not self.pref_loss_ratio and not self.sft_loss_ratio:
            raise UserError("pref_loss_ratio and sft_loss_ratio are both 0: there is nothing to learn")

    def _check_reference(self):
        needing = [row for _, row in self.losses if row.needs_reference]
        if self.reference_free and (self.is_unpaired or not all(row.only_margin for row in needing)):
            possible = ", ".join(name for name, row in LOSSES.items() if row.only_margin or not row.needs_reference)
            raise UserError(f"reference_free: loss_type {self.loss_type} needs a reference; {possible} do not")
        self.reference_free = self.reference_free or not (needing or self.is_unpaired)
        if self.sync_ref_model and self.ref_model_update_steps <= 0:
            self.ref_model_update_steps = self.ref_model_sync_steps
        if self.ref_model_mixup_alpha is None:
            self.ref_model_mixup_alpha = 0.6 if self.sync_ref_model else 1.0
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise UserError(f"ref_model_mixup_alpha: {self.ref_model_mixup_alpha}; it must be above 0 and at most 1")
        if self.ref_model_update_steps <= 0:
            return
        if self.reference_free:
            where = f"ref_model_update_steps: {self.ref_model_update_steps}"
            raise UserError(f"{where}: loss_type {self.loss_type} has no reference that could be updated")
        if trainer.trains_adapter(self) and self.ref_model_mixup_alpha < 1:
            raise UserError(
                f"ref_model_mixup_alpha: {self.ref_model_mixup_alpha}; with an adapter it must be 1, a copy: the mean "
                "of two adapters' A and B is not the mean of their products"
            )


# ======================================================================================================== set-up


def setup_adapter(model: CausalLM, args: Args, checkpoint: Path | None = None) -> None:
    """trainer.setup_adapter() for a policy that starts equal to its reference: neither PiSSA nor dropout."""
    trainer.setup_adapter(model, args, checkpoint)
    if changes_base(model):
        pissa = any(layer.pissa_init is not None for layer in lora_layers(model).values())
        kind = "a PiSSA adapter" if pissa else "an adapter with trained biases or modules_to_save"
        raise UserError(f"{checkpoint or args.lora_path}: {kind} changes the base weights, the reference")
    for layer in lora_layers(model).values():
        layer.dropout = 0.0


def check_lengths(model: CausalLM, args: Args) -> None:
    """UserError if the model has too few positions, or no place for a prefix."""
    prefix_tokens, reply_end = args.num_prefix_tokens * args.prefix_tuning, args.max_prompt_len + args.max_new_tokens
    needed = {"max_seq_len": args.max_seq_len, "max_prompt_len + max_new_tokens": reply_end}
    needed = {key: tokens + prefix_tokens for key, tokens in needed.items()}
    trainer.check_positions(model, args.model_name_or_path, needed)
    if prefix_tokens and model.distances_count:
        raise UserError("prefix_tuning: a prefix of a model with ALiBi or windows stands before one sample, not a pair")


def make_loader(args: Args, tokenizer: Tokenizer, split: str, share_within: float) -> PreferenceLoader:
    """The loader of the pairs for "train" or "dev". share_within: of data.pair_sample."""
    is_train, limits = split == "train", (args.max_seq_len, args.max_prompt_len)
    path, options = getattr(args, f"{split}_dataset_path"), RecordOptions.of(args)
    given = path, tokenizer, *limits, split, not args.disable_tqdm, options
    loader = (UnpairedLoader if args.is_unpaired else PreferenceLoader)(
        UnpairedDataset(*given) if args.is_unpaired else PreferenceDataset(*given, share_within),
        args.per_device_train_batch_size if is_train else args.per_device_eval_batch_size,
        max_seq_len=args.max_seq_len,
        greedy_zero_padding=args.greedy_zero_padding,
        seed=args.seed,
        shuffle=is_train,
        drop_last=is_train and args.dataloader_drop_last,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer.print_data(split, "replies" if args.is_unpaired else "pairs", loader)
    return loader


def distinct_prompts(dataset: PreferenceDataset, count: int) -> list[int]:
    """Numbers of the first samples that have different prompts."""
    found = {}
    for i in range(len(dataset)):
        found.setdefault(dataset.pair(i)[0].tobytes(), i)
        if len(found) == count:
            break
    return list(found.values())


def print_accuracies(before: dict, after: dict, args: Args) -> None:
    """What training has changed on the dev data."""
    pairs = "pairs where the chosen reply has the larger", {"rewards": "reward", "logps": "log-probability"}
    replies = "replies on the right side of the KL by their", {"rewards": "reward"}
    what, quantities = replies if args.is_unpaired else pairs
    print(f"share of dev {what} ...")
    for name, quantity in quantities.items():
        old, new = (100 * metrics[f"eval_{name}/accuracies"] for metrics in (before, after))
        print(f"  {quantity}: before {old:.1f} %, after {new:.1f} %")


def main(args: Args) -> None:
    # ====================================================================== 1. topology, output folder, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    checkpoint = find_checkpoint(args, topology) if args.do_train else None
    tokenizer = trainer.setup_tokenizer(args)
    share_within = trainer.share_within(args.model_name_or_path, "max_seq_len", args.max_seq_len)
    train = make_loader(args, tokenizer, "train", share_within) if args.do_train else None
    dev = make_loader(args, tokenizer, "dev", share_within) if args.do_eval else None

    # ====================================================================== 2. model, and what it does before training
    model = parallel.from_pretrained(args.model_name_or_path, topology, low_bit=parallel.LowBit.of(args))
    trainer.set_recompute(model, args)
    trainer.check_trainable(model, args.model_name_or_path)
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path, args)
    check_lengths(model, args)
    dev_reference = before = moving = state = None
    if dev and not args.reference_free:
        dev_batches = trainer.eval_batches(dev, args.max_evaluate_steps), not args.disable_tqdm, args.ld_alpha, topology
        dev_reference = precompute_reference_logps(model, dev, *dev_batches)
    shown = distinct_prompts(dev.dataset, 3) if dev and args.do_train else []
    prompts = [dev.dataset.pair(i)[0] for i in shown]
    limits = {"max_new_tokens": args.max_new_tokens, "max_length": model.config.max_model_len, "batch_size": 1}
    replies_before = trainer.generate_replies(model, tokenizer, prompts, **limits)

    def evaluate():
        base = dev_reference
        if moving is not None:
            moving.follow(state.step)
            with moving.in_place():
                base = precompute_reference_logps(model, dev, *dev_batches)
        return evaluate_pairs(model, dev, base, args, topology, state.reward_mean if state else 0.0)

    if args.do_train:
        # ================================================================== 3. reference, adapter, optimizer, log
        before, reference = evaluate() if dev else None, None
        is_moving = args.ref_model_update_steps > 0
        in_run = args.reference_free or is_moving or trainer.trains_adapter(args) and topology.pp.size == 1
        if not in_run:
            start, per_epoch, ranks = time.perf_counter(), train.batches_per_epoch, topology.data_size
            steps = range(trainer.total_steps(args, per_epoch, ranks)[0])
            batches = [index for step in steps for index in trainer.micro_batches(step, args, per_epoch, ranks)]
            options = not args.disable_tqdm, args.ld_alpha, topology
            reference = precompute_reference_logps(model, train, batches, *options)
            known, unit = int((~np.isnan(reference[:, 0])).sum()), "replies" if args.is_unpaired else "pairs"
            print(f"reference: log-probabilities of {known:,} {unit} computed in {time.perf_counter() - start:.1f} s")
        setup_adapter(model, args, checkpoint)
        auxiliary = has_auxiliary_losses(model)
        names = (*(UNPAIRED_METRICS if args.is_unpaired else METRICS), *(["aux_loss"] if auxiliary else []))
        run = trainer.setup_training(args, model, tokenizer, train, topology, checkpoint=checkpoint, metrics=names)
        optimizer, shards, log, checkpoints = run.optimizer, run.shards, run.log, run.checkpoints
        state, total, steps_per_epoch = run.state, run.total_steps, run.steps_per_epoch
        moving = MovingReference(run, model, args, checkpoint) if is_moving else None
        inputs = training_inputs if auxiliary else model_inputs  # what the model is called with

        def step_size(batches):
            """What the means are over: pairs, and tokens of chosen replies. First, what the step's losses need."""
            if moving is not None:
                moving.follow(state.step)
            prepare_step(model, batches, reference, args, topology, moving, state)
            return pair_counts(batches)

        def loss_of(losses, batch, size):
            """This micro-batch's part of the step's loss, from the model's losses (B, T)."""
            base = reference_logps(model, batch, reference, args)
            part, metrics = batch_loss(losses, batch, base, size, args, auxiliary)
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

        if moving is not None:
            moving.follow(state.step)
        trainer.finish_training(run, model, args)
    else:
        if args.lora_path or args.prefix_path:
            setup_adapter(model, args)
            parallel.shard_adapters(model, topology)
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. evaluation, before and after
    if args.do_eval:
        metrics = evaluate()
        trainer.write_results(args.output_dir, "dev", metrics, topology)
        print(f"dev: {trainer.format_metrics(metrics)}")
        if before:
            print_accuracies(before, metrics, args)
    replies = trainer.generate_replies(model, tokenizer, prompts, **limits)
    trainer.print_replies([dev.dataset.prompt_text(i) for i in shown], replies_before, replies)
    if args.do_train:
        print(f"\nnext: python serve.py --model_name_or_path {shlex.quote(args.output_dir)}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
