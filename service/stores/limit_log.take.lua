-- Takes places of a rolling window: never more than `limit` in ANY window of that length, on Redis's own clock.
--
-- KEYS[1]  the log: a string of records of 16 bytes, each (instant in us, running total of places), both big-endian doubles
-- ARGV[1]  places wanted (0: only look)
-- ARGV[2]  limit
-- ARGV[3]  window_us
-- ARGV[4]  grain_us: records closer than this become one, dated by the LATER, so that a place may come back
--          late by this much but never early, and the log has at most window/grain records plus the used-up ones
-- Returns  {places granted, places left after that (below 0 where the limit was lowered), us until the next place comes back
--          (0: none is in use)}
local want, limit, window, grain = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local log, size = KEYS[1], 16

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local records = redis.call('STRLEN', log) / size
local function record(i) return struct.unpack('>dd', redis.call('GETRANGE', log, i * size, (i + 1) * size - 1)) end

local newest, total = nil, 0
if records > 0 then
  newest, total = record(records - 1)
  if newest > now then now = newest end                -- the clock was set back: time stands still until it has caught up
end

local first, behind = 0, records                       -- the first record inside the window, by halving
while first < behind do
  local middle = math.floor((first + behind) / 2)
  if record(middle) > now - window then behind = middle else first = middle + 1 end
end
local before = 0                                       -- the running total at the window's edge
if first > 0 then local _; _, before = record(first - 1) end

local used = total - before
local granted = math.min(want, math.max(0, limit - used))
if granted > 0 then
  local last_but_one = 0
  if records > 1 then last_but_one = record(records - 2) end
  local entry = struct.pack('>dd', now, total + granted)
  if records > first + 1 and now - last_but_one < grain then
    redis.call('SETRANGE', log, (records - 1) * size, entry)
  else
    redis.call('APPEND', log, entry)
    records = records + 1
  end
  if first > 512 and first > records / 2 then          -- mostly used up: keep the edge and what is inside
    redis.call('SET', log, redis.call('GETRANGE', log, (first - 1) * size, -1))
    records = records - first + 1
    first = 1
  end
  redis.call('PEXPIRE', log, math.ceil(window / 1000) + 1000)
end

local leaving = first
if used > limit then                                   -- it was lowered: the oldest place coming back is not enough
  while leaving < records - 1 and total - select(2, record(leaving)) >= limit do leaving = leaving + 1 end
end
local until_next = 0
if records > first then until_next = record(leaving) + window - now end
return {granted, limit - used - granted, until_next}
