"""Supervised fine-tuning: all weights, LoRA (rsLoRA, LoRA+, PiSSA, DoRA) or prefix tuning.

    python finetune.py configs/llama_lora.json                           # any key again as --key value
    python finetune.py configs/llama_sft.json --learning_rate 1e-4

Reads conversations in many formats (docs/data.md), learns only the replies, and packs them without padding
(`zero_padding`). Writes a Hugging Face folder, or with LoRA and prefix tuning a PEFT adapter. Ends with the replies to
three dev prompts before and after training.
"""

import dataclasses
import functools
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import parallel
import trainer
from adapters import base_folders
from arguments import LoraArgs
from checkpoint import find_checkpoint
from data import SFTDataset, SFTLoader
from families import ModelConfig
from formats.files import UserError, atomic_file
from formats.record_files import RecordOptions, with_reply
from formats.tokenizer import Tokenizer
from model import CausalLM, distances_count


@dataclasses.dataclass
class Args(LoraArgs):
    model_name_or_path: str = ""  # Hugging Face folder of the base model
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    dataset_name_or_path: str = ""  # a file, a folder with train.json and dev.json, or a blend: docs/data.md
    dev_dataset_path: str | None = None  # a file, a folder with dev.json, or a blend; None: dataset_name_or_path
    max_samples: int | None = None  # take only the first so many records of each source
    val_size: float | None = None  # hold out this share (< 1) or number of the training records as the dev data
    columns: str | dict | None = None  # other names of a record's keys: {"instruction": "question", …}
    train_on: str = "all"  # learn all replies of a conversation, or only the last
    src_length: int | None = None  # most tokens of a prompt; None: 1024, or half of a max_length below 2048
    max_length: int = 2048  # most tokens of prompt and reply; of a packed row with zero_padding
    chat_template: str | None = None  # name in chat.FORMATS, plain, none, or a template file; None: the tokenizer's own
    zero_padding: bool = False  # pack several samples into a row, separated by FlashMask, instead of padding
    greedy_zero_padding: bool = False  # pack by best fit over all data, instead of in order
    pad_to_max_length: bool = False  # pad every batch to max_length
    pad_to_multiple_of: int | None = None  # pad every batch to a multiple of this
    eval_with_do_generation: bool = False  # evaluations also answer the dev prompts: BLEU-4, ROUGE, keyword recall
    save_generation_output: bool = False  # write these replies to generated_output.json
    max_new_tokens: int = 128  # most tokens of a reply
    top_k: int = 1  # 1: greedy replies; more: sample among the k likeliest tokens
    top_p: float = 1.0  # < 1: sample among the likeliest tokens whose probabilities sum to it
    temperature: float = 1.0  # of the sampling
    neftune: bool = False  # add noise to the embeddings while training (arXiv 2310.05914)
    neftune_noise_alpha: float | None = None  # its size; a value alone turns neftune on; None: 5 with neftune
    lora_dropout: float = 0.0  # of LoRA's input
    pissa: bool = False  # LoRA that starts from the largest singular values (arXiv 2404.02948)
    loftq: bool = False  # LoRA that starts at what weight_quantize_algo took from the base (arXiv 2310.08659)
    prefix_tuning: bool = False  # train a prefix of keys and values (arXiv 2101.00190)
    prefix_path: str | None = None  # continue from this prefix
    num_prefix_tokens: int = 128
    prefix_projection: bool = False  # an MLP computes the prefix while training
    prefix_projection_hidden_size: int | None = None  # width of that MLP; None: the model's

    def check(self) -> list[str]:
        for key in ("model_name_or_path", "dataset_name_or_path"):
            if not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.lora and self.prefix_tuning:
            raise UserError("lora and prefix_tuning are both true; choose one")
        if self.prefix_path and not self.prefix_tuning:
            raise UserError("prefix_path needs prefix_tuning: true")
        if self.pissa and self.dora:
            raise UserError("pissa and dora are both true; choose one: both redefine the base weight")
        if self.loftq and not self.weight_quantize_algo:
            raise UserError("loftq needs weight_quantize_algo: it makes up for what rounding the base takes from it")
        axes = "tensor", "pipeline", "sep", "context"
        if self.loftq and any(getattr(self, f"{axis}_parallel_degree") > 1 for axis in axes):
            raise UserError("loftq needs the whole model on each rank: tensor, pipeline, sep and context have degree 1")
        if self.greedy_zero_padding and not self.zero_padding:
            raise UserError("greedy_zero_padding: true needs zero_padding: true")
        RecordOptions.of(self)
        self.src_length = self.src_length or min(1024, self.max_length // 2)
        if self.src_length >= self.max_length:
            raise UserError(f"src_length {self.src_length} leaves no room for a reply in max_length {self.max_length}")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise UserError(
                "generation: temperature and max_new_tokens must be positive, top_p in (0, 1], top_k at least 0"
            )
        if self.neftune_noise_alpha is None:
            self.neftune_noise_alpha = 5.0 if self.neftune else 0.0
        notes = super().check()
        if (
            self.load_best_model_at_end
            and self.metric_for_best_model not in ("loss", "accuracy", "ppl")
            and not self.eval_with_do_generation
        ):
            raise UserError(f"metric_for_best_model: {self.metric_for_best_model} needs eval_with_do_generation: true")
        return notes


def generate_replies(
    model: CausalLM, tokenizer: Tokenizer, dataset: SFTDataset, indices: Sequence[int], args: Args
) -> list[str]:
    """The model's replies to the last turn of these records."""
    prompts = [dataset.prompt_ids(i) for i in indices]
    return trainer.generate_replies(
        model,
        tokenizer,
        prompts,
        # No padding may come between such a prefix and its text.
        batch_size=1 if model.prefix is not None and model.distances_count else 32,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.top_k != 1,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )


def generation_metrics(
    model: CausalLM, tokenizer: Tokenizer, dataset: SFTDataset, args: Args
) -> tuple[dict, list[str]]:
    """({"eval_bleu4", "eval_rouge-1", …, "eval_keyword_recall" if records have keywords}, the replies)."""
    indices = range(len(dataset))
    replies, records = generate_replies(model, tokenizer, dataset, indices, args), [dataset.record(i) for i in indices]
    references = [dataset.reference(i) for i in indices]
    metrics = {"eval_bleu4": trainer.bleu4(replies, references)}
    metrics.update({f"eval_{name}": value for name, value in trainer.rouge(replies, references).items()})
    if (recall := trainer.keyword_recall(replies, records)) is not None:
        metrics["eval_keyword_recall"] = recall
    return metrics, replies


def write_replies(path: Path, dataset: SFTDataset, replies: list[str]) -> None:
    """One JSON line per record: its own keys and "output" (Alpaca's own output is then "reference")."""
    with atomic_file(path) as file:
        for i, text in enumerate(replies):
            file.write(json.dumps(with_reply(dataset.record(i), text), ensure_ascii=False) + "\n")


def needs_one_sample_a_row(args: Args) -> bool:
    """A trained prefix must stand right before its text where attention depends on distance."""
    if not args.prefix_tuning:
        return False
    return distances_count(ModelConfig.from_json(base_folders(args.model_name_or_path)[-1]))


def make_loaders(args: Args, tokenizer: Tokenizer) -> tuple[SFTLoader | None, SFTLoader | None, SFTLoader | None]:
    """(train, dev, test) loaders, each with its .dataset; None for what this run does not do."""
    packs = args.zero_padding
    if packs and needs_one_sample_a_row(args):
        print("ignored: zero_padding: prefix tuning of a model with ALiBi or windows takes one sample a row")
        packs = False

    def loader(split, batch_size, is_train=False):
        dataset = SFTDataset(
            args.dev_dataset_path if split == "dev" and args.dev_dataset_path else args.dataset_name_or_path,
            tokenizer,
            src_length=args.src_length,
            max_length=args.max_length,
            split=split,
            progress=not args.disable_tqdm,
            options=RecordOptions.of(args),
        )
        return SFTLoader(
            dataset,
            batch_size,
            max_length=args.max_length,
            zero_padding=packs,
            greedy_zero_padding=packs and args.greedy_zero_padding,
            seed=args.seed,
            shuffle=is_train,
            pad_to_max_length=args.pad_to_max_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
            drop_last=is_train and args.dataloader_drop_last,
            pad_token_id=tokenizer.pad_token_id,
        )

    train = loader("train", args.per_device_train_batch_size, is_train=True) if args.do_train else None
    if train is not None:
        trainer.print_data("train", "records", train)
    dev = loader("dev", args.per_device_eval_batch_size) if args.do_eval else None
    test = loader("test", args.per_device_eval_batch_size) if args.do_predict else None
    return train, dev, test


def main(args: Args) -> None:
    # ====================================================================== 1. topology, output folder, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    checkpoint = find_checkpoint(args, topology) if args.do_train else None
    tokenizer = trainer.setup_tokenizer(args)
    train, dev, test = make_loaders(args, tokenizer)

    # ====================================================================== 2. model, and its replies before training
    model = parallel.from_pretrained(args.model_name_or_path, topology, low_bit=parallel.LowBit.of(args))
    trainer.set_recompute(model, args)
    model.neftune_noise_alpha = args.neftune_noise_alpha
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path, args)
    prefix_tokens = args.num_prefix_tokens if args.prefix_tuning else 0
    needed = {"max_length": args.max_length, "src_length + max_new_tokens": args.src_length + args.max_new_tokens}
    needed = {key: tokens + prefix_tokens for key, tokens in needed.items()}
    trainer.check_positions(model, args.model_name_or_path, needed)
    shown = range(min(3, len(dev.dataset)) if dev and args.do_train else 0)
    before = generate_replies(model, tokenizer, dev.dataset, shown, args) if shown else []
    recall_before = None
    if args.do_train and dev and args.eval_with_do_generation:
        recall_before = generation_metrics(model, tokenizer, dev.dataset, args)[0].get("eval_keyword_recall")

    def evaluate():
        metrics = trainer.evaluate(model, dev, args.max_evaluate_steps, topology)
        if args.eval_with_do_generation:
            generated, replies = generation_metrics(model, tokenizer, dev.dataset, args)
            metrics.update(generated)
            if args.save_generation_output and topology.rank == 0:
                write_replies(Path(args.output_dir) / "generated_output.json", dev.dataset, replies)
        return metrics

    if args.do_train:
        # ================================================================== 3. adapter, optimizer, output folder, log
        trainer.setup_adapter(model, args, checkpoint)
        run = trainer.setup_training(args, model, tokenizer, train, topology, checkpoint=checkpoint)
        optimizer, shards, log, checkpoints = run.optimizer, run.shards, run.log, run.checkpoints
        state, total, steps_per_epoch = run.state, run.total_steps, run.steps_per_epoch

        def step_size(batches):
            """What the mean is over: target tokens."""
            return sum(int((batch["labels"] != -100).sum()) for batch in batches)

        inputs = trainer.model_inputs  # what the model is called with

        def loss_of(losses, batch, size):
            """This micro-batch's part of the step's loss, from the model's losses (B, T)."""
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

        trainer.finish_training(run, model, args)
    else:
        if args.lora_path or args.prefix_path:
            trainer.setup_adapter(model, args)
            parallel.shard_adapters(model, topology)
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. evaluation, prediction, before and after
    if args.do_eval:
        metrics = evaluate()
        trainer.write_results(args.output_dir, "dev", metrics, topology)
        print(f"dev: {trainer.format_metrics(metrics)}")
        if recall_before is not None:
            recall = metrics["eval_keyword_recall"]
            print(f"keywords that the replies mention: before {100 * recall_before:.1f} %, after {100 * recall:.1f} %")
    if args.do_predict:
        metrics = trainer.evaluate(model, test, args.max_evaluate_steps, topology)
        generated, replies = generation_metrics(model, tokenizer, test.dataset, args)
        metrics.update(generated)
        trainer.write_results(args.output_dir, "test", metrics, topology)
        if topology.rank == 0:
            write_replies(Path(args.output_dir) / "predictions.jsonl", test.dataset, replies)
        print(f"test: {trainer.format_metrics(metrics)}")
    if before:
        after = generate_replies(model, tokenizer, dev.dataset, shown, args)
        trainer.print_replies([dev.dataset.prompt_text(i) for i in shown], before, after)
    if args.do_train:
        print(f"\nnext: python serve.py --model_name_or_path {shlex.quote(args.output_dir)}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
