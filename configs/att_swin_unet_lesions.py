"""Mark lesions on simulated skin: Swin blocks with attention in their skips, without, with convolutions, and a U-Net.

Command:  python -m train configs/att_swin_unet_lesions.py
Expected: Dice of lesions 0.828 (plain concatenation 0.807, Swin UNETR 0.920, the U-Net 0.927, logistic regression
          0.747, Otsu's threshold 0.391) after 1,000 steps, one to two minutes of processor time each on one core of a
          shared CPU. On coins, after 600 steps, 0.992 (0.991, 0.993, 0.987, 0.846, 0.904); see docs/lesions.md.

A picture is skin of some tone under uneven light, darker towards the corners, with one lesion: a blob of irregular
outline and soft border, whose colour varies within and from lesion to lesion, often by little more than the light does.
Hairs cross it, and freckles and a shadow without a border are as dark but belong to the ground, so no threshold finds
it. `config(data="coins")` trains on real pictures instead: crops of the left half of scikit-image's `coins`, tested on
the right half; there the labels are those of a classical method, the watershed of the picture's slope.

The settings were chosen on lesions of seed 3: in 400 steps a U-Net of four levels had 0.807 there with the norm of a
layer and 0.870 with that of a map, one of three levels 0.881, and Swin UNETR 0.871. On coins the norm of a layer served
the U-Net no better in as many steps (0.987), but in 250 steps it once had 0.991.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from jaxlayers.window.att_swin_unet import AttSwinUNet, CrossContextualAttention
from jaxlayers.window.swin_unetr import SwinUNETR
from train.config import Config, Optim
from train.data import Source, arrays
from train.tasks import segmentation

SIZE = 32
MODELS = ("both", "cross_contextual", "spatial", "concatenation", "swin_unetr", "unet")
Data = Literal["lesions", "coins"]
STEPS: Mapping[Data, int] = {"lesions": 1000, "coins": 600}


class UNet(nn.Module):
    """Label pixels by convolutions: a plain U-Net, whose norm is that of each map over space, as in Swin UNETR.

    Attributes:
      num_classes: number of logits of a pixel.
      features: width of each level.
    """

    num_classes: int
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Return logits `[batch, height, width, num_classes]`."""

        def twice(x: jax.Array, features: int) -> jax.Array:
            for _ in range(2):
                norm = nn.GroupNorm(num_groups=None, group_size=1)
                x = nn.relu(norm(nn.Conv(features, (3, 3), use_bias=False)(x)))
            return x

        maps = []
        for features in self.features[:-1]:
            maps.append(twice(x, features))
            x = nn.max_pool(maps[-1], (2, 2), (2, 2))
        x = twice(x, self.features[-1])
        for features, y in zip(reversed(self.features[:-1]), reversed(maps), strict=True):
            x = twice(jnp.concatenate([nn.ConvTranspose(features, (2, 2), (2, 2))(x), y], axis=-1), features)
        return nn.Dense(self.num_classes)(x)


def model(name: str) -> nn.Module:
    """Return a model by its name in `MODELS`; all have about as many parameters."""
    if name == "unet":
        return UNet(2, features=(20, 39, 60))
    if name == "swin_unetr":
        return SwinUNETR(
            num_classes=2,
            embed_dim=26,
            depths=(2,),
            num_heads=(13,),
            window_size=(4, 4),
            mlp_ratio=5.0,
            table_prefix=False,
            stage_convolutions=True,
            kernel_init=nn.initializers.xavier_uniform(),
        )
    return AttSwinUNet(
        num_classes=2,
        patch_size=2,
        embed_dim=16,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        window_size=4,
        # What the exchange of summaries takes, the MLPs get where there is none.
        mlp_ratio=2.0 if name in ("both", "cross_contextual") else 2.25,
        skip=name,
        cross_attention=functools.partial(CrossContextualAttention, num_heads=2, head_dim=8, depth=1),
        drop_path_rate=0.05,
        kernel_init=nn.initializers.xavier_uniform(),
    )


def config(smoke: bool = False, name: str = MODELS[0], data: Data = "lesions", seed: int = 0) -> Config:
    """Return the run; the small one shows in a minute that everything works."""
    train, test = sources(data, smoke)
    return Config(
        title="Lesions on simulated skin" if data == "lesions" else "Coins",
        model=model(name),
        task=segmentation(2, dice_weight=1.0),
        train_data=train,
        test_data=test,
        train_transform=turned,
        steps=20 if smoke else STEPS[data],
        batch_size=16,
        eval_batch_size=16,
        optim=Optim(learning_rate=3e-3, warmup_steps=5 if smoke else 20, weight_decay=0.05),
        log_every=10,
        eval_every=10 if smoke else None,
        metric="dice_1",
        seed=seed,
        rivals={} if smoke else {one: model(one) for one in ("concatenation", "swin_unetr", "unet")},
        baselines=None if smoke else functools.partial(baselines, data),
    )


def sources(data: Data, smoke: bool = False) -> tuple[Source, Source]:
    """Return the pictures to train on and those to test on."""
    train, test = (32, 16) if smoke else (1600, 160)
    return (
        (lesions(train, seed=0), lesions(test, seed=1)) if data == "lesions" else (coins("train", train), coins("test"))
    )


def turned(record: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the picture and its labels under the same one of the eight symmetries of a square."""
    turns, mirror = int(generator.integers(4)), int(generator.integers(2))
    moved = {name: np.rot90(array, turns, axes=(0, 1)) for name, array in record.items()}
    return {name: np.ascontiguousarray(array[:, ::-1] if mirror else array) for name, array in moved.items()}


# Simulated skin -------------------------------------------------------------------------------------------------------

_GRID = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), axis=-1) + 0.5


@functools.lru_cache(maxsize=4)
def lesions(count: int, *, seed: int) -> Source:
    """Return simulated pictures as records {"image": float32 [32, 32, 3] about 0, "label": int32 [32, 32]}."""
    rng = np.random.default_rng(seed)
    pictures, labels = zip(*(lesion(rng) for _ in range(count)), strict=True)
    return arrays(image=np.stack(pictures), label=np.stack(labels))


def lesion(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture and what of it is lesion."""
    tone = np.array([0.82, 0.62, 0.52]) * rng.uniform(0.75, 1.1) + rng.normal(scale=0.04, size=3)
    picture = tone + 0.03 * _clouds(rng, 8)[..., None] * rng.uniform(0.3, 1, size=3)

    centre, radius = rng.uniform(10, SIZE - 10, size=2), rng.uniform(4, 9.5)
    inside = _sigmoid((radius - _distance(rng, centre, radius)) / rng.uniform(0.3, 1.1))
    darker = np.array([0.5, 0.75, 0.7]) * rng.uniform(0.15, 0.5) + rng.normal(scale=0.05, size=3)
    colour = tone * (1 - darker) + _clouds(rng, 5)[..., None] * rng.uniform(0.02, 0.09) * np.array([1, 0.8, 0.5])
    picture += inside[..., None] * (colour - picture)

    for _ in range(rng.integers(0, 5)):
        spot = _sigmoid(2 * (rng.uniform(0.7, 1.7) - np.linalg.norm(_GRID - rng.uniform(0, SIZE, size=2), axis=-1)))
        picture *= 1 - rng.uniform(0.2, 0.5) * spot[..., None] * np.array([0.6, 0.9, 1.0])
    # A shadow falls off slowly over as much ground as a lesion covers, and is as dark in its middle.
    away = np.linalg.norm((_GRID - rng.uniform(0, SIZE, size=2)) * rng.uniform(0.6, 1, size=2), axis=-1)
    light = 1 - rng.uniform(0, 0.45) * np.exp(-0.5 * (away / rng.uniform(4, 8)) ** 2)
    direction = rng.normal(size=2)
    light = light * (1 + rng.uniform(0, 0.25) * ((_GRID / SIZE - 0.5) @ direction / np.linalg.norm(direction)))
    corner = np.linalg.norm(_GRID / SIZE - 0.5, axis=-1)
    light = light * (1 - rng.uniform(0, 0.6) * np.clip(corner - 0.35, 0, None) / 0.35)
    picture *= light[..., None]
    for _ in range(rng.integers(0, 5)):
        picture *= 1 - rng.uniform(0.4, 0.8) * _hair(rng)[..., None]
    picture += rng.normal(scale=0.015, size=picture.shape)
    return (np.clip(picture, 0, 1) * 2 - 1).astype(np.float32), (inside > 0.5).astype(np.int32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _clouds(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Return smooth noise of unit size `[32, 32]` whose features are 32 / cells pixels wide."""
    return ndimage.zoom(rng.normal(size=(cells, cells)), SIZE / cells, order=3, mode="nearest", grid_mode=True)


def _distance(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """Return distances from the centre, stretched so that the ball of that radius has an irregular outline."""
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(0.7, 1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = (_GRID - centre) @ turn / [stretch, 1 / stretch]
    around = np.arctan2(offset[..., 0], offset[..., 1])
    ripple = sum(
        rng.normal(scale=0.22 / order) * np.cos(order * around + rng.uniform(0, 2 * np.pi)) for order in range(2, 8)
    )
    return np.linalg.norm(offset, axis=-1) - radius * np.clip(ripple, -0.5, 0.5)


def _hair(rng: np.random.Generator) -> np.ndarray:
    """Return how much of each pixel a hair covers: a parabola about a line across the picture."""
    angle = rng.uniform(0, np.pi)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    offset = _GRID - rng.uniform(0, SIZE, size=2)
    bend = rng.uniform(-0.018, 0.018) * (offset @ along) ** 2
    return np.exp(-0.5 * ((offset @ across - bend) / rng.uniform(0.3, 0.45)) ** 2)


# Coins ----------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def coin_masks() -> tuple[np.ndarray, np.ndarray]:
    """Return the picture `[303, 384]` in [-1, 1] and what is coin: its slope flooded from what is surely dark or light.

    The method is that of scikit-image's example of segmentation by regions: the labels are no human's.
    """
    import skimage.data
    from skimage.filters import sobel
    from skimage.segmentation import watershed

    picture = skimage.data.coins()
    seeds = np.zeros(picture.shape, np.int32)
    seeds[picture < 30], seeds[picture > 150] = 1, 2
    mask = ndimage.binary_fill_holes(watershed(sobel(picture), seeds) == 2)
    # Specks that are no coins.
    mask = ndimage.binary_opening(mask, iterations=3)
    return (picture / 127.5 - 1).astype(np.float32), mask.astype(np.int32)


def coins(split: Literal["train", "test"], count: int | None = None, *, seed: int = 0) -> Source:
    """Return crops as records like those of `lesions`: `count` of the left half, or all that tile the right half."""
    picture, mask = coin_masks()
    half = picture.shape[1] // 2
    if split == "train":
        rng = np.random.default_rng(seed)
        places = rng.integers([0, 0], [picture.shape[0] - SIZE + 1, half - SIZE + 1], size=(count or 256, 2))
    else:
        places = np.array(
            [(y, x) for y in range(0, picture.shape[0] - SIZE + 1, SIZE) for x in range(half, 2 * half, SIZE)]
        )
    rows, columns = (places[:, axis, None] + np.arange(SIZE) for axis in (0, 1))
    crops = picture[rows[:, :, None], columns[:, None, :]]
    image = np.repeat(crops[..., None], 3, axis=-1)
    return arrays(image=image, label=mask[rows[:, :, None], columns[:, None, :]])


# Baselines ------------------------------------------------------------------------------------------------------------


def baselines(data: Data = "lesions") -> Mapping[str, float]:
    """Return what the best threshold of each picture reaches, and a logistic regression on a pixel's neighbourhood."""
    from skimage.filters import threshold_otsu
    from sklearn.linear_model import LogisticRegression

    radius = 3
    train, test = sources(data)

    def columns(source: Source, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        records = [source[index] for index in range(len(source))]
        images, labels = (np.stack([one[key] for one in records]) for key in ("image", "label"))
        padded = np.pad(images, [(0, 0), *[(radius, radius)] * 2, (0, 0)], "edge")
        near = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1,) * 2, axis=(1, 2))
        # The pixel's place from the middle, and its colours relative to the picture's.
        middle = np.broadcast_to(np.linalg.norm(_GRID / SIZE - 0.5, axis=-1), labels.shape)[..., None]
        relative = near - images.mean(axis=(1, 2), keepdims=True)[..., None, None]
        rows = np.concatenate([relative.reshape(*labels.shape, -1), middle], axis=-1)
        return rows.reshape(-1, rows.shape[-1])[::every], labels.ravel()[::every], images

    rows, truth, _ = columns(train, 97)
    regression = LogisticRegression(max_iter=200).fit(rows, truth)
    rows, truth, images = columns(test, 1)
    grey = images.mean(axis=-1)
    dark = np.stack([one < threshold_otsu(one) for one in grey]).ravel()
    found: dict[str, Any] = {
        "Otsu's threshold": dark if data == "lesions" else ~dark,
        "logistic regression": regression.predict(rows) == 1,
    }
    result: dict[str, float] = {}
    for name, prediction in found.items():
        both = np.sum(prediction & (truth == 1))
        size = np.sum(prediction) + np.sum(truth == 1)
        result |= {f"{name} dice_1": float(2 * both / size), f"{name} iou_1": float(both / (size - both))}
    return result
