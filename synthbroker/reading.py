"""What a source found, with its entries read: samples on their way from there into a batch."""

from typing import NamedTuple

from synthbroker.assemble import Plan
from synthbroker.errors import DamagedSampleError
from synthbroker.replies import Given
from synthbroker.seats import Found
from synthbroker.wire import Entry


class InHand(NamedTuple):
    """A sample that was given to a reader, at `now_s` by the server's clock, and is not in a batch yet."""

    given: Given
    entry: Entry
    now_s: float


class Read(NamedTuple):
    """What was found: samples whose entries can be used, and bad ones with the reason."""

    found: Found
    samples: list[InHand]
    bad: list[tuple[Given, DamagedSampleError]]

    @property
    def plain(self) -> bool:
        """Whether nothing is left to do but to receive each sample."""
        return not self.bad and all(one.entry.start is None for one in self.samples)


def read(found: Found, plan: Plan) -> Read:
    """Read the entries of what was found."""
    samples, bad = [], []
    for given in found.samples:
        try:
            samples.append(InHand(given, plan.read(given), found.now_s))
        except DamagedSampleError as error:
            bad.append((given, error))
    return Read(found, samples, bad)
