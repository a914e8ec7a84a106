-- Says goodbye.
--
-- ARGV  2 role: producer or consumer  3 member  4 about, JSON
--       producer: 5 its word  6 closed: 1 where it is done, 0 where it only stops
-- Reply OK | NORING
-- A ring declared with `producers=N` ends when N have closed. A consumer's pending samples are for others at once.

local ring = load_ring()
if not ring then return {'NORING'} end
local role, member = ARGV[2], ARGV[3]
allow_bookkeeping()
if role == 'consumer' then
  redis.call('zrem', consumers_key, member)
  redis.call('hdel', consumers_key .. ':about', member)
  return {'OK'}
end
if load_seq(member) ~= ARGV[5] then return {'OK'} end
use_lease(ring, member, math.huge, math.huge)
save_ring(ring)
redis.call('hset', producers_key .. ':about', member, ARGV[4])
if load_waiting() then tell_room('leave') end
if ARGV[6] == '1' and not ring.ended then
  local expected = tonumber(redis.call('hget', meta_key, 'producers'))
  -- Said twice, or by a job that was put into the queue again: one producer all the same.
  local closed = expected == 0 or redis.call('sadd', closed_key, member) == 1
  if closed and redis.call('hincrby', meta_key, 'closed', 1) >= expected and expected > 0 then
    redis.call('hset', meta_key, 'ended', string.format('%.3f', now()))
    tell_room('end')
  end
end
return {'OK'}
