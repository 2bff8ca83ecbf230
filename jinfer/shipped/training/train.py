"""Trains the shipped models within a budget of minutes, on CPU.

    python -m jinfer.shipped.training.train --corpora DIR --out DIR --model target --minutes 80
    python -m jinfer.shipped.training.train --corpora DIR --out DIR --model draft --minutes 10

Muon for the matrices inside the layers, Adam for the embedding and the norms. The learning
rate depends on the spent fraction of the time budget, so a slow or busy machine takes fewer steps
but still completes the schedule. A usable export is written every few minutes. `--resume 0.4`
starts from the export in the output folder, as if 40% of the budget were spent; the optimizer
state is new and is warmed up again. A small model learns faster per minute, so train 3 layers
first, then continue with 6: `--resume 0.4 --grow 6`.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import sentencepiece

from jinfer.shipped.training.corpus import (
    VOCAB_SIZE,
    encode,
    load_corpus,
    shuffled_stream,
    train_tokenizer,
)
from jinfer.shipped.training.export import export_folder, load_folder
from jinfer.shipped.training.model import Params, Shape, grow, init_params, num_params, token_losses


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings to train one model. Times are fractions of the budget."""

    shape: Shape
    tokens_per_step: int = 3072
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    weight_decay: float = 0.03
    warmup: float = 0.015  # after the start, and again after `--resume`
    decay_from: float = 0.3  # constant before, then linear down to zero
    # Tokens per sequence in successive steps; the list repeats. Short sequences are fastest; one
    # step in eight has the length of the context, so that late positions are always trained.
    lengths: tuple[int, ...] = (256, 256, 256, 512, 256, 256, 256, 1024)


RECIPES = {
    "target": Recipe(
        shape=Shape(
            vocab_size=VOCAB_SIZE,
            width=256,
            num_layers=3,
            num_q_heads=4,
            num_kv_heads=2,
            head_width=64,
            ffn_width=688,
        ),
    ),
    "draft": Recipe(
        shape=Shape(
            vocab_size=VOCAB_SIZE,
            width=64,
            num_layers=2,
            num_q_heads=2,
            num_kv_heads=1,
            head_width=32,
            ffn_width=80,
        ),
    ),
}


def rate_at(recipe: Recipe, spent: float, *, start: float) -> float:
    """Returns the factor of both learning rates at the spent fraction `spent` of the budget.

    `start` is the fraction at which this process began, with an empty optimizer state.
    """
    warm = min(1.0, max(spent - start, 1e-3) / recipe.warmup)
    cool = min(1.0, (1.0 - spent) / (1.0 - recipe.decay_from))
    return warm * cool


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the layers' matrices; Adam for the embedding and the norms."""

    def muon_axes(params: Params) -> Any:
        axes = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
        spec = jax.tree.map(lambda leaf: axes if leaf.ndim == 2 else None, params)
        return spec | {"embed_VD": None}

    return optax.contrib.muon(
        recipe.muon_rate,
        adam_learning_rate=recipe.adam_rate,
        adam_b2=0.98,
        weight_decay=recipe.weight_decay,
        weight_decay_mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params),
        # optax accepts a function here, as its docstring says; its annotation does not.
        muon_weight_dimension_numbers=muon_axes,  # pyright: ignore[reportArgumentType]
    )


@partial(jax.jit, static_argnames=("shape", "optimizer"), donate_argnames=("params", "state"))
def train_step(params, state, token_BT, rate, *, shape, optimizer):
    """One update, scaled by `rate`. Recompiles once per sequence length."""

    def mean_loss(params):
        return token_losses(params, token_BT, shape=shape).mean()

    loss, gradients = jax.value_and_grad(mean_loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    updates = jax.tree.map(lambda update: rate * update, updates)
    return optax.apply_updates(params, updates), state, loss


class TokenSource:
    """Endless training windows; each epoch has the tales twice and the stories once, shuffled."""

    def __init__(self, tales: list[np.ndarray], stories: list[np.ndarray], *, seed: int) -> None:
        self._documents = tales + tales + stories
        self._rng = np.random.default_rng(seed)
        self._stream = shuffled_stream(self._documents, self._rng)
        self._next = 0
        self.tokens_per_epoch = len(self._stream)

    def take(self, num_sequences: int, length: int) -> np.ndarray:
        """Returns [num_sequences, length + 1]; neighbouring rows overlap by one token."""
        num_tokens = num_sequences * length
        if self._next + num_tokens + 1 > len(self._stream):
            rest = self._stream[self._next :]
            self._stream = np.concatenate([rest, shuffled_stream(self._documents, self._rng)])
            self._next = 0
        start = self._next + length * np.arange(num_sequences)
        self._next += num_tokens
        return self._stream[start[:, None] + np.arange(length + 1)].astype(np.int32)


def progress(minutes: float, *, start: float) -> Iterator[float]:
    """Yields the spent fraction of the budget before each step, until it reaches 1."""
    start_s = time.monotonic()
    while (spent := start + (time.monotonic() - start_s) / (60 * minutes)) < 1.0:
        yield spent


def train(args: argparse.Namespace) -> None:
    recipe = RECIPES[args.model]
    tokenizer_model, source = prepare(args)
    if args.resume:
        params, shape = load_folder(args.out / args.model)
        if args.grow:
            params, shape = grow(params, shape, args.grow)
    else:
        shape = recipe.shape
        params = init_params(jax.random.key(args.seed), shape)
    optimizer = make_optimizer(recipe)
    state = optimizer.init(params)
    export_every = args.export_minutes / args.minutes
    exported_at, num_tokens, losses = args.resume - 1.0, 0, []
    for step, spent in enumerate(progress(args.minutes, start=args.resume)):
        length = recipe.lengths[step % len(recipe.lengths)]
        token_BT = source.take(recipe.tokens_per_step // length, length)
        rate = rate_at(recipe, spent, start=args.resume)
        params, state, loss = train_step(
            params, state, token_BT, rate, shape=shape, optimizer=optimizer
        )
        losses.append(float(loss))
        num_tokens += recipe.tokens_per_step
        if step % 24 == 0:
            print(
                f"{spent:6.1%} step={step} tokens={num_tokens:,} "
                f"epoch={num_tokens / source.tokens_per_epoch:.2f} "
                f"loss={np.mean(losses[-24:]):.4f}",
                flush=True,
            )
        if spent - exported_at >= export_every:
            export_folder(args.out / args.model, params, shape, tokenizer_model)
            exported_at = spent
    export_folder(args.out / args.model, params, shape, tokenizer_model)
    print(f"done: {step + 1} steps, {num_tokens:,} tokens, {num_params(params):,} parameters")


def prepare(args: argparse.Namespace) -> tuple[bytes, TokenSource]:
    """Cleans the texts; trains the tokenizer, or reads it for a draft or with `--resume`."""
    corpus = load_corpus(args.corpora)
    shared = args.out / "target" / "tokenizer.model"
    if args.model == "draft" or args.resume:
        tokenizer_model = shared.read_bytes()
    else:
        tokenizer_model = train_tokenizer(corpus.tales + corpus.stories)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    source = TokenSource(
        encode(tokenizer, corpus.tales), encode(tokenizer, corpus.stories), seed=args.seed
    )
    print(f"{source.tokens_per_epoch:,} tokens per epoch", flush=True)
    return tokenizer_model, source


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the shipped models on CPU.")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--out", type=Path, required=True, help="gets target/ and draft/")
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--minutes", type=float, required=True, help="time for the training loop")
    parser.add_argument("--export-minutes", type=float, default=8.0)
    parser.add_argument("--resume", type=float, default=0.0, help="fraction already spent")
    parser.add_argument("--grow", type=int, help="layers to deepen the resumed model to")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
