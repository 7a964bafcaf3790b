"""Compress a picture into a small file by a trained S2LIC, and bring it back.

    python -m tools.compress encode IN.png OUT.s2 --model RUN
    python -m tools.compress decode IN.s2 OUT.png --model RUN

RUN is the directory of a training run, or a file of its weights (`.safetensors`). A file is written whole or not at
all: what stood there before stays until its successor is complete, and after an error altogether.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from jaxlayers.window.s2lic import S2LIC, Codec
from train import config as configs
from train import transfer

CONFIG = Path("configs/s2lic_photographs.py")


def load_codec(place: str | Path, config: str | Path = CONFIG) -> Codec:
    """Return the codec of a run or a file of weights.

    Args:
      place: the run's directory, or a `.safetensors` file.
      config: the file that the run was trained by, which says what the model is.

    Raises:
      ValueError: if there are no such weights, or they are not those of the model.
    """
    model = configs.load(config).model
    if not isinstance(model, S2LIC):
        raise ValueError(f"the model of {config} must be an S2LIC, not {type(model).__name__}; pass its --config")
    return Codec(model, load_params(place, model))


def load_params(place: str | Path, model: S2LIC) -> Any:
    """Return the parameters of the model from a run or a file; all must be there."""
    side = model.stride * 4
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, side, side, model.channels)))["params"]
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return transfer.load_partial(configs.StartFrom(str(place), require=(".",)), empty)[0]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its place holds either what was there or all of the data."""
    # Not of `tempfile`, whose files nobody else may read.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def encode(codec: Codec, source: Path, target: Path) -> int:
    """Write the compressed file of a picture; return its bytes.

    Raises:
      ValueError: if the source is no picture.
    """
    try:
        with Image.open(source) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{source} must be a picture that Pillow reads; pass one") from error
    data = codec.encode(pixels)
    write_whole(target, data)
    return len(data)


def decode(codec: Codec, source: Path, target: Path) -> tuple[int, ...]:
    """Write the picture of a compressed file, in the form of the target's ending; return its shape.

    Raises:
      ValueError: if the source is damaged or of another model, or the ending is unknown.
    """
    known = Image.registered_extensions()
    if target.suffix.lower() not in known:
        raise ValueError(f"{target} must end as a picture does, such as .png; name it so")
    pixels = codec.decode(source.read_bytes())
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, known[target.suffix.lower()])
    write_whole(target, stream.getvalue())
    return pixels.shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.compress", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("encode", "decode"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", required=True, help="directory of a run, or a .safetensors file")
    parser.add_argument("--config", type=Path, default=CONFIG, help=f"what it was trained by (default: {CONFIG})")
    options = parser.parse_args(arguments)
    try:
        codec = load_codec(options.model, options.config)
        if options.action == "encode":
            print(f"{options.target}: {encode(codec, options.source, options.target)} bytes")
        else:
            print(f"{options.target}: {' x '.join(map(str, decode(codec, options.source, options.target)[:2]))} pixels")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
