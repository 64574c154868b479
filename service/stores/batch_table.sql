-- name: read
-- $1 accounts, $2 batch ids, $3 how many jobs to show, $4 whether with their percentages.
-- Any number of batches, in the order asked, each with its first jobs: a line of words for each, which none of them parts.
-- (Plain text, because a thousand jobs as JSON take three times as long.)
select k.n, b.*,
       (select string_agg(s.id || ' ' || s.status || ' ' || s.type || case when $4 then ' ' || coalesce(s.progress->>'percentage', '0') else '' end,
                          e'\n' order by s.created_at, s.id)
        from (select j.id, j.status, j.type, j.progress, j.created_at from jobs j
              where j.account_id = k.account and j.batch_id = k.batch order by j.created_at, j.id limit $3) s) as jobs
from unnest($1::int[], $2::text[]) with ordinality k(account, batch, n)
  left join lateral (select * from batches where account_id = k.account and id = k.batch limit 1) b on true
order by k.n;

-- name: versions
-- Only the versions of any number of batches, in the order asked; null where there is none.
select k.n, b.version from unnest($1::int[], $2::text[]) with ordinality k(account, batch, n)
  left join lateral (select version from batches where account_id = k.account and id = k.batch limit 1) b on true
order by k.n;

-- name: close
-- No more jobs. See close_batch in the migrations.
select outcome, xid from close_batch($1, $2);
