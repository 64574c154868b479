-- name: report
-- The group commit: judges and writes any number of reports, at most one per job. See report_jobs in the migrations.
-- Only what is read of the job: each column costs both sides.
select o.n, o.outcome, o.held_status, o.held_attempt, o.held_stalled, o.gone_expired_at, o.xid,
       (o.job).account_id, (o.job).id, (o.job).status, (o.job).type, (o.job).version, (o.job).attempt, (o.job).created_at,
       (o.job).changed_at, (o.job).updated_at, (o.job).started_at, (o.job).completed_at, (o.job).expires_at, (o.job).stalled,
       (o.job).progress, (o.job).error, (o.job).error_details, (o.job).metadata, (o.job).parameters, (o.job).batch_id, (o.job).tags,
       (o.job).user_id, (o.job).pdf_name, (o.job).pdf_hash, (o.job).file_count, (o.job).public, (o.job).result_id, eta(o.job)
from report_jobs($1::int[], $2::text[], $3::text[], $4::jsonb[], $5::text[], $6::jsonb[], $7::jsonb[], $8::int[], $9::text[], $10::bool[],
                 $11::bigint[], $12::bytea[]) o
order by o.n;

-- name: create
-- All jobs of one request or none. See create_jobs in the migrations.
select o.outcome, o.conflict_id, (o.job).*, eta(o.job) from create_jobs($1, $2::jsonb, $3::text[]) o;

-- name: current_xid
-- The number under which this transaction stands in the outbox.
select pg_current_xact_id()::text as xid;

-- name: delete
-- Removes a job and leaves its tombstone. See delete_job in the migrations.
select outcome, gone_expired_at, version, held_status, batch_id, user_id, tags, xid from delete_job($1, $2, $3);

-- name: read
-- Any number of jobs by (account, id), in the order asked; a job that is not there comes with the reason.
select k.n, j.*,
       case when j.id is null and t.id is not null then case when t.expired_at is null then 'deleted' else 'expired' end
            when j.id is null and exists (select from jobs x where x.id = k.job_id) then 'forbidden'
            when j.id is null then 'not_found' end as absence,
       t.expired_at as gone_expired_at
from unnest($1::int[], $2::text[]) with ordinality k(account, job_id, n)
  left join lateral (select x.*, eta(x) from jobs x where account_id = k.account and id = k.job_id limit 1) j on true
  left join lateral (select * from tombstones where j.id is null and account_id = k.account and id = k.job_id limit 1) t on true
order by k.n;

-- name: versions
-- Only the versions of any number of jobs, in the order asked; null where there is none.
select k.n, j.version from unnest($1::int[], $2::text[]) with ordinality k(account, job_id, n)
  left join lateral (select version from jobs where account_id = k.account and id = k.job_id limit 1) j on true
order by k.n;

-- name: public_account
-- Whose public job this is; ids of public jobs are random, so no two accounts have the same.
select account_id from jobs where id = $1 and public limit 1;

-- name: write_result
-- The bytes of a result, before its job is locked. They count only once a job points to them.
insert into results (content_type, body) values ($1, $2) returning id;

-- name: drop_result
-- Bytes that turned out to be there already.
delete from results where id = $1;

-- name: result
-- What was stored for a job.
select r.content_type, r.body, j.result_digest from jobs j join results r on r.id = j.result_id where j.account_id = $1 and j.id = $2;

-- name: history
-- Changes after a version, oldest first.
select at, version, status, previous_status, attempt, step, error
from job_history where account_id = $1 and job_id = $2 and version > $3 order by version limit $4;

-- name: idempotency_lock
-- False while another request with the same key runs; held to the end of the transaction, also of one that crashes.
select pg_try_advisory_xact_lock(hashtextextended($2, $1::bigint)) as taken;

-- name: idempotency_find
-- The first answer of the last 24 hours.
select request_hash, body, location from idempotency_keys where account_id = $1 and key = $2 and at > clock_timestamp() - interval '24 hours';

-- name: idempotency_keep
-- Keeps the first answer, in the transaction that makes it true.
insert into idempotency_keys (account_id, key, request_hash, body, location) values ($1, $2, $3, $4, $5)
on conflict (account_id, key) do update set request_hash = excluded.request_hash, body = excluded.body, location = excluded.location, at = excluded.at;
