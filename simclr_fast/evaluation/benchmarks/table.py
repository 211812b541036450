"""The 12 data sets of the paper's transfer table (Chen et al. 2020, section 4.3, appendix B.8), and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Options = dict[str, Any]
Metric = Literal["top-1", "mean per class", "11-point mAP"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A data set, how it is divided, and how it is measured."""

    name: str
    """Of its folder, and for --sets."""
    title: str
    metric: Metric
    classes: int
    train: int
    """Images, with those for validation."""
    test: int
    kind: str = ""
    """Class of torchvision.datasets that reads it."""
    marker: str = ""
    """What lies in the folder that this class is given."""
    parts: Mapping[str, Options] = field(default_factory=dict)
    """Options of the class for `train`, `val` and `test`, or for `all` where it has no such parts."""
    size: str = ""
    """Of a download; none where torchvision fetches nothing."""
    needs: str = ""
    """A package that the class imports besides."""
    draw: tuple[int, int | None] | None = None
    """Where no list divides it: training and test images of a class, drawn at random; None is all others."""


def _split(*names: str, option: str = "split", **others: Any) -> dict[str, Options]:
    return {name: {**others, option: name} for name in names}


_FLAGS: Mapping[str, Options] = {"train": {"train": True}, "test": {"train": False}}
_THREE = _split("train", "val", "test")

_ALL = (
    Benchmark(
        name="food101", title="Food-101", metric="top-1", classes=101, train=75_750, test=25_250,
        kind="Food101", marker="food-101", parts=_split("train", "test"), size="4.7 GiB",
    ),
    Benchmark(
        name="cifar10", title="CIFAR-10", metric="top-1", classes=10, train=50_000, test=10_000,
        kind="CIFAR10", marker="cifar-10-batches-py", parts=_FLAGS, size="163 MiB",
    ),
    Benchmark(
        name="cifar100", title="CIFAR-100", metric="top-1", classes=100, train=50_000, test=10_000,
        kind="CIFAR100", marker="cifar-100-python", parts=_FLAGS, size="161 MiB",
    ),
    Benchmark(name="birdsnap", title="Birdsnap", metric="top-1", classes=500, train=47_386, test=2_443),
    Benchmark(
        name="sun397", title="SUN397", metric="top-1", classes=397, train=19_850, test=19_850,
        kind="SUN397", marker="SUN397", parts={"all": {}}, size="37 GiB", draw=(50, 50),
    ),
    Benchmark(
        name="stanford_cars", title="Stanford Cars", metric="top-1", classes=196, train=8_144, test=8_041,
        kind="StanfordCars", marker="stanford_cars/devkit", parts=_split("train", "test"), needs="scipy",
    ),
    Benchmark(
        name="fgvc_aircraft", title="FGVC Aircraft", metric="mean per class", classes=100, train=6_667, test=3_333,
        kind="FGVCAircraft", marker="fgvc-aircraft-2013b", parts=_THREE, size="2.6 GiB",
    ),
    Benchmark(
        name="voc2007", title="VOC2007", metric="11-point mAP", classes=20, train=5_011, test=4_952,
        kind="VOCDetection", marker="VOCdevkit/VOC2007",
        parts=_split("train", "val", "test", option="image_set", year="2007"), size="830 MiB",
    ),
    Benchmark(
        name="dtd", title="DTD", metric="top-1", classes=47, train=3_760, test=1_880,
        kind="DTD", marker="dtd/dtd", parts=_THREE, size="600 MiB",
    ),
    Benchmark(
        name="oxford_iiit_pet", title="Oxford Pets", metric="mean per class", classes=37, train=3_680, test=3_669,
        kind="OxfordIIITPet", marker="oxford-iiit-pet",
        parts={"train": {"split": "trainval"}, "test": {"split": "test"}}, size="775 MiB",
    ),
    Benchmark(
        name="caltech101", title="Caltech-101", metric="mean per class", classes=102, train=3_060, test=6_084,
        kind="Caltech101", marker="caltech101/101_ObjectCategories", parts={"all": {}}, size="131 MiB",
        draw=(30, None),
    ),
    Benchmark(
        name="flowers102", title="Oxford Flowers", metric="mean per class", classes=102, train=2_040, test=6_149,
        kind="Flowers102", marker="flowers-102", parts=_THREE, size="330 MiB", needs="scipy",
    ),
)  # fmt: skip
BENCHMARKS: Mapping[str, Benchmark] = {one.name: one for one in _ALL}

_FIGURES = {  # per cent, in the order of the sets
    ("linear", "SimCLR"): "68.4 90.6 71.6 37.4 58.8 50.3 50.3 80.5 74.5 83.6 90.3 91.2",
    ("linear", "supervised"): "72.3 93.6 78.3 53.7 61.9 66.7 61.0 82.8 74.9 91.5 94.5 94.7",
    ("linear", "SimCLR 4x"): "76.9 95.3 80.2 48.4 65.9 60.0 61.2 84.2 78.9 89.2 93.9 95.0",
    ("linear", "supervised 4x"): "75.2 95.7 81.2 56.4 64.9 68.8 63.8 83.8 78.7 92.3 94.1 94.2",
    ("finetune", "SimCLR"): "88.2 97.7 85.9 75.9 63.5 91.3 88.1 84.1 73.2 89.2 92.1 97.0",
    ("finetune", "supervised"): "88.3 97.5 86.4 75.8 64.3 92.1 86.0 85.0 74.6 92.1 93.3 97.6",
    ("finetune", "SimCLR 4x"): "89.4 98.6 89.0 78.2 68.1 92.1 87.0 86.6 77.8 92.1 94.1 97.6",
    ("finetune", "supervised 4x"): "88.7 98.3 88.7 77.8 67.0 91.4 88.0 86.5 78.8 93.2 94.2 98.0",
}


def published(mode: str, method: str, name: str) -> float:
    """What the paper has, a fraction.

    Args:
        mode: linear or finetune.
        method: SimCLR or supervised, for ResNet-50; with ` 4x`, for that of four times the width.
        name: of the data set.
    """
    return float(_FIGURES[mode, method].split()[list(BENCHMARKS).index(name)]) / 100
