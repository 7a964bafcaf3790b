"""The whole loop in one process: resuming is bitwise, nothing bad is saved, and the directory tells the truth."""

import dataclasses
import json
import logging
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import shared_cache
from tests.train.config_test import TINY
from train import loop, progress, tasks
from train.config import Evaluated, MeshShape, Task, load
from train.data import arrays, batches

MIXED = MeshShape(data=2, fsdp=2, sequence=1, tensor=2)


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    with shared_cache.used():
        yield


@pytest.fixture
def config():
    return dataclasses.replace(load(TINY), steps=9, eval_every=4, checkpoint_every=3, mesh=MIXED)


def history(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {
        line["step"]: {name: value for name, value in line.items() if name != "train/examples_per_second"}
        for line in history(workdir)
    }


def assert_bitwise(one, other):
    left, right = (jax.tree_util.tree_flatten_with_path(state)[0] for state in (one, other))
    for (path, a), (_, b) in zip(left, right, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


class After:
    """Asks to stop at the `count`-th question and ever after."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = dataclasses.replace(load(TINY), steps=9, eval_every=4, checkpoint_every=3, mesh=MIXED)
    return workdir, loop.train(config, workdir, silent=True)


def test_a_run_leaves_everything_that_is_promised(uninterrupted):
    workdir, result = uninterrupted
    assert result.step == 9
    assert result.signal == 0
    assert [line["step"] for line in history(workdir)] == list(range(1, 10))
    assert {line["step"] for line in history(workdir) if "test/accuracy" in line} == {4, 8, 9}
    assert history(workdir)[-1]["test/accuracy"] == result.metrics["accuracy"]
    assert result.report == workdir / "report" / "report.md"
    assert {"report.md", "training_curves.png", "confusion.png"} <= {
        path.name for path in result.report.parent.iterdir()
    }
    assert "model.depths = (1,)" in (workdir / "config.txt").read_text().splitlines()
    assert json.loads((workdir / "versions.json").read_text())["jax"] == jax.__version__
    assert len((workdir / "command.txt").read_text().splitlines()) == 1
    assert json.loads((workdir / "summary.json").read_text())["result"]["accuracy"] == result.metrics["accuracy"]
    assert next((workdir / "tensorboard").iterdir()).name.startswith("events.out.tfevents")
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())[-2:] == [6, 9]


def test_stopped_anywhere_and_resumed_ends_bitwise_where_the_uninterrupted_run_ends(config, uninterrupted, tmp_path):
    # Each number of questions stops at another place: before compiling, at steps, inside evaluations, in the report.
    stops, places = [1, 4, 5, 9, 4, 1, 6, 2], []
    for count in stops:
        result = loop.train(config, tmp_path, stop=After(count), silent=True)
        places.append(result.step)
        assert result.signal == signal.SIGTERM
        assert result.report is None
        if (tmp_path / "metrics.jsonl").exists():
            assert [line["step"] for line in history(tmp_path)] == list(range(1, result.step + 1))
    assert places[0] == 0
    assert places[-1] == 9
    assert len(set(places)) >= 5
    result = loop.train(config, tmp_path, silent=True)
    assert result.step == 9
    assert_bitwise(result.state, uninterrupted[1].state)
    assert result.metrics == uninterrupted[1].metrics
    assert losses(tmp_path) == losses(uninterrupted[0])


def test_other_meshes_resume_it_to_rounding(config, uninterrupted, tmp_path):
    first = loop.train(config, tmp_path, stop=After(7), silent=True)
    assert 0 < first.step < 9
    alone = dataclasses.replace(config, mesh=MeshShape())
    result = loop.train(alone, tmp_path, devices=jax.devices()[:1], silent=True)
    wanted = losses(uninterrupted[0])
    for step, line in losses(tmp_path).items():
        assert line["train/loss"] == pytest.approx(wanted[step]["train/loss"], abs=2e-5)
    assert result.state.step.sharding.device_set == {jax.devices()[0]}


def test_a_finished_run_only_writes_the_report_again(config, uninterrupted, tmp_path, capsys):
    workdir, before = uninterrupted
    before.report.unlink()
    lines = history(workdir)
    result = loop.train(config, workdir)
    assert "already trained to step 9" in capsys.readouterr().out
    assert result.report.exists()
    assert result.metrics == before.metrics
    assert history(workdir) == lines
    assert_bitwise(result.state, before.state)


def test_more_steps_go_on_from_a_finished_run(config, tmp_path, capsys):
    short = dataclasses.replace(config, steps=3, test_data=None, metric=None)
    loop.train(short, tmp_path, silent=True)
    result = loop.train(dataclasses.replace(short, steps=5), tmp_path)
    assert result.step == 5
    assert "note: steps was 3, is 5" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(config, uninterrupted, tmp_path, caplog):
    first = loop.train(config, tmp_path, stop=After(12), silent=True)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert len(steps) >= 2
    assert steps[-1] == first.step
    (tmp_path / "checkpoints" / str(steps[-1]) / "manifest" / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        result = loop.train(config, tmp_path, silent=True)
    assert f"{steps[-1]}" in caplog.text
    assert "skipped checkpoint" in caplog.text
    assert_bitwise(result.state, uninterrupted[1].state)
    assert losses(tmp_path) == losses(uninterrupted[0])


def test_changed_data_is_refused_with_what_changed(config, uninterrupted):
    workdir = uninterrupted[0]
    for change, message in (
        ({"batch_size": 32}, "batch_size was 16, is 32"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"train_data": arrays(tokens=np.zeros((96, 6, 3), np.float32), label=np.zeros(96, np.int32))}, "content was"),
    ):
        with pytest.raises(ValueError, match=f"trained on up to step 9: .*{message}"):
            loop.train(dataclasses.replace(config, **change), workdir, silent=True)


def test_changed_model_is_refused_with_what_changed(config, uninterrupted):
    wider = dataclasses.replace(config, model=config.model.clone(features=32))
    with pytest.raises(ValueError, match=r"must hold leaf .*model.features was 16, is 32"):
        loop.train(wider, uninterrupted[0], silent=True)
    assert "model.features = 16" in (uninterrupted[0] / "config.txt").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(config, tmp_path):
    columns = {name: np.stack([config.train_data[i][name] for i in range(96)]) for name in ("tokens", "label")}
    fifth_batch = next(batches(arrays(index=np.arange(96)), batch_size=16, seed=config.seed, start=4))
    columns["tokens"][fifth_batch["index"][0], 0, 0] = np.inf
    bad = dataclasses.replace(config, train_data=arrays(**columns), checkpoint_every=2)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 5; .*newest checkpoint: step 4\)"):
        loop.train(bad, tmp_path, silent=True)
    assert [line["step"] for line in history(tmp_path)] == [1, 2, 3, 4, 5]
    assert history(tmp_path)[-1]["train/loss"] is None
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshShape(3, 2)}, "needs 6 devices and there are 8"),
        ({"batch_size": 18}, "batch_size=18 must be divisible by data.fsdp=4"),
        ({"eval_batch_size": 3}, "eval_batch_size=3 must be divisible"),
        ({"metric": "acuracy"}, r"metric='acuracy' is not measured .* one of \['accuracy', 'loss'\]"),
        ({"test_data": None}, "metric='accuracy' ranks by the test set; set test_data"),
        ({"task": tasks.classification(4)}, "the records have no field 'image'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(config, **change), tmp_path / "run", silent=True)
    assert not (tmp_path / "run").exists()


def test_rivals_extra_tests_and_baselines_stand_beside_the_result(config, tmp_path, capsys):
    shifted = arrays(tokens=np.zeros((5, 6, 3), np.float32), label=np.zeros(5, np.int32))
    full = dataclasses.replace(
        config,
        steps=3,
        rivals={"no attention": config.model.clone(depths=())},
        extra_tests={"shifted": shifted},
        baselines=lambda: {"majority": 0.25},
        symmetries=(),
    )
    result = loop.train(full, tmp_path)
    assert set(result.metrics) == {"loss", "accuracy", "shifted/loss", "shifted/accuracy"}
    beside = json.loads((tmp_path / "summary.json").read_text())["beside"]
    assert set(beside) == {"majority", *(f"no attention {name}" for name in result.metrics)}
    assert (tmp_path / "rivals" / "no_attention" / "report" / "report.md").exists()
    out = capsys.readouterr().out
    assert "rival: no attention" in out
    assert "majority" in out
    assert "majority" in result.report.read_text()


def test_a_task_of_ones_own_needs_no_other_change(config, tmp_path):
    def loss(apply, batch, key):
        noise = jax.random.normal(key, batch["tokens"].shape)
        return jnp.mean(jnp.square(apply(batch["tokens"] + noise)), axis=-1), {}

    def evaluate(apply, batch):
        return Evaluated({"size": jnp.mean(jnp.square(apply(batch["tokens"])), axis=-1)})

    own = Task(inputs=lambda batch: (batch["tokens"],), loss=loss, evaluate=evaluate)
    model = config.model.clone(depths=())
    config = dataclasses.replace(config, model=model, task=own, steps=3, metric="size", mode="min", mesh=MeshShape())
    result = loop.train(config, tmp_path, devices=jax.devices()[:1], silent=True)
    assert list(result.metrics) == ["size"]


def test_log_drops_later_and_half_written_lines_and_merges_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 2.0}\n{"step": 3, "train/lo')
    log = progress.Log(tmp_path, start=2)
    log.write(2, {"test/loss": 1.0})
    log.write(3, {"train/loss": float("nan")})
    log.write(3, {"test/loss": 0.5})
    log.close()
    wanted = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.0, "test/loss": 1.0},
        {"step": 3, "train/loss": None, "test/loss": 0.5},
    ]
    assert history(tmp_path) == log.history == wanted
    assert log.has(2, "test/")
    assert not log.has(1, "test/")
    again = progress.Log(tmp_path, start=1)
    again.close()
    assert history(tmp_path) == wanted[:1]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(terminal, monkeypatch, capsys):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.Progress(start=0, steps=100, batch_size=10) as bar:
        bar.update(1)
        bar.show(1, {"loss": 0.5})
        bar.show(2, {"loss": 0.25})  # too soon for another plain line
        bar.show(3, {"test loss": 0.125}, always=True)
        bar.say("a line [of text]")
    out = capsys.readouterr().out
    assert "a line [of text]" in out
    assert "test loss 0.125" in out
    assert "eta" in out
    assert ("━" in out) == terminal
    assert ("ex/s" in out) == terminal
    assert ("step   1/100  loss 0.5" in out) != terminal
    assert ("loss 0.25" in out) == terminal
    assert bar.update(1) > 0


def test_second_sigint_is_left_to_the_system():
    before = signal.getsignal(signal.SIGINT)
    with loop.Interrupt() as interrupt:
        assert interrupt() == 0
        signal.raise_signal(signal.SIGINT)
        assert interrupt() == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)  # some launchers send several: ignored
        assert interrupt() == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == before


def with_infinity_at(config, *numbers):
    """Return the config with an infinity in the training batches of these numbers (from 0)."""
    columns = {name: np.stack([config.train_data[i][name] for i in range(96)]) for name in ("tokens", "label")}
    for number in numbers:
        drawn = next(batches(arrays(index=np.arange(96)), batch_size=16, seed=config.seed, start=number))
        columns["tokens"][drawn["index"][0], 0, 0] = np.inf
    return dataclasses.replace(config, train_data=arrays(**columns), test_data=None, metric=None)


def test_a_run_rolls_back_to_the_last_good_step_and_goes_on_with_later_batches(config, tmp_path, capsys):
    # Records 1..16 of the fifth batch; the epoch has six batches, so the bad record comes back only in the next one.
    bad = with_infinity_at(dataclasses.replace(config, steps=5, checkpoint_every=2, on_nonfinite="roll_back"), 4)
    result = loop.train(bad, tmp_path / "run")
    assert result.step == 5
    out = capsys.readouterr().out
    assert "loss is nan at step 5" in out
    assert "rolled back to step 4, going on with batch 5" in out
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(line["train/loss"]) for line in history(tmp_path / "run"))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(result.state.params))
    # The same without the bad batch: four steps, then the sixth batch.
    resumed = loop.train(dataclasses.replace(bad, steps=4), tmp_path / "by_hand", silent=True)
    assert resumed.step == 4
    plan = loop.prepare(bad)
    step = loop.steps.compile_step(
        plan.train_step,
        plan.abstract,
        loop.steps.abstract(plan.example, loop.meshes.batch_sharding(plan.mesh)),
        plan.mesh,
    )
    state, _ = step(resumed.state, loop.meshes.put_batch(next(plan.train_batches(5)), plan.mesh))
    assert_bitwise(result.state.params, state.params)


def test_a_run_that_cannot_be_helped_gives_up(config, tmp_path):
    bad = with_infinity_at(dataclasses.replace(config, checkpoint_every=2, on_nonfinite="roll_back"), 2, 3, 4, 5)
    with pytest.raises(FloatingPointError, match="loss is nan at step 3"):
        loop.train(bad, tmp_path / "many", silent=True)
    first = with_infinity_at(dataclasses.replace(config, checkpoint_every=2, on_nonfinite="roll_back"), 0)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1; .*newest checkpoint: none"):
        loop.train(first, tmp_path / "first", silent=True)


def test_skipped_steps_are_named_and_too_many_end_the_run(config, tmp_path, capsys, monkeypatch):
    bad = with_infinity_at(dataclasses.replace(config, steps=5, on_nonfinite="skip"), 2)
    result = loop.train(bad, tmp_path / "one")
    assert result.step == 5
    assert "step 3 skipped: loss is nan" in capsys.readouterr().out
    assert history(tmp_path / "one")[2]["train/loss"] is None
    monkeypatch.setattr(loop.Reader, "MOST_SKIPPED", 3)
    worse = with_infinity_at(dataclasses.replace(config, steps=6, on_nonfinite="skip"), 1, 2, 3)
    with pytest.raises(FloatingPointError, match="loss is nan at step 4, 3 steps in a row"):
        loop.train(worse, tmp_path / "three", silent=True)


def without_progress(config):
    """Return the config with a metric that cannot become better than at first."""

    def evaluate(apply, batch):
        return Evaluated({"accuracy": jnp.ones(len(batch["label"]))})

    task = dataclasses.replace(config.task, evaluate=evaluate, num_classes=0)
    return dataclasses.replace(config, task=task, steps=40, eval_every=2, early_stop=3)


def test_a_run_without_progress_ends_early_and_stays_ended(config, tmp_path, capsys):
    still = without_progress(config)
    result = loop.train(still, tmp_path)
    assert result.step == 8
    assert "no better accuracy than 1" in capsys.readouterr().out
    assert result.report is not None
    again = loop.train(still, tmp_path)
    assert "already trained to step 8" in capsys.readouterr().out
    assert again.metrics == result.metrics


def test_early_stop_counts_on_across_a_restart(config, tmp_path):
    still = without_progress(config)
    stopped = loop.train(still, tmp_path, stop=After(17), silent=True)
    assert 2 < stopped.step < 8
    assert loop.train(still, tmp_path, silent=True).step == 8


@pytest.mark.slow
def test_the_average_is_what_is_evaluated(config, tmp_path):
    # An average that does not move keeps the accuracy of the first parameters.
    averaged = dataclasses.replace(config, ema_decay=0.999, steps=9)
    result = loop.train(averaged, tmp_path, silent=True)
    plan = loop.prepare(averaged)
    run = loop.Run(tmp_path, None, None, None, result.state)
    on_average = loop.measure(plan, run, averaged.test_data, loop.never).metrics
    run.state = dataclasses.replace(result.state, ema=None)
    on_last = loop.measure(dataclasses.replace(plan, abstract=run.state), run, averaged.test_data, loop.never).metrics
    assert result.metrics == on_average
    assert on_average != on_last


def test_a_second_run_in_a_directory_is_refused_before_it_compiles(config, tmp_path, capsys):
    with loop.guard.locked(tmp_path), pytest.raises(ValueError, match="is being trained in by process"):
        loop.train(config, tmp_path)
    assert "compiling" not in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()


def test_a_trace_of_some_steps_is_written(config, tmp_path):
    loop.train(dataclasses.replace(config, steps=4, test_data=None, metric=None), tmp_path, silent=True, profile=(2, 3))
    assert any((tmp_path / "profile").rglob("*.xplane.pb"))


def test_utilisation_is_the_work_of_the_products_over_the_peak(config, tmp_path, monkeypatch):
    alone = dataclasses.replace(config, mesh=MeshShape(), steps=3, test_data=None, metric=None)
    one_device = jax.devices()[:1]
    plan = loop.prepare(alone, one_device)
    assert plan.flops() == loop.prepare(dataclasses.replace(alone, accumulate=4), one_device).flops()
    result = loop.train(alone, tmp_path / "unknown", devices=one_device, silent=True)
    assert "train/mfu" not in history(tmp_path / "unknown")[-1]
    assert result.step == 3
    monkeypatch.setattr(loop.hardware, "PEAK_FLOPS", {"cpu": 1e9})
    loop.train(alone, tmp_path / "known", devices=one_device, silent=True)
    line = history(tmp_path / "known")[-1]
    wanted = line["train/examples_per_second"] * plan.flops() / 16 / 1e9
    assert line["train/mfu"] == pytest.approx(wanted, rel=1e-6)


def test_accelerators_are_known_by_their_full_names(monkeypatch):
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    peaks = {
        kind: loop.hardware.peak_flops(Device(kind))
        for kind in ("TPU v5 lite", "TPU v5", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "cpu", "TPU v50")
    }
    assert list(peaks.values()) == [197e12, 459e12, 989e12, 312e12, None, None]


def test_metrics_go_to_weights_and_biases_where_it_is_asked_for(config, tmp_path, monkeypatch):
    class Fake:
        def __init__(self):
            self.lines, self.finished = [], False

        def init(self, **settings):
            self.settings = settings
            return self

        def log(self, values, step):
            self.lines.append((step, values))

        def finish(self):
            self.finished = True

    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    short = dataclasses.replace(config, steps=3, test_data=None, metric=None)
    loop.train(short, tmp_path / "run", silent=True, wandb="layers")
    assert fake.settings["project"] == "layers"
    assert [step for step, _ in fake.lines] == [1, 2, 3]
    assert "train/loss" in fake.lines[0][1]
    assert fake.finished
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs the package wandb; install it: pip install wandb"):
        loop.train(short, tmp_path / "other", silent=True, wandb="layers")


def test_the_notes_name_the_revision_of_the_sources(uninterrupted, tmp_path):
    assert json.loads((uninterrupted[0] / "versions.json").read_text())["git"]
    assert progress.git_revision(tmp_path) == "none"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = progress.git_revision(tmp_path)
    assert len(clean) == 12
    (tmp_path / "a").write_text("2")
    assert progress.git_revision(tmp_path) == f"{clean}+changes"


class FullDisk(loop.Checkpointer):
    """Fails to save the steps in `full`, as a full disk does: the error comes at the next call."""

    full = ()

    def save(self, step, state, **rest):
        failed, self.failed = getattr(self, "failed", None), None
        if failed is not None:
            raise loop.SaveError(failed, f"saving step {failed} failed (disk full)")
        if step in self.full:
            type(self).full = tuple(other for other in self.full if other != step)
            self.failed = step
            return True
        return super().save(step, state, **rest)

    def wait(self):
        failed, self.failed = getattr(self, "failed", None), None
        if failed is not None:
            raise loop.SaveError(failed, f"saving step {failed} failed (disk full)")
        super().wait()


@pytest.mark.parametrize("full", [(3,), (3, 6), (9,), (6, 9)])
def test_a_save_that_fails_is_named_and_the_run_goes_on(config, uninterrupted, tmp_path, monkeypatch, capsys, full):
    monkeypatch.setattr(loop, "Checkpointer", FullDisk)
    monkeypatch.setattr(FullDisk, "full", full)
    result = loop.train(config, tmp_path)
    out = capsys.readouterr().out
    for step in full:
        assert f"warning: saving step {step} failed (disk full)" in out
    assert_bitwise(result.state, uninterrupted[1].state)
    assert loop.train(config, tmp_path, silent=True).step == 9  # the last one is on disk


def test_the_last_save_must_succeed(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Checkpointer", FullDisk)
    monkeypatch.setattr(FullDisk, "full", (9, 9))
    monkeypatch.setattr(FullDisk, "save", lambda self, step, state, **rest: self.fail(step), raising=False)

    def fail(self, step):
        raise loop.SaveError(step, f"saving step {step} failed (disk full)")

    monkeypatch.setattr(FullDisk, "fail", fail, raising=False)
    with pytest.raises(loop.SaveError, match="saving step 9 failed"):
        loop.train(config, tmp_path, silent=True)


def test_the_watchdog_guards_the_steps_and_nothing_after_them(config, tmp_path, monkeypatch):
    armed, seen, stepped, save = [], {}, [], loop.save
    monkeypatch.setattr(loop.guard.faulthandler, "dump_traceback_later", lambda *rest, **more: armed.append(True))
    monkeypatch.setattr(loop.guard.faulthandler, "cancel_dump_traceback_later", armed.clear)

    def baselines():  # may take hours
        seen["report"] = bool(armed)
        seen["readers"] = [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]
        return {}

    monkeypatch.setattr(loop, "save", lambda *rest: (stepped.append(bool(armed)), save(*rest)))
    loop.train(dataclasses.replace(config, steps=3, baselines=baselines), tmp_path, silent=True)
    assert stepped == [True]
    assert seen["report"] is False
    assert seen["readers"] == []
