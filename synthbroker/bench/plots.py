"""Pictures of what was measured."""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from synthbroker.bench import throughput, workers
from synthbroker.bench.run import Outcome
from synthbroker.bench.samples import size_name
from synthbroker.bench.table import Block, Runs
from synthbroker.errors import MissingExtraError

_DPI = 120
_STYLES = dict(zip(throughput.CONTENDERS, ("o-", "s--", "^:", "D--", "v--"), strict=True))


def blocks(*, quick: bool) -> tuple[Block, ...]:
    """Say what must have been measured."""
    sizes = throughput.QUICK_SIZES if quick else throughput.SIZES
    return (*(throughput.block(size, beside=True) for size in sizes), workers.block(quick=quick))


def check() -> None:
    """See that pictures can be drawn, before hours are spent.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401 - it is there
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'synthbroker[plot]'") from error


def draw(outcome: Outcome, about: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw all pictures into a folder; gives their paths."""
    paths = []
    for name, figure in _figures(outcome, f"{about['cores']} cores of {about['cpu']}, {about['server']}"):
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / name, dpi=_DPI)
        paths.append(folder / name)
    return paths


def _figures(outcome: Outcome, machine: str) -> Iterator[tuple[str, Any]]:
    yield "throughput.png", _throughput(outcome.runs, machine)
    yield "num_workers.png", _workers(outcome.runs, machine)


def _throughput(runs: Runs, machine: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for contender, style in _STYLES.items():
        points = {
            size: statistics.median(run["samples_per_s"] for run in runs[f"{contender} {size_name(size)}"]) * size / 1e6
            for size in sorted(throughput.SIZES)
            if runs.get(f"{contender} {size_name(size)}")
        }
        axes.plot(list(points), list(points.values()), style, label=contender)
    axes.set(xscale="log", yscale="log", xlabel="size of a sample", ylabel="throughput (MB/s)")
    axes.set_xticks(sorted(throughput.SIZES), [size_name(size) for size in sorted(throughput.SIZES)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    axes.set_title(f"one producer, one trainer, raw: from put to a decoded batch\n{machine}", fontsize=10)
    return figure


def _workers(runs: Runs, machine: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    counts = [int(run["batches"]) for several in runs.values() for run in several if "batches" in run]
    both = figure.subplots(1, 2)
    for axes, transform in zip(both, workers.TRANSFORMS, strict=True):
        for source, style in zip(workers.SOURCES, ("o-", "s--"), strict=True):
            there = [n for n in workers.WORKERS if runs.get(workers.name_of(source, transform, n))]
            times = [[run["seconds"] for run in runs[workers.name_of(source, transform, n)]] for n in there]
            axes.errorbar(
                there,
                [statistics.mean(one) for one in times],
                [statistics.stdev(one) if len(one) > 1 else 0.0 for one in times],
                fmt=style,
                capsize=4,
                label=source,
            )
        axes.set(
            xlabel="num_workers",
            ylabel=f"time for {max(counts, default=workers.BATCHES)} batches (s)",
            xticks=workers.WORKERS,
            xlim=(-0.3, 4.3),
        )
        axes.set_ylim(bottom=0)
        axes.set_title(f"{transform} transform", fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(
        f"batches of {workers.BATCH_SIZE} samples of 1 MiB, mean and deviation of the repeats\n{machine}", fontsize=10
    )
    return figure
