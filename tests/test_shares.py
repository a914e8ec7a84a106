"""Shares of time: lately, in all, and across processes."""

import time
from ctypes import c_double
from multiprocessing import RawArray
from threading import get_ident
from types import SimpleNamespace

import pytest

from synthbroker import shares
from synthbroker.shares import WINDOW_S, Share, Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """Let the test tell what time it is; what other tests have left behind in other threads goes by the real clock."""
    now, mine = SimpleNamespace(s=100.0), get_ident()

    def monotonic() -> float:
        return now.s if get_ident() == mine else time.monotonic()

    monkeypatch.setattr(shares, "time", SimpleNamespace(monotonic=monotonic))
    return now


def after(clock, share, *spans):
    """Pass spans of time, of each a share, a second at a time; gives the total."""
    total_s = 0.0
    for length_s, part in spans:
        for _ in range(length_s):
            clock.s += 1
            total_s += part
            share.update(total_s)
    return total_s


def test_a_share_that_stays_is_told_from_the_beginning(clock):
    share = Share()
    after(clock, share, (1, 0.25))
    assert (share.lately, share.ever, share.age_s) == (pytest.approx(0.25), pytest.approx(0.25), 1)
    after(clock, share := Share(), (300, 0.25))
    assert (share.lately, share.ever) == (pytest.approx(0.25), pytest.approx(0.25))


def test_what_is_over_fades_and_is_remembered_in_all(clock):
    share = Share()
    after(clock, share, (100, 1.0), (100, 0.0))
    assert share.lately == pytest.approx(0.035, abs=0.01)
    assert share.ever == pytest.approx(0.5)
    after(clock, share := Share(), (10_000, 0.0), (int(WINDOW_S), 1.0))
    assert share.lately == pytest.approx(0.632, abs=0.01)


def test_how_often_it_is_updated_does_not_matter(clock):
    often, seldom = Share(), Share()
    for second in range(1, 61):
        clock.s += 1
        often.update(second / 2)
    seldom.update(30)
    assert often.lately == pytest.approx(seldom.lately)
    seldom.update(30)
    assert seldom.lately == pytest.approx(0.5), "twice at one instant"


def test_nothing_has_passed_at_the_beginning(clock):
    share = Share(7.0)
    share.update(7.0)
    assert (share.lately, share.ever) == (0, 0)
    clock.s += 2
    share.update(8.0)
    assert (share.lately, share.ever) == (0.5, 0.5), "what was before it began does not count"


def test_who_has_just_begun_has_no_share_yet(clock):
    share = Share()
    clock.s += 0.001
    share.update(0.001)
    assert (share.lately, share.ever) == (0, 0), "whatever it began with: a first wait is all of so short a time"
    clock.s += 0.999
    share.update(0.5)
    assert (share.lately, share.ever) == pytest.approx((0.5, 0.5), abs=1e-3)


def test_a_wait_that_is_told_late_is_no_more_than_all_the_time(clock):
    share = Share()
    clock.s += 1
    share.update(3.0)
    assert (share.lately, share.ever) == (1.0, 1.0)


def test_a_stopwatch_counts_while_it_runs(clock):
    watch = Stopwatch()
    watch.start()
    clock.s += 2
    assert watch.total_s == 2
    watch.stop()
    clock.s += 5
    assert watch.total_s == 2
    watch.start()
    clock.s += 1
    assert watch.total_s == 3


def test_a_stopwatch_may_be_read_by_another_one_of_the_same_memory(clock):
    cells = RawArray(c_double, 2)
    one, other = Stopwatch(cells), Stopwatch(cells)
    one.start()
    clock.s += 2
    assert other.total_s == 2
    one.stop()
    assert (one.total_s, other.total_s) == (2, 2)
