import dataclasses
import json

import numpy as np
import pytest

from tools import generation_table
from tools.generation_table import (
    block_peak,
    blocked,
    frechet_distance,
    power_spectrum,
    ruled,
    spectral_peak,
)
from train import config as configs


def normal(mean, covariance, count, seed=0):
    """Samples whose mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(np.asarray(covariance, float)).T + np.asarray(mean, float)


def test_frechet_distance_is_the_closed_form_of_normal_distributions():
    # Of distributions with diagonal covariances: the squared distance of means and of standard deviations.
    x = normal([0, 0, 1], np.diag([1.0, 4, 9]), 50)
    y = normal([1, 0, -1], np.diag([4.0, 4, 1]), 70, seed=1)
    assert frechet_distance(x, y) == pytest.approx(1 + 4 + (1 + 0 + 4), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # A rotation of both changes nothing, of one it does.
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(10, rel=1e-9)
    assert abs(frechet_distance(x @ rotation, y) - 10) > 1
    # One feature: (m - m')^2 + (s - s')^2; and a covariance without full rank.
    assert frechet_distance(2 * x[:, :1] + 3, x[:, :1]) == pytest.approx(9 + 1, rel=1e-9)
    flat = np.concatenate([x, x[:, :1]], axis=1)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"shapes \(5, 2\) and \(5, 3\) must be"):
        frechet_distance(np.ones((5, 2)), np.ones((5, 3)))


def test_spectrum_finds_the_wave_and_the_seams():
    waves = np.sin(2 * np.pi * 5 * np.arange(32) / 32)
    x = np.broadcast_to(waves[:, None, None] + waves[None, :, None], (2, 32, 32, 1))
    power = power_spectrum(x)
    assert power.argmax() == 5
    assert power[5] == pytest.approx(0.25)
    assert np.delete(power, 5).max() < 1e-20
    noise = np.random.default_rng(0).normal(size=(50, 32, 32, 3)) * 0.1
    assert block_peak(noise, 8) < 20 < 100 < block_peak(blocked(noise, 8), 8)
    with pytest.raises(ValueError, match=r"must be at least 24 wide for period=8; set period"):
        block_peak(np.ones((2, 16, 16, 1)), 8)
    assert spectral_peak(0.1 * noise, 8) < 1.2 < 10 < spectral_peak(ruled(0.1 * noise, 8), 8)
    # What the other measure is for: flat blocks have no power at multiples of their frequency.
    assert spectral_peak(blocked(noise, 8), 8) < 1.2
    for side, period in ((32, 5), (8, 8), (8, 2)):
        with pytest.raises(ValueError, match=rf"period={period} must be at least 3 and divide the side={side}"):
            spectral_peak(np.ones((2, side, side, 1)), period)
    with pytest.raises(ValueError, match="must be"):
        power_spectrum(np.ones((2, 4, 8, 1)))


def test_feature_network_learns_to_tell_what_differs():
    rng = np.random.RandomState(0)
    labels = rng.randint(2, size=200)
    x = np.clip(0.2 + 0.5 * labels[:, None, None, None] + 0.1 * rng.normal(size=(200, 8, 8, 1)), 0, 1)
    features, accuracy = generation_table.extractor(x.astype(np.float32), labels, 60)
    assert accuracy > 0.9
    assert features(x[:7].astype(np.float32)).shape == (7, 32)


def test_labelled_pictures_are_those_of_the_training_split():
    x, labels = generation_table.labelled_digits(50)
    assert (x.shape, sorted(set(labels.tolist()))) == ((50, 16, 16, 1), list(range(10)))
    x, labels = generation_table.labelled_crops(28)
    assert x.shape == (28, 64, 64, 3)
    np.testing.assert_array_equal(np.bincount(labels), 2)


def test_words_follow_the_figures():
    def score(*distances, peaks, lines=()):
        return generation_table.Score(
            distances={str(step): value for step, value in enumerate(distances)},
            halves=1.0,
            accuracy=1.0,
            spectra={},
            peaks=peaks,
            lines=dict(lines),
            samples=1,
            seconds=1.0,
        )

    falls = generation_table.verdict("digits", score(100.0, 50.0, 20.0, peaks={}))
    assert falls == "From first to last the distance of the digits falls by a factor of 5, at every step shown."
    peaks = {"generated": 30.0, "training": 2.0}
    rises = generation_table.verdict(
        "crops", score(10.0, 5.0, 20.0, peaks=peaks, lines={"generated": 1.0, "training": 1.1})
    )
    assert "does not fall; it rises 1 of 2 times" in rises
    assert "15 times as strong" in rises
    assert "has no peak" in rises
    marked = generation_table.verdict("crops", score(1.0, 2.0, peaks=peaks, lines={"generated": 1.5, "training": 1.1}))
    assert "has a peak" in marked


def test_page_is_written_from_a_run_and_a_second_call_reads_it(tmp_path, monkeypatch, capsys):
    load = configs.load

    def short(path, smoke):
        config = load(path, smoke=smoke)
        optim = dataclasses.replace(config.optim, warmup_steps=1)
        return dataclasses.replace(
            config, steps=4, eval_every=2, keep_every=2, batch_size=8, optim=optim, baselines=None
        )

    monkeypatch.setattr(configs, "load", short)

    def run():
        return generation_table.main(
            f"--data digits --smoke --samples 40 --feature-steps 5 --runs {tmp_path / 'runs'} --docs {tmp_path}".split()
        )

    table = run()
    assert "| steps | 0 | 2 | 4 | halves" in table
    assert "nan" not in table
    assert "too small for seams" in table
    assert table in (tmp_path / "generation.md").read_text()
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "generation_digits.png",
        "generation_digits_curves.png",
    }
    first = json.loads((tmp_path / "runs" / "scores.json").read_text())["digits"]
    assert run() == table
    assert json.loads((tmp_path / "runs" / "scores.json").read_text())["digits"]["distances"] == first["distances"]
    assert "Frechet distance" in capsys.readouterr().out
