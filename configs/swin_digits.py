"""Train a shifted-window transformer on handwritten digits over a mesh of data, fsdp and tensor parallelism.

Command:  python -m train configs/swin_digits.py --devices 8
Expected: test accuracy 0.998 (logistic regression 0.962, support vector machine 0.990 on the same split); two to three
          minutes on two CPU cores.

The data are scikit-learn's 1,797 real images of 8 x 8 pixels; a fixed third of each class is held out. Patches of 2 x 2
pixels give a map of 4 x 4 tokens, which windows of 2 x 2 cut in four; every second block shifts them.
"""

from collections.abc import Mapping

import flax.linen as nn

from jaxlayers.testing import Rotation, Symmetry, Translation
from jaxlayers.window import Swin
from train.config import Config, MeshShape, Optim
from train.data import digits, random_affine
from train.tasks import classification


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in a minute that everything works."""
    return Config(
        title="Swin on handwritten digits",
        model=Swin(
            num_classes=10,
            patch_size=2,
            embed_dim=48,
            depths=(2, 2),
            num_heads=(4, 8),
            window_size=2,
            drop_path_rate=0.05,
            # The reference's 0.02 is for widths of hundreds; at this width it would slow the start.
            kernel_init=nn.initializers.xavier_uniform(),
        ),
        task=classification(10, inputs=("image",), label="label", label_smoothing=0.1),
        train_data=digits("train"),
        test_data=digits("test"),
        train_transform=random_affine(max_shift=0.7, max_degrees=8.0, max_scale=0.07),
        steps=60 if smoke else 1200,
        batch_size=64,
        eval_batch_size=200,
        optim=Optim(learning_rate=3e-3, warmup_steps=20 if smoke else 120, weight_decay=0.05),
        mesh=MeshShape(data=2, fsdp=2, tensor=2),
        log_every=10,
        eval_every=30 if smoke else 200,
        metric="accuracy",
        labels=tuple("0123456789"),
        # No claim of the model's: the curves show how far a plain image classifier is from these symmetries.
        symmetries=(
            Symmetry(Rotation(2), inputs=("image",), reason="learned from data only, for small angles"),
            Symmetry(Translation(2, cyclic=True, extent=4.0), inputs=("image",), reason="learned from data only"),
        ),
        baselines=baselines,
    )


def baselines() -> Mapping[str, float]:
    """Return the test accuracy of scikit-learn's classifiers on the same split."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    def columns(split):
        records = [digits(split)[index] for index in range(len(digits(split)))]
        return np.stack([record["image"].ravel() for record in records]), np.stack([r["label"] for r in records])

    (train, train_labels), (test, test_labels) = columns("train"), columns("test")
    models = {"logistic regression": LogisticRegression(max_iter=2000), "support vector machine": SVC(gamma="scale")}
    return {
        f"{name} accuracy": float(model.fit(train, train_labels).score(test, test_labels))
        for name, model in models.items()
    }
