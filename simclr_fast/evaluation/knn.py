"""kNN: the nearest training images vote for a test image's class, and nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from simclr_fast import knn
from simclr_fast.config import ConfigError
from simclr_fast.evaluation.job import Common, Job
from simclr_fast.evaluation.measures import confusion, top_k
from simclr_fast.evaluation.results import Result

SMALL = 10_000  # training images up to which fewer neighbours vote


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    """Nearest neighbours by cosine similarity, their votes weighted by exp(similarity / temperature)."""

    k: int | None = None
    """Neighbours, all where there are fewer. Without it: 200, or 20 for up to 10,000 training images."""

    temperature: float = 0.1
    """Of the votes' weights."""

    layer: Literal["h", "z", "both"] = "h"
    """`h`, the encoder's output; `z`, the projection head's; or `both`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("k", self.k is None or self.k >= 1, "at least 1")
        self.require("temperature", self.temperature > 0, "positive")


def run(settings: Settings, job: Job) -> Result:
    """Classify the test images."""
    if settings.layer != "h" and job.encoder.recipe.head == "none":
        raise ConfigError(
            f"layer must be h for an encoder without a projection head, got layer={settings.layer}, "
            f"{job.encoder.origin}"
        )
    train, test = job.labelled()
    (bank, labels), (queries, truth) = (
        job.features(images, name) for images, name in ((train, "training images"), (test, "test images"))
    )
    k = settings.k or (200 if len(train) > SMALL else 20)
    figures: dict[str, Any] = {}
    votes = torch.empty(0)
    for layer in ("z", "h") if settings.layer == "both" else (settings.layer,):
        sides = (bank, queries) if layer == "h" else (job.embeddings(bank), job.embeddings(queries))
        votes = _votes(settings, job, *sides, labels, k)
        votes[votes == 0] = -torch.inf  # no neighbour is of that class
        suffix = "" if layer == "h" else " of z"
        figures = {f"top-1{suffix}": top_k(votes, truth, 1), f"top-5{suffix}": top_k(votes, truth, 5)} | figures
    return Result(
        protocol="knn",
        data=job.dataset.name,
        figures=figures,
        counts={"training images": len(train), "test images": len(test), "neighbours": min(k, len(train))},
        resolved={"k": min(k, len(train))},
        classes=list(job.dataset.classes),
        confusion=confusion(truth, votes.argmax(1), len(job.dataset.classes)),
    )


def _votes(settings: Settings, job: Job, bank: Tensor, queries: Tensor, labels: Tensor, k: int) -> Tensor:
    """[m, classes], on the CPU; each rank has its share of the queries."""
    device, count = job.ranks.device, len(job.dataset.classes)
    bank, labels = bank.to(device), labels.to(device)

    def of(part: slice) -> Tensor:
        own = queries[part].to(device)
        return knn.votes(bank, labels, own, classes=count, k=k, temperature=settings.temperature)

    return job.ranks.sharded(len(queries), of).cpu()
