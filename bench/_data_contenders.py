"""The input pipelines that bench/data_bench.py compares: this package's engines, and what else makes SimCLR's views.

A contender is started with a `Work` and a seed, and then gives batch after batch, without end: the two views of each
image, float32 [B, 3, S, S] on the device, normalised. Peers are imported when they are started.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from simclr_fast.data import Policy, Settings, Split, choose, train_views
from simclr_fast.data.policy import SIGMAS

SMALL = 64  # views up to that side are made as for CIFAR
STEPS = 10**6  # more than any window takes
OURS = "simclr_fast dali"


class Absent(Exception):
    """Why a contender cannot run here, though its package can be imported."""


@dataclass(frozen=True, eq=False)
class Work:
    """Batches of two views of the images of a split, on a device."""

    split: Split
    files: tuple[str, ...]  # the same images, a file for each
    folder: str  # that they lie in, below a folder for the class
    policy: Policy
    batch: int
    workers: int
    device: str
    hardware: float = Settings().hardware


Views = Sequence[Tensor]
Start = Callable[[Work, int], Iterator[Views]]


@dataclass(frozen=True)
class Contender:
    """One row of the comparison."""

    name: str
    start: Start
    """(work, seed) -> batches; its first batch raises ImportError where the package is not installed."""
    package: str | None = None
    module: str | None = None
    """Without which there is no use in starting it."""
    note: str = ""
    """What it does not do alike."""
    views: int = 2
    """Of each image; 0 where it makes none, and is a bound."""

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, as far as can be told without importing anything."""
        if self.module and find_spec(self.module) is None:
            return f"not installed (No module named {self.module!r})"
        return None


def policy_for(size: int) -> Policy:
    """The paper's: all of it at 224 px; on small images jitter of half the strength and no blur."""
    return Policy(size) if size > SMALL else Policy(size, jitter_strength=0.5, blur_p=0.0)


def ours(engine: str) -> Start:
    """An engine of this package."""

    def start(work: Work, seed: int) -> Iterator[Views]:
        try:
            choose(engine, work.split, torch.device(work.device))
        except ValueError as error:
            raise Absent(str(error)) from error
        for *views, _ in train_views(
            work.split, work.policy, batch=work.batch, seed=seed, start_step=0, steps=STEPS, device=work.device,
            engine=engine, settings=Settings(workers=work.workers, hardware=work.hardware),
        ):  # fmt: skip
            yield views

    return start


def blur_taps(size: int) -> int:
    """A tenth of the side, made odd: 23 at 224 px, as the original and user code have it."""
    return max(3, 2 * (size // 20) + 1)


def v2_stages(policy: Policy, crop: bool = True) -> dict[str, list[Callable[[Any], Any]]]:
    """torchvision's transforms, in order, by stage."""
    s = policy.jitter_strength
    jitter = v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    area = {"scale": (policy.min_area, 1.0), "interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    blur = v2.GaussianBlur(blur_taps(policy.size), SIGMAS)
    return {
        "crop, resize": [v2.RandomResizedCrop(policy.size, **area)] if crop else [],
        "flip": [v2.RandomHorizontalFlip(policy.flip)],
        "jitter": [v2.RandomApply([jitter], policy.jitter_p)],
        "gray": [v2.RandomGrayscale(policy.gray_p)],
        "blur": [v2.RandomApply([blur], policy.blur_p)] if policy.blur_p else [],
        "normalise": [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(policy.mean, policy.std)],
    }


def v2_policy(policy: Policy, crop: bool = True, **stages: list[Callable[[Any], Any]]) -> Callable[[Any], Tensor]:
    """One view of an image: PIL, or uint8 [..., 3, H, W]; `stages` are in place of torchvision's."""
    chosen = v2_stages(policy, crop) | stages
    return v2.Compose([transform for stage in chosen.values() for transform in stage])


class PillowBlur:
    """Pillow's, an approximation by boxes, which is many times faster than torchvision's on some CPUs."""

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*SIGMAS).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))


def open_pil(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def open_tensor(path: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, mode=ImageReadMode.RGB)


class Files(Dataset):
    """Plain user code: the k-th item is the views of the k-th file."""

    def __init__(self, files: Sequence[str], read: Callable[[str], Any], views: Callable[[Any], Views]) -> None:
        self.files, self.read, self.views = files, read, views

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> Views:
        return self.views(self.read(self.files[k]))


class Endless(Sampler):
    """Every image once in each epoch, in random order, epoch after epoch."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.n, generator=generator).tolist()


class Twice:
    """Two views by one transform."""

    def __init__(self, view: Callable[[Any], Tensor]) -> None:
        self.view = view

    def __call__(self, image: Any) -> Views:
        return [self.view(image), self.view(image)]


def loaded(
    work: Work, seed: int, read: Callable[[str], Any], views: Callable[[Any], Views]
) -> Iterator[Views]:  # fmt: skip
    """Batches of a DataLoader with the default prefetching."""
    on_gpu = work.device == "cuda"
    loader = DataLoader(
        Files(work.files, read, views), work.batch, sampler=Endless(len(work.files), seed), num_workers=work.workers,
        pin_memory=on_gpu,
    )  # fmt: skip
    for batch in loader:
        yield [view.to(work.device, non_blocking=True) for view in batch]


def torchvision_pil(work: Work, seed: int) -> Iterator[Views]:
    yield from loaded(work, seed, open_pil, Twice(v2_policy(work.policy)))


def torchvision_pillow(work: Work, seed: int) -> Iterator[Views]:
    if not work.policy.blur_p:
        raise Absent("without blur it is what the others with PIL are")
    blur = v2.RandomApply([PillowBlur()], work.policy.blur_p)
    yield from loaded(work, seed, open_pil, Twice(v2_policy(work.policy, blur=[blur])))


def torchvision_tensors(work: Work, seed: int) -> Iterator[Views]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's decoder goes, to TorchCodec
        yield from loaded(work, seed, open_tensor, Twice(v2_policy(work.policy)))


def lightly(work: Work, seed: int) -> Iterator[Views]:
    transform = importlib.import_module("lightly.transforms").SimCLRTransform
    policy = work.policy
    views = transform(
        policy.size, cj_strength=policy.jitter_strength, gaussian_blur=policy.blur_p, min_scale=policy.min_area
    )
    yield from loaded(work, seed, open_pil, views)


def _graph_options(work: Work, seed: int) -> dict[str, Any]:
    device_id = 0 if work.device == "cuda" else None
    return {"batch_size": work.batch, "num_threads": work.workers, "device_id": device_id, "seed": seed}


def _iterated(graph: Any, names: list[str]) -> Iterator[Views]:
    iterator = importlib.import_module("nvidia.dali.plugin.pytorch").DALIGenericIterator
    for (batch,) in iterator([graph], names):
        yield [batch[name] for name in names if name != "label"]


def dali_twist(work: Work, seed: int) -> Iterator[Views]:
    from _data_graphs import twisted

    graph = twisted(
        list(work.files), work.policy, blur_taps(work.policy.size), work.device, **_graph_options(work, seed)
    )
    yield from _iterated(graph, ["view1", "view2"])


def dali_decode(work: Work, seed: int) -> Iterator[Views]:
    from _data_graphs import decoded

    graph = decoded(list(work.files), work.device, **_graph_options(work, seed))
    while True:
        graph.run()
        yield ()


def solo_learn(work: Work, seed: int) -> Iterator[Views]:
    module = importlib.import_module("solo.data.dali_dataloader")
    config = importlib.import_module("omegaconf").OmegaConf
    policy, device = work.policy, "gpu" if work.device == "cuda" else "cpu"
    s = policy.jitter_strength
    settings = {
        "crop_size": policy.size,
        "rrc": {"enabled": True, "crop_min_scale": policy.min_area, "crop_max_scale": 1.0},
        "color_jitter": {
            "prob": policy.jitter_p, "brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": 0.8 * s, "hue": 0.2 * s,
        },
        "grayscale": {"prob": policy.gray_p},
        "gaussian_blur": {"prob": policy.blur_p},
        "solarization": {"prob": 0.0},
        "equalization": {"prob": 0.0},
        "horizontal_flip": {"prob": policy.flip},
    }  # fmt: skip
    view = module.build_transform_pipeline_dali("imagenet", config.create(settings), device)
    builder = module.PretrainPipelineBuilder(work.folder, work.batch, device, Twice(view), num_threads=work.workers)
    graph = builder.pipeline(**_graph_options(work, seed))
    graph.build()
    yield from _iterated(graph, ["view1", "view2", "label"])


def ffcv(work: Work, seed: int) -> Iterator[Views]:
    importlib.import_module("ffcv")
    raise Absent("its transforms have no colour jitter, gray or blur")
    yield ()  # so that it is started like the others


APPROXIMATE = "color_twist: one linear operator stands for the four in random order"
EVERY = (
    Contender(OURS, ours("dali"), "nvidia-dali-cuda130"),
    Contender("simclr_fast torchvision", ours("torchvision")),
    Contender("simclr_fast resident", ours("resident"), note="decoded before, all pixels are held"),
    Contender("torchvision v2, PIL", torchvision_pil, "torchvision"),
    Contender("torchvision v2, Pillow's blur", torchvision_pillow, "torchvision", note="blur by boxes"),
    Contender("torchvision v2, tensors", torchvision_tensors, "torchvision"),
    Contender("lightly SimCLRTransform", lightly, "lightly", "lightly", note="bilinear crops"),
    Contender("DALI, color_twist", dali_twist, "nvidia-dali-cuda130", note=APPROXIMATE),
    Contender("solo-learn DALI", solo_learn, "solo-learn", "solo", note=APPROXIMATE),
    Contender("FFCV", ffcv, "ffcv", "ffcv"),
    Contender("DALI, decode alone", dali_decode, "nvidia-dali-cuda130", note="no views: a bound", views=0),
)
