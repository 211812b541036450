"""Features of a folder of images: `python -m simclr_fast.embed --checkpoint RUN --data DIR OUT.npz`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from simclr_fast.command import ended, over_ranks
from simclr_fast.config import ConfigError
from simclr_fast.data import Dataset, Split
from simclr_fast.distributed import Ranks
from simclr_fast.evaluation.job import Job, Work
from simclr_fast.exporting.target import check_target, whole

MODULE = "simclr_fast.embed"


@dataclass(frozen=True, kw_only=True)
class Settings(Work):
    """The features of images, with or without labels, in one .npz: `features` float32 [n, d]; `names` [n]; `labels`
    int64 [n], places in `classes`, -1 for none; `parts` [n], train or test; `classes`; and `about`, JSON that says
    where the features are from."""

    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT.npz")]]
    """The file to write."""

    data: str | None = None
    """Images, with or without labels; what --data of the trainer takes. Without it: those of the run."""

    part: Literal["train", "test", "all"] = "all"
    """Images of which part of the data. `all` is first train, then test."""

    layer: Literal["h", "z"] = "h"
    """`h`, the encoder's output; or `z`, the projection head's."""

    overwrite: bool = False
    """Replace what is there."""

    def check(self) -> None:
        """What is wrong with the target or the encoder is said before anything is computed.

        Raises:
            ConfigError: `out` or `layer` cannot be had.
        """
        check_target(Path(self.out).expanduser(), overwrite=self.overwrite, suffixes=(".npz",))
        encoder = self.encoder()
        if self.layer == "z" and encoder.recipe.head == "none":
            raise ConfigError(
                f"layer must be h for an encoder without a projection head, got layer=z, {encoder.origin}"
            )


def embed(settings: Settings, ranks: Ranks) -> None:
    """Compute on every rank, write on the main one."""
    ranks.from_main(settings.check)
    job = Job(settings, ranks, ranks.say)
    splits = chosen(job.dataset, settings.part)
    found = [job.extractor.features(split, name=f"{name} images") for name, split in splits.items()]
    features = np.concatenate([(job.embeddings(h) if settings.layer == "z" else h).numpy() for h in found])
    if not ranks.main:
        return
    encoder, data = job.encoder, job.dataset
    about = {
        "checkpoint": encoder.origin, "step": encoder.step, "weights": encoder.digest(), "arch": encoder.recipe.arch,
        "layer": settings.layer, "data": data.name, "part": settings.part, "precision": job.extractor.precision,
    }  # fmt: skip
    out = Path(settings.out).expanduser()
    with whole(out) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            features=features,
            names=np.array([name for split in splits.values() for name in split.names], np.str_),
            labels=np.concatenate([labels(split) for split in splits.values()]),
            parts=np.repeat([*splits], [len(split) for split in splits.values()]),
            classes=np.array(data.classes, np.str_),
            about=np.array(json.dumps(about)),
        )
    ranks.say(f"{len(features):,} features of {features.shape[1]} numbers: {out}")


def chosen(data: Dataset, part: str) -> dict[str, Split]:
    """The splits of a part, by name.

    Raises:
        ConfigError: the data set does not have it.
    """
    splits = {name: split for name, split in (("train", data.train), ("test", data.test)) if split is not None}
    if part == "all":
        return splits
    if part not in splits:
        raise ConfigError(f"part must be one that the data set has, got part={part}, and {data.name} has train alone")
    return {part: splits[part]}


def labels(split: Split) -> np.ndarray:
    """int64 [n], -1 for an image without one."""
    return np.full(len(split), -1, np.int64) if split.labels is None else split.labels.astype(np.int64)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, start the processes that are asked for, and compute; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return ended(lambda joined: _main(argv, joined))


def _main(argv: list[str], joined: list[Ranks]) -> int:
    settings = tyro.cli(Settings, prog=f"python -m {MODULE}", args=argv)
    return over_ranks(MODULE, argv, settings, joined, settings.check, lambda ranks: embed(settings, ranks))


if __name__ == "__main__":
    sys.exit(main())
