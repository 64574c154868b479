"""The statement inside a SQL function, prepared as the function runs it; and how to look at plans."""

import json
import re
from collections.abc import Iterator
from typing import Any

import asyncpg

Plan = dict[str, Any]
_STATEMENT = re.compile(r"\breturn query\s+(with .*?);\s*end\b", re.DOTALL)
_ARGUMENTS = re.compile(r"\bunnest\((.*?)\)", re.DOTALL)


class Inner:
    """The one statement of a function that returns it, prepared under `name` with the function's own settings."""

    def __init__(self, name: str, types: list[str]) -> None:
        self.name = name
        self.types = types

    def execute(self, values: list[str] | None = None) -> str:
        """The EXECUTE, with SQL literals (nulls if there are none)."""
        return f"execute {self.name} ({', '.join(values or [f'null::{kind}' for kind in self.types])})"


async def prepare_inner(connection: asyncpg.Connection, function: str) -> Inner:
    """Prepares it; the settings stay with the session. The function's arguments stand in its first unnest()."""
    row = await connection.fetchrow(
        "select prosrc, proargnames, proargtypes::regtype[]::text[] as types, coalesce(proconfig, '{}') as settings"
        " from pg_proc where proname = $1",
        function,
    )
    assert row is not None, f"there is no function {function}"
    names = row["proargnames"][: len(row["types"])]
    found = _STATEMENT.search(row["prosrc"])
    assert found, f"{function} is not written as one statement"
    places = {name: f"${number}" for number, name in enumerate(names, start=1)}
    statement = _ARGUMENTS.sub(lambda given: f"unnest({_replaced(given[1], places)})", found[1], count=1)
    for setting in row["settings"]:
        name, _, value = setting.partition("=")
        await connection.execute("select set_config($1, $2, false)", name, value)
    inner = f"inner_of_{function}"
    await connection.execute(f"prepare {inner} ({', '.join(row['types'])}) as {statement}")
    return Inner(inner, row["types"])


async def explained(connection: asyncpg.Connection, statement: str) -> list[Plan]:
    """All nodes of the plan of a statement without parameters (an EXECUTE, say)."""
    return list(nodes(json.loads(await connection.fetchval(f"explain (format json) {statement}"))[0]["Plan"]))


def nodes(plan: Plan) -> Iterator[Plan]:
    """A plan and all beneath it."""
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


def _replaced(text: str, places: dict[str, str]) -> str:
    return re.sub(r"\w+", lambda word: places.get(word[0], word[0]), text)
