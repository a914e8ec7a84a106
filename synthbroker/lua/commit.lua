-- Makes samples of one producer incarnation visible, strictly in the order of their sequence numbers.
--
-- ARGV  2 producer's name  3 its incarnation
--       4 "bytes samples seconds us": a lease on room for what is sent next, if all are taken and it is to be had without
--       evicting what somebody may want ("0 0 0 ...": none); and what it took to make one of these samples, the mean
--       5... runs of samples that differ in little:
--       "seq count cost payload raw uid parts start", spec, how their heads begin; then two for each of the `count`
--       samples: how its head goes on, data. (cost: bytes of server memory; payload, raw: its sizes, all for each one; uid
--       of the send attempt. Of several samples with parts of their own each is a run. start: where the first one's
--       payload begins in a part that it shares with others, the next one's behind it; "-" where nothing is shared.)
-- Reply word, last sequence number taken, number of the newest sample; the word says why it stopped:
--       OK all taken (then: samples that there is a lease for) | FULL (then: holder room_id live capacity)
--       | GAP a sequence number is missing | MISSING parts are gone | OOM | ENDED | UNKNOWN no such producer
--       | SHUT a newer incarnation took over | NORING
-- A sequence number taken before is a duplicate and counts as success. Its parts are removed only while they are
-- under expiry: those of the attempt that was committed are not, and must live.

local PER_RUN, PER_SAMPLE = 3, 2
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

local number_text, seq_text = counter(), counter()

-- Answers what the server has against it, if anything.
local function try_add(entry, length)
  local reply = redis.pcall('xadd', samples_key, number_text(ring.next) .. '-0', unpack(entry, 1, length))
  return type(reply) == 'table' and reply.err and tostring(reply.err)
end

local time = string.format('%.3f', now())

-- The run whose arguments begin at i, with the names of its parts and the fields that its entries have in common.
local function read_run(i)
  local run = {at = i + PER_RUN, names = {}}
  local seq, count, cost, size, raw, uid, parts, start =
    string.match(ARGV[i], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%S+) (%d+) (%S+)$')
  run.seq, run.count, run.cost, run.size = tonumber(seq), tonumber(count), tonumber(cost), tonumber(size)
  run.uid, run.parts, run.start = uid, parts, tonumber(start)
  part_names(run.names, uid, tonumber(parts))
  run.begin, run.text_bytes = ARGV[i + 2], #ARGV[i + 1] + #ARGV[i + 2]
  run.entry = {'from', sender, 'seq', '', 't', time, 'spec', ARGV[i + 1], 'bytes', size, 'raw', raw,
    'parts', uid .. ':' .. parts, 'head', '', 'data', ''}
  return run
end

-- Adds the sample of that place in a run to the stream; answers what the server has against it.
local function add(run, place)
  local entry, at = run.entry, run.at + PER_SAMPLE * place
  entry[4] = seq_text(run.seq + place)
  if run.start then entry[14] = run.uid .. '@' .. int(run.start + place * run.size) .. ':1' end
  entry[16], entry[18] = run.begin .. ARGV[at], ARGV[at + 1]
  local length = ARGV[at + 1] == '' and 16 or 18
  local err = try_add(entry, length)
  if err and (string.find(err, 'equal or smaller', 1, true) or string.find(err, 'last possible ID', 1, true)) then
    heal()
    err = try_add(entry, length)
  end
  return err
end

-- Lines for the index. Of samples that share a part the last owns it: such a line is written when it is known what comes
-- behind it.
local lines, open_run = {}, nil
local made = string.match(ARGV[4], ' %d+$')

local function close_line(next_uid)
  if not open_run then return end
  local owns = open_run.uid ~= next_uid
  lines[#lines + 1] = owns and int(open_run.cost) .. ' ' .. open_run.uid .. ' ' .. open_run.parts .. made
    or open_run.unowned
  open_run = nil
end

local function write_line(run)
  close_line(run.uid)
  if run.start then
    run.unowned = run.unowned or int(run.cost) .. ' - 0' .. made
    open_run = run
  else
    lines[#lines + 1] = int(run.cost) .. ' ' .. run.uid .. ' ' .. run.parts .. made
  end
end

local function write_lines()
  if #lines > 0 then redis.call('rpush', index_key, unpack(lines)) end
  lines = {}
end

local lasting = {}

-- Answers why the sample of that place in a run, which is next, cannot be taken.
local function take(run, place)
  if not fits(ring, run.cost, 1) then
    write_lines()
    local granted, holder = make_room(ring, run.cost, 1, 0)
    if not granted then
      mark_waiting(run.cost, 1)
      return {'FULL', holder, last_room_id(), int(ring.next - ring.first), int(ring.capacity)}
    end
  end
  local err = add(run, place)
  if err then
    if string.find(err, 'OOM', 1, true) then return {'OOM'} end
    return {'ERROR', err}
  end
  if #run.names > 0 and not lasting[run.uid] then
    for _, part in ipairs(run.names) do redis.call('persist', part) end
    lasting[run.uid] = true
  end
  write_line(run)
  if #lines >= KEYS_AT_ONCE then write_lines() end
  ring.next = ring.next + 1
  ring.bytes = ring.bytes + run.cost
  last = last + 1
  taken = taken + 1
end

-- Whether all parts of a run are there; one that runs share is looked for once.
local there = {}

local function is_whole(run)
  if #run.names == 0 or there[run.uid] then return true end
  if in_chunks('exists', run.names) ~= #run.names then return false end
  there[run.uid] = true
  return true
end

-- How many samples of a run, from that place on, have texts that readers take.
local function count_readable(run, place)
  for i = place, run.count - 1 do
    local at = run.at + PER_SAMPLE * i
    if run.text_bytes + #ARGV[at] > LARGEST_HEAD or #ARGV[at + 1] > LARGEST_DATA then
      stopped = {'ERROR', 'an entry of ' .. int(#run.begin + #ARGV[at]) .. ' bytes of head and '
        .. #ARGV[at + 1] .. ' of data'}
      return i - place
    end
  end
  return run.count - place
end

-- Which samples are next, as far as nothing but room can be in the way: runs, where in them to begin, how many; and why
-- it is no further.
local fresh, fresh_count, cost, seq, spare = {}, 0, 0, last, {}
local i = 5
while i <= #ARGV and not stopped do
  local run = read_run(i)
  local known = math.max(math.min(last - run.seq + 1, run.count), 0)
  duplicates = duplicates + known
  if known > 0 then spare[#spare + 1] = run end
  if known < run.count then
    if ring.ended then stopped = {'ENDED'}
    elseif run.seq + known > seq + 1 then stopped = {'GAP'}
    elseif not is_whole(run) then stopped = {'MISSING'}
    else
      local count = count_readable(run, known)
      fresh[#fresh + 1] = {run, known, count}
      cost, seq, fresh_count = cost + count * run.cost, seq + count, fresh_count + count
    end
  end
  i = run.at + PER_SAMPLE * run.count
end

local function take_all()
  for _, one in ipairs(fresh) do
    for place = one[2], one[2] + one[3] - 1 do
      local why = take(one[1], place)
      if why then return why end
    end
  end
  return stopped
end

if fresh_count > 0 then
  use_lease(ring, name, cost, fresh_count)
  make_room(ring, cost, fresh_count, 0)  -- at once for all, if it can be
  stopped = take_all()
  close_line(nil)
  write_lines()
end

for _, run in ipairs(spare) do
  if #run.names > 0 and not lasting[run.uid] and redis.call('pttl', run.names[1]) > 0 then
    in_chunks('unlink', run.names)
  end
end

if taken > 0 then redis.call('hset', seqs_key, name, word .. ' ' .. int(last)) end
allow_bookkeeping()

-- Saves the producer asking for it (the lease of a `drop-oldest` ring that is full must wait until it is needed).
local function lease_ahead()
  local bytes, count, seconds = string.match(ARGV[4], '^(%d+) (%d+) (%d+) ')
  bytes, count = tonumber(bytes), tonumber(count)
  if stopped or ring.ended or count == 0 then return 0 end
  use_lease(ring, name, math.huge, math.huge)
  local granted = fits(ring, bytes, count) or ring.block and make_room(ring, bytes, count, 0)
  if granted then grant_lease(ring, name, bytes, count, seconds) end
  return granted and count or 0
end

local ahead = lease_ahead()
save_ring(ring)
if taken > 0 and not ring.block and load_waiting() then tell_room('commit') end
if duplicates > 0 then redis.call('hincrby', meta_key, 'duplicates', duplicates) end
local reply = stopped or {'OK', int(ahead)}
table.insert(reply, 2, int(last))
table.insert(reply, 3, int(ring.next - 1))
return reply
