"""The stream of images and the laws of the augmentation parameters."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from simclr_fast.data.policy import Policy, permutation, stream

N = 20_000
STREAM = [6, 7, 8, 0, 5, 1, 2, 6]
DRAW = [6.0, 17.0, 18.0, 14.0, 1.0, 1.0, 1.0, 0.416734, 1.412859, 1.3771148, 0.15702757, 3.0, 1.0, 2.0, 0.0, 1.5109131]


def draws(policy: Policy, seed: int = 0, view: int = 0, epoch: int = 0, size: tuple[int, int] = (375, 500)):
    return policy.draw(seed, np.full(N, epoch), np.arange(N), view, np.tile(size, (N, 1)))


def test_every_image_comes_once_in_each_pass_though_batches_straddle_it():
    n, batch = 103, 16
    indices, epochs = (
        np.concatenate(words) for words in zip(*(stream(n, batch, 5, s) for s in range(20)), strict=True)
    )
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(n))


def test_each_epoch_has_its_own_order():
    n = 5000
    orders = [np.argsort(permutation(n, 0, epoch)) for epoch in range(4)] + [np.argsort(permutation(n, 1, 0))]
    correlations = np.corrcoef([np.arange(n), *orders])[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(n)


def test_draws_are_functions_of_seed_epoch_image_and_view():
    policy, some = Policy(224), np.arange(7, 90, 3)
    sizes = np.tile((375, 500), (N, 1))
    whole = policy.draw(3, np.full(N, 2), np.arange(N), 1, sizes).packed()
    np.testing.assert_array_equal(policy.draw(3, np.full(len(some), 2), some, 1, sizes[some]).packed(), whole[some])
    for other in (draws(policy, 4, 1, 2), draws(policy, 3, 0, 2), draws(policy, 3, 1, 3)):
        assert (other.packed() == whole).all(axis=1).mean() < 0.001


def test_draws_stay_the_same_from_version_to_version():
    params = Policy(32).draw(0, np.array([1]), np.array([2]), 0, np.array([[32, 32]]))
    np.testing.assert_array_equal(stream(10, 8, 0, 3)[0], STREAM)
    np.testing.assert_allclose(params.packed()[0], DRAW, rtol=1e-6)


def test_marginals_follow_their_laws():
    p = draws(Policy(224))
    for got, probability in ((p.flip, 0.5), (p.jitter, 0.8), (p.gray, 0.2), (p.sigma > 0, 0.5)):
        assert abs(got.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / N)
    bounds = [(p.factors[:, k], 0.2, 1.8) for k in range(3)] + [
        (p.factors[:, 3], -0.2, 0.2),
        (p.sigma[p.sigma > 0], 0.1, 2),
    ]
    for got, low, high in bounds:
        assert stats.kstest(got, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    counts = np.unique(p.order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_views_and_parameters_are_independent():
    columns = np.column_stack([draws(Policy(224), view=view).packed() for view in (0, 1)])
    correlations = np.corrcoef(columns.T)
    same_view = np.kron(np.eye(2), np.ones((16, 16))).astype(bool)
    assert np.abs(correlations[~same_view]).max() < 5 / np.sqrt(N)
    colour = np.ix_(
        range(4, 11), range(4, 11)
    )  # flags and factors; the window and the order are bound among themselves
    assert np.abs(correlations[colour] - np.eye(7)).max() < 5 / np.sqrt(N)


@pytest.mark.parametrize(("dialect", "law"), [("tf", "tf"), ("torchvision", "torchvision_style")])
@pytest.mark.parametrize("size", ["375x500", "256x256", "500x333", "96x96"])
def test_crops_follow_the_law_of_the_dialect(vectors: Path, dialect: str, law: str, size: str):
    expected = json.loads((vectors / "crop_distribution.json").read_text())[size][law]
    height, width = map(int, size.split("x"))
    y, x, h, w = draws(Policy(224, dialect=dialect), size=(height, width)).window.T
    assert y.min() >= 0
    assert (y + h).max() <= height
    assert (x + w).max() <= width
    for got, quantiles in ((h * w / (height * width), "area_q"), (w / h, "aspect_q")):
        for level, value in expected[quantiles].items():
            below, upto = (got < value - 1e-9).mean(), (got <= value + 1e-9).mean()  # sizes are whole pixels: ties
            assert below - 0.016 < float(level) < upto + 0.016
    assert abs(((y + h == height) & (h < height)).mean() - expected["touches_bottom"]) < 0.006
    if dialect == "tf":
        assert (h * w).min() >= 0.1 * height * width


def test_tf_and_torchvision_laws_can_be_told_apart():
    areas = [np.prod(draws(Policy(224, dialect=d)).window[:, 2:], axis=1) for d in ("tf", "torchvision")]
    assert stats.ks_2samp(*areas).statistic > 0.05


@pytest.mark.parametrize("dialect", ["tf", "torchvision"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (1, 7)])
def test_any_image_has_a_crop(dialect: str, size: tuple[int, int]):
    y, x, h, w = (
        Policy(32, dialect=dialect).draw(0, np.zeros(50, int), np.arange(50), 0, np.tile(size, (50, 1))).window.T
    )
    assert min(h.min(), w.min()) >= 1
    assert min(y.min(), x.min()) >= 0
    assert (y + h).max() <= size[0]
    assert (x + w).max() <= size[1]


def test_central_crop_is_the_originals(vectors: Path):
    for case in json.loads((vectors / "augment_cases.json").read_text())["center_crop"]:
        window = Policy(case["out"]).center(np.array([[case["H"], case["W"]]])).window[0]
        assert window.tolist() == case["offset_y_x_h_w"]
    assert Policy(32).center(np.array([[32, 40]])).window[0].tolist() == [0, 4, 32, 32]


def test_central_crop_can_keep_the_whole_shorter_side():
    assert Policy(64, test_crop=1).center(np.array([[100, 140]])).window[0].tolist() == [0, 20, 100, 100]


def test_stages_that_are_off_never_happen():
    p = draws(Policy(32, jitter_strength=0, blur_p=0, gray_p=0, flip=0))
    assert not np.column_stack([p.jitter, p.gray, p.flip, p.sigma]).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"dialect": "pil"},
        {"min_area": 0},
        {"min_area": 1.1},
        {"blur_p": 2},
        {"test_crop": 0},
        {"jitter_strength": 1.5},
    ],
)
def test_impossible_policies_are_refused(wrong: dict):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name} must be .* got {name}="):
        Policy(**({"size": 32} | wrong))
