"""The table of rights: what a role may do is what its scripts and Python call, and nothing else."""

import pytest

from luacalls import calls_of
from synthbroker import acl
from synthbroker.line import script_names

SCRIPTS = {
    "generator": "open join room commit beat leave end quarantine arrive floor twins snapshot",
    "trainer": "join take ack beat leave arrive settle stage finish resume keep seat deal life quarantine snapshot",
    "viewer": "snapshot parts",
}
# What Python says itself, in ring.py, books.py, losses.py and line.py.
PLAIN = {
    "generator": {"meta": "evalsha hget hgetall", "part:*": "set unlink", "room": "xread", "seqs": "hget"},
    "trainer": {"meta": "evalsha hget hgetall", "part:*": "get getrange", "samples": "xread xrange xpending"},
    "viewer": {
        "meta": "evalsha hget hgetall",
        "part:*": "get getrange pttl",
        "samples": "xrange",
        "quarantine": "xrange",
    },
}
# Branches that a role never takes: the other role's of join, beat and leave; the books of an audit.
NOT_TAKEN = {
    "generator": {
        "consumers": "zadd zcard zrem",
        "consumers:about": "hset hdel",
        "samples": "xgroup|createconsumer",
        "group:*": "hget",
        "runs:*": "hdel hgetall hkeys hset",
        "leases": "hvals",
        "uses:*": "zcard zrange",
    },
    "trainer": {
        "producers": "zadd zrem zscore zrangebyscore",
        "producers:about": "hset hdel",
        "seqs": "hset hdel",
        "leases": "hset hdel hget hvals",
        "closed": "sadd",
        "uses:*": "zcard",
        "consumers": "zcard",
    },
    "viewer": {},
}


def flat(table):
    return {(command, key) for key, commands in table.items() for command in commands.split()}


@pytest.mark.parametrize("role", acl.ROLES)
def test_a_role_has_the_rights_that_its_scripts_use_and_no_others(role):
    table = {call for keys, commands in acl.ROLES[role] for key in keys.split() for call in flat({key: commands})}
    used = {call for name in SCRIPTS[role].split() for call in calls_of(name) if call[1]} | flat(PLAIN[role])
    assert "?" not in {key for _, key in used}
    needed = used - flat(NOT_TAKEN[role])
    assert (needed - table, table - needed) == (set(), set())


def test_every_script_is_some_role_s_or_the_admin_s():
    assert set(script_names()) - {name for names in SCRIPTS.values() for name in names.split()} == {"drop"}
