"""Encoders of timm, the PyTorch Image Models: `timm:NAME`. timm is imported when a name asks for it, not before.

Source: github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import copy
import difflib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast.config import ConfigError

PREFIX = "timm:"
NEEDED = "timm>=1.0.26"


def load_timm(arch: str) -> ModuleType:
    """The package timm, which `arch` asks for.

    Raises:
        ConfigError: it is not installed, or not for this torch.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"arch={arch} needs timm ({error}); install it with: pip install '{NEEDED}'") from error
    return timm


def check_timm(arch: str) -> None:
    """Whether timm has the model that `timm:NAME`, or `timm:NAME.TAG`, names; it is not built.

    Raises:
        ConfigError: it has not, and the nearest names; timm missing.
    """
    timm = load_timm(arch)
    name = arch.removeprefix(PREFIX)
    plain, _, tag = name.partition(".")
    names = timm.list_models(f"{plain}.*", include_tags=True) if tag else timm.list_models()
    if name in names:
        return
    near = difflib.get_close_matches(name, names or timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(PREFIX + other for other in near)}?" if near else ""
    raise ConfigError(f"arch must be a name of timm {timm.__version__}'s behind {PREFIX!r}, got {arch!r}{hint}")


def timm_encoder(arch: str, image_size: int) -> nn.Module:
    """Build timm's model without its classifier, with new weights.

    Args:
        arch: `timm:NAME`, checked by `check_timm`.
        image_size: side of the images in pixels; a model whose size is fixed is built for it.
    Returns:
        timm's module, with `image_size`: images [B, 3, image_size, image_size] to features [B, num_features], as a
        pass over the model has shown.
    Raises:
        ConfigError: it does not take images of this size, or gives something else than one vector for an image.
    """
    timm = load_timm(arch)
    try:
        model = _created(arch, image_size, num_classes=0)
        output = _output(model, image_size)
    except Exception as error:  # what models say of a size that does not suit them is of any kind
        raise ConfigError(f"{arch=} does not take images of {image_size=}: {first_line(error)}") from error
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, timm.layers.PatchEmbed) and any(image_size % side for side in embed.patch_size):
        patch = embed.patch_size[0]  # what is left over at the border, timm ignores
        raise ConfigError(f"image_size must be a multiple of {patch}, the patches of {arch}, got {image_size=}")
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = f"of shape {list(output.shape)}" if isinstance(output, Tensor) else f"of type {type(output).__name__}"
        raise ConfigError(f"arch must give one vector for an image, and for 2 images {arch} gives an output {got}")
    model.num_features = output.shape[1]  # of some, timm's figure is that before the last hidden layer
    model.image_size = image_size
    return model


def check_pretrained(arch: str) -> None:
    """Whether timm publishes weights of the model; nothing is fetched.

    Raises:
        ConfigError: it does not, or the arch is not timm's.
    """
    if not arch.startswith(PREFIX):
        raise ConfigError(f"init=timm needs an arch of timm's, {PREFIX}NAME, got {arch=}")
    if not load_timm(arch).models.is_model_pretrained(arch.removeprefix(PREFIX)):
        raise ConfigError(f"init=timm has no weights of arch={arch}")


def pretrained(arch: str, image_size: int) -> tuple[str, dict[str, Tensor]]:
    """The weights that timm publishes, those of the classifier too, resized by timm for images of this size.

    Returns:
        (what they are, tensors by the model's names)
    Raises:
        ConfigError: what `check_pretrained` refuses; they cannot be fetched, or are not complete.
    """
    check_pretrained(arch)
    try:
        # With the classifier they were trained with, timm insists on all of the weights.
        model = _created(arch, image_size, pretrained=True)
    except Exception as error:  # of the network, the disk or the file
        raise ConfigError(
            f"init=timm cannot fetch the weights of {arch}: {first_line(error)}; where there is no network, give the "
            "path of a file"
        ) from error
    return f"timm's {model.pretrained_cfg['architecture']}.{model.pretrained_cfg['tag']}", model.state_dict()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error) or repr(error)).strip().split("\n")[0].removesuffix(".")


def _created(arch: str, image_size: int, **options: Any) -> Any:
    """timm's model, built for images of this size if its size is fixed."""
    timm, name = load_timm(arch), arch.removeprefix(PREFIX)
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    return timm.create_model(name, **options)


def _output(model: nn.Module, image_size: int) -> Any:
    """What two images become in training, shapes alone: it takes no time, no random numbers and moves no statistics."""
    shapes = copy.deepcopy(model).to("meta")
    return shapes(torch.empty(2, 3, image_size, image_size, device="meta"))
