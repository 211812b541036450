"""The engine for where DALI cannot be had: Pillow decodes, torchvision makes the views, in worker processes."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from simclr_fast.data.engines.feed import Feed, Plan, Settings
from simclr_fast.data.policy import Policy
from simclr_fast.data.reference import view
from simclr_fast.data.sources import DataError, Split


def run(
    split: Split, policy: Policy, steps: range, plan: Plan, device: torch.device, dtype: torch.dtype, settings: Settings
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Make what is planned for each step: (views, indices), as `train_views` gives them."""
    loader = DataLoader(
        _Steps(split, policy, steps, plan),
        batch_size=None,
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, so that the global one stays as it is
        worker_init_fn=_stay,
    )
    try:
        for views, indices in loader:
            yield [view.permute(0, 3, 1, 2).to(device, dtype, non_blocking=True) for view in views], indices.numpy()
    except DataError as error:  # a worker's comes with its traceback as the text
        raise DataError(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        ) from None


def _stay(_: int) -> None:
    """Signals to a group of processes are for the trainer, which ends its workers after its checkpoint."""
    for name in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(120))


class _Steps(Dataset):
    """Whole batches: the k-th item is (views, each float32 [B, S, S, 3], indices) of the k-th step."""

    def __init__(self, split: Split, policy: Policy, steps: range, plan: Plan) -> None:
        self.split, self.policy, self.steps, self.plan = split, policy, steps, plan

    @cached_property
    def feed(self) -> Feed:
        """Of this process: a lock does not travel."""
        return Feed(self.split, self.plan, Settings().meter)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, k: int) -> tuple[list[Tensor], np.ndarray]:
        images, batch = self.feed.decoded(self.steps[k], decode)
        policy, packed = self.policy, [one.packed() for one in batch.params]
        views = [torch.empty(len(images), policy.size, policy.size, 3) for _ in packed]
        for row, image in enumerate(images):
            pixels = F.to_dtype(image, torch.float32, scale=True)
            for out, rows in zip(views, packed, strict=True):
                out[row] = view(pixels, rows[row], policy.size, True, *policy.constants).permute(1, 2, 0)
        return views, batch.indices


def decode(encoded: np.ndarray) -> Tensor:
    """uint8 [3, H, W], not rotated by EXIF."""
    image: Image.Image = Image.open(io.BytesIO(encoded.data))
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return F.pil_to_tensor(image.convert("RGB"))
