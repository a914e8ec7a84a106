-- Deals whole rounds, a batch for every rank of a run, so that all ranks get the same number of batches.
--
-- ARGV  2-8 as for take.lua: group, reader, how many (a spare), live samples there must be, claim_after_s, seed, 0
--       9... producers to take from, all where there are none
--       last: what is wanted, words with a space between:
--         ROUND generation rank ranks sitting round share rounds last_share received drop_last short whole
--           sitting: one life of the run's readers; all its rounds are dealt in order, from 0 on
--           share: samples for each rank; rounds: so many in an epoch (0: no epochs), whose last one has last_share
--           received: the round whose answer this reader had last, -1 none; a deal is kept until all ranks had it
--           drop_last: 1 where the last, incomplete round is for nobody  short: 1 deals one now from what is there
--           whole: 1 to be told, too, what the other ranks are dealt: uses -1
--         SPARE generation rank sitting round noted    more samples for the caller, in place of bad ones
--           noted: 1 to have them in the checkpoints of all ranks (runs.lua)
--         REPEAT generation   books on the group that the caller repeats so many samples, since there are no others
-- Reply as for take.lua. END: no such round, for any rank. An incomplete last round is padded: every rank gets as many,
--       and some of the round's samples are given twice (booked as padded, and as reused; uses 2, so that nobody
--       acknowledges them twice).
--       besides: NOSEAT no table (any more) | SHUT run: another generation has it | LEFT: this rank reads in a later
--       sitting, or had this round before
-- Until a rank fetches its share it is pending for the sitting's dealer, a member of the group without a process. What a
-- round still lacks is awaited in `hand:<sitting>`. Asking again gives the same.

local order = {}
for word in string.gmatch(table.remove(ARGV), '%S+') do order[#order + 1] = word end
local asked = order[1]
local key = rounds_key(name)

local book = redis.call('hmget', key, 'epoch', 'generation', 'run')
if book[1] ~= ARGV[1] then return {'NOSEAT'} end
local generation, run = book[2], book[3]
if generation ~= order[2] then return {'SHUT', run} end

local function is_of_run(who)
  local head = run .. '.'
  return string.sub(who, 1, #head) == head
    and (string.match(who, '^r%d+/', #head + 1) or string.match(who, '^deal/', #head + 1))
end

-- As `awaited` of take.lua: what readers of this run hold, other ranks included, is never waited for.
local function awaited_elsewhere()
  for _, other in ipairs(others()) do
    local kin = is_of_run(other.name) and redis.call('zscore', consumers_key, name .. ' ' .. other.name)
    if other.pending > 0 and not kin then return true end
  end
  return false
end

local function drained() return ring.ended and math.max(group.delivered, ring.first - 1) >= ring.next - 1 end

-- Takes what is missing, as take.lua does; says whether nothing comes any more.
local function take_missing()
  if redis.call('xlen', samples_key) > ring.next - ring.first then sweep() end
  if ring.next - ring.first < tonumber(ARGV[5]) and not ring.ended then return false end
  local after_s = tonumber(ARGV[6])
  if after_s < 0 and drained() then after_s = 1e9 end  -- only those who left
  if after_s >= 0 then claim(after_s) end
  if not ring.block and not ring.ended then step_forward() end
  take_fresh()
  if ring.block and tally.skipped and load_waiting() then tell_room(name) end
  if missing() > 0 and limit > 1 and not (drained() and limit == math.huge) then take_again() end
  if missing() > 0 and redis.call('xrange', samples_key, '(' .. id_of(ring.next - 1), '+', 'COUNT', 1)[1] then sweep() end
  return missing() > 0 and drained() and not awaited_elsewhere()
end

-- What one rank takes in place of bad samples no other one knows of: checkpoints have it from here.
local function note_spares(rank, sitting, round)
  local kept = {}
  for spare, number in string.gmatch(redis.call('hget', runs_key(name), run .. ' spares') or '', '(%S+:(%d+))') do
    if tonumber(number) >= ring.first then kept[#kept + 1] = spare end
  end
  for at = 1, #given, 2 do
    if given[at + 1] < 2 then kept[#kept + 1] = table.concat({rank, sitting, round, ARGV[1], int(given[at])}, ':') end
  end
  if #kept > 0 then redis.call('hset', runs_key(name), run .. ' spares', table.concat(kept, ' ')) end
end

if asked == 'REPEAT' then
  allow_bookkeeping()
  count('padded', wanted)
  count('reused', wanted)
  return reply('OK')
end
if asked == 'SPARE' then
  allow_bookkeeping()
  local over = take_missing()
  if order[6] == '1' then note_spares(order[3], order[4], order[5]) end
  return reply(#given > 0 and 'OK' or over and 'END' or 'EMPTY')
end

local rank, ranks, sitting, round = tonumber(order[3]), tonumber(order[4]), tonumber(order[5]), tonumber(order[6])
local share, rounds, last_share = tonumber(order[7]), tonumber(order[8]), tonumber(order[9])
local received, drop_last, short, whole = tonumber(order[10]), order[11] == '1', order[12] == '1', order[13] == '1'
local reader = consumer
local function dealer_of(one) return run .. '.deal/' .. int(one) .. ':' .. generation end
local function field(what, i) return what .. ':' .. int(sitting) .. (i and ':' .. int(i) or '') end

local function write_hand(hand)
  local words = {}
  for i = 1, #hand, 2 do words[#words + 1] = int(hand[i]) .. ':' .. int(hand[i + 1]) end
  return table.concat(words, ' ')
end

local function read_hand(text)
  local hand = {}
  for number, uses in string.gmatch(text, '(%d+):(%d+)') do
    hand[#hand + 1] = tonumber(number)
    hand[#hand + 1] = tonumber(uses)
  end
  return hand
end

-- The earliest sitting that a rank reads in.
local function earliest_sitting()
  local earliest = sitting
  for one = 0, ranks - 1 do
    earliest = math.min(earliest, tonumber(redis.call('hget', key, 'at:' .. int(one))) or -1)
  end
  return earliest
end

-- Whether a former sitting is not over: what it was dealt, and nobody fetches, comes again in this one.
local function is_awaited()
  for _, what in ipairs(redis.call('hkeys', key)) do
    local one = string.match(what, '^next:(%d+)')
    if one and tonumber(one) < sitting then return true end
  end
  return false
end

-- Forgets sittings that no rank reads in any more; what they were dealt and nobody fetched is for others.
local function clear_sittings(before)
  local members, of = redis.call('zrange', consumers_key, 0, -1), name .. ' ' .. run .. '.deal/'
  for _, member in ipairs(members) do
    local one = string.sub(member, 1, #of) == of and tonumber(string.match(member, '^%d+', #of + 1))
    if one and one < before then redis.call('zrem', consumers_key, member) end
  end
  for _, what in ipairs(redis.call('hkeys', key)) do
    local one = string.match(what, '^[a-z]+:(%d+)')
    local kept = string.match(what, '^at:') or string.match(what, '^seat:')
    if one and not kept and tonumber(one) < before then redis.call('hdel', key, what) end
  end
end

local function note_received()
  if received < 0 or redis.call('hexists', key, field('deal', received)) == 0 then return end
  local mark = ' ' .. int(rank) .. ' '
  local got = redis.call('hget', key, field('got', received)) or ''
  if not string.find(got, mark, 1, true) then got = got .. mark end
  local _, all = string.gsub(got, '%d+', '')
  if all == ranks then
    redis.call('hdel', key, field('deal', received), field('got', received))
  else
    redis.call('hset', key, field('got', received), got)
  end
end

local function store_deal(i, hand)
  local count_of_each = math.ceil(#hand / 2 / ranks)
  local dealt = #hand / 2
  for extra = 0, count_of_each * ranks - dealt - 1 do
    hand[#hand + 1] = hand[2 * (extra % dealt) + 1]
    hand[#hand + 1] = 2
  end
  count('padded', #hand / 2 - dealt)
  count('reused', #hand / 2 - dealt)
  redis.call('hset', key, field('deal', i), write_hand(hand), field('next'), int(i + 1))
  redis.call('hdel', key, field('hand'))
end

local function drop_hand(hand)
  for i = 1, #hand, 2 do
    if hand[i + 1] < 2 then
      count('acknowledged', redis.call('xack', samples_key, name, id_of(hand[i])))
    end
  end
end

-- Makes one more round; says whether that could be settled, one way or the other.
local function deal_round(i)
  local each = rounds > 0 and i % rounds == rounds - 1 and last_share or share
  wanted, given = ranks * each, {}
  local hand = read_hand(redis.call('hget', key, field('hand')) or '')
  for at = 1, #hand, 2 do  -- of what was awaited long, the ring may have lost some
    if hand[at] >= ring.first then give(hand[at], hand[at + 1]) end
  end
  local over = missing() > 0 and take_missing() and not is_awaited()
  if over and (drop_last or #given == 0) then
    drop_hand(given)
    redis.call('hdel', key, field('hand'))
    redis.call('hset', key, field('end'), int(i))
  elseif missing() == 0 or over or short and #given > 0 then
    store_deal(i, given)
  else
    redis.call('hset', key, field('hand'), write_hand(given))
    return false
  end
  return true
end

-- Gives the reader its rank's share, for which it is pending from now on.
local function fetch(text)
  local all, ids = read_hand(text), {}
  local each = #all / ranks
  given = {}
  for at = rank * each + 1, (rank + 1) * each, 2 do
    give(all[at], all[at + 1])
    if all[at + 1] < 2 then ids[#ids + 1] = id_of(all[at]) end
  end
  for at = 1, whole and #all or 0, 2 do
    if math.floor((at - 1) / each) ~= rank and all[at + 1] < 2 then give(all[at], -1) end
  end
  for start = 1, #ids, STEP do
    local stop = math.min(start + STEP - 1, #ids)
    local some = {unpack(ids, start, stop)}
    some[#some + 1] = 'JUSTID'
    redis.call('xclaim', samples_key, name, reader, 0, unpack(some))
  end
  return reply('OK')
end

local at = tonumber(redis.call('hget', key, 'at:' .. int(rank)))
if at and at > sitting then return {'LEFT'} end
local was_earliest = earliest_sitting()
allow_bookkeeping()
if at ~= sitting then
  redis.call('hset', key, 'at:' .. int(rank), int(sitting))
  if earliest_sitting() > was_earliest then clear_sittings(earliest_sitting()) end
end
consumer = dealer_of(sitting)
redis.call('zadd', consumers_key, string.format('%.3f', now()), name .. ' ' .. consumer)
note_received()

local following = tonumber(redis.call('hget', key, field('next'))) or 0
while following <= round and redis.call('hexists', key, field('end')) == 0 do
  if not deal_round(following) then
    given = {}
    return reply('EMPTY')
  end
  following = following + 1
end
local dealt = redis.call('hget', key, field('deal', round))
if dealt then return fetch(dealt) end
given = {}
local last = tonumber(redis.call('hget', key, field('end')))
if last and round >= last then return reply('END') end
return reply('LEFT')
