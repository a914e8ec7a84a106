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

-- Removes what somebody else wrote behind our newest sample, so that ours can follow it.
local function heal()
  local foreign = redis.call('xrange', samples_key, '(' .. id_of(ring.next - 1), '+', 'COUNT', STEP)
  local ids = {}
  for i, entry in ipairs(foreign) do ids[i] = entry[1] end
  if #ids > 0 then
    redis.call('xdel', samples_key, unpack(ids))
    redis.call('hincrby', meta_key, 'foreign', #ids)
    if #ids == STEP then return heal() end
  end
  for _, group in ipairs(load_groups()) do
    if #ids > 0 then redis.call('xack', samples_key, group.name, unpack(ids)) end
    if group.delivered >= ring.next then
      redis.call('xgroup', 'setid', samples_key, group.name, id_of(ring.next - 1))
    end
  end
  redis.call('xsetid', samples_key, id_of(ring.next - 1))
end

local function add(i)
  local entry = {'from', sender, 'seq', ARGV[i], 't', string.format('%.3f', now()), 'spec', ARGV[i + 6],
    'bytes', ARGV[i + 2], 'raw', ARGV[i + 3], 'parts', ARGV[i + 4] .. ':' .. ARGV[i + 5], 'head', ARGV[i + 7]}
  if ARGV[i + 8] ~= '' then
    entry[#entry + 1] = 'data'
    entry[#entry + 1] = ARGV[i + 8]
  end
  local reply = redis.pcall('xadd', samples_key, id_of(ring.next), unpack(entry))
  if type(reply) == 'table' and reply.err and string.find(reply.err, 'equal or smaller', 1, true) then
    heal()
    reply = redis.pcall('xadd', samples_key, id_of(ring.next), unpack(entry))
  end
  return type(reply) == 'table' and reply.err
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
