"""Producers that send the same content are noticed early, named at both and in `status`; others are not."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import synthbroker as sb
from servers import eventually
from synthbroker import ring as rings
from synthbroker import twins
from tools import SOON_S, key, number


def made(seed, count, size=100):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"x": rng.random(size, np.float32), "label": rng.integers(0, 4, size, np.uint8)}


def named(server, ring_name):
    return [(one.first, one.second) for one in sb.status(ring_name, url=server.url).twins]


def producer(server, ring_name, name, **options):
    defaults = {"capacity": "50MB", "when_full": "drop-oldest", "codec": "raw"}
    return sb.Producer(server.url, ring=ring_name, name=name, **defaults | options)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "same seed" in record.getMessage()]


@pytest.mark.parametrize("size", [100, 5_000, 1_500_000])  # in the entry, in shared parts, in parts of its own
def test_two_producers_of_the_same_seed_are_named_before_their_hundredth_sample(server, ring_name, caplog, size):
    count = 99 if size < 10**6 else 30
    with producer(server, ring_name, "task-1") as one, producer(server, ring_name, "task-2", codec="zstd") as two:
        for sample in made(7, count, size):
            one.put(sample)
            two.put(sample)
        eventually(lambda: named(server, ring_name), "they are noticed while they go on")
        ((first, second),) = named(server, ring_name)
        assert {first, second} == {"task-1", "task-2"}
        for out in one, two:
            for sample in made(7, 60, size):  # an occasion to hear of it, which the next heartbeat would be too
                out.put(sample)
    line = f"ring {ring_name}: producers {first} and {second} send identical samples: have they the same seed?"
    assert warnings(caplog) == [line, line], "each of them says it once"
    text = subprocess.run(
        [sys.executable, "-m", "synthbroker", "status", ring_name, "--url", server.url],
        capture_output=True, text=True, timeout=SOON_S, check=True,
    ).stdout  # fmt: skip
    assert f"{second} sends what {first} sends (same seed?)" in text


def test_slow_producers_are_noticed_by_their_heartbeats(server, ring_name, monkeypatch, caplog):
    monkeypatch.setattr(rings, "BEAT_S", 0.05)
    with producer(server, ring_name, "one") as one, producer(server, ring_name, "two") as two:
        for sample in made(7, 4):
            one.put(sample)
            two.put(sample)
        eventually(lambda: len(warnings(caplog)) == 2, "both have heard of it")


def test_a_short_life_is_told_at_its_end(server, ring_name):
    for name in "one", "two":
        with producer(server, ring_name, name) as out:
            for sample in made(7, 4):
                out.put(sample)
    assert named(server, ring_name) == [("one", "two")]


def test_other_seeds_and_repeated_samples_are_no_twins(server, ring_name, caplog):
    for seed in range(4):
        with producer(server, ring_name, f"p{seed}") as out:
            for sample in made(seed, 200):
                out.put(sample)
                out.put({name: np.zeros_like(array) for name, array in sample.items()})
            out.put_batch([next(made(seed, 1))] * 100)
    assert named(server, ring_name) == []
    assert warnings(caplog) == []


def test_a_restart_that_begins_with_the_same_seed_is_named(server, ring_name, caplog):
    for _ in range(3):
        with producer(server, ring_name, "p") as out:
            for sample in made(7, 30):
                out.put(sample)
    assert named(server, ring_name) == [("p", "p")]
    assert "producer p sends what it sent in a former life: its generator begins again" in warnings(caplog)[0]
    assert len(warnings(caplog)) == 2


def test_what_is_remembered_is_bounded(server, ring_name, monkeypatch):
    monkeypatch.setattr(twins, "MOST_DIGESTS", 50)
    monkeypatch.setattr(twins, "MOST_PAIRS", 3)
    client = server.client()
    for i, seed in enumerate([*range(8), 7, 7, 7, 7, 7, 7]):
        with producer(server, ring_name, f"p{i}") as out:
            for sample in made(seed, 100):
                out.put(sample)
        assert client.hlen(key(ring_name, "content")) < 50 + 25
        assert client.hlen(key(ring_name, "content:old")) < 50 + 128
        assert client.hlen(key(ring_name, "twins")) <= 3
    assert 1 <= len(named(server, ring_name)) <= 3


def test_twins_of_whom_many_are_found_are_named_by_who_was_first(server, ring_name, caplog):
    caplog.set_level(logging.WARNING)
    for i in range(10):
        with producer(server, ring_name, f"task-{i}") as out:
            for sample in made(7, 60):
                out.put(sample)
    assert sorted(named(server, ring_name)) == [("task-0", f"task-{i}") for i in range(1, 10)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (number(1), number(1), True),
        (number(1), number(2), False),
        ({"x": np.zeros(4, np.float32)}, {"x": np.zeros(4, np.int32)}, False),
        ({"x": np.zeros(4, np.float32)}, {"x": np.zeros((2, 2), np.float32)}, False),
        ({"x": np.zeros(4, np.float32)}, {"y": np.zeros(4, np.float32)}, False),
        ({"x": np.zeros(10**7)}, {"x": np.r_[np.zeros(5 * 10**6), np.ones(5 * 10**6)]}, False),
        ({"x": np.zeros(0)}, {"x": np.zeros(0)}, True),
    ],
)
def test_a_digest_is_of_names_dtypes_shapes_and_values(one, other, same):
    found = [twins.digest({name: np.asarray(value) for name, value in sample.items()}) for sample in (one, other)]
    assert (found[0] == found[1]) == same


def of_one_seed(worker):
    yield from made(3, 90)


def test_workers_that_ignore_their_seed_are_told_on(server, ring_name):
    command = [sys.executable, "-m", "synthbroker", "generate", "test_twins:of_one_seed", "--ring", ring_name,
               "--workers", "2", "--name", "job", "--when-full", "drop-oldest", "--url", server.url]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SOON_S, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    assert "job-w0 and job-w1 send identical" in done.stderr or "job-w1 and job-w0 send identical" in done.stderr
    assert {name for pair in named(server, ring_name) for name in pair} == {"job-w0", "job-w1"}
