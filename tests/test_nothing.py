"""What a reader says when there is nothing."""

import logging

import pytest

import synthbroker as sb
from servers import RealServer


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loop_over_a_ring_that_was_read_says_that_there_is_nothing(
    server: RealServer, ring_name: str, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with sb.Producer(server.url, ring=ring_name, producers=1) as out:
        out.put({"x": 1.0})
    for expected in (1, 0):
        dataset = sb.RingDataset(server.url, ring=ring_name, group="train")
        with caplog.at_level(logging.WARNING, "synthbroker"):
            assert len(list(dataset.loader(num_workers=num_workers))) == expected
        assert ("there was nothing to read" in caplog.text) == (expected == 0)


def test_a_loop_over_less_than_a_batch_says_that_it_left_it_out(
    server: RealServer, ring_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with sb.Producer(server.url, ring=ring_name, producers=1) as out:
        out.put({"x": 1.0})
    with caplog.at_level(logging.WARNING, "synthbroker"):
        assert not list(sb.Consumer(server.url, ring=ring_name, group="train", batch_size=3, drop_last=True))
    assert "less than a batch of 3, which drop_last leaves out" in caplog.text


def test_a_reader_of_a_ring_that_is_not_there_says_so_soon(
    server: RealServer, ring_name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthbroker.waiting._FIRST_WARNING_S", 0.5)
    with pytest.raises(sb.StarvedError, match=f"there is no ring '{ring_name}'"):
        list(sb.Consumer(server.url, ring=ring_name, group="train", wait_s=2))
    assert f"there is no ring '{ring_name}'" in caplog.text
