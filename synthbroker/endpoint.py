"""The endpoint file: where a server is and how to log in, written by `serve`, read by everybody else.

One JSON object of at most 64 KiB, in a file of mode 0600:

```
{"format": "synthbroker-endpoint", "version": 1,
 "host": "node7", "port": 6380, "unix_socket": null,                    host and port, or a socket's path
 "tls": true, "ca": "/site/ca.pem",                                     ca: null where there is no TLS
 "user": "default", "password": "…", "identity": "…",                   identity: see `Endpoint`
 "pid": 4711, "host_name": "node7", "job_id": "99", "started": "2025-01-31T12:00:00+00:00"}
```

Keys that this version does not know are passed over; `ca` may be absent, as it was once.
"""

import ipaddress
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from synthbroker import settings
from synthbroker.errors import EndpointError, EndpointMissingError

FORMAT = "synthbroker-endpoint"
VERSION = 1
LARGEST_FILE_BYTES = 64 * 1024
SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True)
class Endpoint:
    """One server's address, credentials and origin.

    Attributes:
        host: Where clients reach it, None if only by a unix socket.
        port: Its TCP port, None if only by a unix socket.
        unix_socket: Absolute path of its socket, None if clients come by TCP.
        tls: Whether TCP is encrypted.
        user: Redis user.
        password: Its password; empty if there is none. Never shown by `repr`.
        identity: Random word of this one life of a server, also its `CONFIG GET syslog-ident`, which nobody can
            change while it runs: so one can tell it from another server that took its port.
        pid: Process id on the host that it runs on.
        host_name: Name of that host.
        job_id: SLURM job that it runs in, if any.
        started: When, in ISO 8601 and UTC.
        ca: With `tls`: absolute path of the certificate that the server's own is checked with; None: the machine's.
    """

    host: str | None
    port: int | None
    unix_socket: str | None
    tls: bool
    user: str
    password: str
    identity: str
    pid: int
    host_name: str
    job_id: str | None
    started: str
    ca: str | None = None

    def url(self) -> str:
        """Write the Redis URL, with all that is not plain percent-encoded. It holds the password: see `redact`."""
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.password else ""
        if self.unix_socket is not None:
            return f"unix://{login}{quote(self.unix_socket)}"
        host = f"[{self.host}]" if self.host and ":" in self.host else self.host
        checked = f"?ssl_ca_certs={quote(self.ca)}" if self.tls and self.ca else ""
        return f"{'rediss' if self.tls else 'redis'}://{login}{host}:{self.port}/0{checked}"

    def __repr__(self) -> str:
        return f"Endpoint({redact(self.url())!r}, identity={self.identity!r}, pid={self.pid})"


def write(path: Path, endpoint: Endpoint) -> None:
    """Write the file so that a reader sees the old one or the new one, whole, and nobody else sees either.

    Raises:
        EndpointError: The file cannot be written there.
    """
    text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(endpoint)}, indent=1)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkstemp makes files of mode 0600; the same folder, so that the rename is atomic.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise EndpointError(f"cannot write the endpoint file {path}: {error}") from error


def read(path: Path) -> Endpoint:
    """Read and check an endpoint file.

    Raises:
        EndpointMissingError: It is not there.
        EndpointError: Empty, too long, not JSON, of another version, or a field that cannot be.
    """
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EndpointError(f"endpoint file {path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EndpointError(f"{path} is not an endpoint file: it does not say format {FORMAT!r}")
    if not _is_int(content.get("version")) or content["version"] != VERSION:
        raise EndpointError(
            f"endpoint file {path} has version {content.get('version')!r}, this synthbroker reads {VERSION}: "
            "use the same version of synthbroker for server and clients"
        )
    return _check(path, content)


@dataclass(frozen=True)
class Address:
    """Where to connect.

    Attributes:
        url: A Redis URL; it may hold a password.
        identity: Of the server that wrote the endpoint file; None where the user named the server itself.
    """

    url: str = field(repr=False)
    identity: str | None = None


def resolve(url: str | None) -> str:
    """Turn what the user gave into a Redis URL: `locate`, without the identity."""
    return locate(url).url


def locate(url: str | None) -> Address:
    """Find the server that the user means; an endpoint file is read anew at each call.

    Args:
        url: `redis://`, `rediss://` or `unix://`, checked and handed back; `file:///path/broker.json`, an endpoint
            file; or None, what the environment says.

    Raises:
        ValueError: Not such a URL; the message shows no password.
        EndpointMissingError: The endpoint file is not there.
        EndpointError: The endpoint file is wrong, or the environment names no server.
    """
    text = settings.default_url() if url is None else url
    scheme = text.partition("://")[0] if "://" in text else ""
    if scheme == "file":
        named = read(_path_of(text))
        return Address(named.url(), named.identity)
    if scheme not in SCHEMES:
        raise ValueError(
            f"not a server's URL: {redact(text)!r}; give redis://, rediss:// or unix://, "
            "or an endpoint file as file:///path/broker.json"
        )
    _check_address(text, scheme)
    return Address(text)


def of_file(url: str | None) -> Endpoint:
    """Read the endpoint file that the user, or else the environment, names.

    Raises:
        EndpointError: It is missing or wrong, or what is named is no endpoint file.
    """
    text = settings.default_url() if url is None else url
    if not text.startswith("file:"):
        raise EndpointError(
            f"{redact(text)!r} is not an endpoint file: name the one that `synthbroker serve` wrote, "
            "--url file:///path/broker.json"
        )
    return read(_path_of(text))


def redact(url: str) -> str:
    """Take the password out of a URL, for messages and logs; what is no proper URL loses too much, never too little."""
    url = re.sub(r"(?i)([?&][^=&#]*password=)[^&#]*", r"\1***", url)
    before, at, after = url.rpartition("@")
    if not at:
        return url
    scheme, separator, login = before.partition("://") if "://" in before else ("", "", before)
    user, colon, _ = login.partition(":")
    return f"{scheme}{separator}{user}:***@{after}" if colon else url


def _read_text(path: Path) -> str:
    try:
        # A fifo or a device could block, or go on for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise EndpointError(f"endpoint file {path} is not a file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise EndpointMissingError(f"there is no endpoint file {path}: is `synthbroker serve` running?") from error
    except (OSError, ValueError) as error:
        raise EndpointError(f"cannot read the endpoint file {path}: {error}") from error
    if len(content) > LARGEST_FILE_BYTES:
        raise EndpointError(f"endpoint file {path} is longer than {LARGEST_FILE_BYTES} bytes: not one of ours")
    if not content.strip():
        raise EndpointError(f"endpoint file {path} is empty: was the disk full when the server started?")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise EndpointError(f"endpoint file {path} is not UTF-8: {error}") from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    """Accept printable text only: no control characters, no lone surrogates that no URL could hold."""
    return isinstance(value, str) and value.isprintable()


def _is_word(value: object) -> bool:
    return _is_text(value) and value != ""


def _is_host(value: object) -> bool:
    if not isinstance(value, str) or len(value) > 255:
        return False
    if ":" not in value:
        return re.fullmatch(r"[A-Za-z0-9._-]+", value) is not None
    try:
        return ipaddress.IPv6Address(value).scope_id is None
    except ValueError:
        return False


def _is_path(value: object) -> bool:
    return _is_word(value) and str(value).startswith("/")


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "host": (lambda value: value is None or _is_host(value), "null or a host name or address"),
    "port": (lambda value: value is None or (_is_int(value) and 1 <= value <= 65535), "null or 1 … 65535"),
    "unix_socket": (lambda value: value is None or _is_path(value), "null or an absolute path"),
    "tls": (lambda value: isinstance(value, bool), "true or false"),
    "user": (_is_word, "text"),
    "password": (_is_text, "text"),
    "identity": (_is_word, "text"),
    "pid": (lambda value: _is_int(value) and value >= 1, "a number from 1"),
    "host_name": (_is_word, "text"),
    "job_id": (lambda value: value is None or _is_word(value), "null or text"),
    "started": (_is_word, "text"),
    "ca": (lambda value: value is None or _is_path(value), "null or an absolute path"),
}


def _check(path: Path, content: dict[str, Any]) -> Endpoint:
    content = {"ca": None, **content}
    for each in fields(Endpoint):
        name = each.name
        if name not in content:
            raise EndpointError(f"endpoint file {path} lacks {name!r}")
        is_valid, wanted = _FIELDS[name]
        if not is_valid(content[name]):
            # The value of a wrong password field is still not for logs.
            shown = "***" if name == "password" else repr(content[name])[:80]
            raise EndpointError(f"endpoint file {path}: {name!r} must be {wanted}, is {shown}")
    endpoint = Endpoint(**{each.name: content[each.name] for each in fields(Endpoint)})
    by_tcp = endpoint.host is not None and endpoint.port is not None
    if by_tcp == (endpoint.unix_socket is not None):
        raise EndpointError(f"endpoint file {path} must name either host and port or a unix_socket")
    return endpoint


def _path_of(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise ValueError(f"an endpoint file is given by its absolute path, file:///path/broker.json, got {url!r}")
    return Path(path)


def _check_address(url: str, scheme: str) -> None:
    try:
        parts = urlsplit(url)
        address = parts.path if scheme == "unix" else parts.hostname
        _ = parts.port if scheme != "unix" else None
    except ValueError:
        # Not chained: urllib's own message may quote a piece of the password.
        address = None
    if not address:
        raise ValueError(
            f"the URL {redact(url)!r} names no server: it should read {_SHAPES[scheme]}, "
            "with '/', '@', ':' and '#' of a password percent-encoded"
        ) from None


_SHAPES = {
    "redis": "redis://user:password@host:6379/0",
    "rediss": "rediss://user:password@host:6379/0",
    "unix": "unix://user:password@/path/of/socket",
}
