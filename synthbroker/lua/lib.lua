-- Shared by all scripts; put in front of each of them (and runs.lua behind it, for those about runs).
--
-- KEYS[1]  sb:{ring}:meta; all other keys of the ring begin with the same prefix, and so share its slot.
-- ARGV[1]  the epoch the caller believes in.
--
-- Every reply is an array that begins with a word: OK, or what is in the way. NORING: no meta, or another epoch.
-- A script checks before its first write. Numbers are whole and below 2^53, so doubles hold them exactly.

local meta_key = KEYS[1]
local prefix = string.sub(meta_key, 1, -5)
local samples_key = prefix .. 'samples'
local index_key = prefix .. 'index'
local leases_key = prefix .. 'leases'
local seqs_key = prefix .. 'seqs'
local room_key = prefix .. 'room'
local closed_key = prefix .. 'closed'
local producers_key = prefix .. 'producers'
local consumers_key = prefix .. 'consumers'
local quarantine_key = prefix .. 'quarantine'
local content_key = prefix .. 'content'
local twins_key = prefix .. 'twins'

local MOST_RUNS = 64        -- runs that a group remembers
local MOST_DONE = 16        -- finished checkpoints that a run remembers, to say what an older state lacks
local MOST_EVICTED = 10000  -- evicted samples of runs that a group remembers
local STEP = 64             -- how many samples one eviction step may remove
local KEYS_AT_ONCE = 1000   -- Lua's unpack is limited by its stack

local function int(number) return string.format('%.0f', number) end
local function id_of(number) return int(number) .. '-0' end

-- As `int`, for numbers that rise by one: formatting each took a seventh of the time of a commit of small samples.
local DIGITS = {[0] = '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'}
local function counter()
  local tens, text
  return function(number)
    local last = number % 10
    if number - last ~= tens then
      tens = number - last
      text = string.sub(int(tens), 1, -2)
    end
    return text .. DIGITS[last]
  end
end

local function number_of(id) return tonumber(string.match(id, '^%d+')) end
-- Whether an entry is one of ours: a person may have added others.
local function is_own(ring, id) return string.match(id, '^%d+%-0$') ~= nil and number_of(id) < ring.next end
local function group_key(group) return prefix .. 'group:' .. group end
local function uses_key(group) return prefix .. 'uses:' .. group end
local function rounds_key(group) return prefix .. 'rounds:' .. group end
local function runs_key(group) return prefix .. 'runs:' .. group end
local function evicted_key(group) return prefix .. 'evicted:' .. group end
-- The run that a consumer (run/worker:word) belongs to: a training process and its former selves, or one of its ranks.
local function run_of(consumer) return string.match(consumer, '^([^/]*)/') end
local function unsettled_key(group) return prefix .. 'unsettled:' .. group end

local function now()
  local time = redis.call('time')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- At the server's memory limit a script may not begin with a command that takes memory, but may go on with one.
-- Bookkeeping is small and must go on, so that the ring can be emptied: a write that frees nothing opens the way.
local function allow_bookkeeping() redis.call('unlink', prefix .. 'nothing') end

-- An epoch's name is its history: what it began with, then each arrival at another server process (arrive.lua), with the
-- first number that was given after it and a word that no other arrival has: ab12.57-4f3a9c.112-77b1d2
local MOST_ARRIVALS = 20  -- older ones are forgotten

local function arrivals_of(epoch)
  local arrivals = {}
  for first, word in string.gmatch(epoch, '%.(%d+)%-(%x+)') do
    arrivals[#arrivals + 1] = {first = tonumber(first), word = word}
  end
  return string.match(epoch, '^[^.]*'), arrivals
end

-- The first number that does not mean the same sample any more as in another epoch of this ring, be it a former one or
-- one that a server forgot which came back once more; nil where that was none. `replies.py` has the same for clients.
local function bound_of(other, current)
  local base, theirs = arrivals_of(other)
  local same, ours = arrivals_of(current)
  if base ~= same then return nil end
  local at, also_at = 0, 0
  for i, one in ipairs(theirs) do
    for j, another in ipairs(ours) do
      if one.word == another.word then at, also_at = i, j end
    end
  end
  if at == 0 and math.max(#theirs, #ours) == MOST_ARRIVALS then return nil end
  local bound = math.huge
  for i = at + 1, #theirs do bound = math.min(bound, theirs[i].first) end
  for j = also_at + 1, #ours do bound = math.min(bound, ours[j].first) end
  return bound
end

-- The ring's state, or nil where there is no such ring. Where numbers of a former epoch will do as well, its `bound` says
-- how far.
local function load_ring(also_former)
  local f = redis.call('hmget', meta_key, 'epoch', 'first', 'next', 'bytes', 'leased_bytes', 'leased_samples',
    'capacity', 'max_samples', 'when_full', 'ended')
  local bound = math.huge
  if not f[1] then return nil end
  if f[1] ~= ARGV[1] then
    bound = also_former and bound_of(ARGV[1], f[1])
    if not bound then return nil end
  end
  return {
    bound = bound,
    first = tonumber(f[2]), next = tonumber(f[3]), bytes = tonumber(f[4]),
    leased_bytes = tonumber(f[5]), leased_samples = tonumber(f[6]),
    capacity = tonumber(f[7]), max_samples = tonumber(f[8]), block = f[9] == 'block', ended = f[10] ~= '0',
  }
end

local function save_ring(ring)
  redis.call('hset', meta_key, 'first', int(ring.first), 'next', int(ring.next), 'bytes', int(ring.bytes),
    'leased_bytes', int(ring.leased_bytes), 'leased_samples', int(ring.leased_samples))
end

-- {name, pending, delivered} of every group; delivered is the highest number given to it, also where a foreign entry
-- was read beyond our numbers.
local function load_groups(ring)
  local groups = {}
  if redis.call('exists', samples_key) == 0 then return groups end
  for _, info in ipairs(redis.call('xinfo', 'groups', samples_key)) do
    local group = {}
    for i = 1, #info, 2 do
      if info[i] == 'name' then group.name = info[i + 1] end
      if info[i] == 'pending' then group.pending = tonumber(info[i + 1]) end
      if info[i] == 'last-delivered-id' then group.delivered = math.min(number_of(info[i + 1]), ring.next - 1) end
    end
    groups[#groups + 1] = group
  end
  return groups
end

local function load_group(ring, name)
  for _, group in ipairs(load_groups(ring)) do
    if group.name == name then return group end
  end
end

local function part_names(names, uid, parts)
  for i = 0, parts - 1 do names[#names + 1] = prefix .. 'part:' .. uid .. ':' .. int(i) end
end

-- Calls a command that takes many keys, some at a time; returns the sum of its answers.
local function in_chunks(command, names)
  local sum = 0
  for start = 1, #names, KEYS_AT_ONCE do
    local stop = math.min(start + KEYS_AT_ONCE - 1, #names)
    sum = sum + redis.call(command, unpack(names, start, stop))
  end
  return sum
end

-- Remembers what was evicted of runs that keep checkpoints: their next self is told what does not come again.
local function note_evicted(name, pending)
  local keeps = {}
  for _, entry in ipairs(pending) do
    local run = run_of(entry[2]) or ''
    if keeps[run] == nil then
      local line = redis.call('hget', runs_key(name), string.match(run, '^(.*)%.deal$') or run)
      keeps[run] = line and string.sub(line, -2) == ' 1' or false
    end
    local number = int(number_of(entry[1]))
    if keeps[run] then redis.call('zadd', evicted_key(name), number, run .. ' ' .. number) end
  end
  redis.call('zremrangebyrank', evicted_key(name), 0, -MOST_EVICTED - 1)
end

-- The generator time that went into the last `count` of these samples, in us.
local function time_of(made_us, count)
  local sum = 0
  for i = #made_us - count + 1, #made_us do sum = sum + made_us[i] end
  return int(sum)
end

-- Books on a group that the samples up to `last` leave the ring, and what it took to make each of them.
local function evict_from_group(ring, group, last, made_us)
  local unseen = last - math.max(group.delivered, ring.first - 1)
  if unseen > 0 then
    redis.call('hincrby', group_key(group.name), 'lost', int(unseen))
    redis.call('hincrby', group_key(group.name), 'wasted_us', time_of(made_us, unseen))
  end
  local checkpoints = group.pending > 0 and redis.call('exists', runs_key(group.name)) == 1
  while group.pending > 0 do
    local pending = redis.call('xpending', samples_key, group.name, '-', id_of(last), STEP)
    if #pending == 0 then break end
    local ids = {}
    for i, entry in ipairs(pending) do ids[i] = entry[1] end
    redis.call('xack', samples_key, group.name, unpack(ids))
    redis.call('hincrby', group_key(group.name), 'evicted_pending', #ids)
    if checkpoints then note_evicted(group.name, pending) end
    group.pending = group.pending - #ids
  end
  if redis.call('exists', uses_key(group.name)) == 1 then
    local numbers = {}
    for number = ring.first, last do numbers[#numbers + 1] = int(number) end
    redis.call('zrem', uses_key(group.name), unpack(numbers))
  end
end

-- Removes the oldest samples, whose index lines are given (at most STEP). Frees before it books.
local function evict(ring, lines, groups)
  local last = ring.first + #lines - 1
  local names, made_us = {}, {}
  for i, line in ipairs(lines) do
    local cost, uid, parts, us = string.match(line, '^(%d+) (%S+) (%d+) (%d+)$')
    made_us[i] = us
    ring.bytes = ring.bytes - tonumber(cost)
    part_names(names, uid, tonumber(parts))
  end
  in_chunks('unlink', names)
  redis.call('ltrim', index_key, #lines, -1)
  local foreign = redis.call('xtrim', samples_key, 'MINID', id_of(last + 1)) - #lines
  if foreign > 0 then redis.call('hincrby', meta_key, 'foreign', foreign) end
  for _, group in ipairs(groups) do evict_from_group(ring, group, last, made_us) end
  if #groups == 0 then redis.call('hincrby', meta_key, 'wasted_us', time_of(made_us, #made_us)) end
  ring.first = last + 1
  save_ring(ring)
end

-- The lowest number that a `block` ring must keep, and the group that asks for it ('' where there is no group yet).
local function floor_of(ring, groups)
  local lowest, holder = nil, ''
  for _, group in ipairs(groups) do
    local keep = group.delivered + 1
    if group.pending > 0 then
      keep = math.min(keep, number_of(redis.call('xpending', samples_key, group.name)[2]))
    end
    if not lowest or keep < lowest then lowest, holder = keep, group.name end
  end
  return math.max(lowest or ring.first, ring.first), holder
end

-- Whether `bytes` and `count` samples more fit where so many are live.
local function fits_beside(ring, live_bytes, live, bytes, count)
  return live_bytes + ring.leased_bytes + bytes <= ring.capacity
    and (ring.max_samples == 0 or live + ring.leased_samples + count <= ring.max_samples)
end

local function fits(ring, bytes, count) return fits_beside(ring, ring.bytes, ring.next - ring.first, bytes, count) end

-- Gives back what producers that no longer renew their lease had reserved.
local function expire_leases(ring)
  local all = redis.call('hgetall', leases_key)
  local time = now()
  for i = 1, #all, 2 do
    local bytes, count, ends = string.match(all[i + 1], '^(%d+) (%d+) (%S+)$')
    if tonumber(ends) < time then
      redis.call('hdel', leases_key, all[i])
      ring.leased_bytes = ring.leased_bytes - tonumber(bytes)
      ring.leased_samples = ring.leased_samples - tonumber(count)
    end
  end
end

-- Evicts until `bytes` and `count` samples more fit. False, and the group in the way, where that may not be. The caller
-- saves the ring.
-- `needed` is how much must leave even where the ring has room: the server itself is full.
local function make_room(ring, bytes, count, needed)
  local target = ring.bytes - needed
  if fits(ring, bytes, count) and needed == 0 then return true end
  expire_leases(ring)
  -- What others have reserved cannot be evicted: the ring is not emptied for what would not fit even then.
  if not fits_beside(ring, 0, 0, bytes, count) then return false, '' end
  local groups = load_groups(ring)
  local floor, holder = ring.next, ''
  if ring.block then floor, holder = floor_of(ring, groups) end
  while not fits(ring, bytes, count) or ring.bytes > target do
    if floor <= ring.first then return false, holder end
    local lines = redis.call('lrange', index_key, 0, math.min(STEP, floor - ring.first) - 1)
    if #lines == 0 then return false, holder end
    local some, freed = {}, ring.bytes
    for i, line in ipairs(lines) do
      some[i] = line
      freed = freed - tonumber(string.match(line, '^%d+'))
      if fits_beside(ring, freed, ring.next - ring.first - i, bytes, count) and freed <= target then break end
    end
    evict(ring, some, groups)
  end
  return true
end

-- Takes `bytes` and `count` off a producer's lease, as far as there is one.
local function use_lease(ring, name, bytes, count)
  local lease = redis.call('hget', leases_key, name)
  if not lease then return end
  local had_bytes, had_count, ends = string.match(lease, '^(%d+) (%d+) (%S+)$')
  local less_bytes, less_count = math.min(bytes, tonumber(had_bytes)), math.min(count, tonumber(had_count))
  ring.leased_bytes = ring.leased_bytes - less_bytes
  ring.leased_samples = ring.leased_samples - less_count
  redis.call('hdel', leases_key, name)
  if less_bytes < tonumber(had_bytes) or less_count < tonumber(had_count) then
    redis.call('hset', leases_key, name,
      int(had_bytes - less_bytes) .. ' ' .. int(had_count - less_count) .. ' ' .. ends)
  end
end

-- Reserves room that there is for a producer. The caller saves the ring.
local function grant_lease(ring, name, bytes, count, seconds)
  ring.leased_bytes = ring.leased_bytes + bytes
  ring.leased_samples = ring.leased_samples + count
  redis.call('hset', leases_key, name, int(bytes) .. ' ' .. int(count) .. ' ' .. string.format('%.3f', now() + seconds))
end

-- The word and last sequence number of the producer's living incarnation.
local function load_seq(name)
  local line = redis.call('hget', seqs_key, name)
  if not line then return nil end
  local word, last = string.match(line, '^(%S+) (%d+)$')
  return word, tonumber(last)
end

local function last_room_id()
  local lines = redis.call('xrevrange', room_key, '+', '-', 'COUNT', 1)
  return lines[1] and lines[1][1] or '0-0'
end

-- Remembers that a producer waits, and for how much room, so that whoever makes room says so.
local function mark_waiting(bytes, count)
  allow_bookkeeping()
  redis.call('hset', meta_key, 'waiting', int(bytes) .. ' ' .. int(count))
end

-- Bytes and samples that the producer asked for that was refused last; nil where none waits.
local function load_waiting()
  local bytes, count = string.match(redis.call('hget', meta_key, 'waiting'), '^(%d+) (%d+)$')
  return tonumber(bytes), tonumber(count)
end

local function tell_room(reason)
  redis.call('hset', meta_key, 'waiting', '0')
  redis.call('xadd', room_key, 'MAXLEN', 16, '*', 'by', reason)
end

local function make_group(ring, name, reuse)
  allow_bookkeeping()
  redis.call('unlink', uses_key(name), runs_key(name), evicted_key(name))
  redis.call('xgroup', 'create', samples_key, name, id_of(ring.first - 1), 'MKSTREAM')
  redis.call('hset', group_key(name), 'since', int(ring.first - 1), 'reuse', reuse, 'delivered', 0, 'acknowledged', 0,
    'lost', 0, 'evicted_pending', 0, 'doubled', 0, 'reused', 0, 'redelivered', 0, 'skipped', 0, 'front', int(ring.first))
end

local FEWEST_SHARE = 16  -- the part of a full ring that is given back at a time

-- Notes what a server has forgotten to have given, for whoever holds it will say so (settle.lua). Returns how many.
local function note_forgotten(group, ids)
  if redis.call('hexists', group_key(group.name), 'unsettled') == 0 then return 0 end
  local forgotten = 0
  for _, id in ipairs(ids) do
    if number_of(id) > group.delivered then
      redis.call('hset', unsettled_key(group.name), int(number_of(id)), '')
      forgotten = forgotten + 1
    end
  end
  return forgotten
end

-- A group is done with samples. Returns how many were pending and how many had been acknowledged before: a sample was
-- trained on twice, unless it is only said `again`. In a `block` ring this may make room; waiting producers are told.
local function acknowledge(ring, group, ids, late, again)
  local acknowledged = 0
  for start = 1, #ids, KEYS_AT_ONCE do
    local stop = math.min(start + KEYS_AT_ONCE - 1, #ids)
    acknowledged = acknowledged + redis.call('xack', samples_key, group.name, unpack(ids, start, stop))
  end
  allow_bookkeeping()
  local doubled = #ids - acknowledged - late
  if doubled > 0 then doubled = doubled - note_forgotten(group, ids) end
  if again then doubled = 0 end
  redis.call('hincrby', group_key(group.name), 'acknowledged', acknowledged)
  if doubled > 0 then redis.call('hincrby', group_key(group.name), 'doubled', doubled) end
  if ring.block and load_waiting() then
    -- Not for every sample: a producer that is woken sends what there is room for, and many at a time cost it less. At
    -- once where this group has nothing else to read.
    local free = floor_of(ring, load_groups(ring)) - ring.first
    if free > 0 and (free * FEWEST_SHARE >= ring.next - ring.first or group.delivered >= ring.next - 1) then
      tell_room(group.name)
    end
  end
  return acknowledged, doubled
end
