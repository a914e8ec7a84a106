"""What the bench does with a GPU, on the CPU or on a pretended GPU: that it measures what it says, not how fast."""

import itertools
from functools import partial

import pytest
import torch

from gpus import Gpus
from synthbroker.bench import cuda, gpus, loads, samples
from synthbroker.bench.gpus import Task
from synthbroker.bench.loads import RingPlan
from synthbroker.bench.place import at
from synthbroker.bench.processes import Part, Troupe
from synthbroker.bench.run import Outcome, run
from synthbroker.errors import SynthbrokerError
from tools import check_ledger, counters, meta

PATIENCE_S = 60
TASK = Task(products=2, side=64, device="cpu")
SECONDS = 0.1


@pytest.fixture(scope="module")
def play():
    """Give what plays a scene; its processes are kept, for they load torch."""
    troupe = Troupe(keep=True)
    yield lambda *parts: troupe.play(*parts, patience_s=PATIENCE_S)[0]
    troupe.kill()


@pytest.fixture
def ring(server, ring_name):
    return RingPlan(server.url, ring_name, {"codec": "raw", "capacity": "1MB", "producers": 1})


def all_was_used(server, ring_name):
    check_ledger(server, ring_name, "bench")
    return counters(server, ring_name, "bench")["acknowledged"] == int(meta(server, ring_name)["next"]) - 1 > 0


@pytest.mark.parametrize("before", [gpus._as_it_is, gpus._to_host])
def test_a_generator_puts_what_it_makes_until_its_time_is_up(server, ring_name, ring, play, before):
    figures = play(Part(gpus.generate, (TASK, SECONDS, ring, before)), Part(gpus.drain, (ring,)))
    assert figures["samples_per_s"] > 0
    assert figures["put_ms"] > 0
    assert all_was_used(server, ring_name)


def test_a_generator_without_a_ring_only_makes_them(play):
    assert play(Part(gpus.generate, (TASK, SECONDS, None)))["samples_per_s"] > 0


@pytest.mark.parametrize("way", gpus.WAYS.values(), ids=gpus.WAYS)
def test_a_trainer_takes_its_steps_and_then_what_is_left(server, ring_name, ring, play, way):
    producer = Part(loads.produce, (ring, partial(samples.floats, 4 * TASK.side**2)))
    assert play(Part(gpus.train, (TASK, SECONDS, ring, way)), producer)["steps_per_s"] > 0
    assert all_was_used(server, ring_name)


def test_a_trainer_without_a_ring_uses_one_batch_again_and_again(play):
    assert play(Part(gpus.train, (TASK, SECONDS, None)))["steps_per_s"] > 0


@pytest.mark.parametrize("make", [gpus.generator_block, gpus.trainer_block])
def test_all_contenders_give_the_figures_that_the_lines_are_made_of(server, monkeypatch, make):
    block = make(quick=True)
    monkeypatch.setattr(gpus, "_task", lambda place: TASK)
    with at(server.url, seconds=SECONDS, quick=True) as place:
        outcome = Outcome()
        rows = list(run([block], place, outcome, repeats=1))
    assert outcome.failures == {}
    assert all(row.ours > 0 and row.baseline > 0 for row in rows)
    assert {name for line in block.lines for name, _ in (line.ours, line.baseline)} == set(block.contenders)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_looked_for_once(play):
    class Place:
        quick, asked = True, 0

        @property
        def troupe(self):
            self.asked += 1
            return self

        def play(self, *parts, patience_s):
            return [play(*parts)]

        patience_s = PATIENCE_S

    place = Place()
    blocks = gpus.generator_block(quick=True), gpus.trainer_block(quick=True)
    for contender in (contender for block in blocks for contender in block.contenders.values()):
        with pytest.raises(SynthbrokerError, match="torch sees no GPU"):
            contender(place)
    assert place.asked == 1


def test_work_is_so_many_products_of_what_it_begins_with():
    one, three = cuda.Work("cpu", 8, 1), cuda.Work("cpu", 8, 3)
    assert torch.equal(three(), one(one(one())))
    begun = torch.eye(8)
    assert torch.equal(one(begun), one._matrix)
    assert three().data_ptr() != three.start.data_ptr()


def test_as_many_products_are_taken_as_fill_the_time(monkeypatch):
    ticks = itertools.count(step=0.064)  # for 32 of them, from one look at the clock to the next
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert cuda.products_for(0.02, "cpu", 8) == 10
    assert cuda.products_for(0.0001, "cpu", 8) == 1


def test_a_loop_waits_for_the_piece_of_work_before_the_last_one(monkeypatch):
    there = Gpus(monkeypatch, "lazy")
    x = there.tensor(torch.zeros(1))
    ahead, done = cuda.Ahead("cuda", most=2), []
    for number in range(1, 6):
        x.fill_(number)
        done.append((ahead.mark(), x.as_subclass(torch.Tensor).item()))
    assert done == [(False, 0), (False, 0), (True, 1), (True, 2), (True, 3)]
