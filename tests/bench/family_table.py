"""Writes the table of families in tests/RESULTS.md: every cell is run on the tiny goldens of ../shared.

    python tests/bench/family_table.py            # all families, a few minutes; writes between the marks
    python tests/bench/family_table.py bloom opt  # prints the rows of some families

A cell has a mark only if it passed on every golden of the family; a failure is printed. test_families.py runs the same
functions (family_cells.py) on the tiny models.
"""

import contextlib
import io
import json
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import paths

import family_cells as cells
import numpy as np

import families
import formats.weights

ROOT = paths.TESTS.parent

BEGIN, END = "<!-- families: written by tests/bench/family_table.py -->", "<!-- families end -->"
MODELS = {  # family: its published models
    "llama": "Llama 1, 2, 3, 3.x", "mistral": "Mistral, sliding window", "mixtral": "Mixtral",
        "qwen": "Qwen, dynamic NTK and logn",
    "qwen2": "Qwen1.5, 2, 2.5", "qwen2_moe": "Qwen1.5/2-MoE", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE",
        "baichuan": "Baichuan 1 and 2, 7B and 13B",
    "chatglm": "ChatGLM-6B", "chatglm2": "ChatGLM2, ChatGLM3, GLM-4-9B", "glm": "GLM-4, transformers' names",
        "glm4": "GLM-4-0414", "bloom": "Bloom",
    "gpt2": "GPT-2, GPT-3", "opt": "OPT, 350m too", "internlm": "InternLM", "internlm2": "InternLM2", "gemma": "Gemma",
        "gemma2": "Gemma 2",
    "deepseek_v2": "DeepSeek-V2, V2-Lite", "deepseek_v3": "DeepSeek-V3",
}  # fmt: skip


def load(folder, work):
    """Logits, hidden states, loss, gradients and left padding equal the golden's; returns the differences."""
    results = cells.compare_with_golden(folder)
    limits = {"logits": 1e-4, "hidden": 1e-5, "loss": 1e-5, "norm": 1e-4, "gradients": 1e-4, "padded": 1e-4}
    assert all(results[key] < limit for key, limit in limits.items()), results
    return results


def save(folder, work):
    """A saved model has the tensors of the golden's files, and the keys of its config.json."""
    formats.weights.save_pretrained(cells.golden_model(folder), work / "saved")
    theirs = {name: read() for name, (read, _) in formats.weights.stored_tensors(folder).items()}
    ours = {name: read() for name, (read, _) in formats.weights.stored_tensors(work / "saved").items()}
    assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    source_config = json.loads((folder / "config.json").read_text())
    written = json.loads((work / "saved" / "config.json").read_text())
    assert all(written[key] == source_config[key] for key in source_config if key not in ("torch_dtype", "dtype"))


def packed(folder, work):
    """Samples packed with FlashMask rows, padded, and single: losses and all gradients agree."""
    model = cells.golden_model(folder)
    source = model.config.source
    special = {
        "gmask": source.get("gmask_token_id"),
        "mask": source.get("mask_token_id"),
        "sop": source.get("bos_token_id"),
    }
    cells.assert_layouts_agree(
        model, cells.make_samples("chatglm" if model.config.position == "rope_2d" else "", special=special)
    )


def generate(folder, work):
    assert cells.golden_tokens(folder)


def script(kind):
    def cell(folder, work):
        base = work / "base"
        if not base.is_dir():
            shutil.copytree(folder, base)
            cells.give_tokenizer(base, work.parent / "world")
        if kind == "pretrain":
            cells.pretrain_and_go_on(base, work.parent / "world", work / kind)
        else:
            cells.tune(base, work.parent / "world", work / kind, kind)

    return cell


CELLS = {"load": load, "save": save, "SFT": script("sft"), "LoRA": script("lora"), "prefix": script("prefix"),
         "zero padding + FlashMask": packed, "generate": generate, "pretrain": script("pretrain")}  # fmt: skip


def run(folder, work):
    """({cell: True or the error}, the differences that `load` returns)."""
    passed, numbers = {}, {}
    for name, cell in CELLS.items():
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                numbers.update(cell(folder, work) or {})
            passed[name] = True
        except (Exception, SystemExit) as error:
            passed[name] = error
            print(
                f"{folder.name}: {name}: {error!r}\n{traceback.format_exc(limit=-2)}{output.getvalue()[-500:]}",
                file=sys.stderr,
            )
    return passed, numbers


def table(only=()):
    """The table in Markdown, of all families or some."""
    rows = {family: [] for family in families.FAMILIES}
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cells.make_world(Path(temporary) / "world")
        for folder in cells.GOLDENS:
            family = families.ModelConfig.from_json(folder).family
            if not only or family in only:
                print(folder.name, flush=True)
                rows[family].append(run(folder, Path(temporary) / folder.name))
    heads = ["family", "", *CELLS, "logits", "loss", "gradient norm"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for family, results in rows.items():
        if not results:
            continue
        marks = ["✓" if all(passed[cell] is True for passed, _ in results) else " " for cell in CELLS]
        numbers = [""] * 3
        if marks[0] == "✓":
            numbers = [
                f"{max(n[key] for _, n in results):.1e}".replace("e-0", "e-").replace("0.0e+00", "0")
                for key in ("logits", "loss", "norm")
            ]
        goldens = f"{MODELS[family]} ({len(results)})"
        lines.append("| " + " | ".join([f"`{family}`", goldens, *marks, *numbers]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if not cells.GOLDENS:
        sys.exit("error: ../shared/golden is not there")
    text = table(sys.argv[1:])
    print(text)
    if not sys.argv[1:]:
        results = (ROOT / "tests" / "RESULTS.md").read_text(encoding="utf-8")
        before, after = results.split(BEGIN)[0], results.split(END)[1]
        (ROOT / "tests" / "RESULTS.md").write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
