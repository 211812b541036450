import numpy as np
import pytest
import torch
from torch import nn

from simclr_fast import knn


def test_separated_classes_are_told_apart():
    centres = torch.eye(5, 16)
    labels = torch.arange(5).repeat(40)
    noisy = centres[labels] + 0.05 * torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert knn.accuracy(noisy[:150], labels[:150], noisy[150:] * 7, labels[150:]) == 1.0


def test_votes_are_weighted_by_similarity():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    query = torch.tensor([[1.0, 0.05]])
    assert knn.accuracy(bank, torch.tensor([0, 1, 1]), query, torch.tensor([0]), k=3) == 1.0


def test_chance_on_noise():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 32, generator=generator), torch.randint(10, (4000,), generator=generator)
    assert 0.06 < knn.accuracy(x[:3000], y[:3000], x[3000:], y[3000:]) < 0.14


def test_fewer_images_than_neighbours():
    bank = torch.eye(3)
    votes = knn.votes(bank, torch.arange(3), bank, classes=4, k=20)
    assert votes.argmax(1).tolist() == [0, 1, 2]
    assert votes[:, 3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("k", [1, 7, 200])
def test_votes_are_scikit_learns(k):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="needs the extra evaluate")
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(2000, 16, generator=generator), torch.randn(300, 16, generator=generator)
    labels = torch.randint(7, (2000,), generator=generator)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.1)
    )
    theirs.fit(bank.double().numpy(), labels.numpy())
    ours = knn.votes(bank, labels, queries, classes=7, k=k)
    expected = torch.from_numpy(theirs.predict_proba(queries.double().numpy()))
    torch.testing.assert_close((ours / ours.sum(1, keepdim=True)).double(), expected, atol=2e-6, rtol=0)


def test_a_small_temperature_overflows_nothing():
    bank, labels = torch.eye(4), torch.arange(4)
    votes = knn.votes(bank, labels, bank, classes=4, k=4, temperature=1e-4)
    assert votes.isfinite().all()
    assert votes.argmax(1).tolist() == [0, 1, 2, 3]


def test_calibration_averages_the_batches_and_leaves_the_encoder_alone():
    encoder = nn.Sequential(nn.BatchNorm2d(3))
    images = 5 + 2 * torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    calibrated = knn.calibrated(encoder, [(images[:16], None), (images[16:], None)])
    torch.testing.assert_close(calibrated[0].running_mean, images.mean((0, 2, 3)))
    assert torch.equal(encoder[0].running_mean, torch.zeros(3))


def test_features_in_eval_mode_then_back():
    encoder = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    rows = knn.features(encoder, [(torch.ones(2, 3, 4, 4), None), (torch.ones(1, 3, 4, 4), None)])
    assert rows.shape == (3, 48)
    assert encoder.training
    assert encoder[0].num_batches_tracked == 0
