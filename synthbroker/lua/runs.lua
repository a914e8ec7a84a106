-- Runs. A run is a training process and its former selves; it stages what it has trained on when it makes a checkpoint,
-- and finishes that when the checkpoint is safely written. In a group's hash `runs`:
--   <run>                    time, life (the word of the process that is the run now), 1 where it keeps checkpoints
--   <run> <serial>.<word>    a checkpoint: `s` staged or `d` done, and the numbers behind the one before, like 1-40,43;
--                            serials rise, and the checkpoints of one word hold all that was trained on
--   <run> spares             what ranks took in place of bad samples, and no finished checkpoint has: rank:sitting:round:epoch:number
-- Each of several ranks is a run by its name <run>.r<rank>, whose life is its own. Their checkpoints are those of <run>,
-- under each rank's word: what one of them stages holds what all were dealt in the rounds that it has trained on, and the
-- serial is the number of rounds, so that the checkpoints of all ranks after the same step have the same serial.

local LONGEST_DONE = 2000

-- Those whose number still means the same sample.
local function read_spares(text)
  local spares, current = {}, redis.call('hget', meta_key, 'epoch')
  for word, rank, sitting, round, epoch, number in string.gmatch(text, '((%d+):(%d+):(%d+):([^ :]+):(%d+))') do
    local bound = epoch == current and math.huge or bound_of(epoch, current) or 0
    if tonumber(number) < bound then
      spares[#spares + 1] = {word = word, rank = tonumber(rank), sitting = tonumber(sitting), round = tonumber(round),
        number = tonumber(number)}
    end
  end
  return spares
end

-- A run as it is known: {name, whole, life, tokens = {{serial, word, field, done, numbers}...} by serial,
-- spares = {{rank, sitting, round, number}...}}; life nil: not known. `whole`, if not empty: the run whose rank this is.
local function load_run(group, name, whole)
  local run = {name = name, whole = (whole or '') ~= '' and whole or name, tokens = {}, spares = {}}
  local all = redis.call('hgetall', runs_key(group))
  for i = 1, #all, 2 do
    local field, value = all[i], all[i + 1]
    if field == name then
      run.life = string.match(value, '^%S+ (%S+) ')
    elseif field == run.whole .. ' spares' then
      run.spares = read_spares(value)
    elseif string.sub(field, 1, #run.whole + 1) == run.whole .. ' ' then
      local serial, word = string.match(field, '(%d+)%.(%S+)$')
      run.tokens[#run.tokens + 1] = {serial = tonumber(serial), word = word, field = field,
        done = string.sub(value, 1, 1) == 'd', numbers = string.sub(value, 3)}
    end
  end
  table.sort(run.tokens, function(a, b) return a.serial < b.serial end)
  return run
end

local function is_shut_out(run, life) return run.life ~= nil and run.life ~= life end

-- Whether a name is that of a run, of one of its ranks, or of its dealers.
local function is_of(name, whole)
  local head = string.sub(name, 1, #whole + 1)
  return name == whole or head == whole .. '.' and string.match(name, '^r%d+$', #head + 1) ~= nil
    or name == whole .. '.deal'
end

-- Who reads alone under the name of a run with ranks shuts them out.
local function shut_ranks_out(group, run)
  for _, field in ipairs(redis.call('hkeys', runs_key(group))) do
    if field ~= run.whole and is_of(field, run.whole) then
      redis.call('hset', runs_key(group), field, string.format('%.3f', now()) .. ' - 1')
    end
  end
  if redis.call('hget', rounds_key(group), 'run') == run.whole then redis.call('unlink', rounds_key(group)) end
end

local function forget_run(group, name)
  for _, field in ipairs(redis.call('hkeys', runs_key(group))) do
    if field == name or string.sub(field, 1, #name + 1) == name .. ' ' then redis.call('hdel', runs_key(group), field) end
  end
end

-- Writes whose the run is; the one that was heard of longest ago makes room for a new one.
local function remember_run(group, run, life, checkpoints)
  if not run.life then
    local lines, oldest, count = redis.call('hgetall', runs_key(group)), nil, 0
    for i = 1, #lines, 2 do
      if not string.find(lines[i], ' ', 1, true) then
        local time = tonumber(string.match(lines[i + 1], '^%S+'))
        count = count + 1
        if not oldest or time < oldest.time then oldest = {time = time, name = lines[i]} end
      end
    end
    if count >= MOST_RUNS then forget_run(group, oldest.name) end
  end
  run.life = life
  local line = string.format('%.3f', now()) .. ' ' .. life .. ' ' .. checkpoints
  redis.call('hset', runs_key(group), run.name, line)
  -- Who reads alone under the name of a run with ranks is shut out by them; likewise below.
  if run.whole ~= run.name then redis.call('hset', runs_key(group), run.whole, string.format('%.3f', now()) .. ' - 1') end
end

-- Calls f(first, last) for each range of a text like 1-40,43.
local function each_range(numbers, f)
  for first, last in string.gmatch(numbers, '(%d+)%-?(%d*)') do
    f(tonumber(first), tonumber(last ~= '' and last or first))
  end
end

-- Forgets the spares of a run for which gone(spare) holds.
local function forget_spares(group, run, gone)
  if #run.spares == 0 then return end
  local kept, words = {}, {}
  for _, one in ipairs(run.spares) do
    if not gone(one) then
      kept[#kept + 1] = one
      words[#words + 1] = one.word
    end
  end
  run.spares = kept
  if #words == 0 then redis.call('hdel', runs_key(group), run.whole .. ' spares')
  else redis.call('hset', runs_key(group), run.whole .. ' spares', table.concat(words, ' ')) end
end

local function is_among(texts, number)
  local found = false
  for _, text in ipairs(texts) do
    each_range(text, function(first, last) found = found or first <= number and number <= last end)
  end
  return found
end

-- Members for those of a run's numbers that were evicted while they were pending, from first to last, oldest first.
local function evicted_of(group, run, first, last)
  local found = {}
  for _, member in ipairs(redis.call('zrangebyscore', evicted_key(group), first, last)) do
    if is_of(string.match(member, '^(%S+) '), run.whole) then found[#found + 1] = member end
  end
  return found
end

-- The same for what stands in texts like 1-40,43.
local function evicted_among(group, run, texts)
  local found = {}
  if redis.call('exists', evicted_key(group)) == 0 then return found end
  for _, text in ipairs(texts) do
    each_range(text, function(first, last)
      for _, member in ipairs(evicted_of(group, run, first, last)) do found[#found + 1] = member end
    end)
  end
  return found
end

local function forgive(group, members)
  for start = 1, #members, KEYS_AT_ONCE do
    redis.call('zrem', evicted_key(group), unpack(members, start, math.min(start + KEYS_AT_ONCE - 1, #members)))
  end
end

-- The first ranges of a text like 1-40,43: enough to be named.
local function beginning_of(numbers)
  if #numbers <= LONGEST_DONE then return numbers end
  return string.match(string.sub(numbers, 1, LONGEST_DONE), '^(.*),')
end

-- Acknowledges what a run has staged under a word up to a checkpoint; what other ranks have staged up to there is in it.
-- Returns acknowledged, doubled, late (see ack.lua).
local function finish(ring, group, run, serial, word)
  local ids, late, texts, done = {}, 0, {}, {}
  for _, token in ipairs(run.tokens) do
    if not token.done and token.serial <= serial and token.word ~= word then
      -- The same step of another rank is known as done, too.
      if token.serial == serial then redis.call('hset', runs_key(group.name), token.field, 'd ')
      else redis.call('hdel', runs_key(group.name), token.field) end
      token.done = true
    elseif not token.done and token.serial <= serial then
      each_range(token.numbers, function(first, last)
        local gone = math.max(math.min(last + 1, ring.first) - first, 0)
        if ring.block then gone = 0 end  -- what it has evicted was acknowledged: by somebody else, who had it too
        late = late + gone
        for number = first + gone, last do ids[#ids + 1] = id_of(number) end
      end)
      texts[#texts + 1] = token.numbers
      redis.call('hset', runs_key(group.name), token.field, 'd ' .. beginning_of(token.numbers))
      token.done = true
    end
    if token.done then done[#done + 1] = token.field end
  end
  for i = 1, #done - MOST_DONE do redis.call('hdel', runs_key(group.name), done[i]) end
  forgive(group.name, evicted_among(group.name, run, texts))
  forget_spares(group.name, run, function(spare) return is_among(texts, spare.number) end)
  -- Of what other ranks were dealt, some may have been bad, and acknowledged as that.
  local acknowledged, doubled = acknowledge(ring, group, ids, 0, run.whole ~= run.name)
  return acknowledged, doubled, late
end
