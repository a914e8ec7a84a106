"""What travels along with the tensors of a sample: metadata, text to text, and the recipe, plain JSON."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack
import numpy as np

from synthbroker.errors import DamagedSampleError

LARGEST_TEXT_BYTES = 16 * 1024


class Texts(NamedTuple):
    """What travels along with the tensors, checked and packed by `pack_texts`."""

    metadata: bytes
    recipe: bytes


def pack_texts(metadata: Mapping[str, str] | None, recipe: Mapping[str, Any] | None) -> Texts:
    """Check and pack what travels along with the tensors.

    Raises:
        TypeError: Metadata that is not text to text; a recipe that JSON does not know.
        ValueError: More than 16 KiB of either.
    """
    if not metadata and not recipe and metadata in (None, {}) and recipe in (None, {}):
        return _NO_TEXTS
    metadata, recipe = {} if metadata is None else metadata, {} if recipe is None else recipe
    if not isinstance(metadata, Mapping) or not isinstance(recipe, Mapping):
        raise TypeError(f"metadata and recipe must be dicts, got {metadata!r:.80} and {recipe!r:.80}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map text to text, got {key!r}: {value!r}")
    try:
        text = json.dumps(dict(recipe), separators=(",", ":"), allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"a recipe must be plain JSON (numbers, text, lists, objects): {error}") from error
    for what, size in ("recipe", len(text)), ("metadata", sum(len(k) + len(v) for k, v in metadata.items())):
        if size > LARGEST_TEXT_BYTES:
            raise ValueError(f"a {what} may have {LARGEST_TEXT_BYTES} characters, this one has {size}")
    return Texts(msgpack.packb(dict(metadata)), msgpack.packb(text))


def _plain(value: object) -> Any:
    """Give a numpy number, as its generators draw them, as JSON knows it."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"it has {value!r:.80}, of type {type(value).__name__}")


_NO_TEXTS = Texts(msgpack.packb({}), msgpack.packb("{}"))
_NONE = b"\xa1m" + _NO_TEXTS.metadata + b"\xa1r" + _NO_TEXTS.recipe


def write_texts(along: Texts) -> bytes:
    """Write the end of a head."""
    return b"".join((b"\xa1m", along.metadata, b"\xa1r", along.recipe))


def read_texts(data: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Read the end of a head: metadata and recipe.

    Raises:
        DamagedSampleError, ValueError, KeyError: It is none.
    """
    if data == _NONE:
        return {}, {}
    content = msgpack.unpackb(b"\x82" + data, max_ext_len=0)  # a map of two
    return read_metadata(content["m"]), recipe_of(content["r"])


def read_recipe(texts: Texts) -> dict[str, Any]:
    """Read the recipe back: it cannot be changed from outside any more."""
    recipe: dict[str, Any] = json.loads(msgpack.unpackb(texts.recipe))
    return recipe


def read_metadata(value: object) -> dict[str, str]:
    """Check the metadata of a head; DamagedSampleError where it is none."""
    if not isinstance(value, dict) or (
        value and not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
    ):
        raise DamagedSampleError("metadata that are not text to text")
    return value


def recipe_of(text: object) -> dict[str, Any]:
    """Read the recipe of a head; DamagedSampleError where it is none, ValueError where it is no JSON."""
    if text == "{}":
        return {}
    recipe = json.loads(text) if isinstance(text, str) else None
    if not isinstance(recipe, dict):
        raise DamagedSampleError("a recipe that is not a JSON object")
    return recipe
