"""Runs blocks: the contenders of each in turn, again and again, so that what else the machine does hits all alike."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from synthbroker.bench.loads import Figures
from synthbroker.bench.place import Place
from synthbroker.bench.table import Block, Row, row_of
from synthbroker.errors import SynthbrokerError

log = logging.getLogger("synthbroker")
_progress = logging.getLogger("synthbroker.bench")
TELL_EVERY_S = 30.0  # how far it is, where no row comes


@dataclass
class Outcome:
    """All that was measured.

    Attributes:
        rows: The table.
        runs: Every single figure, by contender.
        failures: Why a contender could not run.
    """

    rows: list[Row] = field(default_factory=list)
    runs: dict[str, list[Figures]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Give it as plain JSON."""
        return {"rows": [asdict(row) for row in self.rows], "runs": self.runs, "failures": self.failures}


def run(
    blocks: Iterable[Block], place: Place, outcome: Outcome, *, repeats: int, only: Sequence[int] = ()
) -> Iterator[Row]:
    """Run blocks and give each row as soon as it is there; all of it goes into `outcome`.

    Args:
        blocks: What to measure.
        place: Where.
        outcome: What has been measured; a contender that is in it is not run again.
        repeats: How often.
        only: Numbers of measures; all if there are none.
    """
    for block in blocks:
        lines = [line for line in block.lines if not only or line.number in only]
        names = {pick[0] for line in lines for pick in (line.ours, line.baseline) if pick} - set(outcome.runs)
        numbers = ", ".join(str(number) for number in dict.fromkeys(line.number for line in lines))
        _repeat(block, names, place, outcome, min(repeats, block.most_repeats or repeats), f"measure {numbers}")
        for line in lines:
            outcome.rows.append(row_of(line, outcome.runs, outcome.failures, judge=not place.quick))
            yield outcome.rows[-1]


def complete(blocks: Iterable[Block], place: Place, outcome: Outcome, *, repeats: int) -> None:
    """Run what has not run yet and no row is made of: pictures need it."""
    for block in blocks:
        _repeat(block, set(block.contenders) - set(outcome.runs), place, outcome, repeats, "pictures")


def _repeat(block: Block, names: set[str], place: Place, outcome: Outcome, repeats: int, what: str) -> None:
    """Run contenders in turn, and log now and then how far that is."""
    runs = [name for _ in range(repeats) for name in block.contenders if name in names]
    told_at = time.monotonic()
    for done, name in enumerate(runs, 1):
        if name not in outcome.failures:
            _run_one(name, block.contenders[name], place, outcome)
        if time.monotonic() - told_at >= TELL_EVERY_S:
            told_at = time.monotonic()
            _progress.info("%s: %d of %d runs done", what, done, len(runs))


def _run_one(name: str, contender: Callable[[Place], Figures], place: Place, outcome: Outcome) -> None:
    try:
        outcome.runs.setdefault(name, []).append(contender(place))
    except (SynthbrokerError, OSError) as error:
        outcome.failures[name] = str(error)
        outcome.runs.pop(name, None)
        log.debug("%s could not run", name, exc_info=True)
