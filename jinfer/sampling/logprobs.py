"""Log-probabilities of a step's rows of logits, before any sampling transform."""

from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jinfer.parallel.collectives import WHOLE, Shards
from jinfer.sampling.largest import largest


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """One entry per row of logits. Fields that a row did not ask for hold -inf, rank 0, token 0."""

    token_logprob_R: Float[Array, "R"]
    rank_R: Int32[Array, "R"]  # 1 + how many tokens are more probable
    top_ids_RJ: Int32[Array, "R J"]  # most probable first
    top_logprobs_RJ: Float[Array, "R J"]


def no_logprobs(*rows: int, max_logprobs: int) -> Logprobs:
    """Entries of rows that ask for nothing; `rows` are the axes before J."""
    listed = (*rows, max_logprobs)
    return Logprobs(
        token_logprob_R=jnp.full(rows, -jnp.inf, jnp.float32),
        rank_R=jnp.zeros(rows, jnp.int32),
        top_ids_RJ=jnp.zeros(listed, jnp.int32),
        top_logprobs_RJ=jnp.full(listed, -jnp.inf, jnp.float32),
    )


def read_logprobs(
    logits_RV: Float[Array, "R V"],
    token_R: Int32[Array, "R"],
    wants_top_R: Bool[Array, "R"],
    max_logprobs: int,
    *,
    wants_token_R: Bool[Array, "R"] | None = None,
    shards: Shards = WHOLE,
) -> Logprobs:
    """Reads log_softmax of the raw logits, before any sampling transform.

    Cost: one branch in a step in which no row asks.

    Args:
      logits_RV: any float dtype; computed in float32.
      token_R: the token each row reports: the sampled one, or the next of the prompt.
      wants_top_R: rows that also report the most probable tokens.
      max_logprobs: J; static.
      wants_token_R: rows that report their token; None = all.
      shards: the shards of V.
    """
    num_rows = token_R.shape[0]
    if wants_token_R is None:
        wants_token_R = jnp.ones(num_rows, dtype=bool)
    wants_token_R = wants_token_R | wants_top_R
    nothing = no_logprobs(num_rows, max_logprobs=max_logprobs)
    logit_R, rank_R, log_total_R = lax.cond(
        jnp.any(wants_token_R),
        lambda: _token(logits_RV, token_R, shards),
        lambda: (nothing.token_logprob_R, nothing.rank_R, nothing.token_logprob_R),
    )
    top_ids_RJ, top_logits_RJ = lax.cond(
        jnp.any(wants_top_R),
        lambda: _top(logits_RV, max_logprobs, shards),
        lambda: (nothing.top_ids_RJ, nothing.top_logprobs_RJ),
    )
    wants_R1 = wants_top_R[:, None]
    top_logprobs_RJ = jnp.where(wants_R1, top_logits_RJ - log_total_R[:, None], -jnp.inf)
    return Logprobs(
        token_logprob_R=jnp.where(wants_token_R, logit_R - log_total_R, -jnp.inf),
        rank_R=jnp.where(wants_token_R, rank_R, 0),
        top_ids_RJ=jnp.where(wants_R1, top_ids_RJ, 0),
        top_logprobs_RJ=top_logprobs_RJ,
    )


def _token(logits_RV: Array, token_R: Array, shards: Shards) -> tuple[Array, Array, Array]:
    """Logit and rank of each row's token, and the log of the sum of all exponentials."""
    logits_RV = logits_RV.astype(jnp.float32)
    logit_R = _logit(logits_RV, token_R, shards)
    above_R = jnp.sum(logits_RV > logit_R[:, None], axis=-1, dtype=jnp.int32)
    return logit_R, 1 + shards.sum(above_R), _log_total(logits_RV, shards)


def _logit(logits_RV: Array, token_R: Array, shards: Shards) -> Array:
    local_R1 = shards.local(token_R, logits_RV.shape[-1])[:, None]
    logit_R1 = jnp.take_along_axis(logits_RV, local_R1, axis=-1, mode="fill", fill_value=-jnp.inf)
    return shards.max(logit_R1[:, 0])


def _log_total(logits_RV: Array, shards: Shards) -> Array:
    if shards.axis is None:
        return jax.nn.logsumexp(logits_RV, axis=-1)
    largest_R = shards.max(jnp.max(logits_RV, axis=-1))
    total_R = shards.sum(jnp.sum(jnp.exp(logits_RV - largest_R[:, None]), axis=-1))
    return largest_R + jnp.log(total_R)


def _top(logits_RV: Array, max_logprobs: int, shards: Shards) -> tuple[Array, Array]:
    """Ids and logits of the most probable tokens, padded with token 0 and -inf."""
    length = logits_RV.shape[-1]
    logits_RJ, ids_RJ = _top_k(logits_RV.astype(jnp.float32), min(max_logprobs, length))
    if shards.axis is not None:  # top of the shards' tops; ties keep the order of ids
        ids_RJ = shards.join(ids_RJ + shards.start(length))
        logits_RJ, place_RJ = _top_k(shards.join(logits_RJ), min(max_logprobs, ids_RJ.shape[1]))
        ids_RJ = jnp.take_along_axis(ids_RJ, place_RJ, axis=-1)
    spare = ((0, 0), (0, max_logprobs - ids_RJ.shape[1]))
    return jnp.pad(ids_RJ, spare), jnp.pad(logits_RJ, spare, constant_values=-jnp.inf)


def _top_k(numbers_RV: Array, count: int) -> tuple[Array, Array]:
    def at_once(numbers_RV: Array) -> tuple[Array, Array]:
        largest_RJ, ids_RJ = lax.top_k(numbers_RV, count)
        return largest_RJ, ids_RJ

    one_by_one = partial(largest, count=count)
    return lax.platform_dependent(numbers_RV, cuda=one_by_one, default=at_once)
