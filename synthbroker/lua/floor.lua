-- Says which samples some group has yet to finish with.
--
-- Reply OK number: all below it have been acknowledged by every group, or were evicted | NORING

local ring = load_ring()
if not ring then return {'NORING'} end
return {'OK', int((floor_of(ring, load_groups(ring))))}
