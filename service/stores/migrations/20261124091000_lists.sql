-- migrate:up

-- One index for each filter of a list, in the order of its pages: (account, what is asked, created_at, id), so that a page is
-- one short walk wherever it lies. No index here holds a column that mere progress changes.
create index jobs_newest on jobs (account_id, created_at, id) where attempt >= 1;
create index jobs_by_status on jobs (account_id, status, created_at, id);
create index jobs_by_type on jobs (account_id, type, created_at, id);
create index jobs_by_batch on jobs (account_id, batch_id, created_at, id) where batch_id is not null;
create index jobs_by_user on jobs (account_id, user_id, created_at, id) where user_id is not null;
create index jobs_by_tags on jobs using gin (tags) with (gin_pending_list_limit = 256) where tags <> '{}';

comment on index jobs_newest is
  'Of all jobs: attempt >= 1 always. Only a statement that says so can use it, and those with a better index do not say so.';
comment on index jobs_by_tags is
  'For rare tags: finds their jobs, which are then sorted; of common tags the planner reads jobs_newest until a page is full. '
  'The account is not in it (that needs an extension). A short pending list, because every search reads all of it.';

-- migrate:down

drop index jobs_by_tags, jobs_by_user, jobs_by_batch, jobs_by_type, jobs_by_status, jobs_newest;
