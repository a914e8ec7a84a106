"""One SLURM for all tests of the cluster, mended after each of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.runs import Launched
from cluster.slurm import Cluster, missing


@pytest.fixture(scope="session")
def sandbank() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(sandbank: Cluster) -> Iterator[Cluster]:
    """Give a SLURM with three idle nodes; what the test left there is cancelled."""
    yield sandbank
    sandbank.cancel_all()
    sandbank.mend()
    assert sandbank.processes() == []


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Launched:
    """Give the folder of a run that has not been submitted yet."""
    return Launched(cluster, tmp_path / "run7")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    gaps = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "gap"
    ]
    for line in gaps:
        terminalreporter.write_line(line)
