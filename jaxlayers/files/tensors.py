"""What every reader of this room returns: names, shapes and dtypes at once, values when they are asked for."""

import dataclasses
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import ml_dtypes  # gives NumPy the names of bfloat16 and of the 8-bit formats
import numpy as np

# Names as safetensors has them; NumPy's own names are taken besides.
DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(bool),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "C64": np.dtype(np.complex64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    }
)

# What Python's reader of zip files raises when one is damaged.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
    EOFError,
    OSError,
    RuntimeError,
    UnicodeDecodeError,
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
      shape: its shape.
      dtype: its dtype, as stored.
      load: reads it; what it returns may be a read-only view of the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping):  # of str to np.ndarray; said so, a type checker would read values to look at them
    """The tensors of a file or folder by name; `tensors[name]` reads one.

    Attributes:
      stored: shape, dtype and reader of each tensor.
      kind: what was read: "safetensors", "torch", "torch (before 1.6)", "npz" or "msgpack".
      metadata: what else the file says of itself.
      release: gives back the memory that reading took; what was read stays readable.
    """

    def __init__(
        self,
        stored: Mapping[str, Stored],
        kind: str,
        metadata: Mapping[str, str] | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.stored = dict(stored)
        self.kind = kind
        self.metadata = dict(metadata or {})
        self.release = release

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self.stored[name]
        array = stored.load()
        if array.shape != stored.shape or array.dtype != stored.dtype:
            raise ValueError(
                f"tensor {name!r} must be the {stored.dtype}{list(stored.shape)} that its file announced, not "
                f"{array.dtype}{list(array.shape)}; the file has changed, open it again"
            )
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __repr__(self) -> str:
        return f"Tensors({self.kind}, {len(self)} tensors, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(stored.nbytes for stored in self.stored.values())

    def rename(self, names: Callable[[str], str | None]) -> "Tensors":
        """Return the tensors under other names; those that get `None` are left out.

        Raises:
          ValueError: if two get the same name.
        """
        renamed: dict[str, Stored] = {}
        for name, stored in self.stored.items():
            new = names(name)
            if new is None:
                continue
            if new in renamed:
                raise ValueError(f"two tensors, one of them {name!r}, would be called {new!r}; rename them apart")
            renamed[new] = stored
        return Tensors(renamed, self.kind, self.metadata, self.release)


class Bytes:
    """A file's bytes, mapped into memory and handed out as read-only arrays; nothing is read before it is looked at."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
          ValueError: if it is empty or no regular file.
        """
        if not path.is_file():
            raise ValueError(f"{path} must be a regular file; pass an existing one")
        self.path = path
        self.size = path.stat().st_size
        if not self.size:
            raise ValueError(f"{path} is empty; fetch it again")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, start: int, count: int) -> bytes:
        """Return a copy of some bytes.

        Raises:
          ValueError: if they do not lie in the file.
        """
        self._check(start, count)
        return self._map[start : start + count]

    def array(self, start: int, count: int, dtype: np.dtype) -> np.ndarray:
        """Return `count` values from byte `start` on, read-only.

        Raises:
          ValueError: if they do not lie in the file.
        """
        self._check(start, count * dtype.itemsize)
        return np.frombuffer(self._map, dtype, count, start)

    def release(self) -> None:
        """Let go of the pages that were read; they are read again when they are looked at again."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _check(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.size:
            raise ValueError(
                f"{self.path} announces bytes {start} to {start + count}, but has {self.size}; it is cut off or "
                "forged, fetch it again"
            )


def dtype_of(name: str, where: str) -> np.dtype:
    """Return the dtype of a name that a file uses.

    Raises:
      ValueError: if it is none.
    """
    if name in DTYPES:
        return DTYPES[name]
    found = {str(dtype): dtype for dtype in DTYPES.values()} | {"complex128": np.dtype(np.complex128)}
    if name not in found:
        raise ValueError(f"{where} has a dtype {name!r}, which must be one of {sorted([*DTYPES, *found])}; convert it")
    return found[name]


def checked_shape(shape: object, where: str) -> tuple[int, ...]:
    """Return a shape that a file announces.

    Raises:
      ValueError: if it is no list of a few numbers, or more than can be addressed.
    """
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > 32
        or not all(type(length) is int and 0 <= length < 2**48 for length in shape)
        or math.prod(max(1, length) for length in shape) >= 2**48
    ):
        raise ValueError(f"{where} has a shape {str(shape)[:80]}, which must be a list of lengths; it is forged")
    return tuple(shape)
