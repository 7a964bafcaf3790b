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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlayers.summary import count_macs
from jaxlayers.testing import EquivarianceCurve
from train import data, evaluate, guard, hardware, program, progress, transfer
from train import mesh as meshes
from train import state as states
from train import step as steps
from train.checkpoint import Checkpointer, Restored, SaveError
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
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a number that the loop polls; a second Ctrl-C kills at once.

    SIGUSR1 is what SLURM sends ahead of a time limit (`--signal=USR1@120`).

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
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
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
    profile: tuple[int, int] | None = None,
    wandb: str | None = None,
) -> Result:
    """Train `config` in `workdir`, from its newest good checkpoint or from the start, then evaluate and report.

    Args:
      config: the run.
      workdir: directory of checkpoints, metrics and the report; made when missing.
      devices: the devices of the mesh; `None` = all of them.
      stop: polled at every step and test batch; once it returns a signal's number the run saves and returns.
      silent: print nothing.
      profile: steps from and to which a profiler trace is written, to `<workdir>/profile`.
      wandb: name of a Weights & Biases project that gets the metrics too.

    Returns:
      The `Result`.

    Raises:
      ValueError: on settings that cannot work, before anything is compiled or written; or when another process
        trains in `workdir`.
      FloatingPointError: when the loss or the gradient is no longer finite and `on_nonfinite` gives up.
      SaveError: when the last checkpoint could not be written; an earlier one only warns.
    """
    plan = prepare(config, devices)
    with contextlib.ExitStack() as stack:
        run = begin(plan, Path(workdir), stack, silent=silent, wandb=wandb)
        stopped = agreed(stop)
        if not stopped:
            # Readers and watchdog end with the steps: what comes after may take as long as it likes.
            with guard.Watchdog(config.hang_seconds) as watchdog, contextlib.ExitStack() as readers:
                stopped = take_steps(plan, run, stop, readers, watchdog, profile)
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

    @property
    def rows(self) -> int:
        """The rows of every training batch that this process feeds."""
        return self.config.batch_size // meshes.process_rows(self.mesh, self.config.batch_size)[1]

    def train_batches(self, start: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Return this process's rows of the training batches from number `start` on."""
        return _train_batches(self.config, self.mesh, start, self.config.workers)

    def flops(self) -> int:
        """Return the operations of the matrix products of one step, over all devices."""
        with meshes.use(self.mesh):
            return 2 * count_macs(self.train_step, self.abstract, dict(self.example))

    def test_batches(self, source: Records, workers: int | None = None) -> Iterator[Mapping[str, np.ndarray]]:
        """Return this process's rows of the batches of a test set."""
        index, count = meshes.process_rows(self.mesh, self.eval_batch_size)
        return data.evaluation_batches(
            source,
            batch_size=self.eval_batch_size,
            transform=self.config.test_transform,
            process_index=index,
            process_count=count,
            workers=self.config.workers if workers is None else workers,
            on_corrupt=self.config.on_corrupt,
        )


@dataclasses.dataclass
class Run:
    """What changes while a plan is carried out."""

    workdir: Path
    checkpointer: Checkpointer
    bar: progress.Progress
    log: progress.Log
    state: states.TrainState
    step: int = 0
    batch: int = 0
    patience: guard.Patience = dataclasses.field(default_factory=guard.Patience)
    rolled_back: list[int] = dataclasses.field(default_factory=list)
    final: evaluate.Evaluation | None = None

    def position(self, plan: Plan) -> dict[str, Any]:
        """Return what a checkpoint holds beside the state."""
        patience = dataclasses.asdict(self.patience)
        return {"next_batch": self.batch, "fingerprint": plan.fingerprint, "patience": patience}

    def move_to(self, restored: Restored) -> None:
        """Take over what a checkpoint holds, but for the position in the data."""
        self.state, self.step = restored.state, restored.step
        self.patience = guard.Patience(**restored.data.get("patience", {}))


def prepare(config: Config, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Return the plan of a config, or refuse what cannot work.

    Raises:
      ValueError: on a mesh that does not fit the devices, a batch that does not divide, a metric that the task does
        not measure, or whatever the model refuses about its inputs.
    """
    mesh = meshes.build(config.mesh, devices)
    program.check_sizes(config, mesh)
    example = meshes.put_batch(_first(_train_batches(config, mesh, 0)), mesh)
    built = program.build(config, mesh, example)
    abstract = built.abstract
    plan = Plan(
        config=config,
        mesh=mesh,
        fingerprint=data.fingerprint(
            config.train_data,
            batch_size=config.batch_size,
            seed=config.seed,
            transform=config.train_transform,
            on_corrupt=config.on_corrupt,
            batch_transform=config.batch_transform,
        ),
        example=example,
        abstract=abstract,
        create=built.create,
        train_step=built.train_step,
        evaluation_step=evaluate.compile_evaluation(
            built.evaluation_step, abstract.evaluated, abstract.collections, mesh
        ),
    )
    if config.metric is not None:
        if config.test_data is None:
            raise ValueError(f"metric={config.metric!r} ranks by the test set; set test_data, or metric=None")
        sample = meshes.put_batch(_first(plan.test_batches(config.test_data, workers=0)), mesh)
        with meshes.use(mesh):
            names = evaluate.metric_names(
                built.evaluation_step, abstract.params, abstract.collections, sample, config.task
            )
        if config.metric not in names:
            raise ValueError(f"metric={config.metric!r} is not measured by the task; set metric to one of {names}")
    return plan


def begin(
    plan: Plan, workdir: Path, stack: contextlib.ExitStack, *, silent: bool = False, wandb: str | None = None
) -> Run:
    """Open the directory and restore the newest good checkpoint, or make the first state.

    Raises:
      ValueError: if the checkpoints there do not fit: another model, or other data; or if another process trains
        there.
    """
    config, first = plan.config, jax.process_index() == 0
    progress.check_wandb(wandb)
    refused = None
    if first:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(guard.locked(workdir))
        except guard.LockedError as error:
            refused = error
    if agreed(lambda: int(refused is not None)):
        raise refused or guard.LockedError(f"{workdir} is being trained in by another run; set another --workdir")
    checkpointer = Checkpointer(
        config.checkpoint_dir or workdir / "checkpoints",
        keep_last=config.keep_last,
        keep_every=config.keep_every,
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
    log = progress.Log(workdir if first else None, start, wandb=wandb)
    stack.callback(log.close)
    bar.say(f"{workdir}: {plan.parameters:,} parameters; mesh {meshes.describe(plan.mesh)}")
    for change in progress.write_notes(workdir, described) if first else []:
        bar.say(f"note: {change}")
    if restored is not None:
        run = Run(workdir, checkpointer, bar, log, restored.state)
        run.move_to(restored)
        run.batch = restored.data["next_batch"]
        bar.say(f"{'already trained to' if ended(plan, run) else 'resuming from'} step {start}")
        return run
    state = first_state(plan)
    if config.start_from is not None:
        params, loaded = transfer.load_partial(config.start_from, state.params)
        ema = state.ema if state.ema is None else jax.tree.map(jax.numpy.copy, params)
        state = dataclasses.replace(state, params=params, ema=ema)
        bar.say(loaded.summary())
    return Run(workdir, checkpointer, bar, log, state)


def first_state(plan: Plan) -> states.TrainState:
    """Return the state before the first step, made in place on the mesh."""
    with meshes.use(plan.mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
        return jax.jit(plan.create, out_shardings=shardings)(plan.example)


def ended(plan: Plan, run: Run) -> bool:
    """Return whether no step is left to take."""
    config = plan.config
    return run.step >= config.steps or run.patience.ended(config.early_stop)


def take_steps(
    plan: Plan,
    run: Run,
    stop: Callable[[], int],
    stack: contextlib.ExitStack,
    watchdog: guard.Watchdog,
    profile: tuple[int, int] | None = None,
) -> int:
    """Compile and take the steps that are left, with evaluations and checkpoints on the way.

    Returns:
      0, or the signal that stopped it; either way the last step is saved.
    """
    config, mesh = plan.config, plan.mesh
    if ended(plan, run):
        return 0
    test_data, save_every = config.test_data, config.checkpoint_every or config.eval_every
    several = jax.process_count() > 1

    def polled() -> int:
        watchdog.alive()
        return stop()

    def wish(number: int) -> dict[str, jax.Array]:
        # Processes must stop at the same step: each sends its wish, and all read the largest with the metrics.
        return meshes.put_batch({steps.STOP: np.full(plan.rows, number, np.int32)}, mesh) if several else {}

    run.bar.say("compiling")
    began = time.perf_counter()
    example = {**plan.example, **wish(0)}
    train_step = steps.compile_step(
        plan.train_step,
        plan.abstract,
        steps.abstract(example, meshes.batch_shardings(example, mesh)),
        mesh,
        sequence_parallel=config.mesh.sequence_parallel,
    )
    memory = train_step.memory_analysis()
    if memory is not None:
        needs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        took = time.perf_counter() - began
        run.bar.say(f"compiled in {took:.0f} s: {needs / 2**30:.2f} GiB a device, state and activations together")
    batches = data.prefetch(plan.train_batches(run.batch), lambda batch: meshes.put_batch(batch, mesh))
    stack.callback(close, batches)
    # Virtual CPU devices share one pool of threads, where the collectives of a second step can starve the first.
    one_in_flight = mesh.devices.flat[0].platform == "cpu"
    reader = Reader(run, plan)
    tracer = stack.enter_context(progress.Tracer(run.workdir / "profile", profile))
    with run.bar:
        missed = _due(run.step, config.eval_every) and not run.log.has(run.step, "test/")
        if test_data is not None and agreed(lambda: int(missed and jax.process_index() == 0)):  # who has the log
            # The earlier run was stopped inside the evaluation of this step.
            found = measure(plan, run, test_data, polled)
            if found is None:
                return stop()
            reader.record(run.step, "test", found.metrics)
        stopped = 0
        while True:
            tracer.before(run.step + 1)
            batch = {**next(batches), **wish(polled())}
            if one_in_flight:
                reader.wait()
            run.state, metrics = train_step(run.state, batch)
            run.step, run.batch = run.step + 1, run.batch + 1
            found = None
            try:
                reader.read()  # the step before this one: the devices already have work
                reader.expect(run.step, metrics)
                stopped, last = reader.stopped if several else stop(), run.step == config.steps
                evaluates = test_data is not None and not stopped and (last or _due(run.step, config.eval_every))
                saves = bool(stopped) or last or _due(run.step, save_every)
                if evaluates or saves:
                    reader.read()  # a step that is not finite raises here, before it could be saved
            except NotFiniteError as error:
                roll_back(plan, run, error)
                reader = Reader(run, plan)
                run.bar.pause()
                continue
            if evaluates and test_data is not None:
                found = measure(plan, run, test_data, polled)
                if found is None:
                    stopped, saves = stop(), True
                else:
                    reader.record(run.step, "test", found.metrics)
                    if config.metric is not None:
                        run.patience.look(found.metrics[config.metric], config.mode)
                    if run.patience.ended(config.early_stop):
                        last = saves = True
                        run.bar.say(
                            f"no better {config.metric} than {run.patience.best:.4g} in {config.early_stop} "
                            f"evaluations: ended at step {run.step}"
                        )
            if saves:
                save(plan, run, None if found is None else found.metrics)
            if stopped or last:
                run.final = found
                break
            if evaluates or saves:
                run.bar.pause()
        finish_saving(plan, run, None if run.final is None else run.final.metrics)
    return stopped


def save(plan: Plan, run: Run, metrics: Mapping[str, float] | None) -> None:
    """Start saving the state; a save that failed is named, and the run goes on."""
    # The error of the save before this one comes first; then this one has its own chance.
    for _ in range(2):
        try:
            run.checkpointer.save(run.step, run.state, data=run.position(plan), metrics=metrics)
            return
        except SaveError as error:
            run.bar.say(f"warning: {error}; the run goes on")
            if error.step == run.step:
                return


def finish_saving(plan: Plan, run: Run, metrics: Mapping[str, float] | None) -> None:
    """Wait until the last step is on disk; try once more where that failed.

    Raises:
      SaveError: if it cannot be written.
    """
    try:
        run.checkpointer.wait()
    except SaveError as error:
        run.bar.say(f"warning: {error}; trying once more")
    if run.step not in run.checkpointer.steps()[:1]:
        run.checkpointer.save(run.step, run.state, data=run.position(plan), metrics=metrics)
        run.checkpointer.wait()


class NotFiniteError(FloatingPointError):
    """The loss or the gradient of a step is not finite."""


MOST_ROLL_BACKS = 3
"""Times that a run goes back to one checkpoint before it gives up."""


def roll_back(plan: Plan, run: Run, error: NotFiniteError) -> None:
    """Go back to the newest good checkpoint, and on with the batches after those that were taken.

    Raises:
      NotFiniteError: if the config does not want it, there is no checkpoint, or it does not help.
    """
    if plan.config.on_nonfinite != "roll_back":
        raise error
    restored = run.checkpointer.restore(plan.abstract)
    if restored is None or run.rolled_back.count(restored.step) == MOST_ROLL_BACKS:
        raise error
    run.rolled_back.append(restored.step)
    run.move_to(restored)
    run.log.rewind(run.step)
    run.bar.rewind(run.step)
    run.bar.say(f"{error.args[0]}: rolled back to step {run.step}, going on with batch {run.batch}")


class Reader:
    """Reads the metrics of a step after the next one was started, so that the devices never wait for Python."""

    MOST_SKIPPED = 20

    def __init__(self, run: Run, plan: Plan) -> None:
        self.stopped = 0
        self._run, self._plan, self._config = run, plan, plan.config
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._spikes = guard.Spikes(self._config.spike_sigma)
        self._skipped_in_a_row = self._corrupt = 0
        self._device = plan.mesh.local_mesh.devices.flat[0]
        peak = hardware.peak_flops(self._device)
        self._full_use = None if peak is None else plan.flops() / plan.config.batch_size / (peak * plan.mesh.size)

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
          NotFiniteError: when the loss or the gradient is not finite; after the line is written.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.stopped = int(values.pop(steps.STOP, 0)) or self.stopped
        rate = self._run.bar.update(step)
        if "corrupt_records" in values:  # since this process began
            values["corrupt_records"] = self._corrupt = self._corrupt + int(values["corrupt_records"])
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
        skipped = bool(values.pop("skipped", 0))
        spike = self._spikes.check(values["loss"])
        if spike:
            self._run.bar.say(f"loss spike at step {step}: {values['loss']:.4g}, {spike:.1f} deviations above its mean")
        if bad or _due(step, self._config.log_every) or step == self._config.steps:
            self.record(step, "train", {**values, **self._speed(rate)})
        if skipped:
            self._run.bar.say(f"step {step} skipped: {bad[0]} is {values[bad[0]]}")
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if (bad and not skipped) or self._skipped_in_a_row == self.MOST_SKIPPED:
            self._give_up(step, bad[0], values[bad[0]])

    def _speed(self, rate: float) -> dict[str, float]:
        """Return throughput, and where the device is known, the share of its peak and the memory in use."""
        found = {"examples_per_second": rate}
        if self._full_use is not None:
            found["mfu"] = rate * self._full_use
        memory = hardware.memory_in_use(self._device)
        if memory is not None:
            found["memory_gib"] = memory / 2**30
        return found

    def _give_up(self, step: int, name: str, value: float) -> None:
        with contextlib.suppress(SaveError):
            self._run.checkpointer.wait()
        saved = self._run.checkpointer.steps()
        times = f", {self.MOST_SKIPPED} steps in a row" if self._skipped_in_a_row else ""
        raise NotFiniteError(
            f"{name} is {value} at step {step}{times}; stopped before it could be saved "
            f"(newest checkpoint: {f'step {saved[0]}' if saved else 'none'}). "
            "Lower optim.learning_rate, set optim.clip_norm or on_nonfinite, or look at the batch of that step"
        )

    def record(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
        """Write metrics to the log and show them."""
        self._run.log.write(step, {f"{prefix}/{name}": value for name, value in values.items()})
        hidden = ("gradient_norm", "learning_rate", "examples_per_second", "memory_gib")
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
        run.state.evaluated,
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
        place = re.sub(r"[^\w.-]+", "_", name)
        far = config.checkpoint_dir and f"{config.checkpoint_dir}/rivals/{place}"
        rival = dataclasses.replace(
            config, model=model, rivals={}, baselines=None, title=name, start_from=None, checkpoint_dir=far
        )
        folder = run.workdir / "rivals" / place
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
    params, collections = meshes.gather((run.state.evaluated, run.state.collections), plan.mesh)
    if jax.process_index() != 0:
        return {}
    batch = evaluate.first_examples(_first(plan.test_batches(config.test_data, workers=0)), config.symmetry_examples)
    return evaluate.symmetry_curves(config.model, config.task, params, collections, config.symmetries, batch)


def _train_batches(config: Config, mesh: Mesh, start: int, workers: int = 0) -> Iterator[Mapping[str, np.ndarray]]:
    index, count = meshes.process_rows(mesh, config.batch_size)
    return data.batches(
        config.train_data,
        batch_size=config.batch_size,
        seed=config.seed,
        transform=config.train_transform,
        start=start,
        process_index=index,
        process_count=count,
        workers=workers,
        on_corrupt=config.on_corrupt,
    )


def _first(batches: Iterator[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError("a data source is empty; pass one with at least one record") from None
    finally:
        close(batches)


def close(batches: Any) -> None:
    """Stop the threads and processes that read ahead."""
    stop = getattr(batches, "close", None)
    if stop is not None:
        stop()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
