"""Whole programs: they exit at once whatever they were doing, and need torch only for what is made of it."""

import subprocess
import sys
import time

import pytest

from tools import SOON_S, fill, members

PROGRAMS = {
    "a consumer that waits": """
c = sb.Consumer(url, ring=ring, group="g")
s = iter(c)
for _ in range(5): next(s)
""",
    "a dataset in the middle": """
s = iter(sb.RingDataset(url, ring=ring, group="g", batch_size=2).loader())
next(s)
""",
    "workers in the middle": """
s = iter(sb.RingDataset(url, ring=ring, group="g").loader(num_workers=2, multiprocessing_context="fork"))
next(s)
""",
    "workers that are left": """
for b in sb.RingDataset(url, ring=ring, group="g").loader(num_workers=2, multiprocessing_context="fork"): break
""",
    "a producer that nobody closed": """
out = sb.Producer(url, ring=ring)
out.put({"n": 7, "x": np.full(4, 7, np.float32)})
""",
    "one that was never used": """
out = sb.Producer(url, ring=ring)
data = sb.RingDataset(url, ring=ring, group="g")
""",
}


def python(text, *arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", text, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("what", PROGRAMS)
def test_the_interpreter_exits_at_once(server, ring_name, what):
    fill(server, ring_name, range(5), producers=0)
    head = "import sys, numpy as np, synthbroker as sb\nurl, ring = sys.argv[1:]\n"
    with python(head + PROGRAMS[what] + "print('done', flush=True)\n", server.url, ring_name) as process:
        assert process.stdout.readline() == "done\n", process.stderr.read()
        began = time.monotonic()
        _, errors = process.communicate(timeout=SOON_S)
        assert time.monotonic() - began < 4, "threads or workers kept it"
    assert (process.returncode, errors) == (0, "")
    if "producer" in what:
        assert server.client().xlen(f"sb:{{{ring_name}}}:samples") == 6, "what was put is sent at exit"
    assert members(server, ring_name, "g") == []


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import synthbroker as sb
url, ring = sys.argv[1:]
with sb.Producer(url, ring=ring, capacity="1MB", producers=1) as out:
    out.put({"n": 1})
print([batch["n"].tolist() for batch in sb.Consumer(url, ring=ring, group="g")])
print(sb.peek(ring, url=url)[0]["n"])
try:
    sb.RingDataset
except sb.MissingExtraError as error:
    print(error)
"""


def test_everything_but_the_dataset_works_without_torch(server, ring_name):
    with python(WITHOUT_TORCH, server.url, ring_name) as process:
        out, errors = process.communicate(timeout=SOON_S)
    assert errors == ""
    numbers, number, advice = out.splitlines()
    assert (numbers, number) == ("[[1]]", "1")
    assert "synthbroker[torch]" in advice


def test_importing_loads_no_torch_before_the_dataset_is_asked_for():
    text = (
        "import sys, synthbroker as sb\nassert 'torch' not in sys.modules\n"
        "sb.RingDataset\nassert 'torch' in sys.modules"
    )
    with python(text) as process:
        _, errors = process.communicate(timeout=SOON_S)
    assert errors == ""
