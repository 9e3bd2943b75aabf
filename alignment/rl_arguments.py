"""The keys of rl.py: their defaults, other scripts' names for them, and what is refused.

A key is a field with a comment. docs/rl.md has the names of TRL and verl as a table.
"""

import dataclasses
import math
import re

from alignment import rl_math
from alignment.advantages import ESTIMATORS, TOKEN_LEVEL
from arguments import SCHEDULES, LoraArgs
from formats.files import UserError

LOWS = {
    0: "top_k overlong_penalty_factor reward_timeout clip_range_value value_loss_coeff clip_range_ratio kl_loss_coeff "
    "kl_coeff gamma ptx_coeff critic_learning_rate critic_weight_decay critic_warmup_ratio critic_min_learning_rate "
    "critic_decay_steps",
    1: "max_src_len max_dec_len min_dec_len global_batch_size rollout_n update_iters overlong_reward_buffer "
    "max_gen_batches max_turns",
}
OFFLOADS = "reference freeze_model reward eval optimizer train_model"  # the first is ours, the others PaddleNLP's
ALGORITHMS = {"grpo": "grpo", "rloo": "rloo", "reinforce_plus_plus": "reinforce_plus_plus", "ppo": "gae"}


@dataclasses.dataclass
class Args(LoraArgs):
    script = "rl"  # whose keys they are

    model_name_or_path: str = ""  # folder of the policy before training, which is also the reference
    tokenizer_name_or_path: str | None = None  # folder of the tokenizer; default: model_name_or_path
    train_datasets: str = ""  # prompts to learn from: a file, a folder with train.json, or a blend: docs/data.md
    eval_datasets: str = ""  # prompts to evaluate on: a file, or a folder with dev.json
    prompt_key: str | None = None  # other name of the key that holds the prompt; None: as in docs/data.md
    max_samples: int | None = None  # take only the first so many records of each source
    columns: str | dict | None = None  # other names of a record's keys: {"src": "question", …}
    chat_template: str | None = None  # name in chat.FORMATS, plain, none, or a template file; None: the tokenizer's own
    max_src_len: int = 3072  # most tokens of a prompt, which loses its beginning
    max_dec_len: int = 512  # most tokens of a reply
    min_dec_len: int = 1  # fewest tokens of a reply
    max_length: int | None = None  # most positions of a packed row; None: see row_length()
    reward_funcs: str | list[str] | None = None  # FILE.py:FUNCTION, …; see docs/rl.md for the signature
    reward_weights: list[float] | None = None  # weight of each; None: 1
    reward_model_name_or_path: str | None = None  # folder of a reward model, whose score is one more reward
    process_reward: bool = False  # it is a process reward model: the least probability of a line to be right
    placeholder_token: str = "ки"  # process_reward: what stands after each line, as in reward.py
    reward_tokens: str | list[str] = "+,-"  # process_reward: what it says there, as in reward.py
    reward_server: str | None = None  # URL of a reward server that speaks PaddleNLP's JSON, for one more reward
    reward_timeout: float = 0.0  # most seconds of one call of a reward function or a tool; 0: no limit
    tools: str | list[str] | None = None  # FILE.py:FUNCTION, …: what a reply may call; see docs/rl.md
    environment_factory: str | None = None  # FILE.py:CLASS: an object for each reply, whose methods it may call
    max_turns: int = 8  # most turns of a reply that calls tools
    clip_range_score: float = 10.0  # rewards are clipped to [-this, this]
    normalize_reward: bool = False  # whiten the rewards of a rollout
    enable_overlong_reward_buffer: bool = False  # subtract up to overlong_penalty_factor from long replies
    overlong_reward_buffer: int = 256  # tokens before max_dec_len over which the penalty grows
    overlong_penalty_factor: float = 1.0
    mask_truncated_completions: bool = False  # learn nothing from replies that reached max_dec_len
    rl_algorithm: str | None = None  # a name in ALGORITHMS: sets advantage_estimator
    advantage_estimator: str | None = None  # one of ESTIMATORS; None: grpo
    loss_type: str = "dapo"  # one of rl_math.LOSS_TYPES
    importance_sampling_level: str = "token"  # or sequence (GSPO)
    scale_rewards: str = "group"  # grpo: divide by the std of the group, of the batch, or none
    normalize_advantage: bool | None = None  # whiten advantages over tokens; None: with reinforce_plus_plus and gae
    gamma: float = 1.0  # discount of reinforce_plus_plus and gae
    gae_lambda: float = 0.95  # gae: 1 has no bias by the values, 0 the least variance
    clip_range_ratio: float = 0.2  # how far a token's probability may move in an update, relative to the engine's
    clip_range_ratio_low: float | None = None  # downwards; None: clip_range_ratio
    clip_range_ratio_high: float | None = None  # upwards; None: clip_range_ratio
    importance_sampling_mode: str | None = None  # one of rl_math.SAMPLING_CORRECTIONS, for rollouts in other arithmetic
    importance_sampling_clip_min: float | None = None  # least weight by it
    importance_sampling_clip_max: float = 3.0  # largest weight by it
    dual_clip: float | None = None  # largest ratio of tokens with a negative advantage, above 1
    clip_range_value: float = 5.0  # gae: how far a value may move from the one before the updates
    value_loss_coeff: float = 0.1  # gae: weight of the value loss
    critic_model_name_or_path: str | None = (
        None  # gae: folder of a reward or language model; None: a head on the policy
    )
    critic_learning_rate: float | None = None  # gae: of the critic or of that head; None: learning_rate
    critic_weight_decay: float | None = None  # these and what follows only of a critic; None: the key without critic_
    critic_lr_scheduler_type: str | None = None
    critic_warmup_ratio: float | None = None
    critic_min_learning_rate: float | None = None
    critic_decay_steps: int | None = None
    critic_recompute: bool | None = None
    ptx_datasets: str | None = None  # conversations whose replies are learned beside, so that they are not forgotten
    ptx_coeff: float = 0.0  # weight of their mean cross-entropy
    use_ema: bool = False  # evaluate and write an exponential moving average of the weights; training goes on without
    ema_beta: float = 0.992  # what is kept of the average at each update
    pg_loss_coeff: float = 1.0  # weight of the policy loss
    kl_loss_coeff: float | None = None  # weight of KL (k3) in the loss; None: 0.001, or 0 where KL is in the reward
    kl_coeff: float | None = None  # weight of KL in the reward; None: 0.02 with reinforce_plus_plus and gae, else 0
    entropy_coeff: float = 0.0  # weight of the entropy, which is to stay high
    global_batch_size: int = 8  # prompts of a rollout
    rollout_n: int = 8  # replies to each prompt
    global_mini_batch_size: int = -1  # prompts of one update; -1: all of the rollout
    update_iters: int = 1  # passes over a rollout
    dynamic_sampling: bool = False  # replace groups whose rewards are all equal by groups of further prompts
    max_gen_batches: int = 32  # most batches of prompts for that, the first one included
    rollout_dtype: str | None = None  # of the engine's weights: float32, bfloat16; None: as the trainer's products
    rollout_quant_type: str | None = None  # weight_only_int8: the engine's linears in int8, the rest in bfloat16
    offload_level: str | None = None  # some of OFFLOADS: models that are to be in host memory, as on a CPU they are
    rollout_max_num_seqs: int = -1  # most replies the engine writes at once; -1: all, at most 128
    temperature: float = 1.0  # of the sampling; log-probabilities are those of the scaled distribution
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # < 1: sample among the likeliest tokens whose probabilities sum to it
    repetition_penalty: float = 1.0  # only 1: with a penalty, training would compute other log-probabilities
    save_rollouts: bool = False  # write every rollout to output_dir/rollouts
    replay: str | None = None  # train on a file or folder that save_rollouts wrote, and sample nothing

    # Of PaddleNLP and dpo.py, of TRL, of verl; docs/rl.md has them as a table.
    aliases = dict(
        pair.split("=")
        for pair in """
        actor_model_name_or_path=model_name_or_path reward_critic_model_name_or_path=critic_model_name_or_path
        train_dataset_path=train_datasets dev_dataset_path=eval_datasets
        num_generations=rollout_n max_prompt_length=max_src_len max_completion_length=max_dec_len
        max_prompt_len=max_src_len
        epsilon=clip_range_ratio epsilon_high=clip_range_ratio_high delta=dual_clip beta=kl_loss_coeff
        num_iterations=update_iters cliprange_value=clip_range_value vf_coef=value_loss_coeff kl_coef=kl_coeff
        lam=gae_lambda whiten_rewards=normalize_reward entropy_coef=entropy_coeff adv_estimator=advantage_estimator
        train_batch_size=global_batch_size ppo_mini_batch_size=global_mini_batch_size ppo_epochs=update_iters
        clip_ratio=clip_range_ratio clip_ratio_low=clip_range_ratio_low clip_ratio_high=clip_range_ratio_high
        clip_ratio_c=dual_clip kl_loss_coef=kl_loss_coeff max_response_length=max_dec_len
        max_assistant_turns=max_turns vllm_importance_sampling_mode=importance_sampling_mode
        vllm_importance_sampling_clip_max=importance_sampling_clip_max
        vllm_importance_sampling_clip_min=importance_sampling_clip_min
    """.split()
    )

    def check(self) -> list[str]:
        notes = super().check()
        needed = {"model_name_or_path": True, "train_datasets": self.do_train, "eval_datasets": self.do_eval}
        needed["reward_funcs"] = not (self.reward_model_name_or_path or self.reward_server)
        for key, is_needed in needed.items():
            if is_needed and not getattr(self, key):
                raise UserError(f"{key}: missing")
        if self.do_predict:
            raise UserError(
                "do_predict: there are no test prompts; evaluate other prompts by do_eval and eval_datasets"
            )
        self._check_numbers()
        self._resolve_algorithm()
        self._check_steps()
        return notes + self._check_further_models() + self._check_engine()

    def check_topology(self) -> None:
        super().check_topology()
        for key in ("pipeline", "context", "sep", "expert"):
            if getattr(self, f"{key}_parallel_degree") > 1:
                raise UserError(f"{key}_parallel_degree: rl.py runs with data and tensor parallelism and sharding only")
        if (self.tools or self.environment_factory) and self.tensor_parallel_degree > 1:
            raise UserError("tools: each rank of tensor parallelism would call them; leave tensor_parallel_degree out")
        if self.process_reward and self.tensor_parallel_degree > 1:
            raise UserError("process_reward: the model is not sharded; leave tensor_parallel_degree out")
        if self.rollout_quant_type and self.tensor_parallel_degree > 1:
            raise UserError(
                "rollout_quant_type: under tensor_parallel_degree the engine runs the layers that are trained"
            )
        if "stage3" in (self.sharding or ""):
            raise UserError("sharding: stage3 is not supported here: the engine needs all weights; use stage2")

    def row_length(self, longest: int) -> int:
        """Most positions of a packed row, for prompts of up to `longest` tokens: max_length, else those of a group, up
        to 2,048 unless a prompt and a reply need more."""
        whole = longest + self.rollout_n * self.max_dec_len
        return self.max_length or max(longest + self.max_dec_len, min(whole, 2048))

    def check_dry_run(self) -> list[str]:
        self.max_length = self.row_length(self.max_src_len)
        return super().check_dry_run()

    def _check_numbers(self):
        for low, keys in LOWS.items():
            for key in keys.split():
                if getattr(self, key) is not None and getattr(self, key) < low:
                    raise UserError(f"{key}: {getattr(self, key)}; it must be at least {low}")
        if self.rollout_n > 128:
            raise UserError(f"rollout_n: {self.rollout_n}; at most 128 replies to a prompt")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.clip_range_score <= 0:
            raise UserError("temperature and clip_range_score must be positive, top_p in (0, 1]")
        if not 0 <= self.ema_beta < 1:
            raise UserError(f"ema_beta: {self.ema_beta}; it must be at least 0 and below 1")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip: {self.dual_clip}; it must be above 1")
        choices = {"loss_type": rl_math.LOSS_TYPES, "importance_sampling_level": ("token", "sequence")}
        choices |= {"importance_sampling_mode": (*rl_math.SAMPLING_CORRECTIONS, None)}
        choices |= {"rollout_dtype": ("float32", "bfloat16", None)}
        choices |= {"rollout_quant_type": ("weight_only_int8", "", None)}
        choices |= {"scale_rewards": ("group", "batch", "none"), "advantage_estimator": (*ESTIMATORS, None)}
        for key, possible in (choices | {"rl_algorithm": (*ALGORITHMS, None), "repetition_penalty": (1.0,)}).items():
            if getattr(self, key) not in possible:
                names = ", ".join(str(value) for value in possible if value)
                raise UserError(f"{key}: {getattr(self, key)!r}; possible are {names}")
        if self.load_best_model_at_end and self.metric_for_best_model != "reward":
            raise UserError(f"metric_for_best_model: {self.metric_for_best_model}; possible here is reward")

    def _resolve_algorithm(self):
        of_algorithm = ALGORITHMS.get(self.rl_algorithm)
        if of_algorithm and self.advantage_estimator not in (None, of_algorithm):
            raise UserError(
                f"rl_algorithm {self.rl_algorithm} and advantage_estimator {self.advantage_estimator} differ; give one"
            )
        self.advantage_estimator = self.advantage_estimator or of_algorithm or "grpo"
        per_token = self.advantage_estimator in TOKEN_LEVEL
        if self.kl_coeff is None:
            self.kl_coeff = 0.02 if per_token else 0.0
        if self.kl_loss_coeff is None:
            self.kl_loss_coeff = 0.0 if self.kl_coeff else 0.001
        if self.normalize_advantage is None:
            self.normalize_advantage = per_token
        if self.advantage_estimator in ("grpo", "rloo") and self.rollout_n < 2:
            raise UserError(
                f"rollout_n: 1: {self.advantage_estimator} compares replies to one prompt; give 2 or more, or ppo"
            )
        if self.clip_range_ratio_low is None:
            self.clip_range_ratio_low = self.clip_range_ratio
        if self.clip_range_ratio_high is None:
            self.clip_range_ratio_high = self.clip_range_ratio

    def _check_steps(self):
        if self.gradient_accumulation_steps > 1:
            raise UserError(
                "gradient_accumulation_steps: global_mini_batch_size says what an update holds, and "
                "per_device_train_batch_size how many packed rows are computed at once; leave it out"
            )
        if self.global_mini_batch_size > self.global_batch_size or self.global_mini_batch_size == 0:
            raise UserError(f"global_mini_batch_size: {self.global_mini_batch_size}: at most global_batch_size, or -1")
        updates = self.updates_per_rollout
        if self.save_strategy == "steps" and self.do_train and self.save_steps % updates:
            raise UserError(
                f"save_steps: {self.save_steps}; it must be a multiple of {updates}, the updates of a rollout"
            )

    def _check_further_models(self):
        """What learns or is learned from beside the policy and its rollouts."""
        if self.process_reward and not self.reward_model_name_or_path:
            raise UserError("process_reward: reward_model_name_or_path is missing: the folder of the model")
        if self.ptx_datasets and not self.ptx_coeff:
            raise UserError("ptx_datasets: ptx_coeff is 0, so nothing is learned; PaddleNLP's configs have 16")
        if self.critic_lr_scheduler_type not in (None, *SCHEDULES):
            known = ", ".join(SCHEDULES)
            raise UserError(f"critic_lr_scheduler_type: {self.critic_lr_scheduler_type!r}; possible are {known}")
        if self.critic_model_name_or_path and self.advantage_estimator != "gae":
            raise UserError(
                f"critic_model_name_or_path: advantage_estimator {self.advantage_estimator} needs no values; gae does"
            )
        notes = []
        if self.ptx_coeff and not self.ptx_datasets:
            notes.append(f"ptx_coeff: {self.ptx_coeff:g} has no effect without ptx_datasets")
        if self.critic_model_name_or_path:
            return notes
        given = [f.name for f in dataclasses.fields(self) if f.name.startswith("critic_") and getattr(self, f.name)]
        return notes + [
            f"{name}: only a critic of its own (critic_model_name_or_path) has it"
            for name in given
            if name != "critic_learning_rate"
        ]

    def _check_engine(self):
        if unknown := {*re.findall(r"[^\s,]+", self.offload_level or "")} - {*OFFLOADS.split()}:
            raise UserError(f"offload_level: {unknown.pop()!r}; possible are {OFFLOADS.replace(' ', ', ')}")
        if not self.rollout_quant_type:
            return []
        if self.rollout_dtype == "float32":
            raise UserError("rollout_dtype: float32: rollout_quant_type computes in bfloat16; leave one of them out")
        if self.importance_sampling_mode is not None:
            return []
        self.importance_sampling_mode = "token_truncate"
        return ["rollout_quant_type: importance_sampling_mode is token_truncate, as rollouts are rounded"]

    @property
    def has_value_head(self) -> bool:
        """Whether the policy has a head for values."""
        return self.advantage_estimator == "gae" and not self.critic_model_name_or_path

    @property
    def mini_batches(self) -> int:
        """Updates of one pass over a rollout."""
        size = self.global_mini_batch_size
        return 1 if size < 0 else math.ceil(self.global_batch_size / size)

    @property
    def updates_per_rollout(self) -> int:
        return self.update_iters * self.mini_batches

    @property
    def needs_reference(self) -> bool:
        return bool(self.kl_coeff or self.kl_loss_coeff)
