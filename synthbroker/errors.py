"""Every error that synthbroker raises on purpose, split by what the caller does next.

```
SynthbrokerError
├── ServerError                 look at the server
│   ├── ServerGoneError         it did not answer within reconnect_s
│   ├── ServerRefusedError      it answered no: password, permission, version, not a Redis
│   ├── ServerFullError         it is out of memory
│   └── ServerStartError        `serve` could not start one
├── EndpointError               the URL or the endpoint file names no server
│   └── EndpointMissingError    there is no such file (yet)
├── RingError                   look at the ring and at who shares it
│   ├── RingMissingError        no such ring (yet, or any more)
│   ├── RingMismatchError       made with other settings than asked for
│   ├── RingTooLargeError       asks for more memory than the server has
│   ├── RingFullError           no room within wait_s
│   ├── RingEndedError          the ring has ended
│   └── ShutOutError            a newer process with the same name took over
├── StateGoneError              a checkpoint's state cannot be resumed as it was: samples are gone
├── StarvedError                no sample came within wait_s
├── UnacknowledgedError         the reader's own unacknowledged samples fill the ring
├── SchemaError                 a sample does not fit the ring's schema
├── BadSamplesError             too many of a producer's samples failed the ring's checks
├── DamagedSampleError          bytes that are not a sample
├── GeneratorError              a worker of `generate` failed
├── SlurmError                  SLURM refused, is not there, or did not do it in time
└── MissingExtraError           an optional package is not installed
```

Mistakes in the caller's own arguments stay `TypeError` and `ValueError`.
"""


class SynthbrokerError(Exception):
    """The root of all errors raised by synthbroker."""


class ServerError(SynthbrokerError):
    """The server is the trouble."""


class ServerGoneError(ServerError):
    """The server did not answer; what was under way may be tried again."""


class ServerRefusedError(ServerError):
    """The server answered and will not serve: password, permission, version, not a Redis."""


class ServerFullError(ServerError):
    """The server is at its memory limit and takes no more data."""


class ServerStartError(ServerError):
    """A server could not be started."""


class EndpointError(SynthbrokerError):
    """The URL or the endpoint file does not lead to a server."""


class EndpointMissingError(EndpointError):
    """The endpoint file is not there: the server that will write it has not started yet, or has ended."""


class RingError(SynthbrokerError):
    """The ring is the trouble."""


class RingMissingError(RingError):
    """There is no such ring, or it was made anew since."""


class RingMismatchError(RingError):
    """The ring or the group exists with other settings than asked for."""


class RingTooLargeError(RingError):
    """The ring asks for more memory than the server has."""


class RingFullError(RingError):
    """No room was made within the time allowed."""


class RingEndedError(RingError):
    """The ring has ended: nothing more comes, nothing more is taken."""


class ShutOutError(RingError):
    """A newer process with the same name has taken this one's place."""


class StateGoneError(SynthbrokerError):
    """Samples that a checkpoint's state counts on will not come again; says which."""


class StarvedError(SynthbrokerError):
    """No sample came within the time allowed."""


class UnacknowledgedError(SynthbrokerError):
    """The reader waits for samples that its own unacknowledged ones keep out of the ring."""


class SchemaError(SynthbrokerError):
    """A sample does not fit the schema of its ring."""


class BadSamplesError(SynthbrokerError):
    """Too many of a producer's latest samples went to quarantine."""


class DamagedSampleError(SynthbrokerError):
    """Bytes from the ring that are not a whole, honest sample."""


class GeneratorError(SynthbrokerError):
    """A worker of `generate` failed."""


class SlurmError(SynthbrokerError):
    """SLURM refused a job, is not there, or did not do what it was asked in time."""


class MissingExtraError(SynthbrokerError):
    """An optional package is not installed; the message names the extra."""
