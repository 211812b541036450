"""What a step costs: operations, messages between ranks, and the time that was measured for it."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from simclr_fast.training.memory import rehearse

BENCH = Path(__file__).resolve().parents[2] / "bench" / "results" / "step.jsonl"  # of a checkout
BUCKET = 25 << 20  # bytes of gradients that DDP sends at a time
MOMENT_BYTES = 8  # BatchNorm's statistics are exchanged in float64 (on GPUs, those of the gradient in half of it)
FLAG_BYTES = 16
CASE = ("arch", "image_size", "precision", "contender", "data", "ranks")  # fields of a bench's line
BENCHED = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # at width 1


class Traffic(NamedTuple):
    """What each rank sends in a step."""

    what: str
    messages: int
    sent: int


class Speed(NamedTuple):
    """Images a second, and where they were measured."""

    images_per_s: float
    source: str
    whole: bool
    """Of all processes, with communication and input; else of one device, alone."""


def all_reduced(size: int, ranks: int) -> int:
    """Bytes that a rank sends for a ring's all-reduce of `size` bytes: 2 (R - 1) / R of them."""
    return 2 * (ranks - 1) * size // ranks


def norm_passes(chunks: int) -> int:
    """Passes in which each BatchNorm layer asks other ranks; a chunk but the last goes forward twice."""
    return 2 if chunks == 1 else 3 * chunks - 1


def traffic(
    *, world: int, gradients: int, batch: int, features: int, channels: Sequence[int], chunks: int = 1,
    feature_bytes: int = 4, norm_ranks: int = 1, flags: int = 1,
) -> list[Traffic]:  # fmt: skip
    """What each of `world` ranks sends in a step.

    Args:
        gradients: bytes.
        batch, features: images of the global batch; width of an embedding, of `feature_bytes` each.
        channels: of each BatchNorm layer; `norm_ranks` ranks share statistics.
        flags: messages of a few numbers: metrics, signals.
    """
    if world == 1:
        return []
    rows = 2 * batch * (world - 1) // world  # of the embeddings, and of the log-sum-exp of each
    found = [
        Traffic("gradients", -(-gradients // BUCKET), all_reduced(gradients, world)),
        Traffic("embeddings", 2, rows * (feature_bytes * features + 4)),
    ]
    if norm_ranks > 1:
        one_pass = sum(all_reduced(2 * MOMENT_BYTES * count, norm_ranks) for count in channels)
        passes = norm_passes(chunks)
        found.append(Traffic("BatchNorm", passes * len(channels), passes * one_pass))
    if norm_ranks < world and channels:
        found.append(Traffic("running statistics", 1, all_reduced(8 * sum(channels), world)))
    return [*found, Traffic("flags", flags, flags * all_reduced(FLAG_BYTES, world))]


def loss_flop(batch: int, features: int) -> int:
    """Operations of the loss of all ranks: three products of [2N, 2N, D], and view 1 times view 2 for the top-1."""
    return 26 * batch**2 * features


def benched(arch: str, width: float) -> bool:
    """Whether bench/step_bench.py trains this network."""
    return arch in BENCHED and width == 1


def bench_speed(
    *, device: str, arch: str, width: float, image_size: int, precision: str, images: int, path: Path = BENCH
) -> Speed | None:
    """The newest result of bench/step_bench.py for this network on such a device, at the batch nearest to `images`."""
    if not benched(arch, width):
        return None
    wanted = (_one(device), arch, image_size, precision, "simclr_fast", "synthetic", 1)
    best: tuple[float, Speed] | None = None
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        result = json.loads(line)
        if wanted != (_one(result.get("device", "")), *(result.get(name) for name in CASE)):
            continue
        if result.get("status", "ok") != "ok":
            continue
        distance = abs(math.log(result["batch"] / images))
        source = f"{path.name}, {result.get('date', 'no date')}, batch {result['batch']:,}"
        if best is None or distance <= best[0]:
            best = distance, Speed(result["images_per_s"]["p50"], source, whole=False)
    return best[1] if best else None


def _one(device: str) -> str:
    return re.sub(r"^\d+ x ", "", device)


def run_speed(records: Sequence[dict[str, Any]]) -> Speed | None:
    """The median of what the run itself has recorded."""
    found = [entry["images_per_s"] for entry in records if "images_per_s" in entry]
    return Speed(statistics.median(found), "the median of this run so far", whole=True) if found else None


class Network(NamedTuple):
    """What a plan has to know of a network."""

    encoder: int
    head: int
    """Parameters."""

    gradients: int
    """Bytes."""

    channels: tuple[int, ...]
    """Of each BatchNorm layer."""

    features: int
    """Of an embedding."""

    forward_flop: int
    flop: int
    """Operations for both views of an image: forward, and forward and backward."""


def step_flop(network: Network, chunks: int) -> float:
    """Operations for an image in a step; a chunk but the last goes forward twice."""
    return network.flop + network.forward_flop * (chunks - 1) / chunks


def network(method: Any, image_size: int) -> Network:
    """Of a module that has `encoder` and `head`; it stays as it is."""
    encoder, head = (sum(p.numel() for p in part.parameters()) for part in (method.encoder, method.head))
    gradients = sum(p.nbytes for p in method.parameters())
    channels = tuple(
        layer.num_features for layer in method.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    )
    seen = rehearse(method, image_size, views=4)
    return Network(encoder, head, gradients, channels, seen.features, seen.forward_flop // 2, seen.flop // 2)
