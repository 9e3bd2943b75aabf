"""bench_quantize.py's figures of other tools: same model, same calibration tokens, same scored tokens.

    PYTHON_OF_THE_TOOL tests/bench/quantize_peers.py --model SMOLLM2 TOOL:METHOD[:BITS[:GROUP]] …

    gptqmodel:gptq:4:64   gptqmodel:act_order:4:128   (run in float16, its kernel for a CPU)
    llmcompressor:gptq:4:64   llmcompressor:awq:4:128   llmcompressor:w8a8   llmcompressor:smooth_w8a8
    auto_round:200:4:64 (steps)     torchao:int8   torchao:int4:4:64   torchao:w8a8

Symmetric unless the tool has only the other (AWQ: with zero points). The quantized model is scored by the tool itself.
Each case has a process of its own. Needs torch, transformers and the tool, and of this project language_scores.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from language_scores import Scores, peak_gb, text_rows

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GPTQMODEL_CPU_WORKERS": "2"}


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def records(rows):
    return [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]


def gptqmodel(folder, rows, method, bits, group):
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    order = {"desc_act": method == "act_order"}
    config = QuantizeConfig(bits=bits, group_size=group, sym=True, **order, offload_to_disk=False)
    model, start = GPTQModel.load(folder, config, device="cpu"), time.perf_counter()
    model.quantize(records(rows), batch_size=2)
    seconds, peak = time.perf_counter() - start, peak_gb()
    with tempfile.TemporaryDirectory() as out:
        model.save(out)
        return GPTQModel.load(out, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH).model, seconds, peak


def llmcompressor(folder, rows, method, bits, group):
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    torch.Tensor.pin_memory = lambda tensor: tensor  # AWQ's cache pins its memory, which needs a GPU
    weights = {"num_bits": bits, "type": "int", "symmetric": method != "awq", "strategy": "group", "group_size": group}
    groups = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    int8 = {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}
    recipe = {
        "gptq": lambda: [GPTQModifier(**groups)],
        "awq": lambda: [AWQModifier(**groups)],
        "rtn": lambda: [QuantizationModifier(**groups)],
        "w8a8": lambda: [QuantizationModifier(**int8)],
        "gptq_w8a8": lambda: [GPTQModifier(**int8)],
        "smooth_w8a8": lambda: [SmoothQuantModifier(smoothing_strength=0.8), QuantizationModifier(**int8)],
    }[method]()
    model, start = load(folder), time.perf_counter()
    dataset = Dataset.from_list(records(rows))
    oneshot(model=model, dataset=dataset, recipe=recipe, max_seq_length=512, num_calibration_samples=len(rows))
    return model, time.perf_counter() - start, peak_gb()


def auto_round(folder, rows, method, bits, group):
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    batches = [{"input_ids": torch.tensor(row[None])} for row in rows]
    start = time.perf_counter()
    options = {"iters": int(method), "seqlen": 512, "nsamples": len(rows), "batch_size": 2, "device_map": "cpu"}
    tuner = AutoRound(model, tokenizer, bits=bits, group_size=group, sym=True, dataset=batches, **options)
    tuned, _ = tuner.quantize()
    return tuned.eval(), time.perf_counter() - start, peak_gb()


def torchao(folder, rows, method, bits, group):
    import torch
    import torchao.quantization as ao

    config = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "w8a8": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(group)),
    }[method]()
    model, start = load(folder), time.perf_counter()
    is_linear = lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ao.quantize_(model, config, filter_fn=is_linear)
    return model, time.perf_counter() - start, peak_gb()


def measure(folder, case):
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(2)
    torch.manual_seed(0)
    tool, method, bits, group = (case.split(":") + ["4", "64"][len(case.split(":")) - 2 :])[:4]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known, unseen = text_rows(lambda text: tokenizer.encode(text, add_special_tokens=False))
    model, seconds, peak = globals()[tool](folder, known, method, int(bits), int(group))
    right, scores = load(folder), Scores()
    with torch.no_grad():
        for row in unseen:
            ids = torch.tensor(row[None, :-1])
            scores.add(*(net(input_ids=ids).logits[0].float().numpy() for net in (model, right)), row[1:])
    return {"tool": tool, "case": case, **scores.figures(), "seconds": round(seconds, 1), "peak_gb": peak}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--model", required=True, help="folder of a float model")
    options = parser.parse_args()
    if len(options.cases) == 1:
        print(json.dumps(measure(options.model, options.cases[0])), flush=True)
    for case in options.cases if len(options.cases) > 1 else ():
        subprocess.run([sys.executable, __file__, "--model", options.model, case], check=False)
