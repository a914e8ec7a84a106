"""From what a user puts to what is sent: taken over from the user, cast, checked, packed."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from synthbroker import cast as casts
from synthbroker import checks, staging, texts, wire
from synthbroker.checks import Checks
from synthbroker.choose import Chooser
from synthbroker.codec import RAW
from synthbroker.lanes import Flight
from synthbroker.pool import Pool
from synthbroker.schema import Array
from synthbroker.staging import OnGpu
from synthbroker.texts import Texts
from synthbroker.twins import TwinWatch
from synthbroker.wire import Encoded

ENCODERS = 2
_ASIDE_BYTES = 64 * 1024  # smaller samples are packed in `put`: handing them over would cost more
_OVERHEAD_BYTES = 2048  # of this process's memory beside the tensors: many tiny samples would have no bound


class Outgoing:
    """One sample on its way.

    Args:
        nbytes: What it counts for of what may be on its way.
        encoded: What to send, if that is there already.
        encode: Else gives it, or None where the sample went to quarantine.
        submit: Has `encode` done in another thread.

    Attributes:
        added_s: When it was put, by `time.monotonic`.
    """

    __slots__ = ("_encode", "_encoded", "_future", "_submit", "added_s", "nbytes")

    def __init__(
        self,
        nbytes: int,
        encoded: Encoded | None = None,
        encode: "Callable[[], Encoded | None] | None" = None,
        submit: "Callable[[Callable[[], Encoded | None]], Future[Encoded | None]] | None" = None,
    ) -> None:
        self.nbytes, self.added_s = nbytes, 0.0
        self._encoded, self._encode, self._submit = encoded, encode, submit
        self._future: Future[Encoded | None] | None = None

    @property
    def is_later(self) -> bool:
        """Whether it must be started."""
        return self._encode is not None

    def start(self) -> None:
        """Have it encoded aside."""
        assert self._submit is not None
        assert self._encode is not None
        try:
            self._future = self._submit(self._encode)
        except RuntimeError:  # the interpreter ends and starts nothing more: then the sender does it
            self._submit = None

    def ready(self) -> bool:
        """Say whether `result` will not wait for another thread."""
        return self._submit is None or (self._future is not None and self._future.done())

    def result(self) -> Encoded | None:
        """Give what to send; raises what encoding raised."""
        if self._encode is None:
            return self._encoded
        return self._encode() if self._future is None else self._future.result()


class Packer:
    """Packs samples: in the caller's thread where that is quick, else aside.

    Args:
        codec: What the user said (`Chooser`).
        cast: What the user said (`cast`).
        spoiled: Called with the reason and the recipe of a sample that cannot go into the ring.
        keep_bytes: So much memory for copies is kept when it is free.
        watch: Sees the content of some samples.

    Raises:
        TypeError, ValueError: No such codec or cast.
    """

    def __init__(
        self,
        codec: str | Mapping[str, str],
        cast: Mapping[str, str] | None,
        spoiled: Callable[[str, dict[str, Any]], None],
        keep_bytes: int,
        watch: TwinWatch,
    ) -> None:
        self.casts = casts.parse(cast)
        self.chooser = Chooser(codec, encoders=ENCODERS)
        self.checks: Checks = {}
        self._spoiled, self._watch = spoiled, watch
        self._pool = Pool(keep_bytes)
        self._encoders = ThreadPoolExecutor(ENCODERS, "synthbroker-encoder")

    def close(self) -> None:
        """Pack nothing more."""
        self._encoders.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def cost(fields: Mapping[str, Array | OnGpu]) -> int:
        """Say what a sample counts for of what may be on its way."""
        return sum([field.nbytes for field in fields.values()]) + _OVERHEAD_BYTES

    def pack(self, fields: Mapping[str, Array | OnGpu], along: Texts, nbytes: int, *, copy: bool) -> Outgoing:
        """Take a sample that counts for so much over from its user, who may change it then, unless it is lent."""
        watched = self._watch.wants()
        staged = staging.fetch(fields, lent=not copy)
        if not (self.checks or self.casts or staged.flights):
            if self.chooser.is_plain(staged.arrays):
                plain = dict.fromkeys(staged.arrays, RAW)
                return self._at_once(staged.arrays, plain, along, nbytes, copy=copy, watched=watched)
            if nbytes < _ASIDE_BYTES:
                chosen = self.chooser.codecs_for(staged.arrays)
                return self._at_once(staged.arrays, chosen, along, nbytes, copy=copy, watched=watched)
        own = {
            name: array if name in staged.own or not copy else self._copied(array)
            for name, array in staged.arrays.items()
        }
        encode = partial(self._encode, own, along, staged.flights, watched)
        return Outgoing(nbytes, encode=encode, submit=self._encoders.submit)

    def _at_once(
        self,
        arrays: Mapping[str, Array],
        chosen: Mapping[str, str],
        along: Texts,
        nbytes: int,
        *,
        copy: bool,
        watched: bool,
    ) -> Outgoing:
        plain = _contiguous(arrays)
        if watched:
            self._watch.see(plain)
        return Outgoing(nbytes, wire.encode(plain, chosen, along, self._pool if copy else None))

    def _copied(self, array: Array) -> Array:
        own: Array = self._pool.take(array.nbytes).view(array.dtype).reshape(array.shape)
        np.copyto(own, array)
        return own

    def _encode(
        self, arrays: Mapping[str, Array], along: Texts, flights: Sequence[Flight], watched: bool
    ) -> Encoded | None:
        for flight in flights:
            flight.wait()
        arrays = _contiguous(arrays)
        cast, reason = casts.apply(arrays, self.casts)
        if reason is None and self.checks:
            reason = checks.failed(cast, self.checks)
        if reason is not None:
            self._spoiled(reason, texts.read_recipe(along))
            return None
        if watched:
            self._watch.see(cast)
        return wire.encode(cast, self.chooser.codecs_for(cast), along)


def _contiguous(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name: array if array.flags.c_contiguous else np.array(array, order="C", copy=None)
        for name, array in arrays.items()
    }
