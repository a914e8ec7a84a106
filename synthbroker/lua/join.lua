-- Registers one life of a process.
--
-- ARGV  1 the epoch the caller believes in, may be a former one  2 role: producer or consumer  3 name  4 word of this incarnation  5 about, JSON
--       producer: 6 last sequence number that counts as taken
--       consumer: 6 group  7 reuse ('' takes the group's own)  8 life of its run ('': it has none, see resume.lua)
--                 9 1 where the run keeps checkpoints
-- Reply OK | MISMATCH reuse theirs ours | SHUT a newer life of its run, or of its job, took over | NORING
-- A producer of the same name with another word is shut out from now on, unless it is a later life of the same SLURM job:
-- then the one that asks has run on on a node that was lost, and is itself shut out (SHUT). A group that is not there is
-- made, beginning at the oldest live sample.

local ring = load_ring(true)
if not ring then return {'NORING'} end
local role, name, word, about = ARGV[2], ARGV[3], ARGV[4], ARGV[5]

-- Job and restart that a producer's record names; nothing where it is no record of ours.
local function life_of(text)
  local readable, record = pcall(cjson.decode, text or '')
  if not readable or type(record) ~= 'table' then return nil, 0 end
  return record.job_id, tonumber(record.restart) or 0
end

if role == 'producer' then
  local theirs, taken = load_seq(name)
  if theirs and theirs ~= word then
    local job, restart = life_of(redis.call('hget', prefix .. 'producers:about', name))
    local our_job, our_restart = life_of(about)
    if job and job == our_job and restart > our_restart then return {'SHUT'} end
  end
  allow_bookkeeping()
  if theirs ~= word then
    use_lease(ring, name, math.huge, math.huge)
    save_ring(ring)
  end
  -- What it committed and a server has lost since is gone: it goes on behind that.
  if theirs ~= word or taken < tonumber(ARGV[6]) then
    redis.call('hset', seqs_key, name, word .. ' ' .. ARGV[6])
  end
  redis.call('zadd', producers_key, string.format('%.3f', now()), name)
  redis.call('hset', prefix .. 'producers:about', name, about)
  return {'OK'}
end

local group, reuse = ARGV[6], ARGV[7]
allow_bookkeeping()
if not load_group(ring, group) then
  make_group(ring, group, reuse ~= '' and reuse or '1')
else
  local theirs = redis.call('hget', group_key(group), 'reuse')
  if theirs == '' then
    redis.call('hset', group_key(group), 'reuse', reuse ~= '' and reuse or '1')
  elseif reuse ~= '' and theirs ~= reuse then
    return {'MISMATCH', 'reuse', theirs, reuse}
  end
end
local life = ARGV[8] or ''
if life ~= '' then
  local known = load_run(group, run_of(name))
  if is_shut_out(known, life) then return {'SHUT'} end
  if not known.life then remember_run(group, known, life, ARGV[9]) end
end
local member = name .. ':' .. word
redis.call('xgroup', 'createconsumer', samples_key, group, member)
redis.call('zadd', consumers_key, string.format('%.3f', now()), group .. ' ' .. member)
redis.call('hset', prefix .. 'consumers:about', group .. ' ' .. member, about)
return {'OK'}
