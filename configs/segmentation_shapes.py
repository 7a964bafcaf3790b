"""Label every pixel of simulated pictures of discs, squares and triangles: a light head on Swin's feature pyramid.

Command:  python -m train configs/segmentation_shapes.py
Expected: mean IoU 0.374 and pixel accuracy 0.789 (logistic regression 0.257 and 0.725, the ground everywhere 0.180 and
          0.720); two minutes of processor time on two CPU cores. Outlines are found (IoU of the ground 0.935), the
          forms inside are told apart only in part (0.14 to 0.22 each).

Up to three shapes of random colour, size and turn lie over one another on a coloured ground, under noise; a colour says
nothing about a shape, so a pixel's label can only be read from the outline around it. The baseline is a logistic
regression on the 9 x 9 pixels around each pixel.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.ops.patches import from_patches
from jaxlayers.window import Swin
from train.config import Config, Optim
from train.data import Source, arrays
from train.tasks import segmentation

CLASSES = ("ground", "disc", "square", "triangle")
SIZE = 32


class Segmenter(nn.Module):
    """Bring every level of a backbone's pyramid to the finest one's size, sum them, and label the pixels of a patch.

    Attributes:
      backbone: a module with `features`, which gives a pyramid.
      features: width in which the levels are summed.
      num_classes: number of logits of a pixel.
    """

    backbone: Swin
    features: int
    num_classes: int

    @nn.compact
    def __call__(self, image: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Return logits `[batch, height, width, num_classes]`."""
        levels = self.backbone.features(image, deterministic=deterministic)
        finest = levels[0]
        size = finest.array.shape[-3:-1]
        x = jnp.zeros((), image.dtype)
        for index, level in enumerate(levels):
            y = nn.Dense(self.features, name=f"level_{index}")(nn.LayerNorm(name=f"norm_{index}")(level.array))
            x = x + jax.image.resize(y, (len(y), *size, self.features), "bilinear")
        pixels = finest.stride[0] * finest.stride[1]
        return from_patches(nn.Dense(pixels * self.num_classes, name="head")(nn.gelu(x)), finest.stride)


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in a minute that everything works."""
    train, test = (64, 32) if smoke else (2000, 400)
    backbone = Swin(
        num_classes=0,
        patch_size=2,
        embed_dim=32,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        window_size=4,
        drop_path_rate=0.05,
        kernel_init=nn.initializers.xavier_uniform(),
    )
    return Config(
        title="Segmentation of simulated shapes",
        model=Segmenter(backbone, features=32, num_classes=len(CLASSES)),
        task=segmentation(len(CLASSES), dice_weight=0.5),
        train_data=shapes(train, seed=0),
        test_data=shapes(test, seed=1),
        train_transform=turned,
        steps=20 if smoke else 800,
        batch_size=32,
        eval_batch_size=32 if smoke else 80,
        optim=Optim(learning_rate=2e-3, warmup_steps=5 if smoke else 80, weight_decay=0.05),
        log_every=10,
        eval_every=10 if smoke else 200,
        metric="mean_iou",
        baselines=None if smoke else baselines,
    )


def turned(record: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the picture and its labels under the same one of the eight symmetries of a square."""
    turns, mirror = int(generator.integers(4)), int(generator.integers(2))
    moved = {name: np.rot90(array, turns, axes=(0, 1)) for name, array in record.items()}
    return {name: np.ascontiguousarray(array[:, ::-1] if mirror else array) for name, array in moved.items()}


def shapes(count: int, *, seed: int) -> Source:
    """Return simulated pictures as records {"image": float32 [32, 32, 3], "label": int32 [32, 32]}."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), axis=-1) + 0.5
    images, labels = np.empty((count, SIZE, SIZE, 3), np.float32), np.zeros((count, SIZE, SIZE), np.int32)
    for image, label in zip(images, labels, strict=True):
        image[:] = rng.uniform(size=3)
        for _ in range(rng.integers(1, 4)):
            kind = int(rng.integers(1, len(CLASSES)))
            inside = outline(
                kind, grid - rng.uniform(6, SIZE - 6, size=2), rng.uniform(5, 10), rng.uniform(0, 2 * np.pi)
            )
            image[inside], label[inside] = rng.uniform(size=3), kind
        image += rng.normal(scale=0.05, size=image.shape)
    return arrays(image=images, label=labels)


def outline(kind: int, places: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Return which places, relative to its centre, a shape of equal area covers, whatever its kind."""
    cosine, sine = np.cos(angle), np.sin(angle)
    x = places @ np.array([[cosine, sine], [-sine, cosine]])
    if CLASSES[kind] == "disc":
        return np.linalg.norm(x, axis=-1) < radius
    corners = {"square": 4, "triangle": 3}[CLASSES[kind]]
    # A regular polygon lies on the inner side of each of its edges; pi r^2 = n a^2 tan(pi / n) gives their distance a.
    distance = radius * np.sqrt(np.pi / corners / np.tan(np.pi / corners))
    normals = 2 * np.pi * np.arange(corners) / corners
    return np.all(x @ np.stack([np.cos(normals), np.sin(normals)]) < distance, axis=-1)


def baselines() -> Mapping[str, float]:
    """Return what a logistic regression on the neighbourhood of a pixel reaches, and what naming the ground does."""
    from sklearn.linear_model import LogisticRegression

    radius = 4

    def columns(source: Source, every: int) -> tuple[np.ndarray, np.ndarray]:
        records = [source[index] for index in range(len(source))]
        images = np.pad(np.stack([one["image"] for one in records]), [(0, 0), *[(radius, radius)] * 2, (0, 0)], "edge")
        near = np.lib.stride_tricks.sliding_window_view(images, (2 * radius + 1,) * 2, axis=(1, 2))
        labels = np.stack([one["label"] for one in records]).ravel()
        # Relative to the pixel itself, since colours are arbitrary.
        rows = near.reshape(len(labels), 3, -1)[::every]
        return np.abs(rows - rows[..., [rows.shape[-1] // 2]]).reshape(len(rows), -1), labels[::every]

    model = LogisticRegression(max_iter=200).fit(*columns(shapes(200, seed=0), every=13))
    rows, truth = columns(shapes(100, seed=1), every=1)
    found = {"logistic regression": model.predict(rows), "ground everywhere": np.zeros_like(truth)}
    result: dict[str, float] = {}
    for name, prediction in found.items():
        iou = [
            np.sum((prediction == index) & (truth == index)) / np.sum((prediction == index) | (truth == index))
            for index in range(len(CLASSES))
        ]
        result |= {
            f"{name} pixel_accuracy": float(np.mean(prediction == truth)),
            f"{name} mean_iou": float(np.mean(iou)),
        }
    return result
