-- name: settle
-- Commits that Redis has heard of.
delete from outbox where xid = any ($1::text[]::xid8[]);

-- name: claim_overdue
-- Commits that nobody told Redis of within a second, oldest first; two processes never take the same.
select xid::text as xid, accounts, jobs from outbox where at < statement_timestamp() - interval '1 second' order by at limit 100 for update skip locked;

-- name: look_for_overdue
-- As claim_overdue where nothing can be locked, without what this process has told ($1).
select xid::text as xid, accounts, jobs from outbox
where at < statement_timestamp() - interval '1 second' and xid <> all ($1::text[]::xid8[]) order by at limit 100;

-- name: oldest
-- How long the oldest commit has waited; 0 where none waits.
select coalesce((select extract(epoch from clock_timestamp() - at)::float8 from outbox order by at limit 1), 0) as oldest_s;

-- name: now
-- The database's clock, by which the ages of outbox rows are measured.
select clock_timestamp() as now;

-- name: any_overdue
-- Whether a commit that nobody told Redis of within a second waits, locked or not; without what this process has told ($1).
select coalesce((select true from outbox where at < statement_timestamp() - interval '1 second' and xid <> all ($1::text[]::xid8[])
                order by at limit 1), false) as waiting;

-- name: any_older
-- Whether a commit from before a moment still waits.
select coalesce((select at < $1 from outbox order by at limit 1), false) as waiting;
