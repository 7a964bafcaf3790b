"""Compare the Pallas kernels for SE(3)-equivariant edges with what XLA makes of the same layer, by the TPU compiler.

    python -m tools.edge_kernel_cost --python .venv-tpu/bin/python

For each size the gradient of a `TensorFieldConv` or an `SE3Attention` in float32, with respect to parameters, features
and positions, is compiled for one chip: once as XLA has it, once with the kernels. Of what XLA compiles the cycles are
its estimates, of the kernels those of their schedules (`tools.plan_kernels`). Writes the table of
docs/decisions/edge_kernel.md to standard output.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import chips, plan_kernels
from tools.plan_compile import ENVIRONMENT


@dataclasses.dataclass(frozen=True)
class Size:
    """One row.

    Attributes:
      points: of the cloud.
      neighbours: of each point.
      channels: of each degree, of input and output.
      max_degree: highest degree.
      bottleneck: of an `SE3Attention` of four heads, which makes keys and values of `channels // bottleneck` channels;
        0 = a `TensorFieldConv`.
    """

    points: int
    neighbours: int
    channels: int
    max_degree: int
    bottleneck: int = 0

    @property
    def degrees(self) -> range:
        """All degrees."""
        return range(self.max_degree + 1)


SIZES = (
    Size(512, 16, 20, 1),
    Size(512, 16, 32, 2),
    Size(64, 63, 20, 1),
    Size(512, 16, 20, 1, bottleneck=1),
    Size(512, 16, 16, 2, bottleneck=4),
)


def layer_cost(size: Size, chip: str) -> dict[str, int]:
    """Return cycles and temporary bytes of a layer's gradient.

    `jnp` are the cycles of XLA alone, `pallas` those of what it compiles beside the kernels, `kernels` those of the
    kernels; with `_memory` the bytes by choice of kernels.

    Raises:
      RuntimeError: if the compiler gives no schedule of a kernel.
    """
    import jax
    import jax.numpy as jnp

    from jaxlayers.equivariant.fibers import edges_of
    from jaxlayers.equivariant.se3_transformer import SE3Attention
    from jaxlayers.equivariant.tensor_field import TensorFieldConv
    from jaxlayers.kernels import dispatch
    from jaxlayers.ops.neighbours import Neighbours

    features = (size.channels,) * len(size.degrees)
    layer: Any = TensorFieldConv(features)
    if size.bottleneck:
        layer = SE3Attention(features, num_heads=4, bottleneck=size.bottleneck)
    nodes = {
        degree: jax.ShapeDtypeStruct((1, size.points, size.channels, 2 * degree + 1), jnp.float32)
        for degree in size.degrees
    }
    positions, lists = jax.ShapeDtypeStruct((1, size.points, 3), jnp.float32), (1, size.points, size.neighbours)
    neighbours: Any = (jax.ShapeDtypeStruct(lists, jnp.int32), jax.ShapeDtypeStruct(lists, jnp.bool_))
    neighbours = Neighbours(*neighbours)

    def init(nodes: Any, positions: Any, neighbours: Neighbours) -> Any:
        return layer.init(jax.random.key(0), nodes, edges_of(positions, neighbours))

    def loss(params: Any, nodes: Any, positions: Any, neighbours: Neighbours) -> Any:
        out = layer.apply(params, nodes, edges_of(positions, neighbours))
        return sum(jnp.sum(jnp.square(x)) for x in out.values())

    params = jax.eval_shape(init, nodes, positions, neighbours)
    place, gradient = chips.topology(f"{chip}:2x2"), jax.grad(loss, argnums=(0, 1, 2))
    found: dict[str, int] = {}
    for choice in ("jnp", "pallas"):
        with dispatch.use(choice, platform="tpu"):
            program = plan_kernels.compiled(gradient, params, nodes, positions, neighbours, place=place)
        reading = plan_kernels.reading_of(program, place)
        found["kernels"] = reading.by_kind.get("kernel", 0)
        found[choice] = reading.cycles - found["kernels"]
        found[f"{choice}_memory"] = program.memory_analysis().temp_size_in_bytes
    return found


def measured(size: Size, chip: str, python: str) -> dict[str, int]:
    """Return what `layer_cost` does, in a process that has libtpu.

    Raises:
      RuntimeError: if it fails, with what it said.
    """
    done = subprocess.run(
        [python, "-m", "tools.edge_kernel_cost", "--one", json.dumps(dataclasses.asdict(size)), "--chip", chip],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise RuntimeError(f"compiling {size} for {chip} failed: {done.stderr[-1000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(size: Size, found: dict[str, int]) -> str:
    """Return a row of the table."""
    whole = found["pallas"] + found["kernels"]
    memory = (f"{found[f'{choice}_memory'] / 2**20:,.1f} MiB" for choice in ("jnp", "pallas"))
    layer = f"attention, bottleneck {size.bottleneck}" if size.bottleneck else "convolution"
    return (
        f"| {layer} | {size.points} x {size.neighbours} | {size.channels} | 0 to {size.max_degree} "
        f"| {found['jnp']:,} | {found['pallas']:,} | {found['kernels']:,} "
        f"| {found['jnp'] / whole:.2f} | {' | '.join(memory)} |"
    )


HEAD = """| layer | points x neighbours | channels | degrees | XLA alone | XLA beside the kernels | kernels | ratio \
| temporaries, XLA alone | with the kernels |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.edge_kernel_cost", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has libtpu")
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(layer_cost(Size(**json.loads(options.one)), options.chip)))
        return
    print(HEAD, flush=True)
    for size in SIZES:
        print(row(size, measured(size, options.chip, options.python)), flush=True)


if __name__ == "__main__":
    main()
