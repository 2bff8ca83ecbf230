"""A model as a mesh holds it, and what one chip has of it: plain arithmetic on ModelConfig."""

from dataclasses import replace

from jinfer.config import ModelConfig

# The draw picks a block of 128 tokens, then one of them, so no block may lie on two chips.
VOCAB_BLOCK = 128


def padded_model(model: ModelConfig, tensor_parallel_size: int) -> ModelConfig:
    """The model as its weights are laid down, cut evenly over so many chips.

    kv heads that are fewer than the chips are repeated, side by side, so that each chip has one;
    the vocabulary is filled up, with rows of zeros whose logits are -inf.

    Raises:
      ValueError: the heads or the feed-forward width cannot be cut evenly.
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
            "Choose such a size."
        )
    block = VOCAB_BLOCK * size
    return replace(
        model,
        num_kv_heads=max(num_kv_heads, size),
        vocab_size=-(-model.vocab_size // block) * block,
    )


def chip_shard(padded: ModelConfig, tensor_parallel_size: int) -> ModelConfig:
    """What one of the chips has of a held model: its heads, its feed-forward width, its tokens."""
    size = tensor_parallel_size
    return replace(
        padded,
        num_q_heads=padded.num_q_heads // size,
        num_kv_heads=padded.num_kv_heads // size,
        intermediate_size=padded.intermediate_size // size,
        vocab_size=padded.vocab_size // size,
    )
