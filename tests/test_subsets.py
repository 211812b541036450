"""Class-balanced draws and lists of images."""

import numpy as np
import pytest

from simclr_fast.config import ConfigError
from simclr_fast.data import Split
from simclr_fast.evaluation.job import Labelled
from simclr_fast.evaluation.subsets import balanced, listed, stratified

LABELS = np.repeat(np.arange(4), (40, 10, 30, 20))


def counts(rows, labels=LABELS):
    return np.bincount(labels[rows], minlength=4).tolist()


def test_images_are_spread_evenly_over_the_classes():
    assert counts(balanced(LABELS, 0.2, 0)) == [5, 5, 5, 5]
    assert sorted(counts(balanced(LABELS, 0.22, 0))) == [5, 5, 6, 6]
    assert counts(balanced(LABELS, 0.04, 0)) == [1, 1, 1, 1]


def test_a_small_class_gives_all_it_has():
    assert counts(balanced(LABELS, 0.7, 0)) == [20, 10, 20, 20]
    assert balanced(LABELS, 1.0, 0).tolist() == list(range(100))


def test_imagenet_s_sizes():
    """Section 4.2 and the lists of the original: 12,811 and 128,116 images."""
    labels = np.arange(1_281_167) % 1000
    rows = balanced(labels, 0.01, 0)
    assert len(rows) == 12_812
    assert set(np.bincount(labels[rows]).tolist()) == {12, 13}


def test_the_seed_fixes_the_draw_and_a_larger_one_holds_the_smaller():
    few, again, other = balanced(LABELS, 0.1, 3), balanced(LABELS, 0.1, 3), balanced(LABELS, 0.1, 4)
    assert np.array_equal(few, again)
    assert not np.array_equal(few, other)
    assert set(few.tolist()) <= set(balanced(LABELS, 0.4, 3).tolist())
    assert np.array_equal(few, np.unique(few))


def test_a_class_that_is_not_there_asks_for_nothing():
    labels = np.array([0, 0, 2, 2])
    assert labels[balanced(labels, 0.5, 0)].tolist() == [0, 2]


def test_fewer_images_than_classes():
    with pytest.raises(
        ConfigError,
        match="labels must leave an image for each of the 4 classes, got labels=3, which is 3 of 100 images",
    ):
        balanced(LABELS, 0.03, 0)


def test_a_share_of_each_class_but_never_its_last_image():
    assert counts(stratified(LABELS, 0.1, 0)) == [4, 1, 3, 2]
    assert counts(stratified(LABELS, 0.99, 0)) == [39, 9, 29, 19]
    assert len(stratified(np.arange(5), 0.5, 0)) == 0
    assert np.array_equal(stratified(LABELS, 0.1, 7), stratified(LABELS, 0.1, 7))
    assert not np.array_equal(stratified(LABELS, 0.1, 7), stratified(LABELS, 0.1, 8))


@pytest.fixture
def images():
    names = ["train/ant/0.jpg", "train/ant/1.jpg", "train/bee/0.jpg", "train/bee/b.jpg", "train/unknown.jpg"]
    none = np.zeros(len(names), np.int64)
    split = Split(names, names, none, none, np.zeros((len(names), 2), np.int64), np.array([0, 0, 1, 1, -1]))
    return Labelled.of(split)


def test_a_list_names_images_whole_or_by_the_file_alone(images, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("b.jpg\n\ntrain/ant/0.jpg\n")
    assert listed(path, images).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train/ant/7.jpg\nb.jpg\n", "names 1 that are not there, the first train/ant/7.jpg"),
        ("train/unknown.jpg\n", "training images that have labels, and .* the first train/unknown.jpg"),
        ("\n", "names none"),
        ("0.jpg\n", "which image it means, and 0.jpg in .* may be train/ant/0.jpg or train/bee/0.jpg"),
        ("b.jpg\ntrain/bee/b.jpg\n", "name each image once, and .* names train/bee/b.jpg twice"),
    ],
)
def test_lists_that_cannot_be_used(images, tmp_path, text, words):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        listed(path, images)


def test_no_list_at_all(images, tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match="subset must be a text file with an image's name on each line, got"):
            listed(path, images)
