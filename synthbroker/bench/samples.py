"""The samples that the bench sends."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from synthbroker.worker import WorkerInfo

KIB, MIB = 1024, 1024 * 1024


def floats(size_bytes: int) -> dict[str, Any]:
    """Make a sample of float32 noise."""
    return {"x": np.random.default_rng(0).standard_normal(size_bytes // 4, np.float32)}


def volumes(side: int) -> dict[str, Any]:
    """Make two uint8 volumes of noise: an image and its labels."""
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 255, (side,) * 3, np.uint8) for name in ("image", "label")}


def brain(seed: int = 1, side: int = 64) -> dict[str, Any]:
    """Make a sample like the demo's: a smooth anatomy of four tissues, and an image of it with a bias field and noise.

    It packs as the demo's samples do: 1.27 times smaller with lz4, 1.45 with zstd (those: 1.25 to 1.31, 1.40 to 1.46).

    Returns:
        `image`, float32 (1, side, side, side), and `label`, uint8 (side, side, side).
    """
    rng = np.random.default_rng(seed)
    tissues = np.stack([_smooth(rng, side, knots=12) for _ in range(4)])
    tissues[0] += 0.5  # half of it is background
    label = tissues.argmax(0).astype(np.uint8)
    intensities = rng.uniform(0.1, 1.0, 4).astype(np.float32)
    image = intensities[label] * (1 + 0.2 * _smooth(rng, side, knots=4))
    image += rng.normal(0, 0.04, label.shape).astype(np.float32)
    return {"image": image[None].astype(np.float32), "label": label}


def brains(worker: WorkerInfo) -> Iterator[dict[str, Any]]:
    """Yield samples like the demo's for ever: what the bench generates where no generator is named."""
    for seed in itertools.count(worker.seed):
        yield brain(seed)


def _smooth(rng: np.random.Generator, side: int, knots: int) -> Any:
    """Draw a random field and interpolate it linearly between a few knots."""
    where = np.linspace(0, knots - 1, side)[:, None] - np.arange(knots)
    weights = np.clip(1 - np.abs(where), 0, None).astype(np.float32)
    field = rng.standard_normal((knots,) * 3, np.float32)
    return np.einsum("ia,jb,kc,abc->ijk", weights, weights, weights, field, optimize=True)


def size_name(size_bytes: int) -> str:
    """Write a size as the table has it."""
    return f"{size_bytes / MIB:g} MiB" if size_bytes >= MIB else f"{size_bytes // KIB} KiB"
