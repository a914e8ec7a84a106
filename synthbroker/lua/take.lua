-- Gives a consumer the next samples of its group: those of dead members, then fresh ones, then, where `reuse` allows,
-- some that were given before.
--
-- ARGV  2 group  3 consumer (family/worker:word)  4 how many  5 live samples there must be before anything is given
--       6 claim_after_s (negative: do not look for dead members now)  7 random seed
--       8 how many at most, where many more are waiting; negative: that many, and none that was given before  9... producers to take from, all where there are none
-- Reply word, time, id to wait behind, held, then three for each run of samples: number of the first, how many, uses
--       OK | EMPTY wait | DRAINED wait: nothing comes but what others hold and may leave | END nothing comes any more
--       | NOGROUP | REJOIN the consumer is not registered
--       | UNSETTLED the server may have forgotten what it gave: settle.lua first | NORING
--       uses: how often the group has been given the sample, this time included (reuse "inf" keeps no count: 2 means
--       again); 0 means given before to a member that died
--       held: 1 where producers wait for room that this group's own pending samples take up
-- Numbers only: entries go to the caller by a plain XRANGE, for what passes through Lua is copied and converted (64
-- entries of 4 KiB, server's time for each: 9 us this way through XREADGROUP, 3 us by XCLAIM here and XRANGE after it).

local AHEAD_SHARE = 16

local ring = load_ring()
if not ring then return {'NORING'} end
local name, consumer, wanted = ARGV[2], ARGV[3], tonumber(ARGV[4])
local group = load_group(ring, name)
if not group then return {'NOGROUP'} end
local member = name .. ' ' .. consumer
if not redis.call('zscore', consumers_key, member) then return {'REJOIN'} end
math.randomseed(tonumber(ARGV[7]))

local settings = redis.call('hmget', group_key(name), 'reuse', 'front', 'unsettled')
if settings[3] then return {'UNSETTLED', string.format('%.3f', now()), id_of(ring.next - 1), '0'} end
local reuse, front = settings[1], tonumber(settings[2])
local limit = reuse == 'inf' and math.huge or tonumber(reuse)
local fresh_only, largest = tonumber(ARGV[8]) < 0, math.abs(tonumber(ARGV[8]))
local given = {}
local wait_id = id_of(ring.next - 1)
local tally = {}

local function count(field, n) if n > 0 then tally[field] = (tally[field] or 0) + n end end

local function field_of(fields, key)
  for i = 1, #fields, 2 do if fields[i] == key then return fields[i + 1] end end
end

local function wanted_producer(number)
  if #ARGV < 9 then return true end
  local entry = redis.call('xrange', samples_key, id_of(number), id_of(number))[1]
  local from = entry and string.match(field_of(entry[2], 'from') or '', '^(.*):')
  for i = 9, #ARGV do if ARGV[i] == from then return true end end
  return false
end

local function give(number, uses)
  given[#given + 1] = number
  given[#given + 1] = uses
end

local function missing() return wanted - #given / 2 end

-- The rest of this group's members: {name, pending}.
local function others()
  local members = {}
  for _, info in ipairs(redis.call('xinfo', 'consumers', samples_key, name)) do
    local other = {}
    for i = 1, #info, 2 do other[info[i]] = info[i + 1] end
    if other.name ~= consumer then members[#members + 1] = other end
  end
  return members
end

local function claim_from(other)
  local pending = redis.call('xpending', samples_key, name, '-', '+', missing(), other.name)
  for _, held in ipairs(pending) do
    redis.call('xclaim', samples_key, name, consumer, 0, held[1], 'RETRYCOUNT', held[4] + 1, 'JUSTID')
    give(number_of(held[1]), 0)
  end
  count('redelivered', #pending)
end

local function claim(after_s)
  local oldest = now() - after_s
  for _, other in ipairs(others()) do
    local seen = redis.call('zscore', consumers_key, name .. ' ' .. other.name)
    if not seen or tonumber(seen) < oldest then
      if missing() > 0 and other.pending > 0 then claim_from(other) end
      if #redis.call('xpending', samples_key, name, '-', '+', 1, other.name) == 0 then
        redis.call('xgroup', 'delconsumer', samples_key, name, other.name)
        redis.call('zrem', consumers_key, name .. ' ' .. other.name)
        redis.call('hdel', prefix .. 'consumers:about', name .. ' ' .. other.name)
      end
    end
  end
end

-- What it took to make samples, in us, as the index has it; where they are very many, every so many are looked at.
local function generation_us(from, to)
  local sum, looked, stride = 0, 0, math.max(STEP, math.ceil((to - from) / STEP))
  for start = from - ring.first, to - 1 - ring.first, stride do
    local stop = math.min(start + STEP, to - ring.first) - 1
    for _, line in ipairs(redis.call('lrange', index_key, int(start), int(stop))) do
      sum, looked = sum + string.match(line, '%d+$'), looked + 1
    end
  end
  return looked > 0 and math.floor(sum * (to - from) / looked) or 0
end

-- In a ring that evicts under a slow reader: steps forward to where what is taken will live long enough to be read.
-- Counts what is stepped over as lost. A ring whose front stands still is read from its front.
local function step_forward()
  local unread = math.max(group.delivered + 1, ring.first)
  local moved = ring.first - front
  local live = ring.next - ring.first
  if moved > 0 and unread - ring.first < math.max(math.ceil(live / 8), math.min(moved, wanted)) then
    local margin = math.max(math.ceil(live / 4), math.min(wanted, math.floor(live / 2)))
    local to = math.min(ring.first + margin, ring.next)
    if to > unread then
      redis.call('xgroup', 'setid', samples_key, name, id_of(to - 1))
      count('lost', to - unread)
      count('wasted_us', generation_us(unread, to))
      group.delivered = to - 1
    end
  end
  if moved > 0 then redis.call('hset', group_key(name), 'front', int(ring.first)) end
end

-- Removes what is not ours from the stream: a person may have added it, and whoever waits would spin on it.
local function sweep()
  local from = '-'
  repeat
    local entries = redis.call('xrange', samples_key, from, '+', 'COUNT', STEP)
    for _, entry in ipairs(entries) do
      if not is_own(ring, entry[1]) then
        redis.call('xdel', samples_key, entry[1])
        redis.call('hincrby', meta_key, 'foreign', 1)
        redis.call('xadd', quarantine_key, 'MAXLEN', 1000, '*', 'id', entry[1], 'reason', 'foreign entry')
      end
      from = '(' .. entry[1]
    end
  until #entries < STEP
end

-- Makes the next numbers pending for this consumer, as XREADGROUP would.
local function assign(first, last)
  local text = counter()
  for start = first, last, STEP do
    local ids = {}
    for number = start, math.min(start + STEP - 1, last) do ids[#ids + 1] = text(number) .. '-0' end
    for _, word in ipairs({'RETRYCOUNT', '1', 'FORCE', 'JUSTID'}) do ids[#ids + 1] = word end
    redis.call('xclaim', samples_key, name, consumer, 0, unpack(ids))
  end
  redis.call('xgroup', 'setid', samples_key, name, id_of(last))
  group.delivered = last
end

local function accept(number)
  if not wanted_producer(number) then
    redis.call('xack', samples_key, name, id_of(number))
    count('acknowledged', 1)
    count('skipped', 1)
    return
  end
  if limit > 1 and limit < math.huge then redis.call('zadd', uses_key(name), 1, int(number)) end
  give(number, 1)
end

local function take_fresh()
  local unread = math.max(group.delivered + 1, ring.first)
  -- Where many are waiting, a part of the member's fair share may be given ahead of need; but not before what dead
  -- members held, which is older: room is made from the oldest on, and behind fresh ones it would hold all others up.
  local share = tally.redelivered and 0 or math.floor((ring.next - unread) / (AHEAD_SHARE * (#others() + 1)))
  local most = math.max(missing(), math.min(largest, share))
  while most > 0 and unread < ring.next do
    local last = math.min(unread + most - 1, ring.next - 1)
    assign(unread, last)
    count('delivered', last - unread + 1)
    for number = unread, last do accept(number) end
    unread = last + 1
    most = missing()
  end
end

-- A number that was given at least once, drawn at random: among the least used, or among all where uses are not counted.
local function draw()
  local newest = math.min(group.delivered, ring.next - 1)
  if limit == math.huge then
    if newest < ring.first then return nil end
    return ring.first + math.random(0, newest - ring.first), 2  -- Lua's own range is of 32 bits
  end
  local least = redis.call('zrange', uses_key(name), 0, 0, 'WITHSCORES')
  if #least == 0 then return nil end
  local ties = redis.call('zcount', uses_key(name), least[2], least[2])
  local rank = math.random(0, ties - 1)
  local number = redis.call('zrange', uses_key(name), rank, rank)[1]
  local uses = tonumber(redis.call('zincrby', uses_key(name), 1, number))
  if uses >= limit then redis.call('zrem', uses_key(name), number) end
  return tonumber(number), uses
end

local function take_again()
  local drawn = {}
  for _ = 1, 4 * wanted do
    if missing() <= 0 then return end
    local number, uses = draw()
    if not number then return end
    if not drawn[number] and wanted_producer(number) then
      give(number, uses)
      count('reused', 1)
    end
    drawn[number] = limit == math.huge
  end
end

-- Whether samples are in the hands of members outside this one's family, who may die and leave them, or of members
-- that have left. What was trained on and waits for a checkpoint (keep.lua) is only their own's.
local function awaited()
  local family = string.match(consumer, '^(.*)/')
  for _, other in ipairs(others()) do
    local kin = string.match(other.name, '^(.*)/') == family or string.find(other.name, '/kept:', 1, true)
    if other.pending > 0 and not (kin and redis.call('zscore', consumers_key, name .. ' ' .. other.name)) then
      return true
    end
  end
  return false
end

local function held()
  if not ring.block or group.delivered < ring.next - 1 then return false end
  local bytes, count = load_waiting()
  if not bytes or fits(ring, bytes, count) then return false end
  local own = load_group(ring, name)
  return own.pending > 0 and floor_of(ring, {own}) == ring.first
end

local function reply(word)
  for field, n in pairs(tally) do redis.call('hincrby', group_key(name), field, n) end
  local answer = {word, string.format('%.3f', now()), wait_id, held() and '1' or '0'}
  local at = #answer - 2
  for i = 1, #given, 2 do
    if i > 1 and given[i] == given[i - 2] + 1 and given[i + 1] == given[i - 1] then
      answer[at + 1] = answer[at + 1] + 1
    else
      at = at + 3
      answer[at], answer[at + 1], answer[at + 2] = given[i], 1, given[i + 1]
    end
  end
  return answer
end

-- What follows is take's alone: deal.lua has all above in front of it.

allow_bookkeeping()
if redis.call('xlen', samples_key) > ring.next - ring.first then sweep() end
if ring.next - ring.first < tonumber(ARGV[5]) and not ring.ended then return reply('EMPTY') end
if tonumber(ARGV[6]) >= 0 then claim(tonumber(ARGV[6])) end
if not ring.block and not ring.ended then step_forward() end
take_fresh()
if ring.block and tally.skipped and load_waiting() then tell_room(name) end
local drained = ring.ended and math.max(group.delivered, ring.first - 1) >= ring.next - 1
if limit > 1 and not fresh_only and not (drained and limit == math.huge) then take_again() end
if #given > 0 then return reply('OK') end
-- Who waits would spin on a foreign entry; one may be there in place of one of ours that somebody removed.
if #redis.call('xrange', samples_key, '(' .. id_of(ring.next - 1), '+', 'COUNT', 1) > 0 then sweep() end
if drained then return reply(awaited() and 'DRAINED' or 'END') end
return reply('EMPTY')
