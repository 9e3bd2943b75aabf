"""What a model says of a text without a reply: embeddings, and the log-probabilities of its tokens.

vector = embed(engine, token_ids, adapter=None, pooling="last").result()      # (D,) float32, of length 1
rows = prompt_logprobs(engine, token_ids, None, top=5).result()               # (id, log-probability, likeliest)
"""

from concurrent.futures import Future

import numpy as np
import paddle

from formats.files import UserError
from serving.engine import Engine
from serving.runners import PagedRunner

POOLINGS = ("last", "mean")
LOGIT_ROWS = 64  # tokens whose logits are held at once


def embed(engine: Engine, ids: list[int], adapter: str | None = None, pooling: str = "last") -> Future:
    """The Future of the vector (D,) float32; it is computed between two steps of the engine."""
    return engine.between_steps(lambda: pooled(engine, ids, adapter, pooling))


def prompt_logprobs(engine: Engine, ids: list[int], adapter: str | None, top: int) -> Future:
    """The Future of [(id, its log-probability, [(id, log-probability) of the `top` likeliest])], one a token; the first
    token has None for both. It is computed between two steps of the engine."""
    return engine.between_steps(lambda: scored(engine, ids, adapter, top))


@paddle.no_grad()
def scored(engine: Engine, ids: list[int], adapter: str | None, top: int) -> list[tuple]:
    hidden, rows = hidden_states(engine, ids, adapter, "logprobs"), [(ids[0], None, None)]
    for first in range(0, len(ids) - 1, LOGIT_ROWS):
        nexts = ids[first + 1 : first + 1 + LOGIT_ROWS]
        logits = engine.runner.model.logits(hidden[first : first + len(nexts)]).astype("float32").numpy()
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits, dtype=np.float64).sum(-1, keepdims=True))
        for row, token in zip(logprobs, nexts):
            likeliest = np.argsort(-row, kind="stable")[:top]
            rows.append((token, float(row[token]), [(int(i), float(row[i])) for i in likeliest]))
    return rows


@paddle.no_grad()
def pooled(engine: Engine, ids: list[int], adapter: str | None, pooling: str) -> np.ndarray:
    """model.hidden_states of the ids, after the final norm: the last token's or the mean, divided by its length."""
    hidden = hidden_states(engine, ids, adapter, "embeddings").astype("float32").numpy()
    vector = hidden[-1] if pooling == "last" else hidden.mean(0, dtype=np.float64).astype(np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def hidden_states(engine: Engine, ids: list[int], adapter: str | None, what: str) -> paddle.Tensor:
    """(T, D) after the final norm."""
    runner = engine.runner
    if not isinstance(runner, PagedRunner):
        raise UserError(f"{what}: this server's model gives no hidden states; it needs mode dynamic, and no ChatGLM-6B")
    if runner.weights_are_free:
        raise UserError(f"{what}: the layers' weights were freed when they were packed; serve with --keep_weights true")
    if adapter is not None and adapter not in runner.adapters:
        raise UserError(f"model: {adapter!r} was unloaded")
    if runner.adapters:
        runner.slices[:] = [(adapter, 0, len(ids))]
    return runner.model.hidden_states(paddle.to_tensor([ids], dtype="int64"))[0]
