-- name: settle
-- Commits that Redis has heard of.
delete from outbox where xid = any ($1::text[]::xid8[]);

-- name: claim_overdue
-- Commits that nobody told Redis of within a second, oldest first; two processes never take the same.
select xid::text as xid, accounts, jobs from outbox where at < statement_timestamp() - interval '1 second' order by at limit 100 for update skip locked;

-- name: now
-- The database's clock, by which the ages of outbox rows are measured.
select clock_timestamp() as now;

-- name: any_older
-- Whether a commit from before a moment still waits.
select coalesce((select at < $1 from outbox order by at limit 1), false) as waiting;
