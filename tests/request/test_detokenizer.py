"""Text as it arrives equals the text of the whole."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from request.tiny_tokenizers import KINDS, write_tokenizer

from jinfer.request.detokenizer import Detokenizer
from jinfer.request.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tok"), request.param))


def _stream(detokenizer: Detokenizer, ids: list[int], chunk: int = 1) -> list[str]:
    pieces = [detokenizer.feed(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    return [*pieces, detokenizer.flush()]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans(), chunk=st.integers(1, 3))
def test_pieces_join_to_decode(tokenizer: Tokenizer, data, skip: bool, chunk: int) -> None:
    # A few past the end: padded logits can yield ids the vocabulary lacks.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=20))
    pieces = _stream(Detokenizer(tokenizer, skip_special_tokens=skip), ids, chunk)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20), cut=st.integers(0, 60))
def test_output_continues_the_prompt(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    prompt, output = ids[:cut], ids[cut:]
    pieces = _stream(Detokenizer(tokenizer, prompt_ids=prompt), output)
    # A prompt may end inside a character, which then belongs to the output.
    before = tokenizer.decode(prompt).rstrip("\ufffd")
    whole = tokenizer.decode(ids)
    if "\ufffd" not in text:
        # Without any output, the unfinished character is the prompt's.
        assert before + "".join(pieces) == (whole if output else before)
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans(), chunk=st.integers(1, 3))
def test_an_unfinished_character_of_the_prompt_is_not_in_the_output(
    tokenizer: Tokenizer, data, skip: bool, chunk: int
) -> None:
    cut = tokenizer.encode("ab\N{SLICE OF PIZZA}", add_special_tokens=False)
    cut = cut[: data.draw(st.integers(len(cut) - 3, len(cut) - 1))]
    specials = data.draw(st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=4))
    prompt = [*cut, *specials]
    output = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, prompt_ids=prompt)
    got = "".join(_stream(detokenizer, output, chunk))
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    # Either the whole text begins with the prompt's, or the output completed its last character.
    assert got == whole.removeprefix(before if whole.startswith(before) else before[:-1])


def test_the_unfinished_character_of_a_prompt_is_completed_or_left(tokenizer: Tokenizer) -> None:
    *cut, last = tokenizer.encode("a\N{SLICE OF PIZZA}", add_special_tokens=False)
    word = tokenizer.encode("b", add_special_tokens=False)[-1:]
    b = tokenizer.token_text(word[0])

    def text(output: list[int]) -> str:
        return "".join(_stream(Detokenizer(tokenizer, prompt_ids=cut), output))

    assert text([last, *word]) == "\N{SLICE OF PIZZA}" + b
    assert text(word) == b
    assert text([]) == ""
    assert text([*word, last]) == b + "\ufffd"  # a byte alone, which is the output's own


def test_a_character_is_never_cut(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\N{SLICE OF PIZZA}b", add_special_tokens=False)
    pieces = _stream(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == "a\N{SLICE OF PIZZA}b"
    assert "\N{SLICE OF PIZZA}" in [piece.strip("ab") for piece in pieces]


def test_an_unfinished_character_is_flushed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab\N{SLICE OF PIZZA}", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(ids) == "ab"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_the_space_between_prompt_and_output_stays(tmp_path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, "sentencepiece_bpe"))
    the = tokenizer.encode("the", add_special_tokens=False)
    assert "".join(_stream(Detokenizer(tokenizer), the)) == "the"
    assert "".join(_stream(Detokenizer(tokenizer, prompt_ids=the), the)) == " the"
    # A prompt that shows nothing is no text before the output.
    bos = [tokenizer.bos_token_id]
    assert "".join(_stream(Detokenizer(tokenizer, prompt_ids=bos), the)) == "the"
