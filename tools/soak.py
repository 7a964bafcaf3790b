"""Show that a run loses nothing: kill it, starve it, damage what it saved, and compare with a run that was left alone.

Command:  python -m tools.soak --kills 50 --report docs/soak.md
Expected: every check passed; a report of what was done how often. Half an hour on two CPU cores (`--kills 6 --quick`:
          a few minutes).

A small window transformer is trained on handwritten digits by `python -m train` in processes of its own, on virtual
CPU devices. "Same bits" compares every array of the last checkpoint, read by Orbax alone, and every logged loss.

Longer than most files: a command that stands alone, with one section for each kind of harm and one for the report.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console

# JAX is imported where it is used: the worker processes that read records import this file for `Noted`.

ROOT = Path(__file__).parents[1]
STEPS, BATCH, RECORDS, SAVE_EVERY = 40, 32, 256, 4
MESHES = {8: (2, 2, 2), 4: (1, 2, 2), 2: (1, 2, 1), 1: (1, 1, 1)}
"""Sizes of the axes data, fsdp and tensor by the number of devices."""
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
TOLERANCE = 1e-4
POLL = 0.002


# ---- what is trained


@dataclasses.dataclass(frozen=True)
class Noted:
    """Records that leave a file in `folder` while one is read, so that a kill can be aimed, and its place seen.

    Attributes:
      source: the records.
      folder: where the files are made.
      name: what their names begin with.
      seconds: how much longer a read takes.
      corrupt: the index of a record that cannot be read; -1 = all can.
    """

    source: Any
    folder: str
    name: str
    seconds: float = 0.0
    corrupt: int = -1

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        note = Path(self.folder) / f"{self.name}-{os.getpid()}-{threading.get_ident()}"
        with contextlib.suppress(OSError):
            note.touch()
        try:
            if int(index) == self.corrupt:
                raise ValueError(f"record {self.corrupt} cannot be decoded")
            time.sleep(self.seconds)
            return self.source[index]
        finally:
            with contextlib.suppress(OSError):
                note.unlink(missing_ok=True)

    def digest(self) -> str:
        """Return the digest of the records."""
        return self.source.digest()


def small(folder: str, *, reading: float = 2e-4, evaluating: float = 2e-3, corrupt: int = -1) -> Any:
    """Return the config that is trained, with dropout and augmentation: a resumed run must keep their randomness."""
    from jaxlayers.window import Swin
    from train.config import Config, MeshShape, Optim
    from train.data import arrays, digits, random_affine
    from train.tasks import classification

    def first(split: Any, count: int) -> Any:
        rows = [digits(split)[index] for index in range(count)]
        return arrays(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    model = Swin(
        num_classes=10,
        patch_size=2,
        embed_dim=48,  # arrays large enough to lie in files of their own, as those of a real model do
        depths=(1,),
        num_heads=(4,),
        window_size=2,
        dropout_rate=0.1,
        drop_path_rate=0.1,
    )
    return Config(
        model=model,
        task=classification(10, inputs=("image",), label="label"),
        train_data=Noted(first("train", RECORDS), folder, "reading", reading, corrupt),
        test_data=Noted(first("test", 72), folder, "evaluating", evaluating),
        train_transform=random_affine(max_shift=0.7, max_degrees=8.0),
        steps=STEPS,
        batch_size=BATCH,
        # A schedule that does not know the last step; and an epsilon at which a gradient that is zero but for rounding
        # (the bias of the keys) is not blown up to a whole step, so that meshes can be compared.
        optim=Optim(learning_rate=3e-3, warmup_steps=4, schedule="constant", epsilon=1e-4),
        mesh=MeshShape(data=-1),
        log_every=1,
        eval_every=2 * SAVE_EVERY,
        checkpoint_every=SAVE_EVERY,
        metric="accuracy",
    )


# ---- running it


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
      check: the group of the line.
      name: what was done.
      trials: how often.
      passed: how often it came out as promised.
      detail: numbers and places.
    """

    check: str
    name: str
    trials: int
    passed: int
    detail: str = ""


class Soak:
    """Where a soak works, how it starts the trainer, and what it draws its moments from.

    Attributes:
      folder: scratch space.
      rng: the source of every moment and place.
      program: the command of the trainer, without its arguments.
      patience: seconds after which a process counts as hung.
      deadline: `time.monotonic()` after which no further trial is begun.
      quick: leave out repetitions.
      cut: names of the checks that the deadline cut short or left out.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        program: Sequence[str] = (sys.executable, "-u", "-m", "train"),
        patience: float = 300.0,
        minutes: float | None = None,
        quick: bool = False,
        console: rich.console.Console | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.program = tuple(program)
        self.patience = patience
        self.deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.quick = quick
        self.cut: list[str] = []
        self.console = console or rich.console.Console(highlight=False)
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.environment = {**os.environ, **cache, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **(environment or {})}
        self._undisturbed: dict[int, Reference] = {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Print a line of progress."""
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, soft_wrap=True)

    def late(self, name: str) -> bool:
        """Return whether the time is over; note the check that is then cut short."""
        over = time.monotonic() > self.deadline
        if over and name not in self.cut:
            self.cut.append(name)
        return over

    def config(self, name: str, **changes: Any) -> Path:
        """Write a config file that calls `small`, with a folder of its own for notes."""
        place = self.folder / name
        notes = place / "notes"
        notes.mkdir(parents=True, exist_ok=True)
        arguments = ", ".join([repr(str(notes)), *(f"{key}={value!r}" for key, value in changes.items())])
        path = place / "config.py"
        path.write_text(f"from tools.soak import small\n\n\ndef config(smoke=False):\n    return small({arguments})\n")
        return path

    def start(
        self,
        config: Path,
        workdir: Path,
        *settings: str,
        devices: int = 8,
        processes: int = 1,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> "Running":
        """Start a run on so many devices, shared out to so many processes."""
        data, fsdp, tensor = MESHES[devices]
        common = [str(config), "--workdir", str(workdir), "--devices", str(devices // processes)]
        common += [f"--set=mesh.data={data}", f"--set=mesh.fsdp={fsdp}", f"--set=mesh.tensor={tensor}", *settings]
        flags: list[list[str]] = [[]]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                several = [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", f"--num-processes={processes}"]
            flags = [[*several, f"--process-id={rank}"] for rank in range(processes)]
        for note in notes(config):
            note.unlink(missing_ok=True)
        return Running(
            [[*prefix, *self.program, *common, *own] for own in flags],
            {**self.environment, **(environment or {})},
            config,
            workdir,
            self.patience,
        )

    @property
    def reference(self) -> "Reference":
        """The run that was left alone, with all its checkpoints."""
        return self.undisturbed(8)

    def undisturbed(self, devices: int) -> "Reference":
        """Return a run on so many devices in one process that was left alone."""
        if devices not in self._undisturbed:
            name = f"reference-{devices}"
            self.say(f"the run to compare with, on {devices} devices")
            config, workdir = self.config(name), self.folder / name / "run"
            with self.start(config, workdir, "--set=keep_last=1000", devices=devices) as run:
                run.finish()
            self._undisturbed[devices] = Reference(workdir, read_state(workdir, STEPS), losses(workdir))
        return self._undisturbed[devices]

    @functools.cached_property
    def seconds(self) -> float:
        """How long a run takes when nothing must be compiled: moments are drawn from that time."""
        assert self.reference  # it compiles
        config, began = self.config("clock"), time.monotonic()
        with self.start(config, self.folder / "clock" / "run") as run:
            run.finish()
        return time.monotonic() - began


@dataclasses.dataclass(frozen=True)
class Reference:
    """A run that was left alone.

    Attributes:
      workdir: its directory.
      state: its last arrays, by name.
      lines: what it logged.
    """

    workdir: Path
    state: Mapping[str, np.ndarray]
    lines: list[dict[str, float]]


class TrialError(Exception):
    """A run did not do what was promised; the message says what it did."""


class Running:
    """The processes of a run; leaving the context kills what is left of them."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environment: Mapping[str, str],
        config: Path,
        workdir: Path,
        patience: float,
    ) -> None:
        self.config, self.workdir, self.patience = config, workdir, patience
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.logs = [workdir.with_name(f"{workdir.name}-{rank}.log") for rank in range(len(commands))]
        self.lines_before = len(losses(workdir))
        self.processes = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as output:
                # A group of its own: Ctrl-C in this terminal must not look like a signal of the trial.
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=dict(environment),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *unused: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill all processes, and the workers that they started, as the machine's end would."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one process."""
        self.processes[rank].send_signal(number)

    def text(self, rank: int = 0) -> str:
        """Return what a process has printed."""
        return self.logs[rank].read_text(errors="replace")

    def ended(self) -> bool:
        """Return whether a process is gone."""
        return any(process.poll() is not None for process in self.processes)

    def new_lines(self) -> int:
        """Return how many steps this run has logged."""
        return len(losses(self.workdir)) - self.lines_before

    def until(self, condition: Callable[[], Any]) -> bool:
        """Wait for a condition; return False if the run ended before.

        Raises:
          TrialError: if neither happens in time.
        """
        limit = time.monotonic() + self.patience
        while not condition():
            if self.ended():
                return False
            if time.monotonic() > limit:
                raise TrialError(f"nothing happened for {self.patience:.0f} s; it said: {tail(self.text())}")
            time.sleep(POLL)
        return True

    def codes(self) -> list[int]:
        """Wait for the end and return the exit codes.

        Raises:
          TrialError: if a process does not end in time.
        """
        limit = time.monotonic() + self.patience
        for process in self.processes:
            try:
                process.wait(timeout=max(1.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TrialError(f"a process did not end in {self.patience:.0f} s: {tail(self.text())}") from None
        return [process.returncode for process in self.processes]

    def finish(self) -> None:
        """Wait for the end of a complete run.

        Raises:
          TrialError: if it did not end with 0.
        """
        self.expect(0)

    def expect(self, code: int) -> None:
        """Wait for the end.

        Raises:
          TrialError: if a process ended with another code.
        """
        codes = self.codes()
        if codes != [code] * len(codes):
            raise TrialError(f"exit codes {codes} and not {code}: {tail(self.text())}")

    def where(self) -> list[str]:
        """Return what a killed run was in the middle of, by what it left behind."""
        text = self.text()
        found = []
        if unfinished(self.workdir / "checkpoints"):
            found.append("a save")
        names = {note.name.partition("-")[0] for note in notes(self.config)}
        found += [{"reading": "reading records", "evaluating": "an evaluation"}[name] for name in sorted(names)]
        if "compiling" not in text:
            found.append("the start")
        elif self.new_lines() == 0:
            found.append("compiling")
        return found or ["a step"]


def tail(text: str) -> str:
    """Return the last words of a log."""
    return " / ".join(line for line in text.splitlines()[-6:] if line.strip())[-600:]


def notes(config: Path) -> list[Path]:
    """Return the files that `Noted` has made."""
    return list((config.parent / "notes").iterdir())


def unfinished(checkpoints: Path) -> list[Path]:
    """Return the directories of saves that are not committed."""
    return list(checkpoints.glob("*.orbax-checkpoint-tmp*")) if checkpoints.exists() else []


def losses(workdir: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl` that are whole, without what depends on the machine."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    keep = re.compile(r"step|test/|train/(loss|accuracy|gradient_norm|learning_rate|corrupt_records)")
    return [{name: value for name, value in line.items() if keep.match(name)} for line in lines]


def read_state(workdir: Path, step: int, checkpoints: Path | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint by their names, read by Orbax without the trainer's own code.

    Raises:
      TrialError: if they cannot be read.
    """
    import logging

    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # it misses a file that only whole checkpoints of its own have
    path = (checkpoints or workdir / "checkpoints") / str(step) / "state"
    try:
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(path).item_metadata.tree
            wanted = _map(tree, lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray))
            return {name: np.asarray(leaf) for name, leaf in _leaves(reader.restore(path, restore_args=wanted))}
    except Exception as error:
        raise TrialError(f"step {step} of {workdir} cannot be read: {type(error).__name__}: {error}") from error


def _map(tree: Any, make: Callable[[Any], Any]) -> Any:
    return {name: _map(node, make) for name, node in tree.items()} if isinstance(tree, Mapping) else make(tree)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, f"{prefix}{name}/")
        else:
            yield prefix + name, node


def same_bits(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> str:
    """Return the first array that is not the same bit for bit, or nothing."""
    if found.keys() != wanted.keys():
        return f"other arrays: {sorted(found.keys() ^ wanted.keys())[:3]}"
    different = [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()]
    return f"{len(different)} of {len(wanted)} arrays differ, the first is {different[0]}" if different else ""


def largest_difference(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of two states, relative to the largest number of each array (at least 1)."""
    differences = [0.0]
    for name, array in wanted.items():
        scale = max(1.0, float(np.max(np.abs(array), initial=0)))
        difference = np.abs(np.asarray(found[name], np.float64) - np.asarray(array, np.float64))
        differences.append(float(np.max(difference, initial=0)) / scale)
    return max(differences)


def largest_loss_difference(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> float:
    """Return the largest difference of two curves of the training loss.

    Raises:
      TrialError: if a step is missing or there twice.
    """
    steps = [[line["step"] for line in lines if "train/loss" in line] for lines in (found, wanted)]
    if steps[0] != steps[1]:
        raise TrialError(f"steps {steps[0]} were logged and not {steps[1]}")
    values = [np.array([line["train/loss"] for line in lines if "train/loss" in line]) for lines in (found, wanted)]
    return float(np.max(np.abs(values[0] - values[1])))


def compare(workdir: Path, reference: Reference) -> None:
    """Compare a complete run with the one that was left alone.

    Raises:
      TrialError: if a bit of the last checkpoint or of a logged loss differs.
    """
    problem = same_bits(read_state(workdir, STEPS), reference.state)
    if problem:
        raise TrialError(f"the last checkpoint is not that of the undisturbed run: {problem}")
    lines = losses(workdir)
    if lines != reference.lines:
        wrong = [
            number for number, pair in enumerate(zip(lines, reference.lines, strict=False), 1) if pair[0] != pair[1]
        ]
        raise TrialError(
            f"{len(lines)} lines of losses and not {len(reference.lines)}; the first to differ: {wrong[:1]}"
        )


def attempt(soak: Soak, failures: list[str], trial: Callable[[], Any]) -> bool:
    """Make a trial; note why it failed, if it did."""
    try:
        trial()
    except TrialError as error:
        failures.append(str(error))
        soak.say(f"  FAILED: {error}")
        return False
    return True


def row(check: str, name: str, results: Sequence[bool], failures: Sequence[str], detail: str = "") -> Row:
    """Return the line of several trials."""
    return Row(check, name, len(results), sum(results), "; ".join([detail, *failures[:3]]).strip("; "))


# ---- the checks

AIMS = ("any moment", "among the steps", "a save", "reading records")


def strike(soak: Soak, run: Running, aim: str) -> bool:
    """Wait for the moment to kill a run; return False if it ended before."""
    rng, seconds = soak.rng, soak.seconds
    if aim == "any moment":
        moment = time.monotonic() + rng.uniform(0, seconds)
        return run.until(lambda: time.monotonic() > moment)
    wanted = rng.randint(1, 2 * SAVE_EVERY)
    if not run.until(lambda: run.new_lines() >= wanted):
        return False
    if aim == "among the steps":
        moment = time.monotonic() + rng.uniform(0, 0.1)
        return run.until(lambda: time.monotonic() > moment)
    if aim == "a save":
        checkpoints = run.workdir / "checkpoints"
        if not run.until(lambda: unfinished(checkpoints)):
            return False
        time.sleep(rng.uniform(0, 0.02))
        return not run.ended()
    return run.until(lambda: any(note.name.startswith("reading") for note in notes(run.config)))


def kills(soak: Soak, count: int) -> Iterator[Row]:
    """Kill runs with SIGKILL at random moments; each must end where the undisturbed run ends."""
    reference = soak.reference
    config = soak.config("kills")
    places: Counter[str] = Counter()
    results: list[bool] = []
    failures: list[str] = []
    killed = starts = 0
    assert soak.seconds  # measured before the first run that is killed

    def over() -> bool:
        return killed >= count or starts >= 4 * count or soak.late("kills")

    while not over():
        workdir = soak.folder / "kills" / f"run-{len(results)}"
        since = killed

        def one_run(workdir: Path = workdir) -> None:
            nonlocal killed, starts
            while True:
                last = over()
                starts += 1
                with soak.start(config, workdir) as run:
                    if not last and strike(soak, run, AIMS[killed % len(AIMS)]):
                        run.kill()
                        found = run.where()
                        places.update(found)
                        killed += 1
                        soak.say(f"  kill {killed} of {count}: in {', '.join(found)}")
                        continue
                    run.finish()
                compare(workdir, reference)
                return

        results.append(attempt(soak, failures, one_run))
        soak.say(f"  run {len(results)} ended after {killed - since} kills: {'same bits' if results[-1] else 'WRONG'}")
        if not results[-1] and len(failures) >= 3:
            break
    detail = f"{killed} kills, in {', '.join(f'{place} {number}' for place, number in places.most_common())}"
    yield row("kill -9", "at random moments, resumed to the end: same bits as undisturbed", results, failures, detail)
    # An aim that was never met would leave its promise unshown.
    if count >= 8:
        met = [places["a save"] > 0, places["reading records"] > 0]
        yield row("kill -9", "a save and a read were among the moments", met, [])


def devices(soak: Soak) -> Iterator[Row]:
    """Resume on other numbers of devices and processes; the curve must go on as it was."""
    reference = soak.reference
    changes: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
        ("8, 4, 2, 8 devices", ((8, 1), (4, 1), (2, 1), (8, 1))),
        ("1, 2, 1 processes of one device each", ((1, 1), (2, 2), (1, 1))),
        ("1 process of two devices, 2 of one, 1 of two", ((2, 1), (2, 2), (2, 1))),
    )
    for number, (name, stages) in enumerate(changes[:1] if soak.quick else changes):
        failures: list[str] = []
        found = ""

        def change(number: int = number, stages: tuple[tuple[int, int], ...] = stages) -> None:
            nonlocal found
            config = soak.config(f"devices-{number}")
            workdir = config.parent / "run"
            for stage, (count, processes) in enumerate(stages, 1):
                steps = STEPS * stage // len(stages) // SAVE_EVERY * SAVE_EVERY
                soak.say(f"  {count} devices in {processes} processes to step {steps}")
                with soak.start(config, workdir, f"--set=steps={steps}", devices=count, processes=processes) as run:
                    run.finish()
                    if stage > 1 and "resuming from step" not in run.text():
                        raise TrialError(f"it did not resume: {tail(run.text())}")
            state, lines = read_state(workdir, STEPS), losses(workdir)
            loss = largest_loss_difference(lines, reference.lines)
            parameters = largest_difference(state, reference.state)
            found = f"largest difference from 8 devices in one process: loss {loss:.1e}, parameters {parameters:.1e}"
            same = {count for count, _ in stages}
            if same == {2}:
                alone = soak.undisturbed(2)
                problem = same_bits(state, alone.state)
                if problem:
                    raise TrialError(f"not bitwise as one process with two devices: {problem}")
                found += "; same bits as one process with two devices"
            if not max(loss, parameters) < TOLERANCE:
                raise TrialError(f"more than {TOLERANCE:.0e}: {found}")

        results = [attempt(soak, failures, change)]
        yield row("other devices", name, results, failures, found)


def ranks(soak: Soak) -> Iterator[Row]:
    """Stop or kill one of two processes."""
    ends = {"SIGTERM to one of two processes": signal.SIGTERM, "kill -9 of one of two": signal.SIGKILL}
    for name, number in list(ends.items())[: 1 if soak.quick else None]:
        failures: list[str] = []
        detail = ""

        def trial(number: signal.Signals = number) -> None:
            nonlocal detail
            config = soak.config(f"ranks-{number.name}")
            workdir = config.parent / "run"
            with soak.start(config, workdir, devices=2, processes=2) as run:
                if not run.until(lambda: run.new_lines() > 5):
                    raise TrialError(f"it ended: {tail(run.text())}")
                began = time.monotonic()
                run.signal(number, rank=1)
                codes = run.codes()
                detail = f"the other ended with {codes[0]} after {time.monotonic() - began:.0f} s"
                if number == signal.SIGTERM and codes != [143, 143]:
                    raise TrialError(f"exit codes {codes} and not 143: {tail(run.text())}")
                if number == signal.SIGKILL and codes[0] == 0:
                    raise TrialError("the other process took no notice")
            with soak.start(config, workdir, devices=2, processes=2) as run:
                run.finish()
                if number == signal.SIGTERM and "resuming from step" not in run.text():
                    raise TrialError(f"it did not resume: {tail(run.text())}")
            compare(workdir, soak.undisturbed(2))

        yield row(
            "processes", f"{name}, then both again: same bits", [attempt(soak, failures, trial)], failures, detail
        )


DAMAGES = ("truncated", "bit flipped", "deleted")


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Truncate a file, flip one of its bits, or delete it."""
    content = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: rng.randrange(len(content))] if content else b"")
    elif content:
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])


def kind_of(path: Path, step: Path) -> str:
    """Return the kind of a file of a checkpoint, for the table."""
    inner = path.relative_to(step)
    if inner.parent.name == "d":
        return f"{inner.parent}/* (array data)"
    return str(inner)


def files(soak: Soak, repeats: int = 3, only: str = "") -> Iterator[Row]:
    """Damage every file of the newest checkpoint in turn (`only`: of kinds that contain this), and restore.

    It passes if the damage is detected, named, and the checkpoint before is restored; or if it does no harm, and the
    newest is restored with the same bits. Both are compared with what the undamaged checkpoints gave.
    """
    import logging

    import jax

    from train.checkpoint import Checkpointer

    newest, older = STEPS, STEPS - SAVE_EVERY
    place = soak.folder / "files" / "checkpoints"
    for number in (newest, older):
        saved = soak.reference.workdir / "checkpoints" / str(number)
        shutil.copytree(saved, place / str(number), dirs_exist_ok=True)

    def like(step: int) -> Any:
        leaves = json.loads((place / str(step) / "manifest" / "manifest.json").read_text())["content"]["leaves"]
        tree: dict[str, Any] = {}
        for name, leaf in leaves.items():
            *parents, last = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
        return tree

    wanted = like(newest)

    def restore() -> tuple[int, dict[str, np.ndarray], Any, list[str]]:
        with Checkpointer(place) as checkpointer:
            restored = checkpointer.restore(wanted)
            if restored is None:
                raise TrialError("no checkpoint was restored")
            state = {name: np.asarray(leaf) for name, leaf in _leaves(restored.state)}
            named = [skipped.reason for skipped in checkpointer.skipped if skipped.step == newest]
            return restored.step, state, (restored.data, restored.metrics), named

    truth = {newest: restore()}
    hidden = place / str(newest)
    hidden.rename(place.parent / "hidden")
    truth[older] = restore()
    (place.parent / "hidden").rename(hidden)
    if (truth[newest][0], truth[older][0]) != (newest, older):
        yield Row("damage", "undamaged checkpoints are restored", 2, 0, f"{truth[newest][0]}, {truth[older][0]}")
        return

    step = place / str(newest)
    # A name with random letters in it differs from save to save; the order must not.
    paths = sorted(
        (path for path in step.rglob("*") if path.is_file()), key=lambda p: (kind_of(p, step), p.stat().st_size)
    )
    paths = [path for path in paths if only in kind_of(path, step)]
    if soak.quick:
        kinds = {kind_of(path, step): path for path in paths}  # the largest of each kind
        paths = list(kinds.values())
    logger = logging.getLogger("train.checkpoint")
    before, logger.disabled = logger.disabled, True
    counts: dict[tuple[str, str], Counter[str]] = {}
    problems: dict[tuple[str, str], list[str]] = {}
    try:
        for path in paths:
            content = path.read_bytes()
            for kind in DAMAGES:
                for _ in range(1 if kind == "deleted" else repeats):
                    damage(path, kind, soak.rng)
                    key = (kind_of(path, step), kind)
                    outcome = _outcome(restore, truth, newest, older)
                    counts.setdefault(key, Counter())[outcome.partition(":")[0]] += 1
                    if outcome not in GOOD_OUTCOMES:
                        problems.setdefault(key, []).append(outcome)
                        soak.say(f"  FAILED: {key}: {outcome}")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
    finally:
        logger.disabled = before
    for (name, kind), counter in counts.items():
        good = sum(counter[outcome] for outcome in GOOD_OUTCOMES)
        detail = ", ".join(f"{outcome} {number}" for outcome, number in counter.items())
        yield Row(
            "damage", f"{name}, {kind}", counter.total(), good, "; ".join([detail, *problems.get((name, kind), [])[:1]])
        )


GOOD_OUTCOMES = ("detected, step before restored", "harmless, same bits")


def _outcome(restore: Callable[[], Any], truth: Mapping[int, Any], newest: int, older: int) -> str:
    """Return what came of restoring, in words."""
    try:
        step, state, beside, named = restore()
    except TrialError as error:
        return f"lost: {error}"
    except Exception as error:
        return f"error: {type(error).__name__}: {str(error)[:200]}"
    if step not in truth:
        return f"wrong step: {step}"
    _, wanted, wanted_beside, _ = truth[step]
    problem = same_bits(state, wanted)
    if problem or beside != wanted_beside:
        return f"SILENTLY WRONG: {problem or 'another data position'}"
    if step == newest:
        return GOOD_OUTCOMES[1]
    return GOOD_OUTCOMES[0] if any(named) else "the step before, without a word"


def damaged_runs(soak: Soak) -> Iterator[Row]:
    """Damage the newest checkpoint of a stopped run; the command itself must name it and end with the same bits."""
    results: list[bool] = []
    failures: list[str] = []
    for kind in DAMAGES[1:2] if soak.quick else DAMAGES:

        def trial(kind: str = kind) -> None:
            config = soak.config(f"damaged-{kind.replace(' ', '-')}")
            workdir = config.parent / "run"
            stop = STEPS // 2
            with soak.start(config, workdir, f"--set=steps={stop}") as run:
                run.finish()
            data = [path for path in (workdir / "checkpoints" / str(stop) / "state").rglob("d/*") if path.is_file()]
            damage(max(data, key=lambda path: path.stat().st_size), kind, soak.rng)
            with soak.start(config, workdir) as run:
                run.finish()
                text = run.text()
            if f"checkpoints/{stop}" not in text or f"resuming from step {stop - SAVE_EVERY}" not in text:
                raise TrialError(f"the damage was not named, or the step before not used: {text[-600:]}")
            compare(workdir, soak.reference)

        results.append(attempt(soak, failures, trial))
    yield row(
        "damage", "a run with a damaged newest checkpoint names it and ends with the same bits", results, failures
    )


def full_disk(soak: Soak) -> Iterator[Row]:
    """Let the disk be full in the middle of a save.

    The checkpoints lie on a file system in memory of a few MB, mounted in a name space of its own, which a user may do
    on most Linux machines. Where that is not allowed, a limit on the size of files (`prlimit`) makes the writes fail.
    """
    failures: list[str] = []
    disk = soak.folder / "disk"
    disk.mkdir(exist_ok=True)
    config = soak.config("full", reading=5e-3)  # slow, so that the disk is free again before the end
    workdir = config.parent / "run"
    checkpoints = disk / "checkpoints"
    detail = ""

    def trial() -> None:
        nonlocal detail
        assert soak.reference  # before the clock of the other run is ticking
        with _small_disk(disk) as (prefix, outside):
            seen = outside / "checkpoints"
            if not prefix:
                detail = "writes refused beyond a size limit (no mount allowed here)"
            with soak.start(config, workdir, f"--set=checkpoint_dir={checkpoints}", prefix=prefix) as run:
                if not run.until(lambda: (seen / str(2 * SAVE_EVERY) / "manifest").is_dir()):
                    raise TrialError(f"it ended: {tail(run.text())}")
                size = sum(path.stat().st_size for path in (seen / str(2 * SAVE_EVERY)).rglob("*") if path.is_file())
                release = _fill(outside, size // 2) if prefix else _refuse(run.processes[0].pid, size // 4)
                if not run.until(lambda: "failed" in run.text() and "step" in run.text().partition("failed")[0]):
                    raise TrialError(f"no failed save was reported: {tail(run.text())}")
                whole = [int(path.name) for path in seen.iterdir() if path.name.isdigit()]
                kept = max(whole)
                problem = same_bits(read_state(workdir, kept, seen), read_state(soak.reference.workdir, kept))
                if problem:
                    raise TrialError(f"step {kept}, saved before, is no longer whole: {problem}")
                release()
                run.finish()
                said = next(line for line in run.text().splitlines() if "failed" in line)
                detail = detail or f"tmpfs; step {kept} whole meanwhile; it said: {said[:160]}"
                problem = same_bits(read_state(workdir, STEPS, seen), soak.reference.state)
                if problem:
                    raise TrialError(f"the end differs: {problem}")

    result = [attempt(soak, failures, trial)]
    yield row(
        "full disk",
        "in the middle of a save: the run goes on, says so, ends with the same bits",
        result,
        failures,
        detail,
    )


@contextlib.contextmanager
def _small_disk(disk: Path, megabytes: int = 16) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Mount a small file system at `disk` for some processes: the words before their command, and the way in for us."""
    script = f"mount -t tmpfs -o size={megabytes}m none {shlex.quote(str(disk))} && echo ready && exec sleep 100000"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    try:
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        yield (), disk
        return
    try:
        assert holder.stdout is not None
        if holder.stdout.readline().strip() == "ready":
            enter = ("nsenter", "--target", str(holder.pid), "--user", "--mount", "--preserve-credentials")
            yield (*enter, f"--wd={ROOT}"), Path(f"/proc/{holder.pid}/root{disk}")
        else:
            yield (), disk
    finally:
        holder.kill()
        holder.wait()


def _fill(disk: Path, leave: int) -> Callable[[], None]:
    """Fill a file system but for some bytes; return how to free it again."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    with filler.open("wb") as file, contextlib.suppress(OSError):  # a save under way may take the room first
        file.write(b"\0" * max(0, room.f_bavail * room.f_frsize - leave))
    return lambda: filler.unlink(missing_ok=True)


def _refuse(pid: int, size: int) -> Callable[[], None]:
    """Let a process write no file larger than `size`; return how to lift that again."""
    import resource

    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))

    def lift() -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    return lift


def signals(soak: Soak) -> Iterator[Row]:
    """Send the signals that ask for an end in every phase of a run; nothing may be lost."""
    phases = ("compiling", "a step", "a save", "an evaluation")
    for number, code in list(SIGNALS.items())[: 1 if soak.quick else None]:
        failures: list[str] = []
        results: list[bool] = []
        config = soak.config(f"signal-{number.name}", evaluating=2e-2)
        workdir = config.parent / "run"
        for phase in phases:

            def trial(
                phase: str = phase, number: signal.Signals = number, code: int = code, config: Path = config,
                workdir: Path = workdir,
            ) -> None:  # fmt: skip
                # Compiled anew, so that there is time to be hit in.
                environment = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if phase == "compiling" else {}
                with soak.start(config, workdir, environment=environment) as run:
                    conditions = {
                        "compiling": lambda: "compiling" in run.text(),
                        "a step": lambda: run.new_lines() > 2,
                        "a save": lambda: run.new_lines() > 0 and unfinished(workdir / "checkpoints"),
                        "an evaluation": lambda: (
                            run.new_lines() > 0 and any(note.name.startswith("evaluating") for note in notes(config))
                        ),
                    }
                    if not run.until(conditions[phase]):
                        raise TrialError(f"it ended before {phase}: {tail(run.text())}")
                    if phase == "compiling":
                        time.sleep(soak.rng.uniform(0, 0.5))
                    run.signal(number)
                    run.expect(code)
                    text = run.text()
                lines = losses(workdir)
                if "there is nothing to save" not in text:
                    saved = int(re.findall(r"saved step (\d+)", text)[-1])
                    if lines[-1]["step"] != saved or not (workdir / "checkpoints" / str(saved) / "manifest").is_dir():
                        raise TrialError(f"step {lines[-1]['step']} was done and step {saved} is said to be saved")
                elif lines:
                    raise TrialError("steps were done and nothing was saved")
                soak.say(f"  {number.name} in {phase}: exit {code}, {tail(text)[-70:]}")

            results.append(attempt(soak, failures, trial))

        def rest(config: Path = config, workdir: Path = workdir) -> None:
            with soak.start(config, workdir) as run:
                run.finish()
            compare(workdir, soak.reference)

        name = f"{number.name} in {', '.join(phases)}: exit {code}, nothing lost"
        yield row("signals", name, results, failures)
        failures = []
        yield row(
            "signals",
            f"{number.name}: the run after all of them has the same bits",
            [attempt(soak, failures, rest)],
            failures,
        )


def children(pid: int) -> list[int]:
    """Return the children of a process that run Python and read records."""

    def printed(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    found = [int(child) for child in printed("pgrep", "-P", str(pid)).split()]
    commands = {child: printed("ps", "-o", "command=", "-p", str(child)) for child in found}
    return [child for child, command in commands.items() if "python" in command and "resource_tracker" not in command]


def workers(soak: Soak) -> Iterator[Row]:
    """Kill a process that reads records."""
    results: list[bool] = []
    failures: list[str] = []
    details: Counter[str] = Counter()
    for number in range(1 if soak.quick else 3):

        def trial(number: int = number) -> None:
            config = soak.config(f"workers-{number}")
            workdir = config.parent / "run"
            with soak.start(config, workdir, "--set=workers=2") as run:
                wanted = soak.rng.randint(2, STEPS // 2)
                if not run.until(lambda: run.new_lines() >= wanted):
                    raise TrialError(f"it ended: {tail(run.text())}")
                found = children(run.processes[0].pid)
                if not found:
                    raise TrialError("there is no worker process")
                os.kill(soak.rng.choice(found), signal.SIGKILL)
                (code,) = run.codes()
                text = run.text()
            said = [line for line in text.splitlines() if "worker" in line]
            if not said:
                raise TrialError(f"not a word about the worker: {tail(text)}")
            if code:
                details["the run ended, and resumed"] += 1
                with soak.start(config, workdir, "--set=workers=2") as run:
                    run.finish()
            else:
                details["the worker was replaced, and the run went on"] += 1
            compare(workdir, soak.reference)

        results.append(attempt(soak, failures, trial))
    detail = ", ".join(f"{name} {count}" for name, count in details.items())
    yield row("data", "kill -9 of a worker process: said, same bits at the end", results, failures, detail)


def corrupt(soak: Soak) -> Iterator[Row]:
    """Read a record that cannot be decoded: stop and name it, or skip and count it."""
    from train import data

    index = soak.rng.randrange(RECORDS)
    order = data.batches(data.arrays(index=np.arange(RECORDS)), batch_size=BATCH, seed=0)
    expected = sum(int((next(order)["index"] == index).sum()) for _ in range(STEPS))
    getattr(order, "close", lambda: None)()

    def stop() -> None:
        config = soak.config("corrupt-stop", corrupt=index)
        with soak.start(config, config.parent / "run") as run:
            (code,) = run.codes()
            text = run.text()
        if code == 0 or not re.search(rf"record {index}\b", text):
            raise TrialError(f"exit code {code}, and it said: {tail(text)}")

    def skip() -> None:
        config = soak.config("corrupt-skip", corrupt=index)
        workdir = config.parent / "run"
        with soak.start(config, workdir, "--set=on_corrupt=skip") as run:
            run.finish()
            text = run.text()
        counted = losses(workdir)[-1].get("train/corrupt_records")
        if counted != expected or not re.search(rf"\b{index}\b", text):
            raise TrialError(f"{counted} corrupt records were counted and not {expected}; it said: {tail(text)}")

    for name, trial in (("stop: ended, the record named", stop), ("skip: named, and each time counted", skip)):
        failures: list[str] = []
        detail = f"record {index}, {expected} times" if trial is skip else f"record {index}"
        yield row("data", f"a corrupt record, {name}", [attempt(soak, failures, trial)], failures, detail)


def two_runs(soak: Soak) -> Iterator[Row]:
    """Start a second run in the directory of a first."""
    failures: list[str] = []

    def trial() -> None:
        config = soak.config("two")
        workdir = config.parent / "run"
        with soak.start(config, workdir) as run:
            if not run.until(lambda: run.new_lines() > 2):
                raise TrialError(f"it ended: {tail(run.text())}")
            run.signal(signal.SIGSTOP)  # the first must still be there when the second comes
            other = Running(
                [run_command(soak, config, workdir)],
                soak.environment,
                config,
                workdir.with_name("second"),
                soak.patience,
            )
            with other:
                other.expect(2)
                text = other.text()
            run.signal(signal.SIGCONT)
            run.finish()
        if str(workdir) not in text:
            raise TrialError(f"it said: {tail(text)}")
        compare(workdir, soak.reference)

    yield row(
        "two runs",
        "the second in a directory is refused, the first unharmed",
        [attempt(soak, failures, trial)],
        failures,
    )


def run_command(soak: Soak, config: Path, workdir: Path) -> list[str]:
    """Return the command of a run on 8 devices."""
    data, fsdp, tensor = MESHES[8]
    mesh = [f"--set=mesh.data={data}", f"--set=mesh.fsdp={fsdp}", f"--set=mesh.tensor={tensor}"]
    return [*soak.program, str(config), "--workdir", str(workdir), "--devices", "8", *mesh]


def checks(count: int) -> dict[str, Callable[[Soak], Iterator[Row]]]:
    """Return all checks by name, with so many kills in the first."""
    return {
        "kills": lambda soak: kills(soak, count),
        "devices": devices,
        "ranks": ranks,
        "files": lambda soak: files(soak, 1 if soak.quick else 3),
        "damaged_runs": damaged_runs,
        "full_disk": full_disk,
        "signals": signals,
        "workers": workers,
        "corrupt": corrupt,
        "two_runs": two_runs,
    }


# ---- the report


def table(rows: Sequence[Row]) -> list[str]:
    """Return rows as a Markdown table."""
    cell = [[row.name, str(row.trials), str(row.passed), row.detail] for row in rows]
    escaped = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in cell]
    return [
        "| what was done | trials | passed | |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(line)} |" for line in escaped),
    ]


HEADINGS = {
    "kill -9": "Killed",
    "other devices": "Other devices and processes",
    "processes": "One of several processes",
    "damage": "Damaged checkpoints",
    "full disk": "Full disk",
    "signals": "Signals",
    "data": "Data",
    "two runs": "Two runs in one directory",
}


def damage_table(rows: Sequence[Row]) -> list[str]:
    """Return what came of damage, a line for each kind of file and a column for each kind of damage."""
    cells: dict[str, dict[str, Row]] = {}
    for one in rows:
        name, _, kind = one.name.rpartition(", ")
        cells.setdefault(name, {})[kind] = one

    def words(found: Row | None) -> str:
        if found is None:
            return ""
        return found.detail if found.passed == found.trials else f"**{found.passed} of {found.trials}**: {found.detail}"

    lines = [f"| file | {' | '.join(DAMAGES)} |", "| --- " * (1 + len(DAMAGES)) + "|"]
    return lines + [
        f"| `{name}` | {' | '.join(words(found.get(kind)).replace('|', '/') for kind in DAMAGES)} |"
        for name, found in cells.items()
    ]


def report(rows: Sequence[Row], *, command: str, seconds: float, cut: Sequence[str] = ()) -> str:
    """Return the report as Markdown."""
    from train.progress import current_versions

    trials, passed = sum(one.trials for one in rows), sum(one.passed for one in rows)
    verdict = "Everything came out as promised." if trials == passed else f"**{trials - passed} trials failed.**"
    known = {name: version for name, version in current_versions().items() if re.match(r"\d", version)}
    versions = ", ".join(f"{name} {version}" for name, version in known.items() if name not in ("devices", "processes"))
    lines = [
        "# What a run survives",
        "",
        f"{verdict} {passed} of {trials} trials passed in {seconds / 60:.0f} minutes.",
        "",
        f"- Command: `{command}`, on {os.cpu_count()} CPU cores; written by the command.",
        f"- Versions: {versions}.",
        f"- Trained: a window transformer on {RECORDS} handwritten digits, {STEPS} steps, saved every {SAVE_EVERY},",
        "  by `python -m train` on 8 virtual CPU devices (data 2, fsdp 2, tensor 2) unless said otherwise.",
        "- Same bits: every array of the last checkpoint (parameters, optimiser, step), read from disk by Orbax alone,",
        "  and every logged loss are those of a run that nobody disturbed.",
    ]
    if cut:
        lines.append(f"- The time was over before all was done; cut short or left out: {', '.join(cut)}.")
    for check, heading in HEADINGS.items():
        own = [one for one in rows if one.check == check]
        if not own:
            continue
        lines += ["", f"## {heading}", ""]
        if check == "damage":
            of_files = [one for one in own if one.name.endswith(tuple(f", {kind}" for kind in DAMAGES))]
            rest = [one for one in own if one not in of_files]
            if of_files:
                count = sum(one.trials for one in of_files)
                lines += [
                    f"Every file of the newest checkpoint in turn, {count} restores:",
                    "",
                    *damage_table(of_files),
                    "",
                ]
            own = rest
        if own:
            lines += table(own)
    return "\n".join(lines).rstrip() + "\n"


def soak_all(soak: Soak, chosen: Mapping[str, Callable[[Soak], Iterator[Row]]]) -> list[Row]:
    """Make the chosen checks in turn; return their rows."""
    rows: list[Row] = []
    for name, check in chosen.items():
        if soak.late(name):
            continue
        soak.say(f"{name} ...")
        began = time.monotonic()
        found: list[Row] = []
        try:
            found.extend(check(soak))
        except TrialError as error:
            found.append(Row(name, name, 1, 0, f"could not be carried out: {error}"))
        rows += found
        passed, trials = sum(one.passed for one in found), sum(one.trials for one in found)
        soak.say(f"{name}: {passed} of {trials} passed, {time.monotonic() - began:.0f} s")
    return rows


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(prog="python -m tools.soak", description=(__doc__ or "").splitlines()[0])
    result.add_argument("--kills", type=int, default=50, help="how often a run is killed (default: 50)")
    result.add_argument("--minutes", type=float, help="begin no further trial after so long")
    result.add_argument("--seed", type=int, default=0, help="of every random moment and place")
    result.add_argument("--quick", action="store_true", help="one trial where there would be several")
    result.add_argument("--only", metavar="NAMES", help=f"some of: {','.join(checks(0))}")
    result.add_argument("--report", type=Path, help="write the report there, as Markdown")
    result.add_argument("--folder", type=Path, help="keep the runs there (default: a temporary directory)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if every trial passed."""
    options = parser().parse_args(arguments)
    known = checks(options.kills)
    names = options.only.split(",") if options.only else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"error: --only {unknown[0]} must be one of {', '.join(known)}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxlayers-soak-")))
        soak = Soak(folder.absolute(), seed=options.seed, minutes=options.minutes, quick=options.quick)
        rows = soak_all(soak, {name: known[name] for name in names})
        words = [f"--kills {options.kills}", f"--seed {options.seed}", "--quick" if options.quick else ""]
        words += [f"--only {options.only}" if options.only else ""]
        words += [f"--minutes {options.minutes:g}" if options.minutes is not None else ""]
        text = report(
            rows,
            command=" ".join(["python -m tools.soak", *filter(None, words)]),
            seconds=time.monotonic() - began,
            cut=soak.cut,
        ).replace(f"{soak.folder}/", "")
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text)
    else:
        print(text)
    return 0 if rows and all(one.passed == one.trials for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
