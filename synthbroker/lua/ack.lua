-- A group is done with samples.
--
-- ARGV  2 group  3... numbers
-- Reply OK acknowledged doubled late | NOGROUP | NORING
--       doubled: was acknowledged before, so a sample was trained on twice; late: it was evicted meanwhile, and counted then
-- In a `block` ring this may make room; waiting producers are told.

local ring = load_ring()
if not ring then return {'NORING'} end
local name = ARGV[2]
local group = load_group(ring, name)
if not group then return {'NOGROUP'} end

local acknowledged, doubled, late = 0, 0, 0
for i = 3, #ARGV do
  local number = tonumber(ARGV[i])
  if redis.call('xack', samples_key, name, id_of(number)) == 1 then
    acknowledged = acknowledged + 1
  elseif number < ring.first then
    late = late + 1
  else
    doubled = doubled + 1
  end
end
allow_bookkeeping()
redis.call('hincrby', group_key(name), 'acknowledged', acknowledged)
if doubled > 0 then redis.call('hincrby', group_key(name), 'doubled', doubled) end
if ring.block and load_waiting() and floor_of(ring, load_groups(ring)) > ring.first then
  tell_room(name)
end
return {'OK', acknowledged, doubled, late}
