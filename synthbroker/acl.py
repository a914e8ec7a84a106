"""Users with the least rights that their work takes: a generator, a trainer and a viewer of named rings.

`ROLES` says for each kind of key which commands a role may give, those in our scripts included: scripts run with the
rights of who calls them. From Redis 7.0 on each line is enforced as it stands (ACL selectors). Redis 6.2 knows no
selectors: there a role may give any of its commands on any of its keys. `tests/test_acl_rights.py` compares the table
with what the scripts call.

Nobody here may give EVAL or SCRIPT LOAD: a user runs scripts that the server knows already (EVALSHA), which are ours as
long as nobody else with all rights loads others. So whoever makes a user loads them (`load_scripts`). The same rights
serve for single commands on those keys: who may commit to a ring may also spoil it, other rings are out of reach.
"""

import hashlib
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from synthbroker import endpoint, line
from synthbroker.connection import Connection
from synthbroker.errors import EndpointError, ServerRefusedError
from synthbroker.keys import check_name

_SELECTORS_SINCE = (7, 0)
_SETINFO_SINCE = (7, 2)  # redis-py says its name on each new connection, and does not mind a refusal

_OF_A_NEW_RING = (
    "samples samples:copy index leases seqs room closed producers producers:about consumers consumers:about "
    "uses:* runs:* evicted:* unsettled:* content content:old twins nothing"
)
_TAKING = (
    "exists xack xclaim xdel xgroup|create xgroup|createconsumer xgroup|delconsumer xgroup|setid "
    "xinfo|consumers xinfo|groups xlen xpending xrange xread xrevrange"
)

# Keys, behind `sb:{ring}:` (none: the server itself); commands. A command of several keys needs them all in one line.
ROLES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "generator": (
        ("", "info ping time"),
        ("meta", "evalsha exists hget hgetall hincrby hmget hset"),
        ("part:*", "exists persist pttl set unlink"),
        ("samples", "exists xack xadd xgroup|create xinfo|consumers xinfo|groups xlen xpending xrange xtrim"),
        ("samples:copy", "exists xadd xclaim xgroup|create xgroup|createconsumer"),
        ("samples samples:copy", "rename"),
        ("index", "llen lrange ltrim rpush"),
        ("leases", "hdel hget hgetall hset"),
        ("seqs", "hdel hget hset"),
        ("room", "xadd xread xrevrange"),
        ("closed", "sadd"),
        ("producers", "zadd zcard zrange zrangebyscore zrem zscore"),
        ("producers:about", "hdel hget hset"),
        ("consumers", "zrange zrangebyscore zscore"),
        ("consumers:about", "hget"),
        ("group:*", "hgetall hincrby hset"),
        ("uses:*", "exists zcount zrem"),
        ("runs:*", "exists hget"),
        ("evicted:*", "zadd zremrangebyrank"),
        ("unsettled:*", "exists hset"),
        ("quarantine", "xadd"),
        ("content", "hget hlen hset"),
        ("content:old", "hget"),
        ("content content:old", "rename"),
        ("twins", "hexists hget hgetall hlen hset"),
        # A ring is made on nothing: of a server that lost half of its keys, none is lent to the new one.
        (_OF_A_NEW_RING, "unlink"),
    ),
    "trainer": (
        ("", "info ping time"),
        ("meta", "evalsha hget hgetall hincrby hmget hset"),
        ("samples", _TAKING),
        ("part:*", "get getrange"),
        ("index", "llen lrange"),
        ("leases", "hgetall"),
        ("seqs", "hget"),
        ("room", "xadd"),
        ("producers", "zcard zrange zrevrangebyscore"),
        ("producers:about", "hget"),
        ("consumers", "zadd zrange zrangebyscore zrem zscore"),
        ("consumers:about", "hdel hget hset"),
        ("group:*", "hdel hexists hget hgetall hincrby hmget hset"),
        ("uses:*", "exists zadd zcount zincrby zrange zrem"),
        ("runs:*", "hdel hget hgetall hkeys hset"),
        ("evicted:*", "exists zrangebyscore zrem"),
        ("unsettled:*", "exists hdel hget hgetall hkeys hset"),
        ("rounds:*", "hdel hexists hget hkeys hmget hset"),
        ("quarantine", "xadd"),
        ("twins", "hgetall"),
        ("uses:* runs:* evicted:* unsettled:* rounds:* nothing", "unlink"),
    ),
    "viewer": (
        ("", "info ping scan time"),  # an audit looks for parts that nobody owns: it sees the names of all keys
        ("meta", "evalsha hget hgetall hmget"),
        ("samples", "exists xinfo|consumers xinfo|groups xlen xpending xrange"),
        ("part:*", "get getrange pttl"),
        ("index", "llen lrange"),
        ("leases", "hgetall hvals"),
        ("seqs", "hget"),
        ("producers", "zrange"),
        ("producers:about", "hget"),
        ("consumers", "zscore"),
        ("consumers:about", "hget"),
        ("group:*", "hgetall"),
        ("uses:*", "exists zcard zcount zrange"),
        ("quarantine", "xrange"),
        ("twins", "hgetall"),
    ),
}


@dataclass(frozen=True)
class Grant:
    """What a user is to be.

    Attributes:
        role: A key of `ROLES`.
        rings: Names of the rings it may work on; they need not be there yet.
        path: The endpoint file of its own; None: only to be shown.
    """

    role: str
    rings: tuple[str, ...]
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a role is one of {', '.join(ROLES)}, got {self.role!r}")
        if not self.rings:
            raise ValueError(f"a {self.role} needs a ring to work on")
        for ring in self.rings:
            check_name("ring", ring)

    @property
    def user(self) -> str:
        """The name of the Redis user."""
        return f"{self.role}-{'+'.join(self.rings)}"


def grant(connection: Connection, wanted: Grant, admin: endpoint.Endpoint) -> str:
    """Make the user, or make it anew, and write its endpoint file; its former password is no longer taken.

    Args:
        connection: The way to the server, as somebody who may do all.
        wanted: The user.
        admin: The endpoint of the same server.

    Returns:
        The same as a command of redis-cli, with the password's hash in place of the password.

    Raises:
        ServerRefusedError: The caller may not make users, or load scripts.
        EndpointError: The file cannot be written.
        ValueError: It is the caller's own.
    """
    _keep_own(wanted, admin)
    load_scripts(connection)
    password = secrets.token_urlsafe(24)
    secret = f"#{hashlib.sha256(password.encode()).hexdigest()}"
    command = setuser(wanted, secret, _version(connection))
    connection.call(*command)
    if wanted.path is not None:
        endpoint.write(wanted.path, replace(admin, user=wanted.user, password=password))
    return shell_line(command)


def show(connection: Connection, wanted: Grant) -> str:
    """Write the command of redis-cli that makes the user; nothing is done."""
    return shell_line(setuser(wanted, ">PASSWORD", _version(connection)))


def load_scripts(connection: Connection) -> None:
    """Have the server know all our scripts, for those who may not load any."""
    for name in line.script_names():
        connection.call("SCRIPT", "LOAD", line.script_text(name)[0])


def setuser(wanted: Grant, secret: str, version: tuple[int, int]) -> list[str]:
    """Word the command that makes a user.

    Args:
        wanted: The user.
        secret: `>password`, or `#` and the SHA-256 of the password.
        version: The server's.
    """
    return ["ACL", "SETUSER", wanted.user, "reset", "resetchannels", "on", secret, *_rules(wanted, version)]


def shell_line(command: Sequence[str]) -> str:
    """Write a command as a shell takes it."""
    return f"redis-cli {shlex.join(command)}"


def _keep_own(wanted: Grant, admin: endpoint.Endpoint) -> None:
    """Do not write over the only place where the caller's password is."""
    if wanted.path is None:
        return
    with suppress(EndpointError):
        there = endpoint.read(wanted.path)
        if (there.user, there.identity) == (admin.user, admin.identity):
            raise ValueError(f"{wanted.path} is the endpoint file of {admin.user}: give {wanted.user} another one")


def _rules(wanted: Grant, version: tuple[int, int]) -> Iterator[str]:
    """Word the rights: line by line where the server can, else all commands on all keys of the role."""
    seen = set[str]()
    if version >= _SETINFO_SINCE:
        yield "+client|setinfo"
    for keys, commands in ROLES[wanted.role]:
        named = [f"~sb:{{{ring}}}:{key}" for ring in wanted.rings for key in keys.split()]
        words = [f"+{command}" for command in commands.split()]
        if keys and version >= _SELECTORS_SINCE:
            yield f"({' '.join([*words, *named])})"
        else:
            new = [word for word in (*words, *named) if word not in seen]
            seen.update(new)
            yield from new


def _version(connection: Connection) -> tuple[int, int]:
    text = connection.call("INFO", "server")
    found = re.search(rb"redis_version:(\d+)\.(\d+)", text)
    if found is None:
        raise ServerRefusedError(f"{connection.where} does not say which version it is: users cannot be made for it")
    return int(found[1]), int(found[2])
