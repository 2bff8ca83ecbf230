"""Small tokenizers of each kind, trained on the spot."""

import functools
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore",
    "how much wood would a woodchuck chuck",
] * 8
SPECIALS = ["<s>", "</s>", "[INST]"]
CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "pad_token": None,
    "legacy": False,
}


@functools.cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@functools.cache
def _byte_fallback() -> str:
    pieces = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefgh", "ab", "cd", "▁ab"]
    merges = [("a", "b"), ("c", "d"), ("▁", "ab")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer.to_str()


@functools.cache
def _sentencepiece(model_type: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=model_type,
        vocab_size=310,
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=["[INST]"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=9,
    )
    return model.getvalue()


KINDS = ["byte_level", "byte_fallback", "sentencepiece_bpe", "sentencepiece_unigram"]


def write_tokenizer(folder: Path, kind: str, **config: object) -> Path:
    """Writes a model folder's tokenizer files; `config` overrides CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "byte_level":
        (folder / "tokenizer.json").write_text(_byte_level(), encoding="utf-8")
    elif kind == "byte_fallback":
        (folder / "tokenizer.json").write_text(_byte_fallback(), encoding="utf-8")
    else:
        model = _sentencepiece(kind.removeprefix("sentencepiece_"))
        (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder
