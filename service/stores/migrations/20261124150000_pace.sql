-- migrate:up

alter table jobs
  add column pace_start      double precision,
  add column pace_reached    double precision,
  add column pace_point_s    double precision,
  add column pace_reached_at timestamptz(3);
comment on column jobs.pace_start is 'The percentage from which the pace is measured: that with which the attempt began to be worked on; null: it never was.';
comment on column jobs.pace_reached is 'The percentage up to which the pace is measured. Moves by a point or more: what is less says nothing of a pace.';
comment on column jobs.pace_point_s is 'Seconds that a point takes: the average from pace_start to pace_reached, in which what lies 10 points back counts a third (1/e).';
comment on column jobs.pace_reached_at is 'When pace_reached was reached.';

create function percentage_done(progress jsonb) returns double precision language sql immutable parallel safe as $$
  select least(100, coalesce((progress->'percentage')::float8,
                             100 * (progress->'files_completed')::float8 / nullif((progress->'total_files')::float8, 0), 0))
$$;
comment on function percentage_done is 'The percentage that was told; if none was, that of the files; 0 when nothing is known.';

create or replace function begin_attempt() returns trigger language plpgsql as $$
begin
  if new.status = 'PROCESSING' then
    new.attempt_started_at := new.changed_at;
    new.pace_start := percentage_done(new.progress);
    new.pace_reached := new.pace_start;
    new.pace_point_s := 0;
    new.pace_reached_at := new.changed_at;
  elsif new.status = 'queued' then
    new.attempt_started_at := null;
  end if;
  return new;
end $$;

-- As before, and keeps the pace.
create or replace function report_jobs(accounts int[], ids text[], statuses text[], progresses jsonb[], errors text[], details jsonb[], metadatas jsonb[],
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
         m.new_error, m.new_details, m.new_result, m.new_digest, m.retry,
         case when m.new_progress is not null and m.status = 'PROCESSING' and m.next_status = 'PROCESSING' then percentage_done(m.next_progress) end as done,
         t.expired_at as gone_expired_at, case
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
      result_digest = case when v.begins_attempt then v.new_digest when v.outcome = 'changed' then coalesce(v.new_digest, j.result_digest) else j.result_digest end,
      -- An average that fades by 1/e in 10 points; the divisor takes away the weight of what lies before pace_start. After a fall (files were
      -- added) it begins anew. Written out here: a row trigger that changes the row would cost a tenth of the whole commit.
      pace_point_s = case when v.done >= j.pace_reached + 1
                      then j.pace_point_s + (date_part('epoch', v.at - j.pace_reached_at) / (v.done - j.pace_reached) - j.pace_point_s)
                                      * (1 - exp((j.pace_reached - v.done) / 10)) / (1 - exp((j.pace_start - v.done) / 10))
                    else j.pace_point_s end,
      pace_start = case when v.done < j.pace_reached then v.done else j.pace_start end,
      pace_reached = case when v.done >= j.pace_reached + 1 or v.done < j.pace_reached then v.done else j.pace_reached end,
      pace_reached_at = case when v.done >= j.pace_reached + 1 or v.done < j.pace_reached then v.at else j.pace_reached_at end
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

-- migrate:down

-- As it was before.
create or replace function report_jobs(accounts int[], ids text[], statuses text[], progresses jsonb[], errors text[], details jsonb[], metadatas jsonb[],
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

create or replace function begin_attempt() returns trigger language plpgsql as $$
begin
  new.attempt_started_at := case when new.status = 'PROCESSING' then new.changed_at when new.status = 'queued' then null else new.attempt_started_at end;
  return new;
end $$;
drop function percentage_done;
alter table jobs drop column pace_start, drop column pace_reached, drop column pace_point_s, drop column pace_reached_at;
