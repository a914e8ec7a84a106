-- Makes samples of one producer incarnation visible, strictly in the order of their sequence numbers.
--
-- ARGV  2 producer's name  3 its incarnation  4... nine for each sample:
--       seq, cost in bytes of server memory, payload bytes, raw bytes, uid of the send attempt, parts, spec, head, data
-- Reply word, last sequence number taken, number of the newest sample; the word says why it stopped:
--       OK all taken | FULL (then: holder room_id live capacity) | GAP a sequence number is missing | MISSING parts are gone
--       | OOM | ENDED | UNKNOWN no such producer | SHUT a newer incarnation took over | NORING
-- A sequence number taken before is a duplicate and counts as success. Its parts are removed only while they are
-- under expiry: those of the attempt that was committed are not, and must live.

local PER_SAMPLE = 9
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

local function add(i)
  local entry = {'from', sender, 'seq', ARGV[i], 't', string.format('%.3f', now()), 'spec', ARGV[i + 6],
    'bytes', ARGV[i + 2], 'raw', ARGV[i + 3], 'parts', ARGV[i + 4] .. ':' .. ARGV[i + 5], 'head', ARGV[i + 7]}
  if ARGV[i + 8] ~= '' then
    entry[#entry + 1] = 'data'
    entry[#entry + 1] = ARGV[i + 8]
  end
  local err = try_add(entry)
  if err and (string.find(err, 'equal or smaller', 1, true) or string.find(err, 'last possible ID', 1, true)) then
    heal()
    err = try_add(entry)
  end
  return err
end

-- Takes the sample whose arguments begin at i; answers why not, where it cannot.
local function take(i)
  local seq, cost = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  local names = {}
  part_names(names, ARGV[i + 4], tonumber(ARGV[i + 5]))
  if seq <= last then
    if #names > 0 and redis.call('pttl', names[1]) > 0 then in_chunks('unlink', names) end
    duplicates = duplicates + 1
    return nil
  end
  if seq > last + 1 then return {'GAP'} end
  if in_chunks('exists', names) ~= #names then return {'MISSING'} end
  use_lease(ring, name, cost, 1)
  local granted, holder = make_room(ring, cost, 1, 0)
  if not granted then
    mark_waiting(cost, 1)
    return {'FULL', holder, last_room_id(), int(ring.next - ring.first), int(ring.capacity)}
  end
  local err = add(i)
  if err then
    if string.find(err, 'OOM', 1, true) then return {'OOM'} end
    return {'ERROR', err}
  end
  for _, part in ipairs(names) do redis.call('persist', part) end
  redis.call('rpush', index_key, int(cost) .. ' ' .. ARGV[i + 4] .. ' ' .. ARGV[i + 5])
  ring.next = ring.next + 1
  ring.bytes = ring.bytes + cost
  last = seq
  taken = taken + 1
end

for i = 4, #ARGV, PER_SAMPLE do
  if ring.ended and tonumber(ARGV[i]) > last then stopped = {'ENDED'} else stopped = take(i) end
  if stopped then break end
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
