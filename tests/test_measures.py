"""What predictions are worth, by hand and by scikit-learn."""

import numpy as np
import pytest
import torch

from simclr_fast.evaluation.measures import (
    average_precision_11point,
    confusion,
    mean_average_precision,
    mean_per_class,
    per_class,
    top_k,
)


def test_average_precision_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert average_precision_11point(scores, torch.tensor([1, 0, 1])) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert average_precision_11point(scores, torch.tensor([1, 1, 0])) == pytest.approx(1)
    assert average_precision_11point(scores, torch.tensor([0, 0, 1])) == pytest.approx(1 / 3)
    assert average_precision_11point(scores, torch.tensor([0, 0, -1])) is None


def test_recalls_are_compared_exactly():
    """Three of ten found before the first mistake: a recall of .3 is reached."""
    truth = torch.tensor([1] * 3 + [0] * 7 + [1] * 7)
    expected = (4 + 7 * 10 / 17) / 11
    assert average_precision_11point(-torch.arange(17.0), truth) == pytest.approx(expected)


def test_what_does_not_count_changes_nothing():
    scores, truth = torch.tensor([0.9, 0.85, 0.8, 0.7]), torch.tensor([1, -1, 0, 1])
    assert average_precision_11point(scores, truth) == average_precision_11point(scores[[0, 2, 3]], truth[[0, 2, 3]])


def test_the_mean_is_over_the_classes_that_there_are():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.9, 0.5]])
    truth = torch.tensor([[1, 1, 0], [0, 0, -1]])
    assert mean_average_precision(scores, truth) == pytest.approx((1 + 1 / 2) / 2)


def test_average_precision_is_read_off_scikit_learns_curve():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra evaluate")
    rng = np.random.default_rng(0)
    for positive in (0.02, 0.3, 0.9):
        scores, truth = rng.normal(size=500), (rng.random(500) < positive).astype(int)
        precision, recall, _ = metrics.precision_recall_curve(truth, scores + truth)
        precision, recall = precision[:-1], recall[:-1]  # the last point, (0, 1), is of no image
        at = [precision[recall >= k / 10 - 1e-9].max() for k in range(11)]
        found = average_precision_11point(torch.from_numpy(scores + truth), torch.from_numpy(truth))
        assert found == pytest.approx(np.mean(at), abs=1e-12)


def test_accuracies_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra evaluate")
    generator = torch.Generator().manual_seed(0)
    scores, truth = torch.randn(300, 7, generator=generator), torch.randint(7, (300,), generator=generator)
    counts = confusion(truth, scores.argmax(1), 7)
    theirs = metrics.confusion_matrix(truth, scores.argmax(1))
    assert counts == [[*pair, theirs[*pair]] for pair in np.argwhere(theirs).tolist()]
    assert mean_per_class(counts) == pytest.approx(metrics.balanced_accuracy_score(truth, scores.argmax(1)))
    for k in (1, 5):
        assert top_k(scores, truth, k) == pytest.approx(metrics.top_k_accuracy_score(truth, scores, k=k))


def test_a_class_without_images_has_no_accuracy():
    counts = confusion(torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2]), 3)
    assert per_class(counts) == {0: 0.5, 2: 1.0}
    assert mean_per_class(counts) == 0.75
