"""Scenes, their seed, and the table at the end."""

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.proxy import Proxy, proxy
from faults.scene import Row, Scene
from servers import RealServer

SEED = os.environ.get("FAULTS_SEED") or secrets.token_hex(4)
os.environ["FAULTS_SEED"] = SEED  # for the processes of xdist

MakeScene = Callable[..., Scene]


def pytest_report_header() -> str:
    return f"faults: seed {SEED} (FAULTS_SEED={SEED} repeats it)"


@pytest.fixture
def proxied() -> Iterator[Callable[[RealServer], Proxy]]:
    """Give a factory of proxies."""
    open_ones: list[Any] = []

    def make(server: RealServer) -> Proxy:
        open_ones.append(proxy(server))
        between: Proxy = open_ones[-1].__enter__()
        return between

    yield make
    for one in open_ones:
        one.__exit__(None, None, None)


@pytest.fixture
def scene(tmp_path: Path, ring_name: str, record_property: Callable[[str, object], None]) -> Iterator[MakeScene]:
    """Give a factory of scenes: `scene("what is done", server, url)`."""
    made: list[Scene] = []

    def make(fault: str, server: RealServer, url: str | None = None) -> Scene:
        made.append(Scene(server, url or server.url, ring_name, tmp_path, fault, SEED))
        return made[-1]

    yield make
    for one in made:
        one.close()
        record_property("row", json.dumps(dataclasses.asdict(one.row)))


@pytest.fixture
def storm_s() -> float:
    """How long the longest of the tests lasts."""
    return float(os.environ.get("FAULTS_STORM_S", "60"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = [
        Row(**json.loads(value))
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "teardown"
        for name, value in report.user_properties
        if name == "row"
    ]
    if rows:
        terminalreporter.section(f"faults, seed {SEED}")
        for line in table(rows):
            terminalreporter.write_line(line)


def table(rows: list[Row]) -> Iterator[str]:
    """Write the table in Markdown."""
    yield "| fault | times | committed | delivered | again | doubled | lost | corrupt | goes on after |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for row in rows:
        *cells, recovered_s = dataclasses.astuple(row)
        yield f"| {' | '.join(map(str, cells))} | {recovered_s:.1f} s |"
