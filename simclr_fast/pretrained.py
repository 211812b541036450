"""A trained encoder with its preprocessing, taken from a run, a file, or what `export` wrote: `load`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor, nn

from simclr_fast import checkpoint, methods
from simclr_fast.config import ConfigError, choose
from simclr_fast.data import Policy
from simclr_fast.models import check_arch, encoder, projection_head, resnet
from simclr_fast.models.weights import PUBLISHED, SAFETENSORS, load_weights

RUN = ("checkpoints", "config.json")  # what a run's folder holds
MODEL = "model.safetensors"  # in an exported folder
EXPORTS = "pip install 'simclr_fast[export]'"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an encoder is made of and how its images are prepared."""

    arch: str
    width: float = 1.0
    image_size: int = 224
    variant: str = "torchvision"
    """`official` has TensorFlow's layers; see `models.resnet`."""
    sk_ratio: float = 0.0
    """Of the selective kernels of `official`; 0 is none."""
    dialect: str = "torchvision"
    """Of the preprocessing: `torchvision` subtracts ImageNet's mean, `tf` leaves values in [0, 1]."""
    head: str = "none"
    head_layers: int = 2
    head_features: int = 128

    @property
    def policy(self) -> Policy:
        """Whose `center` is the preprocessing."""
        return Policy(self.image_size, dialect=cast(Any, self.dialect))

    def network(self) -> nn.Module:
        """The encoder with new weights."""
        if self.variant == "torchvision":
            return encoder(self.arch, width=self.width, image_size=self.image_size)
        stem: Any = "small" if self.image_size <= 32 else "imagenet"
        return resnet(self.arch, width=self.width, stem=stem, variant=cast(Any, self.variant), sk_ratio=self.sk_ratio)


class Encoder(nn.Module):
    """Prepared images [B, 3, S, S] to features h [B, num_features]; `head` maps these to embeddings."""

    def __init__(self, recipe: Recipe, origin: str, step: int | None = None, data: str = "") -> None:
        """Of the recipe, with new weights.

        Args:
            origin: where its weights come from, for messages and records.
            step: of the training, that they were taken at.
            data: name of what they were trained on, where it is known.
        """
        super().__init__()
        self.recipe, self.origin, self.step, self.data = recipe, origin, step, data
        self.network = recipe.network()
        self.num_features = cast(int, self.network.num_features)
        self.head = projection_head(
            cast(Any, recipe.head), self.num_features, out_features=recipe.head_features, layers=recipe.head_layers
        )
        self.image_size, self.policy = recipe.image_size, recipe.policy

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def preprocess(self, image: Any) -> Tensor:
        """What `forward` takes of one image: its central crop, resized and normalised, [3, S, S] float32.

        Args:
            image: a path, a Pillow image, or uint8 [H, W, 3]; not rotated by EXIF.
        Raises:
            ValueError: it is none of these.
        """
        from torchvision.transforms.v2 import functional as F

        from simclr_fast.data.engines.torchvision_engine import decode
        from simclr_fast.data.reference import view

        if isinstance(image, str | Path):
            pixels = decode(np.fromfile(image, np.uint8))
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
        elif hasattr(image, "save"):
            file = io.BytesIO()
            (image if image.mode.startswith("I") else image.convert("RGB")).save(file, "PNG")
            pixels = decode(np.frombuffer(file.getvalue(), np.uint8))
        else:
            got = f"{image.dtype} {list(image.shape)}" if hasattr(image, "shape") else type(image).__name__
            raise ValueError(f"image must be a path, a Pillow image or uint8 [H, W, 3], got {got}")
        (row,) = self.policy.center(np.array([pixels.shape[1:]], np.int64)).packed()
        return view(F.to_dtype(pixels, torch.float32, scale=True), row, self.image_size, True, *self.policy.constants)

    def digest(self) -> str:
        """Of the encoder's weights and statistics as they are now, 16 hexadecimal digits."""
        found = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class EncoderFlags:
    """Flags that name an encoder."""

    checkpoint: str
    """The encoder: a run's folder, of which the last checkpoint is taken; a checkpoint file; what `export` wrote as
    safetensors or huggingface; or, with --arch, any file of weights, `torchvision` or `timm`."""

    arch: str | None = None
    """For weights that do not say what they are of: torchvision's names, or timm:NAME."""

    width: float | None = None
    """With --arch: the factor on channel counts. Without it: 1."""

    image_size: int | None = None
    """Side of the images. Without it: the checkpoint's, or 224 with --arch."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            self.require(field.name, not isinstance(value, float) or math.isfinite(value), "finite")
        for name in ("width", "image_size"):
            self.require(name, getattr(self, name) is None or getattr(self, name) > 0, "positive")
        self.require("width", self.width is None or self.arch is not None, "left out without --arch")

    def require(self, name: str, holds: bool, rule: str) -> None:
        """
        Raises:
            ConfigError: `holds` is false.
        """
        if not holds:
            raise ConfigError(f"{name} must be {rule}, got {name}={getattr(self, name)}")

    def encoder(self) -> Encoder:
        """The encoder that the flags name, on the CPU."""
        given = {"arch": self.arch, "width": self.width, "image_size": self.image_size}
        return load(self.checkpoint, **{name: value for name, value in given.items() if value is not None})


def load(source: str | Path, **recipe: Any) -> Encoder:
    """A trained encoder in eval mode, on the CPU, with its preprocessing.

        encoder = load("runs/NAME")
        features = encoder(encoder.preprocess("image.jpg")[None])  # [1, encoder.num_features]

    Args:
        source: a run's folder, whose last checkpoint is taken; a checkpoint of a run; a file of `import_tf`; what
            `export` wrote as safetensors or huggingface; or, with `arch` given, what `models.weights.load_weights`
            takes: any file with weights of that network, `torchvision` or `timm`.
        recipe: fields of `Recipe`, for weights that do not say what they are of; of those that do, `image_size` may be
            another.
    Raises:
        ConfigError: there is no such file; it holds no settings of ours and no `arch` is given, or settings of which
            another field is given that differs; weights of another network.
        CheckpointError: a checkpoint that cannot be read, or an exported file whose weights are not those it was
            written with.
    """
    for name in recipe:
        choose("setting", name, [field.name for field in dataclasses.fields(Recipe)])
    if "arch" in recipe:
        check_arch(recipe["arch"], recipe.get("width", 1.0))
    path = None if str(source) in PUBLISHED else run_file(source)
    state = _held(path, recipe) if path else None
    if path is None or not _is_own(state):
        if "arch" in recipe:
            return _foreign(str(path or source), Recipe(**recipe))
        raise ConfigError(_unsaid(source, path, state, recipe))
    data = Path(str(state.get("trained_on") or _settings(state).get("data", ""))).name
    found = Encoder(_agreed(_recipe(state, path), recipe), str(path), state.get("step"), data)
    weights = state["method"]
    for module, prefix in (found.network, "encoder."), (found.head, "head."):
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            lines = " ".join(str(error).split())
            raise ConfigError(
                f"{path} must hold weights of {found.recipe.arch}, as its settings say: {lines}"
            ) from error
    if "weights" in state and state["weights"] != found.digest():
        raise checkpoint.CheckpointError(f"cannot read {path}: its weights do not match their checksum")
    return found.eval().requires_grad_(False)


def _held(path: Path, recipe: dict[str, Any]) -> Any:
    """What the file holds; nothing where it cannot be read as one of ours and the caller says what it is of."""
    try:
        return _state(path)
    except checkpoint.CheckpointError:
        if "arch" not in recipe:
            raise
        return None  # an older format of torch's, say


def _is_own(state: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it is a checkpoint of ours, or what `export` or `import_tf` wrote, and not another program's."""
    return isinstance(state, dict) and isinstance(state.get("method"), dict) and "arch" in _settings(state)


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """A recipe, or those of a run; nothing where there is none of these."""
    for name in ("recipe", "config"):
        if isinstance(found := state.get(name), dict):
            return found
    return {}


def _unsaid(source: str | Path, path: Path | None, state: Any, recipe: dict[str, Any]) -> str:
    """What is wrong with a source that does not say what it is of, where the caller does not either."""
    if recipe:
        return f"arch must be given for weights that do not say what they are of, got {recipe}"
    if path is None:
        rule = "checkpoint must be a run's folder or a checkpoint file that exists"
        return f"{rule}, got {str(source)!r}; other weights need --arch"
    rule = "checkpoint must hold a run's settings and its weights"
    if not isinstance(state, dict):
        return f"{rule}, and {path} holds a {type(state).__name__}"
    return f"{rule}, and {path} has no such settings: give --arch (and --width, --image-size) to say what it is of"


def _checkpoint(path: Path) -> Any:
    """A file of torch's; where it cannot be read, the error names those beside it."""
    try:
        return checkpoint.read(path)
    except checkpoint.CheckpointError as error:
        names = (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)
        others = [str(path.with_name(name)) for name in names if name != path.name and path.with_name(name).is_file()]
        if path.name not in names and isinstance(error.__cause__, zipfile.BadZipFile):
            raise checkpoint.CheckpointError(f"{error}; weights that are of no run need --arch") from error
        if path.name not in names or not others:
            raise
        raise checkpoint.CheckpointError(f"{error}; there is also {' and '.join(others)}") from error


def _agreed(own: Recipe, given: dict[str, Any]) -> Recipe:
    """What a checkpoint says of itself, with another image size if that is given.

    Raises:
        ConfigError: another field is given that differs.
    """
    for name, value in given.items():
        if name != "image_size" and getattr(own, name) != value:
            raise ConfigError(f"{name} must be that of the checkpoint, {getattr(own, name)}, got {name}={value}")
    return dataclasses.replace(own, image_size=given.get("image_size", own.image_size))


def _recipe(state: dict[str, Any], path: Path) -> Recipe:
    """What a checkpoint of ours says of its encoder.

    Raises:
        ConfigError: settings that this version does not know.
    """
    fields = {field.name for field in dataclasses.fields(Recipe)}
    known = saved = _settings(state)
    if saved is not state.get("recipe"):
        cfg = methods.load(saved.get("method", "simclr")).Config.of(saved, str(path))
        known = {name: value for name, value in dataclasses.asdict(cfg).items() if name in fields}
    if unknown := sorted(known.keys() - fields):
        raise ConfigError(f"{path} has settings that this version does not know: {', '.join(unknown)}")
    check_arch(known["arch"], known.get("width", 1.0))
    return Recipe(**known)


def run_folder(source: str | Path) -> Path | None:
    """The run that this is the folder or one of the `checkpoints` of, or None."""
    if str(source) in PUBLISHED:
        return None
    folder = Path(source).expanduser()
    inside = Path(os.path.abspath(folder)).parent  # of `last.pt` too, said within it
    if inside.name == RUN[0] and not folder.is_dir():
        folder = folder.parent.parent if folder.parent.name == RUN[0] else inside.parent
    return folder if (folder / RUN[0]).is_dir() and (folder / RUN[1]).is_file() else None


def run_file(source: str | Path) -> Path | None:
    """The checkpoint file that a run's folder or a path stands for, or None.

    Raises:
        ConfigError: a folder without a checkpoint.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        last = path / RUN[0] / checkpoint.LAST
        for file in (last, path / MODEL):
            if file.is_file():
                return file
        if (path / RUN[1]).is_file():
            raise ConfigError(
                f"checkpoint must be a run that has written one, and {path} has no {RUN[0]}/{last.name} yet"
            )
        raise ConfigError(f"checkpoint must be a run's folder or a file, and {path} has no {RUN[0]}/{last.name}")
    return path if path.is_file() else None


def _state(path: Path) -> Any:
    """What a checkpoint, or an exported file, holds, as `load` takes it."""
    if path.suffix != SAFETENSORS:
        return _checkpoint(path)
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ConfigError(f"checkpoint={path} needs safetensors; install it with: {EXPORTS}") from error
    try:
        with safe_open(path, "pt") as file:
            card = file.metadata() or {}
            weights = {f"encoder.{name}": file.get_tensor(name) for name in file.keys()}
        if "simclr_fast" in card:
            about = json.loads(card["simclr_fast"])
        else:  # written anew by a program that knows no cards
            config = path.with_name(RUN[1])
            about = json.loads(config.read_text("utf-8")).get("simclr_fast", {}) if config.is_file() else {}
    except Exception as error:  # the package has its own kinds
        raise checkpoint.CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return {**(about if isinstance(about, dict) else {}), "method": weights}


def _foreign(source: str, recipe: Recipe) -> Encoder:
    found = Encoder(recipe, source)
    try:
        load_weights(found.network, source, recipe.arch)
    except ConfigError as error:  # which speaks of the trainer's flag
        raise ConfigError(str(error).replace("init", "checkpoint", 1)) from error
    return found.eval().requires_grad_(False)
