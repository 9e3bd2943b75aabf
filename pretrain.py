"""Text corpora -> a base model: pretraining from scratch or continued.

    python data.py corpus CORPUS.jsonl --tokenizer demo/llama --output data/PREFIX    # once: PREFIX.bin and PREFIX.idx
    python pretrain.py configs/llama_pretrain.json                                    # any key again as --key value

Reads Megatron's and PaddleNLP's token files by memory map. From scratch, `model_name_or_path` is a folder with
config.json and the tokenizer, or the name of a published model; with `continue_training` the folder has weights too.
`--dry_run true` prints shapes, parameters, FLOPs and memory per rank; it needs neither data nor weights. The run writes
a Hugging Face folder and ends with held-out perplexity.
"""

import dataclasses
import functools
import math
import shlex
import time

import kernels  # noqa: F401, before paddle: it silences what paddle prints at import

import parallel
import trainer
from arguments import TrainingArgs
from checkpoint import find_checkpoint
from data import CorpusLoader
from formats.files import UserError
from formats.weights import init_weights
from model import CausalLM, build
from planning.presets import find_preset, model_config


@dataclasses.dataclass
class Args(TrainingArgs):
    model_name_or_path: str = ""  # folder with config.json (and weights to continue from), or a published model's name
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    continue_training: bool = False  # start from the weights in model_name_or_path
    num_hidden_layers: int | None = None  # instead of the number in config.json; from scratch only
    input_dir: str = ""  # a folder of token files, one prefix, or a blend "weight1 prefix1 weight2 prefix2"
    split: str = "949,50,1"  # train, dev and test shares of the documents
    max_seq_length: int = 1024  # tokens of one sample; samples run across documents
    mask_across_documents: bool = False  # documents of a sample do not see each other; positions restart in each

    def check(self) -> list[str]:
        for key in ("model_name_or_path", "input_dir"):
            if not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.continue_training and self.num_hidden_layers:
            raise UserError(
                "continue_training keeps the model's layers; num_hidden_layers is for training from scratch"
            )
        if self.do_train and self.max_steps <= 0:
            raise UserError("max_steps: missing; pretraining needs a number of steps")
        return super().check()

    def check_model(self) -> None:
        """From scratch, a published model's name gives the configuration if the tokenizer is somewhere else."""
        from_scratch = self.do_train and not self.continue_training
        if from_scratch and self.tokenizer_name_or_path and find_preset(self.model_name_or_path):
            return dataclasses.replace(self, model_name_or_path=self.tokenizer_name_or_path).check_model()
        return super().check_model()


def new_model(args: Args, topology: parallel.Topology) -> CausalLM:
    """A model with random weights, as its config.json or published configuration says, on this process's part."""
    config = model_config(args.model_name_or_path)
    config = dataclasses.replace(
        config,
        num_hidden_layers=args.num_hidden_layers or config.num_hidden_layers,
        max_position_embeddings=max(config.max_position_embeddings, args.max_seq_length),
    )
    model = parallel.parallelize(build(config), topology)
    init_weights(model, args.seed)
    return model


def main(args: Args) -> None:
    # ====================================================================== 1. topology, output folder, tokenizer, data
    topology = parallel.init_parallel(args)
    trainer.check_output_dir(args)
    checkpoint = find_checkpoint(args, topology) if args.do_train else None
    tokenizer = trainer.setup_tokenizer(args)

    def corpus(which, num_samples, batch_size):
        return CorpusLoader(
            args.input_dir,
            args.split,
            which=which,
            num_samples=num_samples,
            seq_length=args.max_seq_length,
            batch_size=batch_size,
            seed=args.seed,
            eos_token_id=tokenizer.eos_token_id,
            mask_across_documents=args.mask_across_documents,
            shuffle=which == "train",
        )

    samples = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * topology.data_size
    train = corpus("train", samples, args.per_device_train_batch_size) if args.do_train else None
    dev = corpus("valid", None, args.per_device_eval_batch_size) if args.do_eval else None
    test = corpus("test", None, args.per_device_eval_batch_size) if args.do_predict else None

    # ====================================================================== 2. model
    if args.continue_training or not args.do_train:
        model = parallel.from_pretrained(args.model_name_or_path, topology)
    else:
        model = new_model(args, topology)
        print("model: trained from scratch, its weights are random")
    trainer.set_recompute(model, args)
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path)
    trainer.check_positions(model, args.model_name_or_path, {"max_seq_length": args.max_seq_length})

    if args.do_train:
        # ================================================================== 3. optimizer, output folder, log
        run = trainer.setup_training(
            args,
            model,
            tokenizer,
            train,
            topology,
            checkpoint=checkpoint,
            flops_per_token=model.flops_per_token(args.max_seq_length),
        )
        optimizer, shards, log, checkpoints = run.optimizer, run.shards, run.log, run.checkpoints
        state, total, steps_per_epoch = run.state, run.total_steps, run.steps_per_epoch

        def evaluate():
            return trainer.evaluate(model, dev, args.max_evaluate_steps, topology)

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
        trainer.prepare_output_dir(args, topology)

    # ====================================================================== 5. held-out perplexity
    for name, loader in (("dev", dev), ("test", test)):
        if loader is not None:
            metrics = trainer.evaluate(model, loader, args.max_evaluate_steps, topology)
            trainer.write_results(args.output_dir, name, metrics, topology)
            uniform = math.log(model.config.vocab_size)
            print(
                f"{name}: perplexity {metrics['eval_ppl']:.3f}, loss {metrics['eval_loss']:.4f} "
                f"(uniform: {uniform:.2f}), accuracy {metrics['eval_accuracy']:.4f} "
                f"over {metrics['eval_tokens']:,} tokens"
            )
    if args.do_train:
        folder = shlex.quote(args.output_dir)
        print(f"next: python finetune.py configs/llama_lora.json --model_name_or_path {folder}")


if __name__ == "__main__":
    trainer.run_script(main, Args)
