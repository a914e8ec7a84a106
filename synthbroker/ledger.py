"""The equations that a ring's books must satisfy, as values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Equation:
    """One line of the ledger.

    Attributes:
        law: What must be equal.
        left, right: What the two sides are.
        difference: left - right; 0, or nobody knows where so many are.
        terms: What the right side is the sum of, in the law's order.
    """

    law: str
    left: int
    right: int
    difference: int
    terms: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """All equations of a ring; `balanced` where every one holds."""

    equations: tuple[Equation, ...]
    balanced: bool


def equation(law: str, left: int, *terms: int) -> Equation:
    """Write one line: what is on the left, and what is added up on the right."""
    right = sum(terms)
    return Equation(law, left, right, left - right, terms)
