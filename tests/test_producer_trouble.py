"""What a producer does when the server goes, comes back empty, refuses, or has no memory; and samples of great size."""

import logging
from collections.abc import Callable

import numpy as np
import psutil
import pytest

import synthbroker as sb
from lossy import lossy
from peers import hangs_up, peer, says
from servers import RealServer, eventually
from tools import (
    IN_PARTS,
    SOON_S,
    background,
    check_ledger,
    drain,
    fill,
    fill_up,
    key,
    lasting_parts,
    meta,
    number,
    owned_parts,
    pending,
)

OwnServer = Callable[..., RealServer]
MB = 1_000_000


# -- the server goes


def test_a_server_that_comes_back_empty_is_filled_again(own_server: OwnServer, ring_name, caplog):
    server = own_server()
    with sb.Producer(server.url, ring=ring_name, capacity="7MB", producers=1, info={"a": 1}, codec="raw") as out:
        for i in range(5):
            out.put(number(i, IN_PARTS))
        out.flush()
        before = meta(server, ring_name)
        server.restart()
        for i in range(5, 10):
            out.put(number(i, IN_PARTS))
        out.flush()
        after = meta(server, ring_name)
        assert out.stats.rejoined == 1
        assert out.stats.samples == 10
    assert after["epoch"] != before["epoch"]
    assert {k: after[k] for k in ("capacity", "info", "schema", "producers")} == {
        "capacity": "7000000", "info": '{"a": 1}', "schema": before["schema"], "producers": "1",
    }  # fmt: skip
    assert "5 samples were committed before" in caplog.text
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [5, 6, 7, 8, 9]
    check_ledger(server, ring_name, "g")


def test_whoever_comes_back_first_makes_the_ring_as_it_was(own_server: OwnServer, ring_name):
    server = own_server()
    settings = {"capacity": "7MB", "when_full": "drop-oldest", "max_samples": 5, "info": {"a": 1}, "finite": True}
    with sb.Producer(server.url, ring=ring_name, **settings) as first:
        first.put(number(0))
        first.flush()
        with sb.Producer(server.url, ring=ring_name) as second:  # takes what is there
            second.put(number(1))
            second.flush()
            before = meta(server, ring_name)
            server.restart()
            second.put(number(2))
            assert second.flush(SOON_S)
        first.put(number(3))
        assert first.flush(SOON_S)
    after = meta(server, ring_name)
    same = ("capacity", "when_full", "max_samples", "info", "checks", "schema", "producers")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_a_sample_for_quarantine_does_no_harm_to_a_ring_that_is_gone(own_server: OwnServer, ring_name):
    server = own_server()
    with sb.Producer(server.url, ring=ring_name, capacity="7MB", producers=1, finite=True) as out:
        out.put(number(0))
        out.flush()
        server.restart()
        out.put({"n": 1, "x": np.full(4, np.nan, np.float32)})
        out.put(number(2))
        assert out.flush(SOON_S)
        assert (out.stats.samples, out.stats.quarantined) == (2, 1)
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [2]


def test_a_sample_for_quarantine_waits_for_the_server(own_server: OwnServer, ring_name):
    server = own_server()
    with sb.Producer(server.url, ring=ring_name, capacity="7MB", producers=1, finite=True) as out:
        out.put(number(0))
        out.flush()
        server.kill()
        out.put({"n": 1, "x": np.full(4, np.nan, np.float32)})
        out.put(number(2))
        assert not out.flush(0.2)
        server.restart()
        assert out.flush(SOON_S)
        assert (out.stats.samples, out.stats.quarantined) == (2, 1)


def test_a_server_that_is_away_for_a_while_loses_nothing(own_server: OwnServer, ring_name, caplog):
    server = own_server()
    with sb.Producer(server.url, ring=ring_name, capacity="7MB", producers=1) as out:
        out.put(number(0))
        out.flush()
        server.kill()
        out.put(number(1))
        eventually(lambda: "trying again for up to 300 s" in caplog.text, "it is noticed and told")
        server.restart()
        assert out.flush(SOON_S)
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [1]


@pytest.mark.parametrize("call", ["put", "flush", "close"])
def test_a_server_that_stays_away_is_named(own_server: OwnServer, ring_name, call):
    server = own_server()
    out = sb.Producer(server.url, ring=ring_name, capacity="7MB", producers=1, reconnect_s=0.3)
    out.put(number(0))
    out.flush()
    server.kill()
    out.put(number(1))
    eventually(lambda: not out._sender.alive, "it has given up")
    with pytest.raises(sb.ServerGoneError, match=r"redis\.sock") as caught:
        out.put(number(2)) if call == "put" else getattr(out, call)()
    assert isinstance(caught.value.__cause__, sb.ServerGoneError)
    if call != "close":
        with pytest.raises(sb.ServerGoneError):
            out.close()


def test_a_producer_may_start_before_its_server(own_server: OwnServer, ring_name):
    server = own_server()
    server.kill()
    done = background(lambda: fill(server, ring_name, range(3)))
    with pytest.raises(TimeoutError):
        done.result(0.3)
    server.restart()
    assert done.result(SOON_S).samples == 3


def test_no_server_at_all_is_told_when_patience_ends(tmp_path, ring_name):
    with pytest.raises(sb.ServerGoneError, match=r"nothing\.sock"):
        sb.Producer(f"unix://{tmp_path}/nothing.sock", ring=ring_name, reconnect_s=0.2).put(number(0))


@pytest.mark.parametrize("size", [4, IN_PARTS])
@pytest.mark.parametrize("script", ["room", "commit"])
def test_an_answer_that_is_lost_doubles_nothing(own_server: OwnServer, ring_name, size, script):
    server = own_server()
    with lossy(server) as wire:
        with sb.Producer(wire.url, ring=ring_name, capacity="7MB", producers=1, codec="raw") as out:
            for i in range(40):
                if i in (10, 20, 30):
                    out.flush()
                    wire.lose_answer_to(script)
                out.put(number(i, size))
        assert wire.lost == (3 if script == "commit" or size == IN_PARTS else 0)
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == list(range(40))
    check_ledger(server, ring_name, "g")
    lasting = lasting_parts(server, ring_name)
    assert lasting == owned_parts(server, ring_name), "every live sample's part lasts, and no other"
    assert bool(lasting) == (size == IN_PARTS)
    if script == "commit":
        assert int(meta(server, ring_name)["duplicates"]) >= 3


@pytest.mark.parametrize("emptied", [False, True])
def test_a_producer_goes_on_whose_first_word_is_lost(own_server: OwnServer, ring_name, emptied):
    server = own_server()
    with lossy(server) as wire:
        wire.lose_answer_to("join")
        if emptied:
            wire.on_loss = server.client().flushall
        with sb.Producer(wire.url, ring=ring_name, capacity="7MB", producers=1) as out:
            out.put(number(1))
        assert wire.lost == 1
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [1]


def test_a_server_that_forgets_the_scripts_is_told_them_again(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="7MB", producers=1, codec="raw") as out:
        for i in range(20):
            server.client().script_flush()
            out.put(number(i, IN_PARTS if i % 2 else 4) | {"x": np.full(4, i, np.float32)})
            out.flush()
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == list(range(20))


# -- the server refuses


def test_a_wrong_password_is_told_at_once(own_server: OwnServer, ring_name):
    server = own_server(requirepass="right")
    url = f"unix://:wrong@{server.socket_path}"
    with pytest.raises(sb.ServerRefusedError, match="password") as caught:
        sb.Producer(url, ring=ring_name).put(number(0))
    assert "wrong@" not in str(caught.value)
    with pytest.raises(sb.ServerRefusedError, match="password"):
        sb.Producer(f"unix://{server.socket_path}", ring=ring_name).put(number(0))
    fill(server, ring_name, [0])


def test_a_server_of_something_else_is_told_at_once(ring_name):
    with peer(says(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as url:
        with pytest.raises(sb.ServerRefusedError, match="not a Redis"):
            sb.Producer(url, ring=ring_name).put(number(0))


def test_one_that_hangs_up_is_tried_for_as_long_as_asked(ring_name):
    with peer(hangs_up) as url:
        with pytest.raises(sb.ServerGoneError, match=r"127\.0\.0\.1"):
            sb.Producer(url, ring=ring_name, reconnect_s=0.2).put(number(0))


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "", "file://nowhere/broker.json"])
def test_a_url_that_leads_nowhere_is_told_at_once(ring_name, url):
    with pytest.raises((sb.EndpointError, ValueError)):
        sb.Producer(url, ring=ring_name).put(number(0))


def test_keys_of_something_else_are_told_at_once(server, ring_name):
    server.client().set(key(ring_name, "meta"), "a string")
    with pytest.raises(sb.ServerRefusedError, match="something else uses the ring's keys"):
        sb.Producer(server.url, ring=ring_name).put(number(0))


# -- the server is out of memory


def test_without_server_memory_block_waits_and_goes_on(own_server: OwnServer, ring_name):
    server = own_server(maxmemory="60mb")
    with sb.Producer(server.url, ring=ring_name, capacity="20MB", producers=1, codec="raw") as out:
        out.put(number(0, 250_000))
        out.flush()
        ballast = fill_up(server)
        out.put(number(1, 250_000))
        out.put(number(2, 250_000))
        eventually(lambda: out.stats.blocked_s > 0, "it waits")
        assert not out.flush(0.1)
        server.client().delete(*ballast)
        assert out.flush(SOON_S)
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [0, 1, 2]
    check_ledger(server, ring_name, "g")


def test_without_server_memory_a_producer_says_so(own_server: OwnServer, ring_name, monkeypatch, caplog):
    monkeypatch.setattr("synthbroker.waiting.WARN_EVERY_S", 0.0)
    server = own_server(maxmemory="60mb")
    out = sb.Producer(server.url, ring=ring_name, capacity="20MB", codec="raw", wait_s=0.5)
    out.put(number(0, 250_000))
    out.flush()
    fill_up(server)
    out.put(number(1, 250_000))
    with pytest.raises(sb.RingFullError, match=r"memory limit.*; raise its maxmemory, or remove") as caught:
        out.flush()
    assert "holds it up" not in str(caught.value)  # nobody does: no group reads it
    with caplog.at_level(logging.WARNING), pytest.raises(sb.RingFullError):
        out.close()
    assert "memory" in caplog.text


def test_a_producer_goes_on_with_a_server_that_has_got_too_small_for_its_ring(own_server: OwnServer, ring_name):
    server = own_server(maxmemory="60mb")
    with sb.Producer(server.url, ring=ring_name, capacity="20MB", producers=1, codec="raw") as out:
        out.put(number(0))
        out.flush()
        server.client().config_set("maxmemory", 10_000_000)
        server.client().flushall()
        out.put(number(1))
        assert out.flush(SOON_S)
        assert out.stats.rejoined == 1
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [1]
    with pytest.raises(sb.RingTooLargeError):
        sb.Producer(server.url, ring=ring_name, capacity="20MB", reopen=True).put(number(2))


def test_without_server_memory_drop_oldest_makes_room_by_itself(own_server: OwnServer, ring_name):
    server = own_server(maxmemory="60mb")
    settings = {"capacity": "20MB", "when_full": "drop-oldest", "groups": ("g",), "producers": 1, "codec": "raw"}
    with sb.Producer(server.url, ring=ring_name, **settings) as out:
        for i in range(15):
            out.put(number(i, 250_000))
        out.flush()
        fill_up(server)
        for i in range(15, 40):
            out.put(number(i, 250_000))
        assert out.flush(SOON_S)
        assert out.stats.samples == 40
    found = drain(sb.Consumer(server.url, ring=ring_name, group="g"))
    assert found == list(range(40 - len(found), 40))
    assert len(found) > 5
    check_ledger(server, ring_name, "g")


# -- great size


def test_a_burst_of_many_images_in_one_call(own_server: OwnServer, ring_name):
    server = own_server()
    images = np.random.default_rng(0).integers(0, 256, (320, 224, 224, 3)).astype(np.float64)
    with sb.Producer(server.url, ring=ring_name, capacity="2GB", producers=1) as out:
        out.put_batch({"image": images, "label": np.arange(320)})
    assert out.stats.samples == 320
    seen = 0
    for batch in sb.Consumer(server.url, ring=ring_name, group="g", batch_size=8):
        assert np.array_equal(batch["image"], images[batch["label"]])
        seen += len(batch["label"])
    assert seen == 320


@pytest.mark.slow
@pytest.mark.skipif(psutil.virtual_memory().available < 12e9, reason="needs 12 GB of free memory")
def test_a_pair_of_large_volumes_comes_back(own_server: OwnServer, ring_name):
    server = own_server()
    bits = np.random.default_rng(0)
    sample = {name: bits.integers(0, 2**32, (512,) * 3, np.uint32).view(np.float32) for name in ("image", "label")}
    with sb.Producer(server.url, ring=ring_name, capacity="3GB", producers=1) as out:
        out.put(sample, copy=False)
    assert int(meta(server, ring_name)["bytes"]) > 2**30
    (batch,) = sb.Consumer(server.url, ring=ring_name, group="g")
    for name, volume in sample.items():
        assert np.array_equal(batch[name][0].view(np.uint32), volume.view(np.uint32))
    assert pending(server, ring_name, "g") == []
