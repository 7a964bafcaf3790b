"""The command line, end to end: exit codes, signals, kill -9, and two processes."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.train import shared_cache
from tests.train.config_test import TINY
from train import loop
from train.__main__ import HUGE_PAGES, main, use_virtual_devices
from train.checkpoint import Checkpointer
from train.config import MeshShape, load

ROOT = Path(__file__).parents[2]
MESH = MeshShape(data=2, fsdp=2, sequence=1, tensor=2)
STEPS = 40
SETTINGS = ["--set=mesh.fsdp=2", "--set=mesh.tensor=2", "--set=mesh.data=2"]
SETTINGS += [f"--set=steps={STEPS}", "--set=eval_every=16", "--set=checkpoint_every=8"]
PATIENCE = 240


ENVIRONMENT = os.environ | shared_cache.environment() | {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}


def start(workdir, *arguments, config=TINY, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", "train", str(config), "--workdir", str(workdir), *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def steps_logged(workdir):
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition, process):
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def finish(process):
    return process.communicate(timeout=PATIENCE)[0], process.returncode


def final_state(workdir, config):
    checkpointer = Checkpointer(workdir / "checkpoints")
    restored = checkpointer.restore(loop.prepare(config).abstract)
    checkpointer.close()
    return restored.step, jax.tree.map(np.asarray, restored.state)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "train/examples_per_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = dataclasses.replace(load(TINY), steps=STEPS, mesh=MESH, eval_every=16, checkpoint_every=8)
    with shared_cache.used():
        loop.train(config, workdir, silent=True)
    return config, workdir, final_state(workdir, config)


def assert_same_end(workdir, uninterrupted):
    config, reference, (step, state) = uninterrupted
    found_step, found = final_state(workdir, config)
    assert found_step == step == STEPS
    for (path, leaf), other in zip(jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(found), strict=True):
        assert leaf.tobytes() == other.tobytes(), jax.tree_util.keystr(path)
    assert losses(workdir) == losses(reference)


def test_interrupted_and_killed_runs_end_bitwise_where_the_uninterrupted_run_ends(uninterrupted, tmp_path):
    for number, at, code in ((signal.SIGINT, 5, 130), (signal.SIGTERM, 12, 143)):
        process = start(tmp_path, "--devices=8", *SETTINGS)
        wait_for(lambda at=at: at in steps_logged(tmp_path), process)
        process.send_signal(number)
        output, returned = finish(process)
        assert returned == code, output
        saved = steps_logged(tmp_path)[-1]
        assert f"stopped by {number.name}: saved step {saved}; run the same command to resume" in output
        assert at <= saved < STEPS
        assert (tmp_path / "checkpoints" / str(saved) / "manifest").is_dir()

    before = saved
    process = start(tmp_path, "--devices=8", *SETTINGS)

    def under_way():
        last = steps_logged(tmp_path)[-1]
        return last > before + 6 or (last > before + 2 and any(tmp_path.glob("checkpoints/*tmp*")))  # inside a save

    wait_for(under_way, process)
    process.kill()
    output, returned = finish(process)
    assert returned == -signal.SIGKILL
    assert f"resuming from step {before}" in output

    output, returned = finish(start(tmp_path, "--devices=8", *SETTINGS))
    assert returned == 0, output
    assert "resuming from step" in output
    assert (tmp_path / "report" / "report.md").exists()
    assert_same_end(tmp_path, uninterrupted)


def output_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_while_compiling_ends_before_the_first_step(tmp_path, number):
    process = start(tmp_path, "--devices=2", "--set=steps=300")
    output_until(process, "compiling")
    process.send_signal(number)
    output, code = finish(process)
    assert code == 128 + number, output
    assert f"stopped by {number.name}: " in output
    assert len(steps_logged(tmp_path)) <= 2


def test_a_hang_ends_the_command_with_its_stacks(tmp_path):
    # Compiling takes longer than this limit and gives no sign of life.
    process = start(tmp_path, "--devices=2", "--set=hang_seconds=0.05")
    output, code = finish(process)
    assert code == 1, output
    assert "no sign of life for 0.05 s" in output
    assert "in take_steps" in output


def test_two_runs_in_one_directory_are_refused(tmp_path, capsys):
    process = start(tmp_path, "--devices=2", "--set=steps=3000")
    try:
        output_until(process, "compiling")
        assert main([str(TINY), "--workdir", str(tmp_path)]) == 2
    finally:
        process.kill()
        finish(process)
    assert f"is being trained in by process {process.pid} on" in capsys.readouterr().err


def test_a_learning_rate_is_suggested(tmp_path, capsys):
    assert main([str(TINY), "--find-rate", "--set=mesh.data=8", "--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "optim.learning_rate=" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learning_rate.csv", "learning_rate.png"]


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b"])
def test_profile_takes_two_steps_in_order(text, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(TINY), "--profile", text])
    assert error.value.code == 2
    assert "must be two steps in order, as 10:20" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_at_random_moments_changes_nothing(uninterrupted, tmp_path):
    rng = random.Random(0)
    for kill in range(12):
        process = start(tmp_path, "--devices=8", *SETTINGS)
        if kill % 2:  # in the start: imports, restoring, compiling
            time.sleep(rng.uniform(0, 12))
        else:  # among the steps
            wanted = min(len(steps_logged(tmp_path)) + rng.randint(1, 4), STEPS)
            wait_for(lambda wanted=wanted: wanted in steps_logged(tmp_path), process)
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        finish(process)
    output, returned = finish(start(tmp_path, "--devices=8", *SETTINGS))
    assert returned == 0, output
    assert_same_end(tmp_path, uninterrupted)


def start_two(workdir, *settings, by_environment=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # One device each: with more, jaxlib 0.10's collectives between CPU processes can hang.
    several = ["--devices=1", "--set=model.depths=()"]
    if by_environment:
        shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        several.append("--distributed")
        return [start(workdir, *several, *settings, JAX_PROCESS_ID=str(index), **shared) for index in range(2)]
    several += [f"--coordinator={address}", "--num-processes=2"]
    return [start(workdir, *several, f"--process-id={index}", *settings) for index in range(2)]


def test_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    processes = start_two(tmp_path, f"--set=steps={STEPS * 50}", by_environment=True)
    try:
        wait_for(lambda: 5 in steps_logged(tmp_path), processes[0])
        processes[1].send_signal(signal.SIGTERM)
        (first, code), (second, other) = (finish(process) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert code == other == 143, (first, second)
    saved = steps_logged(tmp_path)[-1]
    assert f"stopped by SIGTERM: saved step {saved}" in first
    assert "on 2 cpu devices" in first
    assert "step" not in second.replace("saving after this step", "")  # only process 0 reports


@pytest.mark.slow
def test_two_processes_resume_and_end_where_one_ends(tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert finish(start(alone, "--devices=2", "--set=model.depths=()"))[1] == 0
    for number in (signal.SIGTERM, None):
        processes = start_two(both)
        try:
            if number is not None:
                wait_for(lambda: 9 in steps_logged(both), processes[0])
                processes[0].send_signal(number)
            (first, code), (second, other) = (finish(process) for process in processes)
        finally:
            for process in processes:
                process.kill()
        assert code == other == (128 + number if number else 0), (first, second)
    assert "resuming from step" in first
    assert (both / "report" / "report.md").exists()
    for line, wanted in zip(losses(both), losses(alone), strict=True):
        assert line == pytest.approx(wanted, abs=2e-5)


def test_bad_settings_end_with_code_2_and_what_would_do(tmp_path, capsys):
    for arguments, message in (
        (["--set", "model.depht=1"], "Tiny has no field 'depht'; the nearest is 'depths'"),
        (["--set", "mesh.tensor=3"], "these sizes would fit: data=2"),
        (["--set", "mesh.tensor=3", "--set", "mesh.data=1"], "needs 3 devices and there are 8"),
        (["--set", "batch_size=12"], "batch_size=12 must be divisible by data*fsdp=8"),
        (["--coordinator", "localhost:1"], "go together"),
        (["--devices", "0"], "--devices 0 must be at least 1"),
    ):
        assert main([str(TINY), "--workdir", str(tmp_path / "run"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main([str(tmp_path / "none.py")]) == 2
    assert "there is no config file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_data_ends_with_code_2_and_how_to_prepare_it(tmp_path, capsys):
    config = tmp_path / "needs_data.py"
    config.write_text(
        "from train.data import tfds\n"
        f"def config(smoke=False):\n    return tfds('mnist', 'train', data_dir={str(tmp_path)!r})\n"
    )
    assert main([str(config)]) == 2
    assert "prepare it with: python -c" in capsys.readouterr().err


def test_print_lists_every_field(capsys):
    assert main([str(TINY), "--smoke", "--print", "--set", "model.depths=(3,)"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.depths = (3,)" in lines
    assert "steps = 4" in lines


def test_devices_flag_replaces_an_earlier_one(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    use_virtual_devices(3)
    assert os.environ["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_force_host_platform_device_count=3"]
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_the_command_imports_no_jax_before_it_has_read_its_arguments():
    code = "import sys, train.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("given", [None, "glibc.malloc.check=0"], ids=["unset", "set"])
def test_the_command_asks_for_huge_pages_unless_told_how_to_allocate(tmp_path, given):
    config = tmp_path / "tell.py"
    config.write_text("import os\nraise ValueError(f\"tunables: {os.environ.get('GLIBC_TUNABLES')}\")\n")
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-u", "-m", "train", str(config), "--print"],
        cwd=ROOT,
        env=environment | ({} if given is None else {"GLIBC_TUNABLES": given}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    expected = given or (HUGE_PAGES if sys.platform == "linux" else None)
    assert f"tunables: {expected}" in done.stderr
