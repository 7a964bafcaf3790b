"""Entropy coding of whole numbers: interleaved rANS on exact integer tables, vectorised over lanes in NumPy.

Asymmetric numeral systems (Duda, arXiv 1311.2540, 2013) turn symbols into one large number and back, last symbol
first. Here several such numbers (lanes) take turns at the symbols, so that one NumPy operation serves a row of them,
and share one string of 16-bit words. All is integer arithmetic: what is decoded is what was encoded, on any machine.

A symbol's table may be chosen when all symbols before it are known, as autoregressive models do: the decoder asks for
the symbols of one batch after another.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

PRECISION = 16
"""Frequencies of a table sum up to 2 ** PRECISION."""

_TOTAL = 1 << PRECISION
# A state lies in [2^24, 2^40): with 2^8 times the precision below it, rounding costs next to nothing, and a symbol
# never moves more than one word.
_LOW = 1 << 24
_WORD = 16
_STATE_BYTES = 5
# A lane costs about four bytes; so many symbols for each keep that below one in a hundred.
_SYMBOLS_PER_LANE = 8192
_MOST_LANES = 255


@dataclasses.dataclass(frozen=True, eq=False)
class CodingTables:
    """Integer frequencies of the symbols of several distributions, made by `coding_tables`.

    Attributes:
      cumulative: `[entries]`, table after table: the sums of frequencies before each symbol, `2 ** PRECISION` more from
        table to table, and the end of the last table. The last symbol of a table is its escape.
      begins: `[tables + 1]`, where each table starts in `cumulative`.
      lowest: `[tables]`, the symbol of the first entry.
    """

    cumulative: np.ndarray
    begins: np.ndarray
    lowest: np.ndarray

    def entries(self, symbols: np.ndarray, indexes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the entry of each symbol by its table, and whether it is the escape."""
        begins, escapes = self.begins[indexes], self.begins[indexes + 1] - 1
        # Compared before it is subtracted: the difference of two far numbers would overflow.
        lowest = self.lowest[indexes]
        outside = (symbols < lowest) | (symbols >= lowest + (escapes - begins))
        return np.where(outside, escapes, begins + np.where(outside, lowest, symbols) - lowest), outside

    def bits(self, symbols: np.ndarray, indexes: np.ndarray) -> np.ndarray:
        """Return what coding each symbol costs, in bits, without the values behind escapes."""
        entry, _ = self.entries(np.asarray(symbols, np.int64), np.asarray(indexes, np.int64))
        return PRECISION - np.log2(self.cumulative[entry + 1] - self.cumulative[entry])


def coding_tables(probabilities: Sequence[np.ndarray], lowest: Sequence[int]) -> CodingTables:
    """Return integer tables of distributions.

    Every symbol gets a frequency of at least one; an escape symbol, with the mass that is left, stands for all others.

    Args:
      probabilities: of consecutive symbols, `[symbols]` for each table; not negative, with a sum of at most 1.
      lowest: the symbol of the first probability of each table.

    Returns:
      The tables.

    Raises:
      ValueError: if there is none, a table is empty or too long, or probabilities are none.

    Example:
      >>> import numpy as np
      >>> from jaxlayers.ops.range_coder import Decoder, Encoder, coding_tables
      >>> tables = coding_tables([np.array([0.25, 0.5, 0.25])], [-1])
      >>> encoder, indexes = Encoder(), np.zeros(5, int)
      >>> encoder.push(np.array([0, -1, 70, 0, 1]), tables, indexes)
      >>> decoder = Decoder(encoder.finish())
      >>> decoder.pop(tables, indexes).tolist()
      [0, -1, 70, 0, 1]
    """
    if len(probabilities) != len(lowest) or not len(lowest):
        raise ValueError(
            f"{len(probabilities)} tables and {len(lowest)} lowest symbols must be equally many, one or more; pass both"
        )
    cumulative = []
    for table, given in enumerate(probabilities):
        mass = np.asarray(given, np.float64)
        if mass.ndim != 1 or not 1 <= len(mass) <= _TOTAL // 4:
            raise ValueError(f"table {table} of shape {mass.shape} must list 1 to {_TOTAL // 4} symbols; cut its tails")
        if not (np.all(np.isfinite(mass)) and np.all(mass >= 0) and mass.sum() <= 1 + 1e-6):
            raise ValueError(f"table {table} sums up to {mass.sum()}; pass probabilities with a sum of at most 1")
        mass = np.append(mass, max(0.0, 1.0 - mass.sum()))
        share = mass / mass.sum() * (_TOTAL - len(mass))
        frequencies = 1 + np.floor(share).astype(np.int64)
        # What rounding down has left over goes to those that lost most; a stable order, so that it is always the same.
        order = np.argsort(np.floor(share) - share, kind="stable")
        frequencies[order[: _TOTAL - frequencies.sum()]] += 1
        cumulative.append(table * _TOTAL + np.concatenate([[0], np.cumsum(frequencies)[:-1]]))
    lengths = [len(one) for one in cumulative]
    return CodingTables(
        cumulative=np.concatenate([*cumulative, [len(cumulative) * _TOTAL]]).astype(np.int64),
        begins=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        lowest=np.asarray(lowest, np.int64),
    )


class Encoder:
    """Collects symbols, and turns them into bytes at the end.

    Symbols beyond their table are coded by its escape, and their values stand before the words, so any 64-bit integers
    survive.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._escaped = bytearray()

    def push(self, symbols: np.ndarray, tables: CodingTables, indexes: np.ndarray) -> None:
        """Add a batch of symbols.

        Args:
          symbols: whole numbers of any shape.
          tables: the tables.
          indexes: the table of each symbol, in the same shape.

        Raises:
          ValueError: if the shapes differ, there is no such table, or the symbols are no whole numbers.
        """
        symbols, indexes = np.asarray(symbols), _checked(tables, indexes)
        if symbols.shape != indexes.shape or not np.issubdtype(symbols.dtype, np.integer):
            raise ValueError(
                f"symbols {symbols.dtype}{list(symbols.shape)} must be integers, one for each of the indexes "
                f"{list(indexes.shape)}; round them"
            )
        entry, outside = tables.entries(symbols.astype(np.int64).ravel(), indexes.ravel())
        for value in symbols.ravel()[outside].tolist():
            self._escaped += _varint(2 * value if value >= 0 else -2 * value - 1)
        start = tables.cumulative[entry]
        frequency = tables.cumulative[entry + 1] - start
        self._batches.append(((start % _TOTAL).astype(np.uint64), frequency.astype(np.uint64)))

    def finish(self) -> bytes:
        """Return the coded bytes of all batches."""
        count = sum(len(starts) for starts, _ in self._batches)
        lanes = min(max(1, count // _SYMBOLS_PER_LANE), _MOST_LANES)
        state = np.full(lanes, _LOW, np.uint64)
        words: list[np.ndarray] = []
        shift, keep = np.uint64(_WORD), np.uint64((1 << _WORD) - 1)
        # Last in, first out: the decoder runs forwards.
        for starts, frequencies in reversed(self._batches):
            for row in range((len(starts) - 1) // lanes * lanes, -1, -lanes):
                start, frequency = starts[row : row + lanes], frequencies[row : row + lanes]
                x = state[: len(start)]
                full = x >= frequency << np.uint64(24)
                if full.any():
                    words.append((x[full] & keep)[::-1])
                    x = np.where(full, x >> shift, x)
                quotient, rest = np.divmod(x, frequency)
                state[: len(start)] = (quotient << shift) + rest + start
        head = bytes([lanes]) + bytes(_varint(len(self._escaped))) + bytes(self._escaped)
        states = b"".join(int(x).to_bytes(_STATE_BYTES, "little") for x in state)
        body = np.concatenate(words)[::-1].astype("<u2").tobytes() if words else b""
        return head + states + body


class Decoder:
    """Gives back, batch by batch, what an `Encoder` was given."""

    def __init__(self, data: bytes) -> None:
        """Read the head of the coded bytes.

        Raises:
          ValueError: if they are cut off.
        """
        if not data or not data[0]:
            raise ValueError("coded data must start with a number of lanes; they are damaged, encode again")
        lanes = data[0]
        length, begin = _read_varint(data, 1)
        first = begin + length + lanes * _STATE_BYTES
        if len(data) < first or (len(data) - first) % 2:
            raise ValueError(f"coded data of {len(data)} bytes are cut off; they are damaged, encode again")
        self._escaped, self._place = data[begin : begin + length], 0
        states = (data[begin + length + lane * _STATE_BYTES :][:_STATE_BYTES] for lane in range(lanes))
        self._state = np.array([int.from_bytes(one, "little") for one in states], np.uint64)
        self._words = np.frombuffer(data, "<u2", offset=first).astype(np.uint64)
        self._next = 0

    def pop(self, tables: CodingTables, indexes: np.ndarray) -> np.ndarray:
        """Return the symbols of the next batch.

        Args:
          tables: as the batch was encoded with.
          indexes: as the batch was encoded with.

        Returns:
          Symbols, int64, in the shape of the indexes.

        Raises:
          ValueError: if there is no such table, or the data end too early.
        """
        indexes = _checked(tables, indexes)
        flat = indexes.ravel()
        offsets = flat * _TOTAL
        lanes = len(self._state)
        found = np.empty(len(flat), np.int64)
        low, shift, keep = np.uint64(_LOW), np.uint64(PRECISION), np.uint64(_TOTAL - 1)
        for row in range(0, len(flat), lanes):
            offset = offsets[row : row + lanes]
            x = self._state[: len(offset)]
            slot = (x & keep).astype(np.int64) + offset
            entry = np.searchsorted(tables.cumulative, slot, side="right") - 1
            start = tables.cumulative[entry]
            frequency = (tables.cumulative[entry + 1] - start).astype(np.uint64)
            x = frequency * (x >> shift) + (slot - start).astype(np.uint64)
            empty = x < low
            if empty.any():
                number = int(empty.sum())
                words = self._words[self._next : self._next + number]
                if len(words) < number:
                    raise ValueError("coded data end before their last symbol; they are damaged, encode again")
                self._next += number
                x[empty] = (x[empty] << np.uint64(_WORD)) | words
            self._state[: len(offset)] = x
            found[row : row + lanes] = entry
        symbols = found - tables.begins[flat] + tables.lowest[flat]
        for place in np.flatnonzero(found == tables.begins[flat + 1] - 1):
            value, self._place = _read_varint(self._escaped, self._place)
            if value >> 64:
                raise ValueError("coded data hold a number beyond 64 bits; they are damaged, encode again")
            symbols[place] = -(value + 1 >> 1) if value & 1 else value >> 1
        return symbols.reshape(indexes.shape)

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
          ValueError: if something is, so that what was decoded is not what was encoded.
        """
        if np.any(self._state != _LOW) or self._next != len(self._words) or self._place != len(self._escaped):
            raise ValueError("coded data do not end with their last symbol; they are damaged or of other tables")


def _checked(tables: CodingTables, indexes: np.ndarray) -> np.ndarray:
    indexes = np.asarray(indexes, np.int64)
    if indexes.size and not 0 <= indexes.min() <= indexes.max() < len(tables.lowest):
        raise ValueError(
            f"indexes from {indexes.min()} to {indexes.max()} must be those of {len(tables.lowest)} tables; clip them"
        )
    return indexes


def _varint(value: int) -> bytearray:
    """Return a number that is not negative, seven bits a byte, lowest first."""
    coded = bytearray()
    while value >> 7:
        coded.append(value & 0x7F | 0x80)
        value >>= 7
    coded.append(value)
    return coded


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Return the number at a place, and the place after it."""
    value = 0
    for shift in range(0, 77, 7):
        if place >= len(data):
            break
        value |= (data[place] & 0x7F) << shift
        place += 1
        if not data[place - 1] & 0x80:
            return value, place
    raise ValueError("coded data hold a number that does not end; they are damaged, encode again")
