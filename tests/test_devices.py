"""`generate --device`: a GPU that is not there is refused in one line."""

import subprocess
import sys

import pytest
import torch

from synthbroker import lanes

GENERATORS = """
{imports}

def ones(worker):
    with open("began", "w") as file:
        file.write(str(worker.device))
    yield {{"x": 1}}
"""


def generate(server, ring_name, folder, device, imports="import torch"):
    (folder / "gen.py").write_text(GENERATORS.format(imports=imports))
    command = [sys.executable, "-m", "synthbroker", "generate", "gen:ones", "--ring", ring_name, "--url", server.url]
    command += ["--device", device]
    return subprocess.run(command, check=False, cwd=folder, text=True, capture_output=True, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused_before_the_generator_begins(server, ring_name, tmp_path):
    done = generate(server, ring_name, tmp_path, "cuda")
    assert done.returncode != 0
    assert "device 'cuda' is not there: torch" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "began").exists()


def test_a_generator_without_torch_is_told_its_device_unasked(server, ring_name, tmp_path):
    done = generate(server, ring_name, tmp_path, "cuda:7", imports="")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "began").read_text() == "cuda:7"


@pytest.mark.parametrize("device", [None, "cpu", "mps", "xpu:1"])
def test_of_other_devices_nothing_is_said(device):
    lanes.check_there(device)


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cuda:-1", "cuda0"])
def test_words_that_look_like_a_gpu_and_are_none_are_refused(device):
    with pytest.raises(ValueError, match="must be cuda or cuda:N"):
        lanes.check_there(device)
