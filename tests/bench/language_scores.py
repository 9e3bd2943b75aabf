"""The text and the scores that bench_quantize.py and quantize_peers.py share; needs numpy alone.

Text: pydoc_data.topics of Python's standard library: the first 20 topics calibrate, the others are scored, in rows of
512 tokens.
"""

import resource
from pydoc_data.topics import topics

import numpy as np

T = 512  # tokens of a row


def text_rows(encode, calibration: int = 16, scored: int = 24) -> tuple:
    """((calibration, T), (scored, T)) int64; encode: text -> ids without special ones."""
    texts, found = list(topics.values()), []
    for part, count in ((texts[:20], calibration), (texts[20:], scored)):
        ids = np.array(encode("\n\n".join(part)), np.int64)
        found.append(ids[: len(ids) // T * T].reshape(-1, T)[:count])
    return tuple(found)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Scores:
    """Perplexity, and how far a model's distributions are from those of the float model, over rows that are added."""

    def __init__(self):
        self.parts = []

    def add(self, logits: np.ndarray, float_logits: np.ndarray, labels: np.ndarray) -> None:
        """logits, float_logits (n, V) float32; labels (n,)."""
        found, right = log_softmax(logits), log_softmax(float_logits)
        loss, float_loss = (-np.take_along_axis(x, labels[:, None], 1)[:, 0] for x in (found, right))
        divergence = (np.exp(right) * (right - found)).sum(-1)
        best = found.argmax(-1)
        self.parts.append((loss, float_loss, divergence, best == right.argmax(-1), best == labels))

    def figures(self) -> dict:
        """ppl, and the standard error of its ratio to the float model's, in % of that ratio, as if tokens were
        independent; kl: mean KL(float || model) in nats, and the 99th percentile; shares in %: top1 of tokens whose
        argmax is the float model's, accuracy of those whose argmax is the text's next token."""
        columns = (np.concatenate(part).astype(np.float64) for part in zip(*self.parts))
        loss, float_loss, divergence, same, right = columns
        found = {"ppl": np.exp(loss.mean()), "kl": divergence.mean(), "kl_p99": np.percentile(divergence, 99)}
        found["ppl_ratio_se"] = 100 * (loss - float_loss).std() / np.sqrt(len(loss))
        found |= {"top1": 100 * same.mean(), "accuracy": 100 * right.mean()}
        return {key: round(float(value), 4) for key, value in found.items()}


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
