"""Prompts -> replies of the live model -> rewards -> packed batches: what rl.py learns from.

    engine = make_engine(args, model, tokenizer, prompts, None, topology)
    maker = RolloutMaker(args, model, tokenizer, prompts, reward_functions, topology, engine)
    rollout = maker.make(number)                 # does what follows
        groups = generate_groups(engine, prompts, numbers, params)         # rollout_n replies to each prompt
        score_groups(groups, reward_functions, prompts)                    # reply.scores
        combine_scores(groups, weights, args)                              # reply.reward
        estimate_advantages(groups, args)                                  # reply.advantages, one a token
        batches = pack_groups(groups, rows, max_length, pad_token_id)      # the prompt once, its replies side by side

Groups, their files and packing are in groups.py; rewards and advantages in advantages.py, their formulas in rl_math.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import kernels
from kernels.fused import storage_missing

import numpy as np
import paddle

import parallel
import trainer
from adapters import adapter_disabled
from alignment import rl_math
from alignment.advantages import combine_scores, correct_sampling, estimate_advantages
from alignment.critic import Critic
from alignment.environments import Toolbox
from alignment.groups import Group, Reply, attach, detach, group_of, pack_groups, read_rollouts, write_rollouts
from alignment.heads import Policy, ScoreModel, check_same_tokenizer, load_reward_model, scored_sample
from data import SFTDataset, SFTLoader, TokenizedRecords, conversation_prompt, epoch_order, longest_text
from distributed.tensor import local_heads
from formats.files import UserError
from formats.record_files import RecordOptions, RecordReader
from formats.records import PAIRS, Conversation, parse_pair, parse_prompt, record_format
from formats.tokenizer import Tokenizer
from model import CausalLM
from parallel import Topology
from serving.engine import Engine, Request
from serving.fused import FusedRunner, fastest_runner, why_not_fused
from serving.runners import make_runner
from serving.sampling import SamplingParams

BLOCK_SIZE = 16  # tokens of a block of the engine's cache

# =========================================================================================================== prompts


class PromptDataset(TokenizedRecords):
    """Prompts of a file, a folder with {split}.json, several of them, or a blend; truncated to max_src_len.

    A record has any of the formats of docs/data.md; its last reply, if there is one, is not shown. All keys of a record
    are columns for the reward functions. toolbox: what replies may call, which the chat template shows in each prompt.
    UserError: missing or empty file, or a bad record (file:line).
    """

    def __init__(
        self,
        path: str | Path | list,
        tokenizer: Tokenizer,
        max_src_len: int,
        split: str = "train",
        progress: bool = False,
        options: RecordOptions | None = None,
        toolbox: Toolbox | None = None,
    ):
        self.tokenizer, self.max_src_len, self.toolbox = tokenizer, max_src_len, toolbox
        self._read(RecordReader(path, split, options, progress), self._encode, 1, "none of the {} prompts has tokens")
        self.longest = int(self.lengths.max()) + 1

    def _conversation(self, record, where):
        if record_format(record, PAIRS) is None:
            conversation = parse_prompt(record, where)
        else:
            pair = parse_pair(record, where)
            conversation = Conversation(pair.context, [*pair.history, (pair.prompt, "")], [], pair.is_plain)
        if self.toolbox is None:
            return conversation
        if conversation.context.get("tools"):
            raise UserError(f"{where}: the record has tools of its own, which rl.py could not call; leave the key out")
        return conversation._replace(context={**conversation.context, "tools": self.toolbox.schemas}, is_plain=False)

    def _encode(self, record, where, more=""):
        conversation = self._conversation(record, where)
        *rounds, (prompt, reply) = conversation.rounds
        if more and isinstance(prompt, str):
            conversation = conversation._replace(rounds=[*rounds, (prompt + more, reply)])
        elif more:
            raise UserError(f"{where}: the text of reset() can follow only a prompt that is a text")
        ids = conversation_prompt(self.tokenizer, conversation, self.max_src_len, self.max_src_len)
        return [ids] if ids else "no prompt"

    def ids(self, i: int, more: str = "") -> np.ndarray:
        """Prompt number -> its ids, int32; more: text that follows the last user turn."""
        if more:
            record = self.reader.rename(self.record(i))
            return np.array(self._encode(record, self.where(i), more)[0], np.int32)
        return self._tokens[self._ends[self.numbers[i]] : self._ends[self.numbers[i] + 1]]

    def text(self, i: int) -> str:
        """Prompt number -> the text of its last user turn."""
        conversation = self._conversation(self.reader.rename(self.record(i)), self.where(i))
        return longest_text(conversation.rounds[-1][0])

    def numbers_of(self, rollout: int, count: int, seed: int) -> list[int]:
        """The prompts of a rollout. They are one stream over all epochs, so that every rollout has `count` of them."""
        n, numbers = len(self), []
        for k in range(rollout * count, (rollout + 1) * count):
            numbers.append(int(_order(n, seed, k // n)[k % n]))
        return numbers


def make_prompts(args: object, tokenizer: Tokenizer, split: str, toolbox: Toolbox | None) -> PromptDataset:
    """The prompts of "train" or "dev"."""
    path = args.train_datasets if split == "train" else args.eval_datasets
    options = RecordOptions.of(args)
    if args.prompt_key:
        options.columns = {**options.columns, "src": args.prompt_key}
    dataset = PromptDataset(path, tokenizer, args.max_src_len, split, not args.disable_tqdm, options, toolbox)
    print(f"{split}: {len(dataset):,} prompts of at most {dataset.longest} tokens")
    return dataset


def make_ptx_loader(args: object, tokenizer: Tokenizer, max_length: int) -> SFTLoader | None:
    """Conversations of ptx_datasets in packed rows of max_length, beside each update; None if there are none."""
    if not args.ptx_datasets:
        return None
    options = RecordOptions.of(args)
    given = args.ptx_datasets, tokenizer, min(args.max_src_len, max_length - 1), max_length
    dataset = SFTDataset(*given, progress=not args.disable_tqdm, options=options)
    padding = {"zero_padding": True, "pad_token_id": tokenizer.pad_token_id}
    loader = SFTLoader(dataset, args.per_device_train_batch_size, max_length, seed=args.seed, **padding)
    trainer.print_data("ptx", "conversations", loader)
    return loader


@functools.lru_cache(2)
def _order(n, seed, epoch):
    return epoch_order(n, seed, epoch)


# =========================================================================================================== replies


def make_engine(
    args: object,
    model: CausalLM,
    tokenizer: Tokenizer,
    train: PromptDataset | None,
    dev: PromptDataset | None,
    topology: Topology,
) -> Engine | None:
    """An Engine on the model's own weights with room for the rollouts of train and for dev; None if all are replayed.

    args.rollout_dtype: of the weights that are packed after every update; by default that of the trainer's products.
    args.rollout_quant_type: linears are rounded to int8 when they are packed, all else is bfloat16. Under tensor
    parallelism the model's layers run; all ranks of tp take the same steps: logits are gathered, and every rank samples
    the same tokens.
    """
    replies = -(-args.global_batch_size // topology.data_size) * args.rollout_n if train and not args.replay else 0
    sequences = min(args.rollout_max_num_seqs if args.rollout_max_num_seqs > 0 else 128, replies)
    prompts = -(-sequences // args.rollout_n)
    if dev:
        sequences, prompts = max(sequences, min(64, len(dev))), max(prompts, min(64, len(dev)))
    if not sequences:
        return None
    longest = max(dataset.longest for dataset in (train, dev) if dataset)
    dtype = args.rollout_dtype or ("bfloat16" if kernels.bf16 else "float32")
    first_key, stop_key = local_heads(model.config, topology.tp.size, topology.tp.rank)[1]
    prompt_blocks, reply_blocks = -(-longest // BLOCK_SIZE), -(-args.max_dec_len // BLOCK_SIZE) + 1
    num_blocks = prompts * prompt_blocks + sequences * reply_blocks + 1
    if args.rollout_quant_type:
        if why := why_not_fused(model, None, "bfloat16") or storage_missing("w8"):
            raise UserError(f"rollout_quant_type: {args.rollout_quant_type} is not possible here: {why}")
        runner = FusedRunner(model, num_blocks, BLOCK_SIZE, dtype="bfloat16", linears="w8")
    elif topology.tp.size > 1:
        runner = make_runner(model, num_blocks, BLOCK_SIZE, key_heads=stop_key - first_key)
    else:
        runner = fastest_runner(model, num_blocks, BLOCK_SIZE, dtype=dtype)
    return Engine(
        runner,
        tokenizer,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=sequences,
        max_num_batched_tokens=2048,
        max_model_len=longest + args.max_dec_len,
        max_queue=max(256, 2 * sequences),
    )


def sampling_params(args: object, seed: int) -> SamplingParams:
    """How replies are sampled for training."""
    return SamplingParams(
        max_tokens=args.max_dec_len,
        min_tokens=max(0, args.min_dec_len - 1),  # an end token is a token of the reply
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=seed,
        n=args.rollout_n,
        scaled_logprobs=True,
    )


def generate_groups(engine: Engine, dataset: PromptDataset, numbers: list[int], params: list) -> list[Group]:
    """The replies to these prompts, with params[i] for the i-th; with a toolbox in one or several turns."""
    toolbox, groups = dataset.toolbox, []
    environments = [[None] * p.n for p in params]
    if toolbox is None or toolbox.factory is None:
        prompts = [dataset.ids(number) for number in numbers]
    else:
        environments = [[toolbox.make_environment() for _ in made] for made in environments]
        prompts = [_reset_prompt(dataset, number, made) for number, made in zip(numbers, environments)]
    requests = [Request(ids.tolist(), p) for ids, p in zip(prompts, params)]
    for number, ids, completions, made in zip(numbers, prompts, engine.generate(requests), environments):
        replies = [_turn(completion, dataset.where(number)) for completion in completions]
        for reply, environment in zip(replies, made):
            reply.environment = environment
        groups.append(Group(number, ids, replies))
    if toolbox is not None:
        _play_on(engine, dataset, groups, params)
    return groups


def _turn(completion, where):
    """A Completion of the engine -> Reply."""
    if completion.finish_reason == "error":
        raise UserError(f"{where}: the model's logits are not finite; lower learning_rate")
    logps = np.array([logprob for logprob, _ in completion.logprobs or ()])
    entropy = float(np.mean(completion.entropies)) if completion.entropies else 0.0
    return Reply(completion.token_ids, logps, completion.text, completion.finish_reason == "length", entropy)


def _reset_prompt(dataset, number, environments):
    """The prompt's ids, after reset() of the environments of all replies to it, which must say the same."""
    where, record = dataset.where(number), dataset.record(number)
    texts = [dataset.toolbox.reset(environment, record, where) for environment in environments]
    if len(set(texts)) > 1:
        raise UserError(f"environment_factory: {where}: reset() must give all replies the same text")
    return dataset.ids(number, texts[0])


def _play_on(engine, dataset, groups, params):
    """Replies that call tools go on with the results, until none does or their tokens or turns are used up.

    A request for the next turn is the prompt and all ids of the reply so far; the engine's cache knows most of them.
    """
    toolbox = dataset.toolbox
    playing = [(g, i, reply) for g, group in enumerate(groups) for i, reply in enumerate(group.replies)]
    starts = {id(reply): 0 for *_, reply in playing}  # of the turn that was written last
    for _, _, reply in playing:
        reply.messages = [{"role": "assistant", "content": reply.text}]
    for turn in range(1, toolbox.max_turns):
        asked, requests = [], []
        for g, i, reply in playing:
            calls = [] if reply.is_cut else toolbox.calls_in(reply.token_ids[starts[id(reply)] :])
            if not calls:
                continue
            results = [toolbox.call(call, reply.environment) for call in calls]
            reply.calls, reply.failures = reply.calls + len(calls), reply.failures + sum(bad for _, bad in results)
            texts = [text for text, _ in results]
            ids = toolbox.results_ids(calls, texts)
            room = params[g].max_tokens - len(reply.token_ids) - len(ids)
            reply.messages[-1] = {**reply.messages[-1], "tool_calls": calls}
            if room < 1:
                reply.is_cut = True
                continue
            reply.messages += [{"role": "tool", "content": text} for text in texts]
            learned = np.ones(len(reply.token_ids), bool) if reply.learned is None else reply.learned
            reply.learned = np.concatenate([learned, np.zeros(len(ids), bool)])
            reply.token_ids = [*reply.token_ids, *ids]
            p, seed = params[g], seed_of(params[g].seed or 0, i, turn)
            prompt = [*groups[g].prompt_ids.tolist(), *reply.token_ids]
            requests.append(Request(prompt, dataclasses.replace(p, n=1, max_tokens=room, min_tokens=0, seed=seed)))
            asked.append((g, i, reply))
        playing = asked
        for (g, _, reply), (completion,) in zip(playing, engine.generate(requests) if requests else ()):
            _append_turn(reply, _turn(completion, dataset.where(groups[g].number)), starts)


def _append_turn(reply, turn, starts):
    starts[id(reply)] = len(reply.token_ids)
    before, now = len(reply.logps), len(turn.logps)
    reply.entropy = (before * reply.entropy + now * turn.entropy) / max(1, before + now)
    reply.token_ids, reply.text, reply.is_cut = [*reply.token_ids, *turn.token_ids], turn.text, turn.is_cut
    reply.learned = np.concatenate([reply.learned, np.ones(len(turn.token_ids), bool)])
    reply.logps = np.concatenate([reply.logps, turn.logps])
    reply.messages.append({"role": "assistant", "content": turn.text})


# =========================================================================================== rewards and advantages


class RewardModel:
    """A reward model's folder as a reward: the score of each reply's last token, after its prompt."""

    name, weight = "reward_model", 1.0
    ROWS = 8  # sequences scored at once

    def __init__(self, path: str | Path, tokenizer: Tokenizer, topology: Topology):
        check_same_tokenizer("reward_model_name_or_path", path, tokenizer)
        network = load_reward_model(path, topology)
        trainer.check_shared_prompts(network, path, "reward_model_name_or_path", 0, ("rope_2d",))
        self.model, self.pad_token_id = ScoreModel(network), tokenizer.pad_token_id
        self.share_within = trainer.shared_prompt_limit(network.config)[0]

    @paddle.no_grad()
    def scores(self, groups: list[Group]) -> list[float]:
        """Of all replies, group by group."""
        found, sequences = [], [piece for group in groups for piece in self._pieces(group)]
        for first in range(0, len(sequences), self.ROWS):
            samples = [scored_sample(*piece) for piece in sequences[first : first + self.ROWS]]
            B, T = len(samples), max(len(sample[0]) for sample in samples)
            ids, positions = np.full((B, T), self.pad_token_id, np.int64), np.zeros((B, T), np.int64)
            mask_rows, last = np.full((B, 1, T, 1), T, np.int32), np.zeros((B, T), bool)
            for b, sample in enumerate(samples):
                n = len(sample[0])
                ids[b, :n], positions[b, :n], mask_rows[b, 0, :n, 0], last[b, :n] = *sample[:3], sample[3] >= 0
                positions[b, n:] = np.arange(T - n)
            scores = self.model(*(paddle.to_tensor(array) for array in (ids, positions, mask_rows)))
            found += scores.numpy()[last].tolist()
        return found

    def _pieces(self, group):
        """[(prompt, replies)] that are one sequence each: with all replies, or with one where they cannot share it."""
        replies = [reply.token_ids for reply in group.replies]
        if len(group.prompt_ids) + sum(map(len, replies)) <= self.share_within:
            return [(group.prompt_ids, replies)]
        return [(group.prompt_ids, [reply]) for reply in replies]


def score_groups(groups: list[Group], functions: list, dataset: PromptDataset, topology: Topology) -> None:
    """reply.scores of all replies by these functions; each function is called once with all of them.

    Of the ranks of tp, which have the same replies, only the first calls Python functions; the others have no scores.
    """
    replies = [reply for group in groups for reply in group.replies]
    records, prompts, where = [], [], []
    for group in groups:
        record = dataset.record(group.number)
        prompt = record["prompt"] if isinstance(record.get("prompt"), list) else dataset.text(group.number)
        records += [record] * len(group.replies)
        prompts += [prompt] * len(group.replies)
        where += [dataset.where(group.number)] * len(group.replies)
    keys = {key for record in records for key in record} - {"prompt", "completion", "prompts", "completions"}
    columns = {key: [record.get(key) for record in records] for key in keys - {"completion_ids"}}
    ids = [reply.token_ids for reply in replies]
    if dataset.toolbox is not None and dataset.toolbox.factory is not None:
        columns["environments"] = [reply.environment for reply in replies]
    texts = [  # as TRL, messages where the prompt is messages or tools may be called
        reply.messages or ([{"role": "assistant", "content": reply.text}] if isinstance(prompt, list) else reply.text)
        for reply, prompt in zip(replies, prompts)
    ]
    for reply in replies:
        reply.scores = []
    for function in functions:
        if isinstance(function, RewardModel):
            scores = function.scores(groups)
        elif topology.tp.rank == 0:
            scores = function(prompts, texts, ids, columns, where)
        else:
            scores = [None] * len(replies)
        for reply, score in zip(replies, scores):
            reply.scores.append(score)


# ========================================================================================================= a rollout


class Rollout:
    """The replies that a few updates learn from: groups, this rank's micro-batches of each update, and metrics."""

    def __init__(self, groups: list[Group], mini_batches: list[list[dict]], metrics: dict[str, float]):
        self.groups, self.mini_batches, self.metrics = groups, mini_batches, metrics
        self.differences = []  # (M,) of each micro-batch of the first update: trainer's minus engine's log-probability

    def update_metrics(self, seconds: float, topology: Topology) -> dict[str, float]:
        """The rollout's metrics and the time of an update that took so long, as this rank's part of a sum over ranks.

        engine_kl: k3 of the engine's log-probabilities and the trainer's before the first update, mean over tokens.
        """
        if is_first := "engine_kl" not in self.metrics:
            d = np.concatenate(self.differences or [np.zeros(1)])
            sums = [float((np.exp(d) - d - 1).sum()), float(abs(d).sum()), d.size, float(abs(d).max())]
            rows = topology.all_gather_object(sums) if topology.data_size > 1 else [sums]
            kl, total, tokens = (sum(column) for column in list(zip(*rows))[:3])
            self.metrics["engine_kl"] = kl / tokens
            self.metrics["sampling/sampling_logp_difference/mean"] = total / tokens
            self.metrics["sampling/sampling_logp_difference/max"] = max(row[3] for row in rows)
        spent = self.metrics["time/generate"] + self.metrics["time/reward"] if is_first else 0.0
        metrics = {**self.metrics, "time/update": seconds - spent}
        return {name: value / topology.data_size for name, value in metrics.items()}


METRICS = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/max_length",
           "completions/clipped_ratio", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "engine_kl",
           "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "time/generate",
           "time/reward", "time/update")  # fmt: skip
TOOL_METRICS = ("tools/call_frequency", "tools/failure_frequency")
RATIO_METRICS = tuple(f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max"))
VALUE_METRICS = ("value_loss", "value_clip_ratio")


def metric_names(args: object, functions: list[str]) -> tuple[str, ...]:
    """Names in the log of a run with these reward functions."""
    return (
        *METRICS,
        *(("ptx_loss",) if args.ptx_datasets else ()),
        *(VALUE_METRICS if args.advantage_estimator == "gae" else ()),
        *(RATIO_METRICS if args.importance_sampling_mode else ()),
        *(TOOL_METRICS if args.tools or args.environment_factory else ()),
        *(f"rewards/{name}/{what}" for name in functions for what in ("mean", "std")),
    )


def rollout_metrics(groups: list[Group], names: list[str]) -> dict[str, float]:
    """TRL's metrics of rewards and replies."""
    replies = [reply for group in groups for reply in group.replies]
    rewards, lengths = np.array([r.reward for r in replies]), np.array([len(r.logps) for r in replies])
    stds = [rl_math.sample_std(rl_math.known(np.array([r.reward for r in group.replies]))) for group in groups]
    metrics = {
        "reward": float(np.mean(rl_math.known(rewards))) if len(rl_math.known(rewards)) else math.nan,
        "reward_std": rl_math.sample_std(rl_math.known(rewards)),
        "frac_reward_zero_std": float(np.mean([std < 1e-8 for std in stds])) if len(replies) > len(groups) else 0.0,
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean([reply.is_cut for reply in replies])),
        "entropy": float(np.average([reply.entropy for reply in replies], weights=lengths)),
    }
    if any(reply.messages is not None for reply in replies):
        calls = sum(reply.calls for reply in replies)
        metrics["tools/call_frequency"] = calls / len(replies)
        metrics["tools/failure_frequency"] = sum(reply.failures for reply in replies) / max(1, calls)
    for i, name in enumerate(names):
        scores = np.array([r.scores[i] for r in replies if r.scores[i] is not None])
        metrics[f"rewards/{name}/mean"] = float(scores.mean()) if len(scores) else math.nan
        metrics[f"rewards/{name}/std"] = rl_math.sample_std(scores)
    return metrics


def seed_of(seed: int, *numbers: int) -> int:
    """The engine's seed for one prompt of one rollout: a function of these numbers alone."""
    digest = hashlib.blake2b(" ".join(map(str, (seed, *numbers))).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


class RolloutMaker:
    """Makes Rollouts from the live model: generate, score, compare with the reference, estimate advantages, pack."""

    def __init__(
        self,
        args: object,
        model: CausalLM,
        tokenizer: Tokenizer,
        dataset: PromptDataset,
        functions: list,
        topology: Topology,
        engine: Engine | None,
        critic: Critic | None = None,
    ):
        """engine: of make_engine(). critic: whose values are used; None: those of the policy's own head, if any."""
        self.args, self.model, self.dataset, self.functions, self.topology = args, model, dataset, functions, topology
        self.pad_token_id = tokenizer.pad_token_id
        self.max_length = args.row_length(dataset.longest)
        if self.max_length < dataset.longest + args.max_dec_len - 1:
            needed = dataset.longest + args.max_dec_len
            raise UserError(f"max_length: {self.max_length}; the longest prompt and a reply need {needed}")
        self.replayed = read_rollouts(args.replay) if args.replay else None
        self.engine, self.critic = engine, critic
        networks = [model, critic.network] if critic else [model]
        self.share_within = min(trainer.shared_prompt_limit(network.config)[0] for network in networks)
        self.ptx = make_ptx_loader(args, tokenizer, self.max_length)
        self.reference = make_reference(model, args, topology)

    @property
    def names(self) -> list[str]:
        return [function.name for function in self.functions]

    @property
    def batches_per_epoch(self) -> int:
        """Updates in which each prompt is used once, times the data-parallel ranks; see trainer.total_steps()."""
        rollouts = math.ceil(len(self.dataset) / self.args.global_batch_size)
        return rollouts * self.args.updates_per_rollout * self.topology.data_size

    def make(self, number: int) -> Rollout:
        """Rollout `number` of the run, counted from 0."""
        args, seconds = self.args, {"time/generate": 0.0, "time/reward": 0.0}
        groups = self._replay(number) if self.replayed else self._scored_groups(number, 0, seconds)
        if args.dynamic_sampling and not self.replayed:
            groups = self._with_differences(groups, number, seconds)
        combine_scores(groups, [function.weight for function in self.functions], args)
        metrics = rollout_metrics(groups, self.names)
        if math.isnan(metrics["reward"]):
            raise UserError(f"rollout {number}: no reward function applies to any reply: all returned None")
        if args.save_rollouts and self.topology.rank == 0:
            path = Path(args.output_dir) / "rollouts" / f"{number:06d}.jsonl"
            write_rollouts(path, number, groups, self.names)
        local = self._pack(groups)
        self._before_updates(groups, local)
        if args.importance_sampling_mode is not None:
            metrics |= correct_sampling(groups, args)
        estimate_advantages(groups, args)
        for batches in local:
            for batch in batches:
                names = ("logps", "sampled_logps", "ref_logps", "advantages", "values", "returns", "weights")
                attach(batch, groups, names)
        return Rollout(groups, local, metrics | seconds)

    def texts(self, step: int) -> list[dict]:
        """This rank's micro-batch of ptx_datasets at a step, in a list; [] without any. A function of the step."""
        if self.ptx is None:
            return []
        indices = trainer.micro_batches(step, self.args, self.ptx.batches_per_epoch, self.topology.data_size)
        pairs = trainer.local_micro_batches([self.ptx.batch(*index) for index in indices], self.topology)
        return [batch if is_real else {**batch, "tokens": 0, "is_dummy": True} for batch, is_real in pairs]

    def _scored_groups(self, number, batch, seconds):
        """The groups of all ranks with their scores; `seconds` grows. batch: see _with_differences()."""
        start = time.perf_counter()
        groups = self._generate(number, batch)
        generated = time.perf_counter()
        score_groups(groups, self.functions, self.dataset, self.topology)
        groups = self._gather_groups(groups)
        seconds["time/generate"] += generated - start
        seconds["time/reward"] += time.perf_counter() - generated
        return groups

    def _with_differences(self, groups, number, seconds):
        """DAPO's dynamic sampling: groups whose rewards are all equal give way to groups of further prompts, of up to
        max_gen_batches batches in all; Yu et al., arXiv 2503.14476, Eq. 11. The prompts of each further batch are a
        stream of their own, so that which they are depends on nothing that has to be saved."""
        args, weights = self.args, [function.weight for function in self.functions]

        def teaches(group):
            combine_scores([group], weights, args)
            return rl_math.sample_std(rl_math.known(np.array([reply.reward for reply in group.replies]))) > 1e-8

        kept, equal = [group for group in groups if teaches(group)], [group for group in groups if not teaches(group)]
        for batch in range(1, args.max_gen_batches):
            if len(kept) >= args.global_batch_size:
                break
            kept += [group for group in self._scored_groups(number, batch, seconds) if teaches(group)]
        return [*kept, *equal][: args.global_batch_size]

    def _generate(self, number, batch):
        """This rank's groups."""
        args, topology = self.args, self.topology
        numbers = self.dataset.numbers_of(number, args.global_batch_size, args.seed + 7919 * batch)
        local = range(topology.data_rank, len(numbers), topology.data_size)
        params = [sampling_params(args, seed_of(args.seed, number, batch, i)) for i in local]
        self.engine.weights_changed()
        with trainer.eval_mode(self.model):
            return generate_groups(self.engine, self.dataset, [numbers[i] for i in local], params)

    def _replay(self, number):
        if number not in self.replayed:
            raise UserError(f"replay: {self.args.replay}: has no rollout {number}; set max_steps to what it holds")
        return self.replayed[number]

    def _gather_groups(self, groups):
        """The groups of all data-parallel ranks, in the order of the prompts, with the scores of tp rank 0."""
        topology = self.topology
        if topology.degrees.world == 1:
            return groups
        rows = [{"number": g.number, "prompt_ids": g.prompt_ids.tolist()} for g in groups]
        rows = [row | {"replies": [r.to_json() for r in g.replies]} for row, g in zip(rows, groups)]
        parts = topology.all_gather_object([topology.data_rank, rows] if topology.tp.rank == 0 else None)
        ordered = [None] * self.args.global_batch_size
        for rank, part in filter(None, parts):
            ordered[rank :: topology.data_size] = [group_of(row) for row in part]
        return ordered

    def _pack(self, groups):
        """This rank's micro-batches of each mini-batch."""
        args, local = self.args, []
        size = args.global_mini_batch_size if args.global_mini_batch_size > 0 else args.global_batch_size
        for first in range(0, len(groups), size):
            some = groups[first : first + size]
            batches = pack_groups(
                some,
                args.per_device_train_batch_size,
                self.max_length,
                self.pad_token_id,
                args.mask_truncated_completions,
                self.share_within,
            )
            for batch in batches:
                batch["places"] = [(first + g, i) for g, i in batch["places"]]
            packed, replies = sum(len(batch["places"]) for batch in batches), sum(len(group.replies) for group in some)
            batches[0]["skipped_replies"] = replies - packed
            if args.mask_truncated_completions and all(reply.is_cut for group in some for reply in group.replies):
                batches[0]["is_dummy"] = True
            pairs = trainer.local_micro_batches(batches, self.topology)
            local.append([batch if is_real else {**batch, "tokens": 0, "is_dummy": True} for batch, is_real in pairs])
        return local

    def _before_updates(self, groups, local):
        """reply.ref_logps of all replies, if a KL is asked for, reply.values, if there is a value head or a critic, and
        reply.old_logps, if sampling is corrected."""
        has_head, is_corrected = self.model.score is not None, self.args.importance_sampling_mode is not None
        asked = {"ref_logps": self.reference, "values": has_head or self.critic, "old_logps": is_corrected}
        names = [name for name, is_asked in asked.items() if is_asked]
        if not names:
            return
        own, temperature = [], self.args.temperature
        for batch in (batch for batches in local for batch in batches):
            inputs, found = trainer.model_inputs(batch), {}
            with trainer.eval_mode(self.model):
                if has_head or is_corrected:
                    outputs = Policy(self.model, temperature)(**inputs)
                    found = {"values": outputs.get("values"), "old_logps": outputs["logps"]}
                if self.reference:
                    with self.reference() as model:
                        found["ref_logps"] = Policy(model, temperature)(**inputs)["logps"]
                if self.critic:
                    found["values"] = self.critic.values(batch)
            for name in names:
                detach(batch, groups, name, found[name].numpy())
            replies = [(g, i, groups[g].replies[i]) for g, i in batch["places"]]
            own += [(g, i, [getattr(reply, name).tolist() for name in names]) for g, i, reply in replies]
        for part in self.topology.all_gather_object(own) if self.topology.data_size > 1 else ():
            for g, i, arrays in part:
                for name, array in zip(names, arrays):
                    setattr(groups[g].replies[i], name, np.array(array))


def make_reference(model: CausalLM, args: object, topology: Topology) -> Callable | None:
    """A function that gives a context with the reference: the model with its adapter off, or a frozen copy of what it
    was before training. None: no KL is asked for."""
    if args.offload_level:
        check_offload(args.offload_level)
    if not args.needs_reference:
        return None
    if args.lora:
        return functools.partial(adapter_disabled, model)
    print("reference: a frozen copy of the model; with lora: true it would take no memory", flush=True)
    return functools.partial(contextlib.nullcontext, parallel.from_pretrained(args.model_name_or_path, topology))


def check_offload(level: str) -> None:
    """A line, or UserError: frozen models are in host memory if the device is the CPU, and on the device otherwise."""
    if not paddle.device.get_device().startswith("cpu"):
        raise UserError(
            f"offload_level: {level}: models stay on the device; with lora: true the reference takes no memory, and "
            "sharding: stage1 offload moves the optimizer's moments"
        )
    print(f"offload_level: {level} has no effect: the device is the CPU, so all models are in host memory anyway")


def evaluate_prompts(
    engine: Engine, dataset: PromptDataset, functions: list, args: object, topology: Topology
) -> tuple[dict[str, float], list[str]]:
    """({"eval_reward", "eval_rewards/NAME", "eval_length"}, the greedy replies): means over the prompts."""
    count = args.max_evaluate_steps * args.per_device_eval_batch_size
    numbers = list(range(min(count, len(dataset)) if count > 0 else len(dataset)))
    engine.weights_changed()
    params = SamplingParams(max_tokens=args.max_dec_len, temperature=0.0)
    local = numbers[topology.data_rank :: topology.data_size]
    with trainer.eval_mode(engine.runner.model):
        groups = generate_groups(engine, dataset, local, [params] * len(local))
    score_groups(groups, functions, dataset, topology)
    combine_scores(groups, [function.weight for function in functions], args)
    rows = [[g.number, g.replies[0].reward, g.replies[0].scores, len(g.replies[0].token_ids)] for g in groups]
    texts = {g.number: g.replies[0].text for g in groups}
    if topology.degrees.world > 1:
        parts = topology.all_gather_object([rows, list(texts.items())] if topology.tp.rank == 0 else [[], []])
        rows = sorted({row[0]: row for part, _ in parts for row in part}.values())
        texts = dict(pair for _, part in parts for pair in part)
    metrics = {"eval_reward": _mean([row[1] for row in rows])}
    for i, function in enumerate(functions):
        metrics[f"eval_rewards/{function.name}"] = _mean([row[2][i] for row in rows])
    return metrics | {"eval_length": _mean([row[3] for row in rows])}, [texts[number] for number in numbers]


def _mean(numbers):
    known = [number for number in numbers if number is not None and not math.isnan(number)]
    return float(np.mean(known)) if known else math.nan
