-- migrate:up

alter table batches add column changed_at timestamptz(3) not null default date_trunc('milliseconds', clock_timestamp());
comment on column batches.changed_at is 'When version last grew; never runs backwards.';

alter table jobs add column attempt_started_at timestamptz(3);
comment on column jobs.attempt_started_at is 'When the present attempt began to be worked on: the pace of a job is measured from here.';

create or replace function shift_batches(accounts int[], batch_ids text[], were text[], became text[]) returns void language plpgsql
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
      version = b.version + 1, changed_at = greatest(date_trunc('milliseconds', clock_timestamp()), b.changed_at)
    from (select s.account_id, s.id,
            sum((s.became is not null)::int - (s.was is not null)::int) as total,
            sum((s.became is not distinct from 'queued')::int - (s.was is not distinct from 'queued')::int) as queued,
            sum((s.became is not distinct from 'PROCESSING')::int - (s.was is not distinct from 'PROCESSING')::int) as processing,
            sum((s.became is not distinct from 'COMPLETED')::int - (s.was is not distinct from 'COMPLETED')::int) as completed,
            sum((s.became is not distinct from 'FAILED')::int - (s.was is not distinct from 'FAILED')::int) as failed,
            sum((s.became is not distinct from 'CANCELLED')::int - (s.was is not distinct from 'CANCELLED')::int) as cancelled
          from unnest(accounts, batch_ids, were, became) s(account_id, id, was, became) group by 1, 2) d
    where b.account_id = d.account_id and b.id = d.id;
  -- A batch stands in the outbox beside its jobs, under a name that no job can have.
  perform note_in_outbox(array_agg(s.account_id), array_agg('batch/' || s.id))
    from (select distinct account_id, id from unnest(accounts, batch_ids) u(account_id, id)) s;
end $$;

create function begin_attempt() returns trigger language plpgsql as $$
begin
  new.attempt_started_at := case when new.status = 'PROCESSING' then new.changed_at when new.status = 'queued' then null else new.attempt_started_at end;
  return new;
end $$;
create trigger begin_attempt before update on jobs for each row
  when (old.status is distinct from new.status) execute function begin_attempt();

create function close_batch(account int, batch text) returns table (outcome text, xid text) language plpgsql set lock_timeout = '1s' as $$
declare held batches;
begin
  select * into held from batches b where b.account_id = account and b.id = batch for update;
  if not found then return query select 'not_found', null::text; return; end if;
  if held.closed then return query select 'same', null::text; return; end if;
  update batches b set closed = true, version = b.version + 1, changed_at = greatest(date_trunc('milliseconds', clock_timestamp()), b.changed_at)
    where b.account_id = account and b.id = batch;
  perform note_in_outbox(array[account], array['batch/' || batch]);
  return query select 'changed', pg_current_xact_id()::text;
end $$;
comment on function close_batch is 'No more jobs; from now on the batch can be over. Closing again is fine.';

-- migrate:down

drop function close_batch;
drop trigger begin_attempt on jobs;
drop function begin_attempt;
alter table jobs drop column attempt_started_at;
alter table batches drop column changed_at;
create or replace function shift_batches(accounts int[], batch_ids text[], were text[], became text[]) returns void language plpgsql
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
