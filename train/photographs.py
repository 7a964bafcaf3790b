"""Photographs that come inside scikit-image and scikit-learn: whole, or as crops for training without any download."""

import dataclasses
import functools
from typing import Literal

import numpy as np

from train.records import Record, Reopened, sampled

# Natural scenes, textures and scientific pictures; no picture of one list shows the scene of another.
PHOTOGRAPHS = {
    "train": (
        "coffee",
        "rocket",
        "china.jpg",
        "flower.jpg",
        "stereo_motorcycle",
        "hubble_deep_field",
        "retina",
        "immunohistochemistry",
        "brick",
        "grass",
        "gravel",
        "coins",
        "moon",
        "clock",
    ),
    "test": ("astronaut", "chelsea", "camera"),
}


@functools.cache
def photograph(name: str) -> np.ndarray:
    """Loads one of the photographs.

    Args:
        name: a name of `PHOTOGRAPHS`; those with an ending come from scikit-learn, the others from scikit-image.

    Returns:
        `[height, width, 3]` uint8, read-only; a grey picture has three equal channels.

    Raises:
        ValueError: if the name is unknown.
    """
    known = [one for names in PHOTOGRAPHS.values() for one in names]
    if name not in known:
        raise ValueError(f"name={name!r} must be one of {known}; set name")
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        picture = load_sample_image(name)
    else:
        import skimage.data

        picture = getattr(skimage.data, name)()
    if isinstance(picture, tuple):  # a stereo pair and its disparities
        picture = picture[0]
    picture = np.asarray(picture)
    picture = np.array(np.broadcast_to(picture if picture.ndim == 3 else picture[..., None], (*picture.shape[:2], 3)))
    picture.flags.writeable = False
    return picture


@dataclasses.dataclass(frozen=True)
class _Crops(Reopened):
    """Square crops of the photographs of a split."""

    split: str
    size: int
    count: int | None
    seed: int

    @property
    def name(self) -> str:
        return f"photographs({self.split!r}, {self.size})"

    @functools.cached_property
    def corners(self) -> tuple[tuple[str, int, int], ...]:
        """The picture, top row and left column of each crop."""
        names = PHOTOGRAPHS[self.split]
        room = [tuple(length - self.size + 1 for length in photograph(name).shape[:2]) for name in names]
        if self.count is None:
            return tuple(
                (name, row, column)
                for name, (rows, columns) in zip(names, room, strict=True)
                for row in range(0, rows, self.size)
                for column in range(0, columns, self.size)
            )
        # RandomState, unlike Generator, promises the same stream in every NumPy release.
        random = np.random.RandomState(self.seed)
        # By the root of the area: the largest pictures, which are dark or smooth, would outweigh all others.
        weight = np.sqrt([rows * columns for rows, columns in room])
        chosen = random.choice(len(names), self.count, p=weight / weight.sum())
        places = random.random_sample((self.count, 2))
        return tuple(
            (names[index], int(row * room[index][0]), int(column * room[index][1]))
            for index, (row, column) in zip(chosen, places, strict=True)
        )

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> Record:
        name, row, column = self.corners[index]
        crop = photograph(name)[row : row + self.size, column : column + self.size]
        return {"image": crop.astype(np.float32) / 255}

    def digest(self) -> str:
        """Returns a SHA-256 of the description and of evenly spread records."""
        return sampled(f"{self.name} {self.count} {self.seed}", self)


def photographs(split: Literal["train", "test"], size: int, *, count: int | None = None, seed: int = 0) -> _Crops:
    """Makes a source of square crops of photographs.

    Args:
        split: "train" (14 pictures) or "test" (astronaut, chelsea, camera); no scene is in both.
        size: height and width of a crop, in pixels; at most 300, the height of the least picture.
        count: crops drawn at random places, the same for the same seed, a picture as often as the root of its area is
            large; `None` = all crops of a grid without overlap.
        seed: of the draw.

    Returns:
        A source of records `{"image": float32 [size, size, 3] in [0, 1]}`.

    Raises:
        ValueError: if the split is unknown, or a number out of range.
    """
    if split not in PHOTOGRAPHS:
        raise ValueError(f"split={split!r} must be 'train' or 'test'; set split")
    least = min(min(photograph(name).shape[:2]) for name in PHOTOGRAPHS[split])
    if not 1 <= size <= least:
        raise ValueError(f"size={size} must be from 1 to {least}, the side of the least picture; set size")
    if count is not None and count < 1:
        raise ValueError(f"count={count} must be at least 1; set count, or None for all crops of a grid")
    return _Crops(split, size, count, seed)
