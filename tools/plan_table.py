"""Plan every config: one line each of a Markdown table.

Command:  python -m tools.plan_table --topology v5e:2x2 --smoke [--out FILE] [configs/x.py ...]

A config whose mesh does not fit the topology is planned with all devices along `data`, and one whose batch does not
divide over these for one chip. Lines appear as they are done,
and what the file holds already is not planned again.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools import chips, plan_predict, plan_report
from tools.plan import DEFAULT_PYTHON, run_jobs
from tools.plan_compile import Job

HEAD = (
    "| config | mesh | batch | parameters | memory of a device | step | MFU | heaviest layer |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(name: str, report: Mapping[str, Any]) -> str:
    """Return the line of a config."""
    time, memory = report["time"], report["memory"]
    heavy = next((each for each in report["heaviest"] if each["module"]), None)
    where = f"`{heavy['module']}` {heavy['what']}" if heavy else ""
    cells = [
        f"`{name}`",
        plan_report.mesh_words(report["mesh"]),
        f"{report['batch_size']:,}",
        f"{report['parameters']:,}",
        plan_report.size(memory["needed"]) + ("" if memory["fits"] else ", does not fit"),
        plan_report.duration(time["step"]) if time else "",
        f"{time['mfu']:.1%}" if time else "",
        where,
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a config cannot be planned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("configs", type=Path, nargs="*", help="default: all of configs/")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--smoke", action="store_true", help="the one-minute versions")
    parser.add_argument("--count", action="store_true", help="compile nothing")
    parser.add_argument("--out", type=Path, help="write the table to this file, line by line")
    parser.add_argument("--python", default=os.environ.get("PLAN_PYTHON", DEFAULT_PYTHON))
    given = parser.parse_args(arguments)
    place = chips.topology(given.topology)
    files = given.configs or sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))
    lines = given.out.read_text().splitlines() if given.out and given.out.exists() else HEAD.splitlines()
    files = [file for file in files if not any(line.startswith(f"| `{file.stem}` |") for line in lines)]
    jobs = [Job(str(file), place.name, smoke=given.smoke, compile=not given.count, evaluation=True) for file in files]
    python = given.python if place.chip.is_tpu and not given.count else sys.executable
    failed = 0
    print("\n".join(lines))
    for file, job in zip(files, jobs, strict=True):
        (answer,) = run_jobs([job], python, devices=1 if place.chip.is_tpu else place.devices)
        used = place
        if "must be divisible by" in answer.get("error", ""):
            used = chips.topology(f"{place.chip.name}:{'x'.join('1' for _ in place.grid)}")
            (answer,) = run_jobs([dataclasses.replace(job, topology=used.name)], python)
        if "error" in answer:
            failed += 1
            print(f"{file.stem}: {answer['error']}", file=sys.stderr, flush=True)
            continue
        lines.append(row(file.stem, plan_predict.report(answer, used, str(file))))
        print(lines[-1], flush=True)
        if given.out:
            given.out.write_text("\n".join([*lines[:2], *sorted(lines[2:])]) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
