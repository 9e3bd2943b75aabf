"""Tokens/s of DPO steps beside TRL and LLaMA-Factory: all weights or LoRA, reference included, on model A or B of
bench_train.py.

    python tests/bench/bench_dpo.py --kind full --peer PYTHON_WITH_TRL      # ours, then TRL, then the ratio
    python tests/bench/bench_dpo.py --kind lora --llama_factory PYTHON_WITH_IT

Four pairs a step, lognormal lengths with mean 90. Products in bfloat16 beside float32 weights, in all (theirs: bf16
autocast). The reference is computed at each step, by a second model or with the adapter off. The
prompt counts twice, for all. A step to warm up, then --reps steps; the fastest counts. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import paths  # noqa: F401, puts the repository on sys.path

if __name__ == "__main__":  # read once, when Paddle is first imported; its own default is one thread
    os.environ["OMP_NUM_THREADS"] = "2"

import kernels

import paddle
from bench_train import THREADS, Pairs, load_model, training_step

import dpo
import trainer
from adapters import adapter_disabled, apply_lora, cast_frozen_to_bf16, trainable_weights
from alignment.preference import batch_loss, model_inputs, pair_counts, reply_logps

PAIRS = 4  # of a step

CLOCK = """
class Clock(TrainerCallback):
    seconds = []
    def on_step_begin(self, *args, **kwargs):
        Clock.start = time.perf_counter()
    def on_step_end(self, *args, **kwargs):
        Clock.seconds.append(time.perf_counter() - Clock.start)

def text(ids):
    return " ".join(f"w{i}" for i in ids)
"""

TRL = (
    """
import json, os, sys, time
given = json.load(open(sys.argv[1]))
import torch
torch.set_num_threads(given["threads"])
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

def opened():
    return AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)

"""
    + CLOCK
    + """
rows = [{"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in given["pairs"]]
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
args = DPOConfig(output_dir=given["folder"], use_cpu=True, bf16=True, report_to=[], gradient_checkpointing=False,
                 per_device_train_batch_size=given["batch"], max_length=None, num_train_epochs=1, save_strategy="no",
                 train_sampling_strategy="sequential", learning_rate=1e-4, disable_tqdm=True, beta=0.1)
full = given["kind"] == "full"
trainer = DPOTrainer(opened(), ref_model=opened() if full else None, args=args, train_dataset=Dataset.from_list(rows),
                     processing_class=AutoTokenizer.from_pretrained(given["model"]), callbacks=[Clock()],
                     peft_config=None if full else lora)
trainer.train()
print(json.dumps(Clock.seconds))
"""
)

LLAMA_FACTORY = (
    """
import json, os, sys, time
os.environ["DISABLE_VERSION_CHECK"] = "1"
given = json.load(open(sys.argv[1]))
import torch
torch.set_num_threads(given["threads"])
from transformers import TrainerCallback
from llamafactory.train.tuner import run_exp

"""
    + CLOCK
    + """
rows = [dict(prompt=text(p), chosen=text(c), rejected=text(r)) for p, c, r in given["pairs"]]
json.dump(rows, open("pairs.json", "w"))
columns = dict(prompt="prompt", chosen="chosen", rejected="rejected")
json.dump({"pairs": dict(file_name="pairs.json", ranking=True, columns=columns)}, open("dataset_info.json", "w"))
full = given["kind"] == "full"
kind = dict(finetuning_type="full", ref_model=given["model"]) if full else dict(
    finetuning_type="lora", lora_rank=8, lora_alpha=16, lora_target="all")
run_exp(dict(model_name_or_path=given["model"], stage="dpo", do_train=True, template="empty", dataset="pairs",
             dataset_dir=".", cutoff_len=2048, output_dir="out", per_device_train_batch_size=given["batch"],
             num_train_epochs=1, learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to="none",
             use_cpu=True, bf16=True, disable_gradient_checkpointing=True, disable_shuffling=True, disable_tqdm=True,
             flash_attn="sdpa", preprocessing_num_workers=1, pref_beta=0.1, **kind), callbacks=[Clock()])
print(json.dumps(Clock.seconds))
"""
)


def ours(kind: str, config: str, pairs: Pairs, starts: list[int]) -> list[float]:
    """Seconds of a step on the four pairs from each of these on; the first is the warm-up."""
    model, _ = load_model(config)
    reference = None
    if kind == "full":
        reference = load_model(config)[0].eval()
        for weight in trainable_weights(reference):
            weight.parameter.stop_gradient = True
        cast_frozen_to_bf16(reference)
    else:
        apply_lora(model, rank=8, alpha=16)
        cast_frozen_to_bf16(model)
    args, weights = dpo.Args(beta=0.1, learning_rate=1e-4), trainable_weights(model)
    optimizer = trainer.AdamW(weights, args)
    model.train()

    def loss_of(model, batch):
        with paddle.no_grad():
            if kind == "full":
                base = reply_logps(reference, batch)
            else:
                with adapter_disabled(model):
                    base = reply_logps(model, batch)
        return batch_loss(model(**model_inputs(batch)), batch, base, pair_counts([batch]), args)[0]

    seconds = []
    for first in starts:
        start = time.perf_counter()
        training_step(model, weights, optimizer, pairs.batch(first, PAIRS), args, loss_of)
        seconds.append(time.perf_counter() - start)
    return seconds


def of_peer(python: str, script: str, kind: str, model: str, pairs: list) -> list[float]:
    """The same of TRL or LLAMA_FACTORY, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        plain = [[[int(i) for i in part] for part in pair] for pair in pairs]
        given = dict(kind=kind, model=model, pairs=plain, threads=THREADS, batch=PAIRS, folder=folder)
        path = f"{folder}/given.json"
        with open(path, "w") as file:
            json.dump(given, file)
        done = subprocess.run([python, "-c", script, path], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            sys.exit(f"{python}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["full", "lora"], required=True)
    parser.add_argument("--config", choices=["A", "B"], default="A")
    parser.add_argument("--peer", help="a Python with TRL and peft")
    parser.add_argument("--llama_factory", help="a Python with LLaMA-Factory")
    parser.add_argument("--reps", type=int, default=2, help="timed steps; at most 3, or 7 with B")
    options = parser.parse_args()
    kernels.configure("cpu", "auto", True)
    paddle.base.core.set_num_threads(THREADS)
    pairs = Pairs(options.config)
    starts = [PAIRS * i for i in range(options.reps + 1)]
    tokens = [sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs.pairs[s : s + PAIRS]) for s in starts]
    rates = {"ours": ours(options.kind, options.config, pairs, starts)}
    for name, python, script in (
        ("trl", options.peer, TRL),
        ("llama_factory", options.llama_factory, LLAMA_FACTORY),
    ):
        if python:
            model = load_model(options.config)[1]
            rates[name] = of_peer(python, script, options.kind, model, pairs.pairs[: starts[-1] + PAIRS])
    rates = {name: max(n / s for n, s in zip(tokens[1:], seconds[1:])) for name, seconds in rates.items()}
    found = {"kind": options.kind, "config": options.config, **{f"{k}_tok_s": round(v, 1) for k, v in rates.items()}}
    if len(rates) > 1:  # over the faster
        found["ratio"] = round(rates["ours"] / max(rate for name, rate in rates.items() if name != "ours"), 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
