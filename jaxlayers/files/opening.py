"""Any file or folder of tensors, told apart by what is in it."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from jaxlayers.files.array_files import read_msgpack, read_npz
from jaxlayers.files.safetensors_file import read_safetensors
from jaxlayers.files.tensors import ZIP_ERRORS, Stored, Tensors
from jaxlayers.files.torch_file import read_torch

# Files that list the parts of a checkpoint, and single files, in the order in which a folder is searched.
INDEXES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
)
SINGLES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.npz")
LARGEST_INDEX = 64 << 20


def open_tensors(path: str | Path, *, placeholders: bool = False) -> Tensors:
    """Return the tensors of a file, a folder or an index of several files, without reading their values.

    The format is told by the content: safetensors, PyTorch's zip format or the older one (see `torch_file`), NumPy's
    `.npz`, and Flax's msgpack. A folder holds one of the usual names, such as `model.safetensors`, or an index.

    Args:
      path: the file or folder.
      placeholders: see `torch_file.read_torch`.

    Returns:
      The tensors by name.

    Raises:
      ValueError: if there is nothing, or what is there is damaged, forged or of another format; nothing that a file
        holds is ever executed.

    Example:
      >>> import tempfile, numpy as np
      >>> from pathlib import Path
      >>> from jaxlayers.files import open_tensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(Path(folder, "x.npz"), kernel=np.ones((2, 3)))
      ...     tensors = open_tensors(Path(folder, "x.npz"))
      ...     print(tensors, tensors["kernel"].shape)
      Tensors(npz, 1 tensors, 48 bytes) (2, 3)
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, placeholders)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no regular file; pass a file or folder of weights")
    if path.name.endswith(".index.json"):
        return _open_index(path, placeholders)
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04" and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                is_npz = all(name.endswith(".npy") for name in archive.namelist())
        except ZIP_ERRORS as error:
            raise ValueError(f"{path} is a damaged zip file ({error}); fetch it again") from error
        return read_npz(path) if is_npz else read_torch(path, placeholders=placeholders)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return read_safetensors(path)
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise ValueError(f"{path} is an HDF5 file, which is not read; convert it to safetensors or .npz with h5py")
    if path.suffix == ".msgpack" or (
        head and (head[0] & 0xF0 == 0x80 or head[0] in (0xDE, 0xDF)) and head[:1] != b"\x80"
    ):
        return read_msgpack(path)
    return read_torch(path, placeholders=placeholders)


def _open_folder(folder: Path, placeholders: bool) -> Tensors:
    for name in (*INDEXES, *SINGLES):
        if (folder / name).exists():
            return open_tensors(contained(folder, name), placeholders=placeholders)
    found = sorted(path.name for path in folder.iterdir())[:20]
    raise ValueError(f"{folder} must hold one of {[*INDEXES, *SINGLES]}, not {found}; pass the file itself")


def _open_index(path: Path, placeholders: bool) -> Tensors:
    """Open a checkpoint that is cut into several files; each tensor comes from the file that the index names."""
    if path.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"{path} has more than {LARGEST_INDEX} bytes, too many for an index; it is forged")
    try:
        places = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be an index with a weight_map ({error!r}); fetch it again") from error
    if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{path} must name a file for each tensor; fetch it again")
    files = {
        name: open_tensors(contained(path.parent, name), placeholders=placeholders)
        for name in sorted({*places.values()})
    }
    stored: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for tensor, name in places.items():
        if tensor not in files[name].stored:
            raise ValueError(f"{path} says that {name!r} holds {tensor!r}, which it does not; fetch both again")
        stored[tensor] = files[name].stored[tensor]
        metadata.update(files[name].metadata)
    hidden = sorted(tensor for file in files.values() for tensor in file if tensor not in stored)
    if hidden:
        raise ValueError(f"{path} does not list {hidden[:5]}, which its files hold; fetch them again")
    kinds = {file.kind for file in files.values()}

    def release() -> None:
        for file in files.values():
            file.release()

    return Tensors(stored, kinds.pop() if len(kinds) == 1 else "several", metadata, release)


def contained(folder: Path, name: str) -> Path:
    """Return a file of a folder by its name.

    Links may stay within the folder, or lead from a snapshot to the blobs beside it, as in the cache of Hugging Face's
    hub.

    Raises:
      ValueError: if the name leads elsewhere.
    """
    path = folder / name
    if not name or Path(name).name != name or name in (".", "..") or "\\" in name or "\0" in name:
        raise ValueError(f"{folder} names a file {name!r}, which must be a plain name in the folder; it is forged")
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if target.parent not in (home, blobs):
        raise ValueError(f"{path} is a link to {target}, outside its folder; copy the file there")
    return path
