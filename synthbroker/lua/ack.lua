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

local ids, late, unsettled = {}, 0, {}
for i = 4, #ARGV do
  local number = tonumber(ARGV[i])
  if number < ring.bound then
    ids[#ids + 1] = ARGV[i] .. '-0'
    if number < ring.first then
      if not ring.block then late = late + 1 end  -- evicting acknowledged them
    elseif number > group.delivered then
      unsettled[#unsettled + 1] = ARGV[i]
    end
  end
end
-- The server has forgotten that it gave them; whoever holds them tells (settle.lua).
local forgotten = #unsettled > 0 and redis.call('hexists', group_key(group.name), 'unsettled') == 1
local passed_over = late + (forgotten and #unsettled or 0)
local acknowledged, doubled = acknowledge(ring, group, ids, passed_over, ARGV[3] == '1')
if forgotten then
  for _, number in ipairs(unsettled) do redis.call('hset', unsettled_key(group.name), number, '') end
end
return {'OK', acknowledged, doubled, late}
