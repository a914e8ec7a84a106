"""What is measured and how it is judged: lines of a table, made of the figures of contenders."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from synthbroker.bench.loads import Figures
from synthbroker.bench.place import Place

Pick = tuple[str, str]  # a contender, and one of its figures
Runs = Mapping[str, Sequence[Figures]]


@dataclass(frozen=True)
class Bound:
    """What a line should reach; `most` where less is better."""

    value: float
    most: bool = False

    def holds(self, value: float) -> bool:
        """Whether a figure is good enough."""
        return value <= self.value if self.most else value >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.value:g}"


@dataclass(frozen=True)
class Line:
    """One line of the table: ours, or ours ÷ a baseline, against a bound if there is one.

    Attributes:
        number: Of the measure.
        what: In words, with what it is divided by.
        unit: Of ours and of the baseline.
        ours, baseline: Where the figures come from.
        bound: For the ratio; without a baseline for ours.
    """

    number: int
    what: str
    unit: str
    ours: Pick
    baseline: Pick | None = None
    bound: Bound | None = None


@dataclass(frozen=True)
class Block:
    """Contenders that run in turn, and the lines made of their figures.

    Attributes:
        contenders: By name.
        lines: In the order of the table.
        most_repeats: For what is the same each time, or takes long.
    """

    contenders: Mapping[str, Callable[[Place], Figures]]
    lines: tuple[Line, ...]
    most_repeats: int | None = None


@dataclass(frozen=True)
class Row:
    """A line with its figures, medians over the repeats.

    Attributes:
        number, what, unit: As the line says.
        ours, baseline, ratio: None where they are not to be had.
        bound: In words, None for a line that is only there to compare with, and in a quick run.
        ok: Whether the bound holds; None without one.
        note: Why it could not be measured.
    """

    number: int
    what: str
    unit: str
    ours: float | None = None
    baseline: float | None = None
    ratio: float | None = None
    bound: str | None = None
    ok: bool | None = None
    note: str | None = None


def row_of(line: Line, runs: Runs, failures: Mapping[str, str], *, judge: bool) -> Row:
    """Fill a line in; without `judge` there is no bound: it is for what a full run measures."""
    limit = line.bound if judge else None
    bound = str(limit) if limit else None
    picks = [line.ours, line.baseline] if line.baseline else [line.ours]
    missing = next((failures.get(name, "did not run") for name, _ in picks if not runs.get(name)), None)
    if missing is not None:
        return Row(line.number, line.what, line.unit, bound=bound, note=missing)
    ours, baseline = median(runs, line.ours), median(runs, line.baseline) if line.baseline else None
    ratio = None if baseline is None else ours / baseline if baseline else float("inf")
    judged = ours if ratio is None else ratio
    ok = limit.holds(judged) if limit else None
    return Row(line.number, line.what, line.unit, ours, baseline, ratio, bound, ok)


def median(runs: Runs, pick: Pick) -> float:
    """Take the median of a contender's figure over its repeats."""
    name, figure = pick
    return statistics.median(run[figure] for run in runs[name])


HEAD = f"{'#':>2}  {'what':<72} {'ours':>10} {'baseline':>10} {'unit':<10} {'ratio':>7}  bound"


def text_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Write rows as they come; those in a row that cannot be measured for one reason are one line."""
    for note, group in groupby(rows, key=lambda row: row.note):
        if note is None:
            yield from map(text_of, group)
            continue
        rows_alike = list(group)
        numbers = ", ".join(str(number) for number in dict.fromkeys(row.number for row in rows_alike))
        more = f"{numbers:>2}  {len(rows_alike)} lines cannot run here: {note}"
        yield more if len(rows_alike) > 1 else text_of(rows_alike[0])


def text_of(row: Row) -> str:
    """Write a row as one line of text."""
    start = f"{row.number or '':>2}  {row.what:<72}"
    if row.note is not None:
        return f"{start} cannot run here: {row.note}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    verdict = {True: "ok", False: "below", None: ""}[row.ok]
    figures = f"{_short(row.ours):>10} {_short(row.baseline):>10} {row.unit:<10} {ratio:>7}"
    return f"{start} {figures}  {row.bound or '':<8} {verdict}".rstrip()


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def head_of(about: Mapping[str, Any]) -> str:
    """Write what the figures were measured on."""
    versions = ", ".join(f"{name} {about[name]}" for name in ("python", "torch", "redis_py", "hiredis"))
    return (
        f"{about['cores']} cores of {about['cpu']}, {about['memory']} of memory, {about['system']}\n"
        f"{about['server']} ({about['allocator']}) by {about['reached_by']}; "
        f"synthbroker {about['synthbroker']}, {versions}" + (f"\n{about['note']}" if about["note"] else "")
    )
