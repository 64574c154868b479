-- Stores what a reader found in Postgres, wherever its lease still stands: then nothing was put since it was taken.
--
-- KEYS     status keys
-- ARGV     lease token, life, entry_lifetime_ms, absence_lifetime_ms,
--          then for each key: version (15 digits; 0: an absence), payload
-- returns  for each key: 1 stored, 0 not (the lease is gone, or there is no memory, and then the lease goes too)

local lease, life = '?' .. ARGV[1], ARGV[2]
local entry_lifetime_ms, absence_lifetime_ms = ARGV[3], ARGV[4]
local time = redis.call('TIME')
local now_ms = string.format('%013.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local ABSENCE = '000000000000000'

local function fill(key, version, payload)
  if redis.call('GETRANGE', key, 0, #lease) ~= lease then return 0 end -- one character more: not a mere beginning
  local lifetime_ms = version == ABSENCE and absence_lifetime_ms or entry_lifetime_ms
  local stored = redis.pcall('SET', key, life .. version .. now_ms .. payload, 'PX', lifetime_ms)
  if not stored.err then return 1 end
  redis.call('UNLINK', key)
  return 0
end

local codes = {}
for i, key in ipairs(KEYS) do
  codes[i] = fill(key, ARGV[3 + 2 * i], ARGV[4 + 2 * i])
end
return codes
