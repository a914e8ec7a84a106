-- A run has made a checkpoint: what it has trained on is staged, and stays pending until the checkpoint is written.
--
-- ARGV  2 group  3 run  4 its life  5 token: serial.word  6 numbers trained on since the token before, like 1-40,43
--       7 how many tokens may be staged at most  8 the run whose rank this is, '' none
--       9 where ranks are dealt rounds: for each sitting the last one that they have trained on, like 1:12 2:0
-- Reply OK numbers: what ranks took in place of bad samples up to there, which is staged, too
--       | SHUT a newer life of the run took over | MANY so many are staged | NOGROUP | NORING
-- Staging a token twice is staging it once.

local ring = load_ring()
if not ring then return {'NORING'} end
local name, life = ARGV[2], ARGV[4]
if not load_group(ring, name) then return {'NOGROUP'} end
local run = load_run(name, ARGV[3], ARGV[8])
if is_shut_out(run, life) then return {'SHUT'} end
local field, staged = run.whole .. ' ' .. ARGV[5], 0
for _, token in ipairs(run.tokens) do
  if not token.done and token.field ~= field then staged = staged + 1 end
end
if staged >= tonumber(ARGV[7]) then return {'MANY', staged} end

allow_bookkeeping()
remember_run(name, run, life, '1')
local texts, spares, last = {ARGV[6]}, {}, {}
for sitting, round in string.gmatch(ARGV[9], '(%d+):(%d+)') do last[tonumber(sitting)] = tonumber(round) end
local word = string.match(ARGV[5], '%.(.*)$')
for _, token in ipairs(run.tokens) do
  if token.word == word and token.field ~= field then texts[#texts + 1] = token.numbers end
end
for _, one in ipairs(run.spares) do
  local is_over = one.round <= (last[one.sitting] or -1)
  if is_over and not is_among(texts, one.number) then spares[#spares + 1] = int(one.number) end
end
local taken = table.concat(spares, ',')
redis.call('hset', runs_key(name), field, 's ' .. ARGV[6] .. (taken ~= '' and ',' .. taken or ''))
return {'OK', taken}
