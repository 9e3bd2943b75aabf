"""Argument names of PaddleNLP, PaddleFormers, transformers, TRL and LLaMA-Factory, with what each does here.

`arguments.parse_args` reads these tables for every key that is not a field of the script's Args: ALIASES, CHOICES,
NESTED and SHORTHANDS set keys of ours, IGNORED prints one line with its reason, REFUSED and REFUSED_IN are errors with
their reasons. A key that names the user's data, model or a limit is used or refused, never ignored.
"""


def _table(rows: list) -> dict:
    """[(value, names)] -> {name: value}"""
    return {name: value for value, names in rows for name in names.split()}


# Other names of our keys, with the same values: (our key, names). Of several keys, the first that the script has is
# meant; "a+b" sets both, b only if nothing else in the same place does.
ALIASES = _table([
    # PaddleNLP: second names, and those of its older files
    ("min_learning_rate", "min_lr"),
    ("sharding_parallel_degree", "sharding_degree"),
    ("beta", "dpo_beta"),
    ("loss_type", "dpo_loss_type"),
    ("label_smoothing", "dpo_label_smoothing"),
    ("zero_padding", "intokens"),
    ("total_max_length max_length max_seq_length", "max_seq_len"),
    # PaddleFormers, which has Megatron's names for degrees
    ("tensor_parallel_degree", "tensor_model_parallel_size"),
    ("pipeline_parallel_degree", "pipeline_model_parallel_size"),
    ("virtual_pp_degree", "virtual_pipeline_model_parallel_size"),
    ("context_parallel_degree", "context_parallel_size"),
    ("expert_parallel_degree", "expert_model_parallel_size"),
    ("sharding_parallel_degree", "sharding_parallel_size"),
    ("dev_dataset_path", "eval_dataset_path"),
    ("max_evaluate_steps", "eval_iters"),
    ("lr_scheduler_type", "lr_scheduler"),
    # Megatron
    ("per_device_train_batch_size", "micro_batch_size"),
    ("input_dir", "data_path"),
    ("max_seq_length max_length max_seq_len", "seq_length"),
    # transformers: TrainingArguments, and the arguments of its example scripts
    ("evaluation_strategy", "eval_strategy"),
    ("recompute", "gradient_checkpointing activation_checkpointing"),
    ("ignore_save_lr_and_optim", "save_only_model"),
    ("per_device_train_batch_size", "per_gpu_train_batch_size"),
    ("per_device_eval_batch_size", "per_gpu_eval_batch_size"),
    ("dataset_name_or_path train_dataset_path", "train_file train_files"),
    ("dev_dataset_path", "validation_file validation_files dev_file eval_file"),
    ("tokenizer_name_or_path", "tokenizer_name"),
    ("total_max_length max_length max_seq_length", "model_max_length"),
    ("src_length max_prompt_len", "max_source_length"),
    ("max_new_tokens", "generation_max_length"),
    # TRL: SFTConfig, DPOConfig, ModelConfig, ScriptArguments
    ("zero_padding", "packing"),
    ("max_prompt_len src_length", "max_prompt_length"),
    ("total_max_length max_length max_seq_length max_seq_len", "max_seq_length"),
    ("max_seq_length", "max_length"),
    ("lora", "use_peft"),
    ("lora_rank", "lora_r"),
    ("chat_template", "chat_template_path"),
    # vLLM
    ("speculate_max_draft_token_num", "num_speculative_tokens"),
    ("speculate_max_ngram_size", "prompt_lookup_max ngram_prompt_lookup_max"),
    ("draft_model_name_or_path", "draft_model speculative_model"),
    ("dataset_name_or_path train_dataset_path+dev_dataset_path", "dataset_name"),
    ("sft_loss_ratio", "rpo_alpha"),
    # LLaMA-Factory
    ("zero_padding", "neat_packing"),
    ("rslora", "use_rslora"),
    ("dora", "use_dora"),
    ("pissa", "pissa_init"),
    ("lora", "use_lora"),
    ("lora_target_modules", "lora_target target_modules"),
    ("lora_plus_scale", "loraplus_lr_ratio"),
    ("lora_path", "adapter_name_or_path"),
    ("beta", "pref_beta"),
    ("loss_type", "pref_loss"),
    ("sft_loss_ratio", "pref_ftx"),
    ("total_max_length max_length max_seq_length", "cutoff_len"),
    ("dataset_name_or_path train_dataset_path+dev_dataset_path", "dataset"),
    ("dev_dataset_path", "eval_dataset"),
    ("eval_with_do_generation", "predict_with_generate"),
    ("early_stopping_patience", "early_stopping_steps"),
    ("output_dir", "export_dir output_path"),
    ("max_samples", "max_train_samples"),
    ("val_size", "eval_split_ratio split_ratio test_split_size"),
    # vLLM
    ("total_max_length", "max_model_len"),
    ("batch_size", "max_num_seqs"),
    ("tensor_parallel_degree", "tensor_parallel_size"),
    ("lora_path", "lora_modules"),
    # each other: a key of one script in another, where it means the same
    ("train_dataset_path+dev_dataset_path", "dataset_name_or_path"),
    ("dataset_name_or_path", "train_dataset_path"),
    ("max_prompt_len", "src_length max_src_len"),
    ("src_length", "max_prompt_len"),
    ("max_new_tokens max_length", "max_new_tokens max_dec_len"),
    # what several tools call them
    ("per_device_train_batch_size", "per_device_batch_size"),
    ("num_train_epochs", "num_epochs epochs"),
    ("learning_rate", "lr"),
    ("warmup_ratio", "lr_warmup_ratio"),
    ("model_name_or_path", "model_name model_path model base_model"),
    ("tokenizer_name_or_path", "tokenizer tokenizer_path"),
    ("bf16", "pure_bf16"),
])  # fmt: skip


# Keys whose values stand for keys of ours: {name: {value in lower case: {key: value}, or the reason of a refusal}}; "*"
# is the key that any other value goes to.
_TUNING = {
    "lora": {"lora": True},
    "full": {"lora": False},
    "freeze": "all layers are trained, or LoRA; set finetuning_type: lora or full",
    "oft": "OFT is not supported; set finetuning_type: lora or full",
}
_DTYPES = {
    # What a model is loaded in; trained weights are float32 here, so that only products can be narrower.
    **dict.fromkeys(("auto", "float32", "fp32"), {}),
    **dict.fromkeys(("bfloat16", "bf16"), {"bf16": True}),
    **dict.fromkeys(("float16", "fp16", "half"), {"fp16": True}),
}
CHOICES = {
    "finetuning_type": _TUNING,  # LLaMA-Factory
    "fine_tuning": _TUNING,  # PaddleFormers
    **dict.fromkeys(("torch_dtype", "dtype", "infer_dtype", "compute_type"), _DTYPES),
    **dict.fromkeys(("no_cuda", "use_cpu"), {"true": {"device": "cpu"}, "false": {}}),  # transformers
    "disable_gradient_checkpointing": {"true": {"recompute": False}, "false": {}},  # LLaMA-Factory
    "mask_history": {"true": {"train_on": "last"}, "false": {}},  # LLaMA-Factory
    "stage": {"kto": {"loss_type": "kto"}, "*": "stage"},  # LLaMA-Factory: the others name a script, see STAGES
    "init_lora_weights": {"true": {}, "pissa": {"pissa": True}},  # peft
    "template": {  # LLaMA-Factory: names that mean something else than chat_template's
        "qwen": {"chat_template": "qwen2.5"},
        "qwen3_nothink": {"chat_template": "chatml"},
        "glm4": {"chat_template": "glm-4"},
        "llama2": "set chat_template to llama2 (Meta's ids) or llama2-hf; without it the model's own template is used",
        **dict.fromkeys(("default", "empty"), "set chat_template: plain, or leave it out for the model's own template"),
        "*": "chat_template",
    },
}


# Keys that hold further keys: {name: {inner name: key of ours}}; other inner names are read as keys themselves.
NESTED = {
    "lr_scheduler_kwargs": {"min_lr": "min_learning_rate"},
    "gradient_checkpointing_kwargs": {},
    "activation_checkpointing_kwargs": {},
    "model_init_kwargs": {},
}


# Switches that stand for several of our keys when they are true.
SHORTHANDS = {"rslora_plus": {"rslora": True, "lora_plus_scale": 4.0, "lora_alpha": 4.0}}


# {value of stage in LLaMA-Factory and PaddleFormers: the script that does it}
STAGES = {"pt": "pretrain", "sft": "finetune", "rm": "reward", "dpo": "dpo", "kto": "dpo", "ppo": "rl"}


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
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order data_impl skip_warmup data_cache lazy
        lazy_data_processing dataset_num_proc dataset_batch_size preprocessing_num_workers preprocessing_batch_size
        overwrite_cache buffer_size dataset_type remove_unused_columns label_names"""),
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
    ("padding is masked, whatever token it is", "pad_token_id pad_token ignore_pad_token_for_loss"),
    ("experts have no capacity limit", "expert_max_capacity expert_min_capacity"),
    ("it belongs to an adapter that is not supported", """
        vera_rank lokr_dim layers position intervention_type rank act_fn add_bias dropout"""),
    ("it belongs to weight_quantize_algo of finetune.py", """
        qlora_weight_blocksize qlora_weight_double_quant qlora_weight_double_quant_block_size"""),
    ("it belongs to use_long_sequence_strategies or use_ssa, which are not supported", """
        strategy_type strategy_name ssa_group_size_ratio"""),
    ("a key of pretrain.py", "mask_across_documents"),
    ("pretrain.py and dpo.py always fill rows", "zero_padding"),
    ("a key of finetune.py", """
        greedy_zero_padding pad_to_max_length pad_to_multiple_of chat_template eval_with_do_generation
        save_generation_output top_k top_p lora_rank lora_alpha rslora lora_plus_scale dora lora_target_modules
        num_prefix_tokens prefix_projection prefix_projection_hidden_size"""),
    ("only finetune.py uses LoRA dropout; with it dpo.py's policy would not start equal to its reference",
     "lora_dropout"),
    ("a key of dpo.py", """
        beta simpo_gamma pref_loss_ratio sft_loss_ratio dpop_lambda reference_free rslora_plus discopop_tau
        ref_model_mixup_alpha ref_model_sync_steps"""),
    ("the reference's log-probabilities are computed once, without dropout, where that is possible", """
        precompute_ref_log_probs precompute_ref_batch_size disable_dropout"""),
    ("it belongs to process rewards, or it is a key of reward.py", """
        placeholder_token reward_tokens normalize_score_during_training normalizer_type normalizer_momentum
        regularization"""),
    ("it belongs to embedding models", """
        group_size query_template passage_template return_position_ids"""),
    ("a key of quantize.py", """
        quant_type skip_list_names weight_quant_method act_quant_method search_alpha_min search_alpha_max
        search_scale_min search_scale_max ptq_step shift shift_all_linears shift_step smooth smooth_all_linears
        smooth_step smooth_piecewise_search smooth_k_piece smooth_search_piece gptq_step awq_step auto_clip
        autoclip_step"""),
    ("all calibration samples have the same weight", "shift_sampler smooth_sampler"),
    ("a key of quantize.py, where weights and inputs in fp8 are e4m3", "fp8_type cachekv_quant_method"),
    ("quantize.py always writes its report", "do_quant_debug test_sample"),
    ("serve.py always uses continuous batching over a pool of blocks", """
        inference_model block_attn append_attn dynamic_insert avx_model avx_type avx_cachekv_type output_via_mq
        total_request_num use_fake_parameter export_precache model_prefix model_type return_full_hidden_states
        mla_use_matrix_absorption"""),
    ("a drafted token is kept only where the model would have chosen it", """
        speculate_verify_window speculate_max_candidate_len"""),
    ("the draft model's folder defines it", "draft_model_quant_type"),
    ("a key of serve.py", "speculate_max_draft_token_num speculate_max_ngram_size"),
    ("the folder's own quantization_config defines it", "weightonly_group_size weight_block_size moe_quant_type"),
    ("a key of serve.py", """
        decode_strategy block_size output_file port host base_port flask_port title sub_title api_key"""),
    ("one kernel or another computes the same; `kernels` chooses", """
        attn_implementation _attn_implementation attn_impl flash_attn tf32 torch_compile torch_compile_backend
        torch_compile_mode use_liger_kernel enable_liger_kernel liger_kernel_config use_unsloth use_unsloth_gc
        use_v1_kernels use_ipex jit_mode_eval torch_empty_cache_steps use_cache use_kv_cache low_cpu_mem_usage
        use_fast_tokenizer fuse_linear fuse_rope rope_3d fuse_rms_norm fuse_swiglu fuse_softmax_mask
        fuse_gate_detach_matmul use_mem_eff_attn use_flash_attn_with_mask use_attn_mask_startend_row_indices
        use_sparse_flash_attn use_sparse_head_and_loss_fn loss_subbatch_seqlen use_recompute_loss_fn use_recompute_moe
        infer_backend offload_folder use_huggingface_model"""),
    ("Paddle's launcher and this code's collectives decide it", """
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend accelerator_config
        parallelism_config overlap_p2p_comm batch_p2p_comm moe_token_dispatcher_type moe_group
        use_sp_callback server_tp_degree pp_seg_method add_tail_layers eval_use_gather_object"""),
    ("recompute recomputes whole blocks, or what recompute_granularity says", """
        use_reentrant use_reentrant_gc preserve_rng_state recompute_method recompute_num_layers
        activation_offloading"""),
    ("nothing is downloaded or uploaded", """
        hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision hf_hub_token ms_hub_token
        om_hub_token cache_dir download_hub project trackio_space_id trackio_bucket_id trackio_static_space_id"""),
    ("no code of a model's folder is run", "trust_remote_code"),
    ("checkpoints are safetensors, complete, and continue bit for bit", """
        save_safetensors save_checkpoint_format load_checkpoint_format restore_callback_states_from_checkpoint
        enable_jit_checkpoint full_determinism disable_ckpt_quant"""),
    ("metrics.jsonl, eval_metrics.jsonl and the console have it", """
        log_level log_level_replica include_num_input_tokens_seen include_tokens_per_second
        include_effective_tokens_per_second include_for_metrics batch_eval_metrics eval_do_concat_batches
        compute_accuracy plot_loss print_param_status debug
        sft_benchmark dpo_benchmark max_estimate_samples"""),
    ("a loss that is not finite stops the run", "logging_nan_inf_filter"),
    ("padded batches have samples of similar length", "group_by_length length_column_name"),
    ("greedy_zero_padding: true packs by best fit", """
        packing_strategy greedy_intokens in_tokens_batching padding_free truncate_packing"""),
    ("top_k: 1 is greedy, more samples", "do_sample"),
    ("replies are shown without special tokens", "skip_special_tokens"),
    ("a reply is learned with its end", "mask_out_eos_token"),
    ("models read text only", "freeze_vision_tower freeze_multi_modal_projector freeze_language_model"),
    ("the chat template writes whole conversations", "encode_one_turn template_backend"),
    ("training data is always shuffled, by seed and epoch", "shuffle_dataset random_shuffle"),
    ("what is too long loses early rounds first, then the beginning of its prompt", "truncation_mode"),
    ("records are told apart by their keys", "train_dataset_type eval_dataset_type"),
    ("it belongs to a key that is refused when it asks for something", """
        pissa_iter loraplus_lr_embedding galore_target galore_rank galore_update_interval galore_scale galore_proj_type
        galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type
        apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode
        badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose freeze_trainable_layers
        freeze_trainable_modules freeze_extra_modules oft_rank oft_block_size oft_target module_dropout
        bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage quantization_method quantization_type
        double_quantization quantization_device_map f_alpha_divergence_coef swanlab_project
        swanlab_workspace swanlab_run_name swanlab_mode swanlab_logdir swanlab_api_key
        swanlab_lark_webhook_url swanlab_lark_secret fsdp_config fp8_backend fp8_enable_fsdp_float8_all_gather
        kto_chosen_weight kto_rejected_weight ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards
        reward_model_quantization_bit reward_model_type use_cls num_comparisons export_device export_legacy_format
        export_hub_model_id"""),
    ("a key of rl.py", """
        global_gen_batch_size global_mini_batch_size per_device_rollout_batch_size
        per_device_logprob_batch_size per_device_reward_batch_size per_device_value_batch_size
        per_device_prompt_batch_size kl_coeff kl_loss_coeff pg_loss_coeff entropy_coeff clip_range_ratio
        clip_range_ratio_low clip_range_ratio_high clip_range_score enable_overlong_reward_buffer overlong_reward_buffer
        overlong_penalty_factor clip_range_value update_iters critic_learning_rate critic_weight_decay
        critic_lr_scheduler_type critic_warmup_ratio critic_recompute critic_recompute_granularity
        critic_min_learning_rate critic_decay_steps normalize_reward normalize_advantage temperature rollout_n
        repetition_penalty rollout_quant_type dynamic_sampling max_gen_batches eval_mode offload_level
        early_stopping use_tgt_len_value
        use_rm_server use_fp32_compute rollout_tensor_parallel_degree balance_batch use_remove_padding
        rollout_max_num_seqs reward_server actor_tokenizer_alpha reward_tokenizer_alpha reward_critic_tokenizer_alpha
        num_return_sequences use_ema ema_beta ptx_coeff"""),
])  # fmt: skip


# An error when they ask for something; ignored when they do not (false, 0, null, "" or a value of HARMLESS).
REFUSED = _table([
    ("this adapter is not supported; use lora (with rslora, lora_plus_scale, pissa or dora) or prefix_tuning", """
        vera lokr lokr_path reft use_mora lora_use_mixer"""),
    ("only LoRA trains on quantized weights (QLoRA): finetune.py, dpo.py and rl.py have it", "weight_quantize_algo"),
    ("QLoRA: give weight_quantize_algo: nf4 or weight_only_int8", "load_in_4bit load_in_8bit quantization_bit"),
    ("rope_scaling in the model's config.json scales positions", """
        use_long_sequence_strategies rope_scaling_factor use_pose_convert"""),
    ("shifted sparse attention (LongLoRA) is not supported; attention is exact and its memory linear", "use_ssa"),
    ("use pretrain.py to train on plain text", "autoregressive"),
    ("training is always eager; export.py makes a static graph", "enable_auto_parallel to_static"),
    ("use export.py to export", "do_export"),
    ("data comes from local files: give their folder as dataset_name_or_path", "task_name"),
    ("models are read from and written to local folders only", "from_aistudio save_to_aistudio"),
    ("the only optimizer is adamw", """
        optim optim_args optim_target_modules use_galore use_apollo use_badam use_adam_mini use_muon adafactor"""),
    ("the loss is the mean cross-entropy over target tokens; it has no label smoothing", """
        label_smoothing_factor label_smoothing"""),
    ("the loss is the mean cross-entropy over target tokens; dpo.py has others", "loss_type use_dft_loss"),
    ("the loss is a mean over all target tokens of a step, whichever rank has them",
     "average_tokens_across_devices"),
    ("the loss is the mean cross-entropy over target tokens; dpo.py has others", "loss_weights ld_alpha"),
    ("this variant of DPO is not supported", "f_divergence_type use_weighting pref_bco_weight offset_alpha"),
    ("the reference is the model before training", """
        ref_model ref_model_name_or_path ref_model_adapters ref_model_quantization_bit"""),
    ("only dpo.py has a reference that follows the policy", "sync_ref_model ref_model_update_steps"),
    ("the loss never sums routing terms of another weight; the model's config.json has router_aux_loss_coef",
     "router_aux_loss_coef moe_aux_loss_coef"),
    ("training reads its rows at once: set per_device_train_batch_size and gradient_accumulation_steps; a step has "
     "their product x the data-parallel processes", "batch_size global_batch_size train_batch_size"),
    ("set per_device_train_batch_size; memory is known before: --dry_run true", "auto_find_batch_size"),
    ("the data-parallel degree is the number of processes divided by the other degrees",
     "data_parallel_degree data_parallel_size"),
    ("sharding: stage1, stage2 or stage3 shards moments, gradients and weights as ZeRO does", "deepspeed fsdp"),
    ("seed is the seed of the data too", "data_seed"),
    ("only replies are learned", """
        train_on_prompt train_on_inputs assistant_only_loss completion_only_loss"""),
    ('columns names the keys of a record: {"text": "…"}', "dataset_text_field prompt_key response_key"),
    ("give the files themselves; dataset_info.json and hubs are not read", "dataset_dir dataset_config"),
    ("a folder has train.json, dev.json and test.json; or give dev_dataset_path", """
        dataset_train_split dataset_test_split"""),
    ("data is read from files as it is", """
        dataset_kwargs dataset_streaming streaming tokenized_path datasets train_dataset_prob eval_dataset_prob
        interleave_probs mix_strategy media_dir"""),
    ("a prompt and a reply share one limit; set it as max_length or max_seq_len", """
        max_target_length max_completion_length"""),
    ("replies have no least length here", "min_dec_len min_length"),
    ("replies are greedy, or sampled by top_k, top_p and temperature", "num_beams eval_num_beams"),
    ("put test.json into the folder dataset_name_or_path", "test_file test_dataset_path"),
    ("the model's own files define it: tokenizer_config.json, generation_config.json, config.json", """
        eos_token eos_token_id bos_token_id config_name config_overrides rope_scaling split_special_tokens"""),
    ("a model is a folder on this disk; put that revision there", "model_revision"),
    ("only the weights of LoRA itself are trained beside the frozen model", """
        lora_modules_to_save modules_to_save additional_target lora_target_parameters lora_bias"""),
    ("lora_path continues from an adapter; merge it with export.py to put another on top", "create_new_adapter"),
    ("the adapter is saved as PiSSA; export.py merges it", "pissa_convert"),
    ("this task is not supported: models continue text", "lora_task_type"),
    ("give one folder as adapter_name_or_path", "adapter_folder"),
    ("the new rows start as the mean of the others, as transformers does",
     "new_special_tokens_config init_special_tokens"),
    ("put the system text into the records", "default_system"),
    ("the chat template and the records decide about thinking", "enable_thinking"),
    ("chat_template: none trains on plain text", "use_template"),
    ("a conversation is one sample; all its replies are learned", "split_multi_turn"),
    ("dev data is evaluated as a whole", "eval_on_each_dataset"),
    ("the learning rate is the same in all layers", "layerwise_lr_decay_bound"),
    ("max_samples limits the records", "num_samples_each_epoch"),
    ("give it as dataset_name_or_path", "offline_dataset_path"),
    ("use quantize.py to quantize", "export_quantization_bit export_quantization_dataset"),
    ("not supported", """
        reward_model reward_model_adapters length_penalty normalize_logps ignore_eos_token use_fp8
        num_nextn_predict_layers moe_router_bias_update_rate
        use_llama_pro use_mca shift_attn mixture_of_depths upcast_layernorm upcast_lmhead_output use_swanlab fp8
        ignore_bias_buffers tool_format"""),
    ("pretrain.py trains from random weights", "train_from_scratch"),
    ("evaluations are due after steps, as evaluation_strategy and eval_steps say", "eval_on_start eval_delay"),
    ("results are written to output_dir only", "push_to_hub"),
    ("embedding models are not supported", "max_query_len max_passage_len"),
    ("max_shard_size says it with a unit: 5GB", "export_size"),
    ("training data is always shuffled, by seed and epoch", """
        dataloader_shuffle train_sampling_strategy disable_shuffling"""),
    ("the log is written by steps; set logging_steps", "logging_strategy"),
    ("no data is skipped; remove the records from the data", "skip_data_intervals"),
    ("use finetune.py for fine-tuning", "lora prefix_tuning neftune"),
    ("only finetune.py trains PiSSA: it changes the base weights, which dpo.py needs as its reference", "pissa"),
    ("use quantize.py to quantize", "do_ptq do_gptq do_awq do_qat load_quant_model"),
    ("this script does not read it; --help lists its own keys", """
        dataset_name_or_path train_dataset_path dev_dataset_path input_dir split data_file train_datasets eval_datasets
        ptx_datasets src_length max_length max_seq_length max_seq_len max_prompt_len total_max_length max_new_tokens
        max_samples val_size columns train_on lora_path prefix_path num_hidden_layers"""),
    ("pretrain.py trains from random weights; this script continues", "continue_training"),
    ("only finetune.py adds noise to embeddings", "neftune_noise_alpha"),
    ("reward.py learns process rewards", "process_reward"),
    ("only serve.py decodes speculatively", "speculate_method draft_model_name_or_path"),
    ("only serve.py has a key/value cache", "cachekv_int8_type"),
    ("dpo.py learns by KTO: loss_type: kto", "desirable_weight undesirable_weight"),
    ("use rl.py for reinforcement learning", """
        rl_algorithm actor_model_name_or_path reward_model_name_or_path critic_model_name_or_path
        reward_critic_model_name_or_path"""),
])  # fmt: skip


# {key of REFUSED: values that ask for what happens anyway, in lower case}
HARMLESS = {
    "optim": ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"),
    "dataloader_shuffle": ("true", "1"),
    "train_sampling_strategy": ("random", "group_by_length"),
    "logging_strategy": ("steps",),
    "rope_scaling_factor": ("1", "1.0"),
    "response_key": ("tgt",),
    "length_penalty": ("1", "1.0", "none"),
    "layerwise_lr_decay_bound": ("1", "1.0", "none"),
    "init_special_tokens": ("noise_init", "none"),
    "enable_thinking": ("true", "none"),
    "use_template": ("true", "1"),
    "ref_model_update_steps": ("-1", "0"),
    "loss_type": ("nll",),
    "average_tokens_across_devices": ("true",),
    "f_divergence_type": ("reverse_kl", "none"),
    "data_parallel_degree": ("-1", "none"),
    "data_parallel_size": ("-1", "none"),
    "assistant_only_loss": ("true", "none"),
    "completion_only_loss": ("true", "none"),
    "dataset_text_field": ("text", "none"),
    "dataset_train_split": ("train", "none"),
    "dataset_test_split": ("dev", "none"),
    "mix_strategy": ("concat", "none"),
    "train_dataset_prob": ("1", "1.0", "none"),
    "eval_dataset_prob": ("1", "1.0", "none"),
    "min_dec_len": ("0", "1", "none"),
    "min_length": ("0", "1", "none"),
    "num_beams": ("1", "none"),
    "eval_num_beams": ("1", "none"),
    "model_revision": ("main", "none"),
    "lora_task_type": ("causal_lm", "none"),
    "continue_training": ("true", "1"),
}


# Refused in one script: keys of data, models and limits that others have, or that mean something else there.
_RECORDS = "dataset_name_or_path train_dataset_path dev_dataset_path"
_LISTS = "data_file train_datasets eval_datasets ptx_datasets"
REFUSED_IN = {
    "pretrain": _table([
        ("pretrain.py reads token files: make them with `python data.py corpus`, give them as input_dir",
         f"{_RECORDS} {_LISTS}"),
        ("a sample has max_seq_length tokens", "src_length max_prompt_len total_max_length max_new_tokens block_size"),
        ("`split` holds documents out", "val_size"),
        ("max_steps limits what is read", "max_samples"),
        ("use finetune.py for adapters", "lora_path prefix_path")]),
    "finetune": _table([
        ("finetune.py reads records: give them as dataset_name_or_path", f"input_dir {_LISTS}"),
        ("a folder has train.json, dev.json and test.json; or give dev_dataset_path", "split"),
        ("src_length limits a prompt, max_length prompt and reply", "total_max_length block_size"),
        ("set lora_rank", "rank"),
        ("set lora_dropout", "dropout"),
        ("the model's config.json defines it", "num_hidden_layers")]),
    "dpo": _table([
        ("dpo.py reads pairs: give them as train_dataset_path and dev_dataset_path", f"input_dir split {_LISTS}"),
        ("it limits a prompt with one reply; max_seq_len limits a row, so a prompt with both replies: twice the number "
         "holds every such pair", "max_length total_max_length block_size"),
        ("set lora_rank", "rank"),
        ("the model's config.json defines it", "num_hidden_layers")]),
    "quantize": _table([
        ("give records or a corpus as dataset_name_or_path", f"input_dir dev_dataset_path {_LISTS}"),
        ("src_length limits a prompt, max_length a row", "total_max_length"),
        ("a prefix is trained with the model that it is for; quantize that model first", "prefix_path")]),
    "export": _table([("export.py reads no data", f"input_dir split {_RECORDS} {_LISTS}")]),
    "serve": _table([
        ("serve.py reads prompts: give prompt or data_file, or ask over HTTP",
         f"input_dir split {_RECORDS} train_datasets eval_datasets ptx_datasets")]),
}  # fmt: skip


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
