-- Notices producers that send the same content.
--
-- ARGV  2 producer's name  3 its incarnation  4 how many different digests it has told of so far, with these
--       5 digests kept in a generation  6 pairs kept  7 fewest digests in common  8... digests of its samples
-- Reply OK, then for each twin of this producer: first who sent it, then who sent it again | NORING
--
-- `content` remembers who was first to send a digest; when it is full it becomes `content:old`, and what was that is
-- forgotten. A pair is twins when they have `fewest` digests in common and those are at least a quarter of what the
-- second has told of: few of them may be alike by chance. An incarnation that repeats what a former one of the same name
-- sent is a twin of itself. `twins` has for each pair a count, and the time when it was noticed behind it.

local ring = load_ring()
if not ring then return {'NORING'} end
local name, told, most = ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
local me = name .. ' ' .. ARGV[3]
local old_key = content_key .. ':old'

allow_bookkeeping()
local common = {}
for i = 8, #ARGV do
  local owner = redis.call('hget', content_key, ARGV[i]) or redis.call('hget', old_key, ARGV[i])
  if not owner then
    redis.call('hset', content_key, ARGV[i], me)
  elseif owner ~= me then
    local first = string.match(owner, '^(%S+)')
    common[first] = (common[first] or 0) + 1
  end
end
if redis.call('hlen', content_key) >= most then redis.call('rename', content_key, old_key) end

for first, more in pairs(common) do
  local pair = first .. ' ' .. name
  local known = redis.call('hget', twins_key, pair)
  if not known and redis.call('hexists', twins_key, name .. ' ' .. first) == 1 then  -- each was first with some
    pair = name .. ' ' .. first
    known = redis.call('hget', twins_key, pair)
  end
  if known or redis.call('hlen', twins_key) < tonumber(ARGV[6]) then
    local count, noticed = string.match(known or '0', '^(%d+) ?(%S*)$')
    count = count + more
    if noticed == '' and count >= tonumber(ARGV[7]) and 4 * count >= told then noticed = string.format('%.3f', now()) end
    redis.call('hset', twins_key, pair, int(count) .. (noticed ~= '' and ' ' .. noticed or ''))
  end
end

local reply = {'OK'}
local all = redis.call('hgetall', twins_key)
for i = 1, #all, 2 do
  local first, second = string.match(all[i], '^(%S+) (%S+)$')
  if (first == name or second == name) and string.find(all[i + 1], ' ', 1, true) then
    reply[#reply + 1] = first
    reply[#reply + 1] = second
  end
end
return reply
