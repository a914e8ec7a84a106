"""The real templates on a real SLURM: from `up` to a trained model, from a login node, an allocation, a notebook."""

import json
import os
import re
import sys

import synthbroker as sb
from cluster.runs import SOON_S, VARIABLES
from cluster.slurm import NODES, OTHER_PARTITION
from servers import eventually


def test_from_up_to_a_model_trained_on_two_nodes_and_down_again(run):
    (run.folder / "env.sh").unlink()
    assert run.cli("init").splitlines()[0] == f"{run.folder}/env.sh"
    said = run.cli("up", "--train=--nodes=2", '--generators="--array=0-3%2"')
    for role in ("broker", "generators", "train"):
        assert re.search(rf"{role} +job {run.job(role)} .*/logs/{role}-", said)
    assert f"tail -F {run.folder}/logs/*.out" in said
    run.await_state("RUNNING", run.job("train"))
    shown = run.cli("status")
    assert "generators" in shown
    run.await_state("COMPLETED", run.job("train"))

    steps, before, after = re.search(r"2 ranks, (\d+) steps, loss (\S+) -> (\S+)", run.log("train")).groups()
    assert int(steps) == 25
    assert float(after) < float(before) / 2
    assert (run.folder / "model.pt").exists()
    assert len(set(run.shown("train")["NodeList"].strip("]").replace("[", ",").split(","))) > 1

    seen = json.loads(run.cli("status", "--json"))
    assert [ring["ring"] for ring in seen["rings"]] == ["brains"]
    assert seen["rings"][0]["groups"]["train"]["delivered"] >= 200
    assert sb.audit("brains", url=run.url).balanced

    assert "all jobs are gone" in run.cli("down")
    assert run.cluster.jobs() == {}
    assert run.cluster.processes() == []
    assert not (run.folder / "broker.json").exists()
    assert run.log("broker").strip().endswith("stopped")
    assert "no run was started" in run.cli("down", code=1)


def test_the_templates_are_submitted_by_hand_too(run):
    def sbatch(*words):
        environment = run.cluster.environment() | VARIABLES
        return run.cluster.run("sbatch", "--parsable", *words, cwd=run.folder, env=environment)

    broker = sbatch("broker.sbatch")
    sbatch("--dependency=after:" + broker, "--array=0", "generators.sbatch")
    run.await_samples()
    assert "serving on" in (run.folder / f"sb-broker-{broker}.out").read_text()


def test_env_sh_alone_brings_what_jobs_need_that_begin_with_an_empty_environment(run):
    edited = [
        f'source "{sys.prefix}/bin/activate"',
        f"export PYTHONPATH={os.environ.get('PYTHONPATH', '')}",
        "RUN=(env MARK=here)",
        "GENERATOR=sums:environment CAPACITY=10MB TRAIN='train.py 40'",
    ]
    env = run.folder / "env.sh"
    env.write_text(env.read_text().replace("# 2. ", "\n".join([*edited, "", "# 2. "])))
    run.up("--without=train", "--generators=--array=0", SBATCH_EXPORT="NONE", GENERATOR="nobody:reads_this")
    run.await_state("COMPLETED", run.job("generators"))
    assert json.loads((run.folder / "environment.json").read_text())["MARK"] == "here"


def test_every_gpu_of_a_node_is_a_rank_and_what_is_left_goes_when_they_are_done(run):
    run.up("--down-after", "--generators=--array=0-1", "--train=--gres=gpu:2", TRAIN="train.py 40")
    eventually(lambda: not run.cluster.jobs(), "no job is left", deadline_s=SOON_S)
    assert run.cluster.state(run.job("train")) == "COMPLETED"
    assert "2 ranks, 5 steps" in run.log("train")
    assert run.cluster.processes() == []
    assert "there is no endpoint file" in run.cli("status")


def test_as_many_tasks_run_at_a_time_as_the_array_says(run):
    run.up("--without=train", "--generators=--array=0-4%2", GENERATOR="sums:thirty")
    number, most = run.job("generators"), 0

    def all_done():
        nonlocal most
        states = [state for job, state in run.cluster.jobs().items() if job.startswith(f"{number}_")]
        most = max(most, states.count("RUNNING"))
        return not states

    eventually(all_done, "all tasks have run", deadline_s=SOON_S)
    assert most == 2
    ring = run.ring()
    assert (ring.committed, ring.ended) == (150, False), "the ring stays open for other tasks"
    assert len({producer.job_id for producer in ring.producers.values()}) == 5


def test_each_gpu_of_a_task_has_its_workers(run):
    run.up("--without=train", "--generators=--array=0 --gres=gpu:2", WORKERS_PER_GPU="2")
    run.await_samples()
    eventually(lambda: len(run.ring().producers) == 4, "two workers for each GPU", deadline_s=SOON_S)


def test_flags_choose_partition_memory_and_network(run):
    flags = ("--without=train", f"--sbatch=--partition={OTHER_PARTITION}", "--broker=--mem=300")
    run.up(*flags, "--generators=--array=0", INTERFACE="lo")
    where = run.await_broker()
    assert (where.host, where.job_id) == ("127.0.0.1", run.job("broker"))
    assert run.shown("broker")["NodeList"] == NODES[-1]
    assert run.shown("generators")["Partition"] == OTHER_PARTITION
    assert run.ask("INFO", "memory")["maxmemory"] == int(300 * 2**20 * 0.7)
    assert (run.folder / "broker.json").stat().st_mode & 0o777 == 0o600


def test_a_ring_that_does_not_fit_the_brokers_job_is_refused(run):
    run.up("--without=train", "--broker=--mem=300", "--generators=--array=0", CAPACITY="1GB")
    run.await_state("FAILED", run.job("generators"))
    assert re.search(r"1 GB.*220 MB", run.log("generators")), run.log("generators")
    assert "1 GB" in run.cli("status")


def test_within_an_allocation_the_jobs_know_nothing_of_it(run):
    allocation = ("salloc", "--nodes=2", "--ntasks=4", "--mem-per-cpu=50", "--gres=gpu:1", "--job-name=mine")
    flags = ("--without=train", "--generators=--array=0")
    run.cli("up", *flags, inside=allocation, GENERATOR="sums:environment", CUDA_VISIBLE_DEVICES="0")
    run.await_state("COMPLETED", run.job("generators"))
    seen = json.loads((run.folder / "environment.json").read_text())
    assert seen["SLURM_JOB_NAME"] == "sb-generators"
    assert (seen["SLURM_NNODES"], seen["SLURM_NTASKS"]) == ("1", "1")
    assert not seen.keys() & {"SLURM_MEM_PER_CPU", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"}


def test_a_notebook_does_the_same(run, monkeypatch):
    for name, value in (run.cluster.environment() | VARIABLES).items():
        monkeypatch.setenv(name, value)
    submitted = sb.slurm.up(run.folder, generators="--array=0", without=["train"])
    assert set(submitted.jobs) == {"broker", "generators"}
    run.await_samples()
    seen = sb.slurm.status(run.folder)
    assert [ring.ring for ring in seen.rings] == ["brains"]
    assert sorted(sb.slurm.down(run.folder)) == sorted(submitted.jobs.values())
    assert run.cluster.jobs() == {}
