"""Whatever is done to a ring, in whatever order: the scripts and the plain model of them say and hold the same."""

import contextlib
import secrets
from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from model import Holders, Model
from model_check import check_same, numbers_in
from rings import Rig, take
from servers import RunningServer
from synthbroker import ranges, runs
from synthbroker.errors import RingEndedError, RingMismatchError, ShutOutError
from synthbroker.replies import Answer, Incarnation
from synthbroker.runs import Run
from synthbroker.sharing import Shared
from wires import sample_of

SIZES = (8, 8, 3000, 9000)
COSTS = {nbytes: sample_of(nbytes).cost_bytes for nbytes in SIZES}
REUSES = {"once": "1", "thrice": "3", "ever": "inf"}
READERS = ("f/0", "f/1", "g/0")

names = st.sampled_from(["a", "b"])
groups = st.sampled_from(sorted(REUSES))
readers = st.sampled_from(READERS)
run_names = st.sampled_from(["f", "g"])
sizes = st.sampled_from(SIZES)


def seldom(times: int = 4) -> st.SearchStrategy[bool]:
    """Draw True about once in so many times."""
    return st.sampled_from([False] * (times - 1) + [True])


class RingMachine(RuleBasedStateMachine):
    """One ring on a server, and its model."""

    server: RunningServer

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(self.server, f"m-{secrets.token_hex(6)}")
        self.foreign = 0
        self.model: Model

    @initialize(
        block=st.booleans(),
        largest=st.integers(1, 9),
        max_samples=st.sampled_from([0, 0, 7, 4, 1]),
        producers=st.sampled_from([0, 0, 2]),
        declared=st.lists(groups, unique=True, max_size=1),
        joined=st.lists(st.tuples(groups, readers), min_size=1, max_size=6),
    )
    def make(
        self, block: bool, largest: int, max_samples: int, producers: int, declared: list[str], joined: list[Any]
    ) -> None:
        capacity = largest * COSTS[9000]
        self.asked: dict[str, Any] = {"capacity": capacity, "max_samples": max_samples, "producers": producers}
        self.policy = "block" if block else "drop-oldest"
        self.rig.open(self.policy, groups=tuple(declared), **self.asked)
        self.model = Model(block=block, capacity=capacity, max_samples=max_samples, producers=producers)
        for group in declared:
            self.model.declare(group)
        for name in "ab":
            self.join_producer(name, "w1")
        for group, reader in joined:
            self.join_group(group, reader, REUSES[group])

    # -- producers

    def join_producer(self, name: str, word: str) -> None:
        self.rig.producer(name, word)
        self.model.join_producer(name, word, 0)

    @rule(name=names, back=st.sampled_from([0, 0, 0, 0, -1, -2, 1]), count=st.integers(1, 6), nbytes=sizes)
    def put(self, name: str, back: int, count: int, nbytes: int) -> None:
        word, last = self.model.seqs[name]
        self._put(name, word, range(max(last + 1 + back, 1), max(last + 1 + back, 1) + count), nbytes)

    @rule(name=names, count=st.integers(3, 9))
    def put_many_tiny_ones(self, name: str, count: int) -> None:
        word, last = self.model.seqs[name]
        self._put(name, word, range(last + 1, last + 1 + count), 8)

    @rule(
        name=names,
        back=st.sampled_from([0, 0, 0, -1, -3, 1]),
        nbytes=sizes,
        runs=st.lists(st.tuples(seldom(4), st.integers(1, 5)), min_size=1, max_size=3),
        ahead=st.sampled_from([0, 0, 1, 2, 5]),
    )
    def put_some_that_share_parts(
        self, name: str, back: int, nbytes: int, runs: list[tuple[bool, int]], ahead: int
    ) -> None:
        word, last = self.model.seqs[name]
        seq = first = max(last + 1 + back, 1)
        samples: list[Shared] = []
        sharers: set[int] = set()
        for part, (alone, count) in enumerate(runs):
            for i in range(count):
                place = (None, 0) if alone else (part, i * nbytes)
                samples.append(Shared(sample_of(nbytes, seq), *place, COSTS[nbytes]))
                sharers |= set() if alone else {seq}
                seq += 1
        room = (ahead * COSTS[nbytes], ahead)
        expected = self.model.commit(name, word, [(n, COSTS[nbytes]) for n in range(first, seq)], sharers, room)
        numbered = list(enumerate(samples, first))
        self._compare(expected, lambda: self.rig.ring.commit(Incarnation(name, word), numbered, room))

    def _put(self, name: str, word: str, seqs: range, nbytes: int) -> None:
        expected = self.model.commit(name, word, [(seq, COSTS[nbytes]) for seq in seqs])
        self._compare(expected, lambda: self.rig.put(Incarnation(name, word), *seqs, nbytes=nbytes))

    def _compare(self, expected: tuple[str, int, Holders, int], commit: Callable[[], Answer]) -> None:
        try:
            answer = commit()
        except ShutOutError:
            assert expected[0] == "SHUT"
        except RingEndedError:
            assert expected[0] == "ENDED"
        else:
            word, last, holders, leased = expected
            assert (answer.word, answer.last, answer.granted) == (word, last, leased)
            assert answer.holder in holders

    @rule(
        name=names,
        some=st.lists(sizes, min_size=1, max_size=6),
        needed=st.sampled_from([0, 0, 0, 10_000]),
        all_or_none=st.booleans(),
    )
    def room(self, name: str, some: list[int], needed: int, all_or_none: bool) -> None:
        word, costs = self.model.seqs[name][0], [COSTS[nbytes] for nbytes in some]
        more: dict[str, Any] = {"free_bytes": needed} if all_or_none else {"costs": costs}
        expected = self.model.room(name, word, costs, more.get("free_bytes", 0), some=not all_or_none)
        try:
            answer = self.rig.ring.room(Incarnation(name, word), sum(costs), len(costs), **more)
        except RingEndedError:
            assert expected[0] == "ENDED"
        else:
            assert (answer.word, answer.granted) == (expected[0], expected[2])
            assert answer.holder in expected[1]

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data())
    def a_lease_runs_out(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.leases)))
        lease = self.model.leases[name]
        lease.over = True
        self.rig.keys.hset(self.rig.key("leases"), name, f"{lease.cost} {lease.count} 5.000")

    @rule(name=names, what=st.sampled_from(["beats", "restarts", "leaves", "closes", "older life writes"]))
    def something_happens_to_a_producer(self, name: str, what: str) -> None:
        word, last = self.model.seqs[name]
        if what == "beats":
            assert self.rig.ring.beat("producer", name, {})
            if name in self.model.leases:
                self.model.leases[name].over = False
        elif what == "restarts":
            self.join_producer(name, f"w{int(word[1:]) + 1}")
        elif what == "older life writes":
            self._put(name, "w0", range(last + 1, last + 2), 8)
        else:
            self.model.leave_producer(name, word, closed=what == "closes")
            self.rig.ring.leave_producer(Incarnation(name, word), {}, closed=what == "closes")

    # -- readers

    def join_group(self, group: str, reader: str, reuse: str) -> None:
        fits = self.model.join_group(group, f"{reader}:c1", reuse)
        try:
            self.rig.reader(group, reuse, reader)
        except RingMismatchError:
            assert not fits
        else:
            assert fits

    @precondition(lambda self: self.model.seats())
    @rule(data=st.data(), count=st.integers(1, 6), claim=st.booleans(), min_fill=st.sampled_from([1, 1, 1, 3]))
    def take(self, data: st.DataObject, count: int, claim: bool, min_fill: int) -> None:
        group, reader = data.draw(st.sampled_from(self.model.seats()))
        only = data.draw(st.sampled_from(["", "", "a"])) if group == "once" else ""
        self._take(group, reader, count, min_fill=min_fill, claim=claim, only=only)

    def _take(
        self, group: str, reader: str, count: int, *, min_fill: int = 1, claim: bool = False, only: str = ""
    ) -> None:
        taken = self.rig.take(
            Incarnation(*reader.split(":")),
            count,
            group,
            min_fill=min_fill,
            claim_after_s=60 if claim else -1,
            producers=[only] if only else [],
        )
        given = [(sample.number, sample.uses) for sample in taken.samples]
        said = self.model.take(group, reader, count, min_fill=min_fill, claim=claim, only=only, given=given)
        assert (taken.word, taken.held) == said

    @precondition(lambda self: self.model.seats())
    @rule(data=st.data())
    def take_one_batch_and_be_done_with_the_one_before(self, data: st.DataObject) -> None:
        group, reader = data.draw(st.sampled_from(self.model.seats()))
        before = self.model.groups[group].held_by(reader)
        self._take(group, reader, 2)
        self._acknowledge(group, before)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), strays=st.lists(st.integers(1, 40), max_size=2), again=st.booleans())
    def acknowledge(self, data: st.DataObject, strays: list[int], again: bool) -> None:
        group = data.draw(st.sampled_from(sorted(self.model.groups)))
        held = sorted(self.model.groups[group].pending)
        left = data.draw(st.integers(0, len(held)))
        self._acknowledge(group, [*held[left // 2 : len(held) - (left + 1) // 2], *strays], again=again)

    def _acknowledge(self, group: str, numbers: list[int], *, again: bool = False) -> None:
        expected = self.model.acknowledge(group, numbers, again=again)
        assert self.rig.script("ack", self.rig.ring.epoch, group, int(again), *numbers) == ["OK", *expected]

    @rule(group=groups, reader=readers, what=st.sampled_from(["joins", "joins", "differs", "beats"]))
    def something_happens_to_a_reader(self, group: str, reader: str, what: str) -> None:
        member, seats = f"{reader}:c1", self.model.groups[group].registered if group in self.model.groups else {}
        if what == "joins":
            self.join_group(group, reader, REUSES[group])
        elif what == "differs" and group in self.model.groups and self.model.groups[group].reuse:
            self.join_group(group, reader, "7")
        elif what == "beats":
            assert self.rig.ring.beat("consumer", f"{group} {member}", {}) == (member in seats)
            if member in seats:
                seats[member] = False

    @precondition(lambda self: self.model.seats())
    @rule(data=st.data(), silently=st.booleans(), really=seldom(2))
    def a_reader_is_gone(self, data: st.DataObject, silently: bool, really: bool) -> None:
        seats = self.model.seats()
        holding = [(group, reader) for group, reader in seats if self.model.groups[group].held_by(reader)]
        group, reader = data.draw(st.sampled_from(holding or seats))
        if not (really or holding):
            return
        if silently:
            self.rig.keys.zadd(self.rig.key("consumers"), {f"{group} {reader}": 5})
            self.model.groups[group].registered[reader] = True
        else:
            self.rig.ring.leave_group(Incarnation(*reader.split(":")), group)
            del self.model.groups[group].registered[reader]

    @rule(group=groups, reader=readers)
    def who_is_not_registered_must_join(self, group: str, reader: str) -> None:
        if (group, f"{reader}:c1") not in self.model.seats():
            who = Incarnation(reader, "c1")
            assert take(self.rig.ring, who, group, 1, claim_after_s=60) is None

    # -- runs

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), name=run_names, again=seldom(3))
    def a_run_begins(self, data: st.DataObject, name: str, again: bool) -> None:
        group = data.draw(st.sampled_from(sorted(self.model.groups)))
        if again or name not in self.model.groups[group].runs:
            self.model.groups[group].begin(name)
            runs.shut_out(self.rig.ring, group, self._run(group, name))

    def _run(self, group: str, name: str) -> Run:
        return Run(name, f"l{self.model.groups[group].runs[name].life}", checkpoints=True)

    def _draw_run(self, data: st.DataObject) -> tuple[str, str]:
        return data.draw(st.sampled_from(self._runs()))

    def _runs(self) -> list[tuple[str, str]]:
        return [(group, run) for group in sorted(self.model.groups) for run in sorted(self.model.groups[group].runs)]

    @precondition(lambda self: self._runs())
    @rule(data=st.data(), late=seldom(5))
    def a_run_makes_a_checkpoint(self, data: st.DataObject, late: bool) -> None:
        self._stage(data, late)

    def _stage(self, data: st.DataObject, late: bool) -> None:
        group, name = self._draw_run(data)
        known = self.model.groups[group].runs[name].checkpoints
        held = [n for n, who in self.model.groups[group].pending.items() if who.startswith(f"{name}/")]
        staged = {n for one in known if not one.done for n in one.numbers}
        numbers = sorted(set(held) - staged)[: data.draw(st.integers(1, 5))]
        run, serial = self._run(group, name), max([one.serial for one in known], default=0) + 1
        if late:
            with pytest.raises(ShutOutError):
                runs.stage(self.rig.ring, group, Run(name, "l0", checkpoints=True), f"{serial}.x", [(1, 1)])
        elif numbers:
            token = f"{serial}.{run.life}"
            self.model.groups[group].stage(name, token, numbers)
            runs.stage(self.rig.ring, group, run, token, ranges.of(numbers))

    @precondition(lambda self: not self.model.block and self.model.seats())
    @rule(data=st.data(), name=run_names, count=st.integers(2, 9))
    def the_ring_turns_round_under_a_reader_of_a_run(self, data: st.DataObject, name: str, count: int) -> None:
        group = data.draw(st.sampled_from(sorted({group for group, _ in self.model.seats()})))
        if name not in self.model.groups[group].runs:
            self.model.groups[group].begin(name)
            runs.shut_out(self.rig.ring, group, self._run(group, name))
        self.join_group(group, f"{name}/0", REUSES[group])
        self._take(group, f"{name}/0:c1", count)
        self._stage(data, late=False)
        word, last = self.model.seqs["a"]
        self._put("a", word, range(last + 1, last + 1 + count), 9000)

    @precondition(lambda self: self._runs())
    @rule(data=st.data())
    def a_run_finishes(self, data: st.DataObject) -> None:
        group, name = self._draw_run(data)
        serials = [one.serial for one in self.model.groups[group].runs[name].checkpoints]
        serial = data.draw(st.sampled_from([0, *serials]))
        expected = self.model.finish(group, name, serial)
        life = self._run(group, name).life
        reply = self.rig.script("finish", self.rig.ring.epoch, group, name, life, f"{serial}.{life}", "")
        assert reply == ["OK", *expected]

    @precondition(lambda self: self._runs())
    @rule(data=st.data(), go_on=st.booleans())
    def a_run_is_killed_and_goes_on_from_a_checkpoint(self, data: st.DataObject, go_on: bool) -> None:
        group, name = self._draw_run(data)
        tokens = [one.token for one in self.model.groups[group].runs[name].checkpoints]
        token = data.draw(st.sampled_from([*tokens[-2:], *tokens, "", "3.never"]))
        heir = Run(name, f"l{self.model.groups[group].runs[name].life + 1}", checkpoints=True)
        gone, known, later, evicted = self.model.resume(group, name, token, go_on=go_on)
        found = runs.resume(self.rig.ring, group, heir, token, go_on=go_on)
        assert found is not None
        assert (found.gone, found.known) == (gone, known)
        assert numbers_in(found.later) == later
        assert numbers_in(found.evicted) == evicted

    # -- the ring itself

    @rule(data=st.data(), what=st.sampled_from(["somebody writes", "group dropped", "ends"]), really=seldom())
    def something_happens_to_the_ring(self, data: st.DataObject, what: str, really: bool) -> None:
        if what == "somebody writes":
            self._write_by_hand(data.draw(st.booleans()))
        elif what == "ends" and really:
            self.model.end()
            self.rig.ring.end()
        elif what == "group dropped" and really and self.model.groups:
            group = data.draw(st.sampled_from(sorted(self.model.groups)))
            self.model.drop_group(group)
            self.rig.ring.drop(group)

    def _write_by_hand(self, right_behind: bool) -> None:
        """Write an entry behind the newest sample's id, or with an id of the server's own, far beyond ours."""
        with contextlib.suppress(redis.ResponseError):  # an id too low: somebody wrote behind it before
            entry_id = f"{self.model.next - 1}-7" if right_behind else "*"
            self.rig.keys.xadd(self.rig.key("samples"), {"hello": "world"}, entry_id)
            self.foreign += 1

    @precondition(lambda self: self.model.ended)
    @rule()
    def reopen(self) -> None:
        self.model.reopen()
        self.rig.open(self.policy, reopen=True, **self.asked)

    @invariant()
    def everything_is_the_same(self) -> None:
        check_same(self.rig, self.model, self.foreign)

    def teardown(self) -> None:
        self.rig.ring.drop()
        assert {key for key in self.rig.all_keys() if self.rig.keys.pttl(key) == -1} == set()
        self.rig.way.close()


def run(server: RunningServer, examples: int, steps: int, *, shrink: bool) -> None:
    machine = type("Machine", (RingMachine,), {"server": server})
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    phases = [Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if shrink else [])]
    how = settings(
        deadline=None, max_examples=examples, stateful_step_count=steps, suppress_health_check=slow, phases=phases
    )
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.slow
def test_the_scripts_do_what_the_model_does(server: RunningServer) -> None:
    run(server, examples=150, steps=50, shrink=True)


def test_every_version_of_the_server_does_what_the_model_does(any_server: RunningServer) -> None:
    run(any_server, examples=10, steps=40, shrink=False)
