"""README, "By hand on any hosts", followed word for word on hosts that are network namespaces."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from servers import any_binary, eventually

README = Path(__file__).parent.parent / "README.md"
HOSTS = {"A": "10.9.0.1", "B": "10.9.0.2", "C": "10.9.0.2"}  # B and C share one: they need not reach each other


def section():
    return README.read_text().partition("## By hand on any hosts\n")[2].partition("\n## ")[0]


def written_files():
    """Find the programs that the section shows: name and text."""
    blocks = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", section(), re.DOTALL)
    return {name: text for text, name in blocks}


def commands():
    """Find what is to be typed, by host."""
    return dict(re.findall(r"```\n# on host (\w)[^\n]*\n(.*?)```", section(), re.DOTALL))


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=True)


@pytest.fixture
def namespaces():
    """Give two network namespaces with a cable between them, by address."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and iproute2")
    word = secrets.token_hex(3)
    names = {address: f"sb{word}{i}" for i, address in enumerate(sorted(set(HOSTS.values())))}
    try:
        ip("netns", "add", names["10.9.0.1"])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    try:
        ip("netns", "add", names["10.9.0.2"])
        first, second = (f"v{name}" for name in names.values())
        ip("link", "add", first, "type", "veth", "peer", "name", second)
        for address, name in names.items():
            ip("link", "set", f"v{name}", "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"v{name}")
            ip("-n", name, "link", "set", f"v{name}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


@pytest.fixture
def typed(namespaces, tmp_path):
    """Give a factory: what a person types on a host, in their home folder, which all hosts share."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SYNTHBROKER", "SLURM"))}
    variables |= {"HOME": str(tmp_path), "SYNTHBROKER_REDIS_SERVER": str(any_binary().path)}
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
    running = []

    def start(host):
        words = ["ip", "netns", "exec", namespaces[HOSTS[host]], "bash", "-ec", f"exec {commands()[host].strip()}"]
        out = (tmp_path / f"{host}.log").open("wb")
        running.append((subprocess.Popen(words, cwd=tmp_path, env=variables, stdout=out, stderr=out), out))
        return running[-1][0]

    yield start
    for process, out in running:
        process.kill()
        process.wait()
        out.close()


def test_serving_generating_and_training_on_hosts_that_share_a_home(typed, tmp_path):
    for name, text in written_files().items():
        (tmp_path / name).write_text(text)
    assert sorted(written_files()) == ["my_module.py", "train.py"]
    serving = typed("A")
    eventually((tmp_path / ".synthbroker" / "broker.json").exists, "the server is up")
    generating, training = typed("B"), typed("C")
    said = (tmp_path / "C.log").read_text
    assert training.wait(90) == 0, said()
    assert generating.wait(60) == 0, (tmp_path / "B.log").read_text()
    assert said().count("torch.Size([4, 1, 32, 32, 32])") == 50
    assert "200 samples in ring brains" in (tmp_path / "B.log").read_text()
    serving.send_signal(signal.SIGINT)
    assert serving.wait(20) == 0
    shown = (tmp_path / "A.log").read_text()
    assert shown.splitlines()[-1] == "stopped"
    assert "not encrypted" in shown


def test_every_directive_of_the_slurm_files_has_its_line_for_pbs_and_lsf():
    files = sorted(README.parent.glob("slurm/*.sbatch"))
    if not files:
        pytest.skip("there are no SLURM files to compare with")
    used = {word for file in files for word in re.findall(r"--[a-z-]+", "".join(_directives(file)))}
    told = (README.parent / "slurm" / "OTHERS.md").read_text()
    assert {word for word in used if word not in told} == set()


def _directives(file):
    return [line for line in file.read_text().splitlines() if re.match(r"##?SBATCH", line)]


def test_the_container_has_all_that_its_installation_needs_and_no_line_of_it_is_unknown():
    text = (README.parent / "slurm" / "synthbroker.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)*)", text, re.MULTILINE))
    assert set(sections) == {"files", "post", "environment", "runscript", "test"}
    copied = dict(line.split() for line in sections["files"].splitlines() if line.strip())
    assert {source for source in copied if not (README.parent / source).exists()} == set()
    assert all(target == f"/opt/synthbroker/{source}" for source, target in copied.items())
    assert {"pyproject.toml", "README.md", "LICENSE", "synthbroker"} <= set(copied)  # what building a wheel takes
    for script in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=sections[script], text=True, check=True, timeout=20)
