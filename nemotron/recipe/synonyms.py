"""The names that other programs give to our settings, for the hint to an unknown key."""

KEYS = {
    "schedule.peak": "lr learning_rate max_lr peak_lr",
    "schedule.min": "min_lr end_lr eta_min",
    "schedule.kind": "lr_scheduler lr_scheduler_type lr_decay_style",
    "schedule.total_steps": "max_steps num_steps steps train_iters train_steps max_iters",
    "schedule.total_tokens": "max_tokens train_tokens num_tokens",
    "schedule.warmup_steps": "warmup num_warmup_steps warmup_iters lr_warmup_iters lr_warmup_steps",
    "schedule.warmup_fraction": "warmup_ratio lr_warmup_fraction warmup_share",
    "schedule.decay_steps": "cooldown_steps lr_wsd_decay_iters decay_iters lr_decay_steps",
    "schedule.decay_fraction": "decay_ratio decay_share cooldown_fraction cooldown_ratio",
    "schedule.decay": "decay_type lr_wsd_decay_style",
    "batch.global_tokens": "batch_size global_batch_size train_batch_size tokens_per_batch",
    "batch.micro_batch": "micro_batch_size per_device_train_batch_size local_batch_size",
    "data.seq_len": "seq_length sequence_length max_length max_seq_len context_length block_size",
    "data.sources": "dataset datasets train_data data_path dataset_name train_file path "
    "dataset_path data_prefix train_data_path",
    "data.tokenizer": "tokenizer_path tokenizer_name tokenizer_model vocab_file hf_assets_path",
    "data.cache": "data_cache_path cache_dir",
    "data.reset_documents": "reset_attention_mask reset_position_ids",
    "data.mask_eod_loss": "eod_mask_loss",
    "data.validation_fraction": "split val_split validation_split",
    "data.verify_checksums": "validate_hash verification_mode verify_checksum",
    "data.prefetch_steps": "num_workers dataloader_num_workers prefetch_factor",
    "model.hidden_size": "d_model n_embd dim embed_dim hidden_dim width",
    "model.hybrid_override_pattern": "n_layer n_layers num_layers depth hybrid_layer_pattern "
    "layers_block_type",
    "model.num_attention_heads": "n_head n_heads num_heads heads",
    "model.num_key_value_heads": "n_kv_heads num_kv_heads num_query_groups",
    "model.head_dim": "kv_channels attention_head_dim",
    "model.intermediate_size": "ffn_hidden_size d_ff ffn_dim",
    "model.layer_norm_epsilon": "rms_norm_eps norm_eps layernorm_epsilon",
    "model.ssm_state_size": "d_state mamba_state_dim state_size",
    "model.mamba_head_dim": "headdim",
    "model.mamba_num_heads": "nheads",
    "model.n_groups": "ngroups mamba_num_groups mamba_n_groups",
    "model.conv_kernel": "d_conv",
    "model.n_routed_experts": "num_experts num_moe_experts n_experts num_local_experts",
    "model.num_experts_per_tok": "top_k moe_top_k moe_router_topk",
    "model.moe_intermediate_size": "moe_ffn_hidden_size",
    "model.initializer_range": "init_method_std",
    "model.num_nextn_predict_layers": "mtp_num_layers",
    "model.max_position_embeddings": "n_positions n_ctx",
    "optimizer.clip": "grad_clip gradient_clipping gradient_clip_val max_grad_norm clip_grad "
    "max_norm grad_norm_clip",
    "optimizer.weight_decay": "wd",
    "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "adam_eps adam_epsilon",
    "optimizer.router_bias_update_rate": "moe_router_bias_update_rate",
    "loss.mtp_loss_factor": "mtp_loss_scaling_factor",
    "precision": "fp8 bf16 fp16 fp32 nvfp4 mxfp8 dtype torch_dtype mixed_precision amp",
    "recompute": "gradient_checkpointing activation_checkpointing recompute_granularity remat "
    "recompute_activations recompute_method recompute_modules activation_checkpoint "
    "selective_ac_option",
    "init_from": "resume_from_checkpoint load pretrained_model model_name_or_path from_pretrained "
    "finetune initial_load_path",
    "checkpoint.every_steps": "save_steps save_interval save_every checkpoint_every",
    "stop.after_minutes": "exit_duration_in_mins exit_duration max_time checkpoint_must_save_by",
    "stop.every_steps": "exit_interval",
    "checkpoint.keep": "save_total_limit keep_last keep_latest_k",
    "checkpoint.background": "async_save async_mode",
    "evaluation.every_steps": "eval_steps eval_interval eval_every val_check_interval",
    "evaluation.tokens": "eval_tokens eval_iters",
    "dpo.reference_policy_kl_penalty": "beta ref_policy_kl_penalty",
    "dpo.sft_loss_weight": "rpo_alpha",
    "logging.every_steps": "log_interval logging_steps log_every",
    "logging.trackers": "wandb tensorboard trackio report_to logger",
    "logging.project": "wandb_project",
    "name": "run_name exp_name experiment",
    "output": "output_dir out_dir save_dir checkpoint_dir dump_folder save",
    "seed": "random_seed",
    "device": "accelerator",
    "parallel.tp": "tensor_model_parallel_size tensor_parallel_size tp_size tensor_parallel_degree",
    "parallel.pp": "pipeline_model_parallel_size pipeline_parallel_size pp_size "
    "pipeline_parallel_degree",
    "parallel.cp": "context_parallel_size cp_size context_parallel_degree",
    "parallel.ep": "expert_model_parallel_size expert_parallel_size ep_size expert_parallel_degree",
    "parallel.dp_replicate": "data_parallel_replicate_degree hsdp",
    "parallel.reshard_after_forward": "fsdp_reshard_after_forward",
    "parallel.expert_dispatch": "moe_token_dispatcher_type",
    "parallel.timeout_s": "distributed_timeout_minutes nccl_timeout",
    "parallel.dp_shard": "data_parallel_size dp_size fsdp world_size dp data_parallel_shard_degree",
}
"""Our key, and the other names."""

NOTES = {
    "batch.global_tokens": "in tokens: rows times data.seq_len",
    "batch.micro_batch": "in rows",
    "model.hybrid_override_pattern": "one letter for each layer",
    "precision": "one word, such as precision: bf16",
    "logging.trackers": "a list of names",
    "parallel.timeout_s": "in seconds",
    "stop.after_minutes": "in minutes, since the start of the command",
    "stop.every_steps": "the option --stop-at stops one start after a step",
}
"""What differs besides the name."""

SENTENCES = {
    "gradient_accumulation_steps": "it follows from `batch.global_tokens` and `batch.micro_batch`",
    "epochs": "give the length as `schedule.total_steps` or `schedule.total_tokens`",
    "num_epochs": "give the length as `schedule.total_steps` or `schedule.total_tokens`",
    "num_train_epochs": "give the length as `schedule.total_steps` or `schedule.total_tokens`",
    "train_samples": "give the length as `schedule.total_steps` or `schedule.total_tokens`",
    "rampup_batch_size": "a phase may have its own batch (`phases`, `global_tokens`)",
    "exit_signal_handler": "SIGTERM, SIGUSR1 and Ctrl-C always save and stop",
    "exit_signal": "SIGTERM, SIGUSR1 and Ctrl-C always save and stop",
    "sequence_parallel": "it comes with `parallel.tp`",
    "use_distributed_optimizer": "moments are sharded with the weights (`parallel.dp_shard`)",
    "compile": "fast implementations are chosen under `ops`",
    "shuffle": "the rows of each pass are always shuffled, by `seed`",
    "dropout": "there is none in these models",
    "attention_dropout": "there is none in these models",
    "hidden_dropout": "there is none in these models",
    "swiglu": "experts and MLPs of these models use squared ReLU",
    "resume": "continue a run with the option --resume",
}
"""Names of what is not a setting here."""

_OURS = {name: key for key, names in KEYS.items() for name in names.split()}


def hint(name: str) -> str | None:
    """Return what to write in place of another program's name, if it is known."""
    plain = name.lower().replace("-", "_")
    if plain in SENTENCES:
        return SENTENCES[plain]
    key = _OURS.get(plain)
    if key is None:
        return None
    note = f" ({NOTES[key]})" if key in NOTES else ""
    return f"it is `{key}` here{note}"
