"""NumPy's `.npz` and Flax's msgpack files, read lazily."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlayers.files.tensors import ZIP_ERRORS, Bytes, Stored, Tensors, checked_shape, dtype_of

# What a compressed array may grow by; random numbers do not shrink, zeros do by a thousand.
_MOST_GROWTH = 1032
_DEEPEST = 64


def read_npz(path: Path) -> Tensors:
    """Return the arrays of a `.npz` file; those that are not compressed are views of the mapped file.

    Raises:
      ValueError: if it is damaged, an array holds Python objects, or is announced larger than it can be.
    """
    file = Bytes(path)
    stored = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name in stored or not entry.filename.endswith(".npy"):
                    raise ValueError(f"{path} holds {entry.filename!r} twice or is no .npz file; it is forged")
                stored[name] = _npy(path, file, archive, entry)
    except ZIP_ERRORS as error:
        raise ValueError(f"{path} is a damaged .npz file ({error}); fetch it again") from error
    return Tensors(stored, "npz", release=file.release)


def _npy(path: Path, file: Bytes, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Stored:
    where = f"array {entry.filename!r} of {path}"
    with archive.open(entry) as opened:
        version = np.lib.format.read_magic(opened)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{where} has version {version} of the format, which must be 1 or 2; write it anew")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, fortran, dtype = read(opened)
        except ValueError as error:
            raise ValueError(f"{where} has a header that is none ({str(error)[:80]}); fetch it again") from error
        begin = opened.tell()
    shape = checked_shape(shape, where)
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"{where} holds Python objects or records, which are not read; save plain arrays")
    count = int(np.prod(shape, dtype=np.int64))
    if begin + count * dtype.itemsize != entry.file_size:
        raise ValueError(f"{where} announces {count} values in {entry.file_size} bytes; it is forged")
    if entry.compress_type == zipfile.ZIP_STORED:
        head = file.read(entry.header_offset, 30)
        lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        start = entry.header_offset + 30 + lengths + begin
        file.read(start, 0)

        def load() -> np.ndarray:
            return _ordered(file.array(start, count, dtype), shape, fortran)

        return Stored(shape, dtype, load)
    if entry.file_size > _MOST_GROWTH * max(1, entry.compress_size):
        raise ValueError(f"{where} grows from {entry.compress_size} to {entry.file_size} bytes; it is forged")

    def unpack() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(entry) as opened:
                opened.read(begin)
                values = opened.read(count * dtype.itemsize)
        except ZIP_ERRORS as error:
            raise ValueError(f"{where} cannot be unpacked ({error}); fetch it again") from error
        return _ordered(np.frombuffer(values, dtype, count), shape, fortran)

    return Stored(shape, dtype, unpack)


def _ordered(values: np.ndarray, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


# Msgpack --------------------------------------------------------------------------------------------------------------


def read_msgpack(path: Path) -> Tensors:
    """Return the arrays of what `flax.serialization.to_bytes` wrote, by their keys joined by dots.

    Raises:
      ValueError: if it is damaged, or no tree of arrays.
    """
    file = Bytes(path)
    root, end = _parse(file, 0, 0)
    if end != file.size:
        raise ValueError(f"{path} has {file.size - end} bytes after its end; it is no msgpack file of Flax")
    stored = {name: value for name, value in _leaves(root, "", path) if isinstance(value, Stored)}
    return Tensors(stored, "msgpack", release=file.release)


def _leaves(value: Any, name: str, path: Path) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    if "__msgpack_chunked_array__" in value:
        yield name, _chunked(value, f"array {name!r} of {path}")
        return
    for key, below in value.items():
        yield from _leaves(below, f"{name}.{key}" if name else str(key), path)


def _chunked(value: dict[str, Any], where: str) -> Stored:
    """Return an array of more than a gigabyte, which Flax cuts up."""
    shape, parts = value.get("shape"), value.get("chunks")
    if not isinstance(shape, dict) or not isinstance(parts, dict):
        raise ValueError(f"{where} has no shape or chunks; it is damaged, fetch it again")
    wanted = checked_shape([shape.get(str(index)) for index in range(len(shape))], where)
    found = [parts.get(str(index)) for index in range(len(parts))]
    chunks = [chunk for chunk in found if isinstance(chunk, Stored)]
    if not chunks or len(chunks) < len(found) or len({chunk.dtype for chunk in chunks}) > 1:
        raise ValueError(f"{where} has chunks that are missing or differ in dtype; it is damaged, fetch it again")
    if sum(chunk.nbytes for chunk in chunks) != int(np.prod(wanted, dtype=np.int64)) * chunks[0].dtype.itemsize:
        raise ValueError(f"{where} has chunks of another size than its shape; it is damaged, fetch it again")
    return Stored(wanted, chunks[0].dtype, lambda: np.concatenate([c.load().ravel() for c in chunks]).reshape(wanted))


def _parse(file: Bytes, place: int, depth: int) -> tuple[Any, int]:
    """Return the value at a place, and the place after it."""
    if depth > _DEEPEST:
        raise ValueError(f"{file.path} nests deeper than {_DEEPEST}; it is forged")

    def number(at: int, width: int, *, signed: bool = False) -> int:
        return int.from_bytes(file.read(at, width), "big", signed=signed)

    kind = number(place, 1)
    place += 1
    if kind < 0x80:
        return kind, place
    if kind >= 0xE0:
        return kind - 0x100, place
    if kind < 0x90 or kind in (0xDE, 0xDF):
        width = {0xDE: 2, 0xDF: 4}.get(kind, 0)
        count = number(place, width) if width else kind & 0x0F
        return _map(file, place + width, count, depth)
    if kind < 0xA0 or kind in (0xDC, 0xDD):
        width = {0xDC: 2, 0xDD: 4}.get(kind, 0)
        count = number(place, width) if width else kind & 0x0F
        place += width
        values = []
        for _ in range(count):
            value, place = _parse(file, place, depth + 1)
            values.append(value)
        return values, place
    if kind < 0xC0 or kind in (0xD9, 0xDA, 0xDB):
        width = {0xD9: 1, 0xDA: 2, 0xDB: 4}.get(kind, 0)
        length = number(place, width) if width else kind & 0x1F
        try:
            return file.read(place + width, length).decode(), place + width + length
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.path} has a text that is none; it is damaged, fetch it again") from error
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], place
    if kind in (0xC4, 0xC5, 0xC6):
        width = {0xC4: 1, 0xC5: 2, 0xC6: 4}[kind]
        length = number(place, width)
        file.read(place + width, 0)
        return (place + width, length), place + width + length
    if kind in (0xCA, 0xCB):
        width = 4 if kind == 0xCA else 8
        return float(np.frombuffer(file.read(place, width), f">f{width}")[0]), place + width
    if 0xCC <= kind <= 0xD3:
        width = 1 << (kind & 0x03)
        return number(place, width, signed=kind >= 0xD0), place + width
    if 0xD4 <= kind <= 0xD8 or kind in (0xC7, 0xC8, 0xC9):
        width = {0xC7: 1, 0xC8: 2, 0xC9: 4}.get(kind, 0)
        length = number(place, width) if width else 1 << (kind - 0xD4)
        code = number(place + width, 1, signed=True)
        begin = place + width + 1
        file.read(begin + length, 0)
        return _extension(file, code, begin, length, depth), begin + length
    raise ValueError(f"{file.path} has a byte {kind:#x} that no msgpack file has; it is damaged, fetch it again")


def _map(file: Bytes, place: int, count: int, depth: int) -> tuple[dict[Any, Any], int]:
    found: dict[Any, Any] = {}
    for _ in range(count):
        key, place = _parse(file, place, depth + 1)
        if not isinstance(key, str | int) or key in found:
            raise ValueError(f"{file.path} has a key that is no text or number, or twice; it is damaged")
        found[key], place = _parse(file, place, depth + 1)
    return found, place


def _extension(file: Bytes, code: int, begin: int, length: int, depth: int) -> Any:
    """Return an array, or a NumPy number (codes 1 and 3); complex numbers (2) stay what they are: no array."""
    if code not in (1, 3):
        return None
    described, end = _parse(file, begin, depth + 1)
    where = f"an array of {file.path}"
    if end != begin + length or not isinstance(described, list) or len(described) != 3:
        raise ValueError(f"{where} is damaged; fetch it again")
    shape, name, data = described
    found, dtype = checked_shape(shape, where), dtype_of(name if isinstance(name, str) else "", where)
    if not isinstance(data, tuple) or data[1] != int(np.prod(found, dtype=np.int64)) * dtype.itemsize:
        raise ValueError(f"{where} has another number of bytes than {name}{list(found)}; it is damaged, fetch it again")
    return Stored(found, dtype, _view(file, data[0], found, dtype))


def _view(file: Bytes, start: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
    return lambda: file.array(start, int(np.prod(shape, dtype=np.int64)), dtype).reshape(shape)
