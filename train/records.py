"""Records: what a source of them is, what identifies it, and what helps to write one."""

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

Record = dict[str, np.ndarray]
Prepare = Callable[[Record], Record]

SAMPLES = 64  # records that stand for a source that is not digested in full


@runtime_checkable
class Source(Protocol):
    """Records by index, all with the same names, shapes and dtypes."""

    def __len__(self) -> int:
        """Returns the number of records."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Returns one record."""
        ...


def name_of(source: Any) -> str:
    """Returns what messages call a source."""
    return str(getattr(source, "name", None) or type(source).__qualname__)


def digest(source: Source) -> str:
    """Returns the SHA-256 of a source: its own `digest()`, else that of evenly spread records."""
    own = getattr(source, "digest", None)
    return own() if own is not None else sampled("", source)


def describe(value: Any) -> str:
    """Names a callable and its parameters, the same in every process: what a function encloses is among them."""
    return _describe(value, 8)


def _describe(value: Any, depth: int) -> str:
    if value is None:
        return "none"
    if isinstance(value, np.ndarray):
        return f"array({value.dtype}, {value.shape}, {sha256({'': value})})"
    if isinstance(value, tuple | list):
        inner = ", ".join(_parameter(entry, depth) for entry in value)
        return f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_parameter(entry, depth) for entry in value)) + "}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_parameter(entry, depth)}" for key, entry in value.items()) + "}"
    if isinstance(value, functools.partial):
        parameters = [_parameter(entry, depth) for entry in value.args]
        parameters += [f"{key}={_parameter(entry, depth)}" for key, entry in sorted(value.keywords.items())]
        return f"{_describe(value.func, depth)}({', '.join(parameters)})"
    if hasattr(value, "__qualname__"):
        enclosed = _enclosed(value) if depth else []  # functions may enclose one another
        inner = ", ".join(_parameter(entry, depth - 1) for entry in enclosed)
        return f"{value.__module__}.{value.__qualname__}" + (f"[{inner}]" if enclosed else "")
    kind = type(value)
    if dataclasses.is_dataclass(value):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        inner = ", ".join(f"{key}={_parameter(entry, depth)}" for key, entry in fields)
        return f"{kind.__module__}.{kind.__qualname__}({inner})"
    return f"{kind.__module__}.{kind.__qualname__}"


def _enclosed(function: Any) -> list[Any]:
    """Returns the object that a method is bound to and the variables that a function encloses."""
    owner = getattr(function, "__self__", None)
    bound = [] if owner is None or isinstance(owner, type | types.ModuleType) else [owner]
    variables = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    return bound + [variables[name] for name in sorted(variables) if variables[name] is not function]


def _parameter(value: Any, depth: int) -> str:
    """Returns `repr` of plain values, else the description."""
    plain = value is None or isinstance(value, bool | int | float | complex | str | bytes | Path | np.generic)
    return repr(value) if plain else _describe(value, depth)


def spread(length: int, count: int) -> np.ndarray:
    """Returns up to `count` evenly spread indices, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def sha256(record: Mapping[str, np.ndarray]) -> str:
    """Digests arrays by name, with their dtypes and shapes."""
    result = hashlib.sha256()
    for name in sorted(record):
        value = np.asarray(record[name])
        result.update(f"{name} {value.dtype} {value.shape};".encode())
        result.update(repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes())
    return result.hexdigest()


def sampled(description: str, source: Any) -> str:
    """Digests a description and evenly spread records."""
    records = [sha256(source[int(index)]) for index in spread(len(source), SAMPLES)]
    return hashlib.sha256("\n".join([description, *records] if description else records).encode()).hexdigest()


class Reopened:
    """Pickles the fields of a dataclass alone: what `cached_property` opened is opened again elsewhere."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def files_below(root: Path, endings: Iterable[str]) -> list[str]:
    """Returns the files below a folder with one of the endings, sorted, relative to it."""
    wanted = set(endings)
    return sorted(
        str(file.relative_to(root))
        for file in root.rglob("*")
        if file.suffix.lower() in wanted and not file.name.startswith(".") and file.is_file()
    )
