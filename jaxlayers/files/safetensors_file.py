"""Safetensors files: a header that is checked as the format demands, and values that are views of the mapped file.

Done without the safetensors package, which copies values when it reads, holds every tensor twice when it writes, has
written some layouts wrongly, and knows no digests.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlayers.files.tensors import DTYPES, Bytes, Stored, Tensors, checked_shape

# As the library has it.
LARGEST_HEADER = 100_000_000


def read_safetensors(path: Path) -> Tensors:
    """Return the tensors of a safetensors file.

    A tensor whose SHA-256 stands in the metadata (under "sha256", as our files have it) is compared with it when it is
    read.

    Raises:
      ValueError: if the file is cut off, or its header is none, too large, or lies about what is in it.
    """
    file = Bytes(path)
    length = int.from_bytes(file.read(0, min(8, file.size)), "little")
    if file.size < 8 or not 2 <= length <= min(LARGEST_HEADER, file.size - 8):
        raise ValueError(
            f"{path} announces a header of {length} bytes, which must lie between 2 and {LARGEST_HEADER} and in the "
            f"file of {file.size}; it is no safetensors file, or cut off"
        )
    try:
        header = json.loads(file.read(8, length), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is no JSON ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is no JSON object; fetch it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has metadata that are no texts by name; fetch it again")
    begin = 8 + length
    stored, ends = {}, []
    digests = _digests(metadata, path)
    for name, entry in header.items():
        where = f"tensor {name!r} of {path}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{where} must have a dtype, a shape and data_offsets alone; the header is forged")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{where} has dtype {str(entry['dtype'])[:40]!r}, which must be one of {sorted(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], checked_shape(entry["shape"], where)
        count = int(np.prod(shape, dtype=np.int64))
        first, last = _offsets(entry["data_offsets"], where)
        if last - first != count * dtype.itemsize:
            raise ValueError(
                f"{where} has {last - first} bytes for {entry['dtype']}{list(shape)}; the header is forged"
            )
        ends.append((first, last, name))
        stored[name] = Stored(shape, dtype, _reader(file, begin + first, count, dtype, shape, digests.get(name), where))
    _check_cover(ends, file.size - begin, path)
    return Tensors(stored, "safetensors", metadata, file.release)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise json.JSONDecodeError(f"the name {name[:80]!r} stands twice", "", 0)
        found[name] = value
    return found


def _digests(metadata: dict[str, str], path: Path) -> dict[str, str]:
    try:
        digests = json.loads(metadata.get("sha256", "{}"))
    except (json.JSONDecodeError, RecursionError):
        digests = None
    if not isinstance(digests, dict):
        raise ValueError(f"{path} has sha256 metadata that are no JSON object; write it anew")
    return digests


def _offsets(offsets: Any, where: str) -> tuple[int, int]:
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"{where} has data_offsets {str(offsets)[:80]}, which must be two numbers; it is forged")
    return offsets[0], offsets[1]


def _check_cover(ends: list[tuple[int, int, str]], size: int, path: Path) -> None:
    """Refuse overlapping tensors, and bytes that belong to none: nothing may hide in a file."""
    place = 0
    for first, last, name in sorted(ends):
        if first != place:
            raise ValueError(
                f"tensor {name!r} of {path} begins at byte {first} of the data instead of {place}: tensors must lie "
                "one after the other; the header is forged"
            )
        place = last
    if place != size:
        raise ValueError(f"{path} has {size} bytes of data for tensors of {place}; it is cut off or has hidden bytes")


def _reader(
    file: Bytes, start: int, count: int, dtype: np.dtype, shape: tuple[int, ...], digest: str | None, where: str
) -> Any:
    def load() -> np.ndarray:
        array = file.array(start, count, dtype)
        if digest is not None and hashlib.sha256(array.view(np.uint8) if count else b"").hexdigest() != digest:
            raise ValueError(f"{where} does not match its SHA-256; the file is damaged, fetch it again")
        return array.reshape(shape)

    return load


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    written: Callable[[int], None] | None = None,
) -> None:
    """Write tensors one by one, with the SHA-256 of each in the metadata, and read them back.

    The file appears under its name when it is whole; until then nothing of that name is touched. At most one tensor is
    held beside those given.

    Args:
      path: where to.
      tensors: anything NumPy can look at, by name; asked for once each to write, and not kept.
      metadata: texts by name that go in besides.
      written: called with the number of bytes after each tensor.

    Raises:
      ValueError: if a dtype is none of the format, or what was written does not read back.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    place = 0
    stored = getattr(tensors, "stored", None) or tensors
    for name in tensors:
        leaf = stored[name]
        dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
        if dtype not in names:
            raise ValueError(f"tensor {name!r} of {dtype} must have a dtype of {sorted(DTYPES)}; cast it")
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    digests = dict.fromkeys(tensors, "0" * 64)

    def head() -> bytes:
        about = {**(metadata or {}), "sha256": json.dumps(digests)}
        text = json.dumps({"__metadata__": about, **header}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(head())
            for name in tensors:
                array = np.ascontiguousarray(tensors[name])
                data = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
                digests[name] = hashlib.sha256(data).hexdigest()
                file.write(data)
                if written is not None:
                    written(array.nbytes)
            file.seek(0)
            file.write(head())
            file.flush()
            os.fsync(file.fileno())
        back = read_safetensors(partial)
        for name in back:
            back[name]  # compared with its digest
        back.release()
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
