-- Says that a process lives; renews its lease; folds what left long ago into totals.
--
-- ARGV  1 the epoch the caller believes in, may be a former one: it lives all the same
--       2 role: producer or consumer  3 member (producer's name, or "group family/worker:word")
--       4 about, JSON, or '' to keep what is there  5 seconds a lease lives
--       6 seconds after which a silent producer is no longer named  7 how many are named at most
--       8 a producer's word: an older incarnation's heartbeat does not count ('': any)
-- Reply OK | UNKNOWN not registered (any more) | NORING

local ring = load_ring(true)
if not ring then return {'NORING'} end
local role, member = ARGV[2], ARGV[3]
local key = role == 'producer' and producers_key or consumers_key
if not redis.call('zscore', key, member) then return {'UNKNOWN'} end
if ARGV[8] ~= '' and load_seq(member) ~= ARGV[8] then return {'UNKNOWN'} end
local time = now()

allow_bookkeeping()
redis.call('zadd', key, string.format('%.3f', time), member)
if ARGV[4] ~= '' then redis.call('hset', key .. ':about', member, ARGV[4]) end
if role == 'consumer' then return {'OK'} end

local lease = redis.call('hget', leases_key, member)
if lease then
  local held = string.match(lease, '^(%d+ %d+) ')
  redis.call('hset', leases_key, member, held .. ' ' .. string.format('%.3f', time + ARGV[5]))
end
local old = redis.call('zrangebyscore', key, '-inf', '(' .. string.format('%.3f', time - ARGV[6]), 'LIMIT', 0, STEP)
local over = redis.call('zcard', key) - #old - tonumber(ARGV[7])
if over > 0 then
  for _, name in ipairs(redis.call('zrange', key, #old, #old + math.min(over, STEP) - 1)) do old[#old + 1] = name end
end
for _, name in ipairs(old) do
  local _, last = load_seq(name)
  redis.call('hincrby', meta_key, 'folded_producers', 1)
  redis.call('hincrby', meta_key, 'folded_samples', int(last or 0))
  redis.call('zrem', key, name)
  redis.call('hdel', key .. ':about', name)
  redis.call('hdel', seqs_key, name)
end
return {'OK'}
