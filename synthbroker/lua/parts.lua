-- Looks for the parts of live samples, some samples at a time: each answer is of one instant.
--
-- ARGV  2 number of the sample to begin with  3 how many samples at most
-- Reply OK, number to go on with, number the next sample gets, {uid, parts, ...}, {number, part that is not there or is
--       under expiry, ...} | NORING

local ring = load_ring()
if not ring then return {'NORING'} end
local at = math.max(tonumber(ARGV[2]), ring.first)
local owners, missing, looked = {}, {}, 0
for _, line in ipairs(redis.call('lrange', index_key, int(at - ring.first), int(at - ring.first + ARGV[3] - 1))) do
  local uid, parts = string.match(line, '^%d+ (%S+) (%d+) %d+$')
  if looked > KEYS_AT_ONCE then break end
  if uid and parts ~= '0' then
    owners[#owners + 1] = uid
    owners[#owners + 1] = parts
    local names = {}
    part_names(names, uid, tonumber(parts))
    for _, name in ipairs(names) do
      if redis.call('pttl', name) ~= -1 then
        missing[#missing + 1] = int(at)
        missing[#missing + 1] = string.sub(name, #prefix + 6)
      end
    end
    looked = looked + #names
  end
  at = at + 1
end
return {'OK', int(at), int(ring.next), owners, missing}
