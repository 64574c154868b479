"""What is in a document: its pages, their words, and which words are the most frequent. Pure: bytes in, text out."""

from __future__ import annotations

import codecs
import io
import logging
import re
from collections import Counter
from typing import Any, Final, Protocol

from pypdf import PdfReader

LINES_PER_PAGE: Final = 20
"""A text has no pages of its own: this many lines make one."""
SHORTEST_TERM: Final = 4
MOST_TERMS: Final = 4
PDF_BEGINS: Final = b"%PDF-"

_ENCODINGS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WORD: Final = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_COMMON_WORDS: Final = (
    "about after again against also always another because been before being between both cannot could does each "
    "else even ever every from given have here into itself just like made make many might more most much must never "
    "none nothing once only other otherwise over same shall should since some such than that their them then there "
    "these they this those through true under until upon very well were what when where whether which while whom "
    "whose will with within without would your"
)
_COMMON: Final = frozenset(_COMMON_WORDS.split())

logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it cannot read it raises; saying it twice helps nobody


class NoText(Exception):
    """The content is neither a PDF nor text."""


class Document(Protocol):
    """A document that is read page by page."""

    @property
    def page_count(self) -> int:
        """How many pages it has; an empty text has none."""

    def page(self, number: int) -> str:
        """The text of a page, counted from 1. Raises what its library raises if the page cannot be read."""


class PdfDocument:
    """A PDF, read by pypdf."""

    def __init__(self, content: bytes) -> None:
        self._pages = PdfReader(io.BytesIO(content)).pages
        self._count = len(self._pages)

    @property
    def page_count(self) -> int:
        """As the PDF's page tree tells it."""
        return self._count

    def page(self, number: int) -> str:
        """The text of a page, counted from 1."""
        return self._pages[number - 1].extract_text()


class TextDocument:
    """A text; every LINES_PER_PAGE lines are a page."""

    def __init__(self, content: bytes) -> None:
        self._lines = decoded(content).splitlines()

    @property
    def page_count(self) -> int:
        """Whole pages and the rest."""
        return -(-len(self._lines) // LINES_PER_PAGE)

    def page(self, number: int) -> str:
        """The text of a page, counted from 1."""
        return "\n".join(self._lines[(number - 1) * LINES_PER_PAGE : number * LINES_PER_PAGE])


def open_document(name: str, content: bytes) -> Document:
    """A document by what it is, or says it is. Raises NoText, or pypdf's errors for a PDF that is none."""
    if is_pdf(name) or content.startswith(PDF_BEGINS):
        return PdfDocument(content)
    return TextDocument(content)


def is_pdf(name: str) -> bool:
    """Whether the name says so."""
    return name.lower().endswith(".pdf")


def decoded(content: bytes) -> str:
    """Text in the encoding that its first bytes name, else UTF-8, else Windows-1252. Raises NoText."""
    for mark, encoding in _ENCODINGS:
        if content.startswith(mark):
            return content.decode(encoding, "replace")
    if (at := content.find(0)) >= 0:
        raise NoText(f"Binary content: a NUL byte at offset {at}")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


class Extraction:
    """What has been found in the pages of one document so far."""

    def __init__(self) -> None:
        self._pages = 0
        self._words = 0
        self._terms: Counter[str] = Counter()

    def add(self, page: str) -> None:
        """Counts one more page."""
        words = [word.lower() for word in _WORD.findall(page)]
        self._pages += 1
        self._words += len(words)
        self._terms.update(word for word in words if len(word) >= SHORTEST_TERM and word not in _COMMON)

    def result(self) -> dict[str, Any]:
        """What is stored as the job's result. Equally frequent terms stand in the order of the alphabet."""
        ranked = sorted(self._terms.items(), key=lambda term: (-term[1], term[0]))
        terms = [{"term": term, "count": count} for term, count in ranked[:MOST_TERMS]]
        return {"pages": self._pages, "words": self._words, "terms": terms}
