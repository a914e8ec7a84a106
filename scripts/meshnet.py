"""A small MeshNet, its loss, and the Dice score.

MeshNet (Fedorov et al., IJCNN 2017) is a chain of dilated 3-D convolutions: a wide view of the volume, few weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

DILATIONS = (1, 2, 4, 8, 1)


def layer(inputs: int, outputs: int, dilation: int) -> nn.Sequential:
    """Return one convolution of 3x3x3 that keeps the volume's size, with norm and ReLU."""
    convolution = nn.Conv3d(inputs, outputs, kernel_size=3, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.InstanceNorm3d(outputs, affine=True), nn.ReLU(inplace=True))


class MeshNet(nn.Sequential):
    """Images (N, 1, D, H, W) to class scores (N, classes, D, H, W)."""

    def __init__(self, classes: int, channels: int = 8) -> None:
        inputs = [1] + [channels] * (len(DILATIONS) - 1)
        layers = [layer(number, channels, dilation) for number, dilation in zip(inputs, DILATIONS, strict=True)]
        super().__init__(*layers, nn.Conv3d(channels, classes, kernel_size=1))
        self.to(memory_format=torch.channels_last_3d)  # a fifth less time on a CPU


def soft_dice_loss(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return 1 - the Dice score of probabilities, averaged over classes (Milletari et al., 3DV 2016).

    Args:
        scores: float (N, classes, D, H, W).
        label: integers (N, D, H, W).
    """
    truth = functional.one_hot(label.long(), scores.shape[1]).movedim(-1, 1)
    chance = scores.softmax(dim=1)
    volume = (0, 2, 3, 4)
    overlap = 2 * (chance * truth).sum(volume) / (chance.sum(volume) + truth.sum(volume)).clamp(min=1)
    return 1 - overlap.mean()


def foreground_dice(predicted: torch.Tensor, label: torch.Tensor, classes: int) -> torch.Tensor:
    """Return 2 |A and B| / (|A| + |B|) of each sample, (N,), averaged over all classes but the background.

    A class that neither volume of a sample has is left out of its average.
    """
    scores = []
    for tissue in range(1, classes):
        truth, guess = (label == tissue).flatten(1), (predicted == tissue).flatten(1)
        scores.append(2 * (truth & guess).sum(1) / (truth.sum(1) + guess.sum(1)))
    return torch.stack(scores).nanmean(0)
