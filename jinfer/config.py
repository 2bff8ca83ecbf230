"""Three kinds of configuration: what the checkpoint fixes, what the user asks, what was decided."""

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
    """What the checkpoint fixes. Hashable, so jit may take it as a static argument."""

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
    tie_word_embeddings: bool = False  # the unembedding is the embedding

    def __post_init__(self) -> None:
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                "num_q_heads must be a multiple of num_kv_heads; "
                f"got num_q_heads={self.num_q_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head width; got head_dim={self.head_dim}."
            )

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, the unembedding counted once if tied."""
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
    """What `generation_config.json` says: end tokens, and sampling a user need not repeat.

    `sampling` holds only the keys the file names, in SamplingParams' spelling.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What the user asks. `None` means: decide from the checkpoint and the hardware.

    Names are vLLM's where vLLM has one, so that a script moves over unchanged.
    """

    model: str | Path  # a Hugging Face folder, or a hub name such as "org/name"
    tokenizer: str | Path | None = None  # a folder; None = the model's own
    skip_tokenizer_init: bool = False  # prompts must then be token ids
    load_format: str = "auto"  # "auto" reads safetensors; "dummy" draws random weights
    dtype: str = "auto"  # "auto": float32 on CPU, else bfloat16; "float32" | "bfloat16" | "float16"
    kv_cache_dtype: str = "auto"  # of KV pages; "auto": as dtype; "int8" | "fp8" = "fp8_e4m3"
    tensor_parallel_size: int = 1  # chips that share one model
    data_parallel_size: int = 1  # replicas of the model, each on chips of its own
    max_model_len: int | None = None  # tokens of prompt and output together
    max_num_seqs: int | None = None  # slots: sequences that run at the same time
    max_num_batched_tokens: int | None = None  # token budget of one step
    max_decode_steps: int | None = None  # decode steps of one dispatch at most; 1 = always one
    long_prefill_token_threshold: int | None = None  # longest prefill chunk; None = the budget
    ttft_target_ms: float | None = None  # arrival to first token, to aim at; see schedule/pace.py
    tpot_target_ms: float | None = None  # between tokens of a request in the mean, likewise
    enable_prefix_caching: bool = True  # prompts that begin alike are computed once
    kv_offloading_size: float | None = None  # GiB of host memory for KV pages the device gives up
    page_size: int | None = None  # tokens per KV page
    num_pages: int | None = None  # KV pages in the pool, the bin page included
    gpu_memory_utilization: float = 0.9  # share of the device's free memory the engine may use
    seed: int = 0  # of requests that bring none
    generation_config: str = "auto"  # "auto": sampling defaults of the checkpoint; "vllm": none
    max_logprobs: int = 20  # largest `logprobs` and `prompt_logprobs` a request may ask
    layer_loop: str | None = None  # "scan" | "unrolled"
    attention: str | None = None  # name of a paged-attention implementation
    compilation_cache: str | Path | None = None  # folder; None = the user's cache directory
    late_compile: str = "warn"  # compiling after warm-up: "warn" | "error"
    progress: bool = True  # progress bars and start-up lines


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlan:
    """What was decided, once, at start-up. No `None`, no sentinel, no later edits."""

    platform: str  # "cpu" | "gpu" | "tpu"
    dtype: str  # of weights and activations
    kv_dtype: str  # of KV pages; those of 8 bits carry scales
    kv_head_dim: int  # of a key or value in its page; the model's own, or wider
    tensor_parallel_size: int  # chips that share the model
    vocab_size: int  # V of logits and slots; the model's own, or filled up for the chips
    max_model_len: int
    max_slots: int
    max_step_tokens: int
    max_chunk_tokens: int
    page_size: int
    num_pages: int  # page 0, the bin, included
    page_bytes: int  # of one page on one chip
    num_host_pages: int  # room in host memory for pages that the pool gives up
    pages_per_slot: int  # M
    token_buckets: tuple[int, ...]  # T of a step, ascending; one program each
    step_cost_tokens: int  # a step takes as long as its tokens and so many more
    decode_buckets: tuple[int, ...]  # B of decode programs, likewise; none if of one step at most
    max_decode_steps: int
    max_logprobs: int  # J of the top-logprob lists
    layer_loop: str
    weight_layout: str  # "default" | "16x128": tiles of weight matrices in device memory
    attention: str

    @property
    def kv_capacity(self) -> int:
        """Tokens the pool can hold."""
        return (self.num_pages - 1) * self.page_size
