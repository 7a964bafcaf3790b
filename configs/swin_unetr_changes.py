"""Find what changed between two scans that lie one behind the other in one volume, by Swin UNETR.

Command:  python -m train configs/swin_unetr_changes.py
Expected: mean Dice 0.963 after 1,500 steps of 8 volumes, nine minutes on one core of a busy CPU; a plain U-Net 0.820, a
          deeper one 0.732, a residual one 0.820, thresholds that are told where the other scan is 0.783, naming every
          spot lasting 0.538. Means of three seeds are in docs/changes.md.

Each scan shows small bright spots. Most are in both, at about the same place; others are in one alone, and these are
to be told from the lasting ones. A spot looks the same either way, so each must be compared with one place half a
volume away, more finely than a U-Net's coarse resolutions are. A window as long as the volume compares them at once: a
table of offsets can learn where the other scan is. (Whoever has two scans to compare would lay them on each other as
two channels, which spares a network all that. Here they stand for what cannot be, such as paired organs.)

Rivals are plain U-Nets of three and of four resolutions and a residual one of four, of about as many parameters,
trained with the same settings. The baseline is told where the other scan is: a voxel above one brightness is of a spot,
and changed if the brightness around the same place of the other scan is below another; both are fitted.
`python -m tools.changes_table` trains each network from three seeds and compares them.

On volumes of seed 7 the U-Net of three resolutions had 0.812 at twice the learning rate, and 0.888 after twice as many
steps, so it does learn to compare, later and less finely.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import numpy as np
from scipy import ndimage

from configs.swin_unetr_volumes import UNet, drawn, optimiser
from jaxlayers.window.swin_unetr import SwinUNETR
from train.config import Config
from train.data import Source
from train.tasks import segmentation

CLASSES = ("ground", "lasting", "changed")
SIZE = (32, 8, 8)
SPOTS = 14


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in a minute that everything works."""
    train, test = (16, 8) if smoke else (10_000, 100)
    model = SwinUNETR(
        num_classes=len(CLASSES),
        embed_dim=8 if smoke else 16,
        depths=(2,),
        num_heads=(2,) if smoke else (4,),
        # The whole volume, at half its resolution.
        window_size=(16, 4, 4),
        table_prefix=False,
        merging="ordered",
        stage_convolutions=True,
        kernel_init=nn.initializers.xavier_uniform(),
    )
    return Config(
        title="Changes between two simulated scans",
        model=model,
        task=segmentation(len(CLASSES), dice_weight=1.0),
        train_data=volumes(train, seed=0),
        test_data=volumes(test, seed=1),
        steps=4 if smoke else 1500,
        batch_size=8,
        eval_batch_size=4,
        optim=optimiser(smoke),
        ema_decay=0.995,
        log_every=2 if smoke else 100,
        eval_every=None,
        metric="mean_dice",
        # About as many parameters each.
        rivals={
            "U-Net": UNet(len(CLASSES), (4, 8) if smoke else (12, 22, 38)),
            "deeper U-Net": UNet(len(CLASSES), (4, 8) if smoke else (8, 13, 22, 34)),
            "residual U-Net": UNet(len(CLASSES), (4, 8) if smoke else (8, 12, 19, 32), residual=True),
        },
        baselines=None if smoke else baselines,
    )


# Volumes --------------------------------------------------------------------------------------------------------------


def volumes(count: int, *, seed: int) -> Source:
    """Return simulated pairs of scans as records {"image": float32 [*SIZE, 1], "label": int32 [*SIZE]}."""
    return drawn(volume, count, seed)


def volume(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return one volume and its labels; lengths are in voxels."""
    scan = (SIZE[0] // 2, *SIZE[1:])
    axes = np.ogrid[tuple(slice(0.5, length) for length in scan)]
    image, label = np.full((2, *scan), 0.4), np.zeros((2, *scan), np.int32)
    centres: list[np.ndarray] = []
    while len(centres) < SPOTS:
        centre = rng.uniform(0.5, np.array(scan) - 0.5)
        if all(math.dist(centre, other) > 2.6 for other in centres):
            centres.append(centre)
    for centre in centres:
        # Half of the spots are in both scans, a quarter in either one alone.
        scans = ((0, 1), (0, 1), (0,), (1,))[rng.integers(4)]
        brightness = rng.uniform(0.9, 1.2)
        for index in scans:
            # No spot lies twice at just the same place, nor is it drawn twice just as large.
            moved = centre + rng.uniform(-0.3, 0.3, size=3)
            squares = sum((axis - place) ** 2 for axis, place in zip(axes, moved, strict=True))
            spot = squares < rng.uniform(1.1, 1.5) ** 2
            image[index][spot], label[index][spot] = brightness, 1 if len(scans) == 2 else 2
    # Each scan is blurred alone; then a gain that changes slowly over the volume, and noise.
    for axis in range(1, 4):
        image = ndimage.convolve1d(image, [0.2, 0.6, 0.2], axis=axis, mode="nearest")
    image, label = image.reshape(SIZE), label.reshape(SIZE)
    direction = rng.normal(size=3)
    grid = np.ogrid[tuple(slice(0.5, length) for length in SIZE)]
    slope = sum(p * (axis / length - 0.5) for p, axis, length in zip(direction, grid, SIZE, strict=True))
    image = image * np.exp(np.log(2) / 2 * slope / np.abs(slope).max()) + rng.normal(scale=0.06, size=SIZE)
    return image[..., None].astype(np.float32), label


# Baselines ------------------------------------------------------------------------------------------------------------


def baselines() -> Mapping[str, float]:
    """Return the Dice of thresholds that know where the other scan is, and of naming every bright voxel lasting."""
    train, test = volumes(100, seed=0), volumes(100, seed=1)
    images, labels = (np.stack([train[index][name] for index in range(len(train))]) for name in ("image", "label"))
    others, truth = (np.stack([test[index][name] for index in range(len(test))]) for name in ("image", "label"))
    lows, highs = np.linspace(0.4, 1.0, 13), np.linspace(0.5, 1.0, 11)
    best = max(((bright, there) for bright in highs for there in lows), key=lambda pair: _score(images, labels, *pair))
    lasting = max(highs, key=lambda bright: _score(images, labels, bright, -np.inf))
    return {
        "compared by thresholds mean_dice": _score(others, truth, *best),
        "all lasting mean_dice": _score(others, truth, lasting, -np.inf),
    }


def _score(images: np.ndarray, truth: np.ndarray, bright: float, there: float) -> float:
    """Return the mean Dice of: brighter than `bright` a spot, changed where the other scan is not above `there`."""
    half = SIZE[0] // 2
    around = ndimage.maximum_filter(images[..., 0], size=(1, 3, 3, 3))
    across = np.concatenate([around[:, half:], around[:, :half]], axis=1)
    found = np.where(images[..., 0] > bright, np.where(across > there, 1, 2), 0)
    scores = [
        2 * np.sum((found == index) & (truth == index)) / (np.sum(found == index) + np.sum(truth == index))
        for index in range(len(CLASSES))
    ]
    return float(np.mean(scores))
