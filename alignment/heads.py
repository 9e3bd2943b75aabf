"""A score head on the trunk of a language model: reward models, and the value function of PPO.

    model = load_reward_model(path, topology)         # any model's folder; the head is new unless the folder has one
    scores = ScoreModel(model)(input_ids, position_ids, startend_row_indices)      # (B, T) float32
    add_score_head(model, np.zeros(D))                # beside the language head: values of the policy

The head is one linear of D weights without a bias, `score.weight` in files. A reward model has it in place of the
language head and is saved as transformers' AutoModelForSequenceClassification with num_labels 1, or as an adapter of
peft's task type SEQ_CLS with modules_to_save ["score"].
"""

import dataclasses
from pathlib import Path

import kernels

import numpy as np
import paddle
from paddle import Tensor

from adapters import base_folders, load_adapter, lora_layers, merge
from families import FAMILIES, ModelConfig
from formats.files import UserError
from formats.tokenizer import Tokenizer, load_tokenizer
from formats.weights import load_weights, stored_tensors
from model import CausalLM, build
from modules.layers import Linear, set_parameter
from parallel import Topology, from_pretrained, parallelize, shard_adapters

CLASSIFIER = "ForSequenceClassification"  # the end of the architecture's name in config.json

ENTROPY_ROWS = 256  # tokens whose logits are held at once by entropies with a gradient


def add_score_head(model: CausalLM, weights: np.ndarray | None) -> None:
    """Give the model a head of these D weights; None: empty until it is loaded."""
    with paddle.LazyGuard():
        model.score = Linear(model.config.hidden_size, 1, bias=False)
    if weights is not None:
        set_parameter(model.score.weight, weights.reshape([-1, 1]).astype(np.float32))


def train_score_head(model: CausalLM) -> None:
    """Let the head have a gradient, and an adapter's folder hold it; after LoRA has been attached."""
    model.score.weight.stop_gradient = False
    if lora_layers(model):
        model.lora_config = {**model.lora_config, "modules_to_save": ["score"]}
        model.replaced_weights = {**model.replaced_weights, "score.weight": True}


def remove_score_head(model: CausalLM) -> None:
    """Make it a language model again, also for what is saved."""
    model.score = None
    if lora_layers(model):
        model.lora_config = {key: value for key, value in model.lora_config.items() if key != "modules_to_save"}
        model.replaced_weights = {k: v for k, v in model.replaced_weights.items() if k != "score.weight"}


def initial_score_weights(D: int, seed: int) -> np.ndarray:
    """(D,) Normal(0, 1 / (D + 1)), as Stiennon et al., arXiv 2009.01325, start a reward model's head."""
    return np.random.default_rng([seed, D]).standard_normal(D) / np.sqrt(D + 1)


def remove_language_head(model: CausalLM) -> None:
    """Make a model with a score head a classifier of one label, also in its config.json."""
    architecture = (model.config.source.get("architectures") or [FAMILIES[model.config.family].architecture])[0]
    for ending in ("ForCausalLM", "LMHeadModel", CLASSIFIER):
        if architecture.endswith(ending):
            name = architecture.removesuffix(ending) + CLASSIFIER
            break
    else:
        raise UserError(f"{architecture}: transformers has no classifier of this family, so no reward model is made")
    changes = {"architectures": [name], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    model.config = dataclasses.replace(model.config, source={**model.config.source, **changes})
    model.lm_head = None


def is_reward_model(path: str | Path) -> bool:
    """Whether a folder, or the base of an adapter's folder, holds a model with a score head."""
    folders = base_folders(path)
    names = ModelConfig.from_json(folders[-1]).source.get("architectures") or [""]
    has_head = names[0].endswith(CLASSIFIER)
    adapters = [folder / "adapter_model.safetensors" for folder in folders[:-1]]
    return has_head or any(
        "base_model.model.score.weight" in stored_tensors(file.parent, (file.name,)) for file in adapters
    )


def load_reward_model(path: str | Path, topology: Topology, seed: int | None = None) -> CausalLM:
    """A model with a score head in place of the language head, in eval mode.

    path: a reward model's folder or adapter; or, with a seed for the new head, a language model's. UserError: there is
    no head and no seed.
    """
    *adapters, base = base_folders(path)
    config = ModelConfig.from_json(base)
    if (config.source.get("architectures") or [""])[0].endswith(CLASSIFIER):
        model = parallelize(build(config), topology)
        add_score_head(model, None)
        remove_language_head(model)
        load_weights(model, base)
        adapters_left = adapters
    elif is_reward_model(path):
        model = from_pretrained(base, topology)
        add_score_head(model, np.zeros(config.hidden_size))
        remove_language_head(model)
        adapters_left = adapters
    elif seed is not None:
        model = from_pretrained(path, topology)
        add_score_head(model, initial_score_weights(config.hidden_size, seed))
        remove_language_head(model)
        adapters_left = []
    else:
        raise UserError(f"{path}: has no score head; reward.py makes a reward model of it")
    for adapter in reversed(adapters_left):
        load_adapter(model, adapter)
        shard_adapters(model, topology)
        merge(model)
    model.eval()
    return model


def check_same_tokenizer(key: str, path: str | Path, tokenizer: Tokenizer) -> None:
    """UserError unless the model that an argument `key` names has the policy's tokenizer."""
    if (theirs := load_tokenizer(path).vocab_size) != tokenizer.vocab_size:
        raise UserError(
            f"{key}: {path}: its tokenizer has {theirs} ids, the policy's {tokenizer.vocab_size}; one that shares the "
            "policy's tokenizer is needed"
        )


def scored_sample(prompt: np.ndarray, replies: list) -> tuple[np.ndarray, ...]:
    """Ids of a prompt and its replies -> input_ids, position_ids, rows, replies as one sequence, int64.

        prompt p1 .. pn, replies a1 .. aj, b1 .. bk
        input_ids     p1 .. pn       a1 ..   aj         b1 ..   bk
        position_ids  0 .... n-1     n ..    n+j-1      n ..    n+k-1
        rows          end of all     end of a           end of b           FlashMask: rows from there on do not see it
        replies       -1             -1 ...  0          -1 ...  1          the last token of a reply has its score

    So every token sees what it would see in a sequence of prompt and one reply, at the same positions.
    """
    n, lengths = len(prompt), np.array([len(reply) for reply in replies])
    ends = n + np.cumsum(lengths)
    numbers = np.full(ends[-1], -1)
    numbers[ends - 1] = np.arange(len(replies))
    input_ids = np.concatenate([prompt, *replies])
    positions = np.concatenate([np.arange(n), *(n + np.arange(length) for length in lengths)])
    rows = np.concatenate([np.full(n, ends[-1]), np.repeat(ends, lengths)])
    return tuple(array.astype(np.int64) for array in (input_ids, positions, rows, numbers))


# ============================================================================== what parallel.forward_backward calls


class HeadedModel:
    """A model, and what is computed from its hidden states. It stands in for the model in forward_backward()."""

    def __init__(self, model: CausalLM):
        self.model = model

    @property
    def topology(self) -> Topology:
        return self.model.topology

    @property
    def shards(self):
        return self.model.shards

    def train(self) -> None:
        self.model.train()

    def hidden_states(self, input_ids, position_ids, startend_row_indices) -> Tensor:
        """(B, T, D) after the final norm"""
        return self.model.hidden_states(input_ids, position_ids, startend_row_indices)

    def scores(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T) float32"""
        return kernels.linear(x, self.model.score.weight).squeeze(-1).astype("float32")


class ScoreModel(HeadedModel):
    """A reward model: ids -> a score at each position, of which the one at a reply's last token counts."""

    def __call__(self, input_ids, position_ids=None, startend_row_indices=None, labels=None) -> Tensor:
        return self.scores(self.hidden_states(input_ids, position_ids, startend_row_indices))


class Policy(HeadedModel):
    """A language model that samples with a temperature: ids -> log-probabilities, entropies, values.

    with_entropy: entropies with their gradient, by all logits of ENTROPY_ROWS tokens at a time. The log-probability of
    a token is that of softmax(logits / temperature).
    """

    def __init__(self, model: CausalLM, temperature: float, with_entropy: bool = False):
        super().__init__(model)
        self.temperature, self.with_entropy = temperature, with_entropy
        if with_entropy and model.shards is not None:
            model.shards.overlaps = False  # the head's weight gets a gradient from each chunk

    def __call__(
        self, input_ids, position_ids, startend_row_indices, labels, temperature: float | None = None
    ) -> dict[str, Tensor]:
        """Tensors of the M positions that have a label: "logps", and "entropies" and "values" if there are any.

        temperature: another one than that of sampling.
        """
        temperature = self.temperature if temperature is None else temperature
        x, (D,) = self.hidden_states(input_ids, position_ids, startend_row_indices), (self.model.config.hidden_size,)
        labels = labels.flatten()
        here = paddle.nonzero(labels != -100).flatten()  # (M,)
        outputs = {}
        if self.model.score is not None:
            outputs["values"] = paddle.gather(self.scores(x).flatten(), here)
        rows, labels = paddle.gather(x.reshape([-1, D]), here), paddle.gather(labels, here)  # (M, D), (M,)
        if temperature != 1.0:  # the head is linear: its logits are divided too
            rows = rows / temperature
        if self.with_entropy:
            outputs["logps"], outputs["entropies"] = self.logps_and_entropies(rows, labels)
        else:
            outputs["logps"] = -self.model.comm.run_unit("head", self._losses, rows, labels)
        return outputs

    def _losses(self, rows, labels):
        return self.model._losses(rows.unsqueeze(0), [], labels.unsqueeze(0), None, False, False)[0]

    def logps_and_entropies(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(M, D), (M,) -> log p of the labels and entropies of the distributions, (M,) each; nats."""

        def of_chunk(rows, labels):
            logits = self.model.logits(rows).astype("float32")  # (m, V)
            logps = logits - paddle.logsumexp(logits, -1, keepdim=True)  # paddle's log_softmax is 400 times slower here
            return paddle.take_along_axis(logps, labels.unsqueeze(-1), 1).squeeze(-1), -(logps.exp() * logps).sum(-1)

        parts = []
        for first in range(0, rows.shape[0], ENTROPY_ROWS):
            chunk = rows[first : first + ENTROPY_ROWS], labels[first : first + ENTROPY_ROWS]
            parts.append(paddle.distributed.fleet.utils.recompute(of_chunk, *chunk))
        return tuple(paddle.concat(list(column)) for column in zip(*parts))
