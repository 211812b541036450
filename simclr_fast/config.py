"""The flags that every method shares. A field is a flag; the string under it is its help."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot be used; the text names the setting, the rule and what was given."""


NEUTRAL = (
    *("preset", "gpus", "ranks", "workers", "out", "resume", "config"),
    *("download", "tolerate_unreadable", "input_memory", "tune_input"),
)
"""Fields that cannot change the result: they never count as other settings."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags shared by all methods."""

    data: str = "shapes"
    """Images: a folder (train/CLASS/*.jpg and test/, class folders, or flat), a tar file, a folder of tars, a list
    file, `shapes`, the embedded demonstration set, or torchvision's name of a set: cifar10, stl10, food101, ..."""

    download: bool = False
    """Fetch a data set of torchvision's that is not there yet."""

    tolerate_unreadable: float = 0.05
    """Share of the images that may be unreadable; they are skipped and listed in the run's skipped.tsv."""

    method: str = "simclr"
    """Training method, one of the files in simclr_fast/methods."""

    preset: str = "auto"
    """Settings to start from, which other flags override: `imagenet` and `cifar10` are the paper's, `shapes` is the
    demonstration's, `none` is none; `auto` is `shapes` for that data and else `none`. The defaults shown here are
    those of the preset and the data given beside --help."""

    arch: str = "resnet50"
    """Encoder, by torchvision's names (resnet18 ... resnet152), or resnet8, the demonstration's."""

    width: float = 1.0
    """Factor on every channel count of the encoder: the paper's 1, 2 and 4, or a fraction."""

    image_size: int = 224
    """Side of a view in pixels. Up to 32, the encoder gets the stem for small images."""

    batch: int = 256
    """Images in a global batch, over all processes; the loss sees twice as many views."""

    epochs: int = 100
    """Passes over the training images."""

    temperature: float = 0.1
    """Softmax temperature of the loss; cosine similarities are divided by it."""

    seed: int = 0
    """Fixes the weights, the order of the images and every view."""

    gpus: int | None = None
    """GPUs to use on this host, one process each; 0 is the CPU. Without it: all that are visible."""

    ranks: int = 1
    """Processes on the CPU, with --gpus 0."""

    workers: int | None = None
    """Threads (processes for torchvision) that prepare images, for each rank. Without it: what --tune-input found
    once, or one for each core."""

    out: str | None = None
    """Folder of the run. Without it: runs/NAME, NAME being data, arch and a hash of the settings."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on with the run in the folder, if there is one; `never` deletes that run and starts afresh."""

    config: str | None = None
    """A config.json to repeat, in a folder of its own unless --out says otherwise; other flags override it."""

    loader: Literal["auto", "dali", "torchvision", "resident"] = "auto"
    """What makes the views. `resident` holds all pixels on the device; `auto` is that for images of up to 128 px that
    fit, else DALI, or torchvision where DALI cannot be had."""

    input_memory: int = 1024
    """Bound of the decoded images that DALI holds at a time, MiB for each rank (on the GPU, if it decodes there)."""

    tune_input: bool = False
    """Measure which number of threads, and on a GPU which share of its decoder engines, is fastest (half a minute).
    The result is remembered for this machine and used by later runs too."""

    dialect: Literal["torchvision", "tf"] = "torchvision"
    """Whose definitions the crop, the colour operators and the blur follow: torchvision's or the original's."""

    min_area: float = 0.08
    """Smallest area of a random crop, as a fraction of the image."""

    jitter: float = 1.0
    """Strength of the colour jitter; 0 leaves it out."""

    blur: float = 0.5
    """Probability of the Gaussian blur of a view."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network. `auto` is bf16 on a GPU, and on a CPU that has bf16 instructions."""

    evaluations: int = 5
    """kNN evaluations during the run, evenly spaced; the last one comes at its end."""

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "image_size", "ranks", "evaluations"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("batch", self.batch >= 2, "at least 2: a batch of 1 has no negatives")
        for name, value in dataclasses.asdict(self).items():
            self._require(name, not isinstance(value, float) or math.isfinite(value), "finite")
        for name in ("temperature", "width"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("gpus", "workers"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 0, "0 or more")
        self._require("tolerate_unreadable", 0 <= self.tolerate_unreadable <= 1, "a share, 0 to 1")
        self._require(
            "workers", self.workers is None or not self.tune_input, "left out with --tune-input, which finds it"
        )
        self._require("input_memory", self.input_memory >= 64, "at least 64 (MiB)")
        self._require("min_area", 0 < self.min_area <= 1, "in (0, 1]")
        self._require("blur", 0 <= self.blur <= 1, "a probability")
        self._require("jitter", 0 <= self.jitter <= 1.25, "in [0, 1.25]")
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2^63)")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {rule}, got {name}={getattr(self, name)}")

    def settings(self) -> dict[str, Any]:
        """The fields that can change the result."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in NEUTRAL}

    def folder(self) -> Path:
        """The run's folder."""
        if self.out is not None:
            return Path(self.out)
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
        return Path("runs") / f"{Path(self.data).name.split('.')[0]}-{self.arch}-{digest}"

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Settings in which a saved config differs, as lines `name: saved -> ours`."""
        mine = self.settings()
        names = sorted({*mine, *other} - set(NEUTRAL))
        return [f"{n}: {other.get(n)!r} -> {mine.get(n)!r}" for n in names if mine.get(n) != other.get(n)]

    @classmethod
    def of(cls, values: dict[str, Any], source: str) -> Self:
        """A config from a mapping such as config.json holds, each value checked against the type of its default."""
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        hints = get_type_hints(cls)
        for name, value in values.items():
            choose("setting", name, fields, source)
            if get_origin(hints[name]) is Literal:
                choose(name, str(value), get_args(hints[name]), source)
            kind = type(fields[name])
            numeric = kind is float and type(value) is int
            if kind is not type(None) and not numeric and type(value) is not kind:
                raise ConfigError(f"{source}: {name} must be of type {kind.__name__}, got {value!r}")
        return cls(**values)


def choose(what: str, value: str, options: Iterable[str], source: str = "") -> str:
    """`value` if it is one of `options`; else an error with the nearest of them."""
    options = list(options)
    if value in options:
        return value
    near = difflib.get_close_matches(value, options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    prefix = f"{source}: " if source else ""
    raise ConfigError(f"{prefix}{what} must be one of {', '.join(options)}, got {value!r}{hint}")
