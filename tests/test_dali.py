"""The DALI engine: the same stream however it is cut, and the views of the torchvision engine."""

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast.data import (
    DataError,
    Dataset,
    Policy,
    Settings,
    _train_batch,
    engine_name,
    eval_images,
    open_dataset,
    train_views,
)

if engine_name("auto")[0] != "dali":
    pytest.skip(engine_name("auto")[1], allow_module_level=True)

from nvidia.dali import Pipeline

from simclr_fast.data.engines import dali

KINDS = {
    "rgb.jpg": ("RGB", "JPEG", {}),
    "progressive.jpg": ("RGB", "JPEG", {"progressive": True}),
    "full.jpg": ("RGB", "JPEG", {"subsampling": 0}),
    "gray.jpg": ("L", "JPEG", {}),
    "cmyk.jpg": ("CMYK", "JPEG", {}),
    "rgb.png": ("RGB", "PNG", {}),
    "palette.png": ("P", "PNG", {}),
    "alpha.png": ("RGBA", "PNG", {}),
    "deep.png": ("I;16", "PNG", {}),
    "web.webp": ("RGB", "WEBP", {"lossless": True}),
    "plain.bmp": ("RGB", "BMP", {}),
    "plain.ppm": ("RGB", "PPM", {}),
}


@pytest.fixture(scope="module")
def photos(shared: Path) -> Dataset:
    return open_dataset(str(shared / "data" / "photos-256.tar"))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """One picture in every format that is taken, and one turned by EXIF."""
    root = tmp_path_factory.mktemp("kinds")
    y, x = np.mgrid[:50, :70]
    picture = np.stack([3 * x, 255 - 2 * y, 2 * (x + y)], axis=-1).clip(0, 255).astype(np.uint8)
    for name, (mode, kind, options) in KINDS.items():
        image = Image.fromarray(picture).convert(mode if mode != "I;16" else "L")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        image.save(root / name, kind, **options)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(root / "turned.jpg", exif=exif)
    return open_dataset(str(root))


def views(
    data: Dataset, size: int = 32, batch: int = 16, start: int = 0, steps: int = 3, dialect="torchvision", **options
):
    policy = Policy(size, dialect=dialect)
    made = train_views(
        data.train, policy, batch=batch, seed=3, start_step=start, steps=steps, **({"engine": "dali"} | options)
    )
    first, second, indices = zip(*made, strict=True)
    return torch.stack(first), torch.stack(second), np.stack(indices)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_shape_strides_and_type(photos: Dataset):
    view = next(train_views(photos.train, Policy(24), batch=8, seed=0, start_step=0, steps=1, engine="dali"))[0]
    assert (view.shape, view.dtype) == ((8, 3, 24, 24), torch.float32)
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_ranks_get_the_rows_of_the_global_batch(photos: Dataset):
    whole = views(photos)
    ranks = [views(photos, rank=rank, world=2) for rank in (0, 1)]
    assert same(whole, [np.concatenate(parts, axis=1) for parts in zip(*ranks, strict=True)])


def test_any_number_of_workers_and_any_start_give_the_same_bytes(photos: Dataset):
    whole = views(photos, steps=5)
    assert same(whole, views(photos, steps=5, workers=1))
    assert same([part[3:] for part in whole], views(photos, start=3, steps=2, workers=3))


@pytest.mark.parametrize("dialect", ["torchvision", "tf"])
@pytest.mark.parametrize("size", [32, 224])
def test_engines_agree(photos: Dataset, dialect: str, size: int):
    a = views(photos, size, steps=1, batch=24, dialect=dialect)
    b = views(photos, size, steps=1, batch=24, dialect=dialect, engine="torchvision", workers=0)
    assert np.array_equal(a[2], b[2])
    std = torch.tensor(Policy(size, dialect=dialect).std).view(3, 1, 1)
    for one, other in zip(a[:2], b[:2], strict=True):
        levels = 255 * std * (one - other).abs()
        assert levels.mean() < 0.02
        assert levels.max() < 1


def test_engines_decode_every_format_alike(kinds: Dataset):
    assert len(kinds.train) == len(KINDS) + 1
    made = {}
    for engine in ("dali", "torchvision"):
        ((images, indices),) = eval_images(kinds.train, Policy(48, dialect="tf"), batch=99, workers=0, engine=engine)
        assert indices.tolist() == list(range(len(kinds.train)))
        made[engine] = 255 * images
    levels = (made["dali"] - made["torchvision"]).abs().amax((1, 2, 3))
    assert dict(zip(kinds.train.names, (levels > 1).tolist(), strict=True)) == dict.fromkeys(kinds.train.names, False)
    rgb, turned = (made["dali"][kinds.train.names.index(name)] for name in ("rgb.jpg", "turned.jpg"))
    assert (rgb - turned).abs().max() < 1


def test_chosen_images_come_in_order_and_the_last_batch_is_short(photos: Dataset):
    chosen = np.array([5, 3, 200, 4, 4])
    batches = list(eval_images(photos.train, Policy(32), batch=2, engine="dali", indices=chosen))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    assert np.concatenate([indices for _, indices in batches]).tolist() == chosen.tolist()
    assert not list(eval_images(photos.train, Policy(32), batch=2, engine="dali", indices=np.array([], int)))


@pytest.mark.parametrize("dialect", ["torchvision", "tf"])
def test_graph_that_crops_as_on_a_gpu(photos: Dataset, dialect: str):
    """On a GPU, DALI crops and resizes to uint8 and `augment` does the rest: the same graph, run on the CPU."""
    policy = Policy(64, dialect=dialect, blur_p=0, jitter_strength=0, gray_p=0)
    plan, float32 = partial(_train_batch, photos.train, policy, 24, 0, 1, 0, 1), torch.float32
    here = photos.train, policy, range(2), plan, torch.device("cpu"), float32, Settings(2, memory_mib=8)
    cropped, rendered = (list(dali.run(*here, crops=crops)) for crops in (True, False))
    std = torch.tensor(policy.std).view(3, 1, 1)
    for (views, indices), (others, same) in zip(cropped, rendered, strict=True):
        assert np.array_equal(indices, same)
        for view, other in zip(views, others, strict=True):
            assert view.is_contiguous(memory_format=torch.channels_last)
            levels = 255 * std * (view - other).abs()
            # Rounded to whole levels. Beyond the edge of a crop DALI repeats pixels, where the others have no taps.
            assert levels[..., 2:-2, 2:-2].max() < 1
            assert levels.mean() < 0.4
            assert levels.max() < 20


def test_what_dali_cannot_decode_is_an_error_that_helps(photos: Dataset, monkeypatch: pytest.MonkeyPatch):
    def fail(self):
        raise RuntimeError("nvImageCodec failed\nmore")

    monkeypatch.setattr(Pipeline, "run", fail)
    with pytest.raises(DataError, match=r"cannot in step 0: --loader torchvision does without it \(nvImageCodec"):
        views(photos, steps=1)


def test_stopping_early_leaves_no_thread(photos: Dataset):

    before = threading.active_count()
    made = train_views(photos.train, Policy(32), batch=8, seed=0, start_step=0, steps=1000, engine="dali")
    next(made)
    made.close()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.parametrize("dialect", ["torchvision", "tf"])
def test_views_of_a_gpu_are_those_of_the_cpu(photos: Dataset, dialect: str):
    """Decoded by other hardware and rounded to whole levels between resize and jitter, which jitter then stretches."""
    on_gpu = views(photos, 224, steps=2, dialect=dialect, device="cuda")
    on_cpu = views(photos, 224, steps=2, dialect=dialect)
    assert np.array_equal(on_gpu[2], on_cpu[2])
    std = torch.tensor(Policy(224, dialect=dialect).std).view(3, 1, 1)
    for one, other in zip(on_gpu[:2], on_cpu[:2], strict=True):
        assert one.is_cuda
        levels = 255 * std * (one.cpu() - other).abs()
        assert levels.mean() < 1.5
        assert levels[..., 4:-4, 4:-4].median() < 1


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes_again_and_with_a_bound_on_memory(photos: Dataset):
    whole, again = (views(photos, 96, steps=3, device="cuda") for _ in range(2))
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])
    small = views(photos, 96, steps=3, device="cuda", settings=Settings(2, memory_mib=64))
    assert (whole[0] - small[0]).abs().max() < 1e-5
