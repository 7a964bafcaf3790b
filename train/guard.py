"""What keeps a run from hanging, from being run twice, and from training on after its loss has broken."""

import contextlib
import dataclasses
import faulthandler
import fcntl
import math
import os
import socket
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

    A peer that hangs inside a collective stops every process of a run without an error, and no Python thread may run
    then: the timer is faulthandler's, which needs neither the interpreter nor a signal. The exit code is 1; started
    again, the run goes on from its newest checkpoint. Outside the context, and with `seconds=None`, nothing is watched.
    """

    REARM_SECONDS = 1.0

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._armed, self._active = seconds, -math.inf, False

    def __enter__(self) -> "Watchdog":
        self._active = True
        self.alive()
        return self

    def __exit__(self, *unused: object) -> None:
        self._active = False
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Start the time anew."""
        now = time.monotonic()
        if not self._active or self._seconds is None or now - self._armed < min(self.REARM_SECONDS, self._seconds / 4):
            return
        self._armed = now
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)


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
