-- Everything about a ring at one instant, for status and for adding up the ledger.
--
-- ARGV  1 is not used: the snapshot is of whatever ring is there
-- Reply OK, time, meta, stream length, index length, {{group, delivered, pending, fields, {consumer, seen, pending, about}...}...},
--       {{producer, seen, seq, about}...}, leases | NORING

local meta = redis.call('hgetall', meta_key)
if #meta == 0 then return {'NORING'} end

local function members_of(group)
  local members = {}
  for _, info in ipairs(redis.call('xinfo', 'consumers', samples_key, group)) do
    local one = {}
    for i = 1, #info, 2 do one[info[i]] = info[i + 1] end
    local member = group .. ' ' .. one.name
    members[#members + 1] = {one.name, redis.call('zscore', consumers_key, member) or '', int(one.pending),
      redis.call('hget', consumers_key .. ':about', member) or '{}'}
  end
  return members
end

local groups = {}
for i, group in ipairs(load_groups({next = tonumber(redis.call('hget', meta_key, 'next'))})) do
  groups[i] = {group.name, int(group.delivered), int(group.pending), redis.call('hgetall', group_key(group.name)),
    members_of(group.name)}
end
local producers = {}
local seen = redis.call('zrange', producers_key, 0, -1, 'WITHSCORES')
for i = 1, #seen, 2 do
  local _, last = load_seq(seen[i])
  producers[#producers + 1] = {seen[i], seen[i + 1], int(last or 0),
    redis.call('hget', producers_key .. ':about', seen[i]) or '{}'}
end
return {'OK', string.format('%.3f', now()), meta, redis.call('xlen', samples_key), redis.call('llen', index_key),
  groups, producers, redis.call('hgetall', leases_key)}
