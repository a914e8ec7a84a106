-- A process is a run from now on: former lives are shut out, and what they were given is for others at once. Where it
-- goes on from a checkpoint, what was staged up to that is acknowledged, and what was staged later is forgotten: that
-- comes again.
--
-- ARGV  2 group  3 run  4 life of this process  5 1 where it keeps checkpoints
--       6 the checkpoint's token; '' nothing was staged when it was made; '-' there is none, the run begins afresh
--       7 1 to go on though samples are gone  8 the run whose rank this is, '' none  9 how many ranks it has
-- Reply OK serial known later evicted | GONE likewise, and nothing was done | NOGROUP there is nothing to shut out | NORING
--       serial: the newest that is known  known: 1, or 0 where the group does not know the token
--       later: what checkpoints after this one have acknowledged, texts like 1-40,43 with commas between
--       evicted: numbers, commas between, that left the ring before the run was done with them

local ring = load_ring()
if not ring then return {'NORING'} end
local name, life, token = ARGV[2], ARGV[4], ARGV[6]
local group = load_group(ring, name)
if not group then return {'NOGROUP'} end
local run = load_run(name, ARGV[3], ARGV[8])
local ranks = tonumber(ARGV[9])
local at = token == '-' and math.huge or tonumber(string.match(token, '^%d+') or 0)
local word = string.match(token, '^%d+%.(.*)$')
local known, newest, later, settled = token == '-' or token == '', 0, {}, {}
for _, one in ipairs(run.tokens) do
  known = known or one.field == run.whole .. ' ' .. token
  newest = math.max(newest, one.serial)
  if one.done and one.serial > at then later[#later + 1] = one.numbers end
  if not one.done and one.serial <= at and one.word == word then settled[#settled + 1] = one.numbers end
end
local evicted, members, trained_on = {}, {}, {}
if token ~= '-' or run.life ~= life then
  for _, member in ipairs(known and evicted_among(name, run, settled) or {}) do trained_on[member] = true end
  members = evicted_of(name, run, '-inf', '+inf')
  for _, member in ipairs(members) do
    if token ~= '-' and not trained_on[member] then evicted[#evicted + 1] = string.match(member, '%d+$') end
  end
end
local answer = {'OK', int(newest), known and '1' or '0', table.concat(later, ','), table.concat(evicted, ',')}
if ARGV[7] ~= '1' and (not known or #later > 0 or #evicted > 0) then
  answer[1] = 'GONE'
  return answer
end

allow_bookkeeping()
if token ~= '-' or run.life ~= life then
  if known and token ~= '-' then finish(ring, group, run, at, word) end
  for _, one in ipairs(run.tokens) do
    -- A rank that begins afresh may do so while another one loads.
    if not one.done and (token ~= '-' or ranks == 0) then redis.call('hdel', runs_key(name), one.field) end
  end
  forgive(name, members)
  -- They come again, too. Those of the other ranks' new lives are theirs to keep.
  forget_spares(name, run, function(spare)
    return ranks == 0 or spare.rank >= ranks or run.name == run.whole .. '.r' .. int(spare.rank)
  end)
end
if run.life ~= life then
  local function is_former(family)
    local rank = tonumber(string.match(family, '%.r(%d+)$') or ranks)
    if family == run.whole .. '.deal' then return ranks == 0 end
    return family == run.name or is_of(family, run.whole) and rank >= ranks
  end
  local head = name .. ' '
  for _, member in ipairs(redis.call('zrange', consumers_key, 0, -1)) do
    if string.sub(member, 1, #head) == head and is_former(run_of(string.sub(member, #head + 1)) or '') then
      redis.call('zrem', consumers_key, member)
      redis.call('hdel', consumers_key .. ':about', member)
    end
  end
end
if ranks == 0 and run.life ~= life then shut_ranks_out(name, run) end
remember_run(name, run, life, ARGV[5])
return answer
