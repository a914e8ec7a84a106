"""Brain scans that no scanner ever took, from real anatomy: a generator, to be copied and changed.

    synthbroker generate brains:brains --ring brains [--workers 4] [--device cuda]

The anatomy is the MNI152 tissue maps that come with nilearn. cornucopia bends it and paints each tissue with a
contrast, a bias field and noise drawn at random, as SynthSeg does (Billot et al., Medical Image Analysis 86, 2023).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from cornucopia import SynthFromLabelTransform
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template

import synthbroker as sb

CLASSES = ("background", "CSF", "grey matter", "white matter")
VOXEL_MM = 2
PATCH = 64  # voxels along each side
SEEDS_FOR_VALIDATION = 2**32  # the generator draws its seeds from above, so that those below stay unseen


def anatomy() -> torch.Tensor:
    """Return the tissue of every second voxel of the MNI152 brain: integers (1, 99, 117, 95), places in CLASSES."""
    loaders = (load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template)
    brain, grey, white = (load(resolution=1).get_fdata()[::VOXEL_MM, ::VOXEL_MM, ::VOXEL_MM] for load in loaders)
    fluid = brain - grey - white
    tissue = 1 + np.stack([fluid, grey, white]).argmax(axis=0)
    return torch.from_numpy(np.where(brain > 0, tissue, 0))[None]


class BrainMaker:
    """Makes samples out of seeds; the same seed gives the same sample on the same kind of device."""

    def __init__(self, device: str | None = None) -> None:
        self.tissue = anatomy().to(device or "cpu")
        # Without low resolution and motion, so that a person can judge the pictures.
        self.synthesise = SynthFromLabelTransform(patch=PATCH, order=3, resolution=False, motion_fwhm=False)

    def __call__(self, seed: int) -> dict[str, Any]:
        """Return `image`, float32 (1, 64, 64, 64), about 0 to 1, and `label`, uint8 (64, 64, 64)."""
        random.seed(seed)
        torch.manual_seed(seed)  # of all devices
        made = self.synthesise(self.tissue)
        return {"image": made["image"].float(), "label": made["label"][0].to(torch.uint8)}


def brains(worker: sb.WorkerInfo) -> Iterator[sb.Sample]:
    """Yield samples for ever, each with the seed that makes it again."""
    torch.set_num_threads(1)  # one core for each worker: more workers gain more than more threads
    make = BrainMaker(worker.device)
    draw = np.random.default_rng(worker.seed)
    while True:
        seed = int(draw.integers(SEEDS_FOR_VALIDATION, 2**63))
        yield sb.Sample(make(seed), recipe={"generator": "brains", "version": 1, "seed": seed})
