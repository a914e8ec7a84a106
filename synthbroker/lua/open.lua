-- Makes a ring, or checks that the one that is there is the one asked for.
--
-- ARGV  1 epoch for a new ring (the caller learns the real one from the reply)  2 capacity for a new ring, in bytes
--       3 reopen: 1 or 0   4... pairs of setting and value; '' means not given, take the ring's own
--       settings: when_full capacity max_samples schema info checks producers groups (names, comma between)
-- Reply OK, then meta as field, value, ...
--       MISMATCH setting theirs ours | ENDED

local wanted = {}
for i = 4, #ARGV, 2 do wanted[ARGV[i]] = ARGV[i + 1] end

local function flat_meta(word)
  local reply = redis.call('hgetall', meta_key)
  table.insert(reply, 1, word)
  return reply
end

local function declare(ring)
  for name in string.gmatch(wanted.groups, '[^,]+') do
    if not load_group(ring, name) then make_group(ring, name, '') end
  end
end

local function or_default(value, default) return value ~= '' and value or default end

if redis.call('exists', meta_key) == 0 then
  allow_bookkeeping()
  -- A server that lost only part of the ring's keys must not lend the rest to a new one.
  redis.call('unlink', samples_key, index_key, leases_key, seqs_key, room_key, closed_key, producers_key, consumers_key,
    content_key, content_key .. ':old', twins_key, prefix .. 'producers:about', prefix .. 'consumers:about')
  redis.call('hset', meta_key, 'version', '1', 'epoch', ARGV[1], 'made', string.format('%.3f', now()),
    'when_full', or_default(wanted.when_full, 'block'), 'capacity', or_default(wanted.capacity, ARGV[2]),
    'max_samples', or_default(wanted.max_samples, '0'), 'schema', wanted.schema, 'info', or_default(wanted.info, '{}'),
    'checks', or_default(wanted.checks, 'none'), 'producers', or_default(wanted.producers, '0'), 'closed', '0',
    'ended', '0', 'first', '1', 'next', '1', 'bytes', '0', 'leased_bytes', '0', 'leased_samples', '0',
    'duplicates', '0', 'foreign', '0', 'quarantined', '0', 'waiting', '0')
  ARGV[1] = redis.call('hget', meta_key, 'epoch')
  declare(load_ring())
  return flat_meta('OK')
end

for _, setting in ipairs({'when_full', 'capacity', 'max_samples', 'info', 'checks', 'producers', 'schema'}) do
  local theirs = redis.call('hget', meta_key, setting) or ''
  local unset = setting == 'schema' and theirs == ''
  if wanted[setting] ~= '' and not unset and wanted[setting] ~= theirs then
    return {'MISMATCH', setting, theirs, wanted[setting]}
  end
end
ARGV[1] = redis.call('hget', meta_key, 'epoch')
local ring = load_ring()
if ring.ended and ARGV[3] ~= '1' then return {'ENDED'} end
allow_bookkeeping()
if ring.ended then
  redis.call('hset', meta_key, 'ended', '0', 'closed', '0')
  redis.call('unlink', closed_key)
end
if wanted.schema ~= '' and redis.call('hget', meta_key, 'schema') == '' then
  redis.call('hset', meta_key, 'schema', wanted.schema)
end
declare(ring)
return flat_meta('OK')
