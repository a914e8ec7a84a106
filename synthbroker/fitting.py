"""Tables on terminals that are too narrow for them: whole columns are left out and named, rather than words broken."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

# What is left out first; a column in which something is amiss stays.
_SPARE = ("job", "pid", "host", "ever", "wasted", "skipped", "doubled", "evicted pending", "redelivered", "reused",
          "per s", "codec", "reuse", "seen")  # fmt: skip
_ALARMS = {"wasted", "doubled", "evicted pending"}
_QUIET = {"-", "0", "0%", "0 B"}
_WIDE = 1000


class Fitted:
    """A table that is as wide as it must be, or else as there is room for."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept, out = list(self.table.columns), []
        for column in _spare(kept):
            if _width(self._of(kept), console, options) <= options.max_width:
                break
            kept.remove(column)
            out.append(str(column.header))
        yield self._of(kept)
        if out:
            wide = _width(self.table, console, options)
            yield Text(f"left out: {', '.join(out)}; {wide} characters in a line show all", "dim")

    def _of(self, columns: Sequence[Column]) -> Table:
        table = Table(box=None, padding=self.table.padding, header_style=self.table.header_style)
        for column in columns:
            table.add_column(column.header, justify=column.justify, overflow=column.overflow)
        for row in zip(*[column.cells for column in columns], strict=True):
            table.add_row(*row)
        return table


def _spare(columns: Sequence[Column]) -> list[Column]:
    """List what may be left out: first what says nothing."""
    by_name: dict[Any, Column] = {column.header: column for column in columns}
    spare = [by_name[name] for name in _SPARE if name in by_name]
    quiet = [column for column in spare if all(str(cell) in _QUIET for cell in column.cells)]
    return quiet + [column for column in spare if column not in quiet and column.header not in _ALARMS]


def _width(table: Table, console: Console, options: ConsoleOptions) -> int:
    return Measurement.get(console, options.update(max_width=_WIDE), table).maximum
