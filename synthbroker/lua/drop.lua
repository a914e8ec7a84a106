-- Drops a group, or the whole ring in bounded steps.
--
-- ARGV  2 group, or '' for the ring
-- Reply OK | MORE call again | NOGROUP | NORING

local ring = load_ring()
if not ring then return {'NORING'} end
local name = ARGV[2]
if name ~= '' then
  if not load_group(ring, name) then return {'NOGROUP'} end
  allow_bookkeeping()
  redis.call('xgroup', 'destroy', samples_key, name)
  redis.call('unlink', group_key(name), uses_key(name), runs_key(name), evicted_key(name), unsettled_key(name),
    rounds_key(name))
  for _, member in ipairs(redis.call('zrange', consumers_key, 0, -1)) do
    if string.sub(member, 1, #name + 1) == name .. ' ' then
      redis.call('zrem', consumers_key, member)
      redis.call('hdel', consumers_key .. ':about', member)
    end
  end
  if load_waiting() then tell_room('drop') end
  return {'OK'}
end

local lines = redis.call('lrange', index_key, 0, STEP - 1)
local groups = load_groups(ring)
if #lines > 0 then
  evict(ring, lines, groups)
  return {'MORE'}
end
for _, group in ipairs(groups) do
  redis.call('unlink', group_key(group.name), uses_key(group.name), runs_key(group.name), evicted_key(group.name),
    unsettled_key(group.name), rounds_key(group.name))
end
redis.call('unlink', samples_key, index_key, leases_key, seqs_key, room_key, closed_key, quarantine_key, producers_key,
  consumers_key, content_key, content_key .. ':old', twins_key, producers_key .. ':about', consumers_key .. ':about', meta_key)
return {'OK'}
