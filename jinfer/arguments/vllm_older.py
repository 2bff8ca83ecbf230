"""Engine arguments that vLLM 0.4 to 0.32 had, for scripts that still have them.

The names are those of its EngineArgs before 0.33 took them away.
"""

from jinfer.arguments.vllm_rows import Rows, any_value, means, only, table

_NO_PROMPT_ADAPTERS = "Prompt adapters are not supported."
_NO_SPECULATION = "There is no speculative decoding yet."
_ONE_PROCESS = "One process runs all chips of a host; for several hosts see README."

OLDER: Rows = table(
    means("swap_space", "kv_offloading_size", 4, "GiB of host memory in all, not per chip"),
    means("num_scheduler_steps", "max_decode_steps", 1),
    any_value(
        "It tunes CUDA graphs; XLA compiles jinfer's programs.",
        max_context_len_to_capture=None,
        max_seq_len_to_capture=8192,
        cuda_graph_sizes=[],
    ),
    any_value(
        "It chooses between two parts of an older vLLM.",
        use_v2_block_manager=True,
        multi_step_stream_outputs=True,
        disable_async_output_proc=False,
        intial_incremental_detokenization_offset=5,
    ),
    any_value("Requests are not logged.", disable_log_requests=False),
    any_value(
        "It only matters for guided generation, which is not supported yet.",
        guided_decoding_backend="auto",
        guided_decoding_disable_fallback=False,
        guided_decoding_disable_any_whitespace=False,
        guided_decoding_disable_additional_properties=False,
    ),
    any_value(
        "Prompts are text and token ids; images, audio and video are refused in a prompt.",
        disable_mm_preprocessor_cache=False,
        enable_multimodal_encoder_data_parallel=False,
    ),
    any_value(
        "It only matters with enable_lora=True, which is refused.",
        enable_lora_bias=False,
        lora_extra_vocab_size=256,
        long_lora_scaling_factors=None,
    ),
    any_value(
        "8-bit pages of the KV cache have a scale per token and head.", calculate_kv_scales=False
    ),
    any_value(
        "Tokenizing takes one thread.",
        tokenizer_pool_size=0,
        tokenizer_pool_type="ray",
        tokenizer_pool_extra_config=None,
    ),
    only("jinfer generates text.", "generate", task="auto"),
    only("Set the variable JAX_PLATFORMS to choose between cpu, cuda and tpu.", device="auto"),
    only(
        "Preempted sequences are computed again, or fetched with kv_offloading_size.",
        "recompute",
        preemption_mode=None,
    ),
    only(
        "Steps are paced by ttft_target_ms and tpot_target_ms.",
        scheduler_delay_factor=0.0,
        num_lookahead_slots=0,
        max_num_partial_prefills=1,
        max_long_partial_prefills=1,
        max_paddings=None,
    ),
    only("Pass it in hf_overrides={...}.", rope_scaling=None, rope_theta=None),
    only(_ONE_PROCESS, worker_use_ray=False, engine_use_ray=False),
    only(_NO_PROMPT_ADAPTERS, enable_prompt_adapter=False),
    any_value(
        "It only matters with enable_prompt_adapter=True, which is refused.",
        max_prompt_adapters=1,
        max_prompt_adapter_token=0,
    ),
    only("jinfer generates text; it has no pooling models.", override_pooler_config=None),
    only("jinfer runs on no Neuron devices.", override_neuron_config=None),
    only(
        "Quantized weights are not supported yet.",
        qlora_adapter_name_or_path=None,
        quantization_param_path=None,
    ),
    only("Reasoning stays in the text of an output.", enable_reasoning=False),
    only("Transforms of logits are those of SamplingParams.", logits_processor_pattern=None),
    only(
        "Experts are not supported yet.",
        num_redundant_experts=0,
        eplb_window_size=1000,
        eplb_step_interval=3000,
        eplb_log_balancedness=False,
    ),
    only(
        _NO_SPECULATION,
        speculative_model=None,
        speculative_model_quantization=None,
        speculative_draft_tensor_parallel_size=None,
        num_speculative_tokens=None,
        speculative_disable_mqa_scorer=False,
        speculative_max_model_len=None,
        speculative_disable_by_batch_size=None,
        ngram_prompt_lookup_max=None,
        ngram_prompt_lookup_min=None,
        spec_decoding_acceptance_method="rejection_sampler",
        typical_acceptance_sampler_posterior_threshold=None,
        typical_acceptance_sampler_posterior_alpha=None,
        disable_logprobs_during_spec_decoding=None,
    ),
)
