"""The bytes and flops that each step needs, whatever its implementation."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinfer.config import ModelConfig
from jinfer.schedule.plan import Chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """Bytes and flops of one step."""

    num_bytes: int
    num_flops: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """The costs of a model's step.

    Counts matrix products and attention without masked positions. Each step reads each weight
    once and the KV of each row's context once, and writes new KV once. Norms, activations and
    sampling are left out: they are small, and leaving them out only makes the bound looser.
    """

    weight_bytes: int  # of a step, without an untied embedding, of which a step reads a few rows
    kv_bytes: int  # of one token, all layers
    flops_per_token: int
    flops_per_logits_row: int  # the lm_head
    flops_per_pair: int  # of a query and a key that it sees, all heads and layers

    @classmethod
    def of(cls, model: ModelConfig, *, itemsize: int, kv_bytes: int) -> "Costs":
        """Counts for a model.

        Args:
          model: its shape.
          itemsize: bytes of a weight.
          kv_bytes: of one token in the pool, all layers.
        """
        heads = 2 * model.num_q_heads + 2 * model.num_kv_heads
        block = model.hidden_size * (heads * model.head_dim + 3 * model.intermediate_size)
        embedding = model.vocab_size * model.hidden_size
        num_read = model.num_parameters - (0 if model.tie_word_embeddings else embedding)
        return cls(
            weight_bytes=num_read * itemsize,
            kv_bytes=kv_bytes,
            flops_per_token=2 * model.num_layers * block,
            flops_per_logits_row=2 * embedding,
            flops_per_pair=4 * model.num_layers * model.num_q_heads * model.head_dim,
        )

    def step(self, chunks: Sequence[Chunk]) -> StepWork:
        """The work of a step that computes these chunks."""
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        num_kv = sum(chunk.stop for chunk in chunks)  # reads old ones, writes new ones
        num_pairs = sum(
            chunk.num_tokens * chunk.start + chunk.num_tokens * (chunk.num_tokens + 1) // 2
            for chunk in chunks
        )
        num_logits_rows = sum(chunk.num_logits_rows for chunk in chunks)
        return StepWork(
            num_bytes=self.weight_bytes + num_kv * self.kv_bytes,
            num_flops=num_tokens * self.flops_per_token
            + num_pairs * self.flops_per_pair
            + num_logits_rows * self.flops_per_logits_row,
        )
