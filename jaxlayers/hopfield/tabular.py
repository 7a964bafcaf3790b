"""Tables as networks read them: what each column holds, its statistics, and encoding with missing entries.

A table is a NumPy array of floats, one row a sample, NaN where an entry is missing; categories are codes 0, 1, ... The
targets are columns like all others.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class ContinuousColumn:
    """A column of real numbers.

    Attributes:
      name: for messages and reports.
    """

    name: str = ""


@dataclasses.dataclass(frozen=True)
class CategoricalColumn:
    """A column of codes 0, ..., num_classes - 1 without an order.

    Attributes:
      num_classes: number of categories, at least 1, of a target at least 2.
      name: for messages and reports.
    """

    num_classes: int
    name: str = ""


@dataclasses.dataclass(frozen=True)
class TableSchema:
    """What the columns of a table hold, and which of them are to be predicted.

    Attributes:
      columns: one `ContinuousColumn` or `CategoricalColumn` for each column, targets included.
      targets: indices of the columns to predict; negative ones count from the end.

    Example:
      >>> from jaxlayers.hopfield import CategoricalColumn, ContinuousColumn, TableSchema
      >>> schema = TableSchema((ContinuousColumn("age"), CategoricalColumn(3, "colour"), CategoricalColumn(2, "ill")))
      >>> schema.sizes, schema.width, schema.slice_of(-1)
      ((1, 3, 2), 6, slice(4, 6, None))

    Raises:
      ValueError: if a column is of no known kind or has too few classes, or if targets or features are missing.
    """

    columns: tuple[ContinuousColumn | CategoricalColumn, ...]
    targets: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        count = len(self.columns)
        for index in self.targets:
            if not -count <= index < count:
                raise ValueError(f"targets names column {index} of {count} columns; set targets to indices of columns")
        targets = tuple(sorted(index % count for index in self.targets))
        if not targets or len(set(targets)) != len(targets):
            raise ValueError(f"targets={self.targets} must name at least one column, each once; set targets")
        object.__setattr__(self, "targets", targets)
        for index, column in enumerate(self.columns):
            if not isinstance(column, ContinuousColumn | CategoricalColumn):
                raise ValueError(
                    f"columns[{index}] is {column!r} and must be a ContinuousColumn or a CategoricalColumn; set columns"
                )
            least = 2 if index in targets else 1
            if isinstance(column, CategoricalColumn) and column.num_classes < least:
                raise ValueError(
                    f"columns[{index}] has num_classes={column.num_classes} and must have at least {least}"
                    f"{' to be a target' if least == 2 else ''}; set num_classes"
                )
        if len(targets) == count:
            raise ValueError(f"all {count} columns are targets, but at least one must be a feature; set targets")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Width of what is predicted for each column: 1 number, or a logit for each class."""
        return tuple(c.num_classes if isinstance(c, CategoricalColumn) else 1 for c in self.columns)

    @property
    def width(self) -> int:
        """Width of a prediction, which holds all columns side by side."""
        return sum(self.sizes)

    def slice_of(self, column: int) -> slice:
        """Return where a prediction holds a column."""
        column = range(len(self.columns))[column]
        start = sum(self.sizes[:column])
        return slice(start, start + self.sizes[column])

    @property
    def categorical(self) -> np.ndarray:
        """True where a column is categorical, `[columns]`."""
        return np.asarray([isinstance(column, CategoricalColumn) for column in self.columns])

    @property
    def is_target(self) -> np.ndarray:
        """True where a column is a target, `[columns]`."""
        return np.isin(np.arange(len(self.columns)), self.targets)


class TableStatistics(NamedTuple):
    """What encoding needs to know of the training rows.

    Attributes:
      mean: mean of the entries of each continuous column, 0 of all others, `[columns]`.
      scale: their standard deviation (n - 1), 1 where that is zero or unknown, `[columns]`.
      seen: for each place of a prediction, whether a training row has that class, `[width]`.
    """

    mean: np.ndarray
    scale: np.ndarray
    seen: np.ndarray


class EncodedTable(NamedTuple):
    """Rows as `Hopular` takes them.

    Attributes:
      values: standardised numbers, and codes of categories; 0 where an entry is missing, `[rows, columns]`, float32.
      present: False = missing, `[rows, columns]`.
    """

    values: np.ndarray
    present: np.ndarray


def table_statistics(schema: TableSchema, rows: Float[np.ndarray, "rows columns"]) -> TableStatistics:
    """Return mean and scale of every continuous column and the classes that occur, missing entries left out.

    Args:
      schema: of the table.
      rows: the training rows, and no others.

    Raises:
      ValueError: if there is no row, or entries don't fit the schema.
    """
    present = _check_rows(schema, rows)
    if not len(rows):
        raise ValueError("rows=0 must be at least 1, since statistics come from training rows; pass some")
    mean, scale, seen = np.zeros(rows.shape[1]), np.ones(rows.shape[1]), np.ones(schema.width, bool)
    for index, column in enumerate(schema.columns):
        entries = np.asarray(rows[present[:, index], index], np.float64)
        if isinstance(column, CategoricalColumn):
            seen[schema.slice_of(index)] = np.bincount(entries.astype(int), minlength=column.num_classes) > 0
        elif entries.size:
            largest = np.max(np.abs(entries))
            unit = entries / largest if largest else entries  # whose squares can't overflow
            deviation = np.std(unit, ddof=1) if entries.size > 1 else 0.0
            # A constant column may have a deviation of some roundings; to divide by it would make noise large.
            if deviation > 10 * np.finfo(rows.dtype).eps:
                mean[index], scale[index] = np.mean(unit) * largest, deviation * largest
            else:
                mean[index] = entries[0]
    return TableStatistics(mean, scale, seen)


def encode_table(
    schema: TableSchema, statistics: TableStatistics, rows: Float[np.ndarray, "rows columns"]
) -> EncodedTable:
    """Return rows as the network takes them: (x - mean) / scale, codes of categories, and what is there.

    A feature's category that no training row has is encoded as missing, since nothing was learned of it. A target's
    stays, so that a metric over it counts it.

    Args:
      schema: of the table.
      statistics: of the training rows.
      rows: raw rows, NaN = missing.

    Raises:
      ValueError: if entries don't fit the schema.
    """
    present = _check_rows(schema, rows)
    values = np.where(present, rows, 0.0).astype(np.float64)
    for index, column in enumerate(schema.columns):
        if isinstance(column, ContinuousColumn):
            values[:, index] = (values[:, index] - statistics.mean[index]) / statistics.scale[index]
        elif index not in schema.targets:
            present[:, index] &= statistics.seen[schema.slice_of(index)][values[:, index].astype(int)]
    return EncodedTable(np.where(present, values, 0.0).astype(np.float32), present)


def decode_table(
    schema: TableSchema, statistics: TableStatistics, prediction: Float[np.ndarray, "rows width"]
) -> np.ndarray:
    """Return predicted rows in the units of the raw table, `[rows, columns]`: numbers, and codes of likeliest classes.

    Raises:
      ValueError: if the prediction has not the schema's width.
    """
    check_width("prediction", prediction.shape, schema.width)
    rows = np.empty((len(prediction), len(schema.columns)))
    for index, column in enumerate(schema.columns):
        part = np.asarray(prediction[:, schema.slice_of(index)], np.float64)
        if isinstance(column, CategoricalColumn):
            rows[:, index] = np.argmax(part, axis=-1)
        else:
            rows[:, index] = part[:, 0] * statistics.scale[index] + statistics.mean[index]
    return rows


def _check_rows(schema: TableSchema, rows: np.ndarray) -> np.ndarray:
    """Return which entries are there, after a look whether each is what its column holds."""
    if rows.ndim != 2 or rows.shape[1] != len(schema.columns):
        raise ValueError(f"rows has shape {rows.shape} and must be [rows, {len(schema.columns)}] by the schema")
    present = ~np.isnan(rows)
    if np.isinf(rows).any():
        raise ValueError("rows holds infinity, but entries must be finite, or NaN where they are missing; replace it")
    for index, column in enumerate(schema.columns):
        codes = rows[present[:, index], index]
        if isinstance(column, CategoricalColumn):
            wrong = codes[(codes < 0) | (codes >= column.num_classes) | (codes != np.floor(codes))]
            if wrong.size:
                raise ValueError(
                    f"column {index} {column.name!r} holds {wrong[0]}, but codes must be whole numbers in "
                    f"[0, {column.num_classes}); encode categories, NaN = missing"
                )
    return present


def check_width(name: str, shape: tuple[int, ...], width: int) -> None:
    """Raise the `ValueError` of rows that do not have a column for each of the schema."""
    if shape[-1:] != (width,):
        raise ValueError(f"{name} has shape {shape} and must have width {width} by the schema; pass the same columns")
