"""What PaddleNLP's users bring: argument names that are used, ignored or refused here, each with its reason."""


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
    ("data is tokenized once and read from memory", """
        dataloader_num_workers data_impl skip_warmup data_cache lazy lazy_data_processing dataset_num_proc
        dataset_batch_size dataset_kwargs dataset_text_field remove_unused_columns label_names"""),
    ("evaluation keeps no logits, one pass gives all its figures", """
        eval_accumulation_steps prediction_loss_only past_index minimum_eval_times eval_packing"""),
    ("speed is measured by tests/bench/bench_train.py and shown in the log", """
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
    ("it belongs to a way of quantizing that is not here (fp8, 8-bit caches, AWQ)", """
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
    ("training on quantized weights (QLoRA) is not here yet", "weight_quantize_algo"),
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
    ("quantizing is done by quantize.py", "do_ptq do_gptq do_awq do_qat load_quant_model"),
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
