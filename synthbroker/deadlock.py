"""A full ring that waits for what a reader has not acknowledged, while that reader waits for the ring."""

import time
from collections.abc import Sequence

from synthbroker import ring as rings
from synthbroker import units
from synthbroker.errors import SynthbrokerError, UnacknowledgedError
from synthbroker.options import ReadOptions
from synthbroker.replies import Meta
from synthbroker.ring import Ring

_LASTS_AFTER_S = 1.0  # a producer that is refused room for many samples asks for one of them a moment later


def lasts(held_since: float) -> bool:
    """Say whether a group has held its ring up since then for too long for it to be a producer between two steps."""
    return time.monotonic() - held_since >= _LASTS_AFTER_S


def is_sending(meta: Meta, held_since: float) -> bool:
    """Say whether somebody may be about to commit to a full ring: has a lease, and is not dead by all appearance."""
    return meta.leased_bytes > 0 and time.monotonic() - held_since < 2 * rings.BEAT_S


def waits_for_batch(ring: Ring, options: ReadOptions, holding: Sequence[int], held_since: float) -> bool:
    """Say whether a full ring waits for the samples of an incomplete batch, and that batch for the ring.

    Raises:
        UnacknowledgedError: These are all samples that the ring can hold.
    """
    meta = ring.read_meta()
    if min(holding) > meta.first or is_sending(meta, held_since):
        return False
    if len(holding) >= meta.live:
        raise UnacknowledgedError(
            f"ring {ring.name!r} ({units.format_size(meta.capacity_bytes)}) holds only {meta.live} samples, "
            f"and a batch of {options.batch_size} needs more: take smaller batches, or give it more room"
        )
    return True


def why_full(ring: Ring, options: ReadOptions) -> str:
    """Say what it is that the ring is full of, and what helps."""
    try:
        meta = ring.read_meta()
    except SynthbrokerError:
        return "the ring is full of samples that this group was given and has not acknowledged"
    oftener = "acknowledge more often"
    if options.ack == "checkpoint":
        oftener = (
            f"make checkpoints more often (state_dict(), then acknowledge(), well before {meta.live} samples "
            "were trained on)"
        )
    return (
        f"the ring is full: of its {meta.live} samples ({units.format_size(meta.capacity_bytes)}) this group was "
        f"given the last, and has not acknowledged the first: {oftener}, take smaller batches, use fewer workers, "
        "or give the ring more capacity"
    )
