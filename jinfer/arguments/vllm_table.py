"""Every engine argument of vLLM 0.33, and what jinfer does with it.

The page `docs/from_vllm.md` is generated from this table.
"""

from jinfer.arguments.vllm_rows import Rows, any_value, means, only, same, table

VLLM_VERSION = "0.33"

_NO_SERVER = "jinfer has no server."
_NO_LORA = "LoRA adapters are not supported yet."
_NO_SPECULATION = "There is no speculative decoding yet."
_NO_MEDIA = "Prompts are text and token ids; images, audio and video are refused in a prompt."
_NO_OFFLOAD = "Weights stay on the device."
_NO_EXPERTS = "Mixtures of experts are not supported yet."
_NO_POOLING = "jinfer generates text; it has no pooling models."
_NO_MAMBA = "State-space layers are not supported yet."
_NO_GUIDE = "Guided generation is not supported yet."
_NO_QUANTIZED = (
    "Quantized weights are not supported yet; kv_cache_dtype='int8' halves the KV cache."
)
_NO_CODE = "No code of a checkpoint is ever run."
_NO_CONTEXT_PARALLEL = "Only whole layers are sharded; use tensor_parallel_size."
_ONE_PROCESS = "One process runs all chips of a host; for several hosts see README."
_CUDA = "This tunes vLLM's CUDA programs; XLA compiles the programs of jinfer."
_SCHEDULER = "This tunes vLLM's scheduler; jinfer's paces steps by ttft_target_ms, tpot_target_ms."
_TRACES = "For a trace use jax.profiler, or `jinfer generate --profile FOLDER`."
_METRICS = "LLM.metrics() and LLM.prometheus() are always on."
_LOGS = "Logs go through logging.getLogger('jinfer')."

_SAME: Rows = table(
    same("model", "Qwen/Qwen3-0.6B", "default: fable, a small model in the package"),
    same("tokenizer", None),
    same("skip_tokenizer_init", False),
    same("download_dir", None),
    same("load_format", "auto", "auto, safetensors or dummy; pickles are never read"),
    same("hf_overrides", {}, "a dict, no function; keys that jinfer does not read are refused"),
    same("dtype", "auto", "auto is float32 on CPUs and bfloat16 elsewhere, not the checkpoint's"),
    same("kv_cache_dtype", "auto", "auto, int8, fp8 or fp8_e4m3; scales are computed per token"),
    same("seed", 0, "each unseeded request gets its own key from it"),
    same(
        "max_model_len",
        None,
        "None takes as much of the trained context as fits; vLLM fails if not all of it fits",
    ),
    same("tensor_parallel_size", 1, "processes need not be started: one runs all chips of a host"),
    same("data_parallel_size", 1, "replicas in one process; works offline too"),
    same("enable_prefix_caching", None, "on by default"),
    same(
        "gpu_memory_utilization",
        0.92,
        "default 0.9: a share of the memory that is free at start-up, on any kind of device; in "
        "vLLM a share of the GPU's whole memory",
    ),
    same("kv_cache_memory_bytes", None),
    same("max_num_batched_tokens", None),
    same("max_num_seqs", None, "default: 32 on CPUs, 128 on TPUs, 256 on GPUs"),
    same("long_prefill_token_threshold", 0, "0 and None: no limit"),
    same("max_logprobs", 20, "at most 100"),
    same("revision", None),
    same("hf_token", None),
    same("tokenizer_revision", None),
    same(
        "enforce_eager",
        False,
        "True compiles with less effort; None, the default, decides by the model's size",
    ),
    same("disable_log_stats", False, "the line about the load; LLM.metrics() is always on"),
    same("generation_config", "auto"),
    same("override_generation_config", {}, "unknown keys are refused"),
    same("kv_offloading_size", None),
)

_RENAMED: Rows = table(
    means("block_size", "page_size", None),
    means("num_gpu_blocks_override", "num_pages", None),
    means("jit_monitor_mode", "late_compile", "warn"),
    means("use_tqdm_on_load", "progress", True, "also for generate's bars and the start-up lines"),
)

_ANY: Rows = table(
    any_value(_NO_CODE, trust_remote_code=False, code_revision=None),
    any_value(
        "Metrics come with every output, and LLM.metrics() is always on.",
        aggregate_engine_logging=False,
    ),
    any_value(
        _NO_MEDIA,
        language_model_only=False,
        limit_mm_per_prompt={},
        media_io_kwargs={},
        mm_processor_kwargs=None,
        mm_processor_cache_gb=4,
        mm_processor_cache_type="lru",
        mm_hasher_algorithm="blake3",
        mm_shm_cache_max_object_size_mb=128,
        mm_processor_device="auto",
        mm_ipc_gpu_memory_gb=0,
        skip_mm_profiling=False,
        disable_chunked_mm_input=False,
        renderer_num_workers=1,
    ),
    any_value("Sums over chips are XLA's.", disable_custom_all_reduce=False),
    any_value(
        "The supported models have one kind of attention, without windows.",
        disable_sliding_window=False,
        disable_cascade_attn=None,
        disable_hybrid_kv_cache_manager=None,
        swa_bounded_replay=True,
    ),
    any_value(
        "It only matters with enable_lora=True, which is refused.",
        max_loras=1,
        max_lora_rank=16,
        max_cpu_loras=None,
        fully_sharded_loras=False,
        lora_dtype="auto",
    ),
    any_value(
        "It only matters with quantization, which is refused.", allow_deprecated_quantization=False
    ),
)

_MODEL: Rows = table(
    only("jinfer generates text.", "generate", runner="auto"),
    only(_NO_POOLING, "none", convert="auto", pooler_config=None),
    only("The folder's files decide.", "hf", tokenizer_mode="auto", config_format="auto"),
    only("The folder's config.json is read.", hf_config_path=None),
    only("A folder or a hub name is read.", model_weights=""),
    only(_NO_SERVER + " Outputs and metrics carry the model's name.", served_model_name=None),
    only("Prompts are text and token ids.", enable_prompt_embeds=False),
    only(_NO_MEDIA, allowed_local_media_path="", allowed_media_domains=None),
    only("Files are mapped into memory.", "lazy", safetensors_load_strategy=None),
    only(
        "Files are mapped into memory.",
        safetensors_prefetch_num_threads=8,
        safetensors_prefetch_block_size=16 * 2**20,
        max_parallel_loading_workers=None,
        model_loader_extra_config={},
        pt_load_map_location="cpu",
    ),
    only(
        "Only safetensors of the top folder are read.",
        "original/**/*",
        [],
        ignore_patterns=["original/**/*"],
    ),
    only("jinfer has its own implementation of each model.", "vllm", model_impl="auto"),
    only("jinfer has its own implementation of each model.", model_class_overrides={}),
    only(_NO_QUANTIZED, quantization=None, quantization_config=None),
    only("Every layer has the same kv_cache_dtype.", [], kv_cache_dtype_skip_layers=[]),
    only(
        _NO_MEDIA,
        enable_mm_embeds=False,
        interleave_mm_strings=False,
        mm_encoder_only=False,
        mm_encoder_tp_mode="weights",
        mm_encoder_attn_backend=None,
        mm_encoder_attn_dtype=None,
        mm_encoder_fp8_scale_path=None,
        mm_encoder_fp8_scale_save_path=None,
        mm_encoder_fp8_scale_save_margin=1.5,
        video_pruning_rate=None,
        video_pruning_method="evs",
        mm_tensor_ipc="direct_rpc",
        mm_device_do_normalize=True,
        enable_mm_processor_stats=False,
        io_processor_plugin=None,
        ec_transfer_config=None,
        ec_manager_config={},
    ),
    only(
        _NO_LORA,
        enable_lora=False,
        default_mm_loras=None,
        lora_target_modules=None,
        enable_tower_connector_lora=False,
        specialize_active_lora=False,
        enable_mixed_moe_lora_format=False,
        enable_moe_shared_loras=False,
        max_lora_cls_labels=None,
    ),
    only(
        _NO_MAMBA,
        mamba_config={},
        mamba_cache_dtype="auto",
        mamba_ssm_cache_dtype="auto",
        mamba_block_size=None,
        mamba_cache_mode=None,
        enable_mamba_shared_prefix_checkpoint=False,
        replayssm_buffer_len=16,
        use_replayssm=False,
        mamba_backend="triton",
        mamba_ssu_algorithm=None,
        enable_mamba_cache_stochastic_rounding=False,
        mamba_cache_philox_rounds=0,
        gdn_prefill_backend=None,
        kda_prefill_backend=None,
        kda_decode_backend=None,
        engram_config=None,
    ),
)

_PARALLEL: Rows = table(
    only("Use tensor_parallel_size.", pipeline_parallel_size=1),
    only(_ONE_PROCESS, "uni", "mp", distributed_executor_backend=None),
    only(_ONE_PROCESS, data_parallel_backend="mp"),
    only(
        _ONE_PROCESS,
        master_addr="127.0.0.1",
        master_port=29501,
        nnodes=1,
        node_rank=0,
        distributed_timeout_seconds=None,
        cpu_distributed_timeout_seconds=None,
        data_parallel_rank=None,
        data_parallel_start_rank=None,
        data_parallel_size_local=None,
        data_parallel_address=None,
        data_parallel_rpc_port=None,
        data_parallel_hybrid_lb=False,
        data_parallel_external_lb=False,
        data_parallel_multi_port_external_lb=False,
        dp_sync_interval=16,
        disable_nccl_for_dp_synchronization=None,
        ray_workers_use_nsight=False,
        worker_cls="auto",
        worker_extension_cls="",
        enable_shm_tensor_arena=False,
    ),
    only(
        "Restrict JAX to devices with its own variables, such as CUDA_VISIBLE_DEVICES.",
        device_ids=None,
    ),
    only(
        "Start the process with numactl.",
        numa_bind=False,
        numa_bind_nodes=None,
        numa_bind_cpus=None,
    ),
    only(
        _NO_CONTEXT_PARALLEL,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        dcp_comm_backend=None,
        dcp_q_replicate=None,
        dcp_kv_cache_interleave_size=1,
        cp_kv_cache_interleave_size=None,
        enable_hc_sp=False,
    ),
    only(
        _NO_EXPERTS,
        enable_expert_parallel=False,
        enable_ep_weight_filter=False,
        moe_backend="auto",
        all2all_backend="allgather_reducescatter",
        enable_elastic_ep=False,
        elastic_ep_max_dp_size=None,
        eplb_config={},
        enable_eplb=False,
        expert_placement_strategy="linear",
        enable_return_routed_experts=False,
    ),
    only(
        "A step runs as one batch.",
        enable_dbo=False,
        ubatch_size=0,
        dbo_decode_token_threshold=32,
        dbo_prefill_token_threshold=512,
    ),
    only("Each chip samples from its shard of the logits.", enable_batch_sharded_sampling=None),
    only(
        "A failed engine ends its requests with an error; make a new one.",
        fault_tolerance_config={},
        enable_fault_tolerance=False,
        watchdog_config={},
    ),
    only(_NO_SERVER, _api_process_count=1, _api_process_rank=0),
)

_MEMORY: Rows = table(
    only("Hashes of prefixes are BLAKE2.", prefix_caching_hash_algo="sha256"),
    only(
        "Cached pages are kept until their room is needed.",
        prefix_cache_retention_interval=0,
        prefix_match_unit=None,
    ),
    only(
        _NO_OFFLOAD,
        offload_backend="auto",
        cpu_offload_gb=0,
        offload_group_size=0,
        offload_num_in_group=1,
        offload_prefetch_step=1,
    ),
    only(_NO_OFFLOAD, [], cpu_offload_params=set(), offload_params=set()),
    only("KV pages go to host memory with kv_offloading_size.", kv_offloading_backend="native"),
    only("No layer shares its KV cache.", kv_sharing_fast_prefill=False),
    only("One engine holds the KV cache.", kv_transfer_config=None, kv_events_config=None),
    only(
        "close() frees the device, and a new LLM starts from stored programs.",
        enable_sleep_mode=False,
        sleep_mode_backend="cumem",
        sleep_mode_offload_cudagraph=False,
        sleep_preserve_parameter_names=[],
        enable_cumem_allocator=False,
        enable_nccl_comm_suspend=False,
        weight_transfer_config=None,
    ),
)

_SCHEDULE: Rows = table(
    only("Long prompts always come in chunks.", True, enable_chunked_prefill=None),
    only(
        "The host always plans the next step while the device computes.",
        True,
        async_scheduling=None,
    ),
    only("Priorities always count; the default is 0.", "priority", scheduling_policy="fcfs"),
    only(
        _SCHEDULER,
        max_num_scheduled_tokens=None,
        long_prefill_token_threshold_adaptive=False,
        max_num_active_seqs=None,
        scheduler_reserve_full_isl=True,
        prefill_schedule_interval=1,
        watermark=0.0,
        scheduler_cls=None,
        performance_mode="balanced",
    ),
    only("The queue has no limit.", max_num_queued_reqs=None, max_num_queued_tokens=None),
    only("Streams yield whenever a request grew.", stream_interval=1),
)

_SAMPLING: Rows = table(
    only(
        "Logprobs are those of the model, before the sampling parameters.",
        logprobs_mode="raw_logprobs",
    ),
    only("Sampling is in float32.", use_fp64_gumbel=False),
    only("Transforms of logits are those of SamplingParams.", [], logits_processors=None),
    only("Outputs have no sampling masks.", return_sampling_mask=False, aux_output_config={}),
    only("Requests cannot replay tokens.", enable_trace_replay=False),
    only(
        _NO_GUIDE,
        structured_outputs_config={},
        reasoning_config=None,
        reasoning_parser="",
        reasoning_parser_plugin=None,
    ),
    only(
        _NO_SPECULATION,
        speculative_config=None,
        spec_method=None,
        spec_model=None,
        spec_tokens=None,
        per_request_spec_decode_metrics="none",
        diffusion_config=None,
    ),
    only("Outputs carry no watermark.", watermark_config=None),
)

_PROGRAMS: Rows = table(
    only(
        "XLA compiles whole programs; enforce_eager=True starts sooner.",
        compilation_config={},
        optimization_level=2,
    ),
    only("Choose with attention=.", attention_backend=None, attention_config={}),
    only(
        _CUDA,
        cudagraph_capture_sizes=None,
        max_cudagraph_capture_size=None,
        ir_op_priority={},
        linear_backend="auto",
        sparse_indexer_topk_backend="auto",
        kernel_config={},
        enable_flashinfer_autotune=None,
        monokernel=False,
        cudagraph_metrics=False,
    ),
    only("late_compile='error' names each late program.", jit_monitor_verbose=False),
    only("jinfer has no plugins.", additional_config={}, fail_on_environ_validation=False),
)

_REPORTS: Rows = table(
    only(
        _METRICS,
        show_hidden_metrics_for_version=None,
        kv_cache_metrics=False,
        kv_cache_metrics_sample=0.01,
        custom_histogram_buckets=None,
        enable_mfu_metrics=False,
    ),
    only(
        _LOGS,
        enable_log_requests=False,
        enable_logging_iteration_details=False,
        logging_config=None,
        log_level=None,
        log_config_file=None,
    ),
    only(
        _TRACES,
        otlp_traces_endpoint=None,
        collect_detailed_traces=None,
        enable_layerwise_nvtx_tracing=False,
        profiler_config={},
    ),
    only(_NO_SERVER, tokens_only=False, shutdown_timeout=0),
)

TABLE: Rows = table(
    _SAME, _RENAMED, _ANY, _MODEL, _PARALLEL, _MEMORY, _SCHEDULE, _SAMPLING, _PROGRAMS, _REPORTS
)
