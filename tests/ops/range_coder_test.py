import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlayers.ops.range_coder import PRECISION, Decoder, Encoder, coding_tables


def binomial(n):
    return np.array([math.comb(n, k) for k in range(n + 1)]) / 2.0**n


TABLES = coding_tables([binomial(4), np.array([1.0]), np.full(300, 1 / 400), np.array([1 - 1e-9, 1e-9])], [-2, 0, 5, 0])


def roundtrip(batches, tables=TABLES):
    encoder = Encoder()
    for symbols, indexes in batches:
        encoder.push(symbols, tables, indexes)
    data = encoder.finish()
    decoder = Decoder(data)
    found = [decoder.pop(tables, indexes) for _, indexes in batches]
    decoder.finish()
    return data, found


values = st.one_of(st.integers(-3, 3), st.integers(0, 320), st.integers(-(2**63), 2**63 - 1))
batch = st.lists(st.tuples(values, st.integers(0, 3)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(batch, max_size=4))
def test_any_64_bit_integers_come_back_whatever_their_tables(batches):
    arrays = [
        (np.array([value for value, _ in one], np.int64), np.array([index for _, index in one], np.int64))
        for one in batches
    ]
    for (symbols, _), found in zip(arrays, roundtrip(arrays)[1], strict=True):
        np.testing.assert_array_equal(found, symbols)
        assert found.dtype == np.int64


@pytest.mark.parametrize("count", [1, 5000, 40_001])
def test_length_is_the_entropy_of_the_tables_whatever_the_number_of_lanes(count):
    rng = np.random.default_rng(0)
    indexes = rng.integers(3, size=(count, 1))
    indexes[:, 0][indexes[:, 0] == 1] = 0
    symbols = np.where(indexes == 0, rng.binomial(4, 0.5, size=(count, 1)) - 2, rng.integers(5, 305, size=(count, 1)))
    # Batches of all sizes, which fill no row of lanes.
    cuts = np.sort(rng.integers(count, size=5))
    batches = list(zip(np.split(symbols, cuts), np.split(indexes, cuts), strict=True))
    data, found = roundtrip(batches)
    np.testing.assert_array_equal(np.concatenate(found), symbols)
    assert data[0] == max(1, count // 8192)
    wanted = TABLES.bits(symbols, indexes).sum() / 8
    assert wanted - 1 <= len(data) <= 1.002 * wanted + 2 + 5 * data[0]
    # Negative control: other symbols cost more than these tables promise.
    wrong, _ = roundtrip([(symbols + 2, indexes)])
    assert len(wrong) > 1.1 * wanted


def test_a_sure_symbol_costs_next_to_nothing():
    data, _ = roundtrip([(np.zeros(8000, int), np.full(8000, 3))])
    assert len(data) < 12


def test_tables_are_exact_sums_with_room_for_every_symbol():
    for table in range(len(TABLES.lowest)):
        cumulative = TABLES.cumulative[TABLES.begins[table] : TABLES.begins[table + 1] + 1]
        assert cumulative[0] == table << PRECISION
        assert cumulative[-1] == table + 1 << PRECISION
        assert np.all(np.diff(cumulative) >= 1)
    first = np.diff(TABLES.cumulative[:6]) / 2.0**PRECISION
    np.testing.assert_allclose(first, binomial(4), atol=2e-4)


def test_damage_is_noticed():
    rng = np.random.default_rng(1)
    indexes = np.zeros(500, int)
    symbols = rng.binomial(4, 0.5, size=500) - 2
    symbols[7] = -1000
    data, _ = roundtrip([(symbols, indexes)])

    def decoded(damaged):
        decoder = Decoder(damaged)
        found = decoder.pop(TABLES, indexes)
        decoder.finish()
        return found

    np.testing.assert_array_equal(decoded(data), symbols)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="damaged"):
            decoded(data[:length])
    for extra in (b"\0", b"\0\0"):
        with pytest.raises(ValueError, match="damaged"):
            decoded(data + extra)
    unseen = 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        try:
            found = decoded(bytes(damaged))
        except ValueError:
            continue
        assert np.any(found != symbols)
        unseen += 1
    # A value behind an escape is not protected: that is for a checksum to see.
    assert unseen <= 2


def test_wrong_uses_are_refused():
    encoder = Encoder()
    with pytest.raises(ValueError, match="indexes from 0 to 4 must be those of 4 tables"):
        encoder.push(np.zeros(2, int), TABLES, np.array([0, 4]))
    with pytest.raises(ValueError, match=r"must be integers, one for each of the indexes \[3\]"):
        encoder.push(np.zeros(2, int), TABLES, np.zeros(3, int))
    with pytest.raises(ValueError, match="round them"):
        encoder.push(np.zeros(2), TABLES, np.zeros(2, int))
    with pytest.raises(ValueError, match="must be equally many"):
        coding_tables([], [])
    with pytest.raises(ValueError, match="cut its tails"):
        coding_tables([np.full(20_000, 1e-6)], [0])
    with pytest.raises(ValueError, match="sum of at most 1"):
        coding_tables([np.array([0.9, 0.9])], [0])
