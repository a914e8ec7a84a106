"""How a training went, in words and in a picture."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from brains import CLASSES, VOXEL_MM
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

import synthbroker as sb

COLOURS = ("#23262d", "#56b4e9", "#d9683c", "#f3ead7")  # of CLASSES; told apart with any colour vision
TISSUES: dict[str, Any] = {"cmap": ListedColormap(COLOURS), "vmin": 0, "vmax": len(COLOURS) - 1}
ACCENT, MUTED = "#1f6f9f", "#6b7280"
SHOWN = 6


@dataclass
class History:
    """What happened; seconds count from the first batch asked for.

    Attributes:
        loss: (seconds, loss) of every step.
        dice: (seconds, mean foreground Dice on unseen samples) of every evaluation.
        predicted, scores: Classes (N, D, H, W) and Dice (N,) of the last evaluation.
        fresh, reused: Samples trained on for the first time, and again.
        waited_s: Seconds spent waiting for batches.
    """

    loss: list[tuple[float, float]] = field(default_factory=list)
    dice: list[tuple[float, float]] = field(default_factory=list)
    predicted: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    scores: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    fresh: int = 0
    reused: int = 0
    waited_s: float = 0.0

    @property
    def seconds(self) -> float:
        """When the last step was done."""
        return self.loss[-1][0] if self.loss else 0.0

    @property
    def now(self) -> str:
        """A line about the present."""
        recent = np.mean([value for _, value in self.loss[-25:]])
        return f"step {len(self.loss)}, loss {recent:.2f}, waited {self.waited_s / self.seconds:.0%}"

    def trained(self, seconds: float, loss: float, uses: tuple[int, ...]) -> None:
        """Note a step."""
        self.loss.append((seconds, loss))
        self.reused += sum(times > 1 for times in uses)
        self.fresh += sum(times <= 1 for times in uses)

    def evaluated(self, predicted: torch.Tensor, scores: torch.Tensor) -> str:
        """Note an evaluation; return a line about it."""
        self.predicted, self.scores = predicted.cpu(), scores.cpu()
        self.dice.append((self.seconds, float(scores.mean())))
        bar = "█" * round(40 * self.dice[-1][1])
        return f"{self.seconds:4.0f} s  step {len(self.loss):4d}  Dice on unseen seeds {self.dice[-1][1]:.2f} {bar}"


def summary(history: History, status: sb.RingStatus) -> str:
    """Return the result as a few lines; what was generated and dropped is by the ring's own ledger."""
    used = history.fresh + history.reused
    rows = (
        ("Dice on unseen seeds", f"{history.dice[0][1]:.2f} -> {history.dice[-1][1]:.2f} in {history.seconds:.0f} s"),
        ("samples generated", status.committed),
        ("samples used", f"{used}: {history.fresh} fresh, {history.reused} reused"),
        ("samples dropped", status.groups["train"].lost),
        ("trainer waited", f"{history.waited_s / history.seconds:.1%} of its time"),
    )
    return "\n".join(f"{name:22} {value}" for name, value in rows)


def draw(path: str, history: History, unseen: dict[str, torch.Tensor]) -> Path:
    """Draw unseen samples with what was predicted of them, and both curves; return the file's full path.

    Args:
        path: Where to; the name's ending says in which format.
        history: Of the training.
        unseen: Samples that were evaluated on: `image` (N, 1, D, H, W) and the true `label` (N, D, H, W); their axes
            point right, front and up.
    """
    with mpl.rc_context({"font.size": 10, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14, 11), layout="constrained", facecolor="white")
        scans, curves = figure.subfigures(2, 1, height_ratios=(7, 4))
        _draw_scans(scans, history, unseen["image"].cpu(), unseen["label"].cpu())
        left, right = curves.subplots(1, 2)
        _draw_loss(left, history)
        _draw_dice(right, history)
        figure.savefig(path, dpi=110)
    return Path(path).resolve()


def _draw_scans(figure: SubFigure, history: History, image: torch.Tensor, label: torch.Tensor) -> None:
    title = "A MeshNet learned brain tissue from scans that were made while it trained"
    figure.suptitle(title, fontsize=16, weight="bold")
    count = min(SHOWN, len(image))
    grid = figure.subplots(3, count, squeeze=False)
    for column, axes in enumerate(grid.T):
        truth = label[column]
        level = int((truth > 0).sum(dim=(0, 1)).argmax())  # the horizontal slice that shows most of the brain
        axes[0].set_title(f"unseen scan {column + 1}")
        _show(axes[0], image[column, 0, :, :, level], cmap="gray")
        _show(axes[1], truth[:, :, level], **TISSUES)
        _show(axes[2], history.predicted[column, :, :, level], **TISSUES)
        axes[2].set_xlabel(f"Dice {history.scores[column]:.2f}", color=ACCENT, weight="bold")
    for axes, name in zip(grid[:, 0], ("image\n(never seen)", "true tissue", "prediction"), strict=True):
        axes.set_ylabel(name, fontsize=12)
    _draw_scale(grid[0, 0])
    pairs = zip(COLOURS, CLASSES, strict=True)
    patches = [Patch(facecolor=colour, edgecolor=MUTED, label=name) for colour, name in pairs]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=11)


def _show(axes: Axes, plane: torch.Tensor, **style: Any) -> None:
    axes.imshow(plane.T, origin="lower", interpolation="nearest", **style)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _draw_scale(axes: Axes) -> None:
    length = 50 / VOXEL_MM
    axes.plot((3, 3 + length), (3, 3), color="white", linewidth=2.5)
    frame = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1.5}
    axes.text(3 + length / 2, 5.5, "50 mm", color="white", ha="center", fontsize=9, bbox=frame)


def _draw_loss(axes: Axes, history: History) -> None:
    seconds, loss = np.array(history.loss).T
    window = max(1, min(25, len(loss) // 4))
    smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
    axes.plot(seconds, loss, color=ACCENT, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(seconds[window - 1 :], smooth, color=ACCENT, linewidth=2.2, label=f"mean of {window} steps")
    axes.set(title="Training loss", xlabel="time / s", ylabel="1 - soft Dice", ylim=(0, 1))
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def _draw_dice(axes: Axes, history: History) -> None:
    seconds, dice = np.array(history.dice).T
    axes.plot(seconds, dice, "o-", color=COLOURS[2], linewidth=2.2)
    for x, y in (history.dice[0], history.dice[-1]):
        axes.annotate(f"{y:.2f}", (x, y), (0, 10), textcoords="offset points", ha="center", weight="bold")
    axes.set(title=f"Dice on {len(history.scores)} unseen seeds", xlabel="time / s", ylim=(0, 1))
    axes.set_ylabel("mean of CSF, grey and white matter")
    axes.grid(alpha=0.25)
