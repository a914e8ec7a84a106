-- Ends a ring: nothing more is taken, readers come to an end when they have had everything.
--
-- Reply OK | NORING

local ring = load_ring()
if not ring then return {'NORING'} end
allow_bookkeeping()
if not ring.ended then redis.call('hset', meta_key, 'ended', string.format('%.3f', now())) end
tell_room('end')
return {'OK'}
