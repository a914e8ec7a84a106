"""The command line: the only module that prints.

Exit codes: 0 fine, 1 something was in the way (one line on stderr says what), 2 wrong usage, 75 `generate` stopped
because its job ends, and would go on if it were started again (EX_TEMPFAIL of sysexits.h), 128 + n stopped by signal n
(130 for Ctrl-C, 138 for USR1).
"""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

import synthbroker
from synthbroker import acl, admin, arguments, books, machine, monitor, pictures, report, server, settings, shell, slurm
from synthbroker import endpoint as endpoint_file
from synthbroker.audit import audit
from synthbroker.bench import measures, outputs, place, plots, run, steps, table
from synthbroker.bench.table import Block
from synthbroker.connection import Connection
from synthbroker.durable import Durable
from synthbroker.endpoint import Endpoint
from synthbroker.errors import SynthbrokerError
from synthbroker.generate import generate
from synthbroker.peek import peek
from synthbroker.quarantine import quarantine
from synthbroker.server import ServerConfig
from synthbroker.tls import Tls
from synthbroker.units import format_size, plural

EXIT_TIME = 75
_NOT_ENCRYPTED = "not encrypted: who can read the network's traffic reads passwords and samples (--tls)\n"
_PLAIN_WIDTH = 200  # where there is no terminal whose width counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, or exits with 2 on wrong usage."""
    options = arguments.parser(synthbroker.__version__).parse_args(argv)
    _set_up_logging(options.command, options.verbose)
    try:
        code = _COMMANDS[options.command](options)
        sys.stdout.flush()  # a reader that went away shows here, not at exit
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (SynthbrokerError, OSError, TypeError, ValueError) as error:
        if options.verbose:
            logging.getLogger("synthbroker").exception("the error's own traceback")
        print(f"synthbroker: error: {error}", file=sys.stderr)
        return 1
    return code


def _set_up_logging(command: str, verbose: int) -> None:
    quiet = logging.INFO if command == "generate" else logging.WARNING
    levels = (quiet, logging.INFO, logging.DEBUG)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("synthbroker").setLevel(levels[min(verbose, 2)])
    logging.getLogger("synthbroker.bench").setLevel(logging.INFO)  # how far it is


def _serve(options: argparse.Namespace) -> int:
    path = _endpoint_path(options)
    by_socket_only = options.unix_socket is not None and options.port is None
    config = ServerConfig(
        host=options.host if options.interface is None else machine.interface_address(options.interface),
        port=None if by_socket_only else options.port or 0,
        unix_socket=options.unix_socket,
        maxmemory_bytes=options.maxmemory,
        tls=_tls(options),
        durable=_durable(options),
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # In a thread: the handler runs in the middle of `stop.wait`, which may hold the lock that `set` takes.
        signal.signal(number, lambda *_: threading.Thread(target=stop.set).start())
    server.serve(
        config,
        path,
        stop=stop,
        announce=lambda endpoint: _announce(endpoint, path, config.durable, options.grants),
        more=[wanted.path for wanted in options.grants],
    )
    print("stopped", flush=True)
    return 0


def _durable(options: argparse.Namespace) -> Durable | None:
    if (options.durable is None) != (options.dir is None):
        raise ValueError("serve --durable and --dir FOLDER belong together: rings are kept in that folder")
    return Durable(options.dir, options.durable) if options.dir else None


def _tls(options: argparse.Namespace) -> Tls | None:
    files = (options.tls_cert, options.tls_key, options.tls_ca)
    if (options.tls, *[file is not None for file in files]) not in ((True,) * 4, (False,) * 4):
        raise ValueError("serve --tls, --tls-cert FILE, --tls-key FILE and --tls-ca FILE belong together")
    return Tls(*files) if options.tls else None


def _endpoint_path(options: argparse.Namespace) -> Path:
    """Say where the endpoint file goes; --url may name it as all other commands do."""
    if options.url is not None:
        parts = urlsplit(options.url)
        if parts.scheme != "file" or options.endpoint is not None:
            raise ValueError("serve makes its own address: say only where to write it, --endpoint /path/broker.json")
        return Path(unquote(parts.path))
    path: Path = options.endpoint or settings.default_endpoint_path()
    return path.expanduser().absolute()


def _announce(endpoint: Endpoint, path: Path, durable: Durable | None, grants: Sequence[acl.Grant]) -> None:
    connection = Connection(path.as_uri())
    try:
        memory = books.server_memory(connection)
        for wanted in grants:
            acl.grant(connection, wanted, endpoint)
    finally:
        connection.close()
    where = endpoint.unix_socket or f"{endpoint.host}:{endpoint.port}"
    limit = f", at most {format_size(memory.limit_bytes)} of memory" if memory else ""
    print(
        f"serving on {where} (process {endpoint.pid}{limit})\n"
        f"address and password are in {path}, for you only\n"
        + "".join(f"those of {wanted.user} in {wanted.path}\n" for wanted in grants)
        + (_NOT_ENCRYPTED if endpoint.host and not endpoint.tls and not server.is_loopback(endpoint.host) else "")
        + "\n"
        f"  export SYNTHBROKER_URL={path.as_uri()}\n"
        f"  synthbroker generate my.module:brains --ring brains\n"
        f'  eval "$(synthbroker env)"; redis-cli PING\n\n'
        f"Ctrl-C stops it; {f'its rings are kept in {durable.folder}' if durable else 'nothing is kept'}.",
        flush=True,
    )


def _generate(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name not in ("command", "verbose")}
    outcome = generate(given.pop("target"), **given)
    print(report.of_outcome(options.ring, outcome, EXIT_TIME), flush=True)
    if outcome.signal is not None:
        return 128 + outcome.signal
    return EXIT_TIME if outcome.stopped == "time" else 0


def _status(options: argparse.Namespace) -> int:
    if options.ring is None:
        return _rings(options)
    status = monitor.status(options.ring, url=options.url)
    if options.json:
        print(json.dumps(dataclasses.asdict(status), indent=1))
        return 0
    if not options.watch:
        _show(report.of_status(status))
        return 0
    console = _console()
    if not console.is_terminal:
        raise ValueError("--watch needs a terminal; --json gives the same to a program")
    _watch(console, options)
    return 0


def _rings(options: argparse.Namespace) -> int:
    if options.watch:
        raise ValueError("--watch needs a ring's name: `synthbroker status` lists them")
    found = monitor.rings(url=options.url)
    if options.json:
        print(json.dumps([dataclasses.asdict(status) for status in found], indent=1))
    else:
        print("\n".join(map(report.of_ring, found)) or "there are no rings: `synthbroker generate` makes one")
    return 0


def _watch(console: Console, options: argparse.Namespace) -> None:
    pause = threading.Event()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    live.update(report.of_status(monitor.status(options.ring, url=options.url)), refresh=True)
                except SynthbrokerError as error:
                    live.update(Text(f"{error}\n\ntrying again; Ctrl-C to stop", "red"), refresh=True)
                pause.wait(max(options.every_s, 0.1))
    except KeyboardInterrupt:
        return


def _audit(options: argparse.Namespace) -> int:
    found = audit(options.ring, url=options.url)
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        _show(report.of_audit(found))
    return 0 if found.balanced else 1


def _quarantine(options: argparse.Namespace) -> int:
    found = quarantine(options.ring, url=options.url, clear=options.clear)
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    elif found:
        _show(report.of_quarantine(found))
    else:
        print(f"ring {options.ring} has no bad samples in its quarantine")
    return 0


def _peek(options: argparse.Namespace) -> int:
    samples = peek(options.ring, options.n, url=options.url)
    if not samples:
        print(f"ring {options.ring} holds no samples")
        return 0
    if options.png is not None:
        pictures.draw(samples, options.png)
    print("\n".join(report.of_sample(sample) for sample in samples))
    if options.png is not None:
        print(f"drawn in {options.png}")
    return 0


def _end(options: argparse.Namespace) -> int:
    admin.end(options.ring, url=options.url)
    print(f"ring {options.ring} has ended")
    return 0


def _drop(options: argparse.Namespace) -> int:
    if options.group is None and not options.yes and not _confirmed(options):
        print("nothing was dropped", file=sys.stderr)
        return 1
    producers = monitor.status(options.ring, url=options.url).producers.values() if options.group is None else ()
    admin.drop(options.ring, group=options.group, url=options.url)
    print(f"dropped {f'group {options.group} of ' if options.group else ''}ring {options.ring}")
    if alive := sum(one.state == "alive" for one in producers):
        print(
            f"producers that are alive, and will make it anew: {alive}; stop them, then drop it again", file=sys.stderr
        )
    return 0


def _confirmed(options: argparse.Namespace) -> bool:
    if not sys.stdin.isatty():
        raise ValueError(f"drop ring {options.ring} with all its samples? Say --yes, or --group for one group only")
    status = monitor.status(options.ring, url=options.url)
    print(
        f"drop ring {options.ring} with {status.live} {plural('sample', status.live)} ({format_size(status.bytes)})? "
        "[y/N] ",
        end="",
        flush=True,
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _acl(options: argparse.Namespace) -> int:
    path = options.endpoint.expanduser().absolute() if options.endpoint is not None else None
    wanted = acl.Grant(options.role, tuple(options.rings), path)
    connection = Connection(options.url)
    try:
        if path is None:
            print(acl.show(connection, wanted))
            print("nothing was done: --endpoint FILE makes the user", file=sys.stderr)
        else:
            print(acl.grant(connection, wanted, endpoint_file.of_file(options.url)))
            print(f"address and password of {wanted.user} are in {path}, for you only", file=sys.stderr)
    finally:
        connection.close()
    return 0


def _env(options: argparse.Namespace) -> int:
    print(shell.environment(options.url))
    if sys.stdout.isatty():
        print('# this is shell code: run it with  eval "$(synthbroker env)"', file=sys.stderr)
    return 0


def _slurm(options: argparse.Namespace) -> int:
    return _SLURM_ACTIONS[options.action](options)


def _slurm_init(options: argparse.Namespace) -> int:
    copied = slurm.init(options.folder)
    print("\n".join(f"{path}" for path in copied) or f"all templates are in {options.folder} already")
    print(f"edit {options.folder / 'env.sh'}, then: synthbroker slurm up {options.folder}")
    return 0


def _slurm_up(options: argparse.Namespace) -> int:
    flags = {name: getattr(options, name) for name in ("sbatch", *slurm.ROLES)}
    run = slurm.up(options.folder, without=options.without, down_after=options.down_after, **flags)
    print(report.of_run(run))
    return 0


def _slurm_status(options: argparse.Namespace) -> int:
    status = slurm.status(options.folder)
    if options.json:
        print(json.dumps(dataclasses.asdict(status), indent=1, default=str))
    else:
        _show(report.of_run_status(status))
    return 0


def _slurm_down(options: argparse.Namespace) -> int:
    cancelled = slurm.down(options.folder, wait_s=options.wait_s)
    print(f"cancelled {', '.join(cancelled)}; all jobs are gone" if cancelled else "its jobs had ended already")
    return 0


_SLURM_ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "init": _slurm_init,
    "up": _slurm_up,
    "status": _slurm_status,
    "down": _slurm_down,
}


def _bench(options: argparse.Namespace) -> int:
    blocks = _blocks(options)
    outcome = run.Outcome()
    seconds = options.seconds or (0.1 if options.quick else 3.0)
    repeats = options.repeats or (1 if options.quick else 5)
    with place.at(options.url, seconds=seconds, quick=options.quick) as here:
        if options.generator is not None:
            steps.check_generator(options.generator, here)
        about = place.describe(here)
        print(f"{table.head_of(about)}\n\n{table.HEAD}", flush=True)
        rows = run.run(blocks, here, outcome, repeats=repeats, only=options.only)
        if options.fake_step is not None:
            rows = (row for row in rows if row.note is None)  # why there is no figure is raised below
        for line in table.text_lines(rows):
            print(line, flush=True)
        if options.plot is not None:
            run.complete(plots.blocks(options.only, quick=options.quick), here, outcome, repeats=repeats)
    if options.json is not None:
        how = {"quick": options.quick, "repeats": repeats, "seconds": seconds}
        options.json.write_text(json.dumps({"about": about, "how": how, **outcome.as_json()}, indent=1) + "\n")
    if options.plot is not None:
        drawn = plots.draw(outcome, about, options.plot, options.only)
        print("\n" + "\n".join(f"drawn in {path}" for path in drawn))
    if options.fake_step is not None and outcome.failures:
        raise SynthbrokerError(next(iter(outcome.failures.values())))
    return 0


def _blocks(options: argparse.Namespace) -> tuple[Block, ...]:
    """Choose what is measured, and see that it can be asked for."""
    if options.json is not None:
        outputs.check("--json", options.json)
    if options.fake_step is not None:
        if options.plot is not None or options.only:
            raise ValueError("--fake-step comes instead of the table: leave --plot and --only out")
        return (steps.block(options.generator or steps.OWN, options.fake_step),)
    if options.generator is not None:
        raise ValueError("--generator goes with --fake-step: the measures of the table have samples of their own")
    if options.plot is not None:
        plots.check(options.plot, options.only)
    return measures.blocks(quick=options.quick)


def _show(what: RenderableType) -> None:
    """Print what a terminal's width is made for; into a file or a pipe without the blanks that fill its lines up."""
    console = _console()
    with console.capture() as caught:
        console.print(what)
    print("\n".join(line.rstrip(" ") for line in caught.get().split("\n")), end="")


def _console() -> Console:
    plain = not sys.stdout.isatty()
    return Console(highlight=False, markup=False, width=_PLAIN_WIDTH if plain else None, no_color=plain or None)


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "generate": _generate,
    "status": _status,
    "audit": _audit,
    "quarantine": _quarantine,
    "peek": _peek,
    "end": _end,
    "drop": _drop,
    "acl": _acl,
    "env": _env,
    "bench": _bench,
    "slurm": _slurm,
}
