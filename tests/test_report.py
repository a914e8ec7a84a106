"""What a person sees of a ring: tables, lines and pictures."""

import dataclasses
import re
import sys

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from synthbroker import pictures, report
from synthbroker.audit import Audit
from synthbroker.batch import Batch, BatchInfo
from synthbroker.errors import MissingExtraError
from synthbroker.generate import Outcome
from synthbroker.ledger import Equation, Ledger
from synthbroker.states import ConsumerStatus, GroupStatus, ProducerStatus, RingStatus, Twins

PRODUCER = ProducerStatus("alive", 1.5, 40, "node7", 4711, "99", 2.5, 1e6, 0.25, blocked_ever_share=0.1)
READER = ConsumerStatus("silent", 200.0, 3, "node8", 12, None, 0.07, 0.5)
KEEPER = ConsumerStatus("alive", 1.5, 3, "node8", 12, None)
GROUP = GroupStatus(0, "inf", 40, 30, 3, 2, 5, 7, 900, 1, 0, 0, {"gpu/0:ab": READER, "kept:cd": KEEPER},
                    starved_share=0.07, starved_ever_share=0.4)  # fmt: skip
STATUS = RingStatus(
    ring="brains", where="redis://node7:1/0", now_s=1e9, epoch="ab", when_full="drop-oldest", capacity_bytes=8 * 10**9,
    max_samples=0, schema="image:f32[1,*]", info={"classes": 4}, checks="none", ended=False, first=6, next=48, live=42,
    bytes=2 * 10**9, fill=0.25, committed=47, evicted=5, duplicates=1, foreign=0, quarantined=2, waiting=True,
    leased_bytes=0, leased_samples=0, expected_producers=4, closed_producers=1, folded_producers=0, folded_samples=0,
    samples_per_s=2.5, bytes_per_s=1e6, oldest_age_s=90.0, newest_age_s=0.4, groups={"train": GROUP},
    producers={"p": PRODUCER}, ledger=Ledger((Equation("a = b", 1, 1, 0),), balanced=True),
    blocked_share=0.3, blocked_ever_share=0.12, advice="buy more time",
)  # fmt: skip


def shown(renderable, **options):
    console = Console(width=200, highlight=False, markup=False, **options)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_what_auto_chose_has_a_column_where_a_producer_says_it():
    assert "codec" not in shown(report.of_status(STATUS))
    chosen = dataclasses.replace(PRODUCER, codec={"image": "zstd 0.74", "seed": "raw"})
    text = shown(report.of_status(dataclasses.replace(STATUS, producers={"p": PRODUCER, "q": chosen})))
    assert "job  codec" in text
    assert "99   image zstd 0.74, seed raw" in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_narrow_terminal_is_told_which_columns_are_left_out(width):
    noisy = dataclasses.replace(GROUP, consumers={"gpu/0:ab": READER}, redelivered=1234, doubled=77)
    status = dataclasses.replace(STATUS, groups={"train": noisy})
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(report.of_status(status))
    lines = capture.get().splitlines()
    head, numbers = next((lines[i], lines[i + 1]) for i, line in enumerate(lines) if "delivered" in line)
    assert {"delivered", "acknowledged", "pending", "unread", "lost", "doubled"} <= set(head.split())
    assert "77" in numbers.split(), "what is amiss is shown"
    assert "left out: " in capture.get()
    assert "left out" not in shown(report.of_status(status))


def test_generate_says_how_many_of_its_samples_are_gone_again():
    done = Outcome(12, 5, 10**6, 10**6, 0, 0, 0.0, None, ended=True, stopped=None, idle_for_s=None)
    assert "12 samples in ring r (1 MB, 1 MB sent); lost 5 of them" in report.of_outcome("r", done, 75)
    idle = dataclasses.replace(done, samples=0, lost=0)
    assert "the generator yielded nothing" in report.of_outcome("r", idle, 75)


def words(text):
    return [line.split() for line in text.splitlines()]


def test_waste_uses_and_twins_are_shown_where_there_are_any():
    assert "wasted" not in shown(report.of_status(dataclasses.replace(STATUS, groups={})))
    group = dataclasses.replace(GROUP, wasted_s=100.0, uses={"0": 3, "1": 20, "16": 7})
    twins = (Twins("a", "b", 25, 1e9), Twins("c", "c", 9, 1e9))
    text = shown(report.of_status(dataclasses.replace(STATUS, groups={"train": group}, twins=twins, wasted_s=7200.0)))
    assert "1 min 40 s" in text
    assert "train: of those in the ring 3 used 0x, 20 used 1x, 7 used up to 16x" in text
    assert "b sends what a sends (same seed?): 25 samples alike" in text
    assert "c sends what it sent in a former life (same seed?)" in text
    assert "2 h of generating: no group has seen what left" in " ".join(text.split())


def test_a_status_shows_ring_groups_readers_producers_and_ledger():
    text = shown(report.of_status(STATUS))
    lines = [" ".join(line) for line in words(text)]
    for line in (
        "ring brains on redis://node7:1/0",
        "policy drop-oldest, capacity 8 GB",
        "holds 42 samples, 2 GB, 25.0% full, 400 ms to 1 min 30 s old",
        "flow 2.5 samples/s, 1 MB/s",
        "so far 47 committed, 5 evicted, 1 sent twice",
        "bad 2 quarantined, 0 foreign",
        'info {"classes": 4}',
        "ends when 4 producers are done, 1 so far",
        "waiting producers wait for room",
        "train inf 40 30 3 2 5 7 900 1 0 0 -",
        "idle generators blocked 30% of their time (ever 12%); training of group train starved 7% (ever 40%)",
        "advice buy more time",
        "train gpu/0:ab silent 3 min 20 s ago 3 7% 50% node8 12 -",
        "train kept:cd alive 1.5 s ago 3 - - node8 12 -",
        "p alive 1.5 s ago 40 2.5 1 MB 25% 10% node7 4711 99",
        "ledger: balanced, all 1 equations hold",
    ):
        assert line in lines


def test_one_is_not_many():
    many = {f"p{i:02}": PRODUCER for i in range(report.MOST_ROWS + 1)}
    twins = (Twins("a", "b", 1, 1e9),)
    status = dataclasses.replace(STATUS, live=1, max_samples=1, twins=twins, producers=many)
    text = shown(report.of_status(status)) + report.of_ring(status)
    assert "at most 1 sample\n" in re.sub(" +\n", "\n", text)
    assert "holds  " in text
    for line in (
        "  1 sample, 2 GB",
        "(same seed?): 1 sample alike",
        "and 1 more producer:",
        "brains: 1 sample, 25.0% full",
    ):
        assert line in text
    done = Outcome(1, 0, 100, 100, 0, 0, 0.0, None, ended=True, stopped=None, idle_for_s=None)
    assert report.of_outcome("r", done, 75).startswith("1 sample in ring r")
    audit = Audit("brains", "here", "ab", 1e9, True, (), (), 1, 100, 1, 1, 0, 100, 1, 0, {})
    text = shown(report.of_audit(audit))
    for line in "1 sample, 100 B, 1 part; 1 sample came or left", "room for 1 sample, 100 B; leases past their end: 0":
        assert line in text
    assert "1 samples" not in text


def test_rates_of_generators_that_were_not_heard_of_are_told_as_past():
    late = dataclasses.replace(PRODUCER, seen_s=12.0)
    text = " ".join(shown(report.of_status(dataclasses.replace(STATUS, producers={"p": late}))).split())
    assert "idle generators were blocked 12% of their time; training of group train" in text


def test_a_bare_ring_says_what_is_missing():
    bare = dataclasses.replace(STATUS, groups={}, producers={}, schema="", info={}, oldest_age_s=None, ended=True)
    text = shown(report.of_status(bare))
    assert "no group reads this ring yet" in text
    assert "none yet" in text
    assert "ended" in text


def test_a_ledger_that_is_off_says_where_and_by_how_much():
    ledger = Ledger((Equation("a = b", 1, 1, 0), Equation("committed = live + evicted", 7, 5, 2)), balanced=False)
    text = shown(report.of_status(dataclasses.replace(STATUS, ledger=ledger)))
    assert "committed = live + evicted: 7 = 5 is off by 2" in text
    assert "a = b" not in text


def test_of_many_producers_the_living_come_first_and_the_rest_is_counted():
    many = {f"old{i}": dataclasses.replace(PRODUCER, state="closed") for i in range(report.MOST_ROWS + 9)}
    text = shown(report.of_status(dataclasses.replace(STATUS, producers=many | {"young": PRODUCER})))
    assert "young" in text
    assert "and 10 more producers" in text


def test_names_are_never_taken_for_markup():
    text = shown(report.of_status(dataclasses.replace(STATUS, groups={"train": GROUP}, schema="x:u8[4] [red]y:u8[4]")))
    assert "[red]y:u8[4]" in text


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([1, 2, 6], np.uint8), "min 1, max 6, mean 3"),
        (np.array([True, False]), "min 0, max 1, mean 0.5"),
        (np.array(2.5), "min 2.5, max 2.5, mean 2.5"),
        (np.array([1, np.nan, 3], np.float32), "min 1, max 3, mean 2, 1 not finite"),
        (np.array([np.inf, np.nan]), "nothing finite"),
        (np.array([3 + 4j]), "magnitude min 5, max 5, mean 5"),
        (np.array([60000, 60000], np.float16), "min 6e+04, max 6e+04, mean 6e+04"),
        (np.array([1, 3], ml_dtypes.bfloat16), "min 1, max 3, mean 2"),
        (np.array([1, 2], ml_dtypes.float8_e4m3fn), "min 1, max 2, mean 1.5"),
        (np.zeros((0, 3)), "empty"),
    ],
)
def test_the_figures_of_an_array(array, text):
    assert report.figures(array) == text


def sample(number=7, **fields):
    info = BatchInfo(
        "brains", None, "ab", (number,), ("node7-1-0:ff",), (3,), (2.5,), (0,), ({"seed": 5},), ({"site": "A"},)
    )
    return Batch.of(fields, info)


def test_a_sample_is_described_in_a_few_lines():
    text = report.of_sample(sample(image=np.zeros((1, 4, 4), np.float32), label=np.ones((4, 4), np.uint8)))
    assert text.splitlines() == [
        "7: 2.5 s old, from node7-1-0:ff, seq 3",
        "  image:f32[1,4,4]  min 0, max 0, mean 0",
        "  label:u8[4,4]     min 1, max 1, mean 1",
        '  recipe {"seed": 5}',
        '  metadata {"site": "A"}',
    ]


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((), "f4", None),
        ((9,), "f4", None),
        ((0, 4), "f4", None),
        ((5, 6), "f4", (5, 6)),
        ((1, 5, 6), "f4", (5, 6)),
        ((9, 5, 6), "u1", (5, 6)),
        ((3, 5, 6), "f4", (5, 6, 3)),
        ((4, 5, 6), "f4", (5, 6, 3)),
        ((5, 6, 3), "u1", (5, 6, 3)),
        ((2, 8, 5, 6), "f4", (5, 6)),
        ((8, 8, 5, 6), "f2", (5, 6)),
        ((1, 9, 5, 6), "c8", (5, 6)),
        ((2, 2, 9, 5, 6), "?", (5, 6)),
        ((7, 5, 6), ml_dtypes.bfloat16, (5, 6)),
        ((7, 5, 6), ml_dtypes.float8_e5m2, (5, 6)),
    ],
)
def test_the_middle_slice_of_anything(shape, dtype, expected):
    picture = pictures.slice_of(np.ones(shape, dtype))
    assert (picture if picture is None else picture.shape) == expected
    if picture is not None:
        assert picture.dtype.kind in "biuf"


def test_the_slice_is_the_middle_one_of_the_first_channel():
    volume = np.zeros((2, 9, 5, 6))
    volume[0, 4] = 7
    assert (pictures.slice_of(volume) == 7).all()


def test_samples_are_drawn_into_a_file(tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        sample(8, image=rng.random((1, 9, 9, 9), np.float32), label=rng.integers(0, 4, (9, 9, 9), np.uint8)),
        sample(7, image=rng.random((3, 9, 9)), age=np.array(40.0), nothing=np.full((4, 4), np.nan)),
    ]
    pictures.draw(samples, tmp_path / "look.png")
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("samples", [[], [sample(age=np.array(40.0), curve=np.zeros(9))]])
def test_what_cannot_be_drawn_is_said(tmp_path, samples):
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.draw(samples, tmp_path / "look.png")


def test_a_missing_matplotlib_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"synthbroker\[plot\]"):
        pictures.draw([sample(image=np.zeros((4, 4)))], tmp_path / "look.png")
