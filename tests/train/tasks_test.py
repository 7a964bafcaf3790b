"""Tasks: what they minimise is what the papers say, what they measure is exact over the set, whatever the batches."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.window import SimMIM, Swin
from train import evaluate, tasks
from train import mesh as meshes
from train.config import MeshShape
from train.data import arrays, evaluation_batches
from train.state import BoundModel

KEY = jax.random.key(7)


class Echo(nn.Module):
    """Returns its first input: the columns of a test are what the model predicts."""

    @nn.compact
    def __call__(self, x, *further, mask=None):
        return x


def measure(task, columns, batch_size, model=None, params=None):
    """Return the metrics over a set, as the loop finds them: 8 devices, padded batches."""
    mesh = meshes.build(MeshShape())
    params = jax.device_put(params or {}, meshes.replicated(mesh))
    function = evaluate.compile_evaluation(evaluate.evaluation_step(model or Echo(), task), params, {}, mesh)
    batches = evaluation_batches(arrays(**columns), batch_size=batch_size)
    return evaluate.evaluate(function, params, {}, batches, task=task, mesh=mesh)


def on_batch(task, columns, loss=None):
    """Return the losses and what is logged of one training batch."""
    batch = {name: jnp.asarray(column) for name, column in columns.items()}
    return (loss or task.loss)(lambda x, *_, **__: x, batch, KEY)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# Classification --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(21, 8)).astype(np.float32),
        "label": rng.integers(8, size=21).astype(np.int32),
        "soft": rng.dirichlet(np.ones(8), size=21).astype(np.float32),
    }


def test_probabilities_as_labels_give_their_cross_entropy_and_count_as_their_likeliest_class(scores):
    task = tasks.classification(8, label="soft")
    losses, logged = on_batch(task, scores)
    expected = -(scores["soft"] * np.log(softmax(scores["image"].astype(float)))).sum(-1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(logged["accuracy"], scores["image"].argmax(-1) == scores["soft"].argmax(-1))
    hard = np.eye(8, dtype=np.float32)[scores["label"]]
    for smoothing in (0.0, 0.2):
        plain = on_batch(tasks.classification(8, label_smoothing=smoothing), scores)[0]
        same = on_batch(tasks.classification(8, label="soft", label_smoothing=smoothing), {**scores, "soft": hard})[0]
        np.testing.assert_allclose(same, plain, rtol=1e-6)


def test_top_five_accuracy_is_exact_and_only_there_with_more_than_five_classes(scores):
    columns = {name: scores[name] for name in ("image", "label")}
    result = measure(tasks.classification(8), columns, 8)
    ranked = np.argsort(-columns["image"], -1)
    for count, name in ((1, "accuracy"), (5, "top_5_accuracy")):
        expected = np.mean([label in row[:count] for label, row in zip(columns["label"], ranked, strict=True)])
        assert result.metrics[name] == pytest.approx(expected, abs=1e-12)
    assert result.metrics["accuracy"] < result.metrics["top_5_accuracy"] < 1
    few = {"image": columns["image"][:, :5], "label": columns["label"] % 5}
    assert set(measure(tasks.classification(5), few, 8).metrics) == {"loss", "accuracy"}


def test_class_weights_scale_the_loss_of_their_class_in_training_only(scores):
    columns = {name: scores[name] for name in ("image", "label")}
    weights = np.arange(8.0)
    plain, weighted = (tasks.classification(8, class_weights=given) for given in (None, tuple(weights)))
    np.testing.assert_allclose(
        on_batch(weighted, columns)[0], on_batch(plain, columns)[0] * weights[columns["label"]], rtol=1e-5
    )
    assert measure(weighted, columns, 8).metrics == measure(plain, columns, 8).metrics


# Parts of an example ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """Logits and labels of 13 pictures, of which some lack a class and one has no label at all."""
    rng = np.random.default_rng(1)
    label = rng.integers(3, size=(13, 5, 4)).astype(np.int32)
    label[label == 2] = np.where(rng.random((label == 2).sum()) < 0.7, 0, 2)
    label[:4] = np.minimum(label[:4], 1)
    label[rng.random(label.shape) < 0.1] = 255
    label[5] = 255
    label[6:8, 1:] = 255
    image = 2 * np.eye(4)[np.minimum(label, 3)] + rng.normal(size=(*label.shape, 4))
    return {"image": image.astype(np.float32), "label": label}


@pytest.mark.parametrize("batch_size", [8, 16])
def test_segmentation_measures_ratios_over_all_pixels_of_the_set(pictures, batch_size):
    found = measure(tasks.segmentation(4, ignore_label=255), pictures, batch_size).metrics
    truth, prediction = pictures["label"], pictures["image"].argmax(-1)
    valid = truth != 255
    truth, prediction = truth[valid], prediction[valid]
    iou, dice = [], []
    for index in range(4):
        both = np.sum((truth == index) & (prediction == index))
        either = np.sum((truth == index) | (prediction == index))
        iou.append(both / either)
        dice.append(2 * both / (np.sum(truth == index) + np.sum(prediction == index)))
    probability = softmax(pictures["image"].astype(float)[valid])
    expected = {
        "loss": -np.log(probability[np.arange(len(truth)), truth]).mean(),
        "pixel_accuracy": np.mean(truth == prediction),
        "mean_iou": np.mean(iou),
        "mean_dice": np.mean(dice),
        **{f"iou_{index}": value for index, value in enumerate(iou)},
        **{f"dice_{index}": value for index, value in enumerate(dice)},
    }
    assert iou[3] == 0, "class 3 is predicted and never there, which must count"
    assert found == pytest.approx(expected, rel=1e-6)
    # Negative control: the mean over pictures is another number.
    accuracies = [
        np.mean(p[t != 255] == t[t != 255])
        for p, t in zip(pictures["image"].argmax(-1), pictures["label"], strict=True)
        if np.any(t != 255)
    ]
    assert abs(np.mean(accuracies) - expected["pixel_accuracy"]) > 1e-3


def test_a_class_that_never_occurs_is_left_out_of_the_means():
    columns = {
        "image": np.eye(3, dtype=np.float32)[[[0, 0, 1, 1]]].repeat(2, 0),
        "label": np.asarray([[0, 1, 1, 1]] * 2, np.int32),
    }
    found = measure(tasks.segmentation(3), columns, 8).metrics
    assert np.isnan(found["iou_2"])
    assert np.isnan(found["dice_2"])
    assert found["mean_iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["mean_dice"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_segmentation_loss_is_the_mean_over_labelled_pixels_plus_dice(pictures):
    losses, logged = on_batch(tasks.segmentation(4, ignore_label=255), pictures)
    both, _ = on_batch(tasks.segmentation(4, ignore_label=255, dice_weight=0.5), pictures)
    probability = softmax(pictures["image"].astype(float))
    for index, (truth, p) in enumerate(zip(pictures["label"], probability, strict=True)):
        valid = truth != 255
        if not valid.any():
            assert losses[index] == logged["pixel_accuracy"][index] == 0
            continue
        entropy = -np.log(p[valid][np.arange(valid.sum()), truth[valid]]).mean()
        one_hot = np.eye(4)[truth[valid]]
        overlap, size = (p[valid] * one_hot).sum(0), p[valid].sum(0) + one_hot.sum(0)
        dice = np.mean(1 - (2 * overlap + 1) / (size + 1))
        assert losses[index] == pytest.approx(entropy, rel=1e-5)
        assert both[index] - losses[index] == pytest.approx(0.5 * dice, rel=1e-4)


def test_what_is_not_labelled_reaches_neither_loss_nor_gradient(pictures):
    task = tasks.segmentation(4, ignore_label=255, dice_weight=1.0)

    def summed(image):
        return task.loss(lambda x: x, {**pictures, "image": image}, KEY)[0].sum()

    broken = np.where((pictures["label"] == 255)[..., None], np.nan, pictures["image"]).astype(np.float32)
    gradient = np.asarray(jax.grad(summed)(jnp.asarray(broken)))
    np.testing.assert_array_equal(gradient, jax.grad(summed)(jnp.asarray(pictures["image"])))
    assert np.all(gradient[pictures["label"] == 255] == 0)
    assert np.all(np.any(gradient[pictures["label"] != 255] != 0, axis=-1))


def test_segmentation_takes_volumes():
    rng = np.random.default_rng(0)
    columns = {
        "image": rng.normal(size=(3, 2, 3, 4, 2)).astype(np.float32),
        "label": rng.integers(2, size=(3, 2, 3, 4)).astype(np.uint8),
    }
    found = measure(tasks.segmentation(2), columns, 8).metrics
    assert found["pixel_accuracy"] == pytest.approx(np.mean(columns["image"].argmax(-1) == columns["label"]), abs=1e-7)


@pytest.mark.parametrize("batch_size", [8, 16])
def test_every_marked_node_counts_once(batch_size):
    rng = np.random.default_rng(2)
    # Graphs of very different sizes, so that a mean over graphs is another number.
    size = rng.integers(1, 10, size=11)
    mask = np.arange(9) < size[:, None]
    columns = {
        "nodes": rng.normal(size=(11, 9, 3)).astype(np.float32),
        "label": np.where(mask, rng.integers(3, size=(11, 9)), 77).astype(np.int32),
        "mask": mask,
    }
    found = measure(tasks.node_classification(3, inputs=("nodes",)), columns, batch_size).metrics
    right = (columns["nodes"].argmax(-1) == columns["label"])[mask]
    probability = softmax(columns["nodes"].astype(float))[mask]
    loss = -np.log(probability[np.arange(mask.sum()), columns["label"][mask]]).mean()
    assert found == pytest.approx({"accuracy": right.mean(), "loss": loss}, rel=1e-5)
    by_graph = np.mean([np.mean((row.argmax(-1) == label)[real]) for row, label, real in zip(
        columns["nodes"], columns["label"], mask, strict=True)])  # fmt: skip
    assert abs(by_graph - found["accuracy"]) > 1e-3
    losses, _ = on_batch(tasks.node_classification(3, inputs=("nodes",)), columns)
    assert losses.shape == (11,)
    everywhere = {**columns, "label": np.minimum(columns["label"], 2)}
    found = measure(tasks.node_classification(3, inputs=("nodes",), mask=None), everywhere, 8).metrics
    assert found["accuracy"] == pytest.approx(np.mean(everywhere["nodes"].argmax(-1) == everywhere["label"]), abs=1e-7)


@pytest.mark.parametrize("batch_size", [8, 16])
def test_vectors_of_real_points_count_once_and_padding_never(batch_size):
    rng = np.random.default_rng(3)
    mask = np.arange(7) < rng.integers(1, 8, size=13)[:, None]
    columns = {
        "points": rng.normal(size=(13, 7, 3)).astype(np.float32),
        "forces": np.where(mask[..., None], rng.normal(size=(13, 7, 3)), np.nan).astype(np.float32),
        "is_real": mask,
    }
    task = tasks.regression(inputs=("points",), target="forces", mask="is_real", keywords={"mask": "is_real"})
    found = measure(task, columns, batch_size).metrics
    wanted = columns["forces"].astype(float)[mask]
    error = columns["points"].astype(float)[mask] - wanted
    mse = np.mean(error**2)
    expected = {
        "loss": mse,
        "mse": mse,
        "mae": np.mean(np.abs(error)),
        "rmse": mse**0.5,
        "r2": 1 - mse / np.var(wanted),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    losses, logged = on_batch(task, columns)
    for index, real in enumerate(mask):
        one = (columns["points"] - columns["forces"])[index][real]
        assert losses[index] == pytest.approx(np.mean(one**2), rel=1e-5)
        assert logged["mae"][index] == pytest.approx(np.mean(np.abs(one)), rel=1e-5)
    gradient = jax.grad(lambda points: task.loss(lambda x, mask: x, {**columns, "points": points}, KEY)[0].sum())(
        jnp.asarray(columns["points"])
    )
    np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=-1), mask)


# Tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    """Rows of a table with gaps, a constant column and codes, of which the test rows hold one more."""
    rng = np.random.default_rng(4)
    age = rng.normal(40, 10, size=50)
    age[::7] = np.nan
    return {
        "age": age.astype(np.float32),
        "one": np.ones(50, np.float32),
        "port": rng.choice([-3, 10, 500], size=50).astype(np.int32),
        "price": rng.normal(1000, 50, size=50).astype(np.float32),
        "sold": rng.integers(2, size=50).astype(np.int32),
    }


def test_columns_are_standardised_by_the_training_rows_and_gaps_are_marked(table):
    fitted = tasks.fit_table(arrays(**table), numeric=("age", "one"), categorical=("port",))
    assert (fitted.width, fitted.cardinalities, fitted.gaps) == (3, (4,), (0,))
    encoded = fitted.encode(table)
    columns = np.asarray(encoded["columns"])
    absent = np.isnan(table["age"])
    assert columns[~absent, 0].mean() == pytest.approx(0, abs=1e-5)
    assert columns[~absent, 0].std() == pytest.approx(1, abs=1e-5)
    assert np.all(columns[absent, 0] == 0)
    assert np.all(columns[:, 1] == 0)
    np.testing.assert_array_equal(columns[:, 2], absent)
    np.testing.assert_array_equal(np.asarray([-3, 10, 500])[np.asarray(encoded["categories"])[:, 0] - 1], table["port"])
    # Columns side by side in one field are the same table.
    joined = {"numeric": np.stack([table["age"], table["one"]], -1), "categorical": table["port"][:, None]}
    same = tasks.fit_table(arrays(**joined), numeric=("numeric",), categorical=("categorical",))
    assert (same.mean, same.deviation, same.codes) == (fitted.mean, fitted.deviation, fitted.codes)
    jax.tree.map(np.testing.assert_array_equal, same.encode(joined), encoded)
    # Rows of the test are measured by the same scale; codes that training did not hold share row 0.
    other = fitted.encode({"age": np.asarray([50.0]), "one": np.asarray([3.0]), "port": np.asarray([11])})
    mean, deviation = np.nanmean(table["age"]), np.nanstd(table["age"])
    np.testing.assert_allclose(other["columns"], [[(50 - mean) / deviation, 2, 0]], rtol=1e-4)
    assert other["categories"].tolist() == [[0]]


class FromTable(nn.Module):
    cardinality: int

    @nn.compact
    def __call__(self, columns, categories):
        return nn.Dense(2)(jnp.concatenate([columns, nn.Embed(self.cardinality, 3)(categories[:, 0])], axis=-1))


@pytest.mark.slow
def test_a_table_is_classified_and_its_numbers_are_measured_in_their_own_units(table):
    fitted = tasks.fit_table(arrays(**table), numeric=("age",), categorical=("port",))
    task = tasks.tabular(fitted, target="sold", num_classes=2)
    model = FromTable(fitted.cardinalities[0])
    batch = {name: jnp.asarray(column) for name, column in table.items()}
    params = model.init(KEY, *task.inputs(batch))["params"]
    result = measure(task, table, 16, model, params)
    logits = model.apply({"params": params}, *task.inputs(batch))
    assert result.metrics["accuracy"] == pytest.approx(np.mean(np.asarray(logits).argmax(-1) == table["sold"]))
    assert result.confusion.sum() == 50
    losses, _ = task.loss(BoundModel(model, params, {}), batch, KEY)
    np.testing.assert_allclose(losses, tasks.cross_entropy(logits, batch["sold"]), rtol=1e-6)

    fitted = tasks.fit_table(arrays(**table), numeric=("age",))
    mean, deviation = float(table["price"].mean()), float(table["price"].std())
    task = tasks.tabular(fitted, target="price", target_mean=mean, target_scale=deviation)
    nothing = dict.fromkeys(("loss", "mse"), deviation**2) | {"rmse": deviation, "r2": 0.0}
    zero = lambda columns: jnp.zeros((len(columns), 1))  # noqa: E731
    found = task.evaluate(zero, batch).metrics
    metrics = task.finish({name: float(jnp.mean(values)) for name, values in found.items()})
    assert {name: metrics[name] for name in nothing} == pytest.approx(nothing, rel=1e-3, abs=1e-3)
    losses, logged = task.loss(zero, batch, KEY)
    assert jnp.mean(losses) == pytest.approx(1, rel=1e-3)  # what is minimised has the model's scale
    assert jnp.mean(logged["mae"]) == pytest.approx(np.mean(np.abs(table["price"] - mean)), rel=1e-3)


# Without labels --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hidden():
    model = SimMIM(Swin(num_classes=0, patch_size=2, embed_dim=4, depths=(1,), num_heads=(1,), window_size=2))
    task = tasks.masked_image_modelling(patch_size=2, mask_patch_size=4, mask_ratio=0.5)
    columns = {"image": jnp.asarray(np.random.default_rng(0).normal(size=(11, 8, 8, 1)), jnp.float32)}
    params = model.init(KEY, *task.inputs(columns))["params"]
    return model, task, columns, params


@pytest.mark.slow
def test_each_step_hides_other_patches_and_the_loss_is_theirs(hidden):
    model, task, columns, params = hidden
    seen = []

    def apply(images, masked):
        seen.append(np.asarray(masked))
        return model.apply({"params": params}, images, masked)

    losses, _ = task.loss(apply, columns, jax.random.key(0))
    task.loss(apply, columns, jax.random.key(1))
    assert np.any(seen[0] != seen[1])
    assert np.any(seen[0][0] != seen[0][1:])
    assert np.all(seen[0].mean((1, 2)) == 0.5)
    out = model.apply({"params": params}, columns["image"], jnp.asarray(seen[0]))
    error = np.abs(np.asarray(out) - columns["image"])
    picked = np.repeat(np.repeat(seen[0], 2, 1), 2, 2)
    np.testing.assert_allclose(losses, [one[where].mean() for one, where in zip(error, picked, strict=True)], rtol=1e-5)


def test_masks_of_test_images_are_their_own_whatever_the_batch(hidden):
    model, task, columns, params = hidden
    results = [measure(task, columns, batch_size, model, params).metrics["loss"] for batch_size in (8, 16)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    reordered = {"image": columns["image"][::-1]}
    assert measure(task, reordered, 8, model, params).metrics["loss"] == pytest.approx(results[0], rel=1e-6)
    masks = []
    task.evaluate(lambda images, masked: masks.append(masked) or images, columns)
    assert len(np.unique(np.asarray(masks[0]).reshape(11, -1), axis=0)) > 1


class Players(nn.Module):
    """A game of two affine players, small enough for its losses to be written down."""

    def setup(self):
        self.generator = nn.Dense(3)
        self.discriminator = nn.Dense(1)

    def __call__(self, x, latent):
        return self.discriminate(x), self.discriminate(self.generate(latent))

    def generate(self, latent):
        return self.generator(latent)

    def discriminate(self, x):
        return self.discriminator(nn.tanh(x))


@pytest.fixture(scope="module")
def game():
    columns = {"image": np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)}
    task = tasks.adversarial(2, r1_gamma=3.0, reference=columns["image"])
    batch = {"image": jnp.asarray(columns["image"])}
    params = Players().init(KEY, *task.inputs(batch))["params"]
    return task, columns, batch, params


def test_the_players_minimise_the_non_saturating_losses_with_r1(game):
    task, _, batch, params = game
    assert set(task.loss) == set(params) == {"generator", "discriminator"}
    apply = BoundModel(Players(), params, {}, KEY)
    losses, logged = task.loss["generator"](apply, batch, KEY)
    np.testing.assert_allclose(losses, np.log1p(np.exp(-np.asarray(logged["fake_score"]))), rtol=1e-5)
    losses, logged = task.loss["discriminator"](apply, batch, KEY)
    weight = np.asarray(params["discriminator"]["kernel"])[:, 0]
    x = np.asarray(batch["image"])
    real = np.tanh(x) @ weight + np.asarray(params["discriminator"]["bias"])
    gradient = (1 - np.tanh(x) ** 2) * weight
    np.testing.assert_allclose(logged["real_score"], real, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logged["r1"], (gradient**2).sum(-1), rtol=1e-4)
    plain = dataclasses.replace(task, loss=tasks.adversarial(2, r1_gamma=0.0).loss)
    without, _ = plain.loss["discriminator"](BoundModel(Players(), params, {}, KEY), batch, KEY)
    np.testing.assert_allclose(losses - without, 1.5 * (gradient**2).sum(-1), rtol=1e-3, atol=1e-6)
    assert np.all(np.asarray(without) > np.log1p(np.exp(-real)))


def test_no_player_moves_the_other(game):
    task, _, batch, params = game

    def gradient(player, of):
        def summed(own):
            apply = BoundModel(Players(), {**params, of: own}, {}, KEY)
            return task.loss[player](apply, batch, KEY)[0].sum()

        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(jax.grad(summed)(params[of])))

    assert gradient("discriminator", of="generator") == 0
    assert gradient("discriminator", of="discriminator") > 0
    assert gradient("generator", of="generator") > 0


def test_players_are_measured_by_their_parameters_alone(game):
    task, columns, batch, params = game
    first, second = (measure(task, columns, size, Players(), params).metrics for size in (8, 16))
    assert first == pytest.approx(second, rel=1e-5)
    # A generator that gives what is real is at distance 0 of it; here the latents are the data.
    exact = tasks.adversarial(2, reference=np.asarray(jax.random.normal(jax.random.key(0), (11, 2))))
    found = exact.evaluate(lambda x, method: x if method == "generate" else x[:, 0], {"image": batch["image"][:, :2]})
    assert found.metrics["sliced_wasserstein"].max() == 0
    assert first["sliced_wasserstein"] > 0.1
    made = Players().apply({"params": params}, jax.random.normal(jax.random.key(0), (11, 2)), method="generate")
    distance = tasks.sliced_wasserstein(made, jnp.asarray(columns["image"]))
    assert first["sliced_wasserstein"] == pytest.approx(float(distance), rel=1e-5)


def test_sliced_distance_of_translated_samples_is_the_length_of_the_translation():
    x = np.random.default_rng(0).normal(size=(200, 4, 2)).astype(np.float32)
    step = np.zeros((4, 2), np.float32)
    step[1, 0], step[2, 1] = 3.0, 4.0
    shuffled = np.random.default_rng(1).permutation(x)
    assert tasks.sliced_wasserstein(jnp.asarray(x), jnp.asarray(shuffled)) == pytest.approx(0, abs=1e-5)
    found = tasks.sliced_wasserstein(jnp.asarray(x), jnp.asarray(shuffled + step), projections=4096)
    assert found == pytest.approx(5, rel=0.03)


# Bad settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tasks.classification(3, class_weights=(1, 2)),
            r"class_weights=\(1, 2\) must be num_classes=3 numbers",
        ),
        (lambda: tasks.segmentation(1), "num_classes=1 must be at least 2"),
        (lambda: tasks.segmentation(2, dice_weight=-1.0), "dice_weight=-1.0 must not be negative"),
        (lambda: tasks.node_classification(3, label_smoothing=1.5), "label_smoothing=1.5 must lie in"),
        (lambda: tasks.fit_table(arrays(a=np.ones(3))), "a table needs columns"),
        (lambda: tasks.fit_table(arrays(a=np.ones(3)), numeric=("b",)), "no field 'b'; .* some of .'a'."),
        (
            lambda: tasks.fit_table(arrays(a=np.ones(3)), categorical=("a",)),
            "field 'a' must hold integer codes, one or a vector a row; it is float64",
        ),
        (
            lambda: tasks.fit_table(arrays(a=np.full(3, np.nan)), numeric=("a",)),
            "numeric column 0 of .'a',. has no value in any",
        ),
        (
            lambda: tasks.tabular(tasks.fit_table(arrays(a=np.ones(3)), numeric=("a",)), target="b", target_scale=0.0),
            "target_scale=0.0 must be positive",
        ),
        (lambda: tasks.masked_image_modelling(mask_ratio=0.0), "mask_ratio=0.0 must lie in"),
        (lambda: tasks.masked_image_modelling(mask_patch_size=30), "mask_patch_size=30 must be a multiple"),
        (lambda: tasks.masked_image_modelling(inputs=("a", "b")), "must name the field with the images alone"),
        (lambda: tasks.adversarial(0), "latent_features=0 must be at least 1"),
        (lambda: tasks.adversarial(2, r1_gamma=-1.0), "r1_gamma=-1.0 must not be negative"),
        (lambda: tasks.adversarial(2, reference=np.ones((1, 3))), "reference of 1 examples must have at least 2"),
        (
            lambda: tasks.sliced_wasserstein(jnp.ones((3, 2)), jnp.ones((2, 2))),
            r"shapes \(3, 2\) and \(2, 2\), which must be equal",
        ),
    ],
)
def test_tasks_refuse_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        (
            tasks.classification(3),
            {"image": np.ones((2, 3)), "label": np.ones(2, np.float32)},
            r"labels of dtype float32 and shape \(2,\) must be integers, or 3 probabilities",
        ),
        (
            tasks.segmentation(3),
            {"image": np.ones((2, 4, 4, 3)), "label": np.ones((2, 5, 5), np.int32)},
            r"logits have shape \(2, 4, 4, 3\), which must be \(2, 5, 5, 3\)",
        ),
        (
            tasks.segmentation(3),
            {"image": np.ones((2, 3)), "label": np.ones(2, np.int32)},
            r"must be an integer for each part of an example, \[batch, parts\]; they are int32 of shape \(2,\)",
        ),
        (
            tasks.node_classification(3, inputs=("image",)),
            {"image": np.ones((2, 4, 3)), "label": np.ones((2, 4), np.int32), "mask": np.ones((2, 5), bool)},
            r"mask 'mask' of shape \(2, 5\) must have that of 'label', \(2, 4\)",
        ),
        (
            tasks.regression(inputs=("image",), target="forces", mask="mask"),
            {"image": np.ones((2, 4, 3)), "forces": np.ones((2, 4, 3)), "mask": np.ones((2, 5), bool)},
            r"mask 'mask' of shape \(2, 5\) must be \[batch, points\]",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both(task, columns, message):
    with pytest.raises(ValueError, match=message):
        on_batch(task, columns)


def test_players_of_the_wrong_shape_are_refused(game):
    task, _, batch, params = game
    apply = BoundModel(Players(), params, {}, KEY)
    wide = {"image": jnp.ones((11, 4))}
    with pytest.raises(ValueError, match=r"generate must return .* of shape \(11, 4\); it has \(11, 3\)"):
        task.loss["generator"](apply, wide, KEY)
    with pytest.raises(ValueError, match=r"discriminate must return one score an example, of shape \(11,\)"):
        task.loss["discriminator"](lambda x, method: x, batch, KEY)
    other = tasks.adversarial(2, reference=np.ones((11, 4)))
    with pytest.raises(ValueError, match=r"reference of shape \(11, 4\) must be like what generate returns, \(11, 3\)"):
        other.evaluate(apply, batch)
    counted = BoundModel(Players(), params, {"batch_stats": {}}, KEY)
    with pytest.raises(ValueError, match="which running statistics do not allow; norm each example alone"):
        task.loss["discriminator"](counted, batch, KEY)


def test_hidden_patches_that_do_not_fit_the_image_are_refused(hidden):
    columns = hidden[2]
    task = tasks.masked_image_modelling(patch_size=2, mask_patch_size=6)
    with pytest.raises(ValueError, match=r"size=\(8, 8\) must be multiples of mask_patch_size=6"):
        task.inputs(columns)
