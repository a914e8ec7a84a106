"""What values a ring keeps out: at the producer, counted, with reason and recipe; what becomes of bad generators."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import synthbroker as sb
from synthbroker import checks, schema
from tools import SOON_S, key, meta, number, reasons

TEXTS = {
    "image:finite": "image:finite",
    "b:varied,finite a:range(0,1)": "a:range(0,1) b:finite,varied",
    "*:finite x:range(-1e-3,2.50)": "*:finite x:range(-0.001,2.5)",
    "x:range(,255)": "x:range(,255)",
    "x:range(3,)": "x:range(3,)",
    "none": "none",
}


@pytest.mark.parametrize("text", TEXTS)
def test_checks_are_written_in_one_way(text):
    assert checks.text_of(checks.parse(text)) == TEXTS[text]
    assert checks.parse(TEXTS[text]) == checks.parse(text)


def test_checks_may_be_a_dict_with_spaces():
    assert checks.text_of(checks.parse({"image": "finite, range(0, 1)", "*": "varied"})) == (
        "*:varied image:finite,range(0,1)"
    )


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"x": "positive"}, ValueError, "unknown check 'positive'"),
        ({"x": ""}, ValueError, "unknown check"),
        ({"x": "range(1,0)"}, ValueError, "lets everything pass, or nothing"),
        ({"x": "range(,)"}, ValueError, "lets everything pass, or nothing"),
        ({"x": "range(a,b)"}, ValueError, "'a' is not a number"),
        ({"x": "range(0,inf)"}, ValueError, "leave it out"),
        ({"x": "range(0,1),range(2,3)"}, ValueError, "twice"),
        ({"x y": "finite"}, ValueError, "cannot name a field"),
        ("finite", ValueError, "one word for each field"),
        ("x:finite x:varied", ValueError, "one word for each field"),
        ({"x": 3}, TypeError, "must be a text"),
        (["x"], TypeError, "must be a dict"),
    ],
)
def test_what_is_no_check_is_refused_before_anything_is_opened(ring_name, wanted, error, message):
    with pytest.raises(error, match=message):
        sb.Producer("unix:///nowhere", ring=ring_name, checks=wanted)


DTYPES = [name for name in schema.DTYPES if not name.startswith("c")]


@pytest.mark.parametrize("short", DTYPES)
def test_all_dtypes_can_be_checked(short):
    dtype = schema.dtype_of(short)
    low, high = (0, 1) if short == "bool" else (1, 2)  # float8_e8m0fnu has no zero
    array = np.array([low, high, high, low], dtype)
    every = checks.parse(f"x:finite,varied,range({low},{high})")
    assert checks.failed({"x": array}, every) is None
    assert "constant" in checks.failed({"x": np.array([high] * 100, dtype)}, every)
    if short != "bool":
        assert "not in" in checks.failed({"x": np.array([1, 4], dtype)}, every)


NAN = np.nan
VALUES = {
    "NaN": ([1, NAN], "finite", "x has NaN or infinity"),
    "infinity": ([1, -np.inf], "finite", "x has NaN or infinity"),
    "a number": ([1, 2], "finite", None),
    "too low": ([-0.5, 1], "range(0,)", "x has values from -0.5 to 1, which is not in range(0,)"),
    "too high": ([0, 1.5], "range(0,1)", "x has values from 0 to 1.5, which is not in range(0,1)"),
    "the bounds": ([0, 1], "range(0,1)", None),
    "NaN in a range": ([0.5, NAN], "range(0,1)", "x has values from nan to nan, which is not in range(0,1)"),
    "nothing in a range": ([], "range(0,1)", None),
    "constant": ([7] * 1000, "varied", "x is constant: all its 1000 values are 7.0"),
    "constant but for the last": ([7] * 999 + [8], "varied", None),
    "all NaN": ([NAN, NAN], "varied", "x is constant: all its 2 values are nan"),
    "one value": ([7], "varied", None),
    "no value": ([], "varied", None),
}


@pytest.mark.parametrize("what", VALUES)
def test_values_that_are_not_as_asked_are_told_why(what):
    values, asked, reason = VALUES[what]
    for dtype in np.float64, np.float32, ml_dtypes.bfloat16:
        found = checks.failed({"x": np.array(values, dtype)}, checks.parse({"x": asked}))
        assert found == (reason and (reason if dtype != ml_dtypes.bfloat16 else found))
        assert (found is None) == (reason is None)
    assert checks.failed({"y": np.array(values)}, checks.parse({"x": asked})) is None
    assert (checks.failed({"y": np.array(values)}, checks.parse({"*": asked})) is None) == (reason is None)


def test_whole_numbers_beyond_floats_are_compared_exactly():
    array = np.array([2**63 - 1, 2**63 - 2])
    assert checks.failed({"x": array}, checks.parse("x:range(,9223372036854774784)")) is not None


BAD = [("n", np.int64(-1)), ("x", np.full(4, 5, np.float32)), ("x", np.array([0, 1, NAN, 3], np.float32))]


def good(i):
    return {"n": i, "x": np.arange(i, i + 4, dtype=np.float32)}


def test_the_checks_of_a_ring_are_applied_by_all_its_producers(server, ring_name):
    asked = {"n": "range(0,)", "x": "finite,varied"}
    with (
        sb.Producer(server.url, ring=ring_name, name="first", capacity="5MB", checks=asked, producers=2) as first,
        sb.Producer(server.url, ring=ring_name, name="second") as second,  # says nothing: gets the ring's
    ):
        for out in first, second:
            for seed, (field, value) in enumerate(BAD):
                out.put(good(seed))
                out.put(good(seed) | {field: value}, recipe={"seed": seed})
    assert meta(server, ring_name)["checks"] == "n:range(0,) x:finite,varied"
    assert (first.stats.samples, first.stats.quarantined) == (second.stats.samples, second.stats.quarantined) == (3, 3)
    notes = [fields for _, fields in server.client().xrange(key(ring_name, "quarantine"))]
    assert {note[b"producer"] for note in notes} == {b"first", b"second"}
    assert sorted(json.loads(note[b"recipe"])["seed"] for note in notes) == [0, 0, 1, 1, 2, 2]
    assert sorted(set(reasons(server, ring_name))) == [
        "n has values from -1 to -1, which is not in range(0,)",
        "x has NaN or infinity",
        "x is constant: all its 4 values are 5.0",
    ]
    (batch,) = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=10)
    assert sorted(batch["n"].tolist()) == [0, 0, 1, 1, 2, 2]
    assert sb.status(ring_name, url=server.url).quarantined == 6


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"image": "finite"}, "checks name image, but"), ({"z": "range(0,1)"}, "complex numbers have no order")],
)
def test_a_check_that_no_sample_can_be_asked_is_refused(server, ring_name, asked, message):
    sample = {"x": np.zeros(3, np.float32), "z": np.zeros(2, np.complex64)}
    with pytest.raises(sb.SchemaError, match=message):
        sb.Producer("unix:///nowhere", ring=ring_name, checks=asked, schema="x:f32[3] z:c64[2]")
    out = sb.Producer(server.url, ring=ring_name, capacity="1MB", checks=asked)
    with pytest.raises(sb.SchemaError, match=message):
        out.put(sample)
    out.leave()


# -- a generator that makes mostly bad samples


def test_a_producer_whose_samples_fail_too_often_is_stopped_and_says_why(server, ring_name):
    out = sb.Producer(server.url, ring=ring_name, name="p", capacity="9MB", checks={"*": "finite"})

    def put_some():
        for i in range(10_000):
            out.put(number(i) if i < 50 or i % 4 == 0 else {"n": i, "x": np.full(4, NAN, np.float32)})
            if i % 10 == 0:
                out.flush()

    with pytest.raises(sb.BadSamplesError) as caught:
        put_some()
    out.leave()
    text = str(caught.value)
    assert f"producer 'p' of ring '{ring_name}' is stopped: 51 of its last 100 samples went to quarantine" in text
    assert "because x has NaN or infinity" in text
    assert 110 < out.stats.samples + out.stats.quarantined < 200


@pytest.mark.parametrize(("bad", "of", "stopped"), [(19, 19, False), (20, 20, True), (20, 40, False), (50, 100, False)])
def test_how_many_bad_samples_are_too_many(server, ring_name, bad, of, stopped):
    out = sb.Producer(server.url, ring=ring_name, capacity="9MB", finite=True, producers=1)
    for i in range(of):  # the good ones first
        out.put(number(i) if i < of - bad else {"n": i, "x": np.full(4, NAN, np.float32)})
    if stopped:
        with pytest.raises(sb.BadSamplesError, match=f"{bad} of its last {of}"):
            out.close()
    else:
        out.close()
    assert (meta(server, ring_name)["ended"] == "0") == stopped, "a producer of bad samples is not done"
    assert out.stats.samples == of - bad, "good ones are sent all the same"


def mostly_bad(worker):
    for i in range(10_000):
        yield {"n": i, "x": np.full(4, NAN, np.float32)}


def test_generate_stops_at_a_generator_of_bad_samples_and_says_so(server, ring_name):
    command = [sys.executable, "-m", "synthbroker", "generate", "test_checks:mostly_bad", "--ring", ring_name,
               "--finite", "--capacity", "5MB", "--url", server.url]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SOON_S, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == 1
    assert "synthbroker: error:" in done.stderr
    assert done.stderr.count("samples went to quarantine") == 1
    assert meta(server, ring_name)["ended"] == "0"
