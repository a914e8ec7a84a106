-- Gives what a run has trained on and not acknowledged to a consumer that lives as long as the training process, because
-- the reader that it was given to goes.
--
-- ARGV  2 group  3 consumer (run/kept:life)  4 about, JSON  5 numbers, like 1-40,43
-- Reply OK how many it holds | NOGROUP | NORING

local ring = load_ring()
if not ring then return {'NORING'} end
local group, consumer = load_group(ring, ARGV[2]), ARGV[3]
if not group then return {'NOGROUP'} end
allow_bookkeeping()
local member = group.name .. ' ' .. consumer
redis.call('xgroup', 'createconsumer', samples_key, group.name, consumer)
redis.call('zadd', consumers_key, string.format('%.3f', now()), member)
redis.call('hset', consumers_key .. ':about', member, ARGV[4])
local held = 0
each_range(ARGV[5], function(first, last)
  for start = math.max(first, ring.first), last, STEP do
    local ids = {}
    for number = start, math.min(start + STEP - 1, last) do ids[#ids + 1] = id_of(number) end
    ids[#ids + 1] = 'JUSTID'
    held = held + #redis.call('xclaim', samples_key, group.name, consumer, 0, unpack(ids))
  end
end)
return {'OK', held}
