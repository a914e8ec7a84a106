"""Measure 5: what choosing codecs by itself is worth, on a slow link and on a fast one."""

from functools import partial

from synthbroker.bench import loads, samples, throttle
from synthbroker.bench.loads import Figures, Reading, RingPlan
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part
from synthbroker.bench.samples import MIB
from synthbroker.bench.table import Block, Bound, Line
from synthbroker.errors import SynthbrokerError

AUTO = "auto"
_SETTLED_S = 6.0  # at least: the first third of a second at 1 Gbit/s goes raw, until the link is known
GIGABIT_BYTES_PER_S = 1e9 / 8


def direct(codec: str, place: Place) -> Figures:
    """Send demo samples the short way."""
    return _flow(place, codec, place.url)


def throttled(codec: str, place: Place) -> Figures:
    """Send demo samples through a relay that passes 1 Gbit/s in each direction."""
    if place.tcp_url is None:
        raise SynthbrokerError("it needs a server that is reached by plain TCP, redis://")
    port = throttle.free_port()
    relay = Part(throttle.relay, (place.tcp_url, port, GIGABIT_BYTES_PER_S), early=True)
    return _flow(place, codec, throttle.through(place.tcp_url, port), relay)


def _flow(place: Place, codec: str, url: str, *others: Part) -> Figures:
    with place.ring() as name:
        room = {"capacity": place.scaled(64 * MIB, 8 * MIB), "in_flight": place.scaled(64 * MIB, 4 * MIB)}
        ring = RingPlan(url, name, {"producers": 1, "codec": codec, **room})
        seconds = place.seconds if place.quick else max(place.seconds, _SETTLED_S)
        trainer = Part(loads.train, (ring, Reading(seconds, options={"batch_size": 4})))
        producer = Part(loads.produce, (ring, samples.brain))
        figures: Figures = place.troupe.play(trainer, producer, *others, patience_s=place.patience_s)[0]
        return figures


LINK = Block(
    {
        "auto at 1 Gbit/s": partial(throttled, AUTO),
        "raw at 1 Gbit/s": partial(throttled, "raw"),
        "auto": partial(direct, AUTO),
        "raw": partial(direct, "raw"),
    },
    tuple(
        Line(
            5,
            f"demo samples, codec=auto ÷ raw, {where}",
            "samples/s",
            (f"auto{suffix}", "samples_per_s"),
            (f"raw{suffix}", "samples_per_s"),
            Bound(least),
        )
        for where, suffix, least in (
            ("through a relay at 1 Gbit/s", " at 1 Gbit/s", 1.35),
            ("without the relay", "", 0.95),
        )
    ),
)
