"""Data: batches that depend on nothing but the seed and their number, read ahead by threads or worker processes.

The sources of records live in `train.sources` and the augmentation in `train.augment`; their names are found here too.
"""

import dataclasses
import functools
import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from train import workers as processes
from train.augment import RandomAffine, random_affine
from train.sources import (
    Record,
    Source,
    arrays,
    describe,
    digest,
    digits,
    graphs,
    image_folder,
    point_cloud_buckets,
    point_clouds,
    table,
    tfds,
)
from train.workers import CORRUPT, Transform

__all__ = [
    "CORRUPT",
    "RandomAffine",
    "Record",
    "Source",
    "Transform",
    "arrays",
    "batches",
    "digits",
    "evaluation_batches",
    "fingerprint",
    "graphs",
    "image_folder",
    "point_cloud_buckets",
    "point_clouds",
    "prefetch",
    "random_affine",
    "table",
    "tfds",
]

_ENDLESS = 1 << 60  # rows; a length that survives the arithmetic of batching, unlike sys.maxsize


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of the global batches that one process holds, one after the other.

    Process `p` of `n` holds rows `p b : (p + 1) b` of every batch, `b = batch_size / n`. Putting the rows of all
    processes together in order therefore gives the same batch for every `n`.
    """

    row: Callable[[int], processes.Row]
    batch_size: int
    start: int
    process_index: int
    process_count: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> processes.Row:
        rows = self.batch_size // self.process_count
        batch, row = divmod(index, rows)
        return self.row((self.start + batch) * self.batch_size + self.process_index * rows + row)


@dataclasses.dataclass(frozen=True)
class _Records:
    """The records of rows, for the threads of Grain."""

    rows: _Rows
    reader: processes.Reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self.reader(self.rows[index], functools.partial(processes.warn_once, self.reader.source))


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    workers: int = 0,
    on_corrupt: Literal["stop", "skip"] = "stop",
) -> Iterator[Record]:
    """Yields shuffled batches without end.

    Global batch `k` is a function of `source`, `batch_size`, `seed`, `transform` and `k` alone, augmentation included:
    starting at `k`, or with another number of processes, threads or workers, gives the same batch. Every epoch has its
    own order (Grain's index shuffle); a batch may reach over the end of one epoch into the next.

    Args:
        source: the records.
        batch_size: records in the global batch, divisible by `process_count`.
        seed: seeds the order and the augmentation; 0 to 2^32 - 1.
        transform: takes a record and a generator of its own and returns the augmented record.
        start: the number of the first global batch.
        process_index: which of the processes this is; it gets that contiguous block of rows of every batch.
        process_count: how many processes share the batch.
        threads: how many threads read ahead, without workers.
        workers: how many worker processes read and transform, a batch at a time; 0 = threads of this process. Workers
            get a copy of `source` and `transform`, so both must pickle. One that dies is replaced, with a warning.
        on_corrupt: what to do about a record that raises when it is read or transformed. "stop" raises, naming it.
            "skip" takes the next record that can be read in its place, names it once in the log, and adds the int32
            entry `CORRUPT`, 1 for a record that stands in for another.

    Returns:
        An iterator over the rows of this process, stacked by name; `close()` ends its threads or workers.

    Raises:
        ValueError: if an argument is out of range.
        RuntimeError: from the iterator, if a record cannot be read or workers keep dying.
    """
    _check_batches(source, batch_size, process_index, process_count, threads, workers, on_corrupt)
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed} must lie in 0..2^32-1; set seed")
    if start < 0:
        raise ValueError(f"start={start} must not be negative; set start to the number of the first batch")
    import grain  # it imports JAX, which a worker process that unpickles something of this module must not

    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def row(position: int) -> processes.Row:
        return processes.Row(int(order[position]), key=(seed, position))

    rows = _Rows(row, batch_size, start, process_index, process_count, _ENDLESS)
    return _iterate(rows, processes.Reader(source, transform, on_corrupt), threads, workers)


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Transform | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    workers: int = 0,
    on_corrupt: Literal["stop", "skip"] = "stop",
) -> Iterator[Record]:
    """Yields every example exactly once, in order, as batches of equal size.

    The last batch is padded with copies of the last example. The added entry "weight" (float32) is 1 for an example
    and 0 for padding, so weighted sums over all batches are exact.

    Args:
        source: the records.
        batch_size: records in the global batch, divisible by `process_count`.
        transform: as for `batches`; its generator depends on the example's index alone, so that every evaluation sees
            the same (for instance rotated) examples.
        process_index: which of the processes this is.
        process_count: how many processes share the batch; all of them get the same number of batches.
        threads: as for `batches`.
        workers: as for `batches`.
        on_corrupt: as for `batches`; an example that cannot be read gets weight 0.

    Returns:
        An iterator over the rows of this process, stacked by name; `close()` ends its threads or workers.

    Raises:
        ValueError: if an argument is out of range.
        RuntimeError: from the iterator, if a record cannot be read or workers keep dying.
    """
    _check_batches(source, batch_size, process_index, process_count, threads, workers, on_corrupt)
    examples = len(source)

    def row(position: int) -> processes.Row:
        return processes.Row(min(position, examples - 1), weight=float(position < examples))

    count = math.ceil(examples / batch_size) * (batch_size // process_count)
    rows = _Rows(row, batch_size, 0, process_index, process_count, count)
    return _iterate(rows, processes.Reader(source, transform, on_corrupt), threads, workers)


def _check_batches(
    source: Source,
    batch_size: int,
    process_index: int,
    process_count: int,
    threads: int,
    workers: int,
    on_corrupt: str,
) -> None:
    """Raises if the arguments that both kinds of batches share are out of range."""
    if len(source) < 1:
        raise ValueError(f"source must have at least one record, got {len(source)}; choose another split")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must lie in 0..process_count-1 with process_count={process_count}; set both"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of process_count={process_count}; set batch_size"
        )
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1; set threads")
    if workers < 0:
        raise ValueError(f"workers={workers} must not be negative; set workers, 0 for threads of this process")
    if on_corrupt not in ("stop", "skip"):
        raise ValueError(f'on_corrupt={on_corrupt!r} must be "stop" or "skip"; set on_corrupt')


def _iterate(rows: _Rows, reader: processes.Reader, threads: int, workers: int) -> Iterator[Record]:
    """Stacks the records of rows into batches, reading ahead in threads or processes that end with the iterator."""
    local = rows.batch_size // rows.process_count
    if workers:
        blocks = ([rows[index + row] for row in range(local)] for index in range(0, len(rows), local))
        return processes.Workers(reader, blocks, workers, rows.start)
    return _in_threads(_Records(rows, reader), local, threads)


def _in_threads(records: _Records, size: int, threads: int) -> Iterator[Record]:
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.source(records).batch(size, batch_fn=processes.stack)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def prefetch(batches: Iterator[Any], put: Callable[[Any], Any], depth: int = 2) -> Iterator[Any]:
    """Applies `put` to batches ahead of their use, in one thread, in order.

    The thread starts at once and keeps up to `depth` results, so that host batches are on the device when the step
    wants them. What `batches` or `put` raises is raised in the place of the batch that it concerns.

    Args:
        batches: host batches; closed with the result.
        put: makes a device batch of a host batch. It runs in another thread: contexts that belong to one (`with mesh:`)
            do not reach it.
        depth: how many results may wait.

    Returns:
        An iterator over the results; `close()` ends its thread and closes `batches`.

    Raises:
        ValueError: if `depth` is less than 1.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1; set depth")
    return _Prefetched(batches, put, depth)


class _Prefetched(Iterator[Any]):
    """The results of a thread that works ahead."""

    def __init__(self, batches: Iterator[Any], put: Callable[[Any], Any], depth: int) -> None:
        self._results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()
        # Room is asked for before a batch is made: `depth` device batches are waiting at most, not one more in hand.
        self._room = threading.Semaphore(depth)
        self._closed = threading.Event()
        # Workers can be ended while the thread waits for them; a generator must not be touched while it runs.
        self._interrupt = batches.close if isinstance(batches, processes.Workers) else lambda: None
        arguments = (batches, put, self._results, self._room, self._closed)
        self._thread = threading.Thread(target=_fill, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        result, error = self._results.get()
        if error is not None:
            self.close()
            raise error
        self._room.release()
        return result

    def close(self) -> None:
        """Ends the thread and closes the batches; the iterator is over then."""
        self._closed.set()
        self._room.release()
        self._interrupt()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)  # a read that hangs must not hold up the end of a run

    def __del__(self) -> None:
        self._closed.set()
        self._room.release()


def _fill(
    batches: Iterator[Any],
    put: Callable[[Any], Any],
    results: "queue.Queue[tuple[Any, BaseException | None]]",
    room: threading.Semaphore,
    closed: threading.Event,
) -> None:
    try:
        while room.acquire() and not closed.is_set():
            results.put((put(next(batches)), None))
    except BaseException as error:  # StopIteration among them
        results.put((None, error))
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def fingerprint(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None,
    on_corrupt: Literal["stop", "skip"] = "stop",
    batch_transform: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Describes what decides the batches, to compare when a run resumes.

    Args:
        source: the records.
        batch_size: records in the global batch.
        seed: the seed of the order and augmentation.
        transform: the augmentation of a record.
        on_corrupt: as for `batches`.
        batch_transform: the augmentation of a batch.

    Returns:
        A dict that JSON can hold: two that are equal mean the same sequence of batches. Small sources in memory are
        digested in full, others by a sample of records; a transform counts by its qualified name, its parameters and
        the variables that it encloses. Processes, threads and workers do not count: they change nothing.
    """
    return {
        "length": len(source),
        "content": digest(source),
        "batch_size": int(batch_size),
        "seed": int(seed),
        "transform": describe(transform),
        "on_corrupt": on_corrupt,
        "batch_transform": describe(batch_transform),
    }
