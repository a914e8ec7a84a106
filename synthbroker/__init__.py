"""synthbroker: a ring of samples between the programs that make them and the training loops that eat them.

The names below are the public API. `RingDataset` and `RingLoader` import torch when first used; nothing else does.
"""

from typing import TYPE_CHECKING, Any

from synthbroker import slurm
from synthbroker.account import ProducerStats
from synthbroker.audit import Audit, audit
from synthbroker.batch import Batch, BatchInfo, TupleBatch
from synthbroker.consumer import Consumer
from synthbroker.errors import (
    BadSamplesError,
    DamagedSampleError,
    EndpointError,
    GeneratorError,
    MissingExtraError,
    RingEndedError,
    RingError,
    RingFullError,
    RingMismatchError,
    RingMissingError,
    RingTooLargeError,
    SchemaError,
    ServerError,
    ServerFullError,
    ServerGoneError,
    ServerRefusedError,
    ServerStartError,
    ShutOutError,
    SlurmError,
    StarvedError,
    StateGoneError,
    SynthbrokerError,
    UnacknowledgedError,
)
from synthbroker.monitor import status
from synthbroker.peek import peek
from synthbroker.producer import Producer
from synthbroker.quarantine import BadSample, quarantine
from synthbroker.sample import Sample
from synthbroker.states import RingStatus
from synthbroker.worker import WorkerInfo

if TYPE_CHECKING:
    from synthbroker.dataset import RingDataset
    from synthbroker.loader import RingLoader

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "BadSample",
    "BadSamplesError",
    "Batch",
    "BatchInfo",
    "Consumer",
    "DamagedSampleError",
    "EndpointError",
    "GeneratorError",
    "MissingExtraError",
    "Producer",
    "ProducerStats",
    "RingDataset",
    "RingEndedError",
    "RingError",
    "RingFullError",
    "RingLoader",
    "RingMismatchError",
    "RingMissingError",
    "RingStatus",
    "RingTooLargeError",
    "Sample",
    "SchemaError",
    "ServerError",
    "ServerFullError",
    "ServerGoneError",
    "ServerRefusedError",
    "ServerStartError",
    "ShutOutError",
    "SlurmError",
    "StarvedError",
    "StateGoneError",
    "SynthbrokerError",
    "TupleBatch",
    "UnacknowledgedError",
    "WorkerInfo",
    "audit",
    "peek",
    "quarantine",
    "slurm",
    "status",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for (PEP 562)."""
    if name in ("RingDataset", "RingLoader"):
        try:
            from synthbroker import dataset, loader
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingExtraError(f"{name} needs torch: pip install 'synthbroker[torch]'") from error
        return dataset.RingDataset if name == "RingDataset" else loader.RingLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
