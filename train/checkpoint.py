"""Checkpoints that are atomic, verified on restore, and readable on any mesh.

Longer than most files: what is written (digests, manifest, data positions) and what a restore checks and says of each
kind of damage are two sides of one format, and are changed together.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

__all__ = ["Checkpointer", "DamageError", "Restored", "SaveError", "Skipped", "Step", "find_step"]

_LOG = logging.getLogger(__name__)
_TEMPORARY = ".orbax-checkpoint-tmp"
_REMOVING = ".removing-"
_DAMAGED = "damaged"
_MANIFEST = "manifest.json"
_COMMITTED = "commit_success.txt"  # Orbax writes it last
_FORMAT = 1
_STEP = r"(0|[1-9]\d*)"
_SETTLE_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        step: the step it was saved at.
        state: the state, with the structure and shardings that were asked for.
        data: the data position as it was given to `save` (through JSON, so tuples come back as lists).
        metrics: the metrics as they were given to `save`, empty if there were none.
    """

    step: int
    state: Any
    data: dict[str, Any]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A checkpoint that `restore` passed over.

    Attributes:
        step: its step.
        path: its directory.
        reason: what is wrong with it; names the damaged leaf where the damage lies in one.
    """

    step: int
    path: str
    reason: str


class SaveError(RuntimeError):
    """A step could not be written; earlier steps are whole, and later ones can be saved.

    Attributes:
        step: the step.
    """

    def __init__(self, step: int, text: str) -> None:
        super().__init__(text)
        self.step = step


class DamageError(Exception):
    """A checkpoint cannot be trusted; the message says why."""


class _OrbaxQuiet(logging.Filter):
    """Drops what Orbax logs below ERROR; what others log through the same logger stays."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns False for the records to drop."""
        return record.levelno >= logging.ERROR or not _is_orbax(record.pathname)


def _is_orbax(text: str) -> bool:
    """Tells whether a text names a source file of Orbax."""
    return "/orbax/" in text.replace("\\", "/")


class _TasksQuiet(logging.Filter):
    """Drops what asyncio says of Orbax's and TensorStore's tasks that failed beside the one whose error was raised."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns False for the records to drop."""
        text = str(record.msg)
        return "exception was never retrieved" not in text or not (_is_orbax(text) or "tensorstore" in text)


_QUIET = {"absl": _OrbaxQuiet(), "asyncio": _TasksQuiet()}


def _quieten() -> None:
    """Puts the filters in place, once."""
    for name, quiet in _QUIET.items():
        if quiet not in logging.getLogger(name).filters:
            logging.getLogger(name).addFilter(quiet)


@contextlib.contextmanager
def _quiet_reads() -> Iterator[None]:
    """Silences what the other reads of a restore say once one of them has failed; the failure itself is raised.

    They run on in TensorStore's threads and in tasks that nobody awaits any more, find the event loop closed, and
    report that one by one. As this may come at any later time, the hook stays in place after a failure.
    """
    _quieten()
    previous = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        late = unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine that was dropped unfinished
        if not late and (code is None or not _is_orbax(code.co_filename)):
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        warnings.filterwarnings("ignore", r"coroutine 'Store\._\w+' was never awaited", RuntimeWarning)
        raise
    if sys.unraisablehook is hook:
        sys.unraisablehook = previous


class Checkpointer:
    """Saves training state asynchronously and restores the newest step that is provably intact.

    Every step is one directory `<directory>/<step>` that appears by an atomic rename once it is complete. Beside the
    arrays it holds a manifest with the data position, the metrics, and for every leaf its shape, dtype and digest.
    The manifest bears its own SHA-256. On restore everything is compared: array files carry no checksum of their own,
    and a flipped bit in them would otherwise be trained on without a word.

    The digest of a leaf is `sum_i w_i x_i mod 2^64` over its 32-bit (or narrower) words `x_i` with fixed odd
    pseudo-random 64-bit weights `w_i` of the word's place in the *global* array. It is a sum, so each process adds up
    its own shards and the result does not depend on the mesh. A change of any single word always changes it; several
    changed words cancel with a chance of about `2^-32`.

    Attributes:
        directory: where the steps lie.
        skipped: the checkpoints the last `restore` passed over, newest first.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_best: int = 1,
        metric: str | None = None,
        mode: str = "max",
    ) -> None:
        """Opens a checkpoint directory; nothing on disk changes before the first `save`.

        Args:
            directory: where the steps lie, made by the first `save`: a folder, or `gs://bucket/folder` (which needs
                the package gcsfs). Other stores can be used where they are mounted as a folder.
            keep_last: how many of the newest steps to keep, at least 1. While a save is under way there is one more.
            keep_every: steps that are multiples of it stay for good; None keeps none so.
            keep_best: how many of the best steps to keep besides them; needs `metric`.
            metric: the name of the metric that ranks steps; None ranks nothing. Steps saved without it, or with a
                value that is not finite, are never the best.
            mode: "max" if larger is better, "min" if smaller is.

        Raises:
            ValueError: if a count is too small, or the mode or the kind of store unknown.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1; the newest step is what a run resumes from")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every={keep_every} must be at least 1; set None to keep no step for good")
        if keep_best < 0:
            raise ValueError(f"keep_best={keep_best} must not be negative; set 0 to keep no best step")
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r} must be 'max' or 'min'; set mode")
        scheme = re.match(r"(\w+)://", str(directory))
        if scheme is not None and scheme[1] != "gs":
            raise ValueError(
                f"directory={str(directory)!r} must be a folder or gs://bucket/folder; mount the store as a folder"
            )
        self._is_store = scheme is not None  # it renames nothing, and a step bears its name from the start
        self.directory = epath.Path(directory)
        if not self._is_store:  # the address of a store would become a name in the working directory
            self.directory = self.directory.absolute()
        self.skipped: list[Skipped] = []
        self._keep_last, self._keep_every, self._keep_best = keep_last, keep_every, keep_best
        self._metric, self._mode = metric, mode
        self._handled: int | None = None  # the newest step that this object saved or restored
        self._pending: int | None = None  # the step whose save has not been confirmed yet
        self._tidied = False
        self._damaged: set[int] = set()  # steps to move aside before the next save
        self._manifests: dict[int, dict[str, Any]] = {}
        _quieten()
        # Replicas share the writing where that spreads it over hosts; on one, slicing them costs more than it gives.
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                manifest=ocp.JsonCheckpointHandler(filename=_MANIFEST),
            )
        )

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *unused: object) -> None:
        """Closes."""
        self.close()

    def steps(self) -> list[int]:
        """Returns the committed steps, newest first; empty, foreign and unfinished directories are not among them."""
        return [step for step, path in self._candidates() if _missing_part(path) is None]

    def best_step(self) -> int | None:
        """Returns the committed step with the best metric, or None if no step has one."""
        return next(iter(self._ranked(self.steps())), None)

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Starts saving a step; returns once the state has been copied, so that it may be donated.

        The write goes on in the background. If it fails, the next call of `save`, `wait`, `restore` or `close` raises;
        a `save` that raises for an earlier step has not started its own: call it again.

        Args:
            step: the step number, larger than any saved before.
            state: a pytree of `jax.Array`s: parameters, optimiser, step, random keys and other collections.
            data: the data position; anything that JSON can hold.
            metrics: numbers that rank this step.

        Returns:
            True if a save was started, False if this very step was already saved or restored by this object.

        Raises:
            ValueError: if the step is not newer than what is on disk, or something cannot be stored.
            SaveError: if this save, or the one before it, failed; names the step that did.
        """
        step = int(step)
        if step < 0:
            raise ValueError(f"step={step} must not be negative; count steps from 0")
        content = {
            "format": _FORMAT,
            "step": step,
            "data": _as_json(data, "data"),
            "metrics": _as_json({name: float(value) for name, value in (metrics or {}).items()}, "metrics"),
        }
        leaves = _named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(
                    f"state leaf {name!r} must be a jax.Array, got {type(leaf).__name__}; "
                    "create the whole state under jax.jit"
                )
        self._finish()
        if step == self._handled:
            return False
        self._tidy()
        newest = next(iter(self.steps()), -1)
        if step <= newest:
            raise ValueError(
                f"step={step} must be newer than step {newest} saved in {self.directory}; "
                "restore first, or save into an empty directory"
            )
        jax.block_until_ready(state)
        stored = {name: _without_keys(leaf) for name, leaf in leaves.items()}
        content["leaves"] = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest}
            for (name, leaf), digest in zip(leaves.items(), _digests(stored), strict=True)
        }
        manifest = {"sha256": _checksum(content), "content": content}
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(_nest(stored)), manifest=ocp.args.JsonSave(manifest))

        def start() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._orbax.save(self.directory / str(step), args=arguments)

        self._try_to_save(step, start)
        self._pending = self._handled = step
        return True

    def wait(self) -> None:
        """Blocks until the last save is on disk and steps that are no longer kept are gone.

        Raises:
            SaveError: if the save failed; names its step.
        """
        self._finish()

    def close(self) -> None:
        """Waits, then releases the threads.

        Raises:
            SaveError: if the last save failed; names its step.
        """
        try:
            self._finish()
        finally:
            self._orbax.close()

    def restore(self, like: Any, *, step: int | None = None, cast: bool = False) -> Restored | None:
        """Restores the newest intact step onto the given shardings, whatever mesh it was saved on.

        Damaged, half-written and empty steps are named by a warning, listed in `skipped`, and passed over.
        They stay on disk; the next `save` moves them into `damaged/`.

        Args:
            like: a pytree of `jax.ShapeDtypeStruct`s (or arrays) with the wanted structure, shapes, dtypes and
                shardings.
            step: restore this step only.
            cast: turn floating numbers of another width into those of `like`, after the comparison with the digests;
                False refuses them.

        Returns:
            The checkpoint, or None if there is no intact one.

        Raises:
            ValueError: if the newest intact step holds other leaves, shapes or dtypes than `like`: that is a changed
                model and not damage, so no older step is tried. Also if the `step` asked for is missing or damaged.
            SaveError: if a save still under way fails.
        """
        self._finish()
        self.skipped = []
        wanted = _named_leaves(like)
        candidates = self._candidates()
        if step is not None:
            candidates = [(found, path) for found, path in candidates if found == step]
            if not candidates:
                raise ValueError(f"step={step} must be one of {self.steps()} saved in {self.directory}; choose one")
        else:
            for found, path in self._unfinished():
                self._skip(found, path, "half-written: the save was cut off before it was committed")
        for found, path in candidates:
            try:
                restored = self._restore_step(found, path, wanted, like, cast)
            except DamageError as damage:
                if step is not None:
                    raise ValueError(
                        f"step={step} must be intact, but {damage}; choose one of {self.steps()} or step=None"
                    ) from damage
                self._skip(found, path, str(damage))
                self._damaged.add(found)
                self._tidied = False
                continue
            if step is None:
                self._handled = found
            return restored
        if self.skipped:
            _LOG.warning("no intact checkpoint in %s", self.directory)
        return None

    def _restore_step(self, step: int, path: epath.Path, wanted: dict[str, Any], like: Any, cast: bool) -> Restored:
        """Restores and verifies one step."""
        problem, found = None, None
        try:
            found = Step.open(step, path)
        except DamageError as damage:
            problem = str(damage)
        _agree(problem)
        assert found is not None
        _check_structure(path, found.leaves, wanted, cast)
        arrays = found.read(wanted)
        leaves = [_with_keys(_cast(arrays[name], leaf), leaf) for name, leaf in wanted.items()]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Restored(step=step, state=state, data=found.content["data"], metrics=found.content["metrics"])

    def _candidates(self) -> list[tuple[int, epath.Path]]:
        """Lists what bears a step's name, newest first, whether or not it is intact."""
        return [(step, path) for step, path in self._named(_STEP) if self._is_whole(path)]

    def _unfinished(self) -> list[tuple[int, epath.Path]]:
        """Lists what interrupted saves left behind, newest first."""
        begun = [(step, path) for step, path in self._named(_STEP) if not self._is_whole(path)]
        return sorted(begun + self._named(rf"(\d+){re.escape(_TEMPORARY)}.*"), reverse=True)

    def _named(self, pattern: str) -> list[tuple[int, epath.Path]]:
        """Lists the entries whose name matches, with the step in it, newest first."""
        if not self.directory.exists():
            return []
        found = ((re.fullmatch(pattern, path.name), path) for path in self.directory.iterdir())
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def _is_whole(self, path: epath.Path) -> bool:
        """Tells whether a step was once complete: a folder gets its name only then, in a store it needs the file."""
        return not self._is_store or (path / _COMMITTED).exists()

    def _skip(self, step: int, path: epath.Path, reason: str) -> None:
        """Names a checkpoint that is passed over."""
        self.skipped.append(Skipped(step=step, path=str(path), reason=reason))
        _LOG.warning("skipped checkpoint %s: %s", path, reason)

    def _finish(self) -> None:
        """Confirms the pending save, then removes the steps that are no longer kept."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        self._try_to_save(step, self._orbax.wait_until_finished)
        self._prune()

    def _try_to_save(self, step: int, action: Callable[[], None]) -> None:
        """Does a part of a save; if it fails on any process, clears away what there is and raises on all of them."""
        problem, cause = None, None
        try:
            action()
        except Exception as error:
            problem, cause = _first_line(error), error
        problem = _shared(problem)
        if problem is None:
            return
        self._handled = None
        self._tidied = False  # whatever appears later, the next save clears away
        self._settle()
        _synchronise("settled")
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                for found, path in self._unfinished():
                    if found == step:
                        path.rmtree(missing_ok=True)
        _synchronise("cleared")
        raise SaveError(
            step,
            f"saving step {step} in {self.directory} failed ({problem}); earlier steps are untouched: "
            "free disk space or check the directory",
        ) from cause

    def _settle(self) -> None:
        """Waits for the threads of a failed save: Orbax raises at the first that fails, while others still write.

        They would put files of the failed attempt among those of the next one at the same step.
        """
        manager = getattr(self._orbax, "_async_manager", None)
        for part in getattr(manager, "_commit_futures", None) or ():
            with contextlib.suppress(Exception):
                part.result(timeout=_SETTLE_SECONDS)

    def _prune(self) -> None:
        """Removes every committed step that is neither among the newest nor among the best."""
        steps = self.steps()
        keep = {*steps[: self._keep_last], *self._ranked(steps)[: self._keep_best]}
        if self._keep_every is not None:
            keep |= {step for step in steps if step % self._keep_every == 0}
        self._manifests = {step: manifest for step, manifest in self._manifests.items() if step in keep}
        if jax.process_index() == 0:
            for step in steps:
                if step not in keep:
                    self._remove(self.directory / str(step))
        _synchronise("prune")

    def _remove(self, path: epath.Path) -> None:
        """Removes a step so that a removal that is cut off leaves nothing that looks like a damaged one."""
        if self._is_store:
            (path / _COMMITTED).unlink(missing_ok=True)
        else:
            path = path.rename(self.directory / f"{_REMOVING}{path.name}")
        path.rmtree(missing_ok=True)

    def _move_aside(self, path: epath.Path) -> None:
        """Moves a damaged step into `damaged/`; in a store that is a copy."""
        aside = self.directory / _DAMAGED / path.name
        if aside.is_dir():
            aside.rmtree()
        aside.parent.mkdir(parents=True, exist_ok=True)
        if not self._is_store:
            path.replace(aside)
            return
        for folder, _, names in path.walk():
            target = aside / folder.relative_to(path)
            target.mkdir(parents=True, exist_ok=True)
            for name in names:
                (folder / name).copy(target / name)
        self._remove(path)

    def _ranked(self, steps: list[int]) -> list[int]:
        """Orders the steps that have a finite metric from best to worst, newer first among equals."""
        values = {}
        for step in steps if self._metric is not None else ():
            if step not in self._manifests:
                try:
                    self._manifests[step] = _read_manifest(step, self.directory / str(step))
                except DamageError:
                    continue  # restore is the one to name it
            value = self._manifests[step]["metrics"].get(self._metric, math.nan)
            if math.isfinite(value):
                values[step] = value if self._mode == "max" else -value
        return sorted(values, key=lambda step: (values[step], step), reverse=True)

    def _tidy(self) -> None:
        """Clears the way once before the first save: moves damaged steps aside, removes unfinished ones."""
        if self._tidied:
            return
        self._tidied = True
        if jax.process_index() == 0 and self.directory.exists():
            for _, path in self._unfinished():
                path.rmtree(missing_ok=True)
            for path in self.directory.glob(f"{_REMOVING}*"):
                path.rmtree(missing_ok=True)
            for step, path in self._candidates():
                if step in self._damaged or _missing_part(path) is not None:
                    self._move_aside(path)
        self._damaged.clear()
        _synchronise("tidy")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step on disk, its manifest read and verified.

    Attributes:
        number: the step.
        path: its directory.
        content: the manifest.
    """

    number: int
    path: epath.Path
    content: Mapping[str, Any]

    @classmethod
    def open(cls, number: int, path: epath.Path) -> Self:
        """Reads the manifest."""
        content = _read_manifest(number, path)
        if content["format"] != _FORMAT:
            raise ValueError(
                f"checkpoint {path} must have format {_FORMAT}, got {content['format']}; "
                "restore it with the release that wrote it"
            )
        return cls(number, path, content)

    @property
    def leaves(self) -> Mapping[str, Mapping[str, Any]]:
        """Shape, dtype (as text) and digest of every leaf, by its path, such as `params/head/kernel`."""
        leaves: Mapping[str, Mapping[str, Any]] = self.content["leaves"]
        return leaves

    def read(self, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Reads the leaves of these names, in their stored dtype, and compares them with their digests.

        Args:
            wanted: for each name an array or `jax.ShapeDtypeStruct` with the sharding that is wanted.

        Raises:
            DamageError: if a leaf cannot be read or is not what was saved; on every process.
        """
        stored = self.leaves
        abstract = {name: _abstract(leaf, stored[name]["dtype"]) for name, leaf in wanted.items()}
        arrays: dict[str, jax.Array] = {}
        problem = None
        try:
            # The handler rather than the checkpointer, whose restore ends in a barrier that a process whose read has
            # failed would never reach.
            with _quiet_reads(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
                arrays = _flatten_names(_read(reader, self.path, abstract))
        except Exception as error:
            if _is_device_failure(error):
                raise
            problem = f"{_unreadable(self.path, abstract)} cannot be read ({_first_line(error)})"
        if problem is None:
            # Damaged metadata can make Orbax hand a leaf back unread, or leave it out.
            unread = [name for name in wanted if not isinstance(arrays.get(name), jax.Array)]
            problem = f"leaf {unread[0]!r} was not read" if unread else None
        _agree(problem)
        for name, digest in zip(arrays, _digests(arrays), strict=True):
            if digest != stored[name]["digest"]:
                raise DamageError(f"leaf {name!r} does not match its digest")
        return arrays


def _read(reader: ocp.PyTreeCheckpointHandler, path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """Reads some leaves of a step."""
    item = _nest(abstract)
    arguments = ocp.checkpoint_utils.construct_restore_args(item)
    return reader.restore(
        path / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
    )


def find_step(place: epath.PathLike, step: int | None = None) -> list[Step]:
    """Returns the steps with an intact manifest at a place, newest first.

    Args:
        place: a run's directory, a directory of steps, or one step.
        step: this step only.

    Raises:
        ValueError: if there is none.
    """
    place = epath.Path(place)
    if not re.match(r"\w+://", str(place)):
        place = place.absolute()  # Orbax reads no other
    folders = [place / "checkpoints", place]
    notes = place / "config.txt"
    elsewhere = re.search(r"^checkpoint_dir = '(.+)'$", notes.read_text(), re.MULTILINE) if notes.exists() else None
    if elsewhere is not None:
        folders = [epath.Path(elsewhere[1])]
    named = [(int(place.name), place)] if place.name.isdecimal() and (place / "manifest").exists() else []
    for folder in folders:
        if not named and folder.is_dir():
            named = [(int(path.name), path) for path in folder.iterdir() if re.fullmatch(r"0|[1-9]\d*", path.name)]
    found = []
    for number, path in sorted(named, reverse=True):
        if step is None or number == step:
            try:
                found.append(Step.open(number, path))
            except DamageError as damage:
                _LOG.warning("skipped checkpoint %s: %s", path, damage)
    if not found:
        numbers = sorted(number for number, _ in named)
        raise ValueError(
            f"{place} must hold an intact checkpoint{'' if step is None else f' of step {step}'}; it has "
            f"{f'steps {numbers}' if numbers else 'none'}: choose another path or step"
        )
    return found


def _read_manifest(step: int, path: epath.Path) -> dict[str, Any]:
    """Reads the manifest of a step and verifies it against its own checksum."""
    missing = _missing_part(path)
    if missing is not None:
        raise DamageError(missing)
    try:
        manifest = json.loads((path / "manifest" / _MANIFEST).read_text())
        content = manifest["content"]
        intact = manifest["sha256"] == _checksum(content)
        owner = content["step"]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamageError(f"its manifest cannot be read ({_first_line(error)})") from error
    if not intact:
        raise DamageError("its manifest does not match its checksum")
    if owner != step:
        raise DamageError(f"its manifest belongs to step {owner}")
    return content


def _missing_part(path: epath.Path) -> str | None:
    """Says what a step's directory lacks to be a committed checkpoint, None if nothing."""
    if not path.is_dir():
        return "it is not a directory"
    if not any(path.iterdir()):
        return "it is empty"
    for part in ("state", f"manifest/{_MANIFEST}"):
        if not (path / part).exists():
            return f"it has no {part}"
    if not ocp.utils.is_checkpoint_finalized(path):  # object stores commit by a file
        return "it was not committed"
    return None


def _unreadable(path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Names the first leaf that cannot be read, or the whole state if none can."""
    damaged, readable = [], False
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        for name, leaf in abstract.items():
            try:
                _read(reader, path, {name: leaf})
                readable = True
            except Exception:
                damaged.append(name)
            if readable and damaged:
                return f"leaf {damaged[0]!r}"
    return "the state"


def _key_name(entry: Any) -> str:
    """Returns the bare name of one step of a key path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by their path, such as `params/head/kernel`, in the order of the tree."""
    leaves: dict[str, Any] = {}
    stored: set[str] = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(_key_name(entry) for entry in path)
        flat = name.replace("/", ".")  # the name of the array on disk
        if not name or flat in stored:
            raise ValueError(f"state leaves must have distinct names, got {name!r} twice or empty; rename one of them")
        stored.add(flat)
        leaves[name] = leaf
    return leaves


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Turns leaves by path into nested dicts, so that a plain Orbax reader sees `params`, `opt_state`, ..."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _flatten_names(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Undoes `_nest`."""
    leaves: dict[str, Any] = {}
    for name, node in tree.items():
        leaves.update(_flatten_names(node, f"{prefix}{name}/") if isinstance(node, Mapping) else {prefix + name: node})
    return leaves


def _is_key(dtype: Any) -> bool:
    """Tells typed random keys from numbers."""
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _without_keys(leaf: jax.Array) -> jax.Array:
    """Replaces typed random keys by their words."""
    return jax.random.key_data(leaf) if _is_key(leaf.dtype) else leaf


def _with_keys(array: jax.Array, like: Any) -> jax.Array:
    """Undoes `_without_keys`."""
    if not _is_key(like.dtype):
        return array
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(_empty_key(like)))


def _empty_key(like: Any) -> jax.Array:
    """Returns a key array of no elements with the implementation of an abstract one."""
    return jax.numpy.empty((0,), dtype=like.dtype)


def _abstract(leaf: Any, stored: str) -> jax.ShapeDtypeStruct:
    """Returns what to ask Orbax for: the wanted shape and place, the stored dtype."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shape, dtype = tuple(leaf.shape), leaf.dtype
    if _is_key(dtype):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        shape, dtype = data.shape, data.dtype
    else:
        dtype = jax.numpy.dtype(stored)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _cast(array: jax.Array, like: Any) -> jax.Array:
    """Returns an array in the floating dtype that is wanted."""
    return array if _is_key(like.dtype) or array.dtype == like.dtype else array.astype(like.dtype)


def _is_floating(dtype: str) -> bool:
    try:
        return bool(jax.numpy.issubdtype(jax.numpy.dtype(dtype), jax.numpy.floating))
    except TypeError:  # a key
        return False


def _check_structure(
    path: epath.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], cast: bool = False
) -> None:
    """Raises if a checkpoint holds another state than the one asked for."""
    remedy = "use the model and optimiser it was saved with, or another directory"
    for name, leaf in wanted.items():
        if name not in stored:
            raise ValueError(f"checkpoint {path} must hold leaf {name!r}, but has no such leaf; {remedy}")
        for field, value in (("shape", list(leaf.shape)), ("dtype", str(leaf.dtype))):
            if field == "dtype" and cast and _is_floating(stored[name][field]) and _is_floating(str(value)):
                continue
            if stored[name][field] != value:
                raise ValueError(
                    f"checkpoint {path} must hold leaf {name!r} with {field} {value}, "
                    f"got {stored[name][field]}; {remedy}"
                )
    for name in stored:
        if name not in wanted:
            raise ValueError(f"checkpoint {path} must not hold leaf {name!r}, which the state lacks; {remedy}")


def _digests(arrays: Mapping[str, jax.Array]) -> list[str]:
    """Returns the digest of every array, equal on every process and for every sharding.

    NumPy on the shards rather than a jitted reduction: it compiles nothing, and it adds no collective that could
    interleave with a training step still in flight.
    """
    mask = (1 << 64) - 1

    def local_sum(array: jax.Array) -> int:
        total = 0
        for shard in array.addressable_shards:
            if shard.replica_id == 0:  # exactly one copy of every element, over all processes
                total += _weighted_sum(np.asarray(shard.data), shard.index, array.shape)
        return total & mask

    with concurrent.futures.ThreadPoolExecutor() as pool:  # NumPy releases the interpreter lock
        sums = list(pool.map(local_sum, arrays.values()))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        halves = np.array([(total >> 32, total & 0xFFFFFFFF) for total in sums], np.uint32).reshape(-1, 2)
        gathered = np.asarray(multihost_utils.process_allgather(halves)).astype(object)
        sums = [int(total) & mask for total in ((gathered[..., 0] * (1 << 32)) + gathered[..., 1]).sum(axis=0)]
    return [f"{total:016x}" for total in sums]


def _weighted_sum(block: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """Returns the weighted sum, modulo 2^64, of the words of a block that lies at `index` in an array of `shape`."""
    if block.size == 0:
        return 0
    size = block.dtype.itemsize
    words = 1 if size <= 4 else size // 4
    unsigned = np.dtype(f"u{min(size, 4)}")
    # Rows are the last axis, contiguous in the global order; all axes before it are one list of rows.
    block = np.ascontiguousarray(block).reshape(-1, block.shape[-1] if block.ndim else 1).view(unsigned)
    starts = [place.start or 0 for place in index]
    rows = np.zeros(1, np.uint64)
    for axis in range(len(shape) - 1):
        extent = (index[axis].stop if index[axis].stop is not None else shape[axis]) - starts[axis]
        places = np.arange(starts[axis], starts[axis] + extent, dtype=np.uint64)
        rows = (rows[:, None] * np.uint64(shape[axis]) + places[None, :]).reshape(-1)
    width = shape[-1] if shape else 1
    rows *= np.uint64(width * words)
    first = (starts[-1] if shape else 0) * words
    total = 0
    for column, column_end in _spans(block.shape[1], 1 << 15):
        places = np.arange(first + column, first + column_end, dtype=np.uint64)
        for row, row_end in _spans(len(rows), max(1, (1 << 15) // len(places))):
            weights = rows[row:row_end, None] + places[None, :]
            weights += np.uint64(1)
            weights *= np.uint64(0x9E3779B97F4A7C15)
            weights ^= weights >> np.uint64(29)
            weights *= np.uint64(0xBF58476D1CE4E5B9)
            weights ^= weights >> np.uint64(32)
            weights |= np.uint64(1)
            weights *= block[row:row_end, column:column_end]
            total += int(weights.sum(dtype=np.uint64))
    return total


def _spans(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the bounds of consecutive pieces."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _as_json(value: Mapping[str, Any], what: str) -> Any:
    """Returns a value as JSON gives it back."""
    try:
        return json.loads(json.dumps(dict(value), default=_plain))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what} must hold only what JSON can, got {value!r} ({error}); use numbers, text, lists"
        ) from None


def _plain(value: Any) -> Any:
    """Turns NumPy and JAX scalars and small arrays into plain numbers and lists."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _checksum(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of JSON content in a canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    """Returns the type of an error and the start of its message."""
    lines = str(error).split(". See full TensorStore details")[0].strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _is_device_failure(error: BaseException) -> bool:
    """Tells a failing device, such as one out of memory, from an unreadable file."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, jax.errors.JaxRuntimeError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _agree(problem: str | None) -> None:
    """Raises on every process if any of them has a problem, so that all walk back together."""
    problem = _shared(problem)
    if problem is not None:
        raise DamageError(problem)


def _shared(problem: str | None) -> str | None:
    """Returns the problem of this process, or one that says which other process has one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        troubled = np.asarray(multihost_utils.process_allgather(np.asarray(problem is not None))).reshape(-1)
        if troubled.any() and problem is None:
            problem = f"process {int(troubled.argmax())} cannot go on"
    return problem


def _synchronise(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"checkpoint_{name}")
