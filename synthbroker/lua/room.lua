-- Grants a producer a lease on room for what it is about to send, so that many waiting producers hold nothing.
--
-- ARGV  2 producer's name  3 its incarnation  4 bytes  5 samples  6 seconds until the lease ends
--       7 bytes that must leave the ring first, because the server itself is full (0 as a rule)
--       8... what each sample takes, if room for the first of them alone would help
-- Reply OK samples | FULL holder room_id live capacity | TOOBIG capacity | ENDED | UNKNOWN | SHUT | NORING
-- The lease replaces the producer's former one, so asking twice is asking once.

local ring = load_ring()
if not ring then return {'NORING'} end
local name, bytes, count = ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
local word = load_seq(name)
if not word then return {'UNKNOWN'} end
if word ~= ARGV[3] then return {'SHUT'} end
if ring.ended then return {'ENDED'} end
local many = #ARGV >= 8
if (many and tonumber(ARGV[8]) or bytes) > ring.capacity then return {'TOOBIG', int(ring.capacity)} end

-- Settles for the first of the samples, as far as there is `enough` room; for one, where there is none.
local function settle_for(enough)
  local sum, n = tonumber(ARGV[8]), 1
  local found = enough(sum, n)
  while found and 8 + n <= #ARGV and enough(sum + tonumber(ARGV[8 + n]), n + 1) do
    sum, n = sum + tonumber(ARGV[8 + n]), n + 1
  end
  bytes, count = sum, n
  return found
end

allow_bookkeeping()
use_lease(ring, name, math.huge, math.huge)
if many then
  settle_for(function(b, n) return b <= ring.capacity and (ring.max_samples == 0 or n <= ring.max_samples) end)
end
if many and not fits(ring, bytes, count) then
  expire_leases(ring)
  settle_for(function(b, n) return fits_beside(ring, 0, 0, b, n) end)
end
local needed = tonumber(ARGV[7])
local granted, holder = make_room(ring, bytes, count, needed)
if not granted and many and needed == 0 then granted = settle_for(function(b, n) return fits(ring, b, n) end) end
if not granted then
  save_ring(ring)
  mark_waiting(bytes, count)
  return {'FULL', holder, last_room_id(), int(ring.next - ring.first), int(ring.capacity)}
end
grant_lease(ring, name, bytes, count, ARGV[6])
save_ring(ring)
return {'OK', int(count)}
