"""evaluate probe: what is done to images, the classifiers, and the whole on a small run."""

import json

import numpy as np
import pytest
import torch

from simclr_fast import evaluate
from simclr_fast.config import ConfigError
from simclr_fast.data import Policy, eval_images, open_dataset
from simclr_fast.distributed import Ranks
from simclr_fast.evaluation import probe
from simclr_fast.evaluation.changes import PROPERTIES, Change
from simclr_fast.evaluation.job import Job
from simclr_fast.pretrained import Recipe
from tests.train_common import images, jpeg, trained

__all__ = ["images", "trained"]  # fixtures are used by their names
COLOUR, ROTATION, NOISE, SOBEL = PROPERTIES
POLICY = Policy(8)
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (POLICY.mean, POLICY.std))


def prepared(n, seed=0):
    """(values in [0, 1], what the policy makes of them), [n, 3, 8, 8]."""
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, (x - MEAN) / STD


def changed(of, labels, x, indices=None, **options):
    change = Change(of, np.asarray(labels), POLICY, **({"seed": 0, "noise": 0.1} | options))
    found = change(x, np.arange(len(x)) if indices is None else indices)
    return found * STD + MEAN


def test_labels_have_their_shares_and_hang_on_the_image_alone():
    for of in PROPERTIES:
        labels = of.labels(20_000, 3, "training images")
        np.testing.assert_allclose(np.bincount(labels) / 20_000, of.shares, atol=0.012)
        np.testing.assert_array_equal(labels, of.labels(20_000, 3, "training images"))
        assert (labels != of.labels(20_000, 4, "training images")).mean() > 0.2
        assert (labels != of.labels(20_000, 3, "test images")).mean() > 0.2


@pytest.mark.parametrize("of", PROPERTIES, ids=lambda of: of.name)
def test_label_0_leaves_an_image_as_it_is(of):
    x, ready = prepared(3)
    torch.testing.assert_close(changed(of, [0, 1, 0], ready)[[0, 2]], x[[0, 2]], atol=1e-6, rtol=0)
    assert (changed(of, [0, 1, 0], ready)[1] - x[1]).abs().max() > 0.1


def test_gray_has_the_brightness_three_times():
    x, ready = prepared(2)
    expected = (x * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand_as(x)
    torch.testing.assert_close(changed(COLOUR, [1, 1], ready), expected, atol=2e-4, rtol=0)


def test_rotation_is_that_of_numpy():
    x, ready = prepared(4)
    found = changed(ROTATION, [3, 1, 0, 2], ready)
    for image, original, turns in zip(found, x, [3, 1, 0, 2], strict=True):
        torch.testing.assert_close(image, torch.from_numpy(np.rot90(original.numpy(), turns, (1, 2)).copy()))


def test_noise_is_of_its_image_whatever_the_batch():
    _, ready = prepared(1)
    many = (0.5 - MEAN) / STD + torch.zeros(60, 3, 8, 8)
    found = changed(NOISE, np.ones(60, int), many) - 0.5
    assert found.std().item() == pytest.approx(0.1, rel=0.03)
    assert abs(found.mean().item()) < 0.004
    assert len({round(value, 5) for value in found[:, 0, 0, 0].tolist()}) > 50
    order = np.array([17, 3])
    torch.testing.assert_close(changed(NOISE, np.ones(60, int), many[:2], order), found[order] + 0.5)
    assert (changed(NOISE, np.ones(60, int), many, seed=1) - 0.5 - found).abs().max() > 0.1


def test_edges_are_those_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs the extra dev")
    x, ready = prepared(2)
    found = changed(SOBEL, [1, 1], ready)
    weights = np.array([0.2989, 0.587, 0.114]).reshape(3, 1, 1)
    for image, original in zip(found, x.numpy(), strict=True):
        brightness = (original * weights).sum(0)
        expected = np.hypot(*(ndimage.sobel(brightness, axis, mode="nearest") / 4 for axis in (0, 1)))
        np.testing.assert_allclose(image.numpy(), np.broadcast_to(expected.clip(0, 1), image.shape), atol=5e-4)
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1
    assert changed(SOBEL, [1], (step - MEAN) / STD)[0, 0, 3].tolist() == pytest.approx(
        [0, 0, 0, 1, 1, 0, 0, 0], abs=1e-3
    )


def test_the_key_says_all_that_a_change_does():
    labels = np.array([0, 1])
    first = Change(NOISE, labels, POLICY, 0, 0.1)
    others = [Change(SOBEL, labels, POLICY, 0, 0.1), Change(NOISE, labels[::-1], POLICY, 0, 0.1),
              Change(NOISE, labels, POLICY, 1, 0.1), Change(NOISE, labels, POLICY, 0, 0.2)]  # fmt: skip
    assert first.key == Change(NOISE, labels.copy(), POLICY, 0, 0.1).key
    assert len({one.key for one in [first, *others]}) == 5


def accuracy(learn, x, y, classes=2, seed=0):
    half = len(x) // 2
    train, test = probe.standardised(x[:half], x[half:])
    scores = learn(train, y[:half], test, classes=classes, seed=seed)
    return (scores.argmax(1) == y[half:]).double().mean().item()


def test_classifiers_of_known_answers(monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 120)
    torch.manual_seed(0)
    x = torch.randn(1600, 8) * 5 + 3
    separable = (x[:, 0] > x[:, 1]).long() + 2 * (x[:, 2] > 3).long()
    exclusive = ((x[:, 0] > 3) ^ (x[:, 1] > 3)).long()
    chance = torch.randint(2, (1600,))
    assert accuracy(probe.linear, x, separable, 4) > 0.9
    assert accuracy(probe.linear, x, exclusive) < 0.6
    assert accuracy(probe.mlp, x, exclusive) > 0.9
    assert 0.4 < accuracy(probe.mlp, x, chance) < 0.6
    monkeypatch.setattr(probe, "STEPS", 3)
    first, again, other = (probe.mlp(x, exclusive, x, classes=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_features_that_are_constant_do_no_harm():
    x = torch.randn(100, 3)
    x[:, 1] = 7.0
    train, test = probe.standardised(x[:50], x[50:])
    assert (train[:, 1] == 0).all()
    assert torch.isfinite(test).all()
    torch.testing.assert_close(train[:, [0, 2]].std(0), torch.ones(2))
    assert torch.isfinite(torch.cat(probe.standardised(torch.ones(9, 2), torch.ones(4, 2)))).all()


def test_parts_without_test_images_are_cut_from_one(images):
    data = open_dataset(str(images / "train"))
    assert data.test is None
    settings = probe.Settings(checkpoint="x", images=30, test_images=10)
    train, test = probe.parts(data, settings)
    assert (len(train.indices), len(test.indices)) == (30, 8)
    assert not set(train.indices.tolist()) & set(test.indices.tolist())
    both = open_dataset(str(images))
    train, test = probe.parts(both, settings)
    assert train.split is both.train
    assert test.split is both.test
    assert (len(train.indices), len(test.indices)) == (30, 10)
    assert (np.diff(train.indices) > 0).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": 3}, "images must be at least 10, got images=3"),
        ({"test_images": 0}, "test_images must be at least 10, got test_images=0"),
        ({"noise": 0.0}, r"noise must be positive, got noise=0\.0"),
    ],
)
def test_bad_settings(given, said):
    with pytest.raises(ConfigError, match=said):
        probe.Settings(checkpoint="x", **given)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "STEPS", 5)
    return tmp_path


def command(source, out, *flags):
    return evaluate.main(["probe", "--checkpoint", str(source), "--gpus", "0", "--precision", "fp32", "--out", str(out),
                          *flags])  # fmt: skip


def test_images_that_stay_as_they_are_keep_their_features(trained, quick):
    settings = probe.Settings(checkpoint=str(trained), gpus=0, precision="fp32", cache=False)
    job = Job(settings, Ranks(use_gpu=False), lambda text: None)
    (part, _), data = probe.parts(job.dataset, settings), job.dataset
    plain = probe._features(job, part)
    for of in PROPERTIES:
        found, labels = probe._changed(job, settings, of, part, plain)
        assert set(labels.tolist()) == set(range(len(of.shares)))
        assert torch.equal(found[labels == 0], plain[labels == 0])
        change = Change(of, of.labels(len(part.split), 0, part.name), job.encoder.policy, 0, 0.1)
        batches = eval_images(data.train, job.encoder.policy, batch=7, indices=part.indices)
        expected = torch.cat([job.encoder(change(batch, rows)) for batch, rows in batches])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found[labels > 0], plain[labels > 0])


@pytest.mark.parametrize("classifier", ["mlp", "linear"])
def test_the_whole_on_images_without_labels(trained, quick, capsys, classifier):
    (quick / "flat").mkdir()
    for number in range(60):
        (quick / "flat" / f"{number}.jpg").write_bytes(jpeg(number))
    flags = ("--data", str(quick / "flat"), "--classifier", classifier, "--no-pictures")
    assert command(trained, quick / "out", *flags) == 0
    (path,) = (quick / "out").glob("*.json")
    found = json.loads(path.read_text())
    (table,) = found["tables"]
    assert [row[0] for row in table["rows"]] == [of.name for of in PROPERTIES]
    assert [row[4:] for row in table["rows"]] == [[0.993, 0.974], [0.676, 0.256], [0.995, 0.596], [0.966, 0.563]]
    assert all(0 <= value <= 1 for row in table["rows"] for value in row[1:])
    assert found["figures"]["mean of h"] == pytest.approx(np.mean([row[2] for row in table["rows"]]))
    assert found["counts"] == {"training images": 48, "test images": 12}
    assert found["scatters"] == found["pictures"] == []
    said = capsys.readouterr().out
    assert "paper's g(h)" in said
    assert ("MLP" in said) == (classifier == "mlp")


def test_without_a_head_there_is_nothing_to_compare(images, quick, capsys):
    weights = quick / "weights.pt"
    torch.save(Recipe(arch="resnet8", width=0.125, image_size=16).network().state_dict(), weights)
    flags = ("--arch", "resnet8", "--width", "0.125", "--image-size", "16", "--data", str(images))
    assert command(weights, quick / "out", *flags) == 2
    said = capsys.readouterr().err
    assert "must have a projection head" in said
    assert str(weights) in said
    assert not (quick / "out").exists()


def test_too_few_images(trained, quick, capsys):
    (quick / "few").mkdir()
    for number in range(9):
        (quick / "few" / f"{number}.jpg").write_bytes(jpeg(number))
    assert command(trained, quick / "out", "--data", str(quick / "few")) == 2
    assert "data must have at least 10 images in each part, got 9" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_find_what_one_finds(trained, tmp_path):
    for ranks in ("1", "2"):
        assert command(trained, tmp_path / ranks, "--ranks", ranks, "--no-cache") == 0
    one, two = (json.loads(next((tmp_path / ranks).glob("*.json")).read_text()) for ranks in ("1", "2"))
    assert one["counts"] == two["counts"]
    first, second = (np.array([row[1:] for row in result["tables"][0]["rows"]]) for result in (one, two))
    np.testing.assert_allclose(first, second, atol=0.101)  # an image of ten, by the rounding of other batches
    texts = [[[one["text"] for one in row] for sheet in result["pictures"] for row in sheet["rows"]]
             for result in (one, two)]  # fmt: skip
    assert texts[0] == texts[1]
