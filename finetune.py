"""Supervised fine-tuning: all weights, LoRA (rsLoRA, LoRA+, PiSSA, DoRA) or prefix tuning.

    python finetune.py configs/llama_lora.json                           # any key again as --key value
    python finetune.py configs/llama_sft.json --learning_rate 1e-4

Reads src/tgt records (see data.py), learns the replies only, packs them without padding (`zero_padding`). Writes a Hugging
Face folder, or with LoRA and prefix a PEFT adapter, and ends by answering three dev prompts as before and as after.
"""

import dataclasses
import functools
import json
import re
import time
from pathlib import Path

import kernels

import numpy as np

import parallel
import trainer
from adapters import (
    apply_lora,
    apply_prefix,
    base_folders,
    cast_frozen_to_bf16,
    load_adapter,
    lora_layers,
    restore_adapter,
    trainable_weights,
)
from arguments import TrainingArgs
from checkpoint import CheckpointManager, TrainState, find_checkpoint, load_checkpoint, load_trained, update_best
from data import SFTDataset, SFTLoader
from distributed.sharding import ZeroOptimizer
from families import ModelConfig
from formats.chat import load_chat_template
from formats.files import UserError, atomic_file
from formats.tokenizer import load_tokenizer
from model import distances_count, generate


@dataclasses.dataclass
class Args(TrainingArgs):
    model_name_or_path: str = ""  # Hugging Face folder of the base model
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    dataset_name_or_path: str = (
        ""  # folder with train.json, dev.json, test.json (or .jsonl, or folders of them), or one file
    )
    src_length: int = 1024  # most tokens of a prompt
    max_length: int = 2048  # most tokens of prompt and reply; of a packed row with zero_padding
    chat_template: str | None = (
        None  # a name of data.FORMATS, plain, none, a chat_template.json or .jinja; None: the tokenizer's own
    )
    zero_padding: bool = False  # several samples a row, kept apart by FlashMask rows, instead of padding
    greedy_zero_padding: bool = False  # best fit over the whole data instead of in order
    flash_mask: bool = False  # upstream's switch; packed rows always have FlashMask rows here
    pad_to_max_length: bool = False  # pad every batch to max_length
    pad_to_multiple_of: int | None = None  # pad every batch to a multiple
    eval_with_do_generation: bool = (
        False  # also answer the dev prompts: BLEU-4, ROUGE, and recall of the records' keywords
    )
    save_generation_output: bool = False  # keep these answers in generated_output.json
    max_new_tokens: int = 128  # most tokens of an answer
    top_k: int = 1  # 1 answers greedily; more samples among the k likeliest
    top_p: float = 1.0  # below 1: samples among the likeliest whose probabilities sum to it
    temperature: float = 1.0  # of that sampling
    neftune: bool = False  # noise on the embeddings while training
    neftune_noise_alpha: float | None = None  # its size; given alone it switches neftune on; None: 5 with neftune
    lora: bool = False
    lora_path: str | None = None  # go on from this adapter
    lora_rank: int = 8
    lora_alpha: float = -1  # -1: twice the rank, or 4 with rslora, as upstream
    lora_dropout: float = 0.0
    lora_target_modules: str | list[str] | None = None  # names, or one regular expression; None: every linear
    rslora: bool = False  # scale by alpha/sqrt(rank)
    lora_plus_scale: float = 1.0  # LoRA+: learning rate of B over that of A (arXiv 2402.12354)
    pissa: bool = False  # start from the largest singular values
    dora: bool = False  # train magnitudes beside directions
    prefix_tuning: bool = False
    prefix_path: str | None = None  # go on from this prefix
    num_prefix_tokens: int = 128
    prefix_projection: bool = False  # make the prefix by an MLP while training
    prefix_projection_hidden_size: int | None = None  # its width; None: the model's
    save_dtype: str = "float32"  # of a fully tuned final model: float32, bfloat16 or float16

    def check(self):
        for key in ("model_name_or_path", "dataset_name_or_path"):
            if not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.lora and self.prefix_tuning:
            raise UserError("lora and prefix_tuning are both true; choose one")
        for key, needs in (
            ("lora_path", "lora"),
            ("pissa", "lora"),
            ("dora", "lora"),
            ("rslora", "lora"),
            ("prefix_path", "prefix_tuning"),
        ):
            if getattr(self, key) and not getattr(self, needs):
                raise UserError(f"{key} needs {needs}: true")
        if self.pissa and self.dora:
            raise UserError("pissa and dora are both true; choose one: both redefine the base weight")
        if self.greedy_zero_padding and not self.zero_padding:
            raise UserError("greedy_zero_padding: true needs zero_padding: true")
        if self.src_length >= self.max_length:
            raise UserError(f"src_length {self.src_length} leaves no room for a reply in max_length {self.max_length}")
        if self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"save_dtype: {self.save_dtype!r}; possible are float32, bfloat16, float16")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise UserError(
                "generation: temperature and max_new_tokens must be positive, top_p in (0, 1], top_k at least 0"
            )
        if self.neftune_noise_alpha is None:
            self.neftune_noise_alpha = 5.0 if self.neftune else 0.0
        if self.lora_alpha == -1:
            self.lora_alpha = 4.0 if self.rslora else 2.0 * self.lora_rank
        notes = super().check()
        if (
            self.load_best_model_at_end
            and self.metric_for_best_model not in ("loss", "accuracy", "ppl")
            and not self.eval_with_do_generation
        ):
            raise UserError(f"metric_for_best_model: {self.metric_for_best_model} needs eval_with_do_generation: true")
        return notes


def answer(model, tokenizer, dataset, indices, args):
    """Replies of the model to the last turn of these records, in their order; prompts of similar length share a batch.

    Processes that have all they need of the model share out the batches.
    """
    indices, answers, topology = list(indices), {}, model.topology
    prompts = {i: dataset.prompt_ids(i) for i in indices}
    by_length = sorted(indices, key=lambda i: len(prompts[i]))
    rank, replicas = topology.model_replica
    rows = (
        1 if model.prefix is not None and model.distances_count else 32
    )  # no padding between such a prefix and its text
    for start in range(rows * rank, len(by_length), rows * replicas):
        batch = by_length[start : start + rows]
        T = max(len(prompts[i]) for i in batch)
        ids, mask = np.zeros((len(batch), T), np.int64), np.zeros((len(batch), T), np.int64)
        for row, i in enumerate(batch):  # padded on the left
            ids[row, T - len(prompts[i]) :] = prompts[i]
            mask[row, T - len(prompts[i]) :] = 1
        out = generate(
            model,
            ids,
            args.max_new_tokens,
            tokenizer.stop_ids,
            mask,
            do_sample=args.top_k != 1,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )[:, T:]
        for row, i in enumerate(batch):
            answers[i] = tokenizer.decode_reply(out[row])
    if replicas > 1:
        answers = dict(pair for part in topology.all_gather_object(list(answers.items())) for pair in part)
    return [answers[i] for i in indices]


def keyword_recall(answers, records):
    """Share of the records' keywords that their answers mention (whole words where the keyword is Latin); None without any."""
    found = wanted = 0
    for text, record in zip(answers, records):
        for word in record.get("keywords", ()):
            latin = word.isascii()
            pattern = rf"(?<!\w){re.escape(word)}(?!\w)" if latin else re.escape(word)
            found += bool(re.search(pattern, text, re.IGNORECASE))
            wanted += 1
    return found / wanted if wanted else None


def generation_metrics(model, tokenizer, dataset, args):
    """{"eval_bleu4", "eval_rouge-1", …, "eval_keyword_recall" if records have keywords}, and the answers."""
    indices = range(len(dataset))
    answers, records = answer(model, tokenizer, dataset, indices, args), [dataset.record(i) for i in indices]
    references = [dataset.reference(i) for i in indices]
    metrics = {"eval_bleu4": trainer.bleu4(answers, references)}
    metrics.update({f"eval_{k}": v for k, v in trainer.rouge(answers, references).items()})
    if (recall := keyword_recall(answers, records)) is not None:
        metrics["eval_keyword_recall"] = recall
    return metrics, answers


def adapt(model, args, checkpoint):
    """Put on what is trained (nothing for full fine-tuning), from a checkpoint, a given adapter, or new."""
    path = checkpoint or args.lora_path or args.prefix_path
    if not (args.lora or args.prefix_tuning):
        return
    if path:
        load_adapter(model, path, trainable=True)
        wanted = ("LoRA", args.lora_rank) if args.lora else ("a prefix", args.num_prefix_tokens)
        found = ("LoRA", model.lora_config["r"]) if lora_layers(model) else ("a prefix", model.prefix.tokens)
        if found != wanted:
            raise UserError(f"{path}: holds {found[0]} of {found[1]}, the arguments ask for {wanted[0]} of {wanted[1]}")
    elif args.lora:
        apply_lora(
            model,
            args.lora_rank,
            args.lora_alpha,
            args.lora_dropout,
            args.rslora,
            args.dora,
            args.pissa,
            args.lora_target_modules,
            args.seed,
        )
    else:
        apply_prefix(
            model, args.num_prefix_tokens, args.prefix_projection, args.prefix_projection_hidden_size, args.seed
        )


def main(args):
    # ====================================================================== 1. place on the grid, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.model_name_or_path)
    if args.chat_template is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template)

    def records(split):
        return SFTDataset(
            args.dataset_name_or_path,
            tokenizer,
            args.src_length,
            args.max_length,
            split,
            progress=not args.disable_tqdm,
        )

    packs = args.zero_padding
    if (
        packs
        and args.prefix_tuning
        and distances_count(ModelConfig.from_json(base_folders(args.model_name_or_path)[-1]))
    ):
        print("ignored: zero_padding: prefix tuning of a model with ALiBi or windows takes one sample a row")
        packs = False

    def loader(dataset, batch_size, train):
        return SFTLoader(
            dataset,
            batch_size,
            args.max_length,
            packs,
            packs and args.greedy_zero_padding,
            args.seed,
            shuffle=train,
            pad_to_max_length=args.pad_to_max_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
            drop_last=train and args.dataloader_drop_last,
            pad_token_id=tokenizer.pad_token_id,
        )

    train = dev = test = None
    if args.do_train:
        train_records = records("train")
        train = loader(train_records, args.per_device_train_batch_size, True)
        print(
            f"train: {len(train_records):,} records ({train_records.dropped} dropped), {train.batches_per_epoch:,} batches an epoch, "
            f"{100 * train.fill:.1f} % of positions real"
        )
    if args.do_eval:
        dev_records = records("dev")
        dev = loader(dev_records, args.per_device_eval_batch_size, False)
    if args.do_predict:
        test_records = records("test")
        test = loader(test_records, args.per_device_eval_batch_size, False)

    # ====================================================================== 2. model, and its answers before training
    model = parallel.from_pretrained(args.model_name_or_path, topology)
    trainer.set_recompute(model, args)
    model.neftune_noise_alpha = args.neftune_noise_alpha
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path)
    before_text = args.num_prefix_tokens if args.prefix_tuning else 0
    needed = {"max_length": args.max_length, "src_length + max_new_tokens": args.src_length + args.max_new_tokens}
    needed = {key: tokens + before_text for key, tokens in needed.items()}
    trainer.check_positions(model, args.model_name_or_path, needed)
    shown = [i for i in range(len(dev_records) if dev else 0) if isinstance(dev_records.record(i)["src"], str)][:3]
    before = answer(model, tokenizer, dev_records, shown, args) if shown and args.do_train else []
    recall_before = None
    if args.do_train and dev and args.eval_with_do_generation:
        recall_before = generation_metrics(model, tokenizer, dev_records, args)[0].get("eval_keyword_recall")

    def evaluate():
        metrics = trainer.evaluate(model, dev, args.max_evaluate_steps, topology)
        if args.eval_with_do_generation:
            generated, answers = generation_metrics(model, tokenizer, dev_records, args)
            metrics.update(generated)
            if args.save_generation_output and topology.rank == 0:
                write_answers(Path(args.output_dir) / "generated_output.json", dev_records, answers)
        return metrics

    if args.do_train:
        # ================================================================== 3. adapter, optimizer, resume
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
        total, steps_per_epoch = trainer.total_steps(args, train.batches_per_epoch, topology.data_size)
        state = TrainState()
        if checkpoint:
            if not (args.lora or args.prefix_tuning):
                load_trained(model, checkpoint, args)
            moments = None if args.ignore_load_lr_and_optim else optimizer
            state = load_checkpoint(checkpoint, moments, shards, args.output_dir)
        trainer.prepare_output_dir(
            args, topology
        )  # only here: an argument that is refused above must not cost the run it would replace
        log = trainer.Log(args, total, state, topology=topology)
        checkpoints = CheckpointManager(args, model, tokenizer, optimizer, shards, topology)

        def step_size(batches):
            """What the mean is over: target tokens."""
            return sum(int((batch["labels"] != -100).sum()) for batch in batches)

        inputs = trainer.model_inputs  # what the model is called with

        def loss_of(losses, batch, size):
            """This micro-batch's part of the step's loss."""
            return losses.sum() / size

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
            load_best(model, args, Path(args.output_dir) / state.best_checkpoint)
        log.close()
        checkpoints.write_model(args.output_dir, args.save_dtype)
        print(f"{'adapter' if args.lora or args.prefix_tuning else 'model'}: {args.output_dir}")
    else:
        if args.lora_path or args.prefix_path:
            adapt(model, args, None)
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. evaluation, prediction, before and after
    if args.do_eval:
        metrics = evaluate()
        trainer.write_results(args.output_dir, "dev", metrics, topology)
        print(f"dev: {trainer.format_metrics(metrics)}")
        if recall_before is not None:
            recall = metrics["eval_keyword_recall"]
            print(
                f"attributes asked for that the answers mention: before {100 * recall_before:.1f} %, after {100 * recall:.1f} %"
            )
    if args.do_predict:
        metrics = trainer.evaluate(model, test, args.max_evaluate_steps, topology)
        generated, answers = generation_metrics(model, tokenizer, test_records, args)
        metrics.update(generated)
        trainer.write_results(args.output_dir, "test", metrics, topology)
        if topology.rank == 0:
            write_answers(Path(args.output_dir) / "predictions.jsonl", test_records, answers)
        print(f"test: {trainer.format_metrics(metrics)}")
    if before:
        after = answer(model, tokenizer, dev_records, shown, args)
        for i, old, new in zip(shown, before, after):
            print(f"\nprompt: {dev_records.record(i)['src']}\nbefore: {old}\nafter:  {new}")


def load_best(model, args, checkpoint):
    """The weights, or the adapter's, of an earlier checkpoint of this run into the model."""
    if not (args.lora or args.prefix_tuning):
        load_trained(model, checkpoint, args)
    else:
        restore_adapter(model, checkpoint)


def write_answers(path, dataset, answers):
    """One line a record: its own keys and "output"."""
    with atomic_file(path) as file:
        for i, text in enumerate(answers):
            file.write(json.dumps({**dataset.record(i), "output": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    trainer.run_script(main, Args)
