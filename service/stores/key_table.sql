-- name: still_valid
-- $1 hashes. Who calls with each of these keys; a key that is unknown, revoked or expired has no row.
select k.hash, k.account_id, a.name as account, k.id as key_id, k.scopes, k.expires_at, k.limits
from keys k join accounts a on a.id = k.account_id
where k.hash = any ($1::bytea[]) and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp());

-- name: valid_by_id
-- $1 id. The hash of a valid key, and who calls with it.
select k.hash, k.account_id, a.name as account, k.id as key_id, k.scopes, k.expires_at, k.limits
from keys k join accounts a on a.id = k.account_id
where k.id = $1 and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp());

-- name: create
-- $1 account name, $2 id, $3 hash, $4 scopes, $5 limits, $6 time until it expires or null. The account must exist.
insert into keys (account_id, id, hash, scopes, limits, expires_at)
select a.id, $2, $3, $4, $5::jsonb, clock_timestamp() + $6::interval from accounts a where a.name = $1;

-- name: list
-- $1 account name, or null for all. Every key with its state of this moment, oldest first.
select k.id as key_id, a.name as account, k.scopes, k.limits, k.created_at, k.expires_at, k.revoked_at,
       case when k.revoked_at is not null then 'revoked'
            when k.expires_at <= clock_timestamp() then 'expired'
            else 'active' end as state
from keys k join accounts a on a.id = k.account_id
where $1::text is null or a.name = $1
order by k.created_at, k.id;

-- name: revoke
-- $1 id. One row, or none if there is no such key; a key that is revoked already keeps its date.
update keys set revoked_at = coalesce(revoked_at, clock_timestamp()) where id = $1 returning id;
