"""Added and special tokens: their flags in tokenizer_config.json, and their text.

The expected values are those of transformers 5.24, except where a comment says so; compare them
live with `pytest -m agreement`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from request.tiny_tokenizers import write_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jinfer.request.tokenizer import load_tokenizer

_FIN = "<|fin|>"
_ID = 256  # the first id past the 256 bytes
_TEXTS = ("a<|fin|>b", "a <|fin|> b", "<|two|>x")


def _entry(**flags: Any) -> dict[str, Any]:
    off = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
    return {"content": _FIN, "special": True, **off, **flags}


def _folder(folder: Path, known: dict[str, Any] | None, config: dict[str, Any]) -> Path:
    """A byte-level tokenizer of 256 tokens; `known` are flags of <|fin|> in tokenizer.json."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if known is not None:
        library.add_tokens([AddedToken(_FIN, **{"special": False, "normalized": False, **known})])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# Flags in tokenizer.json (None: unknown there), tokenizer_config.json; then the numbers of tokens
# of two texts, and whether <|fin|> is left out of text.
_STRIPS = {str(_ID): _entry(lstrip=True, rstrip=True)}
CASES = {
    "special": ({}, {"added_tokens_decoder": {str(_ID): _entry()}}, 3, 5, True),
    "strips": ({}, {"added_tokens_decoder": _STRIPS}, 3, 3, True),
    "single_word": (
        {},
        {"added_tokens_decoder": {str(_ID): _entry(single_word=True)}},
        9,
        5,
        True,
    ),
    "normalized": (
        {"normalized": True},
        {"added_tokens_decoder": {str(_ID): _entry(special=False)}},
        3,
        5,
        False,
    ),
    "special in the older file": (
        {"special": True},
        {"added_tokens_decoder": {str(_ID): _entry(special=False)}},
        3,
        5,
        True,
    ),
    "only in the config": (None, {"added_tokens_decoder": {str(_ID): _entry()}}, 3, 5, True),
    "eos_token": ({}, {"eos_token": _FIN}, 3, 5, True),
    "bos_token": ({}, {"bos_token": _FIN}, 3, 5, True),
    "sep_token": ({}, {"sep_token": _FIN}, 3, 5, True),
    "image_token": ({}, {"image_token": _FIN}, 3, 5, True),
    "unknown eos_token": (None, {"eos_token": _FIN}, 3, 5, True),
    "eos_token with flags": (
        None,
        {"eos_token": {**_entry(lstrip=True), "__type": "AddedToken"}},
        3,
        4,
        True,
    ),
    "a name leaves flags": ({"lstrip": True}, {"eos_token": _FIN}, 3, 4, True),
    "a name and an entry": (
        {},
        {"eos_token": _FIN, "added_tokens_decoder": {str(_ID): _entry(special=False, lstrip=True)}},
        3,
        4,
        True,
    ),
    "extra_special_tokens": (None, {"extra_special_tokens": [_FIN]}, 3, 5, True),
    "extra_special_tokens by name": (None, {"extra_special_tokens": {"fin": _FIN}}, 3, 5, True),
    "additional_special_tokens": (None, {"additional_special_tokens": [_FIN]}, 3, 5, True),
    "additional with flags": (
        None,
        {"additional_special_tokens": [{**_entry(lstrip=True), "__type": "AddedToken"}]},
        3,
        4,
        True,
    ),
    "the newer key alone counts": (
        None,
        {"extra_special_tokens": [_FIN], "additional_special_tokens": ["<|two|>"]},
        3,
        5,
        True,
    ),
    # transformers 5 leaves a known token as it is, 4 makes it special, and so do we.
    "extra and known": ({}, {"extra_special_tokens": [_FIN]}, 3, 5, True),
}
_NOT_AS_IN_5 = {"extra and known"}


@pytest.mark.parametrize("case", CASES)
def test_flags_of_the_config_reach_every_token(tmp_path, case: str) -> None:
    known, config, tight, spaced, skipped = CASES[case]
    tokenizer = load_tokenizer(_folder(tmp_path, known, config))
    ids = tokenizer.encode(_TEXTS[0])
    assert (len(ids), len(tokenizer.encode(_TEXTS[1]))) == (tight, spaced)
    assert tokenizer.encode(_TEXTS[2]) == tokenizer.encode("<|two|>") + tokenizer.encode("x")
    assert tokenizer.decode([_ID]) == ("" if skipped else _FIN)
    assert tokenizer.decode([_ID], skip_special_tokens=False) == _FIN
    assert (_ID in tokenizer.special_ids) == skipped


def test_named_tokens_reach_templates(tmp_path) -> None:
    config = {"image_token": _FIN, "extra_special_tokens": {"fin": "<|two|>"}, "eos_token": "a"}
    tokenizer = load_tokenizer(_folder(tmp_path, {}, config))
    named = {"image_token": _FIN, "fin": "<|two|>", "eos_token": "a"}
    assert tokenizer.template_variables == named
    assert tokenizer.token_id("<|two|>") == 257


def test_a_flag_of_the_older_added_tokens_overrides_nothing(tmp_path) -> None:
    folder = _folder(tmp_path, {"lstrip": True, "special": True}, {})
    (folder / "added_tokens.json").write_text(json.dumps({_FIN: _ID}))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("a <|fin|> b")) == 4 and _ID in tokenizer.special_ids


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("content", ["école", "señor", "Ġé", "ø÷ÿ", "Ċ x", "Ã©"])
def test_the_text_of_an_added_token_is_its_content(tmp_path, content: str, special: bool) -> None:
    # transformers 5 decodes these letters as the bytes that GPT-2 spells with them.
    plain = load_tokenizer(write_tokenizer(tmp_path / "plain", "byte_level"))
    entry = {"content": content, "special": special}
    folder = write_tokenizer(
        tmp_path / "more", "byte_level", added_tokens_decoder={str(plain.vocab_size): entry}
    )
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(f"the {content}!", add_special_tokens=False)
    assert plain.vocab_size in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"the {content}!"
    assert tokenizer.token_text(plain.vocab_size) == content


def test_a_piece_of_the_vocabulary_that_is_also_added_keeps_its_bytes(tmp_path) -> None:
    folder = write_tokenizer(tmp_path, "byte_level")
    plain = load_tokenizer(folder)
    the = plain.encode("x the", add_special_tokens=False)[-1]
    assert plain.convert_ids_to_tokens(the) == "Ġthe"
    (folder / "added_tokens.json").write_text(json.dumps({"Ġthe": the}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("x the", False)[-1] == the and tokenizer.decode([the]) == " the"


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "sentencepiece_unigram"])
def test_flags_reach_pieces_of_sentencepiece(tmp_path, kind: str) -> None:
    piece = load_tokenizer(write_tokenizer(tmp_path / "plain", kind)).encode("the", False)[-1]
    content = load_tokenizer(tmp_path / "plain").convert_ids_to_tokens(piece)
    entry = {"content": content, "special": False, "lstrip": True}
    folder = write_tokenizer(
        tmp_path / "more",
        kind,
        added_tokens_decoder={str(piece): entry},
        extra_special_tokens=[content, {"content": "<new>", "rstrip": True}],
    )
    tokenizer = load_tokenizer(folder)
    new = tokenizer.token_id("<new>")
    assert {piece, new} <= tokenizer.special_ids
    assert tokenizer.encode(f"<new>  {content}", False) == [new, piece]
    assert tokenizer.encode(f"<new>x  {content}", False)[-1] == piece
    assert tokenizer.decode([new, piece]) == ""


@pytest.mark.agreement
@pytest.mark.parametrize("case", sorted(CASES.keys() - _NOT_AS_IN_5))
def test_flags_agree_with_transformers(tmp_path, case: str) -> None:
    from transformers import AutoTokenizer

    known, config, *_ = CASES[case]
    folder = _folder(tmp_path, known, config)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in _TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
