-- Says to which server process a client has come. Another one than the ring has known may have lost what was last
-- done: the ring counts its epoch on, before a number is given twice, and waits for what its readers know (settle.lua).
--
-- ARGV  1 the epoch the caller believes in, '' where it knows none  2 the server's run id, '' where it does not say
--       3 1: the caller knows of samples that this server does not  4 a random word, for the epoch that may begin
-- Reply OK epoch | NORING

local PATIENCE_S = 15  -- readers that live come back within this: they try again every 5 s at least
local DEAD_S = 30      -- whose last word was so much older than anybody's was dead before the server was

local found = redis.call('hmget', meta_key, 'epoch', 'run_id', 'next')
local epoch, run_id = found[1], found[2] or ''
if not epoch then return {'NORING'} end
local proven = ARGV[3] == '1' and ARGV[1] == epoch
local other = ARGV[2] ~= '' and run_id ~= '' and run_id ~= ARGV[2]
if not proven and not other then
  if run_id == '' and ARGV[2] ~= '' then
    allow_bookkeeping()
    redis.call('hset', meta_key, 'run_id', ARGV[2])
  end
  return {'OK', epoch}
end

local base, arrivals = arrivals_of(epoch)
arrivals[#arrivals + 1] = {first = int(found[3]), word = ARGV[4]}
if #arrivals > MOST_ARRIVALS then table.remove(arrivals, 1) end
local following = base
for _, one in ipairs(arrivals) do following = following .. '.' .. int(one.first) .. '-' .. one.word end
allow_bookkeeping()
redis.call('hset', meta_key, 'epoch', following)
if ARGV[2] ~= '' then redis.call('hset', meta_key, 'run_id', ARGV[2]) end
ARGV[1] = following
local newest = 0
for _, set in ipairs({consumers_key, producers_key}) do
  newest = math.max(newest, tonumber(redis.call('zrange', set, -1, -1, 'WITHSCORES')[2] or 0))
end
local members = redis.call('zrangebyscore', consumers_key, string.format('%.3f', newest - DEAD_S), '+inf')
for _, group in ipairs(load_groups(load_ring())) do
  redis.call('unlink', unsettled_key(group.name))
  for _, member in ipairs(members) do
    local of, name = string.match(member, '^(%S+) (.*)$')
    if of == group.name then redis.call('hset', unsettled_key(group.name), '@' .. name, '') end
  end
  if redis.call('exists', unsettled_key(group.name)) == 1 then
    redis.call('hset', group_key(group.name), 'unsettled', string.format('%.3f', now() + PATIENCE_S))
  end
end
return {'OK', following}
