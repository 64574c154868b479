-- migrate:up

create table job_changes (
  account_id int not null,
  xid        xid8 not null default pg_current_xact_id(),
  at         timestamptz not null default clock_timestamp(),
  jobs       text[] not null,
  versions   bigint[] not null,
  were       text[] not null,
  became     text[] not null,
  batch_ids  text[] not null
);
create index job_changes_by_position on job_changes (account_id, xid);
create index job_changes_by_age on job_changes (at);
comment on table job_changes is
  'What changed lately, for readers who come back: one row per statement and account, never updated, kept for an hour. '
  'A position is an xid below which every transaction had ended: the rows at or above it are all that can have been missed, '
  'also those of a transaction that began early and committed late.';
comment on column job_changes.versions is 'The versions that the jobs came to have; of a deleted job its tombstone''s.';
comment on column job_changes.were is 'The status before; null: created.';
comment on column job_changes.became is 'The status after; null: deleted.';

create table job_changes_floor (
  only_row bool primary key default true constraint there_is_one_row check (only_row),
  xid      xid8 not null
);
insert into job_changes_floor (xid) values (pg_current_xact_id());
comment on table job_changes_floor is 'The newest xid of job_changes that was forgotten: positions at or below it are no longer known.';

alter table tombstones
  add column batch_id text collate "C",
  add column user_id  text,
  add column tags     text[] not null default '{}';
comment on column tombstones.tags is 'Beside batch_id and user_id: who follows by these is told of the deletion.';

create or replace function jobs_inserted() returns trigger language plpgsql set enable_hashjoin = on as $$
begin
  perform note_in_outbox(array_agg(n.account_id), array_agg(n.id)) from new_rows n having count(*) > 0;
  insert into job_changes (account_id, jobs, versions, were, became, batch_ids)
    select n.account_id, array_agg(n.id), array_agg(n.version), array_agg(null::text), array_agg(n.status), array_agg(n.batch_id)
    from new_rows n group by n.account_id;
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

create or replace function jobs_updated() returns trigger language plpgsql
-- A session keeps the plans of its first call. Made for one row, nested loops would later compare each of 500 rows with each.
set enable_hashjoin = on set enable_nestloop = off as $$
declare gone bigint[];
begin
  insert into job_changes (account_id, jobs, versions, were, became, batch_ids)
    select n.account_id, array_agg(n.id), array_agg(n.version), array_agg(o.status), array_agg(n.status), array_agg(n.batch_id)
    from new_rows n join old_rows o using (account_id, id) where n.version > o.version group by n.account_id;
  if not found then return null; end if;      -- heartbeats only: nothing that a reader could see
  perform note_in_outbox(array_agg(n.account_id), array_agg(n.id))
    from new_rows n join old_rows o using (account_id, id) where n.version > o.version;
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

create or replace function jobs_deleted() returns trigger language plpgsql set enable_hashjoin = on as $$
begin
  perform note_in_outbox(array_agg(o.account_id), array_agg(o.id)) from old_rows o having count(*) > 0;
  insert into job_changes (account_id, jobs, versions, were, became, batch_ids)
    select o.account_id, array_agg(o.id), array_agg(o.version + 1), array_agg(o.status), array_agg(null::text), array_agg(o.batch_id)
    from old_rows o group by o.account_id;
  insert into tombstones (account_id, id, version, expired_at, batch_id, user_id, tags)
    select o.account_id, o.id, o.version + 1, case when o.expires_at <= clock_timestamp() then o.expires_at end, o.batch_id, o.user_id, o.tags
    from old_rows o
    on conflict (account_id, id) do update set version = excluded.version, at = excluded.at, expired_at = excluded.expired_at,
      batch_id = excluded.batch_id, user_id = excluded.user_id, tags = excluded.tags;
  delete from job_history h using old_rows o where h.account_id = o.account_id and h.job_id = o.id;
  delete from results r using old_rows o where r.id = o.result_id;
  perform shift_batches(array_agg(o.account_id), array_agg(o.batch_id), array_agg(o.status), array_agg(null::text))
    from old_rows o where o.batch_id is not null having count(*) > 0;
  return null;
end $$;

drop function delete_job;
create function delete_job(account int, job_id text, if_match text)
returns table (outcome text, gone_expired_at timestamptz, version bigint, held_status text, batch_id text, user_id text, tags text[], xid text)
language plpgsql set lock_timeout = '1s' as $$
declare held jobs; tomb tombstones;
begin
  select * into held from jobs j where j.account_id = account and j.id = job_id for update;
  if found then
    if if_match <> '*' and not format('"%s-%s"', held.version, (extract(epoch from held.changed_at) * 1000)::bigint) = any (string_to_array(if_match, ',')) then
      return query select 'precondition_failed', null::timestamptz, held.version, held.status, held.batch_id, held.user_id, held.tags, null; return;
    end if;
    delete from jobs j where j.account_id = account and j.id = job_id;
    return query select 'deleted', null::timestamptz, held.version + 1, held.status, held.batch_id, held.user_id, held.tags, pg_current_xact_id()::text;
    return;
  end if;
  select * into tomb from tombstones t where t.account_id = account and t.id = job_id;
  if found then
    return query select case when tomb.expired_at is null then 'gone_deleted' else 'gone_expired' end, tomb.expired_at, tomb.version,
      null, tomb.batch_id, tomb.user_id, tomb.tags, null; return;
  end if;
  return query select case when exists (select from jobs j where j.id = job_id) then 'forbidden' else 'not_found' end, null::timestamptz, null::bigint,
    null, null, null, null::text[], null;
end $$;
comment on function delete_job is 'Removes a job in any state; the trigger leaves its tombstone.';

-- As before, and says also whether the job was stalled: readers are told when that ends.
drop function report_jobs;
create function report_jobs(accounts int[], ids text[], statuses text[], progresses jsonb[], errors text[], details jsonb[], metadatas jsonb[],
                            attempts int[], if_matches text[], retries bool[], result_ids bigint[], result_digests bytea[])
returns table (n bigint, outcome text, held_status text, held_attempt int, held_stalled bool, gone_expired_at timestamptz, xid text, job jobs) language plpgsql
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
  select m.n, m.account_id, m.id, m.status, m.attempt, m.stalled, m.job, m.finished, m.next_status, m.next_progress, m.next_metadata, m.begins_attempt, m.at,
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
    returning v.n, v.outcome, v.status as held_status, v.attempt as held_attempt, v.stalled as held_stalled, j
)
select w.n, w.outcome, w.held_status, w.held_attempt, w.held_stalled, null::timestamptz, pg_current_xact_id()::text, w.j from written w
union all
select v.n, v.outcome, v.status, v.attempt, v.stalled, v.gone_expired_at, null,
       case when v.outcome = 'same' then v.job end      -- the row as it was locked; the snapshot's may be older
  from verdict v where not (v.outcome = 'changed' or (v.outcome = 'same' and not v.finished))
order by 1;
end $$;
comment on function report_jobs is
  'Takes any number of reports, at most one per job, in one commit: locks, judges and writes. One outcome per item, in the order given. '
  'A caller never names a job twice in one call; the second report waits for the next call.';

create function forget_changes(kept interval, most int) returns int language plpgsql as $$
declare forgotten int; newest xid8;
begin
  with gone as (delete from job_changes where ctid = any (array(
                  select ctid from job_changes where at < statement_timestamp() - kept order by at limit most for update skip locked)) returning xid)
    select count(*), max(xid::text::numeric)::text::xid8 into forgotten, newest from gone;
  if forgotten > 0 then
    update job_changes_floor set xid = greatest(xid, newest);
  end if;
  return forgotten;
end $$;
comment on function forget_changes is 'Forgets at most so many rows that are older than they are kept; how many it were.';

-- migrate:down

drop function forget_changes;
drop function report_jobs;
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
drop function delete_job;
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
create or replace function jobs_deleted() returns trigger language plpgsql set enable_hashjoin = on as $$
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
create or replace function jobs_inserted() returns trigger language plpgsql set enable_hashjoin = on as $$
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
create or replace function jobs_updated() returns trigger language plpgsql
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
alter table tombstones drop column tags, drop column user_id, drop column batch_id;
drop table job_changes_floor, job_changes;
