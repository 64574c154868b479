"""Loads the SQL that stands beside its store: sections of `-- name: <name>`, a comment that explains, one statement."""

from __future__ import annotations

import re
from pathlib import Path

_SECTION = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load(owner: str) -> dict[str, str]:
    """The statements of `<owner>.sql` by name; `owner` is the module's stem, such as `job_table`."""
    _, *parts = _SECTION.split(Path(__file__).with_name(f"{owner}.sql").read_text(encoding="utf-8"))
    return {name: statement.strip().rstrip(";") for name, statement in zip(parts[::2], parts[1::2], strict=True)}
