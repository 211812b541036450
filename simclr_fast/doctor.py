"""What is installed, what is fast, what falls back and why: `python -m simclr_fast.doctor`.

Every kernel is run and compared with its reference. The exit status is 1 if something that should work does not.
With --ranks R (or --gpus G) it is also shown that R processes learn what one does: minutes.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

from simclr_fast.config import ConfigError
from simclr_fast.environment import cpu_has_bf16, versions
from simclr_fast.launch import launch, world_size

OK, SLOWER, BROKEN = "ok", "slower", "BROKEN"


@dataclass(frozen=True)
class Finding:
    """What one check saw: its state, and a sentence with what was measured."""

    state: str
    text: str


def device() -> Finding:
    """The GPUs, or the processor's arithmetic."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding(OK, f"{', '.join(names)}, CUDA {torch.version.cuda}")
    bf16 = "bf16 in hardware" if cpu_has_bf16() else "no bf16 in hardware, so fp32"
    return Finding(SLOWER, f"no GPU that torch {torch.__version__} can use; the CPU has {bf16}")


def extension() -> Finding:
    """The compiled C++/CUDA half of the package."""
    from simclr_fast.optim import steps

    files = [path.name for path in Path(steps.__file__).parents[1].glob("_C*.so")]
    built = steps.extension()
    if built == "cuda":
        return Finding(OK, "simclr_fast._C, built with CUDA")
    if built:
        state = SLOWER if torch.cuda.is_available() else OK
        return Finding(state, "simclr_fast._C, built for the CPU only: there was no usable nvcc")
    if files:
        return Finding(BROKEN, f"{files[0]} is there and cannot be loaded; build it again with pip install -e .")
    return Finding(
        SLOWER, "simclr_fast._C is not built here: LARS steps in plain PyTorch. pip install -e . with g++ builds it"
    )


def lars_step() -> Finding:
    """LARS as it would step here, against plain PyTorch in float64."""
    from simclr_fast.optim import LARS, steps

    target = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((300, 700), (512,), (3, 3, 3, 3))]
    grads = [torch.randn(weight.shape, generator=generator) for weight in weights]
    ours, truth = ([weight.to(target) for weight in weights], [weight.double() for weight in weights])
    velocities = [torch.zeros_like(weight) for weight in truth]
    optimizer = LARS(ours, lr=0.5, weight_decay=1e-4)
    for _ in range(3):
        for weight, grad in zip(ours, grads, strict=True):
            weight.grad = grad.to(target)
        optimizer.step()
        for weight, grad, velocity in zip(truth, grads, velocities, strict=True):
            decayed = grad.double() + 1e-4 * weight
            velocity.mul_(0.9).add_(decayed, alpha=float(0.5 * 1e-3 * weight.norm() / decayed.norm()))
            weight.sub_(velocity)
    error = max(float((a.cpu() - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True))
    how = "fused" if steps.extension() in ("cuda", target) else "plain PyTorch"
    return _judged(error, 2e-6, f"{how} on {target}, 3 steps, relative error {error:.1e}")


def nt_xent(backend: str) -> Finding:
    """A backend of the loss, value and gradient, against the whole matrix in float64."""
    from simclr_fast.losses import nt_xent as loss

    if backend == "triton":
        try:
            import triton
        except ImportError as error:
            return Finding(SLOWER, f"Triton cannot be imported ({error}); the loss is blocked PyTorch")
    on_gpu = torch.cuda.is_available()
    generator = torch.Generator().manual_seed(0)
    # In the interpreter a tile takes long, so the CPU gets few of them: one full tile and a tail.
    n, features = (500, 128) if on_gpu or backend != "triton" else (70, 64)
    views = [torch.randn(n, features, generator=generator) for _ in range(2)]

    def value_and_gradient(backend: str, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        z1, z2 = (view.to(device, dtype).requires_grad_() for view in views)
        value = loss(z1, z2, 0.1, backend=backend)
        value.backward()
        assert z1.grad is not None
        return value.detach().double().cpu(), z1.grad.double().cpu()

    truth = value_and_gradient("reference", torch.float64, "cpu")
    found = value_and_gradient(backend, torch.float32, "cuda" if on_gpu else "cpu")
    off, slope = (float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
    where = "GPU" if on_gpu else f"interpreter, Triton {triton.__version__}" if backend == "triton" else "CPU"
    # Triton multiplies in fp16 unless told otherwise: 10 bits.
    bound = 2e-3 if backend == "triton" else 2e-6
    return _judged(max(off, slope), bound, f"{where}, relative error {off:.1e}, of the gradient {slope:.1e}")


def batch_norm() -> Finding:
    """The fused BatchNorm of GPUs, with an addition and a ReLU, against PyTorch in float64."""
    import torch.nn.functional as F

    from simclr_fast.models import fused_norm

    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(6, 16, 5, 5, generator=generator) + 3 for _ in range(2))
    weight, bias = (torch.randn(16, generator=generator) for _ in range(2))
    target = "cuda" if torch.cuda.is_available() else "cpu"
    moved = [t.to(target).contiguous(memory_format=torch.channels_last) for t in (x, residual)]
    if not fused_norm.supports(moved[0]):
        return Finding(SLOWER, "Triton is not installed; BatchNorm is PyTorch's")
    y = fused_norm.batch_norm(moved[0], weight.to(target), bias.to(target), 1e-5, residual=moved[1], relu=True)[0]
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True, 0.0, 1e-5)
    truth = torch.relu(exact + residual)
    error = float((y.cpu() - truth).norm() / truth.norm())
    return _judged(error, 2e-6, f"{'GPU' if target == 'cuda' else 'interpreter'}, relative error {error:.1e}")


def views(backend: str) -> Finding:
    """Views of uint8 images by a backend of `augment`, against float64."""
    import numpy as np

    from simclr_fast.data import Policy, augment
    from simclr_fast.data.augment import HAS_NUMBA, HAS_TRITON

    if not {"native": HAS_NUMBA, "triton": HAS_TRITON}[backend]:
        return Finding(SLOWER, f"{'numba' if backend == 'native' else 'Triton'} is not installed")
    rng, count, side = np.random.default_rng(0), 8, 40
    images = torch.from_numpy(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))
    sizes = np.full((count, 2), side)
    policy = Policy(side, dialect="tf")  # whose values are in [0, 1]
    params = policy.draw(0, np.zeros(count, np.int64), np.arange(count), 0, sizes)
    target = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    truth = augment(images, params, backend="reference", dtype=torch.float64)
    made = augment(images.to(target), params, backend=backend).cpu()
    levels = 255 * float((made.double() - truth).abs().max())
    where = "GPU" if target == "cuda" else "interpreter" if backend == "triton" else "CPU"
    return _judged(levels, 0.03, f"{where}, at most {levels:.1e} of 255 levels off")


def input_pipeline() -> Finding:
    """Both engines make the same view of the same image."""
    import numpy as np
    from PIL import Image

    from simclr_fast.data import Policy, engine_name, open_dataset, train_views

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for number in range(4):
            picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((80, 60))
            data = io.BytesIO()
            picture.save(data, "JPEG", quality=95)
            Path(folder, f"{number}.jpg").write_bytes(data.getvalue())
        split, policy = open_dataset(folder).train, Policy(32)
        engines = dict.fromkeys((engine_name("auto")[0], "torchvision"))
        views = {
            engine: next(
                iter(train_views(split, policy, batch=4, seed=0, start_step=0, steps=1, workers=0, engine=engine))
            )
            for engine in engines
        }
    if "dali" not in views:
        return Finding(SLOWER, engine_name("auto")[1])
    levels = float((views["dali"][0] - views["torchvision"][0]).abs().mean()) * 0.226 * 255
    return _judged(levels, 2.0, f"DALI, mean difference from torchvision {levels:.2f} of 255 levels")


def processes() -> Finding:
    """A collective over a group of one process, through what several would use."""
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        ones = torch.ones(3, device="cuda" if on_gpu else "cpu")
        dist.all_reduce(ones)
    finally:
        dist.destroy_process_group()
    return _judged(float((ones - 1).abs().max()), 0.0, f"{backend}, a sum over one process")


CHECKS: dict[str, Callable[[], Finding]] = {
    "device": device,
    "extension": extension,
    "LARS": lars_step,
    "NT-Xent, native": lambda: nt_xent("native"),
    "NT-Xent, Triton": lambda: nt_xent("triton"),
    "BatchNorm, Triton": batch_norm,
    "views, native": lambda: views("native"),
    "views, Triton": lambda: views("triton"),
    "input": input_pipeline,
    "processes": processes,
}


def _judged(error: float, bound: float, text: str) -> Finding:
    # A NaN is not within any bound.
    return Finding(OK, text) if error <= bound else Finding(BROKEN, f"{text}, over the bound {bound:.0e}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run every check and print what it saw; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m simclr_fast.doctor", description=__doc__)
    parser.add_argument("--ranks", type=int, default=1, help="processes on the CPU that have to learn what one does")
    parser.add_argument("--gpus", type=int, default=0, help="the same on so many GPUs, one process each")
    args = parser.parse_args(argv)
    if args.gpus < 0 or args.ranks < 1:
        parser.error(f"gpus must be 0 or more and ranks at least 1, got gpus={args.gpus}, ranks={args.ranks}")
    try:
        world = world_size(args.gpus, args.ranks)
    except ConfigError as error:
        parser.error(str(error))
    print(" · ".join(f"{name} {version}" for name, version in versions().items()), end="\n\n")
    broken = 0
    for name, check in CHECKS.items():
        began = time.monotonic()
        try:
            finding = check()
        except Exception as error:
            finding = Finding(BROKEN, f"{type(error).__name__}: {error}")
        broken += finding.state == BROKEN
        print(f"{finding.state:<7} {name:<17} {finding.text}  ({time.monotonic() - began:.1f} s)", flush=True)
    if world > 1:
        print(f"\n{world} processes against one, the trainer's own step:", flush=True)
        broken += bool(launch("simclr_fast.training.equality", ["--gpus", str(args.gpus)], world))
    print(f"\n{broken} checks failed" if broken else "\nall that should work here works")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
