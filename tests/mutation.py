"""Takes each guard of the truth out of a scratch copy of the tree, and tells which test notices, and how fast.

`make mutation`, or `python -m tests.mutation WORD...` for those whose guard or file has one of these words.
A guard whose removal no test notices is an error, and so is one that is no longer where it was.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".venv", ".git", ".data", "node_modules", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
WITHIN_s = 180
DOWN = "-- migrate:down"


def last_to_define(function: str) -> str:
    """The newest migration that makes a function of the database: what older ones say of it is past."""
    defines = re.compile(rf"^create (?:or replace )?function {function}\(", re.MULTILINE)
    migrations = sorted((ROOT / "service/stores/migrations").glob("*.sql"))
    made = [path for path in migrations if defines.search(path.read_text().partition(DOWN)[0])]
    return str(made[-1].relative_to(ROOT))


REPORT_JOBS, JOBS_UPDATED = last_to_define("report_jobs"), last_to_define("jobs_updated")
CACHE, PUT, FILL, READ = (
    f"service/stores/status_cache.{end}" for end in ("py", "put.lua", "fill.lua", "read_if_newer.lua")
)
PIPE, CONNECTIONS = "service/stores/redis_pipe.py", "service/stores/connections.py"
READER, HUB, APP = "service/status_reader.py", "service/hub.py", "service/app.py"
COLLECTOR, ANNOUNCER, RELAY = (f"service/reporting/{name}.py" for name in ("collector", "announcer", "relay"))
JOINED, LIMITER = "service/stores/joined_reads.py", "service/limiting/limiter.py"

OF_CACHE = "tests/stores/test_status_cache.py::test_"
OF_OUTAGES, OF_DEGRADED, OF_RELAY = (
    "tests/test_outages.py::test_",
    "tests/test_degraded.py::test_",
    "tests/test_relay.py::test_",
)
OF_COLLECTOR, OF_REPORTS = "tests/test_collector.py::test_", "tests/test_report_jobs.py::test_"
OF_COHERENCE, OF_LOSSES = "tests/test_coherence.py::test_", "tests/streaming/test_losses.py::test_"


@dataclass(frozen=True)
class Mutation:
    """`old` stands exactly once in `file` (of a migration: in its first half) and becomes `new`; one of `tests` fails."""

    guard: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    # The cache, rule 1: announce when newer or equal, store when newer
    Mutation(
        "1 a put of the version that is there is announced",
        PUT,
        "held > version then return 0",
        "held >= version then return 0",
        (f"{OF_CACHE}equal_is_announced",),
    ),
    Mutation(
        "1 a put stores nothing older than what is there",
        PUT,
        "  if held and held > version then return 0 end",
        "",
        (f"{OF_CACHE}older_changes_nothing_and_is_not_announced", f"{OF_CACHE}no_entry_is_older_than_what_was_told"),
    ),
    # Rule 2: every entry has a life
    Mutation(
        "2 an entry of another life is a miss",
        READ,
        "if string.sub(head, 1, 8) ~= life then",
        "if #head < 9 or string.sub(head, 1, 1) == '?' then",
        (
            f"{OF_CACHE}another_life_is_a_miss",
            f"{OF_OUTAGES}polls_go_on_and_stay_true_while_redis[is restarted with old data]",
        ),
    ),
    Mutation(
        "2 a put does not go by the version of another life",
        PUT,
        "if string.sub(head, 1, 8) == life and version ~= ABSENCE",
        "if #head == 23 and string.sub(head, 1, 1) ~= '?' and version ~= ABSENCE",
        (f"{OF_CACHE}a_put_clears_an_entry_of_another_life",),
    ),
    Mutation(
        "2 a life is of one run of Redis",
        CACHE,
        "{ANSWER_SHAPE}|{run_id}|{postgres_identity}",
        "{ANSWER_SHAPE}||{postgres_identity}",
        (
            f"{OF_CACHE}redis_restarted_on_old_data_is_another_life",
            f"{OF_DEGRADED}what_a_client_sees_while[Redis failed over to a replica that lagged]",
        ),
    ),
    Mutation(
        "2 a life is of one Postgres",
        CACHE,
        "{ANSWER_SHAPE}|{run_id}|{postgres_identity}",
        "{ANSWER_SHAPE}|{run_id}|",
        (
            f"{OF_CACHE}another_life_is_a_miss",
            f"{OF_OUTAGES}after_postgres_was_restored_everyone_says_what_it_says_now",
        ),
    ),
    Mutation(
        "2 a life is of one shape of answers",
        CACHE,
        "{ANSWER_SHAPE}|{run_id}|{postgres_identity}",
        "{run_id}|{postgres_identity}",
        (f"{OF_CACHE}another_shape_of_answers_is_another_life",),
    ),
    Mutation(
        "2 what was asked in another life is no answer",
        CACHE,
        "elif life != self.life:",
        "elif False:",
        (f"{OF_CACHE}what_was_asked_in_another_life_is_not_answered",),
    ),
    Mutation(
        "2 a fill belongs to the life of its lease",
        CACHE,
        "life = token[:LIFE_LENGTH]",
        "life = self._puts_life",
        (f"{OF_CACHE}a_fill_belongs_to_the_life_of_its_lease",),
    ),
    Mutation(
        "2 a new life clears memory",
        APP,
        "    cache.on_new_life.append(memory.clear)\n",
        "",
        (f"{OF_OUTAGES}after_postgres_was_restored_everyone_says_what_it_says_now",),
    ),
    Mutation(
        "2 a new life resets those who follow",
        APP,
        "    postgres.on_identity.append(hub.begin_anew)\n",
        "",
        (f"{OF_DEGRADED}what_a_client_sees_while[Postgres is a standby]",),
    ),
    Mutation(
        "2 a message of another life is not believed",
        HUB,
        "if message[:LIFE_LENGTH] != self._life().encode():",
        "if False:",
        (f"{OF_LOSSES}nobody_reads_before_the_subscription_is_acknowledged",),
    ),
    # Rule 3: a miss leaves a lease, a fill needs it
    Mutation(
        "3 a fill is stored only while its lease stands",
        FILL,
        "  if redis.call('GETRANGE', key, 0, #lease) ~= lease then return 0 end",
        "  --",
        (f"{OF_CACHE}a_fill_from_before_a_put_is_not_stored", f"{OF_CACHE}no_entry_is_older_than_what_was_told"),
    ),
    Mutation(
        "3 ... its own lease, not one that begins alike",
        FILL,
        "GETRANGE', key, 0, #lease) ~= lease",
        "GETRANGE', key, 0, #lease - 1) ~= lease",
        (f"{OF_CACHE}a_fill_without_its_lease_is_not_stored",),
    ),
    Mutation(
        "3 each miss has a lease of its own",
        CACHE,
        "{self.life}-{next(self._leases)}",
        "{self.life}-lease",
        (f"{OF_CACHE}each_lease_is_another", f"{OF_CACHE}no_entry_is_older_than_what_was_told"),
    ),
    Mutation(
        "3 one reader at a time holds the lease",
        READ,
        "  if string.sub(head, 1, 1) == '?' then return 2 end",
        "  --",
        (f"{OF_CACHE}one_reader_gets_the_lease",),
    ),
    Mutation(
        "3 an absence is believed for a second",
        FILL,
        "version == ABSENCE and absence_lifetime_ms or entry_lifetime_ms",
        "entry_lifetime_ms",
        (f"{OF_CACHE}an_absence_is_told_whatever_is_held",),
    ),
    # Rule 4: a writer plants nothing
    Mutation(
        "4 a put plants nothing where there is no entry",
        PUT,
        "if held and store(key, version, payload)",
        "if payload ~= '' and store(key, version, payload)",
        (f"{OF_CACHE}a_put_plants_nothing_and_announces", f"{OF_CACHE}no_entry_is_older_than_what_was_told"),
    ),
    Mutation(
        "4 a put voids the lease",
        PUT,
        "  redis.call('UNLINK', key)",
        "  --",
        (f"{OF_CACHE}a_fill_from_before_a_put_is_not_stored", f"{OF_CACHE}no_entry_is_older_than_what_was_told"),
    ),
    Mutation(
        "4 a late put does not bring a deleted job back",
        PUT,
        " == life and version ~= ABSENCE then",
        " == life then",
        (f"{OF_CACHE}a_late_put_does_not_bring_a_deleted_job_back", f"{OF_CACHE}no_entry_is_older_than_what_was_told"),
    ),
    Mutation(
        "4 a deletion is announced",
        PUT,
        "if codes[i] ~= 0 then",
        "if codes[i] == 1 then",
        (f"{OF_CACHE}a_deletion_leaves_nothing_and_announces",),
    ),
    # Rule 5: what cannot be stored is unlinked
    Mutation(
        "5 a put that finds no memory leaves nothing old",
        PUT,
        "  if held and store(key, version, payload) then return 1 end",
        "  if held then store(key, version, payload) return 1 end",
        (
            f"{OF_CACHE}out_of_memory",
            f"{OF_OUTAGES}polls_stay_true_while_redis_answers_and_refuses_what_is_written[maxmemory]",
        ),
    ),
    # Rule 6: after an outage
    Mutation(
        "6 after a connect nothing is trusted",
        CACHE,
        "        self.generation += 1\n        self.trusted = False\n",
        "        self.generation += 1\n        self.trusted = True\n",
        (
            f"{OF_CACHE}the_gate_is_closed_until_it_is_opened_for_this_connection",
            f"{OF_OUTAGES}a_redis_that_is_back_is_not_trusted_while_anything_waits_to_be_told",
        ),
    ),
    Mutation(
        "6 the gate opens once nothing older waits in the outbox",
        RELAY,
        "if not await self._outbox.holds_older_than(began_at):",
        "if began_at:",
        (f"{OF_OUTAGES}a_redis_that_is_back_is_not_trusted_while_anything_waits_to_be_told",),
    ),
    Mutation(
        "6 trust is of one connection",
        CACHE,
        "if generation == self.generation and self._polls.up:",
        "if self._polls.up:",
        (f"{OF_CACHE}the_gate_is_closed_until_it_is_opened_for_this_connection",),
    ),
    Mutation(
        "6 no trust in a Redis that is away",
        CACHE,
        "if generation == self.generation and self._polls.up:",
        "if generation == self.generation:",
        (f"{OF_CACHE}the_gate_does_not_open_while_redis_is_away",),
    ),
    Mutation(
        "6 a probe of its own notices outages",
        PIPE,
        "await (self._probe() if self.up else self._try_to_connect())",
        "await (asyncio.sleep(0) if self.up else self._try_to_connect())",
        ("tests/stores/test_redis_pipe.py::test_probe_finds_a_frozen_server_without_any_poll",),
    ),
    Mutation(
        "6 Redis that became a replica is left at once",
        PIPE,
        'elif said.startswith("READONLY"):',
        "elif False:",
        ("tests/stores/test_redis_pipe.py::test_a_replica_is_not_trusted",),
    ),
    Mutation(
        "6 a replica is never connected to",
        PIPE,
        'if facts.get("role", "master") != "master":',
        "if False:",
        ("tests/stores/test_redis_pipe.py::test_a_replica_is_not_trusted",),
    ),
    Mutation(
        "6 a writer tries again before it warns",
        CACHE,
        "                await self._puts_are_up.wait()\n",
        "                return False\n",
        (f"{OF_CACHE}a_put_survives_a_short_outage",),
    ),
    Mutation(
        "6 a writer that knows Redis is away warns at once",
        CACHE,
        "        if not self.can_put:\n            return False\n",
        "",
        (f"{OF_CACHE}a_put_gives_up",),
    ),
    Mutation(
        "6 Redis that cannot be told what is overdue is trusted no more",
        RELAY,
        "        if not await self._tell(jobs, connection):\n            self._cache.distrust()\n",
        "        if not await self._tell(jobs, connection):\n",
        (
            f"{OF_RELAY}what_cannot_be_told_is_kept_and_redis_trusted_no_more",
            f"{OF_OUTAGES}the_last_report_before_a_redis_that_refuses_is_seen_within_2_s",
        ),
    ),
    Mutation(
        "6 what nobody could confirm is called stale",
        CACHE,
        "return self.trusted and time.monotonic() - self._confirmed_at > CONFIRMED_FOR_s",
        "return False",
        (f"{OF_OUTAGES}what_nobody_could_tell_because_postgres_hung_too_is_called_stale_until_it_is_told",),
    ),
    Mutation(
        "6 what another relay holds is not confirmed",
        RELAY,
        "if not self._cache.trusted or not await self._outbox.holds_overdue():",
        "if True:",
        (f"{OF_RELAY}what_another_relay_holds_and_does_not_tell_is_not_confirmed",),
    ),
    # The belt
    Mutation(
        "belt: an entry that is long unverified is said to be so",
        READ,
        "tonumber(string.sub(head, 24, 36)) >= verified_since_ms",
        "true",
        (
            f"{OF_CACHE}unverified_is_said_with_what_is_newer",
            f"{OF_COHERENCE}an_old_entry_that_nobody_verified_is_compared_with_postgres",
        ),
    ),
    Mutation(
        "belt: ... and Postgres is asked",
        READER,
        "            return self._present(key, await self._verified(key, reading.ready or held))\n",
        "            return self._present(key, reading.ready or held)\n",
        (f"{OF_COHERENCE}an_old_entry_that_nobody_verified_is_compared_with_postgres",),
    ),
    # The poll
    Mutation(
        "memory is asked for only with Redis's word that it is fresh",
        READER,
        "        held = self._memory.get(key)\n        try:\n",
        "        held = self._memory.get(key)\n        if held is not None:\n            return held\n        try:\n",
        (
            f"{OF_COHERENCE}a_report_through_one_process_is_the_first_thing_read_through_another_that_held_the_old_answer",
        ),
    ),
    Mutation(
        "memory never goes back",
        "service/stores/status_memory.py",
        "            if present.version >= answer.version:\n                return present\n",
        "",
        ("tests/stores/test_status_memory.py::test_newer_replaces_older_and_never_the_other_way",),
    ),
    Mutation(
        "what Postgres did not vouch for is called stale",
        READER,
        "return not self._postgres.reachable or self._cache.unconfirmed",
        "return False",
        (f"{OF_DEGRADED}what_a_client_sees_while[Postgres is down]",),
    ),
    Mutation(
        "a miss never joins a read that is under way",
        JOINED,
        "        waiting, self._next = self._next, {}\n        try:\n            found = await self._read_all(list(waiting))\n",
        "        waiting, turn = self._next, list(self._next)\n        try:\n"
        "            found = await self._read_all(turn)\n            self._next = {}\n",
        (
            "tests/stores/test_joined_reads.py::test_who_asks_while_a_read_is_under_way_gets_the_next[joined]",
            f"{OF_COHERENCE}a_reader_does_not_join_a_read_that_looked_before_it_came",
        ),
    ),
    Mutation(
        "shared reads are shielded",
        JOINED,
        "return await asyncio.shield(future)",
        "return await future",
        ("tests/stores/test_joined_reads.py::test_who_hangs_up_takes_nobody_along[joined]",),
    ),
    Mutation(
        "shared reads of what is dear are shielded",
        JOINED,
        "return await asyncio.shield(asked)",
        "return await asked",
        ("tests/stores/test_joined_reads.py::test_who_hangs_up_takes_nobody_along[joined and spaced]",),
    ),
    Mutation(
        "shared look-ups of a key are shielded",
        "service/stores/key_memory.py",
        "await asyncio.shield(self._lookup(hash))",
        "await self._lookup(hash)",
        ("tests/test_keys.py::test_a_caller_that_hangs_up_takes_nobody_along",),
    ),
    Mutation(
        "a cancelled reader of one turn cancels nobody",
        CACHE,
        "        for reader in self._readers:\n            if not reader.done():\n                reader.set_result(reading)\n",
        "        for reader in self._readers:\n            reader.set_result(reading)\n",
        (f"{OF_CACHE}a_cancelled_reader_cancels_nobody",),
    ),
    # Following
    Mutation(
        "subscribe before read",
        HUB,
        "        for topic, follower in topics:\n            topic.followers.add(follower)\n        try:\n",
        "        def follow_late() -> None:\n            for topic, follower in topics:\n"
        "                topic.followers.add(follower)\n\n"
        "        asyncio.get_running_loop().call_later(1, follow_late)\n        try:\n",
        ("tests/streaming/test_between.py::test_no_change_falls_between[job-new-at once]",),
    ),
    Mutation(
        "the acknowledgement of a subscription is awaited",
        HUB,
        "        if self._channel.up and waiting:\n",
        "        if False:\n",
        (f"{OF_LOSSES}nobody_reads_before_the_subscription_is_acknowledged",),
    ),
    Mutation(
        "reconcile: what is followed is compared with Postgres",
        HUB,
        "        await self._find_newer()\n",
        "",
        (f"{OF_LOSSES}a_lost_message_is_repaired",),
    ),
    Mutation(
        "reconcile: what is listened to is compared with Postgres",
        HUB,
        "        await self._find_unheard(began_at)\n",
        "",
        ("tests/streaming/test_positions.py::test_what_commits_late_is_told_to_who_stays_and_to_who_comes_back",),
    ),
    Mutation(
        "a subscription that is lost is compensated at once",
        HUB,
        "        channel.on_lost = self._hurry.set",
        "        #",
        (f"{OF_LOSSES}a_subscription_that_is_lost_for_good_delays_nobody_for_long",),
    ),
    # The outbox and the relay
    Mutation(
        "every change writes its row of the outbox",
        JOBS_UPDATED,
        "  if not found then return null; end if;      -- heartbeats only: nothing that a reader could see\n"
        "  perform note_in_outbox(array_agg(n.account_id), array_agg(n.id))\n"
        "    from new_rows n join old_rows o using (account_id, id) where n.version > o.version;\n",
        "  if not found then return null; end if;\n",
        (f"{OF_REPORTS}one_commit_is_one_row_of_the_outbox",),
    ),
    Mutation(
        "the row stays until Redis has been told",
        ANNOUNCER,
        "            self.untold += 1\n            return False\n",
        "            self.untold += 1\n",
        (f"{OF_OUTAGES}what_is_reported_through_a_process_that_lost_redis_is_seen_everywhere_within_2_s",),
    ),
    Mutation(
        "the relay tells what nobody told",
        APP,
        "            relay.run(),\n",
        "",
        ("tests/test_crash.py::test_what_a_process_committed_and_died_before_telling_is_told_by_another_within_2_s",),
    ),
    Mutation(
        "relays do not tell the same",
        "service/stores/outbox_table.sql",
        " limit 100 for update skip locked;",
        " limit 100;",
        (f"{OF_RELAY}two_relays_never_tell_the_same",),
    ),
    Mutation(
        "what was told is not told again for a lost transaction",
        RELAY,
        "            self._outbox.settle(commit)\n",
        "            pass\n",
        (f"{OF_RELAY}telling_that_outlasts_the_transaction_is_told_once_and_goes",),
    ),
    Mutation(
        "a failed rollback does not hide a cancellation",
        CONNECTIONS,
        "        with suppress(Exception):  # the session is gone, or has become silent\n"
        '            await connection.execute("rollback")\n            return\n',
        '        await connection.execute("rollback")\n        return\n',
        ("tests/stores/test_connections.py::test_a_cancelled_transaction_that_lost_its_connection_is_cancelled",),
    ),
    # The group commit
    Mutation(
        "locks are taken in one order",
        REPORT_JOBS,
        "  order by account_id, id\n), held as materialized",
        "  order by md5(id || n)\n), held as materialized",
        ("tests/test_storm.py::test_what_many_writers_leave_is_one_story",),
    ),
    Mutation(
        "a job is judged under its lock",
        REPORT_JOBS,
        "from jobs j where j.account_id = i.account_id and j.id = i.id for update) l on true",
        "from jobs j where j.account_id = i.account_id and j.id = i.id limit 1) l on true",
        (f"{OF_REPORTS}a_report_that_waited_for_another_sees_what_it_wrote",),
    ),
    Mutation(
        "time does not run backwards",
        REPORT_JOBS,
        "greatest(date_trunc('milliseconds', clock_timestamp()), h.changed_at) as at",
        "date_trunc('milliseconds', clock_timestamp()) as at",
        (f"{OF_REPORTS}changed_at_does_not_run_backwards_with_the_clock",),
    ),
    Mutation(
        "a job is at most once in a statement",
        COLLECTOR,
        "            if waiting.job in group:\n",
        "            if False:\n",
        (f"{OF_COLLECTOR}the_second_report_on_a_job_waits_for_the_next_statement",),
    ),
    Mutation(
        "what was lost in its commit is never sent again",
        COLLECTOR,
        "except (BadValue, Locked) as error:",
        "except (BadValue, Exception) as error:",
        (f"{OF_COLLECTOR}a_commit_whose_answer_is_lost_is_unavailable_and_never_sent_again",),
    ),
    Mutation(
        "a lock of others costs only the reports on that job",
        COLLECTOR,
        "except (BadValue, Locked) as error:",
        "except BadValue as error:",
        (f"{OF_COLLECTOR}only_the_reports_on_a_job_that_another_keeps_locked_are_unavailable",),
    ),
    Mutation(
        "the answer comes after Redis was told",
        ANNOUNCER,
        "told = await self._cache.put(changes)",
        "told = bool(__import__('asyncio').ensure_future(self._cache.put(changes)))",
        (
            f"{OF_COHERENCE}a_report_through_one_process_is_the_first_thing_read_through_another_that_held_the_old_answer",
        ),
    ),
    # What must not open
    Mutation(
        "a key is believed for so long and no longer",
        "service/stores/key_memory.py",
        "if entry is None or now >= entry.believed_until:",
        "if entry is None:",
        ("tests/test_keys.py::test_while_postgres_is_away_known_keys_are_valid_and_unknown_ones_unavailable",),
    ),
    Mutation(
        "a process that limits alone counts what it granted before",
        LIMITER,
        "        self._log_of(self._granted, asked.key).add(self._clock())\n",
        "",
        (
            "tests/test_limits.py::test_while_redis_is_away_each_process_grants_its_share_and_counts_what_it_granted_before",
        ),
    ),
    Mutation(
        "a refusal counts where Redis could not write it down",
        LIMITER,
        "        if refused_s > 0:\n            return Place(False, 0, refused_s)\n",
        "",
        (f"{OF_DEGRADED}keys_are_not_guessed_faster_while_redis_cannot_write",),
    ),
)


def mutated(mutation: Mutation, tree: Path = ROOT) -> str:
    """The file without its guard. Raises LookupError if the guard is not there, or twice."""
    whole = (tree / mutation.file).read_text()
    up, down, rest = whole.partition(DOWN)
    if up.count(mutation.old) != 1:
        raise LookupError(
            f"{mutation.guard}: stands {up.count(mutation.old)} times in {mutation.file}: {mutation.old!r}"
        )
    return up.replace(mutation.old, mutation.new) + down + rest


@contextmanager
def scratch_copy() -> Iterator[Path]:
    """A copy of the tree, of which nothing is left."""
    with tempfile.TemporaryDirectory(prefix="jobwire-mutation-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        yield tree


@dataclass(frozen=True)
class Run:
    """What came of some tests. `red`: why each failed, by its id; `broken`: what kept them from running."""

    red: dict[str, str]
    broken: str
    took_s: float

    def why(self, test: str) -> str | None:
        """Why a test, or with one of its parameters, failed; None: it did not."""
        return next((why for failed, why in self.red.items() if failed == test or failed.startswith(f"{test}[")), None)


def run(tests: Sequence[str], tree: Path, within_s: float) -> Run:
    """Runs them in `tree`. One that does not end within 60 s has failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "--tb=line",
        "--timeout=60",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"}
    began_at = time.monotonic()
    with subprocess.Popen(
        [*command, *tests],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Run({}, f"no end within {within_s} s", within_s)
    red = {
        found[1]: found[2] or ""
        for found in re.finditer(r"^FAILED (\S+::\w+(?:\[.*?\])?)(?: - (.*))?$", said, re.MULTILINE)
    }
    errors = re.findall(r"^ERROR (.*)$", said, re.MULTILINE)
    broken = "; ".join(errors) if errors or process.returncode in (0, 1) else said[-300:]
    return Run(red, broken, time.monotonic() - began_at)


def check(mutations: Sequence[Mutation]) -> int:
    """Tells of each; the exit code."""
    unnoticed = 0
    with scratch_copy() as tree:
        tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        fine = run(tests, tree, within_s=60 + 20 * len(tests))
        if fine.red or fine.broken:
            print(f"Not green with all guards in place: {fine.red or fine.broken}")
            return 2
        print(f"{len(tests)} tests are green with all guards in place ({fine.took_s:.0f} s)\n", flush=True)
        for mutation in mutations:
            with without_guard(mutation, tree):
                came = run(mutation.tests, tree, WITHIN_s)
            print(f"{mutation.guard}   ({mutation.file}, {came.took_s:.0f} s)", flush=True)
            for test in mutation.tests:
                why = came.why(test)
                unnoticed += why is None
                print(f"    {'UNNOTICED' if why is None else 'red'}  {test}  {(why or came.broken)[:120]}", flush=True)
    print(f"\n{len(mutations)} guards taken out; {unnoticed} times a test that should notice did not")
    return bool(unnoticed)


@contextmanager
def without_guard(mutation: Mutation, tree: Path) -> Iterator[None]:
    """Inside, the tree lacks it."""
    file = tree / mutation.file
    before = file.read_text()
    file.write_text(mutated(mutation, tree))
    try:
        yield
    finally:
        file.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    chosen = [one for one in MUTATIONS if not words or any(word in f"{one.guard} {one.file}" for word in words)]
    if not chosen:
        parser.error(f"no guard has any of the words {' '.join(words)}")
    return check(chosen)


if __name__ == "__main__":
    sys.exit(main())
