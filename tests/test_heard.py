"""What `status` makes of members that were not heard of lately, or have just begun: no rates, and it says so."""

import threading
from functools import partial

import pytest

import synthbroker as sb
from hands import ABOUT, TINY, hands_on
from servers import eventually
from synthbroker import admin, monitor
from synthbroker.replies import Incarnation
from tools import background, number

GENERATOR = ABOUT | {"blocked_share": 0.0, "sending_share": 0.75, "age_s": 60}
READER = {"starved_share": 0.8, "starved_ever_share": 0.7, "dry_share": 0.8, "age_s": 60}
MISSED_S, GONE_S = 12, 31


@pytest.fixture
def ring(any_server, ring_name):
    """Make a ring with a generator, and a group whose reader has read all and starves."""
    with hands_on(any_server.url, ring_name) as make:
        hands = make()
        hands.client = any_server.client()
        hands.ring.beat("producer", "maker", GENERATOR)
        hands.put(TINY, 4)
        hands.who = hands.reader("r", "train")
        hands.ring.beat("consumer", f"train {hands.who}", READER)
        hands.take(hands.who, "train", 4)
        yield hands


def miss(hands, which, member, for_s):
    hands.client.zincrby(f"{hands.ring.prefix}{which}", -for_s, member)


def test_advice_on_rates_is_made_from_who_was_heard_of(ring):
    assert ring.status().advice.startswith("broker- or network-bound: generators spend 75% of their time sending")
    assert "not counted" not in ring.status().advice


def test_a_generator_that_missed_its_heartbeats_is_no_ground_for_advice_on_rates(ring):
    miss(ring, "producers", "maker", MISSED_S)
    status = ring.status()
    assert status.producers["maker"].state == "alive", "it may yet be"
    assert status.advice.startswith("group train waits for a generator that has not been heard of for 12 s; see what")
    assert "(heartbeats come every 5 s; who sends none for 30 s counts as gone)" in status.advice
    assert (status.samples_per_s, status.bytes_per_s, status.blocked_share, status.sending_share) == (0, 0, 0, 0)
    ring.put(TINY, 1)
    miss(ring, "producers", "maker", MISSED_S)
    assert ring.status().advice.startswith("no advice on rates: the generator has not been heard of for ")


def test_those_that_were_heard_of_are_counted_and_the_others_named(ring):
    for name in "p", "q", "s":
        ring.ring.join_producer(Incarnation(name, "w1"), 0, GENERATOR | {"sending_share": 0.1})
    ring.ring.beat("producer", "s", GENERATOR | {"sending_share": 0.1, "blocked_share": 1.0})
    miss(ring, "producers", "maker", MISSED_S)
    miss(ring, "producers", "s", MISSED_S + 3)
    status = ring.status()
    assert status.advice.startswith("more generators: about 10 instead of 2")
    assert status.advice.endswith("; not counted here: 2 of 4 generators have not been heard of for 12 s")
    assert (status.samples_per_s, status.blocked_share, status.sending_share) == (5.0, 0.0, 0.1)
    miss(ring, "producers", "maker", GONE_S)
    assert ring.status().advice.endswith("; not counted here: 1 of 3 generators has not been heard of for 15 s")


def test_a_group_whose_readers_missed_their_heartbeats_gets_no_advice_on_rates(ring):
    miss(ring, "consumers", f"train {ring.who}", MISSED_S)
    status = ring.status()
    assert status.advice.startswith("no advice on rates: the reader of group train has not been heard of for 12 s; see")
    assert status.groups["train"].starved_share is None
    other = ring.reader("other", "train")
    ring.ring.beat("consumer", f"train {other}", READER | {"starved_share": 0.0})
    status = ring.status()
    assert status.groups["train"].starved_share == 0.0
    assert status.advice == (
        "nothing to do: neither side waits for the other; not counted here: 1 of 2 readers of group train has not "
        "been heard of for 12 s"
    )


def test_an_ended_ring_needs_nobody(ring):
    miss(ring, "producers", "maker", MISSED_S)
    ring.ring.end()
    assert ring.status().advice == "nothing to do: the ring has ended"


def test_what_a_group_without_a_reader_has_left_is_told_whether_or_not_more_can_come(ring):
    ring.put(TINY, 2)
    miss(ring, "consumers", f"train {ring.who}", GONE_S)
    ring.ring.leave_producer(ring.producer, GENERATOR | {"state": "closed"}, closed=True)
    left = "group train has 6 samples left to read and no reader"  # four were given to the reader that is gone
    assert ring.status().advice.startswith(f"no generator is alive, and {left}: start some")
    ring.ring.end()
    cure = f"start its training, or give them up with `synthbroker drop {ring.ring.name} --group train`"
    assert ring.status().advice == f"the ring has ended, but {left}: {cure}"


def test_who_has_just_begun_does_not_know_its_rates(ring):
    ring.ring.beat("consumer", f"train {ring.who}", READER | {"age_s": 0.0})
    assert ring.status().advice == "nothing yet: group train has just begun to read"


# -- who waits for a generator


def test_a_group_waits_for_a_generator_only_where_nothing_is_left_to_read(ring):
    ring.put(TINY, 20)
    ring.ring.leave_producer(ring.producer, GENERATOR | {"state": "closed"}, closed=True)
    assert ring.status().advice.startswith("no generator is alive; group train has 20 samples left to read: start some")
    ring.take(ring.who, "train", 19)
    assert ring.status().advice.startswith("no generator is alive; group train has 1 sample left to read: start some")
    ring.take(ring.who, "train", 1)
    assert ring.status().advice.startswith("no generator is alive, and group train waits for it: start some")


def test_what_is_left_may_be_too_little_for_a_round_of_all_ranks(ring):
    ring.put(TINY, 7)
    ring.ring.leave_producer(ring.producer, GENERATOR | {"state": "closed"}, closed=True)
    ring.ring.beat("consumer", f"train {ring.who}", READER | {"needs": 8})
    assert ring.status().groups["train"].consumers[str(ring.who)].needs == 8
    assert ring.status().advice.startswith("no generator is alive, and group train waits for it")
    ring.ring.beat("consumer", f"train {ring.who}", READER | {"needs": 7})
    assert ring.status().advice.startswith("no generator is alive; group train has 7 samples left to read")


def test_a_group_that_reads_again_what_it_had_waits_for_nobody_while_its_training_does_not(ring):
    again = ring.reader("r", "again", reuse="inf")
    ring.take(again, "again", 4)
    ring.ring.leave_group(ring.who, "train")
    ring.ring.leave_producer(ring.producer, GENERATOR | {"state": "closed"}, closed=True)
    for starved_share, waits in (0.0, False), (0.8, True):
        ring.ring.beat("consumer", f"again {again}", READER | {"starved_share": starved_share})
        assert ("group again waits for it" in ring.status().advice) == waits


# -- ever


@pytest.mark.parametrize("age_s", [0.0, 0.1, 60])
def test_what_the_only_member_says_is_what_all_of_them_say(ring, age_s):
    told = {"starved_share": 0.42, "starved_ever_share": 0.42, "dry_share": 0.1, "age_s": age_s}
    ring.ring.beat("consumer", f"train {ring.who}", told)
    ring.ring.beat("producer", "maker", {"blocked_share": 0.3, "blocked_ever_share": 0.3, "age_s": age_s})
    status = ring.status()
    group = status.groups["train"]
    assert (group.starved_share, group.starved_ever_share) == pytest.approx((0.42, 0.42))
    assert (status.blocked_share, status.blocked_ever_share) == pytest.approx((0.3, 0.3))


# -- what readers tell


def told_by_readers(server, ring, wanted=1):
    """Wait for the first records of so many readers, and give them."""

    def found():
        try:
            consumers = monitor.status(ring, url=server.url).groups["g"].consumers.values()
        except (sb.RingMissingError, KeyError):
            return []
        return [one for one in consumers if one.starved_share is not None]

    eventually(lambda: len(found()) == wanted, "readers have joined")
    return found()


def test_a_wait_for_the_ring_itself_is_no_starving(server, ring_name, reader):
    waits = background(lambda: next(iter(reader(batch_size=2))))
    threading.Event().wait(0.5)  # nobody can see from outside that it waits
    with sb.Producer(server.url, ring=ring_name) as out:
        out.put(number(0))
        (one,) = told_by_readers(server, ring_name)
        assert (one.starved_share, one.starved_ever_share, one.dry_share) == (0, 0, 0)
        assert monitor.status(ring_name, url=server.url).advice == "nothing yet: group g has just begun to read"
        out.put(number(1))
        waits.result(20)


@pytest.mark.parametrize(("ranks", "options", "needs"), [(1, {}, 1), (1, {"min_fill": 5}, 5), (2, {}, 6)])
def test_a_reader_tells_how_many_samples_it_needs(server, ring_name, dataset, ranks, options, needs):
    with sb.Producer(server.url, ring=ring_name) as out:
        out.put(number(0))
        datasets = [dataset(batch_size=3, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
        each = [background(partial(list, one)) for one in datasets]
        assert [one.needs for one in told_by_readers(server, ring_name, ranks)] == [needs] * ranks
        for i in range(1, 6):
            out.put(number(i))
        out.flush()
        admin.end(ring_name, url=server.url)
        for one in each:
            one.result(20)
