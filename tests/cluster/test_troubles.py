"""What goes wrong on a cluster: nodes are lost, jobs are killed, requeued, refused. It is told, and the run goes on."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

import synthbroker as sb
from cluster.runs import SOON_S, Launched
from cluster.slurm import DEFAULT_PARTITION, NODES, OTHER_PARTITION
from servers import eventually

PUFFIN, OTTERS = NODES[2], NODES[:2]
APART = (f"--broker=--exclude={PUFFIN}", f"--generators=--array=0 --nodelist={PUFFIN}")  # on different nodes


def python_of(run: Launched, job: str, word: str) -> int:
    """Find the process of a job that has a word on its command line."""
    number = run.cluster.shown(job)["JobId"]
    for pid in run.cluster.processes():
        folder = Path("/proc") / str(pid)
        if f"SLURM_JOB_ID={number}".encode() in (folder / "environ").read_bytes().split(b"\0"):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if word.encode() in words and b"python" in words[0]:
                return pid
    raise AssertionError(f"job {job} runs no {word}")


# -- generators


def test_after_a_killed_generator_the_next_task_takes_its_place(run):
    run.up("--without=train", "--generators=--array=0-1%1")
    run.await_samples()
    first = run.job("generators") + "_0"
    os.kill(python_of(run, first, "generate"), signal.SIGKILL)
    run.await_state("RUNNING", run.job("generators") + "_1")
    before = run.committed()
    run.await_samples(more_than=before + 10)
    assert run.cluster.state(first) == "FAILED"
    assert re.search(r"_0 ended as FAILED; the end of .*generators-\d+_0.out", run.cli("status"))


def test_a_requeued_generator_is_another_producer(run):
    run.up("--without=train", "--generators=--array=0")
    [first] = run.await_samples().producers
    run.cluster.run("scontrol", "requeue", run.job("generators") + "_0")
    eventually(lambda: len(run.ring().producers) == 2, "it is there again", deadline_s=SOON_S)
    ring = run.await_samples(more_than=run.committed() + 10)
    [second] = set(ring.producers) - {first}
    assert second.startswith(first.partition("r0-")[0] + "r1-"), "named by the job and its restarts"
    assert ring.producers[first].state == "left"
    assert ring.ledger.balanced


def test_a_generator_whose_time_is_over_goes_back_into_the_queue(run):
    """SLURM's shortest limit is a minute; the signal comes 50 s before that, or up to a minute earlier."""
    run.up("--without=train", "--generators=--array=0 --time=1 --signal=USR1@50")
    task = run.job("generators") + "_0"
    eventually(lambda: run.cluster.shown(task)["Restarts"] == "1", "it is requeued", deadline_s=SOON_S)
    run.await_samples()
    eventually(lambda: any("r1-" in name for name in run.ring().producers), "it is there again", deadline_s=SOON_S)
    states = {one.state for name, one in run.ring().producers.items() if "r0-" in name}
    assert states <= {"left"}, "none if the signal came before the first sample"
    assert run.ring().ledger.balanced


def test_the_last_task_of_an_array_goes_back_into_the_queue_alone(run):
    """Its job has the number of the whole array."""
    run.up("--without=train", "--generators=--array=0-1")
    first, last = (f"{run.job('generators')}_{task}" for task in (0, 1))
    eventually(lambda: run.ring() and len(run.ring().producers) == 2, "both generate", deadline_s=SOON_S)
    assert run.cluster.shown(last)["JobId"] == run.job("generators")
    assert run.log("generators").count("this job ends in") == 2
    run.cluster.run("scancel", "--signal=USR1", last)
    eventually(lambda: run.cluster.shown(last)["Restarts"] == "1", "it is requeued", deadline_s=SOON_S)
    eventually(lambda: any("_1r1-" in name for name in run.ring().producers), "it is there again", deadline_s=SOON_S)
    shown = run.cluster.shown(first)
    assert (shown["Restarts"], shown["JobState"]) == ("0", "RUNNING")


def test_a_ring_that_counts_its_generators_ends_when_all_tasks_are_done_whatever_was_requeued(run):
    run.up("--without=train", "--generators=--array=0-2", PRODUCERS="3", GENERATOR="sums:thirty", PAUSE_S="0.3")
    eventually(lambda: run.ring() and len(run.ring().producers) == 3, "all generate", deadline_s=SOON_S)
    task = run.job("generators") + "_1"
    run.cluster.run("scontrol", "requeue", task)
    eventually(lambda: run.ring().ended, "the ring ends", deadline_s=SOON_S)
    assert run.cluster.shown(task)["Restarts"] == "1"
    assert set(run.ring().producers) == {f"{run.job('generators')}_{i}-w0" for i in range(3)}
    assert run.ring().ledger.balanced


def test_a_generator_that_finds_the_ring_full_gives_its_node_back(run):
    run.up("--without=train", "--generators=--array=0", GENERATE_OPTIONS="--max-samples 20", IDLE_S="3")
    run.await_state("COMPLETED", run.job("generators"))
    assert "--idle-s" in run.log("generators")
    assert run.ring().live == 20


def test_the_generator_of_a_lost_node_begins_again_on_another(run):
    broker, *others = NODES
    run.up("--without=train", f"--broker=--nodelist={broker}", f"--generators=--array=0 --exclude={broker}")
    run.await_samples()
    node = run.shown("generators", "_0")["NodeList"]
    assert node in others
    run.cluster.lose_node(node)
    before = run.committed()
    run.await_samples(more_than=before + 10)
    assert run.shown("generators", "_0")["NodeList"] != node


# -- the broker


@pytest.mark.parametrize("durable", [False, True], ids=["in memory", "durable"])
def test_a_broker_whose_node_is_lost_begins_again_on_another_and_all_find_it(run, durable, record_property):
    run.up("--without=train", *APART, DURABLE=str(run.folder / "rings") if durable else "")
    first = run.await_broker()
    before = run.await_samples(more_than=20)
    node = run.shown("broker")["NodeList"]
    lost_at = time.monotonic()
    run.cluster.lose_node(node)
    eventually(lambda: run.await_broker().identity != first.identity, "another broker", deadline_s=SOON_S)
    served_s = time.monotonic() - lost_at
    eventually(run.ring, "the ring is there", deadline_s=SOON_S)
    after = run.await_samples(more_than=run.committed())
    gap_s = time.monotonic() - lost_at
    second = run.await_broker()
    assert run.shown("broker")["NodeList"] == ({*OTTERS} - {node}).pop()
    assert (second.job_id, second.password == first.password) == (first.job_id, durable)
    assert after.ledger.balanced
    assert after.epoch.partition(".")[0] == before.epoch if durable else after.epoch != before.epoch
    told = "had committed it lost 0" if durable else "samples were committed before"
    eventually(lambda: told in run.log("generators"), f"the generator says: {told}", deadline_s=SOON_S)
    assert run.cluster.state(run.job("generators")) == "RUNNING"
    kind = "durable" if durable else "in memory"
    record_property("gap", f"broker lost, {kind}: it serves again after {served_s:.1f} s, samples after {gap_s:.1f} s")


def test_a_durable_broker_that_runs_on_on_a_lost_node_leaves_its_rings_to_its_next_life(run):
    run.up("--without=train", *APART, DURABLE=str(run.folder / "rings"))
    first = run.await_broker()
    run.await_samples(more_than=20)
    run.cluster.cut_node_off(run.shown("broker")["NodeList"])
    eventually(lambda: "a former life of this job" in run.log("broker"), "it waits", deadline_s=SOON_S)
    eventually(lambda: run.log("broker").count("serving on") == 2, "another broker", deadline_s=SOON_S)
    second = run.await_broker()
    assert second.identity != first.identity
    assert "names another server by now" in run.log("broker")
    run.await_samples(more_than=run.committed())
    assert "had committed it lost 0" in run.log("generators")
    assert sb.audit("brains", url=run.url).balanced


@pytest.mark.parametrize("durable", [False, True], ids=["in memory", "durable"])
def test_a_broker_whose_time_is_nearly_over_is_requeued_if_its_rings_are_kept(run, durable):
    run.up("--without=train", *APART, DURABLE=str(run.folder / "rings") if durable else "")
    first = run.await_broker()
    run.await_samples()
    run.cluster.run("scancel", "--batch", "--signal=USR1", run.job("broker"))
    if durable:
        eventually(lambda: run.shown("broker")["Restarts"] == "1", "it is requeued", deadline_s=SOON_S)
        eventually(lambda: run.await_broker().identity != first.identity, "another broker", deadline_s=SOON_S)
    run.await_samples(more_than=run.committed() + 10)
    assert run.shown("broker")["Restarts"] == str(int(durable))
    assert (run.await_broker().identity == first.identity) == (not durable)
    assert run.ring().ledger.balanced
    run.cli("down")
    assert run.log("broker").strip().endswith("stopped")


def test_a_training_goes_on_over_a_broker_that_is_requeued(run):
    run.up(*APART, f"--train=--nodelist={PUFFIN}", DURABLE=str(run.folder / "rings"), TRAIN="train.py 400")
    eventually(lambda: run.ring() and run.ring().groups.get("train"), "it trains", deadline_s=SOON_S)
    first = run.await_broker()
    run.cluster.run("scontrol", "requeue", run.job("broker"))
    eventually(lambda: run.await_broker().identity != first.identity, "another broker", deadline_s=SOON_S)
    run.await_state("COMPLETED", run.job("train"))
    assert "100 steps" in run.log("train")
    assert sb.audit("brains", url=run.url).balanced


# -- training


def test_a_training_that_is_told_that_its_time_is_over_goes_on_where_it_was(run):
    run.up("--generators=--array=0", TRAIN="resume.py 60", SAVE_S="600")  # it takes no longer than it must
    steps = run.folder / "steps"
    eventually(lambda: steps.exists() and steps.stat().st_size, "it trains", deadline_s=SOON_S)
    run.cluster.run("scancel", "--batch", "--signal=USR2", run.job("train"))
    run.await_state("COMPLETED", run.job("train"))
    assert run.shown("train")["Restarts"] == "1"
    assert "saved" in run.log("train")
    trained = [int(line) for line in steps.read_text().split()]
    assert sorted(trained) == list(range(len(trained))), "each sample once"
    assert len(trained) >= 60


def test_a_training_that_knows_no_signals_is_requeued_all_the_same(run):
    run.up("--generators=--array=0", TRAIN="train.py 100000", SAVE_S="1")
    eventually(lambda: run.ring() and run.ring().groups.get("train"), "it trains", deadline_s=SOON_S)
    (run.folder / "train.py").write_text((run.folder / "train.py").read_text().replace("int(sys.argv[1])", "40"))
    run.cluster.run("scancel", "--batch", "--signal=USR2", run.job("train"))
    run.await_state("COMPLETED", run.job("train"))
    assert run.shown("train")["Restarts"] == "1"
    assert "1 ranks, 10 steps" in run.log("train")


# -- what a person did not know


def test_a_partition_that_is_not_there_is_answered_with_those_that_are(run):
    said = run.cli("up", "--sbatch=--partition=gpu", code=1)
    assert "sbatch refuses broker.sbatch: invalid partition specified: gpu" in said
    assert f"partitions here: {DEFAULT_PARTITION}, {OTHER_PARTITION}" in said
    assert run.cluster.jobs() == {}
    assert not (run.folder / "jobs.json").exists()


def test_what_is_refused_later_takes_what_was_submitted_with_it(run):
    said = run.cli("up", "--train=--gres=gpu:9", code=1)
    assert "train.sbatch" in said
    assert "sinfo -o" in said
    eventually(lambda: run.cluster.jobs() == {}, "the others are cancelled", deadline_s=SOON_S)
    assert not (run.folder / "jobs.json").exists()


def test_without_synthbroker_on_the_nodes_the_log_says_which_file_to_edit(run):
    run.up("--without=train", "--without=generators", PATH="/usr/bin:/bin:/usr/sbin:/sbin")
    run.await_state("FAILED", run.job("broker"))
    said = run.cli("status")
    assert re.search(r"broker.*failed", said)
    assert f"{run.folder}/env.sh: there is no synthbroker on" in said


def test_a_folder_without_env_sh_is_told_before_anything_is_submitted(run):
    (run.folder / "env.sh").unlink()
    assert f"has no env.sh: `synthbroker slurm init {run.folder}` puts it there" in run.cli("up", code=1)


def test_an_environment_that_is_gone_when_the_job_starts_ends_it(run):
    run.up("--without=train", "--without=generators", "--broker=--hold")
    (run.folder / "env.sh").unlink()
    run.cluster.run("scontrol", "release", run.job("broker"))
    run.await_state("FAILED", run.job("broker"))
    assert f"no env.sh in {run.folder}: submit sb-broker in the folder of its run" in run.cli("status")


def test_a_log_folder_that_is_gone_is_the_answer_to_a_job_that_failed_without_a_word(run):
    run.up("--without=train", "--without=generators", "--broker=--hold")
    (run.folder / "logs").rmdir()
    run.cluster.run("scontrol", "release", run.job("broker"))
    run.await_state("FAILED", run.job("broker"))
    assert f"fails without a word: there is no folder {run.folder}/logs" in run.cli("status")


def test_a_log_folder_of_the_users_own_is_made(run):
    run.up("--without=train", "--without=generators", "--broker=--output=my/own/%j.txt")
    run.await_broker()
    assert "serving on" in (run.folder / "my" / "own" / f"{run.job('broker')}.txt").read_text()
    assert "my/own/%j.txt" in (run.folder / "jobs.json").read_text()


def test_a_server_program_that_is_not_there_is_named(run):
    run.up("--without=train", "--without=generators", SYNTHBROKER_REDIS_SERVER="/nowhere/redis-server")
    run.await_state("FAILED", run.job("broker"))
    assert "SYNTHBROKER_REDIS_SERVER is '/nowhere/redis-server', which is no program" in run.cli("status")


def test_a_run_that_is_up_is_not_started_twice(run):
    run.up("--without=train", "--without=generators")
    said = run.cli("up", code=1)
    assert f"has a run already, jobs {run.job('broker')}" in said
    run.cli("down")
    run.up("--without=train", "--without=generators")


def test_without_slurm_the_line_says_where_to_run_it(run):
    assert "on a login node" in run.cli("up", code=1, PATH=str(run.folder))


def test_a_controller_that_does_not_answer_is_told(run):
    (run.folder / "slurm.conf").write_text("ClusterName=nowhere\nSlurmctldHost=localhost\nSlurmctldPort=1\n")
    said = run.cli("up", code=1, SLURM_CONF=str(run.folder / "slurm.conf"))
    assert re.search(r"sbatch refuses broker.sbatch: .*does `sinfo` work on this machine", said), said
