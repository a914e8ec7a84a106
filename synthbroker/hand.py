"""Another thread that lends a hand: one thing at a time, beside what its owner does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread

Job = Callable[[], None]


class Hand:
    """A thread for jobs that its owner waits for; begun with the first one.

    Not for owners whom a signal may interrupt (the main thread): a job could be left that nobody waited for.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread: Thread | None = None

    @contextmanager
    def doing(self, job: Job, hurry: Callable[[], None]) -> Iterator[None]:
        """Have a job done meanwhile, and wait for it.

        Args:
            job: What to do.
            hurry: Called where the caller fails, to make the job fail as well: nobody waits for it longer than needed.

        Raises:
            BaseException: What the job raised.
        """
        if self._thread is None:
            self._thread = Thread(target=self._run, args=(self._jobs, self._done), name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(job)
        try:
            yield
        except BaseException:
            hurry()
            self._done.get()
            raise
        error = self._done.get()
        if error is not None:
            raise error

    def end(self) -> None:
        """Do nothing more."""
        self._jobs.put(None)

    @staticmethod
    def _run(jobs: "SimpleQueue[Job | None]", done: "SimpleQueue[BaseException | None]") -> None:
        while (job := jobs.get()) is not None:
            error: BaseException | None = None
            try:
                job()
            except BaseException as raised:  # noqa: BLE001 - whatever it is belongs to the owner
                error = raised
            del job
            done.put(error)
