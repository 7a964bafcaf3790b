"""Worker processes that read and transform records, and the reading of one record that they share with threads.

Neither JAX nor Grain is imported here: a worker that does not load JAX cannot take an accelerator.
"""

import collections
import contextlib
import dataclasses
import importlib.machinery
import json
import logging
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from train.records import Record, Source, name_of

Transform = Callable[[Record, np.random.Generator], Record]
Report = Callable[[int, str], None]

CORRUPT = "corrupt"  # the entry of a record that says whether it stands in for an unreadable one

_REPLACEMENTS = 16  # records in a row that may be unreadable
_DEATHS = 3  # workers that may die over one batch
_AHEAD = 2  # batches that wait for, or are in, each worker
_PIPE = 1 << 20  # bytes; a pipe of Linux's 64 KiB makes a batch of images a thousand hand-overs

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch: which record, which random numbers.

    Attributes:
        index: number of the record in the source.
        key: the two words that key the generator of a training row; None seeds it with `index`, for evaluation.
        weight: the weight in evaluation; None for training.
    """

    index: int
    key: tuple[int, int] | None = None
    weight: float | None = None

    def generator(self) -> np.random.Generator:
        """Returns the generator of this row, from its beginning."""
        if self.key is None:
            return np.random.default_rng(self.index)
        return np.random.Generator(np.random.Philox(key=np.array(self.key, np.uint64)))


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads and transforms the record of a row.

    Attributes:
        source: the records.
        transform: the transform, or None.
        on_corrupt: "stop" raises for a record that cannot be read; "skip" takes the next one that can.
    """

    source: Source
    transform: Transform | None
    on_corrupt: Literal["stop", "skip"]

    def __call__(self, row: Row, report: Report) -> Record:
        """Returns the record of a row; tells `report` of every record that could not be read."""
        tries = 1 if self.on_corrupt == "stop" else 1 + _REPLACEMENTS
        for attempt in range(tries):
            index = (row.index + attempt) % len(self.source)
            try:
                record = self.source[index]
                if self.transform is not None:
                    # A fresh generator each time: how far the failure came does not matter.
                    record = self.transform(record, row.generator())
            except Exception as error:
                if self.on_corrupt == "skip" and attempt + 1 < tries:
                    report(index, f"{type(error).__name__}: {error}")
                    continue
                more = "" if self.on_corrupt == "stop" else f", nor could the {_REPLACEMENTS} records before it"
                raise RuntimeError(
                    f"record {index} of {name_of(self.source)} could not be read or transformed{more}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            break
        record = dict(record)
        if row.weight is not None:
            record["weight"] = np.asarray(row.weight if attempt == 0 else 0.0, np.float32)
        if self.on_corrupt == "skip":
            real = row.weight is None or row.weight > 0  # padding is not counted
            record[CORRUPT] = np.asarray(attempt > 0 and real, np.int32)
        return record


def stack(records: Sequence[Record]) -> Record:
    """Returns the batch of some records.

    Raises:
        ValueError: if their entries or shapes differ.
    """
    names = list(records[0])
    for record in records:
        if record.keys() != records[0].keys():
            raise ValueError(
                f"records of a batch must have the same entries, got {sorted(records[0])} and {sorted(record)}; "
                "drop or add them in a transform"
            )
    columns = {name: [np.asarray(record[name]) for record in records] for name in names}
    for name, values in columns.items():
        shapes = list(dict.fromkeys(value.shape for value in values))
        if len(shapes) > 1:
            raise ValueError(
                f"{name!r} must have one shape in all records of a batch, got {shapes[0]} and {shapes[1]}; "
                "bring them to one size in a transform"
            )
    return {name: np.stack(values) for name, values in columns.items()}


_reported: dict[int, tuple[Callable[[], Any], set[int]]] = {}  # by the identity of a source: itself and its records


def warn_once(source: Source, index: int, problem: str) -> None:
    """Names a record that could not be read in the log, the first time."""
    known = _reported.get(id(source))
    if known is None or known[0]() is not source:  # the identity of a source that is gone is given out again
        try:
            known = weakref.ref(source), set()
        except TypeError:
            known = lambda: source, set()
        _reported[id(source)] = known
    if index not in known[1]:
        known[1].add(index)
        log.warning("record %d of %s is skipped, the next one stands in for it: %s", index, name_of(source), problem)


class Workers(Iterator[Record]):
    """Batches made by worker processes, in the order of their numbers.

    A worker is a plain `python` process that is sent the rows of a whole batch and sends the stacked batch back, over
    two pipes. Nothing is forked (JAX has threads), the main module is not imported again, there is no shared memory to
    leak and no state to save: the caller numbers the batches, so any worker can make any of them. A worker that dies is
    replaced and its batches are made again, the same to the last bit; one batch may cost three workers.

    Grain's `mp_prefetch` (0.2.18) was measured beside this: as many records a second (224-pixel JPEG images, the Swin
    recipe, one worker), but a first batch after 2.6 to 4.8 s instead of 1.1 to 1.2 s, since each of its workers loads
    JAX; it runs the main module again, needs absl's flags to be parsed, leaves shared memory behind, and its state
    holds for one number of workers only.
    """

    def __init__(self, reader: Reader, batches: Iterator[Sequence[Row]], workers: int, first: int = 0) -> None:
        self._source = reader.source
        self._tasks = enumerate(batches, first)
        self._next = first
        self._count = workers
        self._reader = reader
        self._workers: list[_Worker] = []
        self._inbox: queue.Queue[tuple[_Worker, Any]] = queue.Queue()
        self._ready: dict[int, Any] = {}
        self._deaths: collections.Counter[int] = collections.Counter()
        self._payload = b""
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def __next__(self) -> Record:
        if self._closed:
            raise StopIteration
        try:
            return self._take()
        except BaseException:
            if self._closed:  # by another thread, which took the workers away
                raise StopIteration from None
            self.close()
            raise

    def _take(self) -> Record:
        if not self._workers:
            self._payload = _pickled(self._reader, self._count)
            for _ in range(self._count):
                self._start()
        self._assign()
        while self._next not in self._ready:
            if not any(worker.tasks for worker in self._workers):
                raise StopIteration
            worker, message = self._inbox.get()
            if self._closed:
                raise StopIteration
            if message is None:
                self._replace(worker)
                continue
            number, *content = message
            if number is None:
                raise _unpacked(content[-1])
            worker.tasks.pop(number)
            self._ready[number] = content
            self._assign()
        batch, problems, error = self._ready.pop(self._next)
        self._next += 1
        for index, problem in problems:
            warn_once(self._source, index, problem)
        if error is not None:
            raise _unpacked(error)
        self._assign()
        return batch

    def _assign(self) -> None:
        """Keeps every worker busy, and no more batches under way or waiting than a few for each."""
        while True:
            under_way = len(self._ready) + sum(len(worker.tasks) for worker in self._workers)
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            if under_way >= _AHEAD * self._count or len(worker.tasks) >= _AHEAD:
                return
            task = next(self._tasks, None)
            if task is None:
                return
            worker.give(*task)

    def _start(self, instead_of: "_Worker | None" = None) -> "_Worker":
        with self._lock:
            if self._closed:
                raise StopIteration
            worker = _Worker(self._payload, self._inbox)
            if instead_of is None:
                self._workers.append(worker)
            else:
                self._workers[self._workers.index(instead_of)] = worker
        # Also when the iterator is dropped or the program ends without `close`.
        weakref.finalize(self, worker.stop)
        return worker

    def _replace(self, dead: "_Worker") -> None:
        code = dead.process.wait()
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        number = next(iter(dead.tasks), None)
        what = f"worker process {dead.process.pid} of {name_of(self._source)} ended {how}"
        if number is not None:
            self._deaths[number] += 1
            if self._deaths[number] >= _DEATHS:
                raise RuntimeError(
                    f"{what} while it made batch {number}, the {_DEATHS}rd to do so; look for its last words above, "
                    "for a record that crashes its decoder or for a lack of memory; or set workers=0"
                )
        log.warning("%s%s; another one takes over", what, "" if number is None else f" while it made batch {number}")
        dead.stop()
        fresh = self._start(instead_of=dead)
        for task in dead.tasks.items():
            fresh.give(*task)

    def close(self) -> None:
        """Ends the workers at once; the iterator is over then, also for a thread that is waiting for it."""
        self._closed = True
        # A thread that is waiting wakes up by the last message of a worker, and starts no other one.
        with self._lock:
            for worker in self._workers:
                worker.stop()
            self._workers, self._ready = [], {}


class _Worker:
    """One worker process, the thread that listens to it and the batches it has been given."""

    def __init__(self, payload: bytes, inbox: "queue.Queue[tuple[_Worker, Any]]") -> None:
        self.tasks: dict[int, Sequence[Row]] = {}
        # A worker computes with NumPy as this process does, threads of BLAS included: another number of them may round
        # another way.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for pipe in (self.process.stdin, self.process.stdout):
            _widen(pipe)
        paths = [entry or os.getcwd() for entry in sys.path]
        self._say((json.dumps(paths) + "\n").encode(), payload)
        self._listener = threading.Thread(target=self._listen, args=(inbox,), name="batches", daemon=True)
        self._listener.start()

    def give(self, number: int, rows: Sequence[Row]) -> None:
        """Gives a batch to make."""
        self.tasks[number] = rows
        self._say(pickle.dumps((number, list(rows)), protocol=5))

    def _say(self, *messages: bytes) -> None:
        assert self.process.stdin is not None
        # The end of a worker is noticed where its answers are awaited.
        with contextlib.suppress(OSError, ValueError):
            for number, message in enumerate(messages):
                raw = number == 0 and len(messages) > 1
                self.process.stdin.write(message if raw else struct.pack("<Q", len(message)) + message)
            self.process.stdin.flush()

    def _listen(self, inbox: "queue.Queue[tuple[_Worker, Any]]") -> None:
        assert self.process.stdout is not None
        while True:
            try:
                message = _receive(self.process.stdout)
            except (OSError, EOFError, ValueError):
                message = None
            inbox.put((self, message))
            if message is None:
                return

    def stop(self) -> None:
        """Ends the process; it holds nothing that would have to be put in order."""
        self.process.kill()
        self.process.wait()
        if threading.current_thread() is not self._listener:
            self._listener.join(timeout=5)  # longer only if a transform started processes of its own
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _widen(pipe: Any) -> None:
    """Enlarges the buffer of a pipe where the system can."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)


def _pickled(reader: Reader, workers: int) -> bytes:
    """Pickles a reader, code that a worker could not import (of a script, a notebook, a config file) by value."""
    import cloudpickle

    modules = [
        module
        for name, module in list(sys.modules.items())
        if "." not in name and name != "__main__" and getattr(module, "__file__", None) and not _importable(name)
    ]
    try:
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        return cloudpickle.dumps(reader, protocol=5)
    except Exception as error:
        raise ValueError(
            f"source and transform must be picklable for workers={workers}, got {type(error).__name__}: {error}; "
            "make them of plain functions, dataclasses and sources of train.sources, or set workers=0"
        ) from error
    finally:
        for module in modules:
            with contextlib.suppress(ValueError):
                cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    """Returns whether a fresh process with the same path would find a module."""
    if name in sys.builtin_module_names:
        return True
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        with contextlib.suppress(Exception):  # a finder of others
            if find is not None and find(name, None) is not None:
                return True
    return importlib.machinery.PathFinder.find_spec(name) is not None


def _send(file: Any, message: Any) -> None:
    """Sends an object, its arrays behind it without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = [len(head), *(view.nbytes for view in views)]
    parts: list[Any] = [struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes), head, *views]
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[file.write(rest) :]  # a pipe takes what it can


def _receive(file: Any) -> Any:
    """Receives what `_send` sent."""
    (count,) = struct.unpack("<Q", _exactly(file, 8))
    sizes = struct.unpack(f"<{count}Q", _exactly(file, 8 * count))
    head, *buffers = [_exactly(file, size) for size in sizes]
    return pickle.loads(head, buffers=buffers)


def _exactly(file: Any, size: int) -> bytearray | np.ndarray:
    """Reads so many bytes into memory of their own."""
    result = np.empty(size, np.uint8)  # not zeroed first, unlike a bytearray
    if file.readinto(memoryview(result)) != size:
        raise EOFError
    return result


def _packed(error: BaseException) -> tuple[bytes, bytes, str]:
    """Returns an exception, its cause and their traceback for the way between processes."""
    text = "".join(traceback.format_exception(error)).rstrip()
    parts = []
    for part in (error, error.__cause__):
        try:
            parts.append(pickle.dumps(part))
            pickle.loads(parts[-1])
        except Exception:
            parts.append(pickle.dumps(RuntimeError(f"{type(part).__name__}: {part}")))
    return parts[0], parts[1], text


def _unpacked(packed: tuple[bytes, bytes, str]) -> BaseException:
    """Returns the exception again, with its cause and a note of where it was raised."""
    parts = []
    for content in packed[:2]:
        try:
            parts.append(pickle.loads(content))
        except Exception:  # its class lives in a module that only the worker knows
            parts.append(RuntimeError(packed[2].splitlines()[-1]))
    error, cause = parts
    error.__cause__ = cause
    error.add_note(f"In a worker process:\n{packed[2]}")
    return error


# What ends the run goes through the parent: a worker is told by the end of its input.
_BOOTSTRAP = """\
import signal
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
import json, sys
sys.path[:] = json.loads(sys.stdin.buffer.readline())
from train.workers import _work
_work()
"""


def _work() -> None:
    """Runs in the worker process: answers each batch that is asked for until there is nobody to ask."""
    asked = sys.stdin.buffer
    private = os.dup(1)
    os.dup2(2, 1)  # what a transform prints must not come between the batches,
    sys.stdout = sys.stderr  # nor wait in a buffer

    def hear() -> bytes:
        size = asked.read(8)
        return asked.read(struct.unpack("<Q", size)[0]) if len(size) == 8 else b""

    # Without a buffer, nothing is left to complain about at the end.
    with open(private, "wb", buffering=0) as answers, contextlib.suppress(BrokenPipeError):
        try:
            reader: Reader = pickle.loads(hear())
        except Exception as error:
            _send(answers, (None, None, [], _packed(error)))
            return
        for message in iter(hear, b""):
            number, rows = pickle.loads(message)
            problems: list[tuple[int, str]] = []
            try:
                records = [reader(row, lambda index, text: problems.append((index, text))) for row in rows]  # noqa: B023
                answer: tuple[Any, ...] = (number, stack(records), problems, None)
            except Exception as error:
                answer = (number, None, problems, _packed(error))
            _send(answers, answer)
