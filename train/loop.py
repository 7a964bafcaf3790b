"""The training loop: one for all tasks, from top to bottom. Run it again in the same directory and it resumes."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlayers.testing import EquivarianceCurve
from train import data, evaluate, optim, progress
from train import mesh as meshes
from train import state as states
from train import step as steps
from train.checkpoint import Checkpointer
from train.config import Config, Records, describe


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` returns.

    Attributes:
      step: optimiser steps done, and saved.
      signal: number of the signal that stopped the run, or 0.
      metrics: the final evaluation, extra tests as `name/metric`; empty when stopped.
      symmetry: error curves of the trained model, by group; empty on every process but the first.
      report: the report's file; `None` when stopped, and on every process but the first.
      state: the last state, on the devices.
    """

    step: int
    signal: int
    metrics: Mapping[str, float]
    symmetry: Mapping[str, EquivarianceCurve]
    report: Path | None
    state: states.TrainState


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a number that the loop polls; a second Ctrl-C kills at once.

    As a context manager it installs its handlers and restores the old ones at the end; the instance itself is what
    `train(stop=...)` takes. A second SIGTERM changes nothing, since some launchers send several.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __call__(self) -> int:
        """Return the number of the signal that came, or 0."""
        return self.signal

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            return
        self.signal = number
        # The default action kills even while Python waits inside the compiler, where no handler would run.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        text = f"\n{signal.Signals(number).name}: saving after this step; Ctrl-C kills without saving\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def never() -> int:
    """Return 0: nobody asks to stop."""
    return 0


def agreed(stop: Callable[[], int]) -> int:
    """Return what `stop()` says, or on several processes the largest of what it says on each."""
    if jax.process_count() == 1:
        return stop()
    return int(np.max(multihost_utils.process_allgather(np.int32(stop()))))


def train(
    config: Config,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    stop: Callable[[], int] = never,
    silent: bool = False,
) -> Result:
    """Train `config` in `workdir`, from its newest good checkpoint or from the start, then evaluate and report.

    Args:
      config: the run.
      workdir: directory of checkpoints, metrics and the report; made when missing.
      devices: the devices of the mesh; `None` = all of them.
      stop: polled at every step and test batch; once it returns a signal's number the run saves and returns.
      silent: print nothing.

    Returns:
      The `Result`.

    Raises:
      ValueError: on settings that cannot work, before anything is compiled or written.
      FloatingPointError: when the loss or the gradient is no longer finite.
    """
    plan = prepare(config, devices)
    with contextlib.ExitStack() as stack:
        run = begin(plan, Path(workdir), stack, silent=silent)
        stopped = agreed(stop) or take_steps(plan, run, stop, stack)
        if not stopped:
            result = finish(plan, run, stop)
            if result is not None:
                return result
            stopped = agreed(stop)
        name = signal.Signals(stopped).name
        saved = f"saved step {run.step}; run the same command to resume"
        run.bar.say(f"stopped by {name}: {saved if run.step else 'before the first step, there is nothing to save'}")
        return Result(run.step, stopped, {}, {}, None, run.state)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from a config and the devices, before anything is compiled or written."""

    config: Config
    mesh: Mesh
    fingerprint: Mapping[str, Any]
    example: Mapping[str, jax.Array]
    abstract: states.TrainState
    create: Callable[[Mapping[str, jax.Array]], states.TrainState]
    train_step: steps.Step
    evaluation_step: Callable[[Any, Any, Any], dict[str, Any]]

    @property
    def parameters(self) -> int:
        """The number of parameters of the model."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract.params))

    @property
    def eval_batch_size(self) -> int:
        """The batch size of evaluation."""
        return self.config.eval_batch_size or self.config.batch_size

    def train_batches(self, start: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Return this process's rows of the training batches from number `start` on."""
        return _train_batches(self.config, self.mesh, start)

    def test_batches(self, source: Records) -> Iterator[Mapping[str, np.ndarray]]:
        """Return this process's rows of the batches of a test set."""
        index, count = meshes.process_rows(self.mesh, self.eval_batch_size)
        return data.evaluation_batches(
            source,
            batch_size=self.eval_batch_size,
            transform=self.config.test_transform,
            process_index=index,
            process_count=count,
        )


@dataclasses.dataclass
class Run:
    """What changes while a plan is carried out."""

    workdir: Path
    checkpointer: Checkpointer
    bar: progress.Progress
    log: progress.Log
    state: states.TrainState
    step: int
    batch: int
    final: evaluate.Evaluation | None = None


def prepare(config: Config, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Return the plan of a config, or refuse what cannot work.

    Raises:
      ValueError: on a mesh that does not fit the devices, a batch that does not divide, a metric that the task does
        not measure, or whatever the model refuses about its inputs.
    """
    mesh = meshes.build(config.mesh, devices)
    meshes.check_batch_size("batch_size", config.batch_size, mesh)
    if config.eval_batch_size is not None:
        meshes.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    transform, learning_rate = optim.build(config.optim, config.steps)
    create = states.creator(config.model, config.task, transform, config.seed)
    example = meshes.put_batch(_first(_train_batches(config, mesh, 0)), mesh)
    with meshes.use(mesh):
        shapes = jax.eval_shape(create, example)
    abstract = steps.abstract(shapes, meshes.shardings(shapes, mesh, config.mesh.rules))
    evaluation_step = evaluate.evaluation_step(config.model, config.task)
    plan = Plan(
        config=config,
        mesh=mesh,
        fingerprint=data.fingerprint(
            config.train_data, batch_size=config.batch_size, seed=config.seed, transform=config.train_transform
        ),
        example=example,
        abstract=abstract,
        create=create,
        train_step=steps.train_step(config.model, config.task, transform, learning_rate),
        evaluation_step=evaluate.compile_evaluation(evaluation_step, abstract.params, abstract.collections, mesh),
    )
    if config.metric is not None:
        if config.test_data is None:
            raise ValueError(f"metric={config.metric!r} ranks by the test set; set test_data, or metric=None")
        sample = meshes.put_batch(_first(plan.test_batches(config.test_data)), mesh)
        with meshes.use(mesh):
            names = evaluate.metric_names(evaluation_step, abstract.params, abstract.collections, sample, config.task)
        if config.metric not in names:
            raise ValueError(f"metric={config.metric!r} is not measured by the task; set metric to one of {names}")
    return plan


def begin(plan: Plan, workdir: Path, stack: contextlib.ExitStack, *, silent: bool) -> Run:
    """Open the directory and restore the newest good checkpoint, or make the first state.

    Raises:
      ValueError: if the checkpoints there do not fit: another model, or other data.
    """
    config, first = plan.config, jax.process_index() == 0
    if first:
        workdir.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        keep_last=config.keep_last,
        keep_best=config.keep_best if config.metric else 0,
        metric=config.metric,
        mode=config.mode,
    )
    stack.callback(checkpointer.close)
    described = describe(config)
    try:
        restored = checkpointer.restore(plan.abstract)
    except ValueError as error:
        changes = progress.changed_lines(workdir, described)
        raise ValueError(f"{error} ({'; '.join(changes) or 'the config did not change'})") from error
    if restored is not None:
        before = restored.data.get("fingerprint", {})
        changes = [
            f"{name} was {before.get(name, 'absent')}, is {plan.fingerprint.get(name, 'absent')}"
            for name in {**before, **plan.fingerprint}
            if json.dumps(before.get(name)) != json.dumps(plan.fingerprint.get(name))
        ]
        if changes:
            raise ValueError(
                f"the training data is not what {workdir} was trained on up to step {restored.step}: "
                f"{'; '.join(changes)}; restore it, or choose another --workdir"
            )
    elif checkpointer.skipped:
        logging.warning("starting again from step 0; the damaged checkpoints are moved aside, not removed")
    start = 0 if restored is None else restored.step
    bar = progress.Progress(start=start, steps=config.steps, batch_size=config.batch_size, silent=silent or not first)
    log = progress.Log(workdir if first else None, start)
    stack.callback(log.close)
    bar.say(f"{workdir}: {plan.parameters:,} parameters; mesh {meshes.describe(plan.mesh)}")
    for change in progress.write_notes(workdir, described) if first else []:
        bar.say(f"note: {change}")
    if restored is not None:
        finished = "already trained to" if start >= config.steps else "resuming from"
        bar.say(f"{finished} step {start}")
        return Run(workdir, checkpointer, bar, log, restored.state, start, restored.data["next_batch"])
    with meshes.use(plan.mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
        state = jax.jit(plan.create, out_shardings=shardings)(plan.example)
    return Run(workdir, checkpointer, bar, log, state, 0, 0)


def take_steps(plan: Plan, run: Run, stop: Callable[[], int], stack: contextlib.ExitStack) -> int:
    """Compile and take the steps that are left, with evaluations and checkpoints on the way.

    Returns:
      0, or the signal that stopped it; either way the last step is saved.
    """
    config, mesh = plan.config, plan.mesh
    if run.step >= config.steps:
        return 0
    test_data, save_every = config.test_data, config.checkpoint_every or config.eval_every
    several = jax.process_count() > 1
    rows = config.batch_size // meshes.process_rows(mesh, config.batch_size)[1]

    def with_wish(batch: Mapping[str, Any], wish: Callable[[], int]) -> dict[str, Any]:
        # Processes must stop at the same step: each sends its wish, and all read the largest with the metrics.
        return {**batch, steps.STOP: np.full(rows, wish(), np.int32)} if several else dict(batch)

    stopped = 0
    run.bar.say("compiling")
    example = {**plan.example, **meshes.put_batch(with_wish({}, never), mesh)}
    train_step = steps.compile_step(
        plan.train_step, plan.abstract, steps.abstract(example, meshes.batch_sharding(mesh)), mesh
    )
    batches = plan.train_batches(run.batch)
    stack.callback(_close, batches)
    # Virtual CPU devices share one pool of threads, where the collectives of a second step can starve the first.
    one_in_flight = mesh.devices.flat[0].platform == "cpu"
    reader = Reader(run, config)
    with run.bar:
        missed = _due(run.step, config.eval_every) and not run.log.has(run.step, "test/")
        if test_data is not None and agreed(lambda: int(missed and jax.process_index() == 0)):  # who has the log
            # The earlier run was stopped inside the evaluation of this step.
            found = measure(plan, run, test_data, stop)
            if found is None:
                return stop()
            reader.record(run.step, "test", found.metrics)
        while run.step < config.steps:
            batch = meshes.put_batch(with_wish(next(batches), stop), mesh)
            if one_in_flight:
                reader.wait()
            run.state, metrics = train_step(run.state, batch)
            run.step, run.batch = run.step + 1, run.batch + 1
            reader.read()  # the step before this one: the devices already have work
            reader.expect(run.step, metrics)

            stopped, last = reader.stopped if several else stop(), run.step == config.steps
            evaluates = test_data is not None and not stopped and (last or _due(run.step, config.eval_every))
            saves = stopped or last or _due(run.step, save_every)
            found = None
            if evaluates or saves:
                reader.read()  # a step that is not finite raises here, before it could be saved
            if evaluates and test_data is not None:
                found = measure(plan, run, test_data, stop)
                if found is None:
                    stopped = saves = stop()
                else:
                    reader.record(run.step, "test", found.metrics)
            if saves:
                run.checkpointer.save(
                    run.step,
                    run.state,
                    data={"next_batch": run.batch, "fingerprint": plan.fingerprint},
                    metrics=None if found is None else found.metrics,
                )
            if stopped or last:
                run.final = found
                break
            if evaluates or saves:
                run.bar.pause()
        run.checkpointer.wait()
    return stopped


class Reader:
    """Reads the metrics of a step after the next one was started, so that the devices never wait for Python."""

    def __init__(self, run: Run, config: Config) -> None:
        self.stopped = 0
        self._run, self._config = run, config
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def expect(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Remember the metrics that `step` will give."""
        self._pending = (step, metrics)

    def wait(self) -> None:
        """Wait until the devices are idle."""
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])

    def read(self) -> None:
        """Read, log and check the metrics that are pending, if any.

        Raises:
          FloatingPointError: when the loss or the gradient is not finite; after the line is written.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.stopped = int(values.pop(steps.STOP, 0)) or self.stopped
        rate = self._run.bar.update(step)
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
        if bad or _due(step, self._config.log_every) or step == self._config.steps:
            self.record(step, "train", {**values, "examples_per_second": rate})
        if bad:
            self._run.checkpointer.wait()
            saved = self._run.checkpointer.steps()
            raise FloatingPointError(
                f"{bad[0]} is {values[bad[0]]} at step {step}; stopped before it could be saved "
                f"(newest checkpoint: {f'step {saved[0]}' if saved else 'none'}). "
                "Lower optim.learning_rate, set optim.clip_norm, or look at the batch of that step"
            )

    def record(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
        """Write metrics to the log and show them."""
        self._run.log.write(step, {f"{prefix}/{name}": value for name, value in values.items()})
        hidden = ("gradient_norm", "learning_rate", "examples_per_second")
        names = sorted(values.keys() - set(hidden), key=lambda name: (name != "loss", name))
        shown = {name: values[name] for name in names}
        if prefix == "train":
            self._run.bar.show(step, shown)
        else:
            self._run.bar.show(step, {f"{prefix} {name}": value for name, value in shown.items()}, always=True)


def measure(plan: Plan, run: Run, source: Records, stop: Callable[[], int]) -> evaluate.Evaluation | None:
    """Return the evaluation of the current state over a set; `None` when `stop()` broke it off."""
    return evaluate.evaluate(
        plan.evaluation_step,
        run.state.params,
        run.state.collections,
        plan.test_batches(source),
        task=plan.config.task,
        mesh=plan.mesh,
        # Several processes must take the same number of batches, so they finish the set.
        stop=stop if jax.process_count() == 1 else never,
    )


def finish(plan: Plan, run: Run, stop: Callable[[], int]) -> Result | None:
    """Evaluate the trained model, measure its symmetry, train its rivals, and write the report.

    Returns:
      The result, or `None` when `stop()` broke it off; the same command then finishes it.
    """
    config = plan.config
    metrics: dict[str, float] = {}
    confusion = None
    if config.test_data is not None:
        final = run.final or measure(plan, run, config.test_data, stop)
        if final is None:
            return None
        metrics |= final.metrics
        confusion = final.confusion
        if not run.log.has(run.step, "test/"):
            run.log.write(run.step, {f"test/{name}": value for name, value in final.metrics.items()})
    for name, source in config.extra_tests.items():
        found = measure(plan, run, source, stop)
        if found is None:
            return None
        metrics |= {f"{name}/{key}": value for key, value in found.metrics.items()}
    if agreed(stop):
        return None
    curves = symmetry(plan, run)

    beside: dict[str, float] = {}
    rival_curves: dict[str, EquivarianceCurve] = {}
    for name, model in config.rivals.items():
        if agreed(stop):
            return None
        run.bar.say(f"rival: {name}")
        rival = dataclasses.replace(config, model=model, rivals={}, baselines=None, title=name)
        folder = run.workdir / "rivals" / re.sub(r"[^\w.-]+", "_", name)
        result = train(rival, folder, devices=list(plan.mesh.devices.flat), stop=stop, silent=run.bar.silent)
        if result.signal:
            return None
        beside |= {f"{name} {key}": value for key, value in result.metrics.items()}
        rival_curves |= {f"{group} ({name})": curve for group, curve in result.symmetry.items()}
    if agreed(stop):
        return None

    path = None
    if jax.process_index() == 0:
        if config.baselines is not None:
            beside |= config.baselines()
        for line in progress.table(metrics, beside):
            run.bar.say(line)
        summary: dict[str, Any] = {"step": run.step, "parameters": plan.parameters, "mesh": meshes.describe(plan.mesh)}
        summary |= metrics
        summary |= {f"largest error under {name}": float(np.max(curve.errors)) for name, curve in curves.items()}
        (run.workdir / "summary.json").write_text(json.dumps({"result": summary, "beside": beside}, indent=2) + "\n")
        from train.report import write_report  # Matplotlib takes seconds to load, and only a complete run needs it

        path = write_report(
            run.workdir / "report",
            title=config.title or run.workdir.name,
            history=run.log.history,
            summary=summary,
            confusion=confusion,
            labels=config.labels,
            symmetry={**curves, **rival_curves} or None,
            baselines=beside or None,
        )
        run.bar.say(f"report: {path}")
    return Result(run.step, 0, metrics, curves, path, run.state)


def symmetry(plan: Plan, run: Run) -> dict[str, EquivarianceCurve]:
    """Return the error curve of the trained model under each declared symmetry, by the name of its group."""
    config = plan.config
    if not config.symmetries or config.test_data is None:
        return {}
    params, collections = meshes.gather((run.state.params, run.state.collections), plan.mesh)
    if jax.process_index() != 0:
        return {}
    batch = evaluate.first_examples(_first(plan.test_batches(config.test_data)), config.symmetry_examples)
    return evaluate.symmetry_curves(config.model, config.task, params, collections, config.symmetries, batch)


def _train_batches(config: Config, mesh: Mesh, start: int) -> Iterator[Mapping[str, np.ndarray]]:
    index, count = meshes.process_rows(mesh, config.batch_size)
    return data.batches(
        config.train_data,
        batch_size=config.batch_size,
        seed=config.seed,
        transform=config.train_transform,
        start=start,
        process_index=index,
        process_count=count,
    )


def _first(batches: Iterator[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError("a data source is empty; pass one with at least one record") from None
    finally:
        _close(batches)


def _close(batches: Any) -> None:
    close = getattr(batches, "close", None)  # stops the threads that read ahead
    if close is not None:
        close()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
