"""Pictures of samples: the middle slice of every image and volume, a row for each sample."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from synthbroker.batch import Batch
from synthbroker.errors import MissingExtraError
from synthbroker.schema import Array
from synthbroker.units import format_duration

MOST_LABELS = 64
_MOST_CHANNELS = 4
_INCHES = 2.6


def draw(samples: Sequence[Batch], path: Path) -> None:
    """Draw samples into a file, whose ending says in which format.

    Args:
        samples: As `peek` gives them.
        path: For example `look.png`.

    Raises:
        ValueError: There is nothing that could be drawn: no samples, or no field of two or three dimensions.
        MissingExtraError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    rows = [{name: slice_of(array) for name, array in sample.items()} for sample in samples]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if _any_drawn(rows, name)]
    if not names:
        raise ValueError("there is nothing to draw: no sample has a field of two or three dimensions")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'synthbroker[plot]'") from error
    figure = Figure(figsize=(_INCHES * len(names), (_INCHES + 0.4) * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for i, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        for j, name in enumerate(names):
            picture = row.get(name)
            axes[i, j].set_axis_off()
            if picture is not None:
                axes[i, j].imshow(picture, **_look(picture))
            axes[i, j].set_title(_title(sample, name, first=j == 0), fontsize=7, loc="left")
    figure.savefig(path, dpi=120)


def slice_of(array: Array) -> Array | None:
    """Take the middle slice of an array as a picture: (H, W), or (H, W, 3) in colours; None if it is none.

    A first axis of at most four is taken for channels: three or four of a plane are colours (as are three in its last
    axis), of a volume the first is shown. Complex values are shown by their magnitude.
    """
    if array.ndim < 2 or array.size == 0:
        return None
    while array.ndim > 3:
        array = array[0 if len(array) <= _MOST_CHANNELS else len(array) // 2]
    array = _drawable(array)
    if array.ndim == 2:
        return array
    if array.shape[-1] == 3:
        return _as_colours(array)
    if len(array) in (3, 4):
        return _as_colours(np.moveaxis(array[:3], 0, -1))
    middle: Array = array[len(array) // 2]
    return middle


def _drawable(array: Array) -> Array:
    if array.dtype.kind == "c":
        magnitude: Array = np.abs(array)
        return magnitude
    # float8 and bfloat16 are unknown to matplotlib, float16 overflows in it.
    return array if array.dtype.kind in "biu" else array.astype(np.float32)


def _as_colours(array: Array) -> Array:
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float32))
    low, high = values.min(), values.max()
    colours: Array = (values - low) / max(high - low, np.float32(1e-12))
    return colours


def _any_drawn(rows: Sequence[dict[str, Array | None]], name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def _look(picture: Array) -> dict[str, object]:
    """Choose colours: integers of few values are labels, anything else is grey."""
    if picture.ndim == 3:
        return {}
    if picture.dtype.kind in "biu" and len(np.unique(picture)) <= MOST_LABELS:
        return {"cmap": "nipy_spectral", "interpolation": "nearest", "vmin": 0, "vmax": max(int(picture.max()), 1)}
    return {"cmap": "gray", "interpolation": "nearest"}


def _title(sample: Batch, name: str, *, first: bool) -> str:
    info = sample.info
    if not first:
        return name
    return f"{info.ids[0]}, {format_duration(info.ages_s[0])} old\n{info.producers[0]}\n{name}"
