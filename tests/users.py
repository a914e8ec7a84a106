"""Users with few rights on a server of their own, one for each role, and what they do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

import synthbroker as sb
from servers import RealServer, binaries
from synthbroker import acl, endpoint
from synthbroker.account import ProducerStats
from synthbroker.acl import Grant
from synthbroker.audit import audit
from synthbroker.connection import Connection
from synthbroker.endpoint import Endpoint
from tools import SOON_S, number, values


class Users(NamedTuple):
    """A server, and the URLs of those who come to it."""

    server: RealServer
    admin: str
    generator: str
    trainer: str
    viewer: str


def granted(label: str, folder: Path) -> Iterator[Users]:
    """Start a server where each role has a user for the rings r and s; the endpoint files are in a folder."""
    binary = binaries()[label]
    if binary.path is None:
        pytest.skip(binary.missing)
    server = RealServer(binary, requirepass="of-the-admin", syslog_ident="i")
    of_admin = admin_of(server)
    endpoint.write(folder / "admin.json", of_admin)
    connection = Connection(server.url)
    for role in acl.ROLES:
        acl.grant(connection, Grant(role, ("r", "s"), folder / f"{role}.json"), of_admin)
    connection.close()
    yield Users(server, *[(folder / f"{who}.json").as_uri() for who in ("admin", *acl.ROLES)])
    server.stop()


def admin_of(server: RealServer) -> Endpoint:
    return Endpoint(None, None, str(server.socket_path), False, "default", "of-the-admin", "i", 1, "h", None, "now")


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(endpoint.resolve(url), protocol=2)


def make(users: Users, ring: str = "r", count: int = 6, size: int = 4, **options: Any) -> ProducerStats:
    """Put samples as the generator."""
    defaults: dict[str, Any] = {"capacity": "50MB", "codec": "raw", "wait_s": SOON_S}
    with sb.Producer(users.generator, ring=ring, **defaults | options) as out:
        for i in range(count):
            out.put(number(i, size), recipe={"n": i})
    return out.stats


def consumer(users: Users, ring: str = "r", group: str = "g", **options: Any) -> sb.Consumer:
    """Read as the trainer."""
    defaults: dict[str, Any] = {"batch_size": 2, "wait_s": SOON_S}
    return sb.Consumer(users.trainer, ring=ring, group=group, **defaults | options)


def read(users: Users, **options: Any) -> list[int]:
    """Read to the end as the trainer."""
    with consumer(users, **options) as batches:
        return [n for batch in batches for n in values(batch)]


def balanced(users: Users, ring: str = "r") -> tuple[bool, tuple[str, ...]]:
    """Count a ring through as the viewer."""
    found = audit(ring, url=users.viewer)
    return found.balanced, found.details
