"""What `status` says of a ring, against what was done to it by hand."""

import dataclasses
import json

import pytest

from hands import ABOUT, BIG, TINY, Hands, hands_on
from synthbroker import admin, monitor
from synthbroker.errors import RingMissingError, ServerGoneError
from synthbroker.replies import Incarnation


@pytest.fixture
def make_ring(any_server, ring_name):
    with hands_on(any_server.url, ring_name) as make:
        yield make


def laws(status):
    return {equation.law: (equation.left, equation.right) for equation in status.ledger.equations}


def test_a_new_ring_is_empty_and_says_what_it_was_made_with(make_ring):
    hands = make_ring(when_full="drop-oldest", capacity_bytes=5_000_000, max_samples=7, info='{"classes":4}',
                      schema="x:f32[100]", groups=("train",), producers=3)  # fmt: skip
    status = hands.status()
    assert (status.when_full, status.capacity_bytes, status.max_samples) == ("drop-oldest", 5_000_000, 7)
    assert (status.info, status.schema, status.expected_producers) == ({"classes": 4}, "x:f32[100]", 3)
    assert (status.live, status.bytes, status.fill, status.committed, status.ended) == (0, 0, 0.0, 0, False)
    assert (status.oldest_age_s, status.newest_age_s) == (None, None)
    assert status.groups["train"].reuse is None
    assert status.groups["train"].consumers == {}
    assert status.ledger.balanced


def test_fill_counters_and_ages_follow_what_is_put(make_ring):
    hands = make_ring(capacity_bytes=4 * BIG.cost_bytes)
    hands.put(BIG, 2)
    hands.put(TINY)
    status = hands.status()
    assert (status.live, status.committed, status.evicted, status.first, status.next) == (3, 3, 0, 1, 4)
    assert status.bytes == 2 * BIG.cost_bytes + TINY.cost_bytes
    assert status.fill == pytest.approx(0.5, abs=0.01)
    assert 0 <= status.newest_age_s <= status.oldest_age_s < 60
    assert status.ledger.balanced


def test_a_ring_capped_in_samples_is_as_full_as_its_samples_say(make_ring):
    hands = make_ring(max_samples=4)
    hands.put(TINY, 3)
    assert hands.status().fill == 0.75


def test_a_producer_is_described_by_its_last_heartbeat(make_ring):
    hands = make_ring()
    hands.put(TINY, 5)
    (producer,) = hands.status().producers.values()
    assert (producer.state, producer.committed) == ("alive", 5)
    assert (producer.host, producer.pid, producer.job_id) == ("node7", 4711, "99")
    assert (producer.samples_per_s, producer.bytes_per_s, producer.blocked_share) == (2.5, 1e6, 0.25)
    assert 0 <= producer.seen_s < 60


@pytest.mark.parametrize("state", ["left", "closed"])
def test_a_producer_that_said_goodbye_is_still_named_but_adds_no_rate(make_ring, state):
    hands = make_ring()
    hands.ring.join_producer(Incarnation("other", "w1"), 0, ABOUT)
    assert hands.status().samples_per_s == 5.0
    hands.ring.leave_producer(hands.producer, ABOUT | {"state": state}, closed=state == "closed")
    status = hands.status()
    assert status.producers["maker"].state == state
    assert (status.samples_per_s, status.bytes_per_s) == (2.5, 1e6)
    assert status.closed_producers == (state == "closed")


def test_who_has_not_been_heard_of_is_silent(make_ring, monkeypatch):
    hands = make_ring()
    hands.reader("r", "train")
    monkeypatch.setattr(monitor, "SILENT_AFTER_S", -1.0)
    status = hands.status()
    assert status.producers["maker"].state == "silent"
    assert status.producers["maker"].samples_per_s == 0.0
    assert [one.state for one in status.groups["train"].consumers.values()] == ["silent"]


@pytest.mark.parametrize(
    "about",
    [
        "",
        "[]",
        "nonsense",
        '"text"',
        '{"host": 1, "pid": "x", "samples_per_s": "fast", "codec": [1]}',
        '{"blocked_share": NaN, "blocked_ever_share": 1e9, "sending_share": -1, "age_s": Infinity}',
    ],
)
def test_what_others_wrote_about_a_producer_does_no_harm(any_server, make_ring, about):
    hands = make_ring()
    any_server.client().hset(f"{hands.ring.prefix}producers:about", "maker", about)
    (producer,) = hands.status().producers.values()
    assert (producer.host, producer.pid, producer.samples_per_s) == (None, None, 0.0)
    shares = (producer.blocked_share, producer.blocked_ever_share, producer.sending_share, producer.age_s)
    assert shares == (0.0, 0.0, 0.0, 0.0)


def test_how_long_producers_were_blocked_is_a_mean_of_those_that_live_lately_and_of_all_ever(make_ring):
    hands = make_ring()
    hands.ring.beat(
        "producer", "maker", {"blocked_share": 0.5, "blocked_ever_share": 0.1, "sending_share": 0.2, "age_s": 30}
    )
    old = Incarnation("old", "w1")
    told = {"blocked_share": 0.9, "blocked_ever_share": 0.9, "sending_share": 0.9, "age_s": 10}
    hands.ring.join_producer(old, 0, told)
    status = hands.status()
    assert (status.blocked_share, status.blocked_ever_share) == pytest.approx((0.7, 0.3))
    assert status.sending_share == pytest.approx(0.55)
    hands.ring.leave_producer(old, told | {"state": "left"}, closed=False)
    status = hands.status()
    assert (status.blocked_share, status.blocked_ever_share) == pytest.approx((0.5, 0.3))
    assert status.producers["old"].blocked_ever_share == 0.9


def test_how_long_a_group_starved_is_a_mean_of_its_living_readers_and_not_of_who_only_holds_samples(make_ring):
    hands = make_ring()
    hands.put(TINY)
    assert hands.status().advice.startswith("nobody reads ring ")
    readers = [hands.reader(name, "train") for name in ("a", "b", "keeper")]
    assert hands.status().groups["train"].starved_share is None
    for reader, share, age_s in zip(readers[:2], (0.2, 0.6), (30, 10), strict=True):
        told = {"starved_share": share, "starved_ever_share": share, "dry_share": share / 2, "age_s": age_s}
        hands.ring.beat("consumer", f"train {reader}", told)
    group = hands.status().groups["train"]
    assert (group.starved_share, group.dry_share, group.starved_ever_share) == pytest.approx((0.4, 0.2, 0.3))
    assert group.consumers[str(readers[2])].starved_share is None
    assert hands.status().advice.startswith("a bigger ring: both sides wait in turn")
    hands.ring.leave_group(readers[1], "train")
    assert hands.status().groups["train"].starved_share == pytest.approx(0.2)


def test_a_group_is_counted_through_reading_acknowledging_and_reuse(make_ring):
    hands = make_ring()
    hands.put(TINY, 5)
    reader = hands.reader("r", "train", reuse="2")
    hands.ring.acknowledge("train", hands.take(reader, "train", 3)[:2])
    group = hands.status().groups["train"]
    assert (group.since, group.reuse) == (0, "2")
    assert (group.delivered, group.acknowledged, group.pending, group.unread) == (3, 2, 1, 2)
    assert (group.lost, group.evicted_pending, group.doubled, group.reused) == (0, 0, 0, 0)
    (consumer,) = group.consumers.values()
    assert list(group.consumers) == [str(reader)]
    assert (consumer.state, consumer.pending, consumer.host, consumer.pid) == ("alive", 1, "node8", 1)
    hands.take(reader, "train", 4)
    group = hands.status().groups["train"]
    assert (group.delivered, group.unread, group.reused) == (5, 0, 2)
    assert hands.status().ledger.balanced


def test_two_groups_are_told_apart_and_a_late_one_begins_where_the_ring_begins(make_ring):
    hands = make_ring(when_full="drop-oldest", max_samples=4)
    hands.reader("r", "early")
    hands.put(TINY, 6)
    hands.reader("r", "late")
    status = hands.status()
    assert (status.groups["early"].since, status.groups["early"].lost, status.groups["early"].unread) == (0, 2, 4)
    assert (status.groups["late"].since, status.groups["late"].lost, status.groups["late"].unread) == (2, 0, 4)
    assert laws(status)["late: committed since it began = delivered + unread + lost"] == (4, 4)
    assert status.ledger.balanced


def test_what_is_evicted_while_pending_is_told(make_ring):
    hands = make_ring(when_full="drop-oldest", max_samples=4)
    reader = hands.reader("r", "train")
    hands.put(TINY, 4)
    hands.take(reader, "train", 3)
    hands.put(TINY, 4)
    status = hands.status()
    group = status.groups["train"]
    assert (status.evicted, group.evicted_pending, group.pending, group.lost) == (4, 3, 0, 1)
    assert status.ledger.balanced


def test_what_was_lost_is_told_in_the_generator_time_of_its_producers(make_ring):
    """One needs 1 s for a sample, the other 1 ms, and of one nobody knows."""
    hands = make_ring(when_full="drop-oldest", max_samples=4)
    slow, fast = Incarnation("slow", "w1"), Incarnation("fast", "w1")
    for who, generation_s in (slow, 1.0), (fast, 0.001):
        hands.ring.join_producer(who, 0, ABOUT | {"generation_s": generation_s})

    def put(who, first, count, generation_s):
        samples = [(n, TINY) for n in range(first, first + count)]
        assert hands.ring.commit(who, samples, generation_s=generation_s).word == "OK"

    put(slow, 1, 1, 1.0)
    put(fast, 1, 4, 0.001)
    assert hands.status().wasted_s == 1.0, "the first one has left, and nobody reads"
    reader = hands.reader("r", "train")
    put(slow, 2, 2, 1.0)
    assert hands.status().groups["train"].wasted_s == 0.002
    assert hands.take(reader, "train", 2) == [6, 7], "two more are stepped over"
    assert hands.status().groups["train"].wasted_s == 0.004
    put(slow, 4, 1, 1.0)
    put(fast, 5, 4, 0.001)
    status = hands.status()
    assert (status.groups["train"].lost, status.groups["train"].wasted_s) == (5, 1.004)
    hands.put(TINY, 8)
    assert hands.status().groups["train"].wasted_s == pytest.approx(1.008), "of the third one nothing is known"
    assert (hands.status().wasted_s, hands.status().generation_s) == (1.0, pytest.approx((4 + 8 * 0.001) / 12))


@pytest.mark.parametrize(("behind", "exact"), [(300, True), (9000, False)])
def test_what_a_slow_reader_steps_over_is_told_in_generator_time(make_ring, behind, exact):
    """Where that is very much, some of it is looked at."""
    hands = make_ring(when_full="drop-oldest", max_samples=4 * behind)
    reader = hands.reader("r", "train")
    hands.take(reader, "train", 1)
    seq = 1
    for _ in range(4 * behind // 100 + 1):
        samples = [(n, TINY) for n in range(seq, seq + 100)]
        hands.ring.commit(hands.producer, samples, generation_s=0.001 if seq % 200 == 1 else 0.003)
        seq += 100
    hands.take(reader, "train", 1)
    group = hands.status().groups["train"]
    assert group.lost > behind / 2
    assert group.wasted_s == pytest.approx(0.002 * group.lost, rel=0.2)


def test_how_often_live_samples_were_used_is_told(make_ring):
    hands = make_ring()
    hands.put(TINY, 6)
    readers = {reuse: hands.reader("r", f"g{reuse}", reuse=reuse) for reuse in ("1", "3", "20", "inf")}
    for reuse, reader in readers.items():
        hands.take(reader, f"g{reuse}", 4)
    groups = hands.status().groups
    assert [groups[f"g{reuse}"].uses for reuse in readers] == [{"0": 2, "1": 4}] * 4
    for reuse, reader in readers.items():
        hands.take(reader, f"g{reuse}", 2)
    for times in range(2, 17):
        for reuse in ("3", "20", "inf"):
            hands.take(readers[reuse], f"g{reuse}", 6)
            if times == 2 and reuse != "inf":
                assert hands.status().groups[f"g{reuse}"].uses == {"2": 6}
        if times == 9:
            assert hands.status().groups["g20"].uses == {"16": 6}, "9 to 16"
    groups = hands.status().groups
    assert [groups[f"g{reuse}"].uses for reuse in readers] == [{"1": 6}, {"3": 6}, {"16": 6}, {"1": 6}]


def test_a_reader_that_left_shows_until_its_samples_are_taken_over(make_ring):
    hands = make_ring()
    hands.put(TINY, 2)
    reader = hands.reader("r", "train")
    hands.take(reader, "train", 2)
    hands.ring.leave_group(reader, "train")
    (consumer,) = hands.status().groups["train"].consumers.values()
    assert (consumer.state, consumer.seen_s, consumer.pending) == ("left", None, 2)


def test_waiting_producers_and_leases_are_told(make_ring):
    hands = make_ring(capacity_bytes=2 * BIG.cost_bytes)
    hands.put(BIG)
    assert hands.ring.room(hands.producer, BIG.cost_bytes, 1).word == "OK"
    status = hands.status()
    assert (status.leased_bytes, status.leased_samples, status.waiting) == (BIG.cost_bytes, 1, False)
    hands.put(BIG)
    assert hands.ring.room(hands.producer, BIG.cost_bytes, 1).word == "FULL"
    assert hands.status().waiting


def test_samples_sent_twice_and_bad_ones_are_counted(make_ring):
    hands = make_ring()
    hands.put(TINY)
    hands.ring.commit(hands.producer, [(1, TINY)])
    hands.ring.quarantine(reason="NaN", producer="maker", recipe={})
    status = hands.status()
    assert (status.committed, status.duplicates, status.quarantined) == (1, 1, 1)


def test_a_foreign_entry_makes_the_ledger_differ_by_one(any_server, make_ring):
    hands = make_ring()
    hands.put(TINY, 2)
    any_server.client().xadd(f"{hands.ring.prefix}samples", {"by": "hand"}, id="2-5")
    status = hands.status()
    assert not status.ledger.balanced
    assert [equation.law for equation in status.ledger.equations if equation.difference] == [
        "committed = live + evicted",
        "live = lines of the index",
    ]


def test_an_entry_without_a_time_has_no_age(any_server, make_ring):
    hands = make_ring()
    hands.put(TINY, 1)
    client = any_server.client()
    client.xdel(f"{hands.ring.prefix}samples", "1-0")
    client.xadd(f"{hands.ring.prefix}samples", {"by": "hand"}, id="1-1")
    assert hands.status().oldest_age_s is None


def test_a_status_is_plain_enough_for_json(make_ring):
    hands = make_ring(info='{"classes":4}')
    hands.put(TINY)
    hands.reader("r", "train")
    content = json.loads(json.dumps(dataclasses.asdict(hands.status())))
    assert content["groups"]["train"]["consumers"]["r/0:r1"]["pending"] == 0
    assert content["producers"]["maker"]["host"] == "node7"
    assert content["ledger"]["balanced"] is True
    assert content["info"] == {"classes": 4}


def test_status_and_end_and_drop_open_and_close_their_own_connection(server, ring_name):
    hands = Hands(server.url, ring_name)
    hands.put(TINY)
    hands.reader("r", "train")
    clients = server.client().info("clients")["connected_clients"]
    assert monitor.status(ring_name, url=server.url).live == 1
    admin.end(ring_name, url=server.url)
    admin.end(ring_name, url=server.url)
    assert monitor.status(ring_name, url=server.url).ended
    with pytest.raises(RingMissingError, match=r"no group 'val'.*train"):
        admin.drop(ring_name, group="val", url=server.url)
    admin.drop(ring_name, group="train", url=server.url)
    with pytest.raises(RingMissingError, match=r"no group 'train'.*no groups at all"):
        admin.drop(ring_name, group="train", url=server.url)
    admin.drop(ring_name, url=server.url)
    assert server.client().keys(f"sb:{{{ring_name}}}*") == []
    assert server.client().info("clients")["connected_clients"] <= clients
    hands.connection.close()


@pytest.mark.parametrize("act", [monitor.status, admin.end, admin.drop])
def test_a_ring_that_is_not_there_is_named(server, ring_name, act):
    with pytest.raises(RingMissingError, match=ring_name):
        act(ring_name, url=server.url)


@pytest.mark.parametrize("act", [monitor.status, admin.end, admin.drop])
def test_a_server_that_is_not_there_is_named(tmp_path, ring_name, act):
    with pytest.raises(ServerGoneError, match=r"no\.sock"):
        act(ring_name, url=f"unix://{tmp_path}/no.sock")


def test_a_name_that_cannot_be_is_refused_before_anything_is_sent(tmp_path):
    with pytest.raises(ValueError, match="cannot name a ring"):
        monitor.status("a b", url=f"unix://{tmp_path}/no.sock")
    with pytest.raises(ValueError, match="cannot name a group"):
        admin.drop("a", group="a b", url=f"unix://{tmp_path}/no.sock")
