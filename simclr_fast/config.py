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
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

MOST_EPOCHS, MOST_THREADS = 1_000_000, 1024
MOST_S = 2_592_000  # 30 days


class ConfigError(ValueError):
    """A setting that cannot be used; the text names the setting, the rule and what was given."""


NEUTRAL = (
    *("preset", "gpus", "ranks", "workers", "out", "resume", "config", "dry_run", "link"),
    *("download", "tolerate_unreadable", "input_memory", "tune_input", "accept_changed_data"),
    *("compile", "checkpoint_minutes", "timeout"),
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
    """Encoder, by torchvision's names (resnet18 ... resnet152); or resnet8, the demonstration's; or timm:NAME, any of
    timm's."""

    init: str | None = None
    """Weights that the encoder starts from: `torchvision` (or `timm`, for its networks), a run's folder, whose last
    checkpoint is taken (for the best one name the file), or a file of weights. Without it they are drawn at random."""

    width: float = 1.0
    """Factor on every channel count of the encoder: the paper's 1, 2 and 4, or a fraction."""

    image_size: int = 224
    """Side of a view in pixels. Up to 32, the encoder gets the stem for small images."""

    batch: int = 256
    """Images in a global batch, over all processes; the loss sees twice as many views."""

    epochs: int = 100
    """Passes over the training images."""

    accumulate: str = "1"
    """Chunks in which a batch goes through the encoder, for a batch that is too large for the memory; the loss is that
    of the whole batch all the same. `auto` takes as few as fit."""

    bn_chunk: int | None = None
    """Images, over all processes, that share BatchNorm's statistics. Without it: all of the batch, as in the paper, or
    of a chunk of --accumulate."""

    bn_group: int | None = None
    """Processes that share BatchNorm's statistics, for hosts with slow links between them. Without it: all."""

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
    """`auto` goes on with the run in the folder, if there is one; `never` deletes that run, once for each job, and
    starts afresh."""

    accept_changed_data: bool = False
    """Go on with a run although its images are not those that it began with."""

    checkpoint_minutes: float = 10.0
    """Time between checkpoints, beside those at the ends of epochs."""

    timeout: float = 600.0
    """Seconds that a process waits for the others, or for images, before it ends with an error."""

    dry_run: bool = False
    """Show what would be trained, its memory and communication, and stop."""

    link: float | None = None
    """For --dry-run: GB/s that a GPU can send to others. Without it: 450 (NVLink of an H100) within a host, 50 (400
    Gbit/s InfiniBand for each GPU) across hosts."""

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

    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    """torch.compile for the network, by its modes; `reduce-overhead` replays CUDA graphs."""

    evaluations: int = 5
    """kNN evaluations during the run, evenly spaced; the last one comes at its end."""

    knn_every: int | None = None
    """Epochs from one kNN evaluation to the next, in place of --evaluations; one comes at the run's end too."""

    online_linear: bool = False
    """Train a linear classifier on the encoder's features beside it, which changes nothing of the encoder; its accuracy
    on the training views is shown. Needs labels."""

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "image_size", "ranks", "evaluations"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("batch", self.batch >= 2, "at least 2: a batch of 1 has no negatives")
        self._require("epochs", self.epochs <= MOST_EPOCHS, f"at most {MOST_EPOCHS:,}")
        for name, value in dataclasses.asdict(self).items():
            self._require(name, not isinstance(value, float) or math.isfinite(value), "finite")
        for name in ("temperature", "width", "checkpoint_minutes", "timeout"):
            self._require(name, getattr(self, name) > 0, "positive")
        self._require("timeout", self.timeout <= MOST_S, f"at most {MOST_S:,} s")
        for name in ("gpus", "workers"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 0, "0 or more")
        self._require("workers", (self.workers or 0) <= MOST_THREADS, f"at most {MOST_THREADS:,}")
        chunks = self.accumulate if self.accumulate.isdecimal() else "1"
        self._require(
            "accumulate",
            self.accumulate in ("auto", chunks) and int(chunks) >= 1,
            "1 or a larger whole number, or `auto`",
        )
        self._require("accumulate", self.batch % max(1, int(chunks)) == 0, f"a divisor of the batch, {self.batch}")
        for name in ("bn_chunk", "bn_group", "link", "knn_every"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "positive")
        given = self.evaluations != Config.evaluations
        self._require("evaluations", self.knn_every is None or not given, "left out with --knn-every")
        self._require("bn_group", self.bn_group is None or self.bn_chunk is None, "left out with --bn-chunk")
        self._require("bn_chunk", self.bn_chunk is None or self.bn_chunk >= 2, "at least 2 images")
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
        neutral = {*NEUTRAL, *(("accumulate", "bn_group") if self.bn_chunk else ())}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in neutral}

    def folder(self) -> Path:
        """The run's folder."""
        if self.out is not None:
            return Path(self.out)
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]
        return Path("runs") / f"{Path(self.data).name.split('.')[0]}-{self.arch.replace(':', '-')}-{digest}"

    def evaluated(self) -> set[int]:
        """The epochs after which there is a kNN evaluation."""
        if self.knn_every is not None:
            return {*range(self.knn_every, self.epochs + 1, self.knn_every), self.epochs}
        return {round(self.epochs * k / self.evaluations) for k in range(1, self.evaluations + 1)}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Settings in which a saved config differs, as lines `name: saved -> ours`."""
        mine = self.settings()
        names = sorted({*mine, *other} - set(NEUTRAL) - (set() if "accumulate" in mine else {"accumulate", "bn_group"}))
        default = {field.name: field.default for field in dataclasses.fields(self)}
        theirs = {n: other.get(n, default.get(n)) for n in names}  # a flag that is newer than the run
        return [f"{n}: {theirs[n]!r} -> {mine.get(n)!r}" for n in names if mine.get(n) != theirs[n]]

    @classmethod
    def of(cls, values: dict[str, Any], source: str) -> Self:
        """A config from a mapping such as config.json holds, each value checked against the type of its field."""
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        hints = get_type_hints(cls)
        for name, value in values.items():
            choose("setting", name, fields, source)
            if get_origin(hints[name]) is Literal:
                choose(name, str(value), get_args(hints[name]), source)
                continue
            kinds = get_args(hints[name]) or (hints[name],)
            if type(value) not in kinds and not (float in kinds and type(value) is int):
                types = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
                raise ConfigError(f"{source}: {name} must be of type {types}, got {value!r}")
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
