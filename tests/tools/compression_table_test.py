import dataclasses
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from configs import s2lic_photographs as task
from tools import compression_table
from tools.compression_table import Compared, Point
from train.photographs import photograph


class Halved:
    """A codec that stores every `step`-th pixel."""

    parameters = 1234

    def __init__(self, step):
        self.step = step

    def encode(self, picture):
        small = np.ascontiguousarray(picture[:: self.step, :: self.step])
        return repr(picture.shape[:2]).encode().ljust(16) + zlib.compress(small.tobytes())

    def decode(self, data):
        height, width = eval(data[:16])
        small = np.frombuffer(zlib.decompress(data[16:]), np.uint8)
        small = small.reshape(-(-height // self.step), -(-width // self.step), 3)
        return small.repeat(self.step, axis=0).repeat(self.step, axis=1)[:height, :width]


@pytest.fixture(scope="module")
def measured():
    picture = photograph("astronaut")[:180, :176]
    codecs = [Halved(2), Halved(4)]
    return picture, *compression_table.compare(codecs, {"astronaut": picture}, (2, 30, 90))


def test_points_are_of_real_files(measured):
    picture, found, back = measured
    one = found["astronaut"]
    assert one.pixels == 180 * 176
    for codec, point, decoded in zip((Halved(2), Halved(4)), one.learned, back["astronaut"], strict=True):
        assert point.size == len(codec.encode(picture))
        error = np.mean((decoded.astype(float) - picture) ** 2)
        np.testing.assert_allclose(point.psnr, 10 * np.log10(255**2 / error), rtol=1e-5)
    for points in one.jpeg.values():
        assert [point.size for point in points] == sorted(point.size for point in points)
        assert points[2].psnr > points[0].psnr + 3
        assert 0 < points[0].ms_ssim < points[2].ms_ssim < 1
    assert one.jpeg["4:4:4"][2].size > one.jpeg["4:2:0"][2].size


def test_jpeg_gets_no_fewer_bytes():
    points = [Point(size, 0.0, 0.0) for size in (100, 300, 250, 400)]
    assert compression_table.at_least(points, 200) == 2
    assert compression_table.at_least(points, 250) == 2
    assert compression_table.at_least(points, 999) == 3


def test_verdict_counts_the_better_pictures():
    jpeg = {"4:2:0": [Point(100, 20.0, 0.9)], "4:4:4": [Point(100, 24.0, 0.8)]}
    found = {"one": Compared(8, [Point(90, 22.0, 0.85), Point(80, 19.0, 0.95)], jpeg)}
    said = compression_table.verdict(found)
    assert "in PSNR above JPEG 4:2:0 in 1 of 2 files" in said
    assert "in PSNR above JPEG 4:4:4 in 0 of 2 files" in said
    assert "in MS-SSIM above JPEG 4:2:0 in 1 of 2 files" in said
    assert "in MS-SSIM above JPEG 4:4:4 in 2 of 2 files" in said


def test_command_writes_page_and_pictures(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compression_table, "trained", lambda *arguments: [Halved(2), Halved(4)])
    (tmp_path / "runs").mkdir()
    places = ["--docs", str(tmp_path / "docs"), "--runs", str(tmp_path / "runs")]
    table = compression_table.main(["--smoke", "--weights", "0.02", "0.002", *places])
    page = (tmp_path / "docs" / "compression.md").read_text()
    assert table in page
    assert table in capsys.readouterr().out
    assert table.count("\n") == 3
    assert "| astronaut | 0.002 |" in table
    assert "1,234 parameters" in page
    assert "python -m tools.compression_table" in page
    for name in ("compression.png", "compression_astronaut.png"):
        assert f"images/{name}" in page
        with Image.open(tmp_path / "docs" / "images" / name) as picture:
            assert picture.width > 250
    stored = json.loads((tmp_path / "runs" / "compression.json").read_text())
    assert list(stored["astronaut"]) == [field.name for field in dataclasses.fields(Compared)]


def test_other_weights_start_from_the_highest_rate_and_complete_runs_are_kept(tmp_path, monkeypatch):
    seen = []

    def train(config, run):
        seen.append((run.name, config.steps, config.start_from, config.optim.learning_rate))
        run.mkdir(parents=True)
        (run / "summary.json").write_text("{}")

    monkeypatch.setattr(compression_table.loop, "train", train)
    monkeypatch.setattr(compression_table, "load_params", lambda run, model: run.name)
    monkeypatch.setattr(compression_table, "Codec", lambda model, params: params)
    base = task.config()
    for _ in range(2):
        assert compression_table.trained([0.02, 0.002], tmp_path, base, (70, 20)) == ["0.02", "0.002"]
    assert [(name, steps) for name, steps, _, _ in seen] == [("0.02", 70), ("0.002", 20)]
    assert seen[0][2] is None
    assert seen[1][2].path == str(tmp_path / "0.02")
    assert seen[1][3] == base.optim.learning_rate / 2
