"""Interleaved measurement of programs in processes of their own, and what is told of it: ratios, exponents, pages.

A benchmark is a list of groups of `Job`s. The programs of a group run in turn, A B A B ..., so that what else the
machine does falls on all alike; each round gives one ratio, and a ratio is told as the median of the rounds with the
smallest and the largest. See `tools.bench` for the command.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from train.__main__ import HUGE_PAGES

OURS = "jaxlayers"
BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb0", "#e08a1e", "#3a9a5b", "#c0392b", "#8a8f98"


class BenchError(RuntimeError):
    """A contender that cannot be measured, or does other work than ours."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A process with one or more programs.

    Attributes:
      label: the contender, as in the table.
      module: where `function` is.
      function: returns the list of `tools.bench_worker.Program`; called with the settings.
      settings: of the function; what JSON can hold.
      imports: packages whose memory is not counted.
      alike: its programs must have as many parameters as those of the same name before it.
      optional: a failure is told in the page instead of ending the run, and the contender not tried again.
      limit: seconds until all its programs must be ready.
      environment: variables of the process.
    """

    label: str
    module: str
    function: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    imports: tuple[str, ...] = ("jax", "jaxlayers", "optax")
    alike: bool = True
    optional: bool = False
    limit: float = 300.0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one program.

    Attributes:
      label: of its job.
      name: of the program.
      seconds: of a turn, one number a round; empty if it was compiled only.
      first: seconds of compilation and first turn.
      parameters: their number, or `None`.
      macs: multiply-accumulates of a turn, or `None`.
      program_bytes: what the compiler plans, or `None`.
      peak_bytes: the most memory of the process in the rounds, above what it held with its packages imported; `None`
        where several programs share a process.
      facts: further numbers.
    """

    label: str
    name: str
    seconds: tuple[float, ...]
    first: float
    parameters: int | None = None
    macs: int | None = None
    program_bytes: int | None = None
    peak_bytes: int | None = None
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A contender's time over ours, above one where ours is faster.

    Attributes:
      median: over the rounds.
      low: of the round where ours did worst.
      high: of the round where ours did best.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as a cell of a table."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def verdict(self) -> str:
        """What it says of ours: faster or slower if every round says so."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no different in every round"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of their seconds to ours, round by round.

    Raises:
      ValueError: if the rounds are not equally many, or there are none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} rounds must be equally many and at least one; measure again")
    each = [their / our for our, their in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def interleave(turns: Sequence[Callable[[], float]], rounds: int) -> list[tuple[float, ...]]:
    """Return what each of the turns gives, one after the other, so many rounds."""
    found: list[list[float]] = [[] for _ in turns]
    for _ in range(rounds):
        for seconds, turn in zip(found, turns, strict=True):
            seconds.append(turn())
    return [tuple(seconds) for seconds in found]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A power law, y = constant x^exponent.

    Attributes:
      exponent: slope of the logarithms.
      error: its standard error; 0 for two points.
      constant: factor.
    """

    exponent: float
    error: float
    constant: float

    def __str__(self) -> str:
        """Return the exponent as in a table."""
        return f"{self.exponent:.2f} ± {self.error:.2f}"


def fit_power(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Return the power law through points, by least squares of the logarithms.

    Raises:
      ValueError: if there are fewer than two different x, or a number is not positive.
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"x={list(x)} and y={list(y)} must be positive, two different x at least; measure more sizes")
    u, v = np.log(x), np.log(y)
    spread = np.sum((u - u.mean()) ** 2)
    exponent = float(np.sum((u - u.mean()) * (v - v.mean())) / spread)
    rest = v - v.mean() - exponent * (u - u.mean())
    error = math.sqrt(float(np.sum(rest**2)) / (len(x) - 2) / spread) if len(x) > 2 else 0.0
    return Fit(exponent, error, float(np.exp(v.mean() - exponent * u.mean())))


# Processes -----------------------------------------------------------------------------------------------------------


class _Worker:
    """A process of `tools.bench_worker`, its programs ready."""

    def __init__(self, job: Job, session: "Session") -> None:
        self.job = job
        order = {name: getattr(session, name) for name in ("threads", "least", "processor_time")} | {
            name: getattr(job, name) for name in ("module", "function", "settings", "imports")
        }
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`close` does)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench_worker", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": session.allocator, **job.environment},
            start_new_session=True,
        )
        self.programs: list[dict[str, Any]] = []
        self._late = False
        watch = threading.Timer(job.limit, self._stop)
        watch.start()
        try:
            while "ready" not in (said := self._hear()):
                self.programs.append(said)
        except BenchError:
            self.close()
            raise
        finally:
            watch.cancel()

    def _stop(self) -> None:
        self._late = True
        self._kill()

    def _kill(self) -> None:
        # With what it started itself, compilers and data loaders; once it was waited for, its number is no longer its.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        said = json.loads(line) if line else {}
        if line and "error" not in said:
            return said
        code = self._process.wait()
        if self._late:
            raise BenchError(f"{self.job.label} was not ready within {self.job.limit:g} seconds")
        self._errors.seek(0)
        last = [line for line in self._errors.read().splitlines() if line.strip()][-3:]
        # A page may tell it: without the machine's paths.
        told = re.sub(r"(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", " | ".join(last))
        raise BenchError(said.get("error") or f"{self.job.label} ended with {code}: {told}")

    def turn(self, name: str) -> float:
        """Return the seconds of one turn of a program."""
        self._input.write(name + "\n")
        self._input.flush()
        return self._hear()["seconds"]

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def finish(self) -> int:
        """End it; return the peak of its memory."""
        self._input.close()
        peak = self._hear()["peak_bytes"]
        self.close()
        return peak

    def close(self) -> None:
        """End it at once."""
        self._kill()
        self._process.wait()
        self._errors.close()


@dataclasses.dataclass
class Session:
    """What one run of a benchmark is measured with, and what it says besides numbers.

    Attributes:
      rounds: times that each program runs.
      least: seconds that a turn lasts at least; short programs run several times in one.
      threads: processor cores of each process.
      processor_time: count the time of the processor instead of the clock's: what other processes take of a busy
        machine is then in no figure, and neither is what threads of one process gain.
      allocator: settings of the C library's allocator for all processes, as `GLIBC_TUNABLES` holds them.
      report: called with a line when something is done.
      failures: of optional contenders, by label.
    """

    rounds: int
    least: float
    threads: int
    processor_time: bool = False
    allocator: str = HUGE_PAGES
    report: Callable[[str], None] = lambda line: None
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    def measure(self, jobs: Sequence[Job]) -> list[Measured]:
        """Return what the programs of a group take, run in turn.

        Raises:
          BenchError: if a job that is not optional fails, or one has other parameters than the first.
        """
        with contextlib.ExitStack() as stack:
            workers = []
            for job in jobs:
                if job.optional and job.label in self.failures:
                    continue  # it would cost its limit again
                try:
                    worker = _Worker(job, self)
                except BenchError as error:
                    if not job.optional:
                        raise
                    self.failures[job.label] = str(error)
                    self.report(f"left out: {job.label}: {error}")
                    continue
                stack.callback(worker.close)
                workers.append(worker)
            check_alike([(worker.job, worker.programs) for worker in workers])
            # Programs of one name next to one another: a ratio is of neighbours.
            order = list(dict.fromkeys(said["name"] for worker in workers for said in worker.programs))
            places = [(worker, said) for worker in workers for said in worker.programs]
            places.sort(key=lambda place: order.index(place[1]["name"]))
            timed = [(worker, said["name"]) for worker, said in places if said["timed"]]
            turns = [functools.partial(worker.turn, name) for worker, name in timed]
            seconds = dict(zip(timed, interleave(turns, self.rounds), strict=True))
            peaks = {worker: worker.finish() for worker in workers}
            found = [
                Measured(
                    worker.job.label,
                    said["name"],
                    seconds.get((worker, said["name"]), ()),
                    said["first"],
                    said["parameters"],
                    said["macs"],
                    said["program_bytes"],
                    peaks[worker] if len(worker.programs) == 1 else None,
                    said["facts"],
                )
                for worker, said in places
            ]
        for one in found:
            if one.seconds:
                self.report(f"{one.label}, {one.name}: {1e3 * one.median:.4g} ms, first {one.first:.1f} s")
        return found


def check_alike(said: Sequence[tuple[Job, Sequence[Mapping[str, Any]]]]) -> None:
    """Raise where programs of one name have different numbers of parameters: then they do not do the same work.

    Raises:
      BenchError: naming both.
    """
    first: dict[str, tuple[str, int]] = {}
    for job, programs in said:
        for program in programs if job.alike else ():
            count = program["parameters"]
            if count is None:
                continue
            label, known = first.setdefault(program["name"], (job.label, count))
            if known != count:
                raise BenchError(
                    f"{program['name']} must have as many parameters everywhere; {label} has {known:,}, "
                    f"{job.label} {count:,}"
                )


def product_jobs(size: int, *libraries: str) -> list[Job]:
    """Return the jobs of the matrix product that tells the machine's peak."""
    return [
        Job(
            f"matrix product, {library}",
            "tools.bench_worker",
            "matrix_product",
            {"library": library, "size": size},
            imports=(library,),
        )
        for library in dict.fromkeys(libraries)
    ]


# What is told ---------------------------------------------------------------------------------------------------------


def machine(threads: int) -> str:
    """Return the machine in words, without names or paths of it."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = "1 core" if threads == 1 else f"{threads} cores"
    return f"{cores} of {model}, {memory:.0f} GiB of memory, {platform.system()}"


def versions(packages: Sequence[str]) -> str:
    """Return the versions of those packages that are installed, and the commit."""
    from train.progress import git_revision

    found = [f"python {platform.python_version()}"]
    for package in dict.fromkeys(packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join([*found, f"git {git_revision(Path(__file__).parent)}"])


def cell_seconds(seconds: float) -> str:
    """Return a time as in a table."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def cell_bytes(size: float | None) -> str:
    """Return a size as in a table."""
    return "" if size is None else f"{size / 2**20:,.4g} MiB" if size < 2**30 else f"{size / 2**30:,.3g} GiB"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    Raises:
      ValueError: if a row has not as many cells as there are heads.
    """
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"a row of {len(row)} cells must have {len(heads)}, one for each of {list(heads)}")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def peak_of(found: Sequence[Measured]) -> float:
    """Return the machine's peak: multiply-accumulates a second of the fastest matrix product, 0 without one."""
    return max((one.macs / one.median for one in found if one.name == "product" and one.macs), default=0.0)


def comparison(found: Sequence[Measured], peak: float, *, ours: str = OURS) -> str:
    """Return the table of programs and contenders; the work of a library that counts none is as ours.

    Columns in which nobody has anything are left out.
    """
    heads = ["program", "by", "time of a turn (range)", "times ours", "first turn", "memory", "planned"]
    heads += ["MACs", "of the peak"]
    rows = []
    for name in dict.fromkeys(one.name for one in found):
        group = [one for one in found if one.name == name and one.seconds]
        own = next((one for one in group if one.label == ours), None)
        for one in group:
            macs = one.macs or (own.macs if own else None)
            rows.append(
                [
                    name,
                    one.label,
                    "{} ({} to {})".format(*map(cell_seconds, (one.median, min(one.seconds), max(one.seconds)))),
                    "" if own is None or one is own else str(ratio(own.seconds, one.seconds)),
                    cell_seconds(one.first),
                    cell_bytes(one.peak_bytes),
                    cell_bytes(one.program_bytes),
                    f"{macs / 1e9:.3g} G" if macs else "",
                    f"{macs / one.median / peak:.1%}" if macs and peak else "",
                ]
            )
    filled = [index for index, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    return markdown([heads[index] for index in filled], [[row[index] for index in filled] for row in rows])


def ratios(found: Sequence[Measured], *, ours: str = OURS) -> dict[tuple[str, str], Ratio]:
    """Return the ratio of each contender to ours, by program and label."""
    own = {one.name: one for one in found if one.label == ours and one.seconds}
    return {
        (one.name, one.label): ratio(own[one.name].seconds, one.seconds)
        for one in found
        if one.label != ours and one.seconds and one.name in own
    }


def findings(pairs: Mapping[tuple[str, str], Ratio]) -> str:
    """Return in words where ours is slower, where not always faster, and how often it is faster."""
    lines = []
    for label in dict.fromkeys(label for _, label in pairs):
        group = {name: one for (name, other), one in pairs.items() if other == label}
        for verdict in ("slower", "no different in every round"):
            named = [f"{name} {one.median:.2f}" for name, one in group.items() if one.verdict == verdict]
            if named:
                lines.append(f"- Beside {label} ours is {verdict}: {', '.join(named)}.")
        ahead = [one.median for one in group.values() if one.verdict == "faster"]
        if ahead:
            count = f"{len(ahead)} of {len(group)} comparisons"
            lines.append(f"- Beside {label} ours is faster in {count}, {min(ahead):.2f} to {max(ahead):.2f} times.")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Curve:
    """How a quantity grows.

    Attributes:
      title: of its panel; curves with one title share it.
      label: of the curve.
      x_name: what is on the axis.
      y_name: what is measured.
      x: sizes.
      y: quantities.
      fitted: from which point on the power law is fitted, where small sizes cost a constant.
    """

    title: str
    label: str
    x_name: str
    y_name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    fitted: int = 0

    @property
    def fit(self) -> Fit:
        """The power law."""
        return fit_power(self.x[self.fitted :], self.y[self.fitted :])


def growth(curves: Sequence[Curve]) -> str:
    """Return the table of the curves and their exponents."""
    rows = []
    for curve in curves:
        show = cell_bytes if "bytes" in curve.y_name else cell_seconds if "seconds" in curve.y_name else "{:.4g}".format
        points = "; ".join(f"{x:,.0f}: {show(y)}" for x, y in zip(curve.x, curve.y, strict=True))
        fitted = f", from {curve.x[curve.fitted]:,.0f} on" if curve.fitted else ""
        rows.append([curve.label, f"{curve.y_name} by {curve.x_name}", points, f"{curve.fit}{fitted}"])
    return markdown(["what", "measured", "points", "exponent (standard error)"], rows)


def grid_of(titles: Sequence[str]) -> list[list[str]]:
    """Return titles two in a row, with "." for a place that stays free; one alone has a row of one."""
    filled = [*titles, *["."] * (len(titles) % 2 if len(titles) > 1 else 0)]
    return [filled[start : start + 2] for start in range(0, len(filled), 2)]


def picture(path: Path, title: str, pairs: Mapping[tuple[str, str], Ratio], curves: Sequence[Curve]) -> None:
    """Draw the ratios and the curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(curve.title for curve in curves))
    rows = max(1, math.ceil(len(titles) / 2))
    # The ratios take the whole left side; beside them stand two columns of curves.
    left = [["ratios"]] * rows if pairs else [[] for _ in range(rows)]
    right = grid_of(titles)
    mosaic = [own + (right[row] if titles else []) for row, own in enumerate(left)]
    height = max(3.7 * rows, 0.24 * len(pairs) + 1)
    figure = Figure(figsize=(4.6 * len(mosaic[0]) + 1.4 * bool(pairs), height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: dict[str, Any] = figure.subplot_mosaic(mosaic)  # type: ignore[arg-type, assignment]
    if pairs:
        axis = axes["ratios"]
        bars = list(pairs.items())[::-1]
        for place, (_, one) in enumerate(bars):
            colour = {"faster": GREEN, "slower": RED}.get(one.verdict, GREY)
            axis.barh(place, one.median - 1, left=1, color=colour, height=0.6)
            axis.plot([one.low, one.high], [place, place], color="black", linewidth=1)
            axis.annotate(f" {one.median:.2f}", (max(one.high, 1), place), va="center", fontsize=8)
        names = [f"{name}, {label}" for (name, label), _ in bars]
        axis.set_yticks(range(len(pairs)), names, fontsize=7)
        axis.axvline(1, color=GREY, linewidth=0.8)
        axis.set(xscale="log", xlabel="their time / ours (line: range of the rounds)", title="Above 1: ours is faster")
        axis.margins(x=0.2)
        ends = axis.get_xlim()
        marks = [2.0**power for power in range(-8, 12) if ends[0] <= 2.0**power <= ends[1]]
        axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axis.minorticks_off()
    for name in titles:
        axis = axes[name]
        group = [curve for curve in curves if curve.title == name]
        for colour, curve in zip((BLUE, ORANGE, GREEN, RED, GREY) * 3, group, strict=False):
            fit, x = curve.fit, np.asarray(curve.x[curve.fitted :])
            axis.plot(curve.x, curve.y, "o", color=colour, markersize=4, label=f"{curve.label}: {fit.exponent:.2f}")
            axis.plot(x, fit.constant * x**fit.exponent, color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=group[0].x_name, ylabel=group[0].y_name, title=name)
        marks = sorted({x for curve in group for x in curve.x})
        axis.set_xticks(marks, [f"{mark:,.0f}" for mark in marks], fontsize=7, rotation=20)
        axis.tick_params("x", which="minor", length=0, labelbottom=False)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, title="exponent", title_fontsize=7)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


@dataclasses.dataclass
class Page:
    """A page of figures.

    Attributes:
      name: of the benchmark, and so of the files.
      title: of the page.
      packages: whose versions are told.
      text: paragraphs on what was measured and how.
      found: programs that contenders are compared by, in order.
      product: the matrix product's runs; with them the page has the table of times.
      tables: further tables by heading.
      curves: what grows.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    text: str
    found: list[Measured] = dataclasses.field(default_factory=list)
    product: list[Measured] = dataclasses.field(default_factory=list)
    tables: dict[str, str] = dataclasses.field(default_factory=dict)
    curves: list[Curve] = dataclasses.field(default_factory=list)

    def markdown(self, command: str, session: Session, loads: tuple[float, float]) -> str:
        """Return the page."""
        pairs = ratios(self.found)
        rounds = f"{session.rounds} interleaved rounds; load average {loads[0]:.1f} before and {loads[1]:.1f} after"
        if session.processor_time:
            rounds += "; times are the processor's, not the clock's, since other work ran on the machine"
        if session.allocator:
            rounds += f"; memory of all contenders in huge pages (`GLIBC_TUNABLES={session.allocator}`)"
        parts = [f"# {self.title}", f"    {command}"]
        facts = [f"- Machine: {machine(session.threads)}.", f"- Versions: {versions(self.packages)}.", f"- {rounds}."]
        if self.product:
            speeds = ", ".join(
                f"{2 * one.macs / one.median / 1e9:.3g} GFLOP/s ({one.label.split(', ')[-1]})"
                for one in self.product
                if one.macs
            )
            size = round((self.product[0].macs or 0) ** (1 / 3))
            facts.append(
                f"- Matrix peak of the machine, a float32 product of {size} x {size} in the same run: {speeds}."
            )
        facts += [f"- Left out: {label}: {reason}" for label, reason in session.failures.items()]
        parts += ["\n".join(facts), findings(pairs), f"![{self.title}](../images/bench_{self.name}.png)"]
        if self.product:
            parts += ["## Times", comparison(self.found, peak_of(self.product))]
        if self.curves:
            parts += ["## Growth", growth(self.curves)]
        for heading, table in self.tables.items():
            parts += [f"## {heading}", table]
        parts += ["## What was measured", reflow(self.text), reflow(READING)]
        parts += [reflow(COLUMNS)] * bool(self.product)
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, docs: Path, text: str) -> None:
        """Write the page and its picture."""
        picture(docs / "images" / f"bench_{self.name}.png", self.title, ratios(self.found), self.curves)
        (docs / "benchmarks").mkdir(parents=True, exist_ok=True)
        (docs / "benchmarks" / f"{self.name}.md").write_text(text)


READING = """
Every contender is a process of its own with the same number of processor cores; the processes take turns, and before
each turn a program runs once uncounted, as one of many steps in a row does. A turn's time is the median of the rounds.
A ratio is their time over ours in the same round: the median, with the smallest and the largest. An exponent is the
slope of the logarithms.
"""
COLUMNS = """
"First turn" is compilation and the first run, which no other figure contains. "Memory" is the most that the process
held in the rounds, above what it held once its packages were imported; it has parameters, gradients and whatever the
library's allocator keeps, of compilation too. "Planned" is what the compiler says its program needs, operands and
results included. MACs are multiply-accumulates of matrix products and convolutions, counted in the JAX program (a
rival that is not JAX is credited with ours), and the share of the peak is theirs in a second over those of the matrix
product.
"""


def reflow(text: str) -> str:
    """Return paragraphs and lists in lines of equal length, whatever was put into them."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\n|\n(?=- )", text.strip()):
        item = paragraph.startswith("- ")
        filled = textwrap.fill(
            " ".join(paragraph.split()), 120, subsequent_indent="  " if item else "", break_on_hyphens=False
        )
        parts.append(("\n" if item and parts and parts[-1].lstrip().startswith("- ") else "\n\n") + filled)
    return "".join(parts).strip()


def sizes_of(found: Sequence[Measured], label: str, prefix: str) -> Iterator[tuple[float, Measured]]:
    """Yield (size, what was measured) of the programs that are named `prefix size`."""
    for one in found:
        match = re.fullmatch(re.escape(prefix) + r" ([\d.]+)", one.name)
        if one.label == label and match:
            yield float(match[1]), one


def curve(
    found: Sequence[Measured],
    label: str,
    prefix: str,
    *,
    title: str,
    x_name: str,
    value: Callable[[Measured], float] = lambda one: one.median,
    y_name: str = "seconds",
    fitted: int = 0,
    shown: str | None = None,
) -> Curve:
    """Return the curve of the programs that are named `prefix size`."""
    points = sorted(((size, value(one)) for size, one in sizes_of(found, label, prefix)), key=lambda point: point[0])
    x, y = zip(*points, strict=True)
    return Curve(title, shown or prefix, x_name, y_name, tuple(x), tuple(y), fitted)
