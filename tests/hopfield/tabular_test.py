"""Tables: statistics, encoding and decoding, and rows or schemas that are refused."""

import math

import numpy as np
import pytest

from jaxlayers.hopfield.tabular import (
    CategoricalColumn,
    ContinuousColumn,
    TableSchema,
    decode_table,
    encode_table,
    table_statistics,
)

NUMBER = ContinuousColumn()
SCHEMA = TableSchema((NUMBER, CategoricalColumn(3), NUMBER, CategoricalColumn(2)))
REGRESSION = TableSchema((NUMBER, CategoricalColumn(3), NUMBER))
RAW = np.asarray(
    [[1.0, 0.0, 5.0, 0.1, np.nan, 0.0], [3.0, 2.0, 5.0, 0.1, np.nan, 1.0], [np.nan, 0.0, 5.0, 0.1, np.nan, 1.0]]
)
RAW_SCHEMA = TableSchema((NUMBER, CategoricalColumn(4), NUMBER, NUMBER, NUMBER, CategoricalColumn(3)))


def test_statistics_are_of_the_entries_that_are_there():
    found = table_statistics(RAW_SCHEMA, RAW)
    np.testing.assert_allclose(found.mean, [2.0, 0.0, 5.0, 0.1, 0.0, 0.0])
    np.testing.assert_allclose(found.scale, [math.sqrt(2), 1.0, 1.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(found.seen, [1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize(
    ("value", "dtype"), [(v, np.float64) for v in (0.1, 1 / 3, 1e200, -1e-200, 0.0)] + [(0.1, np.float32)]
)
def test_a_constant_column_is_not_divided_by_its_rounding(value, dtype):
    schema = TableSchema((NUMBER, NUMBER))
    rows = np.asarray([[value, 0.0]] * 1001, dtype)
    found = table_statistics(schema, rows)
    assert found.scale[0] == 1
    assert not np.any(encode_table(schema, found, rows).values)


def test_huge_and_tiny_numbers_are_standardised(rng):
    column = rng.normal(size=100)
    schema = TableSchema((NUMBER, NUMBER, NUMBER))
    rows = np.stack([1e300 * column, 1e-300 * column, column], axis=1)
    values = encode_table(schema, table_statistics(schema, rows), rows).values
    np.testing.assert_allclose(values[:, :2], values[:, 2:] * np.ones(2), atol=1e-6)
    np.testing.assert_allclose(values.std(axis=0, ddof=1), 1.0, atol=1e-5)


def test_encoding_of_missing_and_unseen_entries():
    statistics = table_statistics(RAW_SCHEMA, RAW)
    rows = np.asarray([[2.0, 1.0, 6.0, np.nan, 3.0, 2.0], [np.nan, 2.0, 5.0, 0.1, np.nan, np.nan]])
    values, present = encode_table(RAW_SCHEMA, statistics, rows)
    # Category 1 was never seen: missing. Target class 2 was not either, but is what has to be counted.
    np.testing.assert_array_equal(present, [[1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0]])
    np.testing.assert_allclose(values, [[0, 0, 1, 0, 3, 2], [0, 2, 0, 0, 0, 0]], atol=1e-6)
    assert values.dtype == np.float32


def test_decoding_undoes_encoding(rng):
    raw = np.stack([5 * rng.normal(size=20) + 3, rng.integers(0, 3, 20), 0.01 * rng.normal(size=20)], axis=1)
    statistics = table_statistics(REGRESSION, raw)
    values = encode_table(REGRESSION, statistics, raw).values
    prediction = np.concatenate([values[:, :1], np.eye(3)[values[:, 1].astype(int)], values[:, 2:]], axis=1)
    np.testing.assert_allclose(decode_table(REGRESSION, statistics, prediction), raw, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "targets", "message"),
    [
        ((NUMBER, "continuous"), (-1,), r"columns\[1\] is 'continuous' and must be a ContinuousColumn"),
        ((NUMBER, CategoricalColumn(1)), (-1,), r"num_classes=1 and must have at least 2 to be a target"),
        ((CategoricalColumn(0), NUMBER), (-1,), r"num_classes=0 and must have at least 1"),
        ((NUMBER,), (-1,), r"all 1 columns are targets, but at least one must be a feature"),
        ((NUMBER, NUMBER), (0, 1), r"all 2 columns are targets"),
        ((NUMBER, NUMBER), (), r"must name at least one column"),
        ((NUMBER, NUMBER), (1, -1), r"each once"),
        ((NUMBER, NUMBER), (2,), r"targets names column 2 of 2 columns"),
        ((), (-1,), r"targets names column -1 of 0 columns"),
    ],
)
def test_schemas_that_make_no_sense_are_refused(columns, targets, message, untyped):
    with pytest.raises(ValueError, match=message):
        TableSchema(columns, targets)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.0, 3.0, 1.0]], r"column 1 'colour' holds 3.0, but codes must be whole numbers in \[0, 3\)"),
        ([[0.0, -1.0, 1.0]], r"holds -1.0"),
        ([[0.0, 0.5, 1.0]], r"holds 0.5"),
        ([[np.inf, 0.0, 1.0]], r"rows holds infinity"),
        ([[0.0, 0.0]], r"rows has shape \(1, 2\) and must be \[rows, 3\]"),
        (np.zeros((0, 3)), r"rows=0 must be at least 1"),
    ],
)
def test_rows_that_do_not_fit_the_schema_are_refused(rows, message, untyped):
    schema = TableSchema((NUMBER, CategoricalColumn(3, "colour"), NUMBER))
    with pytest.raises(ValueError, match=message):
        table_statistics(schema, np.asarray(rows))
