"""LARS as SimCLR uses it, stepped for all tensors of a model at once.

Source: You et al. 2017, arXiv:1708.03888, with the semantics of google-research/simclr, `lars_optimizer.py`.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

try:
    import simclr_fast._C  # noqa: F401  registers simclr_fast::lars_step
except ImportError as error:
    _ABSENT = f"cannot be loaded ({error})"
else:
    _ABSENT = ""
    torch.library.register_fake("simclr_fast::lars_step", lambda *args: None)

HYPER = tuple("lr weight_decay momentum trust_coefficient adapt nesterov classic_momentum lr_outside".split())
"""The numbers a parameter group hands to a step, in this order."""

_FUSED = {("cpu", torch.float32), ("cpu", torch.float64), ("cuda", torch.float32)}


def extension() -> str:
    """What the compiled step was built for: "cuda" (GPU and CPU), "cpu", or "" where there is none."""
    if _ABSENT:
        return ""
    cuda = torch._C._dispatch_has_kernel_for_dispatch_key("simclr_fast::lars_step", "CUDA")
    return "cuda" if cuda else "cpu"


def lars_reference(
    params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], groups: list[int], hyper: Tensor
) -> None:
    """One step in plain PyTorch, in place: the yardstick of the fused one, and what runs where that cannot.

    Args:
        params, grads, velocities: tensors w, g, v of one shape each.
        groups: for each tensor, its row of `hyper`.
        hyper: [groups, 8], float64 on the CPU: the values of `HYPER`.
    """
    rows = hyper.tolist()
    for w, g, v, group in zip(params, grads, velocities, groups, strict=True):
        lr, weight_decay, momentum, trust, adapt, nesterov, classic, lr_outside = rows[group]
        d = g.to(w.dtype) + weight_decay * w
        divisor = d if classic else _moved(v, d, 1.0, momentum, nesterov)[1]
        ratio = _trust_ratio(w, divisor, trust) if adapt else 1.0
        a, b = (1.0, lr * ratio) if not classic else (ratio, lr) if lr_outside else (lr * ratio, 1.0)
        velocity, update = _moved(v, d, a, momentum, nesterov)
        v.copy_(velocity)
        w.sub_(b * update)


def _moved(v: Tensor, d: Tensor, a: float | Tensor, m: float, nesterov: float) -> tuple[Tensor, Tensor]:
    velocity = m * v + a * d
    return velocity, m * velocity + a * d if nesterov else velocity


def _trust_ratio(w: Tensor, x: Tensor, trust: float) -> Tensor:
    dtype = torch.promote_types(w.dtype, torch.float32)
    w_norm, x_norm = (torch.linalg.vector_norm(t, dtype=dtype) for t in (w, x))
    return torch.where((w_norm > 0) & (x_norm > 0), trust * w_norm / x_norm, 1.0)


def _step_function(device: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> Callable[..., None]:
    if dtype != grad_dtype or (device, dtype) not in _FUSED:
        reason = f"no fused step for {dtype} parameters with {grad_dtype} gradients on {device}"
    elif extension() in ("cuda", device):
        return torch.ops.simclr_fast.lars_step
    else:
        reason = f"simclr_fast._C {_ABSENT or 'is without CUDA'}; `pip install -e .` builds it"
    _warn_once(f"LARS steps in plain PyTorch, more slowly: {reason}")
    return lars_reference


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=6)  # the caller of LARS.step


class LARS(Optimizer):
    """Momentum SGD whose step for a tensor is scaled by its trust ratio, trust_coefficient * |w| / |g|.

        g = g + weight_decay * w;  r = trust_coefficient * |w| / |g|  (1 if a norm is 0)
        v = momentum * v + lr * r * g;  w = w - v

    A parameter group may carry its own lr, momentum, weight_decay, trust_coefficient and `adapt`; see
    `lars_param_groups`. float32 and, on the CPU, float64 parameters are stepped by `simclr_fast._C`.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, >= 0; it multiplies the gradient, so that v remembers earlier learning rates. The
            host reads it at every step: a tensor on a GPU makes it wait.
        momentum, weight_decay, trust_coefficient: >= 0.
        nesterov: step by momentum * v + lr * r * g.
        classic_momentum: False is the original's "popular" momentum: v = momentum * v + g; r is that of the
            step v instead of g, and w = w - lr * r * v.
        adapt: False: r = 1, plain momentum.
        lr_outside: the torch style, v = momentum * v + r * g, w = w - lr * v. The same while lr is constant;
            in a warm-up of 3,127 steps the default moves 0.53 of it at step 1, 0.91 at 100, 0.997 at the end.
        max_norm: clip the gradients, in place, to this norm over all parameters.
        ema: decay of a running average of the weights, kept as `state[p]["ema"]`.

    Raises:
        ValueError: a negative setting, ema outside [0, 1), a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        classic_momentum: bool = True,
        adapt: bool = True,
        lr_outside: bool = False,
        max_norm: float | None = None,
        ema: float | None = None,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "max_norm"):
            if defaults[name] is not None and defaults[name] < 0:
                raise ValueError(f"{name} must be >= 0, got {defaults[name]}")
        if ema is not None and not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every parameter that has a gradient; `closure` recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches: dict[tuple, list[tuple]] = defaultdict(list)
        for row, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    batches[p.device, p.dtype, p.grad.dtype].append((p, p.grad, self._velocity(p), row))
        params = [p for batch in batches.values() for p, *_ in batch]
        if self.defaults["max_norm"] is not None:
            nn.utils.clip_grad_norm_(params, self.defaults["max_norm"])
        hyper = torch.tensor([[float(g[k]) for k in HYPER] for g in self.param_groups], dtype=torch.float64)
        for (device, dtype, grad_dtype), batch in batches.items():
            lists = [list(column) for column in zip(*batch, strict=True)]
            _step_function(device.type, dtype, grad_dtype)(*lists, hyper)
            increment_version(lists[0] + lists[2])
        if self.defaults["ema"] is not None and params:
            averages = [self.state[p]["ema"] for p in params]
            torch._foreach_lerp_(averages, params, 1 - self.defaults["ema"])
        return loss

    def _velocity(self, p: Tensor) -> Tensor:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise ValueError(f"LARS takes dense gradients, got a sparse one of shape {list(p.shape)}")
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
            if self.defaults["ema"] is not None:
                state["ema"] = p.clone()
        return state["momentum_buffer"]


def lars_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The original's two groups: what is decayed and adapted, and what is neither.

    BatchNorm's weight and bias, every other bias, and all within a module named `head_supervised` go to the
    second group. A group lists its members by name under "params" (and, in the optimiser, "param_names").
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    normed = {id(p) for m in norms for p in m.parameters()}
    adapted: dict[str, Any] = {"params": [], "weight_decay": weight_decay, "adapt": True}
    plain: dict[str, Any] = {"params": [], "weight_decay": 0.0, "adapt": False}
    for name, p in model.named_parameters():
        if p.requires_grad:
            excluded = id(p) in normed or "bias" in name.rpartition(".")[2] or "head_supervised" in name
            (plain if excluded else adapted)["params"].append((name, p))
    return [adapted, plain]
