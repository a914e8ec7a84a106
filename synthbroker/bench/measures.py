"""The table of measures."""

from synthbroker.bench import durability, flows, gpus, latency, link, memory, throughput
from synthbroker.bench.table import Block

NUMBERS = range(1, 18)


def blocks(*, quick: bool) -> tuple[Block, ...]:
    """Give all blocks, in the order of the table."""
    return (
        *(throughput.block(size, beside=not quick or size in throughput.QUICK_SIZES) for size in throughput.SIZES),
        link.LINK,
        flows.REUSE,
        flows.OVERLAP,
        flows.crowd_block(quick=quick),
        flows.many_block(quick=quick),
        latency.LATENCY,
        memory.SERVER,
        memory.resident_block(quick=quick),
        flows.in_put_block(quick=quick),
        *(durability.block(size) for size in durability.SIZES),
        gpus.generator_block(quick=quick),
        gpus.trainer_block(quick=quick),
    )
