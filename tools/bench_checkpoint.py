"""Saving and restoring a state, verified, beside Orbax alone and plain files; see `tools.bench`."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench_measure import OURS, Job, Measured, Page, Session, curve, markdown, ratio
from tools.bench_worker import Program, Ready

AGAINST = ("orbax", "files")
PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "numpy")
HERE = "tools.bench_checkpoint"
PHASES = ("save until it returns", "save until written", "restore")

TEXT = """
The state is float32 arrays of 4 MiB each, random, so that they do not compress. "Save until it returns" is what
training waits for; "until written" ends when the step is complete on disk; "restore" ends with the arrays in memory.
`train.checkpoint.Checkpointer` writes through Orbax, and besides computes a digest of every leaf, and compares all of
them when it restores. Orbax is `StandardCheckpointer` with its defaults. Plain files are `numpy.save` and `numpy.load`
of every array, without a rename or anything else that makes a save safe. Every save is into a fresh folder, made and
removed outside of the time. Nothing is forced to the medium: rates are those of the system's file cache.
"""


def state_of(mebibytes: int) -> dict[str, Any]:
    """Return arrays of so many bytes in all, in leaves of at most 4 MiB."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    leaves = max(1, mebibytes // 4)
    rows = mebibytes * 2**18 // leaves // 256
    drawn = {f"layer_{index}": rng.standard_normal((rows, 256), dtype=np.float32) for index in range(leaves)}
    return jax.block_until_ready(jax.device_put(drawn))


class _Plain:
    """One file for each array."""

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        import numpy as np

        folder.mkdir()
        for name, leaf in state.items():
            np.save(folder / f"{name}.npy", np.asarray(leaf))

    def wait(self) -> None:
        pass

    def restore(self, folder: Path, state: dict[str, Any]) -> Any:
        import jax
        import numpy as np

        return jax.device_put({name: np.load(folder / f"{name}.npy") for name in state})


class _Orbax:
    """Orbax with its defaults."""

    def __init__(self) -> None:
        import orbax.checkpoint as ocp

        self._orbax = ocp.StandardCheckpointer()

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        self._orbax.save(folder, state)

    def wait(self) -> None:
        self._orbax.wait_until_finished()

    def restore(self, folder: Path, state: dict[str, Any]) -> Any:
        import jax

        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        return self._orbax.restore(folder, like)


class _Ours:
    """The trainer's checkpoints; each folder has a Checkpointer, since one goes on in the folder that it began in."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def ready(self, folder: Path) -> None:
        from train.checkpoint import Checkpointer

        for old in self._open.values():
            old.close()
        self._open = {folder: Checkpointer(folder)}

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        self._open[folder].save(1, state, data={})

    def wait(self) -> None:
        next(iter(self._open.values())).wait()

    def restore(self, folder: Path, state: dict[str, Any]) -> Any:
        import jax

        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        found = self._open[folder].restore(like)
        assert found is not None
        return found.state


def programs(kind: str, mebibytes: Sequence[int], folder: str) -> list[Program]:
    """Return the phases of a writer for states of several sizes."""
    import jax
    import numpy as np

    writer: Any = {"ours": _Ours, "orbax": _Orbax, "files": _Plain}[kind]()
    base = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=folder))
    made = []

    def saved(state: dict[str, Any]) -> tuple[Path, float, float]:
        """Save into the one folder there is; return the seconds until the call returned and until all was written."""
        shutil.rmtree(base / "step", ignore_errors=True)
        if hasattr(writer, "ready"):
            writer.ready(base / "step")
        start = time.perf_counter()
        writer.save(base / "step", state)
        returned = time.perf_counter() - start
        writer.wait()
        return base / "step", returned, time.perf_counter() - start

    for size in mebibytes:
        state = state_of(size)

        def restored(state: Any = state) -> float:
            place, _, _ = saved(state)
            start = time.perf_counter()
            found = jax.block_until_ready(writer.restore(place, state))
            seconds = time.perf_counter() - start
            for name, leaf in state.items():
                np.testing.assert_array_equal(found[name], leaf)
            return seconds

        turns = (lambda state=state: saved(state)[1], lambda state=state: saved(state)[2], restored)  # type: ignore[misc]
        for phase, turn in zip(PHASES, turns, strict=True):
            made.append(Program(f"{phase} {size}", lambda turn=turn: Ready(turn)))  # type: ignore[misc]
    return made


def rates(found: Sequence[Measured]) -> str:
    """Return the table of rates, ours first, with the ratios."""
    rows = []
    own = {one.name: one for one in found if one.label == OURS}
    for name, ours in own.items():
        size = float(name.rsplit(" ", 1)[1])
        for one in (one for one in found if one.name == name):
            times = "" if one is ours else str(ratio(ours.seconds, one.seconds))
            speed = f"{size * 2**20 / 1e6 / one.median:,.0f} MB/s"
            rows.append([name.rsplit(" ", 1)[0], f"{size:.0f} MiB", one.label, speed, times])
    return markdown(["phase", "state", "by", "rate", "their time / ours (range)"], rows)


def bench(session: Session, against: Sequence[str], quick: bool) -> Page:
    """Measure and return the page."""
    page = Page("checkpoint", "Checkpoints", PACKAGES, TEXT)
    sizes = (1, 2) if quick else (16, 64, 256)
    names = {"ours": OURS, "orbax": "Orbax", "files": "plain files"}
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        jobs = [
            Job(
                names[kind],
                HERE,
                "programs",
                {"kind": kind, "mebibytes": sizes, "folder": folder},
                imports=("jax", "orbax.checkpoint"),
            )
            for kind in ("ours", *against)
        ]
        found = session.measure(jobs)
    page.found = [one for one in found if one.name.endswith(f" {sizes[-1]}")]
    page.tables["Rates"] = rates(found)
    for job in jobs:
        for phase in PHASES[1:]:
            page.curves.append(
                curve(found, job.label, phase, title=phase.capitalize(), x_name="MiB", shown=f"{phase}, {job.label}")
            )
    return page
