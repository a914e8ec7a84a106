"""Looking into a ring without taking anything out of it."""

import contextlib

import numpy as np

from synthbroker import codec, schema, wire
from synthbroker.assemble import largest_free_bytes
from synthbroker.batch import Batch, BatchInfo
from synthbroker.connection import Connection
from synthbroker.errors import DamagedSampleError
from synthbroker.payload import MissingPartError, fetch_shared, receive
from synthbroker.pool import Pool
from synthbroker.replies import Given, Meta
from synthbroker.ring import Ring


def peek(ring: str, n: int = 4, *, url: str | None = None) -> list[Batch]:
    """Read the newest samples of a ring; nothing is taken, no group is told.

    Args:
        ring: Name of the ring.
        n: At most so many.
        url: Redis URL, `file://` URL of an endpoint file, or None for SYNTHBROKER_URL.

    Returns:
        The newest first; each a dict of numpy arrays without a batch dimension, whose `info` has one item of each kind.
        What cannot be read, or is evicted meanwhile, is left out.

    Raises:
        RingMissingError: There is no such ring.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a whole number from 1, got {n!r}")
    connection = Connection(url)
    try:
        source = Ring(connection, ring)
        meta = source.read_meta()
        samples: list[Batch] = []
        if meta.live:
            for given in reversed(source.read(max(meta.next - n, meta.first), meta.next - 1, n)):
                with contextlib.suppress(DamagedSampleError):
                    samples.append(_sample(source, meta, given))
        return samples
    finally:
        connection.close()


def _sample(ring: Ring, meta: Meta, given: Given) -> Batch:
    entry = wire.read_entry(given.fields)
    wire.check_schema(entry.head, schema.parse(meta.schema), largest_free_bytes(meta))
    arrays = {tensor.name: np.empty(tensor.shape, tensor.dtype) for tensor in entry.head.tensors}
    targets = {name: codec.as_bytes(array) for name, array in arrays.items()}
    with ring.inflow(connections=1) as inflow:
        (whole,) = fetch_shared(inflow, [entry], Pool(0))
        if whole is None:
            raise MissingPartError("its part is gone")
        inflow.want(whole.slices(list(arrays)))
        receive(whole, targets, Pool(0), inflow.receive)
    info = BatchInfo(
        ring=ring.name,
        group=None,
        epoch=meta.epoch,
        ids=(given.number,),
        producers=(entry.producer,),
        seqs=(entry.seq,),
        ages_s=(round(max(ring.now_s() - entry.made_s, 0.0), 3),),
        uses=(0,),
        recipes=(entry.head.recipe,),
        metadata=(entry.head.metadata,),
    )
    return Batch.of(arrays, info)
