"""LARS as SimCLR uses it, stepped for all tensors of a model at once.

Source: You et al. 2017, arXiv:1708.03888, with the semantics of google-research/simclr, `lars_optimizer.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from simclr_fast.optim.steps import HYPER, step_function, workspace

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)
STATE = ("momentum_buffer", "master", "ema")
SETS = 8  # of parameters with gradients that may take turns without being prepared anew
NUMBERS = ("lr", "weight_decay", "momentum", "trust_coefficient", "max_norm", "ema")  # >= 0


class LARS(Optimizer):
    """Momentum SGD whose step for a tensor is scaled by its trust ratio, trust_coefficient * |w| / |g|.

        g = g + weight_decay * w;  r = trust_coefficient * |w| / |g|  (1 if a norm is 0)
        v = momentum * v + lr * r * g;  w = w - v

    A parameter group may carry its own lr, momentum, weight_decay, trust_coefficient and `adapt`; see
    `lars_param_groups`. On CPUs and CUDA GPUs all tensors are stepped by one call of `simclr_fast._C`, on a GPU in
    two launches; the host waits for nothing.

    Parameters are float32, float64, or float16 and bfloat16, of which float32 masters are kept and stepped
    (`state[p]["master"]`; made anew from p where it was written to in place between steps). Gradients of float32
    parameters may be in half precision. `torch.amp.GradScaler` leaves unscaling, and skipping a step with
    infinities, to the step itself. A step can be captured in a CUDA graph after a first one that is not, which
    allocates what is needed; a learning rate that changes between replays must then be a tensor on the GPU.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, >= 0, or a 0-dim float32 or float64 tensor of it; it multiplies the gradient, so that v
            remembers earlier learning rates.
        momentum, trust_coefficient: >= 0.
        weight_decay: >= 0, or a tensor as `lr`.
        nesterov: step by momentum * v + lr * r * g.
        classic_momentum: False is the original's "popular" momentum: v = momentum * v + g; r is that of the
            step v instead of g, and w = w - lr * r * v.
        adapt: False: r = 1, plain momentum.
        lr_outside: the torch style, v = momentum * v + r * g, w = w - lr * v. The same while lr is constant;
            in a warm-up of 3,127 steps the default moves 0.53 of it at step 1, 0.91 at 100, 0.997 at the end.
        max_norm: clip the gradients to this norm over all parameters, as `clip_grad_norm_`, but within the
            step: the gradients themselves stay as they are.
        ema: decay of a running average of the weights, kept as `state[p]["ema"]`.
        maximize: ascend.

    Raises:
        TypeError, ValueError: a setting that is no number, negative or infinite, ema outside [0, 1), parameters of
            another dtype, a sparse gradient, state of another model.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf instead of unscaling
    found_inf: Tensor  # where set and not 0, a step changes nothing
    _step_function = staticmethod(step_function)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float | Tensor = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        classic_momentum: bool = True,
        adapt: bool = True,
        lr_outside: bool = False,
        max_norm: float | None = None,
        ema: float | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")})
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own; `max_norm` and `ema` are one for all."""
        settings = self.defaults | param_group
        for name in NUMBERS:
            value = settings[name]
            if isinstance(value, Tensor):
                if name not in ("lr", "weight_decay") or value.numel() != 1 or value.dtype not in DTYPES[:2]:
                    raise ValueError(f"{name} must be a number, or if lr or weight_decay one in a tensor, got {value}")
                value = 0 if value.is_cuda else value.item()
            if not (value is None and name in ("max_norm", "ema")):
                if not isinstance(value, Real):
                    raise TypeError(f"{name} must be a number, got {value!r}")
                if not 0 <= float(value) < math.inf:
                    raise ValueError(f"{name} must be >= 0, got {settings[name]}")
        if settings["ema"] is not None and float(settings["ema"]) >= 1:
            raise ValueError(f"ema must be in [0, 1), got {settings['ema']}")
        if self.param_groups:
            _one_for_all([self.param_groups[0], settings])
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in DTYPES:
                self.param_groups.pop()
                raise ValueError(f"LARS takes parameters of {DTYPES}, got {p.dtype} of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every parameter that has a gradient; `closure` recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, rows = [], [], []
        for row, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    params.append(p)
                    grads.append(p.grad)
                    rows.append(row)
        for g in grads:
            if g.layout is not torch.strided:
                raise ValueError(f"LARS takes dense gradients, got a sparse one of shape {list(g.shape)}")
        _one_for_all(self.param_groups)
        max_norm, ema = (self.param_groups[0][name] for name in ("max_norm", "ema"))
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        batches = self._batches(params, rows, ema)
        if max_norm is not None and len(batches) > 1:  # the norm is over all of them
            scale, max_norm = _clipping_scale(grads, scale, max_norm), None
        for batch in batches:
            batch.step(grads, self.param_groups, ema, scale, found_inf, max_norm)
        return loss

    def _batches(self, params: list[Tensor], rows: list[int], ema: float | None) -> list[_Batch]:
        """The parameters of one step each, by device and precision; made once for each set that takes turns."""
        states = self.state.values()
        key = (
            *(len(self.param_groups), ema is None, *rows, *map(id, params)),
            *([p.data_ptr() for p in params] + [p.numel() for p in params]),
            *(*map(id, states), *map(len, states)),
        )
        batches = self._made.get(key)
        if batches is None:
            places: dict[tuple[torch.device, bool], list[int]] = defaultdict(list)
            for k, p in enumerate(params):
                self._prepare(p, ema)
                places[p.device, p.dtype == torch.float64].append(k)
            batches = []
            for ks in places.values():
                members, found = [params[k] for k in ks], [self.state[params[k]] for k in ks]
                function = self._step_function(members[0].device.type)
                batches.append(_Batch(members, found, ks, [rows[k] for k in ks], function, self._versions))
            if len(self._made) == SETS:
                del self._made[next(iter(self._made))]
            key = (*key[: 2 + 4 * len(params)], *map(id, states), *map(len, states))
            self._made[key] = batches
        if any(batch.device.type == "cuda" for batch in batches) and torch.cuda.is_current_stream_capturing():
            self._captured.append(batches)  # a graph's kernels go on reading what they own
        return batches

    def _forget(self) -> None:
        self._made: dict[tuple[int, ...], list[_Batch]] = {}
        self._captured: list[list[_Batch]] = []
        self._versions: dict[int, int] = {}  # of parameters with masters, as the last step left them

    def _prepare(self, p: Tensor, ema: float | None) -> None:
        """Give p the state that it lacks, in float32 or float64 and in p's layout."""
        state, dtype = self.state[p], torch.float32 if p.dtype in HALF else p.dtype
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
        if p.dtype in HALF and "master" not in state:
            state["master"] = p.detach().to(dtype, copy=True)
        if ema is not None and "ema" not in state:
            state["ema"] = p.detach().to(dtype, copy=True)
        if p.dtype not in HALF:
            state.pop("master", None)
        like = torch.empty_like(p, dtype=dtype)
        for name in STATE:
            value = state.get(name, like)
            if value.shape != p.shape:
                raise ValueError(
                    f"state of shape {list(value.shape)} for a parameter of shape {list(p.shape)}: of another model?"
                )
            if (value.dtype, value.device, value.stride()) != (dtype, p.device, like.stride()):
                state[name] = torch.empty_like(like).copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, from any device and any step; what is kept in float32 stays so."""
        final: list[dict[str, Any]] = []  # what hooks made of it
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, loaded: final.append(loaded)),
            self.register_load_state_dict_post_hook(lambda _: self._restore_float32(final[-1]), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restore_float32(self, loaded: dict[str, Any]) -> None:
        saved = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(saved, ours, strict=True):
            if p.dtype in HALF:  # the state has been rounded to p's dtype
                for name, value in loaded["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][name] = value.to(p.device, torch.float32)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("defaults", "state", "param_groups")}


class _Batch:
    """Parameters that one call steps: of one device, all float64 or none. places: in the list of all."""

    def __init__(
        self,
        params: list[Tensor],
        states: list[Any],
        places: list[int],
        groups: list[int],
        function: Any,
        versions: dict[int, int],
    ) -> None:
        self.params, self.states, self.places, self.groups = params, states, places, groups
        self.function, self.versions = function, versions
        self.device = params[0].device
        self.halves = [k for k, p in enumerate(params) if p.dtype in HALF]
        self.copies = [params[k] for k in self.halves]
        self.workspace: tuple[Any, ...] = ()

    def step(
        self,
        grads: list[Tensor],
        param_groups: list[dict[str, Any]],
        ema: float | None,
        scale: Tensor | None,
        found_inf: Tensor | None,
        max_norm: float | None,
    ) -> None:
        """Step once; grads: of all batches, taken by `places`."""
        params = list(self.params)
        for k in self.halves:
            params[k], p = self.states[k]["master"], self.params[k]
            if self.versions.get(id(p), p._version) != p._version:  # written to since the last step
                params[k].copy_(p)
        velocities = [state["momentum_buffer"] for state in self.states]
        averages = [state["ema"] for state in self.states] if ema is not None else []
        lrs, decays = ([self._number(group[name]) for group in param_groups] for name in ("lr", "weight_decay"))
        hyper = [[self._value(group[name]) for name in HYPER] for group in param_groups]
        if not self.workspace:
            self.workspace = workspace(params, len(param_groups))
        scale, found_inf = (None if t is None else _to(t, self.device, torch.float32) for t in (scale, found_inf))
        self.function(
            params, [grads[k] for k in self.places], velocities, self.groups,
            torch.tensor(hyper, dtype=torch.float64, device="cpu"), lrs, decays, averages, 0.0 if ema is None else ema,
            self.copies, self.halves, scale, found_inf, max_norm, *self.workspace,
        )  # fmt: skip
        increment_version([*params, *velocities, *averages, *self.copies])
        self.versions.update((id(p), p._version) for p in self.copies)

    def _number(self, value: Any) -> Tensor | None:
        """A learning rate or decay that the step reads on the device itself."""
        if isinstance(value, Tensor) and value.device.type != "cpu" != self.device.type:
            return _to(value, self.device, value.dtype)
        return None

    def _value(self, value: Any) -> float:
        return 0.0 if self._number(value) is not None else float(value)


def _one_for_all(groups: list[dict[str, Any]]) -> None:
    for name in ("max_norm", "ema"):
        for group in groups[1:]:
            if group[name] != groups[0][name]:
                raise ValueError(f"{name} holds for all groups, got both {groups[0][name]} and {group[name]}")


def _to(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return t.to(device, dtype, non_blocking=device.type != "cpu")  # the host reads what comes to it at once


def _clipping_scale(grads: list[Tensor], scale: Tensor | None, max_norm: float) -> Tensor:
    """What gradients of several devices have to be divided by, to be unscaled and clipped."""
    scale = torch.ones((), device=grads[0].device) if scale is None else scale
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack([_to(n, scale.device, torch.float64) for n in norms]))
    return scale / (max_norm / (norm / scale + 1e-6)).clamp(max=1.0)


def lars_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The original's two groups: what is decayed and adapted, and what is neither.

    BatchNorm's weight and bias, every other bias, and all within a module named `head_supervised` go to the
    second group; other norms' weights are adapted, as all that the original's rule does not name. Frozen parameters
    are in their group too, to be stepped once they have gradients. A group lists its members by name under "params"
    (and, in the optimiser, "param_names"); one without members is left out.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    normed = {id(p) for m in norms for p in m.parameters()}
    adapted: dict[str, Any] = {"params": [], "weight_decay": weight_decay, "adapt": True}
    plain: dict[str, Any] = {"params": [], "weight_decay": 0.0, "adapt": False}
    for name, p in model.named_parameters():
        excluded = id(p) in normed or "bias" in name.rpartition(".")[2] or "head_supervised" in name
        (plain if excluded else adapted)["params"].append((name, p))
    groups = [group for group in (adapted, plain) if group["params"]]
    if not groups:
        raise ValueError(f"model must have parameters, got a {type(model).__name__} without any")
    return groups
