"""Writes tests/golden: what transformers and peft compute for the small models of golden_weights.py. Run by hand:

    cd /tmp && PYTHON_WITH_TORCH_TRANSFORMERS_PEFT /path/to/tests/golden/make_golden.py

(not from the repository root: transformers looks for a package called `kernels`, and would find ours). The tests do not
need torch. Everything in float32 on the CPU with eager attention.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from golden_weights import CASES, NEW, V, draw, inputs, shapes

GOLDEN = Path(__file__).resolve().parent
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}
PEFT = {  # name: (base model, PeftConfig)
    "lora": ("gqa", dict(r=4, lora_alpha=6)),
    "rslora": ("gqa", dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"])),
    "dora": ("bias_tied", dict(r=2, lora_alpha=5, use_dora=True)),
    "pissa": ("gqa", dict(r=2, lora_alpha=3, init_lora_weights="pissa")),
    "prefix": ("gqa", dict(num_virtual_tokens=5)),
    "prefix_projection": ("gqa", dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=20)),
}
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fresh_model(name):
    """A new model each time: transformers keeps the stretched frequencies of dynamic rope from one call to the next."""
    v4, v5 = copy.deepcopy(CASES[name])  # transformers writes into what it is given
    config_class, model_class = CLASSES[v5["model_type"]]
    config = config_class(**v5, attn_implementation="eager", pad_token_id=0)
    old = config_class(**{k: v for k, v in v4.items() if k != "torch_dtype"}).rope_parameters
    assert all(old[k] == v for k, v in v5["rope_parameters"].items()), f"{name}: the dialects differ: {old}"
    model = model_class(config).eval()
    wanted = {k: tuple(p.shape) for k, p in model.named_parameters()}
    assert wanted == shapes(v5), f"{name}: {set(wanted.items()) ^ set(shapes(v5).items())}"
    state = {k: torch.from_numpy(a) for k, a in draw(wanted).items()}
    model.load_state_dict(state, strict=False)
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def generate(name, ids, mask):
    """(B, T + NEW) ids of greedy decoding, which must be sure: another machine has to take the same way."""
    options = dict(max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    found = fresh_model(name).generate(ids, attention_mask=mask, **options)
    first, second = torch.stack(found.logits).topk(2).values.unbind(-1)
    assert (first - second).min() > 0.003, f"{name}: a close call, {(first - second).min():.5f}: take another seed"
    return found.sequences.numpy()


def model_golden(name):
    ids, labels, padded, mask = (torch.from_numpy(a) for a in inputs())
    model = fresh_model(name)
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))
    loss.backward()
    gradients = {k: p.grad.numpy() for k, p in model.named_parameters()}
    kept = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ]
    kept += [k for k in gradients if k in ("model.layers.0.mlp.down_proj.bias", "model.layers.1.self_attn.v_proj.bias")]
    kept += ["model.embed_tokens.weight"] if name == "bias_tied" else []
    stored = {
        "logits": logits.detach().numpy(),
        "loss": np.float32(loss.item()),
        "grad_names": np.array(list(gradients)),
        "grad_norms": np.array([np.linalg.norm(g) for g in gradients.values()], np.float32),
        **{f"grad:{k}": gradients[k] for k in kept},
        "generated": generate(name, ids, torch.ones_like(ids)),
    }
    with torch.no_grad():
        if "dynamic" in name:  # there, each row alone: transformers stretches all rows by the longest one
            rows = [padded[i : i + 1, mask[i] == 1] for i in range(len(padded))]
            padded_logits = torch.zeros(*padded.shape, V)
            for i, row in enumerate(rows):
                padded_logits[i, mask[i] == 1] = fresh_model(name)(row).logits[0]
            new = [generate(name, row, torch.ones_like(row))[0, -NEW:] for row in rows]
        else:
            padded_logits = fresh_model(name)(padded, attention_mask=mask, position_ids=positions(mask)).logits
            new = generate(name, padded, mask)[:, -NEW:]
    stored["padded_logits"] = padded_logits.numpy()[mask.numpy() == 1]
    stored["padded_generated"] = np.stack(new)
    print(f"{name:18s} logits have a standard deviation of {logits.std():.2f}")
    np.savez_compressed(
        GOLDEN / f"{name}.npz", config_v4=json.dumps(CASES[name][0]), config_v5=json.dumps(CASES[name][1]), **stored
    )


def peft_golden(name):
    """golden/peft_NAME: the adapter folder that peft saves, with random values in it, and the logits."""
    base, options = PEFT[name]
    torch.manual_seed(0)
    if "prefix" in name:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", **options)
    else:
        config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **{"target_modules": EVERY_LINEAR, **options})
    model = peft.get_peft_model(fresh_model(base), config).eval()
    folder, start = GOLDEN / f"peft_{name}", tempfile.mkdtemp()
    if name == "pissa":  # as peft's documentation says: the start is kept to convert to a plain LoRA at the end
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.from_numpy(draw({key: tuple(parameter.shape)}, seed=3)[key]).reshape(parameter.shape)
                if "magnitude" in key:
                    parameter *= 1 + 0.2 * (noise - 1)
                else:
                    parameter += noise * (0.3 if "lora" in key else 1.0)
    ids, _, padded, mask = (torch.from_numpy(a) for a in inputs())
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        plain = fresh_model(base)(ids).logits
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **({"path_initial_model_for_weight_conversion": start} if name == "pissa" else {}))
    (folder / "README.md").unlink(missing_ok=True)
    saved = json.loads((folder / "adapter_config.json").read_text())
    if "target_modules" in saved:  # a set over there, in another order each time
        saved["target_modules"] = sorted(saved["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=1) + "\n")
    shutil.rmtree(start)
    np.savez_compressed(folder / "golden.npz", base=base, logits=logits.numpy())
    print(f"peft_{name:18s} moves the logits by {(logits - plain).abs().mean():.2f}")


def bin_golden():
    """A torch file with every kind of storage that is read, a view with strides and an offset, a Parameter."""
    array = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
    torch.save(
        {
            "f32": array,
            "view": array.t()[1:4, ::2],
            "f16": array.half(),
            "bf16": array.bfloat16(),
            "f64": array.double(),
            "i64": torch.arange(5),
            "bool": torch.tensor([True, False]),
            "parameter": torch.nn.Parameter(array[1]),
            "scalar": torch.tensor(2.5),
        },
        GOLDEN / "tensors.bin",
    )


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        model_golden(case)
    for adapter in PEFT:
        peft_golden(adapter)
    bin_golden()
