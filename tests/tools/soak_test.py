"""The soak: what it compares, that its checks pass on the trainer, and that they fail on a trainer that loses work."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train import shared_cache
from tools import soak as tool
from train import checkpoint

# A trainer that goes on one batch too far after it resumed: nothing crashes, and the curve looks as good.
FORGETS = """
import sys
from train import checkpoint

restore = checkpoint.Checkpointer.restore

def forgetful(self, *arguments, **keywords):
    restored = restore(self, *arguments, **keywords)
    if restored is not None:
        restored.data["next_batch"] += 1
    return restored

checkpoint.Checkpointer.restore = forgetful
from train.__main__ import main
sys.exit(main())
"""


def soak_in(folder, **options):
    return tool.Soak(folder, quick=True, environment=shared_cache.environment(), **options)


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    return soak_in(tmp_path_factory.mktemp("soak"), seed=1)


def failed(rows):
    assert rows
    return [row for row in rows if row.passed != row.trials]


@pytest.mark.slow
def test_every_damaged_file_is_detected_or_harmless(soak):
    rows = list(tool.files(soak, repeats=1))
    assert not failed(rows), failed(rows)
    kinds = {row.name.rpartition(", ")[0] for row in rows}
    arrays = {"state/d/* (array data)", "state/ocdbt.process_0/d/* (array data)"}
    assert {"manifest/manifest.json", "state/manifest.ocdbt", *arrays} <= kinds
    details = " ".join(row.detail for row in rows)
    assert "detected, step before restored" in details
    assert "harmless, same bits" in details


class Equal:
    """Equal to whatever it is compared with."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __hash__ = None


def test_without_digests_the_check_of_files_fails(soak, monkeypatch):
    monkeypatch.setattr(checkpoint, "_digests", lambda arrays: [Equal()] * len(arrays))
    rows = [row for row in tool.files(soak, repeats=12, only="process_0/d/") if "bit flipped" in row.name]
    assert failed(rows)
    assert "SILENTLY WRONG" in " ".join(row.detail for row in rows)
    assert "**" in tool.report(rows, command="", seconds=0)


@pytest.mark.slow
def test_a_trainer_that_forgets_where_it_was_does_not_pass(tmp_path, soak):
    forgetful = soak_in(tmp_path, program=(sys.executable, "-u", "-c", FORGETS))
    forgetful._undisturbed[8] = soak.reference  # which never resumed
    config, workdir = forgetful.config("kills"), tmp_path / "kills" / "run"
    for steps in (2 * tool.SAVE_EVERY, tool.STEPS):
        with forgetful.start(config, workdir, f"--set=steps={steps}") as run:
            run.finish()
    failures = []
    assert not tool.attempt(forgetful, failures, lambda: tool.compare(workdir, soak.reference))
    assert "is not that of the undisturbed run" in failures[0]
    row = tool.row("kill -9", "name", [True, False], failures)
    assert (row.trials, row.passed) == (2, 1)


@pytest.mark.slow
def test_the_short_form_passes_from_the_command_line(tmp_path, monkeypatch):
    for name, value in shared_cache.environment().items():
        monkeypatch.setenv(name, value)
    written = tmp_path / "soak.md"
    assert tool.main(["--quick", "--kills=4", "--seed=3", f"--report={written}", f"--folder={tmp_path / 'runs'}"]) == 0
    text = written.read_text()
    assert "Everything came out as promised." in text
    assert "4 kills" in text
    for heading in tool.HEADINGS.values():
        assert f"## {heading}" in text
    assert "`python -m tools.soak --kills 4 --seed 3 --quick`" in text
    assert str(tmp_path) not in text


def test_a_failed_trial_gives_a_failing_exit_code(tmp_path, monkeypatch, capsys):
    good, bad = tool.Row("signals", "good", 2, 2), tool.Row("signals", "bad", 2, 1, "because")
    for rows, code in (([good], 0), ([good, bad], 1), ([], 1)):
        monkeypatch.setattr(tool, "checks", lambda count, rows=rows: {"one": lambda soak: iter(rows)})
        assert tool.main([f"--folder={tmp_path}"]) == code
    assert tool.main(["--only=two"]) == 2
    assert "must be one of one" in capsys.readouterr().err


def test_the_time_limit_leaves_checks_out_and_says_so(tmp_path):
    late = soak_in(tmp_path, minutes=0)
    time.sleep(0.01)
    assert tool.soak_all(late, {"devices": tool.devices}) == []
    assert late.cut == ["devices"]
    text = tool.report([], command="", seconds=0, cut=late.cut)
    assert "cut short or left out: devices" in text


def test_a_check_that_cannot_be_carried_out_has_failed(tmp_path):
    def broken(soak):
        """Break."""
        yield tool.Row("data", "first", 1, 1)
        raise tool.TrialError("no such thing")

    rows = tool.soak_all(soak_in(tmp_path), {"broken": broken})
    assert [row.passed for row in rows] == [1, 0]
    assert "no such thing" in rows[1].detail


def test_comparisons_see_one_bit_and_one_step(tmp_path):
    state = {"a/b": np.arange(4, dtype=np.float32), "c": np.int32(3)}
    flipped = {**state, "a/b": state["a/b"].copy()}
    flipped["a/b"].view(np.uint32)[2] ^= 1
    assert tool.same_bits(state, {**state}) == ""
    assert "the first is a/b" in tool.same_bits(flipped, state)
    assert "other arrays" in tool.same_bits({"c": state["c"]}, state)
    assert 0 < tool.largest_difference(flipped, state) < 1e-6
    lines = [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3)]
    assert tool.largest_loss_difference(lines, lines) == 0
    for wrong in (lines[:2], [*lines, lines[-1]]):
        with pytest.raises(tool.TrialError, match="were logged"):
            tool.largest_loss_difference(wrong, lines)
    # A line that a kill cut off is no line, and what depends on the clock is left out.
    text = json.dumps({"step": 1, "train/loss": 0.5, "train/examples_per_second": 9.0}) + "\n" + '{"step": 2, "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert tool.losses(tmp_path) == [{"step": 1, "train/loss": 0.5}]


@pytest.mark.parametrize("kind", tool.DAMAGES)
def test_damage_always_changes_the_file(tmp_path, kind):
    rng = random.Random(0)
    for size in (1, 7, 1000):
        path = tmp_path / "file"
        path.write_bytes(bytes(size))
        tool.damage(path, kind, rng)
        assert not path.exists() or path.read_bytes() != bytes(size)
        if kind == "bit flipped":
            assert sum(byte.bit_count() for byte in path.read_bytes()) == 1


def test_writes_are_refused_for_as_long_as_it_is_wanted(tmp_path):
    code = "import sys\nfor line in sys.stdin:\n  try:\n    with open(sys.argv[1], 'wb') as file:\n"
    code += "      file.write(bytes(5000))\n"
    code += "    print('ok', flush=True)\n"
    code += "  except OSError as error:\n    print(error.errno, flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def write():
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    try:
        assert write() == "ok"
        lift = tool._refuse(process.pid, 1000)
        assert write() == "27"  # EFBIG
        lift()
        assert write() == "ok"
    finally:
        process.kill()
        process.wait()


def test_a_run_that_hangs_fails_its_trial_and_is_killed_with_its_children(tmp_path):
    code = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(100)"
    parent = (
        f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.run([sys.executable, '-c', {code!r}])"
    )
    config = soak_in(tmp_path).config("hangs")
    command = [sys.executable, "-c", parent]
    with tool.Running([command], dict(os.environ), config, tmp_path / "hangs" / "run", patience=30) as run:
        assert run.until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
        child = int((tmp_path / "child").read_text())
        assert tool.children(run.processes[0].pid) == [child]
        run.patience = 0.1
        with pytest.raises(tool.TrialError, match="nothing happened"):
            run.until(lambda: False)
        with pytest.raises(tool.TrialError, match="did not end"):
            run.codes()
        os.kill(child, 0)  # it is there
    assert run.processes[0].returncode == -signal.SIGKILL
    limit = time.monotonic() + 30
    state = ["ps", "-o", "stat=", "-p", str(child)]
    while subprocess.run(state, capture_output=True, check=False).stdout.strip()[:1] not in (b"", b"Z"):
        assert time.monotonic() < limit
        time.sleep(0.02)
