"""Data sets by name: miniatures that lie on the disk as torchvision unpacks the real ones, and what is not there."""

import gzip
import hashlib
import io
import json
import pickle
import struct
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from simclr_fast.data.sources import KNOWN, Dataset, datasets_folder, named, open_dataset, scan
from simclr_fast.data.sources.samples import DataError
from tests.images_common import encoded, fill, pack

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of data sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SIMCLR_FAST_DATA", str(tmp_path / "kept"))
    return tmp_path / "kept"


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar(root: Path, patch: pytest.MonkeyPatch, kind: type = datasets.CIFAR10, key: str = "labels") -> None:
    """Two images in each file."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for listed in ("train_list", "test_list"):
        for name, _ in getattr(kind, listed):
            (folder / name).write_bytes(pickle.dumps({"data": noise(2, 3072), key: [0, 1]}))
        patch.setattr(kind, listed, [[name, md5(folder / name)] for name, _ in getattr(kind, listed)])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: ["cat", "dog"]}))
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})


def cifar100(root: Path, patch: pytest.MonkeyPatch) -> None:
    cifar(root, patch, datasets.CIFAR100, "fine_labels")


def stl10(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, count in (("train", 2), ("test", 2), ("unlabeled", 3)):
        noise(count, 3, 96, 96).tofile(folder / f"{name}_X.bin")
        np.array([1, 2], np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("cat\ndog\n")
    for listed in ("train_list", "test_list"):
        patch.setattr(datasets.STL10, listed, [[n, md5(folder / n)] for n, _ in getattr(datasets.STL10, listed)])


def svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    io_ = pytest.importorskip("scipy.io")
    root.mkdir(parents=True)
    listed = dict(datasets.SVHN.split_list)
    for split in ("train", "test"):
        url, name, _ = listed[split]
        io_.savemat(root / name, {"X": noise(32, 32, 3, 4), "y": np.array([[10], [1], [2], [1]])})
        listed[split] = [url, name, md5(root / name)]
    patch.setattr(datasets.SVHN, "split_list", listed)


def mnist(root: Path, patch: pytest.MonkeyPatch, folder: str = "MNIST") -> None:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, 2, 28, 28) + noise(2, 28, 28).tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 2) + bytes([0, 1]))


def fashion_mnist(root: Path, patch: pytest.MonkeyPatch) -> None:
    mnist(root, patch, "FashionMNIST")


def food101(root: Path, patch: pytest.MonkeyPatch) -> None:
    fill(root / "food-101" / "images", *(f"{kind}/{k}.jpg" for kind in ("pie", "soup") for k in range(3)))
    (root / "food-101" / "meta").mkdir()
    for split, rows in (("train", (0, 1)), ("test", (2,))):
        listed = {kind: [f"{kind}/{k}" for k in rows] for kind in ("pie", "soup")}
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))


def flowers102(root: Path, patch: pytest.MonkeyPatch) -> None:
    io_ = pytest.importorskip("scipy.io")
    base = root / "flowers-102"
    fill(base / "jpg", *(f"image_{k:05d}.jpg" for k in range(1, 7)))
    io_.savemat(base / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    io_.savemat(base / "imagelabels.mat", {"labels": [[1, 2, 1, 2, 1, 2]]})
    entries = dict(datasets.Flowers102._file_dict)
    for key in ("label", "setid"):
        entries[key] = (entries[key][0], md5(base / entries[key][0]))
    patch.setattr(datasets.Flowers102, "_file_dict", entries)


def dtd(root: Path, patch: pytest.MonkeyPatch) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for k, split in enumerate(("train", "val", "test")):
        names = [f"{kind}/{k}.jpg" for kind in ("banded", "dotted")]
        fill(base / "images", *names)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(names))


def oxford_iiit_pet(root: Path, patch: pytest.MonkeyPatch) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for k, split in enumerate(("trainval", "test")):
        fill(base / "images", f"Bengal_{k}.jpg", f"pug_{k}.jpg")
        (base / "annotations" / f"{split}.txt").write_text(f"Bengal_{k} 1 1 1\npug_{k} 2 2 1\n")


def fgvc_aircraft(root: Path, patch: pytest.MonkeyPatch) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    for k, split in enumerate(("trainval", "test")):
        fill(base / "images", f"{k}0.jpg", f"{k}1.jpg")
        (base / f"images_variant_{split}.txt").write_text(f"{k}0 727-200\n{k}1 A300 B4\n")
    (base / "variants.txt").write_text("727-200\nA300 B4\n")


def eurosat(root: Path, patch: pytest.MonkeyPatch) -> None:
    fill(root / "eurosat" / "2750", "Forest/1.jpg", "River/2.jpg")


def imagenette(root: Path, patch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        fill(root / "imagenette2" / split, "n01440764/1.JPEG", "n02102040/2.JPEG")


ARRAYS = {"cifar10": cifar, "cifar100": cifar100, "stl10": stl10, "svhn": svhn, "mnist": mnist}
ARRAYS["fashion_mnist"] = fashion_mnist
FILES = {"food101": food101, "flowers102": flowers102, "dtd": dtd, "oxford_iiit_pet": oxford_iiit_pet}
FILES |= {"fgvc_aircraft": fgvc_aircraft, "eurosat": eurosat, "imagenette": imagenette}
Maker = Callable[[Path, pytest.MonkeyPatch], None]


def test_every_name_has_a_miniature():
    assert set(ARRAYS | FILES) == set(named.NAMES) == set(KNOWN) - {"shapes"}


@pytest.mark.parametrize(("name", "make"), ARRAYS.items(), ids=ARRAYS)
@pytest.mark.parametrize("own_folder", [True, False])
def test_arrays(kept: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Maker, own_folder: bool):
    make(kept / name if own_folder else kept, monkeypatch)
    data = open_dataset(name)
    assert data.test is not None
    for split in (data.train, data.test):
        assert split.pixels is not None
        assert split.labels is not None
        assert split.pixels.dtype == np.uint8
        assert split.pixels.shape == (len(split), *split.sizes[0], 3)
        picture = np.asarray(Image.open(io.BytesIO(split.read(1).tobytes())))
        np.testing.assert_array_equal(picture, split.pixels[1])
        assert split.labels.max() < len(data.classes)
    assert len(data.classes) >= 2
    assert data.skipped == ()


@pytest.mark.parametrize(("name", "make"), FILES.items(), ids=FILES)
def test_files(kept: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Maker):
    make(kept / name, monkeypatch)
    data = open_dataset(name)
    assert data.train.pixels is None
    assert len(data.train) == {"food101": 4, "flowers102": 4, "dtd": 4}.get(name, 2)
    assert (data.test is None) == (name == "eurosat")
    for split in (data.train, data.test):
        if split is not None:
            assert split.labels is not None
            assert set(split.labels) == {0, 1}
            assert split.read(0).tobytes() == encoded()


def test_cifar_shows_the_pixels_that_torchvision_does(kept: Path, monkeypatch: pytest.MonkeyPatch):
    cifar(kept / "cifar10", monkeypatch)
    data, theirs = open_dataset("cifar10"), datasets.CIFAR10(kept / "cifar10", train=False)
    assert (len(data.train), data.classes) == (10, ("cat", "dog"))
    assert data.test is not None
    assert data.test.labels is not None
    for k, (image, label) in enumerate(theirs):
        np.testing.assert_array_equal(data.test.pixels[k], np.asarray(image))
        assert data.test.labels[k] == label


def test_unlabelled_images_of_stl10_have_minus_one(kept: Path, monkeypatch: pytest.MonkeyPatch):
    stl10(kept / "stl10", monkeypatch)
    data, theirs = open_dataset("stl10"), datasets.STL10(kept / "stl10", split="train+unlabeled")
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [0, 1, -1, -1, -1]
    np.testing.assert_array_equal(data.train.pixels[4], np.asarray(theirs[4][0]))


def test_classes_keep_the_order_of_torchvision(kept: Path, monkeypatch: pytest.MonkeyPatch):
    imagenette(kept / "imagenette", monkeypatch)
    flowers102(kept / "flowers102", monkeypatch)
    assert open_dataset("imagenette").classes == ("tench", "English springer")
    flowers = open_dataset("flowers102")
    assert (len(flowers.classes), flowers.classes[0]) == (102, "pink primrose")


def test_files_that_cannot_be_read_are_skipped(kept: Path, monkeypatch: pytest.MonkeyPatch):
    food101(kept / "food101", monkeypatch)
    (kept / "food101" / "food-101" / "images" / "pie" / "0.jpg").write_bytes(b"")
    (kept / "food101" / "food-101" / "images" / "soup" / "2.jpg").unlink()
    data = open_dataset("food101")
    assert [name for name, _ in data.skipped] == ["food-101/images/pie/0.jpg", "food-101/images/soup/2.jpg"]
    assert (len(data.train), data.train.labels is not None and data.train.labels.tolist()) == (3, [0, 1, 1])


@pytest.mark.parametrize("name", named.NAMES)
def test_what_is_not_there_is_not_fetched_unless_asked(kept: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("the network was used"))
    with pytest.raises(DataError, match=rf"{name} must be in .*kept.*: --download fetches it, [\d.]+ [MG]iB"):
        open_dataset(name)
    assert not kept.exists()


def test_damaged_files_are_told_from_none(kept: Path, monkeypatch: pytest.MonkeyPatch):
    cifar(kept / "cifar10", monkeypatch)
    (kept / "cifar10" / "cifar-10-batches-py" / "test_batch").write_bytes(b"")
    with pytest.raises(DataError, match="not found or corrupted"):
        open_dataset("cifar10")
    with pytest.raises(DataError, match="must be whole .* remove that folder"):
        open_dataset("cifar10", download=True)


def test_without_a_network_it_says_so_and_leaves_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name in ("cifar10", "mnist"):
        with pytest.raises(DataError, match=rf"{name} cannot be fetched into .*Name or service not known"):
            open_dataset(name, download=True)
    assert [path.name for path in kept.iterdir() if not path.name.endswith(".lock")] == []


def served(monkeypatch: pytest.MonkeyPatch, archives: dict[str, bytes]) -> list[str]:
    """Answer for the network, by the end of the address; the addresses that were asked for."""
    asked: list[str] = []

    def write(url: str, path: str, *rest: object) -> None:
        asked.append(url)
        Path(path).write_bytes(next(content for end, content in archives.items() if url.endswith(end)))

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", write)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops=3: url)
    return asked


def test_a_download_comes_whole_and_once(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("2750/Forest/1.jpg", encoded())
        archive.writestr("2750/River/2.jpg", encoded())
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *a, **k: True)
    asked = served(monkeypatch, {"EuroSAT.zip": buffer.getvalue()})
    assert len(open_dataset("eurosat", download=True).train) == 2
    assert len(open_dataset("eurosat", download=True).train) == len(open_dataset("eurosat").train) == 2
    assert len(asked) == 1
    assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()) == [
        ".eurosat.lock",
        "eurosat/eurosat/2750/Forest/1.jpg",
        "eurosat/eurosat/2750/River/2.jpg",
    ]


def test_a_download_that_breaks_off_leaves_nothing(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = pack(tmp_path / "food.tar", {"food-101/images/pie/0.jpg": encoded()}).read_bytes()
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *a, **k: True)
    served(monkeypatch, {"food-101.tar.gz": gzip.compress(whole)[:-40]})
    with pytest.raises(DataError, match="food101 cannot be fetched"):
        open_dataset("food101", download=True)
    assert not (kept / "food101").exists()
    assert not (kept / ".food101.partial").exists()


def test_a_folder_of_that_name_is_given_with_its_place(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(fill(tmp_path / "here", "cifar10/1.jpg"))
    with pytest.raises(DataError, match=r"the folder of that name here is \./cifar10"):
        open_dataset("cifar10")
    data: Dataset = open_dataset("./cifar10")
    assert len(data.train) == 1


def test_where_data_sets_are_kept(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert datasets_folder() == kept
    monkeypatch.delenv("SIMCLR_FAST_DATA")
    assert datasets_folder() == tmp_path / "cache" / "simclr_fast" / "datasets"


def test_a_missing_package_is_named_before_anything_is_fetched(kept: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="svhn needs the package scipy: pip install scipy"):
        open_dataset("svhn", download=True)
    assert not kept.exists()


def test_two_sets_in_one_folder_are_remembered_apart(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scan, "CACHED_FROM", 1)
    food101(kept, monkeypatch)
    eurosat(kept, monkeypatch)
    open_dataset("food101")
    open_dataset("eurosat")
    assert len(list((tmp_path / "cache").rglob("checked-*.npz"))) == 2
