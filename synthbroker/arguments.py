"""The words of the command line: subcommands, options, and the help that a person starts from."""

import argparse
from pathlib import Path
from typing import Any

from synthbroker import acl, durable, generate, limits, options, slurm, to, units
from synthbroker.usage import Parser

DESCRIPTION = (
    "A ring of training samples in Redis, between the programs that make them and the training that uses them."
)
EXAMPLES = """\
start here:
  synthbroker serve                                    start a server; it says how to reach it
  synthbroker generate my.module:brains --ring brains  put what a Python generator yields into a ring
  synthbroker status brains --watch                    see it fill
  synthbroker peek brains --png look.png               see what is in it

The server is --url, else SYNTHBROKER_URL, else the one that `synthbroker serve` started for this user.
`synthbroker COMMAND --help` says more."""


def parser(version: str) -> argparse.ArgumentParser:
    """Make the parser; what it returns has `command` and that command's options."""
    top = Parser("synthbroker", description=DESCRIPTION, epilog=EXAMPLES, **_STYLE)
    top.add_argument("--version", action="version", version=f"synthbroker {version}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_serve, _add_generate, _add_status, _add_audit, _add_quarantine, _add_peek, _add_end, _add_drop,
                _add_acl, _add_env, _add_bench, _add_slurm):  # fmt: skip
        add(commands)
    return top


_STYLE: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}


_Commands = Any  # argparse's own name for it is private


def _command(commands: _Commands, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"examples:\n{examples}", **_STYLE
    )
    command.add_argument(
        "--url", type=to.url, help="redis://, rediss://, unix://, or file:///path/of/an/endpoint/file.json"
    )
    command.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice for everything")
    return command


def _add_serve(commands: _Commands) -> None:
    command = _command(
        commands,
        "serve",
        "start a Redis server fit for rings, and say how to reach it",
        "  synthbroker serve\n"
        "  synthbroker serve --maxmemory 32GB --host 0.0.0.0 --endpoint /shared/run/broker.json\n"
        "  synthbroker serve --unix-socket /tmp/me/redis.sock\n"
        "  synthbroker serve --durable --dir /scratch/me/rings   # started again there, it has its rings again\n"
        "  synthbroker serve --grant generator:brains=/shared/run/generator.json",
    )
    add = command.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s; 0.0.0.0 for all)")
    add("--interface", metavar="NAME", help="listen on the address of this network interface, like ib0, instead")
    add("--port", type=to.whole(0, 65535), help="TCP port (default: a free one)")
    add("--unix-socket", type=Path, metavar="PATH", help="listen on this socket; without --port: on nothing else")
    add(
        "--maxmemory",
        type=to.size,
        metavar="SIZE",
        help="most memory for all rings (default: 70%% of what there is)",
    )
    add("--endpoint", type=Path, metavar="FILE", help="where to write address and password, readable by you only")
    add("--durable", nargs="?", choices=durable.FSYNC, const="everysec",
        help="keep the rings in --dir: flush to disk each second (default), or always, which costs more")  # fmt: skip
    add("--dir", type=Path, metavar="FOLDER",
        help="with --durable: where; takes up to 3 times --maxmemory of disk")  # fmt: skip
    add("--tls", action="store_true", help="encrypt what goes through the port; takes the next three")
    add("--tls-cert", type=Path, metavar="FILE", help="the server's certificate, for the name that clients look for")
    add("--tls-key", type=Path, metavar="FILE", help="its key, without a passphrase")
    add("--tls-ca", type=Path, metavar="FILE", help="the certificate of the authority that signed it, for clients, too")
    add("--grant", dest="grants", type=to.grant, action="append", default=[], metavar="ROLE:RING=FILE",
        help=f"make a user with few rights ({', '.join(acl.ROLES)}) and its endpoint file; repeatable")  # fmt: skip


def _add_generate(commands: _Commands) -> None:
    command = _command(
        commands,
        "generate",
        "run a Python generator in worker processes and put what it yields into a ring",
        "  synthbroker generate my.module:brains --ring brains --workers 4\n"
        "  synthbroker generate my.module:brains --ring brains --capacity 8GB --when-full drop-oldest\n\n"
        "  # my/module.py\n"
        "  def brains(worker):                        # worker.index, .count, .seed, .array_task_id, .device\n"
        "      rng = numpy.random.default_rng(worker.seed)\n"
        "      while True:\n"
        '          yield {"image": ..., "label": ...}  # numpy arrays or torch tensors\n\n'
        "SIGINT, SIGTERM and --stop-signal finish the samples in hand; a second one ends at once. When all workers\n"
        "are done the ring is ended, unless --keep-open or --producers say otherwise.\n\n"
        "exit codes: 0 all done, --idle-s, or the ring was ended; 1 failed; 75 stopped before the job ends: start it\n"
        "again to go on; 128 + n stopped by signal n (USR1: 138)",
    )
    add = command.add_argument
    add("target", metavar="MODULE:FUNCTION", help="found in the current directory or on Python's path")
    add("--ring", type=to.ring_name, required=True, help="name of the ring; made if it is not there")
    add("--workers", type=to.whole(1), default=1, metavar="N", help="processes (default: %(default)s)")
    add(
        "--seed",
        type=to.whole(0),
        metavar="N",
        help="derive the workers' seeds from this (default: a random number)",
    )
    add("--device", help="for the generator: cpu, cuda:0, …; cuda deals out the GPUs in CUDA_VISIBLE_DEVICES")
    add("--fields", type=to.names, metavar="A,B", help="names for samples that are tuples")
    add("--keep-open", action="store_true", help="do not end the ring when all workers are done")
    add("--grace-s", type=to.seconds, default=generate.DEFAULT_GRACE_S, metavar="S",
        help="seconds to finish in after a signal (default: %(default)g)")  # fmt: skip
    add("--name", help="names the producers NAME-w0, NAME-w1, …, counted on over the processes of `srun -n`: newer "
        "ones of the same name shut older ones out")  # fmt: skip
    _add_limits(command)
    _add_ring_options(command)


def _add_limits(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("when it stops by itself").add_argument
    add("--stop-signal", choices=generate.STOP_SIGNALS, default="USR1", help="stops as SIGTERM does (default: USR1)")
    add("--ends-in-s", type=to.seconds, metavar="S",
        help="this job ends in S seconds (default: SLURM_JOB_END_TIME; inf: never): no sample is begun that would "
        "probably not be done by then")  # fmt: skip
    add("--margin-s", type=to.seconds, default=limits.DEFAULT_MARGIN_S, metavar="S",
        help="seconds before that when everything shall be over (default: %(default)g)")  # fmt: skip
    add("--idle-s", type=to.seconds, metavar="S",
        help="end, and give the node back, when no worker had room in the ring for S seconds")  # fmt: skip


def _add_ring_options(command: argparse.ArgumentParser) -> None:
    new = command.add_argument_group(
        "the ring", "For a ring that is there already these must be as it was made."
    ).add_argument
    new(
        "--capacity",
        type=to.size,
        metavar="SIZE",
        help="server memory (default: half of the server's, else 2GB)",
    )
    new("--max-samples", type=to.whole(0), metavar="N", help="most samples in the ring; 0: no such limit")
    new("--when-full", choices=options.POLICIES, help="block waits for the readers (default); drop-oldest does not")
    new("--group", dest="groups", type=to.group_name, action="append", default=[], metavar="G",
        help="a group that gets everything from now on; may be repeated")  # fmt: skip
    new("--producers", type=to.whole(0), metavar="N", help="the ring ends when N producers (workers) are done")
    new(
        "--schema",
        type=to.schema,
        metavar="TEXT",
        help="like 'image:f32[1,*,*,*] label:u8[...]' (default: of the first sample)",
    )
    new("--info", type=to.json_object, metavar="JSON", help="what readers should know, like '{\"classes\": 4}'")
    new("--checks", type=to.checks, metavar="TEXT", help="keep samples out whose values are not so, like "
        "'image:finite,range(0,1),varied label:range(0,3)'; * for all fields")  # fmt: skip
    new("--finite", action="store_true", default=None, help="short for --checks '*:finite'")
    new("--reopen", action="store_true", help="begin a new run on a ring that has ended")
    sending = command.add_argument_group("sending").add_argument
    sending(
        "--codec", default="auto", help="auto, lz4, zstd, lz4-bitshuffle, zstd-bitshuffle or raw (default: %(default)s)"
    )
    sending("--cast", type=to.casts, metavar="TEXT", help="send with fewer bits, and lose some: 'image:float16', "
            "'image:bfloat16', or 'image:bitround:12 depth:float16'")  # fmt: skip
    sending("--in-flight", type=to.size, default=units.parse_size("160MB"), metavar="SIZE",
            help="most memory for samples on their way, per worker (default: 160MB)")  # fmt: skip
    sending(
        "--wait-s",
        type=to.seconds,
        default=600.0,
        metavar="S",
        help="seconds to wait for room (default: %(default)g)",
    )
    sending("--reconnect-s", type=to.seconds, default=300.0, metavar="S",
            help="seconds to wait for a server that went away (default: %(default)g)")  # fmt: skip


def _add_status(commands: _Commands) -> None:
    command = _command(
        commands,
        "status",
        "show what a ring holds, who is at it, and whether its ledger adds up",
        "  synthbroker status            # which rings there are\n"
        "  synthbroker status brains\n"
        "  synthbroker status brains --watch\n"
        "  synthbroker status brains --json | jq .groups.train.lost",
    )
    command.add_argument("ring", type=to.ring_name, nargs="?", help="without it: all rings, one a line")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, for programs")
    form.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    command.add_argument(
        "--every-s", type=to.seconds, default=2.0, metavar="S", help="with --watch (default: %(default)g)"
    )


def _add_audit(commands: _Commands) -> None:
    command = _command(
        commands,
        "audit",
        "count a ring through and prove that nothing is lost: exit code 0 if its books balance, 1 with each difference",
        "  synthbroker audit brains\n  synthbroker audit brains --json | jq .balanced",
    )
    command.add_argument("ring", type=to.ring_name)
    command.add_argument("--json", action="store_true", help="everything, for programs")


def _add_quarantine(commands: _Commands) -> None:
    command = _command(
        commands,
        "quarantine",
        "list the bad samples of a ring: when, which, whose, what was wrong, and the recipe that makes it again",
        "  synthbroker quarantine brains\n"
        "  synthbroker quarantine brains --json | jq '.[].recipe.seed'\n"
        "  synthbroker quarantine brains --clear",
    )
    command.add_argument("ring", type=to.ring_name)
    command.add_argument("--json", action="store_true", help="everything, for programs")
    command.add_argument("--clear", action="store_true", help="forget those that are shown; their count stays")


def _add_peek(commands: _Commands) -> None:
    command = _command(
        commands,
        "peek",
        "look at the newest samples of a ring; nothing is taken",
        "  synthbroker peek brains\n  synthbroker peek brains -n 8 --png look.png",
    )
    command.add_argument("ring", type=to.ring_name)
    command.add_argument("-n", type=to.whole(1), default=4, help="how many (default: %(default)s)")
    command.add_argument("--png", type=Path, metavar="FILE", help="draw them; needs the extra synthbroker[plot]")


def _add_end(commands: _Commands) -> None:
    command = _command(
        commands,
        "end",
        "end a ring: it takes no more samples, and readers stop when they have had everything",
        "  synthbroker end brains",
    )
    command.add_argument("ring", type=to.ring_name)


def _add_drop(commands: _Commands) -> None:
    command = _command(
        commands,
        "drop",
        "remove a ring with all its samples, or a group that nobody reads any more",
        "  synthbroker drop brains --group val\n  synthbroker drop brains --yes",
    )
    command.add_argument("ring", type=to.ring_name)
    command.add_argument("--group", type=to.group_name, help="only this group of it")
    command.add_argument("--yes", action="store_true", help="do not ask before a whole ring is dropped")


def _add_acl(commands: _Commands) -> None:
    command = _command(
        commands,
        "acl",
        "make a user who may do no more on the server than its work takes, or show how",
        "  synthbroker acl generator --ring brains --endpoint generator.json\n"
        "  SYNTHBROKER_URL=file://$PWD/generator.json synthbroker generate my.module:brains --ring brains\n"
        "  synthbroker acl trainer --ring brains                 # only shows what redis-cli would be told\n\n"
        "A generator commits to its rings, a trainer takes and acknowledges, a viewer looks. The user lasts as long\n"
        "as the server; `synthbroker serve --grant` makes it at each start. Said again, its password is a new one.",
    )
    add = command.add_argument
    add("role", choices=tuple(acl.ROLES))
    add("--ring", dest="rings", type=to.ring_name, action="append", required=True, metavar="RING",
        help="a ring it may work on; may be repeated")  # fmt: skip
    add("--endpoint", type=Path, metavar="FILE", help="make the user, and write its endpoint file here")


def _add_env(commands: _Commands) -> None:
    _command(
        commands,
        "env",
        "print shell code (bash, zsh) after which redis-cli reaches the same server; it holds the password",
        '  eval "$(synthbroker env)"\n  redis-cli XLEN sb:{brains}:samples',
    )


def _add_bench(commands: _Commands) -> None:
    command = _command(
        commands,
        "bench",
        "measure how fast it is on this machine, side by side with plain redis-py, sockets, queues and DataLoaders",
        "  synthbroker bench --quick\n"
        "  synthbroker bench --only 1,2,3 --repeats 3\n"
        "  synthbroker bench --json bench.json --plot pictures\n"
        "  synthbroker bench --fake-step 0.05 --generator my.module:brains",
    )
    add = command.add_argument
    add("--quick", action="store_true",
        help="everything once and small: to see that it works; its figures are no measures")  # fmt: skip
    add("--only", type=to.measures, default=(), metavar="N,N", help="only the measures with these numbers")
    add(
        "--repeats",
        type=to.whole(1),
        metavar="N",
        help="times that each is measured (default: 5; with --quick: 1)",
    )
    add("--seconds", type=to.seconds, metavar="S", help="length of one run (default: 3; with --quick: 0.1)")
    add("--json", type=Path, metavar="FILE", help="where to write every single figure")
    add("--plot", type=Path, metavar="FOLDER",
        help="where to draw throughput by size (with --only: of those sizes that measures 1 to 4 ask for) and, without "
        "--only, time by num_workers as well")  # fmt: skip
    add("--fake-step", type=to.seconds, metavar="S",
        help="instead: a training loop that sleeps S seconds per step; says how long it waits for data")  # fmt: skip
    add("--generator", metavar="MODULE:FUNCTION", help="with --fake-step: your own, as for `generate`")


def _add_slurm(commands: _Commands) -> None:
    text = "submit a broker, generators and a training to a SLURM cluster, look at them, and tear them down"
    command = commands.add_parser(
        "slurm",
        help=text,
        description=text,
        epilog="examples:\n"
        "  synthbroker slurm init /shared/run7     # puts the templates there: edit env.sh\n"
        "  synthbroker slurm up /shared/run7\n"
        '  synthbroker slurm up --sbatch="--partition=long --account=me" --generators="--array=0-99%8" --train="-N 2"\n'
        "  synthbroker slurm status /shared/run7\n"
        "  synthbroker slurm down /shared/run7",
        **_STYLE,
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, help_ in _SLURM_ACTIONS.items():
        action = actions.add_parser(name, help=help_, description=help_, **_STYLE)
        action.add_argument("folder", type=Path, nargs="?", default=Path(),
            help="of the run, on the file system that all nodes share (default: this one)")  # fmt: skip
        action.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice for everything")
        if name == "up":
            _add_up(action)
        if name == "status":
            action.add_argument("--json", action="store_true", help="everything, for programs")
        if name == "down":
            action.add_argument("--wait-s", type=to.seconds, default=slurm.DOWN_S, metavar="S",
                help="seconds that the jobs may take to end (default: %(default)g)")  # fmt: skip


_SLURM_ACTIONS = {
    "init": "put the templates into a folder, to be edited there",
    "up": "submit broker, generators and training; the latter two start after the broker has",
    "status": "show the jobs of a run, its broker, its rings, and the end of the log of what failed",
    "down": "cancel the jobs of a run, wait until they are gone, and remove its endpoint file",
}


def _add_up(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--sbatch", default="", metavar="FLAGS", help='more flags of sbatch for all jobs: --sbatch="--partition=long"')
    for role in slurm.ROLES:
        add(f"--{role}", default="", metavar="FLAGS", help=f"more for {role}.sbatch alone; they win")
    add("--without", choices=slurm.ROLES, action="append", default=[], help="leave this job out; may be repeated")
    add("--down-after", action="store_true", help="cancel the others when the training has ended")
