"""Text corpora -> a base model: pretraining from scratch or continued.

    python data.py corpus CORPUS.jsonl --tokenizer demo/llama --output data/PREFIX      # once: text -> PREFIX.bin, PREFIX.idx
    python pretrain.py configs/llama_pretrain.json                                      # any key again as --key value

Reads Megatron/PaddleNLP token files by memory map. From scratch, `model_name_or_path` is a folder with config.json and the
tokenizer, or a name of configs/catalogue.json; with `continue_training` its weights too. `--dry_run true` counts alone:
shapes, parameters, FLOPs, memory a rank; neither data nor weights are needed. Ends with held-out perplexity and writes a Hugging Face folder.
"""

import dataclasses
import functools
import math
import time

import parallel
import trainer
from adapters import trainable_weights
from arguments import TrainingArgs
from checkpoint import CheckpointManager, TrainState, find_checkpoint, load_checkpoint, load_trained, update_best
from data import CorpusLoader
from distributed.sharding import ZeroOptimizer
from formats.files import UserError
from formats.tokenizer import load_tokenizer
from formats.weights import init_weights
from model import build
from plan import find_preset, model_config


@dataclasses.dataclass
class Args(TrainingArgs):
    model_name_or_path: str = (
        ""  # folder with config.json (and weights, to continue training); from scratch, a preset too
    )
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    continue_training: bool = False  # start from the weights in model_name_or_path
    num_hidden_layers: int | None = None  # another depth than config.json says, from scratch only
    input_dir: str = ""  # a folder of token files, one prefix, or a blend "weight1 prefix1 weight2 prefix2"
    split: str = "949,50,1"  # train, dev and test share of the documents
    max_seq_length: int = 1024  # tokens of one sample; samples run across documents
    mask_across_documents: bool = (
        False  # a document does not see those before it in the sample, and its positions restart
    )
    save_dtype: str = "float32"  # of the final model: float32, bfloat16 or float16

    def check(self):
        if not self.model_name_or_path or not self.input_dir:
            raise UserError(f"{'input_dir' if self.model_name_or_path else 'model_name_or_path'}: missing")
        if self.continue_training and self.num_hidden_layers:
            raise UserError(
                "continue_training keeps the model's layers; num_hidden_layers is for training from scratch"
            )
        if self.do_train and self.max_steps <= 0:
            raise UserError("max_steps: missing; pretraining needs a number of steps")
        if self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"save_dtype: {self.save_dtype!r}; possible are float32, bfloat16, float16")
        return super().check()

    def check_model(self):
        """A preset gives the configuration of a run from scratch, if the tokenizer is elsewhere."""
        scratch = self.do_train and not self.continue_training
        if scratch and self.tokenizer_name_or_path and find_preset(self.model_name_or_path):
            return dataclasses.replace(self, model_name_or_path=self.tokenizer_name_or_path).check_model()
        return super().check_model()


def main(args):
    # ====================================================================== 1. place on the grid, tokenizer, data
    topology = parallel.init_parallel(args)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.model_name_or_path)

    def corpus(which, num_samples, batch_size):
        return CorpusLoader(
            args.input_dir,
            args.split,
            which,
            num_samples,
            args.max_seq_length,
            batch_size,
            args.seed,
            tokenizer.eos_token_id,
            args.mask_across_documents,
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
        config = model_config(args.model_name_or_path)
        config = dataclasses.replace(
            config,
            num_hidden_layers=args.num_hidden_layers or config.num_hidden_layers,
            max_position_embeddings=max(config.max_position_embeddings, args.max_seq_length),
        )
        model = parallel.parallelize(build(config), topology)
        init_weights(model, args.seed)
    trainer.set_recompute(model, args)
    trainer.check_vocabulary(model, tokenizer, args.model_name_or_path)
    trainer.check_positions(model, args.model_name_or_path, {"max_seq_length": args.max_seq_length})
    trainer.prepare_output_dir(args, topology)
    print(f"model: {model.num_parameters():,} parameters, {'continued' if args.continue_training else 'from scratch'}")

    if args.do_train:
        # ================================================================== 3. optimizer, resume
        checkpoint = find_checkpoint(args, topology)
        weights = trainable_weights(model)
        shards = ZeroOptimizer(model, weights, topology)
        optimizer = trainer.AdamW(shards.pieces, args)
        total, steps_per_epoch = trainer.total_steps(args, train.batches_per_epoch, topology.data_size)
        state = TrainState()
        if checkpoint:
            load_trained(model, checkpoint, args)
            moments = None if args.ignore_load_lr_and_optim else optimizer
            state = load_checkpoint(checkpoint, moments, shards, args.output_dir)
        peak = trainer.measure_matmul_peak()
        print(f"matmul peak: {peak / 1e9:,.0f} GFLOP/s float32, measured; mfu is a share of it")
        log = trainer.Log(args, total, state, model.flops_per_token(args.max_seq_length), peak, topology)
        checkpoints = CheckpointManager(args, model, tokenizer, optimizer, shards, topology)

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
            load_trained(model, f"{args.output_dir}/{state.best_checkpoint}", args)
        log.close()
        checkpoints.write_model(args.output_dir, args.save_dtype)
        print(f"model: {args.output_dir}")

    # ====================================================================== 5. held-out perplexity
    for name, loader, wanted in (("dev", dev, args.do_eval), ("test", test, args.do_predict)):
        if wanted:
            metrics = trainer.evaluate(model, loader, args.max_evaluate_steps, topology)
            trainer.write_results(args.output_dir, name, metrics, topology)
            uniform = math.log(model.config.vocab_size)
            print(
                f"{name}: perplexity {metrics['eval_ppl']:.3f}, loss {metrics['eval_loss']:.4f} (uniform: {uniform:.2f}), "
                f"accuracy {metrics['eval_accuracy']:.4f} over {metrics['eval_tokens']:,} tokens"
            )


if __name__ == "__main__":
    trainer.run_script(main, Args)
