"""The memory of a step: counted before it is run, on tensors without data, or measured; and the chunk that fits.

Counted is what PyTorch's operators return while forward and backward pass run. Not counted is what they hold inside
(cuDNN's workspace, oneDNN's reordered copies), the allocator's gaps, the input pipeline and libraries; and a compiled
network may keep less.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from simclr_fast.config import ConfigError
from simclr_fast.models.batchnorm import share_scope

CPU_SHARE = 0.5  # of the free memory of a host: the data, and what is not counted, take some too
GPU_SPARE = 0.05  # of a GPU's memory, left free for NCCL, the decoder, and tensors that lie less well next time
LOSS_TILES = 2 << 20  # bytes; what the loss holds beside whole rows


@dataclass(frozen=True)
class Memory:
    """Bytes that a step takes on one device at its peak, by what they are for."""

    model: int
    """Weights and buffers, gradients, velocity."""

    activations: int
    """What autograd keeps of one chunk."""

    views: int
    """The images of a step, which all are held until it ends."""

    loss: int
    """Embeddings, those of all ranks, and their gradients."""

    workspace: int
    """Temporary tensors at the peak of the backward pass."""

    measured: bool = False
    """Whether the sum was measured; its parts are counted all the same."""

    @property
    def total(self) -> int:
        return self.model + self.activations + self.views + self.loss + self.workspace

    @property
    def indivisible(self) -> int:
        """What more chunks do not make smaller."""
        return self.model + self.views + self.loss

    def with_peak(self, peak: int) -> Memory:
        """With a measured sum: what it differs by is workspace, and where that is used up, activations."""
        rest = max(0, peak - self.indivisible)
        kept = min(self.activations, rest)
        return dataclasses.replace(self, activations=kept, workspace=rest - kept, measured=True)


class Rehearsal(NamedTuple):
    """A forward and backward pass on tensors without data."""

    activations: int
    """Bytes alive after the forward pass, beside weights and views."""

    workspace: int
    """Bytes by which the backward pass goes beyond that, whole gradients of weights left out."""

    forward_flop: int
    """Floating-point operations of convolutions and matrix products, a multiplication and an addition being two."""

    flop: int
    """The same of both passes."""

    features: int
    """Width of an embedding."""


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made within, while they live; views of `old` ones are none of them."""

    def __init__(self, old: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in old}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def rehearse(
    method: nn.Module, image_size: int, views: int, *, autocast: torch.dtype | None = None, pieces: int = 1
) -> Rehearsal:
    """Run `method`, views [B, 3, S, S] to embeddings, and its gradient on tensors that have shapes and no data.

    Args:
        method: stays as it is; other ranks are not asked.
        views: B, of one chunk. The result does not take longer for a larger one.
        autocast: dtype of autocast, or None.
        pieces: blocks of BatchNorm's statistics among these views.
    """
    device = next(method.parameters()).device
    with FakeTensorMode() as fake:
        held = chain(method.parameters(), method.buffers())
        alone = copy.deepcopy(method, {id(tensor): fake.from_tensor(tensor) for tensor in held}).train()
        share_scope(alone).pieces = pieces
        for weight in alone.parameters():
            weight.register_post_accumulate_grad_hook(_forget_gradient)
        images = torch.empty(views, 3, image_size, image_size, device=device, dtype=next(alone.parameters()).dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        old = chain(alone.parameters(), alone.buffers(), [images])
        with _Alive(old) as alive, FlopCounterMode(display=False) as flop:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                embeddings = alone(images)
            activations, forward_flop = alive.now, flop.get_total_flops()
            embeddings.backward(torch.empty_like(embeddings))
    workspace = alive.peak - activations
    return Rehearsal(activations, workspace, forward_flop, flop.get_total_flops(), embeddings.shape[1])


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None


def model_bytes(method: nn.Module) -> int:
    """Weights, buffers, gradients (which are views of DDP's buckets), velocity."""
    weights = sum(weight.nbytes for weight in method.parameters())
    return 3 * weights + sum(buffer.nbytes for buffer in method.buffers())


def loss_bytes(images: int, world: int, features: int) -> int:
    """What the loss takes, in float32: `images` pairs of `features` on each of `world` ranks."""
    own, every = 2 * images * features, 2 * images * world * features
    numbers = 4 * 2 * images * world  # a row's loss, log-sum-exp, gradient, pull
    return 4 * (3 * own + every + numbers) + LOSS_TILES  # embeddings, their gradient, the unit rows' gradient


def view_bytes(images: int, image_size: int, dtype: torch.dtype) -> int:
    """Both views of `images` images."""
    return 2 * images * 3 * image_size**2 * dtype.itemsize


def estimate(
    method: nn.Module,
    image_size: int,
    images: int,
    *,
    chunks: int = 1,
    world: int = 1,
    pieces: int = 1,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Memory:
    """What a step will take on each device, without running it; see above for what is left out.

    Args:
        images: of a rank in a step, in `chunks` chunks; `world` ranks.
        pieces: blocks of BatchNorm's statistics in a chunk of a rank.
        autocast, dtype: of the network's arithmetic (None: the weights'), and of the views.
    """
    chunk = images // chunks
    seen = rehearse(method, image_size, 2 * chunk, autocast=autocast, pieces=pieces)
    reordered = view_bytes(chunk, image_size, dtype) if pieces > 1 else 0
    return Memory(
        model=model_bytes(method),
        activations=seen.activations + reordered,
        views=view_bytes(images, image_size, dtype),
        loss=loss_bytes(images, world, seen.features),
        workspace=seen.workspace,
    )


def measured_peak(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that were allocated on a CUDA device while `step` ran, with all that was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def room_on(device: torch.device, free: int, ranks: int = 1) -> int:
    """Bytes that a rank's step may take.

    Args:
        free: bytes that are free on the host, of which a CPU's `ranks` get a share each; a GPU's are asked for here.
    """
    if device.type != "cuda":
        return int(free * CPU_SHARE / ranks)
    unused, total = torch.cuda.mem_get_info(device)
    return unused + torch.cuda.memory_reserved(device) - int(GPU_SPARE * total)


def tries(step: Callable[[int], object]) -> Callable[[int], bool]:
    """A `fits` for `largest_chunk` that runs `step(chunks)` on the current GPU and looks whether the memory suffices.

    The step must not wait for other ranks: one whose memory is short would leave them waiting.
    """

    def fits(chunks: int) -> bool:
        enough = True
        try:
            step(chunks)
            if torch.cuda.is_available():
                unused, total = torch.cuda.mem_get_info()
                enough = unused >= GPU_SPARE * total
        except torch.OutOfMemoryError:
            enough = False
        gc.collect()
        torch.cuda.empty_cache()
        return enough

    return fits


def largest_chunk(fits: Callable[[int], bool], images: int) -> int:
    """The fewest chunks that a rank's images have to be cut into, all of one size.

    Args:
        fits: whether a step in that many chunks fits; if it does, so do more. Asked a few times, of few chunks first.
    Raises:
        ConfigError: single images do not fit.
    """
    divisors = [chunks for chunks in range(1, images + 1) if images % chunks == 0]
    last, failed, asked = len(divisors) - 1, -1, 0
    while not fits(divisors[asked]):
        if asked == last:
            raise ConfigError(
                f"accumulate: a step does not fit into memory even image by image, {images} to a process; give a "
                f"smaller --batch, or a smaller --arch, --width or --image-size"
            )
        failed, asked = asked, min(2 * asked + 1, last)
    return divisors[bisect.bisect_left(divisors, True, lo=failed + 1, hi=asked, key=fits)]
