r"""Plan a run on machines you do not have: memory, time and collectives of the real training step, compiled ahead.

Command:  python -m tools.plan configs/x.py --topology v5e:16x16 [--mesh data=64,fsdp=4] [--batch-per-chip N]
          python -m tools.plan configs/x.py --topology v5e:16x16 --search

For TPUs the compiler is libtpu, in an environment of its own (`make .venv-tpu/.ready`, or any whose interpreter
`--python` or the variable `PLAN_PYTHON` names); no TPU is needed. Without it, and with `--count`, what follows from
shapes alone is reported. For GPUs (`h100:8`) the step is compiled for virtual CPU devices and the time is a roofline.
In place of a config the name of a variant (`python -m jaxlayers list`) plans a classifier of it. It ends with 0 when
the plan fits, 3 when it does not, and 2 when the settings cannot work.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tools import chips, plan_predict, plan_report, plan_search
from tools.plan_compile import ENVIRONMENT, Job, filled

DEFAULT_PYTHON = ".venv-tpu/bin/python"
MAKE = "make .venv-tpu/.ready"


class PlanError(ValueError):
    """Settings that cannot work."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description=(__doc__ or "").split("\n")[0],
        epilog=f"Topologies, or others of the form:\n{chips.known()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("config", help="a config file, or the name of a variant")
    result.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:16x16 or h100:8")
    result.add_argument("--mesh", metavar="AXIS=N,...", help="replaces the config's, such as data=64,fsdp=4")
    result.add_argument("--batch-per-chip", type=int, metavar="N", help="replaces the config's batch size")
    result.add_argument("--accumulate", type=int, default=0, metavar="N", help="pieces of the batch")
    result.add_argument("--remat", default="", metavar="POLICY", help="what the backward pass computes again")
    result.add_argument("--smoke", action="store_true", help="the config's one-minute version")
    result.add_argument(
        "--set", dest="overrides", metavar="PATH=VALUE", action="append", default=[], help="as in train"
    )
    result.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=4,
        metavar="N",
        help="try meshes, batches, policies and pieces: rank all by estimates, compile the best N (4), rank those",
    )
    result.add_argument("--count", action="store_true", help="compile nothing: count by shapes alone")
    result.add_argument("--no-evaluation", action="store_true", help="leave the evaluation step out")
    result.add_argument("--out", type=Path, metavar="DIR", help="write plan.json and plan.html there")
    result.add_argument("--hlo", type=Path, metavar="FILE", help="write the compiled training step there, gzipped")
    result.add_argument("--json", action="store_true", help="print the report as JSON")
    result.add_argument(
        "--python",
        default=os.environ.get("PLAN_PYTHON", DEFAULT_PYTHON),
        help=f"interpreter that has libtpu (default: $PLAN_PYTHON or {DEFAULT_PYTHON})",
    )
    result.add_argument("--timeout", type=float, default=7200.0, metavar="S", help="seconds a compilation may take")
    return result


def mesh_sizes(text: str) -> dict[str, int]:
    """Return the sizes of `data=64,fsdp=4`.

    Raises:
      PlanError: on an unknown axis or a size that is none.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        if name not in plan_search.AXES:
            raise PlanError(f"--mesh {text!r} names axis {name!r}; the axes are {', '.join(plan_search.AXES)}")
        if not equals or not (number == "-1" or (number.isdecimal() and int(number) > 0)):
            raise PlanError(f"--mesh {text!r} must give {name} a positive size, or -1 for what is left")
        found[name] = int(number)
    return found


def run_jobs(
    jobs: Sequence[Job], python: str, *, timeout: float = 7200.0, devices: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield the answers to jobs, worked off in a process of its own; another one follows where it dies.

    Args:
      jobs: what to do, in turn.
      python: its interpreter.
      timeout: seconds that one job may take.
      devices: virtual CPU devices that the process should have.
    """
    root = Path(__file__).parents[1]
    environment = dict(os.environ) | ENVIRONMENT
    flags = [word for word in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in word]
    environment["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    waiting = list(jobs)
    with tempfile.TemporaryDirectory() as folder:
        while waiting:
            asked, told = Path(folder) / "jobs", Path(folder) / "answers"
            asked.write_text("".join(json.dumps(dataclasses.asdict(job)) + "\n" for job in waiting))
            told.write_text("")
            command = [python, "-m", "tools.plan_compile", str(asked), str(told)]
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=timeout * len(waiting),
                )
                why = f"the compiling process ended with {done.returncode}: {done.stderr[-1500:]}"
            except subprocess.TimeoutExpired:
                why = f"it took longer than {timeout:.0f} s a program"
            answers = [json.loads(line) for line in told.read_text().splitlines()]
            yield from answers
            waiting = waiting[len(answers) :]
            if waiting:
                yield {"error": why, "unexpected": True}
                waiting = waiting[1:]


def plan(given: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the report that was asked for, and the other candidates of a search.

    Raises:
      PlanError: on settings that cannot work.
    """
    try:
        place = chips.topology(given.topology)
        mesh = None if given.mesh is None else mesh_sizes(given.mesh)
        if mesh is not None and given.search is None:
            mesh = filled({axis: mesh.get(axis, 1) for axis in plan_search.AXES}, place.devices)
    except ValueError as error:
        raise PlanError(str(error)) from error
    for name, value in (("--batch-per-chip", given.batch_per_chip), ("--search", given.search)):
        if value is not None and value < 1:
            raise PlanError(f"{name} {value} must be at least 1")
    by_name = Path(given.config).suffix != ".py" and os.sep not in given.config
    if not by_name and not Path(given.config).is_file():
        raise PlanError(f"there is no config file {given.config}")
    compiles = not given.count
    python = sys.executable
    if place.chip.is_tpu and compiles:
        if Path(given.python).is_file():
            python = given.python
        else:
            say(f"no {given.python}: counting by shapes alone. `{MAKE}` makes it, with libtpu; or set --python")
            compiles = False
    per_chip = given.batch_per_chip or (1 if by_name else 0)
    job = Job(
        config=given.config,
        topology=place.name,
        smoke=given.smoke,
        overrides=tuple(given.overrides),
        mesh=mesh,
        batch_size=per_chip * place.chips,
        accumulate=given.accumulate,
        remat=given.remat,
        compile=compiles,
        evaluation=not given.no_evaluation,
        text=str(given.hlo.resolve()) if given.hlo else "",
    )
    virtual = 1 if place.chip.is_tpu else place.devices

    def answers(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        return run_jobs(jobs, python, timeout=given.timeout, devices=virtual)

    if given.search is not None:
        return search(job, place, given, mesh, answers, say)
    answer = next(iter(answers([job])))
    if "error" in answer:
        raise PlanError(answer["error"])
    return plan_predict.report(answer, place, given.config), []


def search(
    job: Job,
    place: chips.Topology,
    given: argparse.Namespace,
    mesh: Mapping[str, int] | None,
    answers: Callable[[Sequence[Job]], Iterator[dict[str, Any]]],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the best report of a search and the others, in order.

    Everything is ranked by estimates; the most promising are compiled, one after the other, and what the compiler
    needed corrects the estimates of the next.

    Raises:
      PlanError: if nothing can be tried.
    """
    tried = plan_search.meshes(place.devices, given=mesh)
    # Surveyed is a batch of the config's own size, whatever the meshes.
    answer = next(iter(answers([dataclasses.replace(job, survey=tuple(tried), mesh={"data": place.devices})])))
    if "error" in answer:
        raise PlanError(answer["error"])
    own = answer["batch_size"]
    batches = [own] if given.batch_per_chip or job.smoke else sorted({own, 2 * own, 4 * own})
    limit = plan_predict.SPARE * place.memory
    factor = 1.0
    reports: list[dict[str, Any]] = []
    seen: list[plan_search.Candidate] = []
    while len(reports) < given.search:
        found = plan_search.candidates(
            answer["survey"],
            tried,
            place,
            batch_size=own,
            surveyed=own,
            batches=batches,
            policies=[given.remat] if given.remat else (),
            pieces=[given.accumulate] if given.accumulate else (1, 2, 4, 8),
            activations=factor,
        )
        order = plan_search.ranked(list(found), limit)
        if not order:
            raise PlanError(
                f"no mesh of {place.devices} devices divides a batch of {own}; set --batch-per-chip, or --mesh with "
                "sequence or tensor"
            )
        if not reports:
            say(
                f"{len(order)} candidates on {len(tried)} meshes, {sum(each.needed <= limit for each in order)} may fit"
            )
        key = [(each.mesh, each.batch_size, each.accumulate, each.remat) for each in seen]
        fresh = [each for each in order if (each.mesh, each.batch_size, each.accumulate, each.remat) not in key]
        picked = plan_search.chosen([each for each in fresh if sum(other.mesh == each.mesh for other in seen) < 2], 1)
        if not picked:
            break
        one = picked[0]
        seen.append(one)
        say(
            f"{len(seen)}/{given.search}: {plan_report.mesh_words(one.mesh)}, batch {one.batch_size}, "
            f"{one.accumulate} pieces, remat {one.remat} (estimate: {plan_report.size(one.needed)})"
        )
        trial = dataclasses.replace(
            job,
            mesh=one.mesh,
            batch_size=one.batch_size,
            accumulate=one.accumulate,
            remat="" if one.remat == "none" else one.remat,
            evaluation=False,
        )
        result = next(iter(answers([trial])))
        if "error" in result:
            reports.append({"error": result["error"], "mesh": dict(one.mesh)})
            continue
        report = plan_predict.report(result, place, given.config)
        reports.append(report)
        say(f"  {plan_report.verdict(report)}")
        estimate = result["count"]["activation_bytes"]
        if report["compiled"] and estimate:
            factor = max(0.1, result["train"]["memory"]["temp"] / estimate)
        elif report["memory"]["refused"] and estimate:
            factor = max(factor, (report["memory"]["needed"] or limit) / estimate)
    ordered = [dict(each) for each in plan_search.best(reports)]
    if "error" in ordered[0]:
        raise PlanError(ordered[0]["error"])
    return ordered[0], ordered[1:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    given = parser().parse_args(arguments)
    console, aside = Console(), Console(stderr=True)
    try:
        report, others = plan(given, lambda text: aside.print(text, style="dim", markup=False, highlight=False))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps({"plan": report, "others": others}, indent=2))
    else:
        plan_report.show(report, console)
        if others:
            console.print(plan_report.ranking([report, *others]))
    if given.out:
        aside.print(f"wrote {plan_report.write(report, given.out, others)}", markup=False)
    return 0 if report["memory"]["fits"] else 3


if __name__ == "__main__":
    sys.exit(main())
