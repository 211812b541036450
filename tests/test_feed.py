"""What happens to images that were good when they were checked, in every engine; and the bound on decoded images."""

import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast.data import DataError, Policy, Settings, Split, engine_name, open_dataset, train_views
from simclr_fast.data.engines.feed import Feed, chunks, replaced

HAS_DALI = engine_name("auto")[0] == "dali"
ENGINES = [
    pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="needs NVIDIA DALI")),
    "torchvision",
    "resident",
]
N = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for k in range(N):
        Image.fromarray(rng.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)).save(tmp_path / f"{k:02d}.jpg")
    return tmp_path


def views(split: Split, engine: str, **options) -> tuple[np.ndarray, np.ndarray]:
    made = train_views(
        split, Policy(16), batch=10, seed=0, start_step=0, steps=8, engine=engine, **({"workers": 0} | options)
    )
    _, second, indices = zip(*made, strict=True)
    return torch.stack(second).numpy(), np.stack(indices)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("harm", ["vanish", "shrink", "garbage"])
def test_an_image_that_goes_bad_is_replaced_and_said_and_no_other_view_changes(
    folder: Path, engine: str, harm: str, caplog: pytest.LogCaptureFixture
):
    split = open_dataset(str(folder)).train
    before, indices = views(split, "torchvision")
    bad = folder / "07.jpg"
    if harm == "vanish":
        bad.unlink()
    elif harm == "shrink":
        bad.write_bytes(bad.read_bytes()[:200])
    else:
        bad.write_bytes(bytes(len(bad.read_bytes())))
    with caplog.at_level(logging.WARNING, "simclr_fast.data"):
        after, made = views(split, engine)
    said = [record.getMessage() for record in caplog.records]
    assert sum("07.jpg cannot be read any more" in line and "08.jpg takes its place" in line for line in said) == 1
    others = indices != 7
    np.testing.assert_array_equal(made, np.where(others, indices, 8))
    np.testing.assert_allclose(after[others], before[others], atol=0.02)
    assert np.isfinite(after).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_over_5_percent_is_an_error_that_names_one(folder: Path, engine: str):
    split = open_dataset(str(folder)).train
    for k in range(3):
        (folder / f"{10 * k:02d}.jpg").unlink()
    said = r"^data must stay .* 3 of 40 images became unreadable, the last one \d0.jpg"
    for workers in (0, 1):
        with pytest.raises(DataError, match=said):
            views(split, engine, workers=workers)


def test_replacements_of_replacements():
    assert replaced(np.array([1, 2, 3, 4]), {2: 3, 3: 4}).tolist() == [1, 4, 4, 4]


def test_the_next_good_image_takes_the_place(folder: Path):
    split = open_dataset(str(folder)).train
    feed = Feed(split, lambda step, places: (replaced(np.array([39, 0]), places), ()), Settings().meter)
    feed.reject(0, "gone")
    feed.reject(39, "gone")
    feed.reject(39, "gone again")
    assert feed.load(0).indices.tolist() == [1, 1]


def test_chunks_cover_the_rows_within_the_bound(folder: Path):
    split = open_dataset(str(folder)).train
    indices = np.array([0, 39, 5, 5, 30, 2])
    sizes = split.sizes[indices].prod(1) * 3
    for limit in (1, 6000, 10_000, 10**9):
        parts = chunks(split, indices, limit)
        assert np.concatenate([np.arange(len(indices))[part] for part in parts]).tolist() == list(range(6))
        assert all(sizes[part].sum() <= limit or part.stop - part.start == 1 for part in parts)
    assert len(chunks(split, indices, 10**9)) == 1


@pytest.mark.skipif(not HAS_DALI, reason="needs NVIDIA DALI")
def test_decoding_waits_for_rendering(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from simclr_fast.data.engines import render_ahead

    made, add, behind = render_ahead.Rendering._make, render_ahead.Rendering.add, []
    jobs: list = []

    def slow(self, rows, images):
        time.sleep(0.02)
        made(self, rows, images)

    def counted(self, rows, images):
        jobs.extend(add(self, rows, images))
        behind.append(sum(not job.done() for job in jobs))
        return jobs[-1:]

    monkeypatch.setattr(render_ahead.Rendering, "_make", slow)
    monkeypatch.setattr(render_ahead.Rendering, "add", counted)
    split = open_dataset(str(folder)).train
    views(split, "dali", settings=Settings(1, memory_mib=0))
    assert len(behind) == 80  # chunks of one image
    assert max(behind) <= 2


@pytest.mark.skipif(not HAS_DALI, reason="needs NVIDIA DALI")
def test_the_bound_on_memory_changes_no_view(shared: Path):
    split = open_dataset(str(shared / "data" / "photos-256.tar")).train
    policy, options = Policy(24), {"batch": 16, "seed": 0, "start_step": 0, "steps": 2, "engine": "dali"}
    whole, small = (
        list(train_views(split, policy, settings=Settings(2, memory_mib=mib), **options)) for mib in (1024, 4)
    )
    for one, other in zip(whole, small, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
