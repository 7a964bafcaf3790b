"""Memory of a conversion: `python -m tools.bench_convert [--gigabytes 1.0] [--to folder]`.

Writes a synthetic checkpoint in timm's names, converts it by the command in a process of its own, and prints the most
memory of its own that the process held (what only maps a file is not counted: the system takes it back at will), before
the conversion and during it, as a ratio to the checkpoint.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jaxlayers
from jaxlayers import pretrained
from jaxlayers.files import write_safetensors


def wide(gigabytes: float) -> tuple[str, dict[str, object]]:
    """Return a named model and fields for which its parameters have about so many bytes."""
    # Parameters grow with the square of the width; swin_large at 192 has 197 million.
    width = max(6, round(192 * (gigabytes * 1e9 / 4 / 196.5e6) ** 0.5 / 6) * 6)
    return "swin_large", {"embed_dim": width, "num_heads": (6, 12, 24, 48)}


def measure(source: Path, out: Path, name: str, fields: dict[str, object], *options: str) -> tuple[int, int]:
    """Return the bytes that a process held before it converted, and the most while it did.

    Raises:
      ValueError: if the conversion fails.
    """
    settings = [part for field, value in fields.items() for part in ("--set", f"{field}={value!r}")]
    arguments = ["run", str(source), str(out), "--model", name, *settings, *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.bench_convert", "--child", json.dumps(arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.wait():
        raise ValueError(f"the conversion must end well; it ended with {process.returncode}")
    before, most = process.stdout.read().splitlines()[-1].split()
    return int(before), int(most)


def _held() -> int:
    """Return the bytes of memory that belong to this process alone."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def _child(arguments: Sequence[str]) -> int:
    import jax

    from tools import convert

    jax.block_until_ready(jax.numpy.zeros(1))
    before, most, done = _held(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], _held())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = convert.main(arguments)
    done.set()
    watcher.join()
    print(before, most[0])
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_convert", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--to", default="folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return _child(json.loads(options.child))
    name, fields = wide(options.gigabytes)
    model = jaxlayers.create_model(name, **fields)
    dialect = pretrained.find_dialect(None, model, "timm")
    layout = pretrained.layout_of(model, dialect)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "weights.safetensors")
        write_safetensors(source, {name: rng.random(shape, np.float32) for name, shape in layout.items()})
        size = source.stat().st_size
        out = Path(folder, "out.safetensors" if options.to == "reference" else "out")
        before, most = measure(source, out, name, fields, "--to", options.to)
    print(f"checkpoint {size:,} bytes; held {before:,} before, {most:,} at most: {(most - before) / size:.2f} times it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
