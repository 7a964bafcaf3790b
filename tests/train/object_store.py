"""An object store at `gs://`, kept in a folder: it has no directories but those of its objects, and renames nothing."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest
from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils


class ObjectStore(backend.Backend):
    """Keeps `gs://bucket/name` in the file `root/bucket/name`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, path: Any) -> Path:
        """Return where an object lies."""
        return self.root / str(path).removeprefix("gs://").strip("/")

    def open(self, path: Any, mode: str) -> IO[Any]:
        """Open an object."""
        place = self.place(path)
        if "r" not in mode:
            place.parent.mkdir(parents=True, exist_ok=True)
        return place.open(mode)

    def isdir(self, path: Any) -> bool:
        """Return whether any object's name begins so."""
        return any(entry.is_file() for entry in self.place(path).rglob("*"))

    def exists(self, path: Any) -> bool:
        """Return whether there is such an object, or any below it."""
        return self.place(path).is_file() or self.isdir(path)

    def listdir(self, path: Any) -> list[str]:
        """Return the next parts of the names of the objects below."""
        return [entry.name for entry in self.place(path).iterdir() if self.exists(f"{path}/{entry.name}")]

    def glob(self, path: Any) -> list[str]:
        """Return the names that match."""
        parent, _, pattern = str(path).rpartition("/")
        found = (f"{parent}/{entry.name}" for entry in self.place(parent).glob(pattern))
        return [name for name in found if self.exists(name)]

    def walk(self, top: Any, *, top_down: bool = True, on_error: Callable[..., Any] | None = None) -> Iterator[Any]:
        """Yield each folder with the names in it."""
        names = self.listdir(top)
        folders = [name for name in names if self.isdir(f"{top}/{name}")]
        yield str(top), folders, [name for name in names if name not in folders]
        for name in folders:
            yield from self.walk(f"{top}/{name}")

    def mkdir(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        """Do nothing: there are no directories."""
        if not exist_ok and self.exists(path):
            raise FileExistsError(path)

    makedirs = mkdir

    def rmtree(self, path: Any) -> None:
        """Delete all objects below."""
        if not self.isdir(path):
            raise FileNotFoundError(path)
        shutil.rmtree(self.place(path))

    def remove(self, path: Any) -> None:
        """Delete an object."""
        self.place(path).unlink()

    def rename(self, path: Any, dst: Any) -> NoReturn:
        """Refuse."""
        raise AssertionError(f"an object store cannot rename {path} to {dst}")

    replace = rename

    def copy(self, path: Any, dst: Any, overwrite: bool) -> None:
        """Copy an object."""
        with self.open(path, "rb") as source, self.open(dst, "wb") as target:
            shutil.copyfileobj(source, target)

    def stat(self, path: Any) -> Any:
        """Return what is known of an object."""
        return backend.os_backend.stat(self.place(path))


def mount(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve `gs://` from a folder, for epath and for TensorStore, until the end of the test."""
    store = ObjectStore(root)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(
        gcs_utils, "get_kvstore_for_gcs", lambda path: {"driver": "file", "path": str(store.place(path))}
    )
