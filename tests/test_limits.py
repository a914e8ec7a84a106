"""When a worker begins no other sample: reckoned from what samples usually take."""

import time

import pytest

from synthbroker.limits import Clock, Limits
from synthbroker.pace import Durations, Pace, usual


@pytest.mark.parametrize(
    ("durations_s", "expected_s"),
    [
        ([], 0.0),
        ([3.0], 3.0),
        ([1.0, 9.0, 2.0], 9.0),  # of a few the longest
        ([1.0] * 19 + [100.0], 1.0),  # one in twenty is not what is usual
        ([1.0] * 18 + [100.0] * 2, 100.0),
        ([float(n) for n in range(1, 101)], 95.0),
    ],
)
def test_what_is_usual_is_longer_than_nineteen_of_twenty(durations_s, expected_s):
    assert usual(reversed(durations_s)) == expected_s


def test_what_was_slow_long_ago_is_not_usual_any_more_but_was_once_the_longest():
    durations = Durations()
    for seconds in [100.0] * 10 + [1.0] * 50:
        durations.add(seconds)
    assert (durations.usual_s, durations.longest_s) == (1.0, 100.0)


def clock_with(end_in_s, margin_s=30.0):
    return Clock(Limits(time.time() + end_in_s, margin_s))


# Seconds left until the margin, what samples took to make, and what they took on their way: is there time for another?
CASES = [
    (70, [], [], True),  # before the first nothing is known
    (70, [60], [], True),
    (50, [60], [], False),  # only the first is known, so it counts
    (50, [60, 10], [], True),  # and not once there is a second
    (70, [1, 80], [], False),
    (70, [1, 40], [40], False),  # made in time, but not sent
    (70, [1, 40], [20], True),
    (10, [9, *[1] * 19, 60], [1] * 19 + [60], True),  # one slow sample, one slow delivery
    (10, [9, *[1] * 18, 60, 60], [], False),
    (-1, [], [], False),
]


@pytest.mark.parametrize(("left_s", "made_s", "on_way_s", "fits"), CASES)
def test_a_sample_is_begun_if_its_usual_time_fits_before_the_margin(left_s, made_s, on_way_s, fits):
    clock, pace = clock_with(30 + left_s), Pace()
    for seconds in made_s:
        clock.made(seconds)
    for seconds in on_way_s:
        pace.on_way.add(seconds)
    assert clock.fits(pace) == fits


def test_the_last_third_of_the_margin_is_for_the_goodbye():
    clock = clock_with(100, margin_s=30)
    assert clock.give_up_at - clock.over_at == pytest.approx(20)
    assert clock.left_s() == pytest.approx(70, abs=5)


def test_without_an_end_there_is_always_time():
    clock = Clock(Limits())
    clock.made(1e9)
    clock.made(1e9)
    assert clock.fits(Pace())
    assert (clock.left_s(), clock.give_up_at) == (None, None)


def test_a_pace_knows_since_when_there_is_no_room():
    pace = Pace()
    assert (pace.blocked_for_s, pace.wait_for_room(0)) == (0.0, True)
    pace.blocked()
    first = pace.blocked_for_s
    pace.blocked()
    assert pace.blocked_for_s >= first, "asked again and refused again: it has not moved between"
    assert not pace.wait_for_room(0)
    pace.moved()
    assert (pace.blocked_for_s, pace.wait_for_room(0)) == (0.0, True)
