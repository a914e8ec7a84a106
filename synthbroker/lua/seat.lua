-- Gives one rank of a run its seat at a group's table, where whole rounds are dealt (deal.lua).
--
-- ARGV  2 group  3 run  4 attempt: which try of the run this is, '' unknown  5 terms: what all ranks must agree on
--       6 rank  7 word: this life of the rank's process; '' the rank's reader has left
--       8 seconds after which a silent reader is dead  9 the generation that the caller had a seat in, '' none
--       10 word for a new generation  11 the reader that asks, which has joined
-- Reply OK generation | BUSY run attempt seen terms: another run reads, or this one by other terms; a reader of one of its
--       ranks was last `seen` then, by the server's clock: it may be dead
--       SHUT run attempt: a newer life of the run has the table | NORING
--
-- `sb:{ring}:rounds:<group>` is the table: epoch run attempt terms generation, seat:<rank> a word, at:<rank> the sitting
-- it reads in; left: when the last reader did, before all ranks had come; and for each sitting (deal.lua): next, end,
-- hand, deal, got.
-- A run is alive while a reader of it is. One that comes to a seat which another life has taken, or that is a later
-- attempt, lays the table anew: the readers of the former generation are shut out, and what they hold is for the new one.

local ring = load_ring()
if not ring then return {'NORING'} end
local name, run, attempt, terms = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local rank, word, after_s, had = ARGV[6], ARGV[7], tonumber(ARGV[8]), ARGV[9]
local key = rounds_key(name)

local table_ = redis.call('hmget', key, 'epoch', 'run', 'attempt', 'terms', 'generation')
-- A server that came back with its data, or another one that took over, has the table, too.
local laid = table_[1] and (table_[1] == ARGV[1] or bound_of(table_[1], ARGV[1]) ~= nil)
local theirs = {run = table_[2], attempt = table_[3], terms = table_[4], generation = table_[5]}

-- Other members of the run that has the table: those who read, or all with its dealers.
local function members(readers_only)
  local found, head = {}, name .. ' ' .. theirs.run .. '.'
  local all = redis.call('zrange', consumers_key, 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do
    local reads = string.match(all[i], '^r%d+/', #head + 1)
    local deals = not readers_only and string.match(all[i], '^deal/', #head + 1)
    if string.sub(all[i], 1, #head) == head and (reads or deals) and all[i] ~= name .. ' ' .. ARGV[11] then
      found[#found + 1] = {name = all[i], seen = tonumber(all[i + 1]), rank = string.match(reads or '', '%d+')}
    end
  end
  return found
end

local function last_seen()
  local latest = 0
  for _, one in ipairs(members(true)) do
    -- Others of a new life, with more ranks, may wait here for the first of them, too.
    if redis.call('hexists', key, 'seat:' .. one.rank) == 1 then latest = math.max(latest, one.seen) end
  end
  return latest
end

local function unregister()
  for _, one in ipairs(members(false)) do
    redis.call('zrem', consumers_key, one.name)
    redis.call('hdel', consumers_key .. ':about', one.name)
  end
end

-- Whether a rank has yet to come: what it was dealt is kept for it, also where the others have come to the end and left.
local function is_awaited()
  for one = 0, (tonumber(string.match(theirs.terms, 'world_size=(%d+)')) or 0) - 1 do
    if redis.call('hexists', key, 'seat:' .. int(one)) == 0 then return true end
  end
  return false
end

if word == '' then
  if laid and theirs.generation == had and #members(true) == 0 then
    allow_bookkeeping()
    if is_awaited() then
      redis.call('hset', key, 'left', string.format('%.3f', now()))
    else
      unregister()
      redis.call('unlink', key)
    end
  end
  return {'OK', had}
end

if laid then
  local seen = last_seen()
  local alive = seen >= now() - after_s
  local same_run = theirs.run == run
  local left = same_run and tonumber(redis.call('hget', key, 'left')) or 0
  local seated = redis.call('hget', key, 'seat:' .. rank)
  local older = same_run and (tonumber(attempt) or 0) < (tonumber(theirs.attempt) or 0)
  if had ~= '' and had ~= theirs.generation or alive and older then return {'SHUT', theirs.run, theirs.attempt} end
  local busy = {'BUSY', theirs.run, theirs.attempt, string.format('%.3f', seen), theirs.terms}
  if had ~= '' then
    allow_bookkeeping()
    redis.call('hset', key, 'epoch', ARGV[1])
    return {'OK', had}
  end
  if alive and not same_run then return busy end
  local kept = alive or left >= now() - after_s
  if kept and attempt == theirs.attempt and (not seated or seated == word) then
    if terms ~= theirs.terms then return busy end
    allow_bookkeeping()
    redis.call('hdel', key, 'left')
    redis.call('hset', key, 'epoch', ARGV[1], 'seat:' .. rank, word)
    return {'OK', theirs.generation}
  end
end

allow_bookkeeping()
if laid then unregister() end
redis.call('unlink', key)
redis.call('hset', key, 'epoch', ARGV[1], 'run', run, 'attempt', attempt, 'terms', terms, 'generation', ARGV[10],
  'seat:' .. rank, word)
return {'OK', ARGV[10]}
