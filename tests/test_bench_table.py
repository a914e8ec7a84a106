"""What the bench says it measured: the labels of a full and of a quick run, its table, and how far it is."""

import logging
import re
from pathlib import Path

import pytest

from synthbroker.bench import flows, gpus, measures, memory, run, table, workers
from synthbroker.bench.run import Outcome
from synthbroker.bench.table import Block, Line, Row
from synthbroker.errors import SynthbrokerError

README = Path(__file__).parents[1] / "README.md"


def labels(blocks):
    return [(line.number, line.what) for block in blocks for line in block.lines]


def test_the_tables_of_the_readme_have_the_labels_of_a_full_run():
    rows = re.findall(r"^ ?(\d+)  (.{72}) ", README.read_text(), re.MULTILINE)
    printed = [(int(number), what.rstrip()) for number, what in rows]
    full = labels(measures.blocks(quick=False))
    assert set(printed) <= set(full)
    assert [one for one in printed if one[0] < 15] == [one for one in full if one[0] < 15], "its large one, in order"


def test_each_measure_has_its_number_and_all_but_that_of_disks_a_bound():
    blocks = measures.blocks(quick=False)
    assert {number for number, _ in labels(blocks)} == set(measures.NUMBERS) == set(range(1, 18))
    judged = {line.number for block in blocks for line in block.lines if line.bound}
    assert judged == set(measures.NUMBERS) - {15}, "disks differ: no bound would be right for all"


@pytest.mark.parametrize(
    ("make", "full", "quick"),
    [
        (flows.crowd_block, "16 producers, 100 ms per 64 KiB", "2 producers, 100 ms per 64 KiB"),
        (flows.many_block, "64 producers, two 256³ uint8", "3 producers, two 32³ uint8"),
        (flows.in_put_block, "put, 16 MiB every 100 ms", "put, 256 KiB every 100 ms"),
        (memory.resident_block, "memory, 100,000 of 4 KiB:", "memory, 50 of 4 KiB:"),
        (gpus.generator_block, "16 MiB made on a GPU in 20 ms", "256 KiB made on a GPU in 2 ms"),
        (gpus.trainer_block, "steps of 20 ms on a GPU, 16 MiB each", "steps of 2 ms on a GPU, 256 KiB each"),
    ],
)
def test_a_quick_run_says_what_it_measured_instead(make, full, quick):
    assert full in make(quick=False).lines[0].what
    assert quick in make(quick=True).lines[0].what


class _Place:
    """Plays nothing, but notes what it is asked to play."""

    url, patience_s, seconds, folder = "redis://nobody", 1.0, 1.0, Path()

    def __init__(self, *, quick):
        self.quick, self.parts, self.options, self.troupe = quick, (), None, self

    def ring(self):
        return self

    def __enter__(self):
        return "ring"

    def __exit__(self, *error):
        pass

    def scaled(self, count, quick):
        return quick if self.quick else count

    def play(self, *parts, patience_s):
        self.parts = parts
        raise SynthbrokerError("not here")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("make", "index", "number_of"),
    [
        (flows.crowd_block, 0, lambda parts: f"{len(parts) - 1} producers"),
        (flows.many_block, 0, lambda parts: f"{len(parts) - 1} producers, two {parts[1].arguments[1].args[0]}³"),
        (flows.in_put_block, 0, lambda parts: f"{_size(parts[1].arguments[1].args[0])} every 100 ms"),
        (memory.resident_block, 0, lambda parts: f"{parts[1].arguments[2]:,} of {_size(parts[1].arguments[1])}"),
        (memory.resident_block, 1, lambda parts: f"{parts[1].arguments[2]:,} of {_size(parts[1].arguments[1])}"),
    ],
)
def test_what_is_measured_is_what_the_label_says(monkeypatch, quick, make, index, number_of):
    monkeypatch.setattr("synthbroker.machine.memory_limit_bytes", lambda: 10**12)
    block, place = make(quick=quick), _Place(quick=quick)
    name = list(block.contenders)[index]
    with pytest.raises(SynthbrokerError, match="not here"):
        block.contenders[name](place)
    what = next(line.what for line in block.lines if line.ours[0] == name)
    assert number_of(place.parts) in what


def _size(size_bytes):
    return f"{size_bytes // 2**20} MiB" if size_bytes >= 2**20 else f"{size_bytes // 2**10} KiB"


@pytest.mark.parametrize("num_workers", workers.WORKERS)
def test_the_ring_has_room_for_all_that_workers_hold(num_workers):
    place = _Place(quick=False)
    contender = workers.block(quick=False).contenders[workers.name_of(workers.SOURCES[0], "cheap", num_workers)]
    with pytest.raises(SynthbrokerError, match="not here"):
        contender(place)
    ring = place.parts[0].arguments[0]
    held = max(num_workers, 1) * (2 + 2 + 1) + 1  # in DataLoader's queue, ready, in the making; in the loop's hands
    warm_up = workers.BATCHES * workers._WARM_UP
    batch_bytes = workers.BATCH_SIZE * workers.SAMPLE_BYTES
    assert ring.options["capacity"] / batch_bytes > held
    assert (ring.options["capacity"] + 16e6) / batch_bytes < warm_up, "what is made ahead must not be timed"


def test_rows_without_figures_for_one_reason_are_one_line():
    rows = [Row(9, "a", "", 1.0), Row(16, "b", "ms", note="no GPU"), Row(16, "c", "ms", note="no GPU")]
    rows += [Row(17, "d", "ms", note="no GPU"), Row(17, "e", "ms", note="too late")]
    lines = list(table.text_lines(rows))
    assert lines == [
        table.text_of(rows[0]),
        "16, 17  3 lines cannot run here: no GPU",
        table.text_of(rows[4]),
    ]


def test_rows_are_written_as_they_come():
    def rows():
        yield Row(1, "a", "", 1.0)
        raise AssertionError("the first line waits for the second row")

    assert next(table.text_lines(rows())).startswith(" 1  a")


def test_a_block_that_takes_long_says_how_far_it_is(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "synthbroker.bench")
    monkeypatch.setattr(run, "TELL_EVERY_S", 0.0)
    block = Block({"ours": lambda place: {"rate": 1.0}}, (Line(3, "this", "", ("ours", "rate")),))
    outcome = Outcome()
    assert [row.ours for row in run.run([block], _Place(quick=False), outcome, repeats=2)] == [1.0]
    assert caplog.messages == ["measure 3: 1 of 2 runs done", "measure 3: 2 of 2 runs done"]
    monkeypatch.setattr(run, "TELL_EVERY_S", 60.0)
    list(run.run([block], _Place(quick=False), Outcome(), repeats=2))
    assert len(caplog.messages) == 2, "rows that come soon say it themselves"
