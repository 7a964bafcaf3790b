"""What keeps a run from hanging, from being run twice, and from training on after its loss has broken."""

import contextlib
import dataclasses
import faulthandler
import fcntl
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class LockedError(ValueError):
    """Another process trains in the directory."""


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the directory for this process; the system lets go of it however the process ends.

    Raises:
      LockedError: if another process holds it; names that process.
    """
    path = workdir / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise LockedError(f"{workdir} is being trained in by {owner}; stop it, or set another --workdir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


class Watchdog:
    """Ends the process, with the stacks of all threads on stderr, when `alive` is not called for `seconds`.

    A peer that hangs inside a collective stops every process of a run without an error. A thread watches the time and
    holds the interpreter's lock while it shows the stacks; they stand still then. Where a hang keeps that lock, no
    thread runs: faulthandler's timer, which needs no lock, ends the process `GRACE_SECONDS` later. (As the only timer
    it would not do: it reads the stacks of running threads, and crashes now and then.) The exit code is 1; started
    again, the run goes on from its newest checkpoint. Outside the context, and with `seconds=None`, nothing is watched.
    """

    REARM_SECONDS = 1.0
    GRACE_SECONDS = 10.0

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._seen, self._armed = seconds, -math.inf, -math.inf
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True)
            self.alive()
            self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Start the time anew."""
        if self._seconds is None or self._thread is None:
            return
        self._seen = time.monotonic()
        if self._seen - self._armed >= self.REARM_SECONDS:
            self._armed = self._seen
            faulthandler.dump_traceback_later(self._seconds + self.GRACE_SECONDS, exit=True, file=2)

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(max(self._seen + seconds - time.monotonic(), 0.0)):
            if time.monotonic() - self._seen >= seconds:
                os.write(2, f"no sign of life for {seconds:g} s; the stacks of all threads:\n".encode())
                faulthandler.dump_traceback(file=2)
                os._exit(1)


@dataclasses.dataclass
class Spikes:
    """Finds losses far above their running mean.

    Attributes:
      sigma: standard deviations above the mean from which a loss is a spike; `None` = nothing is.
      memory: steps that the running mean and variance look back.
    """

    sigma: float | None
    memory: int = 100
    _mean: float = 0.0
    _square: float = 0.0
    _count: int = 0

    def check(self, loss: float) -> float:
        """Return how many standard deviations the loss is above the mean if that is a spike, else 0; then count it."""
        if self.sigma is None or not math.isfinite(loss):
            return 0.0
        deviation = math.sqrt(max(self._square, 0.0))
        above = (loss - self._mean) / max(deviation, 1e-12)
        spike = self._count >= self.memory // 2 and above > self.sigma
        self._count += 1
        rate = max(1 / self._count, 1 / self.memory)
        # A spike moves the statistics no further than the largest ordinary loss would.
        shift = min(loss - self._mean, self.sigma * deviation) if spike else loss - self._mean
        self._mean += rate * shift
        self._square = (1 - rate) * (self._square + rate * shift**2)
        return above if spike else 0.0


@dataclasses.dataclass
class Patience:
    """Counts evaluations without a better metric; it stands in every checkpoint.

    Attributes:
      best: the best value so far, or `None`.
      waited: evaluations since.
    """

    best: float | None = None
    waited: int = 0

    def look(self, value: float, mode: str) -> None:
        """Count an evaluation."""
        better = self.best is None or (value > self.best if mode == "max" else value < self.best)
        if better and math.isfinite(value):
            self.best, self.waited = float(value), 0
        else:
            self.waited += 1

    def ended(self, limit: int | None) -> bool:
        """Return whether `limit` evaluations in a row were not better."""
        return limit is not None and self.waited >= limit
