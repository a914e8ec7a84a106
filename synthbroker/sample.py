"""What a generator may yield in place of plain fields."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """Fields with what travels along.

    Attributes:
        fields: Arrays, tensors or numbers by name, as `Producer.put` takes them.
        recipe: Added to the recipe that `generate` writes; of the same key this one counts.
        metadata: Text that travels along.
    """

    fields: Any
    _: KW_ONLY
    recipe: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] | None = None
