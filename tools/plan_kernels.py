"""What the Pallas kernels of a compiled program cost, which the TPU compiler leaves out of its estimates.

In the text of a program a kernel is a custom call that holds the kernel's own program. Each that differs is compiled
once more by itself, in a process whose libtpu writes its schedules down. There the instruction bundles are counted:
those of a loop times its turns, those of the grid's loop times the steps of the grid. `weighed` writes what is found
into the text, where the compiler writes its own estimates, so that `plan_read.reading` finds it there.

A bundle takes a cycle; those in which the compiler waits for a result are counted too, for which the dump before they
are folded into delays is read. What reading and writing takes from main memory, and what the matrix units take for the
operations that the kernel declares, are floors. Nothing else may stall, so a kernel's cycles are a lower bound, save
that branches count as if all of them were taken.
"""

import argparse
import base64
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools import chips, plan_compile, plan_read
from train.collectives import Instruction, read

TIMEOUT = 900.0
"""Seconds that compiling one kernel may take."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a compiled program; equal kernels have equal schedules.

    Attributes:
      program: in Mosaic, as text without the lines of Python that it is from.
      operands: arrays as HLO spells them, such as `bf16[8,49,96]`.
      results: likewise.
      config: what the custom call was given, of which the program is a part; equal ones may differ in it.
    """

    program: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    config: str = dataclasses.field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """The name that `pallas_call` was given, else that of its function."""
        found = re.search(r'sym_name = "([^"]*)"', self.program)
        return found[1] if found else "kernel"

    @property
    def flops(self) -> float:
        """Operations of a call, by the estimate that `pallas_call` was given; 0 without one."""
        call = json.loads(self.config)["custom_call_config"]
        return float(call.get("cost_estimate", {}).get("flops", 0))

    @property
    def steps(self) -> int | None:
        """Steps of the grid; `None` where they are known only when it runs."""
        found = re.search(r"iteration_bounds = array<i64: ([-\d, ]+)>", self.program)
        sizes = [int(size) for size in found[1].split(",")] if found else []
        return math.prod(sizes) if all(size >= 0 for size in sizes) else None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler's schedule of a kernel says.

    Attributes:
      bundles: instruction bundles of a call, all steps of the grid together.
      unknown_loops: loops (the grid's among them) whose turns are not known; each is counted once.
      error: why there is no schedule; empty = there is one.
    """

    bundles: int = 0
    unknown_loops: int = 0
    error: str = ""


# Finding them ---------------------------------------------------------------------------------------------------------


def kernel_of(instruction: Instruction, results: Mapping[str, str]) -> Kernel | None:
    """Return the kernel of an instruction, `None` if it is none.

    Args:
      instruction: of the compiled program.
      results: what every instruction of the program returns, as HLO spells it.
    """
    if not plan_read.is_kernel(instruction):
        return None
    config, _ = json.JSONDecoder().raw_decode(instruction.rest.partition("backend_config=")[2])
    call = config["custom_call_config"]
    operands = (results.get(name, "") for name in plan_read.operand_names(instruction))
    return Kernel(
        mosaic(base64.b64decode(call["body"])),
        tuple(array for spelt in operands for array in _arrays(spelt)),
        tuple(_arrays(instruction.result)),
        # The second is how much fast memory it may have; 16 MiB without.
        json.dumps({key: config[key] for key in ("custom_call_config", "scoped_memory_configs") if key in config}),
    )


def mosaic(body: bytes) -> str:
    """Return the text of a kernel's program, without the lines of Python that it is from.

    Pallas's kernels are MLIR bytecode of one dialect; the compiler's own, such as the softmax that it puts in place of
    ours for long rows, are MLIR text of many.
    """
    from jax.extend.mlir import ir
    from jax.interpreters import mlir
    from jaxlib.mlir._mlir_libs import _tpu_ext  # JAX has no public name for the dialect

    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    _tpu_ext.register_dialect(context)
    with context:
        module = ir.Module.parse(body).operation
        return str(module.get_asm(enable_debug_info=False, print_generic_op_form=True))


def _arrays(spelt: str) -> list[str]:
    """Return the arrays of a result without their layouts: `(bf16[2,3]{1,0:T(8,128)}, s32[])` has two."""
    return re.findall(r"\b[a-z]+\d*[a-z0-9]*\[[\d,]*\]", re.sub(r"\{[^}]*\}", "", spelt))


def weighed(text: str, place: chips.Topology) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of a program with the cycles of its kernels, and a row for each that differs.

    A row has `name`, `steps` of the grid, `bundles` and `unknown_loops` of a call, and `error`: why a kernel has no
    cycles.

    Args:
      text: of a program compiled for a TPU (`compiled.as_text()`).
      place: what it was compiled for.
    """
    computations, _ = read(text)
    results = {each.name: each.result for body in computations.values() for each in body}
    found, moved = {}, {}
    for each in (each for body in computations.values() for each in body):
        kernel = kernel_of(each, results)
        if kernel:
            found[each.name] = kernel
            arrays = [*(results.get(name, "") for name in plan_read.operand_names(each)), each.result]
            moved[each.name] = sum(plan_read.array_bytes(array, memory=plan_read.MEMORY) for array in arrays)
    known = schedules(found.values(), place)

    def estimated(line: re.Match[str]) -> str:
        kernel = found.get(line[1])
        if kernel is None or known[kernel].error:
            return line[0]
        seconds = max(moved[line[1]] / place.bandwidth, kernel.flops / place.peak)
        cycles = max(known[kernel].bundles, round(seconds * place.chip.clock))
        return line[0].replace("backend_config={", f'backend_config={{"estimated_cycles":"{cycles}",', 1)

    rows = [{"name": each.name, "steps": each.steps, **dataclasses.asdict(known[each])} for each in known]
    return re.sub(r"(?m)^\s*(?:ROOT )?%([\w.-]+) = .*$", estimated, text) if found else text, rows


def reading(function: Callable[..., Any], *arguments: Any, place: chips.Topology) -> plan_read.Reading:
    """Return the reading of a function compiled for one chip, with the cycles of its kernels (`by_kernel`).

    Args:
      function: of arrays; `dispatch.use(..., platform="tpu")` around this call chooses its kernels.
      arguments: arrays, or their shapes.
      place: a topology of such chips.

    Raises:
      RuntimeError: if the compiler gives no schedule of a kernel.
    """
    return reading_of(compiled(function, *arguments, place=place), place)


def compiled(function: Callable[..., Any], *arguments: Any, place: chips.Topology) -> Any:
    """Return a function compiled for one chip of a topology, see `reading`."""
    import jax

    device = jax.sharding.SingleDeviceSharding(plan_compile.devices_of(place)[0])
    return jax.jit(function, in_shardings=device, out_shardings=device).lower(*arguments).compile()


def reading_of(program: Any, place: chips.Topology) -> plan_read.Reading:
    """Return the reading of a program compiled for one chip, with the cycles of its kernels.

    Raises:
      RuntimeError: if the compiler gives no schedule of a kernel.
    """
    import jax

    text, rows = weighed(program.as_text() or "", place)
    errors = [f"{row['name']}: {row['error']}" for row in rows if row["error"]]
    if errors:
        raise RuntimeError(f"kernels without a schedule: {'; '.join(errors)}")
    return plan_read.reading(text, jax.sharding.AbstractMesh((1,), ("data",)))


# Compiling each alone -------------------------------------------------------------------------------------------------

_KNOWN: dict[tuple[str, Kernel], Schedule] = {}


def schedules(kernels: Iterable[Kernel], place: chips.Topology) -> dict[Kernel, Schedule]:
    """Return the schedule of each kernel on a chip; what this process has asked before is not compiled again."""
    asked = list(dict.fromkeys(kernels))
    new = [kernel for kernel in asked if (place.chip.name, kernel) not in _KNOWN]
    if new:
        found = _compiled(new, place)
        _KNOWN.update({(place.chip.name, kernel): each for kernel, each in zip(new, found, strict=True)})
    return {kernel: _KNOWN[place.chip.name, kernel] for kernel in asked}


def _compiled(kernels: Sequence[Kernel], place: chips.Topology) -> list[Schedule]:
    with tempfile.TemporaryDirectory() as folder:
        asked, told, dump = (Path(folder) / name for name in ("kernels", "schedules", "dump"))
        asked.write_text(
            "".join(json.dumps({**dataclasses.asdict(each), "steps": each.steps}) + "\n" for each in kernels)
        )
        told.touch()
        dump.mkdir()
        # Read when libtpu starts, hence the process; of a whole step the schedules would fill gigabytes.
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        why = ""
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tools.plan_kernels", place.name, *map(str, (asked, told, dump))],
                env={**os.environ, **plan_compile.ENVIRONMENT, "LIBTPU_INIT_ARGS": flags.strip()},
                capture_output=True,
                text=True,
                check=False,
                cwd=Path(__file__).parents[1],
                timeout=TIMEOUT * len(kernels),
            )
            why = f"the compiling process ended with {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired:
            why = f"it took longer than {TIMEOUT:.0f} s a kernel"
        found = [Schedule(**json.loads(line)) for line in told.read_text().splitlines()]
        return found + [Schedule(error=why)] * (len(kernels) - len(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the kernels of a file, a line each, and write their schedules."""
    parser = argparse.ArgumentParser(prog="python -m tools.plan_kernels", description="Part of tools.plan_compile.")
    parser.add_argument("topology")
    for name in ("kernels", "schedules", "dump"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args(arguments)
    device = plan_compile.devices_of(chips.topology(given.topology))[0]
    with given.schedules.open("a") as file:
        for line in given.kernels.read_text().splitlines():
            try:
                found = scheduled(_alone(json.loads(line), device, given.dump), json.loads(line)["steps"])
            except Exception as error:  # the other kernels have schedules all the same
                found = Schedule(error=f"{type(error).__name__}: {error}"[:500])
            file.write(json.dumps(dataclasses.asdict(found)) + "\n")
            file.flush()


def _alone(kernel: Mapping[str, Any], device: Any, dump: Path) -> str:
    """Return the bundles of a program that is nothing but a kernel, once its registers are assigned."""
    import jax

    results, operands = ([_shape(array) for array in kernel[name]] for name in ("results", "operands"))
    call = jax.ffi.ffi_call(
        "tpu_custom_call", results, custom_call_api_version=1, legacy_backend_config=kernel["config"]
    )
    place = jax.sharding.SingleDeviceSharding(device)
    try:
        jax.jit(lambda *x: call(*x), in_shardings=place, out_shardings=place).lower(*operands).compile()
        texts = [path.read_text() for path in dump.glob("*-ffi_call*-packed-bundles-post-ra.txt")]
    finally:
        for path in dump.iterdir():
            path.unlink()
    if len(texts) != 1:
        raise ValueError(
            f"libtpu must write one schedule of a kernel, not {len(texts)}; take the version of the lock file"
        )
    return texts[0]


def _shape(spelt: str) -> Any:
    """Return the shape of an array such as `bf16[8,49,96]`."""
    import jax
    import jax.numpy as jnp

    dtype, lengths = spelt.rstrip("]").split("[")
    kinds = {"pred": "bool", "bf16": "bfloat16", **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)}}
    name = kinds.get(dtype) or re.sub(r"^f8", "float8_", re.sub(r"^s(?=\d)", "int", re.sub(r"^u(?=\d)", "uint", dtype)))
    return jax.ShapeDtypeStruct(tuple(int(length) for length in lengths.split(",") if length), jnp.dtype(name))


# Reading a schedule ---------------------------------------------------------------------------------------------------

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?P<labels>[A-Z ]*):\s*(?P<depth>>*)\s*\{")
_PHI = re.compile(r"%(\w+) = sphi %(\w+), %(\w+)")


def scheduled(text: str, steps: int | None) -> Schedule:
    """Return what the bundles of a kernel say.

    Args:
      text: as libtpu dumps it, a line a bundle, with as many `>` as loops are around it, the first of each marked LB.
      steps: of the grid; `None` = not known.

    Raises:
      ValueError: if the text has no bundles.
    """
    # The bundles of each loop that are in no inner one, by the numbers of the loops around them.
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    turns: dict[int, int | None] = {}
    # The last loop at each depth: empty bundles bear no mark, wherever they are.
    around: dict[int, tuple[int, ...]] = {0: ()}
    inside: tuple[int, ...] = ()
    for line in text.splitlines():
        found = _BUNDLE.match(line)
        if found:
            depth = len(found["depth"])
            if "LB" in found["labels"] or depth not in around:
                around[depth] = (*around.get(depth - 1, ()), len(turns))
                turns[len(turns)] = None
            inside = around[depth]
            counts[inside] += 1
        # What is carried from turn to turn is named in the loop, whereas its test may have been moved elsewhere.
        for counter, first, following in _PHI.findall(line) if inside else ():
            turns[inside[-1]] = turns[inside[-1]] or _turns(text, counter, first, following)
    if not counts:
        raise ValueError("a schedule must have bundles; let libtpu dump its packed bundles")
    if steps != 1 and turns:
        # The first loop is the grid's. It turns more often, to fetch the first blocks and to store the last.
        turns[0] = steps
    total = sum(count * math.prod(turns[loop] or 1 for loop in loops) for loops, count in counts.items())
    return Schedule(total, sum(each is None for each in turns.values()))


def _turns(text: str, counter: str, first: str, following: str) -> int | None:
    """Return how often a loop turns that carries such a counter; `None` if none or no constant is compared with it."""
    maybe = r"(?:\(!?%\w+\), )?"  # a predicate
    test = re.search(rf"= scmp\.ge\.s32\.totalorder {maybe}%{following}, (\d+) /\* loop exit test", text)
    begun = test and re.search(rf"%{first} = smov {maybe}(\d+)", text)
    added = begun and re.search(rf"%{following} = sadd\.s32 {maybe}(\d+), %{counter}\b", text)
    return max(1, -(-(int(test[1]) - int(begun[1])) // int(added[1]))) if test and begun and added else None


if __name__ == "__main__":
    main()
