"""A prompt and the replies to it: what rl.py learns from, in files of rollouts and as packed batches.

    group = Group(number, prompt_ids, [Reply(token_ids, logps, text), …])
    write_rollouts(path, 0, groups, names);  groups = read_rollouts(path)[0]
    batches = pack_groups(groups, rows, max_length, pad_token_id, skip_cut)   # data.py's batches, with segments
    attach(batch, groups, ["advantages"])                                     # numbers of replies -> (M,) of a batch

A group is one sequence of a packed row. Its replies share the prompt and do not see each other (FlashMask), so that
every token sees what the engine's token saw, at the same position. See group_sample().
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data import IGNORED
from formats.files import UserError, atomic_file, parse_json_line


@dataclasses.dataclass
class Reply:
    """One reply of the model; T tokens, the end token among them if it was given.

    A reply of several turns holds what tools returned too, which is not learned: M of its T tokens are the model's.
    """

    token_ids: list[int]
    logps: np.ndarray  # (M,) float64, by the engine when it sampled them; see correct_sampling()
    text: str  # of the last turn
    is_cut: bool = False  # it reached max_dec_len without an end
    entropy: float = 0.0  # mean over the model's tokens, in nats
    learned: np.ndarray | None = None  # (T,) bool: the model's tokens; None: all
    messages: list | None = None  # of several turns: the reply as OpenAI has it
    calls: int = 0  # of tools
    failures: int = 0  # of these calls
    scores: list = dataclasses.field(default_factory=list)  # of each reward function; None: it does not apply
    reward: float = math.nan  # nan: no function applies, so nothing is learned from it
    ref_logps: np.ndarray | None = None  # (M,) under the reference
    values: np.ndarray | None = None  # (M,) by the value head before the updates
    sampled_logps: np.ndarray | None = None  # (M,) by the engine, if sampling is corrected and logps are the trainer's
    old_logps: np.ndarray | None = None  # (M,) by the trainer before the updates, if sampling is corrected
    weights: np.ndarray | None = None  # (M,) rl_math.sampling_weights()
    advantages: np.ndarray | None = None  # (M,)
    returns: np.ndarray | None = None  # (M,) what the value head learns
    environment: object = None  # whose methods are its tools

    def to_json(self) -> dict:
        """What a file of rollouts holds of it."""
        row = {
            "text": self.text,
            "token_ids": self.token_ids,
            "logps": [float(x) for x in self.logps],
            "is_cut": self.is_cut,
            "entropy": self.entropy,
            "scores": self.scores,
        }
        if self.messages is None:
            return row
        learned = None if self.learned is None else self.learned.astype(int).tolist()
        return row | {"learned": learned, "messages": self.messages, "calls": self.calls, "failures": self.failures}


@dataclasses.dataclass
class Group:
    """A prompt and the replies to it."""

    number: int  # of the prompt in its dataset
    prompt_ids: np.ndarray
    replies: list[Reply]


def write_rollouts(path: Path, rollout: int, groups: list[Group], names: list[str]) -> None:
    """One JSON line a group: rollout, prompt's number and ids, and its replies with their scores by name."""
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as file:
        for group in groups:
            row = {"rollout": rollout, "number": group.number, "prompt_ids": group.prompt_ids.tolist()}
            row |= {"reward_funcs": names, "replies": [reply.to_json() for reply in group.replies]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rollouts(path: str | Path) -> dict[int, list[Group]]:
    """{number of the rollout: its groups} of a file of write_rollouts(), or of all files of a folder."""
    files = sorted(Path(path).glob("*.jsonl")) if Path(path).is_dir() else [Path(path)]
    rollouts = collections.defaultdict(list)
    for file in files:
        if not file.is_file():
            raise UserError(f"replay: {file}: no such file; rl.py writes rollouts with save_rollouts: true")
        for line_number, line in enumerate(file.read_bytes().splitlines(), 1):
            row = parse_json_line(line, file, line_number)
            try:
                rollouts[row["rollout"]].append(group_of(row))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{file}:{line_number}: not a line of rollouts: {error!r}") from None
    if not rollouts:
        raise UserError(f"replay: {path}: holds no rollouts")
    return dict(rollouts)


def group_of(row: dict) -> Group:
    """A line of a file of rollouts -> Group."""
    replies = []
    for reply in row["replies"]:
        learned = reply.get("learned") and np.array(reply["learned"], bool)
        replies.append(Reply(**{**reply, "logps": np.array(reply["logps"]), "learned": learned}))
    return Group(row["number"], np.array(row["prompt_ids"], np.int32), replies)


# ============================================================================================================ batches


def group_sample(prompt: np.ndarray, replies: list[Reply]) -> tuple[np.ndarray, ...]:
    """Ids of a prompt and G replies -> input_ids, labels, position_ids, rows, replies as one sequence, int64.

        prompt p1 .. pn, replies a1 .. aj, b1 .. bk
        input_ids     p1 .. p(n-1)   pn  a1 .. a(j-1)   pn  b1 .. b(k-1)
        labels        -100 ........  a1  a2 .. aj       b1  b2 .. bk
        position_ids  0 .... n-2     n-1 n .. n+j-2     n-1 n .. n+k-2
        rows          end of group   end of a           end of b           FlashMask: rows from there on do not see it
        replies       -1             0                  1

    Tokens that a tool returned have the label -100. It is data.pair_sample() for any number of replies.
    """
    n, lengths = len(prompt) - 1, np.array([len(reply.token_ids) for reply in replies])
    ends = n + np.cumsum(lengths)
    input_ids = np.concatenate([prompt[:n], *(part for r in replies for part in (prompt[n:], r.token_ids[:-1]))])
    learned = (r.token_ids if r.learned is None else np.where(r.learned, r.token_ids, IGNORED) for r in replies)
    labels = np.concatenate([np.full(n, IGNORED), *learned])
    positions = np.concatenate([np.arange(n), *(n + np.arange(length) for length in lengths)])
    rows = np.concatenate([np.full(n, ends[-1]), np.repeat(ends, lengths)])
    numbers = np.concatenate([np.full(n, -1), np.repeat(np.arange(len(replies)), lengths)])
    return tuple(array.astype(np.int64) for array in (input_ids, labels, positions, rows, numbers))


def pack_groups(
    groups: list[Group],
    rows: int,
    max_length: int,
    pad_token_id: int,
    skip_cut: bool,
    share_within: float = math.inf,
) -> list[dict]:
    """Groups -> micro-batches of `rows` rows of at most max_length tokens, in order: a row takes what still fits.

    A group that does not fit is split between its replies, and its prompt repeated. Of a group of more positions than
    share_within (of trainer.shared_prompt_limit) every reply has its own prompt. skip_cut: replies that are cut are
    left out, but the first one if nothing else is left. A batch is data.py's, and also has places [(group, reply)] of
    its replies and reply_tokens (n,).
    """
    pieces = []  # (group number, reply numbers)
    for g, group in enumerate(groups):
        room, piece = 0, None
        shares = len(group.prompt_ids) - 1 + sum(len(reply.token_ids) for reply in group.replies) <= share_within
        for i, reply in enumerate(group.replies):
            if skip_cut and reply.is_cut:
                continue
            length = len(reply.token_ids)
            if piece is None or length > room or not shares:
                piece, room = [], max_length - (len(group.prompt_ids) - 1)
                pieces.append((g, piece))
            piece.append(i)
            room -= length
    if not pieces:
        pieces = [(0, [0])]
    packed, room = [], -1  # rows, each a list of pieces
    for g, numbers in pieces:
        length = len(groups[g].prompt_ids) - 1 + sum(len(groups[g].replies[i].token_ids) for i in numbers)
        if length > room:
            packed.append([])
            room = max_length
        packed[-1].append((g, numbers))
        room -= length
    return [_collate(packed[first : first + rows], groups, pad_token_id) for first in range(0, len(packed), rows)]


def _collate(rows, groups, pad_token_id):
    """Rows of pieces -> a batch as wide as its longest row."""
    samples = [
        [group_sample(groups[g].prompt_ids, [groups[g].replies[i] for i in numbers]) for g, numbers in row]
        for row in rows
    ]
    B, T = len(rows), max(sum(len(sample[0]) for sample in row) for row in samples)
    batch = {
        "input_ids": np.full((B, T), pad_token_id, np.int64),
        "labels": np.full((B, T), IGNORED, np.int64),
        "position_ids": np.zeros((B, T), np.int64),
        "startend_row_indices": np.full((B, 1, T, 1), T, np.int32),
        "places": [(g, i) for row in rows for g, numbers in row for i in numbers],
        "sample_ids": [[groups[g].number for g, _ in row] for row in rows],
        "tokens": sum(len(sample[0]) for row in samples for sample in row),
    }
    for b, row in enumerate(samples):
        start = 0
        for ids, labels, positions, mask_rows, _ in row:
            here = np.s_[b, start : start + len(ids)]
            batch["input_ids"][here], batch["labels"][here], batch["position_ids"][here] = ids, labels, positions
            batch["startend_row_indices"][b, 0, start : start + len(ids), 0] = start + mask_rows
            start += len(ids)
        batch["position_ids"][b, start:] = np.arange(T - start)
    batch["reply_tokens"] = np.array([len(groups[g].replies[i].logps) for g, i in batch["places"]], np.int64)
    batch["segments"] = np.repeat(np.arange(len(batch["places"])), batch["reply_tokens"])
    return batch


def counts_of(batches: list[dict]) -> tuple[int, int, int, int]:
    """The fields of rl_math.Counts of some batches: what the means of an update are over."""
    real = [batch for batch in batches if not batch.get("is_dummy")]
    texts, real = [batch for batch in real if "places" not in batch], [batch for batch in real if "places" in batch]
    replies = sum(len(batch["places"]) + batch.get("skipped_replies", 0) for batch in real)
    ptx_tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in texts)
    return replies, int(sum(batch["reply_tokens"].sum() for batch in real)), len(real), ptx_tokens


def attach(batch: dict, groups: list[Group], names: Iterable[str]) -> None:
    """Put these arrays of the batch's replies into it, one number a token: {name: (M,) float64}; None stays out."""
    for name in names:
        parts = [getattr(groups[g].replies[i], name) for g, i in batch["places"]]
        if all(part is not None for part in parts):
            batch[name] = np.concatenate(parts)


def detach(batch: dict, groups: list[Group], name: str, numbers: np.ndarray) -> None:
    """Numbers (M,) of a batch's tokens -> the attribute `name` of its replies."""
    ends = np.cumsum(batch["reply_tokens"])
    for (g, i), part in zip(batch["places"], np.split(np.asarray(numbers, np.float64), ends[:-1])):
        setattr(groups[g].replies[i], name, part)
