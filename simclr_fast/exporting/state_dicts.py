"""State dicts that load strictly into torchvision's and timm's own models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simclr_fast.config import ConfigError
from simclr_fast.exporting.format import Format, compared, probe, shown, weights
from simclr_fast.exporting.target import write_state
from simclr_fast.models import SMALL_IMAGE
from simclr_fast.models.resnet import ARCHS
from simclr_fast.models.timm_encoder import PREFIX, load_timm
from simclr_fast.pretrained import Encoder, Recipe

OTHERS = "safetensors, onnx and huggingface"
THEIRS = [arch for arch, kind in ARCHS.items() if kind.stem is None]


def misfit(recipe: Recipe) -> str:
    """What of an encoder torchvision's and timm's ResNets cannot express, or nothing."""
    if recipe.arch.startswith(PREFIX):
        return ""
    if recipe.arch not in THEIRS:
        return f"arch={recipe.arch}, which only this project has"
    if recipe.width != 1:
        return f"width={recipe.width:g}, for theirs have width 1"
    if recipe.sk_ratio:
        return f"selective kernels, sk_ratio={recipe.sk_ratio:g}"
    if recipe.variant == "official" and not ARCHS[recipe.arch].bottleneck:
        return f"variant=official of {recipe.arch}, for its first group has a projection that theirs lack"
    return ""


def differs(recipe: Recipe) -> str:
    """Which layer before the blocks is not that of a new ResNet of theirs: the `stem`, the `pool`, or none."""
    if recipe.arch.startswith(PREFIX):
        return ""
    if recipe.image_size <= SMALL_IMAGE:
        return "stem"
    # TensorFlow pads even maps after the image only; odd ones get the same padding from both.
    return "pool" if recipe.variant == "official" and -(-recipe.image_size // 2) % 2 == 0 else ""


def adjusted(model: Any, recipe: Recipe) -> list[str]:
    """Give a new ResNet of theirs the encoder's layers; returns the lines that do so."""
    match differs(recipe):
        case "stem":
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
            return [
                "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the stem for small images",
                "model.maxpool = torch.nn.Identity()",
            ]
        case "pool":
            model.maxpool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))
            return [
                "pad = torch.nn.ZeroPad2d((0, 1, 0, 1))  # as TensorFlow does",
                "model.maxpool = torch.nn.Sequential(pad, torch.nn.MaxPool2d(3, 2))",
            ]
    return []


class StateDict(Format):
    """Tensors by their names, in torch's format."""

    suffixes = (".pth", ".pt")
    name: str

    def check(self, recipe: Recipe) -> None:
        if what := misfit(recipe):
            raise ConfigError(
                f"format={self.name} cannot express {what}; it takes torchvision's layers ({', '.join(THEIRS)}; also "
                f"with the stem for small images); {OTHERS} take any encoder"
            )

    def model(self, recipe: Recipe) -> tuple[nn.Module, list[str]]:
        """Theirs, with new weights and without a classifier, and the lines that make it."""
        raise NotImplementedError

    def write(self, encoder: Encoder, path: Path, results: Sequence[dict[str, Any]]) -> str:
        state, recipe = weights(encoder), encoder.recipe
        # timm's other models may have tensors that no state dict holds; of ResNets, initial weights cost seconds.
        with torch.device("cpu" if recipe.arch.startswith(PREFIX) else "meta"):
            model, _ = self.model(recipe)
            adjusted(model, recipe)
        model.load_state_dict(state, assign=True)
        images = probe(encoder)
        with torch.no_grad():
            worst = compared(encoder, images, model.eval()(images), self.name)
        write_state(state, path)
        return f"checked: {self.name}'s model takes all of it and gives the encoder's features, {shown(worst)}"

    def usage(self, encoder: Encoder, path: Path) -> list[str]:
        loaded = f"torch.load({json.dumps(str(path))}, weights_only=True)"
        return [f"import torch, {self.name}", *self.made(encoder.recipe, loaded)]

    def made(self, recipe: Recipe, loaded: str) -> list[str]:
        """Lines that make the model and give it the weights that the expression `loaded` stands for."""
        with torch.device("meta"):
            model, lines = self.model(recipe)
            lines += adjusted(model, recipe)
        return [*lines, f"model.load_state_dict({loaded})", "model.eval()"]


class Torchvision(StateDict):
    """For `torchvision.models`, whose classifier `fc` gives way to the identity."""

    name = "torchvision"

    def check(self, recipe: Recipe) -> None:
        if recipe.arch.startswith(PREFIX):
            raise ConfigError(f"format=torchvision cannot express arch={recipe.arch}; timm, {OTHERS} do")
        super().check(recipe)

    def model(self, recipe: Recipe) -> tuple[nn.Module, list[str]]:
        import torchvision

        model = getattr(torchvision.models, recipe.arch)()
        model.fc = nn.Identity()
        return model, [f"model = torchvision.models.{recipe.arch}()", "model.fc = torch.nn.Identity()"]


class Timm(StateDict):
    """For `timm.create_model(NAME, num_classes=0)`."""

    name = "timm"

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        load_timm(recipe.arch)

    def model(self, recipe: Recipe) -> tuple[nn.Module, list[str]]:
        timm = load_timm(recipe.arch)
        name, options = timm_name(recipe), timm_options(recipe)
        given = "".join(f", {key}={value}" for key, value in options.items())
        return timm.create_model(name, **options), [f'model = timm.create_model("{name}"{given})']


def timm_name(recipe: Recipe) -> str:
    """Of the model that has the encoder's layers; those of torchvision's ResNets have the same name."""
    return recipe.arch.removeprefix(PREFIX)


def timm_options(recipe: Recipe) -> dict[str, Any]:
    """For `timm.create_model`."""
    if not recipe.arch.startswith(PREFIX):
        return {"num_classes": 0}
    known = load_timm(recipe.arch).get_pretrained_cfg(timm_name(recipe))
    return {"num_classes": 0} | ({"img_size": recipe.image_size} if known and known.fixed_input_size else {})
