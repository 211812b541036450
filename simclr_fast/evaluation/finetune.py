"""Semi-supervised learning: all weights are trained on a part of the labels, from the encoder that was pretrained.

The classifier takes the projection head's input h (SimCLR, appendix B.5), or what the head's first layer makes of it
(SimCLR v2). That layer is trained like all others; the original's TensorFlow 1 code leaves it as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr_fast.config import ConfigError
from simclr_fast.data import Split, fingerprint
from simclr_fast.data.sources.samples import write_whole
from simclr_fast.evaluation.job import Common, Job, Labelled, results_folder
from simclr_fast.evaluation.measures import confusion, top_k
from simclr_fast.evaluation.results import Result, short, writing
from simclr_fast.evaluation.subsets import balanced, listed
from simclr_fast.evaluation.supervised import Recipe, batch_for, classifier, fit, full_precision
from simclr_fast.exporting.target import check_target
from simclr_fast.features import Extractor
from simclr_fast.pretrained import Encoder
from simclr_fast.record import RunError, write_text

LAYER = 3  # modules of a head's hidden layer: linear, BatchNorm, ReLU
LABELS = 1.0  # per cent of them, unless given
FEW = 2.0  # per cent of the labels up to which 60 epochs are made, as the paper for 1 %, and not 30


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    """Train all weights on a part of the labels, by the paper's recipe."""

    labels: float | None = None
    """Per cent of the training images whose labels are used, spread evenly over the classes: 1, 10 or 100 in the paper.
    Without it: 1. The list is written beside the results."""

    subset: str | None = None
    """A text file that names the images to train on, one a line, in place of --labels."""

    from_layer: int = 0
    """Hidden layers of the projection head that the classifier stands on: 0 is the head's input, 1 SimCLR v2's."""

    batch: int | None = None
    """Images in a global batch; 4096 in the paper. Without it: 256, or all where there are fewer."""

    epochs: int | None = None
    """Passes over the images. Without it: 60 for up to 2 % of the labels, else 30; a few dozen images need more."""

    lr: float = 0.05
    """Learning rate for a batch of 256; it grows with the batch."""

    weight_decay: float = 0.0
    """Weight decay, of all but BatchNorm's parameters."""

    save: str | None = None
    """A file (.pt) for the encoder as it is afterwards, and the classifier; `load` takes it."""

    overwrite: bool = False
    """Replace the file of --save, if it is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("labels", self.labels is None or 0 < self.labels <= 100, "per cent, in (0, 100]")
        self.require("labels", self.labels is None or self.subset is None, "left out with --subset")
        self.require("from_layer", self.from_layer >= 0, "0 or more")
        self.require("batch", self.batch is None or self.batch >= 2, "at least 2, for BatchNorm")
        self.require("epochs", self.epochs is None or self.epochs >= 1, "at least 1")
        self.require("lr", self.lr > 0, "positive")
        self.require("weight_decay", self.weight_decay >= 0, "0 or more")
        self.require("save", self.save is None or Path(self.save).suffix == ".pt", "a file whose name ends with .pt")


class Classifier(nn.Module):
    """A copy of the encoder, the first layers of its projection head, and a linear layer: images to logits."""

    def __init__(self, encoder: Encoder, layers: int, classes: int) -> None:
        """
        Args:
            layers: hidden layers of the head.
        Raises:
            ConfigError: it has not so many.
        """
        super().__init__()
        recipe = encoder.recipe
        hidden = recipe.head_layers - 1 if recipe.head == "nonlinear" else 0
        if layers > hidden:
            raise ConfigError(
                f"from_layer must be at most {hidden}, the hidden layers of the checkpoint's projection head, got "
                f"from_layer={layers}"
            )
        self.encoder = copy.deepcopy(encoder)
        self.top = self.encoder.head[: LAYER * layers]
        self.classifier = classifier(encoder.num_features, classes)
        for part in (self.encoder.network, self.top):
            part.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(self.encoder(images))

    def scores(self, h: Tensor) -> Tensor:
        """Logits [B, K] of features [B, num_features]; float32."""
        with full_precision(h):
            return self.classifier(self.top(h.float()))


@torch.inference_mode()
def tested(model: Classifier, job: Job, split: Split, rows: np.ndarray, name: str) -> Tensor:
    """Logits [n, K] of the central crops of these images, float32, on the CPU; the same on every rank.

    Raises:
        RunError: a feature is not finite.
    """
    extractor = Extractor(
        model.encoder, job.ranks, precision=job.settings.precision, workers=job.settings.workers, cache=False
    )
    try:
        h = extractor.features(split, rows, name=name)
    except ConfigError as error:  # of a checkpoint, which this is no more
        raise RunError(f"lr must be lower: what was trained gives features that are not finite ({name})") from error

    def share(part: slice) -> Tensor:
        return torch.cat([model.scores(some.to(job.ranks.device)) for some in h[part].split(8192)])

    return job.ranks.sharded(len(h), share).cpu()


def run(settings: Settings, job: Job) -> Result:
    """Train on the subset, and test once."""
    target = Path(settings.save).expanduser() if settings.save else None
    if target:
        job.ranks.from_main(lambda: check_target(target, overwrite=settings.overwrite, name="save"))
    train, test = job.labelled()
    count = len(job.dataset.classes)
    chosen, listing = _subset(settings, job, train)
    _check(settings, job, chosen, test)
    share = 100 * len(chosen) / len(train)
    epochs = settings.epochs or (60 if share <= FEW else 30)
    batch = batch_for(settings.batch, len(chosen), job.ranks.world)
    recipe = Recipe.of_epochs(batch, len(chosen), epochs, settings.lr, settings.weight_decay)
    model = Classifier(job.encoder, settings.from_layer, count)
    job.say(f"fine-tuning on {len(chosen):,} images, {epochs} epochs: {recipe}")
    fit(model, chosen, recipe, job, name="fine-tuning")
    scores, truth = tested(model, job, test.split, test.indices, "test images"), torch.from_numpy(test.labels)
    figures = {"top-1": top_k(scores, truth, 1), "top-5": top_k(scores, truth, 5)}
    notes = [f"trained on {share:.3g} % of the labels{f', of {listing}' if listing else ''}"]
    if target:
        job.say(f"top-1 {figures['top-1']:.2%}")  # should the disk fail now
        job.ranks.from_main(lambda: _save(target, model, job, recipe.steps))
        notes.append(f"saved {settings.save}")
    resolved: dict[str, Any] = {"batch": batch, "epochs": epochs}
    if settings.subset is None:
        resolved["labels"] = settings.labels or LABELS
    else:
        resolved["subset"] = f"{settings.subset} ({short(' '.join(map(str, chosen.indices)))})"
    return Result(
        protocol="finetune",
        resolved=resolved,
        data=job.dataset.name,
        figures=figures,
        counts={"training images": len(chosen), "test images": len(test), "batch": batch, "steps": recipe.steps},
        classes=list(job.dataset.classes),
        confusion=confusion(truth, scores.argmax(1), count),
        notes=notes,
    )


def _subset(settings: Settings, job: Job, train: Labelled) -> tuple[Labelled, str]:
    """The images to train on, and the file that lists them; "" where that is all."""
    if settings.subset is not None:
        path = Path(settings.subset).expanduser()
        return train.take(job.ranks.from_main(lambda: listed(path, train))), str(path)
    labels = settings.labels or LABELS
    if labels == 100:
        return train, ""
    rows = balanced(train.labels, labels / 100, settings.seed)
    data = f"{job.dataset.name.replace('/', '-')}-{short(fingerprint(job.dataset))}"
    name = f"subset-{data}-{labels:g}pc-seed{settings.seed}.txt"
    path = results_folder(settings) / name
    job.ranks.from_main(lambda: _write(path, [train.split.names[index] for index in train.indices[rows]]))
    return train.take(rows), str(path)


def _check(settings: Settings, job: Job, chosen: Labelled, test: Labelled) -> None:
    """
    Raises:
        ConfigError: a class that is tested has no image to train on.
    """
    missing = np.setdiff1d(test.labels, chosen.labels)
    if len(missing):
        raise ConfigError(
            f"subset must have an image of each class that is tested, and {settings.subset} has none of "
            f"{len(missing)} ({job.dataset.classes[missing[0]]}{', ...' if len(missing) > 1 else ''})"
        )


def _write(path: Path, names: list[str]) -> None:
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(names) + "\n")


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"save must be a file that can be written, got save={path}: {error.strerror}") from error


def _save(path: Path, model: Classifier, job: Job, steps: int) -> None:
    parts = {"encoder": model.encoder.network, "head": model.encoder.head}
    state = {
        "recipe": dataclasses.asdict(job.encoder.recipe),
        "step": steps,
        "method": {f"{part}.{k}": v.cpu() for part, module in parts.items() for k, v in module.state_dict().items()},
        "classifier": {k: v.cpu() for k, v in model.classifier.state_dict().items()},
        "classes": list(job.dataset.classes),
    }
    content = io.BytesIO()
    torch.save(state, content)
    with _saving(path):
        write_whole(path, content.getvalue())
