"""What a person does to a ring from outside: end it, drop it or one of its groups."""

from collections.abc import Iterator
from contextlib import contextmanager

from synthbroker import monitor
from synthbroker.connection import Connection
from synthbroker.errors import RingMissingError
from synthbroker.keys import check_name
from synthbroker.ring import Ring


def end(ring: str, *, url: str | None = None) -> None:
    """End a ring: it takes no more samples, and its readers stop when they have had everything. Twice is fine.

    Raises:
        RingMissingError: There is no such ring.
    """
    with _ring(ring, url) as there:
        there.end()


def drop(ring: str, *, group: str | None = None, url: str | None = None) -> None:
    """Remove a ring with all its samples, or one of its groups.

    Raises:
        RingMissingError: There is no such ring, or no such group; names those that are there.
    """
    if group is not None:
        check_name("group", group)
    with _ring(ring, url) as there:
        if group is not None:
            names = monitor.status_of(there).groups
            if group not in names:
                there_are = f"its groups are {', '.join(sorted(names))}" if names else "it has no groups at all"
                raise RingMissingError(f"ring {ring!r} has no group {group!r}: {there_are}")
        there.drop(group or "")


@contextmanager
def _ring(name: str, url: str | None) -> Iterator[Ring]:
    connection = Connection(url)
    try:
        ring = Ring(connection, name)
        ring.read_meta()
        yield ring
    finally:
        connection.close()
