"""What scripts share besides model, data, kernels: arguments, presets, schedule, optimizer, checkpoints, log, metrics.

    args = parse_args(Args, ["configs/llama_lora.json", "--learning_rate", "1e-4"])    # JSON files, then --key value
    while state.step < total:                                   # the loop itself is written out in each script
        checkpoints.save(state)
        ...; optimizer.step(learning_rate(state.step, args, total), grad_scale)
        state.step += 1; log.step(state, loss=..., ...)

Argument names, defaults and meanings are PaddleNLP's, so that its JSON files run here with only their paths changed.
The tables IGNORED, OPTIONS and REFUSED name every upstream key that is not a field of ours, with the reason.

A checkpoint is a folder: weights in Hugging Face's layout, the optimizer in Unified Checkpoint's names, one
trainer_state.json with all sizes and checksums, and a marker written last. All tensors are whole, whatever the topology:
ranks write their shares of them and read what they hold, so that any topology goes on with any other's. No generator state is in it: all randomness is a pure function of
(seed, step, micro-step), see seed_step; so a resumed run equals the uninterrupted one bit for bit.
"""

import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import hashlib
import json
import math
import os
import re
import resource
import shutil
import sys
import textwrap
import threading
import time
import types
import typing
from pathlib import Path

import kernels  # before paddle: it silences what paddle says while it is imported

import numpy as np
import paddle
from tqdm import tqdm

import parallel
from data import UserError
from model import (
    MASTERS,
    MODELS,
    Entry,
    ModelConfig,
    adapter_files,
    atomic_file,
    base_weights,
    build,
    linears,
    load_weights,
    lora_paths,
    read_safetensors,
    stored_tensors,
    stored_weights,
    write_safetensors,
)
from parallel import (
    BY_INPUTS,
    NAMES,
    SINGLE,
    Degrees,
    Launch,
    Share,
    checksums,
    crc32_of,
    held_by,
    in_turn,
    stage_layers,
    timetable,
    unit_of,
)

# ================================================================================================ arguments

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
METRICS = (
    "loss",
    "accuracy",
    "ppl",
    "bleu4",
    "rouge-1",
    "rouge-2",
    "rouge-l",
    "keyword_recall",
)  # what metric_for_best_model may name


@dataclasses.dataclass
class ScriptArgs:
    """The keys that every script has. A script that does not train subclasses it once and adds its own."""

    output_dir: str = ""  # where the script writes to
    overwrite_output_dir: bool = False  # remove the run that output_dir holds
    seed: int = 42  # of data order, initialisation, dropout, sampling
    device: str = "auto"  # auto, cpu, gpu, gpu:1, dcu (ROCm), xpu, npu, gcu, or another device of a plug-in of Paddle
    kernels: str = "auto"  # back end of the fused ops, see kernels/__init__.py
    bf16: bool = False  # training: products in bfloat16, trained weights and all else in float32
    fp16: bool = False  # compute in float16
    disable_tqdm: bool | None = None  # true: plain lines, no bar; None: a bar if stderr is a terminal
    tensor_parallel_degree: int = (
        1  # data parallelism is what the product of the degrees leaves of the processes; -1 means 1
    )
    pipeline_parallel_degree: int = 1
    sharding_parallel_degree: int = -1  # -1: all that the others leave if `sharding` is set, else 1
    sep_parallel_degree: int = 1  # a sequence is spread, by exchanging tokens for heads around attention
    context_parallel_degree: int = 1  # a sequence is spread, keys and values going around; not beside sep
    expert_parallel_degree: int = 1  # spread over the ranks of the others, so not a factor

    def check(self):
        """Resolve values that depend on others and refuse those that contradict: UserError. Returns lines to print.

        A script's own Args extends it: `return super().check() + [...]`.
        """
        if self.seed < 0:
            raise UserError(f"seed: {self.seed}; it must not be negative")
        return _check_hardware(self)

    def check_model(self):
        """UserError, before a run begins, for a model or tokenizer that is not here: what to download, and to where."""
        for key in ("model_name_or_path", "tokenizer_name_or_path"):
            path = getattr(self, key, None)
            if path and not Path(path).exists():
                raise UserError(not_here(key, path))


@dataclasses.dataclass
class TrainingArgs(ScriptArgs):
    """The keys that every training script has. A script subclasses it once and adds its own.

    output_dir receives checkpoints, the final model and the log.
    """

    do_train: bool = False  # train
    do_eval: bool = False  # evaluate on the dev data (during training: see evaluation_strategy) and at the end
    do_predict: bool = False  # evaluate on the test data at the end
    per_device_train_batch_size: int = 8  # rows of one micro-batch
    per_device_eval_batch_size: int = 8  # rows of one evaluation batch
    gradient_accumulation_steps: int = 1  # micro-batches of one step
    num_train_epochs: float = 1.0  # passes over the data, unless max_steps is given
    max_steps: int = -1  # > 0: this many steps, whatever num_train_epochs says
    learning_rate: float = 5e-5  # the peak
    lr_scheduler_type: str = "linear"  # one of SCHEDULES
    warmup_steps: int = 0  # steps from 0 to the peak; > 0 wins over warmup_ratio
    warmup_ratio: float = 0.0  # the same as a fraction of all steps
    min_learning_rate: float | None = None  # where linear and cosine end; None: min_lr
    min_lr: float = 0.0  # upstream's other name for it
    decay_steps: int | None = None  # linear and cosine are at their end from this step on; None or 0: at the last step
    num_cycles: float = 0.5  # waves of cosine: 0.5 falls once
    lr_end: float = 1e-7  # where polynomial ends
    power: float = 1.0  # exponent of polynomial
    weight_decay: float = 0.0  # decoupled, on parameters of two or more dimensions only
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # global norm to clip the gradient to; 0: no clipping
    logging_steps: int = 500  # a log line every so many steps
    logging_first_step: bool = False  # and one for the first step
    logging_dir: str | None = None  # where visualdl writes; None: output_dir/vdl_log
    report_to: str | list[str] | None = None  # "visualdl" or "none"
    evaluation_strategy: str | None = None  # no, steps, epoch; None: steps if do_eval and eval_steps, else no
    eval_steps: int | None = None  # evaluate every so many steps; None: logging_steps
    max_evaluate_steps: int = -1  # > 0: at most this many batches an evaluation
    save_strategy: str = "steps"  # no, steps or epoch
    save_steps: int = 500  # a checkpoint every so many steps
    save_total_limit: int | None = None  # keep the newest so many checkpoints, and the best; None or 0: all
    load_best_model_at_end: bool = False  # end with the weights that evaluated best
    metric_for_best_model: str | None = None  # one of METRICS; None: loss
    greater_is_better: bool | None = None  # None: true unless the metric is loss or ppl
    resume_from_checkpoint: bool | str | None = None  # a path, or true: the newest complete one in output_dir
    ignore_load_lr_and_optim: bool = False  # resume with the weights and the step, but fresh moments
    ignore_save_lr_and_optim: bool = False  # checkpoints without the moments: smaller, no exact resume
    unified_checkpoint: bool = True  # upstream's switch; checkpoints always are
    unified_checkpoint_config: str | list[str] | None = None  # some of UNIFIED, separated by blanks or commas
    ckpt_quant_stage: str = "O0"  # moments in checkpoints: O0 float32, O1 8-bit, O2 4-bit integers
    dataloader_drop_last: bool = False  # drop the last incomplete batch of an epoch
    recompute: bool = False  # recompute activations in backward instead of keeping them, of each block …
    recompute_granularity: str = "full"  # … all; full_attn: attention's; core_attn: those behind its first linears; …
    no_recompute_layers: list[int] | None = None  # … but not of these blocks, counted from 0
    sharding: str | None = (
        None  # stage1 (moments), stage2 (gradients too), stage3 (weights too), and offload; None: stage1
    )
    virtual_pp_degree: int = 1  # stages of the pipeline on each of its ranks
    sequence_parallel: bool = False  # with tensor parallelism: tokens are spread between attention and MLP too
    hybrid_parallel_topo_order: str | None = None  # which axis is outside: pp_first (also None) or sharding_first
    dry_run: bool = False  # print shapes, parameters, FLOPs and memory a rank of the model, and end: no data is needed

    def check(self):
        _check_numbers(self)
        notes = super().check()
        if not self.output_dir:
            raise UserError("output_dir: missing; give the folder to write to")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise UserError("nothing to do: none of do_train, do_eval, do_predict is true")
        if getattr(self, "flash_mask", False) and not getattr(self, "zero_padding", True):
            raise UserError("flash_mask: true needs zero_padding: true (the mask keeps packed samples apart)")
        if self.min_learning_rate is None:
            self.min_learning_rate = self.min_lr
        elif self.min_lr not in (0.0, self.min_learning_rate):
            raise UserError(f"min_lr {self.min_lr:g} is not min_learning_rate {self.min_learning_rate:g}; give one")
        end = self.lr_end if self.lr_scheduler_type == "polynomial" else self.min_learning_rate
        if self.lr_scheduler_type in ("linear", "cosine", "polynomial") and end > self.learning_rate:
            raise UserError(f"learning_rate {self.learning_rate:g} is below {end:g}, {self.lr_scheduler_type}'s end")
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise UserError(f"decay_steps {self.decay_steps} must be more than warmup_steps {self.warmup_steps}")
        return notes + _check_strategies(self) + _check_unified(self)

    def check_dry_run(self):
        """check() of a run that only counts: what names data, output or steps may be missing, and processes too."""
        _check_numbers(self)
        if not self.model_name_or_path:
            raise UserError("model_name_or_path: missing")
        if getattr(self, "lora", False) and getattr(self, "prefix_tuning", False):
            raise UserError("lora and prefix_tuning are both true; choose one")
        return []


def _check_numbers(args):
    """Ranges and choices, one key at a time."""
    batches = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps"
    for key in f"{batches} logging_steps save_steps eval_steps".split():
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"{key}: {getattr(args, key)}; it must be at least 1")
    not_negative = "learning_rate min_learning_rate min_lr lr_end weight_decay max_grad_norm warmup_steps decay_steps"
    for key in f"{not_negative} num_cycles power".split():
        if getattr(args, key) is not None and getattr(args, key) < 0:
            raise UserError(f"{key}: {getattr(args, key)}; it must not be negative")
    for key, low in (("warmup_ratio", 0), ("adam_beta1", 0), ("adam_beta2", 0), ("adam_epsilon", 1e-30)):
        if not low <= getattr(args, key) < 1:
            raise UserError(f"{key}: {getattr(args, key)}; it must be at least {low} and below 1")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs: {args.num_train_epochs}; it must be positive, or max_steps be given")
    strategies, granularities = ("no", "steps", "epoch"), ("full", "full_attn", "core_attn")
    for key, choices in (
        ("lr_scheduler_type", SCHEDULES),
        ("evaluation_strategy", (*strategies, None)),
        ("save_strategy", strategies),
        ("recompute_granularity", granularities),
        ("metric_for_best_model", (*METRICS, *(f"eval_{name}" for name in METRICS), "no", None)),
    ):
        if getattr(args, key) not in choices:
            raise UserError(f"{key}: {getattr(args, key)!r}; possible are {', '.join(filter(None, choices))}")
    for layer in args.no_recompute_layers or ():
        if layer < 0:
            raise UserError(f"no_recompute_layers: {layer}; layers are counted from 0")
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or []:
        if name not in ("visualdl", "none"):
            raise UserError(f"report_to: {name!r}; possible are visualdl and none (metrics.jsonl is always written)")


def _check_hardware(args):
    """Devices, precision and the number of processes."""
    world = Launch.of_environment().world
    if world > 1 and not isinstance(args, TrainingArgs):
        raise UserError(f"this run has {world} processes, but this script works in one: start it without the launcher")
    Degrees.of(args, world=world)
    if args.fp16 and args.bf16:
        raise UserError("fp16 and bf16 are both true; choose one")
    if args.device != "auto":
        kernels.check_device(args.device)
    notes = []
    if args.fp16:
        notes.append("fp16: float16 is not here, so float32 is used")
    if args.bf16 and not isinstance(args, TrainingArgs):
        notes.append("bf16: only training computes in bfloat16, so float32 is used")
    for key in ("sharding", "sequence_parallel"):
        if getattr(args, key, None) and world == 1:
            notes.append(f"ignored: {key}: this run has one process")
    return notes


def _check_strategies(args):
    """When to evaluate and to save, and whether the best model can be known."""
    if args.evaluation_strategy is None:
        args.evaluation_strategy = "steps" if args.do_eval and args.eval_steps else "no"
    args.do_eval = args.do_eval or args.evaluation_strategy != "no"
    args.eval_steps = args.eval_steps or args.logging_steps
    metric = (args.metric_for_best_model or "no").removeprefix("eval_")
    args.metric_for_best_model = metric = "loss" if metric == "no" else metric
    if args.greater_is_better is None:
        args.greater_is_better = metric not in ("loss", "ppl")
    if not (args.load_best_model_at_end and args.do_train):
        return []
    if args.evaluation_strategy == "no":
        args.load_best_model_at_end = False
        return ["load_best_model_at_end: nothing is evaluated (evaluation_strategy: no), so the last model is kept"]
    if args.save_strategy != args.evaluation_strategy:
        both = f"save_strategy ({args.save_strategy}) to be evaluation_strategy ({args.evaluation_strategy})"
        raise UserError(f"load_best_model_at_end needs {both}: only a saved model can be loaded again")
    if args.save_strategy == "steps" and args.save_steps % args.eval_steps and args.eval_steps % args.save_steps:
        both = f"save_steps ({args.save_steps}) to be a multiple of eval_steps ({args.eval_steps}), or the reverse"
        raise UserError(f"load_best_model_at_end needs {both}")
    return []


UNIFIED = {  # the words of unified_checkpoint_config
    "async_save": "training goes on while a copy of the state is written",
    "skip_save_model_weight": "bf16: no model*.safetensors; the float32 master weights say it all, from_pretrained reads them",
    "remove_master_weight": "bf16: no float32 master weights; resuming from the rounded ones is no exact continuation",
    "master_weight_compatible": "resume from a checkpoint without master weights too, from its rounded weights",
    "enable_all_options": "skip_save_model_weight and master_weight_compatible",
    "ignore_merge_optimizer": "ignored: moments are always whole in the files, so that any topology can go on",
}


def _check_unified(args):
    """The words of unified_checkpoint_config as a list of those that change something; lines to print."""
    given = args.unified_checkpoint_config or ()
    words = re.split(r"[\s,]+", given.strip()) if isinstance(given, str) else list(given)
    for word in filter(None, words):
        if word not in UNIFIED:
            raise UserError(f"unified_checkpoint_config: {word!r} is not here; there are {', '.join(UNIFIED)}")
    if args.ckpt_quant_stage not in ("O0", "O1", "O2"):
        raise UserError(f"ckpt_quant_stage: {args.ckpt_quant_stage!r}; possible are O0, O1, O2")
    if "enable_all_options" in words:
        words += ["skip_save_model_weight", "master_weight_compatible"]
    notes = [] if args.unified_checkpoint else ["unified_checkpoint: false is ignored: it is the only layout here"]
    if "ignore_merge_optimizer" in words:
        notes.append(f"unified_checkpoint_config: ignore_merge_optimizer is {UNIFIED['ignore_merge_optimizer']}")
    aside = ("", "enable_all_options", "ignore_merge_optimizer")
    args.unified_checkpoint_config = sorted({word for word in words if word not in aside})
    return notes


def _table(rows):
    return {key: why for why, keys in rows for key in keys.split()}


# Accepted, with one printed line each: upstream keys that have no meaning here.
IGNORED = _table([
    ("which kernels run is chosen by `kernels`", """
        use_flash_attention use_fused_rms_norm use_fused_rope use_fused_linear use_fused_dropout_add
        use_fused_linear_cross_entropy use_fast_layer_norm fuse_attention_qkv fuse_attention_ffn fused_linear
        use_fused_head_and_loss_fn use_quick_lora enable_linear_fused_grad_add use_fusemt use_intermediate_api"""),
    ("the sharding axis is one of its own", "sharding_parallel_mesh_dimension"),
    ("sizes of messages are fixed", "sharding_comm_buffer_size_MB"),
    ("every rank reads whole batches, the model cuts them", "split_inputs_sequence_dim"),
    ("what ranks of one axis have of a gradient is always sent as one", "fuse_sequence_parallel_allreduce split_norm_comm"),
    ("a gradient that only others have counts as zero, a weight for which none has one rests", "ddp_find_unused_parameters"),
    ("losses come from logits in parts, whole ones where they are asked for", "tensor_parallel_output"),
    ("the launcher says which process this is", "tensor_parallel_rank local_rank"),
    ("every process reads the data itself", "distributed_dataloader"),
    ("one log, by the first process; one output_dir, which all see", "share_folder log_on_each_node save_on_each_node"),
    ("experts are spread by expert_parallel_degree and tensor_parallel_degree", "use_expert_parallel expert_tensor_parallel_degree"),
    ("checkpoints do not depend on how a run is spread", """
        save_sharded_model load_sharded_model force_reshard_pp auto_parallel_resume_form_hybrid_parallel
        save_sharding_stage1_model_include_freeze_params"""),
    ("checkpoints are always unified and complete", """
        save_rng_states save_tokenizer ordered_save_group_size use_async_save output_signal_dir enable_zero_cost_checkpoint zcc_workers_num
        zcc_pipeline_hooks_capacity_usage zcc_save_ema_coef zcc_ema_interval flash_device_save_steps pdc_download_ckpt
        pdc_download_timeout ignore_data_skip"""),
    ("precision is set by bf16 and fp16 alone", """
        fp16_opt_level amp_master_grad amp_custom_black_list amp_custom_white_list bf16_full_eval fp16_full_eval
        scale_loss"""),
    ("data is tokenised once and read from memory", """
        dataloader_num_workers data_impl skip_warmup data_cache lazy lazy_data_processing dataset_num_proc
        dataset_batch_size dataset_kwargs dataset_text_field remove_unused_columns label_names"""),
    ("evaluation keeps no logits, one pass gives all its figures", """
        eval_accumulation_steps prediction_loss_only past_index minimum_eval_times eval_packing"""),
    ("speed is measured by tests/bench_train.py and shown in the log", """
        benchmark autotuner_benchmark skip_profile_timer skip_memory_metrics metrics_output_path
        count_trained_tokens"""),
    ("gradients are released and moments kept where they are", "release_grads flatten_param_grads offload_optim"),
    ("recompute is by recompute_granularity and no_recompute_layers", """
        recompute_use_reentrant refined_recompute offload_recompute_inputs pp_recompute_interval"""),
    ("there is no dropout in these models", "hidden_dropout_prob attention_probs_dropout_prob dropout_warmup_steps"),
    ("nothing is sent anywhere", """
        aistudio_repo_id aistudio_repo_private aistudio_repo_license aistudio_token run_name wandb_api_key
        wandb_http_proxy"""),
    ("it comes from the tokenizer", "pad_token_id eos_token"),
    ("it comes from the model's config.json", "model_init_kwargs"),
    ("no experts in these models", "expert_max_capacity expert_min_capacity"),
    ("it belongs to an adapter that is not here", """
        vera_rank lokr_path lokr_dim layers position intervention_type rank act_fn add_bias dropout"""),
    ("it belongs to 4-bit LoRA, which is not here", """
        qlora_weight_blocksize qlora_weight_double_quant qlora_weight_double_quant_block_size"""),
    ("it belongs to use_long_sequence_strategies or use_ssa, which are not here", """
        strategy_type strategy_name ssa_group_size_ratio"""),
    ("a key of pretrain.py", """
        input_dir split max_seq_length continue_training mask_across_documents num_hidden_layers"""),
    ("a key of finetune.py", """
        dataset_name_or_path src_length max_length zero_padding greedy_zero_padding flash_mask pad_to_max_length
        pad_to_multiple_of chat_template eval_with_do_generation save_generation_output top_k top_p lora_rank lora_alpha
        lora_dropout rslora lora_plus_scale pissa dora lora_target_modules lora_path num_prefix_tokens prefix_projection
        prefix_projection_hidden_size prefix_path neftune_noise_alpha"""),
    ("a key of dpo.py", """
        beta simpo_gamma label_smoothing loss_type pref_loss_ratio sft_loss_ratio dpop_lambda ref_model_update_steps
        reference_free max_seq_len max_prompt_len dev_dataset_path rslora_plus"""),
    ("a key of reward models", """
        placeholder_token reward_tokens normalize_score_during_training normalizer_type normalizer_momentum
        regularization"""),
    ("a key of embedding models", """
        max_query_len max_passage_len group_size query_template passage_template return_position_ids"""),
    ("a key of quantize.py", """
        quant_type skip_list_names weight_quant_method act_quant_method search_alpha_min search_alpha_max
        search_scale_min search_scale_max ptq_step shift shift_all_linears shift_step smooth smooth_all_linears
        smooth_step smooth_piecewise_search smooth_k_piece smooth_search_piece gptq_step auto_clip"""),
    ("samples are weighed alike, as they come", "shift_sampler smooth_sampler"),
    ("it belongs to a way of quantising that is not here (fp8, 8-bit caches, AWQ)", """
        fp8_type cachekv_quant_method awq_step autoclip_step"""),
    ("the report of quantize.py is always written", "do_quant_debug test_sample"),
    ("serve.py always batches continuously, from a pool of blocks", """
        inference_model block_attn append_attn dynamic_insert avx_model avx_type avx_cachekv_type output_via_mq
        total_request_num use_fake_parameter export_precache model_prefix model_type return_full_hidden_states
        mla_use_matrix_absorption"""),
    ("it belongs to speculative decoding, which is not here", """
        speculate_max_draft_token_num speculate_max_ngram_size speculate_verify_window speculate_max_candidate_len
        draft_model_quant_type"""),
    ("it comes from the folder's own quantization_config", "weightonly_group_size weight_block_size moe_quant_type"),
    ("a key of export.py", "dtype output_path"),
    ("a key of serve.py", """
        min_length max_new_tokens decode_strategy total_max_length block_size batch_size data_file output_file port host
        base_port flask_port title sub_title api_key"""),
    ("a key of ppo.py", """
        global_batch_size global_gen_batch_size global_mini_batch_size per_device_rollout_batch_size
        per_device_logprob_batch_size per_device_reward_batch_size per_device_value_batch_size
        per_device_prompt_batch_size kl_coeff kl_loss_coeff pg_loss_coeff entropy_coeff clip_range_ratio
        clip_range_ratio_low clip_range_ratio_high clip_range_score enable_overlong_reward_buffer overlong_reward_buffer
        overlong_penalty_factor clip_range_value update_iters critic_learning_rate critic_weight_decay
        critic_lr_scheduler_type critic_warmup_ratio critic_recompute critic_recompute_granularity
        critic_min_learning_rate critic_decay_steps normalize_reward normalize_advantage temperature rollout_n
        repetition_penalty rollout_quant_type dynamic_sampling max_gen_batches eval_mode offload_level max_dec_len
        min_dec_len max_src_len early_stopping early_stopping_patience early_stopping_threshold use_tgt_len_value
        use_rm_server use_fp32_compute rollout_tensor_parallel_degree balance_batch use_remove_padding
        rollout_max_num_seqs reward_server actor_tokenizer_alpha reward_tokenizer_alpha reward_critic_tokenizer_alpha
        stage prompt_key response_key eval_datasets num_return_sequences eval_split_ratio use_ema ema_beta ptx_coeff
        ptx_datasets"""),
])  # fmt: skip

# An error when they ask for something; off (false, 0, null, "") or HARMLESS they are ignored like the others.
REFUSED = _table([
    ("this adapter is not here; there are lora (rslora, lora_plus_scale, pissa, dora) and prefix_tuning", """
        vera lokr reft use_mora lora_use_mixer"""),
    ("training on quantised weights (QLoRA) is not here yet", "weight_quantize_algo"),
    ("scaling of positions comes from rope_scaling in the model's config.json", """
        use_long_sequence_strategies rope_scaling_factor use_pose_convert"""),
    ("shifted sparse attention (LongLoRA) is not here; attention is exact and its memory linear", "use_ssa"),
    ("plain text is trained on by pretrain.py", "autoregressive"),
    ("training is eager; a static graph is made by export.py", "enable_auto_parallel to_static"),
    ("exporting is done by export.py", "do_export"),
    ("data comes from local files: give their folder as dataset_name_or_path", "task_name"),
    ("models are read from and written to local folders only", "from_aistudio save_to_aistudio"),
    ("it is called sharding_parallel_degree", "sharding_degree"),
    ("say device: cpu", "no_cuda"),
    ("the optimizer is adamw", "optim"),
    ("training data is always shuffled, by seed and epoch", "dataloader_shuffle"),
    ("logging is by steps", "logging_strategy"),
    ("nothing is skipped; take the records out of the data", "skip_data_intervals"),
    ("fine-tuning is done by finetune.py", "lora prefix_tuning neftune"),
    ("quantising is done by quantize.py", "do_ptq do_gptq do_awq do_qat load_quant_model"),
    ("preference training is done by dpo.py; finetune.py reads dataset_name_or_path", "train_dataset_path"),
    ("reward models are not trained here", "process_reward"),
    ("speculative decoding is not here", "speculate_method draft_model_name_or_path"),
    ("the cache of keys and values is serve.py's", "cachekv_int8_type"),
    ("KTO is not trained here; dpo.py learns from pairs", "desirable_weight undesirable_weight"),
    ("it is called beta, loss_type or label_smoothing", "dpo_beta dpo_loss_type dpo_label_smoothing"),
    ("reward and reinforcement learning are done by ppo.py", """
        rl_algorithm train_datasets actor_model_name_or_path reward_model_name_or_path critic_model_name_or_path
        reward_critic_model_name_or_path"""),
])  # fmt: skip
HARMLESS = {"optim": ("adamw",), "dataloader_shuffle": (True, 1, "true", "1"), "logging_strategy": ("steps",),
            "rope_scaling_factor": (1, "1", "1.0"), "sharding_degree": (-1, 1, "-1", "1")}  # fmt: skip


# Upstream's keys that hold options, separated by spaces or commas: none is needed here, and each says why.
OPTIONS = {
    "tensor_parallel_config": _table([
        ("a product's parts are summed as soon as they are there", "enable_mp_async_allreduce enable_sp_async_reduce_scatter"),
        ("gradients are added to in place", "enable_mp_skip_c_identity enable_mp_fused_linear_param_grad_add"),
        ("gradients are of the sum over a step's tokens", "enable_delay_scale_loss"),
        ("what ranks hold in common stays equal by construction", "sync_param sync_grad sync_moment"),
        ("the vocabulary is always spread", "replace_with_c_embedding replace_with_parallel_cross_entropy")]),
    "pipeline_parallel_config": _table([
        ("shapes travel with every micro-batch", "disable_p2p_cache_shape enable_dynamic_shape enable_clear_every_step_cache"),
        ("whole tensors are sent, one at a time", "disable_partial_send_recv disable_batch_p2p_comm enable_overlap_p2p_comm"),
        ("gradients are of the sum over a step's tokens", "enable_delay_scale_loss"),
        ("gradients are reduced once, after the last micro-batch", "enable_dp_comm_overlap enable_sharding_comm_overlap"),
        ("times are always in the log", "enable_timer"),
        ("gradients are always released", "enable_release_grads"),
        ("schedules are 1F1B and, with virtual_pp_degree, interleaved", """
            best_unbalanced_scheduler use_dualpipev forward_backward_overlap_scheduler enable_offload_queue""")]),
    "sharding_parallel_config": _table([
        ("messages are always of many tensors", "enable_stage1_tensor_fusion enable_fuse_optimizer_states"),
        ("it overlaps where the device can", """
            enable_stage1_overlap enable_stage2_overlap enable_stage1_broadcast_overlap enable_stage1_allgather_overlap"""),
        ("tensors are always split by numbers, not kept whole", "split_param"),
        ("gradients are summed, and divided by a step's tokens once", "disable_stage1_reduce_avg"),
        ("gradients are always released", "enable_release_grads")]),
    **dict.fromkeys(("data_parallel_config", "sequence_parallel_config"), _table([
        ("gradients are summed, and divided by a step's tokens once", "enable_allreduce_avg_in_gradinent_scale"),
        ("gradients are always reduced once, after the last micro-batch", "gradient_sync_after_accumulate")])),
}  # fmt: skip


def _options_of(key, value, where):
    """Lines for the options in a key of OPTIONS; UserError for one that upstream does not have."""
    words = re.findall(r"[^\s,]+", value) if isinstance(value, str) else value or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: {key}: {value!r}; options separated by spaces or commas are needed")
    for word in words:
        if word not in OPTIONS[key]:
            near = difflib.get_close_matches(word, OPTIONS[key], 1) or list(OPTIONS[key])[:1]
            raise UserError(f"{where}: {key}: unknown option {word!r}; did you mean {near[0]!r}?")
    return [f"ignored: {key}: {word}: no effect here: {OPTIONS[key][word]}" for word in words]


def parse_args(Args, argv=None):
    """`argv` (default: the command line): JSON files, then --key value (or --key=value), later wins -> a checked Args.

    Prints one line for every key that is ignored and every note of Args.check(). Raises UserError.
    """
    given = {}  # key -> (value, where it stands, whether it is text from the command line)
    tokens = collections.deque(sys.argv[1:] if argv is None else argv)
    kinds = typing.get_type_hints(Args)
    while tokens:
        token = tokens.popleft()
        if not token.startswith("--"):
            given.update({key: (value, token, False) for key, value in read_json_config(token).items()})
            continue
        key, equals, value = token[2:].partition("=")
        if not equals:
            values = []
            while tokens and not tokens[0].startswith("--") and (not values or _takes_list(kinds.get(key))):
                values.append(tokens.popleft())
            if not values and key in kinds and bool not in _options(kinds[key]):
                raise UserError(f"command line: --{key}: a value is missing")
            value = ",".join(values) if values else "true"  # `--do_train` alone is true
        given[key] = (value, "command line", True)

    fields, lines = {}, []
    of_training = {field.name for field in dataclasses.fields(TrainingArgs)}
    for key, (value, where, text) in given.items():
        if key in kinds:
            fields[key] = _convert(value, kinds[key], f"{where}: {key}", text)
        elif key == "dry_run" and not _harmless(key, value):
            raise UserError(
                f"{where}: dry_run: pretrain.py, finetune.py and dpo.py count alone; this script does not train"
            )
        elif key in of_training:
            lines.append(f"ignored: {key}: nothing is trained here")
        elif key in REFUSED and not _harmless(key, value):
            raise UserError(f"{where}: {key}: {value!r}: {REFUSED[key]}")
        elif key in OPTIONS:
            lines += _options_of(key, value, where)
        elif key in IGNORED or key in REFUSED:
            lines.append(f"ignored: {key}: {IGNORED.get(key) or REFUSED[key]}")
        elif key != "_doc":
            near = difflib.get_close_matches(key, kinds, 1) or difflib.get_close_matches(
                key, [*IGNORED, *REFUSED, *OPTIONS, *of_training], 1
            )
            raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    args = Args(**fields)
    lines += args.check_dry_run() if getattr(args, "dry_run", False) else args.check()
    if lines:
        print("\n".join(lines), flush=True)
    return args


def read_json_config(path):
    """{key: value} of one JSON file of flat keys. UserError with file and line for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the arguments are JSON files, then --key value") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from None

    def unique(pairs):
        for key, count in collections.Counter(key for key, _ in pairs).items():
            if count > 1:
                line = 1 + text.count("\n", 0, [m.start() for m in re.finditer(rf'"{re.escape(key)}"\s*:', text)][-1])
                raise UserError(f"{path}:{line}: key {key!r} is given {count} times; keep one")
        return dict(pairs)

    def finite(name):
        raise UserError(f"{path}: {name} is not a number of JSON")

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=finite)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(found, dict):
        raise UserError(f'{path}: holds a {type(found).__name__}; an object is needed: {{"learning_rate": 1e-4, …}}')
    return found


def _options(kind):
    """The alternatives of `X | Y | None`, or the one type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _takes_list(kind):
    return any(typing.get_origin(option) is list for option in _options(kind))


def _harmless(key, value):
    if key in HARMLESS:
        return (value.lower() if isinstance(value, str) else value) in HARMLESS[key]
    return not value or (isinstance(value, str) and value.lower() in ("false", "0", "none", "null", "no"))


def _convert(value, kind, where, text):
    """A JSON value, or text of the command line, as one of the alternatives of `kind`; UserError if it is none."""
    options = _options(kind)
    if text and type(None) in options and value.lower() in ("none", "null"):
        return None
    for option in options:
        converted = _as(value, option, text)
        if converted is not ...:
            return converted
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    wanted = " or ".join(names.get(option, _list_of(option)) for option in options)
    raise UserError(f"{where}: {json.dumps(value, ensure_ascii=False):.60} is the wrong type; {wanted} is needed")


def _list_of(kind):
    return "a list of whole numbers" if int in typing.get_args(kind) else "a list of text"


def _as(value, kind, text):
    """`value` as exactly this type, or ... if it is not one."""
    if kind is type(None):
        return None if value is None else ...
    if kind is bool:
        if text:
            return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), ...)
        return bool(value) if value in (True, False) and isinstance(value, (bool, int)) else ...
    if kind in (int, float):
        try:
            number = kind(value) if text else value
        except ValueError:
            return ...
        fits = isinstance(number, (int, float) if kind is float else int) and not isinstance(number, bool)
        return kind(number) if fits and math.isfinite(number) else ...
    if kind is str:
        return value if isinstance(value, str) else ...
    if isinstance(value, str) and text:
        value = [part for part in re.split(r"[,\s]+", value) if part]
    if not isinstance(value, list):
        return ...
    found = [_as(part, *typing.get_args(kind), text) for part in value]
    return ... if ... in found else found


def run_script(main, Args, argv=None):
    """A script's last line: parse, run; what the user can mend becomes one line and exit code 2, a bug a traceback."""
    tokens = sys.argv[1:] if argv is None else argv
    if not tokens or {"-h", "--help"} & set(tokens):
        print((sys.modules[main.__module__].__doc__ or "").strip())
        print("\nKeys, in JSON or as --key value, and their defaults:")
        for field in dataclasses.fields(Args):
            print(f"  {field.name} = {field.default!r}")
        return
    company, args = parallel.company(), None  # first of all, so that what goes wrong here ends all processes
    try:
        args = parse_args(Args, tokens)
        if getattr(args, "dry_run", False):
            print(dry_run(args), flush=True)
        else:
            args.check_model()
            _choose_device(args)
            main(args)
        if company is not None:
            company.leave()
    except SystemExit:
        raise
    except BaseException as error:
        code, line = _verdict(error, getattr(args, "output_dir", ""))
        if company is not None:
            company.fail(error, code, line)
        if line is None:
            raise
        print(f"error: {line}" if code == 2 else line, file=sys.stderr)
        sys.exit(code)


def _verdict(error, folder):
    """(exit code, line to show instead of a traceback, or None) of what has ended a script."""
    if isinstance(error, UserError):
        return 2, str(error)
    if _disk_full(error):
        return 2, f"{error.filename or folder}: the disk is full; free some space, then resume"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 1, None


def _choose_device(args):
    train_in_bf16 = args.bf16 and isinstance(args, TrainingArgs)
    if ":" in args.device and (world := Launch.of_environment().world) > 1:
        kind = args.device.partition(":")[0]
        raise UserError(
            f"device: {args.device!r} is one device, but this run has {world} processes; say {kind!r}, the launcher chooses"
        )
    kernels.configure(args.device, args.kernels, train_in_bf16)
    print(f"device: {paddle.device.get_device()}; kernels: {kernels.describe()}", flush=True)
    if kernels.bf16:
        print(
            "bf16: products of linears, attention and head in bfloat16, and frozen linears stored so; all else in float32"
        )
    elif train_in_bf16:
        print(f"bf16: {kernels.bf16_missing()}, so float32 is used")


def _disk_full(error):
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


# ================================================================================ presets, and runs that only count

CATALOGUE = Path(__file__).resolve().parent / "configs" / "catalogue.json"


@functools.cache
def presets():
    """{name: {"repo", "licence", "parameters", "config"}} of configs/catalogue.json.

    A preset with "like" is another checkpoint of that one's shape: what it does not say itself is the other's.
    """
    found = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    for name, preset in found.items():
        base = found.get(preset.get("like"), {})
        found[name] = {**base, **preset, "config": {**base.get("config", {}), **preset.get("config", {})}}
    return found


def find_preset(name):
    """(name, preset) by the preset's name or its repository on Hugging Face, in any case; None if there is none."""
    wanted = str(name).lower().rstrip("/")
    return next((item for item in presets().items() if wanted in (item[0], (item[1]["repo"] or "").lower())), None)


def not_here(key, path):
    """The line that says what to download, and to where, for a model's name that is no folder; or the nearest names."""
    if (found := find_preset(path)) is None:
        names = {name.lower(): name for name in [*presets(), *(p["repo"] for p in presets().values() if p["repo"])]}
        near = [names[name] for name in difflib.get_close_matches(str(path).lower(), names, 3)]
        line = f"{key}: {path}: no such folder, and no preset of configs/{CATALOGUE.name}"
        return line + (f"; nearest: {', '.join(near)}" if near else "")
    name, preset = found
    if preset["repo"] is None:
        return f"{key}: {name} has no published weights: pretrain.py makes them, with a tokenizer's folder as tokenizer_name_or_path"
    files = "config.json, *.safetensors or *.bin, and the tokenizer's files"
    if key.startswith("tokenizer"):
        files = "the tokenizer's files"
    else:
        files += f", {2 * preset['parameters'] / 1e9:,.1f} GB with 16 bits a weight"
    return f"{key}: {path} is not here: download {preset['repo']} from Hugging Face ({files}) into the folder {path}, or give the folder that holds it"


def model_config(path):
    """ModelConfig of a folder, or of a preset of the catalogue."""
    if Path(path).exists() or (found := find_preset(path)) is None:
        return ModelConfig.from_json(path)
    return ModelConfig.from_dict(dict(found[1]["config"]), f"{CATALOGUE.name}: {found[0]}")


def dry_run(args):
    """The text of a run that only counts: shapes, parameters, FLOPs a token, memory a rank. No weight takes memory."""
    name, found = args.model_name_or_path, find_preset(args.model_name_or_path)
    if not Path(name).exists():
        if found is None:
            raise UserError(not_here("model_name_or_path", name))
        name = found[0] + (f" ({found[1]['repo']})" if found[1]["repo"] else "")
    config = model_config(args.model_name_or_path)
    if config.quantization is not None:
        raise UserError(f"{args.model_name_or_path}: is quantized; a dry run counts models of floats")
    if layers := getattr(args, "num_hidden_layers", None):
        config = dataclasses.replace(config, num_hidden_layers=layers)
    T = next(getattr(args, key) for key in ("max_seq_length", "max_length", "max_seq_len") if hasattr(args, key))
    model = build(config)
    table, total, active, experts = _shapes(model)
    degrees = Degrees.of(args, config, T)
    flops = model.flops_per_token(T)
    lines = [f"{name}: {config.family}, {config.num_hidden_layers} layers", *table, ""]
    lines.append(f"parameters: {total:,}" + (f", {active:,} of them at work on a token" if experts else ""))
    if (adapter := _adapter_sizes(args, model, degrees)) is not None:
        trained = sum(size[1] for size in adapter)
        lines.append(f"trained: {trained:,} ({100 * trained / total:.4f} % of the parameters)")
    lines.append(f"FLOPs a token, forward and backward, in sequences of {T:,}: {flops:.4g}")
    return "\n".join([*lines, "", *_memory(args, model, adapter, degrees, T)])


def _shapes(model):
    """(lines of a table of weights, layers and experts folded; parameters; those at work on a token; experts of a layer)."""
    folded, total, experts = {}, 0, 0
    for weight in base_weights(model):
        parts = re.split(r"\.(\d+)\.", weight.name)  # name, layer, name, and with experts: expert, name
        expert = parts[3] if len(parts) > 3 else None
        pattern = ".{e}.".join([".{i}.".join(parts[0:3:2]), *parts[4:]])
        row = folded.setdefault((pattern, tuple(weight.shape)), [set(), 0])
        row[0].update(map(int, parts[1:2]))
        row[1] += 1
        experts = max(experts, int(expert or -1) + 1)
        total += math.prod(weight.shape)
    routed = sum(count * math.prod(shape) for (name, shape), (_, count) in folded.items() if "{e}" in name)
    width = max(len(name) for name, _ in folded)
    lines = [f"{'weight':{width}}  {'shape':>16}  {'layers':>7}  {'experts':>7}  {'parameters':>17}"]
    for (name, shape), (layers, count) in folded.items():
        size, where = " x ".join(map(str, shape)), f"{min(layers)}-{max(layers)}" if layers else ""
        each = f"{count // len(layers)}" if "{e}" in name else ""
        lines.append(f"{name:{width}}  {size:>16}  {where:>7}  {each:>7}  {count * math.prod(shape):>17,}")
    chosen = model.config.experts.top_k if experts else 0
    return lines, total, total - routed + (routed * chosen // experts if experts else 0), experts


def _adapter_sizes(args, model, degrees):
    """[(layer or None, numbers in all, on a rank, there when sharded)] of what an adapter trains; None for all weights."""
    config, sizes = model.config, []
    if getattr(args, "lora", False):
        found = linears(model)
        for path in lora_paths(model, args.lora_target_modules):
            _, name, layer = found[path]
            name = (".experts." if ".experts." in path else ".") + name
            a, b = args.lora_rank * layer.n_in, (args.lora_rank + int(args.dora)) * layer.n_out
            ways = degrees.cut(name, config)  # of the base: its cut side's matrix is cut with it, the other is whole
            mine = a / ways + b if name.rpartition(".")[2] in BY_INPUTS else a + b / ways
            sizes.append((int(re.search(r"\.(\d+)\.", path)[1]), a + b, mine, mine / degrees.shared(name, config)))
        return sizes
    if not getattr(args, "prefix_tuning", False):
        return None
    width, layers = config.num_key_value_heads * config.head_dim, config.num_hidden_layers
    if args.prefix_projection:
        inner = args.prefix_projection_hidden_size or config.hidden_size
        whole = args.num_prefix_tokens * width + (width + 1) * inner + (inner + 1) * layers * 2 * width
        return [(None, whole, whole, whole / degrees.sharding)]
    whole = args.num_prefix_tokens * 2 * width
    mine = whole / min(degrees.tp, config.num_key_value_heads)
    return [(layer, whole, mine, mine / degrees.sharding) for layer in range(layers)]


# Bytes a number. In bf16 as accelerators keep it: weights and activations in bfloat16 beside float32 masters.
FLOAT32 = {"weights": 4, "gradients": 4, "moments": 8, "master weights": 0, "activations": 4}
BFLOAT16 = {"weights": 2, "gradients": 4, "moments": 8, "master weights": 4, "activations": 2}
SHARDED_FROM = {"weights": 3, "gradients": 2, "moments": 1, "master weights": 1}  # the stage of sharding


def _memory(args, model, adapter, degrees, T):
    """Lines: the bytes that the fullest rank keeps, by what they are for."""
    bytes_of = BFLOAT16 if args.bf16 else FLOAT32
    layers, first, last = _numbers(model, degrees)
    places, ranks = stage_layers(model.config.num_hidden_layers, degrees.pp * degrees.virtual), []
    for rank in range(degrees.pp):
        chunks, is_last = places[rank :: degrees.pp], rank == degrees.pp - 1
        here = [i for chunk in chunks for i in chunk]
        held = layers[here].sum(0) + (first if rank == 0 else 0) + (last if is_last else 0)
        mine = None
        if adapter is not None:
            sizes = (np.array(size[2:]) for size in adapter if size[0] is None or size[0] in here)
            mine = sum(sizes, np.zeros(2))
        rows = _bytes(bytes_of, degrees, held, mine)
        if degrees.sharding > 1:
            rows["a unit at work"] = _at_work(model, degrees, bytes_of, adapter)
        whole, again = _kept_by_rank(args, model, degrees, rank, chunks)
        tokens = args.per_device_train_batch_size * T / degrees.sep
        head = model.config.norm_head and is_last  # divided by its columns' lengths: a second head
        head = math.prod(model.lm_head.weight.shape) / degrees.cut("lm_head.weight", model.config) if head else 0.0
        for way, numbers in (("without recompute", whole), ("with recompute", again)):
            rows[f"activations {way}"] = (numbers * tokens + head) * bytes_of["activations"]
        for way in ("without recompute", "with recompute"):
            rows[f"in all {way}"] = sum(
                rows.get(part, 0.0) for part in (*SHARDED_FROM, "a unit at work", f"activations {way}")
            )
        ranks.append(rows)
    rows = max(ranks, key=lambda rows: rows["in all with recompute" if args.recompute else "in all without recompute"])
    unit, size = ("GB", 1e9) if rows["weights"] >= 1e9 else ("MB", 1e6)
    kind = "bfloat16 beside float32 masters" if args.bf16 else "float32"
    lines = [
        f"memory of the fullest rank in {unit} (1e{9 if size == 1e9 else 6} bytes): {degrees}; {kind}; "
        f"{args.per_device_train_batch_size} x {T:,} tokens a micro-batch"
    ]
    return lines + [f"  {name:<30}{value / size:>14,.3f}" for name, value in rows.items()]


def _numbers(model, degrees):
    """How many numbers a rank holds of the weights, [whole, when sharded]: of each layer (L, 2), before, after them."""
    layers, first, last = np.zeros([model.config.num_hidden_layers, 2]), np.zeros(2), np.zeros(2)
    for name, parameter in model.named_parameters():
        mine = math.prod(parameter.shape) / degrees.cut(name, model.config)
        mine = np.array([mine, mine / degrees.shared(name, model.config)])
        if name.startswith("layers."):
            layers[int(name.split(".")[1])] += mine
        elif name.startswith(("embed", "project_in")):
            first += mine
        else:
            last += mine
        if name == "embed_tokens.weight" and model.lm_head is None and degrees.pp > 1:
            last += mine  # a tied head is the embedding once more
    return layers, first, last


def _bytes(bytes_of, degrees, held, adapter):
    """{part: bytes} of a rank that holds so many numbers, [whole, when sharded]; adapter: those of it, in float32, or None."""
    of_trained, trained = (bytes_of, held) if adapter is None else (FLOAT32, adapter)
    parts = {}
    for part, stage in SHARDED_FROM.items():
        which = int(degrees.stage >= stage)
        parts[part] = float(trained[which] * of_trained[part])
        if part == "weights" and adapter is not None:
            parts[part] += float(held[which] * bytes_of[part])
        if degrees.offload and stage == 1:
            parts[part] = 0.0
    return parts


def _at_work(model, degrees, bytes_of, adapter):
    """Bytes that come and go with sharding, at the largest unit: its gradients laid flat, from stage 2 on beside those that
    they were laid from, and in stage 3 its weights. (An adapter's gradients are small.)"""
    sizes, tied = collections.Counter(), model.lm_head is None
    for name, parameter in model.named_parameters():
        sizes[unit_of(name, tied)] += math.prod(parameter.shape) / degrees.cut(name, model.config)
    copies = 0 if adapter is not None else min(2, degrees.stage)
    weights = bytes_of["weights"] if degrees.stage == 3 else 0
    return max(sizes.values()) * (copies * bytes_of["gradients"] + weights)


def _kept_by_rank(args, model, degrees, rank, chunks):
    """Activations of a token that a rank of a pipeline keeps at the most, without and with recompute; chunks: its layers.

    With recompute what is left of all blocks, and what is made again of one. Of each chunk those of as many micro-batches
    as lie between their forward and their backward.
    """
    config, whole, again, made = model.config, [], [], 0.0
    width = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
    for chunk, layers in enumerate(chunks):
        is_first, is_last = rank == chunk == 0, (rank, chunk) == (degrees.pp - 1, degrees.virtual - 1)
        split = [_recomputed(args, i, model.layers[i], config, degrees) for i in layers]
        ends = (is_first + is_last) * width  # the first block's input; what the last norm gives
        whole.append(sum(_activations(model.layers[i], config, degrees) for i in layers) + ends)
        # A whole block that is made again has its input counted, any other its output.
        inputs = [left == width for left, _ in split]
        ends += width * (is_last * inputs[-1] - is_first * inputs[0])
        again.append(sum(left for left, _ in split) + ends)
        made = max(made, *(part for _, part in split))
    now, most = np.zeros([2, len(chunks)]), np.zeros(2)
    for kind, chunk, _ in timetable(degrees.pp, degrees.virtual, args.gradient_accumulation_steps)[rank]:
        now[:, chunk] += np.array([whole[chunk], again[chunk]]) * (1 if kind == "forward" else -1)
        most = np.maximum(most, now.sum(1))
    return most[0], most[1] + made


def _recomputed(args, i, block, config, degrees):
    """(numbers of a token that recompute leaves of the i-th block, those that it makes again)."""
    kept, how = _activations(block, config, degrees), args.recompute_granularity
    width = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1)
    if i in (args.no_recompute_layers or ()):
        return kept, 0.0
    if how == "full":
        return width, kept
    of_attention = (
        ("attention.",) if how == "full_attn" else ("attention.o_proj", "attention.q_norm", "attention.k_norm")
    )
    made = _activations(block, config, degrees, of_attention) - width  # what attention gives stays
    return kept - made, made


def _activations(block, config, degrees, names=("",)):
    """Numbers that backward needs of one token in this block, or in the layers in it whose names begin so, on one rank.

    They are the outputs of its linears and norms, and what the last linears of attention and MLP read. Temporary
    tensors of an op, and blocks of logits (128 MB), come on top.
    """
    D, share = config.hidden_size / (degrees.tp if degrees.sequence_parallel else 1), 1.0
    numbers = 0.0 if config.residual_scale is None or names != ("",) else D  # the scaled residual
    if hasattr(block.mlp, "experts") and names == ("",):  # each chosen expert's copy of the token, and the experts' sum
        share = config.experts.top_k / config.experts.count
        numbers += (config.experts.top_k + 1) * D
    for name, layer in block.named_sublayers():
        if not name.startswith(names):
            continue
        part, routed = name.rpartition(".")[2], share if ".experts." in name else 1.0
        ways = degrees.cut(f".{part}", config)
        if hasattr(layer, "epsilon"):  # a norm: of the whole width, of a part of it, or of each head
            width = layer.weight.shape[0]
            heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}.get(part)
            if heads:
                numbers += width * heads / min(degrees.tp, heads)
            else:
                numbers += D if width == config.hidden_size else width
        elif hasattr(layer, "n_out") and not (
            part == "up_proj" and config.activation == "relu"
        ):  # relu keeps its result
            numbers += routed * (layer.n_in / ways + D if part in BY_INPUTS else layer.n_out / ways)
    return numbers


# ========================================================================================= output directory

# What a run writes into output_dir; a folder with any of it holds a run (or a model), and only this is ever removed.
ARTIFACTS = """tmp-checkpoint-* tmp-model checkpoint-* config.json generation_config.json model*.safetensors
    *.safetensors.index.json adapter_config.json adapter_model.safetensors pytorch_model*.bin tokenizer.model
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.json metrics.jsonl
    eval_metrics.jsonl curves.png vdl_log *_results.json generated_output.json nonfinite-step-*.json predictions.jsonl
    prefix_projection.safetensors quant_report.json static_config.json prefill.json prefill.pdiparams decode.json
    decode.pdiparams static.pdiparams prefix.safetensors vocab.json merges.txt *.tiktoken ice_text.model
    sentencepiece.bpe.model chat_template.jinja""".split()


def check_output_dir(args):
    """Refuse (UserError) a folder that a new run must not write into; returns what overwrite_output_dir will remove.

    Writes nothing, so a script calls it first: a bad folder shows before data and model take their time.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; a folder is needed")
    if not getattr(args, "do_train", True) or getattr(args, "resume_from_checkpoint", None):
        return []
    found = sorted({path for pattern in ARTIFACTS for path in folder.glob(pattern)})
    if not found:
        return []
    names = ", ".join(path.name for path in found[:4]) + (", …" if len(found) > 4 else "")
    if not args.overwrite_output_dir:
        go_on = "resume_from_checkpoint: true to go on with it, " if hasattr(args, "resume_from_checkpoint") else ""
        raise UserError(
            f"output_dir: {folder} holds another run ({names}); set overwrite_output_dir: true to remove it, "
            f"{go_on}or choose another folder"
        )
    if not (folder / "run_args.json").is_file():
        raise UserError(f"output_dir: {folder} holds {names}, but no run of these scripts; choose another folder")
    for key, value in dataclasses.asdict(args).items():
        if not key.endswith(("_path", "_dir")) or key in ("output_dir", "logging_dir") or not isinstance(value, str):
            continue
        if Path(value).exists() and Path(value).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{key}: {value} lies in output_dir, which would be emptied; choose another output_dir")
    return found


def prepare_output_dir(args, topology=SINGLE):
    """Make output_dir ready to be written to, print the resolved arguments and keep them in run_args.json.

    The first rank does it, between two meetings of all. Call it after data and model have been read: a mistyped path must not cost the run that is to be overwritten.
    """
    folder, old = Path(args.output_dir), check_output_dir(args)
    topology.meet()
    if topology.rank == 0:
        _prepare(folder, old, args)
    topology.meet()


def _prepare(folder, old, args):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(args)
        shown = "arguments: " + " ".join(f"{key}={value!r}" for key, value in values.items())
        print(textwrap.fill(shown, 120, break_long_words=False), flush=True)
        if getattr(args, "do_train", True):
            for path in {
                *old,
                *folder.glob("tmp-checkpoint-*"),
                *folder.glob("tmp-model"),
                *folder.glob(".*.tmp"),
            }:  # tmp: left by a killed run
                _remove(path)
            with atomic_file(folder / "run_args.json") as file:
                json.dump(values, file, indent=2, ensure_ascii=False)
    except OSError as error:
        if _disk_full(error):
            raise
        raise UserError(f"output_dir: {folder} cannot be written to: {error.strerror}") from None


def _remove(path):
    """Remove a file or folder; a checkpoint loses its marker first, so that a part of it never looks complete."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / DONE).unlink(missing_ok=True)
    if re.fullmatch(r"checkpoint-\d+", path.name):
        path = path.rename(path.with_name(f"tmp-{path.name}-old"))
    shutil.rmtree(path)


# ================================================================================ schedule, optimizer, randomness


def total_steps(args, batches_per_epoch, ranks=1):
    """(steps of the run, steps of an epoch). An epoch's last step takes the micro-batches left; none is dropped.

    ranks: how many have batches of their own.
    """
    if batches_per_epoch < 1:
        raise UserError("the training data is less than one batch: lower per_device_train_batch_size or add data")
    per_epoch = math.ceil(batches_per_epoch / (args.gradient_accumulation_steps * ranks))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch


def micro_batches(step, args, batches_per_epoch, ranks=1):
    """[(epoch, batch index)] of the micro-batches of step `step`, from 0: pure, so resuming needs no state.

    Those of all the ranks that have batches of their own.
    """
    each = args.gradient_accumulation_steps * ranks
    per_epoch = math.ceil(batches_per_epoch / each)
    epoch, first = step // per_epoch, step % per_epoch * each
    return [(epoch, i) for i in range(first, min(first + each, batches_per_epoch))]


def share_of(batches, topology):
    """[(batch, whether it counts)]: this rank's of those of all ranks; every rank has as many, some for company alone."""
    mine = [(batch, True) for batch in batches[topology.data_rank :: topology.data_size]]
    return mine + [(batches[0], False)] * (-(-len(batches) // topology.data_size) - len(mine))


def step_batches(loader, step, args, topology):
    """This rank's micro-batches of a step. One that is for company alone has no labels, and "company": True."""
    places = micro_batches(step, args, loader.batches_per_epoch, topology.data_size)
    batches = []
    for place, counts in share_of(places, topology):
        batch = loader.batch(*place)
        if not counts:
            batch = {**batch, "labels": np.full_like(batch["labels"], -100), "tokens": 0, "company": True}
        batches.append(batch)
    return batches


def is_due(strategy, every, step, steps_per_epoch):
    """Whether something with this strategy ("no", "steps", "epoch") happens when `step` steps have been made."""
    return step > 0 and {"no": False, "steps": step % every == 0, "epoch": step % steps_per_epoch == 0}[strategy]


def learning_rate(step, args, total):
    """The learning rate of the step after `step` steps have been made (so of the first step: step = 0), of `total`.

    1) Warm-up: from 0, linear, to the peak at step == warm-up; as upstream, the very first step has rate 0.
    2) Then by lr_scheduler_type, x in [0, 1] being the progress from warm-up to decay_steps (polynomial: to total).
    3) After that, the end value. "constant" has no warm-up, the other names do.
    """
    peak, kind = args.learning_rate, args.lr_scheduler_type
    warmup = args.warmup_steps if args.warmup_steps > 0 else math.ceil(args.warmup_ratio * total)
    if kind == "constant":
        return peak
    if step < warmup:
        return peak * step / warmup
    if kind == "constant_with_warmup":
        return peak
    last = args.decay_steps if args.decay_steps and kind != "polynomial" else total
    low = args.min_lr if args.min_learning_rate is None else args.min_learning_rate
    if kind == "polynomial":
        low = args.lr_end
    x = (step - warmup) / max(1, last - warmup)
    if x >= 1:
        return low
    if kind == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(2 * math.pi * args.num_cycles * x))
    return low + (peak - low) * (1 - x) ** (args.power if kind == "polynomial" else 1)


class AdamW:
    """AdamW over named weights with float32 moments; only parameters of two or more dimensions decay.

    weights: model.Weight objects, or parallel.Piece ones: parts of weights, laid flat. lr_scale: {name: factor on the
    learning rate}, 1 where absent (LoRA+ gives B more). With `sharding: … offload` moments lie in the host's memory, pinned,
    and each weight's come to the device while it is updated.
    """

    def __init__(self, weights, args, lr_scale=None):
        names = [weight.name for weight in weights]
        assert len(set(names)) == len(names), f"names must be unique: {sorted(names)}"
        self.weights, self.args, self.lr_scale = weights, args, lr_scale or {}
        self.steps = 0  # made so far; bias correction counts from 1
        self.rounded = 0  # how often the moments came from a checkpoint that has them in few bits
        self.on_host = "offload" in (getattr(args, "sharding", None) or "")
        if self.on_host and paddle.device.get_device().startswith("cpu"):
            print(
                "sharding: offload changes nothing here: the device is the CPU, moments are in the host's memory anyway"
            )
            self.on_host = False
        self.moments = {w.name: [self._zeros(w.tensor.shape) for _ in range(2)] for w in weights}

    def _zeros(self, shape):
        moment = paddle.zeros(shape, "float32")
        return moment.pin_memory() if self.on_host else moment

    def step(self, lr, grad_scale=1.0):
        """Update every weight that has a gradient, which is multiplied by grad_scale (clipping, 1 / tokens) first."""
        self.steps += 1
        args = self.args
        for weight in self.weights:
            gradient = weight.grad
            if gradient is None:
                continue
            decay = args.weight_decay if len(weight.shape) >= 2 else 0.0
            rate = lr * self.lr_scale.get(weight.name, 1.0)
            kept = self.moments[weight.name]
            moments = [moment._copy_to(gradient.place, True) for moment in kept] if self.on_host else kept
            constants = args.adam_beta1, args.adam_beta2, args.adam_epsilon, decay
            kernels.adamw(weight.tensor, gradient, *moments, self.steps, rate, *constants, grad_scale)
            if self.on_host:
                for there, moment in zip(kept, moments):
                    there.copy_(moment, True)

    def zero_grad(self):
        for weight in self.weights:
            weight.clear_gradient()

    def entries(self, shards, stage="O0"):
        """[model.Entry] of moments and beta powers in Unified Checkpoint's names and the weights' file layout.

        stage: of ckpt_quant_stage. Every weight is named on every rank that holds it, whoever has its moments.
        """
        powers = {f"beta{i}_pow_acc_0": getattr(self.args, f"adam_beta{i}") ** (self.steps + 1) for i in (1, 2)}
        found = []
        for weight in shards.weights:
            place, moments = shards.place_of(weight), self.moments.get(weight.name, (None, None))
            sources = [(weight, shards.laid(weight, moment), *place) for moment in moments]
            names = [f"{weight.name}/moment{i}_0" for i in (1, 2)]
            if stage == "O0" or len(weight.shape) < 2:
                found += [Entry({name: (weight.shape, "float32")}, [source]) for name, source in zip(names, sources)]
            else:
                found.append(_quantized(names, weight.shape, sources, stage))
            for key, power in powers.items():
                power = np.array([power], np.float32)
                found.append(Entry({f"{weight.name}/{key}": ([1], "float32")}, [], functools.partial(list, [power])))
        return found

    def load(self, found, shards):
        """The moments back, exactly; found: of model.stored_tensors. Each rank reads what it has.

        `steps`, which a power in float32 cannot give back, is set by load_checkpoint.
        """
        read = {key: value for key, value in found.items() if "@" not in key and not key.endswith("_pow_acc_0")}
        names = {key.rpartition("/")[0] for key in read}
        mine = {weight.name for weight in shards.weights}
        shards.topology.meet()  # reading weights may have taken one of them longer
        trained = held_by(dict.fromkeys(sorted(mine), 0), shards.topology)[0].keys()  # on any rank
        if names != trained:
            missing, extra = _some(trained - names), _some(names - trained)
            raise UserError(f"optimizer state is not of what is trained now: missing {missing}; unexpected {extra}")
        for weight in shards.weights:
            if weight.name not in self.moments:  # another rank's
                continue
            for i, array in enumerate(_moments_of(weight, found, shards.extent(weight))):
                self.moments[weight.name][i].set_value(array)


# Moments in few bits, after upstream: the first in equal steps up to the largest of a row; of the second what it is there
# for, the ratio 1 / (sqrt(v) + 1e-8), in equal steps between the least and the largest. O1: 8 bits, rows of the file's
# layout (outputs); O2: 4 bits, groups of 32 along them, both numbers in one byte under the name of the first.
# Scales: float32, under NAME@scales, and NAME@min_scales, NAME@max_scales of the second.
GROUP = 32
MAX_QUANTIZATION_TIMES = 1  # a state that has been in few bits once is not rounded again


def _quantized(names, shape, sources, stage):
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    scales = [rows] if stage == "O1" else [rows, -(-columns // GROUP)]
    extra = {f"{names[0]}@scales": scales, f"{names[1]}@min_scales": scales, f"{names[1]}@max_scales": scales}
    integers = {names[0]: (shape, "int8")} | ({names[1]: (shape, "uint8")} if stage == "O1" else {})
    tensors = integers | {name: (size, "float32") for name, size in extra.items()}
    return Entry(tensors, sources, quantize_8 if stage == "O1" else quantize_4)


def quantize_8(m, v):
    """Moments (…, n) -> [int8 m, uint8 ratio, scales, least, largest (rows,)]."""
    shape, m, ratio = (
        m.shape,
        m.reshape([-1, m.shape[-1]]),
        1 / (np.sqrt(v.reshape([-1, v.shape[-1]])) + np.float32(1e-8)),
    )
    scales, least, largest = _scales(m, ratio)
    m, ratio = np.round(m / scales * 127), np.round((ratio - least) / np.maximum(largest - least, 1e-30) * 255)
    return [
        m.astype(np.int8).reshape(shape),
        ratio.astype(np.uint8).reshape(shape),
        *(x[:, 0] for x in (scales, least, largest)),
    ]


def dequantize_8(m, ratio, scales, least, largest):
    shape, scales, least, largest = m.shape, scales[:, None], least[:, None], largest[:, None]
    m, ratio = m.reshape([-1, shape[-1]]).astype(np.float32), ratio.reshape([-1, shape[-1]]).astype(np.float32)
    return (m / 127 * scales).reshape(shape), _square(ratio / 255 * (largest - least) + least).reshape(shape)


def quantize_4(m, v):
    """Moments (…, n) -> [int8, m in the upper 4 bits and ratio in the lower, scales, least, largest (rows, n / 32)]."""
    shape, n = m.shape, m.shape[-1]
    m, ratio = (_grouped(x) for x in (m, 1 / (np.sqrt(v) + np.float32(1e-8))))
    scales, least, largest = _scales(m, ratio)
    m = np.round(m / scales * 7).astype(np.int8)
    ratio = np.round((ratio - least) / np.maximum(largest - least, 1e-30) * 15).astype(np.int8)
    packed = ((m << 4) | ratio).reshape([-1, scales.shape[1] * GROUP])[:, :n].reshape(shape)
    return [packed, *(x[..., 0] for x in (scales, least, largest))]


def dequantize_4(packed, scales, least, largest):
    shape, n = packed.shape, packed.shape[-1]
    packed, scales, least, largest = _grouped(packed), scales[..., None], least[..., None], largest[..., None]
    m, ratio = (
        (packed >> 4).astype(np.float32) / 7 * scales,
        (packed & 15).astype(np.float32) / 15 * (largest - least) + least,
    )
    return tuple(x.reshape([len(x), -1])[:, :n].reshape(shape) for x in (m, _square(ratio)))


def _grouped(x):
    """(…, n) -> (rows, groups, 32), the last padded by its row's last element."""
    x = x.reshape([-1, x.shape[-1]])
    return np.pad(x, [(0, 0), (0, -x.shape[1] % GROUP)], "edge").reshape([len(x), -1, GROUP])


def _scales(m, ratio):
    """Largest |m|, least and largest ratio along the last dim, kept."""
    largest = np.abs(m).max(-1, keepdims=True)
    return np.where(largest > 0, largest, np.float32(1e-8)), ratio.min(-1, keepdims=True), ratio.max(-1, keepdims=True)


def _square(ratio):
    """The second moment that has this ratio."""
    return np.maximum(1 / ratio - np.float32(1e-8), 0) ** 2


def _moments_of(weight, found, extent):
    """Both moments of what a rank has of a weight, in our layout; extent: (first, last), of it laid flat, or None."""
    names = [f"{weight.name}/moment{i}_0" for i in (1, 2)]
    for name in names[:1] if f"{names[0]}@scales" in found else names:
        if name not in found:
            raise UserError(f"optimizer state is not of what is trained now: missing {name}; unexpected none")
    for name in names if f"{names[0]}@scales" not in found else names[:1]:
        if list(found[name][1]) != weight.shape:
            raise UserError(f"optimizer state: {weight.name}: {list(found[name][1])} found, {weight.shape} needed")
    if f"{names[0]}@scales" not in found:
        return [weight.read(found[name][0], extent) for name in names]
    stored = [
        found[name][0]()
        for name in (*names, f"{names[0]}@scales", f"{names[1]}@min_scales", f"{names[1]}@max_scales")
        if name in found
    ]
    wholes = (dequantize_8 if len(stored) == 5 else dequantize_4)(*stored)
    return [weight.read(lambda array=array: array, extent) for array in wholes]


def _some(names):
    """A few of a set of names, for a message."""
    names = sorted(names)
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"


@paddle.no_grad()
def global_grad_norm(weights):
    """Euclidean norm over all gradients; squares are summed in float64."""
    gradients = [weight.parameter.grad for weight in weights]
    squares = [kernels.squared_norm(gradient) for gradient in gradients if gradient is not None]
    return math.sqrt(float(paddle.stack(squares).sum())) if squares else 0.0


def clip_scale(norm, max_norm):
    """The factor that brings a gradient of this norm down to max_norm; 1.0 if it is below, or max_norm is 0."""
    return max_norm / norm if 0 < max_norm < norm else 1.0


def seed_step(seed, step, micro_step=0):
    """Seed dropout and noise of one micro-step from (seed, step, micro-step) alone: nothing to save, resuming exact."""
    digest = hashlib.blake2b(f"{seed} {step} {micro_step}".encode(), digest_size=4).digest()
    paddle.seed(int.from_bytes(digest, "little") & 0x7FFFFFFF)


# ============================================================================================== checkpoints

DONE = ".checkpoint_done"
ALONE = ("adapter_model", "prefix_projection")  # one file each, as PEFT has them


@dataclasses.dataclass
class TrainState:
    """Where a run stands; all of it is in trainer_state.json."""

    step: int = 0  # steps made; also says which batch comes next (micro_batches)
    epoch: float = 0.0  # step / steps of an epoch
    consumed_tokens: int = 0  # real input tokens so far
    best_metric: float | None = None  # of metric_for_best_model
    best_checkpoint: str | None = None  # "checkpoint-120", a folder of output_dir
    log_history: list = dataclasses.field(default_factory=list)  # the last 20 log lines


class Checkpoints:
    """The saves of a run: output_dir/checkpoint-STEP, complete or not there, whole tensors, written by all ranks together.

        checkpoints = Checkpoints(args, model, tokenizer, optimizer, shards, topology)
        checkpoints.save(state)         # with async_save it returns as soon as the state is copied
        checkpoints.wait()              # for the one that is being written; an error of it is raised here
        checkpoints.write_model(folder, dtype)

    Everything goes to a temporary folder, is synced, gets the marker and is renamed: whenever processes die, what has the
    name checkpoint-N and the marker is whole. A full disk is a UserError; half files are removed and earlier checkpoints
    stay. output_dir must be one folder for all processes.
    """

    def __init__(self, args, model, tokenizer, optimizer=None, shards=None, topology=SINGLE):
        self.args, self.model, self.tokenizer, self.topology = args, model, tokenizer, topology
        self.optimizer, self.shards = optimizer, shards
        self.adapted = getattr(args, "lora", False) or getattr(args, "prefix_tuning", False)
        self.options = getattr(args, "unified_checkpoint_config", None) or ()
        self.half = kernels.bf16 and not self.adapted  # weights rounded for use beside float32 ones to go on from
        self.masters = self.half and "remove_master_weight" not in self.options
        self.rounds = args.ckpt_quant_stage
        self.pending, self.last, self.buffers = None, None, {} if "async_save" in self.options else None
        if "skip_save_model_weight" in self.options and not self.masters:
            self._say("skip_save_model_weight is ignored: no master weights are saved that could stand for the weights")
        if self.rounds != "O0" and getattr(optimizer, "rounded", 0) >= MAX_QUANTIZATION_TIMES:
            self._say(
                f"ckpt_quant_stage: {self.rounds} is ignored: the moments were in few bits once; again would lose more"
            )
            self.rounds = "O0"
        if (
            self.buffers is not None
        ):  # made, and touched, before training begins: the first save is as short as the others
            topology.meet()
            Share(self._all_groups()[0], topology, self.buffers, ALONE)

    def _say(self, text):
        if self.topology.rank == 0:
            print(text, flush=True)

    def contents(self, dtype=None):
        """({group: [Entry]}, {group: metadata}, function(folder) that writes what is small) of the model or adapter.

        dtype: of a model that is written to be used; None: what a checkpoint holds.
        """
        model, metadata = self.model, {}
        if self.adapted:
            with self.shards.present("prefix") if self.shards is not None else contextlib.nullcontext():
                config, files = adapter_files(model, self.args.model_name_or_path)
            groups = {file.removesuffix(".safetensors"): entries for file, (entries, _) in files.items()}
            metadata = {file.removesuffix(".safetensors"): more for file, (_, more) in files.items()}
            name, text = "adapter_config.json", json.dumps(config, indent=2)
        else:
            stored, groups = stored_weights(model), {}
            kind = dtype or ("bfloat16" if self.half else "float32")
            if dtype or not (self.masters and "skip_save_model_weight" in self.options):
                groups["model"] = [Entry.of(weight, kind) for weight in stored]
            if self.masters and not dtype:
                groups["master_weights"] = [Entry.of(weight) for weight in stored]
            name, text = "config.json", model.config.to_json(kind)
        if self.shards is not None:
            groups = {group: [self._held(entry) for entry in entries] for group, entries in groups.items()}

        def write_small(folder):
            self.tokenizer.save(folder)
            with atomic_file(folder / name) as file:
                file.write(text)

        return groups, metadata, write_small

    def _all_groups(self):
        """contents() and the optimizer's."""
        groups, metadata, write_small = self.contents()
        if self.optimizer is not None and not self.args.ignore_save_lr_and_optim:
            groups["optimizer"] = self.optimizer.entries(self.shards, self.rounds)
        return groups, metadata, write_small

    def _held(self, entry):
        """An entry whose parameters are what this rank keeps of them."""
        sources = [(w, *self.shards.held(w)) if tensor is w.parameter else (w, tensor) for w, tensor in entry.sources]
        return entry._replace(sources=sources)

    def save(self, state):
        """Write checkpoint-STEP, then prune; called by all ranks at the same step."""
        self.wait()
        args, folder = self.args, Path(self.args.output_dir)
        groups, metadata, write_small = self._all_groups()
        index = {}
        if "optimizer" in groups:
            index["optimizer"] = {
                "master_weights": self.masters,
                "ckpt_quant_stage": self.rounds,
                "quant_ckpt_resume_times": getattr(self.optimizer, "rounded", 0),
            }
        record = {
            **dataclasses.asdict(state),
            "optimizer_steps": self.optimizer.steps if self.optimizer is not None else 0,
            "data_position": {"epoch": int(state.epoch), "next_step": state.step, "seed": args.seed},
            "weights": "rounded" if self.half and not self.masters else "exact",
            "degrees": dataclasses.asdict(self.topology.degrees),
            "args": dataclasses.asdict(args),
        }
        final, best = folder / f"checkpoint-{state.step}", state.best_checkpoint

        def publish(temporary, files):
            _complete(temporary, files, record)
            if final.exists():  # a step made again after resuming from an earlier checkpoint
                _remove(final)
            temporary.rename(final)
            _sync(folder)
            prune_checkpoints(folder, args.save_total_limit, best)

        kept = "this checkpoint was not written, earlier ones are intact"
        writing = Writing(
            folder / f"tmp-checkpoint-{state.step}", final, kept, self.topology, write_small, publish, index, metadata
        )
        self.last, self.pending = state.step, writing
        writing.begin(groups, self.buffers)
        if self.buffers is None:
            self.wait()
        return final

    def wait(self):
        """Until what is being written is there; what went wrong with it is raised."""
        writing, self.pending = self.pending, None
        if writing is not None:
            writing.finish()

    def has(self, step):
        """Whether there is, or will be, a checkpoint of this step."""
        return step == self.last or (Path(self.args.output_dir) / f"checkpoint-{step}").is_dir()

    def write_model(self, folder, dtype="float32"):
        """The model, or the adapter, to be used: into a folder that may hold other things, its configuration last."""
        self.wait()
        folder = Path(folder)
        groups, metadata, write_small = self.contents(dtype)

        def publish(temporary, files):
            new = [path.name for path in temporary.iterdir() if not path.name.startswith(".")]
            for path in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"] * (
                not self.adapted
            ):
                if path.name not in new:  # of a run on another topology
                    path.unlink(missing_ok=True)
            for name in sorted(new, key=lambda name: name in ("config.json", "adapter_config.json")):
                os.replace(temporary / name, folder / name)
            shutil.rmtree(temporary)
            _sync(folder)

        kept = "the model was not written, checkpoints are intact"
        writing = Writing(folder / "tmp-model", folder, kept, self.topology, write_small, publish, {}, metadata)
        writing.begin(groups)
        writing.finish()


class Writing:
    """A folder that all ranks write to, on its way to be published: each rank its share, then rank 0 names the files and
    calls publish(temporary, {name: {"size", "crc32"}}). Ranks tell each other by files there that they are done or have failed."""

    def __init__(self, temporary, final, kept, topology, write_small, publish, index, metadata):
        self.temporary, self.final, self.kept, self.topology = temporary, final, kept, topology
        self.write_small, self.publish, self.index, self.metadata = write_small, publish, index, metadata
        self.thread, self.error = None, None

    def begin(self, groups, buffers=None):
        """buffers: a dict that the state is copied into; the rest goes on in a thread."""
        topology, error = self.topology, None
        if topology.rank == 0:
            try:
                self.temporary.parent.mkdir(parents=True, exist_ok=True)
                for left_over in {*self.temporary.parent.glob("tmp-checkpoint-*"), self.temporary}:
                    if left_over.exists():
                        shutil.rmtree(left_over)
                self.temporary.mkdir()
            except OSError as wrong:
                error = wrong
        if any(texts := topology.exchange(error and self._text(error))):
            self._raise(error, texts)
        if not all(seen := topology.exchange(self.temporary.is_dir(), met=True)):
            raise UserError(
                f"{self.final}: rank {seen.index(False)} does not see it; all processes need one output_dir"
            )
        try:
            self.share = Share(groups, topology, buffers, ALONE, self.metadata)
        except BaseException:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        if buffers is None:
            self._run()
        else:
            # Not a daemon: a run that ends by an error still gets the checkpoint that it has begun.
            self.thread = threading.Thread(target=self._run, name="checkpoint")
            self.thread.start()

    def _run(self):
        rank, ranks = self.topology.rank, range(self.topology.degrees.world)
        try:
            report = self.share.write(self.temporary, self._wait_for)
            with atomic_file(self.temporary / f".done-{rank}", sync=False) as file:
                json.dump(report, file)
            if rank == 0:
                self.write_small(self.temporary)
                reports = []
                for path in [self.temporary / f".done-{rank}" for rank in ranks]:
                    self._wait_for(path)
                    reports.append(json.loads(path.read_text()))
                    path.unlink()
                self.publish(self.temporary, _name_files(self.temporary, reports, self.index, self.metadata))
            else:
                self._wait_for(self.temporary, there=False)  # so that all end together
        except BaseException as error:
            self.error = error
            with contextlib.suppress(OSError):
                (self.temporary / f".failed-{rank}").touch()

    def _wait_for(self, path, there=True):
        """Until another rank has put this file there, or taken it away; OtherRank if one has failed, or goes no further."""
        pause, patience = 0.001, None
        while path.exists() != there:
            with contextlib.suppress(FileNotFoundError):  # published meanwhile
                if any(name.startswith(".failed-") for name in os.listdir(self.temporary)):
                    raise OtherRank
            if not threading.main_thread().is_alive():  # this process ends, so others may have ended
                patience = patience or time.monotonic() + 30
                if time.monotonic() > patience:
                    raise OtherRank
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)

    def finish(self):
        """Wait until it is published; what went wrong on any rank is raised on all."""
        if self.thread is not None:
            self.thread.join()
        if self.error is not None and not isinstance(self.error, Exception):  # interrupted: the others are too
            self._raise(self.error, [])
        wrong = self.error is not None and not isinstance(self.error, OtherRank)
        texts = self.topology.exchange(self._text(self.error) if wrong else None)
        if self.error is not None or any(texts):
            self._raise(self.error, texts)

    def _text(self, error):
        if _disk_full(error):
            free = f"{shutil.disk_usage(self.temporary.parent).free / 1e6:.1f} MB free"
            return f"{self.final}: the disk is full ({free}); {self.kept}; free some space, then resume"
        return f"{self.final}: {type(error).__name__}: {error}"

    def _raise(self, error, texts):
        if self.topology.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if error is None or isinstance(error, OtherRank) or _disk_full(error):
            raise UserError(next(filter(None, texts), f"{self.final}: another rank has ended")) from None
        raise error


class OtherRank(Exception):
    """Another rank has failed, and says itself why."""


def _name_files(folder, reports, index, metadata):
    """Give the files of all ranks their final names, and write the indexes; {name: {"size", "crc32"}} of all in the folder.

    index: {group: what its index says besides}.
    """
    found = {}
    for group in sorted({group for report in reports for group in report}):
        parts = [part for report in reports for part in report.get(group, {}).items()]
        if group in ALONE and len(parts) > 1:  # of several stages; PEFT wants one file
            tensors = {name: array for part, _ in parts for name, array in read_safetensors(folder / part).items()}
            parts = [(f"{group}.whole", write_safetensors(folder / f"{group}.whole", tensors, metadata.get(group)))]
        alone = len(parts) == 1 and group not in ("optimizer", "master_weights")
        weight_map, total = {}, 0
        for i, (part, written) in enumerate(parts, 1):
            name = f"{group}.safetensors" if alone else f"{group}-{i:05d}-of-{len(parts):05d}.safetensors"
            (folder / part).rename(folder / name)
            found[name] = {key: written[key] for key in ("size", "crc32")}
            for tensor, size in written.get("tensors", {}).items():
                weight_map[tensor], total = name, total + size
        if not alone:
            content = {
                "metadata": {"total_size": total},
                **index.get(group, {}),
                "weight_map": dict(sorted(weight_map.items())),
            }
            with atomic_file(folder / f"{group}.safetensors.index.json") as file:
                json.dump(content, file, indent=1)
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path.name not in found:
            found[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "crc32": crc32_of(path)}
    return found


def _complete(folder, files, record):
    """trainer_state.json, all synced, then the marker, which has its checksum."""
    with atomic_file(folder / "trainer_state.json") as file:
        json.dump({**record, "files": files}, file, indent=1, ensure_ascii=False)
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    (folder / DONE).write_text(str(crc32_of(folder / "trainer_state.json")))
    _sync(folder / DONE)
    _sync(folder)


def _sync(path):
    """Force a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(output_dir):
    """Folders named checkpoint-STEP, newest first, complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def prune_checkpoints(output_dir, limit, best=None):
    """Remove the oldest beyond `limit`; the newest and the best (a folder's name) always stay and are counted."""
    checkpoints = list_checkpoints(output_dir)
    if not limit or limit < 1:
        return
    keep = [path for i, path in enumerate(checkpoints) if i == 0 or (best and path.name == Path(best).name)]
    keep += [path for path in checkpoints if path not in keep][: max(0, limit - len(keep))]
    for path in reversed(checkpoints):
        if path not in keep:
            _remove(path)


def incomplete(path):
    """None for a complete checkpoint, else what is wrong with it."""
    path = Path(path)
    if not (path / DONE).is_file():
        return "it has no completion marker"
    marked, state = (path / DONE).read_text(), path / "trainer_state.json"
    try:
        files = json.loads(state.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return "trainer_state.json is missing or damaged"
    if marked and marked != str(crc32_of(state)):
        return "trainer_state.json is damaged: its checksum differs"
    for name, written in files.items():
        size = written["size"] if isinstance(written, dict) else written  # a number: saved before there were checksums
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes, {size} were written"
    return None


def damaged(path, topology=SINGLE):
    """None, or which file of a complete checkpoint is not what was written; all ranks read a part each and agree."""
    files = json.loads((Path(path) / "trainer_state.json").read_text(encoding="utf-8"))["files"]
    files = {name: written for name, written in files.items() if isinstance(written, dict)}
    found = checksums(path, {name: written["size"] for name, written in files.items()}, topology)
    wrong = sorted(name for name, written in files.items() if found[name] != written["crc32"])
    return f"{wrong[0]} is damaged: its checksum differs from what was written" if wrong else None


def find_checkpoint(args, topology=SINGLE):
    """The checkpoint that resume_from_checkpoint means: a path (UserError unless complete) or true = newest complete.

    None if there is none. Complete: all files have the size and the checksum that they were written with. Prints which it
    is, which were passed over, and arguments that have changed since. All ranks find the same.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None

    def say(text):
        if topology.rank == 0:
            print(text, flush=True)

    if isinstance(wanted, str):
        reason = "there is no such folder" if not Path(wanted).is_dir() else incomplete(wanted)
        if reason := next(filter(None, topology.exchange(reason)), None) or damaged(wanted, topology):
            raise UserError(f"resume_from_checkpoint: {wanted}: {reason}; give a complete one, or true for the newest")
        path = Path(wanted)
        newer = [p for p in list_checkpoints(args.output_dir) if int(p.name[11:]) > _step_of(path)]
        if args.save_total_limit and newer:  # pruning goes by step: what this run saves would be the first to go
            raise UserError(
                f"resume_from_checkpoint: {path}: output_dir also holds the later {newer[0].name}, and save_total_limit keeps "
                "the latest steps; remove it, or go on in another output_dir"
            )
    else:
        listed = [(str(path), incomplete(path)) for path in list_checkpoints(args.output_dir) if topology.rank == 0]
        for path, reason in topology.exchange(listed)[0]:
            if (reason := reason or damaged(path, topology)) is None:
                path = Path(path)
                break
            say(f"resume: {path} is passed over: {reason}")
        else:
            say(f"resume: no complete checkpoint in {args.output_dir}; starting at step 0")
            return None
    say(f"resume: from {path}{_changes(path, args, topology)}")
    return path


def _changes(path, args, topology):
    """What is another topology now than in the checkpoint, which changes no step, and what else is other, which may."""
    saved = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    then, degrees = saved["args"], Degrees(**saved.get("degrees", {}))
    aside = """resume_from_checkpoint overwrite_output_dir output_dir disable_tqdm logging_dir logging_steps logging_first_step report_to
        save_strategy save_steps save_total_limit unified_checkpoint unified_checkpoint_config evaluation_strategy eval_steps
        max_evaluate_steps sharding virtual_pp_degree sequence_parallel hybrid_parallel_topo_order gradient_accumulation_steps""".split()
    aside += [f"{name}_parallel_degree" for name in NAMES.values()]
    now = {key: value for key, value in dataclasses.asdict(args).items() if key in then and key not in aside}
    changed = [f"{key} {then[key]!r} -> {value!r}" for key, value in now.items() if then[key] != value]
    before = then["gradient_accumulation_steps"] * degrees.dp * degrees.sharding
    if before != (micro_batches := args.gradient_accumulation_steps * topology.data_size):
        changed.append(f"micro-batches of a step {before} -> {micro_batches}")
    text = "" if str(degrees) == str(topology.degrees) else f"; {degrees} -> {topology.degrees}"
    return text + (f"; not an exact continuation, changed: {', '.join(changed)}" if changed else "")


def _step_of(checkpoint):
    """The step that trainer_state.json names."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["step"]


def load_trained(model, path, args):
    """What was trained, without an adapter: a checkpoint's float32 weights into the model, from where they are exact."""
    path, masters = Path(path), (Path(path) / f"{MASTERS}.index.json").is_file()
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    if state.get("weights") == "rounded":
        if not {"remove_master_weight", "master_weight_compatible"} & set(args.unified_checkpoint_config or ()):
            raise UserError(
                f"{path}: has bfloat16 weights and no master weights; unified_checkpoint_config: "
                "master_weight_compatible goes on from the rounded ones"
            )
        if getattr(model, "topology", SINGLE).rank == 0:
            print(
                f"resume: {path} has no master weights: from bfloat16 weights it is not an exact continuation",
                flush=True,
            )
    load_weights(model, path, (MASTERS,) if masters else MODELS)


def load_checkpoint(path, optimizer=None, shards=None, output_dir=None):
    """TrainState of a checkpoint, its moments into `optimizer` (None: ignore_load_lr_and_optim); no weights.

    Each rank reads what it has of them, whatever the topology that wrote them.

    A best checkpoint that is not in output_dir (default: beside `path`) is forgotten: it could not be loaded at the end.
    """
    path = Path(path)
    saved = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    if optimizer is not None:
        index = path / "optimizer.safetensors.index.json"
        if not index.is_file():
            raise UserError(f"{path}: was saved without optimizer state; resume with ignore_load_lr_and_optim: true")
        optimizer.load(stored_tensors(path, ("optimizer.safetensors",)), shards)
        optimizer.steps, how = saved["optimizer_steps"], json.loads(index.read_text())
        optimizer.rounded = how.get("quant_ckpt_resume_times", 0) + (how.get("ckpt_quant_stage", "O0") != "O0")
    state = TrainState(**{field.name: saved[field.name] for field in dataclasses.fields(TrainState)})
    if state.best_checkpoint and not (Path(output_dir or path.parent) / state.best_checkpoint).is_dir():
        state.best_metric = state.best_checkpoint = None
    return state


def update_best(args, state, metrics, checkpoints):
    """Note in `state` that checkpoint-{state.step} is the best so far, if `metrics` say so; returns whether they do.

    An evaluation at a step that was not saved does not count: there is nothing to go back to.
    """
    name = f"eval_{args.metric_for_best_model}"
    if name not in metrics:
        raise UserError(f"metric_for_best_model: {name} is not computed here; there are {', '.join(metrics)}")
    value, best = metrics[name], state.best_metric
    saved = checkpoints.has(state.step)
    better = best is None or (value > best if args.greater_is_better else value < best)
    if not (saved and better and math.isfinite(value)):
        return False
    state.best_metric, state.best_checkpoint = value, f"checkpoint-{state.step}"
    return True


# ====================================================================================================== log


class Log:
    """The log of a run: a tqdm bar or plain lines, metrics.jsonl, eval_metrics.jsonl, curves.png, visualdl if asked.

        log = Log(args, total, state)            # drops lines of an earlier attempt that lie after state.step
        log.add({"sft_loss": 0.3})               # a micro-batch's part of further figures of the step that is being made
        start = log.begin()                      # before every step: the time
        log.step(state, loss=, lr=, grad_norm=, tokens=, seconds=)    # after it; state.step counts it already
        log.evaluation(state.step, metrics); log.say("text"); log.close()

    tokens: real input tokens of the step; seconds: its duration, without evaluation and saving. flops_per_token and
    peak_flops (of measure_matmul_peak) add model FLOPs utilisation, "mfu". With several processes, "communication" is the
    share of the steps' time since the last line that this rank was in each axis's collectives, waiting for slower ranks
    too; what a pipeline waits for messages is not in it, but is "bubble".
    """

    def __init__(self, args, total, state, flops_per_token=None, peak_flops=None, topology=SINGLE, figures=()):
        self.args, self.total, self.folder, self.utilisation = args, total, Path(args.output_dir), None
        self.topology, self.writes = topology, topology.rank == 0
        if flops_per_token and peak_flops:
            self.utilisation = flops_per_token / peak_flops
        self.window = collections.deque(maxlen=50)  # (tokens, seconds) of the last steps
        self.since, self.spent = 0, 0.0  # steps since the last line, and their seconds
        self.talked = {axis.name: 0.0 for axis in topology.axes if axis.size > 1}  # seconds of theirs
        self.begin()
        self.names = figures
        self.figures = {}  # of the step that is being made, see add()
        for name in ("metrics.jsonl", "eval_metrics.jsonl") if self.writes else ():
            _keep_lines(self.folder / name, lambda row: row["step"] <= state.step)
        self.writer = self._visualdl() if "visualdl" in (args.report_to or ()) and self.writes else None
        hidden = args.disable_tqdm if args.disable_tqdm is not None else not (self.writes and sys.stderr.isatty())
        self.bar = None if hidden else tqdm(total=total, initial=state.step, desc="train", dynamic_ncols=True)

    def _visualdl(self):
        try:
            from visualdl import LogWriter
        except ImportError:
            raise UserError("report_to: visualdl is not installed: pip install visualdl") from None
        return LogWriter(logdir=self.args.logging_dir or str(self.folder / "vdl_log"))

    def begin(self):
        """The time. What is talked from here on is the step's, and not evaluation's or a checkpoint's."""
        self.before = {axis.name: axis.seconds for axis in self.topology.axes}
        return time.perf_counter()

    def add(self, figures):
        """Further figures for the line of the step that is being made; those of its micro-batches are summed."""
        for name, value in figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + value

    def step(self, state, loss, lr, grad_norm, tokens, seconds):
        """Count a step; at logging steps (and the last) write its line: its own loss, lr, grad_norm, not means."""
        self.window.append((tokens, seconds))
        self.since, self.spent = self.since + 1, self.spent + seconds
        for axis in self.topology.axes:
            if axis.size > 1:
                self.talked[axis.name] += axis.seconds - self.before[axis.name]
        added, self.figures = self.topology.total({n: self.figures.get(n, 0.0) for n in self.names}, True), {}
        recent = list(self.window)[-self.since :]
        speed = sum(t for t, _ in recent) / max(1e-9, sum(s for _, s in recent))
        eta = (self.total - state.step) * sum(s for _, s in self.window) / len(self.window)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update(1)
        first = state.step == 1 and self.args.logging_first_step
        if state.step % self.args.logging_steps and state.step != self.total and not first:
            return
        row = {
            "step": state.step,
            "epoch": round(state.epoch, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": round(speed, 1),
            "consumed_tokens": state.consumed_tokens,
            "eta_seconds": round(eta, 1),
            "peak_memory_gb": round(peak_memory() / 1e9, 3),
        }
        if self.utilisation:
            row["mfu"] = round(speed * self.utilisation, 4)
        if (pp := self.topology.pp).size > 1:  # idle share of the step's forwards and backwards, beside the formula
            row["bubble"] = round(self.topology.total(pp.idle, stages=True) / (pp.size * self.topology.data_size), 4)
            row["bubble_formula"] = round(pp.bubble, 4)
        if self.talked:
            row["communication"] = {
                name: round(talked / max(1e-9, self.spent), 4) for name, talked in self.talked.items()
            }
        self.since, self.spent, self.talked = 0, 0.0, dict.fromkeys(self.talked, 0.0)
        row.update(added)
        state.log_history = (state.log_history + [row])[-20:]
        if self.writes:
            _append_line(self.folder / "metrics.jsonl", row)
        self._report("train", row)
        if self.bar is None:
            mfu = f" | mfu {100 * row['mfu']:.1f} %" if self.utilisation else ""
            done, left = 100 * state.step / self.total, datetime.timedelta(seconds=round(eta))
            figures = f"loss {loss:.4f} | lr {lr:.3e} | grad_norm {grad_norm:.3f} | {speed:,.0f} tokens/s{mfu}"
            if "bubble" in row:
                figures += f" | bubble {100 * row['bubble']:.1f} % (formula {100 * row['bubble_formula']:.1f} %)"
            rest = " | ".join(filter(None, [f"eta {left} | peak {row['peak_memory_gb']:.2f} GB", shown(added)]))
            print(f"step {state.step}/{self.total} ({done:.1f} %) | {figures} | {rest}", flush=True)

    def evaluation(self, step, metrics):
        """Print what evaluate() found and keep it, one line a step however often a resumed run evaluates there."""
        path = self.folder / "eval_metrics.jsonl"
        if self.writes:
            _keep_lines(path, lambda row: row["step"] != step)
            _append_line(path, {"step": step, **metrics})
        self._report("eval", {"step": step, **metrics})
        self.say(f"evaluation at step {step}: {shown(metrics)}")

    def say(self, text):
        """A line that does not tear the bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text)

    def _report(self, group, row):
        if self.writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{group}/{name}", value, row["step"])

    def close(self):
        """End the bar and draw curves.png."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.writer is not None:
            self.writer.close()
        if self.writes and (line := draw_curves(self.folder)):
            print(line, flush=True)


def draw_curves(folder):
    """Draw curves.png, loss and learning rate over steps, from the two .jsonl files; returns a line to print."""
    rows, evaluations = (_read_lines(Path(folder) / name) for name in ("metrics.jsonl", "eval_metrics.jsonl"))
    if not rows:
        return "curves.png: no step was logged, nothing to draw"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "curves.png is not drawn: it needs matplotlib: pip install matplotlib"
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="train")
    points = [(row["step"], row["eval_loss"]) for row in evaluations if row.get("eval_loss") is not None]
    if points:
        above.plot(*zip(*points), "o-", label="eval")
    above.set_ylabel("loss")
    above.legend()
    below.plot([row["step"] for row in rows], [row["lr"] for row in rows], color="tab:green")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    with atomic_file(Path(folder) / "curves.png", "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    return f"curves: {Path(folder) / 'curves.png'}"


def _read_lines(path):
    """The objects of a .jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _keep_lines(path, wanted):
    """Rewrite a .jsonl with the rows for which wanted(row)."""
    if path.is_file():
        rows = [row for row in _read_lines(path) if wanted(row)]
        with atomic_file(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _append_line(path, row):
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON has no nan
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def peak_memory():
    """Bytes: the device's peak on an accelerator, else this process's peak resident set."""
    if paddle.device.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_matmul_peak(seconds=0.8):
    """FLOP/s of the best of a few float32 matmuls of 1024 x 1024: what utilisation is measured against."""
    n, best, end = 1024, math.inf, time.perf_counter() + seconds
    a = paddle.ones([n, n], "float32")
    float(paddle.matmul(a, a)[0, 0])  # the first one starts the threads
    while time.perf_counter() < end:
        begin = time.perf_counter()
        float(paddle.matmul(a, a)[0, 0])  # float() waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best if best < math.inf else 2 * n**3 / seconds


def save_nonfinite_report(output_dir, step, batch):
    """Write a batch whose loss is not finite (ids, labels, record indices) to nonfinite-step-N.json; returns that."""
    path = Path(output_dir) / f"nonfinite-step-{step}.json"
    with atomic_file(path) as file:
        json.dump({"step": step, **batch}, file, default=lambda value: np.asarray(value).tolist())
    return path


def check_finite(value, output_dir, step, batch):
    """Stop the run when a loss or gradient norm is not finite, keeping the batch that gave it: UserError."""
    if not math.isfinite(value):
        report = save_nonfinite_report(output_dir, step, batch)
        advice = "resume from the last checkpoint with a lower learning_rate, or look at these records"
        raise UserError(f"step {step}: the loss or its gradient is {value}; its batch is in {report}; {advice}")


def set_recompute(model, args):
    """What the model keeps of a forward pass for its backward."""
    layers, L = args.no_recompute_layers or [], model.config.num_hidden_layers
    if max(layers, default=0) >= L:
        raise UserError(f"no_recompute_layers: {max(layers)}; the model's {L} layers are counted from 0")
    model.recompute, model.recompute_granularity = args.recompute, args.recompute_granularity
    model.no_recompute_layers = frozenset(layers)


def check_vocabulary(model, tokenizer, path):
    """UserError if the tokenizer has ids that the model's embedding has no row for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        found = f"vocab_size {model.config.vocab_size} in config.json, but the tokenizer has {tokenizer.vocab_size} ids"
        raise UserError(f"{path}: {found}; they belong to different models")


def check_positions(model, path, needed):
    """UserError if what keys ask for, {their names: tokens}, goes past the end of the model's table of learned positions."""
    limit = model.config.max_position_embeddings
    key, tokens = max(needed.items(), key=lambda item: item[1])
    if model.config.position == "learned" and tokens > limit:
        raise UserError(f"{path}: has learned {limit} positions; {key} asks for {tokens}; lower it")


def shown(metrics):
    """`loss 1.2345 | accuracy 0.6000 | …` for a line of output."""
    names = ((key.removeprefix("eval_"), value) for key, value in metrics.items())
    return " | ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in names)


def write_results(output_dir, name, metrics, topology=SINGLE):
    """Keep what an evaluation found in output_dir/NAME_results.json."""
    if topology.rank == 0:
        with atomic_file(Path(output_dir) / f"{name}_results.json") as file:
            json.dump(metrics, file, indent=2, ensure_ascii=False)


# ============================================================================================== evaluation


def model_inputs(batch):
    """{name: tensor} of what the model takes from a batch: input_ids, position_ids, startend_row_indices, labels."""
    names = ("input_ids", "position_ids", "startend_row_indices", "labels")
    return {name: paddle.to_tensor(batch[name]) for name in names if batch.get(name) is not None}


@paddle.no_grad()
def evaluate(model, loader, max_batches=None, topology=SINGLE):
    """Mean loss, accuracy and perplexity per target token over a loader's epoch 0 (its first max_batches, if > 0).

    Sums, not means of means: the figures do not depend on how samples fall into batches, nor on which rank has which.
    """
    was_training, loss, correct, tokens = model.training, 0.0, 0, 0
    model.eval()
    batches = loader.batches_per_epoch
    indices = list(range(min(max_batches, batches) if max_batches and max_batches > 0 else batches))

    def run(place):
        return model(**model_inputs(place[0]), return_predictions=True)

    places = ((loader.batch(0, index), counts) for index, counts in share_of(indices, topology))
    for (batch, counts), (losses, predictions) in in_turn(model, places, run):
        if not counts:
            continue
        target = batch["labels"] != -100  # (B, T)
        loss += float(losses.astype("float64").sum())
        correct += int((predictions.numpy() == batch["labels"])[target].sum())
        tokens += int(target.sum())
    if was_training:
        model.train()
    loss, correct, tokens = topology.total((loss, correct, tokens))
    if not tokens:
        raise UserError("evaluation: the data has no target token")
    mean = loss / tokens
    ppl = math.exp(mean) if mean < 700 else math.inf
    return {"eval_loss": mean, "eval_accuracy": correct / tokens, "eval_ppl": ppl, "eval_tokens": tokens}


# Chinese, Japanese and Korean characters count one by one; other scripts by words; a punctuation mark is a token.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002ffff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


def bleu4(hypotheses, references):
    """Corpus BLEU of n-grams up to 4, one reference each, in [0, 1] (Papineni et al., 2002); 0 if an order has none.

    exp(min(0, 1 - r/c)) · (p1 p2 p3 p4)^(1/4): p clipped precisions over the corpus, r and c the lengths of references
    and hypotheses.
    """
    assert len(hypotheses) == len(references), (len(hypotheses), len(references))
    matches, totals, c, r = [0] * 4, [0] * 4, 0, 0
    for hypothesis, reference in zip(hypotheses, references):
        h, g = _TOKEN.findall(hypothesis), _TOKEN.findall(reference)
        c, r = c + len(h), r + len(g)
        for n in range(1, 5):
            counts = _ngrams(h, n)
            matches[n - 1] += (counts & _ngrams(g, n)).total()
            totals[n - 1] += counts.total()
    if not all(matches):
        return 0.0
    return math.exp(min(0.0, 1 - r / c) + sum(math.log(m / t) for m, t in zip(matches, totals)) / 4)


def rouge(hypotheses, references):
    """ROUGE-1, -2, -L (Lin, 2004): F1 of common n-grams or longest common subsequence; mean over pairs, in [0, 1]."""
    assert len(hypotheses) == len(references), (len(hypotheses), len(references))
    sums = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    for hypothesis, reference in zip(hypotheses, references):
        h, g = _TOKEN.findall(hypothesis), _TOKEN.findall(reference)
        for n in (1, 2):
            common = (_ngrams(h, n) & _ngrams(g, n)).total()
            sums[f"rouge-{n}"] += _f1(common, max(0, len(h) - n + 1), max(0, len(g) - n + 1))
        sums["rouge-l"] += _f1(_lcs_length(h, g), len(h), len(g))
    return {name: value / max(1, len(references)) for name, value in sums.items()}


def _ngrams(tokens, n):
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


def _f1(common, found, wanted):
    return 2 * common / (found + wanted) if common else 0.0


def _lcs_length(a, b):
    """Length of the longest common subsequence, a bit per token of `a` (Hyyrö, 2004): a 0 bit of `row` is a match."""
    places = collections.defaultdict(int)
    for i, token in enumerate(a):
        places[token] |= 1 << i
    every = (1 << len(a)) - 1
    row = every
    for token in b:
        hits = row & places[token]
        row = ((row + hits) | (row - hits)) & every
    return len(a) - row.bit_count()
