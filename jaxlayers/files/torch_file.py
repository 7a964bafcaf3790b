"""PyTorch checkpoints, zip or older, read without PyTorch and without unpickling.

A `.pth`, `.pt` or `.bin` file holds a pickle, a program that can call anything. Here a small machine of its own runs
the few instructions that tensors in plain containers need. It knows no way to import or call what a file names: the
names of a handful of constructors are understood, and any other name is refused, or kept as a `Placeholder`.
"""

import dataclasses
import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlayers.files.tensors import DTYPES, ZIP_ERRORS, Bytes, Stored, Tensors, checked_shape

# The program alone, without the values of tensors.
LARGEST_PICKLE = 64 << 20
# Tensors, containers and numbers that a file may hold; and how often a view may repeat what is stored.
MOST_NODES = 2_000_000
MOST_REPEATS = 64

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}
_TORCH_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """Something that a file names and that was neither imported nor called.

    Attributes:
      name: `module.attribute`.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Values of one dtype in a row."""

    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor: a part of a storage."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path, *, placeholders: bool = False) -> Tensors:
    """Return the tensors of a file that `torch.save` wrote, by the path of keys that leads to each.

    Keys of nested dictionaries, and places in lists, are joined by dots: `model.layers.0.weight`. What is no tensor
    (numbers of steps, settings) is left out, but for texts and numbers at the top, which become metadata.

    Args:
      path: the file.
      placeholders: keep what the file names, and is neither a tensor nor a plain container, as inert `Placeholder`s
        instead of refusing the file. Nothing is imported or called either way.

    Raises:
      ValueError: if the file is neither of the two formats, damaged, or names anything but tensors and containers.
    """
    file = Bytes(path)
    if zipfile.is_zipfile(path):
        root, storages, kind = _read_zip(path, file, placeholders)
    else:
        root, storages, kind = _read_legacy(path, file, placeholders)
    stored, metadata = {}, {}
    for name, value in _walk(root, path):
        if isinstance(value, _View):
            stored[name] = Stored(value.shape, value.dtype, _reader(value, storages, name, path))
        elif "." not in name and isinstance(value, str | int | float | bool):
            metadata[name] = str(value)
    return Tensors(stored, kind, metadata, file.release)


# Where the values are -------------------------------------------------------------------------------------------------

# Returns the mapped bytes of a storage, given how many there must be.
_Find = Callable[[str, int], tuple[Bytes, int]]


def _read_zip(path: Path, file: Bytes, placeholders: bool) -> tuple[Any, _Find, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (*ZIP_ERRORS, ValueError) as error:
        raise ValueError(f"{path} is a damaged zip file ({error}); fetch it again") from error
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        if entry.filename in found:
            raise ValueError(f"{path} holds {entry.filename!r} twice; it is forged")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{path} holds {entry.filename!r} compressed, which torch.save never does; save it anew")
        found[entry.filename] = entry
    programs = [name for name in found if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"{path} must hold one data.pkl, not {len(programs)}; it is no file of torch.save")
    folder = programs[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in found or any(name.startswith(f"{folder}code/") for name in found):
        raise ValueError(f"{path} is a TorchScript program, not a checkpoint; save its state_dict instead")

    def place(name: str) -> tuple[int, int]:
        entry = found[name]
        head = file.read(entry.header_offset, 30)
        if head[:4] != b"PK\x03\x04":
            raise ValueError(f"{path} points at no entry for {name!r}; it is forged")
        lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        return entry.header_offset + 30 + lengths, entry.file_size

    def read(name: str, most: int) -> bytes:
        start, size = place(name)
        if size > most:
            raise ValueError(f"{path} holds {name!r} of {size} bytes, more than the {most} it may have; it is forged")
        return file.read(start, size)

    order = f"{folder}byteorder"
    if order in found and read(order, 64).strip() != b"little":
        raise ValueError(f"{path} was written on a big-endian machine; load and save it on a little-endian one")
    root = _Machine(path, placeholders).run(io.BytesIO(read(programs[0], LARGEST_PICKLE)))

    def storage(key: str, nbytes: int) -> tuple[Bytes, int]:
        name = f"{folder}data/{key}"
        if name not in found:
            raise ValueError(f"{path} must hold the values {name!r}; it is cut off, fetch it again")
        start, size = place(name)
        if size != nbytes:
            raise ValueError(f"{path} holds {size} bytes for {name!r}, not the {nbytes} announced; it is forged")
        return file, start

    return root, storage, "torch"


def _read_legacy(path: Path, file: Bytes, placeholders: bool) -> tuple[Any, _Find, str]:
    """Read what was written before PyTorch 1.6: four pickles, the keys of the storages, and their values in turn."""
    unknown = f"{path} is no file of torch.save: it is neither a zip file nor begins with the older format's mark"
    with path.open("rb") as opened:
        bounded = _Bounded(opened, LARGEST_PICKLE)
        try:
            magic = _Machine(path, False).run(bounded)
        except ValueError as error:
            raise ValueError(f"{unknown}; convert it to safetensors where it comes from") from error
        if magic != _LEGACY_MAGIC:
            raise ValueError(f"{unknown}; convert it to safetensors where it comes from")
        version = _Machine(path, False).run(bounded)
        if version != 1001:
            raise ValueError(f"{path} has version {str(version)[:40]} of the older format, not 1001; save it anew")
        system = _Machine(path, False).run(bounded)
        if not isinstance(system, dict) or not system.get("little_endian", True):
            raise ValueError(f"{path} was not written on a little-endian machine; load and save it on one")
        machine = _Machine(path, placeholders)
        root = machine.run(bounded)
        keys = _Machine(path, False).run(bounded)
        place = opened.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{path} must list the keys of its storages; it is damaged, fetch it again")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in machine.storages or key in places:
            raise ValueError(f"{path} lists a storage {key[:40]!r} that no tensor has, or twice; it is forged")
        dtype = machine.storages[key].dtype
        count = int.from_bytes(file.read(place, 8), "little")
        file.read(place + 8, 0)
        if count > (file.size - place) // dtype.itemsize:
            raise ValueError(f"{path} announces {count} values for {key[:40]!r}, beyond its end; it is cut off")
        places[key] = place + 8, count * dtype.itemsize
        place += 8 + count * dtype.itemsize

    def storage(key: str, nbytes: int) -> tuple[Bytes, int]:
        if key not in places or places[key][1] != nbytes:
            raise ValueError(f"{path} must hold {nbytes} bytes for storage {key[:40]!r}; it is damaged, fetch it again")
        return file, places[key][0]

    return root, storage, "torch (before 1.6)"


class _Bounded:
    """A file of which not more than so many bytes are read at once, whatever a forged length says."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most = file, most

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._most)) if count >= 0 else b""

    def readline(self) -> bytes:
        return self._file.readline(self._most)


def _reader(view: _View, storages: _Find, name: str, path: Path) -> Callable[[], np.ndarray]:
    """Check a view and return what reads it; the check is made now, so that a forged file is refused at once."""
    storage = view.storage
    nbytes = storage.count * storage.dtype.itemsize
    count = nbytes // view.dtype.itemsize
    size = math.prod(view.shape)
    last = view.offset + sum((length - 1) * step for length, step in zip(view.shape, view.strides, strict=True))
    if (
        len(view.shape) != len(view.strides)
        or min((view.offset, *view.strides)) < 0
        or (size and last >= count)
        or size > MOST_REPEATS * max(1, count)
        or nbytes % view.dtype.itemsize
    ):
        raise ValueError(
            f"tensor {name!r} of {path} reaches beyond the {count} values stored for it (offset {view.offset}, shape "
            f"{list(view.shape)}, strides {list(view.strides)}); it is forged"
        )
    file, start = storages(storage.key, nbytes)

    def load() -> np.ndarray:
        values = file.array(start, count, view.dtype)
        if not size:
            return np.zeros(view.shape, view.dtype)
        strides = tuple(step * view.dtype.itemsize for step in view.strides)
        return np.lib.stride_tricks.as_strided(values[view.offset :], view.shape, strides, writeable=False)

    return load


def _walk(root: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what stands in nested containers, with the path that leads there; each container once."""
    stack: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    nodes = 0
    while stack:
        name, value = stack.pop()
        nodes += 1
        if nodes > MOST_NODES:
            raise ValueError(f"{path} holds more than {MOST_NODES} things; it is forged")
        if not isinstance(value, dict | list | tuple):
            yield name, value
            continue
        if id(value) in seen:  # containers may hold one another, and themselves
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        below = [(f"{name}.{key}" if name else str(key), one) for key, one in items if isinstance(key, str | int)]
        stack.extend(reversed(below))


# The machine ----------------------------------------------------------------------------------------------------------


class _Mark:
    """Where a list of arguments begins on the stack."""


_MARK = _Mark()
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = re.compile(
    r"(BIN|LONG_BIN)?(INT|FLOAT)[12]?|LONG[14]?|(SHORT_)?BIN(UNICODE8?|STRING|BYTES8?)|UNICODE|STRING"
)
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Runs one pickle of tensors in plain containers.

    Sets become lists, since what they hold need not be hashable here.
    """

    def __init__(self, path: Path, placeholders: bool) -> None:
        self.path = path
        self.placeholders = placeholders
        self.storages: dict[str, _Storage] = {}

    def run(self, file: Any) -> Any:
        """Return what the pickle builds.

        Raises:
          ValueError: if it is damaged or does more than that.
        """
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        steps = 0
        try:
            for opcode, argument, _ in pickletools.genops(file):
                steps += 1
                if steps > 10 * MOST_NODES:
                    raise ValueError(f"{self.path} has a pickle of more than {10 * MOST_NODES} steps; it is forged")
                if opcode.name == "STOP":
                    (root,) = stack
                    return root
                self._step(opcode.name, argument, stack, memo)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} holds a damaged pickle ({error!r}); fetch it again") from error
        except (OverflowError, MemoryError) as error:
            raise ValueError(f"{self.path} holds a pickle with forged lengths ({error!r})") from error
        except ValueError as error:
            # pickletools does not know the file.
            raise error if str(self.path) in str(error) else ValueError(f"{self.path}: {error}") from error
        raise ValueError(f"{self.path} holds a pickle that does not end; it is cut off, fetch it again")

    def _step(self, name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if _LITERALS.fullmatch(name):
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count or any(value is _MARK for value in stack[-count:]):
                raise IndexError(f"{name} on a short stack")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "FROZENSET", "DICT"):
            values = _since_mark(stack)
            if name == "DICT":
                stack.append({})
                self._set(stack[-1], values)
            else:
                stack.append(tuple(values) if name == "TUPLE" else values)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if name == "APPEND" else _since_mark(stack)
            if not isinstance(stack[-1], list):
                raise TypeError(f"{name} on no list")
            stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                values = [key, value]
            else:
                values = _since_mark(stack)
            self._set(stack[-1], values)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            _since_mark(stack)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "GLOBAL":
                module, _, attribute = argument.partition(" ")
            else:
                attribute, module = stack.pop(), stack.pop()
            stack.append(self._named(module, attribute))
        elif name in ("BINPERSID", "PERSID"):
            stack.append(self._storage(stack.pop() if name == "BINPERSID" else argument))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name in ("NEWOBJ", "NEWOBJ_EX") and self.placeholders:
            if name == "NEWOBJ_EX":
                stack.pop()
            stack.pop()
            made = stack.pop()
            if not isinstance(made, Placeholder):
                raise TypeError(f"{name} of no class")
            stack.append(made)
        elif name == "BUILD":
            stack.pop()
            # The attributes of a dictionary (versions of modules) are not needed.
            if not isinstance(stack[-1], dict | Placeholder):
                raise TypeError("BUILD on no dictionary")
        else:
            raise ValueError(
                f"{self.path} holds a pickle with the instruction {name}, which no tensor needs; save its state_dict "
                "alone"
            )

    def _set(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Placeholder) and self.placeholders:
            return
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError("items for no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Other keys have a hash of their own making, or none.
            if type(key) in (str, int, float, bool, bytes, type(None)):
                target[key] = value
            elif isinstance(key, tuple | _View | _Storage | Placeholder):
                target[f"<{type(key).__name__.strip('_').lower()} {len(target)}>"] = value
            else:
                raise TypeError(f"a key of type {type(key).__name__}")

    def _named(self, module: Any, attribute: Any) -> Any:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError("a name that is no text")
        name = f"{module}.{attribute}"
        if name in _CONSTRUCTORS or (
            module in ("torch", "torch.storage") and (attribute in _STORAGES or attribute in _TORCH_DTYPES)
        ):
            return _Name(module, attribute)
        if self.placeholders:
            return Placeholder(name)
        raise ValueError(
            f"{self.path} names {name[:120]!r}, which is neither a tensor nor a plain container; none of it was run: "
            "save the state_dict alone, or allow placeholders"
        )

    def _call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Placeholder):
            return function
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise TypeError("a call of no known constructor")
        constructor = _CONSTRUCTORS.get(f"{function.module}.{function.attribute}")
        if constructor is None:
            raise TypeError(f"a call of {function.attribute}")
        return constructor(*arguments)

    def _storage(self, described: Any) -> _Storage:
        """Return the storage that a persistent id ('storage', type, key, device, count, ...) describes."""
        if not isinstance(described, tuple) or len(described) not in (5, 6) or described[0] != "storage":
            raise TypeError("a persistent id of no storage")
        kind, key, _, count = described[1:5]
        if len(described) == 6 and described[5] is not None:
            raise ValueError(f"{self.path} shares storages as PyTorch did before 0.4; load and save it anew")
        if not isinstance(kind, _Name) or kind.attribute not in _STORAGES:
            raise TypeError("a storage of unknown type")
        if not isinstance(key, str) or not key.isascii() or not key.isdigit() or type(count) is not int or count < 0:
            raise TypeError("a storage with a forged key or length")
        storage = _Storage(DTYPES[_STORAGES[kind.attribute]], key, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"{self.path} gives storage {key[:40]!r} two types or lengths; it is forged")
        return storage


@dataclasses.dataclass(frozen=True)
class _Name:
    """A constructor, storage type or dtype that is understood."""

    module: str
    attribute: str


def _since_mark(stack: list[Any]) -> list[Any]:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is _MARK:
            values = stack[index + 1 :]
            del stack[index:]
            return values
    raise IndexError("no mark on the stack")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor of no storage")
    return _view(storage, storage.dtype, offset, shape, strides)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _gradient: Any, _hooks: Any, dtype: Any, *_: Any
) -> _View:
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Name) or dtype.attribute not in _TORCH_DTYPES:
        raise TypeError("a tensor of no storage or dtype")
    return _view(storage, DTYPES[_TORCH_DTYPES[dtype.attribute]], offset, shape, strides)


def _view(storage: _Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> _View:
    found = checked_shape(shape, "a tensor")
    if type(offset) is not int or not isinstance(strides, tuple) or len(strides) != len(found):
        raise TypeError("a tensor with a forged offset or strides")
    if not all(type(step) is int and abs(step) < 2**48 for step in strides) or abs(offset) >= 2**48:
        raise TypeError("a tensor with a forged offset or strides")
    return _View(storage, dtype, offset, found, strides)


def _parameter(tensor: Any, *_: Any) -> _View:
    if not isinstance(tensor, _View):
        raise TypeError("a parameter of no tensor")
    return tensor


def _ordered(items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, list | tuple) or not all(isinstance(i, list | tuple) and len(i) == 2 for i in items):
        raise TypeError("a dictionary of no items")
    if not all(type(key) in (str, int) for key, _ in items):
        raise TypeError("a dictionary with keys that are neither texts nor numbers")
    return dict(items)


def _size(lengths: Any = ()) -> tuple[int, ...]:
    return checked_shape(lengths, "a torch.Size")


def _device(*_: Any) -> None:
    return None


_CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch.device": _device,
}
