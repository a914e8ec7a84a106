"""One checkpoint for all ranks: another number of them goes on from it, and trains on what came after it, once."""

import itertools
import json
import os
import random
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch.distributed as dist

import synthbroker as sb
from servers import RealServer, eventually
from tools import SOON_S, check_ledger, counters, fill, key, lose_a_part, pending, processes, values

COUNT = 230
STEP_S = 0.1  # so that a run is killed before it has read everything


def train(
    rank: int, told: Any, *, ranks: int, life: int, folder: str, workers: int, every: int, **options: Any
) -> None:
    """Train as one rank, all in step; rank 0 makes a checkpoint now and then, and in the end."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init-{life}", rank=rank, world_size=ranks)
    last, log = Path(folder, "last.json"), Path(folder, f"log-{life}-{rank}")
    dataset = sb.RingDataset(ack="checkpoint", name="run", batch_size=3, wait_s=SOON_S, **options)
    loader = dataset.loader(num_workers=workers)
    if last.exists():
        loader.load_state_dict(json.loads(last.read_text())["data"])
    dist.barrier()

    def save(step: int) -> None:
        dist.barrier()  # all have written down what they trained on
        if rank == 0:
            state = {"life": life, "step": step, "data": loader.state_dict()}
            Path(folder, "new.json").write_text(json.dumps(state))
            Path(folder, "new.json").replace(last)
            loader.acknowledge()

    step = 0
    with log.open("a", buffering=1) as file:
        for step, batch in enumerate(loader, 1):
            fresh = [n for n, uses in zip(values(batch), batch.info.uses, strict=True) if uses < 2]
            file.write(json.dumps([step, fresh]) + "\n")
            if step % every == 0:
                save(step)
            Event().wait(STEP_S)
            dist.barrier()
    save(step)
    told.put(rank)
    dist.barrier()
    dist.destroy_process_group()


def trained(folder: Path, life: int, until: float = float("inf")) -> list[int]:
    """Read what all ranks of a life have trained on, up to a step."""
    lines = [json.loads(line) for log in folder.glob(f"log-{life}-*") for line in log.read_text().splitlines()]
    return [n for step, numbers in lines if step <= until for n in numbers]


def in_effect(folder: Path, lives: int, loaded: list[dict[str, Any] | None]) -> list[int]:
    """Give what the model in the end was trained on: of each life, what the checkpoint has that the next one loaded."""
    found = trained(folder, lives - 1)
    for state in loaded:
        if state is not None:
            found += trained(folder, state["life"], state["step"])
    return found


@pytest.mark.parametrize("bad", [0, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_ranks_goes_on_from_a_checkpoint(
    server: RealServer, ring_name: str, tmp_path: Path, workers: int, bad: int
) -> None:
    """All ranks are killed at any time, and begun again: 2, then 4, then 1, then 2. Every so many samples are bad."""
    draw = random.Random(f"{workers}")
    fill(server, ring_name, range(COUNT), size=30_000 if bad else 4)
    spoilt = range(2, COUNT, bad) if bad else range(0)
    for i in spoilt:
        lose_a_part(server, ring_name, i)
    told = {"folder": str(tmp_path), "workers": workers, "url": server.url, "ring": ring_name, "group": "g"}
    loaded: dict[int, dict[str, Any]] = {}  # by life: the newest checkpoint that was loaded from it
    for life, ranks in enumerate((2, 4, 1, 2)):
        how = told | {"life": life, "ranks": ranks, "every": draw.choice([1, 2, 3])}
        last = tmp_path / "last.json"
        if last.exists():
            state = json.loads(last.read_text())
            loaded[state["life"]] = state
        calls = [(rank,) for rank in range(ranks)]
        with processes(train, *calls, **how) as (_, queue):
            if life < 3:
                goal = draw.randint(2, 9)
                log = tmp_path / f"log-{life}-0"
                eventually(lambda log=log, goal=goal: log.exists() and len(log.read_text().splitlines()) >= goal,
                           "some steps are done", deadline_s=60)  # fmt: skip
            else:
                assert sorted(queue.get(timeout=60) for _ in range(ranks)) == list(range(ranks))
    assert sorted(in_effect(tmp_path, 4, list(loaded.values()))) == sorted(set(range(COUNT)) - set(spoilt))
    every = list(itertools.chain(*(trained(tmp_path, life) for life in range(4))))
    assert len(every) > COUNT - len(spoilt), "some came again"
    assert pending(server, ring_name, "g") == []
    assert counters(server, ring_name, "g")["doubled"] == 0
    notes = [fields[b"id"] for _, fields in server.client().xrange(key(ring_name, "quarantine"))]
    assert {int(number) for number in notes} == {1 + i for i in spoilt}, (
        "twice, if a rank died between note and goodbye"
    )
    assert not server.client().hget(f"sb:{{{ring_name}}}:runs:g", "run spares"), "forgotten when a checkpoint has them"
    check_ledger(server, ring_name, "g")
