-- Keeps a note of a bad sample, so many of them at most.
--
-- ARGV  2 number, '' where it has none  3 reason  4 producer  5 recipe, JSON  6 how many notes are kept
-- Reply OK | NORING

if not load_ring() then return {'NORING'} end
local note = {'reason', ARGV[3], 'producer', ARGV[4], 'recipe', ARGV[5]}
if ARGV[2] ~= '' then note = {'id', ARGV[2], unpack(note)} end
allow_bookkeeping()
redis.call('hincrby', meta_key, 'quarantined', 1)
redis.call('xadd', quarantine_key, 'MAXLEN', ARGV[6], '*', unpack(note))
return {'OK'}
