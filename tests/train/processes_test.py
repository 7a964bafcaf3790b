"""Several real processes on this machine: what each one reads, what all compute, and how they start and end together.

Every process owns one CPU device: with more, collectives of jaxlib 0.10 between CPU processes can hang.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train import shared_cache
from tests.train.config_test import TINY
from tests.train.tiny import records
from train import data, loop
from train.checkpoint import Checkpointer
from train.config import load, override

ROOT = Path(__file__).parents[2]
PATIENCE = 240
ROWS, BATCH = 960, 16
SETTINGS = ["--set=steps=6", "--set=eval_every=3", "--set=checkpoint_every=3"]
# Adam turns the rounding error of a gradient that is zero (a bias before a normalisation) into whole steps.
SETTINGS += ["--set=optim.epsilon=1e-5"]

# The training records of `tiny`, more of them, each noted as it is read; the notes of one process are one file.
NOTED = f"""
import dataclasses
import os
from pathlib import Path

from tests.train import tiny


@dataclasses.dataclass(frozen=True)
class Noted:
    source: object

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        with (Path(__file__).parent / f"read-{{os.environ['RANK']}}.txt").open("a") as file:
            file.write(f"{{index}}\\n")
        return self.source[index]

    def digest(self):
        return self.source.digest()


def config(smoke=False):
    return dataclasses.replace(tiny.config(smoke), train_data=Noted(tiny.records({ROWS}, seed=1)))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_flags(count):
    """The three flags of each process."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    return [([address, f"--num-processes={count}", f"--process-id={rank}"], {}) for rank in range(count)]


def by_slurm(count):
    """What `srun --ntasks=count` sets on one node, and `--distributed`."""
    port = str(free_port())
    job = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    return [
        (
            ["--distributed"],
            job
            | {"SLURM_NTASKS": str(count), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            | {"JAX_COORDINATOR_PORT": port},  # else from the job's number, and may be taken on this machine
        )
        for rank in range(count)
    ]


class Group:
    """Processes of one run; leaving the context kills what is left of them."""

    def __init__(self, workdir, starts, *settings, config=TINY, program=("-m", "train")):
        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
        environment |= shared_cache.environment() | {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        self.outputs = [self.workdir.parent / f"{self.workdir.name}-{rank}.log" for rank in range(len(starts))]
        self.processes = []
        for rank, (flags, variables) in enumerate(starts):
            command = [*program, str(config), "--workdir", str(workdir), "--devices=1", *flags, *SETTINGS, *settings]
            with self.outputs[rank].open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        cwd=ROOT,
                        env=environment | variables | {"RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for process in self.processes:
            process.kill()
            process.wait()

    def text(self, rank):
        return self.outputs[rank].read_text(errors="replace")

    def until(self, condition):
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, "nothing happened"
            for rank, process in enumerate(self.processes):
                assert process.poll() is None, self.text(rank)
            time.sleep(0.01)

    def codes(self):
        limit = time.monotonic() + PATIENCE
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, limit - time.monotonic()))
        return [process.poll() for process in self.processes]

    def finish(self):
        assert self.codes() == [0] * len(self.processes), [self.text(rank) for rank in range(len(self.processes))]


def lines(workdir):
    path = Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    keep = ("step", "train/loss", "train/gradient_norm", "train/accuracy", "test/loss", "test/accuracy")
    return [{name: line[name] for name in keep if name in line} for line in whole]


def close(found, wanted, tolerance=2e-5):
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    assert len(found) > 0
    for line, other in zip(found, wanted, strict=True):
        assert line == pytest.approx(other, abs=tolerance)


def alone(workdir, devices, *settings, config=TINY):
    """The same run in this process, with as many devices."""
    import jax

    values = [setting.removeprefix("--set=") for setting in (*SETTINGS, *settings)]
    with shared_cache.used():
        loop.train(override(load(config), values), workdir, devices=jax.devices()[:devices], silent=True)
    return lines(workdir)


def rows_of(rank, count, batches):
    """The indices of the records that one process holds of the first batches."""
    stream = data.batches(
        data.arrays(index=np.arange(ROWS)), batch_size=BATCH, seed=0, process_index=rank, process_count=count
    )
    found = [int(index) for _ in range(batches) for index in next(stream)["index"]]
    stream.close()
    return found


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """A config whose records note who reads them; and who read what."""
    path = tmp_path / "noted.py"
    path.write_text(NOTED)
    monkeypatch.setenv("RANK", "alone")

    def read(rank):
        return {int(line) for line in (tmp_path / f"read-{rank}.txt").read_text().split()}

    return path, read


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_under_slurm_read_their_own_rows_and_compute_what_one_process_does(tmp_path, noted, count):
    config, read = noted
    with Group(tmp_path / "run", by_slurm(count), config=config) as group:
        group.finish()
    assert f"on {count} cpu devices" in group.text(0)

    wanted = alone(tmp_path / "alone", count, config=config)
    found = lines(tmp_path / "run")
    close(found, wanted, 1e-6)
    if count == 2:  # one sum of two terms has one order
        assert found == wanted

    sets = [read(rank) for rank in range(count)]
    for rank, own in enumerate(sets):
        assert own >= set(rows_of(rank, count, 6))
        ahead = set(rows_of(rank, count, 20))  # what was read ahead is its own as well
        assert own <= ahead
        for other in sets[:rank]:
            assert not own & other
    assert read("alone") >= set().union(*(rows_of(rank, count, 6) for rank in range(count)))

    for rank in range(1, count):
        said = group.text(rank)
        assert "step" not in said, said
        assert "report" not in said
    assert len((tmp_path / "run" / "command.txt").read_text().splitlines()) == 1
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_a_killed_process_ends_the_others_within_the_heartbeat_time_and_all_resume(tmp_path):
    wanted = alone(tmp_path / "alone", 2)
    long = "--set=steps=20000"
    with Group(tmp_path / "run", by_flags(2), long, "--heartbeat-seconds=10") as group:
        group.until(lambda: len(lines(tmp_path / "run")) > 8)
        group.processes[1].kill()
        killed = time.monotonic()
        codes = group.codes()
        took = time.monotonic() - killed
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == -signal.SIGABRT
    assert took < 30, took
    assert "another task died" in group.text(0)

    # The first six steps are those of the short run; the checkpoint is newer than they are.
    close(lines(tmp_path / "run")[:5], wanted[:5], 1e-6)
    with Group(tmp_path / "run", by_flags(2), long) as group:
        group.until(lambda: "resuming from step" in group.text(0))
        group.processes[0].send_signal(signal.SIGTERM)
        assert group.codes() == [143, 143]


@pytest.mark.slow
def test_a_run_goes_on_with_one_two_four_and_one_processes(tmp_path):
    whole = alone(tmp_path / "alone", 1, "--set=steps=12")
    for count, steps in ((1, 3), (2, 6), (4, 9), (1, 12)):
        with Group(tmp_path / "run", by_flags(count), f"--set=steps={steps}") as group:
            group.finish()
        assert f"on {count} cpu device" in group.text(0)
        if steps > 3:
            assert f"resuming from step {steps - 3}" in group.text(0)
    close(lines(tmp_path / "run"), whole, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_a_signal_to_any_of_four_processes_stops_all_at_one_step(tmp_path, victim):
    with Group(tmp_path / "run", by_flags(4), "--set=steps=20000") as group:
        group.until(lambda: len(lines(tmp_path / "run")) > 5)
        group.processes[victim].send_signal(signal.SIGTERM)
        assert group.codes() == [143] * 4, [group.text(rank) for rank in range(4)]
    last = lines(tmp_path / "run")[-1]["step"]
    assert f"stopped by SIGTERM: saved step {last}" in group.text(0)
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        assert checkpointer.steps()[0] == last


@pytest.mark.slow
def test_four_processes_with_split_parameters_compute_what_one_process_does(tmp_path):
    split = ["--set=model.features=32", "--set=mesh.fsdp=2", "--set=mesh.tensor=2"]
    with Group(tmp_path / "run", by_flags(4), *split) as group:
        group.finish()
    close(lines(tmp_path / "run"), alone(tmp_path / "alone", 4, *split), 1e-5)


def test_records_of_the_noted_config_are_those_of_tiny(tmp_path, noted):
    config, read = noted
    source = load(config).train_data
    np.testing.assert_array_equal(source[3]["tokens"], records(ROWS, seed=1)[3]["tokens"])
    assert read("alone") == {3}
