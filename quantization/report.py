"""The report of quantize.py: what quantizing costs, linear by linear and over the dev data; quant_report.json has it.

    with atomic_file(path, "wb") as file:
        before = evaluate(model, loader, max_batches, save_states=file)     # of the float model
    after = evaluate(model, loader, max_batches, float_states=read_states(path, model))    # quantized by now

The float model's hidden states before the head lie in a file of 4 * D bytes a token, from which its distributions are
computed again (see quantization/divergence.py); nothing of them is rounded or left out.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import paddle

from formats.files import UserError
from formats.weights import named_weights, stored_bytes
from model import CausalLM, block_linears
from quantization.divergence import token_scores
from trainer import Loader, eval_batches, eval_mode, model_inputs


def target_states(model: CausalLM, loader: Loader, max_batches: int | None) -> Iterator[tuple]:
    """(hidden states before the head (n, D), ids (n,)) of the target tokens of each batch of an evaluation."""
    with eval_mode(model):
        for index in eval_batches(loader, max_batches):
            inputs = model_inputs(loader.batch(*index))
            labels, rows = inputs.pop("labels").flatten(), inputs.pop("startend_row_indices", None)
            places = paddle.nonzero(labels != -100).flatten()
            x = model.hidden_states(**inputs, mask_rows=rows)
            yield x.reshape([-1, x.shape[-1]]).index_select(places), labels.index_select(places)


def evaluate(
    model: CausalLM,
    loader: Loader,
    max_batches: int | None = None,
    save_states: IO | None = None,
    float_states: np.ndarray | None = None,
) -> dict:
    """Loss, accuracy and perplexity per target token, as trainer.evaluate() has them.

    save_states: a binary file that gets the hidden states, float32, for read_states(). float_states (tokens, D): of the
    float model; adds the mean, median, 99th percentile and largest KL divergence of a token, in nats, and the share of
    tokens whose most likely successor is the same.
    """
    scores, tokens = [], 0
    for states, targets in target_states(model, loader, max_batches):
        if save_states is not None:
            save_states.write(states.astype("float32").numpy().data)
        end, right = tokens + len(targets), None
        if float_states is not None:
            right = paddle.to_tensor(np.array(float_states[tokens:end]))
        scores.append(token_scores(model, states, targets, right))
        tokens = end
    if not tokens:
        raise UserError("evaluation: the data has no target token")
    loss, right, divergence, same = np.concatenate(scores, 1).astype(np.float64)
    mean = float(loss.mean())
    ppl = math.exp(mean) if mean < 700 else math.inf
    metrics = {"eval_loss": mean, "eval_accuracy": float(right.mean()), "eval_ppl": ppl, "eval_tokens": tokens}
    if float_states is not None:
        metrics |= {"kl_mean": float(divergence.mean()), "kl_median": float(np.median(divergence))}
        metrics |= {"kl_p99": float(np.percentile(divergence, 99)), "kl_max": float(divergence.max())}
        metrics["top1_agreement"] = float(same.mean())
    return metrics


def read_states(path: str | Path, model: CausalLM) -> np.ndarray:
    """(tokens, D) float32: what evaluate() has saved, read from the file as it is used."""
    return np.memmap(path, np.float32, "r").reshape(-1, model.config.hidden_size)


def stored_bits(model: CausalLM) -> dict[str, float]:
    """{Hugging Face path of a quantized linear: bits a weight in the file}: codes, scales, zeros, group numbers."""
    bits, linears = {}, block_linears(model)
    for weight in named_weights(model):
        path = weight.name.rpartition(".")[0]
        if weight.stored is not None:
            layer = linears[path][2]
            bits[path] = bits.get(path, 0.0) + 8 * stored_bytes(weight.shape, weight.stored) / (
                layer.n_in * layer.n_out
            )
    return bits


def formats_table(rows: list[dict]) -> list[str]:
    """Lines of the console: per format the linears, bits a weight, and errors; rows are those of the report."""
    lines = [f"{'format':<8} {'linears':>8} {'bits a weight':>14} {'mean error':>11} {'largest':>10}"]
    kinds = sorted({row["scheme"] for row in rows})
    for kind in [*kinds, "all"] if len(kinds) > 1 else kinds:
        some = [row for row in rows if kind in (row["scheme"], "all")]
        worst = max(some, key=lambda row: row["error"])
        mean = float(np.mean([row["error"] for row in some]))
        lines.append(
            f"{kind:<8} {len(some):>8} {mean_bits(some):>14.3f} {100 * mean:>9.3f} % {100 * worst['error']:>8.3f} %"
            f"  {worst['linear']}"
        )
    return lines


def mean_bits(rows: list[dict]) -> float:
    """Bits a weight over linears; a linear counts by its weights."""
    weights = [math.prod(row["shape"]) for row in rows]
    return float(np.average([row["bits_per_weight"] for row in rows], weights=weights))


def comparison_table(before: dict, after: dict) -> list[str]:
    """Lines of the console: the dev data before and after, and how far the distributions moved."""
    lines = []
    for key, name in (("eval_ppl", "perplexity"), ("eval_accuracy", "token accuracy")):
        was, now = before[key], after[key]
        lines.append(f"dev {name}: {was:.4f} -> {now:.4f} ({100 * (now / was - 1) if was else 0.0:+.2f} %)")
    lines.append(
        f"dev KL divergence to the float model: mean {after['kl_mean']:.5f}, median {after['kl_median']:.5f}, "
        f"99 % of tokens below {after['kl_p99']:.4f}, largest {after['kl_max']:.3f}"
    )
    agreement = 100 * after["top1_agreement"]
    return [*lines, f"dev same most likely token: {agreement:.2f} % of {after['eval_tokens']:,}"]
