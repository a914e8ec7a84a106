-- A group is done with samples.
--
-- ARGV  2 group  3... numbers
-- Reply OK acknowledged doubled late | NOGROUP | NORING
--       doubled: was acknowledged before, so a sample was trained on twice; late: it was evicted meanwhile, and counted then
-- In a `block` ring this may make room; waiting producers are told.

local ring = load_ring()
if not ring then return {'NORING'} end
local group = load_group(ring, ARGV[2])
if not group then return {'NOGROUP'} end

local ids, late = {}, 0
for i = 3, #ARGV do
  ids[#ids + 1] = ARGV[i] .. '-0'
  if tonumber(ARGV[i]) < ring.first then late = late + 1 end  -- evicting acknowledged them
end
local acknowledged, doubled = acknowledge(ring, group, ids, late)
return {'OK', acknowledged, doubled, late}
