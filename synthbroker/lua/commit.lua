-- Makes samples of one producer incarnation visible, strictly in the order of their sequence numbers.
--
-- ARGV  2 producer's name  3 its incarnation  4... four for each sample:
--       "seq cost payload raw uid:parts" (cost: bytes of server memory; uid of the send attempt; "uid@start:1" for those
--       that share a part), spec, head, data
-- Reply word, last sequence number taken, number of the newest sample; the word says why it stopped:
--       OK all taken | FULL (then: holder room_id live capacity) | GAP a sequence number is missing | MISSING parts are gone
--       | OOM | ENDED | UNKNOWN no such producer | SHUT a newer incarnation took over | NORING
-- A sequence number taken before is a duplicate and counts as success. Its parts are removed only while they are
-- under expiry: those of the attempt that was committed are not, and must live.

local PER_SAMPLE = 4
local LARGEST_HEAD, LARGEST_DATA = 2 ^ 20 + 2 ^ 10, 2 ^ 16  -- with the spec; readers take an entry whole before they can see that it is none
local ring = load_ring()
if not ring then return {'NORING'} end
local name = ARGV[2]
local word, last = load_seq(name)
if not word then return {'UNKNOWN'} end
if word ~= ARGV[3] then return {'SHUT'} end

local sender = name .. ':' .. word
local duplicates, taken = 0, 0
local stopped = nil

-- Carries a group over to the stream's copy: how far it read, its consumers, what they hold.
local function copy_group(copy, group)
  redis.call('xgroup', 'create', copy, group.name, id_of(group.delivered), 'MKSTREAM')
  for _, info in ipairs(redis.call('xinfo', 'consumers', samples_key, group.name)) do
    redis.call('xgroup', 'createconsumer', copy, group.name, info[2])
  end
  local from = '-'
  repeat
    local pending = redis.call('xpending', samples_key, group.name, from, '+', STEP)
    for _, held in ipairs(pending) do
      redis.call('xclaim', copy, group.name, held[2], 0, held[1], 'RETRYCOUNT', held[4], 'FORCE', 'JUSTID')
      from = '(' .. held[1]
    end
  until #pending < STEP
end

-- Somebody else wrote behind our newest sample, and ids only rise: deleting does not lower the last one, and Redis 8
-- refuses XSETID then. So the stream is written anew without what is foreign.
local function heal()
  local copy, from, foreign = prefix .. 'samples:copy', '-', 0
  redis.call('unlink', copy)
  repeat
    local entries = redis.call('xrange', samples_key, from, '+', 'COUNT', STEP)
    for _, entry in ipairs(entries) do
      if is_own(ring, entry[1]) then
        redis.call('xadd', copy, entry[1], unpack(entry[2]))
      else
        foreign = foreign + 1
      end
      from = '(' .. entry[1]
    end
  until #entries < STEP
  for _, group in ipairs(load_groups(ring)) do copy_group(copy, group) end
  redis.call('unlink', samples_key)
  if redis.call('exists', copy) == 1 then redis.call('rename', copy, samples_key) end
  redis.call('hincrby', meta_key, 'foreign', foreign)
end

-- Answers what the server has against it, if anything.
local function try_add(entry)
  local reply = redis.pcall('xadd', samples_key, id_of(ring.next), unpack(entry))
  return type(reply) == 'table' and reply.err and tostring(reply.err)
end

local time = string.format('%.3f', now())

local function add(sample, i)
  local entry = {'from', sender, 'seq', sample.seq, 't', time, 'spec', ARGV[i + 1], 'bytes', sample.size,
    'raw', sample.raw, 'parts', sample.uid .. ':' .. sample.parts, 'head', ARGV[i + 2]}
  if ARGV[i + 3] ~= '' then
    entry[17], entry[18] = 'data', ARGV[i + 3]
  end
  local err = try_add(entry)
  if err and (string.find(err, 'equal or smaller', 1, true) or string.find(err, 'last possible ID', 1, true)) then
    heal()
    err = try_add(entry)
  end
  return err
end

-- The sample whose arguments begin at i, with the names of its parts.
local function read_sample(i)
  local sample = {names = {}}
  sample.seq, sample.cost, sample.size, sample.raw, sample.uid, sample.parts =
    string.match(ARGV[i], '^(%d+) (%d+) (%d+) (%d+) ([^:]+):(%d+)$')
  if sample.parts == '0' then return sample end
  sample.shared = string.match(sample.uid, '^(.*)@')
  part_names(sample.names, sample.shared or sample.uid, tonumber(sample.parts))
  return sample
end

-- Lines for the index. Of samples that share a part the last owns it: such a line is written when it is known what comes
-- behind it.
local lines, open_line = {}, nil

local function close_line(next_shared)
  if not open_line then return end
  local owns = open_line.shared ~= next_shared
  lines[#lines + 1] = open_line.cost .. ' ' .. (owns and open_line.shared .. ' ' .. open_line.parts or '- 0')
  open_line = nil
end

local function write_lines()
  if #lines > 0 then redis.call('rpush', index_key, unpack(lines)) end
  lines = {}
end

local lasting = {}

-- Answers why a sample that is next cannot be taken.
local function take(sample, i)
  local cost = tonumber(sample.cost)
  if not fits(ring, cost, 1) then
    write_lines()
    local granted, holder = make_room(ring, cost, 1, 0)
    if not granted then
      mark_waiting(cost, 1)
      return {'FULL', holder, last_room_id(), int(ring.next - ring.first), int(ring.capacity)}
    end
  end
  local err = add(sample, i)
  if err then
    if string.find(err, 'OOM', 1, true) then return {'OOM'} end
    return {'ERROR', err}
  end
  if not (sample.shared and lasting[sample.shared]) then
    for _, part in ipairs(sample.names) do redis.call('persist', part) end
    if sample.shared then lasting[sample.shared] = true end
  end
  close_line(sample.shared)
  if sample.shared then
    open_line = sample
  else
    lines[#lines + 1] = sample.cost .. ' ' .. sample.uid .. ' ' .. sample.parts
  end
  if #lines >= KEYS_AT_ONCE then write_lines() end
  ring.next = ring.next + 1
  ring.bytes = ring.bytes + cost
  last = last + 1
  taken = taken + 1
end

-- Whether all parts of a sample are there; a shared one is looked for once.
local there = {}

local function is_whole(sample)
  if #sample.names == 0 or (sample.shared and there[sample.shared]) then return true end
  if in_chunks('exists', sample.names) ~= #sample.names then return false end
  if sample.shared then there[sample.shared] = true end
  return true
end

-- Which samples are next, as far as nothing but room can be in the way; and why it is no further.
local fresh, cost, seq, spare = {}, 0, last, {}
for i = 4, #ARGV, PER_SAMPLE do
  local sample = read_sample(i)
  local own = tonumber(sample.seq)
  if own <= last then
    spare[#spare + 1] = sample
    duplicates = duplicates + 1
  else
    if ring.ended then stopped = {'ENDED'}
    elseif own > seq + 1 then stopped = {'GAP'}
    elseif #ARGV[i + 1] + #ARGV[i + 2] > LARGEST_HEAD or #ARGV[i + 3] > LARGEST_DATA then
      stopped = {'ERROR', 'an entry of ' .. #ARGV[i + 2] .. ' bytes of head and ' .. #ARGV[i + 3] .. ' of data'}
    elseif not is_whole(sample) then stopped = {'MISSING'} end
    if stopped then break end
    fresh[#fresh + 1] = {sample, i}
    cost, seq = cost + tonumber(sample.cost), own
  end
end

if #fresh > 0 then
  use_lease(ring, name, cost, #fresh)
  make_room(ring, cost, #fresh, 0)  -- at once for all, if it can be
  for _, one in ipairs(fresh) do
    local why = take(one[1], one[2])
    if why then
      stopped = why
      break
    end
  end
  close_line(nil)
  write_lines()
end

for _, sample in ipairs(spare) do
  local used = sample.shared and lasting[sample.shared]
  if #sample.names > 0 and not used and redis.call('pttl', sample.names[1]) > 0 then
    in_chunks('unlink', sample.names)
  end
end

if taken > 0 then redis.call('hset', seqs_key, name, word .. ' ' .. int(last)) end
allow_bookkeeping()
save_ring(ring)
if taken > 0 and not ring.block and load_waiting() then tell_room('commit') end
if duplicates > 0 then redis.call('hincrby', meta_key, 'duplicates', duplicates) end
local reply = stopped or {'OK'}
table.insert(reply, 2, int(last))
table.insert(reply, 3, int(ring.next - 1))
return reply
