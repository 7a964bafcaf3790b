"""The learning-rate range test finds where the loss falls, and says so where it cannot."""

import csv
import dataclasses

import jax
import numpy as np
import pytest

from tests.train import shared_cache
from tests.train.config_test import TINY
from train.config import MeshShape, load
from train.find_rate import find_rate, write
from train.loop import train


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    with shared_cache.used():
        yield


@pytest.fixture(scope="module")
def found():
    return find_rate(load(TINY), lowest=1e-5, highest=10.0, count=60, devices=jax.devices()[:2])


def test_rates_rise_geometrically_and_the_loss_falls_before_it_grows(found):
    np.testing.assert_allclose(found.rates[1:] / found.rates[:-1], 1e6 ** (1 / 59), rtol=1e-6)
    assert found.smoothed.min() < 0.8 * found.smoothed[0]
    assert np.argmin(found.smoothed) < len(found.losses) - 1
    assert 1e-4 < found.suggestion < 1


@pytest.mark.slow
def test_the_suggestion_trains_better_than_the_ends_of_the_range(found, tmp_path):
    def loss_at(rate):
        config = load(TINY)
        config = dataclasses.replace(
            config, steps=24, mesh=MeshShape(), optim=dataclasses.replace(config.optim, learning_rate=rate)
        )
        return train(config, tmp_path / f"{rate:.1e}", devices=jax.devices()[:1], silent=True).metrics["loss"]

    assert loss_at(found.suggestion) < min(loss_at(1e-5), loss_at(10.0))


def test_the_curve_is_written(found, tmp_path):
    assert write(found, tmp_path).stat().st_size > 1000
    with (tmp_path / "learning_rate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.rates)
    assert float(rows[3]["loss"]) == found.losses[3]


def test_a_range_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="lowest=1.0, highest=0.1, count=100 must rise"):
        find_rate(load(TINY), lowest=1.0, highest=0.1)
