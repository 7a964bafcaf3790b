"""Compare the Pallas kernels for windows with what XLA makes of the same layer, by the TPU compiler's own estimates.

    python -m tools.kernel_cost --python .venv-tpu/bin/python

For each size the forward and backward pass of a `WindowAttention` of 512 windows in bfloat16, projections included, is
compiled for one chip: once as XLA has it, once with the kernels. Of what XLA compiles the cycles are its estimates; of
a kernel, whose inside they leave out, the instruction bundles that the compiler has scheduled for a block, times the
blocks. A bundle takes a cycle if nothing stalls, so a kernel's figure is a lower bound. Writes the table of
docs/decisions/window_kernel.md to standard output.
"""

import argparse
import contextlib
import dataclasses
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

WINDOWS, MASKS = 512, 64


@dataclasses.dataclass(frozen=True)
class Size:
    """One row.

    Attributes:
      tokens: of a window.
      heads: number of heads.
      features: of all heads.
      masked: windows are shifted.
    """

    tokens: int
    heads: int
    features: int
    masked: bool = False


SIZES = (
    Size(49, 3, 96),
    Size(49, 3, 96, masked=True),
    Size(49, 6, 192),
    Size(49, 12, 384),
    Size(49, 24, 768),
    Size(64, 3, 96),
    Size(64, 12, 384),
    Size(144, 4, 128),
    Size(16, 4, 128),
    Size(9, 4, 64),
)


def bundles(text: str) -> int:
    """Return the instruction bundles of a schedule's analysis.

    Raises:
      ValueError: if the text is none.
    """
    found = re.search(r"total scheduled bundles:\s*(\d+)", text)
    if not found:
        raise ValueError("a schedule's analysis must say how many bundles it has; let libtpu dump its schedules")
    return int(found[1])


def compiled(size: Size, chip: str, dump: Path) -> dict[str, Any]:
    """Return the cycles of both programs, and of the kernels in one of them; where libtpu dumps its schedules there."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from jaxlayers.kernels import dispatch, pallas_window
    from jaxlayers.window import WindowAttention
    from tools import plan_read

    place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices[0])
    side = round(size.tokens**0.5)
    layer = WindowAttention(size.heads, (side, side), dtype=jnp.bfloat16)
    shape = (WINDOWS // MASKS, MASKS, size.tokens, size.features)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((MASKS, size.tokens, size.tokens), jnp.bool_) if size.masked else None
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def loss(variables: Any, x: Any, mask: Any) -> Any:
        out: Any = layer.apply(variables, x, mask)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    found: dict[str, Any] = {}
    for choice in ("jnp", "pallas"):
        with dispatch.use(choice, platform="tpu"):
            lowered = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=place).lower(variables, x, mask)
        text: Any = lowered.compile().as_text()
        reading = plan_read.reading(text, jax.sharding.AbstractMesh((1,), ("data",)))
        found[choice] = reading.cycles
    flat = jax.ShapeDtypeStruct((WINDOWS, *shape[2:]), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((size.heads, size.tokens, size.tokens), jnp.float32)
    heads, blocks = pallas_window._Layout.of(flat, bias, None, mask).grid
    schedules = dump.glob("*window_attention*schedule-analysis_final_bundles.txt")
    found["kernels"] = heads * blocks * sum(bundles(path.read_text()) for path in schedules)
    return found


def measured(size: Size, chip: str, python: str) -> dict[str, Any]:
    """Return what `compiled` does, in a process of its own that has libtpu."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        order = [python, "-m", "tools.kernel_cost", "--one", json.dumps(dataclasses.asdict(size))]
        done = subprocess.run(
            [*order, "--chip", chip, "--dump", folder],
            env={**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[1],
        )
    if done.returncode:
        raise RuntimeError(f"compiling {size} for {chip} failed: {done.stderr[-1000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(size: Size, found: dict[str, Any]) -> str:
    """Return a row of the table."""
    whole = found["pallas"] + found["kernels"]
    shifted = " (shifted)" if size.masked else ""
    return (
        f"| {size.tokens}{shifted} | {size.heads} | {size.features} | {found['jnp']:,} | {found['pallas']:,} "
        f"| {found['kernels']:,} | {found['jnp'] / whole:.2f} |"
    )


HEAD = """| tokens | heads | features | XLA alone | XLA beside the kernels | kernels | ratio |
| --- | --- | --- | --- | --- | --- | --- |"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_cost", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has libtpu")
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dump", type=Path, default=Path(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(compiled(Size(**json.loads(options.one)), options.chip, options.dump)))
        return
    print(HEAD, flush=True)
    for size in SIZES:
        with contextlib.suppress(BrokenPipeError):
            print(row(size, measured(size, options.chip, options.python)), flush=True)


if __name__ == "__main__":
    main()
