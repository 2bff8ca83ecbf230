"""Packs a request's token lists into fixed-width numpy arrays for the sampler.

Every list is padded with V, one past the last token id: a scatter drops it and no token equals it.
"""

import hashlib
from collections.abc import Mapping, Sequence, Set

import numpy as np

from jinfer.errors import RequestError
from jinfer.request.param_checks import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS

Ids = Sequence[int] | Set[int] | np.ndarray

WORD_BITS = 32  # tokens per word of a vocabulary mask
MAX_STOP_IDS = 64  # end tokens of the model and stop_token_ids of the request together
MAX_LOGIT_BIAS = 1024  # entries of logit_bias
WINDOW = MAX_BAD_WORD_TOKENS - 1  # last tokens kept: the longest prefix of a bad word


def num_words(vocab_size: int) -> int:
    """W: the number of 32-bit words that hold one bit per token."""
    return -(-vocab_size // WORD_BITS)


def pack_bits(ids: Ids, vocab_size: int) -> np.ndarray:
    """uint32[W] with the bits of `ids` set; token v is bit v % 32 of word v // 32.

    Raises:
      RequestError: if an id lies outside the vocabulary.
    """
    flag_V = np.zeros(num_words(vocab_size) * WORD_BITS, dtype=bool)
    flag_V[_checked(ids, vocab_size)] = True
    return np.packbits(flag_V, bitorder="little").view("<u4").astype(np.uint32)


def allowed_bits(
    vocab_size: int, *, allowed_ids: Ids | None = None, banned_ids: Ids = ()
) -> np.ndarray:
    """uint32[W] of the allowed tokens; all ones, spare bits included, if all are allowed.

    Args:
      vocab_size: V, the width of the logits.
      allowed_ids: the only tokens allowed; None = every token.
      banned_ids: tokens to exclude: one-token bad words, padding of the vocabulary.

    Raises:
      RequestError: if an id lies outside the vocabulary, or no token is left.
    """
    everything_W = np.full(num_words(vocab_size), 0xFFFFFFFF, dtype=np.uint32)
    if allowed_ids is None and not len(banned_ids):
        return everything_W
    bits_W = everything_W if allowed_ids is None else pack_bits(allowed_ids, vocab_size)
    bits_W = bits_W & ~pack_bits(banned_ids, vocab_size)
    if not (bits_W & pack_bits(np.arange(vocab_size), vocab_size)).any():
        raise RequestError(
            "a request must leave at least one token to sample; got none after allowed_token_ids "
            "and bad_words. Allow a token that bad_words does not ban."
        )
    return bits_W


def pad_stop_ids(ids: Ids, vocab_size: int) -> np.ndarray:
    """int32[MAX_STOP_IDS] of the tokens that min_tokens bans.

    Raises:
      RequestError: if there are too many, or one lies outside the vocabulary.
    """
    return _padded(
        sorted({int(token) for token in ids}), MAX_STOP_IDS, vocab_size, "stop token ids"
    )


def pad_bias(bias: Mapping[int, int | float], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32[MAX_LOGIT_BIAS] token ids and the float32 to add to the logit of each.

    Raises:
      RequestError: if there are too many, or an id lies outside the vocabulary.
    """
    ids_J = _padded(list(bias), MAX_LOGIT_BIAS, vocab_size, "logit_bias entries")
    values_J = np.zeros(MAX_LOGIT_BIAS, dtype=np.float32)
    values_J[: len(bias)] = list(bias.values())
    return ids_J, values_J


def pad_bad_words(words: Sequence[Ids], vocab_size: int) -> np.ndarray:
    """int32[MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS], each word aligned to the right.

    The last column is the token to ban when the other columns match the last sampled tokens.

    Raises:
      RequestError: if there are too many words, one is empty or too long, or an id lies outside
        the vocabulary.
    """
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(
            f"a request may have at most {MAX_BAD_WORDS} bad_words of several tokens; "
            f"got {len(words)}. Drop some, or filter the text afterwards."
        )
    padded_J8 = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), vocab_size, dtype=np.int32)
    for row, word in enumerate(words):
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            raise RequestError(
                f"a bad word must have 1 to {MAX_BAD_WORD_TOKENS} tokens; "
                f"got {len(word)}: {list(word)}. Use a shorter word."
            )
        padded_J8[row, -len(word) :] = _checked(word, vocab_size)
    return padded_J8


def recent_window(output_ids: Ids, vocab_size: int) -> np.ndarray:
    """int32[WINDOW]: the last sampled tokens, newest last, as `record` keeps them on the device."""
    window_7 = np.full(WINDOW, vocab_size, dtype=np.int32)
    tail = list(output_ids)[-WINDOW:]
    if tail:
        window_7[-len(tail) :] = tail
    return window_7


def seed_words(seed: int, index: int) -> np.ndarray:
    """uint32[2]: the random key of completion `index` of a request with this seed.

    Completion 0 uses the seed itself, high word first. The others use a digest of seed and index,
    so their keys do not depend on n.

    Args:
      seed: any integer; its low 64 bits count.
      index: completion of the request, 0 to n - 1.
    """
    payload = (seed & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "big")
    if index:
        payload = hashlib.blake2b(payload + index.to_bytes(8, "big"), digest_size=8).digest()
    return np.frombuffer(payload, dtype=">u4").astype(np.uint32)


def _padded(ids: Sequence[int], length: int, vocab_size: int, what: str) -> np.ndarray:
    if len(ids) > length:
        raise RequestError(
            f"a request may have at most {length} {what}; got {len(ids)}. Drop some of them."
        )
    padded_J = np.full(length, vocab_size, dtype=np.int32)
    padded_J[: len(ids)] = _checked(ids, vocab_size)
    return padded_J


def _checked(ids: Ids, vocab_size: int) -> np.ndarray:
    ids = ids if isinstance(ids, np.ndarray) else np.fromiter(ids, dtype=np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise RequestError(
            f"token ids must lie in 0 to {vocab_size - 1}; got {int(outside[0])}. "
            "Use ids of this model's tokenizer."
        )
    return ids
