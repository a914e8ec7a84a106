"""What users with few rights may not do on a server, on each version of it."""

import pytest
import redis

from synthbroker import acl, admin, monitor
from synthbroker.acl import Grant
from synthbroker.connection import Connection
from synthbroker.errors import ServerRefusedError
from tools import IN_PARTS
from users import admin_of, balanced, client, make, read

SERVER_WIDE = (
    "CONFIG GET requirepass", "CONFIG SET maxmemory 0", "KEYS *", "FLUSHALL", "FLUSHDB", "DBSIZE", "MONITOR",
    "SHUTDOWN",
    "ACL LIST", "ACL SETUSER default nopass", "ACL WHOAMI", "CLIENT LIST", "CLIENT KILL TYPE normal", "DEBUG SLEEP 0",
    "REPLICAOF h 1", "SAVE", "BGREWRITEAOF", "SCRIPT FLUSH", "SCRIPT LOAD x", "SCRIPT KILL", "EVAL return(1) 0",
    "EVAL while(true)do(1)end 0", "PUBLISH c m", "SUBSCRIBE c", "RANDOMKEY", "SWAPDB 0 1", "SLOWLOG GET", "MODULE LIST",
    "MIGRATE h 1 sb:{r}:meta 0 1", "SORT sb:{r}:index", "OBJECT ENCODING sb:{r}:meta", "DUMP sb:{r}:meta",
    "DEL sb:{r}:meta", "EXPIRE sb:{r}:meta 1", "SELECT 1",
)  # fmt: skip
OTHER_KEYS = (
    "HGETALL {}meta", "HSET {}meta ended 1", "XADD {}samples 1-0 a b", "XRANGE {}samples - +",
    "XREAD STREAMS {}samples 0",
    "GET {}part:u:0", "SET {}part:u:0 x", "UNLINK {}nothing", "EXISTS {}meta", "XACK {}samples g 1-0",
    "XPENDING {}samples g", "XINFO GROUPS {}samples", "HGET {}seqs p", "ZRANGE {}consumers 0 -1", "XADD {}room * a b",
)  # fmt: skip
OTHER_ROLES = {
    "generator": (
        "GET {}part:u:0", "GETRANGE {}part:u:0 0 1", "XCLAIM {}samples g c 0 1-0",
        "XREADGROUP GROUP g c STREAMS {}samples >",
        "XGROUP SETID {}samples g 1-0", "XGROUP DESTROY {}samples g", "XDEL {}samples 1-0", "ZADD {}consumers 1 c",
        "HSET {}rounds:g epoch x", "UNLINK {}meta", "UNLINK {}quarantine",
        "XADD {}index * a b", "RENAME {}meta {}nothing",
    ),
    "trainer": (
        "SET {}part:u:0 x", "UNLINK {}part:u:0", "PERSIST {}part:u:0", "XADD {}samples 99-0 a b",
        "XTRIM {}samples MAXLEN 0",
        "RPUSH {}index x", "LTRIM {}index 1 0", "HSET {}seqs p x", "HSET {}leases p x", "ZADD {}producers 1 p",
        "UNLINK {}samples", "UNLINK {}meta", "XGROUP DESTROY {}samples g", "RENAME {}samples {}copy",
    ),
    "viewer": (
        "HSET {}meta ended 1", "XADD {}samples 99-0 a b", "XACK {}samples g 1-0", "UNLINK {}part:u:0",
        "SET {}part:u:0 x", "XCLAIM {}samples g c 0 1-0", "XGROUP CREATE {}samples h 0",
        "ZADD {}consumers 1 c", "UNLINK {}nothing",
    ),
}  # fmt: skip
# Redis 6.2 takes each of a role's commands on each of its keys.
ONLY_BY_KEY = {
    "generator": ("XCLAIM", "UNLINK", "XADD", "ZADD", "RENAME", "HSET"),
    "trainer": ("UNLINK", "XADD", "HSET", "ZADD"),
    "viewer": (),
}


def is_refused(connection, words):
    try:
        connection.execute_command(*words.split())
    except redis.exceptions.NoPermissionError:
        return True
    except redis.RedisError as error:
        return "not allowed" in str(error)  # DEBUG, whoever asks
    return False


@pytest.mark.parametrize("role", acl.ROLES)
def test_a_user_is_refused_all_that_is_not_its_work(users, role):
    make(users, groups=("g",))
    other = "sb:{other}:"
    users.server.client().hset(f"{other}meta", "epoch", "x")
    before = users.server.client().keys("*")
    connection = client(getattr(users, role))
    asked = [*SERVER_WIDE, *[words.replace("{}", key) for key in (other, "", "sb:") for words in OTHER_KEYS]]
    own = [
        words
        for words in OTHER_ROLES[role]
        if users.server.version >= (7,) or words.split()[0] not in ONLY_BY_KEY[role]
    ]
    asked += [words.replace("{}", "sb:{r}:") for words in own]
    allowed = [words for words in asked if not is_refused(connection, words)]
    connection.close()
    assert allowed == []
    assert sorted(users.server.client().keys("*")) == sorted(before)


def test_a_viewer_runs_no_step_of_others_and_a_trainer_commits_nothing(users):
    make(users, groups=("g",))
    before = users.server.client().hgetall("sb:{r}:meta")
    with pytest.raises(ServerRefusedError, match="may not"):
        admin.end("r", url=users.viewer)
    for url in (users.viewer, users.trainer):
        with pytest.raises(ServerRefusedError, match="may not"):
            make(users._replace(generator=url))
    with pytest.raises(ServerRefusedError, match="may not"):
        read(users._replace(trainer=users.viewer))
    after = users.server.client().hgetall("sb:{r}:meta")
    assert {name: after[name] for name in (b"next", b"ended", b"first")} == {
        name: before[name] for name in (b"next", b"ended", b"first")
    }


def test_a_generator_takes_no_samples(users):
    make(users, groups=("g",))
    with pytest.raises(ServerRefusedError, match="may not"):
        read(users._replace(trainer=users.generator))


def test_a_ring_is_the_boundary_who_commits_to_it_can_spoil_it_and_an_audit_shows_that(users):
    make(users, groups=("g",))
    connection = client(users.generator)
    connection.hincrby("sb:{r}:meta", "bytes", 1000)
    connection.close()
    assert not balanced(users)[0]


def test_a_viewer_sees_the_names_of_all_keys_and_what_is_in_its_own(users):
    make(users, size=IN_PARTS)
    users.server.client().set("sb:{other}:part:u:0", "secret")
    connection = client(users.viewer)
    assert b"sb:{other}:part:u:0" in connection.scan(count=1000)[1]
    with pytest.raises(redis.exceptions.NoPermissionError):
        connection.get("sb:{other}:part:u:0")
    assert len(connection.get(next(key for key in connection.scan(count=1000)[1] if b"{r}:part" in key))) > IN_PARTS
    connection.close()


@pytest.mark.parametrize("role", acl.ROLES)
def test_other_rings_are_refused_with_one_clear_error(users, role):
    with pytest.raises(ServerRefusedError, match="this user may not do that") as caught:
        monitor.status("other", url=getattr(users, role))
    assert "of-the-admin" not in str(caught.value)


def test_scripts_that_the_server_was_not_given_are_not_run(users):
    foreign = "return redis.call('hset', KEYS[1], 'ended', '1')"
    for role in acl.ROLES:
        connection = client(getattr(users, role))
        with pytest.raises(redis.exceptions.NoPermissionError):
            connection.eval(foreign, 1, "sb:{r}:meta")
        with pytest.raises(redis.exceptions.NoPermissionError):
            connection.script_load(foreign)
        with pytest.raises(redis.exceptions.NoScriptError):
            connection.evalsha("0" * 40, 1, "sb:{r}:meta")
        connection.close()


def test_a_server_that_forgot_the_scripts_says_what_to_do_and_they_can_be_loaded_again(users, tmp_path):
    make(users)
    users.server.client().script_flush()
    try:
        with pytest.raises(ServerRefusedError, match="synthbroker acl"):
            monitor.status("r", url=users.viewer)
    finally:
        connection = Connection(users.admin)
        acl.grant(connection, Grant("viewer", ("x",), tmp_path / "x.json"), admin_of(users.server))
        connection.close()
    assert monitor.status("r", url=users.viewer).committed == 6
