"""The keys of a ring in Redis, and what rings and groups may be called.

Keys, all with the ring's name as hash tag, so that a ring is one slot of a Redis Cluster:

| key | type | holds |
| --- | --- | --- |
| `sb:{ring}:samples` | stream | one entry per live sample, ids 1-0, 2-0, 3-0, … (`wire`) |
| `sb:{ring}:part:<uid>:<i>` | string | payload parts of one send attempt |
| `sb:{ring}:meta` | hash | version, epoch, policy, capacities, schema, first, next, bytes, counters |
| `sb:{ring}:index` | list | for each live sample: cost in bytes, uid, parts, us to make it: evicting reads no payload |
| `sb:{ring}:group:<g>`, `:uses:<g>` | hash, sorted set | a group's counters; how often it used what it may reuse |
| `sb:{ring}:runs:<g>`, `:evicted:<g>` | hash, sorted set | training runs' checkpoints (`lua/runs.lua`); their losses |
| `sb:{ring}:unsettled:<g>` | hash | while a server that lost something is told what its readers know (`losses`) |
| `sb:{ring}:rounds:<g>` | hash | what several ranks are dealt in whole rounds, and who they are |
| `sb:{ring}:producers`, `:consumers` | sorted sets | who, by last heartbeat; details in the hashes `…:about` |
| `sb:{ring}:seqs`, `:leases` | hashes | for each producer: incarnation and last sequence number; its lease on room |
| `sb:{ring}:room` | stream | a line when room was made or the ring ended; waiting producers block on it |
| `sb:{ring}:closed` | set | names of the producers that are done, where the ring was declared with `producers=N` |
| `sb:{ring}:quarantine` | stream | bad samples: reason, producer, recipe |
| `sb:{ring}:content`, `:content:old` | hashes | digests of samples: who was first to send that content |
| `sb:{ring}:twins` | hash | pairs of producers that send the same: how often, and when that was noticed |
"""

import re

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


def check_name(what: str, name: object) -> str:
    """Check the name of a ring or group.

    Raises:
        TypeError: Not a string.
        ValueError: Not made of 1 to 64 letters, digits, `_` and `-`.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a {what} must be a string, got {name!r}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a {what}: 1 to 64 letters, digits, _ and - are allowed")
    return name
