"""Every CHECK in the database bites: a write that violates it alone fails with its name."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

JOB = "update jobs set {}"
VIOLATIONS: dict[str, list[str]] = {
    "account_name_is_a_slug": [
        "update accounts set name = 'Acme'",
        "update accounts set name = ''",
        "update accounts set name = '-a'",
        "update accounts set name = 'a\n'",
        "update accounts set name = repeat('a', 65)",
    ],
    "retention_is_positive": ["update accounts set retention = '0'", "update accounts set retention = '-1 day'"],
    "hash_is_sha256": ["update keys set hash = substr(hash, 2)", "update keys set hash = hash || '\\x00'::bytea"],
    "scopes_are_known": ["update keys set scopes = '{}'", "update keys set scopes = '{jobs:read,jobs:fly}'"],
    "id_is_well_formed": [
        JOB.format(f"id = {text}")
        for text in ("''", "'.a'", "'a b'", "'a/b'", "'ä'", "'a' || chr(10)", "repeat('a', 129)")
    ],
    "status_is_known": [JOB.format("status = 'Queued'"), JOB.format("status = 'processing', started_at = now()")],
    "type_is_a_slug": [JOB.format(f"type = {text}") for text in ("''", "'Extraction'", "'a b'", "repeat('a', 65)")],
    "version_and_attempt_start_at_1": [JOB.format("version = 0"), JOB.format("attempt = 0")],
    "finished_exactly_when_completed_at": [
        JOB.format("completed_at = now(), expires_at = now()"),
        JOB.format("status = 'COMPLETED', progress = '{\"percentage\": 100}'"),
        JOB.format("status = 'FAILED', error = 'x', error_details = '{}'"),
        JOB.format("status = 'CANCELLED', error = 'x', error_details = '{}'"),
    ],
    "expires_exactly_when_finished": [
        JOB.format("expires_at = now()"),
        JOB.format("status = 'COMPLETED', progress = '{\"percentage\": 100}', completed_at = now()"),
    ],
    "processing_has_started": [JOB.format("status = 'PROCESSING'")],
    "failed_and_cancelled_say_why": [
        JOB.format("status = 'FAILED', completed_at = now(), expires_at = now()"),
        JOB.format("status = 'CANCELLED', completed_at = now(), expires_at = now()"),
        JOB.format("status = 'FAILED', error = 'x', completed_at = now(), expires_at = now()"),
        JOB.format("status = 'FAILED', error_details = '{}', completed_at = now(), expires_at = now()"),
        JOB.format("error = 'x', error_details = '{}'"),
        JOB.format("error = 'x'"),
        JOB.format("error_details = '{}'"),
    ],
    "completed_is_100_percent": [
        JOB.format("status = 'COMPLETED', completed_at = now(), expires_at = now()"),
        JOB.format(
            "status = 'COMPLETED', completed_at = now(), expires_at = now(), progress = '{\"percentage\": 99.9}'"
        ),
    ],
    "percentage_is_a_percentage": [
        JOB.format("progress = '{\"percentage\": -0.1}'"),
        JOB.format("progress = '{\"percentage\": 100.1}'"),
    ],
    "only_processing_stalls": [JOB.format("stalled = true")],
    "stalled_action_is_known": [JOB.format("stalled_action = 'ignore'")],
    "heartbeat_timeout_is_positive": [JOB.format("heartbeat_timeout_s = 0")],
    "there_is_one_row": ["insert into job_changes_floor (only_row, xid) values (false, '1')"],
    "digest_is_sha256": [JOB.format("result_id = 1, result_digest = '\\x00'")],
    "result_has_a_digest": [JOB.format("result_id = 1"), JOB.format("result_digest = sha256('r')")],
    "counts_add_up": ["update batches set total = total + 1", "update batches set completed = completed + 1"],
    "no_count_is_negative": [
        f"update batches set queued = queued - 1, {other} = {other} + 1, total = total" for other in ("failed",)
    ]
    + [
        f"update batches set {count} = -1, total = total - 1"
        for count in ("processing", "completed", "failed", "cancelled")
    ],
}


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database with one row in each table that has CHECKs; the job is queued and in a batch."""
    connection = await asyncpg.connect(database)
    await connection.execute(
        """
        insert into accounts (name) values ('one');
        insert into keys (id, account_id, hash, scopes) values ('k', 1, sha256('k'), '{jobs:read}');
        insert into results (content_type, body) values ('text/plain', 'r');
        insert into jobs (account_id, id, type, created_at, changed_at, updated_at, heartbeat_at)
          values (1, 'a', 'extraction', now(), now(), now(), now());
        insert into batches (account_id, id) values (1, 'b');
        """
    )
    yield connection
    await connection.close()


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_a_check_bites(connection: asyncpg.Connection, name: str) -> None:
    for statement in VIOLATIONS[name]:
        with pytest.raises(asyncpg.CheckViolationError) as raised:
            await connection.execute(statement)
        assert raised.value.constraint_name == name, statement


async def test_every_check_of_these_tables_is_proven_to_bite(connection: asyncpg.Connection) -> None:
    """A new CHECK needs a line in VIOLATIONS, and a name that says what is true."""
    rows = await connection.fetch(
        "select conname from pg_constraint where contype = 'c' and connamespace = 'public'::regnamespace"
    )
    assert {row["conname"] for row in rows} == set(VIOLATIONS)


async def test_what_the_checks_allow_is_stored(connection: asyncpg.Connection) -> None:
    """So that none of the violations fails for a reason of its own."""
    await connection.execute(
        """
        update jobs set status = 'PROCESSING', started_at = now(), stalled = true, progress = '{"percentage": 0}';
        update jobs set status = 'COMPLETED', stalled = false, progress = '{"percentage": 100.0}', completed_at = now(), expires_at = now();
        update jobs set status = 'FAILED', error = '', error_details = '{}', progress = '{}';
        update jobs set status = 'queued', error = null, error_details = null, completed_at = null, expires_at = null;
        update jobs set id = 'A.b:c-d_' || repeat('9', 120), type = repeat('z', 64), stalled_action = 'fail', heartbeat_timeout_s = 1;
        update accounts set name = repeat('a', 64), retention = '1 microsecond';
        update batches set total = 5, queued = 1, processing = 1, completed = 1, failed = 1, cancelled = 1;
        """
    )
