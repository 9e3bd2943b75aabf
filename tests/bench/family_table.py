"""Writes README's table of families: every cell of it is run on the tiny goldens of ../shared, none is assumed.

    python tests/bench/family_table.py            # all families, a few minutes; tests/RESULTS.md between the two marks
    python tests/bench/family_table.py bloom opt  # some, to the screen

A mark stands only where the cell ran on every golden of the family and passed; what failed is printed and has none. The
same functions (family_cells.py) are run by test_families.py on the configurations of families.py.
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
WHAT = {  # family: what stands in the table for it
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
    """Logits, hidden states, loss, gradients and left padding are the golden's; returns the differences."""
    found = cells.compare_with_golden(folder)
    limits = {"logits": 1e-4, "hidden": 1e-5, "loss": 1e-5, "norm": 1e-4, "gradients": 1e-4, "padded": 1e-4}
    assert all(found[key] < limit for key, limit in limits.items()), found
    return found


def save(folder, work):
    """Their files again, tensor by tensor, in their dialect of config.json."""
    formats.weights.save_pretrained(cells.golden_model(folder), work / "saved")
    theirs = {name: read() for name, (read, _) in formats.weights.stored_tensors(folder).items()}
    ours = {name: read() for name, (read, _) in formats.weights.stored_tensors(work / "saved").items()}
    assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    kept = json.loads((folder / "config.json").read_text())
    written = json.loads((work / "saved" / "config.json").read_text())
    assert all(written[key] == kept[key] for key in kept if key not in ("torch_dtype", "dtype"))


def packed(folder, work):
    """Samples packed behind one another by FlashMask rows, padded and alone: losses and every gradient."""
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
    """{cell: True, or the error}, and the numbers of the first."""
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
    """The text of the table."""
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
    for family, found in rows.items():
        if not found:
            continue
        marks = ["✓" if all(passed[cell] is True for passed, _ in found) else " " for cell in CELLS]
        numbers = [""] * 3
        if marks[0] == "✓":
            numbers = [
                f"{max(n[key] for _, n in found):.1e}".replace("e-0", "e-").replace("0.0e+00", "0")
                for key in ("logits", "loss", "norm")
            ]
        goldens = f"{WHAT[family]} ({len(found)})"
        lines.append("| " + " | ".join([f"`{family}`", goldens, *marks, *numbers]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if not cells.GOLDENS:
        sys.exit("error: ../shared/golden is not there")
    text = table(sys.argv[1:])
    print(text)
    if not sys.argv[1:]:
        readme = (ROOT / "tests" / "RESULTS.md").read_text(encoding="utf-8")
        before, after = readme.split(BEGIN)[0], readme.split(END)[1]
        (ROOT / "tests" / "RESULTS.md").write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
