"""What h keeps of an image and g(h) loses: classifiers tell from either how the image was changed; and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_fast.config import ConfigError
from simclr_fast.data import Dataset, Split
from simclr_fast.evaluation import logistic, pictures
from simclr_fast.evaluation.changes import PROPERTIES, Change, Property
from simclr_fast.evaluation.job import Common, Job
from simclr_fast.evaluation.results import Result

HIDDEN, STEPS, BATCH, RATE, DECAY = 512, 400, 1024, 3e-3, 1e-4  # of the MLP and its training
L2 = 1.0  # of the linear classifier, in `logistic.fit`'s convention
HELD_OUT = 0.2  # of the images, where there are no test images
LEAST = 10  # images that can be split
Labels = tuple[Tensor, Tensor]  # features [n, d] float32 and labels int64 [n]


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    """What the encoder's output h keeps of how an image was changed, and the projection g(h) loses; with pictures.

    Labels are not needed.
    """

    images: int = 20_000
    """To train the classifiers with, at most; drawn by the seed."""

    test_images: int = 10_000
    """To test them with, at most."""

    classifier: Literal["mlp", "linear"] = "mlp"
    """`mlp`, with one hidden layer (the paper has MLPs and gives no size); or `linear`."""

    noise: float = 0.1
    """Standard deviation of the Gaussian noise, of values in [0, 1]."""

    pictures: bool = True
    """Also t-SNE and PCA of h beside z = g(h), and nearest neighbours by each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("images", self.images >= LEAST, f"at least {LEAST}")
        self.require("test_images", self.test_images >= LEAST, f"at least {LEAST}")
        self.require("noise", self.noise > 0, "positive")


@dataclass(frozen=True)
class Part:
    """Images of a split that are used."""

    name: str
    split: Split
    indices: np.ndarray  # int64 [n], increasing


def run(settings: Settings, job: Job) -> Result:
    """Train and test a classifier for each property, on h and on g(h).

    Raises:
        ConfigError: the encoder has no projection head; too few images.
    """
    if job.encoder.recipe.head == "none":
        raise ConfigError(
            f"checkpoint must have a projection head, for h is compared with g(h), and {job.encoder.origin} has none"
        )
    train, test = parts(job.dataset, settings)
    as_they_are = [_features(job, part) for part in (train, test)]
    rows: list[list[Any]] = []
    for of in PROPERTIES:
        sides = [
            _changed(job, settings, of, part, plain) for part, plain in zip((train, test), as_they_are, strict=True)
        ]
        truth = sides[1][1]
        chance = torch.bincount(truth).max().item() / len(truth)
        found = job.ranks.from_main(partial(_accuracies, settings, job, sides[0], sides[1], len(of.shares)))
        job.say(f"{of.name}: {found[0]:.1%} from h, {found[1]:.1%} from g(h), chance {chance:.1%}")
        rows.append([of.name, chance, *found, *of.paper])
    result = Result(
        protocol="probe",
        data=job.dataset.name,
        figures={"mean of h": float(np.mean([row[2] for row in rows])),
                 "mean of g(h)": float(np.mean([row[3] for row in rows]))},
        counts={"training images": len(train.indices), "test images": len(test.indices)},
        classes=list(job.dataset.classes),
        tables=[{
            "title": "How an image was changed, told from its features",
            "columns": ["property", "chance", "h", "g(h)", "paper's h", "paper's g(h)"],
            "rows": rows,
        }],
        notes=[_note(settings, job)],
    )  # fmt: skip
    if settings.pictures:
        pictures.add(result, job, (train.split, train.indices), (test.split, test.indices), *as_they_are)
    return result


def parts(data: Dataset, settings: Settings) -> tuple[Part, Part]:
    """The images to train and to test with: drawn of those parts of the data, or all of its one part split.

    Raises:
        ConfigError: there are too few.
    """
    rng = np.random.default_rng(settings.seed)
    orders = [rng.permutation(len(split)) for split in (data.train, data.test) if split is not None and len(split)]
    if min(map(len, orders), default=0) < LEAST:
        counts = " and ".join(str(len(order)) for order in orders)
        raise ConfigError(f"data must have at least {LEAST} images in each part, got {counts}")
    if data.test is not None and len(orders) == 2:
        chosen = [(data.train, orders[0]), (data.test, orders[1])]
    else:
        cut = round(HELD_OUT * len(orders[0]))
        chosen = [(data.train, orders[0][cut:]), (data.train, orders[0][:cut])]
    most = (settings.images, settings.test_images)
    names = ("training images", "test images")
    train, test = (
        Part(name, split, np.sort(order[:count]))
        for name, (split, order), count in zip(names, chosen, most, strict=True)
    )
    return train, test


def _features(job: Job, part: Part) -> Tensor:
    return job.extractor.features(part.split, part.indices, name=part.name)


def _changed(job: Job, settings: Settings, of: Property, part: Part, plain: Tensor) -> Labels:
    """(h [n, d], labels [n]) of the part with a property. Images that stay as they are need no second look."""
    labels = of.labels(len(part.split), settings.seed, part.name)
    change = Change(of, labels, job.encoder.policy, settings.seed, settings.noise)
    own = labels[part.indices]
    rows, found = np.flatnonzero(own), plain.clone()
    name = f"{part.name}, {of.name}"
    found[rows] = job.extractor.features(part.split, part.indices[rows], name=name, transform=change)
    return found, torch.from_numpy(own)


def _accuracies(settings: Settings, job: Job, train: Labels, test: Labels, classes: int) -> tuple[float, float]:
    """Of classifiers of h and of g(h) on the test images."""
    (x, y), (held_out, truth) = train, test
    learn, found = mlp if settings.classifier == "mlp" else linear, []
    for sides in ((x, held_out), (job.embeddings(x), job.embeddings(held_out))):
        known, asked = (rows.to(job.ranks.device) for rows in standardised(*sides))
        scores = learn(known, y, asked, classes=classes, seed=settings.seed)
        found.append((scores.argmax(1).cpu() == truth).double().mean().item())
    return found[0], found[1]


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both [., d] with the mean and spread of the first made 0 and 1; features that are constant are 0."""
    mean, spread = train.mean(0), train.std(0)
    scale = torch.where(spread > 1e-6 * train.std(), 1 / spread, torch.zeros_like(spread))
    return (train - mean) * scale, (test - mean) * scale


def mlp(x: Tensor, y: Tensor, held_out: Tensor, *, classes: int, seed: int) -> Tensor:
    """Scores [m, classes] of `held_out` [m, d] by an MLP with one hidden layer that learns `y` from `x` [n, d]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes)).to(x.device)
        picked = torch.randint(len(x), (STEPS, BATCH))
    y, picked = y.to(x.device), picked.to(x.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for rows in picked:
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        return network(held_out)


def linear(x: Tensor, y: Tensor, held_out: Tensor, *, classes: int, seed: int) -> Tensor:
    """As `mlp`, by logistic regression; the seed does not matter."""
    return logistic.fit(x, y.to(x.device), L2, classes=classes, tolerance=1e-6).scores(held_out)


def _note(settings: Settings, job: Job) -> str:
    kind = f"an MLP with {HIDDEN} hidden units" if settings.classifier == "mlp" else "logistic regression"
    sizes = f"{job.encoder.num_features} numbers in h, {job.encoder.recipe.head_features} in g(h)"
    return (
        f"Classifier: {kind}, on central crops; noise of standard deviation {settings.noise:g}; {sizes}. The paper's "
        "(table 3, ResNet-50 on ImageNet) has 2048 in both, and was pretrained with rotation, noise and Sobel filter "
        "among its augmentations for those three rows."
    )
