"""The benchmark of the input measures what it says, on data of its own or of a config."""

import re
import time
from pathlib import Path

import numpy as np
import pytest

from tools import bench_input
from train import data

TINY = Path(__file__).resolve().parents[1] / "train" / "tiny.py"


class Slow:
    """Records that take a known time to read; the transform below takes three times as long."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> data.Record:
        time.sleep(0.004)
        return {"x": np.zeros(2)}


def slow(record: data.Record, generator: np.random.Generator) -> data.Record:
    time.sleep(0.012)
    return record


def test_rates_and_shares_are_those_of_the_work() -> None:
    reading, transforming = bench_input.shares(Slow(), slow, 8)
    assert reading >= 0.004
    assert transforming >= 0.012
    assert reading < transforming
    # No more than 62.5 records a second can be made, however many batches were ready before the clock starts.
    for workers in (0, 1):
        rate = bench_input.measure(Slow(), slow, 4, workers, 4)
        assert rate.workers == workers
        assert 0 < rate.records_per_second < 70


def test_the_report_says_what_a_step_needs() -> None:
    rates = [bench_input.Rate(0, 0.1, 100.0), bench_input.Rate(2, 0.5, 150.0)]
    text = bench_input.report("x", rates, reading=0.002, transforming=0.006, batch_size=50, step_seconds=0.1)
    assert "one record, in this process: 8.00 ms, of which 25% read and decode, 75% transform" in text
    rows = [line.split() for line in text.splitlines()[3:5]]
    assert [(row[0], row[3], row[4], row[5]) for row in rows] == [
        ("0", "100.0", "1.00", "500.0"),
        ("2", "150.0", "1.50", "333.3"),
    ]
    assert "a step of 100 ms needs 500.0 records/s: 3.33 times what 2 workers deliver, 4.0 processor cores" in text


def test_it_runs_on_images_of_its_own_and_on_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--batches", "1", "--batch-size", "4"]
    drawn = bench_input.main(["--images", "12", "--workers", "0", "1", *common])
    assert drawn.startswith("12 JPEG images of 500 x 375, Swin recipe at 224, batches of 4\n")
    assert len(re.findall(r"^ +[01] +[\d.]+ s +[\d.]+ ", drawn, re.MULTILINE)) == 2
    configured = bench_input.main([str(TINY), "--workers", "0", *common])
    assert "tiny.py (arrays(tokens, label)), batches of 4" in configured
    assert capsys.readouterr().out == f"{drawn}\n{configured}\n"
    with pytest.raises(SystemExit):
        bench_input.main(["--batches", "0"])
    assert "--batches must be at least 1, got 0" in capsys.readouterr().err


def test_drawn_images_are_jpegs_of_every_class(tmp_path: Path) -> None:
    bench_input.draw_images(tmp_path, 20, size=(50, 40))
    source = data.image_folder(tmp_path)
    assert len(source) == 20
    assert source.classes == tuple(f"class_{number}" for number in range(10))
    assert source[0]["image"].shape == (40, 50, 3)
    assert 20 < source[0]["image"].std() < 120
