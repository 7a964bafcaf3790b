"""Measure retrieval from a large memory: peak of the process, bytes of a device, and time beside the plain form.

Command:  python -m tools.bench_memory [--patterns 1000000] [--features 64] [--states 64] [--topology v5e:4x8]

Every line is a process of its own, so that its peak is its own. The queries are stored patterns with noise, so that
what comes back can be told right from wrong. Where libtpu is installed (`make test-tpu` makes such an environment,
`.venv-tpu`) `--topology v5e:4x8` adds what the compiler says of a device of that slice. Times are for comparison within
one run.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.plan_compile import ENVIRONMENT

DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process measures.

    Attributes:
      name: in words.
      streamed: whether patterns are looked at in chunks.
      gradient: the gradient of states and patterns too, of one update.
      devices: devices that the patterns are split over.
    """

    name: str
    streamed: bool
    gradient: bool = False
    devices: int = 1


RUNS = {
    "streamed": Run("streamed", True),
    "plain": Run("plain form", False),
    "streamed-gradient": Run("streamed, with gradient", True, gradient=True),
    "plain-gradient": Run("plain form, with gradient", False, gradient=True),
    "sharded": Run(f"streamed over {DEVICES} devices", True, devices=DEVICES),
    "sharded-gradient": Run(f"streamed over {DEVICES} devices, with gradient", True, gradient=True, devices=DEVICES),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """The problem.

    Attributes:
      patterns: stored patterns.
      features: their width.
      states: queries at once.
      chunk_size: patterns that a device looks at together.
    """

    patterns: int
    features: int
    states: int
    chunk_size: int


def retrieval(size: Size, run: Run, axis: tuple[str, ...]) -> Callable[..., Any]:
    """Return the function of states and patterns that is measured."""
    import jax
    import jax.numpy as jnp

    from jaxlayers.hopfield.hopfield import retrieve, update
    from jaxlayers.hopfield.streaming import Streaming

    streaming = Streaming(size.chunk_size, axis) if run.streamed else None
    beta = 4.0 * size.features**0.5
    if not run.gradient:
        return lambda state, stored: retrieve(state, stored, beta=beta, update_steps=3, streaming=streaming).state

    def total(state: Any, stored: Any) -> Any:
        found = update(state, stored, beta=beta, streaming=streaming)
        return jnp.sum(found**2), found

    return lambda state, stored: jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(state, stored)


def compiled(size: Size, run: Run, devices: Sequence[Any]) -> Any:
    """Return the program for those devices, the patterns split over all of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("memory",), axis_types=(AxisType.Auto,))
    axis = ("memory",) if len(devices) > 1 else ()
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(axis))
    out = ((whole, whole), (whole, split)) if run.gradient else whole
    shapes = ((size.states, size.features), (size.patterns, size.features))
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    function = jax.jit(retrieval(size, run, axis), in_shardings=(whole, split), out_shardings=out)
    with jax.set_mesh(mesh):
        return function.lower(*operands).compile()


def measure(size: Size, run: Run) -> dict[str, float]:
    """Return what this process, which should do nothing else, needs for the run."""
    import jax
    import numpy as np

    program = compiled(size, run, jax.devices()[: run.devices])
    places = program.input_shardings[0]
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((size.patterns, size.features), dtype=np.float32)
    stored /= np.linalg.norm(stored, axis=-1, keepdims=True)
    wanted = stored[:: max(1, size.patterns // size.states)][: size.states]
    state = wanted + 0.3 / size.features**0.5 * rng.standard_normal(wanted.shape, dtype=np.float32)
    operands = jax.device_put((state, stored), places)
    del stored
    jax.block_until_ready(program(*operands))
    start = time.perf_counter()
    found = jax.block_until_ready(program(*operands))
    seconds = time.perf_counter() - start
    values = np.asarray(found[0][1] if run.gradient else found)
    memory = program.memory_analysis()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "recalled": float(np.mean(np.linalg.norm(values - wanted, axis=-1) < 0.1)),
        "peak_bytes": float(peak if sys.platform == "darwin" else 1024 * peak),
        "device_operand_bytes": float(memory.argument_size_in_bytes),
        "device_spare_bytes": float(memory.temp_size_in_bytes),
        "seconds": seconds,
    }


def plan(size: Size, topology: str) -> dict[str, float]:
    """Return what the compiler says of one device of a TPU slice, for a memory as many times larger."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    size = dataclasses.replace(size, patterns=size.patterns // len(devices) * len(devices))
    program = compiled(size, RUNS["sharded-gradient"], devices)
    memory = program.memory_analysis()
    return {
        "devices": float(len(devices)),
        "patterns": float(size.patterns),
        "device_operand_bytes": float(memory.argument_size_in_bytes),
        "device_spare_bytes": float(memory.temp_size_in_bytes),
        "gathers": float(sum(program.as_text().count(name) for name in ("all-gather(", "all-gather-start("))),
    }


def in_a_process(name: str, size: Size, topology: str = "") -> dict[str, float]:
    """Return what a new process measures."""
    command = [sys.executable, "-m", "tools.bench_memory", "--run", name]
    for field in dataclasses.fields(size):
        command += ["--" + field.name.replace("_", "-"), str(getattr(size, field.name))]
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    if name in RUNS:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={RUNS[name].devices}"
    else:
        command += ["--topology", topology]
        environment |= ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(size: Size, found: dict[str, dict[str, float]]) -> str:
    """Return the runs as a Markdown table."""
    lines = [
        f"{size.patterns:,} patterns of {size.features} features ({4 * size.patterns * size.features / 2**20:,.0f} "
        f"MiB), {size.states} queries, chunks of {size.chunk_size:,}; three updates, or one with its gradient.",
        "",
        "| run | recalled | peak of the process | patterns and queries, a device | other memory, a device | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        mebibytes = (one[key] / 2**20 for key in ("peak_bytes", "device_operand_bytes", "device_spare_bytes"))
        cells = " | ".join(f"{value:,.1f} MiB" for value in mebibytes)
        lines.append(f"| {RUNS[name].name} | {one['recalled']:.3f} | {cells} | {one['seconds']:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--patterns", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=8192)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--topology", default="", help="also compile for this TPU slice, such as v5e:4x8")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    parser.add_argument("--run", choices=[*RUNS, "plan"], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    size = Size(given.patterns, given.features, given.states, given.chunk_size)
    if min(dataclasses.astuple(size)) < 1:
        parser.error(f"sizes must be positive; got {size}")
    if given.run:
        print(json.dumps(plan(size, given.topology) if given.run == "plan" else measure(size, RUNS[given.run])))
        return 0
    text = table(size, {name: in_a_process(name, size) for name in given.runs})
    if given.topology:
        larger = dataclasses.replace(size, patterns=128 * size.patterns)
        one = in_a_process("plan", larger, given.topology)
        text += (
            f"\n\nCompiled for {given.topology} ({one['devices']:.0f} chips): {one['patterns']:,.0f} patterns with "
            f"their gradient, {one['device_operand_bytes'] / 2**20:,.0f} MiB of operands and "
            f"{one['device_spare_bytes'] / 2**20:,.1f} MiB besides on a chip, {one['gathers']:.0f} all-gathers."
        )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
