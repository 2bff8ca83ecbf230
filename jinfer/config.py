"""Three configurations: of the model (checkpoint), of the engine (user), and the engine's plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context.

    `kind` is Hugging Face's rope_type: "linear" divides every frequency by `factor`
    (Chen et al., arXiv:2306.15595); "llama3" divides only the slow ones and blends between
    (Llama 3.1's released configuration). The last three fields belong to "llama3".
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192  # tokens

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise NotImplementedError(
                f"rope scaling must be 'linear' or 'llama3'; got kind={self.kind!r}. "
                "Use a checkpoint with one of these."
            )
        if self.factor < 1.0:
            raise ValueError(f"rope scaling needs factor >= 1; got factor={self.factor}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model, as its checkpoint fixes it. Hashable, so jit may take it as a static argument."""

    family: str  # key of jinfer.models.registry, e.g. "llama"
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_q_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    max_position_embeddings: int  # tokens of context that the checkpoint was trained for
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # on the q, k, v and o projections
    mlp_bias: bool = False
    tie_word_embeddings: bool = False  # the lm_head is the embedding

    def __post_init__(self) -> None:
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                "num_q_heads must be a multiple of num_kv_heads; "
                f"got num_q_heads={self.num_q_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head_dim; got head_dim={self.head_dim}."
            )

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters; a tied lm_head is not counted again."""
        heads = self.num_q_heads + 2 * self.num_kv_heads
        attention = self.hidden_size * self.head_dim * (heads + self.num_q_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        if self.attention_bias:
            block += heads * self.head_dim + self.hidden_size
        if self.mlp_bias:
            block += 2 * self.intermediate_size + self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * block + embeddings + self.hidden_size

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of KV cache one token occupies over all layers, keys and values together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """Contents of `generation_config.json`: end tokens, and defaults of SamplingParams.

    `sampling` holds only the keys the file names, in SamplingParams' spelling.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The user's settings. `None`: the engine decides from the checkpoint and the hardware.

    Names are vLLM's where vLLM has one, so that its scripts run unchanged.
    """

    model: str | Path  # a Hugging Face folder, a hub name "org/name", or a shipped model
    revision: str | None = None  # branch, tag or commit of the model on the hub; None = "main"
    tokenizer: str | Path | None = None  # a folder or a hub name; None = the model's own
    # the same for the tokenizer; None = `revision`, if the tokenizer is the model's own
    tokenizer_revision: str | None = None
    # a file, the template itself, or the name of one of the checkpoint's; None = the checkpoint's
    chat_template: str | Path | None = None
    download_dir: str | Path | None = None  # folder for downloads; None = the hub's cache
    # access token for the hub; None or True = the one of `hf auth login`, False = none
    hf_token: str | bool | None = field(default=None, repr=False)
    skip_tokenizer_init: bool = False  # True: no tokenizer; prompts must be token ids
    # "auto" and "safetensors" read the checkpoint; "dummy" makes random weights
    load_format: str = "auto"
    # keys that win over those of config.json, such as {"rope_theta": 1000000.0}
    hf_overrides: Mapping[str, Any] | None = None
    # of weights and activations: "float32", "bfloat16", "float16"; "auto": float32 on a CPU, else
    # bfloat16
    dtype: str = "auto"
    # of the KV cache: "int8", "fp8" = "fp8_e4m3"; "auto": as dtype
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1  # chips that share one model
    data_parallel_size: int = 1  # replicas of the model, each on chips of its own
    # tokens of prompt and output together; None = as much of the trained context as fits
    max_model_len: int | None = None
    max_num_seqs: int | None = None  # slots: sequences that run at the same time
    max_num_batched_tokens: int | None = None  # most tokens of one step
    max_decode_steps: int | None = None  # most decode steps of one dispatch
    # most tokens of one prompt in one step; None = max_num_batched_tokens
    long_prefill_token_threshold: int | None = None
    ttft_target_ms: float | None = None  # goal: milliseconds from arrival to the first token
    tpot_target_ms: float | None = None  # goal: mean milliseconds between a request's tokens
    enable_prefix_caching: bool = True  # compute a common prefix of prompts once
    kv_offloading_size: float | None = None  # GiB of host memory for evicted KV pages
    page_size: int | None = None  # tokens per page of the KV cache
    num_pages: int | None = None  # pages of the KV cache; None = what fits into memory
    gpu_memory_utilization: float = 0.9  # fraction of the device's free memory to use
    # of the KV cache on each chip; gpu_memory_utilization then does not count
    kv_cache_memory_bytes: int | None = None
    seed: int = 0  # for requests without a seed, and for dummy weights
    # defaults of SamplingParams: "auto" = the checkpoint's, "vllm" = none, or the folder of a
    # generation_config.json
    generation_config: str | Path = "auto"
    # keys that win over those of generation_config.json, such as {"temperature": 0.7}
    override_generation_config: Mapping[str, Any] | None = None
    max_logprobs: int = 20  # limit on a request's `logprobs` and `prompt_logprobs`; at most 100
    # how the layers are compiled: "scan" = one after another in a loop, "unrolled"
    layer_loop: str | None = None
    attention: str | None = None  # name of a paged-attention implementation
    # folder for compiled programs; None = the user's cache directory
    compilation_cache: str | Path | None = None
    # when a program is compiled after start-up: "warn" | "error"
    late_compile: str = "warn"
    # start sooner: compile with less effort, for slower steps; None = only on a CPU, for models
    # of less than 20 million parameters
    enforce_eager: bool | None = None
    disable_log_stats: bool = False  # no line about the load every 10 seconds
    progress: bool = True  # progress bars and start-up lines


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlan:
    """The engine's settings, fixed at start-up. No `None`, no sentinel, no later edits."""

    platform: str  # "cpu" | "gpu" | "tpu"
    dtype: str  # of weights and activations
    kv_dtype: str  # of KV pages; 8-bit pages have scales
    kv_head_dim: int  # of keys and values in a page; the model's head_dim, or wider
    tensor_parallel_size: int  # chips that share the model
    vocab_size: int  # V of logits and slots; the model's, or padded for the chips
    max_model_len: int
    max_slots: int
    max_step_tokens: int
    max_chunk_tokens: int
    page_size: int
    num_pages: int  # with page 0, the null page
    page_bytes: int  # of one page on one chip
    num_host_pages: int  # host memory for evicted pages
    pages_per_slot: int  # M
    token_buckets: tuple[int, ...]  # T of a step, ascending; one program each
    step_cost_tokens: int  # fixed cost of a step, counted in tokens
    decode_buckets: tuple[int, ...]  # B of multi-step decode programs, ascending
    max_decode_steps: int
    max_logprobs: int  # J of the top-logprob lists
    layer_loop: str
    weight_layout: str  # "default" | "16x128": tiling of weight matrices in memory
    attention: str
    quick_compile: bool  # with less effort, for slower programs

    @property
    def kv_capacity(self) -> int:
        """Tokens the pool can hold."""
        return (self.num_pages - 1) * self.page_size
