"""Data: sources of records, batches that depend on nothing but the seed and their number, and augmentation."""

import dataclasses
import difflib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import grain
import numpy as np

__all__ = [
    "RandomAffine",
    "Record",
    "Source",
    "Transform",
    "arrays",
    "batches",
    "digits",
    "evaluation_batches",
    "fingerprint",
    "random_affine",
    "tfds",
]

Record = dict[str, np.ndarray]
Transform = Callable[[Record, np.random.Generator], Record]

_WHOLE = 64 << 20  # bytes of an in-memory source that are digested in full
_SAMPLES = 64  # records that stand for a source that is not
_ENDLESS = 1 << 60  # rows; a length that survives the arithmetic of batching, unlike sys.maxsize


@runtime_checkable
class Source(Protocol):
    """Records by index, all with the same names, shapes and dtypes."""

    def __len__(self) -> int:
        """Returns the number of records."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Returns one record."""
        ...


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """A source over equally long arrays in memory."""

    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Record:
        return {name: np.asarray(column[index]) for name, column in self.columns.items()}

    def digest(self) -> str:
        """Returns a SHA-256 of the content, of evenly spread records if there is much of it."""
        small = sum(column.nbytes for column in self.columns.values()) <= _WHOLE
        rows = slice(None) if small else _spread(len(self), _SAMPLES * 64)
        return _sha256({name: column[rows] for name, column in self.columns.items()})


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A source over a TFDS data source."""

    examples: Any
    description: str
    columns: tuple[str, ...] | None
    prepare: Callable[[Record], Record] | None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        example = self.examples[index]
        names = example if self.columns is None else self.columns
        record = {name: np.asarray(example[name]) for name in names}
        return record if self.prepare is None else self.prepare(record)

    def digest(self) -> str:
        """Returns a SHA-256 of the description and of evenly spread records."""
        records = [_sha256(self[index]) for index in _spread(len(self), _SAMPLES)]
        return hashlib.sha256("\n".join([self.description, *records]).encode()).hexdigest()


def arrays(**columns: np.ndarray) -> Source:
    """Makes a source of equally long arrays; record `i` holds row `i` of each.

    Args:
        **columns: the arrays by name, records along axis 0.

    Returns:
        The source.

    Raises:
        ValueError: if there is no array, no row, or the lengths differ.
    """
    converted = {name: np.asarray(column) for name, column in columns.items()}
    shapes = {name: column.shape for name, column in converted.items()}
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"columns must have the same length of at least 1, got shapes {shapes}; pass one row a record")
    return _Arrays(converted)


def digits(split: Literal["train", "test"]) -> Source:
    """Makes a source of the 1,797 handwritten digits that come with scikit-learn.

    A third of each class, always the same third, is held out: 1,198 records for "train", 599 for "test".

    Args:
        split: "train" or "test".

    Returns:
        A source of records `{"image": float32 [8, 8, 1] in [0, 1], "label": int32}`.

    Raises:
        ValueError: if the split is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} must be 'train' or 'test'; set split")
    images, labels = _load_digits()
    # RandomState, unlike Generator, promises the same stream in every NumPy release.
    order = np.random.RandomState(0).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in range(10):
        members = order[labels[order] == label]
        held_out[members[: round(len(members) / 3)]] = True
    chosen = held_out if split == "test" else ~held_out
    return _Arrays({"image": images[chosen], "label": labels[chosen]})


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Loads images in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32)[..., None], bunch.target.astype(np.int32)


def tfds(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    *,
    columns: Sequence[str] | None = None,
    prepare: Callable[[Record], Record] | None = None,
) -> Source:
    """Opens a prepared TensorFlow Datasets dataset, without TensorFlow.

    Args:
        name: the dataset, such as "mnist" or "name/config:1.0.0".
        split: the split in TFDS's slicing language, such as "train" or "train[:80%]".
        data_dir: where datasets lie; None means `TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        columns: the features to keep; None keeps all.
        prepare: a deterministic step for every record (crop, scale, cast), before any random transform.

    Returns:
        The source. Images come as the uint8 arrays that TFDS decodes, unless `prepare` changes them.

    Raises:
        FileNotFoundError: if the dataset is not prepared there in a format with random access; gives the command.
        ValueError: if the split or a column does not exist.
    """
    import tensorflow_datasets

    where = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
    remedy = f'prepare it with: python -c "import tensorflow_datasets as t; t.data_source({name!r}{where})"'
    place = "~/tensorflow_datasets or $TFDS_DATA_DIR" if data_dir is None else str(data_dir)
    try:
        builder = tensorflow_datasets.builder(name, data_dir=data_dir)
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0].split(":")[0], known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "put the folder it was written to into data_dir"
        raise FileNotFoundError(
            f"dataset {name!r} must be known to TFDS or lie in {place}, got neither; {hint}"
        ) from error
    if not builder.info.splits:
        raise FileNotFoundError(f"dataset {name!r} must be prepared in {place}, got no files there; {remedy}")
    try:
        examples = builder.as_data_source(split=split)
    except NotImplementedError as error:
        found = getattr(builder.info.file_format, "value", builder.info.file_format)
        raise FileNotFoundError(
            f"dataset {name!r} must be prepared as array_record for random access, got {found} in {builder.data_dir}; "
            f"move that folder away and {remedy}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"split={split!r} must be one of {sorted(builder.info.splits)} or a slice of one; set split"
        ) from error
    unknown = sorted(set(columns or ()) - set(builder.info.features or ()))
    if unknown:
        raise ValueError(f"columns={list(columns or ())} must be among {sorted(builder.info.features)}; drop {unknown}")
    description = f"{builder.info.full_name} {split} {_qualified_name(prepare)}"
    return _Prepared(examples, description, None if columns is None else tuple(columns), prepare)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of the global batches that one process holds, one after the other, as a random-access sequence.

    Process `p` of `n` holds rows `p b : (p + 1) b` of every batch, `b = batch_size / n`. Putting the rows of all
    processes together in order therefore gives the same batch for every `n`.
    """

    stream: Any
    batch_size: int
    start: int
    process_index: int
    process_count: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        rows = self.batch_size // self.process_count
        batch, row = divmod(index, rows)
        return self.stream[(self.start + batch) * self.batch_size + self.process_index * rows + row]


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """Every example once, then copies of the last one with weight 0."""

    source: Source
    transform: Transform | None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        real = min(index, len(self.source) - 1)
        record = self.source[real]
        if self.transform is not None:
            record = self.transform(record, np.random.default_rng(real))
        return {**record, "weight": np.asarray(float(index < len(self.source)), np.float32)}


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
) -> Iterator[Record]:
    """Yields shuffled batches without end.

    Global batch `k` is a function of `source`, `batch_size`, `seed`, `transform` and `k` alone, augmentation included:
    starting at `k`, or with another number of processes, gives the same batch. Every epoch has its own order; a batch
    may reach over the end of one epoch into the next.

    Args:
        source: the records.
        batch_size: records in the global batch, divisible by `process_count`.
        seed: seeds the order and the augmentation; 0 to 2^32 - 1.
        transform: takes a record and a generator of its own and returns the augmented record.
        start: the number of the first global batch.
        process_index: which of the processes this is; it gets that contiguous block of rows of every batch.
        process_count: how many processes share the batch.
        threads: how many threads read ahead.

    Returns:
        An iterator over the rows of this process, stacked by name.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_batches(source, batch_size, process_index, process_count)
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed} must lie in 0..2^32-1; set seed")
    if start < 0:
        raise ValueError(f"start={start} must not be negative; set start to the number of the first batch")
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1; set threads")
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if transform is not None:
        stream = stream.random_map(transform)
    rows = _Rows(stream, batch_size, start, process_index, process_count, _ENDLESS)
    return _iterate(rows, batch_size // process_count, threads)


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Transform | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
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
        threads: how many threads read ahead.

    Returns:
        An iterator over the rows of this process, stacked by name.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_batches(source, batch_size, process_index, process_count)
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1; set threads")
    count = math.ceil(len(source) / batch_size)
    local = batch_size // process_count
    rows = _Rows(_Weighted(source, transform), batch_size, 0, process_index, process_count, count * local)
    return _iterate(rows, local, threads)


def _check_batches(source: Source, batch_size: int, process_index: int, process_count: int) -> None:
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


def _iterate(rows: _Rows, local_batch_size: int, threads: int) -> Iterator[Record]:
    """Stacks rows into batches, reading ahead in threads that end with the iterator."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(grain.MapDataset.source(rows).batch(local_batch_size).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def fingerprint(source: Source, *, batch_size: int, seed: int, transform: Transform | None) -> dict[str, Any]:
    """Describes what decides the batches, to compare when a run resumes.

    Args:
        source: the records.
        batch_size: records in the global batch.
        seed: the seed of the order and augmentation.
        transform: the augmentation.

    Returns:
        A dict that JSON can hold: two that are equal mean the same sequence of batches. Small sources in memory are
        digested in full, others by a sample of records; a transform counts by its qualified name and parameters.
    """
    digest = getattr(source, "digest", None)
    if digest is None:
        spread = _spread(len(source), _SAMPLES)
        content = hashlib.sha256("\n".join(_sha256(source[int(index)]) for index in spread).encode()).hexdigest()
    else:
        content = digest()
    return {
        "length": len(source),
        "content": content,
        "batch_size": int(batch_size),
        "seed": int(seed),
        "transform": _qualified_name(transform),
    }


def _qualified_name(function: Any) -> str:
    """Names a callable and its parameters, the same in every process."""
    if function is None:
        return "none"
    if isinstance(function, functools.partial):
        parameters = [repr(value) for value in function.args]
        parameters += [f"{name}={value!r}" for name, value in sorted(function.keywords.items())]
        return f"{_qualified_name(function.func)}({', '.join(parameters)})"
    if hasattr(function, "__qualname__"):
        return f"{function.__module__}.{function.__qualname__}"
    kind = type(function)
    if dataclasses.is_dataclass(function):
        fields = ((field.name, getattr(function, field.name)) for field in dataclasses.fields(function))
        parameters = [f"{name}={_qualified_name(v) if callable(v) else repr(v)}" for name, v in fields]
        return f"{kind.__module__}.{kind.__qualname__}({', '.join(parameters)})"
    return f"{kind.__module__}.{kind.__qualname__}"


def _spread(length: int, count: int) -> np.ndarray:
    """Returns up to `count` evenly spread indices, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def _sha256(record: Mapping[str, np.ndarray]) -> str:
    """Digests arrays by name, with their dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(record):
        value = np.asarray(record[name])
        digest.update(f"{name} {value.dtype} {value.shape};".encode())
        digest.update(repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Shifts, turns and scales the record's "image" at random about its centre.

    Pixels are interpolated bilinearly, in float32 whatever the image's dtype; what comes from outside the image is 0.

    Attributes:
        max_shift: the largest shift along each axis, in pixels.
        max_degrees: the largest turn either way, in degrees.
        max_scale: the largest relative change of size; 0.1 means factors from 1/1.1 to 1.1.
        key: the name of the image in the record, `[height, width, channels]`.
    """

    max_shift: float
    max_degrees: float
    max_scale: float
    key: str = "image"

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record with its image moved."""
        down, right, turn, size = (2 * generator.random(4) - 1).tolist()
        image = _warp(
            record[self.key],
            math.radians(self.max_degrees * turn),
            (1 + self.max_scale) ** size,
            self.max_shift * down,
            self.max_shift * right,
        )
        return {**record, self.key: image}


def random_affine(max_shift: float = 1.0, max_degrees: float = 10.0, max_scale: float = 0.1) -> RandomAffine:
    """Makes an augmentation by small random shifts, turns and changes of size.

    Args:
        max_shift: the largest shift along each axis, in pixels.
        max_degrees: the largest turn either way, in degrees.
        max_scale: the largest relative change of size.

    Returns:
        A transform for `batches`; its parameters are part of the fingerprint.

    Raises:
        ValueError: if a bound is negative or not finite.
    """
    for name, value in (("max_shift", max_shift), ("max_degrees", max_degrees), ("max_scale", max_scale)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number of at least 0; set {name}")
    return RandomAffine(float(max_shift), float(max_degrees), float(max_scale))


@functools.lru_cache(maxsize=64)
def _grid(height: int, width: int) -> np.ndarray:
    """Returns the homogeneous centred pixel coordinates, rows y, x, 1."""
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    grid = np.stack([y - (height - 1) / 2, x - (width - 1) / 2, np.ones_like(y)])
    grid.setflags(write=False)
    return grid


def _warp(image: np.ndarray, angle: float, scale: float, down: float, right: float) -> np.ndarray:
    """Turns by `angle` (radians, from x to y), scales, then shifts an image `[height, width, channels]`.

    Works backwards: the output pixel at `p` reads the input at `R(-angle) (p - shift) / scale`.
    """
    height, width, channels = image.shape
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    # One row and column of zeros before the image and two after it; reading beyond is clipped into them.
    padded = np.zeros((height + 3, width + 3, channels), np.float32)
    padded[1:-2, 1:-2] = image
    centre_y, centre_x = (height + 1) / 2, (width + 1) / 2
    matrix = np.array(
        [
            [cosine, -sine, centre_y - cosine * down + sine * right],
            [sine, cosine, centre_x - sine * down - cosine * right],
        ]
    )
    places = matrix @ _grid(height, width)
    np.maximum(places, 0, out=places)
    np.minimum(places, [[height + 1], [width + 1]], out=places)
    corners = places.astype(np.intp)
    rest = (places - corners).astype(np.float32)[..., None]
    first = corners[0] * (width + 3) + corners[1]
    flat = padded.reshape(-1, channels)
    top, left = flat[first], flat[first + (width + 3)]
    top = top + (flat[first + 1] - top) * rest[1]
    left = left + (flat[first + (width + 4)] - left) * rest[1]
    result = top + (left - top) * rest[0]
    return result.reshape(image.shape)
