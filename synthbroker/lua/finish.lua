-- A checkpoint is safely written: what was staged up to it is acknowledged.
--
-- ARGV  1 the epoch the caller believes in, may be a former one  2 group  3 run  4 its life  5 the newest token that is finished
--       6 the run whose rank this is, '' none
-- Reply OK acknowledged doubled late (see ack.lua) | SHUT a newer life of the run took over | NOGROUP | NORING

local ring = load_ring(true)
if not ring then return {'NORING'} end
local group = load_group(ring, ARGV[2])
if not group then return {'NOGROUP'} end
local run = load_run(group.name, ARGV[3], ARGV[6])
if is_shut_out(run, ARGV[4]) then return {'SHUT'} end
allow_bookkeeping()
local serial, word = string.match(ARGV[5], '^(%d+)%.(.*)$')
return {'OK', finish(ring, group, run, tonumber(serial), word)}
