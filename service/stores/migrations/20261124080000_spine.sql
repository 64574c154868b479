-- migrate:up

-- Accounts and keys -----------------------------------------------------------------------------------------------

create table accounts (
  id         int generated always as identity primary key,
  name       text not null unique,
  retention  interval not null default '7 days',
  created_at timestamptz(3) not null default clock_timestamp(),
  constraint account_name_is_a_slug check (name ~ '^[a-z0-9][a-z0-9_.-]{0,63}$'),
  constraint retention_is_positive check (retention > interval '0')
);
comment on table accounts is 'Whose jobs they are. Every job, batch and key belongs to exactly one account.';
comment on column accounts.retention is 'How long finished jobs, their results and history are kept.';

create table keys (
  id         text primary key,
  account_id int not null references accounts,
  hash       bytea not null unique,
  scopes     text[] not null,
  limits     jsonb not null default '{}',
  created_at timestamptz(3) not null default clock_timestamp(),
  expires_at timestamptz(3),
  revoked_at timestamptz(3),
  constraint hash_is_sha256 check (octet_length(hash) = 32),
  constraint scopes_are_known check (cardinality(scopes) > 0 and scopes <@ array['jobs:read', 'jobs:write', 'webhooks:manage', 'admin'])
);
comment on table keys is 'API keys. The key itself is shown once and never stored.';
comment on column keys.id is 'The public name of the key, for `keys list` and `keys revoke`.';
comment on column keys.hash is 'SHA-256 of the key; keys carry 256 random bits, so no slow hash is needed.';
comment on column keys.limits is 'Rate limits that differ from the default: {"poll": "1000/60", "list": "none"}.';
create index keys_by_account on keys (account_id);

-- Jobs ------------------------------------------------------------------------------------------------------------

create table jobs (
  account_id          int not null,
  id                  text collate "C" not null,
  status              text not null default 'queued',
  type                text not null,
  version             bigint not null default 1,
  attempt             int not null default 1,
  created_at          timestamptz(3) not null,
  changed_at          timestamptz(3) not null,
  updated_at          timestamptz(3) not null,
  started_at          timestamptz(3),
  completed_at        timestamptz(3),
  expires_at          timestamptz(3),
  heartbeat_at        timestamptz(3) not null,
  heartbeat_timeout_s int,
  stalled             bool not null default false,
  stalled_action      text not null default 'mark',
  progress            jsonb not null default '{}',
  error               text,
  error_details       jsonb,
  metadata            jsonb not null default '{}',
  parameters          jsonb,
  batch_id            text collate "C",
  tags                text[] not null default '{}',
  user_id             text,
  pdf_name            text,
  pdf_hash            text,
  file_count          int,
  public              bool not null default false,
  notification        jsonb,
  webhook_url         text,
  result_id           bigint,
  result_digest       bytea,
  primary key (id, account_id),
  constraint id_is_well_formed check (id ~ '^[A-Za-z0-9][A-Za-z0-9._:-]*$' and length(id) <= 128),
  constraint status_is_known check (status in ('queued', 'PROCESSING', 'COMPLETED', 'FAILED', 'CANCELLED')),
  constraint type_is_a_slug check (type ~ '^[a-z0-9_.-]+$' and length(type) <= 64),
  constraint version_and_attempt_start_at_1 check (version >= 1 and attempt >= 1),
  constraint finished_exactly_when_completed_at check ((status in ('COMPLETED', 'FAILED', 'CANCELLED')) = (completed_at is not null)),
  constraint expires_exactly_when_finished check ((expires_at is null) = (completed_at is null)),
  constraint processing_has_started check (status <> 'PROCESSING' or started_at is not null),
  constraint failed_and_cancelled_say_why check ((status in ('FAILED', 'CANCELLED')) = (error is not null) and (error is null) = (error_details is null)),
  constraint completed_is_100_percent check (status <> 'COMPLETED' or progress @> '{"percentage": 100}'),
  constraint percentage_is_a_percentage check ((progress->'percentage')::numeric between 0 and 100),
  constraint only_processing_stalls check (not stalled or status = 'PROCESSING'),
  constraint stalled_action_is_known check (stalled_action in ('mark', 'fail')),
  constraint heartbeat_timeout_is_positive check (heartbeat_timeout_s > 0),
  constraint result_has_a_digest check ((result_id is null) = (result_digest is null)),
  constraint digest_is_sha256 check (octet_length(result_digest) = 32)
) with (fillfactor = 75);

-- No index here holds a column that mere progress changes: such updates stay on their page (HOT).

comment on table jobs is 'The truth about every job. Written by report_jobs, create_jobs and delete_job; the triggers below record what each write means.';
comment on column jobs.account_id is 'No foreign key on purpose: its check would lock the account row for each insert.';
comment on column jobs.version is 'Grows by one with every change that a reader can see; bumped under the row lock.';
comment on column jobs.changed_at is 'When version last grew; never runs backwards.';
comment on column jobs.updated_at is 'The last report that changed something.';
comment on column jobs.heartbeat_at is 'The last sign of life of the worker, changed or not.';
comment on column jobs.heartbeat_timeout_s is 'A PROCESSING job silent for longer than this is stalled; null: never.';
comment on column jobs.progress is 'percentage, message, step, files_completed, total_files, queue_position; parts unknown are absent.';
comment on column jobs.notification is '{email, events, include_summary}: whom to mail, and when.';
comment on column jobs.result_id is 'The present result; results are written before the job is locked, so this is what makes one count.';
comment on column jobs.result_digest is 'SHA-256 of the result and its content type. It stands here because what is compared must be read under the lock.';
comment on index jobs_pkey is 'Answers "does only another account have it?" (403 instead of 404).';

create table results (
  id           bigint generated always as identity primary key,
  content_type text not null,
  body         bytea not null,
  stored_at    timestamptz(3) not null default clock_timestamp()
);
alter table results alter column body set storage external;
comment on table results is 'Result bytes. A row counts once a job points to it (jobs.result_id).';
comment on column results.body is 'Not compressed by Postgres: results are read whole and are often compressed already.';

create table job_history (
  account_id      int not null,
  job_id          text collate "C" not null,
  version         bigint not null,
  at              timestamptz(3) not null,
  status          text not null,
  previous_status text,
  attempt         int not null,
  step            text,
  error           text,
  primary key (account_id, job_id, version)
);
comment on table job_history is 'Changes of status, attempt, step, error and stalled; mere progress is not kept.';

create table tombstones (
  account_id int not null,
  id         text collate "C" not null,
  version    bigint not null,
  at         timestamptz(3) not null default clock_timestamp(),
  expired_at timestamptz(3),
  primary key (account_id, id)
);
comment on table tombstones is 'Jobs that are gone, so that a late client reads why, and the id is not used again for 30 days.';
comment on column tombstones.version is 'One more than the last version of the job.';
comment on column tombstones.expired_at is 'Set when retention removed the job; null when somebody deleted it.';

create table batches (
  account_id int not null,
  id         text collate "C" not null,
  total      int not null default 0,
  queued     int not null default 0,
  processing int not null default 0,
  completed  int not null default 0,
  failed     int not null default 0,
  cancelled  int not null default 0,
  version    bigint not null default 1,
  size       int,
  closed     bool not null default false,
  created_at timestamptz(3) not null default clock_timestamp(),
  primary key (account_id, id),
  constraint counts_add_up check (total = queued + processing + completed + failed + cancelled),
  constraint no_count_is_negative check (least(queued, processing, completed, failed, cancelled) >= 0)
) with (fillfactor = 75);
comment on table batches is 'Counts of each batch, kept by the triggers on jobs.';
comment on column batches.size is 'How many jobs were announced (batch_size); the batch closes itself when it has them.';
comment on column batches.closed is 'No more jobs may be added; only a closed batch can be over.';

create table outbox (
  xid      xid8 primary key default pg_current_xact_id(),
  at       timestamptz not null default clock_timestamp(),
  accounts int[] not null,
  jobs     text[] not null
);
comment on table outbox is 'Commits that Redis may not have heard of yet; a row goes once Redis has the change.';
create index outbox_by_age on outbox (at);

create table idempotency_keys (
  account_id   int not null,
  key          text not null,
  request_hash bytea not null,
  body         bytea not null,
  location     text,
  at           timestamptz(3) not null default clock_timestamp(),
  primary key (account_id, key)
);
comment on table idempotency_keys is 'First answers to creations with an Idempotency-Key, kept for 24 hours.';
create index idempotency_keys_by_age on idempotency_keys (at);

-- What every write records, whatever path it came by ----------------------------------------------------------------

create function note_in_outbox(accounts int[], ids text[]) returns void language sql as $$
  insert into outbox (accounts, jobs) values (accounts, ids)
  on conflict (xid) do update set accounts = outbox.accounts || excluded.accounts, jobs = outbox.jobs || excluded.jobs;
$$;
comment on function note_in_outbox is 'One row per transaction, whatever number of statements it has.';

create function shift_batches(accounts int[], batch_ids text[], were text[], became text[]) returns void language plpgsql
-- Lookups by primary key only; see report_jobs.
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_bitmapscan = off as $$
declare shut text;
begin
  -- Jobs are locked before batches, and batches in one order: no two writers can wait for each other.
  perform from (select distinct s.account_id, s.id from unnest(accounts, batch_ids) s(account_id, id) order by 1, 2) s
    cross join lateral (select from batches b where b.account_id = s.account_id and b.id = s.id for update) l;
  select b.id into shut
    from (select distinct s.account_id, s.id from unnest(accounts, batch_ids, were) s(account_id, id, was) where s.was is null) s
      cross join lateral (select x.id from batches x where x.account_id = s.account_id and x.id = s.id and x.closed limit 1) b
    limit 1;
  if shut is not null then
    raise exception 'batch closed' using errcode = 'JW001', detail = shut;
  end if;
  update batches b set
      total = b.total + d.total, queued = b.queued + d.queued, processing = b.processing + d.processing,
      completed = b.completed + d.completed, failed = b.failed + d.failed, cancelled = b.cancelled + d.cancelled,
      version = b.version + 1
    from (select s.account_id, s.id,
            sum((s.became is not null)::int - (s.was is not null)::int) as total,
            sum((s.became is not distinct from 'queued')::int - (s.was is not distinct from 'queued')::int) as queued,
            sum((s.became is not distinct from 'PROCESSING')::int - (s.was is not distinct from 'PROCESSING')::int) as processing,
            sum((s.became is not distinct from 'COMPLETED')::int - (s.was is not distinct from 'COMPLETED')::int) as completed,
            sum((s.became is not distinct from 'FAILED')::int - (s.was is not distinct from 'FAILED')::int) as failed,
            sum((s.became is not distinct from 'CANCELLED')::int - (s.was is not distinct from 'CANCELLED')::int) as cancelled
          from unnest(accounts, batch_ids, were, became) s(account_id, id, was, became) group by 1, 2) d
    where b.account_id = d.account_id and b.id = d.id;
end $$;
comment on function shift_batches is 'Moves jobs between the counts of their batches; null before: added (JW001 if the batch is closed), null after: removed.';

create function jobs_inserted() returns trigger language plpgsql set enable_hashjoin = on as $$
begin
  perform note_in_outbox(array_agg(n.account_id), array_agg(n.id)) from new_rows n having count(*) > 0;
  insert into job_history (account_id, job_id, version, at, status, attempt, step)
    select n.account_id, n.id, n.version, n.changed_at, n.status, n.attempt, n.progress->>'step' from new_rows n;
  if exists (select from new_rows n where n.batch_id is not null) then
    insert into batches (account_id, id) select distinct n.account_id, n.batch_id from new_rows n where n.batch_id is not null order by 1, 2
      on conflict do nothing;
    perform shift_batches(array_agg(n.account_id), array_agg(n.batch_id), array_agg(null::text), array_agg(n.status))
      from new_rows n where n.batch_id is not null;
  end if;
  return null;
end $$;

create function jobs_updated() returns trigger language plpgsql
-- A session keeps the plans of its first call. Made for one row, nested loops would later compare each of 500 rows with each.
set enable_hashjoin = on set enable_nestloop = off as $$
declare gone bigint[];
begin
  perform note_in_outbox(array_agg(n.account_id), array_agg(n.id))
    from new_rows n join old_rows o using (account_id, id) where n.version > o.version having count(*) > 0;
  if not found then return null; end if;      -- heartbeats only: nothing that a reader could see
  insert into job_history (account_id, job_id, version, at, status, previous_status, attempt, step, error)
    select n.account_id, n.id, n.version, n.changed_at, n.status, o.status, n.attempt, n.progress->>'step', n.error
    from new_rows n join old_rows o using (account_id, id)
    where (n.status, n.attempt, n.progress->>'step', n.error, n.stalled) is distinct from (o.status, o.attempt, o.progress->>'step', o.error, o.stalled);
  select array_agg(o.result_id) into gone from new_rows n join old_rows o using (account_id, id)
    where o.result_id is not null and n.result_id is distinct from o.result_id;
  if gone is not null then
    delete from results r where r.id = any (gone);
  end if;
  if exists (select from new_rows n join old_rows o using (account_id, id) where n.status <> o.status and n.batch_id is not null) then
    perform shift_batches(array_agg(n.account_id), array_agg(n.batch_id), array_agg(o.status), array_agg(n.status))
      from new_rows n join old_rows o using (account_id, id) where n.status <> o.status and n.batch_id is not null;
  end if;
  return null;
end $$;

create function jobs_deleted() returns trigger language plpgsql set enable_hashjoin = on as $$
begin
  perform note_in_outbox(array_agg(o.account_id), array_agg(o.id)) from old_rows o having count(*) > 0;
  insert into tombstones (account_id, id, version, expired_at)
    select o.account_id, o.id, o.version + 1, case when o.expires_at <= clock_timestamp() then o.expires_at end from old_rows o
    on conflict (account_id, id) do update set version = excluded.version, at = excluded.at, expired_at = excluded.expired_at;
  delete from job_history h using old_rows o where h.account_id = o.account_id and h.job_id = o.id;
  delete from results r using old_rows o where r.id = o.result_id;
  perform shift_batches(array_agg(o.account_id), array_agg(o.batch_id), array_agg(o.status), array_agg(null::text))
    from old_rows o where o.batch_id is not null having count(*) > 0;
  return null;
end $$;

create trigger jobs_inserted after insert on jobs referencing new table as new_rows for each statement execute function jobs_inserted();
create trigger jobs_updated after update on jobs referencing old table as old_rows new table as new_rows for each statement execute function jobs_updated();
create trigger jobs_deleted after delete on jobs referencing old table as old_rows for each statement execute function jobs_deleted();

-- The group commit ------------------------------------------------------------------------------------------------

create function merge_top_level(held jsonb, given jsonb) returns jsonb language sql immutable parallel safe as $$
  select (held || given) - coalesce((select array_agg(key) from jsonb_each(given) where value = 'null'), '{}');
$$;
comment on function merge_top_level is 'Parts given replace parts held; a part given as null is removed. Deeper levels are not merged.';

create function report_jobs(accounts int[], ids text[], statuses text[], progresses jsonb[], errors text[], details jsonb[], metadatas jsonb[],
                            attempts int[], if_matches text[], retries bool[], result_ids bigint[], result_digests bytea[])
returns table (n bigint, outcome text, held_status text, held_attempt int, gone_expired_at timestamptz, xid text, job jobs) language plpgsql
set plan_cache_mode = force_generic_plan set lock_timeout = '1s'
-- Lookups by primary key only, whatever the statistics say: a plan made while the table was small must not scan it when it has grown.
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
begin return query
with item as materialized (                     -- locks are taken in the order of (account, id): no two calls can wait for each other
  select * from unnest(accounts, ids, statuses, progresses, errors, details, metadatas, attempts, if_matches, retries, result_ids, result_digests) with ordinality
    as t (account_id, id, status, progress, error, error_details, metadata, attempt, if_match, retry, result_id, result_digest, n)
  order by account_id, id
), held as materialized (                       -- the only place that locks jobs for a report
  select i.n, i.account_id as item_account, i.id as item_id, i.status as to_status, i.progress as new_progress, i.error as new_error,
         i.error_details as new_details, i.metadata as new_metadata, i.attempt as of_attempt, i.if_match, i.retry, i.result_id as new_result,
         i.result_digest as new_digest, l.*
  from item i left join lateral (
    select j.account_id, j.id, j.status, j.version, j.attempt, j.changed_at, j.progress, j.metadata, j.stalled, j.result_id, j.result_digest,
           case when j.status in ('COMPLETED', 'FAILED', 'CANCELLED') then j end as job      -- the others are written, and come back from there
    from jobs j where j.account_id = i.account_id and j.id = i.id for update) l on true
), merged as materialized (                     -- what each job would be
  select h.*, s.*, h.status in ('COMPLETED', 'FAILED', 'CANCELLED') as finished,
         greatest(date_trunc('milliseconds', clock_timestamp()), h.changed_at) as at,     -- read under the lock, so versions and times agree
         case when h.retry then '{}'
              when h.new_progress is null and s.next_status = h.status then h.progress
              when s.next_status = 'COMPLETED' then k.kept - 'queue_position' || '{"percentage": 100}'
              when s.next_status <> 'queued' and not coalesce(h.new_progress, '{}') ? 'queue_position' then k.kept - 'queue_position'
              else k.kept end as next_progress,
         case when h.new_metadata is null then h.metadata
              when jsonb_path_exists(h.new_metadata, '$.* ? (@ == null)') then merge_top_level(h.metadata, h.new_metadata)
              else h.metadata || h.new_metadata end as next_metadata,
         h.new_digest = h.result_digest as same_result
  from held h
    cross join lateral (select coalesce(h.to_status, h.status) as next_status,
                               coalesce(h.to_status = 'queued' and h.status <> 'queued', false) as begins_attempt) s
    -- Parts given replace parts held, null removes; a new attempt begins empty. The parts are scalars, so stripping goes no deeper.
    cross join lateral (select jsonb_strip_nulls(case when s.begins_attempt then '{}' else h.progress end || coalesce(h.new_progress, '{}')) as parts) p
    -- Percentage never falls within an attempt.
    cross join lateral (select case when not s.begins_attempt and (h.progress->'percentage')::numeric > coalesce((p.parts->'percentage')::numeric, -1)
                                    then p.parts || jsonb_build_object('percentage', h.progress->'percentage') else p.parts end as kept) k
), verdict as materialized (
  select m.n, m.account_id, m.id, m.status, m.attempt, m.job, m.finished, m.next_status, m.next_progress, m.next_metadata, m.begins_attempt, m.at,
         m.new_error, m.new_details, m.new_result, m.new_digest, m.retry, t.expired_at as gone_expired_at, case
      when m.id is null then case when t.id is not null then case when t.expired_at is null then 'deleted' else 'expired' end
                                  when exists (select from jobs x where x.id = m.item_id and x.account_id <> m.item_account) then 'forbidden' else 'not_found' end
      when m.if_match <> '*' and not format('"%s-%s"', m.version, (extract(epoch from m.changed_at) * 1000)::bigint) = any (string_to_array(m.if_match, ',')) then 'precondition_failed'
      when m.of_attempt < m.attempt then 'stale_attempt'
      when m.of_attempt > m.attempt then 'unknown_attempt'
      when m.retry then case when m.status = 'FAILED' then 'changed' else 'invalid_transition' end
      when m.finished and m.next_status <> m.status then 'invalid_transition'
      when m.finished and m.new_result is not null then
        case when m.same_result then 'same' when m.status = 'COMPLETED' and m.result_id is null then 'changed' else 'result_final' end
      when m.finished and m.to_status is null and (m.new_progress is not null or m.new_metadata is not null) then 'invalid_transition'
      when m.finished and (m.next_progress <> m.progress or m.next_metadata <> m.metadata) then 'invalid_transition'
      when m.finished then 'same'
      when m.next_metadata <> m.metadata and octet_length(m.next_metadata::text) > 16384 then 'metadata_too_large'
      when m.next_status <> m.status or m.stalled or m.next_progress <> m.progress or m.next_metadata <> m.metadata
           or (m.new_result is not null and m.same_result is not true) then 'changed'
      else 'same' end as outcome
  from merged m left join lateral (select * from tombstones t where m.id is null and t.account_id = m.item_account and t.id = m.item_id limit 1) t on true
), written as (
  update jobs j set
      status = v.next_status, progress = v.next_progress, metadata = v.next_metadata, stalled = false,
      version = j.version + (v.outcome = 'changed')::int,
      attempt = j.attempt + v.begins_attempt::int,
      changed_at = case when v.outcome = 'changed' then v.at else j.changed_at end,
      updated_at = case when v.outcome = 'changed' then v.at else j.updated_at end,
      heartbeat_at = v.at,
      started_at = case when v.next_status = 'PROCESSING' then coalesce(j.started_at, v.at) else j.started_at end,
      completed_at = case when v.next_status in ('COMPLETED', 'FAILED', 'CANCELLED') then coalesce(j.completed_at, v.at) end,
      expires_at = case when v.next_status in ('COMPLETED', 'FAILED', 'CANCELLED')
        then coalesce(j.expires_at, v.at + (select a.retention from accounts a where a.id = j.account_id)) end,
      error = case when v.next_status in ('FAILED', 'CANCELLED') then coalesce(j.error, v.new_error) end,
      error_details = case when v.next_status in ('FAILED', 'CANCELLED') then coalesce(j.error_details, v.new_details) end,
      result_id = case when v.begins_attempt then v.new_result when v.outcome = 'changed' then coalesce(v.new_result, j.result_id) else j.result_id end,
      result_digest = case when v.begins_attempt then v.new_digest when v.outcome = 'changed' then coalesce(v.new_digest, j.result_digest) else j.result_digest end
    from verdict v
    where j.account_id = v.account_id and j.id = v.id and (v.outcome = 'changed' or (v.outcome = 'same' and not v.finished))
    returning v.n, v.outcome, v.status as held_status, v.attempt as held_attempt, j
)
select w.n, w.outcome, w.held_status, w.held_attempt, null::timestamptz, pg_current_xact_id()::text, w.j from written w
union all
select v.n, v.outcome, v.status, v.attempt, v.gone_expired_at, null,
       case when v.outcome = 'same' then v.job end      -- the row as it was locked; the snapshot's may be older
  from verdict v where not (v.outcome = 'changed' or (v.outcome = 'same' and not v.finished))
order by 1;
end $$;
comment on function report_jobs is
  'Takes any number of reports, at most one per job, in one commit: locks, judges and writes. One outcome per item, in the order given. '
  'A caller never names a job twice in one call; the second report waits for the next call.';

-- Creating and deleting -------------------------------------------------------------------------------------------

create function create_jobs(account int, items jsonb, close_batches text[]) returns table (outcome text, conflict_id text, job jobs) language plpgsql
set plan_cache_mode = force_generic_plan set lock_timeout = '1s'
-- Lookups by primary key only; see report_jobs.
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set enable_bitmapscan = off as $$
declare
  buried text;
  asked record;
  held batches;
  at timestamptz := date_trunc('milliseconds', clock_timestamp());
begin
  return query
    select case when t.id is null then 'already_exists' else 'tombstone' end, i.id, null::jobs
    from jsonb_to_recordset(items) i(id text)
      left join lateral (select x.id from jobs x where x.account_id = account and x.id = i.id limit 1) j on true
      left join lateral (select x.id from tombstones x where x.account_id = account and x.id = i.id
                         and x.at > clock_timestamp() - interval '30 days' limit 1) t on true
    where j.id is not null or t.id is not null;
  if found then return; end if;

  return query
    with inserted as (
      insert into jobs (account_id, id, type, progress, metadata, parameters, batch_id, tags, user_id, pdf_name, pdf_hash, file_count,
                        heartbeat_timeout_s, stalled_action, public, notification, webhook_url, created_at, changed_at, updated_at, heartbeat_at)
      select account, i.id, i.type, i.progress, i.metadata, i.parameters, i.batch_id, i.tags, i.user_id, i.pdf_name, i.pdf_hash, i.file_count,
             i.heartbeat_timeout_s, i.stalled_action, i.public, i.notification, i.webhook_url, at, at, at, at
      from jsonb_to_recordset(items) i(id text, type text, progress jsonb, metadata jsonb, parameters jsonb, batch_id text, tags text[], user_id text,
             pdf_name text, pdf_hash text, file_count int, heartbeat_timeout_s int, stalled_action text, public bool, notification jsonb, webhook_url text)
      order by i.id
      returning jobs)
    select 'created', null, i.jobs from inserted i;

  -- An id that was created and deleted while this insert waited for it has a tombstone by now.
  select t.id into buried from jsonb_to_recordset(items) i(id text)
    cross join lateral (select x.id from tombstones x where x.account_id = account and x.id = i.id
                        and x.at > clock_timestamp() - interval '30 days' limit 1) t limit 1;
  if buried is not null then
    raise exception 'tombstone' using errcode = 'JW003', detail = buried;
  end if;

  -- The trigger has locked these batches already, so what follows cannot wait. Mostly there is one.
  for asked in
    select i.batch_id as id, min(i.batch_size) as size, count(distinct i.batch_size) as sizes, i.batch_id = any (close_batches) as close
    from jsonb_to_recordset(items) i(batch_id text, batch_size int) where i.batch_id is not null group by i.batch_id
  loop
    select * into held from batches b where b.account_id = account and b.id = asked.id;
    if asked.sizes > 1 or held.size <> asked.size or held.total > asked.size then
      raise exception 'batch size' using errcode = 'JW002', detail = asked.id;
    end if;
    update batches b set size = coalesce(held.size, asked.size),
        closed = asked.close or coalesce(held.total >= coalesce(held.size, asked.size), false)
      where b.account_id = account and b.id = asked.id;
  end loop;
end $$;
comment on function create_jobs is
  'All jobs of one request, or none. Rows that say already_exists or tombstone: nothing was written. '
  'Raises JW001 (batch is closed), JW002 (batch_size disagrees) or JW003 (the id was deleted meanwhile), each with the id in detail.';

create function delete_job(account int, job_id text, if_match text) returns table (outcome text, gone_expired_at timestamptz, version bigint, batch_id text, xid text) language plpgsql
set lock_timeout = '1s' as $$
declare held jobs; tomb tombstones;
begin
  select * into held from jobs j where j.account_id = account and j.id = job_id for update;
  if found then
    if if_match <> '*' and not format('"%s-%s"', held.version, (extract(epoch from held.changed_at) * 1000)::bigint) = any (string_to_array(if_match, ',')) then
      return query select 'precondition_failed', null::timestamptz, held.version, held.batch_id, null; return;
    end if;
    delete from jobs j where j.account_id = account and j.id = job_id;
    return query select 'deleted', null::timestamptz, held.version + 1, held.batch_id, pg_current_xact_id()::text; return;
  end if;
  select * into tomb from tombstones t where t.account_id = account and t.id = job_id;
  if found then
    return query select case when tomb.expired_at is null then 'gone_deleted' else 'gone_expired' end, tomb.expired_at, tomb.version, null, null; return;
  end if;
  return query select case when exists (select from jobs j where j.id = job_id) then 'forbidden' else 'not_found' end, null::timestamptz, null::bigint, null, null;
end $$;
comment on function delete_job is 'Removes a job in any state; the trigger leaves its tombstone.';

-- migrate:down

drop function delete_job, create_jobs, report_jobs, merge_top_level;
drop table idempotency_keys, outbox, batches, tombstones, job_history, results, jobs, keys, accounts;
drop function jobs_inserted, jobs_updated, jobs_deleted, shift_batches, note_in_outbox;
