"""Tokenizers: the libraries' answers, the folder's flags, and damage reported by file."""

import gzip
import json
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from request.data_folder import data_folder
from request.tiny_tokenizers import KINDS, write_tokenizer
from tokenizers import Tokenizer as Library
from tokenizers import decoders

from jinfer.errors import CheckpointError, RequestError
from jinfer.request.tokenizer import load_tokenizer

_SP = ["sentencepiece_bpe", "sentencepiece_unigram"]
_TEXTS = [
    "the sea shore",
    "  two  spaces ",
    "",
    " ",
    "h\u00e9 \u4f60\u597d \N{SLICE OF PIZZA}\n\t",
    "a\u2581b",
]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_special_tokens(tmp_path, kind: str) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, kind))
    for text in _TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id and tokenizer.encode(text, False) == ids[1:]
        marked = text if kind == "byte_level" else text.replace("\u2581", " ")
        assert tokenizer.decode(ids) == marked
        assert all(0 <= one < tokenizer.vocab_size for one in ids)
    inst = tokenizer.token_id("[INST]")
    ids = tokenizer.encode("<s>[INST]ab</s>", add_special_tokens=False)
    assert ids[:2] == [tokenizer.bos_token_id, inst] and ids[-1] == tokenizer.eos_token_id
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, inst} <= tokenizer.special_ids
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "<s>[INST]ab</s>"
    assert tokenizer.decode(ids).strip() == "ab"
    assert tokenizer.token_text(inst) == "[INST]" and tokenizer.token_id("no such") is None
    assert tokenizer.template_variables.items() >= {"bos_token": "<s>", "eos_token": "</s>"}.items()
    assert tokenizer.pad_token is None or kind in _SP


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_silent(tmp_path, kind: str) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, kind))
    assert tokenizer.decode([tokenizer.vocab_size + 7, np.int32(tokenizer.vocab_size)]) == ""
    assert tokenizer.decode([-1]) == tokenizer.decode(-1) == ""


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), ids=st.lists(st.integers(0, 319), max_size=20))
def test_byte_level_equals_the_library(tmp_path_factory, text: str, ids: list[int]) -> None:
    folder = write_tokenizer(tmp_path_factory.getbasetemp() / "byte_level", "byte_level")
    tokenizer, library = load_tokenizer(folder), Library.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(text, False) == library.encode(text).ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), ids=st.lists(st.integers(260, 271), max_size=20))
def test_byte_fallback_equals_the_library(tmp_path_factory, text: str, ids: list[int]) -> None:
    folder = write_tokenizer(tmp_path_factory.getbasetemp() / "byte_fallback", "byte_fallback")
    tokenizer, library = load_tokenizer(folder), Library.from_file(str(folder / "tokenizer.json"))
    encoded = library.encode(text).ids
    assert tokenizer.encode(text) == encoded
    for some in (encoded, ids):
        for skip in (True, False):
            assert tokenizer.decode(some, skip) == library.decode(some, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", _SP)
def test_sentencepiece_equals_the_library(tmp_path, kind: str) -> None:
    folder = write_tokenizer(tmp_path, kind)
    tokenizer = load_tokenizer(folder)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rng = np.random.default_rng(0)
    for text in _TEXTS:
        assert tokenizer.encode(text, False) == library.encode(text)
        assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))
    for _ in range(50):  # no byte pieces and no control pieces: there the two differ on purpose
        ids = rng.integers(260, tokenizer.vocab_size, 8).tolist()
        assert tokenizer.decode(ids) == library.decode(ids)


def test_legacy_gives_every_stretch_its_space(tmp_path) -> None:
    kind = "sentencepiece_bpe"
    modern = load_tokenizer(write_tokenizer(tmp_path / "modern", kind))
    legacy = load_tokenizer(write_tokenizer(tmp_path / "legacy", kind, legacy=True))
    the = modern.encode("the", False)
    inst = modern.token_id("[INST]")
    assert legacy.encode("the[INST]the", False) == [*the, inst, *the]
    later = modern.encode("the[INST]the", False)
    assert later[: len(the) + 1] == [*the, inst] and later[len(the) + 1 :] != the
    assert modern.decode(later) == "thethe" and legacy.decode([*the, inst, *the]) == "the the"
    assert modern.encode("[INST]the", False)[0] == inst


@pytest.mark.parametrize("kind", ["byte_level", *_SP])
def test_flags_of_llama_classes_rule(tmp_path, kind: str) -> None:
    for bos, eos in ((True, True), (False, False), (False, True)):
        folder = write_tokenizer(tmp_path, kind, add_bos_token=bos, add_eos_token=eos)
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("the")
        assert (ids[0] == tokenizer.bos_token_id) == bos
        assert (ids[-1] == tokenizer.eos_token_id) == eos


def test_post_processor_rules_other_classes_and_fills_gaps(tmp_path) -> None:
    kind = "byte_fallback"
    other = write_tokenizer(tmp_path / "a", kind, tokenizer_class="X", add_bos_token=False)
    assert load_tokenizer(other).encode("ab")[0] == 1
    silent = write_tokenizer(tmp_path / "b", kind, add_bos_token=None, add_eos_token=True)
    ids = load_tokenizer(silent).encode("ab")
    assert (ids[0], ids[-1]) == (1, 2)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe"])
def test_added_tokens_of_the_config(tmp_path, kind: str) -> None:
    plain = load_tokenizer(write_tokenizer(tmp_path / "plain", kind))
    first = plain.vocab_size
    entries = {
        str(first): {"content": "<tool>", "special": True, "rstrip": True},
        str(first + 1): {"content": "<think>", "special": False, "lstrip": True},
    }
    folder = write_tokenizer(
        tmp_path / "more",
        kind,
        added_tokens_decoder=entries,
        additional_special_tokens=["<late>"],
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == first + 3
    a, b = plain.encode("the", False), tokenizer.encode("the <think><tool>  ", False)
    assert b == [*a, first + 1, first]
    assert tokenizer.decode(b) == "the<think>" and tokenizer.special_ids >= {first, first + 2}
    assert tokenizer.encode("<late>", False) == [first + 2]


def test_older_files_speak_where_the_config_is_silent(tmp_path) -> None:
    folder = write_tokenizer(tmp_path, "sentencepiece_bpe")
    size = load_tokenizer(folder).vocab_size
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "<pad>", "eos_token": "[INST]"})
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == size and size in tokenizer.special_ids
    assert tokenizer.eos_token == "</s>"  # from the model itself
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eos_token == "[INST]"


def test_chat_templates(tmp_path) -> None:
    assert load_tokenizer(write_tokenizer(tmp_path, "byte_level")).chat_template is None
    folder = write_tokenizer(tmp_path, "byte_level", chat_template="one")
    assert load_tokenizer(folder).chat_template == "one"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    folder = write_tokenizer(tmp_path, "byte_level", chat_template=named)
    assert load_tokenizer(folder).chat_templates == {"default": "d", "tool_use": "t"}
    (folder / "chat_template.jinja").write_text("file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("r")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == "file"
    assert tokenizer.chat_templates == {"default": "file", "tool_use": "t", "rag": "r"}


def _expect_damage(folder, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_absence_and_damage_name_the_file(tmp_path) -> None:
    _expect_damage(tmp_path, "needs tokenizer.json or tokenizer.model; got neither in .*Copy one")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    _expect_damage(tmp_path, "tokenizer.model must be readable; got .*Download the file again")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    _expect_damage(tmp_path, "tokenizer.model must be readable")
    (tmp_path / "tokenizer.json").write_text('{"model":')
    _expect_damage(tmp_path, "tokenizer.json must be readable; got .*Download the file again")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    _expect_damage(tmp_path, "tokenizer.json must be readable; got .*codec")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "tokenizer_config.json must be readable; got .*not JSON"),
        ("[]", "tokenizer_config.json must be readable; got .*must be dict"),
        ("[" * 100_000, "tokenizer_config.json must be readable; got .*not JSON"),
        ('{"bos_token": 3}', "bos_token must be str, and is 3"),
        ('{"bos_token": {"contents": "x"}}', "bos_token must be str, and is None"),
        ('{"add_bos_token": "yes"}', "add_bos_token must be bool, and is 'yes'"),
        ('{"added_tokens_decoder": {"x": {"content": "y"}}}', "has the key 'x', not a token id"),
        ('{"added_tokens_decoder": {"1": "y"}}', "added_tokens_decoder must be dict"),
        ('{"chat_template": 3}', "chat_template must be list, and is 3"),
        ('{"chat_template": [{"name": "x"}]}', "x must be str, and is None"),
        ('{"added_tokens_decoder": {"9": {"content": "<zz>"}}}', "must agree with tokenizer"),
    ],
)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe"])
def test_damaged_config(tmp_path, kind: str, config: str, message: str) -> None:
    folder = write_tokenizer(tmp_path, kind)
    (folder / "tokenizer_config.json").write_text(config)
    _expect_damage(folder, message)


def test_other_decoders_are_declined(tmp_path) -> None:
    folder = write_tokenizer(tmp_path, "byte_level")
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.decoder = decoders.WordPiece()
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(NotImplementedError, match='must be made of ByteLevel.*got .*"WordPiece"'):
        load_tokenizer(folder)


def test_metaspace_decoder(tmp_path) -> None:
    folder = write_tokenizer(tmp_path, "byte_fallback")
    library = Library.from_file(str(folder / "tokenizer.json"))
    for scheme, want in (("always", "ab"), ("never", " ab")):
        library.decoder = decoders.Metaspace(prepend_scheme=scheme)
        library.save(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode([tokenizer.token_id("\u2581ab")]) == want
        assert library.decode([tokenizer.token_id("\u2581ab")]) == want


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe"])
def test_half_a_surrogate_pair_is_refused(tmp_path, kind: str) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, kind))
    with pytest.raises(RequestError, match=r"valid Unicode; got '\\ud800' at character 2. Replace"):
        tokenizer.encode("ab\ud800")


def test_gpt2() -> None:
    tokenizer = load_tokenizer(data_folder("tokenizers") / "gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]  # as in transformers
    assert tokenizer.encode("hi<|endoftext|>") == [5303, 50256]
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (50257, {50256})


def test_deepseek_r1(tmp_path) -> None:
    source = data_folder("tokenizers") / "deepseek-r1"
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(
        gzip.decompress((source / "tokenizer.json.gz").read_bytes())
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hello world") == [0, 19923, 2058]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.vocab_size == 128815 and "<\uff5cUser\uff5c>" in tokenizer.chat_template
    user = tokenizer.encode("<\uff5cUser\uff5c>", add_special_tokens=False)
    assert [tokenizer.token_text(one) for one in user] == ["<\uff5cUser\uff5c>"]


@pytest.mark.parametrize(
    ("name", "ids"), [("mistral-v1", [1, 22557, 1526]), ("mistral-v3", [1, 23325, 2294])]
)
def test_mistral(name: str, ids: list[int]) -> None:
    tokenizer = load_tokenizer(data_folder("tokenizers") / name)
    assert tokenizer.encode("Hello world") == ids
    assert tokenizer.decode(ids) == "Hello world"
    assert tokenizer.decode(tokenizer.encode(text := "\u4f60\u597d \N{SLICE OF PIZZA} x")) == text
    assert len(tokenizer.encode("[INST]", False)) == (1 if name == "mistral-v3" else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_under_names_of_hugging_face(tmp_path, kind: str) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, kind, unk_token="[INST]"))
    vocab = tokenizer.get_vocab()
    assert len(vocab) == len(tokenizer) == tokenizer.vocab_size
    ids = tokenizer.encode("ab the")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "<s>" and [vocab[token] for token in tokens] == ids
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) == tokens[1:]
    assert tokenizer.convert_ids_to_tokens(ids[1]) == tokens[1]
    assert tokenizer.convert_tokens_to_ids(tokens[1]) == ids[1]
    assert tokenizer.convert_ids_to_tokens([len(vocab), -1]) == [None, None]
    assert tokenizer.convert_tokens_to_ids(["no such"]) == [tokenizer.token_id("[INST]")]
    assert tokenizer.unk_token_id == vocab["[INST]"]
    assert tokenizer.all_special_ids == sorted(tokenizer.special_ids)
    assert {"<s>", "</s>", "[INST]"} <= set(tokenizer.all_special_tokens)
    assert tokenizer.decode(ids[1]) == tokenizer.decode([ids[1]])


def test_no_unk_token_means_no_id(tmp_path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, "byte_level"))
    assert tokenizer.convert_tokens_to_ids("no such") is None and tokenizer.unk_token_id is None


def test_apply_chat_template(tmp_path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}>{{ mode }}{% endif %}"
    )
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, "byte_level", chat_template=template))
    chat, other = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "a"}]
    apply = tokenizer.apply_chat_template
    assert apply(chat, tokenize=False) == "<s>[hi]"
    assert apply(chat, tokenize=False, add_generation_prompt=True, mode="x") == "<s>[hi]>x"
    assert apply(chat, tokenize=False, continue_final_message=True) == "<s>[hi"
    assert apply(chat, tokenize=False, chat_template="{{ tools }}", tools=[{}]) == "[{}]"
    assert apply([chat, other], tokenize=False) == ["<s>[hi]", "<s>[a]"]
    ids = tokenizer.encode("<s>[hi]", add_special_tokens=False)
    assert ids[0] == tokenizer.bos_token_id and apply(chat) == ids
    assert apply(chat, return_tensors=None, padding=False) == ids
    named = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert apply(chat, return_dict=True) == named
    assert apply([chat, chat], return_dict=True)["input_ids"] == [ids, ids]
    with pytest.raises(RequestError, match="lists of token ids; got return_tensors='pt'. Leave it"):
        apply(chat, return_tensors="pt")
    with pytest.raises(RequestError, match="at least one message; got none"):
        apply([])


@pytest.mark.agreement
@pytest.mark.parametrize("kind", KINDS[:3])  # its Llama class reads no unigram model
def test_agrees_with_transformers(tmp_path, kind: str) -> None:
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    # 4.x's Llama tokenizer is sentencepiece; 5.x drops the dummy space before a text that begins
    # with one, so such texts are left out.
    folder = write_tokenizer(tmp_path, kind, eos_token="</s>", unk_token=None)
    loader = LlamaTokenizer if kind in _SP else PreTrainedTokenizerFast
    theirs, ours = loader.from_pretrained(folder), load_tokenizer(folder)
    for text in ("the sea", "<s>[INST]the</s>", "h\u00e9 \u4f60 the"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, False) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
