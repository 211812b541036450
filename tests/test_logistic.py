"""Logistic regression to its minimum: agreement with scikit-learn, known answers, worst inputs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simclr_fast.config import ConfigError
from simclr_fast.evaluation import logistic
from simclr_fast.evaluation.logistic import L2_VALUES, best, fit, sweep


def clustered(n=300, d=12, k=4, seed=0, distance=1.0):
    """Overlapping clusters, not centred, on axes of very different scales, float64."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    means = torch.randn(k, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + distance * means[y]
    return (x * torch.logspace(-1, 0.5, d, dtype=torch.float64) + 3).float(), y


def objective(found, x, y):
    """The formula in the module's docstring, float64."""
    return F.cross_entropy(found.scores(x.double()), y, reduction="sum") + found.l2 * found.weight.square().sum()


@pytest.mark.parametrize("l2", [0.1, 10.0, 1e3])
def test_several_classes_agree_with_scikit_learn(l2):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs the extra evaluate")
    x, y = clustered()
    theirs = linear_model.LogisticRegression(C=1 / (2 * l2), tol=1e-9, max_iter=5000)
    theirs.fit(x.double().numpy(), y.numpy())
    ours = fit(x, y, l2, classes=4, tolerance=1e-14)
    assert ours.converged
    weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    torch.testing.assert_close(ours.weight, weight, rtol=1e-4, atol=1e-4 * weight.abs().max().item())
    torch.testing.assert_close(ours.bias, bias - bias.mean(), rtol=1e-4, atol=1e-3)
    theirs_fit = logistic.Fit(weight, bias, l2, 0, 0, True)
    assert objective(ours, x, y) <= objective(theirs_fit, x, y) * (1 + 1e-12)


def test_one_against_the_rest_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs the extra evaluate")
    x, y = clustered()
    targets = torch.stack([(y == 0) | (y == 1), y == 2, y == 3], 1).float()
    ours = fit(x, targets, 0.5, tolerance=1e-14)
    for k in range(3):
        theirs = linear_model.LogisticRegression(C=1.0, tol=1e-9, max_iter=5000)
        theirs.fit(x.double().numpy(), targets[:, k].numpy())
        weight = torch.from_numpy(theirs.coef_[0])
        torch.testing.assert_close(ours.weight[k], weight, rtol=1e-4, atol=1e-4 * weight.abs().max().item())
        assert ours.bias[k].item() == pytest.approx(theirs.intercept_[0], rel=1e-3, abs=1e-3)


def test_the_gradient_of_the_objective_is_zero():
    x, y = clustered(seed=3)
    found = fit(x, y, 2.0, classes=4, tolerance=1e-16)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    (F.cross_entropy(x.double() @ weight.T + bias, y, reduction="sum") + 2 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4
    assert found.bias.mean().abs() < 1e-9


def test_what_is_not_said_is_left_out():
    x, y = clustered()
    targets = F.one_hot(y, 4).float()
    targets[100:, 1] = -1
    found, alone = fit(x, targets, 1.0, tolerance=1e-14), fit(x[:100], targets[:100, 1:2], 1.0, tolerance=1e-14)
    torch.testing.assert_close(found.weight[1], alone.weight[0], rtol=1e-3, atol=1e-5)


def test_single_precision_and_another_start_come_to_the_same():
    x, y = clustered()
    exact = fit(x, y, 1.0, classes=4, tolerance=1e-14)
    single = fit(x, y, 1.0, classes=4, tolerance=1e-10, dtype=torch.float32)
    again = fit(x, y, 1.0, classes=4, tolerance=1e-14, start=fit(x, y, 1e-3, classes=4))
    assert fit(x, y, 1.0, classes=4, start=exact).iterations == 0
    for other, within in ((single, 1e-3), (again, 1e-5)):
        torch.testing.assert_close(
            other.weight, exact.weight, rtol=within, atol=within * exact.weight.abs().max().item()
        )


def test_excess_is_about_what_the_objective_is_above_its_minimum():
    x, y = clustered()
    least = objective(fit(x, y, 1.0, classes=4, tolerance=1e-15), x, y)
    for limit in (3, 5, 8):
        short = fit(x, y, 1.0, classes=4, tolerance=0, limit=limit)
        above = (objective(short, x, y) - least).item() / len(x)
        assert not short.converged
        assert 0.1 < short.excess / above < 10


def test_every_fit_of_a_sweep_is_the_minimum_and_none_is_left_out():
    """Carried from one l2 to the next, with pairs of the fits before."""
    x, y = clustered(distance=0.5)
    tried = sweep(x, y, x, lambda scores: -F.cross_entropy(scores, y).item(), classes=4)
    assert [one.l2 for one in tried] == sorted(L2_VALUES)
    assert math.isclose(tried[0].l2, 1e-6)
    assert math.isclose(tried[-1].l2, 1e5)
    for one in tried[::8]:
        alone = fit(x, y, one.l2, classes=4, tolerance=1e-13)
        assert one.fit.converged
        assert 0 <= (objective(one.fit, x, y) - objective(alone, x, y)) / len(x) < 1e-7
    norms = [one.fit.weight.norm() for one in tried]
    assert all(a >= b * 0.9999 for a, b in zip(norms, norms[1:], strict=False))


def test_the_best_is_the_highest_score_and_of_equals_the_one_in_the_middle():
    x, y = clustered()
    tried = sweep(x, y, x, lambda scores: 0.5, classes=4, values=(1.0, 100.0, 10.0))
    assert best(tried).l2 == 10


def test_separable_features_are_told_apart():
    x, y = clustered(distance=40.0)
    for l2 in (1e-6, 1.0):
        found = fit(x, y, l2, classes=4)
        assert (found.scores(x).argmax(1) == y).all()
        assert found.weight.isfinite().all()


def test_random_labels_stay_at_chance():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 20, generator=generator), torch.randint(4, (4000,), generator=generator)
    found = fit(x[:2000], y[:2000], 1.0, classes=4)
    accuracy = (found.scores(x[2000:]).argmax(1) == y[2000:]).double().mean().item()
    assert abs(accuracy - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_features_that_are_all_alike_give_the_classes_shares():
    y = torch.tensor([0, 0, 0, 1])
    for x in (torch.full((4, 5), 3.7), torch.zeros(4, 5)):
        found = fit(x, y, 1e-3, classes=2)
        shares = found.scores(x).softmax(1)[0]
        torch.testing.assert_close(shares, torch.tensor([0.75, 0.25]), rtol=0, atol=1e-4)


def test_two_classes_one_image_each_and_a_class_that_has_none():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = fit(x, torch.tensor([0, 1]), 1.0, classes=3)
    assert found.scores(x).argmax(1).tolist() == [0, 1]
    assert found.scores(x).softmax(1)[:, 2].max() < 1e-3
    assert fit(x, torch.tensor([0, 0]), 1.0, classes=1).iterations == 0


def test_more_features_than_images():
    x, y = clustered(n=12, d=40, k=3)
    found = fit(x, y, 1e-4, classes=3, tolerance=1e-12)
    assert found.converged
    assert (found.scores(x).argmax(1) == y).all()


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        ([[1.0], [np.nan]], [0, 1], {}, "features must be finite, got NaN or infinity for 1 of 2 images"),
        ([[1.0], [np.inf]], [0, 1], {}, "features must be finite"),
        ([[1.0], [2.0]], [0, 2], {"classes": 2}, r"labels must be in \[0, 2\), got 0 to 2"),
        ([[1.0], [2.0]], [0, -1], {}, r"labels must be in \[0, 1\), got -1 to 0"),
        ([[1.0], [2.0]], [0], {}, r"features must be \[n, d\] with n labels, n >= 1, got \[2, 1\] with \[1\]"),
        (np.zeros((0, 3)), [], {}, r"n >= 1, got \[0, 3\]"),
        ([[1.0], [2.0]], [[0.0], [1.0]], {"classes": 2}, "classes must be the number of columns of the labels, 1, got"),
        ([[1.0], [2.0]], [0, 1], {"l2": 0.0}, "l2 must be positive, got l2=0.0"),
        ([[1.0], [2.0]], [0, 1], {"l2": math.nan}, "l2 must be positive, got l2=nan"),
    ],
)
def test_what_cannot_be_fitted(x, y, options, words):
    with pytest.raises(ConfigError, match=words):
        fit(torch.tensor(x, dtype=torch.float32), torch.tensor(y), options.pop("l2", 1.0), **options)
