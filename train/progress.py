"""What a run tells the user: the progress bar, `metrics.jsonl`, TensorBoard, and what it was started with."""

import datetime
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import rich.console
import rich.progress

Line = dict[str, Any]


class Log:
    """Metrics as `metrics.jsonl` and TensorBoard: `{"step": 10, "train/loss": ..., "test/accuracy": ...}` a line.

    Opened at step `start` it first drops what an earlier, killed run wrote after that step, so that no step appears
    twice. `history` holds all lines. With `folder=None` (any process but the first) it keeps the history only. With
    `wandb` the metrics also go to that project of Weights & Biases.
    """

    def __init__(self, folder: Path | None, start: int, *, wandb: str | None = None) -> None:
        self.history: list[Line] = []
        self._file: io.BufferedRandom | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._last_line = 0
        if folder is None:
            return
        if wandb is not None:
            self._wandb = _wandb_run(wandb, folder)
        self._path = folder / "metrics.jsonl"
        self.history = [line for line in read_history(self._path) if line["step"] <= start]
        self._open()
        self._board = _summary_writer()(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def _open(self) -> None:
        """Write the history as the file, and go on at its end."""
        _write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self.history))
        self._file = file = self._path.open("r+b")
        file.seek(0, os.SEEK_END)
        if self.history:
            self._last_line = file.tell() - len(json.dumps(self.history[-1])) - 1

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`."""
        self.history = [line for line in self.history if line["step"] <= step]
        if self._file is not None:
            self._file.close()
            self._open()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add `values` to the line of `step`, the last line or a new one."""
        # JSON has no NaN and no infinity.
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        again = bool(self.history) and self.history[-1]["step"] == step
        line = {**(self.history.pop() if again else {"step": step}), **clean}
        self.history.append(line)
        if self._file is None or self._board is None:
            return
        if again:
            self._file.seek(self._last_line)
            self._file.truncate()
        self._last_line = self._file.tell()
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(clean), step=step)

    def has(self, step: int, prefix: str) -> bool:
        """Return whether the line of `step` holds a value whose name starts with `prefix`."""
        return any(line["step"] == step and any(name.startswith(prefix) for name in line) for line in self.history)

    def close(self) -> None:
        """Close the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_history(path: Path) -> list[Line]:
    """Return the lines of a `metrics.jsonl`, without a last one that a killed run left half written."""
    history: list[Line] = []
    if not path.exists():
        return history
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        history.append(line)
    return history


class Progress:
    """A bar with throughput, ETA and the last metrics; on a pipe or in a file, a plain line every few seconds."""

    QUIET_SECONDS = 5.0

    def __init__(self, *, start: int, steps: int, batch_size: int, silent: bool = False) -> None:
        self.silent = silent
        self._steps, self._batch_size = steps, batch_size
        self._console = rich.console.Console(quiet=silent, soft_wrap=True, highlight=False)
        self._bar: rich.progress.Progress | None = None
        self._seen, self._rate, self._clock, self._printed = start, 0.0, 0.0, -math.inf
        if self._console.is_terminal and not silent:
            self._bar = rich.progress.Progress(
                rich.progress.MofNCompleteColumn(),
                rich.progress.BarColumn(bar_width=14),  # all of it fits 80 characters
                rich.progress.TextColumn("{task.fields[rate]}"),
                rich.progress.TextColumn("eta"),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, rate="", metrics="")

    def __enter__(self) -> "Progress":
        self._clock = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def pause(self) -> None:
        """Leave the time since the last step (compilation, evaluation) out of the throughput."""
        self._clock = time.perf_counter()

    def rewind(self, step: int) -> None:
        """Count from an earlier step again."""
        self._seen = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def update(self, step: int) -> float:
        """Count the steps up to `step`, which just ended; return the smoothed examples per second."""
        now = time.perf_counter()
        if step > self._seen:
            latest = (step - self._seen) * self._batch_size / max(now - self._clock, 1e-9)
            self._rate = latest if self._rate == 0 else 0.9 * self._rate + 0.1 * latest
            self._seen = step
        self._clock = now
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=f"{self._rate:,.0f} ex/s")
        return self._rate

    def show(self, step: int, values: Mapping[str, float], *, always: bool = False) -> None:
        """Show metrics on the bar, or as a plain line unless the last one is too recent (`always`: even then)."""
        text = words(values)
        if self._bar is not None and not always:
            self._bar.update(self._task, metrics=text)
            return
        if not always and time.perf_counter() - self._printed < self.QUIET_SECONDS:
            return
        self._printed = time.perf_counter()
        if step < self._steps and self._rate:
            left = datetime.timedelta(seconds=round((self._steps - step) * self._batch_size / self._rate))
            text = f"{text}  {self._rate:,.0f} examples/s  eta {left}"
        self.say(f"step {step:>{len(str(self._steps))}}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False)
        self._console.file.flush()


class Tracer:
    """Writes a profiler trace of the steps from `steps[0]` to `steps[1]` into a folder, for XProf or Perfetto."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        self._folder, self._steps, self._active = folder, steps, False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Start or stop the trace, before a step is taken."""
        if self._steps is None:
            return
        first, last = self._steps
        if step > last:
            self._stop()
        elif step >= first and not self._active:
            jax.profiler.start_trace(str(self._folder))
            self._active = True

    def _stop(self) -> None:
        if self._active:
            jax.profiler.stop_trace()
            self._active, self._steps = False, None


def words(values: Mapping[str, float]) -> str:
    """Return `loss 0.1234  accuracy 0.9812`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def table(result: Mapping[str, float], beside: Mapping[str, float]) -> list[str]:
    """Return the result, then what stands beside it, one aligned line each."""
    width = max((len(name) for name in (*result, *beside)), default=0)
    lines = [f"{name:<{width}}  {value:.4f}" for name, value in result.items()]
    if beside:
        lines += ["beside it:", *(f"{name:<{width}}  {value:.4f}" for name, value in beside.items())]
    return lines


def write_notes(workdir: Path, described: str) -> list[str]:
    """Write what the run is and runs on: `config.txt`, `versions.json` and a line of `command.txt`.

    Returns:
      What differs from the notes of an earlier run in the same directory, a sentence each.
    """
    versions = current_versions()
    changes = []
    path = workdir / "versions.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except json.JSONDecodeError:
            before = {}
        moved = {name: now for name, now in versions.items() if before.get(name, now) != now}
        changes += [f"{name} was {before[name]}, is {now}" for name, now in moved.items()]
    changes += changed_lines(workdir, described)
    _write_whole(path, json.dumps(versions, indent=2) + "\n")
    _write_whole(workdir / "config.txt", described)
    with (workdir / "command.txt").open("a") as file:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.write(f"{now}  {shlex.join(sys.orig_argv)}\n")
    return changes


def changed_lines(workdir: Path, described: str) -> list[str]:
    """Return the fields in which `described` differs from the `config.txt` of `workdir`, if there is one."""
    path = workdir / "config.txt"
    if not path.exists():
        return []

    def fields(text: str) -> dict[str, str]:
        return {name: value for name, _, value in (line.partition(" = ") for line in text.splitlines())}

    before, now = fields(path.read_text()), fields(described)
    names: Sequence[str] = [*now, *(name for name in before if name not in now)]
    return [
        f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def current_versions() -> dict[str, str]:
    """Return the versions and the device that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in ("jaxlayers", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["git"] = git_revision(Path(__file__).parent)
    device = jax.devices()[0]
    versions["devices"] = f"{jax.device_count()} {device.device_kind} ({device.platform})"
    versions["processes"] = str(jax.process_count())
    return versions


def git_revision(folder: Path) -> str:
    """Return the commit that the sources in `folder` are at, `+changes` where they differ, or `none`."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def check_wandb(project: str | None) -> None:
    """Raise where the package is missing; every process asks, so that none waits for one that has stopped.

    Raises:
      ValueError: if a project is named and the package cannot be imported.
    """
    if project is not None:
        try:
            importlib.import_module("wandb")
        except ImportError:
            raise ValueError(f"--wandb {project} needs the package wandb; install it: pip install wandb") from None


def _wandb_run(project: str, folder: Path) -> Any:
    import wandb

    # The folder's path names the run, so that a resumed run goes on in the same one.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, id=identity, resume="allow", dir=str(folder))


def _summary_writer() -> Any:
    """Return the class that writes TensorBoard's files, without the PyTorch that it would load where that exists."""
    if "torch" in sys.modules:
        from tensorboardX import SummaryWriter

        return SummaryWriter
    sys.modules["torch"] = None  # type: ignore[assignment]  # importing it now fails, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        del sys.modules["torch"]
    return SummaryWriter


def _write_whole(path: Path, text: str) -> None:
    """Write so that a kill leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
