"""What the bench is made of: processes, the meter, the lines of the table, the slow link, the samples."""

import os
import socket
import threading
import time

import numpy as np
import pytest

from synthbroker.bench import samples, table, throttle
from synthbroker.bench.meter import Meter
from synthbroker.bench.processes import Part, Troupe
from synthbroker.bench.table import Bound, Line, row_of
from synthbroker.errors import SynthbrokerError

SOON_S = 30


# -- processes (what they play must be found by fresh interpreters: functions of this file)


def play_ping(stage, count):
    stage.begin()
    for number in range(count):
        while stage.turn != 2 * number:
            time.sleep(0.0001)
        stage.turn += 1
    stage.stop()
    return os.getpid()


def play_pong(stage):
    stage.begin()
    while not stage.over:
        if stage.turn % 2:
            stage.turn += 1
    return stage.turn


def play_badly(stage):
    raise RuntimeError("forgot the words")


def play_dead(stage):
    os._exit(7)


def play_for_ever(stage):
    stage.begin()
    while True:
        time.sleep(1)


@pytest.fixture(params=[False, True], ids=["fresh", "kept"])
def troupe(request):
    made = Troupe(keep=request.param)
    yield made
    made.kill()


def test_parts_begin_together_and_give_what_they_return(troupe):
    first, turns = troupe.play(Part(play_ping, (5,)), Part(play_pong), patience_s=SOON_S)
    assert turns in (9, 10)
    second, _ = troupe.play(Part(play_ping, (1,)), Part(play_pong), patience_s=SOON_S)
    assert (first == second) == troupe._keep


@pytest.mark.parametrize(
    ("part", "said", "patience_s"),
    [
        (play_badly, "RuntimeError: forgot the words", SOON_S),
        (play_dead, "ended by itself with status 7", SOON_S),
        (play_for_ever, "did not come to its end in time", 3),
    ],
)
def test_a_scene_that_fails_says_why_and_ends_all(troupe, part, said, patience_s):
    with pytest.raises(SynthbrokerError, match=said):
        troupe.play(Part(part), Part(play_for_ever), patience_s=patience_s)
    assert troupe._actors == []


# -- lines and the meter


def test_a_line_is_the_ratio_of_two_medians():
    line = Line(1, "this ÷ that", "samples/s", ("ours", "rate"), ("theirs", "rate"), Bound(2))
    runs = {"ours": [{"rate": 9.0}, {"rate": 30.0}, {"rate": 10.0}], "theirs": [{"rate": 4.0}]}
    row = row_of(line, runs, {}, judge=True)
    assert (row.ours, row.baseline, row.ratio, row.bound, row.ok) == (10.0, 4.0, 2.5, "≥ 2", True)
    assert table.text_of(row).endswith("≥ 2      ok")
    assert row_of(line, runs | {"theirs": [{"rate": 6.0}]}, {}, judge=True).ok is False


def test_less_is_better_where_the_line_says_so():
    line = Line(11, "late", "ms", ("ours", "p99"), bound=Bound(10, most=True))
    assert row_of(line, {"ours": [{"p99": 9.0}]}, {}, judge=True).ok is True
    assert row_of(line, {"ours": [{"p99": 11.0}]}, {}, judge=True).ok is False


def test_a_line_whose_baseline_could_not_run_says_why():
    line = Line(1, "this ÷ that", "samples/s", ("ours", "rate"), ("theirs", "rate"), Bound(2))
    row = row_of(line, {"ours": [{"rate": 1.0}]}, {"theirs": "there is none"}, judge=True)
    assert (row.ours, row.ok) == (None, None)
    assert table.text_of(row).endswith("cannot run here: there is none")


def test_the_meter_counts_what_comes_after_the_warm_up(monkeypatch):
    times = iter([100.0, 100.1, 100.25, 100.5, 100.75, 101.05, 101.2])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    meter = Meter(1.0)
    assert [meter.count(8) for _ in range(6)] == [True, True, True, True, True, False]
    assert meter.per_s == pytest.approx(3 * 8 / (101.05 - 100.25))


# -- the slow link


def test_a_valve_lets_no_more_through_than_its_rate():
    valve = throttle.Valve(bytes_per_s=1e6)
    began = time.monotonic()
    for _ in range(10):
        valve.pass_through(10_000)
    assert time.monotonic() - began >= 0.1 - 0.01


class _Stage:
    over = False

    def begin(self):
        self.began = True


def test_the_relay_passes_bytes_on_both_ways():
    stage, port = _Stage(), throttle.free_port()
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        relay = threading.Thread(target=throttle.relay, args=(stage, url, port, 1e9))
        relay.start()
        for _ in range(2):
            near = _connect(port)
            far, _ = server.accept()
            with near, far:
                near.sendall(b"there" * 100_000)
                assert far.recv(500_000, socket.MSG_WAITALL) == b"there" * 100_000
                far.sendall(b"and back")
                assert near.recv(8, socket.MSG_WAITALL) == b"and back"
                far.close()
                assert near.recv(1) == b""
        stage.over = True
        relay.join(SOON_S)
        assert not relay.is_alive()


def _connect(port):
    end = time.monotonic() + SOON_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=SOON_S)
        except ConnectionRefusedError:
            assert time.monotonic() < end


def test_the_url_behind_a_relay_keeps_login_and_database():
    assert throttle.through("redis://me:a%40b@far:6380/3", 7000) == "redis://me:a%40b@127.0.0.1:7000/3"
    assert throttle.address_of("redis://far/0") == ("far", 6379)
    with pytest.raises(SynthbrokerError, match="plain TCP"):
        throttle.address_of("rediss://far:6380")


# -- samples


def test_the_brain_is_as_the_demo_makes_them():
    sample = samples.brain()
    assert {name: (array.dtype.name, array.shape) for name, array in sample.items()} == {
        "image": ("float32", (1, 64, 64, 64)),
        "label": ("uint8", (64, 64, 64)),
    }
    assert set(np.unique(sample["label"])) == {0, 1, 2, 3}
    assert not np.array_equal(samples.brain(2)["image"], sample["image"])


@pytest.mark.parametrize(("size_bytes", "name"), [(4096, "4 KiB"), (1572864, "1.5 MiB"), (67108864, "64 MiB")])
def test_a_sample_is_as_large_as_its_name_says(size_bytes, name):
    assert samples.size_name(size_bytes) == name
    assert sum(array.nbytes for array in samples.floats(size_bytes).values()) == size_bytes
