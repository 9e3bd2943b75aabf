"""Writes tests/golden/families.npz: numbers of every family of families.py, by this implementation. Run by hand:

    python tests/golden/make_families_golden.py

They guard against change, not against an error that was always there. What says that they are right: when they were
recorded, test_families.py found all the goldens of ../shared (the families' own software) equal within 1e-4, and, with
--hf-python, transformers equal on these very weights.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "ranks")]
import numpy as np
import paddle
from test_model import gradients
from tiny_models import NAMES, build

import model as M

STEPS = 6


def record(name, every_logit=False):
    """{"logits", "loss", "norms" (of each weight's gradient, in the table's order), "generated"} of one family."""
    from test_families import samples_of

    model, (ids, labels) = build(name), samples_of(name)
    ids, labels = paddle.to_tensor(ids), paddle.to_tensor(labels)
    logits = model(ids)
    loss = model(ids, labels=labels).sum() / float((labels != -100).sum())
    loss.backward()
    norms = np.array([np.linalg.norm(g) for g in gradients(model).values()], np.float32)
    logits = logits.numpy() if every_logit else logits.numpy()[:, ::4, ::3]
    return {
        "logits": logits,
        "loss": np.float32(float(loss)),
        "norms": norms,
        "generated": M.generate(model, ids.numpy(), STEPS),
    }


if __name__ == "__main__":
    arrays = {f"{name}/{key}": value for name in NAMES for key, value in record(name).items()}
    path = ROOT / "tests" / "golden" / "families.npz"
    np.savez_compressed(path, **{key: v.astype(np.int16) if v.dtype.kind == "i" else v for key, v in arrays.items()})
    print(f"{path}: {path.stat().st_size:,} bytes, {len(NAMES)} families")
