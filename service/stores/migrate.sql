-- name: lock
-- $1 key of the lock. Whether this session now holds it; asked again and again, because a session that waits inside a
-- statement holds a snapshot, for which CREATE INDEX CONCURRENTLY in the holder's migration would wait in turn.
select pg_try_advisory_lock($1);

-- name: applied
-- The versions (leading digits of the file names) that the database has.
select version from schema_migrations;
