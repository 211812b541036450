"""The training steps that bench/step_bench.py compares: this package's, plain PyTorch ones, other packages' pieces.

All train the same network: torchvision's ResNet (up to 32 px with the stem for small images) and a projection head of
two linear layers, each with BatchNorm. A contender is built for a task and then takes the two views of the images of
this rank, [b, 3, S, S], as its own input pipeline hands them over: ours channels_last and, for bf16 on a GPU, in bf16;
the others' float32 and NCHW.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from _contenders import masked
from _data_contenders import STEPS, Views, Work, lightly, torchvision_pil
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from simclr_fast.data import Settings, train_views
from simclr_fast.distributed import Ranks
from simclr_fast.methods.simclr import Config, Method
from simclr_fast.models import SMALL_IMAGE
from simclr_fast.optim import LARS, Schedule, lars_param_groups
from simclr_fast.training.step import Step

OURS = "simclr_fast"
BN_OF_A_RANK, ALONE = f"{OURS}, BN of a rank", f"{OURS}, a rank alone"
TAU, DECAY, TRUST = 0.1, 1e-6, 1e-3
LR = 1e-3  # so small that a repeated batch is not learnt by heart, which would change the numbers' range


@dataclass(frozen=True)
class Task:
    """What is trained, where."""

    arch: str
    image_size: int
    batch: int  # images, of all ranks
    precision: str  # fp32 or bf16
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def rows(self) -> int:
        """Images of this rank."""
        return self.batch // self.ranks.world

    @property
    def local_bn(self) -> bool:
        """Whether plain BatchNorm stays within a rank: torch's SyncBatchNorm is for GPUs alone."""
        return self.ranks.group is not None and self.device.type == "cpu"

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True)
class Trainer:
    """A contender at work."""

    network: nn.Module  # `encoder` and `head`
    optimizer: Optimizer
    step: Callable[[Tensor, Tensor], Tensor]
    """Two views -> the loss of this rank, 0-dim, on the device; the weights are updated."""


Start = Callable[[Task, Work, int], Iterator[Views]]


@dataclass(frozen=True)
class Contender:
    """One row of the comparison."""

    name: str
    build: Callable[[Task], Trainer]
    """Raises ImportError where its package is not installed."""
    start: Start
    """Its input pipeline for real images: (task, work, seed) -> two views at a time, without end."""
    note: str = ""
    """What it does not do alike."""
    like: str | None = OURS
    """Whose loss and gradient it must have on the same weights; None: another function, which the note names."""

    @property
    def own(self) -> bool:
        """Whether it is this package's."""
        return self.name.startswith(OURS)


def method_config(task: Task) -> Config:
    return Config(arch=task.arch, image_size=task.image_size, batch=max(2, task.batch), temperature=TAU, epochs=1)


def ours(compiled: str = "off", local_bn: bool = False) -> Callable[[Task], Trainer]:
    """The trainer's own step, with BatchNorm over all ranks unless `local_bn`."""

    def build(task: Task) -> Trainer:
        method = Method(method_config(task)).to(task.device, memory_format=torch.channels_last)
        optimizer = LARS(lars_param_groups(method, DECAY), lr=LR, trust_coefficient=TRUST)
        step = Step(
            method, optimizer, Schedule(LR, 0, STEPS), batch=task.batch, group=task.ranks.group,
            autocast=task.autocast(), bn_images=task.rows if local_bn else None, compiled=compiled,
        )  # fmt: skip
        numbers = itertools.count()
        return Trainer(method, optimizer, lambda *views: step(next(numbers), [torch.cat(views)])[0])

    return build


class PlainLARS(Optimizer):
    """LARS as it is usually written: tensor by tensor, without asking the host."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR, "weight_decay": DECAY, "momentum": 0.9, "trust_coefficient": TRUST})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                d = p.grad
                if p.ndim > 1:
                    d = d.add(p, alpha=group["weight_decay"])
                    p_norm, d_norm = torch.norm(p), torch.norm(d)
                    both = (p_norm > 0) & (d_norm > 0)
                    d = d.mul(torch.where(both, group["trust_coefficient"] * p_norm / d_norm, 1.0))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                p.sub_(state["momentum"].mul_(group["momentum"]).add_(d, alpha=group["lr"]))


def torchvision_encoder(task: Task) -> nn.Module:
    """torchvision's ResNet without its classifier; with a 3x3 stem and no max-pool for small images."""
    encoder = getattr(torchvision.models, task.arch)(weights=None)
    encoder.fc = nn.Identity()
    if task.image_size <= SMALL_IMAGE:
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder


def features_of(task: Task) -> int:
    return 2048 if task.arch not in ("resnet18", "resnet34") else 512


def plain_head(features: int) -> nn.Sequential:
    """Linear, BN, ReLU, linear, BN, the last BN without a shift, as this package's."""
    last = nn.BatchNorm1d(128)
    last.register_parameter("bias", None)
    dense = nn.Linear(features, features, bias=False), nn.Linear(features, 128, bias=False)
    return nn.Sequential(dense[0], nn.BatchNorm1d(features), nn.ReLU(inplace=True), dense[1], last)


class Gather(torch.autograd.Function):
    """The rows of all ranks, with gradients."""

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gathered_masked(z1: Tensor, z2: Tensor) -> Tensor:
    """The whole 2N x 2N matrix of all ranks' views, on every rank."""
    if dist.is_initialized():
        z1, z2 = Gather.apply(z1.contiguous()), Gather.apply(z2.contiguous())
    return masked(z1, z2, TAU)


def assembled(
    task: Task, head: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], optimizer: Callable[[nn.Module], Optimizer],
    *, channels_last: bool = False, compiled: bool = False, apart: bool = False,
) -> Trainer:  # fmt: skip
    """A usual training loop; the network sees both views at once, or one after the other if `apart`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = nn.Sequential()
    network.add_module("encoder", torchvision_encoder(task))
    network.add_module("head", head)
    network.to(task.device, memory_format=layout)
    model: Any = network
    if task.ranks.group is not None:
        if task.device.type == "cuda":
            network = model = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        model = DistributedDataParallel(network)
    if compiled:
        model = torch.compile(model)
    chosen = optimizer(network)

    def step(view1: Tensor, view2: Tensor) -> Tensor:
        chosen.zero_grad()
        with task.autocast():
            if apart:
                z1, z2 = (model(view.contiguous(memory_format=layout)) for view in (view1, view2))
            else:
                z1, z2 = model(torch.cat([view1, view2]).contiguous(memory_format=layout)).chunk(2)
            value = loss(z1, z2)
        value.backward()
        chosen.step()
        return value.detach()

    return Trainer(network, chosen, step)


def plain(channels_last: bool, compiled: bool = False) -> Callable[[Task], Trainer]:
    """PyTorch without any other package."""

    def build(task: Task) -> Trainer:
        head = plain_head(features_of(task))
        return assembled(
            task, head, gathered_masked, lambda network: PlainLARS(network.parameters()),
            channels_last=channels_last, compiled=compiled,
        )  # fmt: skip

    return build


def lightly_step(task: Task) -> Trainer:
    """As in its benchmarks/imagenet/resnet50/simclr.py, without the classifier that learns beside."""
    importlib.import_module("lightly.transforms")  # its input, which must not be missed only when it is timed
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.models.utils import get_weight_decay_parameters
    from lightly.utils.lars import LARS as LightlyLARS

    def optimizer(network: nn.Module) -> Optimizer:
        decayed, others = get_weight_decay_parameters([network])
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return LightlyLARS(groups, lr=LR, momentum=0.9, weight_decay=DECAY, trust_coefficient=TRUST)

    features = features_of(task)
    head = SimCLRProjectionHead(features, features, 128).layers
    return assembled(task, head, NTXentLoss(TAU, gather_distributed=task.ranks.world > 1), optimizer)


def solo_learn_step(task: Task) -> Trainer:
    """Its loss and LARS, each view through the network by itself, channels_last, as its training step does."""
    from solo.losses.simclr import simclr_loss_func
    from solo.utils.lars import LARS as SoloLARS

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        images = torch.arange(len(z1), device=z1.device) + task.ranks.rank * len(z1)
        return simclr_loss_func(torch.cat([z1, z2]), images.repeat(2), TAU)

    def optimizer(network: nn.Module) -> Optimizer:
        return SoloLARS(
            network.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY, eta=TRUST, clip_lr=True,
            exclude_bias_n_norm=True,
        )  # fmt: skip

    return assembled(task, plain_head(features_of(task)), loss, optimizer, channels_last=True, apart=True)


def own_dtype(task: Task) -> torch.dtype:
    """Of the views that the trainer asks for."""
    return torch.bfloat16 if task.device.type == "cuda" and task.precision == "bf16" else torch.float32


def own_views(task: Task, work: Work, seed: int) -> Iterator[Views]:
    """The trainer's input, by the engine that it chooses."""
    for *views, _ in train_views(
        work.split, work.policy, batch=task.batch, seed=seed, start_step=0, steps=STEPS, rank=task.ranks.rank,
        world=task.ranks.world, device=task.device, dtype=own_dtype(task), settings=Settings(workers=work.workers),
    ):  # fmt: skip
        yield views


def torchvision_views(task: Task, work: Work, seed: int) -> Iterator[Views]:
    return torchvision_pil(work, seed * task.ranks.world + task.ranks.rank)


def lightly_views(task: Task, work: Work, seed: int) -> Iterator[Views]:
    return lightly(work, seed * task.ranks.world + task.ranks.rank)


def contenders(task: Task, compiled: bool = False) -> list[Contender]:
    """Those for a task; `compiled` adds torch.compile's modes."""
    like = BN_OF_A_RANK if task.local_bn else OURS
    modes = {"compiled": "default"} | ({"CUDA graphs": "reduce-overhead"} if task.device.type == "cuda" else {})
    several = [
        Contender(ALONE, ours(), own_views, "its share of the batch, without the others: a bound", like=None),
        *([Contender(BN_OF_A_RANK, ours(local_bn=True), own_views, like=like)] if task.local_bn else []),
    ]
    return [
        Contender(OURS, ours(), own_views),
        *(Contender(f"{OURS}, {name}", ours(mode), own_views) for name, mode in modes.items() if compiled),
        *(several if task.ranks.group is not None else []),
        Contender("plain, NCHW", plain(channels_last=False), torchvision_views, like=like),
        Contender("plain, channels_last", plain(channels_last=True), torchvision_views, like=like),
        *([Contender("plain, compiled", plain(True, True), torchvision_views, like=like)] if compiled else []),
        Contender("lightly", lightly_step, lightly_views, "its last BN has a shift", like=like),
        Contender("solo-learn", solo_learn_step, torchvision_views, "BN of each view by itself", like=None),
    ]


def synthetic(task: Task, contender: Contender) -> Views:
    """Two views of noise, the same numbers for all, in the form that its input pipeline gives."""
    generator = torch.Generator().manual_seed(1 + task.ranks.rank)
    shape = (2, task.rows, 3, task.image_size, task.image_size)
    views = torch.randn(shape, generator=generator).bfloat16().to(task.device)
    if contender.own:
        return [view.to(own_dtype(task)).contiguous(memory_format=torch.channels_last) for view in views]
    return [view.float() for view in views]
