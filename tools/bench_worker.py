"""One process of a benchmark: it builds its programs, then runs the one whose name it is sent, and says how long.

Command:  python -m tools.bench_worker JOB, by `tools.bench_measure`; JOB is its `Job` as JSON.

Every contender has a process of its own, so that its peak of memory is its own and no library's threads wait in
another's way. Nothing of JAX is imported here before the job asks for it.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Turn = Callable[[], object]
Clock = Callable[[], float]

INSTALL = {
    "torch": "torch",
    "timm": "timm",
    "hflayers": "git+https://github.com/ml-jku/hopfield-layers",
    "e3nn_jax": "e3nn-jax",
}
"""What to install for each package that a contender may need."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A program that can run.

    Attributes:
      turn: runs it once and waits for the result; may return the seconds that count, a float. `None` = it is compiled
        only.
      macs: multiply-accumulates of one turn.
      program_bytes: memory that the compiler plans for it: operands, results and what lies between.
      facts: further numbers.
    """

    turn: Turn | None
    macs: int | None = None
    program_bytes: int | None = None
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to be made ready.

    Attributes:
      name: unique in its process.
      prepare: compiles it.
      parameters: number of parameters, or `None`.
    """

    name: str
    prepare: Callable[[], Ready]
    parameters: int | None = None


def needed(package: str) -> Any:
    """Return a package.

    Raises:
      ValueError: if it is not installed, with what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"the package {package!r} must be importable, but {error}; run: pip install {INSTALL.get(package, package)}"
        ) from error


def torchvision() -> Any:
    """Return torchvision, which timm needs, also where its compiled operators are built for another torch."""
    torch = needed("torch")
    try:
        return needed("torchvision")
    except RuntimeError:
        # Its Python half registers shapes for operators that then do not exist; no model here uses them.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        module: Any = needed("torchvision")
        module.operators = library  # the definitions end with it
        return module


def compiled(
    name: str,
    function: Callable[..., Any],
    *operands: Any,
    carry: int = 0,
    parameters: int | None = None,
    timed: bool = True,
) -> Program:
    """Return the program of a JAX function.

    Args:
      name: of the program.
      function: of the operands.
      operands: arrays, or trees of them.
      carry: so many of the first operands are replaced by the first results after each turn, and donated.
      parameters: as in `Program`.
      timed: `False` compiles only.
    """

    def prepare() -> Ready:
        import jax

        from jaxlayers.summary import count_macs

        macs = count_macs(function, *operands)
        program = jax.jit(function, donate_argnums=tuple(range(carry))).lower(*operands).compile()
        memory: Any = program.memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
        kept = list(operands)

        def turn() -> None:
            found = jax.block_until_ready(program(*kept))
            kept[:carry] = found[:carry]

        planned = sum(sizes) - memory.alias_size_in_bytes
        return Ready(turn if timed else None, macs, planned, {"temporary_bytes": memory.temp_size_in_bytes})

    return Program(name, prepare, parameters)


def leaf_count(tree: Any) -> int:
    """Return the number of numbers in a tree of arrays."""
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def matrix_product(library: str, size: int) -> list[Program]:
    """Return the product of two large square matrices: the peak that everything else is compared with."""

    def prepare() -> Ready:
        if library == "torch":
            torch = needed("torch")
            left, right = torch.ones(size, size), torch.ones(size, size)
            return Ready(lambda: left @ right, size**3)
        import jax.numpy as jnp

        ones = jnp.ones((size, size))
        return compiled("", jnp.matmul, ones, ones).prepare()

    return [Program("product", prepare)]


def seconds_of(turn: Turn, repeats: int, clock: Clock = time.perf_counter) -> float:
    """Return the seconds of one turn, from so many in a row."""
    start, own = clock(), 0.0
    for _ in range(repeats):
        said = turn()
        if isinstance(said, float):
            own += said
    # A turn that says what counts of its time is believed; what it does besides is not counted.
    return (own or clock() - start) / repeats


def repeats_for(seconds: float, least: float) -> int:
    """Return how many turns last at least so long, so that a clock's grain and a wake-up count for little."""
    return max(1, math.ceil(least / max(seconds, 1e-9)))


class Peak:
    """Memory of this process from now on; Linux resets its peak, elsewhere it counts from the start.

    Attributes:
      base: bytes held when this was made.
    """

    def __init__(self) -> None:
        self.base = _status("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far, compilation for one."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def above(self) -> int:
        """Return the most bytes held since, beyond the base."""
        return max(0, _status("VmHWM") - self.base)


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def limit_threads(threads: int) -> None:
    """Keep this process, and what it imports from now on, on so many processor cores."""
    if hasattr(os, "sched_getaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)


def load(packages: Sequence[str]) -> None:
    """Import packages whose memory is not the contender's."""
    for package in packages:
        module = torchvision() if package == "torchvision" else needed(package)
        if package == "jax":
            module.block_until_ready(module.numpy.zeros(1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the parent until it closes the pipe; return the exit code."""
    job = json.loads((sys.argv[1:] if arguments is None else arguments)[0])
    speak = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not come between the lines

    def say(**fields: Any) -> None:
        speak.write(json.dumps(fields) + "\n")
        speak.flush()

    try:
        limit_threads(job["threads"])
        load(job["imports"])
        peak = Peak()
        clock = time.process_time if job["processor_time"] else time.perf_counter
        programs = getattr(importlib.import_module(job["module"]), job["function"])(**job["settings"])
        ready: dict[str, tuple[Turn, int]] = {}
        for program in programs:
            start = time.perf_counter()
            made = program.prepare()
            if made.turn is not None:
                made.turn()
            first = time.perf_counter() - start
            if made.turn is not None:
                # By the clock, also of a turn that says less: what it prepares takes time too.
                begin = time.perf_counter()
                made.turn()
                ready[program.name] = made.turn, repeats_for(time.perf_counter() - begin, job["least"])
            say(
                name=program.name,
                timed=made.turn is not None,
                first=first,
                parameters=program.parameters,
                macs=made.macs,
                program_bytes=made.program_bytes,
                facts=dict(made.facts),
            )
    except ValueError as error:
        say(error=str(error))
        return 1
    say(ready=True)
    peak.reset()
    for line in sys.stdin:
        turn, repeats = ready[line.strip()]
        turn()  # not counted: while others ran, caches were theirs and a virtual machine's pages went back to its host
        say(seconds=seconds_of(turn, repeats, clock))
    say(peak_bytes=peak.above())
    return 0


if __name__ == "__main__":
    sys.exit(main())
