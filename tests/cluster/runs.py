"""A run's folder, with the templates as `synthbroker slurm init` puts them there, and what a test asks of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import redis

import synthbroker as sb
from cluster.slurm import Cluster
from servers import eventually
from synthbroker import endpoint

MADE_BY_USERS = Path(__file__).parent / "run"
SOON_S = 120.0  # for what takes seconds on a quiet machine
# What a user would write into env.sh, or give with the command.
VARIABLES = {"GENERATOR": "sums:endless", "TRAIN": "train.py 200", "CAPACITY": "10MB", "RECONNECT_S": "120"}


class Launched:
    """One run, driven by the command line."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        sb.slurm.init(folder)
        for path in MADE_BY_USERS.iterdir():
            if path.is_file():
                shutil.copy(path, folder)

    def cli(self, action: str, *words: str, code: int = 0, inside: tuple[str, ...] = (), **variables: str) -> str:
        """Run `synthbroker slurm ACTION` on the login node, or `inside` another command; gives what it said."""
        done = subprocess.run(
            [*inside, sys.executable, "-m", "synthbroker", "slurm", action, str(self.folder), *words],
            capture_output=True,
            text=True,
            env=self.cluster.environment() | VARIABLES | variables,
            timeout=SOON_S,
            check=False,
        )
        assert done.returncode == code, f"{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def up(self, *words: str, **variables: str) -> None:
        self.cli("up", *words, **variables)

    def job(self, role: str) -> str:
        number: str = json.loads((self.folder / "jobs.json").read_text())["jobs"][role]
        return number

    def shown(self, role: str, task: str = "") -> dict[str, str]:
        return self.cluster.shown(self.job(role) + task)

    def await_state(self, state: str, job: str) -> None:
        eventually(lambda: self.cluster.state(job) == state, f"{job} is {state}", deadline_s=SOON_S)

    def log(self, name: str) -> str:
        paths = sorted((self.folder / "logs").glob(f"{name}*.out"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    @property
    def url(self) -> str:
        return (self.folder / "broker.json").as_uri()

    def await_broker(self) -> endpoint.Endpoint:
        path = self.folder / "broker.json"
        eventually(path.exists, "the broker is there", deadline_s=SOON_S)
        return endpoint.read(path)

    def ring(self) -> sb.RingStatus | None:
        """Look at the ring; None while it, or the broker, is not there."""
        try:
            return sb.status("brains", url=self.url)
        except (sb.RingMissingError, sb.ServerError, sb.EndpointError):
            return None

    def committed(self) -> int:
        ring = self.ring()
        return ring.committed if ring else 0

    def await_samples(self, more_than: int = 0) -> sb.RingStatus:
        eventually(lambda: self.committed() > more_than, f"more than {more_than} samples", deadline_s=SOON_S)
        ring = self.ring()
        assert ring is not None
        return ring

    def ask(self, *command: str) -> Any:
        """Ask the broker's Redis."""
        client = redis.Redis.from_url(endpoint.resolve(self.url))
        try:
            return client.execute_command(*command)
        finally:
            client.close()
