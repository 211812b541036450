"""Pictures of features: PCA against scikit-learn's, t-SNE of clusters, neighbours, and what is left out."""

import base64
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from simclr_fast import evaluate
from simclr_fast.evaluation import pictures, probe
from tests.pages_common import check
from tests.train_common import images, jpeg, trained

__all__ = ["images", "trained"]  # fixtures are used by their names


def clusters(n=90, groups=3, d=16):
    torch.manual_seed(0)
    owners = torch.arange(n) % groups
    return F.one_hot(owners, d) * 5.0 + torch.randn(n, d) * 0.3, owners.numpy()


def test_pca_is_that_of_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition", reason="needs the extra evaluate")
    x = clusters()[0]
    points, share = pictures.pca(x, 0)
    peer = decomposition.PCA(2).fit(F.normalize(x).numpy())
    expected = peer.transform(F.normalize(x).numpy())
    expected /= np.abs(expected).max()
    found = np.array(points)
    np.testing.assert_allclose(found * np.sign(found[0] * expected[0]), expected, atol=2e-4)
    assert share == f"{peer.explained_variance_ratio_.sum():.0%} of the variance"


@pytest.mark.parametrize("x", [torch.ones(12, 4), torch.randn(12, 1), torch.zeros(12, 3), torch.randn(1, 5)])
def test_features_with_little_in_them(x):
    points, share = pictures.pca(x, 0)
    assert np.isfinite(points).all()
    assert np.shape(points) == (len(x), 2)
    assert "nan" not in share


def test_tsne_keeps_clusters_together_and_is_the_same_again():
    pytest.importorskip("sklearn", reason="needs the extra evaluate")
    x, owners = clusters()
    points, owners = np.array(pictures.tsne(x, 2**40)[0]), owners[:, None] == owners
    away = np.linalg.norm(points[:, None] - points, axis=-1) + np.eye(len(points)) * 1e9
    assert owners[np.arange(90), away.argmin(1)].mean() > 0.97
    assert np.array_equal(points, pictures.tsne(x, 2**40)[0])
    assert np.abs(points).max() == pytest.approx(1, abs=1e-3)


def test_tsne_of_few_or_equal_images():
    pytest.importorskip("sklearn", reason="needs the extra evaluate")
    for x in (torch.randn(4, 8), torch.ones(10, 8), torch.randn(10, 1)):
        points = pictures.tsne(x, 0)[0]
        assert np.shape(points) == (len(x), 2)
        assert np.isfinite(points).all()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "STEPS", 2)
    return tmp_path


def found(trained, out, *flags):
    command = ["probe", "--checkpoint", str(trained), "--gpus", "0", "--precision", "fp32", *flags]
    assert evaluate.main([*command, *(("--out", str(out)) if out else ())]) == 0
    folder = out or trained / "evaluations"
    return json.loads(next(folder.glob("*.json")).read_text())


def pixels(picture):
    head, data = picture["image"].split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_scatters_and_neighbours_of_a_run(trained, quick):
    pytest.importorskip("sklearn", reason="needs the extra evaluate")
    result = found(trained, None)
    titles = [one["title"].split(",")[0] for one in result["scatters"]]
    assert titles == ["t-SNE of h", "t-SNE of z", "PCA of h", "PCA of z"]
    for one in result["scatters"]:
        assert one["labels"] == [0] * 5 + [1] * 5
        assert np.shape(one["points"]) == (10, 2)
    assert [one["title"] for one in result["pictures"]] == [f"Nearest training images by {one}" for one in "hz"]
    for sheet in result["pictures"]:
        assert len(sheet["rows"]) == 6
        for first, *near in sheet["rows"]:
            assert len(near) == 6
            assert all(one["right"] == (one["text"].split("\n")[0] == first["text"]) for one in near)
            similar = [float(one["text"].split("\n")[1]) for one in near]
            assert similar == sorted(similar, reverse=True)
            assert pixels(first).shape == (16, 16, 3)
    text = (trained / "report.html").read_text()
    check(text)
    assert text.count("PCA of z") == 2  # its caption and its name
    assert "Nearest training images by z" in text


def test_without_labels_nothing_is_right_or_wrong(trained, quick):
    (quick / "flat").mkdir()
    for number in range(50):
        (quick / "flat" / f"{number}.jpg").write_bytes(jpeg(number))
    result = found(trained, quick / "out", "--data", str(quick / "flat"))
    assert set(result["scatters"][0]["labels"]) == {-1}
    first, *near = result["pictures"][0]["rows"][0]
    assert first["text"] == "test image"
    assert {one["right"] for one in near} == {None}


def test_without_scikit_learn_the_rest_still_runs(trained, quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    result = found(trained, quick / "out")
    assert [one["title"].split(",")[0] for one in result["scatters"]] == ["PCA of h", "PCA of z"]
    assert result["tables"]
    expected = "No t-SNE: scikit-learn is not installed; install it with: pip install 'simclr_fast[evaluate]'"
    assert capsys.readouterr().out.count(expected) == 1


def test_large_images_become_small_ones(trained, quick, monkeypatch):
    monkeypatch.setattr(pictures, "THUMBNAIL", 8)
    (first, *_), *_ = found(trained, quick / "out")["pictures"][0]["rows"]
    assert pixels(first).shape == (8, 8, 3)
