"""The simulated lesions are what they are said to be, and the table says what was measured."""

import json

import numpy as np
import pytest

from configs import att_swin_unet_lesions as task
from tools import lesions_table


def records(source):
    return [source[index] for index in range(len(source))]


def test_lesions_are_seeded_and_no_threshold_finds_them():
    one, again, other = (records(task.lesions.__wrapped__(40, seed=seed)) for seed in (0, 0, 1))
    for first, second, third in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(first["image"], second["image"])
        assert not np.array_equal(first["image"], third["image"])
        assert first["image"].shape == (task.SIZE, task.SIZE, 3)
        assert np.abs(first["image"]).max() <= 1
        assert 0.01 < first["label"].mean() < 0.6
    # Even the best threshold on grey of each picture, chosen by its labels, is far from the outline on the whole.
    scores = []
    for record in one:
        grey, inside = record["image"].mean(-1), record["label"] == 1
        marked = [grey < level for level in np.quantile(grey, np.linspace(0.02, 0.98, 49))]
        scores.append(max(2 * np.sum(each & inside) / (np.sum(each) + np.sum(inside)) for each in marked))
    assert 0.3 < np.mean(scores) < 0.85


def test_halves_of_the_coins_are_apart_and_labels_cover_their_coins():
    picture, mask = task.coin_masks()
    # 24 coins, each one piece.
    from scipy import ndimage

    assert ndimage.label(mask)[1] == 24
    assert picture[mask == 1].mean() > picture[mask == 0].mean() + 0.4
    train, test = task.coins("train", 50), task.coins("test")
    half = picture.shape[1] // 2
    seen = {picture[y : y + task.SIZE, x : x + task.SIZE].tobytes() for y in (0, 32) for x in range(half, 2 * half, 32)}
    tiles = {np.ascontiguousarray(record["image"][..., 0]).tobytes() for record in records(test)}
    assert seen <= tiles
    left = picture[:, :half]
    windows = np.lib.stride_tricks.sliding_window_view(left, (task.SIZE, task.SIZE))
    for index in range(0, 50, 10):
        assert np.any(np.all(windows == train[index]["image"][..., 0], axis=(-1, -2)))


def test_models_have_equally_many_parameters():
    import jax

    x = jax.ShapeDtypeStruct((1, task.SIZE, task.SIZE, 3), np.float32)
    sizes = {}
    for name in task.MODELS:
        logits, variables = jax.eval_shape(task.model(name).init_with_output, jax.random.key(0), x)
        assert logits.shape == (1, task.SIZE, task.SIZE, 2)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert max(sizes.values()) < 1.03 * min(sizes.values())


@pytest.fixture
def trainings(monkeypatch):
    """Scores and markings in place of trainings; the names of those that were asked for."""
    asked = []

    def run(model, data, seed, out, *, smoke):
        asked.append(f"{model}/{data}/{seed}")
        marked = [record["label"] for record in lesions_table.shown(data, smoke)]
        np.save(out / f"{model}_{data}_{seed}.npy", np.asarray(marked, np.uint8))
        return {"dice": 0.5 + seed / 10, "iou": 0.25, "seconds": 30.0, "parameters": 1234.0}

    monkeypatch.setattr(lesions_table, "run", run)
    found = {"a guess dice_1": 0.125, "a guess iou_1": 0.0625}
    monkeypatch.setattr(task, "baselines", lambda data: found)
    return asked


def test_table_measures_each_model_once_and_writes_its_page(trainings, tmp_path, capsys):
    common = ["--smoke", "--seeds", "2", "--out", str(tmp_path / "out"), "--docs", str(tmp_path)]
    lesions_table.main([*common, "--models", "unet", "--data", "lesions"])
    assert trainings == ["unet/lesions/0", "unet/lesions/1"]
    table = lesions_table.main([*common, "--models", "both", "unet"])
    assert sorted(trainings[2:]) == sorted(
        f"{name}/{seed}" for name in ("both/lesions", "both/coins", "unet/coins") for seed in (0, 1)
    )
    assert "| U-Net | 0.550 ± 0.050 | 0.250 ± 0.000 | 0.550 ± 0.050 | 0.250 ± 0.000 | 1,234 |" in table
    assert "| a guess | 0.125 | 0.062 | 0.125 | 0.062 |  |" in table
    page = (tmp_path / "lesions.md").read_text()
    assert table in page
    assert "On lesions by Dice: U-Net 0.550, Att-SwinU-Net 0.550, a guess 0.125." in page
    assert "20 steps on lesions and 20 steps on coins of 16 pictures" in page
    assert "(4 minutes of processor time" in page
    assert (tmp_path / "images" / "lesions.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())) == 10
    assert "both/coins/1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_smoke_training_gives_scores_and_markings(tmp_path):
    found = lesions_table.run("concatenation", "lesions", 0, tmp_path, smoke=True)
    assert 0 <= found["iou"] <= found["dice"] <= 1
    assert np.load(tmp_path / "concatenation_lesions_0.npy").shape == (6, task.SIZE, task.SIZE)
