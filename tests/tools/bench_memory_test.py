"""What the benchmark of large memories measures: that its runs recall, and what they need."""

import json
import re

import pytest

from tools import bench_memory


def row(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [float(cell) for cell in re.findall(r"[\d.]+", line.removeprefix(f"| {name} |").replace(",", ""))]


def test_command_prints_a_row_for_each_run_and_every_run_recalls(capsys, tmp_path):
    sizes = ["--patterns", "20000", "--features", "32", "--states", "8", "--chunk-size", "512"]
    out = tmp_path / "table.md"
    assert bench_memory.main([*sizes, "--runs", "streamed", "sharded-gradient", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    recalled, _, operands, spare, _ = row(printed, "streamed")
    assert recalled == 1
    assert operands > 2
    # A chunk of logits and weights, not a row for every pattern.
    assert spare < 0.5 * 4 * 8 * 20000 / 2**20
    recalled, _, of_a_device, _, _ = row(printed, "streamed over 8 devices, with gradient")
    assert recalled == 1
    assert of_a_device < operands / 6


def test_what_was_not_recalled_is_seen(capsys):
    # Two features cannot tell 2,000 patterns apart.
    sizes = ["--patterns", "2000", "--features", "2", "--states", "8", "--chunk-size", "512"]
    bench_memory.main([*sizes, "--run", "plain"])
    assert json.loads(capsys.readouterr().out)["recalled"] < 0.9


@pytest.mark.parametrize("option", [["--patterns", "0"], ["--runs", "fast"]])
def test_sizes_and_runs_that_do_not_exist_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        bench_memory.main(option)
    assert option[0][2:] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["streamed", "streamed-gradient", "sharded", "sharded-gradient"])
def test_a_million_patterns_are_recalled_within_two_gigabytes(name):
    found = bench_memory.in_a_process(name, bench_memory.Size(1_000_000, 64, 64, 8192))
    assert found["recalled"] == 1
    assert found["peak_bytes"] < 2e9
