-- Tells of committed changes: refreshes the entries that are there, plants none, announces.
--
-- KEYS     status keys, one for each change
-- ARGV     life, entry_lifetime_ms, then for each change:
--          version (15 digits), payload ('': the job is gone), message, number of topics, the topics
-- returns  for each change: 1 stored and announced, 2 announced only, 0 a newer version was there: nothing done
--
-- An entry of the same version is announced again: it may be a reader's fill, which announced nothing.
-- Where there is no entry of this life, whatever is there goes: a lease, so that no reader fills in what it read
-- before this change; an absence, because a change that comes after the job's deletion must not bring it back.

local life, entry_lifetime_ms = ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now_ms = string.format('%013.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local ABSENCE = '000000000000000'

local function held_version(key)
  local head = redis.call('GETRANGE', key, 0, 22)
  local version = string.sub(head, 9, 23)
  if string.sub(head, 1, 8) == life and version ~= ABSENCE then return version end
  return nil
end

local function store(key, version, payload)
  local entry = life .. version .. now_ms .. payload
  return not redis.pcall('SET', key, entry, 'PX', entry_lifetime_ms).err
end

local function put(key, version, payload)
  local held = payload ~= '' and held_version(key)
  if held and held > version then return 0 end -- digits of equal width compare as numbers do
  if held and store(key, version, payload) then return 1 end
  redis.call('UNLINK', key) -- also when there is no memory: nothing is better than something old
  return 2
end

local codes, at = {}, 3
for i, key in ipairs(KEYS) do
  local version, payload, message, topics = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  codes[i] = put(key, version, payload)
  if codes[i] ~= 0 then
    for topic = at + 4, at + 3 + topics do
      redis.call('PUBLISH', ARGV[topic], message)
    end
  end
  at = at + 4 + topics
end
return codes
