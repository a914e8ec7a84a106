-- A reader says what it knows of its group, which a server may have forgotten that came back with less than it had.
-- Until all members have said so, or are late, the group is given nothing: else samples would be given twice.
--
-- ARGV  1 the epoch that the numbers are from, may be a former one  2 group
--       3 the consumer that holds these numbers; '' where they are done with  4 1: that is all it has to say
--       5... numbers
-- Reply OK | WAIT others have yet to say | NOGROUP | NORING

local ring = load_ring(true)
if not ring then return {'NORING'} end
local name, who = ARGV[2], ARGV[3]
local group = load_group(ring, name)
if not group then return {'NOGROUP'} end
local key = unsettled_key(name)

local function remember(number)
  local known = redis.call('hget', key, int(number))
  if who == '' or known ~= '' then redis.call('hset', key, int(number), who) end
end

-- Gives the group what it had been given: numbers nobody speaks of, in between, to nobody, so that they are claimed.
local function restore()
  local owners, last = {}, group.delivered
  local said = redis.call('hgetall', key)
  for i = 1, #said, 2 do
    local number = tonumber(said[i])
    if number then
      owners[number] = said[i + 1]
      last = math.max(last, number)
    end
  end
  local done = 0
  local counted = tonumber(redis.call('hget', group_key(name), 'reuse')) or 0  -- neither inf nor unset keeps uses
  for number = math.max(group.delivered + 1, ring.first), last do
    if owners[number] == '' then
      done = done + 1
    else
      redis.call('xclaim', samples_key, name, owners[number] or 'nobody', 0, id_of(number), 'RETRYCOUNT', 1, 'FORCE',
        'JUSTID')
    end
    if counted > 1 then redis.call('zadd', uses_key(name), 1, int(number)) end
  end
  local given = last - math.max(group.delivered, ring.first - 1)  -- those evicted meanwhile were booked then
  if given > 0 then
    redis.call('xgroup', 'setid', samples_key, name, id_of(last))
    redis.call('hincrby', group_key(name), 'delivered', int(given))
    redis.call('hincrby', group_key(name), 'acknowledged', int(done))
  end
  redis.call('hdel', group_key(name), 'unsettled')
  redis.call('unlink', key)
end

-- Who was shut out or said goodbye meanwhile is awaited no longer.
local function awaits_others()
  for _, field in ipairs(redis.call('hkeys', key)) do
    local member = string.match(field, '^@(.*)$')
    if member and redis.call('zscore', consumers_key, name .. ' ' .. member) then return true end
  end
  return false
end

allow_bookkeeping()
local acknowledged = 0
for i = 5, #ARGV do
  local number = tonumber(ARGV[i])
  if number >= ring.first and number < math.min(ring.bound, ring.next) then
    if number > group.delivered then
      remember(number)
    elseif who == '' then
      acknowledged = acknowledged + redis.call('xack', samples_key, name, id_of(number))
    end
  end
end
if acknowledged > 0 then
  redis.call('hincrby', group_key(name), 'acknowledged', acknowledged)
  if ring.block and load_waiting() then tell_room(name) end
end
if ARGV[4] == '1' and who ~= '' then redis.call('hdel', key, '@' .. who) end
local patience = redis.call('hget', group_key(name), 'unsettled')
if patience and awaits_others() and now() < tonumber(patience) then return {'WAIT'} end
if patience or (ARGV[4] == '1' and redis.call('exists', key) == 1) then restore() end
return {'OK'}
