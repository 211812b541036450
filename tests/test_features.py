"""Features: those of the encoder in eval mode, the same however they are computed, and kept whole or not at all."""

import dataclasses
import os
import threading

import numpy as np
import pytest
import torch

from simclr_fast import features as module
from simclr_fast.config import ConfigError
from simclr_fast.data import DataError, Policy, Settings, eval_images, open_dataset, train_crops
from simclr_fast.distributed import Ranks
from simclr_fast.features import Extractor, embeddings
from simclr_fast.pretrained import Encoder, Recipe
from tests.train_common import images

__all__ = ["images"]  # a fixture is used by its name

RECIPE = Recipe(arch="resnet8", width=0.125, image_size=16, head="nonlinear", head_features=4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "simclr_fast" / "features"


@pytest.fixture
def split(images, cache):
    return dataclasses.replace(open_dataset(str(images)).train)  # whose pixels no test has loaded


def encoder(seed=0):
    torch.manual_seed(seed)
    found = Encoder(RECIPE, "test")
    found(torch.randn(8, 3, 16, 16))  # moves its statistics away from 0 and 1
    return found.eval().requires_grad_(False)


def extractor(one=None, **options):
    said = []
    options = {"precision": "fp32", "batch": 7} | options
    found = Extractor(one or encoder(), Ranks(use_gpu=False), say=said.append, **options)
    return found, said


def test_rows_are_the_encoders_in_order(split):
    one = encoder()
    found = extractor(one)[0].features(split)
    policy = Policy(16)
    expected = torch.cat([one(batch) for batch, _ in eval_images(split, policy, batch=40)])
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert found.std(0).max() > 0
    some = np.array([5, 3, 3, 39])
    torch.testing.assert_close(extractor(one)[0].features(split, some), expected[some])


def test_the_second_time_nothing_is_encoded(split, monkeypatch):
    first, said = extractor()
    rows = first.features(split, name="training images")
    assert "40 training images" in said[-1]
    assert "waiting for data" in said[-1]
    again, said = extractor()
    monkeypatch.setattr(again, "_encode", None)
    assert torch.equal(again.features(split), rows)
    assert "in the cache" in said[-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda options, split: options | {"one": encoder(1)},
        lambda options, split: options | {"precision": "bf16"},
        lambda options, split: options | {"policy": Policy(16, dialect="tf")},
        lambda options, split: options | {"indices": np.arange(39)},
        lambda options, split: options | {"split": dataclasses.replace(split, stamps=split.stamps + 1)},
        lambda options, split: options | {"split": dataclasses.replace(split, lengths=split.lengths + 1)},
        lambda options, split: options | {"transform": type("T", (), {"key": "t", "__call__": lambda s, x, i: -x})()},
    ],
    ids=["weights", "precision", "policy", "images", "changed files", "lengths", "transform"],
)
def test_whatever_the_numbers_depend_on_counts(split, cache, change):
    def digest(options):
        options = {"one": None, "precision": "fp32", "split": split, "indices": np.arange(40)} | options
        transform, policy = options.get("transform"), options.get("policy", Policy(16))
        found = extractor(options["one"], precision=options["precision"])[0]
        return found._path(options["split"], options["indices"], getattr(transform, "key", ""), policy)

    same = {digest({}), digest({}), digest({"split": dataclasses.replace(split, labels=None)})}
    assert len(same) == 1
    assert digest(change({}, split)) not in same


def test_a_damaged_file_is_made_again(split, cache):
    rows = extractor()[0].features(split)
    (path,) = cache.iterdir()
    for content in (path.read_bytes()[:-9], b"", np.lib.format.magic(1, 0), b"junk" * 50):
        path.write_bytes(content)
        assert torch.equal(extractor()[0].features(split), rows)
    np.save(path, rows.numpy()[:, :3])
    assert torch.equal(extractor()[0].features(split), rows)
    assert torch.equal(torch.from_numpy(np.load(path)), rows)


def test_a_cache_that_cannot_be_written_is_said(split, cache, monkeypatch):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    found, said = extractor()
    assert len(found.features(split)) == 40
    assert "features are not kept" in said[-1]


def test_two_at_once_leave_one_whole_file(split, cache):
    rows = [extractor()[0] for _ in range(4)]
    results = []
    threads = [threading.Thread(target=lambda one=one: results.append(one.features(split))) for one in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(found, results[0]) for found in results)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]
    assert torch.equal(torch.from_numpy(np.load(next(cache.iterdir()))), results[0])


def test_the_oldest_files_go_when_the_cache_is_full(split, cache, monkeypatch):
    cache.mkdir(parents=True)
    for age in range(3):
        (cache / f"{age}.npy").write_bytes(bytes(1000))
        os.utime(cache / f"{age}.npy", (10_000 - age, 10_000 - age))
    (cache / ".half.npy.1").touch()
    os.utime(cache / ".half.npy.1", (0, 0))
    (cache / ".new.npy.2").touch()
    (cache / "kept.npy").write_bytes(bytes(1000))
    monkeypatch.setattr(module, "CACHE_GIB", 2500 / 2**30)
    module._prune(cache, keep=cache / "kept.npy")
    assert {path.name for path in cache.iterdir()} == {"kept.npy", "0.npy", ".new.npy.2"}


def test_an_image_that_becomes_unreadable_is_not_given_anothers_features(split, cache, tmp_path):
    """Nor is anything kept that would be used when it is back."""
    broken = dataclasses.replace(split, paths=[*split.paths[:7], str(tmp_path / "gone.jpg"), *split.paths[8:]])
    with pytest.raises(DataError, match=f"{split.names[7]} did not"):
        extractor()[0].features(broken)
    assert not cache.exists()
    with pytest.raises(DataError, match=f"{split.names[7]} did not"):
        for _ in train_crops(broken, Policy(16), np.arange(40), batch=8, seed=0, steps=5, settings=Settings(0)):
            pass


def test_features_that_are_not_finite_are_refused(split, cache):
    one = encoder()
    one.network.conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ConfigError, match="NaN or infinity for 40 of 40 images: test may have diverged"):
        extractor(one)[0].features(split)
    assert not cache.exists()


def test_without_images_and_without_cache(split, cache):
    found = extractor(cache=False)[0]
    assert found.features(split, np.empty(0, np.int64)).shape == (0, found.encoder.num_features)
    assert found.features(split, np.arange(3)).shape == (3, found.encoder.num_features)
    assert not cache.exists()


def test_statistics_do_not_move(split, cache):
    one = encoder()
    before = one.digest()
    extractor(one)[0].features(split)
    assert one.digest() == before
    assert not one.training


def test_embeddings_are_the_heads():
    one, h = encoder(), torch.randn(9, RECIPE.network().num_features)
    torch.testing.assert_close(embeddings(one, h), one.head(h))
