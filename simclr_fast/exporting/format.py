"""What all formats have in common: the card that says what an encoder is, and what each format must be able to do."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import simclr_fast
from simclr_fast.config import ConfigError
from simclr_fast.data.policy import MAX_UNCROPPED
from simclr_fast.pretrained import EXPORTS, Encoder, Recipe

TOLERANCE = 1e-4  # of the features in another program, relative to the largest; float32
PROBES = 2  # images that the features are compared on


class Format:
    """A form that an encoder can be written in, without its projection head."""

    suffixes: tuple[str, ...] = ()
    """That the file's name may end with."""
    files: tuple[str, ...] = ()
    """Of the folder, where it is one."""

    def check(self, recipe: Recipe) -> None:
        """Whether the format can express the encoder; nothing is computed.

        Raises:
            ConfigError: it cannot, and what can; a package is missing.
        """

    def write(self, encoder: Encoder, path: Path, results: Sequence[dict[str, Any]]) -> str:
        """Write it under a name that is free.

        Args:
            results: evaluations of these very weights.
        Returns:
            What was checked, a sentence or nothing.
        Raises:
            ConfigError: what was written does not give the encoder's features.
        """
        raise NotImplementedError

    def usage(self, encoder: Encoder, path: Path) -> list[str]:
        """Lines of Python after which `model` is the encoder, or `model(images)` gives its features."""
        raise NotImplementedError


def needed(package: str, what: str) -> ModuleType:
    """A package that only exports need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{what} needs {package}; install it with: {EXPORTS}") from error


def exported_recipe(recipe: Recipe) -> Recipe:
    """Of the encoder alone."""
    return Recipe(**{name: value for name, value in dataclasses.asdict(recipe).items() if not name.startswith("head")})


def about(encoder: Encoder) -> dict[str, Any]:
    """What `load` needs beside the weights, and where these come from; JSON."""
    return {
        "recipe": dataclasses.asdict(exported_recipe(encoder.recipe)),
        "step": encoder.step,
        "trained_on": encoder.data,
        "weights": encoder.digest(),
        "version": simclr_fast.__version__,
    }


def card(encoder: Encoder) -> dict[str, str]:
    """Metadata for a file whose format has some, strings by strings; `simclr_fast` is what `load` reads."""
    known = about(encoder)
    return {
        "format": "pt",
        "simclr_fast": json.dumps(known),
        "arch": encoder.recipe.arch,
        "width": f"{encoder.recipe.width:g}",
        "variant": encoder.recipe.variant,
        "image_size": str(encoder.image_size),
        "num_features": str(encoder.num_features),
        "preprocessing": preprocessing_sentence(encoder),
        **{name: json.dumps(value) for name, value in preprocessing(encoder).items()},
        "step": "unknown" if encoder.step is None else str(encoder.step),
        "data": encoder.data or "unknown",
        "weights": known["weights"],
        "version": known["version"],
    }


def crop_share(encoder: Encoder) -> float:
    """Part of the shorter side that the central crop keeps."""
    return 1.0 if encoder.image_size <= MAX_UNCROPPED else encoder.policy.test_crop


def preprocessing(encoder: Encoder) -> dict[str, Any]:
    """By timm's names."""
    return {
        "crop_pct": crop_share(encoder),
        "interpolation": "bicubic",
        "mean": list(encoder.policy.mean),
        "std": list(encoder.policy.std),
    }


def preprocessing_sentence(encoder: Encoder) -> str:
    """For people."""
    size, policy = encoder.image_size, encoder.policy
    smooth = "antialiased" if policy.dialect == "torchvision" else "not antialiased"
    normal = f", minus {policy.mean}, over {policy.std}" if any(policy.mean) else ""
    share = f" of {crop_share(encoder):g} of the shorter side" if crop_share(encoder) < 1 else ""
    return f"RGB; the central square{share}, resized to {size} x {size} (bicubic, {smooth}); values in [0, 1]{normal}"


def weights(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's state dict, plain tensors on the CPU, none of which shares memory."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in encoder.network.state_dict().items()
    }


def probe(encoder: Encoder, count: int = PROBES) -> Tensor:
    """Images of noise [count, 3, S, S] that features are compared on."""
    shape = count, 3, encoder.image_size, encoder.image_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def shown(difference: float) -> str:
    """How close features are, for people."""
    return f"to {difference:.0e} of the largest" if difference else "bit for bit"


def compared(encoder: Encoder, images: Tensor, features: Tensor, where: str) -> float:
    """The largest difference from the encoder's features of the images, relative to the largest feature.

    Raises:
        ConfigError: it is over the tolerance.
    """
    with torch.no_grad():
        own = encoder(images)
    scale = max(float(own.abs().max()), torch.finfo(torch.float32).tiny)
    worst = float((features - own).abs().max()) / scale if features.shape == own.shape else float("inf")
    if not worst <= TOLERANCE:
        raise ConfigError(
            f"{where} does not give the encoder's features: they differ by {worst:.1e} of the largest, and "
            f"{TOLERANCE:.0e} is allowed; nothing was written"
        )
    return worst
