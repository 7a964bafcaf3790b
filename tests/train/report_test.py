"""The report shows the numbers and pictures it was given."""

import dataclasses
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from train.report import write_report

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Errors:
    magnitudes: np.ndarray
    errors: np.ndarray


def history() -> list[dict]:
    rows = [{"step": i, "train/loss": 2.0 * 0.9**i, "learning_rate": 1e-3, "time": 1.5 * i} for i in range(1, 41)]
    rows += [{"step": i, "test/loss": 2.1 * 0.9**i, "test/accuracy": 1 - 0.9**i, "note": "x"} for i in (10, 20, 30)]
    return rows


def confusion() -> np.ndarray:
    counts = np.diag([20, 30, 40])
    counts[2, 1] = 7
    counts[0, 2] = 3
    return counts


def curves(error: float = 1e-6) -> dict[str, Errors]:
    sizes = np.logspace(-2, 0, 5)
    return {"shift": Errors(sizes, sizes**2), "turn": Errors(sizes[::-1], np.full(5, error))}


def written(folder: Path, **changes) -> tuple[Path, str]:
    arguments = {
        "title": "Digits",
        "history": history(),
        "summary": {"test accuracy": 0.98765, "parameters": 28288354, "stopped": False, "mesh": "2 x 2 | 2"},
        "confusion": confusion(),
        "labels": ["cat", "dog", "emu"],
        "symmetry": curves(),
        "baselines": {"nearest neighbour": 0.9612345},
    }
    path = write_report(folder, **{**arguments, **changes})
    return path, path.read_text(encoding="utf-8")


def pixels(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(SIGNATURE)
    return matplotlib.image.imread(path)[..., :3]


def test_report_lists_every_number(tmp_path: Path) -> None:
    path, text = written(tmp_path / "deep" / "report")
    assert path == tmp_path / "deep" / "report" / "report.md"
    assert text.startswith("# Digits\n")
    for row in (
        "| test accuracy | 0.98765 |",
        "| parameters | 28,288,354 |",
        "| stopped | no |",
        "| mesh | 2 x 2 \\| 2 |",
        "| nearest neighbour | 0.961234 |",
        "| shift | 1 |",
        "| turn | 1e-06 |",
    ):
        assert row in text.splitlines()
    assert "90 of 100 right. Most frequent mistakes: emu taken for dog (7), cat taken for emu (3)." in text


def test_report_links_exactly_the_pictures_it_wrote(tmp_path: Path) -> None:
    for number, changes in enumerate(
        ({}, {"confusion": None, "labels": None}, {"symmetry": None, "baselines": None}, {"history": []})
    ):
        path, text = written(tmp_path / str(number), **changes)
        linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
        assert sorted(linked) == sorted(file.name for file in path.parent.glob("*.png"))
        assert len(linked) == 3 - (number > 0)


def test_pictures_are_drawn_and_of_a_readable_size(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    for name, size in (
        ("training_curves.png", (384, 1512)),
        ("confusion.png", None),
        ("symmetry_error.png", (528, 768)),
    ):
        picture = pixels(path.parent / name)
        assert size is None or picture.shape[:2] == size
        assert min(picture.shape[:2]) >= 300
        painted = (picture < 0.99).any(axis=-1)
        assert 0.01 < painted.mean() < 0.9
        # Something is drawn in every quarter.
        for half in np.array_split(painted, 2, axis=0):
            for quarter in np.array_split(half, 2, axis=1):
                assert quarter.any()
        assert (picture.max(axis=-1) - picture.min(axis=-1) > 0.3).any()  # in colour


def test_pictures_follow_the_numbers(tmp_path: Path) -> None:
    first, _ = written(tmp_path / "1")
    same, _ = written(tmp_path / "2")
    other = [dict(row, **{"train/loss": 1.0}) if "train/loss" in row else row for row in history()]
    changed, _ = written(tmp_path / "3", history=other, confusion=confusion().T, symmetry=curves(1e-4))
    for name in ("training_curves.png", "confusion.png", "symmetry_error.png"):
        assert (first.parent / name).read_bytes() == (same.parent / name).read_bytes()
        one, two = pixels(first.parent / name), pixels(changed.parent / name)
        assert one.shape != two.shape or (one != two).any()


def test_extreme_numbers_are_drawn_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    sizes = np.array([0.0, 0.1, 1.0])
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 1e-9, "x": None}]
    path, text = written(
        tmp_path,
        history=rows,
        summary={"accuracy": np.float32(0.5), "worst": float("nan"), "count": np.int64(1234)},
        confusion=np.zeros((2, 2), int),
        labels=None,
        symmetry={"exact": Errors(sizes, np.zeros(3))},
        baselines={},
    )
    assert "| accuracy | 0.5 |" in text
    assert "| worst | nan |" in text
    assert "| count | 1,234 |" in text
    assert "0 of 0 right." in text
    assert "| exact | 0 |" in text
    assert "Baselines" not in text
    assert len(list(path.parent.glob("*.png"))) == 3
    assert [str(warning.message) for warning in recwarn.list if "matplotlib" in warning.filename] == []


def test_many_classes_fit(tmp_path: Path) -> None:
    path, _ = written(tmp_path, confusion=np.eye(100, dtype=int), labels=[f"class {i}" for i in range(100)])
    height, width = pixels(path.parent / "confusion.png").shape[:2]
    assert 1000 <= height <= 1600
    assert 1000 <= width <= 1700


def test_wrong_confusion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"confusion must be square, got shape \(2, 3\)"):
        written(tmp_path, confusion=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="labels must name all 3 classes, got 2"):
        written(tmp_path, labels=["a", "b"])
