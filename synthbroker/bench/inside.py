"""Generating in the workers of a DataLoader, which is what one does without a broker."""

from synthbroker.bench.loads import Figures, Maker
from synthbroker.bench.meter import Meter
from synthbroker.bench.processes import Stage


def train(stage: Stage, make: Maker, batch_size: int, seconds: float) -> Figures:
    """Take batches of one sample that a worker hands over again and again."""
    from synthbroker.bench.endless import Endless, loader

    meter = Meter(seconds)
    stage.begin()
    for batch in loader(Endless(make), batch_size=batch_size, num_workers=1):
        if not meter.count(len(next(iter(batch.values())))):
            break
    return {"samples_per_s": meter.per_s}
