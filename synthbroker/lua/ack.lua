-- A group is done with samples.
--
-- ARGV  1 the epoch that the numbers are from, may be a former one  2 group
--       3 1: said before, and the answer was lost; 0  4... numbers
-- Reply OK acknowledged doubled late | NOGROUP | NORING
--       doubled: was acknowledged before, so a sample was trained on twice, unless it is only said again; late: it was
--       evicted meanwhile, and counted then (a `block` ring evicts only what was acknowledged)
-- Numbers that mean other samples now than they did in that epoch count for nothing: the server lost what they meant.
-- In a `block` ring this may make room; waiting producers are told.

local ring = load_ring(true)
if not ring then return {'NORING'} end
local group = load_group(ring, ARGV[2])
if not group then return {'NOGROUP'} end

local ids, late = {}, 0
for i = 4, #ARGV do
  local number = tonumber(ARGV[i])
  if number < ring.bound then
    ids[#ids + 1] = ARGV[i] .. '-0'
    if number < ring.first and not ring.block then late = late + 1 end  -- evicting acknowledged them
  end
end
local acknowledged, doubled = acknowledge(ring, group, ids, late, ARGV[3] == '1')
return {'OK', acknowledged, doubled, late}
