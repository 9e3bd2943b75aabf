"""Embeddings: the hidden states of a text, pooled to one vector of length 1.

vector = embed(engine, token_ids, adapter=None, pooling="last").result()      # (D,) float32
"""

from concurrent.futures import Future

import numpy as np
import paddle

from formats.files import UserError
from serving.engine import Engine
from serving.runners import PagedRunner

POOLINGS = ("last", "mean")


def embed(engine: Engine, ids: list[int], adapter: str | None = None, pooling: str = "last") -> Future:
    """The Future of the vector (D,) float32; it is computed between two steps of the engine."""
    return engine.between_steps(lambda: pooled(engine, ids, adapter, pooling))


@paddle.no_grad()
def pooled(engine: Engine, ids: list[int], adapter: str | None, pooling: str) -> np.ndarray:
    """model.hidden_states of the ids, after the final norm: the last token's or the mean, divided by its length."""
    runner = engine.runner
    if not isinstance(runner, PagedRunner):
        raise UserError(
            "embeddings: this server's model gives no hidden states; it needs mode dynamic, and no ChatGLM-6B"
        )
    if adapter is not None and adapter not in runner.adapters:
        raise UserError(f"model: {adapter!r} was unloaded")
    if runner.adapters:
        runner.slices[:] = [(adapter, 0, len(ids))]
    hidden = runner.model.hidden_states(paddle.to_tensor([ids], dtype="int64"))  # (1, T, D)
    hidden = hidden[0].astype("float32").numpy()
    vector = hidden[-1] if pooling == "last" else hidden.mean(0, dtype=np.float64).astype(np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
