-- A line that ends in `-- if <word>` is part of a statement only where that is asked (see page_table.py): a filter that
-- is absent leaves nothing behind that could spoil the plan. Written newest first; oldest first is the same turned round.
-- The account stands in every statement and is not optional.
-- `attempt >= 1` is true of every job: it opens the index jobs_newest, which is closed to statements that have a better one
-- (a walk through jobs_newest looks cheap for a frequent status, and is not where the newest jobs are of another).

-- name: page
-- One walk along one index, in its order, no further than the page.
select j.id, j.status, j.type, j.created_at, j.updated_at, j.completed_at, j.file_count, j.tags, j.batch_id, j.user_id, j.pdf_name,
       j.progress, j.error_details, j.version, eta(j)
from jobs j
where j.account_id = $1
  and j.status = $2                                   -- if status
  and j.type = $3                                     -- if type
  and j.batch_id = $4                                 -- if batch
  and j.user_id = $5                                  -- if user
  and j.tags @> $6 and j.tags <> '{}'                 -- if tags
  and j.attempt >= 1                                  -- if newest
  and j.created_at > $7                               -- if after
  and j.created_at < $8                               -- if before
  and (j.created_at, j.id) < ($9, $10)                -- if beyond
order by j.created_at desc, j.id desc
limit $11 offset $12;

-- name: page_of_several
-- Several statuses or types: one such walk for each of them, no longer than the page, and what they bring sorted together.
select j.*
from unnest($2::text[], $3::text[]) one_of (status, type)
  cross join lateral (
    select j.id, j.status, j.type, j.created_at, j.updated_at, j.completed_at, j.file_count, j.tags, j.batch_id, j.user_id, j.pdf_name,
           j.progress, j.error_details, j.version, eta(j)
    from jobs j
    where j.account_id = $1
      and j.status = one_of.status                    -- if status
      and j.type = one_of.type                        -- if type
      and j.batch_id = $4                             -- if batch
      and j.user_id = $5                              -- if user
      and j.tags @> $6 and j.tags <> '{}'             -- if tags
      and j.created_at > $7                           -- if after
      and j.created_at < $8                           -- if before
      and (j.created_at, j.id) < ($9, $10)            -- if beyond
    order by j.created_at desc, j.id desc
    limit $11::bigint + $12::bigint) j
order by j.created_at desc, j.id desc                 -- if page
limit $11::bigint offset $12::bigint;
