"""Compare the Pallas kernels for SE(3)-equivariant edges with what XLA makes of the same layer, by the TPU compiler.

    python -m tools.edge_kernel_cost --python .venv-tpu/bin/python

For each size the gradient of a `TensorFieldConv` or an `SE3Attention` in float32, with respect to parameters, features
and positions, is compiled for one chip: once as XLA has it, once with the kernels. Of what XLA compiles the cycles are
its estimates; of a kernel, whose inside they leave out, the instruction bundles that the compiler has scheduled for a
block of edges, loops counted by their turns, times the blocks, or what reading and writing them takes from main memory
if that is more. A bundle takes a cycle if nothing stalls, so a kernel's figure is a lower bound. Writes the table of
docs/decisions/edge_kernel.md to standard output.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


PARTS = ("jnp", "pallas", "kernels")
"""What is compiled of a size: a layer by either choice, and the kernels alone."""

SIZES = (
    Size(512, 16, 20, 1),
    Size(512, 16, 32, 2),
    Size(64, 63, 20, 1),
    Size(512, 16, 20, 1, bottleneck=1),
    Size(512, 16, 16, 2, bottleneck=4),
)


def scheduled(text: str) -> int:
    """Return the bundles that one step of a kernel's grid runs through, from the text of its final bundles.

    A bundle is marked by as many `>` as there are loops around it, the outermost of which is the grid; bundles of a
    loop that hold instructions of the code behind it too have fewer, up to the branch at its end.

    Raises:
      ValueError: if there is no bundle, or a loop inside of the grid's has no turns that are known.
    """
    # From the name of a predicate to the turns of the loop that it ends.
    turns = {
        found[1]: int(found[2])
        for found in re.finditer(r"%(p\d+)_p\d+ = scmp\.ge\.s32\.totalorder [^,]*, (\d+) /\* loop exit test", text)
    }
    total = bundles = 0
    # Of the loop that is open: how deep it lies, its bundles, its turns once its end is seen.
    loop: tuple[int, int, int | None] | None = None
    for found in re.finditer(r"^ *(?:0x[0-9a-f]+|0)\s+(LB)?[A-Z]*:?\s*:? (>*)(.*)$", text, re.MULTILINE):
        begins, depth = bool(found[1]), len(found[2])
        bundles += 1
        if loop and loop[2] and (begins or depth < loop[0]):
            total, loop = total + loop[1] * loop[2], None
        if begins and depth > 1:
            if loop:
                raise ValueError(
                    f"a loop of {loop[1]} bundles must say how often it turns; write it without a loop in it"
                )
            loop = (depth, 0, None)
        if not loop:
            total += 1
            continue
        end = re.search(r"sbr\.rel \(!%(p\d+)_p\d+\)", found[3])
        loop = loop[0], loop[1] + 1, turns.get(end[1]) if end and not loop[2] else loop[2]
    if loop or not bundles:
        raise ValueError(f"final bundles must be lines that begin with an address, and their loops end; got {bundles}")
    return total


def layer_cost(size: Size, choice: str, chip: str) -> dict[str, Any]:
    """Return cycles and temporary bytes of what XLA compiles of a layer's gradient under that choice of kernels."""
    import jax
    import jax.numpy as jnp

    from jaxlayers.equivariant.fibers import edges_of
    from jaxlayers.equivariant.se3_transformer import SE3Attention
    from jaxlayers.equivariant.tensor_field import TensorFieldConv
    from jaxlayers.kernels import dispatch
    from jaxlayers.ops.neighbours import Neighbours
    from tools import plan_read

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
    with dispatch.use(choice, platform="tpu"):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=_place(chip))
        lowered = step.lower(params, nodes, positions, neighbours)
    compiled: Any = lowered.compile()
    reading = plan_read.reading(compiled.as_text(), jax.sharding.AbstractMesh((1,), ("data",)))
    return {choice: reading.cycles, f"{choice}_memory": compiled.memory_analysis().temp_size_in_bytes}


def kernel_cycles(size: Size, chip: str, dump: Path) -> dict[str, Any]:
    """Return the cycles of a layer's kernels, from the schedules that libtpu dumps in that folder."""
    import jax
    import jax.numpy as jnp

    from jaxlayers.kernels import pallas_edges
    from tools import chips

    edges = size.points * size.neighbours
    pairs = [(k, degree) for k in size.degrees for degree in size.degrees]
    channels = dict.fromkeys(size.degrees, size.channels)
    features = dict.fromkeys(size.degrees, size.channels // (size.bottleneck or 1))
    layout = pallas_edges._Layout.of(pairs, channels, features, HIDDEN)

    def of(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    outputs = sum(pair.outputs for pair in layout.pairs)
    operands: tuple[Any, ...] = (
        of(edges, len(pairs), HIDDEN),
        of(HIDDEN, outputs),
        of(outputs),
        {(k, degree): of(edges, 2 * min(k, degree) + 1, 2 * degree + 1, 2 * k + 1) for k, degree in pairs},
        {k: of(edges, size.channels, 2 * k + 1) for k in size.degrees},
    )

    def both(*operands: Any) -> Any:
        out, back = jax.vjp(functools.partial(pallas_edges.edge_messages, features=features), *operands)
        return back(out)

    jax.jit(both, in_shardings=_place(chip)).lower(*operands).compile()
    place = chips.topology(f"{chip}:2x2")
    hidden, basis, sources, messages = layout.widths
    # Rows of 128 edges that a block reads and writes.
    rows = {"edge_messages": hidden + basis + sources + messages}
    rows["edge_messages_backward"] = rows["edge_messages"] + hidden + basis + sources
    total = 0.0
    for path in dump.glob("*final_bundles.txt"):
        found = re.search(r"-(edge_messages(?:_backward)?)\.\d+-\d+-final", path.name)
        if found:
            floor = 4 * 128 * rows[found[1]] * place.chip.clock / place.bandwidth
            total += -(-edges // 128) * max(floor, scheduled(path.read_text()))
    # Keys and values have a kernel each.
    return {"kernels": int(total) * (2 if size.bottleneck else 1)}


HIDDEN = 32
"""Width of the radial perceptrons of both layers."""


def _place(chip: str) -> Any:
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    return SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices[0])


def measured(size: Size, chip: str, python: str) -> dict[str, Any]:
    """Return what `layer_cost` and `kernel_cycles` do, from processes of their own that have libtpu."""
    found: dict[str, Any] = {}
    for part in PARTS:
        found |= _run(size, part, chip, python)
    return found


def _run(size: Size, part: str, chip: str, python: str) -> dict[str, Any]:
    order = [python, "-m", "tools.edge_kernel_cost", "--one", json.dumps(dataclasses.asdict(size)), "--part", part]
    with tempfile.TemporaryDirectory() as dump:
        # All of a layer's schedules would fill gigabytes: those of the kernels alone are dumped.
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true" if part == "kernels" else ""
        done = subprocess.run(
            [*order, "--dump", dump, "--chip", chip],
            env={**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[1],
        )
    if done.returncode:
        raise RuntimeError(f"compiling {size} for {chip} failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(size: Size, found: dict[str, Any]) -> str:
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
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dump", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        size = Size(**json.loads(options.one))
        if options.part == "kernels":
            print(json.dumps(kernel_cycles(size, options.chip, Path(options.dump))))
        else:
            print(json.dumps(layer_cost(size, options.part, options.chip)))
        return
    print(HEAD, flush=True)
    for size in SIZES:
        print(row(size, measured(size, options.chip, options.python)), flush=True)


if __name__ == "__main__":
    main()
