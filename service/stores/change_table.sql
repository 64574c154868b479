-- name: position
-- Every transaction below this xid has ended: what it changed is visible to whoever reads from now on.
select pg_snapshot_xmin(pg_current_snapshot())::text as xid;

-- name: since
-- $1 accounts, $2 from this xid on, $3 of these accounts everything, $4 of the others these batches, $5 rows at most.
-- What changed, oldest first, and whether the position is still known. Both of one snapshot, so that no row is forgotten in between.
select f.xid < $2::text::xid8 and $2::text::xid8 <= pg_snapshot_xmax(pg_current_snapshot()) as known,
       pg_snapshot_xmin(pg_current_snapshot())::text as position, c.*
from job_changes_floor f left join lateral (
  select account_id, xid::text as xid, jobs, versions, were, became, batch_ids from job_changes
  where account_id = any ($1::int[]) and xid >= $2::text::xid8 and (account_id = any ($3::int[]) or batch_ids && $4::text[])
  order by xid limit $5) c on true;

-- name: forget
-- Rows older than an hour, a thousand at a time.
select forget_changes(interval '1 hour', 1000) as forgotten;

-- name: tombstones
-- Deleted jobs by (account, id), with what their followers go by.
select k.n, t.account_id, t.id, t.version, t.batch_id, t.user_id, t.tags
from unnest($1::int[], $2::text[]) with ordinality k(account, job_id, n)
  cross join lateral (select * from tombstones where account_id = k.account and id = k.job_id limit 1) t
order by k.n;
