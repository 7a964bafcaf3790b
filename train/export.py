"""A trained model as a folder of safetensors with a card, and back, bit for bit."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives NumPy the name of bfloat16)
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from jaxlayers import files
from train import checkpoint

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_COLLECTIONS = "collections."
_FORMAT = 1
SHARD_SIZE = 5 << 30


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `load_exported` returns.

    Attributes:
      params: the parameters, nested by module.
      collections: further variable collections (running statistics), by name.
      config: what `config.json` holds.
    """

    params: dict[str, Any]
    collections: dict[str, Any]
    config: dict[str, Any]


def export_run(
    run: epath.PathLike,
    folder: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    shard_size: int = SHARD_SIZE,
) -> Path:
    """Write the parameters of a run's checkpoint as safetensors, with `config.json` and a model card.

    Args:
      run: the run's directory (its working directory, a directory of checkpoints, or one checkpoint).
      folder: where to; made when missing, and must not hold other weights.
      step: the checkpoint; `None` = the newest intact one.
      ema: take the averaged parameters where the checkpoint has them.
      shard_size: bytes above which the weights are cut into several files.

    Returns:
      The folder.

    Raises:
      ValueError: if the run has no intact checkpoint, or the folder is taken.
    """
    run, folder = epath.Path(run), Path(folder)
    if folder.exists() and any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} already holds weights; choose another folder")
    found, averaged, tensors = _read_run(run, step, ema)
    notes = _notes(run)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder, tensors, shard_size=shard_size)
    config = {
        "library_name": "jaxlayers",
        "format": _FORMAT,
        "model": notes["config"].get("model", ""),
        "step": found.number,
        "averaged": averaged,
        "parameters": sum(array.size for name, array in tensors.items() if not name.startswith(_COLLECTIONS)),
        "metrics": dict(found.content["metrics"]),
        "config": notes["config"],
        "versions": notes["versions"],
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(_card(folder.name, config, notes))
    return folder


def _read_run(run: epath.Path, step: int | None, ema: bool) -> tuple[checkpoint.Step, bool, dict[str, np.ndarray]]:
    problems = []
    for found in checkpoint.find_step(run, step):
        averaged = ema and any(name.startswith("ema/") for name in found.leaves)
        prefix = "ema/" if averaged else "params/"
        place = SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.float32, sharding=place)
            for name, leaf in found.leaves.items()
            if name.startswith((prefix, "collections/"))
        }
        try:
            arrays = found.read(wanted)
        except checkpoint.DamageError as damage:
            problems.append(f"step {found.number}: {damage}")
            continue
        return found, averaged, {_flat(name.removeprefix(prefix)): np.asarray(array) for name, array in arrays.items()}
    raise ValueError(f"{run} must hold an intact checkpoint: {'; '.join(problems)}")


def _flat(name: str) -> str:
    if "." in name:
        raise ValueError(f"parameter {name!r} must have no dot in its name to be written; rename its module")
    return name.replace("/", ".")


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shard_size: int = SHARD_SIZE,
    written: Callable[[int], None] | None = None,
    resume: bool = False,
) -> list[Path]:
    """Write arrays as `model.safetensors`, or above `shard_size` bytes as numbered files with an index.

    The header of every file holds the SHA-256 of each tensor's bytes; safetensors itself has no checksum.

    Args:
      folder: where to.
      tensors: arrays by name.
      shard_size: bytes of a file at most.
      written: called with the number of bytes after each tensor.
      resume: keep the files that are there already.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in tensors.items():
        if size + array.nbytes > shard_size and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    count = len(shards)
    paths, index = [], {}
    for number, shard in enumerate(shards, 1):
        path = folder / (_WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors")
        if not (resume and path.is_file()):
            files.write_safetensors(path, shard, {"format": "jax"}, written=written)
        elif written is not None:
            written(sum(array.nbytes for array in shard.values()))
        paths.append(path)
        index.update(dict.fromkeys(shard, path.name))
    if count > 1:
        total = sum(array.nbytes for array in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / _INDEX).write_text(text + "\n")
    return paths


def shapes(place: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every stored parameter, by its path `stage_0/query/kernel`."""
    from safetensors import safe_open

    found = {}
    for path, names in _files(Path(place)).items():
        with safe_open(str(path), "numpy") as file:
            for name in names:
                found[name] = tuple(file.get_slice(name).get_shape())
    return {name.replace(".", "/"): shape for name, shape in found.items() if not name.startswith(_COLLECTIONS)}


def read(place: str | Path, paths: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return stored arrays by path, all of them or those of `paths`, compared with their digests.

    Raises:
      ValueError: if there is no such file, or it was not written by a release that can be read.
      DamageError: if a tensor is not what was written.
    """
    from safetensors import safe_open

    wanted = None if paths is None else {path.replace("/", ".") for path in paths}
    found: dict[str, np.ndarray] = {}
    for path, names in _files(Path(place)).items():
        with safe_open(str(path), "numpy") as file:
            digests = json.loads((file.metadata() or {}).get("sha256", "{}"))
            for name in names:
                if wanted is None or name in wanted:
                    array = file.get_tensor(name)
                    if name in digests and _digest(array) != digests[name]:
                        raise checkpoint.DamageError(f"{path}: tensor {name!r} does not match its SHA-256")
                    found[name.replace(".", "/")] = array
    return found


def load_exported(place: str | Path) -> Exported:
    """Return what `export_run` wrote.

    Args:
      place: the folder.

    Raises:
      ValueError: if there is nothing, or it is damaged; names the tensor.
    """
    place = Path(place)
    config = json.loads((place / CONFIG).read_text()) if (place / CONFIG).exists() else {}
    try:
        arrays = read(place)
    except checkpoint.DamageError as damage:
        raise ValueError(f"{damage}; export the run again") from damage
    params: dict[str, Any] = {}
    collections: dict[str, Any] = {}
    prefix = _COLLECTIONS.replace(".", "/")
    for path, array in arrays.items():
        tree, name = (collections, path.removeprefix(prefix)) if path.startswith(prefix) else (params, path)
        *parents, last = name.split("/")
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[last] = array
    return Exported(params, collections, config)


def _files(place: Path) -> dict[Path, list[str]]:
    """Return the files of weights at a place, and the names of the tensors in each."""
    from safetensors import SafetensorError, safe_open

    if place.is_dir():
        index = place / _INDEX
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [_WEIGHTS]
        paths = [place / name for name in names]
    else:
        paths = [place]
    found = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{place} must hold {path.name}; export a run there: python -m tools.export RUN {place}")
        try:
            with safe_open(str(path), "numpy") as file:
                found[path] = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); export the run again") from error
    return found


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8) if array.size else b"").hexdigest()


def _notes(run: epath.Path) -> dict[str, Any]:
    """Return what a run's directory says of itself; a checkpoint on its own says nothing."""
    home = next((place for place in (run, run.parent, run.parent.parent) if (place / "config.txt").exists()), run)

    def text(name: str) -> str:
        path = home / name
        return path.read_text() if path.exists() else ""

    config = {name: value for name, _, value in (line.partition(" = ") for line in text("config.txt").splitlines())}
    summary = json.loads(text("summary.json") or "{}")
    commands = text("command.txt").splitlines()
    return {
        "config": config,
        "versions": json.loads(text("versions.json") or "{}"),
        "summary": summary,
        "command": commands[0].split("  ", 1)[-1] if commands else "",
    }


def _card(name: str, config: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """Return the model card."""
    metrics = {key: value for key, value in config["metrics"].items() if math.isfinite(value)}
    settings = config["config"]
    own = {key.removeprefix("model."): value for key, value in settings.items() if key.startswith("model.")}
    fields = [f"{key}={value}" for key, value in own.items() if "." not in key]
    rows = [f"| {key} | {value:.4f} |" for key, value in metrics.items()]
    beside = [f"| {key} | {value:.4f} |" for key, value in notes["summary"].get("beside", {}).items()]
    names = "".join(f"  - {key}\n" for key in metrics)
    trained = ", ".join(
        f"{word} {settings[key]}"
        for key, word in (("steps", "steps"), ("batch_size", "batch size"), ("seed", "seed"))
        if key in settings
    )
    command = f", by `{notes['command']}`" if notes["command"] else ""
    parts = [
        "---\nlibrary_name: jaxlayers\ntags:\n  - jax\n  - flax\n" + (f"metrics:\n{names}" if names else "") + "---\n",
        f"# {name}\n",
        f"`{config['model']}` with {config['parameters']:,} parameters, at step {config['step']:,}"
        f"{', averaged over the steps' if config['averaged'] else ''}.\n",
        "Fields: `" + ", ".join(fields) + "`\n" if fields else "",
        "| metric | value |\n| --- | --- |\n" + "\n".join(rows) + "\n" if rows else "",
        "Beside it, on the same data:\n\n| | |\n| --- | --- |\n" + "\n".join(beside) + "\n" if beside else "",
        f"Trained with {trained}{command}.\n" if trained else "",
        f"Sources at revision {notes['versions']['git']}.\n" if notes["versions"].get("git", "none") != "none" else "",
        "## Use it\n\n```python\nfrom train.export import load_exported\n\n"
        'weights = load_exported("PATH/TO/THIS/FOLDER")\n'
        'outputs = model.apply({"params": weights.params, **weights.collections}, inputs)\n```\n\n'
        "`model` is the module above with these fields; a training run begins with these weights by\n"
        '`start_from=StartFrom("PATH/TO/THIS/FOLDER")`.\n',
    ]
    return "\n".join(part for part in parts if part)
