"""Preference alignment: from pairs of replies to one prompt, make the better one likelier than the worse one.

    python dpo.py configs/llama_dpo.json                                 # any key again as --key value
    python dpo.py configs/llama_dpo.json --loss_type simpo --beta 2.0 --simpo_gamma 1.0

Reads src/tgt/response/sort records (see data.py); prompt, chosen and rejected reply are one sequence, several pairs a
row. All weights or LoRA. The reference is the model as it was: with LoRA the same model with the adapter off; else its
log-probabilities of all pairs are computed before the first step, 16 bytes a pair instead of a second model. Writes what
finetune.py writes; ends with reward accuracy on the dev pairs and three of their prompts answered, before and after.
Before, policy and reference are the same, so all rewards are 0 and each pair counts one half (accuracy 50 %).
Not here: KTO, a reference that moves.
"""

import dataclasses
import functools
import time
from pathlib import Path

import kernels

import numpy as np
import paddle
import paddle.nn.functional as F
from tqdm import tqdm

import parallel
import trainer  # before paddle: it silences what paddle says while it is imported
from adapters import (
    adapter_disabled,
    apply_lora,
    cast_frozen_to_bf16,
    load_adapter,
    lora_layers,
    restore_adapter,
    trainable_weights,
)
from arguments import TrainingArgs
from checkpoint import CheckpointManager, TrainState, find_checkpoint, load_checkpoint, load_trained, update_best
from data import PreferenceDataset, PreferenceLoader
from distributed.sharding import ZeroOptimizer
from formats.chat import load_chat_template
from formats.files import UserError
from formats.tokenizer import load_tokenizer
from model import generate

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "simpo", "or", "orpo")
METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/accuracies",
           "logps/chosen", "logps/rejected", "dpo_loss", "sft_loss")  # fmt: skip
LENGTH_NORMALIZED = (
    "ipo",
    "simpo",
    "or",
)  # these compare log-probabilities per token, the others those of whole replies


@dataclasses.dataclass
class Args(TrainingArgs):
    model_name_or_path: str = ""  # folder of the model to align, which is also the reference; an adapter's is merged
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    train_dataset_path: str = ""  # pairs to learn: a JSON-lines file, or a folder with train.json(l)
    dev_dataset_path: str = ""  # pairs to evaluate on: a file, or a folder with dev.json(l)
    max_seq_len: int = 4096  # most positions of a packed row, so of a prompt and both replies
    max_prompt_len: int = 2048  # most tokens of a prompt whose pair is longer than max_seq_len
    greedy_zero_padding: bool = False  # pack best fit over the whole data instead of in order
    flash_mask: bool = False  # upstream's switch; rows always have FlashMask rows here
    chat_template: str | None = None  # as in finetune.py; None: the tokenizer's own
    loss_type: str = "sigmoid"  # one of LOSS_TYPES
    beta: float = 0.1  # how much a difference in log-probability counts; large: stay near the reference
    label_smoothing: float = 0.0  # sigmoid and simpo: the share of pairs whose labels are expected to be wrong
    simpo_gamma: float = 0.5  # simpo: the margin that a pair's rewards should have
    pref_loss_ratio: float = 1.0  # weight of the preference loss; orpo's lambda
    sft_loss_ratio: float = 0.0  # weight of the chosen replies' mean cross-entropy beside it; orpo: 0 means 1
    reference_free: bool = False  # sigmoid, hinge, ipo: a reference that finds all replies equally likely
    ref_model_update_steps: int = -1  # only -1 is here: the reference stays
    max_new_tokens: int = 128  # most tokens of the answers before and after
    lora: bool = False
    lora_path: str | None = None  # go on from this adapter; the reference is without it
    lora_rank: int = 8
    lora_alpha: float = -1  # -1: twice the rank, or 4 with rslora, as upstream
    lora_dropout: float = 0.0  # taken as 0: the policy must agree with its reference where they are the same
    lora_target_modules: str | list[str] | None = None  # names, or one regular expression; None: every linear
    rslora: bool = False  # scale by alpha/sqrt(rank)
    lora_plus_scale: float = 1.0  # LoRA+: learning rate of B over that of A (arXiv 2402.12354)
    rslora_plus: bool = False  # upstream's name for rslora, lora_plus_scale 4 and lora_alpha 4 at once
    dora: bool = False  # train magnitudes beside directions
    pissa: bool = False  # refused: it changes the weights that the reference needs
    save_dtype: str = "float32"  # of a fully tuned final model: float32, bfloat16 or float16

    def check(self):
        notes = super().check()
        needed = [
            ("model_name_or_path", True),
            ("train_dataset_path", self.do_train),
            ("dev_dataset_path", self.do_eval),
        ]
        for key, used in needed:
            if used and not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.do_predict:
            raise UserError("do_predict: there are no test pairs; evaluate other pairs by do_eval and dev_dataset_path")
        if self.max_prompt_len < 1 or self.max_seq_len < 3:
            raise UserError(
                f"max_prompt_len {self.max_prompt_len} and max_seq_len {self.max_seq_len}: a pair needs at "
                "least 1 token of prompt and 3 positions"
            )
        if self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"save_dtype: {self.save_dtype!r}; possible are float32, bfloat16, float16")
        if self.load_best_model_at_end and self.metric_for_best_model not in ("loss", "accuracy"):
            raise UserError(
                f"metric_for_best_model: {self.metric_for_best_model} is not computed here; loss and accuracy are"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens}; it must be at least 1")
        return notes + self._check_loss() + self._check_adapter()

    def _check_loss(self):
        if self.loss_type not in LOSS_TYPES:
            raise UserError(f"loss_type: {self.loss_type!r} is not here; there are {', '.join(LOSS_TYPES)}")
        for key, low in (("beta", 1e-30), ("simpo_gamma", 0), ("pref_loss_ratio", 0), ("sft_loss_ratio", 0)):
            if getattr(self, key) < low:
                raise UserError(f"{key}: {getattr(self, key)}; it must {'be positive' if low else 'not be negative'}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing: {self.label_smoothing}; it must be at least 0 and below 0.5")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            raise UserError(f"label_smoothing: loss_type {self.loss_type} has none; sigmoid and simpo have")
        if self.ref_model_update_steps > 0:
            raise UserError(
                f"ref_model_update_steps: {self.ref_model_update_steps}: the reference stays here; set it to -1"
            )
        notes = []
        if self.loss_type == "orpo":
            self.loss_type, self.sft_loss_ratio = "or", self.sft_loss_ratio or 1.0
            notes.append(f"loss_type: orpo is or with sft_loss_ratio {self.sft_loss_ratio:g}")
        if self.loss_type in ("simpo", "or"):
            self.reference_free = True
        if not self.pref_loss_ratio and not self.sft_loss_ratio:
            raise UserError("pref_loss_ratio and sft_loss_ratio are both 0: there is nothing to learn")
        return notes

    def _check_adapter(self):
        if self.rslora_plus:
            self.rslora, self.lora_plus_scale, self.lora_alpha = True, 4.0, 4.0
        for key in ("lora_path", "dora", "rslora", "pissa"):
            if getattr(self, key) and not self.lora:
                raise UserError(f"{key} needs lora: true")
        if self.pissa:
            raise UserError(
                "pissa: it changes the base weights, and the reference is the model with them; use another LoRA"
            )
        if self.lora_alpha == -1:
            self.lora_alpha = 4.0 if self.rslora else 2.0 * self.lora_rank
        if not self.lora_dropout:
            return []
        self.lora_dropout = 0.0
        return ["lora_dropout: 0 is used: with dropout the policy would differ from its reference before it has learnt"]


# ======================================================================================================= losses
# margin: how much likelier the policy finds the chosen reply than the rejected one, in log-probability, less the same
# of the reference. All take and return (N,) tensors, one entry a pair; float64, see reply_logps().


def sigmoid_loss(margin, beta, label_smoothing=0.0):
    """DPO: -(1 - ε) log σ(β m) - ε log σ(-β m). Rafailov et al., arXiv 2305.18290, Eq. 7; ε of Mitchell's note on cDPO:
    the probability that a label is the wrong way round."""
    return -(1 - label_smoothing) * F.log_sigmoid(beta * margin) - label_smoothing * F.log_sigmoid(-beta * margin)


def hinge_loss(margin, beta):
    """SLiC: max(0, 1 - β m). Zhao et al., arXiv 2305.10425, in the form of Liu et al., arXiv 2309.06657."""
    return F.relu(1 - beta * margin)


def ipo_loss(margin, beta):
    """IPO: (m - 1/(2β))², m per token. Azar et al., arXiv 2310.12036, Eq. 17."""
    return (margin - 1 / (2 * beta)) ** 2


def simpo_loss(margin, beta, gamma, label_smoothing=0.0):
    """SimPO: -log σ(β m - γ), m per token and without a reference. Meng et al., arXiv 2405.14734, Eq. 6."""
    return sigmoid_loss(margin - gamma / beta, beta, label_smoothing)


def orpo_loss(chosen, rejected):
    """ORPO's odds ratio: -log σ(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p), p = exp(log-probability
    per token). Hong et al., arXiv 2403.07691, Eq. 7; the whole loss is λ times that plus the chosen SFT loss."""

    def log_one_less(logp):  # log(1 - p); a reply that is certain in float32 would have infinite odds
        return paddle.log(-paddle.expm1(paddle.clip(logp, max=-1e-7)))

    return -F.log_sigmoid(chosen - rejected - log_one_less(chosen) + log_one_less(rejected))


def preference_losses(policy, reference, args):
    """Losses (N,) of N pairs by args.loss_type; policy and reference (N, 2): log-probabilities of chosen and rejected.

    Sums over a reply's tokens, as a reply's probability is the product of theirs, and Eq. 7 of DPO is about replies;
    for LENGTH_NORMALIZED kinds the caller has divided them by the number of tokens.
    """
    assert policy.shape == reference.shape and policy.shape[1] == 2, (policy.shape, reference.shape)
    ratio = policy - reference
    margin = ratio[:, 0] - ratio[:, 1]
    if args.loss_type == "sigmoid":
        return sigmoid_loss(margin, args.beta, args.label_smoothing)
    if args.loss_type == "hinge":
        return hinge_loss(margin, args.beta)
    if args.loss_type == "ipo":
        return ipo_loss(margin, args.beta)
    if args.loss_type == "simpo":
        return simpo_loss(margin, args.beta, args.simpo_gamma, args.label_smoothing)
    return orpo_loss(policy[:, 0], policy[:, 1])


def pair_counts(batches):
    """(pairs, tokens of their chosen replies) of some batches: what the means of a step or an evaluation are over."""
    tokens = [batch["reply_tokens"][:, 0] for batch in batches if not batch.get("is_dummy")]
    return sum(map(len, tokens)), int(sum(part.sum() for part in tokens))


def loss_and_metrics(policy, reference, reply_tokens, counts, args):
    """A batch's part of the loss of all the pairs that `counts` counts, and of the figures to show.

    policy, reference (N, 2): summed log-probabilities of the batch's replies; reply_tokens (N, 2) numpy.
    loss = pref_loss_ratio · mean over pairs + sft_loss_ratio · mean over tokens of chosen replies of -log p.
    rewards are β (policy - reference), equal ones count as half right; log-probabilities are what the loss compares.
    """
    pairs, chosen_tokens = counts
    sft = -policy[:, 0].sum() / chosen_tokens
    if args.loss_type in LENGTH_NORMALIZED:
        tokens = paddle.to_tensor(reply_tokens.astype("float64"))
        policy, reference = policy / tokens, reference / tokens
    preference = preference_losses(policy, reference, args).sum() / pairs
    logps, rewards = policy.numpy(), args.beta * (policy - reference).numpy()
    sums = [
        count_wins(rewards),
        (rewards[:, 0] - rewards[:, 1]).sum(),
        rewards[:, 0].sum(),
        rewards[:, 1].sum(),
        count_wins(logps),
        logps[:, 0].sum(),
        logps[:, 1].sum(),
    ]
    figures = dict(zip(METRICS, [*(float(value) / pairs for value in sums), float(preference), float(sft)]))
    return args.pref_loss_ratio * preference + args.sft_loss_ratio * sft, figures


def count_wins(values):
    """(N, 2) numpy -> how often the first is larger; equal ones count one half."""
    return float((values[:, 0] > values[:, 1]).sum() + 0.5 * (values[:, 0] == values[:, 1]).sum())


# ==================================================================================================== both models


def logps_inputs(batch):
    """What the model is called with to give plain -log p of the labels."""
    return {**trainer.model_inputs(batch), "auxiliary_losses": False}


def reply_logps(model, batch):
    """sum_of_replies() of this model."""
    return sum_of_replies(model(**logps_inputs(batch)), batch)


def sum_of_replies(losses, batch):
    """losses (B, T), -log p -> (N, 2) float64: summed log-probabilities of the chosen and the rejected reply of each of the batch's N pairs.

    What is compared is a small difference of such sums: at 300 nats the next float32 is 3e-5 away.
    """
    reply_ids = batch["reply_ids"].flatten()
    kept = np.flatnonzero(reply_ids >= 0)
    losses = paddle.gather(losses.flatten(), paddle.to_tensor(kept)).astype("float64")
    return -paddle.geometric.segment_sum(losses, paddle.to_tensor(reply_ids[kept])).reshape([-1, 2])


@paddle.no_grad()
def precompute_reference_logps(model, loader, batches, progress=False):
    """(pairs of the loader's data, 2) float64 numpy: reply_logps by this model of every pair that these batches hold.

    batches: [(epoch, index)]. The others stay nan. A pair is computed in the first batch that has it, so that until
    the policy has moved it gives the very same numbers.
    """
    was_training, known = model.training, np.full((len(loader.dataset), 2), np.nan)
    model.eval()

    def needed():
        asked = np.zeros(len(known), bool)
        for epoch, index in tqdm(batches, desc="reference", disable=not progress or None):
            batch = loader.batch(epoch, index)
            pairs = np.concatenate(batch["sample_ids"])
            if not asked[pairs].all():
                asked[pairs] = True
                yield batch
            if asked.all():
                break

    for batch, found in parallel.pipelined_map(model, needed(), logps_inputs, sum_of_replies):
        known[np.concatenate(batch["sample_ids"])] = found.numpy()
    if was_training:
        model.train()
    return known


@paddle.no_grad()
def reference_logps(model, batch, known, args):
    """(N, 2) of the reference: zeros without one, what is known of it, or else by the model with its adapter off."""
    if args.reference_free:
        return paddle.zeros(batch["reply_tokens"].shape, "float64")
    if known is not None:
        found = known[np.concatenate(batch["sample_ids"])]
        assert not np.isnan(found).any(), batch["sample_ids"]
        return paddle.to_tensor(found)
    with adapter_disabled(model):
        return reply_logps(model, batch)


def eval_batches(loader, args):
    """[(epoch, index)] of the batches that an evaluation takes."""
    limit = args.max_evaluate_steps if args.max_evaluate_steps > 0 else loader.batches_per_epoch
    return [(0, i) for i in range(min(limit, loader.batches_per_epoch))]


@paddle.no_grad()
def evaluate_pairs(model, loader, known, args, topology=parallel.SINGLE):
    """{"eval_loss", "eval_rewards/accuracies", …, "eval_pairs"}: means over the pairs of the `evaluated` batches.

    eval_accuracy is eval_rewards/accuracies under the name that metric_for_best_model knows.
    """
    was_training, batches = model.training, eval_batches(loader, args)
    model.eval()
    counts, loss, sums = pair_counts(loader.batch(*where) for where in batches), 0.0, dict.fromkeys(METRICS, 0.0)
    places = ((loader.batch(*where), counted) for where, counted in trainer.local_micro_batches(batches, topology))
    forward = parallel.pipelined_map(
        model, places, lambda place: logps_inputs(place[0]), lambda losses, batch: sum_of_replies(losses, batch[0])
    )
    for (batch, counted), policy in forward:
        reference = reference_logps(model, batch, known, args)
        part, figures = loss_and_metrics(policy, reference, batch["reply_tokens"], counts, args)
        if counted:
            loss += float(part)
            sums = {name: sums[name] + value for name, value in figures.items()}
    if was_training:
        model.train()
    loss, sums = (
        topology.all_reduce_sum(loss),
        {f"eval_{name}": value for name, value in topology.all_reduce_sum(sums).items()},
    )
    return {"eval_loss": loss, "eval_accuracy": sums["eval_rewards/accuracies"], **sums, "eval_pairs": counts[0]}


def answer(model, tokenizer, dataset, indices, args):
    """The model's own greedy replies to the prompts of these pairs."""
    answers = []
    for i in indices:
        prompt = dataset.pair(i)[0][None].astype(np.int64)
        room = max(0, model.config.max_model_len - prompt.shape[1])  # a pair that fits may have a long prompt
        out = generate(model, prompt, min(args.max_new_tokens, room), tokenizer.stop_ids)[0, prompt.shape[1] :]
        answers.append(tokenizer.decode_reply(out))
    return answers


def adapt(model, args, checkpoint):
    """Put on what is trained (nothing for full tuning), from a checkpoint, a given adapter, or new; without dropout."""
    path = checkpoint or args.lora_path
    if not args.lora:
        return
    if path:
        load_adapter(model, path, trainable=True)
        layers = lora_layers(model)
        if not layers or model.lora_config["r"] != args.lora_rank:
            found = f"LoRA of {model.lora_config['r']}" if layers else "a prefix"
            raise UserError(f"{path}: holds {found}, the arguments ask for LoRA of {args.lora_rank}")
        if any(layer.initial is not None for layer in layers.values()):
            raise UserError(
                f"{path}: a PiSSA adapter: its base weights are not the reference's; start from a merged model"
            )
        for layer in layers.values():
            layer.dropout = 0.0
    else:
        targets = args.lora_target_modules
        apply_lora(model, args.lora_rank, args.lora_alpha, 0.0, args.rslora, args.dora, targets=targets, seed=args.seed)


def check_model(model, args):
    """UserError for a model that this cannot align, or not rightly."""
    if model.config.quantization is not None:
        raise UserError(f"{args.model_name_or_path}: is quantized; align the model before quantize.py")
    if model.prefix is not None:
        raise UserError(f"{args.model_name_or_path}: has a trained prefix, which preference training would lose")
    config, kind = model.config, model.config.rope["rope_type"]
    if config.position == "alibi":
        raise UserError(
            f"{args.model_name_or_path}: {config.family} with ALiBi: it counts the tokens between a reply and its prompt, "
            "and the second of two replies that share a prompt has the first one's between; preference training of it is not here"
        )
    limit = {
        "dynamic": config.max_position_embeddings,
        "qwen_ntk": config.logn_length or config.rope.get("original_max_position_embeddings"),
    }.get(kind)
    if limit and args.max_seq_len > limit:
        raise UserError(
            f"max_seq_len: {args.max_seq_len}: past {limit} positions dynamic rope turns a prompt by the length of its "
            f"reply, so that two replies cannot share one; at most {limit}"
        )
    window = min((w for w in config.windows if w), default=args.max_seq_len)
    if args.max_seq_len > window:
        raise UserError(
            f"max_seq_len: {args.max_seq_len}: a query of {config.family} sees {window} tokens back, so that the second of "
            f"two replies to a prompt would see less of it than the first; at most {window}"
        )


def main(args):
    # ====================================================================== 1. place on the grid, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.model_name_or_path)
    if args.chat_template is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)
    progress = not args.disable_tqdm

    def loader(path, split, batch_size):
        dataset = PreferenceDataset(path, tokenizer, args.max_seq_len, args.max_prompt_len, split, progress)
        training = split == "train"
        found = PreferenceLoader(
            dataset,
            batch_size,
            args.max_seq_len,
            args.greedy_zero_padding,
            args.seed,
            training,
            training and args.dataloader_drop_last,
            tokenizer.pad_token_id,
        )
        print(
            f"{split}: {len(dataset):,} pairs ({dataset.dropped} dropped), {found.batches_per_epoch:,} batches an "
            f"epoch, {100 * found.fill:.1f} % of positions real"
        )
        return found

    train = loader(args.train_dataset_path, "train", args.per_device_train_batch_size) if args.do_train else None
    dev = loader(args.dev_dataset_path, "dev", args.per_device_eval_batch_size) if args.do_eval else None

    # ====================================================================== 2. model, and what it does before training
    model = parallel.from_pretrained(args.model_name_or_path, topology)
    trainer.set_recompute(model, args)
    check_model(model, args)
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path)
    needed = {
        "max_seq_len": args.max_seq_len,
        "max_prompt_len + max_new_tokens": args.max_prompt_len + args.max_new_tokens,
    }
    trainer.check_positions(model, args.model_name_or_path, needed)
    dev_known = train_known = before = None
    shown = range(min(3, len(dev.dataset)) if dev and args.do_train else 0)
    if dev and not args.reference_free:
        dev_known = precompute_reference_logps(model, dev, eval_batches(dev, args), progress)
    answers_before = answer(model, tokenizer, dev.dataset, shown, args) if shown else []

    def evaluate():
        return evaluate_pairs(model, dev, dev_known, args, topology)

    if args.do_train:
        # ================================================================== 3. reference, adapter, optimizer, resume
        before = evaluate() if dev else None
        total, steps_per_epoch = trainer.total_steps(args, train.batches_per_epoch, topology.data_size)
        # An adapter is switched off for the reference, except in a pipeline: a micro-batch runs through it once.
        if not args.reference_free and (not args.lora or topology.pp.size > 1):
            start, micro = time.perf_counter(), train.batches_per_epoch
            seen = [
                batch for step in range(total) for batch in trainer.micro_batches(step, args, micro, topology.data_size)
            ]
            train_known = precompute_reference_logps(model, train, seen, progress)
            known = int((~np.isnan(train_known[:, 0])).sum())
            print(f"reference: log-probabilities of {known:,} pairs computed in {time.perf_counter() - start:.1f} s")
        checkpoint = find_checkpoint(args, topology)
        adapt(model, args, checkpoint)
        parallel.shard_adapters(model, topology)
        if kernels.bf16:
            cast_frozen_to_bf16(model)
        weights = trainable_weights(model)
        shards = ZeroOptimizer(model, weights, topology)
        parameters, trained = model.num_parameters(), model.num_parameters(trained=True)
        print(f"model: {parameters:,} parameters, {trained:,} of them trained ({100 * trained / parameters:.2f} %)")
        faster = {w.name: args.lora_plus_scale for w in weights if ".lora_B." in w.name}
        optimizer = trainer.AdamW(shards.pieces, args, lr_scale=faster if args.lora_plus_scale != 1.0 else None)
        state = TrainState()
        if checkpoint:
            if not args.lora:
                load_trained(model, checkpoint, args)
            moments = None if args.ignore_load_lr_and_optim else optimizer
            state = load_checkpoint(checkpoint, moments, shards, args.output_dir)
        trainer.prepare_output_dir(
            args, topology
        )  # only here: an argument that is refused above must not cost the run it would replace
        log = trainer.Log(args, total, state, topology=topology, figures=METRICS)
        checkpoints = CheckpointManager(args, model, tokenizer, optimizer, shards, topology)
        step_size = pair_counts  # what the means are over: pairs, and tokens of chosen replies

        inputs = logps_inputs  # what the model is called with

        def loss_of(losses, batch, size):
            """This micro-batch's part of the step's loss."""
            reference = reference_logps(model, batch, train_known, args)
            part, figures = loss_and_metrics(
                sum_of_replies(losses, batch), reference, batch["reply_tokens"], size, args
            )
            if not batch.get("is_dummy"):
                log.add(figures)
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
                if args.load_best_model_at_end:
                    update_best(args, state, metrics, checkpoints)
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

        if args.load_best_model_at_end and state.best_checkpoint:
            log.say(f"best: {state.best_checkpoint}, {args.metric_for_best_model} {state.best_metric:.4f}")
            best = Path(args.output_dir) / state.best_checkpoint
            restore_adapter(model, best) if args.lora else load_trained(model, best, args)
        log.close()
        checkpoints.write_model(args.output_dir, args.save_dtype)
        print(f"{'adapter' if args.lora else 'model'}: {args.output_dir}")
    else:
        if args.lora_path:
            adapt(model, args, None)
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. evaluation, before and after
    if args.do_eval:
        metrics = evaluate()
        trainer.write_results(args.output_dir, "dev", metrics, topology)
        print(f"dev: {trainer.format_metrics(metrics)}")
        if before:
            print("share of dev pairs where the chosen reply has the larger ...")
            for name, what in (("rewards", "reward"), ("logps", "log-probability")):
                old, new = (100 * found[f"eval_{name}/accuracies"] for found in (before, metrics))
                print(f"  {what}: before {old:.1f} %, after {new:.1f} %")
    after = answer(model, tokenizer, dev.dataset, shown, args) if shown else []
    for i, old, new in zip(shown, answers_before, after):
        src = dev.dataset.record(i)["src"]
        print(f"\nprompt: {src if isinstance(src, str) else src[-1]}\nbefore: {old}\nafter:  {new}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
