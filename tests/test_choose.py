"""codec="auto": what is chosen for which link and which data, how steadily, and at what price."""

import itertools
import threading
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import synthbroker as sb
from servers import eventually
from synthbroker import choose, codec, monitor
from synthbroker.bench.samples import brain
from synthbroker.choose import PROBE_BYTES, SMALLEST_BYTES, Chooser, Link, Machine, Work, seconds_per_byte
from synthbroker.codec import AUTO, RAW
from synthbroker.schema import DTYPES, Array, dtype_of
from tools import meta

calm = settings(deadline=None)
NS = 1e-9
MIB = 2**20
TWO_CORES, NODE = Machine(2, 2), Machine(2, 64)
LARGE = np.zeros(SMALLEST_BYTES, np.uint8)

# Ratio, and nanoseconds that one thread takes to encode and to decode a byte, as one machine with two cores had it.
KINDS = {
    "image": {"lz4": (0.87, 0.6, 0.2), "zstd": (0.71, 3.2, 1.1)},
    "label": {"lz4": (0.17, 0.5, 0.25), "zstd": (0.05, 1.3, 0.7)},
    "noise": {"lz4": (1.0, 0.4, 0.0), "zstd": (1.0, 1.5, 0.0)},
}
LINKS = {"100 Mbit/s": 80.0, "1 Gbit/s": 8.0, "10 Gbit/s": 0.8, "socket": 0.4, "busy socket": 1.2}


def works(kind: str) -> dict[str, Work]:
    return {name: Work(ratio, encode * NS, decode * NS) for name, (ratio, encode, decode) in KINDS[kind].items()}


def chooser(found: Mapping[str, Work], link_ns: float | None = None, wanted: object = AUTO) -> Chooser:
    made = Chooser(wanted, encoders=2, cores=2, probe=lambda _: found)  # type: ignore[arg-type]
    if link_ns is not None:
        change_link(made, link_ns)
    return made


def change_link(made: Chooser, link_ns: float) -> None:
    for _ in range(3):
        made.sent(32 * MIB, 32 * MIB * link_ns * NS)


@pytest.mark.parametrize(
    ("kind", "link", "machine", "expected"),
    [
        ("image", "100 Mbit/s", TWO_CORES, "zstd"),
        ("image", "1 Gbit/s", TWO_CORES, "zstd"),
        ("image", "1 Gbit/s", NODE, "zstd"),
        ("image", "10 Gbit/s", TWO_CORES, RAW),
        ("image", "10 Gbit/s", NODE, RAW),
        ("image", "socket", TWO_CORES, RAW),
        ("image", "socket", NODE, RAW),
        ("image", "busy socket", TWO_CORES, RAW),
        ("image", "busy socket", NODE, RAW),
        ("label", "100 Mbit/s", TWO_CORES, "zstd"),
        ("label", "1 Gbit/s", TWO_CORES, "zstd"),
        ("label", "socket", TWO_CORES, RAW),
        ("label", "busy socket", TWO_CORES, RAW),
        *(("noise", link, machine, RAW) for link in LINKS for machine in (TWO_CORES, NODE)),
    ],
)
def test_the_link_and_the_data_decide(kind, link, machine, expected):
    assert choose.choose(RAW, works(kind), LINKS[link] * NS, machine) == expected


def test_a_busy_machine_is_no_reason_to_pack():
    slowed = {name: Work(w.ratio, 30 * w.encode_s, 30 * w.decode_s) for name, w in works("image").items()}
    link_ns = 30 * LINKS["socket"]  # slower than 1 Gbit/s, for want of processors
    assert choose.choose(RAW, slowed, link_ns * NS, TWO_CORES) == RAW


some_work = st.builds(Work, st.floats(0.001, 1), st.floats(1e-11, 1e-7), st.floats(1e-11, 1e-7))
some_works = st.fixed_dictionaries({"lz4": some_work, "zstd": some_work})
links = st.floats(1e-10, 1e-6)
machines = st.builds(Machine, st.integers(1, 4), st.integers(1, 64))


@calm
@given(some_works, links, machines, st.sampled_from([RAW, "lz4", "zstd"]))
def test_no_stage_of_what_is_chosen_is_slower_than_the_raw_link(found, link_s, machine, now):
    chosen = choose.choose(now, found, link_s, machine)
    if chosen == RAW:
        return
    work = found[chosen]
    assert max(work.encode_s / machine.encoders, work.decode_s, work.ratio * link_s) <= link_s
    assert (work.encode_s + work.decode_s) / machine.cores <= link_s


@calm
@given(some_works, links, machines, st.sampled_from([RAW, "lz4", "zstd"]), st.floats(0.97, 1.03))
def test_a_choice_stands_when_it_is_made_again_and_under_a_little_noise(found, link_s, machine, now, noise):
    first = choose.choose(now, found, link_s, machine)
    assert choose.choose(first, found, link_s, machine) == first
    if now != RAW or first == RAW:  # at the edge of coming in or going out the least noise decides, once
        return
    noisy = {n: Work(w.ratio, noise * w.encode_s, noise * w.decode_s) for n, w in found.items()}
    assert choose.choose(first, noisy, link_s, machine) == first


@calm
@given(some_works, machines, links, st.floats(1, 100))
def test_a_slower_link_never_makes_raw_better(found, machine, link_s, slower):
    if choose.choose(RAW, found, link_s, machine) != RAW:
        assert choose.choose(RAW, found, slower * link_s, machine) != RAW


@calm
@given(some_work, links, machines)
def test_more_cores_never_cost_time(work, link_s, machine):
    more = Machine(machine.encoders, machine.cores + 1)
    assert seconds_per_byte(work, link_s, more) <= seconds_per_byte(work, link_s, machine)


# -- the link


def test_a_link_is_known_after_48_mebibytes_in_sends_of_some_size():
    link = Link()
    for _ in range(1000):
        link.add(4096, 1.0)  # says more about round trips
    link.add(64 * MIB, 0.0)
    assert not link.known
    for _ in range(47):
        link.add(MIB, MIB * 8 * NS)
    assert not link.known
    link.add(MIB, MIB * 8 * NS)
    assert link.known
    large = Link()
    for known in False, False, True, True:
        large.add(100 * MIB, 1.0)
        assert large.known == known
    assert link.s_per_byte == pytest.approx(8 * NS)


def test_a_burst_that_buffers_swallow_is_soon_outweighed():
    link = Link()
    link.add(4 * MIB, 4 * MIB * 0.3 * NS)
    for _ in range(44):
        link.add(MIB, MIB * 8 * NS)
    assert link.s_per_byte == pytest.approx(8 * NS, rel=0.3)
    for _ in range(80):
        link.add(MIB, MIB * 8 * NS)
    assert link.s_per_byte == pytest.approx(8 * NS, rel=0.01)


@calm
@given(st.lists(st.tuples(st.integers(0, 2**31), st.floats(0, 100)), max_size=80))
def test_a_link_is_as_fast_as_its_latest_sends_and_remembers_few(sends):
    link = Link()
    for nbytes, seconds in sends:
        link.add(nbytes, seconds)
    assert len(link._sends) <= 129
    if link.known:
        paces = [s / n for n, s in sends if n >= MIB // 2 and s > 0]
        assert min(paces) - 1e-15 <= link.s_per_byte <= max(paces) + 1e-15  # a nanosecond in a MiB


# -- the course of choosing


def test_nothing_is_packed_or_probed_before_the_link_is_known():
    made = chooser(works("label"))
    assert {made.codec_for("x", LARGE) for _ in range(1000)} == {RAW}
    assert (made.described(), made.probes()) == ({"x": RAW}, {"x": 0})
    change_link(made, 8)
    assert made.codec_for("x", LARGE) == "zstd"
    assert (made.described(), made.probes()) == ({"x": "zstd 0.05"}, {"x": 1})


def test_nothing_is_packed_while_others_than_the_link_are_waited_for(monkeypatch):
    clock = 0
    monkeypatch.setattr(choose.time, "monotonic_ns", lambda: clock)
    made = chooser(works("label"))
    for _ in range(20):
        clock += 10**9
        made.sent(40 * MIB, 40 * MIB * 8 * NS)  # a third of a second in each second
        assert made.codec_for("x", LARGE) == RAW
    assert made.probes() == {"x": 0}
    for _ in range(4):
        clock += 4 * 10**8
        made.sent(40 * MIB, 40 * MIB * 8 * NS)
    assert made.codec_for("x", LARGE) == "zstd"


@pytest.mark.parametrize("link", ["socket", "busy socket", "10 Gbit/s"])
def test_nothing_is_probed_where_the_link_is_fast(link):
    made = chooser(works("label"), link_ns=LINKS[link])
    assert {made.codec_for("x", LARGE) for _ in range(1000)} == {RAW}
    assert made.probes() == {"x": 0}


def test_one_quick_send_of_late_shows_that_the_link_is_not_slow():
    made = chooser(works("label"), link_ns=8)
    made.sent(2 * MIB, 2 * MIB * 2 * NS)
    assert {made.codec_for("x", LARGE) for _ in range(100)} == {RAW}
    for _ in range(66):
        made.sent(MIB, MIB * 8 * NS)
    assert made.codec_for("x", LARGE) == "zstd"


def test_a_field_is_probed_at_doubled_intervals():
    made = chooser(works("image"), link_ns=8)
    counts = []
    for _ in range(2000):
        made.codec_for("x", LARGE)
        counts.append(made.probes()["x"])
    steps = [i + 1 for i, (a, b) in enumerate(itertools.pairwise([0, *counts])) if b > a]
    assert steps == [1, 3, 7, 15, 31, 63, 127, 255, 511, 1023]


def test_the_interval_has_an_end():
    made = chooser(works("image"), link_ns=8)
    for probes in range(1, 20):
        made.codec_for("x", LARGE)
        state = made._fields["x"]
        assert state.probes == probes
        waits = state.due_at - state.samples
        state.samples = state.due_at - 1  # as if so many had gone by
    assert waits == 65536


def test_another_link_is_another_choice_soon():
    made = chooser(works("image"), link_ns=8)
    assert [made.codec_for("x", LARGE) for _ in range(30)][-1] == "zstd"
    change_link(made, 0.4)
    found = [made.codec_for("x", LARGE) for _ in range(30)]
    assert found[-1] == RAW
    change_link(made, 8)
    assert [made.codec_for("x", LARGE) for _ in range(30)][-1] == "zstd"


def test_a_link_that_wavers_costs_no_probes_and_few_changes():
    made = chooser(works("image"))
    chosen = []
    for i in range(320):
        change_link(made, 0.4 if i % 17 < 8 else 8)
        chosen.append(made.codec_for("x", LARGE))
    assert made.probes()["x"] <= 8
    assert 2 <= sum(a != b for a, b in itertools.pairwise(chosen)) <= 320 / 16 + 3


def test_a_small_waver_of_link_and_codecs_changes_nothing():
    noise = np.random.default_rng(0)

    def waver(_: Array) -> dict[str, Work]:
        return {
            n: Work(w.ratio, w.encode_s * noise.uniform(0.6, 1.6), w.decode_s * noise.uniform(0.6, 1.6))
            for n, w in works("image").items()
        }

    made = Chooser(AUTO, encoders=2, cores=2, probe=waver)
    chosen = []
    for _ in range(5000):
        made.sent(MIB, MIB * 8 * NS * noise.uniform(0.7, 1.5))
        chosen.append(made.codec_for("x", LARGE))
    changes = sum(a != b for a, b in itertools.pairwise(chosen))
    assert (changes, chosen[-1]) == (1, "zstd")  # when the link was known


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (AUTO, {"a": "zstd", "b": "zstd", "tiny": RAW}),
        ("lz4", {"a": "lz4", "b": "lz4", "tiny": "lz4"}),
        ({"a": AUTO, "tiny": "lz4"}, {"a": "zstd", "b": RAW, "tiny": "lz4"}),
        ({}, {"a": RAW, "b": RAW, "tiny": RAW}),
    ],
)
def test_auto_may_be_said_for_all_or_for_some(wanted, expected):
    made = chooser(works("label"), link_ns=8, wanted=wanted)
    assert made.codecs_for({"a": LARGE, "b": LARGE, "tiny": LARGE[:-1]}) == expected


@pytest.mark.parametrize("wanted", ["Auto", None, 3, {"a": "zip"}])
def test_an_unknown_codec_is_refused(wanted):
    with pytest.raises(ValueError, match="auto or one of raw, lz4, zstd"):
        Chooser(wanted, encoders=2)


def test_encoders_and_sender_may_come_at_the_same_time():
    made = chooser(works("image"), link_ns=8)
    begin = threading.Barrier(4)

    def work() -> None:
        begin.wait()
        for _ in range(2000):
            made.codec_for("x", LARGE)
            made.sent(MIB, MIB * 8 * NS)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made._fields["x"].samples == 8000
    assert made.probes()["x"] <= 13  # two threads never probe for one reason
    assert made.described() == {"x": "zstd 0.71"}


# -- probes of real tensors


def test_a_probe_looks_at_little_of_a_large_tensor_and_at_all_of_its_length(monkeypatch):
    seen = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda array, name: seen.append(array) or encode(array, name))
    large = np.arange(16 * MIB, dtype=np.float32).reshape(16, 1024, 1024)
    found = choose.probe(large)
    assert set(found) == set(codec.CODECS) - {RAW}
    assert all(piece.nbytes <= PROBE_BYTES for piece in seen)
    values = seen[0]
    assert (values[0], values[-1]) == (0, large[-1, -1, -1])
    assert np.abs(values / large.size - 0.5).min() < 0.1


@pytest.mark.parametrize("short", sorted(DTYPES))
def test_every_dtype_can_be_probed(short):
    for size in (SMALLEST_BYTES, PROBE_BYTES, 3 * PROBE_BYTES + 48):
        dtype = dtype_of(short)
        found = choose.probe(np.zeros((size // dtype.itemsize, 1), dtype))
        assert all(0 < work.ratio < 0.1 and work.encode_s > 0 and work.decode_s > 0 for work in found.values())


def test_noise_is_found_not_to_pack():
    noise = np.random.default_rng(0).integers(0, 256, MIB, np.uint8)
    assert {work.ratio for work in choose.probe(noise).values()} == {1}


def test_brains_gain_what_the_issue_asks_for_if_zstd_is_chosen():
    sample = brain(0)
    packed = sum(array.nbytes * choose.probe(array)["zstd"].ratio for array in sample.values())
    assert sum(array.nbytes for array in sample.values()) / packed > 1.35


# -- through a producer


def test_a_producer_packs_when_it_has_seen_its_link(server, ring_name):
    options = {"ring": ring_name, "capacity": "100MB", "when_full": "drop-oldest", "producers": 1, "name": "p"}
    with sb.Producer(server.url, **options) as out:
        out._packer.chooser._probe = lambda array: works("label")  # what a real one finds depends on the machine
        told = out._sender._told
        out._sender._told = lambda nbytes, seconds: told(nbytes, nbytes * 1000 * NS)
        for seed in range(60):
            out.put(brain(seed % 2))
            out.flush()
        status = monitor.status(ring_name, url=server.url).producers["p"]
    chosen = {"image": "zstd 0.05", "label": "zstd 0.05"}
    assert out._packer.chooser.described() == chosen
    assert out.stats.payload_bytes < 0.97 * out.stats.raw_bytes
    assert status.codec in ({}, {"image": RAW, "label": RAW}, chosen)  # as of its last heartbeat, whenever that was
    assert monitor.status(ring_name, url=server.url).producers["p"].codec == out._packer.chooser.described()
    (batch,) = sb.Consumer(server.url, ring=ring_name, group=None, batch_size=60)
    for i in range(60):
        assert (batch["image"][i] == brain(i % 2)["image"]).all()
    assert meta(server, ring_name)["quarantined"] == "0"


def test_encoding_goes_only_so_far_ahead_of_sending(server, ring_name):
    options = {"ring": ring_name, "capacity": "4MB", "groups": ["g"], "producers": 1, "codec": "raw", "finite": True}
    with sb.Producer(server.url, **options) as out:
        begun = []
        codecs_for = out._packer.chooser.codecs_for
        out._packer.chooser.codecs_for = lambda sample: begun.append(sample) or codecs_for(sample)
        for i in range(60):
            out.put({"n": i, "x": np.zeros(2 * MIB, np.uint8)})
        eventually(lambda: len(begun) >= 33, "the next samples are encoded while the ring is full")
        assert len(begun) <= 1 + 32 + 1  # one in the ring, 64 MiB on their way, and one that went beyond
        reader = sb.Consumer(server.url, ring=ring_name, group="g")
        assert [int(batch["n"][0]) for batch, _ in zip(reader, range(59), strict=False)] == list(range(59))
        assert len(begun) == 60
        reader.close()


def test_a_producer_with_a_codec_of_its_own_says_nothing_of_auto(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1, name="p", codec="zstd") as out:
        out.put({"x": np.zeros(100_000)})
    assert monitor.status(ring_name, url=server.url).producers["p"].codec == {}
