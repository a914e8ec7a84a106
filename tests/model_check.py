"""A ring on a server and the model of it hold the same."""

from collections.abc import Iterable

from model import Model
from model_group import COUNTERS, Group
from rings import Rig
from synthbroker import ranges


def check_same(rig: Rig, model: Model, foreign: int) -> None:
    """Compare everything, with so many entries in the stream that somebody else wrote."""
    seen = rig.snapshot()
    seen = rig.balance(foreign=seen.stream_length - len(seen.live))
    assert seen.stream_length - len(seen.live) + seen["foreign"] == foreign
    assert (seen.live, seen["bytes"]) == (range(model.first, model.next), model.bytes)
    assert seen.leases == {name: (lease.cost, lease.count) for name, lease in model.leases.items()}
    assert seen.producers == {name: last for name, (_, last) in model.seqs.items()}
    assert (seen["duplicates"], seen["closed"]) == (model.duplicates, model.closings)
    assert (seen.meta["ended"] != "0") == model.ended
    assert seen.meta["waiting"] == ("0" if model.waiting is None else "{} {}".format(*model.waiting))
    assert set(seen.groups) == set(model.groups)
    for name, group in model.groups.items():
        found = seen.groups[name]
        assert max(found.last_delivered, model.first - 1) == max(group.reach, model.first - 1)
        assert {counter: found[counter] for counter in COUNTERS} == group.counters
        assert (found["since"], found.reuse) == (group.since, group.reuse)
        assert set(found.members) == group.consumers
        _check_samples(rig, name, group, found.pending)
        _check_runs(rig, name, group)


def _check_samples(rig: Rig, name: str, group: Group, count: int) -> None:
    pending = rig.keys.xpending_range(rig.key("samples"), name, "-", "+", 1000) if count else []
    held = {int(one["message_id"].split(b"-")[0]): one["consumer"].decode() for one in pending}
    assert held == group.pending
    uses = rig.keys.zrange(rig.key(f"uses:{name}"), 0, -1, withscores=True)
    assert {int(number): int(count) for number, count in uses} == group.uses


def _check_runs(rig: Rig, name: str, group: Group) -> None:
    seen = {k.decode(): v.decode() for k, v in rig.keys.hgetall(rig.key(f"runs:{name}")).items()}
    assert {k: v.split()[1:] for k, v in seen.items() if " " not in k} == {
        run: [f"l{known.life}", "1"] for run, known in group.runs.items()
    }
    assert {k: (v[0], numbers_in(ranges.parse(v[2:]))) for k, v in seen.items() if " " in k} == {
        f"{run} {one.token}": ("d" if one.done else "s", set(one.numbers))
        for run, known in group.runs.items()
        for one in known.checkpoints
    }
    evicted = rig.keys.zrange(rig.key(f"evicted:{name}"), 0, -1)
    assert {tuple(member.decode().split()) for member in evicted} == {(run, str(n)) for run, n in group.evicted}


def numbers_in(found: Iterable[ranges.Range]) -> set[int]:
    return {number for first, last in found for number in range(first, last + 1)}
