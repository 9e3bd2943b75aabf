"""Argument names that users bring from PaddleNLP, transformers, TRL or LLaMA-Factory, with what each does here.

`arguments.parse_args` reads these tables for every key that is not a field of the script's Args: ALIASES and SHORTHANDS
set keys of ours, IGNORED prints one line with its reason, REFUSED is an error with its reason.
"""

# Other names of our keys, with the same values.
ALIASES = {
    "min_lr": "min_learning_rate",  # PaddleNLP's second name for it
    "sharding_degree": "sharding_parallel_degree",
    "dpo_beta": "beta",
    "dpo_loss_type": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "eval_strategy": "evaluation_strategy",  # transformers and TRL
    "gradient_checkpointing": "recompute",
    "max_prompt_length": "max_prompt_len",  # TRL
    "packing": "zero_padding",
    "neat_packing": "zero_padding",  # LLaMA-Factory
    "use_rslora": "rslora",
    "use_dora": "dora",
    "loraplus_lr_ratio": "lora_plus_scale",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
}


# Switches that stand for several of our keys when they are true.
SHORTHANDS = {"rslora_plus": {"rslora": True, "lora_plus_scale": 4.0, "lora_alpha": 4.0}}


def _table(rows: list) -> dict:
    """[(reason, keys)] -> {key: reason}"""
    return {key: why for why, keys in rows for key in keys.split()}


# Accepted, with one printed line each: keys that have no meaning here.
IGNORED = _table([
    ("the key `kernels` chooses which kernels run", """
        use_flash_attention use_fused_rms_norm use_fused_rope use_fused_linear use_fused_dropout_add
        use_fused_linear_cross_entropy use_fast_layer_norm fuse_attention_qkv fuse_attention_ffn fused_linear
        use_fused_head_and_loss_fn use_quick_lora enable_linear_fused_grad_add use_fusemt use_intermediate_api"""),
    ("packed rows always use FlashMask", "flash_mask"),
    ("sharding has an axis of its own", "sharding_parallel_mesh_dimension"),
    ("message sizes are fixed", "sharding_comm_buffer_size_MB"),
    ("every rank reads full batches and the model splits them", "split_inputs_sequence_dim"),
    ("gradients of one axis are always sent together", "fuse_sequence_parallel_allreduce split_norm_comm"),
    ("a missing gradient counts as zero; a weight that no rank has a gradient for is not updated",
     "ddp_find_unused_parameters"),
    ("the loss never needs all logits at once", "tensor_parallel_output"),
    ("the launcher sets the rank", "tensor_parallel_rank local_rank"),
    ("every process reads the data itself", "distributed_dataloader"),
    ("the first process writes the only log; all processes share output_dir",
     "share_folder log_on_each_node save_on_each_node"),
    ("expert_parallel_degree and tensor_parallel_degree shard the experts",
     "use_expert_parallel expert_tensor_parallel_degree"),
    ("checkpoints do not depend on the topology", """
        save_sharded_model load_sharded_model force_reshard_pp auto_parallel_resume_form_hybrid_parallel
        save_sharding_stage1_model_include_freeze_params"""),
    ("checkpoints are always unified and complete", """
        unified_checkpoint save_rng_states save_tokenizer ordered_save_group_size use_async_save output_signal_dir
        enable_zero_cost_checkpoint zcc_workers_num zcc_pipeline_hooks_capacity_usage zcc_save_ema_coef zcc_ema_interval
        flash_device_save_steps pdc_download_ckpt pdc_download_timeout ignore_data_skip"""),
    ("bf16 and fp16 set the precision", """
        fp16_opt_level amp_master_grad amp_custom_black_list amp_custom_white_list bf16_full_eval fp16_full_eval
        scale_loss"""),
    ("data is tokenized once and read from memory", """
        dataloader_num_workers data_impl skip_warmup data_cache lazy lazy_data_processing dataset_num_proc
        dataset_batch_size dataset_kwargs dataset_text_field remove_unused_columns label_names"""),
    ("evaluation keeps no logits; one pass computes all metrics", """
        eval_accumulation_steps prediction_loss_only past_index minimum_eval_times eval_packing"""),
    ("the log shows the speed; tests/bench/bench_train.py measures it", """
        benchmark autotuner_benchmark skip_profile_timer skip_memory_metrics metrics_output_path
        count_trained_tokens"""),
    ("gradients are always released after a step; `sharding` says where moments are kept",
     "release_grads flatten_param_grads offload_optim"),
    ("recompute_granularity and no_recompute_layers control recomputation", """
        recompute_use_reentrant refined_recompute offload_recompute_inputs pp_recompute_interval"""),
    ("these models have no dropout", "hidden_dropout_prob attention_probs_dropout_prob dropout_warmup_steps"),
    ("nothing is uploaded", """
        aistudio_repo_id aistudio_repo_private aistudio_repo_license aistudio_token"""),
    ("wandb's own settings say it: `wandb login`", "wandb_api_key wandb_http_proxy"),
    ("the tokenizer defines it", "pad_token_id eos_token"),
    ("the model's config.json defines it", "model_init_kwargs"),
    ("experts have no capacity limit", "expert_max_capacity expert_min_capacity"),
    ("it belongs to an adapter that is not supported", """
        vera_rank lokr_path lokr_dim layers position intervention_type rank act_fn add_bias dropout"""),
    ("it belongs to 4-bit LoRA, which is not supported", """
        qlora_weight_blocksize qlora_weight_double_quant qlora_weight_double_quant_block_size"""),
    ("it belongs to use_long_sequence_strategies or use_ssa, which are not supported", """
        strategy_type strategy_name ssa_group_size_ratio"""),
    ("a key of pretrain.py", """
        input_dir split max_seq_length continue_training mask_across_documents num_hidden_layers"""),
    ("a key of finetune.py", """
        dataset_name_or_path src_length max_length zero_padding greedy_zero_padding pad_to_max_length
        pad_to_multiple_of chat_template eval_with_do_generation save_generation_output top_k top_p lora_rank lora_alpha
        rslora lora_plus_scale dora lora_target_modules lora_path num_prefix_tokens prefix_projection
        prefix_projection_hidden_size prefix_path neftune_noise_alpha"""),
    ("only finetune.py uses LoRA dropout; with it dpo.py's policy would not start equal to its reference",
     "lora_dropout"),
    ("a key of dpo.py", """
        beta simpo_gamma label_smoothing loss_type pref_loss_ratio sft_loss_ratio dpop_lambda reference_free max_seq_len
        max_prompt_len dev_dataset_path rslora_plus"""),
    ("it belongs to reward models", """
        placeholder_token reward_tokens normalize_score_during_training normalizer_type normalizer_momentum
        regularization"""),
    ("it belongs to embedding models", """
        max_query_len max_passage_len group_size query_template passage_template return_position_ids"""),
    ("a key of quantize.py", """
        quant_type skip_list_names weight_quant_method act_quant_method search_alpha_min search_alpha_max
        search_scale_min search_scale_max ptq_step shift shift_all_linears shift_step smooth smooth_all_linears
        smooth_step smooth_piecewise_search smooth_k_piece smooth_search_piece gptq_step auto_clip"""),
    ("all calibration samples have the same weight", "shift_sampler smooth_sampler"),
    ("it belongs to a quantization method that is not supported (fp8, 8-bit caches, AWQ)", """
        fp8_type cachekv_quant_method awq_step autoclip_step"""),
    ("quantize.py always writes its report", "do_quant_debug test_sample"),
    ("serve.py always uses continuous batching over a pool of blocks", """
        inference_model block_attn append_attn dynamic_insert avx_model avx_type avx_cachekv_type output_via_mq
        total_request_num use_fake_parameter export_precache model_prefix model_type return_full_hidden_states
        mla_use_matrix_absorption"""),
    ("it belongs to speculative decoding, which is not supported", """
        speculate_max_draft_token_num speculate_max_ngram_size speculate_verify_window speculate_max_candidate_len
        draft_model_quant_type"""),
    ("the folder's own quantization_config defines it", "weightonly_group_size weight_block_size moe_quant_type"),
    ("a key of export.py", "dtype output_path"),
    ("a key of serve.py", """
        min_length max_new_tokens decode_strategy total_max_length block_size batch_size data_file output_file port host
        base_port flask_port title sub_title api_key"""),
    ("it belongs to reinforcement learning", """
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


# An error when they ask for something; ignored when they do not (false, 0, null, "" or a value of HARMLESS).
REFUSED = _table([
    ("this adapter is not supported; use lora (with rslora, lora_plus_scale, pissa or dora) or prefix_tuning", """
        vera lokr reft use_mora lora_use_mixer"""),
    ("training on quantized weights (QLoRA) is not supported yet", "weight_quantize_algo"),
    ("rope_scaling in the model's config.json scales positions", """
        use_long_sequence_strategies rope_scaling_factor use_pose_convert"""),
    ("shifted sparse attention (LongLoRA) is not supported; attention is exact and its memory linear", "use_ssa"),
    ("use pretrain.py to train on plain text", "autoregressive"),
    ("training is always eager; export.py makes a static graph", "enable_auto_parallel to_static"),
    ("use export.py to export", "do_export"),
    ("data comes from local files: give their folder as dataset_name_or_path", "task_name"),
    ("models are read from and written to local folders only", "from_aistudio save_to_aistudio"),
    ("set device: cpu", "no_cuda"),
    ("the only optimizer is adamw", "optim"),
    ("training data is always shuffled, by seed and epoch", "dataloader_shuffle"),
    ("the log is written by steps; set logging_steps", "logging_strategy"),
    ("no data is skipped; remove the records from the data", "skip_data_intervals"),
    ("use finetune.py for fine-tuning", "lora prefix_tuning neftune"),
    ("only finetune.py trains PiSSA: it changes the base weights, which dpo.py needs as its reference", "pissa"),
    ("use quantize.py to quantize", "do_ptq do_gptq do_awq do_qat load_quant_model"),
    ("use dpo.py for preference training; finetune.py reads dataset_name_or_path", "train_dataset_path"),
    ("the reference model is never updated during training; set it to -1", "ref_model_update_steps"),
    ("reward models are not supported", "process_reward"),
    ("speculative decoding is not supported", "speculate_method draft_model_name_or_path"),
    ("only serve.py has a key/value cache", "cachekv_int8_type"),
    ("KTO is not supported; dpo.py learns from pairs", "desirable_weight undesirable_weight"),
    ("reinforcement learning is not supported", """
        rl_algorithm train_datasets actor_model_name_or_path reward_model_name_or_path critic_model_name_or_path
        reward_critic_model_name_or_path"""),
])  # fmt: skip


# {key of REFUSED: values that ask for what happens anyway}
HARMLESS = {"optim": ("adamw",), "dataloader_shuffle": (True, 1, "true", "1"), "logging_strategy": ("steps",),
            "rope_scaling_factor": (1, "1", "1.0"), "ref_model_update_steps": (-1, 0, "-1", "0")}  # fmt: skip


# PaddleNLP's keys that hold options, separated by spaces or commas. None is needed here; each has its reason.
OPTIONS = {
    "tensor_parallel_config": _table([
        ("partial sums are reduced as soon as they are ready", """
            enable_mp_async_allreduce enable_sp_async_reduce_scatter"""),
        ("gradients are accumulated in place", "enable_mp_skip_c_identity enable_mp_fused_linear_param_grad_add"),
        ("the loss is a sum over the step's tokens, divided once", "enable_delay_scale_loss"),
        ("replicated parameters stay equal without synchronization", "sync_param sync_grad sync_moment"),
        ("the vocabulary is always sharded", "replace_with_c_embedding replace_with_parallel_cross_entropy")]),
    "pipeline_parallel_config": _table([
        ("shapes are sent with every micro-batch", """
            disable_p2p_cache_shape enable_dynamic_shape enable_clear_every_step_cache"""),
        ("tensors are sent one at a time, unsplit", """
            disable_partial_send_recv disable_batch_p2p_comm enable_overlap_p2p_comm"""),
        ("the loss is a sum over the step's tokens, divided once", "enable_delay_scale_loss"),
        ("gradients are reduced once, after the last micro-batch", """
            enable_dp_comm_overlap enable_sharding_comm_overlap"""),
        ("the log always has the times", "enable_timer"),
        ("gradients are always released", "enable_release_grads"),
        ("schedules are 1F1B and, with virtual_pp_degree, interleaved 1F1B", """
            best_unbalanced_scheduler use_dualpipev forward_backward_overlap_scheduler enable_offload_queue""")]),
    "sharding_parallel_config": _table([
        ("tensors are always sent in buckets", "enable_stage1_tensor_fusion enable_fuse_optimizer_states"),
        ("communication overlaps computation where the device can", """
            enable_stage1_overlap enable_stage2_overlap enable_stage1_broadcast_overlap
            enable_stage1_allgather_overlap"""),
        ("tensors are always split evenly by elements", "split_param"),
        ("gradients are summed, and divided once by the step's tokens", "disable_stage1_reduce_avg"),
        ("gradients are always released", "enable_release_grads")]),
    **dict.fromkeys(("data_parallel_config", "sequence_parallel_config"), _table([
        ("gradients are summed, and divided once by the step's tokens", "enable_allreduce_avg_in_gradinent_scale"),
        ("gradients are always reduced once, after the last micro-batch", "gradient_sync_after_accumulate")])),
}  # fmt: skip
