"""TLS: the site's certificates for a server, and what its clients check them with.

Clients are known by their passwords, not by certificates of their own. The server's certificate must hold the name that
the endpoint file calls it by, and be signed by the authority whose certificate `ca` is.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

from synthbroker.errors import EndpointError, ServerStartError


@dataclass(frozen=True)
class Tls:
    """A server's certificate.

    Attributes:
        cert: File of the certificate, those in between behind it, in PEM.
        key: File of its key, without a passphrase.
        ca: File of the authority's certificate, where clients can read it, too.
    """

    cert: Path
    key: Path
    ca: Path

    def check(self) -> None:
        """Refuse what no server could use, before one is started.

        Raises:
            ServerStartError: A file cannot be read, is none, or the two do not belong together.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, password=_no_passphrase)
            client_context(str(self.ca))
        except (OSError, ValueError) as error:  # ssl's own errors are OSErrors
            raise ServerStartError(
                f"certificate {self.cert}, key {self.key} and authority {self.ca} cannot be used together: {error}"
            ) from error

    def settings(self, port: int) -> list[tuple[object, ...]]:
        """List the lines of redis.conf that make it so."""
        return [
            ("port", 0),
            ("tls-port", port),
            ("tls-cert-file", self.cert.absolute()),
            ("tls-key-file", self.key.absolute()),
            ("tls-ca-cert-file", self.ca.absolute()),
            ("tls-auth-clients", "no"),
        ]


def client_context(ca: str | None) -> ssl.SSLContext:
    """Make what a client checks a server with; OSError where the file is none. None: the machine's own authorities."""
    return ssl.create_default_context(cafile=ca)


def check_ca(ca: str) -> None:
    """Refuse an authority's certificate that a client cannot use: no other try would go better.

    Raises:
        EndpointError: The file is missing, or is none.
    """
    try:
        client_context(ca)
    except OSError as error:
        raise EndpointError(
            f"{ca}, with which the server's certificate is to be checked, cannot be used here: {error}; "
            "is it where this machine can read it?"
        ) from error


def distrust(error: BaseException) -> str:
    """Say why a server was not trusted, if that is what an error, or one that it came of, is about; else ''."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, ssl.SSLCertVerificationError):
            return one.verify_message
        one = one.__cause__ or one.__context__
    return ""


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase, which nobody is there to type")
