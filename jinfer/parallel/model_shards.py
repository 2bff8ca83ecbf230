"""The sizes of a padded model and of one chip's shard of it, as ModelConfigs."""

from dataclasses import replace

from jinfer.config import ModelConfig

# The sampler picks a block of 128 tokens, then a token in it, so no block may span two chips.
VOCAB_BLOCK = 128


def padded_model(model: ModelConfig, tensor_parallel_size: int) -> ModelConfig:
    """The model with its sizes padded, so that every chip gets an equal shard.

    If there are fewer kv heads than chips, each head is repeated on neighbouring chips. The
    vocabulary is padded with rows of zeros; their logits become -inf.

    Raises:
      ValueError: the heads or intermediate_size cannot be divided evenly.
    """
    size = tensor_parallel_size
    if size == 1:
        return model
    for name, count in (
        ("num_attention_heads", model.num_q_heads),
        ("intermediate_size", model.intermediate_size),
    ):
        if count % size:
            raise ValueError(
                f"tensor_parallel_size must divide the model's {name}; got "
                f"tensor_parallel_size={size}, {name}={count}. Choose a divisor of it."
            )
    num_kv_heads = model.num_kv_heads
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(
            "tensor_parallel_size must divide the model's num_key_value_heads or be a multiple of "
            f"them; got tensor_parallel_size={size}, num_key_value_heads={num_kv_heads}. "
            "Choose one that does."
        )
    block = VOCAB_BLOCK * size
    return replace(
        model,
        num_kv_heads=max(num_kv_heads, size),
        vocab_size=-(-model.vocab_size // block) * block,
    )


def chip_shard(padded: ModelConfig, tensor_parallel_size: int) -> ModelConfig:
    """One chip's shard of a padded model: its heads, intermediate_size and vocabulary."""
    size = tensor_parallel_size
    return replace(
        padded,
        num_q_heads=padded.num_q_heads // size,
        num_kv_heads=padded.num_kv_heads // size,
        intermediate_size=padded.intermediate_size // size,
        vocab_size=padded.vocab_size // size,
    )
