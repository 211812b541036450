"""The official TensorFlow checkpoints' variables as state dicts of our encoder and head.

Their layers have numbers in the order in which they are made; which network it was stands nowhere but in the shapes.
Source: github.com/google-research/simclr, resnet.py and model_util.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simclr_fast.config import ConfigError
from simclr_fast.models.heads import projection_head
from simclr_fast.models.resnet import ARCHS, STEMS, ResNet, resnet
from simclr_fast.models.sk import MIN_GATE, Select

SK_RATIO = 0.0625  # of all that are published
SLOT = re.compile(r"/(Momentum|LARSOptimizer|ExponentialMovingAverage|Adam)(_\d+)?$")  # of an optimiser
DROPPED = re.compile(
    r"(^|/)(head_supervised|supervised_head|global_step|save_counter|iterations?|learning_rate|decay|momentum)(:0|/|$)|"
    + SLOT.pattern
)
LAYER = re.compile(r"(?:^|/)(?:sync_)?(conv2d|batch_normalization|dense)(?:_(\d+))?/(\w+)$")
HEAD = re.compile(r"(?:^|/)(?:head_contrastive|projection_head)/n?l_(\d+)/")
STATISTICS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
Place = tuple[str, int, str]
"""(conv2d, batch_normalization, or head/ and the kind of its layer; its number; what the variable is of it)."""


class Target(NamedTuple):
    """Where a variable goes."""

    name: str  # in the state dict of encoder and head
    shape: tuple[int, ...]  # of TensorFlow's array

    def tensor(self, array: np.ndarray) -> Tensor:
        """The array in torch's layout."""
        values = torch.from_numpy(np.array(array, np.float32))
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(values.ndim)
        return (values.permute(axes) if axes else values).contiguous()


@dataclass(frozen=True)
class Imported:
    """A network with its weights."""

    recipe: dict[str, Any]
    """arch, width, stem, sk_ratio, head, head_layers, head_features."""
    state: dict[str, Tensor]
    """By our names, `encoder.` or `head.` before them; float32."""
    dropped: list[str]
    """Variables without a use: of the optimiser, of the supervised head, of the training."""


def imported(variables: Mapping[str, np.ndarray]) -> Imported:
    """Find the network that the variables are of, and give them our names.

    Args:
        variables: by TensorFlow's names; kernels [height, width, in, out] or [in, out].
    Raises:
        ConfigError: they are not those of an official network; what is missing, unknown or of another shape is named.
    """
    dropped = [name for name in variables if DROPPED.search(name)]
    rest = {name.removesuffix(":0"): array for name, array in variables.items() if name not in dropped}
    placed: dict[Place, str] = {}
    unknown = []
    for name in rest:
        place = _place(name)
        if place is None:
            unknown.append(name)
        elif place in placed:
            raise ConfigError(f"source must hold each variable once, got {placed[place]} and {name}")
        else:
            placed[place] = name
    shapes = {place: tuple(rest[name].shape) for place, name in placed.items()}
    recipe, targets = _nearest(shapes)
    faults = {
        "is missing": [_named(place) for place in targets if place not in placed],
        "is unknown": unknown + [name for place, name in placed.items() if place not in targets],
        "has other shapes": [
            f"{name} {list(shapes[place])} instead of {list(targets[place].shape)}"
            for place, name in placed.items()
            if place in targets and shapes[place] != targets[place].shape
        ],
        "has values that are not finite": [name for name, array in rest.items() if not np.isfinite(array).all()],
    }
    if found := [f"{what}: {_listed(names)}" for what, names in faults.items() if names]:
        sk = ", selective kernels" if recipe["sk_ratio"] else ""
        raise ConfigError(
            f"source must hold the variables of an official network; of the nearest, {recipe['arch']} (width "
            f"{recipe['width']:g}, {recipe['stem']} stem{sk}), {'; '.join(found)}"
        )
    state = {targets[place].name: targets[place].tensor(rest[name]) for place, name in placed.items()}
    return Imported(recipe, state, dropped)


def _place(name: str) -> Place | None:
    found, head = LAYER.search(name), HEAD.search(name)
    if found is None:
        return None
    kind, number, variable = found[1], int(found[2] or 0), found[3]
    if head is not None:
        return f"head/{kind}", int(head[1]), variable
    return None if kind == "dense" else (kind, number, variable)


def _named(place: Place) -> str:
    kind, number, variable = place
    if kind.startswith("head/"):
        return f"head_contrastive/nl_{number}/{kind.removeprefix('head/')}/{variable}"
    return f"base_model/{kind}{f'_{number}' if number else ''}/{variable}"


def _nearest(shapes: dict[Place, tuple[int, ...]]) -> tuple[dict[str, Any], dict[Place, Target]]:
    """The network that shares most of its variables with those of these shapes, and what these should be."""
    first = shapes.get(("conv2d", 0, "kernel"), ())
    if len(first) != 4:
        raise ConfigError(
            "source must hold variables of an official network (base_model/conv2d/kernel, ...), and it has no first "
            "convolution"
        )
    head, count = _head(shapes), 1 + max(number for kind, number, _ in shapes if kind == "conv2d")
    candidates = _candidates("imagenet" if first[0] == 7 else None)
    least = min(abs(found - count) for *_, found in candidates)
    best: tuple[int, dict[str, Any], dict[Place, Target]] | None = None
    for arch, stem, sk, convolutions in candidates:
        if abs(convolutions - count) > least:
            continue
        width = max(first[3] / 64 * (2 if sk and stem == "imagenet" else 1), 1 / 64)
        recipe = dict(arch=arch, width=width, stem=stem, sk_ratio=_sk_ratio(shapes, width) if sk else 0.0)
        targets = _targets(recipe, head)
        wrong = sum(place not in targets or targets[place].shape != shape for place, shape in shapes.items())
        wrong += sum(place not in shapes for place in targets)
        if best is None or wrong < best[0]:
            best = wrong, recipe | head, targets
    assert best is not None
    return best[1], best[2]


def _candidates(plain: str | None) -> list[tuple[str, str, bool, int]]:
    """(arch, stem, whether with selective kernels, how many convolutions) of the official networks.

    Args:
        plain: the only stem to look for, and none of ResNet-D's; None where it is neither of those.
    """
    found = []
    for arch, kind in ARCHS.items():
        if kind.stem is not None:
            continue
        blocks, groups = sum(kind.depths), len(kind.depths)
        for stem in STEMS:
            if (plain or "small") == stem:
                found.append((arch, stem, False, 1 + blocks * (3 if kind.bottleneck else 2) + groups))
            if kind.bottleneck and plain is None:
                found.append((arch, stem, True, (3 if stem == "imagenet" else 1) + blocks * 5 + groups))
    return found


def _head(shapes: dict[Place, tuple[int, ...]]) -> dict[str, Any]:
    kernels = {number: shape for (kind, number, _), shape in shapes.items() if kind == "head/dense" and len(shape) == 2}
    if not kernels:
        return dict(head="none", head_layers=2, head_features=128)
    layers = max(kernels) + 1
    return dict(head="linear" if layers == 1 else "nonlinear", head_layers=max(layers, 2),
                head_features=kernels[max(kernels)][1])  # fmt: skip


def _sk_ratio(shapes: dict[Place, tuple[int, ...]], width: float) -> float:
    """From the last gate, the only one whose width is not the least in the networks of width 1."""
    last = max(number for kind, number, _ in shapes if kind == "conv2d")
    gate = shapes.get(("conv2d", last - 1, "kernel"), (0,))
    return gate[2] / (512 * width) if len(gate) == 4 and gate[2] >= MIN_GATE else SK_RATIO


def _targets(recipe: dict[str, Any], head: dict[str, Any]) -> dict[Place, Target]:
    """Where each variable of a network goes."""
    with torch.device("meta"):
        encoder = resnet(**recipe, variant="official")
        top = projection_head(head["head"], encoder.num_features, layers=head["head_layers"],
                              out_features=head["head_features"])  # fmt: skip
    found: dict[Place, Target] = {}
    convs = norms = 0
    names = {module: name for name, module in encoder.named_modules()}
    for module in _in_order(encoder):
        if isinstance(module, nn.Conv2d):
            found |= _of(module, "conv2d", convs, f"encoder.{names[module]}")
            convs += 1
        else:
            found |= _of(module, "batch_normalization", norms, f"encoder.{names[module]}")
            norms += 1
    linear = norm = 0
    for name, module in top.named_children():
        if isinstance(module, nn.Linear):
            found |= _of(module, "head/dense", linear, f"head.{name}")
            linear += 1
        elif isinstance(module, nn.BatchNorm1d):
            found |= _of(module, "head/batch_normalization", norm, f"head.{name}")
            norm += 1
    return found


def _of(module: nn.Module, kind: str, number: int, name: str) -> dict[Place, Target]:
    """The variables of one layer."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        weight = module.weight
        axes = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
        return {(kind, number, "kernel"): Target(f"{name}.weight", tuple(weight.shape[axis] for axis in axes))}
    tensors = module.state_dict()
    return {
        (kind, number, theirs): Target(f"{name}.{ours}", tuple(tensors[ours].shape))
        for theirs, ours in STATISTICS.items()
        if ours in tensors
    }


def _in_order(encoder: ResNet) -> Iterable[nn.Module]:
    """Convolutions and normalisations as TensorFlow makes them: in a block the shortcut comes first."""
    parts: list[nn.Module] = [encoder.conv1, encoder.bn1]
    for group in encoder.groups:
        for block in getattr(encoder, group):
            select = getattr(block, "select", nn.Identity())
            gate = [select.reduce, select.bn, select.expand] if isinstance(select, Select) else []
            parts += [block.downsample, block.conv1, block.bn1, block.conv2, block.bn2, *gate]
            parts += [block.conv3, block.bn3] if block.bottleneck else []
    for part in parts:
        yield from (m for m in part.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d))


def _listed(names: list[str]) -> str:
    """The number of names, and the first few."""
    return f"{len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
