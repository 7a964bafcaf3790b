"""What `tools.convert` writes: each format a function, each output whole or not there."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import numpy as np

import jaxlayers
from jaxlayers import files, pretrained
from train import export

Written = Callable[[int], None]
PROGRAM_TOLERANCE = 1e-3
"""Largest difference of an exported program's outputs, relative to the largest output."""
_PROGRESS = "progress.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """A conversion that is ready to be written.

    Attributes:
      out: where to.
      model: the module.
      name: of the variant.
      fields: those that differ from the variant's.
      found: variables, report and dialect.
      inputs: shapes of the model's inputs.
      dialect: the reference whose names `reference` writes.
      layout: shape by name as a file of the reference has them, or `None`.
      shard_size: bytes of a file at most.
      origin: what was converted.
      image_size: side of the input of an exported program; `None` takes the named model's.
    """

    out: Path
    model: nn.Module
    name: str
    fields: Mapping[str, Any]
    found: pretrained.Pretrained
    inputs: Sequence[Any] | None
    dialect: str
    layout: Mapping[str, tuple[int, ...]] | None
    shard_size: int
    origin: str
    image_size: int | None = None


def check_free(out: Path) -> None:
    """Raise `ValueError` unless nothing is there yet and the folder above is."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} must not exist yet; choose another place or remove it")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out} must lie in a folder that exists; make {out.parent} first")


def write_folder(job: Job, written: Written) -> None:
    """Write safetensors (in several files above the shard size), `config.json` and a model card.

    What is finished when a run is broken off is kept beside the output and taken up by the next run of the same
    conversion.
    """
    tensors = _flat(job.found.variables)
    partial = job.out.with_name(f".{job.out.name}.partial")
    key = _key(job, tensors)
    if partial.is_symlink() or (partial / _PROGRESS).is_symlink():
        raise ValueError(f"{partial} is a link; remove it")
    if partial.exists() and _text(partial / _PROGRESS) != key:
        raise ValueError(f"{partial} is left from another conversion to {job.out}; remove it")
    if not partial.exists():
        partial.mkdir()
        (partial / _PROGRESS).write_text(key)
    with _locked(partial):
        export.write_safetensors(partial, tensors, shard_size=job.shard_size, written=written, resume=True)
        config = _config(job, tensors)
        (partial / export.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (partial / "README.md").write_text(_card(job, config))
        (partial / _PROGRESS).unlink()
    partial.rename(job.out)


def write_reference(job: Job, written: Written) -> None:
    """Write one safetensors file in the reference's names and layout."""
    tensors = pretrained.to_reference(job.model, job.found.variables, job.dialect, inputs=job.inputs, layout=job.layout)
    files.write_safetensors(job.out, tensors, {"format": "pt"}, written=written)


def write_msgpack(job: Job, written: Written) -> None:
    """Write what `flax.serialization.from_bytes` reads."""
    data = flax.serialization.to_bytes(jax.tree.map(np.asarray, job.found.variables))
    _atomically(job.out, lambda path: path.write_bytes(data))
    written(len(data))


def write_orbax(job: Job, written: Written) -> None:
    """Write an Orbax checkpoint of the collections."""
    import orbax.checkpoint as ocp

    def save(path: Path) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), job.found.variables)
            checkpointer.wait_until_finished()

    _atomically(job.out, save)


def write_stablehlo(job: Job, written: Written) -> None:
    """Write the model as a serialised `jax.export` program of variables and inputs, for any batch size."""
    if job.inputs is None:
        raise ValueError(f"{job.name} must have known inputs to be exported as a program; use another --to")
    (batch,) = jax.export.symbolic_shape("batch")
    inputs = [jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype) for leaf in _full_inputs(job)]
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), job.found.variables)
    program = jax.export.export(jax.jit(job.model.apply), platforms=("cpu", "cuda", "tpu"))(variables, *inputs)

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.stablehlo").write_bytes(program.serialize())
        export.write_safetensors(folder, _flat(job.found.variables), shard_size=job.shard_size, written=written)
        (folder / "README.md").write_text(
            f"# {job.name}, exported\n\n```python\nimport jax\nfrom train.export import load_exported\n\n"
            'program = jax.export.deserialize(open("model.stablehlo", "rb").read())\nweights = load_exported(".")\n'
            'outputs = program.call({"params": weights.params, **weights.collections}, inputs)\n```\n\n'
            f"Inputs of any batch size: {', '.join(f'{leaf.dtype} {leaf.shape}' for leaf in inputs)}.\n"
        )

    _atomically(job.out, save)


def write_onnx(job: Job, written: Written) -> None:
    """Write the model with its weights as ONNX, for any batch size, once ONNX Runtime gives the same outputs."""
    if job.inputs is None:
        raise ValueError(f"{job.name} must have known inputs to be exported as a program; use another --to")
    shapes = [leaf.shape[1:] for leaf in _full_inputs(job)]

    def save(path: Path) -> None:
        error = save_onnx(path, job.name, lambda *inputs: job.model.apply(job.found.variables, *inputs), shapes)
        if not error < PROGRAM_TOLERANCE:
            raise ValueError(f"ONNX Runtime must give the outputs of {job.name}, differs by {error:.1g} of them")
        written(path.stat().st_size)

    _atomically(job.out, save)


def save_onnx(path: Path, name: str, call: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> float:
    """Save a function of float32 arrays as ONNX for any batch size, run it, and return its error on random inputs.

    Args:
      path: of the file.
      name: of the program.
      call: returns arrays in any tree.
      shapes: of the inputs, without the batch.

    Returns:
      The largest difference of an output of ONNX Runtime, relative to the largest value of that output.

    Raises:
      ValueError: if the exporter is not installed or cannot take the function.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"--to onnx needs `pip install jaxlayers[onnx]`: {error}") from error

    def listed(*inputs: Any) -> list[Any]:
        return jax.tree.leaves(call(*inputs))

    try:
        # As a value: the exporter's own file keeps large weights in a second one, under the name of the first.
        program = jax2onnx.to_onnx(listed, [("batch", *shape) for shape in shapes], model_name=name)
    except (NotImplementedError, TypeError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"jax2onnx must be able to take {name}; use another --to: {error!r}") from error
    if program.ByteSize() >= 2**31:
        raise ValueError(f"ONNX holds less than 2 GiB in a file, {name} has more; use another --to")
    path.write_bytes(program.SerializeToString())
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((2, *shape), np.float32) for shape in shapes]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {each.name: array for each, array in zip(session.get_inputs(), inputs, strict=True)})
    wanted = jax.jit(listed)(*inputs)
    errors = [np.abs(one - two).max() / max(np.abs(two).max(), 1e-6) for one, two in zip(found, wanted, strict=True)]
    return float(max(errors))


WRITERS: Mapping[str, Callable[[Job, Written], None]] = {
    "folder": write_folder,
    "reference": write_reference,
    "msgpack": write_msgpack,
    "orbax": write_orbax,
    "stablehlo": write_stablehlo,
    "onnx": write_onnx,
}


# ------------------------------------------------------------------------------------------------------------------


def _full_inputs(job: Job) -> Sequence[Any]:
    """Return the inputs of the named variant, with the channels of the job's and the side that is asked for."""
    found = []
    for leaf, shown in zip(jaxlayers.abstract_inputs(job.name), job.inputs or (), strict=True):
        space = leaf.shape[1:-1] if job.image_size is None else (job.image_size,) * (leaf.ndim - 2)
        found.append(jax.ShapeDtypeStruct((1, *space, shown.shape[-1]), leaf.dtype))
    return found


def _flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays by the names that our files have: paths with dots, collections but parameters below a word."""
    found = {}
    for path, leaf in flax.traverse_util.flatten_dict(dict(variables), sep=".").items():
        collection, _, name = path.partition(".")
        found[name if collection == "params" else f"collections.{path}"] = np.asarray(leaf)
    return found


def _key(job: Job, tensors: Mapping[str, np.ndarray]) -> str:
    """Return a text that is the same for the same conversion: its settings and some of every tensor's values."""
    digest = hashlib.sha256()
    for name, array in tensors.items():
        some = np.ascontiguousarray(array.reshape(-1)[:: max(1, array.size // 64)])
        digest.update(f"{name} {array.shape} {array.dtype} ".encode() + some.tobytes())
    return json.dumps({"model": job.name, "shard_size": job.shard_size, "weights": digest.hexdigest()})


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    """Keep a second run of the same conversion out while one is writing."""
    import fcntl

    with (folder / _PROGRESS).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{folder} is being written by another run; wait for it") from error
        yield


def _atomically(out: Path, save: Callable[[Path], Any]) -> None:
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        save(partial)
        os.replace(partial, out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        elif partial.exists():
            partial.unlink()


def _config(job: Job, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    report = job.found.report
    return {
        "library_name": "jaxlayers",
        "format": 1,
        "model": f"{type(job.model).__module__}.{type(job.model).__name__}",
        "variant": job.name,
        "fields": {field: repr(value) for field, value in job.fields.items()},
        "parameters": sum(array.size for name, array in tensors.items() if not name.startswith("collections.")),
        "source": {
            "file": job.origin,
            "dialect": report.dialect,
            "origin": job.found.dialect.origin,
            "layout": {name: list(shape) for name, shape in job.found.layout.items()},
            "ignored": dict(report.ignored),
            "fresh": dict(report.fresh),
            "changed": list(report.changed),
        },
    }


def _card(job: Job, config: Mapping[str, Any]) -> str:
    source = config["source"]
    fields = "".join(f", {field}={value}" for field, value in config["fields"].items())
    ignored = [f"- `{name}`: {reason}" for name, reason in list(source["ignored"].items())[:20]]
    parts = [
        "---\nlibrary_name: jaxlayers\ntags:\n  - jax\n  - flax\n---\n",
        f"# {job.out.name}\n",
        f"`{config['variant']}` with {config['parameters']:,} parameters, converted from `{source['file']}` "
        f"({source['dialect']}: {source['origin']}).\n",
        "Changed on the way: " + "; ".join(source["changed"]) + ".\n" if source["changed"] else "",
        "Left out:\n\n" + "\n".join(ignored) + "\n" if ignored else "",
        "## Use it\n\n```python\nimport jaxlayers\nfrom jaxlayers import load_pretrained\n\n"
        f'model = jaxlayers.create_model("{job.name}"{fields})\n'
        'variables = load_pretrained(model, "PATH/TO/THIS/FOLDER")\n'
        "outputs = model.apply(variables, inputs)\n```\n",
    ]
    return "\n".join(part for part in parts if part)


def statistics(variables: Mapping[str, Any]) -> str:
    """Return count, mean and deviation of the values by the module at the top, a line each."""
    rows: dict[str, list[np.ndarray]] = {}
    for path, leaf in flax.traverse_util.flatten_dict(dict(variables), sep="/").items():
        rows.setdefault("/".join(path.split("/")[:2]), []).append(np.asarray(leaf, np.float32).reshape(-1))
    lines = []
    for name, leaves in rows.items():
        count = sum(leaf.size for leaf in leaves)
        mean = sum(float(leaf.sum(dtype=np.float64)) for leaf in leaves) / max(count, 1)
        square = sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in leaves) / max(count, 1)
        lines.append(
            f"  {name}: {count:,} values, mean {mean:.3g}, deviation {math.sqrt(max(square - mean**2, 0)):.3g}"
        )
    return "\n".join(lines)
