"""A SLURM of three nodes on this one machine: real daemons in a folder of their own, stopped by pid.

Its names are such that nothing can be right by luck: no partition is called `batch` or `gpu`, no node's name can be
looked up, and the nodes' names are no numbered row.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from servers import _die_with_us, _free_port, eventually

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol", "srun", "salloc")
NODES = ("otter-07", "otter-11", "puffin")
DEFAULT_PARTITION, OTHER_PARTITION = "estuary", "shoal"
MEMORY_MB = 3000  # of each node
CPUS = 8  # more than there are: the tests wait more than they work
FAKE_GPUS = 2  # per node; they are /dev/zero under other names
START_S = 30.0
NODE_MARK = "SANDBANK_NODE"  # what a node's daemon, and the keepers of its jobs, have in their environment
NODE_MARKS = (NODE_MARK, "SLURMD_NODENAME")  # the latter: what runs in a job
SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> str:
    """Say why there can be no such cluster here; empty if there can."""
    gone = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    if gone:
        return f"no SLURM here ({', '.join(gone)} not found): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "SLURM's daemons of these tests run as root (they make device files and switch users)"
    return ""


class Cluster:
    """A running SLURM. `environment` leads its commands there; nothing else on this machine knows of it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sbc-"))
        self.folder.chmod(0o755)
        self.nodes = NODES
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH_PATH}
        try:
            self._configure()
            self._start_munge()
            self._launch("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            eventually(self._all_idle, "all nodes idle", deadline_s=START_S)
        except BaseException:
            self.stop()
            raise

    def environment(self) -> dict[str, str]:
        """Give the environment of a login node."""
        return {name: value for name, value in self._environment.items() if not name.startswith("SYNTHBROKER_")}

    def run(self, *command: str, check: bool = True, **options: Any) -> str:
        """Run one of SLURM's commands on the login node; gives what it printed."""
        options = {"env": self.environment()} | options
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return str(done.stdout).strip()

    # -- jobs

    def jobs(self) -> dict[str, str]:
        """Say the state of each job, and of each task of an array, that has not ended: {"12_3": "RUNNING"}."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def shown(self, job: str) -> dict[str, str]:
        """Give what `scontrol show job` says of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)

    def state(self, job: str) -> str:
        return self.shown(job)["JobState"]

    def cancel_all(self) -> None:
        self.run("scancel", "--user=root")
        eventually(lambda: not self.jobs(), "no jobs", deadline_s=60)

    # -- nodes

    def start_node(self, node: str) -> None:
        self._launch(node, "slurmd", "-D", "-N", node, environment={NODE_MARK: node})

    def lose_node(self, node: str) -> None:
        """Pull its plug: the daemon and all that it started are gone at once."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        eventually(lambda: not self._kill(node), "nothing runs on it")
        self._take_for_lost(node)

    def cut_node_off(self, node: str) -> None:
        """Let SLURM lose it, while what runs there goes on."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        self._take_for_lost(node)

    def _take_for_lost(self, node: str) -> None:
        # The controller would find out by itself, after SlurmdTimeout.
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def mend(self) -> None:
        """Bring all nodes back."""
        for node in NODES:
            if node not in self._daemons:
                self.start_node(node)
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        eventually(self._all_idle, "all nodes idle", deadline_s=60)

    def processes(self, node: str | None = None) -> list[int]:
        """List the processes that jobs of this cluster left, or have, on one node or all."""
        own = {process.pid for process in self._daemons.values()}
        return [pid for pid in _of_jobs(f"SLURM_CONF={self.folder}/slurm.conf", node) if pid not in own]

    def _kill(self, node: str | None = None) -> list[int]:
        """Kill what jobs have running, and give it; a process that was just being started escapes the first time."""
        found = self.processes(node)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def stop(self) -> None:
        """End all: jobs first, then the daemons, then what is left."""
        if "slurmctld" in self._daemons:
            with suppress(Exception):
                self.cancel_all()
        for process in reversed(self._daemons.values()):
            process.kill()
            process.wait()
        self._daemons.clear()
        eventually(lambda: not self._kill(), "nothing is left")
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- daemons

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%n %T", check=False).split()[1::2]
        return bool(states) and set(states) == {"idle"}

    def _launch(self, name: str, *command: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*_die_with_us(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment, **environment},
            )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._launch(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munge.pid", f"--seed-file={self.folder}/munge.seed",
            f"--log-file={self.folder}/munge.log",
        )  # fmt: skip
        eventually((self.folder / "munge.socket").exists, "munged listens")

    def _configure(self) -> None:
        for name in ("state", "spool", "devices"):
            (self.folder / name).mkdir()
        for i in range(FAKE_GPUS):
            os.mknod(self.folder / "devices" / f"gpu{i}", 0o666 | 0o020000, os.makedev(1, 5))
        (self.folder / "slurm.conf").write_text("\n".join(self._slurm_conf()) + "\n")
        devices = f"{self.folder}/devices/gpu[0-{FAKE_GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"Name=gpu File={devices} Flags=nvidia_gpu_env\n")

    def _slurm_conf(self) -> Iterator[str]:
        host = socket.gethostname()
        yield from f"""\
ClusterName=sandbank
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={_free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
KillWait=10
MinJobAge=600
GresTypes=gpu
DebugFlags=NO_CONF_HASH""".splitlines()
        for node in NODES:
            yield (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} "
                f"CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{FAKE_GPUS}"
            )
        nodes = ",".join(NODES)
        yield f"PartitionName={DEFAULT_PARTITION} Nodes={nodes} Default=YES DefMemPerNode=200 MaxTime=60 State=UP"
        yield f"PartitionName={OTHER_PARTITION} Nodes={NODES[-1]} DefMemPerNode=200 MaxTime=60 State=UP"


def _of_jobs(mark: str, node: str | None) -> Iterator[int]:
    """List the living processes of a cluster's jobs: in their environment stand its mark and their node."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            living = (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            there = {name: value for name, _, value in (word.partition("=") for word in words) if name in NODE_MARKS}
            if living and mark in words and there and (node is None or node in there.values()):
                yield int(folder.name)
