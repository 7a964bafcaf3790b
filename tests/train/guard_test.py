"""The guards: one run a directory, an end to hanging, spikes seen, patience counted."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from train import guard

ROOT = Path(__file__).parents[2]


def run(code, *arguments, timeout=60):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_a_directory_is_locked_for_others_and_free_again_after_a_kill(tmp_path):
    hold = """
        import os, signal, sys, pathlib
        from train import guard
        with guard.locked(pathlib.Path(sys.argv[1])):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    take = """
        import sys, pathlib
        from train import guard
        try:
            with guard.locked(pathlib.Path(sys.argv[1])): print("mine")
        except guard.LockedError as error: print(error)
    """
    with guard.locked(tmp_path):
        output = run(take, tmp_path).stdout
        assert "is being trained in by process" in output
        assert "set another --workdir" in output
    assert run(take, tmp_path).stdout == "mine\n"
    assert run(hold, tmp_path).returncode == -9
    assert run(take, tmp_path).stdout == "mine\n"


HANG = """
    import ctypes, sys, time
    from train import guard
    guard.Watchdog.GRACE_SECONDS = 0.5
    # The second keeps the interpreter's lock while it sleeps.
    sleep = {"free": time.sleep, "locked": ctypes.PyDLL(None).sleep}[sys.argv[3]]
    def waits_for_ever(seconds):
        sleep(seconds)
    with guard.Watchdog(float(sys.argv[1])) as watchdog:
        for _ in range(6):
            time.sleep(0.25)
            watchdog.alive()
        waits_for_ever(int(sys.argv[2]))
    time.sleep(float(sys.argv[1]) * 2)
    print("done")
"""


@pytest.mark.parametrize("lock", ["free", "locked"])
def test_a_hang_ends_the_process_and_shows_where_it_hung(lock):
    began = time.monotonic()
    hung = run(HANG, 1.0, 50, lock)
    assert time.monotonic() - began < 30
    assert hung.returncode == 1
    assert "waits_for_ever" in hung.stderr
    assert "done" not in hung.stdout


def test_a_process_that_gives_signs_of_life_is_left_alone():
    assert run(HANG, 1.0, 0, "free").stdout == "done\n"


def test_without_a_limit_nothing_is_watched():
    with guard.Watchdog(None) as watchdog:
        watchdog.alive()


def test_spikes_are_found_and_ordinary_noise_is_not():
    rng = np.random.default_rng(0)
    losses = 2.0 * np.exp(-np.arange(1000) / 400) + rng.normal(scale=0.05, size=1000)
    losses[[300, 700]] += 2.0
    spikes = guard.Spikes(6.0)
    assert [step for step, loss in enumerate(losses) if spikes.check(loss)] == [300, 700]
    silent = guard.Spikes(None)
    assert not any(silent.check(loss) for loss in losses)


def test_a_new_level_is_not_a_spike_for_ever():
    spikes = guard.Spikes(6.0)
    rng = np.random.default_rng(1)
    found = [spikes.check(loss) > 0 for loss in np.concatenate([rng.normal(1, 0.01, 200), rng.normal(2, 0.01, 400)])]
    assert found[200]
    assert not any(found[400:])


@pytest.mark.parametrize(("mode", "values"), [("max", [1, 3, 2, 3, 2.5, 4, 0]), ("min", [9, 7, 8, 7, 7.5, 6, 10])])
def test_patience_counts_evaluations_without_a_better_value(mode, values):
    patience, waited = guard.Patience(), []
    for value in values:
        patience.look(value, mode)
        waited.append(patience.waited)
    assert waited == [0, 0, 1, 2, 3, 0, 1]
    assert patience.best == values[5]
    assert patience.ended(1)
    assert not patience.ended(2)
    assert not patience.ended(None)


def test_a_value_that_is_not_a_number_is_never_the_best():
    patience = guard.Patience()
    patience.look(float("nan"), "max")
    assert patience.best is None
    assert patience.waited == 1
