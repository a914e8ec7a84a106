"""The list of bad samples: what their producers kept back and what readers could not use, with the recipe."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest

import synthbroker as sb
from synthbroker import admin
from test_damage import HOSTILE, MIXED_SIZE
from tools import IN_PARTS, SOON_S, commit_raw, drain, fill, key, meta, number, raw_ring


def run(server, *words):
    command = [sys.executable, "-m", "synthbroker", "quarantine", *words, "--url", server.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON_S, check=False)


def damage(server, ring_name, sample):
    """Change some bytes of a sample that lies in a part."""
    client = server.client()
    ((_, entry),) = client.xrange(key(ring_name, "samples"), f"{sample}-0", f"{sample}-0")
    where, _, _ = entry[b"parts"].decode().partition(":")
    uid, _, start = where.partition("@")
    client.setrange(key(ring_name, f"part:{uid}:0"), int(start or 0) + 100, b"damage")


@pytest.fixture
def spoilt(server, ring_name):
    """Give a ring of whose samples its producer kept one back, and a reader could not use another."""
    with sb.Producer(server.url, ring=ring_name, name="maker", capacity="9MB", checks="x:finite") as out:
        for i in range(4):
            out.put(number(i, IN_PARTS), recipe={"seed": i})
        out.put({"n": 4, "x": np.full(IN_PARTS, np.nan, np.float32)}, recipe={"seed": 4})
        out.flush()
        damage(server, ring_name, 2)
    admin.end(ring_name, url=server.url)
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [0, 2, 3]
    return ring_name


def test_bad_samples_are_listed_with_reason_producer_and_recipe(server, spoilt):
    kept_back, damaged = sb.quarantine(spoilt, url=server.url)
    assert dataclasses.replace(kept_back, noted_s=0) == sb.BadSample(
        0, None, "maker", "x has NaN or infinity", {"seed": 4}
    )
    assert (damaged.number, damaged.producer, damaged.recipe) == ("2", "maker", {"seed": 1})
    assert "checksum" in damaged.reason
    assert abs(damaged.noted_s - time.time()) < 600
    assert kept_back.noted_s <= damaged.noted_s


def test_the_command_shows_them_and_forgets_them_when_told(server, spoilt):
    done = run(server, spoilt)
    assert (done.returncode, done.stderr) == (0, "")
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["noted", "sample", "producer", "reason", "recipe"]
    assert first.split()[2:] == ["-", "maker", "x", "has", "NaN", "or", "infinity", '{"seed":', "4}"]
    assert second.split()[2:4] == ["2", "maker"]
    assert second.rstrip().endswith('{"seed": 1}')
    found = json.loads(run(server, spoilt, "--json", "--clear").stdout)
    assert [one["recipe"]["seed"] for one in found] == [4, 1]
    assert "no bad samples" in run(server, spoilt).stdout
    assert meta(server, spoilt)["quarantined"] == "2", "the count stays"
    assert sb.status(spoilt, url=server.url).quarantined == 2


@pytest.mark.parametrize("what", [what for what in HOSTILE if "head" not in what])
def test_a_hostile_sample_whose_recipe_can_be_read_is_listed_with_it(server, ring_name, what):
    size = {24: 4, 16_008: IN_PARTS}.get(HOSTILE[what].payload_bytes, MIXED_SIZE)
    fill(server, ring_name, [0], size=size, producers=0)
    with raw_ring(server, ring_name) as ring:
        commit_raw(ring, [HOSTILE[what]])
    admin.end(ring_name, url=server.url)
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [0]
    (note,) = sb.quarantine(ring_name, url=server.url)
    assert (note.number, note.recipe) == ("2", {"n": 2})
    assert note.producer.startswith("hostile-")
    assert note.reason


def test_what_others_wrote_into_the_quarantine_does_no_harm(server, ring_name):
    fill(server, ring_name, [0])
    client, stream = server.client(), key(ring_name, "quarantine")
    client.xadd(stream, {"hello": "world"})
    client.xadd(stream, {"id": "1-5", "reason": "foreign entry"})
    client.xadd(stream, {"reason": b"\x1b[31m\xff" + b"x" * 10_000, "producer": "\r\n", "recipe": "[" * 100_000})
    one, two, three = sb.quarantine(ring_name, url=server.url)
    assert dataclasses.astuple(one)[1:] == (None, None, "", {})
    assert dataclasses.astuple(two)[1:] == ("1-5", None, "foreign entry", {})
    assert three.reason.isprintable()
    assert len(three.reason) == 500
    assert (three.producer, three.recipe) == ("\N{REPLACEMENT CHARACTER}" * 2, {})
    assert "\x1b" not in run(server, ring_name).stdout


def test_a_ring_that_is_not_there_is_named(server, ring_name):
    with pytest.raises(sb.RingMissingError, match=ring_name):
        sb.quarantine(ring_name, url=server.url)
