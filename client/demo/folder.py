"""Which documents the demo works on, and the folder in which they lie ready for the worker."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from reportlab.lib.pagesizes import A4
from reportlab.pdfgen.canvas import Canvas

from client.demo.documents import is_pdf, open_document

ROOT: Final = Path(__file__).parents[2]
README: Final = ROOT / "README.md"
MADE_PDF: Final = "README.pdf"
CUT_PDF: Final = "README-cut-in-half.pdf"

MOST: Final = 10
"""Documents taken from a folder; the two made here come on top."""
MOST_LOOKED_AT: Final = 10_000
LARGEST_PDF: Final = 20 * 1024 * 1024
LARGEST_TEXT: Final = 32 * 1024
SAMPLE: Final = 4096

_NOT_DOCUMENTS: Final = frozenset({"__pycache__", "node_modules", "venv", "build", "dist"})
_OWN: Final = ("README.md", "LICENSE", "CHANGELOG.md")
_OWN_PARTS: Final = ("service/*.py", "service/*/*.py", "service/*/*.sql")
_LINES_PER_PDF_PAGE: Final = 50


def documents_in(folder: Path) -> list[Path]:
    """Every file beneath `folder` that is not hidden and may be read, in the order of their names."""
    found = islice(_walk(folder), MOST_LOOKED_AT)
    return sorted(found, key=lambda path: str(path.relative_to(folder)))


def chosen_from(folder: Path) -> list[Path]:
    """At most MOST of the documents in `folder`: PDFs first, the small ones first; then texts, the long ones first."""
    sized = [(path.stat().st_size, path) for path in documents_in(folder)]
    pdfs = sorted(each for each in sized if is_pdf(each[1].name) and each[0] <= LARGEST_PDF)
    texts = sorted((each for each in sized if 0 < each[0] <= LARGEST_TEXT and _is_text(each[1])), reverse=True)
    return [path for _, path in pdfs + texts][:MOST]


def own_documents() -> list[Path]:
    """The project's own: what a newcomer reads first, and the longest files of the service."""
    first = [ROOT / name for name in _OWN if (ROOT / name).exists()]
    parts = [path for pattern in _OWN_PARTS for path in ROOT.glob(pattern)]
    longest = sorted(parts, key=lambda path: (-path.stat().st_size, path))
    return first + longest[: MOST - len(first)]


def lay_ready(documents: Iterable[Path], source: Path, target: Path) -> list[str]:
    """Links `documents` into `target` by their names beneath `source`; returns the names of the damaged PDFs.

    Where there is no PDF that can be opened, one is made of the README; where there is none that is damaged, half
    of that one is added.
    """
    whole: list[str] = []
    damaged: list[str] = []
    for path in documents:
        name = str(path.relative_to(source))
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(path.resolve())
        if is_pdf(name):
            (whole if _opens(path) else damaged).append(name)
    made = pdf_of(README.read_text(), title=README.name)
    if not whole:
        (target / MADE_PDF).write_bytes(made)
    if not damaged:
        (target / CUT_PDF).write_bytes(made[: len(made) // 2])
        damaged = [CUT_PDF]
    return damaged


def pdf_of(text: str, title: str) -> bytes:
    """A PDF that shows `text` line by line; the same text gives the same bytes."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 95, drop_whitespace=False) or [""]]
    file = io.BytesIO()
    canvas = Canvas(file, pagesize=A4, invariant=1)
    canvas.setTitle(title)
    for start in range(0, len(lines), _LINES_PER_PDF_PAGE):
        shown = canvas.beginText(48, A4[1] - 60)
        shown.setFont("Courier", 8.7, leading=14)
        for line in lines[start : start + _LINES_PER_PDF_PAGE]:
            shown.textLine(line.encode("latin-1", "replace").decode("latin-1"))  # the font that every reader has
        canvas.drawText(shown)
        canvas.showPage()
    canvas.save()
    return file.getvalue()


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in _NOT_DOCUMENTS)
        yield from (path for name in sorted(files) if name[0] != "." and _is_readable(path := Path(place, name)))


def _is_readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)


def _is_text(path: Path) -> bool:
    if is_pdf(path.name):
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(SAMPLE)


def _opens(path: Path) -> bool:
    try:
        open_document(path.name, path.read_bytes())
    except Exception:  # pypdf raises whatever the damage leads to
        return False
    return True
