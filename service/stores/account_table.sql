-- name: create
-- $1 name. One row if the account is new, none if it exists already.
insert into accounts (name) values ($1) on conflict (name) do nothing returning id;

-- name: list
-- All accounts by name, with the number of their keys that are valid now.
select a.name, a.retention, a.created_at, count(k.id) as valid_keys
from accounts a left join keys k
  on k.account_id = a.id and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp())
group by a.id order by a.name;

-- name: set_retention
-- $1 name, $2 how long jobs that finish from now on are kept. One row, or none if there is no such account.
update accounts set retention = $2 where name = $1 returning id;
