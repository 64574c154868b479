"""The README says what is true: its map, tables, diagram and commands are compared with the code."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from service.job import QUEUED, RETRY_FROM, TRANSITIONS
from service.middlewares import STATUS_TABLE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", README.split(f"## {title}\n", 1)[1], flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_the_settings_table_names_exactly_the_variables_that_are_read():
    read = set(re.findall(r'env\.\w+\("([A-Z_]+)"', (ROOT / "service/settings.py").read_text()))
    assert {row[0] for row in rows("Settings")} == read


def test_the_defaults_in_the_settings_table_are_those_of_the_code(monkeypatch):
    from service.settings import Settings

    for name in ("DATABASE_URL", "DATABASE_DIRECT_URL", "REDIS_URL", *(row[0] for row in rows("Settings"))):
        monkeypatch.delenv(name, raising=False)
    settings = Settings.read()
    told = {row[0]: row[1] for row in rows("Settings") if not row[1].startswith(("none", "`DATABASE"))}
    held = {
        "JOBWIRE_HOST": settings.host,
        "JOBWIRE_PORT": settings.port,
        "JOBWIRE_DATA": settings.data_folder,
        "JOBWIRE_POOL_SIZE": settings.pool_size,
        "JOBWIRE_PREPARED_STATEMENTS": str(settings.prepared_statements).lower(),
        "JOBWIRE_DATABASE_TIMEOUT": settings.database_timeout_s,
        "JOBWIRE_REDIS_DEADLINE": settings.redis_deadline_s,
        "JOBWIRE_MEMORY_ENTRIES": settings.memory_entries,
        "JOBWIRE_MEMORY_BYTES": settings.memory_bytes,
        "JOBWIRE_MAX_STREAMS_PER_KEY": settings.max_streams_per_key,
        "JOBWIRE_TRUSTED_PROXIES": ",".join(settings.trusted_proxies) or "empty",
        "JOBWIRE_CORS_ORIGINS": ",".join(settings.cors_origins) or "empty",
        "JOBWIRE_DRAIN": settings.drain_s,
        "JOBWIRE_METRICS_LISTEN": "{}:{}".format(*settings.metrics_listen),
        "JOBWIRE_ACCESS_LOG": str(settings.access_log).lower(),
        "JOBWIRE_LOG_LEVEL": settings.log_level,
    }
    assert told == {"DATABASE_DIRECT_URL": "DATABASE_URL"} | {name: str(value) for name, value in held.items()}


def test_the_error_table_names_every_error_type_with_its_status():
    told = {(row[0], int(row[1])) for row in rows("Errors")}
    assert told == {(kind.error_type, status) for kind, (status, _) in STATUS_TABLE.items()}


def test_the_diagram_draws_exactly_the_transitions():
    drawn = set(re.findall(r"^    (\w+) --> (\w+)", section("States"), flags=re.MULTILINE))
    assert drawn == {(a, b) for a, after in TRANSITIONS.items() for b in after} | {(RETRY_FROM, QUEUED)}


def test_the_map_shows_every_module_and_nothing_that_is_not_there():
    house = re.search(r"^```\n(service/.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert house is not None
    told = set(re.findall(r"\b(\w+\.py)\b", house.group(1)))
    there = {path.name for top in ("service", "schemas") for path in (ROOT / top).rglob("*.py")}
    assert told == there - {"__init__.py"}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/\w+(?:\.py|/))`", README))))
def test_every_test_that_the_readme_names_is_there(path):
    assert (ROOT / path).exists()


NAMED_TESTS = re.findall(r"`([\w/]+\.py)::(\w+)`", section("Clients of other APIs"))


def test_each_row_about_other_clients_names_its_tests():
    table_rows = [
        line for line in section("Clients of other APIs").splitlines() if re.match(r"\| (?!what |elsewhere )", line)
    ]
    assert len(table_rows) > 20 and all("::test_" in row for row in table_rows)


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED_TESTS)))
def test_every_test_of_other_clients_that_the_readme_names_is_there(file, name):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_make_help_lists_every_target_that_a_person_may_want():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("install", "run", "test", "test-all", "lint", "types", "format", "migrate"):
        assert f"make {target} " in listed


def test_the_limits_table_is_the_policy_table():
    from service.limiting.policies import POLICIES

    told = {
        cells[0]: cells[1] for cells in re.findall(r"^\| (\w+) \| (\d+ in \d+ s) \|", section("Limits"), re.MULTILINE)
    }
    assert told == {policy.name: f"{policy.most} in {policy.window_s} s" for policy in POLICIES.values()}
