-- Grants a producer a lease on room for what it is about to send, so that many waiting producers hold nothing.
--
-- ARGV  2 producer's name  3 its incarnation  4 bytes  5 samples  6 seconds until the lease ends
--       7 bytes that must leave the ring first, because the server itself is full (0 as a rule)
-- Reply OK | FULL holder room_id live capacity | TOOBIG capacity | ENDED | UNKNOWN | SHUT | NORING
-- The lease replaces the producer's former one, so asking twice is asking once.

local ring = load_ring()
if not ring then return {'NORING'} end
local name, bytes, count = ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
local word = load_seq(name)
if not word then return {'UNKNOWN'} end
if word ~= ARGV[3] then return {'SHUT'} end
if ring.ended then return {'ENDED'} end
if bytes > ring.capacity then return {'TOOBIG', int(ring.capacity)} end

allow_bookkeeping()
use_lease(ring, name, math.huge, math.huge)
local granted, holder = make_room(ring, bytes, count, tonumber(ARGV[7]))
if not granted then
  save_ring(ring)
  mark_waiting(bytes, count)
  return {'FULL', holder, last_room_id(), int(ring.next - ring.first), int(ring.capacity)}
end
ring.leased_bytes = ring.leased_bytes + bytes
ring.leased_samples = ring.leased_samples + count
redis.call('hset', leases_key, name, int(bytes) .. ' ' .. int(count) .. ' ' .. string.format('%.3f', now() + ARGV[6]))
save_ring(ring)
return {'OK'}
