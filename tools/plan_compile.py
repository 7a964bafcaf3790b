"""Compile a config's training and evaluation step for devices that are not there; one process, many jobs.

`tools.plan` starts it in an environment of its own, where libtpu may be installed, with a file of jobs as JSON lines,
and reads an answer a line. The step is the one that `train.loop` takes: `train.program.build` and
`train.step.compile_step`.
"""

import argparse
import contextlib
import dataclasses
import gzip
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    # What libtpu asks for on a machine that has no TPU; a second process would fail on a lock file otherwise.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile, or only to count.

    Attributes:
      config: path of the config file.
      smoke: its small form.
      overrides: assignments as `python -m train --set` takes them.
      topology: such as `v5e:16x16`.
      mesh: sizes by axis that replace the config's; the axes that are not named are 1. `None` = the config's where it
        fits the topology, else all devices along `data`.
      batch_size: examples a step; 0 = the config's.
      eval_batch_size: examples of an evaluation step; 0 = the config's, or as many as a training step.
      accumulate: pieces of the batch; 0 = the config's.
      remat: a name of `jaxlayers.core.remat.POLICIES`; empty = the config's.
      compile: whether to compile; else shapes are counted.
      evaluation: the evaluation step too.
      text: file that the compiled training step is written to, gzipped; empty = none.
      survey: meshes (sizes by axis) to count the state for, under every recomputation policy; nothing is compiled.
      calibrate: compile a large product too, to set the step's time beside.
    """

    config: str
    topology: str
    smoke: bool = False
    overrides: tuple[str, ...] = ()
    mesh: Mapping[str, int] | None = None
    batch_size: int = 0
    eval_batch_size: int = 0
    accumulate: int = 0
    remat: str = ""
    compile: bool = True
    evaluation: bool = False
    text: str = ""
    survey: tuple[Mapping[str, int], ...] = ()
    calibrate: bool = True


@dataclasses.dataclass(frozen=True)
class Zeros:
    """One record of zeros, which holds shapes only."""

    shapes: Mapping[str, tuple[tuple[int, ...], str]]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        import numpy as np

        return {name: np.broadcast_to(np.zeros((), dtype), shape) for name, (shape, dtype) in self.shapes.items()}


def loaded(name: str, *, smoke: bool = False) -> Any:
    """Return the config of a file, or one for a variant that `jaxlayers.list_models` names.

    `convnext_tiny:384` is the variant at maps of 384 along each spatial axis. A variant is planned in bfloat16, with
    AdamW and a record for each device; `--batch-per-chip` and `--set` change that. It classifies if it returns a score
    for each of its classes; else the mean square of all that it returns is made small.

    Raises:
      ValueError: if there is neither, or the variant takes no map whose size could be set.
    """
    from train import config as configs

    if Path(name).suffix == ".py" or os.sep in name:
        return configs.load(name, smoke=smoke)
    import jax

    import jaxlayers
    from train import tasks

    name, _, side = name.partition(":")
    model, inputs = jaxlayers.create_model(name), jaxlayers.abstract_inputs(name)
    if side:
        first, *others = inputs
        if not side.isdecimal() or not int(side) or first.ndim < 4:
            raise ValueError(
                f"{name}:{side} must name a positive size of the map that the variant takes, {first.shape}; leave it "
                "away or set it"
            )
        sides = (int(side),) * (first.ndim - 2)
        inputs = (jax.ShapeDtypeStruct((first.shape[0], *sides, first.shape[-1]), first.dtype), *others)
    classes: Any = getattr(model, "num_classes", None)
    found = jax.eval_shape(lambda *given: model.init_with_output(jax.random.key(0), *given)[0], *inputs)
    if hasattr(model, "dtype"):
        model = model.clone(dtype="bfloat16")
    fields = [f"input_{place}" for place in range(len(inputs))]
    # A memory that all examples share has another length; here it is a part of each record all the same.
    shared = [x.shape[:1] != inputs[0].shape[:1] for x in inputs]
    shapes = {
        field: (x.shape if alike else x.shape[1:], x.dtype.name)
        for field, x, alike in zip(fields, inputs, shared, strict=True)
    }

    def given(batch: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(batch[field][0] if alike else batch[field] for field, alike in zip(fields, shared, strict=True))

    scores = isinstance(found, jax.ShapeDtypeStruct) and found.shape == (inputs[0].shape[0], classes)
    if scores and not any(shared):
        shapes["label"] = ((), "int32")
        task = tasks.classification(classes, inputs=fields)
    else:
        task = _least_squares(given)
    return configs.Config(model, task, Zeros(shapes), Zeros(shapes), steps=1000, batch_size=1, title=name)


def _least_squares(given: Any) -> Any:
    """Return the task of making small what a model returns; `given` picks its inputs from a batch."""
    import jax
    import jax.numpy as jnp

    from train import config as configs

    def squares(apply: Any, batch: Mapping[str, Any]) -> Any:
        leaves = [leaf for leaf in jax.tree.leaves(apply(*given(batch))) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        total = sum(jnp.mean(jnp.square(jnp.abs(leaf).astype(jnp.float32))) for leaf in leaves)
        return jnp.broadcast_to(total, batch["input_0"].shape[:1])

    return configs.Task(
        inputs=given,
        loss=lambda apply, batch, key: (squares(apply, batch), {}),
        evaluate=lambda apply, batch: configs.Evaluated({"loss": squares(apply, batch)}),
    )


def resolved(job: Job) -> Any:
    """Return the config that a job means.

    Raises:
      ValueError: as `train.config.load` and `override`.
    """
    from tools import chips
    from train import config as configs

    config = configs.override(loaded(job.config, smoke=job.smoke), job.overrides)
    place = chips.topology(job.topology)
    changes: dict[str, Any] = {}
    sizes: dict[str, Any] = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, **(job.mesh or {})}
    if job.mesh is None:
        # A config's mesh is for its own machine: where it does not fit this one, all devices divide the batch.
        own = {name: getattr(config.mesh, name) for name in sizes}
        try:
            sizes = dict(filled(own, place.devices))
        except ValueError:
            sizes["data"] = -1
    changes["mesh"] = dataclasses.replace(config.mesh, slices=1, **sizes)
    if job.batch_size:
        changes["batch_size"] = job.batch_size
        # What the config says of evaluation is for its own batch.
        changes["eval_batch_size"] = job.eval_batch_size or None
    if job.eval_batch_size:
        changes["eval_batch_size"] = job.eval_batch_size
    tested, whole = changes.get("eval_batch_size", config.eval_batch_size), filled(sizes, place.devices)
    rows = whole["data"] * whole["fsdp"]
    if tested and tested % rows:
        # An evaluation pads its last batch, so that a size for another machine may be rounded up.
        changes["eval_batch_size"] = -(-tested // rows) * rows
    if job.accumulate:
        changes["accumulate"] = job.accumulate
    if job.remat:
        changes["remat"] = job.remat
    return dataclasses.replace(config, **changes)


def example(config: Any, job: Job, *, evaluation: bool = False) -> tuple[dict[str, Any], str]:
    """Return shapes of a global batch, and where they are from.

    One record is read and transformed. Where the data is not on this machine, it is a record of the config's small form
    that the real transforms are applied to.
    """
    import jax

    from train import data

    def first(given: Any, transforms: Any) -> Mapping[str, Any]:
        if evaluation:
            rows = data.evaluation_batches(
                given.test_data, batch_size=1, transform=transforms.test_transform, on_corrupt=config.on_corrupt
            )
        else:
            rows = data.batches(
                given.train_data,
                batch_size=1,
                seed=config.seed,
                transform=transforms.train_transform,
                on_corrupt=config.on_corrupt,
            )
        with contextlib.closing(rows):  # type: ignore[type-var]
            return next(rows)

    size = (config.eval_batch_size or config.batch_size) if evaluation else config.batch_size
    try:
        rows, origin = first(config, config), "a record of its data"
    except (OSError, ImportError) as error:
        small = loaded(job.config, smoke=True)
        rows = first(small, config)
        origin = f"a record of its small form, by the real transforms ({type(error).__name__} at the real data)"
    one = {name: jax.numpy.asarray(value) for name, value in rows.items()}  # the dtypes that JAX makes of them
    return {name: jax.ShapeDtypeStruct((size, *value.shape[1:]), value.dtype) for name, value in one.items()}, origin


def abstract_mesh(config: Any, devices: int) -> Any:
    """Return the mesh of a config over so many devices that need not exist: enough for shapes and shardings.

    Raises:
      ValueError: if the sizes do not fit.
    """
    from jax.sharding import AbstractMesh, AxisType

    from train import mesh as meshes

    sizes = {name: getattr(config.mesh, name) for name in meshes.AXES}
    sizes = filled(sizes, devices)
    return AbstractMesh(tuple(sizes.values()), meshes.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def filled(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Return sizes with the -1 replaced by what is left.

    Raises:
      ValueError: if their product is not the number of devices.
    """
    fixed = 1
    for size in sizes.values():
        fixed *= size if size != -1 else 1
    rest = [name for name, size in sizes.items() if size == -1]
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if len(rest) > 1 or devices % fixed or (not rest and fixed != devices):
        raise ValueError(
            f"mesh {given} must multiply to the {devices} devices of the topology; set --mesh to sizes that do, or one "
            "of them to -1"
        )
    return {name: devices // fixed if size == -1 else size for name, size in sizes.items()}


def answer(job: Job) -> dict[str, Any]:
    """Return what compiling (or counting) a job gives."""
    from tools import chips, plan_count

    place = chips.topology(job.topology)
    config = resolved(job)
    batch, origin = example(config, job)
    mesh = abstract_mesh(config, place.devices)
    found: dict[str, Any] = {
        "title": config.title,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "remat": config.remat,
        "records": origin,
        "devices": place.devices,
        "mesh": dict(mesh.shape),
        "versions": versions(),
    }
    if job.survey:
        return found | {"survey": plan_count.survey(config, batch, [dict(mesh) for mesh in job.survey])}
    found["count"] = plan_count.count(config, mesh, batch)
    if not job.compile:
        return found
    devices = devices_of(place)
    if place.chip.is_tpu and job.calibrate:
        found["calibration"] = calibration(devices[0])
    found["train"] = compiled_train(config, devices, batch, place, job.text)
    if job.evaluation and config.test_data is not None and "refused" not in found["train"]:
        rows, _ = example(config, job, evaluation=True)
        found["evaluation"] = compiled_evaluation(config, devices, rows, place)
        found["evaluation"]["batch_size"] = config.eval_batch_size or config.batch_size
    return found


def versions() -> dict[str, str]:
    """Return the versions of what compiles."""
    from importlib import metadata

    found = {}
    for name in ("jax", "libtpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def devices_of(place: Any) -> Sequence[Any]:
    """Return the devices of a topology: described by libtpu, or virtual ones of the CPU that stand for GPUs.

    Raises:
      ValueError: if libtpu does not know the slice.
    """
    import jax

    if not place.chip.is_tpu:
        return jax.devices("cpu")[: place.devices]
    from jax.experimental import topologies

    # Both cores of a v4 work as one device, as they do by default on the machine.
    keywords: dict[str, Any] = {"chip_config_name": "megacore"} if place.chip.name == "v4" else {}
    if place.chips == 1:
        keywords["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=place.name, **keywords).devices
    except Exception as error:  # what libtpu raises differs from version to version
        from tools import chips

        raise ValueError(
            f"--topology {place.name!r} must be a slice that libtpu knows, which says: {error}; known are\n"
            f"{chips.known(place.chip.name)}"
        ) from error


def calibration(device: Any, size: int = 8192) -> dict[str, float]:
    """Return the compiler's estimate for a large bfloat16 product, and the bytes of HBM that it lets a program have.

    The second is read from its refusal of a program that is too large.
    """
    import jax
    import jax.numpy as jnp

    from tools import plan_read

    place = jax.sharding.SingleDeviceSharding(device)

    def compiled(function: Any, length: int) -> Any:
        operand = jax.ShapeDtypeStruct((length, length), jnp.bfloat16)
        return jax.jit(function, in_shardings=place, out_shardings=place).lower(operand, operand).compile()

    mesh = jax.sharding.AbstractMesh((1,), ("data",))
    cycles = plan_read.reading(compiled(jnp.matmul, size).as_text(), mesh).cycles
    found = {"product": float(size), "cycles": float(cycles)}
    try:
        compiled(lambda a, b: (a @ b) @ (b @ a), 2**19)
    except jax.errors.JaxRuntimeError as error:
        found |= {"available": (plan_read.out_of_memory(str(error)) or {}).get("available", 0.0)}
    return found


def compiled_train(config: Any, devices: Sequence[Any], batch: Any, place: Any, text: str = "") -> dict[str, Any]:
    """Return what the compiler says of the training step."""
    from train import mesh as meshes
    from train import program
    from train import step as steps

    mesh = meshes.build(config.mesh, devices)
    program.check_sizes(config, mesh)
    built = program.build(config, mesh, batch)
    rows = steps.abstract(batch, meshes.batch_shardings(batch, mesh))
    return described(
        lambda: steps.compile_step(
            built.train_step, built.abstract, rows, mesh, sequence_parallel=config.mesh.sequence_parallel
        ),
        mesh,
        place,
        text,
    )


def compiled_evaluation(config: Any, devices: Sequence[Any], batch: Any, place: Any) -> dict[str, Any]:
    """Return what the compiler says of the evaluation step."""
    from jaxlayers.summary import count_macs
    from train import evaluate, program
    from train import mesh as meshes
    from train import step as steps

    mesh = meshes.build(config.mesh, devices)
    fields = {name: leaf for name, leaf in batch.items() if name != evaluate.WEIGHT}
    state = program.build(config, mesh, fields).abstract
    step = evaluate.evaluation_step(config.model, config.task, config.kernels)
    rows = steps.abstract(batch, meshes.batch_shardings(batch, mesh))

    def compile_it() -> Any:
        jitted = evaluate.jit_evaluation(step, state.evaluated, state.collections, mesh)
        with meshes.use(mesh):
            return jitted.lower(state.evaluated, state.collections, rows).compile()

    found = described(compile_it, mesh, place)
    with meshes.use(mesh):
        found["model_flops"] = 2 * count_macs(step, state.evaluated, state.collections, batch)
    return found


def described(compile_it: Any, mesh: Any, place: Any, text: str = "") -> dict[str, Any]:
    """Return memory, costs and reading of what a function compiles, or why the compiler refused."""
    import jax

    from jaxlayers.kernels import dispatch
    from tools import plan_kernels, plan_read

    began = time.perf_counter()
    try:
        # The kernels of what is compiled for, which is not here.
        with dispatch.use("jnp", platform="tpu" if place.chip.is_tpu else "gpu"):
            program = compile_it()
    except jax.errors.JaxRuntimeError as error:
        short = plan_read.out_of_memory(str(error))
        if short is None:
            raise
        return {
            "refused": str(error)[:2000],
            **short,
            "compile_seconds": time.perf_counter() - began,
        }
    took = time.perf_counter() - began
    hlo = program.as_text()
    if text:
        with gzip.open(text, "wt") as file:
            file.write(hlo)
    hlo, kernels = plan_kernels.weighed(hlo, place) if place.chip.is_tpu else (hlo, [])
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    costs = cost[0] if isinstance(cost, list) else cost
    sizes = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in sizes},
        "compiler_flops": costs.get("flops", 0.0),
        "compiler_bytes": costs.get("bytes accessed", 0.0),
        "reading": plain(plan_read.reading(hlo, mesh, clock=place.chip.clock, ring=place.ring)),
        "kernels": kernels,
        "compile_seconds": took,
    }


def plain(reading: Any) -> dict[str, Any]:
    """Return a reading as what JSON holds: mappings by tuples become lists."""
    found = dataclasses.asdict(reading)
    found["by_module"] = [
        {"module": module, "backward": backward, "cycles": cycles}
        for (module, backward), cycles in reading.by_module.items()
    ]
    return found


def answers(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Yield an answer for each job; what is wrong with one is its answer."""
    for job in jobs:
        try:
            yield answer(job)
        except (ValueError, FileNotFoundError) as error:
            yield {"error": str(error)}
        except Exception as error:  # the other jobs go on
            traceback.print_exc()
            yield {"error": f"{type(error).__name__}: {error}"[:2000], "unexpected": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the jobs of a file, a line each, flushed one by one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("jobs", type=Path)
    parser.add_argument("answers", type=Path)
    given = parser.parse_args(arguments)
    jobs = [Job(**json.loads(line)) for line in given.jobs.read_text().splitlines()]
    with given.answers.open("a") as file:
        for found in answers(jobs):
            file.write(json.dumps(found) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
