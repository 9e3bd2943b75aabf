"""Writes what peft computes with the adapters of peft_cases.py. Run by hand, or by test_adapters.py with --hf-python:

    cd /tmp && PYTHON_WITH_TORCH_TRANSFORMERS_PEFT /path/to/tests/golden/make_peft_golden.py [FOLDER]

With FOLDER, the adapters' folders as peft saves them and results.npz; without, both packed into peft_options.npz. For
each: logits (of the last positions) of the adapter as peft opens it, after merging, and after a step of plain descent.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
from golden_weights import draw, inputs
from make_golden import fresh_model
from peft_cases import OPTIONS, SOME

LEARNING_RATE = 0.05
LAST = 2  # positions of each row whose logits are kept


def resized(name, options):
    """A new base model, with more ids if `resize` asks for them: the same rows each time."""
    model = fresh_model(name)
    if added := options.get("resize"):
        torch.manual_seed(1)
        model.resize_token_embeddings(model.config.vocab_size + added, mean_resizing=False)
    return model


def make(name, folder, bases):
    """Save an adapter with random values in it; returns what peft computes when it opens it."""
    base, options = OPTIONS[name]
    config = {k: v for k, v in options.items() if k not in ("resize", "write", "bin")}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, **{"target_modules": SOME, **config})
    torch.manual_seed(0)
    model = resized(base, options)
    model.name_or_path = model.config._name_or_path = str(bases / base)
    if not (bases / base).is_dir():
        fresh_model(base).save_pretrained(bases / base)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in key:
                noise = torch.from_numpy(draw({key: tuple(parameter.shape)}, seed=3)[key]).reshape(parameter.shape)
                if "magnitude" in key:
                    parameter *= 1 + 0.2 * (noise - 1)
                else:
                    parameter += noise * (0.3 if "lora" in key else 0.2)
    model.save_pretrained(folder, safe_serialization="bin" not in options)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    saved = {**json.loads(path.read_text()), **options.get("write", {})}
    for key in ("target_modules", "exclude_modules"):  # sets over there, in another order each time
        saved[key] = sorted(saved[key]) if isinstance(saved[key], list) else saved[key]
    path.write_text(json.dumps({**saved, "base_model_name_or_path": None}, indent=1) + "\n")
    return computed(base, options, folder)


def computed(base, options, folder):
    """{logits, merged, stepped} of an adapter's folder as peft opens it."""
    ids, labels, _, _ = (torch.from_numpy(a) for a in inputs())

    def logits(model):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    def opened(**more):
        return peft.PeftModel.from_pretrained(resized(base, options), folder, **more).eval()

    results, model = {}, opened()
    with torch.no_grad():
        results["logits"] = logits(model)[:, -LAST:].numpy()
    try:
        with torch.no_grad():
            results["merged"] = logits(model.merge_and_unload())[:, -LAST:].numpy()
    except RuntimeError as error:
        assert "lora_bias" in str(error)
    model = opened(is_trainable=True)
    out = logits(model)
    torch.nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), labels.reshape(-1)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.requires_grad:
                parameter -= LEARNING_RATE * parameter.grad
        results["stepped"] = logits(model)[:, -LAST:].numpy()
    return results


def main(folder=None):
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        out, arrays = Path(folder or temporary), {}
        for name in OPTIONS:
            for key, array in make(name, out / name, Path(temporary) / "bases").items():
                arrays[f"{name}/{key}"] = array
            if folder is None:
                arrays[f"{name}/config"] = (out / name / "adapter_config.json").read_text()
                file = next((out / name).glob("adapter_model.*"))
                arrays[f"{name}/{file.name}"] = np.frombuffer(file.read_bytes(), np.uint8)
            print(name, flush=True)
        target = Path(__file__).with_name("peft_options.npz") if folder is None else out / "results.npz"
        np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
