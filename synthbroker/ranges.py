"""Numbers of samples as ranges, and as text like 1-40,43: short where they follow each other."""

from collections.abc import Iterable, Iterator

Range = tuple[int, int]  # first and last

_LONGEST_TEXT = 300


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Sort ranges and join those that touch."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def of(numbers: Iterable[int]) -> list[Range]:
    """Give the ranges of some numbers, in any order."""
    return merge((number, number) for number in numbers)


def count(ranges: Iterable[Range]) -> int:
    """Count the numbers in ranges that do not overlap."""
    return sum(last - first + 1 for first, last in ranges)


def below(ranges: Iterable[Range], bound: int) -> list[Range]:
    """Give what of them lies below a number."""
    return [(first, min(last, bound - 1)) for first, last in ranges if first < bound]


def numbers(ranges: Iterable[Range]) -> Iterator[int]:
    """Give the numbers in ranges one by one."""
    for first, last in ranges:
        yield from range(first, last + 1)


def text(ranges: Iterable[Range]) -> str:
    """Write ranges as the scripts read them."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def parse(written: str) -> Iterator[Range]:
    """Read what `text` or a script has written; a piece that was cut off at the end is left out."""
    for piece in filter(None, written.split(",")):
        first, _, last = piece.partition("-")
        if first.isdigit() and (last.isdigit() or "-" not in piece):
            yield int(first), int(last or first)


def shown(ranges: Iterable[Range]) -> str:
    """Write ranges for a person: how many numbers, and which, as far as that is readable."""
    known = merge(ranges)
    which = text(known).replace(",", ", ")
    if len(which) > _LONGEST_TEXT:
        which = which[:_LONGEST_TEXT].rpartition(",")[0] + ", …"
    return f"{count(known)} ({which})"


class Numbers:
    """Numbers that come mostly in order, kept as ranges."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []
        self._merge_at = 1000

    def add(self, numbers: Iterable[int]) -> None:
        """Add some."""
        for number in numbers:
            if self._ranges and number == self._ranges[-1][1] + 1:
                self._ranges[-1] = (self._ranges[-1][0], number)
            else:
                self._ranges.append((number, number))
        if len(self._ranges) > self._merge_at:
            self._ranges = merge(self._ranges)
            self._merge_at = 2 * len(self._ranges) + 1000

    def extend(self, ranges: Iterable[Range]) -> None:
        """Add all numbers in ranges."""
        self._ranges = merge([*self._ranges, *ranges])

    def ranges(self) -> list[Range]:
        """Give them, merged."""
        return merge(self._ranges)
