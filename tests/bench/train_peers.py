"""bench_qlora.py's figures of peft: a step of LoRA (rank 8, alpha 16, every linear of the blocks) with AdamW.

    PYTHON_OF_PEFT tests/bench/train_peers.py --model SMOLLM2 --base fp32 --batch 2 --seq 256

--base bf16: a model all in bfloat16, with adapters in float32 as peft makes them. nf4, nf4_bf16: bitsandbytes' nf4
without double quantization, with products in float32 or bfloat16. Each repetition waits for a line on stdin; lines and
the keys of the last are among bench_train.py's. Needs torch, transformers and peft, and for nf4 bitsandbytes.
"""

import argparse
import json
import os
import resource
import sys
import time

THREADS = min(2, len(os.sched_getaffinity(0)))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(THREADS)}

import torch
import transformers
from peft import LoraConfig, get_peft_model

torch.set_num_threads(THREADS)
transformers.utils.logging.set_verbosity_error()


def load(folder, base):
    """A model with LoRA; all of its weights but those of nf4 in one type."""
    bf16, keys = base.endswith("bf16"), {}
    if base.startswith("nf4"):
        kind = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32)
        keys["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, **kind)
    kind = torch.bfloat16 if bf16 else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **keys)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base", required=True, choices=["fp32", "bf16", "nf4", "nf4_bf16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--reps", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load(options.model, options.base).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(10, model.config.vocab_size, (options.batch, options.seq))
    seconds, losses = [], []
    for i in range(options.reps + 1):
        if i:
            sys.stdin.readline()
        start = time.perf_counter()
        for _ in range(1 if i else 2):  # two steps of warm-up
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        took = time.perf_counter() - start
        print(f"rep {i}: {took:.3f} s" if i else "warm-up", flush=True)
        seconds += [took] if i else []
    assert losses[-1] < losses[0], losses
    result = {"peer": "peft", "base": options.base, "seconds": seconds, "trainable": sum(p.numel() for p in trained)}
    result |= {"loss": [losses[0], losses[-1]]}
    result["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
