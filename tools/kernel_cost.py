"""Compare the Pallas kernels for windows with what XLA makes of the same block, by the TPU compiler's own estimates.

    python -m tools.kernel_cost --python .venv-tpu/bin/python

For each size the forward and backward pass of a `SwinBlock` on eight maps in bfloat16 is compiled for one chip: once as
XLA has it, once with the kernels. Of what XLA compiles the cycles are its estimates; of a kernel, whose inside they
leave out, the instruction bundles that the compiler has scheduled for a block, times the blocks, or what reading and
writing them takes from main memory if that is more. A bundle takes a cycle if nothing stalls, so a kernel's figure is a
lower bound. Writes the table of docs/decisions/window_kernel.md to standard output.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.plan_compile import ENVIRONMENT

IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Size:
    """One row.

    Attributes:
      side: of the map.
      features: of the map.
      heads: number of heads.
      window: side of a window.
      shifted: windows are shifted by half their side.
    """

    side: int
    features: int
    heads: int
    window: int = 7
    shifted: bool = False

    @property
    def shift(self) -> int:
        """The shift, along both axes."""
        return self.window // 2 if self.shifted else 0


# The stages of Swin-T at 224 pixels, the first of Swin V2 at 256, and windows of 12.
SIZES = (
    Size(56, 96, 3),
    Size(56, 96, 3, shifted=True),
    Size(28, 192, 6, shifted=True),
    Size(14, 384, 12, shifted=True),
    Size(64, 96, 3, window=8, shifted=True),
    Size(48, 128, 4, window=12, shifted=True),
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


def block_cycles(size: Size, chip: str) -> dict[str, Any]:
    """Return the cycles of what XLA compiles of a block's forward and backward pass, by choice of kernels."""
    import jax
    import jax.numpy as jnp

    from jaxlayers.kernels import dispatch
    from jaxlayers.window import SwinBlock
    from tools import plan_read

    block = SwinBlock(size.heads, size.window, size.shift, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((IMAGES, size.side, size.side, size.features), jnp.bfloat16)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)

    def loss(variables: Any, x: Any) -> Any:
        out: Any = block.apply(variables, x)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    found: dict[str, Any] = {}
    for choice in ("jnp", "pallas"):
        with dispatch.use(choice, platform="tpu"):
            lowered = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=_place(chip)).lower(variables, x)
        text: Any = lowered.compile().as_text()
        found[choice] = plan_read.reading(text, jax.sharding.AbstractMesh((1,), ("data",))).cycles
    return found


def kernel_cycles(size: Size, chip: str, dump: Path) -> dict[str, Any]:
    """Return the cycles of a block's kernels, from the schedules that libtpu dumps in that folder."""
    import jax
    import jax.numpy as jnp

    from jaxlayers.kernels import pallas_cut, pallas_window
    from tools import chips

    rows, tokens = size.side // size.window, size.window**2
    whole = jax.ShapeDtypeStruct((IMAGES, size.side, size.side, size.features), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((IMAGES, rows**2, tokens, size.features), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((size.heads, tokens, tokens), jnp.float32)
    shifts = jax.ShapeDtypeStruct((3, size.features), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((rows**2, tokens, tokens), jnp.bool_) if size.shifted else None
    window, amount = (size.window,) * 2, (size.shift,) * 2

    def attend(x: Any, bias: Any, shifts: Any, mask: Any) -> Any:
        out, back = jax.vjp(lambda *y: pallas_window.window_attention(*y[:4], mask, shifts=y[4]), x, x, x, bias, shifts)
        return back(out)

    jobs: list[tuple[Any, ...]] = [
        (attend, x, bias, shifts, mask),
        (lambda x: pallas_cut.cut(x, window, amount), whole),
        (lambda x: pallas_cut.join(x, (size.side,) * 2, window, amount), x),
    ]
    for job, *operands in jobs:
        jax.jit(job, in_shardings=_place(chip)).lower(*operands).compile()
    flat = jax.ShapeDtypeStruct((IMAGES * rows**2, tokens, size.features), jnp.bfloat16)
    blocks = math.prod(pallas_window._Layout.of(flat, bias, None, mask).grid)
    # A row of windows is read and written in tiles of 16 x 128, shifted ones are read with the next row.
    row_bytes = size.window * -(-size.side // 16) * 16 * -(-size.features // 128) * 128 * 2
    place = chips.topology(f"{chip}:2x2")
    floor = (2 + size.shifted) * row_bytes * place.chip.clock / place.bandwidth
    total = 0.0
    for path in dump.glob("*schedule-analysis_final_bundles.txt"):
        if "window_attention" in path.name:
            total += blocks * bundles(path.read_text())
        elif "_windows" in path.name:
            # Maps are cut before the attention and in the gradient of joining, and joined as often.
            total += 2 * IMAGES * rows * max(floor, bundles(path.read_text()))
    return {"kernels": int(total)}


def _place(chip: str) -> Any:
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    return SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices[0])


def measured(size: Size, chip: str, python: str) -> dict[str, Any]:
    """Return what both functions above do, each in a process of its own that has libtpu."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        # All of a block's schedules would fill gigabytes: those of the kernels alone are dumped.
        for dump, flags in (("", ""), (folder, f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true")):
            order = [python, "-m", "tools.kernel_cost", "--one", json.dumps(dataclasses.asdict(size)), "--dump", dump]
            done = subprocess.run(
                [*order, "--chip", chip],
                env={**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags},
                capture_output=True,
                text=True,
                check=False,
                cwd=Path(__file__).parents[1],
            )
            if done.returncode:
                raise RuntimeError(f"compiling {size} for {chip} failed: {done.stderr[-1000:]}")
            found |= json.loads(done.stdout.splitlines()[-1])
    return found


def row(size: Size, found: dict[str, Any]) -> str:
    """Return a row of the table."""
    whole = found["pallas"] + found["kernels"]
    shifted = " (shifted)" if size.shifted else ""
    return (
        f"| {size.side} x {size.side} x {size.features} | {size.heads} | {size.window}{shifted} | {found['jnp']:,} "
        f"| {found['pallas']:,} | {found['kernels']:,} | {found['jnp'] / whole:.2f} |"
    )


HEAD = """| map | heads | window | XLA alone | XLA beside the kernels | kernels | ratio |
| --- | --- | --- | --- | --- | --- | --- |"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_cost", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has libtpu")
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dump", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        size = Size(**json.loads(options.one))
        dump = Path(options.dump) if options.dump else None
        print(json.dumps(kernel_cycles(size, options.chip, dump) if dump else block_cycles(size, options.chip)))
        return
    print(HEAD, flush=True)
    for size in SIZES:
        print(row(size, measured(size, options.chip, options.python)), flush=True)


if __name__ == "__main__":
    main()
