"""One GRPO step: generate, reward, update. Ours, ours without the engine, or TRL's; one after the other, not at once.

    python tests/bench/bench_rl.py --config A                             # 4 prompts of 128 ids x 8 replies of 128 ids
    python tests/bench/bench_rl.py --config A --dtype bf16                # products in bfloat16
    python tests/bench/bench_rl.py --config A --naive                     # model.generate() in place of the engine
    python tests/bench/bench_rl.py --config A --trl ~/.cache/llm-peers/hf/bin/python              # TRL's GRPOTrainer

Models, shapes and threads are those of bench_train.py (random weights: the speed does not depend on them). All weights
are trained in float32, with --dtype bf16 by products in bfloat16 (TRL: bf16 autocast), one update a rollout, no KL, no
end token, so that every reply has --new ids. TRL generates with transformers, as it does on a CPU. One step warms up,
--reps are measured. The last line is one JSON object with the same keys in all three: `seconds` of a step, `generate`
of them in generation, and the process's peak memory.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from unittest import mock

import paths  # noqa: F401

THREADS = 2
if __name__ == "__main__":  # read once, when Paddle is first imported
    os.environ["OMP_NUM_THREADS"] = str(THREADS)

import kernels

import bench_train
import numpy as np
import paddle

import rl
import trainer
from adapters import trainable_weights
from alignment import rl_math, rollouts
from alignment.heads import Policy
from alignment.rewards import RewardFunction
from model import generate
from parallel import SINGLE

PROMPTS, REPLIES = 4, 8

TRL = """
import json, resource, sys, time
given = json.loads(sys.argv[1])
import torch, transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
torch.set_num_threads(given["threads"]); torch.manual_seed(0)
V = given["config"]["vocab_size"]
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w1"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w1", eos_token="w2")
model = LlamaForCausalLM(LlamaConfig(**given["config"], pad_token_id=0, bos_token_id=1, eos_token_id=None))
prompts = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in given["prompts"]]
times, generated = [], []
generate = model.generate

def timed_generate(*args, **kwargs):
    start = time.perf_counter()
    try: return generate(*args, **kwargs)
    finally: generated.append(time.perf_counter() - start)

model.generate = timed_generate

class Timed(GRPOTrainer):
    def training_step(self, *args, **kwargs):
        start = time.perf_counter()
        try: return super().training_step(*args, **kwargs)
        finally: times.append(time.perf_counter() - start)

N = given["rows"]
args = GRPOConfig(output_dir="/tmp/trl_grpo", use_cpu=True, bf16=given["bf16"], report_to=[],
    gradient_checkpointing=False,
    per_device_train_batch_size=N, num_generations=given["replies"], max_completion_length=given["new"], beta=0.0,
    max_steps=given["reps"] + 1, learning_rate=1e-6, save_strategy="no", disable_tqdm=True, logging_steps=10**6,
    generation_kwargs={"min_new_tokens": given["new"]}, temperature=1.0, shuffle_dataset=False)
trainer = Timed(model, reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
    args=args, train_dataset=Dataset.from_list(prompts * 8), processing_class=tokenizer)
trainer.train()
assert set(trainer._metrics["train"]["completions/mean_length"]) <= {float(given["new"])}
print(json.dumps({"seconds": times[1:], "generate": generated[1:],
                  "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}))
"""


class Prompts:
    """What rollouts.RolloutMaker reads of a dataset: PROMPTS prompts of `length` random ids."""

    def __init__(self, config, length):
        generator = np.random.default_rng(0)
        self.rows = [np.array(bench_train.random_ids(config, length, generator)) for _ in range(PROMPTS)]
        self.longest, self.reader, self.toolbox = length, None, None

    def ids(self, i):
        return self.rows[i]

    def numbers_of(self, rollout, count, seed):
        return list(range(count))

    def record(self, i):
        return {}

    def text(self, i):
        return ""

    def where(self, i):
        return f"prompt {i}"


def naive_groups(maker):
    """A function in place of RolloutMaker's generation: model.generate(), one batch, no engine."""

    def make(number, batch):
        prompts = np.concatenate([np.repeat(ids[None], REPLIES, 0) for ids in maker.dataset.rows]).astype(np.int64)
        with trainer.eval_mode(maker.model):
            out = generate(maker.model, prompts, maker.args.max_dec_len, do_sample=True, seed=number)[
                :, prompts.shape[1] :
            ]
        groups = []
        for g, ids in enumerate(maker.dataset.rows):
            replies = [rollouts.Reply(r.tolist(), np.zeros(len(r)), "") for r in out[g * REPLIES : (g + 1) * REPLIES]]
            groups.append(rollouts.Group(g, ids, replies))
        return groups

    return make


def ours(options):
    """{"seconds", "generate": of each step after a warm-up, "peak_rss_mb"}"""
    kernels.configure("cpu", "auto", options.dtype == "bf16")
    paddle.base.core.set_num_threads(THREADS)
    model, _ = bench_train.load_model(options.config)
    values = dict(model_name_or_path="-", train_datasets="-", reward_funcs="-", output_dir="-", do_train=True)
    args = rl.Args(**values, global_batch_size=PROMPTS, rollout_n=REPLIES, max_dec_len=options.new, kl_loss_coeff=0.0)
    args.learning_rate, args.per_device_train_batch_size = 1e-6, 1
    args.bf16, args.rollout_dtype = options.dtype == "bf16", options.rollout_dtype
    args.check()
    tokenizer = mock.Mock(
        pad_token_id=0, stop_ids=[], stream_decoder=lambda *_: mock.Mock(push=lambda i: "", flush=str)
    )

    def reward(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    functions = [RewardFunction("reward", reward)]
    dataset = Prompts(options.config, options.prompt)
    engine = rollouts.make_engine(args, model, tokenizer, dataset, None, SINGLE)
    maker = rollouts.RolloutMaker(args, model, tokenizer, dataset, functions, SINGLE, engine)
    if options.naive:
        maker._generate = naive_groups(maker)
    policy, weights = Policy(model, 1.0), trainable_weights(model)
    optimizer, seconds, generated = trainer.AdamW(weights, args), [], []
    model.train()
    for number in range(options.reps + 1):
        start = time.perf_counter()
        rollout = maker.make(number)
        counts = rl_math.Counts(*rl.counts_of(rollout.mini_batches[0]))
        for batch in rollout.mini_batches[0]:
            outputs = policy(**trainer.model_inputs(batch))
            loss, _ = rl.loss_and_metrics(outputs, batch, counts, args)
            loss.backward()
        clip = trainer.clip_scale(bench_train.global_grad_norm(weights), args.max_grad_norm)
        optimizer.step(args.learning_rate, clip)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        generated.append(rollout.metrics["time/generate"])
    assert rollout.metrics["completions/mean_length"] == options.new, rollout.metrics
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"seconds": seconds[1:], "generate": generated[1:], "peak_rss_mb": peak}


def trl(options):
    """The same of TRL's GRPOTrainer, in another process."""
    prompts = [ids.tolist() for ids in Prompts(options.config, options.prompt).rows]
    config = {**bench_train.COMMON, **bench_train.SHAPES[options.config]}
    config = {key: value for key, value in config.items() if key != "model_type"}
    given = {"config": config, "prompts": prompts, "rows": PROMPTS * REPLIES, "replies": REPLIES}
    given |= {"bf16": options.dtype == "bf16", "new": options.new, "reps": options.reps, "threads": THREADS}
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    command = [os.path.expanduser(options.trl), "-c", TRL, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tempfile.gettempdir())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    """Run it; prints and returns the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="A", choices=list(bench_train.SHAPES))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rollout_dtype", help="rl.py's key: of the weights that the engine packs")
    parser.add_argument("--reps", type=int, default=1, help="measured steps, after one that warms up")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--naive", action="store_true", help="generate by model.generate(), as one batch")
    kind.add_argument("--trl", metavar="PYTHON", help="a Python with TRL, whose trainer is measured in place of ours")
    options = parser.parse_args(argv)
    found = trl(options) if options.trl else ours(options)
    peer = "trl" if options.trl else "naive" if options.naive else "ours"
    result = {"peer": peer, "task": "grpo", "config": options.config, "dtype": options.dtype}
    result |= {"rollout_dtype": options.rollout_dtype, "prompt": options.prompt, "new": options.new}
    result |= {"threads": THREADS, **found, "seconds": bench_train.summary(found["seconds"])}
    result["generate"] = round(statistics.median(found["generate"]), 3)
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
