"""Sources of records: arrays, digits, TensorFlow Datasets, image folders and tables; point clouds and graphs.

A source has a length and gives record `i`, a dict of NumPy arrays, as often as it is asked. Every source here pickles
as its description (a path, the names of columns), and opens its files in the process that reads them; it has a
`digest()` for the fingerprint of the data and a `name` for messages.
"""

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.ragged import graphs, point_cloud_buckets, point_clouds
from train.records import (
    SAMPLES,
    Prepare,
    Record,
    Reopened,
    Source,
    describe,
    digest,
    files_below,
    name_of,
    sampled,
    sha256,
    spread,
)

__all__ = [
    "Record",
    "Source",
    "arrays",
    "describe",
    "digest",
    "digits",
    "graphs",
    "image_folder",
    "name_of",
    "point_cloud_buckets",
    "point_clouds",
    "table",
    "tfds",
]

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TABLES = (".csv", ".npy", ".npz", ".parquet", ".tsv")

_WHOLE = 64 << 20  # bytes of an in-memory source that are digested in full


# ------------------------------------------------------------------------------------------------------------ arrays


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """A source over equally long arrays in memory."""

    columns: Mapping[str, np.ndarray]

    @property
    def name(self) -> str:
        return f"arrays({', '.join(self.columns)})"

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Record:
        return {name: np.asarray(column[index]) for name, column in self.columns.items()}

    def digest(self) -> str:
        """Returns a SHA-256 of the content, of evenly spread records if there is much of it."""
        small = sum(column.nbytes for column in self.columns.values()) <= _WHOLE
        rows = slice(None) if small else spread(len(self), SAMPLES * 64)
        return sha256({name: column[rows] for name, column in self.columns.items()})


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


# -------------------------------------------------------------------------------------------------------------- TFDS


@dataclasses.dataclass(frozen=True)
class _Prepared(Reopened):
    """A source over the files of a TFDS builder."""

    builder: str
    split: str
    columns: tuple[str, ...] | None
    prepare: Prepare | None
    directory: str
    description: str

    @property
    def name(self) -> str:
        return f"tfds({self.builder!r}, {self.split!r})"

    @functools.cached_property
    def examples(self) -> Any:
        """The TFDS data source, found again in its folder by a process that did not make it."""
        import tensorflow_datasets

        return tensorflow_datasets.builder_from_directory(self.directory).as_data_source(split=self.split)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        example = self.examples[index]
        names = example if self.columns is None else self.columns
        record = {name: np.asarray(example[name]) for name in names}
        return record if self.prepare is None else self.prepare(record)

    def digest(self) -> str:
        """Returns a SHA-256 of the description and of evenly spread records."""
        return sampled(self.description, self)


def tfds(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    *,
    columns: Sequence[str] | None = None,
    prepare: Prepare | None = None,
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
    chosen = None if columns is None else tuple(columns)
    description = f"{builder.info.full_name} {split} {describe(prepare)}"
    source = _Prepared(name, split, chosen, prepare, str(builder.data_dir), description)
    source.__dict__["examples"] = examples  # this process has it open already
    return source


# ------------------------------------------------------------------------------------------------------------ images


@dataclasses.dataclass(frozen=True)
class _ImageFolder:
    """A source over the files `root/class/name`."""

    root: str
    files: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    mode: str
    prepare: Prepare | None

    @property
    def name(self) -> str:
        return f"image_folder({self.root!r})"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        import PIL.Image

        with PIL.Image.open(Path(self.root, self.files[index])) as image:
            pixels = np.asarray(image.convert(self.mode))
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        record = {"image": pixels, "label": np.asarray(self.labels[index], np.int32)}
        return record if self.prepare is None else self.prepare(record)

    def digest(self) -> str:
        """Returns a SHA-256 of all names and of the bytes of evenly spread files."""
        result = hashlib.sha256(f"{self.classes} {self.mode} {describe(self.prepare)}\n".encode())
        result.update("\n".join(self.files).encode())
        result.update(np.ascontiguousarray(self.labels).tobytes())
        for index in spread(len(self), SAMPLES):
            result.update(hashlib.sha256(Path(self.root, self.files[index]).read_bytes()).digest())
        return result.hexdigest()


def image_folder(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    mode: Literal["RGB", "L"] = "RGB",
    prepare: Prepare | None = None,
) -> Source:
    """Opens a folder of images with one subfolder a class, `path/class/.../name.jpg`.

    Images are decoded by Pillow when they are read, as they lie in the file (an orientation tag is not applied).
    They may differ in size: let a transform bring them to one (`train.augment.RandomResizedCrop`).

    Args:
        path: the folder.
        classes: the names of the classes in the order of their labels; None takes all subfolders, sorted. Give those
            of the training set (`source.classes`) for a test set that may lack some.
        mode: "RGB", or "L" for one channel of grey.
        prepare: a deterministic step for every record, before any random transform.

    Returns:
        A source of records `{"image": uint8 [height, width, channels], "label": int32}`, sorted by class and name, with
        the attributes `classes` and `files`.

    Raises:
        FileNotFoundError: if the folder, a class, or all images are missing.
        ValueError: if the folder holds splits rather than classes, or a class is named twice.
    """
    root = Path(path)
    layout = f"{root}/<class>/<image>.jpg"
    if not root.is_dir():
        raise FileNotFoundError(
            f"image folder {root} must exist and hold one subfolder a class ({layout}), got nothing there; "
            f"unpack the images there, for example with: mkdir -p {root} && tar -xf images.tar -C {root}"
        )
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise FileNotFoundError(
            f"image folder {root} must hold one subfolder a class ({layout}), got none; move the images into them"
        )
    if classes is None and set(found) <= {"train", "training", "val", "valid", "validation", "test"}:
        raise ValueError(
            f"subfolders of {root} must be classes, got the splits {found}; pass path={str(root / found[-1])!r}"
        )
    names = tuple(found if classes is None else classes)
    if len(set(names)) != len(names):
        raise ValueError(f"classes={list(names)} must differ from one another; drop the repeated ones")
    unlisted = [] if classes is None else sorted(set(found) - set(names))
    if unlisted:
        raise ValueError(f"classes={list(names)} must name every subfolder of {root}; add {unlisted}")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        members = files_below(root / name, IMAGES) if name in found else []
        if not members and classes is None:
            raise FileNotFoundError(
                f"class folder {root / name} must hold images ({', '.join(IMAGES)}), got none; remove it or fill it"
            )
        files += [str(Path(name, member)) for member in members]
        labels += [label] * len(members)
    if not files:
        raise FileNotFoundError(f"image folder {root} must hold images of {list(names)}, got none; fill {layout}")
    return _ImageFolder(str(root), tuple(files), np.asarray(labels, np.int32), names, mode, prepare)


# ------------------------------------------------------------------------------------------------------------ tables


@dataclasses.dataclass(frozen=True)
class _Picked:
    """Some columns of a matrix that stays on disk, as float32 rows."""

    matrix: np.ndarray
    columns: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 4 * len(self.matrix) * len(self.columns)

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.matrix[index])[..., list(self.columns)].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Table(Reopened):
    """A source over the rows of one file."""

    path: str
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    target: str | None
    given: Mapping[str, tuple[Any, ...]]
    missing: float | None
    rows: slice
    prepare: Prepare | None

    @property
    def name(self) -> str:
        return f"table({self.path!r})"

    @functools.cached_property
    def _opened(self) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        return _load_table(self)

    @property
    def categories(self) -> dict[str, tuple[Any, ...]]:
        """The values of each categorical column, and of a target of classes, in the order of their codes."""
        return self._opened[1]

    def __len__(self) -> int:
        return len(next(iter(self._opened[0].values())))

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        record = {name: np.asarray(column[index]) for name, column in self._opened[0].items()}
        return record if self.prepare is None else self.prepare(record)

    def digest(self) -> str:
        """Returns a SHA-256 of the content, of evenly spread rows if there is much of it, and of the preparation."""
        content = _Arrays(self._opened[0]).digest()
        return hashlib.sha256(f"{content} {self.categories} {describe(self.prepare)}".encode()).hexdigest()


def table(
    path: str | Path,
    *,
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    target: str | None = None,
    categories: Mapping[str, Sequence[Any]] | None = None,
    missing: float | None = None,
    rows: slice = slice(None),
    prepare: Prepare | None = None,
) -> Source:
    """Opens a table: Parquet (a file or a folder of parts), CSV, `.npz` (one array a column) or `.npy`.

    Without `numeric`, `categorical` and `target` every column is an entry of the record under its own name; a plain
    `.npy` array is the entry "values". With them, records are `{"numeric": float32 [columns], "categorical": int32
    [columns], "target": ...}`, those that are asked for. A target of numbers with a fraction stays float32; whole
    numbers stay as int32 unless `categories` names them; any other target becomes the int32 code of its class. The
    columns of a plain two-dimensional `.npy` are called "0", "1", ...; such a file, and a structured one, is mapped
    into memory and not loaded.

    Args:
        path: the file, or a folder of Parquet files.
        numeric: columns of numbers.
        categorical: columns of categories, coded from 0 in sorted order.
        target: the column to predict.
        categories: values of a categorical column or target in the order of their codes. Give those of the training
            table (`source.categories`) for a test table.
        missing: what a missing number becomes; None refuses a table with missing numbers.
        rows: which rows, for a split of one file: `slice(0, 800)`.
        prepare: a deterministic step for every record, before any random transform.

    Returns:
        The source, with the attribute `categories`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column does not exist, holds what its role does not allow, or there is no row.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"table {file} must be a file ({', '.join(TABLES)}) or a folder of Parquet files, got nothing there; "
            f"write it with: python -c \"import pandas; pandas.read_csv('table.csv').to_parquet({str(file)!r})\""
        )
    if not file.is_dir() and file.suffix.lower() not in TABLES:
        raise ValueError(f"table {file} must end in one of {', '.join(TABLES)}; convert it to Parquet")
    given = {name: tuple(values) for name, values in (categories or {}).items()}
    source = _Table(str(file), tuple(numeric), tuple(categorical), target, given, missing, rows, prepare)
    if not len(source):
        raise ValueError(f"table {file} must have at least one row in {rows}, got none; set rows")
    return source


def _load_table(spec: _Table) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """Returns the entries of the records, each with a row a record, and the categories in the order of their codes."""
    chosen = [*spec.numeric, *spec.categorical, *([] if spec.target is None else [spec.target])]
    columns, matrix = _read_columns(Path(spec.path), chosen)
    unknown = sorted(set(chosen) - set(columns))
    if unknown:
        near = difflib.get_close_matches(unknown[0], columns, n=2)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"its columns are {', '.join(columns)}"
        raise ValueError(f"table {spec.path} has no column {unknown[0]!r}; {hint}")
    columns = {name: column[spec.rows] for name, column in columns.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns of {spec.path} must have the same length, got {lengths}; pass one row a record")
    if not chosen:
        return columns, {}
    entries: dict[str, Any] = {}
    categories: dict[str, tuple[Any, ...]] = {}
    if spec.numeric and matrix is not None and spec.missing is None:
        # No look for missing numbers: it would read the whole file.
        entries["numeric"] = _Picked(matrix[spec.rows], tuple(int(name) for name in spec.numeric))
    elif spec.numeric:
        entries["numeric"] = np.stack(
            [_numbers(spec, name, columns[name], spec.missing) for name in spec.numeric], axis=1
        )
    if spec.categorical:
        codes = []
        for name in spec.categorical:
            code, categories[name] = _codes(spec, name, columns[name])
            codes.append(code)
        entries["categorical"] = np.stack(codes, axis=1)
    if spec.target is not None:
        column = columns[spec.target]
        if spec.target in spec.given or column.dtype.kind not in "iuf":
            entries["target"], categories[spec.target] = _codes(spec, spec.target, column)
        elif column.dtype.kind == "f":
            entries["target"] = _numbers(spec, spec.target, column, None)
        else:
            entries["target"] = column.astype(np.int32)
            if not np.array_equal(entries["target"], column):
                raise ValueError(f"target {spec.target!r} of {spec.path} must fit into int32; scale it")
    return entries, categories


def _numbers(spec: _Table, name: str, column: np.ndarray, fill: float | None) -> np.ndarray:
    """Returns a column as float32, missing numbers filled or refused."""
    if column.dtype.kind not in "biuf" or column.ndim != 1:
        raise ValueError(
            f"column {name!r} of {spec.path} must hold numbers, got {column.dtype}; list it as categorical"
        )
    result = np.array(column, np.float32)
    absent = np.isnan(result)
    if absent.any() and fill is None:
        remedy = "drop those rows" if name == spec.target else "set missing to what they become"
        raise ValueError(f"column {name!r} of {spec.path} has {absent.sum()} missing numbers; {remedy}")
    result[absent] = 0 if fill is None else fill
    return result


def _codes(spec: _Table, name: str, column: np.ndarray) -> tuple[np.ndarray, tuple[Any, ...]]:
    """Returns the codes of a column of categories, and the categories."""
    values = column.tolist()
    absent = sum(value is None or value != value for value in values)
    if absent:
        raise ValueError(
            f"column {name!r} of {spec.path} has {absent} missing categories; give them a name of their own"
        )
    known = spec.given.get(name) or tuple(sorted(set(values)))
    code = {value: number for number, value in enumerate(known)}
    strange = sorted({str(value) for value in values if value not in code})
    if strange:
        raise ValueError(
            f"column {name!r} of {spec.path} holds {', '.join(strange[:3])}, not among its {len(known)} categories; "
            "add them to categories"
        )
    return np.asarray([code[value] for value in values], np.int32), known


def _read_columns(path: Path, chosen: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns columns by name (the chosen ones, or all), and the mapped matrix that they are views of, if any."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if not chosen or name in chosen}, None
    if suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype.names:
            return {name: array[name] for name in array.dtype.names}, None
        if not chosen:
            return {"values": array}, None
        if array.ndim != 2:
            raise ValueError(f"{path} must be a matrix or have named fields to choose columns, got shape {array.shape}")
        return {str(index): array[:, index] for index in range(array.shape[1])}, array
    if suffix in (".csv", ".tsv"):
        import pyarrow.csv

        loaded = pyarrow.csv.read_csv(
            path, parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",")
        )
    else:
        import pyarrow.parquet

        names = pyarrow.parquet.read_schema(path).names if path.is_file() else None
        present = None if not chosen or names is None else [name for name in chosen if name in names]
        loaded = pyarrow.parquet.read_table(path, columns=present or None, memory_map=path.is_file())
    return {name: _from_arrow(loaded.column(name)) for name in loaded.column_names}, None


def _from_arrow(column: Any) -> np.ndarray:
    """Returns an Arrow column as NumPy: numbers (missing: nan), lists of equal length as rows, else objects."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kinds.is_list(column.type) or kinds.is_fixed_size_list(column.type) or kinds.is_large_list(column.type):
        return np.stack([np.asarray(row) for row in column.to_pylist()])
    if kinds.is_string(column.type) or kinds.is_large_string(column.type):
        values = column.to_pylist()
        return np.asarray(values, object if column.null_count else str)
    if kinds.is_boolean(column.type) and not column.null_count:
        return column.to_numpy().astype(bool)
    return column.to_numpy()
