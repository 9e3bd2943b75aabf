"""Process rewards: a language model that says of each step of a solution whether it is right.

    task = StepTask(args, tokenizer)
    batch = task.make_loader("train").batch(0, 0)                # data.py's; labels stand at placeholders only
    logits = task.load_model(topology)(**model_inputs(batch))    # (M, k): of the k reward tokens at M placeholders
    loss, metrics = loss_and_metrics(logits, batch, steps_of([batch]))

A placeholder token stands after each step. There the model chooses among the reward tokens, the first of which means
right: the loss is their cross-entropy, over their logits alone. Lightman et al., arXiv 2305.20050; Wang et al.
(Math-Shepherd), arXiv 2312.08935, Eq. 2. It stays a language model, and is saved as one.

Records: {"src" or "input": text with placeholders, "tgt" or "label": the same text with reward tokens in their place},
as PaddleNLP and Math-Shepherd have them; or TRL's {"prompt", "completions": [step, …], "labels": [true, …]}.
"""

import re
from pathlib import Path

import kernels  # noqa: F401, before paddle

import numpy as np
import paddle
from paddle import Tensor

import trainer
from alignment.heads import HeadedModel
from alignment.rewards import RewardFunction
from data import IGNORED, SFTLoader, TokenizedRecords
from formats.files import UserError, brief
from formats.record_files import RecordOptions, RecordReader
from formats.tokenizer import Tokenizer, load_tokenizer
from model import CausalLM
from parallel import SINGLE, Topology, from_pretrained

METRICS = ("accuracy", "mean_reward")

# =========================================================================================================== records


class RewardTokens:
    """The placeholder and the reward tokens, as texts and as ids. UserError for one that is not one token."""

    def __init__(self, tokenizer: Tokenizer, placeholder: str, reward_tokens: str | list[str]):
        self.placeholder = placeholder
        names = reward_tokens.split(",") if isinstance(reward_tokens, str) else reward_tokens
        self.names = [name.strip() for name in names]
        # After a space, and at the beginning of a text, it may be another token.
        texts = [placeholder, f" {placeholder}"]
        self.placeholder_ids = {self._id(tokenizer, text, "placeholder_token") for text in texts}
        self.ids = [self._id(tokenizer, name, "reward_tokens") for name in self.names]
        if len(set(self.ids)) < 2 or len(set(self.ids)) < len(self.ids):
            raise UserError(f"reward_tokens: {reward_tokens!r}; two or more different tokens are needed")

    @staticmethod
    def _id(tokenizer, text, key):
        ids = tokenizer.encode(text, False)
        if len([i for i in ids if tokenizer.decode([i], skip_special_tokens=False).strip()]) != 1:
            name = text.strip()
            raise UserError(f"{key}: {name!r} is {len(ids)} tokens here; add_tokens: {name} makes it one")
        return ids[-1]

    def parse(self, record: dict, where: str) -> tuple[str, list[int]]:
        """(text with placeholders, for each of them the number of its reward token) of a record."""
        if isinstance(record.get("completions"), list) and isinstance(record.get("labels"), list):
            return self._stepwise(record, where)
        text, target = record.get("src", record.get("input")), record.get("tgt", record.get("label"))
        text, target = (x[0] if isinstance(x, list) and len(x) == 1 else x for x in (text, target))
        if not isinstance(text, str) or not isinstance(target, str):
            raise UserError(f"{where}: 'src' and 'tgt' are needed: a text with {self.placeholder}, and with rewards")
        pattern, found, at = re.compile("|".join(map(re.escape, self.names))), [], 0
        *parts, rest = text.split(self.placeholder)
        for part in parts:
            match = pattern.match(target, at + len(part))
            if target[at : at + len(part)] != part or match is None:
                raise UserError(
                    f"{where}: 'tgt' differs from 'src' before or at its placeholder number {len(found) + 1}: "
                    f"{brief(repr(target[at:]))}; the same text with one of {', '.join(self.names)} is needed"
                )
            found.append(self.names.index(match[0]))
            at = match.end()
        if target[at:].strip() != rest.strip():
            raise UserError(f"{where}: 'tgt' differs from 'src' after the last placeholder: {brief(repr(target[at:]))}")
        return text, found

    def _stepwise(self, record, where):
        steps, labels = record["completions"], record["labels"]
        if len(steps) != len(labels) or not all(isinstance(step, str) for step in [record.get("prompt"), *steps]):
            raise UserError(f"{where}: 'prompt' and steps as text, and one label for each of 'completions' are needed")
        return "\n".join([record["prompt"], *self.marked(steps)]), [0 if label else 1 for label in labels]

    def marked(self, steps: list[str]) -> list[str]:
        """Steps with the placeholder after each."""
        return [f"{step} {self.placeholder}" for step in steps]


class StepRecords(TokenizedRecords):
    """Solutions whose steps have labels, at most max_length tokens of each; steps behind them are left out."""

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        tokens: RewardTokens,
        max_length: int,
        split: str,
        options: RecordOptions,
        progress: bool = False,
    ):
        self.tokenizer, self.tokens, self.max_length, self.size = tokenizer, tokens, max_length, tokenizer.vocab_size
        nothing_left = f"no placeholder is left in any of the {{}} records with max_seq_len {max_length}"
        self._read(RecordReader(path, split, options, progress), self._encode, 1, nothing_left)
        self.lengths = self.lengths + 1  # every token is a position: a step's label stands where its placeholder does

    def _encode(self, record, where):
        text, rewards = self.tokens.parse(record, where)
        ids = self.tokenizer.encode(text)
        here = [t for t, i in enumerate(ids) if i in self.tokens.placeholder_ids]
        if len(here) != len(rewards):
            raise UserError(f"{where}: {len(rewards)} placeholders in the text, but {len(here)} of its tokens are one")
        for t, reward in zip(here, rewards):  # negative: a placeholder, and its reward
            ids[t] = ~(reward * self.size + ids[t])
        ids = ids[: self.max_length]
        return [ids] if min(ids) < 0 else "no placeholder within max_seq_len"

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample number -> (input_ids, labels), int64: a label is the number of a reward token, or -100."""
        i = self.numbers[i]
        stored = self._tokens[self._ends[i] : self._ends[i + 1]].astype(np.int64)
        rewards, ids = np.divmod(~stored, self.size)
        return np.where(stored < 0, ids, stored), np.where(stored < 0, rewards, IGNORED)


# ============================================================================================== model, loss, evaluation


class ProcessModel(HeadedModel):
    """A language model: ids -> logits of the reward tokens at the placeholders."""

    def __init__(self, model: CausalLM, tokens: RewardTokens):
        super().__init__(model)
        self.ids = paddle.to_tensor(tokens.ids)

    def __call__(self, input_ids, position_ids, startend_row_indices, places) -> Tensor:
        """places (M,): positions of placeholders in the flattened ids. (M, k) float32"""
        x = self.hidden_states(input_ids, position_ids, startend_row_indices)
        rows = paddle.gather(x.reshape([-1, x.shape[-1]]), places)
        return paddle.index_select(self.model.logits(rows).astype("float32"), self.ids, axis=1)


def steps_of(batches: list[dict]) -> int:
    """Labeled steps of some batches: what the means of an update are over."""
    return sum(int((batch["labels"] != IGNORED).sum()) for batch in batches if not batch.get("is_dummy"))


def _places(batch):
    here = np.flatnonzero(batch["labels"] != IGNORED)
    return here if len(here) else np.zeros(1, np.int64)  # of a dummy, whose loss does not count


def model_inputs(batch: dict) -> dict:
    """What a ProcessModel is called with."""
    inputs = {name: value for name, value in trainer.model_inputs(batch).items() if name != "labels"}
    return inputs | {"places": paddle.to_tensor(_places(batch))}


def loss_and_metrics(logits: Tensor, batch: dict, steps: int) -> tuple[Tensor, dict[str, float]]:
    """A batch's part of the mean loss of `steps` steps, and of METRICS: how often the likeliest reward token is the
    right one, and the mean probability of the first. logits (M, k)"""
    labels = np.maximum(batch["labels"].flatten()[_places(batch)], 0)
    losses = paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(labels), reduction="none")
    found = logits.numpy()
    rewards = paddle.nn.functional.softmax(logits.detach())[:, 0]
    metrics = {"accuracy": float((found.argmax(1) == labels).sum()), "mean_reward": float(rewards.sum())}
    return losses.sum() / steps, {name: value / steps for name, value in metrics.items()}


def process_reward(path: str | Path, placeholder: str, reward_tokens: str | list[str]) -> RewardFunction:
    """The model of a folder as a reward for rl.py: the lines of a reply are its steps, and its reward is the least
    probability that a step is right, as Math-Shepherd has it (3.4); 0 for an empty reply."""
    tokenizer = load_tokenizer(path)
    tokens = RewardTokens(tokenizer, placeholder, reward_tokens)
    model = ProcessModel(from_pretrained(path, SINGLE), tokens)

    def text_of(x):
        return x if isinstance(x, str) else x[-1]["content"]

    @paddle.no_grad()
    def score(prompt, completion):
        steps = [line for line in text_of(completion).splitlines() if line.strip()]
        if not steps:
            return 0.0
        ids = tokenizer.encode("\n".join([text_of(prompt), *tokens.marked(steps)]))
        places = [t for t, i in enumerate(ids) if i in tokens.placeholder_ids]
        logits = model(paddle.to_tensor([ids]), None, None, paddle.to_tensor(places))
        return float(paddle.nn.functional.softmax(logits)[:, 0].min())

    def process_reward(prompts, completions, **_):
        return [score(*pair) for pair in zip(prompts, completions)]

    return RewardFunction("process_reward", process_reward)


class StepTask:
    """A language model learns the rewards of steps. reward.py has another task, for pairs."""

    metrics = METRICS
    report = "dev steps whose label is the likelier one"
    size_of, inputs = staticmethod(steps_of), staticmethod(model_inputs)

    def __init__(self, args: object, tokenizer: Tokenizer):
        self.args, self.tokenizer = args, tokenizer
        self.tokens = RewardTokens(tokenizer, args.placeholder_token, args.reward_tokens)

    def make_loader(self, split: str) -> SFTLoader:
        """The packed rows of "train" or "dev"."""
        args, is_train = self.args, split == "train"
        path, options = getattr(args, f"{split}_dataset_path"), RecordOptions.of(args)
        given = path, self.tokenizer, self.tokens, args.max_seq_len, split, options
        loader = SFTLoader(
            StepRecords(*given, progress=not args.disable_tqdm),
            args.per_device_train_batch_size if is_train else args.per_device_eval_batch_size,
            max_length=args.max_seq_len,
            zero_padding=True,
            greedy_zero_padding=args.greedy_zero_padding,
            seed=args.seed,
            shuffle=is_train,
            drop_last=is_train and args.dataloader_drop_last,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        loader.fixed_width = None  # a batch is as wide as its longest row
        trainer.print_data(split, "solutions", loader)
        return loader

    def load_model(self, topology: Topology) -> ProcessModel:
        network = from_pretrained(self.args.model_name_or_path, topology)
        trainer.check_trainable(network, self.args.model_name_or_path)
        if network.config.position == "rope_2d":
            raise UserError("process_reward: a model that sees its prompt in both directions would see what it judges")
        return ProcessModel(network, self.tokens)

    def loss_and_metrics(self, logits: Tensor, batch: dict, steps: int, loader: SFTLoader) -> tuple:
        """loss_and_metrics(); a batch has all that it needs of the loader."""
        return loss_and_metrics(logits, batch, steps)

    def evaluate(self, model: ProcessModel, loader: SFTLoader, topology: Topology) -> dict:
        """{"eval_loss", "eval_accuracy", "eval_mean_reward", "eval_steps"}: means over steps."""
        indices = trainer.eval_batches(loader, self.args.max_evaluate_steps)
        steps = steps_of([loader.batch(*index) for index in indices])
        sums = dict.fromkeys(("loss", *METRICS), 0.0)
        with trainer.eval_mode(model.model):
            for index, is_real in trainer.local_micro_batches(indices, topology):
                batch = loader.batch(*index)
                loss, metrics = loss_and_metrics(model(**model_inputs(batch)), batch, steps)
                for name, value in {"loss": float(loss), **metrics}.items() if is_real else ():
                    sums[name] += value
        return {f"eval_{name}": value for name, value in topology.all_reduce_sum(sums).items()} | {"eval_steps": steps}
