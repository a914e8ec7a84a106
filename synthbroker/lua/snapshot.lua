-- Everything about a ring at one instant, for status and for adding up the ledger.
--
-- ARGV  1 is not used: the snapshot is of whatever ring is there  2 books: 1 to count them through as well, which takes
--       about 0.4 ms for a thousand samples
-- Reply OK, time, meta, stream length, index length, {{group, delivered, pending, fields, {consumer, seen, pending, about}...}...},
--       {{producer, seen, seq, about}...}, leases, books, twins, {{group, {uses, samples, ...}}...} | NORING
--       twins: pair, count and time, ...; uses: how many live samples were given so often and may be again
--       books: bytes by the index, lines of it that cannot be read, foreign entries, {missing numbers, like 7 or 7-9, ...},
--       how many are missing, leases that are past their end, {{group, entries that are pending, {those that are not in
--       the ring}, uses kept of samples that are not in the ring}...}

local meta = redis.call('hgetall', meta_key)
if #meta == 0 then return {'NORING'} end

local function members_of(group)
  local members = {}
  for _, info in ipairs(redis.call('xinfo', 'consumers', samples_key, group)) do
    local one = {}
    for i = 1, #info, 2 do one[info[i]] = info[i + 1] end
    local member = group .. ' ' .. one.name
    members[#members + 1] = {one.name, redis.call('zscore', consumers_key, member) or '', int(one.pending),
      redis.call('hget', consumers_key .. ':about', member) or '{}'}
  end
  return members
end

local groups = {}
for i, group in ipairs(load_groups({next = tonumber(redis.call('hget', meta_key, 'next'))})) do
  groups[i] = {group.name, int(group.delivered), int(group.pending), redis.call('hgetall', group_key(group.name)),
    members_of(group.name)}
end
local producers = {}
local seen = redis.call('zrange', producers_key, 0, -1, 'WITHSCORES')
for i = 1, #seen, 2 do
  local _, last = load_seq(seen[i])
  producers[#producers + 1] = {seen[i], seen[i + 1], int(last or 0),
    redis.call('hget', producers_key .. ':about', seen[i]) or '{}'}
end

local MOST_NAMED = 20
local ring = {first = tonumber(redis.call('hget', meta_key, 'first')), next = tonumber(redis.call('hget', meta_key, 'next'))}

local function is_live(number) return number >= ring.first and number < ring.next end

local function sum_index()
  local bytes, unread = 0, 0
  for start = 0, redis.call('llen', index_key) - 1, KEYS_AT_ONCE do
    for _, line in ipairs(redis.call('lrange', index_key, start, start + KEYS_AT_ONCE - 1)) do
      local cost = string.match(line, '^(%d+) %S+ %d+ %d+$')
      if cost then bytes = bytes + tonumber(cost) else unread = unread + 1 end
    end
  end
  return int(bytes), unread
end

local function is_plain()
  local live = ring.next - ring.first
  if redis.call('xlen', samples_key) ~= live then return false end
  if live == 0 then return true end
  local last = redis.call('xrange', samples_key, id_of(ring.next - 1), '+', 'COUNT', 2)
  return redis.call('xrange', samples_key, '-', '+', 'COUNT', 1)[1][1] == id_of(ring.first)
    and #last == 1 and last[1][1] == id_of(ring.next - 1)
end

-- Entries bring their payload with them: they are walked through only where count, first and last are not what they
-- should be. (A foreign one may stand for one that somebody removed.)
local function walk_stream()
  local foreign, names, missing, expected, from = 0, {}, 0, ring.first, '-'
  if is_plain() then return 0, names, 0 end
  local function skip_to(number)
    if number <= expected then return end
    missing = missing + number - expected
    if #names < MOST_NAMED then
      names[#names + 1] = int(expected) .. (number - 1 > expected and '-' .. int(number - 1) or '')
    end
  end
  repeat
    local entries = redis.call('xrange', samples_key, from, '+', 'COUNT', STEP)
    for _, entry in ipairs(entries) do
      if is_own(ring, entry[1]) then
        skip_to(number_of(entry[1]))
        expected = math.max(expected, number_of(entry[1]) + 1)
      else
        foreign = foreign + 1
      end
      from = '(' .. entry[1]
    end
  until #entries < STEP
  skip_to(ring.next)
  return foreign, names, missing
end

local function count_pending(group)
  local count, gone, from = 0, {}, '-'
  if group.pending == 0 then return 0, gone end
  repeat
    local pending = redis.call('xpending', samples_key, group.name, from, '+', KEYS_AT_ONCE)
    for _, held in ipairs(pending) do
      if not is_live(number_of(held[1])) then gone[#gone + 1] = held[1] end
      from = '(' .. held[1]
    end
    count = count + #pending
  until #pending < KEYS_AT_ONCE
  return count, gone
end

local function books()
  local bytes, unread = sum_index()
  local foreign, names, missing = walk_stream()
  local expired, time = 0, now()
  for _, lease in ipairs(redis.call('hvals', leases_key)) do
    if (tonumber(string.match(lease, '(%S+)$')) or 0) < time then expired = expired + 1 end
  end
  local counted = {}
  for i, group in ipairs(load_groups(ring)) do
    local count, gone = count_pending(group)
    local uses = redis.call('zcard', uses_key(group.name))
    for _, number in ipairs(redis.call('zrange', uses_key(group.name), 0, -1)) do
      if is_live(tonumber(number)) then uses = uses - 1 end
    end
    counted[i] = {group.name, count, gone, uses}
  end
  return {bytes, unread, foreign, names, int(missing), expired, counted}
end

-- Up to 8 uses one by one, then by powers of two: 16 stands for 9 to 16.
local function histogram(group)
  local found = {}
  if redis.call('exists', uses_key(group.name)) == 0 then return found end
  local least, most = 1, 1
  repeat
    local count = redis.call('zcount', uses_key(group.name), least, most)
    if count > 0 then
      found[#found + 1] = int(most)
      found[#found + 1] = count
    end
    least, most = most + 1, most < 8 and most + 1 or 2 * most
  until redis.call('zcount', uses_key(group.name), least, '+inf') == 0
  return found
end

local uses = {}
for i, group in ipairs(load_groups(ring)) do uses[i] = {group.name, histogram(group)} end

return {'OK', string.format('%.3f', now()), meta, redis.call('xlen', samples_key), redis.call('llen', index_key),
  groups, producers, redis.call('hgetall', leases_key), ARGV[2] == '1' and books() or {},
  redis.call('hgetall', twins_key), uses}
