-- name: store
-- $1 id, $2 account, $3 job ids, $4 seconds until it ends.
insert into ticket_sets (id, account_id, job_ids, expires_at) values ($1, $2, $3, clock_timestamp() + make_interval(secs => $4));

-- name: find
-- The jobs of a set that has not ended.
select job_ids from ticket_sets where id = $1 and account_id = $2 and expires_at > clock_timestamp();

-- name: forget
-- Sets that no ticket can open any more.
delete from ticket_sets where expires_at < statement_timestamp() - interval '1 minute';
