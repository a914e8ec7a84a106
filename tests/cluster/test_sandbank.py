"""The SLURM that the other tests here stand on."""

from cluster.slurm import DEFAULT_PARTITION, NODES
from servers import eventually


def test_jobs_run_on_several_nodes_with_gpus_of_their_own(cluster):
    assert DEFAULT_PARTITION in cluster.run("sinfo")
    said = cluster.run("srun", "--nodes=3", "--gres=gpu:1", "bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
    assert sorted(said.splitlines()) == [f"{node} 0" for node in sorted(NODES)]


def test_the_job_of_a_lost_node_is_started_again_on_another(cluster):
    job = cluster.run("sbatch", "--parsable", "--requeue", "--output=/dev/null", "--wrap", "sleep 600")
    eventually(lambda: cluster.state(job) == "RUNNING", "it runs", deadline_s=30)
    node = cluster.shown(job)["NodeList"]
    cluster.lose_node(node)
    assert cluster.processes(node) == []
    eventually(lambda: cluster.shown(job)["Restarts"] == "1" and cluster.state(job) == "RUNNING", "it runs again")
    assert cluster.shown(job)["NodeList"] != node
