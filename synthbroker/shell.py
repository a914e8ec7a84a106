"""Shell code after which `redis-cli` and synthbroker reach the same server, for bash and zsh."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from shlex import join, quote
from urllib.parse import parse_qs, unquote, urlsplit

from synthbroker import endpoint, machine, settings
from synthbroker.errors import ServerStartError

_PROGRAMS = ("redis-cli", "valkey-cli")


def environment(url: str | None) -> str:
    """Write what `eval "$(synthbroker env)"` runs.

    The password goes into a variable, REDISCLI_AUTH, which `ps` does not show; it is in this text: do not log it.

    Args:
        url: The server, None for what the environment says.

    Raises:
        EndpointError, ValueError: No server is named.
    """
    named = settings.default_url() if url is None else url
    address = endpoint.resolve(named)
    password = unquote(urlsplit(address).password or "")
    lines = [
        f"export SYNTHBROKER_URL={quote(named)}",
        f"export REDISCLI_AUTH={quote(password)}" if password else "unset REDISCLI_AUTH",
    ]
    program = find_client()
    if program is None:
        lines.append("# no redis-cli is installed; Debian has it in the package redis-tools")
    else:
        lines.append(f'redis-cli() {{ {program} {join(_options(address))} "$@"; }}')
    return "\n".join(lines)


def find_client() -> str | None:
    """Say, as a shell would run it, what redis-cli is on the PATH, or beside the server that `serve` would start."""
    for name in _PROGRAMS:
        if shutil.which(name):
            return f"command {name}"
    try:
        folder = machine.find_server().resolve().parent
    except ServerStartError:
        return None
    return next((quote(str(folder / name)) for name in _PROGRAMS if _can_run(folder / name)), None)


def _can_run(path: Path) -> bool:
    return os.access(path, os.X_OK)


def _options(address: str) -> Iterator[str]:
    parts = urlsplit(address)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if parts.scheme == "unix":
        yield from ("-s", unquote(parts.path))
    else:
        yield from ("-h", parts.hostname or "localhost", "-p", str(parts.port or 6379))
    if parts.scheme == "rediss":
        yield "--tls"
        if "ssl_ca_certs" in query:
            yield from ("--cacert", query["ssl_ca_certs"])
    if parts.username and unquote(parts.username) != "default":
        yield from ("--user", unquote(parts.username))
    database = query.get("db") or (parts.path.strip("/") if parts.scheme != "unix" else "")
    if database not in ("", "0"):
        yield from ("-n", database)
