"""Measures an exported folder on held-out text, and prints samples from it.

    python -m jinfer.shipped.training.evaluate --corpora DIR --folder jinfer/shipped/target

The weights are read from the folder, so the figures are for bfloat16.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from jinfer.shipped.training.corpus import encode, load_corpus
from jinfer.shipped.training.export import fast_tokenizer, load_folder
from jinfer.shipped.training.model import Params, Shape, forward, num_params, token_losses

PROMPTS = (
    "Once upon a time",
    "There was once a king who had three daughters. The youngest",
    'The fox looked at the old woman and said, "',
    "",
)


def held_out_loss(
    params: Params, shape: Shape, documents: Sequence[np.ndarray], num_characters: int
) -> tuple[float, float]:
    """Returns nats per token and per character.

    Documents are split into windows of the model's context that overlap by one token. So each
    token after a document's `<s>` is predicted once, from the earlier tokens of its window.
    """
    context = shape.max_positions
    windows = [d[i : i + context + 1] for d in documents for i in range(0, len(d) - 1, context)]
    losses = jax.jit(partial(token_losses, shape=shape))
    nats, num_tokens = 0.0, 0
    for start in range(0, len(windows), 4):
        token_BT = np.zeros((4, context + 1), np.int32)
        real_BT = np.zeros((4, context), bool)
        for row, window in enumerate(windows[start : start + 4]):
            token_BT[row, : len(window)] = window
            real_BT[row, : len(window) - 1] = True
        nats += float(jnp.sum(losses(params, token_BT) * real_BT))
        num_tokens += int(real_BT.sum())
    return nats / num_tokens, nats / num_characters


def sample(
    params: Params,
    shape: Shape,
    prompt_ids: Sequence[int],
    key: jax.Array,
    *,
    num_tokens: int = 160,
    temperature: float = 0.6,
    top_p: float = 0.95,
) -> list[int]:
    """Samples a completion; runs the whole sequence again for every token."""
    eos = 2
    length = len(prompt_ids) + num_tokens
    token_BT = np.zeros((1, length), np.int32)
    token_BT[0, : len(prompt_ids)] = prompt_ids
    logits = jax.jit(lambda tokens, last: forward(params, tokens, shape=shape)[0, last])
    for position in range(len(prompt_ids), length):
        logits_V = np.asarray(logits(token_BT, position - 1), np.float64) / temperature
        order_V = np.argsort(-logits_V)
        prob_V = np.exp(logits_V[order_V] - logits_V.max())
        prob_V /= prob_V.sum()
        before_V = np.cumsum(prob_V) - prob_V
        prob_V = np.where(before_V < top_p, prob_V, 0.0)
        draw = float(jax.random.uniform(jax.random.fold_in(key, position))) * prob_V.sum()
        rank = int(np.searchsorted(np.cumsum(prob_V), draw))
        token_BT[0, position] = order_V[rank]
        if order_V[rank] == eos:
            return token_BT[0, : position + 1].tolist()
    return token_BT[0].tolist()


def check_tokenizers(model: bytes, documents: Sequence[str]) -> None:
    """Raises ValueError unless both tokenizers agree, and decoding returns the text."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    fast = fast_tokenizer(model)
    for document in documents:
        ids = pieces.encode(document)
        if fast.encode(document, add_special_tokens=False).ids != ids:
            raise ValueError(f"both tokenizers must agree; got different ids: {document[:60]!r}.")
        if pieces.decode(ids) != document or fast.decode(ids) != document:
            raise ValueError(f"decoding must return the text; got another for {document[:60]!r}.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures an exported folder.")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--folder", type=Path, required=True, help="exported model")
    parser.add_argument("--samples", type=int, default=1, help="completions per prompt")
    args = parser.parse_args()
    params, shape = load_folder(args.folder)
    model = (args.folder / "tokenizer.model").read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    print(f"{num_params(params):,} parameters, {shape}")
    corpus = load_corpus(args.corpora)
    for name, texts in (
        ("FairytaleQA test", corpus.held_out_tales),
        ("held-out book", corpus.held_out_book),
    ):
        check_tokenizers(model, texts)
        documents = encode(pieces, texts)
        per_token, per_character = held_out_loss(
            params, shape, documents, num_characters=sum(map(len, texts))
        )
        print(f"{name}: {per_token:.4f} nats per token, {per_character:.4f} per character")
    for index in range(args.samples):
        for prompt in PROMPTS:
            ids = sample(params, shape, [1, *pieces.encode(prompt)], jax.random.key(index))
            print(f"---\n{pieces.decode(ids)}")


if __name__ == "__main__":
    main()
