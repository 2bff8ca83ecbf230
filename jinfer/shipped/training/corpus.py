"""Turns folders of public-domain books into clean documents, a tokenizer and token streams.

Expects a folder with `standardebooks/*.txt` (sections separated by two blank lines) and
`fairytaleqa/{train,val,test}.jsonl` (one tale per line, with its `sections`).
"""

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

VOCAB_SIZE = 4096
HELD_OUT_BOOK = "eleanor-h-porter_pollyanna"

# Short, complete tales in plain language: read twice per epoch.
TALE_BOOKS = (
    "aesop_fables_v-s-vernon-jones",
    "beatrix-potter_short-fiction",
    "jacob-grimm_wilhelm-grimm_household-tales_margaret-hunt",
)
# Longer children's books, one document per chapter: read once per epoch.
STORY_BOOKS = (
    "a-a-milne_winnie-the-pooh",
    "anna-sewell_black-beauty",
    "e-nesbit_five-children-and-it",
    "e-nesbit_the-enchanted-castle",
    "e-nesbit_the-railway-children",
    "e-nesbit_the-story-of-the-treasure-seekers",
    "frances-hodgson-burnett_a-little-princess",
    "frances-hodgson-burnett_the-secret-garden",
    "george-macdonald_the-princess-and-the-goblin",
    "hugh-lofting_the-story-of-doctor-dolittle",
    "j-m-barrie_peter-and-wendy",
    "johanna-spyri_heidi_elisabeth-p-stork",
    "kenneth-grahame_the-wind-in-the-willows",
    "l-frank-baum_dorothy-and-the-wizard-in-oz",
    "l-frank-baum_ozma-of-oz",
    "l-frank-baum_the-marvelous-land-of-oz",
    "l-frank-baum_the-road-to-oz",
    "l-frank-baum_the-wonderful-wizard-of-oz",
    "lewis-carroll_alices-adventures-in-wonderland_john-tenniel",
    "lewis-carroll_through-the-looking-glass_john-tenniel",
    "rudyard-kipling_just-so-stories",
    "rudyard-kipling_the-jungle-book",
)

_FRONT_MATTER = re.compile(
    r"(introduction|preface|author.s note|to my readers|dedication|the chess game|endnotes|"
    r"part [ivx]+|contents)\b",
    re.IGNORECASE,
)
_SENTENCE_END = (".", "!", "?", '"', "'", ":", ";", ",", "—", ")", "*")
_PLAIN = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "′": "'",
        "…": "...",
        "‑": "-",
        "–": "-",
        "−": "-",
        "⸺": "—",
        "⸻": "—",
        "\u00a0": " ",
        "\u200a": "",
        "\u200b": "",
        "\u2009": "",
        "\u2060": "",
        "\ufeff": "",
        "\t": " ",
    }
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Cleaned documents. Paragraphs are separated by one blank line, verses by a newline."""

    tales: list[str]
    stories: list[str]
    held_out_tales: list[str]
    held_out_book: list[str]


def load_corpus(folder: Path) -> Corpus:
    """Reads and cleans every text; drops training documents that overlap the held-out ones."""
    books = folder / "standardebooks"
    held_out_tales = _fairytales(folder / "fairytaleqa" / "test.jsonl")
    held_out_book = _book(books / f"{HELD_OUT_BOOK}.txt")
    seen = _shingles(held_out_tales + held_out_book)
    tales = [doc for name in TALE_BOOKS for doc in _book(books / f"{name}.txt")]
    for split in ("train", "val"):
        tales += _fairytales(folder / "fairytaleqa" / f"{split}.jsonl")
    stories = [doc for name in STORY_BOOKS for doc in _book(books / f"{name}.txt")]
    return Corpus(
        tales=_without_overlap(tales, seen),
        stories=_without_overlap(stories, seen),
        held_out_tales=held_out_tales,
        held_out_book=held_out_book,
    )


def plain_text(text: str) -> str:
    """Returns the text with straight quotes, single spaces and no invisible characters."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_PLAIN)
    text = re.sub(r"\s*--+\s*", "—", text)
    text = re.sub(r"[_\[\]{}|<>`*]", "", text)
    return re.sub(r"[ \xa0]+", " ", text)


def _book(path: Path) -> list[str]:
    """Splits a book into chapters or tales, without headings and front matter."""
    documents = []
    for section in re.split(r"\n{3,}", path.read_text(encoding="utf-8")):
        if _FRONT_MATTER.match(section.strip()) and len(section) < 12_000:
            continue
        documents += _split_at_headings(re.split(r"\n\n", plain_text(section)))
    return [doc for doc in documents if len(doc) > 200]


def _split_at_headings(paragraphs: Sequence[str]) -> list[str]:
    """Starts a new document at each heading: a short paragraph without a sentence end.

    A heading is a single capitalised line; verses have several lines or end in punctuation.
    """
    documents: list[list[str]] = [[]]
    for paragraph in paragraphs:
        paragraph = paragraph.strip()
        if not paragraph:
            continue
        is_heading = (
            len(paragraph) < 70
            and "\n" not in paragraph
            and not paragraph.endswith(_SENTENCE_END)
            and (paragraph[0].isupper() or paragraph[0].isdigit())
        )
        if is_heading:
            documents.append([])
        else:
            documents[-1].append("\n".join(line.strip() for line in paragraph.split("\n")))
    return ["\n\n".join(doc) for doc in documents if doc]


def _fairytales(path: Path) -> list[str]:
    """Reads tales and undoes hard line wraps."""
    tales = []
    for line in path.read_text(encoding="utf-8").splitlines():
        sections = [plain_text(section) for section in json.loads(line)["sections"]]
        paragraphs = [p for section in sections for p in _unwrapped(section)]
        tale = "\n\n".join(paragraphs)
        # Old editions set the first word in capitals.
        shout = re.match(r"(?:A |I )?[A-Z]{2,}(?: [A-Z]{2,})*\b", tale)
        if shout:
            tale = shout.group().capitalize() + tale[shout.end() :]
        tales.append(tale)
    return tales


def _unwrapped(section: str) -> Iterable[str]:
    """Yields paragraphs; joins a line to the next unless it looks like a paragraph end."""
    lines = [line.strip() for line in section.split("\n")]
    width = max((len(line) for line in lines), default=0)
    is_wrapped = width <= 90
    paragraph: list[str] = []
    for line in lines:
        if line:
            paragraph.append(line)
        ends = line.endswith((".", "!", "?", '"', "'")) and (
            not is_wrapped or len(line) < width - 14
        )
        if paragraph and (not line or ends):
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)


def _shingles(documents: Iterable[str], *, num_words: int = 12) -> set[int]:
    """Hashes of all runs of `num_words` words; ignores case and punctuation."""
    found = set()
    for document in documents:
        words = re.findall(r"[a-z]+", document.lower())
        for start in range(len(words) - num_words + 1):
            found.add(hash(tuple(words[start : start + num_words])))
    return found


def _without_overlap(documents: Iterable[str], seen: set[int]) -> list[str]:
    """Drops documents if more than 2% of their word runs also occur in held-out text."""
    kept = []
    for document in documents:
        own = _shingles([document])
        if not own or len(own & seen) <= 0.02 * len(own):
            kept.append(document)
    return kept


def train_tokenizer(documents: Iterable[str]) -> bytes:
    """Returns a serialized SentencePiece BPE model: reversible, with byte fallback.

    No dummy prefix, so that a word has the same pieces at the start of a text and of a paragraph.
    A newline is the byte piece <0x0A>, as in Llama's tokenizer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            line for doc in documents for line in doc.split("\n") if line.strip()
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        required_chars="0123456789é&/@#$%+=*_[]{}<>",
        max_sentence_length=100_000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=2,
        minloglevel=1,
    )
    return model.getvalue()


def encode(tokenizer: sentencepiece.SentencePieceProcessor, documents: Sequence[str]):
    """Returns one uint16 array per document: `<s>`, its tokens, `</s>`."""
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    return [np.array([bos, *ids, eos], np.uint16) for ids in tokenizer.encode(list(documents))]


def shuffled_stream(documents: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Returns one epoch: all documents concatenated, in a new order."""
    return np.concatenate([documents[i] for i in rng.permutation(len(documents))])
