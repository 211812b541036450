"""The losses that bench/loss_bench.py compares: this package's, plain PyTorch ones, and those of other packages.

A contender is built for a temperature and takes two views, [N, D] each, float32; rows are not normalised.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simclr_fast.losses import nt_xent

Loss = Callable[[Tensor, Tensor], Tensor]
ROWS = 512  # of S that the chunked contenders hold at a time


@dataclass(frozen=True)
class Contender:
    """One column of the comparison."""

    name: str
    build: Callable[[float], Loss]
    """Temperature -> loss; raises ImportError where its package is not installed."""
    package: str | None = None
    kind: str = "NT-Xent"
    """The mathematics: only equal kinds must agree in value."""
    tolerance: float = 1e-4
    """Relative error of loss and gradient against float64, above which it is not the same loss."""
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    cuda_only: bool = False
    compiles: bool = False
    """For every shape anew."""
    peak: Callable[[int], float] | None = lambda n: 13.5 * n**2
    """Bytes it is expected to take at n = 2N rows, read from its source or seen; None: O(N D)."""

    @property
    def version(self) -> str | None:
        return importlib.metadata.version(self.package) if self.package else None

    def missing(self, tau: float, device: str) -> str | None:
        """Why it cannot run here, if it cannot."""
        try:
            self.build(tau)
        except ImportError as error:
            return f"not installed: {self.package or error.name}"
        return "needs a GPU" if self.cuda_only and device == "cpu" else None


def labels(n: int, like: Tensor) -> Tensor:
    """The positive of each of n rows, view 1 first."""
    return torch.arange(n, device=like.device).roll(n // 2)


def masked(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    """The reference: cross-entropy over the whole matrix with its diagonal masked, as SimCLR code usually has it."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = z @ z.T / tau
    s = s.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(s, labels(len(z), z))


def masked_bf16(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    with torch.autocast(z1.device.type, torch.bfloat16):
        return masked(z1, z2, tau)


def compiled(tau: float) -> Loss:
    torch._dynamo.reset()  # every shape is compiled for itself, and counts towards a limit
    return torch.compile(functools.partial(masked, tau=tau), fullgraph=True, dynamic=False)


def checkpointed(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    """`masked` by rows; the backward pass computes each block of the matrix again."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)

    def block(rows: Tensor, at: Tensor) -> Tensor:
        s = (rows @ z.T / tau).scatter(1, at[:, None], -torch.inf)
        return F.cross_entropy(s, (at + len(z) // 2) % len(z), reduction="sum")

    places = torch.arange(len(z), device=z.device).split(ROWS)
    return sum(checkpoint(block, z[at], at, use_reentrant=False) for at in places) / len(z)  # type: ignore[misc]


class ClosedForm(torch.autograd.Function):
    """The loss of unit rows by blocks; dz_i = (1 / (n tau)) sum_j (P_ij + P_ji - 2 [j = pos(i)]) z_j."""

    @staticmethod
    def forward(ctx, z, tau):
        lse = torch.cat([_block(z, at, tau).logsumexp(1) for at in range(0, len(z), ROWS)])
        ctx.save_for_backward(z, lse)
        ctx.tau = tau
        return (lse - (z * z.roll(len(z) // 2, 0)).sum(1) / tau).mean()

    @staticmethod
    def backward(ctx, grad):
        (z, lse), dz = ctx.saved_tensors, torch.empty_like(ctx.saved_tensors[0])
        for at in range(0, len(z), ROWS):
            s = _block(z, at, ctx.tau)
            weight = (s - lse[at : at + ROWS, None]).exp_().add_((s - lse).exp_())
            dz[at : at + ROWS] = weight @ z
        return (dz - 2 * z.roll(len(z) // 2, 0)) * (grad / (len(z) * ctx.tau)), None


def _block(z: Tensor, at: int, tau: float) -> Tensor:
    s = z[at : at + ROWS] @ z.T / tau
    s[:, at : at + ROWS].fill_diagonal_(-torch.inf)
    return s


def closed_form(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    return ClosedForm.apply(F.normalize(torch.cat([z1, z2]), dim=1), tau)


def clip(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    """CLIP's loss, both directions over an N x N matrix: the yardstick of that kind."""
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / tau
    at = torch.arange(len(s), device=s.device)
    return (F.cross_entropy(s, at) + F.cross_entropy(s.T, at)) / 2


def ours_clip(tau: float) -> Loss:
    from simclr_fast.losses import info_nce

    return lambda z1, z2: info_nce(z1, z2, tau, symmetric=True)


def lightly(tau: float) -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=tau)


def pytorch_metric_learning(tau: float) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=tau)
    return lambda z1, z2: loss(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2))


def open_clip(tau: float) -> Loss:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda z1, z2: loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1), 1 / tau)


def inf_cl(tau: float) -> Loss:
    from inf_cl import cal_flash_loss

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        q, k = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        both = [cal_flash_loss(*pair, scale=1 / tau, head_dim=min(256, z1.shape[1])) for pair in ((q, k), (k, q))]
        return (both[0].mean() + both[1].mean()) / 2

    return loss


def memeff(tau: float) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=tau, stable=False)  # `stable` scales the gradient


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def plain(function: Callable[..., Tensor], **options: object) -> Callable[[float], Loss]:
    return lambda tau: lambda z1, z2: function(z1, z2, tau, **options)


OURS = "simclr_fast"
# The error of a product in bf16 or fp16 also depends on the temperature: 0.1 here.
EVERY = (
    Contender(OURS, plain(nt_xent), tolerance=5e-3, peak=None),
    Contender(f"{OURS} tf32", plain(nt_xent, precision="tf32"), tolerance=5e-3, cuda_only=True, peak=None),
    Contender(f"{OURS} fp32", plain(nt_xent, precision="fp32"), cuda_only=True, peak=None),
    Contender("reference fp32", plain(masked)),
    Contender("reference tf32", plain(masked), tolerance=5e-3, context=tf32, cuda_only=True),
    Contender("reference bf16 autocast", plain(masked_bf16), tolerance=5e-2, peak=lambda n: 22 * n**2),
    Contender("reference compiled", compiled, compiles=True),
    Contender("chunked checkpoint", plain(checkpointed), peak=None),
    Contender("chunked closed form", plain(closed_form), peak=None),
    Contender("lightly", lightly, "lightly", peak=lambda n: 17 * n**2),
    Contender("pytorch-metric-learning", pytorch_metric_learning, "pytorch-metric-learning", peak=lambda n: 17 * n**3),
    Contender(f"{OURS} CLIP form", ours_clip, kind="CLIP", tolerance=5e-3, peak=None),
    Contender("open_clip", open_clip, "open_clip_torch", kind="CLIP", peak=lambda n: 6 * n**2),
    Contender("Inf-CL", inf_cl, "inf_cl", kind="CLIP", tolerance=5e-3, cuda_only=True, peak=None),
    Contender("memeff", memeff, "memeff", kind="CLIP", tolerance=5e-3, cuda_only=True, peak=None),
)


def expected(kind: str, z1: Tensor, z2: Tensor, tau: float) -> tuple[Tensor, Tensor] | None:
    """Loss and gradient, [2N, D], in float64; None where that takes minutes.

    Up to 2N = 4,096 from the whole matrix; NT-Xent beyond that by blocks, which the tests compare with the matrix.
    """
    n, (z1, z2) = 2 * len(z1), (z.detach().double().requires_grad_() for z in (z1, z2))
    most = {"NT-Xent": 16384, "CLIP": 8192} if z1.device.type == "cpu" else {"NT-Xent": 1 << 18, "CLIP": 32768}
    if n > most[kind]:
        return None
    backend = "reference" if n <= 4096 else "native"
    loss = clip(z1, z2, tau) if kind == "CLIP" else nt_xent(z1, z2, tau, backend=backend)
    return loss.detach(), torch.cat(torch.autograd.grad(loss, (z1, z2)))
