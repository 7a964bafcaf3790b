"""The pictures of the Hopfield theory are drawn, and the numbers beside them say what the theory says."""

import json
import re

import numpy as np
import pytest

from tools import hopfield_figures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopfield")
    patched = pytest.MonkeyPatch()
    # Three of the six: the others take as long again, and are drawn by the slow test.
    patched.setattr(
        hopfield_figures,
        "PICTURES",
        {name: hopfield_figures.PICTURES[name] for name in ("hopfield_energy", "hopfield_errors", "hopfield_capacity")},
    )
    yield folder, hopfield_figures.main(["--quick", "--out", str(folder)])
    patched.undo()


def test_each_picture_is_written_with_its_numbers(run):
    folder, numbers = run
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{name}.png" for name in numbers), "numbers.json"]
    )
    assert json.loads((folder / "numbers.json").read_text()) == numbers
    for name in numbers:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert 5_000 < (folder / f"{name}.png").stat().st_size < 150_000


def test_numbers_say_what_the_theory_says(run):
    _, numbers = run
    for beta, size in ((1, "40"), (9, "8"), (160, "1")):
        assert numbers["hopfield_energy"][f"largest rise of the energy in an update, beta {beta}"] < 1e-12
        assert numbers["hopfield_energy"][f"patterns averaged at rest, beta {beta}"] == size
    for noise in ("0", "0.2"):
        assert numbers["hopfield_errors"][f"errors above their bound, noise {noise}"] == 0
        assert -1.2 < numbers["hopfield_errors"][f"slope of ln error against separation, noise {noise}"] < -0.7
    capacity = numbers["hopfield_capacity"]
    assert capacity["residual of ln N: exponential law"] < 0.5 * capacity["residual of ln N: linear law"]
    assert capacity["slope of ln N with d"] > 5 * capacity["slope of Theorem 3 at d = 100"]


@pytest.mark.slow
def test_all_pictures_of_a_quick_run(tmp_path):
    numbers = hopfield_figures.main(["--quick", "--out", str(tmp_path)])
    assert set(numbers) == set(hopfield_figures.PICTURES)
    landscape = numbers["hopfield_landscape"]
    assert landscape["fixed points reached, beta 1"] == "1 global average"
    assert landscape["fixed points reached, beta 60"] == "6 single pattern"
    assert "2 metastable state" in landscape["fixed points reached, beta 8"]
    assert numbers["hopfield_basins"]["smallest of measured / proven"] > 1
    heads = numbers["hopfield_heads"]
    assert all(heads[f"before training, head {place}"].startswith("class I,") for place in range(1, 9))
    last = re.match(r"class (\w+), k ([\d.]+)", heads["trained, bags with a nine, head 8"])
    assert float(last[2]) < 30


def test_spans_are_put_in_words():
    assert hopfield_figures.span(np.asarray([3, 3])) == "3"
    assert hopfield_figures.span(np.asarray([7, 3])) == "3 to 7"
    assert hopfield_figures.averages(np.asarray([1, 1])) == "single patterns"
    assert hopfield_figures.averages(np.asarray([4, 6])) == "averages of 4 to 6 patterns"


def test_digits_of_test_bags_are_in_no_other():
    images, digits, held_out = hopfield_figures.digits_apart()
    rng = np.random.default_rng(0)
    for test in (False, True):
        bags, labels = hopfield_figures.digit_bags(rng, 20, 8, test=test)
        own = {image.tobytes() for image in images[held_out == test]}
        nines = {image.tobytes() for image in images[digits == 9]}
        other = {image.tobytes() for image in images[held_out != test]}
        for bag, label in zip(np.asarray(bags), np.asarray(labels), strict=True):
            assert all(image.tobytes() in own - other for image in bag)
            assert any(image.tobytes() in nines for image in bag) == bool(label)
