"""Compare the Pallas kernels of a block with what XLA makes of the same block, by the TPU compiler's own estimates.

    python -m tools.kernel_cost --python .venv-tpu/bin/python [--feed-forward | --merging]

For each size the forward and backward pass of a `SwinBlock` or `SwinV2Block` on eight maps in bfloat16 is compiled for
one chip: once as XLA has it, once with the kernels. Of what XLA compiles the cycles are its estimates, of every kernel
in it they are those of its schedule (`tools.plan_kernels`). Writes the table of docs/decisions/window_kernel.md to
standard output, or, of a second half alone, that of docs/decisions/feed_forward_kernel.md, or, of the merging between
stages, that of docs/decisions/patch_convolution.md.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import chips, plan_kernels
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
      version: of the block, `SwinBlock` (1) or `SwinV2Block` (2).
    """

    side: int
    features: int
    heads: int
    window: int = 7
    shifted: bool = False
    version: int = 1

    @property
    def shift(self) -> int:
        """The shift, along both axes."""
        return self.window // 2 if self.shifted else 0

    def layer(self) -> Any:
        """Return the block."""
        import jax.numpy as jnp

        from jaxlayers.window import SwinBlock, SwinV2Block

        block = {1: SwinBlock, 2: SwinV2Block}[self.version]
        return block(self.heads, self.window, self.shift, dtype=jnp.bfloat16)


# Stages of Swin-T at 224 pixels, the first of a Swin at 256, the third of Swin-B, windows of 12, and the stages of Swin
# V2-T at 256 pixels with the third of Swin V2-B.
SIZES = (
    Size(56, 96, 3),
    Size(56, 96, 3, shifted=True),
    Size(28, 192, 6, shifted=True),
    Size(14, 384, 12, shifted=True),
    Size(64, 96, 3, window=8, shifted=True),
    Size(14, 512, 16, shifted=True),
    Size(48, 128, 4, window=12, shifted=True),
    Size(64, 96, 3, window=8, shifted=True, version=2),
    Size(32, 192, 6, window=8, shifted=True, version=2),
    Size(16, 384, 12, window=8, shifted=True, version=2),
    Size(16, 512, 16, window=8, shifted=True, version=2),
    Size(8, 768, 24, window=8, version=2),
)


@dataclasses.dataclass(frozen=True)
class Half:
    """One row of the second table: norm, MLP and residual sum.

    Attributes:
      side: of the map.
      features: of the map; the hidden layer has four times as many.
      norm_first: see `nn.feed_forward.add_feed_forward`.
    """

    side: int
    features: int
    norm_first: bool = True

    def layer(self) -> Any:
        """Return the module."""
        import flax.linen as nn
        import jax.numpy as jnp

        from jaxlayers.core import axes
        from jaxlayers.nn.drop_path import DropPath
        from jaxlayers.nn.feed_forward import FeedForward, add_feed_forward

        size = self
        norm = functools.partial(nn.LayerNorm, dtype=jnp.bfloat16)
        feed_forward = functools.partial(FeedForward, 4 * self.features, dtype=jnp.bfloat16)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                names = (axes.BATCH, axes.HEIGHT, axes.WIDTH)
                return add_feed_forward(x, norm, feed_forward, DropPath(), norm_first=size.norm_first, names=names)

        return Layer()


# The first stages of Swin-T, the first and the third of Swin-B, and the first stages of Swin V2-T at 256 pixels.
HALVES = (
    Half(56, 96),
    Half(28, 192),
    Half(14, 384),
    Half(56, 128),
    Half(14, 512),
    Half(64, 96, norm_first=False),
    Half(32, 192, norm_first=False),
    Half(16, 384, norm_first=False),
)


@dataclasses.dataclass(frozen=True)
class Merge:
    """One row of the third table: maps halved by `PatchMerging`.

    Attributes:
      side: of the map.
      features: of the map.
      images: number of maps.
    """

    side: int
    features: int
    images: int

    def layer(self) -> Any:
        """Return the module."""
        import jax.numpy as jnp

        from jaxlayers.window import PatchMerging

        return PatchMerging(dtype=jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Embed(Merge):
    """Another row of the third table: images whose patches of 4 x 4 are embedded and normed.

    The gradient is that of the parameters alone.
    """

    def layer(self) -> Any:
        """Return the module."""
        import jax.numpy as jnp

        from jaxlayers.nn.patch_embed import PatchEmbed
        from jaxlayers.window.swin import layer_norm

        return PatchEmbed(self.features, (4, 4), norm=layer_norm, dtype=jnp.bfloat16)


MERGES = tuple(
    Merge(side, features, images) for images in (8, 64) for side, features in ((56, 96), (28, 192), (14, 384))
) + tuple(Embed(224, features, images) for images in (8, 64) for features in (96, 128))


def block_cycles(size: Size | Half | Merge, chip: str) -> dict[str, int]:
    """Return the cycles of a block's forward and backward pass.

    `jnp` are those of XLA alone, `pallas` those of what it compiles beside the kernels, `kernels` those of the kernels.

    Raises:
      RuntimeError: if the compiler gives no schedule of a kernel.
    """
    import jax
    import jax.numpy as jnp

    from jaxlayers.kernels import dispatch

    place = chips.topology(f"{chip}:2x2")
    block = size.layer()
    images = size.images if isinstance(size, Merge) else IMAGES
    channels = 3 if isinstance(size, Embed) else size.features
    x = jax.ShapeDtypeStruct((images, size.side, size.side, channels), jnp.bfloat16)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)

    def loss(variables: Any, x: Any) -> Any:
        out: Any = block.apply(variables, x)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    gradient = jax.grad(loss, argnums=0 if isinstance(size, Embed) else (0, 1))
    found: dict[str, int] = {}
    for choice in ("jnp", "pallas"):
        with dispatch.use(choice, platform="tpu"):
            reading = plan_kernels.reading(gradient, variables, x, place=place)
        found["kernels"] = reading.by_kind.get("kernel", 0)
        found[choice] = reading.cycles - found["kernels"]
    return found


def measured(size: Size | Half | Merge, chip: str, python: str) -> dict[str, int]:
    """Return what `block_cycles` does, in a process that has libtpu.

    Raises:
      RuntimeError: if it fails, with what it said.
    """
    order = [python, "-m", "tools.kernel_cost", "--chip", chip, "--kind", type(size).__name__]
    done = subprocess.run(
        [*order, "--one", json.dumps(dataclasses.asdict(size))],
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
    shifted = " (shifted)" if size.shifted else ""
    version = f", V{size.version}" if size.version > 1 else ""
    return (
        f"| {size.side} x {size.side} x {size.features}{version} | {size.heads} | {size.window}{shifted} "
        f"| {found['jnp']:,} | {found['pallas']:,} | {found['kernels']:,} | {found['jnp'] / whole:.2f} |"
    )


def half_row(size: Half | Merge, found: dict[str, int]) -> str:
    """Return a row of the second table."""
    whole = found["pallas"] + found["kernels"]
    images = f"{size.images} of " if isinstance(size, Merge) else ""
    last = "" if isinstance(size, Merge) or size.norm_first else ", norm last"
    width = f"3 to {size.features}" if isinstance(size, Embed) else f"{size.features}"
    return (
        f"| {images}{size.side} x {size.side} x {width}{last} | {found['jnp']:,} | {found['pallas']:,} "
        f"| {found['kernels']:,} | {found['jnp'] / whole:.2f} |"
    )


HALF_HEAD = """| map | XLA alone | XLA beside the kernels | kernels | ratio |
| --- | --- | --- | --- | --- |"""
HEAD = """| map | heads | window | XLA alone | XLA beside the kernels | kernels | ratio |
| --- | --- | --- | --- | --- | --- | --- |"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_cost", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has libtpu")
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--feed-forward", action="store_true", help="weigh the second half of blocks alone")
    parser.add_argument("--merging", action="store_true", help="weigh the merging of maps")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="Size", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        fields = json.loads(options.one)
        kind: Any = {kind.__name__: kind for kind in (Size, Half, Merge, Embed)}[options.kind]
        size: Any = kind(**fields)
        print(json.dumps(block_cycles(size, options.chip)))
        return
    if options.feed_forward or options.merging:
        print(HALF_HEAD, flush=True)
        for half in MERGES if options.merging else HALVES:
            print(half_row(half, measured(half, options.chip, options.python)), flush=True)
        return
    print(HEAD, flush=True)
    for each in SIZES:
        print(row(each, measured(each, options.chip, options.python)), flush=True)


if __name__ == "__main__":
    main()
