"""Pictures of what was measured."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthbroker.bench import outputs, throughput, workers
from synthbroker.bench.run import Outcome
from synthbroker.bench.samples import size_name
from synthbroker.bench.table import Block, Runs
from synthbroker.errors import MissingExtraError

_DPI = 120
_STYLES = dict(zip(throughput.CONTENDERS, ("o-", "s--", "^:", "D--", "v--"), strict=True))


THROUGHPUT, WORKERS = "throughput.png", "num_workers.png"


def wanted(only: Sequence[int]) -> tuple[str, ...]:
    """Name the pictures of these measures; all if there are none.

    Raises:
        ValueError: There is no picture of any of them.
    """
    if not only:
        return THROUGHPUT, WORKERS
    if any(_numbers(size) & set(only) for size in throughput.SIZES):
        return (THROUGHPUT,)
    raise ValueError(
        f"--plot has no picture of --only {','.join(map(str, only))}: {THROUGHPUT} is of measures 1 to 4, {WORKERS} is "
        "drawn when all is measured; leave one of the two options out"
    )


def _numbers(size_bytes: int) -> set[int]:
    return {number for number, *_ in throughput.SIZES[size_bytes]}


def blocks(only: Sequence[int], *, quick: bool) -> tuple[Block, ...]:
    """Say what must have been measured for the pictures of these measures."""
    sizes = throughput.QUICK_SIZES if quick else throughput.SIZES
    asked = [size for size in sizes if not only or _numbers(size) & set(only)]
    with_workers = (workers.block(quick=quick),) if WORKERS in wanted(only) else ()
    return (*(throughput.block(size, beside=True) for size in asked), *with_workers)


def check(folder: Path, only: Sequence[int]) -> None:
    """See that pictures can be drawn, before hours are spent.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: There is no picture of these measures, or it cannot be written there.
    """
    outputs.check_folder("--plot", folder, wanted(only))
    try:
        import matplotlib.figure  # noqa: F401 - it is there
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'synthbroker[plot]'") from error


def draw(outcome: Outcome, about: Mapping[str, Any], folder: Path, only: Sequence[int]) -> list[Path]:
    """Draw the pictures of these measures into a folder that is there; gives their paths."""
    machine = f"{about['cores']} cores of {about['cpu']}, {about['server']}"
    if about["note"]:
        machine += f"\n{about['note']}"
    paths = [folder / name for name in wanted(only)]
    for path in paths:
        _FIGURES[path.name](outcome.runs, machine).savefig(path, dpi=_DPI)
    return paths


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
        f"batches of {workers.BATCH_SIZE} samples of {size_name(workers.SAMPLE_BYTES)}, "
        f"mean and deviation of the repeats\n{machine}",
        fontsize=10,
    )
    return figure


_FIGURES = {THROUGHPUT: _throughput, WORKERS: _workers}
