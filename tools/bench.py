"""Measure a family beside what others offer, and write the page of figures.

Command:  python -m tools.bench {window,equivariant,hopfield,input,checkpoint} [--against NAME ...] [--docs docs]

Contenders are processes that take turns (A B A B ...): what is told are medians, ratios round by round with their
range, warm-up apart, peaks of memory, and time in shares of the machine's own matrix peak, measured in the same run.
Curves come with the exponent that fits them. `--against` names what to measure beside; what is not installed is refused
with what to install. `--docs docs` writes `benchmarks/NAME.md` and its picture. A whole run takes up to a quarter of an
hour of two quiet cores; `--quick` shrinks everything to seconds, for a look at the form. What only this library has is
measured by `tools.bench_memory`, `tools.bench_se3`, `tools.bench_convert` and `tools.bench_input` too, at any size.
"""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.bench_measure import BenchError, Session
from train.__main__ import HUGE_PAGES

BENCHES = ("window", "equivariant", "hopfield", "input", "checkpoint")


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float:
    """Return the processes that ran or waited over the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; return the exit code: 0, or 1 where a contender cannot be measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--against", nargs="+", default=[], help="contenders to measure beside ours")
    parser.add_argument("--rounds", type=int, help="of every program; 5, or 2 with --quick")
    parser.add_argument("--threads", type=int, default=cores(), help="processor cores of each process; all")
    parser.add_argument("--docs", type=Path, help="folder to write the page and its picture into")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the form only, no figure means anything")
    parser.add_argument(
        "--processor-time", action="store_true", help="instead of the clock's, on a machine in use; with --threads 1"
    )
    parser.add_argument(
        "--small-pages", action="store_true", help="memory as processes get it by default, not in huge pages (Linux)"
    )
    options = parser.parse_args(given)
    rounds = (2 if options.quick else 5) if options.rounds is None else options.rounds
    for name, value in (("rounds", rounds), ("threads", options.threads)):
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.processor_time and (options.threads > 1 or options.name in ("input", "checkpoint")):
        parser.error("--processor-time must come with --threads 1, and not for input and checkpoint, which wait")
    if options.threads > cores():
        parser.error(f"--threads must be at most the {cores()} cores there are, got {options.threads}")
    module = importlib.import_module(f"tools.bench_{'loading' if options.name == 'input' else options.name}")
    unknown = [name for name in options.against if name not in module.AGAINST]
    if unknown:
        parser.error(f"--against for {options.name} must be of {', '.join(module.AGAINST)}, got {unknown[0]}")

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    least, allocator = 0.01 if options.quick else 0.1, "" if options.small_pages else HUGE_PAGES
    session = Session(rounds, least, options.threads, options.processor_time, allocator, report)
    before = load_average()
    try:
        page = module.bench(session, tuple(options.against), options.quick)
    except BenchError as error:
        report(f"error: {error}")
        return 1
    text = page.markdown(f"python -m tools.bench {shlex.join(given)}", session, (before, load_average()))
    print(text)
    if options.docs:
        page.write(options.docs, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
