-- What is newer than what the asker holds; a miss is leased to it.
--
-- KEYS     status keys
-- ARGV     life, lease token, unverified_after_ms, lease_lifetime_ms, then for each key the version held (0: none)
-- returns  for each key one of
--            0            nothing newer than what is held
--            1            a miss, and the asker holds the lease
--            2            a miss, and it does not: another reader holds the lease, or Redis could not store one
--            3            nothing newer, but Redis has not heard from Postgres for unverified_after_ms
--            string       version (15 digits) and payload of something newer, or of an absence whatever is held
--            {3, string}  the same, but not verified either
--
-- A value is a lease: '?', token
--    or an entry: life (8 characters), version (15 digits), verified_ms (13 digits, by Redis's clock), payload

local life, token, lease_lifetime_ms = ARGV[1], ARGV[2], ARGV[4]
local time = redis.call('TIME')
local verified_since_ms = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[3]
local ABSENCE = '000000000000000'

local function miss(key, head)
  if string.sub(head, 1, 1) == '?' then return 2 end
  local lease = redis.pcall('SET', key, '?' .. token, 'PX', lease_lifetime_ms)
  return lease.err and 2 or 1
end

local function read(key, held)
  local head = redis.call('GETRANGE', key, 0, 35)
  if string.sub(head, 1, 8) ~= life then return miss(key, head) end
  local version = string.sub(head, 9, 23)
  local verified = tonumber(string.sub(head, 24, 36)) >= verified_since_ms
  if version ~= ABSENCE and tonumber(version) <= held then return verified and 0 or 3 end
  local found = version .. redis.call('GETRANGE', key, 36, -1)
  return verified and found or {3, found}
end

local readings = {}
for i, key in ipairs(KEYS) do
  readings[i] = read(key, tonumber(ARGV[4 + i]))
end
return readings
