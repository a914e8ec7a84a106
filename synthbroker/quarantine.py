"""The bad samples of a ring: where they came from, what was wrong with them, and how to make them again."""

import json
from dataclasses import dataclass
from typing import Any

from synthbroker import books
from synthbroker.connection import Connection
from synthbroker.replies import Reply
from synthbroker.ring import Ring

LONGEST_TEXT = 500


@dataclass(frozen=True)
class BadSample:
    """One sample that could not be used.

    Attributes:
        noted_s: When it was noted, by the server's clock, seconds since 1970.
        number: Its number in the ring, like "17", or an id that is not ours, like "1700000000000-0"; None where it
            never came in.
        producer: Who made it; None where nobody knows.
        reason: What is wrong with it.
        recipe: What makes it again; empty where nothing was said, or it cannot be read.
    """

    noted_s: float
    number: str | None
    producer: str | None
    reason: str
    recipe: dict[str, Any]


def quarantine(ring: str, *, url: str | None = None, clear: bool = False) -> list[BadSample]:
    """List the bad samples of a ring, the oldest first: the last 1000 of them.

    Args:
        ring: Its name.
        url: The server, None for what the environment says.
        clear: Forget those that are listed; the ring goes on counting where it was.

    Raises:
        RingMissingError: There is no such ring.
        ServerError: The server is gone or refuses.
    """
    connection = Connection(url)
    try:
        there = Ring(connection, ring)
        there.read_meta()
        notes = books.read_quarantine(there)
        if clear and notes:
            books.clear_quarantine(there, notes[-1][0])
        return [_read(note) for note in notes]
    finally:
        connection.close()


def _read(note: Reply) -> BadSample:
    entry_id, flat = note
    texts = [_printable(item) for item in flat]
    fields = dict(zip(texts[::2], texts[1::2], strict=True))
    return BadSample(
        noted_s=int(entry_id.partition(b"-")[0]) / 1000,
        number=fields.get("id") or None,
        producer=fields.get("producer") or None,
        reason=fields.get("reason", "")[:LONGEST_TEXT],
        recipe=_recipe(
            next((value for name, value in zip(flat[::2], flat[1::2], strict=True) if name == b"recipe"), b"")
        ),
    )


def _printable(text: bytes) -> str:
    """See a text that somebody else may have written: no control character reaches a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.decode(errors="replace"))


def _recipe(text: bytes) -> dict[str, Any]:
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}
