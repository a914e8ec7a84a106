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
local family, held = run_of(consumer), 0
each_range(ARGV[5], function(first, last)
  for start = math.max(first, ring.first), last, STEP do
    local ids = {}
    local stop = math.min(start + STEP - 1, last)
    for _, entry in ipairs(redis.call('xpending', samples_key, group.name, id_of(start), id_of(stop), STEP)) do
      if run_of(entry[2]) == family then ids[#ids + 1] = entry[1] end  -- others may hold it by now, or another rank does
    end
    if #ids > 0 then
      ids[#ids + 1] = 'JUSTID'
      held = held + #redis.call('xclaim', samples_key, group.name, consumer, 0, unpack(ids))
    end
  end
end)
return {'OK', held}
