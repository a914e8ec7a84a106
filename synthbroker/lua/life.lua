-- Says whether anybody still makes samples for a ring.
--
-- ARGV  2 seconds of silence after which a producer is not asked any more  3 how many of those are named at most
-- Reply OK, time, ended (1 or 0), live samples, time of the newest ('' where there is none), producers ever seen and
--       still named, then for each: name, last heartbeat, about | NORING

local ring = load_ring()
if not ring then return {'NORING'} end
local time = now()
local names = redis.call('zrevrangebyscore', producers_key, '+inf', string.format('%.3f', time - ARGV[2]), 'WITHSCORES')
local silent = redis.call('zrevrangebyscore', producers_key, '(' .. string.format('%.3f', time - ARGV[2]), '-inf',
  'WITHSCORES', 'LIMIT', 0, ARGV[3])
for _, item in ipairs(silent) do names[#names + 1] = item end
local newest = redis.call('xrevrange', samples_key, id_of(ring.next - 1), '-', 'COUNT', 1)[1]
local reply = {'OK', string.format('%.3f', time), ring.ended and '1' or '0', int(ring.next - ring.first), '',
  redis.call('zcard', producers_key)}
if newest then
  for i = 1, #newest[2], 2 do if newest[2][i] == 't' then reply[5] = newest[2][i + 1] end end
end
for i = 1, #names, 2 do
  reply[#reply + 1] = names[i]
  reply[#reply + 1] = names[i + 1]
  reply[#reply + 1] = redis.call('hget', producers_key .. ':about', names[i]) or '{}'
end
return reply
