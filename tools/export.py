"""Export a trained run: `python -m tools.export RUN [FOLDER] [--step N] [--no-ema] [--shard-size BYTES]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from train.export import SHARD_SIZE, export_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a run's parameters as safetensors with a model card; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=main.__doc__)
    parser.add_argument("run", help="a run's directory, its checkpoints, or one of them; also gs://...")
    parser.add_argument("folder", type=Path, nargs="?", help="where to (default: RUN/export)")
    parser.add_argument("--step", type=int, help="the checkpoint (default: the newest intact one)")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True, help="the averaged parameters")
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="bytes of a file at most")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(options.run) / "export"
    try:
        export_run(options.run, folder, step=options.step, ema=options.ema, shard_size=options.shard_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
