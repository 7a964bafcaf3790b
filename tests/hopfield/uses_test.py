"""What the configs of Hopfield layers are trained on: labels that are right, nothing shared between splits."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import loop
from train.data import digits

bit_pattern = importlib.import_module("configs.hopfield_bit_pattern")
digit_bags = importlib.import_module("configs.hopfield_digit_bags")
recall_digits = importlib.import_module("configs.hopfield_recall_digits")
hopfield_recall = importlib.import_module("tools.hopfield_recall")


def records(source):
    found = [source[index] for index in range(len(source))]
    return {name: np.stack([record[name] for record in found]) for name in found[0]}


# Bit patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "count"), [("train", 1536), ("test", 512)])
def test_bag_of_bits_has_label_1_just_if_one_of_its_patterns_is_a_signal(split, count):
    found = records(bit_pattern.bit_patterns(split))
    assert found["instances"].shape == (count, 16, 8)
    assert set(np.unique(found["instances"])) == {0, 1}
    codes = (found["instances"] @ 2 ** np.arange(8)).astype(int)
    signals = np.isin(codes, bit_pattern.SIGNALS).sum(axis=1)
    np.testing.assert_array_equal(signals, found["label"])
    assert found["label"].mean() == 0.5
    assert not np.any(codes == 0)


def test_every_bit_pattern_and_signal_occurs_about_as_often_as_any_other():
    bags, labels = bit_pattern.draw()
    counts = np.bincount(bags.ravel(), minlength=256)
    signals = np.isin(np.arange(256), bit_pattern.SIGNALS)
    expected = np.where(signals, 1024 / 8, (bags.size - 1024) / 247)
    assert np.all(np.abs(counts - expected)[1:] < 5 * np.sqrt(expected[1:]))
    # Where a signal stands says nothing.
    places = np.isin(bags[labels == 1], bit_pattern.SIGNALS).sum(axis=0)
    assert np.all(np.abs(places - 64) < 5 * 8)


def test_bags_of_bits_are_the_same_in_every_run_and_no_two_are_equal():
    bags, _ = bit_pattern.draw()
    assert bags[0, :4].tolist() == [180, 156, 124, 200]
    again, _ = bit_pattern.draw.__wrapped__()
    np.testing.assert_array_equal(again, bags)
    assert len(np.unique(np.sort(bags, axis=1), axis=0)) == len(bags)


def test_bits_are_those_of_the_number():
    rows = bit_pattern.bits(np.arange(256))
    np.testing.assert_array_equal(rows @ 2.0 ** np.arange(8), np.arange(256))


def test_lookup_begins_with_each_training_pattern_once():
    lookup = bit_pattern.lookup()
    params = jax.jit(lookup.init)(jax.random.key(0), jnp.zeros((1, 16, 8)))["params"]
    stored = np.asarray(params["stored_patterns"])
    assert len(np.unique(stored, axis=0)) == len(stored) == 255
    assert params["stored_values"].shape == (255, 16)


# Bags of digits -------------------------------------------------------------------------------------------------------


def test_bag_of_digits_has_label_1_just_if_it_holds_a_nine():
    bags = digit_bags.drawn(300, "train")
    source = records(digits("train"))
    known = {image.tobytes(): label for image, label in zip(source["image"], source["label"], strict=True)}
    for image, real, label in zip(bags["instances"], bags["is_instance"], bags["label"], strict=True):
        classes = [known[one.tobytes()] for one in image[real]]
        assert (9 in classes) == bool(label)


def test_padding_of_a_bag_is_empty_and_is_never_the_target():
    bags = digit_bags.drawn(300, "test")
    assert not np.any(bags["instances"][~bags["is_instance"]])
    assert not np.any(bags["is_target"] & ~bags["is_instance"])
    np.testing.assert_array_equal(bags["is_target"].any(axis=1), bags["label"] == 1)
    sizes = bags["is_instance"].sum(axis=1)
    assert (sizes.min(), sizes.max()) == (6, 14)


def test_classes_of_bags_are_balanced_and_the_size_of_a_bag_does_not_tell_them_apart():
    bags = digit_bags.drawn(2000, "train")
    sizes = bags["is_instance"].sum(axis=1)
    assert bags["label"].mean() == 0.5
    means = [sizes[bags["label"] == label].mean() for label in (0, 1)]
    # Standard error of the difference: sqrt(6.67 * 2 / 1000) = 0.12.
    assert abs(means[0] - means[1]) < 0.4


def test_training_and_test_bags_share_no_digit():
    train, test = (digit_bags.drawn(1000, split) for split in ("train", "test"))
    seen, unseen = ({one.tobytes() for one in bags["instances"][bags["is_instance"]]} for bags in (train, test))
    assert len(seen) > 1000
    assert len(unseen) > 500
    assert not seen & unseen


def test_bags_of_digits_are_the_same_in_every_run():
    again = digit_bags.drawn.__wrapped__(300, "test")
    for name, array in digit_bags.drawn(300, "test").items():
        np.testing.assert_array_equal(again[name], array)


def test_padded_bags_give_the_logits_of_the_bags_alone():
    config = digit_bags.config(smoke=True)
    bags = digit_bags.drawn(8, "test")
    for model in (config.model, *config.rivals.values()):
        images, real = jnp.asarray(bags["instances"]), jnp.asarray(bags["is_instance"])
        logits, variables = jax.jit(model.init_with_output)(jax.random.key(0), images, key_mask=real)
        size = int(real[3].sum())
        alone = jax.jit(model.apply)(variables, images[3:4, :size], key_mask=real[3:4, :size])
        np.testing.assert_allclose(alone[0], logits[3], atol=1e-5)


@pytest.mark.slow
def test_trained_pooling_looks_at_the_nines(tmp_path):
    config = digit_bags.config()
    result = loop.train(
        dataclasses.replace(config, rivals={}, baselines=None), tmp_path, devices=jax.devices()[:1], silent=True
    )
    bags = {name: array[1::2] for name, array in digit_bags.drawn(1000, "test").items()}
    images, real = jnp.asarray(bags["instances"]), jnp.asarray(bags["is_instance"])

    def share(params):
        """Return how often a head's strongest instance is a nine, the best head's."""
        _, state = config.model.apply({"params": params}, images, key_mask=real, mutable="intermediates")
        weights = np.asarray(state["intermediates"]["pooling"]["hopfield"]["association"][0])[:, :, 0]
        first = np.argmax(weights, axis=-1)
        return np.take_along_axis(bags["is_target"], first, axis=-1).mean(axis=0).max()

    assert share(result.state.params) > 0.9
    # Untrained, it looks anywhere.
    assert share(config.model.init(jax.random.key(0), images, key_mask=real)["params"]) < 0.5


# Recall of digits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", recall_digits.KINDS)
def test_corruption_covers_one_half_and_leaves_pixels_in_range(kind, rng):
    clean = recall_digits.pictures("train")[7]
    covered = np.zeros((8, 8), int)
    for _ in range(40):
        found = recall_digits.corrupt(clean, kind, rng).reshape(8, 8)
        assert found.min() >= 0
        assert found.max() <= 1
        same = found == clean.reshape(8, 8)
        grey = found == np.float32(recall_digits.GREY)
        halves = [np.rot90(grey, side)[:4].all() for side in range(4)]
        if kind == "half":
            assert sum(halves) == 1
            assert np.rot90(same, halves.index(True))[4:].all()
            covered += grey
        else:
            assert not any(halves)
            assert not same.all()
    if kind == "half":
        assert covered.min() > 0  # every side is covered at times


def test_corrupted_test_pictures_are_the_same_in_every_run_and_have_no_place_in_the_memory():
    for kind in recall_digits.KINDS:
        again = recall_digits.corruptions.__wrapped__("test", kind)
        np.testing.assert_array_equal(again, recall_digits.corruptions("test", kind))
    found = records(recall_digits.held_out(*recall_digits.KINDS))
    assert len(found["clean"]) == 3 * 599
    assert set(found["own"]) == {-1}
    stored = {picture.tobytes() for picture in recall_digits.pictures("train")}
    assert len(stored) == 1198
    assert not stored & {picture.tobytes() for picture in found["clean"]}


def test_training_record_names_its_own_place_in_the_memory(rng):
    source = recall_digits.config(smoke=True).train_data
    for index in (0, 5, 1197):
        record = recall_digits.corrupted(source[index], rng)
        np.testing.assert_array_equal(record["clean"], recall_digits.pictures("train")[record["own"]])
        assert record["corrupted"].shape == (64,)


def test_restorer_starts_as_the_mean_of_its_heads_and_never_returns_a_pictures_own_copy():
    stored = recall_digits.pictures("train")
    sharp = recall_digits.restorer(("query", "key", "out"), betas=(50.0, 50.0))
    given, own = jnp.asarray(stored[:20]), jnp.arange(20)
    variables = jax.jit(sharp.init)(jax.random.key(0), given, own=own)
    free, without = (np.asarray(jax.jit(sharp.apply)(variables, given, own=one)) for one in (own * 0 - 1, own))
    # At a large beta each picture is its own answer, unless that is forbidden; then it is the nearest other one.
    np.testing.assert_allclose(free, stored[:20], atol=1e-3)
    standard = (stored - stored.mean(1, keepdims=True)) / stored.std(1, keepdims=True)
    products = standard[:20] @ standard.T
    products[np.arange(20), np.arange(20)] = -np.inf
    best = np.sort(products, axis=-1)
    clear = best[:, -1] - best[:, -2] > 0.3
    assert clear.sum() > 10
    np.testing.assert_allclose(without[clear], stored[np.argmax(products, axis=-1)][clear], atol=1e-3)


def test_memory_without_parameters_recalls_what_was_stored_and_less_of_it_with_more_noise():
    shares = [hopfield_recall.recall(kind, 50, 128.0).exact for kind in ("half", "both")]
    assert shares[0] > 0.8
    assert shares[1] < 0.6
    # Negative control: at a small beta every state runs into one mean.
    mean = hopfield_recall.recall("half", 50, 2.0)
    assert mean.exact == 0
    assert np.ptp(mean.found, axis=0).max() < 1e-3
    # The nearest picture by pixels is what a memory is to be compared with; a covered half misleads it.
    assert hopfield_recall.nearest("half", 50).exact < shares[0]
