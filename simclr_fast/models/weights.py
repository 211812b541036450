"""Weights that an encoder starts from: of a run, of a file, or those that torchvision and timm publish.

Everything is checked before the first tensor is copied, so that an encoder gets all of its weights or keeps its own.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from simclr_fast.config import ConfigError
from simclr_fast.models.timm_encoder import PREFIX, check_pretrained, first_line, pretrained

PUBLISHED = ("torchvision", "timm")
LAST = "checkpoints/last.pt"  # of a run
KEYS = ("method", "state_dict", "model")  # under which checkpoints hold their weights; ours is the first
WRAPPERS = ("module.", "_orig_mod.", "model.", "encoder.", "encoder_q.", "base_encoder.", "backbone.")
SAFETENSORS = ".safetensors"
COUNTER = "num_batches_tracked"  # of BatchNorm: old files lack it, and nothing depends on it


def check_init(source: str, arch: str) -> None:
    """Whether there is something to load; nothing is read or fetched.

    Args:
        source: what `load_weights` takes.
        arch: as for `encoder`.
    Raises:
        ConfigError: no such path, a folder without checkpoints, or no published weights of this arch.
    """
    if source == "torchvision":
        _torchvision_weights(arch)
    elif source == "timm":
        check_pretrained(arch)
    else:
        path = _file(source)
        if path.suffix == SAFETENSORS:
            _safetensors(path)


def load_weights(encoder: nn.Module, source: str, arch: str) -> str:
    """Give an encoder its first weights.

    Args:
        encoder: made by `encoder`, on any device.
        source: a run's folder, of which the last checkpoint is taken; a file with a checkpoint of ours or a state dict,
            in torch's format or safetensors, also below `state_dict`, `model` or the prefixes of DDP, MoCo and others;
            `torchvision` or `timm` for their default ImageNet weights, fetched once.
        arch: the encoder's, as for `encoder`.
    Returns:
        A sentence that says what was loaded, and what of it was not used.
    Raises:
        ConfigError: what `check_init` refuses; a file that cannot be read, or that would run code; no network; weights
            that are missing, of other shapes or not finite, or layers that the encoder lacks. The encoder is then as
            it was.
    """
    origin, loaded = _read(encoder, source, arch)
    weights, unused = _chosen(encoder, loaded, f"init={source} must hold weights of arch={arch}, and {origin}")
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name in weights:
                tensor.copy_(weights[name])
    rest = f"; not used: {_listed(unused)}" if unused else ""
    return f"the encoder starts from {origin}, {len(weights):,} tensors{rest}"


def _read(encoder: nn.Module, source: str, arch: str) -> tuple[str, dict[str, Tensor]]:
    """(what it is, all tensors of it)."""
    if source == "torchvision":
        return _torchvision_state(arch)
    if source == "timm":
        return pretrained(arch, cast(int, encoder.image_size))
    path = _file(source)
    loaded = _safetensors_file(path) if path.suffix == SAFETENSORS else _torch_file(path)
    for key in KEYS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    entries = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f"init must be a checkpoint or a state dict, and {path} holds no named tensors")
    return str(path), tensors


def _torchvision_state(arch: str) -> tuple[str, dict[str, Tensor]]:
    weights = _torchvision_weights(arch)
    try:
        state = weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the disk or the file
        raise ConfigError(
            f"init=torchvision cannot fetch {weights}: {first_line(error)}; where there is no network, copy "
            f"{weights.url} into {torch.hub.get_dir()}/checkpoints, or give its path"
        ) from error
    return f"torchvision's {weights}", state


def _torchvision_weights(arch: str) -> Any:
    import torchvision

    if arch.startswith(PREFIX):
        raise ConfigError(f"init must be timm or a path for an arch of timm's, got init=torchvision, {arch=}")
    try:
        return torchvision.models.get_model_weights(arch).DEFAULT
    except ValueError as error:
        raise ConfigError(f"init=torchvision has no weights of arch={arch}") from error


def _file(source: str) -> Path:
    """The file that a path stands for."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / LAST).is_file():
            raise ConfigError(f"init must be a run's folder or a file, and {source} has no {LAST}")
        return path / LAST
    if not path.is_file():
        near = difflib.get_close_matches(source, PUBLISHED, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"init must be {', '.join(PUBLISHED)} or a path that exists, got {source!r}{hint}")
    return path


def _torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ConfigError(f"init cannot be read, {path}: it is damaged, or no file of torch's") from error
        raise ConfigError(
            f"init must hold nothing but weights, and {path} asks for {code[1]}; save its state_dict() alone"
        ) from error
    except Exception as error:  # torch raises a dozen kinds for damaged files
        raise ConfigError(f"init cannot be read, {path}: it is damaged, or no file of torch's") from error


def _safetensors(path: Path) -> Callable[[Path], dict[str, Tensor]]:
    """What reads the file."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigError(f"init={path} needs safetensors; install it with: pip install safetensors") from error
    return load_file


def _safetensors_file(path: Path) -> dict[str, Tensor]:
    read = _safetensors(path)
    try:
        return read(path)
    except Exception as error:  # the package has its own kinds
        raise ConfigError(f"init cannot be read, {path}: {first_line(error)}") from error


def _chosen(encoder: nn.Module, loaded: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """(the encoder's weights by its own names, the names of what else was loaded); all is checked."""
    own = encoder.state_dict()
    prefix = _prefix(own, loaded)
    weights = {name: loaded[prefix + name] for name in own if prefix + name in loaded}
    used = {prefix + name for name in weights}
    unused = [name for name in loaded if name not in used]
    remade = dict(encoder.named_buffers())  # also those that no state dict of today holds
    inside = [name.removeprefix(prefix) for name in unused if name.startswith(prefix)]
    faults = {
        "does not have": [name for name in own if name not in weights and not name.endswith(COUNTER)],
        "has other shapes of": [
            f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
            for name, value in weights.items()
            if value.shape != own[name].shape
        ],
        "has other types of": [
            f"{name} {value.dtype}"
            for name, value in weights.items()
            if value.is_floating_point() != own[name].is_floating_point()
        ],
        "has layers that the encoder lacks:": [
            name for name in inside if name not in remade and _is_layer(encoder, name)
        ],
        "has values that are not finite in": [name for name, value in weights.items() if not value.isfinite().all()],
    }
    found = [f"{what} {_listed(names)}" for what, names in faults.items() if names]
    if found:
        raise ConfigError(f"{source} {'; '.join(found)}{_hint(own, weights)}")
    return weights, unused


def _prefix(own: dict[str, Tensor], loaded: dict[str, Tensor]) -> str:
    """What known wrappers have put before the encoder's names; the first of those that fit most of them."""
    found = [""]
    for prefix in found:
        found += [prefix + wrapper for wrapper in WRAPPERS if any(n.startswith(prefix + wrapper) for n in loaded)]
    return max(found, key=lambda prefix: sum(prefix + name in loaded for name in own))


def _is_layer(encoder: nn.Module, name: str) -> bool:
    """Whether a tensor that the encoder lacks would lie in a part of it that has tensors, as no classifier does."""
    module = encoder
    for part in name.split(".")[:-1]:
        child = module._modules.get(part)
        if child is None:
            break
        module = child
    return module is not encoder and bool(module.state_dict())


def _hint(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """What mostly is the matter with a ResNet."""
    name = "conv1.weight"
    if name not in weights or weights[name].ndim != 4:
        return ""
    ours, theirs = own[name].shape, weights[name].shape
    if ours[2:] != theirs[2:]:
        return (
            f". Its first convolution is {theirs[2]}x{theirs[3]}, here it is {ours[2]}x{ours[3]}: ResNets have 3x3 for "
            "--image-size up to 32, and 7x7 above"
        )
    if ours[0] != theirs[0]:
        return f". It begins with {theirs[0]} channels, here there are {ours[0]}: --width differs"
    return ""


def _listed(names: list[str]) -> str:
    """The number of names, and the first few."""
    return f"{len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
