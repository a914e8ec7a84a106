-- A group is done with samples.
--
-- ARGV  2 group  3 1: said before, and the answer was lost; 0  4... numbers
-- Reply OK acknowledged doubled late | NOGROUP | NORING
--       doubled: was acknowledged before, so a sample was trained on twice, unless it is only said again; late: it was
--       evicted meanwhile, and counted then (a `block` ring evicts only what was acknowledged)
-- In a `block` ring this may make room; waiting producers are told.

local FEWEST_SHARE = 16  -- the part of a full ring that is given back at a time

local ring = load_ring()
if not ring then return {'NORING'} end
local name = ARGV[2]
local group = load_group(ring, name)
if not group then return {'NOGROUP'} end

local ids, late = {}, 0
for i = 4, #ARGV do
  ids[#ids + 1] = ARGV[i] .. '-0'
  if not ring.block and tonumber(ARGV[i]) < ring.first then late = late + 1 end  -- evicting acknowledged them
end
local acknowledged = 0
for start = 1, #ids, KEYS_AT_ONCE do
  local stop = math.min(start + KEYS_AT_ONCE - 1, #ids)
  acknowledged = acknowledged + redis.call('xack', samples_key, name, unpack(ids, start, stop))
end
local doubled = ARGV[3] == '1' and 0 or #ids - acknowledged - late
allow_bookkeeping()
redis.call('hincrby', group_key(name), 'acknowledged', acknowledged)
if doubled > 0 then redis.call('hincrby', group_key(name), 'doubled', doubled) end
if ring.block and load_waiting() then
  -- Not for every sample: a producer that is woken sends what there is room for, and many at a time cost it less. At once
  -- where this group has nothing else to read.
  local free = floor_of(ring, load_groups(ring)) - ring.first
  if free > 0 and (free * FEWEST_SHARE >= ring.next - ring.first or group.delivered >= ring.next - 1) then
    tell_room(name)
  end
end
return {'OK', acknowledged, doubled, late}
