"""An endpoint file belongs to one server at a time: whose it is, and who may take it over."""

import os
import secrets
import ssl
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from synthbroker import endpoint, probe, settings
from synthbroker.endpoint import Endpoint
from synthbroker.errors import EndpointError, ServerStartError


def refuse_to_replace(path: Path) -> None:
    """Leave the endpoint file of a server that still answers alone: nobody would find that one again.

    Raises:
        ServerStartError: There is such a server.
    """
    with suppress(EndpointError, ssl.SSLCertVerificationError):  # whom nobody would trust, nobody needs to find
        other = endpoint.read(path)
        if is_of_former_life(other):
            return
        if probe.answers(other, patience_s=3.0):
            raise ServerStartError(
                f"{path} belongs to a server that is running: process {other.pid} on {other.host_name}. "
                "Use it, stop it, or give this one another endpoint file"
            )


def is_of_former_life(other: Endpoint) -> bool:
    """Say whether a server is of this very job, before it was requeued: it may linger on a node that SLURM has lost."""
    job = settings.job()
    return job.job_id is not None and other.job_id == job.job_id and bool(job.restart_count)


def announce_successor(path: Path, former: Endpoint) -> None:
    """Let a server that lingers know, by the file that it looks at, that another one takes its place, and ends it so.

    Nobody answers to the identity that the file then has: clients try again until the successor has written its own.

    Raises:
        EndpointError: The file cannot be written.
    """
    host_name = settings.job().host
    endpoint.write(path, replace(former, identity=secrets.token_hex(8), pid=os.getpid(), host_name=host_name))


def check_own(path: Path, identity: str) -> None:
    """End a server whose clients have another one: that of its own job, which SLURM has requeued elsewhere.

    Raises:
        EndpointError: The file names another server.
    """
    try:
        other = endpoint.read(path)
    except EndpointError:
        return  # gone, or not to be read just now: nobody else serves there
    if other.identity != identity:
        raise EndpointError(
            f"{path} names another server by now, process {other.pid} on {other.host_name}: this one ends"
        )


def remove_own(path: Path, identity: str) -> None:
    """Remove the file of a server that has ended, unless it is another one's by now."""
    with suppress(EndpointError, OSError):  # gone, or a newer server's: not ours to remove
        if endpoint.read(path).identity == identity:
            path.unlink()
